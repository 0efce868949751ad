"""The M-step: raise the weighted log-probability of the kept samples; their cut into micro-batches does not matter.

    minem train --samples runs/first-look/iter-01/samples.jsonl      # the M-step alone

The loss of an optimizer step is -sum(weight * log pi(token)) over its sampled tokens, divided by one constant for the
whole iteration: its supervised tokens / its optimizer steps. Dividing by the tokens of each step (or micro-batch)
instead would weigh long rationales down, and the sum would no longer be the gradient that EM asks for.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from minem.config import MStepSection
from minem.device import free_memory, peak_memory
from minem.em.masters import MOMENTS, Masters, trainable
from minem.em.packing import Example, Step, pack, plan
from minem.errors import GuardError, NotFinite, some
from minem.model.decoder import Model
from minem.model.lora import LoRA
from minem.model.sizes import SAFE_SHARE, activation_bytes, loss_bytes
from minem.model.weights import read_weights
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.sharding import complete, local


def learning_rate(config: MStepSection, step: int, steps: int) -> float:
    """The rate of update `step` of `steps` (counted from 0): no update is wasted on a rate of exactly 0."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / (steps - warm)
    shapes = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}
    return config.lr * shapes[config.schedule]


def loss_divisor(examples: Sequence[Example], steps_per_epoch: int) -> float:
    """Supervised tokens / optimizer steps of an iteration; one epoch gives it, since all epochs are alike."""
    return sum(len(example.token_ids) for example in examples) / steps_per_epoch


class Totals(NamedTuple):
    """Sums over the supervised tokens of one optimizer step, or over several steps."""

    loss: float = 0.0  # -sum(weight * logprob), not divided
    entropy: float = 0.0  # nats
    tokens: int = 0  # that enter the model
    supervised: int = 0
    weight: float = 0.0
    grad_norm: float = 0.0  # before clipping
    seconds: float = 0.0


class MStep:
    """Trains a model in place, and keeps float32 masters (`minem.em.masters`) from one iteration to the next.

    With `lora_rank` adapters are trained, which `run` merges into the model's weights. Several ranks train a second
    model, of which `model` gets the weights at the end of `run`. seed: of new adapters.
    base: the folder of the weights that the model holds now. LoRA and `restart` need it.
    """

    def __init__(
        self, model: Model, section: MStepSection, ranks: Ranks = ALONE, seed: int = 0, base: Path | None = None
    ) -> None:
        self.model, self.config, self.ranks, self.base = model, section, ranks, base
        self.lora: LoRA | None = None
        if section.lora_rank:
            assert base is not None
            self.lora = LoRA(model, section.lora_rank, section.lora_alpha, section.lora_targets, seed, base)
        self.trained_parameters = sum(p.numel() for p in trainable(model, self.lora).values())
        self.master_bytes = self.trained_parameters * torch.float32.itemsize
        self.strategy = "alone"
        if ranks.size > 1:
            self.strategy = section.parallel if section.parallel != "auto" else self._fitting_strategy()
        self.masters = Masters(model, section, self.lora, ranks, self.strategy)
        self.history: list[Totals] = []  # of the steps of an unfinished M-step
        self.losses: list[float] = []  # of the steps of the last finished M-step

    def reset(self) -> None:
        """Start from the model's present weights, which with LoRA must be the base model's."""
        self.history = []
        self.masters.reset()

    def restart(self) -> None:
        """Start from the base model again."""
        assert self.base is not None
        read_weights(self.model, self.base)
        self.reset()

    def room(self) -> int:
        """Bytes that this rank may plan with; on the CPU all ranks share one memory."""
        share = self.ranks.size if self.model.device.type == "cpu" else 1
        return int(SAFE_SHARE * free_memory(self.model.device) / share)

    def memory_needed(self, checkpointed: int = 0) -> int:
        """Bytes of a full micro-batch beside weights and masters, if `checkpointed` blocks recompute activations."""
        config, tokens, kind = self.model.config, self.config.pack_tokens, self.model.device.type
        state = (1 + len(MOMENTS)) * self.master_bytes // (self.ranks.size if self.strategy == "fsdp" else 1)
        kept = activation_bytes(config, tokens, tokens, checkpointed, self.model.dtype, kind)
        return state + kept + loss_bytes(config, tokens, self.model.dtype, kind, trained=self.lora is None)

    def _fitting_strategy(self) -> str:
        """How several ranks share the masters: each has all of them ("ddp") if that fits, else its shard ("fsdp")."""
        # What the second model takes: float32 masters, and a copy of the frozen parameters.
        copied = self.master_bytes + sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        needed = copied + self.memory_needed(self.model.config.num_hidden_layers)
        return "fsdp" if self.ranks.any(needed > self.room()) else "ddp"

    def _checkpointed(self) -> int:
        """How many blocks recompute their activations; with "auto", as few as fit."""
        blocks = self.model.config.num_hidden_layers
        if self.config.checkpointing != "auto":
            return blocks if self.config.checkpointing == "full" else 0
        room = self.room()
        return next((n for n in range(blocks) if self.memory_needed(n) <= room), blocks)

    @property
    def state_bytes(self) -> int:
        """About what `save` writes between two M-steps; 0 if the next one needs no more than the model's weights."""
        moments = len(MOMENTS) if self.config.optimizer_state == "keep" else 0
        narrow = min(self.model.dtype.itemsize, self.model.stored_dtype.itemsize) < 4
        needed = moments or self.lora is not None or narrow
        return self.master_bytes * (1 + moments) if needed else 0

    def save(self, folder: Path) -> None:
        """Write the masters, AdamW's state if there is one, and the steps of an unfinished M-step; on all ranks."""
        self.masters.save(folder if self.ranks.first else None, self.history)

    def load(self, folder: Path) -> None:
        """Take what `save` wrote on any number of ranks. UserError if it is of another model."""
        self.history = [Totals(*sums) for sums in self.masters.load(folder)]
        if not self.history:
            self.masters.export_weights()

    def run(
        self,
        examples: Sequence[Example],
        seed: int,
        iteration: int,
        on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> dict[str, Any]:
        """Train on the examples (at least one) for all epochs; after `load`, from the step that it was saved after.

        on_step: called after every update with its `_metrics`, lr and grad_norm. It may call `save`. Returns `_finish`.
        Raises GuardError for what is not finite, before the weights are touched.
        """
        config, lengths = self.config, [len(example) for example in examples]
        cut = {"batch_size": config.batch_size, "pack_tokens": config.pack_tokens, "epochs": config.epochs}
        steps = plan(lengths, **cut, seed=seed, iteration=iteration, ranks=self.ranks.size)
        divisor = loss_divisor(examples, len(steps) // config.epochs)
        self.masters.trained.checkpointed = self._checkpointed()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        with self.masters.training():
            for number, step in enumerate(steps[len(self.history) :], start=len(self.history)):
                rate = learning_rate(config, number, len(steps))
                totals = self._step(examples, step, divisor, rate)
                self.history.append(totals)
                row = {"iteration": iteration, "epoch": step.epoch, "step": number + 1, "steps": len(steps)}
                on_step({**row, "lr": rate, "grad_norm": totals.grad_norm, **self._metrics(totals)})
        odd = [name for name, master in self.masters.items() if not local(master).isfinite().all()]
        if self.ranks.any(bool(odd)):  # no loss after the last update would show it
            raise GuardError(f"weights are not finite after the last update ({some(odd)}); lower mstep.lr")
        self.masters.export_weights()
        return self._finish(len(examples), steps)

    def _step(self, examples: Sequence[Example], step: Step, divisor: float, rate: float) -> Totals:
        """One update of the weights."""
        started = time.perf_counter()
        totals = self.accumulate(examples, step, divisor)
        norm = self.masters.gradient_norm()
        grad_norm = float(complete(norm))
        if not (math.isfinite(totals.loss) and math.isfinite(grad_norm)):
            raise self._not_finite(examples, step, totals.loss, grad_norm)
        self.masters.step(norm, rate)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # or the update would count as a part of the next step
        return totals._replace(grad_norm=grad_norm, seconds=time.perf_counter() - started)

    def accumulate(self, examples: Sequence[Example], step: Step, divisor: float) -> Totals:
        """Add the gradient of loss / divisor to the masters' `.grad`. Returns sums over all ranks' micro-batches."""
        model, ranks = self.masters.trained, self.ranks
        own = [[examples[i] for i in micro_batch] for micro_batch in step.share(ranks.rank, ranks.size)]
        losses, entropies, weight = [], [], 0.0
        for number, members in enumerate(own):
            # A rank without work takes part with weight zero, since the others wait for it to exchange gradients.
            packed = pack(members or [replace(min(examples, key=len), weight=0.0)], self.model.device)
            if isinstance(model, FSDPModule):  # replicas need each other's gradients once only
                model.set_requires_all_reduce(number + 1 == len(own))
            packed.token_weights.div_(divisor)  # here, for scaling the gradients would take another pass over them
            loss, _, entropy = model(**packed.arguments)
            loss.backward()
            if members:  # kept as tensors: reading a number here would make the host wait for the device
                losses.append(loss.detach().double() * divisor)
                entropies.append(entropy.double().sum())
                weight += sum(example.weight * len(example.token_ids) for example in members)
        mine = [example for members in own for example in members]
        counts = [sum(map(len, mine)), sum(len(example.token_ids) for example in mine)]
        sums = ranks.total([float(sum(losses)), float(sum(entropies)), *counts, weight])
        return Totals(sums[0], sums[1], int(sums[2]), int(sums[3]), sums[4])

    def _not_finite(self, examples: Sequence[Example], step: Step, loss: float, norm: float) -> NotFinite:
        """The error for a step whose loss or gradient is not finite; it names the examples at fault."""
        culprits = [i for i in step.examples if not self._finite_alone(examples, i)] or step.examples
        dump = {"loss": repr(loss), "gradient_norm": repr(norm), "step": len(self.history) + 1}
        dump |= {"all_of_step": len(culprits) == len(step.examples), "examples": [vars(examples[i]) for i in culprits]}
        sentence = f"loss {loss:g} and gradient norm {norm:g} are not both finite, so the weights were not updated; "
        return NotFinite(f"{sentence}examples at fault: {some([examples[i].id for i in culprits])}", dump)

    def _finite_alone(self, examples: Sequence[Example], index: int) -> bool:
        self.masters.clear_gradients()
        totals = self.accumulate(examples, Step(0, ((index,),) * self.ranks.size), 1.0)
        return math.isfinite(totals.loss) and math.isfinite(complete(self.masters.gradient_norm()))

    def _finish(self, examples: int, steps: Sequence[Step]) -> dict[str, Any]:
        """The summary of a finished M-step."""
        totals = Totals(*map(sum, zip(*self.history, strict=True)))
        self.losses = [step.loss / step.weight for step in self.history]
        self.history = []
        if self.config.optimizer_state == "reset":
            self.masters.optimizer = None
        return {
            "examples": examples,
            "steps": len(steps),
            "micro_batches": sum(len(step.micro_batches) for step in steps),
            "checkpointed": self.masters.trained.checkpointed,
            "seconds": totals.seconds,
            "grad_norm": totals.grad_norm / len(steps),
            **self._metrics(totals),
        }

    def _metrics(self, totals: Totals) -> dict[str, Any]:
        """Loss (weighted as the examples are) and entropy (None if not finite) per supervised token, in nats; speed
        and memory. tokens: prompts included."""
        entropy = totals.entropy / totals.supervised
        return {
            "loss": totals.loss / totals.weight,
            "entropy": entropy if math.isfinite(entropy) else None,
            "tokens": totals.tokens,
            "supervised_tokens": totals.supervised,
            "tokens_per_second": totals.tokens / totals.seconds,
            **peak_memory(self.model.device),
        }
