"""Evaluations of a checkpoint: sampling, and HellaSwag packed as one by one."""

import codecs
import gzip
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import hellaswag
import sample
import shards
import train_gpt
from command import UserError
from recipe import MINI
from test_command_line import launcher  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent

CONFIG = replace(MINI.model, dim=32, heads=2, bigram_dim=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of a random model of bytes."""
    torch.manual_seed(0)
    settings = replace(MINI, model=CONFIG)
    model = train_gpt.GPT(CONFIG)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("evals") / "model.pt"
    state = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    torch.save({**state, "settings": asdict(settings), "step": 370}, path)
    return path


ITEMS = [
    {"ctx": "A man sits", "endings": ["down.", "on a very long bench in the park.", "up", "é."], "label": "1"},
    {"ctx": "She", "endings": ["runs", "walks home", "sings a song", "x"], "label": 0},
    {"ctx": "In the kitchen, " * 5, "endings": ["he cooks", "he eats it all", " ", "they"], "label": 3},
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


def one_by_one(model, item, ending):
    """The losses of an ending's bytes, each from a sequence of its own, through the probabilities."""
    context, tokens = [256, *item["ctx"].encode()], list((" " + item["endings"][ending]).encode())
    losses = []
    for n, token in enumerate(tokens):
        x = model.model.stream(torch.tensor(context + tokens[:n]), model.context(len(context) + n))[-1]
        z = 23 * torch.sigmoid((x.double() @ model.model.lm_head.double() + 5) / 7.5)
        losses.append(-(z[token] - z.logsumexp(0)).item())
    return losses


def test_packed_items_score_as_one_by_one(path):
    model = checkpoint.load(str(path), "cpu")
    alone = {}
    with torch.no_grad():
        for i, item in enumerate(ITEMS):
            for e in range(4):
                alone[i, e] = one_by_one(model, item, e)
    for length in 128, 1000:
        groups = list(hellaswag.packed(hellaswag.completions(ITEMS, model), length))
        assert (len(groups) > 1) == (length == 128)
        scored = list(hellaswag.score(groups, model, length))
        assert [(document.item, document.ending) for document, _ in scored] == list(alone)
        for document, losses in scored:
            expected = alone[document.item, document.ending]
            assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    best = [
        [min(range(4), key=lambda e, i=i, f=f: f(alone[i, e])) == int(ITEMS[i]["label"]) for i in range(3)]
        for f in (lambda losses: sum(losses) / len(losses), sum)
    ]
    assert hellaswag.accuracies(ITEMS, scored) == pytest.approx([sum(each) / 3 for each in best])


@pytest.fixture
def command(launcher, tmp_path):  # noqa: F811
    """Runs a program of evals/ in an empty folder, and returns what came of it."""
    return lambda script, *arguments: launcher.start(ROOT / "evals" / script, *arguments, cwd=tmp_path).wait()


def assert_line(result, *words):
    """The program has ended with a line that has these words."""
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result
    for word in words:
        assert str(word) in result.stderr


def test_hellaswag_reports_both_accuracies_with_their_standard_errors(path, data, command):
    result = command("hellaswag.py", "--checkpoint", path, "--data", data, "--pack", "512")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("HellaSwag, 3 items")
    for line, how in zip(lines[1:], ("mean", "sum")):
        words = line.split()
        assert f"by {how} of" in line
        accuracy, error = float(words[6]), float(words[8])
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 3), abs=1e-4)


LINE = json.dumps(ITEMS[0]).encode()


def test_items_may_be_gzipped_and_have_a_byte_order_mark_and_blank_lines(path, data, tmp_path, command):
    def result(file):
        finished = command("hellaswag.py", "--checkpoint", path, "--data", file, "--pack", "512")
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    expected = result(data)
    content = codecs.BOM_UTF8 + data.read_bytes().replace(b"\n", b"\r\n\r\n \n") + b"\n\n"
    data.write_bytes(gzip.compress(content, mtime=0))
    assert result(data) == expected
    (tmp_path / "bom.jsonl").write_bytes(content.rstrip())
    assert result(tmp_path / "bom.jsonl").splitlines()[1:] == expected.splitlines()[1:]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no items"),
        (b"\n \n", "no items"),
        (LINE + b"\nnot json\n", "line 2: expected an object with ctx"),
        (LINE + b"\n\n" + "{'é'}".encode("latin-1"), "line 3"),
        (LINE.replace(b"man", "é".encode("latin-1")), "line 1"),
        (LINE.decode().encode("utf-16"), "line 1"),
        (LINE[:-1], "line 1"),
        (LINE.replace(b"man", rb"\ud800"), "line 1"),
        (LINE.replace(b"park", rb"\udfff"), "line 1"),
        (b"[" * 100_000, "line 1"),
        (LINE.replace(b'"1"', b"9" * 5000), "line 1"),
        (gzip.compress(LINE, mtime=0)[:-9], "items.jsonl: the gzip file is damaged"),
        (gzip.compress(LINE, mtime=0) + b"and more", "items.jsonl: the gzip file is damaged"),
        (gzip.compress(LINE, mtime=0)[:20] + bytes(40), "items.jsonl: the gzip file is damaged"),
        (gzip.compress(LINE + b"\nnot json\n", mtime=0), "line 2"),
        (json.dumps({**ITEMS[0], "ctx": "a " * 500}).encode(), "--pack 512"),
    ],
)
def test_bad_files_of_items_are_answered_with_a_line(path, data, content, words, command):
    data.write_bytes(content)
    assert_line(command("hellaswag.py", "--checkpoint", path, "--data", data, "--pack", "512"), words)


@pytest.mark.parametrize(
    "key, wrong",
    [
        ("ctx", [None, "", 3, ["A man sits"], {}]),
        ("endings", [None, "abcd", ["a"] * 3, ["a"] * 5, [*"abc", ""], [*"abc", 4], dict.fromkeys("abcd")]),
        ("label", [None, 4, -1, 1.7, 1.0, True, False, "", "4", "1.0", " 1", "\u0661", [1]]),
    ],
)  # fmt: skip
def test_wrong_items_are_answered_with_a_line(key, wrong, path, data, command):
    missing = {name: value for name, value in ITEMS[0].items() if name != key}
    for item in (missing, [missing], *({**ITEMS[0], key: value} for value in wrong)):
        data.write_bytes(LINE + b"\n" + json.dumps(item).encode() + b"\n" + LINE)
        assert_line(command("hellaswag.py", "--checkpoint", path, "--data", data), data, "line 2: expected", key)


def test_unreadable_files_of_items_are_answered_with_a_line(path, tmp_path, command):
    for file in tmp_path, tmp_path / "none.jsonl":
        assert_line(command("hellaswag.py", "--checkpoint", path, "--data", file), file)


@pytest.mark.parametrize(
    "script, option, wrong",
    [
        ("hellaswag.py", "--items", ["-1", "0", "1.5", "9" * 30]),
        ("hellaswag.py", "--pack", ["-512", "0", "1", "9" * 30]),
        ("sample.py", "--tokens", ["-1", "x", "9" * 30]),
        ("sample.py", "--temperature", ["nan", "inf", "-inf", "-0.1", "1e999", "", "hot"]),
        ("sample.py", "--top-k", ["-1", "2.5"]),
        ("sample.py", "--seed", ["-1", "9" * 20, "one"]),
    ],
)
def test_wrong_options_are_answered_with_a_line(script, option, wrong, path, command):
    for text in wrong:
        assert_line(command(script, "--checkpoint", path, f"{option}={text}"), option, f"found {text}")


def test_bad_checkpoints_are_answered_with_a_line(path, tmp_path, command):
    state = torch.load(path)
    weights, settings = state["model"], state["settings"]
    bad = {
        "infinite": {"model": {**weights, "vo_bank": weights["vo_bank"] / 0}},
        "no model": {"model": None},
        "no step": {"step": "last"},
        "no embed": {"model": {name: p for name, p in weights.items() if name != "embed"}},
        "vo_bank": {"model": {name: p for name, p in weights.items() if name != "vo_bank"}},
        "lm_head": {"model": {**weights, "lm_head": weights["lm_head"][:-1]}},
        "another_bank": {"model": {**weights, "another_bank": weights["vo_bank"]}},
        "vocabulary of 300": {"settings": {**settings, "model": {**settings["model"], "vocab_size": 300}}},
    }
    for words, changes in bad.items():
        torch.save({**state, **changes}, tmp_path / "bad.pt")
        assert_line(command("sample.py", "--checkpoint", tmp_path / "bad.pt"), words)
    for script in "sample.py", "hellaswag.py":
        assert_line(command(script, "--checkpoint", tmp_path / "none.pt"), "none.pt")


def test_checkpoint_of_a_compiled_model_is_as_good(path, tmp_path):
    state = torch.load(path)
    model = {f"module._orig_mod.{name}": p for name, p in state["model"].items()}
    torch.save({**state, "model": model}, tmp_path / "compiled.pt")
    one, other = (checkpoint.load(str(each), "cpu").model for each in (path, tmp_path / "compiled.pt"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_gpt2s_tokenizer_takes_what_is_utf8_and_else_there_is_a_line(monkeypatch):
    class Encoding:
        def encode_ordinary(self, text):
            return list(text.encode())

    config = replace(CONFIG, vocab_size=50257, bos_id=50256)
    monkeypatch.setattr(checkpoint, "gpt2_encoding", Encoding)
    encode, _ = checkpoint.tokenizer(config)
    assert encode("é") == encode(os.fsdecode("é".encode())) == encode("\udcc3\udca9") == [0xC3, 0xA9]
    for text in "\udcff", "\ud800", "é\udcc3":
        with pytest.raises(UserError, match="UTF-8 alone"):
            encode(text)


def test_gpt2s_tokenizer_that_cannot_be_had_is_answered_with_a_line(monkeypatch):
    def fail(name):
        raise ConnectionError("no network\nand a paragraph more")

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=fail))
    with pytest.raises(UserError, match="^GPT-2's tokenizer could not be fetched: no network$"):
        checkpoint.gpt2_encoding()
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="tiktoken is missing: .* -m pip install -r "):
        checkpoint.gpt2_encoding()


def test_samples_are_the_same_for_a_seed_and_follow_the_probabilities(path):
    model = checkpoint.load(str(path), "cpu")
    texts = [list(sample.sample(model, "def ", 8, 1.0, 0, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first = [next(sample.sample(model, "x", 1, 1.0, 3, seed), model.bos) for seed in range(200)]
    probabilities = model.logits(torch.tensor([model.bos, *b"x"])).softmax(-1)
    likeliest = probabilities.topk(3)
    assert set(first) <= set(likeliest.indices.tolist())
    share = first.count(likeliest.indices[0].item()) / 200
    assert share == pytest.approx((likeliest.values[0] / likeliest.values.sum()).item(), abs=0.12)
    greedy = list(sample.sample(model, "x", 4, 0.0, 0, 1))
    for n, token in enumerate(greedy):
        assert token == model.logits(torch.tensor([model.bos, *b"x", *greedy[:n]])).argmax()


def test_samples_go_on_after_a_document_unless_they_are_told_to_stop(path, monkeypatch, capsys):
    model = checkpoint.load(str(path), "cpu")
    tokens = iter([*b"one", 256, *b"two"])
    monkeypatch.setattr(sample, "sample", lambda *arguments: tokens)
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: model)
    for stop, text in ([], "zero one<|endoftext|>two\n"), (["--stop"], "zero one\n"):
        tokens = iter([*b" one", 256, *b"two"])
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(path), "--prompt", "zero", *stop])
        sample.main()
        assert capsys.readouterr().out == text


def test_sample_prints_the_prompt_and_what_follows(path, command):
    result = command("sample.py", "--checkpoint", path, "--prompt", "import ", "--tokens", "5", "--seed", "3")
    assert result.returncode == 0 and result.stdout.startswith("import ") and result.stdout.endswith("\n")


def test_the_least_temperatures_take_the_likeliest_token(path, command):
    def text(temperature, *more):
        result = command("sample.py", "--checkpoint", path, "--tokens", "8", "--temperature", temperature, *more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    greedy = text("0")
    for temperature in "1e-38", "1e-300", "5e-324":
        assert text(temperature) == text(temperature, "--top-k", "0") == greedy
    assert text("1e308", "--top-k", 2**63 - 1, "--seed", 2**63 - 1) != greedy


def test_prompt_may_be_bytes_that_are_no_text_on_any_terminal(path):
    program = [sys.executable, ROOT / "evals" / "sample.py", "--checkpoint", path]
    for encoding, expected in ("utf-8", "a\ufffdb\n".encode()), ("ascii", b"a\\ufffdb\n"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        options = "--tokens", "0", "--prompt", b"a\xffb"
        result = subprocess.run([*program, *options], capture_output=True, env=environment)
        assert (result.returncode, result.stdout) == (0, expected), result.stderr
    model = checkpoint.load(str(path), "cpu")
    assert model.encode(os.fsdecode(b"a\xffb")) == [*b"a\xffb"]


def test_prompt_that_is_too_long_is_answered_with_a_line(path, command):
    for length, status in (sample.LONGEST, 0), (sample.LONGEST + 1, 2):
        result = command("sample.py", "--checkpoint", path, "--prompt", "x" * length, "--tokens", "1")
        assert result.returncode == status
    assert_line(result, "--prompt has 16,385 tokens")


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def test_hellaswag_of_a_trained_model_finds_the_likely_endings_packed_or_not(launcher, tmp_path, command):  # noqa: F811
    from test_command_line import MAIN, MODEL, SMALL, VALIDATION

    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    for name, documents in ("train", 2000), ("val", 60):
        tokens = [token for _ in range(documents) for token in (256, *text(20).encode())]
        shards.write_shard(tmp_path / f"w_{name}_000000.bin", np.array(tokens))
    files = ("--train-files", tmp_path / "w_train_*.bin", "--val-files", tmp_path / "w_val_*.bin")
    options = ("--preset", "mini", *MODEL, *VALIDATION, *files, "--steps", "60", "--checkpoint-last", "--run-id", "w")
    assert launcher.start(SMALL + MAIN, *options, cwd=tmp_path).wait().returncode == 0

    items = []
    for _ in range(200):
        label, endings = (
            rng.randrange(4),
            [text(4).upper(), text(4)[::-1].swapcase(), "".join(rng.sample("0123456789", 9))],
        )
        items.append({"ctx": text(6), "endings": [*endings[:label], text(4), *endings[label:]], "label": label})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    saved = tmp_path / "logs" / "w_step000060.pt"
    result = command("hellaswag.py", "--checkpoint", saved, "--data", tmp_path / "items.jsonl", "--pack", "2048")
    assert result.returncode == 0, result.stderr
    model = checkpoint.load(str(saved), "cpu")
    alone = ([document] for document in hellaswag.completions(items, model))
    by_mean, by_sum = hellaswag.accuracies(items, hellaswag.score(alone, model, 128))
    assert f"by mean of token losses: {by_mean:.4f} " in result.stdout
    assert f"by sum of token losses: {by_sum:.4f} " in result.stdout
    assert by_mean > 0.9
