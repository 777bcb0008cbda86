"""A few thousand random shards, checkpoints and command lines: each ends in success or in one clear line."""

import dataclasses
import gzip
import json
import math
import random
import struct

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
