"""What a run may delete, what it notices, and how it goes on; test_users_files.py has what all commands must spare.

python -m pytest tests/minem/runs/test_ours_alone.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from minem.errors import Interrupted
from minem.files import read_rows, write_rows
from minem.runs.directory import RunDirectory
from minem.runs.folder import LOCK
from tests.minem.runs.test_directory import config, small_run
from tests.minem.tiny_runs import command, finished, flags, outcome, train

TINY = ["--limit", "4", "--iterations", "1", "--device", "cpu", "--samplers", "rsm:1", "--seeds", "0"]
TINY += ["--set", "sampler.max_new_tokens=32", "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
EVAL = ["eval", "--limit", "4", "--max-new-tokens", "8", "--device", "cpu"]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file's bytes and every link's target, without locks, which tell the owner."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK and (path.is_symlink() or path.is_file())]
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


def test_a_run_leaves_files_beside_its_own_alone(run: Path, finished_run: Path) -> None:
    """Unfinished ones of the user's, and those in a model folder that the run deletes."""
    train(run, "run.iterations=1", code=2)
    mine = [run / ".partial.notes", run / "iter-02/.partial.notes", run / "iter-02/model/quantised.gguf"]
    for path in mine:
        path.write_text("of mine")
    train(run, "run.iterations=3")
    assert not (run / "iter-02/model/model.safetensors").exists()
    assert command("train", *flags("run.iterations=3"), "--out", run, "--overwrite").exit_code == 0
    assert [path.read_text() for path in mine] == ["of mine"] * 3


def test_a_comparison_overwrites_only_runs_of_its_plan(tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ["compare", *TINY, "--out", tmp_path / "out"]
    assert command(*arguments).exit_code == 0
    small_run(out / "other.run")
    small_run(tmp_path / "elsewhere")
    (out / "linked").symlink_to(tmp_path / "elsewhere")
    others = [snapshot(path) for path in (out / "other.run", tmp_path / "elsewhere")]
    assert command(*arguments, "--overwrite").exit_code == 0
    (cell,) = out.glob("toy.rsm1.*")
    shutil.move(cell, tmp_path / "cell")
    cell.symlink_to(tmp_path / "cell")
    before = snapshot(tmp_path / "cell")
    assert command(*arguments, "--overwrite").exit_code == 2
    assert snapshot(tmp_path / "cell") == before
    assert [snapshot(path) for path in (out / "other.run", tmp_path / "elsewhere")] == others


@pytest.mark.parametrize("accident", ["moved", "removed"])
def test_a_run_whose_folder_is_gone_stops_before_it_commits(tmp_path: Path, accident: str) -> None:
    """Another process has begun at the same path by then: its files are not touched."""
    path = tmp_path / "run"
    with RunDirectory.open(config(path)) as first:
        with pytest.raises(Interrupted, match="moved, removed"), first.stage("iter-00/eval") as record:  # noqa: PT012
            write_rows(record.path("iter-00/a.jsonl"), [{"a": 1}])
            path.rename(tmp_path / "old") if accident == "moved" else shutil.rmtree(path)
            second = RunDirectory.open(config(path))
            with second.stage("iter-00/eval") as other:
                write_rows(other.path("iter-00/a.jsonl"), [{"b": 2}])
                with pytest.raises(Interrupted, match="moved, removed or replaced"):
                    record.path("iter-00/b.jsonl")
                with pytest.raises(Interrupted, match="moved, removed or replaced"):
                    first.log_metrics("iter-00/eval", {"a": 1})
        second.close()
    assert list(read_rows(path / "iter-00" / "a.jsonl")) == [{"b": 2}]
    assert "iter-00/eval" not in first.results


# --------------------------------------------------------------------------------------- nothing wrong is silent


def test_a_changed_digit_of_the_metrics_is_noticed(run: Path) -> None:
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(metrics) if "iter-02/mstep" in line)
    loss = json.loads(metrics[at])["loss"]
    metrics[at] = metrics[at].replace(f'"loss": {loss!r}', f'"loss": {loss + 0.5!r}')
    for lines in (metrics, metrics[:at], []):
        (run / "metrics.jsonl").write_text("".join(lines))
        before = snapshot(run)
        for arguments in (["train", *flags(), "--out", run], ["show", run], ["report", run, "-o", run.parent / "page"]):
            result = command(*arguments)
            assert result.exit_code == 2
            assert "are missing or not what the run wrote; put the file back" in result.stderr
        assert snapshot(run) == before


def test_an_older_model_that_was_to_be_kept_is_looked_at(tmp_path: Path) -> None:
    for name in ("run", "right"):
        train(tmp_path / name, "run.keep=all")
    (tmp_path / "run/iter-01/model/config.json").write_text("{}")
    printed = train(tmp_path / "run", "run.keep=all")
    assert (
        "warning iter-01/model/config.json is missing or damaged: the run goes back to before iter-01/mstep" in printed
    )
    assert outcome(tmp_path / "run") == outcome(tmp_path / "right")


# ------------------------------------------------------------------------------------------------- easier to live with


@pytest.mark.parametrize("more", [[], ["mstep.lora_rank=2"], ["model.dtype=bfloat16", "mstep.optimizer_state=keep"]])
def test_a_finished_run_goes_on_with_more_iterations(tmp_path: Path, more: list[str]) -> None:
    """As if it had been asked for them from the start."""
    train(tmp_path / "longer", *more, "run.iterations=2")
    train(tmp_path / "run", *more, "run.iterations=1")
    train(tmp_path / "run", *more, "run.iterations=2")
    one, other = outcome(tmp_path / "run"), outcome(tmp_path / "longer")
    extra = {"iter-01/eval.test.jsonl"}  # of what was the last model
    assert one.keys() - other.keys() <= extra
    assert all(one[name] == other[name] for name in other if name not in ("journal", "metrics"))
    assert finished(tmp_path / "run")[-2:] == ["plot", "report"]
    assert "run.iterations: 2 -> 1" in train(tmp_path / "run", *more, "run.iterations=1", code=2)


def test_another_spelling_of_a_path_is_the_same_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from minem import load, save

    save(*load("toy"), "model")
    train(Path("run"), "model.id=model", "run.iterations=1")
    for name in ("./model", str(tmp_path / "model"), "../" + tmp_path.name + "/model"):
        assert "finished earlier" in train(Path("run"), f"model.id={name}", "run.iterations=1")
    shutil.copytree("model", "other")
    (tmp_path / "other/config.json").write_text((tmp_path / "other/config.json").read_text() + " ")
    assert "base model changed" in train(Path("run"), "model.id=other", "run.iterations=1", code=2)


def test_an_evaluation_takes_the_newest_model_of_a_run(run: Path, tmp_path: Path) -> None:
    assert command(*EVAL, run, "--out", tmp_path / "a", "--json").exit_code == 0
    assert command(*EVAL, "--model", run / "iter-02/model", "--out", tmp_path / "b", "--json").exit_code == 0
    assert (tmp_path / "a/answers.jsonl").read_bytes() == (tmp_path / "b/answers.jsonl").read_bytes()


def test_a_report_is_about_the_runs_of_a_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/one")
    shutil.copytree(run, tmp_path / "runs/two")
    assert command("report", tmp_path / "runs", "-o", tmp_path / "all.html").exit_code == 0
    page = (tmp_path / "all.html").read_text()
    assert "<title>2 runs" in page


def test_a_report_says_that_a_guard_ended_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = train(out, "sampler.max_new_tokens=1", code=4)
    reason = printed.rpartition("minem: ")[2]
    assert command("report", out, "-o", tmp_path / "page.html").exit_code == 0
    assert f"a guard ended the run in iter-01/mstep: {reason[:40]}" in (tmp_path / "page.html").read_text()


# ------------------------------------------------------------------------------------- what is in the way, or changed


@pytest.mark.parametrize(
    ("name", "folder"),
    [("metrics.jsonl", True), ("log/stopped.json", True), ("iter-01", False), ("iter-02/model", False)],
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_something_of_the_users_in_the_way_is_named_and_stays(
    run: Path, name: str, folder: bool, overwrite: list[str]
) -> None:
    """A folder where minem has a file, or a file where it has a folder."""
    place = run / name
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    mine = place / "thesis" if folder else place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("of mine")
    result = command("train", *flags(), "--out", run, *overwrite)
    assert (result.exit_code, mine.read_text()) == (2, "of mine")
    assert str(place) in result.stderr.splitlines()[-1]


def test_changed_answers_and_models_are_not_believed(run: Path, tmp_path: Path) -> None:
    answers, weights = run / "iter-02/eval.test.jsonl", run / "iter-02/model/model.safetensors"
    right = answers.read_bytes()
    answers.write_bytes(right.replace(b'"wrong"', b'"accepted"'))
    for arguments in (["show", run], ["report", run, "-o", tmp_path / "page"], ["compare", tmp_path]):
        result = command(*arguments)
        assert result.exit_code == 2
        assert "iter-02/eval.test.jsonl is missing or changed" in result.stderr
    answers.write_bytes(right)
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    result = command(*EVAL, run, "--out", tmp_path / "e")
    assert result.exit_code == 2
    assert "iter-02/model/model.safetensors is missing or not what the run wrote" in result.stderr


def test_more_iterations_keep_an_e_step_that_is_there(run: Path) -> None:
    assert command("sample", *flags(), "--iteration", "3", "--out", run).exit_code == 0
    drawn = (run / "iter-03/samples.jsonl").read_bytes()
    assert "iter-03/estep finished earlier, skipped" in train(run, "run.iterations=3")
    assert (run / "iter-03/samples.jsonl").read_bytes() == drawn


@pytest.mark.parametrize(
    ("right", "odd"), [('"accuracy": [0-9.]+', '"accuracy": "x"'), ('"loss": [0-9.]+', '"lost": 1')]
)
def test_odd_results_in_a_strangers_journal_are_one_sentence(run: Path, right: str, odd: str) -> None:
    text = (run / "journal.jsonl").read_text()
    (run / "journal.jsonl").write_text(re.sub(right, odd, text))
    result = command("train", *flags(), "--out", run)
    assert result.exit_code == 2
    assert "a value that minem does not write there" in result.stderr.splitlines()[-1]
