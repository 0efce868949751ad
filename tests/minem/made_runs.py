"""Run directories made by hand, as small as a test needs them and with any texts in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from minem.config import load_config, to_toml
from minem.data.prompts import load_prompts
from minem.data.tasks import load_task
from minem.files import write_rows
from minem.runs.folder import about
from minem.statistics import wilson


def sample(id_: str, iteration: int = 1, attempt: int = 1, status: str = "accepted", **more: Any) -> dict[str, Any]:
    """A row of samples.jsonl."""
    row = {"id": id_, "iteration": iteration, "attempt": attempt, "prompt": "plain", "token_ids": [5, 6, 2]}
    row |= {"logprob_q": -1.5, "logprob_plain": -1.5, "text": "so\nThe best answer is 1", "answer": "1", "gold": "1"}
    return {**row, "status": status, "leak": False, **more}


def answer(id_: str, status: str, text: str = "The best answer is 1") -> dict[str, Any]:
    """A row of eval.test.jsonl."""
    return {"id": id_, "answer": "1", "gold": "1", "status": status, "text": text, "tokens": 4}


def make_run(
    path: Path,
    *,
    validation: Sequence[int] = (10, 15, 18),
    samples: Sequence[Mapping[str, Any]] = (),
    base: Sequence[Mapping[str, Any]] = (),
    last: Sequence[Mapping[str, Any]] = (),
    tokens: int = 1000,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    **flags: Any,
) -> Path:
    """A run of the toy with these right answers to 20 validation questions after each iteration.

    samples: of any iterations. base, last: rows of eval.test; without them the run has not got that far.
    tokens: drawn in each iteration. extra: {stage: result} of the journal. flags: of the config, "sampler__name"="rsm".
    """
    config = load_config(flags={key.replace("__", "."): value for key, value in flags.items()})
    facts = {
        **about("run directory"),
        "versions": {"minem": "0", "python": "3"},
        "platform": "Linux",
        "commit": "abc",
        "command": ["minem", "train", "--seed", str(config.run.seed)],
        "config": config.model_dump(),
        "inputs": {"task rows": _rows_sha256(config.task.limit), "prompts": load_prompts("toy").sha256},
        "started": "2026-01-01T00:00:00+00:00",
    }
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(facts))
    (path / "config.toml").write_text(to_toml(config))
    stages: dict[str, Mapping[str, Any]] = {}
    for i, right in enumerate(validation):
        folder = path / f"iter-{i:02d}"
        folder.mkdir()
        if i:
            rows = [row for row in samples if row["iteration"] == i]
            write_rows(folder / "samples.jsonl", rows)
            accepted = sum(row["status"] == "accepted" for row in rows)
            counts = {"questions": 20, "solved": 10 + i, "attempts": len(rows), "statuses": {"accepted": accepted}}
            stages[f"iter-{i:02d}/estep"] = {**counts, "tokens": tokens, "kept_length": 20.0 + i}
            stages[f"iter-{i:02d}/mstep"] = {}
        stages[f"iter-{i:02d}/eval.validation"] = accuracy(right, 20)
    for i, rows in ((0, base), (len(validation) - 1, last)):
        if rows:
            write_rows(path / f"iter-{i:02d}" / "eval.test.jsonl", rows)
            stages[f"iter-{i:02d}/eval.test"] = accuracy(sum(r["status"] == "accepted" for r in rows), len(rows))
    stages |= extra or {}
    write_rows(path / "journal.jsonl", [{"stage": s, "result": result, "files": {}} for s, result in stages.items()])
    return path


@cache
def _rows_sha256(limit: int | None) -> str:
    return load_task("toy", limit).rows_sha256


def accuracy(right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {"n": n, "accuracy": right / n, "low": low, "high": high, "sampled": right / n / 2, "tokens": 21.0}
