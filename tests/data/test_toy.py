"""The embedded toy: its questions, its author, its folder; `python -m pytest tests/data/test_toy.py`."""

import json
import random
from collections import Counter

import make_toy as make
import pytest
import torch

import minem
from minem.data import verdict
from minem.data.prompts import load_prompts
from minem.data.tasks import SPLITS, TOY, Question, load_task
from minem.data.toy import check
from minem.generation.generator import Generator
from minem.generation.request import SamplingParams

FOLDER = TOY / "model"
WORDS = load_prompts("toy")
QUESTION = Question(
    "q", "Modulo 10, start with 3, add 9, multiply by 4, subtract 9. What is the result?", make.DIGITS, make.DIGITS, "9"
)
VALID = "3 + 9 = 2\n2 * 4 = 8\n8 - 9 = 9\nThe best answer is 9"


@pytest.fixture(scope="module")
def toy():
    return minem.load(FOLDER)


# --- questions -------------------------------------------------------------------------------------------------------


def test_the_splits_are_large_enough_and_disjoint():
    task = load_task("toy")
    assert [len(task.train), len(task.validation), len(task.test)] == [512, 200, 300]
    everything = [question.text for split in SPLITS for question in getattr(task, split)]
    assert len(set(everything)) == len(everything)
    assert task.note == ""


def test_every_gold_label_is_what_the_text_works_out_to():
    for question in load_task("toy").test:
        value, asked = check.asked_steps(question)
        assert 2 <= len(asked) <= 4
        for symbol, operand in asked:
            value = eval(f"({value} {symbol} {operand}) % 10")
        assert question.gold == str(value)


def test_no_label_is_favoured_so_that_guessing_stays_at_a_tenth():
    test = load_task("toy").test
    # The most frequent of ten labels among 300 questions, were they all alike: 30 +- 5.2; even ones come more often,
    # because products do.
    assert max(Counter(question.gold for question in test).values()) < 0.2 * len(test)
    assert {question.labels for question in test} == {make.DIGITS}


def test_the_committed_questions_are_those_the_script_makes():
    for split, questions in make.make_questions(random.Random(make.SEED)).items():
        assert tuple(questions) == getattr(load_task("toy"), split)


# --- the check and the author ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (VALID, True),
        (VALID + "\n", True),
        (VALID.replace("2 * 4 = 8", "2 * 4 = 6"), False),
        (VALID.replace("8 - 9 = 9", "8 - 9 = 1"), False),
        (VALID.replace("3 + 9 = 2", "3 + 8 = 1"), False),  # true, but not what was asked
        (VALID.replace("2 * 4 = 8", "1 * 8 = 8"), False),  # true, but does not follow
        (VALID.replace("2 * 4 = 8\n", ""), False),
        (VALID.replace("3 + 9 = 2\n", "3 + 9 = 2\n3 + 9 = 2\n"), False),
        (VALID.replace("answer is 9", "answer is 8"), False),
        (VALID.replace("\nThe best answer is 9", ""), False),
        ("3 + 9 = 2\n2 * 4 = 7\n7 - 9 = 9\nThe best answer is 9", False),  # two errors that lead to the right answer
        ("The best answer is 9", False),
        ("", False),
    ],
)
def test_valid_steps(text: str, valid: bool):
    assert check.valid_steps(text, QUESTION) is valid


def test_the_author_is_the_author_described():
    rng = random.Random(5)
    false_values = make.draw_false_values(rng)
    assert len(false_values) == 260 // 4
    assert all(check.apply(*fact) != value for fact, value in false_values.items())
    plain = [make.write_response(QUESTION, {("+", 3, 9): 5}, None, rng) for _ in range(2000)]
    wrong = sum("3 + 9 = 5" in text for text in plain) / len(plain)
    assert abs(wrong - 0.65) < 4 * (0.65 * 0.35 / 2000) ** 0.5


def test_forward_hints_give_the_posterior_and_justify_bends_the_last_step():
    rng = random.Random(6)
    false_values = {("*", 2, 4): 6, ("-", 6, 9): 9}  # both wrong together reach 9: 2 * 4 = 6, 6 - 9 = 9
    draws = [make.write_response(QUESTION, false_values, "forward", rng) for _ in range(2000)]
    assert {verdict.strict(text, QUESTION) for text in draws} == {"9"}
    # P(both wrong) = 0.65 * 0.65 against P(true) = 0.35, each over their sum
    expected = 0.35 / (0.35 + 0.65**2)
    valid = sum(check.valid_steps(text, QUESTION) for text in draws) / len(draws)
    assert abs(valid - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    bent = make.write_response(QUESTION, {("+", 3, 9): 5}, "justify", random.Random(1))
    assert bent == "3 + 9 = 5\n5 * 4 = 0\n0 - 9 = 9\nThe best answer is 9"


# --- the model's folder ----------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_prompts_are_short(toy):
    model, tokenizer = toy
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000
    for hint in (None, *WORDS.hinted):
        longest = max(len(tokenizer.chat(WORDS.messages(q, hint))) for q in load_task("toy").test)
        # A changed sentence in prompt_sets/toy.toml would be spelt out in bytes here, and unknown to the model.
        assert longest <= 20, f"the wording {hint!r} is not the one the toy has learnt: run bench/make_toy.py"
    assert len(tokenizer.encode(VALID, add_special_tokens=False)) <= 25


def test_any_text_can_be_read_and_written(toy):
    _, tokenizer = toy
    for text in ("", "naïve — 日本語 🙂\t\n", VALID, "The best answer is = + , add "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_loads_the_folder_to_the_same_ids_and_logits(toy):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = toy
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    their_model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    for question in load_task("toy").test[:20]:
        for hint in (None, *WORDS.hinted):
            chat = WORDS.messages(question, hint)
            text = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert text == tokenizer.render(chat)
            assert their_tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer.chat(chat)
    ids = torch.tensor([tokenizer.chat(WORDS.messages(QUESTION)) + tokenizer.encode(VALID, add_special_tokens=False)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), their_model(ids).logits, rtol=1e-4, atol=1e-4)
    assert {their_model.generation_config.eos_token_id} == tokenizer.eos_ids
    assert their_tokenizer.eos_token == "<|end|>"


def test_the_base_model_is_honestly_shaky(toy):
    model, tokenizer = toy
    test = load_task("toy").test
    generator = Generator(model, tokenizer)
    asked = [tokenizer.chat(WORDS.messages(question)) for question in test]
    draws = generator.generate(asked, SamplingParams(temperature=0.0, max_new_tokens=64))
    right = sum(
        verdict.strict(draw[0].text, question) == question.gold for draw, question in zip(draws, test, strict=True)
    )
    assert 0.35 <= right / len(test) <= 0.60
    assert {draw[0].finish_reason for draw in draws} == {"stop"}


def test_the_wordings_do_what_they_were_chosen_for(toy):
    """forward raises acceptance with sound steps; justify raises it more cheaply, with bent ones."""
    model, tokenizer = toy
    train = load_task("toy").train[:200]
    generator = Generator(model, tokenizer)
    accepted, valid = {}, {}
    for hint in (None, "forward", "justify"):
        asked = [tokenizer.chat(WORDS.messages(question, hint)) for question in train]
        draws = generator.generate(asked, SamplingParams(max_new_tokens=64, seed=1))
        pairs = [(draw[0].text, question) for draw, question in zip(draws, train, strict=True)]
        right = [pair for pair in pairs if verdict.strict(*pair) == pair[1].gold]
        accepted[hint] = len(right) / len(train)
        valid[hint] = sum(check.valid_steps(*pair) for pair in right) / len(right)
    assert accepted["forward"] > accepted[None] + 0.2
    assert accepted["justify"] > accepted[None] + 0.2
    assert valid["forward"] > 0.9
    assert valid["justify"] < 0.8


def test_config_json_says_what_the_folder_is():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
