"""Reads the logs of training runs: their lines, the scripts in them, and the runs.

It reads train_gpt.py's logs and those of the public leaderboard, of every age, and needs Python alone.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from array import array
from collections import deque
from dataclasses import dataclass, field

from command import UserError, report

RULE = b"=" * 100  # the line around a log's header
CHUNK = 1 << 20  # bytes read at once
MAX_LINE = 1 << 16  # a longer line is no line of a log: it is skipped without being held
MAX_SOURCE = 1 << 22  # the longest script that is looked for
MAX_CLAIMS = 100  # lines in a file that claim to end a source; each costs hashing that source
MAX_RUNS = 10_000  # runs in one file
MAX_DEPTH = 50  # brackets within brackets in the settings
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
    file.seek(0)
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


# The public logs have no checksum. Those of October and November 2024 begin with a line of 100 "=", and their script
# ends at the second one; that of all others begins the file and ends at the first. Since January 2026 the kernels'
# files follow train_gpt.py in it, each after its name between two lines of 40 "-".
RULE_LINE = re.compile(rb"^={100}\r?(?:\n|\Z)", re.MULTILINE)
# How a log without a script begins.
LOG_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:s(?:tep)?:[ \t]*\d|Running [Pp]|source: \d)")
NO_SCRIPT = "holds no script"
MORE_SOURCE = re.compile(rb"\r?\n\r?\n-{40}\r?\n# (\w+\.py)\r?\n-{40}\r?\n\r?\n")


def public_source(file) -> tuple[int, int] | None:
    """Where in an open log without a checksum the script starts and ends; None if it begins with none."""
    file.seek(0)
    text = file.read(MAX_SOURCE)
    rules = RULE_LINE.finditer(text)
    end, start = next(rules, None), 0
    if end and not text[: end.start()].removeprefix(b"\xef\xbb\xbf").strip():
        start = end.end()
        end = next(rules, None)
    if end is None or LOG_START.match(text, start) or not text[start : end.start()].strip():
        return None
    return start, end.start()


@dataclass(frozen=True)
class Script:
    """The script in a log: its text, with that of the kernels' files, and whether a checksum vouches for it."""

    text: bytes
    vouched: bool

    @property
    def sha256(self) -> str:
        # Without a checksum nothing says what the line ends were.
        return hashlib.sha256(self.text if self.vouched else self.text.replace(b"\r\n", b"\n")).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The text of each file: the first, whose name no log says, is "", the others are the kernels'."""
        names_and_texts = [b"", *MORE_SOURCE.split(self.text)] if not self.vouched else [b"", self.text]
        return {name.decode(): text for name, text in zip(names_and_texts[::2], names_and_texts[1::2])}


def find_script(file, sha256: str | None = None) -> Script:
    """The script in an open log, or, where there are several, the one with this SHA-256. Raises UserError."""
    sources = find_sources(file)
    claims = [claim for _, _, claim in sources.proved if sha256 in (None, claim.sha256)]
    if sources.unproved and (sha256 is None or not claims):
        raise UserError("its source does not match its checksum: the log is damaged or edited")
    if len({claim.sha256 for claim in claims}) > 1:
        raise UserError("holds the logs of several scripts; split it")
    if claims:
        return Script(claims[0].prove(file)[1], True)
    if (place := public_source(file)) is None:
        raise UserError(NO_SCRIPT)
    file.seek(place[0])
    return Script(file.read(place[1] - place[0]), False)


# ======================================================================================================================
# Runs
# ======================================================================================================================

MARKS = re.compile(
    rb"\n(?:s(?:tep)?:[ \t]*\d|peak memory|={100}(?=\r?\n)|hardware: |world size: |git: |settings: \{"
    rb"|data: train |validation stream: |\|[ \t]+\d+[ \t]+[A-Z])"
)
# llm.c wrote `s:250 tel:6.1710`, all since then `step:250/1390 val_loss:3.9012 train_time:14210ms step_avg:56.84ms`.
TRAINING_LINE = re.compile(
    rb"s(?:tep)?:[ \t]*(\d{1,12})(?:/(\d{1,12}))?[ \t].*?(?:val_loss|tel|train_loss|trl|train_time):"
)
# Of a training shard's file, and of the tokens that were validated on.
TRAIN_SUM = re.compile(rb"data: train .* tokens, sha256 ([0-9a-f]{64})")
STREAM_SUM = re.compile(rb"validation stream: .* tokens, sha256 ([0-9a-f]{64})")
# name, number, unit, and what should not be there
FIELD = re.compile(
    rb"[ \t](val_loss|tel|train_time|step_avg):[ \t]*(nan|inf|\d{1,20}(?:\.\d{0,20})?)?(?:[ \t]?(ms|s)(?!\S))?(\S*)"
)
FIELD_NAMES = {b"val_loss": "val_loss", b"tel": "val_loss", b"train_time": "train_time", b"step_avg": "step_avg"}
PEAK_MEMORY = re.compile(rb"peak memory[^:]*:[ \t]*(\d{1,12}(?:\.\d{0,12})?)[ \t]*(MiB|GiB)\b")
MEBIBYTES = {b"MiB": 1, b"GiB": 1024}
GPU = re.compile(rb"\|[ \t]+\d+[ \t]+(\S.*?)[ \t]+(?:On|Off)[ \t]+\|")  # a card's row in nvidia-smi's table


@dataclass(frozen=True)
class Header:
    """What a log says of the runs that follow. None: it does not say."""

    source: str | None = None  # the script's SHA-256
    settings: dict | None = None
    hardware: str | None = None
    world_size: int | None = None
    commit: str | None = None
    validated: str | None = None  # SHA-256 of the tokens that were validated on
    trained: frozenset[str] = frozenset()  # SHA-256 of the training shards


@dataclass(eq=False)
class Run:
    """One run: what its log says. None: the log does not say."""

    file: str
    number: int  # among the runs of the file, from 1
    total_steps: int | None
    header: "Header"
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
    def hardware(self) -> str | None:
        return self.header.hardware

    @property
    def seed(self) -> int | None:
        seed = (self.header.settings or {}).get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def preset(self) -> str | None:
        preset = (self.header.settings or {}).get("preset")
        return preset if isinstance(preset, str) else None

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


def read_settings(text: str) -> dict | None:
    """The settings in a line of JSON; None if they cannot be read."""
    depths = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text)
    if max(depths, default=0) > MAX_DEPTH:
        return None
    try:
        settings = json.loads(text)
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def read_count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


class LogReader:
    """Puts the lines of one file together into runs."""

    def __init__(self, path: str, rules: int, source: str | None):
        """The file begins with source text that ends at that many lines of 100 "="; `source`: its SHA-256."""
        self.path = path
        self.rules = rules
        self.source = source
        self.log = Log()
        self.unreadable = None  # offset of the first line that cannot be read, and what in it
        self.unreadable_lines = 0
        self.last = None  # of the run: its values, or the offset and text of a line that has them
        self.last_validation = None  # the run's last line, if that is a validation's
        self.repeated_lines = False
        self.end_run()

    def add(self, offset: int, line: bytes, ended: bool) -> None:
        if not ended and not line.endswith((b"s", b"MiB")):
            # Only a unit shows that the number before it is whole.
            self.log.notes.append("the last line has no line end and may be cut short: left out")
        elif line.startswith((b"hardware: ", b"world size: ", b"git: ", b"settings: ")):
            name, _, value = line.decode(errors="replace").partition(": ")
            self.said[name] = value.strip()
        elif match := STREAM_SUM.fullmatch(line):
            self.said["validated"] = match[1].decode()
        elif match := TRAIN_SUM.fullmatch(line):
            self.trained.add(match[1].decode())
        elif line.startswith(b"s"):
            if line != self.last_validation:
                self.add_training_line(offset, line)
            elif not self.repeated_lines:
                self.repeated_lines = True
                self.log.notes.append("the same validation lines follow each other: counted once")
        elif line == RULE:
            if self.rules:
                self.forget_source()
            elif self.run:
                self.end_run()
                self.source = None
        elif line.startswith(b"peak memory"):
            self.add_peak_memory(offset, line)
        elif len(self.gpus) < MAX_GPUS and (gpu := GPU.match(line)):
            self.gpus.append(gpu[1].decode(errors="replace"))

    def add_training_line(self, offset: int, line: bytes) -> None:
        match = TRAINING_LINE.match(line)
        if match is None:
            return
        step = int(match[1])
        total = int(match[2]) if match[2] else None
        validation = b"val_loss:" in line or b" tel:" in line
        self.last_validation = line if validation else None
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
        header = Header(
            source=self.source,
            settings=read_settings(self.said.get("settings", "")),
            hardware=self.said.get("hardware") or cards or None,
            world_size=read_count(self.said.get("world size", "")),
            commit=self.said.get("git"),
            validated=self.said.get("validated"),
            trained=frozenset(self.trained),
        )
        self.run = Run(self.path, len(self.log.runs) + 1, total, header)
        self.log.runs.append(self.run)
        self.val_step = self.train_step = -1

    def end_run(self) -> None:
        """What follows is another log's: a header of its own, and runs of its own."""
        self.read_last_line()
        self.run = self.last_validation = None
        self.said = {}  # by the header's lines
        self.trained = set()
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
        self.rules -= 1
        self.last = None
        if self.log.runs:
            self.log.notes.append('training lines before a line of 100 "=" taken for source text: left out')
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
        reader = LogReader(path, 0, None)
        if not sources.proved:
            file.seek(0)
            start = file.read(4096)
            place = public_source(file)
            # What begins like a script may have its end beyond what is looked at.
            reader.rules = 0 if LOG_START.match(start) else 2 if place and place[0] else 1
            reader.source = find_script(file).sha256 if place and not sources.unproved else None
        file.seek(0)
        proved = iter([*sources.proved, (math.inf, math.inf, None)])
        source_start, source_end, claim = next(proved)
        for offset, line, ended in marked_lines(file, MARKS):
            while offset >= source_end:
                reader.end_run()
                reader.source = claim.sha256
                source_start, source_end, claim = next(proved)
            if offset < source_start:
                reader.add(offset, line, ended)
        log = reader.finish()
    if sources.unproved:
        log.notes.append("its source does not match its checksum: damaged or edited")
    return log


STEP_MARK = re.compile(rb"\nstep:\d")
STEP_TIME = re.compile(rb"step:(\d{1,12})/.* train_time:(\d{1,15})ms")


def backward_times(path: str) -> list[str]:
    """Where the clock of a log's run goes back, which no clock that is only stopped does."""
    found = []
    last_step = last = 0
    with open_log(path) as file:
        file.seek(max((end for _, end, _ in find_sources(file).proved), default=0))
        for _, line, _ in marked_lines(file, STEP_MARK):
            if match := STEP_TIME.match(line):
                step, time = int(match[1]), int(match[2])
                if time < last and step >= last_step > 0:
                    found.append(f"train_time goes back from {last} ms at step {last_step} to {time} ms at step {step}")
                last_step, last = step, time
    return found


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
    return without_copies(runs), whole


# ======================================================================================================================
# Copies
#
# A log may be there twice: under another name, with another header, cut off at either end, or several times in one
# file. No two runs have the same losses after the same times, to the millisecond.
# ======================================================================================================================


def without_copies(runs: list[Run]) -> list[Run]:
    """The runs, each once, in their order; reports those that repeat another, or a part of it."""
    if len(runs) < 2:
        return runs
    ends = {end for run in runs for end in deque(moments(run), maxlen=1)}
    holders = {}  # by the end of a run: the runs, none a copy, that have been there
    copies = set()
    # The longest first, so that a part comes after its whole; of equal ones the first that was named counts.
    for run in sorted(runs, key=lambda run: -len(run.steps)):
        own = [*moments(run)]
        there = holders.get(own[-1], []) if own else []
        whole = next((other for other in there if is_copy(own, [*moments(other)])), None)
        if whole:
            part = "a part of " * (run.final_step < whole.final_step or len(run.steps) < len(whole.steps))
            report(f"{run.name}: repeats {part}{whole.name}: counted once")
            copies.add(run)
            continue
        for moment in own:
            if moment in ends:
                holders.setdefault(moment, []).append(run)
    return [run for run in runs if run not in copies]


def moments(run: Run):
    """What tells a run from others: (total steps, step, loss, time in ms) of each validation of a trained model.

    The untrained one has the same loss in many runs. A run that has no other is known by its last step.
    """
    if not any(run.steps):
        if run.final_step and run.train_time_ms is not None:
            yield run.total_steps, run.final_step, None, run.train_time_ms
        return
    for step, loss, time in zip(run.steps, run.losses, run.times_ms):
        if step:
            yield run.total_steps, step, finite(loss), finite(time)


def is_copy(own: list[tuple], others: list[tuple]) -> bool:
    """Whether a run's moments are another's, or some of them; without times only if they are all."""
    return own == others or (all(time is not None for *_, time in own) and set(own) <= set(others))
