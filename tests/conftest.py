"""What all tests share: small runs, uncompiled and deterministic unless a test says otherwise."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Leaves slow tests out, unless the expression of -m says something about them."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True, scope="session")
def eager_and_deterministic():
    torch.set_num_threads(1)  # two would wait for each other over tensors this small
    torch.use_deterministic_algorithms(True)
    torch.compiler.set_stance("force_eager")


@pytest.fixture
def train_gpt(tmp_path):
    """Runs the command line `python train_gpt.py …` in an empty folder; returns the finished process."""

    def run(*arguments, processes: int = 1, cwd: Path = tmp_path, timeout: float = 300, **environment):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.run(
            [*command, str(ROOT / "train_gpt.py"), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
