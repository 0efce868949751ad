"""A run that is killed or asked to stop, at any moment, ends as the one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minem.config import load_config
from minem.em import Experiment
from minem.errors import GuardError, Interrupted
from minem.packing import Example
from minem.progress import Progress
from minem.run import read_journal, read_rows
from minem.stopping import Stop
from minem.train import train

SETTINGS = ["run.iterations=2", "task.limit=16", "mstep.epochs=4", "mstep.batch_size=4", "eval.diagnostics=4"]
FILES = ("samples.jsonl", "accepted.jsonl", "eval.validation.jsonl", "eval.test.jsonl", "model/model.safetensors")
VARYING = ("seconds", "tokens_per_second", "peak_process_memory", "mfu")


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves which must not depend on how it was interrupted."""
    found: dict[str, object] = {}
    for folder in sorted(run.glob("iter-*")):
        found |= {f"{folder.name}/{name}": (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    rows = [{k: v for k, v in row.items() if k not in VARYING} for row in read_rows(run / "metrics.jsonl")]
    return found | {"metrics": rows}


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    command = [sys.executable, "-m", "minem", "train", "--device", "cpu", *settings, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines(run: Path) -> int:
    """How far a run has come: lines of its journal and its metrics."""
    files = (run / "journal.jsonl", run / "metrics.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(out, "run.checkpoint_minutes=0.0")
    assert process.communicate(timeout=300)[1] is not None
    assert process.returncode == 0
    return outcome(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_five_points_a_run_ends_with_the_same_bytes(tmp_path, undisturbed, seed):
    """Twenty in all, each at another place: after so many new lines of journal and metrics, and a moment more."""
    noise, out = random.Random(seed), tmp_path / "run"
    kills, reached = 0, []
    while kills < 5:
        process, wanted = start(out, "run.checkpoint_minutes=0.0"), lines(out) + noise.randint(1, 8)
        while process.poll() is None and lines(out) < wanted:
            time.sleep(0.005)
        time.sleep(noise.uniform(0, 0.2))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        reached.append(lines(out))
    assert kills >= 4
    assert len(set(reached)) >= 3
    process = start(out, "run.checkpoint_minutes=0.0")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert outcome(out) == undisturbed
    assert not [path for path in out.rglob("*") if "checkpoint." in path.name or ".partial" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_the_m_step_leaves_a_checkpoint(tmp_path, undisturbed, number):
    out = tmp_path / "run"
    process = start(out)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and b'"iter-01/mstep"' in metrics.read_bytes()):
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert "give the same command again to go on" in err.splitlines()[-1]
    process = start(out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert outcome(out) == undisturbed


class AfterSteps(Stop):
    """Asked to stop when it has been looked at so many times in the M-step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signal = "SIGTERM"
        return self.signal is not None

    def check(self, what: str) -> None:
        """Everywhere else it is not looked at."""


def finish(config) -> None:
    train(config, Progress())


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="float32"),
        pytest.param(("model.dtype=bfloat16", "mstep.optimizer_state=keep"), id="bfloat16, moments kept"),
        pytest.param(("mstep.lora_rank=4", "mstep.lr=1e-2"), id="lora", marks=pytest.mark.slow),
        pytest.param(("run.init=base",), id="from the base", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_checkpoints_go_on_to_the_same_bytes_even_when_damaged(tmp_path, settings, damaged):
    """Stopped after step 3 of the first M-step; the checkpoint it left is whole, changed or cut short."""
    few = [*SETTINGS[:4], "eval.diagnostics=0", "eval.samples=0", *settings, "run.device=cpu"]
    whole, cut = (load_config(overrides=[*few, f"run.out={tmp_path / name}"]) for name in "ab")
    finish(whole)
    experiment = Experiment(cut, Progress(), stop=AfterSteps(2))
    with experiment.open([], False), pytest.raises(Interrupted, match="after step 3 of"):
        experiment.train()
    folder = tmp_path / "b" / "iter-01"
    found = sorted(path.name for path in folder.glob("checkpoint.*"))
    assert found == ["checkpoint.3"]
    if damaged:
        file = folder / "checkpoint.3" / "state-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if damaged == 1 else content[:1000])
    finish(cut)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert not (folder / "checkpoint.3").exists()


def test_what_is_not_finite_is_left_in_the_log(tmp_path):
    config = load_config(overrides=["task.limit=8", "run.device=cpu", f"run.out={tmp_path / 'run'}"])
    experiment = Experiment(config, Progress())
    with torch.no_grad():
        experiment.model.norm.weight.fill_(float("nan"))
    with experiment.open([], False), pytest.raises(GuardError, match=r"not-finite\.iter-01\.json"):
        experiment.m_step(1, [Example("q1", [5, 6], [7, 8])])
    (dump,) = (tmp_path / "run" / "log").iterdir()
    assert json.loads(dump.read_text())["examples"][0]["id"] == "q1"
    assert "iter-01/mstep" not in read_journal(tmp_path / "run")
