"""A folder of results that one process holds: found to be our own or empty, locked, and never a stranger's.

minem eval --out evals/mine; cat evals/mine/.lock
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from minem import files
from minem.config import Config, difference
from minem.errors import Interrupted, UserError

LOCK = ".lock"
FILES = (".json", ".jsonl", ".toml", ".md", ".png", ".html")
# What minem writes at the top of its folders.
OWN_NAMES = re.compile(
    r"(run|settings|plan|comparison)\.(json|md|png)|(journal|metrics|answers)\.jsonl|config\.toml|accuracy\.png|"
    r"report\.html|log|iter-\d+|\.partial"
)
# Keys of the config that name an input, which is the same if its content is: fingerprints of that are compared.
BY_CONTENT = ("model.id:", "model.revision:", "task.name:", "task.prompt:")


def folder_name(name: str) -> str:
    """The name with all that a file system may not accept replaced by "-", at most 200 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")[:200]


def model_name(id_: str) -> str:
    """The last part of a model's path or hub id."""
    return "toy-llama" if id_ == "toy" else _last_part(id_)


def default_path(config: Config, arm: str | None = None) -> Path:
    """runs/{task}.{sampler}{budget}.{model}.s{seed}, like runs/toy.rsm8.toy-llama.s0; an arm stands for its sampler."""
    task = _last_part(config.task.name).removesuffix(".jsonl").removesuffix(".parquet")
    arm = arm or f"{config.sampler.name.rpartition(':')[2]}{config.sampler.budget}"
    return Path("runs") / folder_name(f"{task}.{arm}.{model_name(config.model.id)}.s{config.run.seed}")


def claim(path: Path, mark: str = "run.json", kind: str = "run directory") -> IO[str]:
    """Make a folder, or take one of our own kind (it holds the file `mark`); returns its lock, or raises UserError."""
    with usable(path, kind):
        check_place(path, mark, kind)
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        for name in os.listdir(path):
            if OWN_NAMES.fullmatch(name):
                check_kind(path / name)
        files.remove(path / files.PARTIAL)  # of a process that was killed
        return lock


@contextlib.contextmanager
def usable(path: Path, kind: str = "run directory") -> Iterator[None]:
    """Raise UserError if a folder cannot be opened, Interrupted if its disk is full."""
    try:
        yield
    except OSError as error:
        if files.is_full(error):
            raise full_disk(path) from error
        raise UserError(f"the {kind} {path} cannot be used: {error.strerror or error}") from error


def check_kind(path: Path) -> None:
    """UserError if a link is here, a folder in the place of a file (known by its suffix), or a file in a folder's."""
    if files.no_link(path).exists() and path.is_file() != (path.suffix in FILES):
        kind = "file" if path.suffix in FILES else "folder"
        raise UserError(f"{path} is in the way of a {kind} that minem writes; move it somewhere else")


def check_place(path: Path, mark: str = "run.json", kind: str = "run directory") -> None:
    """Only an empty folder or one of our own kind is ever written to."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; it must be a folder")
    names = sorted(os.listdir(path)) if path.exists() else []
    if mark in names:
        if not is_ours(files.read_json(files.own_file(path, mark)), kind):
            raise UserError(f"--out {path} is no {kind}: its {mark} is not one of minem's; choose another")
    elif strangers := [name for name in names if not _left_by_a_start(path, name, names)]:
        raise UserError(f"--out {path} is not empty and no {kind} (it holds {strangers[0]}); choose another")


def about(kind: str) -> dict[str, str]:
    """What the mark of a new folder says of it: that it is minem's, of which kind, and an id of its own."""
    return {"format": f"minem {kind}, 1", "id": secrets.token_hex(16)}


def is_ours(facts: Mapping[str, Any], kind: str = "run directory") -> bool:
    """Whether minem has written this mark."""
    return facts.get("format") == about(kind)["format"]


def _left_by_a_start(path: Path, name: str, names: Sequence[str]) -> bool:
    """Whether this is all that a process leaves which is killed before it has written the mark."""
    if name == LOCK:
        return re.fullmatch(rb"\d*\n?", files.own_file(path, LOCK).read_bytes()[:20]) is not None
    return name == files.PARTIAL and LOCK in names and not (path / name).is_symlink()


def _take_lock(path: Path) -> IO[str]:
    # O_NOFOLLOW: in a stranger's folder a link could lead to any file of the user's.
    lock = os.fdopen(os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(20).strip()
        lock.close()
        raise UserError(f"{path} is in use by process {owner or '?'}; wait for it, or choose another --out") from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_held(path: Path, lock: IO[str] | None) -> None:
    """Raises Interrupted if the folder of this lock is not at this path any more: another process may be there now."""
    try:
        held = lock is None or os.path.samestat(os.fstat(lock.fileno()), os.lstat(path / LOCK))
    except OSError:
        held = False
    if not held:
        advice = "this process stops and leaves what is there now alone"
        raise Interrupted(f"{path} was moved, removed or replaced while it was in use; {advice}")


def refuse(path: Path, changes: Sequence[str]) -> None:
    """Raises UserError if a folder was started with something else; inputs count by their content, not their name."""
    if changes := [change for change in changes if not change.startswith(BY_CONTENT)]:
        advice = "give --overwrite to start from scratch, or another --out to keep both"
        raise UserError(f"{path} was started differently ({'; '.join(changes)}): {advice}")


@contextlib.contextmanager
def hold_folder(
    path: Path,
    mark: str,
    kind: str,
    settings: Mapping[str, Mapping[str, Any]],
    clear: Callable[[Path], None] | None,
    **more: Any,
) -> Iterator[Callable[[], None]]:
    """Keep a folder of results for this process alone, made now or continued with the same settings only.

    mark: the JSON file by which a folder of this `kind` is known; it holds `settings`, {section: {key: value}}, and
    `more`, which is not compared.
    clear: removes what an earlier start wrote, for --overwrite. Yields `check_held` of it, to call before each write.
    UserError as for `claim`, and for other settings.
    """
    with claim(path, mark, kind) as lock, disk_errors(path):
        if clear is None and (path / mark).exists():
            try:
                written = files.read_json(path / mark).items()
                changes = difference({k: v for k, v in written if k not in about(kind) | more}, settings)
            except (UserError, AttributeError) as error:
                raise UserError(f"{path / mark} is damaged; give --overwrite to start from scratch") from error
            refuse(path, changes)
        else:
            if clear is not None:
                clear(path)
            files.write_atomic(path / mark, (json.dumps({**about(kind), **more, **settings}, indent=2) + "\n").encode())
        yield partial(check_held, path, lock)


def full_disk(path: Path, more: str = "") -> Interrupted:
    """What to raise if nothing more can be written to a folder."""
    return Interrupted(f"the disk of {path} is full; free some space, then give the same command again{more}")


@contextlib.contextmanager
def disk_errors(path: Path, more: str = "") -> Iterator[None]:
    """Raise Interrupted if only the disk failed: full, broken, read-only now, the folder moved away."""
    try:
        yield
    except Exception as error:
        if files.is_full(error):
            raise full_disk(path, more) from error
        if not isinstance(error, OSError):
            raise
        own = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(path)
        refused = own and error.errno in (errno.EACCES, errno.EPERM)
        if refused or error.errno in (errno.EIO, errno.EROFS, errno.ESTALE) or not path.is_dir():
            advice = f"repair that, then give the same command again{more}"
            raise Interrupted(f"{path} cannot be read or written any more ({error.strerror}); {advice}") from error
        raise


def _last_part(name: str) -> str:
    """Of a path or a hub id."""
    return Path(name).name or Path(name).resolve().name


@contextlib.contextmanager
def answer_file(
    folder: Path, settings: Mapping[str, Any], overwrite: bool = False
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], object]]]:
    """The answers of one evaluation on disk, appended as they finish: FOLDER/answers.jsonl, FOLDER/settings.json.

    settings: what the answers depend on, except the number of draws. UserError names what differs from the folder's.
    Yields (the answers that are there already, a function that appends one). A last line that was cut off when the
    evaluation was killed is dropped.
    """
    path = folder / "answers.jsonl"
    clear = (lambda _: path.unlink(missing_ok=True)) if overwrite else None
    with hold_folder(folder, "settings.json", "evaluation folder", {"eval": settings}, clear) as check:
        rows = files.complete_rows(path, repair=True)
        kinds = {"id": str, "answer": str | None, "gold": str, "status": str, "text": str, "tokens": int, "draw": int}
        if not all(isinstance(row.get(key, ...), kind) for row in rows for key, kind in kinds.items()):
            raise UserError(f"{path} is damaged; give --overwrite to repeat the evaluation")
        with files.append_to(path) as file:
            yield rows, lambda row: (check(), file.write(files.json_line(row)))
