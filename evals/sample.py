"""Text that a checkpoint's model writes.

python evals/sample.py --checkpoint logs/x_step001285.pt --prompt "The capital of France is"
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from command import Parser, UserError, between, catch_interrupts, run

catch_interrupts(__name__)  # before the imports that take seconds

import argparse
import itertools
import math

import torch

import checkpoint
import train_gpt

LONGEST = 16_384  # tokens of a prompt, and of what follows: each takes a pass over all that stand before it


def sample(model: checkpoint.Checkpoint, prompt: str, count: int, temperature: float, top_k: int, seed: int):
    """Yields the `count` tokens that follow BOS and the prompt; see `train_gpt.generate`."""
    tokens = [model.bos, *model.encode(prompt)]
    made = train_gpt.generate(model.model, tokens, model.windows, model.rotary, temperature, top_k, seed)
    return itertools.islice(made, count)


def finite(text: str) -> float:
    """An argparse `type`: a finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or more, found {text}")
    return number


def command_line() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of train_gpt.py")
    parser.add_argument("--prompt", default="", help="the text to go on from (default: the start of a document)")
    count, any_size = between(0, LONGEST), between(0, 2**63 - 1)
    parser.add_argument("--tokens", type=count, default=200, help="the most tokens to write (default: 200)")
    parser.add_argument("--temperature", type=finite, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument(
        "--top-k", type=any_size, default=50, help="choose among so many tokens, 0 for all (default: 50)"
    )
    parser.add_argument("--seed", type=any_size, default=1, help="seed of the choices (default: 1)")
    parser.add_argument("--stop", action="store_true", help="end where the model begins a new document")
    return parser


def main() -> None:
    arguments = command_line().parse_args()
    torch.compiler.set_stance("force_eager")  # every token is another length
    model = checkpoint.load(arguments.checkpoint)
    prompt = model.encode(arguments.prompt)
    if len(prompt) > LONGEST:
        raise UserError(f"--prompt has {len(prompt):,} tokens: give at most {LONGEST:,}")
    print(model.decode(prompt), end="", flush=True)  # decoded, since it may be bytes that are no text
    tokens, shown = [], ""
    chosen = arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed
    for token in sample(model, arguments.prompt, *chosen):
        if arguments.stop and token == model.bos:
            break
        tokens.append(token)
        text = model.decode(tokens).rstrip("\ufffd")  # a character may take several tokens
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    run(main, train_gpt.UserError)
