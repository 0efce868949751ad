"""Files that survive a crash (atomic, flushed, known by their SHA-256), and JSON and TOML files of anyone, with limits.

python -c "from pathlib import Path; from minem.files import manifest; print(manifest(Path('README.md'), 'README.md'))"
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.filesize import decimal

from minem.errors import UserError, reason

MEBIBYTE = 1 << 20
CONFIG_LIMIT = 4 * MEBIBYTE  # the largest tokenizer_config.json in wide use (Gemma's) has 1.1 MiB
TOML_LIMIT = MEBIBYTE // 16
LINE_LIMIT = 64 * MEBIBYTE  # of JSON lines: a sample of a million tokens has about 20
PARTIAL = ".partial"  # folder of unfinished files, beside the finished ones
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the largest file allowed
SPARE = MEBIBYTE  # bytes that must stay free beside the announced ones, for a journal and the like


def manifest(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "sha256": digest}} of a file that gets this name, or of all files in such a folder."""
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return {(Path(name) / file.relative_to(path)).as_posix(): entry(file) for file in files}


def entry(path: Path) -> dict[str, Any]:
    """Size and digest of one file. Cheap right after writing, while its pages are still in memory."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_as_written(path: Path, written: Any) -> bool:
    """Whether the file exists, is readable and matches its entry of the manifest."""
    try:
        return path.is_file() and entry(path) == written
    except OSError:  # an unreadable sector
        return False


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, means a full disk; safetensors only quotes the system: "(os error 28)"."""
    while error is not None:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        if (error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None) in FULL:
            return True
        error = error.__cause__
    return False


def shortage(folder: Path, needed: int) -> str | None:
    """ "about 3.2 GB are needed and 1.1 GB are free" if `needed` bytes and a little more do not fit; else None."""
    total, _, free = shutil.disk_usage(folder)
    if free >= needed + SPARE or total == 0:  # some network file systems report nothing
        return None
    return f"about {decimal(needed + SPARE)} are needed and {decimal(free)} are free"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that exists complete or not at all, even if the machine stops. UserError if it is a link."""
    partial = no_link(no_link(path).parent / PARTIAL) / f"{secrets.token_hex(4)}.{path.name}"  # nobody's name
    partial.parent.mkdir(exist_ok=True)
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        remove(partial)
        remove_empty(partial.parent, path.parent)
    flush(path.parent)


def append_to(path: Path) -> IO[bytes]:
    """A file to add to, unbuffered. OSError for a link."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def no_link(path: Path) -> Path:
    """The path. UserError if it is a symbolic link: minem writes through none."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and minem writes through none; put the file or folder there")
    return path


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its content, if it exists; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path, home: Path) -> None:
    """Remove a folder and those around it, below `home`, as far as they are empty."""
    with contextlib.suppress(OSError):
        for one in (folder, *folder.parents):
            if one == home or one.is_symlink():
                break
            one.rmdir()


def flush_tree(path: Path) -> None:
    """fsync a file, or a folder and everything in it."""
    for one in (*path.rglob("*"), path):
        flush(one)


def flush(path: Path) -> None:
    """fsync a file, or a folder without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a JSON lines file, in ASCII: control characters and lone surrogates are escaped."""
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, one object a line."""
    with open(path, "wb") as file:
        file.writelines(map(json_line, rows))


def read_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of a JSON lines file without its blank lines; a ValueError for a line of no JSON."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), start=1):
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{path}, line {number}: longer than {LINE_LIMIT} bytes")
                if not line.isspace():
                    try:
                        yield number, parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except ValueError as error:  # bad UTF-8 too
                        yield number, error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file of anyone. UserError names the file and the line."""
    for number, row in read_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        yield row


def complete_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a file that is appended to, without a cut off last line; `repair` removes it from the file, too."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [_parse_row(line) if line.endswith(b"\n") else None for line in lines]
    if None in rows[:-1]:
        raise damaged(path, rows.index(None) + 1)
    if rows and rows[-1] is None and repair:
        os.truncate(path, sum(map(len, lines[:-1])))
        flush(path)
    return [row for row in rows if row is not None]


def damaged(path: Path, number: int) -> UserError:
    """The error for a bad line in a file that is appended to: the lines above it are enough to continue from."""
    shorter = path.name != "metrics.jsonl"  # whose lines the journal knows
    way = "delete it and all lines below it to continue from there" if shorter else "put the file back"
    return UserError(f"{path}, line {number}: damaged; {way}, or give --overwrite to start from scratch")


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def parse(text: str | bytes) -> Any:
    """The value of a JSON text without repeated keys, NaN and infinities; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """One JSON object from a file of at most `limit` bytes; UserError names the file and what is wrong with it."""
    try:
        value = parse(read_limited(path, limit))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} was expected")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a small TOML file. UserError names the file and what is wrong with it."""
    try:
        return tomllib.loads(read_limited(path, TOML_LIMIT).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not valid TOML: {reason(error)}") from error


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a file. UserError if it cannot be read or has more than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit} bytes; that is the limit")
    return content


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in this folder, which may not exist. UserError for a link out of it, which could publish a
    private file (but the hub's client links to the blobs of its cache), and for a pipe or a device."""
    path = folder / name
    try:
        home, target, exists = folder.resolve(), path.resolve(), os.path.exists(path)
    except (OSError, RuntimeError) as error:  # a link to itself, a name that is too long
        raise UserError(f"{path} cannot be read: {error}") from error
    in_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if not (target.is_relative_to(home) or in_cache):
        raise UserError(f"{path} is a link that leads out of its folder; put the file itself there")
    if exists and not path.is_file():
        raise UserError(f"{path} is not a file")
    return path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):  # NaN, Infinity, or 1e999
        raise ValueError(f"{digits[:40]} is no JSON number")
    return value
