"""Accuracy on a split: the greedy answer to every question, and what draws at temperature 1 reach.

    minem eval --model toy --task toy --split test --samples 8

Greedy accuracy is what a user of the model sees; the mean at temperature 1 is what EM raises. The interval is Wilson's
at 95 %. Unparsed and truncated answers count as wrong and are reported apart, since they are failures of form.

Of n draws also pass@k, the chance that one of k is right, and the majority vote: the answer that most draws state wins,
those without one abstain, and of answers with equally many votes the one that was drawn first wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minem.console import percent
from minem.data.prompts import encode_prompt
from minem.data.tasks import Question
from minem.data.verdict import Verdict, flexible
from minem.em.estep import judge
from minem.errors import UserError
from minem.files import complete_rows, json_line
from minem.generation.generator import Generator
from minem.generation.request import Completion, Request, SamplingParams, stream_seed
from minem.runs.folder import hold_folder
from minem.statistics import pass_at_k, wilson

FIELDS = ("id", "answer", "gold", "status", "text", "tokens")  # of a row of eval.*.jsonl


@dataclass(frozen=True)
class Evaluation:
    """How accuracy is measured. samples: draws per question at temperature 1, beside the greedy answer."""

    generator: Generator
    verdict: Verdict
    max_new_tokens: int
    samples: int = 0
    seed: int = 0

    def total(self, questions: Sequence[Question]) -> int:
        """How many answers that is."""
        return len(questions) * (1 + self.samples)

    def answers(
        self,
        questions: Sequence[Question],
        show: Callable[..., None] = lambda done, **facts: None,
        known: Iterable[Mapping[str, Any]] = (),
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> list[dict[str, Any]]:
        """Answer every question greedily, and `samples` times at temperature 1.

        Args:
            show: called with the number of finished draws and the accuracy so far, after every decoding step.
            known: answers that need not be drawn again, as this function returns them.
            on_row: called with each new answer as it finishes.
        Returns:
            rows of eval.*.jsonl (FIELDS) with `draw` beside them: 0 for the greedy answer, 1 and up for those at
            temperature 1. Their order means nothing.
        """
        wanted = {(question.id, k) for question in questions for k in range(1 + self.samples)}
        answers = {key: {**row, "draw": key[1]} for row in known if (key := (row["id"], row.get("draw", 0))) in wanted}
        for question in questions:
            self._submit(question, [k for k in range(1 + self.samples) if (question.id, k) not in answers])
        greedy = [row["status"] == "accepted" for (_, k), row in answers.items() if k == 0]
        while len(answers) < len(wanted):
            for completion in self.generator.step():
                assert completion.request is not None
                question, k = completion.request.tag
                answers[question.id, k] = row = {**_row(completion, question, self.verdict), "draw": k}
                greedy += [row["status"] == "accepted"] if k == 0 else []
                on_row(row)
            show(len(answers), accuracy=percent(sum(greedy) / max(1, len(greedy))))
        return list(answers.values())

    def _submit(self, question: Question, draws: Sequence[int]) -> None:
        ids = encode_prompt(self.generator.tokenizer, question) if draws else []
        for k in draws:
            params = SamplingParams(temperature=1.0 if k else 0.0, max_new_tokens=self.max_new_tokens)
            stream = stream_seed(self.seed, "eval", question.id, k) if k else 0
            try:
                self.generator.submit(Request(ids, params, stream, tag=(question, k)))
            except UserError as error:
                raise UserError(f"question {question.id!r}: {error}") from error

    def summary(self, questions: Sequence[Question], answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The numbers of a split: `summarise_answers`."""
        return summarise_answers(questions, answers, self.samples)


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The line of progress at the end of an evaluation."""
    return {"accuracy": percent(summary["accuracy"], (summary["low"], summary["high"]))}


def greedy_rows(questions: Sequence[Question], answers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of eval.*.jsonl: the greedy answers, in the order of the questions."""
    greedy = {row["id"]: row for row in answers if row["draw"] == 0}
    return [{field: greedy[question.id][field] for field in FIELDS} for question in questions]


def summarise_answers(questions: Sequence[Question], rows: Iterable[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The numbers of a split, from nothing but its answers (the rows of `Evaluation.answers`).

    Returns:
        n, correct, accuracy, low and high (95 %), flexible (accuracy under the lenient reading), unparsed and truncated
        shares and tokens per answer, all of the greedy answers; sampled, the mean accuracy at temperature 1 (None
        without draws). With two or more draws per question also pass_at_k ({"1": share, "2": ...}, k = 1, 2, 4, ... up
        to their number), majority (accuracy of the vote) and sampled_tokens. With subjects, `subjects`: {name: {n,
        correct, accuracy, low, high}}.
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
        summary["sampled_tokens"] = sum(row["tokens"] for rows in draws for row in rows) / (n * samples)
    subjects = sorted({question.subject for question in questions} - {""})
    if subjects:
        groups = {name: [row for question, row in greedy if question.subject == name] for name in subjects}
        summary["subjects"] = {name: _accuracy(rows) for name, rows in groups.items()}
    return summary


def majority(draws: Sequence[Mapping[str, Any]]) -> str | None:
    """The answer that most of the draws state; of several with equally many, the one that was drawn first.

    Draws that were cut off or state no answer abstain; None if all do.
    """
    votes = Counter(row["answer"] for row in draws if row["status"] in ("accepted", "wrong"))
    # A Counter lists answers by their first vote, and most_common keeps that order among equals.
    return votes.most_common(1)[0][0] if votes else None


@contextmanager
def answer_file(
    folder: Path, settings: Mapping[str, Any], overwrite: bool = False
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The answers of one evaluation on disk, appended as they finish: FOLDER/answers.jsonl, FOLDER/settings.json.

    settings: what the answers depend on. The folder is resumed with equal ones only, else UserError names what
        differs. The number of draws is none of them: asking for more continues from those that are there.
    Yields (the answers that are there already, a function that appends one). A last line that was cut off when the
    evaluation was killed is dropped.
    """

    def clear(path: Path) -> None:
        (path / "answers.jsonl").unlink(missing_ok=True)

    with hold_folder(folder, "settings.json", "evaluation folder", {"eval": settings}, clear if overwrite else None):
        rows = complete_rows(folder / "answers.jsonl", repair=True)
        kinds = {"id": str, "answer": str | None, "gold": str, "status": str, "text": str, "tokens": int, "draw": int}
        if not all(isinstance(row.get(key, ...), kind) for row in rows for key, kind in kinds.items()):
            raise UserError(f"{folder / 'answers.jsonl'} is damaged; give --overwrite to repeat the evaluation")
        with open(folder / "answers.jsonl", "ab", buffering=0) as file:

            def append(row: dict[str, Any]) -> None:
                file.write(json_line(row))

            yield rows, append


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right = sum(row["status"] == "accepted" for row in rows)
    low, high = wilson(right, len(rows))
    return {"n": len(rows), "correct": right, "accuracy": right / len(rows), "low": low, "high": high}


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
