"""`minem show`: which samples it shows, and that their texts cannot command a terminal."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from minem.cli import main
from minem.data.prompts import load_prompts
from minem.data.tasks import load_task
from tests.minem.made_runs import make_run, sample

IDS = ("toy-train-001", "toy-train-002")


@pytest.fixture
def run(tmp_path):
    rows = [
        sample(id_, iteration, attempt, status)
        for iteration in (1, 2)
        for id_ in IDS
        for attempt, status in ((1, "wrong"), (2, "truncated"), (3, "accepted"))
    ]
    rows[2] |= {"prompt": "hinted", "logprob_plain": None}
    return make_run(tmp_path / "run", samples=rows)


def show(*arguments: object):
    return CliRunner().invoke(main, ["show", *(str(a) for a in arguments)])


def rows_of(*arguments: object) -> list[tuple]:
    result = show(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    return [(row["iteration"], row["id"], row["attempt"], row["status"]) for row in found["samples"]]


def test_filters(run):
    everything = rows_of(run, "-n", 99)
    assert len(everything) == 12
    assert rows_of(run) == everything[:10]
    assert rows_of(run, "--iteration", 2) == everything[6:]
    assert rows_of(run, "--status", "wrong") == [row for row in everything if row[3] == "wrong"]
    assert rows_of(run, "--question", IDS[1], "-n", 99) == [row for row in everything if row[1] == IDS[1]]
    picked = rows_of(run, "--iteration", 1, "--status", "truncated", "--question", IDS[0])
    assert picked == [(1, IDS[0], 2, "truncated")]
    assert rows_of(run, "--status", "unparsed") == []


def test_a_person_sees_prompt_status_and_log_probability(run):
    lines = show(run, "--iteration", 1, "--question", IDS[0]).stdout.splitlines()
    heads = [line for line in lines if line.startswith("──")]
    assert "WRONG" in heads[0]
    assert "log q -1.50  log p -1.50" in heads[0]
    assert "hinted prompt" in heads[2]
    assert "log p" not in heads[2]
    question = next(q for q in load_task("toy").train if q.id == IDS[0])
    plain, hinted = (load_prompts("toy").messages(question, hint)[0]["content"] for hint in (None, "forward"))
    shown = [line.removeprefix("│ ") for line in lines if line.startswith("│")]
    assert shown == plain.split("\n") + hinted.split("\n")  # the plain one once for two attempts
    assert lines[-1] == "3 of 3 samples that match"
    assert show(run, "-n", 5).stdout.splitlines()[-1] == "5 of 12 samples that match; -n shows more"


def test_texts_command_no_terminal(tmp_path):
    hostile = "\x1b[2J\x07\u202eabc\x9b31m\r"
    run = make_run(tmp_path / "run", samples=[sample("x" + hostile, text=f"one{hostile}\ntwo", answer=hostile)])
    for arguments in ((run,), (run, "--json")):
        printed = show(*arguments).stdout
        assert not set("\x1b\x07\u202e\x9b\r") & set(printed)
    assert "\n  two\n" in show(run).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--iteration", 7), "--iteration 7"),
        (("--question", "nobody"), "--question nobody"),
        (("--status", "right"), "accepted"),
        (("-n", "-1"), "-1"),
    ],
)
def test_wrong_requests_are_one_sentence(run, arguments, sentence):
    result = show(run, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""


def test_a_run_without_samples_is_one_sentence(tmp_path):
    result = show(make_run(tmp_path / "run", validation=(10,)))
    assert result.exit_code == 2
    assert "no finished E-step yet" in result.stderr


def test_without_the_task_the_answers_are_still_shown(run):
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["task"]["name"] = "gone/away"
    (run / "run.json").write_text(json.dumps(facts))
    result = show(run, "-n", 1)
    assert result.exit_code == 0
    assert "the texts of the questions cannot be shown" in result.stderr
    assert "The best answer is 1" in result.stdout
    assert "│" not in result.stdout
