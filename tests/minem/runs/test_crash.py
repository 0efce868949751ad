"""A run that is killed or asked to stop, at any moment, ends as the one that was left alone."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
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
from minem.em.masters import Masters
from minem.em.sample import Sample
from minem.errors import GuardError, Interrupted
from minem.files import PARTIAL, read_rows
from minem.runs.directory import read_journal
from minem.runs.stages import Session
from minem.train import build, opened, train
from tests.minem.tiny_runs import cut_journal, finished, flags, flip, outcome, settings, truncate
from tests.minem.tiny_runs import train as train_here

# One slot, so that the 32 questions of an E-step come in two blocks; a checkpoint after every step.
IN_BLOCKS = ["task.limit=32", "mstep.epochs=4", "mstep.batch_size=8", "run.slots=1", "run.checkpoint_minutes=0.0"]
IN_BLOCKS += ["eval.diagnostics=2", "eval.max_new_tokens=8"]
AGAIN = "give the same command again to resume"


def start(
    out: Path, wanted: Sequence[str] = (), *more: str, folder: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """`minem train` as a user starts it; `folder`: of modules that Python looks at first."""
    command = [sys.executable, "-m", "minem", "train", *flags(*wanted), *more, "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(command, env=everything, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed on stderr."""
    _, err = process.communicate(timeout=500)
    assert process.returncode == code, err
    return err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------- SIGKILL

# Found by Python as it starts. DIES_AT=NAME:N:SECONDS kills the process SECONDS after it has opened, renamed or removed
# something with NAME in its name for the Nth time.
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
    ("iter-00/eval.test", WRITING, ".partial/iter-00/eval.test.jsonl"),
    ("iter-01/estep.1", WITHIN, ""),
    ("iter-01/estep.2", WITHIN, ""),
    ("iter-01/estep", WRITING, ".partial/iter-01/samples.jsonl"),
    ("iter-01/diagnostics", WITHIN, ""),
    ("iter-01/mstep.3", WITHIN, ""),
    ("iter-01/mstep.6", WRITING, ".partial/iter-01/checkpoint.6"),
    ("iter-01/mstep", WRITING, ".partial/iter-01/model"),
    ("iter-01/eval.validation", WITHIN, ""),
    ("iter-02/estep.1", JOURNAL, ""),
    ("iter-02/estep.2", WITHIN, ""),
    ("iter-02/estep", JOURNAL, ""),
    ("iter-02/diagnostics", JOURNAL, ""),
    ("iter-02/mstep.1", WITHIN, ""),
    ("iter-02/mstep.5", JOURNAL, ""),
    ("iter-02/mstep", JOURNAL, ""),
    ("iter-02/eval.test", WITHIN, ""),
    ("plot", WRITING, ".partial/accuracy.png"),
    ("report", WRITING, ".partial/report.html"),
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


def test_killed_in_the_middle_of_its_weights_a_run_is_resumed(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES)
    run = shutil.copytree(finished_run, tmp_path / "run")
    cut_journal(run, "iter-01/estep")
    shutil.rmtree(run / "iter-02")
    process = start(run, folder=tmp_path, DIES_AT=f"{PARTIAL}/iter-01/model:3:0")
    assert process.wait(timeout=100) == -signal.SIGKILL
    assert finished(run)[-1] == "iter-01/estep"
    assert (run / f"{PARTIAL}/iter-01/model").is_dir()
    train_here(run)
    assert outcome(run) == outcome(finished_run)


@pytest.mark.slow
def test_killed_at_twenty_points_of_all_stages_a_run_ends_with_the_same_bytes(tmp_path, in_blocks):
    """Proves it for every kind of stage and write: two runs side by side, each killed at every second point."""
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
        assert not [path for path in out.rglob("*") if "checkpoint." in path.name or path.name == PARTIAL]


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
def test_a_signal_ends_with_code_3_and_the_same_command_resumes(tmp_path: Path, in_blocks: Path) -> None:
    """Proves it with real signals to a real process: in an evaluation, an E-step and an M-step, by another one each."""
    out = tmp_path / "run"
    for before, stage, number, name in (
        ("iter-00/eval.validation", "iter-00/eval.test", signal.SIGUSR1, "SIGUSR1"),
        ("iter-01/estep.1", "iter-01/estep", signal.SIGINT, "Ctrl-C"),
        ("iter-01/mstep.2", "iter-01/mstep", signal.SIGTERM, "SIGTERM"),
    ):
        process = start(out, IN_BLOCKS)
        wait_until(lambda before=before: before in finished(out), process)
        process.send_signal(number)
        err = finish(process, 3)
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert f"stopped by {name} " in last
        assert f" {stage}" in last
        assert AGAIN in last
        if stage == "iter-01/mstep":
            step = int(re.search(r"after step (\d+) of", last)[1])
            assert finished(out)[-1] == f"iter-01/mstep.{step}"
    finish(start(out, IN_BLOCKS))
    assert outcome(out) == outcome(in_blocks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_start_is_stopped_at_once_and_says_what_takes_long(
    number: int, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while the prompts of a large task were rendered, or memory was reserved, did nothing for minutes."""
    out = tmp_path / "run"
    monkeypatch.setattr("minem.train.PATIENCE", 0.0)
    for place in ("minem.train.longest_prompt", "minem.runs.directory.run_facts", "minem.train.describe"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: signal.raise_signal(number) or pytest.fail("it went on"))
            last = train_here(out, code=3)
        assert last.endswith(f"minem: stopped; {AGAIN}")
        assert "base model" not in last
        assert out.exists() == (place != "minem.train.longest_prompt")
    assert train_here(out).count("start rendering the prompts of 24 questions") == 1
    assert outcome(out) == outcome(finished_run)


HANGS = """
import pathlib, time

def check(text, question):
    pathlib.Path("hangs").touch()
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves it with a verdict that hangs: the first one waits for the draw to be judged, the second does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HANGS)
    process = start(tmp_path / "run", [], "--verdict", "mine:check", folder=tmp_path)
    try:
        wait_until(lambda: (tmp_path / "hangs").exists(), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        err = finish(process, 3)
    finally:
        process.kill()
    assert "Traceback" not in err
    assert AGAIN in err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ checkpoints


def updates_of(out: Path, more: Sequence[str], monkeypatch: pytest.MonkeyPatch, stop_after: int = 0) -> int:
    """How many updates a run in this process makes; it is asked to stop in one of them."""
    session, update, made = Session(Progress(io.StringIO())), Masters.step, [0]

    def counted(*arguments: Any) -> Any:
        made[0] += 1
        if made[0] == stop_after:
            session.stop.signal = "SIGTERM"
        return update(*arguments)

    config = load_config(overrides=[*settings(*more), f"run.out={out}"])
    with monkeypatch.context() as patch:
        patch.setattr(Masters, "step", counted)
        if stop_after:
            with pytest.raises(Interrupted, match=rf"stopped by SIGTERM after step \d+ .* {AGAIN}"):
                train(config, session)
        else:
            train(config, session)
    return made[0]


LORA = ["mstep.lora_rank=4", "mstep.lr=1e-2"]
ROUNDED = ["model.dtype=bfloat16", "mstep.optimizer_state=keep"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(ROUNDED, id="bfloat16, moments kept"),
        pytest.param(["mstep.optimizer_state=keep"], id="moments kept", marks=pytest.mark.slow),
        pytest.param(["model.dtype=bfloat16"], id="bfloat16", marks=pytest.mark.slow),
        pytest.param(["run.init=base"], id="from the base", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param([*LORA, *ROUNDED], id="lora, bfloat16, moments kept", marks=pytest.mark.slow),
    ],
)
def test_stopped_in_the_second_m_step_no_update_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """The slow ones prove it for each state that a checkpoint may hold."""
    more, whole, cut = ["mstep.epochs=3", *more], tmp_path / "whole", tmp_path / "cut"
    updates = updates_of(whole, more, monkeypatch)
    first, second = (read_journal(whole)[f"iter-0{i}/mstep"]["steps"] for i in (1, 2))
    assert updates_of(cut, more, monkeypatch, stop_after=first + 2) == first + 2
    assert (cut / "iter-02/checkpoint.2").is_dir()
    assert updates_of(cut, more, monkeypatch) == second - 2 == updates - first - 2
    assert outcome(cut) == outcome(whole)
    assert not list(cut.glob("iter-*/checkpoint.*"))


OFTEN = ["run.checkpoint_minutes=0.0", "mstep.epochs=3", "run.iterations=1"]
STATE = "state-00000.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4, with checkpoints of steps 3 and 4."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        updates_of(out, OFTEN, patch, stop_after=4)
    assert sorted(path.name for path in out.glob("iter-01/checkpoint.*")) == ["checkpoint.3", "checkpoint.4"]
    return out


@pytest.fixture(scope="module")
def undisturbed(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, resumed with all its files intact."""
    out = shutil.copytree(stopped, tmp_path_factory.mktemp("undisturbed") / "run")
    with pytest.MonkeyPatch.context() as patch:
        assert updates_of(out, OFTEN, patch) == read_journal(out)["iter-01/mstep"]["steps"] - 4
    return out


@pytest.mark.parametrize(
    ("harm", "damaged", "kept"),
    [
        pytest.param(flip, [f"4/{STATE}"], 3, id="a byte of the newest"),
        pytest.param(truncate, [f"3/{STATE}", f"4/{STATE}"], 0, id="both"),
        pytest.param(truncate, [f"4/{STATE}"], 3, id="the newest cut short", marks=pytest.mark.slow),
        pytest.param(Path.unlink, ["4/state.json"], 3, id="a file of the newest", marks=pytest.mark.slow),
        pytest.param(flip, ["4/steps.jsonl"], 3, id="its metrics", marks=pytest.mark.slow),
        pytest.param(flip, [f"3/{STATE}"], 4, id="the older one", marks=pytest.mark.slow),
    ],
)
def test_damaged_checkpoints_are_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: Path,
    undisturbed: Path,
    harm: Callable[[Path], None],
    damaged: list[str],
    kept: int,
) -> None:
    """The newest that is intact is used, or none. The slow ones prove it for each file and damage."""
    out = shutil.copytree(stopped, tmp_path / "run")
    for name in damaged:
        harm(out / f"iter-01/checkpoint.{name}")
    steps = read_journal(undisturbed)["iter-01/mstep"]["steps"]
    # Asked to stop again: what was found damaged does not count among the two that are kept.
    updates_of(out, OFTEN, monkeypatch, stop_after=2)
    names = [f"checkpoint.{step}" for step in (kept + 1, kept + 2)]
    assert (
        sorted(
            path.name
            for path in out.glob("iter-01/checkpoint.*")
            if finished(out).count(f"iter-01/mstep.{path.suffix[1:]}")
        )
        == names
    )
    assert updates_of(out, OFTEN, monkeypatch) == steps - kept - 2
    assert outcome(out) == outcome(undisturbed)


def test_what_is_not_finite_is_left_in_the_log(tmp_path: Path) -> None:
    config = load_config(overrides=["task.limit=8", "run.device=cpu", f"run.out={tmp_path / 'run'}"])
    session = Session(Progress(io.StringIO()))
    experiment = build(config, session)
    with torch.no_grad():
        experiment.mstep.model.norm.weight.fill_(float("nan"))
    name = experiment.task.train[0].id
    row = {"id": name, "iteration": 1, "attempt": 1, "prompt": "plain", "token_ids": [7, 8], "logprob_q": -1.0}
    sample = Sample(**row, logprob_plain=-1.0, text="", answer="1", gold="1", status="accepted", leak=False)
    with opened(config, experiment, session), pytest.raises(GuardError, match=r"not-finite\.iter-01\.json"):
        experiment.m_step(1, [sample])
    (dump,) = (tmp_path / "run" / "log").glob("not-finite.*")
    assert json.loads(dump.read_text())["examples"][0]["id"] == name
    assert "iter-01/mstep" not in read_journal(tmp_path / "run")
