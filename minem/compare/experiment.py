"""`minem compare`: the experiment of the paper, samplers x seeds (x tasks), each a run directory of its own.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2,3,4
    minem compare --samplers rsm:4,star:4,pps:4 --seeds 0,1,2 --match kept

    runs/compare.toy.rsm8-star2-pps1.toy-llama/
      plan.json                                  what was asked for, samplers, seeds and tasks: declared before any run
      toy.rsm8.toy-llama.s0/  ...                the runs, as `minem train` makes them
      comparison.json  comparison.md  comparison.png  report.html

The base model is evaluated once: its greedy answers are the same for every run of a task and are handed on; its draws
at temperature 1 are seeded by the run's seed, so samplers share them within a seed and each seed draws its own.

Unmatched runs go one after the other. With --match, the runs of a seed take turns, since what one of them trains on
depends on what all have drawn (`minem.compare.results.matched`): each goes on until its M-step waits for another's E-step.
Nothing is remembered but the run directories, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from minem.compare.results import Cell, Match, markdown, matched, read_comparison
from minem.config import Config, load_config
from minem.console import Progress
from minem.em.loop import Experiment
from minem.em.packing import Example
from minem.em.samplers import SAMPLERS, make_sampler
from minem.errors import GuardError, UserError
from minem.files import read_rows
from minem.model.weights import resolve
from minem.parallel.signals import Stop
from minem.plugins import hash_source
from minem.runs import resume as recovery
from minem.runs.directory import default_path, folder_name, hold_folder, read_journal, remove_run, write_atomic
from minem.runs.record import fingerprint
from minem.train import LAST_STAGE, conclude

RESULTS = ("comparison.json", "comparison.md", "comparison.png", "report.html")


class _Waiting(Exception):
    """A run of a matched comparison has to wait for the E-step of another one."""


@dataclass(frozen=True)
class Plan:
    """What is compared, declared before the first run."""

    tasks: tuple[str, ...]
    samplers: tuple[tuple[str, int], ...]  # (name, budget)
    seeds: tuple[int, ...]
    match: Match = "none"

    @classmethod
    def parse(cls, tasks: str, samplers: str, seeds: str, match: Match = "none") -> Plan:
        """From the texts of the command line, lists with commas. UserError names the flag and what would be right."""
        names = (tasks,) if os.path.exists(tasks) else _listed("--task", tasks, "toy or arc-easy,openbookqa")
        chosen = tuple(map(_sampler, _listed("--samplers", samplers, "rsm:8,star:2,pps:1")))
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--samplers {samplers}: each sampler and budget once")
        numbers = _listed("--seeds", seeds, "0,1,2")
        wrong = [number for number in numbers if not _is_number(number)]
        if wrong:
            raise UserError(f"--seeds {seeds}: {wrong[0]!r} is no seed; give whole numbers with commas, like 0,1,2")
        if len({int(number) for number in numbers}) < len(numbers):
            raise UserError(f"--seeds {seeds}: each seed once")
        return cls(names, chosen, tuple(map(int, numbers)), match)

    def labels(self) -> tuple[str, ...]:
        return tuple(f"{name}:{budget}" for name, budget in self.samplers)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 100  # Python reads none of thousands of digits


def _listed(flag: str, text: str, example: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts) or len(set(parts)) < len(parts):
        raise UserError(f"{flag} {text!r}: give one or more different values with commas between them, like {example}")
    return parts


def _sampler(text: str) -> tuple[str, int]:
    """ "rsm:8" -> ("rsm", 8); without a budget the sampler's own; "module:Class:4" for a user's."""
    name, _, budget = text.rpartition(":")
    if not (name and _is_number(budget)):
        if name in SAMPLERS:
            raise UserError(f"--samplers {text}: the budget of {name} must be a whole number, like {name}:8")
        name, budget = text, ""
    try:
        config = load_config(flags={"sampler.name": name, "sampler.budget": int(budget) if budget else None})
        make_sampler(config.sampler.name, config.sampler.budget)
    except UserError as error:
        raise UserError(f"--samplers {text}: {error}") from error
    return config.sampler.name, config.sampler.budget


def compare(
    config: Config,
    plan: Plan,
    progress: Progress,
    command: Sequence[str] = (),
    overwrite: bool = False,
    tracker: ModuleType | None = None,
    origins: Mapping[str, str] | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Run or continue the comparison in `config.run.out`; everything else of the config is common to all runs.

    Returns what comparison.json holds, and `out`; `stopped` in it has the runs that a guard stopped, {name: why}: the
    others are done and their results are there.

    Raises:
        UserError: bad input, or a folder that holds another comparison.
    """
    out = Path(os.path.expanduser(config.run.out)) if config.run.out is not None else _default_out(config, plan)
    runs = _runs(config, plan, out)
    for task in plan.tasks:  # all that can be wrong with tasks and lengths is said before the folder is made
        _check(runs, task, progress)
    with hold_folder(out, "plan.json", "comparison", _settings(config, plan), _clear if overwrite else None):
        own = {"sampler.name": "--samplers", "sampler.budget": "--samplers", "run.seed": "--seeds"}
        told = {**(origins or {}), **own}
        stop = Stop() if stop is None else stop
        comparison = _Comparison(runs, plan.match, progress, list(command), tracker, told, stop)
        comparison.run()
        result = {**read_comparison(list(runs), plan.match), "stopped": comparison.stopped}
        _write(out, result)
    return {"out": str(out), **result}


class _Comparison:
    """The runs of one comparison on their way."""

    def __init__(
        self,
        runs: Mapping[Cell, Config],
        match: Match,
        progress: Progress,
        command: list[str],
        tracker: ModuleType | None,
        origins: Mapping[str, str],
        stop: Stop,
    ) -> None:
        self.runs = runs
        self.match = match
        self.progress = progress
        self.command = command
        self.tracker = tracker
        self.origins = origins
        self.stop = stop
        self.stopped: dict[str, str] = {}  # by a guard: name and why

    def run(self) -> None:
        """All runs, seed by seed, so that whole comparisons are there early."""
        for key in dict.fromkeys((cell.task, cell.seed) for cell in self.runs):
            group = [cell for cell in self.runs if (cell.task, cell.seed) == key]
            if self.match == "none":
                for cell in group:
                    self._finish([cell])
            else:
                self._finish(group)

    def _finish(self, group: Sequence[Cell]) -> None:
        """Take the runs of a group forward in turn until all are done, or a guard stops one that others wait for."""
        waiting = list(group)
        while waiting:
            for cell in list(waiting):
                try:
                    done = self._advance(cell, group)
                except GuardError as error:
                    self.stopped[cell.folder.name] = str(error)
                    self.progress.note(f"{cell.folder.name} is stopped: {error}")
                    return
                if done:
                    waiting.remove(cell)

    def _advance(self, cell: Cell, group: Sequence[Cell]) -> bool:
        """One run as far as it can go. Returns whether it is done."""
        self.stop.check(cell.folder.name)
        if LAST_STAGE in read_journal(cell.folder) and recovery.is_whole(cell.folder, self.runs[cell]):
            self.progress.note(f"run     {cell.folder}  done before, not repeated")
            return True
        inputs = {} if self.match == "none" else {"match": f"{self.match} of {', '.join(c.sampler for c in group)}"}
        experiment = Experiment(self.runs[cell], self.progress, stop=self.stop)
        try:
            with experiment.open(self.command, False, self.tracker, self.origins, **inputs) as run:
                self._share_base(cell, experiment)
                experiment.train(self._selection(cell, group, experiment))
                conclude(run)
                return True
        except _Waiting:
            return False
        finally:
            del experiment
            gc.collect()  # two models at once might not fit

    def _selection(
        self, cell: Cell, group: Sequence[Cell], experiment: Experiment
    ) -> Callable[[int], Sequence[Example] | None]:
        """What the run trains on in an iteration: all that it accepted, or its share of a matched group."""

        def select(iteration: int) -> Sequence[Example] | None:
            folder = f"iter-{iteration:02d}"
            done = experiment.run.finished(f"{folder}/mstep") and iteration not in experiment.behind
            if self.match == "none" or done:
                return None
            if not all(f"{folder}/estep" in read_journal(other.folder) for other in group):
                raise _Waiting
            share = matched(group, iteration, self.match)[group.index(cell)]
            if not share.rows:
                why = ", since a sampler accepted none" if self.match == "kept" else ""
                raise GuardError(
                    f"iteration {iteration}: --match {self.match} leaves no accepted rationale to train on{why}"
                )
            accepted = experiment.run.path / folder / "accepted.jsonl"
            return experiment.examples(accepted, lambda row: (row["id"], row["attempt"]) in share.rows)

        return select

    def _share_base(self, cell: Cell, experiment: Experiment) -> None:
        """Take over what another run of the task has found out about the base model."""
        for split, questions in (("validation", experiment.task.validation), ("test", experiment.task.test)):
            stage = f"iter-00/eval.{split}"
            donors = [c for c in self.runs if c.task == cell.task and recovery.has(c.folder, self.runs[c], stage)]
            if not donors or experiment.run.finished(stage):
                continue
            donor = min(donors, key=lambda other: other.seed != cell.seed)  # of the same seed, if there is one
            file = donor.folder / f"{stage}.jsonl"
            if donor.seed != cell.seed:
                experiment.evaluate(0, split, questions, known=read_rows(file))
                continue
            with experiment.run.stage(stage) as record:
                shutil.copyfile(file, record.path(f"{stage}.jsonl"))
                record.result.update(read_journal(donor.folder)[stage])
                experiment.run.log_metrics(stage, **record.result)


def _runs(config: Config, plan: Plan, out: Path) -> dict[Cell, Config]:
    """The config of each run: the common one with its own task, sampler and seed. UserError where names collide."""
    runs = {}
    for task in plan.tasks:
        for seed in plan.seeds:
            for (name, budget), label in zip(plan.samplers, plan.labels(), strict=True):
                own = config.changed(
                    {"task.name": task, "sampler.name": name, "sampler.budget": budget, "run.seed": seed}
                )
                folder = out / default_path(own).name
                runs[Cell(task, label, seed, folder)] = own.changed({"run.out": str(folder)})
    folders = [cell.folder for cell in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"two of the runs would be called {twice.name}; rename one of the tasks or samplers")
    return runs


def _check(runs: Mapping[Cell, Config], task: str, progress: Progress) -> None:
    """Build one experiment of the task, of a sampler that hints if there is one: its prompts are the longest."""
    configs = [config for cell, config in runs.items() if cell.task == task]
    Experiment(next((c for c in configs if c.sampler.name != "rsm"), configs[0]), progress)
    gc.collect()


def _settings(config: Config, plan: Plan) -> dict[str, dict[str, Any]]:
    """What a folder of runs was declared to compare; the same command must declare the same to go on."""
    common = config.model_dump()
    del common["task"]["name"], common["sampler"]["name"], common["sampler"]["budget"]
    del common["run"]["seed"], common["run"]["out"]
    declared = {
        "tasks": ",".join(plan.tasks),
        "samplers": ",".join(plan.labels()),
        "seeds": ",".join(map(str, plan.seeds)),
        "match": plan.match,
        "base model": fingerprint(resolve(config.model.id, config.model.revision))[:16],
    }
    for name in (config.task.verdict, *(sampler for sampler, _ in plan.samplers)):
        if name is not None and ":" in name:
            declared[f"source of {name}"] = hash_source(name)[:16]
    return {"compare": declared, **common}


def _default_out(config: Config, plan: Plan) -> Path:
    samplers = "-".join(f"{name.rpartition(':')[2]}{budget}" for name, budget in plan.samplers)
    matched_by = "" if plan.match == "none" else f".match-{plan.match}"
    model = "toy-llama" if config.model.id == "toy" else Path(config.model.id).name
    tasks = "-".join(Path(task).name for task in plan.tasks)
    return Path("runs") / folder_name(f"compare.{tasks}.{samplers}{matched_by}.{model}")


def _clear(out: Path) -> None:
    """Remove an earlier comparison: its results, and of its run directories what a run writes."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    for folder in sorted(out.iterdir()):
        if (folder / "run.json").exists():
            remove_run(folder)


def _write(out: Path, comparison: dict[str, Any]) -> None:
    """comparison.json, .md, .png and report.html."""
    from minem.report.charts import plot_spent, svg_spent
    from minem.report.page import write_report

    runs = comparison["runs"]
    write_atomic(out / "comparison.json", (json.dumps(comparison, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(out / "comparison.md", markdown(comparison).encode())
    if runs:
        plot_spent(runs, out / "comparison.png")
        shown = {**comparison, "plots": svg_spent(runs)}
        write_report([out / run["run"] for run in runs], out / "report.html", shown)
