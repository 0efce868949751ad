"""The arithmetic of PTX in numpy: one expression for each operation, and the few that need a function.

{0}, {1}, {2} are the sources, arrays with one number for each thread; {T} is the type of the first, {W} the one of
twice its width. Denormals are kept where a GPU may flush them, and approximations are exact to the last bit or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

u2, u4, f2, f4, f8 = np.uint16, np.uint32, np.float16, np.float32, np.float64
EXPRESSIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}", "abs": "np.abs({0})", "not": "~{0}",
    "mad": "{0} * {1} + {2}", "fma": "fused({0}, {1}, {2})", "mul.hi": "multiply_high({0}, {1})",
    "mul.wide": "{0}.astype({W}) * {1}.astype({W})", "mad.wide": "{0}.astype({W}) * {1}.astype({W}) + {2}",
    "div": "divide({0}, {1})", "rem": "np.fmod({0}, np.where({1} == 0, {1}.dtype.type(1), {1}))",
    "min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})",  # a NaN loses against a number
    "min.NaN": "np.minimum({0}, {1})", "max.NaN": "np.maximum({0}, {1})", "rcp": "{T}(1) / {0}",
    "sqrt": "np.sqrt({0})", "rsqrt": "{T}(1) / np.sqrt({0})", "ex2": "np.exp2({0})", "lg2": "np.log2({0})",
    "sin": "np.sin({0})", "cos": "np.cos({0})", "tanh": "np.tanh({0})", "popc": "np.bitwise_count({0}).astype(u4)",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "shl": "{0} << {1}.astype({T})",
    "shr": "{0} >> {1}.astype({T})", "bfe": "field({0}, {1}, {2})", "prmt": "permute({0}, {1}, {2})",
    "shf": "funnel({0}, {1}, {2}, {LEFT})", "selp": "np.where({2}, {0}, {1})", "cvta": "{0}",
    "createpolicy": "np.zeros(c.threads, u8)",
}  # fmt: skip
ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COMPARISONS = {name: f"{{0}} {sign} {{1}}" for name, sign in ORDERED.items()}
COMPARISONS |= {"num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})", "neu": "{0} != {1}"}
COMPARISONS |= {"ne": "({0} < {1}) | ({0} > {1})", "equ": "~(({0} < {1}) | ({0} > {1}))"}
# the unordered ones are true for a NaN, of which every ordered one is false
COMPARISONS |= {u: f"~({{0}} {s} {{1}})" for u, s in (("ltu", ">="), ("leu", ">"), ("gtu", "<="), ("geu", "<"))}


def widen(bits: Any) -> Any:
    """bf16 to fp32: its bits are the upper half."""
    return (bits.astype(u4) << u4(16)).view(f4)


def narrow(x: Any) -> Any:
    """fp32 to bf16, to the nearest, to the even one of two."""
    bits = x.astype(f4).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u2(0x7FFF), rounded.astype(u2))


def halves(x: Any, kind: str) -> list[Any]:
    """The lower and the upper number of a 32-bit register, in fp32; kind: "bf16" or "f16"."""
    parts = x.astype(u2), (x >> u4(16)).astype(u2)
    return [widen(h) if kind == "bf16" else h.view(f2).astype(f4) for h in parts]


def join(low: Any, high: Any, kind: str) -> Any:
    low, high = (narrow(x) if kind == "bf16" else x.astype(f2).view(u2) for x in (low, high))
    return low.astype(u4) | (high.astype(u4) << u4(16))


def packed(function: Callable[..., Any], kind: str, *registers: Any) -> Any:
    """A function of both halves of registers that hold two numbers each."""
    return join(*(function(*part) for part in zip(*(halves(x, kind) for x in registers), strict=True)), kind)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: the product of two fp32 numbers is exact in float64."""
    return (a.astype(f8) * b + c).astype(f4) if a.dtype == f4 else a * b + c


def divide(a: Any, b: Any) -> Any:
    """Of integers rounded towards zero."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, b)) // b


def multiply_high(a: Any, b: Any) -> Any:
    """The upper half of the product."""
    return ((a.astype(object) * b.astype(object)) >> 8 * a.itemsize).astype(a.dtype)


def to_integer(x: Any, kind: Any, rounding: Callable[[Any], Any]) -> Any:
    """Saturating, and 0 for a NaN."""
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    whole = np.where(np.isnan(x), 0, rounding(x)).astype(f8)
    inside = np.where((whole >= low) & (whole < high), whole, 0).astype(kind)
    return np.where(whole >= high, kind(high), np.where(whole <= low, kind(low), inside))


def field(x: Any, start: Any, length: Any) -> Any:
    """`length` bits of x from bit `start` on; of a signed x with their own sign."""
    kind, top = x.dtype.type, 8 * x.itemsize - length.astype(np.int64)
    return np.where(length == 0, kind(0), (x << (top - start).astype(kind)) >> top.astype(kind))


def funnel(low: Any, high: Any, count: Any, left: bool) -> Any:
    """The upper half of two registers side by side, shifted to the left; or the lower one, shifted to the right."""
    both, n = (high.astype(np.uint64) << np.uint64(32)) | low, (count & u4(31)).astype(np.uint64)
    return ((both << n) >> np.uint64(32) if left else both >> n).astype(u4)


def permute(low: Any, high: Any, selector: Any) -> Any:
    """Any four of the eight bytes of two registers, each named by four bits of the selector."""
    nibbles = (selector[:, None] >> (4 * np.arange(4, dtype=u4))).astype(np.int64) & 7
    return np.ascontiguousarray(np.take_along_axis(np.stack([low, high], 1).view("u1"), nibbles, 1)).view(u4)[:, 0]
