"""What Inductor writes for a GPU, with numbers and without one: gpu/test_graphs.py on the emulated device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulated_gpu
from test_bench import half_hour

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    if what := emulated_gpu.missing():
        pytest.skip(f"emulating a GPU {what}")
    return emulated_gpu.compile_device(tmp_path_factory.mktemp("device"))


def run_graphs(device: Path, marker: str) -> None:
    environment = {**os.environ, "EMULATED_GPU": str(device), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-m", marker, "-p", "no:cacheprovider", "-p", "emulated_gpu", "--durations=0"]
    command = [sys.executable, "-m", "pytest", *options, TESTS / "gpu" / "test_graphs.py"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, (run.stdout + run.stderr)[-6000:]


def test_the_graphs_of_a_gpu_compute_what_the_cpu_does(device):
    run_graphs(device, "not slow")


@pytest.mark.slow
def test_the_graphs_of_a_gpu_in_fp8_compute_what_the_cpu_does(device):
    run_graphs(device, "slow")


@pytest.mark.slow
def test_a_gpus_half_hour_is_rehearsed(device, tmp_path):
    """Each part begins, and none fails; what takes longer than the limit is cut off."""
    environment = emulated_gpu.every_python(device)
    small = ("--dim", "128", "--heads", "2", "--slices", "64")
    results, _ = half_hour(tmp_path / "out", *small, PRESET="mini", STEPS="4", LIMIT="120", **environment)
    assert {results[part] for part in ("environment", "shards", "slices")} == {"ok"}
    assert set(results.values()) <= {"ok", "cut off after 120 s"}, results
