"""The generator against its floor and beside transformers, in one run: decoding at several batch sizes, many draws of a
few prompts, and whole E-steps.

    python bench/generate.py                                 # on the CPU: a small model, minutes on two cores
    python bench/generate.py --json                          # the same as one line of JSON, the last
    python bench/generate.py --shape qwen2.5-3b --json       # on a GPU: the shapes of real models, in bfloat16

Weights are random, and no token ends a draw, so each is exactly as long as it is told to be. The floor is what the
hardware measured here would need at least: a step reads all weights but the embedding once, or multiplies by them,
whichever takes longer, and reads the keys and values of every sequence. The E-step is `rsm` with a budget of 8: whether
a draw is right is a seeded coin, its length is log-normal with a mean of 300 tokens, at most 1,024 (short ones on the
CPU), and prompts are as long as those of ARC-Challenge in Qwen2.5's tokens.

transformers gets what is best for it: its static cache (compiled, on a GPU), left padding and num_return_sequences for
many draws of a prompt, and on a GPU its continuous batching. It does not know lazy attempts: in an E-step it draws all.
minem also returns each token's log-probability, which transformers is not asked for. Contestants take turns; each one's
first run is a warm-up and not counted; the tables show medians.
"""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click
import rich.table
import torch
from record import ceilings, facts
from resources import SHAPES, Shape
from rich.console import Console

from minem.data.tasks import Question
from minem.em.estep import EStep, blocks
from minem.em.samplers import make_sampler
from minem.generation.generator import Generator
from minem.generation.kv_cache import cache_bytes
from minem.generation.request import Completion, Request, SamplingParams
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig

SMALL = Shape("small", 256, 8, 4, 32, 704, 16_384)
LAYERS = {"small": 6, "qwen2.5-0.5b": 24, "qwen2.5-3b": 36, "llama-3.2-1b": 16, "llama-3.2-3b": 28}
BUDGET = 8
BUSY_STEPS = range(500, 520)  # of an E-step, in which idle time of the GPU is measured, refills and prefills included
# Tokens of ARC-Challenge's 1,119 training prompts as minem asks them, through Qwen2.5's template: 21 quantiles.
ARC = (81, 87, 91, 94, 97, 101, 104, 106, 109, 111, 115, 117, 120, 123, 127, 130, 135, 140, 146, 163, 241)


@dataclass(frozen=True)
class Setting:
    """What of the work depends on where it is done."""

    batches: tuple[int, ...]  # of decoding
    context: int  # tokens that a decoded sequence sees on average
    steps: int  # that are timed
    questions: int  # of the whole E-step
    mean: int  # tokens of its answers
    longest: int
    repeats: int
    beside: int  # questions of the E-step that transformers does, too


ON_GPU = Setting((1, 32, 256), 512, 128, 1119, 300, 1024, 1, 32)
ON_CPU = Setting((1, 32, 256), 128, 32, 1119, 32, 128, 5, 0)  # it has done 24 prompts by then


@dataclass(frozen=True)
class Bench:
    """The models of one shape, and what this machine can do."""

    shape: Shape
    model: Model
    theirs: Any  # transformers' model, or None
    bandwidth: float  # bytes/s
    rate: float  # operations/s

    def step_floor(self, batch: int, context: float) -> float:
        """Seconds that no step for so many sequences of so many tokens can stay under."""
        config, size = self.model.config, self.model.dtype.itemsize
        weights = sum(p.numel() for p in self.model.parameters())
        if not config.tie_word_embeddings:
            weights -= config.vocab_size * config.hidden_size
        matrices = max(weights * size / self.bandwidth, 2 * batch * weights / self.rate)
        return matrices + batch * context * self.position_bytes() / self.bandwidth

    def position_bytes(self) -> float:
        return cache_bytes(self.model.config, self.model.dtype, 0, 64, 0) / 128  # both segments take a block of 64


class Words:
    """A tokenizer that names tokens by number, and asks each question in as many tokens as it is told."""

    has_chat_template = True
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        numbers = random.Random(messages[0]["content"])
        place = numbers.random() * (len(ARC) - 1)
        below = int(place)
        length = ARC[below] + (place - below) * (ARC[below + 1] - ARC[below])
        return [numbers.randrange(self.vocabulary) for _ in range(round(length))]


class Forced:
    """A generator whose draws have lengths of their own, by their seeds, and count as finished."""

    def __init__(self, generator: Generator, length: Callable[[random.Random], int]):
        self.generator, self.length = generator, length
        self.tokenizer, self.max_length = generator.tokenizer, generator.max_length
        self.asked: dict[int, Request] = {}
        self.steps = 0
        self.busy: float | None = None  # the share of the time that a GPU was at work, over BUSY_STEPS
        self.lengths: list[tuple[int, int]] = []  # of prompt and answer
        self.prefilled = generator.prefill_tokens  # before

    def submit(self, request: Request, first: bool = False) -> None:
        n = self.length(random.Random(request.seed))
        forced = replace_request(request, SamplingParams(max_new_tokens=n))
        self.asked[id(request)] = forced
        self.generator.submit(forced, first=first)

    def cancel(self, request: Request) -> None:
        self.generator.cancel(self.asked[id(request)])

    def step(self) -> list[Completion]:
        self.steps += 1
        done: list[Completion] = []
        if self.steps == BUSY_STEPS.start and torch.cuda.is_available():
            self.busy = gpu_busy(lambda: [done.extend(self.generator.step()) for _ in BUSY_STEPS])
        else:
            done += self.generator.step()
        return [self.finished(completion) for completion in done]

    def finished(self, completion: Completion) -> Completion:
        assert completion.request is not None
        asked = completion.request.tag
        if completion.finish_reason == "cancelled":
            return replace(completion, request=asked)
        self.lengths.append((len(asked.prompt_ids), len(completion.token_ids)))
        return replace(completion, finish_reason="stop", request=asked)

    def __iter__(self) -> Iterator[Completion]:
        return map(self.finished, self.generator)

    @property
    def idle_slots(self) -> int:
        return self.generator.idle_slots

    @property
    def prefill_tokens(self) -> int:
        return self.generator.prefill_tokens - self.prefilled


def replace_request(request: Request, params: SamplingParams) -> Request:
    return Request(request.prompt_ids, params, request.seed, tag=request)


# ------------------------------------------------------------------------------------------------------------- models


def config_of(shape: Shape) -> dict[str, Any]:
    qwen = shape.name.startswith("qwen2.5")
    return {
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": LAYERS[shape.name],
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape is not SMALL,
        "rms_norm_eps": 1e-6,
    }


@torch.no_grad()
def random_model(shape: Shape, device: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(config_of(shape))).to(dtype)
    model = model.to_empty(device=device).eval()
    if model.config.tie_word_embeddings:  # to_empty gave both a memory of their own
        model.head.weight = model.embed.weight
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
    return model


def random_peer(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """transformers' model of the same shape, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fields = config_of(shape)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def their_draws(model: Any, prompts: list[list[int]], draws: int, new: int, **more: Any) -> int:
    """transformers' `generate` for all prompts in one batch; returns the tokens drawn."""
    longest = max(map(len, prompts))
    device = model.device
    model.set_attn_implementation("sdpa")  # continuous batching leaves its own behind
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # off; the default is 50
        top_p=1.0,
        num_return_sequences=draws,
        max_new_tokens=new,
        pad_token_id=0,
        **more,
    )
    return out.shape[0] * (out.shape[1] - longest)


def their_continuous_draws(model: Any, prompts: list[list[int]], draws: int, new: int) -> int:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch([p for p in prompts for _ in range(draws)], config)
    return sum(len(result.generated_tokens) for result in out.values())


# ---------------------------------------------------------------------------------------------------------- the works


def random_prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(vocabulary) for _ in range(n)] for n in lengths]


def decode_rows(bench: Bench, on: Setting) -> Iterator[dict[str, Any]]:
    """Steady decoding of distinct prompts: seconds of a step, beside its floor, and how busy the GPU is."""
    for batch in on.batches:
        new = on.steps + 16
        prompts = random_prompts([on.context - new // 2] * batch, bench.shape.vocabulary)
        generator = Generator(bench.model, Words(bench.shape.vocabulary), slots=batch)
        for prompt in prompts:
            generator.submit(Request(prompt, SamplingParams(max_new_tokens=new)))
        for _ in range(8):  # prefill, and the capture of the graph
            generator.step()
        synchronize()
        start = time.perf_counter()
        for _ in range(on.steps):
            generator.step()
        synchronize()
        seconds = {"minem": (time.perf_counter() - start) / on.steps}
        busy = None if not torch.cuda.is_available() else gpu_busy(lambda g=generator: [g.step() for _ in range(4)])
        list(generator)
        for name, contestant in decode_peers(bench).items():
            short, long = 8, 8 + on.steps
            try:
                contestant(prompts, long)  # a warm-up, as long as the longer one: caches are made for a length
                times = [timed(partial(contestant, prompts, n)) for n in (short, long)]
                seconds[name] = (times[1] - times[0]) / on.steps
            except Exception as error:  # a contestant that cannot run here must not end the others' run
                seconds[name] = failed(error)
        floor = bench.step_floor(batch, on.context)
        moved = bench.step_floor(batch, on.context) * bench.bandwidth
        yield {"work": f"decode B={batch}", "tokens": batch, "floor_s": floor, "bytes": moved, "busy": busy} | {
            "operations": 2 * batch * sum(p.numel() for p in bench.model.parameters()),
            "seconds": seconds,
        }
        empty()


def decode_peers(bench: Bench) -> dict[str, Callable[[list[list[int]], int], int]]:
    return {name: lambda p, n, draw=draw: draw(p, 1, n) for name, draw in peers(bench).items()}  # type: ignore[misc]


def peers(bench: Bench) -> dict[str, Callable[[list[list[int]], int, int], int]]:
    """transformers' ways to draw, by (prompts, draws of each, new tokens)."""
    if bench.theirs is None:
        return {}
    ways = {"transformers, static cache": partial(their_draws, bench.theirs, cache_implementation="static")}
    if torch.cuda.is_available():  # on a CPU it finds no memory to plan with
        ways["transformers, continuous batching"] = partial(their_continuous_draws, bench.theirs)
    return ways


def draw_rows(bench: Bench, on: Setting) -> Iterator[dict[str, Any]]:
    """24 prompts of 40 to 200 tokens, 4 draws each, 48 new tokens; and the E-step on them, budget 8, acceptance 1/2."""
    prompts = random_prompts([40 + 160 * i // 23 for i in range(24)], bench.shape.vocabulary)
    words = Words(bench.shape.vocabulary)

    def ours() -> int:
        # A new one each time: prompts that are still cached from the last run would be a head start.
        draws = Generator(bench.model, words).generate(prompts, SamplingParams(n=4, max_new_tokens=48))
        return sum(len(completion.token_ids) for group in draws for completion in group)

    contestants: dict[str, Callable[[], int]] = {"minem": ours}
    if bench.theirs is not None:
        contestants["transformers"] = lambda: their_draws(bench.theirs, prompts, 4, 48)
        contestants |= {name: partial(draw, prompts, 4, 48) for name, draw in peers(bench).items()}
    tokens = 24 * 4 * 48
    yield {"work": "24 prompts x 4 draws x 48", "tokens": tokens, "seconds": take_turns(contestants, on, tokens)}

    class Given(Words):  # the same prompts, asked as questions
        def chat(self, messages: list[dict[str, str]]) -> list[int]:
            return prompts[int(messages[0]["content"].split()[1].rstrip("?"))]

    drawn: list[int] = []

    def lazily() -> int:
        drawn.append(e_step(bench, Given(bench.shape.vocabulary), 24, 0.5, lambda coin: 48)[0])
        return drawn[-1]

    contestants = {"minem": lazily}
    if bench.theirs is not None:
        contestants["transformers, all 8"] = lambda: their_draws(bench.theirs, prompts, BUDGET, 48)
    yield {"work": "E-step on these, budget 8", "tokens": None, "seconds": take_turns(contestants, on)} | {
        "drawn": drawn[-1]
    }


def e_step(
    bench: Bench,
    words: Words,
    count: int,
    acceptance: float,
    length: Callable[[random.Random], int],
    warm: Generator | None = None,
) -> tuple[int, Forced]:
    """rsm over `count` questions; returns all tokens drawn, cancelled ones too, and the generator that drew them.

    warm: a generator to use; a new one where none is given.
    """
    questions = [Question(f"q{i}", f"Question {i}?", ("one", "two"), ("A", "B"), "A") for i in range(count)]
    generator = Forced(warm or Generator(bench.model, words), length)
    step = EStep(
        sampler=make_sampler("rsm", BUDGET, "first"),
        budget=BUDGET,
        generators={"plain": generator, "hinted": generator},  # type: ignore[dict-item]
        verdict=lambda text, question: "A" if random.Random(text).random() < acceptance else "B",
        params=SamplingParams(max_new_tokens=1024),
        hint="forward",
        seed=0,
        iteration=1,
    )
    tokens = sum(step.run(block)[1].tokens for block in blocks(questions, generator.generator.slots))
    return tokens, generator


def whole_e_step(bench: Bench, on: Setting, acceptance: float) -> dict[str, Any]:
    """As many questions as ARC-Challenge has, and the least that any scheduler would need for the same draws."""

    def length(coin: random.Random) -> int:
        return min(on.longest, max(1, int(coin.lognormvariate(math.log(on.mean) - 0.6**2 / 2, 0.6))))

    words = Words(bench.shape.vocabulary)
    warm = Generator(bench.model, words)
    warm.reserve(max(ARC), on.longest)
    e_step(bench, words, 2 * warm.slots, acceptance, lambda coin: 8, warm)  # kernels are compiled, graphs captured
    start = time.perf_counter()
    tokens, generator = e_step(bench, words, on.questions, acceptance, length, warm)
    synchronize()
    seconds = time.perf_counter() - start
    needed = sum(answer for _, answer in generator.lengths)
    slots = generator.generator.slots
    steps = max(needed / slots, max(answer for _, answer in generator.lengths))
    seen = sum(prompt * answer + answer**2 / 2 for prompt, answer in generator.lengths)
    weights = sum(p.numel() for p in bench.model.parameters())
    floor = steps * bench.step_floor(slots, 0) + seen * bench.position_bytes() / bench.bandwidth
    floor += 2 * weights * generator.prefill_tokens / bench.rate
    return {
        "work": f"E-step, {on.questions} questions, acceptance {acceptance:g}",
        "tokens": tokens,
        "attempts": len(generator.lengths),
        "prefill_tokens": generator.prefill_tokens,
        "slots": slots,
        "floor_s": floor,
        "busy": generator.busy,
        "seconds": {"minem": seconds},
    }


def e_step_rows(bench: Bench, on: Setting, acceptance: float) -> Iterator[dict[str, Any]]:
    """The whole E-step; then one that is small enough for transformers, which draws all 8 of each in one batch and so
    takes as long as the longest of them."""
    yield whole_e_step(bench, on, acceptance)
    if bench.theirs is None or not on.beside:
        return
    row = whole_e_step(bench, replace(on, questions=on.beside), acceptance)
    words = Words(bench.shape.vocabulary)
    prompts = [words.chat([{"role": "user", "content": f"{i}"}]) for i in range(on.beside)]
    try:
        row["seconds"]["transformers, all 8"] = timed(lambda: their_draws(bench.theirs, prompts, BUDGET, on.longest))
    except Exception as error:
        row["seconds"]["transformers, all 8"] = failed(error)
    yield row


# ---------------------------------------------------------------------------------------------------------- measuring


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def failed(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def take_turns(contestants: dict[str, Callable[[], int]], on: Setting, expected: int | None = None) -> dict[str, Any]:
    """Median seconds of each, or why it failed. They take turns, so that a busy machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    seconds: dict[str, Any] = {}
    for turn in range(on.repeats + 1):
        for name, run in contestants.items():
            if name in seconds:
                continue
            try:
                start = time.perf_counter()
                tokens = run()
                synchronize()
                elapsed = time.perf_counter() - start
                if expected is not None and tokens != expected:
                    raise RuntimeError(f"drew {tokens} tokens instead of {expected}")
            except Exception as error:
                if name == "minem":
                    raise
                seconds[name] = failed(error)
                continue
            if turn:
                times[name].append(elapsed)
        empty()
    return {name: seconds.get(name) or statistics.median(times[name]) for name in contestants}


def gpu_busy(work: Callable[[], Any]) -> float:
    """The share of the time in which a kernel is at work, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type.name == "CUDA")
    if not spans:
        return math.nan  # this profiler sees nothing here
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - spans[0][0])


def table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    shown = rich.table.Table(
        "work", "contestant", "seconds", "tokens/s", "GB/s", "TFLOP/s", "floor / time", "minem is", "GPU busy"
    )
    for row in rows:
        for name, seconds in row["seconds"].items():
            if isinstance(seconds, str):
                shown.add_row(row["work"], name, "failed", "", "", "", "", seconds)
                continue
            ratio = "" if name == "minem" else f"{seconds / row['seconds']['minem']:.2f} x as fast"
            shown.add_row(
                row["work"],
                name,
                f"{seconds:.4g}",
                f"{row['tokens'] / seconds:,.0f}" if row["tokens"] else "",
                f"{row['bytes'] / seconds / 1e9:,.0f}" if "bytes" in row else "",
                f"{row['operations'] / seconds / 1e12:.3g}" if "operations" in row else "",
                f"{row['floor_s'] / seconds:.0%}" if "floor_s" in row else "",
                ratio,
                f"{row['busy']:.1%}" if name == "minem" and row.get("busy") else "",
            )
    return shown


@click.command()
@click.option(
    "--shape", "names", multiple=True, type=click.Choice(list(LAYERS)), help="By default all; on a CPU, small."
)
@click.option("--only", multiple=True, type=click.Choice(["decode", "draws", "estep"]), help="By default all three.")
@click.option("--acceptance", default=0.5, show_default=True, help="Of the whole E-step's draws.")
@click.option("--questions", type=click.IntRange(min=1), help="Of the whole E-step; 1,119 by default.")
@click.option("--repeats", type=click.IntRange(min=1), help="Of the draws; 1 on a GPU, 5 on the CPU.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Run transformers beside, where it is there.")
@click.option("--json", "as_json", is_flag=True, help="After the tables, one JSON object on one line.")
def main(
    names: tuple[str, ...],
    only: tuple[str, ...],
    acceptance: float,
    questions: int | None,
    repeats: int | None,
    peers: bool,
    as_json: bool,
) -> None:
    """Time the generator beside its floor and beside transformers."""
    gpu = torch.cuda.is_available()
    on, device = (ON_GPU, "cuda") if gpu else (ON_CPU, "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    if questions is not None:
        on = replace(on, questions=questions)
    on = replace(on, repeats=repeats or on.repeats)
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
        model = random_model(shape, device, dtype)
        theirs = random_peer(shape, device, dtype) if peers else None
        bench = Bench(shape, model, theirs, bandwidth, rate)
        rows: list[dict[str, Any]] = []
        wanted = only or ("decode", "draws", "estep")
        works: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "decode": partial(decode_rows, bench, on),
            "draws": partial(draw_rows, bench, on),
            "estep": partial(e_step_rows, bench, on, acceptance),
        }
        for row in (row for name, work in works.items() if name in wanted for row in work()):
            rows.append(row)  # said at once, too: a run that is cut off has then lost nothing
            print(f"{shape.name}: {json.dumps(row)}", file=sys.stderr, flush=True)
        layers = f"{LAYERS[shape.name]} layers, width {shape.width}, vocabulary {shape.vocabulary:,}"
        console.print(f"\n{shape.name}: {layers}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters")
        console.print(table(rows))
        results[shape.name] = rows
        del model, theirs, bench
        empty()
    if as_json:
        print(json.dumps({**about, "bandwidth": bandwidth, "operations_per_s": rate, "shapes": results}))


if __name__ == "__main__":
    main()
