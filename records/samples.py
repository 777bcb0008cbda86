"""The statistics of sets of runs."""

import math
import statistics
from dataclasses import dataclass

from command import UserError, report
from log_reader import Run, read_logs
from rules import SIGNIFICANCE


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
