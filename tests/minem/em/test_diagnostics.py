"""The diagnostics: weights equal two teacher-forced passes, draws depend on no slots, a run stays as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from minem.cli import main
from minem.config import SamplerSection
from minem.data.tasks import Question, Task, load_task
from minem.data.verdict import strict
from minem.em.diagnostics import EXPLAINED, Diagnosis, Draw, choose, facts, falling, shown, summarise
from minem.em.estep import EStep, judge
from minem.em.sample import Sample
from minem.em.samplers import make_sampler
from minem.files import read_rows
from minem.generation.generator import Generator
from minem.generation.request import Request, SamplingParams, stream_seed
from minem.model.weights import load
from minem.runs.directory import read_journal
from minem.statistics import wilson
from tests.minem.folders import toy_prompts


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return choose(load_task("toy").train, 4, seed=5)


def make_diagnosis(policy, proposal, questions, hinted_draws: int = 3, pack_tokens: int = 8192) -> Diagnosis:
    step = EStep(
        sampler=make_sampler("pps", 1),
        section=SamplerSection(max_new_tokens=64),
        generators={"plain": policy, "hinted": proposal},
        prompts=toy_prompts(policy.tokenizer),
        verdict=strict,
        seed=5,
        pack_tokens=pack_tokens,
    )
    return Diagnosis(questions, step, hinted_draws)


def drawn(tokens: float) -> dict[str, float]:
    """An E-step with draws of about 14 tokens."""
    return {"tokens": tokens, "cancelled_tokens": 0, "attempts": tokens / 14}


def diagnose(policy, proposal, questions, **changes) -> list[Draw]:
    diagnosis = make_diagnosis(policy, proposal, questions, **changes)
    shown = []
    draws = diagnosis.draw(2, drawn(1e6), 1, questions, shown.append)
    assert shown[-1] == len(draws) <= diagnosis.total == len(questions) * (diagnosis.hinted_draws + 1)
    return draws


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
    assert [d.prompt for d in draws] == ["hinted", "hinted", "hinted", "plain"] * 4
    params = SamplingParams(max_new_tokens=64)
    weights = []
    for number, one in enumerate(draws):
        question, k = questions[number // 4], (number + 1) % 4
        plain, hinted = toy_prompts(tokenizer).trained(question), toy_prompts(tokenizer).drawn(question, hinted=True)
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


@pytest.mark.slow
def test_p_hat_is_what_plain_draws_count(toy):
    """On the toy, whose hint covers the posterior: the estimate lies by the interval of 400 plain draws.

    The quick tests prove the weights, and `minem.statistics` its estimate; this one that they fit a real model.
    """
    model, tokenizer = toy
    generator = Generator(model, tokenizer)
    some = choose(load_task("toy").train, 40, seed=1)
    draws = diagnose(generator, generator, some, hinted_draws=6)
    right = sum(
        judge(c, question, strict)[1] == "accepted"
        for question, completions in zip(
            some,
            generator.generate(
                [toy_prompts(tokenizer).trained(q) for q in some], SamplingParams(n=10, max_new_tokens=64, seed=3)
            ),
            strict=True,
        )
        for c in completions
    )
    low, high = wilson(right, 400)
    assert low - 0.05 <= summarise(draws)["p_hat"] <= high + 0.05


def test_questions_without_room_for_the_hint_are_left_out(toy, questions):
    model, tokenizer = toy
    lengths = sorted(len(toy_prompts(tokenizer).drawn(q, hinted=True)) for q in questions)
    generator = Generator(model, tokenizer, max_length=lengths[2] + 64)
    fitting = {q.id for q in questions if len(toy_prompts(tokenizer).drawn(q, hinted=True)) <= lengths[2]}
    assert {d.id for d in diagnose(generator, generator, questions)} == fitting
    nothing = summarise([])
    assert nothing["questions"] == 0
    assert {shown(nothing, key) for key in EXPLAINED} == {"-"} == set(facts(nothing).values())


def test_the_draws_stay_within_their_share_of_the_tokens(toy):
    """And are those of the first questions, whatever the share: the same draws as with tokens to spare."""
    model, tokenizer = toy
    generator = Generator(model, tokenizer)
    some = choose(load_task("toy").train, 16, seed=5)
    diagnosis = make_diagnosis(generator, generator, some)
    whole = diagnosis.draw(2, drawn(1e6), 1, some)
    tokens = [len(draw.entropies) for draw in whole]
    for share in (0.02, 0.1, 0.4, 0.9):
        most = share * sum(tokens)
        found = diagnosis.draw(2, drawn(8 * most), 2, some)
        assert [(d.id, d.prompt, len(d.entropies)) for d in found] == [
            (d.id, d.prompt, len(d.entropies)) for d in whole[: len(found)]
        ]
        assert len(found) % 4 == 0
        assert sum(tokens[: len(found)]) <= most
        assert len(found) >= (len(whole) * share - 1) / 4 - 4


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


def a_sample(prompt: str, attempt: int, status: str, text: str = "") -> Sample:
    return Sample("q", 1, attempt, prompt, [1], None, None, text, None, "A", status, False)  # type: ignore[arg-type]


def test_the_share_of_answers_stated_early_is_that_of_the_kept_samples(toy, monkeypatch):
    monkeypatch.setattr("minem.em.diagnostics.states_early", lambda text, question: text.startswith(question.gold))
    generator = Generator(*toy)
    diagnosis = make_diagnosis(generator, generator, [])
    task = Task("mine", (Question("q", "?", ("x", "y"), ("A", "B"), "A"),), (), (), "")
    kept = [a_sample("plain", 1, "accepted", text) for text in ("A, since", "since A", "A", "B")]
    assert diagnosis.summary([], kept, task, None)["early"] == 0.5
    assert diagnosis.summary([], [], task, None)["early"] is None


# -------------------------------------------------------------------------------------------------------------- runs


def run(out: Path, *more: object):
    small = ["--limit", 8, "--iterations", 2, "--set", "eval.samples=0", "--sampler", "star", "--budget", 3]
    small += ["--set", "run.keep=all", "--set", "eval.hinted_draws=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")
        patch.setattr("minem.report.charts.plot_accuracy", lambda run, path: path.write_bytes(b""))
        patch.setattr("minem.em.diagnostics.falling", lambda first, now: first is not now)  # from iteration 2 on
        result = CliRunner().invoke(main, [str(a) for a in ("train", *small, "--out", out, *more)])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with diagnostics, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "measured"
    return out, run(out, "--set", "eval.diagnostics=8").stderr


def test_a_run_records_them_and_is_otherwise_as_without_them(measured, tmp_path):
    out, printed = measured
    quiet = run(tmp_path / "without", "--set", "eval.diagnostics=0").stderr
    for label, _ in EXPLAINED.values():
        assert f"{label} " in printed
        assert f"{label} " not in quiet
    for name in ("samples.jsonl", "accepted.jsonl", "eval.validation.jsonl", "model/model.safetensors"):
        for iteration in ("iter-01", "iter-02"):
            assert (out / iteration / name).read_bytes() == (tmp_path / "without" / iteration / name).read_bytes()
    journal = read_journal(out)
    assert not any(stage.endswith("diagnostics") for stage in read_journal(tmp_path / "without"))
    metrics = {row["stage"]: row for row in read_rows(out / "metrics.jsonl")}
    for iteration in ("iter-01", "iter-02"):
        found = journal[f"{iteration}/diagnostics"]
        assert found.items() <= metrics[f"{iteration}/diagnostics"].items()
        assert 1 <= found["questions"] <= 8  # as many as a quarter of so short an E-step allows
        assert found["hinted_draws"] == 2
        chosen = [q.id for q in choose(load_task("toy", 8).train, 8, 0)]
        assert list(found["hinted_accepted"]) == chosen[: found["questions"]]


def test_a_fall_is_warned_of(measured):
    out, printed = measured
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning hinted")]
    journal = read_journal(out)
    assert f"to {shown(journal['iter-02/diagnostics'], 'hinted')} since iteration 1" in warning
    assert journal["iter-02/diagnostics"]["falling"] is True


def test_a_continued_run_measures_the_same(measured, tmp_path):
    """The run as it was before its second diagnostics, and the same command."""
    out, _ = measured
    shutil.copytree(out, tmp_path / "copy")
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    stages = [json.loads(line)["stage"] for line in lines]
    kept = lines[: stages.index("iter-02/diagnostics")]
    (tmp_path / "copy" / "journal.jsonl").write_text("".join(kept))
    assert "iter-02/estep" in stages[: len(kept)]
    run(tmp_path / "copy", "--set", "eval.diagnostics=8")
    assert read_journal(tmp_path / "copy")["iter-02/diagnostics"] == read_journal(out)["iter-02/diagnostics"]
