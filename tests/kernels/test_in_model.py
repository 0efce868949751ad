"""The toolkit on its Triton kernels against the toolkit on the eager references: loss, gradients, and what is drawn.

Each operation picks its backend by the device of its tensors. Here every pick is turned to "triton", so a whole model
trains and decodes through the kernels, in the interpreter where there is no GPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minem
from tests.minem.folders import VOCABULARY, make_folder

OPERATIONS = ("attention", "cross_entropy", "gating", "norm", "rope", "sampling", "step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_folder(path, "qwen3")  # the architecture with norms of queries and keys too
    return path


def on_triton(patch: pytest.MonkeyPatch) -> list[str]:
    """Turn every pick that is left to the device to "triton"; the list holds the operations that picked since."""
    used: list[str] = []
    for name in OPERATIONS:
        module = importlib.import_module(f"minem.kernels.{name}")

        def pick(backend: str | None, tensor: Tensor, name: str = name) -> str:
            used.append(name)
            return backend or "triton"

        patch.setattr(module, "pick", pick)
    return used


def loss_and_gradients(model: Any) -> list[Tensor]:
    ids = torch.randint(VOCABULARY, (30,), generator=torch.Generator().manual_seed(1)).to(model.device)
    rows = torch.tensor([3, 4, 5, 11, 12, 25, 26, 28], device=model.device)
    loss, logprobs, entropy = model(ids, lengths=[9, 5, 16], rows=rows, targets=ids[rows + 1])
    loss.backward()
    return [x.detach().cpu() for x in (loss, logprobs, entropy, *(p.grad for p in model.parameters()))]


def test_training_through_the_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    expected = loss_and_gradients(minem.load(folder)[0])
    used = on_triton(monkeypatch)
    for got, want in zip(loss_and_gradients(minem.load(folder, device=device)[0]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert set(used) == {"cross_entropy", "gating", "norm", "rope"}


def test_decoding_through_the_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    prompts = [[5, 9, 2, 77, 130, 8, 41], [64]]
    params = minem.SamplingParams(n=2, max_new_tokens=3, top_p=0.95, min_new_tokens=2, seed=3)
    expected = minem.Generator(*minem.load(folder), slots=2).generate(prompts, params)
    used = on_triton(monkeypatch)
    drawn = minem.Generator(*minem.load(folder, device=device), slots=2).generate(prompts, params)
    for got, want in zip((c for g in drawn for c in g), (c for g in expected for c in g), strict=True):
        assert got.token_ids == want.token_ids
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert got.proposal_logprobs == pytest.approx(want.proposal_logprobs, abs=1e-4)
    assert set(used) == {"attention", "gating", "norm", "rope", "sampling", "step"}
