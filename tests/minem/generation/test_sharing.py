"""Prompts that begin alike: what is copied of them, and that nothing but rounding shows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem import Request, SamplingParams
from minem.generation.engine import Engine
from minem.generation.sharing import SHARED, waves
from minem.model.decoder import PackedAttention
from tests.minem.folders import make_folder
from tests.minem.generation.draws import GREEDY, assert_same_draws, by_graphs, change, prompts

# Two kinds of prompts with examples of their own after one system prompt, as plain and hinted ones, and two others.
SYSTEM, PLAIN, HINTED, OTHER, *OWN = prompts([50, 100, 140, 70, 12, 30, 1, 21, 40, 5], seed=9)
FIRST = [*SYSTEM, *PLAIN, *OWN[0]]
MIXED = [
    FIRST,
    [*SYSTEM, *HINTED, *OWN[3]],
    OTHER,
    [*SYSTEM, *PLAIN, *OWN[1]],
    [*SYSTEM, *PLAIN, *OWN[2]],
    [7],
    [*SYSTEM, *HINTED, *OWN[4]],
    [*SYSTEM, *HINTED, *OWN[5]],
]
# Tokens that go through the model for MIXED at once: none for the last token of a prompt, and SYSTEM once.
COMPUTED = 50 + (100 + 11) + (140 + 20) + 69 + 29 + 0 + 0 + 39 + 4


class Recorded(PackedAttention):
    """The attention of training, which keeps the keys and values that it sees."""

    def __init__(self, length):
        super().__init__([length], "cpu")
        self.seen = []

    def packed(self, q, k, v):
        self.seen.append((k, v))
        return super().packed(q, k, v)


@pytest.mark.parametrize("kind", ["llama", "llama-head-dim", "llama-llama3", "llama-linear", "qwen2-yarn", "qwen3"])
@torch.no_grad()
def test_keys_and_values_are_those_of_a_whole_forward_pass(tmp_path, monkeypatch, kind):
    """In float64, for grouped heads, norms and scaled positions: at once, and with one that is there already."""
    monkeypatch.setattr(minem.generation.engine, "PREFILL_TOKENS", 200)  # several packs, some of several prompts
    make_folder(tmp_path, kind)
    model = minem.load(tmp_path)[0].double()
    rows = {tuple(prompt): (5 * i + 2) % 9 for i, prompt in enumerate(MIXED)}
    together, later = (Engine(model, [1], 9, 260, 4) for _ in range(2))
    assert together.prefill(rows, rows) == COMPUTED
    first = tuple(FIRST)
    assert later.prefill({first}, {first: rows[first]}) + later.prefill(rows.keys() - {first}, rows) == COMPUTED
    for prompt, row in rows.items():
        n = len(prompt) - 1
        attend = Recorded(n + 1)
        model.hidden(torch.tensor(prompt), model.rotation(torch.arange(n + 1)), attend)
        for cache in (together.cache, later.cache):
            assert cache.prefix_lengths[row] == n
            for layer, (k, v) in enumerate(attend.seen):
                for cached, expected in ((cache.prefix_k, k), (cache.prefix_v, v)):
                    got = cached[layer, row, :, :n].transpose(0, 1)
                    torch.testing.assert_close(got, expected[:n], rtol=1e-9, atol=1e-9)


def test_draws_are_those_of_each_prompt_alone(loaded, monkeypatch):
    params = SamplingParams(n=2, max_new_tokens=5, seed=2, temperature=1.2)
    alone = minem.Generator(*loaded, slots=1)
    expected = alone.generate(MIXED, params)
    assert alone.prefill_tokens == 2 * sum(len(prompt) - 1 for prompt in MIXED)
    generator = minem.Generator(*loaded, slots=16)
    assert_same_draws(expected, generator.generate(MIXED, params))
    assert generator.prefill_tokens == COMPUTED
    assert_same_draws(expected[::-1], minem.Generator(*loaded, slots=3).generate(MIXED[::-1], params))
    late = minem.Generator(*loaded, slots=5)
    by_graphs(monkeypatch, late, 1)
    assert_same_draws(expected, late.generate(MIXED, params))


@pytest.mark.parametrize("length", [64, 65, 129, 193])
def test_one_prompt_alone_that_fills_the_cache(loaded, length):
    prompt = [2 + i % 200 for i in range(length)]
    params = SamplingParams(n=3, max_new_tokens=6, seed=1)
    expected = minem.Generator(*loaded, slots=8).generate([prompt, prompt[:40]], params)[:1]
    assert_same_draws(expected, minem.Generator(*loaded, slots=8).generate([prompt], params))


def test_a_prompt_that_comes_later_continues_from_one_in_flight(loaded):
    generator = minem.Generator(*loaded, slots=4)
    generator.submit(Request(FIRST, SamplingParams(max_new_tokens=9, min_new_tokens=9)))
    generator.step()
    before = generator.prefill_tokens
    late = Request(MIXED[3], GREEDY, seed=1)
    generator.submit(late)
    (drawn,) = [completion for completion in generator if completion.request is late]
    assert generator.prefill_tokens - before == 29
    assert_same_draws(minem.Generator(*loaded, slots=1).generate([MIXED[3]], GREEDY), [[drawn]])


def test_nothing_is_shared_with_prompts_of_older_weights(folder):
    model, tokenizer = minem.load(folder)
    generator = minem.Generator(model, tokenizer, slots=8)
    generator.generate(MIXED[:4], GREEDY)
    change(model)
    before = generator.prefill_tokens
    after = generator.generate(MIXED[3:], GREEDY)
    fresh = minem.Generator(model, tokenizer, slots=8)
    assert_same_draws(fresh.generate(MIXED[3:], GREEDY), after)
    assert generator.prefill_tokens - before == fresh.prefill_tokens


def test_the_same_requests_share_the_same_tokens_to_the_bit(loaded):
    """A block of an E-step that is drawn again after an interruption gives the same bytes."""
    params = SamplingParams(max_new_tokens=4, seed=4)
    used = minem.Generator(*loaded, slots=5)
    used.generate(MIXED[4:], params)
    again = used.generate(MIXED, params)
    for draws, others in zip(minem.Generator(*loaded, slots=5).generate(MIXED, params), again, strict=True):
        assert [(c.token_ids, c.logprobs) for c in draws] == [(c.token_ids, c.logprobs) for c in others]


BRANCHES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 2, 31, 32, 33, 64, 70])), max_size=9)


def grown(branches) -> list[tuple[int, ...]]:
    """Each prompt begins as an earlier one, at a random length, and goes on with tokens that no other has."""
    found: list[tuple[int, ...]] = [(3,)]
    for number, (place, length) in enumerate(branches):
        begun = found[place % len(found)]
        found.append(begun[: 1 + 7 * place % len(begun)] + tuple(100 * number + i for i in range(4, 4 + length)))
    return list(dict.fromkeys(found))


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens before the last of either are the same."""
    same = [a == b for a, b in zip(one[:-1], other[:-1], strict=False)]
    return [*same, False].index(False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(BRANCHES, st.integers(0, 5))
def test_each_prompt_continues_from_the_one_that_is_most_alike_up_to_a_block(branches, cached):
    asked = grown(branches)
    done, order = asked[:cached], {prompt: place for place, prompt in enumerate(asked)}
    parts = waves(asked, set(asked[cached:]))
    assert sorted(part.prompt for wave in parts for part in wave) == sorted(asked[cached:])
    for wave in parts:
        assert wave
        for prompt, source, start in wave:
            best = max((alike(prompt, other) for other in asked[: order[prompt]]), default=0)
            assert start >= best // SHARED * SHARED
            if source != prompt:
                assert source in done
                assert start == alike(prompt, source) >= SHARED
            else:
                assert start == 0
        done += [part.prompt for part in wave]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(BRANCHES, st.integers(2, 9))
def test_any_prompts_get_the_draws_that_they_get_alone(loaded, branches, slots):
    asked = [[token % 300 + 2 for token in prompt] for prompt in grown(branches) if len(prompt) < 400]
    params = SamplingParams(max_new_tokens=2, seed=1)
    expected = minem.Generator(*loaded, slots=1).generate(asked, params)
    assert_same_draws(expected, minem.Generator(*loaded, slots=slots).generate(asked, params))
