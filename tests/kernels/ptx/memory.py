"""Memory as threads see it: every access must be inside a tensor, aligned, and ordered against the other threads'.

A GPU promises nothing about the order in which two threads reach memory, but for a barrier: what was done before it,
all threads of the CTA see after it. Two accesses of different threads to one byte, one of them a write and no barrier
between them, are a *race*: the result is a matter of luck. So each byte remembers when and by whom it was last written
and read, as one number, time * 2048 + thread. A barrier makes all earlier times harmless. In global memory the warp is
what counts, whose lanes execute an instruction together; in shared memory Triton itself asks for order among them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

ATOMIC, SEVERAL = 2046, 2047  # in the place of a thread; atomic accesses do not race with each other
SHARED = "shared memory"  # the name of its region
WATCHED = 1 << 22  # bytes; in larger tensors races are not looked for


class PtxError(Exception):
    """The kernel did what a GPU would punish, or reward with garbage."""


class Region:
    """Bytes from `start` to `stop`: of a tensor, at their real address, or of shared memory, from 0."""

    def __init__(self, name: str, start: int, stop: int):
        self.name, self.start, self.stop, self.base = name, start, stop, start & ~15
        length = (stop - self.base + 15) & ~15  # whole items of 16 bytes, the largest access
        real = name != SHARED
        self.bytes = np.frombuffer(
            (ctypes.c_uint8 * length).from_address(self.base) if real else bytearray(length), "u1"
        )
        self.written, self.read = (np.zeros(length if length <= WATCHED else 0, np.int64) for _ in range(2))


class Memory:
    """The tensors of a launch, or the shared memory of a CTA."""

    def __init__(self, regions: list[Region]):
        self.regions, self.now, self.barrier = regions, 0, 0
        self.bytes_read = self.bytes_written = 0  # an address that several threads name in one instruction counts once

    def sync(self) -> None:
        """A barrier: everything up to now is in order with everything from now on."""
        self.barrier = (self.now << 11) | SEVERAL

    def load(self, address: Any, size: int, threads: Any) -> Any:
        """The `size` bytes at each thread's address, as items of that size."""
        items = np.empty(len(address), f"V{size}")
        for region, lanes, at in self._parts(address, size):
            self._note(region, at, size, threads[lanes], reads=True)
            items[lanes] = region.bytes.view(items.dtype)[at]
        self.bytes_read += size * len(np.unique(address))
        return items

    def store(self, address: Any, items: Any, threads: Any) -> None:
        for region, lanes, at in self._parts(address, items.itemsize):
            self._note(region, at, items.itemsize, threads[lanes], writes=True)
            there = region.bytes.view(items.dtype)
            there[at] = items[lanes]
            if (there[at] != items[lanes]).any():
                raise PtxError("race: two threads write different values to one address in one instruction")
        self.bytes_written += items.itemsize * len(np.unique(address))

    def atomic(self, address: Any, kind: Any, change: Any) -> None:
        """One thread after the other: change(thread, number at its address) is the new number there."""
        size = np.dtype(kind).itemsize
        for region, lanes, at in self._parts(address, size):
            self._note(region, at, size, np.full(len(lanes), ATOMIC), reads=True, writes=True)
            numbers = region.bytes.view(kind)
            for lane, place in zip(lanes.tolist(), at.tolist(), strict=True):
                numbers[place] = change(lane, numbers[place])
        self.bytes_read += size * len(np.unique(address))
        self.bytes_written += size * len(np.unique(address))

    def forget(self, address: Any, size: int) -> None:
        """Until a cp.async arrives nobody knows what is in its place."""
        for region, _, at in self._parts(address, size):
            region.written.reshape(-1, size)[at] = 0

    def _parts(self, address: Any, size: int) -> Iterator[tuple[Region, Any, Any]]:
        """(region, lanes whose address is in it, the address as a number of items); nearly always just one."""
        self.now += 1
        if (address & np.uint64(size - 1)).any():
            raise PtxError(f"an access of {size} bytes is not aligned")
        lanes, ends = np.arange(len(address)), address + np.uint64(size)
        while len(lanes):
            first = int(address[lanes[0]])
            region = next((r for r in self.regions if r.start <= first and first + size <= r.stop), None)
            if region is None:
                near = min(
                    self.regions, key=lambda r: max(r.start - first, first - r.stop), default=Region("nothing", 0, 0)
                )
                raise PtxError(f"byte {first - near.start} of {near.name}, which has {near.stop - near.start}")
            inside = (address[lanes] >= region.start) & (ends[lanes] <= region.stop)
            yield region, lanes[inside], (address[lanes[inside]] - np.uint64(region.base)).astype(np.int64) // size
            lanes = lanes[~inside]

    def _note(self, region: Region, at: Any, size: int, who: Any, reads: bool = False, writes: bool = False) -> None:
        """Remember an access, and refuse it if it races with another since the last barrier."""
        if not len(region.written):
            return
        who = who if region.name == SHARED or who[0] == ATOMIC else who // 32
        written, read = region.written.reshape(-1, size), region.read.reshape(-1, size)
        mine = (who | self.now << 11)[:, None]
        before = written[at]
        if reads and region.name == SHARED and not before.all():
            raise PtxError("shared memory is read that nobody wrote, or that a cp.async not yet waited for will write")
        for what, last in (("wrote", before), ("read", read[at]))[: 2 if writes else 1]:
            recent = last > self.barrier
            if recent.any() and (bad := recent & (last & SEVERAL != who[:, None])).any():
                lane, byte = np.argwhere(bad)[0]
                one = "thread" if region.name == SHARED else "warp"
                raise PtxError(
                    f"race: {one} {who[lane]} uses what {one} {last[lane, byte] & SEVERAL} {what}, no barrier"
                )
        if writes:
            written[at] = mine
        else:
            last = read[at]
            recent = last > self.barrier
            read[at] = (
                np.where(recent & (last & SEVERAL != who[:, None]), mine | SEVERAL, mine) if recent.any() else mine
            )
            read[at[(read[at] & SEVERAL != who[:, None]).any(1)]] |= SEVERAL  # several threads in this very instruction
