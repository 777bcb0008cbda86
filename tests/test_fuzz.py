"""A few thousand random shards, checkpoints and command lines: each ends in success or in one clear line."""

import dataclasses
import errno
import gzip
import io
import json
import math
import os
import random
import struct
import sys

import numpy as np
import pytest
import torch

import train_gpt as program

pytestmark = pytest.mark.slow
CONFIG = dataclasses.replace(program.PRESETS["tiny"].model, dim=32, heads=2, bigram_dim=16)


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
    stage = dataclasses.replace(program.PRESETS["tiny"].extension, steps=1)
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
            program.PRESETS["tiny"], model=CONFIG, slices=slices, stages=(stage,) * 2, extension=stage,
            epochs=rng.randrange(1, 4),
        )  # fmt: skip
        paths = program.find_shards(str(tmp_path / f"c{case}_*.bin"), "tiny")
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
    settings = dataclasses.replace(program.PRESETS["tiny"], model=CONFIG)
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
        "tiny",
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
    settings = dataclasses.replace(program.PRESETS["tiny"], model=CONFIG, resume=str(tmp_path / "fuzz.pt"))
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
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
