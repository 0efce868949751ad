"""`minem doctor`: what it reports is true, its self-tests notice what is wrong, and no secret is shown."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from minem.cli import main
from minem.model.decoder import Model
from minem.planning import doctor

SECRET = "hf_do_not_show_this_to_anyone"


def examine(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--device", "cpu", *arguments])


def test_it_reports_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    result = examine("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert [check["name"] for check in found["checks"]] == ["generator against trainer"]
    machine = found["machine"]
    assert machine["python"] == platform.python_version()
    assert machine["torch"] == torch.__version__
    assert machine["runs_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert len([key for key in machine if key.startswith("gpu_")]) == torch.cuda.device_count()
    assert SECRET not in result.output
    assert list(tmp_path.iterdir()) == []
    text = "\n".join(doctor.lines(found))
    for word in ("this machine", "what runs on what", "self-test", platform.python_version(), "memory free", "kernels"):
        assert word in text


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Model.forward  # of the trainer alone
    monkeypatch.setattr(Model, "forward", lambda self, input_ids, **k: forward(self, input_ids.roll(1), **k))


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(Model, "forward", fails)


@pytest.mark.parametrize(
    ("harm", "detail"),
    [
        (wrong_attention, "disagree on the log-probabilities"),
        (broken, "RuntimeError: no kernel image is available for execution"),
    ],
)
def test_a_failed_self_test_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[..., None], detail: str
) -> None:
    harm(monkeypatch)
    result = examine()
    assert result.exit_code == 4
    assert "the self-test failed: the generator does not agree with the trainer" in result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "against" in line]
    assert line.startswith("  FAIL ")
    assert detail in line


@pytest.mark.gpu
def test_a_gpu_passes() -> None:
    result = CliRunner().invoke(main, ["doctor", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
