"""Runs whose files were damaged, cut short or deleted, and disks that fill up: each ends in the same bytes."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minem.files
from minem.config import load_config
from minem.runs.directory import RunDirectory, read_facts, read_journal
from minem.runs.resume import is_intact
from tests.minem.tiny_runs import command, cut_journal, finished, flags, flip, keep_lines, outcome, train, truncate

MODEL, STATE = "model/model.safetensors", "state/state-00000.safetensors"
KINDS = {
    "last": [],  # run.keep, the default
    "all": ["run.keep=all"],
    "bfloat16": ["model.dtype=bfloat16"],  # float32 masters beside the model
    "base": ["run.init=base"],
    "lora": ["mstep.lora_rank=2", "mstep.lr=1e-2"],
}


@pytest.fixture(scope="module")
def undisturbed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished runs, one of each kind, made when first asked for; they are not to be changed."""
    made = {"last": finished_run}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("finished") / kind
            train(made[kind], *KINDS[kind])
        return made[kind]

    return run


# ----------------------------------------------------------------------------------------------------- damaged files


def stop_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage = RunDirectory.stage

    def stops(self: RunDirectory, which: str, writes: int = 0) -> Any:
        if which == name:
            raise KeyboardInterrupt
        return stage(self, which, writes)

    monkeypatch.setattr(RunDirectory, "stage", stops)


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "before", "harm", "file", "back"),
    [
        # The model before the last one was deleted, so the run goes back to the base model; draws are kept ...
        ("last", "", flip, f"iter-02/{MODEL}", "iter-01/mstep"),
        # ... unless they are what was lost: the blocks that they were joined from are gone, too.
        ("last", "", Path.unlink, "iter-01/samples.jsonl", "iter-01/estep.1"),
        slow("last", "", Path.unlink, "iter-02/samples.jsonl", "iter-01/mstep"),
        slow("last", "", truncate, f"iter-02/{MODEL}", "iter-01/mstep"),
        slow("last", "", Path.unlink, "iter-02/model/config.json", "iter-01/mstep"),
        slow("last", "", truncate, "iter-02/eval.test.jsonl", "iter-02/eval.test"),
        slow("last", "", flip, "iter-00/eval.test.jsonl", "iter-00/eval.test"),
        # Killed before a stage, the newest model is that of the first iteration.
        slow("bfloat16", "iter-01/eval.validation", flip, f"iter-01/{STATE}", "iter-01/mstep"),
        slow("bfloat16", "iter-02/mstep", Path.unlink, f"iter-01/{MODEL}", "iter-01/mstep"),
        slow("lora", "iter-02/mstep", truncate, f"iter-01/{STATE}", "iter-01/mstep"),
        slow("lora", "", flip, "iter-02/adapter/adapter_model.safetensors", "iter-01/mstep"),
        # The model before is used if it is there; from the base, the last M-step alone would do.
        slow("all", "", flip, f"iter-02/{MODEL}", "iter-02/mstep"),
        slow("base", "", flip, f"iter-02/{MODEL}", "iter-01/mstep"),
    ],
)
def test_damaged_files_are_noticed_and_made_again(
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    before: str,
    harm: Callable[[Path], None],
    file: str,
    back: str,
) -> None:
    """The slow ones prove it for each kind of file, damage and state that a run keeps beside its model."""
    run = tmp_path / "run"
    if before:
        with monkeypatch.context() as patch:
            stop_before(patch, before)
            train(run, *KINDS[kind], code=3)
    else:
        shutil.copytree(undisturbed(kind), run)
    harm(run / file)
    printed = train(run, *KINDS[kind])
    found = re.search(r"warning (\S+) is missing or damaged: the run goes back to before (\S+) and", printed)
    assert found is not None, printed
    assert found.groups() == (file, back)
    assert outcome(run) == outcome(undisturbed(kind))
    assert is_intact(run, load_config(run / "config.toml"))


# ------------------------------------------------------------------------------------- the directory and its journal


def test_a_journal_that_lacks_a_line_is_refused(run: Path) -> None:
    """What later stages need is missed when the journal is read, and the rest when its stage would be done."""
    stages, before = finished(run), outcome(run)
    needed = {"iter-01/estep": "iter-01/mstep", "iter-01/mstep": "iter-01/eval.validation"}
    needed |= {"iter-02/estep": "iter-02/mstep", "iter-02/mstep": "iter-02/eval.validation"}
    gone = ("iter-00/eval.validation", "iter-00/eval.test", "iter-01/eval.validation")  # the weights of then
    journal = (run / "journal.jsonl").read_bytes()
    for missing in (*needed, *gone):
        place = stages.index(missing)
        keep_lines(run, [number for number in range(len(stages)) if number != place])
        sentence = train(run, code=2).rpartition("minem: ")[2]
        assert sentence.endswith("put the missing line back, or give --overwrite to start from scratch")
        if missing in gone:
            assert f"iter-02/mstep is finished, but {missing}, which comes before it, is not" in sentence
        else:
            line = f"journal.jsonl, line {1 + stages.index(needed[missing]) - 1}"
            assert f"{line}: {needed[missing]} is finished, but {missing}, which it needs, is not" in sentence
        (run / "journal.jsonl").write_bytes(journal)
    assert outcome(run) == before


def test_the_config_of_a_run_repeats_it(finished_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result = command("train", finished_run / "config.toml", "--out", again)
    assert result.exit_code == 0, result.output
    assert outcome(again) == outcome(finished_run)
    first, second = read_facts(finished_run), read_facts(again)
    for key in ("config", "inputs", "seed", "versions"):
        assert first[key] == second[key]
    assert {"task rows", "base model", "tokenizer", "chat template", "prompts"} <= first["inputs"].keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in first["inputs"].values())
    assert first["origins"]["sampler.budget"] == "--set"
    assert first["origins"]["mstep.clip"] == "default"
    assert first["origins"]["mstep.lr"].endswith("configs/toy.toml")
    assert second["origins"]["sampler.budget"] == str(finished_run / "config.toml")
    assert 'budget = 2  # by "--set"' in (finished_run / "config.toml").read_text()


def test_what_is_memory_alone_may_change_when_a_run_is_resumed(finished_run: Path, run: Path) -> None:
    cut_journal(run, "iter-02/estep")
    (run / "iter-01/model").mkdir()
    smaller = ["mstep.pack_tokens=64", "mstep.checkpointing=full", "run.slots=8"]
    printed = train(run, *smaller)
    assert "mstep.pack_tokens: 8192 -> 64, since this run was started" in printed
    assert 'mstep.checkpointing: "auto" -> "full", since' in printed
    here, there = (read_journal(path)["iter-02/mstep"] for path in (run, finished_run))
    assert here["micro_batches"] > there["micro_batches"]
    assert here["checkpointed"] > 0
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-6)
    # The config that the run was started with stands, and still nothing else may differ.
    assert load_config(run / "config.toml") == load_config(finished_run / "config.toml")
    assert "(mstep.epochs: 1 -> 3)" in train(run, *smaller, "mstep.epochs=3", code=2)


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


@pytest.mark.slow
def test_a_disk_that_fills_up(
    finished_run: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves, on a real disk, that only the stage in flight is lost at any write; with more room the run continues."""
    printed = train(small_disk("size=3m") / "run", code=3)
    assert re.search(r"no room for iter-01/mstep: about 4\.\d MB are needed and \d\.\d MB are free; free some", printed)
    assert finished(small_disk("size=16m") / "run")[-1] == "iter-01/estep"
    shutil.rmtree(small_disk("size=16m") / "run")
    monkeypatch.setattr(minem.files, "shortage", lambda folder, needed: None)
    sentences = []
    for size in ("12k", "20k", "40k", "56k", "1500k", "3400k", "3600k"):
        run = small_disk(f"size={size}") / "run"
        sentences.append(train(run, code=3).rpartition("minem: ")[2])
        assert re.match(r"the disk of \S+ is full; free some space, then give the same command again", sentences[-1])
        assert not [path for path in run.rglob(".partial") if path.parent != run]
    train(small_disk("size=16m") / "run")
    assert {"iter-01/mstep", "iter-02/mstep"} <= {sentence.rpartition(" ")[2] for sentence in sentences}
    assert outcome(run) == outcome(finished_run)


def test_a_read_only_directory_is_one_sentence(finished_run: Path, small_disk: Callable[[str], Path]) -> None:
    run = shutil.copytree(finished_run, small_disk("size=16m") / "run")
    small_disk("ro")
    for place, extra in ((run, []), (run, ["--overwrite"]), (run.parent / "new", [])):
        result = command("train", *flags(), "--out", place, *extra)
        assert result.exit_code == 2
        (sentence,) = result.stderr.splitlines()
        assert sentence == f"minem: the run directory {place} cannot be used: Read-only file system"


def test_a_limit_on_file_sizes_is_a_full_disk(finished_run: Path, run: Path) -> None:
    """As a quota is: the system refuses in the middle of the weights. Needs no root."""
    cut_journal(run, "iter-01/estep")
    shutil.rmtree(run / "iter-02")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        printed = train(run, code=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "is full; free some space, then give the same command again: it continues with iter-01/mstep" in printed
    assert not (run / "iter-01/model").exists()
    train(run)
    assert outcome(run) == outcome(finished_run)
