"""The decoder: Llama 2/3.x, Qwen2/2.5 and Qwen3 in one file, from the whole model down to its parts.

    python -c "import minem, torch; m, t = minem.load('toy'); print(m(torch.tensor([t.encode('2 + 2')])).shape)"

Tokens are *packed*: one flat row of N tokens from any number of sequences, [N, D], without batch dimension or padding.
Only attention depends on which token belongs to which sequence, so the model takes attention as a function (`Attend`):
packed causal attention for training, the same plus a write into the cache for prefill, attention over the cache for
decoding. The rest of the network is written once for all three.

Shape suffixes: N packed tokens, D width, H query heads, K key/value heads, C channels of a head, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minem.kernels import linear_cross_entropy, rms_norm, rotary, swiglu
from minem.model.hf_config import ModelConfig, RopeConfig


class Attend(Protocol):
    """Attention as the model calls it: once per layer, for all packed tokens."""

    def __call__(self, layer: int, qkv: Tensor, **turn: Any) -> Tensor:
        """The merged projection [N, H + 2 K, C] -> [N, H, C]. turn: how q and k rotate, arguments of `rotary`."""


class Model(nn.Module):
    """A decoder-only language model with merged projections, which weights.py maps to the files.

    `checkpointed`: the number of layers, from the first, that recompute their activations in the backward pass (Chen et
    al. 2016, arXiv 1604.06174). Each keeps two [N, D] tensors instead, and training takes up to a third longer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointed = 0
        # From an empty table: without PyTorch's random initialisation, which a checkpoint overwrites anyway.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.stored_dtype = self.dtype  # of the files: `read_weights` sets it, and `save` writes it

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at these positions [N] int64, each [N, C/2] in the model's dtype."""
        rope = self.config.rope
        angle = positions.float()[:, None] * inverse_frequencies(rope, self.config.head_dim, self.device)
        cos, sin = ((x * rope.attention_factor).to(self.dtype) for x in (angle.cos(), angle.sin()))
        return cos, sin

    def hidden(self, input_ids: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Final normed hidden states [N, D] of packed tokens [N] int64. rotation: of their positions."""
        cos, sin = rotation
        x, residual = self.embed(input_ids), None
        # Nothing in a layer is random, so there is no random state to restore.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        recomputed = self.checkpointed if torch.is_grad_enabled() else 0
        for number, layer in enumerate(self.layers):
            run = partial(recompute, layer) if number < recomputed else layer
            x, residual = run(x, residual, cos, sin, attend)
        return self.norm(x, residual)[0]

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int] | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        branching: bool = False,
    ) -> Any:
        """Logits of tokens, or their loss if `rows` and `targets` are given.

        Args:
            input_ids: int64 [B, T], or packed [N] when `lengths` is given.
            lengths: of the packed sequences, summing to N.
            rows: int64 [R], the packed positions that predict a supervised token. Only these reach the head, inside
                forward, so that the hooks of FSDP run around all parameters.
            targets: int64 [R], the supervised tokens.
            token_weights: [R], one for each target; None: all 1.
            branching: the other sequences continue the first one, each for itself.
        Returns:
            logits [B, T, V] or [N, V], or (loss, token_logprobs [R], token_entropy [R]) with
            loss = -sum(weight * logprob), undivided (`minem.kernels.linear_cross_entropy`).
        """
        if lengths is None:
            lengths = [input_ids.shape[1]] * input_ids.shape[0]
        starts = [0, *[lengths[0] * branching] * (len(lengths) - 1)]
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        attend = PackedAttention(lengths, input_ids.device, starts, branching)
        with torch.cuda.device_of(input_ids):  # Triton launches on the current device
            hidden = self.hidden(input_ids.flatten(), self.rotation(upload(positions, input_ids.device)), attend)
            if rows is None or targets is None:
                return self.head(hidden).unflatten(0, input_ids.shape)
            return linear_cross_entropy(hidden[rows], self.head.weight, targets, token_weights)


class Layer(nn.Module):
    """One block. `x` is the previous block's output, not yet added to the residual stream: the next norm adds it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.attention_norm(x, residual)
        normed, residual = self.mlp_norm(self.attention(normed, cos, sin, attend), residual)
        return self.mlp(normed), residual


class Attention(nn.Module):
    """Grouped-query attention with one merged projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.channels, self.eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        merged = (self.heads + 2 * config.num_key_value_heads) * self.channels
        self.qkv = Linear(config.hidden_size, merged, bias=config.qkv_bias)
        self.o = Linear(self.heads * self.channels, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.channels, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.channels, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.channels))  # [N, H + 2K, C]
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        turn = {"cos": cos, "sin": sin, "heads": self.heads, "q_norm": q_norm, "k_norm": k_norm, "eps": self.eps}
        return self.o(attend(self.layer, qkv, **turn).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) with one merged projection for gate and up (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x, or of x + residual: the addition before a norm is part of the same kernel."""
        return rms_norm(x, self.weight, self.eps, residual)


class Linear(nn.Linear):
    """Without PyTorch's random initialisation, as the embeddings."""

    def reset_parameters(self) -> None:
        pass


@lru_cache(maxsize=16)
def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Angle per position of each channel pair, float32 [C/2]: theta^(-2i/C), scaled by the rule `rope.type`."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float()
    frequency = 1.0 / rope.theta ** (channels / head_dim)
    if rope.type == "linear":
        return frequency / rope.factor
    if rope.type == "llama3":
        # Short wavelengths stay, long ones are divided by `factor`, those between are blended (Llama 3.1's model card).
        wavelength, low, high = 2 * math.pi / frequency, rope.low_freq_factor, rope.high_freq_factor
        blend = ((rope.original_length / wavelength - low) / (high - low)).clamp(0, 1)
        return frequency * (blend + (1 - blend) / rope.factor)
    if rope.type == "yarn":
        # Peng et al. 2023, arXiv 2309.00071, section 3.2: interpolate the channels with fewer than `beta_slow`
        # rotations within the original length, keep those with more than `beta_fast`, ramp between.
        def channel_of(rotations: float) -> float:
            return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = channel_of(rope.beta_fast), channel_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0  # as transformers: no division by zero
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
        return frequency * (1 - ramp) + frequency / rope.factor * ramp
    return frequency


def upload(values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor on the device. The copy to a GPU is asynchronous: the host does not wait."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host.to(device)


@lru_cache(maxsize=1)
def varlen_attention() -> Callable[..., Any]:
    """PyTorch's causal flash attention over packed sequences.

    Its arguments: q [N, H, C], k and v [M, K, C], the starts of the sequences in either, the longest length in either.
    Of a sequence with more keys than queries the queries are the last ones.
    """
    from torch.nn.attention.varlen import varlen_attn  # imported late: it loads the compiler

    # The kernel supports fewer key/value heads than query heads; torch above 2.11 wants a flag for it.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


def takes_varlen(q: Tensor) -> bool:
    """Whether this PyTorch was built with the flash kernel, and it supports this dtype and head size on this device."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in range(8, 257, 8)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


class PackedAttention:
    """Causal attention inside each packed sequence, never across them. An `Attend`.

    On a GPU in half precision the flash kernel takes the packed row. Elsewhere consecutive sequences of one length form
    a rectangle [B, T]: no padding, and a sequence's result does not depend on the sequences packed beside it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str,
        starts: Sequence[int] | None = None,
        branching: bool = False,
    ):
        """starts: positions before each sequence that it attends to as well; their keys and values precede its own,
        or are those of the first sequence if `branching`."""
        self.branches = list(lengths) if branching else []
        ends = [start + length for start, length in zip(starts or [0] * len(lengths), lengths, strict=True)]
        self.longest = max(lengths, default=0), max(ends, default=0)
        self.rectangles = [(len(list(run)), *shape) for shape, run in groupby(zip(lengths, ends, strict=True))]
        # The start of each sequence in q and in k and the end of the last, uploaded once for all layers.
        self.starts = [upload(list(accumulate(x, initial=0)), device, torch.int32) for x in (lengths, ends)]

    def __call__(self, layer: int, qkv: Tensor, **turn: Any) -> Tensor:
        return self.packed(*rotary(qkv, **turn))

    def packed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, C], k and v [M, K, C], rotated -> [N, H, C]."""
        if self.branches:
            first, *others = zip(k.split(self.branches), v.split(self.branches), strict=True)
            k, v = map(torch.cat, zip(first, *(x for other in others for x in (first, other)), strict=True))
        if takes_varlen(q):
            return varlen_attention()(q, k, v, *self.starts, *self.longest)
        queries, keys = ([count * sizes[i] for count, *sizes in self.rectangles] for i in (0, 1))
        parts = zip(self.rectangles, q.split(queries), k.split(keys), v.split(keys), strict=True)
        done = [self._rectangle(*(x.unflatten(0, (n, -1)) for x in part)).flatten(0, 1) for (n, *_), *part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    @staticmethod
    def _rectangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal grouped-query attention over [B, T, H, C] and [B, L, K, C]: the queries are those of the last T."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped, start = q.shape[1] != k.shape[1], k.shape[2] - q.shape[2]
        if grouped and q.is_cuda:  # grouped heads in float32 would take the path that holds [T, L] scores for each
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(start) if start else None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not start, enable_gqa=grouped).transpose(1, 2)
