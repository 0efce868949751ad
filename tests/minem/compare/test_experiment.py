"""`minem compare` on a few questions of the toy: its runs are those of `minem train`, whatever stops it on the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import xml.etree.ElementTree
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

import minem
import minem.em.evaluate
from minem.cli import main
from minem.compare.experiment import Plan
from minem.compare.results import Cell, matched
from minem.config import load_config
from minem.data.tasks import TOY, load_task
from minem.em.estep import encode_prompt
from minem.em.masters import Masters
from minem.em.mstep import MStep
from minem.em.packing import Example
from minem.em.samplers import Budgeted
from minem.errors import Interrupted, UserError
from minem.files import read_rows
from minem.runs.directory import RunDirectory, read_journal
from tests.minem.em.test_loop import contents

SMALL = ["--limit", "12", "--iterations", "2", "--set", "mstep.batch_size=4", "--set", "eval.max_new_tokens=48"]
SAMPLERS = "rsm:3,star,pps:1"
RUNS = [f"toy.{sampler}.toy-llama.s{seed}" for seed in (0, 1) for sampler in ("rsm3", "star2", "pps1")]


class Report(ModuleType):
    """Stands in for minem.report.page, which has tests of its own: keeps what it was given."""

    def __init__(self) -> None:
        super().__init__("minem.report.page")
        self.calls: list[tuple[list[Path], dict[str, Any]]] = []

    def write_report(self, runs: Any, out: Path, comparison: Any = None) -> None:
        self.calls.append((list(runs), comparison))
        out.write_text("a report")


@pytest.fixture(autouse=True, scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        made = Report()
        patch.setitem(sys.modules, "minem.report.page", made)
        yield made


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
        if "time" in table["columns"]:
            table["rows"] = [row[:-1] for row in table["rows"]]
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory, report) -> tuple[Path, dict[str, Any], Counter]:
    """A comparison that nothing disturbed, its result, and how often each (split, greedy) was asked for."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    asked: Counter[tuple[str, bool]] = Counter()
    submit = minem.em.evaluate._submit

    def counting(generator, question, draws, *rest):
        asked.update((question.id.split("-")[1], draw == 0) for draw in draws)
        submit(generator, question, draws, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minem.em.evaluate._submit", counting)
        result = ok(compare(out, "--json"))
    assert len(result.stdout.splitlines()) == 1
    return out, json.loads(result.stdout), asked


def test_its_runs_are_those_of_train(compared, tmp_path):
    """One whose base evaluation was copied whole, and one that took over the greedy half of another seed's."""
    out, _, _ = compared
    assert {path.parent.name for path in out.glob("*/run.json")} == set(RUNS)
    for sampler, budget, seed in (("star", 2, 0), ("pps", 1, 1)):
        alone = tmp_path / sampler
        arguments = ["train", *SMALL, "--sampler", sampler, "--budget", budget, "--seed", seed, "--out", alone]
        ok(CliRunner().invoke(main, [str(a) for a in arguments]))
        together = out / f"toy.{sampler}{budget}.toy-llama.s{seed}"
        assert contents(together) == contents(alone)
        assert read_journal(together)["iter-00/eval.test"] == read_journal(alone)["iter-00/eval.test"]
        stages = [[line["stage"] for line in read_rows(run / "metrics.jsonl")] for run in (together, alone)]
        assert stages[0] == stages[1]


def test_the_base_model_is_evaluated_once(compared):
    """Greedily once for all six runs, at temperature 1 once for each seed; trained models always."""
    _, _, asked = compared
    assert asked == {
        ("validation", True): 12 * (1 + 6 * 2),
        ("validation", False): 12 * (2 + 6 * 2),
        ("test", True): 12 * (1 + 6),
        ("test", False): 12 * (2 + 6),
    }


def test_it_ends_with_tables_a_picture_and_a_report(compared, report):
    out, result, _ = compared
    written = {"plan.json", "comparison.json", "comparison.md", "comparison.png", "report.html"}
    assert written <= {path.name for path in out.iterdir()}
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "comparison.json").read_text())
    assert {"out": str(out), **saved} == result
    runs, given = next(call for call in report.calls if call[1] is not None)
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
    with pytest.raises(UserError, match="is no seed; give whole numbers"):
        Plan.parse("toy", "rsm:8", "9" * 5000)
    with pytest.raises(UserError, match="the budget of rsm must be a whole number"):
        Plan.parse("toy", f"rsm:{'9' * 5000}", "0")


def test_files_of_finished_runs_that_changed_are_made_again(tmp_path):
    """Not counted as they are, nor handed on to other runs."""
    more = ["--iterations", "1", "--limit", "6", "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
    ok(compare(tmp_path, *more, samplers="rsm:1,rsm:2"))
    before = numbers(tmp_path)
    runs = [tmp_path / f"toy.rsm{budget}.toy-llama.s{seed}" for seed in (0, 1) for budget in (1, 2)]
    whole = [contents(run) for run in runs]
    base, last = (runs[i] / f"iter-0{i}/eval.test.jsonl" for i in (0, 1))
    base.write_bytes(base.read_bytes().replace(b'"accepted"', b'"wrong"', 1))
    last.unlink()
    shutil.rmtree(runs[2] / "iter-01" / "model")
    (runs[3] / "journal.jsonl").write_bytes(b"")  # and it has lost all, so that it asks the others for the base
    again = ok(compare(tmp_path, *more, samplers="rsm:1,rsm:2"))
    assert "done before, not repeated" not in re.sub(r"iter-\S+ +done before, not repeated", "", again.stderr)
    assert again.stderr.count("is missing or not what was written") == 3
    assert [contents(run) for run in runs] == whole
    assert numbers(tmp_path) == before


def test_asked_to_stop_in_an_m_step_it_writes_a_checkpoint(tmp_path, monkeypatch):
    more = ["--iterations", "1", "--limit", "12", "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
    more += ["--set", "mstep.epochs=3"]
    update, made = Masters.step, [0]

    def counted(*arguments: Any) -> None:
        update(*arguments)
        made[0] += 1
        if made[0] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Masters, "step", counted)
    stopped = compare(tmp_path / "cut", *more, samplers="rsm:2", seeds="0")
    assert stopped.exit_code == 3, stopped.output
    assert "stopped by SIGTERM after step 2 of " in " ".join(stopped.stderr.split())
    assert (tmp_path / "cut/toy.rsm2.toy-llama.s0/iter-01/checkpoint.2").is_dir()
    ok(compare(tmp_path / "cut", *more, samplers="rsm:2", seeds="0"))
    updates = made[0]
    ok(compare(tmp_path / "whole", *more, samplers="rsm:2", seeds="0"))
    assert made[0] == 2 * updates > 4
    assert contents(tmp_path / "cut/toy.rsm2.toy-llama.s0") == contents(tmp_path / "whole/toy.rsm2.toy-llama.s0")


def test_the_same_command_repeats_nothing_and_ends_the_same(compared):
    out, _, _ = compared
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out and p.name != ".lock"}
    saved = (out / "comparison.json").read_bytes()
    result = ok(compare(out))
    assert result.stderr.count("done before, not repeated") == 6
    assert "toy: accuracy on the test split" in result.stdout
    assert "DESCRIPTIVE ONLY" in result.stdout
    assert (out / "comparison.json").read_bytes() == saved
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(("match", "seeds", "iterations"), [("none", "0,1", 1), ("kept", "0", 2)])
def test_stopped_anywhere_it_ends_the_same(match, seeds, iterations, tmp_path, monkeypatch):
    more = ["--match", match, "--iterations", iterations, "--set", "eval.samples=0", "--limit", "6"]
    two = {"samplers": "rsm:3,pps:1", "seeds": seeds}
    ok(compare(tmp_path / "whole", *more, **two))
    enter, left = RunDirectory._enter, [0]

    def enter_and_stop(self, *arguments):
        enter(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted("stopped by the test")

    monkeypatch.setattr(RunDirectory, "_enter", enter_and_stop)
    stops = 0
    while True:
        left[0] = 5
        result = compare(tmp_path / "pieces", *more, **two)
        if result.exit_code == 0:
            break
        assert result.exit_code == 3, result.output
        stops += 1
    assert stops >= 4
    pieces, whole = (contents(tmp_path / name) for name in ("pieces", "whole"))
    del pieces["comparison.json"], whole["comparison.json"]  # which has times
    assert pieces == whole
    assert numbers(tmp_path / "pieces") == numbers(tmp_path / "whole")


def cells(out: Path, seed: int) -> list[Cell]:
    labels = {"rsm3": "rsm:3", "star2": "star:2", "pps1": "pps:1"}
    return [Cell("toy", label, seed, out / f"toy.{name}.toy-llama.s{seed}") for name, label in labels.items()]


def rows(cell: Cell, name: str, iteration: int = 1) -> list[dict[str, Any]]:
    return list(read_rows(cell.folder / f"iter-{iteration:02d}" / f"{name}.jsonl"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory, report) -> Path:
    out = tmp_path_factory.mktemp("compare") / "kept"
    ok(compare(out, "--match", "kept", "--set", "eval.samples=0", "--set", "run.keep=all", seeds="0"))
    return out


def test_match_kept_trains_all_on_equally_many_examples(kept):
    group = cells(kept, 0)
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
    group = cells(kept, 0)
    questions = {q.id: q for q in load_task("toy", 12).train}
    fewest = min(group, key=lambda cell: len(rows(cell, "accepted")))
    most = max(group, key=lambda cell: len(rows(cell, "accepted")))
    share = matched(group, 1, "kept")[group.index(most)]
    assert len(share.rows) == len(rows(fewest, "accepted")) < len(rows(most, "accepted"))
    model, tokenizer = minem.load("toy")
    examples = [
        Example(row["id"], encode_prompt(tokenizer, questions[row["id"]]), row["token_ids"])
        for row in rows(most, "accepted")
        if (row["id"], row["attempt"]) in share.rows
    ]
    MStep(model, load_config(most.folder / "config.toml").mstep).run(examples, 0, 1)
    trained = minem.load(most.folder / "iter-01" / "model")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(trained[name]), name


@pytest.mark.parametrize("match", ["kept", "cost"])
def test_matched_runs_draw_on_the_same_questions_of_an_iteration(match, tmp_path):
    some = ["--set", "run.questions_per_iteration=5", "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
    ok(compare(tmp_path / "out", "--match", match, *some, samplers="rsm:3,pps:1", seeds="0"))
    group = [cell for cell in cells(tmp_path / "out", 0) if cell.folder.exists()]
    assert [cell.sampler for cell in group] == ["rsm:3", "pps:1"]
    ids = [{row["id"] for row in rows(cell, "samples", i)} for cell in group for i in (1, 2)]
    assert ids[0] == ids[2]
    assert ids[1] == ids[3]
    assert all(len(one) == 5 for one in ids)
    assert ids[0].isdisjoint(ids[1])
    trained = [read_journal(cell.folder)["iter-01/mstep"]["examples"] for cell in group]
    assert trained == [len(share.rows) for share in matched(group, 1, match)]


def test_a_matched_run_is_not_continued_by_train(kept):
    cell = cells(kept, 0)[0]
    keys = ["--set", "eval.samples=0", "--set", "run.keep=all", "--sampler", "rsm", "--budget", "3"]
    arguments = ["train", *SMALL, *keys, "--out", cell.folder]
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
    assert len(nested[0]) < len(nested[-1]) == 12
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
        flags = {"--model": "toy", "--task": folder, "--sampler": name, "--budget": budget, "--seed": 1}
        again = tmp_path / name
        arguments = ["sample", *(x for flag in flags.items() for x in flag), "--out", again]
        ok(CliRunner().invoke(main, [str(a) for a in arguments]))
        drawn = list(read_rows(again / "iter-01" / "samples.jsonl"))
        assert sum(len(row["token_ids"]) for row in drawn) == share.tokens
        assert {(r["id"], r["attempt"]) for r in read_rows(again / "iter-01" / "accepted.jsonl")} == share.rows
        key = ("id", "attempt", "prompt", "token_ids", "status")
        expected = [[r[k] for k in key] for r in rows(cell, "samples") if r["id"] in share.questions]
        assert sorted([r[k] for k in key] for r in drawn) == sorted(expected)


def test_several_tasks_are_corrected_together(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("model", "*.py"))
    out = tmp_path / "tasks"
    limits = ["--limit", "6", "--iterations", "1", "--set", "eval.samples=0"]
    ok(compare(out, "--task", f"toy,{folder}", *limits, samplers="rsm:2,pps:1", seeds="0"))
    found = numbers(out)
    assert {run["run"] for run in found["runs"]} == {
        f"{task}.{sampler}.toy-llama.s0" for task in ("toy", "mine") for sampler in ("rsm2", "pps1")
    }
    assert [(pair["task"], pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("toy", "rsm:2", "pps:1"),
        (str(folder), "rsm:2", "pps:1"),
    ]
    assert "over the 2 comparisons" in found["tables"][2]["note"]


def test_another_comparison_in_the_same_folder_is_refused_with_the_difference(compared, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(compared[0], out)
    for more, named in (
        ({"seeds": "0,1,2"}, 'compare.seeds: "0,1" -> "0,1,2"'),
        ({"samplers": "rsm:3,star"}, 'compare.samplers: "rsm:3,star:2,pps:1" -> "rsm:3,star:2"'),
    ):
        refused = compare(out, **more)
        assert refused.exit_code == 2
        assert named in refused.stderr
    refused = compare(out, "--match", "cost", "--set", "mstep.lr=2e-3")
    assert 'compare.match: "none" -> "cost"' in refused.stderr
    assert "mstep.lr: 0.001 -> 0.002" in refused.stderr
    assert contents(out) == contents(compared[0])
    (out / RUNS[0] / "notes.txt").write_text("of the user's own")
    ok(compare(out, "--overwrite", "--limit", "6", samplers="pps:1", seeds="0"))
    assert [run["run"] for run in numbers(out)["runs"]] == ["toy.pps1.toy-llama.s0"]
    assert (out / RUNS[0] / "notes.txt").exists()
    assert not (out / RUNS[0] / "run.json").exists()


class Silent(Budgeted):
    """Asks for nothing, so that nothing is ever accepted."""

    def propose(self, question, attempts):
        return None


@pytest.mark.parametrize(("match", "left"), [("none", ["toy.pps1.toy-llama.s0"]), ("kept", [])])
def test_a_run_that_a_guard_stops_does_not_stop_the_others(match, left, tmp_path):
    out = tmp_path / "guarded"
    more = ["--limit", "6", "--iterations", "1", "--match", match]
    result = compare(out, *more, samplers=f"{__name__}:Silent:2,pps:1", seeds="0")
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
    plan = Plan.parse("arc-easy, mmlu", f"rsm:4,star, pps:1,{__name__}:Silent:3", "3,0")
    assert plan.tasks == ("arc-easy", "mmlu")
    assert plan.samplers == (("rsm", 4), ("star", 2), ("pps", 1), (f"{__name__}:Silent", 3))
    assert plan.seeds == (3, 0)
    with pytest.raises(UserError, match=r"--samplers .*cannot be imported"):
        Plan.parse("toy", "no.such:Thing:3", "0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--samplers", "rms:8"], "--samplers rms:8: sampler.name"),
        (["--samplers", "rms:8"], "did you mean rsm?"),
        (["--samplers", "rsm:eight"], "--samplers rsm:eight: the budget"),
        (["--samplers", "rsm:"], "--samplers rsm:: the budget"),
        (["--samplers", "rsm:0"], "sampler.budget is 0"),
        (["--samplers", "rsm:8,,star"], "--samplers"),
        (["--samplers", ""], "--samplers"),
        (["--samplers", "rsm,rsm:8"], "each sampler and budget once"),
        (["--samplers", "json:Nothing:3"], "Nothing"),
        (["--seeds", "0,x"], "--seeds 0,x: 'x' is no seed"),
        (["--seeds", "0,-1"], "'-1' is no seed"),
        (["--seeds", "1,1"], "--seeds"),
        (["--seeds", "1,01"], "each seed once"),
        (["--seeds", "99999999999999999999"], "run.seed"),
        (["--match", "keep"], "kept"),
        (["--sampler", "rsm"], "--samplers"),
        (["--seed", "3"], "--seeds"),
        (["--set", "run.seed=3"], "--seeds"),
        (["--set", "sampler.budget=3"], "--samplers"),
        (["--set", "sampler.bugdet=3"], "sampler.budget"),
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
