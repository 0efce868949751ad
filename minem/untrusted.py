"""Files from strangers: small enough, in their own folder, and JSON that can be read in one way only.

    python -c "from minem.untrusted import *; print(parse('[1, {\"a\": 1, \"a\": 2}]'))"

Whatever is wrong is one sentence. Python's own parser takes the last of two equal keys and reads NaN, which other
readers of the same file do not: what one tool has checked must not be something else for the next.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from minem.errors import UserError

MEBIBYTE = 1 << 20
CONFIG_LIMIT = 4 * MEBIBYTE  # bytes; the largest tokenizer_config.json in wide use (Gemma's) has 1.1 MiB
TOML_LIMIT = MEBIBYTE // 16
TOML_LINE_LIMIT = 4096
DEPTH_LIMIT = 64  # lists and objects inside each other


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, always in one line, for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels") from None
    # The brackets are more than the depth, so that a flat text needs no second look.
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if brackets > DEPTH_LIMIT and _is_deep(value):
        raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels")
    return value


def read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """One JSON object from a file of at most `limit` bytes; UserError names the file and what is wrong with it."""
    content = read_limited(path, limit)
    try:
        value = parse(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} was expected")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a small TOML file. UserError names the file and what is wrong with it."""
    try:
        text = read_limited(path, TOML_LIMIT).decode()
        if any(len(line) > TOML_LINE_LIMIT for line in text.split("\n")):  # of a key's dots, tomllib tries every pair
            raise ValueError(f"a line has more than {TOML_LINE_LIMIT} characters")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not valid TOML: {str(error)[:300]}") from error


def read_limited(path: Path, limit: int) -> bytes:
    """A file's content. UserError where it cannot be read or has more than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit} bytes; that is the limit")
    return content


def own_file(folder: Path, name: str) -> Path:
    """The path of a file that lies in this folder, or is not there at all.

    Files are copied from folder to folder, unread, and folders are published: a link that leads out of one would take
    along a file of the user's. The hub's cache is built of links from SNAPSHOT/name to ../../blobs, so those are good.
    Raises UserError for any other link that leads out, and for what is no file: reading a pipe might never end.
    """
    path = folder / name
    try:
        home = folder.resolve()
        homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
        there, inside = os.path.exists(path), any(path.resolve().is_relative_to(one) for one in homes)
    except (OSError, RuntimeError) as error:  # a link to itself, a name that is too long
        raise UserError(f"{path} cannot be read: {error}") from error
    if not inside:
        raise UserError(f"{path} is a link that leads out of its folder; put the file itself there")
    if there and not path.is_file():
        raise UserError(f"{path} is not a file")
    return path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {again[:80]!r} stands twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH_LIMIT):
        parts = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True
