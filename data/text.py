"""Turn any text into training and validation shards.

    python data/text.py PATH... --out DIR [--max-doc-tokens N] [--tokenizer gpt2|bytes]

A file is a document; so is the `text` field of each line of a .jsonl or .ndjson file, and each row of a .parquet file's
`text` column; an empty one does not count, nor does a null. All but .parquet may be compressed, with .gz or .zst as a
last suffix. Folders are searched for the suffixes in documents.py, in sorted order, without hidden files and folders; a
file or pipe that is named is always taken, and one reached twice is taken once. Every 20th document (--val-every) goes
to validation.

Text files are UTF-8, or as --encoding says. What is not text is refused, or left out and counted with --skip-bad.

Tokens: `gpt2` is GPT-2's tokenizer, BOS 50256; `bytes` is the 256 byte values of the text in UTF-8, BOS 256. With
--max-doc-tokens, documents are cut at line ends into pieces of at most N tokens, each with a BOS of its own, which
counts. The tokenizer runs before the cut, so the pieces of a document hold the tokens of the whole; only groups of
lines of a million characters are tokenized by themselves, so that all cores share a large file.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

from command import Parser, UserError, between, catch_interrupts, first_line, missing, run

catch_interrupts(__name__)  # before the imports that take seconds

import functools
import glob
import multiprocessing
import os
import shlex
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import numpy as np

from documents import Reader, opened, text_encoding
from shards import MAX_SHARD_TOKENS, TokenShardWriter, shard_names, staged

PREFIX = "text"
GPT2_BOS = 50256
BYTES_BOS = 256
GROUP_CHARS = 1 << 20  # what one process tokenizes at a time


# Tokens and pieces


def spans(lines, line_end, room):
    """Cut `lines` into (start, stop) spans of at most `room`, each as long as can be and ending with `line_end`.

    lines, line_end: str or bytes, `line_end` of length 1. A line longer than `room` is cut hard.
    """
    start = 0
    while len(lines) - start > room:
        stop = lines.rfind(line_end, start, start + room) + 1 or start + room  # rfind: -1 if there is none
        yield start, stop
        start = stop
    if start < len(lines):
        yield start, len(lines)


def pieces(tokens, lines, line_end, bos, max_doc_tokens):
    """Cut a document into uint16 arrays of at most `max_doc_tokens` tokens, with `bos` first in each and counted.

    lines: str or bytes as long as `tokens`, with `line_end` where a token ends a line. None as limit: one piece.
    """
    for start, stop in spans(lines, line_end, max_doc_tokens - 1 if max_doc_tokens else len(lines)):
        piece = np.empty(1 + stop - start, np.uint16)
        piece[0] = bos
        piece[1:] = tokens[start:stop]
        yield piece


def byte_pieces(data, max_doc_tokens):
    """The pieces of `data` (bytes), one token a byte."""
    return pieces(np.frombuffer(data, np.uint8), data, b"\n", BYTES_BOS, max_doc_tokens)


@functools.cache
def gpt2():
    """GPT-2's encoding, and which of its tokens end a line, as a bool array. UserError if it cannot be had."""
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
    except ImportError:
        raise missing("tiktoken") from None
    except Exception as error:  # it fetches its table once, and passes on what its HTTP library raises
        raise UserError(
            f"GPT-2's tokenizer could not be fetched: {first_line(error)} (text.py --tokenizer bytes needs none)"
        ) from error
    ends_line = [encoding.decode_single_token_bytes(token).endswith(b"\n") for token in range(GPT2_BOS)]
    return encoding, np.array(ends_line)


def gpt2_pieces(text, max_doc_tokens):
    """The pieces of `text` (str) in GPT-2's tokens."""
    encoding, ends_line = gpt2()
    tokens = np.array(encoding.encode_ordinary(text), np.uint16)
    return pieces(tokens, ends_line[tokens].tobytes(), b"\1", GPT2_BOS, max_doc_tokens)


def encode_batch(batch, tokenizer, max_doc_tokens):
    """Tokenize a list of (split, begins, text) to a list of (split, begins, uint16 tokens).

    `begins` is true for the first group of lines of a document. Later groups get a BOS only if documents are cut.
    """
    to_pieces = byte_pieces if tokenizer == "bytes" else gpt2_pieces
    encoded = []
    for split, begins, text in batch:
        tokens = np.concatenate(list(to_pieces(text, max_doc_tokens)))
        encoded.append((split, begins, tokens if begins or max_doc_tokens else tokens[1:]))
    return encoded


def batches(documents):
    """Cut (split, text) documents into groups of lines, and gather these to lists of about GROUP_CHARS characters."""
    batch, size = [], 0
    for split, text in documents:
        for start, stop in spans(text, "\n" if isinstance(text, str) else b"\n", GROUP_CHARS):
            batch.append((split, start == 0, text[start:stop]))
            size += stop - start
            if size >= GROUP_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def start_worker():
    """What each tokenizing process does first: leave Ctrl-C to the main process, and end where that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encoded_batches(documents, tokenizer, max_doc_tokens):
    """`encode_batch` of each of the batches of `documents`, in order."""
    encode = functools.partial(encode_batch, tokenizer=tokenizer, max_doc_tokens=max_doc_tokens)
    if tokenizer == "bytes":  # nothing to compute: other processes would only add copies
        yield from map(encode, batches(documents))
        return
    gpt2()  # once here, so that a failure to fetch it is said once
    # Spawned, since the libraries that stream data have threads, which a fork does not survive.
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        pending = deque()  # short, so that reading keeps just ahead of tokenizing
        for batch in batches(documents):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 3 * os.cpu_count():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed: free some memory, if that ran out, and try again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def tokenized(documents, tokenizer, max_doc_tokens=None):
    """Tokenize (split, text) documents, with GPT-2's tokenizer on all cores; yields (split, begins, uint16 tokens).

    tokenizer: "gpt2", with text as str, or "bytes", with text as bytes; empty texts vanish. In the order given; a large
    document comes in several parts, of which the first has `begins` true. To be closed if left early.
    """
    for batch in encoded_batches(documents, tokenizer, max_doc_tokens):
        yield from batch


# Documents


def all_documents(reader, files, tokenizer, val_every):
    """Yield (split, text) for all documents that are not empty, as the tokenizer wants them, with a progress bar."""
    from tqdm import tqdm

    sizes = [path.stat().st_size for path in files]
    number = before = 0
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar:
        for path, size in zip(files, sizes):
            with opened(path) as file:
                for text in reader.read(path, file):
                    if file.seekable():  # a pipe does not know where it is
                        bar.update(before + file.tell() - bar.n)
                    if not text:
                        continue
                    number += 1
                    yield "train" if number % val_every else "val", text.encode() if tokenizer == "bytes" else text
            before += size


def shell_word(text):
    """`text` as one word of a command line."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = [chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(text)]
    return f"$'{''.join(escaped)}'"


def main():
    parser = Parser(description="Turn any text into training and validation shards.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file or pipe, or a folder to search")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--max-doc-tokens",
        type=between(2, MAX_SHARD_TOKENS),
        metavar="N",
        help="cut documents at line ends into pieces of at most N tokens, BOS included (default: do not)",
    )
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2", help="default: %(default)s")
    parser.add_argument(
        "--val-every",
        type=between(2, MAX_SHARD_TOKENS),
        default=20,
        metavar="N",
        help="every N-th document is validation (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=between(1, MAX_SHARD_TOKENS),
        default=100_000_000,
        metavar="N",
        help="tokens in a shard (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace the {PREFIX} shards in DIR")
    parser.add_argument(
        "--encoding",
        type=text_encoding,
        default="utf-8",
        metavar="NAME",
        help="of text files: a Python codec, such as latin-1 or utf-16; records are UTF-8 (default: %(default)s)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out, and count, what is refused as not text")
    args = parser.parse_args()

    reader = Reader(args.encoding, args.skip_bad)
    files = reader.find(args.paths)
    counts = {"train": 0, "val": 0}
    with staged(args.out, PREFIX, args.overwrite) as staging:
        documents = all_documents(reader, files, args.tokenizer, args.val_every)
        with (
            TokenShardWriter(staging, shard_names(PREFIX, "train", 1), args.shard_tokens) as train,
            TokenShardWriter(staging, shard_names(PREFIX, "val", 0), args.shard_tokens) as val,
            closing(tokenized(documents, args.tokenizer, args.max_doc_tokens)) as parts,
        ):
            writers = {"train": train, "val": val}
            for split, begins, tokens in parts:
                counts[split] += begins
                writers[split].add(tokens)
        found = sum(counts.values())
        if not found:
            raise UserError("; ".join([f"no text found in {' '.join(args.paths)}", *reader.notes()]))
        if not counts["val"]:
            remedy = f"give --val-every {found} or less" if found > 1 else "give several files, or records in a .jsonl"
            raise UserError(
                f"too little text: of {args.val_every} documents one is for validation, and there are {found}: {remedy}"
            )

    for split, writer in writers.items():
        names = [str(args.out / path.name) for path in writer.paths]
        files_written = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
        print(f"{split:5} {counts[split]:,} documents, {writer.tokens:,} tokens: {files_written}")
    for note in reader.notes():
        print(note)
    preset = "--preset tiny " if args.tokenizer == "bytes" else ""
    pattern = {
        split: shell_word(os.path.join(glob.escape(str(args.out)), f"{PREFIX}_{split}_*.bin")) for split in writers
    }
    print(f"options of train_gpt.py: {preset}--train-files {pattern['train']} --val-files {pattern['val']}")


if __name__ == "__main__":
    run(main, outlives_reader=True)
