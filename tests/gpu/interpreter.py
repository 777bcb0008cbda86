"""Makes Triton's interpreter compute as a GPU does, where it does not: bf16 products, roundings, a GPU's instructions.

Its bf16 product multiplies bit patterns, float32 to bf16 truncates, casts to FP8 round wrongly, and comparisons have
the type of what they compare. `patch` has PyTorch do these; the instructions that train_gpt.py names are computed as
what they approximate. To be imported in a process that was started with TRITON_INTERPRET=1.
"""

from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float32: (torch.float32, np.float32),
    tl.float16: (torch.float16, np.float16),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
}


def convert(data: np.ndarray, source, target) -> np.ndarray:
    """Floating-point numbers, in the interpreter's representation, from one type of Triton's to another."""
    given = torch.from_numpy(np.array(data)).view(TYPES[source][0]) if data.size else torch.empty(data.shape)
    kind, bits = TYPES[target]
    return given.to(kind).view(getattr(torch, np.dtype(bits).name)).numpy()


INSTRUCTIONS = {
    "tanh.approx.f32": np.tanh,
    "ex2.approx.ftz.f32": np.exp2,
    "cvt.rn.bf16x2.f32": lambda data: convert(data, tl.float32, tl.bfloat16),
}


def patch() -> None:
    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self, source, target, rounding_mode=None):
        types = source.dtype.scalar, target.scalar
        if types[0] in TYPES and types[1] in TYPES:
            return interpreter.TensorHandle(convert(source.data, *types), types[1])
        return plain_cast(self, source, target)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (convert(each.data, each.dtype.scalar, tl.float32) for each in (a, b))
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    def inline_asm(self, asm, constraints, values, types, is_pure, pack):
        output = interpreter.TensorHandle(INSTRUCTIONS[asm.split()[0]](values[0].data), types[0].scalar)
        return SimpleNamespace(get_result=lambda number: output)

    def typed(compare):
        return lambda self, a, b: interpreter.TensorHandle(compare(self, a, b).data, tl.int1)

    for name in list(vars(builder)):
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(builder, name, typed(getattr(builder, name)))
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, cast, dot
    builder.create_inline_asm = inline_asm
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast)
