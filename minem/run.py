"""A run on disk: a folder that says what was asked, what is done, and how it went; and that survives being killed.

    minem train                                  # makes runs/toy.rsm8.toy-llama.s0, or continues it
    cat runs/toy.rsm8.toy-llama.s0/journal.jsonl

    config.toml     the config, as `minem train RUN/config.toml --out NEW` reads it back
    run.json        versions, command line, commit, inputs, start
    journal.jsonl   one line per finished stage: the state of a run is the replay of this file
    metrics.jsonl   numbers to plot, one line at a time
    iter-00/ ...    what the stages wrote

A stage writes every file beside its place, under a name that starts with ".partial."; when it is done the files are
flushed to the disk and renamed, and only then the journal gets its line. So a file under its own name is whole, a stage
in the journal has all its files, and whatever was in flight when a run died is done again from the start of its stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import minem
from minem.errors import Interrupted, UserError, require

if TYPE_CHECKING:
    from minem.config import Config

PARTIAL = ".partial."
LOCK = ".lock"
ROW_LIMIT = 64 << 20  # bytes of one line of a JSONL file
# Everything that a run writes at the top of its folder; --overwrite removes these and nothing else.
OWN_NAMES = re.compile(r"journal\.jsonl|metrics\.jsonl|run\.json|config\.toml|accuracy\.png|report\.html|log|iter-\d+")


@dataclass(frozen=True)
class RunConfig:
    """How long, from which seed, and where."""

    iterations: int = 4
    seed: int = 0
    out: str | None = None  # the run's folder; by default runs/TASK.SAMPLER+BUDGET.MODEL.sSEED
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: Literal["previous", "base"] = "previous"  # what each M-step starts from; "base" as in STaR
    keep: Literal["last", "all"] = "last"  # model folders that stay on disk
    slots: int | None = None  # sequences generated at once; by default 96 on the CPU, 256 on a GPU

    def __post_init__(self) -> None:
        require(
            "run",
            self,
            iterations=(self.iterations >= 1, "1 or more"),
            seed=(0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            slots=(self.slots is None or 1 <= self.slots <= 65_536, "between 1 and 65536"),
        )


class Stage:
    """One step of a run in the making; `RunDirectory.stage` hands it out.

    result: what the journal keeps of the stage, plain JSON values that later stages and reports need.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.result: dict[str, Any] = {}
        self._folder = folder
        self._paths: list[tuple[Path, Path]] = []

    def path(self, name: str) -> Path:
        """Where to write the file or folder that becomes `name` in the run directory when the stage is done."""
        final = self._folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(PARTIAL + final.name)
        _remove(partial)
        self._paths.append((partial, final))
        return partial

    def _commit(self) -> None:
        for partial, _ in self._paths:
            _flush_tree(partial)
        for partial, final in self._paths:
            if final.is_dir():  # left by a run that died before its journal line: os.replace does not replace folders
                _remove(final)
            os.replace(partial, final)
        for parent in {final.parent for _, final in self._paths}:
            _flush_folders(parent, self._folder)

    def _abandon(self) -> None:
        for partial, _ in self._paths:
            _remove(partial)


class RunDirectory:
    """A run directory held open by this process alone. Use as a context manager, or call `close`.

    with RunDirectory.open(config, command=sys.argv) as run:
        if not run.finished("iter-01/estep"):
            with run.stage("iter-01/estep") as stage:
                write_rows(stage.path("iter-01/samples.jsonl"), rows)
                stage.result["accepted"] = 496
        print(run.result("iter-01/estep")["accepted"])
    """

    def __init__(self, path: Path, config: Config, lock: IO[str]) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._results: dict[str, dict[str, Any]] = {}
        self.on_metrics: Callable[[str, Mapping[str, Any]], None] | None = None  # sees what log_metrics writes
        self.on_finished: Callable[[str, dict[str, Any]], None] | None = None  # sees each stage's result

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        command: Sequence[str] = (),
        overwrite: bool = False,
        inputs: Mapping[str, str] | None = None,
    ) -> RunDirectory:
        """Make the directory `config.run.out` (by default `default_path`), or continue the run that is in it.

        command: the command line, for the record.
        overwrite: remove a run that is already there.
        inputs: fingerprints of what the run reads besides its config, like {"task rows": sha256}. A run is continued
            only with the same ones.

        Raises UserError where the directory holds something else, belongs to a running process, was started with a
        different config or other inputs, or cannot be written.
        """
        path = Path(config.run.out).expanduser() if config.run.out is not None else default_path(config)
        config = _without_out(config)
        try:
            check_place(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config, take_lock(path))
            try:
                run._start_or_continue(list(command), overwrite, dict(inputs or {}))
            except BaseException:
                run.close()
                raise
        except OSError as error:
            raise UserError(f"the run directory {path} cannot be used: {error.strerror or error}") from error
        return run

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the finished stages, oldest first."""
        return tuple(self._results)

    def finished(self, stage: str) -> bool:
        return stage in self._results

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage left in the journal. KeyError where it has not finished."""
        return self._results[stage]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Do a stage: everything it writes appears at once when the block ends well, and not at all otherwise.

        Raises Interrupted when the disk is full: nothing but this stage is lost.
        """
        if self.finished(name):
            raise ValueError(f"stage {name} is already finished")
        stage, start = Stage(name, self.path), time.monotonic()
        try:
            yield stage
            stage._commit()
            self._enter(stage, time.monotonic() - start)
        except BaseException as error:
            stage._abandon()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Interrupted(
                    f"the disk of {self.path} is full; free some space, then give the same command again: "
                    f"it goes on with {name}"
                ) from error
            raise

    def _enter(self, stage: Stage, seconds: float) -> None:
        """The journal line that makes a stage finished, after everything it stands for is on the disk."""
        if (self.path / "metrics.jsonl").exists():
            _flush_tree(self.path / "metrics.jsonl")
        line = json_line({"stage": stage.name, "result": stage.result, "seconds": round(seconds, 3), "time": _now()})
        with open(self.path / "journal.jsonl", "ab") as journal:
            journal.write(line)
            _flush(journal)
        _flush_folders(self.path, self.path)
        self._results[stage.name] = json.loads(line)["result"]  # exactly what a continued run reads
        if self.on_finished is not None:
            self.on_finished(stage.name, self._results[stage.name])

    def log_metrics(self, stage: str, **values: Any) -> None:
        """Add a line to metrics.jsonl. Lines of a stage that did not finish are dropped when the run is continued."""
        with open(self.path / "metrics.jsonl", "ab") as metrics:
            metrics.write(json_line({"stage": stage, **values}))
        if self.on_metrics is not None:
            self.on_metrics(stage, values)

    def discard(self, name: str) -> None:
        """Delete a file or folder that is no longer needed, if it is there; it is never seen half deleted.

        Call it whether or not the stage before it was done just now: the run may have died between the two.
        """
        final = self.path / name
        if final.exists():
            partial = final.with_name(PARTIAL + final.name)
            _remove(partial)
            os.replace(final, partial)
            _remove(partial)

    def _start_or_continue(self, command: list[str], overwrite: bool, inputs: dict[str, str]) -> None:
        if overwrite:
            remove_run(self.path)
        for partial in list(self.path.rglob(PARTIAL + "*")):
            _remove(partial)
        if (self.path / "config.toml").exists():
            self._refuse_another_run(inputs)
        else:
            # run.json, by which a run directory is known, comes first and config.toml last.
            facts = _facts(self.config, command, inputs)
            write_whole(self.path / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
            head = "# Written by minem. To repeat this run elsewhere: minem train config.toml --out NEW\n\n"
            write_whole(self.path / "config.toml", (head + to_toml(self.config)).encode())
        self._results = _replay(keep_whole(self.path / "journal.jsonl"), self.path)
        metrics = keep_whole(self.path / "metrics.jsonl")
        kept = [row for row in metrics if row.get("stage") in self._results]
        if len(kept) < len(metrics):
            write_whole(self.path / "metrics.jsonl", b"".join(map(json_line, kept)))

    def _refuse_another_run(self, inputs: dict[str, str]) -> None:
        changes = difference(_read_config(self.path / "config.toml"), dataclasses.asdict(self.config))
        before = read_facts(self.path).get("inputs", {})
        changes += [f"{name} changed" for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
        if changes:
            raise UserError(
                f"{self.path} holds a run that was started differently ({'; '.join(changes)}): "
                "give --overwrite to start it anew, or another --out to keep both"
            )


@contextlib.contextmanager
def hold_folder(
    path: Path,
    mark: str,
    kind: str,
    settings: Mapping[str, Mapping[str, Any]],
    clear: Callable[[Path], None] | None = None,
) -> Iterator[None]:
    """Keep a folder of results for this process alone, made now or continued with the same settings only.

    mark: the JSON file by which a folder of this `kind` is known; it holds `settings`, {section: {key: value}}.
    clear: removes what an earlier start wrote, for --overwrite.

    Raises UserError where the folder holds something else, other settings (with the difference), or cannot be written.
    """
    try:
        check_place(path, mark, kind)
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except OSError as error:
        raise UserError(f"the {kind} {path} cannot be used: {error.strerror or error}") from error
    with lock:
        if clear is not None:
            clear(path)
        if (path / mark).exists() and clear is None:
            _refuse_other_settings(path, mark, settings)
        else:
            write_whole(path / mark, (json.dumps(settings, indent=2) + "\n").encode())
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Interrupted(
                    f"the disk of {path} is full; free some space, then give the same command again"
                ) from error
            raise


def _refuse_other_settings(path: Path, mark: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    try:
        before = json.loads((path / mark).read_bytes())
        changes = difference(before, settings)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / mark} is damaged; give --overwrite to start anew") from error
    if changes:
        raise UserError(
            f"{path} was started differently ({'; '.join(changes)}): "
            "give --overwrite to start it anew, or another --out to keep both"
        )


def remove_run(path: Path) -> None:
    """Remove what a run wrote in its folder, and nothing else that may lie there."""
    # The journal goes first: without it nothing here counts as done, however far the removal gets.
    for name in sorted(os.listdir(path), key=lambda name: name != "journal.jsonl"):
        if OWN_NAMES.fullmatch(name):
            _remove(path / name)


def to_toml(config: Config) -> str:
    """The config as TOML, as `load_config` reads it back to an equal one. Keys that are None are left out."""
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def difference(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per key that differs, like "sampler.budget: 8 -> 4"; {section: {key: value}}, None for not set."""
    before, after = ({f"{s}.{key}": v for s, values in c.items() for key, v in values.items()} for c in (old, new))
    keys = {**after, **before}
    return [f"{k}: {_shown(before.get(k))} -> {_shown(after.get(k))}" for k in keys if before.get(k) != after.get(k)]


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """What `to_toml` wrote."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); give --overwrite to start anew"
        ) from error


def _shown(value: Any) -> str:
    return "not set" if value is None else _toml_value(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but that they also escape DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def folder_name(name: str) -> str:
    """The name with all that a file system may not like replaced by "-", and of bearable length."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")[:200]


def default_path(config: Config) -> Path:
    """runs/{task}.{sampler}{budget}.{model}.s{seed}, for example runs/toy.rsm8.toy-llama.s0."""
    model = "toy-llama" if config.model.id == "toy" else _last_part(config.model.id)
    task = _last_part(config.task.name).removesuffix(".jsonl").removesuffix(".parquet")
    sampler = config.sampler.name.rpartition(":")[2]
    name = f"{task}.{sampler}{config.sampler.budget}.{model}.s{config.run.seed}"
    return Path("runs") / folder_name(name)


def read_journal(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{stage: result} of a run directory that another process may be writing to; nothing is changed."""
    return _replay(_whole_lines(Path(folder) / "journal.jsonl")[0], Path(folder))


def read_facts(folder: str | Path) -> dict[str, Any]:
    """run.json. UserError where `folder` is no run directory."""
    path = Path(folder) / "run.json"
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not a run directory: its run.json cannot be read") from error
    if not isinstance(facts, dict):
        raise UserError(f"{folder} is not a run directory: its run.json is no JSON object")
    return facts


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines (UTF-8, one object a line) and say how many."""
    count = 0
    with open(path, "wb") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (the count is the result)
            file.write(json_line(row))
    return count


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, which may be anyone's. UserError names the file and the line."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(ROW_LIMIT + 1):
                number += 1
                if len(line) > ROW_LIMIT:
                    raise UserError(f"{path}, line {number}: longer than {ROW_LIMIT} bytes")
                if line.isspace():
                    continue
                row = _parse(line)
                if row is None:
                    raise UserError(f"{path}, line {number}: not a JSON object")
                yield row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _replay(lines: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    if not all(isinstance(line.get("stage"), str) and isinstance(line.get("result"), dict) for line in lines):
        raise UserError(f"{folder / 'journal.jsonl'} is damaged; give --overwrite to start the run anew")
    return {line["stage"]: line["result"] for line in lines}


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a JSONL file."""
    # ASCII only, so that hostile text (control characters, lone surrogates) is harmless to look at and always valid.
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file that we append to, and the bytes they take: a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    size = 0
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = _parse(line) if line.endswith(b"\n") else None
        if row is None and number < len(lines):
            raise UserError(f"{path}, line {number}: damaged; give --overwrite to start the run anew")
        if row is not None:
            rows.append(row)
            size += len(line)
    return rows, size


def keep_whole(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that we append to, a cut off last line removed so that the next one starts afresh."""
    rows, size = _whole_lines(path)
    if path.exists() and path.stat().st_size > size:
        with open(path, "r+b") as file:
            file.truncate(size)
            _flush(file)
    return rows


def check_place(path: Path, mark: str = "run.json", kind: str = "run directory") -> None:
    """Nothing but a folder of our own kind, which holds the file `mark`, or an empty one, is ever written to."""
    if not path.exists() or (path / mark).exists():
        return
    if not path.is_dir():
        raise UserError(f"--out {path} is a file; it must be a folder")
    strangers = sorted(name for name in os.listdir(path) if name != LOCK and not name.startswith(PARTIAL))
    if strangers:
        raise UserError(f"--out {path} is not empty and no {kind} (it holds {strangers[0]}); choose another")


def take_lock(path: Path) -> IO[str]:
    """Hold the folder for this process alone until the file is closed. UserError names the process that has it."""
    lock = open(path / LOCK, "a+")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(20).strip()
        lock.close()
        raise UserError(f"{path} is in use by process {owner or '?'}; wait for it, or choose another --out") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _facts(config: Config, command: list[str], inputs: dict[str, str]) -> dict[str, Any]:
    packages = ("torch", "triton", "safetensors", "tokenizers", "numpy")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "versions": {"minem": minem.__version__, "python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "commit": _commit(),
        "command": command,
        "seed": config.run.seed,
        "config": dataclasses.asdict(config),
        "inputs": inputs,
        "started": _now(),
    }


def _commit() -> str | None:
    """The git commit of minem's own source tree, "-dirty" where it was changed; None for an installed copy."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # an installed copy that lies inside somebody's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _without_out(config: Config) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=None))


def _last_part(name: str) -> str:
    """Of a path or a hub id."""
    return Path(name).name or Path(name).resolve().name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen whole or not at all, even where the machine stops."""
    partial = path.with_name(PARTIAL + path.name)
    with open(partial, "wb") as file:
        file.write(content)
        _flush(file)
    os.replace(partial, path)
    _flush_folders(path.parent, path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_tree(path: Path) -> None:
    """fsync a file, or a folder and everything in it."""
    for child in path.iterdir() if path.is_dir() else ():
        _flush_tree(child)
    _flush_entry(path)


def _flush_folders(folder: Path, top: Path) -> None:
    """fsync the entries of `folder` and of the folders above it, up to `top`."""
    _flush_entry(folder)
    if folder != top:
        _flush_folders(folder.parent, top)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
