"""The two-segment KV cache: one prefix per prompt, however many draws read it, and one suffix per slot.

    prefix  [layers, rows,  K, positions, C]   the prompt but for its last token, written once by `Prefill`
    suffix  [layers, slots, K, positions, C]   the prompt's last token and what was drawn, one position per `Decode`

Both are `Attend` functions of the model (model.py): they write the new keys and values where they belong and attend
to what a token may see. The last prompt token is decoded rather than prefilled, so that every drawn token, the first
included, is sampled in one and the same place.

Active rows and slots are kept at the front (`move_*` fills holes), so that a decode step reads plain slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minem.kernels import decode_attention
from minem.kernels.rope import CacheWrite
from minem.model import ModelConfig, PackedAttention

BLOCK = 64  # positions are allocated in multiples of this


class KVCache:
    """Keys and values of `slots` sequences and of as many prompts; grows to the longest one that was asked for."""

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype):
        self.spare = slots  # one row and one slot more, where padding is written and nobody reads
        shape = (config.num_hidden_layers, slots + 1, config.num_key_value_heads, 0, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by weight 0, which must not meet a NaN.
        self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v = (
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(4)
        )

    def reserve(self, prefix: int, suffix: int) -> None:
        """Make room for prompts of `prefix` and suffixes of `suffix` positions, keeping what is there."""
        # One after the other: old and new copies of all four would not fit where the cache is most of the memory.
        self.prefix_k = _grow(self.prefix_k, prefix)
        self.prefix_v = _grow(self.prefix_v, prefix)
        self.suffix_k = _grow(self.suffix_k, suffix)
        self.suffix_v = _grow(self.suffix_v, suffix)

    def move_prefix(self, source: int, target: int, length: int) -> None:
        for x in (self.prefix_k, self.prefix_v):
            x[:, target, :, :length] = x[:, source, :, :length]

    def move_suffix(self, source: int, target: int, length: int) -> None:
        for x in (self.suffix_k, self.suffix_v):
            x[:, target, :, :length] = x[:, source, :, :length]


def _grow(x: Tensor, positions: int) -> Tensor:
    if positions <= x.shape[3]:
        return x
    bigger = x.new_zeros(*x.shape[:3], -(-positions // BLOCK) * BLOCK, x.shape[4])
    bigger[:, :, :, : x.shape[3]] = x
    return bigger


class Prefill:
    """Causal attention inside packed prompts, whose keys and values go to rows of the prefix segment."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int], device: torch.device):
        """rows[i] is where the i-th packed prompt goes; packed sequences beyond the listed rows are padding."""
        self.cache = cache
        targets = [*rows, *[cache.spare] * (len(lengths) - len(rows))]
        self.rows = torch.cat([torch.full((n,), row) for row, n in zip(targets, lengths, strict=True)]).to(device)
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.packed = PackedAttention(lengths, device)

    def cache_write(self, layer: int) -> CacheWrite:
        return CacheWrite(self.cache.prefix_k[layer], self.cache.prefix_v[layer], self.rows, self.positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.packed(layer, q, k, v)


class Decode:
    """Attention of one new token for each of the first n slots over its prompt's prefix and its own suffix."""

    def __init__(
        self,
        cache: KVCache,
        prefix_rows: Sequence[int],
        prefix_lengths: Sequence[int],
        drawn: Sequence[int],
        padding: int,
    ):
        """
        Args:
            prefix_rows: for each active slot the row of its prompt; rows 0..max are all in use.
            prefix_lengths: for each row the positions it holds.
            drawn: for each active slot the suffix positions it held before this step.
            padding: tokens beyond the active slots, written to the spare slot.
        """
        device = cache.suffix_k.device
        self.n = len(prefix_rows)
        self.cache = cache
        self.slots = torch.tensor([*range(self.n), *[cache.spare] * padding], device=device)
        self.positions = torch.tensor([*drawn, *[0] * padding], device=device)
        self.suffix_lengths = self.positions[: self.n] + 1
        self.prefix_lengths = torch.tensor(prefix_lengths, device=device)
        self.siblings, self.sibling_index = (x.to(device) for x in _sibling_grid(prefix_rows, len(prefix_lengths)))
        longest_prefix, longest_suffix = max(1, *prefix_lengths), max(drawn) + 1
        self.prefix_k, self.prefix_v = (
            x[:, : len(prefix_lengths), :, :longest_prefix] for x in (cache.prefix_k, cache.prefix_v)
        )
        self.suffix_k, self.suffix_v = (x[:, : self.n, :, :longest_suffix] for x in (cache.suffix_k, cache.suffix_v))

    def cache_write(self, layer: int) -> CacheWrite:
        return CacheWrite(self.cache.suffix_k[layer], self.cache.suffix_v[layer], self.slots, self.positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q beyond the active slots are padding; they come back as zeros."""
        attended = decode_attention(
            q[: self.n],
            self.prefix_k[layer],
            self.prefix_v[layer],
            self.prefix_lengths,
            self.siblings,
            self.sibling_index,
            self.suffix_k[layer],
            self.suffix_v[layer],
            self.suffix_lengths,
        )
        return attended if self.n == len(q) else torch.cat((attended, torch.zeros_like(q[self.n :])))


def _sibling_grid(prefix_rows: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Who shares which prefix: slots by row [R, n] (unused places 0), and each slot's place in that grid [S]."""
    members: list[list[int]] = [[] for _ in range(rows)]
    for slot, row in enumerate(prefix_rows):
        members[row].append(slot)
    n = max(len(m) for m in members)
    places = {slot: row * n + i for row, slots in enumerate(members) for i, slot in enumerate(slots)}
    index = [places[slot] for slot in range(len(prefix_rows))]
    return torch.tensor([m + [0] * (n - len(m)) for m in members]), torch.tensor(index)
