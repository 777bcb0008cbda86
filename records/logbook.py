"""Read the logs of training runs: tables, statistics, plots, and the script that made a log.

    python records/logbook.py show LOG...                         one row per run
    python records/logbook.py stats LOG... [--target 3.28]        is the mean loss at most the target? p < 0.01?
    python records/logbook.py compare LOG... --vs LOG...          difference of two sets of runs
    python records/logbook.py plot LOG... --out FILE.png          loss against steps and against time
    python records/logbook.py extract LOG --out train.py          the script, byte for byte
    python records/logbook.py check SCRIPT_OR_LOG                 is it a legal attempt? names what fails, and where
    python records/logbook.py leaderboard [--check]               the tables of records/README.md

It reads train_gpt.py's logs and those of the public leaderboard, of every age, and never guesses: a file or a line that
it cannot read is named on stderr with the reason, the rest is read on, and the exit status is 2.
Exit status: 0 done, 1 a negative verdict, 2 a mistake in the command or the files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where command.py lies

import command
from command import UserError, report

command.catch_interrupts(__name__)  # before the imports that take seconds

import argparse
import contextlib
import json
import math
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading

from leaderboard import RECORDS, leaderboard
from log_reader import (
    LOG_START,
    MAX_SOURCE,
    Run,
    find_sources,
    marked_lines,
    open_log,
    read_log,
    read_logs,
    without_copies,
)
from plots import load_matplotlib, plot
from printing import digits, print_json, shown, shown_p, table, write_file
from rules import SIGNIFICANCE, STREAMS, TARGET
from samples import Difference, Sample, loss_sample, p_at_most, results, runs_needed, time_sample

# What the programs that make the tracks' results, and the tests, take from here.
__all__ = [
    "Run", "SIGNIFICANCE", "STREAMS", "Sample", "command_line", "find_sources", "load_matplotlib", "loss_sample",
    "main", "p_at_most", "read_log", "shown_p",
]  # fmt: skip


# ======================================================================================================================
# show, stats, compare
# ======================================================================================================================


def show(args) -> int:
    """Prints one row per run."""
    runs, whole = read_logs(args.logs)
    if args.json:
        keys = ["file", "final_step", "total_steps", "val_loss", "train_time_ms", "step_avg_ms", "peak_memory_mib"]
        print_json([{key: getattr(run, key) for key in keys} for run in runs])
    elif runs:
        header = ["log", "steps", "loss", "time", "step average", "peak memory", "hardware", "commit"]
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
                    re.sub(r"^([0-9a-f]{8})[0-9a-f]+", r"\1", run.commit or "-"),
                ]
            )
        print(table(header, rows, {0, 6, 7}, args.markdown))
    return 0 if whole else 2


def stats(args) -> int:
    """Prints the statistics of a set of runs and whether their mean loss is at most the target."""
    runs, whole = results(args.logs)
    loss, time = loss_sample(runs), time_sample(runs)
    p = p_at_most(loss, args.target)
    significant = p is not None and p < SIGNIFICANCE
    needed = runs_needed(loss, args.target)
    more = 0 if significant else None if needed is None else needed - loss.n
    if significant:
        verdict = f"significant (p < {SIGNIFICANCE})"
    elif needed is None:
        why = "a single run has no spread" if loss.n == 1 else "these runs have no spread: are they one run, repeated?"
        verdict = f"not significant: {why}"
    elif needed == math.inf:
        verdict = "not significant; more runs needed: never, the mean is not below the target"
    else:
        verdict = f"not significant; more runs needed: {more:,} if mean and standard deviation stay"
    if args.json:
        answer = {"n": loss.n, "target": args.target, "loss": vars(loss), "time_ms": time and vars(time)}
        print_json(answer | {"p": p, "significant": significant, "more_runs": more})
        return 2 if not whole else 0 if significant else 1
    test = f"p = {shown_p(p)} (one-sided t-test: mean loss <= {args.target:g})"
    if args.markdown:
        rows = [["loss", f"{loss.n}", *digits(loss, ".5f")]]
        if time:
            rows.append(["time (ms)", f"{time.n}", *digits(time, ",.1f")])
        header = ["", "n", "mean", "standard deviation", "min", "max"]
        print(table(header, rows, {0}, True), test, verdict, sep="\n\n")
    else:
        mean, sd, low, high = digits(loss, ".5f")
        print(f"n = {loss.n}")
        print(f"loss: mean {mean}, standard deviation {sd}, min {low}, max {high}")
        if time:
            mean, sd, low, high = digits(time, ",.1f")
            print(f"time: {mean} ms ± {sd}, min {low}, max {high}" + (f" ({time.n} runs)" if time.n < loss.n else ""))
        print(test, verdict, sep="\n")
    return 2 if not whole else 0 if significant else 1


def compare(args) -> int:
    """Prints the difference of two sets of runs in mean loss and time."""
    runs_a, whole_a = results(args.logs)
    runs_b, whole_b = results(args.vs)
    distinct = without_copies([*runs_a, *runs_b])  # a run is not compared with itself
    runs_a, runs_b = ([run for run in side if run in distinct] for side in (runs_a, runs_b))
    if not runs_a or not runs_b:
        raise UserError("the two sets hold the same runs: nothing to compare")
    loss = Difference.of(loss_sample(runs_a), loss_sample(runs_b))
    times = time_sample(runs_a), time_sample(runs_b)
    time = Difference.of(*times) if all(times) else None
    if args.json:
        names = {"loss": loss, "time_ms": time}
        print_json(
            {
                name: d and {"a": vars(d.a), "b": vars(d.b), "difference": d.mean, "ci95": [d.low, d.high], "p": d.p}
                for name, d in names.items()
            }
        )
    else:
        header = ["", "n A", "n B", "mean A", "mean B", "A - B", "95 % interval", "p"]
        rows = [["loss", *difference_cells(loss, ".5f")]]
        if time:
            rows.append(["time (ms)", *difference_cells(time, ",.1f")])
        print(table(header, rows, {0}, args.markdown))
    return 0 if whole_a and whole_b else 2


def difference_cells(d: Difference, form: str) -> list[str]:
    interval = "-" if d.p is None else f"{d.low:+{form}} to {d.high:+{form}}"
    means = [f"{d.a.mean:{form}}", f"{d.b.mean:{form}}", f"{d.mean:+{form}}"]
    return [str(d.a.n), str(d.b.n), *means, interval, shown_p(d.p)]


# ======================================================================================================================
# extract
# ======================================================================================================================


def extract(args) -> int:
    """Writes the script that made a log."""
    with open_log(args.log) as file:
        script, vouched = find_script(file)
    if args.out.exists() and not (args.out.is_file() and args.out.read_bytes() == script):
        raise UserError(f"{args.out}: exists and differs; it is left as it is")
    write_file(args.out, script)
    print(f"{args.out}: {len(script):,} bytes, " + ("the log's checksum matches" if vouched else "without a checksum"))
    if not vouched:
        report(f'{args.log}: no checksum vouches for this text, which is all before the first line of 100 "="')
    return 0


def find_script(file) -> tuple[bytes, bool]:
    """The script in an open log, and whether a checksum vouches for it. Raises UserError."""
    sources = find_sources(file)
    if sources.unproved:
        raise UserError("its source does not match its checksum: the log is damaged or edited")
    if len({claim.sha256 for _, _, claim in sources.proved}) > 1:
        raise UserError("holds the logs of several scripts; split it")
    if sources.proved:
        return sources.proved[0][2].prove(file)[1], True
    file.seek(0)
    text = file.read(MAX_SOURCE)
    end = re.search(rb"^={100}\r?$", text, re.MULTILINE)
    if end is None or LOG_START.match(text) or not text[: end.start()].strip():
        raise UserError("holds no script")
    return text[: end.start()], False


# ======================================================================================================================
# check
#
# The work is done by legality.py in a child process, because a script under check may do anything, and with it all that
# needs PyTorch. It is not a sandbox: a script is run, as training would run it.
# ======================================================================================================================

CHECKS = (
    "causal", "normalized", "documents", "validation", "learning", "clock", "warm_up", "world_size", "compiler",
)  # fmt: skip
STARTING = 300  # seconds that PyTorch may take to be imported
SETTINGS_MARK = re.compile(rb"\nsettings: \{")


def check(args) -> int:
    """Says whether a script, or the script that made a log, is a legal attempt: a line for each check.

    An answer is ok, FAILED, or not judged, with the reason.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError("this needs tqdm: pip install -r requirements.txt") from None
    signal.signal(signal.SIGHUP, command.stop)  # as the other signals do: the child is ended, too
    names = [name for name in CHECKS if name in (args.only or CHECKS)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(names), leave=False, disable=None) as bar:
        script, of_log = find_checked(args.file, Path(folder))
        bar.set_description(f"loading, then {names[0]}")
        for row in verdicts(args.file, script, names, Path(folder), args.timeout):
            if row["check"] == "validation":
                row["findings"] = of_log["findings"] + row["findings"]
                row["not_judged"] = row["not_judged"] or of_log["not_judged"]
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


def find_checked(file: str, folder: Path) -> tuple[Path, dict]:
    """The script to check, which of a log is put into `folder`; and of a log, what `judge_settings` says."""
    with open_log(file) as opened:
        if file.endswith(".py"):
            return Path(file).resolve(), {"findings": [], "not_judged": None}
        (folder / "train_gpt.py").write_bytes(find_script(opened)[0])
        opened.seek(max((end for _, end, _ in find_sources(opened).proved), default=0))
        lines = [line for _, line, _ in marked_lines(opened, SETTINGS_MARK)]
        return folder / "train_gpt.py", judge_settings(lines)


def judge_settings(lines: list[bytes]) -> dict:
    """Whether a log's runs validated on the whole stream of their preset, by its lines of settings."""
    if not lines:
        return {"findings": [], "not_judged": "the log has no settings, which say what its run validated on"}
    findings, unable = [], None
    for line in lines:
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
        elif given != right:
            findings.append("the log's run validated on {} tokens of {}, not {} of {}".format(*given, *right))
        if resumed:
            unable = f"the log's run went on from {resumed}, and what came before is not in it"
    return {"findings": findings, "not_judged": unable}


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

    def add_target(made):
        made.add_argument(
            "--target",
            type=positive("a loss"),
            default=TARGET,
            metavar="LOSS",
            help=f"loss to reach (default {TARGET})",
        )

    made = add(show)
    add_logs(made)
    add_formats(made)

    made = add(stats)
    add_logs(made)
    add_target(made)
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
    add_target(made)

    made = add(extract)
    made.add_argument("log", metavar="LOG")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the script")

    made = add(check)
    made.add_argument("file", metavar="SCRIPT_OR_LOG", help="a script's name ends in .py")
    made.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    patience = {"type": positive("a time"), "default": 300, "metavar": "SECONDS"}
    made.add_argument("--timeout", **patience, help="what loading, or a check, may take (default 300)")
    add_formats(made)

    made = add(leaderboard)
    made.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are out of date")
    return parser


def main() -> int:
    # A file name may hold what the terminal's encoding does not.
    sys.stdout.reconfigure(errors="backslashreplace")
    args = command_line().parse_args()
    return args.command(args)


if __name__ == "__main__":
    command.run(main)
