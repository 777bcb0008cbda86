"""An emulated GPU: what Inductor writes for CUDA runs on the CPU, with numbers.

    library = emulated_gpu.compile_device(folder)     once, 10 seconds
    emulated_gpu.start(library)                       in a fresh process, before anything imports torch

Memory is the CPU's, ATen's kernels are the CPU's (emulated_gpu.cpp), and Triton's kernels run in Triton's interpreter,
which computes with NumPy a block at a time. So it shows whether graphs and kernels compute the right numbers: indices,
masks, types, roundings, the order of mutations. It cannot show races, what the machine code does, or how fast it is.

It reaches into PyTorch's and Triton's own code, as of PyTorch 2.13 with Triton 3.6 to 3.9: `missing` says whether this
machine has what it takes.
"""

import ctypes
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
WIDEST = 1 << 17  # elements of a block


def missing() -> str:
    """What this machine lacks; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if not shutil.which("g++"):
        return "needs a C++ compiler"
    from importlib.metadata import version

    return "" if version("torch").startswith("2.13") else "needs PyTorch 2.13"


def compile_device(folder: Path) -> Path:
    """The compiled emulated_gpu.cpp."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    library = folder / "emulated_gpu.so"
    paths = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
    links = [f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", HERE / "emulated_gpu.cpp", *paths, *links]
    subprocess.run([*command, "-o", library], check=True)
    return library


def start(library: Path) -> None:
    """Makes this process's "cuda:0" the emulated one, of compute capability 9.0."""
    assert "torch" not in sys.modules, "emulated_gpu.start comes before the import of torch"
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "bench"), str(HERE / "gpu")]
    os.environ.update(
        TRITON_INTERPRET="1", TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"
    )
    device = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # hooks are looked up once, at the import
    import_module("torch")
    device.register_device()

    import fake_cuda

    fake_cuda.set_device(90)
    fake_cuda.set_driver(90, fake_cuda.Compiled())
    prepare_torch()
    answer_for_the_device()
    widen_blocks()
    multiply_fp8()

    import interpreter

    interpreter.patch()
    prepare_interpreter()


# ---- PyTorch -------------------------------------------------------------------------------------


def prepare_torch() -> None:
    import torch
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor

    def empty_strided(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    torch.autograd.set_multithreading_enabled(False)
    torch.cuda.set_device = lambda device: None
    torch._C._dynamo.guards._empty_strided_cuda = empty_strided  # what generated code calls
    torch._functorch.config.force_non_lazy_backward_lowering = True
    fake_tensor.init_gpu_context = fuse_attention._sfdp_init = lambda *args: None
    triton_helpers.set_driver_to_gpu = lambda: None
    config.shape_padding = config.use_static_triton_launcher = False


def answer_for_the_device() -> None:
    """What programs ask of torch.cuda: clocks, memory, a name."""
    import torch
    from triton.runtime import driver

    class Event:
        def __init__(self, enable_timing=False):
            self.record()

        def record(self):
            self.seconds = time.perf_counter()

        def elapsed_time(self, end):
            return 1000 * (end.seconds - self.seconds)

        def synchronize(self):
            pass

    stream = SimpleNamespace(record_event=lambda event: event)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    answers = {
        "current_stream": stream, "get_device_name": "emulated", "empty_cache": None, "reset_peak_memory_stats": None,
        "max_memory_allocated": memory, "max_memory_reserved": memory,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch.cuda.Event = Event
    device = driver.active  # what triton.testing.do_bench asks
    device.get_device_interface, device.get_empty_cache_for_benchmark = lambda: torch.cuda, lambda: None
    device.clear_cache = lambda cache: None
    torch.Tensor.pin_memory = lambda self: self
    # A square of this size is there to see how fast products are, and would take minutes.
    plain_mm = torch.mm
    torch.mm = lambda a, b, **options: a if a is b and len(a) == 8192 else plain_mm(a, b, **options)


def widen_blocks() -> None:
    """Gives generated kernels few large blocks: the interpreter takes about as long for a large one as for a small."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    plain_init = CachingAutotuner.__init__

    def init(self, *args, **options):
        plain_init(self, *args, **options)
        block = self.configs[0].kwargs
        kind = self.heuristic_type.name
        if kind not in ("POINTWISE", "REDUCTION", "PERSISTENT_REDUCTION") or not self.size_hints:
            return
        if "XBLOCK" not in block or "RSPLIT_SIZE" in block:
            return
        size = 1
        for axis, hint in self.size_hints.items():
            size *= block.get(f"{axis.upper()}BLOCK", hint)
        # Not above 4,096: where that divides the size, Inductor leaves the mask out.
        while block["XBLOCK"] < min(self.size_hints["x"], 4096) and size < WIDEST:
            block["XBLOCK"] *= 2
            size *= 2

    CachingAutotuner.__init__ = init


def multiply_fp8() -> None:
    """`_scaled_mm`, in float32; and what it asks of its inputs on a GPU."""
    from torch import library

    def product(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
        assert a.stride(1) == 1 and b.stride(0) == 1, "FP8 products want a by rows and b by columns"
        assert a.size(1) % 16 == 0 and b.size(1) % 16 == 0, "FP8 products want multiples of 16"
        y = (a.cpu().float() @ b.cpu().float()) * (scale_a.cpu() * scale_b.cpu())
        return y.to(out_dtype or a.dtype).cuda()

    def product_into(a, b, scale_a, scale_b, *rest, out, out_dtype=None, **options):
        return out.copy_(product(a, b, scale_a, scale_b, out_dtype=out_dtype or out.dtype))

    products = library.Library("aten", "IMPL")
    products.impl("_scaled_mm", product, "CUDA")
    products.impl("_scaled_mm.out", product_into, "CUDA")
    kept.append(products)


kept = []  # what is registered is taken back when nothing refers to it


# ---- Triton's interpreter ------------------------------------------------------------------------


def prepare_interpreter() -> None:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    triton.knobs.compilation.front_end_debugging = True  # an error in a kernel comes with its own traceback
    run_on_the_devices_memory(interpreter)
    call_as_functions(interpreter, tl)
    reduce_and_scan_by_slices(interpreter)
    compute_libdevice(interpreter, tl)


def run_on_the_devices_memory(interpreter) -> None:
    """The interpreter copies a GPU's tensors to the CPU and back; here they are there."""
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, options: (list(args), options)
    executor._restore_args_dev = lambda *args: None


def call_as_functions(interpreter, tl) -> None:
    """A kernel that calls another one gets its value; the language is patched once for all kernels."""
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def reduce_and_scan_by_slices(interpreter) -> None:
    """A reduction by any function, for whole slices along its axis; the interpreter goes element by element."""
    import numpy as np
    from torch._inductor.runtime import triton_helpers

    def slices(operation, inputs, axis):
        for i in range(inputs[0].handle.data.shape[axis]):
            yield tuple(
                operation.to_tensor(np.take(each.handle.data, i, axis=axis), each.dtype.scalar) for each in inputs
            )

    def combined(operation, one, other):
        both = operation.combine_fn.fn(*one, *other)
        return both if isinstance(both, tuple) else (both,)

    def reduce(self, inputs):
        axis = self.axis
        if axis is None:
            inputs, axis = self.unravel(inputs, axis)
        total, *others = slices(self, inputs, axis)
        for other in others:
            total = combined(self, total, other)
        outputs = []
        for result, given in zip(total, inputs):
            data = result.handle.data
            if self.axis is None:
                data = data.reshape((1,) * len(given.shape)) if self.keep_dims else data.item()
            elif self.keep_dims:
                data = np.expand_dims(data, axis)
            outputs.append(self.to_tensor(data, given.dtype.scalar))
        return outputs

    def scan(self, inputs):
        total, *others = slices(self, inputs, self.axis)
        totals = [total]
        for other in others:
            totals.append(combined(self, totals[-1], other))
        outputs = []
        for given, each in zip(inputs, zip(*totals)):
            shape = given.handle.data.shape
            shape = shape[: self.axis] + shape[self.axis + 1 :]
            datas = [np.asarray(part.handle.data).reshape(shape) for part in each]
            outputs.append(self.to_tensor(np.stack(datas, axis=self.axis), given.dtype.scalar))
        return outputs

    plain = interpreter.ReduceOps.apply_impl
    quick = {triton_helpers.maximum: np.max, triton_helpers.minimum: np.min}

    def apply(self, inputs):
        if self.combine_fn in quick:
            return self.min_max(inputs[0], quick[self.combine_fn])
        return plain(self, inputs)

    interpreter.ReduceOps.apply_impl = apply
    interpreter.ReduceOps.generic_reduce, interpreter.ScanOps.generic_scan = reduce, scan


def compute_libdevice(interpreter, tl) -> None:
    """CUDA's mathematical functions, which the interpreter has as stubs, by NumPy."""
    import numpy as np
    import torch
    from triton.language.extra import libdevice

    def erf(x):
        return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    functions = {
        "rsqrt": lambda x: 1 / np.sqrt(x), "pow": np.power, "nearbyint": np.rint, "erf": erf,
        **{name: getattr(np, name) for name in (
            "tanh", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "floor", "ceil", "sin", "cos", "fmod",
            "isnan", "isinf",
        )},
    }  # fmt: skip

    def computed(name):
        def call(*arguments):
            if name not in functions:
                raise NotImplementedError(f"libdevice.{name}")
            tensors = [interpreter.interpreter_semantic.to_tensor(each) for each in arguments]
            kind = next(each.dtype.scalar for each in tensors if each.dtype.is_floating())
            with np.errstate(all="ignore"):
                data = np.asarray(functions[name](*(each.handle.data for each in tensors)))
            if data.dtype == bool:
                kind, data = tl.int32, data.astype(np.int32)
            else:
                data = data.astype(tensors[0].handle.data.dtype)
            shape = np.broadcast_shapes(*(tuple(each.shape) for each in tensors))
            block = tl.block_type(kind, list(shape)) if shape else kind
            return tl.tensor(interpreter.TensorHandle(data, kind), block)

        return call

    for name in dir(libdevice):
        if not name.startswith("_") and name != "jit" and callable(getattr(libdevice, name)):
            setattr(libdevice, name, computed(name))


# ---- For whole programs --------------------------------------------------------------------------


def every_python(library: Path) -> dict[str, str]:
    """Environment variables with which every Python has the device: at its start it imports sitecustomize."""
    folder = library.parent / "start"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport emulated_gpu\nemulated_gpu.start({str(library)!r})\n"
    )
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


# ---- As a plugin of pytest: -p emulated_gpu ------------------------------------------------------


def pytest_load_initial_conftests() -> None:
    """Starts the device whose library EMULATED_GPU names, before any test imports torch."""
    start(Path(os.environ["EMULATED_GPU"]))
