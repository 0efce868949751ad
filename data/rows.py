"""Rows of .jsonl and .parquet files as questions, in four schemas that are recognised by their columns.

    python -c "from minem.data.rows import *; print(read_questions(Path('data/toy/test.jsonl'))[0])"

    ARC          id, question,      choices {text, label}, answerKey
    OpenBookQA   id, question_stem, choices {text, label}, answerKey
    MMLU         question, subject, choices [4 texts], answer (0..3); labels are A, B, C, D
    free-form    id, question, answer, and no choices: a text or a number, as in GSM8K after its `####`

A file holds multiple-choice or free-form questions, not both. Ids are made from the content where rows have none.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from minem.errors import UserError, shown
from minem.files import read_lines

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Question:
    """Multiple choice: `labels[i]` names `options[i]`, `gold` is the right label. Free-form: `gold` is the answer."""

    id: str
    text: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: str
    subject: str = ""


def read_questions(path: Path, on_bad_row: Callable[[str], None] | None = None) -> list[Question]:
    """The rows of a .jsonl or .parquet file. UserError names a bad one and its field, or `on_bad_row` gets that."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} is neither .jsonl nor .parquet")
    rows: dict[str, int] = {}  # id -> row number
    questions: list[Question] = []
    for number, row in (_table if path.suffix == ".parquet" else read_lines)(path):
        try:
            question = _question(row)
            if questions and bool(question.labels) != bool(questions[0].labels):
                odd = "has 'choices', which no" if question.labels else "lacks 'choices', which every"
                raise UserError(f"this row {odd} row above it has; a file holds questions of one kind")
            if question.id in rows and "id" in row:
                raise UserError(f"the field 'id' repeats {question.id!r} of row {rows[question.id]}; ids must differ")
        except UserError as error:
            problem = f"{path.name}, row {number}: {error}"
            if on_bad_row is None:
                raise UserError(problem) from error
            on_bad_row(problem)
            continue
        base, copies = question.id, 2
        while question.id in rows:  # the same row twice, as MMLU has some: keep both, apart
            question, copies = replace(question, id=f"{base}-{copies}"), copies + 1
        rows[question.id] = number
        questions.append(question)
    return questions


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except Exception as error:  # pyarrow raises many kinds on a damaged file
        raise UserError(f"{path} is not a readable parquet file: {str(error)[:300]}") from error
    return enumerate(rows, start=1)


def _question(row: Any) -> Question:
    """One row in any of the four schemas -> Question. UserError names the field."""
    if isinstance(row, ValueError):
        raise UserError(f"not one JSON object in UTF-8 ({row})")
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object with a question, choices and an answer, not {shown(row)}")
    if row.keys() == {"train"} and isinstance(row["train"], dict):  # as some copies of MMLU hold auxiliary_train
        row = row["train"]
    stem = "question_stem" if "question_stem" in row else "question"
    text = _field(row, stem)
    if not isinstance(text, str) or not text.strip():
        raise _bad(stem, "be a text that is not empty", text)
    if row.get("choices") is not None:
        options, labels, gold = _multiple_choice(row)
    elif row.get("answer") is not None and row.get("answerKey") is None:
        options, labels, gold = [], [], _free_form(row["answer"])
    else:
        raise UserError("the field 'choices' is missing (a free-form question has only an 'answer')")
    subject = row.get("subject") or ""
    if not isinstance(subject, str):
        raise _bad("subject", "be a text", subject)
    content = json.dumps([text, options, subject], ensure_ascii=False).encode(errors="surrogatepass")
    identity = _label(row["id"]) if "id" in row else hashlib.sha256(content).hexdigest()[:16]
    if not identity:
        raise _bad("id", "be a text or a number", row["id"])
    if any(_SURROGATE.search(part) for part in (text, *options, gold, identity, subject)):
        raise UserError("a field holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Question(identity, text, tuple(options), tuple(labels), gold, subject)


def _multiple_choice(row: dict[str, Any]) -> tuple[list[str], list[str], str]:
    """(options, labels, the right label) of a row with choices."""
    choices = row["choices"]
    if isinstance(choices, dict):
        for part in ("text", "label"):
            if not isinstance(choices.get(part), list):
                raise _bad(f"choices.{part}", "be a list", choices.get(part))
        options, labels = choices["text"], [_label(label) for label in choices["label"]]
        field, right, gold = "answerKey", f"one of the labels {', '.join(labels)}", _label(_field(row, "answerKey"))
    elif isinstance(choices, list):
        options, labels = choices, list(LETTERS[: len(choices)])
        field, right, index = "answer", f"a whole number from 0 to {len(labels) - 1}", _field(row, "answer")
        gold = labels[int(index)] if index in range(len(labels)) and not isinstance(index, bool) else ""
    else:
        raise _bad("choices", "be {text, label} or a list of texts", choices)
    if len(options) < 2 or len(options) != len(labels):
        found = f"{len(options)} texts and {len(labels)} labels"
        raise UserError(f"the field 'choices' must hold two or more texts, each with a label, not {found}")
    if not all(isinstance(option, str) for option in options):
        raise _bad("choices", "hold texts only", options)
    words = all(re.fullmatch(r"\w+", label) for label in labels)
    if not words or len({label.lower() for label in labels}) < len(labels):
        raise UserError(f"the labels in 'choices' must be different words (case aside), not {shown(labels)}")
    if gold not in labels:
        raise _bad(field, f"be {right}", row[field])
    return options, labels, gold


def _free_form(answer: Any) -> str:
    """The answer alone: the text after the last `####`, which ends GSM8K's rationales; without that mark, all of it."""
    gold = _label(answer).rpartition("####")[2].strip()
    if not gold or len(gold.splitlines()) > 1:
        raise _bad("answer", "be a number or a text of one line, or end with a line '#### ANSWER'", answer)
    return gold


def _field(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"the field {name!r} is missing")
    return row[name]


def _bad(field: str, must: str, value: Any) -> UserError:
    return UserError(f"the field {field!r} must {must}, not {shown(value)}")


def _label(value: Any) -> str:
    """A label or id as text: numbers are welcome, anything else becomes "", which no check accepts."""
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")  # 0.00005, which Python writes as 5e-05
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else ""
