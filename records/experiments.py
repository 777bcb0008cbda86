"""Which runs are of one experiment: made by the same script, with the same settings but for the seed."""

import difflib
import json
from collections import Counter
from pathlib import PurePath
from typing import NamedTuple

from command import UserError, report
from log_reader import Run, find_script, open_log
from rules import TARGET, TARGETS

# Settings that change neither what a run learns nor how long it takes.
IRRELEVANT = {
    "seed", "run_id", "val_every", "checkpoint_every", "checkpoint_last", "resume", "wandb",
    "hellaswag", "sample_tokens", "fetch",  # of the baseline
    "target",  # of the optimizer track: what the log names, not where a run stops
}  # fmt: skip
SHOWN = 6  # settings that a line names


class Experiment(NamedTuple):
    """What runs must share. None: the log does not say."""

    source: str | None  # the script's SHA-256
    settings: str | None  # as JSON, without what is irrelevant
    steps: int

    @classmethod
    def of(cls, run: Run) -> "Experiment":
        settings = relevant_settings(run)
        steps = run.final_step if run.total_steps is None else run.total_steps
        return cls(run.header.source, settings and json.dumps(settings, sort_keys=True), steps)


def relevant_settings(run: Run) -> dict | None:
    """A run's settings by name, without what is irrelevant; None if its log has none."""
    if run.header.settings is None:
        return None
    settings = {name: value for name, value in run.header.settings.items() if name not in IRRELEVANT}
    for name in ("train_files", "val_files"):
        if isinstance(settings.get(name), str):
            settings[name] = PurePath(settings[name]).name  # the same data may lie elsewhere
    return flat(settings)


def flat(settings: dict) -> dict:
    """Settings by name, those inside others as model.dim or stages[0].lr."""
    found = {}

    def add(name, value):
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}" if name else key, item)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                add(f"{name}[{index}]", item)
        elif isinstance(value, float) and value.is_integer():
            found[name] = int(value)  # 15 in a table and 15.0 from the command line are one setting
        else:
            found[name] = value

    add("", settings)
    return found


def by_experiment(runs: list[Run]) -> list[list[Run]]:
    """The runs of each experiment, in the order of their first ones."""
    found = {}
    for run in runs:
        found.setdefault(Experiment.of(run), []).append(run)
    return list(found.values())


def differences(run: Run, other: Run) -> list[str]:
    """How the experiment of a run differs from another's, a phrase each."""
    found = []
    if run.header.source != other.header.source:
        found.append(script_difference(run, other))
    own, others = relevant_settings(run), relevant_settings(other)
    if own is not None and others is not None:
        both = [name for name in own if name in others]
        found += [f"{name} {plain(own[name])}, not {plain(others[name])}" for name in both if own[name] != others[name]]
        found += [f"{name} {plain(own[name])}, which the other has not" for name in own if name not in others]
        found += [f"no {name}, which the other has" for name in others if name not in own]
    elif (own is None) != (others is None):
        found.append("no settings in the log" if own is None else "settings in the log")
    own_steps, other_steps = Experiment.of(run).steps, Experiment.of(other).steps
    if own_steps != other_steps and not any(phrase.startswith("steps ") for phrase in found):
        found.append(f"steps {own_steps}, not {other_steps}")
    return found


def plain(value) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def script_difference(run: Run, other: Run) -> str:
    if run.header.source is None or other.header.source is None:
        return "no script in the log" if run.header.source is None else "a script in the log"
    own, others = script_lines(run), script_lines(other)
    opcodes = difflib.SequenceMatcher(None, others, own).get_opcodes()
    removed = sum(end - start for tag, start, end, _, _ in opcodes if tag != "equal")
    added = sum(end - start for tag, _, _, start, end in opcodes if tag != "equal")
    return f"another script (+{added:,} -{removed:,} lines)"


def script_lines(run: Run) -> list[str]:
    """The lines of the script that made a run."""
    with open_log(run.file) as file:
        try:
            return find_script(file, run.header.source).text.decode(errors="backslashreplace").splitlines()
        except UserError:
            return []


def difference_text(run: Run, other: Run) -> str:
    """`differences` in one line."""
    found = differences(run, other)
    more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)


def target_of(runs: list[Run]) -> float:
    """The loss that runs of one experiment are to reach, by their preset; 3.28 where the log has none."""
    return TARGETS.get(runs[0].preset, TARGET)


def report_oddities(runs: list[Run], what: str) -> None:
    """Says in what runs differ that are taken together, and in what they should differ and do not."""
    hardware = sorted({run.hardware or "unknown" for run in runs})
    if len(hardware) > 1:
        report(f"{what}: different hardware: {'; '.join(hardware)}")
    sizes = sorted({run.header.world_size or 0 for run in runs})
    if len(sizes) > 1:
        report(f"{what}: different world sizes: {', '.join(str(size or 'unknown') for size in sizes)}")
    dirty = sum((run.header.commit or "").endswith("dirty") for run in runs)
    if dirty:
        report(f"{what}: {dirty} of {len(runs)} with uncommitted changes in the working tree")


def repeated_seeds(runs: list[Run]) -> str:
    """Which seeds several of these runs have; empty where none. Chance has less part in them than the tests assume."""
    counts = Counter(run.seed for run in runs if run.seed is not None)
    again = [f"{seed} ({count} times)" for seed, count in counts.items() if count > 1]
    return f"repeated seeds, so not independent: {', '.join(again[:SHOWN])}" if again else ""


def report_repeated_seeds(runs: list[Run], what: str) -> None:
    """Says where several runs of an experiment have one seed."""
    for same in by_experiment(runs):
        if again := repeated_seeds(same):
            report(f"{what}: {again}")
