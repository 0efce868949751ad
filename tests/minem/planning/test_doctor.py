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
    assert {check["name"] for check in found["checks"]} == {
        "generator against trainer",
        "loss against float64, eager",
        "sampling against its probabilities, eager",
    }
    machine = found["machine"]
    assert machine["python"] == platform.python_version()
    assert machine["torch"] == torch.__version__
    assert machine["runs_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert len([key for key in machine if key.startswith("gpu_")]) == torch.cuda.device_count()
    assert machine["hub_token"] is True
    assert SECRET not in result.output
    assert list(tmp_path.iterdir()) == []
    text = "\n".join(doctor.lines(found))
    for word in ("this machine", "what runs on what", "self-test", platform.python_version(), "memory free", "kernels"):
        assert word in text


def test_a_home_of_the_hub_that_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NotADirectoryError("/etc/passwd/token")

    monkeypatch.setattr("huggingface_hub.get_token", fails)
    assert doctor._machine()["hub_token"] is False


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Model.forward  # of the trainer alone
    monkeypatch.setattr(Model, "forward", lambda self, ids, *a, **k: forward(self, ids.roll(1), *a, **k))


def wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.linear_cross_entropy
    monkeypatch.setattr(doctor, "linear_cross_entropy", lambda *a, **k: (right(*a, **k)[0] * (1 + 1e-4),))


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.linear_cross_entropy

    def without_gradient_of_weight(hidden: Any, weight: Any, *rest: Any, **more: Any) -> Any:
        return (
            right(hidden, weight.detach() + 0 * weight, *rest, **more)[0] + 1e-3 * (weight - weight.detach()).sum(),
        )

    monkeypatch.setattr(doctor, "linear_cross_entropy", without_gradient_of_weight)


def wrong_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.sample
    monkeypatch.setattr(doctor, "sample", lambda logits, *a, **k: right(logits * 1.05, *a, **k))


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(doctor, "sample", fails)


@pytest.mark.parametrize(
    ("harm", "failed", "detail"),
    [
        (wrong_attention, "generator against trainer", "disagree on the log-probabilities"),
        (wrong_loss, "loss against float64", "off by"),
        (wrong_gradient, "loss against float64", "off by"),
        (wrong_draws, "sampling against its probabilities", "chi-square"),
        (broken, "sampling against its probabilities", "no kernel image is available for execution"),
    ],
)
def test_a_wrong_part_is_found(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[..., None], failed: str, detail: str
) -> None:
    harm(monkeypatch)
    (check,) = [check for check in doctor._checks(torch.device("cpu")) if failed in check[0]]
    found = doctor._checked(*check)
    assert found["passed"] is False
    assert detail in found["detail"]


def test_a_failed_self_test_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    result = examine()
    assert result.exit_code == 4
    assert "self-tests failed: sampling against its probabilities, eager" in result.stderr
    assert [line[2:6] for line in result.stdout.splitlines() if "against" in line] == ["ok  ", "ok  ", "FAIL"]


@pytest.mark.gpu
def test_both_backends_are_right_on_a_gpu() -> None:
    result = CliRunner().invoke(main, ["doctor", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
    names = [check["name"] for check in json.loads(result.stdout)["checks"]]
    assert sum("triton" in name for name in names) == 2
