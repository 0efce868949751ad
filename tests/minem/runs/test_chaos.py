"""Real commands killed at seeded moments: given again, each ends as if nothing had happened.

    python -m pytest -n 2 -m slow -rP tests/minem/runs/test_chaos.py

A moment is a share of the time of a run that nothing disturbed. It is waited for by the lines of the journal, so a busy
machine changes it little. -rP prints a line for each kill: when, by what, where the journal stood, the exit code.
"""

from __future__ import annotations

import bisect
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minem.files import read_json, read_rows
from minem.runs.folder import LOCK
from tests.minem.compare.test_experiment import numbers
from tests.minem.runs.test_crash import finish
from tests.minem.tiny_runs import finished, flags, outcome

SEED = 2026
OFTEN = ["run.checkpoint_minutes=0.0", "mstep.epochs=2"]  # a checkpoint after every step
BLOCKS = ["task.limit=16", "run.slots=1", "eval.diagnostics=2", "eval.max_new_tokens=8"]
ALL = ["sampler.draws=all"]
ROUNDED = ["model.dtype=bfloat16", "mstep.optimizer_state=keep"]
COMPARED = flags("run.iterations=1", *OFTEN)
del COMPARED[COMPARED.index("sampler.budget=2") - 1 : COMPARED.index("sampler.budget=2") + 1]  # compare sets it

FIRST, MIDDLE, EXPORT, END = "first second", "middle", "export", "near the end"
TWO_RUNS = [[FIRST, EXPORT, END], [FIRST, MIDDLE, END]]  # the moments of each run's kills, in order
TEN = [[FIRST, FIRST, MIDDLE, EXPORT, MIDDLE, MIDDLE, EXPORT, MIDDLE, END, END]]
SIGNALS = {
    signal.SIGKILL: [-signal.SIGKILL],
    signal.SIGTERM: [3],
    signal.SIGINT: [3, -signal.SIGINT],
}  # and their exit codes


@dataclass
class Setting:
    arguments: list[str]
    kills: list[list[str]]


def trained(*more: str, kills: list[list[str]] = TWO_RUNS) -> Setting:
    return Setting(["train", *flags(*more)], kills)


SETTINGS = {
    "rsm": trained(*BLOCKS, *OFTEN, kills=TEN),
    "star": trained("sampler.name=star", "run.init=base", *OFTEN),
    "pps": trained("sampler.name=pps", "sampler.budget=1", "eval.samples=1"),
    "bfloat16, moments kept": trained(*ROUNDED, *OFTEN),
    "lora": trained("mstep.lora_rank=4", "mstep.lr=1e-2", *OFTEN),
    "samples": Setting(["train", "--samples", "SAMPLES", *flags("mstep.epochs=6", OFTEN[0])], TWO_RUNS),
    "keep all": trained("run.keep=all", "mstep.optimizer_state=keep"),
    "importance": trained("mstep.weights=importance", *ALL, *OFTEN),
    "compare": Setting(
        ["compare", *COMPARED, "--samplers", "rsm:2,pps:1", "--seeds", "0", "--match", "kept"], TWO_RUNS
    ),
    "eval": Setting(["eval", "--limit", "60", "--samples", "4", "--device", "cpu"], [[FIRST, MIDDLE, END]] * 2),
}


def launch(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minem", *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


# ------------------------------------------------------------------------------------------------- where a run stands


def lines(out: Path) -> int:
    """Of all journals, or of the answers of an evaluation."""
    files = [*out.glob("journal.jsonl"), *out.glob("*/journal.jsonl"), *out.glob("answers.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files)


def position(out: Path) -> str:
    """The last finished stage, for a person."""
    runs = [out, *sorted(path.parent for path in out.glob("*/journal.jsonl"))]
    last = [stages[-1] for run in runs if (stages := finished(run))]
    return ", ".join(last) or f"line {lines(out)}"


def exporting(out: Path) -> bool:
    """A model is being written, and has not got its name yet."""
    try:
        return any(".partial" in str(path.relative_to(out)) and "model" in path.name for path in out.rglob("*"))
    except FileNotFoundError:  # renamed meanwhile
        return True


def listens(process: subprocess.Popen[str]) -> bool:
    """It has its own handlers: before that, Python itself answers signals."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until then, or until it ends."""
    while process.poll() is None and not condition():
        time.sleep(0.003)


def sleep(seconds: float, process: subprocess.Popen[str]) -> None:
    """So long, or until it ends."""
    until = time.monotonic() + seconds
    wait(lambda: time.monotonic() >= until, process)


# -------------------------------------------------------------------------------------------------- what must be equal


def tree(out: Path) -> dict[str, Any]:
    """All that must not depend on kills: every name, and every file but those that hold times."""
    held = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK]
    found: dict[str, Any] = {"names": sorted(str(path.relative_to(out)) for path in held)}
    for path in held:
        # The order of answers is that in which they finished.
        if path.name == "answers.jsonl":
            found[path.name] = sorted(path.read_bytes().splitlines())
        if path.name in ("config.toml", "accuracy.png", "README.md"):
            found[str(path.relative_to(out))] = path.read_bytes()
        if path.name in ("settings.json", "plan.json"):
            found[path.name] = {key: value for key, value in read_json(path).items() if key != "id"}
        if path.name == "run.json":
            facts = read_json(path)
            found[str(path.relative_to(out))] = {key: facts[key] for key in ("config", "inputs")}
    runs = sorted(path.parent for path in (*out.glob("run.json"), *out.glob("*/run.json")))
    for run in runs:
        list(read_rows(run / "journal.jsonl"))  # no line is cut short
        found[f"outcome of {run.relative_to(out)}"] = outcome(run)
    return found | ({"comparison": numbers(out)} if (out / "comparison.json").exists() else {})


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Names what differs, instead of megabytes of it."""
    assert found["names"] == expected["names"]
    different = [key for key in expected if found.get(key) != expected[key]]
    for key in different:
        if key.startswith("outcome of"):
            different += [f"{key}: {name}" for name, value in expected[key].items() if found[key].get(name) != value]
    assert different == []


# ------------------------------------------------------------------------------------------------------------ the kills


@dataclass
class Timeline:
    """Of a run that nothing disturbed: when it held its folder, when each line came, and when it ended."""

    begun: float
    times: list[float]  # of the journal's first line, and so on, after 0.0
    total: float
    tree: dict[str, Any]


def undisturbed(arguments: list[str], out: Path) -> Timeline:
    start, begun, times = time.monotonic(), 0.0, [0.0]
    process = launch(arguments, out)

    def look() -> bool:
        nonlocal begun
        now = time.monotonic() - start
        if not begun and out.exists():
            begun = now
        times.extend([now] * (1 + lines(out) - len(times)))
        return False

    wait(look, process)
    total = time.monotonic() - start
    finish(process)
    return Timeline(begun, times, total, tree(out))


def wait_for(moment: str, noise: random.Random, hurry: float, out: Path, process: Any, timeline: Timeline) -> None:
    """hurry: below 1, if the command had ended by the moment before."""
    if moment == FIRST:
        sleep(noise.uniform(0, hurry), process)
        return
    if moment == EXPORT and hurry == 1:
        wait(lambda: exporting(out), process)
        sleep(noise.uniform(0, 0.05), process)
        return
    times, here = timeline.times, lines(out)
    if moment == END:
        at = max(noise.uniform(0.8, 0.97) * timeline.total * hurry, times[min(here, len(times) - 1)])
    else:
        done = times[min(here, len(times) - 1)]
        at = done + noise.uniform(0.1, 0.8) * hurry * (timeline.total - done)
    number = bisect.bisect(times, at) - 1
    if 0 < number <= here:  # no line of it is to come before: from its start
        sleep(timeline.begun + at - times[number], process)
    else:
        wait(lambda: lines(out) >= number, process)
        sleep(at - times[number], process)


def kill(
    arguments: list[str],
    out: Path,
    number: signal.Signals,
    moment: str,
    noise: random.Random,
    hurry: float,
    line: Timeline,
) -> tuple[bool, bool]:
    """Give the command and kill it. Was it alive then, and had it done all?"""
    start = time.monotonic()
    process = launch(arguments, out)
    if number != signal.SIGKILL:
        wait(lambda: listens(process), process)
    wait_for(moment, noise, hurry, out, process, line)
    alive, seconds = process.poll() is None, time.monotonic() - start
    process.send_signal(number)
    if number == signal.SIGINT:
        sleep(noise.uniform(0, 0.3), process)
        process.send_signal(number)
    _, err = process.communicate(timeout=500)
    code = process.returncode
    said = f"{moment}, {number.name}, after {seconds:.2f} s, at {position(out)}: exit code {code}"
    print(said if alive else f"{said}, and had ended before")
    assert "Traceback" not in err, f"{said}\n{err}"  # a signal in the last moments must not show one either
    # Python's own handlers are gone as it ends: a signal may then be what it ends by, after all is done.
    done = code == 0 or (code == -signal.SIGTERM and tree(out) == line.tree)
    assert done or code in SIGNALS[number], f"{said}\n{err}"
    return alive, done


def signals(count: int, noise: random.Random) -> Iterator[signal.Signals]:
    """About equally many of each."""
    wanted = [number for number, _ in zip([*SIGNALS] * count, range(count), strict=False)]
    noise.shuffle(wanted)
    return iter(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_seeded_moments_a_command_ends_with_the_same_bytes(
    name: str, tmp_path: Path, finished_run: Path
) -> None:
    """Proves it by the clock and with real processes, where the kills of test_crash.py are at known writes."""
    setting, noise = SETTINGS[name], random.Random(f"{SEED} {name}")
    samples = str(finished_run / "iter-01/samples.jsonl")
    arguments = [samples if word == "SAMPLES" else word for word in setting.arguments]
    timeline = undisturbed(arguments, tmp_path / "undisturbed/run")
    print(f"{name}: undisturbed {timeline.total:.1f} s, {len(timeline.times) - 1} lines")
    numbers, hit = signals(sum(map(len, setting.kills)), noise), 0
    for chain, moments in enumerate(setting.kills):
        out, spare = tmp_path / f"{chain}/run", tmp_path / f"{chain}/spare"
        for moment, number in zip(moments, numbers, strict=False):
            for attempt in range(4):
                if out.exists():
                    shutil.copytree(out, spare, symlinks=True)
                alive, done = kill(arguments, out, number, moment, noise, 0.8**attempt, timeline)
                if done:  # it goes back, so that there is something left to kill
                    assert_equal(tree(out), timeline.tree)
                    shutil.rmtree(out)
                    if spare.exists():
                        spare.rename(out)
                shutil.rmtree(spare, ignore_errors=True)
                hit += alive
                if alive:
                    break
        finish(launch(arguments, out))
        assert_equal(tree(out), timeline.tree)
    assert hit >= 5
