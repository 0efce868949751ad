"""Requests to stop: SIGTERM (a cluster takes the machine back), SIGUSR1 (its warning), Ctrl-C.

    minem train & sleep 60; kill %1; wait %1; echo $?         # 3, and the same command continues

Until a run is at work a signal stops it at once: nothing can be lost. Then it only leaves a note. The M-step reads it
after each update and writes a checkpoint, the other stages after each token drawn. A second Ctrl-C does not wait for
that.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from minem.errors import Interrupted

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RESUMABLE = ("train", "sample", "eval", "compare")


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """End this process, whatever it is doing: what is on the disk is what a SIGKILL would leave.

    An exception could be raised inside the import of a library or a callback from C++, and be lost or abort there.
    """
    if "LOCAL_RANK" not in os.environ:  # of several processes the one that started them reports it
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # which a live line hides
        os.write(2, f"{cursor}{stopped(sys.argv[1] if sys.argv[1:] else None)}\n".encode())
    os._exit(Interrupted.exit_code)


@contextmanager
def deadly() -> Iterator[None]:
    """While open, a signal kills this process: Python's handlers do not run while C++ waits for something."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(command: str | None) -> str:
    """The sentence that ends a command which was stopped."""
    return "minem: stopped" + ("; give the same command again to resume" if command in RESUMABLE else "")


class Stop:
    """True once this process was asked to stop, by `signal`: "SIGTERM", "SIGUSR1" or "Ctrl-C".

    at_work: signals only leave a note, since there is something to lose.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.at_work = False
        self._before: dict[int, Any] = {}  # handlers

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self, what: str) -> None:
        """Raises Interrupted if this process was asked to stop; `what` is being done."""
        if self:
            raise Interrupted(f"stopped by {self.signal} in {what}; give the same command again to resume")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, signals are noted here."""
        self._before = {number: signal.getsignal(number) for number in STOPS}
        for stop in STOPS:
            signal.signal(stop, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # `launch` blocks them
        try:
            yield
        finally:
            for number, handler in self._before.items():  # a rank only exits now: torch's agent must not interrupt that
                signal.signal(number, signal.SIG_IGN if "LOCAL_RANK" in os.environ else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # After a Ctrl-C any signal is a second one: torch's agent passes its own second Ctrl-C on as SIGTERM.
        if not self.at_work or self.signal == "Ctrl-C" or (self and number == signal.SIGINT):
            if callable(before := self._before[number]):
                before(number, frame)
            raise KeyboardInterrupt
        self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
