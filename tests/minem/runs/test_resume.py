"""Runs whose files were damaged, cut short, deleted or moved, and disks that fill up: each ends with the same bytes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import minem.files
import minem.runs.directory
from minem.cli import main
from minem.config import load_config
from minem.errors import Interrupted
from minem.files import json_line, read_rows
from minem.runs.directory import RunDirectory, read_facts, read_journal

SMALL = [
    "--limit",
    "10",
    "--budget",
    "2",
    "--iterations",
    "3",
    "--set",
    "eval.samples=0",
    "--set",
    "eval.diagnostics=2",
]
SMALL += ["--set", "mstep.batch_size=4", "--set", "sampler.max_new_tokens=48", "--set", "eval.max_new_tokens=48"]
KINDS = {
    "last": [],  # run.keep, the default
    "all": ["--set", "run.keep=all"],
    "bfloat16": ["--set", "model.dtype=bfloat16"],  # float32 masters beside the model
    "base": ["--set", "run.init=base"],
}


def minem_cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(out: Path, kind: str = "last") -> Result:
    return minem_cli("train", *SMALL, *KINDS[kind], "--out", out)


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on accidents: samples, evaluations and weights as bytes, metrics but for times."""
    files = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".safetensors", ".json")]
    timed = {"journal.jsonl", "metrics.jsonl", "run.json"}
    found: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in files if p.name not in timed}
    rows = read_rows(run / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in row.items() if not re.search("second|mfu|memory", k)} for row in rows]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs that nothing disturbed, one of each kind, made when first asked for; they are not to be changed."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("finished") / kind
            result = train(made[kind], kind)
            assert result.exit_code == 0, result.output
        return made[kind]

    return run


def cut_journal(run: Path, last: str) -> None:
    """As if the run had been killed right after this stage; what later stages deleted is gone all the same."""
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    stages = [json.loads(line)["stage"] for line in lines]
    (run / "journal.jsonl").write_bytes(b"".join(lines[: stages.index(last) + 1]))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


MODEL = "model/model.safetensors"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "last", "harm", "file", "back", "again"),
    [
        # What is a result of the run is done again from the stage on that wrote it; where an E-step goes, the blocks of
        # it that were deleted go with it, and the model before it, of which no draws are left then, is written anew.
        ("last", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", [1, 2]),
        ("last", "report", Path.unlink, "iter-03/samples.jsonl", "iter-02/mstep", [1]),
        slow("last", "report", truncate, f"iter-03/{MODEL}", "iter-03/mstep", [1, 2]),
        slow("last", "report", Path.unlink, "iter-03/model/config.json", "iter-03/mstep", [1, 2]),
        slow("last", "iter-03/diagnostics", flip, "iter-02/accepted.jsonl", "iter-01/mstep", []),
        slow("last", "report", truncate, "iter-03/eval.test.jsonl", "iter-03/eval.test", []),
        slow("last", "report", flip, "iter-00/eval.test.jsonl", "iter-00/eval.test", []),
        # The previous checkpoint is used where it is there ...
        ("all", "iter-03/estep", truncate, f"iter-02/{MODEL}", "iter-02/mstep", []),
        slow("all", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", []),
        # ... and later draws are kept where a model that would be deleted anyway is trained once more.
        ("last", "iter-03/estep", None, "iter-02/model", None, [1, 2]),
        slow("bfloat16", "iter-03/estep", None, "iter-02/model", None, [1, 2]),
        slow("base", "iter-03/estep", None, "iter-02/model", None, [2]),
        slow("base", "report", flip, f"iter-03/{MODEL}", "iter-03/mstep", [2]),
    ],
)
def test_damaged_files_are_noticed_and_made_again(
    finished: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    last: str,
    harm: Callable[[Path], None] | None,
    file: str,
    back: str | None,
    again: list[int],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(kind), run)
    cut_journal(run, last)
    if harm is not None:
        harm(run / file)
    else:  # deleted by the run itself, which is then killed and loses its newer one
        assert not (run / file).exists()
    result = train(run, kind)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 0, said
    assert said.count("is missing or not what was written") == (back is not None)
    assert back is None or f"{file} " in said.replace(" and 1 more is", " is")
    assert back is None or f"goes back to before {back} " in said
    assert [int(i) for i in re.findall(r"iter-(\d+)/model is missing or damaged: trained again", said)] == again
    assert outcome(run) == outcome(finished(kind))
    assert "not what was written" not in train(run, kind).stderr  # and all is well now


@pytest.mark.slow
@pytest.mark.parametrize("harmed", [MODEL, "state/state-00000.safetensors"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_checkpoint_that_draws_were_made_from(
    tmp_path: Path, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, harm: Any, harmed: str
) -> None:
    """Killed in the M-step of iteration 2: its draws are kept, whatever happened to the model they are of."""
    run = tmp_path / "run"
    stop_before(monkeypatch, "iter-02/mstep")
    assert train(run, "bfloat16").exit_code == 3
    monkeypatch.undo()
    harm(run / "iter-01" / harmed)
    drawn = (run / "iter-02/samples.jsonl").stat().st_mtime_ns
    result = train(run, "bfloat16")
    assert result.exit_code == 0, result.output
    assert "iter-01/model is missing or damaged: trained again" in " ".join(result.stderr.split())
    assert (run / "iter-02/samples.jsonl").stat().st_mtime_ns == drawn
    assert outcome(run) == outcome(finished("bfloat16"))


def stop_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage = RunDirectory.stage

    def stops(self: RunDirectory, which: str, writes: int = 0) -> Any:
        if which == name:
            raise KeyboardInterrupt
        return stage(self, which, writes)

    monkeypatch.setattr(RunDirectory, "stage", stops)


@pytest.mark.slow
def test_a_matched_run_trains_again_on_its_own_share(tmp_path: Path) -> None:
    """Where an M-step saw some of the accepted rows only, a model that is lost is made again of the same ones."""
    flags = [*SMALL[:2], *SMALL[4:], "--samplers", "rsm:2,star:2", "--seeds", "0", "--match", "kept"]
    command = ["compare", *flags, "--out", tmp_path / "all", "--json"]
    first = minem_cli(*command)
    assert first.exit_code == 0, first.output
    runs = sorted(path.parent for path in tmp_path.glob("all/*/run.json"))
    before = [outcome(run) for run in runs]
    kept = [[read_journal(run)[f"iter-0{i}/mstep"]["examples"] for i in (1, 2, 3)] for run in runs]
    accepted = [[len(list(read_rows(run / f"iter-0{i}/accepted.jsonl"))) for i in (1, 2, 3)] for run in runs]
    assert kept[0] == kept[1] != accepted[1]  # some rows were left out
    for run in runs:
        cut_journal(run, "iter-03/estep")
    again = minem_cli(*command)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("trained again, in memory") == 2 * len(runs) == 4
    assert [outcome(run) for run in runs] == before


# ------------------------------------------------------------------------------------- the directory and its journal


def test_a_torn_journal(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    cut_journal(run, "iter-03/mstep")
    os.truncate(run / "journal.jsonl", (run / "journal.jsonl").stat().st_size - 5)
    assert train(run).exit_code == 0
    assert outcome(run) == outcome(finished("last"))


def test_a_journal_that_was_changed_goes_on_from_above_it(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[6] = b"\xff" + lines[6]
    (run / "journal.jsonl").write_bytes(b"".join(lines))
    refused = train(run)
    assert refused.exit_code == 2
    assert "journal.jsonl, line 7: damaged; delete it and all lines below it" in refused.stderr
    (run / "journal.jsonl").write_bytes(b"".join(lines[:6]))
    assert train(run).exit_code == 0
    assert outcome(run) == outcome(finished("last"))


def test_a_journal_of_before_there_were_manifests_is_continued(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    later = ("files", "sha256")
    rows = [{k: v for k, v in row.items() if k not in later} for row in read_rows(run / "journal.jsonl")]
    (run / "journal.jsonl").write_bytes(b"".join(map(json_line, rows[:-4])))
    assert rows[-4]["stage"] == "iter-03/eval.validation"
    assert train(run).exit_code == 0
    assert outcome(run) == outcome(finished("last"))


def test_a_journal_in_which_a_number_changed_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """It is JSON still, and nothing but the line's own digest can tell."""
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    journal = run / "journal.jsonl"
    journal.write_bytes(re.sub(rb'"accuracy": (0\.\d+)', rb'"accuracy": \g<1>1', journal.read_bytes(), count=1))
    for command in (["train", *SMALL, "--out", run], ["report", run, "-o", tmp_path / "page.html"], ["show", run]):
        result = minem_cli(*command)
        assert result.exit_code == 2
        assert "journal.jsonl, line 1: damaged" in result.stderr.splitlines()[-1]


def test_a_run_that_was_moved_continues(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before(monkeypatch, "iter-02/mstep")
    assert train(tmp_path / "here").exit_code == 3
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    assert train(tmp_path / "there").exit_code == 0
    assert outcome(tmp_path / "there") == outcome(finished("last"))
    assert not (tmp_path / "here").exists()


def test_two_processes_on_one_run(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "minem", "train", *SMALL, "--out", str(run)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "journal.jsonl").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # not finished before the second one has looked
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].startswith(f"minem: {run} is in use by process {first.pid};")
        assert "Traceback" not in second.stderr
        first.send_signal(signal.SIGCONT)
        first.communicate()
        assert first.returncode == 0
    finally:
        first.kill()
        first.communicate()
    assert outcome(run) == outcome(finished("last"))


def test_the_config_of_a_run_repeats_it(finished: Callable[[str], Path], tmp_path: Path) -> None:
    source, again = finished("last"), tmp_path / "again"
    result = minem_cli("train", source / "config.toml", "--out", again)
    assert result.exit_code == 0, result.output
    assert outcome(again) == outcome(source)
    first, second = read_facts(source), read_facts(again)
    for key in ("config", "inputs", "seed", "versions"):
        assert first[key] == second[key]
    assert {"task rows", "base model", "tokenizer", "chat template", "prompts"} <= first["inputs"].keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in first["inputs"].values())
    assert first["origins"]["sampler.budget"] == "--budget"
    assert first["origins"]["eval.samples"] == "--set"
    assert first["origins"]["mstep.clip"] == "default"
    assert first["origins"]["mstep.lr"].endswith("configs/toy.toml")
    assert second["origins"]["sampler.budget"] == str(source / "config.toml")
    assert 'budget = 2  # by "--budget"' in (source / "config.toml").read_text()


def test_what_is_memory_alone_may_change_when_a_run_goes_on(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    cut_journal(run, "iter-03/estep")
    smaller = ["--set", "mstep.pack_tokens=64", "--set", "mstep.checkpointing=full", "--set", "run.slots=8"]
    again = minem_cli("train", *SMALL, *smaller, "--out", run)
    assert again.exit_code == 0, again.output
    said = " ".join(again.stderr.split())
    assert "mstep.pack_tokens: 8192 -> 64, since this run was started" in said
    assert 'mstep.checkpointing: "auto" -> "full", since' in said
    here, there = (read_journal(path)["iter-03/mstep"] for path in (run, finished("last")))
    assert here["micro_batches"] > there["micro_batches"]
    assert here["checkpointed"] > 0
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-6)
    # The config that the run was started with stands, and still nothing else may differ.
    assert load_config(run / "config.toml") == load_config(finished("last") / "config.toml")
    refused = minem_cli("train", *SMALL, *smaller, "--set", "mstep.epochs=3", "--out", run)
    assert refused.exit_code == 2
    assert "(mstep.epochs: 1 -> 3)" in refused.stderr


def test_a_run_without_its_config_is_still_known(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("last"), run)
    cut_journal(run, "iter-01/estep")
    (run / "config.toml").write_text("[model")
    refused = train(run)
    assert refused.exit_code == 2
    assert "delete it" in refused.stderr
    (run / "config.toml").unlink()
    refused = minem_cli("train", *SMALL, "--set", "mstep.lr=0.5", "--out", run)
    assert refused.exit_code == 2
    assert "mstep.lr: 0.001 -> 0.5" in refused.stderr
    assert train(run).exit_code == 0
    assert load_config(run / "config.toml") == load_config(finished("last") / "config.toml")
    assert outcome(run) == outcome(finished("last"))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"config": 3}))
    (run / "config.toml").unlink()
    refused = train(run)
    assert refused.exit_code == 2
    assert "run.json has no config" in refused.stderr


# --------------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a disk of its own the options of `mount -o`, like "size=1m", and returns where it is."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=16m", "minem-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root")

    def change(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
        return place

    try:
        yield change
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(
    finished: Callable[[str], Path], small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever write it is full, only the stage in flight is lost; with more room the same command goes on."""
    monkeypatch.setattr(
        minem.runs.directory, "shortage", lambda folder, needed: None
    )  # the check beforehand would come first
    said = []
    for size in ("12k", "20k", "40k", "56k", "1500k", "3400k", "3600k", "8m"):
        run = small_disk(f"size={size}") / "run"
        result = train(run)
        assert not isinstance(result.exception, Exception), result.exception
        if result.exit_code == 0:
            break
        said.append(" ".join(result.stderr.split()).rpartition("minem: ")[2])
        assert result.exit_code == 3, result.output
        assert re.match(r"the disk of \S+ is full; free some space, then give the same command again", said[-1])
        assert not [path for path in run.rglob(".partial.*") if path.parent != run]
    assert result.exit_code == 0
    assert {"iter-01/mstep", "iter-02/mstep"} <= {sentence.rpartition(" ")[2] for sentence in said}
    assert len(said) >= 5
    assert outcome(run) == outcome(finished("last"))


def test_room_on_the_disk_is_looked_at_before_a_stage(
    finished: Callable[[str], Path], small_disk: Callable[[str], Path]
) -> None:
    run = small_disk("size=3m") / "run"
    result = train(run)
    assert result.exit_code == 3
    said = " ".join(result.stderr.split())
    assert re.search(r"no room for iter-01/mstep: about 4\.\d MB are needed and \d\.\d MB are free; free some", said)
    assert "iteration 1/3 M-step" not in said
    small_disk("size=16m")
    assert train(run).exit_code == 0
    assert outcome(run) == outcome(finished("last"))


def test_a_read_only_directory_is_one_sentence(
    finished: Callable[[str], Path], small_disk: Callable[[str], Path]
) -> None:
    run = small_disk("size=16m") / "run"
    shutil.copytree(finished("last"), run)
    small_disk("ro")
    for place, extra in ((run, []), (run, ["--overwrite"]), (run.parent / "new", [])):
        result = minem_cli("train", *SMALL, "--out", place, *extra)
        assert result.exit_code == 2
        assert (
            result.stderr.splitlines()[-1] == f"minem: the run directory {place} cannot be used: Read-only file system"
        )


def test_a_limit_on_file_sizes_is_a_full_disk(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota is: the system refuses in the middle of the weights. Needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        result = train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 3, result.output
    assert "is full; free some space, then give the same command again: it goes on with iter-01/mstep" in " ".join(
        result.stderr.split()
    )
    assert not (tmp_path / "run/iter-01/model").exists()
    assert train(tmp_path / "run").exit_code == 0
    assert outcome(tmp_path / "run") == outcome(finished("last"))


def test_a_stage_without_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minem.files.shutil, "disk_usage", lambda folder: (10**9, 0, 5_000_000))
    with RunDirectory.open(load_config(flags={"run.out": str(tmp_path)})) as run:
        with run.stage("iter-00/small", writes=3_000_000):
            pass
        sentence = r"no room for iter-01/mstep: about 6\.0 MB are needed and 5\.0 MB are free"
        with pytest.raises(Interrupted, match=sentence), run.stage("iter-01/mstep", writes=5_000_000):
            pytest.fail("begun")
        assert run.stages == ("iter-00/small",)
