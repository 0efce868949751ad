"""What each kernel costs on a GPU that need not be there: registers, spills and shared memory, ahead of time.

    python -m minem.kernels.resources --target sm_90
    python -m minem.kernels.resources --target sm_80 --json

Every public operation is called as the toolkit calls it, at the shapes of seven models, on tensors that have shapes but
no data (device "meta"), under a driver that names the target and launches nothing. So what is compiled is exactly what
would run, launch rule included. Registers and stack are read from the machine code by the cuobjdump that triton
carries; a spilled register lives on the stack, so any stack is counted as a spill. Exits with 1 if there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import click


class Shape(NamedTuple):
    """What of a model the kernels' shapes depend on."""

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
# Also compiled, for what they have that those have not: tiny and wide rows, other numbers of queries a key.
OTHERS = (
    Shape("toy", 128, 4, 4, 32, 320, 278),
    Shape("qwen3-0.6b", 1024, 16, 8, 128, 3072, 151_936),
    Shape("llama-3.1-8b", 4096, 32, 8, 128, 14_336, 128_256),
    Shape("llama-2-7b", 4096, 32, 32, 128, 11_008, 32_000),
)


TARGETS = (80, 86, 87, 89, 90, 100, 103, 120)  # Ampere to Blackwell; the compiler aborts on numbers it does not know


@dataclass(frozen=True)
class Resources:
    """One compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory a program."""

    kernel: str
    variant: str
    registers: int
    spills: int
    shared_bytes: int


def measure(target: str) -> list[Resources]:
    """Compile every kernel for `target` ("sm_80", "sm_90", ...), each distinct compilation once.

    Must run in a process whose triton was not imported under TRITON_INTERPRET=1. Raises ValueError for a target that is
    not of this form.
    """
    matched = re.fullmatch(r"sm_(\d+)", target)
    if matched is None or int(matched[1]) not in TARGETS:
        known = ", ".join(f"sm_{number}" for number in TARGETS)
        raise ValueError(f"target must be one of {known}, not {target!r}")
    import triton
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(_StubDriver(GPUTarget("cuda", int(matched[1]), 32)))
    results: dict[str, Resources] = {}
    with _capture_compilations() as captured:
        for variant, call in _calls():
            captured.clear()
            call()
            for kernel in captured:
                # one row for each distinct piece of machine code, under the first shape that asked for it
                results.setdefault(kernel.hash, _read(kernel, variant))
    return list(results.values())


class _StubDriver:
    """Enough of a triton driver to compile for a device that is not there."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _capture_compilations:
    """While active, launching a kernel only compiles it; the list holds what was compiled."""

    def __enter__(self) -> list[Any]:
        from triton.runtime.jit import JITFunction

        self.jit_function, self.run = JITFunction, JITFunction.run
        captured: list[Any] = []

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            captured.append(self.run(function, *args, grid=grid, warmup=True, **kwargs))
            return captured[-1]

        JITFunction.run = compile_only
        return captured

    def __exit__(self, *_: object) -> None:
        self.jit_function.run = self.run


def _read(kernel: Any, variant: str) -> Resources:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage is not None, text
    registers, stack, local = map(int, usage.groups())
    name = kernel.metadata.name.strip("_").removesuffix("_kernel")
    return Resources(name, variant, registers, stack + local, kernel.metadata.shared)


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call) for every operation, shape and dtype that the toolkit launches."""
    import torch

    for shape in (*SHAPES, *OTHERS):
        for dtype in (torch.bfloat16, torch.float32):  # fp16 compiles to what bf16 does
            for variant, call in chain(*(calls(shape, dtype) for calls in CALLS)):
                yield f"{shape.name} {str(dtype).removeprefix('torch.')} {variant}".strip(), call


def _empty(*size: int, dtype: Any, grad: bool = False) -> Any:
    import torch

    return torch.empty(*size, dtype=dtype, device="meta", requires_grad=grad)


def _loss_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from minem.kernels import linear_cross_entropy

    targets = _empty(4096, dtype=torch.int64)
    for variant, grad in (("forward+backward", True), ("forward", False)):
        hidden = _empty(4096, shape.width, dtype=dtype, grad=grad)
        head = _empty(shape.vocabulary, shape.width, dtype=dtype, grad=grad)
        yield variant, partial(linear_cross_entropy, hidden, head, targets, backend="triton")


def _sample_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from minem.kernels import sample

    logits = _empty(256, shape.vocabulary, dtype=dtype)
    numbers, integers = _empty(256, dtype=torch.float32), _empty(256, dtype=torch.int64)
    draw = partial(sample, logits, numbers, integers, numbers, numbers, integers, integers, backend="triton")
    yield "", draw
    yield "stop tokens", partial(draw, stop_ids=_empty(2, dtype=torch.int64), min_tokens=integers)


def _attention_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from minem.kernels import decode_attention
    from minem.kernels.attention import ROWS

    query = _empty(256, shape.heads, shape.head_dim, dtype=dtype)
    prefix, suffix = (_empty(257, shape.kv_heads, length, shape.head_dim, dtype=dtype) for length in (320, 1024))
    lengths, index, own = (_empty(n, dtype=torch.int64) for n in (257, 256, 256))
    siblings = _empty(256, max(1, ROWS * shape.kv_heads // shape.heads), dtype=torch.int64)
    attend = partial(
        decode_attention, query, prefix, prefix, lengths, siblings, index, suffix, suffix, own, backend="triton"
    )
    yield "", partial(attend, suffix_rows=index)
    yield "slots", partial(attend, prefix_rows=index, suffix_rows=index)  # as the generator calls it


def _norm_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from minem.kernels import rms_norm

    def forward_backward(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
        torch.autograd.backward(rms_norm(x, weight, 1e-6, residual, backend="triton"), (x, x))

    width = (_empty(4096, shape.width, dtype=dtype, grad=True), _empty(shape.width, dtype=dtype, grad=True))
    head = (_empty(4096, shape.heads, shape.head_dim, dtype=dtype, grad=True), _empty(shape.head_dim, dtype=dtype))
    yield "", partial(forward_backward, *width, None)
    yield "residual", partial(forward_backward, *width, width[0])
    yield "heads", partial(forward_backward, *head, None)


def _swiglu_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    from minem.kernels import swiglu

    gate_up = _empty(4096, 2 * shape.mlp_width, dtype=dtype, grad=True)
    grad = _empty(4096, shape.mlp_width, dtype=dtype)
    yield "", lambda: swiglu(gate_up, backend="triton").backward(grad)


def _rotary_calls(shape: Shape, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch

    from minem.kernels import rotary
    from minem.kernels.rope import CacheWrite

    qkv = _empty(256, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    angle, norm = _empty(256, shape.head_dim // 2, dtype=dtype), _empty(shape.head_dim, dtype=dtype)
    segment, index = _empty(256, shape.kv_heads, 512, shape.head_dim, dtype=dtype), _empty(256, dtype=torch.int64)
    turn = partial(rotary, qkv, angle, angle, shape.heads, backend="triton")
    write = CacheWrite(segment, segment, index, index)
    yield "", turn
    yield "cache", partial(turn, cache=write)
    yield "norms cache", partial(turn, q_norm=norm, k_norm=norm, cache=write)


CALLS = (_loss_calls, _sample_calls, _attention_calls, _norm_calls, _swiglu_calls, _rotary_calls)


def _table(results: list[Resources]) -> str:
    header = ("kernel", "variant", "registers", "spills", "shared bytes")
    rows = [header, *[tuple(str(value) for value in asdict(result).values()) for result in results]]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@click.command()
@click.option("--target", default="sm_90", show_default=True, help="The GPU architecture to compile for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def main(target: str, as_json: bool) -> None:
    """Registers, spills and shared memory of every kernel, compiled for TARGET without a GPU."""
    import json
    import sys

    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is first imported, which is below
    try:
        results = measure(target)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        click.echo(json.dumps({"target": target, "kernels": [asdict(result) for result in results]}))
    else:
        import triton

        click.echo(
            f"{target}, triton {triton.__version__}: each distinct compilation, under the first shape that asks for it"
        )
        click.echo(_table(results))
    if any(result.spills for result in results):
        click.echo(f"registers spill on {target}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
