"""The optimizer against float64 computations written from the recipe: SVDs, loops over matrices, plain Adam."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt as program
from recipe import MINI, RECORD
from train_gpt import (
    GPT,
    Layer,
    ModelConfig,
    Optimizer,
    join_float32,
    normuon_update,
    parameter_table,
    polar_express,
    schedule,
    split_float32,
)

# Polar Express: (a, b, c) of the five steps.
POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Adam's table: betas, learning rate x, weight decay x, whether ranks share the update out.
ADAM = {
    "lm_head": ((0.5, 0.95), 1, 150, True),
    "embed": ((0.5, 0.95), 1, 150, True),
    "value_embeds": ((0.75, 0.95), 75, 5, True),
    "resid_lambdas": ((0.9, 0.95), 5, 0, False),
    "post_lambdas": ((0.9, 0.95), 1, 0, False),
    "x0_lambdas": ((0.9, 0.95), 1, 0, False),
    "qkv_lambdas": ((0.9, 0.99), 5, 0, False),
    "out_lambdas": ((0.9, 0.99), 5, 0, False),
    "value_gates": ((0.9, 0.99), 1, 1, False),
    "bigram_table": ((0.75, 0.95), 75, 5, True),
    "bigram_lambdas": ((0.9, 0.95), 1, 0, False),
    "xsa_alphas": ((0.9, 0.95), 1, 0, False),
    "smear_lambda": ((0.9, 0.99), 5, 0, False),
    "skip_lambda": ((0.9, 0.99), 5, 0, False),
    "smear_gate": ((0.9, 0.99), 0.01, 0, False),
    "skip_gate": ((0.9, 0.99), 0.05, 0, False),
    "attention_gates": ((0.9, 0.99), 1, 1, False),
    "mudd_w1": ((0.9, 0.99), 0.25, 1, False),
    "mudd_w2": ((0.9, 0.99), 0.25, 1, False),
    "mudd_bias": ((0.9, 0.99), 0.25, 0, False),
    "gates_w1": ((0.9, 0.99), 0.1, 1, False),
    "gates_w2": ((0.9, 0.99), 0.1, 1, False),
    "gates_bias": ((0.9, 0.99), 0.1, 0, False),
    "gates_scale": ((0.9, 0.99), 0.1, 0, False),
}

BANKS = ("qk_bank", "vo_bank", "mlp_bank")

# Banks of every shape that matters: qk_bank's matrices are wide, vo_bank's square, mlp_bank's tall; with 5 shards each
# bank ends in padding.
MODEL = ModelConfig(
    layers=(
        Layer(value_embeds=0, attention_gate=True),
        Layer(attention=False, skip=0),
        Layer(window="long", value_embeds=1, xsa=True, mudd=(0, 1, 1)),
    ),
    vocab_size=100,
    bos_id=99,
    dim=32,
    heads=4,
    bigram_rows=2,
    bigram_dim=16,
)


def settings_and_model(preset=MINI, dtype=torch.float32, shards=1, **changes):
    """Settings and a model in which no parameter is zero, except for the padding of the banks."""
    torch.manual_seed(0)
    model = GPT(MODEL, dtype, shards)
    with torch.no_grad():
        for name, p in model.named_parameters():
            padding = p.flatten(1).abs().sum(1) == 0 if name in BANKS else torch.zeros(len(p), dtype=torch.bool)
            if name == "mlp_bank":
                padding[:6] = False  # MLP-out starts at zero
            p.add_(0.5 * torch.randn(p.shape))
            p[padding] = 0
    return replace(preset, model=MODEL, **changes), model


def float64(tensor):
    return tensor.detach().double().numpy().copy()


# ----------------------------------------------------------------------------------------------------------------------
# Polar Express
# ----------------------------------------------------------------------------------------------------------------------


def composed(x):
    for a, b, c in POLYNOMIALS:
        x = a * x + b * x**3 + c * x**5
    return x


def orthogonalized(u):
    """U f(S) V^T of the SVD of u (rows, cols), normalized, in float64."""
    left, values, right = np.linalg.svd(u / (1.02 * np.linalg.norm(u) + 1e-6), full_matrices=False)
    values[values < 1e-12] = 0  # what float64 leaves of a zero
    output = left * composed(values) @ right
    output[abs(output) < 1e-12] = 0  # and here
    return output


def matrix(shape, values, seed=0):
    """A float64 matrix of this shape with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return left * np.asarray(values) @ right.T


SHAPES = [(48, 48), (24, 96), (96, 24), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_takes_singular_values_through_the_five_polynomials(shape):
    n = min(shape)
    rng = np.random.default_rng(0)
    inputs = [
        rng.standard_normal(shape),
        matrix(shape, np.geomspace(1, 1e-4, n)),
        matrix(shape, np.linspace(1, 0.5, n)) * 1e4,  # neither size
        matrix(shape, np.linspace(1, 0.5, n)) * 1e-5,  # nor the smallness that the 1e-6 sees
        matrix(shape, [1.0] * ((n + 1) // 2)),  # half the rank
        np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])),
    ]
    inputs = [u.astype(np.float32) for u in inputs]
    outputs = polar_express(torch.from_numpy(np.stack(inputs)), torch.float32)
    assert outputs.dtype == torch.float32
    for u, output in zip(inputs, float64(outputs), strict=True):
        expected = orthogonalized(u.astype(np.float64))
        assert np.linalg.norm(output - expected) <= 3e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24), (8, 40)])
def test_polar_express_in_bfloat16_is_within_a_tenth_on_well_conditioned_matrices(shape):
    inputs = [matrix(shape, np.linspace(1, 0.3, min(shape)), seed).astype(np.float32) for seed in range(4)]
    outputs = polar_express(torch.from_numpy(np.stack(inputs)), torch.bfloat16)
    assert outputs.dtype == torch.bfloat16
    for u, output in zip(inputs, float64(outputs), strict=True):
        expected = orthogonalized(u.astype(np.float64))
        assert np.linalg.norm(output - expected) <= 0.1 * np.linalg.norm(expected)
        assert np.linalg.svd(output, compute_uv=False).max() <= 1.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-3, 1e-5])
def test_polar_express_brings_singular_values_above_a_thousandth_close_to_1(shape, smallest):
    u = matrix(shape, np.geomspace(1, smallest, min(shape)))
    output = float64(polar_express(torch.from_numpy(u.astype(np.float32))[None], torch.float32)[0])
    assert np.linalg.svd(output, compute_uv=False).max() <= 1.2
    left, values, right = np.linalg.svd(u / (1.02 * np.linalg.norm(u)), full_matrices=False)
    new = np.einsum("ik,ij,kj->k", left, output, right)
    assert ((new >= 0.8) & (new <= 1.2))[values >= 1e-3].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (256, 128)])
def test_six_steps_of_polar_express_bring_singular_values_above_three_thousandths_to_0997_to_1010(shape, dtype):
    """Five steps, to between 0.858 and 1.142, and they use up all of it.

    In bf16 to within two roundings; which way these go is the machine's own.
    """
    slack = 2**-8 if dtype == torch.bfloat16 else 0
    u = matrix(shape, np.geomspace(1, 1e-3, min(shape)))
    left, values, right = np.linalg.svd(u / (1.02 * np.linalg.norm(u)), full_matrices=False)
    assert values[0] > 0.2 and sum(values < 3e-3) > 5
    new = {}
    for count, steps in program.POLAR_EXPRESS.items():
        output = float64(polar_express(torch.from_numpy(u.astype(np.float32))[None], dtype, steps=steps)[0])
        new[count] = np.einsum("ik,ij,kj->k", left, output, right)[values >= 3e-3]
    assert 0.858 - slack <= new[5].min() < 0.88 and 1.12 < new[5].max() <= 1.142 + slack
    assert 0.997 - slack <= new[6].min() < new[6].max() <= 1.010 + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_express_of_zero_is_zero(dtype):
    for shape in SHAPES:
        assert torch.equal(polar_express(torch.zeros(2, *shape), dtype), torch.zeros(2, *shape, dtype=dtype))


# ----------------------------------------------------------------------------------------------------------------------
# bfloat16 weights and the sixteen bits that they lose
# ----------------------------------------------------------------------------------------------------------------------


def bits(tensor):
    """A float32 or bfloat16 tensor's bits, as unsigned integers."""
    if tensor.dtype == torch.float32:
        return tensor.numpy().view(np.uint32)
    return tensor.view(torch.int16).numpy().view(np.uint16)


def test_float32_is_split_into_its_truncated_upper_half_and_the_rest_and_comes_back():
    special = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x00000001]
    special += [0x807FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F7FFFFF, 0x3F80FFFF, 0xBF808000, 0xBF807FFF]
    patterns = np.concatenate((special, np.random.default_rng(0).integers(0, 2**32, 100_000))).astype(np.uint32)
    top, low = split_float32(torch.from_numpy(patterns.view(np.float32)))
    assert (top.dtype, low.dtype) == (torch.bfloat16, torch.uint16)
    assert (bits(top) == patterns >> 16).all()
    assert (low.numpy() == patterns & 0xFFFF).all()
    assert (bits(join_float32(top, low)) == patterns).all()


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_bfloat16_weights_with_their_lost_bits_move_like_float32_ones_bit_for_bit_over_1000_steps(shape, monkeypatch):
    # The precision of Polar Express follows the weights'; here it is float32 for both, so that both get the same u.
    monkeypatch.setattr(program, "polar_express", lambda u, dtype, *how: polar_express(u, torch.float32, *how))
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, *shape, generator=generator)
    top, low = split_float32(exact)
    top, low = top.clone(), low.clone()
    rows, cols = shape
    states = [(torch.zeros(2, *shape), torch.zeros(2, *((rows, 1) if rows >= cols else (1, cols)))) for _ in range(2)]
    numbers = (torch.full((2, 1, 1), 2.0), *map(torch.tensor, (0.023, 1.2, 0.95, 0.9)))
    start = exact.clone()
    for step in range(1000):
        grad = torch.randn(2, *shape, generator=generator).bfloat16()
        normuon_update(exact, grad, *numbers, *states[0])
        normuon_update(top, grad, *numbers, *states[1], low)
        if step % 100 == 99:
            assert (bits(top) == bits(exact) >> 16).all()
            assert (low.numpy() == bits(exact) & 0xFFFF).all()
    assert (exact - start).abs().min() > 0
    assert len(np.unique(low.numpy())) > len(low.flatten()) / 2  # the low halves are in use


# ----------------------------------------------------------------------------------------------------------------------
# NorMuon
# ----------------------------------------------------------------------------------------------------------------------


class NorMuonInFloat64:
    """One matrix, one step after another, as the recipe has it."""

    def __init__(self, p, factor, slow=(0.0, 0.0)):
        self.p, self.factor = p, factor
        self.momentum = np.zeros_like(p)
        self.grads, self.slow = [], slow  # all gradients so far; the slow momentum, and its weight
        self.mean_sq = 0.0
        self.smallest = np.full_like(p, np.inf)  # of |u| so far: where it is ~0, rounding decides on the decay
        self.decayed = np.zeros_like(p, dtype=int)

    def step(self, grad, lr, wd, mu, beta2):
        self.momentum = mu * self.momentum + (1 - mu) * grad
        self.grads.append(grad)
        slow_mu, slow_weight = self.slow
        ages = range(len(self.grads) - 1, -1, -1)
        slow = sum((1 - slow_mu) * slow_mu**age * grad for age, grad in zip(ages, self.grads, strict=True))
        u = orthogonalized((1 - mu) * grad + mu * self.momentum + slow_weight * slow)
        rows, cols = u.shape
        length = np.linalg.norm(u)
        self.mean_sq = beta2 * self.mean_sq + (1 - beta2) * (u**2).mean(axis=1 if rows >= cols else 0, keepdims=True)
        u = u / np.sqrt(np.maximum(self.mean_sq, 1e-10))
        if length:
            u *= length / np.linalg.norm(u)
        decays = u * self.p >= 0
        self.p = self.p - self.factor * lr * (lr * wd) * self.p * decays - self.factor * lr * u
        self.smallest = np.where(u == 0, self.smallest, np.minimum(self.smallest, abs(u)))
        self.decayed += decays

    def assert_equals(self, p, start):
        """`p` has made the same way from `start`, to a thousandth, wherever no sign was a matter of rounding."""
        sure = self.smallest > 1e-2 * abs(self.smallest[np.isfinite(self.smallest)]).mean()
        assert sure.mean() > 0.9
        assert abs(p - self.p)[sure].max() <= 1e-3 * abs(self.p - start).mean()


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_normuon_equals_a_float64_computation_over_several_steps(shape):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, *shape))
    p = torch.from_numpy(start).float()
    factors = (1.0, 2.0, 3.0)
    references = [NorMuonInFloat64(float64(each), factor) for each, factor in zip(p, factors, strict=True)]
    rows, cols = shape
    state = (torch.zeros(3, *shape), torch.zeros(3, *((rows, 1) if rows >= cols else (1, cols))))
    # Rates differ from step to step; the weight decay is strong enough to be seen beside the update.
    for step, (lr, wd, mu) in enumerate([(0.05, 9.0, 0.85), (0.03, 8.0, 0.9), (0.04, 7.0, 0.95), (0.02, 6.0, 0.9)] * 2):
        grad = rng.standard_normal((3, *shape)) * 10.0 ** (step % 3 - 1)
        grad[:, 0] = 0  # an output that got no gradient: u is 0, and its weights decay
        grad[:, 1] *= 100  # one that gets most of it, which variance reduction levels
        numbers = map(torch.tensor, (lr, wd, mu, 0.9))
        normuon_update(p, torch.from_numpy(grad).float(), torch.tensor(factors)[:, None, None], *numbers, *state)
        for reference, g in zip(references, grad.astype(np.float32).astype(np.float64), strict=True):
            reference.step(g, lr, wd, mu, 0.9)
    for reference, mine, begin in zip(references, float64(p), start, strict=True):
        reference.assert_equals(mine, begin)
        assert (reference.decayed[0] == 8).all()
        assert 0.3 < reference.decayed[1:].mean() / 8 < 0.7  # both cases occur


@pytest.mark.parametrize("slow", [(0.0, 0.0), (0.9, 3.0)])
def test_the_optimizer_takes_normuon_steps_on_every_matrix_of_every_bank_and_leaves_padding_zero(slow):
    changes = {"slow_momentum": slow[0], "slow_weight": slow[1]} if slow[0] else {}
    settings, model = settings_and_model(shards=5, muon_wd=30.0, momentum_warmup=4, **changes)
    optimizer = Optimizer(model, settings)
    # rows / cols is 16 / 32 in qk_bank and 32 / 32 in vo_bank: a factor of 1; in mlp_bank 128 / 32: 2, and MLP-out's 4.
    factors = {"qk_bank": [1] * 8, "vo_bank": [1] * 4, "mlp_bank": [2, 4] * 3}
    start = {name: float64(model.get_parameter(name)) for name in factors}
    assert {name: len(bank) for name, bank in start.items()} == {"qk_bank": 10, "vo_bank": 5, "mlp_bank": 10}
    references = {
        name: [NorMuonInFloat64(p.copy(), factor, slow) for p, factor in zip(start[name], factors[name], strict=False)]
        for name in factors
    }
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for name, each in references.items():
            grad = torch.randn(len(each), *start[name].shape[1:], generator=generator)
            model.get_parameter(name).grad[: len(each)] = grad
            for reference, g in zip(each, float64(grad), strict=True):
                lr, momentum = 0.035 * 1.0, 0.65 + 0.1 * min(step / 4, 1)
                reference.step(g, lr, 30.0, momentum, 0.9)
        optimizer.step(schedule(settings, step))
        assert all(model.get_parameter(name).grad is None for name in references)
    for name, each in references.items():
        bank = float64(model.get_parameter(name))
        for reference, mine, begin in zip(each, bank, start[name], strict=False):
            reference.assert_equals(mine, begin)
        assert (bank[len(each) :] == 0).all()


def test_one_bfloat16_step_is_the_float32_step_within_the_rounding_of_polar_express():
    change = {}
    for dtype in (torch.float32, torch.bfloat16):
        settings, model = settings_and_model(dtype=dtype, shards=5)
        optimizer = Optimizer(model, settings)
        generator = torch.Generator().manual_seed(0)
        start = {name: float64(model.get_parameter(name)) for name in BANKS}
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
            if name in BANKS:
                p.grad[start[name].any(axis=(1, 2)) == 0] = 0
        optimizer.step(schedule(settings, 0))
        for name in BANKS:
            p = model.get_parameter(name).detach()
            assert p.dtype == dtype
            whole = join_float32(p, optimizer.state[name]["low"]) if dtype == torch.bfloat16 else p
            change[dtype, name] = float64(whole) - start[name]
            assert (change[dtype, name][~start[name].any(axis=(1, 2))] == 0).all()
    for name in BANKS:
        exact, rounded = change[torch.float32, name], change[torch.bfloat16, name]
        assert np.linalg.norm(rounded - exact) <= 0.1 * np.linalg.norm(exact)


# ----------------------------------------------------------------------------------------------------------------------
# NorMuon's leads, which are off at first
# ----------------------------------------------------------------------------------------------------------------------


def with_low_bits(optimizer, name):
    p = optimizer.params[name].detach()
    return float64(join_float32(p, optimizer.state[name]["low"]) if p.dtype == torch.bfloat16 else p)


def last_steps_of_a_run(dtype, steps, **changes):
    """The exact values of all parameters after each of a run's last steps, and its optimizer. The run has no others."""
    settings, model = settings_and_model(dtype=dtype, shards=5, **changes)
    optimizer = Optimizer(model, settings)
    padding = {name: (model.get_parameter(name) == 0).all(2, keepdim=True).all(1, keepdim=True) for name in BANKS}
    generator = torch.Generator().manual_seed(0)
    values = []
    for step in range(settings.total_steps - steps, settings.total_steps):
        for name, p in model.named_parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if name in BANKS:
                grad = grad * ~padding[name]
            p.grad = grad if p.grad is None else p.grad + grad
        optimizer.step(schedule(settings, step))
        of_banks = {name: with_low_bits(optimizer, name) for name in BANKS}
        others = {name: float64(p) for name, p in model.named_parameters() if name not in BANKS}
        values.append(of_banks | others)
    return values, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_step_leaves_the_banks_halfway_to_their_mean_over_the_last_steps_and_all_else_as_it_is(dtype):
    plain, _ = last_steps_of_a_run(dtype, steps=12)
    averaged, optimizer = last_steps_of_a_run(dtype, steps=12, average_steps=7)
    for step in range(11):
        assert all((averaged[step][name] == plain[step][name]).all() for name in plain[step])
    for name, end in plain[-1].items():
        if name not in BANKS:
            assert (averaged[-1][name] == end).all()
            continue
        mean = np.mean([values[name] for values in plain[-7:]], axis=0)
        way = abs(end - mean).mean()
        assert way > 1e-3 * abs(end).mean()
        # As exact as float32, not as bfloat16: the lost bits count, in the mean and in what comes of it.
        assert abs(averaged[-1][name] - (end + mean) / 2).max() <= 2e-7 * abs(end).max()
        assert optimizer.state[name]["mean"].dtype == torch.float32


def test_more_averaged_steps_than_steps_are_a_users_mistake():
    program.check_settings(replace(MINI, average_steps=370), 1)
    with pytest.raises(program.UserError, match="--average-steps 371 .* 370 steps"):
        program.check_settings(replace(MINI, average_steps=371), 1)


def test_bigram_table_that_ranks_cannot_share_is_a_users_mistake():
    uneven = replace(MINI, model=replace(MINI.model, bigram_rows=7.505))
    assert uneven.model.bigram_table_rows % 2 == 0 and uneven.model.bigram_table_rows % 4
    program.check_settings(uneven, 2)
    with pytest.raises(program.UserError, match="4 processes cannot share .* 2882 rows"):
        program.check_settings(replace(uneven, slices=4), 4)


# ----------------------------------------------------------------------------------------------------------------------
# Adam
# ----------------------------------------------------------------------------------------------------------------------


class AdamInFloat64:
    """One parameter, one update after another, as the recipe has it."""

    def __init__(self, p, betas, wd):
        self.p, self.betas, self.wd = p, betas, wd
        self.m, self.v, self.t = np.zeros_like(p), np.zeros_like(p), 0

    def step(self, grad, lr):
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad**2
        correction = np.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        update = lr * correction * self.m / (np.sqrt(self.v) + 1e-10)
        self.p = self.p - update - lr**2 * self.wd * self.p * (update * self.p > 0)


@pytest.mark.recipe
def test_adams_table_is_the_recipes():
    tables = parameter_table(RECORD.model), parameter_table(replace(RECORD.model, gates=False))
    rows = {name: row for table in tables for name, row in table.items() if row and row.kind != "bank"}
    mine = {name: (row.betas, row.lr, row.wd, row.kind == "table") for name, row in rows.items()}
    assert {name: mine[name] for name in ADAM} == ADAM
    assert set(mine) - set(ADAM) == set(), "rows to compare with the recipe, and to add to this test's table"


def test_adam_takes_the_sum_of_two_steps_gradients_on_odd_steps_and_equals_a_float64_computation():
    stages = tuple(replace(stage, tied=False, lr=1.5) for stage in MINI.stages)
    settings, model = settings_and_model(stages=stages, adam_wd=1.0)  # two hundred times the real one, to be seen
    optimizer = Optimizer(model, settings)
    params = {name: p for name, p in model.named_parameters() if name not in BANKS}
    rows = model.table
    references = {}
    for name, p in params.items():
        references[name] = AdamInFloat64(float64(p), rows[name].betas, rows[name].wd * 1.0)
    sums = dict.fromkeys(params, 0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(14):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 4 - 2)
            p.grad = grad if p.grad is None else p.grad + grad
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            sums[name] = float64(p.grad)
        optimizer.step(schedule(settings, step))
        for name, p in params.items():
            if step % 2 == 0:
                assert torch.equal(p, before[name]) and p.grad is not None
                continue
            assert p.grad is None
            references[name].step(sums[name], 0.008 * 1.5 * rows[name].lr)
            # Not by much more than float32 rounds, in steps of this learning rate.
            error = abs(float64(p) - references[name].p) / (abs(references[name].p) + 1)
            assert error.max() <= 1e-5, name


def test_a_model_whose_only_value_embedding_is_the_mudd_layers_has_no_parameter_without_a_gradient():
    layers = Layer(), Layer(attention=False, skip=0), Layer(value_embeds=0, mudd=(0, 1, 1))
    config = replace(MODEL, layers=layers)
    model = GPT(config)
    tokens = torch.randint(100, (33,), generator=torch.Generator().manual_seed(0))
    model(tokens[:-1], tokens[1:], program.make_context(config, 32, (8, 16), model.embed)).backward()
    assert all(p.grad is not None and p.numel() for p in model.parameters())
    Optimizer(model, replace(MINI, model=config)).step(schedule(MINI, 1))


def test_adams_weight_decay_spares_weights_that_the_update_grows():
    p = torch.tensor([2.0, -2.0, 2.0, 0.0])
    grad = torch.tensor([1.0, 1.0, -1.0, 1.0])
    # The first update has the size of lr, in the direction of the gradient: only the first weight shrinks.
    numbers = map(torch.tensor, (0.1, 0.25, 0.9, 0.95, 1 - 0.9, 1 - 0.95))
    program.adam_update(p, grad, torch.zeros(4), torch.zeros(4), *numbers)
    assert p.tolist() == pytest.approx([2 - 0.1 - 0.25 * 2, -2 - 0.1, 2 + 0.1, -0.1], abs=1e-6)


def test_adam_rounds_bfloat16_parameters_to_nearest_and_keeps_float32_moments():
    untied = replace(MINI.stages[0], tied=False)
    settings, model = settings_and_model(dtype=torch.bfloat16, stages=(untied,))
    optimizer = Optimizer(model, settings)
    name = "lm_head"
    p = model.get_parameter(name)
    assert p.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in optimizer.state[name].values())
    row = model.table[name]
    reference = AdamInFloat64(float64(p), row.betas, row.wd * 0.005)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        for each in model.parameters():
            each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)
        grad = float64(p.grad)
        optimizer.step(schedule(settings, step))
        if step % 2:
            reference.step(grad, 0.008 * row.lr)
            # Half a unit in the last of 8 places; a little more, for the ties that float32 decides.
            unit = 2.0 ** (np.floor(np.log2(abs(reference.p))) - 7)
            assert (abs(float64(p) - reference.p) <= 0.501 * unit).all()
            reference.p = float64(p)


# ----------------------------------------------------------------------------------------------------------------------
# Tied, then not
# ----------------------------------------------------------------------------------------------------------------------


def test_embed_is_the_heads_transpose_up_to_step_847_and_goes_on_with_its_moments_from_step_849():
    settings, model = settings_and_model(RECORD)
    optimizer = Optimizer(model, settings)
    head, embed = model.lm_head, model.embed
    row = model.table["lm_head"]
    reference = AdamInFloat64(float64(head), row.betas, row.wd * 0.005)
    embed_reference = None
    generator = torch.Generator().manual_seed(0)
    for step in range(838, 856):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator) * (1 + step % 5)
            p.grad = grad if p.grad is None else p.grad + grad
        grads = float64(head.grad), float64(embed.grad)
        before = head.detach().clone(), embed.detach().clone()
        optimizer.step(schedule(settings, step))
        if step % 2 == 0:
            assert torch.equal(head, before[0]) and torch.equal(embed, before[1])
            continue
        t = step - 508  # the learning rate falls from step 508 on, in 762 steps, and stage 3's is 1.73, not 1.52
        lr = 0.008 * row.lr * ((1 - t / 762) * (1.52 if step < 847 else 1.73) + 0.15 * t / 762)
        if step <= 847:
            reference.step(grads[0] + grads[1].T, lr)
            assert torch.equal(embed, head.T)
        else:
            reference.step(grads[0], lr)
            embed_reference.step(grads[1], lr)
            assert np.abs(float64(embed) - embed_reference.p).max() <= 1e-5
            assert not torch.isclose(embed, head.T).all(dim=0).any()
        if step == 847:
            embed_reference = AdamInFloat64(reference.p.T, row.betas, row.wd * 0.005)
            embed_reference.m, embed_reference.v, embed_reference.t = reference.m.T, reference.v.T, reference.t
        assert np.abs(float64(head) - reference.p).max() <= 1e-5
    assert (reference.t, embed_reference.t) == (9, 9)


# At step 15 the other embedding tables are updated, too; at step 17 they are not.
@pytest.mark.parametrize("parting", [15, 17])
def test_embedding_tables_wait_for_every_second_update_from_a_step_on_also_where_embed_and_head_part(parting):
    """From step 4 on they take the gradients of four steps, for the first time at step 7."""
    lengths = (7, parting - 7, 30)
    stages = tuple(replace(stage, steps=steps) for stage, steps in zip(MINI.stages, lengths, strict=True))
    assert [stage.tied for stage in stages] == [True, True, False]
    settings, model = settings_and_model(stages=stages, tables_every=2, tables_from=4, cooldown=0.001, adam_wd=1.0)
    optimizer = Optimizer(model, settings)
    odd, rare = list(range(1, 28, 2)), [1, 3, 7, 11, 15, 19, 23, 27]
    steps = {name: odd for name, p in model.named_parameters() if name not in BANKS}
    steps |= {"bigram_table": rare, "value_embeds": rare, "embed": [step for step in rare if step > parting]}
    params = {name: model.get_parameter(name) for name in steps}
    references, sums = {}, dict.fromkeys(steps, 0.0)
    for name, p in params.items():
        references[name] = AdamInFloat64(float64(p), model.table[name].betas, model.table[name].wd * 1.0)
    head, embed = references["lm_head"], references["embed"]
    generator = torch.Generator().manual_seed(0)
    for step in range(28):
        for name, p in model.named_parameters():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 4 - 2)
            p.grad = grad if p.grad is None else p.grad + grad
            if name in sums:
                sums[name] = sums[name] + float64(grad)
        optimizer.step(schedule(settings, step))
        tied = step <= parting
        if step in odd and tied:
            sums["lm_head"], sums["embed"] = sums["lm_head"] + sums["embed"].T, 0.0
        for name, reference in references.items():
            if step in steps[name]:
                reference.step(sums[name], 0.008 * model.table[name].lr)
                sums[name] = 0.0
        if step in odd and tied:
            embed.p, embed.m, embed.v, embed.t = head.p.T, head.m.T, head.v.T, head.t
        for name, p in params.items():
            error = abs(float64(p) - references[name].p) / (abs(references[name].p) + 1)
            assert error.max() <= 1e-5, (name, step)
    assert head.t == 14 and embed.t == (parting + 1) // 2 + 3
