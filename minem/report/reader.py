"""A run directory as data, for `minem report`, `show` and `compare`; nothing in it is ever changed.

    minem show runs/toy.rsm8.toy-llama.s0

The run may be unfinished, and another process may be writing to it: only finished stages are read. It may also be a
stranger's, so rows are checked here. The texts of questions come from the task, if its rows have the recorded hash.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minem.config import SECTIONS, Config
from minem.data.prompts import load_prompts
from minem.data.tasks import Task, load_task
from minem.errors import UserError, some
from minem.files import own_file, read_json, read_rows
from minem.hub import cache_only
from minem.runs.directory import STOPPED, RunDirectory, read_facts, read_journal
from minem.runs.folder import is_ours
from minem.runs.resume import last_model

ANSWER = {"id": str, "text": str, "status": str, "answer": str | None, "gold": str | None}
SAMPLE = ANSWER | {"iteration": int, "attempt": int, "prompt": str, "token_ids": list, "leak": bool}
SAMPLE |= {"logprob_q": float | int | None, "logprob_plain": float | int | None}


@dataclass(frozen=True)
class Run:
    """A run as far as it has got. `facts`: run.json, `results`: its journal as {stage: result}."""

    path: Path
    facts: dict[str, Any]
    config: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @property
    def sampler(self) -> str:
        """The sampler and its budget, like "rsm 8", or where the samples came from."""
        if digest := self.facts.get("inputs", {}).get("samples"):
            return f"samples {digest[:8]}"
        return f"{self.config['sampler'].get('name')} {self.config['sampler'].get('budget')}"

    @cached_property
    def iterations(self) -> list[int]:
        """Those with a finished stage; 0 is the base model."""
        return sorted({int(found[1]) for stage in self.results if (found := re.match(r"iter-(\d+)/", stage))})

    def result(self, iteration: int, stage: str) -> dict[str, Any]:
        """What a stage ("estep", "eval.validation", ...) left in the journal; empty if it is not finished."""
        return self.results.get(f"iter-{iteration:02d}/{stage}", {})

    def series(self, stage: str, key: str) -> dict[int, float]:
        """{iteration: value} of a number in the results of a stage."""
        values = {i: self.result(i, stage).get(key) for i in self.iterations}
        return {i: value for i, value in values.items() if isinstance(value, int | float)}

    @property
    def stopped(self) -> list[str]:
        """The sentence about the guard that ended the run, if one did."""
        path = own_file(self.path, STOPPED)
        return ["a guard ended the run in {stage}: {reason}".format(**read_json(path))] if path.exists() else []

    @property
    def last_test(self) -> int | None:
        """The iteration after which the test split was evaluated, if the run has got that far."""
        return max((i for i in self.series("eval.test", "accuracy") if i), default=None)

    def samples(self, iteration: int | None = None) -> Iterator[SimpleNamespace]:
        """The rows of samples.jsonl with the attributes of SAMPLE, of one finished E-step or of all."""
        for i in self.iterations if iteration is None else [iteration]:
            if self.result(i, "estep") and (self.path / f"iter-{i:02d}" / "samples.jsonl").exists():
                yield from self._rows(i, "samples.jsonl", SAMPLE)

    def answers(self, iteration: int, split: str) -> dict[str, SimpleNamespace]:
        """{question id: row of eval.*.jsonl, with the attributes of ANSWER}."""
        return {row.id: row for row in self._rows(iteration, f"eval.{split}.jsonl", ANSWER)}

    def _rows(self, iteration: int, name: str, fields: dict[str, Any]) -> Iterator[SimpleNamespace]:
        """The rows of a file, with these fields of these types."""
        path = own_file(self.path / f"iter-{iteration:02d}", name)
        for row in read_rows(path):
            for field, kind in fields.items():
                if not isinstance(row.get(field), kind):
                    raise UserError(f"{path}: a row has no {field} of type {getattr(kind, '__name__', kind)}")
            yield SimpleNamespace(**row)

    @cached_property
    def flips(self) -> tuple[list[str], list[str]]:
        """`flips` on the test split, from the base to the last model."""
        if self.last_test is None:
            return [], []
        return flips(*({id_: row.status for id_, row in self.answers(i, "test").items()} for i in (0, self.last_test)))

    @cached_property
    def task(self) -> Task | str:
        """The task that the run was about, or the sentence that explains why it is not available."""
        wanted, seed = self.config["task"], self.config["run"].get("seed")
        try:
            task = _load_task(wanted.get("name"), wanted.get("limit"), seed, tuple(wanted.get("columns", ())))
            if task.rows_sha256 != self.facts.get("inputs", {}).get("task rows"):
                raise UserError(f"the rows of {task.name} are not those of the run")
        except UserError as error:
            return f"the texts of the questions cannot be shown: {error}"
        return task

    def prompt(self, id_: str, kind: str = "plain", split: str = "train") -> str | None:
        """The words of a question's plain or hinted prompt, without shots; None if they are not available."""
        question = next((question for question in getattr(self.task, split, ()) if question.id == id_), None)
        section = self.config["task"]
        hint = self.config["sampler"].get("hint") if kind == "hinted" else None
        if question is None:
            return None
        try:
            words = load_prompts(section.get("prompt"), section["name"])
        except UserError:
            return None
        if words.sha256 != self.facts.get("inputs", {}).get("prompts") or hint not in (None, *words.hinted):
            return None
        return words.messages(question, hint)[-1]["content"]


def runs_in(paths: Sequence[Path]) -> Iterator[Path]:
    """These run directories; of any other folder, the run directories in it."""
    for path in paths:
        inside = [] if os.path.exists(path / "run.json") else sorted(path.glob("*/run.json"))
        yield from [facts.parent for facts in inside] or [path]


def read_run(path: Path) -> Run:
    """The run in this directory. UserError if there is none."""
    if os.path.exists(path / "plan.json") and not os.path.exists(path / "run.json"):
        raise UserError(f"{path} is a comparison and no run: name runs in it, like {path}/*.s0")
    facts = read_facts(path)
    config = facts.get("config")
    if not (isinstance(config, dict) and all(isinstance(config.get(section), dict) for section in SECTIONS)):
        raise UserError(f"{path} is not a run directory: its run.json holds no config with {', '.join(SECTIONS)}")
    with checked(path):
        if changed := changed_rows(path):
            raise UserError(f"{path}: {some(changed, 1)} is missing or changed; `minem train` repairs the run")
    return Run(path, facts, config, read_journal(path))


def newest_model(name: str) -> str:
    """Of a run, the folder of its newest model; any other name of a model as it is. UserError if it has none yet."""
    if not os.path.exists(os.path.join(name, "run.json")) or not is_ours(read_facts(name)):
        return name
    if not (last := last_model(read_journal(name))):
        raise UserError(f"the run {name} has no model yet; give its base model, or wait for its first M-step")
    folder = f"iter-{last:02d}"
    changed = RunDirectory.seen(Path(name), Config()).damaged(f"{folder}/mstep")
    if lost := [file for file in changed if file.startswith(f"{folder}/model/")]:
        raise UserError(f"{name}: {some(lost, 1)} is missing or not what the run wrote; `minem train` repairs the run")
    return os.path.join(name, folder, "model")


def changed_rows(folder: Path) -> list[str]:
    """Files of samples and answers in a run directory that are missing or not what the run wrote."""
    run = RunDirectory.seen(folder, Config())
    return [n for stage in run.results if re.search(r"/(eval\.\w+|estep)$", stage) for n in run.damaged(stage)]


@contextmanager
def checked(*paths: Path) -> Iterator[None]:
    """Values in a stranger's run.json and journal may have any type: an error over one becomes a UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{', '.join(map(str, paths))}: a value that minem does not write there ({error!r})") from error


def choose(runs: Sequence[Run], most: int, characters: int) -> tuple[list[tuple[int, SimpleNamespace]], int]:
    """At most `most` samples, of whole questions in random order, as (number of the run, row); and how many in all."""
    counts, sizes = Counter[str](), Counter[str]()  # the files are read twice, so that few rows are held in memory
    for row in (row for run in runs for row in run.samples()):
        counts[row.id] += 1
        sizes[row.id] += len(row.text)
    ids, rows, size = set[str](), 0, 0
    for id_ in sorted(counts, key=lambda id_: hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()):
        rows, size = rows + counts[id_], size + sizes[id_]
        if ids and (rows > most or size > characters):
            break
        ids.add(id_)
    chosen = [(number, row) for number, run in enumerate(runs) for row in run.samples() if row.id in ids]
    chosen.sort(key=lambda pair: (pair[0], pair[1].iteration, pair[1].id, pair[1].attempt))
    return chosen[:most], counts.total()


def flips(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(ids that became wrong, ids that became right), from {question id: status} of two models."""
    both = sorted(before.keys() & after.keys())
    lost = [id_ for id_ in both if before[id_] == "accepted" != after[id_]]
    return lost, [id_ for id_ in both if before[id_] != "accepted" == after[id_]]


@lru_cache(maxsize=8)  # runs of a comparison are about the same questions
def _load_task(name: str, limit: int | None, seed: int, columns: tuple[str, ...]) -> Task:
    with cache_only():  # nothing is downloaded for a report
        return load_task(name, limit, seed, columns)
