"""Draws the losses of runs against steps and against time."""

import io
import math
import os
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from command import UserError, missing, report
from experiments import Experiment, by_experiment, difference_text, differences, target_of
from log_reader import Run, read_logs
from printing import write_file

# Black first, then hues that differ in lightness too; every curve also has a line style and a marker of its own.
COLORS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
LINES = ["-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<"]
UNITS = [("s", 1e3, 600e3), ("min", 60e3, 4 * 3600e3), ("h", 3600e3, math.inf)]  # name, ms, up to how many ms
LABEL = 40  # characters of a label that say in what an experiment differs
LOG_SCALE_FROM = 8  # ends that are this many times apart need a logarithmic axis


class Point(NamedTuple):
    """The runs of a curve that were validated at one step."""

    step: int
    losses: list[float]
    times_ms: list[float]


class Curve:
    """Runs of one experiment that ended at the same step. Those that were not validated at a step are not in its point.

    Step 0 has none: what the untrained model's loss is says nothing.
    """

    def __init__(self, label: str, runs: list[Run]):
        self.label = label
        self.runs = runs
        found = {}
        for run in runs:
            for step, loss, time in zip(run.steps, run.losses, run.times_ms):
                if step > 0:
                    point = found.setdefault(step, Point(step, [], []))
                    point.losses.append(loss)
                    point.times_ms.append(time)
        self.points = [found[step] for step in sorted(found)]

    def steps(self) -> list[int]:
        return [point.step for point in self.points]

    def losses(self) -> list[float]:
        return [statistics.fmean(point.losses) for point in self.points]

    def times_ms(self) -> list[float]:
        return [statistics.fmean(point.times_ms) for point in self.points]

    def early_loss(self) -> float:
        """The loss at the first validation after a tenth of the run: what lies above it would dwarf the rest.

        Where there is but one, the worst of the runs.
        """
        if len(self.points) == 1:
            return max(filter(math.isfinite, self.points[0].losses), default=-math.inf)
        points = list(zip(self.steps(), self.losses(), strict=True))
        return next((loss for step, loss in points if 10 * step >= points[-1][0] and math.isfinite(loss)), -math.inf)


def curves(runs: list[Run], name: str | None = None) -> list[Curve]:
    """Puts the runs of an experiment together that ended at the same step: those of a folder, or, with a name, all.

    The folder or the name is the label; where that is several experiments', what sets them apart is added. A run that
    goes with no other is a curve of its own, labelled by its file if that lies in logs/, or beside others' files.
    """
    sets = {}
    for run in runs:
        group = name or Path(run.file).resolve().parent.name
        sets.setdefault((group, Experiment.of(run), run.steps[-1]), []).append(run)
    found = []
    for (group, _, end), members in sets.items():
        first, label = members[0], group
        stem = Path(first.file).stem
        neighbours = [others for (other, _, _), others in sets.items() if other == group]
        if len(members) == 1 and (name is None or len(sets) > 1):
            if group == "logs" or len(neighbours) > 1:  # elsewhere it may be a record's run_1
                label = stem + ("" if first.alone else f" run {first.number}")
        elif difference := label_difference(members, neighbours):
            label += f", {difference}"
        if any(curve.label == label for curve in found):
            label += f", {end:,} steps"
        found.append(Curve(label, members))
    return found


def label_difference(runs: list[Run], neighbours: list[list[Run]]) -> str:
    """What tells an experiment's runs from the others of their folder: how their files' names begin, or a setting."""
    beginnings = [os.path.commonprefix([Path(run.file).stem for run in others]) for others in neighbours]
    beginnings = [beginning.rstrip("-_. 0123456789") for beginning in beginnings]
    if len(neighbours) > 1 and all(beginnings) and len(set(beginnings)) == len(beginnings):
        return beginnings[neighbours.index(runs)]
    if not (found := differences(runs[0], neighbours[0][0])):
        return ""
    text = found[0].partition(", not ")[0].partition(" (")[0]
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


def plot(args) -> int:
    """Draws loss against steps and against time."""
    matplotlib = load_matplotlib()
    kind = picture_kind(args.out)
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
        runs = [run for run in runs if run not in empty]
        if name:
            first, *others = by_experiment(runs) or [[]]
            for group in others:
                report(f"{name}: a curve an experiment: {group[0].name}: {difference_text(group[0], first[0])}")
        drawn += curves(runs, name)
    if not drawn:
        raise UserError("no validation losses to draw in these logs")
    targets = {target_of(curve.runs) for curve in drawn} if args.target is None else {args.target}
    save(matplotlib, lambda: draw(matplotlib, drawn, sorted(targets)), args.out, kind)
    return 0 if whole else 2


def picture_kind(out: Path) -> str:
    kind = out.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"{out}: the name must end in .png, .svg or .pdf")
    return kind


def save(matplotlib, make: Callable, out: Path, kind: str) -> None:
    """Writes the figure that `make` draws."""
    image = io.BytesIO()
    settings = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        make().savefig(image, format=kind, dpi=200)
    write_file(out, image.getvalue())


def load_matplotlib():
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.dates
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise missing("matplotlib", "records/requirements.txt") from None
    return matplotlib


def draw(matplotlib, drawn: list[Curve], targets: list[float]):
    """The plot: two panels with one loss axis; where runs repeat, an inset shows how each of them ended."""
    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    longest = max((time for curve in drawn for time in curve.times_ms() if math.isfinite(time)), default=0)
    unit, unit_ms, _ = next(unit for unit in UNITS if longest < unit[2])
    ends = [loss for curve in drawn for point in curve.points for loss in point.losses if math.isfinite(loss)]
    bottom = min(ends)
    top = max(bottom, *(curve.early_loss() for curve in drawn))
    # A target just missed, or met by all, is in the plot. One that is far from all losses is that of another task.
    near = 0.5 * (top - bottom)
    close = [target for target in targets if bottom - near < target < top + near]
    bottom, top = min([bottom, *close]), max([top, *close])
    pad = 0.06 * (top - bottom) or 0.1
    visible = {by_step: [], by_time: []}
    for index, curve in enumerate(drawn):
        steps, times, mean = curve.steps(), curve.times_ms(), curve.losses()
        low, high = ([end(point.losses) for point in curve.points] for end in (min, max))
        every = max(1, len(mean) // 10)
        style = curve_style(index) | {"linewidth": 1.6, "markevery": ((len(mean) - 1) % every, every)}
        if len(curve.points) == 1:  # no line and no band: a dot for each run
            (point,) = curve.points
            mean = low = high = point.losses
            steps, times = [point.step] * len(mean), point.times_ms
            style |= {"linestyle": "none", "markevery": None}
        for axes, x in (by_step, steps), (by_time, [time / unit_ms for time in times]):
            axes.plot(x, mean, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.3, linewidth=0)
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
        for target in targets:
            if bottom - pad < target < top + pad:
                draw_target(axes, target)
    draw_legend(matplotlib, figure, by_step.get_lines()[: len(drawn)], [legend_text(curve) for curve in drawn])
    if any(len(curve.runs) > 1 for curve in drawn) and visible[by_time] and corner_is_free(by_time):
        draw_ends(by_time.inset_axes([0.6, 0.5, 0.39, 0.42]), drawn, targets, unit, unit_ms)
    return figure


def draw_legend(matplotlib, figure, handles: list, labels: list[str]) -> None:
    """Above the panels, in as many columns as fit; names too long for one are broken, and the figure grows with it."""
    renderer = matplotlib.backends.backend_agg.FigureCanvasAgg(figure).get_renderer()
    style = {"loc": "outside upper left", "frameon": False, "handlelength": 4}
    for columns, width in [(columns, None) for columns in range(min(4, len(labels)), 0, -1)] + [(1, 120), (1, 90)]:
        shown = [label if width is None else "\n".join(textwrap.wrap(label, width)) for label in labels]
        legend = figure.legend(handles, shown, ncols=columns, **style)
        size = legend.get_window_extent(renderer)
        if size.width < 0.98 * figure.bbox.width or (columns, width) == (1, 90):
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0, size.height / figure.dpi - 0.8))


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


def draw_ends(axes, drawn: list[Curve], targets: list[float], unit: str, unit_ms: float) -> None:
    """A dot for the time and loss at which each run ended: the spread, which the curves are too steep to show."""
    for index, curve in enumerate(drawn):
        times = [time / unit_ms for time in curve.points[-1].times_ms]
        axes.plot(times, curve.points[-1].losses, **curve_style(index) | {"linestyle": "none", "alpha": 0.8})
    axes.margins(0.1)
    low, high = axes.get_ylim()
    for target in targets:
        if low - (high - low) < target < high + (high - low):
            axes.axhline(target, color="0.3", linestyle="--", linewidth=1, zorder=1)
    axes.set_title(f"Each run's end ({unit}, nats)", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(nbins=5)
    axes.grid(color="0.93")


def draw_progress(matplotlib, days: list, seconds: list[float], target: float):
    """Record time against date: a line that falls at each record, and that goes on to the newest.

    Where all came within two months, it is against the record's number.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    dated = (days[-1] - days[0]).days >= 60
    places = days if dated else range(1, len(days) + 1)
    unit, unit_ms, _ = next(unit for unit in UNITS if 1000 * max(seconds) < unit[2])
    times = [1000 * each / unit_ms for each in seconds]
    axes.step(places, times, where="post", color=COLORS[1], linewidth=1.2)
    axes.plot(places, times, "o", color=COLORS[1], markersize=4, markeredgecolor="white", markeredgewidth=0.5)
    for end, align, beside in ((0, "left", (0, 5)), (-1, "right", (4, -14))):
        label = f"{times[end]:,.3g}"
        axes.annotate(label, (places[end], times[end]), xytext=beside, textcoords="offset points", ha=align)
    axes.margins(y=0.1)
    if max(times) > LOG_SCALE_FROM * min(times):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.set_ylim(0, max(times) * 1.08)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:,.10g}"))
    if dated:
        axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%Y-%m"))
    else:
        axes.set_xticks(places)
    axes.set_ylabel(f"Training time to {target:g} nats per token ({unit})")
    axes.set_xlabel("Date of the record" if dated else f"Record, from {days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}")
    axes.grid(color="0.93")
    return figure
