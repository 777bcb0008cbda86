"""Training on a GPU: the losses of the CPU, no wait for the device in a step, no compilation in the loop."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipe
import shards
import train_gpt
from test_command_line import MAIN, RECIPE

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("compiled")
ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shards of random words, as options."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, documents in ("train", 1500), ("val", 200):
        words = [np.append(256, rng.integers(97, 105, rng.integers(50, 900))) for _ in range(documents)]
        shards.write_shard(folder / f"x_{name}_000000.bin", np.concatenate(words))
    return ("--train-files", f"{folder}/x_train_*.bin", "--val-files", f"{folder}/x_val_*.bin")


def losses(folder: Path, files, *options, **environment) -> dict[tuple[str, str], float]:
    folder.mkdir()
    command = [sys.executable, "-c", RECIPE + MAIN, "--preset", "mini", "--steps", "16"]
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command += [*files, *options, "--val-tokens", "16384", "--val-every", "4"]
    run = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"^step:(\d+)/16 (\w+):(\S+)", run.stdout, re.MULTILINE)
    return {(step, kind): float(loss) for step, kind, loss in lines}


def test_losses_are_those_of_the_cpu(files, tmp_path):
    expected = losses(tmp_path / "cpu", files, "--dtype", "float32", CUDA_VISIBLE_DEVICES="")
    for name, options, tolerance in (
        ("float32", ("--dtype", "float32"), 0.005),
        ("bf16", ("--fp8", "false"), 0.05),
        ("fp8", (), 0.05),
    ):
        got = losses(tmp_path / name, files, *options)
        assert got.keys() == expected.keys()
        for key, loss in got.items():
            assert loss == pytest.approx(expected[key], abs=tolerance), (name, key)


def test_a_step_does_not_wait_for_the_device_and_compiles_nothing():
    settings = replace(recipe.MINI, model=train_gpt.PRESETS["mini"].model)
    world = train_gpt.World(0, 1, CUDA)
    model, objective, optimizer = train_gpt.build(settings, world)
    train_gpt.warm_up(settings, model, objective, optimizer, world)
    begin, losses = train_gpt.mark(CUDA), []
    steps = (0, 1, 119, 120, 239, 240, 241)
    contexts, batches = [], []
    for step in steps:
        hyper, rotary = train_gpt.schedule(settings, step), train_gpt.rotary_state(settings, step)
        context = train_gpt.make_context(settings.model, 2048, hyper.stage.windows, model.embed, rotary)
        contexts.append(context._replace(mtp=torch.tensor(hyper.mtp, device=CUDA)))
        batches.append(torch.randint(257, (4, 2049), dtype=torch.int32, device=CUDA))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step, context, tokens in zip(steps, contexts, batches):
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss = train_gpt.train_step(objective, tokens, context, settings.slices)
                optimizer.step(train_gpt.schedule(settings, step)._replace(adam=step % 2 == 1))
                losses.append(train_gpt.batch_loss(loss, False, world))
                end = train_gpt.mark(CUDA)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert train_gpt.elapsed(begin, end) > 0
    assert all(pair.is_pinned() and np.isfinite(pair[0].item()) for pair in losses)
