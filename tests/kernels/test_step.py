"""The bookkeeping of a decode step: the Triton kernels against the eager reference, which one case spells out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minem.kernels.step import begin_step, end_step

BACKENDS = ["eager", "triton"]


def tables(device: str, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    ints = torch.randint(0, 40, (8, columns), generator=generator)
    ints[3] = torch.randint(0, 2, (columns,), generator=generator)
    rotation = torch.randn(2, 40, 12, generator=generator).to(dtype)
    return ints.to(device), torch.rand(3, columns, generator=generator).to(device), rotation.to(device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_three_slots(backend: str, device: str) -> None:
    """Slot 4 draws a stop token, slot 0 its last, slot 2 had ended, slot 5 goes on; slots 1 and 3 are not in it."""
    ints, floats, rotation = tables(device, 6)
    slots = torch.tensor([4, 0, 2, 5], device=device)
    ints[2:5, slots] = torch.tensor([[3, 6, 2, 6], [0, 0, 1, 0], [9, 7, 9, 8]], device=device)
    before = ints.clone()
    state, real, turn = begin_step(ints, floats, rotation, slots, backend=backend)
    assert torch.equal(state, before[:, slots])
    assert torch.equal(real, floats[:, slots])
    assert torch.equal(turn, rotation[:, before[1, slots]])
    tokens, logprobs = torch.tensor([31, 5, 6, 7], device=device), torch.tensor([-1.5, -0.1, 0, -3], device=device)
    stops = torch.tensor([30, 31], device=device)
    drawn = end_step(ints, slots, (tokens, logprobs, 2 * logprobs), stops, backend=backend)
    assert torch.equal(drawn, torch.stack([tokens.double(), logprobs.double(), 2 * logprobs.double()]))
    expected = before.clone()
    expected[0, slots] = tokens
    expected[1:3, 5] += 1
    expected[3, slots] = torch.tensor([1, 1, 1, 0], device=device)
    assert torch.equal(ints, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 130])
def test_triton_equals_eager(batch: int, dtype: torch.dtype, device: str) -> None:
    results = []
    for backend in BACKENDS:
        ints, floats, rotation = tables(device, batch + 3, dtype)
        slots = torch.randperm(batch + 3, generator=torch.Generator().manual_seed(1))[:batch].to(device)
        state, real, turn = begin_step(ints, floats, rotation, slots, backend=backend)
        here = slice(max(1, batch - 2))
        draws = (state[5, here], real[0, here], real[1, here])
        drawn = end_step(ints, slots[here], draws, torch.tensor([7], device=device), backend=backend)
        results.append((state, real, turn, drawn, ints))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
