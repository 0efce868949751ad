"""The E-step: its samples are those of drawing one attempt after the other, also if attempts run ahead of time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem.config import SamplerSection
from minem.data.tasks import Question, Task
from minem.data.verdict import strict
from minem.em.estep import EStep, judge, minibatch
from minem.em.sample import Sample
from minem.em.samplers import Attempt, make_sampler
from minem.errors import UserError
from minem.generation.request import Completion, Request, stream_seed
from tests.minem.folders import make_folder, make_model, toy_prompts

QUESTIONS = [
    Question(f"q{i}", f"Question {i}?", ("one", "two", "three"), ("A", "B", "C"), "ABC"[i % 3]) for i in range(24)
]
EOS = 1


class Scripted:
    """A stand-in for the generator: lengths and verdicts come from the request's seed, so the truth is known.

    Long draws are right more often here: accepting the first one to finish would prefer wrong ones.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.model = None
        self.prefill_tokens = 0
        self.tokenizer = _Tokenizer()
        self.waiting: deque[Request] = deque()
        self.active: list[list[Any]] = []  # [request, tokens left]
        self.out: list[Completion] = []
        self.submitted: list[Request] = []

    def outcome(self, request: Request) -> tuple[int, str, str]:
        """(length, text, finish reason) of the draw that a request stands for."""
        digest = hashlib.sha256(f"{request.seed}|{request.prompt_ids}".encode()).digest()
        length = 1 + digest[0] % 40
        gold = chr(request.prompt_ids[0])
        right = digest[1] < 40 + 3 * length
        answer = gold if right else "ABC"[("ABC".index(gold) + 1) % 3]
        text = "no answer" if digest[2] < 20 else f"The best answer is {answer}"
        return length, text, "length" if length == 40 else "stop"

    def submit(self, request: Request, first: bool = False) -> None:
        self.submitted.append(request)
        (self.waiting.appendleft if first else self.waiting.append)(request)

    def cancel(self, request: Request) -> None:
        for entry in self.active:
            if entry[0] is request:
                self.active.remove(entry)
                drawn = self.outcome(request)[0] - entry[1]
                self.out.append(Completion([7] * drawn, "", [-1.0] * drawn, "cancelled", [-1.0] * drawn, request))
                return
        if request in self.waiting:  # else it has just finished, and its completion is on the way
            self.waiting.remove(request)
            self.out.append(Completion([], "", [], "cancelled", [], request))

    @property
    def idle_slots(self) -> int:
        return max(0, self.slots - len(self.active) - len(self.waiting))

    def step(self) -> list[Completion]:
        while self.waiting and len(self.active) < self.slots:
            request = self.waiting.popleft()
            self.active.append([request, self.outcome(request)[0]])
        for entry in list(self.active):
            entry[1] -= 1
            if entry[1] == 0:
                self.active.remove(entry)
                length, text, reason = self.outcome(entry[0])
                self.out.append(Completion([7] * length, text, [-1.0] * length, reason, [-0.5] * length, entry[0]))
        out, self.out = self.out, []
        return out

    def __iter__(self):
        while self.waiting or self.active or self.out:
            yield from self.step()


class _Tokenizer:
    """Prompts that say what the scripted generator must know: the gold label, and whether a hint was given."""

    chat_template = ""
    control_tokens = re.compile("(?!)")

    def encode(self, text: str, add_special_tokens: bool) -> list[str]:
        return text.split()

    def chat(self, messages: list[dict[str, str]], more: dict[str, Any]) -> list[int]:
        text = messages[0]["content"]
        number = int(text.split()[1].rstrip("?"))
        return [ord(QUESTIONS[number].gold), number, "correct answer" in text]


def e_step(generator: Any, name: str = "rsm", budget: int = 8, draws: Any = "first", **more: Any) -> EStep:
    hinted = more.pop("hinted", generator)
    step = EStep(
        sampler=make_sampler(name, budget, draws),
        section=SamplerSection(name=name, budget=budget, draws=draws, **{"max_new_tokens": 40, **more}),
        generators={"plain": generator, "hinted": hinted},
        prompts=toy_prompts(generator.tokenizer),
        verdict=strict,
        seed=3,
    )
    step.begin(2)  # the first iteration also compares the draws with the trainer
    return step


def one_after_the_other(step: EStep, oracle: Scripted, question: Question) -> list[tuple[Any, ...]]:
    """The definition: ask the sampler, draw, judge, until it is done."""
    attempts: list[Attempt] = []
    rows: list[tuple[Any, ...]] = []
    while (prompt := step.sampler.next(question, attempts)) is not None:
        ids = toy_prompts(oracle.tokenizer).drawn(question, hinted=prompt == "hinted")
        request = Request(ids, seed=stream_seed(3, 2, question.id, len(attempts) + 1))
        length, text, reason = oracle.outcome(request)
        answer, status = judge(Completion([7] * length, text, [], reason), question, strict)
        kept = step.section.filter == "none" or status == "accepted"
        attempts.append(Attempt(prompt, kept, answer, status, text))
        rows.append((question.id, len(attempts), prompt, length, answer, status, kept))
    return rows


def as_tuples(step: EStep, samples: list[Sample]) -> list[tuple[Any, ...]]:
    return [(s.id, s.attempt, s.prompt, len(s.token_ids), s.answer, s.status, step.keeps(s)) for s in samples]


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 200),
    name=st.sampled_from(["rsm", "star", "pps"]),
    budget=st.integers(1, 9),
    draws=st.sampled_from(["first", "all"]),
    filter_=st.sampled_from(["correct", "none"]),
    separate=st.booleans(),
    n=st.integers(1, 24),
)
def test_samples_are_those_of_one_attempt_after_the_other(slots, name, budget, draws, filter_, separate, n):
    generator = Scripted(slots)
    hinted = Scripted(slots) if separate else generator
    step = e_step(generator, name, budget, draws, filter=filter_, hinted=hinted)
    samples, counts = step.run(QUESTIONS[:n])
    expected = [row for q in QUESTIONS[:n] for row in one_after_the_other(step, generator, q)]
    assert as_tuples(step, samples) == expected
    # Everything that was drawn is counted, the attempts that were started for nothing too.
    assert counts["tokens"] - counts["cancelled_tokens"] == sum(row[3] for row in expected)
    assert not any((generator.active, generator.waiting, hinted.active, hinted.waiting))


def test_the_summary_is_that_of_its_samples():
    step = e_step(Scripted(300), "star", 3, temperature=0.5)
    samples, counts = step.run(QUESTIONS)
    kept = [sample for sample in samples if step.keeps(sample)]
    found = step.summary(Task("scripted", tuple(QUESTIONS), (), (), ""), samples, kept, counts)
    rows = [row for q in QUESTIONS for row in one_after_the_other(step, Scripted(1), q)]
    accepted = [row for row in rows if row[5] == "accepted"]
    assert (found["questions"], found["attempts"], found["kept"]) == (24, len(rows), len(accepted))
    assert found["solved"] == len({row[0] for row in accepted})
    assert found["kept_length"] == sum(row[3] for row in accepted) / len(accepted)
    assert sum(found["statuses"].values()) == len(rows)
    assert found["statuses"]["accepted"] == len(accepted)
    assert found["acceptance"] == {
        prompt: sum(row[2] == prompt for row in accepted) / sum(row[2] == prompt for row in rows)
        for prompt in ("hinted", "plain")
    }
    assert (found["leaks"], found["valid"], found["altered"]) == (0, None, ["sampler.temperature = 0.5"])
    assert step.summary(Task("scripted", (), (), (), ""), samples, [], counts)["kept_length"] is None


def test_the_accepted_lengths_are_unbiased():
    """With slots to spare several attempts race. Taking the first that finishes would shorten what is accepted."""
    questions = [dataclasses.replace(q, id=f"{q.id}-{k}") for k in range(12) for q in QUESTIONS]
    step = e_step(Scripted(100_000))
    samples, _ = step.run(questions)
    lengths = [len(sample.token_ids) for sample in samples if step.keeps(sample)]
    lazy = [row for q in questions for row in one_after_the_other(step, Scripted(1), q)]
    assert lengths == [row[3] for row in lazy if row[-1]]
    # What the earliest finisher would have been, to show that this input does set the trap.
    earliest = []
    for question in questions:
        ids = toy_prompts(_Tokenizer()).trained(question)
        requests = [Request(ids, seed=stream_seed(3, 2, question.id, attempt)) for attempt in range(1, 9)]
        draws = [Scripted(1).outcome(request) for request in requests]
        right = [n for n, text, reason in draws if text.endswith(question.gold) and reason == "stop"]
        earliest += [min(right)] if right else []
    assert sum(earliest) / len(earliest) < 0.75 * sum(lengths) / len(lengths)


def test_attempts_run_ahead_only_if_slots_would_stand_empty():
    busy, eager = Scripted(4), Scripted(500)
    step, ahead = e_step(busy), e_step(eager)
    samples, counts = step.run(QUESTIONS)
    assert counts["cancelled_tokens"] < 0.1 * counts["tokens"]
    again, all_at_once = ahead.run(QUESTIONS)
    assert as_tuples(step, samples) == as_tuples(ahead, again)
    assert len(eager.submitted) > len(busy.submitted)
    assert all_at_once["cancelled_tokens"] > 0


def test_the_longest_are_expected_from_the_last_draws_of_each_question_and_begin_first():
    generator = Scripted(1)
    step = e_step(generator, "rsm", 2, "all")
    samples, _ = step.run(QUESTIONS)
    newest = [dataclasses.replace(s, token_ids=[7] * 99) for s in samples if s.id == "q5"]

    def earlier():
        yield newest
        yield samples
        raise AssertionError("nothing older is read once every question is known")

    step.begin(3, QUESTIONS, earlier())
    first = [s for s in samples if s.id == "q0"]
    assert step.expected(QUESTIONS[5]) == 99
    assert step.expected(QUESTIONS[0]) == sum(len(s.token_ids) for s in first) / 2
    generator.submitted.clear()
    step.run(QUESTIONS)
    assert generator.submitted[0].tag.question.id == "q5"
    step.begin(1)
    assert step.expected(QUESTIONS[5]) == 1


class Fickle:
    """A sampler that draws next by how the last attempt failed: what was assumed ahead is often wrong."""

    def next(self, question: Question, attempts: list[Attempt]) -> str | None:
        if len(attempts) >= 6 or any(a.accepted for a in attempts):
            return None
        return "hinted" if attempts and attempts[-1].status == "unparsed" else "plain"


class Endless:
    """Always asks for more."""

    def next(self, question: Question, attempts: list[Attempt]) -> str:
        return self.wants

    wants = "plain"


def with_sampler(step: EStep, sampler: Any) -> EStep:
    step.sampler = sampler
    return step


def test_a_sampler_of_ones_own_is_held_to_the_budget():
    for slots in (1, 300):
        samples, _ = with_sampler(e_step(Scripted(slots), budget=3), Endless()).run(QUESTIONS)
        assert len(samples) == 3 * len(QUESTIONS)
    wrong = Endless()
    wrong.wants = "Hinted"
    with pytest.raises(UserError, match="'Hinted'"):
        with_sampler(e_step(Scripted(4)), wrong).run(QUESTIONS)


@pytest.mark.parametrize("slots", [1, 7, 300])
def test_wrong_assumptions_are_taken_back(slots):
    generator = Scripted(slots)
    step = with_sampler(e_step(generator), Fickle())
    samples, _ = step.run(QUESTIONS)
    expected = [row for q in QUESTIONS for row in one_after_the_other(step, generator, q)]
    assert as_tuples(step, samples) == expected
    assert {row[2] for row in expected} == {"plain", "hinted"}


@pytest.mark.parametrize("slots", [5, 300])
def test_after_an_interruption_the_generator_serves_the_next(slots):
    """An E-step that is stopped and started again on the same generator gives what it would have given at once."""
    generator = Scripted(slots)
    steps = iter(range(9))
    with pytest.raises(StopIteration):
        e_step(generator).run(QUESTIONS, lambda done, **facts: print(next(steps)))
    assert not generator.waiting
    assert not generator.active
    step, shown = e_step(generator), []
    samples, _ = step.run(QUESTIONS, lambda done, **facts: shown.append((done, facts)))
    expected, _ = e_step(Scripted(slots)).run(QUESTIONS)
    assert samples == expected
    solved = len({sample.id for sample in samples if sample.status == "accepted"})
    assert shown[-1][0] == len(QUESTIONS)
    assert shown[-1][1]["solved"] == f"{100 * solved / len(QUESTIONS):.1f} %"
    assert shown[-1][1]["accepted"] == f"{100 * solved / len(samples):.1f} %"  # one a question at most


def test_leaks_are_marked_and_by_choice_rejected():
    question = QUESTIONS[0]

    class Leaking(Scripted):
        def outcome(self, request: Request) -> tuple[int, str, str]:
            return 5, f"As given, it must be so.\nThe best answer is {chr(request.prompt_ids[0])}", "stop"

    for name, drop, leak, kept in (
        ("pps", False, True, True),
        ("pps", True, True, False),
        ("rsm", True, False, True),  # a plain prompt has no hint to cite
    ):
        step = e_step(Leaking(4), name, 1, drop_leaks=drop)
        (sample,), _ = step.run([question])
        assert (sample.status, sample.leak, step.keeps(sample)) == ("accepted", leak, kept)


@pytest.mark.parametrize(
    ("text", "reason", "answer", "status"),
    [
        ("so\nThe best answer is A", "stop", "A", "accepted"),
        ("so\nThe best answer is B", "stop", "B", "wrong"),
        ("so it is A", "stop", None, "unparsed"),
        ("The best answer is A", "length", "A", "truncated"),
        ("unfinished", "length", None, "truncated"),
    ],
)
def test_verdict_and_status(text, reason, answer, status):
    assert judge(Completion([1], text, [0.0], reason), QUESTIONS[0], strict) == (answer, status)


def test_samples_hold_what_a_real_generator_drew(tmp_path):
    """Against one forward pass: token ids, log-probabilities under the prompt they came from and the plain one."""
    make_folder(tmp_path, "llama")
    model, tokenizer = minem.load(tmp_path)
    keys = {"max_new_tokens": 12, "temperature": 0.7, "filter": "none"}  # nearly all are cut off: score them too
    step = e_step(minem.Generator(model, tokenizer, slots=5), "star", 3, "all", **keys)
    step.sampler = SimpleNamespace(next=lambda question, attempts: "hinted" if attempts else "plain")
    step.score_plain = True
    step.begin(1)
    samples, counts = step.run(QUESTIONS[:6])
    assert {sample.prompt for sample in samples} == {"plain", "hinted"}
    assert counts["logprob_difference"] < 1e-4
    for sample in samples:
        question = next(q for q in QUESTIONS if q.id == sample.id)
        plain = toy_prompts(tokenizer).trained(question)
        prompt = plain if sample.prompt == "plain" else toy_prompts(tokenizer).drawn(question, hinted=True)
        drawn = torch.tensor(sample.token_ids)[:, None]

        def logprob(ids: list[int], temperature: float, sample: Sample = sample, drawn: Any = drawn) -> float:
            with torch.no_grad():
                logits = model(torch.tensor([ids + sample.token_ids]))[0, len(ids) - 1 : -1].double()
            return (logits / temperature).log_softmax(-1).gather(1, drawn).sum().item()

        assert sample.logprob_q == pytest.approx(logprob(prompt, 0.7), abs=1e-3)
        assert sample.logprob_plain == pytest.approx(logprob(plain, 1.0), abs=1e-3)


def test_random_checkpoints_differ_by_their_seed():
    """The referee's checkpoints must not be alike by accident: two seeds, two models."""
    a, b = (make_model("llama", seed).state_dict() for seed in (0, 1))
    assert not torch.equal(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 24), n=st.integers(1, 24), seed=st.integers(0, 2**62), passes=st.integers(1, 4))
def test_minibatches_go_through_all_questions_before_any_repeats(size, n, seed, passes):
    questions = QUESTIONS[:n]
    count = math.ceil(passes * n / min(size, n))
    batches = [[q.id for q in minibatch(questions, size, seed, i)] for i in range(1, count + 1)]
    place = [question.id for question in questions]
    assert all(len(set(batch)) == len(batch) == min(size, n) for batch in batches)
    assert all(batch == sorted(batch, key=place.index) for batch in batches)
    so_far = dict.fromkeys(place, 0)
    for batch in batches:
        ahead = [id_ for id_ in batch if so_far[id_] > min(so_far.values())]
        for id_ in batch:
            so_far[id_] += 1
        # None comes again before all have come; an iteration may end one pass and begin the next.
        assert max(so_far.values()) - min(so_far.values()) <= 1
        assert not ahead or min(so_far.values()) == max(so_far.values()) - 1
    assert min(so_far.values()) >= passes


def test_minibatches_are_shuffled_again_in_every_pass_and_by_the_seed():
    def half(seed: int, number: int) -> list[str]:
        return [question.id for question in minibatch(QUESTIONS, 12, seed, number)]

    assert half(0, 1) != half(1, 1)
    assert sorted(half(0, 1) + half(0, 2)) == sorted(half(0, 3) + half(0, 4))
    assert half(0, 3) not in (half(0, 1), half(0, 2))
    for size in (None, 24, 99):
        assert minibatch(QUESTIONS, size, 0, 5) == QUESTIONS
    # Written down once: a run that is continued after an update of a library must not continue with other questions.
    assert [q.id for q in minibatch(QUESTIONS, 3, 0, 9)] == ["q5", "q8", "q22"]
