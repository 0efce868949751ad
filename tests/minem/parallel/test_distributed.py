"""Whole runs in several processes: one trajectory however it is divided, and a run that resumes after a death.

Nearly all are slow: each starts several processes of `minem`. What they owe each other is tested in test_launch.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minem.files import read_rows
from minem.runs.directory import read_journal
from tests.minem.tiny_runs import command, finished

FEW = ["--device", "cpu", "--limit", "24", "--set", "eval.samples=1", "--set", "eval.diagnostics=4"]
SPLIT = ["--set", "mstep.parallel=fsdp"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
AGAIN = "give the same command again to resume"


def start(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err
    return out, err


def here(*arguments: object) -> None:
    """A command in this process."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------------- one trajectory


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one E-step of the toy accepted."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    here("sample", *FEW, "--out", out)
    return out / "iter-01" / "accepted.jsonl"


def m_step(samples: Path, out: Path, *more: object) -> list[object]:
    """A real M-step of the command line, of 30 steps or more."""
    common = ["--samples", samples, "--device", "cpu", "--set", "mstep.batch_size=4", "--set", "mstep.epochs=6"]
    return ["train", *common, *more, "--out", out]


def losses(run: Path) -> list[float]:
    """Of its steps so far."""
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return [row["loss"] for row in map(json.loads, lines) if row["stage"] == "iter-01/mstep"]


@pytest.fixture(scope="module")
def undivided(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("undivided") / "run"
    here(*m_step(samples, out, "--set", "mstep.checkpointing=off"))
    return losses(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--gpus", "2", "--set", "mstep.parallel=ddp"], id="two replicas"),
        pytest.param(["--gpus", "2", *SPLIT], id="two shards"),
        pytest.param(
            ["--gpus", "3", *SPLIT, "--set", "mstep.pack_tokens=120", "--set", "mstep.checkpointing=full"],
            id="on more processes than each step has examples for",
        ),
    ],
)
def test_one_trajectory_however_it_is_divided(samples: Path, undivided: list[float], more: list[str], tmp_path: Path):
    """Proves it for the M-step of the command line, on gloo's collectives."""
    finish(start("minem", *m_step(samples, tmp_path / "run", *more)))
    divided = losses(tmp_path / "run")
    assert len(undivided) == len(divided) >= 30
    assert sum(undivided[-5:]) < 0.8 * sum(undivided[:5])  # it learns
    differences = [mine - theirs for mine, theirs in zip(divided, undivided, strict=True)]
    assert max(map(abs, differences)) < 1e-5
    assert abs(sum(differences)) / len(differences) < 1e-6


# -------------------------------------------------------------------------------------------- a run and its processes


def rows(run: Path, name: str) -> list[tuple[str, ...]]:
    """What does not depend on rounding."""
    keys = ("id", "attempt", "token_ids", "text", "status", "answer")
    return [tuple(str(row.get(key)) for key in keys) for row in read_rows(run / name)]


@pytest.mark.slow
def test_two_processes_of_torchrun_draw_and_answer_what_one_does(tmp_path: Path) -> None:
    """Proves that draws depend on the seed alone, not on the process; the first process alone prints."""
    arguments = ["train", *FEW, "--iterations", 1, "--json", "--out"]
    here(*arguments, tmp_path / "one")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m"]
    printed, _ = finish(start(*torchrun, "minem", *arguments, tmp_path / "two"))
    (line,) = printed.splitlines()
    assert json.loads(line)["test"]["last"]["n"] == 24
    for file in ("iter-01/samples.jsonl", "iter-01/accepted.jsonl", "iter-01/eval.validation.jsonl"):
        assert rows(tmp_path / "one", file) == rows(tmp_path / "two", file)
    one, two = (read_journal(tmp_path / name) for name in ("one", "two"))
    assert list(one) == list(two)
    for key in ("questions", "solved", "attempts", "kept", "statuses"):
        assert one["iter-01/estep"][key] == two["iter-01/estep"][key]
    assert not list((tmp_path / "two").rglob(".partial*"))


def of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of those that were launched."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


LONG = ["train", "--device", "cpu", "--limit", 64, "--iterations", 1, "--set", "mstep.epochs=8"]
LONG += ["--set", "mstep.batch_size=4", "--set", "eval.diagnostics=0", "--set", "eval.samples=0", "--out"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    here(*LONG, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank", "gpus"), [("estep", 1, 3), ("mstep", 0, 1)])
def test_the_death_of_one_process_ends_all_and_the_run_resumes(
    tmp_path: Path, undisturbed: Path, stage: str, rank: int, gpus: int
) -> None:
    """Proves with whole runs, resumed on another number of processes, that no sample or step is lost."""
    out = tmp_path / "run"
    running = start("minem", *LONG, out, "--gpus", 2)
    wait_until(lambda: losses(out) if stage == "mstep" else "iter-00/eval.test" in finished(out), running)
    survivor = of_rank(running, 1 - rank)
    os.kill(of_rank(running, rank), signal.SIGKILL)
    died = time.monotonic()
    _, err = finish(running, code=3)
    assert time.monotonic() - died < 60
    # Whichever notices first: the agent, or the other process, whose connection breaks.
    noticed = rf"(process {rank + 1} of 2 was ended by SIGKILL|the connection to another process broke); {AGAIN}"
    assert re.search(noticed, err.splitlines()[-1])
    assert "Traceback" not in err
    assert not Path(f"/proc/{survivor}").exists()
    resume(out, gpus, undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_in_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    """Proves that both processes stop after the same step, and that one alone resumes from there."""
    out = tmp_path / "run"
    running = start("minem", *LONG, out, "--gpus", 2)
    wait_until(lambda: len(losses(out)) >= 3, running)
    running.send_signal(signal.SIGTERM)
    _, err = finish(running, code=3)
    assert "Traceback" not in err
    # One of the two prints the sentence, and the other may end its line of progress after it.
    (sentence,) = (line for line in err.splitlines() if line.startswith("minem: "))
    found = re.fullmatch(rf"minem: stopped by SIGTERM after step (\d+) of (\d+) of iter-01/mstep.*{AGAIN}", sentence)
    assert found is not None, err
    step, steps = map(int, found.groups())
    assert 3 <= step < steps
    assert finished(out)[-1] == f"iter-01/mstep.{step}"
    resume(out, 1, undisturbed)
    assert losses(out) == pytest.approx(losses(undisturbed), abs=1e-4)  # rounding grows over 120 steps


def resume(out: Path, gpus: int, undisturbed: Path) -> None:
    here(*LONG, out) if gpus == 1 else finish(start("minem", *LONG, out, "--gpus", gpus))
    for file in ("iter-01/samples.jsonl", "iter-01/eval.test.jsonl"):
        assert rows(out, file) == rows(undisturbed, file)
    mine, theirs = (read_journal(run)["iter-01/mstep"] for run in (out, undisturbed))
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
def test_wrong_input_and_guards_end_with_their_codes(tmp_path: Path) -> None:
    """Proves codes 2 and 4 through torch's agent, for errors that each process and that the first alone finds."""
    two = ["minem", "train", "--device", "cpu", "--limit", 8, "--gpus", 2, "--out", tmp_path / "run"]
    _, err = finish(start(*two, "--task", "toyy"), code=2)
    assert err.count("did you mean 'toy'?") == len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    _, err = finish(start(*two), code=2)
    assert err.count("is not empty and no run directory") == len(err.splitlines()) == 1
    (tmp_path / "run" / "thesis.tex").unlink()
    _, err = finish(start(*two, "--set", "sampler.max_new_tokens=1", "--set", "eval.max_new_tokens=1"), code=4)
    assert err.count("minem: ") == 1
    assert "Traceback" not in err


def test_more_processes_than_gpus_are_refused() -> None:
    done = command("train", "--gpus", "500")
    assert done.exit_code == 2
    assert done.stderr.count("--gpus 500") == len(done.stderr.splitlines()) == 1
