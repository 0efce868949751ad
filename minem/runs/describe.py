"""An experiment in words: what a run says of itself at start-up, and the card of the model that it leaves.

The first lines that `minem train` prints come from here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

import minem
from minem.em.samplers import altered
from minem.text import visible

if TYPE_CHECKING:
    from minem.em.loop import Experiment


def describe(experiment: Experiment) -> None:
    """Say every value that was inferred, and what is unusual."""
    for line in (*_facts(experiment), *_notes(experiment)):
        experiment.progress.note(line)


def _facts(experiment: Experiment) -> list[str]:
    config, task, mstep = experiment.config, experiment.task, experiment.mstep
    dtype = str(experiment.dtype).removeprefix("torch.")
    sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test questions"
    where = str(experiment.device)
    if experiment.device.type == "cpu":
        where += f", {torch.get_num_threads()} thread(s)"
    lines = [
        f"model   {config.model.id}: {_millions(experiment):,.2f} M parameters, {dtype} on {where}",
        f"task    {task.name}: {sizes}" + (f" ({task.note})" if task.note else ""),
        f"sampler {config.sampler.name}: budget {config.sampler.budget}, draws {config.sampler.draws}",
    ]
    if experiment.ranks.size > 1:
        lines.append(f"ranks   {experiment.ranks.size} processes; the M-step's weights: {mstep.strategy}")
    if mstep.lora is not None:
        trained = mstep.trained_parameters / 1e6
        lines.append(
            f"lora    rank {mstep.lora.rank}, alpha {mstep.lora.alpha:g}, {trained:,.2f} M parameters trained beside "
            f"{', '.join(mstep.lora.targets)}"
        )
    size = config.run.questions_per_iteration
    if size is not None and size <= len(task.train):
        lines.append(f"E-step  {size} of {len(task.train)} training questions in each iteration")
    return [*lines, f"run     {experiment.run.path}"]


def _notes(experiment: Experiment) -> list[str]:
    config, train = experiment.config, experiment.task.train
    lines = []
    size = config.run.questions_per_iteration
    if size is not None and size > len(train):
        lines.append(
            f"run.questions_per_iteration = {size} is more than the {len(train)} training questions: each iteration "
            "draws on all of them"
        )
    if changed := altered(config.sampler):
        lines.append(f"{', '.join(changed)}: the draws follow this altered policy, not the model's posterior")
    if config.mstep.lr > 1e-4 and _millions(experiment) > 10 and experiment.mstep.lora is None:
        lines.append(f"mstep.lr = {config.mstep.lr:g} is high for a model of this size; 1e-5 is usual")
    return [f"note    {line}" for line in lines]


def _millions(experiment: Experiment) -> float:
    return sum(p.numel() for p in experiment.model.parameters()) / 1e6


def model_card(experiment: Experiment, iteration: int) -> str:
    """What the model's folder holds, for whoever finds it on its own."""
    config, sampler = experiment.config, experiment.config.sampler
    front = f"---\nlibrary_name: transformers\nbase_model: {json.dumps(config.model.id)}\ntags: [minem]\n---\n"
    return visible(
        f"{front}\n# {experiment.run.path.name}, iteration {iteration}\n\n"
        f"`{config.model.id}` after {iteration} iteration(s) of expectation maximization on "
        f"`{config.task.name}` with the sampler `{sampler.name}` (budget {sampler.budget}), "
        f"made by minem {minem.__version__}. The config and the samples are in the run's directory.\n"
    )
