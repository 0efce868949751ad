"""Files that survive an accident: flushed before they count, seen whole or not at all, and known by their SHA-256.

    python -c "from pathlib import Path; from minem.disk import manifest; print(manifest(Path('README.md')))"

`minem.run` builds on these; nothing here knows what a run is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial."  # how the names of files begin that are not finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the largest file allowed
SPARE = 1 << 20  # bytes that must stay free beside what is announced, for a journal and the like


def manifest(path: Path, name: str = "") -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "sha256": digest}} of a file, or of all files in a folder, `name` being its own name."""
    if not path.is_dir():
        return {name or path.name: entry(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {f"{name or path.name}/{file.relative_to(path).as_posix()}": entry(file) for file in files}


def entry(path: Path) -> dict[str, Any]:
    """Size and digest of one file. Cheap right after it was written, while its pages are still in memory."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_as_written(path: Path, written: Any) -> bool:
    """Is the file there, readable, and the one that the manifest's entry was made of?"""
    try:
        size = written.get("bytes") if isinstance(written, dict) else None
        return path.is_file() and path.stat().st_size == size and entry(path) == written
    except OSError:  # a sector that cannot be read any more
        return False


def is_full(error: BaseException | None) -> bool:
    """Did this go wrong because nothing more could be written? Also where another error was raised from that one.

    safetensors writes by itself and raises its own error, in which the system's stands as "(os error 28)".
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        told = re.search(r"\(os error (\d+)\)", str(error))
        if code in FULL or (told is not None and int(told[1]) in FULL):
            return True
        error = error.__cause__
    return False


def shortage(folder: Path, needed: int) -> str | None:
    """ "about 3.2 GB are needed and 1.1 GB are free" where so many bytes, and a little more, would not fit."""
    total, _, free = shutil.disk_usage(folder)
    if free >= needed + SPARE or total == 0:  # some network file systems do not say
        return None
    return f"about {shown_bytes(needed + SPARE)} are needed and {shown_bytes(free)} are free"


def shown_bytes(size: int) -> str:
    """1234567 -> "1.2 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen whole or not at all, even where the machine stops."""
    partial = path.with_name(PARTIAL + path.name)
    with open(partial, "wb") as file:
        file.write(content)
        flush(file)
    os.replace(partial, path)
    flush_folders(path.parent, path.parent)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(file: IO[bytes]) -> None:
    """fsync what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def flush_tree(path: Path) -> None:
    """fsync a file, or a folder and everything in it."""
    for child in path.iterdir() if path.is_dir() else ():
        flush_tree(child)
    _flush_entry(path)


def flush_folders(folder: Path, top: Path) -> None:
    """fsync the entries of `folder` and of the folders above it, up to `top`."""
    _flush_entry(folder)
    if folder != top:
        flush_folders(folder.parent, top)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
