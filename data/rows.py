"""Rows of .jsonl and .parquet files as questions, in four schemas that are told apart by their columns.

    python -c "from minem.data.rows import *; print(read_questions(Path('data/toy/test.jsonl'))[0])"

    ARC          id, question,      choices {text, label}, answerKey
    OpenBookQA   id, question_stem, choices {text, label}, answerKey
    MMLU         question, subject, choices [4 texts], answer (0..3); labels are A, B, C, D
    free-form    id, question, answer, and no choices: a text or a number, as in GSM8K after its `####`

A file holds multiple-choice or free-form questions, not both. Ids are made from the content where rows have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minem.errors import UserError
from minem.files import MEBIBYTE, parse

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LINE_LIMIT = 4 * MEBIBYTE  # bytes of one row of a .jsonl file
ROW_LIMIT = 10_000_000  # rows of a file
TABLE_LIMIT = 16 << 30  # bytes of a parquet file when unpacked, as it says itself
BATCH = 512  # rows of a parquet file that are unpacked at once
_BLANK = object()
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Question:
    """One question. Multiple choice: `labels[i]` names `options[i]`, and `gold` is the right label.

    Free-form: no options and no labels, and `gold` is the answer itself.
    """

    id: str
    text: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: str
    subject: str = ""


def read_questions(path: Path, on_bad_row: Callable[[str], None] | None = None) -> list[Question]:
    """Every row of a .jsonl or .parquet file, in order.

    A bad row raises UserError naming the file, the row (counted from 1; in .jsonl that is the line) and the field; with
    `on_bad_row` it is left out instead, and the sentence handed over.
    """
    questions: list[Question] = []
    first_row: dict[str, int] = {}
    for number, row in _rows(path):
        where = f"{path.name}, row {number}"
        try:
            if isinstance(row, UserError):
                raise row
            question = _question(row, where)
            if questions and bool(question.labels) != bool(questions[0].labels):
                odd = "has 'choices', which no" if question.labels else "lacks 'choices', which every"
                raise UserError(f"{where}: this row {odd} row above it has; a file holds questions of one kind")
            has_id = "id" in row
            if has_id and question.id in first_row:
                raise UserError(
                    f"{where}: the field 'id' repeats {question.id!r} of row {first_row[question.id]}; ids must differ"
                )
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
            continue
        if not has_id:  # the same row twice, as MMLU has some: keep both, apart
            copies = 2
            base = question.id
            while question.id in first_row:
                question = Question(**{**asdict(question), "id": f"{base}-{copies}"})
                copies += 1
        first_row[question.id] = number
        questions.append(question)
    return questions


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    """(row number from 1, row); a line that is no JSON comes as the UserError that says so."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} is neither .jsonl nor .parquet")
    for number, row in enumerate(_table(path) if path.suffix == ".parquet" else _lines(path), start=1):
        if number > ROW_LIMIT:
            raise UserError(f"{path.name} has more than {ROW_LIMIT:,} rows; that is the limit")
        if row is not _BLANK:
            yield number, row


def _table(path: Path) -> Iterator[Any]:
    """The rows of a parquet file, unpacked a few at a time: a small file may say that it holds very many."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if file.metadata.num_rows > ROW_LIMIT or size > TABLE_LIMIT:
                raise ValueError(f"it says that it has {file.metadata.num_rows:,} rows in {size:,} bytes")
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield from batch.to_pylist()
    except UserError:
        raise
    except Exception as error:  # of a library that reads a stranger's bytes: it has many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{path} is not a readable parquet file: {reason}") from None


def _lines(path: Path) -> Iterator[Any]:
    """The values of a .jsonl file, _BLANK for a line that is."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                where = f"{path.name}, row {number}"
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{where}: longer than {LINE_LIMIT} bytes")
                if not line.strip():
                    yield _BLANK
                    continue
                try:
                    yield parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:  # bad UTF-8 is one, too
                    yield UserError(f"{where}: not one JSON object in UTF-8 ({error})")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _question(row: Any, where: str) -> Question:
    """One row in any of the four schemas -> Question. Raises UserError: `where`, then the field."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with a question, choices and an answer, not {_shown(row)}")
    if row.keys() == {"train"} and isinstance(row["train"], dict):  # how some copies of MMLU hold auxiliary_train
        row = row["train"]
    stem = "question_stem" if "question_stem" in row else "question"
    text = _field(row, stem, where)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the field {stem!r} must be a text that is not empty, not {_shown(text)}")
    if row.get("choices") is not None:
        options, labels, gold = _multiple_choice(row, where)
    elif row.get("answer") is not None and row.get("answerKey") is None:
        options, labels, gold = [], [], _free_form(row["answer"], where)
    else:
        raise UserError(
            f"{where}: the field 'choices' is missing (a free-form question has neither choices nor answerKey, but "
            "an 'answer')"
        )
    subject = row.get("subject") or ""
    if not isinstance(subject, str):
        raise UserError(f"{where}: the field 'subject' must be a text, not {_shown(subject)}")
    identity = _label(row["id"]) if "id" in row else _content_id(text, options, subject)
    if not identity:
        raise UserError(f"{where}: the field 'id' must be a text or a number, not {_shown(row['id'])}")
    if any(_SURROGATE.search(part) for part in (text, *options, gold, identity, subject)):
        raise UserError(f"{where}: a field holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Question(identity, text, tuple(options), tuple(labels), gold, subject)


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"{where}: the field {name!r} is missing")
    return row[name]


def _multiple_choice(row: dict[str, Any], where: str) -> tuple[list[str], list[str], str]:
    """(options, labels, the right label) of a row with choices."""
    choices = row["choices"]
    if isinstance(choices, dict):
        for part in ("text", "label"):
            if not isinstance(choices.get(part), list):
                raise UserError(f"{where}: the field 'choices.{part}' must be a list, not {_shown(choices.get(part))}")
        options, labels = choices["text"], [_label(label) for label in choices["label"]]
        gold = _label(_field(row, "answerKey", where))
    elif isinstance(choices, list):
        options, labels = choices, list(LETTERS[: len(choices)])
        index = _field(row, "answer", where)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(labels):
            raise UserError(
                f"{where}: the field 'answer' must be a number from 0 to {len(labels) - 1}, not {_shown(index)}"
            )
        gold = labels[index]
    else:
        raise UserError(
            f"{where}: the field 'choices' must be {{text, label}} or a list of texts, not {_shown(choices)}"
        )
    if len(options) < 2 or len(options) != len(labels):
        found = f"{len(options)} texts and {len(labels)} labels"
        raise UserError(f"{where}: the field 'choices' must hold two or more texts and as many labels, not {found}")
    if not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: the field 'choices' must hold texts only, not {_shown(options)}")
    words = all(re.fullmatch(r"\w+", label) for label in labels)
    if not words or len({label.lower() for label in labels}) < len(labels):
        raise UserError(
            f"{where}: the labels in 'choices' must be different single words (ignoring case), not {_shown(labels)}"
        )
    if gold not in labels:
        raise UserError(
            f"{where}: the field 'answerKey' must be one of the labels {', '.join(labels)}, not {_shown(gold)}"
        )
    return options, labels, gold


def _free_form(answer: Any, where: str) -> str:
    """The answer alone: what follows the last `####`, where GSM8K's rationale ends; without that mark, all of it."""
    readable = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if isinstance(answer, float) and not math.isfinite(answer):
        readable = False
    gold = str(answer).rpartition("####")[2].strip() if readable else ""
    if not gold or len(gold.splitlines()) > 1:
        raise UserError(
            f"{where}: the field 'answer' must be a number or a text of one line, or end with a line '#### ANSWER', "
            f"not {_shown(answer)}"
        )
    return gold


def _label(value: Any) -> str:
    """A label or id as text: numbers are welcome, anything else becomes "", which no check accepts."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _content_id(text: str, options: list[str], subject: str) -> str:
    content = json.dumps([text, options, subject], ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]
