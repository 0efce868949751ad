"""PTX text to basic blocks: runs of instructions that are entered at the top only and left at the bottom only.

PTX is the assembly that Triton emits for a GPU. One statement is `@guard op.modifiers destination, sources;`:

    @%p3 ld.global.v2.b32 {%r1, %r2}, [%rd4+16];    threads whose %p3 is set load 8 bytes from %rd4 + 16
"""

from __future__ import annotations

import re
from typing import NamedTuple

JUMPS = ("bra", "ret", "exit")


class Instruction(NamedTuple):
    """guard: the predicate register that decides whether a thread takes part, or ""; unless: it must be false."""

    guard: str
    unless: bool
    op: list[str]  # ["ld", "global", "v2", "b32"]
    arguments: list[str]  # ["{%r1, %r2}", "[%rd4+16]"]
    text: str


class Program:
    """One kernel: its parameters, its threads, the types of its registers, its blocks in the order of the text."""

    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
        self.name = head.split()[1].rstrip("(")
        self.parameters: list[str] = re.findall(r"\w+_param_\d+", head)
        self.threads = int(head.split(".reqntid")[1].split()[0].rstrip(","))
        self.registers: dict[str, str] = {}  # by the prefix of their names: {"%rd": "b64"}
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}  # the block that each begins
        body = re.sub(r"//[^\n]*", "", body.split("// -- End function")[0])
        body = re.sub(r"^\s*\.(loc|file|section|pragma)\b[^\n]*", "", body, flags=re.M)
        targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", body))
        for statement in body.split(";"):
            text = statement.lstrip("{} \t\n").rstrip()  # braces around statements are a scope of names
            while label := re.match(r"([\w$]+):[\s{}]*", text):
                text = text[label.end() :]
                if label[1] in targets:
                    self._begin_block()
                    self.labels[label[1]] = len(self.blocks) - 1
            if text.startswith(".reg"):
                _, kind, names = text.split(None, 2)
                self.registers |= {name.strip().split("<")[0]: kind[1:] for name in names.split(",")}
            elif text:
                self.blocks[-1].append(_instruction(" ".join(text.split())))
                if self.blocks[-1][-1].op[0] in JUMPS:
                    self._begin_block()

    def _begin_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])


def _instruction(text: str) -> Instruction:
    unless, guard, op, operands = re.fullmatch(r"(?:@(!)?(%\w+) )?(\S+) ?(.*)", text).groups()  # type: ignore[union-attr]
    return Instruction(guard or "", bool(unless), op.split("."), re.findall(r"[{[][^]}]*[]}]|[^\s,]+", operands), text)


def members(argument: str) -> list[str]:
    """The names in {a, b, c, d}; of a plain operand itself."""
    return re.findall(r"[^\s,{}]+", argument)
