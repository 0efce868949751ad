"""How a command ends if its standard streams are closed, full, or left by their reader: in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import minem
from tests.minem.tiny_runs import finished, flags

ROOT = str(Path(minem.__file__).parents[1])


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $M is minem."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "M": f"{sys.executable} -m minem"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_a_run_needs_no_standard_stream(tmp_path: Path, closed: str) -> None:
    """With stderr closed, the journal became file 2, and what torch prints would have gone into it."""
    look = "import os; print(*(os.readlink(f'/proc/self/fd/{i}') for i in range(3)), file=open('open', 'w'))"
    (tmp_path / "mine.py").write_text(f"{look}\ndef check(text, question): return None\n")
    more = " ".join(flags("run.iterations=0"))
    done = shell(f"$M train {more} --verdict mine:check --out run {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "run")[-1] == "report"
    streams = (tmp_path / "open").read_text().split()
    assert [streams[int(word[0])] for word in closed.split()] == ["/dev/null"] * len(closed.split())


@pytest.mark.parametrize("command", ["show RUN", "show RUN --json", "config", "--help", "train --help"])
def test_a_full_stdout_is_one_sentence_and_a_reader_that_left_none(finished_run: Path, command: str) -> None:
    command = command.replace("RUN", finished_run.name)
    full = shell(f"$M {command} > /dev/full", finished_run.parent)
    assert full.returncode == 3
    assert full.stderr == "minem: the output cannot be written: No space left on device\n"
    left = shell(f"$M {command} | true; exit ${{PIPESTATUS[0]}}", finished_run.parent)
    assert (left.returncode, left.stderr) == (0, ""), left.stderr
