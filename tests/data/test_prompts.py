"""Prompts: what they say and what they must not: `python -m pytest tests/data/test_prompts.py`."""

import dataclasses
import gzip
import os
import re
from pathlib import Path

import pytest

from minem.data import prompts, verdict
from minem.data.tasks import Question, read_questions
from minem.model.tokenizer import Tokenizer
from tests.minem.folders import make_tokenizer

QUESTION = Question("q", "What do plants need?", ("light", "soup", "shoes"), ("A", "B", "C"), "B")
FREE_FORM = Question("q", "How many eggs are 2 times 9?", (), (), "18")
# The date in Llama 3.2's template: given, else today's, else a fixed one.
DATED = """{% if not date_string is defined %}{% if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}{% endif -%}
<s>system: Today Date: {{ date_string }}</s>{% for message in messages %}
<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"""


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


def test_the_free_form_prompt_word_for_word():
    plain = (
        'How many eggs are 2 times 9?\n\nReason step by step, then end with a last line "The best answer is X", '
        "where X is the answer alone, in digits if it is a number."
    )
    assert content(FREE_FORM) == plain
    for gold in ("20", "1,000", "eighteen", "{label}"):
        other = dataclasses.replace(FREE_FORM, gold=gold)
        assert content(other) == plain
        for hint, wording in prompts.HINTS.items():
            assert content(other, hint).replace(wording.format(label=gold) + "\n\n", "", 1) == plain
            assert f" is {gold}" in content(other, hint)
    assert verdict.strict(plain, FREE_FORM) is verdict.flexible(plain, FREE_FORM) is None


def test_the_date_in_a_prompt_is_not_todays(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(DATED)
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = prompts.messages(QUESTION, "derive")
    text = ours.render(chat)
    assert text.startswith("<s>system: Today Date: 26 Jul 2024</s>")
    kinds = {"tokenize": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(chat, date_string="26 Jul 2024", **kinds) == text
    today = theirs.apply_chat_template(chat, **kinds)
    assert today != text
    assert re.sub(r"Today Date: [^<]*", "", today) == re.sub(r"Today Date: [^<]*", "", text)


@pytest.mark.parametrize("hint", prompts.HINTS)
def test_a_hint_adds_the_answer_and_changes_nothing_else(hint: str):
    hinted = content(QUESTION, hint)
    shown = prompts.HINTS[hint].format(label="B") + "\n\n"
    assert hinted.replace(shown, "", 1) == content(QUESTION)
    assert re.search(r"correct answer(, which)? is B\b", shown)
    assert hinted.endswith("where X is A, B or C.")


def test_the_wordings_differ():
    assert len(set(prompts.HINTS.values())) == len(prompts.HINTS) >= 3
    assert prompts.HINTS["derive"].startswith("First derive the answer")


def test_a_prompt_read_back_states_no_answer():
    assert verdict.strict(content(QUESTION), QUESTION) is None
    assert verdict.flexible(content(QUESTION), QUESTION) is None


def test_braces_in_a_question_are_left_alone():
    odd = Question("q", "What is {x: 1}?", ("{label}", "b"), ("A", "B"), "A")
    assert "A. {label}\nB. b" in content(odd, "forward")


@pytest.mark.slow
@pytest.mark.real_data
def test_every_real_row_renders_to_the_text_and_ids_of_transformers(tmp_path: Path):
    """Slow: 10,363 real questions through a real chat template and tokenizer; the quick tests use made-up ones."""
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
