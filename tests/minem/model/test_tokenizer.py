"""The tokenizer against transformers: the same ids, the same chats, and one sentence for every broken folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minem.errors import UserError
from minem.model.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Which of these is a planet?\n(A) Mars\n(B) The Sun",
    "  leading and trailing  ",
    "tabs\tand\r\nWindows lines\n\n\n",
    "3.14159 * 271828 = ?",
    "naïve café — “quotes” … ½ ﬁ Å",
    "Ελληνικά, русский, 中文字符, العربية, हिन्दी, ไทย",
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "<s>already started",
    "<s><s> twice </s>",
    "e\u0301 decomposed",
    "\x00\x01\x7f\u200b\u202e",
    "don't won't I'LL it's",
    "The best answer is A",
]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Spaces kept?  "}],
    [
        {"role": "user", "content": "Hello <b>&amp;</b> \"quoted\" 'text'"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Ünïcode 🙂\n\nand lines"},
    ],
]
# Written to use what chat templates use: block trimming, loop controls, tojson, special tokens, macros, the date.
TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- macro turn(message) %}[{{ message.role }}]{{ message['content'] | trim }}{{ eos_token }}{% endmacro %}
{% for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {% if message.role == 'assistant' %}{% generation %}{{ turn(message) }}{% endgeneration %}
    {% else %}
{{ turn(message) }} {{ {"<text>": message.content} | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def byte_level_bpe(post_processor: str | None) -> tokenizers.Tokenizer:
    """A small byte-level BPE like Llama 3's and Qwen's, trained on a few words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["which of these is the best answer", "the answer is the planet"] * 4, trainer)
    if post_processor == "bos":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    elif post_processor == "bytes":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def write_folder(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def pair_merges_as(folder: Path, style: str) -> None:
    """Rewrite tokenizer.json's merges as ["a", "b"] pairs (new files) or "a b" strings (older ones)."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs] if style == "strings" else pairs
    path.write_text(json.dumps(content))


def one_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


@pytest.mark.parametrize("merges", ["strings", "pairs"])
@pytest.mark.parametrize("post_processor", [None, "bytes", "bos"])
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, merges: str, post_processor: str | None) -> None:
    folder = write_folder(tmp_path, byte_level_bpe(post_processor))
    pair_merges_as(folder, merges)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_ids, ours.backend.get_vocab_size()) == (0, {1}, len(theirs))
    for text in TEXTS:
        plain = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == plain
        assert ours.encode(text) == one_bos(theirs.encode(text), 0)
        for skip in (True, False):
            assert ours.decode(plain, skip_special_tokens=skip) == theirs.decode(plain, skip_special_tokens=skip)


def test_exactly_one_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level_bpe("bos"), {"chat_template": TEMPLATE}))
    for text in ("answer", "<s>answer"):
        ids = tokenizer.encode(text)
        assert ids[0] == 0
        assert ids.count(0) == 1
    assert tokenizer.encode("<s>answer", add_special_tokens=False).count(0) == 1
    for chat in CHATS:
        ids = tokenizer.chat(chat)
        assert ids[0] == 0
        assert ids.count(0) == 1


@pytest.mark.parametrize("flag", [True, False])
def test_the_post_processor_and_not_add_bos_token_decides(tmp_path: Path, flag: bool) -> None:
    """transformers 5 ignores add_bos_token beside a tokenizer.json; so do we, in both directions."""
    for post_processor in ("bytes", "bos"):
        folder = write_folder(tmp_path / post_processor, byte_level_bpe(post_processor), {"add_bos_token": flag})
        theirs = PreTrainedTokenizerFast.from_pretrained(folder).encode("the answer")
        assert Tokenizer.from_folder(folder).encode("the answer") == theirs
        assert (theirs[0] == 0) == (post_processor == "bos")


@pytest.mark.parametrize("where", ["string", "list", "file"])
def test_chats_render_as_in_transformers(tmp_path: Path, where: str) -> None:
    inside = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "no"}]
    config = {"string": {"chat_template": TEMPLATE}, "list": {"chat_template": inside}, "file": {"chat_template": "no"}}
    folder = write_folder(tmp_path, byte_level_bpe("bos"), config[where])
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.chat_template is not None
    for chat in [*CHATS, [{"role": "tool", "content": "skipped"}, *CHATS[0]]]:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024"
            )
            assert ours.render(chat, add_generation_prompt=prompt) == expected
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.chat(chat) == ids


def test_eos_is_the_tokenizers_and_the_generation_configs_or_else_the_configs(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level_bpe(None))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.from_folder(folder).eos_ids == {1, 5, 7}
    (folder / "generation_config.json").write_text('{"do_sample": true}')  # as transformers: config.json is not asked
    assert Tokenizer.from_folder(folder).eos_ids == {1}
    (folder / "generation_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_ids == {1, 9}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": null}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {5, 7}
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("new_style", [True, False])
def test_special_tokens_map_counts_only_beside_an_old_config(tmp_path: Path, new_style: bool) -> None:
    config: dict[str, Any] = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}} if new_style else {}
    folder = write_folder(tmp_path, byte_level_bpe(None), config)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<pad>", "lstrip": false}}')
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert Tokenizer.from_folder(folder).eos_ids == {theirs.eos_token_id} == {1 if new_style else 2}


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    backend = byte_level_bpe("bos")
    number = backend.get_vocab_size()
    added = {"content": "<think>", "lstrip": False, "rstrip": True, "normalized": False, "special": False}
    folder = write_folder(tmp_path, backend, {"added_tokens_decoder": {str(number): added}})
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    text = "so <think>  the answer</s>"
    assert number in ours.encode(text)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_a_training_scripts_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_bpe("bos")
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    text = "which of these is the best answer, and why is it the best?"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_files_are_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", byte_level_bpe("bos"), {"chat_template": "no"})
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "special_tokens_map.json").write_text('{"eos_token":\n  "</s>"}')
    (source / "model.safetensors").write_text("not the tokenizer's")
    tokenizer = Tokenizer.from_folder(source)
    tokenizer.save(tmp_path / "copy")
    tokenizer.save(source)  # onto itself: nothing happens
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copied == {p.name: p.read_bytes() for p in source.iterdir() if p.name != "model.safetensors"}
    again = Tokenizer.from_folder(tmp_path / "copy")
    assert again.chat(CHATS[0]) == tokenizer.chat(CHATS[0])


BROKEN = {
    "no tokenizer.json": ("tokenizer.json", None, "tokenizer.json is missing"),
    "empty tokenizer.json": ("tokenizer.json", "", "tokenizer.json is not a tokenizer"),
    "no model": ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
    "broken config": ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    "deep config": ("tokenizer_config.json", "[" * 200_000, "tokenizer_config.json is not valid JSON"),
    "bytes that are no text": ("tokenizer_config.json", b"\xff\xfe{", "tokenizer_config.json is not valid JSON"),
    "list for a config": ("tokenizer_config.json", "[1]", "holds a JSON list"),
    "eos of the wrong type": ("config.json", '{"eos_token_id": "2"}', "eos_token_id must be a token id"),
    "negative eos": ("generation_config.json", '{"eos_token_id": [-1]}', "eos_token_id must be a token id"),
    "half a template": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "rag", "template": ""}]}',
        "is 'default'",
    ),
    "a list for a name": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": [1], "template": ""}]}',
        "is 'default'",
    ),
    "bos is a number": ("tokenizer_config.json", '{"bos_token": 3}', "bad token"),
    "eos is half a character": ("tokenizer_config.json", '{"eos_token": "\\ud83d"}', "bad token"),
    "wrong number": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"77777": {"content": "<new>"}}}',
        "'<new>' is not number 77777",
    ),
    "added tokens as a list": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must"),
    "template of the wrong type": ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "chat_template must be"),
    "huge config": ("config.json", " " * (4 * 2**20 + 1), "that is the limit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    folder = write_folder(tmp_path, byte_level_bpe("bos"))
    name, content, expected = BROKEN[case]
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=expected) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_post_processor_that_names_a_missing_token_is_refused(tmp_path: Path, capfd) -> None:
    """The library panics on it; its backtrace stays off stderr."""
    folder = write_folder(tmp_path, byte_level_bpe("bos"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer that can be used"):
        Tokenizer.from_folder(folder)
    assert capfd.readouterr().err == ""
    os.write(2, b"back\n")
    assert capfd.readouterr().err == "back\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if %}", "the chat template of .* cannot be read: "),
        ("{{ raise_exception('alternate') }}", "the chat template of .* fails on this chat: alternate"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path: Path, template: str, expected: str) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level_bpe(None), {"chat_template": template}))
    with pytest.raises(UserError, match=expected):
        tokenizer.render(CHATS[0])


def test_no_template_and_no_unicode(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level_bpe(None)))
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="has no chat template"):
        tokenizer.chat(CHATS[0])
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("half a pair: \ud83d")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Qwen2.5 tokenizer, unpacked."""
    root = os.environ.get("MINEM_REAL_DATA")
    if not root:
        pytest.skip("MINEM_REAL_DATA is not set: no real tokenizer")
    folder = tmp_path_factory.mktemp("qwen")
    for path in (Path(root) / "qwen2.5-tokenizer").iterdir():
        if path.suffix == ".gz":
            with gzip.open(path) as packed, open(folder / path.stem, "wb") as plain:
                shutil.copyfileobj(packed, plain)
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def both(qwen: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_folder(qwen), AutoTokenizer.from_pretrained(qwen)


@pytest.mark.real_data
def test_qwen_ids_equal_transformers(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert ours.eos_ids == {151645, 151643}
    assert ours.bos_id is theirs.bos_token_id is None
    assert ours.backend.get_vocab_size() == len(theirs)
    rows = Path(os.environ["MINEM_REAL_DATA"]) / "arc-challenge" / "test.jsonl"
    questions = [json.loads(line)["question"] for line in rows.read_text().splitlines()[:400]]
    for text in [*TEXTS, *questions]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.real_data
def test_qwen_chats_equal_transformers(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for chat in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == expected
        assert ours.chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.real_data
@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=60))
def test_qwen_ids_equal_transformers_on_any_text(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs.encode(text)
    chat = [{"role": "user", "content": text}]
    assert ours.chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
