"""The generator against transformers, against enumeration, and against itself under every schedule."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

import minem
from minem import Request, SamplingParams
from minem.config import MStepSection
from minem.device import out_of_memory
from minem.em.mstep import MStep
from minem.em.packing import Example
from minem.errors import GuardError, UserError
from minem.generation.engine import Engine, _bucket
from minem.generation.request import stream_seed
from tests.minem.folders import VOCABULARY, make_folder

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_folder(path, "qwen3")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return minem.load(folder)


def prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def reference_logprobs(model, prompt: list[int], token_ids: list[int]) -> list[float]:
    """Log-probabilities of the drawn tokens by one forward pass of a transformers model in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-head-dim", "llama-llama3", "qwen2", "qwen2-yarn", "qwen3"]
)
def test_greedy_tokens_and_logprobs_equal_transformers(tmp_path, kind):
    theirs = make_folder(tmp_path, kind)
    model, tokenizer = minem.load(tmp_path)
    asked = prompts([1, 2, 5, 8, 17, 33, 64, 30, 3])
    ours = minem.Generator(model, tokenizer, slots=4).generate(asked, GREEDY)
    for prompt, (completion,) in zip(asked, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=1
            )
        assert completion.token_ids == out[0, len(prompt) :].tolist()
    judge = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt, (completion,) in zip(asked, ours, strict=True):
        expected = reference_logprobs(judge, prompt, completion.token_ids)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_draws_do_not_depend_on_slots_or_order(loaded):
    model, tokenizer = loaded
    asked = prompts([3, 40, 11, 25, 7, 60, 1, 18])
    params = SamplingParams(n=4, max_new_tokens=20, seed=5)
    expected = minem.Generator(model, tokenizer, slots=1).generate(asked, params)
    for slots in (4, 64):
        again = minem.Generator(model, tokenizer, slots=slots).generate(asked, params)
        assert_same_draws(expected, again)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = minem.Generator(model, tokenizer, slots=4).generate([asked[i] for i in order], params)
    assert_same_draws([expected[i] for i in order], shuffled)
    texts = {tuple(c.token_ids) for draws in expected for c in draws}
    assert len(texts) == 32  # and they are not simply all alike


def assert_same_draws(expected, got) -> None:
    for draws, others in zip(expected, got, strict=True):
        for draw, other in zip(draws, others, strict=True):
            assert draw.token_ids == other.token_ids
            assert draw.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert draw.finish_reason == other.finish_reason


def test_cancelling_does_not_change_the_others(loaded):
    model, tokenizer = loaded
    asked = prompts([9, 30, 4, 21, 12, 6])
    params = SamplingParams(max_new_tokens=16)
    requests = [Request(p, params, seed=i) for i, p in enumerate(asked)]
    generator = minem.Generator(model, tokenizer, slots=3)
    for request in requests:
        generator.submit(request)
    finished = []
    for step in itertools.count():
        if step == 4:
            generator.cancel(requests[1])  # in flight
            generator.cancel(requests[5])  # still waiting
        done = generator.step()
        finished += done
        if len(finished) == len(requests):
            break
    alone = minem.Generator(model, tokenizer, slots=1)
    for completion in finished:
        alone.submit(Request(completion.request.prompt_ids, params, completion.request.seed))
        (expected,) = list(alone)
        if completion.request in (requests[1], requests[5]):
            assert completion.finish_reason == "cancelled"
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected.token_ids
            assert completion.finish_reason == expected.finish_reason
    assert sorted(len(c.token_ids) for c in finished if c.finish_reason == "cancelled") == [0, 4]


def test_a_prompt_listed_twice_gets_further_draws(loaded):
    model, tokenizer = loaded
    (prompt,) = prompts([6])
    generator = minem.Generator(model, tokenizer, slots=8)
    together = generator.generate([prompt], SamplingParams(n=4, max_new_tokens=8))[0]
    apart = generator.generate([prompt, prompt], SamplingParams(n=2, max_new_tokens=8))
    assert [c.token_ids for c in together] == [c.token_ids for draws in apart for c in draws]


def test_new_weights_are_used_at_once(folder):
    model, tokenizer = minem.load(folder)
    generator = minem.Generator(model, tokenizer, slots=4)
    asked = prompts([12, 30])
    before = generator.generate(asked, GREEDY)
    examples = [Example(str(i), p, p[::-1]) for i, p in enumerate(prompts([20] * 8))]
    MStep(model, MStepSection(lr=0.03, batch_size=4)).run(examples, seed=0, iteration=1)
    after = generator.generate(asked, GREEDY)
    fresh = minem.Generator(model, tokenizer, slots=4).generate(asked, GREEDY)
    assert_same_draws(fresh, after)
    assert [c.logprobs for (c,) in after] != [c.logprobs for (c,) in before]


def test_weights_that_are_not_finite_are_no_policy(folder):
    model, tokenizer = minem.load(folder)
    with torch.no_grad():
        model.layers[1].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(GuardError, match="not finite"):
        minem.Generator(model, tokenizer).generate(prompts([5]), GREEDY)


def test_requests_that_were_waiting_are_not_lost_to_a_whole_batch(loaded):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer, slots=2)
    earlier = Request(prompts([4])[0], SamplingParams(max_new_tokens=3))
    generator.submit(earlier)
    assert len(generator.generate(prompts([5, 6]), GREEDY)) == 2
    assert [completion.request for completion in generator] == [earlier]


def test_who_leaves_the_loop_early_finds_the_rest_later(loaded):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer, slots=4)
    requests = [Request(ids, SamplingParams(max_new_tokens=3, min_new_tokens=3)) for ids in prompts([5, 6, 7])]
    for request in requests:
        generator.submit(request)
    first = next(iter(generator))
    assert [first.request, *(completion.request for completion in generator)] == requests


def test_a_batch_that_is_interrupted_leaves_nothing_behind_but_what_was_there(loaded, monkeypatch):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer, slots=3)
    expected = generator.generate(prompts([5, 6]), GREEDY)
    earlier = [Request(ids, SamplingParams(max_new_tokens=n)) for ids, n in zip(prompts([4, 9]), (2, 30), strict=True)]
    for request in earlier:
        generator.submit(request)
    with monkeypatch.context() as patch:
        failing(patch, "start", {9: 1})
        with pytest.raises(KeyboardInterrupt):
            generator.generate(prompts([12, 3]), SamplingParams(n=3, max_new_tokens=40, min_new_tokens=40))
    assert generator.idle_slots == 2  # the longer of the earlier two is to be drawn
    assert_same_draws(expected, generator.generate(prompts([5, 6]), GREEDY))
    assert [completion.request for completion in generator] == earlier


def test_frequencies_follow_the_policy(loaded):
    """Two tokens drawn 6,000 times from one prompt: chi-square of the pairs against the exact probabilities."""
    model, tokenizer = loaded
    (prompt,) = prompts([5])
    params = SamplingParams(n=6000, temperature=0.7, top_k=4, max_new_tokens=2, min_new_tokens=2)
    draws = minem.Generator(model, tokenizer, slots=256).generate([prompt], params)[0]

    def proposal(context: list[int], masked: bool) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1].double() / 0.7
        if masked:
            logits[list(tokenizer.eos_ids)] = -torch.inf
        return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).softmax(-1)

    counts: dict[tuple[int, ...], int] = {}
    for draw in draws:
        counts[tuple(draw.token_ids)] = counts.get(tuple(draw.token_ids), 0) + 1
    expected = {}
    first = proposal(prompt, masked=True)
    for a in first.nonzero().flatten().tolist():
        second = proposal([*prompt, a], masked=True)
        for b in second.nonzero().flatten().tolist():
            expected[a, b] = float(first[a] * second[b]) * len(draws)
    assert set(counts) <= set(expected)
    pooled = [(counts.get(pair, 0), e) for pair, e in expected.items() if e >= 5]
    rest = [(counts.get(pair, 0), e) for pair, e in expected.items() if e < 5]
    if rest:
        pooled.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    assert chisquare(*zip(*pooled, strict=True)).pvalue > 1e-3
    for draw in draws[:50]:
        a, b = draw.token_ids
        exact = math.log(first[a] * proposal([*prompt, a], masked=True)[b])
        assert sum(draw.proposal_logprobs) == pytest.approx(exact, abs=1e-4)


def test_stopping(loaded):
    model, tokenizer = loaded
    asked = prompts([8] * 40)
    params = SamplingParams(max_new_tokens=60, temperature=1.5)
    draws = [c for (c,) in minem.Generator(model, tokenizer, slots=16).generate(asked, params)]
    for completion in draws:
        ended = completion.token_ids[-1] in tokenizer.eos_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & tokenizer.eos_ids
        assert ended or len(completion.token_ids) == 60
        assert len(completion.logprobs) == len(completion.token_ids)
    assert {c.finish_reason for c in draws} == {"stop", "length"}
    late = minem.Generator(model, tokenizer, slots=16).generate(
        asked, SamplingParams(max_new_tokens=60, temperature=1.5, min_new_tokens=30)
    )
    assert min(len(c.token_ids) for (c,) in late) >= 30


def test_stop_texts_cut_the_text(loaded):
    model, tokenizer = loaded
    asked = prompts([8])
    (whole,) = minem.Generator(model, tokenizer).generate(asked, GREEDY)[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    params = SamplingParams(temperature=0.0, max_new_tokens=24, stop=(stop, "never there"))
    (cut,) = minem.Generator(model, tokenizer).generate(asked, params)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_each_request_its_own_draw(loaded, data):
    """Random submissions, cancellations and priorities: each request completes once, with the draw it has alone."""
    model, tokenizer = loaded
    slots = data.draw(st.integers(1, 6))
    shared = prompts(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    generator = minem.Generator(model, tokenizer, slots=slots)
    open_requests: list[Request] = []
    finished = {}
    for i in range(data.draw(st.integers(1, 12))):
        params = SamplingParams(max_new_tokens=data.draw(st.integers(1, 8)))
        request = Request(data.draw(st.sampled_from(shared)), params, seed=i)
        generator.submit(request, first=data.draw(st.booleans()))
        open_requests.append(request)
        for _ in range(data.draw(st.integers(0, 3))):
            finished.update({c.request: c for c in generator.step()})
        if data.draw(st.integers(0, 4)) == 0:
            generator.cancel(data.draw(st.sampled_from(open_requests)))
    for completion in generator:
        assert completion.request not in finished
        finished[completion.request] = completion
    assert set(finished) == set(open_requests)
    alone = minem.Generator(model, tokenizer, slots=1)
    for request, completion in finished.items():
        alone.submit(Request(request.prompt_ids, request.params, request.seed))
        (expected,) = list(alone)
        if completion.finish_reason == "cancelled":
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected.token_ids
    assert generator.idle_slots == slots


def test_text_prompts_are_encoded_with_one_bos(loaded):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer)
    text = "which of these"
    assert tokenizer.encode(text)[0] == 0
    assert_same_draws(generator.generate([text], GREEDY), generator.generate([tokenizer.encode(text)], GREEDY))
    assert generator.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"n": 0}, "n = 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 300}, "min_new_tokens"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_wrong_parameters_are_named(params, named):
    with pytest.raises(UserError, match=named):
        SamplingParams(**params)


def test_prompts_that_cannot_be_served_are_refused_before_any_is_drawn(loaded):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer, slots=2, max_length=40)
    for bad, named in (
        ([[5] * 17], "prompt 2 of 2: a prompt of 17 tokens"),
        ([[]], "empty"),
        ([[VOCABULARY]], "vocabulary"),
        ([[-1]], "vocabulary"),
    ):
        with pytest.raises(UserError, match=named):
            generator.generate([[5, 6], *bad], GREEDY)
        assert generator.idle_slots == 2
    assert len(generator.generate([[5] * 16], GREEDY)[0][0].token_ids) > 0
    for wrong in ({"slots": 0}, {"max_length": 1}, {"max_length": 513}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            minem.Generator(model, tokenizer, **wrong)


def test_stream_seeds_are_stable_and_distinct():
    assert stream_seed(0, 1, "q", 2) == stream_seed(0, 1, "q", 2)
    seeds = {stream_seed(s, i, q, a) for s in range(3) for i in range(3) for q in "ab" for a in range(5)}
    assert len(seeds) == 90
    assert all(0 <= seed < 2**63 for seed in seeds)


def by_graphs(monkeypatch, generator: minem.Generator, lag: int) -> list[int]:
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

    monkeypatch.setattr(minem.generation.engine, "record", record)
    monkeypatch.setattr(minem.generation.generator, "Engine", engine)
    generator._lag = lag
    return recorded


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_recorded_steps_that_are_read_late_draw_the_same(loaded, monkeypatch, lag):
    model, tokenizer = loaded
    asked = prompts([3, 40, 11, 25, 7, 60, 1, 18])
    params = SamplingParams(n=5, max_new_tokens=20, seed=5, temperature=1.3, min_new_tokens=2)
    expected = minem.Generator(model, tokenizer, slots=13).generate(asked, params)
    generator = minem.Generator(model, tokenizer, slots=13)
    recorded = by_graphs(monkeypatch, generator, lag)
    assert_same_draws(expected, generator.generate(asked, params))
    assert len({c.finish_reason for draws in expected for c in draws}) == 2
    assert len(recorded) == len(set(recorded)) > 1  # each batch size once
    assert_same_draws(expected, generator.generate(asked, params))
    assert len(recorded) == len(set(recorded))


def test_graphs_that_are_captured_anew_share_a_new_pool(loaded, monkeypatch):
    """CUDA lets no capture use a pool whose graphs are all gone; a stream is one engine's, and so is its workspace."""
    model, tokenizer = loaded
    used = []

    def record(function, pool, stream):
        used.append((pool, stream))
        return function, function()

    def engine(*arguments):
        made = Engine(*arguments)
        made.graphs, made._stream = {}, object()
        made._drop_graphs()
        return made

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(minem.generation.engine, "record", record)
    monkeypatch.setattr(minem.generation.generator, "Engine", engine)
    generator = minem.Generator(model, tokenizer, slots=2)
    growing = [SamplingParams(max_new_tokens=new, min_new_tokens=new) for new in (2, 3, 70)]
    for params in growing:
        generator.generate(prompts([5, 6]), params)
    generator.release()
    generator.generate(prompts([5, 6]), growing[0])
    pools, streams = (list(dict.fromkeys(x)) for x in zip(*used, strict=True))
    assert [used[0], used[-1]] == [(pools[0], streams[0]), (pools[2], streams[1])]
    assert (len(used), len(pools), len(streams)) == (3, 3, 2)


def test_prompts_of_one_token_have_nothing_to_attend_to(loaded, monkeypatch):
    """Attention over no positions at all is not for every GPU kernel."""
    model, tokenizer = loaded
    seen = []

    class Recorded(minem.model.decoder.PackedAttention):
        def __init__(self, lengths, device):
            seen.append(list(lengths))
            super().__init__(lengths, device)

    monkeypatch.setattr(minem.generation.kv_cache, "PackedAttention", Recorded)
    got = minem.Generator(model, tokenizer).generate([[5], [6], [7, 8, 9]], GREEDY)
    assert_same_draws(minem.Generator(model, tokenizer, slots=1).generate([[5], [6], [7, 8, 9]], GREEDY), got)
    assert all(min(lengths) > 0 for lengths in seen)


def test_free_slots_are_filled_several_at_once(loaded, monkeypatch):
    """Of 64 slots two must be free, or as many as there are requests; and no draw differs for it."""
    model, tokenizer = loaded
    admitted = []
    admit = Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda self, s, r: (admitted.append(len(s)), admit(self, s, r))[1])
    params = [SamplingParams(max_new_tokens=1 + i) for i in range(67)]
    requests = [Request(ids, p, seed=i) for i, (ids, p) in enumerate(zip(prompts([4] * 67), params, strict=True))]
    generator = minem.Generator(model, tokenizer, slots=64)
    for request in requests:
        generator.submit(request)
    assert len(list(generator)) == 67
    assert admitted[0] == 64
    assert min(admitted[1:-1], default=2) >= 2
    assert sum(admitted) == 67


def test_graphs_come_in_few_sizes_that_fit():
    for slots in (1, 13, 64, 256, 1000):
        sizes = [_bucket(n, slots) for n in range(1, slots + 1)]
        assert all(n <= size <= slots for n, size in enumerate(sizes, start=1))
        assert all(size <= 1.25 * n + 8 for n, size in enumerate(sizes, start=1))
        assert len(set(sizes)) <= 30


def test_crowded_prompts_draw_the_same(loaded):
    """Many draws of one prompt beside single ones of others, where a group for each prompt would be mostly empty."""
    model, tokenizer = loaded
    asked = prompts([20, *range(3, 18)])
    generator = minem.Generator(model, tokenizer, slots=48)
    requests = [Request(asked[0], SamplingParams(max_new_tokens=9), seed=i) for i in range(33)]
    requests += [Request(ids, SamplingParams(max_new_tokens=9), seed=i) for i, ids in enumerate(asked[1:])]
    for request in requests:
        generator.submit(request)
    for completion in generator:
        alone = minem.Generator(model, tokenizer, slots=1)
        alone.submit(Request(completion.request.prompt_ids, completion.request.params, completion.request.seed))
        assert completion.token_ids == next(iter(alone)).token_ids


# ------------------------------------------------------------------------------------------------------------ memory


def test_fewer_slots_where_memory_is_short(loaded, monkeypatch):
    model, tokenizer = loaded
    asked = prompts([30, 12, 9, 21])
    params = SamplingParams(n=4, max_new_tokens=20)
    expected = minem.Generator(model, tokenizer, slots=16).generate(asked, params)
    position = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes
    monkeypatch.setattr(minem.generation.generator, "free_memory", lambda device: 6 * 128 * position)
    notes: list[str] = []
    generator = minem.Generator(model, tokenizer, slots=16, on_note=notes.append)
    assert_same_draws(expected, generator.generate(asked, params))
    assert generator.slots == 4  # with the spare one five of the six that would fit: 85 % may be taken
    assert len(notes) == 1
    assert "taking 4 slots" in notes[0]
    plan = minem.Generator(model, tokenizer, slots=16).reserve(31, 20)
    assert plan.startswith("4 slots of 64 + 64 positions")


def test_what_can_never_fit_is_refused_at_once(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(minem.generation.generator, "free_memory", lambda device: 200_000)
    generator = minem.Generator(model, tokenizer, slots=16)
    with pytest.raises(UserError, match=r"a prompt of 300 tokens and max_new_tokens = 24 need .* lower max_new_tokens"):
        generator.submit(Request(prompts([300])[0], GREEDY))
    assert generator.generate(prompts([20]), GREEDY)


@pytest.mark.parametrize("lag", [0, 1])
def test_room_that_cannot_be_made_while_all_slots_are_busy(loaded, monkeypatch, lag):
    """The cache is made anew with fewer slots, and what was in flight begins anew in them."""
    model, tokenizer = loaded
    first = [Request(ids, SamplingParams(max_new_tokens=9), seed=i) for i, ids in enumerate(prompts([9] * 6))]
    longer = Request(prompts([70])[0], SamplingParams(max_new_tokens=9), seed=7)
    generator = minem.Generator(model, tokenizer, slots=6)
    by_graphs(monkeypatch, generator, lag)
    for request in first:
        generator.submit(request)
    generator.step()
    position = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes
    monkeypatch.setattr(minem.generation.generator, "free_memory", lambda device: 4 * (128 + 64) * position)
    generator.submit(longer)
    drawn = {completion.request: completion for completion in generator}
    assert generator.slots == 1
    monkeypatch.undo()
    for request in (*first, longer):
        alone = minem.Generator(model, tokenizer, slots=1)
        alone.submit(Request(request.prompt_ids, request.params, request.seed))
        assert drawn[request].token_ids == next(iter(alone)).token_ids


def test_the_old_cache_is_gone_before_the_new_one_is_planned(loaded, monkeypatch):
    model, tokenizer = loaded
    generator = minem.Generator(model, tokenizer, slots=6)
    generator.generate(prompts([9]), GREEDY)
    old, there = weakref.ref(generator._engine.cache), []
    position = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes

    def free_memory(device):
        there.append(old() is not None)
        return 6 * (128 + 64) * position

    monkeypatch.setattr(minem.generation.generator, "free_memory", free_memory)
    generator.generate(prompts([70]), GREEDY)
    assert there[0]
    assert not there[-1]


def test_memory_runs_out_in_many_words():
    for words in ("CUDA out of memory. Tried", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert out_of_memory(RuntimeError(words))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(KeyboardInterrupt())


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("fails_in", ["prefill", "start", "grow"])
def test_running_out_of_memory_loses_nothing(loaded, monkeypatch, fails_in, lag):
    """Memory runs out in the middle of the work: fewer slots, the same draws, each of them once."""
    model, tokenizer = loaded
    asked = prompts([3, 40, 11, 25, 7, 60, 1, 18])
    params = SamplingParams(n=3, max_new_tokens=20, seed=5)
    late = SamplingParams(n=3, max_new_tokens=90, seed=6)
    plain = minem.Generator(model, tokenizer, slots=8)
    expected = [plain.generate(asked, p) for p in (params, late)]
    generator = minem.Generator(model, tokenizer, slots=8)
    generator._lag = lag
    calls = 0
    whole = getattr(Engine, fails_in)

    def fails(self, *arguments):
        nonlocal calls
        calls += 1
        if calls in (1, 4) or (fails_in == "start" and calls == 11):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return whole(self, *arguments)

    monkeypatch.setattr(Engine, fails_in, fails)
    notes: list[str] = []
    generator.on_note = notes.append
    assert_same_draws(expected[0], generator.generate(asked, params))
    for i, ids in enumerate(asked):  # something in flight when the room has to grow
        generator.submit(Request(ids, params, seed=i))
    first = generator.step()
    assert_same_draws(expected[1], generator.generate(asked, late))
    left = [*first, *generator]
    assert len(left) == len(asked)
    assert generator.slots < 8
    assert all("memory ran out" in note for note in notes)


def test_other_errors_are_not_taken_for_want_of_memory(loaded, monkeypatch):
    model, tokenizer = loaded

    def fails(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(Engine, "start", fails)
    with pytest.raises(RuntimeError, match="something else"):
        minem.Generator(model, tokenizer, slots=2).generate(prompts([5, 6]), GREEDY)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_whatever_fails(loaded, data):
    """Random work, memory that shrinks and grows, failures anywhere: each request completes once, as it does alone."""
    model, tokenizer = loaded
    slots, lag = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2))
    faults = data.draw(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 12), st.integers(0, 2)), max_size=4))
    shared = prompts(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4)))
    generator = minem.Generator(model, tokenizer, slots=slots)
    open_requests: list[Request] = []
    finished: dict[Request, minem.Completion] = {}
    limit = math.inf

    def step() -> None:
        try:
            done = generator.step()
        except (ArithmeticError, KeyboardInterrupt, UserError):
            return
        for completion in done:
            assert completion.request not in finished
            finished[completion.request] = completion

    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            by_graphs(patch, generator, lag)
        generator._lag = lag
        for part in PARTS:
            failing(patch, part, {call: kind for name, call, kind in faults if name == part})
        patch.setattr(minem.generation.generator, "free_memory", lambda device: limit)
        for i in range(data.draw(st.integers(1, 14))):
            new = data.draw(st.sampled_from([1, 2, 5, 70]))
            least = data.draw(st.sampled_from([0, 0, new]))
            params = SamplingParams(
                temperature=data.draw(st.sampled_from([0.0, 1.0, 1.3])),
                top_k=data.draw(st.sampled_from([0, 5])),
                max_new_tokens=new,
                min_new_tokens=least,
                stop=data.draw(st.sampled_from([(), ("a", "e")])),
            )
            request = Request(data.draw(st.sampled_from(shared)), params, seed=i)
            generator.submit(request, first=data.draw(st.booleans()))
            open_requests.append(request)
            limit = data.draw(st.sampled_from([math.inf, 4e5, 2e6]))
            for _ in range(data.draw(st.integers(0, 3))):
                step()
            if data.draw(st.integers(0, 4)) == 0:
                generator.cancel(data.draw(st.sampled_from(open_requests)))
            if data.draw(st.integers(0, 4)) == 0 and not generator._active:
                generator.release()
        for _ in range(2000):
            step()
            if len(finished) == len(open_requests):
                break
    assert set(finished) == set(open_requests)
    assert generator.step() == []
    alone = minem.Generator(model, tokenizer, slots=1)
    for request, completion in finished.items():
        alone.submit(Request(request.prompt_ids, request.params, request.seed))
        (expected,) = list(alone)
        if completion.finish_reason == "cancelled":
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
            assert completion.finish_reason == expected.finish_reason
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


PARTS = ("prefill", "admit", "start", "grow", "_decode", "_capture")


def failing(patch: pytest.MonkeyPatch, part: str, faults: dict[int, int]) -> None:
    """Let the n-th call of a part of the engine fail: 0 for want of memory, 1 interrupted, 2 when all is done."""
    whole, calls = getattr(Engine, part), itertools.count(1)

    def fails(self, *arguments):
        kind = faults.get(next(calls))
        if kind == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        if kind == 1:
            raise KeyboardInterrupt
        result = whole(self, *arguments)
        if kind == 2:
            raise ArithmeticError
        return result

    patch.setattr(Engine, part, fails)


def test_a_single_slot_that_runs_out_of_memory_says_so(loaded, monkeypatch):
    model, tokenizer = loaded

    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "start", fails)
    with pytest.raises(UserError, match="out of memory with one sequence at a time"):
        minem.Generator(model, tokenizer, slots=2).generate(prompts([5, 6]), GREEDY)


def test_released_memory_is_taken_again(loaded):
    model, tokenizer = loaded
    asked = prompts([9, 30])
    generator = minem.Generator(model, tokenizer, slots=4)
    assert generator.release() == 0
    expected = generator.generate(asked, GREEDY)
    assert generator.release() == 5 * (64 + 64) * 2 * 3 * 2 * 16 * 4
    assert generator.release() == 0
    assert_same_draws(expected, generator.generate(asked, GREEDY))
    generator.submit(Request(asked[0], GREEDY))
    generator.step()
    with pytest.raises(RuntimeError, match="in flight"):
        generator.release()


def test_a_soak_leaks_nothing(loaded):
    """5,000 requests of mixed length with stops, cancellations and refills; memory stays where it was half-way."""
    model, tokenizer = loaded
    random = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    shared = prompts([number(1, 60) for _ in range(40)])
    generator = minem.Generator(model, tokenizer, slots=32)
    stop = tokenizer.decode([40, 41])[:1]
    open_, finished, sizes, resident = [], 0, set(), []
    reasons: dict[str, int] = {}
    submitted = 0
    while submitted < 5000 or open_:
        while submitted < 5000 and len(open_) < 40:
            stops = (stop,) if submitted % 7 == 0 else ()
            new = 63 if submitted < 32 else number(1, 24)
            request = Request(shared[number(0, 40)], SamplingParams(max_new_tokens=new, stop=stops), seed=submitted)
            generator.submit(request, first=submitted % 5 == 0)
            open_.append(request)
            submitted += 1
        if number(0, 8) == 0:
            generator.cancel(open_[number(0, len(open_))])
        for completion in generator.step():
            open_.remove(completion.request)
            finished += 1
            reasons[completion.finish_reason] = reasons.get(completion.finish_reason, 0) + 1
            if finished % 500 == 0:
                sizes.add(generator._engine.cache.bytes)
                resident.append(anonymous_memory())
    assert finished == 5000
    assert reasons.keys() == {"stop", "length", "cancelled"}
    assert min(reasons.values()) > 100
    assert generator.idle_slots == 32
    assert not generator._active
    assert not generator._running
    assert len(generator._rows) <= 32
    assert len(sizes) == 1
    assert max(resident[5:]) - resident[4] < 16 << 20
    assert_same_draws(
        minem.Generator(model, tokenizer).generate(shared[:4], GREEDY), generator.generate(shared[:4], GREEDY)
    )


def anonymous_memory() -> int:
    """Bytes of this process's own memory that are in use."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


# -------------------------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
def test_graphs_eager_and_the_cpu_agree(folder):
    """Greedy tokens in float32: one graph for each batch size, the same steps without graphs, and the CPU."""
    asked = prompts([3, 40, 11, 25, 7, 60, 1, 18, 33])
    params = SamplingParams(n=3, temperature=0.0, max_new_tokens=40)
    expected = minem.Generator(*minem.load(folder)).generate(asked, params)
    for graphs in (True, False):
        model, tokenizer = minem.load(folder, device="cuda")
        generator = minem.Generator(model, tokenizer, slots=16)
        generator.reserve(61, 40)
        if not graphs:
            generator._engine.graphs = None
        got = generator.generate(asked, params)
        for draws, others in zip(expected, got, strict=True):
            for draw, other in zip(draws, others, strict=True):
                assert draw.token_ids == other.token_ids
                assert draw.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        drawn = generator.generate(asked, SamplingParams(n=3, max_new_tokens=40, seed=1))
        assert_same_draws(drawn, generator.generate(asked, SamplingParams(n=3, max_new_tokens=40, seed=1)))


@pytest.mark.gpu
def test_graphs_stay_valid_when_the_model_is_trained(folder):
    model, tokenizer = minem.load(folder, device="cuda", dtype=torch.bfloat16)
    generator = minem.Generator(model, tokenizer, slots=4)
    asked = prompts([12, 30])
    generator.generate(asked, GREEDY)
    before = dict(generator._engine.graphs)
    examples = [Example(str(i), p, p[::-1]) for i, p in enumerate(prompts([20] * 8))]
    MStep(model, MStepSection(lr=0.03, batch_size=4)).run(examples, seed=0, iteration=1)
    after = generator.generate(asked, GREEDY)
    assert before.items() <= generator._engine.graphs.items()
    assert_same_draws(minem.Generator(model, tokenizer, slots=4).generate(asked, GREEDY), after)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_outlive_those_of_other_generators_and_are_captured_anew_for_more_room(folder, dtype):
    model, tokenizer = minem.load(folder, device="cuda", dtype=dtype)
    asked = prompts([12, 30, 1])
    first, second = (minem.Generator(model, tokenizer, slots=4) for _ in range(2))
    expected = first.generate(asked, GREEDY)
    assert_same_draws(expected, second.generate(asked, GREEDY))
    second.release()
    assert_same_draws(expected, first.generate(asked, GREEDY))
    longer = SamplingParams(max_new_tokens=80, min_new_tokens=80, seed=2)
    drawn = first.generate(prompts([90, 7]), longer)  # both segments grow
    assert_same_draws(expected, first.generate(asked, GREEDY))
    assert_same_draws(drawn, second.generate(prompts([90, 7]), longer))
