"""Train a GPT-2-class language model to 3.28 validation loss on FineWeb, as fast as it goes.

One file holds the whole experiment, to be read from top to bottom:

  1. Settings      the network as a table of layers, the schedule as a table of stages, all numbers
  2. Kernels       Triton kernels, each beside the plain PyTorch that runs where they do not
  3. Numerics      8-bit floats, the head and the MLP, bf16 weights that are exact, Polar Express
  4. Attention     masks and windows: FlexAttention on GPUs, banded attention on CPUs
  5. Model         the parameters, and the forward pass
  6. Optimizer     NorMuon and Adam, and what the ranks exchange
  7. Data          shards, and which documents make which batch
  8. Training      one process, the clock, the log, checkpoints, the loop
  9. Command line  options, checks, --dry-run

`./run.sh` starts it on every GPU it finds, or on the CPU with a small model, and
`python train_gpt.py --help` lists the options. An attempt at a record is mostly an edit of
section 1.

A number in [brackets] is a record of the public leaderboard (modded-nanogpt): [58] is the record
that introduced the idea. records/README.md has the table of all of them, with dates and authors.

Importing this file has no side effects.
"""

import os
import signal
import sys

if __name__ == "__main__":
    if sys.platform not in ("linux", "darwin"):
        text = "train_gpt.py: needs Linux, or macOS for the CPU; on Windows use WSL"
        print(text, file=sys.stderr)
        sys.exit(2)
    # What is imported next takes seconds: Ctrl-C ends that, too, without a traceback.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import difflib
import errno
import functools
import gc
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import platform
import re
import resource
import shlex
import subprocess
import time
import types
import typing
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # on macOS, or a CPU without it
    triton = None
    constexpr = None


def jit(kernel: Callable) -> Callable:
    """`triton.jit` where there is Triton; elsewhere nothing calls the kernels."""
    if triton is None:
        return kernel
    return triton.jit(kernel)


class UserError(Exception):
    """Ends the run with an exit status; the text says what is wrong and what to do.

    It is all that is printed.
    """

    def __init__(self, text: str, status: int = 2):
        super().__init__(" ".join(text.splitlines()))  # a name or a value may hold several
        self.status = status


# 1. Settings ======================================================================================
# The experiment: a table of layers (RECORD_LAYERS), a table of stages (PRESETS), a table of
# parameters (`parameter_table`), and the scalars. Every scalar is also an option: `--seed 7`.


def setting(default, help: str, **limits):
    """A field that the command line can set; `limits` are `low`, `high` and `choices`."""
    return field(default=default, metadata={"help": help, **limits})


DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Layer:
    """One row of the network's table: what a layer has besides its MLP.

    Rows are numbered from 0, and a layer is named by its row's number.
    """

    # False: the layer is an MLP alone.
    attention: bool = True
    # Which of the stage's two windows, "short" or "long". Layers with the long one also have the
    # partial key offset [49].
    window: str = "short"
    # Heads 2p and 2p + 1 are interleaved into one head over twice the positions [58].
    paired_heads: bool = False
    # Queries and keys have half of a head's channels, all of which turn: without a key offset.
    narrow_qk: bool = False
    # The number of the table of value embeddings that is mixed into v [14].
    value_embeds: int | None = None
    # Exclusive self attention: the output loses a part of its token's own value [82].
    xsa: bool = False
    # Each head's output has a gate [28].
    attention_gate: bool = False
    # Dynamically composed heads: each also takes up values by a mixture, made for each token, of
    # all heads' attention probabilities [85].
    dc: bool = False
    # Attention reads the residual stream as it was after that layer [77].
    single_input: int | None = None
    # Before the layer, the residual stream as it was after that layer is added, gated [55].
    skip: int | None = None
    # MUDD [81]: three earlier layers whose outputs are mixed in with weights that each token
    # computes. The first one is mixed in before this layer, all three after the last layer.
    mudd: tuple[int, int, int] | None = None
    # A small network reads the residual stream before this layer, and makes the gates of this one
    # and of those after it, up to the next that has such a network [85]; see `gate_networks`.
    gates: bool = False


@dataclass(frozen=True)
class Stage:
    """One row of the schedule's table."""

    steps: int
    batch_tokens: int
    max_seq_len: int  # documents are cut to this many tokens
    windows: tuple[int, int]  # the short and the long attention window, in tokens
    lr: float  # multiplies every learning rate; the cooldown fades it out
    # Multi-token prediction [53]: the weights of the next K targets at the stage's first step and
    # after its last one; they move linearly in between. K is the same in all stages.
    mtp: tuple[tuple[float, ...], tuple[float, ...]] = ((1,), (1,))
    # Prefix tokens [88]: the weight of the next target's prefix, in the same way.
    prefix: tuple[float, float] = (0, 0)
    # `embed` is the transpose of `lm_head` in the first stages; the two part at the first Adam step
    # of the first stage that says False [51].
    tied: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The network's table, and its scalars.

    The booleans switch techniques. One that has the name of a column of `Layer` empties that
    column: with `--xsa false` no layer has XSA, whatever the table says (see `rows`).
    """

    layers: tuple[Layer, ...]  # the network's table
    # Sizes.
    vocab_size: int = setting(50257, "tokens of the vocabulary (inside, a multiple of 128)", low=1)
    bos_id: int = setting(50256, "the token that begins every document", low=0, high=65535)
    dim: int = setting(768, "width of the residual stream", low=1)
    heads: int = setting(6, "attention heads", low=1)
    mlp_ratio: int = setting(4, "hidden width of the MLPs, times dim", low=1)
    attention_scale: float = setting(0.1, "factor of the attention logits")
    bigram_rows: float = setting(
        7.5, "rows of the bigram table, times the padded vocabulary", low=0.001
    )
    bigram_dim: int = setting(768, "channels that the bigram embedding is added to", low=1)
    ngram: int = setting(
        2, "longest n-gram with an embedding: beyond 2, each has rows and channels like the bigram",
        low=2, high=5,
    )
    # Techniques.
    smear: bool = setting(True, "a token's embedding takes up some of the one before [34]")
    bigram: bool = setting(True, "bigram hash embedding with the sign trick [62, 83]")
    value_embeds: bool = setting(True, "value embeddings [14]")
    paired_heads: bool = setting(True, "paired heads [58]")
    narrow_qk: bool = setting(False, "queries and keys of half the width in some layers")
    key_offset: bool = setting(True, "partial key offset in layers with a long window [49]")
    xsa: bool = setting(True, "learnable exclusive self attention [82]")
    attention_gate: bool = setting(True, "gates of attention's heads [28]")
    dc: bool = setting(True, "dynamically composed heads; they come with the gates' networks [85]")
    single_input: bool = setting(True, "one activation feeds the last attention layers [77]")
    skip: bool = setting(True, "gated skip connection [55]")
    mudd: bool = setting(True, "MUDD connections [81]")
    gates: bool = setting(True, "gates that small networks make; false: learned scalars [85]")
    head_pairs: bool = setting(True, "orthogonalize Q and K two heads at a time [80]")

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def bigram_table_rows(self) -> int:
        return (self.ngram - 1) * round(self.bigram_rows * self.padded_vocab)

    @property
    def has_gpt2_tokens(self) -> bool:
        return (self.vocab_size, self.bos_id) == (50257, 50256)

    @property
    def has_byte_tokens(self) -> bool:
        return (self.vocab_size, self.bos_id) == (257, 256)

    @property
    def rows(self) -> tuple[Layer, ...]:
        """The table as it is built: the columns that a switch empties have their defaults."""
        emptied = {}
        for column in fields(Layer):
            if getattr(self, column.name, True) is False:
                emptied[column.name] = column.default
        if not self.gates:
            emptied["dc"] = False
        return tuple(replace(layer, **emptied) for layer in self.layers)

    def layers_with(self, column: str) -> list[int]:
        """The numbers of the layers whose row has something in this column."""
        found = []
        for number, row in enumerate(self.rows):
            entry = getattr(row, column)
            if entry is not None and entry is not False:
                found.append(number)
        return found


@dataclass(frozen=True)
class Settings:
    """A whole run: model, schedule, data, and the scalars of optimizer and training."""

    preset: str  # names the experiment in the log
    model: ModelConfig
    stages: tuple[Stage, ...]  # the schedule's table
    extension: Stage  # more steps, at the final learning rate
    # Data and validation.
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards, a pattern")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards, a pattern")
    val_tokens: int = setting(10_485_760, "tokens to validate on, from the shards' start", low=1)
    val_seq_len: int = setting(262_144, "tokens of one validation sequence", low=1)
    val_every: int = setting(250, "steps between validations; the last is at the end", low=1)
    val_short_window: int = setting(768, "short window of the final validation [33, 35]", low=1)
    val_long_window: int = setting(2560, "long window of the final validation [33, 35]", low=1)
    # Techniques of the schedule, and how it is run.
    steps: int | None = setting(None, "steps in all; the stages shrink in proportion", low=1)
    yarn: bool = setting(True, "YaRN: rotary embedding stretched as windows grow [31]")
    multi_token: bool = setting(True, "multi-token prediction in training [53]")
    prefix_tokens: bool = setting(True, "prefix tokens in training, with GPT-2's vocabulary [88]")
    length_schedule: bool = setting(True, "shorter documents in the first stages [72]")
    extension_windows: bool = setting(True, "wider windows in the extension")
    long_validation: bool = setting(True, "wider windows in the final validation [33, 35]")
    epochs: int = setting(1, "times to go over the training shards", low=1)
    slices: int = setting(8, "microbatches of a batch; the more, the less memory", low=1)
    seed: int = setting(1, "seed of the initial weights", low=0, high=2**63 - 1)
    # How it is computed.
    dtype: str = setting("auto", "auto: bfloat16 where the hardware has it", choices=DTYPES)
    kernels: bool = setting(True, "Triton kernels on GPUs; false: plain PyTorch everywhere")
    fp8: bool = setting(True, "8-bit floats in training's head and MLP where GPUs can [19, 84, 89]")
    compile: bool = setting(True, "compile with torch.compile")
    sparse_exchange: bool = setting(True, "ranks exchange bigram gradients by touched rows")
    # The optimizers. Their learning rates are multiplied by the stage's and the parameter's.
    muon: bool = setting(True, "NorMuon for the matrices, rather than Adam")
    muon_lr: float = setting(0.023, "learning rate of NorMuon")
    muon_wd: float = setting(1.2, "weight decay of NorMuon, multiplied by its learning rate")
    muon_beta2: float = setting(0.9, "decay of NorMuon's mean squares", low=0, high=1)
    polar_steps: int = setting(5, "steps of Polar Express [38]: 5, or flatter 6", low=5, high=6)
    momentum: float = setting(
        0.95, "momentum of NorMuon; it starts and ends 0.1 lower", low=0.1, high=1
    )
    momentum_warmup: int = setting(300, "steps over which the momentum rises", low=1)
    momentum_cooldown: int = setting(50, "last steps, over which the momentum falls", low=1)
    slow_momentum: float = setting(0.0, "second, slower momentum, 0 for none", low=0, high=1)
    slow_weight: float = setting(1.0, "what the slower momentum is multiplied by")
    average_steps: int = setting(0, "last steps, to whose mean NorMuon's weights go halfway", low=0)
    adam_every: int = setting(2, "steps whose gradients an update of Adam has [39]", low=1)
    adam_lr: float = setting(0.008, "learning rate of Adam")
    adam_wd: float = setting(0.005, "weight decay of Adam, multiplied by its learning rate")
    tables_every: int = setting(1, "1: embedding tables join all Adam updates, 2: half", low=1)
    tables_from: int = setting(336, "step from which on they do; before, they join all", low=0)
    cooldown: float = setting(0.6, "last fraction of steps, when lr falls", low=0.001, high=1)
    final_lr: float = setting(0.15, "learning rate at the end, a fraction of adam_lr and muon_lr")
    # What a run leaves.
    run_id: str = setting("", "name of the log (default: made from the date)")
    checkpoint_every: int = setting(0, "steps between checkpoints, 0 for none", low=0)
    checkpoint_last: bool = setting(False, "write a checkpoint at the end")
    sample_every: int = setting(
        0, "steps between samples of what the model writes, 0 for none; one is at the end", low=0
    )
    resume: str = setting("", "checkpoint to go on from")
    wandb: str = setting("", "project of Weights & Biases that gets the log's numbers")

    @functools.cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        """The schedule's table as it is run: without what the switched-off techniques leave out."""
        extension = self.extension
        if not self.extension_windows:
            extension = replace(extension, windows=self.stages[-1].windows)
        off = {}
        if not self.length_schedule:
            off["max_seq_len"] = extension.max_seq_len
        if not self.multi_token:
            off["mtp"] = ((1,), (1,))
        if not self.prefix_tokens or not self.model.has_gpt2_tokens:
            off["prefix"] = (0, 0)
        return tuple(replace(stage, **off) for stage in (*self.stages, extension))

    @property
    def has_prefixes(self) -> bool:
        """Whether any stage has prefix tokens."""
        return any(stage.prefix != (0, 0) for stage in self.all_stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.all_stages)

    def stages_begun(self, step: int) -> list[tuple[Stage, int]]:
        """The stages that have begun by a step, each with its first step; the last is current."""
        begun = []
        first = 0
        for stage in self.all_stages:
            if first <= step:
                begun.append((stage, first))
            first += stage.steps
        return begun


# The record's network: 11 layers, most with a short window, four with paired heads.
# Layer 6 has no attention, and takes in layer 3's output instead. The last three read what layer 7
# left; the last one mixes in earlier layers by MUDD. Networks before layers 0 and 4 make the gates.
# What narrow_qk=True says holds with --narrow-qk true alone: the record has no such layers.
RECORD_LAYERS = (
    Layer(paired_heads=True, narrow_qk=True, gates=True),
    Layer(narrow_qk=True, value_embeds=0, xsa=True),
    Layer(paired_heads=True, narrow_qk=True, value_embeds=1),
    Layer(window="long", xsa=True, attention_gate=True),
    Layer(narrow_qk=True, xsa=True, gates=True),
    Layer(paired_heads=True, narrow_qk=True),
    Layer(attention=False, skip=3),
    Layer(narrow_qk=True, xsa=True),
    Layer(narrow_qk=True, value_embeds=2, single_input=7),
    Layer(paired_heads=True, narrow_qk=True, value_embeds=3, single_input=7),
    Layer(
        window="long", value_embeds=4, attention_gate=True, dc=True, single_input=7, mudd=(7, 9, 3)
    ),
)
# Batches, windows and learning rates grow together: small batches make the most of early steps,
# large ones of late steps. A larger batch tolerates a larger rate.
RECORD_STAGES = (
    Stage(
        steps=423, batch_tokens=131_072, max_seq_len=896, windows=(128, 384), lr=1.0,
        mtp=((1, 0.5, 0.25), (1, 0.5, 0)), prefix=(0.25, 0.25), tied=True,
    ),
    Stage(
        steps=424, batch_tokens=262_144, max_seq_len=2048, windows=(384, 896), lr=1.52,
        mtp=((1, 0.5, 0), (1, 0, 0)), prefix=(0.25, 0), tied=True,
    ),
    Stage(
        steps=423, batch_tokens=393_216, max_seq_len=2048, windows=(640, 1408), lr=1.73,
        mtp=((1, 0, 0), (1, 0, 0)),
    ),
)
# The record's network and schedule in miniature, at a thirtieth of the size: every technique, to
# try edits on. What does harm in so short a run is off (see "mini" below): further targets take
# from the next one's loss, and networks for the gates learn too slowly.
MINI_LAYERS = (
    Layer(paired_heads=True, narrow_qk=True, value_embeds=0, attention_gate=True, gates=True),
    Layer(window="long", xsa=True, attention_gate=True),
    Layer(attention=False, skip=0),
    Layer(narrow_qk=True, value_embeds=1, xsa=True, attention_gate=True),
    Layer(
        window="long", value_embeds=2, xsa=True, attention_gate=True, dc=True, single_input=3,
        mudd=(3, 2, 1),
    ),
)
MINI_STAGES = (
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=512, windows=(64, 128), lr=1.0,
        mtp=((1, 0.5, 0.25), (1, 0.5, 0)), tied=True,
    ),
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=1024, windows=(64, 128), lr=1.0,
        mtp=((1, 0.5, 0), (1, 0, 0)), tied=True,
    ),
    Stage(
        steps=120, batch_tokens=8192, max_seq_len=1024, windows=(64, 256), lr=1.0,
        mtp=((1, 0, 0), (1, 0, 0)),
    ),
)

# The laptop track's record, run for longer, at lower rates and with longer documents. Most of what
# it knows is looked up, in embeddings of n-grams; its one layer copies what came after a token like
# its own.
TINY_LAYERS = (Layer(window="long", value_embeds=0, xsa=True, attention_gate=True),)
TINY_STAGES = (
    Stage(steps=420, batch_tokens=2048, max_seq_len=512, windows=(64, 256), lr=1.0, tied=True),
    Stage(steps=420, batch_tokens=2048, max_seq_len=1024, windows=(64, 256), lr=1.0, tied=True),
    Stage(steps=420, batch_tokens=2048, max_seq_len=1024, windows=(64, 512), lr=1.0),
)

RECORD = Settings(
    preset="record",
    model=ModelConfig(RECORD_LAYERS),
    stages=RECORD_STAGES,
    extension=replace(RECORD_STAGES[-1], steps=15, windows=(768, 1664)),
)
MINI = Settings(
    preset="mini",
    model=ModelConfig(
        MINI_LAYERS, vocab_size=257, bos_id=256, dim=256, heads=4, bigram_rows=15, bigram_dim=64,
        gates=False,
    ),
    stages=MINI_STAGES,
    extension=replace(MINI_STAGES[-1], steps=10),
    train_files="data/sympy/sympy_train_*.bin",
    val_files="data/sympy/sympy_val_*.bin",
    val_tokens=524_288,
    val_seq_len=16_384,
    val_every=125,
    val_short_window=64,
    val_long_window=256,
    slices=4,
    multi_token=False,
    muon_lr=0.035,
    momentum=0.75,
    momentum_warmup=60,
    momentum_cooldown=15,
    tables_from=90,
)
PRESETS = {
    "record": RECORD,
    # The project's candidate for the next record: as many steps, and cheaper ones. No GPU has run
    # it; records/next.md has what it should take, and what speaks for each of its parts.
    "next": replace(
        RECORD,
        preset="next",
        model=replace(RECORD.model, narrow_qk=True),
        polar_steps=6,
        tables_every=2,
    ),
    "mini": MINI,
    "tiny": replace(
        MINI,
        preset="tiny",
        model=replace(
            MINI.model, layers=TINY_LAYERS, heads=2, mlp_ratio=1, ngram=5, bigram_rows=60
        ),
        stages=TINY_STAGES,
        extension=replace(TINY_STAGES[-1], steps=30),
        val_every=430,
        val_long_window=512,
        slices=1,
        muon_lr=0.025,
        momentum=0.8,
        momentum_warmup=250,
        momentum_cooldown=62,
        adam_every=1,
        adam_lr=0.004,
        cooldown=0.7,
        final_lr=0.05,
    ),
}

# The command that fetches or makes a preset's shards; its path counts from this file's folder.
FETCH = {
    **dict.fromkeys(("record", "next"), "data/cached_fineweb10B.py 9"),
    **dict.fromkeys(("mini", "tiny"), "data/embedded.py"),
}


# The table of parameters. A new parameter is one row of `parameter_table`: the model then makes it,
# the optimizer updates it, checkpoints keep it, and --dry-run prints it.


class Init(NamedTuple):
    """How a parameter starts."""

    text: str  # what --dry-run says of it
    # Makes it from its shape; also gets, by name, the parameters of the rows above its own.
    make: Callable[[tuple[int, ...], dict[str, Tensor]], Tensor]


def constant(value: float) -> Init:
    return Init(f"{value:.5g}", lambda shape, above: torch.full(shape, float(value)))


def stored(values: tuple[float, ...], scale: float) -> Init:
    """A vector such that `scale` times it is `values`."""
    return Init(f"values at init / {scale:g}", lambda shape, above: torch.tensor(values) / scale)


def normal(std: float) -> Init:
    return Init(f"normal {std:g}", lambda shape, above: torch.randn(shape) * std)


def uniform(bound: float) -> Init:
    def make(shape, above):
        return torch.empty(shape).uniform_(-bound, bound)

    return Init(f"uniform ±{bound:.5g}", make)


def uniform_in_zero_out(bound: float) -> Init:
    """A bank of pairs (in, out): `out` starts at zero, so that a layer at first adds nothing."""

    def make(shape, above):
        bank = torch.empty(shape).uniform_(-bound, bound)
        bank[1::2] = 0
        return bank

    return Init(f"uniform ±{bound:.5g}, out 0", make)


def transpose_of(name: str) -> Init:
    return Init(f"{name} transposed", lambda shape, above: above[name].T.contiguous())


class ParameterRow(NamedTuple):
    """One row of the table of parameters.

    A "bank" holds matrices, which NorMuon updates; all else is Adam's. Of a "bank" and a "table"
    each rank updates a part, of a "gate" or a "scalar" the whole. Scalars are always float32.
    """

    kind: str  # "bank", "table", "gate" or "scalar"
    shape: tuple[int, ...]
    init: Init
    betas: tuple[float, float]  # Adam's; a bank's hold for `--muon false`, as do its lr and wd
    lr: float  # multiplies `adam_lr`
    wd: float  # multiplies `adam_wd`
    # The layers that its first axis counts: `GPT.layer_weights` hands each of them its own row.
    layers: list[int] | None


class Mix(NamedTuple):
    """What a layer multiplies before it adds up, a number for each token (T, 1).

    Learned scalars, the same for all tokens; but x0's and the bigram's each token computes, and in
    MUDD's layer all of them.
    """

    attn_resid: Tensor  # the residual stream, when attention's output is added
    x0: Tensor  # x0, added after attention; in MUDD's layer the residual stream's start
    bigram: Tensor  # the bigram embedding, added after attention
    mlp_resid: Tensor  # the residual stream, when the MLP's output is added
    mlp_post: Tensor  # the MLP's output
    attn_post: Tensor | None = None  # attention's output; None where W_out has been multiplied


# A layer multiplies the residual stream by 1.1 (√1.1 at each of its two sums), so that what late
# layers add counts more than what early ones added [45].
RESID_START = 1.1**0.5


class MuddBefore(NamedTuple):
    """MUDD's coefficients before its layer, (T, 1) each. The defaults are their values at init."""

    # What is added to v.
    v_start: Tensor | float = 0  # times the residual stream's start
    v_earlier: Tensor | float = 0  # times the first earlier layer's output
    v_stream: Tensor | float = 0  # times the residual stream
    # What is added to the residual stream.
    start: Tensor | float = 0
    earlier: Tensor | float = 0
    stream: Tensor | float = 0
    # The gates of the value embedding, for the first half of the heads and for the second.
    value_gate_1: Tensor | float = 2
    value_gate_2: Tensor | float = 2
    # The layer's `Mix`.
    attn_resid: Tensor | float = RESID_START
    attn_post: Tensor | float = 1
    x0: Tensor | float = 0
    bigram: Tensor | float = 0.05
    mlp_resid: Tensor | float = RESID_START
    mlp_post: Tensor | float = 1


class MuddAfter(NamedTuple):
    """MUDD's coefficients after the last layer, of what is added to the residual stream."""

    start: Tensor | float = 0  # the residual stream's start
    source_1: Tensor | float = -0.5  # the row's three sources; -0.5 is the "backout" [40]
    source_2: Tensor | float = 0
    value_embed: Tensor | float = 0  # the token's row in the first table of value embeddings
    source_3: Tensor | float = 0


MUDD_SCALE = 0.1  # what MUDD's networks put out is multiplied by this


class Gate(NamedTuple):
    """What a gate network makes of each token for one layer [85]."""

    layer: int
    name: str
    width: int  # 1, or one coefficient a head
    start: float  # its value at init


def gate_networks(config: ModelConfig) -> list[list[Gate]]:
    """What each gate network makes, in the order of its outputs; none with `--gates false`."""
    networks = []
    heads = config.heads
    for layer, row in enumerate(config.rows):
        if row.gates:
            networks.append([])
        if not networks:
            return []
        if row.xsa:
            networks[-1].append(Gate(layer, "xsa_alphas", heads, 0))
        if row.attention_gate:
            networks[-1].append(Gate(layer, "head_gates", heads, 0.25))
        # Both are added after attention, layer 0's bigram before it. MUDD makes its own.
        if row.attention and row.mudd is None:
            networks[-1].append(Gate(layer, "x0", 1, 0))
        if config.bigram and (row.attention or layer == 0) and row.mudd is None:
            networks[-1].append(Gate(layer, "bigram", 1, 0.05))
        if row.skip is not None:
            networks[-1].append(Gate(layer, "skip", 1, 0.5))  # half of what it is without
        if row.dc:
            networks[-1].append(Gate(layer, "dc_in", heads, 1))
            networks[-1].append(Gate(layer, "dc_out", heads, 0))
    return networks


def qk_banks(config: ModelConfig) -> dict[str, tuple[list[int], int]]:
    """The banks of Q and K: each one's layers, and the rows of a head."""
    narrow = config.layers_with("narrow_qk")
    wide = [layer for layer in config.layers_with("attention") if layer not in narrow]
    head_dim = config.dim // config.heads
    return {"qk_bank": (wide, head_dim), "narrow_qk_bank": (narrow, head_dim // 2)}


def qk_shape(config: ModelConfig, layers: int, head_rows: int) -> tuple[int, int, int]:
    """The shape of a bank of Q and K, whose matrices NorMuon orthogonalizes one by one.

    With --head-pairs each is two heads, 01, 23, … of Q and then of K [80]; else all of Q or K.
    """
    heads_together = 2 if config.head_pairs else config.heads
    matrices = 2 * config.heads // heads_together
    return layers * matrices, heads_together * head_rows, config.dim


def parameter_table(config: ModelConfig) -> dict[str, ParameterRow | None]:
    """The model's parameters, by name; None for one that the switches leave out.

    They are drawn in this order, and ranks exchange those of a kind in this order.
    """
    count = len(config.layers)
    attending = config.layers_with("attention")
    valued = config.layers_with("value_embeds")
    mudd = config.layers_with("mudd")
    gated = [layer for layer in valued if layer not in mudd]  # MUDD makes its own gates
    dim, heads, vocab = config.dim, config.heads, config.padded_vocab

    tables = 1 + max((config.rows[layer].value_embeds for layer in valued), default=-1)
    bound = 0.5 * 3**0.5 * dim**-0.5  # a standard deviation of 0.5 / √D

    table = {}

    def add(name, kind, shape, init, betas, lr, wd, when=True, layers=None):
        if layers is not None:
            when = len(layers) > 0
            shape = (len(layers), *shape)
        table[name] = ParameterRow(kind, shape, init, betas, lr, wd, layers) if when else None

    # Tables of vocabulary size, and the banks of matrices.
    bigram_shape = config.bigram_table_rows, config.bigram_dim
    add("bigram_table", "table", bigram_shape, constant(0), (0.75, 0.95), 75, 5, config.bigram)
    add("lm_head", "table", (dim, vocab), normal(0.005), (0.5, 0.95), 1, 150)
    add("embed", "table", (vocab, dim), transpose_of("lm_head"), (0.5, 0.95), 1, 150)
    for name, (layers, head_rows) in qk_banks(config).items():
        shape = qk_shape(config, len(layers), head_rows)
        add(name, "bank", shape, uniform(bound), (0.9, 0.95), 0.125, 10, len(layers) > 0)
    # V and O of each layer; then W_in and W_out of each layer, W_out transposed.
    vo_shape, mlp_shape = (2 * len(attending), dim, dim), (2 * count, config.mlp_ratio * dim, dim)
    add("vo_bank", "bank", vo_shape, uniform(bound), (0.9, 0.95), 0.125, 10)
    add("mlp_bank", "bank", mlp_shape, uniform_in_zero_out(bound), (0.9, 0.95), 0.125, 10)
    value_shape = tables * vocab, dim
    add("value_embeds", "table", value_shape, normal(0.01), (0.75, 0.95), 75, 5, len(valued) > 0)

    # What every layer has, whatever its row says; see `Mix`. The pairs are for attention and MLP.
    add("resid_lambdas", "scalar", (count, 2), constant(RESID_START), (0.9, 0.95), 5, 0)
    add("post_lambdas", "scalar", (count, 2), constant(1), (0.9, 0.95), 1, 0)
    networks = gate_networks(config)  # which make what is learned directly without them
    learned = not networks
    bigram = config.bigram and learned
    add("x0_lambdas", "scalar", (count,), constant(0), (0.9, 0.95), 1, 0, learned)
    add("bigram_lambdas", "scalar", (count,), constant(0.05), (0.9, 0.95), 1, 0, bigram)
    # The scalars that multiply the matrices Q, K, V and O of a layer [47].
    add("qkv_lambdas", "scalar", (len(attending),), constant(0.5), (0.9, 0.99), 5, 0)
    add("out_lambdas", "scalar", (len(attending),), constant(1), (0.9, 0.99), 5, 0)

    # What the layers have whose row says so.
    xsa = config.layers_with("xsa") if learned else []
    has_gate = config.layers_with("attention_gate") if learned else []
    add("xsa_alphas", "scalar", (heads,), constant(0), (0.9, 0.95), 1, 0, layers=xsa)
    add("attention_gates", "gate", (heads, 12), constant(0), (0.9, 0.99), 1, 1, layers=has_gate)
    add("value_gates", "gate", (heads, 12), constant(0), (0.9, 0.99), 1, 1, layers=gated)

    # What the network has once.
    skips = len(config.layers_with("skip")) > 0
    add("smear_lambda", "scalar", (1,), constant(0), (0.9, 0.99), 5, 0, config.smear)
    add("smear_gate", "gate", (12,), constant(0), (0.9, 0.99), 0.01, 0, config.smear)
    add("skip_lambda", "scalar", (1,), constant(-1.5), (0.9, 0.99), 5, 0, skips)
    add("skip_gate", "gate", (12,), constant(0), (0.9, 0.99), 0.05, 0, skips and learned)

    # MUDD's two networks of one hidden layer of 64, one before its layer and one after the last.
    mixes = len(mudd) > 0
    kaiming = uniform(dim**-0.5)  # Kaiming's uniform init with a = √5
    starts = *MuddBefore(), *MuddAfter()
    bias = stored(starts, MUDD_SCALE)
    add("mudd_w1", "gate", (2, 64, dim), kaiming, (0.9, 0.99), 0.25, 1, mixes)
    add("mudd_w2", "gate", (len(starts), 64), constant(0), (0.9, 0.99), 0.25, 1, mixes)
    add("mudd_bias", "scalar", (len(starts),), bias, (0.9, 0.99), 0.25, 0, mixes)

    # The networks of the gates are like MUDD's, but for one learned scale of all of them.
    made = len(networks) > 0
    starts = []
    for gate in itertools.chain(*networks):
        starts += [gate.start] * gate.width
    bias = stored(tuple(starts), MUDD_SCALE)
    w1_shape, w2_shape = (len(networks), 64, dim), (len(starts), 64)
    add("gates_w1", "gate", w1_shape, kaiming, (0.9, 0.99), 0.1, 1, made)
    add("gates_w2", "gate", w2_shape, constant(0), (0.9, 0.99), 0.1, 1, made)
    add("gates_bias", "scalar", (len(starts),), bias, (0.9, 0.99), 0.1, 0, made)
    add("gates_scale", "scalar", (1,), constant(MUDD_SCALE), (0.9, 0.99), 0.1, 0, made)
    return table


class Hyper(NamedTuple):
    """What the schedule says about one step."""

    stage: Stage
    lr: float  # multiplies both optimizers' learning rates
    momentum: float  # NorMuon's
    adam: bool  # whether Adam runs, on the gradients of `adam_every` steps [39]
    tables: bool  # whether it then updates the embedding tables, too; else their gradients wait
    delayed: bool  # whether the step leaves W_out an FP8 scale by the weights before it [89]
    mtp: tuple[float, ...]  # the weights of the next targets
    prefix: float  # the weight of the next target's prefix
    averaged: int  # how many of the last `average_steps` steps have been taken with this one


def schedule(settings: Settings, step: int) -> Hyper:
    """The schedule at a step, counted from 0; at `total_steps`, that of the final validation.

    The learning rate is constant, then falls linearly; the momentum rises, stays, and falls.
    """
    total = settings.total_steps
    stage, first = settings.stages_begun(step)[-1]
    if step == total and settings.long_validation:
        stage = replace(stage, windows=(settings.val_short_window, settings.val_long_window))

    scheduled = total - settings.extension.steps
    constant_steps = scheduled * (1 - settings.cooldown)
    t = (step - constant_steps) / (scheduled - constant_steps)
    t = min(max(t, 0.0), 1.0)
    lr = (1 - t) * stage.lr + t * settings.final_lr

    rising = min(step / settings.momentum_warmup, 1.0)
    falling = (step - (total - settings.momentum_cooldown)) / settings.momentum_cooldown
    momentum = settings.momentum - 0.1 * (1 - rising) - 0.1 * max(falling, 0.0)

    def now(start: float, end: float) -> float:
        return start + (end - start) * (step - first) / stage.steps

    mtp = tuple(now(start, end) for start, end in zip(*stage.mtp))
    prefix = now(*stage.prefix)
    updates, waiting = divmod(step + 1, settings.adam_every)  # of Adam, with this one
    tables = step < settings.tables_from or updates % settings.tables_every == 0
    # At first W_out grows from zero, too fast for a scale that lags behind.
    delayed = step >= 16
    averaged = max(step + 1 - (total - settings.average_steps), 0)
    return Hyper(
        stage, lr, momentum, adam=waiting == 0, tables=tables, delayed=delayed, mtp=mtp,
        prefix=prefix, averaged=averaged,
    )


# What counts steps of the whole schedule, beside the stages.
COUNT_STEPS = ("momentum_warmup", "momentum_cooldown", "average_steps", "tables_from")


def with_steps(settings: Settings, steps: int) -> Settings:
    """The settings with `steps` in all: what else counts steps shrinks or grows in proportion.

    Every stage keeps at least one step.
    """
    stages = settings.all_stages
    if steps < len(stages):
        raise UserError(
            f"--steps {steps}: a run has at least one step a stage, {len(stages)} in all"
        )
    factor = steps / settings.total_steps
    resized = []
    end = full_end = 0
    for number, stage in enumerate(stages):
        full_end += stage.steps
        begin = end
        still_to_come = len(stages) - 1 - number
        end = min(round(full_end * factor), steps - still_to_come)
        end = max(end, begin + 1)
        resized.append(replace(stage, steps=end - begin))
    return replace(
        settings, steps=steps, stages=tuple(resized[:-1]), extension=resized[-1],
        momentum_warmup=max(round(settings.momentum_warmup * factor), 1),
        momentum_cooldown=max(round(settings.momentum_cooldown * factor), 1),
        average_steps=math.ceil(settings.average_steps * factor),
        tables_from=round(settings.tables_from * factor),
    )


# 2. Kernels =======================================================================================
# What PyTorch has no fast expression for, in Triton. Each kernel stands beside the plain PyTorch
# of the same thing, and a function of each chooses between them (`symmetric_matmul`, `mlp`,
# `summed_loss` …): with `kernels`, which is true on CUDA in bfloat16 (`choose_kernels`), it runs
# the kernel, elsewhere the plain form. (Attention goes by the device alone; and what the MLP's
# kernel computes has a second plain form, for GPUs without TMA.) To change what is computed, an
# activation for instance, change the plain form and train with `--kernels false`; the kernel can
# wait until the idea has proven itself. Kernels compute in float32 and round once.


def copy_of(body: Callable) -> Callable:
    """A copy of a function, with graphs of its own, which torch.compile keeps by code object."""
    code = body.__code__.replace()  # an equal one, but another
    copy = types.FunctionType(code, body.__globals__, body.__name__, body.__defaults__)
    copy.__kwdefaults__ = body.__kwdefaults__
    return copy


def region(body: Callable) -> Callable:
    """Compiles a function of the model by itself, for the CPU and for validation.

    Training on CUDA compiles the whole model as one graph; there a region is just its body. Where
    each is compiled alone, all layers of a kind share its graph, which keeps compilation short.

    PyTorch makes at most eight graphs of one code object (its recompile limit), and runs what would
    need a ninth uncompiled, with nothing more than a warning. Three training lengths, a validation
    and some choices of options are soon more than eight. So each length of the first tensor and
    choice of (keyword) options gets a copy of the function, whose eight graphs are its own.
    """

    @functools.cache
    def compiled_copy(length: int, *options) -> Callable:
        return torch.compile(copy_of(body), dynamic=False)

    @functools.wraps(body)
    def call(x: Tensor, *inputs, **options):
        if torch.compiler.is_compiling():
            return body(x, *inputs, **options)
        return compiled_copy(len(x), *options.values())(x, *inputs, **options)

    return call


# --- Symmetric matmuls, for NorMuon: half of the blocks are the mirror image of the other half.

# How a matmul is cut: the side of a block, the step along the inner dimension, pipeline stages,
# warps. Shared memory must hold the stages: a block may take 163 KB on compute capability 8.0,
# 227 KB on 9.0, and 99 KB on consumer cards (8.6, 8.9, 12.0).
SYMMETRIC_TILES = 128, 64, 4, 8


@jit
def symmetric_kernel(
    a, out, n, k, stride_batch, stride_row, stride_k, alpha, beta, SIZE: constexpr, INNER: constexpr
):
    """A block of out (n, n) = alpha A A^T + beta A, and its mirror image: A (n, k) any strides."""
    across = tl.cdiv(n, SIZE)
    # Swizzled: programs that run at the same time share rows and columns, which are then in cache.
    i = tl.program_id(0) // across
    j = tl.program_id(0) % across
    i, j = tl.swizzle2d(i, j, across, across, 8)
    if i > j:
        return  # below the diagonal: the mirror image of another block
    batch = tl.program_id(1).to(tl.int64)
    a += batch * stride_batch
    out += batch * n * n
    rows = i * SIZE + tl.arange(0, SIZE)
    columns = j * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, k, INNER):
        inner = start + tl.arange(0, INNER)
        left_places = rows[:, None] * stride_row + inner * stride_k
        right_places = columns * stride_row + inner[:, None] * stride_k
        left = tl.load(a + left_places, (rows[:, None] < n) & (inner < k), 0)
        right = tl.load(a + right_places, (columns < n) & (inner[:, None] < k), 0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= alpha
    upper = (rows[:, None] <= columns) & (columns < n)
    if beta is not None:
        addend = tl.load(a + rows[:, None] * stride_row + columns * stride_k, upper, 0)
        total += beta * addend.to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * n + columns, total, upper)
    tl.store(out + columns * n + rows[:, None], total, upper)


@library.custom_op("train_gpt::symmetric_matmul", mutates_args=())
def symmetric_op(a: Tensor, alpha: float = 1, beta: float | None = None) -> Tensor:
    """`symmetric_matmul` by the kernel."""
    count, n, k = a.shape
    out = a.new_empty(count, n, n)
    size, inner, stages, warps = SYMMETRIC_TILES
    grid = (triton.cdiv(n, size) ** 2, count)
    symmetric_kernel[grid](
        a, out, n, k, *a.stride(), alpha, beta, SIZE=size, INNER=inner, num_stages=stages,
        num_warps=warps,
    )
    return out


@symmetric_op.register_fake
def _(a, alpha=1, beta=None):
    return a.new_empty(a.size(0), a.size(1), a.size(1))


def symmetric_matmul(
    a: Tensor, alpha: float = 1, beta: float | None = None, *, kernels: bool
) -> Tensor:
    """alpha A A^T + beta A for each matrix of a (n, rows, cols); beta is for symmetric A alone."""
    if kernels:
        return symmetric_op(a, alpha, beta)
    if beta is None:
        return alpha * (a @ a.mT)
    return torch.baddbmm(a, a, a.mT, beta=beta, alpha=alpha)


# --- The MLP's activation, ReLU², and the matmul before it.


def relu_squared(x: Tensor) -> Tensor:
    """The MLP's activation [5]; what the kernel below computes in the same pass as the matmul."""
    return F.relu(x).square()


# Rows and columns of a block, the step along the inner dimension (in bf16; FP8 takes twice that),
# pipeline stages, warps; by the compute capability from which on they hold. 9 is the first one with
# tensor descriptors (TMA), which the kernel loads and stores by. A third thing to load or store
# takes the shared memory of a stage.
MLP_TILES = {12: (128, 128, 64, 3, 8), 9: (128, 256, 64, 4, 8)}


@jit
def mlp_kernel(
    a, b, scale_a, scale_b, post, out, out8, out8_scale, maxima, n, m, k, ROWS: constexpr,
    COLUMNS: constexpr, INNER: constexpr,
):
    """Blocks of out (n, m) = relu(A B^T)^2; with `post`, the square itself, 2 (A B^T) sqrt(post).

    a, b, post, out and out8 are tensor descriptors, of A (n, k) and B (m, k). The scales are FP8's:
    one for each row of A, and one for B.
    With `out8` the square goes there, too, in 8 bits, and into `maxima` the largest by program.
    """
    down = tl.cdiv(n, ROWS)
    across = tl.cdiv(m, COLUMNS)
    if out8 is not None:
        inverse = 1 / tl.load(out8_scale)
        largest = tl.zeros((ROWS,), tl.float32)  # of each row: for these no warp waits for another
    # One program a multiprocessor, each of which takes every so-many-th block.
    # Flattened: the pipeline loads a block's first tiles during the products of the one before.
    for block in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        i, j = tl.swizzle2d(block // across, block % across, down, across, 8)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, k, INNER):
            left = a.load([i * ROWS, start])
            right = b.load([j * COLUMNS, start])
            total = tl.dot(left, right.T, total)
        if scale_a is not None:
            rows = i * ROWS + tl.arange(0, ROWS)
            total *= tl.load(scale_a + rows, rows < n, 0)[:, None] * tl.load(scale_b)
        # Stored a half of the columns at a time, which leaves shared memory to the pipeline.
        halves = tl.split(total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        for h in tl.static_range(2):
            place = [i * ROWS, j * COLUMNS + h * (COLUMNS // 2)]
            half = halves[h]
            if post is None:
                half = tl.maximum(half, 0)
                half *= half
            else:
                half = 2 * half
                half *= tl.sqrt(post.load(place).to(tl.float32))
            out.store(place, half.to(out.dtype))
            if out8 is not None:
                largest = tl.maximum(largest, tl.max(half, 1))
                out8.store(place, tl.minimum(inverse * half, 448).to(out8.dtype))  # E4M3_MAX
    if out8 is not None:
        tl.store(maxima + tl.program_id(0), tl.max(largest))


@library.custom_op("train_gpt::relu_squared_matmul", mutates_args=())
def relu_squared_matmul_op(x: Tensor, w: Tensor) -> Tensor:
    """`relu_squared_matmul` by the kernel."""
    return launch_mlp_kernel(mlp_tiles(x, w), x, w, x.new_empty(len(x), len(w)))


def relu_squared_matmul(x: Tensor, w: Tensor) -> Tensor:
    """relu(X W^T)^2 (n, m) of x (n, k) and w (m, k), all in bf16."""
    if mlp_tiles(x, w) is not None:
        return relu_squared_matmul_op(x, w)
    # Written out, like its gradient below: another plain form has no kernel yet.
    return F.relu(x @ w.T).square()


@library.custom_op("train_gpt::relu_squared_fp8", mutates_args=())
def relu_squared_fp8_op(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, post_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`relu_squared_fp8` by the kernel, with a maximum of each of its programs."""
    post, post8, maxima = relu_squared_fp8_outputs(x, w, x_scale, w_scale, post_scale)
    launch_mlp_kernel(
        mlp_tiles(x, w), x, w, post, x_scale, w_scale, out8=post8, out8_scale=post_scale,
        maxima=maxima,
    )
    return post, post8, maxima


def relu_squared_fp8(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, post_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(X W^T)^2 (n, m) in bf16, in e4m3 by `post_scale`, and the largest number of each part.

    x (n, k) and w (m, k) are e4m3, with scales (n, 1) and 0-d. The parts are any that cover the
    whole.
    """
    if mlp_tiles(x, w) is not None:
        return relu_squared_fp8_op(x, w, x_scale, w_scale, post_scale)
    post = F.relu(scaled_mm(x, w, x_scale, w_scale)).square()
    return post, quantize(post, post_scale), post.amax().float()[None]


@library.custom_op("train_gpt::relu_squared_gradient", mutates_args=())
def relu_squared_gradient_op(grad: Tensor, w_out: Tensor, post: Tensor) -> Tensor:
    """`relu_squared_gradient` by the kernel."""
    out = grad.new_empty(len(grad), len(w_out))
    return launch_mlp_kernel(mlp_tiles(grad, w_out), grad, w_out, out, post=post)


def relu_squared_gradient(grad: Tensor, w_out: Tensor, post: Tensor) -> Tensor:
    """The gradient (n, m) before the activation, from that of the MLP's output, grad (n, k).

    d relu(x)^2 / dx = 2 relu(x), and relu(x) is the root of the square `post` (n, m), so that
    only the square need be kept [59, 87].
    """
    if mlp_tiles(grad, w_out) is not None:
        return relu_squared_gradient_op(grad, w_out, post)
    return 2 * (grad @ w_out.T) * post.sqrt()


@relu_squared_matmul_op.register_fake
def _(x, w):
    return x.new_empty(len(x), len(w))


@relu_squared_fp8_op.register_fake
def relu_squared_fp8_outputs(x, w, x_scale, w_scale, post_scale):
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    post8 = x.new_empty(len(x), len(w))
    post = torch.empty_like(post8, dtype=torch.bfloat16)
    return post, post8, x.new_empty(programs, dtype=torch.float32)


@relu_squared_gradient_op.register_fake
def _(grad, w_out, post):
    return grad.new_empty(grad.size(0), w_out.size(0), dtype=torch.bfloat16)


def mlp_tiles(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """The row of MLP_TILES for this GPU; None without TMA, or for sizes that TMA cannot take."""
    capability = torch.cuda.get_device_properties(a.device).major
    if a.size(1) % 16 or b.size(0) % 16:
        return None
    for least, tiles in MLP_TILES.items():
        if capability >= least:
            return tiles
    return None


def launch_mlp_kernel(
    tiles, a, b, out, scale_a=None, scale_b=None, post=None, out8=None, out8_scale=None, maxima=None
) -> Tensor:
    rows, columns, inner, stages, warps = tiles
    if scale_a is not None:
        inner *= 2
    if post is not None or out8 is not None:
        stages -= 1
    n, m, k = a.size(0), b.size(0), a.size(1)

    def blocks(x: Tensor | None, *shape: int) -> TensorDescriptor | None:
        return None if x is None else TensorDescriptor.from_tensor(x.contiguous(), shape)

    grid = (torch.cuda.get_device_properties(a.device).multi_processor_count,)
    half = columns // 2
    mlp_kernel[grid](
        blocks(a, rows, inner), blocks(b, columns, inner), scale_a, scale_b,
        blocks(post, rows, half), blocks(out, rows, half), blocks(out8, rows, half), out8_scale,
        maxima, n, m, k, ROWS=rows, COLUMNS=columns, INNER=inner, num_stages=stages,
        num_warps=warps,
    )
    return out


# --- The loss: capped logits, and the cross-entropy of the next targets.

# The softcap [18, 54]: z = CAP * sigmoid((logit + CAP_SHIFT) / CAP_WIDTH), so that 0 < z < CAP and
# no logit can run away. The shift makes it asymmetric.
CAP, CAP_SHIFT, CAP_WIDTH = 23, 5, 7.5


def softcap(logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Capped logits in float32; `dtype` is what the sigmoid is rounded to."""
    sigmoid = torch.sigmoid((logits.float() + CAP_SHIFT) / CAP_WIDTH)
    return CAP * sigmoid.to(dtype).float()


@region
def token_losses(
    x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype,
    prefix_of: Tensor | None = None, prefix_weight: Tensor | None = None,
) -> Tensor:
    """sum over k of weights[k] * (lse(z_i) - z_i[targets[i + k]]), in nats, for each token i (T,).

    x (T, D) is the normed residual stream, lm_head (D, V), targets (T,); weights (K,) are those of
    the next K targets (multi-token prediction [53]). `dtype` is what the sigmoid is rounded to.
    With a `prefix_table`, prefix_of, a target that has a prefix adds prefix_weight * (lse(z_i) -
    z_i[prefix_of[targets[i]]]) [88].
    """
    z = softcap(x @ lm_head, dtype)  # (T, V)
    losses = weights.sum() * z.logsumexp(-1)
    for k in range(len(weights)):
        # Targets past the end are left out, though the normalizer keeps all the weights, as in the
        # public script's gradient. Its loss leaves out their weights[k] * lse(z_i), too: there the
        # last K - 1 losses of a slice have other values.
        z_target = z.gather(-1, targets[k:, None]).squeeze(-1)
        losses = losses - weights[k] * F.pad(z_target, (0, k))
    if prefix_of is not None:
        prefixes = prefix_of[targets]  # (T,)
        # Where there is none, this loss is 0.
        prefix_losses = F.cross_entropy(z, prefixes, ignore_index=-1, reduction="none")
        losses = losses + prefix_weight * prefix_losses
    return losses


# What a GPU has instructions for and Triton no expression. The kernel is bound by instructions, not
# by memory: with a sigmoid of exp and division it has three times as many.


@jit
def tanh(x):
    """tanh(x), to 11 bits."""
    asm: constexpr = "tanh.approx.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@jit
def exp2(x):
    """2^x, to 22 bits."""
    asm: constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@jit
def to_bf16(x):
    """x in bf16, rounded to nearest, two at a time."""
    asm: constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(asm, "=r,f,f", [x], tl.bfloat16, is_pure=True, pack=2)


@jit
def cap_sigmoid(logits, SHIFT: constexpr, WIDTH: constexpr):
    """sigmoid((logits + SHIFT) / WIDTH) in float32, rounded to bf16: 1/2 + 1/2 tanh of the half."""
    half = logits.to(tl.float32) * (0.5 / WIDTH) + 0.5 * SHIFT / WIDTH
    return to_bf16(0.5 + 0.5 * tanh(half)).to(tl.float32)


@jit
def loss_kernel(
    logits, targets, weights, prefix_of, prefix_weight, losses, grads, tokens, vocab, scale,
    CAP: constexpr, SHIFT: constexpr, WIDTH: constexpr, NEXT: constexpr, MOST: constexpr,
    BLOCK: constexpr,
):
    """A row's loss, and the gradient of the sum of losses by its logits, divided by `scale`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    grads += row * vocab
    # e^z is 2^(BASE2 s) of the sigmoid s.
    BASE2: constexpr = CAP * 1.4426950408889634
    # Once over the row for the normalizer.
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = cap_sigmoid(tl.load(logits + columns, columns < vocab, float("-inf")), SHIFT, WIDTH)
        # At most exp(CAP), so that no maximum has to be found first.
        sums += exp2(BASE2 * s)
    # Each column past the end has added exp(0).
    total = tl.sum(sums) - (tl.cdiv(vocab, BLOCK) * BLOCK - vocab)

    # The targets: the next ones, and the prefix of the first of them.
    k = tl.arange(0, MOST)
    there = (k < NEXT) & (row + k < tokens)
    target = tl.load(targets + row + k, there, 0)
    weight = tl.load(weights + k, k < NEXT, 0)
    if prefix_of is not None:
        prefix = tl.load(prefix_of + tl.load(targets + row))
        is_prefix = (k == NEXT) & (prefix >= 0)
        target = tl.where(is_prefix, prefix, target)
        weight = tl.where(is_prefix, tl.load(prefix_weight), weight)
        there = there | is_prefix
    weight_sum = tl.sum(weight)
    weight = tl.where(there, weight, 0)
    s_target = cap_sigmoid(tl.load(logits + target, there, 0), SHIFT, WIDTH)
    tl.store(losses + row, weight_sum * tl.log(total) - tl.sum(weight * CAP * s_target))

    # And once more for the gradient: of the softmax, less the targets, through the softcap.
    share = weight_sum / total
    slope = CAP / WIDTH / scale
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = cap_sigmoid(tl.load(logits + columns, columns < vocab, 0), SHIFT, WIDTH)
        grad = share * slope * exp2(BASE2 * s) * (s - s * s)
        tl.store(grads + columns, grad.to(grads.dtype.element_ty), columns < vocab)
    # The targets' columns, which have more, are stored anew, those that coincide alike.
    same = target[:, None] == target
    less = tl.sum(tl.where(same, weight, 0), 1)
    grad = slope * (share * exp2(BASE2 * s_target) - less) * (s_target - s_target * s_target)
    tl.debug_barrier()  # waits for the loop's stores, which have these columns without the targets
    tl.store(grads + target, grad.to(grads.dtype.element_ty), there)


@library.custom_op("train_gpt::loss", mutates_args=())
def loss_op(
    logits: Tensor, targets: Tensor, weights: Tensor, fp8: bool,
    prefix_of: Tensor | None = None, prefix_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_losses` (T,), and the gradient (T, V) of their sum by the logits, in one pass.

    With `fp8` the gradient is e5m2, divided by LOGIT_GRAD_SCALE.
    """
    logits = logits.contiguous()
    losses, grads = loss_outputs(logits, targets, weights, fp8)
    tokens, vocab = logits.shape
    loss_kernel[(tokens,)](
        logits, targets, weights, prefix_of, prefix_weight, losses, grads, tokens, vocab,
        LOGIT_GRAD_SCALE if fp8 else 1.0, CAP=CAP, SHIFT=CAP_SHIFT, WIDTH=CAP_WIDTH,
        NEXT=len(weights), MOST=triton.next_power_of_2(len(weights) + 1), BLOCK=4096, num_warps=8,
    )
    return losses, grads


@loss_op.register_fake
def loss_outputs(logits, targets, weights, fp8, prefix_of=None, prefix_weight=None):
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    grads = torch.empty_like(logits, dtype=torch.float8_e5m2 if fp8 else logits.dtype)
    return losses, grads


# --- Gradients of the embedding tables. Tokens look up few of a table's rows, but PyTorch's
# gradient has them all: it is filled with zeros, rounded, and added to that of the step before,
# which takes a tenth of a step. Here each slice adds to the rows that it looked up, in place.


@jit
def add_rows_kernel(
    out, rows, order, values, count, dim, ROWS: constexpr, COLUMNS: constexpr
):
    """out[row] += the sum of values[order[i]] over all i with rows[i] == row; `rows` is sorted.

    The program of a row's first i sums up all of them.
    """
    i = tl.program_id(0)
    row = tl.load(rows + i)
    if tl.load(rows + i - 1, i > 0, -1) == row:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    while tl.load(rows + i, i < count, -1) == row:
        places = i + tl.arange(0, ROWS)
        mine = tl.load(rows + places, places < count, -1) == row
        value_rows = tl.load(order + places, mine, 0)
        mask = mine[:, None] & (columns < dim)
        value = tl.load(values + value_rows[:, None] * dim + columns, mask, 0)
        total += tl.sum(value.to(tl.float32), 0)
        i += ROWS
    out += row * dim + columns
    total += tl.load(out, columns < dim, 0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), columns < dim)


@library.custom_op("train_gpt::add_rows", mutates_args=("out",))
def add_rows(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """out[rows[i]] += values[i] for all i: out (n, dim), rows (T,), values (T, dim), on a GPU."""
    rows, order = rows.long().sort()
    count, dim = values.shape
    grid = (count, triton.cdiv(dim, 256))
    add_rows_kernel[grid](out, rows, order, values.contiguous(), count, dim, ROWS=32, COLUMNS=256)


class LookUp(torch.autograd.Function):
    """table[rows], whose gradient by the table is added to `grad`, in place."""

    @staticmethod
    def forward(ctx, table, rows, grad):
        ctx.save_for_backward(rows, grad)
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, values):
        rows, grad = ctx.saved_tensors
        add_rows(grad, rows.flatten(), values.flatten(0, -2))
        return None, None, None


def look_up(table: Tensor, rows: Tensor, grad: Tensor | None) -> Tensor:
    """table[rows]; with the kernels `grad` is where the gradient by the table goes."""
    if grad is None:
        return F.embedding(rows, table)
    return LookUp.apply(table, rows, grad)


# --- Transposes, for embed and lm_head while they are tied, and for FP8 matmuls.


@jit
def transpose_kernel(source, out, rows, columns, ADD: constexpr, BLOCK: constexpr):
    """A tile of out (columns, rows) = source (rows, columns)^T, or += with ADD."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < rows) & (j < columns)
    value = tl.load(source + i * columns + j, inside)
    if ADD:
        value = value.to(tl.float32) + tl.load(out + j * rows + i, inside).to(tl.float32)
    tl.store(out + j * rows + i, value.to(out.dtype.element_ty), inside)


@library.custom_op("train_gpt::transpose", mutates_args=("out",))
def transpose_op(source: Tensor, out: Tensor, add: bool) -> None:
    rows, columns = source.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
    transpose_kernel[grid](source.contiguous(), out, rows, columns, ADD=add, BLOCK=64)


def transpose_into(out: Tensor, source: Tensor, add: bool = False, *, kernels: bool) -> None:
    """Puts the transpose of the matrix `source` into `out`, or adds it to what is there."""
    if kernels and out.is_contiguous():
        transpose_op(source, out, add)
    elif add:
        out.add_(source.T)
    else:
        out.copy_(source.T)


# --- What Inductor cannot see through: it computes again what it can, in each kernel that reads it.


@library.custom_op("train_gpt::stored", mutates_args=())
def stored_op(x: Tensor) -> Tensor:
    """A copy of x: for what is read so often that it is better stored."""
    return x.clone()


stored_op.register_fake(torch.empty_like)
stored_op.register_autograd(lambda ctx, grad: grad)


# 3. Numerics ======================================================================================
# The few functions in which rounding is a decision, and the two matmuls that are made of them: the
# head with its loss, and the MLP.

E4M3_MAX = 448  # the largest number of float8_e4m3fn


@region
def norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last axis, computed in float32, without a gain."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=2**-23).to(x.dtype)


# FP8: a tensor is stored as x / scale in 8 bits, and a matmul of two is multiplied by both scales.
# A scale that is too small clips the largest numbers, one that is too large drops the smallest. The
# head's scales are constants that were tuned with the recipe [19]: its inputs are normed, and its
# weights and gradients keep to their range. The MLP's are measured (`scale_for`), some of them a
# step ahead, which saves a pass over the numbers, but needs headroom for what grows meanwhile.
# Numbers are e4m3 (3 bits of mantissa) forward; gradients, which vary more, are e5m2 (2 bits).
HEAD_INPUT_SCALE = 100 / E4M3_MAX
HEAD_WEIGHT_SCALE = 1.6 / E4M3_MAX
# Of the summed losses' gradient by the logits; backward multiplies by the gradient that comes in.
# The recipe's number, by E4M3_MAX though the gradient is e5m2.
LOGIT_GRAD_SCALE = 0.75 / E4M3_MAX
POST_HEADROOM = 1.8  # of the MLP's squares, from one forward pass to the next [89]
W_OUT_HEADROOM = 1.12  # of the MLP's W_out, from one step to the next [89]


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale in e4m3, clamped to its range."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def scale_for(largest: Tensor, headroom: float = 1) -> Tensor:
    """The scale with which e4m3 holds numbers up to `headroom` times the largest."""
    return largest.float().clamp(min=1e-12) * headroom / E4M3_MAX


def quantize_to_fit(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x in e4m3, and the scales that the largest numbers along these axes, which become 1, need."""
    scale = scale_for(x.abs().amax(axes, keepdim=True))
    return quantize(x, scale), scale


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor | float, b_scale: Tensor | float, fast: bool = True
) -> Tensor:
    """A B^T times both scales, in bf16, of FP8 a (n, k) and b (m, k).

    A scale is one number, or that of a has one for each row, (n, 1). `fast` accumulates with fewer
    bits, which forward passes can bear.
    """
    scales = []
    for scale in (a_scale, b_scale):
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, device=a.device)
        # With axes: without, Inductor would mistake a number of a vector for the vector.
        scales.append(scale.view(-1, 1))
    if scales[0].numel() > 1:  # then each column of the product wants one, too
        scales[1] = scales[1].expand(1, len(b)).contiguous()
    return torch._scaled_mm(a, b.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


def transposed(x: Tensor) -> Tensor:
    """A new, contiguous transpose of a matrix on CUDA: FP8 matmuls want both inputs by rows."""
    out = x.new_empty(x.size(1), x.size(0))
    transpose_op(x, out, False)
    return out


# --- The head with its loss, and the MLP: with the kernels, whose matmuls may be in FP8, or plain.


class Head(torch.autograd.Function):
    """The sum of `token_losses` with the kernels [60, 67, 79]; `fp8` has 8-bit matmuls [19].

    The gradient by the logits is made in the forward pass, together with the losses, so that the
    logits themselves, the largest tensor by far, need not be kept.
    """

    @staticmethod
    def forward(ctx, x, lm_head, targets, weights, fp8, prefix_of=None, prefix_weight=None):
        if fp8:
            x = quantize(x, HEAD_INPUT_SCALE)
            lm_head = quantize(lm_head, HEAD_WEIGHT_SCALE)
            logits = scaled_mm(x, transposed(lm_head), HEAD_INPUT_SCALE, HEAD_WEIGHT_SCALE)
        else:
            logits = x @ lm_head
        losses, logit_grads = loss_op(logits, targets, weights, fp8, prefix_of, prefix_weight)
        ctx.save_for_backward(x, lm_head, logit_grads)
        ctx.fp8 = fp8
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        x, lm_head, logit_grads = ctx.saved_tensors
        if ctx.fp8:
            scale = grad * LOGIT_GRAD_SCALE
            x_grad = scaled_mm(logit_grads, lm_head, scale, HEAD_WEIGHT_SCALE, fast=False)
            head_grad = scaled_mm(
                transposed(x), transposed(logit_grads), HEAD_INPUT_SCALE, scale, fast=False
            )
        else:
            grad = grad.to(x.dtype)
            x_grad = grad * (logit_grads @ lm_head.T)
            head_grad = grad * (x.T @ logit_grads)
        return x_grad, head_grad, None, None, None, None, None


def summed_loss(
    x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, prefix_of: Tensor | None,
    prefix_weight: Tensor, *, kernels: bool, fp8: bool,
) -> Tensor:
    """The sum of `token_losses`, float32: by the kernels, or plain."""
    prefix = prefix_of, prefix_weight
    if kernels:
        return Head.apply(x, lm_head, targets, weights, fp8, *prefix)
    return token_losses(x, lm_head, targets, weights, x.dtype, *prefix).sum()


class MLP8(NamedTuple):
    """What the forward pass of an MLP in FP8 reads; of all layers, with one axis more."""

    w_in: Tensor  # (hidden, D), e4m3 like w_out
    w_in_scale: Tensor
    w_out: Tensor  # (D, hidden): transposed, since FP8 matmuls want both inputs by rows
    w_out_scale: Tensor
    post_scale: Tensor  # of the square between the two


class MLP(torch.autograd.Function):
    """relu(x W_in^T)^2 W_out with the kernels, and None; or with an `MLP8`, maxima of the square.

    With it, forward is in FP8 [84, 89], with a scale for each token's x. Backward is in bf16.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, *eight):
        maxima = None
        if eight:
            w = MLP8(*eight)
            x8, x_scale = quantize_to_fit(x, (1,))
            post, post8, maxima = relu_squared_fp8(
                x8, w.w_in, x_scale, w.w_in_scale, w.post_scale
            )
            y = scaled_mm(post8, w.w_out, w.post_scale, w.w_out_scale)
            ctx.mark_non_differentiable(maxima)
        else:
            post = relu_squared_matmul(x, w_in)
            y = post @ w_out
        ctx.save_for_backward(x, w_in, w_out, post)
        return y, maxima

    @staticmethod
    def backward(ctx, grad, _):
        x, w_in, w_out, post = ctx.saved_tensors
        pre_grad = relu_squared_gradient(grad, w_out, post)
        x_grad = pre_grad @ w_in
        w_in_grad = pre_grad.T @ x
        w_out_grad = post.T @ grad
        nothing = [None] * (len(ctx.needs_input_grad) - 3)
        return x_grad, w_in_grad, w_out_grad, *nothing


def mlp(x: Tensor, w: dict, *, kernels: bool) -> tuple[Tensor, Tensor | None]:
    """relu(x W_in^T)^2 W_out of x (T, D), by the kernels or plain; in FP8 also the square's maxima.
    """
    if kernels:
        return MLP.apply(x, w["mlp_in"], w["mlp_out"], *(w["mlp8"] or ()))
    return relu_squared(x @ w["mlp_in"].T) @ w["mlp_out"], None


@torch.compile(dynamic=False, fullgraph=True)
def quantize_mlps(
    w_in: Tensor, w_out: Tensor, delayed: Tensor, out: MLP8, next_w_out_scale: Tensor
) -> None:
    """Puts the matrices (layers, hidden, D) of all MLPs into `out`, in 8 bits, with their scales.

    W_out's are those of the present matrices; or with `delayed` (0-d, 0 or 1) `next_w_out_scale`
    (layers,), into which those of the present ones then go, with headroom.
    """
    in8, in_scale = quantize_to_fit(w_in, (1, 2))
    out.w_in.copy_(in8)
    out.w_in_scale.copy_(in_scale.flatten())
    largest = w_out.abs().amax((1, 2))
    scale = torch.lerp(scale_for(largest), next_w_out_scale, delayed)  # one of the two
    out.w_out.copy_(quantize(w_out, scale[:, None, None]).mT)
    out.w_out_scale.copy_(scale)
    next_w_out_scale.copy_(scale_for(largest, W_OUT_HEADROOM))


# --- bf16 weights that move like float32 ones [57].
# A float32 is cut in the middle: its upper half is a bfloat16, which the forward pass uses; its
# lower 16 bits are kept beside it. The optimizer joins the two, updates, and cuts again, so that
# steps far smaller than a bf16 can hold add up.


def join_float32(top: Tensor, low: Tensor) -> Tensor:
    """The float32 whose upper half is the bfloat16 `top` and whose lower half the uint16 `low`."""
    upper = top.view(torch.int16).to(torch.int32) << 16
    return (upper | low.to(torch.int32)).view(torch.float32)


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_float32`: a bfloat16, truncated, and the lower 16 bits as uint16."""
    bits = x.view(torch.int32)
    top = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    low = (bits & 0xFFFF).to(torch.uint16)
    return top, low


# --- Polar Express [38] (arXiv 2505.16932).
# Each row is (a, b, c) of one step X <- aX + (bA + cA^2)X with A = XX^T. A step leaves the singular
# vectors, and takes each singular value s to as + bs^3 + cs^5. Composed, five steps bring all of
# (0.001, 1] to between 0.86 and 1.14, six to between 0.998 and 1.002. `python bench/polar.py` makes
# the rows.
POLAR_EXPRESS = {
    5: (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    6: (
        (8.156554524902461, -22.483292925577953, 15.878769915207466),
        (4.042929935166737, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.2857536577556536, -2.368129493342537, 0.4644902423300309),
        (2.300530711627095, -1.6111665557258386, 0.38333744275452714),
        (1.9003834757310218, -1.2779237188293004, 0.3778031533636291),
    ),
}


def polar_express(
    u: Tensor, dtype: torch.dtype, kernels: bool = False,
    steps: Iterable[tuple[float, float, float]] = POLAR_EXPRESS[5],
) -> Tensor:
    """The orthogonal factor of each matrix of u (n, rows, cols), roughly: U V^T of its SVD.

    Computed in `dtype`.
    """
    size = u.norm(dim=(-2, -1), keepdim=True)
    x = (u / (1.02 * size + 1e-6)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in steps:
        # A is the smaller of XX^T and X^T X.
        gram = symmetric_matmul(x.mT if tall else x, kernels=kernels)
        poly = symmetric_matmul(gram, alpha=c, beta=b, kernels=kernels)  # bA + cA^2
        if tall:
            x = torch.baddbmm(x, x, poly, beta=a)
        else:
            x = torch.baddbmm(x, poly, x, beta=a)
    return x


# 4. Attention =====================================================================================
# Causal, within a document, and at most `window` tokens back: query i sees key j if j <= i,
# i - j <= window, and both belong to one document. A mask is made once a sequence and serves all
# layers of a kind. CUDA runs FlexAttention over a list of blocks, other devices a banded attention.

BLOCK = 128  # FlexAttention's block of queries and of keys
# An extra factor of the logits of narrow queries and keys, which sum fewer products.
NARROW_QK_SCALE = 1.2


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Half-truncated rotary [17]: d/4 frequencies in radians a token.

    They turn the pairs of the first d/2 channels of a head; the other half does not turn.
    """
    head_dim = config.dim // config.heads
    return (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)


def rotary_state(settings: Settings, step: int) -> tuple[Tensor, float]:
    """Rotary frequencies and softmax scale at a step: after YaRN at each growth of the long window.

    YaRN [31] (arXiv 2309.00071) stretches the slow frequencies by the growth, so that what comes
    into the window lies at angles that the model has seen. What turns 32 times or more within the
    old window keeps its frequency, since that is how the model tells near tokens apart. The final
    validation's wider window is not a growth: it comes without YaRN.
    """
    frequencies = rotary_frequencies(settings.model)
    scale = settings.model.attention_scale
    long_windows = [stage.windows[1] for stage, _ in settings.stages_begun(step)]
    for old, new in itertools.pairwise(long_windows):
        if not settings.yarn or new <= old:
            continue
        ratio = old / new
        turns = old * frequencies / (2 * math.pi)
        keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
        frequencies = frequencies * (ratio + keep * (1 - ratio))
        scale *= 0.2 * math.log(new / old) + 1
    return frequencies, scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (2j, 2j + 1) of the channels of x (T, H, d), each by an angle of its own."""
    pairs = x.size(-1) // 2
    cos = cos[: len(x), :, :pairs]
    sin = sin[: len(x), :, :pairs]
    even, odd = x.unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((cos * even + sin * odd, cos * odd - sin * even), dim=-1)
    return turned.flatten(-2)


def document_starts(inputs: Tensor, config: ModelConfig) -> Tensor:
    """Where (T,) a look at the token before has nothing to see: BOS, and the sequence's start."""
    position = torch.arange(len(inputs), device=inputs.device)
    return (inputs == config.bos_id) | (position == 0)


def previous(x: Tensor, begins: Tensor) -> Tensor:
    """Row t - 1 of x (T, …) in row t; rows where a document `begins` stay as they are."""
    shifted = torch.cat((x[:1], x[:-1]))
    begins = begins.view(-1, *[1] * (x.dim() - 1))
    return torch.where(begins, x, shifted)


# FlexAttention is told which blocks of (queries, keys) to look at. With a window of 2 1/2 blocks,
# and a document that begins within block 2:
#
#              keys
#               0  1  2  3  4  5
#   queries  0  p                  p  partial: some pairs are allowed; each one is asked
#            1  F  p               F  full: all pairs are allowed, none is asked
#            2  p  p  p               (empty) no pair is allowed: skipped
#            3        p  p
#            4        p  F  p
#            5        p  p  F  p        (here the window alone decides)
#
# Going left from the diagonal, a row has its diagonal block, which is partial, then full blocks,
# then partial ones, then none. So two counts say all about a row (or, going down, a column).


def block_mask(docs: Tensor, window: Tensor) -> BlockMask:
    """FlexAttention's mask, made on the device of docs (T,), the non-decreasing document numbers.

    `window` is a 0-d integer tensor, so that another window is no other graph.
    """
    length = len(docs)
    first_doc = docs[::BLOCK]
    block = torch.arange(len(first_doc), dtype=torch.int32, device=docs.device)
    last_token = (block * BLOCK + BLOCK - 1).clamp(max=length - 1)
    last_doc = docs[last_token]
    behind = block[:, None] - block  # how many blocks the keys lie behind the queries
    # The nearest pair of two blocks is the first query with the last key; the farthest is the last
    # query with the first key.
    nearest_is_allowed = (first_doc[:, None] == last_doc) & ((behind - 1) * BLOCK + 1 <= window)
    farthest_is_allowed = (last_doc[:, None] == first_doc) & (behind * BLOCK + BLOCK - 1 <= window)
    some = (behind > 0) & nearest_is_allowed
    full = (behind > 0) & farthest_is_allowed

    def allowed(batch, head, query, key):
        return (key <= query) & (docs[query] == docs[key]) & (query - key <= window)

    by_row = block_lists(some, full, block, dim=1)
    by_column = block_lists(some, full, block, dim=0)
    return BlockMask((length, length), *by_row, *by_column, (BLOCK, BLOCK), allowed)


def block_lists(some: Tensor, full: Tensor, block: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Counts and places of partial and of full blocks, nearest first, by row (dim 1) or column (0).

    Counting is enough, as the picture above shows. (A sort would take Triton minutes to compile.)
    """
    towards = -1 if dim == 1 else 1  # from the diagonal to the left, or down
    full_count = full.sum(dim, dtype=torch.int32)[:, None]
    some_count = some.sum(dim, dtype=torch.int32)[:, None]
    partial_count = some_count - full_count + 1  # with the diagonal's
    # How far from the diagonal the n-th block of each list is; what stands past the count is not
    # read, and is only kept within the table.
    partial_away = torch.where(block > 0, full_count + block, 0)
    full_away = block + 1
    last = len(block) - 1
    partial = (block[:, None] + towards * partial_away).clamp(0, last)
    whole = (block[:, None] + towards * full_away).clamp(0, last)
    # The two axes in front are FlexAttention's batch and heads.
    partial_list = partial_count.view(1, 1, -1), partial[None, None]
    full_list = full_count.view(1, 1, -1), whole[None, None]
    return *partial_list, *full_list


# Banded attention: queries are cut into chunks of C >= window tokens, so that all a chunk's queries
# may see lies in the same chunk of keys and the one before. The work is linear in T, and nothing is
# left out:
#
#   keys      | chunk 0 | chunk 1 | chunk 2 |
#   queries 1 |    ....x|xxxx     |         |    C rows, 2C columns; the mask has x where allowed
#   queries 2 |         |    ....x|xxxx     |


def banded_mask(docs: Tensor, window: int, size: int | None = None) -> Tensor:
    """The allowed pairs (chunks, 1, C, 2C) of the queries of a chunk and the keys of two.

    C is `size`, by default the window.
    """
    size = max(min(size or window, len(docs)), 1)
    # A chunk of nothing before the first, and what fills up the last, are a document of their own.
    padded = F.pad(docs, (size, -len(docs) % size), value=-1)
    docs_of_keys = padded.unfold(0, 2 * size, size)  # (chunks, 2C)
    docs_of_queries = docs_of_keys[:, size:]  # (chunks, C)
    query = torch.arange(size, 2 * size, device=docs.device)[:, None]
    key = torch.arange(2 * size, device=docs.device)
    back = query - key
    same_document = docs_of_queries[:, :, None] == docs_of_keys[:, None]
    return (same_document & (back >= 0) & (back <= window))[:, None]


@region
def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor) -> Tensor:
    """softmax(q k^T, where allowed) v, of q, k, v (T, H, d): on CUDA, or elsewhere."""
    if isinstance(mask, BlockMask):
        return flex_attend(q, k, v, mask)
    return banded_attend(q, k, v, mask)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """`attend` on CUDA. FlexAttention wants (1, H, T, d)."""
    q = q.transpose(0, 1)[None]
    k = k.transpose(0, 1)[None]
    v = v.transpose(0, 1)[None]
    return flex_attention(q, k, v, block_mask=mask, scale=1.0)[0].transpose(0, 1)


def banded_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attend` on other devices, with the mask (chunks, 1, C, 2C) of `banded_mask`.

    Matmuls and a softmax, compiled, take half the time of scaled_dot_product_attention on a CPU.
    """
    weights = banded_weights(q, k, mask)
    y = weights.to(q.dtype) @ and_chunk_before(chunks(v, mask.size(2)))  # (chunks, H, C, d)
    return y.transpose(1, 2).flatten(0, 1)[: len(q)]


def chunks(x: Tensor, size: int) -> Tensor:
    """x (T, H, d) as (1 + chunks, H, C, d): a chunk of zeros, then x, filled up with zeros."""
    x = F.pad(x, (0, 0, 0, 0, size, -len(x) % size))
    return x.unflatten(0, (-1, size)).transpose(1, 2)


def and_chunk_before(x: Tensor) -> Tensor:
    """From `chunks`, each but the first after the one before it: (chunks, H, 2C, d)."""
    return torch.cat((x[:-1], x[1:]), dim=2)


def banded_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T, where allowed), float32 (chunks, H, C, 2C), of q, k (T, H, d)."""
    size = mask.size(2)
    keys = and_chunk_before(chunks(k, size))
    logits = (chunks(q, size)[1:] @ keys.mT).float()
    return logits.masked_fill(~mask, -math.inf).softmax(-1)


# Dynamically composed heads [85] (after arXiv 2405.08553): besides what its own attention sees, a
# head takes in what a mixture of all heads' attention sees, with weights that each token computes.
# The mixture looks back over less than DC_WINDOW tokens, whatever the layer's window is.
DC_WINDOW = 112


@region
def compose_heads(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w_in: Tensor, w_out: Tensor, mask: Tensor
) -> Tensor:
    """Attention's output y (T, H, d) + for each head h, w_out[h] (sum over g of w_in[g] P_g) v_h.

    P_g are the probabilities of head g; w_in (T, H), which is normed here, and w_out (T, H) are
    each token's own.
    """
    length, size = len(q), mask.size(2)
    w_in = F.rms_norm(w_in.float(), (w_in.size(1),), eps=1e-6).to(q.dtype)
    shares = chunks(w_in[:, :, None], size)[1:]  # (chunks, H, C, 1)
    mixture = (shares * banded_weights(q, k, mask)).sum(1).to(q.dtype)  # (chunks, C, 2C)
    # One product for all heads.
    values = and_chunk_before(chunks(v.flatten(1)[:, None], size))[:, 0]  # (chunks, 2C, H d)
    mixed = (mixture @ values).flatten(0, 1)[:length].view_as(y)
    return (y.float() + w_out[:, :, None].float() * mixed.float()).to(y.dtype)


# 5. Model =========================================================================================
# One packed sequence at a time: x is (T, D), without a batch axis. Matrices lie in banks
# (n, rows, cols), so that each rank's optimizer has a whole number of them.

# Rows of logits at a time in validation: those of a whole sequence, 262,144 x 50,304, would take
# 50,304 MiB in float32.
VAL_CHUNK = 4096


class Context(NamedTuple):
    """What the forward pass needs besides weights and tokens."""

    cos: Tensor  # rotary tables (2T, 1, d/2): paired heads have twice as many positions
    sin: Tensor
    scale: Tensor  # of q and of k: the root of that of attention's logits; 0-d, float32
    windows: tuple  # short and long; on CUDA 0-d tensors, so that another window is no new graph
    mtp: Tensor  # the weights (K,) of the next targets
    prefix_weight: Tensor  # of the next target's prefix; 0-d
    prefix_of: Tensor | None = None  # a `prefix_table`; None without prefix tokens


def make_context(
    config: ModelConfig, length: int, windows: tuple[int, int], like: Tensor,
    rotary: tuple[Tensor, float] | None = None,
) -> Context:
    """A context for `length` tokens, on `like`'s device and in its dtype, with one next target
    and no prefix tokens.

    `rotary` is a `rotary_state`; by default that of the start.
    """
    device = like.device
    if rotary is None:
        rotary = rotary_frequencies(config), config.attention_scale
    frequencies, scale = rotary
    positions = torch.arange(2 * length, device=device)[:, None, None]
    angles = positions * frequencies.to(device)
    angles = F.pad(angles, (0, len(frequencies)))  # the second half of the channels does not turn
    if device.type == "cuda":
        windows = tuple(torch.tensor(window, device=device) for window in windows)
    return Context(
        cos=angles.cos().to(like.dtype), sin=angles.sin().to(like.dtype),
        scale=torch.tensor(scale**0.5, device=device), windows=windows,
        mtp=torch.ones(1, device=device), prefix_weight=torch.zeros((), device=device),
    )


def widen(x: Tensor, dim: int) -> Tensor:
    """x (T, channels) with zeros up to `dim` channels."""
    return F.pad(x, (0, dim - x.size(1)))


# What the hash of an n-gram multiplies its last token by, the one before it, and so on.
NGRAM_FACTORS = 36313, 27191, 48611, 91193, 60013
BIGRAM_SIGNS = 8192  # rows


def ngram_rows(
    tokens: Tensor, begins: Tensor, rows: int, longest: int
) -> tuple[Tensor, Tensor]:
    """The rows in the bigram table [62], and in the signs [83], of n-grams: (n, T) each.

    They are those that end at a token: with the one before it, the bigram, and on to the `longest`.
    Each length has an equal part of the table's `rows`, and there a hash in wrapping 32 bits says
    which row; the last where a document begins. The first token stands in for what is before it.
    """
    size = rows // (longest - 1)
    tokens = tokens.int()
    hashed, signs, earlier = NGRAM_FACTORS[0] * tokens, tokens, tokens
    table_rows, sign_rows = [], []
    for number in range(longest - 1):
        earlier = previous(earlier, begins)
        hashed = hashed ^ (NGRAM_FACTORS[number + 1] * earlier)
        signs = signs ^ (earlier << 5 * number)
        row = torch.where(begins, size - 1, hashed % (size - 1))
        table_rows.append(number * size + row)
        sign_rows.append(signs % BIGRAM_SIGNS)
    return torch.stack(table_rows), torch.stack(sign_rows)


@region
def begin_stream(
    x: Tensor, tokens: Tensor, begins: Tensor, smear_gate: Tensor | None,
    smear_lambda: Tensor | None, bigram_table: Tensor | None, bigram_signs: Tensor | None,
    bigram_grad: Tensor | None = None, *, ngram: int,
) -> tuple[Tensor, Tensor | None]:
    """x0 (T, D) and the bigram embedding (T, channels), from the tokens' embeddings x (T, D)."""
    if smear_gate is not None:
        # Each token takes up some of the one before it [34].
        gate = torch.sigmoid(x[:, :12] @ smear_gate)
        taken = (smear_lambda.to(x.dtype) * gate)[:, None] * previous(x, begins)
        x = x + torch.where(begins[:, None], 0, taken)
    x0 = norm(x)
    if bigram_table is None:
        return x0, None
    # Rows of the table are shared by many bigrams. Random signs, drawn by another hash, let a row
    # tell those apart that differ in it [83].
    rows, sign_rows = ngram_rows(tokens, begins, len(bigram_table), ngram)
    signs = F.embedding(sign_rows, bigram_signs)
    each = look_up(bigram_table, rows, bigram_grad) * signs  # (n, T, channels)
    return x0, each.transpose(0, 1).flatten(1)


@region
def add_bigram(x: Tensor, bigram: Tensor, factor: Tensor) -> Tensor:
    """x (T, D) and factor (T, 1) times the bigram embedding, in the channels that it has."""
    return x + widen(factor * bigram, x.size(1))


@region
def project(
    x: Tensor, added: Tensor | None, begins: Tensor, rotary: tuple[Tensor, Tensor, Tensor],
    w: dict[str, Tensor | None], heads: int, *, offset: bool, paired: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v for `attend`, and the gate (T, H) of its output, from the residual stream x.

    `rotary` has the tables of cosines and sines, and the scale of q and of k. `added` (T, D) is
    added to v: the token's row of value embeddings, or what MUDD makes. With `paired`, they are
    `in_pairs`.
    """
    cos, sin, scale = rotary
    a = norm(x)
    if w["value_gates"] is not None:
        # Gates of the value embedding [14, 63], from both the input and the embedding: (T, H).
        gate_inputs = torch.cat((a[:, :6], added[:, :6]), dim=1)
        gate = 2 * torch.sigmoid(gate_inputs @ w["value_gates"].T)
        added = (gate[:, :, None] * added.unflatten(1, (heads, -1))).flatten(1)
    gate = w["head_gates"]  # made by a network [85]
    if w["attention_gates"] is not None:
        gate = torch.sigmoid(a[:, :12] @ w["attention_gates"].T)  # learned directly [28]
    qkv, width = a @ w["qkv"].T, x.size(1)
    if paired:
        qkv, width = in_pairs(qkv), width // 2
        added = None if added is None else in_pairs(even_heads_first(added, heads, 1))
        heads //= 2
    qk, v = qkv.split([qkv.size(1) - width, width], dim=1)
    if added is not None:
        v = v + added
    # Q and K stay together, (T, 2H, d): so one kernel each way does all this.
    qk = norm(qk.unflatten(1, (2 * heads, -1)))
    if offset:
        # The half of a key that does not turn is that of the token before. A query so finds what
        # came after a token like its own, and one layer can copy, where else it takes two [49].
        head = torch.arange(2 * heads, device=x.device)[:, None]
        channel = torch.arange(qk.size(2), device=x.device)
        still = (head >= heads) & (channel >= qk.size(2) // 2)
        before = previous(qk.unflatten(0, (len(x), -1)), begins).flatten(0, 1)
        qk = torch.where(still, before, qk)
    qk = (scale * rotate(qk, cos, sin).float()).to(qk.dtype)
    q, k = qk.chunk(2, dim=1)
    return q, k, v.unflatten(1, (heads, -1)), gate


# Paired heads [58]: heads 2p and 2p + 1 of token t become one head's positions 2t and 2t + 1. Where
# a token's even heads stand before its odd ones, that is another view of the same numbers: of twice
# as many positions with half the heads. So the layers that pair their heads have the rows of W_qkv
# and the columns of W_out in this order.


def even_heads_first(x: Tensor, heads: int, axis: int) -> Tensor:
    """An axis of heads, one after the other, with heads 0, 2, 4, … before 1, 3, 5, …."""
    each = x.unflatten(axis, (heads // 2, 2, -1))
    return each.transpose(axis, axis + 1).flatten(axis, axis + 2)


def in_pairs(x: Tensor) -> Tensor:
    """Numbers (T, …) that are in this order, as (2T, half of …)."""
    return x.unflatten(1, (2, -1)).flatten(0, 1)


def unpaired(x: Tensor) -> Tensor:
    """The inverse of `in_pairs`."""
    return x.unflatten(0, (-1, 2)).flatten(1, 2)


def join_qkv(parts: list[Tensor], paired: Tensor | None, heads: int) -> Tensor:
    """W_q, W_k and W_v of n layers, (n, rows, D) each, one below the other.

    In the layers that pair their heads, `paired` (n, 1, 1), it is the even heads of all three and
    then the odd ones. It is None if there is none.
    """
    joined = torch.cat(parts, dim=1)
    if paired is None:
        return joined
    halves = [even_heads_first(part, heads, 1).unflatten(1, (2, -1)) for part in parts]
    return torch.where(paired, torch.cat(halves, dim=2).flatten(1, 2), joined)


@region
def add_attention(
    x: Tensor, y: Tensor, v: Tensor, gate: Tensor | None, x0: Tensor, bigram: Tensor | None,
    w: dict[str, Tensor | None], mix: Mix, *, paired: bool,
) -> Tensor:
    """The residual stream x (T, D) after attention, of which `attend` made y from the values v."""
    alpha = w["xsa_alphas"]  # a head's, (H,), or a token's and head's, (T, H)
    if paired:
        y, v = unpaired(y), unpaired(v)
        heads = y.size(1)
        alpha = None if alpha is None else even_heads_first(alpha, heads, alpha.dim() - 1)
        gate = None if gate is None else even_heads_first(gate, heads, 1)
    if alpha is not None:
        # XSA [82]: without tanh(alpha) of the part of y that is parallel to the token's own value.
        alpha = alpha.tanh().unsqueeze(-1)
        along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
        y = y - alpha * along * v
    if gate is not None:
        y = gate[:, :, None] * y
    y = y.flatten(1) @ w["out"].T
    if mix.attn_post is not None:
        y = mix.attn_post * y
    x = mix.attn_resid * x + y + mix.x0 * x0
    if bigram is not None:
        x = add_bigram(x, bigram, mix.bigram)
    return x


@region
def add_mlp(x: Tensor, w: dict, mix: Mix, *, kernels: bool) -> tuple[Tensor, Tensor | None]:
    """The residual stream x (T, D) after the MLP; with FP8, maxima of the MLP's square."""
    y, maxima = mlp(norm(x), w, kernels=kernels)
    return mix.mlp_resid * x + mix.mlp_post * y, maxima


# Small networks that make, from each token's residual stream, the token's own coefficients.


@region
def small_network(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, scale: Tensor | float
) -> Tensor:
    """scale * (W2 gelu(W1 x) + b) of x (T, D): (n, T), a row for each of the n coefficients."""
    coefficients = scale * (F.gelu(x @ w1.T) @ w2.T + bias)
    return coefficients.T.contiguous()


# MUDD connections [81] (arXiv 2502.12170): earlier layers' outputs are mixed in. One network makes
# the factors before its layer, and one after the last.


def mudd_network(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """One (T, 1) for each coefficient."""
    return small_network(x, *weights, MUDD_SCALE)[:, :, None].unbind()


@region
def mudd_before(
    x: Tensor, start: Tensor, earlier: Tensor, value_row: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor, Mix]:
    """Before MUDD's layer: the residual stream, what is added to v (T, D), the layer's `Mix`."""
    c = MuddBefore(*mudd_network(x, *weights))
    added = c.v_start * start + c.v_earlier * earlier + c.v_stream * x
    if value_row is not None:
        half_1, half_2 = value_row.chunk(2, dim=1)  # of the heads
        gated = torch.cat((c.value_gate_1 * half_1, c.value_gate_2 * half_2), dim=1)
        added = added + gated
    x = c.start * start + c.earlier * earlier + (1 + c.stream) * x
    mix = Mix(c.attn_resid, c.x0, c.bigram, c.mlp_resid, c.mlp_post, c.attn_post)
    return x, added, mix


@region
def mudd_after(
    x: Tensor, start: Tensor, source_1: Tensor, source_2: Tensor, value_row: Tensor | None,
    source_3: Tensor, *weights: Tensor,
) -> Tensor:
    """The residual stream after the last layer, with earlier ones mixed in."""
    c = MuddAfter(*mudd_network(x, *weights))
    x = x + c.start * start + c.source_1 * source_1 + c.source_2 * source_2
    if value_row is not None:
        x = x + c.value_embed * value_row
    return x + c.source_3 * source_3


LOOKED_UP = ("embed", "value_embeds", "bigram_table")  # the tables whose rows tokens look up


class GPT(nn.Module):
    """The model of `config`, its matrices in `dtype`.

    Banks are padded with zero matrices to a multiple of `shards`, the ranks that share them out.
    With `kernels` it runs the Triton kernels; with `fp8` training, `forward`, has 8-bit matmuls:
    then `quantize_weights` must follow each change of the weights.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, shards: int = 1,
        kernels: bool = False, fp8: bool = False,
    ):
        super().__init__()
        self.config = config
        self.rows = config.rows
        self.attending = config.layers_with("attention")
        self.mudd_layers = config.layers_with("mudd")
        self.qk_banks = qk_banks(config)
        self.gate_networks = gate_networks(config)
        self.kernels = kernels
        self.fp8 = fp8
        self.table = parameter_table(config)
        made = {}
        for name, row in self.table.items():
            if row is None:
                self.register_parameter(name, None)
                continue
            value = row.init.make(row.shape, made)
            if row.kind == "bank":
                padding = -len(value) % shards
                value = F.pad(value, (0, 0, 0, 0, 0, padding))
            if row.kind != "scalar":
                value = value.to(dtype)
            made[name] = value
            self.register_parameter(name, nn.Parameter(value))
        # Which attending layers pair their heads, (n, 1, 1); see `join_qkv`.
        paired = [self.rows[layer].paired_heads for layer in self.attending]
        each = torch.tensor(paired).view(-1, 1, 1) if any(paired) else None
        self.register_buffer("paired", each, persistent=False)
        attending = torch.tensor(self.attending, dtype=torch.long)
        self.register_buffer("attending_layers", attending, persistent=False)
        signs = None
        if config.bigram:
            # From a seed of its own, on the CPU: the same on every device, for every --seed.
            generator = torch.Generator().manual_seed(83)
            shape = BIGRAM_SIGNS, config.bigram_dim
            signs = torch.randint(2, shape, generator=generator, device="cpu")
            signs = (2 * signs - 1).to(dtype)
        self.register_buffer("bigram_signs", signs)
        # With the kernels, where gradients by the tables that tokens look up gather; see `look_up`.
        for name in LOOKED_UP:
            grad = None
            if kernels and made.get(name) is not None:
                grad = torch.zeros_like(made[name])
            self.register_buffer(f"{name}_grad", grad, persistent=False)
        if fp8:  # see `mlp8`
            count, dim = len(self.rows), config.dim
            e4m3 = torch.float8_e4m3fn
            hidden = config.mlp_ratio * dim
            self.register_buffer("w_in8", torch.zeros(count, hidden, dim, dtype=e4m3))
            self.register_buffer("w_out8", torch.zeros(count, dim, hidden, dtype=e4m3))
            for name in ("w_in8_scale", "w_out8_scale", "next_w_out8_scale", "post_scale"):
                self.register_buffer(name, torch.ones(count))
        # The layers whose output something later reads; others' are not kept alive.
        self.kept = set()
        for row in self.rows:
            self.kept.update((row.single_input, row.skip, *(row.mudd or ())))

    def forward(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """The training objective, summed over a sequence: inputs and targets (T,); float32, 0-d."""
        x = self.stream(inputs, context, self.fp8)
        return summed_loss(
            x, self.lm_head, targets, context.mtp, context.prefix_of, context.prefix_weight,
            kernels=self.kernels, fp8=self.fp8,
        )

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """The cross-entropy in nats of each token (T,), float32: what validation measures."""
        x = self.stream(inputs, context)
        weight = torch.ones(1, device=inputs.device)
        # In float32 from the logits on, with unquantized weights.
        losses = []
        for rows, row_targets in zip(x.split(VAL_CHUNK), targets.split(VAL_CHUNK)):
            losses.append(token_losses(rows, self.lm_head, row_targets, weight, torch.float32))
        return torch.cat(losses)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, context: Context) -> Tensor:
        """The capped logits (vocab_size,), float32, of what follows tokens (T,)."""
        last = self.stream(tokens, context)[-1]
        return softcap(last @ self.lm_head)[: self.config.vocab_size]

    def gradient(self, name: str) -> Tensor | None:
        """What has gathered for a parameter since its last update."""
        grad = getattr(self, f"{name}_grad", None)
        return self.get_parameter(name).grad if grad is None else grad

    def clear_gradient(self, name: str) -> None:
        """Begins a parameter's gradient anew."""
        self.get_parameter(name).grad = None
        grad = getattr(self, f"{name}_grad", None)
        if grad is not None:
            grad.zero_()

    @property
    def mlp8(self) -> MLP8:
        """The MLPs' 8-bit matrices and their scales, of all layers."""
        return MLP8(
            self.w_in8, self.w_in8_scale, self.w_out8, self.w_out8_scale, self.post_scale
        )

    @torch.no_grad()
    def quantize_weights(self, delayed: bool = False) -> None:
        """Makes the MLPs' 8-bit matrices anew, after each change of the weights [84, 89].

        With `delayed`, W_out's scales are by the weights that were there at the call before.
        """
        if self.fp8:
            bank = self.mlp_bank[: 2 * len(self.rows)]
            quantize_mlps(
                bank[::2], bank[1::2], torch.tensor(float(delayed)), self.mlp8,
                self.next_w_out8_scale,
            )

    def lasting_scales(self) -> dict[str, Tensor]:
        """The FP8 scales of what was there before: state of a run, like its weights."""
        if not self.fp8:
            return {}
        return {"w_out8_scale": self.w_out8_scale, "post_scale": self.post_scale}

    def load_scales(self, saved: dict) -> None:
        """Takes over `lasting_scales`; starts anew from those of a run without FP8."""
        if self.fp8 and saved:
            for name, scale in self.lasting_scales().items():
                value = part_of(saved, name, Tensor)
                if value.shape != scale.shape:
                    found, wanted = tuple(value.shape), tuple(scale.shape)
                    raise UserError(f"{name}: its shape is {found}, this model's is {wanted}")
                scale.copy_(value)
            self.next_w_out8_scale.copy_(self.w_out8_scale)
        self.quantize_weights(delayed=bool(saved))

    def stream(self, inputs: Tensor, context: Context, fp8: bool = False) -> Tensor:
        """The residual stream (T, D) after the last layer, normed: what the head reads."""
        config = self.config
        begins = document_starts(inputs, config)
        masks = self.make_masks(inputs, context.windows)
        value_rows = self.look_up_values(inputs)
        layers, mixes = self.layer_weights(len(inputs), fp8)
        mudd_before_weights, mudd_after_weights = self.mudd_weights()
        gates = self.gates()

        x = look_up(self.embed, inputs, self.embed_grad)
        x0, bigram = begin_stream(
            x, inputs, begins, self.smear_gate, self.smear_lambda, self.bigram_table,
            self.bigram_signs, self.bigram_table_grad, ngram=config.ngram,
        )
        if self.kernels:  # all layers read it: it is not to be computed in each of them
            x0 = stored_op(x0)
        x = start = x0
        after = {}  # the residual stream after each layer that something later reads
        mudd_sources = None
        maxima = []  # of each MLP's square, in FP8

        for i, row in enumerate(self.rows):
            if row.gates:
                self.make_gates(x, *next(gates), layers, mixes)
            w, mix = layers[i], mixes[i]
            if i == 0 and bigram is not None:
                x = start = add_bigram(x0, bigram, mix.bigram)
            # What is added to v, and to the residual stream after attention.
            added = value_rows.get(row.value_embeds)
            origin = x0
            if row.skip is not None:
                x = self.add_skip(x, x0, after[row.skip], w["skip"])
            if row.mudd is not None:
                mudd_sources = [after[source] for source in row.mudd]
                origin = start
                x, added, mix = mudd_before(x, start, mudd_sources[0], added, *mudd_before_weights)
            if row.attention:
                scale = context.scale
                if row.narrow_qk:
                    scale = NARROW_QK_SCALE**0.5 * scale
                q, k, v, gate = project(
                    x if row.single_input is None else after[row.single_input], added,
                    begins, (context.cos, context.sin, scale), w, config.heads,
                    offset=config.key_offset and row.window == "long" and not row.narrow_qk,
                    paired=row.paired_heads,
                )
                y = attend(q, k, v, masks[row.paired_heads, row.window])
                if row.dc:
                    y = compose_heads(y, q, k, v, w["dc_in"], w["dc_out"], masks["dc"])
                # Layer 0 has the bigram embedding from the start.
                bigram_here = None if i == 0 else bigram
                x = add_attention(
                    x, y, v, gate, origin, bigram_here, w, mix, paired=row.paired_heads
                )
            x, largest = add_mlp(x, w, mix, kernels=self.kernels)
            maxima.append(largest)
            if i in self.kept:
                after[i] = x

        if mudd_sources is not None:
            source_1, source_2, source_3 = mudd_sources
            x = mudd_after(
                x, start, source_1, source_2, value_rows.get(0), source_3, *mudd_after_weights
            )
        if fp8:  # for the next pass
            self.post_scale.copy_(scale_for(torch.stack(maxima).amax(1), POST_HEADROOM))
        return norm(x)

    def make_masks(self, inputs: Tensor, windows: tuple) -> dict[object, BlockMask | Tensor]:
        """The masks that the layers need, by (paired heads, "short" or "long"), or "dc"."""
        short, long = windows
        docs = (inputs == self.config.bos_id).cumsum(0)
        paired_docs = docs.repeat_interleave(2)  # paired heads have twice as many positions
        make = block_mask if inputs.is_cuda else banded_mask
        masks = {}
        for row in self.rows:
            kind = row.paired_heads, row.window
            if row.attention and kind not in masks:
                masks[kind] = make(
                    paired_docs if row.paired_heads else docs,
                    long if row.window == "long" else short,
                )
            if row.dc:
                masks["dc"] = banded_mask(docs, DC_WINDOW - 1, DC_WINDOW)
        return masks

    def look_up_values(self, inputs: Tensor) -> dict[int, Tensor]:
        """Each token's row (T, D) in each table of value embeddings, by the table's number."""
        if self.value_embeds is None:
            return {}
        vocab = self.config.padded_vocab
        first_rows = torch.arange(0, len(self.value_embeds), vocab, device=inputs.device)
        rows = look_up(self.value_embeds, inputs + first_rows[:, None], self.value_embeds_grad)
        return dict(enumerate(rows.unbind()))  # (tables, T, D) apart

    def add_skip(self, x: Tensor, x0: Tensor, earlier: Tensor, made: Tensor | None) -> Tensor:
        """x and an earlier residual stream, through a gate [55]: `made` (T, 1), or one of x0."""
        gate = torch.sigmoid(self.skip_lambda.to(x.dtype))
        if made is None:
            gate = 2 * gate * torch.sigmoid(x0[:, :12] @ self.skip_gate)[:, None]
        else:
            gate = gate * made
        return x + gate * earlier

    def gates(self) -> Iterator[tuple[list[Gate], tuple[Tensor, ...]]]:
        """What each gate network makes; and its W1, W2, bias and scale in the stream's dtype."""
        if not self.gate_networks:
            return
        sizes = [sum(gate.width for gate in network) for network in self.gate_networks]
        scale = self.gates_scale.to(self.embed.dtype)
        for network, weights in zip(self.gate_networks, self.network_weights("gates", sizes)):
            yield network, (*weights, scale)

    def make_gates(
        self, x: Tensor, network: list[Gate], weights: tuple[Tensor, ...],
        layers: list[dict[str, Tensor | None]], mixes: list[Mix],
    ) -> None:
        """Puts what a gate network makes of x (T, D) into its layers' `Mix` or among their weights.

        A (T, H) each, or (T, 1).
        """
        parts = small_network(x, *weights).split([gate.width for gate in network])
        for gate, part in zip(network, parts):
            # One coefficient has the strides that MUDD's have, so that they share their graphs.
            value = part.T if gate.width > 1 else part[0, :, None]
            if gate.name in Mix._fields:
                mixes[gate.layer] = mixes[gate.layer]._replace(**{gate.name: value})
            else:
                layers[gate.layer][gate.name] = value

    def mudd_weights(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """W1, W2 and bias of MUDD's two networks, in the residual stream's dtype."""
        if self.mudd_w1 is None:
            return (), ()
        sizes = [len(MuddBefore._fields), len(MuddAfter._fields)]
        before, after = self.network_weights("mudd", sizes)
        return before, after

    def network_weights(self, name: str, sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
        """W1, W2 and bias of each `small_network` of a name, in the stream's dtype.

        `sizes` are the numbers of their outputs.
        """
        w2 = getattr(self, f"{name}_w2").split(sizes)
        bias = getattr(self, f"{name}_bias").to(self.embed.dtype).split(sizes)
        return zip(getattr(self, f"{name}_w1"), w2, bias)

    def layer_weights(self, length: int, fp8: bool) -> tuple[list[dict], list[Mix]]:
        """What each layer has of the parameters, in the residual stream's dtype; and its `Mix`.

        Of a layer: the matrices, times their scalars [47]: qkv and out (see `attention_weights`),
        mlp_in and mlp_out (hidden, D), with `fp8` also its `MLP8` as mlp8; and its row of every
        parameter whose row in the table has `layers`, by the parameter's name. What a layer lacks
        is None.
        """
        count = len(self.rows)
        names = ["qkv", "out", "mlp_in", "mlp_out", "mlp8"]
        names += ["head_gates", "skip", "dc_in", "dc_out"]  # which `make_gates` puts in
        for name, row in self.table.items():
            if row is None or row.layers is not None:
                names.append(name)
        # All layers have all names, so that the layers of a kind share their graphs.
        layers = [dict.fromkeys(names) for _ in range(count)]

        def hand_out(name: str, to: Iterable[int], parts: Iterable) -> None:
            for layer, part in zip(to, parts):
                layers[layer][name] = part

        qkv, out = self.attention_weights()
        mlp_matrices = self.mlp_bank.unbind()
        hand_out("qkv", qkv.keys(), qkv.values())
        hand_out("out", out.keys(), out.values())
        hand_out("mlp_in", range(count), mlp_matrices[: 2 * count : 2])
        hand_out("mlp_out", range(count), mlp_matrices[1 : 2 * count : 2])
        hand_out("mlp8", range(count), zip(*map(torch.unbind, self.mlp8)) if fp8 else ())
        for name, row in self.table.items():
            if row is not None and row.layers is not None:  # the layers' own parameters
                parts = getattr(self, name).to(self.embed.dtype).unbind()
                hand_out(name, row.layers, parts)
        return layers, self.layer_mixes(length)

    def attention_weights(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """W_qkv (3D, D), or (2D, D) where Q and K are narrow, and W_out (D, D) of each layer."""
        # For all layers at once, which saves some hundred small kernels, most of them backward.
        dtype = self.embed.dtype
        dim, heads = self.config.dim, self.config.heads
        attending = self.attending
        n = len(attending)
        qkv_lambdas = self.qkv_lambdas.to(dtype)[:, None, None]
        w_v, w_o = self.vo_bank[: n * 2].unflatten(0, (n, 2)).unbind(1)
        qkv = {}
        for name, (those, _) in self.qk_banks.items():
            if not those:
                continue
            bank = getattr(self, name)[: self.table[name].shape[0]]  # without its padding
            w_q, w_k = bank.view(len(those), 2, -1, dim).unbind(1)
            v, lambdas, paired = w_v, qkv_lambdas, self.paired
            if those != attending:
                places = [attending.index(layer) for layer in those]
                v, lambdas = (torch.stack([x[i] for i in places]) for x in (v, lambdas))
                paired = None if paired is None else torch.stack([paired[i] for i in places])
            qkv |= zip(those, (lambdas * join_qkv([w_q, w_k, v], paired, heads)).unbind())
        # W_out takes in what attention's output is multiplied by. (MUDD's layer does it by token.)
        attn_post = self.post_lambdas[:, 0]
        for layer in self.mudd_layers:
            attn_post = attn_post.select_scatter(torch.ones_like(attn_post[0]), 0, layer)
        out_lambdas = self.out_lambdas * attn_post.index_select(0, self.attending_layers)
        if self.paired is not None:
            w_o = torch.where(self.paired, even_heads_first(w_o, heads, 2), w_o)
        out = out_lambdas.to(dtype)[:, None, None] * w_o
        return qkv, dict(zip(attending, out.unbind()))

    def layer_mixes(self, length: int) -> list[Mix]:
        """Each layer's `Mix`, of the learned scalars; 0 in the place of what networks make."""
        attn_resid, mlp_resid = self.resid_lambdas.unbind(1)
        x0, bigram = self.x0_lambdas, self.bigram_lambdas
        if x0 is None:
            x0 = torch.zeros_like(attn_resid)
        if bigram is None:
            bigram = torch.zeros_like(attn_resid)
        # Spread over the tokens: one sum over them then makes the gradients of all the scalars,
        # which otherwise take a kernel each. Contiguous like MUDD's, so that one graph serves both.
        stacked = torch.stack((attn_resid, x0, bigram, mlp_resid, self.post_lambdas[:, 1]))
        spread = stacked.to(self.embed.dtype).flatten()[:, None, None].expand(-1, length, 1)
        each = spread.contiguous().unbind()
        count = len(self.rows)
        return [Mix(*each[layer::count]) for layer in range(count)]


# 6. Optimizer =====================================================================================
# NorMuon for the banks, every step; Adam for the rest, every second step, on the sum of two steps'
# gradients (of more for embedding tables, if `tables_every` says so). Ranks share out the banks and
# tables: they reduce-scatter the gradients, update a part each, and gather the new values. Gates
# and scalars are small: every rank updates all of them, from all-reduced gradients. One rank
# exchanges nothing.

# torch 2.13 renames the two collectives and warns of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def adam_update(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, decay: Tensor,
    beta1: Tensor, beta2: Tensor, bias1: Tensor, bias2: Tensor,
) -> None:
    """One step of Adam with cautious weight decay [50], in place.

    The numbers from `lr` on are 0-d tensors, because another value of a plain number would be
    another graph. `decay` is lr^2 * weight decay; bias1 and bias2 are 1 - beta^t.
    """
    grad = grad.float()
    value = p.float()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    update = lr * bias2.sqrt() / bias1 * exp_avg / (exp_avg_sq.sqrt() + 1e-10)
    # Cautious: only what the update makes smaller decays as well. A table's row that never had a
    # gradient has an update of 0, and so keeps its start; hence > where NorMuon has >=.
    decays = update * value > 0
    p.copy_(value - update - decay * value * decays)


@functools.cache
def compiled_adam(large: bool) -> Callable:
    """`adam_update` for flat tensors of any length, so that one graph serves them all.

    The first tensor decides how large the blocks of a GPU's kernel are, so large ones have a graph
    of their own: blocks for a gate's twelve numbers would be 16 numbers each.
    """
    return torch.compile(copy_of(adam_update), dynamic=True, fullgraph=True)


@torch.compile(dynamic=False, fullgraph=True)
def normuon_update(
    p: Tensor, grad: Tensor, factors: Tensor, lr: Tensor, wd: Tensor, momentum: Tensor,
    beta2: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None = None,
    slow: Tensor | None = None, slow_momentum: Tensor | None = None,
    slow_weight: Tensor | None = None, kernels: bool = False, polar_steps: int = 5,
) -> None:
    """One step of NorMuon (arXiv 2510.05491) on matrices p (n, rows, cols), in place [38, 41-43].

    Muon [3] replaces the momentum by the closest orthogonal matrix: all directions in which a
    matrix acts get the same step, also those in which gradients are small. That leaves some rows
    (or columns) with far larger steps than others, which NorMuon evens out by their running mean
    squares, as Adam does for single numbers, while the matrix keeps its size.

    `factors` (n, 1, 1) multiply each matrix's learning rate; the numbers are 0-d tensors.
    `exp_avg_sq` has the mean squares of rows (n, rows, 1) or of columns (n, 1, cols), whichever are
    more; `low` (uint16) the mantissa bits that bf16 weights lose; `slow` a second momentum, which
    reaches further back.
    """
    # 1. Momentum, with Nesterov's look ahead. A slow one is added to it, as in AdEMAMix (arXiv
    # 2409.03137): old gradients still say which way to go where new ones are mostly noise. It
    # starts at 0, and so counts for little until it has seen as many steps as it reaches back.
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - momentum)
    u = torch.lerp(grad, exp_avg, momentum)
    if slow is not None:
        slow.lerp_(grad, 1 - slow_momentum)
        u = u + slow_weight * slow

    # 2. Orthogonalize.
    u = polar_express(u, p.dtype, kernels, POLAR_EXPRESS[polar_steps]).float()

    # 3. Even out the rows or the columns.
    size = u.norm(dim=(-2, -1), keepdim=True)
    over = -1 if exp_avg_sq.size(-1) == 1 else -2
    exp_avg_sq.lerp_(u.square().mean(over, keepdim=True), 1 - beta2)
    u = u * exp_avg_sq.clamp(min=1e-10).rsqrt()
    u = u * (size / u.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))

    # 4. Step, with cautious weight decay. (Where u is 0 weights decay; Adam's do not.)
    value = p if low is None else join_float32(p, low)
    step = lr * factors
    value = value - step * (lr * wd) * value * (u * value >= 0) - step * u
    if low is not None:
        value, lost = split_float32(value)
        low.copy_(lost)
    p.copy_(value)


@torch.compile(dynamic=False, fullgraph=True)
def average_update(
    p: Tensor, mean: Tensor, weight: Tensor, share: Tensor, low: Tensor | None = None
) -> None:
    """Moves the mean of weights p by `weight` towards them, then p by `share` towards the mean.

    In place. With a weight of 1 / n in step n it is the mean of all n steps' weights. It is
    float32, and takes in the bits `low` that bf16 weights lose.
    """
    value = p if low is None else join_float32(p, low)
    mean.lerp_(value, weight)
    value = torch.lerp(value, mean, share)
    if low is not None:
        value, lost = split_float32(value)
        low.copy_(lost)
    p.copy_(value)


def restored(
    saved: object, name: str, shape: tuple[int, ...], row: ParameterRow, what: str = "parameter"
) -> Tensor:
    """saved[name], a parameter of a checkpoint or what goes with it, in this shape.

    A bank's first axis is cut, or padded with zeros, for another number of processes. UserError if
    it is not there or has another shape.
    """
    tensor = saved.get(name) if isinstance(saved, dict) else None
    if not isinstance(tensor, Tensor):
        raise UserError(f"has no {what} {name}")
    found = tuple(tensor.shape)
    fits = found == shape
    if row.kind == "bank":
        fits = found[1:] == shape[1:] and found[:1] >= row.shape[:1]
    if not fits:
        raise UserError(f"{what} {name}: its shape is {found}, this model's is {shape}")
    if found == shape:
        return tensor
    missing = shape[0] - found[0]
    return F.pad(tensor, (0, 0) * (len(shape) - 1) + (0, missing))


class Reduction(NamedTuple):
    """A gradient that is on its way between the ranks."""

    works: list[dist.Work]  # what has to arrive
    grad: Tensor  # where it arrives: this rank's part of the mean, or rows of it
    rows: Tensor | None = None  # a sparse exchange: the rows of the parameter that `grad` is of


class Optimizer:
    """Both optimizers, their state, and the exchange between ranks, for a whole `GPT`."""

    def __init__(self, model: GPT, settings: Settings, rank: int = 0, world_size: int = 1):
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.model = model
        self.kernels = model.kernels
        self.table = model.table
        self.params = dict(model.named_parameters())
        self.banks = self.names_of("bank")
        self.tables = self.names_of("table")
        self.small = self.names_of("gate", "scalar")
        # The parameters that NorMuon updates, and those of which each rank updates a part.
        self.muon = self.banks if settings.muon else []
        self.sharded = self.banks + self.tables if world_size > 1 else []
        # Of the bigram table's gradient only the rows that a rank has touched need to travel; so it
        # is where a rank has one slice, as in the record. (With more it touches more of them.)
        self.sparse = (
            settings.sparse_exchange
            and world_size > 1
            and settings.slices == world_size
            and "bigram_table" in self.params
        )
        self.touched: list[Tensor] = []  # those rows, on the CPU, a tensor a step since the update
        self.tied = settings.stages[0].tied
        self.updates = dict.fromkeys(self.params, 0)  # Adam's t, by name
        self.state = {}
        self.factors = {}
        for name, p in self.params.items():
            self.add_state(name, p)

    def names_of(self, *kinds: str) -> list[str]:
        return [name for name in self.params if self.table[name].kind in kinds]

    def add_state(self, name: str, p: Tensor) -> None:
        """Zeros for both averages of this rank's part, and what NorMuon needs besides."""
        zeros = torch.zeros_like(self.share(name, p.data), dtype=torch.float32)
        state = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if name in self.muon:
            count, rows, cols = p.shape
            over = -1 if rows >= cols else -2
            state["exp_avg_sq"] = zeros.mean(over, keepdim=True)
            if p.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(zeros, dtype=torch.uint16)
            if self.settings.slow_momentum > 0:
                state["slow"] = zeros.clone()
            if self.settings.average_steps > 0:
                state["mean"] = zeros.clone()
            # A matrix's step grows with its shape; W_out's is twice as large again.
            factors = torch.full((count, 1, 1), max(1, rows / cols) ** 0.5, device=p.device)
            if name == "mlp_bank":
                factors[1::2] *= 2
            self.factors[name] = self.share(name, factors)
        self.state[name] = state

    def share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of something with a parameter's first axis, where ranks share it out."""
        if name not in self.sharded:
            return whole
        return whole.chunk(self.world_size)[self.rank]

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The inverse of `share`; it travels as bytes, since not all dtypes can."""
        if name not in self.sharded:
            return part
        whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
        all_gather(whole.view(torch.uint8), part.contiguous().view(torch.uint8))
        return whole

    @torch.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Reduces the gradients that this step uses, updates, and clears them."""
        due = set(self.params) if hyper.adam else set(self.muon)
        if not hyper.tables:
            due -= set(LOOKED_UP)
        merge = hyper.adam and self.tied
        if merge:
            self.merge_tied_gradients()
            due.discard("embed")

        # Reductions and updates go in different orders. Gradients of the banks leave before those
        # of the large tables, since every step has them and most of the computing waits for them.
        # But banks are updated last, so that the tables' new values travel while NorMuon computes.
        update_order = self.small + self.tables + self.banks

        # Phase 1: launch all reductions.
        reductions = self.launch_small_reductions([name for name in self.small if name in due])
        for name in self.banks + self.tables:
            if name in due:
                reductions[name] = self.launch_reduction(name)
        # Phase 2: update each parameter when its gradient is there, and launch its gather.
        gathers = []
        for name in update_order:
            if name in due:
                grad = self.finish_reduction(reductions.pop(name))
                self.update(name, grad, hyper)
                self.model.clear_gradient(name)
                gathers += self.launch_gather(name)
        # Phase 3: wait for the new values.
        for work in gathers:
            work.wait()
        self.model.quantize_weights(hyper.delayed)

        if merge:
            self.tied = hyper.stage.tied
            self.copy_head_to_embed(with_state=not self.tied)

    def merge_tied_gradients(self) -> None:
        """While embed is the head's transpose, its gradient belongs to the head."""
        head, embed = self.model.gradient("lm_head"), self.model.gradient("embed")
        transpose_into(head, embed, add=True, kernels=self.kernels)
        self.model.clear_gradient("embed")

    def copy_head_to_embed(self, with_state: bool) -> None:
        """embed becomes the head's transpose; at the untying it takes its state, too [51, 53]."""
        head, embed = self.params["lm_head"], self.params["embed"]
        transpose_into(embed.data, head.data, kernels=self.kernels)
        if with_state:
            for key, part in self.state["lm_head"].items():
                whole = self.gather("lm_head", part)
                self.state["embed"][key].copy_(self.share("embed", whole.T))
            self.updates["embed"] = self.updates["lm_head"]

    def launch_small_reductions(self, names: list[str]) -> dict[str, Reduction]:
        """Sends small gradients on their way to their means over the ranks, all in one tensor."""
        grads = [self.model.gradient(name) for name in names]
        if self.world_size == 1 or not names:
            return {name: Reduction([], grad) for name, grad in zip(names, grads)}
        together = torch.cat([grad.flatten().float() for grad in grads])
        work = dist.all_reduce(together, op=dist.ReduceOp.AVG, async_op=True)
        means = together.split([grad.numel() for grad in grads])
        each = zip(names, means, grads)
        return {name: Reduction([work], mean.view_as(grad)) for name, mean, grad in each}

    def launch_reduction(self, name: str) -> Reduction:
        """Sends the gradient of a bank or table on its way to its mean over the ranks."""
        grad = self.model.gradient(name)
        if self.world_size == 1:
            return Reduction([], grad)
        if name == "bigram_table" and self.sparse:
            return self.launch_exchange_of_rows(grad)
        part = torch.empty_like(self.share(name, grad))
        work = reduce_scatter(part, grad.contiguous(), op=dist.ReduceOp.AVG, async_op=True)
        return Reduction([work], part)

    def finish_reduction(self, reduction: Reduction) -> Tensor:
        """Waits for it; returns this rank's part of the mean gradient."""
        for work in reduction.works:
            work.wait()
        if reduction.rows is None:
            return reduction.grad
        # Rows from all ranks: gradients of the same row are summed.
        size = len(self.params["bigram_table"]) // self.world_size
        grad = reduction.grad
        total = torch.zeros(size, grad.size(1), device=grad.device)
        total.index_add_(0, reduction.rows % size, grad.float())
        return (total / self.world_size).to(grad.dtype)

    def launch_exchange_of_rows(self, grad: Tensor) -> Reduction:
        """The reduce-scatter of a gradient (rows, cols) that is zero in most of its rows.

        The others are sent to the ranks that own them. Which they are, and so how much travels,
        comes from the tokens, on the CPU: nothing waits for the device.
        """
        rows = torch.cat(self.touched).unique()
        self.touched = []
        size = len(grad) // self.world_size
        sends = torch.bincount(rows // size, minlength=self.world_size)
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends)
        splits = receives.tolist(), sends.tolist()
        arriving = sum(splits[0])
        if grad.is_cuda:
            rows = rows.pin_memory()  # the copy of others would wait until the device gets there
        rows = rows.to(grad.device, non_blocking=True)
        their_rows = rows.new_empty(arriving)
        values = grad.new_empty(arriving, grad.size(1))
        works = [
            dist.all_to_all_single(their_rows, rows, *splits, async_op=True),
            dist.all_to_all_single(values, grad[rows], *splits, async_op=True),
        ]
        return Reduction(works, values, their_rows)

    def launch_gather(self, name: str) -> list[dist.Work]:
        """Sends this rank's part of a parameter to all others, where ranks share it out."""
        if name not in self.sharded:
            return []
        whole = self.params[name].data
        return [all_gather(whole, self.share(name, whole), async_op=True)]

    def update(self, name: str, grad: Tensor, hyper: Hyper) -> None:
        """Updates this rank's part of a parameter, from its part of the gradient."""
        settings = self.settings
        row = self.table[name]
        state = self.state[name]
        part = self.share(name, self.params[name].data)
        if name in self.muon:
            normuon_update(
                part, grad, self.factors[name],
                lr=torch.tensor(settings.muon_lr * hyper.lr),
                wd=torch.tensor(settings.muon_wd), momentum=torch.tensor(hyper.momentum),
                beta2=torch.tensor(settings.muon_beta2), exp_avg=state["exp_avg"],
                exp_avg_sq=state["exp_avg_sq"], low=state.get("low"), slow=state.get("slow"),
                slow_momentum=torch.tensor(settings.slow_momentum),
                slow_weight=torch.tensor(settings.slow_weight), kernels=self.kernels,
                polar_steps=settings.polar_steps,
            )
            if hyper.averaged > 0:
                # In the last step the weights go halfway to their mean over the last steps, which
                # has less of the noise of single steps: so they are validated, and saved.
                share = 0.5 if hyper.averaged == settings.average_steps else 0.0
                average_update(
                    part, state["mean"], weight=torch.tensor(1 / hyper.averaged),
                    share=torch.tensor(share), low=state.get("low"),
                )
        else:
            lr = settings.adam_lr * hyper.lr * row.lr
            beta1, beta2 = row.betas
            self.updates[name] += 1
            adam = compiled_adam(part.is_cuda and part.numel() > 2**14)
            adam(
                part.view(-1), grad.view(-1), state["exp_avg"].view(-1),
                state["exp_avg_sq"].view(-1), lr=torch.tensor(lr),
                decay=torch.tensor(lr**2 * settings.adam_wd * row.wd),
                beta1=torch.tensor(beta1), beta2=torch.tensor(beta2),
                bias1=torch.tensor(1 - beta1 ** self.updates[name]),
                bias2=torch.tensor(1 - beta2 ** self.updates[name]),
            )

    def state_dict(self) -> dict:
        """All state, and the gradients that wait for Adam, whole and on the CPU.

        All ranks take part; rank 0 has the result, the others have None in place of tensors. Of the
        FP8 scales, which ranks do not share, it has the largest: none clips what another's did not.
        """

        def keep(whole: Tensor) -> Tensor | None:
            return whole.cpu() if self.rank == 0 else None

        states = {}
        for name, state in self.state.items():
            states[name] = {key: keep(self.gather(name, part)) for key, part in state.items()}
        grads = {}
        for name in self.params:
            grad = self.model.gradient(name)
            if grad is not None:
                grad = grad.clone()
                if self.world_size > 1:
                    dist.all_reduce(grad, op=dist.ReduceOp.AVG)
                grads[name] = keep(grad)
        scales = {}
        for name, scale in self.model.lasting_scales().items():
            largest = scale.clone()
            if self.world_size > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            scales[name] = keep(largest)
        return {
            "states": states, "grads": grads, "scales": scales, "updates": dict(self.updates),
            "tied": self.tied,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Takes this rank's part of a `state_dict`, which may be from another number of ranks.

        UserError if something is missing, or has another shape.
        """
        states, grads = part_of(saved, "states", dict), part_of(saved, "grads", dict)
        updates = part_of(saved, "updates", dict)
        for name, p in self.params.items():
            row = self.table[name]
            self.updates[name] = part_of(updates, name, int)
            for key, part in self.state[name].items():
                shape = (len(p), *part.shape[1:])
                whole = restored(states.get(name), key, shape, row, f"state of {name}:")
                part.copy_(self.share(name, whole))
            if name in grads:
                grad = restored(grads, name, tuple(p.shape), row, "gradient of")
                self.model.clear_gradient(name)
                if self.model.gradient(name) is None:
                    p.grad = grad.to(p.device, p.dtype)
                else:
                    self.model.gradient(name).copy_(grad)
        if self.sparse and "bigram_table" in grads:
            touched = grads["bigram_table"].any(1)
            self.touched.append(touched.nonzero().squeeze(1))
        self.model.load_scales(part_of(saved, "scales", dict))
        self.tied = part_of(saved, "tied", bool)


# 7. Data ==========================================================================================
# A shard is a header of 1,024 bytes, then tokens, 2 bytes each. Which documents make which batch is
# planned for the whole run before it starts, from the documents' lengths alone and alike on all
# ranks; so too few tokens are noticed before the clock starts.


def beside_this_file(path: str) -> str:
    """A path that counts from this file's folder, as one from the current folder."""
    return os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), path))


def find_shards(pattern: str, preset: str) -> list[str]:
    """The files of a pattern, in name order. A preset's own count from this file's folder."""
    if pattern in (PRESETS[preset].train_files, PRESETS[preset].val_files):
        pattern = beside_this_file(pattern)
    paths = sorted(glob.glob(pattern))
    if not paths:
        script, *count = FETCH[preset].split()
        command = shlex.join(["python", beside_this_file(script), *count])
        text = f"no shards match {pattern}; get them with: {command}"
        if FETCH[preset] != FETCH["tiny"] and not torch.cuda.is_available():
            text += "; without a GPU there is the preset tiny: ./run.sh, or --preset tiny"
        raise UserError(text)
    return paths


def check_apart(train_paths: Iterable[str], val_paths: Iterable[str]) -> None:
    """UserError if a training shard is a validation shard, too, or a copy of one."""

    def likeness(path: str) -> tuple[int, bytes]:
        with open(path, "rb") as file:
            return os.path.getsize(path), file.read(8192)

    validation = {likeness(path): path for path in val_paths}
    for path in train_paths:
        twin = validation.get(likeness(path))
        if twin is not None:
            raise UserError(
                f"{path}: a training shard with the content of the validation shard {twin}; "
                "train on others"
            )


def read_shard(path: str, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A shard's tokens (uint16), and the positions of all documents' BOS and of the shard's end.

    UserError if the file is not a whole shard of this vocabulary.
    """
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=256)
        tokens = np.fromfile(path, dtype="<u2")[512:]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size < 1024:
        raise UserError(f"{path}: truncated: {size} bytes, expected a header of 1,024 bytes")
    magic, version, count = (int(number) for number in header[:3])
    if magic != 20240520 or version != 1:
        raise UserError(
            f"{path}: is not a shard of tokens: its magic number is {magic} and its version "
            f"{version}, of a shard they are 20240520 and 1"
        )
    expected = 1024 + 2 * count
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path}: {what}: {size:,} bytes, but {count:,} tokens take {expected:,}; get it again"
        )
    largest = tokens.max(initial=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: token {largest} is outside the vocabulary of {config.vocab_size}; "
            "is it another tokenizer's?"
        )
    starts = np.flatnonzero(tokens == config.bos_id)
    if len(starts) == 0:
        raise UserError(
            f"{path}: no BOS (token {config.bos_id}); every document must start with BOS"
        )
    return tokens, np.append(starts, len(tokens))


class Batch(NamedTuple):
    """Where one step's tokens come from.

    Slice s, a microbatch of `length` inputs and one token more, has the shard's documents from
    documents[s] up to documents[s + 1], each cut to max_seq_len.
    """

    path: str
    documents: list[int]
    length: int
    max_seq_len: int


def fill_slices(ends: np.ndarray, first: int, length: int, slices: int) -> list[int] | None:
    """Where the slices of a batch begin and end in a shard, from its document `first` on.

    `ends[d]` is the number of tokens, after cutting, in documents 0 … d - 1. A slice takes whole
    documents until it has length + 1 tokens; what its last document has left over is dropped. None
    if the shard has too few documents.
    """
    documents = [first]
    for _ in range(slices):
        if documents[-1] >= len(ends):
            return None
        needed = ends[documents[-1]] + length + 1
        documents.append(int(np.searchsorted(ends, needed)))
    if documents[-1] >= len(ends):
        return None
    return documents


def plan_batches(settings: Settings, paths: list[str]) -> tuple[list[Batch], dict[str, int]]:
    """A `Batch` for every step of the run; and the tokens of each shard that it looked at.

    Where a shard runs out, the batch begins again with the next one; after the last shard comes the
    first. UserError if that takes more epochs than the settings allow.
    """

    @functools.cache
    def bounds(path: str) -> np.ndarray:
        return read_shard(path, settings.model)[1]

    @functools.cache
    def cut_ends(path: str, max_seq_len: int) -> np.ndarray:
        lengths = np.minimum(np.diff(bounds(path)), max_seq_len)
        return np.append(0, lengths).cumsum()

    plan = []
    shard = 0  # counts on from epoch to epoch
    document = 0  # the first that is not used yet
    tried_in_vain = 0  # shards in a row that had no whole batch left
    planned_in_time = None  # the steps that the allowed epochs are enough for
    while len(plan) < settings.total_steps:
        path = paths[shard % len(paths)]
        stage = schedule(settings, len(plan)).stage
        length = stage.batch_tokens // settings.slices
        ends = cut_ends(path, stage.max_seq_len)
        documents = fill_slices(ends, document, length, settings.slices)
        if documents is not None:
            plan.append(Batch(path, documents, length, stage.max_seq_len))
            document = documents[-1]
            tried_in_vain = 0
            continue
        shard += 1
        document = 0
        tried_in_vain += 1
        if tried_in_vain > len(paths):  # so each of them was tried from its start
            largest = max(bounds(each)[-1] for each in paths)
            raise UserError(
                f"{settings.train_files}: no shard has documents for one batch of "
                f"{stage.batch_tokens:,} tokens (cut to {stage.max_seq_len:,}); "
                f"the largest of {len(paths)} has {largest:,} tokens; make larger ones"
            )
        if shard == settings.epochs * len(paths):
            planned_in_time = len(plan)

    epochs = shard // len(paths) + 1
    if epochs > settings.epochs:
        need = sum(batch.length * settings.slices for batch in plan)
        have = sum(batch.length * settings.slices for batch in plan[:planned_in_time])
        raise UserError(
            f"{settings.train_files}: too few tokens: {have:,} of {need:,}, in {len(paths)} shards "
            f"and {settings.epochs} epochs after cutting documents; "
            f"add shards, or use --epochs {epochs}"
        )
    return plan, {path: int(bounds(path)[-1]) for path in paths[: shard + 1]}


def prefetch(items: Iterator) -> Iterator:
    """Yields what an iterator yields (but not None); a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


def training_batches(plan: list[Batch], config: ModelConfig, slices: range) -> Iterator[Tensor]:
    """Yields the tokens (slices, length + 1), int32, of these slices of every batch of the plan."""
    by_shard = []  # the batches of one shard after another
    for path, batches in itertools.groupby(plan, key=lambda batch: batch.path):
        by_shard.append((path, list(batches)))
    shards = prefetch(read_shard(path, config) for path, _ in by_shard)
    for (path, batches), (tokens, bounds) in zip(by_shard, shards):
        # Where several epochs go over a shard, the last batch need not be the farthest.
        if max(batch.documents[-1] for batch in batches) >= len(bounds):
            raise UserError(f"{path}: changed while the run was reading it")
        for batch in batches:
            rows = [slice_of(batch, number, tokens, bounds) for number in slices]
            yield torch.from_numpy(np.stack(rows).astype(np.int32))


def slice_of(batch: Batch, number: int, tokens: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The length + 1 tokens of one slice of a batch."""
    pieces = []
    for document in range(batch.documents[number], batch.documents[number + 1]):
        piece = tokens[bounds[document] : bounds[document + 1]]
        pieces.append(piece[: batch.max_seq_len])
    return np.concatenate(pieces)[: batch.length + 1]


def touched_rows(tokens: Tensor, config: ModelConfig) -> Tensor:
    """The rows of the bigram table that tokens (slices, length + 1) give a gradient to."""
    found = []
    for inputs in tokens[:, :-1]:
        begins = document_starts(inputs, config)
        rows, _ = ngram_rows(inputs, begins, config.bigram_table_rows, config.ngram)
        found.append(rows.flatten())
    return torch.cat(found).long().unique()


def validation_stream(settings: Settings) -> tuple[np.ndarray, dict[str, int]]:
    """The first val_tokens of the data and one more (uint16), and the tokens of each shard read."""
    need = settings.val_tokens + 1  # the last target is the next token
    stream = np.empty(0, np.uint16)
    sizes = {}
    for path in find_shards(settings.val_files, settings.preset):
        if len(stream) < need:
            tokens, _ = read_shard(path, settings.model)
            stream = np.append(stream, tokens[:need])
            sizes[path] = len(tokens)
    length = settings.val_seq_len
    if len(stream) < need:
        # The most that fits: in sequences of this length, or else in one of a power of two.
        most = max(len(stream) - 1, 0)
        fitting = f"--val-tokens {most // length * length}"
        if most < length:
            shorter = 2 ** (most.bit_length() - 1) if most else 0
            fitting = f"--val-tokens {shorter} --val-seq-len {shorter}"
        remedy = "add shards"
        if most > 0:
            remedy += f", or use {fitting}"
        raise UserError(
            f"{settings.val_files}: too few validation tokens: {len(stream):,}, but --val-tokens "
            f"{settings.val_tokens} needs one more than that; {remedy}"
        )
    return stream[:need], sizes


def validation_sequences(stream: np.ndarray, length: int) -> Tensor:
    """The sequences (n, length + 1), int32, that tile a stream of n * length tokens and one more.

    The last token of a sequence, which is no input of it, is the first of the next one.
    """
    return torch.from_numpy(stream.astype(np.int32)).unfold(0, length + 1, length)


# Prefix tokens [88]. Besides the next token, " understanding", training asks with a smaller weight
# for the longest other token that it begins with, " understand". To the model tokens are numbers;
# so it learns something of their spelling.


def gpt2_vocabulary() -> list[bytes]:
    """What GPT-2's tokens stand for, by number, but for the last one, BOS.

    UserError if it cannot be had: tiktoken fetches it once, and then has it on the disk.
    """
    try:
        import tiktoken  # here, since nothing else needs it

        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # also what its HTTP library raises
        raise UserError(
            f"GPT-2's vocabulary, for prefix tokens and samples, cannot be had here: {error}; "
            "--prefix-tokens false --sample-every 0 trains without it"
        ) from None
    return [encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token)]


def vocabulary_for(settings: Settings) -> list[bytes] | None:
    """What the tokens but BOS stand for, by number, where the run needs to know it; else None."""
    if not settings.has_prefixes and settings.sample_every == 0:
        return None
    if settings.model.has_byte_tokens:
        return [bytes([number]) for number in range(256)]
    return gpt2_vocabulary()


def prefix_table(vocabulary: list[bytes], vocab_size: int) -> Tensor:
    """The number (vocab_size,) of the longest other token that a token begins with; -1 for none."""
    numbers = {text: number for number, text in enumerate(vocabulary)}
    table = [-1] * vocab_size
    for number, text in enumerate(vocabulary):
        for end in range(len(text) - 1, 0, -1):
            if text[:end] in numbers:
                table[number] = numbers[text[:end]]
                break
    return torch.tensor(table)


# 8. Training ======================================================================================
# A process and its device, the clock, one step, the warm-up that leaves no trace, the log,
# checkpoints, and the loop.


class World(NamedTuple):
    """This process among the others, and its device."""

    rank: int
    size: int
    device: torch.device


def environment_number(name: str, default: int, low: int, high: int) -> int:
    """A number that torchrun puts into the environment; UserError if it cannot be that."""
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if low <= int(text) <= high:
            return int(text)
    raise UserError(f"{name}={text}: must be a whole number from {low} to {high}; use torchrun")


def find_rank() -> tuple[int, int]:
    """This process's rank and the number of all, from what torchrun puts into the environment.

    UserError if that cannot be.
    """
    size = environment_number("WORLD_SIZE", 1, low=1, high=2**20)
    rank = environment_number("RANK", 0, low=0, high=size - 1)
    if size > 1:
        environment_number("MASTER_PORT", -1, low=1, high=65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE={size}, but MASTER_ADDR is not set; use torchrun")
    return rank, size


def find_device() -> torch.device:
    """This process's GPU, or the CPU where there is none; UserError if GPUs cannot be used."""
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        rank = environment_number("LOCAL_RANK", 0, low=0, high=2**20)
        if rank >= gpus:
            raise UserError(f"process {rank + 1} of this node, but PyTorch sees {gpus} GPUs")
        torch.cuda.set_device(rank)
        return torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.device_count() > 0:  # which does not ask whether the driver fits
        raise UserError(
            f"PyTorch {torch.__version__} cannot use this machine's GPU: install a newer NVIDIA "
            "driver, or a PyTorch for an older CUDA; CUDA_VISIBLE_DEVICES= trains on the CPU"
        )
    # On the CPU a resumed run then equals one that never stopped, bit for bit.
    torch.use_deterministic_algorithms(True)
    return torch.device("cpu")


def find_world() -> World:
    """This process among the others, and its device."""
    rank, size = find_rank()
    return World(rank, size, find_device())


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Of weights and activations: bfloat16 where the hardware has it, unless the settings say."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if native else torch.float32


def choose_kernels(settings: Settings, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run: on CUDA, in bfloat16, unless the settings say no."""
    able = triton is not None and device.type == "cuda" and dtype == torch.bfloat16
    return settings.kernels and able


def choose_fp8(settings: Settings, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training has matmuls in 8 bits: with the kernels, from compute capability 8.9 on.

    All sizes must be multiples of 16.
    """
    if not settings.fp8 or not choose_kernels(settings, device, dtype):
        return False
    sizes = [settings.model.dim]
    for stage in settings.all_stages:
        sizes.append(stage.batch_tokens // settings.slices)
    return torch.cuda.get_device_capability(device) >= (8, 9) and math.gcd(*sizes) % 16 == 0


def build(settings: Settings, world: World) -> tuple[GPT, Callable, Optimizer]:
    """Meets the other ranks; returns model, training objective and optimizer, the same on all.

    The objective is the model's `forward`. On CUDA it is compiled as one graph, which takes in the
    regions; validation, and the CPU, compile each region alone.
    """
    device = world.device
    on_cuda = device.type == "cuda"
    dtype = choose_dtype(settings, device)
    torch.manual_seed(settings.seed)
    model = GPT(
        settings.model, dtype, shards=world.size,
        kernels=choose_kernels(settings, device, dtype),
        fp8=choose_fp8(settings, device, dtype),
    ).to(device)
    if world.size > 1:
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, device_id=device if on_cuda else None)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data.view(torch.uint8), src=0)  # not all dtypes can travel
    model.quantize_weights()
    objective = model
    if on_cuda:
        objective = torch.compile(model, dynamic=False, fullgraph=True)
    return model, objective, Optimizer(model, settings, world.rank, world.size)


def compile_or_not(wanted: bool, device: torch.device) -> str:
    """Turns torch.compile off if it is not wanted, or does not work; returns words for the log.

    UserError if it does not work on a GPU, whose memory uncompiled attention would fill.
    """
    if wanted:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))
            return "compiling"
        except Exception as error:
            if device.type == "cuda":
                reason = str(error).partition("\n")[0]
                raise UserError(
                    "torch.compile does not work, which needs gcc, g++ and Python's headers "
                    f"(packages gcc, g++, python3-dev): {reason}"
                ) from None
    torch.compiler.set_stance("force_eager")
    if wanted:
        return "uncompiled, as no working C++ compiler was found,"
    return "uncompiled"


# --- The clock, and what a device can do.


def mark(device: torch.device):
    """A point in the device's work, for `elapsed`. Nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def elapsed(begin, end) -> float:
    """Milliseconds from one mark to another; waits until the device has come to the second."""
    if isinstance(end, float):
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


class Clock:
    """The training time in milliseconds; it stands still during validation and checkpoints."""

    def __init__(self, device: torch.device, milliseconds: float = 0.0):
        self.device = device
        self.milliseconds = milliseconds
        self.begin = None

    def start(self) -> None:
        self.begin = mark(self.device)

    def stop(self) -> None:
        self.milliseconds = self.at(mark(self.device))

    def at(self, point) -> float:
        """The time at a mark that was made since the last start; waits for the device."""
        return self.milliseconds + elapsed(self.begin, point)


def flops_per_token(config: ModelConfig, stage: Stage) -> int:
    """FLOPs of a training token: 6 a matrix parameter, and 6 a channel and key of attention for
    the logits, 6 for the values.
    """
    dim = config.dim
    short, long = stage.windows
    parameters = dim * config.padded_vocab
    channels = 0  # times keys
    for row in config.rows:
        parameters += 2 * config.mlp_ratio * dim**2
        if row.attention:
            qk_dim = dim // 2 if row.narrow_qk else dim
            parameters += 2 * qk_dim * dim + 2 * dim**2
            keys = long if row.window == "long" else short
            keys += DC_WINDOW if row.dc else 0
            channels += (qk_dim + dim) * keys
    return 6 * parameters + 6 * channels


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that the device really reaches, by the best of some large matmuls."""
    size = 8192 if device.type == "cuda" else 1024
    # As good as random numbers (a GPU's speed depends on them), without using up any of the run's.
    a = torch.arange(size**2, dtype=torch.float32, device=device).sin()
    a = a.view(size, size).to(dtype)
    out = torch.empty_like(a)
    marks = [mark(device)]
    for _ in range(6):
        torch.mm(a, a, out=out)
        marks.append(mark(device))
    best = min(elapsed(begin, end) for begin, end in itertools.pairwise(marks))
    return 2 * size**3 / best * 1000


# --- A step.
# A batch is cut into slices; a rank takes some of them and runs them one after another, as
# microbatches, adding up gradients. So it needs the memory of one slice, and the mathematics are
# the same for any number of ranks that divides the slices.
# A slice's loss is a sum over its tokens, and grows with its length: neither optimizer minds how
# large gradients are, and FP8's scales are for those of sums.


def train_step(objective: Callable, tokens: Tensor, context: Context, slices: int) -> Tensor:
    """Adds up the gradients of this rank's slices (n, length + 1), one microbatch after another.

    Returns its part of the batch's mean loss, detached. Slices are averaged here, and ranks by the
    optimizer.
    """
    total = torch.zeros((), device=tokens.device)
    for row in tokens:
        inputs, targets = row[:-1], row[1:].long()
        loss = objective(inputs, targets, context)
        (loss / len(tokens)).backward()
        total += loss.detach()
    return total / (slices * (tokens.size(1) - 1))


def batch_loss(part: Tensor, stop: bool, world: World) -> Tensor:
    """A batch's loss, and how many ranks wish to stop: summed over ranks, on the way to the CPU.

    The wishes travel with the losses so that all ranks stop after the same step.
    """
    # Into pinned memory on CUDA, where non_blocking does not wait for the copy.
    pair = torch.stack((part, torch.full_like(part, stop)))
    if world.size > 1:
        dist.all_reduce(pair)
    return pair.to("cpu", non_blocking=True)


def validate(model: GPT, sequences: Tensor, context: Context, world: World) -> float:
    """Mean cross-entropy in nats per token over the sequences (n, length + 1), shared by ranks."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    # Summed in float64: ten million losses in float32 would lose digits that are reported.
    for tokens in sequences[world.rank :: world.size].to(world.device):
        losses = model.evaluate(tokens[:-1], tokens[1:].long(), context)
        total += losses.sum(dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / (sequences.size(0) * (sequences.size(1) - 1))


# --- What the model writes.

SAMPLE_TOKENS = 200
BOS_TEXT = "<|endoftext|>"  # what stands for BOS, as in GPT-2


def generate(
    model: GPT, tokens: list[int], windows: tuple[int, int], rotary: tuple[Tensor, float],
    temperature: float, top_k: int, seed: int,
) -> Iterator[int]:
    """What the model writes after `tokens`, one token after another, without end.

    `temperature` 0 takes the likeliest each time; `top_k` 0 is no limit. Each token takes a pass
    over all that stand before it: to keep their keys and values would take a second forward pass,
    of one token, for all that looks back: smear, n-grams, the keys' offset, paired heads, DC.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    while True:
        context = make_context(model.config, len(tokens), windows, model.embed, rotary)
        so_far = torch.tensor(tokens, device=model.embed.device)
        logits = model.next_logits(so_far, context).cpu()
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
        token = logits.argmax().item()
        if temperature > 0:
            below = logits.double() - logits.max()  # so that no temperature overflows the largest
            odds = (below / temperature).softmax(-1)
            token = torch.multinomial(odds, 1, generator=generator).item()
        tokens.append(token)
        yield token


# --- Warm-up.


def warm_up(
    settings: Settings, model: GPT, objective: Callable, optimizer: Optimizer, world: World
) -> None:
    """Runs all that training will run, on made-up tokens, so that it is compiled before the clock.

    Then it puts model and optimizer back as they were: nothing may be learned off the clock, which
    is a rule of the track. The largest stage runs, too, so that too little memory shows here.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += state.values()
    before = [(tensor.detach().to("cpu", copy=True), tensor.grad) for tensor in tensors]
    counters = dict(optimizer.updates), optimizer.tied, list(optimizer.touched)
    model.zero_grad()

    stages = settings.all_stages
    shapes = [(stage.batch_tokens // settings.slices, stage.windows) for stage in stages]
    shapes = list(dict.fromkeys(shapes))
    longest = max(settings.val_seq_len, *(length for length, _ in shapes))
    made_up = torch.arange(longest + 1, dtype=torch.int32, device=world.device)[None]
    made_up = made_up % settings.model.vocab_size
    start, final = schedule(settings, 0), schedule(settings, settings.total_steps).stage
    mtp = torch.tensor(start.mtp, device=world.device)
    prefix_of = None
    if settings.has_prefixes:
        prefix_of = torch.zeros(settings.model.vocab_size, dtype=torch.long, device=world.device)
    hidden = True if world.rank > 0 else None  # None: shown on a terminal
    bar = functools.partial(tqdm, leave=False, disable=hidden)

    def learn(length: int, windows: tuple[int, int]) -> None:
        """Adds a gradient, as each step of training does first."""
        tokens = made_up[:, : length + 1]
        if optimizer.sparse:
            optimizer.touched.append(touched_rows(tokens.cpu(), settings.model))
        context = make_context(settings.model, length, windows, model.embed)
        context = context._replace(mtp=mtp, prefix_of=prefix_of)
        train_step(objective, tokens, context, settings.slices)

    # Processes begin at different ones: each compiles some, and finds the others' graphs on disk.
    begin = world.rank % len(shapes)
    for length, windows in bar(shapes[begin:] + shapes[:begin], "warm-up, steps"):
        learn(length, windows)
    # The last of the three has embed's own update, where the one before has untied it.
    for adam in bar((False, True, True), "warm-up, updates"):
        learn(*shapes[-1])
        optimizer.step(
            start._replace(stage=final, adam=adam, tables=True, averaged=settings.average_steps)
        )
    sequences = made_up[:, : settings.val_seq_len + 1].expand(world.size, -1)
    wide = dict.fromkeys(stage.windows for stage in (final, *stages))
    for windows in bar(wide, "warm-up, validation"):
        context = make_context(settings.model, settings.val_seq_len, windows, model.embed)
        validate(model, sequences, context, world)

    for tensor, (value, grad) in zip(tensors, before):
        tensor.data.copy_(value)
        tensor.grad = grad
    optimizer.updates, optimizer.tied, optimizer.touched = counters


# --- The log.


def output_of(*command: str) -> str:
    """What a program prints, started where this file lies; "none" if it is not there or fails."""
    folder = Path(__file__).parent
    try:
        output = subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return output.strip()


def hardware_name(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # Linux has it
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def sha256(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def log_header(
    settings: Settings, world: World, files: dict[str, dict[str, int]], stream: np.ndarray
) -> str:
    """Source, environment, settings and data: the log alone says what was run.

    `files` has the tokens of each shard of "train" and "val", `stream` those to validate on.
    """
    rule = "=" * 100
    source = Path(__file__).read_bytes()
    describe = "git --no-optional-locks describe --always --exclude=* --abbrev=40 --dirty"
    commit = output_of(*describe.split()).replace("-", " ")
    lines = [
        source.decode().removesuffix("\n"),
        rule,
        f"source: {len(source)} bytes, {sha256(source)}",
        f"python: {platform.python_version()}",
        f"pytorch: {torch.__version__}",
        f"cuda: {torch.version.cuda or 'none'}",
        f"triton: {triton.__version__ if triton else 'none'}",
        f"hardware: {hardware_name(world)}",
    ]
    if world.device.type == "cuda":
        lines.append(output_of("nvidia-smi"))
    lines += [
        f"world size: {world.size}",
        f"git: {commit}",
        f"settings: {json.dumps(asdict(settings))}",
    ]
    for part, sizes in files.items():
        for path, tokens in sizes.items():
            checksum = sha256(Path(path).read_bytes())
            lines.append(f"data: {part} {path} {tokens:,} tokens, {checksum}")
    lines.append(f"validation stream: {len(stream):,} tokens, {sha256(stream.tobytes())}")
    lines.append(rule)
    return "\n".join(lines)


def discard(stream: TextIO) -> None:
    """What is printed to stdout or stderr from now on, or waits in it, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Log:
    """The run's record `logs/<run id>.txt`, its lines on the screen, and --wandb's mirror.

    Only rank 0 has them.
    """

    def __init__(
        self, settings: Settings, world: World, files: dict[str, dict[str, int]], stream: np.ndarray
    ):
        name = settings.run_id
        if not name:
            now = time.strftime("%Y%m%d-%H%M%S")
            name = f"{now}-{settings.preset}-{os.urandom(2).hex()}"
        self.path = Path("logs") / f"{name}.txt"
        self.total = settings.total_steps
        self.shows = world.rank == 0  # lines on the screen, as long as it can be written to
        self.terminal = self.shows and sys.stdout.isatty() and sys.stderr.isatty()
        self.file = None
        self.wandb = None
        if world.rank > 0:
            return
        self.open(log_header(settings, world, files, stream))
        if settings.wandb:
            wandb = importlib.import_module("wandb")
            self.wandb = wandb.init(project=settings.wandb, name=name, config=asdict(settings))
        self.line(f"log: {self.path}", file=False)

    def checkpoint(self, step: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_step{step:06}.pt")

    def open(self, header: str) -> None:
        """Begins the file, with its header; UserError if it exists or cannot be written."""
        folder = Path("logs")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is no folder; logs need one of this name here")
        try:
            folder.mkdir(exist_ok=True)
            # A file's name need not be UTF-8.
            self.file = open(self.path, "x", encoding="utf-8", errors="backslashreplace")
            print(header, file=self.file, flush=True)
        except OSError as error:
            if self.file:
                self.path.unlink()  # a log is whole, or not there
            reason = f"{self.path}: cannot be written: {error.strerror}"
            if error.errno in (errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR):
                reason += "; choose another --run-id"
            raise UserError(reason) from None

    def line(self, text: str, file: bool = True, screen: bool = True) -> None:
        """Writes a line into the file, and onto the screen, above the status line."""
        if self.file is None:
            return
        if file:
            try:
                print(text, file=self.file, flush=True)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if not screen or not self.shows:
            return
        try:
            if self.terminal:
                tqdm.write(text)
            else:
                print(text, flush=True)
        except OSError as error:  # a full disk, or nobody reads any more
            self.shows = False
            discard(sys.stdout)
            self.line(f"warning: the screen is gone ({error.strerror}): what follows is only here")

    def loss(self, step: int, kind: str, loss: float, milliseconds: float) -> None:
        """A step's train_loss or val_loss, and the training time; UserError if it is not finite."""
        if not math.isfinite(loss):
            self.line(f"loss is not finite: step {step}")
            raise UserError(f"the loss of step {step} is {loss}; the run was stopped", status=3)
        average = milliseconds / max(step, 1)
        if self.wandb:
            numbers = {kind: loss, "train_time": milliseconds / 1000, "step_avg": average}
            self.wandb.log(numbers, step=step)
        text = (
            f"step:{step}/{self.total} {kind}:{loss:.4f} "
            f"train_time:{milliseconds:.0f}ms step_avg:{average:.2f}ms"
        )
        # On a terminal the status line has the training losses.
        self.line(text, screen=kind == "val_loss" or not self.terminal)


def peak_memory(device: torch.device) -> str:
    """The log's last line. On the CPU both numbers are the process's largest resident set."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB"


# --- Checkpoints.


def save_checkpoint(
    log: Log, settings: Settings, step: int, milliseconds: float, model: GPT, optimizer: Optimizer
) -> None:
    """Writes `logs/<run id>_step000010.pt`, whole or not at all; a full disk ends no run."""
    optimizer_state = optimizer.state_dict()  # on all ranks, since each has a part
    if log.file is None:
        return
    state = {
        "settings": asdict(settings),
        "step": step,
        "train_time_ms": milliseconds,
        "rng": torch.get_rng_state(),
        "model": {name: p.detach().cpu() for name, p in model.named_parameters()},
        "optimizer": optimizer_state,
    }
    # Written beside its place, and renamed when it is whole and on the disk.
    path = log.checkpoint(step)
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        log.line(f"checkpoint: {path}")
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        # PyTorch's writer turns the one into the other.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or error
        log.line(f"checkpoint not written: {path}: {reason}")


def load_checkpoint(path: str) -> dict:
    """What `save_checkpoint` wrote, on the CPU, with `Settings`.

    UserError if it is damaged, or has no settings, step or model.
    """
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # PyTorch does not look at the checksums
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = getattr(error, "strerror", None) or "damaged, or not a checkpoint; use another"
        raise UserError(f"{path}: {reason}") from None
    try:
        if not is_whole(part_of(state, "step", int), 0):
            raise UserError(f"its step is {state['step']}: not a checkpoint of this train_gpt.py")
        weights = {}
        for name, tensor in part_of(state, "model", dict).items():
            # Compiled or distributed models put these before the names.
            weights[re.sub(r"^((module|_orig_mod)\.)+", "", str(name))] = tensor
        if not part_of(weights, "embed", Tensor).is_floating_point():
            raise UserError(f"its embed is of {weights['embed'].dtype}; use another")
        state["model"] = weights
        saved = part_of(state, "settings", dict)
        config = part_of(saved, "model", dict)
        config["layers"] = rows_of(Layer, part_of(config, "layers", list | tuple))
        saved["stages"] = rows_of(Stage, part_of(saved, "stages", list | tuple))
        (saved["extension"],) = rows_of(Stage, [saved.get("extension")])
        saved["model"] = record_of(ModelConfig, config)
        state["settings"] = record_of(Settings, saved)
        check_layers(state["settings"].model.layers)
        check_stages(state["settings"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a tensor where a number belongs, say
        raise UserError(f"{path}: its settings cannot be read: {error}") from None
    return state


def part_of(state: object, name: str, kind: type) -> object:
    """A part of a checkpoint; UserError if it is not there, or something else."""
    part = state.get(name) if isinstance(state, dict) else None
    if not isinstance(part, kind):
        raise UserError(f"has no {name}: not a checkpoint of this train_gpt.py; use another")
    return part


def record_of(kind: type, saved: object) -> object:
    """A `Settings`, or a part of it, from what `asdict` has made of it.

    UserError if it has a field that is unknown here, lacks one, or a value cannot be the field's.
    """
    what = kind.__name__
    if not isinstance(saved, dict):
        raise UserError(f"has no {what}: not a checkpoint of this train_gpt.py; use another")
    known = {f.name: f for f in fields(kind)}
    for name, value in saved.items():
        if name not in known:
            raise UserError(f"its {what} has {name}, which this train_gpt.py has not")
        # An option's value is checked here; tables have checks of their own.
        if "help" in known[name].metadata and value != known[name].default:
            saved[name] = convert(known[name], str(value))
    try:
        return kind(**saved)
    except TypeError:
        missing = [name for name in known if name not in saved]
        raise UserError(f"its {what} lacks {', '.join(missing)}") from None


def rows_of(kind: type, saved: Iterable[object]) -> tuple:
    """A table of a checkpoint, from its rows."""
    return tuple(record_of(kind, row) for row in saved)


def load_weights(model: GPT, weights: dict, path: str) -> None:
    """Copies a checkpoint's weights, by name, into the model; UserError if they are another's."""
    params = dict(model.named_parameters())
    try:
        for name in weights:
            if name not in params:
                raise UserError(f"has a parameter {name}, which this model has not")
        for name, p in params.items():
            p.data.copy_(restored(weights, name, tuple(p.shape), model.table[name]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def identity(settings: Settings) -> dict[str, object]:
    """All that two runs must agree on for one to go on from the other's checkpoint, by name."""
    values = {"preset": settings.preset, "muon": settings.muon, **vars(settings.model)}
    layers = values.pop("layers")
    values["number of layers"] = len(layers)
    for number, layer in enumerate(layers):
        for column, entry in vars(layer).items():
            values[f"{column} of layer {number}"] = entry
    return values


def resume(settings: Settings, model: GPT, optimizer: Optimizer) -> tuple[int, float]:
    """Puts a checkpoint into model and optimizer; returns its step, and its training time in ms.

    UserError if it is another model's, or a part is missing.
    """
    path = settings.resume
    state = load_checkpoint(path)
    step, saved = state["step"], state["settings"]
    theirs, ours = identity(saved), identity(settings)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{path}: another model: its {name} is {theirs.get(name)}, this run's is {value}"
            )
    if step > settings.total_steps:
        raise UserError(f"{path}: step {step} is past the end of {settings.total_steps} steps")
    load_weights(model, state["model"], path)
    dtype = state["model"]["embed"].dtype
    if dtype != model.embed.dtype:
        raise UserError(
            f"{path}: another model: its dtype is {dtype}, this run's is {model.embed.dtype}"
        )
    try:
        optimizer.load_state_dict(part_of(state, "optimizer", dict))
        milliseconds = part_of(state, "train_time_ms", float)
        if not 0 <= milliseconds < math.inf:
            raise UserError(f"its train_time_ms is {milliseconds}; use another")
        torch.set_rng_state(part_of(state, "rng", Tensor))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: its rng cannot be one: {error}") from None
    return step, milliseconds


# --- How a run ends.


def complain(error: UserError) -> None:
    """Prints the line on stderr that says why a run ends."""
    try:
        print(f"train_gpt.py: {error}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        discard(sys.stderr)


def prepare_streams() -> None:
    """Makes stdout and stderr take every character, and be there where the caller closed them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Else the next file that is opened takes the number, and what is printed goes into it.
            os.open(os.devnull, os.O_RDWR)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def catch_signals(caught: list[UserError] | None = None) -> None:
    """SIGINT and SIGTERM end the process at once.

    Where a list is given, the first one is only put there, for the loop to find, which then ends
    the run in good order; a second one ends it at once.
    """

    def stop(signum: int, frame) -> None:
        name = signal.Signals(signum).name
        error = UserError(f"stopped by {name}", status=128 + signum)
        if caught is not None and not caught:
            caught.append(error)
        else:
            # Not an exception: raised inside a compiler or a destructor, it may be swallowed.
            if os.environ.get("RANK", "0") == "0":
                complain(error)
            os._exit(error.status)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


# --- The run.


class Losses:
    """Training losses on their way from the device to the log and the status line.

    A loss is read some steps after it was launched, when it has long arrived, so that no step waits
    for the device. MFU is the share of the FLOP/s that a large matmul reaches on this hardware.
    """

    def __init__(self, settings: Settings, log: Log, bar: tqdm, clock: Clock, peak: float):
        self.log, self.bar, self.clock, self.peak = log, bar, clock, peak
        self.pending = deque()  # step, loss and wishes on their way, and the mark of the step's end
        self.tokens = [0]  # tokens and FLOPs up to each step
        self.flops = [0]
        for stage in settings.all_stages:
            flops = stage.batch_tokens * flops_per_token(settings.model, stage)
            for _ in range(stage.steps):
                self.tokens.append(self.tokens[-1] + stage.batch_tokens)
                self.flops.append(self.flops[-1] + flops)

    def launch(self, step: int, pair: Tensor) -> None:
        """`pair` is a `batch_loss`, of the step that ended with it."""
        self.pending.append((step, pair, mark(self.clock.device)))

    def report(self, late: int) -> bool:
        """Logs the losses of all but the last `late` steps; true if a rank wished to stop."""
        wishes = 0
        while len(self.pending) > late:
            step, pair, end = self.pending.popleft()
            milliseconds = self.clock.at(end)  # waits until the pair is there
            loss, wishes = pair.tolist()
            self.log.loss(step, "train_loss", loss, milliseconds)
            speed = self.tokens[step] / milliseconds * 1000
            mfu = self.flops[step] / milliseconds * 1000 / self.peak
            status = f"loss {loss:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}"
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update()
        return wishes > 0


@dataclass
class Run:
    """What a run is made of once it is set up."""

    settings: Settings
    world: World
    log: Log
    model: GPT
    objective: Callable  # `model`, compiled on CUDA
    optimizer: Optimizer
    plan: list[Batch]
    sequences: Tensor  # of validation
    vocabulary: list[bytes] | None  # see `vocabulary_for`


def train(settings: Settings, world: World) -> None:
    """The whole run: set-up, warm-up, and the loop of steps and validations, with its log."""
    train_paths = find_shards(settings.train_files, settings.preset)
    plan, train_sizes = plan_batches(settings, train_paths)
    stream, val_sizes = validation_stream(settings)
    sequences = validation_sequences(stream, settings.val_seq_len)
    check_apart(train_sizes, val_sizes)
    vocabulary = vocabulary_for(settings)
    how = compile_or_not(settings.compile, world.device)
    model, objective, optimizer = build(settings, world)
    first, milliseconds = 0, 0.0
    if settings.resume:
        first, milliseconds = resume(settings, model, optimizer)
    log = Log(settings, world, {"train": train_sizes, "val": val_sizes}, stream)
    run = Run(settings, world, log, model, objective, optimizer, plan, sequences, vocabulary)
    try:
        where = f"{model.embed.dtype} on {world.device.type}"
        if model.kernels:
            where += ", with the kernels"
        if model.fp8:
            where += " and FP8"
        log.line(f"warm-up: {how} for {where}", file=False)
        begin = time.perf_counter()
        warm_up(settings, model, objective, optimizer, world)
        log.line(f"warm-up took {time.perf_counter() - begin:.0f} s", file=False)
        if settings.resume:
            log.line(f"resumed from {settings.resume} after step {first}")
        # A collection over all that exists by now would stall a step.
        gc.collect()
        gc.freeze()
        bar = tqdm(
            total=settings.total_steps, initial=first, disable=not log.terminal,
            bar_format="{desc}{n}/{total} {bar} {elapsed} + {remaining} left{postfix}",
            dynamic_ncols=True,
        )
        with bar:
            loop(run, bar, first, Clock(world.device, milliseconds))
        log.line(peak_memory(world.device))
        if settings.sample_every and Path("records").is_dir():
            log.line(what_next(log, settings), file=False)
    finally:
        gc.unfreeze()  # what is left at the end would look like a leak to Triton's bindings
        if log.wandb:
            log.wandb.finish()


def what_next(log: Log, settings: Settings) -> str:
    """Commands to go on with, after a run in a checkout of the project."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    lines = ["what next:"]
    checkpoint = log.checkpoint(settings.total_steps)
    if checkpoint.exists():
        lines.append(f'{python} evals/sample.py --checkpoint {checkpoint} --prompt "def "')
    lines += [
        f"{python} records/logbook.py plot {log.path} --out plot.png",
        f"{python} records/logbook.py check train_gpt.py",
    ]
    return "\n    ".join(lines)


def should_validate(settings: Settings, step: int, first: int) -> bool:
    """At the start, at the end, and every `val_every` steps; not again where a run resumes."""
    if step in (0, settings.total_steps):
        return True
    return step > first and step % settings.val_every == 0


def should_save(settings: Settings, step: int, first: int, stopping: bool) -> bool:
    """Every `checkpoint_every` steps; at the end if `checkpoint_last`; with either when stopped."""
    if settings.checkpoint_last and (stopping or step == settings.total_steps):
        return True
    if settings.checkpoint_every == 0 or step == first:
        return False
    return stopping or step % settings.checkpoint_every == 0


def should_sample(settings: Settings, step: int, first: int) -> bool:
    """Every `sample_every` steps, and at the end."""
    if settings.sample_every == 0 or step == first:
        return False
    return step == settings.total_steps or step % settings.sample_every == 0


def sample(run: Run, step: int) -> str:
    """What the model of a step writes when it begins a document, in a frame."""
    bos, stage = run.settings.model.bos_id, schedule(run.settings, step).stage
    rotary = rotary_state(run.settings, step)
    # Uncompiled, since every token makes the sequence longer.
    with torch.compiler.set_stance("force_eager"):
        made = generate(run.model, [bos], stage.windows, rotary, temperature=0.6, top_k=50, seed=1)
        vocabulary = [*run.vocabulary, BOS_TEXT.encode()]
        text = b"".join(vocabulary[token] for token in itertools.islice(made, SAMPLE_TOKENS))
    lines = text.decode(errors="replace").strip("\n")
    return f"--- after step {step} the model writes\n{lines}\n---"


def batches_for(run: Run, first: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """This rank's tokens of every step, made ahead, and what a sparse exchange needs of them."""
    settings, world = run.settings, run.world
    own = settings.slices // world.size
    slices = range(world.rank * own, (world.rank + 1) * own)

    def prepared():
        for tokens in training_batches(run.plan[first:], settings.model, slices):
            rows = []
            if run.optimizer.sparse:
                rows.append(touched_rows(tokens, settings.model))
            if world.device.type == "cuda":
                tokens = tokens.pin_memory()
            yield tokens, rows

    return prefetch(prepared())


def loop(run: Run, bar: tqdm, first: int, clock: Clock) -> None:
    """Steps and validations, from step `first` on. Nothing in a step waits for the device."""
    settings, world, model = run.settings, run.world, run.model
    config, device = settings.model, world.device
    total = settings.total_steps
    peak = measure_peak(device, model.embed.dtype) * world.size
    losses = Losses(settings, run.log, bar, clock, peak)
    late = 8 if device.type == "cuda" else 0  # steps after which a loss has long arrived
    batches = batches_for(run, first)
    hypers = [schedule(settings, step) for step in range(total + 1)]
    mtp = torch.tensor([hyper.mtp for hyper in hypers], device=device)
    prefix_weight = torch.tensor([hyper.prefix for hyper in hypers], device=device)
    signals = []
    stopping = False
    catch_signals(signals)
    clock.start()
    prefix_of = None
    if settings.has_prefixes:  # on the clock, since the model learns from this table
        prefix_of = prefix_table(run.vocabulary, config.vocab_size).to(device)
    # The last round only validates: step `total` itself is not taken.
    for step in range(first, total + 1):
        hyper = hypers[step]
        validates = should_validate(settings, step, first) and not stopping
        samples = should_sample(settings, step, first) and not stopping
        saves = should_save(settings, step, first, stopping)
        # Off the clock: validation, samples, checkpoints, and the end.
        if validates or samples or saves or stopping:
            losses.report(late=0)
            clock.stop()
            if validates:
                bar.set_description_str("validation ")
                rotary = rotary_state(settings, step)
                windows = hyper.stage.windows
                context = make_context(config, settings.val_seq_len, windows, model.embed, rotary)
                loss = validate(model, run.sequences, context, world)
                run.log.loss(step, "val_loss", loss, clock.milliseconds)
            if samples and world.rank == 0:
                run.log.line(sample(run, step), file=False)
            if saves:
                save_checkpoint(run.log, settings, step, clock.milliseconds, model, run.optimizer)
            if stopping:
                run.log.line(f"stopped by a signal after step {step}")
                elsewhere = UserError("stopped by SIGINT or SIGTERM on another rank", status=143)
                raise signals[0] if signals else elsewhere
            bar.set_description_str("")
            bar.unpause()  # what is left is training
            clock.start()
        if step == total:
            break

        # A step. Its context changes with the stage, its weights of next targets each time.
        if step == first or hyper.stage != hypers[step - 1].stage:
            rotary = rotary_state(settings, step)
            length = run.plan[step].length
            step_context = make_context(config, length, hyper.stage.windows, model.embed, rotary)
            step_context = step_context._replace(prefix_of=prefix_of)
        tokens, touched = next(batches)
        run.optimizer.touched += touched
        tokens = tokens.to(device, non_blocking=True)
        context = step_context._replace(mtp=mtp[step], prefix_weight=prefix_weight[step])
        loss = train_step(run.objective, tokens, context, settings.slices)
        run.optimizer.step(hyper)
        losses.launch(step + 1, batch_loss(loss, bool(signals), world))
        stopping = losses.report(late)


# 9. Command line ==================================================================================
# Every scalar of `Settings` and `ModelConfig` is an option; its type, limits, default and help come
# from there. The tables and all numbers are checked before anything is built.


# --- The tables.


def is_whole(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def require(holds: bool, where: str, row: Layer | Stage, column: str, allowed: str) -> None:
    """UserError unless a cell of a table `holds`: it names the row, the column, what is allowed."""
    if not holds:
        raise UserError(f"{where}: {column}={getattr(row, column)!r}: {allowed}")


def check_layers(layers: tuple[Layer, ...]) -> None:
    """UserError for the first row of the network's table that cannot work."""
    if not any(layer.attention for layer in layers):
        raise UserError("the table of layers: at least one layer must have attention")
    tables = {layer.value_embeds for layer in layers if is_whole(layer.value_embeds, 0)}
    mudd_layers = []  # so far
    for number, layer in enumerate(layers):
        where = f"layer {number}"
        earlier = f"must be an earlier layer, from 0 to {number - 1}"
        if number == 0:
            earlier = "must be an earlier layer, and there is none"
        for column in fields(Layer):
            if column.type is bool:
                is_boolean = isinstance(getattr(layer, column.name), bool)
                require(is_boolean, where, layer, column.name, "must be True or False")
        known = layer.window in ("short", "long")
        require(known, where, layer, "window", 'must be "short" or "long"')

        for column in ("skip", "single_input"):
            source = getattr(layer, column)
            if source is not None:
                there = is_whole(source, 0) and source < number
                require(there, where, layer, column, earlier)
        if layer.mudd is not None:
            three = isinstance(layer.mudd, tuple) and len(layer.mudd) == 3
            require(three, where, layer, "mudd", "must be three earlier layers")
            there = all(is_whole(source, 0) and source < number for source in layer.mudd)
            require(there, where, layer, "mudd", f"each {earlier}")
            mudd_layers.append(number)
            alone = len(mudd_layers) == 1
            require(alone, where, layer, "mudd", f"layer {mudd_layers[0]} has it already; one can")
        if layer.value_embeds is not None:
            whole = is_whole(layer.value_embeds, 0)
            require(whole, where, layer, "value_embeds", "must be the number of a table, from 0 on")
            missing = set(range(layer.value_embeds)) - tables
            text = f"tables are numbered without gaps, and no layer has {min(missing, default=0)}"
            require(not missing, where, layer, "value_embeds", text)

        unpaired = not (layer.dc and layer.paired_heads)
        require(unpaired, where, layer, "dc", "the layer's heads must not be paired")
        for column in ("gates", "dc"):
            possible = layers[0].gates or not getattr(layer, column)
            text = "needs a network from the start: layer 0 must have gates=True"
            require(possible, where, layer, column, text)
        if not layer.attention:
            for column in fields(Layer):
                if column.name not in ("attention", "skip", "gates"):
                    empty = getattr(layer, column.name) == column.default
                    text = "is attention's, and the layer has none"
                    require(empty, where, layer, column.name, text)


def check_stages(settings: Settings) -> None:
    """UserError for the first row of the schedule's table that cannot work."""
    next_targets = None  # K, of the first stage
    tied = True  # in the stage before
    for number, stage in enumerate((*settings.stages, settings.extension), 1):
        where = f"stage {number}"
        if stage is settings.extension:
            where = "extension"
        for column in ("steps", "batch_tokens", "max_seq_len"):
            positive = is_whole(getattr(stage, column), 1)
            require(positive, where, stage, column, "must be a whole number, at least 1")
        two = isinstance(stage.windows, tuple) and len(stage.windows) == 2
        two = two and all(is_whole(window, 1) for window in stage.windows)
        require(two, where, stage, "windows", "must be two whole numbers, at least 1")
        positive = isinstance(stage.lr, int | float) and 0 < stage.lr < math.inf
        require(positive, where, stage, "lr", "must be a number above 0")

        pair = isinstance(stage.mtp, tuple) and len(stage.mtp) == 2
        for weights in stage.mtp if pair else ():
            numbers = isinstance(weights, tuple)
            numbers = numbers and all(isinstance(weight, int | float) for weight in weights)
            pair = pair and numbers
        require(pair, where, stage, "mtp", "must be two tuples of weights, at start and end")
        start, end = stage.mtp
        alike = len(start) == len(end) > 0
        require(alike, where, stage, "mtp", "start and end must have as many weights")
        next_targets = next_targets or len(start)
        text = f"must have {next_targets} weights, like stage 1"
        require(len(start) == next_targets, where, stage, "mtp", text)
        first = start[0] > 0 and end[0] > 0
        require(first, where, stage, "mtp", "the first weight, of the next token, must be above 0")
        pair = isinstance(stage.prefix, tuple) and len(stage.prefix) == 2
        pair = pair and all(isinstance(weight, int | float) for weight in stage.prefix)
        pair = pair and all(0 <= weight < math.inf for weight in stage.prefix)
        text = "must be two weights, at start and end, each at least 0"
        require(pair, where, stage, "prefix", text)
        require(isinstance(stage.tied, bool), where, stage, "tied", "must be True or False")
        again = stage.tied and not tied
        require(not again, where, stage, "tied", "an earlier stage has untied embed and lm_head")
        tied = stage.tied


# --- The scalars.


def check_batches(settings: Settings, world_size: int) -> None:
    """UserError unless the slices divide every batch, and the ranks the slices."""
    slices = settings.slices
    batches = sorted({stage.batch_tokens for stage in settings.all_stages})
    common = math.gcd(*batches)
    if common % slices == 0 and slices % world_size == 0:
        return
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    size = min(divisors, key=lambda number: abs(number - world_size))
    possible = [number for number in divisors if number % size == 0]
    nearest = sorted(possible, key=lambda number: abs(number - slices))[:2]
    tokens = ", ".join(f"{batch:,}" for batch in batches)
    raise UserError(
        f"batches of {tokens} tokens, {slices} slices and world size {world_size} do not divide; "
        f"nearest that work with world size {size}: --slices {' or '.join(map(str, nearest))}"
    )


def check_settings(settings: Settings, world_size: int) -> None:
    """UserError unless all that is asked for is possible."""
    config = settings.model
    dim, heads, vocab = config.dim, config.heads, config.padded_vocab
    check_batches(settings, world_size)
    stages = settings.all_stages
    shortest = min(stage.batch_tokens for stage in stages) // settings.slices
    if shortest < len(stages[0].mtp[0]):
        raise UserError(f"--slices {settings.slices} are {shortest} tokens long: too short")
    table_rows = config.bigram_table_rows
    if table_rows < 2 * (config.ngram - 1):
        raise UserError(f"--bigram-rows {config.bigram_rows:g} makes no table; use more")
    if dim % world_size or vocab % world_size or table_rows % world_size:
        raise UserError(
            f"{world_size} processes cannot share --dim {dim}, vocabulary {vocab} and the "
            f"{table_rows} rows of --bigram-rows {config.bigram_rows:g}"
        )
    if dim < 12:  # the gates read twelve channels
        raise UserError(f"--dim {dim} must be at least 12")
    if dim % (4 * heads):
        raise UserError(f"--dim {dim} must be a multiple of {4 * heads}, 4 times --heads {heads}")
    halves = config.layers_with("paired_heads") or config.layers_with("mudd")
    if heads % 2 and (halves or config.head_pairs):
        raise UserError(f"--heads {heads} must be even for --paired-heads, --head-pairs and --mudd")
    if settings.average_steps > settings.total_steps:
        raise UserError(
            f"--average-steps {settings.average_steps} is more than the run's "
            f"{settings.total_steps} steps"
        )
    if settings.average_steps and not settings.muon:
        raise UserError(f"--average-steps {settings.average_steps} is NorMuon's; leave it out")
    if (config.ngram - 1) * config.bigram_dim > dim:
        each = "" if config.ngram == 2 else f" for each of --ngram {config.ngram}"
        raise UserError(f"--bigram-dim {config.bigram_dim}{each} is larger than --dim {dim}")
    tokens, length = settings.val_tokens, settings.val_seq_len
    if tokens % length:
        nearest = max(tokens // length, 1) * length
        raise UserError(
            f"--val-tokens {tokens} is not a multiple of --val-seq-len {length}; "
            f"nearest that works: --val-tokens {nearest}"
        )
    if settings.sample_every and not (config.has_byte_tokens or config.has_gpt2_tokens):
        raise UserError(
            f"--sample-every {settings.sample_every} cannot show tokens that are neither bytes nor "
            "GPT-2's; leave it out"
        )
    if settings.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb needs the package wandb: pip install wandb")


# --- The plan that --dry-run prints.


def estimate_cpu_memory(settings: Settings, model: GPT) -> int:
    """Bytes of a process on the CPU.

    The factors were fitted to runs of `tiny` with 128 to 768 channels, 1 to 8 slices, and
    validation sequences of 16,384 and 65,536 tokens, compiled or not.
    """
    config = settings.model
    item = model.embed.element_size()
    weights = sum(p.numel() for p in model.parameters()) * (2 * item + 20)
    length = max(stage.batch_tokens for stage in settings.all_stages) // settings.slices
    of_layer = (20 + 4 * config.mlp_ratio) * config.dim
    training = length * item * of_layer * len(config.layers)
    # A query of banded attention has a score for each key of two chunks, which are a window each.
    last = schedule(settings, settings.total_steps).stage
    scores = 6 * config.heads * 2 * min(max(last.windows), settings.val_seq_len)
    validation = settings.val_seq_len * (item * 30 * config.dim + scores)
    python = 840 * 2**20  # and PyTorch, its compiler, the shards
    return python + weights + training + validation


def estimate_gpu_memory(settings: Settings, model: GPT, world_size: int) -> int:
    """Bytes of a process on its GPU, roughly.

    Weights, gradients, optimizer state, and the activations of a slice or of a validation sequence.
    """
    config = settings.model
    # NorMuon has a float32 momentum and 2 bytes of lost bits, Adam two float32 averages.
    of_bank = 6
    for extra in (settings.slow_momentum, settings.average_steps):
        if extra > 0:
            of_bank += 4
    weights = state = 0
    for name, p in model.named_parameters():
        weights += 2 * p.numel() * p.element_size()  # with the gradient
        state += p.numel() * (of_bank if model.table[name].kind == "bank" else 8)
    if model.fp8:
        weights += model.w_in8.numel() + model.w_out8.numel()
    length = max(stage.batch_tokens for stage in settings.all_stages) // settings.slices
    item = model.embed.element_size()
    # A layer keeps about 20 D for its backward pass, 8 of them its MLP's; the head its logits,
    # their sigmoid and the gradient.
    of_layer = (12 + 2 * config.mlp_ratio) * config.dim
    training = length * item * (of_layer * len(config.layers) + 3 * config.padded_vocab)
    validation = settings.val_seq_len * item * 12 * config.dim
    validation += VAL_CHUNK * (item + 8) * config.padded_vocab
    return int(weights + state / world_size + max(training, validation))


def print_plan(settings: Settings, world: World) -> None:
    """What --dry-run prints."""
    dtype = choose_dtype(settings, world.device)
    with torch.device("meta"):
        model = GPT(settings.model, dtype, fp8=choose_fp8(settings, world.device, dtype))
    steps = f"{settings.total_steps:,} steps of {settings.slices} slices"
    print(f"preset {settings.preset}: {steps}, {dtype}, on {hardware_name(world)}\n")
    print_layers(settings.model)
    print_parameters(settings, model)
    print_schedule(settings)
    memory = estimate_cpu_memory(settings, model)
    if world.device.type == "cuda":
        memory = estimate_gpu_memory(settings, model, world.size)
    print(f"memory: about {memory >> 20:,} MiB a process")
    peak = measure_peak(world.device, dtype) * world.size
    fastest = total_flops(settings) / peak
    print(
        f"time: {fastest:,.0f} s at an MFU of 100 % of the {peak / 1e12:.3g} TFLOP/s that a large "
        f"matmul reaches here, {fastest / 0.45:,.0f} s at 45 %"
    )


def print_layers(config: ModelConfig) -> None:
    """The network's table, as it is built."""
    names = [column.name for column in fields(Layer)]
    print("layer  " + "  ".join(names))
    for number, row in enumerate(config.rows):
        cells = []
        for name in names:
            entry = getattr(row, name)
            text = str(entry)
            if entry is None or entry is False:
                text = "-"
            elif entry is True:
                text = "yes"
            cells.append(text.strip("()").rjust(len(name)))
        print(f"{number:>5}  " + "  ".join(cells))
    print()


def print_parameters(settings: Settings, model: GPT) -> None:
    """The table of parameters, with their optimizers; and the sizes of the matrices."""
    columns = "{:16}{:>15}{:>14}  {:28}{:9}{:>6}{:>6}  {}"
    print(
        columns.format("parameter", "shape", "count", "init", "optimizer", "lr x", "wd x", "betas")
    )
    sizes = {}
    for name, p in model.named_parameters():
        row = model.table[name]
        sizes[name] = p.numel()
        optimizer = "Adam", row.lr, row.wd, row.betas
        if settings.muon and row.kind == "bank":
            optimizer = "NorMuon", 1, 1, (settings.momentum, settings.muon_beta2)
        shape = " x ".join(map(str, p.shape))
        print(columns.format(name, shape, f"{p.numel():,}", row.init.text, *map(str, optimizer)))
    print(f"{'total':31}{sum(sizes.values()):>14,}")
    head, in_mlps = sizes["lm_head"] / 1e6, sizes["mlp_bank"] / 1e6
    in_attention = sum(sizes.get(name, 0) for name in (*qk_banks(settings.model), "vo_bank")) / 1e6
    print(
        f"active matrix parameters: {head + in_mlps + in_attention:.1f}M "
        f"(head {head:.1f}M, MLP {in_mlps:.1f}M, attention {in_attention:.1f}M)\n"
    )


def total_flops(settings: Settings) -> int:
    """FLOPs of all training steps."""
    total = 0
    for stage in settings.all_stages:
        total += stage.steps * stage.batch_tokens * flops_per_token(settings.model, stage)
    return total


def print_schedule(settings: Settings) -> None:
    """The schedule's table, and what it adds up to."""
    stages = settings.all_stages
    print("stage      steps     batch  max_seq_len     windows")
    for number, stage in enumerate(stages, 1):
        name = "extension" if number == len(stages) else str(number)
        short, long = stage.windows
        print(
            f"{name:<10}{stage.steps:>6}{stage.batch_tokens:>10,}{stage.max_seq_len:>13,}"
            f"{f'{short}, {long}':>12}"
        )
    tokens = sum(stage.steps * stage.batch_tokens for stage in stages)
    flops = total_flops(settings)
    val_tokens = settings.val_tokens
    print(f"training tokens: {tokens / 1e6:.1f}M; validation tokens: {val_tokens / 1e6:.1f}M")
    print(f"FLOPs: {flops / tokens / 1e9:.2f} GFLOP a token, {flops / 1e15:.3g} PFLOP in all")


# --- The options.


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")

    def exit(self, status: int = 0, message: str | None = None):
        sys.stdout.flush()  # after --help: here it is noticed if nobody reads
        super().exit(status, message)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f: Field) -> type:
    """The type of an option's value: of `int | None`, int."""
    choices = typing.get_args(f.type)
    return choices[0] if choices else f.type


def convert(f: Field, text: str) -> object:
    """An option's text as a value of the field; UserError if it cannot be one."""
    kind = kind_of(f)
    low = f.metadata.get("low", -math.inf)
    high = f.metadata.get("high", 2**31 - 1 if kind is int else math.inf)
    with contextlib.suppress(KeyError, ValueError):
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is str and text in f.metadata.get("choices", [text]):
            return value
        if kind is not str and low <= value <= high:
            return value
    wanted = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
    if kind is str:
        wanted = "one of " + ", ".join(f.metadata["choices"])
    if math.isfinite(low):
        wanted += f", at least {low}"
    if math.isfinite(high):
        wanted += f", at most {high}"
    raise UserError(f"{option(f.name)} {text}: must be {wanted}")


def add_options(parser: Parser, holder: Settings | ModelConfig, title: str) -> None:
    """An option for every scalar of the settings or of the model."""
    group = parser.add_argument_group(title)
    for f in fields(holder):
        if "help" not in f.metadata:  # a table
            continue
        default = getattr(holder, f.name)
        text = f.metadata["help"]
        if default not in (None, ""):
            text += " (default: %(default)s)"
        how = {"metavar": kind_of(f).__name__.upper()}
        if kind_of(f) is bool:
            how |= {"nargs": "?", "const": True}  # `--compile` alone is true
        elif "choices" in f.metadata:
            how = {"choices": f.metadata["choices"]}
        group.add_argument(
            option(f.name), type=functools.partial(convert, f), default=default, help=text, **how
        )


def parse_arguments(arguments: list[str]) -> tuple[Settings, bool]:
    """The settings that the command line asks for, and whether it is a --dry-run."""
    # A run that goes on has the settings of the one before, unless the command line says otherwise.
    going_on = Parser(add_help=False, allow_abbrev=False)
    going_on.add_argument("--resume", default="")
    checkpoint = going_on.parse_known_args(arguments)[0].resume
    saved = load_checkpoint(checkpoint)["settings"] if checkpoint else PRESETS["record"]
    # The preset comes first, since it has the defaults of all other options.
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--preset", choices=PRESETS, default=saved.preset, help="the experiment (default: record)"
    )
    first.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop")
    known, _ = first.parse_known_args(arguments)
    preset = PRESETS[known.preset]
    goes_on = bool(checkpoint) and saved.preset == preset.preset
    if goes_on:
        # But for the tables, which are the script's, and what counts steps with them.
        own = {name: getattr(preset, name) for name in ("stages", "extension", *COUNT_STEPS)}
        model = replace(saved.model, layers=preset.model.layers)
        preset = replace(saved, model=model, run_id="", resume="", **own)

    parser = Parser(
        usage="train_gpt.py [--preset PRESET] [--dry-run] [--OPTION VALUE ...]",
        description=__doc__.split("\n\n")[0], allow_abbrev=False, parents=[first],
    )
    add_options(parser, preset, f"run (defaults of {preset.preset})")
    add_options(parser, preset.model, f"model (defaults of {preset.preset})")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        if os.path.exists(name):  # what a shell makes of a pattern
            raise UserError(f"unexpected {name}: quote a pattern of files, as in 'data/x_*.bin'")
        options = [option(each) for each in vars(parsed)]
        closest = difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown option {unknown[0]}; the closest that exists is {closest} (--help lists all)"
        )

    of_model = [f.name for f in fields(ModelConfig)]
    run_changes, model_changes = {}, {}
    for name, value in vars(parsed).items():
        if value == []:  # argparse makes it of `--seed=--`
            raise UserError(f"{option(name)} needs a value")
        if name in of_model:
            model_changes[name] = value
        elif name != "dry_run":
            run_changes[name] = value
    model = replace(preset.model, **model_changes)
    settings = replace(preset, model=model, **run_changes)
    check_layers(model.layers)
    check_stages(settings)
    if settings.steps is not None:
        settings = with_steps(settings, settings.steps)
    if goes_on and settings.steps == saved.steps:
        for name in COUNT_STEPS:  # in the checkpoint they have been resized
            if getattr(parsed, name) == getattr(preset, name):
                settings = replace(settings, **{name: getattr(saved, name)})
    return settings, parsed.dry_run


def main(arguments: list[str]) -> int:
    """Runs the command line.

    Exit status: 0 done, 2 a user's mistake, 3 the loss is not finite, 128 + the signal.
    """
    catch_signals()
    rank = 0
    try:
        rank, _ = find_rank()
        settings, dry_run = parse_arguments(arguments)
        world = find_world()
        check_settings(settings, world.size)
        if not dry_run:
            train(settings, world)
        elif world.rank == 0:
            print_plan(settings, world)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # of --help or --dry-run: `head`, say, has enough
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if rank != 0:
            # torchrun ends a node's ranks with the first one that fails. What all have met rank 0
            # says, which needs time for it; on other nodes, or where it has not, the next one.
            catch_signals()
            time.sleep(10 + rank % 8)
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # On the CPU PyTorch says so in a RuntimeError.
        if out_of_memory or "DefaultCPUAllocator" in str(error):
            slices = settings.slices
            error = UserError(
                f"out of memory with {slices} slices; try --slices {2 * slices}, a smaller model, "
                f"or --val-seq-len {settings.val_seq_len // 2} if it was the validation"
            )
        if isinstance(error, OSError):
            if error.filename is None:
                discard(sys.stdout)  # of --help or --dry-run, on a full disk
            error = UserError(f"{error.filename or 'the output'}: {error.strerror}")
        if not isinstance(error, UserError):
            raise
        if rank == 0:
            complain(error)
        elif error.status < 128:  # no signal
            complain(UserError(f"rank {rank}: {error}"))
        return error.status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main(sys.argv[1:]))
