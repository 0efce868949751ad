"""`minem compare` on a few questions of the toy: its runs are those of `minem train`, whatever stops it on the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import xml.etree.ElementTree
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import minem
from minem.cli import main
from minem.compare.experiment import Plan
from minem.compare.results import Cell, matched
from minem.config import load_config
from minem.data.tasks import EMBEDDED, TOY, Question, load_task
from minem.em.checkpoints import Checkpoints
from minem.em.evaluate import Evaluation
from minem.em.mstep import MStep
from minem.em.packing import Example
from minem.em.samplers import Budgeted
from minem.errors import UserError
from minem.files import read_rows
from minem.generation.generator import Generator
from minem.report.charts import plot_spent, svg_spent
from minem.runs.directory import read_journal
from tests.minem.em.test_loop import contents
from tests.minem.folders import toy_prompts
from tests.minem.tiny_runs import stopped_every

SMALL = ["--limit", "8", "--iterations", "1"]
for setting in ("mstep.batch_size=4", "mstep.epochs=2", "eval.max_new_tokens=24", "eval.diagnostics=0"):
    SMALL += ["--set", setting]
SAMPLERS = "rsm:2,pps"
RUNS = [f"toy.{sampler}.toy-llama.s{seed}" for seed in (0, 1) for sampler in ("rsm2", "pps1")]


@pytest.fixture(autouse=True, scope="module")
def reports():
    """Pages and plots have tests of their own and take most of the time of small runs: only what they get is kept."""
    calls: list[tuple[list[Path], dict[str, Any] | None]] = []

    def write_report(runs: Any, out: Path, comparison: Any = None) -> None:
        calls.append((list(runs), comparison))
        out.write_text("a report")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minem.report.page.write_report", write_report)
        patch.setattr("minem.report.charts.plot_accuracy", lambda run, path: path.write_bytes(b"a plot"))
        patch.setattr("minem.report.charts.plot_spent", lambda runs: b"a plot")
        patch.setattr("minem.report.charts.svg_spent", lambda runs: [])
        patch.setattr("minem.compare.experiment.gc.collect", lambda: 0)
        yield calls


def compare(out: Path, *more: object, samplers: str = SAMPLERS, seeds: str = "0,1") -> Result:
    arguments = ["compare", *SMALL, "--samplers", samplers, "--seeds", seeds, "--out", out, *more]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def numbers(out: Path) -> dict[str, Any]:
    """comparison.json without what the clock decides."""
    found = json.loads((out / "comparison.json").read_text())
    for one in (*found["samplers"], *found["runs"]):
        one.pop("seconds")
    for table in found["tables"]:
        if "seconds" in table["columns"]:
            table["rows"] = [row[:-1] for row in table["rows"]]
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory, reports) -> tuple[Path, dict[str, Any], Counter]:
    """A comparison that nothing disturbed, its result, and how often each (split, greedy) was asked for."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    asked: Counter[tuple[str, bool]] = Counter()
    submit = Generator.submit

    def counting(self, request, *rest, **more):
        if isinstance(request.tag, tuple) and isinstance(request.tag[0], Question):  # of an evaluation
            asked[request.tag[0].id.split("-")[1], request.params.temperature == 0] += 1
        return submit(self, request, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "submit", counting)
        patch.setattr("minem.report.charts.plot_spent", plot_spent)
        patch.setattr("minem.report.charts.svg_spent", svg_spent)
        result = ok(compare(out, "--json"))
    assert len(result.stdout.splitlines()) == 1
    return out, json.loads(result.stdout), asked


def test_its_runs_are_those_of_train(compared, tmp_path):
    """One whose base evaluation was taken over, and one that took over the greedy half of another seed's."""
    out, _, _ = compared
    for sampler, budget, seed in (("pps", 1, 0), ("rsm", 2, 1)):
        alone = tmp_path / sampler
        arguments = ["train", *SMALL, "--sampler", sampler, "--budget", budget, "--seed", seed, "--out", alone]
        ok(CliRunner().invoke(main, [str(a) for a in arguments]))
        together = out / f"toy.{sampler}{budget}.toy-llama.s{seed}"
        assert contents(together) == contents(alone)
        assert read_journal(together)["iter-00/eval.test"] == read_journal(alone)["iter-00/eval.test"]
        stages = [[line["stage"] for line in read_rows(run / "metrics.jsonl")] for run in (together, alone)]
        assert stages[0] == stages[1]


def test_the_base_model_is_evaluated_once(compared):
    """Greedily once for all four runs, at temperature 1 once for each seed; trained models always."""
    _, _, asked = compared
    assert asked == {
        ("validation", True): 8 * (1 + 4),
        ("validation", False): 8 * (2 + 4),
        ("test", True): 8 * (1 + 4),
        ("test", False): 8 * (2 + 4),
    }


def test_it_ends_with_tables_a_picture_and_a_report(compared, reports):
    out, result, _ = compared
    written = {"plan.json", "comparison.json", "comparison.md", "comparison.png", "report.html", *RUNS}
    assert written <= {path.name for path in out.iterdir()}
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "comparison.json").read_text())
    assert {"out": str(out), **saved} == result
    runs, given = next(call for call in reports if call[1] is not None)
    assert [run.name for run in runs] == RUNS
    assert given["tables"] == result["tables"]
    for plot in given["plots"]:
        assert xml.etree.ElementTree.fromstring(plot["svg"]).tag.endswith("svg")
    markdown = (out / "comparison.md").read_text()
    for table in result["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert table["title"] in markdown
        assert "| " + " | ".join(table["rows"][0]) + " |" in markdown
    assert result["unfinished"] == []
    shown = CliRunner().invoke(main, ["show", str(out)])
    assert shown.exit_code == 2
    assert f"{out} is a comparison and no run" in shown.stderr


def test_numbers_of_thousands_of_digits_are_refused():
    with pytest.raises(UserError, match=r"--seeds '999.*give one or more different values .* like 0,1,2"):
        Plan.parse(load_config(), "rsm:8", "9" * 5000)
    with pytest.raises(UserError, match=r"--samplers 'rsm:999.*give one or more different values"):
        Plan.parse(load_config(), f"rsm:{'9' * 5000}", "0")


def test_files_of_finished_runs_that_changed_are_made_again(compared, tmp_path):
    """Not counted as they are, nor shared with other runs."""
    out = tmp_path / "damaged"
    shutil.copytree(compared[0], out)
    before, complete = numbers(out), contents(out)
    base, last = (out / RUNS[i] / f"iter-0{i}/eval.test.jsonl" for i in (0, 1))
    base.write_bytes(base.read_bytes().replace(b'"accepted"', b'"wrong"', 1))
    last.unlink()
    (out / RUNS[2] / "journal.jsonl").write_bytes(b"")  # it has lost all, so it asks the others for the base
    again = ok(compare(out))
    assert [name for name in RUNS if f"{name}  " in again.stderr] == [RUNS[3]]  # finished earlier
    assert again.stderr.count("the run goes back to before") == 2
    after = contents(out)
    assert {name: after[name] for name in complete if name != "comparison.json"} == {
        name: content for name, content in complete.items() if name != "comparison.json"
    }
    assert numbers(out) == before


def test_asked_to_stop_in_an_m_step_it_writes_a_checkpoint(compared, tmp_path, monkeypatch):
    after_step, steps = Checkpoints.after_step, [0]

    def counted(self, *arguments: Any) -> None:
        steps[0] += 1
        if steps[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        after_step(self, *arguments)

    monkeypatch.setattr(Checkpoints, "after_step", counted)
    stopped = compare(tmp_path, samplers="rsm:2", seeds="0")
    assert stopped.exit_code == 3, stopped.output
    assert "stopped by SIGTERM after step 2 of " in " ".join(stopped.stderr.split())
    assert (tmp_path / RUNS[0] / "iter-01" / "checkpoint.2").is_dir()
    ok(compare(tmp_path, samplers="rsm:2", seeds="0"))
    assert steps[0] == 4  # none twice
    assert contents(tmp_path / RUNS[0]) == contents(compared[0] / RUNS[0])


def test_the_same_command_repeats_nothing_and_ends_the_same(compared):
    out, _, _ = compared
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out and p.name != ".lock"}
    saved = (out / "comparison.json").read_bytes()
    result = ok(compare(out))
    assert sum(f"{name}  " in result.stderr for name in RUNS) == 4  # finished earlier
    assert "toy: accuracy on the test split" in result.stdout
    assert "DESCRIPTIVE ONLY" in result.stdout
    assert (out / "comparison.json").read_bytes() == saved
    assert {p: p.stat().st_mtime_ns for p in before} == before


def same(one: Path, other: Path) -> bool:
    """Whether two comparisons have the same files and numbers, except for times."""
    files = [contents(out) for out in (one, other)]
    return all(file.pop("comparison.json") for file in files) and (files[0], numbers(one)) == (files[1], numbers(other))


@pytest.mark.slow
def test_stopped_after_every_second_stage_it_ends_the_same(compared, tmp_path, monkeypatch):
    """Slow, since a stop after every second stage of four runs builds the experiments again 16 times.

    No quick test stops an unmatched comparison at every place: while a run shares what another has measured, while it
    is concluded, and between runs.
    """
    assert stopped_every(2, lambda: compare(tmp_path / "pieces"), monkeypatch) >= 10
    assert same(tmp_path / "pieces", compared[0])


def cells(out: Path, seed: int, iterations: int = 1) -> list[Cell]:
    labels = {"rsm2": "rsm:2", "pps1": "pps:1"}
    folders = {label: out / f"toy.{name}.toy-llama.s{seed}" for name, label in labels.items()}
    return [Cell("toy", "toy-llama", label, seed, folder, iterations) for label, folder in folders.items()]


def rows(cell: Cell, name: str, iteration: int = 1) -> list[dict[str, Any]]:
    return cell.rows(iteration, name)


MATCHED = ["--limit", "8", "--iterations", "2", "--set", "run.questions_per_iteration=4", "--set", "eval.samples=0"]
MATCHED += ["--match", "kept", "--set", "run.keep=all"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, reports) -> Path:
    out = tmp_path_factory.mktemp("compare") / "kept"
    ok(compare(out, *MATCHED, seeds="0"))
    return out


def test_a_matched_comparison_that_was_stopped_ends_the_same(kept, tmp_path, monkeypatch):
    assert stopped_every(8, lambda: compare(tmp_path / "pieces", *MATCHED, seeds="0"), monkeypatch) >= 3
    assert same(tmp_path / "pieces", kept)


def test_match_kept_trains_all_on_equally_many_examples(kept):
    group = cells(kept, 0, 2)
    for iteration in (1, 2):
        results = [read_journal(cell.folder)[f"iter-{iteration:02d}/mstep"] for cell in group]
        fewest = min(len(rows(cell, "accepted", iteration)) for cell in group)
        assert {result["examples"] for result in results} == {fewest}
        assert len({result["steps"] for result in results}) == 1
    assert len({len(rows(cell, "accepted")) for cell in group}) > 1  # else it proves nothing
    for cell, share in zip(group, matched(group, 1, "kept"), strict=True):
        assert share.rows <= {(row["id"], row["attempt"]) for row in rows(cell, "accepted")}


def test_match_kept_trains_exactly_its_share(kept):
    """The M-step of iteration 1 by hand, on the share alone, gives the weights of the run."""
    group = cells(kept, 0, 2)
    questions = {q.id: q for q in load_task("toy", 8).train}
    fewest = min(group, key=lambda cell: len(rows(cell, "accepted")))
    most = max(group, key=lambda cell: len(rows(cell, "accepted")))
    share = matched(group, 1, "kept")[group.index(most)]
    assert len(share.rows) == len(rows(fewest, "accepted")) < len(rows(most, "accepted"))
    model, tokenizer = minem.load("toy")
    examples = [
        Example(row["id"], toy_prompts(tokenizer).trained(questions[row["id"]]), row["token_ids"])
        for row in rows(most, "accepted")
        if (row["id"], row["attempt"]) in share.rows
    ]
    MStep(model, load_config(most.folder / "config.toml").mstep).run(examples, 0, 1)
    trained = minem.load(most.folder / "iter-01" / "model")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(trained[name]), name


def test_matched_runs_draw_on_the_same_questions_of_an_iteration(kept):
    ids = [{row["id"] for row in rows(cell, "samples", i)} for cell in cells(kept, 0, 2) for i in (1, 2)]
    assert ids[0] == ids[2]
    assert ids[1] == ids[3]
    assert all(len(one) == 4 for one in ids)
    assert ids[0].isdisjoint(ids[1])


def test_match_cost_trains_exactly_its_share(tmp_path):
    ok(compare(tmp_path, "--match", "cost", "--set", "eval.samples=0", seeds="0"))
    group = cells(tmp_path, 0)
    trained = [read_journal(cell.folder)["iter-01/mstep"]["examples"] for cell in group]
    shares = matched(group, 1, "cost")
    assert trained == [len(share.rows) for share in shares]
    assert trained != [len(rows(cell, "accepted")) for cell in group]  # else it proves nothing
    found = numbers(tmp_path)
    assert [run["counted_tokens"] for run in found["runs"]] == [share.tokens for share in shares]
    (costs,) = [table for table in found["tables"] if "what it cost" in table["title"]]
    assert "counted tokens" in costs["columns"]


def test_a_matched_run_is_not_continued_by_train(kept):
    cell = cells(kept, 0, 2)[0]
    keys = [word for word in MATCHED if word not in ("--match", "kept")]
    arguments = ["train", *SMALL, *keys, "--sampler", "rsm", "--budget", "2", "--out", cell.folder]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2
    assert "match changed" in result.stderr


def test_match_cost_counts_what_an_estep_over_those_questions_alone_draws(compared, tmp_path):
    """Shares of equal cost, and E-steps again over nothing but the questions that count: they find the share."""
    out, _, _ = compared
    group = cells(out, 1)
    tokens = [sum(len(row["token_ids"]) for row in rows(cell, "samples")) for cell in group]
    shares = matched(group, 1, "cost")
    nested = sorted((share.questions for share in shares), key=len)
    assert all(fewer <= more for fewer, more in pairwise(nested))  # one order for the whole group
    assert len(nested[0]) < len(nested[-1]) == 8
    toy = {json.loads(line)["id"]: line for line in (TOY / "train.jsonl").read_text().splitlines()}
    for cell, share, spent in zip(group, shares, tokens, strict=True):
        assert share.tokens <= min(tokens)
        left_out = Counter()
        for row in rows(cell, "samples"):
            left_out[row["id"]] += len(row["token_ids"]) if row["id"] not in share.questions else 0
        assert share.tokens == spent or share.tokens + max(left_out.values()) > min(tokens)

        name, _, budget = cell.sampler.partition(":")
        folder = tmp_path / f"{name}-questions"
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(toy[i] + "\n" for i in sorted(share.questions)))
        for split in ("validation", "test"):
            shutil.copy(TOY / f"{split}.jsonl", folder)
        flags = {
            "--model": "toy",
            "--task": folder,
            "--prompt": "toy",
            "--sampler": name,
            "--budget": budget,
            "--seed": 1,
        }
        again = tmp_path / name
        arguments = ["sample", "--seed", 1, *(x for flag in flags.items() for x in flag), "--out", again]
        ok(CliRunner().invoke(main, [str(a) for a in arguments]))
        drawn = list(read_rows(again / "iter-01" / "samples.jsonl"))
        assert sum(len(row["token_ids"]) for row in drawn) == share.tokens
        assert {(r["id"], r["attempt"]) for r in read_rows(again / "iter-01" / "accepted.jsonl")} == share.rows
        key = ("id", "attempt", "prompt", "token_ids", "status")
        expected = [[r[k] for k in key] for r in rows(cell, "samples") if r["id"] in share.questions]
        assert sorted([r[k] for k in key] for r in drawn) == sorted(expected)


def test_several_tasks_are_compared_together(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("model", "*.py"))
    out = tmp_path / "tasks"
    ok(
        compare(
            out,
            "--task",
            f"toy,{folder}",
            "--prompt",
            "toy",
            "--limit",
            "4",
            "--set",
            "eval.samples=0",
            samplers="pps:1",
            seeds="0",
        )
    )
    found = numbers(out)
    assert [run["run"] for run in found["runs"]] == [f"{task}.pps1.toy-llama.s0" for task in ("toy", "mine")]
    assert [row[:2] for row in found["tables"][0]["rows"]] == [["toy", "pps:1"], [str(folder), "pps:1"]]


def test_another_comparison_in_the_same_folder_is_refused_with_the_difference(compared, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(compared[0], out)
    for more, named in (
        ({"seeds": "0,1,2"}, 'compare.seeds: "0,1" -> "0,1,2"'),
        ({"samplers": "rsm:2,star"}, 'compare.samplers: "rsm:2,pps:1" -> "rsm:2,star:2"'),
    ):
        refused = compare(out, **more)
        assert refused.exit_code == 2
        assert named in refused.stderr
    refused = compare(out, "--match", "cost", "--set", "mstep.lr=2e-3")
    assert 'compare.match: "none" -> "cost"' in refused.stderr
    assert "mstep.lr: 0.001 -> 0.002" in refused.stderr
    assert contents(out) == contents(compared[0])
    (out / RUNS[0] / "notes.txt").write_text("of the user's own")
    ok(compare(out, "--overwrite", "--limit", "4", samplers="pps:1", seeds="0"))
    assert [run["run"] for run in numbers(out)["runs"]] == ["toy.pps1.toy-llama.s0"]
    assert (out / RUNS[0] / "notes.txt").exists()
    assert not list((out / RUNS[0]).glob("iter-*"))


class Silent(Budgeted):
    """Asks for nothing, so that nothing is ever accepted."""

    def propose(self, question, attempts):
        return None


@pytest.mark.parametrize(("match", "left"), [("none", ["toy.pps1.toy-llama.s0"]), ("kept", [])])
def test_a_run_that_a_guard_stops_does_not_stop_the_others(match, left, tmp_path):
    out = tmp_path / "guarded"
    result = compare(out, "--limit", "4", "--match", match, samplers=f"{__name__}:Silent:2,pps:1", seeds="0")
    assert result.exit_code == 4, result.output
    assert "toy.Silent2.toy-llama.s0" in result.stderr
    assert "nothing to train on" in result.stderr or "no accepted rationale" in result.stderr
    assert ("report.html" in result.stdout) == bool(left)  # the results of the others are printed
    found = json.loads((out / "comparison.json").read_text())
    assert [run["run"] for run in found["runs"]] == left
    assert "toy.Silent2.toy-llama.s0" in found["unfinished"]
    assert len(found["stopped"]) == 1
    for title in ("accuracy", "paired", "McNemar"):
        assert any(title in table["title"] for table in found["tables"]) == (bool(left) or title != "accuracy")
    assert not left or "toy.Silent2.toy-llama.s0" in found["tables"][0]["note"]


def test_plans_are_read_as_they_are_written():
    config = load_config(flags={"task.name": "arc-easy, mmlu", "model.id": "one/small, other/large"})
    arms = ["control:sampler.filter=none", "wide:sampler.name=star, mstep.lora_targets=q_proj,v_proj,mstep.lr=1e-4"]
    plan = Plan.parse(config, f"rsm:4,star, pps:1,{__name__}:Silent:3", "3,0", "none", arms)
    assert plan.tasks == ("arc-easy", "mmlu")
    assert plan.models == ("one/small", "other/large")
    samplers = (("rsm", 4), ("star", 2), ("pps", 1), (f"{__name__}:Silent", 3))
    assert plan.arms == (
        *((f"{name}:{budget}", {"sampler.name": name, "sampler.budget": budget}) for name, budget in samplers),
        ("control", {"sampler.name": "rsm", "sampler.budget": 8, "sampler.filter": "none"}),
        (
            "wide",
            {
                "sampler.name": "star",
                "sampler.budget": 2,
                "mstep.lora_targets": "q_proj,v_proj",
                "mstep.lr": 1e-4,
            },
        ),
    )
    assert plan.seeds == (3, 0)
    with pytest.raises(UserError, match=r"--samplers .*cannot be imported"):
        Plan.parse(load_config(), "no.such:Thing:3", "0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--samplers", "rms:8"], "--samplers rms:8: --sampler: sampler.name"),
        (["--samplers", "rms:8"], "did you mean rsm?"),
        (["--samplers", "rsm:eight"], "--samplers rsm:eight: the budget"),
        (["--samplers", "rsm:"], "--samplers rsm:: the budget"),
        (["--samplers", "rsm:0"], "sampler.budget is 0"),
        (["--samplers", "rsm:8,,star"], "--samplers"),
        (["--samplers", ""], "--samplers"),
        (["--samplers", "rsm,rsm:8"], "'rsm,rsm:8': give one or more different values"),
        (["--samplers", "json:Nothing:3"], "Nothing"),
        (["--seeds", "0,x"], "--seeds '0,x': give one or more different values"),
        (["--seeds", "0,-1"], "run.seed is -1"),
        (["--seeds", "1,1"], "--seeds"),
        (["--seeds", "1,01"], "'1,01': give one or more different values"),
        (["--seeds", "99999999999999999999"], "run.seed"),
        (["--match", "keep"], "kept"),
        (["--sampler", "rsm"], "--samplers"),
        (["--seed", "3"], "--seeds"),
        (["--set", "run.seed=3"], "--seeds"),
        (["--set", "sampler.budget=3"], "--samplers"),
        (["--set", "sampler.bugdet=3"], "sampler.budget"),
        (["--arm", "sampler.filter=none"], "write it as NAME:section.key=value, like control:sampler.filter=none"),
        (["--arm", "control:"], "--arm control:: write it as NAME:section.key=value"),
        (["--arm", "control:sampler.filter"], "--arm control: sampler.filter: write it as section.key=value"),
        (["--arm", "control:sampler.fliter=none"], "there is no key sampler.fliter; did you mean sampler.filter?"),
        (["--arm", "control:sampler.filter=non"], '--arm control:sampler.filter=non: sampler.filter is "non"; it must'),
        (["--arm", "control:run.seed=3"], "all rows share run.seed, so an arm cannot set it"),
        (["--arm", "control:task.name=toy"], "all rows share task.name"),
        (["--arm", "a:mstep.lr=1", "--arm", "a:mstep.lr=2"], "two of the runs would be called toy.a.toy-llama.s0"),
        (["--models", "toy,toy"], "--models 'toy,toy': give one or more different values"),
        (["--models", "no/such/model,toy"], "no/such/model"),
        (["--models", "toy", "--model", "toy"], "give either --model or --models"),
        (["--task", "toy,arc-esay"], "arc-easy"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--set", "sampler.max_new_tokens=1024"], "sampler.max_new_tokens"),
        (["--limit", "0"], "task.limit"),
        (["--track", "wanbd"], "wandb"),
        (["no-such.toml"], "no-such.toml"),
    ],
)
def test_wrong_command_lines_are_one_sentence(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    result = compare(tmp_path)
    assert result.exit_code == 2
    assert "thesis.tex" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    """The toy with noise on its weights, which still answers some questions."""
    folder = tmp_path_factory.mktemp("models") / "noisy"
    model, tokenizer = minem.load("toy")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.6 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    minem.save(model, tokenizer, folder)
    return folder


def test_models_and_arms_are_compared_together(compared, other_model, tmp_path):
    """The rows of the toy are those of a comparison of its own; an arm has its keys, another model its weights."""
    arm = "control:sampler.name=pps,sampler.filter=none,sampler.max_new_tokens=24"
    more = ["--models", f"toy,{other_model}", "--arm", arm, "--set", "eval.samples=2"]
    more += ["--set", "sampler.max_new_tokens=64"]  # as in the config of the toy alone
    ok(compare(tmp_path, *more, samplers="rsm:2", seeds="0"))
    found = numbers(tmp_path)
    names = [f"toy.{arm}.{model}.s0" for model in ("toy-llama", "noisy") for arm in ("rsm2", "control")]
    assert [run["run"] for run in found["runs"]] == names
    assert [(run["model"], run["sampler"]) for run in found["runs"]] == [
        ("toy-llama", "rsm:2"),
        ("toy-llama", "control"),
        ("noisy", "rsm:2"),
        ("noisy", "control"),
    ]
    for name in ("samples", "accepted"):
        toy, alone = (out / names[0] / "iter-01" / f"{name}.jsonl" for out in (tmp_path, compared[0]))
        assert toy.read_bytes() == alone.read_bytes()
    for first, second, equal in ((0, 1, True), (2, 3, True), (0, 2, False)):  # what a base model answers is its own
        bases = [(tmp_path / names[i] / "iter-00" / "eval.test.jsonl").read_bytes() for i in (first, second)]
        assert (bases[0] == bases[1]) == equal
    for run in (names[1], names[3]):
        config = load_config(tmp_path / run / "config.toml")
        sampler = config.sampler
        assert (sampler.name, sampler.budget, sampler.filter, sampler.max_new_tokens) == ("pps", 1, "none", 24)
        assert 'filter = "none"  # by "--arm"' in (tmp_path / run / "config.toml").read_text()
        assert {row["status"] for row in read_rows(tmp_path / run / "iter-01" / "accepted.jsonl")} != {"accepted"}
    assert {(pair["model"], pair["first"], pair["second"]) for pair in found["pairs"]} == {
        (model, "rsm:2", "control") for model in ("toy-llama", "noisy")
    }
    answers = next(table for table in found["tables"] if "answers" in table["title"])
    assert answers["columns"][-1] == "pass@2"
    again = compare(tmp_path, *more, samplers="rsm:2", seeds="0")
    assert sum(f"{name}  " in again.stderr for name in names) == 4  # finished earlier
    refused = compare(tmp_path, *more[:2], "--arm", f"{arm},mstep.lr=1e-2", *more[4:], samplers="rsm:2", seeds="0")
    assert refused.exit_code == 2
    assert "compare.arm control: " in refused.stderr


def test_arms_with_other_evaluations_share_no_base(tmp_path, monkeypatch):
    asked: Counter[str] = Counter()
    answers = Evaluation.answers

    def counting(self, questions, *rest, **more):
        asked[f"{self.section.max_new_tokens} {len(list(more.get('known', ())))}"] += 1
        return answers(self, questions, *rest, **more)

    monkeypatch.setattr(Evaluation, "answers", counting)
    arm = ["--arm", "short:eval.max_new_tokens=20", "--set", "eval.samples=0"]
    ok(compare(tmp_path, *arm, samplers="rsm:2,pps", seeds="0"))
    assert asked == {"24 0": 2 + 2 * 2, "20 0": 2 + 2}  # of the base once, of each last model; two splits
    arms = ("rsm2", "short")
    first, short = (list(read_rows(tmp_path / f"toy.{arm}.toy-llama.s0/iter-00/eval.test.jsonl")) for arm in arms)
    assert max(row["tokens"] for row in first) == 24
    assert max(row["tokens"] for row in short) == 20


OLD_PLAN = {"tasks": "toy", "samplers": "rsm:2,pps:1", "seeds": "0,1", "match": "none"}


def test_a_folder_of_an_earlier_version_is_resumed(compared, tmp_path):
    """What plan.json declared before there were arms and several models is declared the same, under the same names."""
    out = tmp_path / "old"
    shutil.copytree(compared[0], out)
    plan = json.loads((out / "plan.json").read_text())
    hashes = {"base model", "rows and prompts"}
    assert {key: value for key, value in plan["compare"].items() if key not in hashes} == OLD_PLAN
    assert plan["model"]["id"] == "toy"
    journal = out / RUNS[3] / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]))  # in the middle of its iteration
    (out / "comparison.json").write_text('{"samplers": [{"lost": 0.1}], "tables": []}')  # as it was
    resumed = ok(compare(out))
    assert sum(f"{name}  " in resumed.stderr for name in RUNS) == 3
    assert same(out, compared[0])


def test_an_arm_without_iterations_is_the_base_model_evaluated_its_own_way(tmp_path):
    """Few-shot, say: its row has no training, and the pairs compare the trained runs with it."""
    out = tmp_path / "out"
    few = ["--limit", "6", "--iterations", "1", "--set", "eval.samples=0", "--set", "sampler.max_new_tokens=64"]
    arm = ["--arm", "base:run.iterations=0,eval.max_new_tokens=64"]
    ok(compare(out, *few, *arm, samplers="rsm:2", seeds="0"))
    trained, base = numbers(out)["runs"]
    assert (base["sampler"], base["attempts"], base["trained"], base["gain"]) == ("base", 0, 0, 0)
    assert base["accuracy"] == base["base_accuracy"]
    assert [row["iteration"] for row in base["iterations"]] == [0]
    assert [row["iteration"] for row in trained["iterations"]] == [0, 1]
    folder = out / base["run"]
    assert not (folder / "iter-01").exists()
    assert numbers(out)["pairs"][0]["differences"]["0"] == pytest.approx(trained["accuracy"] - base["accuracy"])


def test_matched_rows_need_equally_many_iterations(tmp_path):
    result = compare(tmp_path / "out", "--match", "kept", "--arm", "base:run.iterations=0", samplers="rsm:2", seeds="0")
    assert result.exit_code == 2
    assert "--match kept: all rows must have as many iterations" in result.stderr
    assert not (tmp_path / "out").exists()


def test_runs_of_a_folder_are_compared_as_they_are(compared, tmp_path):
    """Wherever they were made: the numbers are those of the comparison that made them."""
    for name in RUNS:
        shutil.copytree(compared[0] / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(main, ["compare", str(tmp_path), "--json"])
    found, expected = json.loads(result.stdout), json.loads((compared[0] / "comparison.json").read_text())
    order = {run["run"]: run for run in expected["runs"]}
    assert {run["run"]: run for run in found["runs"]} == order
    assert {pair["first"] + pair["second"] for pair in found["pairs"]} == {"pps:1rsm:2"}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    shutil.copytree(tmp_path / RUNS[0], tmp_path / "again")
    for more, sentence in (
        ((), "are no runs to compare: they have one seed"),
        (("--seeds", "0"), "--seeds says how to run"),
    ):
        refused = CliRunner().invoke(main, ["compare", str(tmp_path), *more])
        assert refused.exit_code == 2
        assert sentence in refused.stderr
    empty = CliRunner().invoke(main, ["compare", str(tmp_path / "again" / "iter-00")])
    assert "holds no run directories" in empty.stderr


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(compared, tmp_path):
    """In a folder of runs, and in a comparison whose rows or runs were changed since it began."""
    for name in RUNS:
        shutil.copytree(compared[0] / name, tmp_path / name)
    facts = json.loads((tmp_path / RUNS[2] / "run.json").read_text())
    for key, value, sentence in (("mstep", "lr", "mstep.lr"), ("inputs", "task rows", "task rows differ")):
        changed = json.loads(json.dumps(facts))
        section = changed["config"][key] if key == "mstep" else changed[key]
        section[value] = 0.5 if key == "mstep" else "0"
        (tmp_path / RUNS[2] / "run.json").write_text(json.dumps(changed))
        refused = CliRunner().invoke(main, ["compare", str(tmp_path)])
        assert refused.exit_code == 2
        assert sentence in refused.stderr


def test_a_comparison_notices_other_rows_and_runs_of_others(tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(EMBEDDED["toy"], rows, ignore=shutil.ignore_patterns("model", "*.py", "__pycache__"))
    out, wanted = tmp_path / "out", ["--task", str(rows), "--prompt", "toy", "--limit", "4", "--iterations", "1"]
    ok(compare(out, *wanted, samplers="rsm:1", seeds="0"))
    plan = json.loads((out / "plan.json").read_text())
    for odd in (3, ["/etc"], [".."], {"a": 1}):
        (out / "plan.json").write_text(json.dumps(plan | {"runs": odd}))
        refused = compare(out, *wanted, "--overwrite", samplers="rsm:1", seeds="0")
        assert refused.exit_code == 2
        assert "runs is no list of names of folders" in refused.stderr
        assert (out / "comparison.json").exists()
    (out / "plan.json").write_text(json.dumps(plan))
    (cell,) = out.glob("rows.rsm1.*")
    facts = json.loads((cell / "run.json").read_text())
    facts["config"]["mstep"]["lr"] = 7e-5
    (cell / "run.json").write_text(json.dumps(facts))
    text = (cell / "config.toml").read_text()
    (cell / "config.toml").write_text(re.sub("(?m)^lr = .*", "lr = 7e-05", text))
    refused = compare(out, *wanted, samplers="rsm:1", seeds="0")
    assert refused.exit_code == 2
    assert "was started differently (mstep.lr" in refused.stderr
    test = rows / "test.jsonl"
    test.write_text(test.read_text().replace("start with", "begin with"))
    refused = compare(out, *wanted, samplers="rsm:1", seeds="0")
    assert refused.exit_code == 2
    assert "compare.rows and prompts" in refused.stderr
