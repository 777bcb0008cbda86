"""Is an edit of train_gpt.py legal? What `logbook.py check` starts, in a process of its own.

    python records/legality.py SCRIPT CHECK...

It loads the script and applies the checks, on the CPU, uncompiled and in float32, and prints JSON, a line each: that it
has started, that the script is loaded, or a `problem` if it cannot be checked; then for every check its rule, its
`findings`, none if it passed, `notes` about what the rules allow, and why it is `not_judged`, if it is not. What the
script itself prints is thrown away.

Some questions (questions.py) are asked of models: every preset's table of layers, built at the size of `tiny`. The
others are asked of short runs of `--preset tiny`, which are watched (witness.py).
"""

import ast
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where command.py lies
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

from compiler_flags import CompilerWatch, flags_in_source
from log_reader import read_log
from questions import (
    Problem,
    false_probabilities,
    false_sum,
    leaks_between_documents,
    leaks_from_later,
    shake,
    unlike_itself,
)
from rules import STREAMS
from witness import SHARDS, SHARED, VAL_TOKENS, VOCAB, Runs

# What a script must keep for the checks to find their way; records/README.md says what each is.
NAMES = ("PRESETS", "GPT", "GPT.evaluate", "make_context", "warm_up", "main")
# The fields of a model's configuration that make the table of any preset as small as that of `tiny`.
SIZES = ("vocab_size", "bos_id", "dim", "heads", "bigram_dim")
LOGGED = 2e-4  # nats; what rounding to four digits may do between two losses that must be the same
MOST = 5  # findings of a check; after so many it stops

# ======================================================================================================================
# Loading
# ======================================================================================================================


def load(path: Path):
    """The script as a module. Raises Problem."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = script  # where dataclasses look for it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(script)
    except SyntaxError as error:
        raise Problem(f"line {error.lineno}: {error.msg}") from None
    except SystemExit as error:
        raise Problem(f"ends while it is imported, with status {error.code or 0}") from None
    except BaseException as error:
        raise Problem(f"cannot be imported: {explain(error, path)}") from None
    missing = [name for name in NAMES if not has(script, name)]
    if not missing and not {"tiny", "record"} <= set(script.PRESETS):
        missing = ["the presets tiny and record"]
    if missing:
        raise Problem(f"lacks {', '.join(missing)} (records/README.md lists what a script must keep)")
    return script


def has(script, name: str) -> bool:
    try:
        functools.reduce(getattr, name.split("."), script)
        return True
    except AttributeError:
        return False


def explain(error: BaseException, path: Path) -> str:
    """An exception in one line, with the last line of the script on its way."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" + (f" (line {lines[-1]})" if lines else "")


# Models: causal, normalized, documents
# ======================================================================================================================


class Subject:
    """A script under check: its models, and its runs, which all checks share."""

    def __init__(self, path: Path, folder: Path, checks: list[str]):
        self.path = path
        self.compiler = CompilerWatch(path)  # before the script is loaded
        self.script = load(path)
        # They go on while the models are asked.
        self.runs = Runs(path, folder, self.script.PRESETS["tiny"], set(checks))

    def model(self, preset: str, **changes):
        """A model of a preset's table, at the size of `tiny` but for the changes, with random weights."""
        sizes = {name: getattr(self.script.PRESETS["tiny"].model, name) for name in SIZES}
        torch.manual_seed(0)
        model = self.script.GPT(replace(self.script.PRESETS[preset].model, **{**sizes, **changes}))
        shake(model)
        return model

    def narrow_model(self, preset: str, vocab: int):
        """A model of a preset's table with 16 channels, whose last token is BOS, for evaluation."""
        sizes = {"dim": 16, "heads": 2, "bigram_dim": 16, "vocab_size": vocab, "bos_id": vocab - 1}
        return self.model(preset, **sizes).eval()

    @functools.cached_property
    def models(self) -> dict:
        return {preset: self.model(preset) for preset in self.script.PRESETS}

    def context(self, model, length: int, windows: tuple[int, int]):
        return self.script.make_context(model.config, length, windows, next(model.parameters()))


SAMPLE = 256  # tokens of a large vocabulary
WINDOWS = (5, 11)  # so small that in a short sequence every kind of layer has tokens beyond its window


def packed(lengths, config, seed: int = 0):
    """Inputs and targets of random documents of these lengths, with their BOS, and each token's document's number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.bos_id, (sum(lengths) + 1,), generator=generator)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens[:-1][numbers.diff(prepend=torch.tensor([-1])) > 0] = config.bos_id
    return tokens[:-1], tokens[1:], numbers


def causal(subject: Subject):
    """No loss depends on a later token."""
    for preset, model in subject.models.items():
        # Every token of a short sequence is changed; of a long one, those around the ends of windows.
        for lengths, windows, changed in (
            ((1, 2, 21, 16), WINDOWS, range(40)),
            ((290, 10), (64, 256), (64, 65, 129, 256, 257, 299)),
        ):
            inputs, targets, _ = packed(lengths, model.config)
            context = subject.context(model, len(inputs), windows)
            for leak in unlike_itself(model, inputs, targets, context):
                yield f"{preset}: {leak}"
                return  # so nothing else can be told
            for leak in leaks_from_later(model, inputs, targets, context, alone=changed):
                yield f"{preset}: {leak}"
        yield from causal_with_windows(subject, preset)
    yield from causal_at_width(subject)
    yield from causal_at_length(subject)
    yield from subject.runs.found("causal")


def causal_at_width(subject: Subject):
    """The same with as many channels as the presets have, and a small vocabulary."""
    presets = {}  # one of each width
    for preset, settings in subject.script.PRESETS.items():
        presets.setdefault((settings.model.dim, settings.model.heads, settings.model.bigram_dim), preset)
    for (dim, heads, bigram_dim), preset in presets.items():
        model = subject.model(preset, dim=dim, heads=heads, bigram_dim=bigram_dim)
        inputs, targets, _ = packed((1, 2, 21, 16), model.config)
        context = subject.context(model, len(inputs), WINDOWS)
        for leak in leaks_from_later(model, inputs, targets, context, alone=[len(inputs) - 1], with_rest=[12]):
            yield f"{preset}, {dim} channels: {leak}"


def causal_with_windows(subject: Subject, preset: str):
    """The same with the windows that validation really has, in a model that evaluates, from within a document."""
    settings = subject.script.PRESETS[preset]
    windows = settings.val_short_window, settings.val_long_window
    model = subject.narrow_model(preset, VOCAB)
    inputs, targets, _ = packed((2060, 40), model.config)
    inputs, targets = inputs[1:], targets[1:]
    context = subject.context(model, len(inputs), windows)
    for leak in leaks_from_later(model, inputs, targets, context, alone=[len(inputs) - 1], with_rest=[1100]):
        yield f"{preset}, windows of {windows[0]} and {windows[1]}: {leak}"


def causal_at_length(subject: Subject):
    """The same far into sequences as long as those of validation."""
    model = subject.narrow_model("tiny", VOCAB)  # whose few layers can afford them
    for length in sorted({settings.val_seq_len for settings in subject.script.PRESETS.values()}):
        inputs, targets, _ = packed((length - 1000, 1000), model.config)
        context = subject.context(model, length, WINDOWS)
        for leak in leaks_from_later(model, inputs, targets, context, with_rest=[length - 100]):
            yield f"{length:,} tokens: {leak}"


def normalized(subject: Subject):
    """The probabilities of all tokens of the vocabulary sum to 1, whatever the other targets are."""
    # The head is the same for all tables. A vocabulary that needs no padding: none of its probability is elsewhere.
    model = subject.model("tiny", vocab_size=128, bos_id=127)
    inputs, targets, _ = packed((1, 6, 33), model.config)
    yield from false_probabilities(model, inputs, targets, subject.context(model, len(inputs), WINDOWS))
    for vocab in {settings.model.vocab_size for settings in subject.script.PRESETS.values()}:
        model = subject.narrow_model("tiny", vocab)
        length = min(vocab, SAMPLE)
        yield from false_sum(model, subject.context(model, length, WINDOWS), length)
    yield from subject.runs.found("normalized")


def documents(subject: Subject):
    """No token of one document reaches another; where one does, that is legal, and noted."""
    # Many are as short as a document can be; some begin or end where a window does.
    layouts = [(1, 1, 2, 1, 3, 9, 1, 17, 4), (5, 5, 1, 11, 2, 9, 6), (22, 1, 1, 10, 1)]
    for (preset, model), (seed, lengths) in itertools.product(subject.models.items(), enumerate(layouts)):
        inputs, targets, numbers = packed(lengths, model.config, seed)
        context = subject.context(model, len(inputs), WINDOWS)
        for leak in leaks_between_documents(model, inputs, targets, context, numbers, range(len(lengths))):
            yield Note(f"{preset}: {leak}")
    for leak in subject.runs.found("documents"):
        yield Note(leak)


class Note(str):
    """A finding about what the rules allow: said, but nothing fails by it."""


# ======================================================================================================================
# Runs: validation, learning, clock, warm_up, log, world_size, compiler
# ======================================================================================================================


def validation(subject: Subject):
    """Validation is the mean loss of every token of the whole, unchanged stream."""
    for preset, settings in subject.script.PRESETS.items():
        if preset not in STREAMS:
            continue
        stream = STREAMS[preset]
        if settings.val_tokens != stream.tokens:
            yield f"{preset}: val_tokens is {settings.val_tokens}, not {stream.tokens}"
        if (files := Path(settings.val_files).name) != stream.files:
            yield f"{preset}: val_files is {files}, not {stream.files}"
    yield from subject.runs.found("validation")


def log(subject: Subject):
    """The log has the script's source, and the checksums of the data that the run had."""
    folder = subject.runs.ended("judged")
    lines = (folder / "logs" / "run.txt").read_bytes().split(b"\n")
    for number, line in enumerate(subject.path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        if number > len(lines) or line != lines[number - 1]:
            yield f"line {number} of the script is not in the log"
            break
    stream = np.concatenate([np.fromfile(folder / f"x_val_{n}.bin", "<u2")[512:] for n in range(2)])
    right = hashlib.sha256(stream[: VAL_TOKENS + 1].tobytes()).hexdigest()
    shards = {hashlib.sha256((folder / f"x_train_{n}.bin").read_bytes()).hexdigest() for n in range(SHARDS)}
    header = read_log(str(folder / "logs" / "run.txt")).runs[0].header
    if header.validated is None or not header.trained:
        yield Note("the log has no checksums of its data")
    elif header.validated != right:
        yield f"the log says that it validated on tokens with sha256 {header.validated}; it is {right}"
    elif not header.trained <= shards:
        yield f"the log says that it trained on shards with sha256 {', '.join(header.trained)}; they are others"


def learning(subject: Subject):
    """The model learns from the training stream alone, and on the clock alone."""
    yield from subject.runs.found("learning")
    for line, length in long_literals(subject.path).items():
        yield Note(f"line {line}: {length:,} numbers or characters, written out: whoever reads it has to ask of what")
    judged, other_val, other_train = (subject.runs.facts(name) for name in ("judged", "other val", "other train"))
    if judged["start"] != other_train["start"]:
        yield "what the model is before its first step depends on the training stream"
    elif judged["first"] != other_train["first"]:
        yield "the losses at step 0 depend on the training stream"
    elif judged["after_step"] != other_train["after_step"]:
        yield f"what the first step makes of the model depends on training tokens that come {SHARED:,} tokens later"
    if judged["start"] != other_val["start"]:
        yield "what the model is before its first step depends on the validation stream"
    elif judged["end"] != other_val["end"]:
        yield "what the model has learned depends on the validation stream, or on whether it was evaluated"


def long_literals(path: Path) -> dict[int, int]:
    """Literals so long that they may hold weights or statistics, by line: of how many numbers, or characters."""
    tree = ast.parse(path.read_bytes())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    lengths = {}
    for node in ast.walk(tree):
        length, most = 0, 1000
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in documentation:
            length = len(node.value)
        elif isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            numbers = [each for each in ast.walk(node) if isinstance(each, ast.Constant)]
            length, most = sum(type(each.value) in (int, float) for each in numbers), 200
        if length > most:
            lengths.setdefault(node.lineno, length)
    return lengths


def clock(subject: Subject):
    """train_time has everything that training takes: batches, forward, backward, optimizer."""
    yield from subject.runs.found("clock")


def warm_up(subject: Subject):
    """The warm-up leaves weights, gradients and optimizer as they were, bit for bit."""
    yield from subject.runs.found("warm_up")


def world_size(subject: Subject):
    """The losses of a run are the same on one process and on two; where they are not, that is legal, and noted."""
    alone = {(step, kind): loss for step, kind, loss, _ in subject.runs.logged("judged") if kind == "train"}
    together = {(step, kind): loss for step, kind, loss, _ in subject.runs.logged("two") if kind == "train"}
    for step, kind in sorted(alone.keys() | together.keys()):
        one, more = alone.get((step, kind)), together.get((step, kind))
        if one is None or more is None or not abs(one - more) <= LOGGED:
            yield Note(f"{kind}_loss of step {step} is {one} on one process, {more} on two")


def compiler(subject: Subject):
    """No flags for torch.compile and what is below it."""
    found = dict.fromkeys(subject.compiler.findings() + subject.runs.found("compiler"))
    yield from found
    lines = {finding.partition(":")[0] for finding in found}
    for line, flag in sorted(flags_in_source(subject.path).items()):
        if f"line {line}" not in lines and not any(finding.startswith(f"{flag} = ") for finding in found):
            yield f"line {line}: {flag}"


CHECKS = {
    check.__name__: check
    for check in (causal, normalized, documents, validation, learning, clock, warm_up, log, world_size, compiler)
}


def main(path: Path, checks: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    torch.set_num_threads(1)
    gc.freeze()  # a forked run that collects garbage need not go over all of PyTorch
    answer(started=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = Subject(path, Path(folder), checks)
        except Problem as problem:
            return answer(problem=str(problem))
        answer(loaded=True)
        for name in checks:
            found, unable = [], None
            try:
                found += itertools.islice(CHECKS[name](subject), MOST)
            except Problem as problem:
                unable = str(problem)
            except Exception as error:
                unable = explain(error, path)
            notes = [str(each) for each in found if isinstance(each, Note)]
            findings = [each for each in found if not isinstance(each, Note)]
            answer(
                check=name, rule=CHECKS[name].__doc__.split("\n")[0], findings=findings, notes=notes, not_judged=unable
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
