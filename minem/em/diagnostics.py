"""Diagnostics of an iteration: what hinted draws on a few fixed questions show of the model. They change nothing.

    minem train --set eval.diagnostics=32 --set eval.hinted_draws=4     # 32 questions, 4 draws each; 0: off

Between the E-step and the M-step, so at theta_old, the same few training questions get K hinted draws, K fixed in
advance, and one plain draw each, all at temperature 1. A hinted draw (z, y) that is accepted has the importance weight
w = pi(z, y | x) / q(z, y | x, y*), a rejected one has 0: log q is the log-probability under the hinted prompt as drawn,
log pi that of the same token ids under the plain prompt, from one teacher-forced pass. The mean of w estimates
p(y* | x) without bias if q covers the posterior. A sampler stops at a success, so its mean would be too high.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minem.console import percent
from minem.data.tasks import Question, Task
from minem.data.verdict import states_early
from minem.em.estep import EStep, judge
from minem.em.packing import Example
from minem.em.sample import Prompt, Sample
from minem.em.scoring import score
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.statistics import importance, mean, standard_deviation

# The name and the meaning of each number.
EXPLAINED: dict[str, tuple[str, str]] = {
    "p_hat": ("p-hat", "Estimate of p(y*|x) by hinted draws weighted by pi/q; unbiased if hints exclude no rationale."),
    "plain": ("plain acceptance", "p(y*|x), the chance that a plain draw is right, counted: one draw per question."),
    "all_rejected": ("all rejected", "Share of questions without an accepted hinted draw: their p-hat is 0."),
    "ess": ("effective sample size", "Hinted draws that count in the p-hat of a question; near 1 one weight decides."),
    "hinted": ("hinted acceptance", "Share of hinted draws that reach the answer; training can unteach using a hint."),
    "early": ("answer stated early", "Share of kept rationales that state the answer in their first fifth."),
    "entropy": ("entropy", "Mean entropy of the policy per token of plain draws, in nats; near 0 all draws are equal."),
}
CAUTION = 1.5  # the next questions may take longer than those before
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
    """The draws that a run's diagnostics make in every iteration: of the E-step's generators, at temperature 1."""

    questions: Sequence[Question]
    estep: EStep
    hinted_draws: int

    @property
    def total(self) -> int:
        return len(self.questions) * (self.hinted_draws + 1)

    def draw(
        self,
        iteration: int,
        estep: Mapping[str, float],
        ranks: int,
        questions: Sequence[Question],
        show: Callable[..., None] = lambda done: None,
    ) -> list[Draw]:
        """`hinted_draws` draws from the hinted and one from the plain prompt of each question, the hinted ones first.

        In growing rounds, as long as the next one is expected to stay within a quarter of the E-step's tokens.
        Questions whose hinted prompt leaves no room for `max_new_tokens` are left out.
        estep: its counts, of all ranks. show: called with the finished draws after every decoding step.
        """
        draws: list[Draw] = []
        most, done = estep["tokens"] / 4 / ranks, 0
        left = most
        length = (estep["tokens"] - estep["cancelled_tokens"]) / estep["attempts"]
        mean_tokens = max(1, (1 + self.hinted_draws) * length)  # of a question
        while done < len(questions) and (size := min(max(1, done), int(left / (CAUTION * mean_tokens)))) > 0:
            draws += self._round(iteration, questions[done : done + size], len(draws), show)
            spent, done = sum(len(draw.entropies) for draw in draws), done + size
            left, mean_tokens = most - spent, max(1, spent / done)
        return draws

    def _round(
        self, iteration: int, questions: Sequence[Question], before: int, show: Callable[..., None]
    ) -> list[Draw]:
        requests = [request for question in questions for request in self._requests(iteration, question)]
        for request in requests:
            self.estep.generators[request.tag[1]].submit(request)
        finished: dict[Request | None, Completion] = {}
        while len(finished) < len(requests):
            for generator in dict.fromkeys(self.estep.generators.values()):
                finished |= {completion.request: completion for completion in generator.step()}
            show(before + len(finished))
        completions = [finished[request] for request in requests]
        examples = [Example(r.tag[0].id, r.tag[2], c.token_ids) for r, c in zip(requests, completions, strict=True)]
        scored = score(self.estep.generators["plain"].model, examples, self.estep.pack_tokens)
        draws = []
        for request, completion, (logprobs, entropies) in zip(requests, completions, scored, strict=True):
            question, prompt, _ = request.tag
            accepted = judge(completion, question, self.estep.verdict)[1] == "accepted"
            log_q, log_p = math.fsum(completion.proposal_logprobs), math.fsum(logprobs)
            draws.append(Draw(question.id, prompt, accepted, log_q, log_p, tuple(entropies)))
        return draws

    def _requests(self, iteration: int, question: Question) -> list[Request]:
        prompts, most = self.estep.prompts, self.estep.section.max_new_tokens
        plain, hinted = prompts.trained(question), prompts.drawn(question, hinted=True)
        if len(hinted) + most > self.estep.generators["hinted"].max_length:
            return []
        params = SamplingParams(max_new_tokens=most, stop=prompts.stop)
        requests = []
        for k in (*range(1, self.hinted_draws + 1), 0):
            prompt, ids = ("hinted", hinted) if k else ("plain", plain)
            stream = stream_seed(self.estep.seed, "diagnostics", iteration, question.id, k)
            requests.append(Request(ids, params, stream, tag=(question, prompt, plain)))
        return requests

    def summary(
        self, draws: list[Draw], kept: list[Sample], task: Task, first: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The numbers of an iteration that the journal keeps. first: those of iteration 1, None in that iteration."""
        questions = {question.id: question for question in task.train}
        found = summarise(draws)
        found["early"] = _mean([states_early(sample.text, questions[sample.id]) for sample in kept])
        return found | {"falling": falling(first or found, found)}


def summarise(draws: Iterable[Draw]) -> dict[str, Any]:
    """The numbers of EXPLAINED except "early", and the accepted hinted draws of each question. None: not known."""
    hinted: dict[str, list[Draw]] = {}
    plain: list[Draw] = []
    for one in draws:
        (plain if one.prompt == "plain" else hinted.setdefault(one.id, [])).append(one)
    estimates = [
        importance([d.log_q for d in group], [d.log_p for d in group], [d.accepted for d in group])
        for group in hinted.values()
    ]
    accepted = {id_: sum(d.accepted for d in group) for id_, group in hinted.items()}
    hinted_draws = len(next(iter(hinted.values()), ()))
    return {
        "questions": len(estimates),
        "hinted_draws": hinted_draws,
        "p_hat": _mean([p_hat for p_hat, _ in estimates]),
        "plain": _mean([d.accepted for d in plain]),
        "all_rejected": _mean([ess == 0 for _, ess in estimates]),
        "ess": _mean([ess for _, ess in estimates if ess]),
        "hinted": _mean([count / hinted_draws for count in accepted.values()]),
        "entropy": _mean([entropy for d in plain for entropy in d.entropies]),
        "hinted_accepted": accepted,
    }


def falling(first: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether hinted acceptance fell from one `summarise` to another by FALLING_RULE, over at least 8 questions."""
    # Draws of one question are alike, so the question is the unit.
    before, after = first["hinted_accepted"], now["hinted_accepted"]
    changes = [after[id_] - before[id_] for id_ in before.keys() & after.keys()]
    error = (standard_deviation(changes) or 0.0) / math.sqrt(max(1, len(changes)))
    return len(changes) >= 8 and mean(changes) + 2 * error < 0


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
    return mean(values) if values else None
