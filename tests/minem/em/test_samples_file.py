"""Rows that anybody may have made: taken or refused with the file and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import minem
from minem.config import MStepSection
from minem.data.tasks import load_task
from minem.em.sample import Sample
from minem.em.samples_file import read_samples
from minem.em.weighting import make_examples, weigh
from minem.errors import UserError
from minem.files import write_rows
from tests.minem.folders import toy_prompts

TASK = load_task("toy", 8)
TOKENIZER = minem.load("toy")[1]
PROMPTS = toy_prompts(TOKENIZER)
TEXT = "So 4.\nThe best answer is 4"
IDS = [*TOKENIZER.encode(TEXT, False), min(TOKENIZER.eos_ids)]
ROW = {"id": TASK.train[0].id, "token_ids": IDS}


def read(folder: Path, *rows: dict[str, Any], weights: str = "equal", drop_leaks: bool = False) -> list[Sample]:
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(file, TASK, PROMPTS, 256, TOKENIZER.backend.get_vocab_size(), weights, drop_leaks)


def test_accepted_rows_and_those_without_a_status_are_taken(tmp_path):
    rows = [ROW, {**ROW, "status": "wrong"}, {**ROW, "status": "accepted", "text": TEXT, "leak": True, "mine": [1]}]
    found = read(tmp_path, *rows)
    assert [(sample.id, sample.token_ids, sample.text, sample.gold) for sample in found] == [
        (ROW["id"], IDS, TEXT, TASK.train[0].gold)
    ] * 2
    assert len(read(tmp_path, *rows, drop_leaks=True)) == 1
    assert read(tmp_path, {"id": "no such question", "status": "wrong"}) == []


def test_rows_of_text_get_the_ids_of_the_models_tokenizer(tmp_path):
    asked = {"role": "user", "content": "?"}
    answered = [asked, {"role": "assistant", "content": TEXT}]
    rows = [{"text": TEXT}, {"messages": answered}, {"text": TEXT, "finish_reason": "length"}]
    ended = [{**row, "finish_reason": "stop"} for row in rows]
    found = read(tmp_path, *({"id": ROW["id"], **row} for row in rows + ended))
    assert [sample.token_ids for sample in found] == [IDS[:-1]] * 3 + [IDS] * 3
    assert {sample.text for sample in found} == {TEXT}
    (ended,) = read(tmp_path, {"id": ROW["id"], "text": TOKENIZER.decode(IDS, False), "finish_reason": "stop"})
    assert ended.token_ids == IDS  # and no second EOS
    for text, message in (
        (f"{TOKENIZER.decode(IDS, False)} more", "which ends an answer, before its end"),
        ("\ud800", "row 1: this text is not valid Unicode"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, {"id": ROW["id"], "text": text})
    for row in ({}, {"text": " "}, {"text": 7}, {"messages": [asked]}, {"messages": []}, {"messages": ["text"]}):
        with pytest.raises(UserError, match="row 1 needs token_ids, a text, or messages of which"):
            read(tmp_path, {"id": ROW["id"], **row})


def test_the_rows_of_a_run_give_the_examples_that_the_run_trains(tmp_path):
    own = [
        Sample(q.id, 1, k, "hinted", IDS, -1.0 * k, -2.5, TEXT, "4", q.gold, "accepted", False)
        for q in TASK.train
        for k in (1, 2)
    ]
    write_rows(tmp_path / "accepted.jsonl", map(vars, own))
    keys = list(json.loads((tmp_path / "accepted.jsonl").read_text().splitlines()[0]))
    assert ", ".join(keys) == (
        "id, iteration, attempt, prompt, token_ids, logprob_q, logprob_plain, text, answer, gold, status, leak"
    )
    read = read_samples(
        tmp_path / "accepted.jsonl", TASK, PROMPTS, 256, TOKENIZER.backend.get_vocab_size(), "importance", False
    )
    section = MStepSection(weights="importance")
    assert make_examples(read, TASK, PROMPTS, section) == make_examples(own, TASK, PROMPTS, section)
    assert weigh(read, "importance")[0] != weigh(read, "importance")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "strange"}, "id 'strange' is no training question of toy"),
        ({"id": ["a"]}, r"id \['a'\] is no training question"),
        ({"token_ids": None}, "token_ids must be a list of the ids that were drawn"),
        ({"token_ids": []}, "token_ids must be a list"),
        ({"token_ids": [True]}, "token_ids must be a list"),
        ({"token_ids": [5.0]}, "token_ids must be a list"),
        ({"token_ids": [5, -1]}, "token id -1 is outside the model's vocabulary of"),
        ({"token_ids": [10**9]}, "token id 1000000000 is outside the model's vocabulary of"),
        ({"text": "another text"}, "token_ids do not spell its text; they come from another tokenizer"),
        ({"token_ids": [5] * 250}, "250 token ids and their prompt exceed 256 positions"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"samples.jsonl, row 2: {message}"):
        read(tmp_path, ROW, {**ROW, **changes})


@pytest.mark.parametrize("field", ["logprob_plain", "logprob_q"])
@pytest.mark.parametrize("value", [None, "x", True, 10**400, [1]])
def test_a_row_that_cannot_be_weighed_is_named(field, value, tmp_path):
    """Among them a number that is too large for a float, which JSON allows."""
    row = {**ROW, "logprob_plain": -1, "logprob_q": -2.0, field: value}
    with pytest.raises(UserError, match=rf"samples.jsonl, row 2: {field} is .*mstep.weights = .importance. needs"):
        read(tmp_path, {"id": "x", "status": "wrong"}, row, weights="importance")
    assert len(read(tmp_path, row)) == 1  # other weights do not need it
