"""Accuracy on a split: the greedy answer to every question, and what draws at temperature 1 reach.

    minem eval --model toy --task toy --split test --samples 8

Greedy accuracy is what a user of the model sees; the mean at temperature 1 is what EM raises. The interval is Wilson's
at 95 %. Unparsed and truncated answers count as wrong and are reported apart, since they are failures of form.

Of n draws also pass@k, the chance that one of k is right, and the accuracy of the majority vote.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minem.config import EvalSection
from minem.console import percent
from minem.data.prompts import Prompts
from minem.data.tasks import Question
from minem.data.verdict import Verdict, flexible
from minem.em.estep import judge
from minem.generation.generator import Generator
from minem.generation.request import Request, SamplingParams, stream_seed
from minem.statistics import pass_at_k, wilson

FIELDS = ("id", "answer", "gold", "status", "text", "tokens")  # of a row of eval.*.jsonl


@dataclass(frozen=True)
class Evaluation:
    """How accuracy is measured."""

    generator: Generator
    prompts: Prompts
    verdict: Verdict
    section: EvalSection
    seed: int = 0

    def total(self, questions: Sequence[Question]) -> int:
        """How many answers that is."""
        return len(questions) * (1 + self.section.samples)

    def answers(
        self,
        questions: Sequence[Question],
        show: Callable[..., None] = lambda done, **facts: None,
        known: Iterable[Mapping[str, Any]] = (),
        on_row: Callable[[dict[str, Any]], object] = lambda row: None,
    ) -> list[dict[str, Any]]:
        """Answer every question greedily, and `samples` times at temperature 1.

        show: called with the number of finished draws and the accuracy so far, after every decoding step.
        known: rows that need not be drawn again, as returned here or without `draw`, which is then 0.
        on_row: called with each new row as it finishes.
        Returns unordered rows of eval.*.jsonl (FIELDS) with `draw`: 0 is the greedy answer, 1 and up at temperature 1.
        """
        wanted = {(question.id, k) for question in questions for k in range(1 + self.section.samples)}
        answers = {key: {**row, "draw": key[1]} for row in known if (key := (row["id"], row.get("draw", 0))) in wanted}
        for question in questions:
            draws = [k for k in range(1 + self.section.samples) if (question.id, k) not in answers]
            ids = self.prompts.trained(question) if draws else []
            for k in draws:
                heat, new = 1.0 if k else 0.0, self.section.max_new_tokens
                params = SamplingParams(temperature=heat, max_new_tokens=new, stop=self.prompts.stop)
                stream = stream_seed(self.seed, "eval", question.id, k)  # without effect on a greedy answer
                self.generator.submit(Request(ids, params, stream, tag=(question, k)))
        greedy = [row["status"] == "accepted" for (_, k), row in answers.items() if k == 0]
        while len(answers) < len(wanted):
            for completion in self.generator.step():
                assert completion.request is not None
                question, k = completion.request.tag
                answer, status = judge(completion, question, self.verdict)
                values = (question.id, answer, question.gold, status, completion.text, len(completion.token_ids))
                answers[question.id, k] = row = {**dict(zip(FIELDS, values, strict=True)), "draw": k}
                greedy += [row["status"] == "accepted"] if k == 0 else []
                on_row(row)
            show(len(answers), accuracy=percent(sum(greedy) / max(1, len(greedy))))
        return list(answers.values())


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The line of progress at the end of an evaluation."""
    shares = {key: percent(summary[key]) for key in ("unparsed", "truncated")}
    return {"accuracy": percent(summary["accuracy"], (summary["low"], summary["high"]))} | shares


def greedy_rows(questions: Sequence[Question], answers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of eval.*.jsonl: the greedy answers, in the order of the questions."""
    greedy = {row["id"]: row for row in answers if row["draw"] == 0}
    return [{field: greedy[question.id][field] for field in FIELDS} for question in questions]


def summarise_answers(questions: Sequence[Question], rows: Iterable[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The numbers of a split, from nothing but its answers (the rows of `Evaluation.answers`).

    Of the greedy answers: n, correct, accuracy, low and high (95 %), flexible (accuracy under the lenient reading),
    shares that are unparsed and truncated, tokens per answer; the first five also for each of the `subjects`, if any.
    Of the draws at temperature 1: sampled (mean accuracy, None without draws); of two or more per question also
    pass_at_k ({"1": share, "2": ...}, k = 1, 2, 4, ... up to their number) and majority.
    """
    answers = {(row["id"], row["draw"]): row for row in rows}
    greedy = [(question, answers[question.id, 0]) for question in questions]
    n = len(greedy)
    lenient = sum(r["status"] != "truncated" and flexible(r["text"], q) == q.gold for q, r in greedy)
    summary = {
        **_accuracy([row for _, row in greedy]),
        "flexible": lenient / n,
        "unparsed": sum(row["status"] == "unparsed" for _, row in greedy) / n,
        "truncated": sum(row["status"] == "truncated" for _, row in greedy) / n,
        "tokens": sum(row["tokens"] for _, row in greedy) / n,
    }
    draws = [[answers[question.id, k] for k in range(1, samples + 1)] for question in questions]
    right = [sum(row["status"] == "accepted" for row in rows) for rows in draws]
    summary["sampled"] = sum(right) / (n * samples) if samples else None
    if samples >= 2:
        ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
        summary["pass_at_k"] = {str(k): sum(pass_at_k(samples, c, k) for c in right) / n for k in ks}
        votes = [majority(rows) == question.gold for question, rows in zip(questions, draws, strict=True)]
        summary["majority"] = sum(votes) / n
    if subjects := sorted({question.subject for question in questions} - {""}):
        groups = {name: [row for question, row in greedy if question.subject == name] for name in subjects}
        summary["subjects"] = {name: _accuracy(rows) for name, rows in groups.items()}
    return summary


def majority(draws: Sequence[Mapping[str, Any]]) -> str | None:
    """The answer that most draws state, of equally many the first drawn. Draws without one abstain; None if all do."""
    votes = Counter(row["answer"] for row in draws if row["status"] in ("accepted", "wrong"))
    # A Counter lists answers by their first vote, and most_common keeps that order among equals.
    return votes.most_common(1)[0][0] if votes else None


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right = sum(row["status"] == "accepted" for row in rows)
    low, high = wilson(right, len(rows))
    return {"n": len(rows), "correct": right, "accuracy": right / len(rows), "low": low, "high": high}
