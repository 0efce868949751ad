"""Whole runs: what `minem train` and `minem sample` do, from a config to the numbers that they print.

    minem train --sampler rsm --budget 8
    minem train --samples runs/first-look/iter-01/samples.jsonl

`minem.em.loop.Experiment` does the stages; here they begin and end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minem.console import Progress
from minem.em.loop import Experiment
from minem.errors import GuardError, UserError
from minem.files import read_rows
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import Stop
from minem.runs.directory import RunDirectory, default_path
from minem.statistics import mcnemar

if TYPE_CHECKING:
    from minem.config import Config

LAST_STAGE = "report"  # of a whole run


def train(
    config: Config,
    progress: Progress,
    command: Sequence[str] = (),
    overwrite: bool = False,
    tracker: ModuleType | None = None,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run or continue the whole EM loop; accuracy.png and report.html end its directory. Returns `summarise` of it."""
    experiment = Experiment(config, progress, ranks, stop)
    with experiment.open(command, overwrite, tracker, origins) as run:
        experiment.train()
        if ranks.first:
            conclude(run)
        return summarise(run)


def conclude(run: RunDirectory) -> None:
    """What ends a run's directory: its picture and its report."""
    if not run.finished("plot"):
        with run.stage("plot") as record:
            from minem.report.charts import plot_accuracy

            plot_accuracy(run.path, record.path("accuracy.png"))
    if not run.finished(LAST_STAGE):
        with run.stage(LAST_STAGE) as record:
            from minem.report.page import write_report

            write_report([run.path], record.path("report.html"))


def sample(
    config: Config,
    iteration: int,
    progress: Progress,
    command: Sequence[str] = (),
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The E-step of one iteration alone, from the weights that the run has by then."""
    if overwrite and iteration > 1:
        raise UserError(f"--overwrite would remove the model that --iteration {iteration} needs; give one of the two")
    experiment = Experiment(config, progress, ranks, stop)
    with experiment.open(command, overwrite, origins=origins) as run:
        before = f"iter-{iteration - 1:02d}"
        stage = f"iter-{iteration:02d}/estep"
        if not run.finished(stage):
            if iteration > 1 and not run.finished(f"{before}/mstep"):
                raise UserError(f"--iteration {iteration} needs the model of {before}, which {run.path} does not have")
            if run.finished(f"iter-{iteration:02d}/mstep"):
                raise UserError(f"--iteration {iteration}: {run.path} has gone on beyond it already")
        experiment.catch_up()
        experiment.reserve()
        experiment.e_step(iteration)
        samples = run.path / f"iter-{iteration:02d}" / "samples.jsonl"
        return {"run": str(run.path), "samples": str(samples), **run.result(stage)}


def train_on_samples(
    config: Config,
    samples: Path,
    progress: Progress,
    command: Sequence[str] = (),
    overwrite: bool = False,
    tracker: ModuleType | None = None,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The M-step alone, on rows made anywhere: those with status "accepted", and those without a status.

    With `sampler.drop_leaks`, rows that are marked as leaks are left out, as the E-step would.
    """
    if not os.path.isfile(samples):
        raise UserError(f"--samples {samples} is not a file")
    digest = hashlib.sha256(samples.read_bytes()).hexdigest()
    if config.run.out is None:
        out = f"{default_path(config)}.samples-{digest[:8]}"
        config = config.changed({"run.out": out})

    def keep(row: Mapping[str, Any]) -> bool:
        return row.get("status", "accepted") == "accepted" and not (config.sampler.drop_leaks and row.get("leak"))

    experiment = Experiment(config, progress, ranks, stop)
    examples = experiment.examples(samples, keep)
    if not examples:
        why = 'no row has status "accepted"'
        raise GuardError(f"{samples}: {why}, so there is nothing to train on")
    endless = sum(example.token_ids[-1] not in experiment.tokenizer.eos_ids for example in examples)
    if endless:
        progress.note(
            f"note    {endless} of {len(examples)} rows do not end in EOS: the model learns not to stop there"
        )
    with experiment.open(command, overwrite, tracker, origins, samples=digest) as run:
        experiment.m_step(1, examples)
        return {"run": str(run.path), "model": str(run.path / "iter-01" / "model"), **run.result("iter-01/mstep")}


def summarise(run: RunDirectory) -> dict[str, Any]:
    """The numbers that a finished run ends with, read from its journal and its evaluation files."""
    last = run.config.run.iterations
    test = {}
    for name, iteration in (("base", 0), ("last", last)):
        rows = read_rows(run.path / f"iter-{iteration:02d}" / "eval.test.jsonl")
        test[name] = {row["id"]: row["status"] == "accepted" for row in rows}
    lost = sum(right and not test["last"][i] for i, right in test["base"].items())
    won = sum(right and not test["base"][i] for i, right in test["last"].items())
    iterations = [
        {
            "iteration": i,
            "validation": run.result(f"iter-{i:02d}/eval.validation"),
            **({"estep": run.result(f"iter-{i:02d}/estep"), "mstep": run.result(f"iter-{i:02d}/mstep")} if i else {}),
        }
        for i in range(last + 1)
    ]
    return {
        "run": str(run.path),
        "model": str(run.path / f"iter-{last:02d}" / "model"),
        "iterations": iterations,
        "test": {
            "base": run.result("iter-00/eval.test"),
            "last": run.result(f"iter-{last:02d}/eval.test"),
            "wrong_to_right": won,
            "right_to_wrong": lost,
            "mcnemar_p": mcnemar(lost, won),
        },
    }
