"""HellaSwag: how often a model finds the true one of four endings likeliest.

    python evals/hellaswag.py --checkpoint logs/x_step001285.pt

An ending's score is the mean (or the sum) of its tokens' losses after the context. The four completions of an item are
four documents; many are packed into one sequence, and the model's own mask keeps them apart.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from command import Parser, UserError, between, catch_interrupts, first_line, missing, run

catch_interrupts(__name__)  # before the imports that take seconds

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

import checkpoint
import train_gpt


@dataclass
class Completion:
    """One item's context and one of its endings, as a document that begins with BOS."""

    item: int
    ending: int
    tokens: list[int]
    first: int  # where the ending begins in `tokens`


def read_items(path: str | None) -> list[dict]:
    """The items, each with `ctx`, `endings` and `label`: from a JSONL file, or the validation split on the hub.

    The file may be gzipped, begin with a byte order mark, and have blank lines.
    """
    if path is None:
        return download_items()
    items = []
    try:
        with open(path, "rb") as file:
            zipped = file.peek(2).startswith(b"\x1f\x8b")  # as all gzip files do, and no JSON
            for number, line in enumerate(gzip.open(file) if zipped else file, 1):
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                item = read_item(line)
                if item is None:
                    expected = "ctx (a text), endings (a list of four texts) and label (0 to 3)"
                    raise UserError(
                        f"{path}: line {number}: expected an object with {expected}, in UTF-8, and no text empty"
                    )
                items.append(item)
    except (OSError, EOFError, zlib.error) as error:
        # An OSError without a `strerror` is the gzip module's, as are the other two.
        reason = getattr(error, "strerror", None) or f"the gzip file is damaged: {first_line(error)}"
        raise UserError(f"{path}: {reason}") from None
    return items


def read_item(line: bytes) -> dict | None:
    """The item that a line of a JSONL file holds; None if it holds none, or one with something missing or wrong."""
    try:
        item = json.loads(line.decode())
        endings, label = item["endings"], item["label"]
        texts = [item["ctx"], *endings]
        four = isinstance(endings, list) and len(endings) == 4
        # `encode` raises a ValueError for half a surrogate pair, which JSON can escape, but no tokenizer knows.
        written = all(isinstance(text, str) and text.encode() for text in texts)
        labelled = type(label) in (int, str) and str(label) in ("0", "1", "2", "3")
    except (ValueError, KeyError, TypeError, RecursionError):  # the last: brackets within brackets without end
        return None
    return item if four and written and labelled else None


def download_items() -> list[dict]:
    """The 10,042 items of `Rowan/hellaswag`, kept by the hub's own cache."""
    try:
        import pyarrow.parquet
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{missing(error.name, 'evals/requirements.txt')}, or use --data") from None
    try:
        path = hf_hub_download("Rowan/hellaswag", "data/validation-00000-of-00001.parquet", repo_type="dataset")
        return pyarrow.parquet.read_table(path, columns=["ctx", "endings", "label"]).to_pylist()
    except Exception as error:
        what = f"HellaSwag could not be fetched: {first_line(error)}"
        raise UserError(f"{what}; a local JSONL will do: --data FILE") from None


def completions(items: list[dict], model: checkpoint.Checkpoint) -> Iterator[Completion]:
    for i, item in enumerate(items):
        context = [model.bos, *model.encode(item["ctx"])]
        for e, ending in enumerate(item["endings"]):
            yield Completion(i, e, context + model.encode(" " + ending), len(context))


def packed(documents: Iterable[Completion], length: int) -> Iterator[list[Completion]]:
    """Completions in groups of at most `length` tokens together."""
    group, used = [], 0
    for document in documents:
        size = len(document.tokens)
        if size > length:
            raise UserError(f"an item of {size:,} tokens does not fit into --pack {length:,}")
        if used + size > length:
            yield group
            group, used = [], 0
        group.append(document)
        used += size
    if group:
        yield group


def score(groups: Iterable[list[Completion]], model: checkpoint.Checkpoint, length: int) -> Iterator[tuple]:
    """Yields each completion with the losses (n,) of its ending's tokens. All sequences have `length` tokens."""
    context = model.context(length)
    device = model.model.embed.device
    for group in groups:
        tokens = [token for document in group for token in document.tokens]
        tokens += [model.bos] * (length + 1 - len(tokens))
        tokens = torch.tensor(tokens, device=device)
        losses = model.model.evaluate(tokens[:-1], tokens[1:], context).cpu()
        start = 0
        for document in group:
            end = start + len(document.tokens)
            yield document, losses[start + document.first - 1 : end - 1]  # a token's loss stands where it is predicted
            start = end


def accuracies(items: list[dict], scored: Iterable[tuple]) -> tuple[float, float]:
    """The shares of items whose true ending has the least loss: by mean, and by sum."""
    mean, total = (torch.full((len(items), 4), math.inf) for _ in range(2))
    for document, losses in scored:
        mean[document.item, document.ending] = losses.mean()
        total[document.item, document.ending] = losses.sum()
    labels = torch.tensor([int(item["label"]) for item in items])
    return tuple((each.argmin(1) == labels).double().mean().item() for each in (mean, total))


def command_line() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of train_gpt.py")
    parser.add_argument("--data", help="a JSONL file of items (default: Rowan/hellaswag from the Hugging Face hub)")
    parser.add_argument("--items", type=between(1, 1_000_000_000), help="only the first so many")
    length = between(64, 262_144)
    parser.add_argument("--pack", type=length, default=16_384, help="tokens of a sequence (default: 16,384)")
    return parser


def main() -> None:
    arguments = command_line().parse_args()
    model = checkpoint.load(arguments.checkpoint)
    items = read_items(arguments.data)[: arguments.items]
    if not items:
        raise UserError("there are no items")
    device = model.model.embed.device
    train_gpt.compile_or_not(device.type != "cpu", device)
    scored = score(packed(completions(items, model), arguments.pack), model, arguments.pack)
    by_mean, by_sum = accuracies(items, tqdm(scored, "completions", total=4 * len(items), disable=None))
    print(f"HellaSwag, {len(items):,} items, {arguments.checkpoint}:")
    for how, accuracy in ("mean", by_mean), ("sum", by_sum):
        error = math.sqrt(accuracy * (1 - accuracy) / len(items))
        print(f"accuracy by {how} of token losses: {accuracy:.4f} ± {error:.4f} (standard error)")


if __name__ == "__main__":
    run(main, train_gpt.UserError)
