"""Is an edit of train_gpt.py legal? What `logbook.py check` starts, in a process of its own.

    python records/legality.py SCRIPT CHECK...

It loads the script and applies the checks, on the CPU, uncompiled and in float32, and prints JSON, a line each: that it
has started, that the script is loaded, or a `problem` if it cannot be checked; then for every check its rule and the
`findings`: none if it passed. What the script itself prints is thrown away.

Three checks ask models about their losses: every preset's table of layers, built at the size of `tiny`. The others
watch short runs of `--preset tiny`, on one, two and four processes.
"""

import ast
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch.utils._config_module import ConfigModule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where command.py lies
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

from logbook import STREAMS
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
# The model: causal, normalized, documents
# ======================================================================================================================


class Subject:
    """A script under check: its models, and its runs, which all checks share."""

    def __init__(self, path: Path, folder: Path, checks: list[str]):
        self.path, self.folder, self.checks = path, folder, checks
        self.compiler = CompilerWatch(path)  # before the script is loaded
        self.script = load(path)

    def model(self, preset: str, **changes):
        """A model of a preset's table, at the size of `tiny` but for the changes, with random weights.

        At their start gates and factors are zero, and would hide what passes through them.
        """
        sizes = {name: getattr(self.script.PRESETS["tiny"].model, name) for name in SIZES}
        torch.manual_seed(0)
        model = self.script.GPT(replace(self.script.PRESETS[preset].model, **{**sizes, **changes}))
        for _, p in sorted(model.named_parameters()):  # by name: the same weights for every order of the parameters
            p.data += torch.randn_like(p) / min(p.shape[-2:]) ** 0.5
        return model

    @functools.cached_property
    def models(self) -> dict:
        return {preset: self.model(preset) for preset in self.script.PRESETS}

    def context(self, model, length: int, windows: tuple[int, int]):
        return self.script.make_context(model.config, length, windows, next(model.parameters()))

    @functools.cached_property
    def runs(self) -> "Runs":
        return Runs(self, (1, 2, 4) if "world_size" in self.checks else (1,))


WINDOWS = (5, 11)  # so small that in a short sequence every kind of layer has tokens beyond its window


def packed(lengths, config, seed: int = 0):
    """Inputs and targets of random documents of these lengths, with their BOS, and each token's document's number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.bos_id, (sum(lengths) + 1,), generator=generator)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens[:-1][numbers.diff(prepend=torch.tensor([-1])) > 0] = config.bos_id
    return tokens[:-1], tokens[1:], numbers


def another(tokens, config):
    """Other tokens in place of all of these; one may be BOS, or no longer be."""
    return (tokens + 1) % (config.bos_id + 1)


def evaluate(model, inputs, targets, context):
    losses = model.evaluate(inputs, targets, context)
    if losses.shape != inputs.shape:
        raise Problem(f"evaluate gives losses {tuple(losses.shape)} for tokens {tuple(inputs.shape)}")
    return losses


def difference(before, after) -> tuple[int, float] | None:
    """Where losses first differ that must not, and by how much. NaN differs from all."""
    wrong = (~((before - after).abs() <= EXACT)).nonzero()
    return (t := wrong[0].item(), (after - before)[t].item()) if len(wrong) else None


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
            before = evaluate(model, inputs, targets, context)
            for t in changed:
                others, other_targets = inputs.clone(), targets.clone()
                others[t] = another(inputs[t], model.config)
                other_targets[t:] = another(targets[t:], model.config)
                after = evaluate(model, others, other_targets, context)
                if found := difference(before[:t], after[:t]):
                    yield f"{preset}: changing token {t} changes the loss of position {found[0]} by {found[1]:.2g}"
        yield from causal_in_training(subject, preset, model)


@torch.no_grad()
def causal_in_training(subject: Subject, preset: str, model):
    """The objective is a sum; how it changes with one position's target depends on that position's logits alone."""
    inputs, targets, _ = packed((1, 2, 21, 16), model.config)
    context = subject.context(model, len(inputs), WINDOWS)
    for t in range(0, len(inputs) - 1, 5):
        other_targets, others = targets.clone(), inputs.clone()
        other_targets[t] = (targets[t] + 1) % model.config.vocab_size
        others[t + 1 :] = another(inputs[t + 1 :], model.config)
        before, after = (
            (model(x, other_targets, context).double() - model(x, targets, context).double()).item()
            for x in (inputs, others)
        )
        if not abs(before - after) <= 100 * EXACT:  # the sum's rounding
            yield f"{preset}: in training, changing the tokens after {t} changes the loss of position {t}"


def normalized(subject: Subject):
    """The probabilities of all tokens of the vocabulary sum to 1 at every position."""
    # The head is the same for all tables; a small vocabulary takes as many evaluations as it has tokens.
    model = subject.model("tiny", vocab_size=100, bos_id=99)
    vocab = model.config.padded_vocab
    inputs, targets, _ = packed((1, 6, 5), model.config)
    context = subject.context(model, len(inputs), WINDOWS)
    shifted = (evaluate(model, inputs, (targets + shift) % vocab, context) for shift in range(vocab))
    total = sum((-losses.double()).exp() for losses in shifted)
    for t, probability in enumerate(total.tolist()):
        if not abs(probability - 1) <= 1e-4:
            yield f"the probabilities of position {t} sum to {probability:.6g}"


def documents(subject: Subject):
    """No token of one document reaches another."""
    # Many are as short as a document can be; some begin or end where a window does.
    layouts = [(1, 1, 2, 1, 3, 9, 1, 17, 4), (5, 5, 1, 11, 2, 9, 6), (22, 1, 1, 10, 1)]
    for (preset, model), (seed, lengths) in itertools.product(subject.models.items(), enumerate(layouts)):
        inputs, targets, numbers = packed(lengths, model.config, seed)
        context = subject.context(model, len(inputs), WINDOWS)
        before = evaluate(model, inputs, targets, context)
        ends = list(itertools.accumulate(lengths))
        for number, end in enumerate(ends):
            own = slice(end - lengths[number] + 1, end)  # all but its BOS
            elsewhere = numbers != number
            for new in another(inputs[own], model.config), model.config.bos_id:  # other words; no words
                others = inputs.clone()
                others[own] = new
                after = evaluate(model, others, targets, context)
                if found := difference(before[elsewhere], after[elsewhere]):
                    t = elsewhere.nonzero()[found[0]].item()
                    yield (
                        f"{preset}: changing document {number} (tokens {own.start} to {end - 1}) changes the loss of "
                        f"position {t}, in document {numbers[t]}, by {found[1]:.2g}"
                    )


# ======================================================================================================================
# Short runs: validation, world_size, warm_up, compiler
# ======================================================================================================================

VAL_TOKENS, BATCH_TOKENS = 4096, 2048
OPTIONS = f"""--preset tiny --steps 6 --dim 32 --heads 2 --bigram-dim 16 --dtype float32 --run-id run --slices 4
    --val-tokens {VAL_TOKENS} --val-seq-len 1024 --val-every 1000 --train-files x_train_*.bin --val-files x_val_*.bin"""
LINE = re.compile(r"^step:(\d+)/\d+ (val|train)_loss:(\S+)", re.MULTILINE)


def random_stream(rng, tokens: int, bos: int) -> np.ndarray:
    """Documents of very different lengths and difficulty; one is longer than any sequence."""
    lengths = [1, 2, 1500, *rng.integers(1, 400, tokens // 100)]
    return np.concatenate([np.append(bos, rng.integers(rng.integers(1, bos), size=n - 1)) for n in lengths])[:tokens]


class Runs:
    """Runs of the script on 1 and more processes, all started at once, on data made for them."""

    def __init__(self, subject: Subject, sizes: tuple[int, ...]):
        self.folder, self.sizes = subject.folder, sizes
        rng, bos = np.random.default_rng(0), subject.script.PRESETS["tiny"].model.bos_id
        train, val = random_stream(rng, 30_000, bos), random_stream(rng, 2 * VAL_TOKENS, bos)
        # Forking spares the import of PyTorch.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.ranks = {}
        for size in sizes:
            folder = self.folder / str(size)
            folder.mkdir()
            write_shard(folder / "x_train_0.bin", train)
            # Validation goes on in a second shard, in the middle of a document, and that beyond what is read.
            write_shard(folder / "x_val_0.bin", val[:3000])
            write_shard(folder / "x_val_1.bin", val[3000:])
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                how = (subject.path, folder, val, size, server.getsockname()[1])
            ranks = [context.Process(target=run_rank, args=(rank, *how), daemon=True) for rank in range(size)]
            for process in ranks:
                process.start()
            self.ranks[size] = ranks

    def ended(self, size: int) -> Path:
        """The folder of the run on `size` processes, when it has ended. Raises Problem if it ended badly."""
        ranks = self.ranks[size]
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):  # the others would wait for it
                for process in ranks:
                    process.terminate()
            time.sleep(0.02)
        folder = self.folder / str(size)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        # First those that failed by themselves, not by the signal above.
        for rank in sorted(failed, key=lambda rank: ranks[rank].exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)):
            said = (folder / f"output_{rank}").read_text(errors="replace").strip()
            last = said.splitlines()[-1][:300] if said else "nothing"
            raise Problem(f"a run on {size} processes ended with status {ranks[rank].exitcode}; it said: {last}")
        return folder

    def losses(self, size: int) -> dict[tuple[int, str], float]:
        """The losses in the log of the run on `size` processes, by step and kind."""
        return {(int(step), kind): float(loss) for step, kind, loss in logged_losses(self.ended(size))}

    def found(self, check: str) -> list[str]:
        """What the run on one process found for a check."""
        return json.loads((self.ended(1) / "found.json").read_text())[check]


def logged_losses(folder: Path) -> list[tuple[str, str, str]]:
    return LINE.findall((folder / "logs" / "run.txt").read_text().rpartition("=" * 100)[2])


def run_rank(rank: int, path: Path, folder: Path, val: np.ndarray, size: int, port: int) -> None:
    """One process of a run. If it is the only one, it writes down what the checks want to know."""
    os.chdir(folder)
    output = os.open(f"output_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    compiler = CompilerWatch(path)
    script = load(path)
    settings = script.PRESETS["tiny"]
    *stages, extension = (replace(s, batch_tokens=BATCH_TOKENS) for s in (*settings.stages, settings.extension))
    script.PRESETS["tiny"] = replace(settings, stages=tuple(stages), extension=extension)
    warm_up, validation = WarmUpWatch(script), ValidationWatch(script)
    status = script.main(OPTIONS.split())
    if size == 1 and not status:
        logged = [float(loss) for _, kind, loss in logged_losses(folder) if kind == "val"]
        found = {
            "compiler": compiler.findings(),
            "warm_up": warm_up.findings,
            "validation": list(validation.findings(val, logged)),
        }
        Path("found.json").write_text(json.dumps(found))
    sys.exit(status)


class ValidationWatch:
    """Notes what a run's validations evaluate, and the losses that they get."""

    def __init__(self, script):
        self.calls, self.paused = [], False
        evaluate, warm_up = script.GPT.evaluate, script.warm_up

        def noting(model, inputs, targets, *args, **kwargs):
            losses = evaluate(model, inputs, targets, *args, **kwargs)
            if not self.paused:
                self.calls.append([x.detach().flatten().cpu().double().numpy() for x in (inputs, targets, losses)])
            return losses

        def unnoted(*args, **kwargs):
            self.paused = True
            warm_up(*args, **kwargs)
            self.paused = False

        script.GPT.evaluate, script.warm_up = noting, unnoted

    def findings(self, stream: np.ndarray, logged: list[float]):
        """What is wrong with validations on the first tokens of `stream`, of which the log has these losses."""
        empty = [np.zeros(0)] * 3
        inputs, targets, losses = (np.concatenate(arrays) for arrays in zip(empty, *self.calls))
        for name, seen, right in ("input", inputs, stream), ("target", targets, stream[1:]):
            seen = seen[:VAL_TOKENS]
            for t in np.flatnonzero(seen != right[: len(seen)])[:1]:
                yield f"{name} {t} of the first validation is {seen[t]:.0f}; in the stream it is {right[t]}"
        count = len(logged) * VAL_TOKENS
        if not len(inputs) == len(losses) == count:
            yield f"{len(logged)} validations on {VAL_TOKENS:,} tokens had {len(inputs):,} tokens, not {count:,}"
            return
        for number, (right, loss) in enumerate(zip(losses.reshape(-1, VAL_TOKENS).mean(1), logged)):
            if not abs(right - loss) <= LOGGED:
                yield f"validation {number} is logged as {loss}; the mean loss of its tokens is {right:.4f}"


def validation(subject: Subject):
    """Validation is the mean loss of every token of the whole, unchanged stream."""
    for preset, stream in STREAMS.items():
        settings = subject.script.PRESETS[preset]
        for name, given, right in zip(
            ("val_tokens", "val_files"), (settings.val_tokens, Path(settings.val_files).name), stream
        ):
            if given != right:
                yield f"{preset}: {name} is {given}, not {right}"
    yield from subject.runs.found("validation")


def world_size(subject: Subject):
    """The losses of a run are the same on one, two and four processes."""
    alone = subject.runs.losses(1)
    for size in subject.runs.sizes[1:]:
        together = subject.runs.losses(size)
        for step, kind in sorted(alone.keys() | together.keys()):
            one, more = alone.get((step, kind)), together.get((step, kind))
            if one is None or more is None or not abs(one - more) <= LOGGED:
                yield f"{kind}_loss of step {step} is {one} on one process, {more} on {size}"


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
    elif type(thing).__module__.startswith(("train_gpt", "torch.optim")) and id(thing) not in seen:
        seen.add(id(thing))
        yield from contents(vars(thing), name, seen)


class WarmUpWatch:
    """Compares all that the warm-up gets, and the random numbers to come, before and after it."""

    def __init__(self, script):
        self.findings = ["the run did not call warm_up"]
        warm_up = script.warm_up

        def state(args, kwargs):
            things = {type(thing).__name__: thing for thing in (*args, *kwargs.values())}
            return dict(contents({**things, "torch.get_rng_state()": torch.get_rng_state()}, "", set()))

        def watched(*args, **kwargs):
            before = state(args, kwargs)
            warm_up(*args, **kwargs)
            after = state(args, kwargs)
            names = before.keys() | after.keys()
            changed = [name for name in names if not same(before.get(name), after.get(name))]
            self.findings = [f"{name.strip('.')} is not what it was" for name in sorted(changed)]

        script.warm_up = watched


def same(a, b) -> bool:
    """Whether two values are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.contiguous(), b.contiguous()
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*(x.view(-1).view(torch.uint8) for x in (a, b)))
    return type(a) is type(b) and a == b


def warm_up(subject: Subject):
    """The warm-up leaves weights, gradients, optimizer and random numbers as they were, bit for bit."""
    yield from subject.runs.found("warm_up")


COMPILER = ("torch.compiler.", "torch._dynamo.", "torch._functorch.", "torch._inductor.")
VARIABLE = re.compile(r"TORCH_?(INDUCTOR|DYNAMO|COMPILE|AOT)\w*")
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
        return flags | {name: value for name, value in os.environ.items() if VARIABLE.match(name)}

    def findings(self) -> list[str]:
        """What was set, and by which line where that is known."""
        findings = [f"{where}: {flag}" for where, flag in self.flags.items()]
        known = {flag.partition(" = ")[0] for flag in self.flags.values()} | self.by_torch
        for name, value in self.state().items():
            # A module of flags that has been imported since is no change; a variable is.
            if name not in known and self.before.get(name, value if "." in name else None) != value:
                findings.append(f"{name} = {value!r}")
        return findings


def flags_in_source(path: Path) -> dict[int, str]:
    """Mentions of compiler flags by line, also in what only a GPU runs."""
    flags = {}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom):
            found = re.findall(r".*\b_(?:inductor|dynamo|functorch)(?:\.| import )config\b.*", ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value] * bool(VARIABLE.fullmatch(node.value))
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)).endswith("compile"):
            found = [f"{name}({ast.unparse(word)})" for word in node.keywords if word.arg in ("mode", "options")]
        else:
            continue
        for flag in found:
            flags.setdefault(node.lineno, flag)
    return flags


def compiler(subject: Subject):
    """No flags for torch.compile and what is below it."""
    found = dict.fromkeys(subject.compiler.findings() + subject.runs.found("compiler"))
    yield from found
    lines = {finding.partition(":")[0] for finding in found}
    for line, flag in sorted(flags_in_source(subject.path).items()):
        if f"line {line}" not in lines:
            yield f"line {line}: {flag}"


CHECKS = {check.__name__: check for check in (causal, normalized, documents, validation, world_size, warm_up, compiler)}


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
            try:
                findings = list(itertools.islice(CHECKS[name](subject), MOST))
            except Problem as problem:
                findings = [str(problem)]
            except Exception as error:
                findings = [explain(error, path)]
            answer(check=name, rule=CHECKS[name].__doc__.split("\n")[0], findings=findings)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
