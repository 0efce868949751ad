"""Triton's launches, executed on the CPU: `install("sm_90")`, then call the kernels with CPU tensors.

What Triton compiles is what it would launch; the assembler, which knows nothing about right or wrong, is left out.
Every second launch of a kernel runs its CTAs in reverse: results must not depend on their order.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import minem.kernels
from tests.kernels.ptx.cta import Cta, Kernel
from tests.kernels.ptx.memory import Memory, Region


@dataclass
class Launch:
    """What one launch did. warp_instructions: PTX instructions times the warps that executed them, over its CTAs."""

    kernel: str
    variant: str  # hash of the compilation
    ctas: int
    idle_ctas: int = 0  # wrote nothing to global memory
    warp_instructions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


LAUNCHES: list[Launch] = []
EVERY: dict[str, int] = {}  # of these kernels only every n-th CTA is run, and counts for n


def install(target: str) -> None:
    """Let every Triton kernel run on its PTX for the target. TRITON_INTERPRET must not be set before; afterwards it is,
    which lets the kernels take CPU tensors."""
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
        kernel = kernels.get(compiled.hash) or kernels.setdefault(compiled.hash, Kernel(compiled.asm["ptx"]))
        named = dict(zip((p.name for p in self.params), args, strict=False)) | options
        values = {name: named[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        size = grid(named) if callable(grid) else grid
        done = launch(kernel, values, tuple(size), compiled.metadata.shared)
        done.variant = compiled.hash
        LAUNCHES.append(done)
        return compiled

    JITFunction.run = run
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty: NaN and the largest integer


def launch(kernel: Kernel, arguments: dict[str, Any], grid: tuple[int, ...], shared_bytes: int = 0) -> Launch:
    """Run all CTAs of a launch, one after the other."""
    grid = (*grid, 1, 1)[:3]
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel()}
    memory = Memory([Region(name, *_span(x)) for name, x in tensors.items()])
    numbers = [_number(x) for x in arguments.values()] + [0, 0]  # and Triton's scratch memory, which is not asked for
    parameters = dict(zip(kernel.program.parameters, numbers, strict=False))
    places = [place[::-1] for place in np.ndindex(*grid[::-1])]
    done, every = Launch(kernel.program.name, "", len(places)), EVERY.get(kernel.program.name, 1)
    with np.errstate(all="ignore"):
        for place in places[:: every * (-1 if kernel.launches % 2 else 1)]:
            cta = Cta(kernel, memory, parameters, place, grid, shared_bytes)
            cta.run()
            done.idle_ctas += every * (cta.stores == 0)
            done.warp_instructions += every * cta.instructions
    kernel.launches += 1
    done.bytes_read, done.bytes_written = every * memory.bytes_read, every * memory.bytes_written
    return done


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _number(x: Any) -> int:
    """The bits of an argument: an address, a number, or a float as fp32."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return struct.unpack("<I", struct.pack("<f", x))[0] if isinstance(x, float) else int(x)
