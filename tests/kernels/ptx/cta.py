"""One CTA: its threads are lanes of numpy arrays, and all of them execute an instruction at once. Accesses to memory
must be inside a tensor, aligned, and ordered: each byte remembers when and by whom it was last written and read, as
time * 2048 + thread, and a barrier makes all earlier times harmless. In global memory the warp is what counts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.kernels.ptx.kernel import Kernel, joined

ATOMIC, SEVERAL = 2046, 2047  # in the place of a thread; atomic accesses do not race with each other
SHARED = "shared memory"  # the name of its region
WATCHED = 1 << 22  # bytes; in larger tensors races are not looked for
GROUP, MEMBER = np.divmod(np.arange(32), 4)  # as PTX's tables of fragments call them
CHANGES: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                           "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new}  # fmt: skip


class PtxError(Exception):
    """The kernel did what a GPU would punish, or reward with garbage."""


class Region:
    """Bytes from `start` to `stop`: of a tensor, at their real address, or of shared memory, from 0."""

    def __init__(self, name: str, start: int, stop: int):
        self.name, self.start, self.stop, self.base = name, start, stop, start & ~15
        length = (stop - self.base + 15) & ~15  # whole items of 16 bytes, the largest access
        source: Any = bytearray(length) if name == SHARED else (ctypes.c_uint8 * length).from_address(self.base)
        self.bytes = np.frombuffer(source, "u1")
        self.written, self.read = (np.zeros(length if length <= WATCHED else 0, np.int64) for _ in range(2))


class Memory:
    """The tensors of a launch, or the shared memory of a CTA."""

    def __init__(self, regions: list[Region]):
        self.regions, self.now, self.barrier = regions, 0, 0
        self.bytes_read = self.bytes_written = 0  # an address that several threads name in one instruction counts once

    def load(self, address: Any, size: int, threads: Any) -> Any:
        """The `size` bytes at each thread's address, as items of that size."""
        items = np.empty(len(address), f"V{size}")
        for there, lanes, at in self.access(address, size, threads, "read"):
            items[lanes] = there[at]
        return items

    def store(self, address: Any, items: Any, threads: Any) -> None:
        for there, lanes, at in self.access(address, items.itemsize, threads, "write"):
            there[at] = items[lanes]
            if (there[at] != items[lanes]).any():
                raise PtxError("race: two threads write different values to one address in one instruction")

    def access(self, address: Any, size: int, threads: Any, how: str) -> Iterator[tuple[Any, Any, Any]]:
        """Check and count an access; yield, nearly always once, the items of a tensor, which lanes name one of them,
        and which they name. how: read, write, both, or neither, when a cp.async is under way to that place."""
        self.now += 1
        if (address & np.uint64(size - 1)).any():
            raise PtxError(f"an access of {size} bytes is not aligned")
        reads, writes, touched = "read" in how, "write" in how, size * len(np.unique(address))
        self.bytes_read += touched * reads
        self.bytes_written += touched * writes
        lanes = np.arange(len(address))
        while len(lanes):
            first = int(address[lanes[0]])
            region = next((r for r in self.regions if r.start <= first and first + size <= r.stop), None)
            if region is None:
                near = min(self.regions, key=lambda r: max(r.start - first, first - r.stop))
                raise PtxError(f"byte {first - near.start} of {near.name}, which has {near.stop - near.start}")
            inside = (address[lanes] >= region.start) & (address[lanes] <= region.stop - size)
            at = (address[lanes[inside]] - np.uint64(region.base)).astype(np.int64) // size
            if len(region.written):
                self.note(region, at, size, threads[lanes[inside]], reads, writes)
            yield region.bytes.view(f"V{size}"), lanes[inside], at
            lanes = lanes[~inside]

    def note(self, region: Region, at: Any, size: int, who: Any, reads: bool, writes: bool) -> None:
        """Remember an access, and refuse it if it races with another since the last barrier."""
        one = "thread" if region.name == SHARED else "warp"
        who = (who if region.name == SHARED or who[0] == ATOMIC else who // 32)[:, None]
        written, read = region.written.reshape(-1, size), region.read.reshape(-1, size)
        before, mine = written[at], who | self.now << 11
        if reads and region.name == SHARED and not before.all():
            raise PtxError("shared memory is read that nobody wrote, or that a cp.async not yet waited for will write")
        for what, last in (("wrote", before), ("read", read[at]))[: reads + 2 * writes]:
            recent = last > self.barrier
            if recent.any() and (bad := recent & (last & SEVERAL != who)).any():
                lane, byte = np.argwhere(bad)[0]
                raise PtxError(f"race: {one} {who[lane, 0]} uses what {last[lane, byte] & SEVERAL} {what}, no barrier")
        if reads and not writes:
            last = read[at]
            read[at] = np.where((last > self.barrier) & (last & SEVERAL != who), mine | SEVERAL, mine)
            read[at[(read[at] & SEVERAL != who).any(1)]] |= SEVERAL  # several threads in this very instruction
        else:
            written[at] = mine if writes else 0


class Cta:
    def __init__(self, kernel: Kernel, memory: Memory, shared_bytes: int, parameters: dict[str, int]):
        """parameters: of the kernel, and where the CTA is in its grid, as %ctaid.x."""
        self.kernel, self.memory, self.threads = kernel, memory, kernel.threads
        self.shared = Memory([Region(SHARED, 0, shared_bytes)])
        self.tid, self.everybody = np.arange(self.threads), np.ones(self.threads, bool)
        self.at = np.zeros(self.threads, np.int64)  # the block that each thread is at
        self.copies: list[list[Any]] = [[]]  # groups of cp.async that are under way, the last one not yet committed
        self.unpublished: set[int] = set()  # warps that wrote to global memory since the last barrier
        given = {n: np.full_like(kernel.registers[n], x) for n, x in parameters.items() if n in kernel.registers}
        self.registers = kernel.registers | given
        self.barrier(self.everybody)  # no order between CTAs is looked for

    def run(self) -> int:
        """Returns the instructions times the warps that executed them."""
        at, mask, instructions = 0, self.everybody, 0  # the block to execute, and which threads do
        while at < len(self.kernel.blocks):
            to = self.kernel.function(at, mask is not self.everybody)(self, self.registers, mask)
            instructions += len(self.kernel.blocks[at]) * int(mask.reshape(-1, 32).any(1).sum())
            if mask is not self.everybody or not isinstance(to, int):
                self.at = np.where(mask, to, self.at)
                to = int(self.at.min())
                mask = self.everybody if (self.at == to).all() else self.at == to
            at = to
        return instructions

    def load(self, memory: Memory, mask: Any, address: Any, kind: Any, count: int) -> Any:
        """`count` neighbouring numbers for each thread: [count, threads], or [threads] if it is one."""
        lanes, out = np.flatnonzero(mask), np.zeros((count, self.threads), kind)
        out[:, lanes] = memory.load(address[lanes], out.itemsize * count, lanes).view(kind).reshape(-1, count).T
        return out if count > 1 else out[0]

    def store(self, memory: Memory, mask: Any, address: Any, values: list[Any]) -> None:
        lanes = np.flatnonzero(mask)
        memory.store(address[lanes], joined(values, f"V{values[0].itemsize * len(values)}")[lanes], lanes)
        if memory is self.memory:
            self.unpublished.update((lanes // 32).tolist())

    def atomic(self, memory: Memory, mask: Any, op: list[str], address: Any, value: Any) -> Any:
        """One thread after the other changes the number at its address, and gets what was there before it came."""
        lanes, before = np.flatnonzero(mask), np.zeros_like(value)
        change = next(CHANGES[how] for how in CHANGES if how in op)
        who, releases = np.full(len(lanes), ATOMIC), "acq_rel" in op and memory is self.memory and len(lanes)
        if releases and self.unpublished - set((lanes // 32).tolist()):
            raise PtxError("race: this tells other CTAs of writes that other warps may not have done, no barrier")
        for items, here, at in memory.access(address[lanes], value.itemsize, who, "read, write"):
            numbers = items.view(value.dtype)
            for lane, place in zip(lanes[here].tolist(), at.tolist(), strict=True):
                before[lane] = numbers[place]
                numbers[place] = change(before[lane], value[lane])
        return before

    def barrier(self, mask: Any) -> None:
        if mask is not self.everybody and not (mask == (self.at < len(self.kernel.blocks))).all():
            raise PtxError("some threads wait at a barrier that the others are not at")
        self.memory.barrier, self.shared.barrier = (m.now << 11 | SEVERAL for m in (self.memory, self.shared))
        self.unpublished.clear()

    def copy(self, mask: Any, to: Any, source: Any, size: int, real: Any) -> None:
        """cp.async: global to shared memory, zeros where `real` is 0. It arrives when it is waited for, not before."""
        lanes = np.flatnonzero(mask)
        items, full = np.zeros(len(lanes), f"V{size}"), real[lanes] > 0
        items[full] = self.memory.load(source[lanes][full], size, lanes[full])
        list(self.shared.access(to[lanes], size, lanes, ""))
        self.copies[-1].append((to[lanes], items, lanes))

    def wait_for_copies(self, newest: int) -> None:
        """All groups but the newest have arrived."""
        while len(self.copies) - 1 > newest:
            for copy in self.copies.pop(0):
                self.shared.store(*copy)

    def whole(self, mask: Any) -> Any:
        """The threads that take part, in whole warps: [threads] bool."""
        warps = mask.reshape(-1, 32)
        if mask is not self.everybody and (warps.any(1) != warps.all(1)).any():
            raise PtxError("the lanes of a warp have branched apart, and this instruction needs all of them")
        return mask

    def shuffle(self, mask: Any, op: list[str], value: Any, lane: Any) -> Any:
        self.whole(mask)
        mine = self.tid % 32
        source = {"bfly": mine ^ lane, "up": mine - lane, "idx": lane}[op[2]]
        return value[self.tid - mine + np.where(source >= 0, source, mine)]

    def reduce(self, mask: Any, op: list[str], value: Any) -> Any:
        self.whole(mask)
        return CHANGES[op[2]].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype).repeat(32)

    def load_matrices(self, mask: Any, address: Any, count: int, op: list[str]) -> Any:
        """ldmatrix: matrices of 8 rows of 8 halves. Lanes 8 i to 8 i + 7 name the rows of matrix i; lane 4 r + c then
        holds elements 2 c and 2 c + 1 of row r."""
        taking, out = self.whole(mask), np.zeros((count, self.threads), np.uint32)
        for i in range(count):
            rows = (self.tid // 8 % 4 == i) & taking
            matrices = self.shared.load(address[rows], 16, self.tid[rows]).view(np.uint16).reshape(-1, 8, 8)
            matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1) if "trans" in op else matrices)
            out[i, taking] = matrices.view(np.uint32).ravel()
        return out if count > 1 else out[0]

    def store_matrices(self, mask: Any, address: Any, values: list[Any]) -> None:
        taking = self.whole(mask)
        for i, value in enumerate(values):
            rows = (self.tid // 8 % 4 == i) & taking
            self.shared.store(address[rows], value[taking].view("V16"), self.tid[rows])

    def multiply(self, mask: Any, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
        """mma: A [16, K] @ B [K, 8] + C [16, 8] for each warp, in fp32. Lane 4 g + q holds rows g, g + 8 of A, column
        g of B, and columns 2 q and 2 q + 1 of rows g and g + 8 of C; a register holds two halves, or one tf32."""
        self.whole(mask)
        per, warps = len(a[0]), self.threads // 32
        A, B = np.zeros((warps, 16, 2 * per * len(a)), np.float32), np.zeros((warps, 4 * per * len(b), 8), np.float32)
        for h in range(per):
            for i, x in enumerate(a):
                A[:, GROUP + 8 * (i % 2), per * MEMBER + h + 4 * per * (i // 2)] = x[h].reshape(-1, 32)
            for i, x in enumerate(b):
                B[:, per * MEMBER + h + 4 * per * i, GROUP] = x[h].reshape(-1, 32)
        product = A @ B
        return [x + product[:, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2].ravel() for i, x in enumerate(c)]
