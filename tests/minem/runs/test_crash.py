"""A run that is killed or asked to stop, at any moment, ends as the one that was left alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from minem.config import load_config
from minem.console import Progress
from minem.em.loop import Experiment
from minem.em.masters import Masters
from minem.em.packing import Example
from minem.errors import GuardError, Interrupted
from minem.files import read_rows
from minem.parallel.signals import Stop
from minem.runs.directory import read_journal
from minem.train import train

SETTINGS = ["run.iterations=2", "task.limit=16", "mstep.epochs=4", "mstep.batch_size=4", "run.device=cpu"]
SETTINGS += ["sampler.budget=2", "sampler.max_new_tokens=32", "eval.max_new_tokens=32", "eval.samples=0"]
SETTINGS += ["eval.diagnostics=2"]
# One slot, so that the 32 questions of an E-step come in two blocks; a checkpoint after every step.
IN_BLOCKS = ["task.limit=32", "mstep.batch_size=8", "run.slots=1", "run.checkpoint_minutes=0.0"]
FILES = ("samples.jsonl", "accepted.jsonl", "eval.validation.jsonl", "eval.test.jsonl", "model/model.safetensors")
VARYING = ("seconds", "tokens_per_second", "peak_process_memory", "mfu")
AGAIN = "give the same command again to resume"


def steady(values: dict[str, Any]) -> dict[str, Any]:
    """Without times, rates and memory."""
    return {key: value for key, value in values.items() if key not in VARYING}


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves which must not depend on how it was interrupted."""
    found: dict[str, object] = {}
    for folder in sorted(run.glob("iter-*")):
        found |= {f"{folder.name}/{name}": (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    # Of checkpoints, those that the clock and signals asked for are left out.
    stages = [(stage, steady(result)) for stage, result in read_journal(run).items() if "/mstep." not in stage]
    return found | {"metrics": [steady(row) for row in read_rows(run / "metrics.jsonl")], "journal": stages}


def settled(more: Sequence[str]) -> list[str]:
    """SETTINGS with others in their place or beside them."""
    found = dict(setting.split("=", 1) for setting in (*SETTINGS, *more))
    return [f"{key}={value}" for key, value in found.items()]


def start(
    out: Path, settings: Sequence[str] = (), *flags: str, folder: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """`minem train` as a user starts it; `folder`: of modules that Python looks at first."""
    words = [word for setting in settled(settings) for word in ("--set", setting)]
    command = [sys.executable, "-m", "minem", "train", *words, *flags, "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(command, env=everything, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it said."""
    _, err = process.communicate(timeout=500)
    assert process.returncode == code, err
    return err


def finished(run: Path) -> list[str]:
    return list(read_journal(run)) if (run / "journal.jsonl").exists() else []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------- SIGKILL

# Found by Python as it starts: so many seconds after it has so many times opened, renamed or removed something that is
# named like this, the process ends.
DIES = """
import os, signal, sys, threading
wanted, count, seconds = os.environ["DIES_AT"].split(":")
left = int(count)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and wanted in " ".join(map(str, arguments)):
        left -= 1
        if left == 0 and float(seconds) == 0:
            die()
        if left == 0:
            threading.Timer(float(seconds), die).start()

sys.addaudithook(hook)
"""
KINDS = {
    "base evaluation": "iter-00/eval.*",
    "block of an E-step": r"iter-../estep\.\d+",
    "merge of an E-step": "iter-../estep",
    "diagnostics": "iter-../diagnostics",
    "M-step": r"iter-../mstep\.\d+",  # before this checkpoint
    "commit of an M-step": "iter-../mstep",
    "evaluation": r"iter-0[1-9]/eval\..*",
    "picture": "plot",
    "report": "report",
}
APPEND = "journal.jsonl a"  # the mode of its opening
WITHIN, WRITING, JOURNAL = "a moment after the stage began", "at a write of its file", "before its journal line"
POINTS = [
    ("iter-00/eval.validation", WITHIN, ""),
    ("iter-00/eval.test", WRITING, "iter-00/.partial.eval.test.jsonl"),
    ("iter-01/estep.1", WITHIN, ""),
    ("iter-01/estep.2", WITHIN, ""),
    ("iter-01/estep", WRITING, "iter-01/.partial.samples.jsonl"),
    ("iter-01/diagnostics", WITHIN, ""),
    ("iter-01/mstep.3", WITHIN, ""),
    ("iter-01/mstep.6", WRITING, "iter-01/.partial.checkpoint.6"),
    ("iter-01/mstep", WRITING, "iter-01/.partial.model"),
    ("iter-01/eval.validation", WITHIN, ""),
    ("iter-02/estep.1", JOURNAL, ""),
    ("iter-02/estep.2", WITHIN, ""),
    ("iter-02/estep", JOURNAL, ""),
    ("iter-02/diagnostics", JOURNAL, ""),
    ("iter-02/mstep.1", WITHIN, ""),
    ("iter-02/mstep.5", JOURNAL, ""),
    ("iter-02/mstep", JOURNAL, ""),
    ("iter-02/eval.test", WITHIN, ""),
    ("plot", WRITING, ".partial.accuracy.png"),
    ("report", WRITING, ".partial.report.html"),
]


def kind(stage: str) -> str:
    return next(name for name, pattern in KINDS.items() if re.fullmatch(pattern, stage))


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory) -> Path:
    """A run with several blocks and many checkpoints that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(out, IN_BLOCKS))
    return out


def kill_at(out: Path, stages: dict[str, float], point: tuple[str, str, str], noise: random.Random, dies: Path) -> str:
    """Start or continue a run and kill it around a stage; the stage that was in flight then.

    stages: of the undisturbed run, in order, with the seconds that each took.
    """
    names = list(stages)
    stage, how, file = point
    place = names.index(stage)
    appends = place - len(finished(out))  # lines of the journal before the stage begins
    moment = noise.uniform(0.1, 0.9) * stages[stage]
    where = {
        WITHIN: f"{APPEND}:{appends}:{moment}" if appends else f"config.toml:1:{0.2 + moment}",
        WRITING: f"{file}:{noise.randint(1, 4)}:0",
        JOURNAL: f"{APPEND}:{appends + 1}:0",
    }
    process = start(out, IN_BLOCKS, folder=dies, DIES_AT=where[how])
    _, err = process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL, err
    done = finished(out)
    assert done == names[: len(done)]
    assert how == WITHIN or names[len(done)] == stage  # exactly there; the others at about there
    return names[len(done)]


@pytest.mark.slow
def test_killed_at_twenty_points_of_all_stages_a_run_ends_with_the_same_bytes(tmp_path, in_blocks):
    """Two runs side by side, each killed at every second point and continued each time."""
    (tmp_path / "sitecustomize.py").write_text(DIES)
    stages = {row["stage"]: row["seconds"] for row in read_rows(in_blocks / "journal.jsonl")}

    def chain(first: int) -> list[str]:
        noise, out = random.Random(first), tmp_path / str(first)
        hit = [kill_at(out, stages, point, noise, tmp_path) for point in POINTS[first::2]]
        finish(start(out, IN_BLOCKS))
        return hit

    with ThreadPoolExecutor(2) as pool:
        hit = [stage for stages in pool.map(chain, range(2)) for stage in stages]
    print("\n".join(hit))
    assert len(hit) == 20
    assert {kind(stage) for stage in hit} == set(KINDS)
    for first in range(2):
        out = tmp_path / str(first)
        assert outcome(out) == outcome(in_blocks)
        assert finished(out) == list(stages)
        assert not [path for path in out.rglob("*") if "checkpoint." in path.name or ".partial" in path.name]


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(3))
def test_a_signal_ends_with_code_3_and_the_same_command_goes_on(tmp_path, in_blocks, shift):
    """In an evaluation, in an E-step and in an M-step, each time by another signal."""
    out = tmp_path / "run"
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    names = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
    for before, stage, number in (
        ("iter-00/eval.validation", "iter-00/eval.test", numbers[shift]),
        ("iter-01/estep.1", "iter-01/estep.2", numbers[shift - 1]),
        ("iter-01/mstep.2", "iter-01/mstep", numbers[shift - 2]),
    ):
        process = start(out, IN_BLOCKS)
        wait_until(lambda before=before: before in finished(out), process)
        process.send_signal(number)
        err = finish(process, 3)
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert f"stopped by {names[number]} " in last
        assert f" {stage}" in last
        assert AGAIN in last
        if stage == "iter-01/mstep":
            step = int(re.search(r"after step (\d+) of", last)[1])
            assert finished(out)[-1] == f"iter-01/mstep.{step}"
    finish(start(out, IN_BLOCKS))
    assert outcome(out) == outcome(in_blocks)


HANGS = """
import pathlib, time

def check(text, question):
    pathlib.Path("hangs").touch()
    time.sleep(600)
"""


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    """The first one is noted and waits for the draw to be judged, which here takes for ever; the second ends it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HANGS)
    process = start(tmp_path / "run", [], "--verdict", "mine:check", folder=tmp_path)
    try:
        wait_until(lambda: (tmp_path / "hangs").exists(), process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        err = finish(process, 3)
    finally:
        process.kill()
    assert "Traceback" not in err
    assert AGAIN in err.splitlines()[-1]


@pytest.mark.slow
def test_sigterm_to_the_launcher_of_two_processes(tmp_path):
    """Both stop after the same step, and one process goes on where the two were."""
    long = ["run.iterations=1", "mstep.epochs=12"]
    alone, out = tmp_path / "alone", tmp_path / "run"
    finish(start(alone, long))
    process = start(out, long, "--gpus", "2")
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    err = finish(process, 3)
    assert "Traceback" not in err
    found = re.search(r"stopped by SIGTERM after step (\d+) of (\d+) of iter-01/mstep", err.splitlines()[-1])
    assert found is not None, err
    assert AGAIN in err.splitlines()[-1]
    step, steps = map(int, found.groups())
    assert 3 <= step < steps
    assert finished(out)[-1] == f"iter-01/mstep.{step}"
    finish(start(out, long))
    assert len(losses(out)) == steps
    assert losses(out) == pytest.approx(losses(alone), abs=1e-6)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # the last may be in the making
    return [row["loss"] for row in map(json.loads, lines) if row["stage"] == "iter-01/mstep"]


# ------------------------------------------------------------------------------------------------------ checkpoints


def run_in_process(out: Path, settings: Sequence[str], monkeypatch: pytest.MonkeyPatch, stop_after: int = 0) -> int:
    """A whole run, asked to stop at so many updates; how many updates it made."""
    stop, update, made = Stop(), Masters.step, [0]

    def counted(*arguments: Any) -> None:
        update(*arguments)
        made[0] += 1
        if made[0] == stop_after:
            stop.signal = "SIGTERM"

    config = load_config(overrides=settled(["eval.diagnostics=0", *settings, f"run.out={out}"]))
    with monkeypatch.context() as patch:
        patch.setattr(Masters, "step", counted)
        if stop_after:
            with pytest.raises(Interrupted, match=rf"stopped by SIGTERM after step \d+ .* {AGAIN}"):
                train(config, Progress(), stop=stop)
        else:
            train(config, Progress(), stop=stop)
    return made[0]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["model.dtype=bfloat16", "mstep.optimizer_state=keep"], id="bfloat16, moments kept"),
        pytest.param(["mstep.optimizer_state=keep"], id="moments kept", marks=pytest.mark.slow),
        pytest.param(["model.dtype=bfloat16"], id="bfloat16", marks=pytest.mark.slow),
        pytest.param(["run.init=base"], id="from the base", marks=pytest.mark.slow),
        pytest.param(["mstep.lora_rank=4", "mstep.lr=1e-2"], id="lora", marks=pytest.mark.slow),
        pytest.param(
            ["mstep.lora_rank=4", "mstep.lr=1e-2", "model.dtype=bfloat16", "mstep.optimizer_state=keep"],
            id="lora, bfloat16, moments kept",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stopped_in_the_second_m_step_no_update_is_made_twice(tmp_path, monkeypatch, settings):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    updates = run_in_process(whole, settings, monkeypatch)
    first, second = (read_journal(whole)[f"iter-0{i}/mstep"]["steps"] for i in (1, 2))
    assert run_in_process(cut, settings, monkeypatch, stop_after=first + 2) == first + 2
    assert (cut / "iter-02/checkpoint.2").is_dir()
    assert run_in_process(cut, settings, monkeypatch) == second - 2 == updates - first - 2
    assert outcome(cut) == outcome(whole)
    assert not list(cut.glob("iter-*/checkpoint.*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(out, [], patch)
    return out


STATE = "state-00000.safetensors"


@pytest.mark.parametrize(
    ("harm", "damaged", "kept"),
    [
        pytest.param(flip, [f"4/{STATE}"], 3, id="a byte of the newest"),
        pytest.param(truncate, [f"4/{STATE}"], 3, id="the newest cut short", marks=pytest.mark.slow),
        pytest.param(Path.unlink, ["4/state.json"], 3, id="a file of the newest", marks=pytest.mark.slow),
        pytest.param(flip, ["4/steps.jsonl"], 3, id="its metrics", marks=pytest.mark.slow),
        pytest.param(flip, [f"3/{STATE}"], 4, id="the older one", marks=pytest.mark.slow),
        pytest.param(truncate, [f"3/{STATE}", f"4/{STATE}"], 0, id="both"),
    ],
)
def test_damaged_checkpoints_are_noticed(tmp_path, monkeypatch, undisturbed, harm, damaged, kept):
    """Stopped after step 4 with checkpoints of steps 3 and 4: the newest that is whole is used, or none."""
    out, often = tmp_path / "run", ["run.checkpoint_minutes=0.0"]
    steps = sum(read_journal(undisturbed)[f"iter-0{i}/mstep"]["steps"] for i in (1, 2))
    run_in_process(out, often, monkeypatch, stop_after=4)
    assert sorted(path.name for path in out.glob("iter-01/checkpoint.*")) == ["checkpoint.3", "checkpoint.4"]
    for name in damaged:
        harm(out / f"iter-01/checkpoint.{name}")
    assert run_in_process(out, often, monkeypatch) == steps - kept
    assert outcome(out) == outcome(undisturbed)


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
