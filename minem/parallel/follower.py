"""A run as those processes see it that do not write it: what the first one has finished, and nothing of their own.

    minem train --gpus 2            # process 2 follows process 1

All processes walk through the same stages in the same order. In each, a `Follower` does its share of the work, hands it
in where the first process collects it, and then waits until that one has written the stage down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minem.files import is_full
from minem.parallel.ranks import Ranks
from minem.runs.directory import RunDirectory, Stage, full_disk, read_journal

if TYPE_CHECKING:
    from minem.config import Config


class Follower(RunDirectory):
    """The run directory of the first process, to be read only."""

    def __init__(self, path: Path, config: Config, ranks: Ranks) -> None:
        self.path = path
        self.config = config
        self.on_metrics = None
        self._ranks = ranks
        self._lines = {stage: {"result": result} for stage, result in read_journal(path).items()}

    @contextmanager
    def stage(self, name: str, writes: int = 0) -> Iterator[Stage]:
        """Do this process's part of a stage, then wait for the first one to finish it.

        Raises Interrupted when the disk is full: what this process hands in goes there, too.
        """
        try:
            yield Stage(name, self.path)
        except OSError as error:
            if is_full(error):
                raise full_disk(self.path, f": it goes on with {name}") from error
            raise
        self._lines[name] = {"result": self._ranks.receive(f"stage/{name}")}

    def close(self) -> None:
        """Nothing is held."""

    def log_metrics(self, stage: str, **values: Any) -> None:
        """The first process does."""

    def discard(self, name: str) -> None:
        """The first process does."""
