"""The two-segment KV cache: one prefix per prompt, shared by all of its draws, and one suffix per slot.

    minem generate --prompt "..." --n 8        # eight draws that share one prefix

    prefix  [layers, rows,  K, positions, C]   the prompt without its last token, written once by `Prefill`
    suffix  [layers, slots, K, positions, C]   the prompt's last token and the drawn ones, one position per `Decode`

`Prefill` and `Decode` are `Attend` functions of the model (minem/model/decoder.py). The last prompt token is decoded,
not prefilled, so that every drawn token, the first included, is sampled in one place. Rows and slots never move;
`Groups` lists those of a decode step, in a fixed shape on a GPU (for CUDA graphs) and as plain slices on the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minem.kernels import decode_attention, rotary
from minem.kernels.attention import ROWS, Segment, plan
from minem.kernels.rope import CacheWrite
from minem.model.decoder import PackedAttention, upload
from minem.model.hf_config import ModelConfig

BLOCK = 64  # positions are allocated in multiples of this
MEMORY_SHARE = 0.85  # of the free memory that the cache may take; the rest is for activations and graphs
MIN_ROWS = 16  # with fewer rows the CPU's matrix products round differently for each number of rows


def cache_bytes(config: ModelConfig, dtype: torch.dtype, slots: int, prefix: int, suffix: int) -> int:
    """Bytes of a cache of `slots` sequences with prompts of up to `prefix` and suffixes of up to `suffix` positions."""
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return (slots + 1) * (_whole_blocks(prefix) + _whole_blocks(suffix)) * position


def fitting_slots(config: ModelConfig, dtype: torch.dtype, slots: int, prefix: int, suffix: int, free: int) -> int:
    """`slots`, halved until their cache takes at most MEMORY_SHARE of the free bytes, but at least one."""
    while slots > 1 and cache_bytes(config, dtype, slots, prefix, suffix) > MEMORY_SHARE * free:
        slots //= 2
    return slots


class KVCache:
    """Keys and values of `slots` sequences and of as many prompts."""

    def __init__(
        self, config: ModelConfig, slots: int, prefix: int, suffix: int, device: torch.device, dtype: torch.dtype
    ):
        """prefix, suffix: the least positions of a row and of a slot; both are rounded up to whole blocks."""
        self.device = device
        self.padding_slot = slots  # one row and one slot more: padding is written there and never read
        self.prefix, self.suffix = _whole_blocks(prefix), _whole_blocks(suffix)
        self.bytes = cache_bytes(config, dtype, slots, prefix, suffix)
        # Siblings whose queries fill a tile of the attention kernel.
        self.group_width = max(1, ROWS * config.num_key_value_heads // config.num_attention_heads)
        self.heads = config.num_attention_heads
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v = (
            _zeros((layers, slots + 1, heads, positions, config.head_dim), device, dtype)
            for positions in (self.prefix, self.prefix, self.suffix, self.suffix)
        )
        self.prefix_lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def holds(self, prefix: int, suffix: int) -> bool:
        """Whether prompts and suffixes of these lengths fit."""
        return prefix <= self.prefix and suffix <= self.suffix


def _zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, because masked positions are multiplied by weight 0, which must not meet a NaN.

    On the CPU from numpy, whose zeros take no memory until they are written: most slots may never be used.
    """
    if device.type == "cuda":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _whole_blocks(positions: int) -> int:
    return -(-max(1, positions) // BLOCK) * BLOCK


class Prefill:
    """Causal attention inside packed prompts, whose keys and values go to rows of the prefix segment."""

    def __init__(self, cache: KVCache, spans: Mapping[int, range], tokens: int):
        """spans: for each row the positions to write, if any; it holds those before. tokens: of all, and of padding."""
        self.cache, device = cache, cache.device
        rows, lengths = upload([list(spans), [span.stop for span in spans.values()]], device)
        cache.prefix_lengths[rows] = lengths
        padding = range(tokens - sum(map(len, spans.values())))
        own = [(row, span) for row, span in (*spans.items(), (cache.padding_slot, padding)) if span]
        self.rows, self.positions = _places_of(own, device)
        self.packed = PackedAttention([len(span) for _, span in own], device, [span.start for _, span in own])
        continued = any(span.start for _, span in own)  # else what is attended to is what is written
        self.attended = _places_of([(row, range(span.stop)) for row, span in own], device) if continued else None

    def __call__(self, layer: int, qkv: Tensor, **turn: Any) -> Tensor:
        caches = self.cache.prefix_k[layer], self.cache.prefix_v[layer]
        q, k, v = rotary(qkv, **turn, cache=CacheWrite(*caches, self.rows, self.positions))
        if self.attended is not None:  # those that the rows held, then the new ones
            rows, positions = self.attended
            k, v = (x[rows, :, positions] for x in caches)
        return self.packed.packed(q, k, v)


def _places_of(spans: Sequence[tuple[int, range]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the position of every token of spans in rows, both int64 [N]."""
    rows = torch.tensor([row for row, _ in spans]).repeat_interleave(torch.tensor([len(span) for _, span in spans]))
    rows, positions = upload(torch.stack([rows, torch.cat([torch.arange(s.start, s.stop) for _, s in spans])]), device)
    return rows, positions


@dataclass(frozen=True)
class Groups:
    """The sequences of a decode step: their slots, and which of them share a prefix (see `decode_attention`).

    B tokens enter the model, of which the first S are attended; those beyond are padding. T groups of n siblings.
    """

    slots: Tensor  # int64 [B]: the slot that each token's keys and values go to
    siblings: Tensor  # int64 [T, n]
    sibling_index: Tensor  # int64 [S]
    prefix_rows: Tensor | None  # int64 [T]; None: group t reads row t
    suffix_rows: Tensor | None  # int64 [S]; None: sequence s reads slot s

    @classmethod
    def compact(cls, cache: KVCache, slots: Sequence[int], rows: Sequence[int]) -> Self:
        """The smallest shapes, for the CPU: slices if the slots and rows in use are 0, 1, 2, ...

        slots, rows: for each sequence its slot and the row of its prompt.
        """
        by_row = _by_row(rows)
        width = max(map(len, by_row))
        # A group for every row needs no gather of keys and values, unless one crowded prompt leaves most places empty.
        crowded = len(by_row) * width > 2 * len(rows) + MIN_ROWS
        groups = _split(by_row, 4) if crowded else list(enumerate(by_row))
        siblings, places = _places(groups, min(width, 4) if crowded else width)
        in_order = list(slots) == list(range(len(slots)))
        padding = [cache.padding_slot] * (MIN_ROWS - len(slots))
        return cls(
            slots=upload([*slots, *padding], cache.device),
            siblings=upload(siblings, cache.device),
            sibling_index=upload(places, cache.device),
            prefix_rows=upload([row for row, _ in groups], cache.device) if crowded else None,
            suffix_rows=None if in_order else upload(list(slots), cache.device),
        )

    @classmethod
    def fixed(cls, cache: KVCache, batch: int, slots: Sequence[int], rows: Sequence[int]) -> Self:
        """Of one shape for any sequences: S = B = T = `batch`, in groups of `cache.group_width`, the rest padding."""
        width, device = cache.group_width, cache.device
        groups = _split(_by_row(rows), width)
        padding, empty = batch - len(slots), batch - len(groups)
        siblings, places = _places(groups, width)
        padded_slots = upload([*slots, *[cache.padding_slot] * padding], device)
        return cls(
            slots=padded_slots,
            siblings=upload([*siblings, *[[0] * width] * empty], device),
            # With padding there are fewer groups than `batch`: the last one is empty, and padding belongs to it.
            sibling_index=upload([*places, *[(batch - 1) * width] * padding], device),
            prefix_rows=upload([*[row for row, _ in groups], *[cache.padding_slot] * empty], device),
            suffix_rows=padded_slots,
        )

    def copy_(self, other: Self) -> None:
        """Copy another of the same shape into the same memory."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs)


def _by_row(rows: Sequence[int]) -> list[list[int]]:
    """For each row up to the last one in use, the sequences that read it."""
    members: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
    for sequence, row in enumerate(rows):
        members[row].append(sequence)
    return members


def _split(by_row: Sequence[list[int]], width: int) -> list[tuple[int, list[int]]]:
    """(row, sequences that read it) with at most `width` sequences each."""
    return [(row, every[i : i + width]) for row, every in enumerate(by_row) for i in range(0, len(every), width)]


def _places(groups: Sequence[tuple[int, list[int]]], width: int) -> tuple[list[list[int]], list[int]]:
    """The groups filled up to one width, and each sequence's place in them, counted row by row."""
    places = {s: t * width + i for t, (_, members) in enumerate(groups) for i, s in enumerate(members)}
    return [members + [0] * (width - len(members)) for _, members in groups], [places[s] for s in range(len(places))]


class Decode:
    """Attention of one new token for each sequence of `groups` over its prompt's prefix and its own suffix."""

    def __init__(self, cache: KVCache, groups: Groups, drawn: Tensor, longest: tuple[int, int], alike: tuple[int, int]):
        """drawn: int64 [B], the suffix positions that each sequence held before. None reads beyond the longest prefix
        and suffix. alike: a row, and how many of its positions are the same in all rows in use.
        """
        self.cache, self.longest, self.alike = cache, longest, alike
        self.lengths = cache.prefix_lengths, drawn[: len(groups.sibling_index)]
        self.members = groups.siblings, groups.sibling_index
        self.rows = groups.prefix_rows, groups.suffix_rows
        self.work = plan(self._segments(0), self.members, self.rows, cache.heads)

    def _segments(self, layer: int) -> tuple[Segment, Segment]:
        """The rows and positions that may be read, of the prefixes and of the suffixes."""
        caches = (self.cache.prefix_k, self.cache.prefix_v), (self.cache.suffix_k, self.cache.suffix_v)
        rows = [len(own) if rows is None else None for own, rows in zip(self.members, self.rows, strict=True)]
        each = zip(caches, self.lengths, rows, self.longest, strict=True)
        prefix, suffix = ((k[layer, :n, :, :end], v[layer, :n, :, :end], x[:n]) for (k, v), x, n, end in each)
        return prefix, suffix

    def __call__(self, layer: int, qkv: Tensor, **turn: Any) -> Tensor:
        """turn: of the attended rows. Rows of qkv beyond them come back as zeros."""
        prefix, suffix = self._segments(layer)
        of_prefix, of_suffix = self.rows
        attended = decode_attention(
            qkv[: len(suffix[2])], *prefix, *self.members, *suffix, prefix_rows=of_prefix, suffix_rows=of_suffix,
            alike=self.alike, work=self.work, **turn,
        )  # fmt: skip
        padding = len(qkv) - len(attended)
        return F.pad(attended, (0, 0, 0, 0, 0, padding)) if padding else attended
