"""Short runs of a script under check, of `--preset tiny`, on data made for them, and what they show.

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
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
import types
from collections import defaultdict
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compiler_flags import CompilerWatch
from questions import Problem, false_probabilities, leaks_between_documents, leaks_from_later, shake
from shards import write_shard

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

    def __init__(self, path: Path, folder: Path, settings, checks: set[str]):
        """Starts what the checks need of the script at `path`, whose preset `tiny` is `settings`, in `folder`."""
        self.folder = folder
        self.processes = {}
        steps = max(STEPS, len(settings.stages) + 2)
        # Forking spares the import of PyTorch.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for name in [name for name, needing in RUNS.items() if needing & checks]:
            place = folder / name
            place.mkdir()
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
                write_shard(place / f"x_train_{number}.bin", train)
            # Validation goes on in a second shard, in the middle of a document, and that beyond what is read.
            write_shard(place / "x_val_0.bin", val[:3000])
            write_shard(place / "x_val_1.bin", val[3000:])
            size = 2 if name == "two" else 1
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
                how = (name, path, place, steps, checks, val, size, server.getsockname()[1])
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
        return list(dict.fromkeys(each for name in names for each in self.facts(name)["findings"].get(check, [])))


def logged_losses(folder: Path) -> list[tuple[int, str, float, int]]:
    text = (folder / "logs" / "run.txt").read_text().rpartition("=" * 100)[2]
    return [(int(step), kind, float(loss), int(time)) for step, kind, loss, time in LINE.findall(text)]


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
        self.findings = defaultdict(list)  # by check
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
