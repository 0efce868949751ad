"""PTX text to basic blocks: runs of instructions that are entered at the top only and left at the bottom only.

PTX is the assembly that Triton emits for a GPU. One statement is `@guard op.modifiers destination, sources;`:

    @%p3 ld.global.v2.b32 {%r1, %r2}, [%rd4+16];    threads whose %p3 is set load 8 bytes from %rd4 + 16
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """guard: the predicate register that decides whether a thread takes part, or ""; unless: it must be false."""

    guard: str
    unless: bool
    op: list[str]  # ["ld", "global", "v2", "b32"]
    arguments: list[str]  # ["{%r1, %r2}", "[%rd4+16]"]
    text: str


class Program(NamedTuple):
    """One kernel. blocks: in the order of the text; labels: the block that each begins."""

    name: str
    parameters: list[tuple[str, str]]  # (type, name)
    threads: int
    registers: dict[str, str]  # prefix of the register's name, as %rd: its type
    blocks: list[list[Instruction]]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
    body = body[:found] if (found := body.find("// -- End function")) >= 0 else body
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|section|pragma)\b[^\n]*", "", body, flags=re.M)
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", body))
    registers: dict[str, str] = {}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        text = statement.strip().lstrip("{} \t\n")  # braces around a statement open and close a scope of names
        while label := re.match(r"([\w$]+):\s*", text):
            text = text[label.end() :].lstrip("{} \t\n")
            if label[1] in targets:
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            registers |= {name.strip().split("<")[0]: kind[1:] for name in names.split(",")}
        elif text:
            blocks[-1].append(_instruction(" ".join(text.split())))
            if blocks[-1][-1].op[0] in ("bra", "ret", "exit"):
                blocks.append([])
    return Program(
        re.search(r"\.entry\s+(\w+)", head)[1],  # type: ignore[index]
        re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+_param_\d+)", head),
        int(re.search(r"\.reqntid\s+(\d+)", head)[1]),  # type: ignore[index]
        registers,
        blocks,
        labels,
    )


def _instruction(text: str) -> Instruction:
    guard, unless, rest = re.match(r"(?:@(!)?(%\w+)\s+)?(.*)", text).group(2, 1, 3)  # type: ignore[union-attr]
    op, _, operands = rest.partition(" ")
    arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
    return Instruction(guard or "", bool(unless), op.split("."), arguments, text)


def members(argument: str) -> list[str]:
    """The names in {a, b, c, d}; of a plain operand itself."""
    return re.findall(r"[^\s,{}]+", argument)
