"""Times a training step in each stage of a preset, and how long the first one takes to come.

    python bench/step_time.py --preset tiny [--measure 20] [--profile 10] [any option of train_gpt.py]

It needs the preset's training shards. MFU is the FLOPs of a step, from the settings, against what a large
matmul reaches on the same device, measured on the spot. --profile adds where the time of a step goes, in
each stage: by kind of kernel, and the kernels that take most. On the CPU operators stand for kernels, and the
floor is added: what the step's matmuls would take, the optimizer's too, if each ran as a large one does.
"""

import sys
import time
from pathlib import Path

BEGIN = time.perf_counter()

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

import re
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity
from tqdm import tqdm

import train_gpt

WARM = 4  # steps of a stage that are not measured
# Kinds of kernels, and of operators on the CPU, by what is in their names, in lower case; the first that fits.
KINDS = {
    "attention": "flex|flash|fmha",
    "symmetric matmuls": "symmetric_kernel",
    "MLP": "mlp_kernel",
    "loss": "loss_kernel",
    "transposes": "transpose_kernel",
    "other matmuls": r"gemm|nvjet|cutlass|xmma|mm\b",
    "compiled": "triton_|compiled",
    "copies, communication": "mem(cpy|set)|copy|nccl|c10d",
}


def stage_alone(settings: train_gpt.Settings, stage: train_gpt.Stage, steps: int) -> train_gpt.Settings:
    """Settings whose run is so many steps of one stage, and one more."""
    return replace(settings, stages=(replace(stage, steps=steps),), extension=replace(stage, steps=1))


class Runner:
    """Model, optimizer and data of one process."""

    def __init__(self, settings: train_gpt.Settings, world: train_gpt.World):
        self.settings, self.world = settings, world
        self.prefix_of = None
        if settings.has_prefixes:
            table = train_gpt.prefix_table(train_gpt.gpt2_vocabulary(), settings.model.vocab_size)
            self.prefix_of = table.to(world.device)
        train_gpt.compile_or_not(settings.compile, world.device)
        self.model, self.objective, self.optimizer = train_gpt.build(settings, world)
        train_gpt.warm_up(settings, self.model, self.objective, self.optimizer, world)
        self.paths = train_gpt.find_shards(settings.train_files, settings.preset)

    def steps(self, number: int, count: int):
        """Takes `count` steps as in a stage, given by its number; yields after each."""
        settings, world = self.settings, self.world
        stage = settings.all_stages[number]
        first = sum(each.steps for each in settings.all_stages[:number])
        hyper, own = train_gpt.schedule(settings, first), settings.slices // world.size
        plan, _ = train_gpt.plan_batches(stage_alone(settings, stage, count), self.paths)
        device = world.device
        rotary, length = train_gpt.rotary_state(settings, first), stage.batch_tokens // settings.slices
        context = train_gpt.make_context(settings.model, length, stage.windows, self.model.embed, rotary)
        context = context._replace(
            mtp=torch.tensor(hyper.mtp, device=device),
            prefix_weight=torch.tensor(hyper.prefix, device=device),
            prefix_of=self.prefix_of,
        )
        slices = range(world.rank * own, (world.rank + 1) * own)
        batches = train_gpt.prefetch(train_gpt.training_batches(plan[:count], settings.model, slices))
        for step, tokens in enumerate(batches):
            if self.optimizer.sparse:
                self.optimizer.touched.append(train_gpt.touched_rows(tokens, settings.model))
            tokens = tokens.to(device, non_blocking=True)
            train_gpt.train_step(self.objective, tokens, context, settings.slices)
            due = train_gpt.schedule(settings, first + step)
            self.optimizer.step(hyper._replace(adam=due.adam, tables=due.tables))
            yield


class Kernel(NamedTuple):
    """A kernel, in a step."""

    name: str
    ms: float
    calls: float
    flops: float  # of matmuls on the CPU; else 0


def kernels(runner: Runner, number: int) -> list[Kernel]:
    """The kernels of a stage's step, with Adam as often as it runs, longest first."""
    cuda = runner.world.device.type == "cuda"
    steps = runner.settings.adam_every * runner.settings.tables_every
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], with_flops=not cuda) as profiler:
        for _ in runner.steps(number, steps):
            pass
    events = [event for event in profiler.key_averages() if event.device_type.name == ("CUDA" if cuda else "CPU")]
    spent = [event.self_device_time_total if cuda else event.self_cpu_time_total for event in events]
    found = []
    for event, each in zip(events, spent):
        flops = event.flops if kind(event.key) == "other matmuls" else 0
        found.append(Kernel(event.key, each / 1000 / steps, event.count / steps, flops / steps))
    return sorted(found, key=lambda kernel: -kernel.ms)


def kind(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, name.lower())), "the rest")


def print_profile(stages: dict[str, list[Kernel]], longest: int, peak: float) -> None:
    """Of each stage, by name: milliseconds a step of each kind, and the kernels that take most."""
    print(f"\nms a step, profiled\n\n| | {' | '.join(stages)} |\n{'|---' * (len(stages) + 1)}|")
    for each in (*KINDS, "the rest"):
        cells = [sum(kernel.ms for kernel in stage if kind(kernel.name) == each) for stage in stages.values()]
        if any(cells):
            print(f"| {each} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    floors = [sum(kernel.flops for kernel in stage) / peak * 1000 for stage in stages.values()]
    if any(floors):
        print(f"| the floor: matmuls alone, at the peak | {' | '.join(f'{floor:.2f}' for floor in floors)} |")
    for name, stage in stages.items():
        total = sum(kernel.ms for kernel in stage)
        print(f"\n| {name}: kernel | ms a step | of {total:.1f} | calls a step |\n|---|---|---|---|")
        for kernel in stage[:longest]:
            print(f"| `{kernel.name[:80]}` | {kernel.ms:.2f} | {kernel.ms / total:.0%} | {kernel.calls:g} |")


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", type=int, default=20, help="steps that are measured in each stage (default: 20)")
    parser.add_argument("--profile", type=int, default=0, help="kernels to name in each stage (default: none)")
    arguments, rest = parser.parse_known_args()
    settings, _ = train_gpt.parse_arguments(rest)
    every = settings.adam_every
    count = max(every, arguments.measure // every * every)  # as many with Adam as there are in a run
    world = train_gpt.find_world()
    cuda = world.device.type == "cuda"
    train_gpt.check_settings(settings, world.size)
    train_gpt.find_shards(settings.train_files, settings.preset)  # says at once if there are none
    runner = Runner(settings, world)
    next(runner.steps(0, 2))
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter() - BEGIN
    dtype = runner.model.embed.dtype
    peak = train_gpt.measure_peak(world.device, dtype) * world.size
    lines, profiles = [], {}
    for number, stage in enumerate(tqdm(settings.all_stages, "stages", disable=None if world.rank == 0 else True)):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for step, _ in enumerate(runner.steps(number, WARM + count), 1):
            if step == WARM:
                begin = train_gpt.mark(world.device)
        each = train_gpt.elapsed(begin, train_gpt.mark(world.device)) / count
        speed = stage.batch_tokens / each * 1000
        share = speed * train_gpt.flops_per_token(settings.model, stage) / peak
        memory = train_gpt.peak_memory(world.device).split("allocated: ")[1].split(" reserved")[0]
        name = "extension" if number == len(settings.stages) else number + 1
        if arguments.profile:
            profiles[f"stage {name}"] = kernels(runner, number)
        lines.append(f"| {name} | {stage.batch_tokens:,} | {each:.1f} | {speed:,.0f} | {share:.0%} | {memory} |")
    if world.rank == 0:
        print(f"preset {settings.preset} on {train_gpt.hardware_name(world)}, {dtype}, torch {torch.__version__}")
        print(f"first step after {started:.0f} s; large matmul {peak / 1e12:.3g} TFLOP/s\n")
        print("| stage | batch, tokens | ms a step | tokens/s | MFU, of the measured peak | peak memory |")
        print("|---|---|---|---|---|---|")
        print("\n".join(lines))
        if profiles:
            print_profile(profiles, arguments.profile, peak)
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, torch.OutOfMemoryError, outlives_reader=True)
