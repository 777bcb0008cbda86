"""What makes the tracks' results, in records/: the ablation, the laptop track, and what they share."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import ablate
import command
import recipe
import runs
import track
import train_gpt
from command import UserError

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100
SOURCE = (ROOT / "train_gpt.py").read_bytes()
PROGRAMS = ("ablation/ablate.py", "optimizer_track/tune.py", "tiny/track.py")


def write_log(
    path: Path, loss: float, step_ms: list[int], steps: int = 8, done: int = 0, source=SOURCE, **settings
) -> None:
    """The log of a run with these settings whose steps take these times in turn; of `done` steps if not of all."""
    sha256 = hashlib.sha256(source).hexdigest()
    settings = {"preset": "mini", "steps": steps, **settings}
    lines = [RULE, f"source: {len(source)} bytes, sha256 {sha256}", f"settings: {json.dumps(settings)}", RULE]
    done, now = done or steps, 0
    for step in range(1, done + 1):
        now += step_ms[step % len(step_ms)]
        lines.append(f"step:{step}/{steps} train_loss:5.0000 train_time:{now}ms step_avg:{now / step:.2f}ms")
    lines.append(f"step:{done}/{steps} val_loss:{loss:.4f} train_time:{now}ms step_avg:{now / done:.2f}ms")
    path.write_bytes(source + "\n".join(lines).encode() + b"\n")


def test_step_time_is_that_of_the_quickest_quarter(tmp_path):
    write_log(tmp_path / "x.txt", 1.5, [100, 101, 5000, 5000], steps=40)
    assert 100 <= runs.step_time(tmp_path / "x.txt") <= 101


def test_programs_of_the_tracks_say_from_any_folder_how_they_are_used(tmp_path):
    started = []
    for program in PROGRAMS:
        words = [sys.executable, str(ROOT / "records" / program), "--help"]
        started.append(subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    for program, running in zip(PROGRAMS, started):
        said, _ = running.communicate()
        assert running.returncode == 0 and said.startswith(f"usage: {Path(program).name}")


def test_run_that_fails_is_told_in_a_line_with_its_status(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("import sys\nprint('first\\nlast', file=sys.stderr)\nsys.exit(3)\n")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(UserError, match="run_1: fails.py .* failed: last") as error:
        runs.train(tmp_path / "run_1.txt", "fails.py", ["--steps", "8"])
    assert error.value.status == 3


# ----------------------------------------------------------------------------------------------------------------------
# The ablation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Three seeds of the base and of two variants."""
    variants = {
        "all": ablate.Variant("nothing", {}),
        "no_smear": ablate.Variant("smear", {"smear": False}),
        "no_yarn": ablate.Variant("YaRN", {"yarn": False}),
    }
    monkeypatch.setattr(ablate, "variants", lambda: variants)
    for seed, (base, without) in enumerate([(1.5, 1.52), (1.4, 1.45), (1.6, 1.61)], 1):
        write_log(tmp_path / f"all-{seed}.txt", base, [100, 100, 900], seed=seed)
        switch = {"model": {"smear": False}, "seed": seed}
        write_log(tmp_path / f"no_smear-{seed}.txt", without, [110, 110, 300 * seed], **switch)
        write_log(tmp_path / f"no_yarn-{seed}.txt", base, [100], yarn=False, seed=seed)
    return tmp_path


@pytest.fixture
def answer(logs, monkeypatch, capsys):
    """What the command line prints, where it ends with this status; or the line that it says if it fails."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def answer(*arguments, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["ablate.py", "--out", str(logs), "--steps", "8", *arguments])
        with pytest.raises(SystemExit) as end:
            command.run(ablate.main, train_gpt.UserError)
        said = capsys.readouterr()
        assert (end.value.code or 0) == status, said
        if not status:
            return said.out
        (line,) = said.err.splitlines()
        return line

    yield answer
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def trained(monkeypatch):
    """The names and options of the runs that are made, by a stand-in for training."""
    made = {}

    def train(path, script, options, alone):
        assert not alone
        settings, _ = train_gpt.parse_arguments(options)
        assert script == "train_gpt.py" and settings.total_steps == 8
        made[path.name] = settings
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")  # at once, as another thread may read what there is
        write_log(beside, 1.5, [100], preset=settings.preset, seed=settings.seed)
        beside.rename(path)

    monkeypatch.setattr(train_gpt, "PRESETS", recipe.PRESETS)
    monkeypatch.setattr(ablate, "train", train)
    return made


def row(table: str, what: str) -> str:
    (found,) = [line for line in table.splitlines() if line.startswith(f"| {what} |")]
    return found


def test_ablation_has_the_mean_of_paired_differences_and_its_interval(answer, logs):
    table = answer("--table")
    # Differences 0.02, 0.05 and 0.01: mean 0.02667, standard deviation 0.02082; t of 2 degrees of freedom 4.3027.
    assert row(table, "smear") == "| smear | `--smear false` | 3 | 1.5267 | +0.0267 ± 0.0517 | 1.10 |"
    assert (logs / "table.md").read_text() == table.rstrip() + "\n"


def test_ablation_leaves_out_runs_that_are_not_complete(answer, logs):
    write_log(logs / "no_smear-2.txt", 1.0, [100], done=4)
    assert "| 2 | 1.5650 | +0.0150 ± " in row(answer("--table"), "smear")


def test_ablation_goes_on_where_it_was_cut_off(answer, logs, trained):
    (logs / "all-3.txt").unlink()
    write_log(logs / "no_smear-1.txt", 1.0, [100], done=4)
    table = answer()
    assert {name: settings.model.smear for name, settings in trained.items()} == {
        "no_smear-1.txt": False, "all-3.txt": True,
    }  # fmt: skip
    assert {settings.preset for settings in trained.values()} == {"mini"}
    assert (logs / "table.md").read_text() == table.rstrip() + "\n"


def test_only_some_variants_are_run_and_in_the_table_which_leaves_that_of_all_as_it_is(answer, logs, trained):
    for name in ("all-2", "no_smear-1", "no_yarn-2"):
        (logs / f"{name}.txt").unlink()
    table = answer("--only", "no_yarn")
    assert set(trained) == {"all-2.txt", "no_yarn-2.txt"}
    assert row(table, "nothing") and row(table, "YaRN") and "smear" not in table
    assert not (logs / "table.md").exists()
    table = answer("--only", "no_yarn", "--only", "no_smear")
    assert set(trained) == {"all-2.txt", "no_yarn-2.txt", "no_smear-1.txt"} and row(table, "smear")


def test_variant_that_does_not_exist_is_told_with_the_closest(answer, trained):
    assert "the closest is no_smear" in answer("--only", "no_smaer", status=2)
    assert not trained


def test_every_preset_can_be_ablated_with_logs_of_its_own(answer, logs, trained):
    line = answer("--preset", "record", status=2)
    assert str(logs / "all-1.txt") in line and "preset" in line and "--out" in line
    table = answer("--preset", "record", "--out", str(logs / "record"), "--seeds", "1")
    assert {settings.preset for settings in trained.values()} == {"record"}
    assert set(trained) == {"all-1.txt", "no_smear-1.txt", "no_yarn-1.txt"} and row(table, "YaRN")
    assert "tiny" in answer("--preset", "tinny", status=2)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"source": b"print('another script')\n"}, "source"),
        ({"val_tokens": 2048}, "val_tokens"),
        ({"model": {"smear": False, "dim": 128}}, "dim"),
        ({"model": {"smear": False}, "yarn": False}, "yarn"),
    ],
)
def test_runs_that_differ_in_more_than_the_switch_and_the_seed_are_not_paired(answer, logs, change, name):
    for log in ("all-1", "all-2", "all-3"):
        settings = {"model": {"smear": True, "dim": 256}, "yarn": True, "val_tokens": 4096}
        write_log(logs / f"{log}.txt", 1.5, [100], **settings)
    write_log(logs / "no_smear-2.txt", 1.5, [100], **change)
    line = answer("--table", "--only", "no_smear", status=2)
    first, second = (str(logs / f"{log}.txt") for log in ("all-1", "no_smear-2"))
    assert f"{first} and {second}" in line and f"differ in {name}: " in line and "--out" in line
    assert not (logs / "table.md").exists()


def test_runs_of_the_base_that_are_of_different_sources_are_no_experiment(answer, logs):
    write_log(logs / "all-3.txt", 1.5, [100], source=b"print('another script')\n")
    line = answer("--table", status=2)
    assert "all-1.txt" in line and "all-3.txt" in line and "source" in line


def test_runs_are_not_added_to_logs_of_another_source_or_length(answer, logs, trained):
    (logs / "no_yarn-3.txt").unlink()
    assert "steps" in answer("--steps", "9", status=2)
    for path in logs.glob("*.txt"):
        write_log(path, 1.5, [100], source=b"print('another script')\n")
    line = answer(status=2)
    assert "all-1.txt" in line and "source" in line and "--table" in line
    assert not trained


def test_table_without_a_run_of_the_preset_is_a_mistake(answer, logs):
    assert "all-1.txt" in answer("--table", "--out", str(logs / "empty"), status=2)


def test_switches_that_older_sources_carried_out_in_their_tables_still_pair(answer, logs, monkeypatch):
    both = {"all": ablate.Variant("nothing", {}), "no_mtp": ablate.Variant("MTP", {"multi_token": False})}
    monkeypatch.setattr(ablate, "variants", lambda: both)
    for seed in (1, 2, 3):
        write_log(logs / f"all-{seed}.txt", 1.5, [100], stages=[{"mtp": [[1, 0]]}], multi_token=True)
        write_log(logs / f"no_mtp-{seed}.txt", 1.4, [100], stages=[{"mtp": [[1]]}], multi_token=False)
    assert "| -0.1000 ± 0.0000 |" in row(answer("--table"), "MTP")


def test_every_technique_has_its_variant():
    names = set(ablate.variants())
    assert {"all", "plain", "adam", "no_smear", "no_mudd", "no_yarn", "no_length_schedule"} <= names
    assert len(names) == 3 + len(ablate.TECHNIQUES) + len(ablate.ADDED)
    for variant in ablate.variants().values():
        train_gpt.parse_arguments(["--preset", "mini", *variant.options])


# ----------------------------------------------------------------------------------------------------------------------
# The laptop track
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """Training in which a step takes 10 ms and the loss follows a formula; returns what was trained."""
    trained = []

    def train(path, script, options, alone=True):
        values = (
            dict(zip(options[::2], options[1::2])) if len(options) % 2 == 0 else dict(zip(options[1::2], options[2::2]))
        )
        steps, seed = int(values["--steps"]), int(values["--seed"])
        rate, batch = float(values.get("--lr", 2.4e-3)), int(values.get("--batch-tokens", 1024))
        speed = 1 if script == track.BASELINE else 2 - options.count("false") / 25
        loss = 1 + 5 / (1 + 0.001 * speed * steps) + abs(rate - 2.4e-3) + abs(batch - 1024) * 1e-5 + 1e-4 * seed
        trained.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_log(path, loss, [10], steps=steps, batch_tokens=batch)

    monkeypatch.setattr(track, "train", train)
    monkeypatch.setattr(track, "OUT", tmp_path)
    monkeypatch.setattr(track, "README", tmp_path / "README.md")
    monkeypatch.setattr(track, "PRESET", tmp_path / "_preset" / "run.txt")
    sections = "".join(f"<!-- {name} -->\nNot measured yet.\n<!-- end of {name} -->\n" for name in ("records", "grid"))
    track.README.write_text(sections)
    monkeypatch.setattr(track, "BASELINE_SECONDS", 8)
    monkeypatch.setattr(track, "GRID_SECONDS", 1)
    return trained


def test_track_finds_the_best_point_the_target_and_the_fewest_steps_to_it(laptop, tmp_path):
    best = track.grid()
    assert best == track.baseline(2.4e-3, 1024)
    target, steps = track.search(track.history(best))
    # 800 steps of 10 ms: a loss of 1 + 5 / 1.8 and a bit, and the margin.
    assert steps["0_baseline"] == 800 and target == 3.82
    for record in track.history(best)[1:]:
        loss = 1 + 5 / (1 + 0.001 * (2 - record.options.count("false") / 25) * steps[record.name]) + 1e-4
        assert 3.76 <= round(loss, 4) <= 3.78, record.name
    before = len(laptop)
    assert track.grid() == best and track.search(track.history(best)) == (target, steps)
    assert len(laptop) == before  # nothing is run twice
    track.runs(track.history(best), target, steps, 3)
    assert len(laptop) == before + 6 * 3 + 1
    text = (tmp_path / "README.md").read_text()
    assert "**5." in text and "Not measured" not in text and "3.82 nats per byte. Runs of each record: 3." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| [")]
    assert [row[0] for row in rows] == [f"[{name}](2026-11-21_{name})" for name in steps]
    for name, (_, _, count, loss, p, seconds, sooner, tokens, fewer) in zip(steps, rows):
        assert int(count) == steps[name]
        # A step takes 10 ms, and losses rise by 1e-4 from seed to seed: a half interval of 4.3027 * 1e-4 / sqrt(3).
        assert loss.endswith(" ± 0.0002") and float(loss.split()[0]) <= 3.7803 and float(p) < 0.01
        assert seconds.split()[1:] == ["±", "0.0"] and float(seconds.split()[0]) == pytest.approx(
            steps[name] / 100, abs=0.051
        )
        assert float(sooner.split()[0]) == pytest.approx(800 / steps[name], abs=0.01)
        assert float(tokens) == pytest.approx(steps[name] * 1024 / 1e6, abs=0.0051)
        assert float(fewer) == pytest.approx(800 / steps[name], abs=0.01)


def test_times_are_compared_with_the_baseline_of_the_same_seed(laptop):
    records = track.history(track.baseline(2.4e-3, 1024))[:2]
    for record, times in zip(records, ([10, 20], [5, 5])):
        for seed, milliseconds in enumerate(times, 1):
            track.run(record, path := record.run(seed), 100, seed)
            path.write_text(re.sub(r"train_time:\d+ms", f"train_time:{100 * milliseconds}ms", path.read_text()))
    # Ratios of 2 and 4: 3 +- 12.7062 * sqrt(2) / sqrt(2).
    assert "| 3.00 ± 12.71 |" in track.table(records, 3.79, 2).splitlines()[-1]


def test_best_point_on_the_edge_of_the_grid_is_a_mistake(laptop, monkeypatch):
    monkeypatch.setattr(track, "RATES", (2.4e-3, 4.8e-3))
    with pytest.raises(UserError, match="edge"):
        track.grid()


def test_record_that_takes_longer_than_the_baseline_is_a_mistake(laptop):
    record = track.history(track.grid())[1]
    with pytest.raises(UserError, match=f"{record.name}.*not 1.01"):
        track.fewest_steps(record, aim=1.01, steps=50, limit=100)


def test_every_record_of_the_track_has_options_that_exist():
    off = []
    for record in track.history(track.baseline(1e-3, 4096))[1:]:
        settings, _ = train_gpt.parse_arguments([*record.options, "--steps", "50", "--seed", "3"])
        off.append(sum(word == "false" for word in record.options))
    assert off == sorted(off, reverse=True) and off[-1] == 0
    names = {f"--{name.replace('_', '-')}" for name in ablate.TECHNIQUES}
    assert set(track.TECHNIQUES) == names


def test_tokens_of_a_run_come_from_its_log(tmp_path):
    settings = train_gpt.with_steps(recipe.MINI, 37)
    (tmp_path / "x.txt").write_text(f"source\nsettings: {json.dumps(asdict(settings))}\n")
    assert track.tokens_of(tmp_path / "x.txt") == 37 * 8192
