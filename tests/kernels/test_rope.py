"""rotary, both backends, against complex multiplication in float64: norms, rotation and cache write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minem.kernels import rotary
from minem.kernels.rope import CacheWrite
from tests.kernels.cases import both

BACKENDS = ["eager", "triton"]
EPS = 1e-6


def problem(n: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    angle = torch.rand(n, channels // 2, generator=generator, dtype=torch.float64) * 100
    values = {
        "qkv": torch.randn(n, heads + 2 * kv_heads, channels, generator=generator, dtype=torch.float64),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "q_norm": torch.randn(channels, generator=generator, dtype=torch.float64),
        "k_norm": torch.randn(channels, generator=generator, dtype=torch.float64),
    }
    return {name: value.to(dtype).to(device) for name, value in values.items()}


def by_definition(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels i and i + C/2 are the real and imaginary part of a number that is multiplied by cos + i sin."""
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.double().split((heads, kv_heads, kv_heads), dim=1)

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
        first, second = x.chunk(2, dim=-1)
        product = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat((product.real, product.imag), dim=-1)

    return turned(q, q_norm), turned(k, k_norm), v


@pytest.mark.parametrize(("backend", "sizes"), both([(5, 4, 2, 16), (4, 14, 2, 24), (1, 1, 1, 2), (3, 6, 6, 128)]))
@pytest.mark.parametrize("with_norm", [False, True])
def test_equals_the_definition(sizes: tuple[int, int, int, int], with_norm: bool, backend: str, device: str) -> None:
    arguments: dict[str, Any] = problem(*sizes, torch.float32, device)
    if not with_norm:
        del arguments["q_norm"], arguments["k_norm"]
    got = rotary(**arguments, heads=sizes[1], eps=EPS, backend=backend)
    for mine, other in zip(got, by_definition(**arguments, heads=sizes[1]), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_error_at_most_twice_pytorchs_own(dtype: torch.dtype, device: str) -> None:
    arguments = problem(16, 6, 2, 32, dtype, device)
    exact = by_definition(**arguments, heads=6)
    ours, theirs = (rotary(**arguments, heads=6, eps=EPS, backend=backend) for backend in ("triton", "eager"))
    for mine, other, true in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        our_error, their_error = (mine.double() - true).abs(), (other.double() - true).abs()
        assert our_error.max() <= 2 * their_error.max()
        assert our_error.mean() <= 2 * their_error.mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_reach_their_places_in_the_cache_and_nothing_else_does(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    arguments: dict[str, Any] = problem(4, 6, 2, 16, dtype, device)
    layers = torch.full((2, 2, 5, 2, 9, 16), 7.0, dtype=dtype, device=device)  # two of two layers, as the cache has
    rows, positions = (torch.tensor(x, device=device) for x in ([3, 0, 3, 1], [8, 0, 2, 5]))
    write = CacheWrite(layers[0, 1], layers[1, 1], rows, positions)
    arguments["qkv"] = torch.cat([arguments["qkv"]] * 2, dim=2)[:, :, :16]  # not contiguous
    _, k, v = rotary(**arguments, heads=6, eps=EPS, cache=write, backend=backend)
    expected = torch.full_like(layers, 7.0)
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        expected[0, 1, row, :, position] = k[token]
        expected[1, 1, row, :, position] = v[token]
    assert torch.equal(layers, expected)
    assert torch.equal(v, arguments["qkv"][:, 8:])


@pytest.mark.parametrize("with_norm", [False, True])
def test_gradients(with_norm: bool, device: str) -> None:
    """Eager by finite differences in float64; Triton's equal the eager ones."""
    arguments: dict[str, Any] = problem(2, 2, 1, 4, torch.float64, "cpu")
    if not with_norm:
        del arguments["q_norm"], arguments["k_norm"]
    names = arguments.keys() - {"cos", "sin"}
    for name in names:
        arguments[name].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: rotary(**arguments | dict(zip(names, x, strict=True)), heads=2, eps=EPS),
        [arguments[name] for name in names],
    )
    arguments = {name: x.detach().float().to(device) for name, x in arguments.items()}
    gradients = []
    for backend in BACKENDS:
        inputs = [arguments[name].clone().requires_grad_() for name in names]
        q, k, v = rotary(**arguments | dict(zip(names, inputs, strict=True)), heads=2, eps=EPS, backend=backend)
        gradients.append(torch.autograd.grad((q**2).sum() + (k**3).sum() + (v**2).sum(), inputs))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named() -> None:
    arguments: dict[str, Any] = problem(2, 2, 1, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"H \+ 2 K"):
        rotary(**arguments, heads=3)
    with pytest.raises(ValueError, match="cos and sin"):
        rotary(**arguments | {"cos": torch.ones(2, 4)}, heads=2)
    with pytest.raises(ValueError, match="both or neither"):
        rotary(**arguments | {"k_norm": None}, heads=2)
