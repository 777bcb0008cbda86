"""The optimizer track, records/optimizer_track/train.py: model, optimizers, schedule, data, its log, and its driver."""

import cmath
import importlib.util
import inspect
import itertools
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
import tune as driver
from command import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "records" / "optimizer_track" / "train.py"


def load_script():
    spec = importlib.util.spec_from_file_location("optimizer_track_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


track = load_script()
SMALL = replace(track.LAPTOP, layers=2, dim=16, head_dim=8, context=16, batch_tokens=64, micro_batch=2, val_tokens=48)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """In an empty folder, --laptop is a small model on two training and two validation shards of random bytes."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, size in {"train_1": 200, "train_2": 101, "val_1": 40, "val_2": 30}.items():
        shards.write_shard(tmp_path / f"{name}.bin", generator.integers(0, 257, size))
    settings = replace(SMALL, train_files="train_*.bin", val_files="val_*.bin", run_id="run", steps=3)
    monkeypatch.setattr(track, "LAPTOP", settings)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield settings
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stream(pattern: str) -> torch.Tensor:
    """All tokens of the shards in the working folder that match a pattern."""
    parts = [np.fromfile(path, "<u2")[512:] for path in sorted(Path().glob(pattern))]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def model_of(settings, dtype=torch.float64):
    torch.manual_seed(settings.seed)
    return track.GPT(settings).to(dtype)


# ---- The model -------------------------------------------------------------------------------------------------------


def normalized(x, gain=None):
    x = x / math.sqrt((x**2).mean() + torch.finfo(x.dtype).eps)
    return x if gain is None else x * gain


def turned(x, position):
    """A head's channels (d,): of the complex numbers x[i] + i x[i + d/2] the first half turns backwards."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half // 2):
        frequency = (1 / 1024) ** (i / (half // 2 - 1))
        z = complex(x[i], x[i + half]) * cmath.exp(-1j * position * frequency)
        out[i], out[i + half] = z.real, z.imag
    return out


@torch.no_grad()
def naive_losses(model, settings, sequence):
    """The cross-entropies of the tokens (T + 1,) but the first, token by token and head by head."""
    p = dict(model.named_parameters())
    x = [normalized(p["embed.weight"][token], p["norm_1.weight"]) for token in sequence[:-1]]
    for i in range(settings.layers):
        prefix = f"blocks.{i}."
        w = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}

        def linear(name, a, w=w):
            return w[f"{name}.weight"] @ a + w[f"{name}.bias"]

        q, k, v = ([linear(name, normalized(a, w["norm_1.weight"])) for a in x] for name in "qkv")
        mixed = []
        for t in range(len(x)):
            heads = []
            for start in range(0, settings.dim, settings.head_dim):
                of_head = slice(start, start + settings.head_dim)
                query = turned(normalized(q[t][of_head]), t)
                scores = [0.12 * query @ turned(normalized(k[s][of_head]), s) for s in range(t + 1)]
                weights = torch.exp(torch.stack(scores)) / torch.exp(torch.stack(scores)).sum()
                heads.append(sum(weight * v[s][of_head] for s, weight in enumerate(weights)))
            mixed.append(torch.cat(heads))
        x = [a + linear("attn_out", b) for a, b in zip(x, mixed)]
        x = [a + linear("mlp_out", linear("mlp_in", normalized(a, w["norm_2.weight"])).clamp(min=0) ** 2) for a in x]
    losses = []
    for a, target in zip(x, sequence[1:]):
        z = p["head.weight"] @ normalized(a, p["norm_2.weight"]) + p["head.bias"]
        z = 15 * z / torch.sqrt(z**2 + 225)
        losses.append(torch.log(torch.exp(z).sum()) - z[target])
    return torch.stack(losses)


def test_losses_equal_a_naive_forward():
    torch.manual_seed(0)
    model = model_of(SMALL)
    for name, p in model.named_parameters():  # far from the start, where much is zero; logits beyond the softcap
        p.data += (3 if name == "head.weight" else 0.3) * torch.randn_like(p)
    tokens = torch.randint(257, (2, 12))
    expected = torch.stack([naive_losses(model, SMALL, sequence) for sequence in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


def test_full_size_has_the_parameters_of_its_description():
    with torch.device("meta"):
        model = track.GPT(track.Settings())
        assert model(torch.zeros(2, 1025, dtype=torch.long)).shape == (2, 1024)
    block = 12 * 768**2 + (3 + 1 + 4 + 1) * 768 + 2 * 768
    assert sum(p.numel() for p in model.parameters()) == 12 * block + (2 * 768 + 1) * 50304 + 2 * 768
    settings = track.Settings()
    assert (settings.context, settings.batch_tokens, settings.head_dim) == (1024, 524_288, 128)
    assert model_of(SMALL).head.out_features == 384


def test_a_model_starts_without_knowing_anything():
    model = model_of(replace(SMALL, dim=96))
    torch.testing.assert_close(
        model(torch.randint(257, (1, 9))), torch.full((1, 8), math.log(384), dtype=torch.float64)
    )
    for name, p in model.named_parameters():
        if name.endswith("bias") or "_out." in name or "head" in name:
            assert not p.any(), name
        elif p.dim() == 2:
            std = 1 if "embed" in name else math.sqrt(1 / 3 / 96)
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (p == 1).all(), name


# ---- The optimizers --------------------------------------------------------------------------------------------------


def matrices(rows: int, columns: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def trained(optimizer, start, gradients, lr, **hyperparameters) -> torch.Tensor:
    """What an optimizer of the track makes of a hidden matrix after these gradients."""
    p = torch.nn.Parameter(start.clone())
    rest = {kind: [torch.nn.Parameter(torch.zeros(2))] for kind in ("embed", "head", "vectors")}
    hidden_optimizer, _ = track.OPTIMIZERS[optimizer]([p], rest, lr=lr, **hyperparameters)
    for gradient in gradients:
        p.grad = gradient.clone()
        hidden_optimizer.step()
    return p.data


def adam_steps(start, gradients, lr, beta1, beta2, eps, decay) -> list[list[float]]:
    """AdamW, number by number."""
    p = start.clone()
    for i, j in itertools.product(*map(range, p.shape)):
        value, mean, square = p[i, j].item(), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = gradient[i, j].item()
            mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
            value -= lr * decay * value
            value -= lr * mean / (1 - beta1**t) / (math.sqrt(square / (1 - beta2**t)) + eps)
        p[i, j] = value
    return p


def test_adamw_equals_its_formula_number_by_number():
    start, *gradients = matrices(3, 4, 5)
    found = trained("adamw", start, gradients, 0.1, weight_decay=0.3, beta1=0.8, beta2=0.9)
    torch.testing.assert_close(found, adam_steps(start, gradients, 0.1, 0.8, 0.9, 1e-8, 0.3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", list(track.OPTIMIZERS))
def test_the_rest_is_adamws_with_a_learning_rate_by_kind(optimizer):
    rest = {kind: [torch.nn.Parameter(start)] for kind, start in zip(("embed", "head", "vectors"), matrices(2, 3, 3))}
    before = {kind: p.detach().clone() for kind, (p,) in rest.items()}
    hidden = [torch.nn.Parameter(*matrices(2, 2, 1))]
    _, optimizer_of_rest = track.OPTIMIZERS[optimizer](hidden, rest, rest_lr=0.5)
    gradients = matrices(2, 3, 3, seed=1)
    for gradient in gradients:
        for (p,) in rest.values():
            p.grad = gradient.clone()
        optimizer_of_rest.step()
    for kind, lr in {"embed": 0.35, "head": 0.002, "vectors": 0.0075}.items():
        expected = adam_steps(before[kind], gradients, lr, 0.8, 0.95, 1e-10, 0.001)
        torch.testing.assert_close(rest[kind][0].data, expected, rtol=1e-12, atol=0, msg=kind)


def nesterov(gradients, momentum):
    """Each step's average of the gradients so far, looked one step ahead."""
    average = torch.zeros_like(gradients[0])
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        yield momentum * average + (1 - momentum) * gradient


@pytest.mark.parametrize("shape", [(4, 4), (8, 3), (3, 8)])
def test_muon_maps_singular_values_by_newton_schulz(shape):
    start, *gradients = matrices(*shape, 5)
    expected = start.clone()
    for u in nesterov(gradients, 0.9):
        left, values, right = torch.linalg.svd(u, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected *= 1 - 0.1 * 0.2
        expected -= 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * left @ torch.diag(values) @ right
    found = trained("muon", start, gradients, 0.1, weight_decay=0.2, momentum=0.9)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # it computes in bfloat16
    assert (found - start).abs().max() > 0.2


@pytest.mark.parametrize("shape", [(4, 4), (8, 3), (3, 8)])
def test_orthogonal_factor_is_that_of_the_svd(shape):
    (matrix,) = matrices(*shape, 1)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(track.orthogonalize(matrix), left @ right, rtol=0, atol=1e-6)
    assert not track.orthogonalize(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(4, 4), (8, 3), (3, 8)])
def test_normuon_evens_out_the_rows_of_the_orthogonal_factor(shape):
    start, *gradients = matrices(*shape, 6)
    expected, squares = start.clone(), [0.0] * shape[0]
    for u in nesterov(gradients, 0.9):
        left, _, right = torch.linalg.svd(u, full_matrices=False)
        orthogonal = left @ right
        rows = []
        for i, row in enumerate(orthogonal):
            squares[i] = 0.7 * squares[i] + 0.3 * sum(value.item() ** 2 for value in row) / shape[1]
            rows.append(row / math.sqrt(squares[i]))
        change = torch.stack(rows)
        change *= math.sqrt(min(shape)) / math.sqrt((change**2).sum())  # an orthogonal factor's norm: one a direction
        expected = expected - 0.1 * 0.2 * expected - 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * change
    found = trained("normuon", start, gradients, 0.1, weight_decay=0.2, momentum=0.9, beta2=0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_normuon_leaves_a_matrix_without_gradient_alone():
    start, _ = matrices(4, 3, 2)
    torch.testing.assert_close(trained("normuon", start, 3 * [0 * start], 0.1, weight_decay=0.0), start)


def test_soap_is_adam_on_the_singular_values_where_gradients_share_their_singular_vectors():
    """Then the eigenvectors of both factors are known without computing them, and no step turns them."""
    start, left, right = matrices(4, 4, 3)
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    sizes = [torch.diag(3 * row.abs() + 0.1) for row in matrices(7, 4, 1)[0]]
    gradients = [left @ size @ right.T for size in sizes]
    found = trained("soap", start, gradients, 0.1, weight_decay=0.0, beta1=0.8, beta2=0.9, eps=1e-3, frequency=2)
    # The first gradient only begins the basis.
    adam = adam_steps(torch.zeros(4, 4, dtype=torch.float64), sizes[1:], 0.1, 0.8, 0.9, 1e-3, 0.0)
    torch.testing.assert_close(found, start + left @ adam @ right.T, rtol=0, atol=1e-9)


def gram_schmidt(vectors):
    """An orthonormal basis: each column less its part in those before it, twice for accuracy, to length 1."""
    basis = []
    for column in vectors.T:
        for other in 2 * basis:
            column = column - (other @ column) * other
        basis.append(column / np.sqrt(column @ column))
    return np.stack(basis, axis=1)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4)])
def test_soap_equals_the_papers_algorithm(shape):
    """Against the algorithm in NumPy, with Gram-Schmidt for QR, for gradients of any kind."""
    start, *gradients = matrices(*shape, 10)
    p, first, *later = (each.numpy() for each in (start, *gradients))
    left, right = 0.1 * first @ first.T, 0.1 * first.T @ first
    rows, columns = (np.linalg.eigh(factor)[1][:, ::-1] for factor in (left, right))
    p, mean, square = p * (1 - 0.1 * 0.2), np.zeros(shape), np.zeros(shape)
    for t, g in enumerate(later, 1):
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * (rows.T @ g @ columns) ** 2
        adam = (rows.T @ mean @ columns) / (1 - 0.8**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3)
        p = p * (1 - 0.1 * 0.2) - 0.1 * rows @ adam @ columns.T
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if t % 3 == 0:
            rows, columns = gram_schmidt(left @ rows), gram_schmidt(right @ columns)
    found = trained("soap", start, gradients, 0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-3, frequency=3)
    torch.testing.assert_close(found, torch.from_numpy(p), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4)])
@pytest.mark.parametrize("floor", [0.0, 0.9])
def test_soap_muon_orthogonalizes_soaps_scaled_momentum(shape, floor):
    """Against NumPy, with the SVD; its rows have their floor, and only what it brings closer to 0 decays."""
    start, *gradients = matrices(*shape, 7)
    p, first, *later = (each.numpy() for each in (start, *gradients))
    left, right = 0.1 * first @ first.T, 0.1 * first.T @ first
    rows, columns = (np.linalg.eigh(factor)[1][:, ::-1] for factor in (left, right))
    average, square = np.zeros(shape), np.zeros(shape)
    raised = spared = 0
    for t, g in enumerate(later, 1):
        average = 0.8 * average + 0.2 * g
        square = 0.9 * square + 0.1 * (rows.T @ g @ columns) ** 2
        ahead = rows.T @ (0.8 * average + 0.2 * g) @ columns
        u, _, v = np.linalg.svd(ahead / (np.sqrt(square / (1 - 0.9**t)) + 1e-3), full_matrices=False)
        change = rows @ u @ v @ columns.T * math.sqrt(max(1, shape[0] / shape[1]))
        for i, row in enumerate(change):
            size, least = math.sqrt((row**2).sum()), floor * math.sqrt((p[i] ** 2).sum())
            if size < least:
                change[i], raised = row * least / size, raised + 1
        smaller = np.sign(change) == np.sign(p)
        spared += (~smaller).sum()
        p = p - 0.1 * 0.2 * np.where(smaller, p, 0) - 0.1 * change
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if t % 2 == 0:
            rows, columns = gram_schmidt(left @ rows), gram_schmidt(right @ columns)
    options = {"weight_decay": 0.2, "momentum": 0.8, "beta2": 0.9, "eps": 1e-3, "frequency": 2, "floor": floor}
    found = trained("soap_muon", start, gradients, 0.1, **options)
    torch.testing.assert_close(found, torch.from_numpy(p), rtol=0, atol=1e-5)
    assert spared > 0 and (raised > 0) == (floor > 0)


def test_ema_nesterov_takes_gradients_ahead_of_the_weights_and_ends_where_they_are():
    """x is where the weights are, m the mean of their moves; the gradient is taken at y."""
    start, *gradients = matrices(4, 3, 7)
    base = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "beta2": 0.7}
    rest = {kind: [torch.nn.Parameter(torch.zeros(2))] for kind in ("embed", "head", "vectors")}
    p, y = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine, _ = track.ema_nesterov([p], rest, **base, ahead=0.5, memory=0.8)
    normuon, _ = track.normuon([y], rest, **base)
    for each in (mine, normuon):
        each.param_groups[0]["initial_lr"] = 0.1
    x, m = start.clone(), torch.zeros_like(start)
    for step, gradient in enumerate(gradients):
        factor = [1, 1, 0.75, 0.5, 0.25, 0.0][step]
        for each, parameter in ((mine, p), (normuon, y)):
            each.param_groups[0]["lr"] = 0.1 * factor
            parameter.grad = gradient.clone()
            each.step()
        m = 0.8 * m + 0.2 * (y.data - x)
        x = y.data.clone()
        y.data += 0.5 * factor * m
        torch.testing.assert_close(p.data, y.data, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.data, x)
    assert m.norm() > 0.01


def test_soaps_basis_comes_to_the_eigenvectors_of_its_factors():
    start, axes, *noise = matrices(4, 4, 402)
    scale = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    p = torch.nn.Parameter(start)
    rest = {kind: [torch.nn.Parameter(torch.zeros(2))] for kind in ("embed", "head", "vectors")}
    optimizer, _ = track.soap([p], rest, beta2=0.99, frequency=1)
    for gradient in noise:
        p.grad = torch.linalg.qr(axes).Q @ (scale[:, None] * gradient)
        optimizer.step()
    state = optimizer.state[p]
    rotated = state["rows"].T @ state["left"] @ state["rows"]
    assert (rotated - torch.diag(rotated.diag())).norm() < 0.05 * rotated.norm()
    torch.testing.assert_close(
        rotated.diag(), torch.linalg.eigvalsh(state["left"]).flip(0), rtol=0.05, atol=0
    )  # largest first


def test_soap_waits_for_the_first_gradient_that_is_not_zero():
    start, first, second = matrices(3, 3, 3)
    for gradients in ([0 * first, 0 * first], [0 * first, first]):
        torch.testing.assert_close(trained("soap", start, gradients, 0.1, weight_decay=0.0), start)
    moved = trained("soap", start, [first, second], 0.1, weight_decay=0.0)
    torch.testing.assert_close(trained("soap", start, [0 * first, first, second], 0.1, weight_decay=0.0), moved)
    assert (moved - start).abs().max() > 0.01


def test_hidden_matrices_are_the_blocks_weights_and_the_rest_is_sorted_by_kind(monkeypatch):
    seen = []

    def spy(hidden, rest):
        seen.extend([hidden, rest])
        return [torch.optim.SGD([*hidden, *itertools.chain(*rest.values())], lr=1.0)]

    monkeypatch.setitem(track.OPTIMIZERS, "spy", spy)
    model = model_of(SMALL)
    model.make_optimizers(replace(SMALL, optimizer="spy"))
    names = {p: name for name, p in model.named_parameters()}
    hidden, rest = seen
    layers = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
    assert [names[p] for p in hidden] == [f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers]
    assert [names[p] for p in rest["embed"] + rest["head"]] == ["embed.weight", "head.weight"]
    others = {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert {names[p] for p in rest["vectors"]} == others and len(rest["vectors"]) == len(others) == 2 * 8 + 3


@pytest.mark.parametrize("spoil", [lambda hidden, rest: hidden, lambda hidden, rest: hidden + rest["head"]])
def test_an_optimizer_that_forgets_parameters_is_a_mistake(spoil, small, monkeypatch, capsys):
    monkeypatch.setitem(track.OPTIMIZERS, "mine", lambda hidden, rest: [torch.optim.SGD(spoil(hidden, rest), lr=1.0)])
    assert track.main(["--laptop", "--optimizer", "mine"]) == 2
    assert "mine" in capsys.readouterr().err and not Path("logs").exists()


# ---- Schedule and data -----------------------------------------------------------------------------------------------


def test_learning_rate_rises_stays_and_falls():
    settings = replace(SMALL, steps=100, warmup=0.1, cooldown=0.4)
    points = {0: 0.1, 4: 0.5, 9: 1, 10: 1, 60: 1, 61: 39 / 40, 80: 0.5, 99: 1 / 40}
    for step, factor in points.items():
        assert settings.lr_factor(step) == pytest.approx(factor, rel=1e-12), step
    constant = replace(SMALL, steps=7, warmup=0.0, cooldown=0.0)
    assert [constant.lr_factor(step) for step in range(7)] == 7 * [1]


def test_every_group_of_every_optimizer_follows_the_schedule(small, monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])

    def two_groups(hidden, rest):
        others = list(itertools.chain(*rest.values()))
        return [Spy([{"params": hidden}, {"params": others[:1], "lr": 10.0}], lr=2.0), Spy(others[1:], lr=3.0)]

    monkeypatch.setitem(track.OPTIMIZERS, "mine", two_groups)
    arguments = ["--laptop", "--optimizer", "mine", "--steps", "4", "--warmup", "0.5", "--cooldown", "0.5"]
    assert track.main(arguments) == 0
    assert rates == [each for f in (0.5, 1.0, 1.0, 0.5) for each in ([2 * f, 10 * f], [3 * f])]


def test_data_and_their_order_depend_on_neither_seed_nor_optimizer(small, monkeypatch):
    read, original = [], track.mean_loss

    def spy(model, tokens, *rest):
        read.append((torch.is_grad_enabled(), tokens.tolist()))
        return original(model, tokens, *rest)

    monkeypatch.setattr(track, "mean_loss", spy)
    train, val = stream("train_*.bin").tolist(), stream("val_*.bin").tolist()
    expected = [(False, val[:49])] + [(True, train[64 * s : 64 * s + 65]) for s in range(4)] + [(False, val[:49])]
    for seed, optimizer in [(1, "muon"), (2, "muon"), (1, "adamw"), (3, "soap")]:
        options = ["--optimizer", optimizer, "--seed", str(seed), "--run-id", f"{optimizer}-{seed}", "--steps", "4"]
        assert track.main(["--laptop", *options]) == 0
        assert read == expected
        read.clear()


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(micro_batch):
    tokens = torch.randint(257, (65,), generator=torch.Generator().manual_seed(0))
    model, reference = model_of(SMALL), model_of(SMALL)
    for p, q in zip(model.parameters(), reference.parameters()):
        p.data += 0.3 * torch.randn_like(p)
        q.data.copy_(p)
    expected = reference(torch.stack([tokens[start : start + 17] for start in (0, 16, 32, 48)])).mean()
    expected.backward()
    settings = replace(SMALL, micro_batch=micro_batch)
    loss = track.mean_loss(model, tokens.to(torch.uint16), settings, torch.device("cpu"))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# ---- The command line and the log ------------------------------------------------------------------------------------


def log_lines(name: str = "run") -> list[str]:
    return Path(f"logs/{name}.txt").read_text().rpartition("=" * 100 + "\n")[2].splitlines()


@pytest.mark.parametrize("optimizer", list(track.OPTIMIZERS))
def test_every_optimizer_learns_and_writes_a_log_that_the_logbook_reads(optimizer, small, capsys):
    arguments = ["--laptop", "--optimizer", optimizer, "--steps", "4", "--val-every", "2", "--target", "5.95"]
    assert track.main(arguments) == 0
    log = logbook.read_log("logs/run.txt")
    assert not log.problems and not log.notes
    (run,) = log.runs
    assert (run.total_steps, run.final_step, list(run.steps)) == (4, 4, [0, 2, 4])
    assert run.flaw() is None and run.train_time_ms > 0 and run.peak_memory_mib > 0 and run.hardware
    assert run.losses[0] == pytest.approx(math.log(384), abs=1e-4) and run.losses[-1] < run.losses[0]
    reached = next(step for step, loss in zip(run.steps, run.losses) if loss <= 5.95)
    assert log_lines()[-2] == f"target 5.95: first reached at step {reached}"
    for command in (["show", "logs/run.txt"], ["extract", "logs/run.txt", "--out", "script.py"]):
        parsed = logbook.command_line().parse_args(command)
        assert parsed.command(parsed) == 0
    assert re.search(r"logs/run\.txt +4/4 +\d\.\d{4} +[\d,]+ ms", capsys.readouterr().out)
    assert Path("script.py").read_bytes() == SCRIPT.read_bytes()


def test_log_has_the_hyperparameters(small):
    options = ["--optimizer=soap", "--lr", "0.01", "--frequency", "3", "--cooldown", "0.5", "--steps", "1"]
    assert track.main(["--laptop", *options]) == 0
    settings = json.loads(re.search(r"\nsettings: (.*)", Path("logs/run.txt").read_text())[1])
    assert (settings["optimizer"], settings["cooldown"], settings["preset"]) == ("soap", 0.5, "laptop")
    expected = {"lr": 0.01, "frequency": 3, "beta1": 0.95, "eps": 1e-8}
    assert expected.items() <= settings["hyperparameters"].items()


def test_seed_changes_the_weights_and_nothing_is_left_to_chance(small):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert track.main(["--laptop", "--seed", str(seed), "--run-id", name]) == 0
    a, b, c = ([line.partition(" train_time")[0] for line in log_lines(name)[:-1]] for name in "abc")
    assert a == b != c


def test_a_new_optimizer_is_the_readmes_function_and_command(tmp_path):
    """The example of the README, put into a copy of the script, runs at laptop scale by the README's command."""
    readme = SCRIPT.with_name("README.md").read_text()
    function = re.search(r"```python\n(@optimizer\n.*?)```", readme, re.DOTALL)[1]
    *_, command = re.findall(r"^python records/optimizer_track/train\.py (.*--optimizer mine.*)$", readme, re.MULTILINE)
    before, banner, after = SCRIPT.read_text().partition("def setting(")
    (tmp_path / "edited.py").write_text(f"{before}{function}\n\n{banner}{after}")
    generator = np.random.default_rng(0)
    for name, size in (("train", 8193), ("val", 257)):
        shards.write_shard(tmp_path / f"{name}.bin", generator.integers(0, 257, size))
    options = ["--steps", "2", "--train-files", "train.bin", "--val-files", "val.bin", "--val-tokens", "256"]
    done = subprocess.run(
        [sys.executable, "edited.py", *command.split(), *options, "--run-id", "run"],
        **{"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    (run,) = logbook.read_log(str(tmp_path / "logs" / "run.txt")).runs
    assert run.flaw() is None and run.final_step == 2
    text = (tmp_path / "logs" / "run.txt").read_text()
    assert re.search(r'"hyperparameters": {"lr": 0.01,', text) and '"optimizer": "mine"' in text


def test_run_outlives_its_reader(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (("train", 8193), ("val", 257)):
        shards.write_shard(tmp_path / f"{name}.bin", generator.integers(0, 257, size))
    options = ["--steps", "2", "--train-files", "train.bin", "--val-files", "val.bin", "--val-tokens", "256"]
    command = [sys.executable, SCRIPT, "--laptop", *options, "--run-id", "alone"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "logs" / "alone.txt").read_text().splitlines()[-1].startswith("peak memory")


def test_loss_that_is_not_finite_ends_the_run_with_status_3(small):
    assert track.main(["--laptop", "--optimizer", "adamw", "--lr", "1e38"]) == 3
    assert re.fullmatch(r"loss is not finite: step \d", log_lines()[-1])


def test_signal_leaves_a_whole_log(small, monkeypatch):
    original = track.mean_loss

    def interrupted(*arguments):
        if len(log_lines()) == 2:  # the validation and the first step are done
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(track, "mean_loss", interrupted)
    assert track.main(["--laptop"]) == 128 + signal.SIGTERM
    assert log_lines()[-2].startswith("step:2/3 train_loss:") and log_lines()[-1] == "stopped by a signal after step 2"


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
        (None, ["--steps", "5"], ["train_*.bin", "301", "321", "python data/embedded.py"]),
        (None, ["--steps", "0"], ["at least 1"]),
        (None, ["--val-tokens", "80"], ["val_*.bin", "70", "81"]),
        (None, ["--val-tokens", "40"], ["--val-tokens", "16"]),
        (None, ["--optimizer", "best"], ["--optimizer", "best", "normuon"]),
        (None, ["--frequency", "9"], ["--frequency", "muon"]),
        (None, ["--lr", "fast"], ["--lr", "fast"]),
    ],
)
def test_mistakes_get_one_line_and_leave_no_log(spoil, arguments, words, small, capsys):
    if spoil:
        spoil()
    assert track.main(["--laptop", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and all(word in line for word in words), line
    assert not Path("logs").exists()


# ---- The driver ------------------------------------------------------------------------------------------------------

GRIDS = {
    "adamw": {"lr": (0.001, 0.002, 0.004), "beta2": (0.9, 0.95)},
    "muon": {"lr": (0.01, 0.02, 0.04), "momentum": (0.9, 0.95, 0.98)},
}
NEEDED = {"adamw": 740, "muon": 410}  # steps to a loss of 1.5


def write_log(path: Path, loss: float, steps: int, total: int) -> None:
    timing = "train_time:10ms step_avg:1.00ms"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(
        f"{'=' * 100}\n{'=' * 100}\nstep:{steps}/{total} val_loss:{loss:.4f} {timing}\n"
    )
    path.with_suffix(".part").rename(path)  # at once, as the driver's logs come


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """The driver, with grids of its own and a formula in place of training; returns the names of the logs it made."""
    made = []

    def train(path, script, options, alone):
        settings = track.parse_arguments(options)
        assert script == "records/optimizer_track/train.py" and settings.preset == "laptop"
        values, name = settings.hyperparameters, settings.optimizer
        far = abs(math.log2(values["lr"] / (0.02 if name == "muon" else 0.004)))
        far += abs(values["momentum" if name == "muon" else "beta2"] - 0.95)
        noise = 0.001 * (0, -1.5, -0.5, 0.5, 1.5, 0)[settings.seed]
        made.append(path.name)
        write_log(
            path, 1.5 + 0.1 * far + 0.001 * (NEEDED[name] - settings.steps) + noise, settings.steps, settings.steps
        )

    readme = tmp_path / "README.md"
    readme.write_text(SCRIPT.with_name("README.md").read_text())
    ladder = range(200, 1201, 25)
    values = {"train": train, "GRIDS": GRIDS, "LADDER": ladder, "OUT": tmp_path / "laptop", "README": readme}
    for name, value in values.items():
        monkeypatch.setattr(driver, name, value)
    for section in "grid", "runs":
        driver.put_section(readme, section, "Not measured yet.\n")
    return made


def drive(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, arguments)])
    driver.main()


def test_grid_marks_the_best_point_and_the_edge(laptop, tmp_path, monkeypatch):
    drive(monkeypatch, "grid", "--grid-steps", 400)
    assert len(laptop) == len(set(laptop)) == 6 + 9
    text = (tmp_path / "README.md").read_text()
    # 1.5 + 0.001 * (740 - 400) at the best point of AdamW, 0.1 * 0.05 more beside it.
    assert "| lr | beta2 0.9 | beta2 0.95 |\n|---|---|---|\n" in text and "\n| 0.004 | 1.8450 | **1.8400** |\n" in text
    assert "\nBest: lr 0.004, beta2 0.95, on the grid's edge in lr and beta2.\n" in text
    assert "\n| 0.02 | 1.5150 | **1.5100** | 1.5130 |\n" in text
    assert "\nBest: lr 0.02, momentum 0.95, inside the grid.\n" in text
    assert text.count("Not measured yet.") == 1  # the runs


def test_grid_goes_on_where_it_was_cut_off(laptop, tmp_path, monkeypatch):
    drive(monkeypatch, "grid", "--grid-steps", 400)
    text, names = (tmp_path / "README.md").read_text(), sorted(laptop)  # six of AdamW, nine of Muon
    (tmp_path / "laptop" / names[3]).unlink()
    write_log(tmp_path / "laptop" / names[7], 1.0, steps=100, total=400)
    assert "**adamw**, 400 steps" in driver.grid_table("adamw", 400)
    assert "; 1 points to come." in driver.grid_table("adamw", 400)
    laptop.clear()
    drive(monkeypatch, "grid", "--grid-steps", 400)
    assert set(laptop) == {names[3], names[7]} and (tmp_path / "README.md").read_text() == text


def test_runs_find_the_fewest_steps_and_count_other_seeds(laptop, tmp_path, monkeypatch):
    drive(monkeypatch, "runs", "--target", 1.5, "--grid-steps", 400, "--seeds", 4)
    # Seed 0 reaches the target from 750 steps on, a margin of 0.010. The others' mean is the same, their deviation
    # 0.001 * sqrt((2 * 1.5^2 + 2 * 0.5^2) / 3) = 0.00129: t = -0.010 / (0.00129 / 2) = -15.5, of 3 degrees of freedom.
    text = (tmp_path / "README.md").read_text()
    assert "\n| adamw | lr 0.004, beta2 0.95 | 750 | 4 | 1.4900 | 0.0013 | 0.0003 |\n" in text
    assert "\n| muon | lr 0.02, momentum 0.95 | 425 | 4 | 1.4850 | 0.0013 | 8.7e-05 |\n" in text
    assert "Not measured yet." not in text and "Target: 1.5 nats per byte." in text
    laptop.clear()
    drive(monkeypatch, "runs", "--target", 1.5, "--grid-steps", 400, "--seeds", 4)
    assert laptop == [] and (tmp_path / "README.md").read_text() == text


def test_runs_that_are_not_significant_take_more_steps(laptop, tmp_path, monkeypatch):
    """Just at 750 steps the mean is the target: no p < 0.01 there, whatever seed 0 says."""
    drive(monkeypatch, "runs", "--target", 1.49, "--grid-steps", 400, "--seeds", 4)
    text = (tmp_path / "README.md").read_text()
    assert "\n| adamw | lr 0.004, beta2 0.95 | 775 | 4 | 1.4650 |" in text
    assert sum("steps-750_seed" in name and name.startswith("adamw") for name in laptop) == 1 + 4
    drive(monkeypatch, "runs", "--target", 0.5, "--grid-steps", 400, "--seeds", 4)
    text = (tmp_path / "README.md").read_text()
    assert "\n| muon | lr 0.02, momentum 0.95 | more than 1200 | - | - | - | - |\n" in text


def test_runs_need_a_target(laptop, monkeypatch):
    for arguments in (["runs"], ["runs", "--target", 1.5, "--seeds", 1]):
        with pytest.raises(UserError) as end:
            drive(monkeypatch, *arguments)
        assert "--target" in str(end.value) and laptop == []


def test_every_grid_is_of_an_optimizer_and_its_hyperparameters():
    assert list(driver.GRIDS) == list(track.OPTIMIZERS)
    for name, axes in driver.GRIDS.items():
        assert set(axes) <= set(inspect.signature(track.OPTIMIZERS[name]).parameters)
        assert len(axes) == 2 and all(len(values) >= 3 and sorted(values) == list(values) for values in axes.values())
