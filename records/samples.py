"""The statistics of sets of runs."""

import math
import statistics
from dataclasses import dataclass

from command import UserError, missing, report
from log_reader import Run, read_logs
from rules import OPTIMIZER_MARGIN, SIGNIFICANCE


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
        raise missing("scipy", "records/requirements.txt") from None
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
class Verdict:
    """Whether runs are a result at a target: by the one-sided t-test, or by the rule of the optimizer track."""

    target: float
    p: float | None
    significant: bool
    more_runs: float | None  # that would make it so if mean and sd stay; inf: never; None: cannot be said
    margin: float | None = None  # (target - mean) * sqrt(n), where that is the rule

    @classmethod
    def by_t_test(cls, loss: Sample, target: float) -> "Verdict":
        p, needed = p_at_most(loss, target), runs_needed(loss, target)
        if p is not None and p < SIGNIFICANCE:
            return cls(target, p, True, 0)
        return cls(target, p, False, needed and needed - loss.n)

    @classmethod
    def by_margin(cls, loss: Sample, target: float) -> "Verdict":
        below = target - loss.mean
        margin = below * math.sqrt(loss.n)
        # Losses have four digits: what is equal in them must be equal here.
        significant = margin >= OPTIMIZER_MARGIN - 1e-12
        needed = math.ceil((OPTIMIZER_MARGIN / below) ** 2 - 1e-9) if below > 1e-12 else math.inf
        return cls(target, p_at_most(loss, target), significant, 0 if significant else needed - loss.n, margin)


@dataclass(frozen=True)
class Difference:
    """A test of mean(a) - mean(b): 95 % interval and two-sided p, None where there is no spread."""

    test: str
    a: Sample
    b: Sample
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @classmethod
    def welch(cls, a: list[float], b: list[float]) -> "Difference":
        a, b = Sample.of(a), Sample.of(b)
        if a.sd is None or b.sd is None or not (a.sd or b.sd):
            return cls("Welch's t-test", a, b, a.mean - b.mean)
        variance_a, variance_b = a.sd**2 / a.n, b.sd**2 / b.n
        error = math.sqrt(variance_a + variance_b)
        freedom = error**4 / (variance_a**2 / (a.n - 1) + variance_b**2 / (b.n - 1))
        return cls("Welch's t-test", a, b, *interval_and_p(a.mean - b.mean, error, freedom))

    @classmethod
    def paired(cls, a: list[float], b: list[float]) -> "Difference":
        """Of values that belong together: a's first and b's first, and so on."""
        both = Sample.of([own - other for own, other in zip(a, b, strict=True)])
        test, a, b = "paired t-test", Sample.of(a), Sample.of(b)
        if not both.sd:
            return cls(test, a, b, both.mean)
        return cls(test, a, b, *interval_and_p(both.mean, both.sd / math.sqrt(both.n), both.n - 1))


def interval_and_p(mean: float, error: float, freedom: float) -> tuple[float, float, float, float]:
    """A mean with the ends of its 95 % interval and its two-sided p, by Student's t."""
    reach = float(student_t().stdtrit(freedom, 0.975)) * error
    return mean, mean - reach, mean + reach, 2 * float(student_t().stdtr(freedom, -abs(mean) / error))


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
    return finished, whole


def reached(run: Run, target: float) -> tuple[float, float] | None:
    """The steps and the time in ms after which a run's loss was first at most the target; None if it never was.

    Between two validations the loss is taken as a straight line, so neither is exact. NaN: no times.
    """
    before = None
    for now in zip(run.losses, run.steps, run.times_ms):
        loss, steps, time = now
        if loss <= target:
            if before is None or not math.isfinite(before[0]):
                return steps, time
            part = (before[0] - target) / (before[0] - loss)
            return before[1] + part * (steps - before[1]), before[2] + part * (time - before[2])
        before = now
    return None


def loss_sample(runs: list[Run]) -> Sample:
    return Sample.of([run.val_loss for run in runs])


def time_sample(runs: list[Run]) -> Sample | None:
    """Of the runs' training times in ms; None where no log has one."""
    times = [run.train_time_ms for run in runs if run.train_time_ms is not None]
    return Sample.of(times) if times else None


def pairs_by_seed(runs_a: list[Run], runs_b: list[Run]) -> list[tuple[Run, Run]]:
    """The runs with the same seed, if each side has the same seeds, and each once; else none."""
    by_seed_a, by_seed_b = ({run.seed: run for run in runs} for runs in (runs_a, runs_b))
    once = len(by_seed_a) == len(runs_a) and len(by_seed_b) == len(runs_b)
    if not once or by_seed_a.keys() != by_seed_b.keys() or None in by_seed_a or len(runs_a) < 2:
        return []
    return [(run, by_seed_b[seed]) for seed, run in by_seed_a.items()]


def difference(runs_a: list[Run], runs_b: list[Run], value: str) -> Difference | None:
    """Of the runs' `val_loss` or `train_time_ms`, in pairs where that can be; None where one side has none."""
    pairs = pairs_by_seed(runs_a, runs_b)
    a, b = ([getattr(run, value) for run in runs if getattr(run, value) is not None] for runs in (runs_a, runs_b))
    if pairs and len(pairs) == len(a) == len(b):
        return Difference.paired(*zip(*((getattr(own, value), getattr(other, value)) for own, other in pairs)))
    return Difference.welch(a, b) if a and b else None
