"""Each basic block of PTX becomes one Python function, each of its instructions a line or three of numpy:

    add.s32 %r3, %r1, 4;              R[3] = (R[1].view(i4) + K[0]).view(u4)
    @%p1 mov.b32 %r5, %r3;            R[5] = np.where(R[9], R[3], R[5])

R are the registers, each an array with one number for each thread of the CTA; K are the constants; `m` says which
threads execute the block (None: all), `k` which of them the instruction's guard lets take part; `c` is the CTA.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.kernels.ptx import numbers
from tests.kernels.ptx.parse import JUMPS, Instruction, Program, members

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid"]
NAMES: dict[str, Any] = {f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "iu" for size in (1, 2, 4, 8)}
NAMES |= {"np": np, **vars(numbers)}
NOTHING = ("fence", "membar", "griddepcontrol", "prefetch", "discard")
BOOLEAN = {"and": "&", "or": "|", "xor": "^"}
ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def numpy_type(kind: str) -> str:
    """ "s32" -> "i4", "bf16" -> "u2", "bf16x2" -> "u4", "pred" -> "bool"."""
    if kind in ("pred", "bf16", "bf16x2", "f16x2", "tf32"):
        return {"pred": "bool", "bf16": "u2"}.get(kind, "u4")
    return f"{kind[0].translate(str.maketrans('sb', 'iu'))}{int(kind[1:]) // 8}"


class Translator:
    def __init__(self, program: Program):
        self.program = program
        self.indices = {name: i for i, name in enumerate(SPECIAL)}
        self.types = dict.fromkeys(SPECIAL, "u4")  # numpy type of each register
        self.constants: list[Any] = []
        self._known: dict[tuple[int, str], str] = {}

    def block(self, number: int, masked: bool) -> str:
        lines = ["def block(c, R, K, m):", "    pass"]
        for i in self.program.blocks[number]:
            if i.op[0] not in (*JUMPS, *NOTHING):
                guard = f"{'~' if i.unless else ''}R[{self.register(i.guard)}]" if i.guard else ""
                mask = (f"m & {guard}" if guard else "m") if masked else guard
                to, kind, expression = self.meaning(i)
                body = [f"k = {mask or None}", f"v = {expression}"] if kind else [f"k = {mask or None}", expression]
                for n, name in enumerate(to):
                    body.append(self.put(name, f"v[{n}]" if len(to) > 1 else "v", kind, bool(mask)))
                lines += [f"    {line}  # {i.text}" for line in body]
        return "\n".join(lines)

    def register(self, name: str) -> int:
        if name not in self.indices:
            declared = self.program.registers
            self.types[name] = numpy_type(declared.get(name) or declared[name.rstrip("0123456789")])
            self.indices[name] = len(self.indices)
        return self.indices[name]

    def constant(self, value: int, kind: str) -> str:
        if (value, kind) not in self._known:
            size = np.dtype(kind).itemsize
            bits = np.full(self.program.threads, value & (1 << 8 * size) - 1, f"u{size}")
            self._known[value, kind] = f"K[{len(self.constants)}]"
            self.constants.append(bits.astype(bool) if kind == "bool" else bits.view(kind))
        return self._known[value, kind]

    def value(self, text: str, kind: str) -> str:
        """A source operand as an array of the numpy type: of a wider register the lower bits."""
        if text[0] != "%" and text not in self.program.registers:
            if text[:2] in ("0f", "0d"):
                return self.constant(int(text[2:], 16), kind)
            return self.constant(0 if text == "global_smem" else int(text.rstrip("U"), 0), kind)  # all shared memory
        source, have = f"R[{self.register(text)}]", self.types[text]
        source += "" if have[1] == kind[1] else f".astype(u{kind[1]})"
        return source if kind[0] in "ub" else f"{source}.view({kind})"

    def values(self, argument: str, kind: str) -> str:
        return "[" + ", ".join(self.value(x, kind) for x in members(argument)) + "]"

    def address(self, text: str) -> str:
        """ "[%rd4+16]": an array of 64-bit addresses."""
        name, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        return self.value(name, "u8") + (f" + {self.constant(int(offset, 0), 'u8')}" if offset else "")

    def put(self, name: str, source: str, kind: str, masked: bool) -> str:
        """Give a register a value of the numpy type; what is left of a wider register is filled with 0 or the sign."""
        if name == "_":
            return "pass"
        i, want = self.register(name), self.types[name]
        source = source if want[1] == kind[1] else f"{source}.astype({kind[0]}{want[1]})"
        source = source if kind[0] in "ub" else f"{source}.view({want})"
        return f"R[{i}] = np.where(k, {source}, R[{i}])" if masked else f"R[{i}] = {source}"

    def meaning(self, i: Instruction) -> tuple[list[str], str, str]:
        """(the registers that get a value, its numpy type, the expression); type "": an expression without a value."""
        name, op, a = i.op[0], i.op, i.arguments
        kind = numpy_type(op[-1]) if re.fullmatch(r"pred|[a-z]+\d+(x2)?", op[-1]) else "u4"
        space = "c.shared" if "shared" in op or "shared::cta" in i.text else "c.memory"
        match name:
            case "ld" if "param" in op:
                return [a[0]], kind, f"c.parameter('{a[1].strip('[]')}', {kind})"
            case "ld":
                to = members(a[0])
                return to, kind, f"c.load({space}, k, {self.address(a[1])}, {kind}, {len(to)})"
            case "st":
                return [], "", f"c.store({space}, k, {self.address(a[0])}, {self.values(a[1], 'u' + kind[1])})"
            case "atom" | "red":
                a = a if name == "atom" else ["_", *a]
                how = next(x for x in op if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
                numbers_ = ", ".join(self.value(x, kind) for x in a[2:])
                about = f"k, '{how}', {self.address(a[1])}, [{numbers_}], {space == 'c.memory' and 'acq_rel' in op}"
                return [a[0]], kind, f"c.atomic({space}, {about})"
            case "bar" | "barrier":
                return [], "", f"c.{'warp_barrier' if 'warp' in op else 'barrier'}(k)"
            case "cp" if "commit_group" in op:
                return [], "", "c.copies.append([])"
            case "cp" if "wait_group" in op or "wait_all" in op:
                return [], "", f"c.wait_for_copies({a[0] if a else -1})"
            case "cp":
                real = self.value(a[3], "u4") if len(a) > 3 else self.constant(1, "u4")  # else zeros are written
                return [], "", f"c.copy(k, {self.address(a[0])}, {self.address(a[1])}, {a[2]}, {real} > 0)"
            case "shfl":
                lane = self.value(a[2], "u4")
                return [a[0].split("|")[0]], kind, f"c.shuffle(k, '{op[2]}', {self.value(a[1], kind)}, {lane})"
            case "redux":
                return [a[0]], kind, f"c.reduce(k, '{op[2]}', {self.value(a[1], kind)})"
            case "vote":
                return [a[0]], kind, f"c.vote(k, '{op[2]}', {self.value(a[1], 'bool')})"
            case "ldmatrix":
                to = members(a[0])
                loaded = f"c.load_matrices(k, {self.address(a[1])}, {len(to)}, {'trans' in op})"
                return to, "u4", loaded + ("[0]" if len(to) == 1 else "")
            case "stmatrix":
                return [], "", f"c.store_matrices(k, {self.address(a[0])}, {self.values(a[1], 'u4')}, {'trans' in op})"
            case "mma":
                factors = f"{self.values(a[1], 'u4')}, {self.values(a[2], 'u4')}, {self.values(a[3], 'f4')}"
                return members(a[0]), "f4", f"c.multiply(k, '{op[-3]}', {factors})"
            case "mov":
                return self._move(a[0], a[1], kind)
            case "setp":
                sources = [self.value(x, kind) for x in a[1:3]]
                test = numbers.COMPARISONS[op[1]].format(*sources)
                also = f" {BOOLEAN[op[2]]} {self.value(a[3], 'bool')}" if a[3:] else ""
                return [a[0]], "bool", f"({test}){also}"
            case "cvt":
                return self._convert(a[0], a[1:], op)
        return self._compute(i, kind)

    def _compute(self, i: Instruction, kind: str) -> tuple[list[str], str, str]:
        name, a = i.op[0], i.arguments
        variant = next((f"{name}.{x}" for x in i.op if f"{name}.{x}" in numbers.EXPRESSIONS), name)
        template = numbers.EXPRESSIONS[variant]
        if i.op[-1].endswith("x2"):
            body = template.replace("fused({0}, {1}, {2})", "{0} * {1} + {2}").format(*"xyz")
            return (
                [a[0]],
                "u4",
                f"packed(lambda x, y=0, z=0: {body}, '{i.op[-1][:-2]}', *{self.values(' '.join(a[1:]), 'u4')})",
            )
        wide = f"{kind[0]}{2 * int(kind[1])}" if variant.endswith("wide") else kind
        kinds = {"shl": [kind, "u4"], "shr": [kind, "u4"], "selp": [kind, kind, "bool"], "bfe": [kind, "u4", "u4"]}
        sources = [self.value(*pair) for pair in zip(a[1:], kinds.get(name, [kind, kind, wide]), strict=False)]
        return [a[0]], "u4" if name == "popc" else wide, template.format(*sources, T=kind, W=wide, LEFT="l" in i.op)

    def _move(self, to: str, source: str, kind: str) -> tuple[list[str], str, str]:
        """Also of the parts of a register, the lowest first: {a, b} = c, or c = {a, b}."""
        if to[0] == "{":
            part = f"u{int(kind[1]) // len(members(to))}"
            return members(to), part, f"{self.value(source, kind)}.view({part}).reshape(c.threads, -1).T.copy()"
        if source[0] == "{":
            part = f"u{int(kind[1]) // len(members(source))}"
            return [to], kind, f"np.stack({self.values(source, part)}, 1).view({kind})[:, 0]"
        return [to], kind, self.value(source, kind)

    def _convert(self, to: str, sources: list[str], op: list[str]) -> tuple[list[str], str, str]:
        result, source = (x for x in op[1:] if re.fullmatch(r"(bf|tf|[fsu])\d+(x2)?", x))
        kind, rounding = numpy_type(result), next((ROUNDINGS[r] for r in op if r in ROUNDINGS), None)
        x = self.value(sources[0], numpy_type(source))
        x = f"widen({x})" if source == "bf16" else x
        if result.endswith("x2"):  # two numbers, the first into the upper half
            x = f"join({self.value(sources[1], 'f4')}, {x}, '{result[:-2]}')"
        elif result == "tf32":  # fp32 of which the lower 13 bits do not count
            x = f"({x}.view(u4) + u4(0x1000)) & u4(0xFFFFE000)"
        elif result == "bf16":
            x = f"narrow({x})"
        elif "f" in source and kind[0] != "f":
            x = f"to_integer({x}, {kind}, {rounding})"
        else:
            x = f"{rounding or ''}({x}).astype({kind})"
        return [to], kind, x
