"""Read the logs of training runs: tables, statistics, plots, and the script that made a log.

    python records/logbook.py show LOG... [--target 3.28]         one row per run
    python records/logbook.py stats LOG... [--target 3.28]        is the mean loss at most the target? p < 0.01?
    python records/logbook.py compare LOG... --vs LOG...          difference of two sets of runs
    python records/logbook.py diff A B                            what differs in two runs' settings and scripts
    python records/logbook.py plot LOG... --out FILE.png          loss against steps and against time
    python records/logbook.py progress TRACK [--out FILE.png]     record time against date
    python records/logbook.py extract LOG --out train.py          the script, byte for byte
    python records/logbook.py check SCRIPT_OR_LOG                 is it a legal attempt? names what fails, and where
    python records/logbook.py leaderboard [--check]               the tables of records/README.md
    python records/logbook.py attempt SCRIPT --track T --name N   check and train it, and the last record: is it one?

It reads train_gpt.py's logs and those of the public leaderboard, of every age, and never guesses: a file or a line that
it cannot read is named on stderr with the reason, the rest is read on, and the exit status is 2. A run counts once,
however often it is there, and runs of different experiments are not taken together without a word.
Exit status: 0 done, 1 a negative verdict, 2 a mistake in the command or the files.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where command.py lies

import command
from command import UserError, report

command.catch_interrupts(__name__)  # before the imports that take seconds

import argparse
import ast
import contextlib
import difflib
import json
import math
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import warnings

from experiments import (
    by_experiment,
    difference_text,
    differences,
    flat,
    report_oddities,
    report_repeated_seeds,
    target_of,
)
from leaderboard import PUBLIC, RECORDS, leaderboard, progress
from log_reader import (
    MAX_SOURCE,
    NO_SCRIPT,
    STREAM_SUM,
    TRAIN_SUM,
    Run,
    backward_times,
    find_script,
    find_sources,
    marked_lines,
    open_log,
    read_log,
    read_logs,
    without_copies,
)
from plots import load_matplotlib, plot
from printing import digits, print_json, shown, shown_p, table, write_file
from rules import OPTIMIZER_MARGIN, SIGNIFICANCE, STREAMS
from samples import Difference, Sample, Verdict, difference, loss_sample, p_at_most, reached, results, time_sample

# What the programs that make the tracks' results, and the tests, take from here.
__all__ = [
    "Run", "SIGNIFICANCE", "STREAMS", "Sample", "command_line", "find_sources", "load_matplotlib", "loss_sample",
    "main", "p_at_most", "read_log", "shown_p",
]  # fmt: skip


# ======================================================================================================================
# show, stats, compare
# ======================================================================================================================


def show(args) -> int:
    """Prints one row per run; with a target, when its loss was first that low, between two validations by a line."""
    runs, whole = read_logs(args.logs)
    if args.json:
        keys = ["file", "final_step", "total_steps", "val_loss", "train_time_ms", "step_avg_ms", "peak_memory_mib"]
        rows = [{key: getattr(run, key) for key in keys} for run in runs]
        if args.target is not None:
            for row, run in zip(rows, runs, strict=True):
                row["steps_to_target"], row["time_ms_to_target"] = reached(run, args.target) or (None, None)
        print_json(rows)
    elif runs:
        header = ["log", "steps", "loss", "time", "step average", "peak memory", "hardware", "commit"]
        if args.target is not None:
            header += [f"steps to {args.target:g}", f"time to {args.target:g}"]
        rows = []
        for run in runs:
            loss = shown(run.val_loss, ".4f")
            if run.losses and run.steps[-1] != run.final_step:
                loss += f" at {run.steps[-1]}"
            rows.append(
                [
                    run.name,
                    str(run.final_step) if run.total_steps is None else f"{run.final_step}/{run.total_steps}",
                    loss,
                    f"{run.train_time_ms:,.0f} ms" if run.train_time_ms is not None else "-",
                    f"{run.step_avg_ms:.2f} ms" if run.step_avg_ms is not None else "-",
                    f"{run.peak_memory_mib:,.0f} MiB" if run.peak_memory_mib is not None else "-",
                    run.hardware or "-",
                    re.sub(r"^([0-9a-f]{8})[0-9a-f]+", r"\1", run.header.commit or "-"),
                ]
            )
            if args.target is not None:
                steps, time = reached(run, args.target) or (math.nan, math.nan)
                rows[-1] += [f"{steps:,.0f}" if steps == steps else "-", f"{time:,.0f} ms" if time == time else "-"]
        print(table(header, rows, {0, 6, 7}, args.markdown))
    return 0 if whole else 2


def stats(args) -> int:
    """Prints the statistics of a set of runs, by experiment, and whether the mean loss is at most the target."""
    runs, whole = results(args.logs)
    groups = by_experiment(runs)
    if len(groups) > 1:
        report(f"these runs are of {len(groups)} experiments, which are not taken together")
    report_oddities(runs, "these runs")
    report_repeated_seeds(runs, "these runs")
    answers = []
    for number, group in enumerate(groups, 1):
        loss, time = loss_sample(group), time_sample(group)
        found = verdict(group, loss, args.target)
        answer = stats_json(loss, time, found)
        if len(groups) > 1 and args.json:
            differs = differences(group[0], groups[0][0]) if number > 1 else []
            answer = {"logs": [run.name for run in group], "differs_from_first": differs} | answer
        if not args.json:
            if len(groups) > 1:
                print_experiment(number, group, groups[0], args.markdown)
            print_stats(loss, time, found, args.markdown)
        answers.append(answer)
    if args.json:
        print_json(answers[0] if len(answers) == 1 else {"experiments": answers})
    return 2 if not whole else 0 if all(answer["significant"] for answer in answers) else 1


def verdict(runs: list[Run], loss: Sample, target: float | None) -> Verdict:
    """Of one experiment's runs, by the rule of their track; without a target, by the track's."""
    target = target_of(runs) if target is None else target
    if runs[0].preset == "fineweb" and "optimizer" in runs[0].header.settings:
        return Verdict.by_margin(loss, target)
    return Verdict.by_t_test(loss, target)


def stats_json(loss: Sample, time: Sample | None, found: Verdict) -> dict:
    answer = {"n": loss.n, "target": found.target, "loss": vars(loss), "time_ms": time and vars(time), "p": found.p}
    if found.margin is not None:
        answer |= {"margin": found.margin}
    return answer | {"significant": found.significant, "more_runs": found.more_runs}


def print_experiment(number: int, group: list[Run], first: list[Run], markdown: bool) -> None:
    """The line above one experiment's statistics where there are several."""
    logs = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
    line = f"Experiment {number}: {logs}"
    if number > 1:
        print()
        line += f" (differs from experiment 1: {difference_text(group[0], first[0])})"
    print(f"**{line}**\n" if markdown else line)


def print_stats(loss: Sample, time: Sample | None, found: Verdict, markdown: bool) -> None:
    more = found.more_runs
    rule = f"p < {SIGNIFICANCE}" if found.margin is None else f"(target - mean) * sqrt(n) >= {OPTIMIZER_MARGIN}"
    if found.significant:
        said = f"significant ({rule})"
    elif more is None:
        why = "a single run has no spread" if loss.n == 1 else "these runs have no spread: are they one run, repeated?"
        said = f"not significant: {why}"
    elif more == math.inf:
        said = "not significant; more runs needed: never, the mean is not below the target"
    else:
        said = f"not significant; more runs needed: {more:,} if mean and standard deviation stay"
    test = f"p = {shown_p(found.p)} (one-sided t-test: mean loss <= {found.target:g})"
    if found.margin is not None:
        test += f"\n(target - mean) * sqrt(n) = {found.margin:.5f} (the optimizer track's rule)"
    if markdown:
        rows = [["loss", f"{loss.n}", *digits(loss, ".5f")]]
        if time:
            rows.append(["time (ms)", f"{time.n}", *digits(time, ",.1f")])
        header = ["", "n", "mean", "standard deviation", "min", "max"]
        print(table(header, rows, {0}, True), test, said, sep="\n\n")
        return
    mean, sd, low, high = digits(loss, ".5f")
    print(f"n = {loss.n}")
    print(f"loss: mean {mean}, standard deviation {sd}, min {low}, max {high}")
    if time:
        mean, sd, low, high = digits(time, ",.1f")
        print(f"time: {mean} ms ± {sd}, min {low}, max {high}" + (f" ({time.n} runs)" if time.n < loss.n else ""))
    print(test, said, sep="\n")


def compare(args) -> int:
    """Prints the difference of two sets of runs in mean loss and time: in pairs where both have the same seeds."""
    runs_a, whole_a = results(args.logs)
    runs_b, whole_b = results(args.vs)
    distinct = set(without_copies([*runs_a, *runs_b]))  # a run is not compared with itself
    runs_a, runs_b = ([run for run in side if run in distinct] for side in (runs_a, runs_b))
    if not runs_a or not runs_b:
        raise UserError("the two sets hold the same runs: nothing to compare")
    for side, runs in (("A", runs_a), ("B", runs_b)):
        groups = by_experiment(runs)
        if len(presets := {run.preset for run in runs}) > 1:
            raise UserError(f"{side} has runs of the presets {', '.join(sorted(map(str, presets)))}: give those of one")
        for group in groups[1:]:
            report(f"{side} takes experiments together: {group[0].name}: {difference_text(group[0], groups[0][0])}")
        report_repeated_seeds(runs, side)
    report_oddities([*runs_a, *runs_b], "A and B")
    loss, time = (difference(runs_a, runs_b, value) for value in ("val_loss", "train_time_ms"))
    if args.json:
        names = {"loss": loss, "time_ms": time}
        print_json({name: found and difference_json(found) for name, found in names.items()})
    else:
        header = ["", "n A", "n B", "mean A", "mean B", "A - B", "95 % interval", "p", "test"]
        rows = [["loss", *difference_cells(loss, ".5f")]]
        if time:
            rows.append(["time (ms)", *difference_cells(time, ",.1f")])
        print(table(header, rows, {0, 8}, args.markdown))
    return 0 if whole_a and whole_b else 2


def difference_json(found: Difference) -> dict:
    means = {"a": vars(found.a), "b": vars(found.b), "difference": found.mean}
    return means | {"ci95": [found.low, found.high], "p": found.p, "test": found.test}


def difference_cells(d: Difference, form: str) -> list[str]:
    interval = "-" if d.p is None else f"{d.low:+{form}} to {d.high:+{form}}"
    means = [f"{d.a.mean:{form}}", f"{d.b.mean:{form}}", f"{d.mean:+{form}}"]
    test = d.test + " by seed" * (d.test == "paired t-test")
    return [str(d.a.n), str(d.b.n), *means, interval, shown_p(d.p), test]


# ======================================================================================================================
# extract
# ======================================================================================================================


def extract(args) -> int:
    """Writes the script that made a log."""
    with open_log(args.log) as file:
        script = find_script(file)
    # The script finds the kernels' files beside it, under their names.
    files = {args.out if name == "" else args.out.with_name(name): text for name, text in script.files().items()}
    if len(files) < len(script.files()):
        raise UserError(f"{args.out}: is the name of one of the kernels' files; choose another")
    for path, text in files.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == text):
            raise UserError(f"{path}: exists and differs; it is left as it is")
    for path, text in files.items():
        write_file(path, text)
        vouched = "the log's checksum matches" if script.vouched else "without a checksum"
        print(f"{path}: {len(text):,} bytes, {vouched}")
    if not script.vouched:
        report(f'{args.log}: no checksum vouches for this text, which ends at a line of 100 "="')
    return 0


# ======================================================================================================================
# diff
# ======================================================================================================================


def diff(args) -> int:
    """Prints how the settings and the scripts of two logs differ, or two scripts, as a unified diff."""
    script_a, settings_a = script_and_settings(args.a)
    script_b, settings_b = script_and_settings(args.b)
    parts = [("settings", settings_a, settings_b), ("script", script_a, script_b)]
    if not any(a is not None and b is not None for _, a, b in parts):
        raise UserError(f"{args.a} and {args.b} have neither settings nor scripts to compare")
    same = True
    for what, a, b in parts:
        if (a is None) != (b is None):
            report(f"{args.a if a is None else args.b}: has no {what}: not compared")
        elif a != b:
            same = False
            names = (f"{args.a} ({what})", f"{args.b} ({what})")
            print("\n".join(difflib.unified_diff(a, b, *names, lineterm="")))
    if same:
        print("no difference")
    return 0


def script_and_settings(path: str) -> tuple[list[str] | None, list[str] | None]:
    """The lines of a script, or of the script in a log, and of its settings, one a line; None where it has none."""
    with open_log(path) as file:
        text = file.read(MAX_SOURCE)
        if path.endswith(".py") or is_script(text):
            return lines_of(text), None
        try:
            script = lines_of(find_script(file).text)
        except UserError as error:
            if str(error) != NO_SCRIPT:
                raise
            script = None
    runs = read_log(path).runs
    settings = {json.dumps(run.header.settings, sort_keys=True): run for run in runs if run.header.settings is not None}
    if len(settings) > 1:
        raise UserError(f"{path}: holds logs with different settings; split it")
    for run in settings.values():
        return script, [f"{name}: {json.dumps(value)}" for name, value in sorted(flat(run.header.settings).items())]
    return script, None


def lines_of(text: bytes) -> list[str]:
    return text.decode(errors="backslashreplace").splitlines()


# ======================================================================================================================
# check
#
# The work is done by legality.py in a child process, because a script under check may do anything, and with it all that
# needs PyTorch. It is not a sandbox: a script is run, as training would run it.
# ======================================================================================================================

CHECKS = (
    "causal", "normalized", "documents", "validation", "learning", "clock", "warm_up", "log", "world_size",
    "compiler",
)  # fmt: skip
STARTING = 300  # seconds that PyTorch may take to be imported
DATA_MARK = re.compile(rb"\n(?:settings: \{|data: train |validation stream: )")  # what a log says of its data


def check(args) -> int:
    """Says whether a script, or the script that made a log, is a legal attempt: a line for each check.

    An answer is ok, FAILED, or not judged, with the reason.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise command.missing("tqdm") from None
    signal.signal(signal.SIGHUP, command.stop)  # as the other signals do: the child is ended, too
    names = [name for name in CHECKS if name in (args.only or CHECKS)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(names), leave=False, disable=None) as bar:
        script, of_log = find_checked(args.file, Path(folder))
        bar.set_description(f"loading, then {names[0]}")
        for row in verdicts(args.file, script, names, Path(folder), args.timeout):
            findings, unable = of_log.get(row["check"], ([], None))
            row["findings"] = findings + row["findings"]
            row["not_judged"] = row["not_judged"] or unable
            row["verdict"] = "ok"
            if row["not_judged"]:
                row["verdict"] = "not judged"
            if row["findings"]:
                row["verdict"] = "FAILED"
            row["ok"] = row["verdict"] == "ok"
            rows.append(row)
            if not (args.json or args.markdown):
                bar.write("{:<11} {:<11} {}".format(*check_cells(row)).rstrip())
                sys.stdout.flush()
            bar.update()
            bar.set_description(dict(zip(names, names[1:])).get(row["check"]))
    if args.json:
        print_json(rows)
    elif args.markdown:
        print(table(["check", "", "what"], [check_cells(row) for row in rows], {0, 1, 2}, True))
    return 0 if all(row["ok"] for row in rows) else 1


def check_cells(row: dict) -> list[str]:
    """The check, the verdict, and what there is to say: the first finding, or why there is none, or the rule."""
    said = row["rule"] or ""
    if row["notes"]:
        said = f"but note: {row['notes'][0]}"
    if row["verdict"] == "not judged":
        said = row["not_judged"]
    if row["findings"]:
        said = row["findings"][0] + (" (and more)" if len(row["findings"]) > 1 else "")
    return [row["check"], row["verdict"], said]


def find_checked(file: str, folder: Path) -> tuple[Path, dict[str, tuple[list[str], str | None]]]:
    """The script to check, which of a log is put into `folder`; and what the log itself says.

    That is, for some of the checks, what it finds, and why it cannot judge.
    """
    with open_log(file) as opened:
        if file.endswith(".py"):
            return Path(file).resolve(), {}
        text = opened.read(MAX_SOURCE)
        if is_script(text):
            (folder / "train_gpt.py").write_bytes(text)
            return folder / "train_gpt.py", {}
        for name, text in find_script(opened).files().items():
            (folder / (name or "train_gpt.py")).write_bytes(text)
        opened.seek(max((end for _, end, _ in find_sources(opened).proved), default=0))
        lines = [line for _, line, _ in marked_lines(opened, DATA_MARK)]
    script = folder / "train_gpt.py"
    return script, {"validation": judge_data(lines), "clock": (backward_times(file), None)}


def judge_data(lines: list[bytes]) -> tuple[list[str], str | None]:
    """Whether a log's runs had the data of their preset, by its lines of settings and checksums."""
    settings_lines = [line for line in lines if line.startswith(b"settings: ")]
    if not settings_lines:
        return [], "the log has no settings, which say what its run validated on"
    findings, unable = [], None
    streams = {match[1].decode() for line in lines if (match := STREAM_SUM.fullmatch(line))}
    shards = {match[1].decode() for line in lines if (match := TRAIN_SUM.fullmatch(line))}
    for line in settings_lines:
        try:
            settings = json.loads(line.partition(b": ")[2])
            preset, resumed = settings["preset"], settings.get("resume")
            given = settings["val_tokens"], Path(settings["val_files"]).name
        except (ValueError, KeyError, TypeError, AttributeError):
            unable = "the log's settings cannot be read"
            continue
        right = STREAMS.get(preset)
        if right is None:
            unable = f"the log's preset is {preset}, and there are rules for {' and '.join(STREAMS)}"
        elif given != right[:2]:
            findings.append("the log's run validated on {} tokens of {}, not {} of {}".format(*given, *right[:2]))
        else:
            against = {right.contradiction(validated, shards) for validated in streams or {None}}
            findings += [f"the log's run {each}" for each in sorted(against - {None})]
        if resumed:
            unable = f"the log's run went on from {resumed}, and what came before is not in it"
    return findings, unable


def is_script(text: bytes) -> bool:
    """Whether a file without .py in its name is a script: it parses, which no log does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def verdicts(file: str, script: Path, names: list[str], folder: Path, seconds: float):
    """Yields what legality.py says, check by check. UserError if the script cannot be checked, or loaded in time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    arguments = [sys.executable, str(RECORDS / "legality.py"), str(script), *names]
    with open(folder / "stderr", "w+", errors="replace") as stderr:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr}
        child = subprocess.Popen(arguments, cwd=folder, env=environment, start_new_session=True, **pipes)
        lines = queue.SimpleQueue()
        threading.Thread(target=lambda: [*map(lines.put, child.stdout), lines.put(b"")], daemon=True).start()

        def answer(patience: float) -> dict | str:
            """What the child says next, or why it says nothing."""
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                return f"not done after {patience:g} s"
            return json.loads(line) if line else f"the process ended, with status {child.wait()}"

        try:
            if isinstance(answer(STARTING), str):
                stderr.seek(0)
                raise UserError(
                    f"{' '.join(stderr.read().splitlines()[-1:])} (check needs pip install -r requirements.txt)"
                )
            loaded = answer(seconds)
            if problem := f"importing it: {loaded}" if isinstance(loaded, str) else loaded.get("problem"):
                raise UserError(f"{file}: {problem}")
            for i, name in enumerate(names):
                given = answer(seconds)
                if isinstance(given, str):
                    for late in names[i:]:
                        unable = given if late == name else "not reached"
                        yield {"check": late, "rule": None, "findings": [], "notes": [], "not_judged": unable}
                    return
                yield given
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and the runs that it has started
            child.wait()


# ======================================================================================================================
# Command line
# ======================================================================================================================


def positive(what: str):
    """Reads a number above 0; the error of any other text says that it is not `what`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


def command_line() -> command.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = command.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function):
        made = commands.add_parser(function.__name__, description=function.__doc__, allow_abbrev=False)
        made.set_defaults(command=function)
        return made

    def add_logs(made):
        made.add_argument("logs", nargs="+", metavar="LOG")

    def add_formats(made):
        formats = made.add_mutually_exclusive_group()
        formats.add_argument("--json", action="store_true", help="print JSON")
        formats.add_argument("--markdown", action="store_true", help="print a Markdown table")

    def add_target(made, default):
        text = f"loss to reach (default: {default})"
        made.add_argument("--target", type=positive("a loss"), metavar="LOSS", help=text)

    made = add(show)
    add_logs(made)
    add_target(made, "none; with one, the steps and the time that each run took to it")
    add_formats(made)

    made = add(stats)
    add_logs(made)
    add_target(made, "that of the log's preset, or 3.28")
    add_formats(made)

    made = add(compare)
    add_logs(made)
    made.add_argument("--vs", nargs="+", required=True, metavar="LOG", help="the runs to compare with")
    add_formats(made)

    made = add(plot)
    made.add_argument("logs", nargs="*", metavar="LOG", help="drawn as a group a folder where they repeat a run")
    made.add_argument(
        "--group", nargs="+", action="append", default=[], metavar=("NAME", "LOG"), help="logs drawn under this name"
    )
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="the plot: .png, .svg or .pdf")
    add_target(made, "those of the logs' presets, or 3.28")

    made = add(extract)
    made.add_argument("log", metavar="LOG")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the script")

    made = add(diff)
    made.add_argument("a", metavar="A", help="a log, or a script")
    made.add_argument("b", metavar="B", help="what differs in it is marked +")

    made = add(check)
    made.add_argument("file", metavar="SCRIPT_OR_LOG", help="what parses as Python is a script")
    made.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    patience = {"type": positive("a time"), "default": 300, "metavar": "SECONDS"}
    made.add_argument("--timeout", **patience, help="what loading, or a check, may take (default 300)")
    add_formats(made)

    made = add(leaderboard)
    made.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are out of date")
    made = add(progress)
    made.add_argument("track", metavar="TRACK", help=f"a folder of records, or {PUBLIC}: the public leaderboard's")
    made.add_argument("--out", type=Path, metavar="FILE", help="a plot: .png, .svg or .pdf")
    add_formats(made)

    made = add(attempt)
    made.add_argument("script", metavar="SCRIPT")
    made.add_argument("--track", required=True, help="a folder of records with the record to beat")
    made.add_argument("--name", required=True, help="of the attempt, and of its folder")
    made.add_argument("--seeds", type=command.between(2, 100), default=5, metavar="N", help="runs (default: 5)")
    return parser


def attempt(args) -> int:
    """Checks a script, trains it and the track's last record in turn, seed by seed, and says whether it is a record.

    The script's own options come last, after two dashes: `attempt SCRIPT --track tiny --name NAME -- --steps 80`. Runs
    that are there are not made again: the same command goes on with what was broken off. Exit status: 0 if it is a
    record, whose folder is then ready to be committed, 1 if it is none.
    """
    # It needs the programs beside this one, which take from this one.
    from attempt import attempt

    return attempt(args)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = []
    if "--" in arguments and arguments[0] == "attempt":  # what comes after it is for the script
        options = arguments[arguments.index("--") + 1 :]
        arguments = arguments[: arguments.index("--")]
    args = command_line().parse_args(arguments)
    args.options = options
    return args.command(args)


if __name__ == "__main__":
    command.run(main)
