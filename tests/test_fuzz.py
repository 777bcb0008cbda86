"""A few thousand random shards, checkpoints, command lines and texts: each ends in success or in one clear line."""

import dataclasses
import errno
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import struct
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import train_gpt as program

pytestmark = pytest.mark.slow
CONFIG = dataclasses.replace(program.PRESETS["mini"].model, dim=32, heads=2, bigram_dim=16)


def assert_line(error: program.UserError, name: str) -> None:
    assert name in str(error) and "\n" not in str(error) and len(str(error)) < 400


def random_shard(rng: random.Random) -> bytes:
    """A good shard with up to two faults of any kind."""
    tokens = [256 if rng.random() < 0.1 else rng.randrange(256) for _ in range(rng.choice([0, 1, 7, 300]))]
    tokens[:1] = [256]
    header = [20240520, 1, len(tokens), *[0] * 253]
    for _ in range(rng.randrange(3)):
        place = rng.choice([0, 1, 2, rng.randrange(256)])
        header[place] = rng.choice([0, 1, -1, 2**31 - 1, -(2**31), header[place] + rng.randrange(-3, 4), 256])
        header[place] = max(-(2**31), min(2**31 - 1, header[place]))
        if tokens and rng.random() < 0.5:
            tokens[rng.randrange(len(tokens))] = rng.choice([0, 255, 256, 257, 65535])
    content = struct.pack("<256i", *header) + np.array(tokens, "<u2").tobytes()
    end = rng.choice([len(content), len(content), rng.randrange(len(content) + 1)])
    return content[:end] + rng.randbytes(rng.choice([0, 0, 1, 2, 9]))


def test_random_shards(tmp_path):
    rng, path, good = random.Random(0), tmp_path / "fuzz_000001.bin", 0
    for _ in range(3000):
        content = random_shard(rng)
        path.write_bytes(content)
        try:
            tokens, bounds = program.read_shard(str(path), CONFIG)
        except program.UserError as error:
            assert_line(error, "fuzz_000001.bin")
            continue
        good += 1
        assert struct.unpack("<3i", content[:12]) == (20240520, 1, len(tokens))
        assert content[1024:] == tokens.tobytes() and tokens.max() <= 256
        starts = [i for i, token in enumerate(tokens) if token == 256]
        assert bounds.tolist() == [*starts, len(tokens)]
    assert 300 < good < 2700


def test_random_plans_take_every_token_from_within_its_document(tmp_path):
    rng = random.Random(1)
    stage = dataclasses.replace(program.PRESETS["mini"].extension, steps=1)
    done = 0
    for case in range(300):
        for number in range(rng.randrange(1, 4)):
            lengths = [rng.randrange(1, rng.choice([3, 40, 400])) for _ in range(rng.randrange(1, 60))]
            tokens = np.concatenate([[256, *[rng.randrange(256)] * (n - 1)] for n in lengths]).astype("<u2")
            header = np.zeros(256, "<i4")
            header[:3] = 20240520, 1, len(tokens)
            (tmp_path / f"c{case}_{number}.bin").write_bytes(header.tobytes() + tokens.tobytes())
        slices = rng.choice([1, 2, 4])
        stage = dataclasses.replace(
            stage, batch_tokens=slices * rng.randrange(1, 200), max_seq_len=rng.randrange(1, 99)
        )
        settings = dataclasses.replace(
            program.PRESETS["mini"], model=CONFIG, slices=slices, stages=(stage,) * 2, extension=stage,
            epochs=rng.randrange(1, 4),
        )  # fmt: skip
        paths = program.find_shards(str(tmp_path / f"c{case}_*.bin"), "mini")
        try:
            plan, _ = program.plan_batches(settings, paths)
        except program.UserError as error:
            assert_line(error, "tokens")
            continue
        done += 1
        for tokens in program.training_batches(plan, CONFIG, range(slices)):
            assert tokens.shape == (slices, stage.batch_tokens // slices + 1)
            assert (tokens[:, 0] == 256).all() and tokens.max() <= 256
    assert 50 < done < 300


def test_random_damage_to_checkpoints(tmp_path):
    torch.manual_seed(0)
    settings = dataclasses.replace(program.PRESETS["mini"], model=CONFIG)
    model, path = program.GPT(CONFIG), tmp_path / "fuzz.pt"
    state = {"model": {name: p.detach() for name, p in model.named_parameters()}, "step": 5}
    torch.save({**state, "settings": dataclasses.asdict(settings), "train_time_ms": 1.0}, path)
    content, rng, harmless = path.read_bytes(), random.Random(2), 0
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.choice([0, 1, 1, 8])):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice([len(content), len(content), rng.randrange(len(content))])])
        try:
            loaded = program.load_checkpoint(str(path))
        except program.UserError as error:
            assert_line(error, "fuzz.pt")
            continue
        harmless += 1
        assert loaded["settings"] == settings and loaded["step"] == 5
        for name, p in model.named_parameters():
            assert torch.equal(loaded["model"][name], p)
    assert harmless > 50


def random_arguments(rng: random.Random) -> list[str]:
    fields = [f for owner in (program.Settings, program.ModelConfig) for f in dataclasses.fields(owner)]
    names = [program.option(f.name) for f in fields] + ["--preset", "--dry-run", "--", "-x", "--stps", "3"]
    values = [
        "0",
        "1",
        "-1",
        "2",
        "3.5",
        "true",
        "false",
        "mini",
        "record",
        "nan",
        "1e999",
        "",
        "é",
        "%s",
        "--seed",
        "9" * 30,
    ]
    return [part for _ in range(rng.randrange(1, 5)) for part in (rng.choice(names), rng.choice(values))]


def test_random_command_lines():
    rng, good = random.Random(3), 0
    for _ in range(3000):
        arguments = random_arguments(rng)
        try:
            settings, _ = program.parse_arguments(arguments)
            for world_size in 1, 2:
                program.check_settings(settings, world_size)
            [program.schedule(settings, step) for step in (0, settings.total_steps)]
            good += 1
        except program.UserError as error:
            assert str(error) and "\n" not in str(error), arguments
    assert 100 < good < 2900


def random_items(rng: random.Random) -> bytes:
    """A good file of HellaSwag's items with up to three faults of any kind, some of them harmless."""
    lines = []
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        item = {"ctx": "She é", "endings": ["a", "b.", " ", "d d"], "label": rng.choice([0, 3, "1"]), "id": 7}
        if rng.random() < 0.2:
            texts = ["", "x", "\ud800", "\U0001f600", None, 1, True, 1.5, math.nan, [], {}, "3", "4", -1, 10**40]
            wrong = rng.choice([*texts, ["a"] * 4, ["a"] * 3, dict.fromkeys("abcd", "a")])
            place = rng.choice(["ctx", "endings", "ending", "label", "id"])
            if place == "ending":
                item["endings"][rng.randrange(4)] = wrong
            else:
                item[place] = wrong
            if rng.random() < 0.2:
                del item[rng.choice(list(item))]
        text = json.dumps(rng.choice([item] * 30 + [[item], None, 3]), ensure_ascii=rng.random() < 0.5)
        lines.append(text.encode(rng.choice(["utf-8"] * 9 + ["latin-1"]), errors="ignore"))
        lines.extend(rng.choice([[], [], [], [b""], [b" \t"], [b"[" * 50_000], [b"not JSON"]]))
    content = rng.choice([b"", b"", b"\xef\xbb\xbf"]) + rng.choice([b"\n", b"\n", b"\r\n"]).join(lines)
    content += rng.choice([b"", b"\n", b"\n\n"])
    if rng.random() < 0.3:
        content = gzip.compress(content)
    damaged = bytearray(content)
    for _ in range(rng.choice([0, 0, 1, 3]) if content else 0):
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged[: rng.choice([len(content)] * 4 + [rng.randrange(len(content) + 1)])])


def test_random_files_of_items(tmp_path):
    import hellaswag
    from command import UserError

    rng, path, good = random.Random(4), tmp_path / "fuzz.jsonl", 0
    for _ in range(800):
        content = random_items(rng)
        path.write_bytes(content)
        zipped = content[:2] == b"\x1f\x8b"
        try:
            items = hellaswag.read_items(str(path))
        except UserError as error:
            assert_line(error, f"{path}: " if zipped else f"{path}: line ")
            continue
        good += 1
        lines = (gzip.decompress(content) if zipped else content).decode("utf-8-sig").split("\n")
        assert items == [json.loads(line) for line in lines if not line.isspace() and line]
        for item in items:
            assert len(item["endings"]) == 4 and type(item["endings"]) is list
            for text in item["ctx"], *item["endings"]:
                assert type(text) is str and text.encode("utf-8")
            assert repr(item["label"]).strip("'") in ("0", "1", "2", "3")
    assert 100 < good < 700


def test_random_command_lines_of_evals():
    import hellaswag
    import sample
    from command import UserError

    rng, good = random.Random(5), 0
    values = ["0", "1", "-1", "64", "0.5", "nan", "inf", "-inf", "1e-300", "1e999", "", "é", "\udcff", "%s", "9" * 30]
    options = {
        hellaswag: ["--data", "--items", "--pack"],
        sample: ["--prompt", "--tokens", "--temperature", "--top-k", "--seed"],
    }
    for _ in range(300):
        program = rng.choice(list(options))
        arguments = ["--checkpoint", "x.pt"] * (rng.random() < 0.9)
        for _ in range(rng.randrange(4)):
            name, value = rng.choice([*options[program], "-x"]), rng.choice([*values, "9" * 5000])
            whole = [[name, value], [f"{name}={value}"]]
            arguments += rng.choice(whole * 4 + [[name], [value]])
        try:
            parsed = program.command_line().parse_args(arguments)
        except UserError as error:
            assert str(error) and "\n" not in str(error), arguments
            continue
        good += 1
        if program is hellaswag:
            assert (parsed.items is None or parsed.items >= 1) and parsed.pack >= 64
        else:
            assert parsed.tokens >= 0 and 0 <= parsed.temperature < math.inf
            assert parsed.top_k >= 0 and torch.Generator().manual_seed(parsed.seed)
    assert 50 < good < 250


def leaves(part, path=()):
    """The paths of everything in a checkpoint, of dictionaries and lists, too."""
    if path:
        yield path
    entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, (list, tuple)) else ()
    for key, each in entries:
        yield from leaves(each, (*path, key))


def changed(part, path, change):
    """A copy of a checkpoint in which the entry at `path` is removed, renamed, or another."""
    key, *rest = path
    if isinstance(part, (list, tuple)):
        entries = list(part)
        if rest:
            entries[key] = changed(entries[key], rest, change)
        elif change == "remove":
            del entries[key]
        elif change != "rename":
            entries[key] = change
        return type(part)(entries)
    entries = dict(part)
    if rest:
        entries[key] = changed(entries[key], rest, change)
    elif change == "remove":
        del entries[key]
    elif change == "rename":
        entries[f"{key}_"] = entries.pop(key)
    else:
        entries[key] = change
    return entries


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_random_parts_of_checkpoints_missing_renamed_or_others(tmp_path):
    """A run goes on from one only if what it took of it is what was saved."""
    torch.manual_seed(0)
    settings = dataclasses.replace(program.PRESETS["mini"], model=CONFIG, resume=str(tmp_path / "fuzz.pt"))
    model = program.GPT(CONFIG)
    optimizer = program.Optimizer(model, settings)
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
    saved = {
        "settings": dataclasses.asdict(settings),
        "step": 5,
        "train_time_ms": 1.0,
        "rng": torch.get_rng_state(),
        "model": {name: p.detach().clone() for name, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
    }
    paths = list(leaves(saved))
    others = [None, -1, 10**6, 1.5, math.nan, "x", [], {}, torch.zeros(3), torch.zeros(2, 2).int(), True]
    rng, resumed = random.Random(4), 0
    for _ in range(1500):
        # Large parts and small ones alike: a level deeper or not.
        deepest = rng.randrange(1, 5)
        path = rng.choice([path for path in paths if len(path) <= deepest])
        change = rng.choice(["remove", "rename", rng.choice(others)])
        state = changed(saved, path, change)
        torch.save(state, settings.resume)
        fresh = program.GPT(CONFIG)
        other = program.Optimizer(fresh, settings)
        try:
            step, milliseconds = program.resume(settings, fresh, other)
        except program.UserError as error:
            assert_line(error, "fuzz.pt")
            continue
        resumed += 1
        now = {"step": step, "train_time_ms": milliseconds, "optimizer": other.state_dict()}
        now["model"] = {name: p.detach() for name, p in fresh.named_parameters()}
        for name, got in now.items():  # of the settings a field with a default may be missing
            assert same(got, state[name]), (path, change)
    assert 50 < resumed < 1200


def test_random_environments(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    texts = ["", "0", "1", "2", "7", "8", "-1", "1.5", "abc", "é", " 3 ", "0x2", "9" * 40, "29500", "65536", "nöde"]
    rng, good = random.Random(5), 0
    for _ in range(1500):
        for name in names:
            monkeypatch.delenv(name, raising=False)
            if rng.random() < 0.6:
                monkeypatch.setenv(name, rng.choice(texts))
        try:
            rank, size = program.find_rank()
        except program.UserError as error:
            assert any(name in str(error) for name in names) and "\n" not in str(error)
            continue
        good += 1
        assert 0 <= rank < size
    assert 50 < good < 1400


class Screen(io.RawIOBase):
    """A terminal or pipe that takes so many bytes, and then fails as it is told to."""

    def __init__(self, room: int, code: int):
        self.room, self.code, self.got = room, code, b""

    def writable(self):
        return True

    def fileno(self):
        return self.number

    def write(self, data):
        if len(self.got) + len(data) > self.room:
            raise OSError(self.code, os.strerror(self.code))
        self.got += bytes(data)
        return len(data)


def test_random_terminals(tmp_path, monkeypatch):
    """Whatever characters a line has, and whenever the screen fails, the log has all lines and one warning."""
    rng, failed = random.Random(6), 0
    monkeypatch.chdir(tmp_path)
    characters = ["a", "é", "…", "\udcff", "\U0001f600", "\x1b", "\0", "日"]
    for case in range(1000):
        encoding = rng.choice(["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift-jis"])
        code = rng.choice([errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
        screen = Screen(rng.choice([0, 50, 300, 10**6]), code)
        screen.number = os.open(os.devnull, os.O_WRONLY)
        stream = io.TextIOWrapper(io.BufferedWriter(screen), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        program.prepare_streams()
        log = object.__new__(program.Log)
        log.path, log.shows, log.terminal, log.wandb = tmp_path / f"{case}.txt", True, False, None
        log.file = open(log.path, "x", encoding="utf-8", errors="backslashreplace")
        lines = ["".join(rng.choices(characters, k=rng.randrange(40))) for _ in range(10)]
        for line in lines:
            log.line(line)
        log.file.close()
        written = log.path.read_text("utf-8").split("\n")[:-1]
        warnings = [line for line in written if line.startswith("warning: the screen is gone")]
        failed += len(warnings)
        assert len(warnings) == (not log.shows)
        escaped = [line.encode("utf-8", "backslashreplace").decode() for line in lines]
        assert [line for line in written if line not in warnings] == escaped
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        screen.room = math.inf  # what is still in the buffer
        stream.detach().detach()
        os.close(screen.number)
    assert 200 < failed < 900


UTF8 = re.compile(  # the grammar of RFC 3629
    rb"([\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{2})*"
)


def utf16_units(data: bytes) -> list[int]:
    """The whole units of UTF-16, without the mark; without one, the machine's own order is meant."""
    order = {b"\xff\xfe": "<", b"\xfe\xff": ">"}.get(data[:2])
    data = data[2 if order else 0 : len(data) // 2 * 2]
    return list(struct.unpack(f"{order or '='}{len(data) // 2}H", data))


def as_utf8(data: bytes, encoding: str) -> bytes | None:
    """A text file's text in UTF-8, or None where it is not text: a second opinion, by the encodings' definitions."""
    if encoding == "utf-8":
        return data.removeprefix(b"\xef\xbb\xbf") if UTF8.fullmatch(data) else None
    if encoding == "latin-1":
        return None if 0 in data else b"".join(bytes([b] if b < 128 else [0xC0 | b >> 6, 0x80 | b & 63]) for b in data)
    units, encoded = utf16_units(data), b""
    for i, unit in enumerate(units):
        high, low = 0xD800 <= unit < 0xDC00, 0xDC00 <= unit < 0xE000
        if high and not 0xDC00 <= (units[i + 1] if i + 1 < len(units) else 0) < 0xE000:
            return None
        if low and not (i and 0xD800 <= units[i - 1] < 0xDC00):
            return None
        if high:
            encoded += chr(0x10000 + (unit - 0xD800) * 1024 + units[i + 1] - 0xDC00).encode()
        elif not low:
            encoded += chr(unit).encode()
    return None if len(data) % 2 or 0 in encoded else encoded.removeprefix(b"\xef\xbb\xbf")


def random_text_file(rng: random.Random) -> bytes:
    """Text in some encoding, as often as not with faults, or just bytes."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.choice([0, 1, 2, 3, 30]))
    content = "".join(rng.choices(["word ", "\n", "\r\n", "é", "ÿ", "漢", "😀", "\ufeff", "\t"], k=rng.randrange(30)))
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-be", "utf-32"])
    data = bytearray((content * rng.choice([1, 1, 1, 200])).encode(encoding, "ignore"))
    for _ in range(rng.choice([0, 0, 0, 1, 1, 3])):
        place = rng.randrange(len(data) + 1)
        data[place : place + rng.randrange(3)] = rng.choice([b"", b"\0", b"\0\0", b"\xd8\xd8", rng.randbytes(1)])
    return bytes(data)


def random_records(rng: random.Random) -> tuple[bytes, list]:
    """A file of JSON lines, and what each is: a document as bytes, or what is to be said of it."""
    content = rng.choice(["one", "zwei ü", "a\nb", "😀", "\ufeff", '"', "漢" * 3000])
    kinds = [(json.dumps({"id": 1, "text": content}).encode(), content.encode())] * 12
    kinds += [(json.dumps({"text": content}, ensure_ascii=False).encode(), content.encode())] * 12
    kinds += [(b'{"text": ""}', b""), (b"", b""), (b" \r", b""), (b'{"text": null}', "null")]
    kinds += [(b'{"url": "\\ud800", "text": "x"}', b"x"), (b'{"text": 1, "text": "x"}', b"x")]
    bad = [b'{"text": "\xff"}', b'{"text": "x", "url": "\xe9"}', b'{"text": "\\udc00"}', b'{"text": "\0"}', b"\0"]
    bad += [b'{"text": "\\u0000"}', b"\xff\xfe", b'{"text": "\xed\xa0\x80"}']
    bad += [rng.randbytes(9).replace(b"\n", b"") + b"\xff"]
    refused = [b'{"text": 7}', b'{"text": ["x"]}', b'{"text": {}}', b'{"text": false}', b"{}", b'"text"', b"[1]"]
    refused += [b'{"text": "x"', b'{"text": "x"}}', b"x", b"[" * 99_999, b'{"text": "x\t"}', b'{"texts": "x"}', b"null"]
    if rng.random() < 0.5:
        kinds += [(line, "bad") for line in rng.sample(bad, 3)]
    if rng.random() < 0.3:
        kinds += [(line, "refused") for line in rng.sample(refused, 2)]
    lines = rng.choices(kinds, k=rng.randrange(12))
    mark = rng.choice([b"", b"\xef\xbb\xbf"])
    return mark + b"\n".join(line for line, _ in lines) + rng.choice([b"", b"\n"]), [what for _, what in lines]


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content[:5]) + gzip.compress(content[5:])
    import pyarrow

    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def test_random_texts_become_exactly_what_they_hold(tmp_path, monkeypatch, capsys):
    import text
    from command import UserError

    class Bytes:  # stands in for GPT-2's tokenizer: tokens are bytes
        def encode_ordinary(self, text):
            return list(text.encode())

    monkeypatch.setattr(text, "gpt2", lambda: (Bytes(), np.arange(256) == 10))
    monkeypatch.setattr(text, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    compressions = ["", "", ".gz", *([".zst"] if importlib.util.find_spec("pyarrow") else [])]
    rng, good = random.Random(4), 0
    for case in range(1500):
        folder, out = tmp_path / f"in{case}", tmp_path / f"out{case}"
        folder.mkdir()
        named, skip_bad = rng.random() < 0.3, rng.random() < 0.4
        encoding, tokenizer = rng.choice(["utf-8", "utf-8", "latin-1", "utf-16"]), rng.choice(["bytes", "gpt2"])
        documents, faulty, notes = [], [], Counter()
        for name in sorted(rng.sample(["a.txt", "b.MD", "c.py", "d.jsonl", "e.ndjson", "f.csv"], rng.randrange(1, 5))):
            compression = rng.choice(compressions)
            path = folder / (name + compression)
            records = None
            if name in ("d.jsonl", "e.ndjson"):
                content, records = random_records(rng)
            else:
                content = random_text_file(rng)
            stored = compressed(content, compression) if compression else content
            damaged = compression and 0 not in content and rng.random() < 0.1  # a binary file is not read to its end
            if damaged:
                stored = rng.choice([stored[: rng.randrange(len(stored) - 1)], content + b"x", stored + b"tail"])
            path.write_bytes(stored)

            # What is to become of it.
            if name == "f.csv" and not named:
                continue
            if damaged:
                faulty.append(path.name)
            elif records is not None:
                for what in records:
                    if isinstance(what, bytes):
                        documents.append(what)
                    elif what == "refused" or what == "bad" and not skip_bad:
                        faulty.append(path.name)
                    else:
                        notes[f"{what} records"] += 1
            else:
                head = content[:8192]
                is_binary = 0 in (utf16_units(head) if encoding == "utf-16" else head)
                document = as_utf8(content, encoding)
                if is_binary and not named:
                    notes["binary files"] += 1
                elif document is not None:
                    documents.append(document)
                elif skip_bad:
                    notes["bad files"] += 1
                else:
                    faulty.append(path.name)
        documents = [document for document in documents if document]

        arguments = [*(sorted(map(str, folder.iterdir())) if named else [str(folder)]), "--out", str(out)]
        arguments += ["--encoding", encoding, "--tokenizer", tokenizer, "--val-every", "2", "--shard-tokens", "5000"]
        monkeypatch.setattr(sys, "argv", ["text.py", *arguments, *(["--skip-bad"] if skip_bad else [])])
        try:
            text.main()
        except UserError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 900, line
            if faulty:
                assert any(f"{folder}/{name}:" in line for name in faulty), (line, faulty)
            else:
                assert len(documents) < 2 and re.match("no text found|too little text", line), line
            assert not out.exists() or not any(out.iterdir())
        else:
            good += 1
            assert not faulty, arguments
            for split, expected in ("train", documents[::2]), ("val", documents[1::2]):
                found = [np.fromfile(path, "<u2")[512:] for path in sorted(out.glob(f"text_{split}_*.bin"))]
                bos = 256 if tokenizer == "bytes" else 50256
                stream = [[bos, *document] for document in expected]
                assert np.concatenate(found).tolist() == sum(stream, []), arguments
            counts = re.findall(r"^skipped ([\d,]+) (.*)$", capsys.readouterr().out, re.MULTILINE)
            assert {what: int(count) for count, what in counts} == notes
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert 300 < good < 1200
