"""Rows of .jsonl and .parquet files as questions: what their columns mean is recognised, or named by task.columns.

    python -c "from minem.data.rows import *; print(read_questions(Path('data/toy/test.jsonl'))[0])"

    question     question or question_stem
    options      choices or options: {text, label}, {label: text} or a list, labelled A, B, ...; or columns A, B, ...
    answer       answerKey, answer, answer_index or answer_idx: a label, an option's number from 0, or its text
    context      context, passage or article: a text that the question is about; may be absent, as subject and id may

A row without options is free-form: its answer is a text or a number, as in GSM8K after its `####`. A file holds
questions of one kind. Ids are made from the content where rows have none.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

from minem.errors import UserError, shown
from minem.files import read_lines

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = ("question", "options", "answer", "context", "subject", "id", "ignore")  # of task.columns
OPTIONS = ("choices", "options")
ANSWERS = ("answerKey", "answer", "answer_index", "answer_idx")
CONTEXTS = ("context", "passage", "article")
ALIASES = {"question": ("question_stem",), "options": (*OPTIONS, *LETTERS), "answer": ANSWERS, "context": CONTEXTS}
# Columns that hold options or a passage in some dataset, beside those that are read.
_LIKE_OPTIONS = (
    r"(\w+[ _.-])?(choice|option|ending|candidate|distractor|alternative|hypothes[ei]|holding|response|opt"
    r"|(in_?correct|wrong|best|possible)([ _.-]?answer)?)e?s?([ _.-]?(list|[a-j]|\d+))?"
)
_LIKE_ANSWERS = r"(op|sol|solution|ans|answer)[ _.-]?([a-j]|\d+)|answers|[a-j][)\d]?|\w*(mc\d|choice)_targets"
_LIKE_PASSAGE = (
    r"(\w+_)?(context|ctx|passage|article|paragraph|support|story|document|background|premise|body|text|para|dialogue"
    r"|transcript|conversation|scenario|situation|narrative|abstract|evidence|fact|table|excerpt|vignette)s?(_?\w|_text)?"
)
_UNREAD = re.compile(f"{_LIKE_OPTIONS}|{_LIKE_ANSWERS}|{_LIKE_PASSAGE}", re.IGNORECASE)
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
    context: str = ""


def parse_columns(texts: Sequence[str]) -> dict[str, list[str]]:
    """task.columns, texts like "options=opa,opb", as {name of NAMES: columns of a row}."""
    columns: dict[str, list[str]] = {}
    for text in texts:
        name, _, theirs = (part.strip() for part in text.partition("="))
        several = name in ("options", "ignore")
        if name not in NAMES or not theirs or (not several and ("," in theirs or name in columns)):
            example = 'like "question=problem", "options=opa,opb" or "ignore=notes"'
            raise UserError(f"task.columns: {shown(text)} must be NAME=COLUMN, {example}; a NAME is {', '.join(NAMES)}")
        columns.setdefault(name, []).extend(column.strip() for column in theirs.split(","))
    return columns


def read_questions(
    path: Path | Sequence[Path],
    columns: Mapping[str, Sequence[str]] | None = None,
    on_bad_row: Callable[[str], None] | None = None,
) -> list[Question]:
    """The rows of .jsonl or .parquet files, which are parts of one; columns as of `parse_columns`.

    UserError names a bad row and its field, or `on_bad_row` gets that.
    """
    places: dict[str, str] = {}  # id -> file and row
    questions: list[Question] = []
    for file in [path] if isinstance(path, Path) else path:
        if file.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{file} is neither .jsonl nor .parquet")
        for number, row in (_table if file.suffix == ".parquet" else read_lines)(file):
            place = f"{file.name}, row {number}"
            try:
                question = _question(row, columns or {})
                if questions and bool(question.labels) != bool(questions[0].labels):
                    odd = "has options, which no" if question.labels else "lacks options, which every"
                    raise UserError(f"this row {odd} row above it has; a file holds questions of one kind")
                if question.id in places and "id" in row:
                    earlier = places[question.id].removeprefix(f"{file.name}, ")
                    raise UserError(f"the field 'id' repeats {question.id!r} of {earlier}; ids must differ")
            except UserError as error:
                if on_bad_row is None:
                    raise UserError(f"{place}: {error}") from error
                on_bad_row(f"{place}: {error}")
                continue
            base, copies = question.id, 2
            while question.id in places:  # the same row twice, as MMLU has some: keep both, apart
                question, copies = replace(question, id=f"{base}-{copies}"), copies + 1
            places[question.id] = place
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


def _question(row: Any, columns: Mapping[str, Sequence[str]]) -> Question:
    """One row -> Question. UserError names the field."""
    if isinstance(row, ValueError):
        raise UserError(f"not one JSON object in UTF-8 ({row})")
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object with a question, choices and an answer, not {shown(row)}")
    if row.keys() == {"train"} and isinstance(row["train"], dict):  # as some copies of MMLU hold auxiliary_train
        row = row["train"]
    row = _renamed(row, columns)
    stem = "question_stem" if "question_stem" in row else "question"
    text = _field(row, stem)
    if not isinstance(text, str) or not text.strip():
        raise _bad(stem, "be a text that is not empty", text)
    found = _only(row, OPTIONS)
    lettered = dict(takewhile(lambda item: item[1] is not None, ((letter, row.get(letter)) for letter in LETTERS)))
    if found and "A" in lettered:
        raise UserError(f"the row has options twice, in {found!r} and 'A'; name those that count in task.columns")
    context = _only(row, CONTEXTS)
    read = {stem, found, context, *ANSWERS, *(lettered if len(lettered) > 1 else ())}
    free = not found and len(lettered) < 2
    for name, value in row.items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        texts = sum(isinstance(part, str) for part in parts)
        if name not in read and value not in (None, "", []) and (_UNREAD.fullmatch(name) or (free and texts > 1)):
            advice = f'"options={name},..." or "context={name}", or leave it out by "ignore={name}"'
            raise UserError(f"the column {name!r} may hold options or a passage; name it in task.columns, {advice}")
    if not free:
        options, labels = _options(found or "A", row[found] if found else lettered)
        gold = _gold(row, options, labels)
    elif row.get("answer") is not None and row.get("answerKey") is None:
        options, labels, gold = [], [], _free_form(row["answer"])
    else:
        raise UserError("the field 'choices' is missing (a free-form question has only an 'answer')")
    about = {"subject": row.get("subject") or "", "context": row[context] if context else ""}
    for name, value in about.items():
        if not isinstance(value, str):
            raise _bad(name, "be a text", value)
    whole = [text, options, about["subject"], *filter(None, [about["context"]])]
    content = json.dumps(whole, ensure_ascii=False).encode(errors="surrogatepass")
    identity = _label(row["id"]) if "id" in row else hashlib.sha256(content).hexdigest()[:16]
    if not identity:
        raise _bad("id", "be a text or a number", row["id"])
    if any(_SURROGATE.search(part) for part in (text, *options, gold, identity, *about.values())):
        raise UserError("a field holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Question(identity, text, tuple(options), tuple(labels), gold, **about)


def _renamed(row: dict[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row with the columns that task.columns names under the names that are read here."""
    needed = [column for name, theirs in columns.items() for column in theirs if name != "ignore"]
    if missing := [column for column in needed if column not in row]:
        raise UserError(f"task.columns names {missing[0]!r}; the columns of this row are {', '.join(map(repr, row))}")
    replaced = {*needed, *columns.get("ignore", ()), *(alias for name in columns for alias in ALIASES.get(name, ()))}
    kept = {name: value for name, value in row.items() if name not in replaced}
    for name, theirs in columns.items():
        if name != "ignore":
            kept[name] = row[theirs[0]] if len(theirs) == 1 else [row[column] for column in theirs]
    return kept


def _only(row: dict[str, Any], names: Sequence[str]) -> str:
    """The one of these columns that the row has; "" if none. UserError if there are two."""
    found = [name for name in names if row.get(name) not in (None, "")]
    if len(found) > 1:
        raise UserError(f"the row has both {found[0]!r} and {found[1]!r}; leave one out, as by task.columns")
    return found[0] if found else ""


def _options(field: str, choices: Any) -> tuple[list[str], list[str]]:
    """(options, their labels) of a row."""
    if isinstance(choices, dict) and not choices.keys().isdisjoint(("text", "label")):
        for part in ("text", "label"):
            if not isinstance(choices.get(part), list):
                raise _bad(f"{field}.{part}", "be a list", choices.get(part))
        options, labels = choices["text"], [_label(label) for label in choices["label"]]
    elif isinstance(choices, dict):
        given = {label: option for label, option in choices.items() if option is not None}
        options, labels = list(given.values()), list(given)
    elif isinstance(choices, list):
        options, labels = choices, list(LETTERS[: len(choices)])
    else:
        raise _bad(field, "be {text, label}, {label: text} or a list of texts", choices)
    if len(options) < 2 or len(options) != len(labels):
        found = f"{len(options)} texts and {len(labels)} labels"
        raise UserError(f"the field {field!r} must hold 2 to 26 texts, each with a label, not {found}")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise _bad(field, "hold texts only, none of them empty", options)
    words = all(re.fullmatch(r"\w+", label) for label in labels)
    if not words or len({label.lower() for label in labels}) < len(labels):
        raise UserError(f"the labels in {field!r} must be different words (case aside), not {shown(labels)}")
    own = [re.match(rf"\s*{label}\s*[).:]\s*(?=\S)", option) for label, option in zip(labels, options, strict=True)]
    if all(own):  # as AQuA writes them, "A)21"
        options = [option[found.end() :] for option, found in zip(options, own, strict=True) if found]
    return options, labels


def _gold(row: dict[str, Any], options: list[str], labels: list[str]) -> str:
    """The right label. An answer is a label, an option's number from 0 or its text; two answers must agree."""
    given = {name: row[name] for name in ANSWERS if row.get(name) is not None}
    if not given:
        _field(row, "answerKey" if "answerKey" in row or isinstance(row.get("choices"), dict) else "answer")
    right: dict[str, str] = {}
    for name, value in given.items():
        index = isinstance(value, int | float) and not isinstance(value, bool) and value in range(len(labels))
        if index and (name in ("answer_index", "answer_idx") or not "".join(labels).isdecimal()):
            meant = [labels[int(value)]]
        elif (label := _label(value)) in labels:  # before the texts: an option of ARC has the text "C"
            meant = [label]
        elif isinstance(value, str):
            texts = [option.strip() for option in options]
            meant = [own for own, text in zip(labels, texts, strict=True) if text == value.strip()]
        else:
            meant = []
        if len(meant) != 1:
            numbers = f"a number from 0 to {len(labels) - 1} (not in quotes, which may count from 1)"
            raise _bad(name, f"be one of the labels {', '.join(labels)}, {numbers} or the text of one option", value)
        right[name] = meant[0]
    if len(set(right.values())) > 1:
        raise UserError(f"the answers differ: {', '.join(f'{name} means {gold}' for name, gold in right.items())}")
    return next(iter(right.values()))


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
