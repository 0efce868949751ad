"""A checkpoint folder's tokenizer: text <-> token ids, and chats -> prompt text by the folder's own template.

    python -c "from minem.tokenizer import Tokenizer; print(Tokenizer.from_folder('FOLDER').encode('Hello'))"

`tokenizer.json` is read by the tokenizers library, so ids are those of transformers; what surrounds it (special tokens,
chat template, which ids end a text) follows transformers 5 file by file, as the comments below say. Folders come from
strangers: JSON has size limits, templates run in jinja2's sandbox and may only print so much.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minem.errors import UserError

MEBIBYTE = 1 << 20
TOKENIZER_LIMIT = 128 * MEBIBYTE  # the largest tokenizer.json in wide use (Gemma's) has 34 MiB
CONFIG_LIMIT = 16 * MEBIBYTE
RENDER_LIMIT = 4 * MEBIBYTE  # characters of one rendered chat

# Everything that says how to read text, copied unchanged when a model is saved. (config.json and generation_config.json
# belong to the weights.)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Llama 3.2's template prints today's date, unless it is told one; a run must not depend on the day it was started, so
# the clock that templates see stands still, on the date which that template itself falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)


class Tokenizer:
    """Text <-> token ids for one checkpoint folder. Made by `Tokenizer.from_folder`."""

    def __init__(
        self,
        folder: Path,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        chat_template: str | None,
        eos_ids: frozenset[int],
    ) -> None:
        self.folder = folder
        self.backend = backend
        self.special_tokens = special_tokens  # "bos_token" -> "<s>" and so on, what templates may print
        self.chat_template = chat_template
        self.eos_ids = eos_ids  # any of these ends a text; empty when the folder names none
        self.bos_id = backend.token_to_id(special_tokens["bos_token"]) if "bos_token" in special_tokens else None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the small files around it.

        Raises UserError when tokenizer.json is missing, a file is broken or too large, or a field has the wrong type.
        """
        folder = Path(path)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_optional(folder / "tokenizer_config.json")
        # As in transformers: special_tokens_map.json counts only where tokenizer_config.json is of the old kind.
        if "added_tokens_decoder" not in config:
            config |= _read_optional(folder / "special_tokens_map.json")
        special_tokens = _add_special_tokens(backend, config, folder)
        own_eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        eos_ids = set() if own_eos is None else {own_eos}
        for name in ("generation_config.json", "config.json"):
            eos_ids |= _eos_ids(_read_optional(folder / name), folder / name)
        return cls(folder, backend, special_tokens, _read_template(folder, config), frozenset(eos_ids))

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a text, added tokens included (a model's embedding is often padded beyond it)."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. What `add_special_tokens` adds is for tokenizer.json to say (its post-processor).

        A text that already starts with BOS does not get a second one.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(f"this text is not valid Unicode and cannot be tokenised: {text[:80]!r}") from error
        if add_special_tokens and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary have none."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat (a list of {"role": ..., "content": ...}), special tokens written out.

        Raises UserError when the folder has no chat template, or the template is broken, refuses the messages or
        prints more than RENDER_LIMIT characters.
        """
        context = {**self.special_tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(tools=None, documents=None, **context):
                length += len(piece)
                if length > RENDER_LIMIT:
                    raise UserError(f"the chat template of {self.folder} prints more than {RENDER_LIMIT} characters")
                pieces.append(piece)
        except UserError:
            raise
        except Exception as error:  # a template is a stranger's program: whatever it does wrong is its own fault
            raise UserError(f"the chat template of {self.folder} fails on this chat: {_one_line(error)}") from error
        return "".join(pieces)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the model to answer. The template writes BOS itself, so none is added."""
        return self.encode(self.render(messages), add_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, byte for byte."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self.folder / name
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise UserError(f"{self.folder} has no chat template (tokenizer_config.json or chat_template.jinja)")
        try:
            return _environment().from_string(self.chat_template)
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise UserError(f"the chat template of {self.folder} cannot be read: {_one_line(error)}") from error


def read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """One JSON object from a file of at most `limit` bytes; UserError names the file and what is wrong with it."""
    try:
        _check_size(path, limit)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} was expected")
    return value


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise UserError(f"{path} has {size} bytes; the limit is {limit}")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: a checkpoint folder needs its tokenizer.json")
    _check_size(path, TOKENIZER_LIMIT)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode("0")  # a post-processor that names a missing token shows only here
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library panics on some inputs, and its panics are no Exceptions
        raise UserError(f"{path} is not a tokenizer that can be used: {_one_line(error)}") from error
    # Some files carry a training script's truncation; prompts are never cut or padded here (transformers resets both).
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Register the tokens that tokenizer_config.json adds or calls special, as transformers does; name -> text."""
    extra = config.get("added_tokens_decoder") or {}
    if not isinstance(extra, dict):
        raise UserError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be an object of id -> token")
    try:
        for token_id, fields in sorted(extra.items(), key=lambda item: int(item[0])):
            if backend.token_to_id(fields["content"]) is None:
                backend.add_tokens([tokenizers.AddedToken(**fields)])
            if backend.token_to_id(fields["content"]) != int(token_id):
                raise ValueError(f"the token {fields['content']!r} is not number {token_id} in tokenizer.json")
        special = {name: _text_of(config[name]) for name in NAMED_TOKENS if config.get(name) is not None}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: bad token: {_one_line(error)}") from error
    for name in ("bos_token", "eos_token"):
        if name in special and backend.token_to_id(special[name]) is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} {special[name]!r} is not in tokenizer.json")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [
            known.get(text, tokenizers.AddedToken(text, special=True, normalized=False))
            for text in special.values()
            if backend.token_to_id(text) is not None
        ]
    )
    return special


def _text_of(token: Any) -> str:
    """A special token is written as its text or as {"content": text, ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"expected a text, not {text!r}")
    text.encode()  # half a surrogate pair is a ValueError here, and something worse inside the library
    return text


def _eos_ids(config: dict[str, Any], path: Path) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return set(ids)


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja comes before the config's own entry: a text, or a list of which "default" is taken."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        _check_size(file, CONFIG_LIMIT)
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{file} is not UTF-8 text") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list with a 'default'")
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    """transformers' own settings for chat templates, but for the clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks an assistant's words for training masks; here it just prints."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
