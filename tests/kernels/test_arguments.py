"""Arguments that are legal and unusual: strided vectors, weights that are no leaf, autocast, gradients left on."""

from __future__ import annotations

import pytest
import torch

from minem.kernels import decode_attention, linear_cross_entropy, rms_norm, rotary, sample
from minem.kernels.rope import CacheWrite

BACKENDS = ["eager", "triton"]


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values two apart in memory."""
    wide = torch.full((*x.shape, 2), 7, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_no_leaf_gets_its_gradient(backend):
    hidden, base, targets = numbers(6, 4), numbers(9, 4, seed=1).requires_grad_(), torch.arange(6)
    linear_cross_entropy(hidden, base * 2, targets, backend=backend)[0].backward()
    expected = base.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ (expected * 2).t(), targets, reduction="sum").backward()
    torch.testing.assert_close(base.grad, expected.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_under_autocast_is_the_loss(backend):
    hidden, weight, targets = numbers(6, 4).requires_grad_(), numbers(9, 4, seed=1), torch.arange(6)
    expected = linear_cross_entropy(hidden, weight, targets, backend=backend)[0]
    with torch.autocast("cpu"):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)[0]
    assert torch.equal(loss, expected)
    loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero_may_have_any_target(backend):
    hidden, weight = numbers(3, 4), numbers(9, 4, seed=1)
    loss, logprobs, _ = linear_cross_entropy(
        hidden, weight, torch.tensor([1, 99, 2]), torch.tensor([1.0, 0.0, 1.0]), backend=backend
    )
    assert loss.isfinite()
    assert logprobs[1] == 0


def test_strided_vectors_are_read_where_they_are():
    x, weight = numbers(5, 8), numbers(8, seed=1)
    for got, wanted in zip(
        rms_norm(x, spread(weight), 1e-6, backend="triton"), rms_norm(x, weight, 1e-6, backend="eager"), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    qkv, angle, norm = numbers(5, 4, 8, seed=2), numbers(5, 4, seed=3), numbers(8, seed=4)
    rows, positions = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([2, 0, 1, 2, 0])
    written = []
    for backend, change in (("eager", torch.clone), ("triton", spread)):
        cache = CacheWrite(torch.zeros(5, 1, 3, 8), torch.zeros(5, 1, 3, 8), change(rows), change(positions))
        with torch.no_grad():
            out = rotary(
                qkv, angle.cos(), angle.sin(), 2, q_norm=change(norm), k_norm=change(norm), cache=cache, backend=backend
            )
        written.append((*out, cache.k, cache.v))
    for got, wanted in zip(*written, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    qkv, angle = numbers(3, 8, 16), numbers(3, 8, seed=3)
    prefix, suffix = numbers(2, 2, 6, 16, seed=1), numbers(3, 2, 5, 16, seed=2)
    vectors = torch.tensor([6, 3]), torch.tensor([0, 1, 2]), torch.tensor([0, 4, 1])
    results = []
    for backend, change in (("eager", torch.clone), ("triton", spread)):
        lengths, index, own = map(change, vectors)
        siblings = torch.tensor([[0, 1], [2, 0]])
        turn = {"cos": change(angle.cos()), "sin": change(angle.sin()), "heads": 4}
        cache = prefix, prefix, lengths, siblings, index, suffix.clone(), suffix.clone(), own
        results.append((decode_attention(qkv, *cache, **turn, backend=backend), *cache[-3:-1]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_rotary_with_trainable_norms_is_never_cut_off_from_them():
    qkv, angle, norm = numbers(5, 4, 8), numbers(5, 4, seed=3), numbers(8, seed=4).requires_grad_()
    for backend in BACKENDS:
        q, k, _ = rotary(qkv, angle.cos(), angle.sin(), 2, q_norm=norm, k_norm=norm, backend=backend)
        assert q.requires_grad
        assert k.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawing_needs_no_gradients_and_takes_none(backend):
    logits = numbers(2, 30).requires_grad_()
    zeros, ones = torch.zeros(2), torch.ones(2)
    rows = torch.arange(2)
    tokens, logprobs, _ = sample(logits, ones, rows * 0, ones, zeros, rows, rows, backend=backend)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, logits.detach().log_softmax(-1)[rows, tokens])
    with pytest.raises(ValueError, match="stop_ids"):
        sample(
            logits, ones, rows * 0, ones, zeros, rows, rows, stop_ids=torch.tensor([[1, 2]]), min_tokens=rows,
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_p_is_exact_at_its_boundary(backend):
    """Logits at the threshold and one rounding step beside it: kept if and only if exp(logit) >= min_p in float64."""
    count = 24
    for min_p in (0.5, 0.3):
        edge = torch.tensor(min_p).double().log().float()
        steps = [edge, torch.nextafter(edge, torch.tensor(-100.0)), torch.nextafter(edge, torch.tensor(0.0))]
        logits = torch.stack([torch.tensor(0.0), *steps])[None].repeat(count, 1).contiguous()
        rows, ones = torch.arange(count), torch.ones(count)
        drawn = sample(logits, ones, rows * 0, ones, ones * min_p, rows, rows, backend=backend)[0]
        kept = logits[0].double() >= torch.tensor(min_p).double().log()
        kept[0] = True
        assert set(drawn.tolist()) == set(kept.nonzero().flatten().tolist()), min_p


def test_heads_that_do_not_divide_are_refused():
    qkv, segment, lengths = numbers(1, 7, 16), numbers(1, 2, 4, 16), torch.tensor([2])
    index, angle = torch.tensor([0]), numbers(1, 8)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="multiple of the key heads"):
            decode_attention(
                qkv, segment, segment, lengths, index[None], index, segment, segment, lengths, heads=3, cos=angle,
                sin=angle, backend=backend,
            )  # fmt: skip
    with pytest.raises(ValueError, match="V is at least 1"):
        linear_cross_entropy(numbers(2, 4), numbers(0, 4), torch.tensor([0, 0]))
