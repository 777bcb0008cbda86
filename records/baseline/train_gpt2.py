"""Train GPT-2 as OpenAI and llm.c have it: the baseline that the speedrun is measured against.

`python train_gpt2.py` trains the model of 124M parameters on FineWeb, under torchrun on several GPUs; `--tiny` a small
one on any CPU. Shards, validation and log are those of train_gpt.py. Importing this file has no side effects.
"""

import os
import signal
import sys

if __name__ == "__main__":  # what is imported next takes seconds: Ctrl-C ends that without a traceback
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import glob
import hashlib
import json
import math
import re
import resource
import shutil
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from subprocess import getoutput

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    preset: str = "gpt2"
    vocab_size: int = 50257  # its last token begins every document
    fetch: str = "python data/cached_fineweb10B.py"  # the command that gets the shards
    layers: int = 12
    heads: int = 12
    dim: int = 768
    context: int = setting(1024, "tokens of a sequence, in training and in validation")
    steps: int = setting(19_073, "optimizer steps")
    warmup_steps: int = setting(715, "steps over which the learning rate rises; follows --steps in proportion")
    lr: float = setting(6e-4, "highest learning rate; a cosine brings it down to a tenth")
    batch_tokens: int = setting(524_288, "tokens of a step, over all processes")
    micro_batch: int = setting(32, "at most so many sequences at once; fewer need less memory")
    epochs: int = setting(1, "times to go over the training shards")
    seed: int = setting(1, "seed of the initial weights")
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "pattern of the training shards")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "pattern of the validation shards")
    val_tokens: int = setting(10_485_760, "tokens to validate on, from the start of the stream")
    val_every: int = setting(250, "steps between validations, HellaSwag and samples")
    hellaswag: str = setting("", "file of HellaSwag's items, JSONL (default: none)")
    sample_tokens: int = setting(64, "tokens of a sample of the model's text; 0 for none")
    dtype: str = setting("auto", "auto, bfloat16 (autocast) or float32 (auto: bfloat16 where the hardware has it)")
    compile: bool = setting(True, "compile with torch.compile")
    run_id: str = setting("", "name of the log (default: made from the date)")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 0: a linear rise, then half a cosine down to a tenth."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        t = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2)


TINY = Settings(  # as many matrix parameters as preset mini of train_gpt.py, to half a percent, and as many layers
    *("tiny", 257, "python data/embedded.py"),
    **{"layers": 5, "heads": 4, "dim": 248, "steps": 370, "warmup_steps": 14, "batch_tokens": 8192, "micro_batch": 8},
    **{"train_files": "data/sympy/sympy_train_*.bin", "val_files": "data/sympy/sympy_val_*.bin", "val_tokens": 524_288},
)


class UserError(Exception):
    """A mistake of the user's: its text says what is wrong and what to do, and is all that is printed."""


class Block(nn.Module):
    """Attention and MLP, each reading a normalized copy of the residual stream and adding to the stream."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn_in, self.attn_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.attn_in(self.ln_1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2. The output matrix is the token embedding; the softmax runs over the vocabulary's padding too."""

    def __init__(self, settings: Settings, autocast: bool = False):
        super().__init__()
        self.settings, self.autocast = settings, autocast  # autocast: products in bfloat16, parameters still float32
        self.wte = nn.Embedding(math.ceil(settings.vocab_size / 128) * 128, settings.dim)
        self.wpe = nn.Embedding(settings.context, settings.dim)
        self.blocks = nn.ModuleList(Block(settings.dim, settings.heads) for _ in range(settings.layers))
        self.ln_f = nn.LayerNorm(settings.dim)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # a block adds to the stream twice; so scaled, the sum does not grow with the blocks
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * settings.layers) if "_out." in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, T, padded vocabulary) of the tokens that follow `inputs` (B, T)."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.wte(inputs) + self.wpe.weight[: inputs.size(1)]
            for block in self.blocks:
                x = block(x)
            return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, sequences: Tensor) -> Tensor:
        """Cross-entropy (B, T), in nats, of every token of `sequences` (B, T + 1) but the first."""
        logits = self.logits(sequences[:, :-1]).to(self.wte.weight.dtype).flatten(0, 1)
        return F.cross_entropy(logits, sequences[:, 1:].flatten(), reduction="none").view(len(sequences), -1)

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW. As in llm.c, matrices and embeddings decay; biases and LayerNorm's gains do not."""
        decayed, others = ([p for p in self.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False))
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def choose_ending(self, prompt: list[int], endings: list[list[int]]) -> int:
        """HellaSwag: the number of the ending whose tokens have the lowest mean loss after the prompt."""
        context, device = self.settings.context, self.wte.weight.device
        rows = [torch.tensor([(prompt + ending)[-context - 1 :]], device=device) for ending in endings]
        losses = [self(row)[0, -len(ending) :].mean() for row, ending in zip(rows, endings)]
        return int(torch.stack(losses).argmin())

    def sample(self) -> list[int]:
        """Tokens that the model writes from a document's beginning on, each one of the 50 likeliest."""
        tokens = torch.tensor([[self.settings.vocab_size - 1]], device=self.wte.weight.device)
        generator = torch.Generator(tokens.device).manual_seed(self.settings.seed)
        for _ in range(self.settings.sample_tokens):
            top = self.logits(tokens[:, -self.settings.context :])[0, -1, : self.settings.vocab_size].float().topk(50)
            choice = top.indices[torch.multinomial(top.values.softmax(0), 1, generator=generator)]
            tokens = torch.cat((tokens, choice[None]), dim=1)
        return tokens[0, 1:].tolist()


def find_shards(pattern: str, fetch: str) -> dict[str, int]:
    """The shards of a pattern, in name order, each with its number of tokens: 1,024 bytes of header, uint16 tokens."""
    sizes = {}
    for path in sorted(glob.glob(pattern)):
        header, size = np.fromfile(path, "<i4", 256).tolist(), os.path.getsize(path)
        if header[:2] != [20240520, 1] or size < 1024 or size != 1024 + 2 * header[2]:
            what = f"{size} bytes, beginning with {header[:3]}; expected 1024 + 2 n, beginning with 20240520, 1, n"
            raise UserError(f"{path}: no whole token shard: {what}")
        sizes[path] = header[2]
    if not sizes:
        raise UserError(f"no shards match {pattern}; get them with: {fetch}")
    return sizes


def read_tokens(sizes: dict[str, int], start: int, count: int, vocab_size: int) -> Tensor:
    """`count` tokens, int64, from position `start` on of the stream that shards are, one after the other."""
    parts = []
    for path, size in sizes.items():
        if count and start < size:
            parts.append(np.fromfile(path, "<u2", min(count, size - start), offset=1024 + 2 * start))
            start, count = start + len(parts[-1]), count - len(parts[-1])
            if (largest := parts[-1].max()) >= vocab_size:
                raise UserError(f"{path}: token {largest} is outside the vocabulary of {vocab_size} tokens")
        start = max(start - size, 0)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def load_tokenizer(preset: str):
    """The functions from text to tokens and back: bytes, or GPT-2's vocabulary, which is downloaded once."""
    if preset == "tiny":
        return lambda text: list(text.encode()), lambda tokens: bytes(t % 256 for t in tokens).decode(errors="replace")
    tokenizer = tiktoken.get_encoding("gpt2")
    return tokenizer.encode_ordinary, tokenizer.decode


def load_hellaswag(path: str, encode) -> list[tuple[list[int], list[list[int]], int]]:
    """HellaSwag's items: tokens of the context, tokens of each ending, number of the right ending."""
    try:
        items = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        return [(encode(i["ctx"]), [encode(" " + end) for end in i["endings"]], int(i["label"])) for i in items]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--hellaswag {path}: {type(error).__name__}: {error}") from None


def open_log(settings: Settings, size: int, data: dict[str, dict[str, int]]):
    """Begins `logs/<run id>.txt` as train_gpt.py does: source, environment, settings, data. Returns the file."""
    source, triton = Path(__file__).read_bytes(), sys.modules.get("triton")
    git = f"git -C '{Path(__file__).parent}'"
    commit, changes = (getoutput(f"{git} {what} 2>/dev/null") for what in ("rev-parse HEAD", "status --porcelain"))
    cpu = getoutput("grep -m1 'model name' /proc/cpuinfo 2>/dev/null").partition(": ")[2]
    hardware = f"{cpu or os.uname().machine}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware = f"{size} x {torch.cuda.get_device_name()}\n{getoutput('nvidia-smi')}"
    text = "=" * 100 + f"\nsource: {len(source)} bytes, sha256 {hashlib.sha256(source).hexdigest()}\n"
    text += f"python: {sys.version.split()[0]}\npytorch: {torch.__version__}\n"
    text += f"cuda: {torch.version.cuda or 'none'}\ntriton: {triton.__version__ if triton else 'none'}\n"
    text += f"hardware: {hardware}\nworld size: {size}\n"
    text += f"git: {commit} {'dirty' if changes else 'clean'}\n" if commit else "git: none\n"
    text += f"settings: {json.dumps(asdict(settings))}\n"
    text += "".join(f"data: {part} {path} {n:,} tokens\n" for part in data for path, n in data[part].items())
    os.makedirs("logs", exist_ok=True)
    file = open(f"logs/{settings.run_id or time.strftime('%Y%m%d-%H%M%S-baseline')}.txt", "xb", buffering=0)
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


def summed(values: list, device: torch.device) -> list[float]:
    """The sums of these numbers over all processes; waits for the device."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def train_step(model: nn.Module, batch: Tensor, micro_batch: int) -> Tensor:
    """Adds up the gradients of the mean loss of a batch (n, context + 1); returns that loss, detached."""
    total = torch.zeros((), device=batch.device)
    for part in (parts := batch.split(micro_batch)):
        alone = hasattr(model, "no_sync") and part is not parts[-1]  # processes exchange gradients once a step
        with model.no_sync() if alone else contextlib.nullcontext():
            loss = model(part).sum() / batch[:, 1:].numel()
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validate(model: nn.Module, own: Tensor, micro_batch: int, device: torch.device) -> float:
    """Mean cross-entropy, nats per token, over all processes' sequences; `own` (n, context + 1) are this one's."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in own.split(micro_batch):
        total += model(part.to(device)).sum(dtype=torch.float64)
    loss, count = summed([total, own[:, 1:].numel()], device)
    return loss / count


def train(settings: Settings) -> int:
    """The whole run: set-up, an untimed warm-up, and the loop of steps and validations. Returns the exit status."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    share, context, micro_batch = settings.batch_tokens // size, settings.context, settings.micro_batch
    if share % context or share * size != settings.batch_tokens:
        raise UserError(f"--batch-tokens {settings.batch_tokens}: no multiple of {size} processes x {context} tokens")
    train_data, val_data = (find_shards(files, settings.fetch) for files in (settings.train_files, settings.val_files))
    batches, val_size = (sum(train_data.values()) - 1) // settings.batch_tokens, sum(val_data.values())
    if batches * settings.epochs < settings.steps:
        have = f"{batches:,} batches of {settings.batch_tokens:,} tokens, too few for {settings.steps:,} steps"
        epochs = -(-settings.steps // max(batches, 1))
        raise UserError(f"{settings.train_files}: {have}; add shards, or use --epochs {epochs}")
    if settings.val_tokens % context or not 0 < settings.val_tokens < val_size:
        raise UserError(f"--val-tokens {settings.val_tokens}: must be a multiple of {context}, less than {val_size:,}")
    stream = read_tokens(val_data, 0, settings.val_tokens + 1, settings.vocab_size)  # the last one is only a target
    stream = stream.unfold(0, context + 1, context)[rank::size].contiguous()  # (n, context + 1)
    encode, decode = load_tokenizer(settings.preset) if settings.hellaswag or settings.sample_tokens else (None, None)
    items = load_hellaswag(settings.hellaswag, encode) if settings.hellaswag else []
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    torch.use_deterministic_algorithms(not cuda)
    native_cpu = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else native_cpu
    compiler = cuda or shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    settings = replace(settings, compile=settings.compile and bool(compiler))  # the log says what was done
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    file = open_log(settings, size, {"train": train_data, "val": val_data}) if rank == 0 else None

    def log(text: str) -> None:
        if file:
            file.write(text.encode() + b"\n")
            show(text)

    torch.manual_seed(settings.seed)
    gpt = GPT(settings, settings.dtype == "bfloat16" or (settings.dtype == "auto" and native)).to(device)
    optimizer = gpt.make_optimizer()
    compiled = torch.compile(gpt, dynamic=False) if settings.compile else gpt
    model = nn.parallel.DistributedDataParallel(compiled) if size > 1 else compiled

    # The untimed warm-up compiles. Without an optimizer step, gradients are all that it leaves behind.
    train_step(model, torch.zeros(share // context, context + 1, dtype=torch.long, device=device), micro_batch)
    validate(compiled, stream[:micro_batch], micro_batch, device)

    signals: list[int] = []  # the loop sees to the first after its step; a second one ends the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number) or signal.signal(number, signal.SIG_DFL))
    elapsed = loss = stopping = 0.0
    for step in range(settings.steps + 1):
        progress = f"step:{step}/{settings.steps}"
        timing = f"train_time:{elapsed:.0f}ms step_avg:{elapsed / max(step, 1):.2f}ms"
        if step > 0:
            log(f"{progress} train_loss:{loss:.4f} {timing}")
        if step == settings.steps or step % settings.val_every == 0:
            loss = validate(compiled, stream, micro_batch, device)
            log(f"{progress} val_loss:{loss:.4f} {timing}")
            with torch.no_grad():
                if items:
                    right = sum(gpt.choose_ending(*item) == label for *item, label in items[rank::size])
                    log(f"{progress} hellaswag:{summed([right], device)[0] / len(items):.4f}")
                if settings.sample_tokens and rank == 0 and math.isfinite(loss):
                    log(f"sample: {json.dumps(decode(gpt.sample()))}")
        if not math.isfinite(loss):
            log(f"loss is not finite: step {step}")
            return 3
        if stopping:
            log(f"stopped by a signal after step {step}")
            return 128 + (signals or [signal.SIGTERM])[0]
        if step == settings.steps:
            log(peak_memory())
            return 0
        begin = time.perf_counter()
        start = step % batches * settings.batch_tokens + rank * share
        tokens = read_tokens(train_data, start, share + 1, settings.vocab_size).to(device)
        optimizer.zero_grad()
        loss = train_step(model, tokens.unfold(0, context + 1, context).contiguous(), micro_batch)
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(step)
        optimizer.step()
        loss, stopping = summed([loss / size, len(signals)], device)  # waits for the device, so the clock is right
        elapsed += 1000 * (time.perf_counter() - begin)


def parse_arguments(arguments: list[str]) -> tuple[Settings, bool]:
    """The settings that the command line asks for, and whether it is a --dry-run."""
    preset = TINY if "--tiny" in arguments else Settings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tiny", action="store_true", help="a small model on the embedded corpus")
    parser.add_argument("--dry-run", action="store_true", help="print the run's parameters and tokens, and stop")
    choices = {"dtype": ("auto", "bfloat16", "float32"), "compile": (True, False)}
    for f in (f for f in fields(Settings) if f.metadata):
        option, default = "--" + f.name.replace("_", "-"), getattr(preset, f.name)
        text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
        kind = {"type": json.loads if f.type is bool else f.type, "choices": choices.get(f.name)}
        parser.add_argument(option, **kind, help=text, metavar=f.type.__name__.upper(), default=argparse.SUPPRESS)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown option {unknown[0]} (--help lists the options)")
    given = {name: value for name, value in vars(parsed).items() if name not in ("tiny", "dry_run")}
    warmup_steps = round(preset.warmup_steps * given.get("steps", preset.steps) / preset.steps)
    settings = replace(preset, **{"warmup_steps": warmup_steps, **given})
    if min(settings.steps, settings.batch_tokens, settings.context, settings.micro_batch, settings.val_every) < 1:
        raise UserError("steps, sizes of batches, context and intervals must be at least 1")
    return settings, parsed.dry_run


def main(arguments: list[str]) -> int:
    """Runs the command line. Exit status: 0 done, 2 a user's mistake, 3 the loss is not finite, 128 + the signal."""
    try:
        settings, dry_run = parse_arguments(arguments)
        if not dry_run:
            return train(settings)
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in GPT(settings).named_parameters()}
        matrices = sum(size for name, size in sizes.items() if re.search(r"wte|(in|out).weight", name))
        show(f"parameters: {sum(sizes.values()):,}, in matrices that every token is multiplied with: {matrices:,}")
        show(f"training tokens: {settings.steps * settings.batch_tokens:,} in {settings.steps:,} steps")
        return 0
    except (
        UserError,
        argparse.ArgumentError,
        OSError,
        ImportError,
        torch.OutOfMemoryError,
        KeyboardInterrupt,
    ) as error:
        if os.environ.get("RANK", "0") == "0":
            hint = "; try a lower --micro-batch" if isinstance(error, torch.OutOfMemoryError) else ""
            print(f"train_gpt2.py: {str(error) or 'interrupted'}{hint}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # torchrun ends all with the first that ends: leave rank 0 the time to say why
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(sys.argv[1:]))
    finally:
        show()  # what --help has printed, say
