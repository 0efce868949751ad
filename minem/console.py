"""Progress on stderr, one line per stage of a run, and tables on stdout.

    minem train                     # a terminal: one live line, which stays when its stage is done
    minem train 2> train.log        # anything else: plain lines, at most one every ten seconds

    iteration 1/4 E-step  ━━━━────────────────  120/512  accepted 61.0 %  tokens/s 5,300  0:12, 0:40 left

`minem.text.clean` removes what a terminal would act on in texts of files and models, and rich's markup is off.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minem.text import clean, redact

BAR_WIDTH = 20


class Line:
    """The line of one running stage; `Progress.stage` makes it."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float]) -> None:
        self.name, self.total, self.done = clean(name), total, 0
        self.now = ""
        self.facts: dict[str, str | float] = {}
        self.on_update: Callable[[], None] = lambda: None
        self._clock, self._start = clock, clock()

    def update(self, done: int | None = None, now: str = "", **facts: str | float) -> None:
        """Set what is done of `total`, facts by name, and in place of the time left what goes on `now`, uncounted."""
        self.now = now
        self.done = self.done if done is None else done
        self.facts |= facts
        self.on_update()

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self._start

    def text(self, ending: str = "", bar: str = "") -> str:
        """The line as it stands, or with `ending` ("done", "stopped") the one that stays."""
        parts = [self.name, bar, "" if self.total is None else f"{self.done:,}/{self.total:,}"]
        for name, value in self.facts.items():
            parts.append(f"{clean(name).replace('_per_', '/').replace('_', ' ')} {_shown(value)}")
        clock = duration(self.elapsed)
        if ending:
            clock = f"{ending} after {clock}"
        elif self.now:
            clock += f", {self.now}"
        elif self.total and 0 < self.done <= self.total:
            clock += f", {duration(self.elapsed * (self.total - self.done) / self.done)} left"
        return "  ".join(part for part in (*parts, clock) if part)

    def __rich__(self) -> Text:
        filled = min(self.done, self.total) * BAR_WIDTH // self.total if self.total else 0
        bar = "━" * filled + "─" * (BAR_WIDTH - filled) if self.total else ""
        # Cut rather than wrapped: a live line that wraps leaves its old halves behind.
        return Text(self.text(bar=bar), no_wrap=True, overflow="ellipsis")


class Progress:
    """The lines of a run, on stderr by default. interval: seconds between plain lines of a stage; clock: seconds."""

    def __init__(
        self, stream: TextIO | None = None, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        stream = stream or sys.stderr
        self._console = _Console(stream)
        self._live = stream.isatty() and not self._console.is_dumb_terminal
        self._interval, self._clock = interval, clock

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Line]:
        """Show a line while the block runs; `total` is how much there is to do, if that is known."""
        line, shown = Line(name, total, self._clock), 0.0

        def show_again() -> None:
            nonlocal shown
            if line.elapsed - shown >= self._interval:
                shown = line.elapsed
                self.note(line.text())

        if not self._live:
            self.note(line.name + (f"  0/{total:,}" if total is not None else ""))
            line.on_update = show_again
        # stdout is for results, so rich must not redirect it.
        live = Live(line, console=self._console, transient=True, redirect_stdout=False, refresh_per_second=4)
        ending = "stopped"
        try:
            with live if self._live else nullcontext():
                yield line
            ending = "done"
        finally:
            self.note(line.text(ending))

    def note(self, text: str) -> None:
        """Print one line: a warning, or what was inferred or skipped."""
        with suppress(OSError):  # a closed pipe, a full disk: the work continues without it
            self._console.print(Text(redact(clean(text))), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table on stdout: the first column to the left, the others to the right."""
    made = Table(title=Text(clean(title)) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(Text(clean(column)), justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_shown(cell)) for cell in row))
    # A file has no width that a table would have to fit in.
    _Console(sys.stdout, width=None if sys.stdout.isatty() else 500).print(made)


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """0.613 -> "61.3 %"; with a confidence interval of shares, "61.3 % (57.0-65.4)"."""
    bounds = f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * share:.1f} %{bounds}"


def duration(seconds: float) -> str:
    """4000 -> "1:06:40", 75 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Console(Console):
    def __init__(self, file: TextIO, width: int | None = None) -> None:
        super().__init__(file=file, markup=False, emoji=False, highlight=False, width=width)

    def on_broken_pipe(self) -> None:
        """Without this, rich would end the process, and a run of hours with it."""
        self.quiet = True


def _shown(value: object) -> str:
    if not isinstance(value, int | float):
        return clean(str(value))
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"
