"""`minem compare`: the experiment of the paper, samplers x seeds (x tasks x models), each a run directory of its own.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2,3,4 --arm control:sampler.filter=none
    minem compare --samplers rsm:4,star:4,pps:4 --seeds 0,1,2 --match kept

An arm is one more row, with any keys of the config: few-shot:task.shots=always,run.iterations=0 trains nothing. The
folder has plan.json (what is compared, declared before any run), the runs as `minem train` makes them, and
comparison.json, .md, .png and report.html.

A base model is evaluated once: its greedy answers are the same for every run of a task, its draws at temperature 1
for every run of a seed. With --match each run continues until its M-step needs the E-step of another (`matched`). All
state is in the run directories, so the same command resumes a comparison that was stopped.
"""

import gc
import json
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from minem.compare.results import GROUP, Cell, Match, markdown, matched, read_comparison
from minem.config import FLAGS, Config, assignments, load_config
from minem.em.loop import Experiment
from minem.em.sample import Sample
from minem.em.samplers import SAMPLERS, make_sampler
from minem.errors import GuardError, UserError
from minem.files import no_link, read_json, write_atomic
from minem.model.weights import resolve
from minem.plugins import hash_source
from minem.runs.directory import read_facts, read_journal, remove_run
from minem.runs.folder import claim, default_path, folder_name, hold_folder, model_name
from minem.runs.record import fingerprint
from minem.runs.resume import is_intact
from minem.runs.stages import Session, Stage
from minem.train import LAST_STAGE, build, conclude, opened, reserve

# Keys that each run has its own value of, by the flag that lists them.
OWN_KEYS = {"sampler.name": "--samplers", "sampler.budget": "--samplers", "run.seed": "--seeds"}
BASE = attrgetter("model", "task", "eval", "sampler.stop")  # what evaluations of the base depend on, with the seed


class _Waiting(Exception):
    """A run of a matched comparison needs the E-step of another one first."""


@dataclass(frozen=True)
class Plan:
    """What is compared, declared before the first run."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    arms: tuple[tuple[str, Mapping[str, Any]], ...]  # label and keys of each row: samplers, like "rsm:8", then --arm's
    seeds: tuple[int, ...]
    match: Match = "none"

    @classmethod
    def parse(cls, config: Config, samplers: str, seeds: str, match: Match = "none", more: Sequence[str] = ()) -> Self:
        """From the config and the command line's lists. UserError names the flag and what would be right."""
        tasks = _listed("--task", config.task.name, "toy or arc-easy,openbookqa", str)
        models = _listed("--models", config.model.id, "toy,HuggingFaceTB/SmolLM2-135M-Instruct", str)
        arms = *_listed("--samplers", samplers, "rsm:8,star:2,pps:1", _sampler), *(_arm(config, text) for text in more)
        return cls(tasks, models, arms, _listed("--seeds", seeds, "0,1,2", int), match)


def _listed(flag: str, text: str, example: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    try:
        values = tuple(map(parse, parts)) if all(parts) else ()
    except ValueError:
        values = ()
    if not values or len(set(map(str, values))) < len(values):
        raise UserError(f"{flag} {text!r}: give one or more different values with commas between them, like {example}")
    return values


def _sampler(text: str) -> tuple[str, dict[str, Any]]:
    """Label and keys of "rsm:8"; without a budget the sampler's default; "module:Class:4" for a user's."""
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
    return f"{section.name}:{section.budget}", {"sampler.name": section.name, "sampler.budget": section.budget}


def _arm(config: Config, text: str) -> tuple[str, dict[str, Any]]:
    """ "control:sampler.filter=none" -> "control" and its keys, the sampler's name and budget among them."""
    name, _, rest = text.partition(":")
    if not (name and rest):
        raise UserError(f"--arm {text}: write it as NAME:section.key=value, like control:sampler.filter=none")
    keys = dict(assignments(re.split(r",(?=\s*\w+\.\w+\s*=)", rest), f"--arm {name}:"))
    if shared := [
        key for key in keys if key in FLAGS and not key.startswith(("sampler.", "task.prompt", "run.iterations"))
    ]:
        raise UserError(f"--arm {text}: all rows share {shared[0]}, so an arm cannot set it")
    default = {"sampler.budget": None} if "sampler.name" in keys else {}  # and not that of another sampler
    try:
        own = config.changed({**default, **keys}).sampler
    except UserError as error:
        raise UserError(f"--arm {text}: {error}") from error
    return name, {"sampler.name": own.name, "sampler.budget": own.budget, **keys}


def compare(config: Config, plan: Plan, session: Session) -> dict[str, Any]:
    """Make or resume the comparison in `config.run.out`. Returns what comparison.json holds, and `out`."""
    out = Path(os.path.expanduser(config.run.out)) if config.run.out else _default_out(config, plan)
    runs = _runs(config, plan, out)
    if plan.match != "none" and len({own.run.iterations for own in runs.values()}) > 1:
        raise UserError(
            f"--match {plan.match}: all rows must have as many iterations; leave run.iterations out of --arm"
        )
    inputs = []
    for cell, own in runs.items():  # bad input is found before the folder is made
        if cell.seed == plan.seeds[0]:
            built = build(own, weights=False)
            inputs += [built.task.rows_sha256[:16], built.estep.prompts.words.sha256[:16]]
    settings = _settings(config, plan, list(dict.fromkeys(inputs)))
    names, clear = [no_link(cell.folder).name for cell in runs], _clear if session.overwrite else None
    with hold_folder(out, "plan.json", "comparison", settings, clear, runs=names) as check:
        comparison = _Comparison(runs, plan, replace(session, overwrite=False))
        for _, group in groupby(runs, GROUP):  # complete seeds are there early
            for together in [[cell] for cell in group] if plan.match == "none" else [list(group)]:
                comparison.finish(together)
        result = {**read_comparison(list(runs), plan.match), "stopped": comparison.stopped}
        check()
        _write(out, result)
    return {"out": str(out), **result}


@dataclass
class _Comparison:
    """The runs of a comparison at work."""

    runs: Mapping[Cell, Config]
    plan: Plan
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
        own = self.runs[cell]
        done = LAST_STAGE in read_journal(cell.folder) and is_intact(cell.folder, own)
        if done and read_facts(cell.folder).get("config") == own.changed({"run.out": None}).model_dump():
            self.session.progress.note(f"run     {cell.folder}  finished earlier, skipped")
            return
        gc.collect()  # of the run before: two models at once might not fit
        how, names = self.plan.match, ", ".join(other.sampler for other in group)
        match = {} if how == "none" else {"match": f"{how} of {names}"}
        keys = dict.fromkeys(dict(self.plan.arms)[cell.sampler], "--samplers" if ":" in cell.sampler else "--arm")
        session = replace(self.session, origins={**self.session.origins, "run.seed": "--seeds", **keys})
        experiment = build(self.runs[cell], self.session)

        def select(iteration: int) -> list[Sample] | None:
            if how == "none" or experiment.run.finished(iteration, "mstep"):
                return None
            if not all(f"iter-{iteration:02d}/estep" in read_journal(other.folder) for other in group):
                raise _Waiting
            rows = matched(group, iteration, how)[group.index(cell)].rows
            if not rows:
                raise GuardError(f"iteration {iteration}: --match {how} leaves no accepted rationale")
            kept = experiment.run.read(iteration, "accepted.jsonl", Sample)
            return [sample for sample in kept if (sample.id, sample.attempt) in rows]

        with opened(self.runs[cell], experiment, session, **match) as run:
            self._take_over(cell, experiment)
            reserve(self.runs[cell], experiment, self.session.progress)
            experiment.train(select)
            conclude(run)

    def _take_over(self, cell: Cell, experiment: Experiment) -> None:
        """The evaluations of the base model, from another run that would make the same and has them."""
        others = [other for other, own in self.runs.items() if BASE(own) == BASE(self.runs[cell])]
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
    """The config of each run: the common one with its own task, model, seed and keys. UserError if names collide."""
    runs: dict[Cell, Config] = {}
    for task, model, seed, (label, keys) in product(plan.tasks, plan.models, plan.seeds, plan.arms):
        own = config.changed({"task.name": task, "model.id": model, "run.seed": seed, **keys})
        folder = out / default_path(own, _short(label)).name
        if folder in {cell.folder for cell in runs}:
            raise UserError(f"two of the runs would be called {folder.name}; rename a task, model, sampler or arm")
        cell = Cell(task, model_name(model), label, seed, folder, own.run.iterations)
        runs[cell] = own.changed({"run.out": str(folder)})
    return runs


def _settings(config: Config, plan: Plan, inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What plan.json declares; the same command must declare the same to resume."""
    own = {"task": {"name"}, "sampler": {"name", "budget"}, "run": {"seed", "out"}}
    names = [config.task.verdict or "", *(str(keys["sampler.name"]) for _, keys in plan.arms)]
    declared = {
        "tasks": ",".join(plan.tasks),
        "samplers": ",".join(label for label, _ in plan.arms if ":" in label),
        "seeds": ",".join(map(str, plan.seeds)),
        "match": plan.match,
        "rows and prompts": ",".join(inputs),
        "base model": ",".join(fingerprint(resolve(id_, config.model.revision))[:16] for id_ in plan.models),
        **{f"source of {name}": hash_source(name)[:16] for name in names if ":" in name},
        **{f"arm {name}": json.dumps(keys) for name, keys in plan.arms if ":" not in name},
    }
    return {"compare": declared, **config.model_dump(exclude=own)}


def _default_out(config: Config, plan: Plan) -> Path:
    tasks, models = "-".join(Path(task).name for task in plan.tasks), "-".join(map(model_name, plan.models))
    match = f".match-{plan.match}" if plan.match != "none" else ""
    return Path("runs") / folder_name(f"compare.{tasks}.{'-'.join(map(_short, dict(plan.arms)))}{match}.{models}")


def _short(label: str) -> str:
    """Of a row, for the names of folders: "rsm8" for "rsm:8"."""
    return "".join(label.split(":")[-2:])


def _clear(out: Path) -> None:
    """Remove an earlier comparison: its results, and what the runs of its plan wrote."""
    names = read_json(out / "plan.json").get("runs", []) if (out / "plan.json").exists() else []
    if not (isinstance(names, list) and all(isinstance(name, str) and folder_name(name) == name for name in names)):
        raise UserError(f"{out / 'plan.json'}: runs is no list of names of folders; choose another --out")
    folders = [out / name for name in names if name]
    for name in ("comparison.json", "comparison.md", "comparison.png", "report.html"):
        (out / name).unlink(missing_ok=True)
    for folder in folders:
        if no_link(folder).exists():
            with claim(folder):
                remove_run(folder)


def _write(out: Path, comparison: dict[str, Any]) -> None:
    """comparison.json, .md, .png and report.html."""
    from minem.report.charts import plot_spent, svg_spent  # here: matplotlib takes half a second to load
    from minem.report.page import write_report

    runs = [{**run, "task": f"{run['task']}, {run['model']}"} for run in comparison["runs"]]  # each has its panel
    write_atomic(out / "comparison.json", (json.dumps(comparison, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(out / "comparison.md", markdown(comparison).encode())
    if runs:
        write_atomic(out / "comparison.png", plot_spent(runs))
        write_report([out / run["run"] for run in runs], out / "report.html", {**comparison, "plots": svg_spent(runs)})
