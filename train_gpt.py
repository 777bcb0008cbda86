"""Train a GPT-2-class language model to 3.28 validation loss on FineWeb, as fast as the hardware allows.

One file holds the whole experiment, to be read from top to bottom: settings, kernels, numerics, attention, model,
optimizer, data, training, command line. `./run.sh` runs it on every GPU it finds, or on the CPU with a small model;
`python train_gpt.py --help` lists the options. Numbers in [brackets] name the record of the public leaderboard
(modded-nanogpt) that introduced an idea. Importing this file has no side effects.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import gc
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

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
except ImportError:  # macOS, or a CPU without it
    triton = constexpr = None
jit = triton.jit if triton else lambda kernel: kernel

# 1. Settings ==========================================================================================================
# The experiment is two tables, a row a layer (RECORD_LAYERS) and a row a stage (PRESETS), and the scalars above them.
# An attempt at a record is mostly an edit there. Every scalar is also an option: `--seed 7`, `--muon-lr 0.02`.


def setting(default, help: str, **limits):
    """A field that the command line can set; `limits` are `low`, `high` and `choices`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Layer:
    """One row of the network's table: what a layer has besides its MLP. A layer is named by its row's number."""

    attention: bool = True  # else only the MLP
    window: str = "short"  # which of the stage's two windows; a "long" one has the partial key offset [49]
    paired_heads: bool = False  # two heads interleaved into one [58]
    value_embeds: int | None = None  # the table of value embeddings that is mixed into v [14]
    xsa: bool = False  # exclusive self attention: the output loses a part of its token's own value [82]
    single_input: int | None = None  # attention reads the stream as it was after that layer [77]
    skip: int | None = None  # first adds the stream as it was after that layer, through the one gate [55]
    mudd: tuple[int, int, int] | None = None  # earlier ones, mixed in by token: the first here, all after the last [81]


@dataclass(frozen=True)
class Stage:
    """One row of the schedule's table."""

    steps: int
    batch_tokens: int
    max_seq_len: int  # documents are cut to this many tokens
    windows: tuple[int, int]  # short and long attention window, tokens
    lr: float  # multiplies every learning rate; the cooldown fades it out
    mtp: tuple[tuple[float, ...], tuple[float, ...]]  # weights of the next K targets, at first and last; one K for all
    tied: bool = False  # embed is the transpose of lm_head, up to the first stage without [51]


@dataclass(frozen=True)
class ModelConfig:
    layers: tuple[Layer, ...]
    vocab_size: int = setting(50257, "tokens of the vocabulary (padded to a multiple of 128 inside)", low=1)
    bos_id: int = setting(50256, "the token that begins every document", low=0, high=65535)
    dim: int = setting(768, "width of the stream", low=1)
    heads: int = setting(6, "attention heads", low=1)
    attention_scale: float = setting(0.1, "factor of the attention logits")
    bigram_rows: int = setting(15, "rows of the bigram table, as a multiple of the padded vocabulary", low=1)
    bigram_dim: int = setting(192, "channels of the stream that the bigram embedding is added to", low=1)
    smear: bool = setting(True, "a token's embedding takes up some of the one before [34]")
    bigram: bool = setting(True, "bigram hash embedding with the sign trick [62, 83]")
    value_embeds: bool = setting(True, "value embeddings [14]")
    paired_heads: bool = setting(True, "paired heads [58]")
    key_offset: bool = setting(True, "partial key offset in the layers with a long window [49]")
    xsa: bool = setting(True, "learnable exclusive self attention [82]")
    attention_gate: bool = setting(True, "sparse attention gate [28]")
    single_input: bool = setting(True, "one activation as the input of the last attention layers [77]")
    skip: bool = setting(True, "gated skip connection [55]")
    mudd: bool = setting(True, "MUDD connections [81]")
    head_pairs: bool = setting(True, "orthogonalize Q and K two heads at a time, not whole [80]")

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def rows(self) -> tuple[Layer, ...]:
        """The table as it is built: without the columns whose switch, of the same name, is off."""
        off = {column.name: column.default for column in fields(Layer) if not getattr(self, column.name, True)}
        return tuple(replace(layer, **off) for layer in self.layers)

    def layers_with(self, column: str) -> tuple[int, ...]:
        """The layers whose row has something in this column."""
        nothing = getattr(Layer(attention=False), column)
        return tuple(i for i, row in enumerate(self.rows) if getattr(row, column) != nothing)


@dataclass(frozen=True)
class Settings:
    preset: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    extension: Stage  # more steps at the final learning rate
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "pattern of the training shards")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "pattern of the validation shards")
    val_tokens: int = setting(10_485_760, "tokens to validate on, from the start of the stream", low=1)
    val_seq_len: int = setting(262_144, "tokens of one validation sequence", low=1)
    val_every: int = setting(250, "steps between validations (there is always one at the end)", low=1)
    val_short_window: int = setting(768, "short window of the final validation [33, 35]", low=1)
    val_long_window: int = setting(2560, "long window of the final validation [33, 35]", low=1)
    steps: int | None = setting(None, "steps in all; the stages shrink or grow in proportion", low=1)
    yarn: bool = setting(True, "stretch the rotary embedding when the long window grows (YaRN) [31]")
    multi_token: bool = setting(True, "multi-token prediction in training [53]")
    length_schedule: bool = setting(True, "shorter documents in the first stages [72]")
    extension_windows: bool = setting(True, "wider windows in the extension")
    long_validation: bool = setting(True, "longer windows in the final validation [33, 35]")
    epochs: int = setting(1, "times to go over the training shards", low=1)
    slices: int = setting(8, "packed sequences that a batch is cut into; more slices need less memory", low=1)
    seed: int = setting(1, "seed of the initial weights", low=0, high=2**63 - 1)
    dtype: str = setting("auto", "auto: bfloat16 where the hardware has it", choices=("auto", "bfloat16", "float32"))
    fp8: bool = setting(True, "8-bit floats in the head and MLP of training, where the GPU has them [19, 84]")
    compile: bool = setting(True, "compile with torch.compile")
    sparse_exchange: bool = setting(True, "ranks exchange only the touched rows of the bigram gradient")
    muon: bool = setting(True, "NorMuon for the matrices, rather than Adam")
    muon_lr: float = setting(0.023, "learning rate of NorMuon")
    muon_wd: float = setting(1.2, "weight decay of NorMuon, multiplied by its learning rate")
    muon_beta2: float = setting(0.9, "decay of NorMuon's mean squares")
    momentum: float = setting(0.95, "momentum of NorMuon; it starts and ends 0.1 lower")
    momentum_warmup: int = setting(300, "steps over which the momentum rises", low=1)
    momentum_cooldown: int = setting(50, "last steps, over which the momentum falls", low=1)
    adam_lr: float = setting(0.008, "learning rate of Adam")
    adam_wd: float = setting(0.005, "weight decay of Adam, multiplied by its learning rate")
    cooldown: float = setting(0.6, "last part of the steps, in which the learning rate falls", low=0.001, high=1)
    final_lr: float = setting(0.15, "learning rate at the end, as a part of adam_lr and muon_lr")
    run_id: str = setting("", "name of the log (default: made from the date)")
    checkpoint_every: int = setting(0, "steps between checkpoints, 0 for none", low=0)
    checkpoint_last: bool = setting(False, "write a checkpoint at the end")
    resume: str = setting("", "checkpoint to go on from")
    wandb: str = setting("", "project of Weights & Biases that gets the log's numbers")

    @functools.cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        """The schedule's table as it is run: without what the switched-off techniques leave out."""
        off = {} if self.length_schedule else {"max_seq_len": self.extension.max_seq_len}
        off |= {} if self.multi_token else {"mtp": ((1,), (1,))}
        last = self.extension if self.extension_windows else replace(self.extension, windows=self.stages[-1].windows)
        return tuple(replace(stage, **off) for stage in (*self.stages, last))

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.all_stages)

    def begun(self, step: int) -> list[tuple[Stage, int]]:
        """The stages that have begun by a step, each with its first step; the last of them is the step's own."""
        firsts = itertools.accumulate((stage.steps for stage in self.all_stages), initial=0)
        return [(stage, first) for stage, first in zip(self.all_stages, firsts) if first <= step]


RECORD_LAYERS = (
    Layer(paired_heads=True),
    Layer(value_embeds=0, xsa=True),
    Layer(paired_heads=True, value_embeds=1),
    Layer(window="long", xsa=True),
    Layer(xsa=True),
    Layer(paired_heads=True),
    Layer(attention=False, skip=3),
    Layer(xsa=True),
    Layer(value_embeds=2, xsa=True, single_input=7),
    Layer(paired_heads=True, value_embeds=3, single_input=7),
    Layer(window="long", value_embeds=4, xsa=True, single_input=7, mudd=(7, 9, 3)),
)
TINY_LAYERS = (
    Layer(paired_heads=True, value_embeds=0),
    Layer(window="long", xsa=True),
    Layer(attention=False, skip=0),
    Layer(value_embeds=1, xsa=True),
    Layer(window="long", value_embeds=2, xsa=True, single_input=3, mudd=(3, 2, 1)),
)

PRESETS = {
    "record": Settings(
        preset="record",
        model=ModelConfig(RECORD_LAYERS),
        stages=(
            Stage(460, 131_072, 896, windows=(128, 384), lr=1.0, mtp=((1, 0.5, 0.25), (1, 0.5, 0)), tied=True),
            Stage(460, 262_144, 2048, windows=(384, 896), lr=1.52, mtp=((1, 0.5, 0), (1, 0, 0)), tied=True),
            Stage(460, 393_216, 2048, windows=(640, 1408), lr=1.73, mtp=((1, 0, 0), (1, 0, 0))),
        ),
        extension=Stage(10, 393_216, 2048, windows=(768, 1664), lr=1.73, mtp=((1, 0, 0), (1, 0, 0))),
    ),
    "tiny": Settings(
        preset="tiny",
        model=ModelConfig(TINY_LAYERS, vocab_size=257, bos_id=256, dim=256, heads=4, bigram_dim=64),
        stages=(
            Stage(120, 8192, 512, windows=(64, 128), lr=1.0, mtp=((1, 0.5, 0.25), (1, 0.5, 0)), tied=True),
            Stage(120, 8192, 1024, windows=(64, 128), lr=1.0, mtp=((1, 0.5, 0), (1, 0, 0)), tied=True),
            Stage(120, 8192, 1024, windows=(64, 256), lr=1.0, mtp=((1, 0, 0), (1, 0, 0))),
        ),
        extension=Stage(10, 8192, 1024, windows=(64, 256), lr=1.0, mtp=((1, 0, 0), (1, 0, 0))),
        train_files="data/sympy/sympy_train_*.bin",
        val_files="data/sympy/sympy_val_*.bin",
        val_tokens=524_288,
        val_seq_len=16_384,
        val_every=125,
        val_short_window=64,
        val_long_window=256,
        slices=4,
        momentum_warmup=60,
        momentum_cooldown=15,
    ),
}

FETCH = {"record": "python data/cached_fineweb10B.py 9", "tiny": "python data/embedded.py"}  # gets a preset's shards

# One row of the table of parameters. Each rank updates a part of the kinds "bank" and "table", and all of a "gate" or a
# "scalar" (always float32). The shape is something false for what the model does without; the start a constant, or what
# `GPT` makes of it. Betas, lr and wd (factors of `adam_lr` and `adam_wd`) are Adam's, a bank's for `--muon false`.
ParameterRow = collections.namedtuple("ParameterRow", "kind shape start betas lr wd")

# MUDD's coefficients at first. Before its layer: three added to v, three to the stream, two value gates, and the six of
# a layer's `mix`. After the last layer: one for each of five earlier streams; -0.5 is the "backout" [40].
MUDD_STARTS = (0, 0, 0, 0, 0, 0, 2, 2, 1.1**0.5, 1, 0, 0.05, 1.1**0.5, 1), (0, -0.5, 0, 0, 0)


def parameter_table(config: ModelConfig) -> dict[str, ParameterRow]:
    """The model's parameters, in the order in which they are drawn, and in which ranks exchange those of a kind."""
    attending, valued, xsa, skip, mudd = map(config.layers_with, ("attention", "value_embeds", "xsa", "skip", "mudd"))
    dim, heads, vocab = config.dim, config.heads, config.padded_vocab
    layers, n, mixed = len(config.layers), len(attending), sum(map(len, MUDD_STARTS))
    together = 2 if config.head_pairs else heads  # adjacent heads of Q or of K in a matrix: Q01, Q23, …, K01, K23, …
    qk = (n * 2 * heads // together, together * dim // heads, dim)
    bigram = config.bigram and (config.bigram_rows * vocab, config.bigram_dim)
    values = valued and ((1 + max(config.layers[i].value_embeds for i in valued)) * vocab, dim)
    gated = len(set(valued) - set(mudd))  # MUDD makes its own gates
    rows = {
        "bigram_table": ("table", bigram, 0, (0.75, 0.95), 75, 5),
        "lm_head": ("table", (dim, vocab), "normal 0.005", (0.5, 0.95), 1, 150),
        "embed": ("table", (vocab, dim), "lm_head^T", (0.5, 0.95), 1, 150),
        "qk_bank": ("bank", qk, "uniform 0.5/sqrt(D)", (0.9, 0.95), 0.125, 10),
        "vo_bank": ("bank", (n * 2, dim, dim), "uniform 0.5/sqrt(D)", (0.9, 0.95), 0.125, 10),  # a layer's V, O
        # A layer's in and out, the latter transposed.
        "mlp_bank": ("bank", (layers * 2, 4 * dim, dim), "uniform 0.5/sqrt(D), out 0", (0.9, 0.95), 0.125, 10),
        "value_embeds": ("table", values, "normal 0.01", (0.75, 0.95), 75, 5),
        "resid_lambdas": ("scalar", (layers, 2), 1.1**0.5, (0.9, 0.95), 5, 0),  # a layer makes 1.1 of the stream [45]
        "post_lambdas": ("scalar", (layers, 2), 1, (0.9, 0.95), 1, 0),  # after attention, after the MLP
        "x0_lambdas": ("scalar", (layers,), 0, (0.9, 0.95), 1, 0),
        "bigram_lambdas": ("scalar", config.bigram and (layers,), 0.05, (0.9, 0.95), 1, 0),
        "xsa_alphas": ("scalar", xsa and (len(xsa), heads), 0, (0.9, 0.95), 1, 0),
        "qkv_lambdas": ("scalar", (n,), 0.5, (0.9, 0.99), 5, 0),
        "out_lambdas": ("scalar", (n,), 1, (0.9, 0.99), 5, 0),
        "smear_lambda": ("scalar", config.smear and (1,), 0, (0.9, 0.99), 5, 0),
        "skip_lambda": ("scalar", skip and (1,), -1.5, (0.9, 0.99), 5, 0),
        "smear_gate": ("gate", config.smear and (12,), 0, (0.9, 0.99), 0.01, 0),
        "skip_gate": ("gate", skip and (12,), 0, (0.9, 0.99), 0.05, 0),
        "attention_gates": ("gate", config.attention_gate and (n, heads, 12), 0, (0.9, 0.99), 1, 1),
        "value_gates": ("gate", gated and (gated, heads, 12), 0, (0.9, 0.99), 1, 1),
        "mudd_w1": ("gate", mudd and (2, 64, dim), "kaiming", (0.9, 0.99), 0.25, 1),
        "mudd_w2": ("gate", mudd and (mixed, 64), 0, (0.9, 0.99), 0.25, 1),
        "mudd_bias": ("scalar", mudd and (mixed,), "effective values / 0.1", (0.9, 0.99), 0.25, 0),
    }
    return {name: ParameterRow(*row) for name, row in rows.items()}


class UserError(Exception):
    """Ends the run, with an exit status: its text says what is wrong and what to do, and is all that is printed."""

    def __init__(self, text: str, status: int = 2):
        super().__init__(text)
        self.status = status


# What the schedule says about one step: its row of the table, the factor of both learning rates, NorMuon's momentum,
# whether Adam runs (on odd steps, on the gradients of two steps [39]), and the weights of the next targets.
Hyper = collections.namedtuple("Hyper", "stage lr momentum adam mtp")


def schedule(settings: Settings, step: int) -> Hyper:
    """The schedule at `step` (from 0): constant, then linearly falling learning rate; momentum up, then down."""
    stage, first = settings.begun(step)[-1]
    if step == settings.total_steps and settings.long_validation:  # after the last one
        stage = replace(stage, windows=(settings.val_short_window, settings.val_long_window))
    scheduled = settings.total_steps - settings.extension.steps
    constant = scheduled * (1 - settings.cooldown)
    t = min(max((step - constant) / (scheduled - constant), 0.0), 1.0)
    warm = min(step / settings.momentum_warmup, 1.0)
    cool = max((step - (settings.total_steps - settings.momentum_cooldown)) / settings.momentum_cooldown, 0.0)
    momentum = settings.momentum - 0.1 * (1 - warm) - 0.1 * cool
    mtp = tuple(a + (b - a) * (step - first) / stage.steps for a, b in zip(*stage.mtp))
    return Hyper(stage, lr=(1 - t) * stage.lr + t * settings.final_lr, momentum=momentum, adam=step % 2 == 1, mtp=mtp)


def with_steps(settings: Settings, steps: int) -> Settings:
    """`settings` with its stages, and the momentum's, shrunk or grown in proportion to `steps` in all."""
    if steps < len(settings.all_stages):
        raise UserError(f"--steps {steps}: a run has at least one step a stage, {len(settings.all_stages)} in all")
    factor = steps / settings.total_steps
    ends = np.cumsum([stage.steps for stage in settings.all_stages]) * factor
    # The stages still to come keep a step each, which a short extension would otherwise lose.
    ends = [max(i + 1, min(round(end), steps - (len(ends) - 1 - i))) for i, end in enumerate(ends)]
    stages = [replace(stage, steps=int(n)) for stage, n in zip(settings.all_stages, np.diff([0, *ends]))]
    momentum = {key: max(round(getattr(settings, key) * factor), 1) for key in ("momentum_warmup", "momentum_cooldown")}
    return replace(settings, steps=steps, stages=tuple(stages[:-1]), extension=stages[-1], **momentum)


# 2. Kernels ===========================================================================================================
# What PyTorch has no fast expression for, in Triton: each kernel and what launches it. On the CPU and in float32 plain
# PyTorch runs instead: `token_losses` for the loss, a line of `add_mlp`. Kernels compute in float32 and round once.

# How products are cut: a block's side (the MLP's: rows, columns), inner step (in bf16; FP8 has twice that), pipeline
# stages, warps. Shared memory must hold the stages: 163 KB on compute capability 8.0, 227 KB on 9.0, 99 KB on consumer
# cards (8.6, 8.9, 12.0). The MLP's go by the capability they begin with: 9 is the first with tensor descriptors (TMA).
SYMMETRIC_TILES = 128, 64, 4, 8
MLP_TILES = {12: (128, 128, 64, 3, 8), 9: (128, 256, 64, 4, 8)}


def has_kernels(x: Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype != torch.float32


@jit
def symmetric_kernel(a, out, n, k, stride_batch, stride_row, stride_k, alpha, beta, SIZE: constexpr, INNER: constexpr):
    """A block of out (n, n) = alpha A A^T + beta A, and its mirror image: A (n, k) of any strides."""
    across = tl.cdiv(n, SIZE)
    i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, across, across, 8)
    if i > j:
        return  # below the diagonal: another block's mirror image, which halves the work
    batch = tl.program_id(1).to(tl.int64)
    a += batch * stride_batch
    out += batch * n * n
    rows, columns = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, k, INNER):
        inner = start + tl.arange(0, INNER)
        left = tl.load(a + (rows[:, None] * stride_row + inner * stride_k), (rows[:, None] < n) & (inner < k), 0)
        right = tl.load(a + (columns * stride_row + inner[:, None] * stride_k), (columns < n) & (inner[:, None] < k), 0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= alpha
    upper = (rows[:, None] <= columns) & (columns < n)
    if beta is not None:
        total += beta * tl.load(a + rows[:, None] * stride_row + columns * stride_k, upper, 0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * n + columns, total, upper)
    tl.store(out + columns * n + rows[:, None], total, upper)


@library.custom_op("train_gpt::symmetric_product", mutates_args=())
def symmetric_product(a: Tensor, alpha: float = 1, beta: float | None = None) -> Tensor:
    """alpha A A^T for each matrix of a (n, rows, cols); with `beta`, for symmetric ones, alpha A A^T + beta A."""
    if not has_kernels(a):
        return alpha * (a @ a.mT) if beta is None else torch.baddbmm(a, a, a.mT, beta=beta, alpha=alpha)
    count, n, k = a.shape
    out = a.new_empty(count, n, n)
    *block, stages, warps = SYMMETRIC_TILES
    grid = triton.cdiv(n, block[0]) ** 2, count
    symmetric_kernel[grid](a, out, n, k, *a.stride(), alpha, beta, *block, num_stages=stages, num_warps=warps)
    return out


symmetric_product.register_fake(lambda a, alpha=1, beta=None: a.new_empty(a.size(0), a.size(1), a.size(1)))


@jit
def mlp_kernel(a, b, scale_a, scale_b, post, out, n, m, k, ROWS: constexpr, COLUMNS: constexpr, INNER: constexpr):
    """Blocks of relu(A B^T)^2, or with `post` of 2 (A B^T) sqrt(post): tensor descriptors of A (n, k) and B (m, k)."""
    down, across = tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS)
    for block in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):  # a program a multiprocessor
        i, j = tl.swizzle2d(block // across, block % across, down, across, 8)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, k, INNER):
            total = tl.dot(a.load([i * ROWS, start]), b.load([j * COLUMNS, start]).T, total)
        if scale_a is not None:
            total *= tl.load(scale_a) * tl.load(scale_b)
        halves = tl.split(total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        for h in tl.static_range(2):  # a half at a time, to leave shared memory to the pipeline
            place = [i * ROWS, j * COLUMNS + h * (COLUMNS // 2)]
            half = tl.maximum(halves[h], 0) if post is None else 2 * halves[h]
            half *= half if post is None else tl.sqrt(post.load(place).to(tl.float32))
            out.store(place, half.to(out.dtype))


@library.custom_op("train_gpt::mlp", mutates_args=())
def mlp_op(a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, post: Tensor | None) -> Tensor:
    """relu(scale_a A scale_b B^T)^2, or with `post` 2 (A B^T) sqrt(post), in bf16: a (n, k) and b (m, k) to (n, m)."""
    gpu = torch.cuda.get_device_properties(a.device)
    tiles = next((tiles for least, tiles in MLP_TILES.items() if gpu.major >= least), None)
    if tiles is None or a.size(1) % 16 or b.size(0) % 16:  # without TMA
        product = a @ b.T if scale_a is None else scaled_mm(a, b, scale_a, scale_b)
        return F.relu(product).square() if post is None else 2 * product * post.sqrt()
    out = a.new_empty(a.size(0), b.size(0), dtype=torch.bfloat16)
    rows, columns, inner, stages, warps = tiles
    inner = inner if scale_a is None else 2 * inner
    describe, half = TensorDescriptor.from_tensor, [rows, columns // 2]
    inputs = describe(a.contiguous(), [rows, inner]), describe(b.contiguous(), [columns, inner]), scale_a, scale_b
    outputs = None if post is None else describe(post.contiguous(), half), describe(out, half)
    grid, sizes = (gpu.multi_processor_count,), (*out.shape, a.size(1), rows, columns, inner)
    mlp_kernel[grid](*inputs, *outputs, *sizes, num_stages=stages - (post is not None), num_warps=warps)
    return out


mlp_op.register_fake(lambda a, b, *others: a.new_empty(a.size(0), b.size(0), dtype=torch.bfloat16))


@jit
def cap_sigmoid(logits):
    """sigmoid((logits + 5) / 7.5) in float32, rounded to the logits' type."""
    return tl.sigmoid((logits.to(tl.float32) + 5) / 7.5).to(logits.dtype).to(tl.float32)


@jit
def loss_kernel(logits, targets, weights, losses, grads, tokens, vocab, scale, NEXT: constexpr, BLOCK: constexpr):
    """A row's loss, and the gradient of the sum of losses by its logits, divided by `scale`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    grads += row * vocab
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = cap_sigmoid(tl.load(logits + columns, columns < vocab, 0))
        sums += tl.where(columns < vocab, tl.exp(23 * s), 0)  # at most exp(23): it needs no maximum
    total = tl.sum(sums)
    weight_sum, loss = 0.0, 0.0
    for k in tl.static_range(NEXT):
        there = row + k < tokens
        weight = tl.load(weights + k)
        weight_sum += weight
        target = tl.load(targets + row + k, there, 0)
        loss -= tl.where(there, weight * 23 * cap_sigmoid(tl.load(logits + target)), 0)
    tl.store(losses + row, loss + weight_sum * tl.log(total))
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = cap_sigmoid(tl.load(logits + columns, columns < vocab, 0))
        grad = weight_sum * (tl.exp(23 * s) / total)
        for k in tl.static_range(NEXT):
            target = tl.load(targets + row + k, row + k < tokens, -1)
            grad -= tl.where(columns == target, tl.load(weights + k), 0)
        grad *= 23 / 7.5 * s * (1 - s) / scale
        tl.store(grads + columns, grad.to(grads.dtype.element_ty), columns < vocab)


@library.custom_op("train_gpt::loss", mutates_args=())
def loss_op(logits: Tensor, targets: Tensor, weights: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """`token_losses` (T,), and the gradient (T, V) of their sum by the logits, in one pass."""
    logits = logits.contiguous()
    losses, grads = loss_outputs(logits, targets, weights, fp8)
    numbers = *logits.shape, LOGIT_GRAD_SCALE if fp8 else 1.0, len(weights)  # an e5m2 gradient is divided by its scale
    loss_kernel[(len(logits),)](logits, targets, weights, losses, grads, *numbers, BLOCK=4096, num_warps=8)
    return losses, grads


@loss_op.register_fake
def loss_outputs(logits, targets, weights, fp8):
    grads = torch.empty_like(logits, dtype=torch.float8_e5m2 if fp8 else logits.dtype)
    return logits.new_empty(len(logits), dtype=torch.float32), grads


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
    grid = triton.cdiv(source.size(0), 64), triton.cdiv(source.size(1), 64)
    transpose_kernel[grid](source.contiguous(), out, *source.shape, add, BLOCK=64)


def transposed(source: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """The transpose of a matrix, contiguous: new, or in place of what is in `out`, or added to that."""
    out = source.new_empty(source.size(1), source.size(0)) if out is None else out
    if not has_kernels(out) or not out.is_contiguous():
        return out.add_(source.T) if add else out.copy_(source.T)
    transpose_op(source, out, add)
    return out


# 3. Numerics ==========================================================================================================
# The few functions in which rounding is a decision. What is marked `region` is compiled by itself, once for all layers
# of a kind; only training on CUDA compiles it as a part of the whole model.

E4M3_MAX = 448
# Scales of the FP8 head [19]: what is stored in 8 bits, times its scale, is the value. The last is that of the summed
# losses' gradient; backward multiplies it by the gradient that comes in.
HEAD_INPUT_SCALE, HEAD_WEIGHT_SCALE, LOGIT_GRAD_SCALE = 100 / E4M3_MAX, 1.6 / E4M3_MAX, 0.75 / E4M3_MAX


def region(body: Callable) -> Callable:
    """Compiles a function once for each length of its first tensor and choice of options; larger graphs take it in."""

    @functools.cache
    def compiled(*kind) -> Callable:
        # PyTorch makes eight graphs of a function, and runs what needs another uncompiled; a copy has eight of its own.
        return torch.compile(type(body)(body.__code__.replace(), globals(), argdefs=body.__defaults__), dynamic=False)

    @functools.wraps(body)
    def call(x: Tensor, *inputs, **options):
        chosen = body if torch.compiler.is_compiling() else compiled(len(x), *options.values())
        return chosen(x, *inputs, **options)

    return call


@region
def norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last axis, computed in float32, without a gain."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=2**-23).to(x.dtype)


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale in e4m3, clamped to its range."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_to_fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix of x (…, rows, cols) in e4m3, and the float32 scale (…) that just fits its largest entry."""
    scale = x.abs().amax((-2, -1)).float().clamp(min=1e-12) / E4M3_MAX
    return quantize(x, scale[..., None, None]), scale


def scaled_mm(a: Tensor, b: Tensor, *scales: Tensor | float, dtype=torch.bfloat16, fast: bool = True) -> Tensor:
    """A B^T times both scales, in `dtype`: FP8 a (n, k) and b (m, k); `fast` accumulates less exactly."""
    scales = (s if isinstance(s, Tensor) else torch.full((), s, device=a.device) for s in scales)
    return torch._scaled_mm(a, b.T, *scales, out_dtype=dtype, use_fast_accum=fast)


class Head(torch.autograd.Function):
    """The sum of `token_losses` with the kernels; `fp8` has the three products in 8 bits [19, 60, 67, 79]."""

    @staticmethod
    def forward(ctx, x, lm_head, targets, weights, fp8):
        if fp8:
            x, lm_head = quantize(x, HEAD_INPUT_SCALE), quantize(lm_head, HEAD_WEIGHT_SCALE)
        logits = scaled_mm(x, transposed(lm_head), HEAD_INPUT_SCALE, HEAD_WEIGHT_SCALE) if fp8 else x @ lm_head
        losses, logit_grads = loss_op(logits, targets, weights, fp8)  # at once, so that only the gradient is kept
        ctx.save_for_backward(x, lm_head, logit_grads)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        x, lm_head, logit_grads = ctx.saved_tensors
        if x.dtype != torch.float8_e4m3fn:
            grad = grad.to(x.dtype)
            return grad * (logit_grads @ lm_head.T), grad * (x.T @ logit_grads), None, None, None
        scale = grad * LOGIT_GRAD_SCALE
        x_grad = scaled_mm(logit_grads, lm_head, scale, HEAD_WEIGHT_SCALE, fast=False)
        inputs = transposed(x), transposed(logit_grads), HEAD_INPUT_SCALE, scale
        return x_grad, scaled_mm(*inputs, dtype=torch.float32, fast=False).to(torch.bfloat16), None, None, None


def softcap(logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """23 * sigmoid((logits + 5) / 7.5), in float32: bounded logits, asymmetric [18, 54]. `dtype` rounds the sigmoid."""
    return 23 * torch.sigmoid((logits.float() + 5) / 7.5).to(dtype).float()


@region
def token_losses(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k weights[k] * (lse(z_i) - z_i[targets[i + k]]) (T,) in nats, of the normed stream x (T, D) [53]."""
    z = softcap(x @ lm_head, dtype)  # (T, V)
    losses = weights.sum() * z.logsumexp(-1)
    for k in range(len(weights)):  # targets past the end are left out, though the normalizer keeps all the weights
        losses = losses - weights[k] * F.pad(z.gather(-1, targets[k:, None]).squeeze(-1), (0, k))
    return losses


class MLP(torch.autograd.Function):
    """relu(x W_in^T)^2 W_out with the kernels; with W_in in 8 bits, too, and its scale, the first product in 8 bits."""

    @staticmethod
    def forward(ctx, x, w_in, w_out, w_in8=None, scale=None):
        # The scale of x is the whole sequence's, which is not causal: for training only. Backward is in bf16 [84].
        x8, x_scale = (x, None) if scale is None else quantize_to_fit(x)
        post = mlp_op(x8, w_in if scale is None else w_in8, x_scale, scale, None)
        ctx.save_for_backward(x, w_in, w_out, post)  # of the hidden layer only the square [59, 87]
        return post @ w_out

    @staticmethod
    def backward(ctx, grad):
        x, w_in, w_out, post = ctx.saved_tensors
        pre_grad = mlp_op(grad, w_out, None, None, post)
        return pre_grad @ w_in, pre_grad.T @ x, post.T @ grad, None, None


def join_float32(top: Tensor, low: Tensor) -> Tensor:
    """The float32 whose upper half is the bfloat16 `top` and whose lower 16 bits are the uint16 `low` [57]."""
    return ((top.view(torch.int16).to(torch.int32) << 16) | low.to(torch.int32)).view(torch.float32)


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_float32`: truncated bfloat16 upper half, and the lower 16 bits as uint16."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), (bits & 0xFFFF).to(torch.uint16)


# Each row is (a, b, c) of one step X <- aX + (bA + cA^2)X with A = XX^T; composed, the five take singular values
# from the whole of (0.001, 1] close to 1 (Polar Express, arXiv 2505.16932) [38].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix of u (n, rows, cols), roughly: U V^T of its SVD. Computed in `dtype`."""
    x = (u / (1.02 * u.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    wide = x.size(-2) <= x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        poly = symmetric_product(symmetric_product(x if wide else x.mT), alpha=c, beta=b)
        x = torch.baddbmm(x, poly, x, beta=a) if wide else torch.baddbmm(x, x, poly, beta=a)
    return x


# 4. Attention =========================================================================================================
# Causal, within a document, and at most `window` tokens back. CUDA runs FlexAttention over a list of blocks; other
# devices run a banded attention, exact and linear in T. Both are a mask, made once a sequence, and an `attend`.

BLOCK = 128  # FlexAttention's block of queries and of keys


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Half-truncated rotary [17]: d/4 frequencies in radians a token, for the pairs of the first d/2 channels."""
    return (1 / 1024) ** torch.linspace(0, 1, config.dim // (4 * config.heads))


def rotary_state(settings: Settings, step: int) -> tuple[Tensor, float]:
    """Rotary frequencies and softmax scale at a step, after YaRN at every growth of the long window until then [31]."""
    frequencies, scale = rotary_frequencies(settings.model), settings.model.attention_scale
    for old, new in itertools.pairwise(stage.windows[1] for stage, _ in settings.begun(step)):
        if settings.yarn and new > old:  # stretches what turns once in the old window, but not what turns 32 times
            ratio, keep = old / new, ((old * frequencies / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
            frequencies, scale = frequencies * (ratio + keep * (1 - ratio)), scale * (0.2 * math.log(new / old) + 1)
    return frequencies, scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (2j, 2j + 1) of the first half of the channels of x (T, H, d); the rest stays."""
    cos, sin = cos[: len(x)], sin[: len(x)]
    turning, still = x.chunk(2, dim=-1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((cos * even + sin * odd, cos * odd - sin * even), dim=-1).flatten(-2)
    return torch.cat((turned, still), dim=-1)


def document_starts(inputs: Tensor, config: ModelConfig) -> Tensor:
    """Where (T,) a look-back of one token has nothing to see: at BOS, and at the start of the sequence."""
    return (inputs == config.bos_id) | (torch.arange(len(inputs), device=inputs.device) == 0)


def previous(x: Tensor, begins: Tensor) -> Tensor:
    """Row t - 1 of x (T, …) in row t; a row where a document `begins` stays."""
    return torch.where(begins.view(-1, *[1] * (x.dim() - 1)), x, torch.cat((x[:1], x[:-1])))


def block_mask(docs: Tensor, window: Tensor) -> BlockMask:
    """FlexAttention's mask for document numbers docs (T,), non-decreasing, and a 0-d window, made on their device."""
    length, first = len(docs), docs[::BLOCK]
    block = torch.arange(len(first), dtype=torch.int32, device=docs.device)
    here, last = block[:, None], docs[(block * BLOCK + BLOCK - 1).clamp(max=length - 1)]
    back = here - block  # how many blocks the keys lie behind the queries
    # Of two blocks, the nearest pair is the first query with the last key; the farthest, the other way round. A block
    # that holds an allowed pair is listed, and one without a forbidden pair as full.
    near = (back > 0) & (first[:, None] == last) & ((back - 1) * BLOCK + 1 <= window)
    full = (back > 0) & (last[:, None] == first) & (back * BLOCK + BLOCK - 1 <= window)

    def lists(dim: int, way: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts and places of the partial and the full blocks, the nearest first, of each row (1) or column (0)."""
        # From the diagonal on first all are full, then all partial: counting is enough (a sort compiles for minutes).
        all_near, all_full = (each.sum(dim, dtype=torch.int32)[:, None] for each in (near, full))
        away = torch.where(block > 0, all_full + block, 0), block + 1  # what stands past the count is not read
        partial, fulls = ((here + way * each).clamp(0, len(block) - 1)[None, None] for each in away)
        return (all_near - all_full + 1).view(1, 1, -1), partial, all_full.view(1, 1, -1), fulls

    def allowed(batch, head, query, key):
        return (key <= query) & (docs[query] == docs[key]) & (query - key <= window)

    return BlockMask((length, length), *lists(1, -1), *lists(0, 1), (BLOCK, BLOCK), allowed)


def banded_mask(docs: Tensor, window: int) -> Tensor:
    """The allowed pairs (chunks, 1, C, 2C): queries in chunks of C >= window, keys of that chunk and the one before."""
    size = max(min(window, len(docs)), 1)
    # What fills up the first and the last chunk is a document of its own.
    docs = F.pad(docs, (size, -len(docs) % size), value=-1).unfold(0, 2 * size, size)  # (chunks, 2C)
    back = torch.arange(size, 2 * size, device=docs.device)[:, None] - torch.arange(2 * size, device=docs.device)
    return ((docs[:, size:, None] == docs[:, None]) & (back >= 0) & (back <= window))[:, None]


@region
def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, scale: Tensor) -> Tensor:
    """softmax(scale * q k^T, where allowed) v, for q, k, v (T, H, d) and a mask of either kind."""
    if isinstance(mask, BlockMask):
        q, k, v = (x.transpose(0, 1)[None] for x in ((q.float() * scale).to(q.dtype), k, v))  # (1, H, T, d)
        return flex_attention(q, k, v, block_mask=mask, scale=1.0)[0].transpose(0, 1)
    length, size = len(q), mask.size(2)
    # Chunks (1 + chunks, H, C, d) of C tokens, zeros before and after; of keys and values also the chunk before.
    q, k, v = (F.pad(x, (0, 0, 0, 0, size, -length % size)).unflatten(0, (-1, size)).transpose(1, 2) for x in (q, k, v))
    k, v = (torch.cat((x[:-1], x[1:]), dim=2) for x in (k, v))  # (chunks, H, 2C, d)
    # Products and a softmax, compiled, take half the time of scaled_dot_product_attention's CPU kernel.
    weights = ((q[1:] @ k.mT).float() * scale).masked_fill(~mask, -math.inf).softmax(-1)  # (chunks, H, C, 2C)
    return (weights.to(q.dtype) @ v).transpose(1, 2).flatten(0, 1)[:length]


# 5. Model =============================================================================================================
# One packed sequence at a time: x is (T, D), without a batch axis. Matrices live in banks (n, rows, cols), of which the
# forward pass gets a record a layer, and each rank's optimizer a whole number of matrices.

VAL_CHUNK = 4096  # rows of logits at a time in validation


# What the forward pass needs besides weights and tokens: rotary tables (2T, 1, d/4), since paired heads have twice the
# positions; the scale of attention's logits, 0-d float32; the short and long window; weights (K,) of the next targets.
Context = collections.namedtuple("Context", "cos sin scale windows mtp")


def make_context(config: ModelConfig, length: int, windows: tuple[int, int], like: Tensor, rotary=None) -> Context:
    """A context of `length` tokens, on `like`'s device and in its dtype, with the next target alone."""
    frequencies, scale = rotary or (rotary_frequencies(config), config.attention_scale)
    angles = torch.arange(2 * length, device=like.device)[:, None, None] * frequencies.to(like.device)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    if like.is_cuda:  # as tensors, so that another window is no other graph
        windows = tuple(torch.tensor(window, device=like.device) for window in windows)
    return Context(cos, sin, torch.tensor(scale, device=like.device), windows, torch.ones(1, device=like.device))


# A layer's part of the parameters, made by `GPT.layer_weights`; None for what it does without.
LayerWeights = collections.namedtuple("LayerWeights", "qk v out value_gate alpha gate mlp mix")


def bigram_hash(tokens: Tensor, begins: Tensor, rows: int) -> Tensor:
    """The table row (T,) of each token and the one before, by a hash in 32 bits; the last row where `begins` [62]."""
    tokens = tokens.int()
    return torch.where(begins, rows - 1, ((36313 * tokens) ^ (27191 * previous(tokens, begins))) % (rows - 1))


@region
def begin_stream(x: Tensor, tokens: Tensor, begins: Tensor, gate, strength, table, signs, factor: Tensor):
    """x0, the stream at its start and the bigram embedding (T, channels), from embeddings x (T, D) of the tokens."""
    if gate is not None:  # smear: x_t takes up some of x_(t-1), except where a document begins [34]
        take = strength.to(x.dtype) * torch.sigmoid(x[:, :12] @ gate)[:, None]
        x = x + torch.where(begins[:, None], 0, take * previous(x, begins))
    x = norm(x)
    if table is None:
        return x, x, None
    sign_rows = (previous(tokens, begins) ^ tokens) % len(signs)  # [83]; row 0 where a document begins
    bigram = F.embedding(bigram_hash(tokens, begins, len(table)), table) * F.embedding(sign_rows, signs)
    return x, x + F.pad(factor * bigram, (0, x.size(1) - bigram.size(1))), bigram


@region
def project(x: Tensor, added: Tensor | None, begins: Tensor, rotary, w: LayerWeights, heads: int, *, offset, paired):
    """What attention makes of the stream x (T, D): q, k and v for `attend`, and the gate (T, H, 1) of its output."""
    a = norm(x)
    if w.value_gate is not None:  # of the token's row of value embeddings, which is `added`; reads both [14, 63]
        gate = 2 * torch.sigmoid(torch.cat((a[:, :6], added[:, :6]), dim=1) @ w.value_gate.T)  # (T, H)
        added = (gate[:, :, None] * added.unflatten(1, (heads, -1))).flatten(1)
    q, k = norm((a @ w.qk.T).unflatten(1, (2 * heads, -1))).chunk(2, dim=1)  # (T, H, d)
    v = (a @ w.v.T if added is None else torch.addmm(added, a, w.v.T)).unflatten(1, (heads, -1))
    if offset:  # the channels of a key that do not turn are the token's before, except where a document begins [49]
        turning, still = k.chunk(2, dim=-1)
        k = torch.cat((turning, previous(still, begins)), dim=-1)
    if paired:  # heads 2p and 2p + 1 of token t become one head's positions 2t and 2t + 1 [58]
        q, k, v = (each.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1) for each in (q, k, v))  # (2T, H/2, d)
    gate = 1 if w.gate is None else torch.sigmoid(a[:, :12] @ w.gate.T)[:, :, None]  # of the heads' outputs [28]
    return rotate(q, *rotary), rotate(k, *rotary), v, gate


@region
def add_attention(x: Tensor, y: Tensor, v: Tensor, gate, origin: Tensor, bigram, w: LayerWeights, *, paired):
    """The stream after attention: itself, what `attend` made of the heads, x0 (MUDD: `start`), and the bigrams."""
    if paired:
        y, v = (each.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2) for each in (y, v))  # (T, H, d)
    if w.alpha is not None:  # XSA takes tanh(alpha) of the part of y parallel to the token's own value v out [82]
        along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
        y = y - w.alpha.tanh()[:, None] * along * v
    resid, post, from_origin, from_bigram = w.mix[:4]
    x = resid * x + post * ((gate * y).flatten(1) @ w.out.T) + from_origin * origin
    return x if bigram is None else x + F.pad(from_bigram * bigram, (0, x.size(1) - bigram.size(1)))


@region
def add_mlp(x: Tensor, w: LayerWeights) -> Tensor:
    """The stream x (T, D) after the MLP: itself, and relu(norm(x) W_in^T)^2 W_out."""
    y, (resid, post) = norm(x), w.mix[4:]
    y = MLP.apply(y, *w.mlp) if has_kernels(y) else F.relu(y @ w.mlp[0].T).square() @ w.mlp[1]
    return resid * x + post * y


def mudd_coefficients(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, place: int) -> tuple[Tensor, ...]:
    """A token's 0.1 * (W2 gelu(W1 x) + b), (T, 1) each, before its layer or after the last (arXiv 2502.12170)."""
    w2, bias = (each.to(x.dtype).split([len(starts) for starts in MUDD_STARTS])[place] for each in (w2, bias))
    return (0.1 * (F.gelu(x @ w1[place].T) @ w2.T + bias)).T.contiguous()[:, :, None].unbind()


@region
def mudd_before(x: Tensor, start: Tensor, earlier: Tensor, row: Tensor | None, *weights: Tensor):
    """Before a MUDD layer: the stream it works on, what is added to v (T, D), and its `mix` [81]."""
    c = mudd_coefficients(x, *weights, place=0)
    added = c[0] * start + c[1] * earlier + c[2] * x
    if row is not None:
        first, second = row.chunk(2, dim=1)  # the channels of the first half of the heads, and of the second
        added = added + torch.cat((c[6] * first, c[7] * second), dim=1)
    return c[3] * start + c[4] * earlier + (1 + c[5]) * x, added, c[8:]


@region
def mudd_after(x: Tensor, sources: list[Tensor | None], *weights: Tensor) -> Tensor:
    """The stream after the last layer, plus earlier ones, each times its coefficient [81]."""
    return sum((c * y for c, y in zip(mudd_coefficients(x, *weights, place=1), sources) if y is not None), x)


class GPT(nn.Module):
    """The model of `config`, its matrices in `dtype`, banks padded with zero matrices to a multiple of `shards`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, shards: int = 1, fp8: bool = False):
        super().__init__()
        self.config, self.table, self.fp8 = config, parameter_table(config), fp8  # 8 bits in `forward` alone
        self.rows, self.attending, self.xsa = config.rows, config.layers_with("attention"), config.layers_with("xsa")
        self.gated = [i for i in config.layers_with("value_embeds") if not self.rows[i].mudd]
        self.kept = {n for row in self.rows for n in (row.single_input, row.skip, *(row.mudd or ()))}
        bounds = {"uniform": 3**0.5 * config.dim**-0.5, "kaiming": config.dim**-0.5}  # Kaiming's with a = sqrt(5)
        for name, row in self.table.items():
            self.register_parameter(name, None)
            if not row.shape:
                continue
            how, _, std = str(row.start).partition("/")[0].partition(" ")  # "uniform 0.5/sqrt(D)": uniform, 0.5
            if name == "embed":
                value = self.lm_head.data.T.contiguous()
            elif name == "mudd_bias":
                value = torch.tensor(sum(MUDD_STARTS, ())) / 0.1
            elif how == "normal":
                value = torch.randn(row.shape) * float(std)
            elif how in bounds:
                bound = bounds[how] * float(std or 1)
                value = torch.empty(row.shape).uniform_(-bound, bound)
            else:
                value = torch.full(row.shape, float(how))
            if row.kind == "bank":
                value = F.pad(value, (0, 0, 0, 0, 0, -len(value) % shards))
            setattr(self, name, nn.Parameter(value if row.kind == "scalar" else value.to(dtype)))
        self.mlp_bank.data[1::2] = 0  # every W_out
        # Drawn on the CPU from a seed of its own: the same table on every device, for every --seed.
        signs = torch.randint(2, (8192, config.bigram_dim), generator=torch.Generator().manual_seed(83), device="cpu")
        self.register_buffer("bigram_signs", (2 * signs - 1).to(dtype) if config.bigram else None)

    def forward(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """The training objective, summed over a sequence: inputs and targets (T,) integers; returns float32, 0-d."""
        x = self.stream(inputs, context, self.fp8)
        if has_kernels(x):
            return Head.apply(x, self.lm_head, targets, context.mtp, self.fp8)
        return token_losses(x, self.lm_head, targets, context.mtp, x.dtype).sum()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """Cross-entropy in nats of each token (T,), float32, the head computed in chunks to bound memory."""
        chunks = zip(self.stream(inputs, context).split(VAL_CHUNK), targets.split(VAL_CHUNK))
        one = torch.ones(1, device=inputs.device)
        return torch.cat([token_losses(x, self.lm_head, y, one, torch.float32) for x, y in chunks])

    def stream(self, inputs: Tensor, context: Context, fp8: bool = False) -> Tensor:
        """What the head reads: the normed stream (T, D) after the last layer."""
        config, begins, layers = self.config, document_starts(inputs, self.config), self.layer_weights(len(inputs), fp8)
        mudd = self.mudd_w1, self.mudd_w2, self.mudd_bias
        docs = (inputs == config.bos_id).cumsum(0)
        docs = {False: docs, True: docs.repeat_interleave(2)}  # paired heads have twice the positions
        windows = dict(zip(("short", "long"), context.windows))
        make = block_mask if inputs.is_cuda else banded_mask
        kinds = dict.fromkeys((row.paired_heads, row.window) for row in self.rows if row.attention)
        masks = {(paired, window): make(docs[paired], windows[window]) for paired, window in kinds}

        x = F.embedding(inputs, self.embed)
        weights = self.smear_gate, self.smear_lambda, self.bigram_table, self.bigram_signs, layers[0].mix[3]
        x0, start, bigram = begin_stream(x, inputs, begins, *weights)
        x, values, after = start, {}, {}  # `after`: the stream after each layer that others read
        if self.value_embeds is not None:  # the row (T, D) of each token in each table
            firsts = torch.arange(0, len(self.value_embeds), config.padded_vocab, device=inputs.device)
            values = dict(enumerate(F.embedding(inputs + firsts[:, None], self.value_embeds).unbind()))

        for i, (layer, w) in enumerate(zip(self.rows, layers)):
            added, origin = values.get(layer.value_embeds), x0
            if layer.skip is not None:  # an earlier stream, through a gate that reads the embedding [55]
                gate = 2 * torch.sigmoid(self.skip_lambda.to(x.dtype)) * torch.sigmoid(x0[:, :12] @ self.skip_gate)
                x = x + gate[:, None] * after[layer.skip]
            if layer.mudd is not None:
                sources = [after[n] for n in layer.mudd]
                x, added, mix = mudd_before(x, start, sources[0], added, *mudd)
                w, origin = w._replace(mix=mix), start
            if layer.attention:
                paired, offset = layer.paired_heads, config.key_offset and layer.window == "long"
                read, heads = x if layer.single_input is None else after[layer.single_input], config.heads
                q, k, v, gate = project(read, added, begins, context[:2], w, heads, offset=offset, paired=paired)
                y = attend(q, k, v, masks[paired, layer.window], context.scale)
                # Layer 0 has the bigram embedding from the start.
                x = add_attention(x, y, v, gate, origin, bigram if i > 0 else None, w, paired=paired)
            x = add_mlp(x, w)
            if i in self.kept:
                after[i] = x
        if self.mudd_w1 is not None:
            x = mudd_after(x, [start, *sources[:2], values.get(0), sources[2]], *mudd)
        return norm(x)

    def layer_weights(self, length: int, fp8: bool) -> list[LayerWeights]:
        """What each layer has of the parameters: matrices times their scalars [47], all in the dtype of the stream."""
        dtype, dim, count, n = self.embed.dtype, self.config.dim, len(self.rows), len(self.attending)

        def by_layer(tensor: Tensor | None, layers: Iterable[int]) -> list[Tensor | None]:
            parts = {} if tensor is None else dict(zip(layers, tensor.to(dtype).unbind()))
            return [parts.get(i) for i in range(count)]

        # Of all layers at once: a product a layer is some hundred kernels more, most of them in the backward pass.
        qkv, out = (p.to(dtype)[:, None, None] for p in (self.qkv_lambdas, self.out_lambdas))
        w_qk = self.qk_bank.view(-1, dim)[: n * 2 * dim].view(n, 2 * dim, dim)  # without the padding
        w_v, w_o = self.vo_bank[: n * 2].unflatten(0, (n, 2)).unbind(1)
        matrices = self.mlp_bank.unbind()
        in_8_bits = quantize_to_fit(self.mlp_bank[: 2 * count : 2].detach()) if fp8 else ()
        mlp = zip(matrices[::2], matrices[1::2], *(each.unbind() for each in in_8_bits))
        resid, post, x0 = self.resid_lambdas, self.post_lambdas, self.x0_lambdas
        bigram = torch.zeros_like(x0) if self.bigram_lambdas is None else self.bigram_lambdas
        factors = torch.stack((resid[:, 0], post[:, 0], x0, bigram, resid[:, 1], post[:, 1])).flatten()
        # Spread over the tokens: one sum over them then makes the gradients of all, which else had one each. Contiguous
        # like MUDD's, so that the regions' graphs serve both.
        factors = factors.to(dtype)[:, None, None].expand(-1, length, 1).contiguous().unbind()
        columns = (
            by_layer(qkv * w_qk, self.attending),  # (2D, D)
            by_layer(qkv * w_v, self.attending),  # (D, D)
            by_layer(out * w_o, self.attending),  # (D, D)
            by_layer(self.value_gates, self.gated),  # (H, 12)
            by_layer(self.xsa_alphas, self.xsa),  # (H,)
            by_layer(self.attention_gates, self.attending),  # (H, 12)
            mlp,  # W_in and W_out (4D, D); with `fp8` also W_in in 8 bits, and its scale [84]
            (factors[i::count] for i in range(count)),  # (T, 1): of x, attention, x0, bigram; of x, MLP
        )
        return list(map(LayerWeights, *columns))


# 6. Optimizer =========================================================================================================
# NorMuon for the banks, every step; Adam for the rest, every second step. Ranks reduce-scatter gradients of banks and
# tables, update a part each, and gather; they all-reduce those of gates and scalars. One rank communicates nothing.

# torch 2.13 renames the two collectives and warns of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.compile(dynamic=True, fullgraph=True)
def adam_update(p, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, bias1, bias2) -> None:
    """One step of Adam with cautious weight decay, in place, on flat tensors, so that one graph serves them all."""
    # All from `lr` on are 0-d tensors, lest each value make a graph: `decay` is lr^2 wd, bias1 and bias2 1 - beta^t.
    grad, value = grad.float(), p.float()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    update = lr * bias2.sqrt() / bias1 * exp_avg / (exp_avg_sq.sqrt() + 1e-10)
    p.copy_(value - update - decay * value * (update * value > 0))


@torch.compile(dynamic=False, fullgraph=True)
def normuon_update(p, grad, factors, lr, wd, momentum, beta2, exp_avg, exp_avg_sq, low=None) -> None:
    """One step of NorMuon (arXiv 2510.05491) on matrices p (n, rows, cols), in place [38, 41-43, 57].

    `factors` (n, 1, 1) are the matrices' parts of the learning rate, the four numbers 0-d tensors; `exp_avg_sq` has the
    mean squares of rows (n, rows, 1) or columns (n, 1, cols), `low` (uint16) the mantissa bits that bf16 weights lose.
    """
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - momentum)
    u = polar_express(torch.lerp(grad, exp_avg, momentum), p.dtype).float()
    before = u.norm(dim=(-2, -1), keepdim=True)
    exp_avg_sq.lerp_(u.square().mean(-1 if u.size(-2) >= u.size(-1) else -2, keepdim=True), 1 - beta2)
    u = u * exp_avg_sq.clamp(min=1e-10).rsqrt()
    u = u * (before / u.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    value = p if low is None else join_float32(p, low)
    step = lr * factors
    value = value - step * (lr * wd) * value * (u * value >= 0) - step * u
    if low is not None:
        value, bottom = split_float32(value)
        low.copy_(bottom)
    p.copy_(value)


def resize(saved: Tensor, rows: int) -> Tensor:
    """A bank's first axis cut, or padded with zeros, for another number of processes."""
    return F.pad(saved, (0, 0) * (saved.dim() - 1) + (0, rows - len(saved)))


class Optimizer:
    """Both optimizers, their state, and the exchange between ranks, for all parameters of a `GPT`."""

    def __init__(self, model: GPT, settings: Settings, rank: int = 0, world_size: int = 1):
        self.settings, self.rank, self.world_size = settings, rank, world_size
        self.params, self.table, self.state, self.factors = dict(model.named_parameters()), model.table, {}, {}
        kinds = ("bank",), ("table",), ("gate", "scalar")
        self.banks, self.tables, self.small = ([n for n in self.params if self.table[n].kind in kind] for kind in kinds)
        self.muon = self.banks if settings.muon else []  # the parameters that are NorMuon's
        self.sharded = self.banks + self.tables if world_size > 1 else []  # those of which each rank updates a part
        # Of the bigram table's gradient only the rows that a rank has touched need to travel; see `exchange_rows`.
        self.sparse = settings.sparse_exchange and 1 < world_size == settings.slices and "bigram_table" in self.params
        self.touched: list[Tensor] = []  # rows, on the CPU, one tensor a step since the last update
        self.tied, self.updates = settings.stages[0].tied, 0  # Adam's t, one for all parameters
        for name, p in self.params.items():
            zeros = torch.zeros_like(self.share(name, p.data), dtype=torch.float32)
            state = self.state[name] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            if name in self.muon:
                count, rows, cols = p.shape
                state["exp_avg_sq"] = zeros.mean(-1 if rows >= cols else -2, keepdim=True)
                if p.dtype == torch.bfloat16:
                    state["low"] = torch.zeros_like(zeros, dtype=torch.uint16)
                # A matrix's step grows with its shape; MLP-out's twice more. Padding gets a factor too, and stays zero.
                factors = torch.full((count, 1, 1), max(1, rows / cols) ** 0.5, device=p.device)
                factors[1::2] *= 2 if name == "mlp_bank" else 1
                self.factors[name] = self.share(name, factors)

    def share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of what has a parameter's first axis: the whole, where ranks do not share it out."""
        return whole.chunk(self.world_size)[self.rank] if name in self.sharded else whole

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The inverse of `share`; as bytes, since not all dtypes travel."""
        if name not in self.sharded:
            return part
        whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
        all_gather(whole.view(torch.uint8), part.contiguous().view(torch.uint8))
        return whole

    @torch.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Reduces the gradients that this step uses, updates, and clears them."""
        head, embed, tied = self.params["lm_head"], self.params["embed"], hyper.adam and self.tied
        steps = {name: self.step_of(name, hyper) for name in (self.params if hyper.adam else self.muon)}
        if tied:
            transposed(embed.grad, out=head.grad, add=True)
            embed.grad = None
            del steps["embed"]
        self.updates += hyper.adam
        # Each goes on until it has something to wait for. Banks are reduced before the large tables, since every step
        # has them, and most of the work waits for them; but updated last, so that gathers travel while Muon computes.
        sent, small, banks, tables = {}, self.small, self.banks, self.tables
        for order in (small + banks + tables, small + tables + banks, tables + banks):
            for name in filter(steps.get, order):
                if work := sent.get(name):
                    work.wait()
                sent[name] = next(steps[name], None)
        if tied:
            transposed(head.data, out=embed.data)
            self.tied = hyper.stage.tied
        if tied and not self.tied:  # embed's own Adam begins as a transposed copy of the head's [51, 53]
            for key, part in self.state["lm_head"].items():
                self.state["embed"][key].copy_(self.share("embed", self.gather("lm_head", part).T))

    def step_of(self, name: str, hyper: Hyper) -> Iterator[dist.Work]:
        """One parameter's step; yields what has to arrive before it goes on: the mean gradient, then the new values."""
        p = self.params[name]
        grad, part = p.grad, self.share(name, p.data)
        if name == "bigram_table" and self.sparse:
            grad = yield from self.exchange_rows(grad)
        elif name in self.sharded:
            grad = torch.empty_like(part)
            yield reduce_scatter(grad, p.grad.contiguous(), op=dist.ReduceOp.AVG, async_op=True)
        elif self.world_size > 1:
            yield dist.all_reduce(grad, op=dist.ReduceOp.AVG, async_op=True)
        self.update(name, grad, hyper)
        p.grad = None
        if name in self.sharded:
            yield all_gather(p.data, part, async_op=True)

    def exchange_rows(self, grad: Tensor) -> Generator[dist.Work, None, Tensor]:
        """The reduce-scatter of a gradient (rows, cols) that is zero in most rows: the rest go to their owners."""
        # Which they are, and so how much travels, comes from the tokens on the CPU: nothing waits for the device.
        rows, self.touched = torch.cat(self.touched).unique(), []
        size = len(grad) // self.world_size
        sends = torch.bincount(rows // size, minlength=self.world_size)
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends)
        splits = receives.tolist(), sends.tolist()
        rows = rows.to(grad.device, non_blocking=True)
        index, values = rows.new_empty(sum(splits[0])), grad.new_empty(sum(splits[0]), grad.size(1))
        first = dist.all_to_all_single(index, rows, *splits, async_op=True)
        yield dist.all_to_all_single(values, grad[rows], *splits, async_op=True)
        first.wait()
        total = torch.zeros(size, grad.size(1), device=grad.device).index_add_(0, index % size, values.float())
        return (total / self.world_size).to(grad.dtype)

    def update(self, name: str, grad: Tensor, hyper: Hyper) -> None:
        """Updates this rank's part of a parameter, with its part of the gradient."""
        settings, row, state = self.settings, self.table[name], self.state[name]
        part = self.share(name, self.params[name].data)
        if name in self.muon:
            numbers = (settings.muon_lr * hyper.lr, settings.muon_wd, hyper.momentum, settings.muon_beta2)
            normuon_update(part, grad, self.factors[name], *map(torch.tensor, numbers), **state)
        else:
            lr, bias = settings.adam_lr * hyper.lr * row.lr, (1 - beta**self.updates for beta in row.betas)
            numbers = (lr, lr**2 * settings.adam_wd * row.wd, *row.betas, *bias)
            adam_update(*(x.view(-1) for x in (part, grad, *state.values())), *map(torch.tensor, numbers))

    def state_dict(self) -> dict:
        """All state, and the gradients that wait for Adam, whole and on the CPU: all ranks take part, rank 0 has it."""
        keep = Tensor.cpu if self.rank == 0 else lambda whole: None
        states = {name: {key: keep(self.gather(name, x)) for key, x in own.items()} for name, own in self.state.items()}
        grads = {name: p.grad.clone() for name, p in self.params.items() if p.grad is not None}
        for grad in grads.values() if self.world_size > 1 else ():
            dist.all_reduce(grad, op=dist.ReduceOp.AVG)
        grads = {name: keep(grad) for name, grad in grads.items()}
        return {"states": states, "grads": grads, "updates": self.updates, "tied": self.tied}

    def load_state_dict(self, saved: dict) -> None:
        """Takes this rank's part of a `state_dict`, which may be from another number of ranks."""
        for name, p in self.params.items():
            for key, part in self.state[name].items():
                part.copy_(self.share(name, resize(saved["states"][name][key], len(p))))
            if name in saved["grads"]:
                p.grad = resize(saved["grads"][name], len(p)).to(p.device)
        if self.sparse and "bigram_table" in saved["grads"]:
            self.touched.append(saved["grads"]["bigram_table"].any(1).nonzero().squeeze(1))
        self.updates, self.tied = saved["updates"], saved["tied"]


# 7. Data ==============================================================================================================
# A shard is a 1,024-byte header and uint16 tokens. Which documents make which slice of a batch is planned for the whole
# run before it starts, from their lengths alone, the same on every rank; too few tokens are so told before the clock.


def find_shards(pattern: str, preset: str) -> list[str]:
    """The files of a pattern, in name order."""
    if paths := sorted(glob.glob(pattern)):
        return paths
    raise UserError(f"no shards match {pattern}; get them with: {FETCH[preset]}")


def read_shard(path: str, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A shard's tokens (uint16), and the positions of all documents' BOS and of the end; UserError if it is unfit."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=256)
        tokens = np.fromfile(path, dtype="<u2")[512:]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size < 1024:
        problem = f"truncated: {size} bytes, expected a header of 1,024 bytes"
    elif header[0] != 20240520 or header[1] != 1:
        problem = f"no token shard: magic number {header[0]}, version {header[1]}; expected 20240520, version 1"
    elif size != (expected := 1024 + 2 * int(header[2])):
        what = "truncated" if size < expected else "too long"
        problem = f"{what}: {size:,} bytes, but {header[2]:,} tokens take {expected:,}; get it again"
    elif tokens.max(initial=0) >= config.vocab_size:
        problem = f"token {tokens.max()} is outside the vocabulary of {config.vocab_size}; is it another tokenizer's?"
    elif not len(starts := np.flatnonzero(tokens == config.bos_id)):
        problem = f"no BOS (token {config.bos_id}); every document must start with BOS"
    else:
        return tokens, np.append(starts, len(tokens))
    raise UserError(f"{path}: {problem}")


# Where one step's tokens come from: slice s, of `length` inputs and one token more, has a shard's documents from
# documents[s] up to documents[s + 1], each cut to max_seq_len.
Batch = collections.namedtuple("Batch", "path documents length max_seq_len")


def plan_batches(settings: Settings, paths: list[str]) -> tuple[list[Batch], dict[str, int]]:
    """A `Batch` for every step of the run, and the number of tokens of each shard that the plan looked at."""
    # Slices take documents in order, each cut to max_seq_len, and the last one so that the slice is exactly full.
    plan, documents, ends = [], [0], []  # `ends`: the steps planned when each shard, in turn, ran out
    bounds = functools.cache(lambda path: read_shard(path, settings.model)[1])
    starts = functools.cache(lambda path, cut: np.append(0, np.minimum(np.diff(bounds(path)), cut)).cumsum())
    while len(plan) < settings.total_steps:
        stage, path = schedule(settings, len(plan)).stage, paths[len(ends) % len(paths)]
        length = stage.batch_tokens // settings.slices
        before = starts(path, stage.max_seq_len)  # tokens before each document, and in all
        while len(documents) <= settings.slices and documents[-1] < len(before):
            documents.append(int(np.searchsorted(before, before[documents[-1]] + length + 1)))
        if documents[-1] < len(before):
            plan.append(Batch(path, documents, length, stage.max_seq_len))
            documents = documents[-1:]
        else:  # the next shard begins this batch again
            ends.append(len(plan))
            documents = [0]
        if ends.count(len(plan)) > len(paths):  # so each was tried from its start
            what = f"one batch of {stage.batch_tokens:,} tokens (cut to {stage.max_seq_len:,})"
            largest = f"the largest of {len(paths)} has {max(bounds(path)[-1] for path in paths):,} tokens"
            raise UserError(f"{settings.train_files}: no shard has documents for {what}; {largest}")
    if (epochs := len(ends) // len(paths) + 1) > settings.epochs:
        parts = plan[: ends[settings.epochs * len(paths) - 1]], plan
        have, need = (sum(batch.length * settings.slices for batch in part) for part in parts)
        found = f"{have:,} of {need:,}, in {len(paths)} shards and {settings.epochs} epochs after cutting documents"
        raise UserError(f"{settings.train_files}: too few tokens: {found}; add shards, or use --epochs {epochs}")
    return plan, {path: int(bounds(path)[-1]) for path in paths[: len(ends) + 1]}


def training_batches(plan: list[Batch], config: ModelConfig, slices: range):
    """Yields the tokens (slices, length + 1), int32, of these slices of every batch of the plan."""
    groups = itertools.groupby(plan, key=lambda batch: batch.path)
    for (tokens, bounds), batches in prefetch((read_shard(path, config), list(batches)) for path, batches in groups):
        if batches[-1].documents[-1] >= len(bounds):
            raise UserError(f"{batches[-1].path}: changed while the run was reading it")
        for batch in batches:
            edges = [itertools.pairwise(bounds[batch.documents[s] : batch.documents[s + 1] + 1]) for s in slices]
            pieces = ([tokens[start:end][: batch.max_seq_len] for start, end in each] for each in edges)
            rows = [np.concatenate(each)[: batch.length + 1] for each in pieces]
            yield torch.from_numpy(np.stack(rows).astype(np.int32))


def touched_rows(tokens: Tensor, config: ModelConfig) -> Tensor:
    """The rows of the bigram table that training on tokens (slices, length + 1) has a gradient for."""
    count = config.bigram_rows * config.padded_vocab
    return torch.cat([bigram_hash(row, document_starts(row, config), count) for row in tokens[:, :-1]]).long().unique()


def validation_sequences(settings: Settings) -> tuple[Tensor, dict[str, int]]:
    """The sequences (n, val_seq_len + 1), int32, that tile the first val_tokens of the stream; tokens by shard."""
    stream, sizes, need = np.empty(0, np.uint16), {}, settings.val_tokens + 1  # the last target is the next token
    for path in find_shards(settings.val_files, settings.preset):
        if len(stream) < need:
            tokens, _ = read_shard(path, settings.model)
            stream, sizes[path] = np.append(stream, tokens[:need]), len(tokens)
    if len(stream) < need:
        wanted = f"--val-tokens {settings.val_tokens} needs one more than that; add shards, or use a lower --val-tokens"
        raise UserError(f"{settings.val_files}: too few validation tokens: {len(stream):,}, but {wanted}")
    sequences = torch.from_numpy(stream[:need].astype(np.int32))
    return sequences.unfold(0, settings.val_seq_len + 1, settings.val_seq_len), sizes


def prefetch(items):
    """Yields what the iterator `items` yields, the next one being made by a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


# 8. Training ==========================================================================================================
# A process and its device, the clock, one step, the warm-up that leaves no trace, the log, checkpoints, and the loop.

World = collections.namedtuple("World", "rank size device")  # this process among the others, and its device


def find_world() -> World:
    """This process's place in what torchrun describes in the environment, and its device."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return World(rank, size, torch.device("cuda", torch.cuda.current_device()))
    torch.use_deterministic_algorithms(True)
    return World(rank, size, torch.device("cpu"))


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 where the hardware has it, unless the settings say."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    cpu_has_it = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_it
    return torch.bfloat16 if native else torch.float32


def choose_fp8(settings: Settings, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training has products in 8 bits: from compute capability 8.9 on, for sizes in multiples of 16."""
    sizes = [settings.model.dim, *(stage.batch_tokens // settings.slices for stage in settings.all_stages)]
    able = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9)
    return settings.fp8 and able and math.gcd(*sizes) % 16 == 0


def build(settings: Settings, world: World) -> tuple[GPT, Callable, Optimizer]:
    """Meets the other ranks; returns the model, what computes its objective, and the optimizer, the same on all."""
    cuda, dtype = world.device.type == "cuda", choose_dtype(settings, world.device)
    torch.manual_seed(settings.seed)
    model = GPT(settings.model, dtype, world.size, choose_fp8(settings, world.device, dtype)).to(world.device)
    if world.size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=world.device if cuda else None)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)
    # On CUDA the training pass is one graph, which takes in the regions; validation, and the CPU, compile each alone.
    objective = torch.compile(model, dynamic=False, fullgraph=True) if cuda else model
    return model, objective, Optimizer(model, settings, world.rank, world.size)


def compile_or_not(wanted: bool) -> str:
    """Turns torch.compile off if it is not wanted, or if an addition does not compile; returns words for the log."""
    if wanted:
        with contextlib.suppress(Exception):
            torch.compile(lambda x: x + 1)(torch.zeros(16))
            return "compiling"
    torch.compiler.set_stance("force_eager")
    return "uncompiled, as no working C++ compiler was found," if wanted else "uncompiled"


def mark(device: torch.device):
    """A point in the device's work, for `elapsed`: the clock of a run is the time between two of them."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def elapsed(begin, end) -> float:
    """Milliseconds from one mark to another; waits until the device has come to the second."""
    if isinstance(end, float):
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


def flops_per_token(config: ModelConfig, stage: Stage) -> int:
    """The arithmetic of a training token: 6 for a matrix parameter, 12 for a channel and key of attention."""
    windows = [stage.windows[row.window == "long"] for row in config.rows if row.attention]
    matrices = config.dim * (config.padded_vocab + 8 * config.dim * len(config.rows) + 4 * config.dim * len(windows))
    return 6 * matrices + 12 * config.dim * sum(windows)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The arithmetic that the device really does, in FLOP/s: the best of some large matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    # As good as random numbers, on which a GPU's speed depends, and the run's own random state stays as it is.
    a = torch.arange(size**2, dtype=torch.float32, device=device).sin().view(size, size).to(dtype)
    out = torch.empty_like(a)
    runs = [(mark(device), torch.mm(a, a, out=out), mark(device)) for _ in range(6)]
    return 2 * size**3 / min(elapsed(begin, end) for begin, _, end in runs) * 1000


def train_step(objective, tokens: Tensor, context: Context, slices: int) -> Tensor:
    """Adds up the gradients of this rank's slices (n, length + 1); returns the part of the batch's loss, detached."""
    total = torch.zeros((), device=tokens.device)
    for row in tokens:
        loss = objective(row[:-1], row[1:].long(), context)
        (loss / len(tokens)).backward()  # a sum over a slice's tokens; a rank's slices are averaged, as are the ranks
        total += loss.detach()
    return total / (slices * (tokens.size(1) - 1))


def batch_loss(part: Tensor, stop: bool, world: World) -> Tensor:
    """A batch's loss and the wishes to stop, summed over ranks, which so stop together; on the way to the CPU."""
    pair = torch.stack((part, torch.full_like(part, stop)))
    if world.size > 1:
        dist.all_reduce(pair)
    return pair.to("cpu", non_blocking=True)


def validate(model: GPT, sequences: Tensor, context: Context, world: World) -> float:
    """Mean cross-entropy in nats per token over the sequences (n, length + 1), shared out over ranks."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for tokens in sequences[world.rank :: world.size].to(world.device):
        total += model.evaluate(tokens[:-1], tokens[1:].long(), context).sum(dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / (sequences.size(0) * (sequences.size(1) - 1))


def warm_up(settings: Settings, model: GPT, objective, optimizer: Optimizer, world: World) -> None:
    """Runs every graph that training will need, on tokens made up, then puts model and optimizer back as they were."""
    tensors = [*model.parameters(), *(value for each in optimizer.state.values() for value in each.values())]
    before = [(tensor.detach().to("cpu", copy=True), tensor.grad) for tensor in tensors]
    counters = optimizer.updates, optimizer.tied, list(optimizer.touched)
    model.zero_grad()
    shapes = {(stage.batch_tokens // settings.slices, stage.windows): stage for stage in settings.all_stages}
    longest = max(settings.val_seq_len, *(length for length, _ in shapes))
    made_up = torch.arange(longest + 1, dtype=torch.int32, device=world.device)[None] % settings.model.vocab_size
    mtp = torch.tensor(schedule(settings, 0).mtp, device=world.device)
    for (length, windows), stage in tqdm(shapes.items(), "warm-up", leave=False, disable=world.rank > 0 or None):
        context = make_context(settings.model, length, windows, model.embed)._replace(mtp=mtp)
        tokens = made_up[:, : length + 1]
        for adam in (False, True, True):  # the last has embed's own update, where the one before untied it
            if optimizer.sparse:
                optimizer.touched.append(touched_rows(tokens.cpu(), settings.model))
            train_step(objective, tokens, context, settings.slices)
            optimizer.step(schedule(settings, 0)._replace(stage=stage, adam=adam))
    final = schedule(settings, settings.total_steps).stage
    for windows in dict.fromkeys(stage.windows for stage in (final, *settings.all_stages)):
        context = make_context(settings.model, settings.val_seq_len, windows, model.embed)
        validate(model, made_up[:, : settings.val_seq_len + 1].expand(world.size, -1), context, world)

    for tensor, (value, grad) in zip(tensors, before):
        tensor.data.copy_(value)
        tensor.grad = grad
    optimizer.updates, optimizer.tied, optimizer.touched = counters


def output_of(*command: str) -> str:
    """What a program prints, started where this file lies; `none` if there is no such program, or it fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    return "none"


def hardware_name(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""  # Linux has it
    models = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def log_header(settings: Settings, world: World, files: dict[str, dict[str, int]]) -> str:
    """Source, environment, settings and data, so that the log alone says what was run."""
    rule, source = "=" * 100, Path(__file__).read_bytes()
    smi = [output_of("nvidia-smi")] if world.device.type == "cuda" else []
    git = output_of(*"git --no-optional-locks describe --always --exclude=* --abbrev=40 --dirty".split())
    lines = [rule, f"source: {len(source)} bytes, sha256 {hashlib.sha256(source).hexdigest()}"]
    lines += [f"python: {platform.python_version()}", f"pytorch: {torch.__version__}"]
    lines += [f"cuda: {torch.version.cuda or 'none'}", f"triton: {triton.__version__ if triton else 'none'}"]
    lines += [f"hardware: {hardware_name(world)}", *smi, f"world size: {world.size}"]
    lines += [f"git: {git.replace('-', ' ')}", f"settings: {json.dumps(asdict(settings))}"]
    lines += [f"data: {part} {path} {n:,} tokens" for part, sizes in files.items() for path, n in sizes.items()]
    return "\n".join((source.decode().removesuffix("\n"), *lines, rule))


class Log:
    """The run's record `logs/<run id>.txt`, its lines on the screen, and --wandb's mirror; only rank 0 has them."""

    def __init__(self, settings: Settings, world: World, files: dict[str, dict[str, int]]):
        name = settings.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.preset}-{os.urandom(2).hex()}"
        self.path, self.total = Path("logs") / f"{name}.txt", settings.total_steps
        self.file = self.wandb = None
        self.terminal = world.rank == 0 and sys.stdout.isatty()
        if world.rank > 0:
            return
        header = log_header(settings, world, files)
        try:
            self.path.parent.mkdir(exist_ok=True)
            self.file = open(self.path, "x", encoding="utf-8")
            print(header, file=self.file, flush=True)
        except OSError as error:
            if self.file:
                self.path.unlink()  # a log is whole, or not there
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; choose another --run-id") from None
        if settings.wandb:
            wandb = importlib.import_module("wandb")
            self.wandb = wandb.init(project=settings.wandb, name=name, config=asdict(settings))
        self.line(f"log: {self.path}", file=False)

    def line(self, text: str, file: bool = True, screen: bool = True) -> None:
        """Writes a line into the file and onto the screen, above the status line."""
        try:
            if self.file and file:
                print(text, file=self.file, flush=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self.file and screen:
            tqdm.write(text) if self.terminal else print(text, flush=True)

    def loss(self, step: int, kind: str, loss: float, milliseconds: float) -> None:
        """A step's train_loss or val_loss, and the training time up to there; UserError if it is not finite."""
        if not math.isfinite(loss):
            self.line(f"loss is not finite: step {step}")
            raise UserError(f"the loss of step {step} is {loss}; the run was stopped", status=3)
        average = milliseconds / max(step, 1)
        if self.wandb:
            self.wandb.log({kind: loss, "train_time": milliseconds / 1000, "step_avg": average}, step=step)
        text = f"step:{step}/{self.total} {kind}:{loss:.4f} train_time:{milliseconds:.0f}ms step_avg:{average:.2f}ms"
        self.line(text, screen=kind == "val_loss" or not self.terminal)  # a terminal has the status line instead


def peak_memory(device: torch.device) -> str:
    """The log's last line. On the CPU both numbers are the process's largest resident set."""
    if device.type == "cuda":
        sizes = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        import resource  # not on Windows

        sizes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10),) * 2
    return "peak memory allocated: {} MiB reserved: {} MiB".format(*(size >> 20 for size in sizes))


def save_checkpoint(log: Log, settings: Settings, step: int, milliseconds: float, model: GPT, optimizer) -> None:
    """Writes `logs/<run id>_step000010.pt`, whole or not at all; a disk that is full does not end the run."""
    state = {"optimizer": optimizer.state_dict()}  # on all ranks, since each has a part
    if not log.file:
        return
    state |= {"settings": asdict(settings), "step": step, "train_time_ms": milliseconds, "rng": torch.get_rng_state()}
    state["model"] = {name: p.detach().cpu() for name, p in model.named_parameters()}
    path = log.path.with_name(f"{log.path.stem}_step{step:06}.pt")
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        log.line(f"checkpoint: {path}")
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns the one into the other
        unfinished.unlink(missing_ok=True)
        log.line(f"checkpoint not written: {path}: {getattr(error, 'strerror', None) or error}")


def load_checkpoint(path: str) -> dict:
    """What `save_checkpoint` has saved, on the CPU, with `settings` a `Settings`; UserError if it is damaged."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # PyTorch does not look at the checksums
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]  # as `asdict` makes it
        model = ModelConfig(**{**saved["model"], "layers": tuple(Layer(**row) for row in saved["model"]["layers"])})
        stages = {"stages": tuple(Stage(**row) for row in saved["stages"]), "extension": Stage(**saved["extension"])}
        return {**state, "settings": Settings(**{**saved, "model": model, **stages})}
    except Exception as error:
        damaged = "damaged, or no checkpoint of this train_gpt.py; use another"
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or damaged}") from None


def resume(settings: Settings, model: GPT, optimizer: Optimizer) -> tuple[int, float]:
    """Puts a checkpoint into model and optimizer; its step and its time, ms. UserError if it is another model's."""
    state = load_checkpoint(settings.resume)
    step, saved = state["step"], state["settings"]
    theirs = {**vars(saved.model), "muon": saved.muon, "dtype": state["model"]["embed"].dtype}
    for name, ours in {**vars(settings.model), "muon": settings.muon, "dtype": model.embed.dtype}.items():
        if theirs[name] != ours:
            raise UserError(f"{settings.resume}: another model: its {name} is {theirs[name]}, this run's is {ours}")
    if step > settings.total_steps:
        raise UserError(f"{settings.resume}: step {step} is past the end of {settings.total_steps} steps")
    for name, p in model.named_parameters():
        p.data.copy_(resize(state["model"][name], len(p)))
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return step, state["train_time_ms"]


def complain(error: UserError) -> int:
    """The one line on stderr that says why a run ends, from rank 0; returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train_gpt.py: {error}", file=sys.stderr, flush=True)
    return error.status


def catch_signals(caught: list[UserError] | None = None) -> None:
    """SIGINT and SIGTERM end the process at once; where a list is given, the first is only put there."""

    def stop(signum: int, frame) -> None:
        error = UserError(f"stopped by {signal.Signals(signum).name}", status=128 + signum)
        if caught == []:
            caught.append(error)
        else:  # an exception would not do: raised inside a compiler or a destructor, it may be swallowed
            os._exit(complain(error))

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)


def train(settings: Settings, world: World) -> None:
    """The whole run: set-up, warm-up, and the loop of steps and validations, with its log."""
    plan, train_sizes = plan_batches(settings, find_shards(settings.train_files, settings.preset))
    sequences, val_sizes = validation_sequences(settings)
    model, objective, optimizer = build(settings, world)
    first, milliseconds = resume(settings, model, optimizer) if settings.resume else (0, 0.0)
    log = Log(settings, world, {"train": train_sizes, "val": val_sizes})
    try:
        how = compile_or_not(settings.compile)
        log.line(f"warm-up: {how} for {model.embed.dtype} on {world.device.type}", file=False)
        begin = time.perf_counter()
        warm_up(settings, model, objective, optimizer, world)
        log.line(f"warm-up took {time.perf_counter() - begin:.0f} s", file=False)
        if settings.resume:
            log.line(f"resumed from {settings.resume} after step {first}")
        gc.collect()
        gc.freeze()  # a collection over all that exists by now would stall a step
        look = {"bar_format": "{n}/{total} {bar} {elapsed} + {remaining} left{postfix}", "dynamic_ncols": True}
        with tqdm(total=settings.total_steps, initial=first, disable=not log.terminal, **look) as bar:
            loop(settings, world, log, bar, model, objective, optimizer, plan, sequences, first, milliseconds)
        log.line(peak_memory(world.device))
    finally:
        gc.unfreeze()  # what is left at the end would look like a leak to Triton's bindings
        if log.wandb:
            log.wandb.finish()


def loop(settings, world, log, bar, model, objective, optimizer, plan, sequences, first, milliseconds) -> None:
    """Steps and validations, from step `first` on. Nothing in a step waits for the device."""
    config, stages, device = settings.model, settings.all_stages, world.device
    total, own = settings.total_steps, settings.slices // world.size
    pending = collections.deque()  # step, loss and wishes to stop on their way, and when the step has ended
    stopping, signals = False, []
    peak = measure_peak(device, model.embed.dtype) * world.size
    costs = [(stage.batch_tokens, stage.batch_tokens * flops_per_token(config, stage) / peak) for stage in stages]
    work = np.repeat(costs, [stage.steps for stage in stages], axis=0).cumsum(0)  # tokens, seconds at the peak

    def report(late: int) -> bool:
        """Logs the losses of all steps but the `late` last ones; true if a rank wished to stop by then."""
        wishes = 0
        while len(pending) > late:
            step, pair, end = pending.popleft()
            passed = milliseconds + elapsed(begin, end)  # waits until the pair is there
            loss, wishes = pair.tolist()
            log.loss(step, "train_loss", loss, passed)
            speed, share = work[step - 1] / passed * 1000
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s, {share:.0%} of the floor", refresh=False)
            bar.update()
        return wishes > 0

    batches = training_batches(plan[first:], config, range(world.rank * own, (world.rank + 1) * own))
    batches = ((tokens, [touched_rows(tokens, config)] if optimizer.sparse else []) for tokens in batches)
    batches = prefetch((tokens.pin_memory() if device.type == "cuda" else tokens, rows) for tokens, rows in batches)
    hypers = [schedule(settings, step) for step in range(total + 1)]
    mtp = torch.tensor([hyper.mtp for hyper in hypers], device=device)
    catch_signals(signals)
    begin = mark(device)
    for step, hyper in enumerate(hypers[first:], first):
        validates = step in (0, total) or (step > first and step % settings.val_every == 0)
        saves = step > first and settings.checkpoint_every and (stopping or step % settings.checkpoint_every == 0)
        saves = saves or settings.checkpoint_last and (stopping or step == total)
        if validates or saves or stopping:
            report(late=0)
            milliseconds += elapsed(begin, mark(device))
            if validates and not stopping:
                windows, rotary = hyper.stage.windows, rotary_state(settings, step)
                val_context = make_context(config, settings.val_seq_len, windows, model.embed, rotary)
                log.loss(step, "val_loss", validate(model, sequences, val_context, world), milliseconds)
            if saves:
                save_checkpoint(log, settings, step, milliseconds, model, optimizer)
            if stopping:
                log.line(f"stopped by a signal after step {step}")
                raise signals[0] if signals else UserError("stopped by SIGINT or SIGTERM on another rank", status=143)
            begin = mark(device)
        if step == total:
            break
        if step == first or hyper.stage != hypers[step - 1].stage:
            rotary = rotary_state(settings, step)
            context = make_context(config, plan[step].length, hyper.stage.windows, model.embed, rotary)
        tokens, rows = next(batches)
        optimizer.touched += rows
        tokens = tokens.to(device, non_blocking=True)
        loss = train_step(objective, tokens, context._replace(mtp=mtp[step]), settings.slices)
        optimizer.step(hyper)
        pending.append((step + 1, batch_loss(loss, bool(signals), world), mark(device)))
        stopping = report(late=8 if device.type == "cuda" else 0)  # so late a loss has long arrived


# 9. Command line ======================================================================================================
# Every scalar of `Settings` and `ModelConfig` is an option; its type, limits, default and help come from there.


def check_settings(settings: Settings, world_size: int) -> None:
    """UserError unless batches, widths and sequences divide evenly, and what the settings ask for is possible."""
    config, slices, tokens, length = settings.model, settings.slices, settings.val_tokens, settings.val_seq_len
    dim, heads, vocab = config.dim, config.heads, config.padded_vocab
    batches = sorted({stage.batch_tokens for stage in settings.all_stages})
    common = math.gcd(*batches)
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    size = min(divisors, key=lambda n: abs(n - world_size))
    near = sorted((n for n in divisors if n % size == 0), key=lambda n: abs(n - slices))[:2]
    numbers = f"{', '.join(f'{n:,}' for n in batches)} tokens, {slices} slices and world size {world_size}"
    advice = f"nearest that work with world size {size}: --slices {' or '.join(map(str, near))}"
    whole = f"nearest that works: --val-tokens {max(tokens // length, 1) * length}"
    pairs = config.paired_heads or config.head_pairs or config.mudd
    rules = {
        f"batches of {numbers} do not divide; {advice}": slices not in divisors or slices % world_size,
        f"{world_size} processes cannot share --dim {dim} and vocabulary {vocab}": math.gcd(dim, vocab) % world_size,
        # The gates read twelve channels.
        f"--dim {dim} must be at least 12, and --heads {heads} times a multiple of 4": dim < 12 or dim % (4 * heads),
        f"--heads {heads} must be even for --paired-heads, --head-pairs and --mudd": pairs and heads % 2,
        f"--bigram-dim {config.bigram_dim} is larger than --dim {dim}": config.bigram_dim > dim,
        f"--val-tokens {tokens} is no multiple of --val-seq-len {length}; {whole}": tokens % length,
        "--wandb needs the package wandb: pip install wandb": settings.wandb and not importlib.util.find_spec("wandb"),
    }
    if wrong := [text for text, broken in rules.items() if broken]:
        raise UserError(wrong[0])


def estimate_memory(settings: Settings, model: GPT, world_size: int) -> int:
    """Bytes of a process, roughly: weights, gradients, optimizer state, and activations of a slice or of validation."""
    config = settings.model
    weights = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    state = sum(p.numel() * (6 if model.table[name].kind == "bank" else 8) for name, p in model.named_parameters())
    length = max(stage.batch_tokens for stage in settings.all_stages) // settings.slices
    item = model.embed.element_size()
    # A layer keeps about 20 D for its backward pass; the head its logits, their sigmoid and the gradient.
    training = length * item * (20 * config.dim * len(config.layers) + 3 * config.padded_vocab)
    validation = settings.val_seq_len * item * 12 * config.dim + VAL_CHUNK * (item + 8) * config.padded_vocab
    return int(weights + state / world_size + max(training, validation))


def print_plan(settings: Settings, world: World) -> None:
    """What --dry-run prints: the run's parameters, tokens, arithmetic, memory, schedule and times."""
    config, stages, dtype = settings.model, settings.all_stages, choose_dtype(settings, world.device)
    with torch.device("meta"):
        model = GPT(config, dtype)
    steps = f"{settings.total_steps:,} steps of {settings.slices} slices"
    print(f"preset {settings.preset}: {steps}, {dtype}, on {hardware_name(world)}\n")

    columns = "{:16}{:>15}{:>14}  {:28}{:9}{:>6}{:>6}  {}"
    print(columns.format("parameter", "shape", "count", "start", "optimizer", "lr x", "wd x", "betas"))
    for name, p in model.named_parameters():
        row, shape = model.table[name], " x ".join(map(str, p.shape))
        start = row.start if isinstance(row.start, str) else f"{row.start:.5g}"
        adam, muon = ("Adam", row.lr, row.wd, row.betas), ("NorMuon", 1, 1, (settings.momentum, settings.muon_beta2))
        how = muon if settings.muon and row.kind == "bank" else adam
        print(columns.format(name, shape, f"{p.numel():,}", start, *map(str, how)))
    size = {name: p.numel() for name, p in model.named_parameters()}
    active = {"head": size["lm_head"], "MLP": size["mlp_bank"], "attention": size["qk_bank"] + size["vo_bank"]}
    parts = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in active.items())
    print(f"{'total':31}{sum(size.values()):>14,}")
    print(f"active matrix parameters: {sum(active.values()) / 1e6:.1f}M ({parts})\n")

    print("stage      steps     batch  max_seq_len     windows")
    for name, stage in zip([*range(1, len(stages)), "extension"], stages):
        windows = "{}, {}".format(*stage.windows)
        print(f"{name:<10}{stage.steps:>6}{stage.batch_tokens:>10,}{stage.max_seq_len:>13,}{windows:>12}")
    tokens = [stage.steps * stage.batch_tokens for stage in stages]
    flops = sum(count * flops_per_token(config, stage) for count, stage in zip(tokens, stages))
    print(f"training tokens: {sum(tokens) / 1e6:.1f}M; validation tokens: {settings.val_tokens / 1e6:.1f}M")
    print(f"arithmetic: {flops / sum(tokens) / 1e9:.2f} GFLOP a token, {flops / 1e15:.3g} PFLOP in all")
    print(f"memory: about {estimate_memory(settings, model, world.size) / 2**30:.1f} GiB a process")
    peak = measure_peak(world.device, dtype) * world.size
    floor = flops / peak
    print(f"time: {floor:,.0f} s at the floor ({peak / 1e12:.3g} TFLOP/s measured), {floor / 0.45:,.0f} s at 45 %")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def convert(f: Field, kind: type, text: str):
    """An option's text as a value of the field; UserError if it cannot be one."""
    low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", 2**31 - 1 if kind is int else math.inf)
    with contextlib.suppress(KeyError, ValueError):
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is str or low <= value <= high:
            return value
    wanted = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
    limits = "".join(f", {words} {n}" for words, n in (("at least", low), ("at most", high)) if math.isfinite(n))
    raise UserError(f"{option(f.name)} {text}: must be {wanted}{limits}")


def parse_arguments(arguments: list[str]) -> tuple[Settings, bool]:
    """The settings that the command line asks for, and whether it is a --dry-run."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="record", help="the experiment (default: record)")
    first.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop")
    preset = PRESETS[first.parse_known_args(arguments)[0].preset]

    usage = "train_gpt.py [--preset PRESET] [--dry-run] [--OPTION VALUE …]"
    parser = Parser(usage=usage, description=__doc__.split("\n\n")[0], allow_abbrev=False, parents=[first])
    for holder, title in ((preset, "run"), (preset.model, "model")):
        group = parser.add_argument_group(f"{title} (defaults of {preset.preset})")
        for f in (f for f in fields(holder) if "help" in f.metadata):
            kind, default = (get_args(f.type) or (f.type,))[0], getattr(holder, f.name)
            shown = " (default: %(default)s)" if default not in (None, "") else ""
            how = {"nargs": "?", "const": True} if kind is bool else {"choices": f.metadata.get("choices")}
            how |= {"metavar": kind.__name__.upper(), "default": default, "help": f.metadata["help"] + shown}
            group.add_argument(option(f.name), type=functools.partial(convert, f, kind), **how)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], map(option, vars(parsed)), n=1, cutoff=0.0)
        raise UserError(f"unknown option {unknown[0]}; the closest that exists is {near[0]} (--help lists all)")
    values = vars(parsed)
    own, model = ({name: values[name] for name in values.keys() & vars(of)} for of in (preset, preset.model))
    settings = replace(preset, **own, model=replace(preset.model, **model))
    return (with_steps(settings, settings.steps) if settings.steps is not None else settings), parsed.dry_run


def main(arguments: list[str]) -> int:
    """Runs the command line. Exit status: 0 done, 2 a user's mistake, 3 the loss is not finite, 128 + the signal."""
    catch_signals()
    try:
        settings, dry_run = parse_arguments(arguments)
        world = find_world()
        check_settings(settings, world.size)
        if not dry_run:
            train(settings, world)
        elif world.rank == 0:
            print_plan(settings, world)
        return 0
    except (UserError, MemoryError, RuntimeError) as error:  # such as want of memory, or a rank that is gone
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # torchrun ends all ranks with the first that fails: leaves rank 0 the time to say why
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
            slices = settings.slices
            error = UserError(f"out of memory with {slices} slices; try --slices {2 * slices}, or a smaller model")
        if not isinstance(error, UserError):
            raise
        return complain(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
