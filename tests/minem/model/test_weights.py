"""Model and weights against transformers: the same logits from the same folder, and back again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import minem
from minem.errors import GuardError, UserError
from minem.model import weights
from tests.minem.folders import SHAPES, VOCABULARY, make_folder


def tokens(batch: int = 3, steps: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-head-dim", "llama-tied", "qwen2", "qwen3"])
def test_saved_folder_is_the_same_model(tmp_path, kind, dtype):
    make_folder(tmp_path / "a", kind)
    model, tokenizer = minem.load(tmp_path / "a", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # what is saved must be the weights as they are now
    minem.save(model, tokenizer, tmp_path / "b")
    ids = tokens()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == dtype
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model.float()(ids), theirs(ids).logits) < 1e-4
    again, _ = minem.load(tmp_path / "b", dtype=dtype)
    for (name, ours), theirs in zip(model.to(dtype).state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    before, after = (AutoTokenizer.from_pretrained(tmp_path / x) for x in "ab")
    chat = [{"role": "user", "content": "Which of these?"}]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)
    assert before("the answer").input_ids == after("the answer").input_ids
    assert before.eos_token_id == after.eos_token_id == 1
    assert (tmp_path / "b" / "model.safetensors").stat().st_mode == (tmp_path / "b" / "config.json").stat().st_mode
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_weights_are_written_in_shards(tmp_path, monkeypatch):
    make_folder(tmp_path / "a", "qwen3")
    monkeypatch.setattr("minem.model.weights.SHARD_BYTES", 60_000)
    model, tokenizer = minem.load(tmp_path / "a")
    minem.save(model, tokenizer, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), AutoModelForCausalLM.from_pretrained(tmp_path / "b")(ids).logits) < 1e-4


def test_loading_needs_no_second_copy(tmp_path):
    """Anonymous memory grows by the weights and not by much more; measured in a fresh process."""
    script = """
import sys, torch, minem
from minem.weights import load_model
from pathlib import Path
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
import threading, time
folder = Path(sys.argv[1])
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch, daemon=True); thread.start()
model = load_model(folder)
done = True; thread.join()
peak = max(peak, anonymous())
print((peak - before) / sum(p.nbytes for p in model.parameters()))
"""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=32000)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    ratio = float(
        subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout
    )
    assert 0.9 < ratio < 1.1


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
        ({"num_hidden_layers": 10**7}, "asked for"),
        ({"hidden_size": 10**9}, "asked for"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "kind of layer"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}}, "rope_theta"),
        ({"model_type": "qwen3", "head_dim": 12}, "q_norm"),
    ],
)
def test_what_a_config_asks_for_in_vain_is_named(tmp_path, fields, named):
    make_folder(tmp_path)
    edit(tmp_path / "config.json", **fields)
    with pytest.raises(UserError, match=named) as error:
        minem.load(tmp_path)
    assert "\n" not in str(error.value)


def test_sliding_windows_that_bite_are_refused(tmp_path):
    make_folder(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    edit(path, use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types="absent")
    with pytest.raises(UserError, match="sliding_window"):
        minem.load(tmp_path)
    edit(path, use_sliding_window=True, sliding_window=512, max_window_layers=1)  # as long as the context: harmless
    minem.load(tmp_path)


def test_wrong_tensors_are_listed(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        minem.load(tmp_path)
    for part in ("missing model.layers.0.self_attn.q_proj", "unexpected model.layers.9", "model.norm.weight has shape"):
        assert part in str(error.value)


def test_weights_that_are_not_floating_are_refused(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
    save_file(tensors, path)
    with pytest.raises(UserError, match="I32"):
        minem.load(tmp_path)


def test_a_second_save_replaces_the_first(tmp_path, monkeypatch):
    make_folder(tmp_path / "a", "qwen3")
    model, tokenizer = minem.load(tmp_path / "a")
    minem.save(model, tokenizer, tmp_path / "b")
    with torch.no_grad():
        model.norm.weight.zero_()
    monkeypatch.setattr("minem.model.weights.SHARD_BYTES", 60_000)
    minem.save(model, tokenizer, tmp_path / "b")
    assert not minem.load(tmp_path / "b")[0].norm.weight.any()


def test_broken_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        minem.load("no/such/folder/here")
    make_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 500_000)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        minem.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        minem.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="not a file of this folder"):
        minem.load(tmp_path)


def test_a_hub_model_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache"):
        minem.load("nobody/nothing")


def test_a_hub_model_is_read_from_the_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: a snapshot folder by commit, and a file that says which one main is."""
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


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda f: flip_a_bit(f / "model-00002-of-00002.safetensors"), "these differ: model."),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 80), "cannot be read again"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
        (lambda f: edit_json(f / "config.json", rms_norm_eps=1e-4), "config.json"),
        (lambda f: edit_json(f / "config.json", vocab_size="many"), "cannot be read again"),
        (lambda f: edit_json(f / "config.json", eos_token_id=[1, 2]), "eos_ids"),
        (lambda f: edit_json(f / "generation_config.json", eos_token_id=[1, 5]), "eos_ids"),
        (lambda f: (f / "chat_template.jinja").write_text("other"), "chat_template"),
        (lambda f: edit_json(f / "tokenizer_config.json", bos_token=None), "special_tokens"),
        (lambda f: edit_json(f / "tokenizer.json", post_processor=None), "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_compared_with_memory(tmp_path, monkeypatch, dtype, harm, named):
    make_folder(tmp_path / "source", "qwen2")
    model, tokenizer = minem.load(tmp_path / "source", dtype=dtype)
    monkeypatch.setattr(weights, "SHARD_BYTES", 3 * weights.saved_bytes(model) // 4)
    monkeypatch.setattr(weights, "COPY_BYTES", 1000)  # tensors in several pieces
    minem.save(model, tokenizer, tmp_path / "saved")
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) == 2
    assert 0 <= sum(f.stat().st_size for f in files) - weights.saved_bytes(model) < 10_000
    weights.verify(model, tokenizer, tmp_path / "saved")
    harm(tmp_path / "saved")
    with pytest.raises(GuardError) as caught:
        weights.verify(model, tokenizer, tmp_path / "saved")
    assert named in str(caught.value)


def test_a_missing_and_a_strange_tensor_are_named(tmp_path):
    make_folder(tmp_path / "source", "llama")
    model, tokenizer = minem.load(tmp_path / "source")
    minem.save(model, tokenizer, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    tensors["model.stranger.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(GuardError, match=r"these differ: model\.norm\.weight, model\.stranger\.weight$"):
        weights.verify(model, tokenizer, tmp_path / "saved")
