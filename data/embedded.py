"""Make the embedded corpus: the Python sources of the installed sympy, as bytes, in sympy/ beside this script.

Where the requirements are installed, so is this text: nothing to download, and the same bytes everywhere.

The package's *.py files, as relative POSIX paths, are sorted, then shuffled by `random.Random(0)`, whose shuffle is the
same in every Python 3; every 20th is validation. Tokens are bytes, BOS 256; files are cut at line ends into pieces of
at most 1,024 tokens with the BOS. Validation pieces stay in the order of the files; training pieces are shuffled once
more by a fresh `random.Random(0)`, so that a small batch is not all from one file.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

from command import Parser, UserError, catch_interrupts, missing, run

catch_interrupts(__name__)  # before the imports that take seconds

import random
import re
from importlib import metadata

import numpy as np

from shards import check_shard, shard_name, staged, write_shard
from text import byte_pieces

FOLDER = Path(__file__).resolve().parent
REQUIREMENTS = FOLDER.parent / "requirements.txt"
PREFIX = "sympy"
SEED = 0
VAL_EVERY = 20
MAX_DOC_TOKENS = 1024
TRAIN, VAL = shard_name(PREFIX, "train", 1), shard_name(PREFIX, "val", 0)
VERSION_FILE = "sympy_version.txt"  # what the shards were made from: a later sympy makes others


def pinned_version():
    """The version of sympy that requirements.txt asks for."""
    if not REQUIREMENTS.is_file():
        raise UserError(f"{REQUIREMENTS} is missing: its line sympy==... says which sympy is the corpus")
    pin = re.search(r"^sympy==([\w.]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    if not pin:
        raise UserError(f"{REQUIREMENTS} has no line sympy==...: it says which sympy is the corpus")
    return pin[1]


def shuffled(items):
    items = list(items)
    random.Random(SEED).shuffle(items)
    return items


def corpus(root):
    """The (training, validation) pieces, lists of uint16 arrays, of the Python files under `root`."""
    names = shuffled(sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")))
    split = {True: [], False: []}
    for number, name in enumerate(names, 1):
        split[number % VAL_EVERY == 0].extend(byte_pieces((root / name).read_bytes(), MAX_DOC_TOKENS))
    return shuffled(split[False]), split[True]


def made_from(directory):
    """The version of sympy that the shards in `directory` were made from, or None if they are not there and whole."""
    try:
        check_shard(directory / TRAIN)
        check_shard(directory / VAL)
        return (directory / VERSION_FILE).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UserError):
        return None


def main():
    Parser(description="Make the embedded corpus: the Python sources of the installed sympy, as bytes.").parse_args()
    pinned = pinned_version()
    try:
        sympy = metadata.distribution("sympy")  # importing sympy would take a second
    except metadata.PackageNotFoundError:
        raise missing("sympy") from None
    if sympy.version != pinned:
        print(
            f"embedded.py: warning: sympy {sympy.version} is installed, and requirements.txt has {pinned}: "
            "the corpus differs, and numbers will not be comparable",
            file=sys.stderr,
        )
    directory = FOLDER / PREFIX
    if made_from(directory) == sympy.version:
        print(f"embedded corpus: {directory} is already made from sympy {sympy.version}")
        return

    train, val = corpus(Path(sympy.locate_file("sympy")))
    if not val:
        raise UserError(
            f"no Python sources in {sympy.locate_file('sympy')}: pip install --force-reinstall sympy=={pinned}"
        )
    with staged(directory, PREFIX, overwrite=True) as staging:
        for name, split in ((TRAIN, train), (VAL, val)):
            write_shard(staging / name, np.concatenate(split))
        (staging / VERSION_FILE).write_text(sympy.version + "\n", encoding="utf-8")
    print(
        f"embedded corpus: {directory} made from sympy {sympy.version}: "
        f"{sum(map(len, train)):,} training and {sum(map(len, val)):,} validation tokens"
    )


if __name__ == "__main__":
    run(main, outlives_reader=True)
