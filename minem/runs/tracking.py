"""Live tracking, optional: the numbers of metrics.jsonl also go to wandb or trackio as they come.

    minem train --track trackio

What goes wrong there never stops a run. Sent are the config and the numbers of the stages: no sample, no command line.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from minem.console import Progress
from minem.runs.directory import RunDirectory


@contextmanager
def tracked(run: RunDirectory, tracker: ModuleType, progress: Progress) -> Iterator[None]:
    """While open, every line of the run's metrics.jsonl goes to the tracker as well, under the name of the run."""

    def attempt(call: str, *arguments: Any, **named: Any) -> None:
        try:
            getattr(tracker, call)(*arguments, **named)
        except Exception as error:  # a network, a server, a package of others: not worth a run
            run.on_metrics = None
            progress.note(f"warning {tracker.__name__} failed ({error!r}); the run continues without it")

    run.on_metrics = lambda stage, values: attempt("log", flatten(stage, values))
    attempt("init", project="minem", name=run.path.name, config=run.config.model_dump(), resume="allow")
    try:
        yield
    finally:
        if run.on_metrics is not None:
            run.on_metrics = None
            attempt("finish")


def flatten(stage: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name: ("iter-02/mstep", {"loss": 0.5}) -> {"iteration": 2, "mstep/loss": 0.5}."""
    folder, _, kind = stage.partition("/")
    found: dict[str, float] = {"iteration": int(folder.removeprefix("iter-"))}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(f"{stage}/{key}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{kind}/{key}"] = value
    return found
