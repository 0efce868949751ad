"""The objective of the M-step: how much each kept draw counts.

    minem train --set mstep.weights=question --set sampler.draws=all        # or importance

Several draws of a question may be kept, (z_1, y) ... (z_n, y). What their weights make of the gradient at theta_old:

    equal        1          the sum over kept draws: of M plain draws, M grad p, so easy questions count more
    question     1 / n      their mean: grad log p for each question that has a kept draw
    importance   w_k / sum  w_k = pi(z_k, y | x) / q(z_k, y | ...): the same gradient from draws of a proposal q, such
                            as the model that was shown the answer; its bias falls as 1 / n if q covers the posterior

Plain draws at temperature 1 have w = 1, so that importance is question there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from minem.config import MStepSection
from minem.data.prompts import Prompts
from minem.data.tasks import Question, Task
from minem.em.packing import Example
from minem.em.sample import Sample
from minem.em.scoring import score
from minem.errors import GuardError
from minem.model.decoder import Model

SMALLEST = 2.0**-126  # of normal float32, which the loss computes in: beside a sum of 1 it is nothing


def make_examples(samples: Sequence[Sample], task: Task, prompts: Prompts, section: MStepSection) -> list[Example]:
    """What is trained of the kept samples: the *plain* prompt of the question with the ids as drawn, weighed."""
    questions = {question.id: question for question in task.train}
    weights = weigh(samples, section.weights)
    asked = [prompts.trained(questions[sample.id]) for sample in samples]
    return [Example(s.id, prompt, s.token_ids, w) for s, prompt, w in zip(samples, asked, weights, strict=True)]


def weigh(samples: Sequence[Sample], weights: str) -> list[float]:
    """The weight of each kept sample. Those of a question sum to 1, unless all are "equal"."""
    if weights == "equal":
        return [1.0] * len(samples)
    logs = [0.0] * len(samples)
    questions: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        questions.setdefault(sample.id, []).append(i)
        if weights == "importance":
            assert sample.logprob_plain is not None
            assert sample.logprob_q is not None
            logs[i] = sample.logprob_plain - sample.logprob_q
    found = [0.0] * len(samples)
    for members in questions.values():
        largest = max(logs[i] for i in members)  # taken out, so that no weight overflows and the sum does not vanish
        total = math.fsum(math.exp(logs[i] - largest) for i in members)
        for i in members:
            found[i] = max(math.exp(logs[i] - largest) / total, SMALLEST)
    return found


def plain_logprobs(
    samples: Sequence[Sample], questions: Mapping[str, Question], model: Model, prompts: Prompts, pack_tokens: int
) -> list[Sample]:
    """The kept samples, each with its logprob_plain: those that lack it get it by one teacher-forced pass of the model.

    model: at theta_old, as it is during the E-step. pack_tokens: most tokens of a pass (memory only).
    Raises GuardError if a log-probability is not finite.
    """
    lacking = [sample for sample in samples if sample.logprob_plain is None]
    examples = [Example(s.id, prompts.trained(questions[s.id]), s.token_ids) for s in lacking]
    scored = [sum(logprobs) for logprobs, _ in score(model, examples, pack_tokens)]
    for sample, logprob in zip(lacking, scored, strict=True):
        if not math.isfinite(logprob):
            raise GuardError(
                f"question {sample.id!r}: the log-probability of a kept rationale under the plain prompt is {logprob}, "
                "so it cannot be weighed"
            )
    missing = iter(scored)
    return [s if s.logprob_plain is not None else replace(s, logprob_plain=next(missing)) for s in samples]
