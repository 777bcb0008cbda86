"""Compiles what a run of a preset would run on a GPU, without one: do its graphs compile, and how long does it take?

    python bench/graphs.py [--target 90] [--preset record] [any option of train_gpt.py]

The graphs are the training objective at each stage's length, forward and backward, the validation, and the optimizers.
Each has a row: seconds, of which those in which Triton compiles kernels (here one after the other, on a GPU's machine
on all cores), the kernel that took longest, and how many kernels there are, spill, and take how much shared memory.
Exit status 1 if a graph does not compile, for instance for want of shared memory.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import time

import fake_cuda


def parts(settings, model):
    """Yields a name and what compiles that part of the run; the model is one on the meta device."""
    import torch

    import train_gpt

    config, dtype = settings.model, model.embed.dtype

    def empty(*shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    objective = torch.compile(fake_cuda.place(model), dynamic=False, fullgraph=True)

    def sequence(length: int):
        table = empty(2 * length, 1, config.dim // config.heads // 2, dtype=dtype)
        windows = empty(dtype=torch.int64), empty(dtype=torch.int64)
        prefix_of = empty(config.vocab_size, dtype=torch.int64) if settings.has_prefixes else None
        mtp = empty(len(settings.stages[0].mtp[0]))
        context = train_gpt.Context(table, table, empty(), windows, mtp, empty(), prefix_of)
        return empty(length, dtype=torch.int32), empty(length, dtype=torch.int64), context

    for length in dict.fromkeys(stage.batch_tokens // settings.slices for stage in settings.all_stages):
        yield f"training, {length:,} tokens", lambda length=length: objective(*sequence(length)).backward()
    length = settings.val_seq_len
    yield f"validation, {length:,} tokens", lambda: model.evaluate(*sequence(length))
    hyper = train_gpt.schedule(settings, 1)._replace(averaged=settings.average_steps)
    yield "optimizers", lambda: train_gpt.Optimizer(model, settings).step(hyper)


def row(name: str, seconds: float, compiled: fake_cuda.Compiled) -> str:
    slowest = max(compiled.seconds, key=compiled.seconds.get)
    spill = len({name for name, _, stack, _ in compiled.kernels if stack})
    shared = max(shared for *_, shared in compiled.kernels)
    triton, count = sum(compiled.seconds.values()), len(compiled.seconds)
    longest = f"{compiled.seconds[slowest]:5.1f} {slowest[:50]}"
    return f"{name:27}{seconds:9.1f}{triton:9.1f}{count:9}{spill:7}{shared:9,}  {longest}"


def compile_all(target: int, options: list[str], compiled: fake_cuda.Compiled) -> None:
    """Prints one row per part of the run; exits with 1 at the first that does not compile."""
    import torch
    from tqdm import tqdm

    import train_gpt

    try:
        settings, _ = train_gpt.parse_arguments(options)
    except train_gpt.UserError as error:  # whose type could not be named before now
        raise command.UserError(error) from None
    dtype = torch.bfloat16
    with torch.device("meta"):
        device = torch.device("cuda")
        kernels = train_gpt.choose_kernels(settings, device, dtype)
        fp8 = train_gpt.choose_fp8(settings, device, dtype)
        model = train_gpt.GPT(settings.model, dtype, kernels=kernels, fp8=fp8)
    print(f"{f'sm_{target}':27}  seconds   Triton  kernels  spill   shared  the longest to compile", flush=True)
    with fake_cuda.tensors():
        for name, part in tqdm(parts(settings, model), "graphs", leave=False, disable=None):
            compiled.seconds.clear()
            compiled.kernels.clear()
            begin = time.perf_counter()
            try:
                part()
            except Exception as error:
                sys.exit(f"{name}: does not compile: {error}")
            tqdm.write(row(name, time.perf_counter() - begin, compiled))


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    help = "compute capability, times ten (default: 90)"
    parser.add_argument("--target", type=int, choices=fake_cuda.SHARED, default=90, help=help)
    arguments, options = parser.parse_known_args()
    try:
        compiled = fake_cuda.pretend(arguments.target)
    except RuntimeError as error:
        raise command.UserError(error) from None
    compile_all(arguments.target, options, compiled)


if __name__ == "__main__":
    command.run(main, outlives_reader=True)
