"""One CTA (a Triton program): its threads are lanes of numpy arrays, and all of them execute an instruction at once.

Threads. A CTA of a kernel with num_warps=4 has 128 threads. 32 neighbours are a *warp*, for which a GPU issues one
instruction. Where threads branch apart, those at the lowest place of the text go on, until all meet again.
Barriers. `bar.sync` waits for all threads of the CTA. Here nobody has to wait, so what is left of it is order:
memory.py refuses accesses that need a barrier between them and have none.
Warps talk without memory: a *shuffle* hands each lane another lane's register, `redux` and `vote` combine 32 lanes, and
an *mma* multiplies two small matrices whose elements are spread over the registers of the warp.
"""

from __future__ import annotations

import linecache
import traceback
from typing import Any

import numpy as np

from tests.kernels.ptx.memory import SHARED, Memory, PtxError, Region
from tests.kernels.ptx.numbers import halves
from tests.kernels.ptx.parse import JUMPS, Program
from tests.kernels.ptx.translate import NAMES, SPECIAL, Translator

LANE = np.arange(32, dtype=np.uint32)
GROUP, MEMBER = LANE // 4, LANE % 4  # as PTX's tables of fragments call them
CHANGES = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
           "xor": np.bitwise_xor, "exch": lambda old, new: new}  # fmt: skip


class Kernel:
    """A program whose blocks become functions when they are first reached."""

    def __init__(self, ptx: str):
        self.program = Program(ptx)
        self.translator = Translator(self.program)
        self.functions: dict[tuple[int, bool], Any] = {}
        self.launches = 0

    def function(self, number: int, masked: bool) -> Any:
        if (number, masked) not in self.functions:
            source, names = self.translator.block(number, masked), dict(NAMES)
            file = f"<{self.program.name} {id(self)} block {number} {masked}>"
            linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for what a traceback shows
            exec(compile(source, file, "exec"), names)
            self.functions[number, masked] = names["block"]
        return self.functions[number, masked]


class Cta:
    def __init__(self, kernel: Kernel, memory: Memory, parameters: dict[str, int], place: tuple[int, ...],
                 grid: tuple[int, ...], shared_bytes: int):  # fmt: skip
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.threads, self.end = kernel.program.threads, len(kernel.program.blocks)
        self.shared = Memory([Region(SHARED, 0, shared_bytes)])
        self.tid, self.everybody = np.arange(self.threads), np.ones(self.threads, bool)
        self.at: Any = np.zeros(self.threads, np.int64)  # the block that each thread is at
        self.copies: list[list[Any]] = [[]]  # groups of cp.async that are under way, the last one not yet committed
        self.instructions = self.stores = 0
        self.unpublished: set[int] = set()  # warps that wrote to global memory since the last barrier
        self.registers = [np.full(self.threads, x, np.uint32) for x in (0, 0, 0, *place, *grid, 0)]
        self.registers[0], self.registers[len(SPECIAL) - 1] = (x.astype(np.uint32) for x in (self.tid, self.tid % 32))
        memory.sync()  # no order between CTAs is looked for

    def run(self) -> None:
        R, translator = self.registers, self.kernel.translator
        at, mask = 0, None  # the block to execute, and which threads do; None: all
        while at < self.end:
            block = self.kernel.program.blocks[at]
            function = self.kernel.function(at, mask is not None)
            R += [np.zeros(self.threads, kind) for kind in list(translator.types.values())[len(R) :]]
            try:
                function(self, R, translator.constants, mask)
            except Exception as error:
                error.add_note(
                    [f.line or "" for f in traceback.extract_tb(error.__traceback__) if f.name == "block"][-1]
                )
                raise
            self.instructions += len(block) * (self.threads // 32 if mask is None else int(_warps(mask).any(1).sum()))
            at, mask = self._next(at, mask, block[-1] if block else None)

    def _next(self, at: int, mask: Any, last: Any) -> tuple[int, Any]:
        """Move the threads on that executed the block; return the lowest block at which threads are, and which."""
        jumps, target = last is not None and last.op[0] in JUMPS, at + 1
        if jumps:
            target = self.kernel.program.labels[last.arguments[0]] if last.op[0] == "bra" else self.end
        if mask is None and not (jumps and last.guard):
            return target, None
        taken = (
            self.registers[self.kernel.translator.register(last.guard)] ^ last.unless if jumps and last.guard else True
        )
        if mask is None and (taken.all() or not taken.any()):
            return (target if taken[0] else at + 1), None
        before = np.full(self.threads, at) if mask is None else self.at
        self.at = np.where(True if mask is None else mask, np.where(taken, target, at + 1), before)
        lowest = int(self.at.min())
        return lowest, None if (self.at == lowest).all() else self.at == lowest

    # Memory. `mask`: the threads that take part; None: all.

    def parameter(self, name: str, kind: Any) -> Any:
        size = np.dtype(kind).itemsize
        return np.full(self.threads, self.parameters[name] & (1 << 8 * size) - 1, f"u{size}").view(kind)

    def _lanes(self, mask: Any) -> Any:
        return self.tid if mask is None else np.nonzero(mask)[0]

    def load(self, memory: Memory, mask: Any, address: Any, kind: Any, count: int) -> Any:
        """`count` neighbouring numbers for each thread: [count, threads], or [threads] if it is one."""
        lanes, out = self._lanes(mask), np.zeros((count, self.threads), kind)
        if len(lanes):
            items = memory.load(address[lanes], np.dtype(kind).itemsize * count, lanes)
            out[:, lanes] = items.view(kind).reshape(-1, count).T
        return out if count > 1 else out[0]

    def store(self, memory: Memory, mask: Any, address: Any, values: list[Any]) -> None:
        lanes = self._lanes(mask)
        if len(lanes):
            memory.store(
                address[lanes],
                np.stack(values, 1)[lanes].reshape(-1).view(f"V{values[0].itemsize * len(values)}"),
                lanes,
            )
            if memory is self.memory:
                self.stores += 1
                self.unpublished.update((lanes // 32).tolist())

    def atomic(self, memory: Memory, mask: Any, how: str, address: Any, values: list[Any], releases: bool) -> Any:
        """Returns for each thread what was there before it came. releases: tells other CTAs that all is written."""
        lanes, before = self._lanes(mask), np.zeros_like(values[0])
        if releases and len(lanes) and self.unpublished - set((lanes // 32).tolist()):
            raise PtxError("race: this tells other CTAs of writes that other warps may not have done, no barrier")

        def change(lane: int, old: Any) -> Any:
            thread = lanes[lane]
            before[thread] = old
            if how == "cas":
                return values[1][thread] if old == values[0][thread] else old
            return CHANGES[how](old, values[0][thread])

        if len(lanes):
            memory.atomic(address[lanes], before.dtype, change)
            self.stores += memory is self.memory
        return before

    def barrier(self, mask: Any) -> None:
        if mask is not None and not (mask == (self.at < self.end)).all():
            raise PtxError("some threads wait at a barrier that the others are not at")
        self.memory.sync()
        self.shared.sync()
        self.unpublished.clear()

    def warp_barrier(self, mask: Any) -> None:
        """Orders 32 threads, which Triton asks for where they are the whole CTA."""
        self._whole(mask)
        if self.threads == 32:
            self.barrier(mask)

    def copy(self, mask: Any, to: Any, source: Any, size: int, real: Any) -> None:
        """cp.async: global to shared memory, past the registers. It arrives when it is waited for, not before."""
        lanes = self._lanes(mask)
        items, full = np.zeros(len(lanes), f"V{size}"), real[lanes]
        if full.any():
            items[full] = self.memory.load(source[lanes][full], size, lanes[full])
        if len(lanes):
            self.shared.forget(to[lanes], size)
            self.copies[-1].append((to[lanes], items, lanes))

    def wait_for_copies(self, newest: int) -> None:
        """All groups but the newest have arrived; -1: those not yet committed too."""
        while len(self.copies) - 1 > newest and self.copies:
            for copy in self.copies.pop(0):
                self.shared.store(*copy)
        self.copies = self.copies or [[]]

    # What the 32 lanes of a warp do together.

    def _whole(self, mask: Any) -> Any:
        """The threads in whole warps, as [threads] bool."""
        if mask is None:
            return self.everybody
        if (_warps(mask).any(1) != _warps(mask).all(1)).any():
            raise PtxError("the lanes of a warp have branched apart, and this instruction needs all of them")
        return mask

    def shuffle(self, mask: Any, how: str, value: Any, lane: Any) -> Any:
        self._whole(mask)
        mine, lane = self.tid % 32, lane.astype(np.int64)
        source = {"bfly": mine ^ lane, "up": mine - lane, "down": mine + lane, "idx": lane}[how]
        return value[self.tid - mine + np.where((source >= 0) & (source < 32), source, mine)]

    def reduce(self, mask: Any, how: str, value: Any) -> Any:
        self._whole(mask)
        return CHANGES[how].reduce(_warps(value), axis=1, dtype=value.dtype).repeat(32)  # type: ignore[attr-defined]

    def vote(self, mask: Any, how: str, value: Any) -> Any:
        votes = _warps(value & self._whole(mask))
        found = (
            (votes << LANE).sum(1, dtype=np.uint32) if how == "ballot" else {"all": votes.all, "any": votes.any}[how](1)
        )
        return found.repeat(32)

    def load_matrices(self, mask: Any, address: Any, count: int, transposed: bool) -> list[Any]:
        """ldmatrix: matrices of 8 rows of 8 halves. Lanes 8 i to 8 i + 7 name the rows of matrix i; lane 4 r + c then
        holds elements 2 c and 2 c + 1 of row r."""
        taking, loaded = self._whole(mask), []
        for i in range(count):
            rows = (self.tid // 8 % 4 == i) & taking
            matrix = self.shared.load(address[rows], 16, self.tid[rows]).view(np.uint16).reshape(-1, 8, 8)
            loaded.append(np.zeros(self.threads, np.uint32))
            loaded[-1][taking] = (
                np.ascontiguousarray(matrix.transpose(0, 2, 1) if transposed else matrix).view(np.uint32).ravel()
            )
        return loaded

    def store_matrices(self, mask: Any, address: Any, values: list[Any], transposed: bool) -> None:
        taking = self._whole(mask)
        for i, value in enumerate(values):
            rows, matrix = (self.tid // 8 % 4 == i) & taking, value[taking].view(np.uint16).reshape(-1, 8, 8)
            matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1) if transposed else matrix)
            self.shared.store(address[rows], matrix.reshape(-1).view("V16"), self.tid[rows])

    def multiply(self, mask: Any, kind: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
        """mma: A [16, K] @ B [K, 8] + C [16, 8] for each warp, in fp32. Lane 4 g + q holds rows g, g + 8 of A, column
        g of B, and columns 2 q and 2 q + 1 of rows g and g + 8 of C; a register holds two halves, or one tf32."""
        self._whole(mask)
        warps, per = self.threads // 32, 1 if kind == "tf32" else 2
        A, B = np.zeros((warps, 16, 2 * per * len(a)), np.float32), np.zeros((warps, 4 * per * len(b), 8), np.float32)
        for matrix, registers in ((A, a), (B, b)):
            for i, x in enumerate(registers):
                for h, part in enumerate(
                    [(x & np.uint32(0xFFFFE000)).view(np.float32)] if per == 1 else halves(x, kind)
                ):
                    k = per * MEMBER + h + 4 * per * (i // 2 if matrix is A else i)
                    index = (GROUP + 8 * (i % 2), k) if matrix is A else (k, GROUP)
                    matrix[:, index[0], index[1]] = _warps(part)
        product = A @ B
        return [x + product[:, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2].ravel() for i, x in enumerate(c)]


def _warps(x: Any) -> Any:
    return x.reshape(-1, 32)
