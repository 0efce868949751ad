"""The processes that train one model together: each one's share of the work, and what they exchange.

    ranks.gather(len(ranks.share(costs)))      # [12, 11] in both of two processes

Gradients travel through NCCL on GPUs and gloo on the CPU, the host's values always through gloo.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed


class Ranks:
    """One process (`rank`, from 0) among the `size` that train a model together.

    `total`, `any`, `gather` and `broadcast` are collectives: all processes must call them, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes the run's directory."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Positions of this process's own items, in order; every process gets items of about the same total cost.

        The most expensive first, each to the process with the least so far (Graham 1969: at most 4/3 of the optimum).
        """
        loads, own = [0.0] * self.size, []
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            target = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[target] += costs[item]
            if target == self.rank:
                own.append(item)
        return sorted(own)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.total([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in all processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]


ALONE = Ranks()  # a process without others
