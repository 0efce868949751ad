"""Memory as the threads of a CTA see it: every access is inside a tensor, aligned, and in order with the others.

A GPU promises nothing about the order in which two threads touch memory, but for a barrier: what threads did before
it, all threads see after it. Two accesses of different threads to one byte, one of them a write and no barrier between
them, are a race: the result depends on luck. So each byte remembers when it was last written and read, and by whom, as
one number: time * 2048 + thread. A barrier makes all earlier times harmless.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

ATOMIC, SEVERAL = 2046, 2047  # in the place of a thread; atomic accesses do not race with each other
WATCHED = 1 << 22  # bytes; in larger tensors races are not looked for


class PtxError(Exception):
    """The kernel did what a GPU would punish, or reward with garbage."""


class Region:
    """Bytes from `start` to `stop`: of a tensor, at their real address, or of shared memory, from 0."""

    def __init__(self, name: str, start: int, stop: int, shared: bool = False):
        self.name, self.start, self.stop, self.shared = name, start, stop, shared
        self.base = start & ~15  # accesses of 16 bytes are aligned: this makes each one item of an array
        length = (stop - self.base + 15) & ~15
        if shared:
            self.bytes = np.full(length, 0xCD, np.uint8)
        else:
            self.bytes = np.frombuffer((ctypes.c_uint8 * length).from_address(self.base), np.uint8)
        watched = shared or length <= WATCHED
        self.written, self.read = (np.zeros(length if watched else 0, np.int64) for _ in range(2))

    def _places(self, address: Any, size: int) -> Any:
        if (address & np.uint64(size - 1)).any():
            raise PtxError(f"an access of {size} bytes is not aligned")
        low, high = int(address.min()), int(address.max()) + size
        if low < self.start or high > self.stop:
            raise PtxError(f"bytes {low - self.start} to {high - self.start} of {self.name}, which has "
                           f"{self.stop - self.start}")  # fmt: skip
        return (address - np.uint64(self.base)).astype(np.int64) // size

    def load(self, address: Any, size: int, threads: Any, clock: Clock) -> Any:
        """The `size` bytes at each address: an array of items of that size."""
        at = self._places(address, size)
        if len(self.read):
            written, read = self.written.reshape(-1, size), self.read.reshape(-1, size)
            last = written[at]
            if self.shared and not last.all():
                raise PtxError("shared memory is read that nobody wrote, or that a cp.async not waited for will write")
            mine = clock.stamp(threads)[:, None]
            clock.race(last, mine, "read what another thread wrote")
            read[at] = np.where(clock.unordered(read[at], mine), mine | SEVERAL, mine)
            shared = (read[at] != mine).any(1)  # by several threads in this very instruction
            read[at[shared]] |= SEVERAL
        return self.bytes.view(f"V{size}")[at]

    def store(self, address: Any, values: Any, threads: Any, clock: Clock) -> None:
        """values: items of the size that is written at each address."""
        size = values.dtype.itemsize
        at = self._places(address, size)
        items = self.bytes.view(f"V{size}")
        if len(self.read):
            written, read = self.written.reshape(-1, size), self.read.reshape(-1, size)
            mine = clock.stamp(threads)[:, None]
            clock.race(written[at], mine, "write what another thread wrote")
            clock.race(read[at], mine, "write what another thread read")
            written[at] = mine
        items[at] = values
        if (items[at] != values).any():
            raise PtxError("race: two threads write different values to one address in one instruction")

    def atomic(self, address: Any, size: int, threads: Any, clock: Clock) -> tuple[Any, Any]:
        """The memory as numbers of that size, and the place of each address in it: the caller reads and writes it."""
        at = self._places(address, size)
        if len(self.read):
            mine = clock.stamp(threads)[:, None]
            for before in (self.written.reshape(-1, size), self.read.reshape(-1, size)):
                clock.race(before[at], mine, "change atomically what another thread used", ATOMIC)
            self.written.reshape(-1, size)[at] = clock.stamp(ATOMIC)
        return self.bytes.view(f"u{size}"), at

    def forget(self, address: Any, size: int) -> None:
        """These bytes are written later, by a cp.async: until then they hold nothing."""
        at = self._places(address, size)
        self.bytes.view(f"V{size}")[at] = np.full(size, 0xCD, np.uint8).view(f"V{size}")
        self.written.reshape(-1, size)[at] = 0


class Clock:
    """Time in memory accesses of the whole launch, and the time of the last barrier."""

    def __init__(self) -> None:
        self.now = self.barrier = 0

    def tick(self) -> None:
        self.now += 1

    def sync(self) -> None:
        self.barrier = (self.now << 11) | SEVERAL

    def stamp(self, threads: Any) -> Any:
        return threads | (self.now << 11)

    def unordered(self, before: Any, mine: Any, allowed: int | None = None) -> Any:
        """Where an access since the last barrier was another thread's."""
        who = before & SEVERAL
        other = (before > self.barrier) & (who != (mine & SEVERAL))
        return other if allowed is None else other & (who != allowed)

    def race(self, before: Any, mine: Any, what: str, allowed: int | None = None) -> None:
        bad = self.unordered(before, mine, allowed)
        if bad.any():
            lane, byte = np.argwhere(bad)[0]
            who = int(before[lane, byte]) & SEVERAL
            other = {SEVERAL: "several threads", ATOMIC: "an atomic access"}.get(who, f"thread {who}")
            raise PtxError(
                f"race: thread {int(mine[lane, 0]) & SEVERAL} would {what} ({other}), and no barrier is between"
            )


class Memory:
    """Global memory: the tensors of one launch, and the bytes that went to and fro."""

    def __init__(self, tensors: dict[str, tuple[int, int]]):
        """tensors: for each name the addresses of its first byte and of the one after its last."""
        self.regions = [Region(name, *span) for name, span in tensors.items()]
        self.bytes_read = self.bytes_written = 0

    def find(self, address: Any, size: int) -> Region:
        low, high = int(address.min()), int(address.max()) + size
        for region in self.regions:
            if region.start <= low and high <= region.stop:
                return region
        near = min(self.regions, key=lambda r: max(r.start - low, high - r.stop), default=None)
        if near is None:
            raise PtxError("the kernel has no tensors")
        return near  # which refuses it and says so

    def parts(self, address: Any, size: int) -> list[tuple[Region, Any]]:
        """(tensor, lanes that point into it); nearly always one."""
        region = self.find(address, size)
        if len(address) == 1 or (region.start <= int(address.min()) and int(address.max()) + size <= region.stop):
            return [(region, slice(None))]
        lanes: dict[int, tuple[Region, list[int]]] = {}
        for lane in range(len(address)):
            region = self.find(address[lane : lane + 1], size)
            lanes.setdefault(id(region), (region, []))[1].append(lane)
        return list(lanes.values())
