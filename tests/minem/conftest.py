"""What tests of all rooms share: one finished run in each test process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.minem import tiny_runs


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations that nothing disturbed (`tiny_runs.SETTINGS`). It is not to be changed: copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    tiny_runs.train(out)
    return out


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, at another place."""
    return shutil.copytree(finished_run, tmp_path / "run")
