"""Verdicts on endings as models really write them: `python -m pytest tests/data/test_verdict.py`."""

import pytest

from minem.data import verdict
from minem.data.tasks import Question


def question(labels: str, gold: str = "") -> Question:
    names = tuple(labels.split())
    return Question("q", "Which?", tuple(f"option {name}" for name in names), names, gold or names[0])


ABCD, ABC, ABCDE, DIGITS, TEN = "A B C D", "A B C", "A B C D E", "1 2 3 4", "0 1 2 3 4 5 6 7 8 9"
WORDS = "1 10 100 yes no"
SAME = object()  # flexible agrees with strict

# (labels, how a completion ends, strict, flexible)
ENDINGS: list[tuple[str, str, str | None, object]] = [
    # The format that the prompt asks for, and its dressings.
    (ABCD, "The best answer is B", "B", SAME),
    (ABCD, "Plants need light.\nThe best answer is B.", "B", SAME),
    (ABCD, "Plants need light.\n\nThe best answer is (B).", "B", SAME),
    (ABCD, "The best answer is: C", "C", SAME),
    (ABCD, "The best answer is: (C)", "C", SAME),
    (ABCD, "**The best answer is C**", "C", SAME),
    (ABCD, "**The best answer is C.**", "C", SAME),
    (ABCD, "The best answer is **C**", "C", SAME),
    (ABCD, "The best answer is **C**.", "C", SAME),
    (ABCD, "The best answer is **(C)**", "C", SAME),
    (ABCD, "**The best answer is:** C", "C", SAME),
    (ABCD, "The best answer is `D`", "D", SAME),
    (ABCD, 'The best answer is "D".', "D", SAME),
    (ABCD, "'The best answer is D'", "D", SAME),
    (ABCD, "The best answer is $D$.", "D", SAME),
    (ABCD, "The best answer is \\boxed{D}", "D", SAME),
    (ABCD, "The best answer is $\\boxed{D}$.", "D", SAME),
    (ABCD, "The best answer is $\\boxed{\\text{D}}$", "D", SAME),
    (ABCD, "The best answer is [A]", "A", SAME),
    (ABCD, "### The best answer is A", "A", SAME),
    (ABCD, "> The best answer is A", "A", SAME),
    (ABCD, "- The best answer is A", "A", SAME),
    (ABCD, "The best answer is option B.", "B", SAME),
    (ABCD, "The best answer is Option (B).", "B", SAME),
    (ABCD, "The best answer is choice D", "D", SAME),
    (ABCD, "the best answer is b", "B", SAME),
    (ABCD, "the best answer is (c).", "C", SAME),
    (ABCD, "THE BEST ANSWER IS D", "D", SAME),
    (ABCD, "The best answer is D   ", "D", SAME),
    (ABCD, "The best answer is D\n\n", "D", SAME),
    (ABCD, "The  best answer is   D", "D", SAME),
    (ABCD, "The best answer is A", "A", SAME),
    # The option beside its label, and text that follows.
    (ABCD, "The best answer is B. Photosynthesis", "B", SAME),
    (ABCD, "The best answer is B) Photosynthesis", "B", SAME),
    (ABCD, "The best answer is (A) a plant", "A", SAME),
    (ABCD, "The best answer is A. A plant needs light", "A", SAME),
    (ABCD, "The best answer is A: the Sun", "A", SAME),
    (ABCD, "The best answer is A - the Sun", "A", SAME),
    (ABCD, "The best answer is A \u2014 the Sun", "A", SAME),
    (ABCD, "The best answer is B (photosynthesis).", "B", SAME),
    (ABCD, "The best answer is B, photosynthesis.", "B", SAME),
    (ABCD, "The best answer is B because plants are green.", "B", SAME),
    (ABCD, "The best answer is B, because A and C are too small.", "B", SAME),
    (ABCD, "The best answer is B.\nI hope this helps!", "B", SAME),
    (ABCD, "The best answer is B, not A.", "B", SAME),
    # Several statements: the last one counts.
    (ABCD, "The best answer is A.\nWait, light is needed.\nThe best answer is C.", "C", SAME),
    (ABCD, "The best answer is A. No: the best answer is C.", "C", SAME),
    (ABCD, "The best answer is C.\nThe best answer is C.", "C", SAME),
    (ABCD, "The answer is A.\nThe best answer is C.", "C", SAME),
    (ABCD, "The best answer is C.\nThe best answer is A or B.", None, SAME),
    (ABCD, "The best answer is C.\nThe best answer is", None, "C"),
    # What leaves a doubt.
    (ABCD, "The best answer is A or B.", None, SAME),
    (ABCD, "The best answer is A and B", None, SAME),
    (ABCD, "The best answer is (A) or (B)", None, SAME),
    (ABCD, "The best answer is **A** or **B**", None, SAME),
    (ABCD, "The best answer is A, B", None, SAME),
    (ABCD, "The best answer is A, C and D.", None, SAME),
    (ABCD, "The best answer is A/B.", None, SAME),
    (ABCD, "The best answer is A & B.", None, SAME),
    (ABCD, "The best answer is B (or C).", None, SAME),
    (ABCD, "The best answer is either A or B.", None, SAME),
    (ABCD, "The best answer is both A and C.", None, SAME),
    (ABCD, "The best answer is not B.", None, SAME),
    (ABCD, "The best answer is The Sun", None, SAME),
    (ABCD, "The best answer is the Sun.", None, SAME),
    (ABCD, "The best answer is A plant.", None, SAME),
    (ABCD, "The best answer is a plant that makes food.", None, SAME),
    (ABCD, "The best answer is Because", None, SAME),
    (ABCD, "The best answer is Dogs.", None, SAME),
    (ABCD, "The best answer is X", None, SAME),
    (ABCD, "The best answer is E", None, SAME),
    (ABCD, "The best answer is 2", None, SAME),
    (ABCD, "The best answer is", None, SAME),
    (ABCD, "The best answer is none of the above.", None, SAME),
    (ABCD, "", None, SAME),
    (ABCD, "I do not know.", None, SAME),
    (ABCD, "The sky is blue because of A, B, C and D", None, SAME),
    # The labels are this question's own.
    (ABCDE, "The best answer is E.", "E", SAME),
    (ABC, "The best answer is D.", None, SAME),
    (DIGITS, "The best answer is 3", "3", SAME),
    (DIGITS, "The best answer is 3.", "3", SAME),
    (DIGITS, "The best answer is (4)", "4", SAME),
    (DIGITS, "The best answer is option 2", "2", SAME),
    (DIGITS, "The best answer is 2) iron", "2", SAME),
    (DIGITS, "The best answer is B", None, SAME),
    (DIGITS, "The best answer is 5", None, SAME),
    (DIGITS, "The best answer is 12", None, SAME),
    (DIGITS, "The best answer is 3.5", None, SAME),
    (DIGITS, "The best answer is 3,000", None, SAME),
    (DIGITS, "The best answer is -3", None, SAME),
    (DIGITS, "The best answer is 3 meters", None, SAME),
    (DIGITS, "The best answer is 1/2", None, SAME),
    (DIGITS, "The best answer is 2%", None, SAME),
    (DIGITS, "The best answer is 2:1", None, SAME),
    (DIGITS, "The best answer is 2 or 3", None, SAME),
    (TEN, "8 + 9 = 7\n7 - 7 = 0\nThe best answer is 0", "0", SAME),
    (TEN, "The best answer is 10", None, SAME),
    (WORDS, "The best answer is 10.", "10", SAME),
    (WORDS, "The best answer is 100", "100", SAME),
    (WORDS, "The best answer is Yes.", "yes", SAME),
    (WORDS, "The best answer is nothing.", None, SAME),
    # Not the line that was asked for: unparsed for the reward, readable all the same.
    (ABCD, "So the best answer is B.", None, "B"),
    (ABCD, "Therefore, the correct answer is (B).", None, "B"),
    (ABCD, "The answer is B.", None, "B"),
    (ABCD, "The correct answer is: **D. The mitochondria**", None, "D"),
    (ABCD, "Answer: C", None, "C"),
    (ABCD, "**Answer:** C", None, "C"),
    (ABCD, "**Final answer: C**", None, "C"),
    (ABCD, "The correct option is A.", None, "A"),
    (ABCD, "Plants need light, so (C) is correct.", None, "C"),
    (ABCD, "Option B is the best answer.", None, "B"),
    (ABCD, "Option A or option B is correct.", None, None),
    (ABCD, "Thus:\n\n$\\boxed{D}$", None, "D"),
    (ABCD, "Hence \\boxed{\\text{B}}.", None, "B"),
    (ABCD, "It needs light.\n\n**C**", None, "C"),
    (ABCD, "It needs light.\n(C)", None, "C"),
    (ABCD, "It needs light.\nC.", None, "C"),
    (ABCD, "B", None, "B"),
    (ABCD, "The best answer is:\nB", None, "B"),
    (ABCD, "The answer is The Sun", None, None),
    (ABCD, "The answer is a plant.", None, None),
    (ABCD, "The answer is A plant", None, None),
    (ABCD, "The answer is A or B", None, None),
    (ABCD, "The answer is B.\nActually, the answer is D.", None, "D"),
    (ABCD, "I think the answer is B.\nThe best answer is A or C.", None, None),
    (ABCD, "It may be A plant", None, None),
    (DIGITS, "Answer: 2", None, "2"),
    (DIGITS, "The answer is 2.5 m.", None, None),
    (DIGITS, "so x = 3", None, None),
]


def test_the_table_is_long_enough_and_has_no_row_twice():
    assert len(ENDINGS) >= 80
    assert len({(labels, text) for labels, text, _, _ in ENDINGS}) == len(ENDINGS)


@pytest.mark.parametrize(("labels", "text", "strict", "flexible"), ENDINGS)
def test_endings(labels: str, text: str, strict: str | None, flexible: object):
    asked = question(labels)
    assert verdict.strict(text, asked) == strict
    assert verdict.flexible(text, asked) == (strict if flexible is SAME else flexible)


def test_the_gold_label_has_no_say():
    for labels, text, strict, _ in ENDINGS:
        for gold in labels.split():
            assert verdict.strict(text, question(labels, gold)) == strict


def test_long_noise_is_read_in_linear_time():
    # 200,000 characters that could send a backtracking pattern into a quadratic walk, which would take minutes.
    for noise in ("* " * 100_000, "\n" * 200_000, "the best answer is " * 10_000, "(" * 200_000, "answer: " * 25_000):
        assert verdict.strict(noise + "\nThe best answer is B", question(ABCD)) == "B"
        assert verdict.flexible(noise + "\nThe best answer is B", question(ABCD)) == "B"


LEAKS = [
    "As given, the answer is B.",
    "as provided, the correct option is C",
    "As stated in the hint, it is B.",
    "This matches the provided answer.",
    "which agrees with the given answer B.",
    "The given correct answer is B, so we look for a reason.",
    "The hint says B.",
    "According to the hint, B is right.",
    "We are told that the correct answer is B.",
    "We are told the answer is B.",
    "I was given the answer B.",
    "We know that the correct answer is C, so the plant must be green.",
    "We know the answer is C.",
    "Since the correct answer is C, the plant is green.",
    "Given that the correct answer is C, light is needed.",
    "The answer is already known to be C.",
    "The answer was provided: C.",
    "The answer you gave is C.",
    "You told me the answer is C.",
    "The question states the correct answer is C.",
    "5 + 4 = 9, which matches the correct answer.",
]
HONEST = [
    "The correct answer is B.",
    "The best answer is B",
    "Given that plants need light, B follows.",
    "A force is given by F = ma.",
    "The speed, as given by the formula, is 3 m/s.",
    "The diagram given in the question shows a cell.",
    "We know that water boils at 100 degrees.",
    "We are told that the ball weighs 2 kg.",
    "The table provided shows the results.",
    "The given information says the plant is green.",
    "Since the ball is heavier, it falls with more force.",
    "5 + 4 = 9\nThe best answer is 9",
    "Therefore the answer is C, since A is too small.",
    "This matches option B.",
    "As stated by Newton's law, the force is equal.",
]


@pytest.mark.parametrize("text", LEAKS)
def test_leaks_are_seen(text: str):
    assert verdict.cites_hint(text)


@pytest.mark.parametrize("text", HONEST)
def test_honest_rationales_are_no_leaks(text: str):
    assert not verdict.cites_hint(text)
