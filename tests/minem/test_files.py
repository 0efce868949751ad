"""JSON lines files: what is written comes back, and rows of strangers are refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from minem.errors import UserError
from minem.files import read_rows, write_rows


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines \u2028 \x1b[31m \ud83d \0", "x": 0.1}, {}, {"n": [1, None, True]}]
    write_rows(tmp_path / "rows.jsonl", iter(rows))
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    write_rows(tmp_path / "none.jsonl", [])
    assert list(read_rows(tmp_path / "none.jsonl")) == []
    with pytest.raises(ValueError):
        write_rows(tmp_path / "rows.jsonl", [{"x": float("nan")}])


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"a": 1} {"b": 2}', "[" * 100_000, "\ufeff{}", "\x80"])
def test_rows_of_strangers_are_refused_by_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"ok": 1}\n\n' + line.encode("latin-1", "replace") + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: not a JSON object"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "missing.jsonl"))


def test_a_line_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minem.files.LINE_LIMIT", 10)
    (tmp_path / "rows.jsonl").write_bytes(b'{"ok": 1}\n{"ok": 100}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: longer than 10 bytes"):
        list(read_rows(tmp_path / "rows.jsonl"))
