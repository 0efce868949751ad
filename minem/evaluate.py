"""Accuracy on a split: the greedy answer to every question, and the mean over draws at temperature 1.

    minem eval --model toy --task toy --split test

Greedy accuracy is what a user of the model sees; the mean at temperature 1 is what EM raises. The interval is Wilson's
at 95 %. Unparsed and truncated answers count as wrong and are reported apart, since they are failures of form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minem.data.tasks import Question
from minem.data.verdict import flexible
from minem.errors import UserError, require
from minem.estep import Verdict, encode_prompt, judge
from minem.generate import Completion, Generator, Request, SamplingParams, stream_seed
from minem.statistics import wilson


@dataclass(frozen=True)
class EvalConfig:
    """How accuracy is measured."""

    max_new_tokens: int = 1024
    samples: int = 1  # draws per question at temperature 1, beside the greedy answer; 0: greedy alone
    diagnostics: int = 32  # training questions that minem.diagnostics looks at in every iteration; 0: off
    hinted_draws: int = 4  # hinted draws for each of them

    def __post_init__(self) -> None:
        require(
            "eval",
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
            samples=(self.samples >= 0, "0 or more"),
            diagnostics=(self.diagnostics >= 0, "0 (off) or more"),
            hinted_draws=(self.hinted_draws >= 1, "1 or more"),
        )


def evaluate(
    generator: Generator,
    questions: Sequence[Question],
    verdict: Verdict,
    *,
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer every question greedily, and `samples` times at temperature 1.

    Args:
        on_progress: called with (finished draws, greedy answers that are right, greedy answers) after every step.
    Returns:
        the greedy answers as rows of eval.*.jsonl (id, answer, gold, status, text, tokens), in the order of the
        questions, and a summary: n, correct, accuracy, low and high (95 %), flexible (accuracy under the lenient
        reading), unparsed and truncated shares, tokens per answer, sampled (mean accuracy at temperature 1, or None).
    """
    greedy = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    drawn = SamplingParams(max_new_tokens=max_new_tokens)
    for question in questions:
        ids = encode_prompt(generator.tokenizer, question)
        try:
            generator.submit(Request(ids, greedy, tag=(question, 0)))
        except UserError as error:
            raise UserError(f"question {question.id!r}: {error}") from error
        for k in range(1, samples + 1):
            generator.submit(Request(ids, drawn, stream_seed(seed, "eval", question.id, k), tag=(question, k)))
    rows: dict[str, dict[str, Any]] = {}
    sampled_right, finished, right, lenient = 0, 0, 0, 0
    while finished < len(questions) * (1 + samples):
        for completion in generator.step():
            assert completion.request is not None
            question, k = completion.request.tag
            row = _row(completion, question, verdict)
            finished += 1
            if k:
                sampled_right += row["status"] == "accepted"
            else:
                rows[question.id] = row
                right += row["status"] == "accepted"
                lenient += completion.finish_reason == "stop" and flexible(completion.text, question) == question.gold
        if on_progress is not None:
            on_progress(finished, right, len(rows))
    ordered = [rows[question.id] for question in questions]
    n = len(ordered)
    low, high = wilson(right, n)
    summary = {
        "n": n,
        "correct": right,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "flexible": lenient / n,
        "unparsed": sum(row["status"] == "unparsed" for row in ordered) / n,
        "truncated": sum(row["status"] == "truncated" for row in ordered) / n,
        "tokens": sum(row["tokens"] for row in ordered) / n,
        "sampled": sampled_right / (n * samples) if samples else None,
    }
    return ordered, summary


def _row(completion: Completion, question: Question, verdict: Verdict) -> dict[str, Any]:
    answer, status = judge(completion, question, verdict)
    return {
        "id": question.id,
        "answer": answer,
        "gold": question.gold,
        "status": status,
        "text": completion.text,
        "tokens": len(completion.token_ids),
    }
