"""Tasks: multiple-choice questions from the hub, from local files, or the embedded toy, as one plain `Task`.

    task = load_task("arc-challenge")        # also arc-easy, openbookqa, mmlu, toy; "mmlu@REVISION" pins the hub's
    task = load_task("my/questions")         # a folder with train, validation and test as .jsonl or .parquet
    task = load_task("my/questions.jsonl")   # one file, split 80/20 by a hash of the id

Three schemas are read, row by row, wherever a row comes from:

    ARC          id, question,      choices {text, label}, answerKey
    OpenBookQA   id, question_stem, choices {text, label}, answerKey
    MMLU         question, subject, choices [4 texts], answer (0..3); labels are A, B, C, D

Hub tasks take their splits as the hub has them, but for MMLU, which has no training split of its own: see `_mmlu`.
The test split is there to be measured on and nothing else: nothing may be chosen by it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minem.errors import UserError, is_reference, require
from minem.hub import download

SPLITS = ("train", "validation", "test")
# name -> (dataset on the hub, folder of its parquet files)
HUB = {
    "arc-challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc-easy": ("allenai/ai2_arc", "ARC-Easy"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "mmlu": ("cais/mmlu", "all"),
}
TASKS = ("toy", *HUB)
TOY = Path(__file__).parent / "toy"
MMLU_TRAIN = 5_000  # questions sampled from the 99,842 of auxiliary_train: about as many as OpenBookQA has
_SURROGATE = re.compile("[\ud800-\udfff]")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class TaskConfig:
    """Which questions, and who says what is right."""

    name: str = "toy"  # toy, arc-challenge, arc-easy, openbookqa, mmlu, or a folder or file of your own
    limit: int | None = None  # at most so many questions of each split, train and test alike
    verdict: str | None = None  # module:function that replaces the answer check

    def __post_init__(self) -> None:
        require("task", self, limit=(self.limit is None or self.limit >= 1, "1 or more"))
        if self.verdict is not None:
            require("task", self, verdict=(is_reference(self.verdict), "written as module:function"))


@dataclass(frozen=True)
class Question:
    """One multiple-choice question. `labels[i]` names `options[i]`; `gold` is the right label."""

    id: str
    text: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    gold: str
    subject: str = ""


@dataclass(frozen=True)
class Task:
    """The three splits of a task. `rows_sha256` fingerprints exactly these questions; `note` is said at start-up."""

    name: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]
    rows_sha256: str
    note: str = ""


def load_task(name_or_path: str, limit: int | None = None, seed: int = 0) -> Task:
    """Load a task by name (`TASKS`) or from a local folder or file.

    `limit` caps every split alike, to the questions whose ids hash lowest: the same ones for every seed, and spread
    over the subjects where a file is sorted by them. `seed` chooses MMLU's training sample and nothing else.
    Raises UserError, in one sentence, for a name that is not known, a bad row (file, row number, field), an empty
    split, or a hub repository that cannot be had.
    """
    if limit is not None and limit < 1:
        raise UserError(f"task.limit must be at least 1, not {limit}")
    name, _, revision = name_or_path.partition("@")
    path = Path(name_or_path)
    if name == "toy" and not revision:
        splits, note = _folder(TOY)
    elif name == "mmlu":
        splits, note = _mmlu(revision or None, seed)
    elif name in HUB:
        splits, note = _hub_splits(name, revision or None)
    elif os.path.isdir(name_or_path):
        splits, note = _folder(path)
    elif os.path.isfile(name_or_path):
        splits, note = _one_file(path)
    else:
        close = difflib.get_close_matches(name, TASKS, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"no task or path {name_or_path!r}{meant}: known tasks are {', '.join(TASKS)}; a path may be a folder with "
            "train, validation and test as .jsonl or .parquet, or one such file"
        )
    for split, questions in splits.items():
        if not questions:
            raise UserError(f"the {split} split of {name_or_path} is empty: every split needs at least one question")
    train, validation, test = (_first(splits[split], limit) for split in SPLITS)
    return Task(name_or_path, train, validation, test, _rows_sha256(train, validation, test), note)


def _folder(folder: Path) -> tuple[dict[str, list[Question]], str]:
    splits = {}
    for split in SPLITS:
        found = [
            folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet") if (folder / f"{split}{suffix}").is_file()
        ]
        if len(found) != 1:
            what = f"both {split}.jsonl and {split}.parquet" if found else f"neither {split}.jsonl nor {split}.parquet"
            raise UserError(f"{folder} holds {what}: it needs one of the two")
        splits[split] = read_questions(found[0])
    trained = {question.id for question in splits["train"]}
    seen = sum(question.id in trained for split in ("validation", "test") for question in splits[split])
    return splits, f"{seen} questions of validation and test have ids that train has too" if seen else ""


def _one_file(path: Path) -> tuple[dict[str, list[Question]], str]:
    """80 % for training; of the held-out 20 %, half for validation and half for the test."""
    questions = sorted(read_questions(path), key=_id_hash)
    held_out = max(2, round(len(questions) / 5))
    tests = (held_out + 1) // 2
    splits = {
        "test": questions[:tests],
        "validation": questions[tests:held_out],
        "train": questions[held_out:],
    }
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    return splits, f"{path.name} is one file: split 80/20 by a hash of the ids, the held-out part in halves ({counts})"


def _hub_splits(name: str, revision: str | None) -> tuple[dict[str, list[Question]], str]:
    files, source = _hub_files(name, SPLITS, revision)
    return {split: _read_all(files[split]) for split in SPLITS}, source


def _hub_files(name: str, splits: Iterable[str], revision: str | None) -> tuple[dict[str, list[Path]], str]:
    """(split -> its parquet files in the hub's cache, "repository at COMMIT"); only these splits are downloaded."""
    repo, folder = HUB[name]
    patterns = {split: f"{folder}/{split}-*.parquet" for split in splits}
    snapshot = download(repo, "dataset", list(patterns.values()), revision)
    files = {split: sorted(snapshot.glob(pattern)) for split, pattern in patterns.items()}
    for split, found in files.items():
        if not found:
            raise UserError(
                f"dataset {repo!r} has no file {patterns[split]} (revision {revision or 'main'}; or not in the cache): "
                f"connect to download it, pin a revision as in '{name}@REVISION', or give a folder as the task"
            )
    return files, f"{repo} at {snapshot.name[:12]}"  # the cache names a snapshot's folder after its commit


def _mmlu(revision: str | None, seed: int) -> tuple[dict[str, list[Question]], str]:
    """MMLU's validation and test as they are; training questions are a seeded sample of auxiliary_train.

    auxiliary_train was put together from other benchmarks (ARC, OpenBookQA, RACE, MCTest), with repetitions. Repeated
    questions, those of MMLU's own splits and those of the other tasks here are left out, so that a model trained on
    "mmlu" has seen nobody's test. Its unreadable rows are left out too, and counted: nobody could put them right.
    """
    files, source = _hub_files("mmlu", ("auxiliary_train", "dev", "validation", "test"), revision)
    splits = {split: _read_all(files[split]) for split in ("validation", "test")}
    taken = {_normal(question.text) for split in ("dev", "validation", "test") for question in _read_all(files[split])}
    for other in HUB.keys() - {"mmlu"}:
        taken |= {
            _normal(question.text) for questions in _hub_splits(other, None)[0].values() for question in questions
        }
    bad: list[str] = []
    pool = []
    for path in files["auxiliary_train"]:
        for question in read_questions(path, on_bad_row=bad.append):
            normal = _normal(question.text)
            if normal not in taken:
                taken.add(normal)
                pool.append(question)
    splits["train"] = random.Random(seed).sample(pool, min(MMLU_TRAIN, len(pool)))
    note = (
        f"{source}; train is a sample (seed {seed}) of {len(splits['train'])} of the {len(pool)} distinct questions of "
        f"auxiliary_train that no other task has ({len(bad)} unreadable rows left out)"
    )
    return splits, note


def _read_all(paths: list[Path]) -> list[Question]:
    return [question for path in paths for question in read_questions(path)]


def read_questions(path: Path, on_bad_row: Callable[[str], None] | None = None) -> list[Question]:
    """Every row of a .jsonl or .parquet file, in order; ids are made from the content where a row has none.

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
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None
        yield from enumerate(table.to_pylist(), start=1)
        return
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is neither .jsonl nor .parquet")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
                    yield number, UserError(f"{path.name}, row {number}: not one JSON object in UTF-8 ({error})")


def _question(row: Any, where: str) -> Question:
    """One row in any of the three schemas -> Question. Raises UserError: `where`, then the field."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with a question, choices and an answer, not {_shown(row)}")
    if row.keys() == {"train"} and isinstance(row["train"], dict):  # how some copies of MMLU hold auxiliary_train
        row = row["train"]

    def field(name: str) -> Any:
        if row.get(name) is None:
            raise UserError(f"{where}: the field {name!r} is missing")
        return row[name]

    stem = "question_stem" if "question_stem" in row else "question"
    text = field(stem)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the field {stem!r} must be a text that is not empty, not {_shown(text)}")
    choices = field("choices")
    if isinstance(choices, dict):
        for part in ("text", "label"):
            if not isinstance(choices.get(part), list):
                raise UserError(f"{where}: the field 'choices.{part}' must be a list, not {_shown(choices.get(part))}")
        options, labels = choices["text"], [_label(label) for label in choices["label"]]
        gold = _label(field("answerKey"))
        answer = "answerKey"
    elif isinstance(choices, list):
        options, labels = choices, list(LETTERS[: len(choices)])
        index = field("answer")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(labels):
            raise UserError(
                f"{where}: the field 'answer' must be a number from 0 to {len(labels) - 1}, not {_shown(index)}"
            )
        gold = labels[index]
        answer = "answer"
    else:
        raise UserError(
            f"{where}: the field 'choices' must be {{text, label}} or a list of texts, not {_shown(choices)}"
        )
    if len(options) < 2 or len(options) != len(labels):
        found = f"{len(options)} texts and {len(labels)} labels"
        raise UserError(f"{where}: the field 'choices' must hold two or more texts and as many labels, not {found}")
    if not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: the field 'choices' must hold texts only, not {_shown(options)}")
    if not all(re.fullmatch(r"\w+", label) for label in labels) or len({label.lower() for label in labels}) < len(
        labels
    ):
        raise UserError(
            f"{where}: the labels in 'choices' must be different single words (ignoring case), not {_shown(labels)}"
        )
    if gold not in labels:
        raise UserError(
            f"{where}: the field {answer!r} must be one of the labels {', '.join(labels)}, not {_shown(gold)}"
        )
    subject = row.get("subject") or ""
    if not isinstance(subject, str):
        raise UserError(f"{where}: the field 'subject' must be a text, not {_shown(subject)}")
    identity = _label(row["id"]) if "id" in row else _content_id(text, options, subject)
    if not identity:
        raise UserError(f"{where}: the field 'id' must be a text or a number, not {_shown(row['id'])}")
    if any(_SURROGATE.search(part) for part in (text, *options, identity, subject)):
        raise UserError(f"{where}: a field holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Question(identity, text, tuple(options), tuple(labels), gold, subject)


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


def _id_hash(question: Question) -> bytes:
    return hashlib.sha256(question.id.encode()).digest()


def _first(questions: list[Question], limit: int | None) -> tuple[Question, ...]:
    """The `limit` questions whose ids hash lowest, in the file's order."""
    if limit is None or limit >= len(questions):
        return tuple(questions)
    chosen = {question.id for question in sorted(questions, key=_id_hash)[:limit]}
    return tuple(question for question in questions if question.id in chosen)


def _normal(text: str) -> str:
    """The words of a text in lower case: copies of a question differ in spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _rows_sha256(*splits: tuple[Question, ...]) -> str:
    digest = hashlib.sha256()
    for questions in splits:
        for question in questions:
            digest.update(json.dumps(list(asdict(question).values()), ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()
