"""train_gpt.py as its users meet it: what it prints, what it writes, and with what status it ends.

Importing PyTorch takes seconds and there are dozens of runs here, so most start by forking a process that has imported
it already (`Launcher`). Where a run must train, a short script makes the batches small first, or sends a signal at a
certain moment, and then calls the same `main`.
"""

import atexit
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipe
import shards
import train_gpt as program

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
LOGBOOK = ROOT / "records" / "logbook.py"
RULE = "=" * 100
BOS = 256

MODEL = ("--compile", "false", "--dtype", "float32", "--dim", "32", "--heads", "2", "--bigram-dim", "16")
MODEL += ("--gates", "true")
VALIDATION = ("--val-tokens", "2048", "--val-seq-len", "1024")

# The presets of recipe.py, whatever the tables of train_gpt.py say.
RECIPE = """
import sys
import recipe, train_gpt
train_gpt.PRESETS.update(recipe.PRESETS)
"""
# What a small run does before `main`: batches of 1,024 tokens in place of mini's 8,192.
SMALL = RECIPE + """
import dataclasses, os, signal, time
import torch

def all_stages(**changes):
    for name, preset in train_gpt.PRESETS.items():
        *stages, extension = (dataclasses.replace(stage, **changes) for stage in (*preset.stages, preset.extension))
        train_gpt.PRESETS[name] = dataclasses.replace(preset, stages=tuple(stages), extension=extension)

all_stages(batch_tokens=1024)

def wrap(owner, name, around):
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))
"""
MAIN = """
sys.exit(train_gpt.main(sys.argv[1:]))
"""


# ----------------------------------------------------------------------------------------------------------------------
# Starting runs
# ----------------------------------------------------------------------------------------------------------------------

SERVER = """
import json, os, resource, runpy, sys, traceback
import train_gpt  # and with it all that takes long to import

def end(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def become(order):
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, path in enumerate((os.devnull, order["stdout"], order["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if order["spare_memory"] is not None:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + order["spare_memory"],) * 2)
    sys.argv = order["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        end(error.code or 0)
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        pid, status = os.waitpid(order["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    else:
        pid = os.fork()
        if pid == 0:
            become(order)
        print(pid, flush=True)
"""


@dataclasses.dataclass
class Finished:
    returncode: int  # minus the signal that killed it
    stdout: str
    stderr: str


class Running:
    """A run that a `Launcher` has started."""

    def __init__(self, launcher, pid, folder):
        self.launcher, self.pid, self.folder, self.status = launcher, pid, folder, None

    def stdout(self):
        return (self.folder / "stdout").read_text(errors="replace")

    def wait_for(self, pattern, seconds=60):
        """Waits until stdout has this; True if it came."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.stdout())) and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(found)

    def poll(self):
        """The exit status, or None as long as it runs."""
        if self.status is None:
            self.status = self.launcher.ask({"wait": self.pid})
        return self.status

    def kill(self, signum):
        if self.poll() is None:  # until then its number is no other's
            os.kill(self.pid, signum)

    def wait(self, seconds=120):
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                raise TimeoutError((self.folder / "stderr").read_text())
            time.sleep(0.01)
        return Finished(self.status, self.stdout(), (self.folder / "stderr").read_text(errors="replace"))


class Launcher:
    """Runs Python scripts in processes forked from one that has imported train_gpt, on the CPU, on one thread."""

    def __init__(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.folder, self.count = Path(self.temporary.name), 0
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {name: text for name, text in environment.items() if name != "RANK"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=self.environment, **pipes)

    def ask(self, order):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *arguments, cwd, terminal=None, spare_memory=None, **environment):
        """`script` is a path or Python text; `terminal` the path of one that is stdout and stderr."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        if not isinstance(script, Path):
            (folder / "script.py").write_text(script)
            script = folder / "script.py"
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        order = {
            "argv": [str(script), *map(str, arguments)],
            "cwd": str(cwd),
            "environment": {**self.environment, **environment},
            "stdout": str(terminal or folder / "stdout"),
            "stderr": str(terminal or folder / "stderr"),
            "spare_memory": spare_memory,
        }
        return Running(self, self.ask(order), folder)

    def close(self):
        self.server.stdin.close()
        self.server.wait(10)
        self.temporary.cleanup()


@functools.cache
def shared_launcher():
    """The one of all tests."""
    launcher = Launcher()
    atexit.register(launcher.close)
    return launcher


@pytest.fixture(scope="session")
def launcher():
    return shared_launcher()


def random_documents(seed, tokens):
    """`tokens` tokens of documents of up to 300, whose bytes are not all equally likely."""
    rng = np.random.default_rng(seed)
    documents = [np.append([BOS], rng.binomial(40, 0.5, rng.integers(1, 300))) for _ in range(tokens // 60)]
    return np.concatenate(documents)[:tokens]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with shards of 40,000 and 40,000 training and 3,000 validation tokens."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed, tokens in (("train_000001", 1, 40_000), ("train_000002", 2, 40_000), ("val_000000", 3, 3000)):
        shards.write_shard(folder / f"x_{name}.bin", random_documents(seed, tokens))
    return folder


@pytest.fixture
def command(launcher, data, tmp_path):
    """Runs `train_gpt.py --preset mini …` on the shards, in an empty folder, and returns what came of it.

    Its presets are the recipe's.
    """

    def run(*arguments, script=RECIPE + MAIN, preset="mini", cwd=tmp_path, wait=True, **how):
        files = ("--train-files", data / "x_train_*.bin", "--val-files", data / "x_val_*.bin")
        options = ("--preset", preset, "--vocab-size", "257", "--bos-id", "256", *MODEL, *VALIDATION, *files)
        running = launcher.start(script, *options, *arguments, cwd=cwd, **how)
        return running.wait() if wait else running

    return run


@pytest.fixture
def small(command):
    """The same with batches of 1,024 tokens, and with Python text that is run before `main`."""
    return lambda *arguments, before="", **how: command(*arguments, script=SMALL + before + MAIN, **how)


def assert_line(result, *words, status=2):
    """This status, and one line on stderr that holds these words."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("train_gpt.py: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert str(word) in result.stderr, (word, result.stderr)
    return result.stderr


def assert_refused(result, folder, *words):
    """A user's mistake: its line, status 2, nothing else printed, and nothing left in the folder of the run."""
    line = assert_line(result, *words)
    assert result.stdout == ""
    assert not list(folder.iterdir())
    return line


def only_log(folder):
    (path,) = (folder / "logs").glob("*.txt")
    return path


def log_lines(folder):
    """The lines after the header of the only log in a folder; every line must be whole."""
    return log_lines_of(only_log(folder))


def log_lines_of(path):
    text = path.read_text()
    assert text.endswith("\n") and text.count(f"\n{RULE}\n") >= 2
    return text.split(f"\n{RULE}\n")[-1].splitlines()


def last_step(folder):
    """The last training step in the only log in a folder, 0 if it has none."""
    text = "\n".join(log_lines(folder))
    steps = re.findall(r"^step:(\d+)/\d+ train_loss:\S+ train_time:\d+ms step_avg:\S+ms$", text, re.MULTILINE)
    return int(steps[-1]) if steps else 0


def losses(log):
    return re.findall(r"^(step:\d+/\d+ \w+_loss:\S+)", log.read_text(), re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------------------
# What a run ends with
# ----------------------------------------------------------------------------------------------------------------------


def test_samples_come_at_their_steps_on_the_screen_alone_and_change_no_loss(small, launcher, tmp_path):
    for name in "train_gpt.py", "records", "evals", "command.py":
        (tmp_path / name).symlink_to(ROOT / name)
    options = ("--steps", "8", "--run-id")
    assert small(*options, "plain").returncode == 0
    result = small(*options, "sampled", "--sample-every", "3", "--checkpoint-last")
    assert result.returncode == 0, result.stderr
    plain, sampled = (tmp_path / "logs" / f"{name}.txt" for name in ("plain", "sampled"))
    assert losses(sampled) == losses(plain) and len(losses(plain)) == 8 + 2
    frames = re.findall(r"^--- after step (\d+) the model writes\n(.*?)\n---$", result.stdout, re.MULTILINE | re.DOTALL)
    assert [int(step) for step, _ in frames] == [3, 6, 8] and len({text for _, text in frames}) == 3
    assert not any(line.startswith("---") for line in log_lines_of(sampled))

    # What it names next can be done: the first command writes what the last sample has, if it is asked for the same.
    head, *commands = result.stdout.split("what next:")[1].splitlines()
    assert head == "" and len(commands) == 3
    program, script, *arguments = shlex.split(commands[0])
    assert program == sys.executable and script == "evals/sample.py" and arguments[-2:] == ["--prompt", "def "]
    same = (*arguments[:-2], "--temperature", "0.6", "--tokens", "200")
    written = launcher.start(tmp_path / script, *same, cwd=tmp_path).wait()
    assert written.returncode == 0 and written.stdout.strip("\n") == frames[-1][1], written.stderr
    assert shlex.split(commands[1])[1:] == ["records/logbook.py", "plot", "logs/sampled.txt", "--out", "plot.png"]
    assert shlex.split(commands[2])[1:] == ["records/logbook.py", "check", "train_gpt.py"]


def test_samples_of_tokens_that_have_no_text_are_refused(small, tmp_path):
    assert_refused(small("--vocab-size", "300", "--sample-every", "5"), tmp_path, "--sample-every 5", "bytes", "GPT-2")


# ----------------------------------------------------------------------------------------------------------------------
# Bad data
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["mini", "record"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_shards_are_answered_with_the_pattern_and_the_command_that_makes_them(preset, split, small, tmp_path):
    result = small("--steps", "4", f"--{split}-files", "data/none_*.bin", preset=preset)
    line = assert_refused(result, tmp_path, "data/none_*.bin")
    script = (tmp_path / re.search(r"python (\S+\.py)", line)[1]).resolve()  # as seen from where the run was started
    assert script == ROOT / {"mini": "data/embedded.py", "record": "data/cached_fineweb10B.py"}[preset]
    assert script.is_file()
    assert ("./run.sh, or --preset tiny" in line) == (preset == "record")  # there is no GPU here


def test_preset_finds_its_shards_beside_the_script_from_any_folder(launcher, data, tmp_path):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "data" / "sympy").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(SCRIPT, project)
    for split in ("train_000001", "train_000002", "val_000000"):
        shutil.copy(data / f"x_{split}.bin", project / "data" / "sympy" / f"sympy_{split}.bin")
    # That copy of the script, and not the one that the launcher has imported.
    first = f"import sys\ndel sys.modules['train_gpt']\nsys.path.insert(0, {str(project)!r})\n"
    script = first + SMALL + MAIN
    arguments = ("--preset", "mini", *MODEL, *VALIDATION, "--steps", "4", "--run-id", "a")
    result = launcher.start(script, *arguments, cwd=elsewhere).wait()
    assert result.returncode == 0, result.stderr
    assert "data: train ../project/data/sympy/sympy_train_000001.bin" in (elsewhere / "logs" / "a.txt").read_text()
    # Other patterns count from the folder of the run.
    result = launcher.start(script, *arguments, "--train-files", "data/sympy/s*_train_*.bin", cwd=elsewhere).wait()
    assert_line(result, "no shards match data/sympy/s*_train_*.bin", "python ../project/data/embedded.py")


def test_pattern_that_the_shell_has_expanded_is_answered_with_quotes(small, data, tmp_path):
    files = sorted(map(str, data.glob("x_train_*.bin")))
    assert_refused(small("--steps", "4", "--train-files", *files), tmp_path, files[1], "quote")


@pytest.mark.parametrize("how", ["same", "link", "copy"])
def test_training_shard_that_is_a_validation_shard_is_refused(how, small, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shard, twin = data / "x_val_000000.bin", tmp_path / "twin_000001.bin"
    if how == "copy":
        shutil.copy(shard, twin)
    elif how == "link":
        twin.symlink_to(shard)
    files = ("--train-files", shard if how == "same" else twin, "--epochs", "9")
    assert_refused(small("--steps", "4", *files, cwd=folder), folder, str(files[1]), str(shard))


@pytest.mark.parametrize("tokens", [2, 1000, 2048])
def test_advice_for_a_small_validation_stream_works(tokens, small, data, tmp_path):
    """With what the line advises the run validates, on at least half of what there is."""
    shards.write_shard(tmp_path / "few_000000.bin", random_documents(5, 4000)[:tokens])
    files = ("--steps", "4", "--val-files", str(tmp_path / "few_*.bin"))
    line = assert_line(small(*files), "too few validation tokens", f"{tokens:,}")
    advised = re.search(r"or use (--val-tokens (\d+)(?: --val-seq-len (\d+))?)", line)
    assert tokens / 2 <= int(advised[2]) < tokens
    result = small(*files, *advised[1].split())
    assert result.returncode == 0, result.stderr


def test_validation_stream_of_nothing_has_no_advice_but_more_data(small, tmp_path):
    shards.write_shard(tmp_path / "few_000000.bin", np.array([BOS]))
    line = assert_line(small("--steps", "4", "--val-files", str(tmp_path / "few_*.bin")), "add shards")
    assert "--val-tokens 0" not in line and "use" not in line


GOOD = [BOS, 1, 2, 3, BOS, 4, 5, 6]


def shard_bytes(tokens=GOOD, magic=20240520, version=1, count=None):
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


BAD_SHARDS = {
    "wrong magic": (shard_bytes(magic=20240801), ["20240801", "20240520"]),
    "wrong version": (shard_bytes(version=7), ["version", "7", "1"]),
    "truncated": (shard_bytes()[:-4], ["truncated", "1,040", "1,036"]),
    "truncated in a token": (shard_bytes()[:-1], ["truncated", "1,040", "1,039"]),
    "truncated in the header": (shard_bytes()[:100], ["truncated", "100", "1,024"]),
    "empty": (b"", ["truncated", "0", "1,024"]),
    "over-long": (shard_bytes() + b"\0\0", ["long", "1,040", "1,042"]),
    "over-long by half a token": (shard_bytes() + b"\0", ["long", "1,040", "1,041"]),
    "less than no tokens": (shard_bytes(count=-8), ["-8"]),
    "outside the vocabulary": (shard_bytes([BOS, 1, 257, 2]), ["257", "vocabulary"]),
    "far outside the vocabulary": (shard_bytes([BOS, 1, 50256, 65535]), ["65535", "257", "vocabulary"]),
    "no BOS": (shard_bytes([1, 2, 3]), ["BOS", "256", "every document must start with BOS"]),
    "no tokens": (shard_bytes([]), ["BOS"]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", BAD_SHARDS)
def test_bad_shard_is_named_with_what_was_expected_and_found(fault, split, command, tmp_path):
    content, words = BAD_SHARDS[fault]
    path, folder = tmp_path / "bad_000001.bin", tmp_path / "run"
    path.write_bytes(content)
    folder.mkdir()
    result = command(f"--{split}-files", tmp_path / "bad_*.bin", "--steps", "8", cwd=folder)
    assert_refused(result, folder, path, *words)
    assert path.read_bytes() == content


def test_folder_in_place_of_a_shard_is_named(command, tmp_path):
    (tmp_path / "bad_000001.bin").mkdir()
    result = command("--train-files", tmp_path / "bad_*.bin")
    assert_line(result, tmp_path / "bad_000001.bin", "directory")


def test_too_few_training_tokens_are_counted_and_answered_with_the_epochs_that_suffice(small, data, tmp_path):
    # Documents of 128 tokens: a slice of 256 takes two and the next one's BOS. So a batch of 4 slices uses 12
    # documents up, a shard of 50 has 4 batches, and an epoch has 4 x 1,024 tokens.
    shards.write_shard(tmp_path / "few_000001.bin", np.array(([BOS] + [1] * 127) * 50))
    folder = tmp_path / "run"
    folder.mkdir()
    options = ("--train-files", tmp_path / "few_*.bin", "--steps", "10")
    line = assert_refused(small(*options, cwd=folder), folder, "4,096", "10,240", tmp_path / "few_*.bin", "--epochs 3")
    assert "--epochs 2" not in line
    assert_refused(small(*options, "--epochs", "2", cwd=folder), folder, "8,192", "10,240", "--epochs 3")
    assert small(*options, "--epochs", "3", cwd=folder).returncode == 0
    assert log_lines(folder)[-2].startswith("step:10/10 val_loss:")


def test_shards_too_small_for_one_batch_say_so_before_the_run(small, tmp_path):
    shards.write_shard(tmp_path / "few_000001.bin", np.array([BOS] + [1] * 99))
    folder = tmp_path / "run"
    folder.mkdir()
    assert_refused(small("--train-files", tmp_path / "few_*.bin", cwd=folder), folder, "1,024", "100")


def test_too_few_validation_tokens_are_counted(small, tmp_path):
    line = assert_refused(small("--val-tokens", "3072", "--steps", "4"), tmp_path, "3,000", "--val-tokens")
    assert re.search(r"\b3,?072\b", line)
    folder = tmp_path / "all_but_the_last_target"
    folder.mkdir()
    assert_refused(small("--val-tokens", "3000", "--val-seq-len", "1000", "--steps", "4", cwd=folder), folder, "3,000")
    assert small("--val-tokens", "2999", "--val-seq-len", "2999", "--steps", "4", cwd=folder).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Bad settings
# ----------------------------------------------------------------------------------------------------------------------


def test_slices_that_do_not_divide_are_answered_with_the_nearest_that_do(command, small, tmp_path):
    line = assert_refused(command("--slices", "3"), tmp_path, "8,192", "3 slices", "world size 1 ")
    assert line.endswith("nearest that work with world size 1: --slices 2 or 4\n")
    assert_refused(command("--slices", "1000"), tmp_path, "1024", "512")
    folder = tmp_path / "works"
    folder.mkdir()
    assert small("--slices", "2", "--steps", "4", cwd=folder).returncode == 0


@pytest.mark.parametrize("slices, world_size, works", [(4, 8, {"8"}), (6, 4, {"4", "8"}), (9, 2, {"8"})])
def test_slices_that_the_processes_do_not_divide_are_answered_too(slices, world_size, works):
    settings = replace(recipe.MINI, slices=slices)
    with pytest.raises(program.UserError) as error:
        program.check_settings(settings, world_size)
    text = str(error.value)
    assert {"8,192", str(slices), str(world_size)} <= set(re.findall(r"[\d,]*\d", text))
    advised = re.findall(r"\d+", text.partition("nearest")[2])
    assert works <= set(advised)
    for number in advised:
        program.check_settings(replace(settings, slices=int(number)), world_size)


def test_number_of_processes_that_divides_no_batch_is_answered_with_the_nearest_that_does():
    with pytest.raises(program.UserError) as error:
        program.check_settings(recipe.MINI, 3)
    assert re.findall(r"[\d,]*\d", str(error.value))[:3] == ["8,192", "4", "3"]
    assert {"2", "4"} & set(re.findall(r"\d+", str(error.value).partition("divide")[2]))
    for world_size in (1, 2, 4):
        program.check_settings(recipe.MINI, world_size)


def test_validation_that_is_no_whole_number_of_sequences_is_answered_with_the_nearest_that_is(small, tmp_path):
    line = assert_refused(small("--val-tokens", "2100", "--steps", "4"), tmp_path, "2100", "1024")
    nearest = re.search(r"nearest that works: (--val-tokens) (\d+)", line)
    assert small(*nearest.groups(), "--steps", "4").returncode == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--step", "8"], ["--step;", "--steps "]),
        (["--muon_lr", "1"], ["--muon_lr;", "--muon-lr "]),
        (["--valtokens=8"], ["--valtokens=8", "--val-tokens "]),
        (["--dry-rum"], ["--dry-rum;", "--dry-run "]),
        (["--prest", "mini"], ["--prest;", "--preset "]),
        (["steps=8"], ["steps=8", "--steps "]),
        (["--preset", "tinny"], ["tinny", "tiny"]),
        (["--preset=recrod"], ["recrod", "record"]),
        (["--preset"], ["--preset"]),
        (["--steps"], ["--steps"]),
        (["--steps", "many"], ["--steps many", "whole number"]),
        (["--steps", "8.5"], ["--steps 8.5", "whole number"]),
        (["--steps", "0"], ["--steps 0", "at least"]),
        (["--steps", "3"], ["--steps 3", "at least", "4"]),
        (["--adam-lr", "fast"], ["--adam-lr fast", "number"]),
        (["--compile", "maybe"], ["--compile maybe", "true", "false"]),
        (["--dtype", "fp32"], ["--dtype fp32", "float32"]),
        (["--dtype", "bf16"], ["--dtype bf16", "bfloat16"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--slices", "-4"], ["--slices -4"]),
        (["--val-every", "0"], ["--val-every 0"]),
        (["--dim", "33"], ["--dim 33", "--heads 2"]),
    ],
)
def test_unknown_option_or_value_is_named_with_the_closest_that_exists(arguments, words, command, tmp_path):
    assert_refused(command(*arguments), tmp_path, *words)


@pytest.mark.parametrize(
    "option",
    ["--dim 0", "--dim -32", "--dim 4", "--heads 0", "--heads 16", "--vocab-size 0", "--bos-id -1", "--bos-id 99999"]
    + ["--bigram-dim 0", "--bigram-dim 33", "--bigram-rows 0", "--momentum-warmup 0", "--momentum-cooldown 0"]
    + ["--ngram 1", "--ngram 4", "--ngram 6", "--mlp-ratio 0", "--val-short-window 0", "--val-long-window -1"]
    + ["--cooldown 0", "--cooldown 1", "--cooldown 2", "--adam-every 0", "--adam-every 99"]
    + ["--seed 99999999999999999999", "--seed -1", "--run-id no/such/folder/x", "--val-seq-len 1"]
    + ["--bigram-rows 0.001", "--momentum 0", "--muon-beta2 1.5", "--average-steps 2 --muon false", "--slices 512"]
    + ["--muon-beta2 1", "--muon-lr nan", "--attention-scale inf", "--adam-wd -1"],
)
def test_odd_value_is_refused_or_run_but_never_answered_with_a_traceback(option, small, tmp_path):
    # A step a stage, without --steps, which would scale the momentum's options.
    before = "all_stages(steps=1, batch_tokens=512)\n"
    result = small("--val-tokens", "64", "--val-seq-len", "64", *option.split(), before=before)
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        assert log_lines(tmp_path)[-2].startswith("step:4/4 val_loss:")
    elif result.returncode == 3:
        assert "not finite" in log_lines(tmp_path)[-1]
    else:
        assert_line(result)
        assert not list(tmp_path.rglob("*.txt"))


def test_log_of_another_run_is_not_overwritten(small, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("precious")
    assert_line(small("--run-id", "mine", "--steps", "4"), "logs/mine.txt", "exists", "--run-id")
    assert (tmp_path / "logs" / "mine.txt").read_text() == "precious"
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_place_where_no_log_can_be_written_is_named(small, tmp_path):
    (tmp_path / "logs").write_text("a file")
    line = assert_line(small("--steps", "4"), "logs: ", "folder")
    assert "--run-id" not in line
    assert (tmp_path / "logs").read_text() == "a file"


FAILING = """
import builtins, errno
def open_failing(file, *args, original=open, **kwargs):
    if str(file).startswith("logs"):
        raise OSError(errno.{code}, os.strerror(errno.{code}))
    return original(file, *args, **kwargs)
builtins.open = open_failing
"""


@pytest.mark.parametrize(
    "code, reason, other_name",
    [
        ("ENOSPC", "No space left on device", False),
        ("EROFS", "Read-only file system", False),
        ("EACCES", "Permission denied", False),
        ("EEXIST", "File exists", True),
    ],
)
def test_log_that_cannot_be_written_is_answered_with_the_reason(code, reason, other_name, small, tmp_path):
    line = assert_line(small("--steps", "4", before=FAILING.format(code=code)), "logs/", reason)
    assert ("choose another --run-id" in line) == other_name


@pytest.mark.parametrize("name", ["no/such/folder/x", "x" * 300, "logs.txt/x"])
def test_run_id_that_can_be_no_file_is_answered_with_choose_another(name, small, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "logs.txt").touch()
    assert_line(small("--steps", "4", "--run-id", name), "cannot be written", "choose another --run-id")


# ----------------------------------------------------------------------------------------------------------------------
# Who reads, and with what
# ----------------------------------------------------------------------------------------------------------------------

# Said before `main`, as if a shell had opened the streams so.
REOPEN = """
sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
train_gpt.prepare_streams()
"""
GONE = {
    "no reader": "r, w = os.pipe(); os.close(r); os.dup2(w, 1)" + REOPEN,
    "no reader of both": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)" + REOPEN,
    "full disk": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)" + REOPEN,
    "a reader that reads a line": """
import threading
def read_a_line(r):
    with open(r) as file:
        file.readline()
r, w = os.pipe()
os.dup2(w, 1)
threading.Thread(target=read_a_line, args=(r,)).start()
"""
    + REOPEN,
}


@pytest.mark.parametrize("how", GONE)
def test_run_outlives_its_reader_with_one_warning_in_the_log(how, small, tmp_path):
    result = small("--steps", "12", "--checkpoint-last", "--run-id", "a", before=GONE[how])
    assert result.returncode == 0 and result.stderr == ""
    lines = log_lines(tmp_path)
    assert sum(line.startswith("warning: the screen is gone") for line in lines) == 1
    assert last_step(tmp_path) == 12 and lines[-1].startswith("peak memory")
    assert (tmp_path / "logs" / "a_step000012.pt").is_file()


@pytest.mark.parametrize("numbers", [[1], [2], [0, 1, 2]])
def test_run_with_closed_streams_writes_its_log_alone(numbers, small, tmp_path):
    before = f"names = ('stdin', 'stdout', 'stderr')\nfor number in {numbers}:\n    os.close(number)\n"
    before += "    setattr(sys, names[number], None)\ntrain_gpt.prepare_streams()\n"
    result = small("--steps", "4", "--checkpoint-last", "--run-id", "a", before=before)
    assert result.returncode == 0
    lines = log_lines(tmp_path)
    # Nothing that was meant for the screen, such as "log: logs/a.txt", went into a file that took its number.
    assert not any(line.startswith("log: logs/") for line in lines) and lines[-1].startswith("peak memory")
    assert (tmp_path / "logs" / "a_step000004.pt").is_file()


def as_main(before):
    """A script that does this first, and then is train_gpt.py as a shell starts it."""
    head = f"import os, runpy, sys, train_gpt\nsys.argv[0] = {str(SCRIPT)!r}\n"
    return f"{head}{before}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--preset", "mini", "--dry-run"], ["--preset", "tinny"]])
@pytest.mark.parametrize("how", ["no reader", "no reader of both", "full disk"])
def test_what_only_prints_ends_quietly_without_a_reader(arguments, how, launcher, tmp_path):
    result = launcher.start(as_main(GONE[how]), *arguments, cwd=tmp_path).wait()
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert result.stderr.count("\n") <= 1 and result.returncode in (0, 2, 141)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "arguments, status", [(["--help"], 0), (["--preset", "mini", "--dry-run"], 0), (["--preset", "é…\udcff"], 2)]
)
def test_whatever_is_printed_fits_any_encoding(arguments, status, encoding, launcher, tmp_path):
    streams = ", ".join(f"open({number}, 'w', encoding={encoding!r}, closefd=False)" for number in (1, 2))
    result = launcher.start(as_main(f"sys.stdout, sys.stderr = {streams}"), *arguments, cwd=tmp_path).wait()
    assert "Traceback" not in result.stderr and result.returncode == status


def test_paths_that_are_not_utf_8_are_logged(small, data, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9")
    shutil.copytree(data, folder)
    files = ("--train-files", f"{folder}/x_train_*.bin")
    result = small("--steps", "4", "--run-id", "\udce9", *files, before="train_gpt.prepare_streams()")
    assert result.returncode == 0, result.stderr
    (path,) = os.scandir(os.fsencode(tmp_path) + b"/logs")
    assert path.name == b"\xe9.txt"
    text = Path(os.fsdecode(path.path)).read_text(encoding="utf-8")
    assert "/\\udcff\\udce9/x_train_000001.bin" in text and "step:4/4 val_loss" in text


@pytest.mark.parametrize("system", ["win32", "cygwin", "freebsd14"])
def test_other_systems_are_named_before_anything_is_imported(system, tmp_path):
    code = f"import sys; sys.platform = {system!r}; sys.modules['torch'] = None; import runpy; sys.argv[:] = ['x']\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Linux" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--slices", "1"), ("--dim", "512"), ("--dtype", "float32", "--slices", "8")])
def test_plan_estimates_the_memory_that_a_run_takes_on_the_cpu(options, tmp_path):
    for name, tokens in (("train_000001", 200_000), ("val_000000", 20_000)):
        shards.write_shard(tmp_path / f"x_{name}.bin", random_documents(1, tokens))
    run = [sys.executable, SCRIPT, "--preset", "mini", "--compile", "false", *options]
    plan = subprocess.run([*run, "--dry-run"], capture_output=True, text=True, check=True).stdout
    files = ("--train-files", tmp_path / "x_train_*.bin", "--val-files", tmp_path / "x_val_*.bin")
    small = ("--steps", "4", "--val-tokens", "16384")
    done = subprocess.run([*run, *files, *small], cwd=tmp_path, capture_output=True, text=True, check=True)
    estimate = int(re.search(r"memory: about ([\d,]+) MiB", plan)[1].replace(",", ""))
    taken = int(re.search(r"peak memory allocated: (\d+) MiB", done.stdout)[1])
    assert estimate == pytest.approx(taken, rel=0.2)


# ----------------------------------------------------------------------------------------------------------------------
# The environment
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, name",
    [
        ({"RANK": "abc"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "99999", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "MASTER_ADDR"),
    ],
)
def test_environment_that_cannot_be_torchruns_is_refused(environment, name, small, tmp_path):
    assert_refused(small("--steps", "4", **environment), tmp_path, name, "torchrun")


# ----------------------------------------------------------------------------------------------------------------------
# Runs that fail
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, first_bad_step",
    [
        (("--muon-lr", "1e38"), 2),  # NorMuon updates after every step
        (("--adam-lr", "1e38"), 3),  # Adam after every second
    ],
)
def test_loss_that_is_not_finite_stops_the_run_at_its_step_and_the_log_names_it(
    option, first_bad_step, small, tmp_path
):
    result = small("--steps", "8", *option)
    assert_line(result, f"step {first_bad_step}", status=3)
    lines = log_lines(tmp_path)
    assert [line.split("/")[0] for line in lines if "train_loss" in line] == [
        f"step:{step}" for step in range(1, first_bad_step)
    ]
    assert lines[-1] == f"loss is not finite: step {first_bad_step}"
    assert not list(tmp_path.rglob("*.pt"))


def test_last_update_that_breaks_the_weights_is_no_success(small, tmp_path):
    # The learning rate is 1e38 at the very last step: its loss is finite, and only the last validation shows it.
    result = small("--steps", "8", "--final-lr", "1e38", "--cooldown", "0.1")
    assert_line(result, status=3)
    assert any(line.startswith("step:8/8 train_loss:") for line in log_lines(tmp_path))


linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")


@linux
def test_out_of_memory_is_answered_with_a_number_of_slices_to_try(small, tmp_path):
    # The warm-up shows it: there is no need for the steps.
    how = {"before": "all_stages(batch_tokens=8192)\ntrain_gpt.loop = lambda *args: None\n", "spare_memory": 300 << 20}
    result = small("--steps", "4", "--dim", "128", "--slices", "1", **how)
    assert_line(result, "memory", "1 slice", "--slices 2")
    assert not log_lines(tmp_path)
    assert small("--steps", "4", "--dim", "128", "--slices", "16", **how).returncode == 0


@linux
def test_model_that_does_not_fit_is_answered_without_a_traceback(command, tmp_path):
    assert_line(command("--steps", "4", "--dim", "8192", "--heads", "64", spare_memory=200 << 20), "memory")
    if list(tmp_path.glob("logs/*")):  # a log is whole, or not there
        assert log_lines(tmp_path) == []


def test_out_of_memory_in_the_middle_of_the_run_is_answered_without_a_traceback(small, tmp_path):
    before = """
def around(original, *args):
    wrap(train_gpt, "validate", lambda original, *args: torch.empty(1 << 50))
    return original(*args)
wrap(train_gpt, "loop", around)
"""
    assert_line(small("--steps", "4", before=before), "memory")
    assert log_lines(tmp_path) == []


STOPS = {
    # moment: (what happens before `main`; the last step in the log, 0 for none, None where there is no log yet)
    "while the data are read": (
        """
def around(original, *args):
    send()
    return original(*args)
wrap(train_gpt, "plan_batches", around)
""",
        None,
    ),
    "while the log is begun": (
        """
def around(original, *args):
    send()
    return original(*args)
wrap(train_gpt, "output_of", around)
""",
        0,
    ),
    "in the warm-up": (
        """
def around(original, *args):
    send()
    return original(*args)
wrap(train_gpt, "train_step", around)
""",
        0,
    ),
    "in a compiler that turns all exceptions into its own": (
        """
def around(original, *args):
    try:
        send()
        return original(*args)
    except Exception as error:
        raise RuntimeError("internal error") from error
wrap(train_gpt, "train_step", around)
""",
        0,
    ),
    "while it is found out whether compiling works": (
        """
def around(original, *args, **kwargs):
    send()
    return original(*args, **kwargs)
wrap(torch, "compile", around)
sys.argv += ["--compile", "true"]
""",
        None,
    ),
    "where Python drops exceptions": (
        """
class Dropping:
    def __del__(self):
        send()
def around(original, *args):
    Dropping()
    return original(*args)
wrap(train_gpt, "warm_up", around)
""",
        0,
    ),
    "in the first validation": (
        """
def around(original, *args):
    wrap(train_gpt, "validate", sending)
    return original(*args)
def sending(original, *args):
    send()
    return original(*args)
wrap(train_gpt, "loop", around)
""",
        1,
    ),
    "in the third step": (
        """
def around(original, *args):
    wrap(train_gpt, "train_step", sending)
    return original(*args)
calls = []
def sending(original, *args):
    calls.append(0)
    if len(calls) == 3:
        send()
    return original(*args)
wrap(train_gpt, "loop", around)
""",
        3,
    ),
}


@pytest.mark.parametrize("moment", STOPS)
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_ends_the_run_with_its_status_and_a_whole_log(name, status, moment, small, tmp_path):
    before, last = STOPS[moment]
    send = f"\ndef send(sent=[]):\n    if not sent:\n        sent.append(os.kill(os.getpid(), signal.{name}))\n"
    result = small("--steps", "8", "--val-every", "4", before=send + before)
    if moment == "where Python drops exceptions":  # and prints them
        result.stderr = result.stderr.splitlines(keepends=True)[-1]
    assert_line(result, name, status=status)
    if last is None:
        assert not list(tmp_path.iterdir())
    elif moment != "while the log is begun" or list(tmp_path.glob("logs/*")):  # whole, or not there
        assert last_step(tmp_path) == last


def test_second_signal_while_the_run_ends_changes_nothing(small, tmp_path):
    before = """
def first(original, *args):
    wrap(train_gpt, "train_step", sending)
    return original(*args)
def sending(original, *args):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
def second(original, *args, **kwargs):
    value = original(*args, **kwargs)
    if "stopped by" in args[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return value
wrap(train_gpt, "loop", first)
wrap(train_gpt.Log, "line", second)
"""
    assert_line(small("--steps", "8", before=before), "SIGINT", status=130)
    assert log_lines(tmp_path)[-1] == "stopped by a signal after step 1"


def test_second_signal_does_not_wait_for_the_end_of_a_long_step(small, tmp_path):
    before = """
def around(original, *args):
    wrap(train_gpt, "train_step", endless)
    return original(*args)
def endless(original, *args):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
wrap(train_gpt, "loop", around)
"""
    begin = time.monotonic()
    assert_line(small("--steps", "8", before=before), "SIGINT", status=130)
    assert time.monotonic() - begin < 50
    assert last_step(tmp_path) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_from_outside_ends_a_run_within_a_step_or_two(signum, small, tmp_path):
    running = small("--steps", "400", "--epochs", "20", wait=False)
    assert running.wait_for("step:2/400 train_loss")
    running.kill(signum)
    done = running.stdout().count("train_loss")
    result = running.wait()
    assert_line(result, signum.name, status=128 + signum)
    steps = [line for line in log_lines(tmp_path) if "train_loss" in line]
    assert done <= len(steps) <= done + 3
    assert steps == [line for line in result.stdout.splitlines() if "train_loss" in line]


def test_killed_run_leaves_all_it_did(small, tmp_path):
    before = """
def around(original, *args):
    wrap(train_gpt, "train_step", killing)
    return original(*args)
calls = []
def killing(original, *args):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
wrap(train_gpt, "loop", around)
"""
    assert small("--steps", "8", before=before).returncode == -signal.SIGKILL
    assert last_step(tmp_path) == 3


# ----------------------------------------------------------------------------------------------------------------------
# The log
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Example:
    """One run of the unchanged train_gpt.py in a Python of its own."""

    folder: Path
    result: subprocess.CompletedProcess
    seconds: float

    @property
    def log(self):
        return self.folder / "logs" / "example.txt"


STAGES = program.PRESETS["mini"].all_stages
STEPS = max(5, len(STAGES))  # of a run with the schedule of train_gpt.py: at least one a stage


@pytest.fixture(scope="session")
def enough(tmp_path_factory):
    """Options that name data for a few steps of preset mini, however large its batches are."""
    folder = tmp_path_factory.mktemp("enough")
    tokens = 5 * max(stage.batch_tokens for stage in STAGES)
    shards.write_shard(folder / "x_train_000001.bin", random_documents(1, tokens))
    shards.write_shard(folder / "x_train_000002.bin", random_documents(2, tokens))
    shards.write_shard(folder / "x_val_000000.bin", random_documents(3, 3000))
    files = "--train-files", folder / "x_train_*.bin", "--val-files", folder / "x_val_*.bin"
    return *files, "--epochs", str(STEPS)


@pytest.fixture(scope="module")
def example(tmp_path_factory, enough):
    folder = tmp_path_factory.mktemp("example")
    steps = ("--steps", STEPS, "--val-every", "2", "--seed", "7", "--run-id", "example")
    arguments = ("--preset", "mini", *MODEL, *VALIDATION, *enough, *steps)
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return Example(folder, result, time.monotonic() - begin)


STEP = re.compile(
    rf"step:(\d+)/{STEPS} (train|val)_loss:(\d+\.\d{{4}})"
    r" train_time:(\d+)ms step_avg:(\d+\.\d{2})ms"
)


def test_log_begins_with_the_source_and_its_hash(example):
    source, log = SCRIPT.read_bytes(), example.log.read_bytes()
    assert log.startswith(source)
    digest = hashlib.sha256(source).hexdigest()
    assert log[len(source) :].startswith(f"{RULE}\nsource: {len(source)} bytes, sha256 {digest}\n".encode())


def checksum(content):
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def test_log_names_environment_settings_and_data_in_order(command, data, tmp_path):
    assert command("--steps", "5", "--val-every", "2", "--seed", "7").returncode == 0
    header = only_log(tmp_path).read_bytes()[SCRIPT.stat().st_size :].decode().split(f"{RULE}\n")[1].splitlines()
    keys = ["source", "python", "pytorch", "cuda", "triton", "hardware", "world size", "git", "settings"]
    assert [line.partition(": ")[0] for line in header] == [*keys, "data", "data", "data", "validation stream"]
    values = dict(line.split(": ", 1) for line in header[: len(keys)])
    assert values["python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["pytorch"] == torch.__version__
    assert values["cuda"] == (torch.version.cuda or "none")
    assert values["hardware"].endswith(f", {os.cpu_count()} cores") and len(values["hardware"]) > 12
    assert values["world size"] == "1"
    paths = ("x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin")
    settings = json.loads(values["settings"])
    assert header[len(keys) : -1] == [
        f"data: {path.split('_')[1]} {data / path} {count} tokens, {checksum((data / path).read_bytes())}"
        for path, count in zip(paths, ("40,000", "40,000", "3,000"))
    ]
    # The last target is the token after the last input. A shard begins with 1,024 bytes of header.
    stream = (data / paths[-1]).read_bytes()[1024:][: 2 * (settings["val_tokens"] + 1)]
    assert header[-1] == f"validation stream: {settings['val_tokens'] + 1:,} tokens, {checksum(stream)}"
    assert {name: settings[name] for name in ("preset", "steps", "seed", "dtype", "val_every", "slices")} == {
        "preset": "mini", "steps": 5, "seed": 7, "dtype": "float32", "val_every": 2, "slices": 4,
    }  # fmt: skip
    assert settings["model"]["dim"] == 32 and settings["train_files"] == str(data / "x_train_*.bin")
    assert sum(stage["steps"] for stage in [*settings["stages"], settings["extension"]]) == 5


def test_log_names_the_commit_and_whether_it_was_dirty(example):
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    line = re.search(r"^git: (.*)$", example.log.read_bytes()[SCRIPT.stat().st_size :].decode(), re.MULTILINE)[1]
    if git.returncode:
        assert line == "none"
    else:
        assert re.fullmatch(r"[0-9a-f]{40}( dirty)?", line)


def test_log_of_a_script_outside_any_repository_says_so(small, tmp_path):
    before = f"train_gpt.__file__ = {str(shutil.copy(SCRIPT, tmp_path))!r}\n"
    assert small("--steps", "4", before=before, GIT_CEILING_DIRECTORIES="/").returncode == 0
    assert "\ngit: none\n" in only_log(tmp_path).read_text()


def test_log_has_every_step_and_validates_at_0_at_every_val_every_and_at_the_end(example):
    lines = log_lines(example.folder)
    steps = [STEP.fullmatch(line) for line in lines[:-1]]
    assert all(steps), lines
    expected = [(0, "val")]
    for step in range(1, STEPS + 1):
        expected.append((step, "train"))
        if step % 2 == 0 or step == STEPS:
            expected.append((step, "val"))
    assert [(int(step[1]), step[2]) for step in steps] == expected
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", lines[-1])
    assert 50 < int(lines[-1].split()[3]) < 20_000
    times = [int(step[4]) for step in steps]
    assert times == sorted(times) and times[0] <= 5
    for step in steps:
        assert abs(float(step[5]) - int(step[4]) / max(int(step[1]), 1)) <= 0.51
    assert times[-1] / 1000 < example.seconds


def test_losses_begin_at_that_of_a_uniform_guess_and_fall(command, tmp_path):
    assert command("--steps", "5", "--val-every", "2", "--seed", "7").returncode == 0
    log = "\n".join(log_lines(tmp_path))
    losses = [float(loss) for loss in re.findall(r"^step:\d/5 val_loss:(\S+)", log, re.MULTILINE)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # At first every token has nearly the same logit: the loss is the logarithm of the padded vocabulary.
    assert abs(losses[0] - np.log(384)) < 0.05


def test_output_into_a_pipe_is_plain_lines_and_those_of_the_log(example):
    lines = log_lines(example.folder)
    assert [line for line in example.result.stdout.splitlines() if re.match("step:|peak", line)] == lines
    assert "\r" not in example.result.stdout and "logs/example.txt" in example.result.stdout
    assert example.result.stderr == ""


def test_run_leaves_nothing_but_its_log(example):
    assert sorted(path.name for path in example.folder.rglob("*")) == ["example.txt", "logs"]


def test_logbook_reads_the_log(example):
    result = subprocess.run([sys.executable, LOGBOOK, "show", "--json", example.log], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (run,) = json.loads(result.stdout)
    last = STEP.fullmatch(log_lines(example.folder)[-2])
    expected = {
        "total_steps": STEPS,
        "final_step": STEPS,
        "val_loss": float(last[3]),
        "train_time_ms": float(last[4]),
        "step_avg_ms": float(last[5]),
        "peak_memory_mib": float(log_lines(example.folder)[-1].split()[3]),
    }
    assert {key: run[key] for key in expected} == expected
    header = example.log.read_bytes()[SCRIPT.stat().st_size :].decode()
    table = subprocess.run([sys.executable, LOGBOOK, "show", example.log], capture_output=True, text=True).stdout
    assert re.search("^hardware: (.*)$", header, re.MULTILINE)[1] in table
    assert re.search("^git: (.{1,8})", header, re.MULTILINE)[1] in table


def test_logbook_extracts_the_script_byte_for_byte(example, tmp_path):
    command = [sys.executable, LOGBOOK, "extract", example.log, "--out", tmp_path / "train.py"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (tmp_path / "train.py").read_bytes() == SCRIPT.read_bytes()


# Time stands still but for what a wrapped function is said to take.
MADE_UP_TIME = """
now = [0.0]
class Time:
    perf_counter = staticmethod(lambda: now[0])
    def __getattr__(self, name):
        return getattr(time, name)
def taking(seconds):
    def around(original, *args):
        now[0] += seconds
        return original(*args)
    return around
train_gpt.time = Time()
"""


def test_clock_runs_in_steps_only(small, tmp_path):
    # A clock that shows a second for every step and a thousand for every validation and for all that comes before.
    before = MADE_UP_TIME + """
wrap(train_gpt, "train_step", taking(1))
for name in ("plan_batches", "warm_up", "validate"):
    wrap(train_gpt, name, taking(1000))
train_gpt.measure_peak = lambda *args: 1e12
"""
    assert small("--steps", "6", "--val-every", "2", before=before).returncode == 0
    timed = [re.match(r"step:(\d+)/6 .*train_time:(\d+)ms step_avg:(.*)ms", line) for line in log_lines(tmp_path)[:-1]]
    assert len(timed) == 1 + 6 + 3
    for step in timed:
        assert int(step[2]) == 1000 * int(step[1])
        assert float(step[3]) == (1000 if int(step[1]) else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Prefix tokens
# ----------------------------------------------------------------------------------------------------------------------

# A tiktoken whose token n stands for the digits of n, so that 1234 has the prefix 123, and a digit has none.
DIGITS = """
import types
class Encoding:
    eot_token = 50256
    def decode_single_token_bytes(self, token): return str(token).encode()
sys.modules["tiktoken"] = types.SimpleNamespace(get_encoding=lambda name: Encoding())
"""
NO_TIKTOKEN = """
sys.modules["tiktoken"] = None
"""
UNREACHABLE = """
import types
def get_encoding(name): raise ConnectionError("no route\\nto host")
sys.modules["tiktoken"] = types.SimpleNamespace(get_encoding=get_encoding)
"""


@pytest.fixture
def gpt2(small, tmp_path):
    """Four steps of the preset record, small, on documents of 16 of GPT-2's tokens: BOS, 120, 7, 120, …, 120."""
    folder = tmp_path / "data"
    folder.mkdir()
    document = [50256, *[120, 7] * 7, 120]
    for name, count in ("train", 100), ("val", 20):
        shards.write_shard(folder / f"x_{name}_000000.bin", np.array(count * document))
    files = ("--train-files", folder / "x_train_*.bin", "--val-files", folder / "x_val_*.bin")
    vocabulary = ("--vocab-size", "50257", "--bos-id", "50256", "--bigram", "false", "--value-embeds", "false")
    sizes = ("--steps", "4", "--val-tokens", "64", "--val-seq-len", "32")
    (tmp_path / "run").mkdir()

    def run(*arguments, before):
        options = (*files, *vocabulary, *sizes, *arguments)
        before += "all_stages(batch_tokens=256)\n"
        return small(*options, preset="record", before=before, cwd=tmp_path / "run")

    return run


def test_prefix_tokens_add_their_share_of_the_loss_in_training_and_their_table_is_made_on_the_clock(gpt2, tmp_path):
    # The clock shows a second for every step, ten for the table, and a thousand for all that comes before.
    before = MADE_UP_TIME + """
for name, seconds in {"train_step": 1, "prefix_table": 10, "gpt2_vocabulary": 1000, "warm_up": 1000}.items():
    wrap(train_gpt, name, taking(seconds))
train_gpt.measure_peak = lambda *args: 1e12
"""
    losses, times = {}, {}
    for value, tiktoken in ("true", DIGITS), ("false", NO_TIKTOKEN):
        assert gpt2("--prefix-tokens", value, "--run-id", value, before=tiktoken + before).returncode == 0
        text = (tmp_path / "run" / "logs" / f"{value}.txt").read_text()
        found = re.findall(r"^step:(\d)/4 (\w+)_loss:(\S+) train_time:(\d+)ms", text, re.MULTILINE)
        losses[value] = {(int(step), kind): float(loss) for step, kind, loss, _ in found}
        times[value] = {int(step): int(milliseconds) for step, _, _, milliseconds in found}
    assert times["false"] == {step: 1000 * step for step in range(5)}
    assert times["true"] == {step: 1000 * step + 10_000 for step in range(5)}
    assert losses["true"][0, "val"] == losses["false"][0, "val"]
    # Half of a slice's 32 targets are 120; BOS and 7 have no prefix. At first all 50,304 columns are equally likely.
    added = losses["true"][1, "train"] - losses["false"][1, "train"]
    assert added == pytest.approx(0.25 * 16 / 32 * np.log(50304), rel=0.01)
    assert losses["true"][4, "val"] != losses["false"][4, "val"]


@pytest.mark.parametrize("missing", [NO_TIKTOKEN, UNREACHABLE], ids=["no tiktoken", "no network"])
def test_without_gpt2s_vocabulary_prefix_tokens_are_answered_with_a_line_before_the_run(missing, gpt2, tmp_path):
    result = gpt2(before=missing)
    reason = "no route to host" if missing == UNREACHABLE else "tiktoken"
    assert_refused(result, tmp_path / "run", "GPT-2's vocabulary", reason, "--prefix-tokens false")


def test_bytes_have_no_prefixes_and_need_no_tiktoken(small, tmp_path):
    before = NO_TIKTOKEN + """
def noting(original, *args):
    value = original(*args)
    print("exactly", float(value).hex())
    return value
wrap(train_gpt, "train_step", noting)
wrap(train_gpt, "validate", noting)
"""
    runs = []
    for value in "true", "false":
        result = small("--steps", "4", "--prefix-tokens", value, before=before)
        assert result.returncode == 0, result.stderr
        runs.append(re.findall("exactly (.*)", result.stdout))
    assert len(runs[0]) > 4 and runs[0] == runs[1]


# ----------------------------------------------------------------------------------------------------------------------
# The terminal
# ----------------------------------------------------------------------------------------------------------------------


def read_terminal(main, running):
    """All that a run writes to its terminal, until it ends."""
    os.set_blocking(main, False)
    text, ended = b"", False
    while True:
        try:
            text += os.read(main, 65536)
        except OSError:  # there is nothing now
            if ended:
                return text.decode()
            ended = running.poll() is not None
            time.sleep(0.01)


def test_terminal_shows_one_status_line_and_the_log_is_the_same(small, tmp_path):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))  # rows and columns
    before = "wrap(train_gpt, 'train_step', lambda original, *args: (time.sleep(0.12), original(*args))[1])\n"
    arguments = ("--steps", "8", "--val-every", "4", "--run-id", "shown")
    running = small(*arguments, before=before, terminal=os.ttyname(terminal), wait=False, TERM="xterm")
    text = read_terminal(main, running)
    os.close(main)
    os.close(terminal)
    assert running.status == 0, text
    assert "train_loss" not in text  # lines that stay are validations
    assert re.findall(r"step:(\d)/8 val_loss", text) == ["0", "4", "8"]
    states = [part for part in re.split(r"[\r\n]", text) if "tokens/s" in part]
    assert len(states) >= 4
    for state in states[1:]:
        step = re.search(r"\b(\d)/8\b", state)[1]
        shown = re.search(r"loss (\d+\.\d{4}).* [\d,]+ tokens/s.* MFU \d+ ?%", state)
        left = re.search(r"\d\d:\d\d left", state)
        assert shown and left, state
        assert f"step:{step}/8 train_loss:{shown[1]} " in only_log(tmp_path).read_text()
    line = r"^step:(\d)/8 (train|val)_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$"
    kinds = re.findall(line, "\n".join(log_lines(tmp_path)), re.MULTILINE)
    steps = [(str(step), "train") for step in range(1, 9)]
    assert kinds == [("0", "val"), *steps[:4], ("4", "val"), *steps[4:], ("8", "val")]


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

SCALARS = [
    field
    for owner in (program.Settings, program.ModelConfig)
    for field in dataclasses.fields(owner)
    if field.name not in ("preset", "model", "stages", "extension", "layers")
]


def value_in(settings, name):
    return getattr(settings if hasattr(settings, name) else settings.model, name)


@pytest.mark.parametrize("preset", ["record", "mini"])
def test_help_lists_every_field_with_its_line_and_default(preset, launcher, tmp_path):
    result = launcher.start(SCRIPT, "--preset", preset, "--help", cwd=tmp_path, COLUMNS="300").wait()
    assert result.returncode == 0 and result.stderr == "" and not list(tmp_path.iterdir())
    text = " ".join(result.stdout.split())
    for field in SCALARS:
        option, default = "--" + field.name.replace("_", "-"), value_in(program.PRESETS[preset], field.name)
        shown = "" if default in (None, "") else rf" \(default: {re.escape(str(default))}\)"
        line = rf"{option} (\[?[A-Z]+\]?|{{[\w,]+}}) (?P<help>(?:(?!--[a-z]).){{8,}}?){shown}( --| model|$)"
        found = re.search(line, text)
        assert found, option
        assert found["help"].startswith(field.metadata["help"])


def test_every_field_can_be_set(launcher):
    settings = program.PRESETS["mini"]
    for field in SCALARS:
        if field.name == "resume":
            continue  # a checkpoint's own settings come with it
        old = value_in(settings, field.name)
        if isinstance(old, bool):
            new = not old
        elif field.name == "dtype":
            new = "bfloat16"
        elif isinstance(old, str):
            new = "something else"
        elif field.type is float:
            new = old / 2
        else:
            new = (old or 24) * 2
            new = min(new, field.metadata.get("high", new))
        for arguments in ([f"--{field.name.replace('_', '-')}", str(new)], [f"--{field.name.replace('_', '-')}={new}"]):
            changed, dry_run = program.parse_arguments(["--preset", "mini", *arguments])
            assert value_in(changed, field.name) == new and type(value_in(changed, field.name)) is type(new)
            assert not dry_run
            others = [other.name for other in SCALARS if other.name not in (field.name, "momentum_warmup")]
            if field.name == "steps":
                others = [name for name in others if name not in ("momentum_cooldown", "tables_from")]
            assert [value_in(changed, name) for name in others] == [value_in(settings, name) for name in others]


def test_steps_shrink_all_stages_in_proportion_and_count_the_extension(monkeypatch):
    monkeypatch.setattr(program, "PRESETS", recipe.PRESETS)
    for preset, steps in (("mini", 49), ("record", 139), ("mini", 4), ("record", 2780)):
        settings, _ = program.parse_arguments(["--preset", preset, "--steps", str(steps)])
        old = [stage.steps for stage in program.PRESETS[preset].all_stages]
        new = [stage.steps for stage in settings.all_stages]
        assert sum(new) == settings.total_steps == steps
        for before, after in zip(old, new):
            assert after >= 1 and abs(after - before * steps / sum(old)) <= 1


# Recipe: 423, 424 and 423 steps of the batches, then 15; and the matrices that every token is multiplied with.
RECORD_TOKENS = 423 * 131_072 + 424 * 262_144 + (423 + 15) * 393_216
RECORD_ACTIVE = {"head": 768 * 50_304, "MLP": 11 * 8 * 768**2, "attention": 10 * 4 * 768**2}


@pytest.mark.parametrize("preset", ["record", "mini"])
def test_dry_run_prints_the_plan_and_leaves_no_files(preset, launcher, tmp_path):
    result = launcher.start(SCRIPT, "--preset", preset, "--dry-run", cwd=tmp_path).wait()
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert not list(tmp_path.iterdir())
    parameters = result.stdout.partition("\ntotal ")[0]
    rows = re.findall(r"^(\w+) +(\d+(?: x \d+)*) +([\d,]+)  ", parameters, re.MULTILINE)
    config = program.PRESETS[preset].model
    with torch.device("meta"):
        assert [name for name, _, _ in rows] == [name for name, _ in program.GPT(config).named_parameters()]
    counts = [int(count.replace(",", "")) for _, _, count in rows]
    assert counts == [int(np.prod([int(n) for n in shape.split(" x ")])) for _, shape, _ in rows]
    assert f"{sum(counts):,}" == re.search(r"^total +([\d,]+)$", result.stdout, re.MULTILINE)[1]
    for words in ("GFLOP a token", "MiB a process", "at an MFU of 100 %", "s at 45 %"):
        assert words in result.stdout
    for stage in (*program.PRESETS[preset].stages, program.PRESETS[preset].extension):
        short, long = stage.windows
        row = rf"^\S+ +{stage.steps} +{stage.batch_tokens:,} .* {stage.max_seq_len:,} +{short}, {long}\b"
        assert re.search(row, result.stdout, re.MULTILINE), row


@pytest.mark.recipe
def test_dry_run_of_the_record_has_the_recipes_totals(launcher, tmp_path):
    text = launcher.start(SCRIPT, "--dry-run", cwd=tmp_path).wait().stdout
    assert f"training tokens: {RECORD_TOKENS / 1e6:.1f}M" in text and "338.8M" in text
    active = re.search(r"active matrix parameters: ([\d.]+)M", text)[1]
    assert abs(float(active) - sum(RECORD_ACTIVE.values()) / 1e6) < 0.06 and active.startswith("114")
    for name, count in RECORD_ACTIVE.items():
        assert f"{name} {count / 1e6:.1f}M" in text
    # 6 FLOP a parameter, and 12 a channel and key: 8 layers with the short and 2 with the long window, and the heads
    # that are composed dynamically.
    stages = [(423, 131_072, 128, 384), (424, 262_144, 384, 896), (423, 393_216, 640, 1408), (15, 393_216, 768, 1664)]
    flops = sum(
        steps * batch * (6 * sum(RECORD_ACTIVE.values()) + 12 * 768 * (8 * short + 2 * long + 112))
        for steps, batch, short, long in stages
    )
    assert abs(float(re.search(r"([\d.]+) GFLOP a token", text)[1]) - flops / RECORD_TOKENS / 1e9) < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Repeatability
# ----------------------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_losses_bit_for_bit_and_another_seed_others(small, tmp_path):
    before = """
def noting(original, *args):
    value = original(*args)
    print("exactly", float(value).hex())
    return value
def around(original, *args):
    wrap(train_gpt, "train_step", noting)
    wrap(train_gpt, "validate", noting)
    return original(*args)
wrap(train_gpt, "loop", around)
"""
    runs = []
    for seed in (1, 1, 2):
        result = small("--steps", "4", "--val-every", "2", "--seed", seed, before=before)
        assert result.returncode == 0, result.stderr
        runs.append(re.findall("exactly (.*)", result.stdout))
    assert len(runs[0]) == 4 + 3 and all("nan" not in value for value in runs[0])
    assert runs[0] == runs[1]
    assert all(one != other for one, other in zip(runs[0], runs[2]))


def snapshot(thing):
    """All that an object holds: tensors as bytes, containers and objects member by member."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, tuple(thing.shape), thing.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(thing, dict):
        return {key: snapshot(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [snapshot(value) for value in thing]
    return repr(thing)


@pytest.mark.parametrize("steps_before", [0, 5], ids=["before the first step", "after some steps"])
def test_warm_up_leaves_no_trace(steps_before, monkeypatch):
    # The network of train_gpt.py, and the schedule of recipe.py.
    mini = replace(recipe.MINI, model=program.PRESETS["mini"].model)
    monkeypatch.setitem(program.PRESETS, "mini", mini)
    settings, _ = program.parse_arguments(["--preset", "mini", *MODEL, "--steps", "8", "--val-seq-len", "256"])
    shrink = [replace(stage, batch_tokens=512) for stage in (*settings.stages, settings.extension)]
    settings = replace(settings, stages=tuple(shrink[:-1]), extension=shrink[-1])
    world = program.World(0, 1, torch.device("cpu"))
    torch.manual_seed(3)
    model = program.GPT(settings.model)
    with torch.no_grad():
        for p in model.parameters():  # nothing is zero, so that everything has a gradient
            p.copy_(torch.randn_like(p) * 0.1)
    model.embed.data.copy_(model.lm_head.data.T)
    optimizer = program.Optimizer(model, settings, 0, 1)
    for step in range(3, 3 + steps_before):  # the head and the embedding part on the way
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(program.schedule(settings, step))

    def all_there_is():
        rng = (torch.get_rng_state(), np.random.get_state(), random.getstate())
        grads = {name: p.grad for name, p in model.named_parameters()}
        return snapshot([dict(model.named_parameters()), dict(model.named_buffers()), vars(optimizer), rng, grads])

    for p in model.parameters():  # as from a checkpoint between two of Adam's updates
        p.grad = torch.randn_like(p) if steps_before else None
    before, during = all_there_is(), []
    step = program.Optimizer.step

    def watched(*args, **kwargs):
        step(*args, **kwargs)
        during.append(snapshot(dict(model.named_parameters())))

    monkeypatch.setattr(program.Optimizer, "step", watched)
    program.warm_up(settings, model, model, optimizer, world)
    assert during and all(during[-1][name] != value for name, value in before[0].items())  # it did train
    after = all_there_is()
    parts = ("parameters", "buffers", "optimizer", "random numbers", "gradients")
    for part, old, new in zip(parts, before, after):
        assert old == new, part


@pytest.mark.parametrize("rank", range(4))
def test_warm_up_of_each_rank_compiles_another_length_first(rank, monkeypatch):
    settings, _ = program.parse_arguments(["--preset", "mini", *MODEL, "--slices", "1", "--val-seq-len", "256"])
    cut = zip((*settings.stages, settings.extension), (256, 512, 768, 768))
    *stages, extension = (replace(stage, batch_tokens=tokens) for stage, tokens in cut)
    settings = replace(settings, stages=tuple(stages), extension=extension)
    model, calls = program.GPT(settings.model), []
    for name in "train_step", "validate":
        note = functools.partial(lambda name, _, tokens, *others: calls.append((name, tokens.size(1) - 1)), name)
        monkeypatch.setattr(program, name, note)
    monkeypatch.setattr(program.Optimizer, "step", lambda self, hyper: calls.append(("update", hyper.adam)))
    optimizer = program.Optimizer(model, settings, rank, 4)
    program.warm_up(settings, model, model, optimizer, program.World(rank, 4, torch.device("cpu")))
    lengths = [256, 512, 768]
    first = rank % 3
    assert calls[:3] == [("train_step", each) for each in lengths[first:] + lengths[:first]]
    assert calls[3:9] == [each for adam in (False, True, True) for each in (("train_step", 768), ("update", adam))]
    assert {name for name, _ in calls[9:]} == {"validate"}
