"""What the evaluations share: the model of a checkpoint, and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import train_gpt


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

    def context(self, length: int) -> train_gpt.Context:
        """For sequences of `length` tokens, with the windows of the final validation."""
        last = train_gpt.schedule(self.settings, self.settings.total_steps).stage
        rotary = train_gpt.rotary_state(self.settings, self.step)
        return train_gpt.make_context(self.settings.model, length, last.windows, self.model.embed, rotary)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """The capped logits (V,), float32, of what follows tokens (T,); those of the padding are left out."""
        x = self.model.stream(tokens, self.context(len(tokens)))[-1]
        return train_gpt.softcap(x @ self.model.lm_head)[: self.settings.model.vocab_size]


def load(path: str, device: str = "") -> Checkpoint:
    """The model of a checkpoint of train_gpt.py, on a GPU where there is one; UserError if it cannot be read."""
    state = train_gpt.load_checkpoint(path)
    settings = state["settings"]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = state["model"]["embed"].dtype
    kernels = train_gpt.choose_kernels(settings, device, dtype)
    model = train_gpt.GPT(settings.model, dtype, kernels=kernels)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(train_gpt.resize(state["model"][name], len(p)))
    return Checkpoint(settings, state["step"], model.to(device), *tokenizer(settings.model))


def tokenizer(config: train_gpt.ModelConfig) -> tuple[Callable, Callable]:
    """encode and decode of the vocabulary that a model was trained on: bytes, or GPT-2's."""
    if config.vocab_size == 257:
        return lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace")
    import tiktoken

    gpt2 = tiktoken.get_encoding("gpt2")
    return gpt2.encode_ordinary, lambda tokens: gpt2.decode(tokens, errors="replace")
