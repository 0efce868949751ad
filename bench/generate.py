"""The generator beside its floor and beside transformers: decoding, draws of a few prompts, prefill, whole E-steps.

    python bench/generate.py                                 # on the CPU: a small model, minutes on two cores
    python bench/generate.py --json                          # the same as one line of JSON, the last
    python bench/generate.py --shape qwen2.5-3b --json       # on a GPU: the shapes of real models, in bfloat16

Weights are random, and no token ends a draw, so each draw has a given length. The floor is the least time on hardware
as fast as measured here: a step reads all weights but the embedding once, or multiplies by them, if that takes longer,
and reads the keys and values of every sequence. The E-step is `rsm` with a budget of 8: the verdict on a draw is a
seeded coin, its length is log-normal with a mean of 300 tokens, at most 1,024 (shorter on the CPU), and prompts are as
long as ARC-Challenge's in Qwen2.5's tokens.

transformers runs at its best: with its static cache (compiled on a GPU), left padding, num_return_sequences for many
draws of a prompt, and on a GPU continuous batching. It has no lazy attempts: in an E-step it draws all 8. minem also
returns each token's log-probability, which transformers does not compute here. Contestants take turns; the first run of
each is a warm-up; the tables show medians.
"""

from __future__ import annotations

import gc
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import click
import numpy as np
import rich.table
import torch
from models import LAYERS, SMALL, random_model, random_peer, their_continuous_draws, their_draws
from record import ceilings, facts
from resources import SHAPES, Shape
from rich.console import Console

from minem.config import SamplerSection
from minem.data.prompts import Prompts, load_prompts
from minem.data.tasks import Question
from minem.device import release_cached_memory
from minem.em.estep import EStep
from minem.em.samplers import make_sampler
from minem.generation.generator import Generator
from minem.generation.kv_cache import cache_bytes
from minem.generation.request import Completion, Request, SamplingParams
from minem.model.decoder import Model

BUDGET = 8
ACCEPTANCE = 0.5  # of the E-step's draws
# Tokens of ARC-Challenge's 1,119 training prompts as minem asks them, through Qwen2.5's template: 21 quantiles.
ARC = (81, 87, 91, 94, 97, 101, 104, 106, 109, 111, 115, 117, 120, 123, 127, 130, 135, 140, 146, 163, 241)

Row = dict[str, Any]
Draw = Callable[[list[list[int]], int, int], int]  # (prompts, draws of each, new tokens) -> tokens drawn


@dataclass(frozen=True)
class Setting:
    """The sizes that depend on the device."""

    batches: tuple[int, ...]  # of decoding
    context: int  # tokens that a decoded sequence sees on average
    steps: int  # that are timed
    questions: int  # of the whole E-step
    mean: int  # tokens of its answers
    longest: int
    repeats: int
    beside: int  # questions of the E-step that transformers does, too


ON_GPU = Setting((1, 32, 256), 512, 128, 1119, 300, 1024, 1, 32)
ON_CPU = Setting((1, 32, 256), 128, 32, 1119, 32, 128, 5, 0)  # the E-step on 24 prompts is its comparison


@dataclass(frozen=True)
class Bench:
    """The models of one shape, and the measured limits of this machine."""

    shape: Shape
    model: Model
    theirs: Any  # transformers' model, or None
    bandwidth: float  # bytes/s
    rate: float  # operations/s

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step_floor(self, batch: int, context: float) -> float:
        """The least seconds of a step for `batch` sequences of `context` tokens."""
        config = self.model.config
        weights = self.parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
        matrices = max(weights * self.model.dtype.itemsize / self.bandwidth, 2 * batch * weights / self.rate)
        return matrices + batch * context * self.position_bytes() / self.bandwidth

    def position_bytes(self) -> float:
        return cache_bytes(self.model.config, self.model.dtype, 0, 64, 0) / 128  # both segments take a block of 64

    def peers(self) -> dict[str, Draw]:
        """transformers' best ways to draw."""
        if self.theirs is None:
            return {}
        ways: dict[str, Draw] = {
            "transformers, static cache": partial(their_draws, self.theirs, cache_implementation="static")
        }
        if torch.cuda.is_available():  # on a CPU it finds no memory to plan with
            ways["transformers, continuous batching"] = partial(their_continuous_draws, self.theirs)
        return ways


class Words:
    """A tokenizer that names tokens by number, and turns questions into prompts as long as ARC's."""

    chat_template = ""
    control_tokens = re.compile("(?!)")
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def chat(self, messages: list[dict[str, str]], more: Any = None) -> list[int]:
        numbers = random.Random(messages[0]["content"])
        length = np.interp(numbers.random() * (len(ARC) - 1), range(len(ARC)), ARC)
        return [numbers.randrange(self.vocabulary) for _ in range(round(float(length)))]


class Forced:
    """A generator whose draws have lengths of their own, by their seeds, and count as finished."""

    def __init__(self, generator: Generator, length: Callable[[random.Random], int]):
        self.generator, self.length, self.tokenizer = generator, length, generator.tokenizer
        self.asked: dict[int, Request] = {}
        self.lengths: list[tuple[int, int]] = []  # of prompt and answer

    def submit(self, request: Request, first: bool = False) -> None:
        params = SamplingParams(max_new_tokens=self.length(random.Random(request.seed)))
        forced = self.asked[id(request)] = Request(request.prompt_ids, params, request.seed, tag=request)
        self.generator.submit(forced, first=first)

    def cancel(self, request: Request) -> None:
        self.generator.cancel(self.asked[id(request)])

    def step(self) -> list[Completion]:
        return [self.finished(completion) for completion in self.generator.step()]

    def finished(self, completion: Completion) -> Completion:
        asked = completion.request.tag
        if completion.finish_reason == "cancelled":
            return replace(completion, request=asked)
        self.lengths.append((len(asked.prompt_ids), len(completion.token_ids)))
        return replace(completion, finish_reason="stop", request=asked)

    def __iter__(self) -> Iterator[Completion]:
        return map(self.finished, self.generator)

    def __getattr__(self, name: str) -> Any:  # idle_slots, prefill_tokens
        return getattr(self.generator, name)


# ---------------------------------------------------------------------------------------------------------- the works


def random_prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(vocabulary) for _ in range(n)] for n in lengths]


def decode_rows(bench: Bench, on: Setting) -> Iterator[Row]:
    """Steady decoding of distinct prompts: seconds of a step, beside its floor."""
    for batch in on.batches:
        new = on.steps + 16
        prompts = random_prompts([on.context - new // 2] * batch, bench.shape.vocabulary)
        generator = Generator(bench.model, Words(bench.shape.vocabulary), slots=batch)
        for prompt in prompts:
            generator.submit(Request(prompt, SamplingParams(max_new_tokens=new)))

        def steps(count: int, generator: Generator = generator) -> None:
            for _ in range(count):
                generator.step()

        steps(8)  # prefill, and the capture of the graph
        seconds: dict[str, Any] = {"minem": timed(partial(steps, on.steps)) / on.steps}
        list(generator)

        def their_step(draw: Draw, prompts: list[list[int]] = prompts) -> float:
            draw(prompts, 1, 8 + on.steps)  # a warm-up, as long as the longer one: caches are made for a length
            short, long = (timed(partial(draw, prompts, 1, n)) for n in (8, 8 + on.steps))
            return (long - short) / on.steps

        seconds |= {name: attempt(partial(their_step, draw)) for name, draw in bench.peers().items()}
        floor = bench.step_floor(batch, on.context)
        about = {"floor_s": floor, "bytes": floor * bench.bandwidth, "operations": 2 * batch * bench.parameters}
        yield {"work": f"decode B={batch}", "tokens": batch, **about, "seconds": seconds}
        empty()


def draw_rows(bench: Bench, on: Setting) -> Iterator[Row]:
    """24 prompts of 40 to 200 tokens, 4 draws each, 48 new tokens; and the E-step on them."""
    prompts = random_prompts([40 + 160 * i // 23 for i in range(24)], bench.shape.vocabulary)

    class Given(Words):  # these prompts, asked as questions
        def chat(self, messages: list[dict[str, str]], more: Any = None) -> list[int]:
            (number,) = re.findall(r"Question (\d+)\?", messages[-1]["content"])
            return prompts[int(number)]

    words, theirs = Given(bench.shape.vocabulary), bench.theirs
    drawn: list[int] = []

    def ours() -> int:  # a new generator each time: prompts that are still cached would be a head start
        draws = Generator(bench.model, words).generate(prompts, SamplingParams(n=4, max_new_tokens=48))
        return sum(len(completion.token_ids) for group in draws for completion in group)

    def lazily() -> int:
        drawn.append(e_step(Generator(bench.model, words), 24, lambda coin: 48)[0])
        return drawn[-1]

    contestants: dict[str, Callable[[], int]] = {"minem": ours}
    if theirs is not None:
        contestants["transformers"] = lambda: their_draws(theirs, prompts, 4, 48)
    contestants |= {name: partial(draw, prompts, 4, 48) for name, draw in bench.peers().items()}
    tokens = 24 * 4 * 48
    yield {"work": "24 prompts x 4 draws x 48", "tokens": tokens, "seconds": take_turns(contestants, on, tokens)}
    contestants = {"minem": lazily}
    if theirs is not None:
        contestants["transformers, all 8"] = lambda: their_draws(theirs, prompts, BUDGET, 48)
    seconds = take_turns(contestants, on)
    yield {"work": "E-step on these, budget 8", "tokens": None, "seconds": seconds, "drawn": drawn[-1]}


def shared_rows(bench: Bench, on: Setting) -> Iterator[Row]:
    """The first token of 64 prompts that share 300 tokens, such as worked examples, and of as long ones that do not."""
    own = [60 + 60 * i // 63 for i in range(64)]
    head, *tails = random_prompts([300, *own], bench.shape.vocabulary)
    alike, apart = [head + tail for tail in tails], random_prompts([300 + n for n in own], bench.shape.vocabulary)

    def first_tokens(prompts: list[list[int]]) -> int:
        generator = Generator(bench.model, Words(bench.shape.vocabulary), slots=64)
        return len(generator.generate(prompts, SamplingParams(max_new_tokens=1)))

    contestants = {"minem": partial(first_tokens, alike), "nothing shared": partial(first_tokens, apart)}
    yield {"work": "prefill of 64 x 360-420, 300 shared", "tokens": 64, "seconds": take_turns(contestants, on)}


def e_step(generator: Generator, count: int, length: Callable[[random.Random], int]) -> tuple[int, Forced]:
    """rsm over `count` questions; returns all tokens drawn, cancelled ones too, and the generator that drew them."""
    questions = [Question(f"q{i}", f"Question {i}?", ("one", "two"), ("A", "B"), "A") for i in range(count)]
    forced = Forced(generator, length)
    step = EStep(
        sampler=make_sampler("rsm", BUDGET, "first"),
        section=SamplerSection(budget=BUDGET, max_new_tokens=1024),
        generators={"plain": forced, "hinted": forced},
        prompts=Prompts(generator.tokenizer, load_prompts("default")),
        verdict=lambda text, question: "A" if random.Random(text).random() < ACCEPTANCE else "B",
        seed=0,
    )
    step.begin(2)  # only the first iteration of a run is compared with the trainer
    parts = step.blocks(count)
    blocks = [questions[count * i // parts : count * (i + 1) // parts] for i in range(parts)]
    return sum(int(step.run(block)[1]["tokens"]) for block in blocks), forced


def whole_e_step(bench: Bench, on: Setting) -> Row:
    """An E-step over `on.questions` questions, and the least that any scheduler would need for the same draws."""

    def length(coin: random.Random) -> int:
        return min(on.longest, max(1, int(coin.lognormvariate(math.log(on.mean) - 0.6**2 / 2, 0.6))))

    generator = Generator(bench.model, Words(bench.shape.vocabulary))
    generator.reserve(max(ARC), on.longest)
    e_step(generator, 2 * generator.slots, lambda coin: 8)  # compiles kernels, captures graphs
    before, start = generator.prefill_tokens, time.perf_counter()
    tokens, forced = e_step(generator, on.questions, length)
    seconds = time.perf_counter() - start
    answers, slots = [answer for _, answer in forced.lengths], generator.slots
    steps = max(sum(answers) / slots, max(answers))
    seen = sum(prompt * answer + answer**2 / 2 for prompt, answer in forced.lengths)
    floor = steps * bench.step_floor(slots, 0) + seen * bench.position_bytes() / bench.bandwidth
    prefilled = generator.prefill_tokens - before
    floor += 2 * bench.parameters * prefilled / bench.rate
    return {
        "work": f"E-step, {on.questions} questions, acceptance {ACCEPTANCE}",
        "tokens": tokens,
        "attempts": len(answers),
        "prefill_tokens": prefilled,
        "slots": slots,
        "floor_s": floor,
        "seconds": {"minem": seconds},
    }


def e_step_rows(bench: Bench, on: Setting) -> Iterator[Row]:
    """The whole E-step; then one small enough for transformers, which draws all 8 of each question in one batch."""
    yield whole_e_step(bench, on)
    if bench.theirs is None or not on.beside:
        return
    row = whole_e_step(bench, replace(on, questions=on.beside))
    words = Words(bench.shape.vocabulary)
    prompts = [words.chat([{"role": "user", "content": f"{i}"}]) for i in range(on.beside)]
    all_8 = partial(their_draws, bench.theirs, prompts, BUDGET, on.longest)
    row["seconds"]["transformers, all 8"] = attempt(lambda: timed(all_8))
    yield row


# ---------------------------------------------------------------------------------------------------------- measuring


def empty() -> None:
    gc.collect()
    release_cached_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def failed(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def attempt(work: Callable[[], float]) -> float | str:
    """What the work measures, or why it failed: a contestant that cannot run must not end the run of the others."""
    try:
        return work()
    except Exception as error:
        return failed(error)


def take_turns(contestants: dict[str, Callable[[], int]], on: Setting, expected: int | None = None) -> dict[str, Any]:
    """Median seconds of each, or why it failed. They take turns, so that a busy machine slows them alike."""

    def seconds(run: Callable[[], int]) -> float:
        tokens: list[int] = []
        taken = timed(lambda: tokens.append(run()))
        if expected not in (None, *tokens):
            raise RuntimeError(f"drew {tokens[0]} tokens instead of {expected}")
        return taken

    times: dict[str, list[Any]] = {name: [] for name in contestants}
    for _ in range(on.repeats + 1):
        for name, run in contestants.items():
            if name == "minem":
                times[name].append(seconds(run))
            elif not times[name] or not isinstance(times[name][-1], str):
                times[name].append(attempt(partial(seconds, run)))
        empty()
    return {name: x[-1] if isinstance(x[-1], str) else statistics.median(x[1:]) for name, x in times.items()}


def table(rows: Sequence[Row]) -> rich.table.Table:
    shown = rich.table.Table("work", "contestant", "seconds", "tokens/s", "GB/s", "floor / time", "minem is")
    for row in rows:
        for name, seconds in row["seconds"].items():
            if isinstance(seconds, str):
                shown.add_row(row["work"], name, "failed", "", "", "", seconds)
                continue
            tokens = f"{row['tokens'] / seconds:,.0f}" if row["tokens"] else ""
            moved = f"{row['bytes'] / seconds / 1e9:,.0f}" if "bytes" in row else ""
            share = f"{row['floor_s'] / seconds:.0%}" if "floor_s" in row else ""
            ratio = "" if name == "minem" else f"{seconds / row['seconds']['minem']:.2f} x as fast"
            shown.add_row(row["work"], name, f"{seconds:.4g}", tokens, moved, share, ratio)
    return shown


@click.command()
@click.option("--shape", "names", multiple=True, type=click.Choice(list(LAYERS)), help="Default: all; small on a CPU.")
@click.option("--questions", default=1119, show_default=True, type=click.IntRange(min=1), help="Of the whole E-step.")
@click.option("--repeats", type=click.IntRange(min=1), help="Of the draws; 1 on a GPU, 5 on the CPU by default.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Run transformers beside.")
@click.option("--json", "as_json", is_flag=True, help="After the tables, one JSON object on one line.")
def main(names: Sequence[str], questions: int, repeats: int | None, peers: bool, as_json: bool) -> None:
    """Time the generator beside its floor and beside transformers."""
    gpu = torch.cuda.is_available()
    on, device, dtype = (ON_GPU, "cuda", torch.bfloat16) if gpu else (ON_CPU, "cpu", torch.float32)
    on = replace(on, questions=questions, repeats=repeats or on.repeats)
    console = Console(highlight=False, width=180, stderr=as_json)
    bandwidth, rate = ceilings(device, dtype)
    about = {"dtype": str(dtype).removeprefix("torch."), **facts("transformers", "triton", device=device)}
    for name, fact in about.items():
        console.print(f"{name}: {fact}")
    console.print(f"ceilings measured here: {bandwidth / 1e9:,.0f} GB/s, {rate / 1e12:,.2f} TFLOP/s")
    results = {}
    for shape in (SMALL, *SHAPES):
        if shape.name not in (names or ([s.name for s in SHAPES] if gpu else ["small"])):
            continue
        theirs = random_peer(shape, device, dtype) if peers else None
        bench = Bench(shape, random_model(shape, device, dtype), theirs, bandwidth, rate)
        rows = results[shape.name] = []
        for row in chain(*(rows(bench, on) for rows in (decode_rows, draw_rows, shared_rows, e_step_rows))):
            rows.append(row)
            print(f"{shape.name}: {json.dumps(row)}", file=sys.stderr, flush=True)  # kept if the run is cut off
        layers = f"{LAYERS[shape.name]} layers, width {shape.width}, vocabulary {shape.vocabulary:,}"
        console.print(f"\n{shape.name}: {layers}, {bench.parameters / 1e6:,.1f} M parameters")
        console.print(table(rows))
        del theirs, bench
        empty()
    if as_json:
        print(json.dumps({**about, "bandwidth": bandwidth, "operations_per_s": rate, "shapes": results}))


if __name__ == "__main__":
    main()
