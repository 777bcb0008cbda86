"""The model: what may influence a loss, what a loss is, the forward pass written a second time, and the starts."""

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe import RECORD
from train_gpt import GPT, PRESETS, Layer, ModelConfig, make_context

ROOT = Path(__file__).resolve().parent.parent
BOS = 299
SMALL = {"vocab_size": 300, "bos_id": BOS, "dim": 96, "heads": 6, "bigram_rows": 2, "bigram_dim": 32}

# A table without the techniques that a boolean field switches, and with every one of those switched off.
BASIC = {"value_embeds", "head_pairs"}
CORE = ModelConfig(
    layers=(
        Layer(value_embeds=1),
        Layer(window="long"),
        Layer(attention=False),
        Layer(window="long", value_embeds=0),
    ),
    **SMALL,
    **{f.name: False for f in fields(ModelConfig) if f.type is bool and f.name not in BASIC},
)


def random_model(config, seed=0):
    """A float32 model in which no parameter has the value it starts with, and all of them matter."""
    torch.manual_seed(seed)
    model = GPT(config)
    scales = {"embed": 1.0, "lm_head": 0.2, "value_embeds": 0.5, "bigram_table": 0.5}
    scales.update(dict.fromkeys(("qk_bank", "vo_bank", "mlp_bank"), config.dim**-0.5))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(scales.get(name, 0.3) * torch.randn(p.shape))
    return model


def random_tokens(length, boundaries, seed=0):
    """length + 1 tokens; `boundaries` is the chance that a token is BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(BOS, (length + 1,), generator=generator)
    tokens[torch.rand(length + 1, generator=generator) < boundaries] = BOS
    return tokens


def losses(model, inputs, targets, windows):
    """The loss of every token (T,), as validation computes it."""
    return model.evaluate(inputs.int(), targets, make_context(model.config, len(inputs), windows, model.embed))


# ----------------------------------------------------------------------------------------------------------------------
# What may influence a loss. Equal means equal to the last bit: what is masked is multiplied by an exact zero.
# ----------------------------------------------------------------------------------------------------------------------

WHOLE_MODELS = {name: replace(preset.model, **SMALL) for name, preset in PRESETS.items()}


@pytest.mark.parametrize("windows", [(1, 4), (8, 30), (5, 1000)])
@pytest.mark.parametrize("preset", WHOLE_MODELS)
def test_later_token_changes_no_earlier_loss(preset, windows):
    model = random_model(WHOLE_MODELS[preset])
    tokens = random_tokens(150, 0.02)
    tokens[40] = BOS
    inputs, targets = tokens[:-1], tokens[1:]
    before = losses(model, inputs, targets, windows)
    for place in (0, 1, 13, 39, 40, 41, 77, 148, 149):
        for token in (BOS, 0 if inputs[place] != 0 else 1):
            if token == inputs[place]:
                continue
            changed = inputs.clone()
            changed[place] = token
            after = losses(model, changed, targets, windows)
            assert torch.equal(after[:place], before[:place]), f"token {place} reached an earlier loss"
            assert (after[place] - before[place]).abs() > 1e-6, f"token {place} does not even reach its own loss"


@pytest.mark.parametrize("windows", [(1, 4), (8, 30), (5, 1000)])
@pytest.mark.parametrize("preset", WHOLE_MODELS)
def test_no_token_of_another_document_changes_a_loss(preset, windows):
    model = random_model(WHOLE_MODELS[preset])
    lengths = [12, 1, 40, 2, 1, 1, 30, 7, 56]  # the first one is the end of a document, without its BOS
    docs = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = random_tokens(150, 0.0)
    tokens[:150][docs.diff(prepend=docs[:1]) == 1] = BOS
    inputs, targets = tokens[:-1], tokens[1:]
    before = losses(model, inputs, targets, windows)
    for doc in range(len(lengths)):
        here = docs == doc
        changed = inputs.clone()
        changed[here & (inputs != BOS)] = random_tokens(150, 0.0, seed=1)[:-1][here & (inputs != BOS)]
        after = losses(model, changed, targets, windows)
        assert torch.equal(after[~here], before[~here]), f"document {doc} reached another one"
        moved = changed != inputs
        assert ((after - before).abs()[moved] > 1e-6).all()
        assert moved.sum() >= lengths[doc] - 2


# ----------------------------------------------------------------------------------------------------------------------
# What a loss is
# ----------------------------------------------------------------------------------------------------------------------


def test_probabilities_over_all_padded_columns_sum_to_1():
    model = random_model(CORE)
    assert (model.config.padded_vocab, model.lm_head.shape) == (384, (96, 384))
    inputs = random_tokens(12, 0.1)[:-1]
    columns = [losses(model, inputs, torch.full_like(inputs, token), (4, 8)) for token in range(384)]
    probabilities = torch.stack(columns).double().neg().exp()
    assert (probabilities.sum(0) - 1).abs().max() <= 1e-5
    assert (probabilities[:300].sum(0) < 1 - 1e-4).all()  # padding has its part
    # Capped logits lie between 0 and 23, so that no token is impossible.
    assert probabilities.min() >= math.exp(-23) / 384


def test_a_loss_is_minus_the_log_of_the_softmax_of_capped_logits():
    model = random_model(CORE)
    tokens = random_tokens(30, 0.1)
    with torch.no_grad():
        stream = model.stream(tokens[:-1].int(), make_context(CORE, 30, (4, 8), model.embed)).double()
        z = 23 / (1 + torch.exp(-(stream @ model.lm_head.double() + 5) / 7.5))
    probabilities = z.exp() / z.exp().sum(1, keepdim=True)
    expected = [-math.log(probabilities[i, tokens[i + 1]]) for i in range(30)]
    assert losses(model, tokens[:-1], tokens[1:], (4, 8)).tolist() == pytest.approx(expected, abs=1e-5)


def test_evaluation_in_chunks_of_rows_equals_the_forward_pass():
    config = replace(CORE, layers=(Layer(value_embeds=0),), vocab_size=100, bos_id=99, dim=48, heads=3)
    model = random_model(config)
    length = 16_384 + 300  # more than one chunk
    tokens = random_tokens(length, 0.02) % 100
    context = make_context(config, length, (3, 3), model.embed)
    each = losses(model, tokens[:-1], tokens[1:], (3, 3))
    assert each.shape == (length,)
    with torch.no_grad():
        whole = model(tokens[:-1].int(), tokens[1:], context)
    assert each.double().sum().item() == pytest.approx(whole.item(), rel=1e-6)
    # Far from the start, only the last few tokens of a document matter: a short sequence has the same losses there.
    tail = losses(model, tokens[-401:-1], tokens[-400:], (3, 3))
    assert torch.allclose(each[-390:], tail[-390:], atol=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The core of the forward pass, written a second time in float64. (reference_gpt.py has the techniques, too.)
# ----------------------------------------------------------------------------------------------------------------------


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 2**-23)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotary(x):
    """Turns the pairs of the first half of the channels of x (T, H, d) by minus position times frequency."""
    half, angles = x.shape[2] // 2, np.outer(np.arange(len(x)), 1024.0 ** -np.linspace(0, 1, x.shape[2] // 4))
    turned = (x[..., 0:half:2] + 1j * x[..., 1:half:2]) * np.exp(-1j * angles)[:, None]
    y = x.copy()
    y[..., 0:half:2], y[..., 1:half:2] = turned.real, turned.imag
    return y


def attention(q, k, v, docs, window):
    """softmax(0.1 * q k^T) v of q, k, v (T, H, d), query by query."""
    y = np.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if docs[j] == docs[i] and i - j <= window]
        for h in range(q.shape[1]):
            weights = np.exp(0.1 * k[seen, h] @ q[i, h])
            y[i, h] = weights @ v[seen, h] / weights.sum()
    return y


def core_losses(model, tokens, windows):
    """The losses of a model of CORE's kind, from its parameters and the columns of its table."""
    config, w = model.config, {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    inputs, targets = tokens[:-1].tolist(), tokens[1:].tolist()
    dim, vocab, heads = w["embed"].shape[1], len(w["embed"]), config.heads
    docs = np.cumsum(np.array(inputs) == BOS)
    qk_bank, vo_bank, mlp_bank, gates = (iter(w[name]) for name in ("qk_bank", "vo_bank", "mlp_bank", "value_gates"))
    x = x0 = norm(w["embed"][inputs])
    n = 0  # layers with attention so far
    for i, layer in enumerate(config.layers):
        if layer.attention:
            a, scale = norm(x), w["qkv_lambdas"][n]
            # Two heads of Q a matrix, then two of K; then V and O.
            w_q, w_k = (np.concatenate([next(qk_bank) for _ in range(heads // 2)]) for _ in range(2))
            q, k, v = ((a @ (scale * weight).T).reshape(len(a), heads, -1) for weight in (w_q, w_k, next(vo_bank)))
            if layer.value_embeds is not None:
                row = w["value_embeds"][layer.value_embeds * vocab :][inputs]
                gate = 2 * sigmoid(np.concatenate((a[:, :6], row[:, :6]), axis=1) @ next(gates).T)
                v = v + gate[:, :, None] * row.reshape(v.shape)
            window = windows[1] if layer.window == "long" else windows[0]
            y = attention(rotary(norm(q)), rotary(norm(k)), v, docs, window).reshape(len(a), dim)
            y = y @ (w["out_lambdas"][n] * next(vo_bank)).T
            x = w["resid_lambdas"][i, 0] * x + w["post_lambdas"][i, 0] * y + w["x0_lambdas"][i] * x0
            n += 1
        hidden = np.maximum(norm(x) @ next(mlp_bank).T, 0) ** 2
        x = w["resid_lambdas"][i, 1] * x + w["post_lambdas"][i, 1] * (hidden @ next(mlp_bank))
    z = 23 * sigmoid((norm(x) @ w["lm_head"] + 5) / 7.5)
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), targets]


@pytest.mark.parametrize("windows", [(1, 3), (6, 20), (4, 1000)])
def test_the_core_of_the_forward_pass_equals_a_second_writing_of_the_recipe(windows):
    model = random_model(CORE)
    tokens = random_tokens(60, 0.05)
    mine = losses(model, tokens[:-1], tokens[1:], windows)
    assert mine.tolist() == pytest.approx(core_losses(model, tokens, windows).tolist(), abs=2e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------------------

# What each parameter starts as: a constant, ("normal", standard deviation) or ("uniform", bound in units of D^-1/2).
STARTS = {
    "lm_head": ("normal", 0.005),
    "embed": ("normal", 0.005),
    "value_embeds": ("normal", 0.01),
    "bigram_table": 0,
    "qk_bank": ("uniform", 0.5 * 3**0.5),
    "vo_bank": ("uniform", 0.5 * 3**0.5),
    "mlp_bank": ("uniform", 0.5 * 3**0.5),  # only in; out is zero
    "resid_lambdas": 1.1**0.5,
    "post_lambdas": 1,
    "qkv_lambdas": 0.5,
    "out_lambdas": 1,
    "smear_lambda": 0,
    "skip_lambda": -1.5,
    "smear_gate": 0,
    "value_gates": 0,
    "mudd_w1": ("uniform", 1),
    "mudd_w2": 0,
    "mudd_bias": "by hand",
    "gates_w1": ("uniform", 1),
    "gates_w2": 0,
    "gates_bias": "by hand",
    "gates_scale": 0.1,
}
FLOAT32 = {name for name in STARTS if "lambda" in name} | {"mudd_bias", "gates_bias", "gates_scale"}


@pytest.mark.recipe
def test_parameters_start_as_the_recipe_says():
    torch.manual_seed(0)
    model = GPT(replace(RECORD.model, **{**SMALL, "vocab_size": 2000, "dim": 192}), shards=8)
    params = {name: p.detach() for name, p in model.named_parameters()}
    assert set(params) == set(STARTS)
    assert torch.equal(params["embed"], params["lm_head"].T)
    # Behind the last matrix of each bank there is padding: 60, 20 and 22 matrices, in eight equal parts.
    real = {"qk_bank": 60, "vo_bank": 20, "mlp_bank": 22}
    for name, count in real.items():
        assert len(params[name]) == math.ceil(count / 8) * 8
        assert not params[name][count:].any()
        params[name] = params[name][:count]
    assert not params["mlp_bank"][1::2].any()
    params["mlp_bank"] = params["mlp_bank"][0::2]
    for name, start in STARTS.items():
        values = params[name].double()
        if name == "mudd_bias":
            layer = [0, 0, 0, 0, 0, 0, 2, 2, 1.1**0.5, 1, 0, 0.05, 1.1**0.5, 1]
            assert (0.1 * values).tolist() == pytest.approx([*layer, 0, -0.5, 0, 0, 0], abs=1e-6)
        elif name == "gates_bias":  # test_techniques.py has each
            counts = {float(value): count for value, count in zip(*np.unique(values.float(), return_counts=True))}
            # x0 and alphas and DC's output; bigrams; gates of heads; the skip; DC's input
            assert counts == {0: 9 + 24 + 6, 0.5: 9, 2.5: 12, 5: 1, 10: 6}
        elif not isinstance(start, tuple):
            assert values.unique().tolist() == pytest.approx([start], abs=1e-6), name
        else:
            shape, size = start
            size = size if shape == "normal" else size * 192**-0.5
            std = size if shape == "normal" else size / 3**0.5
            assert values.std().item() == pytest.approx(std, rel=0.01), name
            assert abs(values.mean().item()) <= 5 * std * values.numel() ** -0.5, name
            most = values.abs().max().item() / size
            assert 4 < most < 7 if shape == "normal" else 0.999 < most <= 1 + 1e-6, name
            # Every matrix of a bank, and every row of a table, is drawn by itself.
            assert (values.flatten(1).std(1) / std - 1).abs().max() <= 0.5, name


def test_scalars_and_the_coefficients_bias_stay_float32_in_a_bfloat16_model():
    model = GPT(replace(RECORD.model, **SMALL), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {name: torch.float32 if name in FLOAT32 else torch.bfloat16 for name in STARTS}


def test_the_records_parameters_have_the_recipes_shapes():
    with torch.device("meta"):
        model = GPT(RECORD.model, torch.bfloat16, shards=8)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {
        "lm_head": (768, 50304),
        "embed": (50304, 768),
        "value_embeds": (5 * 50304, 768),
        "bigram_table": (377_280, 768),
        "qk_bank": (64, 256, 768),  # 60, padded
        "vo_bank": (24, 768, 768),  # 20, padded
        "mlp_bank": (24, 3072, 768),  # 22, padded
        "resid_lambdas": (11, 2),
        "post_lambdas": (11, 2),
        "qkv_lambdas": (10,),
        "out_lambdas": (10,),
        "value_gates": (4, 6, 12),
        "mudd_w1": (2, 64, 768),
        "mudd_w2": (19, 64),
        "mudd_bias": (19,),
        "gates_w1": (2, 64, 768),
        "gates_w2": (67, 64),
        "gates_bias": (67,),
        "gates_scale": (1,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert all(p.is_meta for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Import
# ----------------------------------------------------------------------------------------------------------------------

IMPORT = """
import os, signal, sys, threading
sys.modules["triton"] = None  # nor does it need Triton
import torch
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    generator = torch.get_rng_state().sum().item()
    flags = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    return handlers, generator, flags, torch.is_grad_enabled(), threading.active_count(), dict(os.environ)
before = state()
import train_gpt
assert state() == before
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
"""


def test_importing_the_program_has_no_side_effects(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"RANK": "0", "WORLD_SIZE": "2"}  # which only a run looks at
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert list(tmp_path.iterdir()) == []
