"""The samplers of the E-step: how a rationale that reaches the right answer is looked for.

    minem train --sampler rsm --budget 8        # or star, pps, or your own: --sampler module:Class

A sampler is a small pure object. Given a question and its attempts so far it returns what to try next: a draw from the
"plain" prompt, a draw from the "hinted" prompt (which shows the answer), or None when it is done with the question.
It knows neither the model nor the generator, and must depend on nothing but its arguments: the E-step asks ahead of
time to keep the hardware busy, and asks again once the truth is known.

    rsm    1..M plain draws                              the model itself: accepted draws follow the exact posterior
    star   1 plain draw, hinted ones if it is rejected   the model, else the model shown the answer
    pps    hinted draws                                  the model shown the answer

Source: "Learning to Reason in LLMs by Expectation Maximization", arXiv 2512.20169v1. `budget` is the most attempts at a
question in one iteration; draws="all" spends it. Only star still stops at an accepted plain draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from minem.config import SamplerSection
from minem.data.tasks import Question
from minem.em.sample import Prompt
from minem.errors import UserError
from minem.plugins import import_object


@dataclass(frozen=True)
class Attempt:
    """One finished draw for a question."""

    prompt: Prompt
    accepted: bool
    answer: str | None = None  # the label it stated, None when unparsed
    status: str = "wrong"  # "accepted" | "wrong" | "unparsed" | "truncated"
    text: str = ""


class Sampler(Protocol):
    """What the E-step asks of a sampler. `prompts`, if it has them, are those it draws from; else both are assumed."""

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        """The prompt of the next attempt, or None when the question is done. Pure: same arguments, same answer."""


@dataclass(frozen=True)
class Budgeted:
    """Base of the three: stops at the first accepted draw (draws="first") or when the budget is spent."""

    budget: int
    draws: Literal["first", "all"] = "first"
    prompts: ClassVar[Sequence[Prompt]] = ("plain", "hinted")

    def next(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        if len(attempts) >= self.budget or (self.draws == "first" and any(a.accepted for a in attempts)):
            return None
        return self.propose(question, attempts)

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        """As `next`, for an open question: unless a subclass decides otherwise, the first of its prompts each time."""
        return self.prompts[0]


class RejectionSampling(Budgeted):
    """rsm: rejection sampling with a budget of M plain draws; accepted ones follow the exact posterior."""

    prompts = ("plain",)


class SelfTaughtReasoner(Budgeted):
    """star: one plain draw; only if it was rejected, draws that are shown the answer (Zelikman et al. 2022)."""

    def propose(self, question: Question, attempts: Sequence[Attempt]) -> Prompt | None:
        if not attempts:
            return "plain"
        return None if attempts[0].accepted else "hinted"


class PromptPosteriorSampling(Budgeted):
    """pps: every draw is shown the answer."""

    prompts = ("hinted",)


SAMPLERS = {"rsm": RejectionSampling, "star": SelfTaughtReasoner, "pps": PromptPosteriorSampling}


def make_sampler(name: str, budget: int, draws: Literal["first", "all"] = "first") -> Sampler:
    """The sampler called `name`, or the user's own class by "module:Class". UserError if it cannot be built."""
    if name in SAMPLERS:
        return SAMPLERS[name](budget, draws)
    made = import_object(name, "sampler.name", ", ".join(SAMPLERS))
    try:
        sampler = made(budget=budget, draws=draws)
    except Exception as error:  # a user's code may raise anything
        built = f"{name}(budget={budget}, draws={draws!r})"
        raise UserError(f"sampler.name {name!r} cannot be built as {built}: {error}") from error
    if not callable(getattr(sampler, "next", None)):
        raise UserError(f"sampler.name {name!r} has no method next(question, attempts)")
    return sampler


def prompts_of(sampler: Sampler) -> Sequence[str]:
    """The prompts that it may draw from."""
    return getattr(sampler, "prompts", ("plain", "hinted"))


_ALTERING = ("temperature", "top_k", "top_p", "min_p", "stop", "filter", "drop_leaks", "min_rationale_tokens")


def altered(section: SamplerSection, shots: str = "none") -> list[str]:
    """What makes accepted draws follow another distribution than the trained prompt's posterior: by default nothing."""
    usual = SamplerSection()
    values = {key: getattr(section, key) for key in _ALTERING}
    found = [f"sampler.{key} = {value}" for key, value in values.items() if value != getattr(usual, key)]
    return [*found, *(["task.shots = proposal"] if shots == "proposal" else [])]
