"""One CTA (a Triton program): its threads are lanes of numpy arrays, and all of them execute an instruction at once.

Threads. A CTA of a kernel with num_warps=4 has 128 threads. 32 neighbours are a *warp*, which a GPU issues one
instruction for. Where threads branch apart, those at the lowest place of the text go on until all meet again.
Barriers. `bar.sync` waits for all threads of the CTA. Here nobody has to wait, so what a barrier still does is order:
memory.py names two accesses that no barrier separates.
Warps talk without memory: a *shuffle* hands each lane another lane's register, `redux` and `vote` combine 32 lanes, and
an *mma* multiplies two small matrices whose elements are spread over the registers of the warp.
"""

from __future__ import annotations

import linecache
from typing import Any

import numpy as np

from tests.kernels.ptx.memory import Clock, Memory, PtxError, Region
from tests.kernels.ptx.numbers import halves
from tests.kernels.ptx.parse import Program, parse
from tests.kernels.ptx.translate import NAMES, SPECIAL, Translator

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # the names in PTX's tables of fragments
ATOMICS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
           "xor": np.bitwise_xor}  # fmt: skip


class Kernel:
    """A program whose blocks become functions when they are first reached."""

    def __init__(self, ptx: str):
        self.program: Program = parse(ptx)
        self.translator = Translator(self.program)
        self.functions: dict[tuple[int, bool], Any] = {}
        self.origins: dict[str, list[str]] = {}
        self.launches = 0

    def function(self, number: int, masked: bool) -> Any:
        if (number, masked) not in self.functions:
            source, origin = self.translator.block(number, masked)
            file = f"<{self.program.name} {id(self)} block {number}{' masked' if masked else ''}>"
            linecache.cache[file] = (len(source), None, source.splitlines(True), file)
            self.origins[file] = origin
            names = dict(NAMES)
            exec(compile(source, file, "exec"), names)
            self.functions[number, masked] = names["block"]
        return self.functions[number, masked]

    def instruction(self, error: BaseException) -> str:
        """The instruction at which an error arose."""
        trace, text = error.__traceback__, ""
        while trace is not None:
            lines = self.origins.get(trace.tb_frame.f_code.co_filename)
            text = lines[trace.tb_lineno - 1] if lines else text
            trace = trace.tb_next
        return text


class Cta:
    def __init__(self, kernel: Kernel, memory: Memory, clock: Clock, parameters: dict[str, int],
                 place: tuple[int, ...], grid: tuple[int, ...], shared_bytes: int):  # fmt: skip
        self.kernel, self.memory, self.clock, self.parameters = kernel, memory, clock, parameters
        self.threads = kernel.program.threads
        self.shared = Region("shared memory", 0, shared_bytes, shared=True)
        self.tid = np.arange(self.threads)
        self.place: Any = np.zeros(self.threads, np.int64)  # the block that each thread is at
        self.copies: list[list[Any]] = [[]]  # groups of cp.async that are under way, the last not yet committed
        self.instructions = self.stores = 0
        numbers = (0, 0, 0, *place, *grid, self.threads, 1, 1, 0)
        self.registers = [np.full(self.threads, number, np.uint32) for number in numbers]
        self.registers[0] = self.tid.astype(np.uint32)
        self.registers[len(SPECIAL) - 1] = (self.tid % 32).astype(np.uint32)
        clock.sync()

    def run(self) -> None:
        blocks, R, end = self.kernel.program.blocks, self.registers, len(self.kernel.program.blocks)
        at, together = 0, True
        while True:
            if not together:
                at = int(self.place.min())
                mask = self.place == at
                together = bool(mask.all())
            if at == end:
                return
            m = None if together else mask
            if blocks[at]:
                function = self.kernel.function(at, not together)
                R += [np.zeros(self.threads, kind) for kind in list(self.kernel.translator.kinds.values())[len(R) :]]
                try:
                    function(self, R, self.kernel.translator.constants, m)
                except Exception as error:
                    error.add_note(f"at {self.kernel.instruction(error)}")
                    raise
                warps = self.threads // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
                self.instructions += len(blocks[at]) * warps
            at, together = self.next(at, m)

    def next(self, at: int, m: Any) -> tuple[int, bool]:
        """Move on the threads that executed the block; where they are now, if all of them are there."""
        block, target = self.kernel.program.blocks[at], at + 1
        last = block[-1] if block else None
        taken: Any = True
        if last is not None and last.op[0] in ("bra", "ret", "exit"):
            target = (
                self.kernel.program.labels[last.arguments[0]]
                if last.op[0] == "bra"
                else len(self.kernel.program.blocks)
            )
            if last.guard:
                taken = self.registers[self.kernel.translator.register(last.guard)] ^ last.unless
        if m is None:
            if taken is True or taken.all():
                return target, True
            if not taken.any():
                return at + 1, True
            self.place = np.where(taken, target, at + 1)
        else:
            self.place = np.where(m, np.where(taken, target, at + 1), self.place)
        return at, False

    # Memory. `mask`: the threads that take part, or None for all.

    def parameter(self, name: str, kind: Any) -> Any:
        size = np.dtype(kind).itemsize
        return np.full(self.threads, self.parameters[name] & (1 << 8 * size) - 1, f"u{size}").view(kind)

    def lanes(self, mask: Any) -> Any:
        return self.tid if mask is None else np.nonzero(mask)[0]

    def load(self, shared: bool, mask: Any, address: Any, kind: Any, count: int) -> Any:
        """`count` neighbouring numbers for each thread: [count, threads]."""
        lanes, size = self.lanes(mask), np.dtype(kind).itemsize * count
        out = np.zeros((count, self.threads), kind)
        if len(lanes):
            self.clock.tick()
            where = address if mask is None else address[lanes]
            for region, part in [(self.shared, slice(None))] if shared else self.memory.parts(where, size):
                items = region.load(where[part], size, lanes[part], self.clock)
                out[:, lanes[part]] = items.view(kind).reshape(-1, count).T
            if not shared:
                self.memory.bytes_read += size * len(np.unique(where))
        return out

    def store(self, shared: bool, mask: Any, address: Any, values: list[Any]) -> None:
        lanes = self.lanes(mask)
        if len(lanes):
            self.clock.tick()
            size = values[0].itemsize * len(values)
            items = np.stack(values, 1)[lanes].reshape(-1).view(f"V{size}")
            where = address[lanes]
            for region, part in [(self.shared, slice(None))] if shared else self.memory.parts(where, size):
                region.store(where[part], items[part], lanes[part], self.clock)
            if not shared:
                self.stores += 1
                self.memory.bytes_written += size * len(np.unique(where))

    def atomic(self, shared: bool, mask: Any, name: str, address: Any, values: list[Any]) -> Any:
        """One thread after the other reads the number at its address and writes a new one; returns what each read."""
        lanes, kind = self.lanes(mask), values[0].dtype
        out = np.zeros(self.threads, kind)
        if len(lanes):
            self.clock.tick()
            where = address[lanes]
            for region, part in [(self.shared, slice(None))] if shared else self.memory.parts(where, kind.itemsize):
                numbers, at = region.atomic(where[part], kind.itemsize, lanes[part], self.clock)
                numbers = numbers.view(kind)
                for lane, i in zip(lanes[part].tolist(), at.tolist(), strict=True):
                    old = out[lane] = numbers[i]
                    if name == "cas":
                        numbers[i] = values[1][lane] if old == values[0][lane] else old
                    else:
                        numbers[i] = ATOMICS[name](old, values[0][lane]) if name in ATOMICS else values[0][lane]
            if not shared:
                self.stores += 1
                self.memory.bytes_read += kind.itemsize * len(np.unique(where))
                self.memory.bytes_written += kind.itemsize * len(np.unique(where))
        return out

    def barrier(self, mask: Any) -> None:
        if mask is not None and not (mask == (self.place < len(self.kernel.program.blocks))).all():
            raise PtxError("some threads wait at a barrier that the others are not at")
        self.clock.sync()

    def warp_barrier(self, mask: Any) -> None:
        self.whole_warps(mask)
        if self.threads == 32:
            self.clock.sync()

    def copy(self, mask: Any, to: Any, source: Any, size: int, taken: Any) -> None:
        """cp.async: global memory to shared memory, past the registers. It arrives when it is waited for, not before."""
        lanes = self.lanes(mask)
        if len(lanes):
            self.shared.forget(to[lanes], size)
            items = np.zeros((len(lanes), size), np.uint8)
            real = np.ones(len(lanes), bool) if taken is None else taken[lanes] > 0  # the others are filled with 0
            if real.any():
                self.clock.tick()
                where = source[lanes][real]
                for region, part in self.memory.parts(where, size):
                    chosen = np.nonzero(real)[0][part]
                    items[chosen] = (
                        region.load(where[part], size, lanes[chosen], self.clock).view(np.uint8).reshape(-1, size)
                    )
                self.memory.bytes_read += size * len(np.unique(where))
            self.copies[-1].append((to[lanes], items.reshape(-1).view(f"V{size}"), lanes))

    def commit_copies(self) -> None:
        self.copies.append([])

    def wait_for_copies(self, newest: int, everything: bool) -> None:
        """All but the newest groups have arrived."""
        if everything:
            self.copies.append([])
        while len(self.copies) - 1 > newest:
            for to, items, lanes in self.copies.pop(0):
                self.clock.tick()
                self.shared.store(to, items, lanes, self.clock)

    # What the 32 lanes of a warp do together.

    def whole_warps(self, mask: Any) -> None:
        if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
            raise PtxError("the lanes of a warp have branched apart, and this instruction needs all of them")

    def shuffle(self, mask: Any, how: str, value: Any, lane: Any, clamp: Any) -> tuple[Any, Any]:
        self.whole_warps(mask)
        mine, lane = self.tid % 32, lane.astype(np.int64)
        source = {"bfly": mine ^ lane, "up": mine - lane, "down": mine + lane, "idx": lane}[how]
        inside = (source >= 0) & (source <= 31)
        return value[self.tid - mine + np.where(inside, source, mine)], inside

    def reduce(self, mask: Any, name: str, value: Any) -> Any:
        self.whole_warps(mask)
        return ATOMICS[name].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype).repeat(32)

    def vote(self, mask: Any, how: str, value: Any) -> Any:
        votes = (value if mask is None else value & mask).reshape(-1, 32)
        if how == "ballot":
            return (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32).repeat(32)
        all_, any_ = votes.all(1), votes.any(1)
        return {"all": all_, "any": any_, "uni": all_ | ~any_}[how].repeat(32)

    def match(self, mask: Any, value: Any) -> Any:
        """For each lane the set of lanes with its value."""
        self.whole_warps(mask)
        rows = value.reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]).astype(np.uint32)
        return (same << LANE.astype(np.uint32)).sum(2, dtype=np.uint32).reshape(-1)

    def load_matrices(self, mask: Any, address: Any, count: int, transposed: bool) -> list[Any]:
        """ldmatrix: matrices of 8 rows of 8 halves. Lanes 8 i to 8 i + 7 name the rows of matrix i; lane 4 r + c then
        holds elements 2 c and 2 c + 1 of row r."""
        self.whole_warps(mask)
        self.clock.tick()
        loaded = []
        for i in range(count):
            rows = (self.tid // 8 % 4 == i) & (True if mask is None else mask)
            halves = self.shared.load(address[rows], 16, self.tid[rows], self.clock).view(np.uint16).reshape(-1, 8, 8)
            spread = (
                np.ascontiguousarray(halves.transpose(0, 2, 1) if transposed else halves).view(np.uint32).reshape(-1)
            )
            out = np.zeros(self.threads, np.uint32)
            out[slice(None) if mask is None else mask] = spread
            loaded.append(out)
        return loaded

    def store_matrices(self, mask: Any, address: Any, values: list[Any], transposed: bool) -> None:
        self.whole_warps(mask)
        self.clock.tick()
        for i, value in enumerate(values):
            rows = (self.tid // 8 % 4 == i) & (True if mask is None else mask)
            halves = (value if mask is None else value[mask]).view(np.uint16).reshape(-1, 8, 8)
            halves = np.ascontiguousarray(halves.transpose(0, 2, 1) if transposed else halves)
            self.shared.store(address[rows], halves.reshape(-1).view("V16"), self.tid[rows], self.clock)

    def multiply(self, mask: Any, kind: str, a: list[Any], b: list[Any], sums: list[Any]) -> list[Any]:
        """mma: A [16, k] @ B [k, 8] + C [16, 8] in fp32, for each warp. Lane 4 g + q holds of A the rows g and g + 8, of B
        the column g, and of C the columns 2 q and 2 q + 1 of rows g and g + 8."""
        self.whole_warps(mask)
        warps, per = self.threads // 32, 1 if kind == "tf32" else 2  # numbers in a register
        A, B = (np.zeros((warps, *size), np.float32) for size in ((16, 4 * per * len(a) // 2), (4 * per * len(b), 8)))
        for registers, matrix in ((a, A), (b, B)):
            for i, register in enumerate(registers):
                parts = [(register & np.uint32(0xFFFFE000)).view(np.float32)] if per == 1 else halves(register, kind)
                for h, part in enumerate(parts):
                    k = per * MEMBER + h + 4 * per * (i // 2 if matrix is A else i)
                    index = (GROUP + 8 * (i % 2), k) if matrix is A else (k, GROUP)
                    matrix[:, index[0], index[1]] = part.reshape(warps, 32)
        C = np.stack(sums, 1).reshape(warps, 32, 4)
        product = A @ B
        at = [(GROUP + 8 * (i // 2), 2 * MEMBER + i % 2) for i in range(4)]
        return [(C[:, :, i] + product[:, row, column]).reshape(-1) for i, (row, column) in enumerate(at)]
