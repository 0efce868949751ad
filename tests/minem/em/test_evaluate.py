"""`minem eval`: the numbers are those of the answers, and an evaluation that is killed ends with the same result."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import minem
import minem.model.weights
from minem.cli import main
from minem.config import EvalSection
from minem.data.prompts import Prompts, load_prompts
from minem.data.tasks import Question, load_task
from minem.data.verdict import strict
from minem.em.evaluate import FIELDS, Evaluation, facts, greedy_rows, majority, summarise_answers
from minem.errors import Interrupted
from minem.files import read_rows
from minem.runs.folder import answer_file
from minem.statistics import wilson

SMALL = ["--limit", 6, "--max-new-tokens", 64]


def minem_eval(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def printed(result: Result) -> dict[str, Any]:
    """What --json prints, without the place of the answers."""
    assert result.exit_code == 0, result.output + repr(result.exception)
    summary = json.loads(result.stdout)
    summary.pop("answers")
    return summary


def question(name: str, gold: str = "A", subject: str = "") -> Question:
    return Question(name, "?", ("x", "y", "z"), ("A", "B", "C"), gold, subject)


def row(question: Question, answer: str | None, status: str | None = None, text: str = "", tokens: int = 10) -> dict:
    status = status or ("unparsed" if answer is None else "accepted" if answer == question.gold else "wrong")
    return {
        "id": question.id,
        "answer": answer,
        "gold": question.gold,
        "status": status,
        "text": text,
        "tokens": tokens,
    }


def test_the_summary_of_answers_written_out_by_hand():
    questions = [question("1", "A", "physics"), question("2", "B", "physics"), question("3", "C", "law")]
    one, two, three = questions
    answers = {
        ("1", 0): row(one, "A", tokens=5, text="The best answer is A"),
        ("2", 0): row(two, None, text="It must be that option B is correct.", tokens=7),  # flexible alone reads it
        ("3", 0): row(three, "C", "truncated", text="The best answer is C", tokens=12),  # readable, but never ended
    }
    draws = {"1": ["A", "B", "A"], "2": [None, None, None], "3": ["A", "B", "C"]}
    answers |= {(q.id, k): row(q, draws[q.id][k - 1], tokens=k) for q, k in product(questions, (1, 2, 3))}
    rows = [{**answer, "draw": k} for (_, k), answer in answers.items()]
    summary = summarise_answers(questions, rows, samples=3)
    low, high = wilson(1, 3)
    assert summary == {
        "n": 3,
        "correct": 1,
        "accuracy": 1 / 3,
        "low": low,
        "high": high,
        "flexible": 2 / 3,
        "unparsed": 1 / 3,
        "truncated": 1 / 3,
        "tokens": 8.0,
        "sampled": 3 / 9,  # A, A and C
        "pass_at_k": {"1": pytest.approx(3 / 9), "2": pytest.approx((1 + 0 + 2 / 3) / 3)},
        "majority": 1 / 3,  # of A, B and C with one vote each the first wins, which is wrong for question 3
        "subjects": {
            "law": {"n": 1, "correct": 0, "accuracy": 0.0, "low": wilson(0, 1)[0], "high": wilson(0, 1)[1]},
            "physics": {"n": 2, "correct": 1, "accuracy": 0.5, "low": wilson(1, 2)[0], "high": wilson(1, 2)[1]},
        },
    }
    greedy = summarise_answers(questions, rows, samples=0)
    assert greedy["sampled"] is None
    assert greedy.keys() == summary.keys() - {"pass_at_k", "majority"}


@pytest.mark.parametrize(
    ("drawn", "winner"),
    [
        (["A"], "A"),
        (["B", "A", "A"], "A"),
        (["B", "A", "A", "B"], "B"),
        (["A", "B", "B", "A"], "A"),
        ([None, None, "C"], "C"),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_vote(drawn, winner):
    assert majority([row(question("1"), answer) for answer in drawn]) == winner


def test_an_answer_that_was_cut_off_has_no_vote():
    cut = [row(question("1"), "B", "truncated")] * 2
    assert majority([*cut, row(question("1"), "A")]) == "A"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """An evaluation that nothing disturbed, and its result."""
    out = tmp_path_factory.mktemp("evals") / "whole"
    return out, printed(minem_eval(*SMALL, "--samples", 4, "--out", out, "--json"))


def test_its_result_is_that_of_its_answers(whole):
    out, result = whole
    rows = list(read_rows(out / "answers.jsonl"))
    questions = load_task("toy", 6).test
    answers = {(r["id"], r["draw"]): r for r in rows}
    assert len(rows) == len(answers) == 6 * 5
    assert all(set(r) == {*FIELDS, "draw"} for r in rows)
    assert {key: result[key] for key in result if key not in ("model", "task", "split", "max_new_tokens")} == (
        summarise_answers(questions, rows, 4)
    )
    assert result["pass_at_k"].keys() == {"1", "2", "4"}
    assert result["pass_at_k"]["1"] == pytest.approx(result["sampled"])
    sampled = [sum(answers[q.id, k]["status"] == "accepted" for k in range(1, 5)) for q in questions]
    assert result["pass_at_k"]["4"] == sum(map(bool, sampled)) / 6


def test_killed_at_any_answer_it_ends_with_the_same_result(whole, tmp_path, monkeypatch):
    """Four times, between two lines of the file and in a line by turns."""
    _, result = whole
    out, command = tmp_path / "pieces", [*SMALL, "--samples", 4, "--json", "--out", tmp_path / "pieces"]
    real, left = minem.em.evaluate.judge, [0]

    def judge_or_stop(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted("stopped by the test")
        return real(*arguments)

    monkeypatch.setattr("minem.em.evaluate.judge", judge_or_stop)
    stops = 0
    while True:
        left[0] = 7
        again = minem_eval(*command)
        if again.exit_code == 0:
            break
        assert again.exit_code == 3
        stops += 1
        with open(out / "answers.jsonl", "ab") as file:
            file.write([b"", b'{"id": "toy-te'][stops % 2])
    assert stops == 4
    assert printed(again) == result
    drawn = [(r["id"], r["draw"]) for r in read_rows(out / "answers.jsonl")]
    assert len(drawn) == len(set(drawn)) == 30
    monkeypatch.setattr("minem.em.evaluate.judge", None)  # nothing is drawn any more
    assert printed(minem_eval(*command)) == result


def test_more_draws_continue_from_those_that_are_there(whole, tmp_path):
    _, result = whole
    out = tmp_path / "grown"
    greedy = printed(minem_eval(*SMALL, "--out", out, "--json"))
    assert greedy["sampled"] is None
    before = (out / "answers.jsonl").read_bytes()
    grown = minem_eval(*SMALL, "--samples", 4, "--out", out, "--json")
    assert "has 6 answers already" in grown.stderr
    assert printed(grown) == result
    assert (out / "answers.jsonl").read_bytes().startswith(before)
    assert printed(minem_eval(*SMALL, "--out", out, "--json")) == greedy  # and fewer leave the others aside


def test_another_evaluation_in_the_same_folder_is_refused_with_the_difference(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole[0], out)
    before = (out / "answers.jsonl").read_bytes()
    model, tokenizer = minem.load("toy")
    minem.save(model, tokenizer, tmp_path / "template")  # puts other questions with the same weights
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    minem.save(model.bfloat16(), tokenizer, tmp_path / "weights")
    for more, named in (
        (["--limit", 5], "eval.rows: "),
        (["--max-new-tokens", 32], "eval.max_new_tokens: 64 -> 32"),
        (["--seed", 1], "eval.seed: 0 -> 1"),
        (["--split", "validation"], 'eval.split: "test" -> "validation"'),
        (["--verdict", f"{__name__}:always_a"], "eval.verdict: not set -> "),
        (["--model", tmp_path / "template"], "eval.chat template: "),
        (["--model", tmp_path / "weights"], "eval.model: "),
    ):
        refused = minem_eval(*SMALL, "--out", out, *more)
        assert refused.exit_code == 2
        assert named in refused.stderr
        assert "--overwrite" in refused.stderr
    assert (out / "answers.jsonl").read_bytes() == before
    repeated = printed(minem_eval(*SMALL, "--out", out, "--json", "--overwrite", "--limit", 5))
    assert repeated["n"] == len(list(read_rows(out / "answers.jsonl"))) == 5


def always_a(text, question):
    return "A" if text else None


def test_a_verdict_of_ones_own_decides(tmp_path):
    out = tmp_path / "own"
    summary = printed(minem_eval(*SMALL, "--verdict", f"{__name__}:always_a", "--out", out, "--json"))
    questions = load_task("toy", 6).test
    assert summary["correct"] == sum(q.gold == "A" for q in questions)
    assert {r["answer"] for r in read_rows(out / "answers.jsonl")} == {"A"}


def test_rows_with_subjects_are_shown_by_subject(tmp_path):
    task = tmp_path / "mine"
    task.mkdir()
    rows = [
        {"question": f"{i} + 1 = ?", "subject": "law" if i < 2 else "physics", "choices": list("1234"), "answer": 0}
        for i in range(5)
    ]
    for split in ("train", "validation", "test"):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--task", task, "--max-new-tokens", 16, "--verdict", f"{__name__}:always_a", "--out", tmp_path / "out"]
    summary = printed(minem_eval(*command, "--json"))
    assert {name: s["n"] for name, s in summary["subjects"].items()} == {"law": 2, "physics": 3}
    assert sum(s["correct"] for s in summary["subjects"].values()) == summary["correct"]
    shown = minem_eval(*command).stdout
    assert "law" in shown
    assert "physics" in shown


def test_the_folder_is_named_after_what_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = minem_eval(*SMALL, "--samples", 2, "--split", "validation", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert [p.name for p in (tmp_path / "evals").iterdir()] == ["toy.toy.validation.s3"]
    for shown in ("accuracy, greedy", "temperature 1", "pass@2", "majority vote", "lenient", "answers: evals"):
        assert shown in result.stdout


def test_known_answers_are_not_drawn_again():
    """Greedy rows of eval.*.jsonl, without `draw`, which runs that share the base model's evaluation pass on."""
    generator = minem.Generator(*minem.load("toy"))
    questions = load_task("toy", 5).test
    prompts = Prompts(generator.tokenizer, load_prompts("toy"))
    greedy = Evaluation(generator, prompts, strict, EvalSection(max_new_tokens=64, samples=0))
    rows = greedy_rows(questions, greedy.answers(questions))
    assert [(row["id"], tuple(row)) for row in rows] == [(question.id, FIELDS) for question in questions]
    both = Evaluation(generator, prompts, strict, EvalSection(max_new_tokens=64, samples=1))
    drawn: list[dict] = []
    shown: list[Any] = []
    answers = both.answers(questions, lambda done, **more: shown.append((done, more)), rows, drawn.append)
    assert sorted((r["id"], r["draw"]) for r in drawn) == sorted((q.id, 1) for q in questions)
    assert greedy_rows(questions, answers) == rows
    summary = summarise_answers(questions, answers, 1)
    assert summary == summarise_answers(questions, both.answers(questions), 1)
    assert shown[-1] == (both.total(questions), {"accuracy": f"{100 * summary['accuracy']:.1f} %"})
    assert facts(summary)["accuracy"].startswith(f"{100 * summary['accuracy']:.1f} %")
    assert both.answers(questions, known=answers, on_row=drawn.append) == answers
    assert len(drawn) == 5


def test_a_folder_with_something_else_and_a_damaged_one_are_named(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = minem_eval(*SMALL, "--out", tmp_path / "mine")
    assert result.exit_code == 2
    assert "thesis.tex" in result.stderr
    out = tmp_path / "damaged"
    with answer_file(out, {"seed": 0}) as (known, append):
        assert known == []
        append({"id": "without the other fields"})
    row = {"id": "a", "answer": None, "gold": "A", "status": "wrong", "text": "", "tokens": 1, "draw": 0}
    for damage in ({}, {**row, "id": [1]}, {**row, "tokens": "1"}, {**row, "status": None}, {**row, "answer": 7}):
        (out / "answers.jsonl").write_text(json.dumps(damage) + "\n")
        with pytest.raises(minem.errors.UserError, match="damaged"), answer_file(out, {"seed": 0}):
            pass
    (out / "answers.jsonl").write_text(json.dumps(row) + "\n")
    with answer_file(out, {"seed": 0}) as (known, append):
        assert known == [row]
    busy = tmp_path / "busy"
    with answer_file(busy, {"seed": 0}), pytest.raises(minem.errors.UserError, match="in use by process"):
        answer_file(busy, {"seed": 0}).__enter__()


def test_a_prompt_without_room_for_an_answer_is_named_before_the_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = [{"id": f"q{i}", "question": "?" * 600 + str(i), "answer": "1"} for i in range(20)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    for more, advice in (
        (["--max-new-tokens", 1024], "lower --max-new-tokens"),
        (["--task", "long.jsonl"], "take fewer or no shots"),
    ):
        result = minem_eval("--limit", 2, *more)
        assert result.exit_code == 2, result.output
        assert advice in result.stderr
        assert result.stdout == ""
    assert not (tmp_path / "evals").exists()  # which would refuse the corrected command
