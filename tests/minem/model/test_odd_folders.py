"""Odd but loadable checkpoint folders: what minem reads from them is what transformers reads, or it refuses by name.

    python -m pytest tests/minem/model/test_odd_folders.py -m slow -s     # prints how many folders were compared

The settings of a folder stand in several files, and published folders have them in any mix. Hypothesis writes mixes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import minem
from minem import Generator, SamplingParams
from minem.errors import UserError
from tests.minem.folders import VOCABULARY, make_folder

TEXTS = (
    "The best answer is A",
    "<s>user: hi</s>",
    " <s> </s>  x</s>",
    "a<pad>b <pad> c",
    "is this <tool> or <|end|>?",
    "<unk>\u00e9\n\n<tool><tool>",
)
CHAT = [{"role": "user", "content": "hi <tool>"}]
KINDS = ("llama", "llama-tied", "llama-llama3", "qwen2", "qwen3")
NEW = ("<pad>", "<tool>", "<|end|>")  # tokens that tokenizer.json lacks
THETA = 500_000.0
# The old and the new style of the same settings, and both.
ROPE: dict[str, dict[str, Any]] = {
    "as saved": {},
    "absent": {"rope_parameters": None},
    "old": {"rope_parameters": None, "rope_theta": THETA},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
    "both": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rope_theta": 10_000.0},
    "old scaling": {"rope_parameters": None, "rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "two scalings": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


@st.composite
def oddities(draw: Any) -> dict[str, Any]:
    """What is odd about a folder: by file, the fields that take the place of its own; None removes one."""

    def flags() -> dict[str, bool]:
        return {name: draw(st.booleans()) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}

    def some(values: Any) -> dict[str, Any]:
        return {name: draw(value) for name, value in values.items() if draw(st.booleans())}

    ids = st.integers(0, VOCABULARY - 1)
    eos = st.none() | ids | st.lists(ids, max_size=3)
    token = st.sampled_from(("<s>", "</s>", "answer", *NEW))
    named = some(dict.fromkeys(("pad_token", "unk_token", "eos_token", "bos_token", "tool_token"), token))
    decoder = draw(st.lists(st.sampled_from((*NEW, "<s>", "</s>")), unique=True))
    lists = st.sampled_from((None, ["<tool>", "<|end|>"], ["<|end|>", "answer"], {"tool_token": "<tool>"}))
    templates = {"default": "{{ bos_token }}{{ messages[0].content }}", "other": "x"}
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "config.json": some({"eos_token_id": eos, "tie_word_embeddings": st.sampled_from((None, True, False))})
        | ROPE[draw(st.sampled_from(sorted(ROPE)))],
        "generation_config.json": some({"eos_token_id": eos}),
        "tokenizer_config.json": {
            name: {"__type": "AddedToken", "content": text, **flags()} if draw(st.booleans()) else text
            for name, text in named.items()
        }
        | some(
            {
                "extra_special_tokens": lists,
                "additional_special_tokens": st.just(["<|end|>", "answer"]),
                "add_bos_token": st.booleans(),
                "add_eos_token": st.booleans(),
                "clean_up_tokenization_spaces": st.booleans(),
                "split_special_tokens": st.booleans(),
                "chat_template": st.sampled_from(
                    (templates, [{"name": k, "template": v} for k, v in templates.items()], None)
                ),
            }
        ),
        "added_tokens_decoder": draw(st.none() | st.just({text: flags() for text in decoder})),
        "special_tokens_map.json": some(dict.fromkeys(named, token)),
        "added_tokens.json": draw(st.integers(0, 2)),
        "special in tokenizer.json": draw(st.booleans()),
        "prefix": draw(st.sampled_from(("model.", ""))),
    }


def change(path: Path, fields: dict[str, Any]) -> None:
    content = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write(folder: Path, whole: Path, odd: dict[str, Any]) -> None:
    """A copy of a whole folder with what is odd about it."""
    shutil.copytree(whole, folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    numbers = {text: len(backend["model"]["vocab"]) + i for i, text in enumerate(NEW)} | {"<s>": 0, "</s>": 1}
    for token in backend["added_tokens"]:
        token["special"] = odd["special in tokenizer.json"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    fields = dict(odd["tokenizer_config.json"])
    if odd["added_tokens_decoder"] is not None:
        decoder = odd["added_tokens_decoder"]
        present = sorted(numbers[text] for text in decoder if text in NEW)  # they get numbers in this order
        for text in decoder:
            number = (
                min(numbers[NEW[0]] + present.index(numbers[text]), numbers[text]) if text in NEW else numbers[text]
            )
            fields.setdefault("added_tokens_decoder", {})[number] = {"content": text, **decoder[text]}
        fields.setdefault("added_tokens_decoder", {})
    change(folder / "tokenizer_config.json", fields)
    for name in ("config.json", "generation_config.json", "special_tokens_map.json"):
        change(folder / name, odd[name])
    if count := odd["added_tokens.json"]:
        change(folder / "added_tokens.json", {text: numbers[text] for text in NEW[:count]})
    if odd["prefix"] != "model.":
        weights = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


def compare(folder: Path, seen: Counter[str]) -> None:
    """Logits, ids, texts, templates and greedy answers of both. A folder that one of them refuses is counted."""
    try:
        model, tokenizer = minem.load(folder)
    except UserError as error:
        reason = str(error).removeprefix(str(folder)).split(":")[-1][:60]
        seen[f"refused: {''.join(c for c in reason if not c.isdigit())}"] += 1
        return
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = words(text, add_special_tokens=special)["input_ids"]
            if special and tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
                ids = ids[1:]  # minem writes one BOS, never two
            assert tokenizer.encode(text, special) == ids, text
            assert tokenizer.decode(ids) == words.decode(ids, skip_special_tokens=True)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert tokenizer.special_tokens.get(name) == getattr(words, name)
    assert tokenizer.render(CHAT) == words.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    prompt = [i for i in tokenizer.encode(TEXTS[0]) if i < VOCABULARY]
    with torch.inference_mode():
        assert torch.allclose(model(torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits, atol=2e-4)
    eos = sorted(tokenizer.eos_ids)
    (answer,) = Generator(model, tokenizer, slots=1).generate(
        [prompt], SamplingParams(temperature=0, max_new_tokens=24)
    )[0]
    given = {"inputs": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    drawn = theirs.generate(**given, do_sample=False, max_new_tokens=24, eos_token_id=eos or None, pad_token_id=0)
    assert answer.token_ids == drawn[0, len(prompt) :].tolist()
    named = {
        i
        for i in (theirs.generation_config.eos_token_id, words.eos_token_id)
        for i in (i if isinstance(i, list) else [i])
    }
    assert set(eos) == named - {None}
    seen["compared"] += 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        make_folder(folder / kind, kind)
    return folder


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_odd_folders_are_read_as_transformers_reads_them(whole: Path, count: int):
    """Slow: 500 folders, for a wrong order of two files shows in one mix of a hundred."""
    seen: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(oddities())
    def check(odd: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place) / "odd", whole / odd["kind"], odd)
            compare(Path(place) / "odd", seen)

    check()
    print(f"\n{seen.total()} folders: {dict(seen.most_common())}")
    assert seen["compared"] > seen.total() / 3
    named = ("lm_head.weight", "rope_parameters and rope_scaling differ")
    assert all(any(name in reason for name in named) for reason in seen if reason != "compared"), seen
