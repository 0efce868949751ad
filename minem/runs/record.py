"""Where a run comes from: the facts that its run.json records, the hashes of its inputs, and its model card.

cat runs/toy.rsm8.toy-llama.s0/run.json
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import minem
from minem.config import Config
from minem.files import entry, own_file
from minem.model.tokenizer import FILES, Tokenizer
from minem.runs.folder import about
from minem.text import redact, visible


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Those of the named packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def run_facts(config: Config, command: list[str], inputs: dict[str, str], origins: dict[str, str]) -> dict[str, Any]:
    """The content of run.json."""
    packages = ("torch", "triton", "safetensors", "tokenizers", "jinja2", "numpy")
    keys = [f"{section}.{key}" for section, values in config.model_dump().items() for key in values]
    return {
        **about("run directory"),
        "versions": {"minem": minem.__version__, "python": platform.python_version(), **package_versions(packages)},
        "platform": platform.platform(),
        "commit": _commit(),
        "command": [redact(word) for word in command],
        "seed": config.run.seed,
        "config": config.model_dump(),
        "origins": {key: origins.get(key, "default") for key in keys},
        "inputs": inputs,
        "started": now(),
    }


def _commit() -> str | None:
    """The git commit of minem's own source tree, "-dirty" if it was changed; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie inside another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and the config of a model folder: a run is continued on the same model only."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(own_file(folder, found.name) for found in folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(entry(path)["sha256"]))
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """SHA-256 of the tokenizer's files with the ids that end a text, and of the chat template."""
    digest = hashlib.sha256(repr(sorted(tokenizer.eos_ids)).encode())
    for path in (tokenizer.folder / name for name in FILES):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    template = (tokenizer.chat_template or "").encode("utf-8", "surrogatepass")
    return {"tokenizer": digest.hexdigest(), "chat template": hashlib.sha256(template).hexdigest()}


def public_name(name: str) -> str:
    """A name as it may be published: of a local path the last part alone, and no markup, space or line break."""
    path = os.path.expanduser(name)
    return re.sub(r"[^\w./:@+-]+", "-", os.path.basename(os.path.abspath(path)) if os.path.exists(path) else name)


def model_card(config: Config, name: str, source: str | None, iteration: int) -> str:
    """README.md of the model that the run called `name` exports after an iteration.

    source: where its samples came from, if no sampler drew them.
    """
    base, task, title = map(public_name, (config.model.id, config.task.name, name))
    front = f"---\nlibrary_name: transformers\nbase_model: {json.dumps(base)}\ntags: [minem]\n---\n"
    section, kept = config.sampler, "config is" if source else "config and the samples are"
    done = f"after {iteration} iteration(s) of expectation maximization on `{task}` with the sampler "
    done += f"`{section.name}` (budget {section.budget})"
    if source:
        done = f"trained for `{task}` {source}"
    return visible(
        f"{front}\n# `{title}`, iteration {iteration}\n\n`{base}` {done}, made by minem {minem.__version__}. "
        f"The {kept} in the run's directory.\n"
    )
