"""The stages of a run: which are refused, and what the ranks that write nothing do."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minem.config import load_config
from minem.console import Progress
from minem.errors import Interrupted, UserError
from minem.files import PARTIAL
from minem.parallel.ranks import Ranks
from minem.runs.directory import Record, RunDirectory, read_facts
from minem.runs.folder import LOCK
from minem.runs.stages import Run, Session, Stage


def test_a_stage_is_not_done_with_the_weights_of_a_later_one(finished_run: Path, tmp_path: Path) -> None:
    """Draws of an iteration come from the weights before its M-step, which are gone after it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    config, inputs = load_config(run / "config.toml", flags={"run.out": str(run)}), read_facts(run)["inputs"]
    done: list[str] = []
    with Run.open(config, Session(Progress(io.StringIO())), inputs) as opened:
        for iteration, name in ((2, "diagnostics"), (1, "eval.train"), (0, "eval.train")):
            with pytest.raises(UserError, match=f"iter-02/mstep is finished, but iter-0{iteration}/{name}, which"):
                opened.do(iteration, name, lambda stage: done.append(stage.name))
        opened.do(2, "eval.train", lambda stage: done.append(stage.name))
    assert done == ["iter-02/eval.train"]


def test_out_of_memory_stops_and_names_the_keys_to_lower(tmp_path: Path) -> None:
    def fails(stage: Stage) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Run.open(load_config(flags={"run.out": str(tmp_path)}), Session(Progress(io.StringIO())), {}) as run:
        for stage, keys in (("estep", "run.slots or mstep.pack_tokens"), ("mstep", "mstep.pack_tokens, or set mstep")):
            with pytest.raises(Interrupted, match=f"out of memory in iter-01/{stage}; lower {keys}"):
                run.do(1, stage, fails)
        assert run.results == {}


def test_only_the_first_rank_touches_the_disk(tmp_path: Path) -> None:
    """All ranks save a model's state together; one that comes late must not clear what the first is writing."""
    config = load_config(flags={"run.out": str(tmp_path)})
    with RunDirectory.open(config) as directory, Progress(io.StringIO()).stage("M-step", None) as line:
        runs = [Run(d, tmp_path, config, Session(ranks=Ranks(rank, 2))) for rank, d in enumerate((directory, None))]
        first, second = (Stage(run, "iter-01/mstep", Record(tmp_path), line) for run in runs)
        place = first.path("state")
        place.mkdir()
        assert second.path("state") != place
        second.write("samples.jsonl", [{"id": "q1"}])
        second.log(step=1)
        second.report(kept=1)
        runs[1].discard(1, "state", f"{PARTIAL}*")
        own = {LOCK, "config.toml", "run.json", "journal.jsonl", PARTIAL, "iter-01", "state"}
        assert {path.name for path in tmp_path.rglob("*")} == own
        assert not (tmp_path / "metrics.jsonl").exists()


class Disagreeing(Ranks):
    """Rank 1 of two, which hears that rank 0 plans two blocks."""

    def broadcast(self, value: Any) -> Any:
        return 2 if isinstance(value, int) else {"blocks": 2, "counts": {"tokens": 1}}

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag


def test_ranks_draw_in_the_blocks_of_the_first(tmp_path: Path) -> None:
    """Their slots may differ, and with them the blocks that each would plan: questions would be lost."""
    drawn: list[list[str]] = []
    step = SimpleNamespace(blocks=lambda count: 5, expected=lambda item: 1.0)
    step.run = lambda own, show: (drawn.append([item.id for item in own]) or [], {})
    for number in (1, 2):
        (tmp_path / "iter-01").mkdir(exist_ok=True)
        (tmp_path / "iter-01" / f"samples.{number}.jsonl").write_text("")
    run = Run(None, tmp_path, load_config(), Session(ranks=Disagreeing(1, 2)))
    with Progress(io.StringIO()).stage("E-step", None) as line:
        stage = Stage(run, "iter-01/estep", Record(tmp_path), line)
        stage.in_blocks([SimpleNamespace(id=f"q{i}") for i in range(8)], step, SimpleNamespace)
    assert drawn == [["q1", "q3"], ["q5", "q7"]]


def test_only_files_of_finished_parts_are_discarded(finished_run: Path, tmp_path: Path) -> None:
    """A user's file beside them stays, whatever its name looks like."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    mine = run / "iter-01" / "samples.mine.jsonl"
    mine.write_text("mine")
    config, inputs = load_config(run / "config.toml", flags={"run.out": str(run)}), read_facts(run)["inputs"]
    with Run.open(config, Session(Progress(io.StringIO())), inputs) as opened:
        assert opened.parts(1, "estep") == [1]
        opened.discard(1, *(f"samples.{n}.jsonl" for n in opened.parts(1, "estep")))
    assert mine.read_text() == "mine"
