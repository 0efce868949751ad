"""Verdicts on endings as models really write them: `python -m pytest tests/data/test_verdict.py`."""

import json
import os
import tomllib
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minem.data import verdict
from minem.data.tasks import Question, read_questions
from minem.errors import UserError


def question(labels: str, gold: str = "") -> Question:
    names = tuple(labels.split())
    return Question("q", "Which?", tuple(f"option {name}" for name in names), names, gold or names[0])


ANSWERS = Path(__file__).parent / "answers.jsonl"
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
    # The statement stands anywhere in its line, with adverbs and marks; a colon may end the line.
    (ABCD, "So the best answer is B.", "B", SAME),
    (ABCD, "The best answer is indeed D.", "D", SAME),
    (ABCD, "Therefore, the best answer is B", "B", SAME),
    (ABCD, "Heat rises, so the best answer is clearly (B).", "B", SAME),
    (ABCD, "The best answer, therefore, is B.", "B", SAME),
    (ABCD, "The best answer is, indeed, B.", "B", SAME),
    (ABCD, "The **best answer** is **B. gravity**", "B", SAME),
    (ABCD, "The best answer is:\nB", "B", SAME),
    (ABCD, "Hence the best answer is:\n\n**B. gravity**", "B", SAME),
    (ABCD, "The best answer is:\n\n\\[\n\\boxed{B}\n\\]", "B", SAME),
    (ABCD, "The best answer to this question is (B).", "B", SAME),
    (ABCD, "The best answer among these options is B.", "B", SAME),
    (ABCD, "The best answer is A, which is A.", "A", SAME),
    (ABCD, "The best answer is the option B.", "B", SAME),
    # Another label is offered after the first one's text, or in a list.
    (ABCD, "The best answer is B) x or C) y", None, SAME),
    (ABCD, "The best answer is A) x or B) y.", None, SAME),
    (ABCD, "The best answer is A. x or B. y", None, SAME),
    (ABCD, "The best answer is **A) x** and **B) y**", None, SAME),
    (ABCD, "The best answer is A) x, B) y", None, SAME),
    (ABCD, "The best answer is A: x; B: y", None, SAME),
    (ABCD, "The best answer is A (or B, if there is no air).", None, SAME),
    (ABCD, "The best answer is A. B. C. D.", None, SAME),
    (ABCD, "The best answer is:\n\nA. x\nB. y\nC. z\nD. w", None, SAME),
    (ABCD, "The best answer is B. It is neither A nor C.", "B", SAME),
    (ABCD, "The best answer is (A) rather than (B)", "A", SAME),
    # What is denied, doubted or supposed is not stated. A denial takes back the same answer, no other.
    (ABCD, "The best answer is B. The best answer is not C.", "B", SAME),
    (ABCD, "The best answer is B. No, the best answer is not B.", None, SAME),
    (ABCD, "The best answer is not (B).", None, SAME),
    (ABCD, "I don't think the best answer is B.", None, SAME),
    (ABCD, "If the best answer is A, it needs contact.", None, SAME),
    (ABCD, "It is not clear whether the best answer is A.", None, SAME),
    (ABCD, "The best answer is B.\nThis answer is based on what we know.", "B", SAME),
    # Not the line that was asked for: unparsed for the reward, readable all the same.
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
    (ABCD, "C is correct.", None, "C"),
    (ABCD, "Plants need light, so B is the correct answer.", None, "B"),
    (ABCD, "Therefore, A is right.", None, "A"),
    (ABCD, "A or B is correct.", None, None),
    (ABCD, "Vitamin C is the best known of them.", None, None),
    (ABCD, "I doubt whether B is correct.", None, None),
    (ABCD, "Thus:\n\n$\\boxed{D}$", None, "D"),
    (ABCD, "Hence \\boxed{\\text{B}}.", None, "B"),
    (ABCD, "It needs light.\n\n**C**", None, "C"),
    (ABCD, "It needs light.\n(C)", None, "C"),
    (ABCD, "It needs light.\nC.", None, "C"),
    (ABCD, "B", None, "B"),
    (ABCD, "The correct answer is:\n\n**B. gravity**", None, "B"),
    (ABCD, "The answer is therefore (B).", None, "B"),
    (ABCD, "I would choose B, since it is green.", None, "B"),
    (ABCD, "B. gravity\n\nIt pulls the ball.", None, "B"),
    (ABCD, "A) friction is not an answer.", None, None),
    (ABCD, "A. x\nB. y\nC. z\nD. w", None, None),
    (ABCD, "A. x\nB. y\nC. z\nD. w\n\nB", None, "B"),
    (ABCD, "A is correct that friction exists, but it is weak.", None, None),
    (ABCD, "A is correct, but B is better.", None, None),
    (ABCD, "B) x or C) y", None, None),
    (ABCD, "If A is correct, it falls.", None, None),
    (ABCD, "Neither A nor B is correct.", None, None),
    (ABCD, "B is not correct.", None, None),
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
    # LaTeX, as it is really written.
    (ABCD, "The best answer is \\(B\\)", "B", SAME),
    (ABCD, "The best answer is \\[\\boxed{B}\\]", "B", SAME),
    (ABCD, "The best answer is \\(\\boxed{\\textbf{(C)}}\\).", "C", SAME),
    (ABCD, "The best answer is $\\mathrm{C}$", "C", SAME),
    (ABCD, "The final answer is $\\boxed{A}$ and not $\\boxed{B}$", None, "A"),
    (ABCD, "$\\boxed{A \\text{ or } B}$", None, None),
    # Markdown and Unicode.
    (ABCD, "The best answer is __B__", "B", SAME),
    (ABCD, "**The best answer is B: photosynthesis**", "B", SAME),
    (ABCD, "The best answer is \u201cB\u201d.", "B", SAME),
    (ABCD, "\u201cThe best answer is B\u201d", "B", SAME),
    (ABCD, "The best answer is \u2018b\u2019", "B", SAME),
    (ABCD, "The\u00a0best answer is\u00a0B", "B", SAME),
    (ABCD, "The best answer is \uff22", "B", SAME),
    (ABCD, "The best answer is \uff08B\uff09\u3002", "B", SAME),
    (ABCD, "The best answer is\uff1aB", "B", SAME),
    (ABCD, "\u200bThe best answer is B\u200b", "B", SAME),
    (ABCD, "The best answer is B \u2705", "B", SAME),
    (ABCD, "\u2022 The best answer is B", "B", SAME),
    (ABCD, "(The best answer is B)", "B", SAME),
    (ABCD, "The best answer is B\u2026", "B", SAME),
    (ABCD, "The best answer is \u0412", None, SAME),  # a Cyrillic letter that looks like B
    (ABCD, "The best answer is B\u00b2", None, SAME),
    # More doubt: ranges, a question back, a label that is denied, one that only opens the sentence.
    (ABCD, "The best answer is B - C", None, SAME),
    (ABCD, "The best answer is B\u2013C", None, SAME),
    (ABCD, "The best answer is B?? or C", None, SAME),
    (ABCD, "The best answer is B|C", None, SAME),
    (ABCD, "The best answer is B; C", None, SAME),
    (ABCD, "The best answer is C is wrong, so B", None, SAME),
    (ABCD, "The best answers are B and C.", None, SAME),
    (ABCD, "The best answer isn't B.", None, SAME),
    (ABCD, "The best answer is all of the above.", None, SAME),
    (ABCD, "The best answer is D) None of the above", "D", SAME),
    (ABCD, "The best answer is B is correct", "B", SAME),
    # Refusals and empty talk.
    (ABCD, "I'm sorry, but I can't help with that.", None, SAME),
    (ABCD, "As an AI language model, I cannot choose an option.", None, SAME),
    (ABCD, "The best answer is unknown.", None, SAME),
    (ABCD, "The best answer cannot be determined.", None, SAME),
    (ABCD, "There is no correct answer among A, B, C and D.", None, SAME),
    (ABCD, "Would you like me to explain why B is tempting?", None, SAME),
    # Five options, and text that continues.
    (ABCDE, "The best answer is (E) none of these", "E", SAME),
    (ABCDE, "The best answer is e", "E", SAME),
    (ABCDE, "The best answer is D or E.", None, SAME),
    (ABCDE, "The best answer is E.\n\nQuestion: What is heat?\nAnswer: A", "E", "A"),
    (ABCD, "The best answer is B\n```", "B", SAME),
    (ABCD, "The best answer is B\r\n", "B", SAME),
    ("yes no", "The best answer is ye\u017f", None, SAME),  # a long s, which is an s only where case is ignored
]
# (gold, how a completion ends, strict, flexible): free-form questions
FREE_FORM: list[tuple[str, str, str | None, object]] = [
    ("1000", "The best answer is 1000", "1000", SAME),
    ("1000", "500 + 500 = 1000\nThe best answer is 1,000.", "1000", SAME),
    ("1000", "The best answer is $1,000.00", "1000", SAME),
    ("1000", "The best answer is \\$1000", "1000", SAME),
    ("1000", "**The best answer is 1000**", "1000", SAME),
    ("1000", "The best answer is: **1,000**.", "1000", SAME),
    ("1000", "The best answer is $\\boxed{1{,}000}$", "1000", SAME),
    ("1000", "The best answer is \\boxed{1\\,000}", "1000", SAME),
    ("1000", "The best answer is 1\u202f000", "1000", SAME),
    ("1000", "The best answer is \uff11\uff10\uff10\uff10", "1000", SAME),
    ("1000", "the best answer is 1000 dollars", "1000", SAME),
    ("1000", "The best answer is $1000 per day.", "1000", SAME),
    ("1000", "The best answer is 1000 (500 + 500)", "1000", SAME),
    ("1000", "The best answer is 1000 because 500 and 500 make it.", "1000", SAME),
    ("1000", "The best answer is 1000, not 2000.", "1000", SAME),
    ("1000", "The best answer is x = 1000", "1000", SAME),
    ("1000", "The best answer is 2000/2", "1000", SAME),
    ("1000", "The best answer is 10.\nWait.\nThe best answer is 1000.", "1000", SAME),
    ("1,000", "The best answer is 1000", "1,000", SAME),  # the row's own spelling comes back
    ("$1,000", "The best answer is 1000.0", "$1,000", SAME),
    ("20%", "The best answer is 20%", "20%", SAME),
    ("20", "The best answer is 20\\%", "20", SAME),
    ("0.5", "The best answer is 1/2", "0.5", SAME),
    ("0.5", "The best answer is $\\frac{1}{2}$", "0.5", SAME),
    (".5", "The best answer is 0.50", ".5", SAME),
    ("-5", "The best answer is \u22125", "-5", SAME),
    ("-5", "The best answer is -$5", "-5", SAME),
    ("7", "The best answer is 07", "7", SAME),
    # Another number is wrong, not unparsed.
    ("1000", "The best answer is 100", "100", SAME),
    ("1000", "The best answer is -1000", "-1000", SAME),
    ("1000", "The best answer is 1000.5", "2001/2", SAME),
    ("1000", "The best answer is 2,000,000", "2000000", SAME),
    # What leaves a doubt.
    ("1000", "The best answer is 1000 or 2000", None, SAME),
    ("1000", "The best answer is 1000 and 20", None, SAME),
    ("1000", "The best answer is between 1000 and 2000", None, SAME),
    ("1000", "The best answer is 1000-2000", None, SAME),
    ("1000", "The best answer is 1000 to 2000", None, SAME),
    ("1000", "The best answer is 1000, 2000", None, SAME),
    ("1000", "The best answer is 500 + 500 = 1000", None, SAME),
    ("1000", "The best answer is 1000 = 500 + 500", None, SAME),
    ("1000", "The best answer is 10^3", None, SAME),
    ("1000", "The best answer is 1e3", None, SAME),
    ("1000", "The best answer is 1000x", None, SAME),
    ("1", "The best answer is 1 thousand", None, SAME),
    ("1", "The best answer is 1,0000", None, SAME),
    ("1", "The best answer is 1.000,5", None, SAME),
    ("5", "The best answer is 5 feet 6 inches", None, SAME),
    ("2", "The best answer is 2 1/2", None, SAME),
    ("2", "The best answer is 2\u00bd", None, SAME),
    ("3", "The best answer is 3:30", None, SAME),
    ("9", "The best answer is 9 out of 10", None, SAME),
    ("9", "The best answer is nine", None, SAME),
    ("9", "The best answer is about 9", None, SAME),
    ("9", "The best answer is not 9", None, SAME),
    ("9", "The best answer is", None, SAME),
    ("9", "The best answer is 9/0", None, SAME),
    ("9", "The best answer is " + "9" * 5000, None, SAME),
    ("9", "I cannot answer that.", None, SAME),
    ("9", "", None, SAME),
    # Not the line that was asked for.
    ("18", "She makes 9 * 2 = $18 every day.\n#### 18", None, "18"),
    ("18", "The answer is 18.", None, "18"),
    ("18", "The final answer is $\\boxed{18}$.", None, "18"),
    ("18", "**Answer:** 18 dollars", None, "18"),
    ("18", "So she makes\n18", None, "18"),
    ("18", "So she makes\n= $18.00", None, "18"),
    ("18", "She makes 9 * 2 = $18 every day.", None, "18"),
    ("18", "She makes 18 dollars in 2 days.", None, "2"),
    ("-5", "So it is\n-5", None, "-5"),
    ("18", "The answer is 18 or 20.", None, None),
    ("18", "The best answer is 18.\nThe answer is 20.", "18", "20"),
    # An answer that is no number: the whole line, case, spaces and marks aside.
    ("Paris", "The best answer is Paris.", "Paris", SAME),
    ("Paris", "The best answer is **paris**", "Paris", SAME),
    ("New York", "The best answer is \\boxed{new  york}", "New York", SAME),
    ("Paris", "The best answer is London", "london", SAME),
    ("Paris", "The best answer is Paris or London", "paris or london", SAME),
    ("Paris", "The best answer is ...", None, SAME),
    ("Paris", "It is in France.\nParis", None, "Paris"),
    ("Paris", "The answer is Paris.", None, "Paris"),
    ("Paris", "I do not know.", None, None),
    ("Paris", "Paris has a tower.\nThe best answer is Rome", "rome", SAME),
]


FORCES = Question("q", "?", ("friction", "gravity", "magnetism", "air pressure"), ("A", "B", "C", "D"), "B")
OTHERS = Question("q", "?", ("the Sun", "a plant", "soup", "A and B"), ("A", "B", "C", "D"), "B")
NUMBERS = Question("q", "?", ("3", "4", "5 m", "6,000"), ("1", "2", "3", "4"), "2")
TWICE = Question("q", "?", ("rises", "falls", "rises"), ("A", "B", "C"), "B")
# (question, how a completion ends, strict, flexible): the text of an option stands for its label, if it is whole
OPTIONS: list[tuple[Question, str, str | None, object]] = [
    (FORCES, "The best answer is gravity.", "B", SAME),
    (FORCES, "The best answer is **Gravity**", "B", SAME),
    (FORCES, "The best answer is: the gravity", "B", SAME),
    (FORCES, "The best answer is gravity (B).", "B", SAME),
    (FORCES, "The best answer is gravity, because it pulls.", "B", SAME),
    (FORCES, "The best answer is B gravity", "B", SAME),
    (FORCES, "The best answer is B. friction", "B", SAME),  # the label counts
    (FORCES, "The best answer is gravity (C).", None, SAME),
    (FORCES, "The best answer is gravity or friction.", None, SAME),
    (FORCES, "The best answer is gravity, friction", None, SAME),
    (FORCES, "The best answer is gravity's pull.", None, SAME),
    (FORCES, "The best answer is zero gravity.", None, SAME),
    (FORCES, "The best answer is not gravity.", None, SAME),
    (FORCES, "The correct answer is gravity.", None, "B"),
    (FORCES, "Gravity is the correct answer.", None, "B"),
    (FORCES, "It pulls the ball.\n\nGravity", None, "B"),
    (FORCES, "Option B, gravity, is the best answer.", None, "B"),
    (FORCES, "Gravity pulls the ball.", None, None),
    (OTHERS, "The best answer is the Sun", "A", SAME),
    (OTHERS, "The best answer is a plant.", "B", SAME),
    (OTHERS, "The best answer is A soup", None, SAME),
    (OTHERS, "The best answer is a planet", None, SAME),
    (OTHERS, "The best answer is A and B", None, SAME),
    (OTHERS, "The best answer is D. A and B", "D", SAME),
    (NUMBERS, "The best answer is 3", "3", SAME),  # a label before an option
    (NUMBERS, "The best answer is 6,000", "4", SAME),
    (NUMBERS, "The best answer is 3.5", None, SAME),
    (NUMBERS, "1. We add one.\nIt is even.", None, None),
    (TWICE, "The best answer is rises.", None, SAME),
    (TWICE, "The best answer is falls.", "B", SAME),
]


def free_form(gold: str) -> Question:
    return Question("q", "How many?", (), (), gold)


def test_the_tables_are_long_enough_and_have_no_row_twice():
    assert len(ENDINGS) >= 210
    assert len({(labels, text) for labels, text, _, _ in ENDINGS}) == len(ENDINGS)
    assert len(FREE_FORM) >= 80
    assert len({(gold, text) for gold, text, _, _ in FREE_FORM}) == len(FREE_FORM)
    assert len(LEAKS) + len(HONEST) >= 60
    assert len(EARLY) >= 20


@pytest.mark.parametrize(("labels", "text", "strict", "flexible"), ENDINGS)
def test_endings(labels: str, text: str, strict: str | None, flexible: object):
    asked = question(labels)
    assert verdict.strict(text, asked) == strict
    assert verdict.flexible(text, asked) == (strict if flexible is SAME else flexible)


@pytest.mark.parametrize(("asked", "text", "strict", "flexible"), OPTIONS)
def test_the_text_of_an_option(asked: Question, text: str, strict: str | None, flexible: object):
    assert verdict.strict(text, asked) == strict
    assert verdict.flexible(text, asked) == (strict if flexible is SAME else flexible)


BEFORE = ["", "So ", "So, ", "Therefore, ", "It is warm, thus ", "I believe that ", "**", "> ", "Hence, **", "Step 3: "]
ADVERBS = ["", " indeed", " therefore", ", thus,", " clearly", " most likely", ":", ": ", ":\n\n", ":\n- ", " hence:\n"]
NAMED = [
    "{0}",
    "({0})",
    "**{0}**",
    "**{0}. {1}**",
    "**{0}** {1}",
    "{0}. {1}",
    "{0}) {1}.",
    "option {0}",
    "[{0}]",
    "`{0}`",
]
NAMED += [
    "{0}, {1}",
    '"{0}"',
    "{0}: {1}",
    "\\boxed{{{0}}}",
    "$\\boxed{{\\text{{{0}}}}}$",
    "{0}, since it is so",
    "{1}",
    "**{1}**",
]
DOUBTED = [
    "{0} or {2}",
    "({0}) or ({2})",
    "{0}) {1} or {2}) {3}",
    "**{0}. {1}** or **{2}. {3}**",
    "{0}, {2}",
    "{1} or {3}",
]
DOUBTED += ["not {0}", "not **{0}. {1}**", "either {0} or {2}", "{0} and {2}", "{0}/{2}", "a {1}like thing", "unknown"]


@given(
    st.sampled_from(BEFORE),
    st.sampled_from(["the best answer", "The best answer", "the **best answer**", "the best answer to this question"]),
    st.sampled_from(ADVERBS),
    st.sampled_from(["", ".", "**", "\n", "\n\nI hope this helps!"]),
    st.permutations(["A", "B", "C", "D"]),
)
def test_every_wording_is_read_and_every_doubt_is_not(before: str, noun: str, adverb: str, end: str, labels: list[str]):
    label, other = labels[:2]
    option, another = (FORCES.options[FORCES.labels.index(name)] for name in (label, other))
    start = f"{before}{noun} is{adverb} "
    for form in NAMED:
        text = start + form.format(label, option) + end
        assert verdict.strict(text, FORCES) == verdict.flexible(text, FORCES) == label, text
        text = text.replace("best answer", "correct answer")
        assert (verdict.strict(text, FORCES), verdict.flexible(text, FORCES)) == (None, label), text
    for form in DOUBTED:
        text = start + form.format(label, option, other, another) + end
        assert verdict.strict(text, FORCES) is verdict.flexible(text, FORCES) is None, text


def test_answers_as_real_models_write_them():
    """Labelled by reading: `asked` is what "the best answer is" states, `person` what a person finds in the text."""
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 150
    assert sum(row["source"].startswith("drawn") for row in rows) >= 100
    strict, flexible = Counter[str](), Counter[str]()
    for row in rows:
        asked = Question("q", row["question"], tuple(row["options"]), tuple(row["labels"]), row["gold"])
        strict[score(verdict.strict(row["text"], asked), row["asked"])] += 1
        flexible[score(verdict.flexible(row["text"], asked), row["person"])] += 1
    for found, least in ((strict, 0.85), (flexible, 0.93)):
        assert found["wrong"] == 0, (strict, flexible)
        assert found["read"] >= least * (found["read"] + found["missed"]), (strict, flexible)


def score(read: str | None, right: str | None) -> str:
    return "wrong" if read not in (None, right) else "read" if read else "missed" if right else "none"


@pytest.mark.parametrize(("gold", "text", "strict", "flexible"), FREE_FORM)
def test_free_form_endings(gold: str, text: str, strict: str | None, flexible: object):
    asked = free_form(gold)
    assert verdict.strict(text, asked) == strict
    assert verdict.flexible(text, asked) == (strict if flexible is SAME else flexible)
    if any(digit in gold for digit in "0123456789"):
        assert verdict.number(text, asked) == strict


def test_the_number_verdict_names_a_question_without_a_number():
    with pytest.raises(UserError, match="question 'q': its answer 'Paris' is no number"):
        verdict.number("The best answer is 3", free_form("Paris"))


def spellings(value: Fraction) -> list[str]:
    """The number as people write it."""
    sign, size = "-" * (value < 0), abs(value)
    written = [f"{sign}{size}"]
    if (size * 100).denominator == 1:
        whole, hundredths = divmod(int(size * 100), 100)
        written += [f"{sign}{whole}.{hundredths:02}", f"{sign}${whole:,}.{hundredths:02}"]
    if size.denominator == 1:
        written += [f"{sign}{int(size):,}", f"\\boxed{{{sign}{size}}}", f"**{sign}{size}** dollars"]
    return written


def test_a_number_counts_if_it_is_the_whole_of_what_is_stated():
    """Of 80 wrong answers, by kind, none is accepted; of 60 right ones 57 are."""
    page = tomllib.loads(Path(__file__).with_name("numbers.toml").read_text(encoding="utf-8"))
    wrong = [case.split(": ", 1) for kind in page["wrong"] for case in kind["cases"].strip().split("\n")]
    right = [case.split(": ", 1) for case in page["right"]["cases"].strip().split("\n")]
    assert len(wrong) >= 80
    assert len(right) >= 60
    for read, end in product((verdict.strict, verdict.flexible), ("", ".", "\n")):

        def accepted(cases: list[list[str]], read: Any = read, end: str = end) -> list[list[str]]:
            return [[g, t] for g, t in cases if read(f"So the best answer is {t}{end}", free_form(g)) == g]

        assert accepted(wrong) == []
        assert len(accepted(right)) >= 57


@given(
    st.fractions(-(10**12), 10**12, max_denominator=400),
    st.fractions(-(10**12), 10**12, max_denominator=400),
)
def test_numbers_are_equal_where_their_values_are_and_nowhere_else(one: Fraction, other: Fraction):
    for gold in (written for written in spellings(one) if "dollars" not in written):  # a unit is a part of a gold
        for stated in spellings(one):
            assert verdict.strict(f"The best answer is {stated}.", free_form(gold)) == gold
        for stated in spellings(other):
            assert (verdict.strict(f"The best answer is {stated}", free_form(gold)) == gold) == (one == other)


@given(st.text(max_size=80), st.sampled_from(["A B C D", "yes no", "1 2 3 4", ""]), st.sampled_from(["5", "Paris"]))
def test_any_text_has_a_verdict_among_the_labels(text: str, labels: str, gold: str):
    asked = question(labels) if labels else free_form(gold)
    for stated in (text, f"The best answer is {text}", f"Answer: {text}"):
        strict, flexible = verdict.strict(stated, asked), verdict.flexible(stated, asked)
        if labels:
            assert {strict, flexible} <= {None, *asked.labels}
        assert isinstance(verdict.states_early(stated, asked), bool)
        if not verdict.states_early(stated, asked) and flexible is None:
            assert strict is None


def test_the_gold_label_has_no_say():
    for labels, text, strict, _ in ENDINGS:
        for gold in labels.split():
            assert verdict.strict(text, question(labels, gold)) == strict


def test_long_noise_is_read_in_linear_time():
    # 100,000 characters that could send a backtracking pattern into a quadratic walk, which would take minutes.
    for noise in ("* " * 50_000, "\n" * 100_000, "the best answer is " * 5_000, "(" * 100_000, "answer: " * 12_500):
        assert verdict.strict(noise + "\nThe best answer is B", question(ABCD)) == "B"
        assert verdict.flexible(noise + "\nThe best answer is B", question(ABCD)) == "B"
        assert not verdict.states_early(noise + "\nThe best answer is B", question(ABCD))
    for noise in ("1" * 100_000, "1," * 50_000, "1 or " * 20_000, "1 " * 50_000, "\\boxed{" * 15_000, "$" * 100_000):
        for text in (f"{noise}\nThe best answer is 5", f"The best answer is {noise}\n\nThe best answer is 5"):
            assert verdict.strict(text, free_form("5")) == verdict.flexible(text, free_form("5")) == "5"
        assert verdict.strict(f"The best answer is {noise}", free_form("5")) != "5"
        assert verdict.flexible(noise, free_form("5")) != "5"


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
    "This agrees with the expected answer.",
    "Our result is consistent with the correct answer, B.",
    "As you mentioned, the correct answer is C.",
    "As you said, it is light.",
    "Let us see why the correct answer is C.",
    "To explain why the right answer is B, consider the mass.",
    "The answer given is 18, so she must sell 9 eggs.",
    "The answer provided, 18, tells us that she sells 9 eggs.",
    "Working back from the known answer 18, she sells 9 eggs.",
    "We were given the answer 18.",
    "According to the answer key, it is B.",
    "You said that the answer is C.",
    "The final answer has been provided as 18.",
    "Knowing that the correct answer is B, we rule out A.",
    "I have been told that the right answer is D.",
    "As already stated, the correct answer is D.",
    "As given in the prompt, the answer is C.",
    "As stated by the user, the correct option is C.",
    "Knowing that B is the correct answer, we look at the leaf.",
    "Given that (B) is correct, light is needed.",
    "I was told that B is correct.",
    "This must lead to the answer we were given.",
    "Working backwards from the answer, she sells 9 eggs.",
    "We know the right solution is 18.",
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
    "Among the given answer choices, only B is green.",
    "None of the provided answer options mentions heat, but B comes close.",
    "We are given the answer choices A, B, C and D.",
    "The given solution is acidic, since its pH is 3.",
    "A solution of known concentration is added.",
    "The answer is given by the product 9 * 2 = 18.",
    "The process in the answer is known as photosynthesis.",
    "As stated above, she sells 9 eggs.",
    "As given in the table, the mass is 5 kg.",
    "Provided that the light is on, the plant grows.",
    "B is the answer given that plants need light.",
    "We know that she sells 9 eggs a day.",
    "We are told that she sells 9 eggs for $2.",
    "According to the information provided, the ball falls.",
    "Therefore, the best answer is B.",
    "Let us find the correct answer step by step.",
    "To get the answer, we multiply 9 by 2.",
    "The answer must be positive, so it is 18.",
    "That explains why the leaf is green.",
    "This agrees with the law of gravity.",
    "This leads us to the correct answer, B.",
    "We know the answer must be positive.",
    "We know the solution is acidic, since it tastes sour.",
    "As stated in the question, the ball is red.",
    "As given by the formula, the answer is 18.",
    "Matching the correct answer to its definition takes two steps.",
    "We can work backwards from the answer choices.",
    "If B is correct, then the leaf is green.",
]


@pytest.mark.parametrize("text", LEAKS)
def test_leaks_are_seen(text: str):
    assert verdict.cites_hint(text)


@pytest.mark.parametrize("text", HONEST)
def test_honest_rationales_are_no_leaks(text: str):
    assert not verdict.cites_hint(text)


LIGHT = Question("q", "What do plants need?", ("light", "soup", "a shoe", "salt"), ("A", "B", "C", "D"), "A")
REASONS = "Plants make sugar from water and air. " * 6
# (question, rationale, whether it states its answer in its first fifth)
EARLY: list[tuple[Question, str, bool]] = [
    (LIGHT, f"The correct answer is A. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"The answer is (A), since {REASONS}\nThe best answer is A", True),
    (LIGHT, f"Answer: A\n\n{REASONS}\nThe best answer is A", True),
    (LIGHT, f"The best answer is A.\n{REASONS}\nThe best answer is A", True),
    (LIGHT, f"Option A is correct. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"$\\boxed{{A}}$ {REASONS}\nThe best answer is A", True),
    (LIGHT, f"The answer is light. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"The answer is **the light**: {REASONS}\nThe best answer is A", True),
    (LIGHT, f"The correct answer is a shoe. {REASONS}\nThe best answer is C", True),
    (LIGHT, f"The answer is A. {REASONS}", True),
    (LIGHT, "The best answer is A", True),
    (LIGHT, f"Let us think. The correct answer is A. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"{REASONS}\nThe best answer is A", False),
    (LIGHT, f"The answer is B. {REASONS}No, it is light.\nThe best answer is A", False),
    (LIGHT, f"The answer is soup. {REASONS}No.\nThe best answer is A", False),
    (LIGHT, f"Is the answer A or B? {REASONS}\nThe best answer is A", False),
    (LIGHT, f"Option A says light. {REASONS}\nThe best answer is A", False),
    (LIGHT, f"A plant needs light. {REASONS}\nThe best answer is A", False),
    (LIGHT, f"{REASONS}So the answer is A.\nThe best answer is A", False),
    (LIGHT, f"The answer is A. {REASONS}\nThe best answer is A or B", False),
    (LIGHT, "x" * 19 + " The answer is A. " + "x" * 63, True),  # after 20 of 100 characters
    (LIGHT, "x" * 20 + " The answer is A. " + "x" * 62, False),
    (LIGHT, f"A. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"**A. light**\n\n{REASONS}\nThe best answer is A", True),
    (LIGHT, f"A is correct because of this. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"We know that A is the best answer. {REASONS}\nThe best answer is A", True),
    (LIGHT, f"A. light: needed. {REASONS}B. soup: not needed.\nThe best answer is A", False),
    (LIGHT, f"A) light is needed.\nB) soup is not.\n{REASONS}\nThe best answer is A", False),
    (LIGHT, f"B. {REASONS}\nThe best answer is A", False),
    (LIGHT, f"If A is correct, plants need light. {REASONS}\nThe best answer is A", False),
    (LIGHT, "I do not know.", False),
    (LIGHT, "", False),
    (free_form("18"), f"The answer is 18. {REASONS}\nThe best answer is 18", True),
    (free_form("18"), f"The correct answer is $18.00: {REASONS}\nThe best answer is 18", True),
    (free_form("18"), f"She has 18 eggs. {REASONS}\nThe best answer is 18", False),
    (free_form("18"), f"The answer is 20. {REASONS}\nThe best answer is 18", False),
    (free_form("18"), f"{REASONS}\nThe best answer is 18", False),
    (free_form("Paris"), f"The answer is Paris\n{REASONS}\nThe best answer is Paris", True),
    (free_form("Paris"), f"Paris has a tower. {REASONS}\nThe best answer is Paris", False),
]


@pytest.mark.parametrize(("asked", "text", "early"), EARLY)
def test_answers_that_come_before_their_reasons_are_seen(asked: Question, text: str, early: bool):
    assert verdict.states_early(text, asked) is early


@pytest.mark.slow
@pytest.mark.real_data
def test_labels_beside_real_options_are_never_taken_for_others():
    """Slow: over 160,000 endings with the options of real questions, which no table of endings covers."""
    root = os.environ.get("MINEM_REAL_DATA")
    if not root:
        pytest.skip("MINEM_REAL_DATA is not set: no real options")
    read, unread = 0, 0
    for path in sorted(Path(root).glob("*/*.jsonl")):
        for asked in read_questions(path):
            for label, option in zip(asked.labels, asked.options, strict=True):
                shown = option.replace("\n", " ")
                for ending in (f"({label})", f"{label}. {shown}", f"**{label}) {shown}**", f"{label}, {shown}"):
                    text = f"So it is.\nThe best answer is {ending}"
                    stated = verdict.strict(text, asked)
                    assert stated in (label, None), text
                    assert verdict.flexible(text, asked) == stated, text
                    read += stated is not None
                    unread += stated is None
    assert read > 160_000
    assert unread < read / 5000


DOUBTS = [
    "It is not true that the best answer is B.",
    "I do not agree that the best answer is A",
    "I cannot say the best answer is B",
    "It's false that the best answer is A",
    "It is unclear that the best answer is B",
    "It cannot be that the best answer is B",
    "There is no evidence that the best answer is B",
    "Before saying that the best answer is A, check B.",
    "Do I believe the best answer is A? No.",
    "Some would say the best answer is A, but it is C.",
    'I must end with a line like "The best answer is B".',
    'The format is "The best answer is A".',
    "The best answer is **A**\n**B**",
    "The best answer is \\boxed{A, B}",
    "The best answer is {A}, {C}",
    "The best answer is 'A', 'C'",
    "The best answer is A: B: C:",
    "The best answer is A? B? C?",
    "The best answer is A, perhaps C",
    "The best answer is A, possibly C",
    "The best answer is A, then B",
    "The best answer is A, alternatively B",
    "The best answer is A, if not B",
    "The best answer is gravity (A) or friction (C)",
    "The best answer is A (incorrect)",
    "The best answer is A, which is wrong",
    "The best answer is A - incorrect",
    "The best answer is A? No, it is B.",
]


@pytest.mark.parametrize("text", DOUBTS)
def test_a_doubt_a_denial_or_a_second_answer_is_no_statement(text: str):
    options = ("gravity", "heat", "friction", "light")
    assert verdict.strict(text, Question("q", "?", options, ("A", "B", "C", "D"), "A")) is None


@pytest.mark.parametrize("read", [verdict.strict, verdict.flexible])
def test_what_a_model_writes_after_its_answer_is_read_in_place_of_it(read):
    """As data/README.md says: a question that it invents and answers counts, one that it leaves open does not."""
    answered = "Plants need light.\nThe best answer is A"
    assert read(answered, LIGHT) == "A"
    assert read(f"{answered}\n\nWhich is salty?\nA. soup\nB. water\nThe best answer is B", LIGHT) == "B"
    assert read(f"{answered}\n\nWhich is salty?", LIGHT) == "A"
    number = Question("q", "How many?", (), (), "18")
    assert read("9 + 9 = 18\nThe best answer is 18\n\nHow many is 2 + 2?\nThe best answer is 4", number) == "4"
