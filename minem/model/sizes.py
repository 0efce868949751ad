"""The size of a decoder, from its config alone: parameters, and the bytes that training keeps.

minem train --dry-run
"""

from dataclasses import dataclass

import torch

from minem.kernels.cross_entropy import chunk_rows_of
from minem.model.hf_config import ModelConfig

SAFE_SHARE = 0.9  # the share of free memory to plan with: allocators leave gaps


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by part; they sum to what `Model.parameters()` counts."""

    embeddings: int
    body: int  # all but embeddings and head: the blocks and the last norm
    head: int  # 0 if the head is the embeddings

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
    head = 0 if config.tie_word_embeddings else vocabulary
    return Parameters(embeddings=vocabulary, body=config.num_hidden_layers * block + width, head=head)


def activation_bytes(
    config: ModelConfig, tokens: int, supervised: int, checkpointed: int, dtype: torch.dtype, device: str
) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, without those of `loss_bytes`.

    tokens: that enter the model; supervised: that reach the head. checkpointed: blocks that keep their input alone,
    recomputed one at a time. device: "cuda" for the Triton kernels, "cpu" for the eager ones, which keep more.
    """
    width, size = config.hidden_size, dtype.itemsize
    blocks = config.num_hidden_layers - checkpointed
    whole = max(blocks, min(checkpointed, 1)) * _block_bytes(config, size, device)
    inputs = checkpointed * 2 * width * size  # the residual stream, and the output of the block before
    last = width * size * (2 if device == "cpu" else 1)
    return tokens * (whole + inputs + last) + supervised * width * size


def loss_bytes(config: ModelConfig, supervised: int, dtype: torch.dtype, device: str, trained: bool) -> int:
    """Bytes at the peak of `linear_cross_entropy`. trained: the head gets a gradient; under LoRA it does not."""
    vocabulary, size = config.vocab_size, dtype.itemsize
    rows = min(supervised, chunk_rows_of(supervised, vocabulary * size, device))  # of one chunk of logits
    # Eager: shifted logits and their exponentials in float32, and the logits themselves if these are narrower.
    chunk = rows * vocabulary * (size if device == "cuda" else 8 + (size if size < 4 else 0))
    weight = vocabulary * config.hidden_size if trained else 0
    # The weight's gradient in float32, then its copy in the dtype of the weight.
    return weight * 4 + max(chunk, weight * size)


def _block_bytes(config: ModelConfig, size: int, device: str) -> int:
    """Bytes that one block keeps of each token."""
    width, inner, channels = config.hidden_size, config.intermediate_size, config.head_dim
    heads, turned = config.num_attention_heads, (config.num_attention_heads + config.num_key_value_heads) * channels
    numbers = 4 * width  # input and output of two norms
    numbers += _merged(config) + turned + heads * channels  # q, k, v before and after the rotation, and the result
    numbers += 3 * inner  # gate, up, and the input of the last matrix
    statistics = 2 + heads  # of the norms, and of the softmax, in float32
    if device == "cpu":
        numbers += 2 * width + inner  # normed rows before their weight, silu(gate)
        numbers += heads * channels  # the results of sequences of different lengths, before `torch.cat`
        numbers += config.qk_norm * turned  # normed queries and keys before their weight
    if config.qk_norm:
        statistics += heads + config.num_key_value_heads
    return numbers * size + statistics * 4


def _merged(config: ModelConfig) -> int:
    """Rows of the merged projection: queries, keys and values."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
