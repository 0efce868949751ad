"""The E-step: a sampler decides what to try, a generator draws it, and samples come out.

    minem sample --sampler rsm --budget 8          # the E-step alone

Attempts are lazy: one draw per question is in flight, and the next begins once the sampler knows how that one ended.
Only when slots of the generator would be idle are further attempts started ahead of time, on the assumption that the
ones before them fail. Attempts are *decided* in the order of their index, whichever finishes first, and everything
above the accepted one is cancelled and forgotten: accepting the earliest finisher instead would prefer short
rationales. So the samples are those of drawing one attempt after the other, for any number of slots.

Towards the end slots run empty, for as long as the answers that began last take: those that are expected to be longest
begin first. (Not the hardest: the attempts they have left can run side by side.) A long E-step is drawn in blocks of
questions, each on the disk before the next begins; every block has such an end, so it must be long.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minem.config import SamplerSection
from minem.console import percent
from minem.data.checks import valid_share
from minem.data.prompts import ANSWER_LINE, Prompts
from minem.data.tasks import Question, Task
from minem.data.verdict import Verdict, cites_hint
from minem.em.sample import Prompt, Sample, Status
from minem.em.samplers import Attempt, Sampler, altered, prompts_of
from minem.em.scoring import DRAWS, agreement
from minem.em.weighting import plain_logprobs
from minem.errors import UserError
from minem.generation.generator import Generator
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.model.tokenizer import Tokenizer
from minem.statistics import mean

SHORT = 5  # tokens before the answer line: accepted samples with fewer are counted, for they hold no rationale
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
        keys = [stream_seed(seed, "minibatch", len(stream) // len(questions), question.id) for question in questions]
        order = sorted(range(len(questions)), key=keys.__getitem__)
        first = [i for i in order if i not in begun][: size - len(begun)]
        stream += dict.fromkeys(first + order)  # those first, and each once
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


def rationale_tokens(text: str, tokenizer: Tokenizer) -> int:
    """The tokens of a text before its last "The best answer is", or before its last line if it states none."""
    stated = text.lower().rfind(ANSWER_LINE.lower())
    end = stated if stated >= 0 else text.rstrip().rfind("\n") + 1
    return len(tokenizer.encode(text[:end].rstrip(), add_special_tokens=False))


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
    prompts: Prompts
    verdict: Verdict
    seed: int
    score_plain: bool = False
    pack_tokens: int = 8192

    def begin(self, iteration: int, questions: Sequence[Question] = (), earlier: Iterable[list[Sample]] = ()) -> None:
        """Start an iteration, counted from 1. earlier: samples of those before, the newest first, for `expected`."""
        self.iteration = iteration
        self.progress: Counter[str] = Counter()  # of all `run`s
        self.unchecked = iteration == 1
        self.lengths: dict[str, float] = {}  # by question id, mean tokens of its last draws
        unknown = {question.id for question in questions}
        for samples in earlier:
            lengths: dict[str, list[int]] = {}
            for sample in samples:
                lengths.setdefault(sample.id, []).append(len(sample.token_ids))
            self.lengths |= {id_: mean(lengths[id_]) for id_ in unknown & lengths.keys()}
            unknown -= lengths.keys()
            if not unknown:
                break

    def blocks(self, questions: int) -> int:
        return max(1, questions // (BLOCK_ROUNDS * self.generators["plain"].slots))

    def expected(self, question: Question) -> float:
        return self.lengths.get(question.id, 1.0)  # tokens of its answer

    def keeps(self, sample: Sample) -> bool:
        """Whether the M-step trains on it: the filter, r(y, y*)."""
        least, leaks = self.section.min_rationale_tokens, self.section.drop_leaks
        right = sample.status == "accepted" and not (sample.leak and leaks)
        short = least and rationale_tokens(sample.text, self.prompts.tokenizer) < least
        return (right and not short) or self.section.filter == "none"

    def run(
        self, questions: Sequence[Question], show: Callable[..., None] = lambda done, **facts: None
    ) -> tuple[list[Sample], dict[str, float]]:
        """Attempt every question.

        show: called after every decoding step with the number of decided questions and facts for the line of progress.
        Returns the decided attempts in order, and counts: tokens (all that were drawn), cancelled_ and prefill_tokens.
        """
        search = _Search(self, questions)
        try:
            search.attempt_all(show)
        except BaseException:
            for state in search.states:  # or the next E-step would receive what is left of this one
                search.cancel(state)
            raise
        samples = [sample for state in search.states for sample in state.samples]
        model = self.generators["plain"].model
        if self.score_plain:
            show(len(questions), now="scoring the kept draws")
            kept = [sample for sample in samples if self.keeps(sample)]
            by_id = {question.id: question for question in questions}
            scored = iter(plain_logprobs(kept, by_id, model, self.prompts, self.pack_tokens))
            samples = [next(scored) if self.keeps(sample) else sample for sample in samples]
        if search.checked:
            show(len(questions), now="comparing generator and trainer")
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
        fewest = max(SHORT, self.section.min_rationale_tokens)
        return {
            "solved": len({sample.id for sample in accepted}),
            "attempts": len(samples),
            "kept": len(kept),
            "kept_length": mean([len(sample.token_ids) for sample in kept]) if kept else None,
            "leaks": sum(sample.leak for sample in samples),
            "short": sum(rationale_tokens(sample.text, self.prompts.tokenizer) < fewest for sample in accepted),
            **counts,
            "statuses": dict(sorted(Counter(sample.status for sample in samples).items())),
            "acceptance": {prompt: right[prompt] / n for prompt, n in sorted(drawn.items())},
            "valid": valid_share(task, [(sample.id, sample.text) for sample in kept]),
            "altered": altered(self.section, self.prompts.shots),
        }

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        """What the sampler wants next, within the budget. UserError if it fails, or returns what is no prompt."""
        if len(attempts) >= self.section.budget:
            return None
        try:
            wanted = self.sampler.next(question, attempts)
        except Exception as error:  # a user's sampler may raise anything
            raise UserError(f"the sampler raised {error!r} on question {question.id!r}") from error
        if wanted is not None and wanted not in prompts_of(self.sampler):
            names = " or ".join(map(repr, prompts_of(self.sampler)))
            raise UserError(
                f"the sampler asked for {wanted!r}; next() must return {names}, as its prompts are, or None"
            )
        return wanted


@dataclass(eq=False)
class _State:
    """A question and its attempts, decided or in flight. Some of those in flight may have finished."""

    question: Question
    attempts: list[Attempt] = field(default_factory=list)  # decided, as the sampler sees them
    samples: list[Sample] = field(default_factory=list)  # the same
    in_flight: dict[Request, Prompt] = field(default_factory=dict)  # in the order of their index
    finished: dict[Request, Completion] = field(default_factory=dict)
    prompt_ids: dict[Prompt, list[int]] = field(default_factory=dict)


class _Search:
    """The questions of one `EStep.run` and what is in flight for them."""

    def __init__(self, step: EStep, questions: Sequence[Question]) -> None:
        self.step = step
        keys = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
        self.params = SamplingParams(stop=step.prompts.stop, **{key: getattr(step.section, key) for key in keys})
        self.generators = list(dict.fromkeys(step.generators.values()))
        self.counts: dict[str, float] = {"questions": len(questions), "tokens": 0, "cancelled_tokens": 0}
        self.checked: list[Completion] = []  # to compare with the trainer
        self.states = [_State(question) for question in questions]
        self.open = dict.fromkeys(self.states)  # those that are not decided

    def attempt_all(self, show: Callable[..., None]) -> None:
        prefilled = sum(generator.prefill_tokens for generator in self.generators)
        for state in sorted(self.states, key=lambda state: -self.step.expected(state.question)):
            self._advance(state)
        while self.open:
            self._fill_idle_slots()
            for generator in self.generators:
                for completion in generator.step():
                    self._receive(completion)
            self._show(show)
        for generator in self.generators:  # what was cancelled last still has to come out
            for completion in generator:
                self._receive(completion)
        self.counts["prefill_tokens"] = sum(generator.prefill_tokens for generator in self.generators) - prefilled
        self._show(show)

    def cancel(self, state: _State) -> None:
        """Give up all attempts in flight."""
        for request, prompt in state.in_flight.items():
            if request in state.finished:
                self.counts["cancelled_tokens"] += len(state.finished.pop(request).token_ids)
            else:
                self.step.generators[prompt].cancel(request)
        state.in_flight.clear()

    def _show(self, show: Callable[..., None]) -> None:
        """Show what all `run`s of the step have come to so far."""
        counts = self.step.progress
        solved = percent(counts["solved"] / max(1, counts["done"]))
        accepted = percent(counts["accepted"] / max(1, counts["attempts"]))
        show(len(self.states) - len(self.open), solved=solved, accepted=accepted, tokens=counts["tokens"])

    def _receive(self, completion: Completion) -> None:
        request, drawn = completion.request, len(completion.token_ids)
        assert request is not None
        self.counts["tokens"] += drawn
        self.step.progress["tokens"] += drawn
        if request in request.tag.in_flight:
            request.tag.finished[request] = completion
            self._advance(request.tag)
        else:
            self.counts["cancelled_tokens"] += drawn

    def _advance(self, state: _State) -> None:
        """Decide what can be decided, in the order of attempts, and start the next attempt if it is not under way."""
        while wanted := self.step.next(state.question, state.attempts):
            request = next(iter(state.in_flight), None)
            if request is None or state.in_flight[request] != wanted:  # the assumption that it began on did not hold
                self.cancel(state)
                request = self._start(state, wanted, first=len(state.attempts) > 0)
            if request not in state.finished:
                return
            self._decide(state, request)
        self.cancel(state)
        del self.open[state]
        self.step.progress.update(done=1, solved=any(attempt.status == "accepted" for attempt in state.attempts))

    def _decide(self, state: _State, request: Request) -> None:
        step, question = self.step, state.question
        completion, prompt = state.finished.pop(request), state.in_flight.pop(request)
        own = step.generators[prompt] is step.generators["plain"]  # not a copy of the base model
        if own and step.unchecked and len(self.checked) < DRAWS:
            self.checked.append(completion)
        answer, status = judge(completion, question, step.verdict)
        sample = Sample(
            id=question.id,
            iteration=step.iteration,
            attempt=len(state.attempts) + 1,
            prompt=prompt,
            token_ids=completion.token_ids,
            logprob_q=sum(completion.proposal_logprobs),
            logprob_plain=sum(completion.logprobs) if prompt == "plain" and step.prompts.shots != "proposal" else None,
            text=completion.text,
            answer=answer,
            gold=question.gold,
            status=status,
            leak=prompt == "hinted" and cites_hint(completion.text),
        )
        state.samples.append(sample)
        state.attempts.append(Attempt(prompt, step.keeps(sample), answer, status, completion.text))
        step.progress.update(attempts=1, accepted=status == "accepted")

    def _start(self, state: _State, prompt: Prompt, first: bool = False) -> Request:
        step, question = self.step, state.question
        if prompt not in state.prompt_ids:
            state.prompt_ids[prompt] = step.prompts.drawn(question, hinted=prompt == "hinted")
        attempt = len(state.attempts) + len(state.in_flight) + 1
        seed = stream_seed(step.seed, step.iteration, question.id, attempt)
        request = Request(state.prompt_ids[prompt], self.params, seed, tag=state)
        step.generators[prompt].submit(request, first=first)
        state.in_flight[request] = prompt
        return request

    def _fill_idle_slots(self) -> None:
        """Start attempts ahead of time if slots would be idle, one more for each open question in turn."""
        idle = {generator: generator.idle_slots for generator in self.generators}
        if not all(idle.values()):  # of two generators the second may have nothing to do yet: that is no reason
            return
        waiting = sorted(self.open, key=lambda state: len(state.in_flight))
        while waiting and any(idle.values()):
            still = []
            for state in waiting:
                assumed = [Attempt(prompt, accepted=False) for prompt in state.in_flight.values()]
                wanted = self.step.next(state.question, [*state.attempts, *assumed])
                if wanted and idle[self.step.generators[wanted]]:
                    self._start(state, wanted)
                    idle[self.step.generators[wanted]] -= 1
                    still.append(state)
            waiting = still
