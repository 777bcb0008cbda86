"""What Inductor writes for a GPU against float64, float32 and the CPU: attention, training, validation, optimizers.

It runs on a GPU, and in the ordinary suite on an emulated one (test_emulated_gpu.py).
"""

import copy
from dataclasses import replace

import pytest
import torch

import recipe
import train_gpt

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("compiled")
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
# The table of `mini` with all it has, and half its width.
CONFIG = replace(train_gpt.PRESETS["mini"].model, dim=128, heads=2, bigram_rows=1, gates=True, narrow_qk=True)
MINI = replace(recipe.MINI, model=CONFIG)
LENGTH = 384  # three of FlexAttention's blocks
# Relative errors of gradients and updates: of banks and tables, and of what has few numbers. A bf16 has 8 bits, so that
# one part in 256 is lost at each rounding; where the CPU's bf16 (or FP8) is farther from float32, as with sums in which
# much cancels, twice as far is allowed.
LARGE, SMALL = 2.5e-2, 3e-2


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.cpu().double(), want.cpu().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def random_model(config, **options) -> train_gpt.GPT:
    """A model in which everything matters, in bf16 on the CPU."""
    torch.manual_seed(0)
    model = train_gpt.GPT(config, BF16, **options)
    for p in model.parameters():
        p.data += (0.1 if p.dtype == torch.float32 or p.numel() < 2000 else 0.02) * torch.randn_like(p)
    model.embed.data += torch.randn_like(model.embed)
    return model


def copy_of(model, **options) -> train_gpt.GPT:
    """The same model, with kernels or FP8."""
    other = train_gpt.GPT(model.config, model.embed.dtype, **options)
    other.load_state_dict(model.state_dict(), strict=False)  # FP8 has buffers of its own
    return other


def on_gpu(model, **options) -> train_gpt.GPT:
    gpu = copy_of(model, **options).to(CUDA)
    gpu.quantize_weights()
    return gpu


def sequence(config, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with documents of 1 token and more, whose borders lie within blocks of 128; and targets."""
    inputs = torch.randint(256, (length,), dtype=torch.int32)
    inputs[[0, 57, 130, 131, length // 2 + 45]] = config.bos_id
    return inputs, torch.randint(257, (length,))


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


@torch.compile(fullgraph=True, dynamic=False)
def flex(q, k, v, docs, window, scale):
    return train_gpt.attend((scale * q.float()).to(q.dtype), k, v, train_gpt.block_mask(docs, window))


def attention_by_pairs(q, k, v, docs, window, scale):
    """In float64, with a mask (T, T)."""
    i = torch.arange(len(q))
    allowed = (i <= i[:, None]) & (docs == docs[:, None]) & (i[:, None] - i <= window)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("window", "qk_dim"), [(64, 64), (300, 32)])
def test_flex_attention_and_its_gradients_are_those_of_all_pairs(window, qk_dim):
    torch.manual_seed(0)
    docs = (torch.rand(512) < 0.01).long().cumsum(0)
    q, k = (torch.randn(512, 2, qk_dim).to(BF16) for _ in range(2))
    v, upstream = (torch.randn(512, 2, 64).to(BF16) for _ in range(2))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    y = attention_by_pairs(*exact, docs, window, 0.12)
    want = y, *torch.autograd.grad(y, exact, upstream.double())
    inputs = [x.to(CUDA).requires_grad_() for x in (q, k, v)]
    y = flex(*inputs, docs.to(CUDA), torch.tensor(window, device=CUDA), torch.tensor(0.12, device=CUDA))
    got = y, *torch.autograd.grad(y, inputs, upstream.to(CUDA))
    for name, one, other in zip(("y", "dq", "dk", "dv"), got, want):
        assert error(one, other) < 0.01, name


def test_flex_attention_is_the_banded_attention():
    torch.manual_seed(0)
    docs = (torch.rand(384, device=CUDA) < 0.01).long().cumsum(0)
    q, k, v, upstream = (torch.randn(384, 2, 64, device=CUDA).to(BF16) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    scale = torch.tensor(0.12, device=CUDA)
    for window in 64, 300:
        by_blocks = flex(q, k, v, docs, torch.tensor(window, device=CUDA), scale)
        scaled = (scale * q.float()).to(BF16)
        banded = train_gpt.banded_attend(scaled, k, v, train_gpt.banded_mask(docs, window))
        for one, other in zip(
            (by_blocks, *torch.autograd.grad(by_blocks, (q, k, v), upstream)),
            (banded, *torch.autograd.grad(banded, (q, k, v), upstream)),
        ):
            assert error(one, other) < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# The graphs
# ----------------------------------------------------------------------------------------------------------------------


def loss_and_gradients(model, objective, inputs, targets):
    device = model.embed.device
    context = train_gpt.make_context(model.config, len(inputs), (64, 256), model.embed)
    context = context._replace(mtp=torch.tensor([1.0, 0.5, 0.25], device=device))
    loss = objective(inputs.to(device), targets.to(device), context)
    loss.backward()
    gradients = {}
    for name, _ in model.named_parameters():
        gradients[name] = model.gradient(name).clone()
        model.clear_gradient(name)
    return loss.item() / len(inputs), gradients


def fp8_on_cpu(patch) -> None:
    """Puts PyTorch in place of what a CPU lacks: of the kernels, and of products of 8 bits."""

    def scaled_mm(a, b, a_scale, b_scale, fast=True):
        return (a.float() @ b.float().T * (a_scale * b_scale)).to(BF16)

    def loss_op(logits, targets, weights, fp8, *prefix):
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            no_product = torch.eye(logits.size(1), dtype=logits.dtype)
            losses = train_gpt.token_losses(logits, no_product, targets, weights, torch.float32, *prefix)
            (grads,) = torch.autograd.grad(losses.sum(), logits)
        return losses.detach(), (grads.float() / train_gpt.LOGIT_GRAD_SCALE).to(torch.float8_e5m2)

    patch.setattr(train_gpt, "mlp_tiles", lambda a, b: None)
    patch.setattr(train_gpt, "scaled_mm", scaled_mm)
    patch.setattr(train_gpt, "transposed", lambda x: x.T.contiguous())
    patch.setattr(train_gpt, "loss_op", loss_op)
    patch.setattr(train_gpt, "add_rows", lambda out, rows, values: out.index_add_(0, rows, values))


def errors_of_cpu(model, inputs, targets, **options) -> dict[str, float]:
    """Of each gradient in bf16 on the CPU, the largest of four models that differ by a rounding: one may be lucky.

    With options for the kernels and FP8, of gradients in FP8.
    """
    errors = {}
    for _ in range(4):
        nearly = copy.deepcopy(model)
        for p in nearly.parameters():
            p.data *= 1 + 2**-9 * torch.randn_like(p)
        exact, rounded = copy.deepcopy(nearly).float(), copy_of(nearly, **options)
        rounded.quantize_weights()
        (_, want), (_, got) = (loss_and_gradients(each, each, inputs, targets) for each in (exact, rounded))
        for name in want:
            errors[name] = max(errors.get(name, 0), error(got[name], want[name]))
    return errors


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"kernels": True},
        pytest.param({"kernels": True, "fp8": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "kernels", "FP8"],
)
def test_loss_and_gradients_of_training_are_the_cpus(options, monkeypatch):
    model = random_model(CONFIG)
    inputs, targets = sequence(model.config, LENGTH)
    fp8 = "fp8" in options
    with torch.compiler.set_stance("force_eager"), monkeypatch.context() as patch:
        exact = copy.deepcopy(model).float()
        loss, want = loss_and_gradients(exact, exact, inputs, targets)
        if fp8:
            fp8_on_cpu(patch)
        errors = errors_of_cpu(model, inputs, targets, **options if fp8 else {})
    gpu = on_gpu(model, **options)
    got_loss, got = loss_and_gradients(gpu, torch.compile(gpu, dynamic=False, fullgraph=True), inputs, targets)
    assert got_loss == pytest.approx(loss, abs=2e-3)
    for name, grad in got.items():
        bound = LARGE
        if fp8 or model.table[name].kind not in ("bank", "table"):
            bound = max(SMALL, 2 * errors[name])
        assert error(grad, want[name]) < bound, name


def test_losses_of_validation_are_the_cpus():
    model = random_model(CONFIG)
    inputs, targets = sequence(model.config, LENGTH)

    def losses(model):
        context = train_gpt.make_context(model.config, len(inputs), (64, 256), model.embed)
        return model.evaluate(inputs.to(model.embed.device), targets.to(model.embed.device), context).cpu()

    with torch.compiler.set_stance("force_eager"):
        want, low = losses(copy.deepcopy(model).float()), losses(model)
    got = losses(on_gpu(model))
    assert got.mean().item() == pytest.approx(want.mean().item(), abs=2e-3)
    assert (got - want).square().mean().sqrt() < 1.5 * (low - want).square().mean().sqrt()


def updates(model, gradients) -> dict[str, torch.Tensor]:
    """What three steps change: one of NorMuon alone, one with the embedding tied, one that unties it."""
    optimizer = train_gpt.Optimizer(model, MINI)
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, gradient in zip((0, 1, 241), gradients):
        for name, p in model.named_parameters():
            grad = gradient[name].clone().to(p.device, p.dtype)  # tied, the head's takes in embed's
            gathered = model.gradient(name)
            if gathered is None:
                p.grad = grad
            else:
                gathered += grad
        optimizer.step(train_gpt.schedule(MINI, step))
    changes = {}
    for name, p in model.named_parameters():
        value, low = p.data, optimizer.state[name].get("low")
        if low is not None:
            value = train_gpt.join_float32(p.data.cpu(), low.cpu())
        changes[name] = value.cpu().float() - begin[name].cpu().float()
        for key, state in optimizer.state[name].items():
            if key != "low":
                changes[f"{name}.{key}"] = state.cpu().float()
    return changes


def test_updates_of_both_optimizers_over_the_untying_are_the_cpus():
    model = random_model(CONFIG)
    exact, gpu = copy.deepcopy(model).float(), on_gpu(model)
    gradients = [{name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()} for _ in range(3)]
    with torch.compiler.set_stance("force_eager"):
        want, low = updates(exact, gradients), updates(model, gradients)
    for name, change in updates(gpu, gradients).items():
        bound = max(LARGE, 2 * error(low[name], want[name]))
        assert error(change, want[name]) < bound, name
