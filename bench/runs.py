"""What the programs of this folder share: how one ends, runs that are kept when their log is complete, and tables."""

import itertools
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import logbook  # noqa: E402
import train_gpt  # noqa: E402


def command(main: Callable[[], None]) -> None:
    """Calls a program's work; a user's mistake is one line, and exit status 2."""
    try:
        main()
    except train_gpt.UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def stage_alone(settings: train_gpt.Settings, stage: train_gpt.Stage, steps: int) -> train_gpt.Settings:
    """Settings whose run is so many steps of one stage, and one more."""
    return replace(settings, stages=(replace(stage, steps=steps),), extension=replace(stage, steps=1))


def finished(path: Path) -> logbook.Run | None:
    """The run of a complete log, or None."""
    if not path.exists():
        return None
    (run,) = logbook.read_log(str(path)).runs
    return None if run.flaw() else run


def train(path: Path, script: str, options: list[str], alone: bool = True) -> None:
    """Runs a training script of this repository; its log is moved to `path` when it is complete. Exits if it fails.

    A run that is not alone has one thread.
    """
    log = ROOT / "logs" / f"{path.parent.name}-{path.name}"
    log.unlink(missing_ok=True)  # of a run that was cut off
    command = [sys.executable, script, "--run-id", log.stem, *options]
    environment = os.environ if alone else {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{path.stem}: {' '.join(command[1:])} failed: {''.join(run.stderr.strip().splitlines()[-1:])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(log, path)


def side_by_side(function: Callable, items: Iterable, text: str) -> Iterator:
    """What a function returns for each item, in order: as many at once as there are cores, under a progress bar.

    For runs whose time does not count: each on a thread of its own, they are sooner done than one after the other.
    """
    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from tqdm(pool.map(function, items), text, len(items), disable=None)


def step_time(path: Path) -> float:
    """Milliseconds of the quickest quarter of a run's steps, which what else the machine does disturbs least."""
    times = re.findall(r"^step:\d+/\d+ train_loss:\S+ train_time:(\d+)ms", path.read_text(), re.MULTILINE)
    return statistics.quantiles((int(b) - int(a) for a, b in itertools.pairwise(times)), n=4)[0]


def interval(values: list[float], form: str) -> str:
    """Mean and, of more than one value, half the width of its 95 % interval by Student's t."""
    from scipy import stats

    mean, n = format(statistics.fmean(values), form), len(values)
    if n < 2:
        return mean
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return f"{mean} ± {format(half, form.lstrip('+'))}"


def put_section(readme: Path, section: str, text: str) -> None:
    """Puts a text between the two markers of a section of a README."""
    markers = re.compile(rf"(<!-- {section} -->\n)(.*?)(<!-- end of {section} -->)", re.DOTALL)
    old = readme.read_text(encoding="utf-8")
    readme.write_text(markers.sub(lambda match: match[1] + text + match[3], old), encoding="utf-8")
