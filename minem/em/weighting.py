"""The objective of the M-step: how much each kept draw counts.

    minem train --set mstep.weights=question --set sampler.draws=all        # or importance

Several draws of a question may be kept, (z_1, y) ... (z_n, y). What their weights make of the gradient at theta_old:

    equal        1          the sum over kept draws: of M plain draws, M grad p, so easy questions count more
    question     1 / n      their mean: grad log p for each question that has a kept draw
    importance   w_k / sum  w_k = pi(z_k, y | x) / q(z_k, y | ...): the same gradient from draws of a proposal q, such
                            as the model that was shown the answer; its bias falls as 1 / n if q covers the posterior

Plain draws at temperature 1 have w = 1, so that importance is question there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from minem.config import MStepSection
from minem.data.prompts import encode_prompt
from minem.data.tasks import Question, Task
from minem.em.packing import Example
from minem.em.sample import Sample
from minem.em.scoring import score
from minem.errors import GuardError
from minem.model.decoder import Model
from minem.model.tokenizer import Tokenizer

SMALLEST = 2.0**-126  # of normal float32, which the loss computes in: beside a sum of 1 it is nothing


def make_examples(samples: Sequence[Sample], task: Task, tokenizer: Tokenizer, section: MStepSection) -> list[Example]:
    """What is trained of the kept samples: the *plain* prompt of the question with the ids as drawn, weighed."""
    prompts = {question.id: question for question in task.train}
    return [
        Example(sample.id, encode_prompt(tokenizer, prompts[sample.id]), sample.token_ids, weight)
        for sample, weight in zip(samples, weigh(samples, section.weights), strict=True)
    ]


def weigh(samples: Sequence[Sample], weights: str) -> list[float]:
    """The weight of each kept sample. Those of a question sum to 1, unless all are "equal".

    "importance" needs both log-probabilities of each sample.
    """
    if weights == "equal":
        return [1.0] * len(samples)
    logs = [_log_ratio(sample) if weights == "importance" else 0.0 for sample in samples]
    questions: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        questions.setdefault(sample.id, []).append(i)
    found = [0.0] * len(samples)
    for members in questions.values():
        largest = max(logs[i] for i in members)  # taken out, so that no weight overflows and the sum does not vanish
        total = math.fsum(math.exp(logs[i] - largest) for i in members)
        for i in members:
            found[i] = max(math.exp(logs[i] - largest) / total, SMALLEST)
    return found


def _log_ratio(sample: Sample) -> float:
    assert sample.logprob_plain is not None
    assert sample.logprob_q is not None
    return sample.logprob_plain - sample.logprob_q


def plain_logprobs(
    samples: Sequence[Sample],
    questions: Mapping[str, Question],
    model: Model,
    tokenizer: Tokenizer,
    pack_tokens: int,
) -> list[Sample]:
    """The kept samples, each with its logprob_plain: hinted ones get it by one teacher-forced pass of the model.

    model: at theta_old, as it is during the E-step. pack_tokens: most tokens of a pass (memory only).
    Raises GuardError if a log-probability is not finite.
    """
    lacking = [i for i, sample in enumerate(samples) if sample.logprob_plain is None]
    examples = [
        Example(samples[i].id, encode_prompt(tokenizer, questions[samples[i].id]), samples[i].token_ids)
        for i in lacking
    ]
    found = list(samples)
    for i, (logprobs, _) in zip(lacking, score(model, examples, pack_tokens), strict=True):
        found[i] = replace(samples[i], logprob_plain=sum(logprobs))
        if not math.isfinite(sum(logprobs)):
            raise GuardError(
                f"question {samples[i].id!r}: the log-probability of a kept rationale under the plain prompt is "
                f"{sum(logprobs)}, so it cannot be weighed"
            )
    return found
