"""What an M-step leaves on the disk: checkpoints inside it, and at its end the model, its adapter and its state.

    minem train --set run.checkpoint_minutes=5

A checkpoint is a stage of the run, "iter-02/mstep.120" after step 120. If the newest is damaged the one before it is
used; the steps after it repeat the same examples in the same order, so the weights are the same, bit for bit.
"""

import time
from typing import Any

from minem.device import release_cached_memory
from minem.em.mstep import MStep
from minem.errors import Interrupted
from minem.files import read_rows, write_rows
from minem.generation.generator import Generator
from minem.model.tokenizer import Tokenizer
from minem.model.weights import read_weights, save
from minem.runs.stages import Run, Stage

KEPT = 2  # checkpoints on the disk
STEPS = "steps.jsonl"  # in a checkpoint, the metrics of the steps before it


class Checkpoints:
    """Those of one M-step, which continues from the newest intact one. minutes: between two of them."""

    def __init__(self, stage: Stage, mstep: MStep, minutes: float) -> None:
        self.stage, self.run, self.mstep = stage, stage.run, mstep
        self.seconds, self.last = 60 * minutes, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        if newest := self.run.ranks.broadcast(self._newest_intact()):
            folder = self.run.path / f"iter-{stage.iteration:02d}" / f"checkpoint.{newest}"
            mstep.load(folder)
            self.rows += read_rows(folder / STEPS)
        for row in self.rows:
            stage.log(**row)

    def _newest_intact(self) -> int:
        """The step of the newest intact checkpoint, on the first rank; newer ones are undone. 0: none."""
        if (directory := self.run.directory) is not None:
            for step in reversed(self.run.parts(self.stage.iteration, "mstep")):
                if not directory.damaged(f"{self.stage.name}.{step}"):
                    return step
                for undone in directory.undo(f"{self.stage.name}.{step}"):
                    del self.run.results[undone]
        return 0

    def after_step(self, row: dict[str, Any]) -> None:
        """On all ranks: log and show a step; write a checkpoint if one is due, or if any is to stop (Interrupted)."""
        self.rows.append(row)
        self.stage.log(**row)
        self.stage.line.total = row["steps"]
        peak = next(value for key, value in row.items() if key.startswith("peak_"))
        facts = {key: row[key] for key in ("loss", "grad_norm", "lr")} | {"tokens_per_s": row["tokens_per_second"]}
        self.stage.line.update(row["step"], **facts, peak_memory=f"{peak / 1e9:.2f} GB")
        ranks, stop = self.run.ranks, self.run.stop
        stopped = ranks.any(bool(stop))
        if stopped or ranks.any(ranks.first and time.monotonic() - self.last > self.seconds):
            self._write(row["step"])
        if stopped:
            why = f"by {stop.signal}" if stop else "with another process"
            where = f"after step {row['step']} of {row['steps']} of {self.stage.name}"
            raise Interrupted(f"stopped {why} {where}: give the same command again to resume")

    def _write(self, step: int) -> None:
        def save_state(stage: Stage) -> None:
            folder = stage.path(f"checkpoint.{step}")
            self.mstep.save(folder)
            if self.run.ranks.first:
                write_rows(folder / STEPS, self.rows)

        self.run.commit(f"{self.stage.name}.{step}", self.stage.line, save_state, writes=3 * self.mstep.master_bytes)
        for old in self.run.parts(self.stage.iteration, "mstep")[:-KEPT]:
            self.run.discard(self.stage.iteration, f"checkpoint.{old}")
        self.last = time.monotonic()


def export(stage: Stage, mstep: MStep, tokenizer: Tokenizer, model_id: str, card: str, continues: bool) -> None:
    """Write the trained model as a Hugging Face folder, LoRA's adapter, and the state if M-steps continue from it."""
    stage.line.update(now="saving the model")
    release_cached_memory(mstep.model.device)
    if mstep.state_bytes and (continues or mstep.lora is not None):
        mstep.save(stage.path("state"))
    adapter = mstep.masters.complete() if mstep.lora is not None else {}
    if stage.run.ranks.first:
        if mstep.lora is not None:
            mstep.lora.save(stage.path("adapter"), adapter, model_id)
        model = stage.path("model")
        save(mstep.model, tokenizer, model)
        (model / "README.md").write_text(card, encoding="utf-8")


def export_bytes(mstep: MStep) -> int:
    """Bytes that `export` writes, about."""
    model = mstep.model
    return sum(p.numel() * model.stored_dtype.itemsize for p in model.parameters()) + mstep.state_bytes


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
