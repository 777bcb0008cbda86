"""The tools in data/, mostly as users meet them: by their command lines, with stand-ins for hub and libraries.

Shards are parsed here by hand, and pieces are cut by a second, line-by-line algorithm.
"""

import codecs
import errno
import glob
import gzip
import hashlib
import itertools
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

import shards
import text
from command import UserError
from rules import STREAMS

ROOT = Path(__file__).resolve().parent.parent
TIKTOKEN_CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ROOT.parent / "shared" / "tiktoken_cache"))
needs_gpt2 = pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason="no copy of GPT-2's tokenizer here")


def make_project(folder):
    """A copy of the data tools with requirements beside it, so that no test writes into the project's own data/."""
    shutil.copytree(ROOT / "data", folder / "data", ignore=lambda directory, names: [n for n in names if "." not in n])
    shutil.copy(ROOT / "command.py", folder)
    (folder / "requirements.txt").write_text("numpy\nsympy==1.14.0  # the embedded corpus\n")
    return folder


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


@pytest.fixture
def fakes(tmp_path):
    """A folder whose modules come before the installed ones in `tool`'s processes."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    return folder


def tool(project, script, *args, fakes=None, **environment):
    """Run a data script; `fakes` is a folder of modules that take the place of installed ones."""
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(TIKTOKEN_CACHE), **environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(fakes or ""), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(project / "data" / script), *map(str, args)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=project, timeout=60
    )


def assert_done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_refused(result, *words, status=2):
    """One line on stderr, holding these words, and this exit status."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert str(word) in result.stderr
    return result.stderr


def pack(tokens, magic=20240520, version=1, count=None):
    """A shard's bytes, made by hand."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def unpack(path):
    """A shard's tokens, read by hand."""
    data = Path(path).read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header == (20240520, 1, (len(data) - 1024) // 2, *[0] * 253)
    return list(struct.unpack(f"<{header[2]}H", data[1024:]))


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def split_at(tokens, bos):
    """The documents (without their BOS) of a token stream, which must begin with one."""
    assert tokens[0] == bos
    starts = [i for i, token in enumerate(tokens) if token == bos] + [len(tokens)]
    return [tokens[a + 1 : b] for a, b in itertools.pairwise(starts)]


def files_in(folder):
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if "__pycache__" not in path.parts]


def cut_line_by_line(data, room):
    """Pieces of at most `room` bytes, gathered greedily from whole lines; a line that is longer is cut hard."""
    pieces, current = [], b""
    for line in re.findall(rb"[^\n]*\n|[^\n]+", data):
        if len(current) + len(line) > room:
            pieces.append(current)
            current = line
            while len(current) > room:
                pieces.append(current[:room])
                current = current[room:]
        else:
            current += line
    return [piece for piece in [*pieces, current] if piece]


# The format


def test_shard_is_a_header_of_256_int32_then_uint16_tokens(tmp_path):
    shards.write_shard(tmp_path / "a.bin", [50256, 0, 65535])
    assert (tmp_path / "a.bin").read_bytes() == pack([50256, 0, 65535])
    assert files_in(tmp_path) == ["a.bin"]


def test_check_shard_counts_tokens(tmp_path):
    for tokens in ([], [7], range(1000)):
        (tmp_path / "a.bin").write_bytes(pack(tokens))
        assert shards.check_shard(tmp_path / "a.bin") == len(tokens)


@pytest.mark.parametrize(
    "data, expected, found",
    [
        (pack([1, 2], magic=20240521), "magic 20240520", "20240521"),
        (pack([1, 2], version=2), "version 1", "found 2"),
        (pack([1, 2])[:-1], "1,028 bytes for 2 tokens", "1,027: truncated"),
        (pack([1, 2]) + b"\0", "1,028 bytes for 2 tokens", "1,029: over-long"),
        (pack([1, 2], count=-1), "1,022 bytes for -1 tokens", "1,028"),
        (pack([])[:1023], "1,024 bytes", "1,023"),
        (b"<html>", "1,024 bytes", "found 6"),
        (b"", "1,024 bytes", "found 0"),
    ],
)
def test_damaged_shard_is_named_with_what_was_expected_and_found(tmp_path, data, expected, found):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError) as caught:
        shards.check_shard(tmp_path / "a.bin")
    assert str(tmp_path / "a.bin") in str(caught.value)
    assert expected in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize("tokens", [[1, 65536], [-1], [0.5], [[1, 2]]])
def test_tokens_beyond_uint16_are_rejected_and_nothing_is_written(tmp_path, tokens):
    with pytest.raises(UserError):
        shards.write_shard(tmp_path / "a.bin", tokens)
    assert files_in(tmp_path) == []


def test_interrupted_write_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    shards.write_shard(tmp_path / "a.bin", [1])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(tmp_path / "a.bin", [2, 3])
    assert files_in(tmp_path) == ["a.bin"]
    assert unpack(tmp_path / "a.bin") == [1]


def test_writer_cuts_the_stream_into_shards_of_exact_size(tmp_path):
    documents = [[256, *range(n)] for n in (3, 0, 25, 1, 9)]
    with shards.TokenShardWriter(tmp_path, shards.shard_names("x", "train", 1), 10) as writer:
        for document in documents:
            writer.add(document)
    stream = flat(documents)
    assert files_in(tmp_path) == [f"x_train_00000{i}.bin" for i in range(1, 6)]
    assert [unpack(path) for path in writer.paths] == [stream[i : i + 10] for i in range(0, len(stream), 10)]
    assert writer.tokens == len(stream) == 43


def test_writer_makes_no_empty_shard(tmp_path):
    with shards.TokenShardWriter(tmp_path, shards.shard_names("x", "train", 1), 4) as writer:
        writer.add([1, 2, 3, 4])
    assert files_in(tmp_path) == ["x_train_000001.bin"]


def test_writer_left_by_an_exception_keeps_full_shards_only(tmp_path):
    with pytest.raises(KeyboardInterrupt), shards.TokenShardWriter(tmp_path, iter("ab"), 2) as writer:
        writer.add([1, 2, 3])
        raise KeyboardInterrupt
    assert files_in(tmp_path) == ["a"]
    assert unpack(tmp_path / "a") == [1, 2]


def test_sets_that_are_published_at_once_never_mix(tmp_path, monkeypatch):
    replace, published = os.replace, []
    meeting = threading.Barrier(3)

    def slow_replace(source, target):
        if Path(target).parent == tmp_path:
            published.append(unpack(source))
            time.sleep(0.001)
        replace(source, target)

    def publish(number):
        with shards.staged(tmp_path, "x", overwrite=True) as staging:
            for shard in range(20 - number):
                shards.write_shard(staging / shards.shard_name("x", "train", shard), [number])
            meeting.wait()

    monkeypatch.setattr(os, "replace", slow_replace)
    with ThreadPoolExecutor() as pool:
        list(pool.map(publish, range(3)))
    turns = [(number, len(list(group))) for [number], group in itertools.groupby(published)]
    assert sorted(turns) == [(0, 20), (1, 19), (2, 18)]
    last, count = turns[-1]
    assert [unpack(path) for path in tmp_path.iterdir()] == [[last]] * count


def test_set_that_appears_meanwhile_is_not_replaced_unasked(tmp_path):
    with pytest.raises(UserError, match="already holds x shards"):
        with shards.staged(tmp_path, "x", overwrite=False) as staging:
            shards.write_shard(staging / "x_train_000001.bin", [1])
            shards.write_shard(tmp_path / "x_train_000002.bin", [2])
    assert [path.name for path in tmp_path.iterdir()] == ["x_train_000002.bin"]


# Pieces

RANDOM_TEXTS = [
    bytes(random.Random(seed).choices(b"ab \n", weights=[9, 9, 4, seed % 5], k=seed * 7)) for seed in range(1, 40)
]


@pytest.mark.parametrize("limit", [2, 3, 17, 1000])
def test_pieces_rejoin_to_the_original_bytes(limit):
    for data in RANDOM_TEXTS:
        found = [piece.tolist() for piece in text.byte_pieces(data, limit)]
        assert all(piece[0] == 256 and 2 <= len(piece) <= limit for piece in found)
        assert b"".join(bytes(piece[1:]) for piece in found) == data


@pytest.mark.parametrize("limit", [2, 3, 17, 1000])
def test_pieces_are_as_many_whole_lines_as_fit(limit):
    for data in RANDOM_TEXTS:
        assert [bytes(piece[1:].tolist()) for piece in text.byte_pieces(data, limit)] == cut_line_by_line(
            data, limit - 1
        )


def test_without_a_limit_a_document_is_one_piece():
    assert [piece.tolist() for piece in text.byte_pieces(b"a\nb\n", None)] == [[256, 97, 10, 98, 10]]


# text.py


def write_documents(folder, count):
    """`count` text files d000.txt ...; returns their bytes."""
    folder.mkdir(parents=True)
    contents = [f"file {i}\n".encode() + b"x\n" * i for i in range(count)]
    for i, content in enumerate(contents):
        (folder / f"d{i:03}.txt").write_bytes(content)
    return contents


def shard_documents(folder, split, bos=256):
    stream = flat(unpack(path) for path in sorted(folder.glob(f"text_{split}_*.bin")))
    return split_at(stream, bos)


def byte_documents(folder, split):
    return [bytes(document) for document in shard_documents(folder, split)]


def test_every_twentieth_file_is_validation(project, tmp_path):
    contents = write_documents(tmp_path / "in", 45)
    output = assert_done(tool(project, "text.py", tmp_path / "in", "--out", tmp_path / "out", "--tokenizer", "bytes"))
    assert files_in(tmp_path / "out") == ["text_train_000001.bin", "text_val_000000.bin"]
    assert byte_documents(tmp_path / "out", "val") == [contents[19], contents[39]]
    assert byte_documents(tmp_path / "out", "train") == contents[:19] + contents[20:39] + contents[40:]
    train_tokens = sum(len(content) + 1 for i, content in enumerate(contents) if i not in (19, 39))
    assert f"43 documents, {train_tokens:,} tokens" in output and "val   2 documents" in output
    assert f"--train-files '{tmp_path}/out/text_train_*.bin' --val-files '{tmp_path}/out/text_val_*.bin'" in output


def test_long_documents_become_pieces_with_a_bos_each(project, tmp_path):
    data = (Path(__file__).read_bytes() + b"y" * 500 + b"\n") * 2
    for i in range(2):
        (tmp_path / f"{i}.txt").write_bytes(data)
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes", "--val-every", 2, "--max-doc-tokens", 100]
    assert "val   1 documents" in assert_done(tool(project, "text.py", tmp_path / "0.txt", tmp_path / "1.txt", *args))
    for split in ("train", "val"):
        assert byte_documents(tmp_path / "out", split) == cut_line_by_line(data, 99)


def test_documents_go_on_in_the_next_shard(project, tmp_path):
    contents = write_documents(tmp_path / "in", 20)
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes", "--shard-tokens", 100]
    assert "and 5 more" in assert_done(tool(project, "text.py", tmp_path / "in", *args))
    trains = sorted((tmp_path / "out").glob("text_train_*.bin"))
    assert [path.name for path in trains] == [f"text_train_00000{i}.bin" for i in range(1, 7)]
    assert [len(unpack(path)) for path in trains[:-1]] == [100] * 5
    assert byte_documents(tmp_path / "out", "train") == contents[:19]


def test_folders_are_searched_for_text_and_named_files_always_taken(project, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    kept = {"b.md": b"b", "sub/a.PY": b"a", "c.c": b"c", "z.jsonl": b'{"text": "z"}\n'}
    dropped = {"a.png": b"no", "binary.txt": b"\0", ".hidden.txt": b"no", ".git/x.py": b"no", "empty.txt": b""}
    for name, content in {**kept, **dropped}.items():
        (folder / name).write_bytes(content)
    (folder / "broken.txt").symlink_to("nowhere")
    (tmp_path / "named.bin").write_bytes(b"named")
    # The last two have been reached already.
    paths = [tmp_path / "named.bin", folder, folder / "b.md", folder / "sub"]
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes", "--val-every", 5]
    output = assert_done(tool(project, "text.py", *paths, *args))
    assert byte_documents(tmp_path / "out", "train") == [b"named", b"b", b"c", b"z"]
    assert byte_documents(tmp_path / "out", "val") == [b"a"]
    assert "skipped 1 binary files" in output and "passed over: 1 .png\n" in output


def text_shards(project, out, *args, **environment):
    """text.py with tokens of bytes, of which every second document is for validation."""
    return tool(project, "text.py", *args, "--out", out, "--tokenizer", "bytes", "--val-every", 2, **environment)


def documents_in_order(out):
    """What `text_shards` has made of all documents, as bytes."""
    both = itertools.zip_longest(byte_documents(out, "train"), byte_documents(out, "val"))
    return [document for document in flat(both) if document is not None]


def zst(data):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


COMPRESSIONS = {"gz": gzip.compress, "zst": zst}


def write_parquet(path, columns, **options):
    """columns: a dict of them, or a table."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns) if isinstance(columns, dict) else columns
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)


# Compressed files


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS.items())
def test_compressed_files_are_read_as_what_they_hold(project, tmp_path, suffix, compress):
    folder = tmp_path / "in"
    folder.mkdir()
    long = "".join(f"line {i} ü\n" for i in range(50_000))
    contents = {
        "a.txt": "one\r\ntwo\n",
        "b.MD": long,
        "c.jsonl": '\ufeff{"text": "three"}\n\n{"text": "four\\n"}',
        "d.ndjson": json.dumps({"text": long}) + "\n",
    }
    for name, content in contents.items():
        (folder / f"{name}.{suffix.upper() if name == 'b.MD' else suffix}").write_bytes(compress(content.encode()))
    (folder / f"e.txt.{suffix}").write_bytes(compress(b"of two ") + compress(b"parts"))
    (folder / f"archive.tar.{suffix}").write_bytes(b"")
    (folder / f"rows.parquet.{suffix}").write_bytes(b"")
    (folder / f"nothing.{suffix}").write_bytes(b"")
    (tmp_path / f"named.{suffix}").write_bytes(compress(b"no suffix\n"))
    output = assert_done(text_shards(project, tmp_path / "out", folder, tmp_path / f"named.{suffix}"))
    expected = ["one\r\ntwo\n", long, "three", "four\n", long, "of two parts", "no suffix\n"]
    assert documents_in_order(tmp_path / "out") == [text.encode() for text in expected]
    assert re.search(r"^passed over: (.*)$", output, re.MULTILINE)[1].split(", ") == [
        f"1 .tar.{suffix}", f"1 .{suffix}", f"1 .parquet.{suffix}",
    ]  # fmt: skip


def damaged(whole):
    """Ways in which a compressed file can be none."""
    return {
        "half": whole[: len(whole) // 2],
        "all but a byte": whole[:-1],
        "the first byte": whole[:1],
        "nothing": b"",
        "plain text": b"plain text\n",
        "a tail": whole + b"tail",
        "half a second part": whole + whole[:9],
    }


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS.items())
@pytest.mark.parametrize("inner", ["txt", "jsonl"])
def test_file_that_is_not_wholly_compressed_is_named_and_leaves_nothing(project, tmp_path, suffix, compress, inner):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    for what, data in damaged(compress(content)).items():
        path = tmp_path / f"a.{inner}.{suffix}"
        path.write_bytes(data)
        result = text_shards(project, tmp_path / "out", path, "--shard-tokens", 5)
        assert_refused(result, f"{path}: cannot be read: "), what
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_gzip_whose_checksum_differs_is_refused(project, tmp_path):
    data = bytearray(gzip.compress(b"text\n" * 9))
    data[-8] ^= 1
    (tmp_path / "a.md.gz").write_bytes(data)
    assert_refused(text_shards(project, tmp_path / "out", tmp_path / "a.md.gz"), "a.md.gz: cannot be read: CRC")


def test_damaged_file_in_a_folder_is_refused_even_with_skip_bad(project, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"text\n" * 9)[:-9])
    result = text_shards(project, tmp_path / "out", tmp_path / "in", "--skip-bad")
    assert_refused(result, f"{tmp_path}/in/a.txt.gz: cannot be read")


def test_long_compressed_records_are_not_held_in_memory(project, tmp_path, fakes):
    line = json.dumps({"pad": "x" * 1_000_000, "text": "short"}).encode() + b"\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(line)
    (fakes / "sitecustomize.py").write_text(
        "import atexit\natexit.register(lambda: print(open('/proc/self/status').read()))\n"
    )
    output = assert_done(text_shards(project, tmp_path / "out", tmp_path / "a.jsonl.gz", fakes=fakes))
    assert documents_in_order(tmp_path / "out") == [b"short"] * 300
    assert int(re.search(r"VmHWM:\s*(\d+) kB", output)[1]) < 150_000  # the most memory that it has held


def test_parquet_and_zst_without_pyarrow_say_what_to_install(project, tmp_path, fakes):
    (fakes / "pyarrow.py").write_text("raise ImportError")
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        result = text_shards(project, tmp_path / "out", tmp_path / name, fakes=fakes)
        assert_refused(result, tmp_path / name, "pyarrow is missing", "pip install -r ", "data/requirements.txt")


def test_compressed_parquet_is_refused(project, tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    result = text_shards(project, tmp_path / "out", tmp_path / "a.parquet.gz")
    assert_refused(result, f"{tmp_path}/a.parquet.gz: parquet has its own compression")


# Encodings


@pytest.mark.parametrize(
    "data, options, words",
    [
        (b"caf\xe9 au lait", [], "byte 3 (0xe9) is not utf-8"),
        (b"\xef\xbb\xbfcaf\xe9", [], "byte 6 (0xe9) is not utf-8"),
        ("ü".encode()[:1], [], "byte 0 (0xc3) is not utf-8"),
        (b"\xed\xa0\x80", [], "byte 0 (0xed) is not utf-8"),  # half a surrogate pair
        (b"a" * 9000 + b"\xff", [], "byte 9,000 (0xff)"),
        ("é\0".encode(), [], "byte 2 is a zero"),
        (b"\xef\xbb\xbf\0", [], "byte 3 is a zero"),
        (b"\xe9\0", ["--encoding", "latin-1"], "byte 1 is a zero"),
        ("é".encode(), ["--encoding", "ascii"], "byte 0 (0xc3) is not ascii"),
        ("text".encode("utf-16-le"), [], "byte 1 is a zero"),  # no mark says that it is UTF-16
        ("text".encode("utf-16"), [], "looks like UTF-16: --encoding utf-16"),
        (codecs.BOM_UTF16_BE + "漢字".encode("utf-16-be"), [], "looks like UTF-16: --encoding utf-16"),
        ("text".encode("utf-32"), [], "looks like UTF-32: --encoding utf-32"),
        ("text".encode("utf-32"), ["--encoding", "utf-16"], "looks like UTF-32: --encoding utf-32"),
        ("text".encode("utf-16"), ["--encoding", "latin-1"], "looks like UTF-16: --encoding utf-16"),
        ("text".encode("utf-16")[:-1], ["--encoding", "UTF16"], "byte 8 (0x74) is not UTF16"),
        ("a\U0001f600\0".encode("utf-16"), ["--encoding", "utf-16"], "byte 8 is a zero"),
        ("a\U0001f600\0".encode("utf-16-le"), ["--encoding", "utf-16"], "byte 6 is a zero"),
        (b"ab+2AA-", ["--encoding", "utf-7"], "byte 2 is half of a surrogate pair"),
    ],
)
def test_what_is_not_text_is_named_with_its_place(project, tmp_path, data, options, words):
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / "bad.txt").write_bytes(data)
    result = text_shards(project, tmp_path / "out", tmp_path / "bad.txt", *options)
    assert_refused(result, f"{tmp_path}/bad.txt: ", words, "--encoding", "--skip-bad")
    assert list((tmp_path / "out").iterdir()) == []


def test_any_encoding_becomes_utf8(project, tmp_path):
    for encoding, content in {
        "utf-8": "plain ü 漢字\r\n",
        "latin-1": "caf\xe9 \x85\r\n",
        "cp1252": "“quoted” €",
        "shift_jis": "日本語\n",
        "utf-16": "ü\U0001f600\n",
        "utf-16-be": "be ü\n",
        "utf-32": "\U0001f600",
        "utf-8-sig": "signed",
    }.items():
        (tmp_path / "a.txt").write_bytes(content.encode(encoding))
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress((content * 2).encode(encoding)))
        paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz", "--overwrite"]
        options = [] if encoding == "utf-8-sig" else ["--encoding", encoding]  # UTF-8's mark needs no option
        assert_done(text_shards(project, tmp_path / "out", *paths, *options))
        assert documents_in_order(tmp_path / "out") == [content.encode(), (content * 2).encode()]


def test_byte_order_mark_is_no_text_but_only_at_the_start(project, tmp_path):
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(f"{mark}one{mark}", encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"{mark}two", encoding="utf-16-le")
    (tmp_path / "only.txt").write_text(mark, encoding="utf-8")
    (tmp_path / "c.jsonl").write_text(f'{mark}{{"text": "{mark}three"}}', encoding="utf-8")
    paths = [tmp_path / name for name in ("a.txt", "only.txt", "c.jsonl")]
    assert_done(text_shards(project, tmp_path / "out", *paths))
    assert documents_in_order(tmp_path / "out") == [f"one{mark}".encode(), f"{mark}three".encode()]
    paths = [tmp_path / "b.txt", tmp_path / "c.jsonl"]  # which is UTF-8 whatever the text files are
    assert_done(text_shards(project, tmp_path / "out", *paths, "--encoding", "utf-16-le", "--overwrite"))
    assert documents_in_order(tmp_path / "out") == [b"two", f"{mark}three".encode()]


@pytest.mark.parametrize("name", ["latin-2000", "hex", "rot13", "idna", "", "\udcff"])
def test_what_is_no_encoding_of_text_is_refused_at_once(project, tmp_path, name):
    result = text_shards(project, tmp_path / "out", tmp_path / "nowhere", "--encoding", name)
    assert_refused(result, "--encoding: expected an encoding of text")


def test_skip_bad_leaves_out_what_is_not_text_and_counts_it(project, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.txt": b"good\n",
        "b.txt": b"caf\xe9\n",
        "c.txt": b"a" * 9000 + b"\0",  # no binary file at its start
        "d.md.gz": gzip.compress("text".encode("utf-16")[:-1] + b"\xff"),
        "e.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "\\ud800"}\n{"text": "two", "url": "\\udfff"}\n'
        b'{"text": "a\\u0000b"}\n{"text": "a\0b"}\n{"text": null}\n{"text": "\\ud83d\\ude00"}\n',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (tmp_path / "named.bin").write_bytes(b"\0named")
    paths = [folder, tmp_path / "named.bin"]
    output = assert_done(text_shards(project, tmp_path / "out", *paths, "--skip-bad"))
    assert documents_in_order(tmp_path / "out") == [b"good\n", b"one", b"two", "\U0001f600".encode()]
    for line in ("skipped 1 binary files", "skipped 3 bad files", "skipped 4 bad records", "skipped 1 null records"):
        assert line in output.splitlines()

    paths = [folder / "b.txt", folder / "e.jsonl", "--encoding", "latin-1"]  # for text files alone
    output = assert_done(text_shards(project, tmp_path / "latin", *paths, "--skip-bad"))
    assert documents_in_order(tmp_path / "latin") == ["café\n".encode(), b"one", b"two", "\U0001f600".encode()]
    result = text_shards(project, tmp_path / "none", folder / "b.txt", folder / "c.txt", "--skip-bad")
    assert_refused(result, "no text found", "skipped 2 bad files")


# Folders


def test_binary_files_are_skipped_in_folders_and_refused_by_name(project, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    binary = {
        "a.txt": b"\0",
        "b.txt": b"a" * 8191 + b"\0",
        "c.txt.gz": gzip.compress(b"a\0" + b"b" * 99_999),
        "d.md": "text".encode("utf-16"),
    }
    text = {"e.txt": b"one", "f.txt": b"two"}
    for name, content in {**binary, **text}.items():
        (folder / name).write_bytes(content)
    # What is reached twice counts once.
    output = assert_done(text_shards(project, tmp_path / "out", folder, folder))
    assert documents_in_order(tmp_path / "out") == [b"one", b"two"]
    assert "skipped 4 binary files\n" in output
    for name in binary:
        for paths in ([folder / name, folder], [folder, folder / name]):
            assert_refused(text_shards(project, tmp_path / "new", *paths), f"{folder}/{name}: ", "--encoding")
    (folder / "g.txt").write_bytes(b"a" * 8192 + b"\0")
    assert_refused(text_shards(project, tmp_path / "new", folder), f"{folder}/g.txt: byte 8,192 is a zero")


def test_utf16_is_not_binary_where_it_is_the_encoding(project, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in {"a.txt": "one", "b.txt": "two\0", "c.txt": "three"}.items():
        (folder / name).write_text(content, encoding="utf-16")
    output = assert_done(text_shards(project, tmp_path / "out", folder, "--encoding", "utf-16"))
    assert documents_in_order(tmp_path / "out") == [b"one", b"three"]
    assert "skipped 1 binary files\n" in output


def test_files_of_other_suffixes_are_counted_by_suffix(project, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.csv", "b.CSV", "sub/c.csv", "a.json", "sub/b.json", "Makefile", "named.csv", ".hidden.csv"):
        (folder / name).write_text(name)
    (folder / "broken.csv").symlink_to("nowhere")
    (folder / "odd.\udcff").write_text("odd")
    assert_refused(
        text_shards(project, tmp_path / "out", folder),
        f"no text found in {folder}; passed over: 4 .csv, 2 .json, 1 without a suffix, 1 .\\udcff",
    )
    (folder / "a.txt").write_text("a")
    output = assert_done(text_shards(project, tmp_path / "out", folder, folder / "sub", folder / "named.csv"))
    assert "passed over: 3 .csv, 2 .json, 1 without a suffix, 1 .\\udcff\n" in output
    assert documents_in_order(tmp_path / "out") == [b"a", b"named.csv"]

    for i in range(20):
        (folder / f"x.{i:02}").write_text("")
    output = assert_done(text_shards(project, tmp_path / "out", folder, folder / "named.csv", "--overwrite"))
    assert re.search(r"passed over: 3 \.csv, 2 \.json(, 1 [^,]+){8}, 14 others\n", output)


# Records


def test_records_of_jsonl_and_parquet_are_documents(project, tmp_path):
    lines = ['{"text": "one\\nü", "id": 1}', " \t\r", '{"id": 2, "text": "two"}', '{"text": ""}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\ufeff\n" + "\r\n".join(lines), encoding="utf-8")
    write_parquet(tmp_path / "b.parquet", {"id": [1, 2, 3, 4], "text": ["three", None, "", "four"]})
    output = assert_done(text_shards(project, tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.parquet"))
    assert documents_in_order(tmp_path / "out") == ["one\nü".encode(), b"two", b"three", b"four"]
    assert "skipped 2 null records\n" in output


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "x"', "not JSON"),
        ("{'text': 'x'}", "not JSON"),
        ('{"text": "x"} {"text": "y"}', "not JSON"),
        ('\ufeff{"text": "x"}', "not JSON"),  # a mark in the middle
        ('{"text": 3}', "a text field that holds a string, found int"),
        ('{"text": true}', "found bool"),
        ('{"text": ["x"]}', "found list"),
        ('{"text": {"text": "x"}}', "found dict"),
        ("{}", "expected an object with a text field"),
        ('{"Text": "x"}', "expected an object with a text field"),
        ("[]", "expected an object with a text field"),
        ("null", "expected an object with a text field"),
        ('"text"', "expected an object with a text field"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--skip-bad"]])
def test_line_that_is_no_record_is_named_and_leaves_nothing(project, tmp_path, line, words, options):
    lines = ['{"text": "fine"}'] * 50 + [line]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    # Many shards are full by then.
    result = text_shards(project, tmp_path / "out", tmp_path / "a.jsonl", "--shard-tokens", 10, *options)
    assert_refused(result, f"{tmp_path}/a.jsonl:51: ", words)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text": "caf\xe9"}', "byte 13 (0xe9) is not utf-8"),
        (b'{"text": "fine", "url": "\xff"}', "byte 25 (0xff) is not utf-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 10 (0xed) is not utf-8"),
        (b'{"text": "ab\\ud800"}', "character 2 of its text is half of a surrogate pair"),
        (b'{"text": "\\ude00\\ud83d"}', "character 0 of its text is half of a surrogate pair"),
        (b'{"text": "a\\u0000"}', "character 1 of its text is a zero"),
        (b'{"text": "a\0"}', "byte 11 is a zero"),
        ('{"text": "x"}'.encode("utf-16"), "byte 0 (0xff) is not utf-8"),
    ],
)
def test_record_that_is_not_text_is_named_with_its_place(project, tmp_path, line, words):
    (tmp_path / "a.ndjson").write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line)
    result = text_shards(project, tmp_path / "out", tmp_path / "a.ndjson")
    assert_refused(result, f"{tmp_path}/a.ndjson:4: ", words, "--skip-bad")
    assert list((tmp_path / "out").iterdir()) == []
    assert "skipped 1 bad records\n" in assert_done(
        text_shards(project, tmp_path / "out", tmp_path / "a.ndjson", "--skip-bad")
    )
    assert documents_in_order(tmp_path / "out") == [b"one", b"two"]


def test_text_columns_of_strings_of_any_kind_are_read(project, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = ["one", None, "ü", "one"]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    kinds += [pyarrow.dictionary(pyarrow.int8(), kind) for kind in kinds[:2]]
    for kind in kinds:
        write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(rows, kind)})
        output = assert_done(text_shards(project, tmp_path / "out", tmp_path / "a.parquet", "--overwrite"))
        assert documents_in_order(tmp_path / "out") == [b"one", "ü".encode(), b"one"]
        assert "skipped 1 null records\n" in output


def test_parquet_without_one_text_column_of_strings_is_refused(project, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    for columns, words in (
        ({"body": ["x"], "id": [1]}, "expected one text column, found body, id"),
        (pyarrow.table([["x"], ["y"]], ["text", "text"]), "found text, text"),
        ({"text": [1, 2]}, "expected a text column of strings, found int64"),
        ({"text": [b"x"]}, "found binary"),
        ({"text": [["x"]]}, "found list<"),
        ({"text": [{"text": "x"}]}, "found struct<"),
        ({"text": [True]}, "found bool"),
        ({"text": pyarrow.nulls(2)}, "found null"),
    ):
        write_parquet(path, columns)
        assert_refused(text_shards(project, tmp_path / "out", path, "--skip-bad"), f"{path}: ", words)


def test_parquet_rows_that_are_not_text_are_named_and_left_out_on_request(project, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    rows = pyarrow.array([b"one", b"caf\xe9", b"a\0", b"two"])
    offsets, data = rows.buffers()[1:]
    write_parquet(path, {"text": pyarrow.Array.from_buffers(pyarrow.string(), 4, [None, offsets, data])})
    assert_refused(
        text_shards(project, tmp_path / "out", path), f"{path}: row 2: byte 3 (0xe9) of its text is not utf-8"
    )
    output = assert_done(text_shards(project, tmp_path / "out", path, "--skip-bad"))
    assert "skipped 2 bad records\n" in output
    assert documents_in_order(tmp_path / "out") == [b"one", b"two"]
    write_parquet(path, {"text": ["one", "a\0"]})
    assert_refused(text_shards(project, tmp_path / "new", path), f"{path}: row 2: character 1 of its text is a zero")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_damaged_parquet_is_named_and_leaves_nothing(project, tmp_path, compression):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a\udcff.parquet"  # a name that pyarrow itself could not open
    whole = tmp_path / "whole.parquet"
    rows = [f"row {i} {i * i}" for i in range(3000)]
    options = {"compression": compression, "row_group_size": 1000, "use_dictionary": False}
    write_parquet(whole, {"text": rows}, write_page_checksum=compression == "none", **options)
    shutil.copy(whole, path)
    assert_done(text_shards(project, tmp_path / "good", path))
    assert documents_in_order(tmp_path / "good") == [row.encode() for row in rows]

    column = parquet.ParquetFile(whole).metadata.row_group(2).column(0)
    end = column.data_page_offset + column.total_compressed_size
    middle = end - column.total_compressed_size // 2
    data = whole.read_bytes()
    for content in (data[:middle] + bytes(end - middle) + data[end:], data[:-20], data[:middle], b"PAR1", b""):
        path.write_bytes(content)
        result = text_shards(project, tmp_path / "out", path, "--shard-tokens", 100)
        assert_refused(result, f"{tmp_path}/a\\udcff.parquet: cannot be read as parquet: ")
        assert list((tmp_path / "out").iterdir()) == []


# Pipes, disks and names


def test_pipes_are_read_and_other_odd_things_refused(project, tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n" * 50_000))  # more than a pipe holds
    (tmp_path / "b.txt").write_bytes(b"two")
    script = shlex.join([sys.executable, str(project / "data" / "text.py"), "--tokenizer", "bytes", "--val-every", "2"])

    def bash(line, out):
        return subprocess.run(
            ["bash", "-c", f"cd {tmp_path}; {line.format(script)} --out {out}"], capture_output=True, text=True
        )

    for i, line in enumerate(
        ["{} <(zcat a.gz) b.txt", "zcat a.gz | {} /dev/stdin b.txt", "{} <(zcat a.gz) /dev/stdin < b.txt"]
    ):
        assert_done(bash(line, f"out{i}"))
        assert documents_in_order(tmp_path / f"out{i}") == [b"one\n" * 50_000, b"two"]

    os.mkfifo(tmp_path / "records.jsonl.gz")
    writer = 'printf \'{{"text": "three"}}\' | gzip > records.jsonl.gz & '
    assert_done(bash(writer + "{} records.jsonl.gz b.txt", "fifo"))
    assert documents_in_order(tmp_path / "fifo") == [b"three", b"two"]

    assert_refused(bash("{} <(printf 'a\\377') b.txt", "new"), "/dev/fd/", "byte 1 (0xff)")
    os.mkfifo(tmp_path / "rows.parquet")
    assert_refused(bash("cat a.gz > rows.parquet & {} rows.parquet", "new"), "rows.parquet: ")
    assert_refused(bash("{} /dev/null", "new"), "/dev/null: expected a file, a folder or a pipe")
    assert_refused(bash("{} b.txt/x", "new"), "b.txt/x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert_refused(bash("{} s", "new"), "s: expected a file, a folder or a pipe")


def test_full_disk_names_the_shard_and_leaves_nothing(project, tmp_path):
    # A limit on the size of files stands in for the full disk: its error, too, does not name the file.
    write_documents(tmp_path / "in", 45)
    for limit in (0, 1):  # in KB: not even the header, and not all of it
        command = shlex.join([sys.executable, str(project / "data" / "text.py"), str(tmp_path / "in")])
        result = subprocess.run(
            ["bash", "-c", f"ulimit -f {limit}; {command} --tokenizer bytes --out {tmp_path}/out"],
            capture_output=True,
            text=True,
        )
        assert_refused(result, f"{tmp_path}/out/", "_000000.bin cannot be written: File too large")
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["plain", "a[1]", "it's", "two words", "*", "**", "?", "$HOME", "a\\b", '"', "~", "a\nb", "\udcff", "'\udcff["],
)
def test_printed_options_can_be_pasted_whatever_the_folder_is_called(project, tmp_path, name):
    for other in ("a1", "other", "two", "a", "home"):  # what a pattern could find instead
        (tmp_path / other).mkdir()
        (tmp_path / other / "text_train_000001.bin").touch()
    write_documents(tmp_path / "in", 2)
    output = assert_done(text_shards(project, tmp_path / name, tmp_path / "in"))
    options = output.split("options of train_gpt.py: ")[1].strip()
    assert "\n" not in options
    words = subprocess.run(["bash", "-c", rf"printf '%s\0' {options}"], capture_output=True, cwd=tmp_path).stdout
    *words, end = [os.fsdecode(word) for word in words.split(b"\0")]
    assert words[:3] == ["--preset", "tiny", "--train-files"] and words[4] == "--val-files" and not end
    found = [glob.glob(words[3]), glob.glob(words[5])]
    folder = tmp_path / name
    assert found == [[str(folder / "text_train_000001.bin")], [str(folder / "text_val_000000.bin")]]


def test_names_that_are_not_utf8_end_nothing(project, tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    for name in ("a\udcfe.txt", "b\udcfe.jsonl", "c\udcfe.txt.gz"):
        (folder / name).write_bytes(gzip.compress(b"c") if name.endswith("gz") else b'{"text": "x"}')
    output = assert_done(text_shards(project, folder / "out", folder))
    assert f"{tmp_path}/\\udcff/out/text_train_000001.bin" in output
    assert documents_in_order(folder / "out") == [b'{"text": "x"}', b"x", b"c"]
    assert_refused(text_shards(project, folder / "out", folder), "\\udcff/out already holds")
    for name, content in (("a\udcfe.txt", b"\xff"), ("b\udcfe.jsonl", b"{}"), ("c\udcfe.txt.gz", b"x")):
        (folder / name).write_bytes(content)
        assert_refused(text_shards(project, folder / "new", folder / name), f"\\udcff/{name[0]}\\udcfe.")
    assert_refused(text_shards(project, folder / "new", folder / "nowhere"), "\\udcff/nowhere: no such file")

    # On a terminal there is a progress bar, too.
    command = [sys.executable, project / "data" / "text.py", "--tokenizer", "bytes"]
    read, write = pty.openpty()
    process = subprocess.run([*command, folder / "a\udcfe.txt", "--out", folder / "x"], stdout=write, stderr=write)
    os.close(write)
    assert process.returncode == 2 and b"Traceback" not in os.read(read, 100_000)
    os.close(read)


def test_two_runs_that_overwrite_both_end_well(project, tmp_path):
    for i in range(2):
        write_documents(tmp_path / f"in{i}", 30 + 10 * i)
    args = ["--overwrite", "--shard-tokens", 20]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(text_shards, project, tmp_path / "out", tmp_path / f"in{i}", *args) for i in range(2)]
    for run in runs:
        assert_done(run.result())
    stays = [[path.read_bytes() for path in sorted((tmp_path / f"in{i}").iterdir())] for i in range(2)]
    assert documents_in_order(tmp_path / "out") in stays
    assert all(path.name.startswith("text_") for path in (tmp_path / "out").iterdir())


def test_too_little_text_is_refused(project, tmp_path):
    write_documents(tmp_path / "in", 7)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_bytes(b"")
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes"]
    assert_refused(tool(project, "text.py", tmp_path / "in", *args), "there are 7", "--val-every 7 or less")
    assert_refused(tool(project, "text.py", tmp_path / "in" / "d000.txt", *args), "there are 1", "several files")
    assert_refused(tool(project, "text.py", tmp_path / "empty", *args), "no text found", tmp_path / "empty")
    assert_refused(tool(project, "text.py", tmp_path / "nowhere", *args), f"{tmp_path}/nowhere: no such file or folder")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("option, value", [("--val-every", 1), ("--max-doc-tokens", 1), ("--shard-tokens", "many")])
def test_bad_option_values_are_refused(project, tmp_path, option, value):
    result = tool(project, "text.py", project, "--out", tmp_path / "out", option, value)
    assert_refused(result, option, "expected a whole number from", f"found {value}")


def test_an_earlier_set_of_shards_is_replaced_only_on_request(project, tmp_path):
    contents = write_documents(tmp_path / "in", 20)
    out = tmp_path / "out"
    args = [tmp_path / "in", "--out", out, "--tokenizer", "bytes"]
    assert_done(tool(project, "text.py", *args, "--shard-tokens", 50))
    (out / "other_train_000001.bin").write_bytes(b"of somebody else")
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    assert len(before) > 5

    assert_refused(tool(project, "text.py", *args), f"{out} already holds text shards", "--overwrite")
    write_documents(tmp_path / "few", 3)
    few = [tmp_path / "few", "--out", out, "--tokenizer", "bytes", "--overwrite"]
    assert_refused(tool(project, "text.py", *few), "too little text")
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before

    assert_done(tool(project, "text.py", *args, "--overwrite"))
    assert files_in(out) == ["other_train_000001.bin", "text_train_000001.bin", "text_val_000000.bin"]
    assert byte_documents(out, "train") == contents[:19]


@needs_gpt2
def test_gpt2_documents_are_bos_and_the_tokens_of_the_whole_text(project, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    encoding = tiktoken.get_encoding("gpt2")
    lines = Path(__file__).read_text(encoding="utf-8")
    long_line = "word " * 300 + "漢字\r\n\n\n"
    texts = ["short\n", lines, "<|endoftext|> is text here\n", long_line + lines, "a\nb", "last\n"]
    (tmp_path / "in").mkdir()
    for i, content in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_bytes(content.encode())
    args = [tmp_path / "in", "--val-every", 3]

    assert_done(tool(project, "text.py", *args, "--out", tmp_path / "whole"))
    whole = shard_documents(tmp_path / "whole", "train", 50256)
    assert whole == [encoding.encode_ordinary(texts[i]) for i in (0, 1, 3, 4)]
    assert shard_documents(tmp_path / "whole", "val", 50256) == [encoding.encode_ordinary(texts[i]) for i in (2, 5)]

    assert_done(tool(project, "text.py", *args, "--out", tmp_path / "cut", "--max-doc-tokens", 64))
    pieces = shard_documents(tmp_path / "cut", "train", 50256)
    assert flat(pieces) == flat(whole)
    assert max(map(len, pieces)) == 63
    hard = [piece for piece in pieces if not encoding.decode(piece).endswith("\n") and piece[-1] != whole[-1][-1]]
    assert hard and all(len(piece) == 63 and "\n" not in encoding.decode(piece) for piece in hard)


@needs_gpt2
def test_a_large_document_is_shared_out_and_comes_back_whole(project, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    content = "".join(f"line {i}\n" for i in range(200_000))  # more than two groups of lines
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(content)
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    assert_done(tool(project, "text.py", *paths, "--out", tmp_path / "out", "--val-every", 2))
    for split in ("train", "val"):
        (document,) = shard_documents(tmp_path / "out", split, 50256)
        assert tiktoken.get_encoding("gpt2").decode(document) == content


def test_interrupted_tokenizing_ends_all_processes_and_leaves_nothing(project, tmp_path, fakes):
    # The tokenizer, in a worker, sends two Ctrl-C to the process that reads the documents.
    (fakes / "tiktoken.py").write_text(
        "import os, signal, time\n"
        "class Encoding:\n"
        "    def decode_single_token_bytes(self, token): return b'x'\n"
        "    def encode_ordinary(self, text):\n"
        "        if 'file 0' in text:\n"
        "            os.kill(os.getppid(), signal.SIGINT)\n"
        "            time.sleep(0.2)\n"
        "            os.kill(os.getppid(), signal.SIGINT)\n"
        "        return [1]\n"
        "def get_encoding(name): return Encoding()\n"
    )
    write_documents(tmp_path / "in", 20)
    result = tool(project, "text.py", tmp_path / "in", "--out", tmp_path / "out", fakes=fakes)
    assert_refused(result, "interrupted", status=130)
    assert files_in(tmp_path / "out") == []


def test_killed_tokenizing_process_is_one_clear_line_and_leaves_nothing(project, tmp_path, fakes):
    (fakes / "tiktoken.py").write_text(
        "import os, signal\n"
        "class Encoding:\n"
        "    def decode_single_token_bytes(self, token): return b'x'\n"
        "    def encode_ordinary(self, text): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def get_encoding(name): return Encoding()\n"
    )
    write_documents(tmp_path / "in", 20)
    result = tool(project, "text.py", tmp_path / "in", "--out", tmp_path / "out", fakes=fakes)
    assert_refused(result, "a tokenizing process was killed")
    assert files_in(tmp_path / "out") == []


def test_tokenizer_that_cannot_be_fetched_is_one_clear_line(project, tmp_path, fakes):
    (fakes / "tiktoken.py").write_text("def get_encoding(name): raise RuntimeError('no route\\nto host')")
    write_documents(tmp_path / "in", 20)
    result = tool(project, "text.py", tmp_path / "in", "--out", tmp_path / "out", fakes=fakes)
    assert_refused(result, "GPT-2's tokenizer could not be fetched: no route", "--tokenizer bytes")


# embedded.py

SYMPY_FILES = ["sympy/sympy_train_000001.bin", "sympy/sympy_val_000000.bin", "sympy/sympy_version.txt"]
SYMPY_SHA256 = {
    "sympy_train_000001.bin": "1fcef4e9eea31884a5430c4c0e4b988781e8955702a93682d844bb406ae66013",
    "sympy_val_000000.bin": "f1be21f095559da79d909cd08733d5209f29e49c5b88ec04f8064ef213b968de",
}
needs_pinned_sympy = pytest.mark.skipif(metadata.version("sympy") != "1.14.0", reason="another sympy is installed")


@pytest.fixture(scope="session")
def embedded_corpus(tmp_path_factory):
    """The corpus as the command line makes it, once for all tests."""
    project = make_project(tmp_path_factory.mktemp("embedded") / "project")
    assert "24,764,627 training and 1,431,268 validation tokens" in assert_done(tool(project, "embedded.py"))
    return project / "data" / "sympy"


@needs_pinned_sympy
def test_embedded_corpus_is_the_same_bytes_everywhere(embedded_corpus):
    for name, sha256 in SYMPY_SHA256.items():
        assert hashlib.sha256((embedded_corpus / name).read_bytes()).hexdigest() == sha256


@needs_pinned_sympy
def test_rules_know_the_checksums_of_the_embedded_corpus(embedded_corpus):
    stream = STREAMS["tiny"]
    tokens = (embedded_corpus / "sympy_val_000000.bin").read_bytes()[1024:][: 2 * (stream.tokens + 1)]
    assert hashlib.sha256(tokens).hexdigest() == stream.sha256
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in embedded_corpus.glob("*train*")} == stream.train


@needs_pinned_sympy
def test_embedded_corpus_is_the_installed_sources(embedded_corpus):
    root = Path(metadata.distribution("sympy").locate_file("sympy"))
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("**/*.py"))
    random.Random(0).shuffle(names)
    sources = {name: (root / name).read_bytes() for name in names}
    val = names[19::20]
    val_pieces = [piece for name in val for piece in cut_line_by_line(sources[name], 1023)]
    train_pieces = [piece for name in names if name not in set(val) for piece in cut_line_by_line(sources[name], 1023)]
    random.Random(0).shuffle(train_pieces)
    assert (embedded_corpus / "sympy_val_000000.bin").read_bytes()[1024:] == as_byte_tokens(val_pieces)
    assert (embedded_corpus / "sympy_train_000001.bin").read_bytes()[1024:] == as_byte_tokens(train_pieces)


def as_byte_tokens(pieces):
    """What a shard holds of these pieces: each byte as an uint16, low byte first, and BOS, 256, before each piece."""
    tokens = bytearray()
    for piece in pieces:
        tokens += b"\0\1" + bytes(2 * len(piece))
        tokens[len(tokens) - 2 * len(piece) :: 2] = piece
    return bytes(tokens)


def fake_sympy(fakes, version, files=40):
    """An installed sympy of `files` small files; returns their contents by name."""
    contents = {f"m{i:02}.py": f"x = {i}\n" * (50 * i) for i in range(files)}
    (fakes / "sympy" / "sub").mkdir(parents=True)
    for name, content in contents.items():
        (fakes / "sympy" / "sub" / name).write_text(content)
    information = fakes / f"sympy-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sympy\nVersion: {version}\n")
    (fakes / "torch.py").write_text("raise RuntimeError('torch takes seconds to import')")
    return contents


def test_embedded_corpus_that_is_whole_is_left_alone(project, fakes):
    fake_sympy(fakes, "1.14.0")
    assert "made from sympy 1.14.0" in assert_done(tool(project, "embedded.py", fakes=fakes))
    assert [name for name in files_in(project / "data") if "/" in name] == SYMPY_FILES
    times = [(project / "data" / name).stat().st_mtime_ns for name in SYMPY_FILES]
    result = tool(project, "embedded.py", fakes=fakes)
    assert "already made" in assert_done(result) and not result.stderr
    assert [(project / "data" / name).stat().st_mtime_ns for name in SYMPY_FILES] == times


@pytest.mark.parametrize("name", SYMPY_FILES)
def test_embedded_corpus_that_is_damaged_is_made_anew(project, fakes, name):
    fake_sympy(fakes, "1.14.0")
    assert_done(tool(project, "embedded.py", fakes=fakes))
    whole = (project / "data" / name).read_bytes()
    (project / "data" / name).write_bytes(whole[:-2])
    assert "already made" not in assert_done(tool(project, "embedded.py", fakes=fakes))
    assert (project / "data" / name).read_bytes() == whole


def test_two_runs_at_once_both_make_the_embedded_corpus(project, fakes):
    fake_sympy(fakes, "1.14.0")
    assert_done(tool(project, "embedded.py", fakes=fakes))
    contents = [(project / "data" / name).read_bytes() for name in SYMPY_FILES]
    for _ in range(3):
        shutil.rmtree(project / "data" / "sympy")
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(tool, project, "embedded.py", fakes=fakes) for _ in range(2)]
        for run in runs:
            assert_done(run.result())
        assert [name for name in files_in(project / "data") if "/" in name] == SYMPY_FILES
        assert [(project / "data" / name).read_bytes() for name in SYMPY_FILES] == contents


def test_another_sympy_is_warned_of_in_one_line(project, fakes):
    fake_sympy(fakes, "1.15.0")
    result = tool(project, "embedded.py", fakes=fakes)
    assert_done(result)
    assert result.stderr.count("\n") == 1
    assert "sympy 1.15.0 is installed" in result.stderr and "requirements.txt has 1.14.0" in result.stderr


def test_embedded_corpus_without_its_pin_is_refused(project, fakes):
    fake_sympy(fakes, "1.14.0")
    (project / "requirements.txt").write_text("numpy\n")
    assert_refused(tool(project, "embedded.py", fakes=fakes), "requirements.txt has no line sympy==")
    (project / "requirements.txt").unlink()
    assert_refused(tool(project, "embedded.py", fakes=fakes), f"{project}/requirements.txt is missing")


# cached_*.py

FAKE_HUB = """
import json, os, pathlib, shutil, signal, time

def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
    # As the real one does, take a file that is in local_dir for the download, whatever it holds.
    with open(os.environ["HUB_LOG"], "a") as log:
        log.write(json.dumps([repo_id, repo_type, filename]) + "\\n")
    target = pathlib.Path(local_dir, filename)
    target.with_suffix(".incomplete").write_text("the first part")
    if os.environ.get("HUB_SIGNAL"):
        os.kill(os.getpid(), int(os.environ["HUB_SIGNAL"]))
    if os.environ.get("HUB_ERRNO"):
        raise OSError(int(os.environ["HUB_ERRNO"]), "the disk says no")
    while pathlib.Path(os.environ["HUB_LOG"]).read_text().count(filename) < int(os.environ.get("HUB_MEETING", 0)):
        time.sleep(0.01)
    if os.environ.get("HUB_OVERTAKER"):
        shutil.copy(os.environ["HUB_OVERTAKER"], pathlib.Path(local_dir).parent / filename)
    source = pathlib.Path(os.environ["HUB_FILES"], filename)
    if not source.exists():
        raise ConnectionError("name resolution failed\\nand a paragraph more")
    if not target.exists():
        shutil.copy(source, target)
    return str(target)
"""


@pytest.fixture
def hub(tmp_path, fakes, project):
    """A stand-in for the hub: `hub(script, N)` runs a script, `hub.files` are served, `hub.asked()` were asked for."""
    (fakes / "huggingface_hub.py").write_text(FAKE_HUB)
    files, log = tmp_path / "remote", tmp_path / "hub.log"
    files.mkdir()

    def run(script, *args, **environment):
        return tool(project, script, *args, fakes=fakes, HUB_FILES=str(files), HUB_LOG=str(log), **environment)

    run.files = files
    run.local = project / "data"
    run.asked = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return run


def serve(hub, prefix, count):
    """Put a validation shard and `count` training shards on the hub; returns their bytes by name."""
    names = [f"{prefix}_val_000000.bin", *[f"{prefix}_train_{i:06}.bin" for i in range(1, count + 1)]]
    contents = {name: pack([50256, i, i + 1]) for i, name in enumerate(names)}
    for name, content in contents.items():
        (hub.files / name).write_bytes(content)
    return contents


@pytest.mark.parametrize(
    "folder, repo, prefix",
    [
        ("fineweb10B", "kjj0/fineweb10B-gpt2", "fineweb"),
        ("fineweb100B", "kjj0/fineweb100B-gpt2", "fineweb"),
        ("finewebedu10B", "kjj0/finewebedu10B-gpt2", "finewebedu"),
    ],
)
def test_first_shards_are_fetched_from_their_dataset(hub, folder, repo, prefix):
    contents = serve(hub, prefix, 3)
    assert "3 shards, 3 of them fetched now" in assert_done(hub(f"cached_{folder}.py", 2))
    wanted = list(contents)[:3]
    assert hub.asked() == [[repo, "dataset", name] for name in wanted]
    assert files_in(hub.local / folder) == sorted(wanted)
    assert all((hub.local / folder / name).read_bytes() == contents[name] for name in wanted)


@pytest.mark.parametrize("name, count", [("fineweb10B", 103), ("fineweb100B", 1030), ("finewebedu10B", 99)])
def test_number_of_shards_out_of_range_is_refused(hub, name, count):
    for number in (count + 1, 0, "all"):
        assert_refused(hub(f"cached_{name}.py", number), f"from 1 to {count:,}, found {number}")
    assert hub.asked() == [] and not (hub.local / name).exists()


def test_default_is_all_shards(hub):
    serve(hub, "finewebedu", 99)
    assert "100 shards" in assert_done(hub("cached_finewebedu10B.py"))
    assert len(files_in(hub.local / "finewebedu10B")) == 100


def test_whole_shards_need_no_network_and_no_hub_library(hub, fakes):
    serve(hub, "fineweb", 2)
    assert_done(hub("cached_fineweb10B.py", 2))
    (fakes / "huggingface_hub.py").write_text("raise ImportError")
    assert "0 of them fetched" in assert_done(hub("cached_fineweb10B.py", 2))
    assert_refused(hub("cached_fineweb10B.py", 3), "huggingface_hub is missing", "pip install -r ", "requirements.txt")


@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: b"\0" * len(data)])
def test_damaged_local_shard_is_fetched_anew_and_alone(hub, damage):
    contents = serve(hub, "fineweb", 2)
    assert_done(hub("cached_fineweb10B.py", 2))
    path = hub.local / "fineweb10B" / "fineweb_train_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    result = hub("cached_fineweb10B.py", 2)
    assert "1 of them fetched" in assert_done(result)
    assert str(path) in result.stdout and "fetching it again" in result.stdout
    assert [name for _, _, name in hub.asked()[3:]] == [path.name]
    assert path.read_bytes() == contents[path.name]


def test_bad_shard_from_the_hub_is_reported_and_never_under_its_name(hub):
    serve(hub, "fineweb", 2)
    good = (hub.files / "fineweb_train_000001.bin").read_bytes()
    for bad, words in ((pack([1], magic=1234), "found 1234"), (good[:-1], "truncated"), (b"<html>", "1,024 bytes")):
        (hub.files / "fineweb_train_000001.bin").write_bytes(bad)
        assert_refused(hub("cached_fineweb10B.py", 2), "sent a bad shard", "fineweb_train_000001.bin", words)
        assert files_in(hub.local / "fineweb10B") == ["fineweb_val_000000.bin"]
    (hub.files / "fineweb_train_000001.bin").write_bytes(good)
    assert "2 of them fetched" in assert_done(hub("cached_fineweb10B.py", 2))


def test_unreachable_hub_is_one_clear_line_and_the_next_run_goes_on_with_that_shard(hub):
    serve(hub, "fineweb", 1)
    path = hub.local / "fineweb10B" / "fineweb_train_000002.bin"
    line = assert_refused(hub("cached_fineweb10B.py", 2), f"could not fetch {path} from kjj0/fineweb10B-gpt2: ")
    assert ": name resolution failed (" in line
    assert files_in(hub.local / "fineweb10B") == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    serve(hub, "fineweb", 2)
    assert "1 of them fetched" in assert_done(hub("cached_fineweb10B.py", 2))


def test_two_downloads_into_one_folder_both_end_well(hub):
    contents = serve(hub, "fineweb", 3)
    with ThreadPoolExecutor() as pool:  # each waits within each shard until the other is there, too
        runs = [pool.submit(hub, "cached_fineweb10B.py", 3, HUB_MEETING="2") for _ in range(2)]
    for run in runs:
        assert "4 shards, 4 of them fetched now, all whole" in assert_done(run.result())
    folder = hub.local / "fineweb10B"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_what_another_download_has_in_hand_is_left_alone(hub):
    serve(hub, "fineweb", 1)
    other = hub.local / "fineweb10B" / ".incoming_other"
    other.mkdir(parents=True)
    (other / "fineweb_train_000001.bin").write_bytes(b"half a sha")
    assert_done(hub("cached_fineweb10B.py", 1))
    assert_done(hub("cached_fineweb10B.py", 1))
    assert (other / "fineweb_train_000001.bin").read_bytes() == b"half a sha"
    assert len(hub.asked()) == 2


def test_shard_that_has_become_whole_meanwhile_is_kept(hub, tmp_path):
    contents = serve(hub, "fineweb", 1)
    folder = hub.local / "fineweb10B"
    overtakers = {"whole": pack([50256, 7]), "damaged": pack([50256, 7])[:-1]}
    for name, content in overtakers.items():
        (tmp_path / name).write_bytes(content)
        assert_done(hub("cached_fineweb10B.py", 1, HUB_OVERTAKER=str(tmp_path / name)))
        expected = dict.fromkeys(contents, content) if name == "whole" else contents
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
        shutil.rmtree(folder)


def test_full_disk_during_a_download_names_the_file(hub):
    serve(hub, "fineweb", 1)
    result = hub("cached_fineweb10B.py", 1, HUB_ERRNO=str(errno.ENOSPC))
    assert_refused(result, hub.local / "fineweb10B" / "fineweb_val_000000.bin", "the disk says no")
    assert list((hub.local / "fineweb10B").iterdir()) == []


def test_damaged_shard_in_a_folder_of_any_name_is_told_of(tmp_path, fakes):
    project = make_project(tmp_path / "pro\udcffject")
    (fakes / "huggingface_hub.py").write_text("")
    folder = project / "data" / "fineweb10B"
    folder.mkdir()
    (folder / "fineweb_val_000000.bin").write_bytes(b"half")
    result = tool(project, "cached_fineweb10B.py", 1, fakes=fakes)
    assert "pro\\udcffject/data/fineweb10B/fineweb_val_000000.bin: expected a header" in result.stdout
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_download_ends_with_the_signals_status(hub, number, status):
    serve(hub, "fineweb", 1)
    result = hub("cached_fineweb10B.py", 1, HUB_SIGNAL=str(int(number)))
    assert result.returncode == status and "Traceback" not in result.stderr
    assert list((hub.local / "fineweb10B").iterdir()) == []
    assert_done(hub("cached_fineweb10B.py", 1))


# fineweb.py

FAKE_DATASETS = """
import os
TEXTS = ["one two three", "a\\nb\\n"] + [f"document {i} of the stream" for i in range(30)]
def load_dataset(repo, name, split, streaming):
    assert (split, streaming) == ("train", True)
    yield {"text": f"{repo} {name}", "url": "x"}
    for text in TEXTS:
        yield {"text": text, "url": "x"}
    if os.environ.get("STREAM_BREAKS"):
        raise OSError("connection reset\\nby peer")
"""


@needs_gpt2
@pytest.mark.parametrize(
    "options, repo, folder",
    [
        ([], "HuggingFaceFW/fineweb sample-10BT", "fineweb10B"),
        (["--sample", "100BT"], "HuggingFaceFW/fineweb sample-100BT", "fineweb100B"),
        (["--dataset", "finewebedu"], "HuggingFaceFW/fineweb-edu sample-10BT", "finewebedu10B"),
    ],
)
def test_fineweb_stream_becomes_shards_with_the_first_for_validation(project, fakes, options, repo, folder):
    tiktoken = pytest.importorskip("tiktoken")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    (fakes / "datasets.py").write_text(FAKE_DATASETS)
    assert_done(tool(project, "fineweb.py", *options, "--shard-tokens", 50, fakes=fakes))
    texts = [repo, "one two three", "a\nb\n", *[f"document {i} of the stream" for i in range(30)]]
    stream = flat([50256, *encode(content)] for content in texts)
    prefix = folder.rstrip("0B1")
    names = [f"{prefix}_val_000000.bin", *[f"{prefix}_train_{i:06}.bin" for i in range(1, 9)]]
    parts = [stream[i : i + 50] for i in range(0, len(stream), 50)]
    assert files_in(project / "data" / folder) == sorted(names[: len(parts)]) and len(parts) > 2
    assert [unpack(project / "data" / folder / name) for name in names[: len(parts)]] == parts


@needs_gpt2
def test_broken_fineweb_stream_leaves_whole_shards_which_are_not_mixed_with_new_ones(project, fakes, tmp_path):
    (fakes / "datasets.py").write_text(FAKE_DATASETS)
    args = ["--out", tmp_path / "out", "--shard-tokens", 50]
    result = tool(project, "fineweb.py", *args, fakes=fakes, STREAM_BREAKS="1")
    assert_refused(result, "reading HuggingFaceFW/fineweb failed: connection reset")
    assert all(len(unpack(tmp_path / "out" / name)) == 50 for name in files_in(tmp_path / "out"))


def test_fineweb_refuses_a_folder_that_holds_shards(project, fakes, tmp_path):
    (fakes / "datasets.py").write_text(FAKE_DATASETS)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(pack([1]))
    assert_refused(
        tool(project, "fineweb.py", "--out", tmp_path, fakes=fakes), tmp_path, "already holds fineweb shards"
    )


def test_fineweb_without_datasets_says_what_to_install(project, fakes):
    (fakes / "datasets.py").write_text("raise ImportError")
    assert_refused(tool(project, "fineweb.py", fakes=fakes), "datasets is missing", "data/requirements.txt")
    assert not (project / "data" / "fineweb10B").exists()


def test_shards_are_made_though_nobody_reads_what_is_printed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 40)
    command = [sys.executable, ROOT / "data" / "text.py", tmp_path / "a.jsonl", "--tokenizer", "bytes"]
    with open("/dev/full", "w") as full:
        subprocess.run([*command, "--out", tmp_path / "out"], stdout=full, check=True)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["text_train_000001.bin", "text_val_000000.bin"]
