"""`minem compare`: the experiment of the paper, samplers x seeds (x tasks), each a run directory of its own.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2,3,4
    minem compare --samplers rsm:4,star:4,pps:4 --seeds 0,1,2 --match kept

Its folder has plan.json (what is compared, declared before any run), the runs as `minem train` makes them, and
comparison.json, .md, .png and report.html.

The base model is evaluated once: its greedy answers are the same for every run of a task, its draws at temperature 1
for every run of a seed. With --match, what a run trains on depends on what all runs of its seed have drawn (`matched`):
each continues until its M-step needs the E-step of another. All state is in the run directories, so the same command
resumes a comparison that was stopped.
"""

import gc
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, Self

from minem.compare.results import Cell, Match, markdown, matched, read_comparison
from minem.config import Config, load_config
from minem.em.loop import Experiment
from minem.em.sample import Sample
from minem.em.samplers import SAMPLERS, make_sampler
from minem.errors import GuardError, UserError
from minem.files import write_atomic
from minem.model.weights import resolve
from minem.plugins import hash_source
from minem.runs.directory import read_journal, remove_run
from minem.runs.folder import default_path, folder_name, hold_folder
from minem.runs.record import fingerprint
from minem.runs.resume import is_intact
from minem.runs.stages import Stage
from minem.train import LAST_STAGE, Session, build, conclude, opened, reserve

# Keys that each run has its own value of, by the flag that lists them.
OWN_KEYS = {"sampler.name": "--samplers", "sampler.budget": "--samplers", "run.seed": "--seeds"}


class _Waiting(Exception):
    """A run of a matched comparison needs the E-step of another one first."""


@dataclass(frozen=True)
class Plan:
    """What is compared, declared before the first run."""

    tasks: tuple[str, ...]
    samplers: tuple[tuple[str, int], ...]  # (name, budget)
    seeds: tuple[int, ...]
    match: Match = "none"

    @classmethod
    def parse(cls, tasks: str, samplers: str, seeds: str, match: Match = "none") -> Self:
        """From the lists with commas of the command line. UserError names the flag and what would be right."""
        names = (tasks,) if os.path.exists(tasks) else _listed("--task", tasks, "toy or arc-easy,openbookqa", str)
        chosen = _listed("--samplers", samplers, "rsm:8,star:2,pps:1", _sampler)
        return cls(names, chosen, _listed("--seeds", seeds, "0,1,2", int), match)


def _listed(flag: str, text: str, example: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",")]
    try:
        values = tuple(map(parse, parts)) if all(parts) else ()
    except ValueError:
        values = ()
    if not values or len(set(values)) < len(values):
        raise UserError(f"{flag} {text!r}: give one or more different values with commas between them, like {example}")
    return values


def _sampler(text: str) -> tuple[str, int]:
    """ "rsm:8" -> ("rsm", 8); without a budget the sampler's default; "module:Class:4" for a user's."""
    name, _, budget = text.rpartition(":")
    if not (name and budget.isdecimal()):
        if name in SAMPLERS:
            raise UserError(f"--samplers {text}: the budget of {name} must be a whole number, like {name}:8")
        name, budget = text, ""
    flags = {"sampler.name": name, "sampler.budget": int(budget) if budget else None}
    try:
        section = load_config(flags=flags).sampler
        make_sampler(section.name, section.budget)
    except UserError as error:
        raise UserError(f"--samplers {text}: {error}") from error
    return section.name, section.budget


def compare(config: Config, plan: Plan, session: Session) -> dict[str, Any]:
    """Make or resume the comparison in `config.run.out`. Returns what comparison.json holds, and `out`.

    Raises UserError for bad input, or a folder that holds another comparison.
    """
    out = Path(os.path.expanduser(config.run.out)) if config.run.out else _default_out(config, plan)
    runs = _runs(config, plan, out)
    for cell, own in runs.items():  # bad input is found before the folder is made
        if cell.seed == plan.seeds[0]:
            build(own, weights=False)
    with hold_folder(out, "plan.json", "comparison", _settings(config, plan), _clear if session.overwrite else None):
        session = replace(session, overwrite=False, origins={**session.origins, **OWN_KEYS})
        comparison = _Comparison(runs, plan.match, session)
        for _, group in groupby(runs, lambda cell: (cell.task, cell.seed)):  # complete seeds are there early
            for together in [[cell] for cell in group] if plan.match == "none" else [list(group)]:
                comparison.finish(together)
        result = {**read_comparison(list(runs), plan.match), "stopped": comparison.stopped}
        _write(out, result)
    return {"out": str(out), **result}


@dataclass
class _Comparison:
    """The runs of a comparison at work."""

    runs: Mapping[Cell, Config]
    match: Match
    session: Session
    stopped: dict[str, str] = field(default_factory=dict)  # by a guard: name and why

    def finish(self, group: Sequence[Cell]) -> None:
        """Run a group in turn until all are finished, or a guard stops one that the others wait for."""
        waiting = deque(group)
        while waiting:
            cell = waiting.popleft()
            self.session.stop.check(cell.folder.name)
            try:
                self._advance(cell, group)
            except _Waiting:
                waiting.append(cell)
            except GuardError as error:
                self.stopped[cell.folder.name] = str(error)
                self.session.progress.note(f"{cell.folder.name} is stopped: {error}")
                return

    def _advance(self, cell: Cell, group: Sequence[Cell]) -> None:
        """Build a run, resume it, and conclude it. Raises _Waiting if it needs another run of the group first."""
        if LAST_STAGE in read_journal(cell.folder) and is_intact(cell.folder, self.runs[cell]):
            self.session.progress.note(f"run     {cell.folder}  finished earlier, skipped")
            return
        gc.collect()  # of the run before: two models at once might not fit
        match = {"match": f"{self.match} of {', '.join(c.sampler for c in group)}"} if self.match != "none" else {}
        experiment = build(self.runs[cell], self.session)

        def select(iteration: int) -> list[Sample] | None:
            if self.match == "none" or experiment.run.finished(iteration, "mstep"):
                return None
            if not all(f"iter-{iteration:02d}/estep" in read_journal(other.folder) for other in group):
                raise _Waiting
            rows = matched(group, iteration, self.match)[group.index(cell)].rows
            if not rows:
                raise GuardError(f"iteration {iteration}: --match {self.match} leaves no accepted rationale")
            kept = experiment.run.read(iteration, "accepted.jsonl", Sample)
            return [sample for sample in kept if (sample.id, sample.attempt) in rows]

        with opened(self.runs[cell], experiment, self.session, **match) as run:
            self._take_over(cell, experiment)
            reserve(self.runs[cell], experiment, self.session.progress)
            experiment.train(select)
            conclude(run)

    def _take_over(self, cell: Cell, experiment: Experiment) -> None:
        """The evaluations of the base model, from another run of the task that has them."""
        others = [other for other in self.runs if other.task == cell.task]
        others.sort(key=lambda other: other.seed != cell.seed)  # of the same seed, if there is one
        for split in ("validation", "test"):
            name = f"eval.{split}"
            donor = next((c for c in others if is_intact(c.folder, self.runs[c], f"iter-00/{name}")), cell)
            if donor == cell or experiment.run.finished(0, name):
                continue
            if donor.seed == cell.seed:
                experiment.run.do(0, name, partial(_copy, donor, name))
            else:
                experiment.evaluate(0, split, getattr(experiment.task, split), donor.rows(0, name))


def _copy(donor: Cell, name: str, stage: Stage) -> None:
    stage.write(f"{name}.jsonl", donor.rows(0, name))
    stage.report(**read_journal(donor.folder)[f"iter-00/{name}"])


def _runs(config: Config, plan: Plan, out: Path) -> dict[Cell, Config]:
    """The config of each run: the common one with its own task, sampler and seed. UserError if names collide."""
    runs: dict[Cell, Config] = {}
    for task, seed, (name, budget) in product(plan.tasks, plan.seeds, plan.samplers):
        own = config.changed({"task.name": task, "sampler.name": name, "sampler.budget": budget, "run.seed": seed})
        folder = out / default_path(own).name
        if folder in {cell.folder for cell in runs}:
            raise UserError(f"two of the runs would be called {folder.name}; rename one of the tasks or samplers")
        cell = Cell(task, f"{name}:{budget}", seed, folder, config.run.iterations)
        runs[cell] = own.changed({"run.out": str(folder)})
    return runs


def _settings(config: Config, plan: Plan) -> dict[str, dict[str, Any]]:
    """What plan.json declares; the same command must declare the same to resume."""
    own = {"task": {"name"}, "sampler": {"name", "budget"}, "run": {"seed", "out"}}
    names = [name for name in (config.task.verdict, *dict(plan.samplers)) if name and ":" in name]
    declared = {
        "tasks": ",".join(plan.tasks),
        "samplers": ",".join(f"{name}:{budget}" for name, budget in plan.samplers),
        "seeds": ",".join(map(str, plan.seeds)),
        "match": plan.match,
        "base model": fingerprint(resolve(config.model.id, config.model.revision))[:16],
        **{f"source of {name}": hash_source(name)[:16] for name in names},
    }
    return {"compare": declared, **config.model_dump(exclude=own)}


def _default_out(config: Config, plan: Plan) -> Path:
    samplers = "-".join(f"{name.rpartition(':')[2]}{budget}" for name, budget in plan.samplers)
    match = f".match-{plan.match}" if plan.match != "none" else ""
    model = "toy-llama" if config.model.id == "toy" else Path(config.model.id).name
    return Path("runs") / folder_name(f"compare.{'-'.join(Path(t).name for t in plan.tasks)}.{samplers}{match}.{model}")


def _clear(out: Path) -> None:
    """Remove an earlier comparison: its results, and of its run directories what a run writes."""
    for name in ("comparison.json", "comparison.md", "comparison.png", "report.html"):
        (out / name).unlink(missing_ok=True)
    for facts in sorted(out.glob("*/run.json")):
        remove_run(facts.parent)


def _write(out: Path, comparison: dict[str, Any]) -> None:
    """comparison.json, .md, .png and report.html."""
    from minem.report.charts import plot_spent, svg_spent  # here: matplotlib takes half a second to load
    from minem.report.page import write_report

    runs = comparison["runs"]
    write_atomic(out / "comparison.json", (json.dumps(comparison, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(out / "comparison.md", markdown(comparison).encode())
    if runs:
        plot_spent(runs, out / "comparison.png")
        write_report([out / run["run"] for run in runs], out / "report.html", {**comparison, "plots": svg_spent(runs)})
