"""What each technique is worth: trains a preset with each one switched off, or on; a table of differences.

    python records/ablation/ablate.py [--preset mini] [--steps 80] [--seeds 3] [--out FOLDER]
    python records/ablation/ablate.py --only no_mudd --only no_xsa     these alone, and the preset
    python records/ablation/ablate.py --table                          from the logs there are

Each variant is the preset but for one technique: without it, or with one that the preset leaves
out. Runs that differ only in it share their seeds, so the table gives the mean of the paired
differences with a 95 % interval of Student's t. The loss is that of the first 131,072 validation
tokens, which are the same for all. Runs of different sources, or whose settings differ in more than
that, are not compared but named. As many run at once as there are cores, a thread each; the time of
a step is that of the quickest quarter of the steps of the quickest run. A run whose log is complete
is not run again: stop it and start it again as you like.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # where command.py lies
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where runs.py lies

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import dataclasses
import difflib
import hashlib
import statistics
from typing import NamedTuple

import logbook
import train_gpt
from runs import ROOT, Origin, finished, interval, origin, side_by_side, step_time, train

SCRIPT = "train_gpt.py"
OUT = ROOT / "records" / "ablation"  # of preset mini; others have a folder in it
BASE = "all"
VALIDATION = ["--val-every", "1000000", "--val-tokens", "131072"]  # at the start and the end
NO_TECHNIQUES = ("compile", "kernels", "muon", "fp8", "sparse_exchange", "checkpoint_last")
TECHNIQUES = {
    f.name: f.metadata["help"]
    for owner in (train_gpt.ModelConfig, train_gpt.Settings)
    for f in dataclasses.fields(owner)
    if f.type is bool and f.name not in NO_TECHNIQUES
}
# Techniques that have nothing to do in a preset: whose windows do not grow there, whose bytes have no prefixes,
# which has no gates for DC to come from.
IDLE = {"mini": {"dc", "extension_windows", "long_validation", "prefix_tokens"}}
# What presets leave out, by the options that add it. Steps are those of the whole schedule, and shrink with it.
ADDED = {
    "gates": ("gates that small networks make", {"gates": True, "dc": False}),
    "dc": ("those gates, and dynamically composed heads", {"gates": True}),
    "multi_token": (TECHNIQUES["multi_token"], {"multi_token": True}),
    "narrow_qk": (TECHNIQUES["narrow_qk"], {"narrow_qk": True}),
    "six_polar_steps": ("six flatter steps of Polar Express", {"polar_steps": 6}),
    "rare_tables": ("embedding tables in every second Adam update", {"tables_every": 2}),
    "slow_momentum": ("a second, slower momentum", {"slow_momentum": 0.97}),
    "average": ("weights halfway to their mean at the end", {"average_steps": 60}),
}
# Switches that older sources carried out in the tables of stages, before these were logged.
IN_TABLES = {"length_schedule", "multi_token", "extension_windows"}


class Variant(NamedTuple):
    change: str  # in words
    settings: dict[str, object]  # that it changes

    @property
    def options(self) -> list[str]:
        words = []
        for name, value in self.settings.items():
            words += [f"--{name.replace('_', '-')}", str(value).lower()]
        return words

    @property
    def own(self) -> set[str]:
        """The names of the settings in which its runs may differ from the base's."""
        names = {"seed", "run_id", *self.settings}
        if IN_TABLES & names:
            names |= {"stages", "extension"}
        return names

    def differs(self, preset: train_gpt.Settings) -> bool:
        """Whether it is another experiment than the preset; the preset's own variant is none."""
        values = {**vars(preset.model), **vars(preset)}
        changed = {name for name, value in self.settings.items() if values[name] != value}
        return bool(changed - IDLE.get(preset.preset, set()))


def variants() -> dict[str, Variant]:
    """All variants by name, of which the first, BASE, is the preset."""
    without, added = {}, {}
    for name, text in TECHNIQUES.items():
        without[f"no_{name}"] = Variant(f"without {text.split(' [')[0]}", {name: False})
    for name, (text, settings) in ADDED.items():
        added[f"with_{name}"] = Variant(f"with {text.split(' [')[0]}", settings)
    return {
        BASE: Variant("none: the preset", {}),
        **without,
        "plain": Variant("without every technique above", dict.fromkeys(TECHNIQUES, False)),
        "adam": Variant("Adam in NorMuon's place", {"muon": False}),
        **added,
    }


def choose(names: list[str]) -> dict[str, Variant]:
    """The base and the variants of these names, in the table's order; all where none is given."""
    known = variants()
    for name in names:
        if name not in known:
            (closest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise command.UserError(f"--only {name}: no such variant; the closest is {closest}")
    return {name: each for name, each in known.items() if not names or name in (BASE, *names)}


def log_path(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}.txt"


# ---- Are these runs of one experiment? -----------------------------------------------------------


Runs = dict[tuple[str, int], logbook.Run]  # by a variant's name and the seed, the base's first


def finished_runs(out: Path, chosen: dict[str, Variant], seeds: int) -> Runs:
    """The runs of these variants whose logs are complete."""
    runs = {}
    for name in chosen:
        for seed in range(1, seeds + 1):
            if run := finished(log_path(out, name, seed)):
                runs[name, seed] = run
    return runs


def differences(one: Origin, other: Origin, own: set[str]) -> list[str]:
    """The names of what two runs differ in: their source, and settings that both have."""
    names = ["source"] if one.source != other.source else []
    for name, value in one.settings.items():
        if name in other.settings.keys() - own - {"model"} and other.settings[name] != value:
            names.append(name)
    return names


def check_pairs(runs: Runs, chosen: dict[str, Variant]) -> None:
    """Raises UserError where two runs are not of one experiment.

    Each is held against the first: so any two agree, those of two variants and of two seeds.
    """
    first = next(iter(runs.values())).file
    for (name, _), run in runs.items():
        if names := differences(origin(Path(first)), origin(Path(run.file)), chosen[name].own):
            remedy = "take one of them away, or start anew with --out FOLDER"
            what = f"{first} and {run.file} are no pair, they differ in {', '.join(names)}"
            raise command.UserError(f"{what}: {remedy}")


def check_going_on(runs: Runs, preset: str, steps: int) -> None:
    """Raises UserError where a run there is not as those that are asked for."""
    source = hashlib.sha256((ROOT / SCRIPT).read_bytes()).hexdigest()
    asked = Origin(source, {"preset": preset, "steps": steps})
    for run in runs.values():
        if names := differences(asked, origin(Path(run.file)), set()):
            remedy = "start anew with --out FOLDER, or have the table of what is there with --table"
            what = f"{run.file} and a run of {SCRIPT} now would differ in {', '.join(names)}"
            raise command.UserError(f"{what}: {remedy}")


# ---- Runs and table ------------------------------------------------------------------------------


def table(out: Path, chosen: dict[str, Variant], seeds: int) -> str:
    """The Markdown table of the variants that have runs."""
    runs = finished_runs(out, chosen, seeds)
    base = {seed: run for (name, seed), run in runs.items() if name == BASE}
    if not base:
        remedy = "run this program without --table, or give another --out"
        raise command.UserError(f"{out}: no complete log of the preset, {BASE}-1.txt: {remedy}")
    check_pairs(runs, chosen)
    lines = [
        "| change | option | runs | loss | difference of loss | time a step, ratio |",
        "|---|---|---|---|---|---|",
    ]
    base_time = quickest(base)
    for name, variant in chosen.items():
        own = {seed: runs[name, seed] for seed in base if (name, seed) in runs}
        if not own:
            continue
        loss = statistics.fmean(run.val_loss for run in own.values())
        difference = ""
        if name != BASE:
            pairs = [run.val_loss - base[seed].val_loss for seed, run in own.items()]
            difference = interval(pairs, "+.4f")
        option = "all of these"
        if len(variant.settings) <= 2:
            option = " ".join(variant.options)
        ratio = quickest(own) / base_time
        row = f"| {variant.change} | `{option}` | {len(own)} | {loss:.4f} | {difference} |"
        lines.append(row.replace("| `` |", "| |") + f" {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def quickest(runs: dict[int, logbook.Run]) -> float:
    """Milliseconds a step of the quickest of these runs."""
    return min(step_time(Path(run.file)) for run in runs.values())


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    count = command.between(1, 1_000_000)
    help = "the experiment, one of train_gpt.py's (default: mini)"
    parser.add_argument("--preset", choices=train_gpt.PRESETS, default="mini", help=help)
    parser.add_argument("--steps", type=count, default=80, help="of each run (default: 80)")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each variant (default: 3)")
    help = "this variant and the preset alone, and table.md stays as it is; may be given repeatedly"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=help)
    help = "of logs and table.md (default: records/ablation; a folder in it if not mini)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=help)
    parser.add_argument("--table", action="store_true", help="only the table, of what is there")
    arguments = parser.parse_args()
    preset, steps, seeds = arguments.preset, arguments.steps, arguments.seeds
    chosen = choose(arguments.only)
    out = OUT if preset == "mini" else OUT / preset
    if arguments.out:
        out = arguments.out.resolve()

    def write() -> str:
        """The table, which is also put into its file where it is of all variants."""
        text = table(out, chosen, seeds)
        if not arguments.only:
            (out / "table.md").write_text(text)
        return text

    if not arguments.table:
        check_going_on(finished_runs(out, chosen, seeds), preset, steps)
        # Seeds outside, so that variants are compared under the same weather, and a run of this
        # program that is cut off has whole rows.
        wanted = [BASE, *(name for name in chosen if chosen[name].differs(train_gpt.PRESETS[preset]))]
        runs = [(seed, name) for seed in range(1, seeds + 1) for name in wanted]

        def run(seed_and_name: tuple[int, str]) -> None:
            seed, name = seed_and_name
            path = log_path(out, name, seed)
            if not finished(path):
                fixed = ["--preset", preset, "--steps", str(steps), "--seed", str(seed)]
                options = [*fixed, *VALIDATION, *chosen[name].options]
                train(path, SCRIPT, options, alone=False)

        for _ in side_by_side(run, runs, "runs"):
            write()
    print(write())


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
