"""Float32 masters of the trained parameters, AdamW over them, and both on the disk.

    minem train --set model.dtype=bfloat16 --set run.checkpoint_minutes=1

At a learning rate of 1e-6 an update is far below the spacing of bfloat16 numbers and would be lost. So AdamW works on
float32 masters, and the working weights are their rounded copy. A float32 parameter is its own master, unless the base
model is stored in less: then the exported weights, which the next iteration samples from, are rounded, and masters not.

On the disk (state-00000.safetensors, ... and state.json) tensors are complete, under the names of the parameters, so
any number of ranks resumes what any other number saved. No more of them is complete in memory than one file holds.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minem.config import MStepSection
from minem.errors import UserError, some
from minem.files import read_json
from minem.model.decoder import Model
from minem.model.lora import LoRA, adapter_parameters
from minem.parallel.ranks import Ranks
from minem.parallel.sharding import assign, complete, gather_weights, scatter, sharded_copy

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, by its names in torch
FILE_BYTES = 2 * 2**30  # of one file, about
JSON_LIMIT = 64 * 2**20  # bytes of state.json


def trainable(model: Model, lora: LoRA | None) -> dict[str, nn.Parameter]:
    """The trained parameters by name: those of the model, or the adapters' by their names in PEFT's files."""
    if lora is not None:
        return lora.named_parameters()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Masters(dict[str, Tensor]):
    """The float32 masters, by the names of the parameters.

    One rank trains the generator's `model` in place; several train a second one, replicated or sharded by `strategy`.
    """

    def __init__(self, model: Model, config: MStepSection, lora: LoRA | None, ranks: Ranks, strategy: str) -> None:
        self.model, self.config, self.lora = model, config, lora
        self.trained = model  # what computes the loss
        self.working = trainable(model, lora)  # its trained parameters
        if ranks.size > 1:
            with self._adapters():
                self.trained = sharded_copy(model, ranks, strategy == "ddp")
            named = adapter_parameters(self.trained) if lora else dict(self.trained.named_parameters())
            self.working = {name: p for name, p in named.items() if p.requires_grad}
        self.reset()

    def reset(self) -> None:
        """Start from the model's present weights. With LoRA these must be the base model's, and A and B are new."""
        self.optimizer: torch.optim.AdamW | None = None
        if self.lora is not None:
            self.lora.reset()
        if self.trained is not self.model:
            with self._adapters():
                scatter(self.model, self.trained)
        apart = self.trained is self.model and self.lora is None and self.model.stored_dtype.itemsize < 4
        for name, p in self.working.items():
            own = p.dtype.itemsize >= 4 and not apart
            self[name] = p if own else p.detach().to(torch.float32, copy=True).requires_grad_()

    def _adapters(self) -> AbstractContextManager[None]:
        """While open, the generator's model is the base model with adapters. (A sharded copy has them for good.)"""
        return nullcontext() if self.lora is None else self.lora.attached()

    @contextmanager
    def training(self) -> Iterator[None]:
        """While open, each working gradient moves to its float32 master as soon as autograd has finished it."""
        # So micro-batches are summed in float32, and no complete set of low-precision gradients ever exists.
        self.clear_gradients()
        with ExitStack() as stack:
            stack.callback(self.clear_gradients)
            for p, master in self._rounded():
                stack.enter_context(p.register_post_accumulate_grad_hook(partial(_move_gradient, master)))
            stack.enter_context(self._adapters() if self.trained is self.model else nullcontext())
            yield

    def clear_gradients(self) -> None:
        """Drop the gradients of masters and working weights."""
        for tensor in (*self.values(), *self.working.values()):
            tensor.grad = None

    def gradient_norm(self) -> Tensor:
        """The total norm of all ranks; of sharded gradients it is a distributed tensor (`complete` gathers it)."""
        return nn.utils.get_total_norm([m.grad for m in self.values() if m.grad is not None])

    def step(self, norm: Tensor, rate: float) -> None:
        """Clip the gradients (`norm` is their total norm), update the masters, round them into the working weights."""
        if self.config.clip > 0:
            nn.utils.clip_grads_with_norm_(self.values(), self.config.clip, norm)
        self.optimizer = self.optimizer or self._adamw()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()

    def _adamw(self) -> torch.optim.AdamW:
        matrices = {"params": [m for m in self.values() if m.ndim >= 2], "weight_decay": self.config.weight_decay}
        others = {"params": [m for m in self.values() if m.ndim < 2], "weight_decay": 0.0}
        groups = [group for group in (matrices, others) if group["params"]]
        betas = (self.config.beta1, self.config.beta2)
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=betas, fused=True)

    @torch.no_grad()
    def _publish(self) -> None:
        for p, master in self._rounded():
            p.copy_(master)

    def _rounded(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The working parameters that are copies, each with its master."""
        return [(p, self[name]) for name, p in self.working.items() if self[name] is not p]

    @torch.no_grad()
    def export_weights(self) -> None:
        """Give the generator's model what was trained: merge the adapters, or gather the shards."""
        if self.lora is not None:
            self.lora.merge(self.complete())
        elif self.trained is not self.model:
            gather_weights(self.trained, self.model)
        for p in self.model.parameters():  # rounded as the base's files, so that it is the model that is exported
            if self.model.stored_dtype.itemsize < p.dtype.itemsize:
                p.copy_(p.to(self.model.stored_dtype))

    def complete(self) -> dict[str, Tensor]:
        """All values of all masters, on every rank; a collective."""
        return {name: complete(master.detach()) for name, master in self.items()}

    def save(self, folder: Path | None, history: Sequence[Sequence[float]]) -> None:
        """Write masters, AdamW's moments and a row of numbers for each update so far.
        A collective, since shards are gathered; all ranks but the first give no folder.
        """
        state, files = self._state(), 0
        last = next(reversed(state))
        file: dict[str, Tensor] = {}
        for key, part in state.items():
            gathered = complete(part.detach())
            if folder is not None:
                file[key] = gathered.cpu().contiguous()
            if folder and (key == last or sum(tensor.nbytes for tensor in file.values()) >= FILE_BYTES):
                folder.mkdir(parents=True, exist_ok=True)
                save_file(file, folder / f"state-{files:05d}.safetensors")
                file, files = {}, files + 1
        if folder is not None:
            updates = int(next(iter(self.optimizer.state.values()))["step"]) if self.optimizer else 0
            (folder / "state.json").write_text(json.dumps({"updates": updates, "history": history}), encoding="utf-8")

    @torch.no_grad()
    def load(self, folder: Path) -> list[list[Any]]:
        """Take what `save` wrote, and return its history. UserError if it is of another model."""
        saved = read_json(folder / "state.json", JSON_LIMIT)
        self.optimizer = self._adamw() if saved["updates"] else None
        if self.optimizer is not None:
            for master in self.values():
                moments = {kind: torch.empty_like(master, requires_grad=False) for kind in MOMENTS}
                step = torch.tensor(float(saved["updates"]), device=master.device)
                self.optimizer.state[master] = {"step": step, **moments}
        state = self._state()
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
        if odd := sorted(state.keys() ^ {key for file in files for key in file.keys()}):  # noqa: SIM118 (not a dict)
            raise UserError(f"{folder}: master weights of another model; these names differ: {some(odd)}")
        for file in files:
            for key in file.keys():  # noqa: SIM118
                assign(state[key], file.get_tensor(key))
        self._publish()
        return saved["history"]

    def _state(self) -> dict[str, Tensor]:
        """All tensors that are saved, by their names in the files."""
        state = {f"master.{name}": master for name, master in self.items()}
        if self.optimizer is not None:
            moments = self.optimizer.state
            state |= {f"{kind}.{name}": moments[m][kind] for kind in MOMENTS for name, m in self.items()}
        return state


def _move_gradient(master: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
