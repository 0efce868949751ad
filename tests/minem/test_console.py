"""Progress: sparse plain lines in files, one live line on a terminal, and hostile text stays text."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
import threading
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minem.console import Line, Progress, duration, percent, table
from minem.text import clean, visible

HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] :smile: \r\x9b2J \u202eright\u2066 two\nlines \x00 \ud83d"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_files_get_the_start_one_line_in_ten_seconds_and_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock).stage("E-step 1/4", total=1000) as line:
        for done in range(0, 1000, 10):  # 50 seconds
            clock.now += 0.5
            line.update(done + 10, accepted=percent(0.5), tokens_per_s=5300.2)
    assert stream.getvalue().splitlines() == [
        "E-step 1/4  0/1,000",
        "E-step 1/4  200/1,000  accepted 50.0 %  tokens/s 5,300  0:10, 0:40 left",
        "E-step 1/4  400/1,000  accepted 50.0 %  tokens/s 5,300  0:20, 0:30 left",
        "E-step 1/4  600/1,000  accepted 50.0 %  tokens/s 5,300  0:30, 0:20 left",
        "E-step 1/4  800/1,000  accepted 50.0 %  tokens/s 5,300  0:40, 0:10 left",
        "E-step 1/4  1,000/1,000  accepted 50.0 %  tokens/s 5,300  0:50, 0:00 left",
        "E-step 1/4  1,000/1,000  accepted 50.0 %  tokens/s 5,300  done after 0:50",
    ]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_the_work_continues_if_its_lines_cannot_be_printed(number: int) -> None:
    """The other end of a pipe has gone, the disk of a log is full, a terminal was closed."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    done = 0
    with Progress(Gone(), interval=0).stage("E-step", total=3) as line:
        for done in (1, 2, 3):
            line.update(done)
    assert done == 3


def test_what_is_not_known_is_not_shown() -> None:
    clock = Clock()
    line = Line("load", None, clock)
    clock.now += 3
    assert line.text() == "load  0:03"
    line.update(loss=0.123456, step=7)
    assert line.text("done") == "load  loss 0.123  step 7  done after 0:03"
    for total in (0, 5):  # nothing to do, or nothing done yet: no estimate, and no division by zero
        assert Line("eval", total, clock).text() == f"eval  0/{total}  0:00"


def test_a_stage_that_fails_is_shown_as_stopped_and_the_error_passes_through() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(stream).stage("M-step", total=3) as line:  # noqa: PT012
        line.update(1)
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines() == ["M-step  0/3", "M-step  1/3  stopped after 0:00"]


def in_a_terminal(work: object, columns: int = 100) -> str:
    """What a terminal of some width is sent."""
    master, slave = pty.openpty()
    os.environ["COLUMNS"] = str(columns)
    received = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # on Linux, once the other end is closed
                return
            if not data:
                return
            received.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(slave, "w", encoding="utf-8") as stream:
            work(stream)  # type: ignore[operator]
    finally:
        del os.environ["COLUMNS"]
        reader.join(timeout=10)
        os.close(master)
    return received.decode()


def test_a_terminal_gets_a_live_line_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def work(stream: io.TextIOWrapper) -> None:
        progress = Progress(stream)
        with progress.stage("E-step 1/4", total=4) as line:
            line.update(2, accepted=percent(0.5))
        with progress.stage("M-step 1/4"):
            pass

    sent = in_a_terminal(work)
    assert "━" * 10 + "─" * 10 in sent
    assert "E-step 1/4  2/4  accepted 50.0 %  done after 0:00\r\n" in sent
    assert "M-step 1/4  done after 0:00\r\n" in sent
    assert sent.count("done after") == 2
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 2  # the cursor is shown again


def test_a_narrow_terminal_cuts_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def work(stream: io.TextIOWrapper) -> None:
        with Progress(stream).stage("a stage with a long name", total=4) as line:
            line.update(2, fact="f" * 60)

    live, _, final = in_a_terminal(work, columns=30).rpartition("\x1b[?25h")
    assert "f" * 60 in final.replace("\r\n", "")
    assert "fff" not in live


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    def work(stream: io.TextIOWrapper) -> None:
        with Progress(stream).stage("E-step", total=4):
            pass

    assert in_a_terminal(work) == "E-step  0/4\r\nE-step  0/4  done after 0:00\r\n"


def test_the_default_is_stderr_and_stdout_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with progress.stage("E-step"):
        print("a result")
    progress.note("a note")
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert "a note" in captured.err


def test_tables_are_aligned_and_never_cut_in_files(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["base", percent(0.57, (0.51, 0.63)), 0], ["after", "a" * 150, 31000], ["loss", 0.51234, -3]]
    table(["model", "accuracy", "tokens"], rows, title="toy, rsm 8")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "toy, rsm 8"
    body = [line.split() for line in lines if line.startswith("  ") and "─" not in line]
    assert body[0] == ["model", "accuracy", "tokens"]
    assert body[1] == ["base", "57.0", "%", "(51.0-63.0)", "0"]
    assert body[2] == ["after", "a" * 150, "31,000"]
    assert body[3] == ["loss", "0.512", "-3"]
    assert len({len(line) for line in lines if line.startswith("  ") and "─" not in line}) == 1


def assert_harmless(text: str) -> None:
    for character in text:
        if character not in "\n ":
            assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
            assert unicodedata.bidirectional(character) not in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "PDI")


def test_hostile_text_is_only_text_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.stage(HOSTILE, total=1) as line:
        line.update(1, answer=HOSTILE)
    progress.note(HOSTILE)
    table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], title=HOSTILE)
    shown = stream.getvalue() + capsys.readouterr().out
    assert_harmless(shown)
    assert shown.count("[bold]x[/bold] :smile:") == 8  # neither markup nor emoji codes are interpreted
    assert clean(HOSTILE, keep_lines=True).count("\n") == 1


@given(text=st.text(st.characters()), keep_lines=st.booleans())
def test_clean_text_is_harmless_and_ordinary_text_is_kept(text: str, keep_lines: bool) -> None:
    cleaned = clean(text, keep_lines)
    assert_harmless(cleaned.replace("\t", " "))
    assert clean(cleaned, keep_lines) == cleaned
    cleaned.encode("utf-8")
    assert keep_lines or "\n" not in cleaned
    kept = "naïve 中文 🙂👩‍👩‍👧 עברית x²"
    assert clean(kept + text, keep_lines).startswith(kept)


@given(text=st.text(st.characters()))
def test_visible_text_is_harmless_and_loses_nothing(text: str) -> None:
    """Each character that `clean` would take out is an escape, and so recognisable; the others stay themselves."""
    shown = visible(text)
    assert clean(shown, keep_lines=True) == shown
    plain = text.replace("\r\n", "\n")
    taken = [c for c in plain if clean(c, keep_lines=True) != c]
    for character in taken:
        assert f"\\u{ord(character):04x}" in shown
    assert len(shown) == len(plain) + 5 * len(taken)
    shown.encode("utf-8")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (4000, "1:06:40")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_importing_it_is_quick() -> None:
    """It is imported before anything is shown, so it must not pull in torch."""
    script = "import minem.console, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
