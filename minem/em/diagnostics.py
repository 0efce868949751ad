"""Diagnostics of an iteration: what hinted draws on a few fixed questions say about the model. They change nothing.

    minem train --set eval.diagnostics=32 --set eval.hinted_draws=4     # the defaults; eval.diagnostics=0: off

Between the E-step and the M-step, so at theta_old, each of the same few training questions gets K hinted draws, K
fixed in advance, and one plain draw, all at temperature 1 from random streams of their own. A hinted draw (z, y) that
is accepted has the importance weight w = pi(z, y | x) / q(z, y | x, y*), a rejected one has 0: log q is the
log-probability under the hinted prompt as drawn, log pi that of the very same token ids under the plain prompt, from
one teacher-forced pass. The mean of w estimates p(y* | x) without bias where q covers the posterior. The lazy attempts
of a sampler cannot serve: they stop at a success, so their mean would be too high.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minem.console import percent
from minem.data.prompts import encode_prompt
from minem.data.tasks import Question, Task
from minem.data.verdict import Verdict, states_early
from minem.em.estep import judge
from minem.em.packing import Example
from minem.em.sample import Prompt, Sample
from minem.em.scoring import score
from minem.generation.generator import Generator
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.statistics import importance

# What each number is called and says, wherever it is shown.
EXPLAINED: dict[str, tuple[str, str]] = {
    "p_hat": (
        "p-hat",
        "Estimate of p(y*|x), the chance that a plain draw is right, from hinted draws weighted by pi/q; unbiased "
        "where the hint can lead to every rationale that the model would find by itself.",
    ),
    "plain": ("plain acceptance", "The same chance counted directly, from one plain draw per question."),
    "all_rejected": (
        "all rejected",
        "Share of the questions whose hinted draws were all rejected, so that p-hat knows nothing of them and is 0.",
    ),
    "ess": (
        "effective sample size",
        "How many of the hinted draws of a question count in its p-hat, over questions with an accepted one: near 1 a "
        "single weight decides.",
    ),
    "hinted": (
        "hinted acceptance",
        "Share of the hinted draws that reach the given answer; training on plain prompts can unteach the use of a "
        "hint.",
    ),
    "early": (
        "answer stated early",
        "Share of the kept rationales that state the answer in their first fifth: reasoning after the fact.",
    ),
    "entropy": (
        "entropy",
        "Mean entropy of the policy per token of its plain draws, in nats; near 0 all draws are the same.",
    ),
}
FALLING_RULE = "its mean change over the questions, each compared with itself, is more than two standard errors below 0"


@dataclass(frozen=True)
class Draw:
    """One draw of the diagnostics with its log-probabilities, summed over its tokens."""

    id: str
    prompt: Prompt
    accepted: bool
    log_q: float  # under the prompt and the model it was drawn with
    log_p: float  # under the plain prompt and the model that is trained: log pi(z, y | x)
    entropies: tuple[float, ...]  # of the policy at each token, nats


def choose(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """The n training questions that a run's diagnostics look at in every iteration."""
    return sorted(questions, key=lambda question: stream_seed(seed, "diagnostics", question.id))[:n]


@dataclass(frozen=True)
class Diagnosis:
    """The draws that a run's diagnostics make in every iteration.

    policy, proposal: the generators of plain and of hinted draws; two if hinted draws come from the base model.
    pack_tokens: most tokens of a teacher-forced pass (memory only).
    """

    questions: Sequence[Question]
    policy: Generator
    proposal: Generator
    verdict: Verdict
    hint: str
    hinted_draws: int
    max_new_tokens: int
    pack_tokens: int
    seed: int

    @property
    def total(self) -> int:
        return len(self.questions) * (self.hinted_draws + 1)

    def draw(
        self, iteration: int, questions: Sequence[Question], show: Callable[..., None] = lambda done: None
    ) -> list[Draw]:
        """`hinted_draws` draws from the hinted and one from the plain prompt of each question, the hinted ones first.

        Questions whose hinted prompt leaves no room for `max_new_tokens` are left out.
        show: called with the finished draws after every decoding step.
        """
        requests = [request for question in questions for request in self._requests(iteration, question)]
        for request in requests:
            (self.policy if request.tag[1] == "plain" else self.proposal).submit(request)
        finished: dict[int, Completion] = {}
        while len(finished) < len(requests):
            for generator in dict.fromkeys((self.policy, self.proposal)):
                finished |= {id(completion.request): completion for completion in generator.step()}
            show(len(finished))
        completions = [finished[id(request)] for request in requests]
        examples = [Example(r.tag[0].id, r.tag[2], c.token_ids) for r, c in zip(requests, completions, strict=True)]
        scored = score(self.policy.model, examples, self.pack_tokens)
        return [
            Draw(
                id=request.tag[0].id,
                prompt=request.tag[1],
                accepted=judge(completion, request.tag[0], self.verdict)[1] == "accepted",
                log_q=math.fsum(completion.proposal_logprobs),
                log_p=math.fsum(logprobs),
                entropies=tuple(entropies),
            )
            for request, completion, (logprobs, entropies) in zip(requests, completions, scored, strict=True)
        ]

    def _requests(self, iteration: int, question: Question) -> list[Request]:
        plain, hinted = (encode_prompt(self.policy.tokenizer, question, hint) for hint in (None, self.hint))
        if len(hinted) + self.max_new_tokens > self.proposal.max_length:
            return []
        params = SamplingParams(max_new_tokens=self.max_new_tokens)
        streams = [
            stream_seed(self.seed, "diagnostics", iteration, question.id, k) for k in range(self.hinted_draws + 1)
        ]
        return [
            *(Request(hinted, params, stream, tag=(question, "hinted", plain)) for stream in streams[1:]),
            Request(plain, params, streams[0], tag=(question, "plain", plain)),
        ]

    def summary(
        self,
        draws: Sequence[Draw],
        samples: Sequence[Sample],
        kept: Sequence[Sample],
        task: Task,
        first: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """`summarise` of the draws, what the samples of the iteration show, and whether hinted acceptance is falling.

        first: the summary of iteration 1, None in that iteration.
        """
        questions = {question.id: question for question in task.train}
        found = summarise(draws)
        found["early"] = _mean([float(states_early(sample.text, questions[sample.id])) for sample in kept])
        found["attempts"] = acceptance(samples)
        return found | {"falling": falling(first or found, found)}


def summarise(draws: Iterable[Draw]) -> dict[str, Any]:
    """The numbers of EXPLAINED, but for "early", and the accepted hinted draws of each question, as the journal keeps.

    None where there is nothing to know it from.
    """
    by_question: dict[str, list[Draw]] = {}
    plain = []
    for one in draws:
        if one.prompt == "plain":
            plain.append(one)
        else:
            by_question.setdefault(one.id, []).append(one)
    estimates = [
        importance([d.log_q for d in group], [d.log_p for d in group], [d.accepted for d in group])
        for group in by_question.values()
    ]
    accepted = {id_: sum(d.accepted for d in group) for id_, group in by_question.items()}
    hinted_draws = len(next(iter(by_question.values()), ()))
    return {
        "questions": len(estimates),
        "hinted_draws": hinted_draws,
        "p_hat": _mean([p_hat for p_hat, _ in estimates]),
        "plain": _mean([float(d.accepted) for d in plain]),
        "all_rejected": _mean([float(ess == 0) for _, ess in estimates]),
        "ess": _mean([ess for _, ess in estimates if ess]),
        "hinted": _mean([count / hinted_draws for count in accepted.values()]),
        "entropy": _mean([entropy for d in plain for entropy in d.entropies]),
        "hinted_accepted": accepted,
    }


def acceptance(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Acceptance by stage: how many samples were drawn and accepted at each prompt and attempt."""
    drawn: Counter[tuple[str, int]] = Counter()
    right: Counter[tuple[str, int]] = Counter()
    for sample in samples:
        stage = sample.prompt, sample.attempt
        drawn[stage] += 1
        right[stage] += sample.status == "accepted"
    return [
        {"prompt": prompt, "attempt": attempt, "drawn": drawn[prompt, attempt], "accepted": right[prompt, attempt]}
        for prompt, attempt in sorted(drawn, key=lambda stage: (stage[0] != "plain", stage[1]))
    ]


def falling(first: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether hinted acceptance fell from one `summarise` to another by more than its noise: see FALLING_RULE.

    Draws of one question are alike, so the question is the unit: its change in accepted draws, paired, with the usual
    standard error of a mean. Never with fewer than 8 questions.
    """
    before, after = first["hinted_accepted"], now["hinted_accepted"]
    changes = [after[id_] - before[id_] for id_ in before.keys() & after.keys()]
    n = len(changes)
    if n < 8:
        return False
    mean = sum(changes) / n
    error = math.sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1) / n)
    return mean + 2 * error < 0


def shown(summary: Mapping[str, Any], key: str) -> str:
    """A number of `summarise` as it is printed, under its name in EXPLAINED."""
    value = summary.get(key)
    if value is None:
        return "-"
    if key == "ess":
        return f"{value:.2f} of {summary['hinted_draws']}"
    return f"{value:.3f}" if key == "entropy" else percent(value)


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The line of progress."""
    return {label: shown(summary, key) for key, (label, _) in EXPLAINED.items()}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
