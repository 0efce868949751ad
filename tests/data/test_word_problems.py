"""The word problems: files, answers, check; `python -m pytest tests/data/test_word_problems.py`."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from minem.data import checks
from minem.data.tasks import EMBEDDED, SPLITS, Question, load_task
from minem.data.word_problems import check, make

FOLDER = EMBEDDED["word-problems"]
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
PAGE = tomllib.loads((FOLDER / "wordings.toml").read_text())
BOXES = Question("q", "Anna buys 3 boxes of 4 apples. She gives 5 apples to Leo. How many has she left?", (), (), "7")
LOST = Question("q", "Anna has 12 apples and 7 plums. She loses 5 and finds 9. How many has she?", (), (), "23")
DAYS = Question("q", "Every day Tom walks 3 miles at noon and 4 miles at night. How many in 6 days?", (), (), "42")


def numbers(question: Question) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question.text)]


def wordings() -> dict[str, tuple[re.Pattern[str], str, bool]]:
    """Every wording -> (a pattern with the letters as groups, its formula, whether only the test split has it)."""
    found = {}
    for structure in PAGE["structures"]:
        for wording in structure["wordings"] + structure["test_only"]:
            pattern = re.sub(r"\\{([a-d])\\}", r"(?P<\1>[0-9]+)", re.escape(wording))
            pattern = re.sub(r"\\{[A-Za-z]+\\}", r"[A-Za-z]+", pattern)
            found[wording] = re.compile(pattern), structure["formula"], wording in structure["test_only"]
    return found


def worded(question: Question) -> tuple[str, dict[str, int], str]:
    """(the only wording that fits, its letters' numbers, its formula)."""
    fits = [(w, match, f) for w, (pattern, f, _) in wordings().items() if (match := pattern.fullmatch(question.text))]
    ((wording, match, formula),) = fits
    return wording, {letter: int(number) for letter, number in match.groupdict().items()}, formula


def solution(question: Question) -> str:
    """A rationale with one equation a line, in the order in which Python works the formula out."""
    _, letters, formula = worded(question)
    lines = []

    def work_out(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            return letters[node.id]
        assert isinstance(node, ast.BinOp)
        step = f"{work_out(node.left)} {SIGNS[type(node.op)]} {work_out(node.right)}"
        lines.append(f"{step} = {eval(step)}")
        return eval(step)

    answer = work_out(ast.parse(formula, mode="eval").body)
    return "\n".join([*lines, f"The best answer is {answer}"])


@pytest.fixture(scope="module")
def task():
    return load_task("word-problems")


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_committed_files_are_those_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wordings.toml").write_bytes((FOLDER / "wordings.toml").read_bytes())
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_no_numbers_are_in_two_splits_and_no_problem_is_there_twice(task):
    assert [len(task.train), len(task.validation), len(task.test)] == [1200, 200, 400]
    sets = [{tuple(sorted(numbers(question))) for question in getattr(task, split)} for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets))
    problems = [(worded(q)[0], *numbers(q)) for split in SPLITS for q in getattr(task, split)]
    assert len(set(problems)) == len(problems)
    assert task.note == ""


def test_every_answer_is_what_its_wording_works_out_to(task):
    for split in SPLITS:
        for question in getattr(task, split):
            _, letters, formula = worded(question)
            assert sorted(letters.values()) == sorted(numbers(question))  # a wording adds no number of its own
            assert question.gold == str(eval(formula, {}, letters))


def test_wordings_are_many_and_some_of_the_test_are_not_in_train(task):
    used = {split: {worded(question)[0] for question in getattr(task, split)} for split in SPLITS}
    only_in_test = {wording for wording, (_, _, alone) in wordings().items() if alone}
    assert len({formula for _, formula, _ in wordings().values()}) == len(PAGE["structures"]) >= 12
    assert len(used["train"]) >= 48
    assert used["validation"] <= used["train"]
    assert used["test"] - used["train"] == only_in_test
    assert len(only_in_test) >= 12
    for question in task.test:
        assert question.subject == ("unseen wordings" if worded(question)[0] in only_in_test else "seen wordings")
    unseen = sum(question.subject == "unseen wordings" for question in task.test)
    assert 0.15 < unseen / len(task.test) < 0.35


def test_two_steps_are_the_rule_and_three_the_exception(task):
    steps = [solution(question).count("=") for question in task.train]
    assert set(steps) == {2, 3}
    results = [
        int(result)
        for question in task.train
        for result in re.findall(r"= (\S+)", solution(question).rsplit("\n", 1)[0])
    ]
    assert 0 < min(results) <= max(results) < 250
    assert 0.1 < steps.count(3) / len(steps) < 0.4


def test_no_answer_is_frequent_enough_to_guess(task):
    golds = [question.gold for question in task.test]
    assert max(golds.count(gold) for gold in set(golds)) < 0.08 * len(golds)


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_solution_of_every_problem_is_valid_and_any_other_chain_is_not(task):
    """Chains with another first operator, without the first step and without the last."""
    for question in task.test:
        right = solution(question)
        assert check.valid_steps(right, question)
        first, *rest = right.split("\n")
        a, sign, b, _, _ = first.split()
        for other in {"+", "-", "*"} - {sign}:
            wrong = f"{a} {other} {b} = {eval(f'{a} {other} {b}')}"
            assert not check.valid_steps("\n".join([wrong, *rest]), question)
        assert not check.valid_steps("\n".join(rest), question)  # a result that no step has found
        assert not check.valid_steps("\n".join([first, *rest[:-2], rest[-1]]), question)  # without the last step


@pytest.mark.parametrize(
    ("rationale", "question"),
    [
        ("She has 3 * 4 = 12 apples. Then 12 - 5 = 7.", BOXES),
        ("3 boxes x 4 apples = 12 apples\n12 apples - 5 apples = 7 apples left", BOXES),
        ("3x4=12, so 12-5=7", BOXES),
        ("First, 4 \u00d7 3 = 12.\nSecond, 12 \u2212 5 = 7.", BOXES),
        ("- 3 * 4 = 12\n- 12 - 5 = 7", BOXES),
        ("1) 3 * 4 = 12\n2) 12 - 5 = 7", BOXES),
        ("**3 * 4 = 12**, then **12 - 5 = 7**", BOXES),
        (r"\(3 \times 4 = 12\) and \(12 - 5 = 7\)", BOXES),
        ("She pays $3 x 4 = $12 (3 x 4 = 12). $12.00 - $5.00 = $7.00", BOXES),
        ("3 boxes * 4 apples/box = 12 apples. That leaves (12 - 5) = 7.", BOXES),
        ("3 * 4 - 5 = 7", BOXES),
        ("(3 + 4) * 6 = 42", DAYS),
        ("3 miles + 4 miles = 7 miles a day. In 6 days: 6 * 7 = 42 miles.", DAYS),
        ("3 * 6 = 18 at noon, 4 * 6 = 24 at night, 18 + 24 = 42 together", DAYS),
        ("12 + 7 = 19. 19 - 5 = 14. 14 + 9 = 23.", LOST),
        ("12 + 7 + 9 = 28. 28 - 5 = 23.", LOST),
        ("12 - 5 = 7 apples. 7 + 7 = 14. 14 + 9 = 23.", LOST),  # 7 is a result and a number of the question
        ("9 - 5 = 4. 12 + 7 = 19. 19 + 4 = 23.", LOST),
    ],
)
def test_right_rationales_are_valid_in_many_styles(rationale: str, question: Question):
    assert check.valid_steps(f"{rationale}\nThe best answer is {question.gold}", question)


@pytest.mark.parametrize(
    ("rationale", "question"),
    [
        ("21 - 20 = 1. 1 - 1 = 0. 6 + 1 = 7", BOXES),  # luck
        ("3 * 4 = 13. 13 - 5 = 7", BOXES),  # two errors that lead to the right answer
        ("3 * 4 = 12. 12 - 5 = 8", BOXES),
        ("3 + 4 = 7", BOXES),  # true, and not what the problem asks
        ("3 * 4 = 12. 3 + 4 = 7", BOXES),
        ("4 * 4 = 16. 16 - 9 = 7", BOXES),  # wrong numbers
        ("14 - 7 = 7", BOXES),
        ("3 * 4 = 12. 12 - 5 = 7. 7 + 5 = 12", BOXES),  # goes on after the answer
        ("3 * 4 = 12 - 5 = 7", BOXES),
        ("12 - 5 = 7", BOXES),  # where 12 comes from is missing
        ("She has seven apples left.", BOXES),
        ("", BOXES),
        ("5 - 5 = 0. 1 / 0 = 7", BOXES),
        ("(3 * 4) = 12. 12) - (5 = 7", BOXES),
        ("3 + 4 = 7. 7 * 7 = 49. 49 - 7 = 42", DAYS),
        ("3 * 4 * 6 = 72", DAYS),
        ("0 + 0 = 0. " * 200, BOXES),
        ("4 - 3 = 1. " + "1 * 1 * 1 * 1 = 1. 3 * 3 * 1 * 1 = 9. 9 * 9 * 1 * 1 = 81. 81 / 9 / 9 / 1 = 1. " * 50, BOXES),
        ("5 - 5 = 0. " + "0 + 0 + 0 + 0 = 0. 0 - 0 + 0 * 0 = 0. " * 50, BOXES),
    ],
)
def test_luck_wrong_arithmetic_and_wrong_numbers_are_not_valid(rationale: str, question: Question):
    assert not check.valid_steps(f"{rationale}\nThe best answer is {question.gold}", question)


def test_the_stated_answer_must_be_the_last_result():
    assert not check.valid_steps("3 * 4 = 12. 12 - 5 = 7.", BOXES)
    assert not check.valid_steps("3 * 4 = 12. 12 - 5 = 7.\nThe best answer is 12", BOXES)


def test_the_share_of_valid_rationales_is_known_on_this_task_and_the_toy_alone(task):
    first, second = task.train[:2]
    rationales = [(first.id, solution(first)), (second.id, f"The best answer is {second.gold}")]
    assert checks.valid_share(task, rationales) == 0.5
    assert checks.valid_share(task, []) is None
    toy = load_task("toy", 1)
    assert checks.valid_share(toy, [(toy.train[0].id, "")]) == 0.0


def test_the_rows_hold_what_free_form_rows_hold():
    row = json.loads((FOLDER / "train.jsonl").read_text().splitlines()[0])
    assert list(row) == ["id", "question", "answer"]
