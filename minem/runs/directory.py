"""A run on disk: a folder that records what was asked, what is done and how it went, and that survives being killed.

    minem train                                  # makes runs/toy.rsm8.toy-llama.s0, or continues it
    cat runs/toy.rsm8.toy-llama.s0/journal.jsonl

The state of a run is the replay of its journal. A stage writes every file in the folder .partial; at its end the files
are flushed and moved to their places, and then the journal gets its line, with size and SHA-256 of each file. So a
finished stage has all its files, and a stage in flight when a run dies is done again. Only files that the journal lists
are ever deleted.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from minem import files
from minem.config import Config, difference, to_toml
from minem.errors import Interrupted, UserError
from minem.runs.folder import check_held, check_kind, claim, default_path, disk_errors, refuse, usable
from minem.runs.record import now, run_facts

STAGE = re.compile(r"plot|report|iter-\d{2,5}/((estep|mstep)(\.\d+)?|(?!estep|mstep)\w+(\.\w+)?)")
# May differ when a run resumes: they change memory and time, and results by rounding only.
MEMORY_ALONE = ("mstep.pack_tokens", "mstep.checkpointing", "mstep.parallel", "run.slots", "run.checkpoint_minutes")
STOPPED = "log/stopped.json"  # the stage in which a guard ended the run, and why


class Record:
    """A stage in the making: the files it writes and the result that the journal keeps (plain JSON values)."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        """check: raises an error if the folder is not ours any more."""
        self.result: dict[str, Any] = {}
        self._folder, self._check = folder, check
        self._paths: list[tuple[Path, Path]] = []  # of each file, while it is written and when the stage is done

    def path(self, name: str) -> Path:
        """Where to write the file or folder that becomes `name` in the run directory when the stage is done."""
        self._check()
        partial, final = self._folder / files.PARTIAL / name, self._folder / name
        check_kind(final)  # now: the stage may take hours
        partial.parent.mkdir(parents=True, exist_ok=True)
        files.remove(partial)
        self._paths.append((partial, final))
        return partial

    def commit(self) -> dict[str, dict[str, Any]]:
        """Flush and rename all files; returns their manifest, {name: {"bytes": ..., "sha256": ...}}."""
        self._check()
        written: dict[str, dict[str, Any]] = {}
        for partial, final in self._paths:
            files.flush_tree(partial)
            written |= files.manifest(partial, final.relative_to(self._folder).as_posix())
        self._check()
        for partial, final in self._paths:
            # A folder may be there, left by a run that died before its journal line, with files of the user's in it.
            for place in {final, final.parent} - {self._folder}:
                files.no_link(place)
            inside = [path for path in partial.rglob("*") if path.is_file()] if final.is_dir() else []
            for source in inside or [partial]:
                target = final / source.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
        for folder in {one for _, final in self._paths for one in final.parents if one.is_relative_to(self._folder)}:
            files.flush(folder)
        self.clear()
        return written

    def clear(self) -> None:
        """Remove what is unfinished."""
        self._check()
        for partial, _ in self._paths:
            files.remove(partial)
            files.remove_empty(partial.parent, self._folder)


class RunDirectory(contextlib.AbstractContextManager["RunDirectory"]):
    """A run directory held open by this process alone."""

    def __init__(self, path: Path, config: Config, lock: IO[str] | None = None) -> None:
        self.path = path
        self.config = config
        self.changes: list[str] = []  # of MEMORY_ALONE, since the run was started
        self.on_metrics: Callable[[str, Mapping[str, Any]], None] | None = None  # called with each line of metrics
        self._lock = lock
        self._lines: dict[str, dict[str, Any]] = {}  # of the journal, by stage
        self._begun = False  # a stage, by this process
        self._logged: dict[str, bytes] = {}  # lines of metrics of stages that are not finished

    @classmethod
    def open(
        cls,
        config: Config,
        command: Sequence[str] = (),
        overwrite: bool = False,
        inputs: Mapping[str, str] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> Self:
        """Make the directory `config.run.out` (by default `default_path`), or resume the run that is in it.

        command, origins (`minem.config.origins`): for the record. overwrite: remove a run that is already there.
        inputs: fingerprints of what the run reads besides its config, like {"task rows": sha256}. UserError if the
        directory holds something else, is in use, was started with a different config (MEMORY_ALONE apart) or other
        inputs, or cannot be written; Interrupted if the disk is full.
        """
        path = Path(os.path.expanduser(config.run.out)) if config.run.out is not None else default_path(config)
        run = cls(path, config.changed({"run.out": None}), claim(path))
        with contextlib.ExitStack() as stack, usable(path):
            stack.callback(run.close)
            run._start_or_resume(list(command), overwrite, dict(inputs or {}), dict(origins or {}))
            stack.pop_all()
        return run

    @classmethod
    def seen(cls, path: Path, config: Config) -> Self:
        """The run in a directory that another process may hold, to read only."""
        run = cls(path, config)
        run._lines = _read_lines(path)
        return run

    def close(self, *error: object) -> None:
        """Let other processes use the directory."""
        if self._lock is not None:
            self._lock.close()

    __exit__ = close

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """{stage: what it left in the journal} of the finished stages, oldest first."""
        return {stage: line["result"] for stage, line in self._lines.items()}

    def damaged(self, stage: str) -> list[str]:
        """The files of a finished stage that are missing or not what it wrote."""
        entries = self._lines[stage]["files"].items()
        return [name for name, written in entries if not files.is_as_written(self.path / name, written)]

    def undo(self, stage: str) -> list[str]:
        """Take back a finished stage and all after it; returns their names. Their files stay until replaced."""
        stages = list(self._lines)
        undone = stages[stages.index(stage) :]
        self._keep({name: line for name, line in self._lines.items() if name not in undone})
        return undone

    def _keep(self, lines: dict[str, dict[str, Any]]) -> None:
        """Make these the lines of the journal."""
        with disk_errors(self.path):
            self._check()
            files.write_atomic(self.path / "journal.jsonl", b"".join(map(files.json_line, lines.values())))
            self._lines = lines
            self._drop_metrics()

    @contextlib.contextmanager
    def stage(self, name: str, writes: int = 0) -> Iterator[Record]:
        """Do a stage: all that it writes appears at once when the block ends well, and nothing otherwise.

        writes: bytes, about, that the disk must have room for. Raises Interrupted if it is full or broken.
        """
        with disk_errors(self.path, f": it continues with {name}"):
            if short := files.shortage(self.path, writes):
                more = f"{short}; free some space, then give the same command again"
                raise Interrupted(f"the disk of {self.path} has no room for {name}: {more}")
            if not self._begun:  # not earlier: a run that is refused loses nothing
                self._drop_metrics()
                self._begun = True
            self._logged.pop(name, None)  # if it has failed before
            record, start = Record(self.path, self._check), time.monotonic()
            try:
                yield record
                written = record.commit()
            except BaseException:
                with contextlib.suppress(OSError, Interrupted):  # of a folder that is gone or read-only: report that
                    record.clear()
                raise
            self._enter({"stage": name, "result": record.result, "files": written}, time.monotonic() - start)

    def _enter(self, line: dict[str, Any], seconds: float) -> None:
        """The journal line that makes a stage finished, after all that it stands for is on the disk."""
        if (self.path / "metrics.jsonl").exists():
            files.flush(self.path / "metrics.jsonl")
        lines = self._logged.pop(line["stage"], b"")
        about = {"metrics": hashlib.sha256(lines).hexdigest()} if lines else {}
        content = files.json_line({**line, **about, "seconds": round(seconds, 3), "time": now()})
        with files.append_to(self.path / "journal.jsonl") as journal:
            journal.write(content)
        files.flush(self.path / "journal.jsonl")
        files.flush(self.path)
        self._lines[line["stage"]] = json.loads(content)  # exactly what a resumed run reads

    @property
    def seconds(self) -> dict[str, float]:
        """What each finished stage took."""
        return {name: line["seconds"] for name, line in self._lines.items()}

    def log_metrics(self, stage: str, values: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl. Lines of a stage that did not finish are dropped before the next stage."""
        self._check()
        content = files.json_line({"stage": stage, **values})
        self._logged[stage] = self._logged.get(stage, b"") + content
        with files.append_to(self.path / "metrics.jsonl") as metrics:
            metrics.write(content)
        if self.on_metrics is not None:
            self.on_metrics(stage, values)

    def discard(self, name: str) -> None:
        """Delete a file or folder of a finished stage that is no longer needed, as far as the stage wrote it."""
        self._check()
        remove_listed(self.path, self._lines.values(), name)

    def note_stop(self, stage: str, reason: str) -> None:
        """Keep why a guard ended the run, for its report, until it is resumed."""
        content = json.dumps({"stage": stage, "reason": reason}) + "\n"
        self._check()
        files.no_link(self.path / "log").mkdir(exist_ok=True)
        files.write_atomic(self.path / STOPPED, content.encode())

    def _check(self) -> None:
        check_held(self.path, self._lock)

    def _start_or_resume(
        self, command: list[str], overwrite: bool, inputs: dict[str, str], origins: dict[str, str]
    ) -> None:
        if overwrite:
            remove_run(self.path)
        journal, more = self.path / "journal.jsonl", list[str]()
        if (before := self._config_before()) is not None:
            changes = difference(before, self.config.model_dump())
            self.changes = [change for change in changes if change.startswith(MEMORY_ALONE)]
            read = read_facts(self.path).get("inputs", {})
            changes += [f"{name} changed" for name in {**read, **inputs} if read.get(name) != inputs.get(name)]
            count = before.get("run", {}).get("iterations")
            if isinstance(count, int) and count < self.config.run.iterations:
                more = [change for change in changes if change.startswith("run.iterations:")]
            refuse(self.path, [change for change in changes if change not in self.changes + more])
            if not journal.exists():  # without it all would be done again, over what is there
                raise UserError(f"{journal} is missing; put it back, or give --overwrite to start from scratch")
        else:
            # run.json, by which a run directory is known, comes first and config.toml last.
            facts = run_facts(self.config, command, inputs, origins)
            files.write_atomic(self.path / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
            files.write_atomic(journal, b"")
        self._lines = _replay(files.complete_rows(journal, repair=True), self.path)
        check_metrics(self.path, self._lines)
        if more:  # iterations: the picture and the report come after them
            self._keep({name: line for name, line in self._lines.items() if name not in ("plot", "report")})
            facts = read_facts(self.path) | {"config": self.config.model_dump()}
            files.write_atomic(self.path / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
        files.own_file(self.path, STOPPED).unlink(missing_ok=True)
        if more or not (self.path / "config.toml").exists():
            head = "# Written by minem. To repeat this run elsewhere: minem train config.toml --out NEW\n"
            paths = (self.config.model.id, self.config.task.name, self.config.task.prompt or "")
            if any(os.path.exists(path) and not os.path.isabs(path) for path in paths):
                head += f"# Relative paths are relative to {json.dumps(os.getcwd(), ensure_ascii=False)}.\n"
            files.write_atomic(self.path / "config.toml", (f"{head}\n" + to_toml(self.config, origins)).encode())

    def _drop_metrics(self) -> None:
        """Keep the lines of metrics.jsonl that finished stages wrote."""
        metrics = files.complete_rows(self.path / "metrics.jsonl", repair=True)
        kept = [row for row in metrics if row.get("stage") in self._lines]
        if len(kept) < len(metrics):
            files.write_atomic(self.path / "metrics.jsonl", b"".join(map(files.json_line, kept)))

    def _config_before(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The config that the run was started with; None for a new run."""
        config, journal = self.path / "config.toml", self.path / "journal.jsonl"
        if config.exists():
            found: Any = files.read_toml(config)
        elif journal.exists() and journal.stat().st_size:  # config.toml was removed since
            found = read_facts(self.path).get("config")
        else:
            return None
        if not (isinstance(found, dict) and all(isinstance(values, dict) for values in found.values())):
            raise UserError(f"the config of {self.path} is damaged; give --overwrite to start from scratch")
        return found


def remove_run(path: Path) -> None:
    """Remove what the run in this folder wrote but run.json, by which the folder is known, until the next run's."""
    journal = path / "journal.jsonl"
    rows = (row for _, row in files.read_lines(journal)) if journal.is_file() else ()
    remove_listed(path, (row for row in rows if isinstance(row, dict)))
    for name in (STOPPED, "config.toml", "metrics.jsonl", "journal.jsonl"):  # the journal after what it lists
        files.own_file(path, name).unlink(missing_ok=True)


def remove_listed(home: Path, lines: Iterable[Mapping[str, Any]], one: str | None = None) -> None:
    """Remove the files that these lines of a journal list, or `one` of them or a folder, and what is empty then."""
    listed = [name for line in lines if isinstance(line.get("files"), dict) for name in line["files"]]
    for name in listed:
        final = home / name
        chosen = one is None or name == one or name.startswith(f"{one}/")
        # A stranger's journal may list anything.
        plain = chosen and final.is_file() and not final.is_symlink()
        if plain and final.parent.resolve().is_relative_to(home.resolve()):
            final.unlink()
            files.remove_empty(final.parent, home)


def read_journal(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{stage: result} of a run directory that another process may be writing to; nothing is changed."""
    return {stage: line["result"] for stage, line in _read_lines(Path(folder)).items()}


def read_facts(folder: str | Path) -> dict[str, Any]:
    """run.json. UserError if `folder` is no run directory."""
    try:
        facts = files.read_json(files.own_file(Path(folder), "run.json"))
    except UserError as error:
        raise UserError(f"{folder} is not a run directory: {error}") from error
    if not isinstance(facts.get("inputs", {}), dict):
        raise UserError(f"{folder}/run.json is damaged; give --overwrite to start from scratch")
    return facts


def check_metrics(folder: Path, journal: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError if lines of metrics.jsonl are not those that the stages in the journal wrote."""
    path, found = files.own_file(folder, "metrics.jsonl"), dict[str, Any]()
    for row in files.complete_rows(path):
        found.setdefault(str(row.get("stage")), hashlib.sha256()).update(files.json_line(row))
    for stage, line in journal.items():
        if "metrics" in line and (stage not in found or found[stage].hexdigest() != line["metrics"]):
            advice = "put the file back, or give --overwrite to start from scratch"
            raise UserError(f"{path}: the lines of {stage} are missing or not what the run wrote; {advice}")


def _read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    lines = _replay(files.complete_rows(files.own_file(folder, "journal.jsonl")), folder)
    check_metrics(folder, lines)
    return lines


def _replay(lines: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The journal's lines by stage. UserError if one is damaged, or stands before a stage that it needs."""
    path, journal = folder / "journal.jsonl", dict[str, dict[str, Any]]()
    for number, line in enumerate(lines, start=1):
        wanted = {"stage": str, "result": dict, "files": dict}
        whole = all(isinstance(line.get(key), kind) for key, kind in wanted.items())
        if not whole or line["stage"] in journal or not STAGE.fullmatch(line["stage"]):
            raise files.damaged(path, number)
        for needed in needs(line["stage"]):
            # `minem train --samples` has no E-step.
            if needed in journal or (needed == "iter-01/estep" and "samples" in read_facts(folder).get("inputs", {})):
                continue
            raise UserError(
                f"{path}, line {number}: {line['stage']} is finished, but {needed}, which it needs, is not; put "
                "the missing line back, or give --overwrite to start from scratch"
            )
        journal[line["stage"]] = line
    return journal


def needs(stage: str) -> list[str]:
    """The stages that must be finished before this one."""
    found = re.fullmatch(r"iter-(\d+)/(\w+)(?:\.(\w+))?", stage)
    if found is None or not (iteration := int(found[1])):
        return []
    folder, kind, part = f"iter-{iteration:02d}", found[2], found[3]
    if kind == "eval":
        return [f"{folder}/mstep"]
    if kind == "estep":
        earlier = [f"{folder}/estep.{int(part) - 1}"] if part and int(part) > 1 else []
        return earlier + ([f"iter-{iteration - 1:02d}/mstep"] if iteration > 1 else [])
    return [f"{folder}/estep"]
