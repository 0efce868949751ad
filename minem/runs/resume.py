"""Where a run resumes if its files are missing, cut short or changed: the last stage with all files intact.

    truncate -s 1000 runs/toy.rsm8.toy-llama.s0/iter-04/model/model.safetensors && minem train

Stages from there on are undone; draws repeat the same random streams, so the run ends in the same bytes.
"""

from collections.abc import Iterable
from pathlib import Path

from minem.config import Config
from minem.errors import some
from minem.runs.directory import RunDirectory


def go_back(run: RunDirectory) -> str | None:
    """Undo the first stage that has damaged files, and all after it. Returns what to report to the user."""
    damaged: list[str] = []
    undone: list[str] = []
    # Repeated: an undone M-step needs the model before it, an undone E-step the blocks that it was joined from.
    while found := next(((stage, lost) for stage in run.results if (lost := _lost(run, stage))), None):
        stage, lost = found
        damaged = damaged or lost
        undone = run.undo(stage) + undone
    if not undone:
        return None
    return (
        f"{some(damaged, 1)} is missing or damaged: the run goes back to before {undone[0]} "
        f"and repeats {len(undone)} stage(s)"
    )


def last_model(stages: Iterable[str]) -> int:
    """The last iteration with a finished M-step; 0: none, the base model."""
    trained = [stage for stage in stages if stage.endswith("/mstep")]
    return max((int(stage.partition("/")[0].removeprefix("iter-")) for stage in trained), default=0)


def is_intact(folder: Path, config: Config, stage: str | None = None) -> bool:
    """Are the files of a run (or of one finished stage) as it wrote them? Another process may hold the run."""
    run = RunDirectory.seen(folder, config)
    if stage is not None:
        return stage in run.results and not run.damaged(stage)
    return not any(_lost(run, stage) for stage in run.results)


def _lost(run: RunDirectory, stage: str) -> list[str]:
    """Damaged files of a finished stage that the run cannot do without."""
    folder, _, kind = stage.partition("/")
    if kind == "mstep":
        damaged = run.damaged(stage)
        if folder == f"iter-{last_model(run.results):02d}":
            return damaged
        # Of an older one the state is gone, and the model too unless all are kept.
        return [n for n in damaged if n.startswith(f"{folder}/model/") and run.config.run.keep == "all"]
    if kind.startswith("mstep."):
        return []  # a checkpoint: an older one is used, or none
    joined = kind.startswith("estep.") and f"{folder}/estep" in run.results  # the block was discarded since
    return [] if joined or not kind else run.damaged(stage)  # the picture and the report may be changed by anyone
