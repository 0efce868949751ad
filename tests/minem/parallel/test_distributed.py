"""Whole runs in several processes: one trajectory however it is cut up, and a run that goes on after a death.

All are slow: each starts several processes of `minem`. What the processes owe each other is tested in test_launch.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from minem.cli import main
from minem.files import read_rows
from minem.runs.directory import read_journal

FEW = ["--device", "cpu", "--limit", "24", "--set", "eval.samples=1", "--set", "eval.diagnostics=4"]
SPLIT = ["--set", "mstep.parallel=fsdp"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minem", *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err
    return out, err


def minem(*arguments: object, code: int = 0) -> tuple[str, str]:
    return finish(start(*arguments), code)


# ------------------------------------------------------------------------------------------------- one trajectory


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """What one E-step of the toy accepted."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    minem("sample", *FEW, "--out", out)
    return out / "iter-01" / "accepted.jsonl"


def losses(samples: Path, out: Path, *settings: object) -> list[float]:
    """Of each of 30 steps or more, by a real M-step of the command line."""
    common = ["--samples", samples, "--device", "cpu", "--set", "mstep.batch_size=4", "--set", "mstep.epochs=6"]
    minem("train", *common, *settings, "--out", out)
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if row["stage"] == "iter-01/mstep"]


@pytest.fixture(scope="module")
def undivided(samples, tmp_path_factory) -> list[float]:
    return losses(samples, tmp_path_factory.mktemp("whole") / "run", "--set", "mstep.checkpointing=off")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["--set", "mstep.pack_tokens=120"], id="a few micro-batches"),
        pytest.param(["--set", "mstep.pack_tokens=1"], id="one sequence at a time"),
        pytest.param(["--set", "mstep.checkpointing=full"], id="activations computed again"),
        pytest.param(["--gpus", "2", "--set", "mstep.parallel=ddp"], id="two replicas"),
        pytest.param(["--gpus", "2", *SPLIT], id="two shards"),
        pytest.param(
            ["--gpus", "3", *SPLIT, "--set", "mstep.pack_tokens=120", "--set", "mstep.checkpointing=full"],
            id="all at once, on more processes than each step has examples for",
        ),
    ],
)
def test_one_trajectory_however_it_is_cut_up(samples, undivided, settings, tmp_path):
    cut = losses(samples, tmp_path / "run", *settings)
    assert len(undivided) == len(cut) >= 30
    assert sum(undivided[-5:]) < 0.8 * sum(undivided[:5])  # it goes somewhere
    differences = [mine - theirs for mine, theirs in zip(cut, undivided, strict=True)]
    assert max(map(abs, differences)) < 1e-5
    assert abs(sum(differences)) / len(differences) < 1e-6


# -------------------------------------------------------------------------------------------- a run and its processes


def ids(run: Path, name: str) -> list[tuple]:
    keys = ("id", "attempt", "token_ids", "text", "status", "answer")
    return [tuple(str(row.get(key)) for key in keys) for row in read_rows(run / name)]


@pytest.mark.slow
def test_two_processes_draw_and_answer_what_one_does(tmp_path):
    """The draws of a question depend on its seed alone, not on the process that draws them."""
    for name, more in (("one", []), ("two", ["--gpus", 2])):
        minem("train", *FEW, "--iterations", 1, "--out", tmp_path / name, *more)
    for file in ("iter-01/samples.jsonl", "iter-01/accepted.jsonl", "iter-01/eval.validation.jsonl"):
        assert ids(tmp_path / "one", file) == ids(tmp_path / "two", file)
    one, two = (read_journal(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in ("questions", "solved", "attempts", "kept", "statuses"):
        assert one["iter-01/estep"][key] == two["iter-01/estep"][key]
    assert not list((tmp_path / "two").rglob(".partial*"))


def of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of those that were launched."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(condition, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = ["train", "--device", "cpu", "--limit", 120, "--iterations", 1, "--set", "mstep.epochs=12", "--out"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    minem(*LONG, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank", "gpus"), [("estep", 1, 3), ("mstep", 0, 1)])
def test_the_death_of_one_process_ends_all_and_the_run_goes_on(tmp_path, undisturbed, stage, rank, gpus):
    """Proves with whole runs, on another number of processes after the death, that no sample or step is lost."""
    out = tmp_path / "run"
    running = start(*LONG, out, "--gpus", 2)

    def begun() -> bool:
        if stage == "estep":
            return (out / "journal.jsonl").exists() and "iter-00/eval.test" in read_journal(out)
        metrics = out / "metrics.jsonl"
        return metrics.exists() and b'"iter-01/mstep"' in metrics.read_bytes()

    wait_for(begun)
    survivor = of_rank(running, 1 - rank)
    os.kill(of_rank(running, rank), signal.SIGKILL)
    died = time.monotonic()
    _, err = finish(running, code=3)
    assert time.monotonic() - died < 60
    assert (
        f"process {rank + 1} of 2 was ended by SIGKILL; give the same command again to resume" in err.splitlines()[-1]
    )
    assert "Traceback" not in err
    assert not Path(f"/proc/{survivor}").exists()

    minem(*LONG, out, "--gpus", gpus)
    for file in ("iter-01/samples.jsonl", "iter-01/eval.test.jsonl"):
        assert ids(out, file) == ids(undisturbed, file)
    mine, theirs = (read_journal(run)["iter-01/mstep"] for run in (out, undisturbed))
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
def test_torchrun_works_and_the_first_process_alone_prints(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minem"]
    arguments = ["train", *FEW, "--iterations", "1", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["test"]["last"]["n"] == 24


@pytest.mark.slow
def test_an_error_is_printed_once(tmp_path):
    """Proves it through the command line, with an error that each process finds."""
    _, err = minem("train", *FEW, "--task", "toyy", "--gpus", 2, "--out", tmp_path / "run", code=2)
    assert err.count("did you mean 'toy'?") == len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused():
    done = CliRunner().invoke(main, ["train", "--gpus", "500"])
    assert done.exit_code == 2
    assert done.stderr.count("--gpus 500") == len(done.stderr.splitlines()) == 1
