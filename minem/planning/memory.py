"""The memory that an E-step and an M-step need at their peak, by part, from a model's config alone.

    minem train --dry-run                # these numbers for a run, before it is made
    python bench/memory.py --table       # and for models of 0.5B to 8B on GPUs of 24, 80 and 141 GB

The parts of `e_step` and `m_step` sum to the peak. Activations are what autograd keeps for the backward pass.
"""

import math
from dataclasses import dataclass, replace

import torch

from minem.generation.engine import PREFILL_TOKENS
from minem.generation.kv_cache import MIN_ROWS, cache_bytes, fitting_slots
from minem.model.hf_config import ModelConfig
from minem.model.sizes import SAFE_SHARE, activation_bytes, loss_bytes, parameters

# Of all other parts, for gaps in the heap of a CPU, as runs of 59 M parameters showed. A GPU's gaps are in SAFE_SHARE.
MARGIN, MARGIN_AMONG_SEVERAL = 0.05, 0.3


@dataclass(frozen=True)
class Work:
    """What the bytes of a run depend on beside the model's shape and dtype. All numbers are those of one process."""

    slots: int  # sequences that are generated at once
    prompt: int  # tokens of the longest prompt
    new: int  # most tokens that are drawn for one
    tokens: int  # of the largest micro-batch
    supervised: int  # of these
    micro_batches: int  # most in one optimizer step
    checkpointed: int = 0  # blocks
    adapters: int = 0  # parameters of LoRA; 0: all of the model's are trained
    two_models: bool = False  # hinted draws come from a copy of the base model, which has a cache of its own
    narrow: bool = False  # the files of the base model are narrower than float32, which masters are not
    moments_kept: bool = False  # AdamW's, from one M-step to the next
    ranks: int = 1  # processes that train together, each on a device of its own
    split: bool = False  # among several: "fsdp", each holds its shard of what is trained; else "ddp", each holds all


def e_step(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> dict[str, int]:
    """Bytes that the device holds at most while drawing and evaluating, by part. device: "cuda" or "cpu"."""
    scoring = work.tokens * _passing_bytes(config, dtype.itemsize, device)
    scoring += loss_bytes(config, work.supervised, dtype, device, trained=False)
    parts = _resident(config, dtype, work) | {"generator": max(_drawing_bytes(config, dtype, device, work), scoring)}
    return parts | ({"AdamW moments": 8 * _trained_here(config, work)} if work.moments_kept else {})


def m_step(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> dict[str, int]:
    """Bytes that the device holds at most while training, by part, the cache included."""
    trained = _trained_here(config, work)
    activations = activation_bytes(config, work.tokens, work.supervised, work.checkpointed, dtype, device)
    loss = loss_bytes(config, work.supervised, dtype, device, trained=not work.adapters)
    head = 0 if work.adapters else config.vocab_size * config.hidden_size * dtype.itemsize
    # The backward pass of one MLP: the gradients of its output, its product, and gate and up.
    channels = 2 * config.hidden_size + (5 if device == "cpu" else 3) * config.intermediate_size
    loss = max(loss, head + work.tokens * channels * dtype.itemsize)  # the loss's own is free by then
    # With one micro-batch in each step, gradients grow while activations are freed: only the excess counts.
    overlap = activations + loss if work.micro_batches == 1 else 0
    parts = _resident(config, dtype, work) | {
        "gradients" + (" beyond activations" if overlap else ""): max(0, 4 * trained - overlap),
        "AdamW moments": 8 * trained,
        "activations": activations,
        "loss or backward": loss,
    }
    if work.ranks > 1:
        parts["gathered weights and gradients"] = _gathered_bytes(config, dtype, work)
    if device == "cpu":
        parts["margin"] = int((MARGIN if work.ranks == 1 else MARGIN_AMONG_SEVERAL) * sum(parts.values()))
    return parts


def fitted(config: ModelConfig, dtype: torch.dtype, device: str, work: Work, free: int, checkpointing: str) -> Work:
    """The work as a run does it with `free` bytes: as many slots (one at least) and as few recomputed blocks as fit."""
    beside = sum(n for part, n in e_step(config, dtype, device, work).items() if part not in ("KV cache", "generator"))
    slots = fitting_slots(config, dtype, work.slots, work.prompt - 1, work.new, max(0, free - beside))
    blocks = config.num_hidden_layers
    fewest = {"off": 0, "full": blocks}.get(checkpointing)
    if fewest is None:
        works = (replace(work, slots=slots, checkpointed=n) for n in range(blocks))
        fewest = next((one.checkpointed for one in works if trains(config, dtype, device, one, free)), blocks)
    return replace(work, slots=slots, checkpointed=fewest)


def trains(config: ModelConfig, dtype: torch.dtype, device: str, work: Work, free: int) -> bool:
    """Whether the M-step fits into `free` bytes once the cache is released."""
    parts = m_step(config, dtype, device, work)
    return sum(parts.values()) - parts["KV cache"] <= SAFE_SHARE * free


def _trained_here(config: ModelConfig, work: Work) -> int:
    """Parameters of which this process has float32 masters, gradients and moments."""
    return math.ceil((work.adapters or parameters(config).total) / (work.ranks if work.split else 1))


def _gathered_bytes(config: ModelConfig, dtype: torch.dtype, work: Work) -> int:
    """What FSDP gathers for a moment: weights to compute with, and gradients to be summed, in float32."""
    # Embeddings and head stay gathered during a micro-batch; of the blocks, one is at work and the next on its way.
    counted = parameters(config)
    block = counted.body // config.num_hidden_layers
    weights = (counted.embeddings + counted.head + 2 * block) * dtype.itemsize
    gradients = work.adapters // config.num_hidden_layers if work.adapters else max(block, counted.total - counted.body)
    return weights + gradients * (dtype.itemsize + 4)


def _resident(config: ModelConfig, dtype: torch.dtype, work: Work) -> dict[str, int]:
    """What both steps hold throughout."""
    weights = parameters(config).total * dtype.itemsize
    parts = {"weights": weights}
    if work.two_models:
        parts["base model for hints"] = weights
    if work.adapters:
        parts["adapters"] = work.adapters * dtype.itemsize
    narrow = dtype.itemsize < 4 or (work.narrow and not work.adapters)
    if narrow or work.ranks > 1:  # a float32 model of a single process is its own master
        parts["float32 masters"] = 4 * _trained_here(config, work)
    if work.adapters and work.ranks > 1:
        parts["frozen weights of the M-step"] = weights // (work.ranks if work.split else 1)
    cache = cache_bytes(config, dtype, work.slots, work.prompt - 1, work.new)
    return parts | {"KV cache": cache * (2 if work.two_models else 1)}


def _drawing_bytes(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> int:
    """The larger of the workspaces of prefilling the prompts and of decoding a token for every slot."""
    tokens = min(work.slots * work.prompt, max(PREFILL_TOKENS, work.prompt))
    rows, passing = max(work.slots, MIN_ROWS), _passing_bytes(config, dtype.itemsize, device)
    # Eager sampling holds float32 logits, their exponentials, and these once more under a temperature.
    logit = dtype.itemsize if device == "cuda" else 12 + (dtype.itemsize if dtype.itemsize < 4 else 0)
    decoding = rows * (passing + config.vocab_size * logit)
    return max(tokens * passing, decoding)


def _passing_bytes(config: ModelConfig, size: int, device: str) -> int:
    """Bytes of each token while it passes through a block and nothing is kept: the larger of attention and MLP."""
    # Queries, keys and values, before the rotation and after it, and the result of attention, twice.
    attention = (4 * config.num_attention_heads + 3 * config.num_key_value_heads) * config.head_dim
    mlp = (4 if device == "cpu" else 3) * config.intermediate_size
    return (3 * config.hidden_size + max(attention, mlp)) * size
