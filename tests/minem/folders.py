"""Small random checkpoints as transformers writes them: what the tests of the engine are checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minem.data.prompts import Prompts, load_prompts

VOCABULARY = 320
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
# The architectures and options of the table in the README, each as the fields that differ from BASE.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True}),
}
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def make_model(kind: str, seed: int = 0, scale: float = 3.0) -> Any:
    """A random transformers model in float32. Its weights are scaled up so that logits are far apart."""
    model_type, fields = SHAPES[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**BASE, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts biases at zero, where they would prove nothing
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(scale)
    return model


def make_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level BPE with a BOS, an EOS and a chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["The best answer is A", "which of these is the question about the answer", "assistant: user: system:"]
    backend.train_from_iterator(words * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)


def make_folder(folder: Path, kind: str = "llama", seed: int = 0, **save: Any) -> Any:
    """Write a whole checkpoint folder and return the transformers model that it holds."""
    model = make_model(kind, seed)
    if save.pop("bfloat16", False):
        model = model.bfloat16()
    model.save_pretrained(folder, **save)
    make_tokenizer(folder)
    return model


def toy_prompts(tokenizer: Any, hint: str = "forward") -> Prompts:
    """Questions in the words of the embedded toy, whatever the tokenizer."""
    return Prompts(tokenizer, load_prompts("toy"), hint=hint)
