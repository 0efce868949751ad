"""A config as text: as TOML that reads back to an equal one, and what differs between two of them.

cat runs/toy.rsm8.toy-llama.s0/config.toml
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minem.text import visible

if TYPE_CHECKING:
    from minem.config import Config


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The config as TOML, as `load_config` reads it back to an equal one. Keys that are None are left out.

    origins: where values were written, {"section.key": "--flag" or a path}; they become comments.
    """
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            origin = (origins or {}).get(f"{section}.{key}")
            comment = f"  # by {_toml_value(origin)}" if origin else ""  # quoted: a path may hold a line break
            lines += [f"{key} = {_toml_value(value)}{comment}"] if value is not None else []
        lines.append("")
    return "\n".join(lines)


def difference(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per key that differs, like "sampler.budget: 8 -> 4"; {section: {key: value}}, None for not set."""
    before, after = ({f"{s}.{key}": v for s, values in c.items() for key, v in values.items()} for c in (old, new))
    keys = {**after, **before}
    return [f"{k}: {_shown(before.get(k))} -> {_shown(after.get(k))}" for k in keys if before.get(k) != after.get(k)]


def _shown(value: Any) -> str:
    return "not set" if value is None else _toml_value(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but that they also escape DEL; so that the file is harmless to look at, too,
        # whatever a terminal would obey is escaped like it.
        return visible(json.dumps(value, ensure_ascii=False))
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
