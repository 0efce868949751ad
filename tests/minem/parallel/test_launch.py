"""Processes that are started together: what they exchange, and how they end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minem.errors import Interrupted, UserError
from minem.parallel.launch import VARIABLES, joined
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import Stop
from tests.minem.tiny_runs import flags

AGAIN = "give the same command again to resume"


def start(mode: str, folder: Path) -> subprocess.Popen[str]:
    arguments = ["-m", "tests.minem.parallel.worker", mode, str(folder)]
    code = f"import sys; from minem.parallel.launch import launch; sys.exit(launch(2, {arguments}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[3]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=root, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen[str], code: int) -> list[str]:
    """The lines on stderr."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert out == ""
    return err.splitlines()


def wait_until_ready(process: subprocess.Popen[str], folder: Path) -> list[int]:
    """The process ids, by rank."""
    while not all((folder / f"{rank}.ready").exists() for rank in range(2)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return [int((folder / f"{rank}.ready").read_text()) for rank in range(2)]


def running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# ---------------------------------------------------------------------------------------------- in this process alone


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_shares_cover_everything_once_and_are_balanced(costs, size):
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    # The process with the largest load got its last item when it had the least of all.
    assert max(loads) <= sum(costs) / size + max(costs, default=0) + 1e-6 * sum(costs)


def test_a_process_alone_asks_no_other(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as ranks:
        assert ranks is ALONE
    assert ranks.first
    assert ranks.total([1.5, 2]) == [1.5, 2]
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.broadcast([None]) == [None]


def test_a_missing_variable_of_torchrun_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="but not RANK, MASTER_ADDR; start"), joined("cpu"):
        pass


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("WORLD_SIZE", "x", 'WORLD_SIZE = "x" is not a whole number from 0 to 99999; start'),
        ("RANK", "one", 'RANK = "one" is not a whole number'),
        ("LOCAL_RANK", "-1", 'LOCAL_RANK = "-1" is not a whole number'),
        ("MASTER_PORT", "70000", "and MASTER_PORT below 65536; start"),
        ("RANK", "5", "RANK = 5, .*: RANK must be below WORLD_SIZE, "),
    ],
)
def test_a_wrong_variable_of_torchrun_is_named(monkeypatch, name, value, sentence):
    """At once: with a rank that is none, or another port, a process waited for minutes or got torch's traceback."""
    for other in VARIABLES:
        monkeypatch.setenv(other, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("minem.parallel.launch.rendezvous", lambda url: pytest.fail("it waits for others"))
    with pytest.raises(UserError, match=sentence), joined("cpu"):
        pass


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_leaves_a_note_and_a_second_ctrl_c_does_not_wait(number, name):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stop = Stop()
    with stop.listening():
        with pytest.raises(KeyboardInterrupt):  # nothing is at work yet
            signal.raise_signal(number)
        stop.at_work = True
        stop.check("nothing")
        signal.raise_signal(number)
        assert stop.signal == name
        with pytest.raises(Interrupted, match=f"stopped by {name} in the E-step; .*{AGAIN}"):
            stop.check("the E-step")
        if number == signal.SIGINT:  # torch's agent passes a second Ctrl-C on as SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        else:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


# -------------------------------------------------------------------------------------------------- in two processes


def test_two_processes_exchange_values_and_shards_and_end_in_a_checkpoint(tmp_path):
    """Nothing listens beyond this machine. SIGTERM to the launcher reaches both, and one sentence is printed."""
    process = start("exchange", tmp_path)
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    (line,) = finish(process, code=3)
    assert line.startswith("minem: stopped by SIGTERM in the M-step")
    assert (tmp_path / "checkpoint").exists()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["gather"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 5001}]
        assert found["total"] == [2.0, 0.25]
        assert found["any"] == [True, False]
        assert found["broadcast"] == ["of", 0, None]
        addresses = {address.partition(":")[0] for address in found["listening"]}
        assert addresses == {"0100007F"}  # 127.0.0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "code", "lines"),
    [
        ("usage", 2, ["minem: found by all"]),
        ("guard", 4, ["minem: found by one"]),
        ("bug", 1, [r"\[rank1\]: KeyError: 'a bug of one'"]),
        # Either the agent sees the death first, or the other process, whose connection breaks.
        ("killed", 3, [f"minem: (process 2 of 2 was ended by SIGKILL|the connection to another .* broke); {AGAIN}.*"]),
    ],
)
def test_a_failure_ends_all_and_is_printed_once(tmp_path, mode, code, lines):
    """Proves each way to fail with processes of its own, which takes seconds."""
    found = finish(start(mode, tmp_path), code)
    if mode in ("bug", "killed"):  # before: a traceback, or the other process's broken connection if it was still alive
        found = found[-1:]
    assert len(found) == len(lines), found
    assert all(map(re.fullmatch, lines, found)), found


@pytest.mark.slow
def test_ctrl_c_while_one_process_waits_for_the_share_of_another(tmp_path):
    """Proves that a process inside a collective, which cannot look at its note, ends silently with the other."""
    process = start("sample", tmp_path)
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGINT)
    (line,) = finish(process, code=3)
    assert line.startswith("minem: stopped by Ctrl-C in the E-step")


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(tmp_path):
    """Proves it through torch's agent, of which the quick test of `Stop` knows nothing."""
    process = start("stuck", tmp_path)
    wait_until_ready(process, tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert finish(process, code=3) == ["minem: stopped"]


@pytest.mark.slow
def test_processes_end_with_a_killed_launcher(tmp_path):
    """Proves that no process is left, with a GPU and the lock of a run, if the agent cannot end it."""
    process = start("stuck", tmp_path)
    workers = wait_until_ready(process, tmp_path)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_processes_start_leaves_none(tmp_path, number):
    """Proves it for moments before, while and after torch's agent starts them, which no quick test can hit."""
    arguments = [*flags("run.iterations=1", "task.limit=4"), "--gpus", "2", "--out", tmp_path / "run"]
    for moment in (0.2, 1.5, 3.0, 4.5, 6.0, 8.0):
        command = [sys.executable, "-m", "minem", "train", *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        time.sleep(moment)
        process.send_signal(number)
        err = finish(process, code=3)
        assert sum(line.startswith("minem: stopped") for line in err) == 1, (moment, err)
        assert not [line for line in err if "Traceback" in line], (moment, err)
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
        assert left == "", (moment, left)
