"""Each kernel beside PyTorch and other libraries, with the floor that bytes and operations set.

    python bench/kernels.py                      # on a GPU: real shapes, some minutes; on a CPU: small shapes, seconds
    python bench/kernels.py --only sample --json # one operation; one JSON object on one line after the table

Contestants are plain PyTorch, torch.compile of it, torch's chunked loss, and, if installed, Liger-Kernel,
cut-cross-entropy and FlashInfer; a contestant that fails is listed with the reason. Before it is timed, every operation
is checked on fresh random inputs. Times are medians of many calls; on a GPU the L2 cache is flushed between them. The
floor is bytes over the device's copying rate plus operations over its matrix rate, both measured in the same run.
Without a GPU the eager references run, and the GPU's shapes are listed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import rich.table
import torch
import torch.nn.functional as F
from record import ceilings, facts, medians
from resources import SHAPES, Shape
from rich.console import Console
from torch import Tensor

from minem.kernels import decode_attention, linear_cross_entropy, rms_norm, rotary, sample, swiglu

TINY = Shape("tiny", 256, 8, 2, 32, 704, 16_384)  # for the CPU

COMPILED = "torch.compile"
PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "flashinfer-python")  # their versions are recorded


@dataclass
class Case:
    """One operation at one shape: bytes to move, operations to compute, contestants, and a check of our result."""

    operation: str
    shape: str
    bytes: float
    operations: float
    check: Callable[[], None]
    contestants: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def add_compiled(self, name: str) -> None:
        """Add torch.compile of one of the contestants (on a GPU; on a CPU it would need a C++ compiler)."""
        if torch.cuda.is_available():
            self.contestants[COMPILED] = torch.compile(self.contestants[name], dynamic=False)


@dataclass(frozen=True)
class Setting:
    """The device and the sizes of this run."""

    device: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    rows: int  # of the loss
    batch: int  # of a decode step
    tokens: int  # of a training micro-batch
    context: int


GPU = Setting("cuda", torch.bfloat16, SHAPES, rows=8192, batch=256, tokens=8192, context=512)
CPU = Setting("cpu", torch.float32, (TINY,), rows=256, batch=32, tokens=256, context=128)


def normal(*size: int, like: Setting, grad: bool = False) -> Tensor:
    return torch.randn(*size, device=like.device, dtype=like.dtype).requires_grad_(grad)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number in theirs."""
    error = (ours.double() - theirs.double()).abs().max().item() / max(theirs.double().abs().max().item(), 1e-30)
    if not error <= tolerance:
        raise AssertionError(f"relative error {error:.2g} is more than {tolerance:.2g}")


def loss_cases(on: Setting) -> Iterator[Case]:
    for shape in on.shapes:
        hidden = (normal(on.rows, shape.width, like=on) * 0.5).requires_grad_()
        head = (normal(shape.vocabulary, shape.width, like=on) * 0.02).requires_grad_()
        targets = torch.randint(shape.vocabulary, (on.rows,), device=on.device)
        products = 3 * 2 * on.rows * shape.width * shape.vocabulary
        moved = 2 * on.rows * shape.vocabulary * hidden.element_size()  # the row pass: logits in, their gradient out

        def backward(loss: Callable[[], Tensor], hidden: Tensor = hidden, head: Tensor = head) -> None:
            hidden.grad = head.grad = None
            loss().backward()

        def check(
            hidden: Tensor = hidden, head: Tensor = head, targets: Tensor = targets, dtype: Any = on.dtype
        ) -> None:
            rows = slice(0, min(512, len(targets)))
            ours = [t.detach()[s].clone().requires_grad_() for t, s in ((hidden, rows), (head, slice(None)))]
            theirs = [t.detach().float().requires_grad_() for t in ours]
            loss = linear_cross_entropy(*ours, targets[rows])[0]
            wanted = F.cross_entropy(theirs[0] @ theirs[1].t(), targets[rows], reduction="sum")
            got = (loss, *torch.autograd.grad(loss, ours))
            for mine, other in zip(got, (wanted, *torch.autograd.grad(wanted, theirs)), strict=True):
                assert_close(mine, other, 2e-2 if dtype == torch.bfloat16 else 1e-4)

        case = Case("linear_cross_entropy", f"N={on.rows} D={shape.width} V={shape.vocabulary}", moved, products, check)
        losses: dict[str, Callable[[], Tensor]] = {
            "minem": lambda h=hidden, w=head, t=targets: linear_cross_entropy(h, w, t)[0],
            "PyTorch": lambda h=hidden, w=head, t=targets: F.cross_entropy(h @ w.t(), t, reduction="sum"),
        }
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            options = torch.nn.LinearCrossEntropyOptions()
            losses["PyTorch chunked"] = partial(
                F.linear_cross_entropy, hidden, head, targets, reduction="sum", options=options
            )
        if on.device == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            losses["Liger-Kernel"] = partial(LigerFusedLinearCrossEntropyLoss(reduction="sum"), head, hidden, targets)
        if on.device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
            import cut_cross_entropy

            losses["cut-cross-entropy"] = partial(
                cut_cross_entropy.linear_cross_entropy, hidden, head, targets, reduction="sum"
            )
        case.contestants = {name: partial(backward, loss) for name, loss in losses.items()}
        if on.device == "cuda":
            case.contestants[COMPILED] = partial(backward, torch.compile(losses["PyTorch"], dynamic=False))
        yield case


def sorted_draw(logits: Tensor, top_p: Tensor) -> Tensor:
    """Top-p the usual way: sort, cumulate, mask, draw."""
    ordered, index = logits.float().sort(dim=-1, descending=True)
    p = ordered.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p[:, None], 0.0)
    return index.gather(1, torch.multinomial(p, 1)).squeeze(1)


def sample_cases(on: Setting) -> Iterator[Case]:
    for vocabulary in sorted({shape.vocabulary for shape in on.shapes}):
        logits = normal(on.batch, vocabulary, like=on) * 3
        ones = torch.ones(on.batch, device=on.device)
        seeds = torch.arange(on.batch, device=on.device)

        for name, p in (("plain", 1.0), ("top-p 0.9", 0.9)):
            top_p = ones * p
            arguments = (logits, ones, seeds * 0, top_p, ones * 0, seeds, seeds)

            def check(arguments: tuple[Tensor, ...] = arguments) -> None:
                ours = sample(*arguments)
                reference = sample(arguments[0].float(), *arguments[1:], backend="eager")
                # sums are rounded differently: one draw in thousands may be the next token
                same = ours[0] == reference[0]
                if same.float().mean() < 0.98:
                    raise AssertionError(f"only {same.sum()} of {len(same)} tokens are the reference's")
                for mine, other in zip(ours[1:], reference[1:], strict=True):
                    assert_close(mine[same], other[same], 1e-4)

            moved = logits.numel() * logits.element_size()
            case = Case(f"sample, {name}", f"B={on.batch} V={vocabulary}", moved, 0, check)
            case.contestants["minem"] = partial(sample, *arguments)
            if p == 1:
                case.contestants["PyTorch"] = lambda z=logits: torch.multinomial(z.float().softmax(-1), 1)
            else:
                case.contestants["PyTorch"] = partial(sorted_draw, logits, top_p)
            case.add_compiled("PyTorch")
            if on.device == "cuda" and importlib.util.find_spec("flashinfer"):
                import flashinfer

                if p == 1:
                    case.contestants["FlashInfer"] = lambda z=logits: flashinfer.sampling.sampling_from_probs(
                        z.float().softmax(-1)
                    )
                else:
                    case.contestants["FlashInfer"] = lambda z=logits, p=p: (
                        flashinfer.sampling.top_p_sampling_from_probs(z.float().softmax(-1), p)
                    )
            yield case


def attention_cases(on: Setting) -> Iterator[Case]:
    for shape in on.shapes:
        half = on.context // 2
        q = normal(on.batch, shape.heads, shape.head_dim, like=on)
        k, v = (normal(on.batch, shape.kv_heads, on.context, shape.head_dim, like=on) for _ in range(2))
        index = torch.arange(on.batch, device=on.device)
        lengths = torch.full_like(index, half)
        segments = [x[:, :, s].contiguous() for s in (slice(half), slice(half, None)) for x in (k, v)]
        qkv = torch.cat([q, k[:, :, -1], v[:, :, -1]], dim=1)  # the last position, which is written to the cache
        arguments = (qkv, *segments[:2], lengths, index[:, None], index, *segments[2:], lengths - 1)
        cos = q.new_ones(on.batch, shape.head_dim // 2)  # no rotation
        attend = partial(decode_attention, *arguments, heads=shape.heads, cos=cos, sin=0 * cos)
        joined = partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True)

        def check(attend: Callable[[], Tensor] = attend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            exact = F.scaled_dot_product_attention(q[:, :, None].float(), k.float(), v.float(), enable_gqa=True)
            assert_close(attend(), exact[:, :, 0], 2e-2 if q.dtype == torch.bfloat16 else 1e-4)

        moved = (k.numel() * 2 + q.numel() * 2) * q.element_size()
        heads = f"H={shape.heads} K={shape.kv_heads} C={shape.head_dim}"
        case = Case("decode_attention", f"S={on.batch} L={on.context} {heads}", moved, 0, check)
        case.contestants = {"minem": attend, "PyTorch": joined}
        case.add_compiled("PyTorch")
        yield case


def row_cases(on: Setting) -> Iterator[Case]:
    """Norm with residual, SwiGLU, rotary."""
    size = torch.empty(0, dtype=on.dtype).element_size()
    for shape in on.shapes:
        x, residual = (normal(on.tokens, shape.width, like=on, grad=True) for _ in range(2))
        weight = normal(shape.width, like=on, grad=True)

        def norm_eager(x: Tensor = x, weight: Tensor = weight, residual: Tensor = residual) -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.rms_norm(total, weight.shape, weight, 1e-6), total

        gate_up = normal(on.tokens, 2 * shape.mlp_width, like=on, grad=True)

        def swiglu_eager(gate_up: Tensor = gate_up) -> tuple[Tensor]:
            gate, up = gate_up.chunk(2, dim=-1)
            return (F.silu(gate) * up,)

        yield row_case(
            "rms_norm + residual",
            f"N={on.tokens} D={shape.width}",
            8 * x.numel() * size,  # x, residual -> normed, sum; then two gradients and the sum -> one gradient
            partial(rms_norm, x, weight, 1e-6, residual),
            norm_eager,
            (x, weight, residual),
            on,
        )
        yield row_case(
            "swiglu",
            f"N={on.tokens} I={shape.mlp_width}",
            4 * gate_up.numel() * size,
            lambda g=gate_up: (swiglu(g),),
            swiglu_eager,
            (gate_up,),
            on,
        )
        qkv = normal(on.tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, like=on)
        angle = torch.rand(on.tokens, shape.head_dim // 2, device=on.device, dtype=torch.float32) * 6
        cos, sin = angle.cos().to(on.dtype), angle.sin().to(on.dtype)
        turned = (shape.heads + shape.kv_heads) * shape.head_dim * on.tokens
        yield row_case(
            "rotary",
            f"N={on.tokens} H={shape.heads} K={shape.kv_heads} C={shape.head_dim}",
            2 * turned * size,
            lambda a=(qkv, cos, sin, shape.heads): rotary(*a)[:2],
            lambda a=(qkv, cos, sin, shape.heads): rotary(*a, backend="eager")[:2],
            (),
            on,
        )


def row_case(
    operation: str,
    shape: str,
    moved: float,
    ours: Callable[[], tuple[Tensor, ...]],
    theirs: Callable[[], tuple[Tensor, ...]],
    leaves: tuple[Tensor, ...],
    on: Setting,
) -> Case:
    """A case of an elementwise or row-wise operation: forward, with leaves also backward."""
    grads = [torch.randn_like(out) for out in theirs()]

    def run(function: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = function()
        return [*outputs, *(torch.autograd.grad(outputs, leaves, grads) if leaves else ())]

    def check() -> None:
        for mine, other in zip(run(ours), run(theirs), strict=True):
            assert_close(mine, other, 3e-2 if on.dtype == torch.bfloat16 else 1e-4)

    case = Case(f"{operation}{', forward + backward' if leaves else ''}", shape, moved, 0, check)
    case.contestants = {"minem": partial(run, ours), "PyTorch": partial(run, theirs)}
    if on.device == "cuda":
        case.contestants[COMPILED] = partial(run, torch.compile(theirs, dynamic=False))
    return case


CASES = {
    "linear_cross_entropy": loss_cases,
    "sample": sample_cases,
    "decode_attention": attention_cases,
    "rows": row_cases,
}


def measure(case: Case, bandwidth: float, rate: float, compiled: bool) -> dict[str, Any]:
    case.check()
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape}
    row["floor_s"] = case.bytes / bandwidth + case.operations / rate
    row["failed"] = {}
    if not compiled:
        case.contestants.pop(COMPILED, None)
    for name, contestant in case.contestants.items():
        try:
            contestant()
        except Exception as error:  # a contestant that fails must not stop the others
            if name == "minem":
                raise
            row["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row["seconds"] = medians({name: run for name, run in case.contestants.items() if name not in row["failed"]})
    print(json.dumps(row), file=sys.stderr, flush=True)  # a run that is cut off has lost nothing
    return row


def list_gpu_cases(console: Console) -> None:
    console.print("No CUDA device: the eager references run on small shapes. On a GPU this would measure, in bfloat16:")
    for shape in GPU.shapes:
        console.print(
            f"  {shape.name}: linear_cross_entropy N={GPU.rows} D={shape.width} V={shape.vocabulary}; "
            f"sample B={GPU.batch} V={shape.vocabulary}; decode_attention S={GPU.batch} L={GPU.context} "
            f"H={shape.heads} K={shape.kv_heads} C={shape.head_dim}; rms_norm, swiglu, rotary N={GPU.tokens}"
        )
    console.print(
        "  beside PyTorch, torch.compile, PyTorch's chunked loss, Liger-Kernel, cut-cross-entropy, FlashInfer"
    )


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
    result = rich.table.Table("operation", "shape", "contestant", "median ms", "floor ms", "floor / time", "minem is")
    for row in rows:
        for name, value in row["seconds"].items():
            share = f"{row['floor_s'] / value:.0%}"
            ratio = "" if name == "minem" else f"{value / row['seconds']['minem']:.2f} x as fast"
            cells = (f"{value * 1e3:.3f}", f"{row['floor_s'] * 1e3:.3f}", share, ratio)
            result.add_row(row["operation"], row["shape"], name, *cells)
        for name, reason in row["failed"].items():
            result.add_row(row["operation"], row["shape"], name, "failed", "", "", reason)
    return result


@click.command()
@click.option("--only", type=click.Choice(list(CASES)), multiple=True, help="Measure only these; all by default.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile PyTorch's way, too: minutes on a GPU.")
@click.option("--json", "as_json", is_flag=True, help="After the table, one JSON object on one line.")
def main(only: tuple[str, ...], compiled: bool, as_json: bool) -> None:
    """Time each kernel beside PyTorch and other libraries."""
    torch.manual_seed(time.time_ns() % 2**31)  # fresh inputs every time; the checks must hold on any
    on = GPU if torch.cuda.is_available() else CPU
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    if not console.is_terminal:
        console = Console(highlight=False, width=160, stderr=as_json)  # a file has room for the table
    torch.set_num_threads(1)  # small shapes gain little from more threads
    if on is CPU:
        list_gpu_cases(console)
    bandwidth, rate = ceilings(on.device, on.dtype)
    about = {"dtype": str(on.dtype).removeprefix("torch."), **facts(*PEERS, device=on.device)}
    for name, fact in about.items():
        console.print(f"{name}: {fact}")
    console.print(f"ceilings measured here: {bandwidth / 1e9:,.0f} GB/s, {rate / 1e12:,.2f} TFLOP/s")
    rows = [measure(case, bandwidth, rate, compiled) for name in only or CASES for case in CASES[name](on)]
    console.print(table(rows))
    if as_json:
        print(json.dumps({**about, "bandwidth": bandwidth, "operations_per_s": rate, "rows": rows}))


if __name__ == "__main__":
    main()
