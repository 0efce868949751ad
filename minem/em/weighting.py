"""The objective of the M-step: how much each kept draw counts.

    minem train --set mstep.weights=question --set sampler.draws=all        # or importance

Several draws of a question may be kept, (z_1, y) ... (z_n, y). What their weights make of the gradient at theta_old:

    equal        1          the sum over kept draws: of M plain draws, M grad p, so easy questions count more
    question     1 / n      their mean: grad log p for each question that has a kept draw
    importance   w_k / sum  w_k = pi(z_k, y | x) / q(z_k, y | ...): the same gradient from draws of a proposal q, such
                            as the model that was shown the answer; its bias falls as 1 / n where q covers the posterior

Plain draws at temperature 1 have w = 1, so that importance is question there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minem.config import MStepSection
from minem.data.tasks import Question, Task
from minem.em.estep import encode_prompt
from minem.em.packing import Example
from minem.em.scoring import score
from minem.errors import GuardError, UserError, shown
from minem.files import read_rows
from minem.model.decoder import Model
from minem.model.tokenizer import Tokenizer

SMALLEST = 2.0**-126  # of normal float32, which the loss computes in: beside a sum of 1 it is nothing


def read_examples(
    file: Path,
    keep: Callable[[Mapping[str, Any]], bool],
    task: Task,
    tokenizer: Tokenizer,
    max_length: int,
    config: MStepSection,
) -> list[Example]:
    """What is trained of the rows that `keep` keeps: the *plain* prompt of the question with the ids as drawn.

    Args:
        file: of rows as in samples.jsonl. max_length: positions of the model.
    Returns:
        the examples, weighed.
    Raises:
        UserError: a row has no such question in the training split, no token ids, ids of another tokenizer, or more of
            them than the model has positions; or it lacks what the objective needs.
    """
    questions = {question.id: question for question in task.train}
    rows, names, kept = [], [], []
    for number, row in enumerate(read_rows(file), start=1):
        if not keep(row):
            continue
        where, question, ids = f"{file}, row {number}", questions.get(str(row.get("id"))), row.get("token_ids")
        if question is None:
            raise UserError(f"{where}: id {row.get('id')!r} is no training question of {task.name}")
        if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
            raise UserError(f"{where}: token_ids must be a list of the ids that were drawn")
        if isinstance(row.get("text"), str) and tokenizer.decode(ids).split() != row["text"].split():
            raise UserError(f"{where}: token_ids do not spell its text; they come from another tokenizer")
        prompt = encode_prompt(tokenizer, question)
        if len(prompt) + len(ids) > max_length:
            raise UserError(f"{where}: {len(ids)} token ids and their prompt exceed {max_length} positions")
        rows.append(row)
        names.append(where)
        kept.append((question.id, prompt, ids))
    weights = weigh(rows, config.weights, names)
    return [Example(*pair, weight) for pair, weight in zip(kept, weights, strict=True)]


def weigh(rows: Sequence[Mapping[str, Any]], weights: str, names: Sequence[str]) -> list[float]:
    """The weight of each kept row; but for "equal", those of a question sum to 1.

    Args:
        rows: of samples.jsonl; "importance" reads their logprob_plain and logprob_q.
        names: what a message calls each row.
    Raises:
        UserError: a row lacks a log-probability, or it is not finite.
    """
    if weights == "equal":
        return [1.0] * len(rows)
    logs = [0.0] * len(rows)
    if weights == "importance":
        logs = [_log_ratio(row, name) for row, name in zip(rows, names, strict=True)]
    questions: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        questions.setdefault(str(row["id"]), []).append(i)
    found = [0.0] * len(rows)
    for members in questions.values():
        largest = max(logs[i] for i in members)  # taken out, so that no weight overflows and the sum does not vanish
        total = math.fsum(math.exp(logs[i] - largest) for i in members)
        for i in members:
            found[i] = max(SMALLEST, math.exp(logs[i] - largest) / total)
    return found


def _log_ratio(row: Mapping[str, Any], name: str) -> float:
    values = []
    for field, said in (("logprob_plain", "the plain prompt"), ("logprob_q", "the prompt they were drawn with")):
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise UserError(
                f'{name}: {field} is {shown(value)}; mstep.weights = "importance" needs the log-probability of the '
                f"drawn tokens under {said} there, a finite number"
            )
        values.append(float(value))
    return values[0] - values[1]


def add_plain_logprobs(
    rows: Sequence[dict[str, Any]],
    questions: Mapping[str, Question],
    model: Model,
    tokenizer: Tokenizer,
    pack_tokens: int,
) -> None:
    """Write logprob_plain into the kept rows that lack it, the hinted ones: one teacher-forced pass of the model.

    model: at theta_old, as it is during the E-step. pack_tokens: most tokens of a pass (memory only).
    Raises GuardError where a log-probability is not finite.
    """
    lacking = [row for row in rows if row["kept"] and row["logprob_plain"] is None]
    prompts = [encode_prompt(tokenizer, questions[row["id"]]) for row in lacking]
    examples = [Example(row["id"], ids, row["token_ids"]) for row, ids in zip(lacking, prompts, strict=True)]
    for row, (logprobs, _) in zip(lacking, score(model, examples, pack_tokens), strict=True):
        row["logprob_plain"] = sum(logprobs)
        if not math.isfinite(row["logprob_plain"]):
            raise GuardError(
                f"question {row['id']!r}: the log-probability of an accepted rationale under the plain prompt is "
                f"{row['logprob_plain']}, so it cannot be weighed"
            )
