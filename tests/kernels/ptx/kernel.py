"""PTX becomes Python: each block, entered at the top and left at the bottom only, is a function, and each instruction a
few lines of numpy, which the traceback of a refused access shows. R are the registers, arrays with one number for each
thread of the CTA `c`; `m` are the threads that execute the block, `k` those that the guard of an instruction lets in:
`@%p1 add.s32 %r3, %r1, 4;` is `v = R["%r1"].view(i4) + i4_4` and `R["%r3"] = np.where(k, v.view(u4), R["%r3"])`.
In EXPRESSIONS {1}, {2} ... are sources of the type that the instruction names or, in {2:b32}, of another; {@1} is an
address, {*1} a list of registers, {#1} the bare text; {T} is the numpy type of the result, {n} the number of results.
Halves are computed in fp32. Denormals are kept where a GPU may flush them.
"""

from __future__ import annotations

import linecache
import re
from typing import Any

import numpy as np
import torch

TYPES = {"pred": "b1", "bf16": "u2", "f16": "u2", "bf16x2": "u4", "f16x2": "u4", "tf32": "u4", "f32": "f4", "f64": "f8"}
TYPES |= {f"{kind}{8 * size}": f"{of}{size}" for kind, of in ("bu", "uu", "si") for size in (1, 2, 4, 8)}
# to fp32 and back; a tf32 is an fp32 whose lower 13 bits do not count, of an x2 the lower half of the bits comes first
DECODE = {"bf16": "({}.astype(u4) << u4(16)).view(f4)", "f16": "{}.view(f2).astype(f4)",
          "bf16x2": "(parts({}, u2).astype(u4) << u4(16)).view(f4)", "f16x2": "parts({}, f2).astype(f4)",
          "tf32": "({} & u4(0xFFFFE000)).view(f4)[None]"}  # fmt: skip
NARROW = "torch.from_numpy({}).bfloat16().view(torch.int16).numpy().view(u2)"
ENCODE = {"bf16": NARROW, "bf16x2": f"joined({NARROW}, u4)", "f16": "{}.astype(f2).view(u2)",
          "f16x2": "joined({}.astype(f2), u4)", "tf32": "({}.view(u4) + u4(0x1000)) & u4(0xFFFFE000)"}  # fmt: skip
EXPRESSIONS = {
    "add": "{1} + {2}", "sub": "{1} - {2}", "mul": "{1} * {2}", "neg": "-{1}", "not": "~{1}",
    "mad": "{1} * {2} + {3}", "fma": "({1}.astype(f8) * {2} + {3}).astype({T})",  # of fp32: rounded once
    "mul.wide": "{1}.astype({T}) * {2}.astype({T})", "mad.wide": "{1}.astype({T}) * {2}.astype({T}) + {3:result}",
    "mul.hi": "({1}.astype({W}) * {2}.astype({W}) >> 8 * {1}.itemsize).astype({T})", "div.full": "{1} / {2}",
    "div": "({1} - np.fmod({1}, {2})) // {2}", "rem": "np.fmod({1}, {2})", "min": "np.fmin({1}, {2})",
    "max": "np.fmax({1}, {2})", "popc": "np.bitwise_count({1}).astype(u4)", "rcp": "{T}(1) / {1}",
    "rsqrt": "{T}(1) / np.sqrt({1})", "ex2": "np.exp2({1})", "and": "{1} & {2}", "or": "{1} | {2}", "xor": "{1} ^ {2}",
    "selp": "np.where({3:pred}, {1}, {2})", "shl": "{1} << {2:b32}.astype({T})", "shr": "{1} >> {2:b32}.astype({T})",
    "bfe": "({1} << (32 - {2:b32} - {3:b32}).astype({T})) >> (32 - {3:b32}).astype({T})",  # {3} bits from bit {2} on
    # four of the eight bytes of two registers, each named by four bits of {3}
    "prmt": "joined(np.take_along_axis(parts(joined([{1}, {2}], u8), u1), {3} >> 4 * np.c_[:4].astype(u4) & 7, 0), u4)",
    "mov": "{1}", "mov.split": "parts({1}, {T})", "mov.join": "joined({*1:half}, {T})", "cvt": "{1}.astype({T})",
    "cvt.rni": "to_integer(np.rint({1}), {T})", "cvt.rzi": "to_integer(np.trunc({1}), {T})",
    "cvt.bf16x2": "np.stack([{2}, {1}])", "cvt.f16x2": "np.stack([{2}, {1}])",
    # a NaN fails every ordered comparison, and is what the unordered ones, with a u, are true for
    "setp.eq": "{1} == {2}", "setp.lt": "{1} < {2}", "setp.le": "{1} <= {2}", "setp.gt": "{1} > {2}",
    "setp.ge": "{1} >= {2}", "setp.ne": "({1} < {2}) | ({1} > {2})", "setp.num": "({1} == {1}) & ({2} == {2})",
    "setp.nan": "({1} != {1}) | ({2} != {2})", "setp.neu": "{1} != {2}", "setp.equ": "~(({1} < {2}) | ({1} > {2}))",
    "setp.ltu": "~({1} >= {2})", "setp.leu": "~({1} > {2})", "setp.gtu": "~({1} <= {2})", "setp.geu": "~({1} < {2})",
    "ld": "c.load({space}, k, {@1}, {T}, {n})", "st": "c.store({space}, k, {@0}, {*1})", "ld.param": "{1}",
    "atom": "c.atomic({space}, k, {op}, {@1}, {2})", "cp": "c.copy(k, {@0}, {@1}, {#2}, {3:b32})",
    "cp.commit_group": "c.copies.append([])", "cp.wait_group": "c.wait_for_copies({#0})", "bar": "c.barrier(k)",
    "bar.warp": "c.barrier(k) if c.threads == 32 else c.whole(k)",  # Triton asks for it if the warp is the whole CTA
    "shfl": "c.shuffle(k, {op}, {1}, {2:s32})", "redux": "c.reduce(k, {op}, {1})",
    "vote": "np.packbits({1:pred} & c.whole(k), bitorder='little').view(u4).repeat(32)",
    "ldmatrix": "c.load_matrices(k, {@1}, {n}, {op})", "mma.bf16": "c.multiply(k, {*1:bf16x2}, {*2:bf16x2}, {*3})",
    "stmatrix": "c.store_matrices(k, {@0}, {*1:b32}, *{op}[7:])",  # one argument too many for a transposed one
    "mma.f16": "c.multiply(k, {*1:f16x2}, {*2:f16x2}, {*3})", "mma.tf32": "c.multiply(k, {*1:tf32}, {*2:tf32}, {*3})",
}  # fmt: skip


class Kernel:
    def __init__(self, ptx: str, variant: str = ""):
        head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
        body = body.split("// -- End function")[0].replace("global_smem", "0")  # where shared memory begins
        body = re.sub(r"//[^\n]*|^\s*\.(loc|file|section|pragma)\b[^\n]*", "", body, flags=re.M)
        self.name = head.split()[1].rstrip("(")
        self.parameters: list[str] = re.findall(r"\w+_param_\d+", head)
        self.threads = int(head.split(".reqntid")[1].split()[0].rstrip(","))
        types = {name: TYPES[kind] for kind, name in re.findall(r"\.reg \.(\w+)\s+(%\w+)<", body)}
        types = {name: types.get(name.rstrip("0123456789"), "u4") for name in re.findall(r"%[\w.]+", body)}
        types |= dict.fromkeys(self.parameters, "u8")
        self.registers = {name: np.zeros(self.threads, of) for name, of in types.items()}  # as a CTA finds them
        self.registers["%tid.x"] = np.arange(self.threads, dtype=np.uint32)
        self.names: dict[str, Any] = {of: np.dtype(of).type for of in (*TYPES.values(), "f2")}  # for the functions
        self.names |= {"np": np, "torch": torch, "parts": parts, "joined": joined, "to_integer": to_integer}
        self.functions: dict[tuple[int, bool], Any] = {}
        self.variant, self.launches = variant, 0
        # instructions: 'R["%p1"]' or "" for all threads, ["ld", "global", "b32"], ["%r1", "[%rd4+16]"], the text
        self.blocks: list[list[tuple[str, list[str], list[str], str]]] = [[]]
        self.labels: dict[str, int] = {}  # the block that each begins
        targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\S+?);", body))
        body = re.sub(r"(\$\w+):", lambda label: f"label {label[1]};" if label[1] in targets else "", body)
        for statement in body.split(";"):
            text = " ".join(statement.lstrip("{} \t\n").split())  # braces around statements are a scope of names
            if text.startswith("label"):
                self.blocks += [[]] if self.blocks[-1] else []
                self.labels[text.split()[1]] = len(self.blocks) - 1
            elif text and not text.startswith(".reg"):
                unless, guard, op, operands = re.findall(r"^(?:@(!?)(%\w+) )?(\S+) ?(.*)", text)[0]
                guard = guard and f'{"~" if unless else ""}R["{guard}"]'
                arguments = re.findall(r"[{[][^]}]*[]}]|[^\s,]+", operands)
                self.blocks[-1].append((guard, op.split("."), arguments, text))
                self.blocks += [[]] if op in ("bra", "bra.uni", "ret") else []

    def function(self, number: int, masked: bool) -> Any:
        """A block as a function, which returns the number of the next one: of all threads, or of each."""
        if (number, masked) not in self.functions:
            lines = ["def block(c, R, m):"]
            for guard, op, arguments, text in self.blocks[number]:
                mask = " & ".join(["m"] * masked + [guard] * bool(guard))
                if op[0] in ("bra", "ret"):
                    to = self.labels[arguments[0]] if arguments else len(self.blocks)
                    lines.append(f"    return np.where({guard}, {to}, {number + 1})" if guard else f"    return {to}")
                else:
                    body = self.translate(op, [*arguments, "1"], bool(mask))  # 1: a cp.async without a condition
                    lines += [f"    {line}  # {text}" for line in (f"k = {mask or 'c.everybody'}", *body)]
            source = "\n".join([*lines, f"    return {number + 1}"])
            file = f"<{self.name} {id(self)} block {number} {masked}>"
            linecache.cache[file] = (len(source), None, source.splitlines(True), file)
            exec(compile(source, file, "exec"), self.names)
            self.functions[number, masked] = self.names["block"]
        return self.functions[number, masked]

    def translate(self, op: list[str], a: list[str], masked: bool) -> list[str]:
        name, kind = op[0], op[-1] if op[-1] in TYPES else "b32"
        if name == "mov" and "{" in a[0] + a[1]:
            op = ["mov", "split" if a[0][0] == "{" else "join"]
        key = next((f"{name}.{x}" for x in op if f"{name}.{x}" in EXPRESSIONS), name)
        to = [] if name in ("st", "bar", "cp", "stmatrix") else members(a[0])
        half, wide = (f"{kind[0]}{int(TYPES[kind][1]) * bits}" for bits in (4, 16))
        results = {"setp": "pred", "ldmatrix": "b32", "cvt": op[-2], "split": half, "wide": wide}
        result = results.get(key.split(".")[-1], results.get(name, kind))
        values = {"T": "f4" if result in DECODE else TYPES[result], "W": TYPES.get(wide, "object"), "n": len(to),
                  "op": op, "space": "c.shared" if "shared" in op else "c.memory"}  # fmt: skip

        def operand(place: re.Match[str]) -> str:
            how, what, of = place.groups()
            if what in values or how == "#":
                return str(values[what] if what in values else a[int(what)])
            of = {"half": half, "result": result, "": "b64" if how == "@" else kind}.get(of, of)
            terms = re.sub(r"\+ 0\b", "", a[int(what)]).split("+") if how == "@" else members(a[int(what)])
            read = (" + " if how == "@" else ", ").join(self.read(x, of) for x in terms)
            return f"[{read}]" if how == "*" else read

        lines, of = ["v = " + re.sub(r"{([@*#]?)(\w+):?(\w*)}", operand, EXPRESSIONS[key])], TYPES[result]
        for n, register in enumerate(to):
            if register[0] == "%":  # others are never read; what is left of a wider one is filled with 0 or the sign
                value = ENCODE.get(result, "{}").format(f"v[{n}]" if len(to) > 1 else "v")
                want = self.registers[register].dtype.str[1:]
                value += "" if of[1] == want[1] else f".astype({of[0]}{want[1]})"
                value += "" if of[0] in "ub" else f".view({want})"
                lines.append(f'R["{register}"] = ' + (f'np.where(k, {value}, R["{register}"])' if masked else value))
        return lines

    def read(self, text: str, kind: str) -> str:
        """A source operand as an array of PTX's type: of a wider register the lower bits."""
        text, of = text.strip("[] "), TYPES[kind]
        if text in self.registers:
            source = f'R["{text}"]' + ("" if self.registers[text].itemsize == int(of[1]) else f".astype(u{of[1]})")
            source += "" if of[0] in "ub" else f".view({of})"
        else:
            number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
            bits = number & (1 if of == "b1" else (1 << 8 * int(of[1])) - 1)
            source = f"{of}_{bits:x}"
            self.names[source] = np.full(self.threads, bits, f"u{of[1]}").view(of)
        return DECODE.get(kind, "{}").format(source)


def members(argument: str) -> list[str]:
    """The names in {a, b, c, d} or a|b."""
    return re.findall(r"[^\s,{}|]+", argument)


def parts(x: Any, kind: Any) -> Any:
    """The numbers that lie side by side in each register, the lowest bits first: [parts, threads]."""
    return x.view(kind).reshape(len(x), -1).T.copy()


def joined(numbers: Any, kind: Any) -> Any:
    return np.stack(numbers, 1).view(kind)[:, 0]


def to_integer(x: Any, kind: Any) -> Any:
    """Saturating, and 0 for a NaN."""
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    return np.where(x >= high, kind(high), np.nan_to_num(x).clip(low).astype(kind))
