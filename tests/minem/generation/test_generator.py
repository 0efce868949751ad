"""The generator against transformers, against exact probabilities, and against itself under every schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

import minem
from minem import Request, SamplingParams
from minem.errors import GuardError, UserError
from minem.generation.engine import Engine
from minem.generation.request import stream_seed
from tests.minem.folders import VOCABULARY, make_folder
from tests.minem.generation.draws import (
    GREEDY,
    assert_each_has_its_own_draw,
    assert_same_draws,
    by_graphs,
    change,
    prompts,
)


@pytest.mark.parametrize("kind", ["llama-llama3", "qwen2-yarn", "qwen3"])  # as many heads, one, and half as many
def test_greedy_tokens_and_logprobs_equal_transformers(tmp_path, kind):
    theirs = make_folder(tmp_path, kind)
    asked = prompts([1, 5, 33])
    ours = minem.Generator(*minem.load(tmp_path), slots=2).generate(asked, GREEDY)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path).double()
    for prompt, (completion,) in zip(asked, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=1
            )
            drawn = out[0, len(prompt) :]
            logprobs = judge(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, drawn[:, None])
        assert completion.token_ids == drawn.tolist()
        assert completion.logprobs == pytest.approx(logprobs[:, 0].tolist(), abs=1e-4)


def test_draws_do_not_depend_on_slots_or_order(loaded):
    asked = prompts([3, 40, 11, 60, 1])
    params = SamplingParams(n=3, max_new_tokens=12, seed=5)
    expected = minem.Generator(*loaded, slots=1).generate(asked, params)
    for slots in (4, 64):
        assert_same_draws(expected, minem.Generator(*loaded, slots=slots).generate(asked, params))
    order = [2, 0, 3, 1, 4]
    shuffled = minem.Generator(*loaded, slots=4).generate([asked[i] for i in order], params)
    assert_same_draws([expected[i] for i in order], shuffled)
    assert len({tuple(c.token_ids) for draws in expected for c in draws}) == 15


def test_in_bfloat16_draws_depend_on_slots_by_rounding_alone(folder):
    """On the CPU, as where it multiplies bfloat16 in hardware: equal draws up to where rounding tips one over."""
    model, tokenizer = minem.load(folder, dtype=torch.bfloat16)
    params = SamplingParams(n=4, temperature=0.9, max_new_tokens=24, seed=3)
    asked = prompts([3, 40, 11, 60, 1, 25, 9, 33])
    one, other = (
        [draw for draws in minem.Generator(model, tokenizer, slots=slots).generate(asked, params) for draw in draws]
        for slots in (3, 64)
    )
    tipped = tokens = 0
    for a, b in zip(one, other, strict=True):
        pairs = zip(a.token_ids, b.token_ids, strict=False)
        common = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))
        tipped, tokens = tipped + (a.token_ids != b.token_ids), tokens + common
        assert a.logprobs[:common] == pytest.approx(b.logprobs[:common], abs=0.05)
    assert tokens > 400
    assert tipped < 0.03 * tokens  # 1 % where the processor multiplies bfloat16, 1.7 % where it is emulated


def test_cancelling_does_not_change_the_others(loaded):
    params = SamplingParams(max_new_tokens=10)
    requests = [Request(p, params, seed=i) for i, p in enumerate(prompts([9, 30, 4, 21, 12, 6]))]
    generator = minem.Generator(*loaded, slots=3)
    for request in requests:
        generator.submit(request)
    finished = [completion for _ in range(4) for completion in generator.step()]
    generator.cancel(requests[1])  # in flight
    generator.cancel(requests[5])  # still waiting
    finished += list(generator)
    assert {c.request for c in finished if c.finish_reason == "cancelled"} == {requests[1], requests[5]}
    assert sorted(len(c.token_ids) for c in finished if c.finish_reason == "cancelled") == [0, 4]
    assert len(finished) == len(requests)
    assert_each_has_its_own_draw(loaded, finished)


def test_a_prompt_listed_twice_gets_further_draws(loaded):
    (prompt,) = prompts([6])
    generator = minem.Generator(*loaded, slots=8)
    together = generator.generate([prompt], SamplingParams(n=4, max_new_tokens=8))[0]
    apart = generator.generate([prompt, prompt], SamplingParams(n=2, max_new_tokens=8))
    assert [c.token_ids for c in together] == [c.token_ids for draws in apart for c in draws]


def test_new_weights_are_used_at_once(folder):
    model, tokenizer = minem.load(folder)
    generator = minem.Generator(model, tokenizer, slots=4)
    asked = prompts([12, 30])
    before = generator.generate(asked, GREEDY)
    change(model)
    after = generator.generate(asked, GREEDY)
    assert_same_draws(minem.Generator(model, tokenizer, slots=4).generate(asked, GREEDY), after)
    assert [c.logprobs for (c,) in after] != [c.logprobs for (c,) in before]


def test_weights_that_are_not_finite_are_no_policy(folder):
    model, tokenizer = minem.load(folder)
    with torch.no_grad():
        model.layers[1].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(GuardError, match="not finite"):
        minem.Generator(model, tokenizer).generate(prompts([5]), GREEDY)


def test_no_completion_is_lost_between_iteration_and_whole_batches(loaded):
    generator = minem.Generator(*loaded, slots=4)
    requests = [Request(ids, SamplingParams(max_new_tokens=3, min_new_tokens=3)) for ids in prompts([5, 6, 7])]
    for request in requests:
        generator.submit(request)
    first = next(iter(generator))  # leaves the loop early, when all three are finished
    later = Request(prompts([4])[0], SamplingParams(max_new_tokens=3))
    generator.submit(later)
    assert len(generator.generate(prompts([5, 6]), GREEDY)) == 2
    assert [first.request, *(completion.request for completion in generator)] == [*requests, later]


def test_frequencies_follow_the_policy(loaded):
    """Two tokens drawn 3,000 times from one prompt: chi-square of the pairs against the exact probabilities."""
    model, tokenizer = loaded
    (prompt,) = prompts([5])
    params = SamplingParams(n=3000, temperature=0.7, top_k=4, max_new_tokens=2, min_new_tokens=2)
    draws = minem.Generator(model, tokenizer, slots=500).generate([prompt], params)[0]

    def proposal(context: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1].double() / 0.7
        logits[list(tokenizer.eos_ids)] = -torch.inf
        return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).softmax(-1)

    counts: dict[tuple[int, ...], int] = {}
    for draw in draws:
        counts[tuple(draw.token_ids)] = counts.get(tuple(draw.token_ids), 0) + 1
    first = proposal(prompt)
    second = {a: proposal([*prompt, a]) for a in first.nonzero().flatten().tolist()}
    exact = {(a, b): float(first[a] * p[b]) for a, p in second.items() for b in p.nonzero().flatten().tolist()}
    assert set(counts) <= set(exact)
    expected = {pair: p * len(draws) for pair, p in exact.items()}
    pooled = [(counts.get(pair, 0), e) for pair, e in expected.items() if e >= 5]
    rest = [(counts.get(pair, 0), e) for pair, e in expected.items() if e < 5]
    pooled += [tuple(map(sum, zip(*rest, strict=True)))] if rest else []
    assert chisquare(*zip(*pooled, strict=True)).pvalue > 1e-3
    for draw in draws[:50]:
        assert sum(draw.proposal_logprobs) == pytest.approx(math.log(exact[tuple(draw.token_ids)]), abs=1e-4)


def test_stopping(loaded):
    model, tokenizer = loaded
    params = SamplingParams(n=2, max_new_tokens=40, temperature=1.5)
    generator = minem.Generator(model, tokenizer, slots=64)
    draws = [c for group in generator.generate(prompts([8] * 32), params) for c in group]
    for completion in draws:
        ended = completion.token_ids[-1] in tokenizer.eos_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & tokenizer.eos_ids
        assert ended or len(completion.token_ids) == 40
        assert len(completion.logprobs) == len(completion.token_ids)
    assert {c.finish_reason for c in draws} == {"stop", "length"}
    assert min(len(c.token_ids) for c in draws) < 20
    late = SamplingParams(n=2, max_new_tokens=21, temperature=1.5, min_new_tokens=20)
    assert min(len(c.token_ids) for group in generator.generate(prompts([8] * 32), late) for c in group) >= 20


def test_stop_texts_cut_the_text(loaded):
    asked = prompts([8])
    (full,) = minem.Generator(*loaded).generate(asked, GREEDY)[0]
    stop = full.text[len(full.text) // 2 :][:3]
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop=(stop, "never there"))
    (cut,) = minem.Generator(*loaded).generate(asked, params)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(full.token_ids)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_gives_each_request_its_own_draw(loaded, data):
    """Random requests, room, cancellations, priorities and releases, eager and by graphs: each completes once."""
    slots, lag = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2))
    shared = prompts(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4)))
    generator = minem.Generator(*loaded, slots=slots)
    requests, finished = [], []
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            by_graphs(patch, generator, lag)
        for i in range(data.draw(st.integers(1, 14))):
            new = data.draw(st.sampled_from([1, 2, 5, 8, 66]))
            params = SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, 1.0, 1.3])),
                top_k=data.draw(st.sampled_from([0, 5])),
                max_new_tokens=new,
                min_new_tokens=data.draw(st.sampled_from([0, min(new, 8)])),
                stop=data.draw(st.sampled_from([(), ("a", "e")])),
            )
            requests.append(Request(data.draw(st.sampled_from(shared)), params, seed=i))
            generator.submit(requests[-1], first=data.draw(st.booleans()))
            finished += [c for _ in range(data.draw(st.integers(0, 3))) for c in generator.step()]
            if data.draw(st.integers(0, 4)) == 0:
                generator.cancel(data.draw(st.sampled_from(requests)))
            if data.draw(st.integers(0, 4)) == 0 and not generator._active:
                generator.release()
        finished += list(generator)
    assert len(finished) == len(requests)
    assert {completion.request for completion in finished} == set(requests)
    assert generator.idle_slots == slots
    assert generator.step() == []
    assert_each_has_its_own_draw(loaded, finished)


def test_text_prompts_are_encoded_with_one_bos(loaded):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer)
    text = "which of these"
    assert tokenizer.encode(text)[0] == 0
    assert_same_draws(generator.generate([text], GREEDY), generator.generate([tokenizer.encode(text)], GREEDY))
    assert generator.generate([], GREEDY) == []


def test_wrong_parameters_are_named():
    wrong = {"n": 0, "temperature": -1.0, "top_p": 0.0, "min_p": 1.5, "top_k": -1, "max_new_tokens": 0, "stop": ("",)}
    for name, value in [*wrong.items(), ("temperature", math.nan), ("min_new_tokens", 300)]:
        with pytest.raises(UserError, match=f"{name} = "):
            SamplingParams(**{name: value})
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_prompts_that_cannot_be_served_are_refused_before_any_is_drawn(loaded):
    generator = minem.Generator(*loaded, slots=2, max_length=40)
    for bad, named in (
        ([[5] * 29], "prompt 2 of 2: a prompt of 29 tokens"),
        ([[]], "empty"),
        ([[VOCABULARY]], "vocabulary"),
        ([[-1]], "vocabulary"),
    ):
        with pytest.raises(UserError, match=named):
            generator.generate([[5, 6], *bad], GREEDY)
        assert generator.idle_slots == 2
    assert len(generator.generate([[5] * 28], GREEDY)[0][0].token_ids) > 0
    for wrong in ({"slots": 0}, {"max_length": 1}, {"max_length": 513}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            minem.Generator(*loaded, **wrong)


def test_stream_seeds_are_stable_and_distinct():
    assert stream_seed(0, 1, "q", 2) == stream_seed(0, 1, "q", 2)
    seeds = {stream_seed(s, i, q, a) for s in range(3) for i in range(3) for q in "ab" for a in range(5)}
    assert len(seeds) == 90
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_free_slots_are_filled_several_at_once(loaded, monkeypatch):
    """Of 64 slots two must be free, or as many as there are requests; and no draw differs for it."""
    admitted = []
    admit = Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda self, s, r: (admitted.append(len(s)), admit(self, s, r))[1])
    requests = [Request(ids, SamplingParams(max_new_tokens=1 + i)) for i, ids in enumerate(prompts([4] * 9))]
    requests += [Request(ids, SamplingParams(max_new_tokens=9)) for ids in prompts([4] * 60)]
    generator = minem.Generator(*loaded, slots=64)
    for request in requests:
        generator.submit(request)
    assert len(list(generator)) == 69
    assert admitted == [64, 2, 2, 1]
