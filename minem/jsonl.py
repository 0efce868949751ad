"""JSON lines on the disk: one object a line. Those of others are not trusted, and those that we append to may be torn.

python -c "from minem.jsonl import read_rows; print(next(read_rows('FILE.jsonl')))"
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minem.disk import flush
from minem.errors import UserError
from minem.untrusted import parse

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
