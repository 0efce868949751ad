"""Random models in the shapes of real ones, minem's and transformers', and how transformers draws from them.

Imported by the other scripts here.

python -c "import sys; sys.path.insert(0, 'bench'); from models import *; print(config_of(SMALL))"
"""

from __future__ import annotations

from typing import Any

import torch
from resources import Shape

from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig

SMALL = Shape("small", 256, 8, 4, 32, 704, 16_384)
LAYERS = {"small": 6, "qwen2.5-0.5b": 24, "qwen2.5-3b": 36, "llama-3.2-1b": 16, "llama-3.2-3b": 28}


def config_of(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "qwen2" if shape.name.startswith("qwen2.5") else "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": LAYERS[shape.name],
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape is not SMALL,
        "rms_norm_eps": 1e-6,
    }


@torch.no_grad()
def random_model(shape: Shape, device: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(config_of(shape))).to(dtype)
    model = model.to_empty(device=device).eval()
    if model.config.tie_word_embeddings:  # to_empty gave both a memory of their own
        model.head.weight = model.embed.weight
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
    return model


def random_peer(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """transformers' model of the same shape."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fields = config_of(shape)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def their_draws(model: Any, prompts: list[list[int]], draws: int, new: int, **more: Any) -> int:
    """transformers' `generate` for all prompts in one batch; returns the tokens drawn."""
    longest = max(map(len, prompts))
    model.set_attn_implementation("sdpa")  # continuous batching leaves its own behind
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # its default top_k is 50
    lengths = {"num_return_sequences": draws, "max_new_tokens": new, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **sampling, **lengths, **more)
    return out.shape[0] * (out.shape[1] - longest)


def their_continuous_draws(model: Any, prompts: list[list[int]], draws: int, new: int) -> int:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch([p for p in prompts for _ in range(draws)], config)
    return sum(len(result.generated_tokens) for result in out.values())
