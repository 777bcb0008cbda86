"""How many slices a preset needs on cards of 80, 48, 24 and 16 GB: the memory that train_gpt.py estimates, by slices.

    python bench/plan.py [--preset record] [any option of train_gpt.py]
    python bench/plan.py --fit 1         only the option with which it fits into this machine's GPU, in one process

On a GPU, `--measure` also runs the largest stage's steps with each number of slices and prints what they took.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

from dataclasses import replace

import torch

import train_gpt

CARDS = (80, 48, 24, 16)  # times 1,024 MiB
SHARE = 0.9  # of a card; the rest is left to CUDA, the compiler and fragmentation
SLICES = (8, 16, 32, 64)


def measured(settings: train_gpt.Settings, world: train_gpt.World) -> float:
    """Bytes that the warm-up takes, which runs the largest stage and the validation, without data."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    model, objective, optimizer = train_gpt.build(settings, world)
    try:
        train_gpt.warm_up(settings, model, objective, optimizer, world)
    except torch.OutOfMemoryError:
        return float("inf")
    return torch.cuda.max_memory_reserved()


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="also run the largest stage, on a GPU")
    help = "print only the option for so many processes, each with a GPU as this machine has"
    parser.add_argument("--fit", type=command.between(1, 65535), metavar="PROCESSES", help=help)
    arguments, rest = parser.parse_known_args()
    settings, _ = train_gpt.parse_arguments(rest)
    world = train_gpt.find_world()
    for name in "measure", "fit":
        if getattr(arguments, name) and world.device.type != "cuda":
            raise command.UserError(f"--{name} needs a GPU")
    with torch.device("meta"):
        model = train_gpt.GPT(settings.model, torch.bfloat16, fp8=settings.fp8)

    def estimate(slices: int, processes: int = 1) -> float:
        """MiB of a GPU with so many slices."""
        each = replace(settings, slices=slices)
        train_gpt.check_settings(each, processes)
        return train_gpt.estimate_gpu_memory(each, model, processes) / 2**20

    memory = 0.0
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory / 2**20
    if arguments.fit:
        for slices in (settings.slices, *(each for each in SLICES if each > settings.slices)):
            if slices % arguments.fit == 0 and estimate(slices, arguments.fit) <= SHARE * memory:
                print(f"--slices {slices}")
                return
        where = f"{arguments.fit} processes with GPUs of {memory:,.0f} MiB"
        raise command.UserError(f"preset {settings.preset} finds no --slices for {where}: give it, or another NPROC")

    needs = {}
    print(f"preset {settings.preset} on one GPU\n")
    print(f"| slices | tokens a slice | estimate, MiB |{' measured, MiB |' * arguments.measure}")
    print("|---|---|---|" + "---|" * arguments.measure)
    for slices in SLICES:
        needs[slices] = estimate(slices)
        length = max(stage.batch_tokens for stage in settings.all_stages) // slices
        row = f"| {slices} | {length:,} | {needs[slices]:,.0f} |"
        if arguments.measure:
            needs[slices] = measured(replace(settings, slices=slices), world) / 2**20
            row += f" {needs[slices]:,.0f} |"
        print(row)
    print(f"\nfrom what was {'measured' if arguments.measure else 'estimated'}:")
    for card in CARDS:
        if arguments.measure and 1024 * (card - 1) > memory:
            continue  # what did not fit here may fit there
        fits = [slices for slices in SLICES if needs[slices] <= SHARE * 1024 * card]
        print(f"{card} GB: {f'--slices {fits[0]}' if fits else 'does not fit'}")


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
