"""run.sh and tests/run.sh, with a stand-in for Python that writes down how it is called."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "run.sh", ROOT / "setup.sh", ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]

# What a shell script may need; no Python but the stand-in.
TOOLS = ("bash", "sh", "env", "dirname", "basename", "grep", "sed", "awk", "cat", "cut", "tr", "wc", "head", "tail")
TOOLS += ("ls", "rm", "mkdir", "cp", "mv", "touch", "uname", "sort", "seq", "printf", "readlink", "id", "true", "false")

# It serves or not by which of these files exist, and makes a .venv as `python -m venv` would.
PYTHON = """#!{bash}
name=$0
{{ printf '%s\\0' "$name" "$PWD" "$@"; printf '\\036'; }} >> "$CALLS"
here=$(cd "$(dirname "$name")" && pwd)
case "${{1-}} ${{2-}}" in
    "- ") cat > /dev/null; [ -e "$here/serves" ] ;;
    "-c "*device_count*) echo "$GPUS" ;;
    "bench/plan.py --fit") [ -z "${{FITS-}}" ] || echo "$FITS" ;;
    "-c "*) [ -e "$here/serves_tests" ] ;;
    "-V ") printf 'Python %s\\n' "${{VERSION:-3.12.4}}" ;;
    "-m venv") for folder in "$@"; do :; done
        mkdir -p "$folder/bin"; cp "$name" "$folder/bin/python"
        case "$*" in *--system-site-packages*) cp "$here/serves" "$folder/bin/serves" ;; esac ;;
    "-m pip") [ ! -e offline ] || exit 1
        case " $*" in *" tests/requirements.txt"*) touch "$here/serves_tests" ;; esac
        case " $*" in *" requirements.txt"*) touch "$here/serves" ;; esac ;;
    "-m ruff") [ ! -e "$here/ruff_complains" ] ;;
    *) exit "${{STATUS:-0}}" ;;
esac
"""


class Machine:
    """A copy of the scripts, and a PATH with the tools and the stand-in, which says that PyTorch sees no GPU."""

    gpus = 0

    def __init__(self, folder):
        self.project, self.bin, self.calls_file = folder / "a project", folder / "bin", folder / "calls"
        for script in SCRIPTS:
            (self.project / script.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(script, self.project / script.relative_to(ROOT))
        self.bin.mkdir()
        for tool in TOOLS:
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(path)
        self.program("python3", PYTHON.format(bash=shutil.which("bash")))
        for name in ("serves", "serves_tests"):
            (self.bin / name).touch()

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments, script="run.sh", cwd=None, status=0, **environment):
        """The calls of Python, each a list of arguments; those that only ask whether it serves are left out."""
        self.calls_file.write_text("")
        stand_in = {"CALLS": str(self.calls_file), "GPUS": str(self.gpus)}
        result = subprocess.run(
            [shutil.which("bash"), script, *arguments],
            cwd=cwd or self.project,
            env={"PATH": str(self.bin), "HOME": "/nowhere", **stand_in, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
        self.stdout, self.stderr = result.stdout, result.stderr
        calls = [line.split("\0")[:-1] for line in self.calls_file.read_text().split("\036")[:-1]]
        self.pythons = [name for name, _, *_ in calls]
        assert {folder for _, folder, *_ in calls} <= {str(self.project)}
        return [call for _, _, *call in calls if call[0] not in ("-", "-c", "-V")]

    def train(self, *arguments, **how):
        """The call of train_gpt.py, the last one."""
        *before, call = self.run(*arguments, **how)
        self.before = before
        return call


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# bash
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_sound_bash(script):
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    if script.name != "setup.sh":  # that one is sourced
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in script.read_text()


# Features newer than bash 3.2, which is macOS's: a pattern and an example that it must find.
NEWER = {
    "associative array": (r"\b(declare|local|typeset)\s+-\w*[Ag]", "declare -A options"),
    "name reference": (r"\b(declare|local|typeset)\s+-\w*n", "local -n target=$1"),
    "change of case": (r"\$\{[^}]*(,|\^)", "${name,,}"),
    "transformation": (r"\$\{[^}]*@[A-Za-z]\}", "${name@Q}"),
    "negative substring length": (r"\$\{\w+:[^}]*:\s*-", "${name:0:-1}"),
    "negative index": (r"\$\{\w+\[\s*-", "${names[-1]}"),
    "mapfile": (r"\b(mapfile|readarray)\b", "mapfile -t lines"),
    "coproc": (r"\bcoproc\b", "coproc cat"),
    "redirection of both, appending": (r"&>>", "x &>> log"),
    "pipe of both": (r"\|&", "x |& y"),
    "test of a variable": (r"\[\s+(!\s+)?-[vR]\s", "[[ -v name ]]"),
    "fall-through in case": (r";;&|;&", "a) x ;;&"),
    "time in printf": (r"%\([^)]*\)T", "printf '%(%s)T' -1"),
    "wait for any": (r"\bwait\s+-\w*[np]", "wait -n"),
    "step of a range": (r"\{\w+\.\.\w+\.\.", "{1..9..2}"),
    "new variable": (r"\$\{?(EPOCH|BASHPID|SRANDOM|BASH_ARGV0)", "$EPOCHSECONDS"),
    "new option": (r"\bshopt\s.*(globstar|lastpipe|inherit_errexit)", "shopt -s globstar"),
    "array that may be empty under set -u": (r"\"\$\{\w+\[@\]\}\"", 'python "${options[@]}"'),
    "read with a fraction": (r"\bread\b.*-t\s*\d*\.\d", "read -t 0.1"),
    "file descriptor in a variable": (r"\{\w+\}[<>]", "exec {fd}< file"),
}


@pytest.mark.parametrize("feature", NEWER)
def test_scripts_need_no_newer_bash_than_3_2(feature):
    pattern, example = NEWER[feature]
    assert re.search(pattern, example)
    for script in SCRIPTS:
        code = re.sub(r"(^|\s)#.*", "", script.read_text())
        assert not re.search(pattern, code), script


# ----------------------------------------------------------------------------------------------------------------------
# run.sh
# ----------------------------------------------------------------------------------------------------------------------


SHOWN = ["--checkpoint-last", "--sample-every", "500"]


TINY = ["train_gpt.py", *SHOWN, "--preset", "tiny"]


def test_without_gpus_it_trains_tiny_in_plain_python_on_the_embedded_corpus(machine):
    assert machine.train() == TINY
    assert machine.stdout == "PyTorch sees no GPU here: preset tiny, on the CPU\n"
    assert machine.before == [["data/embedded.py"]]


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_small_runs_end_with_something_to_look_at_unless_the_arguments_say_otherwise(preset, machine):
    arguments = ("--preset", preset, "--sample-every", "0")
    assert machine.train(*arguments) == ["train_gpt.py", *SHOWN, *arguments]  # the last one counts
    own = (*arguments[:2], "--train-files", "x_*.bin")  # of tokens that may have no text
    assert machine.train(*own) == ["train_gpt.py", *own]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_are_those_that_pytorch_sees(visible, machine):
    """The command that counts them, run by the Python of these tests: it has to be right where there are GPUs, too."""
    command = re.search(r"^count='(.*?)'$", (ROOT / "run.sh").read_text(), re.DOTALL | re.MULTILINE)[1]
    for environment, count in (({"CUDA_VISIBLE_DEVICES": visible}, 0), ({}, torch.cuda.device_count())):
        where = {**os.environ, **environment}
        counted = subprocess.check_output([sys.executable, "-c", command], env=where, text=True)
        assert counted == f"{count}\n"
    assert "nvidia-smi" not in (ROOT / "run.sh").read_text()


FETCH = ["data/cached_fineweb10B.py", "9"]


def test_one_gpu_trains_the_record_in_plain_python(machine):
    machine.gpus = 1
    run = ["--preset", "record"]
    assert machine.train() == ["train_gpt.py", *run]
    # A mistake in the arguments shows before anything is fetched.
    assert machine.before == [["bench/plan.py", "--fit", "1", *run], ["train_gpt.py", "--dry-run", *run], FETCH]
    assert machine.run(STATUS="2", status=2) == machine.before[:2]


def test_gpus_get_as_many_slices_as_their_memory_needs_unless_the_arguments_number_them(machine):
    machine.gpus = 1
    call = machine.train("--seed", "7", FITS="--slices 32")
    assert call == ["train_gpt.py", "--slices", "32", "--preset", "record", "--seed", "7"]
    assert machine.train("--slices=8", FITS="--slices 32") == ["train_gpt.py", "--preset", "record", "--slices=8"]
    assert machine.train("--resume=x.pt", FITS="--slices 32") == ["train_gpt.py", "--resume=x.pt"]  # which has both
    machine.gpus = 8
    machine.train("--preset", "next", FITS="--slices 16", NNODES="2", NODE_RANK="0", MASTER_ADDR="node0")
    assert machine.before[0] == ["bench/plan.py", "--fit", "16", "--preset", "next"]
    assert machine.before[1] == ["train_gpt.py", "--dry-run", "--slices", "16", "--preset", "next"]


@pytest.mark.parametrize("gpus", [2, 8])
def test_several_gpus_train_the_record_under_torchrun_on_all_of_them(gpus, machine):
    machine.gpus = gpus
    call = machine.train("--seed", "7")
    assert call[:2] == ["-m", "torch.distributed.run"]
    assert set(call[2:5]) == {"--standalone", f"--nproc_per_node={gpus}", "--virtual-local-rank"}
    assert call[5:] == ["train_gpt.py", "--preset", "record", "--seed", "7"]
    assert machine.before[-1] == FETCH


def test_nproc_is_the_number_of_processes(machine):
    call = machine.train(NPROC="4")
    assert "--nproc_per_node=4" in call and "--virtual-local-rank" not in call and call[-6:] == TINY
    machine.gpus = 8
    assert machine.train(NPROC="1") == ["train_gpt.py", "--preset", "record"]
    assert "--nproc_per_node=2" in machine.train(NPROC="2")


def test_more_processes_than_gpus_are_refused_before_anything_is_fetched(machine):
    machine.gpus = 2
    assert machine.run(NPROC="3", status=2) == []
    assert machine.stderr == "run.sh: NPROC=3, but PyTorch sees 2 GPUs\n"


def test_small_presets_have_one_process_unless_nproc_says_more(machine):
    machine.gpus = 8  # more than mini has slices
    assert machine.train("--preset", "mini") == ["train_gpt.py", *SHOWN, "--preset", "mini"]
    assert "--nproc_per_node=2" in machine.train("--preset", "mini", NPROC="2")


def test_several_nodes_meet_through_torchrun(machine):
    machine.gpus = 8
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    call = machine.train("--seed", "7", **where)
    assert call[:2] == ["-m", "torch.distributed.run"]
    options = {"--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--master_addr=node0", "--master_port=1234"}
    assert options | {"--virtual-local-rank"} <= set(call)
    assert "--standalone" not in call
    assert call[call.index("train_gpt.py") :] == ["train_gpt.py", "--preset", "record", "--seed", "7"]


def test_one_process_on_each_of_several_nodes_is_torchrun_too(machine):
    call = machine.train(NNODES="2", NODE_RANK="0", MASTER_ADDR="node0")
    assert {"--nproc_per_node=1", "--nnodes=2", "--node_rank=0", "--master_addr=node0"} <= set(call)


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_nodes_without_an_address_or_number_say_which_is_missing(missing, machine):
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    del where[missing]
    assert machine.run(status=2, **where) == []
    assert machine.stderr.startswith(f"run.sh: {missing} is not set") and machine.stderr.count("\n") == 1


NODES = {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


@pytest.mark.parametrize("name", ["NPROC", "NNODES", "NODE_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "2 2", "99999999999999999999", "0x2", "a[$(touch x)]", "é"])
def test_number_that_cannot_be_one_is_refused_before_anything_is_fetched(name, text, machine):
    assert machine.run(status=2, **(NODES | {name: text})) == []
    assert machine.stderr.startswith(f"run.sh: {name}={text}: must be a whole number")
    assert machine.stderr.count("\n") == 1 and not (machine.project / "x").exists()


@pytest.mark.parametrize("name, low, high", [("NPROC", 1, 65535), ("NODE_RANK", 0, 3), ("MASTER_PORT", 1, 65535)])
def test_number_out_of_its_range_is_refused(name, low, high, machine):
    for number, status in ((low - 1, 2), (low, 0), (high, 0), (high + 1, 2)):
        machine.run(status=status, **(NODES | {name: str(number)}))


def test_number_that_is_set_to_nothing_is_not_set(machine):
    assert machine.train(NPROC="", NNODES="") == TINY
    assert "--nnodes=08" in machine.train(**(NODES | {"NNODES": "08", "NODE_RANK": "07"}))


ARGUMENTS = ["--train-files", "my data/x_*.bin", "--run-id", "", "--seed=7", "a'b\"c", "$HOME `id` \\", "*"]


@pytest.mark.parametrize("gpus", [0, 8])
def test_arguments_arrive_as_they_are(gpus, machine):
    machine.gpus = gpus
    call = machine.train(*ARGUMENTS)
    assert call[call.index("train_gpt.py") + 3 :] == ARGUMENTS


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("arguments", [["--preset", "tiny"], ["--preset=tiny"], ["--seed", "1", "--preset", "tiny"]])
def test_named_preset_is_kept_and_gets_its_data(arguments, gpus, machine):
    machine.gpus = gpus
    call = machine.train(*arguments)
    assert call[call.index("train_gpt.py") + 1 :] == [*SHOWN, *arguments]
    assert machine.before == [["data/embedded.py"]]
    for other in "record", "next":
        machine.train(*(argument.replace("tiny", other) for argument in arguments))
        assert machine.before[-1] == FETCH


@pytest.mark.parametrize("argument", ["--train-files=x", "--train-files", "--dry-run", "--help", "-h"])
def test_run_with_data_of_its_own_or_without_any_fetches_none(argument, machine):
    machine.train(argument, "x")
    assert machine.before == []


@pytest.mark.parametrize(
    "words, said", [(["--slcies", "16"], "the closest that exists is --slices"), ([], "8 slices and world size 3")]
)
def test_mistake_in_the_options_of_the_record_is_answered_before_the_fetch(words, said, tmp_path):
    """With the Python of these tests, and no program that fetches."""
    for file in ("run.sh", "setup.sh", "train_gpt.py"):
        shutil.copy(ROOT / file, tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "NPROC": "3"}
    command = ["bash", tmp_path / "run.sh", "--preset", "record", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_failing_fetch_ends_it_before_the_run(machine):
    assert machine.run(STATUS="2", status=2) == [["data/embedded.py"]]


def test_status_of_the_run_is_its_own(machine):
    assert machine.run("--dry-run", STATUS="3", status=3)


def test_it_works_from_any_folder(machine, tmp_path):
    expected = [*TINY, "--seed", "1"]
    (tmp_path / "elsewhere" / "a project").mkdir(parents=True)
    for cwd, script in ((tmp_path, "a project/run.sh"), (tmp_path / "elsewhere", "../a project/run.sh")):
        assert machine.train("--seed", "1", cwd=cwd, script=script) == expected
    assert machine.train("--seed", "1", cwd=tmp_path / "elsewhere", script=machine.project / "run.sh") == expected
    # Through a symbolic link, and a relative one to that.
    (tmp_path / "linked").symlink_to(machine.project / "run.sh")
    (tmp_path / "elsewhere" / "again").symlink_to("../linked")
    for script in (tmp_path / "linked", "../linked", "again"):
        assert machine.train("--seed", "1", cwd=tmp_path / "elsewhere", script=script) == expected
    # cd looks into the folders of CDPATH first.
    how = {"cwd": tmp_path, "script": "a project/run.sh", "CDPATH": str(tmp_path / "elsewhere")}
    assert machine.train("--seed", "1", **how) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Setting up
# ----------------------------------------------------------------------------------------------------------------------


def test_python_that_serves_is_used_as_it_is(machine):
    machine.run()
    assert set(machine.pythons) == {str(machine.bin / "python3")}
    assert not (machine.project / ".venv").exists()


def test_python_that_does_not_serve_gets_a_venv_once(machine):
    (machine.bin / "serves").unlink()
    calls = machine.run("--seed", "1")
    assert calls[0][:2] == ["-m", "venv"]
    assert calls[1][:3] == ["-m", "pip", "install"]
    assert calls[1][-4:] == ["--requirement", "records/requirements.txt", "--requirement", "requirements.txt"]
    assert calls[-1] == [*TINY, "--seed", "1"]
    assert machine.pythons[-1].endswith(".venv/bin/python")
    calls = machine.run()
    assert calls == [["data/embedded.py"], TINY]
    assert machine.pythons[-1].endswith(".venv/bin/python")


def test_set_up_that_was_interrupted_is_taken_up_again(machine):
    (machine.bin / "serves").unlink()
    (machine.project / "offline").touch()
    calls = machine.run(status=1)
    assert not any("train_gpt.py" in call for call in calls)
    (machine.project / "offline").unlink()
    assert machine.train() == TINY
    assert any(call[:3] == ["-m", "pip", "install"] for call in machine.before)


def test_machine_without_python_is_told_what_to_install(machine):
    (machine.bin / "python3").unlink()
    assert machine.run(status=2) == []
    assert "python" in machine.stderr.lower() and machine.stderr.count("\n") == 1


@pytest.mark.parametrize("version, serves", [("2.7.18", False), ("3.9.21", False), ("3.10.2", True), ("3.14.0", True)])
def test_python_that_is_too_old_is_named(version, serves, machine):
    (machine.bin / "serves").unlink()
    calls = machine.run(status=0 if serves else 2, VERSION=version)
    assert bool(calls) == serves
    assert machine.stderr == ("" if serves else f"Python {version} is too old: install Python 3.10 or newer\n")


def test_python_by_its_other_name_will_do(machine):
    (machine.bin / "python3").rename(machine.bin / "python")
    assert machine.train() == TINY


# ----------------------------------------------------------------------------------------------------------------------
# tests/run.sh
# ----------------------------------------------------------------------------------------------------------------------


PYTEST = ["-m", "pytest", "-n", "auto", "--maxprocesses=4", "--dist=worksteal"]


def test_tests_run_sh_lints_and_tests_from_any_folder_with_its_arguments(machine, tmp_path):
    arguments = ["-m", "slow", "-k", "a b"]
    calls = machine.run(*arguments, script="a project/tests/run.sh", cwd=tmp_path)
    assert calls == [["-m", "ruff", "check", "."], [*PYTEST, *arguments]]


def test_tests_run_sh_stops_at_the_linter(machine):
    (machine.bin / "ruff_complains").touch()
    assert machine.run(script="tests/run.sh", status=1) == [["-m", "ruff", "check", "."]]


def test_tests_run_sh_passes_on_the_status_of_the_tests(machine):
    for script in ("tests/run.sh", ".ci/run"):
        machine.run(script=script, STATUS="5", status=5)


def test_tests_run_sh_installs_what_is_missing_into_a_venv(machine):
    (machine.bin / "serves_tests").unlink()
    calls = machine.run(script="tests/run.sh")
    installs = [call for call in calls if call[:3] == ["-m", "pip", "install"]]
    assert any("tests/requirements.txt" in call for call in installs)
    assert calls[-1] == PYTEST and machine.pythons[-1].endswith(".venv/bin/python")
    assert machine.run(script="tests/run.sh") == [["-m", "ruff", "check", "."], PYTEST]


def test_what_tests_run_sh_installs_suffices_for_a_python_that_is_itself_a_venv(machine):
    # A venv made from a venv sees the packages of the Python below, not those of that venv: it needs everything.
    (machine.bin / "serves_tests").unlink()
    python = (machine.bin / "python3").read_text()
    machine.program("python3", python.replace("*--system-site-packages*)", "nothing)"))
    machine.run(script="tests/run.sh")
    assert (machine.project / ".venv" / "bin" / "serves").exists()
