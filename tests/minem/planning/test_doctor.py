"""`minem doctor`: what it says is so, its self-tests notice what is wrong, and no secret is shown."""

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


def test_it_says_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
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
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["runs_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert len(machine["gpus"]) == torch.cuda.device_count()
    assert machine["hub_token"] is True
    assert SECRET not in result.output
    assert list(tmp_path.iterdir()) == []
    text = examine()
    assert text.exit_code == 0
    assert SECRET not in text.output
    for word in ("this machine", "what runs on what", "self-test", platform.python_version(), "there is one"):
        assert word in text.stdout


def test_a_place_of_the_hubs_that_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NotADirectoryError("/etc/passwd/token")

    monkeypatch.setattr("huggingface_hub.get_token", fails)
    result = examine("--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["machine"]["hub_token"] is False


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Model._packed_hidden
    monkeypatch.setattr(Model, "_packed_hidden", lambda self, ids, lengths: hidden(self, ids.roll(1), lengths))


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
    ("harm", "failed", "said"),
    [
        (wrong_attention, "generator against trainer", "disagree on the log-probabilities"),
        (wrong_loss, "loss against float64", "off by"),
        (wrong_gradient, "loss against float64", "off by"),
        (wrong_draws, "sampling against its probabilities", "chi-square"),
        (broken, "sampling against its probabilities", "no kernel image is available for execution"),
    ],
)
def test_a_wrong_part_is_found(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[..., None], failed: str, said: str
) -> None:
    harm(monkeypatch)
    result = examine("--json")
    assert result.exit_code == 4
    assert "self-tests failed" in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [check["passed"] for check in found["checks"] if failed in check["name"]] == [False]
    assert sum(not check["passed"] for check in found["checks"]) == 1
    assert said in next(check["detail"] for check in found["checks"] if not check["passed"])
    assert any("cannot be trusted" in sentence for sentence in found["advice"])


def test_what_to_do_about_what_is_missing() -> None:
    gpu = {"name": "Tesla T4", "memory_bytes": 16 * 10**9, "memory_free_bytes": 10**9, "capability": [7, 5]}
    fine = {"versions": {"triton": "3.7.1"}, "gpus": [], "driver": False, "cuda": None, "hub_offline": False}
    fine |= {"hub_token": True, "runs_free_bytes": 10**12, "hub_cache_free_bytes": 10**12}

    def advice(parts: str = "none here", passed: bool = True, **more: Any) -> str:
        return "\n".join(doctor._advice({**fine, **more}, {"GPUs": parts}, passed))

    assert advice() == ""
    assert "torch was built without CUDA: pip install torch" in advice(driver=True)
    assert "torch cannot use it: update the driver" in advice(driver=True, cuda="12.8")
    assert "pip install triton" in advice(gpus=[gpu], versions={})
    assert "model.dtype=float32" in advice(gpus=[gpu])
    assert "--gpus 2" in advice("2 here: --gpus N, nccl", gpus=[gpu, gpu])
    assert "are free for ./runs" in advice(runs_free_bytes=10**9)
    assert "HF_HOME" in advice(hub_cache_free_bytes=10**9)
    assert "HF_TOKEN" in advice(hub_token=False)
    assert "HF_HUB_OFFLINE" in advice(hub_token=False, hub_offline=True)
    assert "HF_TOKEN" not in advice(hub_token=False, hub_offline=True)


@pytest.mark.gpu
def test_both_backends_are_right_on_a_gpu() -> None:
    result = CliRunner().invoke(main, ["doctor", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
    names = [check["name"] for check in json.loads(result.stdout)["checks"]]
    assert sum("triton" in name for name in names) == 2
