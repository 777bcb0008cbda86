"""The steps that a GPU would run, on one that is not there: tensors have a device, a dtype and a shape, and no numbers.

So nothing can be computed from them, but an operation on two devices fails, and what would wait for the GPU is seen.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
from dataclasses import replace

import fake_cuda

fake_cuda.pretend(90)

import torch
from torch._subclasses import FakeTensorMode

import recipe
import train_gpt


def new_tensor(value, *, dtype=None, device="cpu", real=torch.tensor):
    made = real(value, dtype=dtype)
    return made if str(device) == "cpu" else torch.empty(made.shape, dtype=made.dtype, device=device)


def dispatch(mode, function, types, inputs=(), options=None, *, inner=FakeTensorMode.__torch_dispatch__):
    output = inner(mode, function, types, inputs, options)
    target = inputs[0] if function is torch.ops.aten.copy_.default else output
    from_gpu = any(isinstance(each, torch.Tensor) and each.is_cuda for each in inputs)
    if from_gpu and isinstance(target, torch.Tensor) and not target.is_cuda:
        non_blocking = (options or {}).get("non_blocking") or any(each is True for each in inputs[2:])
        to_cpu.add(f"{function} {'goes on' if non_blocking else 'waits'}")
    return output


class Stream:
    def record_event(self, event):
        return event


to_cpu = set()
torch.cuda.current_stream, torch.cuda.Event = Stream, lambda enable_timing: None
torch.tensor, FakeTensorMode.__torch_dispatch__ = new_tensor, dispatch
torch.compiler.set_stance("force_eager")
settings = replace(recipe.MINI, model=train_gpt.PRESETS["mini"].model)
world = train_gpt.World(0, 1, torch.device("cuda", 0))
dtype = train_gpt.choose_dtype(settings, world.device)
with fake_cuda.tensors():
    kernels = train_gpt.choose_kernels(settings, world.device, dtype)
    fp8 = train_gpt.choose_fp8(settings, world.device, dtype)
    model = fake_cuda.place(train_gpt.GPT(settings.model, dtype, kernels=kernels, fp8=fp8))
    optimizer = train_gpt.Optimizer(model, settings)
    tied = []
    for step in 0, 241:
        hyper, rotary = train_gpt.schedule(settings, step), train_gpt.rotary_state(settings, step)
        tokens = torch.zeros(2, 2049, dtype=torch.int32, pin_memory=True)
        context = train_gpt.make_context(settings.model, 2048, hyper.stage.windows, model.embed, rotary)
        context = context._replace(
            mtp=torch.tensor(hyper.mtp, device=world.device),
            prefix_of=torch.zeros(settings.model.vocab_size, dtype=torch.long, device=world.device),
        )
        tokens = tokens.to(world.device, non_blocking=True)
        loss = train_gpt.train_step(model, tokens, context, settings.slices)
        optimizer.step(hyper)
        train_gpt.batch_loss(loss, False, world), train_gpt.mark(world.device)
        tied.append(optimizer.tied)
    print(model.kernels, model.fp8, loss.device, loss.dtype, tied)
    print(*to_cpu)
    windows = train_gpt.schedule(settings, settings.total_steps).stage.windows
    context = train_gpt.make_context(settings.model, 16384, windows, model.embed)
    tokens = torch.zeros(16385, dtype=torch.int32, device=world.device)
    each = model.evaluate(tokens[:-1], tokens[1:].long(), context)
    print(each.device, each.dtype, tuple(each.shape))
"""


def test_a_step_on_a_gpu_is_all_on_the_gpu_and_waits_for_nothing():
    pytest.importorskip("triton")
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    folders = f"{ROOT}:{ROOT / 'bench'}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps, waits, validation = run.stdout.splitlines()
    assert steps == "True True cuda:0 torch.float32 [True, False]"
    copies = ["aten._to_copy.default goes on", "prims.device_put.default goes on"]  # of the loss, and of nothing else
    assert sorted(re.findall(r"\S+ (?:goes on|waits)", waits)) == copies
    assert validation == "cuda:0 torch.float32 (16384,)"


def test_a_gpu_whose_driver_does_not_fit_is_refused_and_not_the_cpu_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(train_gpt.UserError, match="install a newer NVIDIA driver"):
        train_gpt.find_device()


def test_a_process_for_which_there_is_no_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(train_gpt.UserError, match="process 3 of this node, but PyTorch sees 2 GPUs"):
        train_gpt.find_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiling works there")
def test_a_gpu_for_which_nothing_can_be_compiled_is_refused():
    with pytest.raises(train_gpt.UserError, match="torch.compile does not work, which needs gcc"):
        train_gpt.compile_or_not(True, torch.device("cuda"))
