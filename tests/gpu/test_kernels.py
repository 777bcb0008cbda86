"""Every kernel equals its plain expression: on a GPU, or in the interpreter (see test_interpreted_kernels.py)."""

import functools
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import recipe
import train_gpt

triton = pytest.importorskip("triton")
tl = triton.language
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter itself")
BF16, FLOAT32, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2

if INTERPRETED:
    import interpreter

    interpreter.patch()


@pytest.fixture(autouse=True)
def small_device(monkeypatch):
    """In the interpreter a pretended device of three multiprocessors, with tiles so small that sizes have several."""
    torch.manual_seed(0)
    if not INTERPRETED:
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
        return
    gpu = SimpleNamespace(major=9, multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(train_gpt, "SYMMETRIC_TILES", (16, 16, 2, 4))
    monkeypatch.setattr(train_gpt, "MLP_TILES", {9: (16, 32, 16, 2, 4)})
    yield


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh tensors hold NaN, so that what a kernel does not write is seen."""

    def poisoned(make):
        @functools.wraps(make)
        def call(*args, **options):
            tensor = make(*args, **options)
            if tensor.dtype in (E4M3, E5M2):
                tensor.view(torch.uint8).fill_(127)
            elif tensor.is_floating_point():
                tensor.fill_(torch.nan)
            return tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@interpreted
def test_the_patched_interpreter_rounds_as_torch_does_for_all_values():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    halves = bits.view(BF16)
    between = torch.cat([(bits.int() << 16 | low).view(FLOAT32) for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    for values, target in ((halves, FLOAT32), (between, BF16), (halves, E4M3), (halves, E5M2), (between, E5M2)):
        values = values[values.float().isfinite() & (values.float().abs() <= 448)]
        out = torch.empty(len(values), dtype=target)
        copy_kernel[(triton.cdiv(len(values), 1024),)](values, out, len(values), BLOCK=1024)
        expected = values.to(target)
        assert torch.equal(out.float(), expected.float())


@triton.jit
def copy_kernel(source, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + i, i < n).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), i < n)


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    here = i[:, None] * N + i
    tl.store(out + here, tl.dot(tl.load(a + here), tl.load(b + here)))


@interpreted
@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2])
def test_the_patched_interpreter_multiplies_values_not_bits(dtype):
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, (a.double() @ b.double()).float())


SIZES = [(1, 16, 16), (2, 33, 50), (3, 50, 33), (2, 1, 7), (1, 97, 16)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count, rows, cols", SIZES)
def test_symmetric_product_equals_float64_and_is_exactly_symmetric(count, rows, cols, transposed):
    a = torch.randn(count, rows, cols).to(BF16)
    a = a.mT.contiguous().mT if transposed else a
    gram = train_gpt.symmetric_op(a)
    expected = a.double() @ a.double().mT
    torch.testing.assert_close(gram.double(), expected, rtol=2**-8, atol=1e-5)
    assert torch.equal(gram, gram.mT)
    poly = train_gpt.symmetric_op(gram, alpha=0.5, beta=-2.0)
    expected = 0.5 * gram.double() @ gram.double() - 2 * gram.double()
    torch.testing.assert_close(poly.double(), expected, rtol=2**-8, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(poly, poly.mT)


def test_symmetric_kernel_in_float32():
    a = torch.randn(2, 33, 50)
    torch.testing.assert_close(train_gpt.symmetric_op(a), a @ a.mT)


def test_polar_express_with_the_kernels_makes_matrices_as_orthogonal_as_without():
    for shape in (2, 24, 40), (2, 40, 24):
        u = torch.randn(shape)
        x, plain = train_gpt.polar_express(u, BF16, kernels=True), train_gpt.polar_express(u, FLOAT32)
        torch.testing.assert_close(x.float(), plain, rtol=0, atol=0.03)


MLP_SIZES = pytest.mark.parametrize("rows, inner, columns", [(16, 16, 32), (50, 48, 80), (7, 64, 144), (1, 16, 16)])


@MLP_SIZES
def test_mlp_kernel_equals_the_plain_expression(rows, inner, columns):
    x, w = torch.randn(rows, inner).to(BF16), torch.randn(columns, inner).to(BF16) / inner**0.5
    post = train_gpt.relu_squared_matmul(x, w)
    product = x.double() @ w.double().T
    torch.testing.assert_close(post.double(), F.relu(product).square(), rtol=2**-7, atol=1e-6)
    grads = train_gpt.relu_squared_gradient(x, w, post)
    torch.testing.assert_close(grads.double(), 2 * product * post.double().sqrt(), rtol=2**-7, atol=1e-5)


@MLP_SIZES
@pytest.mark.parametrize("headroom", [1.8, 0.5])
@pytest.mark.parametrize("kernel", [True, False])
def test_mlp_in_8_bits_stores_the_square_in_bf16_and_in_e4m3_and_finds_its_maximum(
    rows, inner, columns, headroom, kernel, monkeypatch
):
    """By the kernel, and as older GPUs do it. With a headroom of 0.5 the largest squares are clipped."""
    x, x_scale = train_gpt.quantize_to_fit(torch.randn(rows, inner).to(BF16) * torch.rand(rows, 1), (1,))
    w, w_scale = train_gpt.quantize_to_fit(torch.randn(columns, inner).to(BF16), (0, 1))
    assert x_scale.shape == (rows, 1) and (x.float().abs().amax(1) == 448).all()
    square = F.relu(x.double() @ w.double().T * x_scale * w_scale).square()
    scale = (square.max() * headroom / 448).float()
    if not kernel:
        monkeypatch.setattr(train_gpt, "MLP_TILES", {})
    post, post8, maxima = train_gpt.relu_squared_fp8(x, w, x_scale, w_scale, scale)
    assert (post.dtype, post8.dtype) == (BF16, E4M3) and post.shape == post8.shape == square.shape
    # The plain form rounds to bf16 before the square, too, and so before the maximum.
    torch.testing.assert_close(post.double(), square, rtol=2**-7 if kernel else 2**-6, atol=1e-6)
    assert maxima.max().item() == pytest.approx(square.max().item(), rel=1e-5 if kernel else 2**-6)
    assert (maxima >= 0).all()
    # e4m3 has 3 stored bits of mantissa, and steps of 2^-9 below 2^-6.
    expected = (square / scale.double()).clamp(max=448)
    torch.testing.assert_close(post8.double(), expected, rtol=2**-4 * (1.01 if kernel else 1.2), atol=2**-10 * 1.01)
    assert (post8.float().max() == 448) == (headroom < 1)


def test_without_descriptors_the_mlp_is_the_same(monkeypatch):
    x, w = torch.randn(50, 48).to(BF16), torch.randn(80, 48).to(BF16)
    post = train_gpt.relu_squared_matmul(x, w)
    grads = train_gpt.relu_squared_gradient(x, w, post)
    monkeypatch.setattr(train_gpt, "MLP_TILES", {})
    torch.testing.assert_close(train_gpt.relu_squared_matmul(x, w), post, rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(train_gpt.relu_squared_gradient(x, w, post), grads, rtol=2**-6, atol=1e-2)


def plain_mlp(x, w_in, w_out):
    return F.relu(x @ w_in.T).square() @ w_out


@pytest.mark.parametrize("fp8", [False, True])
def test_mlp_and_its_gradients(fp8):
    """In bf16 against autograd in float64; in 8 bits against the same with quantized inputs of both products."""
    x, w_in, w_out = torch.randn(48, 32), torch.randn(80, 32) / 6, torch.randn(80, 32) / 9
    given = [each.to(BF16).requires_grad_() for each in (x, w_in, w_out)]
    eight, post_scale = (), torch.tensor(0.2)
    if fp8:
        w_in8, w_in_scale = train_gpt.quantize_to_fit(given[1].detach(), (0, 1))
        w_out8, w_out_scale = train_gpt.quantize_to_fit(given[2].detach(), (0, 1))
        eight = train_gpt.MLP8(w_in8, w_in_scale, w_out8.T.contiguous(), w_out_scale, post_scale)
    y, maxima = train_gpt.MLP.apply(*given, *eight)
    upstream = torch.randn(48, 32).to(BF16)
    grads = torch.autograd.grad(y, given, upstream)

    x, w_in, w_out = (each.detach().double().requires_grad_() for each in given)
    first = x, w_in
    if fp8:  # the values are rounded, the gradients pass
        largest = x.detach().abs().amax(1, keepdim=True).float() / 448  # of each row
        eights = emulated(x.detach(), largest), emulated(w_in.detach())
        first = [each + (eight - each.detach()) for each, eight in zip(first, eights)]
    pre = first[0] @ first[1].T
    post = F.relu(pre).square()
    expected = post @ w_out
    if fp8:
        expected = emulated(post.detach(), post_scale) @ emulated(w_out.detach())
        assert maxima.max().item() == pytest.approx(post.max().item(), rel=1e-3)
    pre_grad = 2 * (upstream.double() @ w_out.T) * F.relu(pre)
    manual = pre_grad @ w_in, pre_grad.T @ x, post.T @ upstream.double()
    torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=0.02)
    for one, other in zip(grads, manual):
        torch.testing.assert_close(one.double(), other, rtol=2**-5, atol=0.02 * other.abs().max().item())
    if not fp8:
        for one, other in zip(torch.autograd.grad(expected, (x, w_in, w_out), upstream.double()), manual):
            torch.testing.assert_close(one, other)


def emulated(x, scale=None, dtype=E4M3, largest=448):
    """x quantized and back, in float64."""
    scale = x.abs().max().float().clamp(min=1e-12) / largest if scale is None else scale
    return (x.float() / scale).clamp(-largest, largest).to(dtype).double() * scale


def plain_losses(logits, targets, weights, rounded=None, prefix_of=None, prefix_weight=0.0):
    """The losses by the formula in float64, one by one; the sigmoid may be rounded in value (gradients pass)."""
    s = torch.sigmoid((logits + 5) / 7.5)
    if rounded is not None:
        s = s + (rounded.double() - s).detach()
    z = 23 * s
    losses = []
    for i in range(len(z)):
        loss = sum(weights) * z[i].logsumexp(-1)
        for k, weight in enumerate(weights):
            if i + k < len(targets):
                loss = loss - weight * z[i, targets[i + k]]
        if prefix_of is not None and prefix_of[targets[i]] >= 0:
            loss = loss + prefix_weight * (z[i].logsumexp(-1) - z[i, prefix_of[targets[i]]])
        losses.append(loss)
    return torch.stack(losses)


cap_sigmoid = train_gpt.cap_sigmoid


@triton.jit
def sigmoid_kernel(logits, out, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = cap_sigmoid(tl.load(logits + places, places < count, 0), 5, 7.5)
    tl.store(out + places, s, places < count)


def sigmoids(logits):
    """The loss kernel's sigmoids, float32, of logits in bf16: by the GPU's tanh."""
    out = torch.empty_like(logits, dtype=FLOAT32)
    sigmoid_kernel[(triton.cdiv(logits.numel(), 1024),)](logits, out, logits.numel(), BLOCK=1024)
    return out


def test_the_sigmoid_by_the_gpus_tanh_is_a_bf16_next_to_the_exact_one():
    logits = torch.cat((torch.linspace(-120, 120, 9999), torch.tensor([-torch.inf, torch.inf, 0]))).to(BF16)
    got, exact = sigmoids(logits).double(), torch.sigmoid((logits.double() + 5) / 7.5)
    assert torch.equal(got, got.to(BF16).double())
    # Half a unit in the last of 8 bits, and what tanh, of 11, leaves open of a half.
    assert ((got - exact).abs() <= 2**-8 * exact + 2**-12).all()
    assert got[-3:-1].tolist() == [0, 1]  # what the kernel relies on for columns that are not there


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens, vocab", [(1, 48), (9, 4224), (13, 4096), (6, 10000)])
def test_loss_and_its_gradient_equal_float64_autograd_column_by_column(tokens, vocab, fp8):
    logits = (4 * torch.randn(tokens, vocab)).to(BF16)
    targets = torch.randint(vocab, (tokens,))
    targets[1:3] = targets[0]  # the same target more than once in a row's next ones
    targets[-1] = vocab - 1
    weights = torch.tensor([1.0, 0.5, 0.25])
    losses, grads = train_gpt.loss_op(logits, targets, weights, fp8)
    assert grads.dtype == (E5M2 if fp8 else BF16)

    exact = logits.double().requires_grad_()
    rounded = sigmoids(logits)
    expected = plain_losses(exact, targets.tolist(), weights.tolist(), rounded)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    # The derivative of the sigmoid takes its rounded value too.
    z = (23 * rounded.double()).requires_grad_()
    total = sum(
        (weights.double().sum() * z[i].logsumexp(-1))
        - sum(weights[k].double() * z[i, targets[i + k]] for k in range(3) if i + k < tokens)
        for i in range(tokens)
    )
    (z_grad,) = torch.autograd.grad(total, z)
    expected = z_grad * 23 / 7.5 * rounded.double() * (1 - rounded.double())
    got = grads.double() * (train_gpt.LOGIT_GRAD_SCALE if fp8 else 1)
    # Half a unit in the last place: 2 stored bits of mantissa in e5m2, 7 in bf16; below, the smallest subnormal.
    rtol = 2**-3 if fp8 else 2**-8
    atol = 2**-17 * train_gpt.LOGIT_GRAD_SCALE if fp8 else 1e-6 / tokens
    torch.testing.assert_close(got, expected, rtol=rtol * 1.001, atol=atol * 1.001)


@pytest.mark.parametrize("fp8", [False, True])
def test_prefixes_add_their_loss_and_gradient_and_nothing_where_there_is_none(fp8):
    vocab, weights = 4224, (1.0, 0.5, 0.25)
    last = vocab - 1
    # Targets without a prefix; with one that is the next target, at the end of a block of columns and at the start of
    # another, in the last column and in the first; and the last target of all has one.
    targets = [5, 6, 7, 8, 9, 10, 7, last]
    prefix_of = torch.full((vocab,), -1)
    prefix_of[[6, 7, 8, 9, 10, last]] = torch.tensor([7, 4095, 4096, last, 0, 3])
    logits = (4 * torch.randn(8, vocab)).to(BF16)
    arguments = logits, torch.tensor(targets), torch.tensor(weights), fp8
    losses, grads = train_gpt.loss_op(*arguments, prefix_of, torch.tensor(0.125))

    rounded = sigmoids(logits)
    expected = plain_losses(logits.double(), targets, weights, rounded, prefix_of.tolist(), 0.125)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    # The formula: 23 / 7.5 s (1 - s) (S p - the weights that ask for the column), S being the sum of all weights.
    s = rounded.double()
    asked, total = torch.zeros_like(s), torch.full((8, 1), sum(weights)).double()
    for i in range(8):
        for k, weight in enumerate(weights[: 8 - i]):
            asked[i, targets[i + k]] += weight
        if (prefix := prefix_of[targets[i]]) >= 0:
            asked[i, prefix] += 0.125
            total[i] += 0.125
    expected = 23 / 7.5 * s * (1 - s) * (total * (23 * s).softmax(-1) - asked)
    got = grads.double() * (train_gpt.LOGIT_GRAD_SCALE if fp8 else 1)
    rtol = 2**-3 if fp8 else 2**-8
    atol = 2**-17 * train_gpt.LOGIT_GRAD_SCALE if fp8 else 1e-7
    torch.testing.assert_close(got, expected, rtol=rtol * 1.001, atol=atol * 1.001)

    # With a weight of 0, or no prefix, bit for bit what it is without.
    without, without_grads = train_gpt.loss_op(*arguments)
    same = [bool(losses[i] == without[i] and (grads[i].float() == without_grads[i].float()).all()) for i in range(8)]
    assert same == [prefix_of[target] < 0 for target in targets]
    losses, grads = train_gpt.loss_op(*arguments, prefix_of, torch.tensor(0.0))
    assert torch.equal(losses, without) and torch.equal(grads.float(), without_grads.float())


@pytest.mark.parametrize("dim", [20, 256, 300])
def test_rows_are_added_once_for_each_token_that_looked_them_up(dim):
    # 200 times the same row, more than the kernel takes at once, the last row, and rows that nobody looked up.
    rows = torch.cat((torch.randint(40, (100,)), torch.full((200,), 7), torch.tensor([63])))
    rows = rows[torch.randperm(len(rows))]
    values, before = torch.randn(len(rows), dim).to(BF16), torch.randn(64, dim).to(BF16)
    exact = before.double().index_add(0, rows, values.double())
    out = before.clone()
    train_gpt.add_rows(out, rows.int(), values)
    # One rounding, at the end, to 8 bits; float32 sums before.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
    untouched = torch.isin(torch.arange(64), rows, invert=True)
    assert untouched.sum() > 20 and torch.equal(out[untouched], before[untouched])


def test_what_was_looked_up_gives_its_gradient_to_the_tables_own():
    table, grad = torch.randn(50, 16).to(BF16).requires_grad_(), torch.zeros(50, 16, dtype=BF16)
    rows, upstream = torch.randint(50, (3, 40)), torch.randn(3, 40, 16).to(BF16)
    for _ in range(2):
        looked_up = train_gpt.look_up(table, rows, grad)
        assert torch.equal(looked_up, table[rows])
        looked_up.backward(upstream)
    assert table.grad is None
    (once,) = torch.autograd.grad(table.double()[rows], table, upstream.double())
    torch.testing.assert_close(grad.double(), 2 * once.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("fp8", [False, True])
def test_head_equals_its_emulation(fp8):
    """Loss and gradients against products in float64 of the quantized values, and a gradient from outside of 1/4."""
    x, head = torch.randn(32, 48).to(BF16), (0.1 * torch.randn(48, 128)).to(BF16)
    targets, weights = torch.randint(128, (32,)), torch.tensor([1.0, 0.5, 0.0])
    given = [each.clone().requires_grad_() for each in (x, head)]
    prefixes = torch.randint(-1, 128, (128,)), torch.tensor(0.25)
    loss = train_gpt.Head.apply(*given, targets, weights, fp8, *prefixes)
    grads = torch.autograd.grad(loss / 4, given)

    x, head = x.double(), head.double()
    if fp8:
        x, head = emulated(x, 100 / 448), emulated(head, 1.6 / 448)
    logits = (x @ head).to(BF16)
    losses, logit_grads = train_gpt.loss_op(logits, targets, weights, fp8, *prefixes)
    torch.testing.assert_close(loss.item(), losses.sum().item(), rtol=1e-3, atol=0)
    logit_grads = logit_grads.double() / 4 * (0.75 / 448 if fp8 else 1)
    for one, other in zip(grads, (logit_grads @ head.T, x.T @ logit_grads)):
        assert one.dtype == BF16
        torch.testing.assert_close(one.double(), other, rtol=2**-6, atol=0.01 * other.abs().max().item())


@pytest.mark.parametrize("rows, columns", [(1, 1), (64, 64), (65, 130), (200, 3)])
def test_transposes(rows, columns):
    for dtype in BF16, E4M3, E5M2, torch.uint8:
        source = torch.randint(100, (rows, columns)).to(dtype)
        out = train_gpt.transposed(source)
        assert torch.equal(out.float(), source.T.float())
    source, out = torch.randn(rows, columns).to(BF16), torch.randn(columns, rows).to(BF16)
    expected = (out.float() + source.T.float()).to(BF16)
    train_gpt.transpose_into(out, source, add=True, kernels=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_whole_model_with_the_kernels_is_one_graph_with_the_plain_loss_and_gradients(fp8, monkeypatch):
    """As on CUDA, but for the attention; against float32 without kernels.

    Gradients of some scalars nearly cancel, so that bf16 alone leaves little of them: where bf16
    without kernels is off by more, the kernels may be off by twice as much.
    """
    torch.manual_seed(1)
    config = replace(recipe.MINI.model, dim=96, heads=4, bigram_dim=16)
    exact = train_gpt.GPT(config)
    rounded = train_gpt.GPT(config, BF16)
    model = train_gpt.GPT(config, BF16, kernels=True, fp8=fp8)
    with torch.no_grad():
        # Drawn by name, so that the order of the table of parameters does not change what is tested.
        for name, p in sorted(rounded.named_parameters()):
            p += 0.02 * torch.randn_like(p)
            exact.get_parameter(name).copy_(p)
            model.get_parameter(name).copy_(p)
    model.quantize_weights()
    inputs = torch.randint(config.vocab_size, (64,), dtype=torch.int32)
    targets = torch.randint(config.vocab_size, (64,))
    prefix_of = torch.arange(config.vocab_size) - 1
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    losses, largest, plain = [], [], train_gpt.relu_squared

    def noting(x):
        largest.append(plain(x).max().item())
        return plain(x)

    monkeypatch.setattr(train_gpt, "relu_squared", noting)
    for each in exact, rounded, compiled:
        context = train_gpt.make_context(config, 64, (16, 32), each.embed)
        context = context._replace(mtp=torch.tensor([1.0, 0.5, 0.25]))
        context = context._replace(prefix_weight=torch.tensor(0.25), prefix_of=prefix_of)
        with torch.compiler.set_stance("default" if each is compiled and fp8 else "force_eager"):
            loss = each(inputs, targets, context)
            loss.backward()
        losses.append(loss.item())
    if fp8:  # the next pass's scales, by the largest squares of this one
        expected = [1.8 / 448 * each for each in largest[: len(config.layers)]]
        assert model.post_scale.tolist() == pytest.approx(expected, rel=0.1)
    assert losses[2] == pytest.approx(losses[0], rel=0.01)
    for name, _ in model.named_parameters():
        true = exact.gradient(name)
        own = (rounded.gradient(name) - true).norm() / true.norm()
        error = (model.gradient(name) - true).norm() / true.norm()
        assert error <= max(0.25 if fp8 else 0.14, 2 * own), (name, error, own)
