"""Registers, spills and shared memory of each kernel, compiled ahead of time for a GPU that need not be present.

    python bench/resources.py --target sm_90

Every public operation is called as the toolkit calls it, at the shapes of eight models, on tensors without data (device
"meta"), under a driver that names the target and launches nothing: what is compiled is what would run. Registers and
stack come from triton's cuobjdump. Spilled registers live on the stack: any stack is a spill and the exit code 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from torch import Tensor

from minem.kernels import decode_attention, linear_cross_entropy, rms_norm, rotary, sample, swiglu
from minem.kernels.attention import ROWS
from minem.kernels.backend import triton
from minem.kernels.rope import CacheWrite
from minem.kernels.step import begin_step, end_step


class Shape(NamedTuple):
    """A model's numbers that the kernels' shapes depend on."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int


SHAPES = (
    Shape("qwen2.5-0.5b", 896, 14, 2, 64, 4864, 151_936),
    Shape("qwen2.5-3b", 2048, 16, 2, 128, 11_008, 151_936),
    Shape("llama-3.2-1b", 2048, 32, 8, 64, 8192, 128_256),
    Shape("llama-3.2-3b", 3072, 24, 8, 128, 8192, 128_256),
)
# Also compiled: tiny and wide rows, other numbers of queries for each key head.
OTHERS = (
    Shape("toy", 128, 4, 4, 32, 320, 278),
    Shape("qwen3-0.6b", 1024, 16, 8, 128, 3072, 151_936),
    Shape("llama-3.1-8b", 4096, 32, 8, 128, 14_336, 128_256),
    Shape("llama-2-7b", 4096, 32, 32, 128, 11_008, 32_000),
)
# Ampere to Blackwell; the compiler aborts on other numbers
TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
Calls = Iterator[tuple[str, Callable[[], object]]]  # (variant, call)


class Resources(NamedTuple):
    """One compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory a program."""

    kernel: str
    variant: str
    registers: int
    spills: int
    shared_bytes: int


def measure(target: str, shapes: Sequence[Shape] = (*SHAPES, *OTHERS)) -> list[Resources]:
    """Compile every kernel for one of TARGETS, each distinct compilation once."""
    gpu = triton.backends.compiler.GPUTarget("cuda", int(target[3:]), 32)
    current = {"target": lambda: gpu, "device": lambda: 0, "stream": lambda device: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in current.items()}))
    captured: list[Any] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        captured.append(run(function, *args, grid=grid, warmup=True, **kwargs))
        return captured[-1]

    results: dict[str, Resources] = {}
    with patch.object(triton.runtime.jit.JITFunction, "run", compile_only):
        for variant, call in _calls(shapes):
            captured.clear()
            call()
            for kernel in captured:
                results.setdefault(kernel.hash, _read(kernel, variant))
    return list(results.values())


def _read(kernel: Any, variant: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage is not None, text
    registers, stack, local = map(int, usage.groups())
    return Resources(
        kernel.metadata.name.strip("_").removesuffix("_kernel"),
        variant,
        registers,
        stack + local,
        kernel.metadata.shared,
    )


def _calls(shapes: Sequence[Shape]) -> Calls:
    """Every operation, shape and dtype that the toolkit launches."""
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):  # fp16 compiles to what bf16 does
            for calls in CALLS:
                for variant, call in calls(shape, dtype):
                    yield f"{shape.name} {str(dtype).removeprefix('torch.')} {variant}".strip(), call


def _empty(*size: int, dtype: torch.dtype = torch.int64, grad: bool = False) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta", requires_grad=grad)


def _loss_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    for variant, grad in (("forward+backward", True), ("forward", False)):
        hidden = _empty(4096, shape.width, dtype=dtype, grad=grad)
        head = _empty(shape.vocabulary, shape.width, dtype=dtype, grad=grad)
        yield variant, partial(linear_cross_entropy, hidden, head, _empty(4096), backend="triton")


def _sample_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    for rows, stops in ((256, 2), (1, 1)):  # a number that is 1 compiles to other code
        logits, floats = _empty(rows, shape.vocabulary, dtype=dtype), _empty(rows, dtype=torch.float32)
        ints = _empty(rows)
        draw = partial(sample, logits, floats, ints, floats, floats, ints, ints, backend="triton")
        yield f"B={rows}", draw
        yield f"B={rows}, stop tokens: {stops}", partial(draw, stop_ids=_empty(stops), min_tokens=ints)


def _attention_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    for rows, n in ((256, max(1, ROWS * shape.kv_heads // shape.heads)), (1, 1)):
        qkv, index = _empty(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype), _empty(rows)
        prefix, suffix = (_empty(rows + 1, shape.kv_heads, n, shape.head_dim, dtype=dtype) for n in (320, 1024))
        arguments = (qkv, prefix, prefix, _empty(rows + 1), _empty(rows, n), index, suffix, suffix, index)
        angle, norm = _empty(rows, shape.head_dim // 2, dtype=dtype), _empty(shape.head_dim, dtype=dtype)
        turn = {"heads": shape.heads, "cos": angle, "sin": angle}
        attend = partial(decode_attention, *arguments, **turn, suffix_rows=index, backend="triton")
        yield f"B={rows} n={n}", attend
        yield f"B={rows} n={n} slots", partial(attend, prefix_rows=index)  # as the generator calls it
        yield f"B={rows} n={n} slots norms", partial(attend, prefix_rows=index, q_norm=norm, k_norm=norm)


def _norm_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    def forward_backward(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
        torch.autograd.backward(rms_norm(x, weight, 1e-6, residual, backend="triton"), (x, x))

    width = (_empty(4096, shape.width, dtype=dtype, grad=True), _empty(shape.width, dtype=dtype, grad=True))
    head = (_empty(4096, shape.heads, shape.head_dim, dtype=dtype, grad=True), _empty(shape.head_dim, dtype=dtype))
    yield "", partial(forward_backward, *width, None)
    yield "residual", partial(forward_backward, *width, width[0])
    yield "heads", partial(forward_backward, *head, None)


def _swiglu_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    gate_up = _empty(4096, 2 * shape.mlp_width, dtype=dtype, grad=True)
    grad = _empty(4096, shape.mlp_width, dtype=dtype)
    yield "", lambda: swiglu(gate_up, backend="triton").backward(grad)


def _rotary_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    qkv = _empty(256, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    angle, norm = _empty(256, shape.head_dim // 2, dtype=dtype), _empty(shape.head_dim, dtype=dtype)
    segment, index = _empty(256, shape.kv_heads, 512, shape.head_dim, dtype=dtype), _empty(256)
    turn = partial(rotary, qkv, angle, angle, shape.heads, backend="triton")
    write = CacheWrite(segment, segment, index, index)
    yield "", turn
    yield "cache", partial(turn, cache=write)
    yield "norms cache", partial(turn, q_norm=norm, k_norm=norm, cache=write)


def _step_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    ints, floats = _empty(8, 257), _empty(3, 257, dtype=torch.float32)
    rotation, slots = _empty(2, 1536, shape.head_dim // 2, dtype=dtype), _empty(256)
    yield "begin", partial(begin_step, ints, floats, rotation, slots, backend="triton")
    draws = slots, floats[0, :256], floats[1, :256]
    yield "end", partial(end_step, ints, slots, draws, _empty(2), backend="triton")


CALLS = (_loss_calls, _sample_calls, _attention_calls, _norm_calls, _swiglu_calls, _rotary_calls, _step_calls)


@click.command()
@click.option("--target", type=click.Choice(TARGETS), default="sm_90", show_default=True)
def main(target: str) -> None:
    """Compile every kernel for TARGET; print registers, spills and shared memory. Needs no GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("unset TRITON_INTERPRET: the interpreter compiles nothing")
    results = measure(target)
    about = "each distinct compilation, under the first shape that asks for it"
    click.echo(f"{target}, triton {triton.__version__}: {about}")
    rows = [("kernel", "variant", "registers", "spills", "shared bytes"), *(tuple(map(str, row)) for row in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())
    if any(result.spills for result in results):
        click.echo(f"registers spill on {target}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
