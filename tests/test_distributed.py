"""The same run on 1, 2, 3 and 4 processes (gloo, float32): tokens, gradients, losses, and how such a run ends.

Each rank of a run is a process of its own that calls `main`, with a few functions wrapped to note what they saw. Only
where torchrun itself matters is it used: it takes seconds to start.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run

import shards
from test_command_line import (  # noqa: F401 (a fixture)
    MAIN,
    ROOT,
    RULE,
    SMALL,
    STEPS,
    VALIDATION,
    enough,
    random_documents,
    shared_launcher,
)

# 48 is a multiple of 2, 3 and 4; with 3 processes every bank is padded.
MODEL = ("--compile", "false", "--dtype", "float32", "--dim", "48", "--heads", "2", "--bigram-dim", "16")
MODEL += ("--gates", "true")

# Notes, by rank: what `train_step` got and gave, the gradients that the first update used, and the weights it left.
NOTING = """
all_stages(batch_tokens=768)
notes = {"tokens": [], "losses": [], "validations": [], "own": {}, "reduced": {}, "first": {}, "last": {}}

def copies(params, grad=False):
    tensors = {name: p.grad if grad else p.detach() for name, p in params.items()}
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

def noting_loop(original, *args):
    wrap(train_gpt, "train_step", noting_step)
    wrap(train_gpt, "validate", noting_validation)
    wrap(train_gpt.Optimizer, "update", noting_update)
    wrap(train_gpt.Optimizer, "step", noting_optimizer)
    try:
        return original(*args)
    finally:
        torch.save(notes, f"notes_{os.environ['RANK']}.pt")

def noting_step(original, *args):
    notes["tokens"].append(next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2).clone())
    notes["losses"].append(original(*args))
    return notes["losses"][-1]

def noting_validation(original, *args):
    notes["validations"].append(original(*args))
    return notes["validations"][-1]

def noting_update(original, self, name, grad, *args):
    if not notes["first"]:
        notes["reduced"][name] = grad.detach().clone()
    return original(self, name, grad, *args)

def noting_optimizer(original, self, *args):
    if not notes["first"]:
        notes["own"] = copies(self.params, grad=True)
    try:
        original(self, *args)
    finally:
        notes["first"] = notes["first"] or copies(self.params)
        notes["last"] = copies(self.params)

wrap(train_gpt, "loop", noting_loop)
"""

# One step, without a warm-up, in which Adam takes part too, so that every gradient is used.
ONE_STEP = """
def one_step(original, *args):
    original(*args)
    sys.exit()
wrap(train_gpt, "schedule", lambda original, *args: original(*args)._replace(adam=True))
wrap(train_gpt.Optimizer, "step", one_step)
train_gpt.warm_up = lambda *args: None
"""


@pytest.fixture(scope="session")
def launcher():
    return shared_launcher()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shards.write_shard(folder / "x_train_000001.bin", random_documents(1, 60_000))
    shards.write_shard(folder / "x_train_000002.bin", random_documents(2, 60_000))
    shards.write_shard(folder / "x_val_000000.bin", random_documents(3, 4000))
    return ("--train-files", folder / "x_train_*.bin", "--val-files", folder / "x_val_*.bin")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def start(launcher, files):
    """Starts the ranks of a run, as torchrun would."""

    def start(world_size, folder, *arguments, before=""):
        folder.mkdir(exist_ok=True)
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        options = ("--preset", "mini", *MODEL, *VALIDATION, *files, *arguments)
        return [
            launcher.start(SMALL + before + MAIN, *options, cwd=folder, RANK=str(r), LOCAL_RANK=str(r), **environment)
            for r in range(world_size)
        ]

    return start


@pytest.fixture(scope="module")
def noted(start, tmp_path_factory):
    """The notes of all ranks of a run, kept for the tests that ask for the same."""
    kept = {}

    def noted(world_size, slices, steps, before=""):
        key = world_size, slices, steps, before
        if key not in kept:
            folder = tmp_path_factory.mktemp("noted")
            arguments = ("--slices", slices, "--steps", steps, "--run-id", "noted")
            for running in start(world_size, folder, *arguments, before=NOTING + before):
                result = running.wait()
                assert result.returncode == 0, result.stderr
            kept[key] = [torch.load(folder / f"notes_{rank}.pt") for rank in range(world_size)]
            kept[key][0]["log"] = (folder / "logs" / "noted.txt").read_text()
        return kept[key]

    return noted


# ----------------------------------------------------------------------------------------------------------------------
# The same mathematics
# ----------------------------------------------------------------------------------------------------------------------


# Slices and number of processes. Where they are equal, the bigram gradient is exchanged row by row.
RUNS = [(4, 2), (4, 4), (6, 3)]


def relative_error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("slices, world_size", RUNS)
def test_ranks_see_the_tokens_of_one_process_in_the_same_slices(slices, world_size, noted):
    how = (20, "") if slices == 4 else (4, ONE_STEP)
    alone, ranks = noted(1, slices, *how), noted(world_size, slices, *how)
    assert len(alone[0]["tokens"]) == (20 if slices == 4 else 1)
    for step, tokens in enumerate(alone[0]["tokens"]):
        assert torch.equal(torch.cat([rank["tokens"][step] for rank in ranks]), tokens)
        assert tokens.shape == (slices, 768 // slices + 1)
        assert all(len(rank["tokens"][step]) == slices // world_size for rank in ranks)


@pytest.mark.parametrize("slices, world_size", RUNS)
def test_first_gradients_are_the_mean_over_ranks_and_those_of_one_process(slices, world_size, noted):
    alone, ranks = noted(1, slices, 4, ONE_STEP), noted(world_size, slices, 4, ONE_STEP)
    assert set(alone[0]["reduced"]) == set(alone[0]["own"]) - {"embed"} and len(alone[0]["own"]) > 10
    for name, expected in alone[0]["reduced"].items():
        own = [rank["own"][name].double() for rank in ranks]
        if name == "lm_head":  # the embedding is its transpose at first
            own = [grad + rank["own"]["embed"].double().T for grad, rank in zip(own, ranks)]
        parts = [rank["reduced"][name] for rank in ranks]
        shared_out = parts[0].shape != own[0].shape
        reduced = torch.cat(parts) if shared_out else parts[0]
        if not shared_out:
            assert all(torch.equal(part, parts[0]) for part in parts), name
        mean = sum(own) / world_size
        if not mean.any():
            assert not reduced.any() and not expected.any(), name
            continue
        assert relative_error(reduced, mean) <= 1e-6, name
        assert not reduced[len(expected) :].any(), name  # the padding of a bank
        # A sixth, unlike a quarter, is no power of two: with other groups of slices every product rounds otherwise.
        assert relative_error(reduced[: len(expected)], expected) <= (1e-6 if slices == 4 else 1e-5), name
        # A sum in place of the mean would be seen.
        assert relative_error(sum(own)[: len(expected)], expected) > 0.5, name


def test_gradients_are_shared_out_and_padded_where_they_should_be(noted):
    """The test above compares what it thinks it compares."""
    alone, ranks = noted(1, 6, 4, ONE_STEP)[0], noted(3, 6, 4, ONE_STEP)[0]
    for name in ("qk_bank", "vo_bank", "mlp_bank", "lm_head", "value_embeds", "bigram_table"):
        assert len(ranks["reduced"][name]) * 3 == len(ranks["own"][name]), name
    assert any(len(ranks["own"][name]) > len(alone["own"][name]) for name in ("qk_bank", "vo_bank", "mlp_bank"))
    for name in ("resid_lambdas", "qkv_lambdas", "value_gates"):
        assert ranks["reduced"][name].shape == alone["own"][name].shape, name


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_of_20_steps_are_those_of_one_process(world_size, noted):
    alone, ranks = noted(1, 4, 20)[0], noted(world_size, 4, 20)
    losses = sum(np.array([loss.item() for loss in rank["losses"]]) for rank in ranks)
    expected = np.array([loss.item() for loss in alone["losses"]])
    assert len(expected) == 20 and np.ptp(expected) > 0.2  # it trains
    assert np.abs(losses - expected).max() <= 1e-5
    for rank in ranks:
        assert np.abs(np.array(rank["validations"]) - alone["validations"]).max() <= 1e-5
    for log in (alone["log"], ranks[0]["log"]):
        logged = [float(loss) for loss in re.findall(r"^step:\d+/20 train_loss:(\S+)", log, re.MULTILINE)]
        assert np.abs(logged - expected).max() <= 0.5e-4 + 1e-5


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("moment", ["first", "last"])
def test_all_ranks_hold_the_same_weights_after_an_update(moment, world_size, noted):
    ranks = noted(world_size, 4, 20)
    for name, value in ranks[0][moment].items():
        for rank in ranks[1:]:
            assert torch.equal(rank[moment][name], value), name
    assert any(not torch.equal(ranks[0]["last"][name], value) for name, value in ranks[0]["first"].items())


# What is off at first; embedding tables are updated in steps 2, 4, 8, 12, …, and the last eight steps are averaged.
LEADS = """
leads = {"polar_steps": 6, "slow_momentum": 0.98, "average_steps": 148, "tables_every": 2, "tables_from": 74}
train_gpt.PRESETS["mini"] = dataclasses.replace(train_gpt.PRESETS["mini"], **leads)
"""


def test_two_ranks_have_the_losses_and_weights_of_one_also_with_what_is_off_at_first(noted):
    """With as many slices as ranks, so that the bigram table's rows of several steps are exchanged at once."""
    alone, ranks = noted(1, 2, 20, LEADS)[0], noted(2, 2, 20, LEADS)
    losses = sum(np.array([loss.item() for loss in rank["losses"]]) for rank in ranks)
    expected = np.array([loss.item() for loss in alone["losses"]])
    assert len(expected) == 20 and np.abs(losses - expected).max() <= 1e-5
    plain = noted(1, 2, 20)[0]
    for name, value in alone["last"].items():
        for rank in ranks:
            assert torch.equal(rank["last"][name], ranks[0]["last"][name]), name
        assert relative_error(ranks[0]["last"][name][: len(value)], value) <= 1e-4, name
        if name in ("qk_bank", "vo_bank", "mlp_bank", "bigram_table", "value_embeds"):
            assert relative_error(plain["last"][name], value) > 1e-2, name
    for rank in ranks:
        assert np.abs(np.array(rank["validations"]) - alone["validations"]).max() <= 1e-5


def test_ranks_that_begin_with_other_weights_take_those_of_rank_0(start, noted, tmp_path):
    other = """
wrap(torch, "manual_seed", lambda original, seed: original(seed + 1000 * int(os.environ["RANK"])))
"""
    for running in start(2, tmp_path, "--slices", 4, "--steps", 4, before=NOTING + ONE_STEP + other):
        result = running.wait()
        assert result.returncode == 0, result.stderr
    ranks, expected = [torch.load(tmp_path / f"notes_{rank}.pt") for rank in range(2)], noted(2, 4, 4, ONE_STEP)
    for rank, its in zip(ranks, expected):
        assert rank["losses"] == its["losses"]
        for name, value in its["first"].items():
            assert torch.equal(rank["first"][name], value), name


# ----------------------------------------------------------------------------------------------------------------------
# The same end
# ----------------------------------------------------------------------------------------------------------------------


def counting(world_size, signalled, name, step=3):
    """Each rank writes down its steps; in one step of one rank a signal comes. The others are slower or faster."""
    return f"""
def counting_loop(original, *args):
    wrap(train_gpt, "train_step", counting_step)
    return original(*args)
def counting_step(original, *args):
    rank = int(os.environ["RANK"])
    with open(f"steps_{{rank}}", "a") as file:
        file.write("x")
    time.sleep(0.05 * ((rank + 1) % {world_size}))
    if rank == {signalled} and os.path.getsize(f"steps_{{rank}}") == {step}:
        os.kill(os.getpid(), signal.{name})
    return original(*args)
wrap(train_gpt, "loop", counting_loop)
"""


def assert_whole_log(folder, last_step):
    (path,) = (folder / "logs").iterdir()
    text = path.read_text()
    assert text.endswith("\n")
    steps = re.findall(r"^step:(\d+)/.*ms$", text.split(f"\n{RULE}\n")[-1], re.MULTILINE)
    assert int(steps[-1]) == last_step


@pytest.mark.parametrize("name, status, signalled", [("SIGTERM", 143, 1), ("SIGINT", 130, 0)])
def test_signal_to_one_rank_ends_all_after_the_same_step(name, status, signalled, start, tmp_path):
    before = counting(2, signalled, name)
    results = [running.wait() for running in start(2, tmp_path, "--steps", 40, "--epochs", 9, before=before)]
    assert results[signalled].returncode == status
    assert results[1 - signalled].returncode in (status, 143)
    assert [(tmp_path / f"steps_{rank}").stat().st_size for rank in (0, 1)] == [3, 3]
    assert_whole_log(tmp_path, last_step=3)
    assert results[0].stderr.count("\n") == 1 and "stopped by SIG" in results[0].stderr
    assert results[1].stderr == "" and results[1].stdout == ""


def end_as_torchrun(ranks):
    """What came of the ranks of a run that rank 0 ends; the others get a SIGTERM if they are still there soon after."""
    first = ranks[0].wait()
    time.sleep(0.3)
    for running in ranks[1:]:
        running.kill(signal.SIGTERM)
    return [first, *(running.wait(30) for running in ranks[1:])]


def test_loss_that_is_not_finite_ends_all_ranks(start, tmp_path):
    results = end_as_torchrun(start(2, tmp_path, "--steps", 8, "--muon-lr", "1e38"))
    assert [result.returncode for result in results] == [3, 143], results[1].stderr
    assert results[0].stderr.count("\n") == 1 and "step 2" in results[0].stderr
    assert results[1].stderr == "" and results[1].stdout == ""
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text().endswith("\nloss is not finite: step 2\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--stepz", "8"), "--steps"),
        (("--slices", "3"), "world size 2"),
        (("--train-files", "none_*.bin"), "none_*.bin"),
        (("--val-tokens", "8192", "--steps", "8"), "8192"),
    ],
)
def test_mistake_is_printed_once_by_rank_0_alone(arguments, words, start, tmp_path):
    results = end_as_torchrun(start(2, tmp_path, *arguments))
    assert results[0].returncode == 2 and results[1].returncode in (2, 143)
    assert results[0].stderr.count("\n") == 1 and words in results[0].stderr
    assert results[1].stderr == "" and results[0].stdout == results[1].stdout == ""
    assert not list(tmp_path.iterdir())


def test_mistake_that_another_rank_alone_can_see_is_printed_with_its_number(start, tmp_path):
    # On another node, say, which has no shards. Rank 0 waits for it.
    before = """
train_gpt.time.sleep = lambda seconds: None
if os.environ["RANK"] == "1":
    def find_none(original, *args):
        return original("none_*.bin", *args[1:])
    wrap(train_gpt, "find_shards", find_none)
"""
    first, second = start(2, tmp_path, "--steps", 8, before=before)
    result = second.wait()
    first.kill(signal.SIGKILL)
    first.wait()
    assert result.returncode == 2
    assert result.stderr.startswith("train_gpt.py: rank 1: ") and "none_*.bin" in result.stderr
    assert result.stderr.count("\n") == 1


def test_mistake_that_rank_0_alone_can_see_is_printed_once_too(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("precious")
    results = end_as_torchrun(start(2, tmp_path, "--steps", 8, "--run-id", "mine"))
    assert results[0].returncode == 2 and results[1].returncode in (2, 143)
    assert results[0].stderr.count("\n") == 1 and "mine.txt" in results[0].stderr
    assert results[1].stderr == results[1].stdout == ""
    assert (tmp_path / "logs" / "mine.txt").read_text() == "precious"


def test_dry_run_prints_its_plan_once(start, tmp_path):
    results = [running.wait() for running in start(2, tmp_path, "--dry-run")]
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout.count("training tokens") == 1
    assert results[1].stdout == ""


# ----------------------------------------------------------------------------------------------------------------------
# Under torchrun
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(launcher, tmp_path):
    """Starts a script, Python text, on two ranks under torchrun."""

    def start(script, *arguments):
        (tmp_path / "script.py").write_text(script)
        options = ("--standalone", "--nproc_per_node=2", tmp_path / "script.py", *arguments)
        return launcher.start(Path(torch.distributed.run.__file__), *options, cwd=tmp_path)

    return start


def test_mistake_is_printed_under_torchrun_even_where_rank_0_is_the_slowest_to_see_it(torchrun):
    # torchrun ends all ranks as soon as one has failed.
    late = "import os, time\ntime.sleep(2.5 * (os.environ['RANK'] == '0'))\nimport sys, train_gpt\n" + MAIN
    result = torchrun(late, "--preset", "mini", "--stepz", 8).wait()
    assert result.returncode != 0
    assert len(re.findall(r"^train_gpt\.py: .*--steps", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert result.stderr.index("train_gpt.py: ") < result.stderr.index("ChildFailedError")


def test_signal_to_torchrun_ends_all_ranks_after_the_same_step(files, torchrun, tmp_path):
    options = ("--preset", "mini", *MODEL, *VALIDATION, *files, "--steps", "400", "--epochs", "99")
    running = torchrun(SMALL + counting(2, signalled=-1, name="SIGTERM") + MAIN, *options)
    assert running.wait_for("step:3/400 train_loss")
    running.kill(signal.SIGTERM)
    result = running.wait()
    assert result.returncode != 0
    assert result.stderr.count("stopped by SIGTERM") == 1, result.stderr
    steps = [(tmp_path / f"steps_{rank}").stat().st_size for rank in (0, 1)]
    assert steps[0] == steps[1] and 3 <= steps[0] <= 12
    assert_whole_log(tmp_path, steps[0])


# ----------------------------------------------------------------------------------------------------------------------
# Several nodes
# ----------------------------------------------------------------------------------------------------------------------


def test_two_nodes_have_the_losses_of_one_with_as_many_processes(enough, tmp_path):  # noqa: F811
    """Two agents that meet over the loopback, through run.sh."""

    def node(name, **environment):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("run.sh", "setup.sh", "train_gpt.py", "requirements.txt"):
            shutil.copy(ROOT / file, folder)
        options = ("--preset", "mini", *MODEL, *VALIDATION, *map(str, enough), "--steps", str(STEPS))
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(["bash", folder / "run.sh", *options], env=environment, stderr=subprocess.PIPE)

    address = {"NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [node(f"node{rank}", NODE_RANK=str(rank), **address) for rank in range(2)]
    for each in nodes:
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors.decode()
    assert node("one", NPROC="2").wait(300) == 0
    losses = {}
    for log in tmp_path.glob("*/logs/*.txt"):
        losses[log.parent.parent.name] = re.findall(
            rf"^step:(\d+)/{STEPS} (\w+:\S+)", log.read_text(), re.MULTILINE
        )
    assert set(losses) == {"node0", "one"}
    assert losses["node0"] == losses["one"] and len(losses["one"]) >= STEPS + 2
