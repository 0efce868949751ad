"""Several processes: their shares, one trajectory however it is cut up, and what the others do when one dies."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minem.errors import GuardError
from minem.files import read_rows
from minem.parallel import ranks as distributed
from minem.parallel.ranks import GRACE, SILENCE, Ranks
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


# ------------------------------------------------------------------------------------------------------- shares


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_shares_cover_everything_once_and_are_balanced(costs, size):
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    # Whoever has most got its last item when it had least of all.
    assert max(loads) <= sum(costs) / size + max(costs, default=0) + 1e-6 * sum(costs)


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
            marks=pytest.mark.slow,
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


def test_two_processes_draw_and_answer_what_one_does(tmp_path):
    """The draws of a question depend on its seed alone; who drew them cannot be seen."""
    for name, more in (("one", []), ("two", ["--gpus", 2])):
        minem("train", *FEW, "--iterations", 1, "--out", tmp_path / name, *more)
    for file in ("iter-01/samples.jsonl", "iter-01/accepted.jsonl", "iter-01/eval.validation.jsonl"):
        assert ids(tmp_path / "one", file) == ids(tmp_path / "two", file)
    one, two = (read_journal(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in ("questions", "solved", "attempts", "kept", "statuses"):
        assert one["iter-01/estep"][key] == two["iter-01/estep"][key]
    assert not list((tmp_path / "two").rglob(".partial*"))


FULL = """
import errno, os, sys

def hook(event, arguments):
    if event == "open" and os.environ.get("RANK") == "1" and ".eval.test.1.jsonl" in str(arguments[0]):
        raise OSError(errno.ENOSPC, "No space left on device")

sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_a_full_disk_where_another_process_hands_in_its_share(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FULL)
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT.get("PYTHONPATH", "")])
    flags = ["train", *FEW, "--iterations", "1", "--gpus", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "minem", *flags],
        env={**ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "is full; free some space" in done.stderr.splitlines()[-1]
    assert "it goes on with iter-00/eval.test" in done.stderr.splitlines()[-1]
    minem(*flags)  # the same command, with room
    assert "iter-01/mstep" in read_journal(tmp_path / "run")


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


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["estep", "mstep"])
def test_the_death_of_one_process_ends_all_and_the_run_goes_on(tmp_path, rank, stage):
    out = tmp_path / "run"
    command = ["train", "--device", "cpu", "--limit", 120, "--iterations", 1, "--set", "mstep.epochs=12", "--out", out]
    running = start(*command, "--gpus", 2)

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
    assert time.monotonic() - died < 60 < SILENCE + 30
    assert "the same command again to go on" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path(f"/proc/{survivor}").exists()

    minem(*command, "--gpus", 3 if rank else 1)  # on another number of processes
    minem(*command[:-1], tmp_path / "undisturbed")
    for file in ("iter-01/samples.jsonl", "iter-01/eval.test.jsonl"):
        assert ids(out, file) == ids(tmp_path / "undisturbed", file)
    mine, theirs = (read_journal(run)["iter-01/mstep"] for run in (out, tmp_path / "undisturbed"))
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_is_missed_as_well(tmp_path, rank):
    """Nothing tells of it: its connections stay open, and those of the first one are the store's."""
    out = tmp_path / "run"
    command = ["train", *FEW, "--iterations", 1, "--set", "mstep.epochs=40", "--out", out]
    running = start(*command, "--gpus", 2)
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and b'"iter-01/mstep"' in metrics.read_bytes())
    survivor, stopped = of_rank(running, 1 - rank), of_rank(running, rank)
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    try:
        wait_for(lambda: not Path(f"/proc/{survivor}").exists(), 60)
        _, err = finish(running, code=3)  # which ends the one that was stopped
    finally:
        for process in (stopped, survivor):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert time.monotonic() - since < 60 + GRACE
    assert f"no sign of life for {SILENCE:.0f} s" in err.splitlines()[-1]
    assert "Traceback" not in err
    minem(*command)


@pytest.mark.parametrize("silent", ["set", "check", "get"])
def test_a_store_that_does_not_answer_ends_the_process(monkeypatch, silent):
    """Whoever serves it is stopped: the thread that asks it waits for good, as does whoever tells of a failure."""

    class Silent:
        def __getattr__(self, name):
            if name == silent:
                return lambda *arguments: threading.Event().wait()
            known = {"set": lambda *_: None, "check": lambda keys: "beat" in keys[0], "get": lambda key: b"finished"}
            return known[name]

    ended: queue.Queue = queue.Queue()

    def leave(self, message, code):
        ended.put((message, code))
        threading.Event().wait()

    monkeypatch.setattr(distributed, "BEAT", 0.02)
    monkeypatch.setattr(distributed, "SILENCE", 0.2)
    monkeypatch.setattr(distributed._Watch, "_exit", leave)
    watch = distributed._Watch(1, 2, Silent())
    threading.Thread(target=watch.failed, args=[GuardError("an error here, meanwhile")], daemon=True).start()
    message, code = ended.get(timeout=20)
    assert code == 3
    assert "the first process has given no sign of life" in message


@pytest.mark.slow
def test_plain_torchrun_works_and_the_first_process_alone_speaks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minem"]
    arguments = ["train", *FEW, "--iterations", "1", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["test"]["last"]["n"] == 24


def test_an_error_is_told_once(tmp_path):
    _, err = minem("train", *FEW, "--task", "toyy", "--gpus", 2, "--out", tmp_path / "run", code=2)
    assert err.count("did you mean 'toy'?") == len(err.splitlines()) == 1
    _, err = minem("train", *FEW[2:], "--device", "auto", "--gpus", 500, "--out", tmp_path / "run", code=2)
    assert err.count("--gpus 500") == len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_death_after_the_others_have_ended_is_told(tmp_path):
    process = tmp_path / "process"
    process.write_text('#!/bin/sh\n[ "$RANK" = 0 ] || kill -9 $$\n')
    process.chmod(0o755)
    code = f"import sys; sys.executable = {str(process)!r}; from minem.parallel.ranks import launch; sys.exit(launch(2, []))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr == "minem: process 2 of 2 was ended by SIGKILL; give the same command again\n"
