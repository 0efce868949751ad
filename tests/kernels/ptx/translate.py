"""Each basic block of PTX becomes one Python function of numpy lines, a line for each instruction:

    add.s32 %r3, %r1, 4;              R[3] = (R[1].view(i4) + K[0]).view(u4)
    @%p1 mov.b32 %r5, %r3;            R[5] = np.where(R[9], R[3], R[5])

R are the registers, each an array with one number for each thread of the CTA; K are the constants; `m` says which
threads execute the block (None: all), `c` is the CTA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.kernels.ptx import numbers
from tests.kernels.ptx.parse import Instruction, Program, members

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"] + ["%laneid"]
TYPES = {"f": "f", "s": "i", "b": "u", "u": "u"}
NAMES: dict[str, Any] = {"np": np, **vars(numbers)}
NAMES |= {
    f"{kind}{size}": np.dtype(f"{kind}{size}").type
    for kind in "iuf"
    for size in (1, 2, 4, 8)
    if kind + str(size) != "f1"
}
NOTHING = ("fence", "membar", "griddepcontrol", "discard", "prefetch", "nanosleep", "applypriority")
ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def numpy_type(kind: str) -> str:
    """ "s32" -> "i4", "bf16" -> "u2"; "pred" -> "bool"."""
    if kind in ("pred", "bf16", "bf16x2", "f16x2", "tf32"):
        return {"pred": "bool", "bf16": "u2"}.get(kind, "u4")
    return f"{TYPES[kind[0]]}{int(kind[1:]) // 8}"


class Translator:
    def __init__(self, program: Program):
        self.program = program
        self.indices = {name: i for i, name in enumerate(SPECIAL)}
        self.kinds = dict.fromkeys(SPECIAL, "u4")  # numpy type of each register
        self.constants: list[Any] = []
        self.known: dict[tuple[int, str], int] = {}

    def block(self, number: int, masked: bool) -> tuple[str, list[str]]:
        """Source of the function, and for each of its lines the instruction that it comes from."""
        lines, origin = ["def block(c, R, K, m):"], [""]
        for instruction in self.program.blocks[number]:
            if instruction.op[0] not in ("bra", "ret", "exit"):
                for line in self.lines(instruction, masked):
                    lines.append("    " + line)
                    origin.append(instruction.text)
        return "\n".join([*lines, "    pass"]), origin

    def register(self, name: str) -> int:
        if name not in self.indices:
            prefix = re.match(r"(%?[A-Za-z_]+)", name)[1]  # type: ignore[index]
            self.kinds[name] = numpy_type(self.program.registers.get(name) or self.program.registers[prefix])
            self.indices[name] = len(self.indices)
        return self.indices[name]

    def constant(self, value: int, kind: str) -> str:
        if (value, kind) not in self.known:
            self.known[value, kind] = len(self.constants)
            size = np.dtype(kind).itemsize
            bits = np.full(self.program.threads, value & (1 << 8 * size) - 1, f"u{size}")
            self.constants.append(bits.astype(bool) if kind == "bool" else bits.view(kind))
        return f"K[{self.known[value, kind]}]"

    def value(self, text: str, kind: str) -> str:
        """A source operand as an array of the numpy type."""
        if text == "global_smem":
            return self.constant(0, kind)
        if text[0] != "%" and text not in self.program.registers:
            if text[:2] in ("0f", "0d"):
                return self.constant(int(text[2:], 16), kind)
            return self.constant(int(text.rstrip("U"), 0), kind)
        i, have = self.register(text), self.kinds[text]
        if have == kind:
            return f"R[{i}]"
        source = f"R[{i}]" if have[1] == kind[1] else f"R[{i}].astype(u{kind[1]})"
        return source if kind[0] == "u" else f"{source}.view({kind})"

    def put(self, name: str, source: str, kind: str, mask: str) -> str:
        """The line that gives a register a value of the numpy type; a wider register is filled with zeros or the sign."""
        if name == "_":
            return "pass"
        i, want = self.register(name), self.kinds[name]
        if want != kind:
            if want[1] != kind[1]:
                source, kind = f"({source}).astype({kind[0]}{want[1]})", kind[0] + want[1]
            source = source if kind == want else f"({source}).view({want})"
        return f"R[{i}] = {source}" if mask == "None" else f"R[{i}] = np.where({mask}, {source}, R[{i}])"

    def lines(self, i: Instruction, masked: bool) -> Iterator[str]:
        guard = f"{'~' if i.unless else ''}R[{self.register(i.guard)}]" if i.guard else ""
        mask = (f"(m & {guard})" if guard else "m") if masked else guard or "None"
        special = getattr(self, f"_{i.op[0]}", None)
        if special is not None:
            yield from special(i, mask)
        elif i.op[0] not in NOTHING:
            yield from self._expression(i, mask)

    def _expression(self, i: Instruction, mask: str) -> Iterator[str]:
        name, last = i.op[0], i.op[-1]
        variant = next((f"{name}.{x}" for x in i.op[1:] if f"{name}.{x}" in numbers.EXPRESSIONS), name)
        template, kind = numbers.EXPRESSIONS[variant], numpy_type(last)
        if last.endswith("x2"):
            sources = ", ".join(self.value(a, "u4") for a in i.arguments[1:])
            body = re.sub(r"fused\((.*)\)", r"\1", template).replace("{0}, {1}, {2}", "{0} * {1} + {2}")
            function = f"lambda a, b=0, c=0: {body.format('a', 'b', 'c')}"
            yield self.put(i.arguments[0], f"packed({function}, '{last[:-2]}', {sources})", "u4", mask)
            return
        wide = f"{kind[0]}{2 * int(kind[1])}" if kind not in ("bool", "u8", "i8", "f8") else kind
        kinds = [kind] * 4
        result = kind
        if name in ("shl", "shr"):
            kinds[1] = "u4"
        elif name in ("bfe", "bfi"):
            kinds[(name == "bfi" and 2) or 1 :] = ["u4"] * 3
        elif name == "selp":
            kinds[2] = "bool"
        elif name in ("popc", "clz", "bfind"):
            result = "u4"
        if variant.endswith(".wide"):
            kinds[2] = result = wide
        sources = [self.value(a, k) for a, k in zip(i.arguments[1:], kinds, strict=False)]
        expression = template.format(*sources, T=kind, W=wide, LEFT="l" in i.op)
        if name in ("popc", "clz", "bfind"):
            expression = f"({expression}).astype(u4)"
        yield self.put(i.arguments[0], expression, result, mask)

    def _mov(self, i: Instruction, mask: str) -> Iterator[str]:
        to, source = i.arguments
        kind = numpy_type(i.op[-1])
        parts = members(to) if to[0] == "{" else members(source) if source[0] == "{" else []
        if not parts:
            yield self.put(to, self.value(source, kind), kind, mask)
            return
        part = f"u{int(kind[1]) // len(parts)}"  # the first part is the lowest
        if source[0] == "{":
            joined = f"np.stack([{', '.join(self.value(x, part) for x in parts)}], 1).view({kind})[:, 0]"
            yield self.put(to, joined, kind, mask)
        else:
            yield f"v = {self.value(source, kind)}.view({part}).reshape(-1, {len(parts)})"
            for n, name in enumerate(parts):
                yield self.put(name, f"np.ascontiguousarray(v[:, {n}])", part, mask)

    def _setp(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        comparison = "neu" if i.op[1] == "ne" and kind[0] != "f" else i.op[1]
        expression = numbers.COMPARISONS[comparison].format(*(self.value(a, kind) for a in i.arguments[1:3]))
        if len(i.arguments) == 4:
            expression = f"({expression}) {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[i.op[2]]} " + self.value(i.arguments[3], "bool")  # fmt: skip
        yield self.put(i.arguments[0], expression, "bool", mask)

    def _cvt(self, i: Instruction, mask: str) -> Iterator[str]:
        to, *sources = i.arguments
        kinds = [x for x in i.op[1:] if re.fullmatch(r"(bf|tf|[fsu])\d+(x2)?", x)]
        result, source = kinds
        kind = numpy_type(result)
        x = self.value(sources[0], numpy_type(source))
        x = f"widen({x})" if source == "bf16" else x
        if result.endswith("x2"):  # two numbers, the first into the upper half
            y = f"join({self.value(sources[1], 'f4')}, {x}, '{result[:-2]}')"
        elif result == "tf32":  # fp32 of which the lower 13 bits do not count
            y = f"({x}.view(u4) + u4(0x1000)) & u4(0xFFFFE000)"
        elif result == "bf16":
            y = f"narrow({x})"
        elif kind[0] != "f" and (source[0] == "f" or source == "bf16"):
            y = f"to_integer({x}, '{kind}', {next(ROUNDINGS[r] for r in i.op if r in ROUNDINGS)})"
        elif result == source and (rounding := [r for r in i.op if r in ROUNDINGS]):
            y = f"{ROUNDINGS[rounding[0]]}({x})"
        elif "sat" in i.op:
            y = f"np.clip({x}, np.iinfo({kind}).min, np.iinfo({kind}).max).astype({kind})" if kind[0] != "f" else f"np.clip({x}, 0, 1).astype({kind})"  # fmt: skip
        else:
            y = f"{x}.astype({kind})"
        yield self.put(to, y, kind, mask)

    def address(self, text: str) -> str:
        """ "[%rd4+16]": an array of 64-bit addresses."""
        name, sign, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()  # type: ignore[union-attr]
        if name not in self.program.registers and name[0] != "%":
            base = self.constant(0, "u8")
        else:
            base = self.value(name, "u8")
        distance = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return f"{base} + {self.constant(distance, 'u8')}" if distance else base

    def _ld(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        to = members(i.arguments[0])
        if "param" in i.op:
            yield self.put(to[0], f"c.parameter('{i.arguments[1].strip('[] ')}', {kind})", kind, mask)
            return
        yield f"k = {mask}"
        yield f"v = c.load({self.space(i)}, k, {self.address(i.arguments[1])}, {kind}, {len(to)})"
        for n, name in enumerate(to):
            yield self.put(name, f"v[{n}]", kind, "None" if mask == "None" else "k")

    def _st(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        values = ", ".join(self.value(x, "u" + kind[1]) for x in members(i.arguments[1]))
        yield f"c.store({self.space(i)}, {mask}, {self.address(i.arguments[0])}, [{values}])"

    def space(self, i: Instruction) -> str:
        return repr("shared" in i.op or "shared::cta" in ".".join(i.op))

    def _atom(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        name = next(x for x in i.op if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
        to, place, *values = i.arguments if i.op[0] == "atom" else ["_", *i.arguments]
        sources = ", ".join(self.value(x, kind) for x in values)
        yield f"k = {mask}"
        yield f"v = c.atomic({self.space(i)}, k, '{name}', {self.address(place)}, [{sources}])"
        yield self.put(to, "v", kind, "None" if mask == "None" else "k")

    _red = _atom

    def _bar(self, i: Instruction, mask: str) -> Iterator[str]:
        yield f"c.{'warp_barrier' if 'warp' in i.op else 'barrier'}({mask})"

    _barrier = _bar

    def _cp(self, i: Instruction, mask: str) -> Iterator[str]:
        if "commit_group" in i.op:
            yield "c.commit_copies()"
        elif "wait_group" in i.op or "wait_all" in i.op:
            yield f"c.wait_for_copies({int(i.arguments[0], 0) if i.arguments else 0}, {'wait_all' in i.op})"
        else:
            to, source, size, *taken = i.arguments
            taken = [a for a in taken if a[:3] != "%rd"]  # the other is a hint to the cache
            count = self.value(taken[0], "u4") if taken else "None"
            yield f"c.copy({mask}, {self.address(to)}, {self.address(source)}, {int(size, 0)}, {count})"

    def _shfl(self, i: Instruction, mask: str) -> Iterator[str]:
        to, source, lane, clamp, *_ = i.arguments
        to, _, valid = to.partition("|")
        operands = ", ".join(self.value(x, "u4") for x in (source, lane, clamp))
        yield f"v, inside = c.shuffle({mask}, '{i.op[2]}', {operands})"
        yield self.put(to, "v", "u4", mask)
        if valid:
            yield self.put(valid, "inside", "bool", mask)

    def _warp(self, i: Instruction, mask: str, call: str, result: str) -> Iterator[str]:
        yield self.put(i.arguments[0].partition("|")[0], call, result, mask)

    def _redux(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        yield from self._warp(i, mask, f"c.reduce({mask}, '{i.op[2]}', {self.value(i.arguments[1], kind)})", kind)

    def _vote(self, i: Instruction, mask: str) -> Iterator[str]:
        call = f"c.vote({mask}, '{i.op[2]}', {self.value(i.arguments[1].lstrip('!'), 'bool')})"
        yield from self._warp(i, mask, call, "u4" if i.op[2] == "ballot" else "bool")

    def _match(self, i: Instruction, mask: str) -> Iterator[str]:
        kind = numpy_type(i.op[-1])
        yield from self._warp(i, mask, f"c.match({mask}, {self.value(i.arguments[1], kind)})", "u4")

    def _activemask(self, i: Instruction, mask: str) -> Iterator[str]:
        yield from self._warp(i, mask, f"c.vote({mask}, 'ballot', np.ones(c.threads, bool))", "u4")

    def _elect(self, i: Instruction, mask: str) -> Iterator[str]:
        yield self.put(i.arguments[0].partition("|")[2], f"R[{self.register('%laneid')}] == 0", "bool", mask)

    def _ldmatrix(self, i: Instruction, mask: str) -> Iterator[str]:
        to = members(i.arguments[0])
        yield f"v = c.load_matrices({mask}, {self.address(i.arguments[1])}, {len(to)}, {'trans' in i.op})"
        for n, name in enumerate(to):
            yield self.put(name, f"v[{n}]", "u4", mask)

    def _stmatrix(self, i: Instruction, mask: str) -> Iterator[str]:
        values = ", ".join(self.value(x, "u4") for x in members(i.arguments[1]))
        yield f"c.store_matrices({mask}, {self.address(i.arguments[0])}, [{values}], {'trans' in i.op})"

    def _mma(self, i: Instruction, mask: str) -> Iterator[str]:
        a, b, sums = (", ".join(self.value(x, k) for x in members(argument))
                      for argument, k in zip(i.arguments[1:], ("u4", "u4", "f4"), strict=True))  # fmt: skip
        yield f"v = c.multiply({mask}, '{i.op[-3]}', [{a}], [{b}], [{sums}])"
        for n, name in enumerate(members(i.arguments[0])):
            yield self.put(name, f"v[{n}]", "f4", mask)
