"""The optimizer track: one architecture, one order of the data, one batch, any optimizer; fewest steps to the target.

`python train.py --optimizer muon` trains on FineWeb on one GPU, `--laptop` on the embedded corpus on any CPU. To add an
optimizer, write one function in the section Optimizers; its keyword parameters become options. Shards, validation and
log are those of train_gpt.py. Importing this file has no side effects.
"""

import os
import signal
import sys

if __name__ == "__main__":  # what is imported next takes seconds: Ctrl-C ends that without a traceback
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import argparse
import glob
import hashlib
import inspect
import json
import math
import resource
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from subprocess import getoutput

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(Exception):
    """A mistake of the user's: its text says what is wrong and what to do, and is all that is printed."""


# ---- Optimizers ------------------------------------------------------------------------------------------------------
# An optimizer is a function of the parameters that returns torch.optim.Optimizers, which together have each parameter
# once. `hidden` are the weight matrices (out, in) of the blocks, `rest` all others by kind: "embed", "head", "vectors".
# The trainer multiplies the lr of every group by one schedule, `Settings.lr_factor`.

OPTIMIZERS = {}  # by name


def optimizer(function):
    """Makes a function known by its name to `--optimizer`, and its keyword parameters as options with defaults."""
    OPTIMIZERS[function.__name__] = function
    return function


class PerMatrix(torch.optim.Optimizer):
    """Each step: p <- p - lr * weight_decay * p - lr * update(gradient, state), `state` a matrix's own dict.

    With `cautious` only the numbers decay that the update brings closer to 0, too. A row of the update, a neuron, has
    at least `floor` times the norm of its weights.
    """

    def __init__(self, matrices: list[Tensor], update, lr: float, weight_decay: float, cautious=False, floor=0.0):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.update, self.cautious, self.floor = update, cautious, floor

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                change = self.update(p.grad, self.state[p])
                if self.floor > 0:
                    weights, size = (each.norm(dim=1, keepdim=True) for each in (p, change))
                    change *= (self.floor * weights / size.clamp(min=1e-10)).clamp(min=1)
                decays = change * p > 0 if self.cautious else 1
                p.sub_(group["lr"] * group["weight_decay"] * decays * p).sub_(change, alpha=group["lr"])


class Ahead(PerMatrix):
    """PerMatrix with gradients taken ahead of the weights, `ahead` times the mean of their moves so far (EMA-Nesterov).

    `memory` is the mean's decay. Between steps the parameters are where the gradient is to be taken. How far ahead
    falls with the learning rate, to nothing at the end, where the model is validated.
    """

    def __init__(self, *arguments, ahead: float, memory: float):
        super().__init__(*arguments)
        self.ahead, self.memory = ahead, memory
        self.paths = {}  # of each matrix, where its weights are, and the mean of their moves

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.paths.setdefault(p, (p.clone(), torch.zeros_like(p)))
        super().step()
        for group in self.param_groups:
            ahead = self.ahead * group["lr"] / group.get("initial_lr", group["lr"])
            for p in group["params"]:
                place, mean = self.paths[p]
                mean.lerp_(p - place, 1 - self.memory)
                place.copy_(p)
                p.add_(mean, alpha=ahead)


def adamw_for_rest(rest: dict[str, list[Tensor]], scale: float) -> torch.optim.Optimizer:
    """AdamW with the learning rates that the public track found for these parameters beside Muon, times `scale`."""
    rates = {"embed": 0.7, "head": 0.004, "vectors": 0.015}  # vectors: gains and biases
    groups = [{"params": rest[kind], "lr": scale * lr} for kind, lr in rates.items()]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, fused=True)


@optimizer
def adamw(hidden, rest, lr=0.0015, weight_decay=0.125, beta1=0.9, beta2=0.95, rest_lr=1.0):
    """PyTorch's AdamW (arXiv 1711.05101)."""
    adam = torch.optim.AdamW(hidden, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
    return [adam, adamw_for_rest(rest, rest_lr)]


@optimizer
def muon(hidden, rest, lr=0.025, weight_decay=0.05, momentum=0.95, rest_lr=1.0):
    """PyTorch's Muon: momentum, orthogonalized by Newton-Schulz; a step of sqrt(max(1, out / in)) times lr."""
    matrices = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum)
    return [matrices, adamw_for_rest(rest, rest_lr)]


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, but for singular values below a thousandth of its norm, by Newton-Schulz."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(x) > x.size(1) else x  # the product with its transpose is the smaller one for a wide matrix
    for _ in range(12):  # 2 s - 1.5 s^3 + 0.5 s^5 takes every singular value s of (0, 1] closer to 1
        gram = x @ x.T
        x = 2 * x + (0.5 * gram @ gram - 1.5 * gram) @ x
    return x.T if len(matrix) > matrix.size(1) else x


@optimizer
def normuon(hidden, rest, lr=0.025, weight_decay=0.05, momentum=0.95, beta2=0.95, rest_lr=1.0):
    """NorMuon (arXiv 2510.05491): Muon with each row, a neuron, divided by the root of its mean square so far."""

    return [PerMatrix(hidden, normuon_update(momentum, beta2), lr, weight_decay), adamw_for_rest(rest, rest_lr)]


def normuon_update(momentum: float, beta2: float):
    def update(grad: Tensor, state: dict) -> Tensor:
        if not state:
            state.update(momentum=torch.zeros_like(grad), square=grad.new_zeros(len(grad), 1))
        average = state["momentum"].lerp_(grad, 1 - momentum)
        orthogonal = orthogonalize(grad.lerp(average, momentum))  # Nesterov's momentum
        square = state["square"].lerp_(orthogonal.square().mean(1, keepdim=True), 1 - beta2)
        scaled = orthogonal / square.clamp(min=1e-10).sqrt()
        scaled *= orthogonal.norm() / scaled.norm().clamp(min=1e-10)  # back to the norm that it had
        return scaled * math.sqrt(max(1, len(grad) / grad.size(1)))

    return update


@optimizer
def soap(hidden, rest, lr=0.003, weight_decay=0.01, beta1=0.95, beta2=0.95, eps=1e-8, frequency=10, rest_lr=1.0):
    """SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's two factors, turned on every `frequency` updates."""

    def update(grad: Tensor, state: dict) -> Tensor:
        if not has_basis(grad, state, beta2):
            return torch.zeros_like(grad)
        average = state["momentum"].lerp_(grad, 1 - beta1)  # kept outside the basis, which turns
        unbiased = average / (1 - beta1 ** (state["count"] + 1))
        return scaled_in_basis(unbiased, grad, state, beta2, eps, frequency)

    return [PerMatrix(hidden, update, lr, weight_decay), adamw_for_rest(rest, rest_lr)]


def has_basis(grad: Tensor, state: dict, beta2: float) -> bool:
    """Whether a matrix has SOAP's basis. The first gradient only begins it, as in the authors' code: there its own
    form is diagonal."""
    if not state and grad.any():
        left, right = (1 - beta2) * grad @ grad.T, (1 - beta2) * grad.T @ grad  # (out, out), (in, in)
        # Largest eigenvalue first: that is the order in which power iteration keeps the vectors.
        rows, columns = (torch.linalg.eigh(factor).eigenvectors.flip(1) for factor in (left, right))
        state.update(left=left, right=right, rows=rows, columns=columns, count=0)
        state.update(momentum=torch.zeros_like(grad), square=torch.zeros_like(grad))
        return False
    return bool(state)


def scaled_in_basis(
    direction: Tensor, grad: Tensor, state: dict, beta2: float, eps: float, frequency: int
) -> Tensor:
    """A direction divided, in SOAP's basis, by the root of the gradients' mean square there; updates the basis."""
    rows, columns, count = state["rows"], state["columns"], state["count"] + 1
    square = state["square"].lerp_((rows.T @ grad @ columns).square(), 1 - beta2)
    scaled = rows.T @ direction @ columns / ((square / (1 - beta2**count)).sqrt() + eps)
    left, right = state["left"].lerp_(grad @ grad.T, 1 - beta2), state["right"].lerp_(grad.T @ grad, 1 - beta2)
    state["count"] = count
    if count % frequency == 0:
        state.update(rows=torch.linalg.qr(left @ rows).Q, columns=torch.linalg.qr(right @ columns).Q)
    return rows @ scaled @ columns.T


@optimizer
def soap_muon(
    hidden, rest, lr=0.025, weight_decay=0.05, momentum=0.95, beta2=0.95, eps=1e-8, frequency=1, floor=0.35, rest_lr=1.0
):
    """SOAP's scaling, then Muon's orthogonalization, with row floors and cautious decay: modded-nanogpt's pull
    requests 278, 321 and 328."""

    def update(grad: Tensor, state: dict) -> Tensor:
        if not has_basis(grad, state, beta2):
            return torch.zeros_like(grad)
        average = state["momentum"].lerp_(grad, 1 - momentum)
        scaled = scaled_in_basis(grad.lerp(average, momentum), grad, state, beta2, eps, frequency)
        return orthogonalize(scaled) * math.sqrt(max(1, len(grad) / grad.size(1)))

    matrices = PerMatrix(hidden, update, lr, weight_decay, cautious=True, floor=floor)
    return [matrices, adamw_for_rest(rest, rest_lr)]


@optimizer
def ema_nesterov(
    hidden, rest, lr=0.025, weight_decay=0.05, momentum=0.95, beta2=0.95, ahead=0.6, memory=0.99, rest_lr=1.0
):
    """NorMuon with EMA-Nesterov's look ahead (arXiv 2605.25395, modded-nanogpt's pull request 308)."""
    update = normuon_update(momentum, beta2)
    return [Ahead(hidden, update, lr, weight_decay, ahead=ahead, memory=memory), adamw_for_rest(rest, rest_lr)]


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    preset: str = "fineweb"  # this and the next seven are the track's, and not for the command line
    vocab_size: int = 50257
    fetch: str = "python data/cached_fineweb10B.py 40"  # the command that gets the shards
    layers: int = 12
    dim: int = 768
    head_dim: int = 128
    context: int = 1024  # tokens of a sequence, in training and in validation
    batch_tokens: int = 524_288  # of a step
    hyperparameters: dict[str, float] = field(default_factory=dict)  # of the optimizer
    optimizer: str = "muon"
    steps: int = setting(3250, "optimizer steps")
    warmup: float = setting(0.02, "fraction of the steps over which the learning rate rises")
    cooldown: float = setting(0.7, "fraction of the steps, at the end, over which it falls to 0")
    target: float = setting(3.28, "the log says at its end which validation first reached this loss; it stops nothing")
    seed: int = setting(1, "seed of the initial weights, and of nothing else")
    micro_batch: int = setting(32, "at most so many sequences at once; fewer need less memory")
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "pattern of the training shards")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "pattern of the validation shards")
    val_tokens: int = setting(10_485_760, "tokens to validate on, from the start of the stream")
    val_every: int = setting(125, "steps between validations")
    run_id: str = setting("", "name of the log (default: made from the date and the optimizer)")

    def lr_factor(self, step: int) -> float:
        """What all learning rates of a step, from 0, are multiplied with: up to 1, constant, linearly towards 0."""
        rise = (step + 1) / max(self.warmup * self.steps, 1)
        return min(1, rise, (self.steps - step) / max(self.cooldown * self.steps, 1))


LAPTOP = Settings(
    *("laptop", 257, "python data/embedded.py", 4, 128, 64, 256, 2048),
    **{"steps": 500, "micro_batch": 8, "val_tokens": 131_072, "target": 0.0},
    **{"train_files": "data/sympy/sympy_train_*.bin", "val_files": "data/sympy/sympy_val_*.bin"},
)


def rotate(x: Tensor) -> Tensor:
    """Half-truncated rotary embedding of x (B, H, T, d): of the pairs (i, i + d/2) the first half turns."""
    dtype, d = torch.promote_types(x.dtype, torch.float32), x.size(-1)
    frequencies = (1 / 1024) ** torch.linspace(0, 1, d // 4, dtype=dtype, device=x.device)
    angles = torch.arange(x.size(2), dtype=dtype, device=x.device)[:, None] * F.pad(frequencies, (0, d // 4))
    cos, sin, (a, b) = angles.cos(), angles.sin(), x.to(dtype).chunk(2, dim=-1)  # (T, d/2), (B, H, T, d/2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each reading a normalized copy of the residual stream and adding to the stream."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v, self.attn_out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        h = self.norm_1(x)
        q, k, v = (linear(h).view(B, T, -1, self.head_dim).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (rotate(F.rms_norm(a, (self.head_dim,))) for a in (q, k))  # (B, H, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_out(self.mlp_in(self.norm_2(x)).relu().square())


class GPT(nn.Module):
    """The track's model. The softmax runs over the vocabulary's padding too."""

    def __init__(self, settings: Settings):
        super().__init__()
        padded_vocab = math.ceil(settings.vocab_size / 128) * 128
        self.embed, self.head = nn.Embedding(padded_vocab, settings.dim), nn.Linear(settings.dim, padded_vocab)
        self.blocks = nn.ModuleList(Block(settings.dim, settings.head_dim) for _ in range(settings.layers))
        self.norm_1, self.norm_2 = nn.RMSNorm(settings.dim), nn.RMSNorm(settings.dim)
        for name, p in self.named_parameters():
            if name.endswith("bias") or "_out." in name or "head." in name:  # so the blocks start as the identity
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=1 if "embed" in name else (3 * p.size(1)) ** -0.5)

    def forward(self, sequences: Tensor) -> Tensor:
        """Cross-entropy (B, T), in nats, of every token of `sequences` (B, T + 1) but the first."""
        with torch.autocast("cuda", torch.bfloat16, enabled=sequences.is_cuda):  # parameters stay float32
            x = self.norm_1(self.embed(sequences[:, :-1]))
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm_2(x))
        logits = logits.to(self.head.weight.dtype).flatten(0, 1)
        logits = 15 * logits * (logits.square() + 15**2).rsqrt()
        return F.cross_entropy(logits, sequences[:, 1:].flatten(), reduction="none").view(len(sequences), -1)

    def make_optimizers(self, settings: Settings) -> list[torch.optim.Optimizer]:
        """What the named optimizer makes of the parameters; each group remembers its lr as `initial_lr`."""
        hidden = [p for p in self.blocks.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        rest = {"embed": [self.embed.weight], "head": [self.head.weight], "vectors": vectors}
        made = OPTIMIZERS[settings.optimizer](hidden, rest, **settings.hyperparameters)
        groups = [group for each in made for group in each.param_groups]
        if sorted(id(p) for group in groups for p in group["params"]) != sorted(map(id, self.parameters())):
            raise UserError(f"optimizer {settings.optimizer} leaves parameters out, or has some twice")
        for group in groups:
            group["initial_lr"] = group["lr"]
        return made


def read_shards(pattern: str, count: int, settings: Settings) -> tuple[Tensor, dict[str, int]]:
    """The first `count` tokens, uint16, of the stream that the shards of a pattern are in name order; all sizes."""
    parts, sizes = [], {}
    for path in sorted(glob.glob(pattern)):  # 1,024 bytes of header and the tokens each
        header, size = np.fromfile(path, "<i4", 256).tolist(), os.path.getsize(path)
        if header[:2] != [20240520, 1] or size < 1024 or size != 1024 + 2 * header[2]:
            what = f"{size} bytes, beginning with {header[:3]}; expected 1024 + 2 n, beginning with 20240520, 1, n"
            raise UserError(f"{path}: no whole token shard: {what}")
        parts.append(np.fromfile(path, "<u2", min(max(count - sum(sizes.values()), 0), header[2]), offset=1024))
        sizes[path] = header[2]
        if (largest := parts[-1].max(initial=0)) >= settings.vocab_size:
            raise UserError(f"{path}: token {largest} is outside the vocabulary of {settings.vocab_size} tokens")
    if (total := sum(sizes.values())) < count:
        have = f"{len(sizes)} shards with {total:,} tokens, the run needs {count:,}"
        raise UserError(f"{pattern}: {have}; get them with: {settings.fetch}")
    return torch.from_numpy(np.concatenate(parts)), sizes


def open_log(settings: Settings, data: dict[str, dict[str, int]]):
    """Begins `logs/<run id>.txt` as train_gpt.py does: source, environment, settings, data. Returns the file."""
    source, triton = Path(__file__).read_bytes(), sys.modules.get("triton")
    git = f"git -C '{Path(__file__).parent}'"
    commit, changes = (getoutput(f"{git} {what} 2>/dev/null") for what in ("rev-parse HEAD", "status --porcelain"))
    cpu = getoutput("grep -m1 'model name' /proc/cpuinfo 2>/dev/null").partition(": ")[2]
    hardware = f"{cpu or os.uname().machine}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware = f"1 x {torch.cuda.get_device_name()}\n{getoutput('nvidia-smi')}"
    text = "=" * 100 + f"\nsource: {len(source)} bytes, sha256 {hashlib.sha256(source).hexdigest()}\n"
    text += f"python: {sys.version.split()[0]}\npytorch: {torch.__version__}\ncuda: {torch.version.cuda or 'none'}\n"
    text += f"triton: {triton.__version__ if triton else 'none'}\nhardware: {hardware}\nworld size: 1\n"
    text += f"git: {commit} {'dirty' if changes else 'clean'}\n" if commit else "git: none\n"
    text += f"settings: {json.dumps(asdict(settings))}\n"
    text += "".join(f"data: {part} {path} {n:,} tokens\n" for part in data for path, n in data[part].items())
    os.makedirs("logs", exist_ok=True)
    name = time.strftime(f"%Y%m%d-%H%M%S-{settings.optimizer}")
    file = open(f"logs/{settings.run_id or name}.txt", "xb", buffering=0)
    file.write(source + (text + "=" * 100 + "\n").encode())
    return file


def show(text: str = "") -> None:
    """Prints a line; when nobody reads any more, that and what follows goes nowhere, and the run goes on."""
    try:
        print(text, end="\n" if text else "", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def peak_memory() -> str:
    """The log's last line. On the CPU both numbers are the process's largest resident set."""
    sizes = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    if not torch.cuda.is_available():
        sizes = 2 * [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)]
    return "peak memory allocated: {} MiB reserved: {} MiB".format(*(size >> 20 for size in sizes))


def mean_loss(model: nn.Module, tokens: Tensor, settings: Settings, device: torch.device) -> float:
    """Mean cross-entropy, nats per token, of all but the first of tokens (n * context + 1,); adds up its gradients."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in tokens.unfold(0, settings.context + 1, settings.context).split(settings.micro_batch):
        loss = model(part.to(device, torch.long)).sum() / (len(tokens) - 1)
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total.item()  # waits for the device


def train(settings: Settings) -> int:
    """The whole run: set-up, an untimed warm-up, and the loop of steps and validations. Returns the exit status."""
    batch = settings.batch_tokens  # one token more than below: the last one is only a target
    stream, train_sizes = read_shards(settings.train_files, settings.steps * batch + 1, settings)
    val_stream, val_sizes = read_shards(settings.val_files, settings.val_tokens + 1, settings)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.use_deterministic_algorithms(not cuda)
    torch.manual_seed(settings.seed)
    gpt = GPT(settings).to(device)
    optimizers = gpt.make_optimizers(settings)
    model = torch.compile(gpt, dynamic=False) if cuda else gpt  # on a CPU it takes as long as short runs
    file = open_log(settings, {"train": train_sizes, "val": val_sizes})

    def log(text: str) -> None:
        file.write(text.encode() + b"\n")
        show(text)

    signals: list[int] = []  # the loop sees to the first after its step; a second one ends the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number) or signal.signal(number, signal.SIG_DFL))
    elapsed = loss = 0.0
    reached = []  # the validations at which the loss was at most the target
    for step in range(settings.steps + 1):
        progress = f"step:{step}/{settings.steps}"
        timing = f"train_time:{elapsed:.0f}ms step_avg:{elapsed / max(step, 1):.2f}ms"
        if step > 0:
            log(f"{progress} train_loss:{loss:.4f} {timing}")
        if math.isfinite(loss) and (step == settings.steps or step % settings.val_every == 0):
            with torch.no_grad():
                loss = mean_loss(model, val_stream, settings, device)
            log(f"{progress} val_loss:{loss:.4f} {timing}")
            reached += [step] if loss <= settings.target else []
        if not math.isfinite(loss):
            log(f"loss is not finite: step {step}")
            return 3
        if signals:
            log(f"stopped by a signal after step {step}")
            return 128 + signals[0]
        if step == settings.steps:
            log(f"target {settings.target:g}: " + (f"first reached at step {reached[0]}" if reached else "not reached"))
            log(peak_memory())
            return 0
        begin = time.perf_counter()
        gpt.zero_grad()
        loss = mean_loss(model, stream[step * batch : (step + 1) * batch + 1], settings, device)
        if math.isfinite(loss):  # else the loop ends; eigenvectors of NaN would be another error
            for each in optimizers:
                for group in each.param_groups:
                    group["lr"] = group["initial_lr"] * settings.lr_factor(step)
                each.step()
        elapsed += 1000 * (time.perf_counter() - begin)


def parse_arguments(arguments: list[str]) -> Settings:
    """The settings that the command line asks for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--laptop", action="store_true", help="a small model on the embedded corpus")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="muon", help="its parameters are options too")
    chosen, about = parser.parse_known_args(arguments)[0], __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, parents=[parser], allow_abbrev=False, exit_on_error=False)
    preset, name = LAPTOP if chosen.laptop else Settings(), chosen.optimizer
    signature = inspect.getfullargspec(OPTIMIZERS[name])
    defaults = dict(zip(signature.args[2:], signature.defaults or ()))
    options = [(f.name, f.type, getattr(preset, f.name), f.metadata["help"]) for f in fields(Settings) if f.metadata]
    options += [(key, type(default), default, f"hyperparameter of {name}") for key, default in defaults.items()]
    for key, kind, default, text in options:
        text += f" (default: {default})" if default != "" else ""
        parser.add_argument("--" + key.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=text)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown option {unknown[0]} (--optimizer {name} --help lists the options)")
    given = {key: value for key, value in vars(parsed).items() if key != "laptop"}
    hyperparameters = {key: given.pop(key, default) for key, default in defaults.items()}
    settings = replace(preset, **given, hyperparameters=hyperparameters)
    smallest = min(settings.steps, settings.micro_batch, settings.val_every, settings.val_tokens)
    if smallest < 1 or settings.val_tokens % settings.context:
        raise UserError(f"numbers must be at least 1, and --val-tokens a multiple of {settings.context}")
    return settings


def main(arguments: list[str]) -> int:
    """Runs the command line. Exit status: 0 done, 2 a user's mistake, 3 the loss is not finite, 128 + the signal."""
    try:
        return train(parse_arguments(arguments))
    except (UserError, argparse.ArgumentError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        hint = "; try a lower --micro-batch" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"train.py: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(sys.argv[1:]))
    finally:
        show()  # what --help has printed, say
