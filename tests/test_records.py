"""The numbers in records/ and in README.md: every one is what the logs in this repository give."""

import math
import re
import sys
from pathlib import Path

import pytest

import ablate
import leaderboard
import logbook
import plan
import runs
import track
import tune

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "records"


def run_of(path: Path) -> logbook.Run:
    run = runs.finished(path)
    assert run, f"{path} is not complete"
    return run


def table_rows(text: str, columns: int) -> list[list[str]]:
    """The rows of a text's Markdown tables that have so many columns, without those of heads and rules."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == columns and not set(row[0]) <= set("-: ")]


def without_sections(readme: Path, folder: Path, *names: str) -> Path:
    """A copy of a README whose generated sections are empty."""
    copy = folder / "README.md"
    copy.write_text(readme.read_text())
    for name in names:
        runs.put_section(copy, name, "")
    return copy


@pytest.fixture
def trains_nothing(monkeypatch):
    def train(path, *_):
        pytest.fail(f"{path} is not there, or not complete")

    monkeypatch.setattr(track, "train", train)
    monkeypatch.setattr(tune, "train", train)


def test_leaderboards_are_up_to_date(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["logbook.py", "leaderboard", "--check"])
    assert logbook.main() == 0, capsys.readouterr()


# ---- The ablation ----------------------------------------------------------------------------------------------------

SEEDS = 5  # at the most
ABLATION = RECORDS / "ablation"
LOGS = {80: ABLATION, 160: ABLATION / "160_steps"}  # by the steps of each run


def ablation_table(steps: int) -> str:
    return ablate.table(LOGS[steps], ablate.variants(), SEEDS)


def ablation(steps: int) -> dict[str, list[str]]:
    """The table's row of each variant, as the logs have it."""
    names = {variant.change: name for name, variant in ablate.variants().items()}
    return {names[row[0]]: row for row in table_rows(ablation_table(steps), 6)[1:]}


@pytest.mark.parametrize("steps", LOGS)
def test_ablation_tables_are_those_of_their_logs(steps):
    assert (LOGS[steps] / "table.md").read_text() == ablation_table(steps)
    for name in ablation(steps):
        assert runs.origin(LOGS[steps] / f"{name}-1.txt").settings["steps"] == steps


def test_ablations_reading_says_what_its_tables_do():
    text = (ABLATION / "README.md").read_text()
    short, long = ablation(80), ablation(160)
    assert short.keys() == long.keys()
    given = [[*short[name][4:1:-2], *long[name][4:1:-2]] for name in short if name != ablate.BASE]
    shown = [row for row in table_rows(text, 6) if "±" in row[1]]
    assert sorted(row[1:5] for row in shown) == sorted(given)
    without = text.partition("| with, in addition")[0]
    for name, _, _, longer, count, verdict in shown:
        middle, half = (float(each) for each in longer.split(" ± "))
        better = middle > 0 if f"| {name} |" in without else middle < 0
        clear = "helps" if better else "**hurts**"
        assert verdict == (clear if abs(middle) > half else "not clear")
        assert int(count) == 5 or (int(count) == 3 and abs(middle) > half)
    for row in (each[name] for each in (short, long) for name in (ablate.BASE, "plain", "adam")):
        assert f"{float(row[3]):.3f}" in text


def test_numbers_of_narrow_queries_and_keys_are_those_of_their_logs():
    folder = ABLATION / "heads_of_128"
    table = ablate.table(folder, ablate.variants(), SEEDS)
    assert (folder / "table.md").read_text() == table
    *_, (_, option, count, _, difference, _) = table_rows(table, 6)
    assert option == "`--narrow-qk true`" and int(count) == SEEDS
    assert runs.origin(folder / "all-1.txt").settings["model"]["heads"] == 2
    for page in ABLATION / "README.md", RECORDS / "next.md":
        assert difference in page.read_text()


def test_what_is_said_of_next_is_what_the_ablation_says():
    text = (RECORDS / "next.md").read_text()
    parts = text.partition("## What `next` has")[2].partition("## Leads that are not built")[0]
    shown = re.findall(r"[+-]\d\.\d{4} ± \d\.\d{4}", parts)
    names = ("narrow_qk", "rare_tables", "six_polar_steps", "slow_momentum")
    assert [ablation(160)[f"with_{name}"][4] for name in names] == [shown[0], *shown[2:]]


def test_ablations_grid_is_that_of_its_logs():
    text = (ABLATION / "README.md").read_text()
    factors, losses = (line.split("|")[2:-1] for line in text.splitlines() if re.match(r"\| (lr ×|loss) \|", line))
    assert len(losses) >= 4
    for factor, loss in zip(factors, losses, strict=True):
        run = run_of(ABLATION / "adam_grid" / f"adam-{factor.strip()}.txt")
        assert float(loss) == run.val_loss


# ---- The laptop track ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(trains_nothing, tmp_path, monkeypatch):
    """The track's records, its target, the steps of each and the number of seeds, from the logs alone."""
    monkeypatch.setattr(track, "README", without_sections(track.README, tmp_path, "grid", "records"))
    records = track.history(track.grid())
    target, steps = track.search(records)
    return records, target, steps, len(list(records[0].run(1).parent.glob("run_*.txt")))


def test_laptop_tracks_tables_are_those_of_its_logs(tiny):
    track.runs(*tiny)
    assert track.README.read_text() == (RECORDS / "tiny" / "README.md").read_text()


def test_laptop_tracks_grid_has_its_best_point_inside(tiny):
    best = tiny[0][0].options
    assert best[best.index("--lr") + 1] not in (f"{track.RATES[0]:g}", f"{track.RATES[-1]:g}")
    assert best[best.index("--batch-tokens") + 1] not in (str(track.BATCHES[0]), str(track.BATCHES[-1]))


def test_every_record_of_the_laptop_track_reaches_the_target(tiny):
    """All runs that lie there count, as many of each record; five are significant."""
    records, target, _, seeds = tiny
    for record in records:
        sample = logbook.loss_sample([run_of(path) for path in sorted(record.run(1).parent.glob("*.txt"))])
        assert sample.n == seeds and sample.mean <= target, record.name
        assert seeds < 5 or logbook.p_at_most(sample, target) < logbook.SIGNIFICANCE, record.name


ATTEMPTS = sorted(path.parent for path in (RECORDS / "tiny").glob("*/previous"))


@pytest.mark.parametrize("folder", ATTEMPTS, ids=lambda folder: folder.name)
def test_later_records_pages_have_the_numbers_of_their_logs(folder):
    """Those of `attempt`: each seed's loss and time, and those of the record before, run again in turn."""
    scipy_stats = pytest.importorskip("scipy.stats")
    text = (folder / "README.md").read_text()
    mine, before = (
        [run_of(place / f"run_{seed}.txt") for seed in range(1, 6)] for place in (folder, folder / "previous")
    )
    assert len(list(folder.rglob("*.txt"))) == 10
    shown = table_rows(text, 5)[1:]
    pairs = zip(mine, before, strict=True)
    assert shown == [
        [str(seed), f"{run.val_loss:.4f}", f"{run.train_time_ms / 1000:.2f} s"]
        + [f"{other.val_loss:.4f}", f"{other.train_time_ms / 1000:.2f} s"]
        for seed, (run, other) in enumerate(pairs, 1)
    ]
    times, others = ([run.train_time_ms for run in each] for each in (mine, before))
    sooner = logbook.shown_p(scipy_stats.ttest_rel(times, others).pvalue)
    assert f"{1 - sum(times) / sum(others):.1%} less time, p = {sooner} (paired by seed)" in text
    reached = logbook.shown_p(logbook.p_at_most(logbook.loss_sample(mine), 1.44))
    assert f"The mean loss is at most 1.44 with p = {reached}." in " ".join(text.split())
    words = re.search(r"^Why: (\S.*)$", text, re.MULTILINE)
    assert words, "nobody has said why"


def test_the_failed_attempts_numbers_are_those_of_its_logs():
    folder = RECORDS / "tiny" / "_tried" / "2026-11-29_short_documents"
    places = folder, folder / "previous"
    mine, before = ([run_of(place / f"run_{seed}.txt") for seed in range(1, 6)] for place in places)
    text = " ".join((RECORDS / "tiny" / "README.md").read_text().split())
    losses = ", ".join(f"{run.val_loss:.3f}" for run in mine)
    saved = 1 - sum(run.train_time_ms for run in mine) / sum(run.train_time_ms for run in before)
    p = logbook.p_at_most(logbook.loss_sample(mine), 1.44)
    assert f"{saved:.1%} less time, but losses of {losses}, and p = {p:.2f} that their mean is higher" in text


def test_the_presets_time_is_that_of_its_logs():
    mine, former = (run_of(RECORDS / "tiny" / "_preset" / "in_turn" / f"{name}.txt") for name in ("tiny", "former"))
    text = " ".join((RECORDS / "tiny" / "README.md").read_text().split())
    share = f"{mine.train_time_ms / former.train_time_ms:.2f} of the time"
    losses = f"comes to {mine.val_loss:.3f} nats per byte where that came to {former.val_loss:.3f}"
    assert f"{share}, and {losses}: {mine.train_time_ms / 1000:.0f} s and {former.train_time_ms / 1000:.0f} s" in text


# ---- The optimizer track ---------------------------------------------------------------------------------------------


def tuned() -> dict:
    """The grids that have been run; an optimizer with any log has them all."""
    return {name: axes for name, axes in tune.GRIDS.items() if any(tune.OUT.glob(f"{name}_{next(iter(axes))}-*.txt"))}


def test_optimizer_tracks_tables_are_those_of_its_logs(trains_nothing, tmp_path, monkeypatch):
    """The grids, as far as they have been run; and the results, or else that there are none."""
    text = tune.README.read_text()
    monkeypatch.setattr(tune, "README", without_sections(tune.README, tmp_path, "grid", "runs"))
    steps = int(re.search(r"^\*\*\w+\*\*, (\d+) steps$", text, re.MULTILINE)[1])
    monkeypatch.setattr(tune, "GRIDS", tuned())
    tune.write_grids(steps)
    if counted := [path for path in tune.OUT.glob("*.txt") if not path.stem.endswith("seed-0")]:
        seeds = max(int(path.stem.rpartition("-")[2]) for path in counted)
        tune.runs(steps, float(re.search(r"^Target: ([\d.]+) nats", text, re.MULTILINE)[1]), seeds)
    else:
        runs.put_section(tune.README, "runs", "Not measured yet.\n")
    assert tune.README.read_text() == text


# ---- README.md -------------------------------------------------------------------------------------------------------


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_shows_lines_of_the_presets_log(readme):
    """But for what the log does not hold, the screen's first lines."""
    log = track.PRESET.read_text().splitlines()
    shown = re.search(r"\n```\nlog: .*?\n```\n", readme, re.DOTALL)[0].splitlines()
    shown = [line for line in shown if re.match(r"step:|peak memory", line)]
    assert len(shown) == 5 and set(shown) <= set(log)


def test_readmes_results_are_those_of_the_logs(readme, tiny):
    records, target, _, seeds = tiny
    preset = run_of(track.PRESET)
    tokens = track.tokens_of(track.PRESET)
    results = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", readme.partition("## Results")[2], re.MULTILINE))
    seconds = preset.train_time_ms / 1000
    assert results["preset `tiny`, training time"] == f"{seconds:.0f} s, {preset.final_step:,} steps of 2,048 bytes"
    assert tokens == preset.final_step * 2048
    bits = preset.val_loss / math.log(2)
    assert results["its final validation loss"] == f"{preset.val_loss:.4f} nats per byte ({bits:.3f} bits per byte)"
    assert f"{preset.val_loss:.4f} nats per byte are {bits:.3f} bits per byte" in " ".join(readme.split())
    assert results["its speed, over the run"] == f"{tokens / seconds:,.0f} bytes/s"
    assert results["its memory"] == f"{preset.peak_memory_mib:,.0f} MiB"
    times, tokens = [], []
    goal = f"{target:.2f} nats ({target / math.log(2):.2f} bits) per byte"
    names = f"GPT-2 with AdamW, to {goal}", "the recipe in miniature, to the same loss"
    for record, what in zip((records[0], records[-1]), names):
        times.append([run_of(record.run(seed)).train_time_ms / 1000 for seed in range(1, seeds + 1)])
        tokens.append(track.tokens_of(record.run(1)))
        assert results[what] == f"{track.interval(times[-1], '.1f')} s, {tokens[-1] / 1e6:.2f}M bytes"
    newest = leaderboard.listed("tiny", target)
    first, *_, last = leaderboard.track_steps(newest)
    runs_of_newest = newest[-1].runs
    seconds = track.interval([run.train_time_ms / 1000 for run in runs_of_newest], ".2f")
    used = track.tokens_of(Path(runs_of_newest[0].file))
    assert results["the newest record, to the same loss"] == f"{seconds} s, {used / 1e6:.2f}M bytes"
    claim = f"**{first.seconds / last.seconds:.0f} times sooner** and with {tokens[0] / used:.0f} times fewer tokens"
    assert claim in " ".join(readme.split())


def test_readmes_steps_of_the_optimizers_are_the_optimizer_tracks(readme):
    track_readme = tune.README.read_text()
    target = re.search(r"^Target: ([\d.]+) nats", track_readme, re.MULTILINE)[1]
    rows = table_rows(track_readme.partition("<!-- runs -->")[2], 7)[1:]
    assert [row[0] for row in rows] == ["adamw", "muon", "normuon", "soap"] == list(tuned())
    what = f"AdamW, Muon, NorMuon, SOAP to {target} nats per byte, all else fixed"
    assert f"| {what} | {', '.join(row[2] for row in rows)} steps |" in readme


def test_readmes_techniques_have_the_ablations_numbers(readme):
    given = ablation(160)
    given["no_muon"] = given["adam"]
    rows = table_rows(readme.partition("## The techniques")[2].partition("##")[0], 5)[1:]
    names = {name.replace("-", "_") for row in rows for name in re.findall(r"--([\w-]+)", row[1])}
    assert {"muon", *ablate.TECHNIQUES} - names == {"narrow_qk"}  # of preset next
    for _, option, numbers, _, lost in rows:
        name = re.match(r"`--(\S+)`", option)[1].replace("-", "_")
        if lost == "nothing to do in `mini`":
            assert name in ablate.IDLE["mini"]
        elif lost.startswith("off"):
            assert lost == f"off in `mini`; with it {given[f'with_{name}'][4]}"
        else:
            assert lost == given[f"no_{name}"][4]
        assert re.fullmatch(r"\d+(, \d+)*", numbers)


@pytest.mark.recipe
def test_readmes_memory_is_that_of_the_plan(readme, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    plan.main()
    estimates = dict(re.findall(r"^\| (\d+) \| [\d,]+ \| ([\d,]+) \|$", capsys.readouterr().out, re.MULTILINE))
    hardware = readme.partition("## Hardware")[2].partition("\n## ")[0]
    shown = re.findall(r"`\./run\.sh(?: --slices (\d+))?` \| ([\d,]+) MiB \|", hardware)
    assert len(shown) == 3 and all(estimates[slices or "8"] == size for slices, size in shown)
