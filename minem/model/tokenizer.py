"""A checkpoint folder's tokenizer: text <-> token ids, and chats -> prompt text by the folder's own template.

    python -c "from minem.model.tokenizer import Tokenizer; print(Tokenizer.from_folder('FOLDER').encode('Hello'))"

`tokenizer.json` is read by the tokenizers library. The files around it are read as transformers 5 reads them.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from minem.errors import UserError, reason
from minem.files import CONFIG_LIMIT, own_file, read_json, read_limited
from minem.model import chat_template as template

PROBE = "0 The best answer is (B).\n\n\t na\u00efve \u65e5\u672c \U0001f642 <s>"  # encoded and decoded on loading
# All files of a tokenizer, copied unchanged by `save`. (config.json and generation_config.json belong to the weights.)
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
TEMPLATES = "additional_chat_templates/*.jinja"
FLAGS = ("lstrip", "rstrip", "normalized", "single_word")  # of an added token
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(eq=False)
class Tokenizer:
    """Text <-> token ids for one checkpoint folder."""

    folder: Path
    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" -> "<s>" and so on: variables of the chat template
    chat_template: str | None
    eos_ids: frozenset[int]  # any of these ends a text; empty if the folder names none

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read tokenizer.json and the small files around it, if present. UserError names what is wrong with them."""
        folder = Path(path)
        for name in FILES:  # `save` copies all of them, hours later: refuse links out of the folder now
            own_file(folder, name)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_optional(folder, "tokenizer_config.json")
        # As in transformers: special_tokens_map.json counts only if tokenizer_config.json is of the old kind.
        if "added_tokens_decoder" not in config:
            old = _read_optional(folder, "special_tokens_map.json")
            own = {name for name, token in config.items() if isinstance(token, str)} - {*NAMED_TOKENS}
            config |= {name: token for name, token in old.items() if name not in own}
        special_tokens = _add_tokens(backend, config, folder)
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        eos_ids = set() if eos is None else {eos}
        named = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
        eos_ids |= _eos_ids(folder, named)  # as transformers, which knows none of the tokenizer's own
        return cls(folder, backend, special_tokens, _read_template(folder, config), frozenset(eos_ids))

    @cached_property
    def bos_id(self) -> int | None:
        bos = self.special_tokens.get("bos_token")
        return None if bos is None else self.backend.token_to_id(bos)

    @cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text: the tokenizer's own, else the least of those that the checkpoint names."""
        eos = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return min(self.eos_ids, default=None) if eos is None else eos

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Texts that `encode` turns into one control token, like <|im_end|>; among spaces and words there are none."""
        added = self.backend.get_added_tokens_decoder().values()
        texts = [token.content for token in added if token.special or re.fullmatch(r"[<\[].+[>\]]", token.content)]
        return re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or "(?!)")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens` runs tokenizer.json's post-processor; BOS is never doubled."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"this text is not valid Unicode and cannot be tokenised: {text[:80]!r}") from error
        with _explained(f"the tokenizer of {self.folder} fails on {text[:80]!r}"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary have none."""
        given = list(ids)
        with _explained(f"the tokenizer of {self.folder} fails on ids {given[:8]}"):
            return str(self.backend.decode(given, skip_special_tokens=skip_special_tokens))

    def render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, more: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt text of a chat; `more`: variables for its template. UserError if that is missing or fails."""
        if self.chat_template is None:
            raise UserError(f"{self.folder} has no chat template (tokenizer_config.json or chat_template.jinja)")
        own = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        context = {**(more or {}), **self.special_tokens, **own}
        try:
            return template.render(self.chat_template, {"tools": None, "documents": None, **context})
        except UserError as error:
            raise UserError(f"the chat template of {self.folder} {error}") from error

    def chat(self, messages: list[dict[str, str]], more: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a chat, ready for the model to answer. The template writes BOS itself, so none is added."""
        return self.encode(self.render(messages, more=more), add_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        more = [path.relative_to(self.folder).as_posix() for path in self.folder.glob(TEMPLATES)]
        copy_files([*FILES, *more], self.folder, Path(folder))


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those of the named files that `source` has into `target`, which may be the same folder."""
    for name in names:
        file = own_file(source, name)
        if file.is_file() and file.resolve() != (target / name).resolve():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    path = own_file(folder, name)
    return read_json(path) if path.is_file() else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: a checkpoint folder needs its tokenizer.json")
    with _explained(f"{path} is not a tokenizer that can be used"), _silent_stderr():
        backend = tokenizers.Tokenizer.from_file(str(path))
        # Some files carry a training script's truncation and padding; transformers resets both, too.
        backend.no_truncation()
        backend.no_padding()
        backend.decode(backend.encode(PROBE).ids)  # a missing special token only fails here
    return backend


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Errors and panics of the Rust library become a UserError that begins with `problem`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise UserError(f"{problem}: {reason(error)}") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The library prints its panics, with a backtrace, to the process's stderr: meanwhile that is the null device."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Add what the files beside tokenizer.json name, in transformers' order; the named special tokens, name -> text."""
    written = backend.get_added_tokens_decoder()
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    named = {key: config[key] for key in NAMED_TOKENS if config.get(key) is not None}
    for name, token in config.items():  # a model's own, as image_token
        if name.endswith("_token") and (isinstance(token, str) or (isinstance(token, dict) and "__type" in token)):
            named.setdefault(name, token)
    try:
        if isinstance(extra, dict):
            named, extra = named | extra, []
        special = {name: _text_of(token) for name, token in named.items()}
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise TypeError("added_tokens_decoder must be an object of id -> token")
        added = {int(token_id): tokenizers.AddedToken(**fields) for token_id, fields in decoder.items()}
        if "added_tokens_decoder" not in config:
            texts = {*special.values(), *map(_text_of, extra)}
            for text, token_id in _read_optional(folder, "added_tokens.json").items():
                added[token_id] = tokenizers.AddedToken(text, special=text in texts, normalized=text not in texts)
            added |= written
        new = [token for _, token in sorted(added.items(), key=lambda item: item[0])]
        known = {token.content for token in (*written.values(), *new)}
        unknown = [token for token in (*named.values(), *extra) if _text_of(token) not in known]
        for number, token in enumerate(unknown):
            if token not in unknown[:number]:
                fields = {k: v for k, v in token.items() if k in FLAGS} if isinstance(token, dict) else {}
                new.append(tokenizers.AddedToken(_text_of(token), **(fields | {"special": True})))
        for token in new:
            token.special = token.special or token.content in special.values()
        backend.add_tokens(new)
        for token_id, token in added.items():
            if backend.token_to_id(token.content) != token_id:
                raise ValueError(f"the token {token.content!r} is not number {token_id} in tokenizer.json")
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: bad token: {reason(error)}") from error
    return special


def _text_of(token: Any) -> str:
    """A special token is written as its text or as {"content": text, ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"expected a text, not {text!r}")
    text.encode()  # a lone surrogate is a ValueError here and a panic inside the library
    return text


def _eos_ids(folder: Path, name: str) -> set[int]:
    value = _read_optional(folder, name).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{folder / name}: eos_token_id must be a token id or a list of them, not {value!r}")
    return set(ids)


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja comes before the config's entry, which is a text or a list with a "default"."""
    file = own_file(folder, "chat_template.jinja")
    if file.is_file():
        try:
            return read_limited(file, CONFIG_LIMIT).decode()
        except ValueError as error:
            raise UserError(f"{file} is not UTF-8 text") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default", 0)
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or texts of which one is 'default'"
        )
    return found
