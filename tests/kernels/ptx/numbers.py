"""The arithmetic of PTX in numpy: one expression for each operation, and the few that need a function.

{0}, {1}, {2} are the sources as arrays with one number for each thread, {W} is the type of twice the width, {T} that
of the result. Denormals are kept where a GPU may flush them, and approximations are exact to the last bit or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

EXPRESSIONS = {
    "mov": "{0}", "cvta": "{0}", "neg": "-{0}", "abs": "np.abs({0})", "not": "~{0}",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mul.wide": "{0}.astype({W}) * {1}.astype({W})",
    "mul.hi": "multiply_high({0}, {1})", "mad": "{0} * {1} + {2}", "fma": "fused({0}, {1}, {2})",
    "mad.wide": "{0}.astype({W}) * {1}.astype({W}) + {2}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "div": "divide({0}, {1})", "rem": "np.fmod({0}, np.where({1} == 0, {1}.dtype.type(1), {1}))",
    "min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})",  # a NaN loses against a number
    "min.NaN": "np.minimum({0}, {1})", "max.NaN": "np.maximum({0}, {1})",
    "rcp": "{T}(1) / {0}", "sqrt": "np.sqrt({0})", "rsqrt": "{T}(1) / np.sqrt({0})",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "sin": "np.sin({0})", "cos": "np.cos({0})", "tanh": "np.tanh({0})",
    "shl": "{0} << {1}.astype({T})", "shr": "{0} >> {1}.astype({T})", "shf": "funnel({0}, {1}, {2}, {LEFT})",
    "bfe": "field({0}, {1}, {2})", "bfi": "put_field({0}, {1}, {2}, {3})", "prmt": "permute({0}, {1}, {2})",
    "lop3": "any_logic({0}, {1}, {2}, {3})", "selp": "np.where({2}, {0}, {1})", "popc": "np.bitwise_count({0})",
    "clz": "leading_zeros({0})", "bfind": "np.uint32(8 * {0}.itemsize - 1) - leading_zeros({0})",
    "brev": "reversed_bits({0})", "createpolicy": "np.zeros_like({0}, u8)",
}  # fmt: skip
COMPARISONS = {
    "eq": "{0} == {1}", "ne": "({0} != {1}) & ({0} == {0}) & ({1} == {1})", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "lo": "{0} < {1}", "ls": "{0} <= {1}", "hi": "{0} > {1}",
    "hs": "{0} >= {1}", "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
    # the unordered ones are true for a NaN
    "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})", "leu": "~({0} > {1})",
    "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
}  # fmt: skip


def widen(bits: Any) -> Any:
    """bf16 to fp32: its bits are the upper half."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: Any) -> Any:
    """fp32 to bf16, to the nearest, to the even one of two."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def halves(x: Any, kind: str) -> tuple[Any, Any]:
    """The lower and the upper number of a 32-bit register, in fp32; kind: "bf16" or "f16"."""
    low, high = x.astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)
    return (widen(low), widen(high)) if kind == "bf16" else tuple(
        h.view(np.float16).astype(np.float32) for h in (low, high)
    )  # fmt: skip


def join(low: Any, high: Any, kind: str) -> Any:
    low, high = (narrow(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16) for x in (low, high))
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def packed(function: Callable[..., Any], kind: str, *registers: Any) -> Any:
    """A function of both halves of registers that hold two numbers each."""
    return join(*(function(*part) for part in zip(*(halves(x, kind) for x in registers), strict=True)), kind)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: the product of two fp32 numbers is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(a.dtype) if a.dtype == np.float32 else a * b + c


def divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, b)) // b  # rounds towards zero


def multiply_high(a: Any, b: Any) -> Any:
    bits = 8 * a.itemsize
    if bits == 64:
        product = a.astype(object) * b.astype(object) >> 64
        return product.astype(a.dtype)
    wide = f"{a.dtype.kind}8"
    return (a.astype(wide) * b.astype(wide) >> np.array(bits, wide)).astype(a.dtype)


def to_integer(x: Any, kind: str, rounding: Callable[[Any], Any]) -> Any:
    """Saturating, and 0 for a NaN."""
    limits = np.iinfo(kind)
    whole = np.where(np.isnan(x), 0, rounding(x)).astype(np.float64)
    inside = np.clip(whole, float(limits.min), np.nextafter(float(limits.max) + 1, 0)).astype(kind)
    return np.where(whole >= float(limits.max) + 1, limits.max, inside).astype(kind)


def funnel(low: Any, high: Any, count: Any, left: bool) -> Any:
    both, n = (high.astype(np.uint64) << np.uint64(32)) | low, (count & np.uint32(31)).astype(np.uint64)
    return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)


def field(x: Any, start: Any, length: Any) -> Any:
    """`length` bits of x from bit `start` on; of a signed x, with their own sign."""
    bits, kind = 8 * x.itemsize, x.dtype.type
    left, right = (bits - start.astype(np.int64) - length).astype(kind), (bits - length.astype(np.int64)).astype(kind)
    return np.where(length == 0, kind(0), (x << left) >> right)


def put_field(x: Any, into: Any, start: Any, length: Any) -> Any:
    kind = x.dtype.type
    mask = ((kind(1) << length.astype(kind)) - kind(1)) << start.astype(kind)
    return (into & ~mask) | ((x << start.astype(kind)) & mask)


def permute(low: Any, high: Any, selector: Any) -> Any:
    """Four of the eight bytes of two registers, each by four bits of the selector; the fourth bit: only its sign."""
    source = np.stack([low, high], 1).view(np.uint8)
    nibbles = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))).astype(np.int64) & 15
    chosen = np.take_along_axis(source, nibbles & 7, 1)
    chosen = np.where(nibbles > 7, np.where(chosen > 127, np.uint8(255), np.uint8(0)), chosen)
    return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]


def any_logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit i of the table is the result where the three bits are those of i."""
    out = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        out |= np.where(table >> np.uint32(i) & np.uint32(1), term, np.uint32(0))
    return out


def leading_zeros(x: Any) -> Any:
    bits = np.array([8 * x.itemsize - int(value).bit_length() for value in x.view(f"u{x.itemsize}")])
    return bits.astype(np.uint32)


def reversed_bits(x: Any) -> Any:
    return np.packbits(np.unpackbits(x.view(np.uint8).reshape(-1, x.itemsize), axis=1)[:, ::-1], axis=1, bitorder="big").view(x.dtype)[:, 0]  # fmt: skip
