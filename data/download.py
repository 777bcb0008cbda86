"""Fetch pre-tokenized shards from the Hugging Face hub: what the cached_*.py scripts do.

A shard appears under its name only once it has been checked. One that is there and whole is not fetched again; one that
is damaged is. Whatever stops a download, the same command goes on with the shard that it broke off, from its start.

Several processes may fetch into the same folder: each has a hidden folder of its own in it for what it has in hand.
"""

import os
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

from command import Parser, UserError, between, first_line, missing, run
from shards import check_shard, shard_name

Dataset = namedtuple("Dataset", "repo prefix train_shards")
DATASETS = {  # by the name of the folder they go to
    "fineweb10B": Dataset("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Dataset("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Dataset("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def is_whole(path, tell=lambda line: None):
    """Whether the shard `path` is there and whole; `tell` is called with a line about a damaged one."""
    try:
        check_shard(path)
    except FileNotFoundError:
        return False
    except UserError as error:
        tell(f"{error}; fetching it again")
        return False
    return True


def fetch(repo, path):
    """Fetch the shard `path`, named alike in the hub's dataset `repo`."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise missing("huggingface_hub") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    # A network's file system may not let go of a file at once: what cannot be removed must not hide what went wrong.
    with tempfile.TemporaryDirectory(prefix=".incoming_", dir=path.parent, ignore_cleanup_errors=True) as incoming:
        try:
            fetched = hf_hub_download(repo, path.name, repo_type="dataset", local_dir=incoming)
        except Exception as error:  # of the hub's own types, its HTTP library's, its transfer library's
            raise UserError(
                f"could not fetch {path} from {repo}: {first_line(error)} "
                "(the shards before it stay: the same command goes on with this one)"
            ) from error
        try:
            check_shard(fetched)
        except UserError as error:
            raise UserError(f"{repo} sent a bad shard, dropped (try again later): {error}") from error
        if not is_whole(path):  # another process may have been faster
            os.replace(fetched, path)


def download(name, train_shards, directory):
    """Have the validation shard and the first `train_shards` training shards of DATASETS[name] in `directory`."""
    from tqdm import tqdm

    dataset = DATASETS[name]
    paths = [directory / shard_name(dataset.prefix, "val", 0)]
    paths += [directory / shard_name(dataset.prefix, "train", number) for number in range(1, train_shards + 1)]
    fetched = 0
    with tqdm(paths, unit="file", desc=name, disable=None) as bar:
        for path in bar:
            if not is_whole(path, tell=bar.write):
                fetch(dataset.repo, path)
                fetched += 1
    print(f"{directory}: {len(paths):,} shards, {fetched:,} of them fetched now, all whole")


def main(name):
    """The command line of the script for DATASETS[name]."""
    count = DATASETS[name].train_shards

    def fetch_shards():
        parser = Parser(description=f"Fetch shards of {DATASETS[name].repo} from the Hugging Face hub to data/{name}/.")
        parser.add_argument(
            "train_shards",
            nargs="?",
            type=between(1, count),
            default=count,
            metavar="N",
            help="training shards to have, 100M tokens each (default: all %(default)s)",
        )
        download(name, parser.parse_args().train_shards, Path(__file__).resolve().parent / name)

    run(fetch_shards, outlives_reader=True)
