"""Model and weights against transformers: the same logits from the same folder, and exports equal bit for bit."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import minem
from minem.device import release_cached_memory
from minem.errors import UserError
from minem.model.weights import checkpoint_views, load_model, resolve
from tests.minem.folders import SHAPES, VOCABULARY, make_folder


def tokens(batch: int = 3, steps: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One llama folder for all tests that damage a copy of it."""
    folder = tmp_path_factory.mktemp("made")
    make_folder(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("kind", SHAPES)
def test_logits_equal_transformers(tmp_path, kind):
    theirs = make_folder(tmp_path, kind)
    model, _ = minem.load(tmp_path)
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), theirs(ids).logits) < 1e-4


@pytest.mark.parametrize("kind", ["llama-llama3", "qwen2-yarn"])
def test_rope_reads_the_older_spelling(tmp_path, kind):
    theirs = make_folder(tmp_path, kind)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in rope.items()}
    path.write_text(json.dumps(raw))
    model, _ = minem.load(tmp_path)
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), theirs(ids).logits) < 1e-4


def test_sharded_and_bfloat16_folders(tmp_path):
    make_folder(tmp_path, "qwen2", bfloat16=True, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model, _ = minem.load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), theirs(ids).logits) < 1e-4
    assert minem.load(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("stored", "loaded"), [("BF16", torch.float32), ("F32", torch.bfloat16)])
def test_a_model_is_saved_in_the_dtype_that_it_was_stored_in(tmp_path, stored, loaded):
    """Whatever it computes in: a base in bfloat16 that is trained in float32 is not exported at twice its size."""
    make_folder(tmp_path / "a", bfloat16=stored == "BF16")
    model, tokenizer = minem.load(tmp_path / "a", dtype=loaded)
    minem.save(model, tokenizer, tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118 (not a dict)
    again, _ = minem.load(tmp_path / "b", dtype=loaded)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    named = {"BF16": torch.bfloat16, "F32": torch.float32}[stored]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == named


@pytest.mark.parametrize(
    ("kind", "dtype", "shards"),
    [
        ("llama-head-dim", torch.float32, 1),
        ("llama-tied", torch.bfloat16, 1),
        ("qwen2", torch.bfloat16, 2),
        ("qwen3", torch.float32, 2),
    ],
)
def test_a_saved_folder_is_the_model_bit_for_bit(tmp_path, monkeypatch, kind, dtype, shards):
    """The files hold the weights in memory and nothing else; transformers and minem load the same model from them."""
    make_folder(tmp_path / "a", kind, bfloat16=dtype == torch.bfloat16)
    model, tokenizer = minem.load(tmp_path / "a", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # what is saved must be the weights as they are now
    size = sum(parameter.nbytes for parameter in model.parameters())
    if shards > 1:
        monkeypatch.setattr("minem.model.weights.SHARD_BYTES", 3 * size // 4)
    minem.save(model, tokenizer, tmp_path / "b")

    files = list((tmp_path / "b").glob("*.safetensors"))
    assert len(files) == shards
    assert 0 <= sum(file.stat().st_size for file in files) - size < 10_000
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    views = checkpoint_views(model)
    assert written.keys() == views.keys()
    for name, tensor in written.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), views[name].contiguous().view(torch.uint8)), name
    assert all(file.stat().st_mode == (tmp_path / "b" / "config.json").stat().st_mode for file in files)

    monkeypatch.setattr("minem.model.weights.COPY_BYTES", 1000)  # tensors are read in several pieces
    again, tokenizer_again = minem.load(tmp_path / "b", dtype=dtype)
    assert again.config == model.config
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for name in ("chat_template", "eos_ids", "special_tokens"):
        assert getattr(tokenizer, name) == getattr(tokenizer_again, name)
    assert tokenizer.backend.to_str() == tokenizer_again.backend.to_str()

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == dtype
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model.float()(tokens()), theirs(tokens()).logits) < 1e-4
    before, after = (AutoTokenizer.from_pretrained(tmp_path / x) for x in "ab")
    chat = [{"role": "user", "content": "Which of these?"}]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)
    assert before("the answer").input_ids == after("the answer").input_ids
    assert before.eos_token_id == after.eos_token_id == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_loading_needs_no_second_copy(tmp_path):
    """Anonymous memory grows by the weights and not by much more."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=8192, num_hidden_layers=1, vocab_size=8192)
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    gc.collect()
    release_cached_memory(torch.device("cpu"))  # or memory that earlier tests freed is used again, and nothing grows
    before, samples, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_model(tmp_path)
    done.set()
    thread.join()
    growth = max(*samples, anonymous()) - before
    assert 0.8 < growth / sum(p.nbytes for p in model.parameters()) < 1.1


def edit(path: Path, **fields: object) -> None:
    raw = json.loads(path.read_text())
    raw.update(fields)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"intermediate_size": 81}, "mlp"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"layer_types": 5}, "layer_types"),
        ({"layer_types": [["a"]]}, "layer_types"),
        ({"sliding_window": "x"}, "sliding_window"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"num_hidden_layers": 10**7}, "asks for .* weights, but its files have"),
        ({"hidden_size": 10**9}, "asks for .* weights, but its files have"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "kind of layer"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}}, "rope_theta"),
        ({"model_type": "qwen3", "head_dim": 12}, "q_norm"),
    ],
)
def test_what_a_config_asks_for_in_vain_is_named(folder, fields, named):
    edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=named) as error:
        minem.load(folder)
    assert "\n" not in str(error.value)


def test_sliding_windows_shorter_than_the_context_are_refused(tmp_path):
    make_folder(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    edit(path, use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types="absent")
    with pytest.raises(UserError, match="sliding_window"):
        minem.load(tmp_path)
    edit(path, use_sliding_window=True, sliding_window=512, max_window_layers=1)  # as long as the context: harmless
    minem.load(tmp_path)


def test_wrong_tensors_are_listed(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].int()
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        minem.load(folder)
    for part in ("missing model.layers.0.self_attn.q_proj", "unexpected model.layers.9", "model.norm.weight has shape"):
        assert part in str(error.value)
    assert "up_proj.weight is stored as I32" in str(error.value)


def test_a_second_save_replaces_the_first(tmp_path, monkeypatch):
    make_folder(tmp_path / "a", "qwen3")
    model, tokenizer = minem.load(tmp_path / "a")
    minem.save(model, tokenizer, tmp_path / "b")
    with torch.no_grad():
        model.norm.weight.zero_()
    monkeypatch.setattr("minem.model.weights.SHARD_BYTES", 60_000)
    minem.save(model, tokenizer, tmp_path / "b")
    assert not minem.load(tmp_path / "b")[0].norm.weight.any()


def test_broken_folders_are_refused_in_one_sentence(folder):
    with pytest.raises(UserError, match="no folder that exists, and no hub id"):
        minem.load("no/such/folder/here")
    (folder / "model.safetensors").write_bytes(b"\xff" * 500_000)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        minem.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        minem.load(folder)
    for weight_map, message in (
        ({"x": "../outside.safetensors"}, "not a file of this folder"),
        ([1], "must map tensor"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            minem.load(folder)


def test_a_hub_model_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache"):
        minem.load("nobody/nothing")


def test_a_hub_model_is_read_from_the_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: a snapshot folder by commit, and a file that names the commit of main."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    theirs = make_folder(repository / "snapshots" / commit, "qwen2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = minem.load("someone/small")
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), theirs(ids).logits) < 1e-4
    assert tokenizer.eos_ids == {1}
    assert minem.load("someone/small", revision=commit)[0].config == model.config
    with pytest.raises(UserError, match="not in the local cache"):
        minem.load("someone/small", revision="no-such-branch")


@pytest.mark.parametrize("sharded", [True, False])
def test_of_a_hub_id_only_what_is_loaded_is_fetched(tmp_path: Path, monkeypatch, sharded: bool) -> None:
    shards = ["weights-a.safetensors", "weights-b.safetensors"] if sharded else ["model.safetensors"]
    needed = ["config.json", "tokenizer.json", "additional_chat_templates/tools.jinja", *shards]
    needed += ["model.safetensors.index.json"] if sharded else []
    other = [
        "checkpoint-500/model.safetensors",
        "fp8/model-00001-of-00002.safetensors",
        "onnx/config.json",
        "README.md",
    ]
    other += ["consolidated.safetensors", "optimizer.safetensors", "trainer_state.json"]
    local = tmp_path / "local"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        for name in filter_repo_objects([*needed, *other], allow_patterns=allow_patterns):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_text(json.dumps({"weight_map": {str(i): shard for i, shard in enumerate(shards)}}))
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("some/model") == local
    assert {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} == set(needed)


def test_further_chat_templates_are_saved_with_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    shutil.copytree(folder, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    minem.load(source)[1].save(saved)
    assert (saved / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(saved).chat_template["tool_use"] == "{{ messages }}"


def test_weights_of_a_base_model_and_a_value_head_load_as_in_transformers(tmp_path: Path) -> None:
    theirs = make_folder(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(
        bare | {"v_head.summary.weight": torch.ones(1, 48)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    model, _ = minem.load(tmp_path)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-5)
    save_file(
        bare | {"layers.0.strange.weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"unexpected layers\.0\.strange\.weight"):
        minem.load(tmp_path)


def test_a_tied_head_that_differs_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head\.weight differs from model\.embed"):
        minem.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    minem.load(tmp_path)
