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

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from minem.data.prompts import DEFAULT_HINT, HINTS
from minem.errors import UserError, is_reference, one_of, require

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
DEFAULT_BUDGETS = {"rsm": 8, "star": 2, "pps": 1}


@dataclass(frozen=True)
class SamplerConfig:
    """How rationales are looked for, and which are kept."""

    name: str = "rsm"  # rsm, star, pps, or module:Class
    budget: int | None = None  # most attempts per question and iteration; by default rsm 8, star 2, pps 1
    draws: Literal["first", "all"] = "first"  # stop at the first accepted draw, or spend the budget and keep them all
    proposal: Literal["current", "base"] = "current"  # the model that hinted draws come from
    hint: str = DEFAULT_HINT  # the wording that shows the answer, a name of minem.data.prompts.HINTS
    filter: Literal["correct", "none"] = "correct"  # "none" keeps every draw: the control experiment
    drop_leaks: bool = False  # also reject hinted rationales that cite the hint
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.budget is None:  # resolved here, so that a run's record shows the number
            object.__setattr__(self, "budget", default_budget(self.name))
        require(
            "sampler",
            self,
            name=(self.name in SAMPLERS or is_reference(self.name), one_of(self.name, SAMPLERS, "or module:Class")),
            budget=((self.budget or 0) >= 1, "1 or more"),
            hint=(self.hint in HINTS, one_of(self.hint, HINTS)),
            temperature=(1e-3 <= self.temperature <= 1e3, "between 0.001 and 1000"),
            top_k=(0 <= self.top_k < 2**31, "0 (off) or more, below 2^31"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            min_p=(0 <= self.min_p <= 1, "between 0 (off) and 1"),
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
        )


def default_budget(name: str) -> int:
    """The most attempts a question may cost where the config names no budget: rsm 8, star 2, pps 1, others 8."""
    return DEFAULT_BUDGETS.get(name, 8)


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


def import_object(name: str, key: str, known: str = "") -> type:
    """What "module:attribute" names; `key` is the config key it stands under and `known` the built-in names.

    Raises:
        UserError: the name has no colon, or the module or the attribute does not exist.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        choices = f"one of {known}, or " if known else ""
        raise UserError(f"{key} = {name!r} must be {choices}your own as module:name")
    if os.getcwd() not in sys.path:  # a console script, unlike `python -m`, does not look where the user stands
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises
        raise UserError(f"{key} = {name!r}: module {module!r} cannot be imported ({error!r})") from error
    if not hasattr(imported, attribute):
        raise UserError(f"{key} = {name!r}: module {module!r} has no {attribute!r}")
    return getattr(imported, attribute)


def altered(sampler: SamplerConfig) -> list[str]:
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
