"""Checkpoints: a run that is stopped, killed or moved to other ranks and resumed is the run that never stopped."""

import dataclasses
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import test_distributed
import train_gpt as program
from test_command_line import (  # noqa: F401 (fixtures)
    MAIN,
    SMALL,
    assert_line,
    command,
    data,
    launcher,
    log_lines,
    small,
)

# Writes every number of the log with all its digits, too.
EXACT = """
import json
def exactly(original, self, step, kind, loss, *args):
    if self.file:
        with open("exact.jsonl", "a") as file:
            file.write(json.dumps([step, kind, loss]) + "\\n")
    return original(self, step, kind, loss, *args)
wrap(train_gpt.Log, "loss", exactly)
"""
RUN = ("--steps", "12", "--val-every", "4", "--checkpoint-last")


def exact(folder: Path) -> dict:
    """The losses by step and kind, with all their digits; of a step that was done twice, both."""
    losses = {}
    for line in (folder / "exact.jsonl").read_text().splitlines():
        step, kind, loss = json.loads(line)
        losses.setdefault((step, kind), set()).add(loss)
    return losses


def flat(state, path=()):
    """The leaves of a checkpoint by their path."""
    if isinstance(state, dict):
        return {leaf: value for key, each in state.items() for leaf, value in flat(each, (*path, key)).items()}
    return {path: state}


def assert_same_state(one: Path, other: Path) -> None:
    """Everything but the settings and the time is equal bit for bit."""
    states = [flat(torch.load(path, weights_only=True)) for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][key]), key
        elif key[0] not in ("settings", "train_time_ms"):
            assert value == states[1][key], key


@pytest.fixture
def folders(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, launcher, data):  # noqa: F811
    """A run of 12 steps that never stopped, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    from test_command_line import MAIN, MODEL, SMALL, VALIDATION

    files = ("--train-files", data / "x_train_*.bin", "--val-files", data / "x_val_*.bin")
    options = ("--preset", "mini", *MODEL, *VALIDATION, *files, *RUN, "--run-id", "whole", "--checkpoint-every", "1")
    assert launcher.start(SMALL + EXACT + MAIN, *options, cwd=folder).wait().returncode == 0
    return folder


def checkpoint(whole: Path, step: int) -> Path:
    return whole / "logs" / f"whole_step{step:06}.pt"


# At 3 and 9, gradients wait for Adam; embed is untied on the way from 9 to 11.
@pytest.mark.parametrize("step", [3, 4, 9, 11])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(step, whole, small, folders):  # noqa: F811
    folder = folders("resumed")
    result = small(*RUN, "--run-id", "again", "--resume", checkpoint(whole, step), before=EXACT, cwd=folder)
    assert result.returncode == 0, result.stderr
    expected = {key: loss for key, loss in exact(whole).items() if key[0] > step}
    assert exact(folder) == expected
    assert_same_state(folder / "logs" / "again_step000012.pt", checkpoint(whole, 12))
    lines = log_lines(folder)
    assert lines[0] == f"resumed from {checkpoint(whole, step)} after step {step}"
    # The clock is carried on: it never runs backwards, from the time in the checkpoint on.
    times = [int(line.split("train_time:")[1].split("ms")[0]) for line in lines if "train_time" in line]
    assert times == sorted(times)
    assert times[0] >= int(torch.load(checkpoint(whole, step), weights_only=True)["train_time_ms"])


# Embedding tables are updated in steps 2, 4, 8 and 12; the weights of the last six are averaged.
LEADS = (
    *("--polar-steps", "6", "--slow-momentum", "0.98", "--average-steps", "185"),
    *("--tables-every", "2", "--tables-from", "62"),
)


def test_resumed_run_with_all_that_is_off_at_first_equals_the_uninterrupted_one_bit_for_bit(small, folders):  # noqa: F811
    """Also while embedding tables wait and all else does not, and while the weights' mean is under way."""
    once = folders("once")
    options = (*RUN, *LEADS, "--run-id", "once", "--checkpoint-every", "5")
    assert small(*options, before=EXACT, cwd=once).returncode == 0
    last = once / "logs" / "once_step000012.pt"
    assert torch.load(last, weights_only=True)["optimizer"]["updates"]["bigram_table"] == 4
    for step in (5, 10):
        folder, path = folders(str(step)), once / "logs" / f"once_step{step:06}.pt"
        state = torch.load(path, weights_only=True)["optimizer"]
        assert ("bigram_table" in state["grads"], "lm_head" in state["grads"]) == (True, step == 5)
        assert bool(state["states"]["vo_bank"]["mean"].any()) == (step == 10)
        result = small(*RUN, *LEADS, "--run-id", "again", "--resume", path, before=EXACT, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert exact(folder) == {key: loss for key, loss in exact(once).items() if key[0] > step}
        assert_same_state(folder / "logs" / "again_step000012.pt", last)


def test_checkpoint_of_the_last_step_only_validates(whole, small, folders):  # noqa: F811
    folder = folders("resumed")
    assert small(*RUN, "--resume", checkpoint(whole, 12), before=EXACT, cwd=folder).returncode == 0
    assert exact(folder) == {(12, "val_loss"): exact(whole)[12, "val_loss"]}


def test_all_checkpoints_are_kept_and_named_after_run_and_step(whole):
    assert sorted(path.name for path in (whole / "logs").iterdir()) == [
        "whole.txt", *(f"whole_step{step:06}.pt" for step in range(1, 13)),
    ]  # fmt: skip


def test_checkpoints_are_written_outside_the_clock(small, folders):  # noqa: F811
    slow = "wrap(train_gpt, 'save_checkpoint', lambda original, *args: (time.sleep(2), original(*args)))\n"
    folder = folders("slow")
    assert small("--steps", "4", "--checkpoint-every", "1", before=slow, cwd=folder).returncode == 0
    last = next(line for line in log_lines(folder) if line.startswith("step:4/4 val_loss"))
    assert int(last.split("train_time:")[1].split("ms")[0]) < 6000 < 4 * 2000


def test_stopped_run_writes_a_checkpoint_that_goes_on(whole, small, folders):  # noqa: F811
    stop = """
calls = []
def stopping(original, *args):
    calls.append(0)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)
def around(original, *args):
    wrap(train_gpt, "train_step", stopping)
    return original(*args)
wrap(train_gpt, "loop", around)
"""
    folder = folders("stopped")
    options = (*RUN, "--checkpoint-every", "100")
    result = small(*options, "--run-id", "first", before=EXACT + stop, cwd=folder)
    assert_line(result, "SIGTERM", status=143)
    assert (folder / "logs" / "first_step000005.pt").exists()
    assert log_lines(folder)[-1] == "stopped by a signal after step 5"
    again = ("--run-id", "second", "--resume", "logs/first_step000005.pt")
    assert small(*options, *again, before=EXACT, cwd=folder).returncode == 0
    assert exact(folder) == exact(whole)
    assert_same_state(folder / "logs" / "second_step000012.pt", checkpoint(whole, 12))


def test_without_checkpoints_nothing_is_written(small, folders):  # noqa: F811
    folder = folders("none")
    assert small("--steps", "4", cwd=folder).returncode == 0
    assert not list(folder.rglob("*.pt"))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that are refused
# ----------------------------------------------------------------------------------------------------------------------


def damages(content: bytes):
    rng = random.Random(0)
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    for _ in range(6):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def test_damaged_checkpoint_is_refused_before_the_run_starts(whole, small, folders):  # noqa: F811
    folder = folders("damaged")
    for content in damages(checkpoint(whole, 4).read_bytes()):
        (folder / "damaged.pt").write_bytes(content)
        try:
            program.load_checkpoint(str(folder / "damaged.pt"))
        except program.UserError as error:
            assert "damaged.pt: damaged" in str(error)
        else:  # bits that nothing reads: fill between records
            assert_same_state(folder / "damaged.pt", checkpoint(whole, 4))
    (folder / "damaged.pt").write_bytes(checkpoint(whole, 4).read_bytes()[:-1])
    assert_line(small(*RUN, "--resume", "damaged.pt", cwd=folder), "damaged.pt", "damaged")
    assert_line(small(*RUN, "--resume", "none.pt", cwd=folder), "none.pt", "No such file")
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dim", "48"], ["another model", "dim is 32", "48"]),
        (["--smear", "false"], ["another model", "smear is True", "False"]),
        (["--muon", "false"], ["muon is True", "False"]),
        (["--steps", "4"], ["step 5", "4 steps"]),
    ],
)
def test_checkpoint_of_another_run_is_refused_with_the_field_that_differs(options, words, whole, small, folders):  # noqa: F811
    folder = folders("refused")
    result = small("--steps", "12", "--resume", checkpoint(whole, 5), *options, cwd=folder)
    assert_line(result, *words)
    assert not list(folder.iterdir())


def without(name):
    def remove(part):
        del part[name]

    return remove


def renamed(old, new):
    def rename(part):
        part[new] = part.pop(old)

    return rename


def put(name, value):
    def replace(part):
        part[name] = value(part[name]) if callable(value) else value

    return replace


FOREIGN = {
    "no settings": (lambda state: state, without("settings"), ["has no settings"]),
    "no step": (lambda state: state, without("step"), ["has no step"]),
    "a step below 0": (lambda state: state, put("step", -1), ["step is -1"]),
    "no weights": (lambda state: state, without("model"), ["has no model"]),
    "no optimizer": (lambda state: state, without("optimizer"), ["has no optimizer"]),
    "no time": (lambda state: state, without("train_time_ms"), ["has no train_time_ms"]),
    "no rng": (lambda state: state, without("rng"), ["has no rng"]),
    "a short rng": (lambda state: state, put("rng", torch.zeros(3, dtype=torch.uint8)), ["rng"]),
    "a parameter less": (lambda state: state["model"], without("mlp_bank"), ["has no parameter mlp_bank"]),
    "no embed": (lambda state: state["model"], without("embed"), ["has no embed"]),
    "a parameter more": (lambda state: state["model"], put("lm_head_2", torch.zeros(1)), ["lm_head_2"]),
    "a renamed one": (lambda state: state["model"], renamed("qk_bank", "q_bank"), ["q_bank"]),
    "another shape": (
        lambda state: state["model"], put("lm_head", lambda head: head[:-1]), ["lm_head", "(31, 384)", "(32, 384)"],
    ),
    "too few layers": (lambda state: state["model"], put("mlp_bank", lambda bank: bank[:-1]), ["mlp_bank"]),
    "no tensor": (lambda state: state["model"], put("lm_head", 3), ["has no parameter lm_head"]),
    "integers": (lambda state: state["model"], put("embed", lambda embed: embed.int()), ["embed", "int32"]),
    "another dtype": (lambda state: state["model"], put("embed", lambda embed: embed.bfloat16()), ["dtype", "float32"]),
    "a state less": (lambda state: state["optimizer"]["states"], without("lm_head"), ["state of lm_head"]),
    "half a state": (
        lambda state: state["optimizer"]["states"]["mlp_bank"], without("exp_avg_sq"), ["mlp_bank", "exp_avg_sq"],
    ),
    "another state": (
        lambda state: state["optimizer"]["states"]["embed"], put("exp_avg", torch.zeros(2)), ["embed", "exp_avg"],
    ),
    "another gradient": (
        lambda state: state["optimizer"]["grads"], put("embed", torch.zeros(2, 2)), ["gradient of embed"],
    ),
    "no count of updates": (lambda state: state["optimizer"], without("updates"), ["has no updates"]),
    "a count less": (lambda state: state["optimizer"]["updates"], without("embed"), ["has no embed"]),
    "no word on tying": (lambda state: state["optimizer"], without("tied"), ["has no tied"]),
    "another preset": (lambda state: state["settings"], put("preset", "record"), ["preset", "record", "mini"]),
    "an unknown setting": (lambda state: state["settings"], put("warp", 9), ["warp"]),
    "an unknown column": (lambda state: state["settings"]["model"]["layers"][1], put("warp", 9), ["Layer", "warp"]),
    "a row that cannot work": (lambda state: state["settings"]["model"]["layers"][1], put("skip", 8), ["skip=8"]),
    "a number that cannot work": (lambda state: state["settings"]["model"], put("heads", "two"), ["--heads two"]),
    "no table": (lambda state: state["settings"], without("stages"), ["has no stages"]),
    "no model's settings": (lambda state: state["settings"], put("model", 3), ["has no model"]),
}


# Through the command line; test_fuzz.py has hundreds without it.
ORDINARY = ("no settings", "a short rng", "a renamed one", "another shape", "half a state", "an unknown column")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in ORDINARY else pytest.mark.slow) for fault in FOREIGN]
)
def test_checkpoint_with_parts_missing_renamed_or_wrong_is_refused_with_their_names(fault, whole, small, folders):  # noqa: F811
    folder = folders("foreign")
    part_of, change, words = FOREIGN[fault]
    state = torch.load(checkpoint(whole, 5), weights_only=True)
    state["optimizer"]["grads"].setdefault("embed", state["model"]["embed"].clone())
    state["settings"]["model"]["layers"] = [dict(row) for row in state["settings"]["model"]["layers"]]
    change(part_of(state))
    torch.save(state, folder / "foreign.pt")
    line = assert_line(small("--steps", "12", "--resume", "foreign.pt", cwd=folder), "foreign.pt: ", *words)
    assert len(line) < 300
    assert [path.name for path in folder.iterdir()] == ["foreign.pt"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_a_compiled_or_distributed_model_gave_are_its_own(prefix, whole, small, folders):  # noqa: F811
    folder = folders("wrapped")
    state = torch.load(checkpoint(whole, 4), weights_only=True)
    state["model"] = {prefix + name: tensor for name, tensor in state["model"].items()}
    torch.save(state, folder / "wrapped.pt")
    result = small(*RUN, "--resume", "wrapped.pt", "--run-id", "a", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert_same_state(folder / "logs" / "a_step000012.pt", checkpoint(whole, 12))


def test_resumed_run_has_the_checkpoints_settings_unless_the_command_line_says_otherwise(whole, launcher, folders):  # noqa: F811
    """`whole` has --preset mini, --dim 32, --steps 12 and other numbers, of which this command line says nothing."""
    folder = folders("defaults")
    options = ("--resume", checkpoint(whole, 4))
    result = launcher.start(SMALL + MAIN, *options, "--run-id", "a", cwd=folder).wait()
    assert result.returncode == 0, result.stderr
    assert_same_state(folder / "logs" / "a_step000012.pt", checkpoint(whole, 12))
    result = launcher.start(SMALL + MAIN, *options, "--run-id", "b", "--dim", "64", cwd=folder).wait()
    assert_line(result, "its dim is 32, this run's is 64")
    resumed = [*map(str, options)]
    saved = program.parse_arguments(resumed)[0]
    state = torch.load(checkpoint(whole, 4), weights_only=True)["settings"]
    for name in ("stages", "extension", "run_id", "resume"):
        del state[name]
    ours = dataclasses.asdict(saved)
    assert {name: ours[name] for name in state} == state
    assert saved.total_steps == 12 and saved.run_id == ""
    assert program.parse_arguments([*resumed, "--slices", "8"])[0].slices == 8
    assert program.parse_arguments([*resumed, "--steps", "24"])[0].total_steps == 24


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------

FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # as on a full disk, writes beyond it fail
"""


def test_full_disk_while_saving_leaves_earlier_checkpoints_and_the_run_goes_on(whole, small, folders):  # noqa: F811
    folder = folders("full")
    limit = checkpoint(whole, 4).stat().st_size // 2
    assert limit > 2 * len(Path(program.__file__).read_bytes())
    result = small("--steps", "12", "--checkpoint-every", "4", before=FULL.format(limit=limit), cwd=folder)
    assert result.returncode == 0, result.stderr
    lines = log_lines(folder)
    failed = [line for line in lines if line.startswith("checkpoint not written: logs/")]
    assert len(failed) == 3 and all(line.endswith(".pt: File too large") for line in failed)  # the limit's own reason
    assert [path.suffix for path in (folder / "logs").iterdir()] == [".txt"]
    assert any(line.startswith("step:12/12 val_loss") for line in lines)


DISK = """
import errno
class Full:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def __getattr__(self, name):
        return getattr(self.file, name)
save = torch.save
torch.save = lambda state, file: save(state, Full(file))
"""


def test_checkpoints_line_says_that_no_space_is_left(small, folders):  # noqa: F811
    folder = folders("full")
    result = small("--steps", "4", "--checkpoint-last", before=DISK, cwd=folder)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in log_lines(folder) if line.startswith("checkpoint not written")]
    assert line.endswith("_step000004.pt: No space left on device")


def test_full_disk_while_logging_ends_the_run_with_a_line(small, folders):  # noqa: F811
    folder = folders("full")
    limit = len(Path(program.__file__).read_bytes()) + 4096
    result = small("--steps", "400", "--epochs", "99", before=FULL.format(limit=limit), cwd=folder)
    assert_line(result, "logs/", "cannot be written")
    result = small("--steps", "4", "--run-id", "none", before=FULL.format(limit=4096), cwd=folder)
    assert_line(result, "logs/none.txt", "cannot be written")
    assert not (folder / "logs" / "none.txt").exists()  # a log is whole, or not there


@pytest.mark.parametrize("fault", ["changes", "vanishes"])
def test_shard_that_changes_or_vanishes_during_the_run_is_named(fault, small, data, folders):  # noqa: F811
    folder = folders("fault")
    for path in data.glob("x_train_*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    act = "path.unlink()" if fault == "vanishes" else "path.write_bytes(path.read_bytes()[:-2])"
    before = f"""
from pathlib import Path
def around(original, *args):
    path = Path("x_train_000002.bin")
    {act}
    return original(*args)
wrap(train_gpt, "loop", around)
"""
    result = small("--steps", "56", "--train-files", "x_train_*.bin", before=before, cwd=folder)
    assert_line(result, "x_train_000002.bin")


# ----------------------------------------------------------------------------------------------------------------------
# Ranks
# ----------------------------------------------------------------------------------------------------------------------

start, files = test_distributed.start, test_distributed.files


def test_checkpoint_of_4_ranks_goes_on_on_1_and_2(start, folders):  # noqa: F811
    options = ("--steps", "35", "--epochs", "9", "--checkpoint-every", "5", "--run-id")
    four = folders("four")
    for running in start(4, four, *options, "four", before=EXACT):
        assert running.wait().returncode == 0
    expected = exact(four)
    for step, world_size in itertools.product((10, 15), (1, 2)):  # at 15 gradients wait for Adam
        folder = folders(f"{step}_{world_size}")
        path = four / "logs" / f"four_step{step:06}.pt"
        for running in start(world_size, folder, *options, "more", "--resume", path, before=EXACT):
            result = running.wait()
            assert result.returncode == 0, result.stderr
        losses = exact(folder)
        assert len(losses) >= 20
        for key, (loss,) in losses.items():
            assert loss == pytest.approx(*expected[key], abs=1e-5), key


def test_kill_of_one_rank_ends_the_others_with_a_message(start, launcher, files, tmp_path):  # noqa: F811
    from test_command_line import MAIN, SMALL, VALIDATION

    (tmp_path / "script.py").write_text(
        SMALL + "open(f'pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n" + MAIN
    )
    options = ("--preset", "mini", *test_distributed.MODEL, *VALIDATION, *files, "--steps", "400", "--epochs", "99")
    torchrun = Path(torch.distributed.run.__file__)
    arguments = ("--standalone", "--nproc_per_node=2", tmp_path / "script.py", *options)
    running = launcher.start(torchrun, *arguments, cwd=tmp_path)
    assert running.wait_for("step:3/400 train_loss")
    begin = time.monotonic()
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    result = running.wait(60)
    assert time.monotonic() - begin < 60
    assert result.returncode != 0 and "SIGKILL" in result.stderr or "Signal 9" in result.stderr


@pytest.mark.slow
def test_run_killed_at_ten_random_moments_ends_with_the_undisturbed_loss(small, folders):  # noqa: F811
    options = ("--steps", "120", "--epochs", "20", "--val-every", "40", "--checkpoint-every", "7", "--checkpoint-last")
    undisturbed, folder = folders("undisturbed"), folders("killed")
    assert small(*options, before=EXACT, cwd=undisturbed).returncode == 0
    rng, resume, kills = random.Random(0), (), 0
    for attempt in range(1000):
        running = small(*options, "--run-id", f"{attempt}", *resume, before=EXACT, cwd=folder, wait=False)
        if kills < 10:
            running.wait_for(rf"step:{rng.randint(12 * kills, 12 * kills + 12)}/120 train_loss", seconds=60)
            time.sleep(rng.random() / 10)
            running.kill(signal.SIGKILL)
            kills += 1
        result = running.wait()
        saved = sorted(folder.glob("logs/*_step*.pt"), key=lambda path: int(path.stem[-6:]))
        resume = ("--resume", saved[-1]) if saved else ()
        if result.returncode == 0:
            break
    assert kills == 10
    assert exact(folder) == exact(undisturbed)  # a step done twice has one loss
    last = sorted(undisturbed.glob("logs/*_step000120.pt"))
    assert_same_state(last[0], sorted(folder.glob("logs/*_step000120.pt"))[0])
