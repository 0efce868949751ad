"""The M-step: raise the log-probability of the kept samples; how they are cut into micro-batches does not matter.

    mstep = MStep(model, MStepSection(lr=1e-5))
    summary = mstep.run(examples, seed=0, iteration=1, on_step=print)

Watch it at work with `minem train --samples FILE.jsonl`.

The loss of an optimizer step is -sum(weight * log pi(token)) over its sampled tokens, divided by one constant for the
whole iteration: its supervised tokens / its optimizer steps. Dividing by the tokens of each step (or micro-batch)
instead would weigh long rationales down, and the sum would no longer be the gradient that EM asks for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from minem.config import MStepSection
from minem.device import free_memory, out_of_memory, peak_flops, peak_memory, release_cached_memory
from minem.em import masters as trainstate
from minem.em.packing import Example, MicroBatch, Step, pack, plan
from minem.errors import GuardError, Interrupted, NotFinite, UserError, some
from minem.model.decoder import Model
from minem.model.lora import LoRA, adapter_parameters
from minem.model.sizes import SAFE_SHARE, activation_bytes, flops, loss_bytes
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.sharding import complete, gather_weights, local, scatter, sharded_copy


def learning_rate(config: MStepSection, step: int, steps: int) -> float:
    """The rate of update `step` of `steps` (counted from 0): no update is wasted on a rate of exactly 0."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / (steps - warm)
    if config.schedule == "linear":
        return config.lr * left
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 - math.cos(math.pi * left))
    return config.lr


def loss_divisor(examples: Sequence[Example], steps_per_epoch: int) -> float:
    """The one constant that every loss of an iteration is divided by: its supervised tokens / its optimizer steps.

    All epochs have the same tokens and the same number of steps, so one epoch gives the iteration's ratio.
    """
    return sum(len(example.token_ids) for example in examples) / steps_per_epoch


@dataclass(frozen=True)
class Totals:
    """Sums over the supervised tokens of one optimizer step, or of many."""

    loss: float = 0.0  # -sum(weight * logprob), not divided
    entropy: float = 0.0  # nats
    tokens: int = 0  # that entered the model
    supervised: int = 0
    weight: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.loss + other.loss,
            self.entropy + other.entropy,
            self.tokens + other.tokens,
            self.supervised + other.supervised,
            self.weight + other.weight,
        )


class MStep:
    """Trains a model in place. Keeps float32 master weights from one iteration to the next.

    At learning rates of 1e-6 an update is far below the spacing of bfloat16 numbers and would be lost, so AdamW works
    on float32 masters and the working weights are their rounded copy. A float32 model is its own master.
    Frozen parameters (requires_grad False) are left alone.

    With `lora_rank`, masters and working copies are those of the adapters, which `run` merges into the model's weights.

    Among several processes the masters are those of a second model, which is replicated or split (`minem.parallel.sharding`),
    and `model` gets their values when an M-step is done.

    Args:
        seed: of new adapters. base: the folder of the weights that the model holds now. Both matter to LoRA only.
    """

    def __init__(
        self, model: Model, config: MStepSection, ranks: Ranks = ALONE, seed: int = 0, base: Path | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
        self.lora: LoRA | None = None
        if config.lora_rank:
            if base is None:
                raise ValueError("LoRA merges into the base weights, so it needs the folder that they can be read from")
            self.lora = LoRA(model, config.lora_rank, config.lora_alpha, config.lora_targets, seed, base)
        self.strategy = "alone" if ranks.size == 1 else self._strategy()
        self.trained, self.working = model, self._trainable()
        if ranks.size > 1:
            with self._adapters():
                self.trained = sharded_copy(model, ranks, self.strategy == "ddp")
            named = self.trained.named_parameters() if self.lora is None else adapter_parameters(self.trained).items()
            self.working = {name: p for name, p in named if p.requires_grad}
        self.pack_tokens = config.pack_tokens  # less where memory ran out
        self.on_note: Callable[[str], None] = lambda text: None  # told what memory had us change
        self.optimizer: torch.optim.AdamW | None = None
        self.history: list[tuple[Totals, float, float]] = []  # of the M-step under way: its steps' sums, norms, seconds
        self.losses: list[float] = []  # of the steps of the last M-step that ended
        self.masters: dict[str, torch.Tensor] = {}
        self.reset()

    def _trainable(self) -> dict[str, torch.Tensor]:
        """What of the model is trained, by the names of its parameters, or of the adapters' in PEFT."""
        if self.lora is not None:
            return dict(self.lora.named_parameters())
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _adapters(self) -> AbstractContextManager[None]:
        return nullcontext() if self.lora is None else self.lora.attached()

    def _strategy(self) -> str:
        """How several processes share the masters: each has all of them where that fits, else each its part."""
        self.strategy = "ddp"
        if self.config.parallel != "auto":
            return self.config.parallel
        # The second model (`sharded_copy`) is still to be made: float32 where it is trained, the rest as it is.
        copied = self.master_bytes + sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        needed = copied + self.memory_needed(self.model.config.num_hidden_layers)
        return "fsdp" if self.ranks.any(needed > self.room()) else "ddp"

    def room(self) -> int:
        """Bytes that this process may plan with; on the CPU all processes have one memory in common."""
        share = self.ranks.size if self.model.device.type == "cpu" else 1
        return int(SAFE_SHARE * free_memory(self.model.device) / share)

    def reset(self) -> None:
        """Take the model's present weights as the masters; call it whenever someone else has written the weights.

        With LoRA these must be the base model's, and the adapters are new ones.
        """
        self.optimizer, self.history = None, []
        if self.lora is not None:
            self.lora.reset()
        if self.trained is not self.model:
            with self._adapters():
                scatter(self.model, self.trained)
        self.masters = {
            name: p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_()
            for name, p in self.working.items()
        }

    def memory_needed(self, checkpointed: int = 0) -> int:
        """Bytes that a full micro-batch takes beside weights and masters: gradients, AdamW's state, activations, loss.

        checkpointed: blocks whose activations are computed again instead of kept.
        """
        config, tokens, kind = self.model.config, self.config.pack_tokens, self.model.device.type
        trained = sum(p.numel() for p in self._trainable().values())
        state = trained * 3 * torch.float32.itemsize // (self.ranks.size if self.strategy == "fsdp" else 1)
        kept = activation_bytes(config, tokens, tokens, checkpointed, self.model.dtype, kind)
        return state + kept + loss_bytes(config, tokens, self.model.dtype, kind, trained=self.lora is None)

    def _checkpointed(self) -> int:
        """Of how many blocks the activations are computed again in the backward pass; with "auto", as few as fit."""
        blocks = self.model.config.num_hidden_layers
        if self.config.checkpointing != "auto":
            return blocks if self.config.checkpointing == "full" else 0
        room = self.room()
        return next((n for n in range(blocks) if self.memory_needed(n) <= room), blocks)

    # ----------------------------------------------------------------------------------------------- on the disk

    @property
    def state_needed(self) -> bool:
        """Whether the next M-step goes on from more than the model's weights, which `save` then has to keep."""
        narrow = any(p.dtype.itemsize < 4 for p in self._trainable().values())
        return narrow or self.lora is not None or self.config.optimizer_state == "keep"

    @property
    def state_bytes(self) -> int:
        """Bytes that `save` writes between two M-steps, about."""
        return self.master_bytes * (1 + len(trainstate.MOMENTS) if self.config.optimizer_state == "keep" else 1)

    @property
    def master_bytes(self) -> int:
        return sum(p.numel() for p in self._trainable().values()) * torch.float32.itemsize

    def save(self, folder: Path) -> None:
        """Write the masters, AdamW's state where there is one, and how far an M-step that is under way has come.

        All processes must call it; the first one writes. What is written does not depend on how many they are.
        """
        history = [[*astuple(totals), norm, seconds] for totals, norm, seconds in self.history]
        trainstate.write(folder if self.ranks.first else None, self.masters, self.optimizer, history)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of processes. UserError if it is of another model."""
        self.optimizer, history = trainstate.read(folder, self.masters, self._optimizer)
        self.history = [(Totals(*sums), norm, seconds) for *sums, norm, seconds in history]
        self._publish()
        if not self.history:
            self._hand_over()

    # --------------------------------------------------------------------------------------------------- training

    def run(
        self,
        examples: Sequence[Example],
        seed: int,
        iteration: int,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Train on the examples for the configured epochs; after `load`, from where that M-step was.

        Args:
            on_step: called after every update with its metrics: loss and entropy per supervised token (nats; the loss
                weighted as the examples are), grad_norm before clipping, lr, tokens_per_second (prompts included), mfu
                (model FLOP/s over the device's dense bfloat16 peak; None where that is not known) and, under a name
                that says of what (`peak_memory`), the most bytes held so far. An entropy that is not finite is None.
                It may call `save`.

        Returns:
            the same over the whole M-step, grad_norm as the mean; the loss of the first and the last step, and counts:
            examples, steps, micro_batches, tokens, supervised_tokens, seconds.

        Raises:
            GuardError: nothing to train on; or a loss or gradient is not finite (before the weights are touched).
            UserError: token ids that the model does not have.
        """
        self._check(examples)
        config = self.config
        steps = self._plan(examples, seed, iteration)
        divisor = loss_divisor(examples, len(steps) // config.epochs)
        self.trained.checkpointed = self._checkpointed()
        if self.optimizer is None:
            self.optimizer = self._optimizer()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        # The model itself has adapters while it trains; the other processes' one has them for good.
        with self._adapters() if self.trained is self.model else nullcontext(), self._gradients_to_masters():
            for number in range(len(self.history), len(steps)):
                started = time.perf_counter()
                rate = learning_rate(config, number, len(steps))
                while (totals := self._accumulated(examples, steps[number], divisor)) is None:
                    steps = self._plan(examples, seed, iteration)
                step = steps[number]
                norm = self._guarded_norm(examples, step, totals)
                self._update(self.optimizer, norm, rate)
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize()  # or the update would count as a part of the next step
                seconds = time.perf_counter() - started
                self.history.append((totals, float(complete(norm)), seconds))
                if on_step is not None:
                    row: dict[str, Any] = {"iteration": iteration, "epoch": step.epoch}
                    row |= {"step": number + 1, "steps": len(steps), "lr": rate, "grad_norm": self.history[-1][1]}
                    on_step(row | self._metrics(totals, seconds))
        self._check_weights()
        self._hand_over()
        history, self.history = self.history, []
        self.losses = [totals.loss / totals.weight for totals, _, _ in history]
        if config.optimizer_state == "reset":
            self.optimizer = None
        totals = sum((totals for totals, _, _ in history), Totals())
        seconds = sum(taken for _, _, taken in history)
        return {
            "examples": len(examples),
            "steps": len(steps),
            "micro_batches": sum(len(step.micro_batches) for step in steps),
            "checkpointed": self.trained.checkpointed,
            "seconds": seconds,
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "grad_norm": sum(norm for _, norm, _ in history) / len(history),
            **self._metrics(totals, seconds),
        }

    def _plan(self, examples: Sequence[Example], seed: int, iteration: int) -> list[Step]:
        return plan(
            [len(example) for example in examples],
            batch_size=self.config.batch_size,
            pack_tokens=self.pack_tokens,
            epochs=self.config.epochs,
            seed=seed,
            iteration=iteration,
            ranks=self.ranks.size,
        )

    def _accumulated(self, examples: Sequence[Example], step: Step, divisor: float) -> Totals | None:
        """`accumulate`; None where memory ran out and the step is to be tried again in a way that takes less."""
        try:
            return self.accumulate(examples, step, divisor)
        except BaseException as error:
            if not out_of_memory(error):
                raise
        self._take_less_memory(step)  # out here the error is gone, which holds on to the memory of where it arose
        return None

    def _take_less_memory(self, step: Step) -> None:
        """Compute activations again where that is left to us, else halve the micro-batches. The result is the same."""
        self._clear_gradients()
        release_cached_memory(self.model.device)
        blocks = self.model.config.num_hidden_layers
        if self.ranks.size > 1:  # the others are inside a collective by now
            raise Interrupted(
                f"memory ran out in the M-step of one of {self.ranks.size} processes; go on with "
                f"mstep.pack_tokens below {self.pack_tokens}, mstep.checkpointing = full, or mstep.parallel = fsdp"
            )
        if self.config.checkpointing == "auto" and self.trained.checkpointed < blocks:
            self.trained.checkpointed = blocks
            self.on_note("memory ran out: the activations of all blocks are computed again from here on")
        elif all(len(micro_batch) == 1 for micro_batch in step.micro_batches):
            raise Interrupted(
                "memory ran out in the M-step with one sequence at a time; go on with mstep.checkpointing = full, "
                "or start anew with mstep.lora_rank or a smaller sampler.max_new_tokens"
            )
        else:
            self.pack_tokens //= 2
            self.on_note(f"memory ran out: micro-batches have {self.pack_tokens} tokens at most from here on")

    def accumulate(self, examples: Sequence[Example], step: Step, divisor: float) -> Totals:
        """Add the gradient of loss / divisor, over the micro-batches of a step, to `.grad`; no weight changes.

        Inside `run` that is the masters' `.grad`, otherwise the working weights'. Returns the sums of all processes.
        """
        device = next(iter(self.working.values())).device
        losses, entropies, tokens, supervised, weight = [], [], 0, 0, 0.0
        own = step.share(self.ranks.rank, self.ranks.size)
        for number, micro_batch in enumerate(own):
            members = [examples[i] for i in micro_batch]
            packed = (pack(members) if members else _stand_in(examples)).to(device)
            if isinstance(self.trained, FSDPModule):  # replicas need each other's gradients once only
                self.trained.set_requires_all_reduce(number + 1 == len(own))
            loss, _, entropy = self.trained(
                packed.input_ids,
                lengths=packed.lengths,
                rows=packed.rows,
                targets=packed.targets,
                token_weights=packed.token_weights,
            )
            (loss / divisor).backward()
            if not members:
                continue
            # Kept as tensors: reading a number here would make the host wait for the device at every micro-batch.
            losses.append(loss.detach().double())
            entropies.append(entropy.double().sum())
            tokens += sum(packed.lengths)
            supervised += len(packed.targets)
            weight += sum(example.weight * len(example.token_ids) for example in members)
        sums = self.ranks.total([float(sum(losses)), float(sum(entropies)), tokens, supervised, weight])
        return Totals(sums[0], sums[1], int(sums[2]), int(sums[3]), sums[4])

    def _check_weights(self) -> None:
        """The last update has no loss after it that would show what it did."""
        odd = [name for name, master in self.masters.items() if not local(master).isfinite().all()]
        if self.ranks.any(bool(odd)):
            raise GuardError(f"weights are not finite after the last update ({some(odd)}); lower mstep.lr")

    def _check(self, examples: Sequence[Example]) -> None:
        if not examples:
            raise GuardError("no sample was accepted, so there is nothing to train on")
        vocabulary = self.model.config.vocab_size
        for example in examples:
            highest = max(max(example.prompt_ids), max(example.token_ids))
            lowest = min(min(example.prompt_ids), min(example.token_ids))
            if highest >= vocabulary or lowest < 0:
                wrong = highest if highest >= vocabulary else lowest
                raise UserError(
                    f"example {example.id!r}: token id {wrong} is outside the model's vocabulary of {vocabulary}; "
                    "the samples must come from a model with the same tokenizer"
                )

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (self.config.beta1, self.config.beta2)
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.config.lr, betas=betas, fused=True)

    @contextmanager
    def _gradients_to_masters(self) -> Iterator[None]:
        """While open, each working gradient moves to its float32 master as soon as autograd has finished it.

        So micro-batches are summed in float32, and no complete set of low-precision gradients ever exists.
        """

        def move(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

            return hook

        self._clear_gradients()
        handles = [
            parameter.register_post_accumulate_grad_hook(move(self.masters[name]))
            for name, parameter in self.working.items()
            if self.masters[name] is not parameter
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._clear_gradients()

    def _clear_gradients(self) -> None:
        for tensor in (*self.masters.values(), *self.working.values()):
            tensor.grad = None

    def _norm(self) -> torch.Tensor:
        return nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    def _guarded_norm(self, examples: Sequence[Example], step: Step, totals: Totals) -> torch.Tensor:
        """The norm of the step's gradient; a GuardError that names the examples if it or the loss is not finite."""
        norm = self._norm()
        if math.isfinite(totals.loss) and math.isfinite(complete(norm)):
            return norm
        culprits = [i for i in step.examples if not self._finite_alone(examples, i)] or step.examples
        numbers = {"loss": totals.loss, "gradient_norm": float(complete(norm))}
        raise NotFinite(
            f"loss {totals.loss:g} and gradient norm {numbers['gradient_norm']:g} are not both finite, so the weights "
            f"were not updated; examples at fault: {some([examples[i].id for i in culprits])}",
            {
                **{name: repr(value) for name, value in numbers.items()},
                "step": len(self.history) + 1,
                "all_of_step": len(culprits) == len(step.examples),
                "examples": [vars(examples[i]) for i in culprits],
            },
        )

    def _finite_alone(self, examples: Sequence[Example], index: int) -> bool:
        self._clear_gradients()
        totals = self.accumulate(examples, Step(0, ((index,),) * self.ranks.size), 1.0)
        return math.isfinite(totals.loss) and math.isfinite(complete(self._norm()))

    def _update(self, optimizer: torch.optim.AdamW, norm: torch.Tensor, rate: float) -> None:
        if self.config.clip > 0:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the working weights."""
        for name, master in self.masters.items():
            if master is not self.working[name]:
                self.working[name].copy_(master)

    def _hand_over(self) -> None:
        """Give the generator's model what was trained: the adapters merged, the weights of several processes."""
        if self.lora is not None:
            self.lora.merge(self.complete_masters())
        elif self.trained is not self.model:
            gather_weights(self.trained, self.model)

    def _metrics(self, totals: Totals, seconds: float) -> dict[str, Any]:
        device = self.model.device
        entropy, peak = totals.entropy / totals.supervised, peak_flops(device)
        work = flops(self.model.config, totals.tokens, totals.supervised)
        return {
            "loss": totals.loss / totals.weight,
            "entropy": entropy if math.isfinite(entropy) else None,
            "tokens": totals.tokens,
            "supervised_tokens": totals.supervised,
            "tokens_per_second": totals.tokens / seconds,
            "mfu": None if peak is None else work / seconds / (peak * self.ranks.size),
            **peak_memory(device),
        }

    def complete_masters(self) -> dict[str, torch.Tensor]:
        """The float32 masters, whole; a collective among several processes."""
        return {name: complete(master.detach()) for name, master in self.masters.items()}


def _stand_in(examples: Sequence[Example]) -> MicroBatch:
    """For a process that a step has no micro-batch for: it must do as the others do, but adds nothing."""
    packed = pack([min(examples, key=len)])
    return replace(packed, token_weights=torch.zeros_like(packed.token_weights))
