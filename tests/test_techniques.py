"""Every technique of the recipe against naive computations in float64 or by hand; what must hold with each one off."""

import collections
import functools
import inspect
import math
import os
import re
import statistics
import zlib
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import recipe
from recipe import MINI, RECORD
from reference_gpt import (
    ReferenceGPT,
    bigram_row,
    cross_entropy,
    ngram_row,
    ngram_sign,
    norm,
    objective,
    sign_row,
    wrapped,
)  # fmt: skip
from train_gpt import (
    GPT,
    PRESETS,
    Layer,
    Mix,
    ModelConfig,
    Optimizer,
    add_attention,
    begin_stream,
    gpt2_vocabulary,
    make_context,
    ngram_rows,
    parse_arguments,
    prefix_table,
    rotary_state,
    schedule,
    token_losses,
)

SWITCHES = [f.name for f in fields(ModelConfig) if f.type is bool]
PLAIN = dict.fromkeys(SWITCHES, False)
VARIANTS = {
    "everything on": {},
    "ngram 4": {"ngram": 4, "bigram_dim": 10},
    "mlp_ratio 2": {"mlp_ratio": 2},
    **{f"{name} off": {name: False} for name in SWITCHES},
    **{f"only {name}": {**PLAIN, name: True} for name in SWITCHES},
    "everything off": PLAIN,
}
BOS = 60
SMALL = ModelConfig(
    layers=(
        Layer(paired_heads=True, value_embeds=0, attention_gate=True, gates=True),
        Layer(window="long", narrow_qk=True, xsa=True, attention_gate=True, dc=True),
        Layer(narrow_qk=True, value_embeds=1, xsa=True),
        Layer(attention=False, skip=1, gates=True),
        Layer(paired_heads=True, narrow_qk=True, value_embeds=2, single_input=2),
        Layer(xsa=True, attention_gate=True),
        Layer(
            window="long", value_embeds=3, xsa=True, attention_gate=True, dc=True, single_input=2,
            mudd=(2, 5, 1),
        ),
    ),
    vocab_size=61,
    bos_id=BOS,
    dim=32,
    heads=4,
    bigram_rows=15,
    bigram_dim=20,
    narrow_qk=True,
)
VARIANTS["no attention in layer 0"] = {
    "layers": (Layer(attention=False, gates=True), replace(SMALL.layers[1], value_embeds=0), *SMALL.layers[2:])
}
WITHOUT_ONE = [name for name in VARIANTS if not name.startswith("only")]
# Documents of 5 tokens (the rest of one that began before), 1, 8 and 10, with tokens that repeat.
STREAM = [7, 3, 3, 41, 7, BOS, BOS, 19, 3, 3, 58, 0, 22, 19, BOS, 3, 41, 41, 5, 7, 3, 30, 8, 8, 1]
INPUTS, TARGETS = STREAM[:-1], STREAM[1:]
DOCS = [0] * 5 + [1] + [2] * 8 + [3] * 10
WINDOWS = (3, 7)
# Frequencies and scale as YaRN could have left them: large enough to show in a short sequence.
ROTARY = (torch.tensor([0.7, 0.21]), 0.6)
TOLERANCE = 1e-4  # of losses, some 10 nats in float32

# Random values for every parameter, so large that each one matters: mean and standard deviation.
RANDOM = {
    "lm_head": (0, 0.7),
    "embed": (0, 1),
    "qk_bank": (0, 0.2),
    "narrow_qk_bank": (0, 0.25),
    "vo_bank": (0, 0.2),
    "mlp_bank": (0, 0.1),
    "resid_lambdas": (1, 0.2),
    "post_lambdas": (1, 0.3),
    "x0_lambdas": (0, 0.4),
    "qkv_lambdas": (0.8, 0.2),
    "out_lambdas": (1, 0.3),
    "smear_gate": (0, 0.5),
    "smear_lambda": (0.8, 0),
    "bigram_table": (0, 1),
    "bigram_lambdas": (0, 0.5),
    "value_embeds": (0, 1),
    "value_gates": (0, 0.5),
    "xsa_alphas": (0.5, 0.8),
    "attention_gates": (0, 0.5),
    "skip_gate": (0, 0.5),
    "skip_lambda": (0.4, 0),
    "mudd_w1": (0, 0.1),
    "mudd_w2": (0, 1),
    "mudd_bias": (0, 5),
    "gates_w1": (0, 0.1),
    "gates_w2": (0, 1),
    "gates_bias": (0, 3),
    "gates_scale": (0.1, 0),
}


@functools.cache
def random_model(config):
    """A model whose parameters hold random numbers, the same for a parameter in every model that has it."""
    model = GPT(config)
    for name, p in model.named_parameters():
        mean, std = RANDOM.get(name, (0.5, 0.5))  # a new technique's need not be there
        noise = torch.randn(p.numel(), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        p.data = mean + std * noise.view_as(p)
    return model


def private_copy(config):
    """A `random_model` that a test may change."""
    model = GPT(config)
    model.load_state_dict(random_model(config).state_dict())
    return model


def context_of(model, length, windows=WINDOWS, weights=(1.0,)):
    context = make_context(model.config, length, windows, model.embed, ROTARY)
    return context._replace(mtp=torch.tensor(weights))


def losses(model, inputs=INPUTS, targets=TARGETS, windows=WINDOWS):
    """The loss of each token, as validation computes it."""
    context = context_of(model, len(inputs), windows)
    return model.evaluate(torch.tensor(inputs, dtype=torch.int32), torch.tensor(targets), context)


def expected_losses(model, inputs=INPUTS, targets=TARGETS, windows=WINDOWS):
    reference = ReferenceGPT(model.config, model.state_dict())
    return cross_entropy(reference.logits(inputs, windows, (ROTARY[0].tolist(), ROTARY[1])), targets)


def one_layer(layer, **switches):
    """The small model with one layer and no technique but `switches`."""
    return replace(SMALL, layers=(layer,), **{**PLAIN, **switches})


# ----------------------------------------------------------------------------------------------------------------------
# The record's tables
# ----------------------------------------------------------------------------------------------------------------------

# Shape, start, optimizer, learning rate x, weight decay x, betas.
PARAMETERS = {
    "lm_head": ("768 x 50304", "normal 0.005", "Adam", 1, 150, "(0.5, 0.95)"),
    "embed": ("50304 x 768", "lm_head transposed", "Adam", 1, 150, "(0.5, 0.95)"),
    "value_embeds": ("251520 x 768", "normal 0.01", "Adam", 75, 5, "(0.75, 0.95)"),  # 5 x 50,304 rows
    "bigram_table": ("377280 x 768", "0", "Adam", 75, 5, "(0.75, 0.95)"),  # 7.5 x 50,304 rows
    "resid_lambdas": ("11 x 2", "1.0488", "Adam", 5, 0, "(0.9, 0.95)"),  # sqrt(1.1)
    "post_lambdas": ("11 x 2", "1", "Adam", 1, 0, "(0.9, 0.95)"),
    "qkv_lambdas": ("10", "0.5", "Adam", 5, 0, "(0.9, 0.99)"),
    "out_lambdas": ("10", "1", "Adam", 5, 0, "(0.9, 0.99)"),
    "smear_lambda": ("1", "0", "Adam", 5, 0, "(0.9, 0.99)"),
    "skip_lambda": ("1", "-1.5", "Adam", 5, 0, "(0.9, 0.99)"),
    "smear_gate": ("12", "0", "Adam", 0.01, 0, "(0.9, 0.99)"),
    "value_gates": ("4 x 6 x 12", "0", "Adam", 1, 1, "(0.9, 0.99)"),  # layers 1, 2, 8, 9
    "mudd_w1": ("2 x 64 x 768", "uniform ±0.036084", "Adam", 0.25, 1, "(0.9, 0.99)"),
    "mudd_w2": ("19 x 64", "0", "Adam", 0.25, 1, "(0.9, 0.99)"),  # 14 and 5 coefficients
    "mudd_bias": ("19", "values at init / 0.1", "Adam", 0.25, 0, "(0.9, 0.99)"),
    "gates_w1": ("2 x 64 x 768", "uniform ±0.036084", "Adam", 0.1, 1, "(0.9, 0.99)"),
    "gates_w2": ("67 x 64", "0", "Adam", 0.1, 1, "(0.9, 0.99)"),  # 26 and 41 coefficients
    "gates_bias": ("67", "values at init / 0.1", "Adam", 0.1, 0, "(0.9, 0.99)"),
    "gates_scale": ("1", "0.1", "Adam", 0.1, 0, "(0.9, 0.99)"),
    "qk_bank": ("60 x 256 x 768", "uniform ±0.03125", "NorMuon", 1, 1, "(0.95, 0.9)"),
    "vo_bank": ("20 x 768 x 768", "uniform ±0.03125", "NorMuon", 1, 1, "(0.95, 0.9)"),
    "mlp_bank": ("22 x 3072 x 768", "uniform ±0.03125, out 0", "NorMuon", 1, 1, "(0.95, 0.9)"),
}
# In the place of the gates' networks with --gates false.
LEARNED = {
    "x0_lambdas": ("11", "0", "Adam", 1, 0, "(0.9, 0.95)"),
    "bigram_lambdas": ("11", "0.05", "Adam", 1, 0, "(0.9, 0.95)"),
    "xsa_alphas": ("4 x 6", "0", "Adam", 1, 0, "(0.9, 0.95)"),  # layers 1, 3, 4, 7
    "skip_gate": ("12", "0", "Adam", 0.05, 0, "(0.9, 0.99)"),
    "attention_gates": ("2 x 6 x 12", "0", "Adam", 1, 1, "(0.9, 0.99)"),  # layers 3, 10
}
WITHOUT_NETWORKS = {name: row for name, row in PARAMETERS.items() if "gates_" not in name} | LEARNED


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("gates", "parameters", "sum_of_counts"),
    [("true", PARAMETERS, "635,885,381"), ("false", WITHOUT_NETWORKS, "635,782,923")],
)
def test_dry_run_lists_every_parameter_with_the_recipes_shape_start_optimizer_betas_and_multipliers(
    gates, parameters, sum_of_counts, train_gpt
):
    plan = train_gpt("--dry-run", "--preset", "record", "--gates", gates)
    assert plan.returncode == 0, plan.stderr
    lines = plan.stdout.splitlines()
    header = next(n for n, line in enumerate(lines) if line.startswith("parameter"))
    total = next(n for n, line in enumerate(lines) if line.startswith("total"))
    columns = ["parameter", "shape", "count", "init", "optimizer", "lr x", "wd x", "betas"]
    assert re.split(r"\s{2,}", lines[header].strip()) == columns
    listed = {}
    for line in lines[header + 1 : total]:
        name, shape, count, start, optimizer, lr, wd, *betas = re.split(r"\s{2,}", line.strip())
        assert name not in listed
        listed[name] = (shape, start, optimizer, float(lr), float(wd), betas[0] if betas else None)
        assert int(count.replace(",", "")) == math.prod(map(int, shape.split(" x "))), name
    assert listed == parameters
    assert lines[total].split()[1] == sum_of_counts


@pytest.mark.recipe
def test_the_presets_are_those_of_the_recipe():
    assert PRESETS.keys() == recipe.PRESETS.keys()
    for name in PRESETS.keys() - {"tiny"}:  # the laptop track's record, whose tables every new one changes
        assert PRESETS[name] == recipe.PRESETS[name]
    assert [name for name in SWITCHES if not getattr(RECORD.model, name)] == ["narrow_qk"]


@pytest.mark.recipe
def test_mini_is_a_small_model_with_every_technique_of_the_record_but_the_gates_networks():
    mini = PRESETS["mini"].model
    assert [name for name in SWITCHES if not getattr(mini, name)] == ["narrow_qk", "gates"]
    with torch.device("meta"):
        whole, without = (GPT(replace(mini, gates=gates)) for gates in (True, False))
    assert set(dict(whole.named_parameters())) == set(PARAMETERS)
    assert set(dict(without.named_parameters())) == set(WITHOUT_NETWORKS)
    # These add no parameter.
    layers = mini.layers
    assert {(layer.attention, layer.paired_heads) for layer in layers} == {(True, False), (True, True), (False, False)}
    assert {layer.window for layer in layers} == {"short", "long"}
    assert any(layer.single_input is not None for layer in layers)


# ----------------------------------------------------------------------------------------------------------------------
# Starts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """A model as training begins with it: the record's, with fewer tokens and channels."""
    torch.manual_seed(0)
    return GPT(replace(RECORD.model, vocab_size=1000, bos_id=999, dim=192, bigram_rows=2, bigram_dim=48))


@pytest.fixture(scope="module")
def fresh_without_networks():
    """The same with `--gates false`."""
    config = replace(RECORD.model, vocab_size=1000, bos_id=999, dim=192, bigram_rows=2, bigram_dim=48, gates=False)
    return GPT(config)


@pytest.mark.recipe
@pytest.mark.parametrize(("name", "std"), [("lm_head", 0.005), ("value_embeds", 0.01)])
def test_tables_start_normal(fresh, name, std):
    values = getattr(fresh, name).detach().double().flatten()
    assert values.mean().abs() < 0.01 * std
    assert values.std() == pytest.approx(std, rel=0.01)
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (values.abs() < sigmas * std).double().mean() == pytest.approx(share, abs=0.005)


def test_embed_starts_as_the_transposed_head(fresh):
    assert torch.equal(fresh.embed, fresh.lm_head.T)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("qk_bank", 0.0625),  # sqrt(3) x 0.5 / sqrt(192)
        ("vo_bank", 0.0625),
        ("mlp_bank", 0.0625),
        ("mudd_w1", 0.0721688),  # Kaiming's with a = sqrt(5): sqrt(6 / (1 + 5) / 192)
        ("gates_w1", 0.0721688),
    ],
)
def test_matrices_start_uniform(fresh, name, bound):
    for matrix in getattr(fresh, name)[:: 2 if name == "mlp_bank" else 1]:
        values = matrix.detach().double().flatten()
        assert 0.99 * bound < values.max() <= bound * 1.000001
        assert -0.99 * bound > values.min() >= -bound * 1.000001
        assert values.mean().abs() < 0.02 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert (values.abs() < bound / 2).double().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("bigram_table", 0),
        ("resid_lambdas", 1.0488088),
        ("post_lambdas", 1),
        ("x0_lambdas", 0),
        ("bigram_lambdas", 0.05),
        ("xsa_alphas", 0),
        ("qkv_lambdas", 0.5),
        ("out_lambdas", 1),
        ("smear_lambda", 0),
        ("skip_lambda", -1.5),
        ("smear_gate", 0),
        ("skip_gate", 0),
        ("attention_gates", 0),
        ("value_gates", 0),
        ("mudd_w2", 0),
        ("gates_w2", 0),
        ("gates_scale", 0.1),
    ],
)
def test_the_rest_starts_constant(fresh, fresh_without_networks, name, start):
    values = getattr(fresh_without_networks if name in LEARNED else fresh, name)
    assert torch.equal(values, torch.full_like(values, start))


def test_mlp_out_starts_at_zero(fresh):
    assert not fresh.mlp_bank[1::2].any()


@pytest.mark.recipe
def test_mudds_coefficients_start_at_the_values_without_it():
    mu = [0.0] * 19  # 14 before the layer, 5 after the last one
    mu[6] = mu[7] = 2  # gates of the value embedding
    mu[8] = mu[12] = 1.0488088  # of the stream
    mu[9] = mu[13] = 1  # of attention and MLP
    mu[11] = 0.05  # of the bigram embedding
    mu[14 + 1] = -0.5  # backout
    assert (0.1 * GPT(SMALL).mudd_bias).tolist() == pytest.approx(mu, abs=1e-7)


@pytest.mark.recipe
def test_gates_start_at_the_recipes_values(fresh):
    layer_0, layer_1, layer_2 = [0, 0.05], [0] * 6 + [0, 0.05], [0, 0.05]
    layer_3 = [0] * 6 + [0.25] * 6 + [0, 0.05]  # XSA, gates of the heads, x0, bigram
    layer_4, layer_5, layer_6, layer_7 = [0] * 6 + [0, 0.05], [0, 0.05], [0.5], [0] * 6 + [0, 0.05]
    layer_8, layer_9, layer_10 = [0, 0.05], [0, 0.05], [0.25] * 6 + [1] * 6 + [0] * 6  # gates, dc_in, dc_out
    first = layer_0 + layer_1 + layer_2 + layer_3
    second = layer_4 + layer_5 + layer_6 + layer_7 + layer_8 + layer_9 + layer_10
    assert (len(first), len(second)) == (26, 41)
    assert (0.1 * fresh.gates_bias).tolist() == pytest.approx(first + second, abs=1e-7)


def test_parameters_are_bfloat16_except_scalars():
    exact = {"qkv_lambdas", "out_lambdas", "smear_lambda", "skip_lambda", "resid_lambdas", "post_lambdas"}
    exact |= {"x0_lambdas", "bigram_lambdas", "xsa_alphas", "mudd_bias", "gates_bias", "gates_scale"}
    for config in (SMALL, replace(SMALL, gates=False)):
        for name, p in GPT(config, torch.bfloat16).named_parameters():
            assert p.dtype == (torch.float32 if name in exact else torch.bfloat16), name


def test_the_sign_table_is_the_same_for_every_seed():
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tables.append(GPT(SMALL).bigram_signs)
    assert torch.equal(*tables)
    assert tables[0].shape == (8192, 20)
    assert set(tables[0].unique().tolist()) == {-1, 1}
    assert tables[0].mean(dim=0).abs().max() < 0.05  # in every channel about as many of each: sigma is 0.011
    assert "bigram_signs" not in dict(GPT(SMALL).named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The whole model against the reference of reference_gpt.py
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_the_references(variant):
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    assert losses(model).tolist() == pytest.approx(expected_losses(model).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_a_presets_table_equal_the_references(preset):
    config = PRESETS[preset].model
    dim = 8 * config.heads
    narrow = {"dim": dim, "bigram_dim": dim // (2 * config.ngram - 2)}
    config = replace(config, vocab_size=61, bos_id=BOS, **narrow)
    model = random_model(config)
    assert losses(model).tolist() == pytest.approx(expected_losses(model).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("windows", [(1, 2), (2, 100), (30, 60)])
def test_losses_equal_the_references_for_other_windows(windows):
    model = random_model(SMALL)
    expected = expected_losses(model, windows=windows)
    assert losses(model, windows=windows).tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_frequencies_and_scale_at_the_start_are_the_references():
    model = random_model(SMALL)
    context = make_context(SMALL, len(INPUTS), WINDOWS, model.embed)
    mine = model.evaluate(torch.tensor(INPUTS), torch.tensor(TARGETS), context)
    z = ReferenceGPT(SMALL, model.state_dict()).logits(INPUTS, WINDOWS)
    assert mine.tolist() == pytest.approx(cross_entropy(z, TARGETS).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("variant", ["everything on", "mudd off", "gates off", "ngram 4"])
def test_the_objective_and_its_gradients_equal_the_references(variant):
    """The gradients of two models of three that differ by a few roundings, which may be amplified in one of them."""
    model = private_copy(replace(SMALL, **VARIANTS[variant]))
    weights = (1.0, 0.5, 0.25)
    generator = torch.Generator().manual_seed(0)
    errors = collections.defaultdict(list)
    for _ in range(3):
        context = context_of(model, len(INPUTS), weights=weights)
        loss = model(torch.tensor(INPUTS, dtype=torch.int32), torch.tensor(TARGETS), context)
        gradients = torch.autograd.grad(loss, list(model.parameters()))

        reference = ReferenceGPT(model.config, model.state_dict())
        exact = [reference.p[name].requires_grad_() for name, _ in model.named_parameters()]
        expected = objective(reference.logits(INPUTS, WINDOWS, (ROTARY[0].tolist(), ROTARY[1])), TARGETS, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for (name, p), mine, true in zip(
            model.named_parameters(), gradients, torch.autograd.grad(expected, exact), strict=True
        ):
            assert true.any(), name
            errors[name].append(((mine - true).abs().max() / true.abs().max()).item())
            if name in ("mudd_bias", "gates_bias"):  # each coefficient has its use
                assert (true.abs() > 1e-3).all()
            p.data *= 1 + 2**-22 * torch.randn(p.shape, generator=generator)
    for name, found in errors.items():
        assert sorted(found)[1] <= 1e-4, (name, found)


def test_in_bfloat16_the_stream_stays_bfloat16_and_the_losses_near():
    """On the average of 15 models that differ by a rounding: how much it amplifies is a matter of luck."""
    model = GPT(SMALL, torch.bfloat16)
    context = make_context(SMALL, len(INPUTS), WINDOWS, model.embed, ROTARY)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(15):
        model.load_state_dict(random_model(SMALL).state_dict())
        for p in model.parameters():
            p.data *= 1 + 2**-9 * torch.randn(p.shape, generator=generator).to(p.dtype)
        assert model.stream(torch.tensor(INPUTS), context).dtype == torch.bfloat16
        mine = model.evaluate(torch.tensor(INPUTS), torch.tensor(TARGETS), context)
        assert mine.dtype == torch.float32
        errors.append((mine - expected_losses(model)).abs().mean().item())
    assert statistics.fmean(errors) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Techniques one by one
# ----------------------------------------------------------------------------------------------------------------------


def reach(config, windows):
    """How many tokens after a token still see it, in a document that is long enough."""
    model, tokens = random_model(config), [BOS] + [(7 * t) % BOS for t in range(30)]
    before = losses(model, tokens, tokens, windows)
    after = losses(model, [*tokens[:8], 59, *tokens[9:]], tokens, windows)
    changed = [t for t in range(len(tokens)) if not torch.equal(before[t], after[t])]
    assert changed == list(range(8, 8 + len(changed)))
    return len(changed) - 1


@pytest.mark.parametrize(("window", "tokens_back"), [(2, 1), (3, 2), (4, 2), (5, 3), (16, 8)])
def test_paired_heads_look_half_a_window_back(window, tokens_back):
    # Position 2t sees 2t - window at the farthest and 2t + 1, which is the token's too, one position less far back.
    layer = Layer(paired_heads=True)
    assert reach(one_layer(layer, paired_heads=True), (window, 99)) == tokens_back
    assert reach(one_layer(layer), (window, 99)) == window
    assert reach(one_layer(Layer(), paired_heads=True), (window, 99)) == window


def test_a_key_offset_lets_layers_with_a_long_window_look_one_token_farther_back():
    for layer, windows in ((Layer(window="long"), (2, 5)), (Layer(), (5, 2))):
        assert reach(one_layer(layer), windows) == 5
        assert reach(one_layer(layer, key_offset=True), windows) == (6 if layer.window == "long" else 5)
        narrow = replace(layer, narrow_qk=True)  # of whose keys all channels turn
        assert reach(one_layer(narrow, key_offset=True, narrow_qk=True), windows) == 5


@pytest.mark.parametrize("technique", ["smear", "bigram"])
def test_smear_and_bigram_look_one_token_back(technique):
    config = replace(one_layer(Layer(attention=False)), **{technique: True})
    assert reach(config, (5, 5)) == 1
    assert reach(one_layer(Layer(attention=False)), (5, 5)) == 0


@pytest.mark.parametrize("ngram", [2, 3, 4, 5])
def test_ngrams_look_one_token_less_back_than_they_are_long(ngram):
    config = replace(one_layer(Layer(attention=False), bigram=True), ngram=ngram, bigram_dim=5)
    assert reach(config, (5, 5)) == ngram - 1


def test_xsa_takes_out_the_part_along_the_tokens_own_value():
    y = torch.tensor([[[3.0, 4, 0]]])  # one token, one head
    w = {"xsa_alphas": torch.tensor([math.atanh(0.5)]), "out": torch.eye(3)}
    mix = Mix(attn_resid=0, x0=0, bigram=0, mlp_resid=0, mlp_post=0)
    x = torch.zeros(1, 3)
    for v, expected in (
        ([2.0, 0, 0], [1.5, 4, 0]),  # half of (3, 0, 0)
        ([-0.5, 0, 0], [1.5, 4, 0]),  # its length and sign do not count
        ([1.0, 1, 0], [1.25, 2.25, 0]),  # half of (3.5, 3.5, 0)
        ([0.0, 0, 7], [3, 4, 0]),
        ([0.0, 0, 0], [3, 4, 0]),
    ):
        v = torch.tensor([[v]], requires_grad=True)
        z = add_attention(x, y, v, None, x, None, w, mix, paired=False)
        assert z.flatten().tolist() == pytest.approx(expected, abs=1e-6)
        assert torch.autograd.grad(z.sum(), v)[0].isfinite().all()


def test_xsa_of_tokens_without_a_value_is_safe():
    model = private_copy(one_layer(Layer(value_embeds=0, xsa=True), value_embeds=True, xsa=True))
    model.vo_bank.data[0] = 0  # values are the value embeddings alone
    model.value_embeds.data[3] = 0  # token 3 has none
    assert losses(model).tolist() == pytest.approx(expected_losses(model).tolist(), abs=TOLERANCE)
    model(torch.tensor(INPUTS), torch.tensor(TARGETS), context_of(model, len(INPUTS))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bigram_rows_and_signs_equal_those_of_python_integers():
    rows = 15 * 50_304
    assert wrapped(2**31) == -(2**31) and wrapped(-(2**31) - 1) == 2**31 - 1 and wrapped(5 + 2**32) == 5
    # 36,313 x 3 = 108,939; 27,191 x 5 = 135,955; their xor is 244,376.
    assert bigram_row(5, 3, rows) == 244_376 and bigram_row(None, 3, rows) == 754_559
    assert (sign_row(5, 3), sign_row(8191 + 8192, 0), sign_row(None, 3)) == (6, 8191, 0)

    table = torch.stack((torch.arange(rows), torch.ones(rows)), dim=1)  # the product tells both row numbers
    signs = torch.stack((torch.ones(8192), torch.arange(8192)), dim=1)
    generator = torch.Generator().manual_seed(0)
    # GPT-2's vocabulary, and one so large that the products wrap to negative numbers.
    for vocab in (50_257, 1_000_000):
        tokens = torch.randint(vocab, (3000,), generator=generator, dtype=torch.int32)
        begins = torch.rand(3000, generator=generator) < 0.1
        begins[0] = True
        *_, numbers = begin_stream(torch.zeros(3000, 12), tokens, begins, None, None, table, signs, ngram=2)
        token = tokens.tolist()
        before = [None if begin else token[t - 1] for t, begin in enumerate(begins.tolist())]
        assert numbers[:, 0].tolist() == [bigram_row(*pair, rows) for pair in zip(before, token)]
        assert numbers[:, 1].tolist() == [sign_row(*pair) for pair in zip(before, token)]
        grams = [[each, last] for each, last in zip(token, before)]
        for longest in 3, 4, 5:
            table_rows, sign_rows = ngram_rows(tokens, begins, (longest - 1) * rows, longest)
            earlier = [None if begin else gram[-1] for gram, begin in zip([None, *grams], begins.tolist())]
            grams = [[*gram, last] for gram, last in zip(grams, earlier)]
            expected = [(longest - 2) * rows + ngram_row(gram, rows) for gram in grams]
            assert table_rows[-1].tolist() == expected
            assert sign_rows[-1].tolist() == [ngram_sign(gram) for gram in grams]


def test_a_bos_and_the_first_position_take_the_last_bigram_row_and_the_first_sign_row():
    config = one_layer(Layer(attention=False), bigram=True)
    before = losses(random_model(config))
    for name, row in (("bigram_table", 15 * 128 - 1), ("bigram_signs", 0)):
        model = private_copy(config)
        model.state_dict()[name][row] *= -0.5
        changed = losses(model) != before
        same = [2, 9, 17, 23] if name == "bigram_signs" else []  # a token twice in a row has sign row 0, too
        assert [t for t in range(len(INPUTS)) if changed[t]] == sorted([0, 5, 6, 14, *same])


def test_only_the_first_channels_receive_the_bigram_embedding():
    model = private_copy(one_layer(Layer(attention=False), bigram=True))
    inputs, context = torch.tensor(INPUTS), context_of(model, len(INPUTS))
    model.mlp_bank.data.zero_()  # then nothing mixes channels but the norm, which keeps their ratios
    with_bigrams = model.stream(inputs, context)[:, 20:]
    model.bigram_table.data.zero_()
    without = model.stream(inputs, context)[:, 20:]
    assert torch.allclose(with_bigrams / with_bigrams[:, :1], without / without[:, :1], rtol=1e-4)
    assert not torch.allclose(with_bigrams, without, rtol=1e-2)


def test_the_first_layer_adds_the_bigram_embedding_once():
    # With attention and MLP silent and rho 1, the stream of one layer stays x0 + lambda b.
    model = private_copy(one_layer(Layer(), bigram=True))
    model.vo_bank.data.zero_()
    model.mlp_bank.data.zero_()
    for name, value in (("resid_lambdas", 1.0), ("x0_lambdas", 0.0), ("bigram_lambdas", 0.5)):
        getattr(model, name).data.fill_(value)
    x0 = norm(model.embed[3].double())
    b = model.bigram_table[-1].double() * model.bigram_signs[0]
    expected = norm(torch.cat((x0[:20] + 0.5 * b, x0[20:])))
    stream = model.stream(torch.tensor([3]), context_of(model, length=1))
    assert stream[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_yarn_of_one_growth_worked_by_hand():
    # 384 to 896 tokens: s = 3/7. A frequency f makes 384 f / 2 pi turns in the old window; from 32 turns on it stays,
    # up to 1 it shrinks by s. Of 1024^(-j / 31): 61.1 turns, 31.249, 10.216, 2.136 and 0.060.
    frequencies, scale = rotary_state(RECORD, 423)
    assert len(frequencies) == 32
    hand = {0: 1.0, 3: 0.504225, 8: 0.1000422, 15: 0.01570869, 31: 0.0004185268}
    assert {j: frequencies[j].item() for j in hand} == pytest.approx(hand, rel=1e-5)
    assert scale == pytest.approx(0.1169460, rel=1e-6)  # 0.1 (0.2 x 0.847298 + 1)


def test_yarn_follows_the_growth_of_the_long_window_and_not_the_final_validation():
    scales = {0: 0.1, 422: 0.1, 423: 0.1169460, 846: 0.1169460, 847: 0.1275175, 1269: 0.1275175, 1270: 0.1317780}
    assert {step: rotary_state(RECORD, step)[1] for step in scales} == pytest.approx(scales, rel=1e-6)
    assert rotary_state(RECORD, 422)[0].tolist() == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-5)
    slow = 2**-10 * 384 / 1664  # turns less than once in any of the windows
    assert rotary_state(RECORD, 1270)[0][[0, -1]].tolist() == pytest.approx([1, slow], rel=1e-5)
    # The validation at the end, after step 1,284.
    frequencies, scale = rotary_state(RECORD, 1285)
    assert torch.equal(frequencies, rotary_state(RECORD, 1270)[0]) and scale == rotary_state(RECORD, 1270)[1]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25), (1.0, 0.5, 0.0)])
def test_the_multi_token_loss_and_its_gradients_equal_autograds_over_the_plain_expression(weights):
    generator = torch.Generator().manual_seed(0)
    x, lm_head = torch.randn(9, 6, generator=generator), 4 * torch.randn(6, 11, generator=generator)
    for targets in ([3, 3, 3, 1, 0, 3, 10, 10, 2], [5] * 9):  # a target may come twice or thrice in a row
        mine = [t.clone().requires_grad_() for t in (x, lm_head)]
        loss = token_losses(*mine, torch.tensor(targets), torch.tensor(weights), torch.float32).sum()
        exact = [t.double().requires_grad_() for t in (x, lm_head)]
        expected = objective(23 * torch.sigmoid((exact[0] @ exact[1] + 5) / 7.5), targets, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for gradient, true in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, exact), strict=True):
            assert (gradient - true).abs().max() <= 1e-5 * true.abs().max()


def test_the_gradient_of_the_capped_loss_is_the_recipes_formula():
    targets, weights, columns = [2, 0, 0, 3], (1.0, 0.5, 0.25), 5
    logits = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)) * 6
    x = logits.clone().requires_grad_()
    token_losses(x, torch.eye(columns), torch.tensor(targets), torch.tensor(weights), x.dtype).sum().backward()
    for i in range(4):
        s = [1 / (1 + math.exp(-(logit + 5) / 7.5)) for logit in logits[i].tolist()]
        total = sum(math.exp(23 * each) for each in s)
        for column in range(columns):
            p = math.exp(23 * s[column]) / total
            hits = sum(w for k, w in enumerate(weights) if i + k < 4 and targets[i + k] == column)
            # At the end of the slice, too, the weights of all three targets count: 1.75.
            expected = 23 / 7.5 * s[column] * (1 - s[column]) * (1.75 * p - hits)
            assert x.grad[i, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (0, (1, 0.5, 0.25)),
        (141, (1, 0.5, 0.25 * 2 / 3)),
        (422, (1, 0.5, 0.25 / 423)),
        (423, (1, 0.5, 0)),
        (635, (1, 0.25, 0)),
        (846, (1, 0.5 / 424, 0)),
        (847, (1, 0, 0)),
        (1284, (1, 0, 0)),
    ],
)
def test_the_weights_of_the_next_targets_fall_over_each_stage(step, weights):
    assert schedule(RECORD, step).mtp == pytest.approx(weights, abs=1e-12)


def test_the_prefix_loss_and_its_gradients_equal_autograds_over_the_plain_expression():
    generator = torch.Generator().manual_seed(0)
    x, lm_head = torch.randn(9, 6, generator=generator), 4 * torch.randn(6, 11, generator=generator)
    targets, weights, prefix_weight = [3, 3, 4, 1, 0, 5, 10, 10, 2], (1.0, 0.5, 0.25), 0.125
    prefix_of = [-1, 0, 1, -1, 3, 10, 9, -1, -1, -1, 0]  # the last target has one; 10 is also the target after 5
    tables = torch.tensor(prefix_of), torch.tensor(prefix_weight)
    mine = [t.clone().requires_grad_() for t in (x, lm_head)]
    each = token_losses(*mine, torch.tensor(targets), torch.tensor(weights), torch.float32, *tables)
    without = token_losses(*mine, torch.tensor(targets), torch.tensor(weights), torch.float32)

    exact = [t.double().requires_grad_() for t in (x, lm_head)]
    z = 23 * torch.sigmoid((exact[0] @ exact[1] + 5) / 7.5)
    expected = objective(z, targets, weights)
    for i, target in enumerate(targets):
        added = torch.zeros(())
        if prefix_of[target] >= 0:
            added = prefix_weight * (z[i].exp().sum().log() - z[i, prefix_of[target]])
            expected = expected + added
        assert (each - without)[i].item() == pytest.approx(added.item(), abs=2e-5)
    assert each.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(each.sum(), mine), torch.autograd.grad(expected, exact)
    for gradient, true in zip(*gradients, strict=True):
        assert (gradient - true).abs().max() <= 1e-5 * true.abs().max()


def test_prefix_tokens_are_of_training_alone_and_without_a_table_or_a_weight_there_are_none():
    model = random_model(SMALL)
    inputs, targets = torch.tensor(INPUTS, dtype=torch.int32), torch.tensor(TARGETS)
    plain = context_of(model, len(INPUTS), weights=(1.0, 0.5))
    prefix_of, weight = torch.arange(61) - 1, torch.tensor(0.25)
    both = plain._replace(prefix_of=prefix_of, prefix_weight=weight)
    assert torch.equal(model.evaluate(inputs, targets, both), model.evaluate(inputs, targets, plain))
    objective = model(inputs, targets, plain).item()
    assert model(inputs, targets, both).item() > objective + 1
    assert model(inputs, targets, plain._replace(prefix_of=prefix_of)).item() == objective
    assert model(inputs, targets, plain._replace(prefix_weight=weight)).item() == objective


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0.25), (422, 0.25), (423, 0.25), (635, 0.125), (846, 0.25 / 424), (847, 0), (1270, 0), (1285, 0)],
)
def test_the_weight_of_the_prefix_stays_in_the_first_stage_and_falls_in_the_second(step, weight):
    assert schedule(RECORD, step).prefix == pytest.approx(weight, abs=1e-12)
    assert schedule(MINI, step * MINI.total_steps // 1285).prefix == 0


def test_the_prefix_of_a_token_is_the_longest_other_one_that_it_begins_with():
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(3, (2000, 9), generator=generator)
    sizes = torch.randint(1, 10, (2000,), generator=generator)
    texts = {bytes(row[:size].tolist()) for row, size in zip(letters, sizes)}  # bytes 0 to 2, and many prefixes
    vocabulary = sorted(texts - {b"\0"}, key=hash)  # in no order; of the single bytes one is missing
    table = prefix_table(vocabulary, vocab_size=len(vocabulary) + 1).tolist()
    assert len(table) == len(vocabulary) + 1 and table[-1] == -1  # BOS
    for number, text in enumerate(vocabulary):
        shorter = [other for other in vocabulary if text.startswith(other) and other != text]
        expected = vocabulary.index(max(shorter, key=len)) if shorter else -1
        assert table[number] == expected
    lengths = {len(vocabulary[n]) - len(vocabulary[t]) for n, t in enumerate(table[:-1]) if t >= 0}
    assert {1, 2, 3} <= lengths and sum(len(text) > 1 and t < 0 for text, t in zip(vocabulary, table)) > 0


def test_the_prefixes_of_gpt2s_tokens(monkeypatch):
    pytest.importorskip("tiktoken")
    beside = Path(__file__).resolve().parents[2] / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and not beside.is_dir():
        pytest.skip("no copy of GPT-2's vocabulary here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(beside)))
    vocabulary = gpt2_vocabulary()
    assert len(vocabulary) == 50256 and vocabulary[262] == b" the"
    table = prefix_table(vocabulary, vocab_size=50257).tolist()
    single = [number for number, text in enumerate(vocabulary) if len(text) == 1]
    assert len(single) == 256 and [n for n, t in enumerate(table) if t < 0] == [*single, 50256]
    number = {text: n for n, text in enumerate(vocabulary)}
    for text, prefix in (b" understanding", b" understand"), (b" the", b" th"), (b"ation", b"atio"), (b"\n\n", b"\n"):
        assert vocabulary[table[number[text]]] == prefix


@pytest.mark.parametrize("head_pairs", [True, False])
def test_q_and_k_are_orthogonalized_two_heads_at_a_time_or_whole(head_pairs):
    # 6 layers with attention, 4 heads of 8 rows.
    config = replace(SMALL, head_pairs=head_pairs, narrow_qk=False)
    model = private_copy(config)
    assert model.qk_bank.shape == ((24, 16, 32) if head_pairs else (12, 32, 32))
    generator = torch.Generator().manual_seed(0)
    for name in ("qk_bank", "vo_bank", "mlp_bank"):
        p = getattr(model, name)
        p.grad = torch.randn(p.shape, generator=generator)
    # Per layer the rows of all heads of Q, then of K; each matrix of 16 or 32 rows is orthogonalized by itself.
    matrices = model.qk_bank.grad.double().reshape(12, 32, 32)
    before = model.qk_bank.detach().double().reshape(12, 32, 32).clone()
    settings = replace(MINI, model=config, muon_lr=0.1, muon_wd=0.0)
    Optimizer(model, settings).step(schedule(settings, 0)._replace(lr=1.0, momentum=0.0, adam=False))
    steps = (before - model.qk_bank.detach().double().reshape(12, 32, 32)) / 0.1
    for step, gradient in zip(steps, matrices):
        for rows in (slice(0, 16), slice(16, 32)) if head_pairs else (slice(0, 32),):
            u, s, v = torch.linalg.svd(gradient[rows], full_matrices=False)
            expected = u @ v
            # One mean square a column of a wide matrix, a row of a square one.
            expected = expected / expected.square().mean(0 if head_pairs else 1, keepdim=True).sqrt()
            expected *= len(s) ** 0.5 / expected.norm()
            # Polar Express ends within about a tenth of this; other groups of rows are a quarter and more away.
            assert (step[rows] - expected).norm() <= 0.2 * expected.norm()


# ----------------------------------------------------------------------------------------------------------------------
# What makes it a valid model of the stream, with everything on and with each technique off
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", WITHOUT_ONE)
def test_a_token_reaches_no_earlier_loss_and_no_other_document(variant):
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    windows = (9, 50)
    before = losses(model, windows=windows)
    for t, token in enumerate(INPUTS):
        for other in {(token + 17) % BOS, BOS} - {token}:
            after = losses(model, [*INPUTS[:t], other, *INPUTS[t + 1 :]], windows=windows)
            for i in range(len(INPUTS)):
                if i < t or DOCS[i] != DOCS[t]:
                    assert before[i] == after[i], f"token {t} as {other} changes the loss of {i}"
            assert before[t] != after[t]


@pytest.mark.parametrize("variant", WITHOUT_ONE)
def test_probabilities_of_all_columns_sum_to_1(variant):
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    inputs = INPUTS[:9]
    total = sum((-losses(model, inputs, [column] * 9)).double().exp() for column in range(128))
    assert total.tolist() == pytest.approx([1] * 9, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The plain model, and the switches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_pairs", "shapes"), [(True, ((12, 16), (12, 8))), (False, ((6, 32), (6, 16)))])
def test_narrow_q_and_k_lie_in_a_bank_of_their_own(head_pairs, shapes):
    model = random_model(replace(SMALL, head_pairs=head_pairs))  # 3 layers with narrow heads of 4 rows, 3 with 8
    assert (model.qk_bank.shape[:2], model.narrow_qk_bank.shape[:2]) == shapes


def plain_gpt(config, p, tokens, targets, windows):
    """The loss of each token of a GPT without any technique, from its float64 parameters by name."""

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()

    T, D, H = len(tokens), config.dim, config.heads
    d = D // H
    docs = (tokens == config.bos_id).cumsum(0)
    back = torch.arange(T)[:, None] - torch.arange(T)
    angles = torch.arange(T)[:, None] * (1 / 1024) ** torch.linspace(0, 1, d // 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), -angles)[:, None]

    def rotary(x):  # (T, H, d)
        pairs = torch.view_as_complex(x[..., : d // 2].reshape(T, H, d // 4, 2))
        return torch.cat((torch.view_as_real(pairs * turn).flatten(2), x[..., d // 2 :]), dim=-1)

    x = x0 = norm(p["embed"][tokens])
    n = 0
    for i, layer in enumerate(config.layers):
        if layer.attention:
            w_q, w_k = p["qk_bank"].reshape(-1, D, D)[2 * n : 2 * n + 2] * p["qkv_lambdas"][n]
            w_v, w_o = p["vo_bank"][2 * n] * p["qkv_lambdas"][n], p["vo_bank"][2 * n + 1] * p["out_lambdas"][n]
            q, k, v = ((norm(x) @ w.T).reshape(T, H, d) for w in (w_q, w_k, w_v))
            scores = 0.1 * torch.einsum("ihc,jhc->hij", rotary(norm(q)), rotary(norm(k)))
            seen = (back >= 0) & (back <= windows[layer.window == "long"]) & (docs[:, None] == docs)
            y = torch.einsum("hij,jhc->ihc", scores.masked_fill(~seen, -math.inf).softmax(-1), v).reshape(T, D)
            x = p["resid_lambdas"][i, 0] * x + p["post_lambdas"][i, 0] * y @ w_o.T + p["x0_lambdas"][i] * x0
            n += 1
        mlp = torch.relu(norm(x) @ p["mlp_bank"][2 * i].T) ** 2 @ p["mlp_bank"][2 * i + 1]
        x = p["resid_lambdas"][i, 1] * x + p["post_lambdas"][i, 1] * mlp
    z = 23 * torch.sigmoid((norm(x) @ p["lm_head"] + 5) / 7.5)
    return torch.nn.functional.cross_entropy(z, targets, reduction="none")


TABLES = {"small": SMALL.layers, **{name: preset.model.layers for name, preset in PRESETS.items()}}


@pytest.mark.parametrize("layers", TABLES.values(), ids=TABLES)
def test_without_any_technique_the_losses_are_those_of_a_plain_gpt(layers):
    model = random_model(replace(SMALL, layers=layers, **PLAIN))
    assert len(inspect.getsource(plain_gpt).splitlines()) <= 40
    tokens, targets = torch.tensor(INPUTS), torch.tensor(TARGETS)
    mine = model.evaluate(tokens, targets, make_context(model.config, len(tokens), WINDOWS, model.embed))
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    assert mine.tolist() == pytest.approx(
        plain_gpt(model.config, parameters, tokens, targets, WINDOWS).tolist(), abs=TOLERANCE
    )


def parameter_count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def test_without_any_technique_the_record_has_the_parameters_of_a_plain_gpt():
    head = 768 * 50_304  # and as many in embed
    attention, mlp = 4 * 768 * 768, 8 * 768 * 768
    scalars = 11 * 2 + 11 * 2 + 11 + 10 + 10  # rho, pi, lambda_x0, lambda_qkv, lambda_o
    assert 2 * head + 10 * attention + 11 * mlp + scalars == 152_764_491
    assert parameter_count(replace(RECORD.model, **PLAIN)) == 152_764_491


# What the record loses in parameters, and whether the losses change, when a technique is switched off.
EFFECTS = {
    "smear": (12 + 1, True),
    "bigram": (377_280 * 768 + 9 * (64 + 1), True),  # nine layers' coefficients
    "value_embeds": (5 * 50_304 * 768 + 4 * 6 * 12, True),
    "paired_heads": (0, True),
    "narrow_qk": (-8 * 768 * 768, True),  # half of Q and K in eight layers, which the record has not
    "key_offset": (0, True),
    "xsa": (4 * 6 * (64 + 1), True),
    "attention_gate": (2 * 6 * (64 + 1), True),
    "dc": (2 * 6 * (64 + 1), True),
    "single_input": (0, True),
    "skip": (64 + 1 + 1, True),
    # Without it layer 10 has a gate of its own, and coefficients of x0 and the bigram.
    "mudd": (2 * 64 * 768 + 19 * 64 + 19 - 6 * 12 - 2 * (64 + 1), True),
    # Learned directly: x0, bigram, XSA, the skip, the heads' gates.
    "gates": (2 * 64 * 768 + 67 * (64 + 1) + 1 - (11 + 11 + 4 * 6 + 12 + 2 * 6 * 12), True),
    "head_pairs": (0, False),  # an affair of the optimizer's
}


@pytest.mark.recipe
def test_every_switch_of_the_model_is_accounted_for():
    assert set(EFFECTS) == set(SWITCHES)


@pytest.mark.parametrize("name", EFFECTS)
def test_a_switch_removes_its_parameters_and_changes_the_loss(name):
    parameters, changes_loss = EFFECTS[name]
    whole = replace(RECORD.model, narrow_qk=True)
    assert parameter_count(whole) - parameter_count(replace(whole, **{name: False})) == parameters
    on, off = (losses(random_model(config)) for config in (SMALL, replace(SMALL, **{name: False})))
    change = (on - off).abs().max()
    assert change > 0.01 if changes_loss else change < TOLERANCE


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("name", SWITCHES)
def test_the_command_line_switches_off_one_technique_of_the_model(preset, name):
    arguments = ["--preset", preset.preset, f"--{name.replace('_', '-')}", "false"]
    settings, _ = parse_arguments(arguments)
    assert settings == replace(preset, model=replace(preset.model, **{name: False}))
    settings, _ = parse_arguments([*arguments[:-1], "true"])
    assert settings == replace(preset, model=replace(preset.model, **{name: True}))


def record_without(name):
    """The recipe's record with one switch of its settings off, as the command line has it."""
    settings, _ = parse_arguments(["--preset", "record", f"--{name.replace('_', '-')}", "false"])
    assert settings == replace(PRESETS["record"], **{name: False})
    return replace(RECORD, **{name: False})


def test_without_yarn_frequencies_and_scale_stay():
    settings = record_without("yarn")
    for step in (0, 423, 847, 1270, 1285):
        frequencies, scale = rotary_state(settings, step)
        assert frequencies.tolist() == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-5)
        assert scale == 0.1
    assert settings.all_stages == RECORD.all_stages


def test_without_multi_token_prediction_only_the_next_target_counts():
    settings = record_without("multi_token")
    assert {schedule(settings, step).mtp for step in range(1285)} == {(1,)}
    for step in (0, 422, 423, 847, 1284):
        assert replace(schedule(settings, step).stage, mtp=()) == replace(schedule(RECORD, step).stage, mtp=())


def test_without_prefix_tokens_or_with_another_vocabulary_their_weight_is_0():
    assert RECORD.has_prefixes and not MINI.has_prefixes
    other = replace(RECORD, model=replace(RECORD.model, vocab_size=32_000, bos_id=1))
    for settings in record_without("prefix_tokens"), other:
        assert not settings.has_prefixes
        assert {schedule(settings, step).prefix for step in range(1285)} == {0}
        for stage, full in zip(settings.all_stages, RECORD.all_stages, strict=True):
            assert replace(stage, prefix=full.prefix) == full


def test_without_the_length_schedule_every_stage_has_the_last_ones_documents():
    settings = record_without("length_schedule")
    assert [stage.max_seq_len for stage in RECORD.all_stages] == [896, 2048, 2048, 2048]
    assert [stage.max_seq_len for stage in settings.all_stages] == [2048] * 4
    assert [replace(stage, max_seq_len=896) for stage in settings.all_stages] == [
        replace(stage, max_seq_len=896) for stage in RECORD.all_stages
    ]


def test_without_extension_windows_the_extension_keeps_the_last_stages():
    settings = record_without("extension_windows")
    assert [stage.windows for stage in settings.all_stages] == [(128, 384), (384, 896), (640, 1408), (640, 1408)]
    assert settings.total_steps == 1285 and settings.all_stages[:3] == RECORD.all_stages[:3]
    assert replace(settings.all_stages[3], windows=(768, 1664)) == RECORD.all_stages[3]
    assert rotary_state(settings, 1284)[1] == pytest.approx(0.1275175, rel=1e-6)  # YaRN has one growth less to follow
    assert final_windows(settings) == (768, 2560)


def final_windows(settings):
    """The windows of the validation after the last step."""
    return schedule(settings, settings.total_steps).stage.windows


def test_without_long_validation_the_final_windows_are_the_extensions():
    assert final_windows(RECORD) == (768, 2560)
    assert final_windows(record_without("long_validation")) == (768, 1664)
    assert record_without("long_validation").all_stages == RECORD.all_stages
    neither = replace(record_without("long_validation"), extension_windows=False)
    assert final_windows(neither) == (640, 1408)
