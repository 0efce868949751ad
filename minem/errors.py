"""The three ways a run ends other than well, each with its exit code.

Everything that a person can put right is raised as one of these with one clear sentence; the command line prints
the sentence and exits with the code. Anything else is a bug in minem and keeps its traceback. Below them stand the few
words with which the configs of several modules say what is wrong.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from minem.text import sentence


class MinemError(Exception):
    """Base of the errors whose message is meant for a person.

    Much of it is often quoted from files and models: it becomes one line that is safe to show (`minem.text.sentence`).
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class UserError(MinemError):
    """Bad input: the message names the file, field or flag, and what would be right. Exit code 2."""


class Interrupted(MinemError):
    """The run was stopped but can continue; the message says how. Exit code 3."""

    exit_code = 3


class GuardError(MinemError):
    """A guard stopped the run: non-finite numbers, or nothing accepted and so nothing to train on. Exit code 4."""

    exit_code = 4


class NotFinite(GuardError):
    """A loss or gradient is not finite.

    dump: what led to it, as JSON values: the step, its numbers, and the examples at fault with their token ids.
    """

    def __init__(self, message: str, dump: dict[str, Any]) -> None:
        super().__init__(message)
        self.dump = dump


def shown(value: Any) -> str:
    """Whatever TOML may hold, short enough for a sentence."""
    try:
        shown = json.dumps(value) if isinstance(value, str | bool) else str(value)
    except ValueError:  # Python prints no integer of thousands of digits
        shown = "too long to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def one_of(value: Any, choices: Iterable[str], more: str = "") -> str:
    names = list(choices)
    listed = " ".join(filter(None, ["one of " + ", ".join(names), more]))
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"{listed} (did you mean {near[0]}?)" if near else listed


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of many, for a sentence."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def reason(error: BaseException) -> str:
    """The message of another library's error for a sentence: one line of at most 300 characters, or the error's type."""
    return " ".join(str(error).split())[:300] or type(error).__name__
