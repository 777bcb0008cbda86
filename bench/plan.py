"""How many slices a preset needs on cards of 80, 48, 24 and 16 GB: the memory that train_gpt.py estimates, by slices.

    python bench/plan.py [--preset record] [any option of train_gpt.py]
    python bench/plan.py --fit           only the option with which it fits into this machine's GPU

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
    parser.add_argument("--fit", action="store_true", help="print only the option for this machine's GPU")
    arguments, rest = parser.parse_known_args()
    settings, _ = train_gpt.parse_arguments(rest)
    world = train_gpt.find_world()
    for name in "measure", "fit":
        if getattr(arguments, name) and world.device.type != "cuda":
            raise command.UserError(f"--{name} needs a GPU")
    with torch.device("meta"):
        model = train_gpt.GPT(settings.model, torch.bfloat16, fp8=settings.fp8)

    def estimate(slices: int) -> float:
        """MiB with so many slices."""
        each = replace(settings, slices=slices)
        train_gpt.check_settings(each, 1)
        return train_gpt.estimate_gpu_memory(each, model, 1) / 2**20

    if arguments.fit:
        card = torch.cuda.get_device_properties(world.device).total_memory / 2**20
        for slices in (settings.slices, *(each for each in SLICES if each > settings.slices)):
            if estimate(slices) <= SHARE * card:
                print(f"--slices {slices}")
                return
        raise command.UserError(f"preset {settings.preset} does not fit into a GPU of {card:,.0f} MiB")

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
        fits = [slices for slices in SLICES if needs[slices] <= SHARE * 1024 * card]
        print(f"{card} GB: {f'--slices {fits[0]}' if fits else 'does not fit'}")


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
