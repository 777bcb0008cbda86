"""FP8's scales from step to step, as a GPU without tensor descriptors has them: in PyTorch, which a CPU runs, too."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from recipe import MINI, RECORD
from test_optimizer import MODEL
from train_gpt import GPT, Optimizer, UserError, estimate_gpu_memory, make_context, schedule, token_losses

ROOT = Path(__file__).resolve().parent.parent
LAYERS = len(MODEL.layers)
SETTINGS = replace(MINI, model=MODEL)
BUFFERS = ("w_in8", "w_in8_scale", "w_out8", "w_out8_scale", "next_w_out8_scale", "post_scale")


@pytest.fixture(autouse=True)
def older_gpu(monkeypatch):
    """One that runs no kernel: products and losses are all in PyTorch; FP8's by hand, whose own take 0.1 s on a CPU."""
    gpu = SimpleNamespace(major=8, multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def summed_loss(x, lm_head, targets, weights, *prefix, kernels, fp8):
        return token_losses(x, lm_head, targets, weights, x.dtype, *prefix).sum()

    def scaled_mm(a, b, a_scale, b_scale, fast=True):
        return (a.float() @ b.float().T * (a_scale * b_scale)).to(torch.bfloat16)

    def add_rows(out, rows, values):
        out.index_add_(0, rows, values)

    monkeypatch.setattr(train_gpt, "summed_loss", summed_loss)
    monkeypatch.setattr(train_gpt, "scaled_mm", scaled_mm)
    monkeypatch.setattr(train_gpt, "add_rows", add_rows)


@pytest.fixture
def squares(monkeypatch):
    """Of every MLP in FP8 that runs: the scale of its square, the square, and what it is in 8 bits."""
    seen = []

    def noting(*inputs, original=train_gpt.relu_squared_fp8):
        post, post8, maxima = original(*inputs)
        seen.append((inputs[-1].item(), post.detach().double(), post8.double()))
        return post, post8, maxima

    monkeypatch.setattr(train_gpt, "relu_squared_fp8", noting)
    return seen


def new_run(seed: int = 0, fp8: bool = True) -> tuple[GPT, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(MODEL, torch.bfloat16, kernels=True, fp8=fp8)
    for _, p in sorted(model.named_parameters()):
        p.data += 0.02 * torch.randn_like(p)
    model.mlp_bank.data[1::2] = 0
    optimizer = Optimizer(model, SETTINGS)
    optimizer.kernels = False  # NorMuon's
    model.quantize_weights()
    return model, optimizer


def step(model: GPT, optimizer: Optimizer, number: int, grow: float = 1.0) -> None:
    """A step of two slices, after which matrices are `grow` times what they would be."""
    generator = torch.Generator().manual_seed(number)
    context = make_context(MODEL, 32, (8, 16), model.embed)
    for _ in range(2):
        tokens = torch.randint(100, (33,), generator=generator)
        model(tokens[:-1], tokens[1:], context).backward()
    for name, p in sorted(model.named_parameters()):
        if name == "mlp_bank":  # W_out is zero at first, and so is the gradient of W_in
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    updated = optimizer.update

    def growing(name, grad, hyper):
        updated(name, grad, hyper)
        if name == "mlp_bank":
            model.mlp_bank.data *= grow

    optimizer.update = growing
    optimizer.step(schedule(SETTINGS, number))
    optimizer.update = updated


def e4m3_numbers() -> torch.Tensor:
    """All that are not negative: 4 bits of exponent from 2^-6 on, 3 of mantissa, and below it multiples of 2^-9."""
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)]
    return torch.tensor([m * 2.0**-9 for m in range(8)] + normal[:-1], dtype=torch.float64)


def assert_quantized(eight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | float) -> None:
    """Each number is the nearest there is to x / scale, and the largest where that is larger."""
    exact = (x / scale).abs().clamp(max=448)
    numbers = e4m3_numbers()
    above = torch.searchsorted(numbers, exact)
    nearest = torch.minimum(numbers[above] - exact, exact - numbers[(above - 1).clamp(min=0)])
    assert ((eight.abs() - exact).abs() <= nearest + 1e-6 * exact).all()
    assert (eight * x >= 0).all()


def test_scales_follow_the_weights_and_the_squares_from_step_to_step(squares):
    """Squares have the scale of the pass before, times 1.80; W_out from the 17th step on of the step before, 1.12."""
    model, optimizer = new_run()
    largest_w_out, clipped = [], 0
    for number in range(-1, 22):
        if number >= 0:
            # W_out grows by more than its headroom once, and W_in so far that squares do.
            step(model, optimizer, number, grow=1.5 if number in (9, 19) else 1.0)
        w_in, w_out = model.mlp_bank.data[0 : 2 * LAYERS : 2].double(), model.mlp_bank.data[1 : 2 * LAYERS : 2].double()
        largest_w_out.append(w_out.abs().amax((1, 2)))
        in_scale = w_in.abs().amax((1, 2)) / 448
        torch.testing.assert_close(model.w_in8_scale.double(), in_scale, rtol=1e-6, atol=0)
        assert_quantized(model.w_in8.double(), w_in, in_scale[:, None, None])
        if number >= 16:
            out_scale = 1.12 * largest_w_out[-2] / 448
        else:
            out_scale = largest_w_out[-1].clamp(min=1e-12) / 448
        torch.testing.assert_close(model.w_out8_scale.double(), out_scale, rtol=1e-6, atol=0)
        assert model.w_out8.shape == (LAYERS, 32, 128) and model.w_out8.is_contiguous()
        assert_quantized(model.w_out8.double().mT, w_out, out_scale[:, None, None])
        clipped += (w_out.abs() > 448 * 1.05 * out_scale[:, None, None]).any().item()
    assert clipped == 1  # when it had grown by half, late

    assert len(squares) == 22 * 2 * LAYERS
    before = dict.fromkeys(range(LAYERS), 448 / 1.8)
    clipped = 0
    for place, (scale, post, post8) in enumerate(squares):
        layer = place % LAYERS
        assert scale == pytest.approx(1.8 * before[layer] / 448, rel=1e-6)
        assert_quantized(post8, post, scale)
        clipped += (post8 == 448).any().item()
        before[layer] = post.max().item()
    assert 0 < clipped < len(squares) / 4
    torch.testing.assert_close(model.post_scale, 1.8 / 448 * torch.tensor(list(before.values())))


def state(model: GPT) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name).view(torch.uint8).clone() for name in BUFFERS}


def test_a_run_that_goes_on_from_a_checkpoint_has_the_scales_of_one_that_never_stopped(tmp_path):
    for steps in 3, 19:
        model, optimizer = new_run()
        for number in range(steps):
            step(model, optimizer, number)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.save((weights, optimizer.state_dict()), tmp_path / "checkpoint.pt")
        weights, saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        other, other_optimizer = new_run(seed=1)
        train_gpt.load_weights(other, weights, "")
        other_optimizer.load_state_dict(saved)
        for number in range(steps, steps + 3):
            for name, expected in state(model).items():
                assert torch.equal(state(other)[name], expected), (steps, number, name)
            step(model, optimizer, number)
            step(other, other_optimizer, number)


def test_a_run_goes_on_in_fp8_from_one_without_and_the_other_way_round():
    model, optimizer = new_run(fp8=False)
    step(model, optimizer, 0)
    assert optimizer.state_dict()["scales"] == {} and not set(BUFFERS) & dict(model.named_buffers()).keys()
    other, other_optimizer = new_run()
    step(other, other_optimizer, 0)
    with_scales = other_optimizer.state_dict()
    assert with_scales["scales"].keys() == {"w_out8_scale", "post_scale"}

    fresh, fresh_optimizer = new_run()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    train_gpt.load_weights(fresh, weights, "")
    fresh_optimizer.load_state_dict(optimizer.state_dict())
    largest = model.mlp_bank.detach()[1 : 2 * LAYERS : 2].float().abs().amax((1, 2))
    torch.testing.assert_close(fresh.w_out8_scale, largest / 448)
    assert (fresh.post_scale == 1).all()
    optimizer.load_state_dict(with_scales)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda saved: saved.pop("scales"), "has no scales"),
        (lambda saved: saved["scales"].pop("post_scale"), "has no post_scale"),
        (lambda saved: saved["scales"].update(w_out8_scale=torch.ones(4)), r"w_out8_scale: .* \(4,\), .* \(3,\)"),
    ],
)
def test_scales_that_are_missing_or_of_another_model_are_refused(change, words):
    _, optimizer = new_run()
    saved = optimizer.state_dict()
    change(saved)
    with pytest.raises(UserError, match=words):
        optimizer.load_state_dict(saved)


def test_the_warm_up_leaves_the_scales_as_they_were(squares):
    model, optimizer = new_run()
    step(model, optimizer, 0)
    before, count = state(model), len(squares)
    stages = tuple(replace(stage, batch_tokens=128, windows=(8, 16)) for stage in SETTINGS.stages)
    settings = replace(SETTINGS, stages=stages, extension=replace(stages[-1], steps=1), slices=4, val_seq_len=32)
    train_gpt.warm_up(settings, model, model, optimizer, train_gpt.World(0, 1, torch.device("cpu")))
    assert len({scale for scale, *_ in squares[count:]}) > LAYERS  # they did move
    for name, expected in before.items():
        assert torch.equal(state(model)[name], expected), name


def test_validation_is_in_bf16_and_leaves_the_scales_alone(squares):
    model, optimizer = new_run()
    step(model, optimizer, 0)
    before, count = state(model), len(squares)
    tokens = torch.randint(100, (33,))
    losses = model.evaluate(tokens[:-1], tokens[1:], make_context(MODEL, 32, (8, 16), model.embed))
    plain = GPT(MODEL, torch.bfloat16)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name not in BUFFERS})
    expected = plain.evaluate(tokens[:-1], tokens[1:], make_context(MODEL, 32, (8, 16), model.embed))
    assert torch.equal(losses, expected) and len(squares) == count
    assert all(torch.equal(state(model)[name], value) for name, value in before.items())


RANKS = """
import torch
import torch.distributed as dist
from test_fp8 import SETTINGS, GPT, MODEL, Optimizer

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = GPT(MODEL, torch.bfloat16, shards=2, fp8=True)
own = [[1.0, 5.0, 3.0], [4.0, 2.0, 3.5]][rank]
model.post_scale.copy_(torch.tensor(own))
scales = Optimizer(model, SETTINGS, rank, 2).state_dict()["scales"]
assert model.post_scale.tolist() == own, "a rank's own scales stay"
if rank == 0:
    assert scales["post_scale"].tolist() == [4.0, 5.0, 3.5], "a checkpoint has the largest"
    assert scales["w_out8_scale"].tolist() == [1.0, 1.0, 1.0]
dist.destroy_process_group()
"""


def test_a_checkpoint_has_the_largest_of_the_ranks_scales(tmp_path):
    (tmp_path / "worker.py").write_text(RANKS)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "worker.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_estimate_of_memory_has_the_8_bit_matrices():
    with torch.device("meta"):
        needs = [estimate_gpu_memory(RECORD, GPT(RECORD.model, torch.bfloat16, fp8=fp8), 8) for fp8 in (False, True)]
    assert needs[1] - needs[0] == 11 * 2 * 3072 * 768
