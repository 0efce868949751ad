"""What a run goes on from when files of it are missing, cut short or changed: the last stage whose files are whole.

    truncate -s 1000 runs/toy.rsm8.toy-llama.s0/iter-04/model/model.safetensors && minem train

Rows and evaluations that are not what was written take the run back to before the stage that wrote them, and so does
the last model, as long as nothing was drawn from it (or `run.keep = "all"` promises it). Where there are later draws,
or the model before it is gone, as under `run.keep = "last"`, no draw is repeated: the accepted rows of all iterations
are still there, and training on them again gives the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minem.runs.directory import RunDirectory

if TYPE_CHECKING:
    from minem.config import Config


def go_back(run: RunDirectory) -> str | None:
    """Undo the first stage whose files are not what was written, and all after it. Returns what to tell the user."""
    damaged: list[str] = []
    undone: list[str] = []
    # Once more from the start: a block of an E-step is needed again where the stage that replaced it was undone.
    while found := next(((stage, lost) for stage in run.stages if (lost := _lost(run, stage))), None):
        stage, lost = found
        damaged = damaged or lost
        undone = run.undo(stage) + undone
    if not undone:
        return None
    more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
    return (
        f"{damaged[0]}{more} is missing or not what was written: the run goes back to before {undone[0]} "
        f"and does {len(undone)} stage(s) again"
    )


def is_whole(folder: Path, config: Config) -> bool:
    """Are the files of a run those that it wrote? It may be another process's: nothing is held, nothing changed."""
    run = RunDirectory.seen(folder, config)
    return not any(_lost(run, stage) for stage in run.stages)


def has(folder: Path, config: Config, stage: str) -> bool:
    """Has a run, which may be another process's, finished a stage whose files are those that it wrote?"""
    run = RunDirectory.seen(folder, config)
    return run.finished(stage) and not run.damaged(stage)


def whole_model(run: RunDirectory) -> tuple[int, list[int]]:
    """The last iteration whose model can be read (0: the base model), and those after it whose M-steps are redone."""
    trained = _trained(run)
    whole = next((i for i in reversed(trained) if _is_whole(run, i)), 0)
    behind = [i for i in trained if i > whole]
    if behind and run.config.run.init == "base":  # every M-step starts from the base model: the last one is enough
        return 0, behind[-1:]
    return whole, behind


def _trained(run: RunDirectory) -> list[int]:
    """Iterations with a finished M-step."""
    return [int(stage.partition("/")[0].removeprefix("iter-")) for stage in run.stages if stage.endswith("/mstep")]


def _is_whole(run: RunDirectory, iteration: int) -> bool:
    """Are the model of an iteration and, where it wrote any, its M-step's state there as they were written?"""
    folder = f"iter-{iteration:02d}"
    return (run.path / folder / "model").is_dir() and not run.damaged(f"{folder}/mstep")


def _lost(run: RunDirectory, stage: str) -> list[str]:
    """Files of a finished stage that its run cannot be without, and that are not what was written."""
    folder, _, kind = stage.partition("/")
    if kind == "mstep":
        iteration = _trained(run)[-1]
        begun = any(later.startswith(f"iter-{iteration + 1:02d}/") for later in run.stages)
        if folder != f"iter-{iteration:02d}" or (begun and run.config.run.keep == "last"):
            return []  # read no more, or trained again in memory
        return [name for name in run.damaged(stage) if name.startswith(f"{folder}/model/")]
    if kind.startswith("mstep."):
        return []  # a checkpoint: `minem.em.checkpoints` takes an older one, or none
    replaced = kind.startswith("estep.") and run.finished(f"{folder}/estep")  # a block, discarded since
    return [] if replaced or not kind else run.damaged(stage)  # the picture and the report are anyone's to change
