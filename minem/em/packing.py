"""Which examples form an optimizer step, and how a step's sequences are packed: a plan, made before any tensor exists.

    python -c "from minem.em.packing import *; print(best_fit_decreasing([5, 3, 4, 2], capacity=8))"

The order matters: the seeded shuffle decides which examples share a step, and only then is each step cut into
micro-batches. So neither the capacity of a micro-batch (memory) nor the number of ranks changes the trajectory.
"""

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minem.generation.sharing import alike
from minem.model.decoder import upload


@dataclass(frozen=True)
class Example:
    """A plain prompt and the very token ids that were sampled for it, EOS included."""

    id: str  # for messages
    prompt_ids: list[int]
    token_ids: list[int]
    weight: float = 1.0  # finite, above 0: multiplies the log-probability of every sampled token

    def __len__(self) -> int:
        """Tokens that enter the model: the last sampled token is a target, never an input."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


@dataclass(frozen=True)
class Step:
    """One optimizer step: positions in the list of examples, grouped into the micro-batches that fit in memory."""

    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]

    @property
    def examples(self) -> list[int]:
        return sorted(index for micro_batch in self.micro_batches for index in micro_batch)

    def share(self, rank: int, ranks: int) -> tuple[tuple[int, ...], ...]:
        """The micro-batches of one rank in a step planned for `ranks`, each of which has as many; () is no work."""
        return self.micro_batches[rank::ranks]


def shuffle(n: int, seed: int, iteration: int, epoch: int) -> list[int]:
    """A permutation of range(n): sorted by a hash, hence the same on every machine and for every library version."""
    digests = [hashlib.blake2b(f"{seed}/{iteration}/{epoch}/{i}".encode(), digest_size=16).digest() for i in range(n)]
    return sorted(range(n), key=digests.__getitem__)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of `lengths` in bins that hold at most `capacity`; a longer item gets a bin of its own.

    Longest first, each into the fullest bin that still takes it (Johnson et al. 1974: at most 11/9 of the optimum + 1).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, target = room.pop(at)
        else:
            free, target = max(capacity, lengths[item]), len(bins)
            bins.append([])
        bins[target].append(item)
        insort(room, (free - lengths[item], target))
    return bins


def even_bins(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[int]]:
    """As `best_fit_decreasing`, but a multiple of `ranks` bins, as equally full as possible.

    A search finds the smallest capacity that needs no more bins (MULTIFIT: Coffman, Garey, Johnson 1978); missing bins
    are split off the fullest. They come in rounds of one for each rank, since ranks wait for the largest.
    """

    def load(one: list[int]) -> int:
        return sum(lengths[i] for i in one)

    count = math.ceil(len(best_fit_decreasing(lengths, capacity)) / ranks) * ranks
    best = 1 + bisect_left(range(1, capacity), True, key=lambda c: len(best_fit_decreasing(lengths, c)) <= count)
    bins = best_fit_decreasing(lengths, best)
    while len(bins) < count:
        fullest = max(bins, key=lambda one: (len(one) > 1, load(one)))
        bins.append(fullest[1::2])  # items are in decreasing order, so every second one is about half
        del fullest[1::2]
    bins.sort(key=load, reverse=True)
    rounds = [bins[i : i + ranks] for i in range(0, count, ranks)]
    # Every second round backwards, so that no rank gets the largest of each.
    return [one for number, together in enumerate(rounds) for one in together[:: -1 if number % 2 else 1]]


def plan(
    lengths: Sequence[int], *, batch_size: int, pack_tokens: int, epochs: int, seed: int, iteration: int, ranks: int = 1
) -> list[Step]:
    """The optimizer steps of one M-step: at most batch_size examples each, and pack_tokens tokens a micro-batch."""
    # The steps of an epoch are equal to within one example, so that none has a few stragglers only.
    count = math.ceil(len(lengths) / batch_size)  # steps of an epoch
    steps = []
    for epoch in range(epochs):
        order = shuffle(len(lengths), seed, iteration, epoch)
        for k in range(count):
            members = order[len(order) * k // count : len(order) * (k + 1) // count]
            sizes = [lengths[i] for i in members]
            bins = best_fit_decreasing(sizes, pack_tokens) if ranks == 1 else even_bins(sizes, pack_tokens, ranks)
            steps.append(Step(epoch, tuple(tuple(members[position] for position in one) for one in bins)))
    return steps


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of `Model.forward` for N packed input tokens, of which R predict a supervised one."""

    input_ids: torch.Tensor  # [N] int64
    lengths: list[int]  # tokens of each sequence; they sum to N
    rows: torch.Tensor  # [R] int64, positions in 0..N-1 whose hidden state predicts
    targets: torch.Tensor  # [R] int64, the sampled tokens
    token_weights: torch.Tensor  # [R] float32
    branching: bool = False  # the first sequence is the beginning of all prompts, and the others continue it

    @property
    def arguments(self) -> dict[str, Any]:
        """By name; without `branching` where there is none, so that any policy over packed sequences can be trained."""
        return {name: value for name, value in vars(self).items() if value is not False}


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> MicroBatch:
    """Lay examples end to end. Prompts are not supervised: only positions that predict a target are rows.

    What all prompts begin with, as worked examples, stands there once if that saves a quarter of the tokens or more.
    """
    same = alike([e.prompt_ids for e in examples])
    shared = same if 4 * same * (len(examples) - 1) >= sum(map(len, examples)) else 0
    rows: list[int] = []
    end = shared
    for example in examples:  # its last prompt token predicts the first sampled one, and so on up to the last (EOS)
        end += len(example) - shared
        rows += range(end - len(example.token_ids), end)
    ids = [i for e in examples for i in (*e.prompt_ids[shared:], *e.token_ids[:-1])]
    return MicroBatch(
        input_ids=upload([*examples[0].prompt_ids[:shared], *ids], device),
        lengths=[*filter(None, [shared]), *(len(e) - shared for e in examples)],
        rows=upload(rows, device),
        targets=upload([i for e in examples for i in e.token_ids], device),
        token_weights=upload([e.weight for e in examples for _ in e.token_ids], device, torch.float32),
        branching=shared > 0,
    )
