"""sample against its definition by brute force, transformers' filters, and chi-square on its frequencies.

The vectorised reference is checked against all of these; the Triton kernel, slow in the interpreter, against the
reference, token by token, and natively (gpu) by chi-square too.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from minem.kernels import sample
from minem.kernels.sampling import uniforms


def plain(rows: int, **changes: Any) -> dict[str, Tensor]:
    """Per-row arguments of a plain draw, with changes (a number fills its row)."""
    arguments = {
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int64),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "seeds": torch.arange(rows) * 7919 - 5,
        "positions": torch.arange(rows) % 13,
    }
    for name, value in changes.items():
        arguments[name] = value if isinstance(value, Tensor) else torch.full_like(arguments[name], value)
    return arguments


def random_logits(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_definition(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The kept set of one row, one token at a time, in Python floats."""
    top = max(logits)
    x = [(value - top) / temperature for value in logits]
    in_k = [i for i in range(len(x)) if top_k <= 0 or sum(logits[j] > logits[i] for j in range(len(x))) < top_k]
    mass = {i: torch.tensor(x[i], dtype=torch.float64).exp().item() for i in in_k}
    total = sum(mass.values())
    in_p = []
    for i in in_k:
        above = sum(mass[j] for j in in_k if logits[j] > logits[i])
        if top_p >= 1 or above < top_p * total or logits[i] == top:
            in_p.append(i)
    biggest = max(mass.values())
    return [i for i in in_p if min_p == 0 or mass[i] >= min_p * biggest]


def kept_by_drawing(logits: Tensor, draws: int = 4000, **changes: Any) -> list[int]:
    """Every token that `draws` draws from one row of logits [V] give."""
    return sample(logits.expand(draws, -1), **plain(draws, **changes))[0].unique().tolist()


# Salmon et al.'s own known-answer vectors for philox4x32-10 (their kat_vectors file): counter, key -> first word.
@pytest.mark.parametrize(
    ("position", "seed", "word"),
    [(0, 0, 0x6627E8D5)],
)
def test_philox_known_answer(position: int, seed: int, word: int) -> None:
    u = uniforms(torch.tensor([seed]), torch.tensor([position]))
    assert int(u.item() * 2**32 - 0.5) == word


def test_uniforms_are_uniform_and_unrelated() -> None:
    seeds, positions = torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)
    u = uniforms(seeds, positions)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    grid = u.view(200, 100)
    assert torch.corrcoef(grid).fill_diagonal_(0).abs().max() < 0.5
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.03
    big = uniforms(torch.tensor([2**62 + 1, -(2**63), 1]), torch.tensor([0, 0, 2**40]))
    assert len(big.unique()) == 3


def test_logprobs_are_log_softmax() -> None:
    logits = random_logits(64, 1000, scale=8)
    tokens, logprobs, proposal = sample(logits, **plain(64))
    want = logits.double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.double(), want, rtol=0, atol=1e-5)
    assert torch.equal(logprobs, proposal)
    tokens, logprobs, proposal = sample(logits, **plain(64, temperature=0.6))
    want = logits.double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.double(), want, rtol=0, atol=1e-5)
    want = (logits.double() / 0.6).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(proposal.double(), want, rtol=0, atol=1e-5)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies(filters: dict[str, Any], backend: str) -> None:
    """Chi-square on 20,000 draws, tokens expected fewer than 10 times pooled."""
    draws, logits = 20_000, random_logits(1, 300, scale=2.0, seed=3)[0]
    place = "cuda" if backend == "triton" else "cpu"
    arguments = {name: value.to(place) for name, value in plain(draws, **filters).items()}
    drawn = sample(logits.expand(draws, -1).to(place), **arguments, backend=backend)
    tokens, _, proposal = (t.cpu() for t in drawn)
    whole: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    kept = kept_by_definition(logits.tolist(), **whole)
    p = (logits[kept].double() / whole["temperature"]).softmax(-1)
    assert set(tokens.tolist()) <= set(kept)
    position = {token: i for i, token in enumerate(kept)}
    where = torch.tensor([position[token] for token in tokens.tolist()])
    torch.testing.assert_close(proposal.double(), p[where].log(), rtol=0, atol=1e-5)
    counts = torch.bincount(where, minlength=len(kept)).double()
    large = p * draws >= 10
    observed, expected = counts[large], p[large] * draws
    if not large.all():
        observed = torch.cat([observed, counts[~large].sum().view(1)])
        expected = torch.cat([expected, p[~large].sum().view(1) * draws])
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_kept_sets_equal_the_definition(seed: int) -> None:
    """Small vocabularies with many ties, every filter and combination; -inf logits among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-4, 3, (12,), generator=generator).float() / 2
    logits[seed % 12] = -torch.inf
    for filters in (
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.6, "min_p": 0.2, "temperature": 1.7},
    ):
        whole: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
        kept = kept_by_definition(logits.tolist(), **whole)
        assert kept_by_drawing(logits, **filters) == [i for i in kept if logits[i] > -torch.inf], filters


def test_the_token_that_crosses_p_is_kept() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert kept_by_drawing(logits, top_p=0.49) == [0]
    assert kept_by_drawing(logits, top_p=0.51) == [0, 1]
    assert kept_by_drawing(logits, top_p=0.76) == [0, 1, 2, 3]  # the third crosses; the fourth is its equal
    assert kept_by_drawing(logits, top_p=0.0) == [0]
    assert kept_by_drawing(logits, top_k=3) == [0, 1, 2, 3]
    assert kept_by_drawing(logits, min_p=0.49) == [0, 1]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0], [9.0, 1.0, 1.0, 9.0]])
    tokens, logprobs, proposal = sample(logits, **plain(2, temperature=0.0))
    assert tokens.tolist() == [1, 0]
    assert proposal.tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(2), tokens])


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 8.0, 1.0]]).expand(400, -1)
    arguments = plain(400, positions=torch.tensor([3, 5]).repeat(200))
    stops: dict[str, Any] = {"stop_ids": torch.tensor([1]), "min_tokens": torch.full((400,), 5)}
    tokens, logprobs, proposal = sample(logits, **arguments, **stops)
    assert set(tokens[::2].tolist()) == {0, 2}
    assert 1 in tokens[1::2].tolist()
    raw = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, raw, rtol=0, atol=1e-5)
    masked = torch.tensor([0.0, -torch.inf, 1.0]).log_softmax(-1)
    torch.testing.assert_close(proposal[::2], masked[tokens[::2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(proposal[1::2], raw[1::2], rtol=0, atol=1e-5)
    greedy = sample(logits, **plain(400, temperature=0.0, positions=arguments["positions"]), **stops)[0]
    assert greedy[:2].tolist() == [2, 1]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 300, 2049])
def test_a_row_does_not_depend_on_its_batch(filters: dict[str, Any], vocabulary: int) -> None:
    """Bit for bit: alone, in part of the batch, shuffled, and beside rows that ask for other filters."""
    logits = random_logits(37, vocabulary)
    arguments = plain(37, **filters)
    whole = sample(logits, **arguments)
    for rows in (torch.arange(37).flip(0), torch.tensor([4]), torch.arange(5, 8)):
        part = sample(logits[rows], **{name: value[rows] for name, value in arguments.items()})
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[rows])
    mixed = {name: torch.cat([value, value[:3]]) for name, value in arguments.items()}
    mixed["temperature"][-3:] = torch.tensor([0.0, 0.5, 2.0])
    mixed["top_p"][-3:] = 0.5
    for got, want in zip(sample(torch.cat([logits, logits[:3]]), **mixed), whole, strict=True):
        assert torch.equal(got[:37], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits(dtype: torch.dtype, scale: float) -> None:
    logits = (random_logits(50, 77, scale=1.0).clamp(-1, 1) * scale).to(dtype)
    for filters in FILTERS:
        tokens, logprobs, proposal = sample(logits, **plain(50, **filters))
        want = logits.double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
        assert proposal.isfinite().all()


def test_rows_without_anything_to_draw() -> None:
    logits = torch.tensor([[-torch.inf] * 3, [-torch.inf, 1.0, -torch.inf], [0.0, torch.nan, 0.0]])
    for filters in [*FILTERS, {"temperature": 0.0}]:
        tokens, logprobs, proposal = sample(logits, **plain(3, **filters))
        assert tokens[:2].tolist() == [0, 1]
        assert logprobs[:2].tolist() == [-torch.inf, 0.0]
        assert proposal[:2].tolist() == [-torch.inf, 0.0]
        assert logprobs[2].isnan()
        assert 0 <= tokens[2] < 3


def test_zero_probability_tokens_are_never_drawn() -> None:
    logits = torch.full((5000, 515), -torch.inf)
    logits[:, [127, 128, 514]] = torch.tensor([0.0, -2.0, 1.0])
    assert sample(logits, **plain(5000))[0].unique().tolist() == [127, 128, 514]


def test_strided_logits() -> None:
    logits = random_logits(20, 2 * 131)
    arguments = plain(20, top_p=0.9)
    for got, want in zip(
        sample(logits[:, ::2], **arguments), sample(logits[:, ::2].contiguous(), **arguments), strict=True
    ):
        assert torch.equal(got, want)


def test_filters_equal_transformers() -> None:
    """No ties here, so its sorted definition and ours must keep the same tokens."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(1, 200, seed=11)
    warpers = (TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.85), MinPLogitsWarper(0.03))
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    tokens, _, proposal = sample(
        logits.expand(20_000, -1), **plain(20_000, temperature=0.8, top_k=20, top_p=0.85, min_p=0.03)
    )
    assert tokens.unique().tolist() == scores[0].isfinite().nonzero().squeeze(1).tolist()
    torch.testing.assert_close(proposal, scores[0].log_softmax(-1)[tokens], rtol=0, atol=1e-5)


def assert_triton_equals_eager(logits: Tensor, device: str, **arguments: Tensor) -> None:
    """Same tokens; log-probabilities within 1e-5. The proposal's tells the mass of the kept set, hence the set."""
    moved = {name: value.to(device) for name, value in arguments.items()}
    eager = sample(logits.to(device), **moved, backend="eager")
    triton = sample(logits.to(device), **moved, backend="triton")
    assert eager[0].tolist() == triton[0].tolist()
    for got, want in zip(triton[1:], eager[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5, equal_nan=True)


def mixed(rows: int) -> dict[str, Tensor]:
    """A batch in which each row asks for other filters, greedy among them."""
    arguments = plain(rows)
    kinds = [*FILTERS, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 10**6}, {"top_p": 0.0}, {"min_p": 1.0}]
    for row in range(rows):
        for name, value in kinds[row % len(kinds)].items():
            arguments[name][row] = value
    return arguments


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"),
    [
        (11, 300, torch.float32),
        (11, 9001, torch.bfloat16),  # more than one tile
        pytest.param(500, 300, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(110, 300, torch.float32, marks=pytest.mark.slow),
        pytest.param(22, 1, torch.float32, marks=pytest.mark.slow),
        pytest.param(33, 9001, torch.float32, marks=pytest.mark.slow),
        pytest.param(110, 1031, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(55, 1031, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_triton_draws_the_same_tokens(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Slow: hundreds of draws, which meet the rare u at the edge of a block, and the bits of fp16."""
    assert_triton_equals_eager(random_logits(rows, vocabulary).to(dtype), device, **mixed(rows))


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(11, torch.bfloat16), pytest.param(33, torch.bfloat16, marks=pytest.mark.slow), (11, torch.float32)],
)
def test_triton_keeps_the_same_sets_where_logits_are_equal(rows: int, dtype: torch.dtype, device: str) -> None:
    """Twelve tokens, few distinct logits, zeros of both signs, -inf among them. Slow: more of them."""
    logits = torch.randint(-4, 3, (rows, 12), generator=torch.Generator().manual_seed(1)).to(dtype) / 2
    logits[::3] *= -1  # makes -0.0
    logits[torch.arange(rows), torch.arange(rows) % 12] = -torch.inf
    assert_triton_equals_eager(logits, device, **mixed(rows))


def test_triton_stop_tokens(device: str) -> None:
    arguments = mixed(22)
    arguments["positions"] = torch.arange(22) // 11 * 5
    logits = random_logits(22, 40).bfloat16()
    logits[:, [3, 17]] += 5
    stops = {"stop_ids": torch.tensor([3, 17]), "min_tokens": torch.full((22,), 5)}
    assert_triton_equals_eager(logits, device, **arguments, **stops)


def test_triton_zeros_of_both_signs_at_the_threshold(device: str) -> None:
    """Top-p takes its share of all that top-k keeps, and that is every zero; so, too, where zeros are the largest."""
    logits = torch.tensor([[1.0, 0.0] + [-0.0] * 100, [-0.0, 0.0] * 50 + [-0.0, -9.0]]).bfloat16()
    assert_triton_equals_eager(logits, device, **plain(2, top_k=2, top_p=0.5, seeds=3))


@pytest.mark.parametrize("scale", [1e4, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-4, 1e38))])
def test_triton_extreme_logits(scale: float, device: str) -> None:
    """Slow: numbers with all bit patterns of small ones between them, and numbers that overflow."""
    logits = (random_logits(11, 77, 1.0).clamp(-1, 1) * scale).bfloat16()
    assert_triton_equals_eager(logits, device, **mixed(11))


def test_triton_rows_without_anything_to_draw(device: str) -> None:
    logits = random_logits(33, 9).bfloat16()
    logits[:11] = -torch.inf
    logits[11:22, 1:] = -torch.inf
    logits[22:33] = torch.finfo(torch.bfloat16).min
    assert_triton_equals_eager(logits, device, **mixed(33))
    masked = plain(11, positions=0)
    stops = {"stop_ids": torch.tensor([0]), "min_tokens": torch.ones(11, dtype=torch.int64)}
    assert_triton_equals_eager(logits[11:22], device, **masked, **stops)
    arguments = {name: value.to(device) for name, value in mixed(11).items()}
    logits[:, 4] = torch.nan
    tokens, logprobs, _ = (t.cpu() for t in sample(logits[-11:].to(device), **arguments, backend="triton"))
    assert logprobs.isnan().all()
    assert ((tokens >= 0) & (tokens < 9)).all()


def test_triton_strided_logits(device: str) -> None:
    logits = random_logits(11, 2 * 131).bfloat16()
    assert_triton_equals_eager(logits[:, ::2], device, **mixed(11))
    assert_triton_equals_eager(logits[:, 5:90], device, **mixed(11))


def test_triton_rows_far_apart(device: str) -> None:
    """The offset of the second row passes 2^31. The 4 GB between the rows are never touched, so they take no memory."""
    if device != "cpu":
        pytest.skip("a GPU has no memory without pages")
    stride = 2**31 + 8
    far = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 300)), dtype=torch.bfloat16).as_strided((2, 300), (stride, 1))
    far.copy_(random_logits(2, 300))
    arguments = plain(2, top_p=0.9)
    near = sample(far.clone(), **arguments, backend="eager")
    assert sample(far, **arguments, backend="triton")[0].tolist() == near[0].tolist()


def test_one_compilation_serves_all_batches(request: pytest.FixtureRequest, device: str) -> None:
    """Rows of tables, as the engine passes them, whose places in memory change with the batch; one stop id or two."""
    if request.config.getoption("ptx") is None:
        pytest.skip("only PTX has variants")
    from tests.kernels.ptx.launch import LAUNCHES

    before = len(LAUNCHES)
    for rows in (1, 2, 3, 16):
        whole, real = torch.zeros(4, rows, dtype=torch.int64), torch.ones(3, rows)
        stops = {"stop_ids": torch.arange(1 + rows % 2), "min_tokens": whole[3]}
        logits = random_logits(rows, 512).bfloat16()
        sample(logits, real[1], whole[1], *real[1:], *whole[1:3], **stops, backend="triton")
    assert len({launch.variant for launch in LAUNCHES[before:]}) == 3


def test_triton_row_does_not_depend_on_its_batch(device: str) -> None:
    logits, arguments = random_logits(11, 300).bfloat16().to(device), {k: v.to(device) for k, v in mixed(11).items()}
    whole = sample(logits, **arguments, backend="triton")
    rows = torch.arange(11, device=device).flip(0)[:5]
    part = sample(logits[rows], **{name: value[rows] for name, value in arguments.items()}, backend="triton")
    for got, want in zip(part, whole, strict=True):
        assert torch.equal(got, want[rows])


def test_bad_input_is_named() -> None:
    logits = random_logits(3, 5)
    with pytest.raises(ValueError, match="top_p must be"):
        sample(logits, **plain(3, top_p=torch.ones(2)))
    with pytest.raises(ValueError, match="both or neither"):
        sample(logits, **plain(3), stop_ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="logits must be"):
        sample(logits[0], **plain(3))
