"""The E-step: where a sampler meets the generator. Out come the rows of samples.jsonl.

    minem sample --sampler rsm --budget 8          # the E-step alone

Attempts are lazy: one draw per question is in flight, and the next is made once the sampler knows how that one ended.
Only when slots of the generator would stand empty are further attempts started ahead of time, on the assumption that
the ones before them fail. Whatever finishes first, attempts are *decided* in the order of their index and everything
above the accepted one is cancelled and forgotten: accepting the earliest finisher instead would prefer short
rationales. So the rows are those of drawing one attempt after the other, whatever the number of slots.

Towards the end slots run empty, and how many steps that lasts is decided by the answers that were begun last: so those
that are expected to be longest begin first. (Not the hardest: whatever attempts they have left can run side by side.)
A long E-step is done in blocks of questions, each on the disk before the next begins; every block has such an end, so a
block has many rounds of work for each slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from minem.data.prompts import messages
from minem.data.tasks import Question
from minem.data.verdict import Verdict, cites_hint
from minem.em.samplers import Attempt, Prompt, Sampler
from minem.errors import UserError
from minem.generation.generator import Generator
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.model.tokenizer import Tokenizer

OnDecided = Callable[[Completion, Prompt], None]
BLOCK_ROUNDS = 16  # questions of a block for each slot, at least: its end, where slots run empty, is some 5 % of it
Status = Literal["accepted", "wrong", "unparsed", "truncated"]


def encode_prompt(tokenizer: Tokenizer, question: Question, hint: str | None = None) -> list[int]:
    """Token ids of the plain prompt, or of the hinted one in the wording `hint`; through the model's chat template.

    A tokenizer without a template gets the text itself, as a base model expects it.
    Raises UserError, with the question's id, where the template fails.
    """
    chat = messages(question, hint)
    try:
        if tokenizer.has_chat_template:
            return tokenizer.chat(chat)
        return tokenizer.encode("\n\n".join(message["content"] for message in chat) + "\n")
    except UserError as error:
        raise UserError(f"question {question.id!r}: {error}") from error


def minibatch(questions: Sequence[Question], size: int | None, seed: int, iteration: int) -> list[Question]:
    """The questions that an iteration (counted from 1) draws on: the next `size` of a shuffle, in the given order.

    Every pass through the questions is shuffled anew and over before any comes again; an iteration that begins in one
    pass and ends in the next takes from the latter none that it has already. All where size is None, or no fewer.
    """
    if size is None or size >= len(questions):
        return list(questions)
    stream: list[int] = []  # positions in `questions`, pass after pass
    while len(stream) < iteration * size:
        begun = set(stream[len(stream) // size * size :])
        pass_ = len(stream) // len(questions)
        keys = [stream_seed(seed, "minibatch", pass_, question.id) for question in questions]
        order = sorted(range(len(questions)), key=keys.__getitem__)
        first = [i for i in order if i not in begun][: size - len(begun)]
        taken = set(first)
        stream += first + [i for i in order if i not in taken]
    return [questions[i] for i in sorted(stream[(iteration - 1) * size : iteration * size])]


def blocks(questions: Sequence[Question], slots: int) -> list[Sequence[Question]]:
    """The questions in blocks as alike in size as can be, BLOCK_ROUNDS for each slot or more; few make one block."""
    count = max(1, len(questions) // (BLOCK_ROUNDS * slots))
    ends = [len(questions) * i // count for i in range(count + 1)]
    return [questions[begin:end] for begin, end in pairwise(ends)]


def judge(completion: Completion, question: Question, verdict: Verdict) -> tuple[str | None, Status]:
    """The answer that a completion states and what becomes of it: the reward is 1 for "accepted" alone.

    A draw that was cut off at the limit is rejected even where an answer can be read from it: it has no EOS, so it is
    not an outcome of the policy.
    """
    answer = verdict(completion.text, question)
    if completion.finish_reason != "stop":
        return answer, "truncated"
    if answer is None:
        return answer, "unparsed"
    return answer, "accepted" if answer == question.gold else "wrong"


@dataclass(frozen=True)
class EStep:
    """All that the E-step of an iteration needs to know.

    budget: the most attempts at a question, whatever the sampler asks for.
    generators: which generator draws from which prompt. Two different ones where hinted draws come from the base model.
    keep_all: keep every draw whatever its verdict (r = 1), the control experiment.
    drop_leaks: also reject correct hinted rationales that cite the hint.
    lengths: by question id, the tokens that an answer is expected to have; the longest begin first. It changes nothing
        else: without it they begin in the order in which they are given.
    """

    sampler: Sampler
    budget: int
    generators: Mapping[Prompt, Generator]
    verdict: Verdict
    params: SamplingParams
    hint: str
    seed: int
    iteration: int
    keep_all: bool = False
    drop_leaks: bool = False
    lengths: Mapping[str, float] = field(default_factory=dict)

    def run(
        self,
        questions: Sequence[Question],
        on_progress: Callable[[Counts], None] | None = None,
        on_decided: OnDecided | None = None,
    ) -> tuple[list[dict[str, Any]], Counts]:
        """Attempt every question.

        Args:
            on_progress: called with the running counts after every step.
            on_decided: called with the draw of every decided attempt and the prompt that it was drawn from.
        Returns:
            the decided attempts as rows of samples.jsonl, by question and attempt, each with `kept` beside the fields
            of the file (whether the filter keeps it), and the final counts.
        """
        searches = [_Search(question) for question in questions]
        counts = Counts(questions=len(searches))
        try:
            self._attempt_all(searches, counts, on_progress, on_decided or (lambda completion, prompt: None))
        except BaseException:
            for search in searches:  # or the next E-step on these generators would be handed what is left of this one
                self._cancel_from(search, 0, counts)
            raise
        return [row for search in searches for row in search.rows], counts

    def _attempt_all(
        self,
        searches: Sequence[_Search],
        counts: Counts,
        on_progress: Callable[[Counts], None] | None,
        on_decided: OnDecided,
    ) -> None:
        for search in sorted(searches, key=lambda s: -self.lengths.get(s.question.id, 0.0)):
            self._advance(search, counts, on_decided)
        generators = list({id(g): g for g in self.generators.values()}.values())
        prefilled = sum(generator.prefill_tokens for generator in generators)
        while counts.done < counts.questions:
            self._fill_idle_slots(searches)
            for generator in generators:
                for completion in generator.step():
                    self._receive(completion, counts, on_decided)
            if on_progress is not None:
                on_progress(counts)
        for generator in generators:  # what was cancelled last still has to come out
            for completion in generator:
                self._receive(completion, counts, on_decided)
        counts.prefill_tokens = sum(generator.prefill_tokens for generator in generators) - prefilled
        if on_progress is not None:
            on_progress(counts)

    def _receive(self, completion: Completion, counts: Counts, on_decided: OnDecided) -> None:
        assert completion.request is not None
        search, index = completion.request.tag
        counts.tokens += len(completion.token_ids)
        if search.in_flight.get(index) is not completion.request:
            counts.cancelled_tokens += len(completion.token_ids)
            return
        search.finished[index] = completion
        self._advance(search, counts, on_decided)

    def _advance(self, search: _Search, counts: Counts, on_decided: OnDecided) -> None:
        """Decide what can be decided, in the order of attempts, and see that the next one is under way."""
        while True:
            index = len(search.attempts)
            wanted = self._next(search, search.attempts)
            if wanted is None:
                self._cancel_from(search, index, counts)
                counts.done += 1
                counts.solved += any(a.status == "accepted" for a in search.attempts)
                search.done = True
                return
            if search.prompts.get(index) != wanted:  # not started, or started on an assumption that did not hold
                self._cancel_from(search, index, counts)
                self._start(search, index, wanted, first=index > 0)
            if index not in search.finished:
                return
            on_decided(search.finished[index], search.prompts[index])
            self._decide(search, index, counts)

    def _next(self, search: _Search, attempts: Sequence[Attempt]) -> Prompt | None:
        """What the sampler wants next, within the budget.

        Raises:
            UserError: it fails, or wants something that is no prompt.
        """
        if len(attempts) >= self.budget:
            return None
        try:
            wanted = self.sampler.next(search.question, attempts)
        except Exception as error:  # it may be the user's: whatever it raises is told with the question it failed on
            raise UserError(f"the sampler raised {error!r} on question {search.question.id!r}") from error
        if wanted is not None and wanted not in ("plain", "hinted"):
            raise UserError(f"the sampler asked for {wanted!r}; next() must return 'plain', 'hinted' or None")
        return wanted

    def _decide(self, search: _Search, index: int, counts: Counts) -> None:
        completion, prompt = search.finished.pop(index), search.prompts[index]
        del search.in_flight[index]
        answer, status = judge(completion, search.question, self.verdict)
        leak = prompt == "hinted" and cites_hint(completion.text)
        kept = self.keep_all or (status == "accepted" and not (leak and self.drop_leaks))
        search.attempts.append(Attempt(prompt, kept, answer, status, completion.text))
        search.rows.append(
            {
                "id": search.question.id,
                "iteration": self.iteration,
                "attempt": index + 1,
                "prompt": prompt,
                "token_ids": completion.token_ids,
                "logprob_q": sum(completion.proposal_logprobs),
                "logprob_plain": sum(completion.logprobs) if prompt == "plain" else None,
                "text": completion.text,
                "answer": answer,
                "gold": search.question.gold,
                "status": status,
                "leak": leak,
                "kept": kept,
            }
        )
        counts.add(search.rows[-1])

    def _start(self, search: _Search, index: int, prompt: Prompt, first: bool) -> None:
        generator = self.generators[prompt]
        if prompt not in search.prompt_ids:
            hint = self.hint if prompt == "hinted" else None
            search.prompt_ids[prompt] = encode_prompt(generator.tokenizer, search.question, hint)
        seed = stream_seed(self.seed, self.iteration, search.question.id, index + 1)
        request = Request(search.prompt_ids[prompt], self.params, seed, tag=(search, index))
        try:
            generator.submit(request, first=first)
        except UserError as error:
            raise UserError(f"question {search.question.id!r}: {error}") from error
        search.in_flight[index] = request
        search.prompts[index] = prompt

    def _cancel_from(self, search: _Search, index: int, counts: Counts) -> None:
        """Give up all attempts from `index` on."""
        for later in [i for i in search.in_flight if i >= index]:
            request, prompt = search.in_flight.pop(later), search.prompts.pop(later)
            if later in search.finished:
                counts.cancelled_tokens += len(search.finished.pop(later).token_ids)
            else:
                self.generators[prompt].cancel(request)

    def _fill_idle_slots(self, searches: Sequence[_Search]) -> None:
        """Start attempts ahead of time where slots would stand empty, one more for each open question in turn."""
        idle = {id(g): g.idle_slots for g in self.generators.values()}
        if not all(idle.values()):  # of two generators the second may have nothing to do yet: that is no reason
            return
        waiting = sorted((s for s in searches if not s.done), key=lambda s: len(s.in_flight))
        while waiting and any(idle.values()):
            still = []
            for search in waiting:
                index = len(search.attempts) + len(search.in_flight)
                assumed = [Attempt(search.prompts[i], accepted=False) for i in range(len(search.attempts), index)]
                prompt = self._next(search, [*search.attempts, *assumed])
                if prompt is None or not idle[id(self.generators[prompt])]:
                    continue
                self._start(search, index, prompt, first=False)
                idle[id(self.generators[prompt])] -= 1
                still.append(search)
            waiting = still


@dataclass
class Counts:
    """Counts of an E-step, running and final."""

    questions: int
    done: int = 0
    solved: int = 0  # questions with a right draw
    attempts: int = 0
    kept: int = 0
    kept_tokens: int = 0
    leaks: int = 0
    tokens: int = 0  # all that were drawn, those of rejected and cancelled attempts too
    cancelled_tokens: int = 0  # drawn ahead of time and then not needed
    prefill_tokens: int = 0  # of prompts that went through the model
    statuses: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)  # decided attempts by prompt
    accepted_by_prompt: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counts:
        """What `vars` made of one, and JSON of that."""
        typed: dict[str, Any] = {k: Counter(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return cls(**typed)

    def add(self, row: Mapping[str, Any]) -> None:
        self.attempts += 1
        self.kept += row["kept"]
        self.kept_tokens += len(row["token_ids"]) if row["kept"] else 0
        self.leaks += row["leak"]
        self.statuses[row["status"]] += 1
        self.prompts[row["prompt"]] += 1
        self.accepted_by_prompt[row["prompt"]] += row["status"] == "accepted"

    def summary(self) -> dict[str, Any]:
        """What the journal and the metrics keep."""
        acceptance = {p: self.accepted_by_prompt[p] / n for p, n in sorted(self.prompts.items())}
        return {
            "questions": self.questions,
            "solved": self.solved,
            "attempts": self.attempts,
            "kept": self.kept,
            "kept_length": self.kept_tokens / self.kept if self.kept else None,
            "leaks": self.leaks,
            "tokens": self.tokens,
            "cancelled_tokens": self.cancelled_tokens,
            "prefill_tokens": self.prefill_tokens,
            "statuses": dict(sorted(self.statuses.items())),
            "acceptance": acceptance,
        }


@dataclass(eq=False)
class _Search:
    """The attempts at one question: decided ones first, then those in flight (some of which may have finished)."""

    question: Question
    attempts: list[Attempt] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[int, Prompt] = field(default_factory=dict)
    in_flight: dict[int, Request] = field(default_factory=dict)
    finished: dict[int, Completion] = field(default_factory=dict)
    prompt_ids: dict[Prompt, list[int]] = field(default_factory=dict)
    done: bool = False
