"""Attempt a record: check the script, train it and the last record in turn, and say whether it beats that one."""

import datetime
import re
import sys
import tempfile
from pathlib import Path

import logbook
import runs as training
from command import UserError
from experiments import Experiment, difference_text, relevant_settings
from leaderboard import RECORDS, Record, listed, read_text, track_targets
from log_reader import Run, find_script, open_log
from printing import shown_p
from rules import SIGNIFICANCE, TRACKS
from samples import difference, loss_sample

# Settings that are no options of the command line, or are said for every run.
NOT_OPTIONS = ("preset", "seed", "steps", "run_id", "val_every", "train_files", "val_files")
# Numbers of steps, which --steps shrinks: a log has what came of it, and --steps makes the same again.
FOLLOW_STEPS = ("momentum_warmup", "momentum_cooldown", "tables_from", "average_steps")


def attempt(args) -> int:
    """The command: see logbook.py."""
    targets = track_targets(read_text(RECORDS / "README.md"))
    if args.track not in targets:
        raise UserError(f"no track {args.track}: there are {', '.join(targets)}")
    if not re.fullmatch(r"[\w-]+", args.name):
        raise UserError(f"--name {args.name}: letters, digits, - and _ alone")
    folder = find_folder(args.track, args.name)
    before = listed(args.track, targets[args.track], without=folder)
    if not before:
        first = "make its first one as records/README.md says"
        raise UserError(f"{RECORDS / args.track} has no record to beat: {first}")
    if TRACKS[args.track].gpus > 1:
        raise UserError(f"{args.track}: an attempt trains in one process; make its runs with ./run.sh")
    sys.stdout.outlived = True  # by this command, which works for long
    source = Path(args.script).resolve()
    print(f"{source.name}: is it legal?")
    if logbook.main(["check", str(source)]):
        return 1
    mine, theirs = make_runs(args, source, before[-1], folder)
    return decide(args, folder, targets[args.track], before[-1], mine, theirs)


def find_folder(track: str, name: str) -> Path:
    """The attempt's folder: that of another day if the attempt was begun then."""
    begun = sorted((RECORDS / track).glob(f"????-??-??_{name}"))
    return begun[-1] if begun else RECORDS / track / f"{datetime.date.today()}_{name}"


def make_runs(args, source: Path, last: Record, folder: Path) -> tuple[list[Run], list[Run]]:
    """The runs of the attempt and, made again, those of the last record, in turn: both have the same day."""
    from tqdm import tqdm

    settings = last.runs[0].header.settings
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=2 * args.seeds, unit="run", disable=None) as bar:
        previous = Path(temporary) / "train_gpt.py"
        with open_log(last.runs[0].file) as file:
            previous.write_bytes(find_script(file, last.runs[0].header.source).text)
        again = options_of(last.runs[0], settings)
        jobs = {"": (source, args.options), "previous": (previous, again)}
        made = {which: [] for which in jobs}
        models = {"": made[""], "previous": last.runs}  # of what experiment its runs must be
        for seed in range(1, args.seeds + 1):
            # Who begins changes from seed to seed: a machine that slows down is nobody's advantage.
            order = list(jobs) if seed % 2 else list(jobs)[::-1]
            for which in order:
                script, options = jobs[which]
                path = folder / which / f"run_{seed}.txt"
                bar.set_description(f"seed {seed}, {which or args.name}")
                options = [*options, "--seed", str(seed)]
                made[which].append(run_or_find(path, script, options, args.track, models[which]))
                bar.update()
    return made[""], made["previous"]


def options_of(run: Run, settings: dict) -> list[str]:
    """The options that make a run's script train with the same settings, but for its seed."""
    options = ["--steps", str(run.final_step)]
    for name, value in (settings | settings.get("model", {})).items():
        if name not in NOT_OPTIONS + FOLLOW_STEPS and isinstance(value, bool | int | float | str) and value != "":
            text = str(value).lower() if isinstance(value, bool) else str(value)
            options += [f"--{name.replace('_', '-')}", text]
    return options


def run_or_find(path: Path, script: Path, options: list[str], track: str, models: list[Run]) -> Run:
    """The run of a log, made if it is not there. UserError if it is of another experiment than its models."""
    if training.finished(path) is None:
        preset = TRACKS[track].preset
        files = f"./data/{'sympy/sympy' if preset == 'tiny' else 'fineweb10B/fineweb'}"  # beside the project's script
        words = ["--preset", preset, "--train-files", f"{files}_train_*.bin", "--val-files", f"{files}_val_*.bin"]
        training.train(path, str(script), [*words, "--val-every", "1000000", *options])
    run = training.finished(path)
    if models and Experiment.of(run) != Experiment.of(models[0]):
        raise UserError(f"{path}: of another experiment than {models[0].name}: {difference_text(run, models[0])}")
    return run


def decide(args, folder: Path, target: float, last: Record, mine: list[Run], theirs: list[Run]) -> int:
    """Says whether the attempt reaches the target, and sooner than the last record; writes the record's README.md."""
    verdict = logbook.verdict(mine, loss_sample(mine), target)
    sooner = difference(mine, theirs, "train_time_ms")
    saved = 1 - sooner.a.mean / sooner.b.mean
    change = f"{abs(saved):.1%} {'less' if saved > 0 else 'more'} time"
    if sooner.p is not None:
        change += f", p = {shown_p(sooner.p)} (paired by seed)"
    print(f"loss: mean {loss_sample(mine).mean:.4f}, p = {shown_p(verdict.p)} that it is at most {target:g}")
    print(f"time: {change}, against {last.folder.name}")
    faster = sooner.mean < 0 and sooner.p is not None and sooner.p < SIGNIFICANCE
    if not verdict.significant or not faster:
        missing = "the target is not shown to be reached" if not verdict.significant else "it is not shown to be faster"
        print(f"no record: {missing} (p < {SIGNIFICANCE}); the logs stay in {folder}")
        return 1
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(description(args, mine, theirs, last, change, verdict.p, target), encoding="utf-8")
    print(f"a record: say in {readme} what changed and why, and run: python records/logbook.py leaderboard")
    return 0


def description(args, mine: list[Run], theirs: list[Run], last: Record, change: str, p: float, target: float) -> str:
    """The beginning of a record's README.md, with what was measured."""
    own, others = relevant_settings(mine[0]), relevant_settings(theirs[0])
    # Of the scalars; the tables, and what one of the scripts does not have, are for whoever writes on.
    names = [name for name in own if name in others and own[name] != others[name] and "[" not in name]
    changed = ["the script"] * (mine[0].header.source != theirs[0].header.source)
    changed += [f"`{name}` {others[name]} → {own[name]}" for name in names]
    rows = [
        f"| {run.seed} | {run.val_loss:.4f} | {run.train_time_ms / 1000:.2f} s | "
        f"{other.val_loss:.4f} | {other.train_time_ms / 1000:.2f} s |"
        for run, other in zip(mine, theirs)
    ]
    lines = [
        f"# {args.name.replace('_', ' ').capitalize()}",
        "",
        f"What changed: {', '.join(changed)}.",
        "",
        "Why: ",
        "",
        "Contributors: ",
        "",
        f"Checked: legal ({datetime.date.today()}), sha256 {mine[0].header.source}",
        "",
        f"{change}, against [{last.title}](../{last.folder.name}), whose runs were made again in turn with these, in",
        f"`previous/`. The mean loss is at most {target:g} with p = {shown_p(p)}.",
        "",
        "| seed | loss | time | loss before | time before |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]
    return "\n".join(lines)
