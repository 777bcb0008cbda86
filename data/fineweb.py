"""Tokenize FineWeb or FineWeb-Edu from scratch, as a stream from the Hugging Face hub, on all cores.

    python data/fineweb.py [--dataset fineweb|finewebedu] [--sample 10BT|100BT] [--out DIR]

A document is BOS and GPT-2's tokens of its text. The first shard is validation, the others training.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

from command import Parser, UserError, between, catch_interrupts, first_line, missing, run

catch_interrupts(__name__)  # before the imports that take seconds

from contextlib import closing
from itertools import chain

from shards import MAX_SHARD_TOKENS, TokenShardWriter, existing_shards, shard_name, shard_names
from text import tokenized

REPOS = {"fineweb": "HuggingFaceFW/fineweb", "finewebedu": "HuggingFaceFW/fineweb-edu"}
SAMPLES = {"10BT": 10_000_000_000, "100BT": 100_000_000_000}  # about how many tokens: for the progress bar


def read_documents(load_dataset, repo, sample):
    """Yield (None, text) for each document of a sample on the hub, as a stream."""
    try:
        for row in load_dataset(repo, name=f"sample-{sample}", split="train", streaming=True):
            yield None, row["text"]
    except Exception as error:  # of the hub's own types, its HTTP library's, its parquet reader's
        raise UserError(f"reading {repo} failed: {first_line(error)} (the shards that were full stay)") from error


def main():
    parser = Parser(description="Tokenize FineWeb or FineWeb-Edu from scratch, on all cores.")
    parser.add_argument("--dataset", choices=REPOS, default="fineweb", help="default: %(default)s")
    parser.add_argument("--sample", choices=SAMPLES, default="10BT", help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the shards (default: that of the download it equals, such as data/fineweb10B)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=between(1, MAX_SHARD_TOKENS),
        default=100_000_000,
        metavar="N",
        help="tokens in a shard (default: %(default)s)",
    )
    args = parser.parse_args()
    prefix = args.dataset
    directory = args.out or Path(__file__).resolve().parent / f"{prefix}{args.sample.removesuffix('T')}"
    if existing_shards(directory, prefix):
        raise UserError(f"{directory} already holds {prefix} shards: delete them, or give another --out")

    try:
        from datasets import load_dataset
    except ImportError:
        raise missing("datasets", "data/requirements.txt") from None
    from tqdm import tqdm

    documents = read_documents(load_dataset, REPOS[prefix], args.sample)
    names = chain([shard_name(prefix, "val", 0)], shard_names(prefix, "train", 1))
    with (
        tqdm(total=SAMPLES[args.sample], unit="tokens", unit_scale=True, disable=None) as bar,
        TokenShardWriter(directory, names, args.shard_tokens) as writer,
        closing(tokenized(documents, "gpt2")) as parts,
    ):
        for _, _, tokens in parts:
            writer.add(tokens)
            bar.update(len(tokens))
    print(f"{directory}: {writer.tokens:,} tokens in {len(writer.paths):,} shards, the first for validation")


if __name__ == "__main__":
    run(main, outlives_reader=True)
