"""The shard format, and the one writer of it.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] number of tokens, the rest 0), then the
tokens as little-endian uint16. Documents start with a BOS token; the last of a shard may go on in the next one.
"""

import fcntl
import itertools
import os
import re
import struct
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from command import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts them in an int32


def to_uint16(tokens):
    """`tokens` (a sequence of integers, or an array) as a 1-d uint16 array; UserError where one does not fit."""
    tokens = np.asarray(tokens)
    if tokens.dtype == np.uint16 and tokens.ndim == 1 or not tokens.size:
        return tokens.astype(np.uint16, copy=False).ravel()
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"expected a row of whole numbers, found {tokens.ndim}-d {tokens.dtype}")
    misfits = np.flatnonzero((tokens < 0) | (tokens > 65535))
    if misfits.size:
        raise UserError(f"expected tokens from 0 to 65535, found {tokens[misfits[0]]} at position {misfits[0]}")
    return tokens.astype(np.uint16)


def write_shard(path, tokens):
    """Write `tokens` as the shard `path`: all of it or, whatever happens, nothing.

    UserError: they are not uint16, or the file cannot be written.
    """
    path, tokens = Path(path), to_uint16(tokens)
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(header.data)
            file.write(tokens.astype("<u2", copy=False).data)
        os.replace(partial, path)
    except OSError as error:  # of a full disk it does not name the file
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:  # after a KeyboardInterrupt, too
        partial.unlink(missing_ok=True)


def check_shard(path):
    """The number of tokens in the shard `path`, from its header and size alone; UserError if it is not a whole one."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path}: expected a header of {HEADER_BYTES:,} bytes, found {size:,} bytes in all")
    magic, version, count = struct.unpack_from("<3i", header)
    if magic != MAGIC:
        raise UserError(f"{path}: expected magic {MAGIC}, found {magic}: not a shard")
    if version != VERSION:
        raise UserError(f"{path}: expected version {VERSION}, found {version}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        state = "truncated" if size < expected else "over-long"
        raise UserError(f"{path}: expected {expected:,} bytes for {count:,} tokens, found {size:,}: {state}")
    return count


def shard_name(prefix, split, number):
    """The file name of a shard; `split` is "train" or "val"."""
    return f"{prefix}_{split}_{number:06d}.bin"


def shard_names(prefix, split, first):
    """The names of a split's shards from number `first` on, without end. Validation counts from 0, training from 1."""
    return (shard_name(prefix, split, number) for number in itertools.count(first))


def existing_shards(directory, prefix):
    """The shards of either split with this prefix that lie in `directory`, sorted."""
    pattern = re.compile(re.escape(prefix) + r"_(train|val)_\d{6}\.bin")
    return sorted(path for path in Path(directory).glob(f"{prefix}_*.bin") if pattern.fullmatch(path.name))


@contextmanager
def locked(directory):
    """Keep other processes that do the same with `directory` waiting."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks: then they go at once
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged(directory, prefix, overwrite):
    """Yield an empty folder for a new set of shards; if all goes well, its files then move into `directory`.

    A set is published whole or not at all, and never mixes with another one: UserError if `directory` holds shards of
    that prefix, now or when the new ones are made, and `overwrite` is false; else those go once the new ones are there.
    Of several processes that do this at once on a machine, the last one's set stays.
    """
    directory = Path(directory)

    def check():
        if not overwrite and existing_shards(directory, prefix):
            raise UserError(
                f"{directory} already holds {prefix} shards: give another --out, or --overwrite to replace them"
            )

    check()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix}_", dir=directory) as staging:
        yield Path(staging)
        with locked(directory):
            check()
            new = sorted(os.listdir(staging))
            for name in new:
                os.replace(Path(staging, name), directory / name)
            for path in existing_shards(directory, prefix):
                if path.name not in new:
                    path.unlink(missing_ok=True)  # on another machine, the lock is another


class TokenShardWriter:
    """Cuts a stream of documents into shards of exactly `shard_tokens` tokens; the last one holds the rest.

    A context manager. `names` yields the shards' file names in order. A shard is written as soon as it is full; if the
    block is left by an exception, the shards that were full stay and the rest is dropped.
    `paths` and `tokens`: what has been written.
    """

    def __init__(self, directory, names, shard_tokens):
        self.directory = Path(directory)
        self.names = iter(names)
        self.buffer = np.empty(shard_tokens, np.uint16)  # untouched pages of it take no memory
        self.filled = 0
        self.paths = []
        self.tokens = 0

    def add(self, document):
        """Append token ids, BOS first (one document, or several in a row)."""
        document = to_uint16(document)
        while len(document):
            part = document[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            document = document[len(part) :]
            if self.filled == len(self.buffer):
                self._write()

    def _write(self):
        path = self.directory / next(self.names)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_shard(path, self.buffer[: self.filled])
        self.paths.append(path)
        self.tokens += self.filled
        self.filled = 0

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        if exception_type is None and self.filled:
            self._write()
