"""A Hugging Face checkpoint folder <-> a `Model` and a `Tokenizer`.

    python -c "import minem; m, t = minem.load('toy'); minem.save(m, t, 'copy')"

Reading goes tensor by tensor from the memory-mapped safetensors file into the model's own parameters, so there is
never a second copy of the weights in anonymous memory. Queries, keys and values are one merged parameter here and
three tensors in the file; `checkpoint_views` says which slice is which, and both directions use it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minem.errors import GuardError, UserError
from minem.files import own_file, parse, read_json
from minem.model.decoder import Model
from minem.model.hf_config import ARCHITECTURES, ModelConfig
from minem.model.tokenizer import Tokenizer

TOY = Path(__file__).parents[1] / "data" / "toy" / "model"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
SHARD_BYTES = 5 * 2**30
FILE_DTYPES = ("F64", "F32", "F16", "BF16")
COPY_BYTES = 4 * 2**20
INDEX_LIMIT = 16 * 2**20  # bytes of a shard index, or of a file's header, which name every tensor
LAYER_LIMIT = 1024
# Our modules (those of a block without its name) and theirs, of which several may be merged into one, in this order.
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

    Args:
        folder_or_hub_id: a local Hugging Face folder, a hub id ("Qwen/Qwen2.5-0.5B-Instruct"), or "toy".
        device: where the weights go; "meta" reads the folder, but not the weights.
        dtype: what the weights become, whatever the file holds.
        revision: branch, tag or commit on the hub.
    Raises:
        UserError: no such folder or repository, a broken or missing file, tensors that do not match the config.
    """
    folder = resolve(folder_or_hub_id, revision)
    model, tokenizer = load_model(folder, device, dtype), Tokenizer.from_folder(folder)
    if beyond := [id_ for id_ in tokenizer.eos_ids if id_ >= model.config.vocab_size]:
        raise UserError(
            f"{folder}: eos_token_id {min(beyond)} is beyond the vocab_size of {model.config.vocab_size} in config.json"
        )
    return model, tokenizer


def load_model(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model of a local folder; see `load`."""
    config = ModelConfig.from_dict(read_json(own_file(folder, "config.json")), str(folder / "config.json"))
    _check_size(config, folder)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Model(config)  # memory that is reserved, not yet touched
    finally:
        torch.set_default_dtype(usual)
    read_weights(model, folder)
    return model.eval()


def _check_size(config: ModelConfig, folder: Path) -> None:
    """Refuse a config that asks for more weights than its files can hold, before any memory is taken for them."""
    heads = (config.num_attention_heads * 2 + config.num_key_value_heads * 2) * config.head_dim
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    vocabularies = 1 if config.tie_word_embeddings else 2
    wanted = config.num_hidden_layers * block + vocabularies * config.vocab_size * config.hidden_size
    there = sum(path.stat().st_size for path in _weight_files(folder))
    if wanted > there:  # a weight takes a byte at the least
        raise UserError(
            f"{folder}: the weights do not fit config.json: {wanted:,} asked for, but files of {there:,} bytes"
        )
    if config.num_hidden_layers > LAYER_LIMIT:  # of one weight each they would fit into small files, and take hours
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers = {config.num_hidden_layers} is beyond any model")


def read_weights(model: Model, folder: Path) -> None:
    """Overwrite the parameters of `model` in place with those of a checkpoint folder of the same shape.

    Raises:
        UserError: a missing, unexpected or misshapen tensor (all of them are listed), or a broken file.
    """
    views = checkpoint_views(model)
    ignored = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if model.config.tie_word_embeddings else ""))
    found: set[str] = set()
    problems: list[str] = []
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape, dtype = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
                if name in views and dtype not in FILE_DTYPES:
                    problems.append(f"{name} is stored as {dtype}, not as one of {', '.join(FILE_DTYPES)}")
                    found.add(name)
                elif name in views and shape == tuple(views[name].shape):
                    if not views[name].is_meta:  # where the shapes alone are wanted, and whether the files have them
                        _copy_rows(file.get_slice(name), views[name])
                    found.add(name)
                elif name in views:
                    problems.append(f"{name} has shape {shape} but config.json asks for {tuple(views[name].shape)}")
                    found.add(name)
                elif not ignored.search(name):
                    problems.append(f"unexpected {name}")
    problems += [f"missing {name}" for name in views.keys() - found]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{folder}: the weights do not fit config.json: {shown}")


def _copy_rows(source: Any, target: Tensor) -> None:
    """Copy a tensor of the file a few rows at a time: each read is a temporary copy, and an embedding is large."""
    rows = max(1, COPY_BYTES // max(1, target[:1].nbytes))
    with torch.no_grad():
        for start in range(0, len(target), rows):
            stop = min(start + rows, len(target))  # slices of the file may not reach beyond it
            target[start:stop].copy_(source[start:stop])


def save(model: Model, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a Hugging Face folder: transformers loads it to the same logits, ids, EOS and chat template.

    The tokenizer's files and generation_config.json are those the model came with, byte for byte; config.json has the
    same fields, and its dtype says what the weights are now. Files of 5 GiB at most, with an index where several.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = dict(model.config.raw)
    raw["architectures"] = raw.get("architectures") or [ARCHITECTURES[model.config.model_type]]
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tokenizer.save(folder)
    generation = own_file(tokenizer.folder, "generation_config.json")
    if generation.exists() and generation.resolve() != (folder / generation.name).resolve():
        shutil.copyfile(generation, folder / generation.name)
    _write_weights(checkpoint_views(model), folder)


def saved_bytes(model: Model) -> int:
    """Bytes of the weights that `save` writes; what stands beside them is small."""
    return sum(view.nbytes for view in checkpoint_views(model).values())


def verify(model: Model, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Read a folder that `save` wrote and compare it with what is in memory: weights, config, ids, EOS, chat template.

    A few rows of a tensor are read at a time, so there is never a second copy of the model.

    Raises GuardError that names what differs.
    """
    folder = Path(folder)
    try:
        problems = _differing_weights(model, folder)
        if ModelConfig.from_dict(read_json(folder / "config.json")) != model.config:
            problems.append("config.json")
        again = Tokenizer.from_folder(folder)
        for name in ("chat_template", "eos_ids", "special_tokens"):
            if getattr(again, name) != getattr(tokenizer, name):
                problems.append(name)
        if again.backend.to_str() != tokenizer.backend.to_str():
            problems.append("tokenizer.json")
    except UserError as error:
        raise GuardError(f"the model that was just written cannot be read again: {error}") from error
    if problems:
        shown = ", ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise GuardError(f"{folder}: what was just written is not the model in memory; these differ: {shown}")


def _differing_weights(model: Model, folder: Path) -> list[str]:
    """Names of tensors that the folder has not, or not bit for bit, or beyond those of the model."""
    views = checkpoint_views(model)
    same: set[str] = set()
    strange: list[str] = []
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name not in views:
                    strange.append(name)
                elif _same_rows(file.get_slice(name), views[name]):
                    same.add(name)
    return [*(name for name in views if name not in same), *strange]


def _same_rows(source: Any, tensor: Tensor) -> bool:
    if tuple(source.get_shape()) != tuple(tensor.shape):
        return False
    rows = max(1, COPY_BYTES // max(1, tensor[:1].nbytes))
    for start in range(0, len(tensor), rows):
        stop = min(start + rows, len(tensor))
        written, held = source[start:stop], tensor[start:stop].cpu()
        if written.dtype != held.dtype or not torch.equal(written.view(torch.uint8), held.view(torch.uint8)):
            return False
    return True


def checkpoint_views(model: Model) -> dict[str, Tensor]:
    """Each tensor of the checkpoint, by its Hugging Face name, as a view of the model's parameters.

    Views of the first dimension are contiguous, so both copying in and writing out need no other layout.
    """
    config = model.config
    parameters = {name: p.detach() for name, p in model.named_parameters()}  # a tied head appears once, as embed
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"attention.qkv": (q, kv, kv), "mlp.gate_up": (config.intermediate_size,) * 2}
    views: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        layer = re.match(r"layers\.\d+\.", name)
        prefix = f"model.{layer[0]}" if layer else ""
        module, kind = name[len(layer[0]) if layer else 0 :].rsplit(".", 1)
        for part, view in zip(PARTS[module], parameter.split(sizes.get(module, (len(parameter),))), strict=True):
            views[f"{prefix}{part}.{kind}"] = view
    return views


def resolve(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: "toy", a folder, or a hub id whose needed files are downloaded or in the cache.

    Raises:
        UserError: neither a folder nor a repository that can be had; the sentence says what to do.
    """
    if not str(folder_or_hub_id).strip():
        raise UserError("model is empty; give a folder, a hub id, or toy")
    if str(folder_or_hub_id) == "toy":
        return TOY
    path = Path(os.path.expanduser(folder_or_hub_id))  # which leaves a user whom nobody knows as it is
    if os.path.isfile(path / "adapter_config.json") and not os.path.isfile(path / "config.json"):
        raise UserError(f"{path} is a LoRA adapter, not a model; a run has both merged in the folder model beside it")
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder_or_hub_id)):
        raise UserError(
            f"model {str(folder_or_hub_id)!r} is neither a folder nor a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    from minem.hub import download

    return download(str(folder_or_hub_id), "model", HUB_FILES, revision)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [own_file(folder, single.name)]
    if not index.is_file():
        raise UserError(f"{folder}: model.safetensors is missing (other formats are not read; convert to safetensors)")
    names = read_json(own_file(folder, index.name), INDEX_LIMIT).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    for name in sorted(set(names.values())):
        if Path(name).name != name or "\0" in name or not os.path.isfile(folder / name):
            raise UserError(f"{index}: weight_map names {name[:200]!r}, which is not a file of this folder")
    return [own_file(folder, name) for name in sorted(set(names.values()))]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, whose library checks that its tensors lie side by side and have the size of their shapes."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _check_header(path: Path) -> None:
    """The file begins with the length of a JSON object, in 8 bytes, and the object."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(INDEX_LIMIT, path.stat().st_size):
                raise ValueError(f"its header is said to have {length} bytes")
            parse(file.read(length))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({str(error)[:300]})") from error


def _write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    for old in folder.glob("model*.safetensors*"):  # a model that was saved here before must not win over this one
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(shard, folder / name)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
    path.chmod((path.parent / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read
