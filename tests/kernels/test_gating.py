"""swiglu, both backends, forward and backward, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minem.kernels import swiglu
from tests.kernels.cases import both

BACKENDS = ["eager", "triton"]


def by_definition(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """gate_up and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64)
    return gate_up.to(dtype).to(device), grad.to(dtype).to(device)


def with_gradient(function: object, gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    assert callable(function)
    leaf = gate_up.clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize(("backend", "shape"), both([(3, 5, 66), (2, 4098), (1, 2), (17, 254)]))
def test_equals_the_definition(shape: tuple[int, ...], backend: str, device: str) -> None:
    gate_up, grad = problem(shape, torch.float32, device, scale=10.0)
    got = with_gradient(lambda x: swiglu(x, backend=backend), gate_up, grad)
    want = with_gradient(by_definition, gate_up.double(), grad.double())
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_at_most_twice_pytorchs_own(dtype: torch.dtype, backend: str, device: str) -> None:
    gate_up, grad = problem((16, 100), dtype, device)
    exact = with_gradient(by_definition, gate_up.double(), grad.double())
    ours = with_gradient(lambda x: swiglu(x, backend=backend), gate_up, grad)
    theirs = with_gradient(lambda x: torch.nn.functional.silu(x[..., :50]) * x[..., 50:], gate_up, grad)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        our_error, their_error = (mine.double() - true).abs(), (other.double() - true).abs()
        assert our_error.max() <= 2 * their_error.max()
        assert our_error.mean() <= 2 * their_error.mean()


def test_extreme_and_strided(device: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=device)
    grad = torch.ones(1, 3, device=device)
    out, grads = with_gradient(lambda x: swiglu(x, backend="triton"), gate_up, grad)
    assert out.tolist() == [[0.0, 3e4, 0.0]]
    assert grads.tolist() == [[0.0, 3.0, 2.0, 0.0, 1e4, 0.0]]
    twice = torch.stack([gate_up, gate_up], -1)[..., 0]
    for got, want in zip(with_gradient(lambda x: swiglu(x, backend="triton"), twice, grad), (out, grads), strict=True):
        assert torch.equal(got, want)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="even last dimension"):
        swiglu(torch.ones(2, 3))
