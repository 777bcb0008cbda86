"""Counts what a training step costs on GPUs, without one: kernels, bytes, FLOPs, modelled milliseconds, by part.

    python bench/cost.py [--preset record] [--save FILE] [--against FILE] [any option of train_gpt.py]
    python bench/cost.py --gpus 1 --card rtx4090 --slices 32

For each stage it compiles the training objective as a GPU would have it, and counts what Inductor's kernels read and
write and what their products compute. A kernel's time is modelled as the longer of its bytes and its FLOPs, at the
card's peaks (an H100's: 3.35 TB/s, 989 TFLOP/s, 1,979 in 8 bits), and 2 microseconds for its launch. The optimizers
are by arithmetic: each GPU's share of NorMuon and Adam, and communication at the speed of the cards' links.

It is a model, not a measurement. It knows nothing of caches, of how well a kernel is laid out, of instructions that are
no products, or of what overlaps. Attention's products are counted as if every window was full. The public script of
record 84, counted in the same way, took 1.36 to 1.38 times its sum on 8 H100s; the last line multiplies by 1.37.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import fake_cuda

LAUNCH = 2e-6  # seconds
MEASURED_TO_MODELLED = 1.37


class Card(NamedTuple):
    """A GPU's peaks by NVIDIA's data sheets: dense products, gathered in float32."""

    name: str
    capability: int  # times ten; of those that fake_cuda knows, the next below: an RTX 3090 has 8.6
    bandwidth: float  # bytes a second
    bf16: float  # FLOP a second
    fp8: float  # likewise; 0 where it has none
    link: float  # bytes a second to the other GPUs of a node; 0 where there is no NVLink


CARDS = {
    "h100": Card("H100", 90, 3.35e12, 989e12, 1979e12, 450e9),
    "h200": Card("H200", 90, 4.8e12, 989e12, 1979e12, 450e9),
    "a100": Card("A100, 80 GB", 80, 2.04e12, 312e12, 0, 300e9),
    "rtx4090": Card("RTX 4090", 89, 1.01e12, 165e12, 330e12, 0),
    "rtx3090": Card("RTX 3090", 80, 0.936e12, 71e12, 0, 0),
    "rtx4080": Card("RTX 4080", 89, 0.717e12, 97.5e12, 195e12, 0),
}

COMPOSING = ("compose_heads", "banded_weights", "banded_mask", "chunks", "and_chunk_before")
PARTS = (
    "head and loss", "MLP", "projections", "attention", "composed heads", "gates and MUDD", "embedding tables",
    "elementwise", "optimizer", "communication",
)  # fmt: skip


class Kernel(NamedTuple):
    part: str
    bytes: int
    flops: int = 0
    precision: str = "bf16"
    launches: float = 1

    def seconds(self, card: Card) -> float:
        if self.part == "communication":
            return self.bytes / card.link + self.launches * LAUNCH
        peak = card.fp8 if self.precision == "fp8" else card.bf16
        return max(self.bytes / card.bandwidth, self.flops / peak) + self.launches * LAUNCH


# ---- What Inductor is about to write -------------------------------------------------------------


def size_of(shape, strides=None) -> int:
    """Elements of a tensor in memory: an expanded axis has one."""
    return math.prod(int(n) for n, stride in zip(shape, strides or shape) if strides is None or int(stride) != 0)


def bytes_of(tensor) -> int:
    """Of a tensor of Inductor's or of PyTorch's."""
    if hasattr(tensor, "get_size"):
        strides = tensor.maybe_get_stride() if hasattr(tensor, "maybe_get_stride") else None
        return size_of(tensor.get_size(), strides) * tensor.get_dtype().itemsize
    return size_of(tensor.shape, tensor.stride()) * tensor.element_size()


def shape_of(tensor) -> tuple[int, ...]:
    shape = tensor.get_size() if hasattr(tensor, "get_size") else tensor.shape
    return tuple(int(n) for n in shape)


def elements_touched(dependency, buffer) -> int:
    """Of a buffer, by a read or write in a loop: as many as its index takes values, at most all."""
    from torch._inductor.dependencies import MemoryDep

    whole = size_of(buffer.get_size())
    if not isinstance(dependency, MemoryDep):
        return whole
    used = dependency.index.free_symbols
    looked_up = any(str(symbol).startswith(("tmp", "indirect")) for symbol in used)
    touched = 1
    for variable, length in zip(dependency.var_names, dependency.size):
        if looked_up or variable in used:
            touched *= int(length)
    return min(touched, whole)


def fused_traffic(node, graph) -> tuple[int, list[tuple[int, ...]]]:
    """The bytes that a fused kernel reads and writes, and the shapes of the buffers."""
    from torch._inductor.dependencies import WeakDep

    leaves = node.get_nodes()
    names = {leaf.get_name() for leaf in leaves}
    inside = {output.get_name() for leaf in leaves for output in leaf.get_outputs()}
    touched = {}  # by buffer, "read" or "written", and index: several indices may be parts of one buffer
    buffers = {}

    def touch(how: str, dependency, name: str) -> None:
        name = graph.scheduler.mutation_real_name.get(name, name)
        buffers[name] = graph.get_buffer(name) if name not in graph.graph_inputs else graph.graph_inputs[name]
        touched.setdefault((name, how), {})[str(dependency)] = elements_touched(dependency, buffers[name])

    for leaf in leaves:
        for dependency in leaf.read_writes.reads:
            if dependency.name not in inside and not isinstance(dependency, WeakDep):
                touch("read", dependency, dependency.name)
        for dependency in leaf.read_writes.writes:
            buffer = graph.scheduler.name_to_buf[dependency.name]
            changed = buffer.get_mutations()
            outlives = any(user.node.get_name() not in names for user in buffer.users)
            if outlives or changed:
                target = changed[0] if changed else dependency.name
                touch("written", dependency, target)
                if getattr(dependency, "mode", None) == "atomic_add":
                    touch("read", dependency, target)
    total = 0
    for (name, _), parts in touched.items():
        buffer = buffers[name]
        total += min(sum(parts.values()), size_of(buffer.get_size())) * buffer.get_dtype().itemsize
    return total, [shape_of(buffer) for buffer in buffers.values()]


def product_flops(call) -> tuple[int, str]:
    """FLOPs and precision of a product, by the node of the graph that calls for it."""
    name = str(call.target)
    tensors = [argument.meta["val"] for argument in call.args if hasattr(argument, "meta")]
    if name.startswith(("aten.addmm", "aten.baddbmm")):
        tensors = tensors[1:]
    elif not name.startswith(("aten.mm", "aten.bmm", "aten._scaled_mm", "train_gpt.relu_squared")):
        return 0, "bf16"
    a, b = tensors[:2]
    columns = b.shape[0] if name.startswith("train_gpt") else b.shape[-1]
    return 2 * a.numel() * int(columns), "fp8" if a.element_size() == 1 else "bf16"


def functions_of(origins) -> Counter:
    """The functions of train_gpt.py that nodes of the graph come from, the innermost of each."""
    found = Counter()
    for node in origins:
        frames = re.findall(r'train_gpt\.py", line \d+, in (\w+)', node.meta.get("stack_trace") or "")
        found.update(frames[-1:])
    return found


def extern_call(node):
    """The call of the graph that a kernel from a library computes; other calls have become part of its inputs."""
    calls = [origin for origin in node.get_origins() if origin.op == "call_function"]
    of_its_name = [call for call in calls if call.target is getattr(node, "op_overload", None)]
    products = [call for call in calls if product_flops(call)[0]]
    return (of_its_name or products or calls)[-1]


def kernels_of(scheduler, graph, config) -> Iterator[Kernel]:
    """The kernels of a graph."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    for node in scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            continue
        if str(node.get_device()) == "cpu":
            continue
        origins = {origin for leaf in node.get_nodes() for origin in leaf.node.get_origins()}
        flops, precision, product = 0, "bf16", False
        if isinstance(node, ExternKernelSchedulerNode):
            call = extern_call(node.node)
            outputs = call.meta.get("val")
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            tensors = [*node.node.inputs, *(output for output in outputs if output is not None)]
            total, shapes = sum(map(bytes_of, tensors)), [shape_of(tensor) for tensor in tensors]
            flops, precision = product_flops(call)
            product = flops > 0
            if str(call.target).startswith("train_gpt.add_rows"):
                total = 3 * bytes_of(call.args[2].meta["val"])  # of `out` as many rows, read and written
            if str(call.target).startswith("train_gpt.transpose"):
                total = 2 * bytes_of(call.args[0].meta["val"])  # its output is an input, too
        else:
            total, shapes = fused_traffic(node, graph)
        part = part_of_step(node.is_template(), product, shapes, functions_of(origins), config)
        yield Kernel(part, total, flops, precision)


def part_of_step(template: bool, product: bool, shapes: list, functions: Counter, config) -> str:
    """Where a kernel belongs, by the sizes of what it touches and the functions it comes from."""
    if template:
        return "attention"
    if functions and functions.most_common(1)[0][0] in COMPOSING:
        return "composed heads"
    sizes = {size for shape in shapes for size in shape}
    vocab = config.padded_vocab
    rows = {shape[0] for shape in shapes if len(shape) == 2 and shape[0] >= vocab and shape[0] % vocab == 0}
    rows |= {config.bigram_table_rows} & sizes
    if rows and not product and "transposed" not in functions:
        return "embedding tables"
    if vocab in sizes:
        return "head and loss"
    if config.mlp_ratio * config.dim in sizes:
        return "MLP"
    if product:
        narrow = any(min(shape[-2:]) <= 64 for shape in shapes if len(shape) >= 2)
        return "gates and MUDD" if narrow else "projections"
    return "elementwise"


# ---- What the graph does not have ----------------------------------------------------------------


def attention_flops(config, stage, tokens: int) -> int:
    """FLOPs of attention forward and backward (which computes the logits again), all windows full."""
    total = 0
    for row in config.rows:
        if row.attention:
            keys = stage.windows[1] if row.window == "long" else stage.windows[0]
            qk_dim = config.dim // 2 if row.narrow_qk else config.dim
            # Forward the logits and the sum of values; backward the logits, and four gradients.
            total += tokens * keys * (2 * qk_dim + 2 * config.dim + 6 * qk_dim + 4 * config.dim)
    return total


def optimizer_kernels(settings, table: dict, tokens: int, hypers: list, ranks: int) -> Iterator[Kernel]:
    """A rank's part of the optimizers and of the communication, a step; what runs in half of the `hypers` counts half.

    `hypers` is what the schedule says of each of the stage's steps.
    """
    import train_gpt

    adam = sum(hyper.adam for hyper in hypers) / len(hypers)
    tables = sum(hyper.adam and hyper.tables for hyper in hypers) / len(hypers)
    for name, row in table.items():
        if row is None:
            continue
        count = math.prod(row.shape)
        mine = count // ranks if row.kind in ("bank", "table") else count
        if row.kind == "bank" and settings.muon:
            n, rows, cols = row.shape
            short, long = min(rows, cols), max(rows, cols)
            # A step of Polar Express: X X^T and its square by symmetric halves, and a product with X.
            flops = settings.polar_steps * n // ranks * (short**2 * long + short**3 + 2 * short**2 * long)
            polar_bytes = settings.polar_steps * 2 * 4 * mine
            # Weight, its low half, gradient and momentum, and some four passes over the update in float32.
            launches = 4 * settings.polar_steps
            yield Kernel("optimizer", polar_bytes + mine * (4 + 4 + 2 + 8 + 32), flops, launches=launches)
            yield Kernel("communication", 2 * 2 * count * (ranks - 1) // ranks, launches=2)
            continue
        share = tables if row.kind == "table" and name != "lm_head" else adam
        width = 4 if row.kind == "scalar" else 2
        # Weight, gradient and two averages.
        if share == 0:
            continue
        yield Kernel("optimizer", int(share * mine * (2 * width + width + 16)), launches=share)
        if name in train_gpt.LOOKED_UP:
            yield Kernel("embedding tables", int(share * width * count), launches=share)  # cleared
        if row.kind == "table":
            there = count
            if name == "bigram_table" and settings.sparse_exchange:
                there = min(count, int(tokens / share) * row.shape[1])  # the rows touched, at most one a token
            travels = share * width * (there + count) * (ranks - 1) / ranks
            yield Kernel("communication", int(travels), launches=2 * share)
        else:
            yield Kernel("communication", int(share * 4 * 2 * count), launches=0)
    yield Kernel("communication", 0, launches=adam)  # of all small ones together


# ---- The table -----------------------------------------------------------------------------------


def count_stages(settings, model, ranks: int) -> Iterator[tuple[str, int, list[Kernel]]]:
    """Yields each stage's name, steps, and the kernels of one of its steps on one of the ranks."""
    import torch
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.virtualized import V

    import train_gpt
    from graphs import parts

    class NoKernel:
        def __getattr__(self, name):
            return lambda *args, **options: None

    counted = []
    generate = Scheduler.codegen

    def codegen(self):
        counted.extend(kernels_of(self, V.graph, settings.model))
        return generate(self)

    Scheduler.codegen = codegen
    AsyncCompile.triton = lambda self, *args, **options: NoKernel()  # none is compiled
    by_length = {}
    for name, part in parts(settings, model):
        if name.startswith("training"):
            counted.clear()
            torch._dynamo.reset()
            part()
            by_length[int(re.sub(r"\D", "", name))] = list(counted)
    first = 0
    for number, stage in enumerate(settings.all_stages, 1):
        hypers = [train_gpt.schedule(settings, step) for step in range(first, first + stage.steps)]
        first += stage.steps
        tokens = stage.batch_tokens // settings.slices
        kernels = by_length[tokens] * (settings.slices // ranks)
        attention = [kernel for kernel in kernels if kernel.part == "attention"]
        share = attention_flops(settings.model, stage, tokens) // max(len(attention), 1)
        kernels = [k._replace(flops=share) if k.part == "attention" else k for k in kernels]
        optimizers = optimizer_kernels(settings, model.table, tokens, hypers, ranks)
        kernels += (kernel for kernel in optimizers if ranks > 1 or kernel.part != "communication")
        last = number == len(settings.all_stages)
        yield "extension" if last else f"stage {number}", stage.steps, kernels


def summed(kernels: list[Kernel], card: Card) -> dict[str, list[float]]:
    """Launches, GB, TFLOP in bf16, TFLOP in FP8 and milliseconds, by part and in all."""
    rows = {}
    for kernel in kernels:
        for part in (kernel.part, "total"):
            row = rows.setdefault(part, [0.0] * 5)
            row[0] += kernel.launches
            row[1] += kernel.bytes / 1e9
            row[3 if kernel.precision == "fp8" else 2] += kernel.flops / 1e12
            row[4] += kernel.seconds(card) * 1e3
    return {part: rows[part] for part in (*PARTS, "total") if part in rows}


def print_stage(name: str, steps: int, rows: dict, before: dict | None) -> None:
    versus = f"{'before':>9}{'ratio':>7}" if before else ""
    print(f"\n{f'{name}, {steps} steps':24}{'kernels':>8}{'GB':>8}{'TF bf16':>9}{'TF fp8':>8}{'ms':>8}{versus}")
    for part, (launches, gigabytes, bf16, fp8, ms) in rows.items():
        line = f"{part:24}{launches:8.0f}{gigabytes:8.2f}{bf16:9.2f}{fp8:8.2f}{ms:8.2f}"
        if before and before.get(part):
            line += f"{before[part][4]:9.2f}{ms / before[part][4]:7.2f}"
        print(line, flush=True)


def count(options: list[str], card: Card, ranks: int, save: Path | None, against: Path | None) -> None:
    import torch
    from tqdm import tqdm

    import train_gpt

    try:
        settings, _ = train_gpt.parse_arguments(options)
    except train_gpt.UserError as error:  # whose type could not be named before now
        raise command.UserError(error) from None
    if settings.slices % ranks:
        raise command.UserError(f"--slices {settings.slices}: not a multiple of --gpus {ranks}")
    before = {}
    if against is not None:
        try:
            before = json.loads(against.read_text())
        except (OSError, ValueError) as error:
            raise command.UserError(f"{against}: no counts of --save: {error}") from None
    device, dtype = torch.device("cuda"), torch.bfloat16
    with torch.device("meta"):
        kernels = train_gpt.choose_kernels(settings, device, dtype)
        fp8 = train_gpt.choose_fp8(settings, device, dtype)
        model = train_gpt.GPT(settings.model, dtype, kernels=kernels, fp8=fp8)
    stages = {}
    seconds = 0.0
    with fake_cuda.tensors():
        for name, steps, counted in tqdm(count_stages(settings, model, ranks), "stages", leave=False, disable=None):
            stages[name] = summed(counted, card)
            print_stage(name, steps, stages[name], before.get(name))
            seconds += steps * stages[name]["total"][4] / 1e3
    print(
        f"\n{settings.total_steps} steps: {seconds:.1f} s modelled, x {MEASURED_TO_MODELLED} = "
        f"{seconds * MEASURED_TO_MODELLED:.1f} s expected on {ranks} x {card.name}"
    )
    if save is not None:
        save.write_text(json.dumps(stages, indent=1) + "\n")


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the counts there, as JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with counts of --save")
    parser.add_argument("--card", choices=CARDS, default="h100", help="the GPU (default: h100)")
    parser.add_argument("--gpus", type=command.between(1, 8), default=8, help="how many share a batch (default: 8)")
    arguments, options = parser.parse_known_args()
    card, gpus = CARDS[arguments.card], arguments.gpus
    if gpus > 1 and not card.link:
        raise command.UserError(f"--gpus {gpus}: {card.name} has no NVLink, which the model is of: give --gpus 1")
    try:
        fake_cuda.pretend(card.capability)
    except RuntimeError as error:
        raise command.UserError(error) from None
    count(options, card, gpus, arguments.save, arguments.against)


if __name__ == "__main__":
    command.run(main, outlives_reader=True)
