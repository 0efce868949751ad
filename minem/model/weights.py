"""A Hugging Face checkpoint folder <-> a `Model` and a `Tokenizer`.

    python -c "import minem; m, t = minem.load('toy'); minem.save(m, t, 'copy')"

Queries, keys and values are one merged parameter in the model and three tensors in the file, gate and up one and two.
`checkpoint_views` gives each tensor of the file as a slice of a parameter, into which reading copies from the
memory-mapped file: there is never a second copy of the weights in memory.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minem.errors import UserError, reason, some
from minem.files import own_file, read_json
from minem.hub import download
from minem.model.decoder import Model
from minem.model.hf_config import ARCHITECTURES, ModelConfig
from minem.model.sizes import parameters
from minem.model.tokenizer import FILES, TEMPLATES, Tokenizer, copy_files

TOY = Path(__file__).parents[1] / "data" / "toy" / "model"
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", *FILES, TEMPLATES]
SHARD_BYTES = 5 * 2**30
FILE_NAMES = "model{suffix}.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPY_BYTES = 4 * 2**20
INDEX_LIMIT = 16 * 2**20  # bytes of a shard index, which names every tensor
# The model's modules (those of a block without its name) and the checkpoint's, which are merged in this order.
PARTS: dict[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.o": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}


def load(
    folder_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer, ready for evaluation and for training.

    folder_or_hub_id: a local Hugging Face folder, a hub id ("Qwen/Qwen2.5-0.5B-Instruct"), or "toy".
    device: "meta" checks the folder and copies no weights. revision: branch, tag or commit on the hub.
    Raises UserError for a broken or missing file, and for tensors that do not fit the config.
    """
    folder = resolve(folder_or_hub_id, revision)
    model, tokenizer = load_model(folder, device, dtype), Tokenizer.from_folder(folder)
    if beyond := [id_ for id_ in tokenizer.eos_ids if id_ >= model.config.vocab_size]:
        raise UserError(f"{folder}: eos_token_id {min(beyond)} is beyond the vocab_size of {model.config.vocab_size}")
    return model, tokenizer


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model of a local folder. UserError for what is not supported."""
    return ModelConfig.from_dict(read_json(own_file(folder, "config.json")), str(folder / "config.json"))


def load_model(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model of a local folder; see `load`."""
    config = read_config(folder)
    wanted, size = parameters(config).total, sum(path.stat().st_size for path in _weight_files(folder))
    if wanted > size:  # checked before memory is allocated: a weight takes a byte or more
        raise UserError(f"{folder}: config.json asks for {wanted:,} weights, but its files have {size:,} bytes")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Model(config)
    finally:
        torch.set_default_dtype(default)
    read_weights(model, folder)
    return model.eval()


def read_weights(model: Model, folder: Path) -> None:
    """Overwrite the parameters of `model` in place with those of a folder; UserError lists tensors that do not fit."""
    views = checkpoint_views(model)
    tied = rf"|^{HEAD}$" if model.config.tie_word_embeddings else ""
    ignored = re.compile(r"rotary_emb\.inv_freq$|^(v_head|value_head|score)\." + tied)  # value heads are of no use here
    missing, problems, head = set(views), list[str](), None
    for path in _weight_files(folder):
        try:
            # The library checks that tensors are adjacent and have the sizes of their shapes.
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 (not a dict)
                    name = stored if stored in views else f"model.{stored}"  # a base model's names lack "model."
                    missing.discard(name)
                    if name not in views:
                        problems += [] if ignored.search(stored) else [f"unexpected {stored}"]
                    elif problem := _misfit(source := file.get_slice(stored), views[name]):
                        problems.append(f"{name} {problem}")
                    elif not views[name].is_meta:
                        _copy_rows(source, views[name])
                    if stored == HEAD and model.config.tie_word_embeddings:
                        head = file.get_tensor(stored)
                    if name == EMBEDDING and not problems:
                        model.stored_dtype = FILE_DTYPES[source.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({reason(error)})") from error
    problems += [f"missing {name}" for name in missing]
    embedding = views[EMBEDDING]
    tied_head = None if problems or embedding.is_meta else head
    if tied_head is not None and not torch.equal(tied_head.to(embedding), embedding):
        problems.append(f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; remove one of the two")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {some(sorted(problems), 8)}")


def _misfit(source: Any, target: Tensor) -> str | None:
    """What is wrong with the dtype or shape of a tensor of the file."""
    shape, dtype = tuple(source.get_shape()), source.get_dtype()
    if dtype not in FILE_DTYPES:
        return f"is stored as {dtype}, not as one of {', '.join(FILE_DTYPES)}"
    return f"has shape {shape} but config.json asks for {tuple(target.shape)}" if shape != target.shape else None


@torch.no_grad()
def _copy_rows(source: Any, target: Tensor) -> None:
    """Copy a tensor of the file a few rows at a time: each read is a temporary copy, and an embedding is large."""
    rows = max(1, COPY_BYTES // max(1, target[:1].nbytes))
    for start in range(0, len(target), rows):
        stop = min(start + rows, len(target))  # slices of the file may not reach beyond it
        target[start:stop].copy_(source[start:stop])


def save(model: Model, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a Hugging Face folder: transformers loads it to the same logits, ids, EOS and chat template.

    The tokenizer's files and generation_config.json are copied byte for byte. The weights have the dtype of the files
    that they were read from, and config.json names it. A file has 5 GiB at most, with an index if there are several.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = dict(model.config.raw)
    raw["architectures"] = raw.get("architectures") or [ARCHITECTURES[model.config.model_type]]
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.stored_dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tokenizer.save(folder)
    copy_files(["generation_config.json"], tokenizer.folder, folder)
    _write_weights(model, folder)


def checkpoint_views(model: Model) -> dict[str, Tensor]:
    """Each tensor of the checkpoint, by its Hugging Face name, as a contiguous view of the model's parameters."""
    config = model.config
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"attention.qkv": (q, kv, kv), "mlp.gate_up": (config.intermediate_size,) * 2}
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied head appears once, as embed
        ((layer, module, kind),) = re.findall(r"^(layers\.\d+\.)?(.+)\.(\w+)$", name)
        prefix = f"model.{layer}" if layer else ""
        slices = parameter.detach().split(sizes.get(module, (len(parameter),)))
        views |= {f"{prefix}{part}.{kind}": view for part, view in zip(PARTS[module], slices, strict=True)}
    return views


def resolve(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: "toy", a folder, or a hub id, downloaded if needed. UserError gives the remedy."""
    name = str(folder_or_hub_id)
    if not name.strip():
        raise UserError("model is empty; give a folder, a hub id, or toy")
    if name == "toy":
        return TOY
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user, this does not
    if os.path.isfile(path / "adapter_config.json") and not os.path.isfile(path / "config.json"):
        raise UserError(f"{path} is a LoRA adapter, not a model; a run has both merged in the folder model beside it")
    if os.path.isdir(path):
        return path
    if os.path.isfile(path) or not re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", name):
        raise UserError(f"model {name!r} is no folder that exists, and no hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    found = download(name, "model", [*HUB_FILES, "model.safetensors"], revision)
    names = _weight_names(found)
    return found if names == ["model.safetensors"] else download(name, "model", names, revision)


def _weight_names(folder: Path) -> list[str]:
    single, index = own_file(folder, "model.safetensors"), own_file(folder, "model.safetensors.index.json")
    if single.exists():
        return [single.name]
    if not index.exists():
        raise UserError(f"{folder}: model.safetensors is missing (other formats are not read; convert to safetensors)")
    names = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    return sorted(set(names.values()))


def _weight_files(folder: Path) -> list[Path]:
    index, names = folder / "model.safetensors.index.json", _weight_names(folder)
    if lost := [name for name in names if Path(name).name != name or not os.path.isfile(folder / name)]:
        raise UserError(f"{index}: weight_map names {lost[0][:200]!r}, which is not a file of this folder")
    return [own_file(folder, name) for name in names]


def _write_weights(model: Model, folder: Path) -> None:
    """Write model.safetensors, or shards of at most SHARD_BYTES with their index."""
    from huggingface_hub import split_state_dict_into_shards_factory

    for old in folder.glob("model*.safetensors*"):  # a single file of an earlier save would hide new shards
        old.unlink()
    views, dtype = checkpoint_views(model), model.stored_dtype
    shards = split_state_dict_into_shards_factory(
        views,
        get_storage_size=lambda view: view.numel() * dtype.itemsize,
        filename_pattern=FILE_NAMES,
        max_shard_size=SHARD_BYTES,
    )
    for name, tensors in shards.filename_to_tensors.items():
        save_file({tensor: views[tensor].to(dtype) for tensor in tensors}, folder / name, {"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read its files
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
