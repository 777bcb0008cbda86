"""Evaluations of a checkpoint: sampling, and HellaSwag packed as one by one."""

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import hellaswag
import sample
import shards
import train_gpt
from command import UserError
from recipe import TINY
from test_command_line import launcher  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent

CONFIG = replace(TINY.model, dim=32, heads=2, bigram_dim=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of a random model of bytes."""
    torch.manual_seed(0)
    settings = replace(TINY, model=CONFIG)
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
    {"ctx": "In the kitchen, " * 5, "endings": ["he cooks", "he eats it all", "", "they"], "label": 3},
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


def command(script, *arguments):
    options = [sys.executable, str(ROOT / "evals" / script), *map(str, arguments)]
    return subprocess.run(options, capture_output=True, text=True)


def test_hellaswag_reports_both_accuracies_with_their_standard_errors(path, data):
    result = command("hellaswag.py", "--checkpoint", path, "--data", data, "--pack", "512")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("HellaSwag, 3 items")
    for line, how in zip(lines[1:], ("mean", "sum")):
        words = line.split()
        assert f"by {how} of" in line
        accuracy, error = float(words[6]), float(words[8])
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 3), abs=1e-4)


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no items"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"]}\n', "line 1"),
        (json.dumps(ITEMS[0]) + "\nnot json\n", "line 2"),
        (json.dumps({**ITEMS[0], "label": 4}) + "\n", "label 0 to 3"),
        (json.dumps({**ITEMS[0], "ctx": "a " * 500}) + "\n", "--pack 512"),
    ],
)
def test_bad_items_are_answered_with_a_line(path, data, content, words, monkeypatch):
    data.write_text(content)
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--checkpoint", str(path), "--data", str(data), "--pack", "512"])
    with pytest.raises(UserError) as end:
        hellaswag.main()
    assert end.value.status == 2 and words in str(end.value)


def test_missing_checkpoint_is_answered_with_a_line(tmp_path):
    for script in "sample.py", "hellaswag.py":
        result = command(script, "--checkpoint", tmp_path / "none.pt")
        assert result.returncode == 2 and "none.pt" in result.stderr and result.stderr.count("\n") == 1


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


def test_sample_prints_the_prompt_and_what_follows(path):
    result = command("sample.py", "--checkpoint", path, "--prompt", "import ", "--tokens", "5", "--seed", "3")
    assert result.returncode == 0 and result.stdout.startswith("import ") and result.stdout.endswith("\n")


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def test_hellaswag_of_a_trained_model_finds_the_likely_endings_packed_or_not(launcher, tmp_path):  # noqa: F811
    from test_command_line import MAIN, MODEL, SMALL, VALIDATION

    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    for name, documents in ("train", 2000), ("val", 60):
        tokens = [token for _ in range(documents) for token in (256, *text(20).encode())]
        shards.write_shard(tmp_path / f"w_{name}_000000.bin", np.array(tokens))
    files = ("--train-files", tmp_path / "w_train_*.bin", "--val-files", tmp_path / "w_val_*.bin")
    options = ("--preset", "tiny", *MODEL, *VALIDATION, *files, "--steps", "60", "--checkpoint-last", "--run-id", "w")
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
