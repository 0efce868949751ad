"""Tasks from files and from the hub: `MINEM_REAL_DATA=FOLDER python -m pytest tests/data/test_tasks.py`."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minem.data import tasks
from minem.data.rows import parse_columns
from minem.data.tasks import Question, load_task, read_questions
from minem.errors import UserError

REAL = os.environ.get("MINEM_REAL_DATA", "")
real_data = [
    pytest.mark.real_data,
    pytest.mark.skipif(not REAL, reason="MINEM_REAL_DATA names no folder of real rows"),
]

ARC = {
    "id": "q1",
    "question": "What do plants need?",
    "choices": {"text": ["light", "soup", "shoes"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
OPENBOOK = {"question_stem" if name == "question" else name: value for name, value in ARC.items()}
MMLU = {"question": "What is 2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}
FREE = {"id": "q1", "question": "How many eggs are 2 times 9?", "answer": "2 * 9 = <<2*9=18>>18 eggs.\n#### 18"}


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def arc_rows(count: int, prefix: str = "q") -> list:
    return [{**ARC, "id": f"{prefix}{i}", "question": f"Question {prefix} {i}?"} for i in range(count)]


def write_folder(folder: Path, sizes: dict[str, int], write=write_jsonl, suffix: str = ".jsonl") -> Path:
    for split, size in sizes.items():
        write(folder / f"{split}{suffix}", arc_rows(size, f"{split}-"))
    return folder


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_three_schemas(tmp_path: Path):
    arc, openbook = read_questions(write_jsonl(tmp_path / "a.jsonl", [ARC, {**OPENBOOK, "id": "q2"}]))
    assert arc == Question("q1", "What do plants need?", ("light", "soup", "shoes"), ("A", "B", "C"), "A")
    assert openbook == replace(arc, id="q2")
    (mmlu,) = read_questions(write_jsonl(tmp_path / "m.jsonl", [MMLU]))
    assert (mmlu.text, mmlu.options, mmlu.labels) == ("What is 2 + 2?", ("3", "4", "5", "6"), ("A", "B", "C", "D"))
    assert (mmlu.gold, mmlu.subject) == ("B", "arithmetic")


def test_free_form_rows(tmp_path: Path):
    answers = {
        FREE["answer"]: "18",
        "#### 1,000 ": "1,000",
        "18": "18",
        18: "18",
        0.5: "0.5",
        0.00005: "0.00005",
        1e16: "10000000000000000",
        " the Sun ": "the Sun",
        "a #### b\n#### c": "c",
    }
    rows = [{**FREE, "id": i, "answer": answer} for i, answer in enumerate(answers)]
    questions = read_questions(write_jsonl(tmp_path / "f.jsonl", rows))
    assert [question.gold for question in questions] == list(answers.values())
    assert questions[0] == Question("0", FREE["question"], (), (), "18")
    texts = [{**row, "answer": question.gold} for row, question in zip(rows, questions, strict=True)]
    assert read_questions(write_parquet(tmp_path / "f.parquet", texts)) == questions


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path):
    (read,) = read_questions(write_jsonl(tmp_path / "m.jsonl", [{**MMLU, "id": 7.0, "answer": 1.0}]))
    assert (read.id, read.gold) == ("7.0", "B")


def test_a_file_holds_one_kind_of_questions(tmp_path: Path):
    multiple, free = {**ARC, "id": "m"}, {**FREE, "id": "f"}
    for rows, odd in (
        ([multiple, free], "lacks options, which every"),
        ([free, multiple], "has options, which no"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl, row 2: this row {odd} row above it has"):
            read_questions(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_numbers_as_labels(tmp_path: Path):
    """A number in answer is a label there, and in answer_index it counts from 0."""
    numbered = {**BARE, "options": {"1": "light", "2": "soup", "3": "shoes"}}
    for row, gold in ((numbered | {"answer": 1}, "1"), (numbered | {"answer_index": 1}, "2")):
        (question,) = read_questions(write_jsonl(tmp_path / "n.jsonl", [row]))
        assert question.gold == gold
    with pytest.raises(UserError, match="'answer' must be one of the labels 1, 2, 3"):
        read_questions(write_jsonl(tmp_path / "n.jsonl", [numbered | {"answer": 0}]))


def test_the_files_of_a_split_are_one(tmp_path: Path):
    """Shards: an id may not repeat, content ids are told apart, and all questions are of one kind."""
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [MMLU]) for name in ("a", "b"))
    first, second = read_questions([one, two])
    assert second == replace(first, id=f"{first.id}-2")
    write_jsonl(one, [ARC])
    with pytest.raises(UserError, match=r"b\.jsonl, row 1: the field 'id' repeats 'q1' of a\.jsonl, row 1"):
        read_questions([one, write_jsonl(two, [ARC])])
    with pytest.raises(UserError, match=r"b\.jsonl, row 1: this row lacks options"):
        read_questions([one, write_jsonl(two, [{**FREE, "id": "f"}])])


def test_the_splits_of_a_task_are_of_one_kind(tmp_path: Path):
    folder = write_folder(tmp_path, {"train": 3, "validation": 2, "test": 2})
    write_jsonl(folder / "test.jsonl", [FREE])
    with pytest.raises(UserError, match="hold questions with options and without; a task has one kind"):
        load_task(str(folder))


def test_rows_under_a_train_field(tmp_path: Path):
    bare, nested = (read_questions(write_jsonl(tmp_path / "m.jsonl", [row])) for row in (MMLU, {"train": MMLU}))
    assert nested == bare


def test_numeric_labels_may_be_numbers(tmp_path: Path):
    row = {**ARC, "choices": {"text": ["a", "b"], "label": [1, 2]}, "answerKey": 2, "id": 7}
    (question,) = read_questions(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert (question.labels, question.gold, question.id) == (("1", "2"), "2", "7")


def test_ids_from_content_are_stable_and_differ(tmp_path: Path):
    other = {**MMLU, "choices": ["4", "3", "5", "6"]}
    ids = [q.id for q in read_questions(write_jsonl(tmp_path / "m.jsonl", [MMLU, other, MMLU, MMLU]))]
    # Written down: an id that changed from release to release would unhinge resumed runs and one-file splits.
    assert ids[0] == "cd282f6c546ebe27"
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert ids[1] not in ids[:1] + ids[2:]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"question": None}, "'question' is missing"),
        ({"question": "  "}, "'question'"),
        ({"choices": None}, "'choices' is missing"),
        ({"choices": {"text": ["a", "b", "c"], "label": None}}, "'choices.label'"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "2 texts and 3 labels"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "1 texts and 1 labels"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "a"]}}, "labels in 'choices'"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B or C"]}}, "labels in 'choices'"),
        ({"choices": {"text": [1, 2], "label": ["A", "B"]}}, "texts only"),
        ({"answerKey": None}, "'answerKey' is missing"),
        (
            {"answerKey": "E"},
            "'answerKey' must be one of the labels A, B, C, a number from 0 to 2 (not in quotes",
        ),
        ({"id": ""}, "'id'"),
        (
            {"choices": ["a", "b"], "answerKey": None, "answer": 2},
            "'answer' must be one of the labels A, B, a number from 0 to 1",
        ),
        ({"choices": ["a", "b"], "answer": -1}, "'answer'"),
        (
            {"choices": ["a", "b"], "answerKey": None, "answer": 1.5},
            "or the text of one option, not 1.5",
        ),
        ({"choices": [], "answer": 0}, "must hold 2 to 26 texts, each with a label, not 0 texts and 0 labels"),
        ({"choices": ["a", "b"], "answer": True}, "'answer'"),
        ({"choices": ["a", "a"], "answerKey": None, "answer": "a"}, 'the text of one option, not "a"'),
        ({"choices": ["a", "b"], "answer": "b"}, "the answers differ: answerKey means A, answer means B"),
        ({"choices": "a, b"}, "'choices'"),
        ({"subject": 7}, "'subject'"),
        ({"choices": None, "answerKey": None, "answer": " "}, "'answer' must be a number or a text of one line"),
        (
            {"choices": None, "answerKey": None, "answer": "18\n#### "},
            "'answer' must be a number or a text of one line",
        ),
        ({"choices": None, "answerKey": None, "answer": "two\nlines"}, "end with a line '#### ANSWER'"),
        ({"choices": None, "answerKey": None, "answer": [18]}, "'answer' must be a number or a text of one line"),
        ({"choices": None, "answerKey": None, "answer": True}, "'answer' must be a number or a text of one line"),
        ({"choices": None, "answerKey": None}, "'choices' is missing (a free-form question has"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, write, change: dict, field: str):
    bad = {**ARC, "id": "bad", **change}
    # parquet holds one type a column, so there the bad row stands alone
    rows = [ARC, bad] if write is write_jsonl else [bad]
    path = write(tmp_path / f"rows.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}, row {len(rows)}: ")
    assert field in message
    assert "\n" not in message


SAME = Question("q1", "What do plants need?", ("light", "soup", "shoes"), ("A", "B", "C"), "A")
BARE = {"id": "q1", "question": "What do plants need?"}
LIST = {**BARE, "options": ["light", "soup", "shoes"]}


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({**LIST, "answer": "A"}, []),  # RACE
        ({**LIST, "answer": 0, "category": "biology"}, []),
        ({**LIST, "answer": " light "}, []),
        ({**LIST, "answer": "A", "answer_index": 0, "question_id": 7}, []),  # MMLU-Pro
        ({**LIST, "answerKey": "A"}, []),
        ({**BARE, "options": {"A": "light", "B": "soup", "C": "shoes"}, "answer": "light", "answer_idx": "A"}, []),
        ({**BARE, "A": "light", "B": "soup", "C": "shoes", "D": None, "answer": "A"}, []),
        ({**BARE, "opa": "light", "opb": "soup", "opc": "shoes", "cop": 0}, ["options=opa,opb,opc", "answer=cop"]),
        ({**LIST, "answer": "A", "support": "Plants live by light."}, ["ignore=support"]),
        ({**LIST, "answer": "A", "choices": ["no", "yes"]}, ["ignore=choices"]),
        ({**ARC, "question_stem": "?", "problem": ARC["question"]}, ["question=problem"]),
        ({**LIST, "answerKey": "C", "gold": "A"}, ["answer=gold"]),
        ({**LIST, "answer": "A", "ctx_a": "x", "ctx_b": "y"}, ["ignore=ctx_a", "ignore=ctx_b,ctx_c"]),
        ({**LIST, "answer": "A", "context": ""}, []),
        ({**BARE, "options": {"A": "light", "B": "soup", "C": "shoes", "D": None}, "answer": "A"}, []),
        ({**BARE, "options": ["A)light", "B) soup", "C) shoes"], "answer": "A"}, []),  # AQuA
    ],
)
def test_options_are_recognised_in_whatever_columns_they_stand(tmp_path: Path, write, row: dict, columns: list[str]):
    path = write(tmp_path / f"rows.{'jsonl' if write is write_jsonl else 'parquet'}", [row])
    assert read_questions(path, parse_columns(columns)) == [SAME]


@pytest.mark.parametrize("column", ["context", "passage", "article"])
def test_a_passage_is_part_of_the_question(tmp_path: Path, column: str):
    row = {**LIST, "answer": "A", column: "Plants live by light."}
    assert read_questions(write_jsonl(tmp_path / "r.jsonl", [row])) == [replace(SAME, context="Plants live by light.")]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({**BARE, "answer": "A", "opa": "light", "opb": "soup"}, [], "column 'opa' may hold options or a passage"),
        ({**BARE, "answer": "light", "distractor1": "soup"}, [], "column 'distractor1' may hold options"),
        ({**BARE, "answer": "light", "endings": ["soup"]}, [], "column 'endings' may hold options"),
        ({**BARE, "answer": "light", "mc1_targets": {"choices": []}}, [], "column 'mc1_targets' may hold options"),
        ({**BARE, "answer": "light", "A": "soup"}, [], "column 'A' may hold options"),
        ({**LIST, "answer": "A", "support": "Plants ..."}, [], "column 'support' may hold options or a passage"),
        ({**BARE, "answer": "4", "Body": "Ann has 2 plants."}, [], "column 'Body' may hold options or a passage"),
        ({**LIST, "answer": "A", "choices": ["a", "b"]}, [], "both 'choices' and 'options'"),
        ({**BARE, "answer": 0, "answers": ["light", "soup"]}, [], "column 'answers' may hold options"),
        ({**BARE, "answer": 0, "made": ["light", "soup"]}, [], "column 'made' may hold options"),
        ({**BARE, "answer": "light", "Incorrect Answer 1": "soup"}, [], "column 'Incorrect Answer 1' may hold options"),
        ({**BARE, "answer": "light", "holding_0": "soup"}, [], "column 'holding_0' may hold options"),
        ({**BARE, "answer": "light", "dialogue": "Ann: ..."}, [], "column 'dialogue' may hold options or a passage"),
        ({**LIST, "answer": "2"}, [], "a number from 0 to 2 (not in quotes, which may count from 1)"),
        ({**LIST, "answer": "A", "A": "light", "B": "soup"}, [], "options twice, in 'options' and 'A'"),
        ({**LIST, "answer": "A", "context": "x", "passage": "y"}, [], "both 'context' and 'passage'"),
        ({**LIST, "answer": "A", "context": ["x"]}, [], "'context' must be a text"),
        ({**LIST, "answer": "A", "answer_index": 1}, [], "answers differ: answer means A, answer_index means B"),
        ({**LIST, "answer": "A"}, ["question=problem"], "names 'problem'; the columns of this row are 'id'"),
    ],
)
def test_what_may_be_options_or_a_passage_is_never_left_out_silently(
    tmp_path: Path, row: dict, columns: list[str], message: str
):
    with pytest.raises(UserError, match=re.escape(message)):
        read_questions(write_jsonl(tmp_path / "rows.jsonl", [row]), parse_columns(columns))


@pytest.mark.parametrize("text", ["question", "question=", "gold=answer", "answer=a,b", "=a"])
def test_a_wrong_task_columns_is_named(text: str):
    with pytest.raises(UserError, match=r"task\.columns: .* must be NAME=COLUMN, .* a NAME is question, .*, ignore"):
        parse_columns([text])


@pytest.mark.parametrize("line", ["{", "[1, 2]", '"text"', "7", "null", "\xff\xfe"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ARC).encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, row 3: "):
        read_questions(path)


def test_a_repeated_id_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"rows\.jsonl, row 3: the field 'id' repeats 'q1' of row 1"):
        read_questions(write_jsonl(tmp_path / "rows.jsonl", [ARC, {**ARC, "id": "q2"}, ARC]))


def test_what_json_allows_and_text_does_not_is_named(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    good = json.dumps(ARC)
    for bad, named in (
        (json.dumps({**ARC, "question": "half \ud800 a pair"}), "surrogate"),
        (json.dumps({**ARC, "id": "\udfff"}), "surrogate"),
        ("[" * 100_000, "not one JSON object"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(UserError, match=named) as error:
            read_questions(path)
        assert "row 2" in str(error.value)
    path.write_bytes(b"\xef\xbb\xbf" + good.encode())  # as Windows writes UTF-8
    assert len(read_questions(path)) == 1
    with pytest.raises(UserError, match="no task or path"):
        load_task("x" * 5000)


def test_bad_rows_can_be_left_out(tmp_path: Path):
    bad: list[str] = []
    path = write_jsonl(tmp_path / "rows.jsonl", [ARC, {**ARC, "answerKey": "Z"}, {**ARC, "id": "q3"}])
    assert [q.id for q in read_questions(path, on_bad_row=bad.append)] == ["q1", "q3"]
    assert len(bad) == 1
    assert bad[0].startswith("rows.jsonl, row 2: ")


def test_a_broken_parquet_file_is_named(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    path.write_text("no parquet")
    with pytest.raises(UserError, match=r"rows\.parquet is not a readable parquet file"):
        read_questions(path)


# --- folders and single files ----------------------------------------------------------------------------------------


def test_a_folder_from_jsonl_and_from_parquet_is_the_same_task(tmp_path: Path):
    sizes = {"train": 7, "validation": 3, "test": 4}
    jsonl = load_task(str(write_folder(tmp_path / "j", sizes)))
    parquet = load_task(str(write_folder(tmp_path / "p", sizes, write_parquet, ".parquet")))
    assert [len(jsonl.train), len(jsonl.validation), len(jsonl.test)] == [7, 3, 4]
    assert jsonl.note == ""
    assert parquet == replace(jsonl, name=parquet.name)
    edited = tmp_path / "j" / "test.jsonl"
    edited.write_text(edited.read_text().replace('"answerKey": "A"', '"answerKey": "B"', 1))
    assert load_task(str(tmp_path / "j")).rows_sha256 != jsonl.rows_sha256


def test_a_folder_that_lacks_or_doubles_a_split_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path, {"train": 2, "test": 2})
    with pytest.raises(UserError, match=r"neither validation\.jsonl nor validation\.parquet"):
        load_task(str(folder))
    write_folder(tmp_path, {"validation": 2})
    write_folder(tmp_path, {"validation": 2}, write_parquet, ".parquet")
    with pytest.raises(UserError, match=r"both validation\.jsonl and validation\.parquet"):
        load_task(str(folder))


def test_an_empty_split_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"the validation split of .* is empty"):
        load_task(str(write_folder(tmp_path, {"train": 2, "validation": 0, "test": 2})))


def test_questions_shared_by_train_and_test_are_said(tmp_path: Path):
    folder = write_folder(tmp_path, {"train": 3, "validation": 2, "test": 2})
    write_jsonl(folder / "test.jsonl", arc_rows(2, "train-"))
    assert "2 questions" in load_task(str(folder)).note


def test_one_file_is_split_by_ids_in_any_order_of_rows(tmp_path: Path):
    rows = arc_rows(200)
    task = load_task(str(write_jsonl(tmp_path / "one.jsonl", rows)))
    splits = {split: {q.id for q in getattr(task, split)} for split in tasks.SPLITS}
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert set.union(*splits.values()) == {row["id"] for row in rows}
    assert "80/20" in task.note
    random.Random(0).shuffle(rows)
    assert load_task(str(write_jsonl(tmp_path / "one.jsonl", rows))) == task


def test_limit_caps_every_split_alike_and_is_nested(tmp_path: Path):
    folder = str(write_folder(tmp_path, {"train": 30, "validation": 4, "test": 20}))
    five, ten, everything = (load_task(folder, limit=limit) for limit in (5, 10, None))
    assert [len(five.train), len(five.validation), len(five.test)] == [5, 4, 5]
    assert set(five.train) < set(ten.train) < set(everything.train)
    assert list(five.test) == [q for q in everything.test if q in five.test]
    assert load_task(folder, limit=5, seed=1) == five
    assert len({five.rows_sha256, ten.rows_sha256, everything.rows_sha256}) == 3
    with pytest.raises(UserError, match=r"task\.limit must be at least 1, not 0"):
        load_task(folder, limit=0)


def test_a_name_that_is_not_known_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'arc-challenge'"):
        load_task("arc-chalenge")
    with pytest.raises(UserError, match=r"known tasks are toy, word-problems, arc-challenge, .* gsm8k;"):
        load_task("no/such/folder")


def test_importing_tasks_loads_nothing_heavy():
    code = "import sys, minem.data.tasks; print(sorted({'torch', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(tasks.__file__).parents[2])}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout.strip() == "[]"


# --- the hub, played by a cache folder -------------------------------------------------------------------------------


def write_cache(folder: Path, repo: str, files: dict[str, list]) -> None:
    """A cache as huggingface_hub leaves it, so that its own offline path is what reads it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = folder / f"datasets--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, rows in files.items():
        write_parquet(root / "snapshots" / commit / name, rows)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {
        f"{folder}/{split}-00000-of-00001.parquet": arc_rows(size, f"{folder}-{split}-")
        for folder in ("ARC-Challenge", "ARC-Easy")
        for split, size in {"train": 5, "validation": 3, "test": 4}.items()
    }
    write_cache(tmp_path / "hub", "allenai/ai2_arc", files)
    openbook = {f"main/{split}-00000-of-00001.parquet": [OPENBOOK] for split in tasks.SPLITS}
    write_cache(tmp_path / "hub", "allenai/openbookqa", openbook)
    auxiliary = [{**MMLU, "question": f"Auxiliary {i}", "subject": ""} for i in range(20)]
    auxiliary += auxiliary[:3]  # repeated
    auxiliary += [{**MMLU, "question": "what do  plants need", "subject": ""}]  # OpenBookQA's
    # ARC's, of every split, spelt another way
    taken = [f"QUESTION  {part} {split} {0}" for part in ("arc_challenge", "arc_easy") for split in tasks.SPLITS]
    auxiliary += [{**MMLU, "question": name.replace("_", "-"), "subject": ""} for name in taken]
    auxiliary += [{**MMLU, "question": f"{split} 1!", "subject": ""} for split in ("dev", "validation", "test")]
    auxiliary += [{**MMLU, "answer": 4}]  # unreadable
    mmlu = {
        split: [{**MMLU, "question": f"{split.title()} {i}"} for i in range(3)]
        for split in ("dev", "validation", "test")
    }
    mmlu["auxiliary_train"] = auxiliary
    files = {f"all/{split}-00000-of-00001.parquet": rows for split, rows in mmlu.items()}
    write_cache(tmp_path / "hub", "cais/mmlu", files)
    gsm8k = {
        f"main/{split}-00000-of-00001.parquet": [
            {"question": f"{split}: 2 times {i}?", "answer": f"2 * {i} = <<2*{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
            for i in range(size)
        ]
        for split, size in {"train": 30, "test": 4}.items()
    }
    write_cache(tmp_path / "hub", "openai/gsm8k", gsm8k)
    return tmp_path / "hub"


def test_a_hub_task_is_read_offline_from_the_cache(cache: Path):
    task = load_task("arc-challenge")
    assert [len(task.train), len(task.validation), len(task.test)] == [5, 3, 4]
    assert task.train[0].id == "ARC-Challenge-train-0"
    assert task.note == "allenai/ai2_arc at 0123456789ab"
    assert load_task("openbookqa").train[0].text == "What do plants need?"


def test_mmlu_trains_on_a_sample_that_nobody_is_tested_on(cache: Path, monkeypatch: pytest.MonkeyPatch):
    task = load_task("mmlu")
    assert {q.text for q in task.train} == {f"Auxiliary {i}" for i in range(20)}
    assert [q.text for q in task.test] == ["Test 0", "Test 1", "Test 2"]
    assert "20 of the 20 distinct questions" in task.note
    assert "1 unreadable" in task.note
    monkeypatch.setattr(tasks, "MMLU_TRAIN", 5)
    first, again, other = (load_task("mmlu", seed=seed).train for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again != other


def test_gsm8k_holds_its_validation_out_of_train(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "HELD_OUT", 6)
    task = load_task("gsm8k")
    assert [len(task.train), len(task.validation), len(task.test)] == [24, 6, 4]
    asked = {q.text for q in task.train} | {q.text for q in task.validation}
    assert asked == {f"train: 2 times {i}?" for i in range(30)}
    assert [(q.text, q.gold, q.labels) for q in task.test] == [
        (f"test: 2 times {i}?", str(2 * i), ()) for i in range(4)
    ]
    assert task.note == (
        "openai/gsm8k at 0123456789ab; validation is 6 of its 30 training questions, chosen by a hash of the ids"
    )
    assert load_task("gsm8k", seed=1) == task


def test_any_dataset_of_the_hub_by_its_name(cache: Path, tmp_path: Path):
    rows = [{**BARE, "id": f"r{i}", "opa": "light", "opb": "soup", "cop": 1} for i in range(20)]
    write_cache(tmp_path / "hub", "me/exam", {"high/train-00000-of-00001.parquet": rows})
    task = load_task("hub:me/exam:high", columns=["options=opa,opb", "answer=cop"])
    assert [len(task.train), len(task.validation), len(task.test)] == [5, 10, 5]
    assert {q.gold for q in task.train} == {"B"}
    assert "me/exam at 0123456789ab; validation is 10 of its 20 training questions" in task.note
    assert load_task("hub:allenai/openbookqa:main").train == load_task("openbookqa").train
    hidden = [{**ARC, "id": f"h{i}", "answerKey": None} for i in range(4)]
    shards = {f"data/{split}-0.parquet": rows for split, rows in (("train", arc_rows(9)), ("test", hidden))}
    write_cache(tmp_path / "hub", "me/hidden", shards)
    task = load_task("hub:me/hidden")
    assert [len(task.train), len(task.validation), len(task.test)] == [3, 4, 2]
    assert "no row of its test split can be read (test-0.parquet, row 1: the field 'answerKey' is missing)" in task.note
    write_cache(tmp_path / "hub", "me/tests", {"data/test-0.parquet": arc_rows(4)})
    with pytest.raises(UserError, match=r"'me/tests' has no file data/train-\*\.parquet, but test \(revision"):
        load_task("hub:me/tests")
    with pytest.raises(UserError, match=r"dataset 'me/exam' has no file data/train-\*\.parquet"):
        load_task("hub:me/exam")
    with pytest.raises(UserError, match=r"row 1: the column 'opa' may hold options"):
        load_task("hub:me/exam:high")
    with pytest.raises(UserError, match=r"openbookqa is built in"):
        load_task("openbookqa", columns=["question=question_stem"])


def test_what_the_cache_lacks_gets_one_sentence(cache: Path):
    (missing,) = cache.glob("datasets--cais--mmlu/snapshots/*/all/test-*.parquet")
    missing.unlink()
    with pytest.raises(UserError, match=r"dataset 'cais/mmlu' has no file all/test-\*\.parquet") as caught:
        load_task("mmlu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="allenai/ai2_arc"):
        load_task("arc-easy@v9")


# --- real rows -------------------------------------------------------------------------------------------------------


class TestRealRows:
    pytestmark = real_data

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("arc-challenge", {"train": 1119, "validation": 299, "test": 1172}),
            ("openbookqa", {"train": 4957, "validation": 500, "test": 500}),
            ("mmlu", {"dev": 285, "validation": 1531}),
        ],
    )
    def test_every_row_loads_from_jsonl_and_from_parquet_made_of_it(self, name: str, sizes: dict, tmp_path: Path):
        for split, size in sizes.items():
            path = Path(REAL) / name / f"{split}.jsonl"
            questions = read_questions(path)
            rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
            assert len(questions) == len({q.id for q in questions}) == size == len(rows)
            for row, question in zip(rows, questions, strict=True):
                gold = question.options[question.labels.index(question.gold)]
                if isinstance(row["choices"], dict):
                    assert gold == row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
                    assert question.labels == tuple(row["choices"]["label"])
                else:
                    assert gold == row["choices"][row["answer"]]
            assert read_questions(write_parquet(tmp_path / f"{split}.parquet", rows)) == questions

    def test_the_folder_is_a_task(self):
        task = load_task(str(Path(REAL) / "arc-challenge"))
        assert [len(task.train), len(task.validation), len(task.test)] == [1119, 299, 1172]
        assert {len(q.labels) for q in task.test} == {3, 4, 5}
        assert sum(q.labels[0] == "1" for q in task.test) == 22
