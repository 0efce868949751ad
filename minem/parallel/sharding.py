"""The model that several processes train: float32 masters, replicated or sharded by FSDP2.

    minem train --gpus 2 --set mstep.parallel=fsdp

`torch.distributed.fsdp.fully_shard` does both. Data parallel training ("ddp") is its mesh of N replicas of one shard
each, on which weights are never gathered and only gradients travel; "fsdp" is the mesh of one replica in N shards. (The
older DistributedDataParallel reduces gradients in the dtype of the weights; bfloat16 sums are not good enough here.)
Each block is one unit: its weights are cast to the working dtype and gathered for their turn and freed after it,
gradients are summed in float32, and the optimizer works on the float32 masters of this process alone.

The generator keeps its own complete working weights, which `gather_weights` refreshes once per iteration.
"""

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
    """A model with the values of `model` whose trained parameters are float32 and live on the mesh; a collective.

    Frozen parameters keep their dtype. replicate: every process holds all of them ("ddp"), or its shard only ("fsdp").
    """
    shape, names = ((ranks.size, 1), ("replicas", "shards")) if replicate else ((ranks.size,), ("shards",))
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=names)
    # First without memory: the complete float32 weights of a large model are never on one device.
    stand_ins: dict[int, Any] = {}
    for p in model.parameters():
        dtype = torch.float32 if p.requires_grad else p.dtype
        stand_ins[id(p)] = nn.Parameter(torch.empty_like(p, device="meta", dtype=dtype), p.requires_grad)
    sharded = copy.deepcopy(model, stand_ins)
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for unit in (*sharded.layers, sharded):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        assert isinstance(unit, FSDPModule)  # fully_shard adds it to the class
        # Losses are summed over all tokens and divided by one constant, so gradients are summed, too.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    sharded.to_empty(device=model.device)
    scatter(model, sharded)
    return sharded


@torch.no_grad()
def scatter(model: Model, sharded: Model) -> None:
    """Set every process's shards from the complete weights, which all processes have; nothing travels."""
    for full, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        assign(shard, full)


@torch.no_grad()
def gather_weights(sharded: Model, model: Model) -> None:
    """Round the trained parameters of all processes into the complete weights, one tensor at a time; a collective."""
    for shard, full in zip(sharded.parameters(), model.parameters(), strict=True):
        if full.requires_grad:
            full.copy_(complete(shard))


def assign(tensor: Tensor, full: Tensor) -> None:
    """Set a tensor, distributed or not, from the full values; nothing travels."""
    if isinstance(tensor, DTensor):
        value = full.to(tensor.device, tensor.dtype)
        own = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor, full = tensor.to_local(), own.to_local()
    tensor.copy_(full)


def complete(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; a collective if it is distributed."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
