"""The kernels of train_gpt.py at the sizes of the preset `record`: how exact, how fast, and how they compile.

    python bench/kernels.py          on a GPU: error, time and rate of each, beside the obvious PyTorch expression
    python bench/kernels.py --aot    without one: registers, stack and shared memory on sm_80, sm_89 and sm_90

Exit status 1 if a kernel spills on sm_90, or takes more shared memory than its target has.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train_gpt
from fake_cuda import SHARED, resources

DIM, VOCAB = 768, 50_304
KERNELS = ("symmetric_kernel", "mlp_kernel", "loss_kernel", "transpose_kernel")


@dataclass
class Case:
    """One call of a kernel's launcher, what PyTorch would do instead, and the work: operations, or bytes moved."""

    name: str
    least: int  # compute capability that it needs, times ten
    run: Callable
    plain: Callable  # also the reference for the error, given the inputs in float32
    inputs: tuple[torch.Tensor, ...]
    flops: int = 0
    bytes: int = 0


def cases(device: str, tokens: int) -> Iterator[Case]:
    """Every kernel at the sizes of `record`, on random numbers, with sequences of so many tokens."""

    def random(*shape: int, std: float = 1) -> torch.Tensor:
        return (std * torch.randn(shape, device=device)).to(torch.bfloat16)

    for bank, shape in ("qk", (60, 256, DIM)), ("vo", (20, DIM, DIM)), ("mlp", (22, 4 * DIM, DIM)):
        x = random(*shape, std=DIM**-0.5)
        x = x.mT if shape[1] > shape[2] else x
        count, n, inner = x.shape
        yield Case(
            f"symmetric X X^T, {bank} {count} x {n} x {inner}", 80,
            train_gpt.symmetric_op, lambda x: x @ x.mT,
            (x,), flops=2 * count * n * n * inner,
        )  # fmt: skip
        gram = random(count, n, n, std=n**-0.5)
        yield Case(
            f"symmetric bA + cAA, {bank} {count} x {n} x {n}", 80,
            lambda a: train_gpt.symmetric_op(a, 0.5, -2.0), lambda a: torch.baddbmm(a, a, a, beta=-2, alpha=0.5),
            (gram + gram.mT,), flops=2 * count * n**3,
        )  # fmt: skip

    x, w, post = random(tokens, DIM), random(4 * DIM, DIM, std=DIM**-0.5), random(tokens, 4 * DIM).square()
    product = 2 * tokens * DIM * 4 * DIM
    yield Case(
        "MLP forward, bf16", 90, train_gpt.relu_squared_matmul,
        lambda x, w: F.relu(x @ w.T).square(), (x, w), flops=product,
    )  # fmt: skip
    yield Case(
        "MLP backward, bf16", 90, train_gpt.relu_squared_gradient,
        lambda x, w, post: 2 * (x @ w.T) * post.sqrt(), (x, w, post), flops=product,
    )  # fmt: skip
    (x8, w8), scales = zip(*(train_gpt.quantize_to_fit(*each) for each in ((x, (1,)), (w, (0, 1)))))
    post_scale = torch.tensor(0.1, device=device)
    yield Case(
        "MLP forward, FP8", 90, lambda x, w: train_gpt.relu_squared_fp8(x, w, *scales, post_scale)[0],
        lambda x, w: F.relu(dequantized_product(x, w, *scales)).square(), (x8, w8), flops=product,
    )  # fmt: skip

    logits, targets = random(tokens, VOCAB, std=3), torch.randint(VOCAB, (tokens,), device=device)
    weights = torch.tensor([1, 0.5, 0.25], device=device)
    prefixes = torch.randint(-1, VOCAB, (VOCAB,), device=device), torch.tensor(0.25, device=device)
    for fp8 in False, True:
        yield Case(
            f"loss and gradient, {'FP8' if fp8 else 'bf16'}", 89 if fp8 else 80,
            lambda logits, fp8=fp8: train_gpt.loss_op(logits, targets, weights, fp8, *prefixes)[0],
            lambda logits: plain_losses(logits, targets, weights, *prefixes),
            (logits,), bytes=tokens * VOCAB * (4 + (1 if fp8 else 2)),
        )  # fmt: skip
    head = random(DIM, VOCAB)
    for name, source in ("bf16", head), ("FP8", head.to(torch.float8_e4m3fn)):
        yield Case(
            f"transposed copy, {name}", 89 if name == "FP8" else 80, train_gpt.transposed,
            lambda x: x.T.contiguous(), (source,), bytes=2 * head.numel() * source.element_size(),
        )  # fmt: skip
    out = random(VOCAB, DIM)
    yield Case(
        "transposed add, bf16", 80, lambda x, out: train_gpt.transpose_op(x, out, True),
        lambda x, out: out.add_(x.T), (head, out), bytes=6 * head.numel(),
    )  # fmt: skip


def dequantized_product(x: torch.Tensor, w: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
    """What PyTorch has for FP8 inputs; for float32 ones, the reference."""
    if x.dtype == torch.float32:
        return x @ w.T * (scale_x * scale_w)
    return train_gpt.scaled_mm(x, w, scale_x, scale_w)


@torch.compile
def plain_losses(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, prefix_of: torch.Tensor,
    prefix_weight: torch.Tensor,
) -> torch.Tensor:
    """The losses alone (T,), which autograd would still have to differentiate."""
    z = train_gpt.softcap(logits, torch.bfloat16)
    losses = weights.sum() * z.logsumexp(-1)
    for k in range(len(weights)):
        rest = F.pad(targets[k:], (0, k))
        there = torch.arange(len(z), device=z.device) < len(z) - k
        losses = losses - weights[k] * there * z.gather(-1, rest[:, None]).squeeze(-1)
    return losses + prefix_weight * F.cross_entropy(z, prefix_of[targets], ignore_index=-1, reduction="none")


class Recorder:
    """Stands for a kernel: keeps what it is launched with, and launches nothing."""

    def __init__(self):
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def compile_launch(kernel, args: tuple, options: dict, target: int):
    """Compiles a kernel for exactly the arguments of a launch, as launching it would; returns Triton's result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    flags = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, divisible = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, (*args, *options.values()))):
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind, divisible[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            kind = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            constants[(i,)] = value
        elif isinstance(value, int):
            kind = "i32"
            if value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "fp32"
        signature[parameter.name] = kind
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=flags)


def compile_all() -> int:
    """Prints one row per kernel and target; returns the exit status."""
    real = {name: getattr(train_gpt, name) for name in KERNELS}
    print(f"{'kernel':44}{'target':>8}{'registers':>11}{'stack':>7}{'shared':>9}{'of':>9}")
    wrong = []
    for case in tqdm(list(cases("cpu", tokens=256)), "kernels", leave=False, disable=None):
        for target, limit in SHARED.items():
            if target < case.least:
                continue
            recorders = {name: Recorder() for name in KERNELS}
            gpu = SimpleNamespace(major=target // 10, multi_processor_count=132)
            torch.cuda.get_device_properties = lambda device, gpu=gpu: gpu
            vars(train_gpt).update(recorders, has_kernels=lambda x: True)
            case.run(*case.inputs)
            for name, recorder in recorders.items():
                for args, options in recorder.launches:
                    compiled = compile_launch(real[name], args, options, target)
                    registers, stack = resources(compiled.asm["cubin"])
                    shared = compiled.metadata.shared
                    row = f"{case.name:44}{f'sm_{target}':>8}{registers:>11}{stack:>7}{shared:>9,}{limit:>9,}"
                    tqdm.write(row)
                    if shared > limit or (target == 90 and stack):
                        wrong.append(row)
    print("all fit, and none spills on sm_90" if not wrong else f"{len(wrong)} do not fit or spill")
    return 1 if wrong else 0


def measure_all(tokens: int) -> int:
    """Prints the Markdown table of errors, times and rates on this GPU; returns the exit status."""
    import triton

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {tokens:,} tokens\n"
    )
    print("| kernel | largest error | ms | rate | PyTorch, ms | ratio |\n|---|---|---|---|---|---|")
    for case in cases("cuda", tokens):
        if case.least > 10 * major + minor:
            continue
        inputs = [each.float() if each.is_floating_point() else each for each in case.inputs]
        got, want = case.run(*(each.clone() for each in case.inputs)), case.plain(*inputs)
        got = case.inputs[-1] if got is None else got
        error = "" if case.name.startswith("transposed add") else f"{relative_error(got, want):.1e}"
        del inputs, got, want
        own, plain = (triton.testing.do_bench(partial(f, *case.inputs)) for f in (case.run, case.plain))
        rate = f"{case.flops / own / 1e9:,.0f} TFLOP/s" if case.flops else f"{case.bytes / own / 1e6:,.0f} GB/s"
        print(f"| {case.name} | {error} | {own:.3f} | {rate} | {plain:.3f} | {plain / own:.2f} |", flush=True)
    return 0


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def main() -> int:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--aot", action="store_true", help="compile only, for sm_80, sm_89 and sm_90, without a GPU")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a sequence (default: 16,384)")
    arguments = parser.parse_args()
    if train_gpt.triton is None:
        raise command.UserError("needs Triton: pip install triton")
    if not arguments.aot and not torch.cuda.is_available():
        raise command.UserError("no GPU here; --aot compiles the kernels without one")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return compile_all() if arguments.aot else measure_all(arguments.tokens)


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
