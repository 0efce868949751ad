"""A run directory as `minem report` and `minem show` read it: what is finished, and nothing is ever changed.

    minem show runs/toy.rsm8.toy-llama.s0

The run may be unfinished, or another process may be writing to it: only whole files and finished stages are seen. A run
keeps the ids of its questions and no texts; the texts come from the task that its config names, if that is at hand and
its rows still have the hash that the run recorded.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from minem.data.prompts import messages
from minem.data.tasks import Question, Task, load_task
from minem.errors import UserError
from minem.files import own_file, read_rows
from minem.hub import cache_only
from minem.runs.directory import read_facts, read_journal

STATUSES = ("accepted", "wrong", "unparsed", "truncated")
SECTIONS = ("model", "task", "sampler", "mstep", "eval", "run")


@dataclass(frozen=True)
class Run:
    """A run as far as it has got. `results` is its journal: {stage: result}."""

    path: Path
    facts: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        return self.facts["config"]

    @property
    def sampler(self) -> str:
        """The sampler and its budget, like "rsm 8"."""
        return f"{self.config['sampler'].get('name')} {self.config['sampler'].get('budget')}"

    def series(self, stage: str, key: str) -> dict[int, float]:
        """{iteration: value} of a number that a stage ("estep", "eval.validation", ...) left in the journal."""
        found = {}
        for iteration in self.iterations:
            value = self.results.get(f"iter-{iteration:02d}/{stage}", {}).get(key)
            if isinstance(value, int | float):
                found[iteration] = value
        return found

    @cached_property
    def iterations(self) -> list[int]:
        """Those with anything finished in them, 0 being the base model."""
        heads = {stage.partition("/")[0].removeprefix("iter-") for stage in self.results if stage.startswith("iter-")}
        return sorted(int(head) for head in heads if head.isdecimal())

    @property
    def last_test(self) -> int | None:
        """The iteration after which the test split was measured, if the run has got that far."""
        return max((i for i in self.series("eval.test", "accuracy") if i), default=None)

    def samples(self, iteration: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of samples.jsonl, of one iteration or of all."""
        for i in self.iterations if iteration is None else [iteration]:
            path = own_file(self.path / f"iter-{i:02d}", "samples.jsonl")
            if f"iter-{i:02d}/estep" in self.results and path.exists():
                yield from (_checked(row, path) for row in read_rows(path))

    def answers(self, iteration: int, split: str) -> dict[str, dict[str, Any]]:
        """{question id: row} of eval.*.jsonl."""
        path = own_file(self.path / f"iter-{iteration:02d}", f"eval.{split}.jsonl")
        return {row["id"]: row for row in (_checked(row, path) for row in read_rows(path))}

    @cached_property
    def task(self) -> Task | str:
        """The task whose questions the run was about, or the sentence that says why it cannot be had."""
        wanted, seed = self.config["task"], self.config["run"].get("seed")
        try:
            task = _load_task(wanted.get("name"), wanted.get("limit"), seed)
        except UserError as error:
            return f"the texts of the questions cannot be shown: {error}"
        if task.rows_sha256 != self.facts.get("inputs", {}).get("task rows"):
            return f"the texts of the questions cannot be shown: the rows of {task.name} are not those of the run"
        return task

    @cached_property
    def _questions(self) -> dict[str, dict[str, Question]]:
        """{split: {id: question}}; empty where the task cannot be had."""
        task = self.task
        if isinstance(task, str):
            return {"train": {}, "test": {}}
        return {"train": {q.id: q for q in task.train}, "test": {q.id: q for q in task.test}}

    def prompt(self, id_: str, kind: str = "plain", split: str = "train") -> str | None:
        """The words of a question's plain or hinted prompt, as they go into the model's chat template.

        None where they cannot be had; `task` says why.
        """
        question = self._questions[split].get(id_)
        if question is None:
            return None
        hint = self.config["sampler"].get("hint") if kind == "hinted" else None
        try:
            return "\n\n".join(message["content"] for message in messages(question, hint))
        except UserError:  # a wording that this version does not have
            return None


def read_run(path: Path) -> Run:
    """The run in this directory. UserError where there is none."""
    if os.path.exists(path / "plan.json") and not os.path.exists(path / "run.json"):
        raise UserError(f"{path} is a comparison and no run: name runs in it, like {path}/*.s0")
    facts = read_facts(path)
    config = facts.get("config")
    if not (isinstance(config, dict) and all(isinstance(config.get(section), dict) for section in SECTIONS)):
        raise UserError(f"{path} is not a run directory: its run.json holds no config with {', '.join(SECTIONS)}")
    for name in ("inputs", "versions"):
        if not isinstance(facts.get(name, {}), dict):
            raise UserError(f"{path} is not a run directory: the {name} in its run.json are no JSON object")
    return Run(path, facts, read_journal(path))


@contextmanager
def told_as_damage(*paths: Path) -> Iterator[None]:
    """A run directory may be anybody's, and any of its values of any kind: what trips over one says whose it is."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: a file holds a value that minem does not write there ({error!r})") from error


@dataclass
class Choice:
    """Some of very many samples: all attempts at the same questions, whatever the run and iteration.

    Questions are taken in the order of a hash of their ids until `most` rows or `characters` of text are full, so that
    one can follow a question from iteration to iteration and from sampler to sampler. One pass, bounded memory.
    """

    most: int
    characters: int
    seen: int = 0
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    _ranks: list[tuple[int, str]] = field(default_factory=list)
    _limit: int = 1 << 64
    _size: int = 0
    _count: int = 0

    def add(self, run: int, row: dict[str, Any]) -> None:
        """`run`: the number of the run that the row is of."""
        self.seen += 1
        rank = _rank(row["id"])
        if rank >= self._limit:
            return
        if row["id"] not in self.rows:
            heapq.heappush(self._ranks, (-rank, row["id"]))  # the highest rank first
        self.rows.setdefault(row["id"], []).append((run, row))
        self._count += 1
        self._size += len(row["text"])
        while (self._count > self.most or self._size > self.characters) and len(self.rows) > 1:
            highest, id_ = heapq.heappop(self._ranks)
            self._limit = -highest
            dropped = self.rows.pop(id_)
            self._count -= len(dropped)
            self._size -= sum(len(row["text"]) for _, row in dropped)

    def chosen(self) -> list[tuple[int, dict[str, Any]]]:
        """At most `most` (run, row), by run, iteration, question and attempt."""
        rows = [pair for pairs in self.rows.values() for pair in pairs]
        rows.sort(key=lambda pair: (pair[0], pair[1]["iteration"], pair[1]["id"], pair[1]["attempt"]))
        return rows[: self.most]


def select(
    run: Run, iteration: int | None = None, status: str | None = None, question: str | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of a run that a person asked for.

    Raises UserError where there is no such iteration or question in it, naming those that there are.
    """
    drawn = [i for i in run.iterations if f"iter-{i:02d}/estep" in run.results]
    if not drawn:
        raise UserError(f"{run.path} has no finished E-step yet, so there are no samples to show")
    if iteration is not None and iteration not in drawn:
        raise UserError(f"--iteration {iteration}: {run.path} has samples of iteration {', '.join(map(str, drawn))}")
    found = False
    for row in run.samples(iteration):
        found = found or row["id"] == question
        if (status is None or row["status"] == status) and (question is None or row["id"] == question):
            yield row
    if question is not None and not found:
        raise UserError(f"--question {question}: {run.path} has no samples of such a question")


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(ids that became wrong, ids that became right)."""
    right = [{id_ for id_, row in rows.items() if row["status"] == "accepted"} for rows in (before, after)]
    both = before.keys() & after.keys()
    lost, won = (sorted((right[a] - right[b]) & both) for a, b in ((0, 1), (1, 0)))
    return lost, won


def _rank(id_: str) -> int:
    return int.from_bytes(hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _checked(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """The row, if what is read of it is there and of the right type."""
    wanted: dict[str, type] = {"id": str, "text": str, "status": str}
    if path.name == "samples.jsonl":
        wanted |= {"iteration": int, "attempt": int, "prompt": str, "token_ids": list}
    for name, kind in wanted.items():
        if not isinstance(row.get(name), kind):
            raise UserError(f"{path}: a row has no {name} of type {kind.__name__}, as each row that minem writes has")
    return row


@lru_cache(maxsize=8)  # several runs of a comparison are about the same questions
def _load_task(name: Any, limit: Any, seed: Any) -> Task:
    if not (isinstance(name, str) and isinstance(limit, int | None) and isinstance(seed, int)):
        raise UserError("its run.json does not say which task it was")
    with cache_only():  # what is read is on this machine, or it is not shown
        return load_task(name, limit, seed)
