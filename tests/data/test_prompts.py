"""Prompts: what they say and what they must not."""

import re

import pytest

from minem.data import prompts, verdict
from minem.data.tasks import Question
from minem.errors import UserError

QUESTION = Question("q", "What do plants need?", ("light", "soup", "shoes"), ("A", "B", "C"), "B")


def content(question: Question, hint: str | None = None) -> str:
    (message,) = prompts.messages(question, hint)
    assert message["role"] == "user"
    return message["content"]


def test_the_plain_prompt_word_for_word():
    # Written down: accuracies of different releases can only be compared while this does not change.
    assert content(QUESTION) == (
        "What do plants need?\n\nA. light\nB. soup\nC. shoes\n\n"
        'Reason step by step, then end with a last line "The best answer is X", where X is A, B or C.'
    )


def test_the_plain_prompt_does_not_depend_on_the_answer():
    other = Question(QUESTION.id, QUESTION.text, QUESTION.options, QUESTION.labels, "A")
    assert content(QUESTION) == content(other)


@pytest.mark.parametrize("hint", prompts.HINTS)
def test_a_hint_adds_the_answer_and_changes_nothing_else(hint: str):
    hinted = content(QUESTION, hint)
    shown = prompts.HINTS[hint].format(label="B") + "\n\n"
    assert hinted.replace(shown, "", 1) == content(QUESTION)
    assert re.search(r"correct answer(, which)? is B\b", shown)
    assert hinted.endswith("where X is A, B or C.")


def test_the_wordings_differ_and_the_default_is_one_of_them():
    assert prompts.DEFAULT_HINT in prompts.HINTS
    assert len(set(prompts.HINTS.values())) == len(prompts.HINTS) >= 3
    assert prompts.HINTS["derive"].startswith("First derive the answer")


def test_an_unknown_hint_is_refused():
    with pytest.raises(UserError, match="no hint 'nudge': the wordings are forward, derive, justify"):
        prompts.messages(QUESTION, "nudge")


def test_a_prompt_read_back_states_no_answer():
    assert verdict.strict(content(QUESTION), QUESTION) is None
    assert verdict.flexible(content(QUESTION), QUESTION) is None


def test_braces_in_a_question_are_left_alone():
    odd = Question("q", "What is {x: 1}?", ("{label}", "b"), ("A", "B"), "A")
    assert "A. {label}\nB. b" in content(odd, "forward")
