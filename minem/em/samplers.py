"""The samplers of the E-step: how a rationale that reaches the right answer is looked for.

    minem train --sampler rsm --budget 8        # or star, pps, or your own: --sampler module:Class

A sampler is a small pure object. Given a question and its attempts so far it says what to try next: a draw from the
"plain" prompt, a draw from the "hinted" prompt (which shows the answer), or None when it is done with the question.
It knows neither the model nor the generator, and must depend on nothing but its arguments: the E-step asks ahead of
time to keep the hardware busy, and asks again once the truth is known.

    name   attempts                                  q, the proposal
    rsm    1..M plain                                the model itself: accepted draws follow the exact posterior
    star   1 plain, then hinted if it was rejected   the model, else the model shown the answer (Zelikman et al. 2022)
    pps    hinted                                    the model shown the answer

Source: "Learning to Reason in LLMs by Expectation Maximization", arXiv 2512.20169v1. `budget` is the most attempts a
question may cost in one iteration. With draws="all" the budget is spent and every accepted draw is kept; star then
still stops at an accepted plain draw, since it hints only where the model failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from minem.config import SamplerSection, default_budget
from minem.errors import UserError
from minem.plugins import import_object

if TYPE_CHECKING:
    from minem.data.tasks import Question

Prompt = Literal["plain", "hinted"]


@dataclass(frozen=True)
class Attempt:
    """One finished draw for a question."""

    prompt: Prompt
    accepted: bool
    answer: str | None = None  # the label it stated, None when unparsed
    status: str = "wrong"  # "accepted" | "wrong" | "unparsed" | "truncated"
    text: str = ""


class Sampler(Protocol):
    """What the E-step asks of a sampler; any object with this method will do."""

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        """The prompt of the next attempt, or None when the question is done. Pure: same arguments, same answer."""


@dataclass(frozen=True)
class Budgeted:
    """Base of the three: stops at the first accepted draw (draws="first") or when the budget is spent."""

    budget: int
    draws: Literal["first", "all"] = "first"

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        if len(attempts) >= self.budget or (self.draws == "first" and any(a.accepted for a in attempts)):
            return None
        return self.propose(question, attempts)

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        raise NotImplementedError


class RejectionSampling(Budgeted):
    """rsm: rejection sampling with a budget of M plain draws."""

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        return "plain"


class SelfTaughtReasoner(Budgeted):
    """star: one plain draw; only where it was rejected, draws that are shown the answer."""

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        if not attempts:
            return "plain"
        return None if attempts[0].accepted else "hinted"


class PromptPosteriorSampling(Budgeted):
    """pps: every draw is shown the answer."""

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        return "hinted"


SAMPLERS: dict[str, type[Budgeted]] = {
    "rsm": RejectionSampling,
    "star": SelfTaughtReasoner,
    "pps": PromptPosteriorSampling,
}


def make_sampler(name: str, budget: int | None = None, draws: Literal["first", "all"] = "first") -> Sampler:
    """The sampler called `name`, or the user's own class by "module:Class", built as Class(budget=..., draws=...).

    Raises:
        UserError: no such sampler, or the class cannot be imported or built.
    """
    budget = default_budget(name) if budget is None else budget
    if name in SAMPLERS:
        return SAMPLERS[name](budget, draws)
    made = import_object(name, "sampler.name", ", ".join(SAMPLERS))
    try:
        sampler = made(budget=budget, draws=draws)
    except Exception as error:  # the user's own code: whatever it raises
        raise UserError(
            f"sampler.name {name!r} cannot be built as {name}(budget={budget}, draws={draws!r}): {error}"
        ) from error
    if not callable(getattr(sampler, "next", None)):
        raise UserError(f"sampler.name {name!r} has no method next(question, attempts)")
    return sampler


def altered(sampler: SamplerSection) -> list[str]:
    """What makes accepted draws follow another distribution than the model's own posterior: none by default.

    The gradients that EM promises are those at temperature 1, over the whole vocabulary, filtered by the answer.
    """
    switches = {
        "sampler.temperature": (sampler.temperature, 1.0),
        "sampler.top_k": (sampler.top_k, 0),
        "sampler.top_p": (sampler.top_p, 1.0),
        "sampler.min_p": (sampler.min_p, 0.0),
        "sampler.filter": (sampler.filter, "correct"),
        "sampler.drop_leaks": (sampler.drop_leaks, False),
    }
    return [f"{key} = {value}" for key, (value, usual) in switches.items() if value != usual]
