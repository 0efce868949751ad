"""Whole runs on a few questions of the toy, from the command line: what they write, repeat, continue and refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import minem
import minem.em.estep
import minem.model.weights
from minem import Generator, SamplingParams
from minem.cli import main
from minem.config import load_config
from minem.data.prompts import load_prompts
from minem.data.tasks import TOY, load_task
from minem.device import set_deterministic
from minem.em.estep import EStep
from minem.em.mstep import MStep
from minem.em.sample import Sample
from minem.em.samplers import Budgeted
from minem.em.weighting import make_examples
from minem.errors import Interrupted
from minem.files import read_rows
from minem.generation.request import Request, stream_seed
from minem.model.decoder import Model
from minem.report.reader import read_run
from minem.runs.directory import read_journal
from tests.minem.folders import toy_prompts
from tests.minem.tiny_runs import stopped_every

QUESTIONS = 8
SMALL = ["--limit", QUESTIONS, "--iterations", 2, "--set", "mstep.batch_size=4"]
SMALL += ["--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
# Every switch of the objective away from its default, on hinted draws that are far from the toy's posterior.
OBJECTIVE = ["--set", "mstep.weights=importance", "--set", "sampler.draws=all", "--set", "sampler.hint=justify"]
OBJECTIVE += ["--sampler", "star", "--budget", 3]
LIKE_STAR = ["--set", "sampler.proposal=base", "--set", "run.init=base"]


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    """Drawing takes half the time of a run; the run of `finished`, made before this, has its charts."""
    monkeypatch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")
    monkeypatch.setattr("minem.report.charts.plot_accuracy", lambda run, path: path.write_bytes(b""))


def minem_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train(out: Path, *more: object) -> Result:
    return minem_cli("train", *SMALL, "--out", out, *more)


def sample(out: Path, *more: object) -> Result:
    """The E-step of the first iteration alone."""
    return minem_cli("sample", *SMALL, "--out", out, *more)


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of two iterations that nothing disturbed, and its result."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = ok(train(out, "--json"))
    assert len(result.stdout.splitlines()) == 1
    return out, json.loads(result.stdout)


@pytest.fixture(scope="module")
def from_base(tmp_path_factory) -> Path:
    """A run with importance weights in which each M-step starts, and hinted draws come, from the base model."""
    with pytest.MonkeyPatch.context() as patch:
        without_charts.__wrapped__(patch)
        out = tmp_path_factory.mktemp("runs") / "from-base"
        ok(train(out, *OBJECTIVE, *LIKE_STAR, "--sampler", "pps", "--set", "run.keep=all"))
    return out


def contents(run: Path) -> dict[str, bytes]:
    """All files that must not depend on when or how often a run was started."""
    names = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".safetensors", ".json")]
    timed = {"journal.jsonl", "metrics.jsonl", "run.json"}
    own = re.compile(rb'"id": "[0-9a-f]{32}"')  # of a folder
    return {str(p.relative_to(run)): own.sub(b"", p.read_bytes()) for p in names if p.name not in timed}


def rows_of(run: Path, iteration: int = 1, name: str = "samples") -> list[dict[str, Any]]:
    return list(read_rows(run / f"iter-{iteration:02d}" / f"{name}.jsonl"))


def test_a_run_writes_its_files(finished):
    out, result = finished
    expected = {
        "iter-00": {"eval.validation.jsonl", "eval.test.jsonl"},
        "iter-01": {"samples.jsonl", "accepted.jsonl", "eval.validation.jsonl"},
        "iter-02": {"samples.jsonl", "accepted.jsonl", "eval.validation.jsonl", "eval.test.jsonl", "model"},
    }
    assert {p.name: {f.name for f in p.iterdir()} for p in out.glob("iter-*")} == expected
    assert {"config.toml", "run.json", "journal.jsonl", "metrics.jsonl", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    train_ids = {q.id: q for q in load_task("toy", QUESTIONS).train}
    fields = {"id", "iteration", "attempt", "prompt", "token_ids", "logprob_q", "logprob_plain", "text", "answer"}
    for iteration in (1, 2):
        rows = rows_of(out, iteration)
        assert {row["id"] for row in rows} == set(train_ids)
        assert all(set(row) == fields | {"gold", "status", "leak"} for row in rows)
        assert all(row["gold"] == train_ids[row["id"]].gold for row in rows)
        accepted = rows_of(out, iteration, "accepted")
        assert accepted == [row for row in rows if row["status"] == "accepted"]
        assert len({row["id"] for row in accepted}) == len(accepted)  # draws = "first"
    for row in rows_of(out, 2, "eval.test"):
        assert set(row) == {"id", "answer", "gold", "status", "text", "tokens"}
    assert result["test"]["base"]["n"] == QUESTIONS
    assert result["iterations"][1]["estep"]["solved"] == len(rows_of(out, 1, "accepted"))
    model, tokenizer = minem.load(out / "iter-02" / "model")
    assert tokenizer.eos_ids == minem.load("toy")[1].eos_ids
    assert model.config == minem.load("toy")[0].config
    assert "toy" in (out / "iter-02" / "model" / "README.md").read_text()


def test_samples_hold_the_draws_of_the_seed(finished):
    """The rows of iteration 1 again, by the generator alone: the same ids from the same random streams."""
    generator = Generator(*minem.load("toy"), slots=3)
    questions = {q.id: q for q in load_task("toy", QUESTIONS).train}
    for row in rows_of(finished[0])[:12]:
        ids = toy_prompts(generator.tokenizer).trained(questions[row["id"]])
        seed = stream_seed(0, 1, row["id"], row["attempt"])
        generator.submit(Request(ids, SamplingParams(max_new_tokens=64), seed, tag=row))
    for completion in generator:
        assert completion.token_ids == completion.request.tag["token_ids"]


def test_the_same_command_repeats_nothing(finished, tmp_path):
    out, result = finished
    copy = tmp_path / "moved"
    shutil.copytree(out, copy)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    again = ok(train(copy, "--json"))
    assert {**json.loads(again.stdout), "run": "", "model": ""} == {**result, "run": "", "model": ""}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_steps_by_hand_are_the_run_and_the_same_seed_gives_the_same_bytes(finished, tmp_path, monkeypatch):
    """`sample`, then `train`, which continues from the E-step that is there.

    Also without room for training beside the KV cache, and with more questions per iteration than there are: neither
    changes a byte but of the config.
    """
    released = []
    release = Generator.release
    monkeypatch.setattr(Generator, "release", lambda self: (released.append(self), release(self)))
    monkeypatch.setattr(MStep, "room", lambda self: 1_000)
    by_hand, all_of_them = tmp_path / "by-hand", ["--set", "run.questions_per_iteration=99"]
    sampled = ok(sample(by_hand, *all_of_them, "--json"))
    assert json.loads(sampled.stdout)["samples"] == str(by_hand / "iter-01" / "samples.jsonl")
    assert not (by_hand / "iter-00").exists()
    early = sample(by_hand, *all_of_them, "--iteration", 2)
    assert early.exit_code == 2
    assert "needs the model of iter-01" in early.stderr
    before = len(released)
    done = ok(train(by_hand, *all_of_them))
    assert len(released) >= before + 2
    assert "cache   " in done.stderr
    assert f"E-step  {QUESTIONS} of {QUESTIONS} training questions in each iteration" in done.stderr
    assert contents(by_hand) == contents(finished[0])
    late = sample(by_hand, *all_of_them, "--overwrite", "--iteration", 2)
    assert late.exit_code == 2
    assert "--overwrite would remove the model" in late.stderr


def test_the_m_step_alone_gives_the_model_of_the_run(from_base, tmp_path):
    """With importance weights, which need the log-probabilities of the rows."""
    flags = [*OBJECTIVE, *LIKE_STAR, "--samples", from_base / "iter-01" / "samples.jsonl"]
    alone = ok(train(tmp_path / "alone", *flags, "--json"))
    weights = (Path(json.loads(alone.stdout)["model"]) / "model.safetensors").read_bytes()
    assert weights == (from_base / "iter-01" / "model" / "model.safetensors").read_bytes()


def test_a_bad_row_of_samples_is_named_before_a_run_is_made(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"id": "x", "status": "wrong"}\n{"id": "nobody", "token_ids": [1]}\n')
    result = train(tmp_path / "run", "--samples", tmp_path / "samples.jsonl")
    assert result.exit_code == 2
    assert "row 2: id 'nobody'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_rows_made_by_hand_are_trained_and_a_missing_eos_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"id": load_task("toy", QUESTIONS).train[0].id, "token_ids": [5, 6]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    done = ok(minem_cli("train", "--limit", QUESTIONS, "--samples", "mine.jsonl"))
    assert "1 of 1 rows do not end in EOS: the model learns not to stop there" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"toy\.samples-[0-9a-f]{8}\.toy-llama\.s0", folder.name)
    assert (folder / "iter-01" / "model" / "model.safetensors").exists()
    digest = hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest()
    assert read_run(folder).sampler == f"samples {digest[:8]}"
    card = (folder / "iter-01" / "model" / "README.md").read_text()
    assert f"on samples of the file `mine.jsonl` (SHA-256 {digest})" in card
    assert "rsm" not in card + done.stderr


def test_the_config_of_a_run_works_in_another_folder(tmp_path, monkeypatch):
    """A relative path is relative to the folder that the run began in, and the file says so."""
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir()
    two.mkdir()
    monkeypatch.chdir(one)
    shutil.copytree(TOY / "model", "mine")
    rows = (TOY / "train.jsonl").read_text().splitlines(keepends=True)[:12]
    Path("rows.jsonl").write_text("".join(rows))
    short = ["--iterations", 0, "--set", "eval.max_new_tokens=32", "--set", "sampler.max_new_tokens=32"]
    ok(minem_cli("train", "--model", "mine", "--task", "./rows.jsonl", "--prompt", "toy", *short, "--out", "run"))
    assert f"# Relative paths are relative to {json.dumps(str(one))}." in (one / "run" / "config.toml").read_text()
    monkeypatch.chdir(two)
    ok(minem_cli("train", one / "run" / "config.toml", "--out", "again"))
    answers = [(run / "iter-00" / "eval.test.jsonl").read_bytes() for run in (one / "run", two / "again")]
    assert answers[0] == answers[1]


def test_base_as_start_and_as_proposal(from_base):
    """init = "base" trains the base model in iteration 2, and with proposal = "base" hinted draws come from it."""
    again, tokenizer = minem.load("toy")
    config, task = load_config(from_base / "config.toml"), load_task("toy", QUESTIONS)
    samples = [Sample(**row) for row in rows_of(from_base, 2, "accepted")]
    examples = make_examples(samples, task, toy_prompts(tokenizer), config.mstep)
    questions = {q.id: q for q in task.train}
    for example in examples:  # the trained prompt is the plain one, though draws were shown the answer
        assert example.prompt_ids == toy_prompts(tokenizer).trained(questions[example.id])
    MStep(again, config.mstep).run(examples, 0, 2)
    trained = minem.load(from_base / "iter-02" / "model")[0].state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    base, _ = minem.load("toy")
    hinted = [Sample(**row) for row in rows_of(from_base, 2) if row["prompt"] == "hinted"][:8]
    assert len(hinted) >= 4
    for one in hinted:
        prompt = toy_prompts(tokenizer, config.sampler.hint).drawn(questions[one.id], hinted=True)
        with torch.no_grad():
            logprobs = base(torch.tensor([prompt + one.token_ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        drawn = logprobs.gather(1, torch.tensor(one.token_ids)[:, None]).sum().item()
        assert one.logprob_q == pytest.approx(drawn, abs=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        ["--set", "model.dtype=bfloat16", "--limit", 5, "--set", "run.questions_per_iteration=3", *OBJECTIVE],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(
            ["--sampler", "star", *LIKE_STAR, "--set", "model.dtype=bfloat16"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--set", "model.dtype=bfloat16", "--set", "mstep.lora_rank=4", "--set", "mstep.lr=1e-2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["objective", "float32", "bfloat16-base", "bfloat16-lora"],
)
def test_a_run_that_stops_after_any_stage_ends_with_the_same_bytes(more, tmp_path, monkeypatch):
    """The slow cases prove for the other states that a stage hands over what the quick one proves for weights."""
    ok(train(tmp_path / "whole", *more))
    assert stopped_every(1, lambda: train(tmp_path / "pieces", *more), monkeypatch) >= 7
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_weights_that_an_update_ruined_are_not_saved(finished, tmp_path, monkeypatch):
    """One update only, so that no loss comes after it which would show what it did."""
    step = torch.optim.AdamW.step

    def ruins(self, *rest):
        step(self, *rest)
        self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", ruins)
    samples = finished[0] / "iter-01" / "samples.jsonl"
    one = ["--limit", QUESTIONS, "--set", "mstep.batch_size=64", "--set", "mstep.warmup=0"]
    result = minem_cli("train", *one, "--samples", samples, "--out", tmp_path / "run")
    assert result.exit_code == 4
    assert "not finite" in result.stderr
    assert not (tmp_path / "run" / "iter-01" / "model").exists()


def test_all_draws_spend_the_budget_and_without_the_filter_every_one_is_kept(tmp_path):
    flags = ["--budget", 3, "--set", "sampler.draws=all", "--set", "sampler.filter=none"]
    result = ok(sample(tmp_path / "control", *flags))
    assert "sampler.filter = none: the draws follow this altered policy" in result.stderr
    samples = rows_of(tmp_path / "control")
    assert samples == rows_of(tmp_path / "control", 1, "accepted")
    assert len(samples) == 3 * QUESTIONS
    assert {row["status"] for row in samples} > {"accepted"}


def test_each_iteration_draws_on_the_next_questions(tmp_path, monkeypatch):
    """Minibatch EM: 8 questions, 3 at a time, all of them before any comes again, each expected as long as before."""
    expected = []
    run = EStep.run

    def watched(step, questions, *rest):
        expected.append((step.lengths, [question.id for question in questions]))
        return run(step, questions, *rest)

    monkeypatch.setattr(EStep, "run", watched)
    some = ["--set", "run.questions_per_iteration=3", "--iterations", 4, "--budget", 2]
    result = ok(train(tmp_path / "run", *some))
    assert f"3 of {QUESTIONS} training questions in each iteration" in result.stderr
    assert "E-step  3/3" in result.stderr
    assert result.stdout.count("/3") == 4  # the table
    journal = read_journal(tmp_path / "run")
    drawn: list[list[str]] = []
    seen: dict[str, float] = {}
    for iteration in (1, 2, 3, 4):
        rows = rows_of(tmp_path / "run", iteration)
        drawn.append(list(dict.fromkeys(row["id"] for row in rows)))
        assert len(drawn[-1]) == journal[f"iter-{iteration:02d}/estep"]["questions"] == 3
        lengths, questions = expected[iteration - 1]
        assert questions == drawn[-1]
        assert {q: lengths.get(q) for q in questions} == {q: seen.get(q) for q in questions}
        for id_ in drawn[-1]:
            tokens = [len(row["token_ids"]) for row in rows if row["id"] == id_]
            seen[id_] = sum(tokens) / len(tokens)
    everything = {question.id for question in load_task("toy", QUESTIONS).train}
    assert set(drawn[0]).isdisjoint(drawn[1])
    assert set(drawn[0]) | set(drawn[1]) | set(drawn[2]) == everything
    again = set(drawn[2]) & (set(drawn[0]) | set(drawn[1]))
    assert len(again) == 1
    assert again.isdisjoint(drawn[3])  # what the second pass has had already


class TwoPlainThenHinted(Budgeted):
    def propose(self, question, attempts):
        return "plain" if len(attempts) < 2 else "hinted"


def first_label(text, question):
    return question.labels[0] if text else None


def test_a_sampler_and_a_verdict_of_ones_own(tmp_path):
    own = ["--sampler", f"{__name__}:TwoPlainThenHinted", "--budget", 4, "--verdict", f"{__name__}:first_label"]
    ok(sample(tmp_path / "own", *own))
    rows = rows_of(tmp_path / "own")
    assert all((row["prompt"] == "hinted") == (row["attempt"] > 2) for row in rows)
    assert {row["prompt"] for row in rows} == {"plain", "hinted"}
    questions = {q.id: q for q in load_task("toy", QUESTIONS).train}
    assert all(row["answer"] == questions[row["id"]].labels[0] for row in rows)


class Failing(Budgeted):
    def propose(self, question, attempts):
        raise RuntimeError("of the user's own")


def failing(text, question):
    raise RuntimeError("of the user's own")


def returns_a_number(text, question):
    return 3


@pytest.mark.parametrize(
    ("flag", "name"), [("--sampler", "Failing"), ("--verdict", "failing"), ("--verdict", "returns_a_number")]
)
def test_the_failure_of_ones_own_code_is_one_sentence(flag, name, tmp_path):
    result = sample(tmp_path / "run", flag, f"{__name__}:{name}")
    assert result.exit_code == 2
    assert "toy-train" in result.stderr
    assert "of the user's own" in result.stderr or "must return a text or None, not 3" in result.stderr


def test_a_run_is_continued_with_the_same_code_and_model_only(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def check(text, question):\n    return question.gold\n")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(minem.model.weights.TOY, tmp_path / "model")
    limits = ["--set", "sampler.max_new_tokens=32", "--set", "eval.max_new_tokens=32", "--budget", 1]
    command = ["--model", "model", "--verdict", "mine:check", *limits]
    ok(sample(tmp_path / "run", *command))
    ok(sample(tmp_path / "run", *command))
    with open(tmp_path / "mine.py", "a") as file:
        file.write("# another\n")
    result = sample(tmp_path / "run", *command)
    assert result.exit_code == 2
    assert "verdict mine:check changed" in result.stderr
    model, tokenizer = minem.load("toy")
    minem.save(model.bfloat16(), tokenizer, tmp_path / "model")
    result = sample(tmp_path / "run", *command)
    assert "base model changed" in result.stderr


def never_right(text, question):
    return "no such label"


def test_nothing_accepted_stops_with_code_4_and_what_to_do(tmp_path):
    result = train(tmp_path / "none", "--verdict", f"{__name__}:never_right", "--budget", 1)
    assert result.exit_code == 4
    assert "nothing to train on" in result.stderr
    assert "raise sampler.budget, or let star or pps show the answer" in result.stderr
    assert len(rows_of(tmp_path / "none")) == QUESTIONS
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"id": "x", "status": "wrong", "token_ids": [1]}\n')
    result = train(tmp_path / "x", "--samples", empty)
    assert result.exit_code == 4
    assert "no row is accepted by its status" in result.stderr


def test_another_config_is_refused_with_the_difference(finished):
    out, _ = finished
    before = contents(out)
    result = train(out, "--budget", 4)
    assert result.exit_code == 2
    assert "sampler.budget: 8 -> 4" in result.stderr
    assert "--overwrite" in result.stderr
    assert contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--set", "eval.max_new_tokens=1024"], "lower eval.max_new_tokens"),
        (["train", "--model", ""], "model"),
        (["generate", "--prompt", "x", "--max-new-tokens", "100000"], "max_length"),
        pytest.param(
            ["train", "--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here"),
        ),
    ],
)
def test_wrong_command_lines_are_one_sentence(arguments, named, tmp_path, monkeypatch):
    """What tests/test_wrong_commands.py does not have."""
    monkeypatch.chdir(tmp_path)
    result = minem_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_eval_agrees_with_the_run(finished, tmp_path):
    out, result = finished
    small = ["--limit", QUESTIONS, "--max-new-tokens", 64, "--out", tmp_path / "evals", "--json"]
    evaluated = ok(minem_cli("eval", "--model", out / "iter-02" / "model", *small))
    summary = json.loads(evaluated.stdout.splitlines()[-1])
    for key in ("accuracy", "n", "low", "high", "unparsed", "truncated", "tokens"):
        assert summary[key] == result["test"]["last"][key]


def test_generate_prints_texts_or_json(tmp_path):
    text = load_prompts("toy").messages(load_task("toy", 1).test[0])[0]["content"]
    plain = ok(minem_cli("generate", "--prompt", text, "--chat", "--temperature", 0))
    assert "The best answer is" in plain.stdout
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in (text, "2 + 2")))
    result = ok(minem_cli("generate", "--prompts", prompts, "--chat", "--n", 2, "--max-new-tokens", 64, "--json"))
    found = json.loads(result.stdout)["results"]
    assert [r["prompt"] for r in found] == [text, "2 + 2"]
    for completion in (c for r in found for c in r["completions"]):
        assert len(completion["token_ids"]) == len(completion["logprobs"])
        assert completion["finish_reason"] in ("stop", "length")


def test_blocks_change_nothing_but_what_is_lost_when_a_run_is_killed(tmp_path, monkeypatch):
    nine = ["--limit", 9, "--budget", 2]
    ok(sample(tmp_path / "whole", *nine))
    monkeypatch.setattr(minem.em.estep, "BLOCK_ROUNDS", 1)
    flags = [*nine, "--set", "run.slots=3"]
    ok(sample(tmp_path / "blocks", *flags))
    journal = read_journal(tmp_path / "blocks")
    assert list(journal) == [f"iter-01/estep{s}" for s in (".1", ".2", ".3", "")]
    parts = rows_of(tmp_path / "blocks")
    for row, other in zip(rows_of(tmp_path / "whole"), parts, strict=True):
        for key in ("logprob_q", "logprob_plain"):
            assert row[key] == pytest.approx(other[key], abs=1e-4)
            row[key] = other[key]
        assert row == other
    counts = journal["iter-01/estep"]
    assert counts["attempts"] == len(parts)
    assert counts["solved"] == len({row["id"] for row in parts if row["status"] == "accepted"})
    assert counts["tokens"] - counts["cancelled_tokens"] == sum(len(row["token_ids"]) for row in parts)
    assert counts["prefill_tokens"] > 0
    assert not list((tmp_path / "blocks/iter-01").glob("samples.*.jsonl"))

    # Stopped in the second block. If memory gives another number of slots by then, the blocks are those begun with.
    run, drawn = EStep.run, []

    def stops_in_the_second(self, questions, *rest):
        drawn.append([question.id for question in questions])
        if len(drawn) == 2:
            raise Interrupted("stopped by the test")
        return run(self, questions, *rest)

    monkeypatch.setattr(EStep, "run", stops_in_the_second)
    assert sample(tmp_path / "again", *flags).exit_code == 3
    shutil.copytree(tmp_path / "again", tmp_path / "smaller")
    ok(sample(tmp_path / "again", *flags))
    assert [len(ids) for ids in drawn] == [3, 3, 3, 3]
    assert drawn[1] == drawn[2]
    assert contents(tmp_path / "again") == contents(tmp_path / "blocks")
    ok(sample(tmp_path / "smaller", *nine, "--set", "run.slots=2"))
    assert drawn[4:] == drawn[2:4]


def test_the_first_e_step_compares_generator_and_trainer(finished, tmp_path, monkeypatch):
    out, _ = finished
    result = read_journal(out)["iter-01/estep"]
    assert 0 < result["logprob_difference"] < 1e-4
    assert abs(result["policy_kl"]) < 1e-8
    metrics = list(read_rows(out / "metrics.jsonl"))
    assert [r["logprob_difference"] for r in metrics if "logprob_difference" in r] == [result["logprob_difference"]]
    # A trainer that sees another position than the generator does is another policy.
    forward = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, input_ids, **named: forward(self, input_ids.roll(1), **named))
    stopped = sample(tmp_path / "wrong")
    assert stopped.exit_code == 4
    assert "disagree on the log-probabilities" in stopped.stderr
    assert not (tmp_path / "wrong/iter-01/samples.jsonl").exists()


@pytest.mark.real_data
def test_real_rows_run_end_to_end(tmp_path):
    """Real ARC-Challenge rows, the real Qwen2.5 tokenizer and template, a small random Qwen2: nothing can be right."""
    import gzip

    from transformers import AutoConfig, AutoModelForCausalLM

    data = os.environ.get("MINEM_REAL_DATA")
    if not data:
        pytest.skip("MINEM_REAL_DATA is not set: it names the folder with real rows and a real tokenizer")
    folder = tmp_path / "qwen"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source = Path(data) / "qwen2.5-tokenizer"
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    rows = {
        split: list(read_rows(Path(data) / "arc-challenge" / f"{split}.jsonl"))
        for split in ("train", "validation", "test")
    }
    numeric = [r for r in rows["train"] if r["choices"]["label"][0] == "1"][:4]
    odd = [r for n in (3, 5) for r in [r for r in rows["train"] if len(r["choices"]["label"]) == n][:2]]
    assert len(numeric) == 4
    assert {len(r["choices"]["label"]) for r in odd} == {3, 5}
    chosen = {
        "train": [*numeric, *odd, *rows["train"][:4]],
        "validation": rows["validation"][:6],
        "test": rows["test"][:6],
    }
    task = tmp_path / "arc"
    task.mkdir()
    for split, members in chosen.items():
        unique = {row["id"]: row for row in members}
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
    result = minem_cli(
        "train", "--model", folder, "--task", task, "--sampler", "star", "--out", tmp_path / "run",
        "--set", "sampler.max_new_tokens=24", "--set", "eval.max_new_tokens=24",
    )  # fmt: skip
    assert result.exit_code == 4, result.output
    assert "no rationale was accepted" in result.stderr
    assert "nothing to train on" in result.stderr
    samples = list(read_rows(tmp_path / "run" / "iter-01" / "samples.jsonl"))
    assert {row["prompt"] for row in samples} == {"plain", "hinted"}
    assert {row["gold"] for row in samples} & set("1234")


@pytest.fixture
def as_before():
    """What `set_deterministic` changes is of the whole process."""
    algorithms, filling = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    fill = filling.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(algorithms)
    filling.fill_uninitialized_memory = fill


def test_deterministic_is_for_gpus_and_can_be_taken_back(as_before, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_deterministic(torch.device("cpu"), True)
    assert not torch.are_deterministic_algorithms_enabled()
    set_deterministic(torch.device("cuda"), True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_deterministic(torch.device("cuda"), False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_the_same_seed_gives_the_same_bytes(as_before, tmp_path, dtype):
    settings = ["--device", "cuda", "--set", f"model.dtype={dtype}", "--set", "run.deterministic=true"]
    for name in ("one", "two"):
        ok(train(tmp_path / name, *settings))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_right_answers_that_are_all_too_short_are_named_as_the_reason(tmp_path):
    short = [
        "--limit",
        "4",
        "--iterations",
        "1",
        "--set",
        "sampler.min_rationale_tokens=500",
        "--set",
        "eval.samples=0",
    ]
    result = CliRunner().invoke(main, ["train", *short, "--out", str(tmp_path / "run")])
    assert result.exit_code == 4
    assert "right answers were rejected by sampler.min_rationale_tokens" in result.stderr
    assert result.stderr.count("example ") == 3
    assert [path.name for path in (tmp_path / "run" / "log").iterdir()] == ["stopped.json"]
    samples = str(tmp_path / "run" / "iter-01" / "samples.jsonl")
    result = CliRunner().invoke(main, ["train", *short, "--samples", samples, "--out", str(tmp_path / "alone")])
    assert result.exit_code == 4
    assert "no row is accepted by its status and by [sampler]" in result.stderr
