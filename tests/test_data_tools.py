"""The tools in data/, mostly as users meet them: by their command lines, with stand-ins for hub and libraries.

Shards are parsed here by hand, and pieces are cut by a second, line-by-line algorithm.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import shards
import text
from command import UserError

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
    environment["PYTHONPATH"] = str(fakes or "")
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
    kept = {"b.md": b"b\xff", "sub/a.PY": b"a", "c.c": b"c", "z.jsonl": b'{"text": "z"}\n'}
    dropped = {"a.png": b"no", "binary.txt": b"\0", ".hidden.txt": b"no", ".git/x.py": b"no", "empty.txt": b""}
    for name, content in {**kept, **dropped}.items():
        (folder / name).write_bytes(content)
    (folder / "broken.txt").symlink_to("nowhere")
    (tmp_path / "named.bin").write_bytes(b"\0named")
    # The last two have been reached already.
    paths = [tmp_path / "named.bin", folder, folder / "b.md", folder / "sub"]
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes", "--val-every", 5]
    output = assert_done(tool(project, "text.py", *paths, *args))
    assert byte_documents(tmp_path / "out", "train") == [b"\0named", b"b\xff", b"c", b"z"]
    assert byte_documents(tmp_path / "out", "val") == [b"a"]
    assert "skipped 1 binary files" in output


def test_records_of_jsonl_and_parquet_are_documents(project, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = ['{"text": "one\\nü", "id": 1}', "", '{"id": 2, "text": "two"}', '{"text": ""}', '{"text": "three"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = pyarrow.table({"id": [1, 2, 3], "text": ["four", None, "five"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    assert_done(tool(project, "text.py", *paths, "--out", tmp_path / "out", "--tokenizer", "bytes", "--val-every", 3))
    assert byte_documents(tmp_path / "out", "train") == ["one\nü".encode(), b"two", b"four", b"five"]
    assert byte_documents(tmp_path / "out", "val") == [b"three"]

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"text": [["x"]]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR")
    for name, words in (("c", "expected a text column, found body"), ("d", "strings"), ("e", "no parquet file")):
        path = tmp_path / f"{name}.parquet"
        assert_refused(tool(project, "text.py", path, "--out", tmp_path / "new", "--tokenizer", "bytes"), path, words)


def test_parquet_without_pyarrow_says_what_to_install(project, tmp_path, fakes):
    (fakes / "pyarrow.py").write_text("raise ImportError")
    (tmp_path / "a.parquet").write_bytes(b"")
    result = tool(
        project, "text.py", tmp_path / "a.parquet", "--out", tmp_path / "out", "--tokenizer", "bytes", fakes=fakes
    )
    assert_refused(result, "a.parquet", "pip install -r data/requirements.txt")


@pytest.mark.parametrize(
    "bad, words", [('{"text": "x"', "not JSON"), ('{"text": 3}', "text field"), ("[]", "text field")]
)
def test_bad_jsonl_line_is_named_and_leaves_nothing(project, tmp_path, bad, words):
    lines = ['{"text": "fine"}'] * 50 + [bad]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    args = ["--out", tmp_path / "out", "--tokenizer", "bytes", "--shard-tokens", 10]  # many shards are full by then
    assert_refused(tool(project, "text.py", tmp_path / "a.jsonl", *args), f"{tmp_path}/a.jsonl:51: ", words)
    assert files_in(tmp_path / "out") == []


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
    texts = ["short\n", lines, "<|endoftext|> is text here\n", long_line + lines, "a\nb", "bad \ufffd byte\n"]
    (tmp_path / "in").mkdir()
    for i, content in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_bytes(content.encode().replace("\ufffd".encode(), b"\xff"))
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
import json, os, pathlib, shutil, signal

def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
    # As the real one does, take a file that is in local_dir for the download, whatever it holds.
    with open(os.environ["HUB_LOG"], "a") as log:
        log.write(json.dumps([repo_id, repo_type, filename]) + "\\n")
    target = pathlib.Path(local_dir, filename)
    if os.environ.get("HUB_SIGNAL"):
        os.kill(os.getpid(), int(os.environ["HUB_SIGNAL"]))
    source = pathlib.Path(os.environ["HUB_FILES"], filename)
    if not source.exists():
        raise ConnectionError("name resolution failed\\nand a paragraph more")
    target.parent.mkdir(parents=True, exist_ok=True)
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
    assert_refused(hub("cached_fineweb10B.py", 3), "huggingface_hub is missing", "pip install -r requirements.txt")


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


def test_unreachable_hub_is_one_clear_line_and_the_next_run_continues(hub):
    serve(hub, "fineweb", 1)
    line = assert_refused(hub("cached_fineweb10B.py", 2), "could not fetch fineweb_train_000002.bin")
    assert "kjj0/fineweb10B-gpt2: name resolution failed (running the same command again continues" in line
    assert files_in(hub.local / "fineweb10B") == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    serve(hub, "fineweb", 2)
    assert "1 of them fetched" in assert_done(hub("cached_fineweb10B.py", 2))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_download_ends_with_the_signals_status(hub, number, status):
    serve(hub, "fineweb", 1)
    result = hub("cached_fineweb10B.py", 1, HUB_SIGNAL=str(int(number)))
    assert result.returncode == status and "Traceback" not in result.stderr
    assert files_in(hub.local / "fineweb10B") == []
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
    assert_refused(tool(project, "fineweb.py", fakes=fakes), "pip install -r data/requirements.txt")
    assert not (project / "data" / "fineweb10B").exists()
