"""linear_cross_entropy, both backends, against PyTorch's own cross-entropy in float64; gradients by finite differences.

The eager reference runs in float64, where it must equal the definition to 1e-10; the Triton kernel computes in fp32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minem.kernels import linear_cross_entropy
from minem.kernels.cross_entropy import _row_pass_eager, _row_pass_triton, _scale_kernel, chunk_rows_of
from tests.kernels.cases import both


def problem(
    n: int, d: int, v: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden, weight, targets (every fifth ignored) and token weights (every third zero)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[1::5] = -100
    token_weights = torch.rand(n, generator=generator)
    token_weights[2::3] = 0.0
    return hidden, weight, targets, token_weights


BACKENDS = ["eager", "triton"]
DTYPE = {"eager": torch.float64, "triton": torch.float32}
TOLERANCE = {"eager": {"rtol": 1e-10, "atol": 1e-10}, "triton": {"rtol": 1e-5, "atol": 1e-5}}


def by_definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain formula on the whole [N, V], in the dtype given."""
    logp = (hidden @ weight.t()).log_softmax(-1)
    active = (targets != -100) & (token_weights != 0)
    chosen = logp.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    entropy = torch.distributions.Categorical(logits=logp).entropy()
    zero = torch.zeros((), dtype=logp.dtype)
    chosen, entropy = torch.where(active, chosen, zero), torch.where(active, entropy, zero)
    return -(token_weights.to(logp.dtype) * chosen).sum(), chosen, entropy


@pytest.mark.parametrize(("backend", "shape"), both([(7, 5, 11), (9, 7, 20_011), (1, 3, 2), (64, 24, 300)]))
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_values_and_gradients_equal_the_definition(
    shape: tuple[int, int, int], chunk_rows: int | None, backend: str, device: str
) -> None:
    n, d, v = shape
    hidden, weight, targets, token_weights = (t.to(device) for t in problem(n, d, v, DTYPE[backend], scale=0.5))
    if n == 1:
        targets[0] = 1
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    theirs = [t.double().requires_grad_() for t in (hidden, weight)]
    results = linear_cross_entropy(*ours, targets, token_weights, chunk_rows=chunk_rows, backend=backend)
    wanted = by_definition(*theirs, targets, token_weights)
    (results[0] * 3).backward()
    (wanted[0] * 3).backward()
    got = [*results, ours[0].grad, ours[1].grad]
    want = [*wanted, theirs[0].grad, theirs[1].grad]
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, check_dtype=False, **TOLERANCE[backend])


def test_gradcheck() -> None:
    hidden, weight, targets, token_weights = problem(6, 4, 9)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, token_weights, chunk_rows=4)[0], (hidden, weight)
    )


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, targets, token_weights = problem(8, 4, 9)
    ids = torch.arange(8) % 9
    mine, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(mine[ids].tanh(), mine, targets, token_weights)[0].backward()
    by_definition(other[ids].tanh(), other, targets, token_weights)[0].backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_no_weights_means_ones_and_other_outputs_are_detached() -> None:
    hidden, weight, targets, _ = problem(9, 4, 12)
    hidden.requires_grad_()
    loss, logprobs, entropy = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, by_definition(hidden, weight, targets, torch.ones(9))[0])
    assert loss.requires_grad
    assert not logprobs.requires_grad
    assert not entropy.requires_grad


def test_frozen_side_gets_no_gradient_and_no_grad_does_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, token_weights = problem(9, 4, 12)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, token_weights)[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None
    weight.requires_grad_()
    import minem.kernels.cross_entropy as module

    def forbidden(*_: object) -> None:
        raise AssertionError("gradient work under no_grad")

    monkeypatch.setattr(module, "_accumulate", forbidden)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, token_weights)[0]
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_at_most_twice_pytorchs_own(dtype: torch.dtype, backend: str, device: str) -> None:
    """Against float64 on the very same rounded inputs; PyTorch's own: logits in `dtype`, cross-entropy in float32."""
    hidden, weight, targets, token_weights = (t.to(device) for t in problem(24, 40, 700, dtype, scale=0.3))
    token_weights.fill_(1.0)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    by_definition(*exact, targets, token_weights)[0].backward()
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    linear_cross_entropy(*ours, targets, token_weights, chunk_rows=8, backend=backend)[0].backward()
    theirs = [t.clone().requires_grad_() for t in (hidden, weight)]
    logits = theirs[0] @ theirs[1].t()
    torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").backward()
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert true.grad is not None
        assert mine.grad.dtype == dtype
        our_error = (mine.grad.double() - true.grad).abs()
        their_error = (other.grad.double() - true.grad).abs()
        assert our_error.max() <= 2 * their_error.max()
        assert our_error.mean() <= 2 * their_error.mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits_stay_finite(scale: float, backend: str, device: str) -> None:
    hidden, weight, targets, token_weights = (t.to(device) for t in problem(16, 8, 50, torch.float32, scale=scale))
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss, logprobs, entropy = linear_cross_entropy(*ours, targets, token_weights, backend=backend)
    wanted = by_definition(hidden.double(), weight.double(), targets, token_weights)
    for got, want in zip((loss, logprobs, entropy), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_weights_zero_gives_zero_everywhere(backend: str, device: str) -> None:
    hidden, weight, targets, _ = (t.to(device) for t in problem(10, 4, 9, torch.float32))
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, logprobs, entropy = linear_cross_entropy(
        hidden, weight, targets, torch.zeros(10, device=device), backend=backend
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for value in (loss, logprobs, entropy, hidden.grad, weight.grad):
        assert value.count_nonzero() == 0


def test_no_rows_at_all() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss, logprobs, entropy = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert len(logprobs) == len(entropy) == 0
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_from_run_to_run(backend: str, device: str) -> None:
    runs = []
    for _ in range(2):
        hidden, weight, targets, token_weights = (t.to(device) for t in problem(20, 32, 999, torch.float32))
        hidden.requires_grad_()
        weight.requires_grad_()
        loss, logprobs, entropy = linear_cross_entropy(
            hidden, weight, targets, token_weights, chunk_rows=8, backend=backend
        )
        loss.backward()
        runs.append((loss, logprobs, entropy, hidden.grad, weight.grad))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_weight_gradient_in_fp32_where_grad_dtype_asks() -> None:
    hidden, weight, targets, token_weights = problem(64, 8, 30, torch.bfloat16)
    weight.requires_grad_()
    weight.grad_dtype = torch.float32
    linear_cross_entropy(hidden, weight, targets, token_weights, chunk_rows=16)[0].backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str, device: str) -> None:
    hidden, weight, targets, token_weights = (t.to(device) for t in problem(20, 6, 33, DTYPE[backend]))
    wide = torch.cat([hidden, hidden], dim=1)[:, :6]
    tall = weight.t().contiguous().t()
    results = []
    for h, w in ((wide, tall), (hidden, weight)):
        inputs = [h.requires_grad_(), w.requires_grad_()]
        loss, *rest = linear_cross_entropy(*inputs, targets, token_weights, chunk_rows=8, backend=backend)
        results.append([loss, *rest, *torch.autograd.grad(loss, inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_target_outside_the_vocabulary_never_passes_silently(device: str) -> None:
    hidden, weight, _, _ = (t.to(device) for t in problem(4, 3, 5, torch.float32))
    targets = torch.tensor([0, 5, -1, 2], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, targets, backend="eager")
    loss, logprobs, _ = linear_cross_entropy(hidden, weight, targets, backend="triton")
    assert loss.isnan()
    assert logprobs.isnan().tolist() == [False, True, True, False]


def test_bad_input_is_named() -> None:
    hidden, weight, targets, token_weights = problem(4, 3, 5)
    with pytest.raises(ValueError, match="share D"):
        linear_cross_entropy(hidden, weight.t(), targets)
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="targets must be int64"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="constants"):
        linear_cross_entropy(hidden, weight, targets, token_weights.requires_grad_())
    with pytest.raises(ValueError, match="backend"):
        linear_cross_entropy(hidden, weight, targets, backend="cuda")
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


def test_programs_take_row_after_row(device: str) -> None:
    """More rows than an H200 has multiprocessors, so than there are programs."""
    generator = torch.Generator().manual_seed(5)
    logits, weights = torch.randn(300, 17, generator=generator), torch.rand(300, generator=generator)
    targets = torch.randint(17, (300,), generator=generator)
    results = []
    for row_pass in (_row_pass_eager, _row_pass_triton):
        out = torch.empty(2, 300, device=device)
        grads = row_pass(logits.to(device, copy=True), targets.to(device), weights.to(device), out[0], out[1], True)
        results.append((grads, out))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_scaling_in_place(scale: float, device: str) -> None:
    x = torch.arange(9000, dtype=torch.float32, device=device)
    _scale_kernel[(2,)](x, torch.tensor(scale, device=device), x.numel(), BLOCK=4096)
    assert torch.equal(x.cpu(), torch.arange(9000) * scale)


def test_rows_of_a_chunk() -> None:
    qwen, small = 151_936 * 2, 278 * 2
    assert [chunk_rows_of(rows, qwen, "cuda") for rows in (1, 4096, 4097, 8192, 12_288)] == [
        128,
        4096,
        2176,
        4096,
        4096,
    ]
    assert chunk_rows_of(100_000, small, "cuda") == 100_096  # one chunk
    assert chunk_rows_of(8192, qwen, "cpu") == 441
