"""The gate between generator and trainer: it passes for what is right and stops what is not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import minem
from minem import Request, SamplingParams
from minem.em.packing import Example
from minem.em.scoring import Agreement, agreement, score
from minem.errors import GuardError
from tests.minem.folders import VOCABULARY, make_folder


def draws(folder, dtype, n: int = 20):
    model, tokenizer = minem.load(folder, dtype=dtype)
    generator = minem.Generator(model, tokenizer, slots=8)
    numbers = torch.Generator().manual_seed(1)
    for i in range(n):
        length = int(torch.randint(1, 50, (), generator=numbers))
        ids = torch.randint(2, VOCABULARY, (length,), generator=numbers).tolist()
        generator.submit(Request(ids, SamplingParams(max_new_tokens=40), seed=i))
    return model, list(generator)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.float32)]
)
def test_generator_and_trainer_agree(tmp_path, kind, dtype):
    make_folder(tmp_path, kind)
    model, completions = draws(tmp_path, dtype)
    found = agreement(model, completions, pack_tokens=512)
    assert found.tokens == sum(len(c.token_ids) for c in completions) > 250
    found.require(dtype)
    agreement(model, completions[::-1], pack_tokens=100_000).require(dtype)  # packed in another way


def test_the_estimate_is_that_of_the_definition(tmp_path):
    """Against log-probabilities that are off by a known amount."""
    make_folder(tmp_path, "llama")
    model, completions = draws(tmp_path, torch.float32, n=6)
    shifted = [dataclasses.replace(c, logprobs=[x - 0.01 for x in c.logprobs]) for c in completions]
    found = agreement(model, shifted, pack_tokens=4096)
    assert found.difference == pytest.approx(0.01, abs=1e-5)
    assert found.kl == pytest.approx(math.exp(0.01) - 1 - 0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("found", "dtype", "holds"),
    [
        (Agreement(9, 9e-5, 0.0), torch.float32, True),
        (Agreement(9, 2e-4, 0.0), torch.float32, False),
        (Agreement(9, math.nan, math.nan), torch.float32, False),
        (Agreement(9, 0.3, 0.004), torch.bfloat16, True),
        (Agreement(9, 0.3, 0.006), torch.bfloat16, False),
        (Agreement(9, math.nan, math.nan), torch.bfloat16, False),
    ],
)
def test_the_limits(found, dtype, holds):
    if holds:
        found.require(dtype)
    else:
        with pytest.raises(GuardError, match="disagree on the log-probabilities of 9 drawn tokens"):
            found.require(dtype)


def test_scores_are_those_of_the_logits(tmp_path):
    make_folder(tmp_path, "qwen2")
    model, _ = minem.load(tmp_path)
    examples = [Example(str(i), [5, 6, 7][: i % 3 + 1], [9 + i, 4, 1][: (i + 1) % 3 + 1]) for i in range(7)]
    for example, (logprobs, entropies) in zip(examples, score(model, examples, 11), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt_ids + example.token_ids]))[0].double()
        expected = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        own = expected.gather(1, torch.tensor(example.token_ids)[:, None])[:, 0]
        assert logprobs == pytest.approx(own.tolist(), abs=1e-4)
        assert entropies == pytest.approx((-expected.exp() * expected).sum(-1).tolist(), abs=1e-4)
