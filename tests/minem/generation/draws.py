"""What the tests of generation share: prompts, and comparisons of draws."""

from __future__ import annotations

import pytest
import torch

import minem
from minem import Request, SamplingParams
from minem.generation.engine import Engine, Step
from tests.minem.folders import VOCABULARY

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
POSITION = 2 * 3 * 2 * 16 * 4  # bytes of a position of the cache: keys and values, layers, heads, channels, float32


def prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def assert_same_draws(expected, got) -> None:
    for draws, others in zip(expected, got, strict=True):
        for draw, other in zip(draws, others, strict=True):
            assert draw.token_ids == other.token_ids
            assert draw.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert draw.finish_reason == other.finish_reason


def assert_each_has_its_own_draw(loaded, completions) -> None:
    """Each request's completion is the one that it gets in a plain batch."""
    plain = minem.Generator(*loaded, slots=16)
    again = {Request(c.request.prompt_ids, c.request.params, c.request.seed): c for c in completions}
    for request in again:
        plain.submit(request)
    for expected in plain:
        got = again[expected.request]
        if got.finish_reason == "cancelled":
            assert got.token_ids == expected.token_ids[: len(got.token_ids)]
        else:
            assert (got.token_ids, got.text) == (expected.token_ids, expected.text)
            assert got.finish_reason == expected.finish_reason
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def change(model) -> None:
    """What an M-step does to the weights, in place."""
    noise = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise, device=model.device)


def by_graphs(patch: pytest.MonkeyPatch, generator: minem.Generator, lag: int) -> list[int]:
    """Let a generator on the CPU run as on a GPU: recorded steps of fixed shapes, read `lag` steps late.

    Returns the list of recorded batch sizes, which fills as it runs. What a CUDA graph adds is tested on a GPU.
    """
    recorded = []

    def record(function, pool, stream):
        result = function()
        recorded.append(result.shape[1])
        return lambda: result.copy_(function()), result

    def engine(*arguments):
        made = Engine(*arguments)
        made.graphs = {}
        return made

    patch.setattr(minem.generation.engine, "record", record)
    patch.setattr(minem.generation.engine, "copy_to_host", lambda drawn: Step(drawn.clone(), None))
    patch.setattr(minem.generation.generator, "Engine", engine)
    generator._lag = lag
    return recorded


# -------------------------------------------------------------------------------------------------------------- a GPU
