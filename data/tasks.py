"""Tasks: questions from the hub, from local files or embedded ones, as one plain `Task` of three splits.

    task = load_task("arc-challenge")        # a name of TASKS; "mmlu@REVISION" pins the hub's
    task = load_task("my/questions")         # a folder with train, validation and test as .jsonl or .parquet
    task = load_task("my/questions.jsonl")   # one file, split 80/20 by a hash of the id
    task = load_task("hub:ehovy/race:high")  # a dataset on the hub: NAME, or NAME:FOLDER of its parquet files

minem/data/rows.py reads the rows. The test split only measures: nothing may be chosen by it.
"""

import difflib
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minem.data.rows import Question, parse_columns, read_questions
from minem.errors import UserError
from minem.hub import download

SPLITS = ("train", "validation", "test")
# name -> (dataset on the hub, folder of its parquet files)
HUB = {
    "arc-challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc-easy": ("allenai/ai2_arc", "ARC-Easy"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "mmlu": ("cais/mmlu", "all"),
    "gsm8k": ("openai/gsm8k", "main"),
}
TOY = Path(__file__).parent / "toy"
EMBEDDED = {"toy": TOY, "word-problems": TOY.parent / "word_problems"}
TASKS = (*EMBEDDED, *HUB)
MMLU_TRAIN = 5_000  # questions sampled from the 99,842 of auxiliary_train: about as many as OpenBookQA has
HELD_OUT = 500  # training questions in place of a split that a dataset lacks: about as many as OpenBookQA has

Columns = Mapping[str, Sequence[str]]  # as `parse_columns` makes it


@dataclass(frozen=True)
class Task:
    """The three splits of a task. `rows_sha256` fingerprints exactly these questions; `note` is printed at start-up."""

    name: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]
    rows_sha256: str
    note: str = ""


def load_task(name_or_path: str, limit: int | None = None, seed: int = 0, columns: Sequence[str] = ()) -> Task:
    """Load a task by name (`TASKS`), from a local folder or file, or any dataset of the hub.

    `limit` caps every split, to the questions with the lowest hashes of their ids: the same for every seed, and spread
    over a file that is sorted by subject. `seed` chooses MMLU's training sample and nothing else. `columns`: as
    task.columns, what the columns of your own rows mean.
    Raises UserError for an unknown name, a bad row, an empty split, or an unreachable hub repository.
    """
    if limit is not None and limit < 1:
        raise UserError(f"task.limit must be at least 1, not {limit}")
    name, _, revision = name_or_path.partition("@")
    if columns and name in TASKS:
        raise UserError(f"task.columns names the columns of your own rows; {name} is built in, so leave it out")
    named = parse_columns(columns)
    if name in EMBEDDED and not revision:
        splits, note = _folder(EMBEDDED[name])
    elif name == "mmlu":
        splits, note = _mmlu(revision or None, seed)
    elif name in HUB or name.startswith("hub:"):
        splits, note = _hub_splits(name, revision or None, named)
    elif os.path.isdir(name_or_path):
        splits, note = _folder(Path(name_or_path), named)
    elif os.path.isfile(name_or_path):
        splits, note = _one_file(Path(name_or_path), named)
    else:
        near = "".join(f" (did you mean {task!r}?)" for task in difflib.get_close_matches(name, TASKS, n=1))
        raise UserError(
            f"no task or path {name_or_path!r}{near}: known tasks are {', '.join(TASKS)}; a path may be a folder with "
            "train, validation and test as .jsonl or .parquet, or one such file; hub:NAME is any dataset of the hub"
        )
    if len({bool(question.labels) for questions in splits.values() for question in questions}) > 1:
        raise UserError(f"the splits of {name_or_path} hold questions with options and without; a task has one kind")
    for split, questions in splits.items():
        if not questions:
            raise UserError(f"the {split} split of {name_or_path} is empty: every split needs at least one question")
    train, validation, test = (_first(splits[split], limit) for split in SPLITS)
    return Task(name_or_path, train, validation, test, _rows_sha256(train, validation, test), note)


def _folder(folder: Path, columns: Columns | None = None) -> tuple[dict[str, list[Question]], str]:
    splits = {}
    for split in SPLITS:
        names = [f"{split}.jsonl", f"{split}.parquet"]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) != 1:
            what = "both " + " and ".join(names) if found else "neither " + " nor ".join(names)
            raise UserError(f"{folder} holds {what}: it needs one of the two")
        splits[split] = read_questions(found[0], columns)
    trained = {question.id for question in splits["train"]}
    seen = sum(question.id in trained for split in ("validation", "test") for question in splits[split])
    return splits, f"{seen} questions of validation and test have ids that train has too" if seen else ""


def _one_file(path: Path, columns: Columns) -> tuple[dict[str, list[Question]], str]:
    """80 % for training; of the held-out 20 %, half for validation and half for the test."""
    questions = sorted(read_questions(path, columns), key=_id_hash)
    held_out = max(2, round(len(questions) / 5))
    tests = (held_out + 1) // 2
    splits = {"test": questions[:tests], "validation": questions[tests:held_out], "train": questions[held_out:]}
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    return splits, f"{path.name} is one file: split 80/20 by a hash of the ids, the held-out part in halves ({counts})"


def _hub_splits(
    name: str, revision: str | None, columns: Columns | None = None
) -> tuple[dict[str, list[Question]], str]:
    """The splits of a dataset. Those that it lacks are held out of train, the same questions for every seed."""
    files, note = _hub_files(name, SPLITS, revision, needed=("train",))
    splits = {"train": read_questions(files["train"], columns)}
    pool = splits["train"]
    for split in ("validation", "test"):
        bad: list[str] = []
        splits[split] = read_questions(files[split], columns, on_bad_row=bad.append)
        if bad and splits[split]:
            raise UserError(bad[0])
        if not splits[split]:
            note += f"; no row of its {split} split can be read ({bad[0]})" if bad else ""  # many hide the answers
            kept = splits["train"]
            held_out = {question.id for question in sorted(kept, key=_id_hash)[: min(HELD_OUT, len(kept) // 2)]}
            splits[split] = [question for question in kept if question.id in held_out]
            splits["train"] = [question for question in kept if question.id not in held_out]
            chosen = f"{len(held_out)} of its {len(pool)} training questions, chosen by a hash of the ids"
            note += f"; {split} is {chosen}"
    return splits, note


def _hub_files(
    name: str, splits: Iterable[str], revision: str | None, needed: Iterable[str] | None = None
) -> tuple[dict[str, list[Path]], str]:
    """(split -> its parquet files in the hub's cache, "repository at COMMIT"); only these splits are downloaded."""
    repo, _, folder = name.removeprefix("hub:").partition(":")
    repo, folder = HUB.get(name, (repo, folder or "data"))
    patterns = {split: f"{folder}/{split}-*.parquet" for split in splits}
    snapshot = download(repo, "dataset", list(patterns.values()), revision)
    files = {split: sorted(snapshot.glob(pattern)) for split, pattern in patterns.items()}
    there = "".join(f", but {split}" for split, found in files.items() if found)
    for split in (split for split in needed or files if not files[split]):
        raise UserError(
            f"dataset {repo!r} has no file {patterns[split]}{there} (revision {revision or 'main'}; or not in the "
            f"cache): connect to download it, pin a revision as in '{name}@REVISION', or give a folder as the task"
        )
    return files, f"{repo} at {snapshot.name[:12]}"  # the cache names a snapshot's folder after its commit


def _mmlu(revision: str | None, seed: int) -> tuple[dict[str, list[Question]], str]:
    """MMLU's validation and test as they are; training questions are a seeded sample of auxiliary_train.

    auxiliary_train was collected from other benchmarks, with repetitions. Questions that repeat or are in MMLU's own
    splits, ARC or OpenBookQA, word by word, are left out, so that a model has seen no test; unreadable rows, too.
    """
    files, source = _hub_files("mmlu", ("auxiliary_train", "dev", "validation", "test"), revision)
    splits = {split: read_questions(files[split]) for split in ("dev", "validation", "test")}
    others = (_hub_splits(name, None)[0] for name in ("arc-challenge", "arc-easy", "openbookqa"))
    taken = {_normal(question.text) for task in (splits, *others) for split in task for question in task[split]}
    bad: list[str] = []
    pool: list[Question] = []
    for path in files["auxiliary_train"]:
        for question in read_questions(path, on_bad_row=bad.append):
            if (words := _normal(question.text)) not in taken:
                taken.add(words)
                pool.append(question)
    splits["train"] = random.Random(seed).sample(pool, min(MMLU_TRAIN, len(pool)))
    distinct = f"{len(splits['train'])} of the {len(pool)} distinct questions of auxiliary_train that no other task has"
    return splits, f"{source}; train is a sample (seed {seed}) of {distinct} ({len(bad)} unreadable rows left out)"


def _id_hash(question: Question) -> bytes:
    return hashlib.sha256(question.id.encode()).digest()


def _first(questions: list[Question], limit: int | None) -> tuple[Question, ...]:
    """The `limit` questions with the lowest hashes of their ids, in the file's order."""
    chosen = {question.id for question in sorted(questions, key=_id_hash)[:limit]}
    return tuple(question for question in questions if question.id in chosen)


def _normal(text: str) -> str:
    """The words of a text in lower case: copies of a question differ in spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _rows_sha256(*splits: tuple[Question, ...]) -> str:
    digest = hashlib.sha256()
    for questions in splits:
        for question in questions:
            fields = [value for key, value in asdict(question).items() if key != "context" or value]
            digest.update(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()
