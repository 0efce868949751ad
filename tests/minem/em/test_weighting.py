"""The weights of the objective, against float64 and exact arithmetic; what is trained is the plain prompt."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem.config import MStepSection
from minem.data.tasks import load_task
from minem.em.sample import Sample
from minem.em.weighting import SMALLEST, make_examples, plain_logprobs, weigh
from minem.errors import GuardError
from tests.minem.folders import toy_prompts


def make_sample(id_: str, **changes: Any) -> Sample:
    """An accepted plain draw."""
    made = Sample(id_, 1, 1, "plain", [5, 6], -1.0, -1.0, "text", "A", "A", "accepted", False)
    return replace(made, **changes)


log_ratios = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e4, 1e4)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(log_ratios)
def test_importance_weights_are_a_softmax_of_the_log_ratios_of_each_question(draws):
    samples = [make_sample(id_, logprob_plain=ratio - 7.0, logprob_q=-7.0) for id_, ratio in draws]
    found = weigh(samples, "importance")
    for id_ in {id_ for id_, _ in draws}:
        members = [i for i, (own, _) in enumerate(draws) if own == id_]
        ratios = torch.tensor([ratio - 7.0 + 7.0 for own, ratio in draws if own == id_], dtype=torch.float64)
        assert [found[i] for i in members] == pytest.approx(ratios.softmax(0).clamp(min=SMALLEST).tolist(), rel=1e-12)
    assert all(float(torch.tensor(weight, dtype=torch.float32)) > 0 for weight in found)


def test_the_other_weights_need_nothing_but_ids():
    samples = [make_sample(id_, logprob_plain=None) for id_ in ("a", "b", "a", "a")]
    assert weigh(samples, "equal") == [1.0] * 4
    assert weigh(samples, "question") == [1 / 3, 1.0, 1 / 3, 1 / 3]
    assert weigh([], "importance") == []


@pytest.fixture(scope="module")
def toy():
    """The toy, and two hinted draws of each of eight questions, as an E-step would note them."""
    model, tokenizer = minem.load("toy")
    task = load_task("toy", 8)
    generator = minem.Generator(model, tokenizer, slots=16)
    prompts = [toy_prompts(tokenizer, "justify").drawn(question, hinted=True) for question in task.train]
    drawn = generator.generate(prompts, minem.SamplingParams(n=2, seed=1, max_new_tokens=60))
    samples = [
        make_sample(q.id, prompt="hinted", token_ids=d.token_ids, logprob_q=sum(d.logprobs), logprob_plain=None)
        for q, of_one in zip(task.train, drawn, strict=True)
        for d in of_one
    ]
    return model, tokenizer, task, samples


def test_hinted_draws_are_scored_under_the_plain_prompt(toy):
    """Against one whole sequence through the model, nothing packed, in float64; plain draws keep what they have."""
    model, tokenizer, task, samples = toy
    questions = {question.id: question for question in task.train}
    plain = make_sample(task.train[0].id, logprob_plain=-3.0)
    found = plain_logprobs([plain, *samples], questions, model, toy_prompts(tokenizer), pack_tokens=300)
    assert found[0] == plain
    assert [replace(sample, logprob_plain=None) for sample in found[1:]] == samples
    for sample in found[1:]:
        prompt, ids = toy_prompts(tokenizer).trained(questions[sample.id]), sample.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        assert sample.logprob_plain == pytest.approx(float(logprobs.sum()), abs=2e-4)


def test_the_plain_prompt_is_trained_with_the_ids_as_drawn(toy):
    model, tokenizer, task, samples = toy
    questions = {question.id: question for question in task.train}
    scored = plain_logprobs(samples, questions, model, toy_prompts(tokenizer), pack_tokens=4096)
    examples = make_examples(scored, task, toy_prompts(tokenizer), MStepSection(weights="importance"))
    assert [example.token_ids for example in examples] == [sample.token_ids for sample in samples]
    assert [example.prompt_ids for example in examples] == [
        toy_prompts(tokenizer).trained(questions[sample.id]) for sample in samples
    ]
    assert [example.weight for example in examples] == weigh(scored, "importance")
    assert {round(example.weight, 3) for example in examples} - {0.5, 1.0}  # hinted draws differ from the model's


def test_a_draw_that_cannot_be_scored_stops_with_a_guard(toy):
    _, tokenizer, task, samples = toy
    model, _ = minem.load("toy")
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    with pytest.raises(GuardError, match=f"question '{samples[0].id}': the log-probability"):
        plain_logprobs(
            samples[:1], {question.id: question for question in task.train}, model, toy_prompts(tokenizer), 512
        )
