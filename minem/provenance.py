"""Where a run comes from: the facts that its run.json records beside the hashes of its inputs.

cat runs/toy.rsm8.toy-llama.s0/run.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minem
from minem.text import redact

if TYPE_CHECKING:
    from minem.config import Config


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Those of the named packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def run_facts(config: Config, command: list[str], inputs: dict[str, str], origins: dict[str, str]) -> dict[str, Any]:
    packages = ("torch", "triton", "safetensors", "tokenizers", "jinja2", "numpy")
    keys = [f"{section}.{key}" for section, values in dataclasses.asdict(config).items() for key in values]
    return {
        "versions": {"minem": minem.__version__, "python": platform.python_version(), **package_versions(packages)},
        "platform": platform.platform(),
        "commit": _commit(),
        "command": [redact(word) for word in command],
        "seed": config.run.seed,
        "config": dataclasses.asdict(config),
        "origins": {key: origins.get(key, "default") for key in keys},
        "inputs": inputs,
        "started": now(),
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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
