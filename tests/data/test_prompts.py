"""Prompts: what they say and what they must not."""

import gzip
import os
import re
from pathlib import Path

import pytest

from minem.data import prompts, verdict
from minem.data.tasks import Question, read_questions
from minem.errors import UserError
from minem.tokenizer import Tokenizer

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


@pytest.mark.real_data
def test_every_real_row_renders_to_the_text_and_ids_of_transformers(tmp_path: Path):
    root = os.environ.get("MINEM_REAL_DATA")
    if not root:
        pytest.skip("MINEM_REAL_DATA is not set: no real rows and no real tokenizer")
    transformers = pytest.importorskip("transformers")
    for path in (Path(root) / "qwen2.5-tokenizer").iterdir():
        content = path.read_bytes()
        unpacked = gzip.decompress(content) if path.suffix == ".gz" else content
        (tmp_path / path.name.removesuffix(".gz")).write_bytes(unpacked)
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    files = [path for name in ("arc-challenge", "openbookqa", "mmlu") for path in (Path(root) / name).glob("*.jsonl")]
    wordings = [None, *prompts.HINTS]
    rows = 0
    for path in files:
        for number, question in enumerate(read_questions(path)):
            chat = prompts.messages(question, wordings[number % len(wordings)])
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert ours.render(chat) == text
            assert ours.chat(chat) == theirs(text, add_special_tokens=False)["input_ids"]
            rows += 1
    assert rows == 1119 + 299 + 1172 + 4957 + 500 + 500 + 285 + 1531
