"""Attention at a preset's sizes: train_gpt.py's, FlexAttention with other block sizes, and FlashAttention.

    python bench/attention.py [--preset tiny] [any option of train_gpt.py]

It needs the preset's shards, since their documents are what attention is cut to. Without CUDA there is only the banded
attention of train_gpt.py.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import collections
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

import train_gpt
from kernels import relative_error
from step_time import stage_alone

# FlexAttention's blocks of queries and of keys, pipeline stages and warps, forward; the same backward, where the blocks
# are those of the products for dK and dV, and the other way round for dQ.
FLEX = (
    ((128, 64, 3, 8), (64, 128, 2, 8)),
    ((128, 64, 2, 4), (64, 64, 3, 4)),
    ((128, 128, 2, 8), (32, 128, 2, 8)),
    ((64, 64, 3, 4), (64, 128, 3, 8)),
    ((64, 128, 3, 8), (32, 64, 3, 4)),
)
OWN = "train_gpt.py"
CHECKED = 4096  # tokens at the start of a sequence whose output is compared


def flex_options(forward: tuple[int, ...], backward: tuple[int, ...]) -> dict[str, int]:
    rows, columns, stages, warps = forward
    options = {"BLOCK_M": rows, "BLOCK_N": columns, "num_stages": stages, "num_warps": warps}
    named = {f"fwd_{name}": value for name, value in options.items()}
    rows, columns, stages, warps = backward
    options = {"BLOCK_M1": rows, "BLOCK_N1": columns, "BLOCK_M2": columns, "BLOCK_N2": rows}
    options |= {"num_stages": stages, "num_warps": warps}
    return named | {f"bwd_{name}": value for name, value in options.items()}


def own(options: dict[str, int], docs: Tensor, window: int) -> Callable:
    """train_gpt.py's attention of q, k, v (T, H, d), with options for FlexAttention's kernels where it is that."""
    torch.compiler.reset()
    train_gpt.flex_attention = partial(flex_attention, kernel_options=options)
    if docs.is_cuda:
        mask = train_gpt.block_mask(docs, torch.tensor(window, device=docs.device))
    else:
        mask = train_gpt.banded_mask(docs, window)
    return lambda q, k, v: train_gpt.attend(q, k, v, mask)


def flash(docs: Tensor, window: int) -> Callable:
    """The same by FlashAttention for documents of any lengths."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = docs.unique_consecutive(return_counts=True)[1]
    starts, longest = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
    sizes = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": longest, "max_k": longest}
    return partial(varlen_attn, **sizes, window_size=(window, 0), scale=1)


def implementations(cuda: bool) -> dict[str, Callable]:
    """By name, functions of document numbers (T,) and window that return attention."""
    found = {OWN: partial(own, {})}
    if cuda:
        found |= {f"FlexAttention {sizes[0]}, {sizes[1]}": partial(own, flex_options(*sizes)) for sizes in FLEX}
        found["FlashAttention"] = flash
    return found


def sequences(settings: train_gpt.Settings) -> Iterator[tuple[str, Tensor, tuple[int, int], bool]]:
    """Of each stage and of the validation: name, document numbers (T,) of the first sequence, windows, if it trains."""

    def documents(tokens: Tensor) -> Tensor:
        return (tokens[:-1] == settings.model.bos_id).cumsum(0)

    paths = train_gpt.find_shards(settings.train_files, settings.preset)
    for number, stage in enumerate(settings.stages, 1):
        plan, _ = train_gpt.plan_batches(stage_alone(settings, stage, 1), paths)
        batch = next(train_gpt.training_batches(plan[:1], settings.model, range(1)))
        yield f"stage {number}", documents(batch[0]), stage.windows, True
    sequence = train_gpt.validation_sequences(train_gpt.validation_stream(settings)[0], settings.val_seq_len)[0]
    last = train_gpt.schedule(settings, settings.total_steps).stage
    yield "validation", documents(sequence), last.windows, False


def gradients(attention: Callable, qkv: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attention(*qkv), qkv, grad)


def milliseconds(function: Callable, *inputs, count: int = 10) -> float:
    """The time of a call, on the device of the last input, after three that are not measured."""
    for _ in range(3):
        function(*inputs)
    begin = train_gpt.mark(inputs[-1].device)
    for _ in range(count):
        function(*inputs)
    return train_gpt.elapsed(begin, train_gpt.mark(inputs[-1].device)) / count


def measure(make: Callable, config: train_gpt.ModelConfig, docs: Tensor, windows, dtype, trains: bool):
    """Milliseconds forward, and backward, of all attention layers on one sequence; the largest error of an output."""
    forward = backward = error = 0.0
    kinds = collections.Counter((row.paired_heads, row.window) for row in config.rows if row.attention)
    for (paired, window), layers in kinds.items():
        pair = 2 if paired else 1
        each, width = docs.repeat_interleave(pair), windows[window == "long"]
        shape = len(each), config.heads // pair, config.dim // config.heads
        qkv = [torch.randn(shape, device=docs.device, dtype=dtype) for _ in range(3)]
        qkv[0] *= config.attention_scale
        for x in qkv:
            x.requires_grad_(trains)
        attention = make(each, width)
        once = milliseconds(attention, *qkv)
        forward += layers * once
        if trains:
            backward += layers * (milliseconds(gradients, attention, qkv, torch.randn_like(qkv[0])) - once)
        # Causal: the start of the output is the output of the start.
        start = [x.detach()[:CHECKED].float() for x in qkv]
        exact = train_gpt.attend(*start, train_gpt.banded_mask(each[:CHECKED], width))
        error = max(error, relative_error(attention(*qkv).detach()[:CHECKED], exact))
    return forward, backward, error


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    _, rest = parser.parse_known_args()
    settings, _ = train_gpt.parse_arguments(rest)
    world = train_gpt.find_world()
    train_gpt.compile_or_not(settings.compile, world.device)
    dtype = train_gpt.choose_dtype(settings, world.device)
    places = list(sequences(settings))
    print(f"preset {settings.preset} on {train_gpt.hardware_name(world)}, {dtype}, torch {torch.__version__}")
    print("ms of all attention layers on one sequence, forward + backward (validation: forward)\n")
    print("| | " + " | ".join(f"{name}, {len(docs):,} tokens" for name, docs, *_ in places) + " | largest error |")
    print("|---" * (len(places) + 2) + "|")
    for name, make in tqdm(implementations(world.device.type == "cuda").items(), "attention", disable=None):
        cells, worst = [], 0.0
        for _, docs, windows, trains in places:
            try:
                found = measure(make, settings.model, docs.to(world.device), windows, dtype, trains)
            except Exception as error:  # blocks that do not fit into shared memory: whose exception, depends on torch
                if name == OWN:
                    raise
                cells.append(type(error).__name__)
                continue
            cells.append(" + ".join(f"{each:.2f}" for each in found[: 1 + trains]))
            worst = max(worst, found[2])
        tqdm.write(f"| {name} | {' | '.join(cells)} | {worst:.1e} |")


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, torch.OutOfMemoryError, outlives_reader=True)
