"""Files of the user's beside and among minem's own: no command changes one, and none writes outside its place.

    python -m pytest tests/minem/runs/test_users_files.py

Every command that writes is given for every place, with and without --overwrite: an empty folder, one of somebody
else, an own one with files of the user's in it, and one in which a link leads out of it. All that is there is noted
before and compared afterwards: names, bytes and the targets of links.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from matplotlib.backends.backend_agg import FigureCanvasAgg

import minem.data.tasks
from minem.files import entry
from tests.minem.tiny_runs import command, cut_journal, flags

SMALL = ["task.limit=4", "run.iterations=1", "eval.max_new_tokens=1"]
RUN = flags(*SMALL, "sampler.budget=1")
COMPARED = [*flags(*SMALL, "sampler.budget=1")]
del COMPARED[COMPARED.index("sampler.budget=1") - 1 : COMPARED.index("sampler.budget=1") + 1]  # compare sets it
MEMBER = "toy.rsm1.toy-llama.s0"  # the run of the comparison
COMMANDS = {
    "train": ["train", *RUN],
    "samples": ["train", "--samples", "SAMPLES", *RUN],
    "sample": ["sample", *RUN],
    "compare": ["compare", *COMPARED, "--samplers", "rsm:1", "--seeds", "0"],
    "eval": ["eval", "--limit", "3", "--max-new-tokens", "1", "--device", "cpu"],
}
ALL_MARKS = ("run.json", "settings.json", "plan.json")
MARKS = {"compare": "plan.json", "eval": "settings.json"}  # of the others it is run.json
OVERWRITE = [[], ["--overwrite"]]

Files = dict[str, str | bytes]
MINE = '{"mine": 1}\n'
# In the folder that the command is given in. The place is called `out`.
BESIDE: Files = {
    "notes.txt": "mine",
    ".partial.mine": "mine",
    ".partial.out": "mine",
    "out.bak": "mine",
    "iter-7/notes.txt": "mine",
    "log/mine.txt": "mine",
    "config.toml.bak": "mine",
    "run.json.old": "mine",
    "answers.jsonl.bak": "mine",
    "report.html": "<p>mine</p>",
    "p/run.json": MINE,
    "q/settings.json": MINE,
    "c/plan.json": MINE,
}
# In a folder that is minem's own: near to its names, but none of them.
AMONG: Files = {
    "notes.txt": "mine",
    ".partial.mine": "mine",
    "iter-7/notes.txt": "mine",
    "iter-01/notes.txt": "mine",
    "iter-01/.partial.notes.txt": "mine",
    "iter-01 (copy)/samples.jsonl": "mine",
    "log/mine.txt": "mine",
    "config.toml.bak": "mine",
    "run.json.old": "mine",
    "journal.jsonl~": "mine",
    "answers.jsonl.bak": "mine",
    "comparison.json.bak": "mine",
    "sub/run.json": MINE,
    "sub/journal.jsonl": "mine",
    "sub/iter-01/samples.jsonl": "mine",
    "sub/report.html": "<p>mine</p>",
    "sub/.partial.x": "mine",
}
# What other commands write is the user's here.
ALIEN: dict[str, Files] = {
    "train": {"settings.json": MINE, "plan.json": MINE, "answers.jsonl": "mine", "comparison.json": MINE},
    "samples": {"settings.json": MINE, "report.html": "<p>mine</p>", "accuracy.png": "mine"},
    "sample": {"plan.json": MINE, "report.html": "<p>mine</p>", "accuracy.png": "mine", "iter-02/mine.txt": "mine"},
    "compare": {"run.json": MINE, "journal.jsonl": "mine", "config.toml": "mine", "iter-01/samples.jsonl": "mine"},
    "eval": {"run.json": MINE, "journal.jsonl": "mine", "report.html": "<p>mine</p>", "iter-01/samples.jsonl": "mine"},
}
NAMES: Files = {"journal.jsonl": "", "metrics.jsonl": "mine", "config.toml": "mine", "iter-01/mine.txt": "mine"}
NAMES |= {"log/mine.txt": "mine", "report.html": "mine", "answers.jsonl": "mine", "comparison.json": "mine"}
# Of somebody else, whatever the names: nothing is written there.
FOREIGN: dict[str, Files] = {
    "foreign": {name: text for name, text in BESIDE.items() if name != ".partial.out"},
    "foreign, all marks": {**NAMES, **dict.fromkeys(ALL_MARKS, MINE)},
    "foreign, empty marks": dict.fromkeys(ALL_MARKS, "{}"),
    "foreign, other format": dict.fromkeys(ALL_MARKS, '{"format": "maxem 1"}'),
    "foreign, format no text": dict.fromkeys(ALL_MARKS, '{"format": 1}'),
    "foreign, no JSON": dict.fromkeys(ALL_MARKS, "minem"),
    "foreign, a list": dict.fromkeys(ALL_MARKS, '["format", "minem"]'),
    "foreign, bytes": dict.fromkeys(ALL_MARKS, b"\xff\x00"),
    "foreign, a partial name": {".partial.mine": "mine"},
    "foreign, a deep one": {"a/b/run.json": MINE},
}


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def snapshot(folder: Path) -> dict[str, Any]:
    """All that lies in a folder; links are not followed."""
    found: dict[str, Any] = {}
    for at, folders, names in os.walk(folder):
        for path in (Path(at) / name for name in (*folders, *names)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = ("link", os.readlink(path))
            else:
                found[name] = path.read_bytes() if path.is_file() else "a folder"
    return found


# ---------------------------------------------------------------------------------------------- own folders, made once


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The toy is read once; what takes long and is not about files is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minem.data.tasks, "_folder", cache(minem.data.tasks._folder))
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(FigureCanvasAgg, "print_png", draw)
        patch.setattr("minem.report.page._render", lambda *given: "a page")
        patch.setattr("minem.report.charts.svg_spent", lambda runs: [])
        patch.setattr("minem.compare.experiment.gc.collect", lambda: 0)
        yield


def draw(self: FigureCanvasAgg, to: Any, **more: Any) -> None:
    if hasattr(to, "write"):
        to.write(b"a picture")
    else:
        with open(to, "wb") as file:
            file.write(b"a picture")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished folder of a command."""

    @cache
    def made(name: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        given(name, out, made)
        return out

    return made


def given(name: str, out: Path, whole: Callable[[str], Path], *more: str) -> Result:
    samples = str(whole("train") / "iter-01/samples.jsonl") if "SAMPLES" in COMMANDS[name] else ""
    words = [samples if word == "SAMPLES" else word for word in COMMANDS[name]]
    result = command(*words, "--out", out, *more)
    if not more:
        assert result.exit_code in (0, 2), result.output + repr(result.exception)
    return result


def cut(name: str, out: Path) -> None:
    """As if the command had been killed in the middle, so that there is something left to write."""
    if name == "eval":
        first, *_ = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (out / "answers.jsonl").write_bytes(first)
        return
    run = out / MEMBER if name == "compare" else out
    if name in ("train", "compare"):
        cut_journal(run, "iter-00/eval.test")
    else:
        (run / "journal.jsonl").write_bytes(b"")
    if name == "compare":
        for path in out.glob("comparison.*"):
            path.unlink()
    shutil.rmtree(run / "iter-01")
    for path in (out / "report.html", run / "report.html", run / "accuracy.png"):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ the links

# What leads out of an own folder, by command: {name: target}; the place is WORK/out, and WORK has BESIDE, too.
# With MOVED the file itself was moved there: the link leads to what the command would gladly take for its own.
MOVED = "MOVED"
ELSEWHERE = "../../elsewhere"
SECRET = "../../secret.txt"
RUN_LINKS = {
    "run.json": MOVED,
    "config.toml": MOVED,
    "journal.jsonl": MOVED,
    "metrics.jsonl": MOVED,
    ".lock": SECRET,
    ".partial": ELSEWHERE,
    "iter-01": ELSEWHERE,
}
LINKS: dict[str, dict[str, str]] = {
    "train": {**RUN_LINKS, "iter-00": MOVED, "report.html": SECRET, "accuracy.png": SECRET},
    "samples": {
        "journal.jsonl": MOVED,
        "iter-01": ELSEWHERE,
        "iter-01/model": f"../{ELSEWHERE}",
        ".partial": ELSEWHERE,
    },
    "sample": {**RUN_LINKS, "iter-01/samples.jsonl": f"../{SECRET}"},
    "compare": {
        "plan.json": MOVED,
        ".lock": SECRET,
        "comparison.json": SECRET,
        "comparison.md": SECRET,
        "comparison.png": SECRET,
        "report.html": SECRET,
        MEMBER: MOVED,
        f"{MEMBER}/iter-01": f"../{ELSEWHERE}",
        f"{MEMBER}/journal.jsonl": MOVED,
    },
    "eval": {
        "settings.json": MOVED,
        "answers.jsonl": MOVED,
        ".lock": SECRET,
    },
}
# Nothing is written to these, so a command may go on, or refuse them.
BESIDES = {f".partial.{name}": SECRET for name in (*ALL_MARKS, "journal.jsonl", "answers.jsonl", "comparison.json")}
BESIDES |= {"log": ELSEWHERE, "iter-7": ELSEWHERE, "old": "../../other"}  # the last to a run of the user's
# These hold results: through a link nothing may be written, so the command is refused.
REFUSED = {"journal.jsonl", "metrics.jsonl", "iter-01", "iter-01/model", "iter-01/samples.jsonl", "report.html"}
REFUSED |= {"accuracy.png", "answers.jsonl", "comparison.json", "comparison.md", "comparison.png", ".lock", ".partial"}
REFUSED |= {"run.json", "plan.json", "settings.json", MEMBER, f"{MEMBER}/iter-01", f"{MEMBER}/journal.jsonl"}


def lead_out(out: Path, name: str, target: str) -> None:
    link = out / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if target == MOVED:
        moved = out.parents[1] / "moved"
        moved.mkdir()
        if link.exists():
            link.rename(moved / link.name)
        else:
            (moved / link.name).write_bytes(b"")
        target = os.path.relpath(moved / link.name, link.parent)
    elif link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)
    link.symlink_to(target)


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture
def out(tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place that commands are told to write to; it does not exist yet. All around it is the user's."""
    home = tmp_path / "home"
    write(home / "work", BESIDE)
    write(home, {"secret.txt": "secret", "elsewhere/mine.txt": "mine", "elsewhere/samples.jsonl": "mine"})
    shutil.copytree(whole("sample"), home / "other")
    monkeypatch.chdir(home / "work")
    return home / "work/out"


def check(
    out: Path, start: Callable[[], Result], codes: set[int], own: Iterable[str] = (), place: Path | None = None
) -> None:
    """Give a command: all but `own` (names in `out`) stays as it was, and what is new lies in `place` (or `out`)."""
    home = out.parents[1]
    mine = {os.path.relpath(out / name, home) for name in own}
    before = snapshot(home)
    result = start()
    after = snapshot(home)
    within = str((place or out).relative_to(home))
    changed = {name for name in before if name not in mine and after.get(name) != before[name]}
    strays = {name for name in after if name not in before and not f"{name}/".startswith(f"{within}/")}
    what = f"{sorted(changed)} changed, {sorted(strays)} new outside; exit code {result.exit_code}: {result.stderr}"
    assert not changed, what
    assert not strays, what
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in codes, what
    if result.exit_code == 2:
        assert result.stderr.splitlines()[-1].startswith("minem: ")
        assert "Traceback" not in result.stderr
        if not own:
            assert after == before, "a place that was refused"


EVERY = list(product(COMMANDS, OVERWRITE))
IDS = [f"{name} {' '.join(more)}".strip() for name, more in EVERY]


@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_a_place_that_is_empty_gets_all_that_is_written(name, more, out, whole):
    if more:
        out.mkdir()
    check(out, lambda: given(name, out, whole, *more), {0})


@pytest.mark.parametrize("place", FOREIGN)
@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_a_folder_of_somebody_else_is_refused(name, more, place, out, whole):
    write(out, FOREIGN[place])
    check(out, lambda: given(name, out, whole, *more), {2})


@pytest.mark.parametrize(
    ("place", "target"),
    [
        *[(path, SECRET) for path in ("answers.jsonl", ".partial.x", "run.json", "report.html")],
        *[(path, ELSEWHERE) for path in ("iter-01", "log", ".partial")],
    ],
)
@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_a_folder_with_nothing_but_a_link_is_refused(name, more, place, target, out, whole):
    lead_out(out, place, target)
    check(out, lambda: given(name, out, whole, *more), {2})


@pytest.mark.parametrize("kind", ["a file", "a link to a file", "a link to nothing", "a link to a folder"])
@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_a_place_that_is_no_folder_of_ours_is_refused(name, more, kind, out, whole):
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a link to nothing":
        out.symlink_to("../nowhere/at/all")
    else:
        out.symlink_to("../secret.txt" if "file" in kind else "../elsewhere")
    check(out, lambda: given(name, out, whole, *more), {2})


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_in_a_folder_of_its_own_a_command_changes_only_what_it_wrote(name, more, state, out, whole):
    shutil.copytree(whole(name), out)
    if state == "unfinished":
        cut(name, out)
    own = set(snapshot(out))
    write(out, AMONG)
    write(out, ALIEN[name])
    if name == "compare":
        write(out / MEMBER, AMONG)
        shutil.copytree(whole("eval"), out / "sub/answers")
    check(out, lambda: given(name, out, whole, *more), {0}, own)


@pytest.mark.parametrize("mark", ALL_MARKS)
@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_a_folder_of_another_command_is_refused(name, more, mark, out, whole):
    if mark == MARKS.get(name, "run.json"):
        pytest.skip("its own")
    shutil.copytree(whole({"run.json": "train", "settings.json": "eval", "plan.json": "compare"}[mark]), out)
    check(out, lambda: given(name, out, whole, *more), {2})


@pytest.mark.parametrize(
    ("name", "link", "more"),
    [(name, link, more) for name in COMMANDS for link, more in product(LINKS[name], OVERWRITE)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_no_link_is_followed_out_of_a_folder(name, link, more, out, whole):
    shutil.copytree(whole(name), out)
    cut(name, out)
    own = set(snapshot(out))
    lead_out(out, link, LINKS[name][link])
    # A folder that was moved away took its files along; the link is the user's.
    own = {path for path in own if path != link and not path.startswith(f"{link}/")}
    check(out, lambda: given(name, out, whole, *more), {2} if link in REFUSED else {0, 2}, own)


@pytest.mark.parametrize(("name", "more"), EVERY, ids=IDS)
def test_links_beside_its_files_are_left_alone(name, more, out, whole):
    shutil.copytree(whole(name), out)
    cut(name, out)
    own = set(snapshot(out))
    for link, target in BESIDES.items():
        lead_out(out, link, target)
    check(out, lambda: given(name, out, whole, *more), {0, 2}, own)


@pytest.mark.parametrize("path", ["../notes.txt", "/secret.txt", "iter-01/../../notes.txt", "link/mine.txt"])
@pytest.mark.parametrize("name", ["train", "samples", "sample"])
def test_a_journal_that_lists_files_of_others_harms_none(name, path, out, whole):
    """As one that was damaged, or made by somebody else: it says what --overwrite may remove."""
    shutil.copytree(whole(name), out)
    own = set(snapshot(out))
    (out / "link").symlink_to("../../elsewhere")
    path = str(out.parents[1]) + path if path.startswith("/") else path
    first, *rest = (out / "journal.jsonl").read_text().splitlines()
    line = json.loads(first)
    line["files"][path] = entry(Path(path) if os.path.isabs(path) else out / path)
    (out / "journal.jsonl").write_text("\n".join([json.dumps(line), *rest, ""]))
    check(out, lambda: given(name, out, whole, "--overwrite"), {0, 2}, own)


@pytest.mark.parametrize("place", ["empty", "foreign", "foreign, all marks", "foreign, empty marks", "own"])
@pytest.mark.parametrize("more", OVERWRITE, ids=" ".join)
def test_a_dry_run_writes_nothing(place, more, out, whole):
    if place == "own":
        shutil.copytree(whole("train"), out)
    elif place != "empty":
        write(out, FOREIGN[place])
    before = snapshot(out.parents[1])
    check(out, lambda: given("train", out, whole, "--dry-run", *more), {0, 2})
    assert snapshot(out.parents[1]) == before


# ----------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("run", ["whole", "p", "foreign", "no", "../elsewhere"])
@pytest.mark.parametrize(
    ("page", "target"),
    [
        ("new.html", None),
        ("iter-7", None),
        ("no/new.html", None),
        ("out/new.html", None),
        ("linked.html", "../secret.txt"),
        ("linked.html", "../new.txt"),
        ("linked", "../elsewhere"),
        (".partial.new.html", "../secret.txt"),
    ],
)
def test_a_report_is_one_file(run, page, target, out, whole):
    """A link in the place of the page may be refused or replaced; what it leads to is not touched."""
    write(out, {"notes.txt": "mine"})
    write(out.parent, {f".partial.{name}": "mine" for name in ("linked.html", "iter-7", "report.html")})
    write(out, {".partial.new.html": "mine"})
    place = out.parent / page
    if target:
        place.symlink_to(target)
    named = out.parent / "new.html" if page == ".partial.new.html" else place
    given_run = whole("train") if run == "whole" else out.parent / run
    own = {os.path.relpath(named, out)} if target and page != "linked" else set()
    codes = {0, 2} if run == "whole" and page not in ("iter-7", "no/new.html", "linked") else {2}
    home = out.parents[1]
    before = snapshot(home)
    check(out, lambda: command("report", given_run, "-o", named), codes, own, named)
    if run != "whole":
        assert snapshot(home) == before
