"""Being asked to stop: SIGTERM (a cluster takes the machine back), SIGUSR1 (it warns), Ctrl-C.

    minem train & sleep 60; kill %1; wait %1; echo $?         # 3, and the same command goes on

The signal only leaves a note. Whoever works looks at it where stopping loses nothing: the M-step after each update,
once it has written a checkpoint; the others after each token drawn. A second Ctrl-C does not wait for that.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from minem.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Whether somebody wants this process to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self, what: str) -> None:
        """Raises Interrupted, in the midst of `what`, if somebody wants this process to stop."""
        if self:
            raise Interrupted(
                f"stopped by {self.signal} in {what}; what was finished is kept: give the same command again to go on"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the signals are noted here."""

        def note(number: int, frame: FrameType | None) -> None:
            if self and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
