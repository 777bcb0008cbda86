"""The laptop track: from the tuned GPT-2 baseline to the recipe, on the embedded corpus and any CPU.

    python records/tiny/track.py grid       the baseline's grid of learning rate and batch, on shortened runs
    python records/tiny/track.py search     the fewest steps with which each record reaches the target, one seed
    python records/tiny/track.py runs       all records, interleaved, with several seeds; the table and the plot

The target is the loss that the tuned baseline reaches in BASELINE_SECONDS of training, and MARGIN, rounded up to 0.01.
All three are resumable: a run whose log is complete is not run again. Logs go to records/tiny/, tables into its README.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # where command.py lies
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where runs.py lies

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import math
from dataclasses import dataclass

from tqdm import tqdm

import logbook
import train_gpt
from runs import ROOT, finished, interval, origin, put_section, side_by_side, step_time, train

OUT = ROOT / "records" / "tiny"
README, PRESET = OUT / "README.md", OUT / "_preset" / "run.txt"
DATE = "2026-11-21"  # of the records, in their folders' names
BASELINE = "records/baseline/train_gpt2.py"
BASELINE_SECONDS, GRID_SECONDS = 480, 100
RATES = (6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
BATCHES = (512, 1024, 2048)  # tokens a step
MARGIN = 0.04  # nats between what seed 1 reaches and the target, so that the mean of other seeds lies clearly below it
TOLERANCE = 0.02  # nats by which a record may fall below what it is to reach: some 5 % of its steps
SLOPE = -0.5  # nats by which the loss falls when the steps grow e times, to begin with
CONTEXT = 256
TECHNIQUES = [f"--{name.replace('_', '-')}" for name in (
    "smear", "bigram", "value_embeds", "skip", "mudd", "single_input",
    "yarn", "multi_token", "prefix_tokens", "length_schedule", "extension_windows", "long_validation",
    "paired_heads", "narrow_qk", "key_offset", "xsa", "attention_gate", "head_pairs", "gates", "dc",
)]  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One step of the track's history: a script and its options, but for the number of steps and the seed."""

    name: str
    idea: str
    script: str
    options: tuple[str, ...]

    def tuning(self, what: str) -> Path:
        """A log that does not count as a run of the record."""
        return OUT / "_tuning" / self.name / f"{what}.txt"

    def run(self, seed: int) -> Path:
        return OUT / f"{DATE}_{self.name}" / f"run_{seed}.txt"


def recipe(name: str, idea: str, without: list[str], *options: str) -> Record:
    off = [word for technique in without for word in (technique, "false")]
    return Record(name, idea, "train_gpt.py", ("--preset", "tiny", *off, *options))


def baseline(rate: float, batch: int) -> Record:
    options = ("--tiny", "--context", str(CONTEXT), "--sample-tokens", "0")
    name = f"grid/lr{rate:g}_batch{batch}"
    return Record(name, "GPT-2, AdamW, tuned", BASELINE, (*options, "--lr", f"{rate:g}", "--batch-tokens", str(batch)))


def history(best: Record) -> list[Record]:
    """The track's records, oldest first, after the baseline with its best learning rate and batch."""
    return [
        Record("0_baseline", best.idea, best.script, best.options),
        recipe("1_modern", "rotary, QK norm, ReLU^2, softcap, whole documents", TECHNIQUES, "--muon", "false"),
        recipe("2_normuon", "NorMuon for the matrices", TECHNIQUES),
        recipe("3_embeddings", "smear, bigram and value embeddings, skips, MUDD", TECHNIQUES[6:]),
        recipe("4_schedules", "schedules of lengths, windows and targets, with YaRN", TECHNIQUES[12:]),
        recipe("5_recipe", "paired heads, key offset, XSA, gates", []),
    ]  # fmt: skip


def run(record: Record, path: Path, steps: int, seed: int = 1, alone: bool = True, val_every: int = 0):
    """The run of a record with so many steps, from its log if that is there."""
    if not (done := finished(path)):
        numbers = {"steps": steps, "seed": seed, "val-every": val_every or steps}
        options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        train(path, record.script, [*record.options, *options], alone)
        done = finished(path)
    return done


def steps_for(record: Record, seconds: float) -> int:
    """How many steps a record takes in so many seconds of training, from a short run."""
    probe = record.tuning("probe")
    run(record, probe, steps=24)
    return math.ceil(seconds * 1000 / step_time(probe))


def grid() -> Record:
    """Trains the baseline at every point; writes the table; returns the best point, which is not on the grid's edge."""
    points = [(rate, batch) for batch in BATCHES for rate in RATES]
    # The speed depends on the batch alone.
    steps = {batch: steps_for(baseline(RATES[0], batch), GRID_SECONDS) for batch in BATCHES}

    def loss(point: tuple[float, int]) -> float:
        record = baseline(*point)
        return run(record, record.tuning("run"), steps[point[1]], alone=False).val_loss

    losses: dict[tuple[float, int], float] = {}
    for point, found in zip(points, side_by_side(loss, points, "grid")):
        losses[point] = found
        text = grid_table(losses)
        put_section(README, "grid", text)
    best = min(losses, key=losses.get)
    edges = [best[0] in (RATES[0], RATES[-1]), best[1] in (BATCHES[0], BATCHES[-1])]
    if any(edges):
        raise command.UserError(f"the best point, {best}, lies on the grid's edge: widen RATES or BATCHES")
    return baseline(*best)


def grid_table(losses: dict[tuple[float, int], float]) -> str:
    best = min(losses, key=losses.get)
    rows = [
        "| learning rate | " + " | ".join(f"{batch:,} tokens" for batch in BATCHES) + " |",
        "|---" * (len(BATCHES) + 1) + "|",
    ]
    for rate in RATES:
        cells = (f"{losses[rate, batch]:.4f}" if (rate, batch) in losses else "" for batch in BATCHES)
        marked = (f"**{cell}**" if (rate, batch) == best else cell for cell, batch in zip(cells, BATCHES))
        rows.append(f"| {rate:g} | " + " | ".join(marked) + " |")
    return "\n".join(rows) + "\n"


def fewest_steps(record: Record, aim: float, steps: int, limit: int) -> int:
    """The steps after which a record's loss is at most `aim`, and by less than TOLERANCE, with seed 1.

    Begins with a guess. The loss is taken as linear in the logarithm of the steps, through the two closest runs.
    """
    losses = {}
    while True:
        losses[steps] = run(record, record.tuning(f"search_{steps}"), steps, alone=False).val_loss
        if aim - TOLERANCE <= losses[steps] <= aim:
            return steps
        near, other = (sorted(losses, key=lambda n: abs(losses[n] - aim)) + [None])[:2]
        slope = (losses[near] - losses[other]) / math.log(near / other) if other else SLOPE
        distance = (losses[near] - (aim - TOLERANCE / 2)) / min(slope, SLOPE / 4)
        steps = min(max(math.ceil(near * math.exp(-distance)), near // 3, 8), 3 * near, limit)
        if steps in losses:
            reaching = [n for n, loss in losses.items() if loss <= aim]
            if not reaching:
                raise command.UserError(f"{record.name}: {losses} nats, not {aim:.2f}")
            return min(reaching)


def search(records: list[Record]) -> tuple[float, dict[str, int]]:
    """The target, and each record's fewest steps to it."""
    limits = {record.name: steps_for(record, BASELINE_SECONDS) for record in records}
    first, *others = records
    count = limits[first.name]
    loss = run(first, first.tuning(f"search_{count}"), count, alone=False).val_loss
    target = math.ceil(100 * (loss + MARGIN)) / 100

    def found(numbered: tuple[int, Record]) -> int:
        number, record = numbered
        limit = limits[record.name]
        return fewest_steps(record, target - MARGIN, limit // (number * (number + 1)), limit)

    counts = side_by_side(found, enumerate(others, 1), "search")
    return target, {first.name: count, **dict(zip([each.name for each in others], counts))}


def runs(records: list[Record], target: float, steps: dict[str, int], seeds: int) -> None:
    """Runs every record with every seed, one after the other in turn, and the preset; writes the table.

    The first runs of the first and the last record are validated on the way, too: these are drawn.
    """
    drawn = [records[0].run(1), records[-1].run(1)]
    for seed in tqdm(range(1, seeds + 1), "seeds", disable=None):
        for record in records:
            path, count = record.run(seed), steps[record.name]
            run(record, path, count, seed, val_every=count // 8 if path in drawn else count)
        put_section(README, "records", table(records, target, seed))
    settings, _ = train_gpt.parse_arguments(["--preset", "tiny"])
    run(recipe("preset", "", []), PRESET, settings.total_steps, val_every=25)


def tokens_of(path: Path) -> int:
    """The training tokens of a run, from its log's settings."""
    settings = origin(path).settings
    if "stages" not in settings:
        return settings["steps"] * settings["batch_tokens"]
    stages = (*settings["stages"], settings["extension"])
    return sum(stage["steps"] * stage["batch_tokens"] for stage in stages)


def table(records: list[Record], target: float, seeds: int) -> str:
    """The Markdown table of the records' runs with the seeds 1, 2, …; ratios of times are those of a seed's runs."""
    rows = [
        f"Target: {target:.2f} nats per byte. Runs of each record: {seeds}. p: that its mean is higher.\n",
        "| record | what is new | steps | loss | p | seconds | times sooner | tokens, M | times fewer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base_times = base_tokens = None
    for record in records:
        paths = [record.run(seed) for seed in range(1, seeds + 1)]
        done = [finished(path) for path in paths]
        times = [each.train_time_ms / 1000 for each in done]
        tokens = tokens_of(paths[0]) / 1e6
        base_times, base_tokens = base_times or times, base_tokens or tokens
        losses = [each.val_loss for each in done]
        p = logbook.shown_p(logbook.p_at_most(logbook.Sample.of(losses), target))
        sooner = [base / mine for base, mine in zip(base_times, times)]
        link = f"[{record.name}]({record.run(1).parent.name})"
        rows.append(
            f"| {link} | {record.idea} | {done[0].final_step:,} | {interval(losses, '.4f')} | {p} | "
            f"{interval(times, ',.1f')} | {interval(sooner, '.2f')} | {tokens:.2f} | {base_tokens / tokens:.2f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("grid", "search", "runs"))
    parser.add_argument("--seeds", type=int, default=5, help="runs of each record (default: 5)")
    arguments = parser.parse_args()
    records = history(grid())
    if arguments.what == "grid":
        return
    target, steps = search(records)
    print(f"target {target:.2f}; steps: {steps}")
    if arguments.what == "runs":
        runs(records, target, steps, arguments.seeds)


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
