"""What the programs that make the tracks' results share: runs, which are kept once complete, and tables."""

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import logbook
from command import UserError
from samples import student_t

ROOT = Path(__file__).resolve().parent.parent


def finished(path: Path) -> logbook.Run | None:
    """The run of a complete log, or None."""
    if not path.exists():
        return None
    runs = logbook.read_log(str(path)).runs
    if len(runs) != 1 or runs[0].flaw():
        return None
    return runs[0]


class Origin(NamedTuple):
    """What made a log."""

    source: str | None  # the script's SHA-256; None if the log has none that its text bears out
    settings: dict[str, object]  # with those of the model among the others


def origin(path: Path) -> Origin:
    """What made a log of train_gpt.py, or of a script that writes logs as it does. Raises UserError."""
    with open(path, "rb") as file:
        proved = logbook.find_sources(file).proved
    source = proved[-1][2].sha256 if proved else None
    _, found, rest = path.read_text(encoding="utf-8").rpartition("\nsettings: {")
    if not found:
        raise UserError(f"{path}: its log has no settings; it is none of train_gpt.py")
    settings = json.loads("{" + rest.partition("\n")[0])
    return Origin(source, settings | settings.get("model", {}))


def train(path: Path, script: str, options: list[str], alone: bool = True) -> None:
    """Runs a training script of this repository; its log is moved to `path` when it is complete.

    A run that is not alone has one thread. UserError, with the run's exit status, if it fails.
    """
    log = ROOT / "logs" / f"{path.parent.name}-{path.name}"
    log.unlink(missing_ok=True)  # of a run that was cut off
    command = [sys.executable, script, "--run-id", log.stem, *options]
    environment = os.environ if alone else {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        said = "".join(run.stderr.strip().splitlines()[-1:])
        status = run.returncode if run.returncode > 0 else 128 - run.returncode  # -15: by SIGTERM
        raise UserError(f"{path.stem}: {' '.join(command[1:])} failed: {said}", status)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(log, path)


def side_by_side(function: Callable, items: Iterable, text: str) -> Iterator:
    """What a function returns for each item, in order: as many at once as there are cores, under a progress bar.

    For runs whose time does not count: each on a thread of its own, they are sooner done than one after the other.
    """
    items = list(items)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from tqdm(pool.map(function, items), text, len(items), disable=None)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, those that have not begun


def step_time(path: Path) -> float:
    """Milliseconds of the quickest quarter of a run's steps, which what else the machine does disturbs least."""
    times = re.findall(r"^step:\d+/\d+ train_loss:\S+ train_time:(\d+)ms", path.read_text(), re.MULTILINE)
    return statistics.quantiles((int(b) - int(a) for a, b in itertools.pairwise(times)), n=4)[0]


def interval(values: list[float], form: str) -> str:
    """Mean and, of more than one value, half the width of its 95 % interval by Student's t."""
    mean, n = format(statistics.fmean(values), form), len(values)
    if n < 2:
        return mean
    half = student_t().stdtrit(n - 1, 0.975) * statistics.stdev(values) / math.sqrt(n)
    return f"{mean} ± {format(half, form.lstrip('+'))}"


def put_section(readme: Path, section: str, text: str) -> None:
    """Puts a text between the two markers of a section of a README."""
    markers = re.compile(rf"(<!-- {section} -->\n)(.*?)(<!-- end of {section} -->)", re.DOTALL)
    old = readme.read_text(encoding="utf-8")
    readme.write_text(markers.sub(lambda match: match[1] + text + match[3], old), encoding="utf-8")
