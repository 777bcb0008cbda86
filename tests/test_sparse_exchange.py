"""The bigram table's gradient, exchanged row by row, is the reduce-scattered one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import sys
import torch
import torch.distributed as dist
import train_gpt as t
from recipe import MINI
from dataclasses import replace

torch.compiler.set_stance("force_eager")
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()

def reduced(optimizer, grad):
    # This rank's part of the mean, as it comes to the update.
    optimizer.params["bigram_table"].grad = grad.clone()
    return optimizer.finish_reduction(optimizer.launch_reduction("bigram_table"))

for dtype in (torch.float32, torch.bfloat16):
    config = replace(MINI.model, dim=32, heads=4, bigram_dim=8)
    settings = replace(MINI, model=config, slices=size)
    torch.manual_seed(0)
    model = t.GPT(config, dtype, size)
    context = t.make_context(config, 192, (32, 64), model.embed)
    both = [t.Optimizer(model, replace(settings, sparse_exchange=sparse), rank, size) for sparse in (True, False)]
    assert [optimizer.sparse for optimizer in both] == [True, False]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):  # Adam's gradients are those of two steps
        # Of 8 tokens, so that every rank and both steps share most of their rows, and a rank repeats its own.
        tokens = torch.randint(250, 258, (1, 193), generator=generator, dtype=torch.int32) % 257
        both[0].touched.append(t.touched_rows(tokens, config))
        t.train_step(model, tokens, context, size)
    grad = model.bigram_table.grad
    touched = torch.cat(both[0].touched).unique()
    assert 20 < len(touched) < 66 and set(grad.abs().sum(1).nonzero()[:, 0].tolist()) <= set(touched.tolist())
    sparse, dense = (reduced(optimizer, grad) for optimizer in both)
    assert sparse.dtype == dense.dtype == dtype and sparse.shape == dense.shape
    everywhere = [torch.zeros_like(grad) for _ in range(size)]
    dist.all_gather(everywhere, grad)
    exact = torch.stack(everywhere).double().mean(0)[rank * len(sparse) : (rank + 1) * len(sparse)]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (sparse - exact).abs().max() <= tolerance * exact.abs().max(), "the sparse exchange is not the mean"
    assert (dense - exact).abs().max() <= 3 * tolerance * exact.abs().max(), "the dense exchange is not the mean"
    norms = torch.tensor([sparse.abs().sum(), 0.0])
    dist.all_reduce(norms)
    assert norms[0] > 0
    assert not both[0].touched, "the rows are forgotten once their gradient has been used"
dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_sparse_and_dense_exchange_of_the_bigram_gradient_give_the_mean(processes, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "worker.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
