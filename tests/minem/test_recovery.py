"""Runs whose files were damaged, cut short, deleted or moved, and disks that fill up: each ends with the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minem.cli import main
from minem.run import RunDirectory, read_rows

SMALL = [
    "--limit",
    "10",
    "--budget",
    "2",
    "--iterations",
    "3",
    "--set",
    "eval.samples=0",
    "--set",
    "eval.diagnostics=2",
]
SMALL += ["--set", "mstep.batch_size=4", "--set", "sampler.max_new_tokens=48", "--set", "eval.max_new_tokens=48"]
KINDS = {
    "last": [],  # run.keep, the default
    "all": ["--set", "run.keep=all"],
    "bfloat16": ["--set", "model.dtype=bfloat16"],  # float32 masters beside the model
    "base": ["--set", "run.init=base"],
}


def minem_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(out: Path, kind: str = "last") -> Result:
    return minem_cli("train", *SMALL, *KINDS[kind], "--out", out)


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on accidents: samples, evaluations and weights as bytes, metrics but for times."""
    files = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".safetensors", ".json")]
    timed = {"journal.jsonl", "metrics.jsonl", "run.json"}
    found: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in files if p.name not in timed}
    rows = read_rows(run / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in row.items() if not re.search("second|mfu|memory", k)} for row in rows]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs that nothing disturbed, one of each kind, made when first asked for; they are not to be changed."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("finished") / kind
            result = train(made[kind], kind)
            assert result.exit_code == 0, result.output
        return made[kind]

    return run


def cut_journal(run: Path, last: str) -> None:
    """As if the run had been killed right after this stage; what later stages deleted is gone all the same."""
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    stages = [json.loads(line)["stage"] for line in lines]
    (run / "journal.jsonl").write_bytes(b"".join(lines[: stages.index(last) + 1]))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


MODEL = "model/model.safetensors"


@pytest.mark.parametrize(
    ("kind", "last", "harm", "file", "back", "again"),
    [
        # What is a result of the run is done again from the stage on that wrote it; where an E-step goes, the blocks of
        # it that were deleted go with it, and the model before it, of which no draws are left then, is written anew.
        ("last", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", [1, 2]),
        ("last", "report", truncate, f"iter-03/{MODEL}", "iter-03/mstep", [1, 2]),
        ("last", "report", Path.unlink, "iter-03/model/config.json", "iter-03/mstep", [1, 2]),
        ("last", "iter-03/diagnostics", flip, "iter-02/accepted.jsonl", "iter-01/mstep", []),
        ("last", "report", Path.unlink, "iter-03/samples.jsonl", "iter-02/mstep", [1]),
        ("last", "report", truncate, "iter-03/eval.test.jsonl", "iter-03/eval.test", []),
        ("last", "report", flip, "iter-00/eval.test.jsonl", "iter-00/eval.test", []),
        # The previous checkpoint is used where it is there ...
        ("all", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", []),
        ("all", "iter-03/estep", truncate, f"iter-02/{MODEL}", "iter-02/mstep", []),
        # ... and later draws are kept where a model that would be deleted anyway is trained once more.
        ("last", "iter-03/estep", None, "iter-02/model", None, [1, 2]),
        ("bfloat16", "iter-03/estep", None, "iter-02/model", None, [1, 2]),
        ("base", "iter-03/estep", None, "iter-02/model", None, [2]),
        ("base", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", [2]),
    ],
)
def test_damaged_files_are_noticed_and_made_again(
    finished: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    last: str,
    harm: Callable[[Path], None] | None,
    file: str,
    back: str | None,
    again: list[int],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(kind), run)
    cut_journal(run, last)
    if harm is not None:
        harm(run / file)
    else:  # deleted by the run itself, which is then killed and loses its newer one
        assert not (run / file).exists()
    result = train(run, kind)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 0, said
    assert said.count("is missing or not what was written") == (back is not None)
    assert back is None or f"{file} " in said.replace(" and 1 more is", " is")
    assert back is None or f"goes back to before {back} " in said
    assert [int(i) for i in re.findall(r"iter-(\d+)/model is missing or damaged: trained again", said)] == again
    assert outcome(run) == outcome(finished(kind))
    assert "not what was written" not in train(run, kind).stderr  # and all is well now


@pytest.mark.parametrize("harmed", [MODEL, "state/state-00000.safetensors"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_checkpoint_that_draws_were_made_from(
    tmp_path: Path, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, harm: Any, harmed: str
) -> None:
    """Killed in the M-step of iteration 2: its draws are kept, whatever happened to the model they are of."""
    run = tmp_path / "run"
    stop_before(monkeypatch, "iter-02/mstep")
    assert train(run, "bfloat16").exit_code == 3
    monkeypatch.undo()
    harm(run / "iter-01" / harmed)
    drawn = (run / "iter-02/samples.jsonl").stat().st_mtime_ns
    result = train(run, "bfloat16")
    assert result.exit_code == 0, result.output
    assert "iter-01/model is missing or damaged: trained again" in " ".join(result.stderr.split())
    assert (run / "iter-02/samples.jsonl").stat().st_mtime_ns == drawn
    assert outcome(run) == outcome(finished("bfloat16"))


def stop_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage = RunDirectory.stage

    def stops(self: RunDirectory, which: str, writes: int = 0) -> Any:
        if which == name:
            raise KeyboardInterrupt
        return stage(self, which, writes)

    monkeypatch.setattr(RunDirectory, "stage", stops)
