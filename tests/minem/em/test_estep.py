"""The E-step: its records are those of drawing one attempt after the other, whatever runs ahead of time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem.data.tasks import Question
from minem.data.verdict import strict
from minem.em.estep import EStep, encode_prompt, judge, minibatch
from minem.em.samplers import Attempt, make_sampler
from minem.errors import UserError
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from tests.minem.folders import make_folder

QUESTIONS = [
    Question(f"q{i}", f"Question {i}?", ("one", "two", "three"), ("A", "B", "C"), "ABC"[i % 3]) for i in range(24)
]
EOS = 1


class Scripted:
    """A stand-in for the generator: lengths and verdicts come from the request's seed, so the truth is known.

    Long draws are right more often here, the trap for whoever accepts the first one to finish.
    """

    def __init__(self, slots: int):
        self.slots = slots
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

    has_chat_template = True

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = messages[0]["content"]
        number = int(text.split()[1].rstrip("?"))
        return [ord(QUESTIONS[number].gold), number, "correct answer" in text]


def e_step(generator: Any, name: str = "rsm", budget: int = 8, draws: str = "first", **more: Any) -> EStep:
    return EStep(
        sampler=make_sampler(name, budget, draws),
        budget=budget,
        generators={"plain": generator, "hinted": more.pop("hinted", generator)},
        verdict=strict,
        params=SamplingParams(max_new_tokens=40),
        hint="forward",
        seed=3,
        iteration=1,
        **more,
    )


def one_after_the_other(step: EStep, oracle: Scripted, question: Question) -> list[tuple[Any, ...]]:
    """The definition: ask the sampler, draw, judge, until it is done."""
    attempts: list[Attempt] = []
    rows: list[tuple[Any, ...]] = []
    while (prompt := step.sampler.next(question, attempts)) is not None:
        ids = encode_prompt(oracle.tokenizer, question, "forward" if prompt == "hinted" else None)
        request = Request(ids, seed=stream_seed(3, 1, question.id, len(attempts) + 1))
        length, text, reason = oracle.outcome(request)
        answer, status = judge(Completion([7] * length, text, [], reason), question, strict)
        kept = step.keep_all or status == "accepted"
        attempts.append(Attempt(prompt, kept, answer, status, text))
        rows.append((question.id, len(attempts), prompt, length, answer, status, kept))
    return rows


def as_tuples(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    fields = ("id", "attempt", "prompt", "token_ids", "answer", "status", "kept")
    return [tuple(len(r[f]) if f == "token_ids" else r[f] for f in fields) for r in rows]


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 200),
    name=st.sampled_from(["rsm", "star", "pps"]),
    budget=st.integers(1, 9),
    draws=st.sampled_from(["first", "all"]),
    keep_all=st.booleans(),
    separate=st.booleans(),
    n=st.integers(1, 24),
)
def test_records_are_those_of_one_attempt_after_the_other(slots, name, budget, draws, keep_all, separate, n):
    generator = Scripted(slots)
    hinted = Scripted(slots) if separate else generator
    step = e_step(generator, name, budget, draws, keep_all=keep_all, hinted=hinted)
    rows, counts = step.run(QUESTIONS[:n])
    expected = [row for q in QUESTIONS[:n] for row in one_after_the_other(step, generator, q)]
    assert as_tuples(rows) == expected
    assert counts.attempts == len(expected)
    assert counts.kept == sum(row[-1] for row in expected)
    # Everything that was drawn is counted, the attempts that were started for nothing too.
    assert counts.tokens - counts.cancelled_tokens == sum(row[3] for row in expected)
    assert not any((generator.active, generator.waiting, hinted.active, hinted.waiting))


def test_the_accepted_lengths_are_unbiased():
    """With slots to spare several attempts race. Taking the first that finishes would shorten what is accepted."""
    questions = [dataclasses.replace(q, id=f"{q.id}-{k}") for k in range(40) for q in QUESTIONS]
    step = e_step(Scripted(100_000))
    rows, _ = step.run(questions)
    lengths = [len(r["token_ids"]) for r in rows if r["kept"]]
    lazy = [row for q in questions for row in one_after_the_other(step, Scripted(1), q)]
    expected = [row[3] for row in lazy if row[-1]]
    assert lengths == expected
    # What the earliest finisher would have been, to show that this input does set the trap.
    earliest = []
    for question in questions:
        draws = [
            Scripted(1).outcome(
                Request(
                    [ord(question.gold), int(question.text.split()[1][:-1]), False],
                    seed=stream_seed(3, 1, question.id, a),
                )
            )
            for a in range(1, 9)
        ]
        right = [n for n, text, reason in draws if text.endswith(question.gold) and reason == "stop"]
        earliest += [min(right)] if right else []
    assert sum(earliest) / len(earliest) < 0.75 * sum(lengths) / len(lengths)


def test_attempts_run_ahead_only_where_slots_would_stand_empty():
    busy = Scripted(4)
    rows, counts = e_step(busy).run(QUESTIONS)
    assert counts.cancelled_tokens < 0.1 * counts.tokens
    eager = Scripted(500)
    again, all_at_once = e_step(eager).run(QUESTIONS)
    assert as_tuples(rows) == as_tuples(again)
    assert len(eager.submitted) > len(busy.submitted)
    assert all_at_once.cancelled_tokens > 0


class Fickle:
    """A sampler whose next prompt depends on how the last attempt failed: what was assumed ahead is often wrong."""

    def next(self, question: Question, attempts: list[Attempt]) -> str | None:
        if len(attempts) >= 6 or any(a.accepted for a in attempts):
            return None
        return "hinted" if attempts and attempts[-1].status == "unparsed" else "plain"


class Endless:
    """Asks for more whatever happened."""

    def next(self, question: Question, attempts: list[Attempt]) -> str:
        return self.wants

    wants = "plain"


def test_a_sampler_of_ones_own_is_held_to_the_budget():
    for slots in (1, 300):
        _, counts = dataclasses.replace(e_step(Scripted(slots), budget=3), sampler=Endless()).run(QUESTIONS)
        assert counts.attempts == 3 * len(QUESTIONS)
    Endless.wants = "Hinted"
    with pytest.raises(UserError, match="'Hinted'"):
        dataclasses.replace(e_step(Scripted(4)), sampler=Endless()).run(QUESTIONS)


@pytest.mark.parametrize("slots", [1, 7, 300])
def test_wrong_assumptions_are_taken_back(slots):
    generator = Scripted(slots)
    step = dataclasses.replace(e_step(generator), sampler=Fickle())
    rows, _ = step.run(QUESTIONS)
    expected = [row for q in QUESTIONS for row in one_after_the_other(step, generator, q)]
    assert as_tuples(rows) == expected
    assert {row[2] for row in expected} == {"plain", "hinted"}


@pytest.mark.parametrize("slots", [5, 300])
def test_after_an_interruption_the_generator_serves_the_next(slots):
    """Whoever stops an E-step and starts it again on the same generator gets what he would have had at once."""
    generator = Scripted(slots)
    steps = iter(range(9))
    with pytest.raises(StopIteration):
        e_step(generator).run(QUESTIONS, on_progress=lambda counts: print(next(steps)))
    assert not generator.waiting
    assert not generator.active
    rows, counts = e_step(generator).run(QUESTIONS)
    expected, _ = e_step(Scripted(slots)).run(QUESTIONS)
    assert rows == expected
    assert (counts.done, counts.attempts) == (len(QUESTIONS), len(rows))


def test_leaks_are_marked_and_by_choice_rejected():
    question = QUESTIONS[0]

    class Leaking(Scripted):
        def outcome(self, request: Request) -> tuple[int, str, str]:
            return 5, f"As given, it must be so.\nThe best answer is {chr(request.prompt_ids[0])}", "stop"

    (row,), counts = e_step(Leaking(4), "pps", 1).run([question])
    assert (row["status"], row["leak"], row["kept"], counts.leaks) == ("accepted", True, True, 1)
    (row,), counts = e_step(Leaking(4), "pps", 1, drop_leaks=True).run([question])
    assert (row["status"], row["leak"], row["kept"]) == ("accepted", True, False)
    (row,), _ = e_step(Leaking(4), "rsm", 1, drop_leaks=True).run([question])
    assert (row["leak"], row["kept"]) == (False, True)  # a plain prompt has no hint to cite


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


def test_rows_hold_what_a_real_generator_drew(tmp_path):
    """Against one forward pass: token ids, log-probabilities under the prompt they came from."""
    make_folder(tmp_path, "llama")
    model, tokenizer = minem.load(tmp_path)
    generator = minem.Generator(model, tokenizer, slots=5)

    def all_right(text: str, question: Question) -> str:
        return question.gold

    step = dataclasses.replace(
        e_step(generator, "star", 3, "all"),
        verdict=all_right,
        params=SamplingParams(max_new_tokens=12, temperature=0.7),
    )
    rows, counts = step.run(QUESTIONS[:6])
    assert counts.statuses["truncated"] > 0  # nearly all: a random model seldom ends
    for row in rows:
        question = next(q for q in QUESTIONS if q.id == row["id"])
        plain = encode_prompt(tokenizer, question)
        prompt = plain if row["prompt"] == "plain" else encode_prompt(tokenizer, question, "forward")
        assert (prompt == plain) == (row["prompt"] == "plain")
        ids = torch.tensor([prompt + row["token_ids"]])
        with torch.no_grad():
            logits = model(ids)[0, len(prompt) - 1 : -1].double()
        drawn = torch.tensor(row["token_ids"])[:, None]
        tempered = (logits / 0.7).log_softmax(-1).gather(1, drawn).sum().item()
        raw = logits.log_softmax(-1).gather(1, drawn).sum().item()
        assert row["logprob_q"] == pytest.approx(tempered, abs=1e-3)
        if row["prompt"] == "plain":
            assert row["logprob_plain"] == pytest.approx(raw, abs=1e-3)
        else:
            assert row["logprob_plain"] is None


@settings(max_examples=150, deadline=None)
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


def test_minibatches_are_shuffled_anew_in_every_pass_and_by_the_seed():
    def half(seed: int, number: int) -> list[str]:
        return [question.id for question in minibatch(QUESTIONS, 12, seed, number)]

    assert half(0, 1) != half(1, 1)
    assert sorted(half(0, 1) + half(0, 2)) == sorted(half(0, 3) + half(0, 4))
    assert half(0, 3) not in (half(0, 1), half(0, 2))
    for size in (None, 24, 99):
        assert minibatch(QUESTIONS, size, 0, 5) == QUESTIONS
    # Written down once: a run that is continued after an update of a library must not go on with other questions.
    assert [q.id for q in minibatch(QUESTIONS, 3, 0, 9)] == ["q5", "q8", "q22"]
