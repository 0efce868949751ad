"""Triton's launches, executed on the CPU: `install("sm_90")`, then call the kernels with CPU tensors.

What Triton compiles is what it would launch; the assembler, which knows nothing about right or wrong, is left out.
Every second launch of a kernel runs its CTAs in reverse: results must not depend on their order.
"""

from __future__ import annotations

import importlib
import os
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.kernels.ptx.cta import Cta, Kernel
from tests.kernels.ptx.memory import Clock, Memory

OPERATIONS = ("attention", "cross_entropy", "gating", "norm", "rope", "sampling")


@dataclass
class Launch:
    """What one launch did. instructions: PTX instructions times the warps that executed them, over all CTAs."""

    kernel: str
    ctas: int = 0
    idle_ctas: int = 0  # stored nothing
    instructions: int = 0
    bytes_read: int = 0  # an address that several threads read in one instruction counts once
    bytes_written: int = 0


@dataclass
class Launches:
    each: list[Launch] = field(default_factory=list)
    variants: Counter[str] = field(default_factory=Counter)  # launches by kernel and hash of the compilation
    only: Any = None  # (place of a CTA in the grid) -> whether to run it


LAUNCHES = Launches()


def install(target: str) -> None:
    """Let every Triton kernel run on its PTX from now on. TRITON_INTERPRET must not have been set when it was made."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    for name in OPERATIONS:
        importlib.import_module(f"minem.kernels.{name}")
    gpu = triton.backends.compiler.GPUTarget("cuda", int(target[3:]), 32)
    current = {"target": lambda: gpu, "device": lambda: 0, "stream": lambda device: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in current.items()}))
    CUDABackend.make_cubin = lambda *_: b""  # so these compilations need a cache of their own
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "ptx")
    compile_only, kernels = JITFunction.run, {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in kernels:
            kernels[compiled.hash] = Kernel(compiled.asm["ptx"])
        named = dict(zip((p.name for p in self.params), args, strict=False)) | options
        values = [named[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        size = grid({**named}) if callable(grid) else grid
        launch(kernels[compiled.hash], dict(zip(names, values, strict=True)), tuple(size), compiled.metadata.shared)
        LAUNCHES.variants[f"{self.fn.__name__} {compiled.hash}"] += 1
        return compiled

    JITFunction.run = run
    os.environ["TRITON_INTERPRET"] = "1"  # what lets backend="triton" take a tensor on the CPU
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN and the largest integer


def launch(kernel: Kernel, arguments: dict[str, Any], grid: tuple[int, ...], shared_bytes: int) -> Launch:
    """Run all CTAs of a launch, one after the other."""
    grid = (*grid, 1, 1)[:3]
    tensors = {name: _span(x) for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel()}
    memory, clock = Memory(tensors), Clock()
    numbers = [_number(x) for x in arguments.values()]
    parameters = kernel.program.parameters
    numbers += [0] * (len(parameters) - len(numbers))  # scratch memory that these kernels do not ask for
    about = {name: number for (_, name), number in zip(parameters, numbers, strict=True)}
    done = Launch(kernel.program.name)
    places = [place[::-1] for place in np.ndindex(*grid[::-1])]
    with np.errstate(all="ignore"):
        for place in places if kernel.launches % 2 == 0 else places[::-1]:
            if LAUNCHES.only is None or LAUNCHES.only(place):
                cta = Cta(kernel, memory, clock, about, place, grid, shared_bytes)
                cta.run()
                done.ctas += 1
                done.idle_ctas += cta.stores == 0
                done.instructions += cta.instructions
    kernel.launches += 1
    done.bytes_read, done.bytes_written = memory.bytes_read, memory.bytes_written
    LAUNCHES.each.append(done)
    return done


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last: what lies between belongs to it or its base."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _number(x: Any) -> int:
    """The bits of an argument: an address, a number, or a float as fp32."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return struct.unpack("<I", struct.pack("<f", x))[0] if isinstance(x, float) else int(x)
