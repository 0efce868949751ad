"""decode_attention, both backends, against softmax over the joined prefix and suffix in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minem.kernels import attention, decode_attention, rotary
from tests.kernels.cases import both

BACKENDS = ["eager", "triton"]


class Sizes(NamedTuple):
    sequences: int
    heads: int
    kv_heads: int
    channels: int
    prefixes: int
    prefix: int
    suffix: int


SIZES = [
    Sizes(5, 4, 2, 16, 3, 40, 20),
    Sizes(3, 6, 2, 24, 2, 300, 270),  # channels no power of two; more than one split of 256
    Sizes(1, 1, 1, 8, 1, 1, 1),
    Sizes(12, 14, 2, 64, 2, 70, 33),  # Qwen2.5-0.5B's heads: seven queries a group, more than one tile of siblings
    Sizes(2, 20, 1, 16, 1, 20, 10),  # more queries a group than rows in a tile
]


def problem(sizes: Sizes, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Arguments of decode_attention, its caches being views into larger ones, and the prefix of each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def cache(batch: int, length: int) -> Tensor:
        return normal(batch + 1, sizes.kv_heads, length + 5, sizes.channels)[:batch, :, :length]

    row = torch.randint(sizes.prefixes, (sizes.sequences,), generator=generator)
    places = max(1, int(torch.bincount(row, minlength=sizes.prefixes).max()))
    siblings = torch.randint(sizes.sequences, (sizes.prefixes, places), generator=generator)  # unused: anything
    index = torch.empty(sizes.sequences, dtype=torch.int64)
    filled = [0] * sizes.prefixes
    for sequence, r in enumerate(row.tolist()):
        siblings[r, filled[r]] = sequence
        index[sequence] = r * places + filled[r]
        filled[r] += 1
    prefix_lengths = torch.randint(0, sizes.prefix + 1, (sizes.prefixes,), generator=generator)
    prefix_lengths[0] = 0 if sizes.prefixes > 1 else sizes.prefix
    suffix_lengths = torch.randint(1, sizes.suffix + 1, (sizes.sequences,), generator=generator)
    suffix_lengths[0] = sizes.suffix
    arguments = [
        normal(sizes.sequences, sizes.heads, sizes.channels),
        cache(sizes.prefixes, sizes.prefix),
        cache(sizes.prefixes, sizes.prefix),
        prefix_lengths,
        siblings,
        index,
        cache(sizes.sequences, sizes.suffix),
        cache(sizes.sequences, sizes.suffix),
        suffix_lengths,
    ]
    return [argument.to(device) for argument in arguments], row


def attend(arguments: list[Tensor], **options: Any) -> Tensor:
    """decode_attention for queries that need no rotation. The last position of each suffix arrives in qkv, and its
    place in the cache holds nothing of use before."""
    q, *rest, suffix_k, suffix_v, lengths = arguments
    rows = options.get("suffix_rows")
    last = (torch.arange(len(q), device=q.device) if rows is None else rows, slice(None), lengths - 1)
    qkv = torch.cat([q, suffix_k[last], suffix_v[last]], 1)
    suffix_k, suffix_v = suffix_k.clone(), suffix_v.clone()
    suffix_k[last] = suffix_v[last] = 77
    cos = q.new_ones(len(q), q.shape[2] // 2)
    turn = {"heads": q.shape[1], "cos": cos, "sin": 0 * cos}
    return decode_attention(qkv, *rest, suffix_k, suffix_v, lengths - 1, **turn, **options)


def by_definition(arguments: list[Tensor], row: Tensor) -> Tensor:
    """One sequence at a time, float64."""
    q, prefix_k, prefix_v, prefix_lengths, _, _, suffix_k, suffix_v, suffix_lengths = (a.cpu() for a in arguments)
    out = []
    for s, r in enumerate(row.tolist()):
        segments = ((prefix_k, suffix_k), (prefix_v, suffix_v))
        k, v = (
            torch.cat([p[r, :, : prefix_lengths[r]], x[s, :, : suffix_lengths[s]]], dim=1)
            .double()
            .repeat_interleave(q.shape[1] // prefix_k.shape[1], dim=0)
            for p, x in segments
        )
        weights = (torch.einsum("hc,hlc->hl", q[s].double(), k) / q.shape[2] ** 0.5).softmax(-1)
        out.append(torch.einsum("hl,hlc->hc", weights, v))
    return torch.stack(out)


@pytest.mark.parametrize(("backend", "sizes"), both(SIZES))
def test_equals_the_definition(sizes: Sizes, backend: str, device: str) -> None:
    arguments, row = problem(sizes, torch.float32, device)
    out = attend(arguments, backend=backend)
    torch.testing.assert_close(out.cpu().double(), by_definition(arguments, row), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_all_prefixes_share_may_be_read_once(dtype: torch.dtype, device: str) -> None:
    """Worked examples: the first 20 positions of three prefixes are alike; one of them has no more than these."""
    arguments, row = problem(SIZES[0], dtype, device)
    arguments[3][:] = torch.tensor([20, 31, 40])
    for segment in arguments[1:3]:
        segment[:, :, :20] = segment[2, :, :20].clone()
    out = attend(arguments, alike=(2, 20), backend="eager")
    exact = by_definition(arguments, row)
    whole = attend(arguments, backend="eager").cpu().double()
    bound = 2 * (whole - exact).abs().max() if dtype == torch.bfloat16 else 2e-6
    assert (out.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize(("backend", "sizes"), both([SIZES[0], SIZES[1], SIZES[3]], quick=1))
def test_sequences_may_lie_anywhere(sizes: Sizes, backend: str, device: str) -> None:
    """Prefixes and suffixes scattered over a larger cache, groups of at most two, some without members."""
    arguments, row = problem(sizes, torch.float32, device)
    expected = by_definition(arguments, row)
    q, prefix_k, prefix_v, prefix_lengths, _, _, suffix_k, suffix_v, suffix_lengths = arguments
    generator = torch.Generator().manual_seed(1)
    prefixes, suffixes = (torch.randperm(2 * n, generator=generator)[:n] for n in (sizes.prefixes, sizes.sequences))

    def scatter(x: Tensor, places: Tensor) -> Tensor:
        larger = torch.full((2 * len(places), *x.shape[1:]), 7, dtype=x.dtype, device=device)
        larger[places.to(device)] = x[: len(places)]
        return larger

    groups = [
        (r, members[i : i + 2])
        for r in range(sizes.prefixes)
        for members in [(row == r).nonzero().flatten().tolist()]
        for i in range(0, max(1, len(members)), 2)
    ]
    places = {s: 2 * t + i for t, (_, members) in enumerate(groups) for i, s in enumerate(members)}
    out = attend(
        [
            q,
            scatter(prefix_k, prefixes),
            scatter(prefix_v, prefixes),
            scatter(prefix_lengths, prefixes),
            torch.tensor([members + [0] * (2 - len(members)) for _, members in groups], device=device),
            torch.tensor([places[s] for s in range(sizes.sequences)], device=device),
            scatter(suffix_k, suffixes),
            scatter(suffix_v, suffixes),
            suffix_lengths,
        ],
        prefix_rows=torch.tensor([int(prefixes[r]) for r, _ in groups], device=device),
        suffix_rows=suffixes.to(device),
        backend=backend,
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_at_most_twice_pytorchs_own(dtype: torch.dtype, backend: str, device: str) -> None:
    """PyTorch's own: scaled_dot_product_attention in the same dtype on the joined cache of each sequence."""
    arguments, row = problem(SIZES[0], dtype, device)
    exact = by_definition(arguments, row)
    q, prefix_k, prefix_v, prefix_lengths, _, _, suffix_k, suffix_v, suffix_lengths = arguments
    theirs = []
    for s, r in enumerate(row.tolist()):
        k = torch.cat([prefix_k[r, :, : prefix_lengths[r]], suffix_k[s, :, : suffix_lengths[s]]], dim=1)
        v = torch.cat([prefix_v[r, :, : prefix_lengths[r]], suffix_v[s, :, : suffix_lengths[s]]], dim=1)
        query = q[s].view(1, -1, 1, q.shape[2])
        out = torch.nn.functional.scaled_dot_product_attention(query, k[None], v[None], enable_gqa=True)
        theirs.append(out.view(q.shape[1], -1))
    their_error = (torch.stack(theirs).cpu().double() - exact).abs()
    our_error = (attend(arguments, backend=backend).cpu().double() - exact).abs()
    assert our_error.max() <= 2 * their_error.max()
    assert our_error.mean() <= 2 * their_error.mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str, device: str) -> None:
    arguments, row = problem(SIZES[0], torch.float32, device)
    arguments[0] *= 1e4
    out = attend(arguments, backend=backend)
    torch.testing.assert_close(out.cpu().double(), by_definition(arguments, row), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_past_the_lengths_is_not_seen(backend: str, device: str) -> None:
    arguments, _ = problem(SIZES[0], torch.float32, device)
    before = attend(arguments, backend=backend)
    _, prefix_k, prefix_v, prefix_lengths, _, _, suffix_k, suffix_v, suffix_lengths = arguments
    for k, v, lengths in ((prefix_k, prefix_v, prefix_lengths), (suffix_k, suffix_v, suffix_lengths)):
        for i, length in enumerate(lengths.tolist()):
            k[i, :, length:] = 1e4
            v[i, :, length:] = 1e4
    assert torch.equal(attend(arguments, backend=backend), before)


def test_triton_sums_do_not_depend_on_the_batch(device: str) -> None:
    """Bit for bit: a sequence alone with its prefix, in shorter caches, gives what it gives among others."""
    arguments, row = problem(SIZES[1], torch.float32, device)
    whole = attend(arguments, backend="triton")
    q, prefix_k, prefix_v, prefix_lengths, _, _, suffix_k, suffix_v, suffix_lengths = arguments
    for s in (0, 2):
        r, zero = int(row[s]), torch.zeros(1, dtype=torch.int64, device=device)
        prefix, suffix = max(1, int(prefix_lengths[r])), int(suffix_lengths[s])
        alone = attend(
            [
                q[s : s + 1],
                prefix_k[r : r + 1, :, :prefix],
                prefix_v[r : r + 1, :, :prefix],
                prefix_lengths[r : r + 1],
                zero[None],
                zero,
                suffix_k[s : s + 1, :, :suffix],
                suffix_v[s : s + 1, :, :suffix],
                suffix_lengths[s : s + 1],
            ],
            backend="triton",
        )
        assert torch.equal(alone[0], whole[s])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_new_token_is_rotated_written_and_attended_to(with_norm: bool, backend: str, device: str) -> None:
    """As `rotary` does it; the step's work serves a second layer, and nothing else in the cache changes."""
    arguments, row = problem(SIZES[0], torch.float32, device)
    q, *rest, suffix_k, suffix_v, lengths = arguments
    generator = torch.Generator().manual_seed(2)
    angle, norms = torch.rand(5, 8, generator=generator) * 100, torch.randn(2, 16, generator=generator)
    turn = {"heads": 4, "cos": angle.cos().to(device), "sin": angle.sin().to(device), "eps": 1e-5}
    if with_norm:
        turn |= {"q_norm": norms[0].to(device), "k_norm": norms[1].to(device)}
    held, every = lengths - 1, torch.arange(5, device=device)
    members = tuple(rest[3:5])
    work = attention.plan(((*rest[:3],), (suffix_k, suffix_v, held)), members, (None, None), 4, backend)
    for _ in range(2):
        qkv = torch.randn(5, 8, 16, generator=generator).to(device)
        q, k, v = rotary(qkv, **turn, backend="eager")
        expected_k, expected_v = suffix_k.clone(), suffix_v.clone()
        expected_k[every, :, held], expected_v[every, :, held] = k, v
        out = decode_attention(qkv, *rest, suffix_k, suffix_v, held, **turn, work=work, backend=backend)
        torch.testing.assert_close(suffix_k, expected_k, rtol=1e-5, atol=1e-5)
        assert torch.equal(suffix_v, expected_v)
        exact = by_definition([q, *rest, expected_k, expected_v, lengths], row)
        torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_two_programs_sum_as_many_do(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Bit for bit: how the pieces of work are shared does not matter, nor which of a query's pieces comes last."""
    arguments, _ = problem(SIZES[0], torch.float32, device)
    many = attend(arguments, backend="triton")
    monkeypatch.setattr(attention, "PROGRAMS", 2)
    assert torch.equal(attend(arguments, backend="triton"), many)
