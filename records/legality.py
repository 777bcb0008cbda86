"""Is an edit of train_gpt.py legal? What `logbook.py check` starts, in a process of its own.

    python records/legality.py SCRIPT CHECK...

It loads the script and applies the checks, on the CPU, uncompiled and in float32, and prints JSON, a line each: that it
has started, that the script is loaded, or a `problem` if it cannot be checked; then for every check its rule, its
`findings`, none if it passed, `notes` about what the rules allow, and why it is `not_judged`, if it is not. What the
script itself prints is thrown away.

Some questions are asked of models: every preset's table of layers, built at the size of `tiny`. The others are asked
of short runs of `--preset tiny`, on data made for them:

  "judged"      all that it does is watched: its validations, what it trains on, what its clock says. Time is made up
                there, so that each call costs what is written below, and so are the losses that a validation gets,
                so that their mean is known.
  "other val"   the same with another validation stream, and no validation on the way: it must learn the same.
  "other train" with another training stream, but for how it begins: it must start from the same, and be the same
                after the first step, where it ends.
  "two"         the same on two processes.
"""

import ast
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
import types
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch.utils._config_module import ConfigModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where command.py lies
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

from log_reader import read_log
from rules import STREAMS
from shards import write_shard

# What a script must keep for the checks to find their way; records/README.md says what each is.
NAMES = ("PRESETS", "GPT", "GPT.evaluate", "make_context", "warm_up", "main")
# The fields of a model's configuration that make the table of any preset as small as that of `tiny`.
SIZES = ("vocab_size", "bos_id", "dim", "heads", "bigram_dim")

EXACT = 1e-5  # nats; nothing but rounding may lie between two losses that must be the same
LOGGED = 2e-4  # the same for losses as logged, with four digits
MOST = 5  # findings of a check; after so many it stops

# ======================================================================================================================
# Loading
# ======================================================================================================================


class Problem(Exception):
    """Why a script cannot be checked, or a run did not end as it should.

    What it says is an answer, as `findings` are, and not a mistake of who asks: it goes to stdout.
    """


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


def run_as_program(path: Path, arguments: list[str], watch) -> int:
    """Runs the script as `python SCRIPT ARGUMENTS` does, and returns its exit status.

    `watch(module)` is called once all of it is defined: before the first `if` after the definition of main.
    """
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *arguments]
    body = ast.parse(path.read_bytes()).body
    defined = [i for i, node in enumerate(body) if isinstance(node, ast.FunctionDef) and node.name == "main"]
    after = range(defined[-1] + 1 if defined else len(body), len(body))
    end = next((i for i in after if isinstance(body[i], ast.If)), len(body))
    future = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    try:
        exec(compile(ast.Module(body[:end], []), str(path), "exec"), vars(module))
        watch(module)
        exec(compile(ast.Module([*future, *body[end:]], []), str(path), "exec"), vars(module))
    except SystemExit as ended:
        return ended.code or 0
    return 0


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


# ======================================================================================================================
# Losses that must not change
# ======================================================================================================================


def evaluate(model, inputs, targets, context):
    losses = model.evaluate(inputs, targets, context)
    if losses.shape != inputs.shape:
        raise Problem(f"evaluate gives losses {tuple(losses.shape)} for tokens {tuple(inputs.shape)}")
    return losses


def another(tokens, config):
    """Other tokens in place of all of these; one may be BOS, or no longer be."""
    return (tokens + 1) % (config.bos_id + 1)


def difference(before, after) -> tuple[int, float] | None:
    """Where losses first differ that must not, and by how much. NaN differs from all."""
    wrong = (~((before - after).abs() <= EXACT)).nonzero()
    return (t := wrong[0].item(), (after - before)[t].item()) if len(wrong) else None


def unlike_itself(model, inputs, targets, context):
    """Evaluates the same tokens twice, and yields where their losses differ."""
    found = difference(*(evaluate(model, inputs, targets, context) for _ in range(2)))
    if found:
        yield (
            f"the same tokens, evaluated twice: the loss of position {found[0]} changes by {found[1]:.2g}; "
            "something is kept from call to call, or drawn"
        )


def leaks_from_later(model, inputs, targets, context, alone=(), with_rest=()):
    """Changes tokens, by themselves or with all that follow, and yields what earlier losses notice."""
    before = evaluate(model, inputs, targets, context)
    changes = [(t, t + 1, "token") for t in alone] + [(t, len(inputs), "all tokens from") for t in with_rest]
    for t, end, what in changes:
        others, other_targets = inputs.clone(), targets.clone()
        others[t:end] = another(inputs[t:end], model.config)
        other_targets[t:] = another(targets[t:], model.config)
        after = evaluate(model, others, other_targets, context)
        found = difference(before[:t], after[:t])
        if found:
            yield f"changing {what} {t} changes the loss of position {found[0]} by {found[1]:.2g}"


def leaks_between_documents(model, inputs, targets, context, numbers, chosen):
    """Changes whole documents but for their BOS, and yields what the losses of others notice."""
    before = evaluate(model, inputs, targets, context)
    for number in chosen:
        own = (numbers == number) & (inputs != model.config.bos_id)
        elsewhere = numbers != number
        for new in another(inputs[own], model.config), model.config.bos_id:  # other words; no words
            others = inputs.clone()
            others[own] = new
            after = evaluate(model, others, targets, context)
            found = difference(before[elsewhere], after[elsewhere])
            if found:
                t = elsewhere.nonzero()[found[0]].item()
                yield (
                    f"changing document {number} changes the loss of position {t}, in document {numbers[t]}, "
                    f"by {found[1]:.2g}"
                )
                break


def false_sum(model, context, length: int):
    """Yields by how much the probabilities over a large vocabulary, of which it tries a sample, sum to more than 1.

    For that the model has weights so small that all tokens are about equally likely.
    """
    for p in model.parameters():
        p.data *= 1e-3
    vocab = model.config.vocab_size
    inputs = torch.full((length,), model.config.bos_id)  # documents without words: all positions are alike
    targets = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:length]
    total = vocab * (-evaluate(model, inputs, targets, context).double()).exp().mean().item()
    if not total <= 1 + 1e-3:
        yield f"the probabilities over a vocabulary of {vocab:,} tokens sum to {total:.4g}"


def false_probabilities(model, inputs, targets, context):
    """Yields positions whose probabilities over the vocabulary sum to more than 1, or depend on other targets.

    Less than 1 is legal: a script may give some probability to the padding of the vocabulary.
    """
    vocab = model.config.vocab_size
    positions = torch.arange(len(inputs))
    losses = []
    for shift in range(vocab):  # every position gets every target, and no two neighbours the same
        losses.append(evaluate(model, inputs, (targets + shift + 7 * positions) % vocab, context).double())
    losses = torch.stack(losses)
    for t, probability in enumerate((-losses).exp().sum(0).tolist()):
        if not probability <= 1 + 1e-4:
            yield f"the probabilities of position {t} sum to {probability:.6g}"
            return
    # Half of the targets are the likeliest ones, then the least likely: the other half's losses must not notice.
    likeliest, least = ((targets + choice + 7 * positions) % vocab for choice in (losses.argmin(0), losses.argmax(0)))
    half = torch.rand(len(inputs), generator=torch.Generator().manual_seed(1)) < 0.5
    one, other = (evaluate(model, inputs, torch.where(half, each, targets), context) for each in (likeliest, least))
    found = difference(one[~half], other[~half])
    if found:
        t = (~half).nonzero()[found[0]].item()
        yield f"changing the targets of other positions changes the loss of position {t} by {found[1]:.2g}"


# ======================================================================================================================
# Models: causal, normalized, documents
# ======================================================================================================================


class Subject:
    """A script under check: its models, and its runs, which all checks share."""

    def __init__(self, path: Path, folder: Path, checks: list[str]):
        self.path, self.folder, self.checks = path, folder, checks
        self.compiler = CompilerWatch(path)  # before the script is loaded
        self.script = load(path)
        # They go on while the models are asked.
        self.runs = Runs(self, [name for name, checks in RUNS.items() if checks & set(self.checks)])

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


def shake(model) -> None:
    """Random weights: at their start gates and factors are zero, and would hide what passes through them."""
    for _, p in sorted(model.named_parameters()):  # by name: the same weights for every order of the parameters
        p.data += torch.randn_like(p) / min(p.shape[-2:]) ** 0.5


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
# Runs
# ======================================================================================================================

# The runs, and the checks that need them.
RUNS = {
    "judged": {*"causal normalized documents validation learning clock warm_up log world_size compiler".split()},
    "other val": {"validation", "learning", "clock"},
    "other train": {"learning"},
    "two": {"world_size"},
}
VOCAB = 128  # with the last one as BOS; small, since every token is tried as a target, and without padding
VAL_LENGTH, VAL_TOKENS, BATCH_TOKENS = 2048, 8192, 2048
NORMALIZED_LENGTH = 1152
STEPS = 16  # or as many as the script's table of stages needs
OPTIONS = f"""--preset tiny --dim 32 --heads 2 --bigram-dim 8 --dtype float32 --run-id run --slices 4
    --vocab-size {VOCAB} --bos-id {VOCAB - 1} --val-tokens {VAL_TOKENS} --val-seq-len {VAL_LENGTH}
    --epochs 9 --train-files x_train_*.bin --val-files x_val_*.bin"""
VAL_EVERY = 2  # steps, of the judged run; the others validate at their start and end alone
LINE = re.compile(r"^step:(\d+)/\d+ (val|train)_loss:(\S+) train_time:(\d+)ms", re.MULTILINE)

# What a call costs in the made-up time of runs, in seconds.
FORWARD, BACKWARD, UPDATE, EVALUATION, BATCH = 1.0, 2.0, 4.0, 100.0, 0.125
HICCUP, HICCUPS = 90.0, 39  # what every 39th forward call costs
CHANGE = 16.0  # for weights that are not as they were when the time was last asked for
# The mean losses of validations: near the targets of the tracks, and up and down; at the end a little above one.
MEANS = {
    "judged": (5.7, 3.2843, 1.4412, 3.2911, 3.2777, 0.8107, 4.1005, 1.4453, 1.4403),
    "other val": (6.1, 3.2804),
}
ONLY_TRAINING, ONLY_VALIDATION = VOCAB - 3, VOCAB - 2  # tokens that one of the streams has alone
SHARDS = 3  # of the training stream, each with tokens of its own
SHARED = 6000  # tokens with which each begins in both training streams


def random_stream(seed: int, tokens: int, own: int, low: int = 0, high: int = ONLY_TRAINING) -> np.ndarray:
    """Documents of very different lengths and difficulty, with the token `own` here and there; some are long.

    It begins within a document. Other tokens are from `low` up to `high`.
    """
    rng = np.random.default_rng(seed)
    lengths = [700, 1, 2, 2500, *rng.integers(1, 400, tokens // 100)]
    documents = []
    for length in lengths:
        document = rng.integers(low, rng.integers(low + 1, high + 1), size=length)
        document[rng.random(length) < 0.02] = own
        document[0] = VOCAB - 1
        documents.append(document)
    return np.concatenate(documents)[1 : tokens + 1]


class Runs:
    """Runs of the script, all started at once, on data made for them."""

    def __init__(self, subject: Subject, names: list[str]):
        self.folder = subject.folder
        self.processes = {}
        settings = subject.script.PRESETS["tiny"]
        steps = max(STEPS, len(settings.stages) + 2)
        # Forking spares the import of PyTorch.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for name in names:
            folder = self.folder / name
            folder.mkdir()
            val = random_stream(2, 2 * VAL_TOKENS, ONLY_VALIDATION)
            if name == "other val":  # with rarer tokens, so that other shards are like it
                val = random_stream(3, 2 * VAL_TOKENS, ONLY_VALIDATION, low=ONLY_TRAINING * 2 // 3)
            for number in range(SHARDS):
                low, high = (ONLY_TRAINING * part // SHARDS for part in (number, number + 1))
                train = random_stream(4 + number, 16_000, ONLY_TRAINING, low, high)
                if name == "other train":  # other words in documents of the same lengths
                    others = random_stream(14 + number, 16_000, ONLY_TRAINING, low, high)
                    others = np.where(others == VOCAB - 1, low, others)
                    changed = (np.arange(len(train)) >= SHARED) & (train != VOCAB - 1)
                    train = np.where(changed, others, train)
                write_shard(folder / f"x_train_{number}.bin", train)
            # Validation goes on in a second shard, in the middle of a document, and that beyond what is read.
            write_shard(folder / "x_val_0.bin", val[:3000])
            write_shard(folder / "x_val_1.bin", val[3000:])
            size = 2 if name == "two" else 1
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                how = (name, subject.path, folder, steps, set(subject.checks), val, size, server.getsockname()[1])
            self.processes[name] = [
                context.Process(target=run_rank, args=(rank, *how), daemon=True) for rank in range(size)
            ]
            for process in self.processes[name]:
                process.start()

    def ended(self, name: str) -> Path:
        """The folder of a run, when it has ended. Raises Problem if it ended badly."""
        ranks = self.processes[name]
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):  # the others would wait for it
                for process in ranks:
                    process.terminate()
            time.sleep(0.02)
        folder = self.folder / name
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        # First those that failed by themselves, not by the signal above.
        for rank in sorted(failed, key=lambda rank: ranks[rank].exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)):
            said = (folder / f"output_{rank}").read_text(errors="replace").strip()
            last = said.splitlines()[-1][:300] if said else "nothing"
            raise Problem(f"the run {name!r} ended with status {ranks[rank].exitcode}; it said: {last}")
        return folder

    def logged(self, name: str) -> list[tuple[int, str, float, int]]:
        """The losses in the log of a run: step, kind, loss, and train_time in ms."""
        return logged_losses(self.ended(name))

    def facts(self, name: str) -> dict:
        """What was noted in a run: findings by check, and digests."""
        return json.loads((self.ended(name) / "facts.json").read_text())

    def found(self, check: str) -> list[str]:
        """What the watched runs that a check needs found for it."""
        names = [name for name in MEANS if check in RUNS[name]]
        return list(dict.fromkeys(each for name in names for each in self.facts(name)["findings"][check]))


def logged_losses(folder: Path) -> list[tuple[int, str, float, int]]:
    text = (folder / "logs" / "run.txt").read_text().rpartition("=" * 100)[2]
    return [(int(step), kind, float(loss), int(time)) for step, kind, loss, time in LINE.findall(text)]


def run_rank(
    rank: int, name: str, path: Path, folder: Path, steps: int, checks: set[str], val: np.ndarray, size: int, port: int
) -> None:
    """One process of a run, which runs the script as a program.

    If it is the only one, it writes down what the checks want to know.
    """
    os.chdir(folder)
    output = os.open(f"output_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    compiler = CompilerWatch(path)
    # Before the script takes its clock from where it finds it.
    made_up_time = MadeUpTime() if name in MEANS else None
    witness = None

    def watch(script):
        nonlocal witness
        settings = script.PRESETS["tiny"]
        *stages, extension = (replace(s, batch_tokens=BATCH_TOKENS) for s in (*settings.stages, settings.extension))
        script.PRESETS["tiny"] = replace(settings, stages=tuple(stages), extension=extension)
        witness = Witness(script, name, val, steps, checks, made_up_time)

    every = VAL_EVERY if name == "judged" else steps
    try:
        status = run_as_program(path, [*OPTIONS.split(), "--steps", str(steps), "--val-every", str(every)], watch)
    except Enough:
        status = 0
    if size == 1 and not status:
        if made_up_time:
            witness.judge(logged_losses(folder))
            witness.findings["compiler"] = compiler.findings()
        facts = {
            "findings": witness.findings, "start": witness.start, "first": witness.first,
            "after_step": witness.after_step, "end": witness.digest(),
        }
        Path("facts.json").write_text(json.dumps(facts))
    sys.exit(status)


class MadeUpTime:
    """Time stands still but for what calls cost; for everybody who asks the module `time`.

    Whoever wants to look first is told of each question.
    """

    def __init__(self):
        self.seconds = 0.0
        self.asked = None
        for name in ("time", "perf_counter", "monotonic", "process_time", "thread_time"):
            setattr(time, name, self.now)
            setattr(time, f"{name}_ns", lambda: int(1e9 * self.now()))

    def now(self) -> float:
        if self.asked:
            self.asked()
        self.seconds += 1e-7  # so that nothing takes no time at all
        return self.seconds


def wrap(owner, name: str, around) -> None:
    """Puts `around(original, *args, **kwargs)` in the place of a function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def digest(tensors) -> str:
    """A checksum of tensors, bit for bit."""
    sums = hashlib.sha256()
    for tensor in tensors:
        sums.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


@dataclass
class Validation:
    """The calls of `evaluate` between two training steps."""

    cost: float  # of all training before it
    calls: int  # of training, since the one before
    changed: bool  # whether the weights are not as they were when the time was last asked for
    seen: np.ndarray  # how often each token of the stream was a target


class Enough(BaseException):
    """A run has shown how it starts, and nothing more is asked of it."""


class Witness:
    """Watches a run: what it trains on, what its validations evaluate, what the warm-up leaves, what time costs."""

    def __init__(
        self, script, name: str, stream: np.ndarray, steps: int, checks: set[str], made_up_time: MadeUpTime | None
    ):
        self.stream, self.steps, self.checks, self.time = stream, steps, checks, made_up_time
        self.probes = name == "judged"
        self.one_step_only = name == "other train"
        self.means = MEANS.get(name)
        # What the warm-up may not see: any stretch of the streams, as bytes.
        shards = [np.fromfile(f"x_train_{number}.bin", "<u2")[512:] for number in range(SHARDS)]
        self.streams = b"".join(tokens.astype(np.uint8).tobytes() for tokens in (*shards, stream))
        self.findings = {check: [] for check in CHECKS}
        self.findings["warm_up"].append("the run did not call warm_up")
        self.validations: list[Validation] = []
        self.cost, self.calls, self.forwards, self.updates = 0.0, 0, 0, 0
        self.off = False  # within the warm-up or a validation
        self.warming = False
        self.model = None
        self.before_warm_up = self.watched = None
        # Digests: of the model when training starts, and after a step; of the first validation's losses.
        self.start = self.after_step = self.first = None
        self.weights = None  # the same, when last looked at
        self.trained_on = set()
        self.main_thread = threading.current_thread()
        # Spread out: every token's made-up loss is different, more so where a cheat may leave tokens out.
        rng = np.random.default_rng(0)
        spread = rng.standard_t(2, size=VAL_TOKENS) + np.linspace(-1, 1, VAL_TOKENS)  # with outliers
        spread += np.where(stream[:VAL_TOKENS] == VOCAB - 1, 1.0, 0.0)  # after BOS
        spread -= np.where(stream[1 : VAL_TOKENS + 1] < 20, 0.5, 0.0)  # frequent tokens
        spread -= spread.mean()
        # What lies beyond the first tokens has a mean of its own.
        self.spread = np.append(spread, rng.normal(2, 1, len(stream) - 1 - VAL_TOKENS))

        wrap(script.GPT, "forward", self.forward)
        wrap(script.GPT, "evaluate", self.evaluate)
        wrap(script, "warm_up", self.warm_up)
        wrap(torch.autograd, "backward", self.backward)
        wrap(torch.autograd, "grad", self.backward)
        wrap(futures.Future, "result", self.result)
        if self.time:
            self.time.asked = self.look

    # Training

    def look(self) -> bool:
        """Whether the weights have changed since the last look, which costs time.

        When somebody asks for the time, this comes first: so it is on the clock, if the clock was running.
        """
        if self.weights is None or self.off or threading.current_thread() is not self.main_thread:
            return False
        weights = self.digest()
        if weights == self.weights:
            return False
        self.weights = weights
        self.cost += CHANGE
        self.time.seconds += CHANGE
        return True

    def pay(self, seconds: float) -> None:
        """A call of training, outside of the warm-up."""
        self.cost += seconds
        self.calls += 1
        if self.time:
            self.time.seconds += seconds

    def forward(self, original, model, inputs, *args, **kwargs):
        if not self.off:
            if self.start is None:
                self.model = model
                self.start = self.digest()
                self.compare_with_warm_up()
                if self.time:
                    self.weights = self.start
            elif self.updates and self.after_step is None:
                self.after_step = self.digest()
                if self.one_step_only:
                    raise Enough
            self.trained_on.update(torch.unique(inputs).tolist())
            self.forwards += 1
            self.pay(HICCUP if self.forwards % HICCUPS == 0 else FORWARD)
        elif self.warming and self.streams.find(inputs[:32].cpu().numpy().astype(np.uint8).tobytes()) >= 0:
            self.findings["learning"].append("the warm-up runs on tokens of the training or the validation stream")
        return original(model, inputs, *args, **kwargs)

    def backward(self, original, *args, **kwargs):
        if not self.warming:
            self.pay(BACKWARD)
        return original(*args, **kwargs)

    def update(self, original, *args, **kwargs):
        if not self.warming:
            self.updates += 1
            self.pay(UPDATE)
        return original(*args, **kwargs)

    def result(self, original, *args, **kwargs):
        """Waiting for what a thread prepares, as batches are."""
        if not self.warming and threading.current_thread() is self.main_thread:
            self.cost += BATCH
            if self.time:
                self.time.seconds += BATCH
        return original(*args, **kwargs)

    def digest(self) -> str | None:
        """A digest of the model as it is."""
        return self.model and digest((*self.model.parameters(), *self.model.buffers()))

    # The warm-up

    def warm_up(self, original, *args, **kwargs):
        self.watched = {type(thing).__name__: thing for thing in (*args, *kwargs.values())}
        self.before_warm_up = self.state()
        self.off = self.warming = True
        returned = original(*args, **kwargs)
        self.off = self.warming = False
        self.findings["warm_up"] = self.changes()
        for thing in self.watched.values():
            if hasattr(thing, "step") and callable(thing.step):
                wrap(thing, "step", self.update)
        return returned

    def state(self) -> dict:
        return dict(contents(self.watched, "", set()))

    def changes(self) -> list[str]:
        now = self.state()
        names = sorted(self.before_warm_up.keys() | now.keys())
        return [
            f"{name.strip('.')} is not what it was"
            for name in names
            if not same(self.before_warm_up.get(name), now.get(name))
        ]

    def compare_with_warm_up(self) -> None:
        """When training starts, the model is what it was before the warm-up."""
        if self.before_warm_up is None or self.findings["warm_up"]:
            return
        self.watched = {name: thing for name, thing in self.watched.items() if isinstance(thing, torch.nn.Module)}
        names = tuple(f".{name}." for name in self.watched)
        now = self.state()
        for name, value in self.before_warm_up.items():
            if name.startswith(names) and not name.endswith(".grad") and not same(value, now.get(name)):
                self.findings["learning"].append(f"{name.strip('.')} changed between the warm-up and the first step")

    # Validation

    def evaluate(self, original, model, inputs, targets, *args, **kwargs):
        if self.warming or self.off:
            return original(model, inputs, targets, *args, **kwargs)
        if not self.validations or self.calls:
            changed = self.look()
            seen = np.zeros(len(self.stream) - 1, int)
            self.validations.append(Validation(self.cost, self.calls, changed, seen))
            self.calls = 0
        self.off = True
        losses = original(model, inputs, targets, *args, **kwargs)
        if len(self.validations) == 1:
            self.first = digest([losses]) if self.first is None else self.first + digest([losses])
        number = len(self.validations) - 1
        if self.time:
            last = math.ceil(self.steps / VAL_EVERY)  # that at the end is always there
            if self.probes and number in (0, last):
                self.probe(original, model, inputs, targets, *args, **kwargs)
            self.time.seconds += EVALUATION
            losses = self.made_up(number, inputs, targets, losses)
        self.off = False
        return losses

    def made_up(self, number: int, inputs, targets, losses):
        """Made-up losses of a validation's tokens, by their place in the stream; the true ones of tokens elsewhere."""
        place = self.place(inputs, targets)
        if place is None:
            return losses
        self.validations[-1].seen[place : place + len(inputs)] += 1
        made_up = self.means[number % len(self.means)] + self.spread[place : place + len(inputs)]
        return torch.from_numpy(made_up).to(losses)

    def place(self, inputs, targets) -> int | None:
        """Where in the stream a sequence begins; None if it is not from there, which is a finding."""
        inputs, targets = (x.detach().flatten().cpu().numpy() for x in (inputs, targets))
        start = inputs[:64].astype(np.uint8).tobytes()
        place = self.stream.astype(np.uint8).tobytes().find(start)
        if place < 0:
            self.findings["validation"].append(f"evaluates tokens that the stream has not: {inputs[:8].tolist()} …")
            return None
        for what, seen, first in (("input", inputs, place), ("target", targets, place + 1)):
            right = self.stream[first : first + len(seen)]
            if len(right) < len(seen):
                self.findings["validation"].append(f"evaluates {len(seen):,} tokens from {place:,} on, past the end")
                return None
            wrong = np.flatnonzero(seen != right)
            if len(wrong):
                t = wrong[0]
                self.findings["validation"].append(
                    f"{what} {first + t} of the validation is {seen[t]}; in the stream it is {right[t]}"
                )
                return None
        return place

    @torch.no_grad()
    def probe(self, original, model, inputs, targets, context, *args, **kwargs) -> None:
        """Asks the model as it is here, with the run's own context, what the checks ask of models."""
        random = torch.get_rng_state()
        weights = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(0)
        shake(model)
        asked = Asked(model, functools.partial(original, model))
        where = "in the first validation" if len(self.validations) == 1 else "in the last validation"
        calls = self.validations[-1].seen.sum() // VAL_LENGTH  # before this one
        found = {"causal": [], "normalized": [], "documents": []}
        inputs, targets = inputs.detach(), targets.detach()
        if calls < 2:  # a sequence from the start of the stream, and one from within
            last = len(inputs) - 1
            ends = {"alone": (1, 300, 1001, last), "with_rest": (70, 1500)}
            found["causal"] = leaks_from_later(asked, inputs, targets, context, **ends)
        if calls < 2 and where == "in the last validation":
            numbers = (inputs == asked.config.bos_id).cumsum(0)
            found["documents"] = leaks_between_documents(asked, inputs, targets, context, numbers, (0, 1))
        if calls == 0 and where == "in the last validation":
            part = slice(min(len(inputs), NORMALIZED_LENGTH))  # as many evaluations as the vocabulary has tokens
            found["normalized"] = false_probabilities(asked, inputs[part], targets[part], context)
        for check in self.checks & found.keys():  # they are generators: what is not asked for takes no time
            self.findings[check] += [f"{where}, {leak}" for leak in found[check]]
        for p, before in zip(model.parameters(), weights):
            p.data.copy_(before)
        torch.set_rng_state(random)

    # What it all amounts to

    def judge(self, logged: list[tuple[int, str, float, int]]) -> None:
        """Compares what happened with what the log says."""
        lines = [(step, loss, milliseconds) for step, kind, loss, milliseconds in logged if kind == "val"]
        if len(lines) != len(self.validations):
            text = f"{len(self.validations)} validations were made, and {len(lines)} are in the log"
            self.findings["learning" if len(lines) < len(self.validations) else "validation"].append(text)
            return
        for number, ((step, loss, _), validation) in enumerate(zip(lines, self.validations)):
            seen, beyond = validation.seen[:VAL_TOKENS], validation.seen[VAL_TOKENS:]
            where = f"the validation of step {step}"
            mean = self.means[number % len(self.means)]
            if not seen.all():
                text = f"{where} leaves out {(seen == 0).sum():,} of {VAL_TOKENS:,} tokens"
                self.findings["validation"].append(f"{text}, the first of them {np.argmin(seen)}")
            elif beyond.any():
                self.findings["validation"].append(f"{where} goes on after {VAL_TOKENS:,} tokens")
            elif not abs(loss - mean) <= 6e-5:
                self.findings["validation"].append(f"{where} is logged as {loss}; the mean of its losses is {mean}")
            if seen.min() > 1:
                self.findings["learning"].append(f"{where} evaluates the whole stream {seen.min()} times")
        self.judge_time(lines)
        if ONLY_VALIDATION in self.trained_on:
            self.findings["learning"].append("a token that only the validation stream has was trained on")

    def judge_time(self, lines: list[tuple[int, float, int]]) -> None:
        """No call may be missing from `train_time`; if one is, it is the clock, or what happens while it stands."""
        calls = [validation.calls for validation in self.validations]
        usual = statistics.mode(calls[1:]) if len(calls) > 1 else 0
        for (step, _, milliseconds), validation in zip(lines, self.validations):
            missing = validation.cost - milliseconds / 1000
            if missing <= 1.5 * BATCH:
                continue
            unusual = [
                (number, count - (usual if number else 0))
                for number, count in enumerate(calls)
                if count > (usual if number else 0)
            ]
            if unusual:
                number, count = unusual[0]
                self.findings["learning"].append(
                    f"{count} calls of the model or the optimizer before the validation of step {lines[number][0]} "
                    "are not those of its steps, and not on the clock"
                )
            elif validation.changed:
                self.findings["learning"].append(
                    f"the weights changed before the validation of step {step}, and not on the clock"
                )
            else:
                shown = f"{milliseconds / 1000:.3f} s; what was done took {validation.cost:.3f} s"
                self.findings["clock"].append(f"train_time of step {step} is {shown}")
            return


class Asked:
    """A model in a run, as the questions above want it."""

    def __init__(self, model, evaluate):
        self.config, self.evaluate = model.config, evaluate


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


def contents(thing, name: str, seen: set):
    """Yields (name, value) of every tensor, copied, and every number and text in modules, containers and objects."""
    if isinstance(thing, torch.Tensor):
        if id(thing) not in seen:
            seen.add(id(thing))
            yield name, thing.detach().clone()
            yield f"{name}.grad", None if thing.grad is None else thing.grad.clone()
    elif isinstance(thing, torch.nn.Module):
        for key, tensor in (*thing.named_parameters(), *thing.named_buffers()):
            yield from contents(tensor, f"{name}.{key}", seen)
    elif isinstance(thing, dict):
        for i, (key, value) in enumerate(thing.items()):
            yield from contents(value, f"{name}.{key if isinstance(key, str | int) else i}", seen)
    elif isinstance(thing, list | tuple):
        yield f"the length of {name}", len(thing)
        for i, value in enumerate(thing):
            yield from contents(value, f"{name}[{i}]", seen)
    elif isinstance(thing, int | float | str | None):
        yield name, thing
    elif type(thing).__module__.startswith(("__main__", "torch.optim")) and id(thing) not in seen:
        seen.add(id(thing))
        yield from contents(vars(thing), name, seen)


def same(a, b) -> bool:
    """Whether two values are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.contiguous(), b.contiguous()
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*(x.view(-1).view(torch.uint8) for x in (a, b)))
    return type(a) is type(b) and a == b


COMPILER = ("torch.compiler.", "torch._dynamo.", "torch._functorch.", "torch._inductor.")
VARIABLE = re.compile(r"TORCH_?(INDUCTOR|DYNAMO|COMPILE|AOT)\w*")
# What else in the environment says how to compile, and with what.
ENVIRONMENT = re.compile(rf"{VARIABLE.pattern}|TRITON_\w+|NVCC_\w+|CXX|CC|(C|CXX|CPP|LD)FLAGS|PATH|LD_PRELOAD")
USUAL = {"backend": ("inductor",), "mode": (None, "default"), "options": (None,)}  # what torch.compile does unasked


class CompilerWatch:
    """Notes the flags that a script gives to the compiler from now on; torch.compile itself compiles nothing."""

    def __init__(self, path: Path):
        self.path, self.flags, self.by_torch = path, {}, set()
        self.before = self.state()
        set_attribute, watch = ConfigModule.__setattr__, self

        def compile(model=None, *, dynamic=None, fullgraph=False, disable=False, **flags):
            for name, value in flags.items():
                if value not in USUAL.get(name, ()):
                    watch.note(f"torch.compile({name}={value!r})")
            return (lambda model: model) if model is None else model

        def set_flag(module, name, value):
            set_attribute(module, name, value)
            if module.__name__.startswith(COMPILER) and not name.startswith("_"):
                watch.note(f"{module.__name__}.{name} = {value!r}")

        torch.compile, ConfigModule.__setattr__ = compile, set_flag

    def note(self, flag: str) -> None:
        """Notes a flag with the line that set it, unless PyTorch set it for itself."""
        between = {function.__code__.co_filename for function in (CompilerWatch.note, ConfigModule.patch)}
        stack = reversed(traceback.extract_stack())
        setter = next(frame for frame in stack if frame.filename not in between)
        if Path(torch.__file__).parent in Path(setter.filename).parents:
            self.by_torch.add(flag.partition(" = ")[0])
        else:
            file = "" if setter.filename == str(self.path) else f"{setter.filename} "
            self.flags.setdefault(f"{file}line {setter.lineno}", flag)

    @staticmethod
    def state() -> dict:
        """All flags: those of the compiler's modules, and the environment's."""
        modules = [m for name, m in sys.modules.items() if isinstance(m, ConfigModule) and name.startswith(COMPILER)]
        flags = {f"{m.__name__}.{key}": value for m in modules for key, value in m.get_config_copy().items()}
        return flags | {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}

    def findings(self) -> list[str]:
        """What was set, and by which line where that is known."""
        findings = [f"{where}: {flag}" for where, flag in self.flags.items()]
        known = {flag.partition(" = ")[0] for flag in self.flags.values()} | self.by_torch
        for name, value in self.state().items():
            # A module of flags that has been imported since is no change; a variable is.
            if name not in known and self.before.get(name, value if "." in name else None) != value:
                findings.append(f"{name} = {value!r}")
        return findings


PLAIN = ("dynamic", "fullgraph", "disable")  # words of torch.compile that are no flags for the compiler
MENTION = re.compile(  # of flags, in the text of a script or in a string of it
    r"\b_(?:inductor|dynamo|functorch)\W*(?:\.|import|'|\")\W*config\b|\b_inductor\b|\bconfig_patches\b"
    rf"|max-autotune|reduce-overhead|{VARIABLE.pattern}"
)


def words_of(call: ast.Call) -> list[ast.keyword]:
    """The keywords of a call, also those of a dictionary that is written out behind two stars."""
    words = []
    for word in call.keywords:
        entries = word.value
        if word.arg is None and isinstance(entries, ast.Dict):
            for key, value in zip(entries.keys, entries.values):
                words.append(ast.keyword(getattr(key, "value", None), value))
        elif word.arg is None and isinstance(entries, ast.Call) and ast.unparse(entries.func) == "dict":
            words += words_of(entries)
        else:
            words.append(word)
    return words


def flags_in_source(path: Path) -> dict[int, str]:
    """Mentions of compiler flags by line, also in what only a GPU runs."""
    flags = {}
    tree = ast.parse(path.read_bytes())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom):
            found = [ast.unparse(node)] * bool(MENTION.search(ast.unparse(node)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found = [node.value] * bool(MENTION.search(node.value))
        elif isinstance(node, ast.keyword) and node.arg:
            found = [ast.unparse(node)] * bool(MENTION.search(node.arg))
        elif isinstance(node, ast.Call):
            # torch.compile itself, or what is told to call it.
            for part in (node.func, *node.args):
                name = ast.unparse(part)
                if name.endswith("compile") and name != "re.compile":
                    found = [f"{name}({ast.unparse(word)})" for word in words_of(node) if not is_plain(word)]
                    break
        for flag in found:
            flags.setdefault(node.lineno, flag)
    return flags


def is_plain(word: ast.keyword) -> bool:
    """Whether a keyword of torch.compile says no more than what it does unasked."""
    if isinstance(word.value, ast.Constant) and word.value.value in USUAL.get(word.arg, ()):
        return True
    return word.arg in PLAIN


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
