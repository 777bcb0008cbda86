"""The tables of records/README.md, written from the records that lie beside it, and how record times have fallen."""

import re
from datetime import date, datetime
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import quote

from command import UserError, report
from experiments import Experiment, by_experiment, difference_text, repeated_seeds
from log_reader import Run, backward_times, without_copies
from plots import draw_progress, load_matplotlib, picture_kind, save
from printing import print_json, shown, shown_p, table, write_file
from rules import SIGNIFICANCE, STREAMS, TARGET, TRACKS, Track
from samples import Sample, Verdict, difference, loss_sample, results, time_sample

RECORDS = Path(__file__).resolve().parent
# What lies between these two lines of README.md is rewritten: the records of one folder, held against a target.
TABLE = re.compile(r"(<!-- leaderboard: (\S+), target (\d+(?:\.\d+)?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
RECORD_NAME = re.compile(r"(\d{4}-\d\d(?:-\d\d)?)_.+")
# Lines of a record's README.md.
TITLE = re.compile(r"^#+[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
CONTRIBUTORS = re.compile(r"^[*_]*Contributors?:[*_]*[ \t]*(.*?)[ \t]*$", re.MULTILINE)
CHECKED = re.compile(r"^Checked: legal \((\d{4}-\d\d-\d\d)\), sha256 ([0-9a-f]{64})$", re.MULTILINE)
NOT_CHECKED = re.compile(r"^Checked: no, (\S.*)$", re.MULTILINE)
HISTORY = re.compile(r"^\| (\d+) \| (\d\d/\d\d/\d\d) \| ([\d.]+) \| (.*?) \| (.*?) \|$", re.MULTILINE)


class Record(NamedTuple):
    """A record that a table lists."""

    folder: Path
    day: str  # or month, as in the folder's name
    title: str
    runs: list[Run]
    loss: Sample
    time: Sample
    time_before: Sample | None  # of the record before it, where its runs were made again in turn with these
    p: float
    checked: str
    contributors: str


class Refused(Exception):
    """Why a folder is no record."""


def leaderboard(args) -> int:
    """Rewrites the tables in records/README.md, or, with --check, says whether they are what it would write.

    What is no record is left out, with the reason.
    """
    readme = RECORDS / "README.md"
    text = read_text(readme)
    tracks = track_targets(text)
    for folder in [inner for outer in folders(RECORDS) for inner in (outer, *folders(outer))]:
        track = folder.relative_to(RECORDS).as_posix()
        if track not in tracks and any(RECORD_NAME.fullmatch(record.name) for record in folders(folder)):
            marker = f"<!-- leaderboard: {track}, target ... -->"
            raise UserError(f"{folder}: README.md has no table for it ({marker})")
    current = TABLE.sub(lambda match: match[1] + track_table(match[2], float(match[3])) + match[5], text)
    if args.check:
        print(f"{readme}: {'up to date' if current == text else 'out of date; run the leaderboard command'}")
        return 0 if current == text else 1
    if current != text:
        write_file(readme, current.encode())
    print(f"{readme}: {'rewritten' if current != text else 'up to date'}")
    return 0


def track_targets(text: str) -> dict[str, float]:
    """The tracks that README.md has a table for, with their targets."""
    return {match[2]: float(match[3]) for match in TABLE.finditer(text)}


def track_table(track: str, target: float) -> str:
    """The records in a track's folder, oldest first, as a Markdown table."""
    header = ["#", "date", "record", "mean loss ± sd", "runs", "mean time", "the one before, in turn"]
    rows = []
    for number, record in enumerate(listed(track, target), 1):
        rows.append(
            [
                str(number),
                record.day,
                f"[{record.title}]({quote(track)}/{quote(record.folder.name)}/)",
                f"{record.loss.mean:.4f} ± {shown(record.loss.sd, '.4f')}",
                str(record.loss.n),
                seconds_cell(record.time),
                seconds_cell(record.time_before),
                shown_p(record.p),
                record.checked,
                record.contributors,
            ]
        )
    if not rows:
        return "No records yet.\n"
    return table([*header, f"p (≤ {target:g})", "checked", "contributors"], rows, {1, 2, 8, 9}, True) + "\n"


def seconds_cell(time: Sample | None) -> str:
    return f"{time.mean / 1000:,.2f} s" if time else ""


def listed(track: str, target: float, without: Path | None = None) -> list[Record]:
    """The records in a track's folder, oldest first; reports why any other folder in it, but for one, is none."""
    found = []
    for folder in folders(RECORDS / track):
        if folder == without:
            continue
        try:
            found.append(read_record(folder, track, target, found))
        except (Refused, UserError) as reason:
            text = str(reason).removeprefix(f"{folder}: ")
            report(f"{folder}: not listed: {text}")
    return found


def read_record(folder: Path, track: str, target: float, before: list[Record]) -> Record:
    """The record in a folder; Refused, or UserError, says which rule it does not meet. `before`: those before it."""
    if not (name := RECORD_NAME.fullmatch(folder.name)):
        raise Refused("a record's folder is named <date>_<name>, like 2026-05-31_sign_trick")
    text = read_text(folder / "README.md")
    if not (title := TITLE.search(text)):
        raise Refused("its README.md has no heading to take the record's title from")
    logs = sorted(str(path) for path in folder.rglob("*.txt"))
    if not logs:
        raise Refused("holds no logs (*.txt)")
    runs, whole = results(logs)
    if not whole:
        raise Refused("holds logs that do not count, and a record has none")
    earlier = [run for record in before for run in record.runs]
    distinct = set(without_copies([*earlier, *runs]))
    runs, again = own_runs([run for run in runs if run in distinct], before)
    loss, time = loss_sample(runs), time_sample(runs)
    if time is None or time.n < loss.n:
        raise Refused("its logs have no training times")
    verdict = Verdict.by_t_test(loss, target)
    if not verdict.significant:
        raise Refused(
            f"not significant: n = {loss.n}, mean loss {loss.mean:.4f}, target {target:g}, "
            f"p = {shown_p(verdict.p)}, not < {SIGNIFICANCE}"
        )
    if track not in TRACKS:
        raise Refused("rules.py has no such track, with its hardware and what it validates on")
    require_runs(runs, TRACKS[track])
    checked = require_legal(text, runs, first=not before)
    if before:
        require_faster(runs, time, again, before[-1], TRACKS[track])
    contributors = CONTRIBUTORS.search(text)
    who = contributors[1] if contributors else ""
    time_before = time_sample(again) if again else None
    return Record(folder, name[1], title[1], runs, loss, time, time_before, verdict.p, checked, who)


def own_runs(runs: list[Run], before: list[Record]) -> tuple[list[Run], list[Run]]:
    """A record's runs, and those in its folder that are of the record before it, made again to compare times."""
    last = Experiment.of(before[-1].runs[0]) if before else None
    again = [run for run in runs if Experiment.of(run) == last]
    groups = by_experiment([run for run in runs if run not in again])
    if not groups:
        raise Refused("has no runs that are not those of the record before it")
    if len(groups) > 1:
        run, other = groups[1][0], groups[0][0]
        raise Refused(f"holds runs of {len(groups)} experiments: {run.name}: {difference_text(run, other)}")
    return groups[0], again


def require_runs(runs: list[Run], track: Track) -> None:
    """On the track's hardware and data, from their first step on, and independent of each other."""
    right = STREAMS[track.preset]
    if again := repeated_seeds(runs):
        raise Refused(again)
    for run in runs:
        settings = run.header.settings or {}
        given = settings.get("val_tokens"), PurePath(str(settings.get("val_files"))).name
        trained = PurePath(str(settings.get("train_files"))).name
        if track.gpus and run.hardware != track.hardware:
            raise Refused(f"{run.name}: ran on {run.hardware}, not on {track.hardware}")
        if resumed := settings.get("resume"):
            raise Refused(f"{run.name}: goes on from {resumed}, and what came before is not in it")
        if given != right[:2]:
            raise Refused("{}: validated on {} tokens of {}, not {} of {}".format(run.name, *given, *right[:2]))
        if trained != right.train_files:
            raise Refused(f"{run.name}: trained on {trained}, not {right.train_files}")
        if track.gpus and not (run.header.validated and run.header.trained):
            raise Refused(f"{run.name}: has no checksums of its data")
        if against := right.contradiction(run.header.validated, run.header.trained):
            raise Refused(f"{run.name}: {against}")
        if backward := backward_times(run.file):
            raise Refused(f"{run.name}: {backward[0]}")


def require_legal(text: str, runs: list[Run], first: bool) -> str:
    """What the table says of the check; `text`: the record's README.md."""
    source = runs[0].header.source
    if first and (reason := NOT_CHECKED.search(text)):
        return f"no: {reason[1]}"
    if not (checked := CHECKED.search(text)):
        raise Refused(f"its README.md has no line 'Checked: legal (YYYY-MM-DD), sha256 {source}'")
    if checked[2] != source:
        raise Refused(f"its README.md says that another script is legal: sha256 {checked[2]}, not {source}")
    return checked[1]


def require_faster(runs: list[Run], time: Sample, again: list[Run], last: Record, track: Track) -> None:
    """On one machine: either the record before was timed on it, too, or its runs have been made again on it.

    On GPUs they have been: two of one name differ by more than records do.
    """
    if track.gpus and not again:
        raise Refused(f"needs runs of the record before it, {last.folder.name}, made again in turn with its own")
    others = again or last.runs
    machines, others_machines = {run.hardware for run in runs}, {run.hardware for run in others}
    if len(machines) > 1:
        raise Refused(f"its runs were made on different hardware: {'; '.join(sorted(map(str, machines)))}")
    if machines != others_machines:
        names = "; ".join(sorted(map(str, others_machines)))
        raise Refused(
            f"the record before it, {last.folder.name}, was timed on other hardware ({names}); "
            "run that again on yours, and add the logs"
        )
    mean = time_sample(others).mean
    if time.mean >= mean:
        seconds = f"{time.mean / 1000:,.2f} s, not less than {mean / 1000:,.2f} s"
        raise Refused(f"is not faster than the record before it, {last.folder.name}: {seconds}")
    if again:
        p = difference(runs, again, "train_time_ms").p
        if p is None or p >= SIGNIFICANCE:
            chance = f"p = {shown_p(p)}, not < {SIGNIFICANCE}"
            raise Refused(f"is not shown to be faster than the record before it, {last.folder.name}: {chance}")


def folders(parent: Path) -> list[Path]:
    """The folders in a folder that may hold records, by name; none if it does not exist."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and path.name[0] not in "._")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


# ======================================================================================================================
# progress
# ======================================================================================================================

PUBLIC = "public"


class Step(NamedTuple):
    """A record in the course of time."""

    number: int
    day: date
    seconds: float
    title: str


def progress(args) -> int:
    """Prints by when records took how long: those of a track, or the public ones; with --out it draws that, too."""
    kind = args.out and picture_kind(args.out)
    text = read_text(RECORDS / "README.md")
    targets = track_targets(text)
    if args.track == PUBLIC:
        steps, target = public_steps(text), TARGET
    elif args.track in targets:
        target = targets[args.track]
        steps = track_steps(listed(args.track, target))
    else:
        raise UserError(f"{args.track}: no such track; there are {', '.join([*targets, PUBLIC])}")
    if not steps:
        raise UserError(f"{args.track}: has no records yet")
    if args.json:
        print_json([step._asdict() | {"day": step.day.isoformat()} for step in steps])
    else:
        header = ["#", "date", "time", "times sooner", "record"]
        print(table(header, [step_cells(step, steps[0]) for step in steps], {1, 4}, args.markdown))
    if args.out:
        matplotlib = load_matplotlib()
        days, seconds = [step.day for step in steps], [step.seconds for step in steps]
        save(matplotlib, lambda: draw_progress(matplotlib, days, seconds, target), args.out, kind)
    return 0


def track_steps(records: list[Record]) -> list[Step]:
    """The records of a track. One that was timed in turn with the one before it takes its share of that one's time.

    So times compare, though machines differ, and one machine from day to day.
    """
    steps = []
    for number, record in enumerate(records, 1):
        seconds = record.time.mean / 1000
        if record.time_before:
            seconds = steps[-1].seconds * record.time.mean / record.time_before.mean
        steps.append(Step(number, first_day(record.day), seconds, record.title))
    return steps


def step_cells(step: Step, first: Step) -> list[str]:
    time = f"{step.seconds:,.1f} s"
    return [str(step.number), step.day.isoformat(), time, f"{first.seconds / step.seconds:.2f}", step.title]


def public_steps(text: str) -> list[Step]:
    """The table of the public records in README.md."""
    section = text.partition("\n## The public history\n")[2].partition("\n## ")[0]
    return [
        Step(int(number), datetime.strptime(day, "%m/%d/%y").date(), round(60 * float(minutes), 3), what)
        for number, day, minutes, what, _ in HISTORY.findall(section)
    ]


def first_day(text: str) -> date:
    """The day, or the first of the month, that a record's folder is named after. Raises UserError."""
    try:
        return date.fromisoformat(text if len(text) == 10 else f"{text}-01")
    except ValueError:
        raise UserError(f"{text}: is no date") from None
