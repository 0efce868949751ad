"""The diagnostics: weights equal two teacher-forced passes, draws depend on no slots, a run stays as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from minem.cli import main
from minem.data.tasks import Question, load_task
from minem.data.verdict import strict
from minem.em.diagnostics import EXPLAINED, Draw, acceptance, choose, draw, early_share, falling, shown, summarise
from minem.em.estep import encode_prompt, judge
from minem.files import read_rows
from minem.generation.generator import Generator
from minem.generation.request import Request, SamplingParams, stream_seed
from minem.model.weights import load
from minem.runs.directory import read_journal
from minem.statistics import wilson

SETTINGS = {"hint": "forward", "hinted_draws": 3, "max_new_tokens": 64, "seed": 5, "iteration": 2}


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return choose(load_task("toy").train, 6, seed=5)


def diagnose(policy, proposal, questions, **changes) -> list[Draw]:
    return draw(questions, policy, proposal, strict, **{"pack_tokens": 8192, **SETTINGS, **changes})


def log_softmax_after(model, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """[T, V] in float64: one whole sequence through the model, nothing packed and nothing cached."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids]))[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_weights_are_those_of_two_teacher_forced_passes(toy, questions):
    """Of each draw, made again from its random stream: log q hinted, log pi plain, entropy, and the verdict."""
    model, tokenizer = toy
    generator = Generator(model, tokenizer, slots=7)
    draws = diagnose(generator, generator, questions, pack_tokens=150)  # a few sequences to a pass
    assert [d.id for d in draws] == [q.id for q in questions for _ in range(4)]
    assert [d.prompt for d in draws] == ["hinted", "hinted", "hinted", "plain"] * 6
    params = SamplingParams(max_new_tokens=64)
    weights = []
    for number, one in enumerate(draws):
        question, k = questions[number // 4], (number + 1) % 4
        plain, hinted = encode_prompt(tokenizer, question), encode_prompt(tokenizer, question, "forward")
        prompt = hinted if k else plain
        generator.submit(Request(prompt, params, stream_seed(5, "diagnostics", 2, question.id, k)))
        (completion,) = list(generator)
        ids = torch.tensor(completion.token_ids)[:, None]
        under_q = log_softmax_after(model, prompt, completion.token_ids)
        under_p = log_softmax_after(model, plain, completion.token_ids)
        assert one.log_q == pytest.approx(under_q.gather(1, ids).sum().item(), abs=1e-3)
        assert one.log_p == pytest.approx(under_p.gather(1, ids).sum().item(), abs=1e-3)
        assert one.entropies == pytest.approx((-under_p.exp() * under_p).sum(-1).tolist(), abs=1e-4)
        assert one.accepted == (judge(completion, question, strict)[1] == "accepted")
        if k:
            weights.append(one.accepted * math.exp(under_p.gather(1, ids).sum() - under_q.gather(1, ids).sum()))
    summary = summarise(draws)
    assert summary["p_hat"] == pytest.approx(sum(weights) / len(weights), rel=1e-3)
    assert summary["hinted"] == sum(w > 0 for w in weights) / len(weights)
    assert summary["hinted_accepted"] == {
        q.id: sum(w > 0 for w in weights[3 * i : 3 * i + 3]) for i, q in enumerate(questions)
    }


def test_hinted_draws_can_come_from_another_model(toy, questions):
    model, tokenizer = toy
    other, _ = load("toy")
    with torch.no_grad():
        other.head.weight.mul_(1.3)
    plain = diagnose(Generator(other, tokenizer), Generator(other, tokenizer), questions)
    mixed = diagnose(Generator(other, tokenizer), Generator(model, tokenizer), questions)
    alone = diagnose(Generator(model, tokenizer), Generator(model, tokenizer), questions)
    for by_other, by_both, by_model in zip(plain, mixed, alone, strict=True):
        if by_both.prompt == "plain":
            assert by_both == by_other
        else:
            assert by_both.log_q == by_model.log_q
            assert by_both.log_p != by_model.log_p


def test_draws_do_not_depend_on_slots_or_packing(toy, questions):
    model, tokenizer = toy
    wide, narrow = (Generator(model, tokenizer, slots=n) for n in (64, 2))
    for a, b in zip(diagnose(wide, wide, questions), diagnose(narrow, narrow, questions, pack_tokens=1), strict=True):
        assert (a.id, a.prompt, a.accepted, len(a.entropies)) == (b.id, b.prompt, b.accepted, len(b.entropies))
        assert a.log_p == pytest.approx(b.log_p, abs=1e-4)


def test_p_hat_is_what_plain_draws_say(toy):
    """On the toy, whose hint covers the posterior: the estimate lies by the interval of 400 plain draws."""
    model, tokenizer = toy
    generator = Generator(model, tokenizer)
    some = choose(load_task("toy").train, 40, seed=1)
    draws = diagnose(generator, generator, some, hinted_draws=6)
    right = sum(
        judge(c, question, strict)[1] == "accepted"
        for question, completions in zip(
            some,
            generator.generate(
                [encode_prompt(tokenizer, q) for q in some], SamplingParams(n=10, max_new_tokens=64, seed=3)
            ),
            strict=True,
        )
        for c in completions
    )
    low, high = wilson(right, 400)
    assert low - 0.05 <= summarise(draws)["p_hat"] <= high + 0.05


def test_questions_without_room_for_the_hint_are_left_out(toy, questions):
    model, tokenizer = toy
    lengths = sorted(len(encode_prompt(tokenizer, q, "forward")) for q in questions)
    generator = Generator(model, tokenizer, max_length=lengths[2] + 64)
    fitting = {q.id for q in questions if len(encode_prompt(tokenizer, q, "forward")) <= lengths[2]}
    assert {d.id for d in diagnose(generator, generator, questions)} == fitting
    nothing = summarise([])
    assert nothing["questions"] == 0
    assert {shown(nothing, key) for key in EXPLAINED} == {"-"}


def test_the_questions_are_the_same_in_every_iteration_and_spread_by_the_seed():
    train = load_task("toy").train
    assert choose(train, 32, 0) == choose(tuple(reversed(train)), 32, 0)
    assert choose(train, 8, 0) == choose(train, 32, 0)[:8]
    assert {q.id for q in choose(train, 32, 0)} != {q.id for q in choose(train, 32, 1)}
    assert len(choose(train, 10**6, 0)) == len(train)


def counts(*accepted: int) -> dict:
    return {"hinted_accepted": {str(i): n for i, n in enumerate(accepted)}}


@pytest.mark.parametrize(
    ("before", "after", "fell"),
    [
        ([4] * 8, [4] * 8, False),
        ([4] * 8, [3] * 8, True),  # every question lost one: no noise at all
        ([4] * 7, [0] * 7, False),  # too few to say
        ([4] * 32, [4] * 31 + [0], False),  # a single question: its own standard error
        ([4] * 32, [4] * 26 + [2] * 6, True),
        ([2] * 16 + [3] * 16, [3] * 16 + [2] * 16, False),
        ([0] * 32, [4] * 32, False),
    ],
)
def test_falling_is_more_than_two_standard_errors(before, after, fell):
    assert falling(counts(*before), counts(*after)) is fell


def test_acceptance_by_stage():
    rows = [("plain", 1, "wrong"), ("plain", 1, "accepted"), ("hinted", 2, "accepted"), ("hinted", 10, "truncated")]
    found = acceptance({"prompt": p, "attempt": a, "status": s} for p, a, s in rows)
    assert [tuple(stage.values()) for stage in found] == [("plain", 1, 2, 1), ("hinted", 2, 1, 1), ("hinted", 10, 1, 0)]


def test_early_share_counts_what_the_detector_says(monkeypatch):
    monkeypatch.setattr("minem.data.verdict.states_early", lambda text, question: text.startswith(question.gold))
    by_id = {"q": Question("q", "?", ("x", "y"), ("A", "B"), "A")}
    rows = [{"id": "q", "text": text} for text in ("A, since", "since A", "A", "B")]
    assert early_share(rows, by_id) == 0.5
    assert early_share([], by_id) is None


def run(out: Path, *more: object):
    small = ["--limit", 16, "--iterations", 2, "--set", "eval.samples=0", "--sampler", "star", "--budget", 3]
    result = CliRunner().invoke(main, [str(a) for a in ("train", *small, "--out", out, *more)])
    assert result.exit_code == 0, result.output
    return result


def test_a_run_records_them_and_is_otherwise_as_without_them(tmp_path):
    told = run(tmp_path / "with", "--set", "eval.diagnostics=8", "--set", "eval.hinted_draws=2").stderr
    quiet = run(tmp_path / "without", "--set", "eval.diagnostics=0").stderr
    for label, sentence in EXPLAINED.values():
        assert f"{label}: {sentence}" in told
        assert sentence not in quiet
    for name in ("samples.jsonl", "accepted.jsonl", "eval.validation.jsonl"):
        pairs = [(tmp_path / w / f"iter-{i:02d}" / name).read_bytes() for i in (1, 2) for w in ("with", "without")]
        assert pairs[0] == pairs[1]
        assert pairs[2] == pairs[3]
    weights = [(tmp_path / w / "iter-02" / "model" / "model.safetensors").read_bytes() for w in ("with", "without")]
    assert weights[0] == weights[1]
    journal = read_journal(tmp_path / "with")
    assert not any(stage.endswith("diagnostics") for stage in read_journal(tmp_path / "without"))
    metrics = {row["stage"]: row for row in read_rows(tmp_path / "with" / "metrics.jsonl")}
    for iteration in ("iter-01", "iter-02"):
        found = journal[f"{iteration}/diagnostics"]
        assert found.items() <= metrics[f"{iteration}/diagnostics"].items()
        assert (found["questions"], found["hinted_draws"]) == (8, 2)
        samples = list(read_rows(tmp_path / "with" / iteration / "samples.jsonl"))
        assert sum(stage["drawn"] for stage in found["attempts"]) == len(samples)
        assert sum(stage["accepted"] for stage in found["attempts"]) == sum(r["status"] == "accepted" for r in samples)
    assert list(journal["iter-01/diagnostics"]["hinted_accepted"]) == [
        q.id for q in choose(load_task("toy", 16).train, 8, 0)
    ]


def test_a_fall_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("minem.em.diagnostics.falling", lambda first, now: first is not now)
    warnings = [line for line in run(tmp_path / "run").stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    journal = read_journal(tmp_path / "run")
    assert f"to {shown(journal['iter-02/diagnostics'], 'hinted')} since iteration 1" in warnings[0]
    assert json.dumps(journal["iter-02/diagnostics"]["falling"]) == "true"


def test_a_continued_run_measures_the_same(tmp_path, monkeypatch):
    from minem.errors import Interrupted
    from minem.runs.directory import RunDirectory

    run(tmp_path / "whole")
    enter = RunDirectory._enter

    def stop_before(self, stage, seconds):
        if stage.name == "iter-02/diagnostics":
            raise Interrupted("stopped by the test")
        enter(self, stage, seconds)

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "_enter", stop_before)
        with pytest.raises(AssertionError, match="stopped by the test"):
            run(tmp_path / "pieces")
    run(tmp_path / "pieces")
    whole, pieces = (read_journal(tmp_path / name) for name in ("whole", "pieces"))
    for stage in ("iter-01/diagnostics", "iter-02/diagnostics"):
        assert pieces[stage] == whole[stage]
