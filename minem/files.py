"""Files that survive an accident: flushed before they count, seen whole or not at all, and known by their SHA-256.

    python -c "from pathlib import Path; from minem.files import manifest; print(manifest(Path('README.md')))"

`minem.runs.directory` builds on these; nothing here knows what a run is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from minem.errors import UserError

PARTIAL = ".partial."  # how the names of files begin that are not finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the largest file allowed
SPARE = 1 << 20  # bytes that must stay free beside what is announced, for a journal and the like


def manifest(path: Path, name: str = "") -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "sha256": digest}} of a file, or of all files in a folder, `name` being its own name."""
    if not path.is_dir():
        return {name or path.name: entry(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {f"{name or path.name}/{file.relative_to(path).as_posix()}": entry(file) for file in files}


def entry(path: Path) -> dict[str, Any]:
    """Size and digest of one file. Cheap right after it was written, while its pages are still in memory."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_as_written(path: Path, written: Any) -> bool:
    """Is the file there, readable, and the one that the manifest's entry was made of?"""
    try:
        size = written.get("bytes") if isinstance(written, dict) else None
        return path.is_file() and path.stat().st_size == size and entry(path) == written
    except OSError:  # a sector that cannot be read any more
        return False


def is_full(error: BaseException | None) -> bool:
    """Did this go wrong because nothing more could be written? Also where another error was raised from that one.

    safetensors writes by itself and raises its own error, in which the system's stands as "(os error 28)".
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        told = re.search(r"\(os error (\d+)\)", str(error))
        if code in FULL or (told is not None and int(told[1]) in FULL):
            return True
        error = error.__cause__
    return False


def shortage(folder: Path, needed: int) -> str | None:
    """ "about 3.2 GB are needed and 1.1 GB are free" where so many bytes, and a little more, would not fit."""
    total, _, free = shutil.disk_usage(folder)
    if free >= needed + SPARE or total == 0:  # some network file systems do not say
        return None
    return f"about {shown_bytes(needed + SPARE)} are needed and {shown_bytes(free)} are free"


def shown_bytes(size: int) -> str:
    """1234567 -> "1.2 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen whole or not at all, even where the machine stops."""
    partial = path.with_name(PARTIAL + path.name)
    with open(partial, "wb") as file:
        file.write(content)
        flush(file)
    os.replace(partial, path)
    flush_folders(path.parent, path.parent)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(file: IO[bytes]) -> None:
    """fsync what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def flush_tree(path: Path) -> None:
    """fsync a file, or a folder and everything in it."""
    for child in path.iterdir() if path.is_dir() else ():
        flush_tree(child)
    _flush_entry(path)


def flush_folders(folder: Path, top: Path) -> None:
    """fsync the entries of `folder` and of the folders above it, up to `top`."""
    _flush_entry(folder)
    if folder != top:
        flush_folders(folder.parent, top)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


ROW_LIMIT = 16 << 20  # bytes of one line


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines (UTF-8, one object a line) and say how many."""
    count = 0
    with open(path, "wb") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (the count is the result)
            file.write(json_line(row))
    return count


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, which may be anyone's. UserError names the file and the line."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(ROW_LIMIT + 1):
                number += 1
                if len(line) > ROW_LIMIT:
                    raise UserError(f"{path}, line {number}: longer than {ROW_LIMIT} bytes")
                if line.isspace():
                    continue
                row = _parse(line)
                if row is None:
                    raise UserError(f"{path}, line {number}: not a JSON object")
                yield row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a JSONL file."""
    # ASCII only, so that hostile text (control characters, lone surrogates) is harmless to look at and always valid.
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def damaged(path: Path, number: int) -> UserError:
    """What to say of a line of a file that we append to, and of which what stands above it is enough to go on."""
    return UserError(
        f"{path}, line {number}: damaged; delete it and all lines below it to go on from there, or give --overwrite to "
        "start anew"
    )


def keep_whole(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that we append to, a cut off last line removed so that the next one starts afresh."""
    rows, size = whole_lines(path)
    if path.exists() and path.stat().st_size > size:
        with open(path, "r+b") as file:
            file.truncate(size)
            flush(file)
    return rows


def whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file that we append to, and the bytes they take: a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    size = 0
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = _parse(line) if line.endswith(b"\n") else None
        if row is None and number < len(lines):
            raise damaged(path, number)
        if row is not None:
            rows.append(row)
            size += len(line)
    return rows, size


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


MEBIBYTE = 1 << 20
CONFIG_LIMIT = 4 * MEBIBYTE  # bytes; the largest tokenizer_config.json in wide use (Gemma's) has 1.1 MiB
TOML_LIMIT = MEBIBYTE // 16
TOML_LINE_LIMIT = 4096
DEPTH_LIMIT = 64  # lists and objects inside each other


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, always in one line, for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
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


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # what Python makes of 1e999
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


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
