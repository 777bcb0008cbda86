"""The optimizer track at laptop scale: tunes each optimizer over its grid, then finds its fewest steps to a target.

    python records/optimizer_track/tune.py grid                          every point of every grid, at equal steps
    python records/optimizer_track/tune.py runs --target 1.5 --seeds 5   fewest steps of each at its best point, and p

Both are resumable: a run whose log, in records/optimizer_track/laptop/, is complete is not run again. The tables in
records/optimizer_track/README.md are rewritten from the logs after each run. Points are tuned and steps are found with
seed 0; the runs that count have the seeds 1, 2, ...
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # where command.py lies
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where runs.py lies

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import itertools

import logbook
from runs import ROOT, finished, put_section, side_by_side, train

SCRIPT = "records/optimizer_track/train.py"
OUT = ROOT / "records" / "optimizer_track" / "laptop"
README = OUT.parent / "README.md"
GRIDS = {  # an optimizer's learning rate and momentum
    "adamw": {"lr": (0.001, 0.002, 0.004), "beta1": (0.0, 0.3, 0.6, 0.8)},
    "muon": {"lr": (0.04, 0.08, 0.16), "momentum": (0.4, 0.6, 0.7, 0.8)},
    "normuon": {"lr": (0.04, 0.08, 0.16), "momentum": (0.6, 0.7, 0.8, 0.9)},
    "soap": {"lr": (0.001, 0.002, 0.004, 0.008), "beta1": (0.5, 0.7, 0.9)},
    "soap_muon": {"lr": (0.04, 0.08, 0.16), "momentum": (0.4, 0.6, 0.7, 0.8)},
    "ema_nesterov": {"lr": (0.04, 0.08, 0.16), "ahead": (0.15, 0.3, 0.6)},
}
LADDER = tuple(range(60, 401, 10))  # numbers of steps


def log_path(name: str, point: dict[str, float], steps: int, seed: int) -> Path:
    settings = "_".join(f"{key}-{value:g}" for key, value in point.items())
    return OUT / f"{name}_{settings}_steps-{steps}_seed-{seed}.txt"


def run(name: str, point: dict[str, float], steps: int, seed: int) -> logbook.Run:
    """The run of an optimizer with these hyperparameters, from its log if that is there."""
    path = log_path(name, point, steps, seed)
    if not finished(path):
        options = [word for key, value in point.items() for word in (f"--{key.replace('_', '-')}", f"{value:g}")]
        fixed = ["--laptop", "--optimizer", name, "--steps", str(steps), "--seed", str(seed), "--val-every", "100000"]
        train(path, SCRIPT, [*fixed, *options], alone=False)
    return finished(path)


def points(name: str) -> list[dict[str, float]]:
    return [dict(zip(GRIDS[name], values)) for values in itertools.product(*GRIDS[name].values())]


def grid_losses(name: str, steps: int) -> dict[tuple[float, ...], float]:
    """The loss at each point of an optimizer's grid that has a complete log."""
    paths = {tuple(point.values()): log_path(name, point, steps, 0) for point in points(name)}
    return {values: done.val_loss for values, path in paths.items() if (done := finished(path))}


def best_point(name: str, steps: int) -> dict[str, float]:
    losses = grid_losses(name, steps)
    return dict(zip(GRIDS[name], min(losses, key=losses.get)))


def shown_point(point: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in point.items())


def grid_table(name: str, steps: int) -> str:
    """The losses over an optimizer's grid as a Markdown table, the best in bold, and whether it is on the edge."""
    (first, rates), (second, columns) = GRIDS[name].items()
    losses, best = grid_losses(name, steps), best_point(name, steps)
    lines = [f"**{name}**, {steps} steps", "", f"| {first} | " + " | ".join(f"{second} {c:g}" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for rate in rates:
        cells = (f"{losses[rate, c]:.4f}" if (rate, c) in losses else "-" for c in columns)
        marked = (f"**{cell}**" if (rate, c) == tuple(best.values()) else cell for c, cell in zip(columns, cells))
        lines.append(f"| {rate:g} | " + " | ".join(marked) + " |")
    edges = [key for key, values in GRIDS[name].items() if best[key] in (values[0], values[-1])]
    where = f"on the grid's edge in {' and '.join(edges)}" if edges else "inside the grid"
    left = f"; {len(points(name)) - len(losses)} points to come" if len(losses) < len(points(name)) else ""
    return "\n".join([*lines, "", f"Best: {shown_point(best)}, {where}{left}.", ""])


def write_grids(steps: int) -> None:
    """Puts the grids into the README, as far as there are logs."""
    put_section(README, "grid", "\n".join(grid_table(each, steps) for each in GRIDS if grid_losses(each, steps)))


def grid(steps: int) -> None:
    """Runs every point of every grid; writes the tables."""
    everything = [(name, point, steps, 0) for name in GRIDS for point in points(name)]
    for _ in side_by_side(lambda each: run(*each), everything, "grid"):
        write_grids(steps)


def search(name: str, point: dict[str, float], target: float) -> int:
    """The place on the ladder of the fewest steps that reach the target with seed 0, by bisection; its length: none."""
    low, high = -1, len(LADDER)  # the one below fails, the other reaches it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if run(name, point, LADDER[middle], 0).val_loss <= target else (middle, high)
    return high


def result(name: str, point: dict[str, float], target: float, start: int, seeds: int) -> str:
    """Climbs the ladder from a place on it until the mean of the other seeds reaches the target, with p < 0.01."""
    for steps in LADDER[start:]:
        each = [(name, point, steps, seed) for seed in range(1, seeds + 1)]
        done = side_by_side(lambda which: run(*which), each, f"{name}, {steps} steps")
        sample = logbook.loss_sample(list(done))
        p = logbook.p_at_most(sample, target)
        if p is not None and p < logbook.SIGNIFICANCE:
            spread = f"{sample.n} | {sample.mean:.4f} | {sample.sd:.4f} | {logbook.shown_p(p)}"
            return f"| {name} | {shown_point(point)} | {steps} | {spread} |"
    return f"| {name} | {shown_point(point)} | more than {LADDER[-1]} | - | - | - | - |"


def runs(grid_steps: int, target: float, seeds: int) -> None:
    """Finds each optimizer's steps at its best point of the grid; writes the table."""
    lines = [
        f"Target: {target:g} nats per byte. p: that the mean loss is not below it.",
        "",
        "| optimizer | hyperparameters | steps | runs | mean loss | standard deviation | p |",
        "|---|---|---|---|---|---|---|",
    ]
    best = {name: best_point(name, grid_steps) for name in GRIDS}
    starts = list(side_by_side(lambda name: search(name, best[name], target), GRIDS, "search"))
    for name, start in zip(GRIDS, starts):
        lines.append(result(name, best[name], target, start, seeds))
        put_section(README, "runs", "\n".join(lines) + "\n")


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("grid", "runs"), help="runs: what is missing of the grids first")
    parser.add_argument("--grid-steps", type=int, default=200, help="steps of each run of the grids (default: 200)")
    parser.add_argument("--target", type=float, help="loss to reach, in nats per byte")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each optimizer (default: 5)")
    arguments = parser.parse_args()
    if arguments.what == "runs" and (arguments.target is None or arguments.seeds < 2):
        parser.error("runs needs --target, and at least two --seeds")
    grid(arguments.grid_steps)
    if arguments.what == "runs":
        runs(arguments.grid_steps, arguments.target, arguments.seeds)


if __name__ == "__main__":
    command.run(main, outlives_reader=True)
