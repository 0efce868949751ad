"""Three errors for the user, each with its exit code: bad input (2), stopped but resumable (3), stopped by a guard (4).

The command line prints their sentence. Any other exception is a bug in minem and keeps its traceback.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from minem.text import sentence


class MinemError(Exception):
    """Base of the errors for the user. Messages may quote files and models: `minem.text.sentence` makes them safe."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class UserError(MinemError):
    """Bad input: the message names the file, field or flag, and what would be right. Exit code 2."""


class Interrupted(MinemError):
    """The run stopped but can be resumed; the message gives the way. Exit code 3."""

    exit_code = 3


class GuardError(MinemError):
    """A guard stopped the run: numbers that are not finite, or nothing to train on. Exit code 4."""

    exit_code = 4


class NotFinite(GuardError):
    """A loss or gradient is not finite; `dump` has the step, its numbers and the examples at fault, as JSON values."""

    def __init__(self, message: str, dump: dict[str, Any]) -> None:
        super().__init__(message)
        self.dump = dump


def shown(value: Any) -> str:
    """A value of TOML in at most 80 characters, for a sentence."""
    try:
        text = json.dumps(value) if isinstance(value, str | bool) else str(value)
    except ValueError:  # Python prints no integer of thousands of digits
        return "too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


def one_of(value: Any, choices: Iterable[str], more: str = "") -> str:
    """ "one of a, b" for a sentence, with the choice that is nearest to a wrong value."""
    names = list(choices)
    listed = " ".join(filter(None, ["one of " + ", ".join(names), more]))
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"{listed} (did you mean {near[0]}?)" if near else listed


def some(names: Sequence[str], most: int = 5) -> str:
    """At most `most` of the names, for a sentence."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def reason(error: BaseException) -> str:
    """The message of another library's error, on one line of at most 300 characters; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
