"""What a model weighs, in parameters, floating-point operations and bytes, from its config alone.

    minem train --dry-run                # these numbers for a run, before it is made
    python bench/memory.py --table       # and for models of 0.5B to 8B on GPUs of 24, 80 and 141 GB

Nothing here allocates memory, loads weights or needs a GPU. Counts are exact; the bytes of activations are those of the
tensors that autograd keeps for the backward pass. `e_step` and `m_step` are what a device holds at the most, by part:
the parts of each sum to its peak.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from minem.cache import MIN_ROWS, cache_bytes, fitting_slots
from minem.engine import PREFILL_TOKENS
from minem.kernels.cross_entropy import CHUNK_BYTES
from minem.model import ModelConfig

SAFE_SHARE = 0.9  # of the free memory that is planned with: allocators leave gaps
# On the CPU the gaps are part of the plan: what glibc's heap holds between tensors that stay and tensors that come and
# go, as a share of what training allocates. Chosen on the runs of 59 M parameters that the tests check, too: gaps of 14
# to 22 %, less what the plan overstates elsewhere. Mapping every tensor by itself (MALLOC_MMAP_THRESHOLD_) left none.
# Among several processes FSDP makes and frees whole blocks all the time: gaps of 51 and 74 % there.
HEAP_GAPS = 0.1
HEAP_GAPS_AMONG_SEVERAL = 0.5

# Dense bfloat16 peak by the words of torch's device name, FLOP/s, as NVIDIA's data sheets are quoted (they print twice
# as much where they count sparsity). The first row whose words are all there holds: the SXM form of a card comes last.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 836e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by part; they sum to what `Model.parameters()` counts."""

    embeddings: int
    body: int  # all but embeddings and head: the blocks and the last norm
    head: int  # 0 where the head is the embeddings

    @property
    def total(self) -> int:
        return self.embeddings + self.body + self.head


def parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters, exactly, from its config."""
    width, inner, channels = config.hidden_size, config.intermediate_size, config.head_dim
    queries, merged = config.num_attention_heads * channels, _merged(config)
    block = width * (merged + queries + 3 * inner) + 2 * width  # the matrices, and two norms
    block += config.qkv_bias * merged + config.o_bias * width + config.mlp_bias * (2 * inner + width)
    block += config.qk_norm * 2 * channels
    vocabulary = config.vocab_size * width
    return Parameters(
        embeddings=vocabulary,
        body=config.num_hidden_layers * block + width,
        head=0 if config.tie_word_embeddings else vocabulary,
    )


def lora_parameters(config: ModelConfig, rank: int, targets: str = "all") -> int:
    """Parameters of LoRA's terms: for each target, A [rank, in] and B [out, rank].

    targets: linear layers of the blocks under Hugging Face's names, with commas; or "all".
    """
    width, inner, channels = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * channels, config.num_key_value_heads * channels
    sizes = {  # in + out
        "q_proj": width + queries,
        "k_proj": width + keys,
        "v_proj": width + keys,
        "o_proj": queries + width,
        "gate_proj": width + inner,
        "up_proj": width + inner,
        "down_proj": inner + width,
    }
    names = {name.strip() for name in targets.split(",")}  # naming one twice makes one of it
    return config.num_hidden_layers * rank * sum(sizes[name] for name in (sizes if "all" in names else names))


def flops(config: ModelConfig, tokens: int, supervised: int) -> int:
    """Floating-point operations of forward and backward, as MFU counts them: 6 for each weight that a token meets.

    6 x (body parameters x tokens + head parameters x supervised). The head's are V x D, tied or not, for the product is
    made in either case; looking a token up in the embeddings is no arithmetic. Attention and whatever is computed again
    are not counted.

    tokens: that enter the model. supervised: that reach the head.
    """
    head = config.vocab_size * config.hidden_size
    return 6 * (parameters(config).body * tokens + head * supervised)


def peak_flops(device: torch.device | str) -> float | None:
    """The dense bfloat16 peak of a device in FLOP/s; None where it is not known, as for the CPU.

    device: a torch device, or the name that `torch.cuda.get_device_name` gives.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    words = set(re.split(r"[\s\-]+", device))
    return next((peak for name, peak in PEAK_FLOPS if words.issuperset(name.split())), None)


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    supervised: int,
    checkpointed: int,
    dtype: torch.dtype,
    device: str = "cuda",
) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, the loss and its workspace apart.

    Args:
        tokens: that enter the model.
        supervised: of them, those that reach the head.
        checkpointed: blocks that keep their input alone. The backward pass makes one of them whole at a time.
        device: "cuda", where the Triton kernels run, or "cpu", whose eager references keep more.
    """
    width, size = config.hidden_size, dtype.itemsize
    blocks = config.num_hidden_layers - checkpointed
    whole = max(blocks, min(checkpointed, 1)) * _block_bytes(config, size, device)
    inputs = checkpointed * 2 * width * size  # the residual stream, and what the block before adds to it
    last = width * size * (2 if device == "cpu" else 1)
    return tokens * (whole + inputs + last) + supervised * width * size


def loss_bytes(
    config: ModelConfig, supervised: int, dtype: torch.dtype, device: str = "cuda", trained: bool = True
) -> int:
    """Bytes that `linear_cross_entropy` takes at its peak beside what `activation_bytes` counts.

    trained: whether the head gets a gradient, as it does but under LoRA.
    """
    weight = config.vocab_size * config.hidden_size if trained else 0
    # The weight's gradient in float32, and then its copy, scaled and in the dtype of the weight.
    return weight * 4 + max(_chunk_bytes(config, supervised, dtype, device), weight * dtype.itemsize)


# ------------------------------------------------------------------------------------------------ the two steps of EM


@dataclass(frozen=True)
class Work:
    """What a run asks of memory at the most: all that its bytes depend on beside the model's shape and dtype."""

    slots: int  # sequences that are generated at once
    prompt: int  # tokens of the longest prompt
    new: int  # most tokens that are drawn for one
    tokens: int  # of the largest micro-batch
    supervised: int  # of these
    micro_batches: int  # most in one optimizer step
    checkpointed: int = 0  # blocks
    adapters: int = 0  # parameters of LoRA; 0: all of the model's are trained
    two_models: bool = False  # hinted draws come from a copy of the base model, which has a cache of its own
    moments_kept: bool = False  # AdamW's, from one M-step to the next
    ranks: int = 1  # processes that train together, each on a device of its own; all numbers above are one process's
    split: bool = False  # among several: "fsdp", each has its part of what is trained; else "ddp", each has all of it


def e_step(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> dict[str, int]:
    """Bytes that the device holds at most while drawing and evaluating, by part.

    device: "cuda" or "cpu", where the pages of the cache that nobody has written to take no memory yet.
    """
    scoring = work.tokens * _passing_bytes(config, dtype.itemsize, device)
    scoring += _chunk_bytes(config, work.supervised, dtype, device)
    parts = _resident(config, dtype, work) | {"generator": max(_drawing_bytes(config, dtype, device, work), scoring)}
    return parts | ({"AdamW moments": 8 * _trained_here(config, work)} if work.moments_kept else {})


def m_step(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> dict[str, int]:
    """Bytes that the device holds at most while training, by part; the cache is among them, as long as there is room.

    With a single micro-batch in each step, the gradients grow while the activations go: then the part of the gradients
    is only what they exceed the others by. The loss's workspace is gone when the backward pass reaches the blocks.
    """
    trained = _trained_here(config, work)
    activations = activation_bytes(config, work.tokens, work.supervised, work.checkpointed, dtype, device)
    loss = loss_bytes(config, work.supervised, dtype, device, trained=not work.adapters)
    head = 0 if work.adapters else config.vocab_size * config.hidden_size * dtype.itemsize
    # The backward pass of one MLP: the gradients of its output, its product, and gate and up.
    channels = 2 * config.hidden_size + (5 if device == "cpu" else 3) * config.intermediate_size
    loss = max(loss, head + work.tokens * channels * dtype.itemsize)
    gradients = 4 * trained
    if work.micro_batches == 1:
        gradients = max(0, gradients - activations - loss)
    parts = {
        "gradients": gradients,
        "AdamW moments": 8 * trained,
        "activations": activations,
        "loss or backward": loss,
    }
    if work.ranks > 1:
        parts["gathered weights and gradients"] = _gathered_bytes(config, dtype, work)
    if device == "cpu":
        parts["gaps in the heap"] = int(
            (HEAP_GAPS if work.ranks == 1 else HEAP_GAPS_AMONG_SEVERAL) * sum(parts.values())
        )
    return _resident(config, dtype, work) | parts


def fitted(
    config: ModelConfig, dtype: torch.dtype, device: str, work: Work, free: int, checkpointing: str = "auto"
) -> Work:
    """The work as a run will do it with `free` bytes: as many slots and, under "auto", as few recomputed blocks as fit.

    The cache is given back for an M-step that does not fit beside it, before anything is recomputed. What does not fit
    whatever is done comes back with one slot, or with all blocks recomputed.
    """
    beside = sum(n for part, n in e_step(config, dtype, device, work).items() if part not in ("KV cache", "generator"))
    slots = fitting_slots(config, dtype, work.slots, work.prompt - 1, work.new, max(0, free - beside))
    blocks = config.num_hidden_layers
    fewest = {"off": 0, "full": blocks}.get(checkpointing)
    if fewest is None:
        works = (replace(work, slots=slots, checkpointed=n) for n in range(blocks))
        fewest = next((one.checkpointed for one in works if trains(config, dtype, device, one, free)), blocks)
    return replace(work, slots=slots, checkpointed=fewest)


def trains(config: ModelConfig, dtype: torch.dtype, device: str, work: Work, free: int) -> bool:
    """Whether the M-step fits into `free` bytes once the cache has been given back."""
    parts = m_step(config, dtype, device, work)
    return sum(parts.values()) - parts["KV cache"] <= SAFE_SHARE * free


def _trained_here(config: ModelConfig, work: Work) -> int:
    """Parameters of which this process has float32 masters, gradients and moments."""
    return math.ceil((work.adapters or parameters(config).total) / (work.ranks if work.split else 1))


def _gathered_bytes(config: ModelConfig, dtype: torch.dtype, work: Work) -> int:
    """What FSDP makes whole for a moment: weights to compute with, and gradients to be summed, in float32.

    Embeddings and head stay whole while a micro-batch lasts; of the blocks, one is at work and the next is on its way.
    """
    counted = parameters(config)
    block = counted.body // config.num_hidden_layers
    weights = (counted.embeddings + counted.head + 2 * block) * dtype.itemsize
    gradients = work.adapters // config.num_hidden_layers if work.adapters else max(block, counted.total - counted.body)
    return weights + gradients * (dtype.itemsize + 4)


def _resident(config: ModelConfig, dtype: torch.dtype, work: Work) -> dict[str, int]:
    """What is there all the time."""
    weights = parameters(config).total * dtype.itemsize
    parts = {"weights": weights}
    if work.two_models:
        parts["base model for hints"] = weights
    if work.adapters:
        parts["adapters"] = work.adapters * dtype.itemsize
    if dtype.itemsize < 4 or work.ranks > 1:  # a float32 model of a single process is its own master
        parts["float32 masters"] = 4 * _trained_here(config, work)
    if work.adapters and work.ranks > 1:
        parts["frozen weights of the M-step"] = weights // (work.ranks if work.split else 1)
    cache = cache_bytes(config, dtype, work.slots, work.prompt - 1, work.new)
    return parts | {"KV cache": cache * (2 if work.two_models else 1)}


def _drawing_bytes(config: ModelConfig, dtype: torch.dtype, device: str, work: Work) -> int:
    """The larger of what filling the cache with prompts and decoding a token for every slot take on their way."""
    tokens = min(work.slots * work.prompt, max(PREFILL_TOKENS, work.prompt))
    rows, passing = max(work.slots, MIN_ROWS), _passing_bytes(config, dtype.itemsize, device)
    # Eager sampling holds float32 logits, their exponentials, and these once more under a temperature.
    logit = dtype.itemsize if device == "cuda" else 12 + (dtype.itemsize if dtype.itemsize < 4 else 0)
    decoding = rows * (passing + config.vocab_size * logit)
    return max(tokens * passing, decoding)


def _passing_bytes(config: ModelConfig, size: int, device: str) -> int:
    """Bytes of each token while it passes through a block and nothing is kept: the larger of attention and MLP."""
    channels = config.head_dim
    turned = (config.num_attention_heads + config.num_key_value_heads) * channels
    attention = _merged(config) + turned + 2 * config.num_attention_heads * channels
    mlp = (4 if device == "cpu" else 3) * config.intermediate_size
    return (3 * config.hidden_size + max(attention, mlp)) * size


def _chunk_bytes(config: ModelConfig, supervised: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the logits of `linear_cross_entropy`, a chunk of rows at a time."""
    vocabulary, size = config.vocab_size, dtype.itemsize
    rows = min(supervised, max(64, CHUNK_BYTES[device] // (vocabulary * size)))
    # Eager, shifted logits and their exponentials in float32, beside the logits themselves where these are narrower.
    return rows * vocabulary * (size if device == "cuda" else 8 + (size if size < 4 else 0))


def _block_bytes(config: ModelConfig, size: int, device: str) -> int:
    """Bytes that one block keeps of each token."""
    width, inner, channels = config.hidden_size, config.intermediate_size, config.head_dim
    heads, turned = config.num_attention_heads, (config.num_attention_heads + config.num_key_value_heads) * channels
    eager = device == "cpu"
    numbers = 4 * width  # what each of two norms read, and what it wrote
    numbers += _merged(config) + turned + heads * channels  # q, k, v before the rotation and after, and the result
    numbers += 3 * inner  # gate, up, and what enters the last matrix
    statistics = 2 + heads  # of the norms, and of the softmax, in float32
    if eager:
        numbers += 2 * width + inner  # normed rows before their weight, silu(gate)
        numbers += heads * channels  # the results of sequences of different lengths, before they are joined
        numbers += config.qk_norm * turned  # normed queries and keys before their weight
    if config.qk_norm:
        statistics += heads + config.num_key_value_heads
    return numbers * size + statistics * 4


def _merged(config: ModelConfig) -> int:
    """Rows of the merged projection: queries, keys and values."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
