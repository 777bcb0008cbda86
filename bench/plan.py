"""How many slices a preset needs on cards of 80, 48, 24 and 16 GB: the memory that train_gpt.py estimates, by slices.

    python bench/plan.py [--preset record] [any option of train_gpt.py]

On a GPU, `--measure` also runs the largest stage's steps with each number of slices and prints what they took.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command

command.catch_interrupts(__name__)  # before the imports that take seconds

from dataclasses import replace

import torch

import train_gpt

CARDS = (80, 48, 24, 16)  # times 1,024 MiB; a tenth is left to CUDA, the compiler and fragmentation
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
    arguments = sys.argv[1:]
    measure = "--measure" in arguments
    settings, _ = train_gpt.parse_arguments([each for each in arguments if each != "--measure"])
    world = train_gpt.find_world()
    if measure and world.device.type != "cuda":
        raise command.UserError("--measure needs a GPU")
    with torch.device("meta"):
        model = train_gpt.GPT(settings.model, torch.bfloat16, fp8=settings.fp8)
    needs = {}
    print(f"preset {settings.preset} on one GPU\n")
    print(f"| slices | tokens a slice | estimate, MiB |{' measured, MiB |' * measure}")
    print("|---|---|---|" + "---|" * measure)
    for slices in SLICES:
        each = replace(settings, slices=slices)
        train_gpt.check_settings(each, 1)
        needs[slices] = train_gpt.estimate_gpu_memory(each, model, 1) / 2**20
        length = max(stage.batch_tokens for stage in each.all_stages) // slices
        row = f"| {slices} | {length:,} | {needs[slices]:,.0f} |"
        if measure:
            needs[slices] = measured(each, world) / 2**20
            row += f" {needs[slices]:,.0f} |"
        print(row)
    print(f"\nfrom what was {'measured' if measure else 'estimated'}:")
    for card in CARDS:
        fits = [slices for slices in SLICES if needs[slices] <= 0.9 * 1024 * card]
        print(f"{card} GB: {f'--slices {fits[0]}' if fits else 'does not fit'}")


if __name__ == "__main__":
    command.run(main, train_gpt.UserError, outlives_reader=True)
