"""Whole runs of the toy that take a second, what they must end with, and the accidents that happen to them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minem.cli import main
from minem.errors import Interrupted
from minem.files import read_rows
from minem.runs.directory import RunDirectory, read_journal

SETTINGS = {
    "task.limit": 8,
    "run.iterations": 2,
    "run.device": "cpu",
    "sampler.budget": 2,
    "sampler.max_new_tokens": 32,
    "mstep.batch_size": 4,
    "eval.max_new_tokens": 32,
    "eval.samples": 0,
    "eval.diagnostics": 0,
}


def settings(*more: str) -> list[str]:
    """SETTINGS as "key=value", with others in their place or beside them."""
    found = {**SETTINGS, **dict(setting.split("=", 1) for setting in more)}
    return [f"{key}={value}" for key, value in found.items()]


def flags(*more: str) -> list[str]:
    """`settings` for the command line."""
    return [word for setting in settings(*more) for word in ("--set", setting)]


def command(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(out: Path, *more: str, code: int = 0) -> str:
    """`minem train` in this process; what it prints on stderr, on one line."""
    result = command("train", *flags(*more), "--out", out)
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.stderr.split())


def stopped_every(stages: int, start: Callable[[], Result], monkeypatch: pytest.MonkeyPatch) -> int:
    """Start a command again after every N stages, at which it is interrupted, until it ends. Returns the stops."""
    enter, left, stops = RunDirectory._enter, stages, 0

    def enter_and_stop(self: RunDirectory, *arguments: Any) -> None:
        nonlocal left
        enter(self, *arguments)
        left -= 1
        if left == 0:
            raise Interrupted("stopped by the test")

    monkeypatch.setattr(RunDirectory, "_enter", enter_and_stop)
    while (result := start()).exit_code != 0:
        assert result.exit_code == 3, result.output
        left, stops = stages, stops + 1
    return stops


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on accidents: files as bytes, journal and metrics without what a process measures.

    That is times, rates, memory, and the agreement of the generator with the model in its own first draws.
    """
    measured = re.compile("second|memory|logprob_difference|policy_kl")

    def steady(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if not measured.search(key)}
        return kept | {"counts": steady(kept["counts"])} if "counts" in kept else kept

    files = [p for p in run.glob("iter-*/**/*") if p.is_file()]
    # The model card has the name of the run. Of checkpoints, those that the clock and signals asked for are left out.
    found: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in files if p.name != "README.md"}
    stages = {stage: steady(result) for stage, result in read_journal(run).items() if "/mstep." not in stage}
    return found | {"metrics": [steady(row) for row in read_rows(run / "metrics.jsonl")], "journal": stages}


def finished(run: Path) -> list[str]:
    """The stages of a run that may be at work."""
    return list(read_journal(run)) if (run / "journal.jsonl").exists() else []


def cut_journal(run: Path, last: str) -> None:
    """As if the run had been killed right after this stage; what later stages deleted is gone all the same."""
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    keep_lines(run, range(1 + [json.loads(line)["stage"] for line in lines].index(last)))


def keep_lines(run: Path, numbers: Sequence[int]) -> None:
    """Of the journal, these lines alone, counted from 0."""
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[number] for number in numbers))


def flip(path: Path) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
