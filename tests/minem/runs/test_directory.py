"""The run directory: killed at any write it continues to the same bytes, and files of others are never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import minem.files
import minem.runs.directory
import minem.runs.folder
import minem.runs.record
from minem.config import Config, load_config
from minem.errors import Interrupted, UserError
from minem.files import PARTIAL, json_line, read_rows, write_rows
from minem.runs.directory import RunDirectory, read_facts, read_journal
from minem.runs.folder import LOCK, check_place, default_path, hold_folder

OURS = '{"format": "minem run directory, 1", '


def config(out: Path, **flags: Any) -> Config:
    keys = {"seed": "run.seed", "budget": "sampler.budget", "limit": "task.limit"}
    return load_config(flags={"run.out": str(out), **{keys[name]: value for name, value in flags.items()}})


def everything(folder: Path) -> dict[str, Any]:
    """Every file's content, without the times in the journal and run.json and the owner of the lock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "journal.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(line["stage"], line["result"]) for line in lines]
        elif name == "run.json":
            found[name] = {**json.loads(path.read_text()), "started": None, "id": None}
        elif path.is_file() and name != LOCK:
            found[name] = path.read_bytes()
    return found


def small_run(out: Path) -> None:
    """What a run does, in small: files, a folder, two files in one stage, metrics, results, and old files discarded."""
    with RunDirectory.open(config(out), command=["minem", "train"], overwrite=False) as run:
        previous = 0
        for iteration in (1, 2):
            folder = f"iter-{iteration:02d}"
            if f"{folder}/estep" not in run.results:
                with run.stage(f"{folder}/estep") as record:
                    rows = [{"id": f"q{i}", "text": f"{previous} and {i}"} for i in range(3)]
                    write_rows(record.path(f"{folder}/samples.jsonl"), rows)
                    write_rows(record.path(f"{folder}/accepted.jsonl"), rows[:iteration])
                    run.log_metrics(f"{folder}/estep", {"accepted": iteration})
                    record.result["accepted"] = previous + iteration
            previous = run.results[f"{folder}/estep"]["accepted"]
            if f"{folder}/mstep" not in run.results:
                with run.stage(f"{folder}/mstep") as record:
                    model = record.path(f"{folder}/model")
                    model.mkdir()
                    for step in range(2):
                        (model / f"{step}.bin").write_bytes(bytes([previous, step]))
                        run.log_metrics(f"{folder}/mstep", {"step": step, "loss": previous / 3})
            run.discard(f"iter-{iteration - 1:02d}/model")


def dies_at(fatal: int, work: Callable[[], None]) -> bool:
    """Do the work in a child process that is killed at its `fatal`-th write, rename, delete or flush; was it?"""
    child = os.fork()
    if child == 0:
        calls = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writing or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"):
                count()

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls > fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda descriptor: count()  # what a killed process has written is there without it
        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_write_it_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # these two would take most of the test's time
    monkeypatch.setattr(minem.runs.record, "_commit", lambda: None)
    small_run(tmp_path / "undisturbed")
    expected = everything(tmp_path / "undisturbed")
    assert len(expected) == 10
    point = 0
    while dies_at(point, partial(small_run, out := tmp_path / f"run{point}")):
        for name in everything(out):
            # A file under its own name is complete; the first model is not discarded yet, or only half.
            assert name in expected or PARTIAL in name or name.startswith("iter-01/model/")
        if point % 3 == 0:  # a second accident, a few writes later
            dies_at(7, partial(small_run, out))
        small_run(out)
        assert everything(out) == expected, f"killed at write {point}"
        point += 1
    assert point > 60


@pytest.mark.parametrize("name", ["journal.jsonl", "metrics.jsonl"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, name: str) -> None:
    small_run(tmp_path)
    whole = (tmp_path / name).read_bytes()
    start = len(whole) - len(whole.splitlines(keepends=True)[-1])
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for torn in (whole[:start] + b"\0" * 40, *(whole[:end] for end in range(start, len(whole), 7))):
        (tmp_path / "metrics.jsonl").write_bytes(metrics)
        (tmp_path / name).write_bytes(torn)
        if name == "metrics.jsonl":  # the stage is finished: its lines were flushed before its line in the journal
            with pytest.raises(UserError, match=r"lines of iter-02/mstep are missing or not what the run wrote"):
                RunDirectory.open(config(tmp_path))
            continue
        with RunDirectory.open(config(tmp_path)) as run:
            assert "iter-02/mstep" not in run.results
            with run.stage("plot"):
                run.log_metrics("plot", {"a": 1})
            run.undo("plot")
        assert (tmp_path / name).read_bytes() == whole[:start]
        # What the unfinished stage had measured is dropped with it, and will be measured again.
        assert "iter-02/mstep" not in [row["stage"] for row in read_rows(tmp_path / "metrics.jsonl")]


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    """In one sentence that gives the way to continue, which works."""
    small_run(tmp_path)
    expected, journal = everything(tmp_path), (tmp_path / "journal.jsonl").read_text()
    for damaged in (journal.replace("{", "", 1), journal.replace('"stage"', '"stag"', 1), "[]\n" + journal):
        (tmp_path / "journal.jsonl").write_text(damaged)
        with pytest.raises(UserError, match=r"journal\.jsonl, line 1: damaged; delete it and all lines below it"):
            RunDirectory.open(config(tmp_path))
    for line in (
        '{"stage": "foo/mstep", ',
        '{"stage": "iter-01/estep.q", ',
        journal.splitlines()[0].partition('"result"')[0],
    ):
        (tmp_path / "journal.jsonl").write_text(journal + line + '"result": {}, "files": {}}\n')
        with pytest.raises(UserError, match=r"journal\.jsonl, line \d+: damaged"):
            RunDirectory.open(config(tmp_path))
    (tmp_path / "journal.jsonl").write_text("")
    small_run(tmp_path)
    assert everything(tmp_path) == expected


def test_the_order_of_stages_is_checked(tmp_path: Path) -> None:
    """Every stage that is read from a later one's weights or rows stands after it; `train --samples` has no E-step."""
    stages = ["iter-00/eval.test", "iter-01/estep.1", "iter-01/estep.2", "iter-01/estep", "iter-01/diagnostics"]
    stages += ["iter-01/mstep.7", "iter-01/mstep", "iter-01/eval.validation", "iter-02/estep.1", "iter-02/estep"]
    lines = [json_line({"stage": stage, "result": {}, "files": {}}) for stage in (*stages, "plot")]
    needed = {"estep.2": "estep.1", "diagnostics": "estep", "mstep.7": "estep", "mstep": "estep"}
    needed |= {"eval.validation": "mstep"}
    RunDirectory.open(config(tmp_path / "run")).close()
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(b"".join(lines))
    assert list(read_journal(journal.parent)) == [*stages, "plot"]
    for stage in stages:
        folder, _, kind = stage.partition("/")
        wanted = f"{folder}/{needed[kind]}" if kind in needed else "iter-01/mstep" if folder == "iter-02" else ""
        journal.write_bytes(lines[0] * (folder > "iter-00") + lines[stages.index(stage)])
        if wanted:
            with pytest.raises(UserError, match=f"line 2: {stage} is finished, but {wanted}, which it needs, is not"):
                read_journal(journal.parent)
        else:
            assert stage in read_journal(journal.parent)
    alone = config(tmp_path / "alone")
    RunDirectory.open(alone, inputs={"samples": "aa"}).close()
    (tmp_path / "alone" / "journal.jsonl").write_bytes(lines[stages.index("iter-01/mstep")])
    with RunDirectory.open(alone, inputs={"samples": "aa"}) as run:
        assert list(run.results) == ["iter-01/mstep"]


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory.open(config(tmp_path)) as run:
        with pytest.raises(KeyboardInterrupt), run.stage("iter-01/estep") as record:  # noqa: PT012
            record.path("iter-01/samples.jsonl").write_text("half")
            (record.path("iter-01/model")).mkdir()
            raise KeyboardInterrupt
        with pytest.raises(FileNotFoundError), run.stage("iter-01/estep") as record:
            record.path("iter-01/samples.jsonl")  # and nothing is written there
        assert run.results == {}
        assert sorted(os.listdir(tmp_path)) == [LOCK, "config.toml", "journal.jsonl", "run.json"]
        with run.stage("iter-01/estep") as record:
            record.result["rate"] = (1, 2)
        assert run.results["iter-01/estep"] == {"rate": [1, 2]}  # as a resumed run will read it
    assert read_journal(tmp_path) == {"iter-01/estep": {"rate": [1, 2]}}


def fails(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, r"the disk of \S+ is full; free some space, then give the same command again"),
        (errno.EIO, r"cannot be read or written any more \(Input/output error\); repair that, then .*"),
        (errno.EROFS, r"cannot be read or written any more \(Read-only file system\); repair that, then .*"),
    ],
)
def test_a_disk_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    """In a stage, as it goes back, and as a folder of results is made."""
    small_run(tmp_path)
    with RunDirectory.open(config(tmp_path)) as run, monkeypatch.context() as patch:
        patch.setattr(minem.files, "flush_tree", fails(number))
        patch.setattr(minem.files, "write_atomic", fails(number))
        patch.setattr(minem.files, "remove", fails(number))  # the clean-up fails on such a disk, too
        where = f"{sentence}: it continues with iter-02/eval"
        with pytest.raises(Interrupted, match=where), run.stage("iter-02/eval") as record:
            record._paths.append((tmp_path / "a", tmp_path / "b"))
        assert "iter-02/eval" not in run.results
        with pytest.raises(Interrupted, match=sentence):
            run.undo("iter-02/mstep")
    monkeypatch.setattr(minem.runs.folder, "_take_lock", fails(number))
    expected = Interrupted if number == errno.ENOSPC else UserError
    with pytest.raises(expected, match=r"is full; free some space|comparison \S+ cannot be used"):
        hold_folder(tmp_path / "new", "plan.json", "comparison", {}, None).__enter__()


def test_a_folder_that_is_deleted_under_a_run_is_one_sentence(tmp_path: Path) -> None:
    run = RunDirectory.open(config(tmp_path / "run"))

    def work() -> None:
        shutil.rmtree(tmp_path / "run")
        run.log_metrics("iter-00/eval", {"accuracy": 1.0})

    with pytest.raises(Interrupted, match="was moved, removed or replaced"), run.stage("iter-00/eval"):
        work()
    with pytest.raises(Interrupted, match="No such file or directory"), run.stage("iter-00/eval"):
        pytest.fail("begun")
    run.close()


def test_a_stage_without_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minem.files.shutil, "disk_usage", lambda folder: (10**9, 0, 5_000_000))
    with RunDirectory.open(config(tmp_path)) as run:
        with run.stage("iter-00/small", writes=3_000_000):
            pass
        sentence = r"no room for iter-01/mstep: about 6\.0 MB are needed and 5\.0 MB are free"
        with pytest.raises(Interrupted, match=sentence), run.stage("iter-01/mstep", writes=5_000_000):
            pytest.fail("begun")
        assert list(run.results) == ["iter-00/small"]


@pytest.mark.parametrize(
    ("name", "content", "seed", "sentence"),
    [
        ("config.toml", None, 3, r"started differently \(run\.seed: 0 -> 3\)"),
        ("config.toml", "model = 3\n", 0, r"the config of \S+ is damaged; give --overwrite"),
        ("config.toml", "[model", 0, r"config\.toml is not valid TOML"),
        ("journal.jsonl", None, 0, r"journal\.jsonl is missing; put it back, or give --overwrite"),
        ("run.json", "", 0, r"run\.json is not valid JSON"),
        ("run.json", '{"inputs": [1]}', 0, r"is no run directory: its run\.json is not one of minem's"),
        ("run.json", OURS + '"inputs": [1]}', 0, r"run\.json is damaged; give --overwrite"),
        ("run.json", OURS + '"inputs": null}', 0, r"run\.json is damaged; give --overwrite"),
    ],
)
def test_files_that_define_a_run_are_not_made_up(
    tmp_path: Path, name: str, content: str | None, seed: int, sentence: str
) -> None:
    """Neither taken for a start that was cut short, with any config, nor done all over again unasked."""
    small_run(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK}
    with pytest.raises(UserError, match=sentence):
        RunDirectory.open(config(tmp_path, seed=seed))
    assert {path: path.read_bytes() for path in before} == before
    ours = name != "run.json" or (content or "").startswith(OURS)
    with nullcontext() if ours else pytest.raises(UserError, match=sentence):
        RunDirectory.open(config(tmp_path, seed=seed), overwrite=True).close()
    assert ours or {path: path.read_bytes() for path in before} == before


def test_a_run_without_its_config_is_still_known(tmp_path: Path) -> None:
    small_run(tmp_path)
    expected = everything(tmp_path)
    (tmp_path / "config.toml").unlink()
    small_run(tmp_path)
    assert everything(tmp_path) == expected
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"config": 3}))
    (tmp_path / "config.toml").unlink()
    with pytest.raises(UserError, match=r"the config of .* is damaged; give --overwrite"):
        small_run(tmp_path)


def test_another_config_and_other_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    read = {"task rows": "aa", "weights": "cc"}
    RunDirectory.open(config(tmp_path / "reads"), inputs=read).close()
    RunDirectory.open(config(tmp_path / "reads"), inputs=read).close()
    with pytest.raises(UserError, match=r"started differently \(task rows changed; samples changed\)"):
        RunDirectory.open(config(tmp_path / "reads"), inputs=read | {"task rows": "bb", "samples": "dd"})
    tmp_path = tmp_path / "run"
    small_run(tmp_path)
    with pytest.raises(UserError) as caught:
        RunDirectory.open(config(tmp_path, budget=4, limit=64))
    message = str(caught.value)
    assert "(task.limit: not set -> 64; sampler.budget: 8 -> 4): give --overwrite" in message
    assert "another --out" in message
    assert "\n" not in message
    RunDirectory.open(config(tmp_path)).close()  # and nothing was harmed
    with RunDirectory.open(config(tmp_path, budget=4), overwrite=True) as run:
        assert run.results == {}
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "config.toml", "journal.jsonl", "run.json"]
        assert run.config.sampler.budget == 4


def test_overwrite_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    small_run(tmp_path)
    (tmp_path / "my notes.txt").write_text("keep me")
    (tmp_path / "iter-final").mkdir()
    (tmp_path / "report.html").write_text("of mine")
    (tmp_path / "iter-01" / "mine").write_text("of mine")
    RunDirectory.open(config(tmp_path), overwrite=True).close()
    kept = {LOCK, "config.toml", "journal.jsonl", "run.json", "my notes.txt", "iter-final", "report.html", "iter-01"}
    assert os.listdir(tmp_path / "iter-01") == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_an_overwrite_that_is_killed_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path)
    own, removed = {path for path in tmp_path.rglob("*") if path.is_file()}, list[Path]()
    right = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        right(path, missing_ok)
        removed.append(path)
        check_place(tmp_path)  # had it been killed here, what is left would be known as a run, or nothing

    monkeypatch.setattr(Path, "unlink", unlink)
    minem.runs.directory.remove_run(tmp_path)
    assert own - set(removed) == {tmp_path / LOCK, tmp_path / "run.json"}
    assert removed[-1].name == "journal.jsonl"  # what lists the others goes after them
    assert sorted(os.listdir(tmp_path)) == [LOCK, "run.json"]


def test_the_lock_is_no_way_to_another_file(tmp_path: Path) -> None:
    """In a run directory of a stranger it may be a link."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link that leads out of its folder"):
        RunDirectory.open(config(tmp_path / "run"))
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_unknown_home_is_a_name_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory.open(config(Path("~nobody-knows/run"))).close()
    assert (tmp_path / "~nobody-knows" / "run" / "run.json").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"--out .* is not empty and no run directory \(it holds thesis\.tex\)"):
        RunDirectory.open(config(tmp_path), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file; it must be a folder"):
        RunDirectory.open(config(tmp_path / "thesis.tex"), overwrite=overwrite)
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        RunDirectory.open(config(tmp_path / "thesis.tex" / "run"), overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be used: Permission denied"):
        RunDirectory.open(config(tmp_path / "run"))


def test_two_processes_cannot_be_in_one_run(tmp_path: Path) -> None:
    script = (
        "import sys; from minem.config import load_config; from minem.runs.directory import RunDirectory\n"
        "run = RunDirectory.open(load_config(flags={'run.out': sys.argv[1]}))\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"in use by process {other.pid};"):
                RunDirectory.open(config(tmp_path), overwrite=overwrite)
    finally:
        other.kill()  # a killed process leaves no lock behind
        other.communicate()
    with RunDirectory.open(config(tmp_path)), pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
        RunDirectory.open(config(tmp_path))


def test_the_record_of_what_ran(tmp_path: Path) -> None:
    with RunDirectory.open(config(tmp_path, seed=7), command=["minem", "train"], inputs={"task rows": "aa"}):
        facts = read_facts(tmp_path)
    assert {"minem", "python", "torch", "tokenizers"} <= set(facts["versions"])
    assert (facts["command"], facts["seed"], facts["inputs"]) == (["minem", "train"], 7, {"task rows": "aa"})
    assert facts["config"]["run"]["seed"] == 7
    assert facts["commit"] is None or len(facts["commit"].removesuffix("-dirty")) == 40
    with pytest.raises(UserError, match="is not a run directory"):
        read_facts(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "toy.rsm8.toy-llama.s0"),
        ({"sampler.name": "star", "run.seed": 3}, "toy.star2.toy-llama.s3"),
        (
            {"model.id": "Qwen/Qwen2.5-0.5B-Instruct", "task.name": "/data/my tasks/physics.jsonl"},
            "physics.rsm8.Qwen2.5-0.5B-Instruct.s0",
        ),
        ({"sampler.name": "mine.lib:Best", "model.id": "../models/small/"}, "toy.Best8.small.s0"),
        ({"task.name": "../..\u202e/\x1b[31mrows"}, "-31mrows.rsm8.toy-llama.s0"),
    ],
)
def test_default_names(flags: dict[str, Any], expected: str) -> None:
    assert default_path(load_config(flags=flags)) == Path("runs") / expected
