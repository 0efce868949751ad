"""rms_norm, both backends, forward and backward, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minem.kernels import rms_norm
from tests.kernels.cases import both

BACKENDS = ["eager", "triton"]
EPS = 1e-5


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, weight, residual, and the gradients of the two outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape, shape, shape)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes]


def by_definition(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight, total


def run(
    inputs: list[Tensor], with_residual: bool, backend: str | None, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs and gradients (backend None: of the definition, in `dtype`)."""
    x, weight, residual, grad_normed, grad_total = (t.to(dtype or t.dtype) for t in inputs)
    leaves = [t.clone().requires_grad_() for t in ((x, weight, residual) if with_residual else (x, weight))]
    extra = leaves[2] if with_residual else None
    if backend is None:
        outputs = by_definition(leaves[0], leaves[1], extra)
    else:
        outputs = rms_norm(leaves[0], leaves[1], EPS, extra, backend=backend)
    grads = torch.autograd.grad(outputs, leaves, (grad_normed, grad_total))
    return [t.detach() for t in (*outputs, *grads)]


@pytest.mark.parametrize(("backend", "shape"), both([(70, 100), (2, 5000), (1, 7), (3, 5, 64)]))
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_definition(shape: tuple[int, ...], with_residual: bool, backend: str, device: str) -> None:
    inputs = problem(shape, torch.float32, device)
    got, want = run(inputs, with_residual, backend), run(inputs, with_residual, None, torch.float64)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_at_most_twice_pytorchs_own(dtype: torch.dtype, backend: str, device: str) -> None:
    """On a sum that is exact in the dtype, so that what is compared is the norm; PyTorch's own is F.rms_norm."""
    inputs = problem((300, 96), dtype, device)
    inputs[2].zero_()
    exact = run(inputs, True, None, torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    theirs = torch.nn.functional.rms_norm(leaves[0], (96,), leaves[1], EPS)
    their_grads = torch.autograd.grad((theirs, leaves[0] * 1), leaves, inputs[3:])
    ours = run(inputs, True, backend)
    for mine, other, true in zip((ours[0], *ours[2:4]), (theirs, *their_grads), (exact[0], *exact[2:4]), strict=True):
        our_error, their_error = (mine.double() - true).abs(), (other.detach().double() - true).abs()
        assert our_error.max() <= 2 * their_error.max()
        assert our_error.mean() <= 2 * their_error.mean()


@pytest.mark.parametrize("scale", [1e4, 1e-12, 0.0])
def test_extreme_rows(scale: float, device: str) -> None:
    inputs = problem((5, 33), torch.float32, device)
    inputs[0] *= scale
    got, want = run(inputs, False, "triton"), run(inputs, False, None, torch.float64)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


def test_strided_and_bit_equal(device: str) -> None:
    inputs = problem((40, 24), torch.float32, device)
    whole = run(inputs, True, "triton")
    strided = [t if t.ndim == 1 else torch.stack([t, t], -1)[..., 0] for t in inputs]
    for again in (run(inputs, True, "triton"), run(strided, True, "triton")):
        for first, second in zip(whole, again, strict=True):
            assert torch.equal(first, second)


def test_bad_input_is_named(device: str) -> None:
    x = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match="must fit"):
        rms_norm(x, torch.ones(7, device=device), EPS)
    with pytest.raises(ValueError, match="one dtype"):
        rms_norm(x, torch.ones(8, device=device, dtype=torch.bfloat16), EPS)
