"""`logbook.py attempt`, with scripts that write a log in place of training, and a check that says what it is told."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from test_logbook import LOGBOOK, ROOT, checked, logbook, write

# It takes about MS, and ends at about LOSS, both a little more with each seed.
SCRIPT = '''
import hashlib, json, sys
from pathlib import Path

MS, LOSS = {ms}, {loss}
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed, steps = int(options["--seed"]), int(options.get("--steps", 100))
with open("calls", "a") as calls:
    calls.write(f"{{MS}} {{seed}}\\n")
MS += len(open("calls").readlines())  # no run is quite like another
settings = {{"preset": options["--preset"], "seed": seed, "steps": steps, "val_tokens": 524288}}
settings |= {{name: options["--" + name.replace("_", "-")] for name in ("train_files", "val_files")}}
settings |= {{"lr": float(options.get("--lr", 1))}}
settings["momentum_warmup"] = int(options.get("--momentum-warmup", 300)) * steps // 1000  # follows the steps
source = Path(__file__).read_bytes()
rule = "=" * 100
sums = hashlib.sha256(source).hexdigest()
text = source.decode() + f"{{rule}}\\nsource: {{len(source)}} bytes, sha256 {{sums}}\\npython: 3\\npytorch: 2.13.0\\n"
text += f"cuda: none\\ntriton: none\\nhardware: a laptop\\nworld size: 1\\ngit: {{'0' * 40}}\\n"
text += f"settings: {{json.dumps(settings)}}\\n{{rule}}\\n"
text += f"step:0/{{steps}} val_loss:5.5 train_time:0ms step_avg:0.00ms\\n"
last = f"val_loss:{{LOSS + seed / 1000:.4f}} train_time:{{MS + seed**2 * MS // 1000}}ms step_avg:1.00ms"
text += f"step:{{steps}}/{{steps}} {{last}}\\n"
Path("logs").mkdir(exist_ok=True)
Path("logs", options["--run-id"] + ".txt").write_text(text)
'''
CHECK = '''
import json, sys
print(json.dumps({"started": True}), json.dumps({"loaded": True}), sep="\\n")
for name in sys.argv[2:]:
    found = ["it looks ahead"] if "CHEAT" in open(sys.argv[1]).read() else []
    print(json.dumps({"check": name, "rule": "a rule", "findings": found, "notes": [], "not_judged": None}))
'''


def script(ms, loss):
    return SCRIPT.format(ms=ms, loss=loss)


@pytest.fixture
def project(tmp_path):
    """A project whose track `tiny` has one record, of 8 s."""
    pytest.importorskip("scipy")
    folder = tmp_path / "records"
    write(folder / "README.md", "<!-- leaderboard: tiny, target 1.44 -->\n<!-- end of table -->\n")
    record = folder / "tiny" / "2026-06-01_a"
    record.parent.mkdir(parents=True)
    first = write(tmp_path / "first.py", script(8000, 1.42))
    for seed in (1, 2, 3):
        options = {"preset": "tiny", "run-id": f"run_{seed}", "seed": seed}
        options |= {f"{kind}-files": f"data/sympy/sympy_{kind}_*.bin" for kind in ("train", "val")}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, first, *words], cwd=record.parent, check=True)
    (record.parent / "logs").rename(record)
    (record.parent / "calls").unlink()
    write(record / "README.md", f"# The first\n\nContributors: @me\n\n{checked(first.read_bytes())}")
    for module in LOGBOOK.parent.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copy(ROOT / "command.py", tmp_path)
    write(folder / "legality.py", CHECK)
    return tmp_path


def attempt(project, text, name="faster", *more, status=0, seeds=3):
    mine = write(project / f"{name}.py", text)
    words = ("attempt", mine, "--track", "tiny", "--name", name, "--seeds", seeds, *more)
    return logbook(*words, status=status, script=project / "records" / "logbook.py")


def folder_of(project, name="faster"):
    (folder,) = (project / "records" / "tiny").glob(f"????-??-??_{name}")
    return folder


def test_attempt_that_is_faster_becomes_a_record_that_the_leaderboard_lists(project):
    assert "a record" in attempt(project, script(6000, 1.41)).stdout
    folder = folder_of(project)
    runs = {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}
    assert runs == {f"{where}run_{seed}.txt" for where in ("", "previous/") for seed in range(1, 4)}
    # In turn, and who begins changes.
    calls = (project / "calls").read_text().split("\n")[:-1]
    assert calls == ["6000 1", "8000 1", "8000 2", "6000 2", "6000 3", "8000 3"]
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# Faster\n") and "| 1 | 1.4110 | 6.01 s | 1.4210 | 8.01 s |" in readme
    done = logbook("leaderboard", script=project / "records" / "logbook.py")
    assert done.stderr == ""
    assert re.findall(r"\[(.*?)\]\(tiny", (project / "records" / "README.md").read_text()) == ["The first", "Faster"]


@pytest.mark.slow
def test_attempt_that_was_broken_off_goes_on_where_it_was(project):
    attempt(project, script(6000, 1.41))
    folder = folder_of(project)
    (folder / "previous" / "run_2.txt").unlink()
    (folder / "run_3.txt").write_text("cut off")
    (project / "calls").unlink()
    attempt(project, script(6000, 1.41))
    assert (project / "calls").read_text() == "8000 2\n6000 3\n"


@pytest.mark.parametrize(
    "ms, loss, reason",
    [(9000, 1.41, "not shown to be faster"), (8000, 1.41, "not shown to be faster"), (6000, 1.45, "target is not")],
)
def test_attempt_that_is_slower_or_misses_the_target_is_none(ms, loss, reason, project):
    assert reason in attempt(project, script(ms, loss), status=1).stdout
    assert not (folder_of(project) / "README.md").exists()


def test_attempt_that_is_illegal_is_not_trained(project):
    done = attempt(project, "# CHEAT\n" + script(6000, 1.41), status=1)
    assert "it looks ahead" in done.stdout and not (project / "calls").exists()


def test_options_after_two_dashes_are_the_scripts(project):
    attempt(project, script(6000, 1.41), "rate", "--", "--lr", "0.5", "--steps", "80")
    log = (folder_of(project, "rate") / "run_1.txt").read_text()
    settings = json.loads(re.findall(r"^settings: (\{.*)$", log, re.MULTILINE)[-1])
    assert settings["lr"] == 0.5 and settings["steps"] == 80
    assert "`lr` 1 → 0.5" in (folder_of(project, "rate") / "README.md").read_text()


@pytest.mark.slow
def test_runs_of_another_script_under_the_same_name_are_refused(project):
    attempt(project, script(6000, 1.41), seeds=2)
    said = attempt(project, script(5000, 1.41), status=2).stderr
    assert "of another experiment than" in said and "another script" in said


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--track", "nine", "--name", "a"), "no track nine: there are tiny"),
        (("--track", "tiny", "--name", "a/b"), "--name a/b"),
        (("--track", "tiny", "--name", "a", "--seeds", "1"), "2 to 100"),
    ],
)
def test_mistakes_are_answered_with_a_line(words, reason, project):
    done = logbook("attempt", "x.py", *words, status=2, script=project / "records" / "logbook.py")
    assert reason in done.stderr and done.stderr.count("\n") == 1
