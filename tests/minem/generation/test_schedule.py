"""The E-step's schedule on a simulated GPU: how near it comes to the least that any scheduler needs.

The work is that of ARC-Challenge's training split at a quarter of its size: 280 questions, budget 8, prompts of 250
tokens, answers whose lengths are log-normal with a mean of 300 tokens and end at 1,024. The GPU has 16 slots and is
bound by memory: a step reads the weights once, and the keys and values of every sequence in it (Qwen2.5-3B in bfloat16
at 4.3 TB/s).
"""

from __future__ import annotations

import math
import random
import re
from collections import deque
from itertools import pairwise
from typing import Any

import pytest

from minem.config import SamplerSection
from minem.data.tasks import Question
from minem.data.verdict import strict
from minem.em.estep import BLOCK_ROUNDS, EStep
from minem.em.samplers import make_sampler
from minem.generation.request import Completion, Request
from tests.minem.folders import toy_prompts

SLOTS = 16
PROMPT = 250  # tokens
WEIGHTS = 6.2e9 / 4.3e12  # seconds to read them
POSITION = 2 * 36 * 2 * 128 * 2 / 4.3e12  # seconds to read one position's keys and values
QUESTIONS = [Question(f"q{i}", f"Question {i}?", ("one", "two"), ("A", "B"), "A") for i in range(280)]


class Tokenizer:
    chat_template = ""
    control_tokens = re.compile("(?!)")

    def chat(self, messages: list[dict[str, str]], more: dict[str, Any]) -> list[int]:
        return [int(messages[0]["content"].split()[1].rstrip("?"))]


class SimulatedGPU:
    """A stand-in for the generator, one token a step for each request in a slot, that keeps the time."""

    def __init__(self, acceptance: Any, mean: Any):
        self.acceptance, self.mean = acceptance, mean  # of a question's answers, by its number
        self.tokenizer = Tokenizer()
        self.prefill_tokens = 0
        self.slots, self.model = SLOTS, None
        self.waiting: deque[Request] = deque()
        self.active: dict[Request, int] = {}  # tokens drawn so far
        self.outcomes: dict[Request, tuple[int, bool]] = {}
        self.finished: list[Completion] = []
        self.seconds = 0.0

    def submit(self, request: Request, first: bool = False) -> None:
        coin = random.Random(request.seed)
        mean = self.mean(request.prompt_ids[0])
        length = min(1024, max(1, int(coin.lognormvariate(math.log(mean) - 0.6**2 / 2, 0.6))))
        self.outcomes[request] = length, coin.random() < self.acceptance(request.prompt_ids[0])
        (self.waiting.appendleft if first else self.waiting.append)(request)

    def cancel(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            self.finished.append(completion(request, 0, "cancelled"))
        elif request in self.active:
            self.finished.append(completion(request, self.active.pop(request), "cancelled"))

    @property
    def idle_slots(self) -> int:
        return max(0, SLOTS - len(self.active) - len(self.waiting))

    def step(self) -> list[Completion]:
        while self.waiting and len(self.active) < SLOTS:
            self.active[self.waiting.popleft()] = 0
        if self.active:
            self.seconds += WEIGHTS + POSITION * sum(PROMPT + drawn for drawn in self.active.values())
        for request in list(self.active):
            self.active[request] += 1
            length, right = self.outcomes[request]
            if self.active[request] == length:
                del self.active[request]
                self.finished.append(completion(request, length, "stop", right))
        finished, self.finished = self.finished, []
        return finished

    def __iter__(self):
        while self.waiting or self.active or self.finished:
            yield from self.step()


def completion(request: Request, length: int, reason: Any, right: bool = False) -> Completion:
    return Completion([7] * length, f"The best answer is {'A' if right else 'B'}", [-1.0], reason, [-1.0], request)


def e_step(gpu: Any) -> EStep:
    section = SamplerSection(budget=8, max_new_tokens=1024)
    return EStep(
        make_sampler("rsm", 8, "first"),
        section,
        {"plain": gpu, "hinted": gpu},
        toy_prompts(gpu.tokenizer),
        strict,
        seed=0,
    )


def evenly(questions: list[Question], blocks: int) -> list[list[Question]]:
    """The blocks of `minem.runs.stages.Stage.in_blocks`."""
    ends = [len(questions) * i // blocks for i in range(blocks + 1)]
    return [questions[start:end] for start, end in pairwise(ends)]


def simulate(
    questions: list[Question],
    acceptance: Any,
    mean: Any = lambda question: 300,
    expected: dict[str, float] | None = None,
) -> tuple[float, float]:
    """(drawn tokens, seconds), each as a multiple of the least that any scheduler needs for the same rows."""
    gpu = SimulatedGPU(acceptance, mean)
    step = e_step(gpu)
    step.begin(2)
    step.lengths = expected or {}
    lengths, drawn = [], 0
    for block in evenly(questions, step.blocks(len(questions))):
        samples, counts = step.run(block)
        lengths += [len(sample.token_ids) for sample in samples]
        drawn += counts["tokens"]
    # Every decided token is decoded once, at most SLOTS in a step, and no sequence takes fewer steps than its tokens.
    steps = max(math.ceil(sum(lengths) / SLOTS), max(lengths))
    least = steps * WEIGHTS + POSITION * sum(n * PROMPT + n * (n - 1) / 2 for n in lengths)
    return drawn / sum(lengths), gpu.seconds / least


@pytest.mark.parametrize("acceptance", [0.3, 0.8])
def test_near_the_least_that_any_scheduler_needs(acceptance):
    tokens, seconds = simulate(QUESTIONS, lambda question: acceptance)
    assert 1 <= tokens <= 1.10
    assert 1 <= seconds <= 1.20


def test_blocks_cost_little():
    """Three times the questions: three blocks, each with an end of its own."""
    questions = [Question(f"{q.id}-{k}", q.text, q.options, q.labels, q.gold) for k in range(3) for q in QUESTIONS]
    assert e_step(SimulatedGPU(None, None)).blocks(len(questions)) == 3
    tokens, seconds = simulate(questions, lambda question: 0.5)
    assert tokens <= 1.10
    assert seconds <= 1.20


def test_long_answers_that_begin_first_shorten_the_end():
    """Questions differ in the length of their answers, and a fifth of them is never solved."""
    means = {question: 300 * math.exp(random.Random(question).gauss(-0.18, 0.6)) for question in range(len(QUESTIONS))}

    def acceptance(question: int) -> float:
        return 0.7 if question % 5 else 0.0

    _, blind = simulate(QUESTIONS, acceptance, means.__getitem__)
    expected = {f"q{question}": mean for question, mean in means.items()}
    tokens, informed = simulate(QUESTIONS, acceptance, means.__getitem__, expected)
    assert tokens <= 1.01
    assert informed - 1 < (blind - 1) * 2 / 3
    assert informed <= 1.03


def test_a_block_has_many_rounds_of_work_for_each_slot():
    for slots in (1, 3, 8):
        gpu = SimulatedGPU(None, None)
        gpu.slots = slots
        blocks = e_step(gpu).blocks(len(QUESTIONS))
        assert BLOCK_ROUNDS * slots <= len(QUESTIONS) / blocks <= 2 * BLOCK_ROUNDS * slots
        assert e_step(gpu).blocks(5) == 1
