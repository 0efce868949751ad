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

The journal's line also has the size and the SHA-256 of each file, so that a run that is continued notices what was cut
short, changed or deleted since, and `undo` takes it back to before that stage. The line's own SHA-256 ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

from minem.files import PARTIAL, flush_folders, flush_tree, is_as_written, is_full, manifest, remove, shortage, write_atomic
from minem.errors import Interrupted, UserError
from minem.files import complete_rows, damaged, json_line
from minem.runs.record import now, run_facts
from minem.config import difference, to_toml
from minem.files import own_file, read_json, read_toml

if TYPE_CHECKING:
    from minem.config import Config

LOCK = ".lock"
JOURNAL_LIMIT = 256 << 20  # bytes
# May differ when a run goes on: they decide about memory and time, and about results no more than rounding does.
MEMORY_ALONE = ("mstep.pack_tokens", "mstep.checkpointing", "mstep.parallel", "run.slots", "run.checkpoint_minutes")
# Everything that a run writes at the top of its folder; --overwrite removes these and nothing else.
OWN_NAMES = re.compile(r"journal\.jsonl|metrics\.jsonl|run\.json|config\.toml|accuracy\.png|report\.html|log|iter-\d+")




class Stage:
    """One step of a run in the making; `RunDirectory.stage` hands it out.

    result: what the journal keeps of the stage, plain JSON values that later stages and reports need.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.result: dict[str, Any] = {}
        self.files: dict[str, dict[str, Any]] = {}  # {name: {"bytes": ..., "sha256": ...}} once it is done
        self._folder = folder
        self._paths: list[tuple[Path, Path]] = []

    def path(self, name: str) -> Path:
        """Where to write the file or folder that becomes `name` in the run directory when the stage is done."""
        final = self._folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(PARTIAL + final.name)
        remove(partial)
        self._paths.append((partial, final))
        return partial

    def _commit(self) -> None:
        for partial, final in self._paths:
            flush_tree(partial)
            self.files |= manifest(partial, final.relative_to(self._folder).as_posix())
        for partial, final in self._paths:
            if final.is_dir():  # left by a run that died before its journal line: os.replace does not replace folders
                remove(final)
            os.replace(partial, final)
        for parent in {final.parent for _, final in self._paths}:
            flush_folders(parent, self._folder)

    def _abandon(self) -> None:
        for partial, _ in self._paths:
            remove(partial)


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
        self._lines: dict[str, dict[str, Any]] = {}  # of the journal, by stage
        self._damaged: dict[str, list[str]] = {}  # what was found out about stages
        self.changes: list[str] = []  # of MEMORY_ALONE, since the run was started
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
        origins: Mapping[str, str] | None = None,
    ) -> RunDirectory:
        """Make the directory `config.run.out` (by default `default_path`), or continue the run that is in it.

        command: the command line, for the record.
        overwrite: remove a run that is already there.
        inputs: fingerprints of what the run reads besides its config, like {"task rows": sha256}. A run is continued
            only with the same ones.
        origins: where values of the config were written (`minem.config.origins`), for the record.

        Raises UserError where the directory holds something else, belongs to a running process, was started with a
        different config (MEMORY_ALONE apart) or other inputs, or cannot be written; Interrupted where the disk is full.
        """
        path = Path(os.path.expanduser(config.run.out)) if config.run.out is not None else default_path(config)
        config = _without_out(config)
        try:
            check_place(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config, take_lock(path))
            try:
                run._start_or_continue(list(command), overwrite, dict(inputs or {}), dict(origins or {}))
            except BaseException:
                run.close()
                raise
        except OSError as error:
            if is_full(error):
                raise full_disk(path) from error
            raise UserError(f"the run directory {path} cannot be used: {error.strerror or error}") from error
        return run

    @classmethod
    def seen(cls, path: Path, config: Config) -> RunDirectory:
        """The run in a directory that another process may hold, to look at and not to change."""
        run = cls(path, config, io.StringIO())
        run._lines = _read_lines(path)
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
        return tuple(self._lines)

    def finished(self, stage: str) -> bool:
        return stage in self._lines

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage left in the journal. KeyError where it has not finished."""
        result: dict[str, Any] = self._lines[stage]["result"]
        return result

    def damaged(self, stage: str) -> list[str]:
        """The files of a finished stage that are missing or not what it wrote. Looked at once: large files take time.

        Stages in a journal of before there were manifests have none.
        """
        if stage not in self._damaged:
            files = self._lines[stage]["files"].items()
            self._damaged[stage] = [name for name, written in files if not is_as_written(self.path / name, written)]
        return self._damaged[stage]

    def undo(self, stage: str) -> list[str]:
        """Take back a finished stage and all that came after it; they will be done again. Returns their names.

        What they wrote lies there until it is replaced, as after a run that died before its journal line.
        """
        undone = self.stages[self.stages.index(stage) :]
        kept = {name: line for name, line in self._lines.items() if name not in undone}
        try:
            write_atomic(self.path / "journal.jsonl", b"".join(map(json_line, kept.values())))
            self._lines, self._damaged = kept, {}
            self._drop_metrics()
        except OSError as error:
            self._explain(error)
            raise
        return list(undone)

    @contextlib.contextmanager
    def stage(self, name: str, writes: int = 0) -> Iterator[Stage]:
        """Do a stage: everything it writes appears at once when the block ends well, and not at all otherwise.

        writes: bytes, about, that the disk must have room for before it is begun.

        Raises Interrupted when the disk is full or broken, or too full to begin: nothing but this stage is lost.
        """
        if self.finished(name):
            raise ValueError(f"stage {name} is already finished")
        try:
            short = shortage(self.path, writes)
        except OSError as error:
            self._explain(error)
            raise
        if short:
            raise Interrupted(
                f"the disk of {self.path} has no room for {name}: {short}; free some space, then give the same "
                "command again"
            )
        stage, start = Stage(name, self.path), time.monotonic()
        try:
            yield stage
            stage._commit()
            self._enter(stage, time.monotonic() - start)
        except BaseException as error:
            with contextlib.suppress(OSError):  # of a folder that went away or became read-only: say that instead
                stage._abandon()
            self._explain(error, f": it goes on with {name}")
            raise

    def _explain(self, error: BaseException, more: str = "") -> None:
        """Raise Interrupted where nothing is wrong but the disk: full, broken, read-only now, the folder moved away."""
        if is_full(error):
            raise full_disk(self.path, more) from error
        if not isinstance(error, OSError):
            return
        own = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(self.path)
        refused = own and error.errno in (errno.EACCES, errno.EPERM)
        if refused or error.errno in (errno.EIO, errno.EROFS, errno.ESTALE) or not self.path.is_dir():
            raise Interrupted(
                f"{self.path} cannot be read or written any more ({error.strerror}); put that right, then give the "
                f"same command again{more}"
            ) from error

    def _enter(self, stage: Stage, seconds: float) -> None:
        """The journal line that makes a stage finished, after everything it stands for is on the disk."""
        if (self.path / "metrics.jsonl").exists():
            flush_tree(self.path / "metrics.jsonl")
        more = {"files": stage.files, "seconds": round(seconds, 3), "time": now()}
        row = {"stage": stage.name, "result": stage.result, **more}
        line = json_line({**row, "sha256": _digest(row)})
        with open(self.path / "journal.jsonl", "ab") as journal:
            journal.write(line)
        flush_tree(self.path / "journal.jsonl")
        flush_folders(self.path, self.path)
        self._lines[stage.name] = json.loads(line)  # exactly what a continued run reads
        if self.on_finished is not None:
            self.on_finished(stage.name, self.result(stage.name))

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
            remove(partial)
            os.replace(final, partial)
            remove(partial)

    def _start_or_continue(
        self, command: list[str], overwrite: bool, inputs: dict[str, str], origins: dict[str, str]
    ) -> None:
        if overwrite:
            remove_run(self.path)
        for name in ("run.json", "config.toml", "journal.jsonl", "metrics.jsonl"):  # read, cut and added to in place
            own_file(self.path, name)
        for partial in list(self.path.rglob(PARTIAL + "*")):
            remove(partial)
        journal = self.path / "journal.jsonl"
        if (before := self._config_before()) is not None:
            self._refuse_another_run(before, inputs)
            if not journal.exists():  # what it did is not known, so it would all be done again, over what is there
                raise UserError(f"{journal} is missing; put it back, or give --overwrite to start the run anew")
        else:
            # run.json, by which a run directory is known, comes first and config.toml last.
            facts = run_facts(self.config, command, inputs, origins)
            write_atomic(self.path / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
            write_atomic(journal, b"")
        if not (self.path / "config.toml").exists():
            head = "# Written by minem. To repeat this run elsewhere: minem train config.toml --out NEW\n\n"
            write_atomic(self.path / "config.toml", (head + to_toml(self.config, origins)).encode())
        self._lines = _replay(complete_rows(journal, repair=True), self.path)
        self._drop_metrics()

    def _drop_metrics(self) -> None:
        """Keep the lines of metrics.jsonl that finished stages wrote."""
        metrics = complete_rows(self.path / "metrics.jsonl", repair=True)
        kept = [row for row in metrics if row.get("stage") in self._lines]
        if len(kept) < len(metrics):
            write_atomic(self.path / "metrics.jsonl", b"".join(map(json_line, kept)))

    def _config_before(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The config that the run was started with; None where it was not."""
        config, journal = self.path / "config.toml", self.path / "journal.jsonl"
        if config.exists():
            return _read_config(config)
        if not journal.exists() or not journal.stat().st_size:
            return None
        found = read_facts(self.path).get("config")  # config.toml was removed since
        if not (isinstance(found, dict) and all(isinstance(values, dict) for values in found.values())):
            raise UserError(f"{self.path / 'run.json'} has no config; give --overwrite to start the run anew")
        return found

    def _refuse_another_run(self, before: Mapping[str, Mapping[str, Any]], inputs: dict[str, str]) -> None:
        changes = difference(before, self.config.model_dump())
        self.changes = [change for change in changes if change.startswith(MEMORY_ALONE)]
        changes = [change for change in changes if change not in self.changes]
        try:
            read = read_facts(self.path).get("inputs", {})
        except UserError as error:
            raise UserError(f"{error}; give --overwrite to start anew") from error
        if not isinstance(read, dict):
            raise UserError(f"{self.path / 'run.json'} is damaged; give --overwrite to start anew")
        changes += [f"{name} changed" for name in {**read, **inputs} if read.get(name) != inputs.get(name)]
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
        if is_full(error):
            raise full_disk(path) from error
        raise UserError(f"the {kind} {path} cannot be used: {error.strerror or error}") from error
    with lock:
        if clear is not None:
            clear(path)
        if (path / mark).exists() and clear is None:
            _refuse_other_settings(path, mark, settings)
        else:
            write_atomic(path / mark, (json.dumps(settings, indent=2) + "\n").encode())
        try:
            yield
        except OSError as error:
            if is_full(error):
                raise full_disk(path) from error
            raise


def full_disk(path: Path, more: str = "") -> Interrupted:
    """What to raise where nothing more can be written to a folder."""
    return Interrupted(f"the disk of {path} is full; free some space, then give the same command again{more}")


def _refuse_other_settings(path: Path, mark: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    try:
        changes = difference(read_json(path / mark), settings)
    except (UserError, AttributeError) as error:
        raise UserError(f"{path / mark} is damaged; give --overwrite to start anew") from error
    if changes:
        raise UserError(
            f"{path} was started differently ({'; '.join(changes)}): "
            "give --overwrite to start it anew, or another --out to keep both"
        )


def remove_run(path: Path) -> None:
    """Remove what a run wrote in its folder, and nothing else that may lie there."""
    # The journal goes first: without it nothing here counts as done, however far the removal gets. run.json goes last:
    # without it the rest would be a stranger's folder, which nothing is ever written to.
    for name in sorted(os.listdir(path), key=lambda name: (name == "run.json") - (name == "journal.jsonl")):
        if OWN_NAMES.fullmatch(name):
            remove(path / name)


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """What `to_toml` wrote."""
    try:
        content = read_toml(path)
    except UserError as error:
        raise UserError(f"{error}; delete it to have it written anew, or give --overwrite to start anew") from error
    if not all(isinstance(values, dict) for values in content.values()):
        raise UserError(f"{path} is damaged; delete it to have it written anew, or give --overwrite to start anew")
    return content


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
    return {stage: line["result"] for stage, line in _read_lines(Path(folder)).items()}


def _read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    path = own_file(folder, "journal.jsonl")
    if path.exists() and path.stat().st_size > JOURNAL_LIMIT:
        raise UserError(f"{path} has more than {JOURNAL_LIMIT} bytes; that is the limit")
    return _replay(complete_rows(path), folder)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """run.json. UserError where `folder` is no run directory."""
    try:
        return read_json(own_file(Path(folder), "run.json"))
    except UserError as error:
        raise UserError(f"{folder} is not a run directory: {error}") from error


def _replay(lines: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The journal's lines by stage; each has the SHA-256 of what else is in it, those of older journals apart."""
    wanted = {"stage": str, "result": dict, "files": dict}
    journal = {}
    for number, line in enumerate(lines, start=1):
        whole = {**line, "files": line.get("files", {})}  # older journals have none
        digest = line.get("sha256")
        if not all(isinstance(whole.get(key), kind) for key, kind in wanted.items()) or (
            digest is not None and digest != _digest(line)
        ):
            raise damaged(folder / "journal.jsonl", number)
        journal[line["stage"]] = whole
    return journal


def _digest(line: Mapping[str, Any]) -> str:
    """Of a line of the journal, but for the place where it stands itself."""
    return hashlib.sha256(json_line({key: value for key, value in line.items() if key != "sha256"})).hexdigest()


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
    # Held as long as the run. No link is followed: in a folder of a stranger it could lead to any file of the user's.
    lock = os.fdopen(os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
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


def _without_out(config: Config) -> Config:
    return config.changed({"run.out": None})


def _last_part(name: str) -> str:
    """Of a path or a hub id."""
    return Path(name).name or Path(name).resolve().name
