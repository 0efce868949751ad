"""config.json of a Hugging Face folder -> `ModelConfig`; what this decoder does not compute is refused by name.

python -c "import minem; print(minem.load('toy')[0].config)"
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from minem.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base, and its scaling beyond the length of pre-training."""

    theta: float = 10_000.0
    type: str = "default"  # "default" | "linear" | "llama3" | "yarn"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_length: int = 0  # llama3, yarn: positions in pre-training
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by this


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; most fields have the names of Hugging Face's config.json."""

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
    rope: RopeConfig = RopeConfig()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as read

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read a parsed config.json (its path is `source`). UserError names a field that is missing or unsupported."""
        _refuse_unsupported(raw, source)
        kind, bias = raw["model_type"], bool(raw.get("attention_bias", False))
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: _positive(raw, name, source) for name in names}
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        groups = _positive(raw, "num_key_value_heads", source, heads)
        if heads % groups:
            raise UserError(f"{source}: num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}")
        # Qwen3's default is 128 for every width; the others divide the width by the heads.
        head_dim = _positive(raw, "head_dim", source, 128 if kind == "qwen3" else width // heads)
        if head_dim % 2:
            raise UserError(f"{source}: head_dim must be even for rotary embedding, not {head_dim}")
        return cls(
            model_type=kind,
            **sizes,
            num_key_value_heads=groups,
            head_dim=head_dim,
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


def _number(raw: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{source}: {key} must be a positive number, not {value!r}")
    return float(value)


def _positive(raw: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise UserError(f"{source}: {key} must be a positive whole number below 2^31, not {value!r}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    """UserError names the first field that asks for what this decoder does not compute."""
    kinds = {"model_type": str, "hidden_act": str, "layer_types": list, "sliding_window": int, "max_window_layers": int}
    kinds |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), bool)
    for key, kind in kinds.items():
        if raw.get(key) is not None and type(raw[key]) is not kind:
            raise UserError(f"{source}: {key} must be of type {kind.__name__}, not {raw[key]!r}")
    if raw.get("model_type") not in ARCHITECTURES:
        raise UserError(f"{source}: model_type {raw.get('model_type')!r} is not one of {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu' is")
    for key, harmless in (("attention_dropout", 0), ("quantization_config", None), ("partial_rotary_factor", 1)):
        if raw.get(key) not in (None, harmless):
            raise UserError(f"{source}: {key} = {raw[key]!r} is not supported; use a checkpoint without it")
    layers = [str(layer) for layer in raw.get("layer_types") or []]
    if set(layers) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{source}: layer_types may only hold 'full_attention', not {sorted(set(layers))}")
    windowed = "sliding_attention" in layers
    if not layers and raw.get("use_sliding_window"):
        windowed = raw.get("max_window_layers", 28) < _positive(raw, "num_hidden_layers", source)
    window = raw.get("sliding_window")
    if windowed and window is not None and window < _positive(raw, "max_position_embeddings", source, 2048):
        raise UserError(f"{source}: sliding_window = {window} is not supported, only full attention is")


def _read_rope(raw: Mapping[str, Any], source: str) -> RopeConfig:
    """Rotary settings, from rope_theta and rope_scaling or from rope_parameters (transformers 5)."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and old and new != old:
        raise UserError(f"{source}: rope_parameters and rope_scaling differ; remove one of the two")
    key = "rope_parameters" if new else "rope_scaling"
    rope = new or old or {}
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
    # A length beside the rope settings (as Phi writes it) comes before the one inside, as in transformers.
    holder = raw if raw.get("original_max_position_embeddings") else rope
    longest = _positive(raw, "max_position_embeddings", source, 2048)
    original = _positive(holder, "original_max_position_embeddings", where, longest)
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor", where), _number(rope, "high_freq_factor", where)
        if low >= high:
            raise UserError(f"{where}: low_freq_factor ({low:g}) must be below high_freq_factor ({high:g})")
        return RopeConfig(theta, kind, factor, low, high, original)
    fast, slow = _number(rope, "beta_fast", where, 32.0), _number(rope, "beta_slow", where, 1.0)
    ramp: dict[str, Any] = {"beta_fast": fast, "beta_slow": slow, "truncate": bool(rope.get("truncate", True))}
    scale = _yarn_attention_factor(rope, factor, where)
    return RopeConfig(theta, kind, factor, original_length=original, attention_factor=scale, **ramp)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float, where: str) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope, "mscale", where)) / scale(_number(rope, "mscale_all_dim", where))
    return scale(1.0)
