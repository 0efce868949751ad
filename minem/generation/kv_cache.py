"""The two-segment KV cache: one prefix per prompt, however many draws read it, and one suffix per slot.

    prefix  [layers, rows,  K, positions, C]   the prompt but for its last token, written once by `Prefill`
    suffix  [layers, slots, K, positions, C]   the prompt's last token and what was drawn, one position per `Decode`

Both are `Attend` functions of the model (model.py): they write the new keys and values where they belong and attend
to what a token may see. The last prompt token is decoded rather than prefilled, so that every drawn token, the first
included, is sampled in one and the same place.

Nothing ever moves: rows and slots are taken and given back where they are, and `Groups` says which of them a decode
step is about. On a GPU a step has a fixed shape, so that a CUDA graph can replay it; on the CPU it reads plain slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minem.kernels import decode_attention
from minem.kernels.attention import ROWS
from minem.kernels.rope import CacheWrite
from minem.model.decoder import PackedAttention, upload
from minem.model.hf_config import ModelConfig

BLOCK = 64  # positions are allocated in multiples of this
MEMORY_SHARE = 0.85  # of what is free may go to the cache; the rest is for activations and graphs
MIN_ROWS = 16  # with fewer rows the CPU's matrix products round differently for each number of rows


def cache_bytes(config: ModelConfig, dtype: torch.dtype, slots: int, prefix: int, suffix: int) -> int:
    """Bytes of a cache of `slots` sequences with prompts of up to `prefix` and suffixes of up to `suffix` positions."""
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return (slots + 1) * (_whole_blocks(prefix) + _whole_blocks(suffix)) * position


def fitting_slots(config: ModelConfig, dtype: torch.dtype, slots: int, prefix: int, suffix: int, free: int) -> int:
    """`slots`, halved until their cache takes at most MEMORY_SHARE of what is free, but one at least."""
    while slots > 1 and cache_bytes(config, dtype, slots, prefix, suffix) > MEMORY_SHARE * free:
        slots //= 2
    return slots


class KVCache:
    """Keys and values of `slots` sequences and of as many prompts."""

    def __init__(
        self, config: ModelConfig, slots: int, prefix: int, suffix: int, device: torch.device, dtype: torch.dtype
    ):
        """Room for prompts of `prefix` and suffixes of `suffix` positions at least."""
        self.spare = slots  # one row and one slot more, where padding is written and nobody reads
        nothing = torch.empty(
            config.num_hidden_layers,
            slots + 1,
            config.num_key_value_heads,
            0,
            config.head_dim,
            device=device,
            dtype=dtype,
        )
        self.prefix_k = self.prefix_v = self.suffix_k = self.suffix_v = nothing
        self.prefix_lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.grow(prefix, suffix)

    @property
    def prefix(self) -> int:
        """Positions of each row."""
        return self.prefix_k.shape[3]

    @property
    def suffix(self) -> int:
        """Positions of each slot."""
        return self.suffix_k.shape[3]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.itemsize for x in (self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v))

    def grow(self, prefix: int, suffix: int) -> None:
        """Make room for prompts of `prefix` and suffixes of `suffix` positions, keeping what is there."""
        # One after the other: old and new copies of all four would not fit where the cache is most of the memory.
        self.prefix_k = _grown(self.prefix_k, prefix)
        self.prefix_v = _grown(self.prefix_v, prefix)
        self.suffix_k = _grown(self.suffix_k, suffix)
        self.suffix_v = _grown(self.suffix_v, suffix)


def _grown(x: Tensor, positions: int) -> Tensor:
    if positions <= x.shape[3]:
        return x
    bigger = _zeros((*x.shape[:3], _whole_blocks(positions), x.shape[4]), x)
    bigger[:, :, :, : x.shape[3]] = x
    return bigger


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros, for masked positions are multiplied by weight 0, which must not meet a NaN.

    On the CPU from numpy, whose zeros take no memory where nobody writes: most slots may never be used.
    """
    if like.is_cuda:
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(math.prod(shape) * like.itemsize, np.uint8)).view(like.dtype).view(shape)


def _whole_blocks(positions: int) -> int:
    return -(-max(1, positions) // BLOCK) * BLOCK


class Prefill:
    """Causal attention inside packed prompts, whose keys and values go to rows of the prefix segment."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int]):
        """rows[i] is where the i-th packed prompt goes; packed sequences beyond the listed rows are padding."""
        device = cache.prefix_k.device
        self.cache = cache
        targets = [*rows, *[cache.spare] * (len(lengths) - len(rows))]
        sizes = torch.tensor(lengths)
        self.rows = upload(torch.tensor(targets).repeat_interleave(sizes), device)
        self.positions = upload(torch.cat([torch.arange(n) for n in lengths]), device)
        self.packed = PackedAttention([n for n in lengths if n], device)  # a prompt of one token has no prefix
        cache.prefix_lengths[upload(list(rows), device)] = upload(list(lengths[: len(rows)]), device)

    def cache_write(self, layer: int) -> CacheWrite:
        return CacheWrite(self.cache.prefix_k[layer], self.cache.prefix_v[layer], self.rows, self.positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.packed(layer, q, k, v)


@dataclass(frozen=True)
class Groups:
    """The sequences of a decode step: their slots, and who shares a prefix with whom (`decode_attention`).

    B tokens enter the model, of which the first S are attended; those beyond are padding.
    """

    slots: Tensor  # int64 [B]: where each token's keys and values go; padding goes to the spare slot
    siblings: Tensor  # int64 [T, n]
    sibling_index: Tensor  # int64 [S]
    prefix_rows: Tensor | None  # int64 [T]; None: group t reads row t
    suffix_rows: Tensor | None  # int64 [S]; None: sequence s reads slot s

    @classmethod
    def compact(cls, slots: Sequence[int], rows: Sequence[int], spare: int, device: torch.device) -> Groups:
        """As small as can be, for the CPU: slices wherever the slots and rows in use lie side by side from 0.

        slots, rows: for each sequence its slot and the row of its prompt.
        """
        count = max(rows) + 1
        most = max(rows.count(row) for row in set(rows))
        # One group a row needs no gather of keys and values, unless one crowded prompt makes most places empty.
        crowded = count * most > 2 * len(rows) + MIN_ROWS
        groups = _groups(rows, 4) if crowded else list(enumerate(_members(rows, count)))
        width = max(len(members) for _, members in groups)
        places = {s: t * width + i for t, (_, members) in enumerate(groups) for i, s in enumerate(members)}
        together = list(slots) == list(range(len(slots)))
        return cls(
            slots=upload([*slots, *[spare] * (MIN_ROWS - len(slots))], device),
            siblings=upload([members + [0] * (width - len(members)) for _, members in groups], device),
            sibling_index=upload([places[s] for s in range(len(rows))], device),
            prefix_rows=upload([row for row, _ in groups], device) if crowded else None,
            suffix_rows=None if together else upload(list(slots), device),
        )

    @classmethod
    def fixed(
        cls, batch: int, width: int, slots: Sequence[int], rows: Sequence[int], spare: int, device: torch.device
    ) -> Groups:
        """Of the same shape whoever is in it: `batch` sequences in as many groups of `width`, the rest empty."""
        groups = _groups(rows, width)
        places = {s: t * width + i for t, (_, members) in enumerate(groups) for i, s in enumerate(members)}
        padding = batch - len(slots)  # where there is any, the last group is empty, and padding belongs to it
        where = upload([*slots, *[spare] * padding], device)
        return cls(
            slots=where,
            siblings=upload(
                [m + [0] * (width - len(m)) for _, m in groups] + [[0] * width] * (batch - len(groups)), device
            ),
            sibling_index=upload([places.get(s, (batch - 1) * width) for s in range(batch)], device),
            prefix_rows=upload([row for row, _ in groups] + [spare] * (batch - len(groups)), device),
            suffix_rows=where,
        )

    def copy_(self, other: Groups) -> None:
        """Take over what another of the same shape says, into the same memory."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs)


def _members(rows: Sequence[int], count: int) -> list[list[int]]:
    """The sequences that read each of the first `count` rows."""
    members: list[list[int]] = [[] for _ in range(count)]
    for sequence, row in enumerate(rows):
        members[row].append(sequence)
    return members


def _groups(rows: Sequence[int], width: int) -> list[tuple[int, list[int]]]:
    """(row, the sequences that read it), at most `width` of them in a group."""
    members = _members(rows, max(rows, default=-1) + 1)
    return [(row, every[i : i + width]) for row, every in enumerate(members) for i in range(0, len(every), width)]


def group_width(config: ModelConfig) -> int:
    """Siblings whose queries fill a tile of the attention kernel."""
    return max(1, ROWS * config.num_key_value_heads // config.num_attention_heads)


class Decode:
    """Attention of one new token for each sequence of `groups` over its prompt's prefix and its own suffix."""

    def __init__(self, cache: KVCache, groups: Groups, drawn: Tensor, longest_prefix: int, longest_suffix: int):
        """
        Args:
            drawn: int64 [B], the suffix positions that each sequence held before this step.
            longest_prefix, longest_suffix: no sequence reads positions beyond these.
        """
        self.cache, self.groups, self.drawn = cache, groups, drawn
        self.attended = len(groups.sibling_index)
        self.suffix_lengths = drawn[: self.attended] + 1
        rows = len(cache.prefix_lengths) if groups.prefix_rows is not None else len(groups.siblings)
        slots = cache.spare + 1 if groups.suffix_rows is not None else self.attended
        self.prefix_lengths = cache.prefix_lengths[:rows]
        self.prefix_k, self.prefix_v = (x[:, :rows, :, :longest_prefix] for x in (cache.prefix_k, cache.prefix_v))
        self.suffix_k, self.suffix_v = (x[:, :slots, :, :longest_suffix] for x in (cache.suffix_k, cache.suffix_v))

    def cache_write(self, layer: int) -> CacheWrite:
        return CacheWrite(self.cache.suffix_k[layer], self.cache.suffix_v[layer], self.groups.slots, self.drawn)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q beyond the attended ones come back as zeros."""
        attended = decode_attention(
            q[: self.attended],
            self.prefix_k[layer],
            self.prefix_v[layer],
            self.prefix_lengths,
            self.groups.siblings,
            self.groups.sibling_index,
            self.suffix_k[layer],
            self.suffix_v[layer],
            self.suffix_lengths,
            prefix_rows=self.groups.prefix_rows,
            suffix_rows=self.groups.suffix_rows,
        )
        padding = len(q) - self.attended
        return torch.cat((attended, q.new_zeros(padding, *q.shape[1:]))) if padding else attended
