"""The baseline records/baseline/train_gpt2.py: the model, the optimizer, the data's order, and its log."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import logbook
import shards
import train_gpt as speedrun

SCRIPT = Path(__file__).resolve().parent.parent / "records" / "baseline" / "train_gpt2.py"


def load_script():
    spec = importlib.util.spec_from_file_location("train_gpt2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


baseline = load_script()
SMALL = replace(baseline.TINY, layers=2, heads=3, dim=12, context=16, vocab_size=257)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings of a small run, in an empty folder, on two training shards and two validation shards of random bytes."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, size in {"train_1": 100, "train_2": 61, "val_1": 40, "val_2": 30}.items():
        shards.write_shard(tmp_path / f"{name}.bin", generator.integers(0, 257, size))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield replace(
        SMALL,
        train_files="train_*.bin",
        val_files="val_*.bin",
        batch_tokens=48,
        val_tokens=64,
        steps=3,
        warmup_steps=1,
        sample_tokens=0,
        dtype="float32",
        compile=False,
        run_id="run",
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stream(pattern: str) -> torch.Tensor:
    """All tokens of the shards in the working folder that match a pattern."""
    parts = [np.fromfile(path, "<u2")[512:] for path in sorted(Path().glob(pattern))]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def model_of(settings, dtype=torch.float64):
    torch.manual_seed(settings.seed)
    return baseline.GPT(settings).to(dtype)


def train_losses(name: str = "run") -> list[float]:
    return [
        float(loss) for loss in re.findall(r"\nstep:\d+/\d+ train_loss:(\S+)", Path(f"logs/{name}.txt").read_text())
    ]


def layer_norm(x, gain, bias):
    mean = x.mean()
    return (x - mean) / math.sqrt(((x - mean) ** 2).mean() + 1e-5) * gain + bias


@torch.no_grad()
def naive_losses(model, sequence):
    """GPT-2's cross-entropies of the tokens (T + 1,) but the first, token by token and head by head."""
    p, settings = dict(model.named_parameters()), model.settings
    head_dim = settings.dim // settings.heads
    x = [p["wte.weight"][token] + p["wpe.weight"][position] for position, token in enumerate(sequence[:-1])]
    for i in range(settings.layers):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items()}

        def linear(name, a, w=w):
            return w[f"{name}.weight"] @ a + w[f"{name}.bias"]

        qkv = [linear("attn_in", layer_norm(t, w["ln_1.weight"], w["ln_1.bias"])) for t in x]
        mixed = []
        for t in range(len(x)):
            heads = []
            for h in range(settings.heads):
                of_head = slice(h * head_dim, (h + 1) * head_dim)
                q, keys, values = (
                    [a[n * settings.dim : (n + 1) * settings.dim][of_head] for a in qkv[: t + 1]] for n in range(3)
                )
                scores = torch.stack([q[t] @ key / math.sqrt(head_dim) for key in keys])
                weights = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(weight * value for weight, value in zip(weights, values)))
            mixed.append(torch.cat(heads))
        x = [a + linear("attn_out", b) for a, b in zip(x, mixed)]
        for t, a in enumerate(x):
            h = linear("mlp_in", layer_norm(a, w["ln_2.weight"], w["ln_2.bias"]))
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x[t] = a + linear("mlp_out", h)
    losses = []
    for a, target in zip(x, sequence[1:]):
        z = p["wte.weight"] @ layer_norm(a, p["ln_f.weight"], p["ln_f.bias"])
        losses.append(torch.log(torch.exp(z).sum()) - z[target])
    return torch.stack(losses)


# ---- The model -------------------------------------------------------------------------------------------------------


def test_parameter_count_is_gpt2s_plus_the_padding():
    with torch.device("meta"):
        model = baseline.GPT(baseline.Settings())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + (50_304 - 50_257) * 768


@pytest.mark.recipe
def test_tiny_has_as_many_matrix_parameters_as_the_preset_mini():
    """The blocks' matrices and the output matrix, to half a percent; and as many layers."""
    with torch.device("meta"):
        model = baseline.GPT(baseline.TINY)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")
    config = speedrun.PRESETS["mini"].model
    without_attention = replace(speedrun.PRESETS["mini"].extension, windows=(0, 0))
    assert matrices == pytest.approx(speedrun.flops_per_token(config, without_attention) / 6, rel=0.005)
    assert baseline.TINY.layers == len(config.layers)
    assert model.wte.num_embeddings == config.padded_vocab


def test_tiny_learns_from_the_same_data_as_the_preset_tiny():
    preset = speedrun.PRESETS["tiny"]
    for name in ("train_files", "val_files", "val_tokens"):
        assert getattr(baseline.TINY, name) == getattr(preset, name)
    record = speedrun.PRESETS["record"]
    for name in ("train_files", "val_files", "val_tokens"):
        assert getattr(baseline.Settings(), name) == getattr(record, name)


def test_losses_equal_a_naive_gpt2():
    torch.manual_seed(0)
    model = model_of(SMALL)
    for p in model.parameters():  # far from the start, where much is zero
        p.data += 0.2 * torch.randn_like(p)
    tokens = torch.randint(257, (2, 12))
    expected = torch.stack([naive_losses(model, sequence) for sequence in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_rounds_products_but_not_parameters():
    tokens = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    exact, rounded = model_of(SMALL, torch.float32), model_of(SMALL, torch.float32)
    rounded.autocast = True
    losses = rounded(tokens)
    assert losses.dtype == torch.float32 and (losses != exact(tokens)).any()
    torch.testing.assert_close(losses, exact(tokens), rtol=0, atol=0.01)
    losses.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in rounded.parameters())


def test_starts_are_gpt2s():
    model = model_of(replace(SMALL, layers=8, dim=96))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith(("attn_out.weight", "mlp_out.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
        else:
            assert (p == (1 if re.search(r"ln_.\.weight", name) else 0)).all(), name


# ---- The optimizer ---------------------------------------------------------------------------------------------------


def test_learning_rate_rises_for_715_steps_then_falls_to_a_tenth():
    settings = replace(baseline.Settings(), steps=2715)
    for step, lr in {0: 6e-4 / 715, 356: 6e-4 * 357 / 715, 714: 6e-4, 715: 6e-4, 1715: 3.3e-4, 2715: 6e-5}.items():
        assert settings.learning_rate(step) == pytest.approx(lr, rel=1e-12), step
    # A quarter of the cosine: (1 + 1/sqrt 2) / 2 of the way between a tenth and the whole.
    assert settings.learning_rate(1215) == pytest.approx(6e-5 + 5.4e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)


def test_only_matrices_decay():
    """Without a gradient AdamW only decays: by the learning rate times 0.1."""
    model = model_of(SMALL)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.make_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() == 2 else 1), msg=name)


def test_one_adamw_step_equals_its_formula():
    """After one step both moments are unbiased: the update is lr * g / (|g| + 1e-8); after two they are averages."""
    model = model_of(SMALL)
    optimizer, p = model.make_optimizer(), model.ln_f.bias
    first, second = torch.randn_like(p), torch.randn_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    p.grad = first
    optimizer.step()
    expected = -0.1 * first / (first.abs() + 1e-8)
    torch.testing.assert_close(p.data, expected)
    p.grad = second
    optimizer.step()
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.95 * 0.05 * first**2 + 0.05 * second**2) / (1 - 0.95**2)
    torch.testing.assert_close(p.data, expected - 0.1 * mean / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 6, 100])
def test_gradient_does_not_depend_on_the_micro_batch(micro_batch):
    batch = torch.randint(257, (6, 17), generator=torch.Generator().manual_seed(0))
    whole, parts = model_of(SMALL), model_of(SMALL)
    loss = whole(batch).mean()
    loss.backward()
    torch.testing.assert_close(baseline.train_step(parts, batch, micro_batch).double(), loss, rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_full_size_passes_a_step_of_1024_tokens_on_the_cpu():
    torch.manual_seed(0)
    model = baseline.GPT(baseline.Settings())
    optimizer = model.make_optimizer()
    before = {name: p.detach().flatten()[:1000].clone() for name, p in model.named_parameters()}
    loss = baseline.train_step(model, torch.randint(50_257, (1, 1025)), micro_batch=1)
    assert loss.item() == pytest.approx(math.log(50_304), abs=0.3)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(norm)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all() and (p.flatten()[:1000] != before[name]).any(), name


# ---- The data --------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_shards_one_after_the_other(small):
    sizes = baseline.find_shards("train_*.bin", "")
    assert sizes == {"train_1.bin": 100, "train_2.bin": 61}
    tokens = stream("train_*.bin")
    for start, count in [(0, 10), (0, 161), (90, 20), (100, 61), (99, 1), (150, 11)]:
        assert baseline.read_tokens(sizes, start, count, 257).tolist() == tokens[start : start + count].tolist()


def test_steps_take_the_stream_in_order_and_validation_its_beginning(small):
    """With a learning rate of 0 the losses in the log are those of the first weights on known tokens."""
    settings = replace(small, lr=0.0, steps=5, epochs=2, micro_batch=2)
    assert baseline.train(settings) == 0
    model, tokens = model_of(settings), stream("train_*.bin")
    starts = [0, 48, 96, 0, 48]  # three batches of 48 tokens fit into 161, the third across the shards
    expected = [model(tokens[start : start + 49].unfold(0, 17, 16)).mean().item() for start in starts]
    assert train_losses() == pytest.approx(expected, abs=1e-4)
    (val_loss, *_) = re.findall(r"\nstep:0/5 val_loss:(\S+)", Path("logs/run.txt").read_text())
    losses = [naive_losses(model, stream("val_*.bin")[start : start + 17]) for start in (0, 16, 32, 48)]
    assert float(val_loss) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10])
def test_validation_predicts_each_token_once(micro_batch):
    seen = []

    def model(sequences):
        seen.extend(sequences[:, 1:].flatten().tolist())
        return sequences[:, 1:].double()

    sequences = torch.arange(7 * 16 + 1).unfold(0, 17, 16)
    assert baseline.validate(model, sequences, micro_batch, torch.device("cpu")) == (1 + 112) / 2
    assert seen == list(range(1, 113))


def test_ending_of_the_lowest_mean_loss_is_chosen():
    model = model_of(replace(SMALL, context=64))
    generator = np.random.default_rng(0)
    for _ in range(5):
        prompt, *endings = (generator.integers(0, 257, size).tolist() for size in (5, 2, 9, 4, 6))
        means = [naive_losses(model, torch.tensor(prompt + ending))[-len(ending) :].mean() for ending in endings]
        assert model.choose_ending(prompt, endings) == int(torch.stack(means).argmin())


# ---- The command line and the log ------------------------------------------------------------------------------------


def run_script(*arguments, processes: int = 1, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def tiny_arguments(name: str) -> list:
    return [
        *("--tiny", "--train-files", "train_*.bin", "--val-files", "val_*.bin", "--compile", "false", "--run-id", name),
        *("--context", 16, "--batch-tokens", 64, "--val-tokens", 64, "--steps", 2, "--dtype", "float32"),
    ]


def test_log_is_read_by_the_logbook_and_gives_the_script_back(small, tmp_path, capsys):
    items = [{"ctx": "a b", "endings": ["c", "d e", "f", "g"], "label": label} for label in (0, "1", 2, 3)]
    Path("items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    done = run_script(*tiny_arguments("tiny"), "--hellaswag", "items.jsonl", "--sample-tokens", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = logbook.read_log("logs/tiny.txt")
    assert not log.problems and not log.notes
    (run,) = log.runs
    assert (run.total_steps, run.final_step, list(run.steps)) == (2, 2, [0, 2])
    assert run.flaw() is None and run.train_time_ms > 0 and run.peak_memory_mib > 0 and run.hardware
    lines = Path("logs/tiny.txt").read_text().rpartition("=" * 100 + "\n")[2].splitlines()
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", lines[-1])
    assert [line for line in lines if "hellaswag:" in line] == [f"step:{n}/2 hellaswag:0.2500" for n in (0, 2)]
    samples = [json.loads(line.removeprefix("sample: ")) for line in lines if line.startswith("sample: ")]
    assert len(samples) == 2
    for command in (["show", "logs/tiny.txt"], ["extract", "logs/tiny.txt", "--out", "script.py"]):
        arguments = logbook.command_line().parse_args(command)
        assert arguments.command(arguments) == 0
    assert re.search(r"logs/tiny\.txt +2/2 +\d\.\d{4} +[\d,]+ ms", capsys.readouterr().out)
    assert Path("script.py").read_bytes() == SCRIPT.read_bytes()


def test_two_processes_learn_what_one_learns(small, tmp_path):
    for processes, name in ((1, "one"), (2, "two")):
        more = ("--lr", 0.01, "--sample-tokens", 0, "--micro-batch", 1)
        done = run_script(*tiny_arguments(name), *more, processes=processes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (
        re.findall(r"\n(step:\S+ \w+_loss):(\S+)", Path(f"logs/{name}.txt").read_text()) for name in ("one", "two")
    )
    assert [line for line, _ in one] == [line for line, _ in two] and len(one) == 4
    assert [float(loss) for _, loss in two] == pytest.approx([float(loss) for _, loss in one], abs=2e-4)


def test_sampling_leaves_training_as_it_is(small):
    for name, sample_tokens in (("plain", 0), ("sampled", 5)):
        assert baseline.train(replace(small, run_id=name, sample_tokens=sample_tokens, val_every=1)) == 0
    assert train_losses("plain") == train_losses("sampled")


def test_a_run_learns(small):
    assert baseline.train(replace(small, steps=30, epochs=10, lr=0.03)) == 0
    losses = train_losses()
    assert losses[-1] < losses[0] - 1


def test_loss_that_is_not_finite_ends_the_run_with_status_3(small):
    assert baseline.train(replace(small, lr=1e38)) == 3
    assert re.search(r"\nloss is not finite: step 2\n$", Path("logs/run.txt").read_text())


def test_signal_leaves_a_whole_log(small, tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        *map(str, tiny_arguments("stopped")),
        "--steps",
        "100000",
        "--epochs",
        "100000",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("step:2/"):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.stdout.close()
    lines = Path("logs/stopped.txt").read_text().splitlines()
    assert re.fullmatch(r"step:(\d+)/100000 train_loss:.*", lines[-2])
    assert lines[-1] == "stopped by a signal after step " + re.match(r"step:(\d+)", lines[-2])[1]


def test_run_outlives_its_reader(small, tmp_path):
    command = [sys.executable, str(SCRIPT), *map(str, tiny_arguments("alone"))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("logs/alone.txt").read_text().splitlines()[-1].startswith("peak memory")


def changed(path: str, position: int, value: int) -> None:
    data = np.fromfile(path, "<i4" if position < 256 else "<u2")
    data[position] = value
    data.tofile(path)


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ["--train-files", "no_*.bin"], ["no_*.bin", "python data/embedded.py"]),
        (lambda: changed("train_1.bin", 0, 7), [], ["train_1.bin", "20240520"]),
        (lambda: changed("val_2.bin", 1, 2), [], ["val_2.bin", "20240520"]),
        (lambda: os.truncate("train_2.bin", 1100), [], ["train_2.bin", "1100 bytes"]),
        (lambda: os.truncate("train_2.bin", 10), [], ["train_2.bin", "10 bytes"]),
        (lambda: changed("val_1.bin", 512, 999), [], ["val_1.bin", "999", "257"]),
        (None, ["--steps", "9"], ["--epochs 5"]),
        (None, ["--batch-tokens", "40"], ["--batch-tokens 40", "16"]),
        (None, ["--batch-tokens", "0"], ["at least 1"]),
        (None, ["--val-tokens", "80"], ["--val-tokens 80", "70"]),
        (None, ["--val-tokens", "40"], ["--val-tokens 40", "16"]),
        (None, ["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (None, ["--compile", "perhaps"], ["--compile", "perhaps"]),
        (None, ["--stepz", "9"], ["--stepz"]),
        (None, ["--hellaswag", "none.jsonl"], ["none.jsonl"]),
        (None, ["--hellaswag", "train_1.bin"], ["train_1.bin"]),
    ],
)
def test_mistakes_get_one_line_and_leave_no_log(spoil, arguments, words, small, capsys):
    if spoil:
        spoil()
    assert baseline.main([*map(str, tiny_arguments("run")), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_gpt2.py: ")
    for word in words:
        assert word in line
    assert not Path("logs").exists()


def test_log_of_another_run_is_not_overwritten(small, capsys):
    Path("logs").mkdir()
    Path("logs/run.txt").write_text("a log")
    assert baseline.main([*map(str, tiny_arguments("run"))]) == 2
    assert "logs/run.txt" in capsys.readouterr().err
    assert Path("logs/run.txt").read_text() == "a log"


def test_fewer_steps_warm_up_in_proportion():
    assert baseline.parse_arguments(["--steps", "1907"])[0].warmup_steps == 71
    assert baseline.parse_arguments(["--steps", "1907", "--warmup-steps", "9"])[0].warmup_steps == 9
    assert baseline.parse_arguments([])[0] == baseline.Settings()
    assert baseline.parse_arguments(["--tiny"])[0] == baseline.TINY


def test_dry_run_prints_the_counts(capsys):
    assert baseline.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "124,475,904" in printed  # 124,439,808 and the padding's 36,096
    assert "123,568,128" in printed  # without learned positions, biases and LayerNorm's gains
    assert "9,999,745,024" in printed
