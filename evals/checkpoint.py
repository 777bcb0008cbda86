"""What the evaluations share: the model of a checkpoint, and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import train_gpt
from command import UserError, first_line, missing


@dataclass
class Checkpoint:
    """A finished model, and what it takes to run it."""

    settings: train_gpt.Settings
    step: int
    model: train_gpt.GPT
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    @property
    def bos(self) -> int:
        return self.settings.model.bos_id

    @property
    def windows(self) -> tuple[int, int]:
        """Those of the final validation."""
        return train_gpt.schedule(self.settings, self.settings.total_steps).stage.windows

    @property
    def rotary(self) -> tuple[Tensor, float]:
        return train_gpt.rotary_state(self.settings, self.step)

    def context(self, length: int) -> train_gpt.Context:
        """For sequences of `length` tokens."""
        return train_gpt.make_context(self.settings.model, length, self.windows, self.model.embed, self.rotary)

    def logits(self, tokens: Tensor) -> Tensor:
        """The capped logits (V,), float32, of what follows tokens (T,); those of the padding are left out."""
        return self.model.next_logits(tokens, self.context(len(tokens)))


def load(path: str, device: str = "") -> Checkpoint:
    """The model of a checkpoint of train_gpt.py, on a GPU where there is one; UserError if it cannot be read."""
    state = train_gpt.load_checkpoint(path)
    settings, weights = state["settings"], state["model"]
    encode, decode = tokenizer(settings.model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = weights["embed"].dtype
    kernels = train_gpt.choose_kernels(settings, device, dtype)
    model = train_gpt.GPT(settings.model, dtype, kernels=kernels)
    train_gpt.load_weights(model, weights, path)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: some weights are infinite or NaN: the run has diverged; use another")
    return Checkpoint(settings, state["step"], model.to(device), encode, decode)


def tokenizer(config: train_gpt.ModelConfig) -> tuple[Callable, Callable]:
    """encode and decode of the vocabulary that a model was trained on: bytes, or GPT-2's; UserError for others.

    Bytes of a command line that are no text, which Python turns into lone surrogates, are bytes again.
    """

    def to_bytes(text: str) -> bytes:
        return text.encode(errors="surrogateescape")

    if config.has_byte_tokens:
        bos = train_gpt.BOS_TEXT.encode()

        def decode(tokens: list[int]) -> str:
            texts = (bos if token == config.bos_id else bytes([token]) for token in tokens)
            return b"".join(texts).decode(errors="replace")

        return lambda text: list(to_bytes(text)), decode
    if not config.has_gpt2_tokens:
        raise UserError(
            f"no tokenizer for a vocabulary of {config.vocab_size:,} whose BOS is {config.bos_id:,}: "
            "there are bytes, 257 and 256, and GPT-2's, 50,257 and 50,256"
        )
    gpt2 = gpt2_encoding()

    def encode(text: str) -> list[int]:
        try:
            return gpt2.encode_ordinary(to_bytes(text).decode())
        except UnicodeError:
            raise UserError("GPT-2's tokenizer takes UTF-8 alone, and the text has other bytes") from None

    return encode, lambda tokens: gpt2.decode(tokens, errors="replace")


def gpt2_encoding():
    """GPT-2's encoding; UserError if it cannot be had."""
    try:
        import tiktoken

        return tiktoken.get_encoding("gpt2")
    except ImportError:
        raise missing("tiktoken") from None
    except Exception as error:  # it fetches its table once, and passes on what its HTTP library raises
        raise UserError(f"GPT-2's tokenizer could not be fetched: {first_line(error)}") from None
