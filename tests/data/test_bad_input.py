"""Bad questions, answers and templates, through the command line: one sentence that names the place, exit code 2.

python -m pytest tests/data/test_bad_input.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from minem.cli import main
from minem.data.tasks import SPLITS, TOY, Question
from minem.data.verdict import load_verdict
from minem.em.estep import judge
from minem.files import read_rows
from minem.generation.request import Completion

ARC = {
    "id": "q",
    "question": "What do plants need?",
    "choices": {"text": ["light", "soup"], "label": ["A", "B"]},
    "answerKey": "A",
}
MMLU = {"question": "What is 2 + 2?", "subject": "sums", "choices": ["3", "4"], "answer": 1}
FREE = {"id": "q", "question": "What is 9 + 9?", "answer": "9 + 9 = 18\n#### 18"}
SHORT = ["--set", "sampler.max_new_tokens=8", "--set", "eval.max_new_tokens=8", "--set", "eval.samples=0"]
SHORT += ["--set", "eval.diagnostics=0"]


def minem_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(row: dict[str, Any], count: int = 3) -> list[Any]:
    return [{**row, "id": f"q{i}"} for i in range(1, count + 1)]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def write(path: Path, content: list[Any] | str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet" and isinstance(content, list):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text)


def folder(root: Path, split: str = "", content: list[Any] | str | bytes = "", suffix: str = ".jsonl") -> Path:
    """Three good splits, except `split`."""
    for name in SPLITS:
        if name == split:
            write(root / f"{name}{suffix}", content)
        else:
            write(root / f"{name}.jsonl", rows(ARC))
    return root


# what is wrong -> (its split, its content, suffix, what the sentence must say)
JSONL, PARQUET = ".jsonl", ".parquet"
BAD: dict[str, tuple[str, list[Any] | str | bytes, str, str]] = {
    "no question": (
        "train",
        [*rows(ARC), without(ARC, "question")],
        JSONL,
        "train.jsonl, row 4: the field 'question' is",
    ),
    "no choices": (
        "test",
        [*rows(ARC), without(ARC, "choices")],
        JSONL,
        "test.jsonl, row 4: the field 'choices' is",
    ),
    "no answer": (
        "train",
        [*rows(ARC), without(ARC, "answerKey")],
        JSONL,
        "row 4: the field 'answerKey' is missing",
    ),
    "no labels": ("train", [{**ARC, "choices": {"text": ["a"]}}], JSONL, "row 1: the field 'choices.label' must be"),
    "an answer that is no label": ("test", [{**ARC, "answerKey": "C"}], JSONL, "must be one of the labels A, B"),
    "an empty answer": ("test", [{**ARC, "answerKey": ""}], JSONL, "row 1: the field 'answerKey' must be one of"),
    "an answer out of range": (
        "validation",
        [{**MMLU, "answer": 2}],
        JSONL,
        "'answer' must be one of the labels A, B, a number from 0 to 1",
    ),
    "a digit for an index": (
        "validation",
        [{**MMLU, "answer": "1"}],
        JSONL,
        '(not in quotes, which may count from 1) or the text of one option, not "1"',
    ),
    "a free-form answer of lines": (
        "test",
        [{**FREE, "answer": "a\nb"}],
        JSONL,
        "row 1: the field 'answer' must be",
    ),
    "an empty free-form answer": ("test", [{**FREE, "answer": "so\n####"}], JSONL, "row 1: the field 'answer' must"),
    "two kinds in a file": ("train", [*rows(ARC), FREE], JSONL, "train.jsonl, row 4: this row lacks options"),
    "an id twice": ("train", [*rows(ARC), *rows(ARC)], JSONL, "train.jsonl, row 4: the field 'id' repeats 'q1'"),
    "labels that repeat": (
        "train",
        [{**ARC, "choices": {"text": ["a", "b"], "label": ["A", "a"]}}],
        JSONL,
        "labels",
    ),
    "a list": ("train", "[1, 2]\n", JSONL, "train.jsonl, row 1: expected a JSON object"),
    "half a line": (
        "train",
        json.dumps(ARC) + '\n{"id": "q2", "quest',
        JSONL,
        "train.jsonl, row 2: not one JSON object",
    ),
    "no text": ("train", b"\xff\xfe\x00", JSONL, "train.jsonl, row 1: not one JSON object in UTF-8"),
    "an empty file": ("validation", "", JSONL, "the validation split of "),
    "blank lines alone": ("test", "\n\n", JSONL, "the test split of "),
    "an empty train": ("train", "", JSONL, "the train split of "),
    "an empty table": ("test", [], PARQUET, "the test split of "),
    "a column missing": (
        "test",
        [without(ARC, "question")],
        PARQUET,
        "test.parquet, row 1: the field 'question' is",
    ),
    "no choices column": ("test", [without(ARC, "choices")], PARQUET, "test.parquet, row 1: the field 'choices' is"),
    "no answer column": ("test", [without(ARC, "answerKey")], PARQUET, "row 1: the field 'answerKey' is missing"),
    "no parquet": ("train", b"PAR1 no more", PARQUET, "train.parquet is not a readable parquet file"),
}


def refused(result: Result, expected: str) -> None:
    """Exit code 2 and one sentence on stderr with `expected` in it; nothing on stdout."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("minem: ")
    assert expected in sentence
    assert len(sentence) < 500
    assert result.stdout == ""


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_named(tmp_path: Path, case: str) -> None:
    split, content, suffix, expected = BAD[case]
    task = folder(tmp_path / "task", split, content, suffix)
    refused(minem_cli("train", "--task", task, "--out", tmp_path / "run"), expected)
    refused(minem_cli("eval", "--task", task, "--split", "test"), expected)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_split_and_a_file_of_one_question_are_named(tmp_path: Path) -> None:
    task = folder(tmp_path / "task")
    (task / "test.jsonl").unlink()
    refused(minem_cli("train", "--task", task), "holds neither test.jsonl nor test.parquet: it needs one of the two")
    write(tmp_path / "one.jsonl", [ARC])
    refused(minem_cli("train", "--task", tmp_path / "one.jsonl"), "the validation split of ")
    write(tmp_path / "one.csv", "question,answer\n")
    refused(minem_cli("train", "--task", tmp_path / "one.csv"), "one.csv is neither .jsonl nor .parquet")


TEMPLATES: dict[str, tuple[str, str]] = {
    "refuses": ("{{ raise_exception('no user here') }}", "question 'q1': the chat template of "),
    "fails on one row": (
        "{% for m in messages %}{% if 'Row two' in m.content %}{{ raise_exception('not this one') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "question 'q2': the chat template of ",
    ),
    "divides by zero": ("{{ 1 / 0 }}", "fails on this chat: division by zero"),
    "does not end": ("{% for m in messages %}", "cannot be read: Unexpected end of template"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "question 'q1': the chat template of "),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_fails_is_named_with_the_question(tmp_path: Path, case: str) -> None:
    template, expected = TEMPLATES[case]
    shutil.copytree(TOY / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    numbered = [{**row, "question": f"Row {n}"} for row, n in zip(rows(ARC), ("one", "two", "three"), strict=True)]
    task = folder(tmp_path / "task", "test", numbered)
    refused(minem_cli("eval", "--model", tmp_path / "model", "--task", task, "--max-new-tokens", 8), expected)
    run = minem_cli("train", *SHORT, "--model", tmp_path / "model", "--task", task, "--out", tmp_path / "run")
    refused(run, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "train --dry-run", "eval"])
def test_a_token_that_the_model_lacks_is_found_before_anything_is_drawn(tmp_path: Path, command: str) -> None:
    shutil.copytree(TOY / "model", tmp_path / "model")
    tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokens["added_tokens"].append({"id": vocabulary, "content": "soup", **new})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
    odd = {**ARC, "id": "odd", "choices": {"text": ["light", "water"], "label": ["A", "B"]}}
    task = folder(tmp_path / "task", "test", [odd, *rows(ARC)])
    name, *flags = command.split()
    flags += ["--max-new-tokens", "8"] if name == "eval" else SHORT
    run = minem_cli(name, *flags, "--model", tmp_path / "model", "--task", task, "--out", tmp_path / "run")
    message = f"question 'q1': its prompt has the token 'soup', number {vocabulary}, and the model's vocabulary is"
    refused(run, f"{message} {vocabulary}")
    assert not (tmp_path / "run").exists()


# --- free-form questions, all the way -----------------------------------------------------------------------------


def gold_of_even_questions(text: str, question: Any) -> str | None:
    """Right for every second question."""
    return question.gold if int(question.id[1:]) % 2 == 0 else None


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("9 + 9 = 18\nThe best answer is $18.00", "stop", ("18", "accepted")),
        ("The best answer is 18 dollars.", "stop", ("18", "accepted")),
        ("The best answer is 19", "stop", ("19", "wrong")),
        ("#### 18", "stop", (None, "unparsed")),
        ("The best answer is 18", "length", ("18", "truncated")),
    ],
)
def test_free_form_draws_are_judged_by_their_number(text: str, reason: Any, expected: tuple[Any, str]) -> None:
    asked = Question("q", "What is 9 + 9?", (), (), "18")
    for verdict in (load_verdict(None), load_verdict("minem.data.verdict:number")):
        assert judge(Completion([1], text, [0.0], reason), asked, verdict) == expected


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    write(path, [{"id": f"q{i}", "question": f"What is {i} + 9?", "answer": f"{i + 9}"} for i in range(1, 21)])
    return path


@pytest.mark.parametrize("verdict", [None, "minem.data.verdict:number"])
def test_a_file_of_numbers_is_evaluated(sums: Path, verdict: str | None) -> None:
    own = ["--verdict", verdict] if verdict else []
    result = minem_cli("eval", "--task", sums, "--max-new-tokens", 8, "--json", *own)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["n"] == 2
    assert summary["accuracy"] == 0  # in 8 tokens nobody has answered


def test_a_file_of_numbers_is_trained_on(sums: Path, tmp_path: Path) -> None:
    own = ["--verdict", f"{__name__}:gold_of_even_questions", "--sampler", "pps", "--budget", 1]
    keep = ["--set", "sampler.filter=none"]  # draws of 8 tokens have not ended
    flags = ["--task", sums, "--iterations", 1, *SHORT, *own, *keep, "--out", tmp_path / "run", "--json"]
    result = minem_cli("train", *flags)
    assert result.exit_code == 0, result.output
    samples = list(read_rows(tmp_path / "run" / "iter-01" / "samples.jsonl"))
    assert len(samples) == 16
    assert {row["prompt"] for row in samples} == {"hinted"}
    for row in samples:
        number = int(row["id"][1:])
        assert row["gold"] == str(number + 9)
        assert row["answer"] == (row["gold"] if number % 2 == 0 else None)
    assert (tmp_path / "run" / "iter-01" / "model" / "model.safetensors").exists()


def test_the_number_verdict_refuses_a_question_without_a_number(tmp_path: Path) -> None:
    write(tmp_path / "words.jsonl", [{"id": f"q{i}", "question": "Which city?", "answer": "Paris"} for i in range(5)])
    flags = ["--task", tmp_path / "words.jsonl", "--max-new-tokens", 8, "--verdict", "minem.data.verdict:number"]
    result = minem_cli("eval", *flags)
    assert result.exit_code == 2
    assert "its answer 'Paris' is no number" in result.stderr.splitlines()[-1]
