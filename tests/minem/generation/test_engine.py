"""The engine and the memory of the generator: recorded steps, groups, slots that fit, out of memory, CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minem
from minem import Request, SamplingParams
from minem.device import out_of_memory
from minem.errors import Interrupted, UserError
from minem.generation.engine import Engine, _bucket, record
from minem.generation.kv_cache import Decode, Groups, KVCache, PackedAttention
from minem.kernels import attention
from tests.minem.generation.draws import (
    GREEDY,
    POSITION,
    assert_each_has_its_own_draw,
    assert_same_draws,
    by_graphs,
    change,
    prompts,
)


@pytest.mark.parametrize("lag", [1, 2])
def test_recorded_steps_that_are_read_late_draw_the_same(loaded, monkeypatch, lag):
    asked = prompts([3, 40, 11, 60, 1])
    params = SamplingParams(n=4, max_new_tokens=20, seed=5, temperature=1.5, min_new_tokens=2)
    expected = minem.Generator(*loaded, slots=13).generate(asked, params)
    generator = minem.Generator(*loaded, slots=13)
    recorded = by_graphs(monkeypatch, generator, lag)
    assert_same_draws(expected, generator.generate(asked, params))
    assert_same_draws(expected, generator.generate(asked, params))
    assert len(recorded) == len(set(recorded)) > 1  # each batch size once


def test_prompts_of_one_token_have_nothing_to_attend_to(loaded, monkeypatch):
    """Attention over no positions at all is not for every GPU kernel."""
    seen = []

    def recorded(lengths, device, starts):
        seen.extend(lengths)
        return PackedAttention(lengths, device, starts)

    monkeypatch.setattr(minem.generation.kv_cache, "PackedAttention", recorded)
    got = minem.Generator(*loaded).generate([[5], [6], [7, 8, 9]], GREEDY)
    assert_same_draws(minem.Generator(*loaded, slots=1).generate([[5], [6], [7, 8, 9]], GREEDY), got)
    assert min(seen) > 0


def test_graphs_come_in_few_sizes_that_fit():
    for slots in (1, 13, 64, 256, 1000):
        sizes = [_bucket(n, slots) for n in range(1, slots + 1)]
        assert all(n <= size <= slots for n, size in enumerate(sizes, start=1))
        assert all(size <= 1.25 * n + 8 for n, size in enumerate(sizes, start=1))
        assert len(set(sizes)) <= 30


def test_nearly_all_programs_of_the_attention_have_work(monkeypatch):
    """Qwen2.5-3B's heads, 256 sequences, eight of each prompt, 256 + 256 positions in use of 512 + 1,024; and 250."""
    monkeypatch.setattr(attention, "pick", lambda backend, tensor: "triton")
    heads = SimpleNamespace(num_attention_heads=16, num_key_value_heads=2, head_dim=128, num_hidden_layers=1)
    cache = KVCache(heads, 256, 512, 1024, torch.device("cpu"), torch.bfloat16)
    cache.prefix_lengths[:32] = 256
    for used in (256, 250):
        groups = Groups.fixed(cache, 256, list(range(used)), [slot // 8 for slot in range(used)])
        drawn = torch.full((256,), 255).masked_fill_(groups.slots == 256, 0)
        work = Decode(cache, groups, drawn, (cache.prefix, cache.suffix), (0, 0)).work
        assert work.number == used // 2 + 256  # of two siblings each, then of one sequence
        programs = attention.programs(work, 2)
        assert sum(program < 2 * work.number for program in range(programs)) >= 0.85 * programs
        pieces = work.pieces[: work.number]
        assert pieces[:, 3].sub(pieces[:, 2]).sum() == 256 * (used // 2 + used) + 256 - used
        assert work.parts[:used].eq(torch.tensor([1, 2])).all()
        assert work.parts[used:].eq(torch.tensor([0, 1])).all()


def test_crowded_prompts_draw_the_same(loaded):
    """Many draws of one prompt beside single ones of others: a group for each prompt would be mostly empty."""
    asked = prompts([20, *range(3, 11)])
    requests = [Request(asked[0], SamplingParams(max_new_tokens=6), seed=i) for i in range(25)]
    requests += [Request(ids, SamplingParams(max_new_tokens=6), seed=i) for i, ids in enumerate(asked[1:])]
    generator = minem.Generator(*loaded, slots=48)
    for request in requests:
        generator.submit(request)
    assert_each_has_its_own_draw(loaded, generator)


def test_fewer_slots_where_memory_is_short(loaded, monkeypatch):
    asked = prompts([30, 12, 9, 21])
    params = SamplingParams(n=2, max_new_tokens=12)
    expected = minem.Generator(*loaded, slots=16).generate(asked, params)
    monkeypatch.setattr(minem.generation.generator, "free_memory", lambda device: 6 * 128 * POSITION)
    notes: list[str] = []
    generator = minem.Generator(*loaded, slots=16, on_note=notes.append)
    assert_same_draws(expected, generator.generate(asked, params))
    assert generator.slots == 4  # with the padding slot five of the six that would fit: 85 % may be taken
    assert len(notes) == 1
    assert "taking 4 slot" in notes[0]
    assert minem.Generator(*loaded, slots=16).reserve(31, 20).startswith("4 slots of 64 + 64 positions")


def test_what_can_never_fit_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(minem.generation.generator, "free_memory", lambda device: 200_000)
    generator = minem.Generator(*loaded, slots=16)
    with pytest.raises(UserError, match=r"prompts of 300 and completions of 12 tokens need .* lower max_new_tokens"):
        generator.generate(prompts([300]), GREEDY)
    assert generator.generate(prompts([20]), GREEDY)


def test_a_request_that_needs_more_room_waits_until_the_cache_can_be_made_again(loaded, monkeypatch):
    generator = minem.Generator(*loaded, slots=6)
    first = [Request(ids, SamplingParams(max_new_tokens=6), seed=i) for i, ids in enumerate(prompts([9] * 6))]
    for request in first:
        generator.submit(request)
    finished = generator.step()
    old, there = weakref.ref(generator._engine.cache), []

    def free_memory(device):
        there.append(old() is not None)
        return 4 * (128 + 64) * POSITION

    monkeypatch.setattr(minem.generation.generator, "free_memory", free_memory)
    longer = Request(prompts([70])[0], SamplingParams(max_new_tokens=6), seed=7)
    generator.submit(longer)
    finished += list(generator)
    assert there == [False]  # the old cache is gone before the new one is planned
    assert generator.slots == 1
    assert finished[-1].request is longer
    assert len(finished) == 7
    assert_each_has_its_own_draw(loaded, finished)


def test_memory_runs_out_in_many_words():
    for words in ("CUDA out of memory. Tried", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert out_of_memory(RuntimeError(words))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(KeyboardInterrupt())


@pytest.mark.parametrize("part", ["prefill", "start"])
def test_an_exception_drops_all_requests_and_the_generator_can_be_used_again(loaded, monkeypatch, part):
    """Out of memory is exit code 3 and names the keys to lower; everything else is raised as it is."""
    asked = prompts([5, 6])
    expected = minem.Generator(*loaded, slots=1).generate(asked, GREEDY)
    generator = minem.Generator(*loaded, slots=1)
    whole = getattr(Engine, part)
    for error, seen in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), Interrupted),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        calls = itertools.count()

        def fails(self, *arguments, calls=calls, error=error):
            if next(calls) == 1:
                raise error
            return whole(self, *arguments)

        generator.submit(Request(prompts([9])[0], SamplingParams(max_new_tokens=2)))
        with monkeypatch.context() as patch:
            patch.setattr(Engine, part, fails)
            with pytest.raises(seen) as caught:
                generator.generate(asked, GREEDY)
        if seen is Interrupted:
            assert caught.value.exit_code == 3
            assert "lower run.slots" in str(caught.value)
            assert "lower sampler.max_new_tokens" in str(caught.value)
        assert generator.idle_slots == 1
        assert generator.step() == []
        assert_same_draws(expected, generator.generate(asked, GREEDY))


def test_a_capture_that_runs_out_of_memory_says_so_and_leaves_no_graph(loaded, monkeypatch):
    """Such a capture may fail to end as well, in words that are not about memory."""

    class Capture:
        def __enter__(self):
            self.entered = True

        def __exit__(self, *raised):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    calls = itertools.count()

    def function():
        if next(calls) == 1:  # not the first time, which warms up
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.zeros(1)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (
        ("current_stream", lambda: stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("CUDAGraph", SimpleNamespace),
        ("graph", lambda graph, pool, stream: Capture()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        record(function, None, stream)
    assert out_of_memory(caught.value)
    generator = minem.Generator(*loaded, slots=2)
    engine = generator._make_room()
    engine.graphs, engine._pool, engine._stream = {}, None, stream
    monkeypatch.setattr(Engine, "_decode", lambda *_: function())
    calls = itertools.count()
    with pytest.raises(Interrupted, match="out of memory while drawing in 2 slots"):
        generator.generate(prompts([5]), GREEDY)
    assert engine.graphs == {}


def test_released_memory_is_taken_again(loaded):
    asked = prompts([9, 30])
    generator = minem.Generator(*loaded, slots=4)
    expected = generator.generate(asked, GREEDY)
    assert generator._engine.cache.bytes == 5 * (64 + 64) * POSITION
    generator.release()
    assert generator._engine is None
    assert_same_draws(expected, generator.generate(asked, GREEDY))
    generator.submit(Request(asked[0], GREEDY))
    generator.step()
    with pytest.raises(AssertionError, match="in flight"):
        generator.release()


@pytest.mark.slow
def test_a_soak_leaks_nothing(loaded):
    """5,000 requests of mixed length with stops, cancellations and refills: memory stays where it was half-way.

    No quick test runs for long enough to show a leak.
    """
    model, tokenizer = loaded
    random = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    shared = prompts([number(1, 60) for _ in range(40)])
    generator = minem.Generator(model, tokenizer, slots=32)
    stop = tokenizer.decode([40, 41])[:1]
    open_, resident, reasons, submitted = [], [], [], 0
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
            reasons.append(completion.finish_reason)
            if len(reasons) % 500 == 0:
                resident.append(anonymous_memory())
    assert len(reasons) == 5000
    assert min(reasons.count(reason) for reason in ("stop", "length", "cancelled")) > 100
    assert generator.idle_slots == 32
    assert len(generator._rows) <= 32
    assert max(resident[5:]) - resident[4] < 16 << 20


def anonymous_memory() -> int:
    """Bytes of this process's own memory that are in use."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.gpu
def test_graphs_eager_and_the_cpu_agree(folder):
    """Greedy tokens in float32: one graph for each batch size, the same steps without graphs, and the CPU."""
    asked = prompts([3, 40, 11, 25, 7, 60, 1, 18, 33])
    params = SamplingParams(n=3, temperature=0.0, max_new_tokens=40)
    expected = minem.Generator(*minem.load(folder)).generate(asked, params)
    for graphs in (True, False):
        generator = minem.Generator(*minem.load(folder, device="cuda"), slots=16)
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
    change(model)
    after = generator.generate(asked, GREEDY)
    assert before.items() <= generator._engine.graphs.items()
    assert_same_draws(minem.Generator(model, tokenizer, slots=4).generate(asked, GREEDY), after)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_outlive_those_of_other_generators_and_are_captured_again_for_more_room(folder, dtype):
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
