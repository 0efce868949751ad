"""The model that several processes train: float32 masters, replicated or split among them, by FSDP2.

    minem train --gpus 2 --set mstep.parallel=fsdp

`torch.distributed.fsdp.fully_shard` does both. Data parallel training ("ddp") is its mesh of N replicas of one shard
each, where weights are never gathered and only gradients travel; "fsdp" is the mesh of one replica in N shards. (The
older DistributedDataParallel reduces gradients in the dtype of the weights; bfloat16 sums are not good enough here.)
Each block is one unit: its weights are cast to the working dtype when it is their turn and freed after it, gradients
come back in float32 and are summed in float32, and the optimizer works on the float32 masters of this process alone.

The generator keeps its own complete working weights on every process; `gather` refreshes them from the masters, one
tensor at a time, once per iteration.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minem.model.decoder import Model
from minem.parallel.ranks import Ranks


def sharded_copy(model: Model, ranks: Ranks, replicate: bool) -> Model:
    """A model like `model` whose trained parameters are float32 and live on the mesh, with its present values.

    Parameters that `model` does not train (requires_grad False) keep its dtype.

    replicate: every process holds all of them ("ddp"), or its part only ("fsdp").
    """
    kind = model.device.type
    if replicate:
        mesh = init_device_mesh(kind, (ranks.size, 1), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shards",))
    sharded = _on_meta(model)
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for unit in (*sharded.layers, sharded):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            # Losses are summed over all tokens and divided by one constant, so gradients are summed, too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    sharded.to_empty(device=model.device)
    scatter(model, sharded)
    return sharded


def _on_meta(model: Model) -> Model:
    """A copy without memory: the complete float32 weights of a large model are never on one device."""
    stand_ins: dict[int, Any] = {
        id(p): nn.Parameter(
            torch.empty_like(p, device="meta", dtype=torch.float32 if p.requires_grad else p.dtype), p.requires_grad
        )
        for p in model.parameters()
    }
    return copy.deepcopy(model, stand_ins)


@torch.no_grad()
def scatter(model: Model, sharded: Model) -> None:
    """Set every process's part from the complete weights, which all processes have; nothing travels."""
    for whole, part in zip(model.parameters(), sharded.parameters(), strict=True):
        assign(part, whole)


@torch.no_grad()
def gather(sharded: Model, model: Model) -> None:
    """Round the trained parameters of all processes into the complete weights, one tensor at a time; a collective."""
    for part, whole in zip(sharded.parameters(), model.parameters(), strict=True):
        if whole.requires_grad:
            whole.copy_(complete(part))


def assign(part: Tensor, whole: Tensor) -> None:
    """Set a tensor from the complete values, of which a distributed one takes what is its own."""
    if isinstance(part, DTensor):
        value = whole.to(part.device, part.dtype)
        own = distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
        part.to_local().copy_(own.to_local())
    else:
        part.copy_(whole)


def complete(part: Tensor) -> Tensor:
    """The whole of a tensor on every process; a collective where it is distributed."""
    return part.full_tensor() if isinstance(part, DTensor) else part


def local(part: Tensor) -> Tensor:
    """What of a tensor is on this process."""
    return part.to_local() if isinstance(part, DTensor) else part
