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
import hashlib
import io
import json
import math
import os
import queue
import re
import signal
import statistics
import subprocess
import tempfile
import threading
from array import array
from dataclasses import dataclass, field
from urllib.parse import quote

TARGET = 3.28  # nats per token on FineWeb's validation stream
SIGNIFICANCE = 0.01

RULE = b"=" * 100  # the line around a log's header
CHUNK = 1 << 20  # bytes read at once
MAX_LINE = 1 << 16  # a longer line is no line of a log: it is skipped without being held
MAX_SOURCE = 1 << 22  # the longest script that is looked for
MAX_CLAIMS = 100  # lines in a file that claim to end a source; each costs hashing that source
MAX_RUNS = 10_000  # runs in one file
MAX_GPUS = 1000  # cards in one run's header


# ======================================================================================================================
# Lines
#
# A log may be large, and most of it is source text. Lines are found by a regular expression over whole chunks, so that
# Python sees only those that may mean something, and memory does not depend on the file's size or on its lines' length.
# ======================================================================================================================


def marked_lines(file, marks: re.Pattern):
    """Yields (offset, line, ended) of the lines of a binary file that `marks` matches at their start.

    `marks` must begin with the line end before the line. Line ends, "\\n" or "\\r\\n", are left off; `ended` is False
    for a last line that has none.
    """
    position = 0  # in the file, of the end of `text`
    text = b"\n"  # the line end before the first unread line, and what is known of that line
    while chunk := file.read(CHUNK):
        if position == 0 and chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError("is UTF-16 text; convert it to UTF-8")
        position += len(chunk)
        text += chunk.removeprefix(b"\xef\xbb\xbf") if position == len(chunk) else chunk
        end = text.rfind(b"\n")
        for match in marks.finditer(text, 0, end + 1):
            start = match.start() + 1
            stop = text.find(b"\n", start)
            if stop - start <= MAX_LINE:
                yield position - len(text) + start, text[start:stop].removesuffix(b"\r"), True
        # The end of an overlong line is not preceded by a line end here, so that nothing in it is taken for a line.
        text = text[end:] if end >= 0 and len(text) - end <= MAX_LINE else b""
    if marks.match(text):
        yield position - len(text) + 1, text[1:], False


def line_number(path: str, offset: int) -> int:
    """The number, from 1, of the line at `offset`."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK, offset))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


# ======================================================================================================================
# Source
#
# A log of train_gpt.py begins with its source, byte for byte, a line of 100 "=" and `source: N bytes, sha256 H`. The
# source may hold such lines itself, so only a line counts before which N bytes lie that hash to H.
# ======================================================================================================================

SOURCE_MARK = re.compile(rb"\nsource: ")
SOURCE_LINE = re.compile(rb"source: (\d{1,9}) bytes, sha256 ([0-9a-f]{64})")


@dataclass(frozen=True)
class Claim:
    """A line that says that the `size` bytes before the "=" line at offset `rule` are a source."""

    rule: int
    size: int
    sha256: str

    def prove(self, file) -> tuple[int, bytes] | None:
        """Where the source starts and its text, if the bytes bear the claim out; else None."""
        file.seek(max(0, self.rule - 2 * self.size - 2))
        before = file.read(self.rule - file.tell())
        # A log that went through Windows may have "\r\n" where the script had "\n"; the hash tells.
        for text in (before, before.replace(b"\r\n", b"\n")):
            # A source without a line end at its end got one.
            for end in (len(text), len(text) - 1):
                source = text[end - self.size : end]
                if end >= self.size and hashlib.sha256(source).hexdigest() == self.sha256:
                    added = source.count(b"\n") if text is not before else 0
                    return self.rule - (len(text) - end) - self.size - added, source
        return None


@dataclass(frozen=True)
class Sources:
    """The sources in a file: (start, end, claim) of each proved one, in order, and how many claims fail."""

    proved: list[tuple[int, int, Claim]]
    unproved: int


def find_sources(file) -> Sources:
    """Finds the sources in a binary log: one at its start, or several where logs were put together."""
    candidates = []
    for offset, line, _ in marked_lines(file, SOURCE_MARK):
        match = SOURCE_LINE.fullmatch(line)
        if match and int(match[1]) <= MAX_SOURCE:
            candidates.append((offset, int(match[1]), match[2].decode()))
            if len(candidates) > MAX_CLAIMS:
                raise UserError(f"holds more than {MAX_CLAIMS} logs or sources; split it")
    proved, unproved = [], []
    for offset, size, sha256 in candidates:
        file.seek(max(0, offset - len(RULE) - 2))
        _, rule, line_end = file.read(offset - file.tell()).rpartition(RULE)
        if not rule or line_end not in (b"\n", b"\r\n"):
            continue
        claim = Claim(offset - len(rule) - len(line_end), size, sha256)
        if (found := claim.prove(file)) is None:
            unproved.append(claim)
            continue
        # A source may quote a log, source and all: the outer one counts, and what it quotes does not.
        start = found[0]
        proved = [inner for inner in proved if inner[0] < start] + [(start, claim.rule, claim)]
        unproved = [inner for inner in unproved if inner.rule < start]
    return Sources(proved, len(unproved))


# ======================================================================================================================
# Runs
# ======================================================================================================================

MARKS = re.compile(rb"\n(?:s(?:tep)?:[ \t]*\d|peak memory|={100}(?=\r?\n)|hardware: |git: |\|[ \t]+\d+[ \t]+[A-Z])")
# llm.c wrote `s:250 tel:6.1710`, all since then `step:250/1390 val_loss:3.9012 train_time:14210ms step_avg:56.84ms`.
TRAINING_LINE = re.compile(
    rb"s(?:tep)?:[ \t]*(\d{1,12})(?:/(\d{1,12}))?[ \t].*?(?:val_loss|tel|train_loss|trl|train_time):"
)
# name, number, unit, and what should not be there
FIELD = re.compile(
    rb"[ \t](val_loss|tel|train_time|step_avg):[ \t]*(nan|inf|\d{1,20}(?:\.\d{0,20})?)?(?:[ \t]?(ms|s)(?!\S))?(\S*)"
)
FIELD_NAMES = {b"val_loss": "val_loss", b"tel": "val_loss", b"train_time": "train_time", b"step_avg": "step_avg"}
PEAK_MEMORY = re.compile(rb"peak memory[^:]*:[ \t]*(\d{1,12}(?:\.\d{0,12})?)[ \t]*(MiB|GiB)\b")
MEBIBYTES = {b"MiB": 1, b"GiB": 1024}
GPU = re.compile(rb"\|[ \t]+\d+[ \t]+(\S.*?)[ \t]+(?:On|Off)[ \t]+\|")  # a card's row in nvidia-smi's table
LOG_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:s(?:tep)?:[ \t]*\d|Running P)")  # how a log without source begins


@dataclass(eq=False)
class Run:
    """One run: what its log says. None: the log does not say."""

    file: str
    number: int  # among the runs of the file, from 1
    total_steps: int | None
    hardware: str | None
    commit: str | None
    final_step: int = 0
    train_time_ms: float | None = None
    step_avg_ms: float | None = None
    peak_memory_mib: float | None = None
    # Its validations. Arrays: a log may hold millions. NaN: a validation without a time.
    steps: array = field(default_factory=lambda: array("q"))
    losses: array = field(default_factory=lambda: array("d"))
    times_ms: array = field(default_factory=lambda: array("d"))
    alone: bool = True  # in its file

    @property
    def name(self) -> str:
        return self.file if self.alone else f"{self.file} run {self.number}"

    @property
    def val_loss(self) -> float | None:
        return self.losses[-1] if self.losses else None

    def flaw(self) -> str | None:
        """Why the last validation is not the result of a finished run; None if it is."""
        if not self.losses:
            return "has no validation loss"
        if self.total_steps is not None and self.steps[-1] != self.total_steps:
            return f"stops at step {self.final_step} of {self.total_steps}, last validated at step {self.steps[-1]}"
        if self.steps[-1] < self.final_step:
            return f"stops at step {self.final_step}, last validated at step {self.steps[-1]}"
        if not math.isfinite(self.losses[-1]):
            return f"its last validation loss is {self.losses[-1]}"
        return None


@dataclass
class Log:
    """The runs of one file, what could not be read in it, and what else its reader should know."""

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_fields(line: bytes) -> dict[str, float]:
    """The validation loss and the times (ms) of a training line; ValueError names one that cannot be read."""
    values = {}
    for name, number, unit, rest in FIELD.findall(line):
        name = FIELD_NAMES[name]
        # A loss has no unit. A time without one may be anything.
        if not number or rest or (unit == b"") != (name == "val_loss"):
            raise ValueError(f"{name}:{(number + unit + rest)[:60].decode(errors='backslashreplace')}")
        # Rounded so that 16.1s is 16100 ms and not 16100.000000000002.
        values[name] = round(1000 * float(number), 6) if unit == b"s" else float(number)
    return values


class LogReader:
    """Puts the lines of one file together into runs."""

    def __init__(self, path: str, in_source: bool):
        """`in_source`: the file begins with source text that ends at the first line of 100 "="."""
        self.path = path
        self.in_source = in_source
        self.log = Log()
        self.unreadable = None  # offset of the first line that cannot be read, and what in it
        self.unreadable_lines = 0
        self.last = None  # of the run: its values, or the offset and text of a line that has them
        self.end_run()

    def add(self, offset: int, line: bytes, ended: bool) -> None:
        if not ended and not line.endswith((b"s", b"MiB")):
            # Only a unit shows that the number before it is whole.
            self.log.notes.append("the last line has no line end and may be cut short: left out")
        elif line.startswith(b"s"):
            self.add_training_line(offset, line)
        elif line == RULE:
            if self.in_source:
                self.forget_source()
            elif self.run:
                self.end_run()
        elif line.startswith(b"peak memory"):
            self.add_peak_memory(offset, line)
        elif line.startswith(b"hardware: "):
            self.hardware = line.removeprefix(b"hardware: ").decode(errors="replace").strip()
        elif line.startswith(b"git: "):
            self.commit = line.removeprefix(b"git: ").decode(errors="replace").strip()
        elif len(self.gpus) < MAX_GPUS and (gpu := GPU.match(line)):
            self.gpus.append(gpu[1].decode(errors="replace"))

    def add_training_line(self, offset: int, line: bytes) -> None:
        match = TRAINING_LINE.match(line)
        if match is None:
            return
        step = int(match[1])
        total = int(match[2]) if match[2] else None
        validation = b"val_loss:" in line or b" tel:" in line
        # A training loss may come a few steps late, so going back means a new run only among lines of one kind.
        if (
            self.run is None
            or total != self.run.total_steps
            or (step <= self.val_step if validation else step < self.train_step)
            or step == 0 < self.run.final_step
        ):
            self.start_run(total)
        run = self.run
        if validation:
            self.val_step = step
            values = self.fields(offset, line)
            if "val_loss" in values:
                run.steps.append(step)
                run.losses.append(values["val_loss"])
                run.times_ms.append(values.get("train_time", math.nan))
        else:
            self.train_step = step
        # The run's time is that of its last step, where there are two lines the validation's. Of all the other lines
        # only the last is taken apart: there may be millions.
        if self.last is None or step > run.final_step or (validation and step == run.final_step):
            self.last = values if validation else (offset, line)
            run.final_step = step

    def start_run(self, total: int | None) -> None:
        self.read_last_line()
        if len(self.log.runs) == MAX_RUNS:
            raise UserError(f"holds more than {MAX_RUNS:,} runs; split it")
        cards = ", ".join(f"{self.gpus.count(name)} x {name}" for name in dict.fromkeys(self.gpus))
        hardware = self.hardware or cards or None
        self.run = Run(self.path, len(self.log.runs) + 1, total, hardware, self.commit)
        self.log.runs.append(self.run)
        self.val_step = self.train_step = -1

    def end_run(self) -> None:
        """What follows is another log's: a header of its own, and runs of its own."""
        self.read_last_line()
        self.run = self.hardware = self.commit = None
        self.gpus = []  # names of the cards in nvidia-smi's table

    def read_last_line(self) -> None:
        if self.last is not None:
            values = self.last if isinstance(self.last, dict) else self.fields(*self.last)
            self.run.train_time_ms = finite(values.get("train_time", math.nan))
            self.run.step_avg_ms = finite(values.get("step_avg", math.nan))
        self.last = None

    def add_peak_memory(self, offset: int, line: bytes) -> None:
        match = PEAK_MEMORY.match(line)
        if match is None:
            self.cannot_read(offset, line[:60].decode(errors="backslashreplace"))
        elif self.run:
            self.run.peak_memory_mib = float(match[1]) * MEBIBYTES[match[2]]

    def fields(self, offset: int, line: bytes) -> dict[str, float]:
        try:
            return read_fields(line)
        except ValueError as error:
            self.cannot_read(offset, str(error))
            return {}

    def cannot_read(self, offset: int, what: str) -> None:
        self.unreadable = self.unreadable or (offset, what)
        self.unreadable_lines += 1

    def forget_source(self) -> None:
        """What came before was source text, and anything in it that looks like a log's lines is not one."""
        self.in_source = False
        self.last = None
        if self.log.runs:
            self.log.notes.append('training lines before the first line of 100 "=" taken for source text: left out')
        self.log.runs.clear()
        self.unreadable, self.unreadable_lines = None, 0
        self.end_run()

    def finish(self) -> Log:
        self.read_last_line()
        for run in self.log.runs:
            run.alone = len(self.log.runs) == 1
        if self.unreadable:
            offset, what = self.unreadable
            more = f", nor {self.unreadable_lines - 1:,} lines more" if self.unreadable_lines > 1 else ""
            self.log.problems.append(f"line {line_number(self.path, offset)}: cannot read {what!r}{more}")
        elif not self.log.runs:
            self.log.problems.append("no training lines")
        return self.log


def read_log(path: str) -> Log:
    """Reads one log: finds its sources, then reads the lines outside them. Raises UserError."""
    with open_log(path) as file:
        sources = find_sources(file)
        file.seek(0)
        start = file.read(4096)
        file.seek(0)
        reader = LogReader(path, in_source=not sources.proved and LOG_START.match(start) is None)
        proved = iter([*sources.proved, (math.inf, math.inf, None)])
        source_start, source_end, _ = next(proved)
        for offset, line, ended in marked_lines(file, MARKS):
            while offset >= source_end:
                source_start, source_end, _ = next(proved)
            if offset < source_start:
                reader.add(offset, line, ended)
        log = reader.finish()
    if sources.unproved:
        log.notes.append("its source does not match its checksum: damaged or edited")
    return log


@contextlib.contextmanager
def open_log(path: str):
    """Opens a log as bytes; whatever is wrong with it becomes a UserError that names the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError("is not a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError("is empty")
            file.seek(0)
            yield file
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_logs(paths: list[str]) -> tuple[list[Run], bool]:
    """The runs of all files that can be read, and whether that is all there was; reports the rest."""
    runs, whole, seen = [], True, set()
    for path in paths:
        if os.path.realpath(path) in seen:
            report(f"{path}: named twice, counted once")
            continue
        seen.add(os.path.realpath(path))
        try:
            log = read_log(path)
        except UserError as error:
            report(error)
            whole = False
            continue
        for message in log.problems + log.notes:
            report(f"{path}: {message}")
        runs += log.runs
        whole = whole and not log.problems
    return runs, whole


# ======================================================================================================================
# Statistics
# ======================================================================================================================


@dataclass(frozen=True)
class Sample:
    """n, mean, standard deviation (of a sample: n - 1; None for n = 1), smallest and largest of some numbers."""

    n: int
    mean: float
    sd: float | None
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Sample":
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.mean(values), sd, min(values), max(values))


def student_t():
    """scipy's functions for Student's t: stdtr(df, t) is its distribution, stdtrit(df, p) the quantile."""
    try:
        from scipy import special
    except ImportError:
        raise UserError("this needs scipy: pip install -r records/requirements.txt") from None
    return special


def p_at_most(sample: Sample, target: float) -> float | None:
    """One-sided t-test: how likely a sample mean this low is if the true mean is `target`; None without a spread."""
    if not sample.sd:
        return None
    return float(student_t().stdtr(sample.n - 1, (sample.mean - target) / (sample.sd / math.sqrt(sample.n))))


def runs_needed(sample: Sample, target: float) -> float | None:
    """How many runs in all would be significant if mean and sd stay as they are; inf: never; None without a spread."""
    if not sample.sd:
        return None

    def significant(n):
        return p_at_most(Sample(n, sample.mean, sample.sd, sample.min, sample.max), target) < SIGNIFICANCE

    # p falls with n where the mean is below the target. The limit is where a difference is one of rounding.
    high = 2
    while not significant(high):
        high *= 2
        if high > 1 << 30:
            return math.inf
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if significant(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Difference:
    """Welch's test of mean(a) - mean(b): 95 % interval and two-sided p, None where the samples have no spread."""

    a: Sample
    b: Sample
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @classmethod
    def of(cls, a: Sample, b: Sample) -> "Difference":
        mean = a.mean - b.mean
        if a.sd is None or b.sd is None or not (a.sd or b.sd):
            return cls(a, b, mean)
        variance_a, variance_b = a.sd**2 / a.n, b.sd**2 / b.n
        error = math.sqrt(variance_a + variance_b)
        freedom = error**4 / (variance_a**2 / (a.n - 1) + variance_b**2 / (b.n - 1))
        reach = float(student_t().stdtrit(freedom, 0.975)) * error
        p = 2 * float(student_t().stdtr(freedom, -abs(mean) / error))
        return cls(a, b, mean, mean - reach, mean + reach, p)


def results(paths: list[str]) -> tuple[list[Run], bool]:
    """The finished runs in `paths`, and whether that is all there was; reports the rest. UserError where none is."""
    runs, whole = read_logs(paths)
    finished = []
    for run in runs:
        if flaw := run.flaw():
            report(f"{run.name}: left out: {flaw}")
            whole = False
        else:
            finished.append(run)
    if not finished:
        raise UserError("no finished run in these logs")
    lengths = sorted({run.final_step for run in finished})
    if len(lengths) > 1:
        report(f"these runs differ in length: {', '.join(f'{steps:,}' for steps in lengths)} steps")
    return finished, whole


def loss_sample(runs: list[Run]) -> Sample:
    return Sample.of([run.val_loss for run in runs])


def time_sample(runs: list[Run]) -> Sample | None:
    """Of the runs' training times in ms; None where no log has one."""
    times = [run.train_time_ms for run in runs if run.train_time_ms is not None]
    return Sample.of(times) if times else None


# ======================================================================================================================
# Output
# ======================================================================================================================


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(header: list[str], rows: list[list[str]], left: set[int], markdown: bool) -> str:
    """A table as aligned text or Markdown; `left`: the columns that are text and not numbers."""
    if markdown:
        rule = ["---" if column in left else "---:" for column in range(len(header))]
        cells = [header, rule] + [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        padded = (f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def print_json(value) -> None:
    """Prints JSON; numbers that are whole are printed so, and NaN and infinity, which JSON lacks, as null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return None if not math.isfinite(value) else int(value) if value.is_integer() else value
        return value

    print(json.dumps(plain(value), indent=2))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: is not a file")
        try:
            draft.write_bytes(content)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


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


def digits(sample: Sample, form: str) -> list[str]:
    return [shown(value, form) for value in (sample.mean, sample.sd, sample.min, sample.max)]


def shown_p(p: float | None) -> str:
    return shown(p, ".4f" if p is None or p >= 0.0001 else ".1e")


def compare(args) -> int:
    """Prints the difference of two sets of runs in mean loss and time."""
    runs_a, whole_a = results(args.logs)
    runs_b, whole_b = results(args.vs)
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

CHECKS = ("causal", "normalized", "documents", "validation", "world_size", "warm_up", "compiler")
# What the presets validate on: tokens, and the files' names.
STREAMS = {"record": (10_485_760, "fineweb_val_*.bin"), "tiny": (524_288, "sympy_val_*.bin")}
STARTING = 300  # seconds that PyTorch may take to be imported
SETTINGS_MARK = re.compile(rb"\nsettings: \{")


def check(args) -> int:
    """Says whether a script, or the script that made a log, is a legal attempt: a line a check of its rules."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise UserError("this needs tqdm: pip install -r requirements.txt") from None
    signal.signal(signal.SIGHUP, command.stop)  # as the other signals do: the child is ended, too
    names = [name for name in CHECKS if name in (args.only or CHECKS)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(names), leave=False, disable=None) as bar:
        script, notes = find_checked(args.file, Path(folder))
        bar.set_description(f"loading, then {names[0]}")
        for name, rule, findings in verdicts(args.file, script, names, Path(folder), args.timeout):
            findings = (notes if name == "validation" else []) + findings
            rows.append({"check": name, "ok": not findings, "rule": rule, "findings": findings})
            if not (args.json or args.markdown):
                bar.write("{:<11} {:<7} {}".format(*check_cells(rows[-1])).rstrip())
                sys.stdout.flush()
            bar.update()
            bar.set_description(dict(zip(names, names[1:])).get(name))
    if args.json:
        print_json(rows)
    elif args.markdown:
        print(table(["check", "", "what"], [check_cells(row) for row in rows], {0, 1, 2}, True))
    return 0 if all(row["ok"] for row in rows) else 1


def check_cells(row: dict) -> list[str]:
    findings = row["findings"]
    more = " (and more)" if len(findings) > 1 else ""
    return [row["check"], "ok" if row["ok"] else "FAILED", findings[0] + more if findings else row["rule"]]


def find_checked(file: str, folder: Path) -> tuple[Path, list[str]]:
    """The script to check, which of a log is put into `folder`; and what of a log's settings is not as it must be."""
    with open_log(file) as opened:
        if file.endswith(".py"):
            return Path(file).resolve(), []
        (folder / "train_gpt.py").write_bytes(find_script(opened)[0])
        notes = []
        opened.seek(max((end for _, end, _ in find_sources(opened).proved), default=0))
        for _, line, _ in marked_lines(opened, SETTINGS_MARK):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                settings = json.loads(line.partition(b": ")[2])
                given = settings["val_tokens"], Path(settings["val_files"]).name
                if given != (right := STREAMS.get(settings["preset"], given)):
                    notes.append("the log's run validated on {} tokens of {}, not {} of {}".format(*given, *right))
        return folder / "train_gpt.py", notes


def verdicts(file: str, script: Path, names: list[str], folder: Path, seconds: float):
    """Yields (check, rule, findings) as they come. UserError if the script cannot be checked, or loaded in time."""
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
                    yield from ((name, None, [given if name == names[i] else "not reached"]) for name in names[i:])
                    return
                yield name, given["rule"], given["findings"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and the runs that it has started
            child.wait()


# ======================================================================================================================
# plot
# ======================================================================================================================

# Black first, then hues that differ in lightness too; every curve also has a line style and a marker of its own.
COLORS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
LINES = ["-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<"]
UNITS = [("s", 1e3, 600e3), ("min", 60e3, 4 * 3600e3), ("h", 3600e3, math.inf)]  # name, ms, up to how many ms
LOG_SCALE_FROM = 8  # ends that are this many times apart need a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """Runs that were validated at the same steps, at each of which (but step 0) a curve has a point."""

    label: str
    runs: list[Run]

    def points(self, values: str) -> list[tuple[float, ...]]:
        """The runs' `steps`, `losses` or `times_ms` at each validation."""
        rows = zip(*(getattr(run, values) for run in self.runs), strict=True)
        return [row for step, row in zip(self.runs[0].steps, rows, strict=True) if step > 0]

    def steps(self) -> list[int]:
        return [at[0] for at in self.points("steps")]

    def losses(self) -> list[float]:
        return [statistics.fmean(at) for at in self.points("losses")]

    def times_ms(self) -> list[float]:
        return [statistics.fmean(at) for at in self.points("times_ms")]

    def early_loss(self) -> float:
        """The loss at the first validation after a tenth of the run: what lies above it would dwarf the rest."""
        points = list(zip(self.steps(), self.losses(), strict=True))
        return next((loss for step, loss in points if 10 * step >= points[-1][0] and math.isfinite(loss)), -math.inf)


def curves(runs: list[Run], name: str | None = None) -> list[Curve]:
    """Puts the runs together that were validated at the same steps: those of one folder, or, with a name, all of them.

    The folder or the name is the label. A run that goes with no other is a curve of its own, labelled by its file.
    """
    sets = {}
    for run in runs:
        group = name or Path(run.file).resolve().parent.name
        sets.setdefault((group, run.steps.tobytes()), []).append(run)
    found = []
    for (group, _), members in sets.items():
        first, label = members[0], group
        if len(members) == 1 and (name is None or len(sets) > 1):
            label = Path(first.file).stem + ("" if first.alone else f" run {first.number}")
        if any(curve.label == label for curve in found):
            label += f", {first.final_step:,} steps"
        found.append(Curve(label, members))
    return found


def plot(args) -> int:
    """Draws loss against steps and against time."""
    matplotlib = load_matplotlib()
    kind = args.out.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"{args.out}: the name must end in .png, .svg or .pdf")
    groups = [(None, args.logs)] * bool(args.logs) + [(name, logs) for name, *logs in args.group]
    if not groups or not all(logs for _, logs in groups):
        raise UserError("plot needs logs, and --group a name and logs")
    drawn, whole = [], True
    for name, logs in groups:
        runs, all_read = read_logs(logs)
        empty = [run for run in runs if not any(map(math.isfinite, run.losses[run.steps[:1].count(0) :]))]
        for run in empty:
            report(f"{run.name}: left out: has no validation loss after step 0")
        whole = whole and all_read and not empty
        drawn += curves([run for run in runs if run not in empty], name)
    if not drawn:
        raise UserError("no validation losses to draw in these logs")
    image = io.BytesIO()
    settings = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        draw(matplotlib, drawn, args.target).savefig(image, format=kind, dpi=200)
    write_file(args.out, image.getvalue())
    return 0 if whole else 2


def load_matplotlib():
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise UserError("this needs matplotlib: pip install -r records/requirements.txt") from None
    return matplotlib


def draw(matplotlib, drawn: list[Curve], target: float):
    """The plot: two panels with one loss axis; where runs repeat, an inset shows how each of them ended."""
    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    longest = max((time for curve in drawn for time in curve.times_ms() if math.isfinite(time)), default=0)
    unit, unit_ms, _ = next(unit for unit in UNITS if longest < unit[2])
    bottom = min(loss for curve in drawn for at in curve.points("losses") for loss in at if math.isfinite(loss))
    top = max(bottom, *(curve.early_loss() for curve in drawn))
    # A target just missed is in the plot. One that is far from all losses is that of another task.
    bottom = target if bottom - 0.3 * (top - bottom) < target < bottom else bottom
    pad = 0.06 * (top - bottom) or 0.1
    visible = {by_step: [], by_time: []}
    for index, curve in enumerate(drawn):
        mean, losses = curve.losses(), curve.points("losses")
        every = max(1, len(mean) // 10)
        style = curve_style(index) | {"linewidth": 1.6, "markevery": ((len(mean) - 1) % every, every)}
        for axes, x in (by_step, curve.steps()), (by_time, [time / unit_ms for time in curve.times_ms()]):
            axes.plot(x, mean, **style)
            band = list(map(min, losses)), list(map(max, losses))
            axes.fill_between(x, *band, color=style["color"], alpha=0.3, linewidth=0)
            if seen := [at for at, loss in zip(x, mean, strict=True) if loss <= top and 0 < at < math.inf]:
                visible[axes].append(seen)
    by_step.set_ylim(bottom - pad, top + pad)
    by_step.set_ylabel("Validation loss (nats per token)")
    by_step.set_xlabel("Training steps")
    by_time.set_xlabel(f"Training time ({unit})")
    for axes in (by_step, by_time):
        set_x_axis(matplotlib, axes, visible[axes])
        axes.tick_params(labelleft=True)
        axes.grid(color="0.93")
        if bottom - pad < target < top + pad:
            draw_target(axes, target)
    handles = by_step.get_lines()[: len(drawn)]
    labels = [legend_text(curve) for curve in drawn]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(drawn)), frameon=False, handlelength=4)
    if any(len(curve.runs) > 1 for curve in drawn) and visible[by_time] and corner_is_free(by_time):
        draw_ends(by_time.inset_axes([0.6, 0.5, 0.39, 0.42]), drawn, target, unit, unit_ms)
    return figure


def corner_is_free(axes) -> bool:
    """Whether no line passes through the upper right, seen from 0.5 of the width and 0.45 of the height."""
    for line in axes.get_lines():
        points = line.get_path().interpolated(20).vertices
        across = (line.get_transform() - axes.transAxes).transform(points)
        if ((across > (0.5, 0.45)) & (across < 1)).all(axis=1).any():
            return False
    return True


def curve_style(index: int) -> dict:
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def legend_text(curve: Curve) -> str:
    # matplotlib leaves out labels that begin with "_" and reads what is between "$" as a formula.
    label = curve.label.lstrip("_").replace("$", r"\$")
    return label + (f" ({len(curve.runs)} runs)" if len(curve.runs) > 1 else "")


def set_x_axis(matplotlib, axes, visible: list[list[float]]) -> None:
    """From 0, or logarithmic where the ends of curves are far apart. `visible`: where each curve is in the plot."""
    ends = [x[-1] for x in visible]
    if not ends:
        axes.text(0.5, 0.5, "no times in these logs", transform=axes.transAxes, ha="center", color="0.4")
        axes.set_xticks([])
    elif max(ends) < LOG_SCALE_FROM * min(ends):
        axes.set_xlim(0, max(ends) * 1.03)
        axes.locator_params(axis="x", nbins=7)
    else:
        left, right = min(x[0] for x in visible) * 0.8, max(ends) * 1.15
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5) if right < 500 * left else (1, 3)))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.10g}"))


def draw_target(axes, target: float) -> None:
    axes.axhline(target, color="0.3", linestyle="--", linewidth=1, zorder=1)
    # Below the line and on the left is where curves are not, wherever they end.
    place = {"xy": (0, target), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"target {target:g}", xytext=(5, -5), ha="left", va="top", color="0.3", fontsize=9, **place)


def draw_ends(axes, drawn: list[Curve], target: float, unit: str, unit_ms: float) -> None:
    """A dot for the time and loss at which each run ended: the spread, which the curves are too steep to show."""
    for index, curve in enumerate(drawn):
        times = [time / unit_ms for time in curve.points("times_ms")[-1]]
        axes.plot(times, curve.points("losses")[-1], **curve_style(index) | {"linestyle": "none", "alpha": 0.8})
    axes.margins(0.1)
    low, high = axes.get_ylim()
    if low - (high - low) < target < high + (high - low):
        axes.axhline(target, color="0.3", linestyle="--", linewidth=1, zorder=1)
    axes.set_title(f"Each run's end ({unit}, nats)", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(nbins=5)
    axes.grid(color="0.93")


# ======================================================================================================================
# leaderboard
# ======================================================================================================================

RECORDS = Path(__file__).resolve().parent
# What lies between these two lines of README.md is rewritten: the records of one folder, held against a target.
TABLE = re.compile(r"(<!-- leaderboard: (\S+), target (\d+(?:\.\d+)?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
RECORD_NAME = re.compile(r"(\d{4}-\d\d(?:-\d\d)?)_.+")
TITLE = re.compile(r"^#+[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
CONTRIBUTORS = re.compile(r"^[*_]*Contributors?:[*_]*[ \t]*(.*?)[ \t]*$", re.MULTILINE)


def leaderboard(args) -> int:
    """Rewrites the tables in records/README.md, or, with --check, says whether they are what it would write."""
    readme = RECORDS / "README.md"
    text = read_text(readme)
    tracks = {match[2] for match in TABLE.finditer(text)}
    for folder in folders(RECORDS):
        if folder.name not in tracks and any(RECORD_NAME.fullmatch(record.name) for record in folders(folder)):
            marker = f"<!-- leaderboard: {folder.name}, target ... -->"
            raise UserError(f"{folder}: README.md has no table for it ({marker})")
    current = TABLE.sub(lambda match: match[1] + track_table(match[2], float(match[3])) + match[5], text)
    if args.check:
        print(f"{readme}: {'up to date' if current == text else 'out of date; run the leaderboard command'}")
        return 0 if current == text else 1
    if current != text:
        write_file(readme, current.encode())
    print(f"{readme}: {'rewritten' if current != text else 'up to date'}")
    return 0


def track_table(track: str, target: float) -> str:
    """The records in a track's folder, oldest first, as a Markdown table."""
    header = ["#", "date", "record", "mean loss ± sd", "runs", "mean time", f"p (≤ {target:g})", "contributors"]
    rows = []
    for folder in folders(RECORDS / track):
        if not (name := RECORD_NAME.fullmatch(folder.name)):
            raise UserError(f"{folder}: a record's folder is named <date>_<name>, like 2026-05-31_sign_trick")
        text = read_text(folder / "README.md")
        if not (title := TITLE.search(text)):
            raise UserError(f"{folder / 'README.md'}: has no heading to take the record's title from")
        contributors = CONTRIBUTORS.search(text)
        logs = sorted(str(path) for path in folder.rglob("*.txt"))
        if not logs:
            raise UserError(f"{folder}: holds no logs (*.txt)")
        runs, whole = results(logs)
        if not whole:
            raise UserError(f"{folder}: holds logs that do not count; README.md is left as it is")
        loss, time = loss_sample(runs), time_sample(runs)
        rows.append(
            [
                str(len(rows) + 1),
                name[1],
                f"[{title[1]}]({quote(track)}/{quote(folder.name)}/)",
                f"{loss.mean:.4f} ± {shown(loss.sd, '.4f')}",
                str(loss.n),
                "-" if time is None else f"{time.mean / 1000:,.2f} s",
                shown_p(p_at_most(loss, target)),
                contributors[1] if contributors else "",
            ]
        )
    return (table(header, rows, {1, 2, 7}, True) if rows else "No records yet.") + "\n"


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
