"""What an M-step leaves on the disk: checkpoints inside it, and at its end the model, its adapter and its state.

    minem train --set run.checkpoint_minutes=5

A checkpoint is a stage of the run like any other, "iter-02/mstep.120" after step 120, so that it is complete or not
there, and known by its SHA-256. The last two stay: if the newest is damaged the one before it is used. What is done
again is done on the same examples in the same order, so the weights are those of a run that never stopped, bit for bit.
"""

from __future__ import annotations

import re
import time
from typing import Any

from minem.console import percent
from minem.device import release_cached_memory
from minem.em.mstep import MStep
from minem.errors import Interrupted
from minem.files import read_rows, write_rows
from minem.generation.generator import Generator
from minem.model.tokenizer import Tokenizer
from minem.model.weights import read_weights, save, saved_bytes
from minem.runs.stages import Run, Stage

KEPT = 2  # checkpoints on the disk
STEPS = "steps.jsonl"  # in a checkpoint, the metrics of the steps before it


class Checkpoints:
    """Those of one M-step, which continues from the newest intact one, if there is any.

    minutes: between two of them. One is also written when the process is asked to stop.
    """

    def __init__(self, stage: Stage, mstep: MStep, minutes: float) -> None:
        self.stage, self.run, self.mstep = stage, stage.run, mstep
        self.seconds = 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.last = time.monotonic()
        self._resume()

    def _resume(self) -> None:
        if newest := self.run.ranks.broadcast(self._newest_intact()):
            folder = self.run.path / self._folder(newest)
            self.mstep.load(folder)
            self.rows = list(read_rows(folder / STEPS))
            for row in self.rows:
                self.stage.log(**row)

    def _newest_intact(self) -> int:
        directory = self.run.directory
        if directory is not None:
            for step in reversed(self._steps()):
                if not directory.damaged(self._name(step)):
                    return step
                for undone in directory.undo(self._name(step)):
                    del self.run.results[undone]
        return 0

    def after_step(self, row: dict[str, Any]) -> None:
        """Log and show the step's metrics; write a checkpoint if one is due, or if any process is to stop.

        All ranks call this after every update. Raises Interrupted after the checkpoint of a stop.
        """
        self.rows.append(row)
        self.stage.log(**row)
        self.stage.line.total = row["steps"]
        self.stage.line.update(row["step"], **_facts(row))
        ranks, stop = self.run.ranks, self.run.stop
        due = time.monotonic() - self.last > self.seconds if ranks.first else False
        stopped, due = (count > 0 for count in ranks.total([float(bool(stop)), float(due)]))
        if stopped or due:
            self._write(row["step"])
        if stopped:
            why = f"by {stop.signal}" if stop else "with another process"
            raise Interrupted(
                f"stopped {why} after step {row['step']} of {row['steps']} of {self.stage.name}, which are kept: "
                "give the same command again to resume"
            )

    def _write(self, step: int) -> None:
        def save_state(stage: Stage) -> None:
            folder = stage.path(f"checkpoint.{step}")
            self.mstep.save(folder)
            if self.run.ranks.first:
                write_rows(folder / STEPS, self.rows)

        self.run.commit(self._name(step), self.stage.line, save_state, writes=3 * self.mstep.master_bytes)
        for old in self._steps()[:-KEPT]:
            self.run.discard(self.stage.iteration, f"checkpoint.{old}")
        self.last = time.monotonic()

    def _steps(self) -> list[int]:
        """Of the checkpoints that were finished, in order."""
        found = (re.fullmatch(re.escape(self.stage.name) + r"\.(\d+)", name) for name in self.run.results)
        return sorted(int(match[1]) for match in found if match)

    def _name(self, step: int) -> str:
        return f"{self.stage.name}.{step}"

    def _folder(self, step: int) -> str:
        return f"{self.stage.name.partition('/')[0]}/checkpoint.{step}"


def export(stage: Stage, mstep: MStep, tokenizer: Tokenizer, model_id: str, card: str, continues: bool) -> None:
    """Write the trained model as a Hugging Face folder, LoRA's adapter, and the state that the next M-step needs.

    continues: whether a later M-step starts from this one.
    """
    release_cached_memory(mstep.model.device)
    if mstep.state_needed and (continues or mstep.lora is not None):
        mstep.save(stage.path("state"))
    adapter = mstep.masters.complete() if mstep.lora is not None else {}
    if not stage.run.ranks.first:
        return
    if mstep.lora is not None:
        mstep.lora.save(stage.path("adapter"), adapter, model_id)
    model = stage.path("model")
    save(mstep.model, tokenizer, model)
    (model / "README.md").write_text(card, encoding="utf-8")


def export_bytes(mstep: MStep) -> int:
    """Bytes that `export` writes, about."""
    return saved_bytes(mstep.model) + (mstep.state_bytes if mstep.state_needed else 0)


def make_room(generator: Generator, mstep: MStep) -> None:
    """Release the KV cache if the M-step does not fit into memory beside it; the next draws make it again."""
    release_cached_memory(mstep.model.device)
    if mstep.memory_needed() > mstep.room():
        generator.release()


def restore(run: Run, iteration: int, mstep: MStep) -> None:
    """Take the weights that an iteration ended with; 0 is the base model, which the model holds already."""
    folder = run.path / f"iter-{iteration:02d}"
    if iteration and mstep.lora is None:  # else the adapters are merged into the base weights, which are in place
        read_weights(mstep.model, folder / "model")
        mstep.reset()
    if iteration and (folder / "state").exists():
        mstep.load(folder / "state")


def _facts(row: dict[str, Any]) -> dict[str, str | float]:
    """What the line of an M-step shows of a step's metrics."""
    facts = {"loss": row["loss"], "grad_norm": row["grad_norm"], "lr": row["lr"]}
    facts |= {"tokens_per_s": row["tokens_per_second"]}
    if row["mfu"] is not None:
        facts["MFU"] = percent(row["mfu"])
    peak = next(value for key, value in row.items() if key.startswith("peak_"))
    return facts | {"peak_memory": f"{peak / 1e9:.2f} GB"}
