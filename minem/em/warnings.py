"""Signs that an iteration teaches the model little, each with what to do next. They warn and change nothing.

    minem train          # prints them as "warning ...", keeps them in journal.jsonl, and shows them in report.html

Each rule is a function of the numbers that the journal and the metrics have.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minem.console import percent
from minem.em.diagnostics import FALLING_RULE
from minem.em.sample import Sample
from minem.errors import GuardError
from minem.runs.stages import Run
from minem.statistics import mean, standard_deviation

ALL_ACCEPTED = 0.99  # share of the attempts from which on rejection selects nothing
FEW_SOLVED = 0.05  # share of the questions below which hardly anything is learned from
FEWEST_STEPS = 8  # of an M-step that are enough to judge its losses
LEAST_FALL = 0.02  # of the loss, from the first half of the steps to the second
COLLAPSED = 0.25  # of the first iteration's entropy: of 10,000 likely rationales 10,000^(1/4) = 10 are left
FAILED = 0.5  # share of the answers that fail for their form from which on nothing else matters
LONGER = "raise sampler.max_new_tokens and eval.max_new_tokens, or name a text that ends an answer in sampler.stop"
SHOW_THE_FORM = (
    "show the form by worked examples (--set task.shots=proposal, or always), try another prompt set (--prompt) or a "
    "lower sampler.temperature, or accept other forms (--verdict minem.data.verdict:flexible)"
)
UNSOLVED = 0.1  # share of the questions that other draws would still be needed for


def of_draws(estep: Mapping[str, Any]) -> list[str]:
    """What an E-step's counts (`minem.em.estep.EStep.summary`) warn of."""
    return [sentence for sentence in (everything_accepted(estep), almost_nothing_accepted(estep)) if sentence]


def of_training(losses: list[float], found: Mapping[str, Any], iteration: int, results: Mapping[str, Any]) -> list[str]:
    """What an M-step warns of. losses: of its steps. found: what it reports. results: of earlier stages."""
    entropies = [results[f"iter-{i:02d}/mstep"]["entropy"] for i in range(1, iteration)] + [found["entropy"]]
    drawn = results.get(f"iter-{iteration:02d}/estep")  # there is none if the M-step is done alone
    solved = drawn["solved"] / drawn["questions"] if drawn else None
    return [sentence for sentence in (loss_not_falling(losses), entropy_collapsing(entropies, solved)) if sentence]


def of_diagnostics(found: Mapping[str, Any], first: Mapping[str, Any] | None) -> list[str]:
    """What the diagnostics warn of. first: those of iteration 1."""
    if first is None or not found["falling"]:
        return []
    before, now = percent(first["hinted"]), percent(found["hinted"])
    return [f"hinted acceptance fell from {before} to {now} since iteration 1: {FALLING_RULE}"]


def of_answers(found: Mapping[str, Any]) -> list[str]:
    """What an evaluation (`minem.em.evaluate.summarise_answers`) warns of."""
    if found["truncated"] > FAILED:
        return [f"{percent(found['truncated'])} of the answers are cut off at the limit: {LONGER}"]
    if found["unparsed"] > FAILED:
        shares = f"{percent(found['flexible'])} are right if read leniently"
        return [f"{percent(found['unparsed'])} of the answers state none that can be read ({shares}): {SHOW_THE_FORM}"]
    return []


def stop_if_empty(kept: Sequence[Sample], run: Run, iteration: int) -> None:
    """Raises GuardError, with what to do next and three texts as examples, if there is nothing to train on."""
    if kept:
        return
    drawn = run.results.get(f"iter-{iteration:02d}/estep")
    samples = run.read(iteration, "samples.jsonl", Sample) if drawn else []
    for sample in samples[:: max(1, len(samples) // 3)][:3]:
        text = " ".join(sample.text.split())[:300]
        run.progress.note(f"example {sample.id}, {sample.prompt}, {sample.status}: {text}")
    hint = f"{advice(drawn)}; " if drawn else ""
    if drawn and drawn["solved"]:
        hint = "right answers were rejected by sampler.min_rationale_tokens or sampler.drop_leaks; "
    raise GuardError(
        f"iteration {iteration}: no rationale was accepted, so there is nothing to train on: {hint}"
        f"minem show {run.path} prints what the model wrote"
    )


def everything_accepted(estep: Mapping[str, Any]) -> str | None:
    accepted = estep["statuses"].get("accepted", 0) / max(1, estep["attempts"])
    if accepted < ALL_ACCEPTED:
        return None
    found = f"{percent(accepted)} of the draws were accepted, so rejecting the others teaches next to nothing: "
    if "plain" in estep["acceptance"]:
        return found + "the model knows these questions; train on harder ones, or stop here"
    return found + (
        "read some (minem show): do they reason, or repeat the answer that they were shown? "
        'sampler.hint = "derive" asks for a derivation, and rsm draws without a hint'
    )


def almost_nothing_accepted(estep: Mapping[str, Any]) -> str | None:
    """If nothing at all was accepted, `stop_if_empty` stops the run with the same advice."""
    if not estep["solved"] or estep["solved"] / estep["questions"] >= FEW_SOLVED:
        return None
    return f"only {estep['solved']} of {estep['questions']} questions have an accepted draw: {advice(estep)}"


def advice(estep: Mapping[str, Any]) -> str:
    """What to do about rejected draws, by the reason that most of them were rejected for."""
    rejected = {status: n for status, n in estep["statuses"].items() if status != "accepted"}
    reason = max(rejected, key=rejected.__getitem__, default="wrong")
    if reason == "truncated":
        return f"most draws were cut off at the limit: {LONGER}"
    if reason == "unparsed":
        return f"most draws state no answer that can be read (minem show --status unparsed): {SHOW_THE_FORM}"
    if estep["acceptance"].keys() == {"plain"}:
        return "most draws are wrong, so raise sampler.budget, or let star or pps show the answer"
    return "most draws are wrong although the answer was shown, so raise sampler.budget, or take a larger model"


def loss_not_falling(losses: Sequence[float]) -> str | None:
    """Steps have different examples, so their losses scatter: that the fall is too small must stand out from that."""
    half = len(losses) // 2
    if len(losses) < FEWEST_STEPS:
        return None
    before, after = mean(losses[:half]), mean(losses[-half:])
    spreads = [standard_deviation(part) or 0.0 for part in (losses[:half], losses[-half:])]
    if before - after + 2 * math.hypot(*spreads) / math.sqrt(half) >= LEAST_FALL * before:
        return None
    return (
        f"the loss did not fall: {before:.4f} in the first half of the steps, {after:.4f} in the second, which is "
        f"{100 * LEAST_FALL:.0f} % less at most, even with two standard errors in its favour; lower mstep.lr if it "
        "rises or jumps, raise it if it stays as it is"
    )


def entropy_collapsing(entropies: Sequence[float | None], solved: float | None) -> str | None:
    """Sharpening is what EM is for: it is a bad sign only while questions are left that need other rationales."""
    first, now = entropies[0], entropies[-1]
    if not first or now is None or solved is None or now >= COLLAPSED * first or solved > 1 - UNSOLVED:
        return None
    return (
        f"the policy's entropy fell to {now:.3f} nats per token, from {first:.3f} in iteration 1, while "
        f"{100 * (1 - solved):.0f} % of the questions have no accepted draw: more draws would be more of the same; "
        'lower mstep.lr or mstep.epochs, or train each iteration from the base model (run.init = "base")'
    )
