"""A CUDA device that is not there: on a machine without a GPU, what one would run is traced and compiled in full.

    compiled = fake_cuda.pretend(90)     before anything imports torch; it holds for the rest of the process
    with fake_cuda.tensors(): ...        tensors on "cuda" have shapes, and no numbers

PyTorch's fake tensors trace and differentiate, Inductor writes the kernels, and Triton compiles them to machine code
for the target. In place of what was compiled its graph runs, on fake tensors. It needs a C++ compiler and Triton, and
reaches into PyTorch's own code, as of versions 2.11 and 2.13; builds for the CPU and for CUDA both serve.
"""

import copy
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

# What autograd's engine and device guards ask of a device: that there is one, and that switching to it does nothing.
SHIM = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
using namespace c10;
const Device gpu(DeviceType::CUDA, 0);
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
};
extern "C" void register_guard() { static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard()); }
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, CUDAHooks)
}
"""
# Bytes of shared memory that a block may take, which the compiler does not check.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@dataclass
class Compiled:
    """What Triton has compiled: seconds by kernel, and what its sets of block sizes take.

    These are the name, the registers and the bytes of stack of a thread, and the bytes of shared memory.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, int, int, int]] = field(default_factory=list)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, by Triton's own cuobjdump."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def load_shim(torch: Path) -> None:
    """Compiles the shim against PyTorch's headers and registers it in place of what a build for CUDA registers.

    Hooks are looked up once, so these come before the import of PyTorch; of the guards the last one registered holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "shim.cpp", Path(folder) / "shim.so"
        source.write_text(SHIM)
        paths = [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, *paths, "-o", library], check=True)
        shim = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import_module("torch")
    shim.register_guard()


def pretend(target: int) -> Compiled:
    """Has PyTorch and Triton believe in one GPU of a compute capability (times ten); returns where kernels will be."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_cuda.pretend comes before the import of torch")
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    needs = {
        "Triton": importlib.util.find_spec("triton"),
        "g++": shutil.which("g++"),
    }
    for what, there in needs.items():
        if not there:
            raise RuntimeError(f"pretending that there is a GPU needs {what}")
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled|Accessing the data pointer of FakeTensor")
    # Kernels are compiled in this process, where they are counted, and none comes from a cache.
    os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    load_shim(torch)
    compiled = Compiled()
    set_device(target)
    set_driver(target, compiled)
    set_compiler(compiled)
    return compiled


def set_device(target: int) -> None:
    """Gives torch.cuda its answers, before Inductor takes hold of its functions."""
    import torch

    major, minor, limit = target // 10, target % 10, SHARED[target]
    properties = SimpleNamespace(
        name="fake", major=major, minor=minor, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
        max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=limit, L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=limit + 1024, gcnArchName="",
    )  # fmt: skip
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "get_device_capability": (major, minor), "get_device_properties": properties, "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    # Dynamo has what it traces know a GPU's properties, if they are of a type that it takes for constant.
    from torch._dynamo import utils

    utils.common_constant_types.add(SimpleNamespace)


def set_compiler(compiled: Compiled) -> None:
    """Keeps Inductor from running anything on the device, and notes what it compiles."""
    import torch
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes import fuse_attention
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = fuse_attention._sfdp_init = lambda *args: None
    triton_helpers.set_driver_to_gpu = lambda: None
    config.joint_graph_constant_folding = config.shape_padding = config.use_static_triton_launcher = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compile_graph, precompile = compile_fx._InProcessFxCompile.codegen_and_compile, CachingAutotuner.precompile

    def codegen_and_compile(self, graph, *args, **options):
        kept = copy.deepcopy(graph)
        output = compile_graph(self, graph, *args, **options)
        output.current_callable = lambda inputs: torch.fx.Interpreter(kept).run(*inputs)
        return output

    def timed(self, *args, **options):
        begin = time.perf_counter()
        precompile(self, *args, **options)
        compiled.seconds[self.fn.__name__] = time.perf_counter() - begin

    compile_fx._InProcessFxCompile.codegen_and_compile = codegen_and_compile
    CachingAutotuner.precompile = timed


def set_driver(target: int, compiled: Compiled) -> None:
    """Gives Triton a driver that loads nothing, and notes what it is given."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    limit = SHARED[target]

    class Utils:
        def get_device_properties(self, device):
            return {"max_shared_mem": limit}

        def load_binary(self, name, cubin, shared, device):
            if shared > limit:
                raise OutOfResources(shared, limit, "shared memory")
            registers, stack = resources(cubin)
            compiled.kernels.append((name, registers, stack, shared))
            return 0, 0, registers, stack // 4, 1024  # module, function, registers, spilled ones, most threads

        def unload_module(self, module):
            pass

    class Driver:
        utils = Utils()

        def get_current_target(self):
            return GPUTarget("cuda", target, 32)

        def get_current_device(self):
            return 0

        def launcher_cls(self, source, metadata):
            return lambda *args, **options: None

    driver.set_active(Driver())


def tensors():
    """Where this is the context, new tensors are fake."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def place(model):
    """Puts a module's parameters and buffers on the device, where tensors are fake; returns it."""
    import torch

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        setattr(model, name, torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake)
    return model
