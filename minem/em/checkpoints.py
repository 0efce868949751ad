"""Checkpoints inside an M-step: by time, and when the process is asked to stop.

    minem train --set run.checkpoint_minutes=5

A checkpoint is a stage of the run like any other, "iter-02/mstep.120" after step 120, so that it is whole or not there,
and known by its SHA-256. The last two stay: where the newest is damaged the one before it is used. What is done again
is done on the same examples in the same order, so the weights are those of a run that was never stopped, bit for bit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from minem.em.mstep import MStep
from minem.errors import Interrupted
from minem.files import read_rows, write_rows
from minem.parallel.ranks import Ranks
from minem.parallel.signals import Stop
from minem.runs.directory import RunDirectory

KEPT = 2  # checkpoints on the disk
STEPS = "steps.jsonl"  # in a checkpoint, the metrics of the steps before it


class Checkpoints:
    """Those of one M-step.

    minutes: between two of them.
    """

    def __init__(self, run: RunDirectory, mstep: MStep, stage: str, minutes: float, ranks: Ranks, stop: Stop) -> None:
        self.run, self.mstep, self.stage, self.ranks, self.stop = run, mstep, stage, ranks, stop
        self.seconds = 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.last = time.monotonic()

    def resume(self) -> list[dict[str, Any]]:
        """Go on from the newest one that is whole, if there is any; the metrics of the steps before it."""
        newest = self._newest_whole() if self.ranks.first else 0
        if newest := int(self.ranks.total([newest])[0]):
            folder = self.run.path / self._folder(newest)
            self.mstep.load(folder)
            self.rows = list(read_rows(folder / STEPS))
        return self.rows

    def _newest_whole(self) -> int:
        for step in reversed(self._steps()):
            if not self.run.damaged(self._name(step)):
                return step
            self.run.undo(self._name(step))
        return 0

    def after_step(self, row: Mapping[str, Any]) -> None:
        """Write one if it is time, or if any process is to stop; all processes call this after every update.

        Raises Interrupted in the latter case, once it is written.
        """
        self.rows.append(dict(row))
        due = time.monotonic() - self.last > self.seconds if self.ranks.first else False
        stop, due = (count > 0 for count in self.ranks.total([float(bool(self.stop)), float(due)]))
        if stop or due:
            self._write(row["step"])
        if stop:
            why = f"by {self.stop.signal}" if self.stop else "with another process"
            raise Interrupted(
                f"stopped {why} after step {row['step']} of {row['steps']} of {self.stage}, which are kept: "
                "give the same command again to go on"
            )

    def clear(self) -> None:
        """They are of no use once the M-step is done."""
        for folder in sorted((self.run.path / self._folder(0)).parent.glob("checkpoint.*")):
            self.run.discard(folder.relative_to(self.run.path).as_posix())

    def _write(self, step: int) -> None:
        with self.run.stage(self._name(step), writes=3 * self.mstep.master_bytes) as record:
            folder = record.path(self._folder(step)) if self.ranks.first else self.run.path
            self.mstep.save(folder)
            if self.ranks.first:
                write_rows(folder / STEPS, self.rows)
        for old in self._steps()[:-KEPT]:
            self.run.discard(self._folder(old))
        self.last = time.monotonic()

    def _steps(self) -> list[int]:
        """Of the checkpoints that were finished, in order."""
        numbers = [re.fullmatch(re.escape(self.stage) + r"\.(\d+)", name) for name in self.run.stages]
        return sorted(int(found[1]) for found in numbers if found)

    def _name(self, step: int) -> str:
        return f"{self.stage}.{step}"

    def _folder(self, step: int) -> str:
        return f"{self.stage.partition('/')[0]}/checkpoint.{step}"
