"""What each technique is worth: trains `tiny` with each one switched off, and writes the table of differences.

    python bench/ablate.py [--steps 80] [--seeds 3] [--out records/ablation]

Each variant is one flag of train_gpt.py. Runs that differ only in it share their seeds, so the table gives the mean of
the paired differences with a 95 % interval of Student's t. The time of a step is that of the quickest quarter of the
steps of the quickest run. A run whose log is complete is not run again: stop it and start it again as you like, then
`--table` alone rewrites the table from the logs.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from pathlib import Path

from runs import ROOT, finished, interval, step_time, train
from tqdm import tqdm

import train_gpt

TECHNIQUES = {
    name: f.metadata["help"]
    for owner in (train_gpt.ModelConfig, train_gpt.Settings)
    for name, f in ((f.name, f) for f in dataclasses.fields(owner))
    if f.type is bool and name not in ("compile", "muon", "fp8", "sparse_exchange", "checkpoint_last")
}


def variants() -> dict[str, tuple[str, list[str]]]:
    """By name: what a variant lacks, in words, and the options that make it."""

    def off(name: str) -> list[str]:
        return [f"--{name.replace('_', '-')}", "false"]

    each = {f"no_{name}": (text.split(" [")[0], off(name)) for name, text in TECHNIQUES.items()}
    everything = [option for name in TECHNIQUES for option in off(name)]
    return {
        "all": ("nothing: the preset", []),
        **each,
        "plain": ("every technique above", everything),
        "adam": ("NorMuon: Adam in its place", off("muon")),
    }


def table(out: Path, seeds: int) -> str:
    """The Markdown table of all variants that have runs."""
    lines = [
        "| without | option | runs | loss | difference of loss | time a step, ratio |",
        "|---|---|---|---|---|---|",
    ]
    base = {seed: finished(out / f"all-{seed}.txt") for seed in range(1, seeds + 1)}
    full = min((step_time(out / f"all-{seed}.txt") for seed, run in base.items() if run), default=math.nan)
    for name, (text, options) in variants().items():
        paths = {seed: out / f"{name}-{seed}.txt" for seed, run in base.items() if run}
        pairs = [(run, base[seed]) for seed, path in paths.items() if (run := finished(path))]
        if not pairs:
            continue
        loss = statistics.fmean(run.val_loss for run, _ in pairs)
        difference = "" if name == "all" else interval([run.val_loss - other.val_loss for run, other in pairs], "+.4f")
        ratio = min(step_time(path) for path in paths.values() if finished(path)) / full
        option = " ".join(options) if len(options) <= 2 else "all of these"
        lines.append(f"| {text} | `{option}` | {len(pairs)} | {loss:.4f} | {difference} | {ratio:.2f} |")
    return "\n".join(lines).replace("| `` |", "| |") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="steps of each run (default: 80)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "records" / "ablation", help="where the logs and table go")
    parser.add_argument("--table", action="store_true", help="only write the table, from the logs there are")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Seeds outside, so that variants are compared under the same weather, and a cut-off run has whole rows.
    seeds = range(1, arguments.seeds + 1)
    runs = [(seed, name, options) for seed in seeds for name, (_, options) in variants().items()]
    for seed, name, options in tqdm([] if arguments.table else runs, "runs"):
        path = out / f"{name}-{seed}.txt"
        if not finished(path):
            fixed = ["--preset", "tiny", "--steps", str(arguments.steps), "--seed", str(seed), "--val-every", "1000"]
            train(path, "train_gpt.py", [*fixed, *options])
            (out / "table.md").write_text(table(out, arguments.seeds))
    (out / "table.md").write_text(table(out, arguments.seeds))
    print(table(out, arguments.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
