"""The E-step: a sampler meets the generator. Samples come out.

    minem sample --sampler rsm --budget 8          # the E-step alone

Attempts are lazy: one draw per question is in flight, and the next begins once the sampler knows how that one ended.
Only when slots of the generator would be idle are further attempts started ahead of time, on the assumption that the
ones before them fail. Attempts are *decided* in the order of their index, whichever finishes first, and everything
above the accepted one is cancelled and forgotten: accepting the earliest finisher instead would prefer short
rationales. So the samples are those of drawing one attempt after the other, for any number of slots.

Towards the end slots run empty, and the answers that begin last decide how long that lasts: those that are expected to
be longest begin first. (Not the hardest: the attempts they have left can run side by side.) A long E-step is drawn in
blocks of questions, each on the disk before the next begins; every block has such an end, so it must be long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minem.config import SamplerSection
from minem.data.prompts import encode_prompt
from minem.data.tasks import Question, Task
from minem.data.toy.check import valid_share
from minem.data.verdict import Verdict, cites_hint
from minem.em.sample import Prompt, Sample, Status
from minem.em.samplers import Attempt, Sampler, altered
from minem.em.scoring import DRAWS, agreement
from minem.em.weighting import plain_logprobs
from minem.errors import UserError
from minem.generation.generator import Generator
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.model.tokenizer import Tokenizer

BLOCK_ROUNDS = 16  # questions of a block for each slot, at least: its end, when slots run empty, is some 5 % of it


def minibatch(questions: Sequence[Question], size: int | None, seed: int, iteration: int) -> list[Question]:
    """The questions that an iteration (counted from 1) draws on: the next `size` of a shuffle, in the given order.

    Every pass through the questions has a shuffle of its own and ends before any question comes again; an iteration
    that begins in one pass and ends in the next takes no question twice. All if size is None, or no fewer.
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


def judge(completion: Completion, question: Question, verdict: Verdict) -> tuple[str | None, Status]:
    """The answer that a completion states and its status: the reward is 1 for "accepted" alone.

    A draw that was cut off at the limit is rejected even if an answer can be read from it: it has no EOS, so it is not
    an outcome of the policy.
    """
    answer = verdict(completion.text, question)
    if completion.finish_reason != "stop":
        return answer, "truncated"
    if answer is None:
        return answer, "unparsed"
    return answer, "accepted" if answer == question.gold else "wrong"


@dataclass
class EStep:
    """The E-step: `begin` an iteration, then `run` it on questions.

    generators: which generator draws from which prompt; two if hinted draws come from the base model.
    score_plain: also compute logprob_plain of kept hinted samples, which importance weights need.
    pack_tokens: most tokens of a teacher-forced pass (memory only).
    """

    sampler: Sampler
    section: SamplerSection
    generators: Mapping[Prompt, Generator]
    verdict: Verdict
    seed: int
    score_plain: bool = False
    pack_tokens: int = 8192
    iteration: int = field(default=0, init=False)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.generators["plain"].tokenizer

    @property
    def params(self) -> SamplingParams:
        keys = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
        return SamplingParams(**{key: getattr(self.section, key) for key in keys})

    def begin(
        self, iteration: int, questions: Sequence[Question] = (), earlier: Iterable[Sequence[Sample]] = ()
    ) -> None:
        """Start an iteration, counted from 1.

        earlier: the samples of the iterations before, the newest first. Questions whose answers were longest when they
            were last drawn begin first, which changes nothing else.
        """
        self.iteration = iteration
        self.counts: Counter[str] = Counter()  # of all that this process draws, for the line of progress
        self.lengths: dict[str, float] = {}  # by question id, mean tokens of its last draws
        self.unchecked = iteration == 1
        unknown = {question.id for question in questions}
        for samples in earlier:
            lengths: dict[str, list[int]] = {}
            for sample in samples:
                lengths.setdefault(sample.id, []).append(len(sample.token_ids))
            self.lengths = {id_: sum(tokens) / len(tokens) for id_, tokens in lengths.items()} | self.lengths
            unknown -= lengths.keys()
            if not unknown:
                break

    def blocks(self, questions: int) -> int:
        """In how many blocks to draw on them."""
        return max(1, questions // (BLOCK_ROUNDS * self.generators["plain"].slots))

    def expected(self, question: Question) -> float:
        """Tokens that its answer is expected to have."""
        return self.lengths.get(question.id, 1.0)

    def keeps(self, sample: Sample) -> bool:
        """Whether the M-step trains on it: the filter, r(y, y*)."""
        if self.section.filter == "none":
            return True
        return sample.status == "accepted" and not (sample.leak and self.section.drop_leaks)

    def run(
        self, questions: Sequence[Question], show: Callable[..., None] = lambda done, **facts: None
    ) -> tuple[list[Sample], dict[str, float]]:
        """Attempt every question.

        show: called after every decoding step with the decided questions and the facts of the line of progress.
        Returns the decided attempts by question and attempt, and the counts of what the generators did: tokens (all
        that were drawn), cancelled_tokens, prefill_tokens.
        """
        search = _Search(self, questions)
        try:
            search.attempt_all(show)
        except BaseException:
            search.cancel_all()  # or the next E-step would receive what is left of this one
            raise
        samples = [sample for state in search.states for sample in state.samples]
        model = self.generators["plain"].model
        if self.score_plain:
            kept = [i for i, sample in enumerate(samples) if self.keeps(sample)]
            by_id = {question.id: question for question in questions}
            scored = plain_logprobs([samples[i] for i in kept], by_id, model, self.tokenizer, self.pack_tokens)
            for i, sample in zip(kept, scored, strict=True):
                samples[i] = sample
        if self.unchecked and search.checked:
            found = agreement(model, search.checked, self.pack_tokens)
            found.require(model.dtype)
            search.counts |= {"logprob_difference": found.difference, "policy_kl": found.kl}
        self.unchecked = False
        return samples, search.counts

    def summary(
        self, task: Task, samples: Sequence[Sample], kept: Sequence[Sample], counts: Mapping[str, float]
    ) -> dict[str, Any]:
        """The numbers of an iteration that the journal and the metrics keep; `counts` as `run` returns them."""
        drawn = Counter(sample.prompt for sample in samples)
        accepted = [sample for sample in samples if sample.status == "accepted"]
        right = Counter(sample.prompt for sample in accepted)
        return {
            "solved": len({sample.id for sample in accepted}),
            "attempts": len(samples),
            "kept": len(kept),
            "kept_length": sum(len(sample.token_ids) for sample in kept) / len(kept) if kept else None,
            "leaks": sum(sample.leak for sample in samples),
            **counts,
            "statuses": dict(sorted(Counter(sample.status for sample in samples).items())),
            "acceptance": {prompt: right[prompt] / n for prompt, n in sorted(drawn.items())},
            "valid": valid_share(task, [(sample.id, sample.text) for sample in kept]),
            "altered": altered(self.section),
        }

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        """What the sampler wants next, within the budget.

        Raises UserError if it fails, or wants something that is no prompt.
        """
        if len(attempts) >= self.section.budget:
            return None
        try:
            wanted = self.sampler.next(question, attempts)
        except Exception as error:  # a user's sampler may raise anything
            raise UserError(f"the sampler raised {error!r} on question {question.id!r}") from error
        if wanted is not None and wanted not in ("plain", "hinted"):
            raise UserError(f"the sampler asked for {wanted!r}; next() must return 'plain', 'hinted' or None")
        return wanted

    def sample(self, completion: Completion, question: Question, prompt: Prompt, index: int) -> Sample:
        answer, status = judge(completion, question, self.verdict)
        return Sample(
            id=question.id,
            iteration=self.iteration,
            attempt=index + 1,
            prompt=prompt,
            token_ids=completion.token_ids,
            logprob_q=sum(completion.proposal_logprobs),
            logprob_plain=sum(completion.logprobs) if prompt == "plain" else None,
            text=completion.text,
            answer=answer,
            gold=question.gold,
            status=status,
            leak=prompt == "hinted" and cites_hint(completion.text),
        )


@dataclass(eq=False)
class _State:
    """The attempts at one question: decided ones first, then those in flight (some of which may have finished)."""

    question: Question
    attempts: list[Attempt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    prompts: dict[int, Prompt] = field(default_factory=dict)
    in_flight: dict[int, Request] = field(default_factory=dict)
    finished: dict[int, Completion] = field(default_factory=dict)
    prompt_ids: dict[Prompt, list[int]] = field(default_factory=dict)
    done: bool = False


class _Search:
    """The questions of one `EStep.run` and what is in flight for them."""

    def __init__(self, step: EStep, questions: Sequence[Question]) -> None:
        self.step = step
        self.counts: dict[str, float] = {
            "questions": len(questions),
            "tokens": 0,
            "cancelled_tokens": 0,
            "prefill_tokens": 0,
        }
        self.checked: list[Completion] = []
        self.states = [_State(question) for question in questions]
        self.generators = list(dict.fromkeys(step.generators.values()))
        self.decided = 0  # questions

    def attempt_all(self, show: Callable[..., None]) -> None:
        prefilled = sum(generator.prefill_tokens for generator in self.generators)
        for state in sorted(self.states, key=lambda s: -self.step.lengths.get(s.question.id, 0.0)):
            self._advance(state)
        while self.decided < len(self.states):
            self._fill_idle_slots()
            for generator in self.generators:
                for completion in generator.step():
                    self._receive(completion)
            show(self.decided, **self._facts())
        for generator in self.generators:  # what was cancelled last still has to come out
            for completion in generator:
                self._receive(completion)
        self.counts["prefill_tokens"] = sum(generator.prefill_tokens for generator in self.generators) - prefilled
        show(self.decided, **self._facts())

    def cancel_all(self) -> None:
        for state in self.states:
            self._cancel_from(state, 0)

    def _facts(self) -> dict[str, str | float]:
        """The line of progress: what all `run`s of the step have come to so far."""
        counts = self.step.counts
        return {
            "solved": f"{100 * counts['solved'] / max(1, counts['done']):.1f} %",
            "accepted": f"{100 * counts['accepted'] / max(1, counts['attempts']):.1f} %",
            "tokens": counts["tokens"],
        }

    def _receive(self, completion: Completion) -> None:
        assert completion.request is not None
        state, index = completion.request.tag
        self.counts["tokens"] += len(completion.token_ids)
        self.step.counts["tokens"] += len(completion.token_ids)
        if state.in_flight.get(index) is not completion.request:
            self.counts["cancelled_tokens"] += len(completion.token_ids)
            return
        state.finished[index] = completion
        self._advance(state)

    def _advance(self, state: _State) -> None:
        """Decide what can be decided, in the order of attempts, and start the next attempt if it is not under way."""
        while True:
            index = len(state.attempts)
            wanted = self.step.next(state.question, state.attempts)
            if wanted is None:
                self._cancel_from(state, index)
                state.done = True
                self.decided += 1
                self.step.counts["done"] += 1
                self.step.counts["solved"] += any(a.status == "accepted" for a in state.attempts)
                return
            if state.prompts.get(index) != wanted:  # not started, or started on an assumption that did not hold
                self._cancel_from(state, index)
                self._start(state, index, wanted, first=index > 0)
            if index not in state.finished:
                return
            self._decide(state, index)

    def _decide(self, state: _State, index: int) -> None:
        completion, prompt = state.finished.pop(index), state.prompts[index]
        del state.in_flight[index]
        own = self.step.generators[prompt] is self.step.generators["plain"]  # not a copy of the base model
        if own and self.step.unchecked and len(self.checked) < DRAWS:
            self.checked.append(completion)
        sample = self.step.sample(completion, state.question, prompt, index)
        state.samples.append(sample)
        state.attempts.append(Attempt(prompt, self.step.keeps(sample), sample.answer, sample.status, sample.text))
        self.step.counts["attempts"] += 1
        self.step.counts["accepted"] += sample.status == "accepted"

    def _start(self, state: _State, index: int, prompt: Prompt, first: bool) -> None:
        step, generator = self.step, self.step.generators[prompt]
        if prompt not in state.prompt_ids:
            hint = step.section.hint if prompt == "hinted" else None
            state.prompt_ids[prompt] = encode_prompt(generator.tokenizer, state.question, hint)
        seed = stream_seed(step.seed, step.iteration, state.question.id, index + 1)
        request = Request(state.prompt_ids[prompt], step.params, seed, tag=(state, index))
        try:
            generator.submit(request, first=first)
        except UserError as error:
            raise UserError(f"question {state.question.id!r}: {error}") from error
        state.in_flight[index] = request
        state.prompts[index] = prompt

    def _cancel_from(self, state: _State, index: int) -> None:
        """Give up all attempts from `index` on."""
        for later in [i for i in state.in_flight if i >= index]:
            request, prompt = state.in_flight.pop(later), state.prompts.pop(later)
            if later in state.finished:
                self.counts["cancelled_tokens"] += len(state.finished.pop(later).token_ids)
            else:
                self.step.generators[prompt].cancel(request)

    def _fill_idle_slots(self) -> None:
        """Start attempts ahead of time if slots would be idle, one more for each open question in turn."""
        idle = {generator: generator.idle_slots for generator in self.generators}
        if not all(idle.values()):  # of two generators the second may have nothing to do yet: that is no reason
            return
        waiting = sorted((s for s in self.states if not s.done), key=lambda s: len(s.in_flight))
        while waiting and any(idle.values()):
            still = []
            for state in waiting:
                index = len(state.attempts) + len(state.in_flight)
                assumed = [Attempt(state.prompts[i], accepted=False) for i in range(len(state.attempts), index)]
                prompt = self.step.next(state.question, [*state.attempts, *assumed])
                if prompt is None or not idle[self.step.generators[prompt]]:
                    continue
                self._start(state, index, prompt, first=False)
                idle[self.step.generators[prompt]] -= 1
                still.append(state)
            waiting = still
