"""The stages of a run: which are refused, and what the ranks that write nothing do."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from minem.config import load_config
from minem.console import Progress
from minem.errors import UserError
from minem.files import PARTIAL
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import Stop
from minem.runs.directory import Record, RunDirectory, read_facts
from minem.runs.stages import Run, Stage


def test_a_stage_is_not_done_with_the_weights_of_a_later_one(finished_run: Path, tmp_path: Path) -> None:
    """Draws of an iteration come from the weights before its M-step, which are gone after it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    config, inputs = load_config(run / "config.toml", flags={"run.out": str(run)}), read_facts(run)["inputs"]
    done: list[str] = []
    with Run.open(config, Progress(io.StringIO()), ALONE, Stop(), inputs=inputs) as opened:
        for iteration, name in ((2, "diagnostics"), (1, "eval.train"), (0, "eval.train")):
            with pytest.raises(UserError, match=f"iter-02/mstep is finished, but iter-0{iteration}/{name}, which"):
                opened.do(iteration, name, lambda stage: done.append(stage.name))
        opened.do(2, "eval.train", lambda stage: done.append(stage.name))
    assert done == ["iter-02/eval.train"]


def test_only_the_first_rank_touches_the_disk(tmp_path: Path) -> None:
    """All ranks save a model's state together; one that comes late must not clear what the first is writing."""
    config = load_config(flags={"run.out": str(tmp_path)})
    with RunDirectory.open(config) as directory, Progress(io.StringIO()).stage("M-step", None) as line:
        runs = [Run(d, tmp_path, config, Ranks(rank, 2)) for rank, d in enumerate((directory, None))]
        first, second = (Stage(run, "iter-01/mstep", Record(tmp_path), line) for run in runs)
        place = first.path("state")
        place.mkdir()
        assert second.path("state") != place
        second.write("samples.jsonl", [{"id": "q1"}])
        second.log(step=1)
        second.report(kept=1)
        runs[1].discard(1, "state", f"{PARTIAL}*")
        assert {path.name for path in tmp_path.rglob("*")} >= {"iter-01", f"{PARTIAL}state"}
        assert not (tmp_path / "metrics.jsonl").exists()
        assert list((tmp_path / "iter-01").iterdir()) == [place]
