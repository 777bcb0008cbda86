"""CUDA compiles the whole model as one graph, which is traced on the CPU here; the CPU compiles regions by length."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import train_gpt

CONFIG = replace(train_gpt.PRESETS["mini"].model, dim=64, heads=4, bigram_dim=16, gates=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = train_gpt.GPT(CONFIG)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(length: int = 256):
    inputs = torch.randint(CONFIG.vocab_size, (length,), dtype=torch.int32)
    inputs[[0, 57, 130, 131]] = CONFIG.bos_id
    return inputs, torch.randint(CONFIG.vocab_size, (length,))


def test_the_model_with_every_technique_is_one_graph_with_the_same_loss_and_gradients(model):
    inputs, targets = tokens()
    context = train_gpt.make_context(CONFIG, len(inputs), (64, 128), model.embed)
    context = context._replace(mtp=torch.tensor([1.0, 0.5, 0.25]))
    expected = model(inputs, targets, context)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
        loss = compiled(inputs, targets, context)
        compiled_gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    for one, other in zip(compiled_gradients, gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_with_flex_attention_a_change_of_windows_weights_and_yarn_is_no_new_graph(model, monkeypatch):
    """As on CUDA: block masks, and windows that are tensors. Its loss is that of banded attention."""
    inputs, targets = tokens()
    expected, contexts = [], []
    prefix_of = torch.arange(CONFIG.vocab_size) - 1
    for windows, mtp, prefix, scale in (
        ((32, 64), [1.0, 0.5, 0.25], 0.25, 0.1),
        ((64, 200), [1.0, 0.0, 0.0], 0.0, 0.13),
    ):
        context = train_gpt.make_context(CONFIG, len(inputs), windows, model.embed)
        context = context._replace(mtp=torch.tensor(mtp), scale=torch.tensor(scale))
        context = context._replace(prefix_weight=torch.tensor(prefix), prefix_of=prefix_of)
        with torch.no_grad():
            expected.append(model(inputs, targets, context).item())
        contexts.append(context._replace(windows=tuple(torch.tensor(window) for window in windows)))

    def mask(docs, window, size=None, banded_mask=train_gpt.banded_mask):
        return banded_mask(docs, window, size) if size else train_gpt.block_mask(docs, window)

    monkeypatch.setattr(train_gpt, "banded_mask", mask)
    with torch.compiler.set_stance("default"), torch.no_grad():
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
        losses = [compiled(inputs, targets, context).item() for context in contexts]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert counter.frame_count == 1


def test_no_length_or_option_uses_up_the_graphs_of_another(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    last = train_gpt.region(lambda x, times=2: times * x[-1])
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True),
    ):
        for length in 16, 24, 32:
            for times in 3, 4:
                assert last(torch.arange(float(length)), times=times) == times * (length - 1)
            assert last(torch.arange(float(length))) == 2 * (length - 1)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            last(torch.arange(32.0), 3)
