"""Attention: masks, banded attention and FlexAttention against a dense masked softmax in float64; rotary embedding.

The rule, from which all that is expected here is worked out pair by pair: query i sees key j when j <= i, both are of
the same document, and i - j <= window.
"""

import cmath
import collections
import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from train_gpt import (
    BLOCK,
    DC_WINDOW,
    ModelConfig,
    attend,
    banded_mask,
    block_mask,
    compose_heads,
    make_context,
    project,
    rotary_frequencies,
)

SCALE = 0.3


def allowed_pairs(docs, window):
    """The rule, as a (T, T) table of queries and keys."""
    i, j = torch.arange(len(docs))[:, None], torch.arange(len(docs))[None, :]
    return (j <= i) & (docs[i] == docs[j]) & (i - j <= window)


def dense_attention(q, k, v, allowed):
    """Masked softmax attention of q, k, v (T, H, d), with every pair written out, in the inputs' dtype."""
    logits = SCALE * torch.einsum("ihc,jhc->hij", q, k)
    weights = logits.exp() * allowed
    return torch.einsum("hij,jhc->ihc", weights / weights.sum(-1, keepdim=True), v)


def random_docs(length, boundaries, generator):
    """Document numbers (T,); `boundaries` is the chance that a token begins a document."""
    return (torch.rand(length, generator=generator) < boundaries).long().cumsum(0)


def random_qkv(length, generator, heads=2, dim=16):
    return [torch.randn(length, heads, dim, generator=generator) for _ in range(3)]


def assert_equals_dense_attention(docs, window, generator):
    qkv = [x.requires_grad_() for x in random_qkv(len(docs), generator)]
    q, k, v = qkv
    output = attend(SCALE * q, k, v, banded_mask(docs, window))
    weight = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad((output * weight).sum(), qkv)

    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = dense_attention(*exact, allowed_pairs(docs, window))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), exact)
    for what, mine, true in zip("oqkv", (output, *gradients), (expected, *expected_gradients), strict=True):
        error = (mine.double() - true).abs().max().item()
        assert error <= 1e-5, f"{what}: {error:.1e} with window {window} and documents {docs.tolist()}"


# ----------------------------------------------------------------------------------------------------------------------
# Banded attention
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "window", "boundaries"),
    [
        (1, 1, 0.0),
        (2, 1, 0.0),
        (40, 1, 0.1),
        (40, 8, 0.0),  # whole chunks, one document
        (43, 8, 0.0),  # the last chunk is not full
        (43, 8, 0.1),
        (41, 40, 0.0),
        (40, 40, 0.1),
        (39, 40, 0.1),  # window beyond the sequence
        (30, 1000, 0.1),
        (33, 7, 1.0),  # documents of one token
        (33, 7, 0.6),
        (150, 64, 0.02),
    ],
)
def test_banded_attention_and_its_gradients_equal_dense_masked_softmax(length, window, boundaries):
    generator = torch.Generator().manual_seed(length + window)
    docs = random_docs(length, boundaries, generator)
    assert_equals_dense_attention(docs, window, generator)


def test_banded_attention_and_its_gradients_equal_dense_masked_softmax_for_random_shapes():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        length, window = (int(torch.randint(1, most, (), generator=generator)) for most in (80, 40))
        boundaries = float(torch.rand((), generator=generator)) ** 3
        assert_equals_dense_attention(random_docs(length, boundaries, generator), window, generator)


@pytest.mark.parametrize("boundaries", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("length", [1, 5, 112, 113, 300])
def test_composed_heads_and_their_gradients_equal_a_dense_mixture_of_the_heads_probabilities(length, boundaries):
    heads, dim, scale = 3, 8, 0.4
    generator = torch.Generator().manual_seed(length)
    docs = (torch.rand(length, generator=generator) < boundaries).cumsum(0)
    y, q, k, v = (torch.randn(length, heads, dim, generator=generator) for _ in range(4))
    w_in, w_out = (torch.randn(length, heads, generator=generator) for _ in range(2))
    mine = [tensor.clone().requires_grad_() for tensor in (y, q, k, v, w_in, w_out)]
    y, q, *rest = mine
    out = compose_heads(y, scale * q, *rest, banded_mask(docs, DC_WINDOW - 1, DC_WINDOW))

    exact = [tensor.double().requires_grad_() for tensor in (y, q, k, v, w_in, w_out)]
    y, q, k, v, w_in, w_out = exact
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < 112) & (docs[:, None] == docs)
    p = (scale * torch.einsum("ihc,jhc->hij", q, k)).masked_fill(~seen, -torch.inf).softmax(-1)
    shares = w_in / (w_in.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = y + w_out[:, :, None] * torch.einsum("ig,gij,jhc->ihc", shares, p, v)
    assert (out - expected).abs().max() <= 1e-5
    weights = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad((out * weights).sum(), mine)
    for gradient, true in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert (gradient - true).abs().max() <= 2e-5 * max(1, true.abs().max())


def test_numbers_of_a_masked_key_are_never_read():
    generator = torch.Generator().manual_seed(0)
    docs, window = random_docs(50, 0.1, generator), 6
    q, k, v = random_qkv(50, generator)
    before = attend(q, k, v, banded_mask(docs, window))
    k[20], v[20] = 1e4, 1e4
    after = attend(q, k, v, banded_mask(docs, window))
    sees = allowed_pairs(docs, window)[:, 20]
    assert torch.equal(before[~sees], after[~sees])
    assert not torch.isclose(before[sees], after[sees]).all(dim=(1, 2)).any()


# ----------------------------------------------------------------------------------------------------------------------
# FlexAttention. Uncompiled, it ignores the lists of blocks and asks the rule about every pair; so the lists are tested
# by brute force and by compiled runs, and the rule by uncompiled ones. On CPUs it has no backward pass.
# ----------------------------------------------------------------------------------------------------------------------


def listed_blocks(counts, indices):
    """The (query block, key block) pairs of one of a BlockMask's two lists."""
    rows = [indices[0, 0, row, :count].tolist() for row, count in enumerate(counts[0, 0].tolist())]
    pairs = [(row, column) for row, columns in enumerate(rows) for column in columns]
    assert len(set(pairs)) == len(pairs), "a block is listed twice"
    return set(pairs)


def partial_and_full_blocks(mask):
    partial = listed_blocks(mask.kv_num_blocks, mask.kv_indices)
    full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    # The backward pass goes by columns: the same blocks, a key block's query blocks at a time.
    assert {(row, column) for column, row in listed_blocks(mask.q_num_blocks, mask.q_indices)} == partial
    assert {(row, column) for column, row in listed_blocks(mask.full_q_num_blocks, mask.full_q_indices)} == full
    return partial, full


def blocks_by_brute_force(docs, window):
    """Blocks with an allowed pair, and blocks off the diagonal with no forbidden one, by looking at all pairs.

    A last block that is not whole counts as full when it would be, were its document longer.
    """
    count = math.ceil(len(docs) / BLOCK)
    filled = torch.cat((docs, docs[-1:].expand(count * BLOCK - len(docs))))
    allowed = allowed_pairs(filled, window).numpy()
    real = np.zeros_like(allowed)
    real[: len(docs), : len(docs)] = True
    blocks = (count, BLOCK, count, BLOCK)
    some = (allowed & real).reshape(blocks).any(axis=(1, 3))
    whole = allowed.reshape(blocks).all(axis=(1, 3))
    return {(r, c) for r, c in np.argwhere(some).tolist()}, {(r, c) for r, c in np.argwhere(whole).tolist() if r != c}


@pytest.mark.parametrize("length", [1, 127, 128, 129, 512, 571])
def test_block_mask_lists_exactly_the_blocks_with_an_allowed_pair_and_as_full_those_without_a_forbidden_one(length):
    generator = torch.Generator().manual_seed(length)
    for boundaries in (0.0, 0.003, 0.01, 0.1, 1.0):
        for window in (1, 2, 127, 128, 129, 130, 254, 255, 256, 257, 384, 1000):
            docs = random_docs(length, boundaries, generator)
            partial, full = partial_and_full_blocks(block_mask(docs, torch.tensor(window)))
            some, whole = blocks_by_brute_force(docs, window)
            assert partial | full == some, f"window {window}, documents {docs.tolist()}"
            assert full == whole, f"window {window}, documents {docs.tolist()}"
            assert not partial & full


def test_documents_that_begin_and_end_with_a_block_share_no_block():
    docs = torch.arange(4).repeat_interleave(BLOCK)
    partial, full = partial_and_full_blocks(block_mask(docs, torch.tensor(1000)))
    assert (partial, full) == ({(0, 0), (1, 1), (2, 2), (3, 3)}, set())
    docs = torch.arange(4).repeat_interleave(BLOCK)[1:]  # now each has one token in the block of the one before
    partial, full = partial_and_full_blocks(block_mask(docs, torch.tensor(1000)))
    assert partial | full == {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 100, 1000])
def test_flex_attention_with_the_rule_of_block_mask_equals_dense_masked_softmax(window):
    generator = torch.Generator().manual_seed(window)
    docs = random_docs(300, 0.02, generator)
    q, k, v = random_qkv(300, generator)
    output = attend(SCALE * q, k, v, block_mask(docs, torch.tensor(window)))
    expected = dense_attention(q.double(), k.double(), v.double(), allowed_pairs(docs, window))
    assert (output - expected).abs().max() <= 1e-5


compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def run_compiled(q, k, v, mask):
    """FlexAttention on q, k, v (T, H, d), compiled: the kernel that walks the lists of blocks."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    with torch.compiler.set_stance("default"), torch.no_grad():
        return compiled_flex_attention(q, k, v, block_mask=mask, scale=SCALE)[0].transpose(0, 1)


@pytest.mark.parametrize("length", [3 * BLOCK, 2 * BLOCK + 44])
def test_compiled_flex_attention_with_block_mask_equals_dense_masked_softmax(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = random_qkv(length, generator)
    for boundaries in (0.0, 0.004, 0.1, 1.0):
        for window in (1, 100, 129, 255, 300, 1000):
            docs = random_docs(length, boundaries, generator)
            output = run_compiled(q, k, v, block_mask(docs, torch.tensor(window)))
            expected = dense_attention(q.double(), k.double(), v.double(), allowed_pairs(docs, window))
            assert (output - expected).abs().max() <= 1e-5, f"window {window}, documents {docs.tolist()}"


def without_block(mask, row, column):
    """A copy of the mask in whose lists the block (row, column) is missing."""
    lists = []
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for counts, indices in pairs:
        counts, indices = counts.clone(), indices.clone()
        columns = indices[0, 0, row, : counts[0, 0, row]].tolist()
        if column in columns:
            columns.remove(column)
            counts[0, 0, row] -= 1
            indices[0, 0, row, : len(columns)] = torch.tensor(columns, dtype=indices.dtype)
        lists += [counts, indices]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths)


def test_compiled_flex_attention_needs_every_block_of_the_lists():
    length, window = 3 * BLOCK, 300  # the corner of the lower triangle is partial, the blocks beside the diagonal full
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(length, generator)
    docs = torch.zeros(length, dtype=torch.long)
    mask = block_mask(docs, torch.tensor(window))
    expected = dense_attention(q.double(), k.double(), v.double(), allowed_pairs(docs, window))
    partial, full = partial_and_full_blocks(mask)
    assert (partial, full) == ({(0, 0), (1, 1), (2, 2), (2, 0)}, {(1, 0), (2, 1)})
    for row, column in partial | full:
        error = (run_compiled(q, k, v, without_block(mask, row, column)) - expected).abs().amax(dim=(1, 2))
        here = torch.arange(length) // BLOCK == row
        assert not (error[here] <= 1e-3).all(), f"block {row, column} was not needed"
        assert (error[~here] <= 1e-5).all(), f"block {row, column} was needed by other queries"


def test_new_windows_and_documents_compile_nothing_anew():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def masked_attention(q, k, v, docs, window):
        return flex_attention(q, k, v, block_mask=block_mask(docs, window), scale=SCALE)

    compiled = torch.compile(masked_attention, backend=backend, dynamic=False, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(2 * BLOCK, generator)
    for window in (1, 100, 200, 1000):
        docs = random_docs(2 * BLOCK, 0.02, generator)
        with torch.compiler.set_stance("default"), torch.no_grad():
            output = compiled(*(x.transpose(0, 1)[None] for x in (q, k, v)), docs, torch.tensor(window))
        expected = dense_attention(q.double(), k.double(), v.double(), allowed_pairs(docs, window))
        assert (output[0].transpose(0, 1) - expected).abs().max() <= 1e-5
        assert len(graphs) == 1
    # Compiled for CUDA, the sort of so short rows is one kernel, over which Triton sits for minutes.
    assert not any("sort" in str(node.target) for node in graphs[0].graph.nodes)


# ----------------------------------------------------------------------------------------------------------------------
# QK norm and rotary embedding
# ----------------------------------------------------------------------------------------------------------------------


def test_rotary_frequencies_fall_geometrically_from_1_to_1_in_1024():
    frequencies = rotary_frequencies(ModelConfig((), dim=128, heads=1)).tolist()
    assert frequencies == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-6)
    assert (frequencies[0], frequencies[-1]) == pytest.approx((1, 1 / 1024), rel=1e-6)
    frequencies = rotary_frequencies(ModelConfig((), dim=24, heads=2)).tolist()
    assert frequencies == pytest.approx([1, 1 / 32, 1 / 1024], rel=1e-6)


def norm_and_rotate(x):
    """q and k of projections x (T, 2H, d), side by side, as plain heads have them: after QK norm and rotary."""
    length, heads, dim = x.shape
    context = make_context(ModelConfig((), dim=dim, heads=1, attention_scale=1), length, (1, 1), x)
    begins = torch.arange(length) == 0
    # Attention's input is the norm of (1, 0, …), (0, 1, 0, …), …, out of which W_qk makes the projections.
    a = torch.eye(length)
    w = collections.defaultdict(lambda: None)
    w["qkv"] = torch.cat((x.flatten(1).T / length**0.5, torch.zeros(length, length)))
    q, k, *_ = project(a, None, begins, context[:3], w, heads // 2, offset=False, paired=False)
    return torch.cat((q, k), dim=1)


def test_one_rotation_worked_by_hand():
    # (3, 4, 0, …) of eight has mean square 25 / 8: its norm is (1.69706, 2.26274, 0, …); it turns by one radian back.
    x = torch.tensor([3.0, 4, 0, 0, 0, 0, 0, 0]).repeat(2, 2, 1)
    x[1, 1, 7] = 5 * 3**0.5  # of the half that stays: now the mean square is 100 / 8, and the norm is half as long
    rotated = norm_and_rotate(x)
    assert rotated[0, 0].tolist() == pytest.approx([1.697056, 2.262742, 0, 0, 0, 0, 0, 0], abs=1e-5)
    cos, sin = 0.5403023, 0.8414710
    even, odd, last = 0.848528, 1.131371, 2.449490
    turned = [cos * even + sin * odd, cos * odd - sin * even]
    assert rotated[1, 1].tolist() == pytest.approx([*turned, 0, 0, 0, 0, 0, last], abs=1e-5)
    assert turned == pytest.approx([1.410475, -0.102732], abs=1e-5)


def test_the_first_half_of_the_normed_channels_turns_as_complex_numbers_and_the_second_stays():
    length, heads, dim = 10, 4, 24
    x = 3 * torch.randn(length, heads, dim, generator=torch.Generator().manual_seed(0))
    x[4] *= 1e-4  # so small that the norm's epsilon counts
    rotated = norm_and_rotate(x)
    for t in range(length):
        for h in range(heads):
            channels = x[t, h].tolist()
            size = math.sqrt(sum(c * c for c in channels) / dim + 2**-23)
            normed = [c / size for c in channels]
            expected = normed[:]
            for j in range(dim // 4):
                turn = cmath.exp(-1j * t * 1024 ** (-j / (dim // 4 - 1)))
                turned = complex(normed[2 * j], normed[2 * j + 1]) * turn
                expected[2 * j : 2 * j + 2] = turned.real, turned.imag
            assert rotated[t, h].tolist() == pytest.approx(expected, abs=2e-6)
