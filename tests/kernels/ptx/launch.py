"""Triton's launches, executed on the CPU: `install("sm_90")`, then call the kernels with CPU tensors. What is compiled
is what would be launched, but for the assembler. Every second launch of a kernel runs its CTAs in reverse.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import minem.kernels
from tests.kernels.ptx.cta import Cta, Memory, Region
from tests.kernels.ptx.kernel import Kernel


@dataclass
class Launch:
    kernel: str
    variant: str  # hash of the compilation
    ctas: int
    idle_ctas: int = 0  # wrote nothing to global memory
    warp_instructions: int = 0  # PTX instructions times the warps that executed them
    bytes_read: int = 0
    bytes_written: int = 0


LAUNCHES: list[Launch] = []
EVERY: dict[str, int] = {}  # of these kernels only every n-th CTA is run, and counts for n


def install(target: str) -> None:
    """Let all Triton kernels run on their PTX. TRITON_INTERPRET must not be set; afterwards it is, for CPU tensors."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    for module in pkgutil.iter_modules(minem.kernels.__path__):
        importlib.import_module(f"minem.kernels.{module.name}")
    gpu = triton.backends.compiler.GPUTarget("cuda", int(target[3:]), 32)
    current = {"target": lambda: gpu, "device": lambda: 0, "stream": lambda device: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in current.items()}))
    CUDABackend.make_cubin = lambda *_: b""  # so these compilations need a cache of their own
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "ptx")
    compile_only = JITFunction.run
    kernels: dict[str, Kernel] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        kernel = kernels.get(compiled.hash) or kernels.setdefault(
            compiled.hash, Kernel(compiled.asm["ptx"], compiled.hash)
        )
        named = dict(zip((p.name for p in self.params), args, strict=False)) | options
        values = {name: named[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        LAUNCHES.append(launch(kernel, values, grid(named) if callable(grid) else grid, compiled.metadata.shared))
        return compiled

    JITFunction.run = run
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty: NaN and the largest integer


def launch(kernel: Kernel, arguments: dict[str, Any], grid: tuple[int, ...], shared_bytes: int = 0) -> Launch:
    """Run all CTAs of a launch, one after the other."""
    regions: list[Region] = []
    parameters: dict[str, int] = {}
    for parameter, (name, x) in zip(kernel.parameters, arguments.items(), strict=False):  # Triton adds two, always 0
        if isinstance(x, torch.Tensor):
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            regions += [Region(name, x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())] if x.numel() else []
            x = x.data_ptr()
        parameters[parameter] = int(np.float32(x).view(np.uint32)) if isinstance(x, float) else int(x) & (1 << 64) - 1
    memory = Memory(regions)
    places = [place[::-1] for place in np.ndindex((*grid, 1, 1)[2::-1])]
    done, every = Launch(kernel.name, kernel.variant, len(places)), EVERY.get(kernel.name, 1)
    with np.errstate(all="ignore"):
        for place in places[:: every * (-1 if kernel.launches % 2 else 1)]:
            for axis, x, size in zip("xyz", place, (*grid, 1, 1)[:3], strict=True):
                parameters |= {f"%ctaid.{axis}": x, f"%nctaid.{axis}": size}
            before = memory.bytes_written
            done.warp_instructions += every * Cta(kernel, memory, shared_bytes, parameters).run()
            done.idle_ctas += every * (memory.bytes_written == before)
    kernel.launches += 1
    done.bytes_read, done.bytes_written = every * memory.bytes_read, every * memory.bytes_written
    return done
