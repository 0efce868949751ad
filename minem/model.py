"""The decoder: Llama 2/3.x, Qwen2/2.5 and Qwen3 in one file, read top to bottom in the order in which a token flows.

    python -c "import minem, torch; m, t = minem.load('toy'); print(m(torch.tensor([t.encode('2 + 2')])).shape)"

Tokens travel *packed*: one flat row of N tokens from any number of sequences, [N, D], with no batch dimension and no
padding. Only attention cares which token belongs to which sequence, so the model takes attention as a function
(`Attend`): packed causal attention for training, the same plus a write into the cache for prefill, attention over the
cache for decoding. The rest of the network is written once and does not know which of the three it serves.

Shape suffixes: N packed tokens, D width, H query heads, K key/value heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minem.errors import UserError
from minem.kernels import linear_cross_entropy, rms_norm, rotary, swiglu
from minem.kernels.rope import CacheWrite


class Attend(Protocol):
    """Attention as the model calls it: once per layer, for all packed tokens."""

    def cache_write(self, layer: int) -> CacheWrite | None:
        """Where the layer's new keys and values are also to be written; the rotary embedding does it in passing."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, C], k and v [N, K, C] -> [N, H, C]."""


ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base and how it is stretched beyond the length seen in pre-training."""

    theta: float = 10_000.0
    type: str = "default"  # "default" | "linear" | "llama3" | "yarn"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_length: int = 0  # llama3, yarn: positions seen in pre-training
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by this


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the field names of Hugging Face's config.json where those are shared."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as it was read

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config.json.

        Args:
            raw: the parsed file.
            source: its path, for messages.
        Raises:
            UserError: a field is missing, of the wrong kind, or asks for something that this decoder does not do.
        """
        _refuse_unsupported(raw, source)
        kind = raw["model_type"]
        heads = _positive(raw, "num_attention_heads", source)
        width = _positive(raw, "hidden_size", source)
        # Qwen3's own default is 128 whatever the width; the others divide the width among the heads.
        default_head_dim = 128 if kind == "qwen3" else width // heads
        bias = bool(raw.get("attention_bias", False))
        config = cls(
            model_type=kind,
            vocab_size=_positive(raw, "vocab_size", source),
            hidden_size=width,
            intermediate_size=_positive(raw, "intermediate_size", source),
            num_hidden_layers=_positive(raw, "num_hidden_layers", source),
            num_attention_heads=heads,
            num_key_value_heads=_positive(raw, "num_key_value_heads", source, heads),
            head_dim=_positive(raw, "head_dim", source, default_head_dim),
            rms_norm_eps=_number(raw, "rms_norm_eps", source, 1e-6),
            max_position_embeddings=_positive(raw, "max_position_embeddings", source, 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            o_bias=kind != "qwen2" and bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            rope=_read_rope(raw, source),
            raw=raw,
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{source}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({config.num_key_value_heads})"
            )
        if config.head_dim % 2:
            raise UserError(f"{source}: head_dim must be even for rotary embedding, not {config.head_dim}")
        return config


def _number(raw: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{source}: {key} must be a positive number, not {value!r}")
    return float(value)


def _positive(raw: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"{source}: {key} must be a positive whole number, not {value!r}")
    if value >= 2**31:
        raise UserError(f"{source}: {key} = {value} is beyond any model")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    """Name the first field that asks for what this decoder does not compute; approximating it would be a lie."""
    kinds = {"model_type": str, "hidden_act": str, "layer_types": list, "sliding_window": int, "max_window_layers": int}
    kinds |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), bool)
    for key, kind in kinds.items():
        if raw.get(key) is not None and type(raw[key]) is not kind:
            raise UserError(f"{source}: {key} must be of the kind {kind.__name__}, not {raw[key]!r}")
    if raw.get("model_type") not in ARCHITECTURES:
        raise UserError(f"{source}: model_type {raw.get('model_type')!r} is not one of {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu' is")
    for key, harmless in (("attention_dropout", 0), ("quantization_config", None), ("partial_rotary_factor", 1)):
        if raw.get(key) not in (None, harmless):
            raise UserError(f"{source}: {key} = {raw[key]!r} is not supported; use a checkpoint without it")
    window = raw.get("sliding_window")
    layers = [str(kind) for kind in raw.get("layer_types") or []]
    windowed = "sliding_attention" in layers or (
        not layers
        and raw.get("use_sliding_window")
        and raw.get("max_window_layers", 28) < _positive(raw, "num_hidden_layers", source)
    )
    if windowed and window is not None and window < raw.get("max_position_embeddings", 2048):
        raise UserError(f"{source}: sliding_window = {window} would bite; only full attention is supported")
    if set(layers) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{source}: layer_types may only hold 'full_attention', not {sorted(set(layers))}")


def _read_rope(raw: Mapping[str, Any], source: str) -> RopeConfig:
    """Rotary settings, written as rope_theta + rope_scaling or as transformers 5's rope_parameters."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: {key} must be an object, not {rope!r}")
    where = f"{source}: {key}"
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where}: settings for each kind of layer are not supported, only one for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{where}: rope_type {kind!r} is not one of default, linear, llama3, yarn")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported")
    theta = _number(rope, "rope_theta", where) if "rope_theta" in rope else _number(raw, "rope_theta", source, 10_000.0)
    if theta <= 1:
        raise UserError(f"{where}: rope_theta must be above 1, not {theta:g}")
    if kind == "default":
        return RopeConfig(theta)
    factor = _number(rope, "factor", where)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    # A length beside the rope settings (Phi-style) outranks the one inside, as in transformers.
    holder = raw if raw.get("original_max_position_embeddings") else rope
    original = _positive(
        holder, "original_max_position_embeddings", where, _positive(raw, "max_position_embeddings", source, 2048)
    )
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor", where), _number(rope, "high_freq_factor", where)
        if low >= high:
            raise UserError(f"{where}: low_freq_factor ({low:g}) must be below high_freq_factor ({high:g})")
        return RopeConfig(theta, kind, factor, low, high, original)
    return RopeConfig(
        theta,
        kind,
        factor,
        original_length=original,
        beta_fast=_number(rope, "beta_fast", where, 32.0),
        beta_slow=_number(rope, "beta_slow", where, 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(rope, factor, where),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float, where: str) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope, "mscale", where)) / scale(_number(rope, "mscale_all_dim", where))
    return scale(1.0)


# ------------------------------------------------------------------------------------------- rotary embedding


@lru_cache(maxsize=16)
def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """Angle per position of each channel pair, float32 [C/2]: theta^(-2i/C), stretched as `rope.type` says."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float()
    frequency = 1.0 / rope.theta ** (channels / head_dim)
    if rope.type == "linear":
        return frequency / rope.factor
    if rope.type == "llama3":
        # Short wavelengths stay, long ones are divided, those between are blended (Llama 3.1's model card).
        wavelength = 2 * math.pi / frequency
        blend = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return frequency * (blend.clamp(0, 1) + (1 - blend.clamp(0, 1)) / rope.factor)
    if rope.type == "yarn":
        # Peng et al. 2023, arXiv 2309.00071, section 3.2: interpolate the channels that turn less than `beta_slow`
        # times within the original length, keep those that turn more than `beta_fast` times, ramp between.
        def channel_turning(times: float) -> float:
            return head_dim * math.log(rope.original_length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = channel_turning(rope.beta_fast), channel_turning(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0  # as transformers: a ramp of no width would divide by zero
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
        return frequency * (1 - ramp) + frequency / rope.factor * ramp
    return frequency


# -------------------------------------------------------------------------------------------------- attention


def upload(values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers from the host as a tensor on the device; a GPU takes them in its own time, and the host does not wait."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host.to(device)


@lru_cache(maxsize=1)
def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's flash attention over packed sequences, made causal; None where this PyTorch was built without it.

    Called with q [N, H, C], k and v [N, K, C], the sequences' starts and the longest of them, twice each.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # here, for it brings in the compiler
    except ImportError:
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    # The kernel takes fewer key/value heads than query heads. torch 2.11 passes them on; later ones ask for leave.
    told: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **told)


def takes_varlen(q: Tensor) -> bool:
    """Whether the flash kernel computes in this dtype, for heads of this size, on this device."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and varlen_attention() is not None
    )


class PackedAttention:
    """Causal attention inside each of several packed sequences; none can see another. An `Attend`.

    On a GPU in half precision the flash kernel takes them as they are. Elsewhere each sequence is a rectangle of its
    own, together with its neighbours of the same length: no padding, no gathers, and the same arithmetic for a sequence
    whatever it is packed with.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str):
        self.lengths, self.device = list(lengths), device
        self.rectangles = [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @cached_property
    def starts(self) -> Tensor:
        """int32 [sequences + 1]: where each begins, and the end of the last; made for the first layer, used by all."""
        return upload(list(accumulate(self.lengths, initial=0)), self.device, torch.int32)

    def cache_write(self, layer: int) -> None:
        """Training caches nothing."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if takes_varlen(q):
            attention, longest = varlen_attention(), max(self.lengths)
            assert attention is not None
            return attention(q, k, v, self.starts, self.starts, longest, longest)
        sizes = [count * length for count, length in self.rectangles]
        parts = zip(self.rectangles, *(x.split(sizes) for x in (q, k, v)), strict=True)
        done = [self._rectangle(*(x.unflatten(0, shape) for x in part)).flatten(0, 1) for shape, *part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    @staticmethod
    def _rectangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal grouped-query attention over [B, T, H, C] and [B, T, K, C]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ the network


class Linear(nn.Linear):
    """Without PyTorch's random start, which a checkpoint would overwrite; whoever trains from nothing sets his own."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Without PyTorch's random start, as `Linear`."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x, or of x + residual: the addition before a norm is part of the same kernel."""
        return rms_norm(x, self.weight, self.eps, residual)


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
        q, k, v = rotary(
            self.qkv(x).unflatten(-1, (-1, self.channels)),  # [N, H + 2K, C]
            cos,
            sin,
            self.heads,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.eps,
            cache=attend.cache_write(self.layer),
        )
        return self.o(attend(self.layer, q, k, v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) with one merged projection for gate and up (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Layer(nn.Module):
    """One block. `x` is what the last block adds to the residual stream, not added yet: the next norm does both."""

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


class Model(nn.Module):
    """A decoder-only language model. Its merged projections are the real parameters; see weights.py for the files.

    `checkpointed`: the activations of the first so many layers are not kept for the backward pass but computed again
    in it (Chen et al. 2016, arXiv 1604.06174): of each such layer two [N, D] tensors stay, for a third more time.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointed = 0
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def hidden(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final normed hidden states [N, D] of packed tokens [N] at their positions [N], both int64."""
        rope = self.config.rope
        angle = positions.float()[:, None] * inverse_frequencies(rope, self.config.head_dim, self.device)
        cos = (angle.cos() * rope.attention_factor).to(self.dtype)
        sin = (angle.sin() * rope.attention_factor).to(self.dtype)
        x, residual = self.embed(input_ids), None
        recomputed = self.checkpointed if torch.is_grad_enabled() else 0
        for number, layer in enumerate(self.layers):
            if number < recomputed:
                # Nothing in a layer is random, so there is no random state to keep.
                keep = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
                x, residual = keep(x, residual, cos, sin, attend)
            else:
                x, residual = layer(x, residual, cos, sin, attend)
        return self.norm(x, residual)[0]

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int] | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Any:
        """Logits of a rectangle of tokens, or the loss of packed sequences.

        Args:
            input_ids: int64 [B, T], or packed [N] when `lengths` is given.
            lengths: lengths of the packed sequences, summing to N. They cannot see each other.
            rows: int64 [R], the packed positions whose hidden state predicts a supervised token. Only these reach
                the head, inside forward, so that hooks of wrapped models fire around all parameters.
            targets: int64 [R], the supervised tokens.
            token_weights: [R], the weight of each log-probability; all 1 where absent.
        Returns:
            logits [B, T, V] for a rectangle, else (loss, token_logprobs [R], token_entropy [R]) where
            loss = -sum(weight * logprob), undivided (`minem.kernels.linear_cross_entropy`).
        """
        if lengths is None:
            batch, steps = input_ids.shape
            hidden = self._packed_hidden(input_ids.flatten(), [steps] * batch)
            return self.head(hidden).unflatten(0, (batch, steps))
        hidden = self._packed_hidden(input_ids, lengths)
        if rows is None or targets is None:
            raise ValueError("packed sequences need rows and targets: which positions predict which tokens")
        return linear_cross_entropy(hidden[rows], self.head.weight, targets, token_weights)

    def _packed_hidden(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        positions = upload(torch.cat([torch.arange(n) for n in lengths]), input_ids.device)
        return self.hidden(input_ids, positions, PackedAttention(lengths, input_ids.device))
