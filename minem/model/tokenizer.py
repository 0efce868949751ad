"""A checkpoint folder's tokenizer: text <-> token ids, and chats -> prompt text by the folder's own template.

    python -c "from minem.model.tokenizer import Tokenizer; print(Tokenizer.from_folder('FOLDER').encode('Hello'))"

`tokenizer.json` is read by the tokenizers library, so ids are those of transformers; what surrounds it (special tokens,
chat template, which ids end a text) follows transformers 5 file by file, as the comments below say. Folders come from
strangers: what is read has limits (`minem.files`), and templates run in a process of their own (`minem.model.chat_template`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from minem.errors import UserError
from minem.files import CONFIG_LIMIT, MEBIBYTE, own_file, read_json, read_limited
from minem.model import chat_template as template

PROBE = "0 The best answer is (B).\n\n\t na\u00efve \u65e5\u672c \U0001f642 <s>" + 40 * "a"  # what must be readable
TOKEN_LIMIT = 10_000  # characters of one token; runs of blanks and of dashes have some hundred
GROWTH_LIMIT = 4096  # times as long as the text that a tokenizer's replacements may make it
TOKENIZER_LIMIT = 64 * MEBIBYTE  # the largest tokenizer.json in wide use (Gemma's) has 34 MiB

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
        for name in FILES:  # not all are read here, but all are hashed, and copied when a model is saved, hours later
            file = own_file(folder, name)
            if file.is_file() and file.stat().st_size > TOKENIZER_LIMIT:
                raise UserError(f"{file} has {file.stat().st_size} bytes; the limit is {TOKENIZER_LIMIT}")
        backend = _read_backend(own_file(folder, "tokenizer.json"))
        config = _read_optional(folder, "tokenizer_config.json")
        # As in transformers: special_tokens_map.json counts only where tokenizer_config.json is of the old kind.
        if "added_tokens_decoder" not in config:
            config |= _read_optional(folder, "special_tokens_map.json")
        special_tokens = _add_special_tokens(backend, config, folder)
        own_eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        eos_ids = set() if own_eos is None else {own_eos}
        for name in ("generation_config.json", "config.json"):
            eos_ids |= _eos_ids(_read_optional(folder, name), folder / name)
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
        except BaseException as error:
            if not _is_the_librarys(error):
                raise
            raise UserError(f"the tokenizer of {self.folder} fails on {text[:80]!r}: {_one_line(error)}") from error
        if add_special_tokens and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary have none."""
        given = list(ids)
        try:
            return str(self.backend.decode(given, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            if not _is_the_librarys(error):
                raise
            raise UserError(f"the tokenizer of {self.folder} fails on ids {given[:8]}: {_one_line(error)}") from error

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat (a list of {"role": ..., "content": ...}), special tokens written out.

        Raises UserError when the folder has no chat template, or the template is broken, refuses the messages or
        steps over a limit of minem.model.chat_template.
        """
        if self.chat_template is None:
            raise UserError(f"{self.folder} has no chat template (tokenizer_config.json or chat_template.jinja)")
        context = {**self.special_tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(self.chat_template, {"tools": None, "documents": None, **context})
        except UserError as error:
            raise UserError(f"the chat template of {self.folder} {error}") from error

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the model to answer. The template writes BOS itself, so none is added."""
        return self.encode(self.render(messages), add_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, byte for byte."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = own_file(self.folder, name)
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    path = own_file(folder, name)
    return read_json(path) if path.is_file() else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: a checkpoint folder needs its tokenizer.json")
    try:
        with _without_stderr():
            backend = tokenizers.Tokenizer.from_file(str(path))
            # Some files carry a training script's truncation; prompts are never cut or padded here (transformers
            # resets both).
            backend.no_truncation()
            backend.no_padding()
            _check_growth(backend)
            backend.decode(backend.encode(PROBE).ids)  # what names a missing token shows only here
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise UserError(f"{path} is not a tokenizer that can be used: {_one_line(error)}") from error
    return backend


def _is_the_librarys(error: BaseException) -> bool:
    """tokenizers panics on some inputs, and its panics are no Exceptions."""
    return not isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | GeneratorExit)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """A panic also prints its backtrace, past Python: what is said about a bad file is one sentence of ours."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # no stderr at all
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_growth(backend: tokenizers.Tokenizer) -> None:
    """Refuse what makes a short text very long: forty replacements that write two characters for one fill any memory,
    and so does a thousand times a token of megabytes."""
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)
    if longest > TOKEN_LIMIT:
        raise ValueError(f"one of its tokens has {longest} characters")
    for part in (backend.normalizer, backend.decoder):
        steps = [json.loads(part.__getstate__())] if part is not None else []
        growth = 1
        while steps:
            step = steps.pop()
            steps += step.get("normalizers") or step.get("decoders") or []
            if step.get("type") == "Prepend" and len(step["prepend"]) > TOKEN_LIMIT:
                raise ValueError(f"it puts {len(step['prepend'])} characters before a text")
            if step.get("type") == "Replace":  # a pattern may match at every character, and between any two
                growth *= 1 + len(step["content"])
        if growth > GROWTH_LIMIT:
            raise ValueError(f"its replacements make a text up to 10^{math.log10(growth):.0f} times as long")


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
    file = own_file(folder, "chat_template.jinja")
    if file.is_file():
        try:
            return read_limited(file, CONFIG_LIMIT).decode()
        except ValueError as error:
            raise UserError(f"{file} is not UTF-8 text") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list with a 'default'")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
