"""The stages of a run: each is skipped if it is finished, shown while it works, shared among ranks, and journaled.

    minem train        # prints a line for each stage; the same command later skips what is finished

So the EM loop knows no disk, no rank and no progress bar. All ranks walk through the same stages in the same order;
rank 0 writes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

from minem.config import Config
from minem.console import Line, Progress, duration
from minem.device import out_of_memory
from minem.errors import GuardError, Interrupted, NotFinite, UserError
from minem.files import read_rows, write_atomic, write_rows
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import Stop
from minem.runs.directory import Record, RunDirectory
from minem.runs.resume import go_back, last_model
from minem.runs.tracking import tracked

NAMES = {"estep": "E-step", "mstep": "M-step", "eval.validation": "validation", "eval.test": "test"}
T = TypeVar("T")
ROW_BYTES, TOKEN_BYTES = 500, 14  # of a row of JSON, about: 14 for each token's id and text

Show = Callable[..., None]  # (how much is done, facts by name) -> None, for the line of progress
# Over ranks and blocks, counts that are integers are summed, and of floats the largest is taken.
Counts = Mapping[str, float]


@dataclass
class Session:
    """What a run needs beside its config."""

    progress: Progress = field(default_factory=Progress)
    ranks: Ranks = ALONE
    stop: Stop = field(default_factory=Stop)
    command: Sequence[str] = ()
    overwrite: bool = False
    tracker: ModuleType | None = None
    origins: Mapping[str, str] = field(default_factory=dict)


class Run:
    """A run as the loop sees it. `results` has what each finished stage reported, by its name, on every rank."""

    def __init__(self, directory: RunDirectory | None, path: Path, config: Config, session: Session) -> None:
        self.directory = directory  # of rank 0, which alone writes
        self.path, self.config = path, config
        self.progress, self.ranks, self.stop = session.progress, session.ranks, session.stop
        self.results: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def open(cls, config: Config, session: Session, inputs: Mapping[str, str]) -> Iterator[Self]:
        """Make the run's directory or resume the run that is in it, as `RunDirectory.open` does on rank 0."""
        with ExitStack() as stack:
            directory, progress, ranks = None, session.progress, session.ranks
            if ranks.first:
                opened = RunDirectory.open(config, session.command, session.overwrite, inputs, session.origins)
                directory = stack.enter_context(opened)
                for change in directory.changes:
                    progress.note(f"note    {change}, since this run was started; results change by rounding only")
                if sentence := go_back(directory):
                    progress.note(f"warning {sentence}")
                if session.tracker is not None:
                    stack.enter_context(tracked(directory, session.tracker, progress))
            path, results = ranks.broadcast(directory and (str(directory.path), directory.results))
            run = cls(directory, Path(path), config, session)
            run.results = results
            yield run

    def finished(self, iteration: int, name: str) -> bool:
        """Whether a stage is in the journal."""
        return _stage(iteration, name) in self.results

    def result(self, iteration: int, name: str) -> dict[str, Any]:
        """What a finished stage reported. KeyError if it has not finished."""
        return self.results[_stage(iteration, name)]

    def read(self, iteration: int, file: str, kind: type[T]) -> list[T]:
        """The rows of a file that a finished stage wrote, as dataclasses of this kind."""
        return [kind(**row) for row in read_rows(self.path / f"iter-{iteration:02d}" / file)]

    def parts(self, iteration: int, name: str) -> list[int]:
        """Numbers of the finished blocks of an E-step, or checkpoints of an M-step: stages like "iter-01/estep.1"."""
        head = f"{_stage(iteration, name)}."
        return sorted(int(stage.removeprefix(head)) for stage in self.results if stage.startswith(head))

    def do(
        self, iteration: int, name: str, work: Callable[["Stage"], None], total: int | None = None, writes: int = 0
    ) -> None:
        """Do a stage, unless it is finished: call `work` with it on every rank.

        total: how many items its progress counts. writes: bytes, about, that it will write.
        Raises UserError if an M-step that comes after it is finished, so that the weights of this stage are gone;
        Interrupted for a signal, full memory or a failed disk: the stage is lost and nothing else.
        """
        stage_name = _stage(iteration, name)
        if stage_name in self.results:
            self.progress.note(f"{stage_name}  finished earlier, skipped")
            return
        drawn_before = not name.startswith("eval.")  # with the weights before the M-step of this iteration
        if (last := last_model(self.results)) > iteration - drawn_before:
            missing = f"iter-{last:02d}/mstep is finished, but {stage_name}, which comes before it, is not"
            advice = "put the missing line back, or give --overwrite to start from scratch"
            raise UserError(f"{self.path / 'journal.jsonl'}: {missing}; {advice}")
        head = f"iteration {iteration}/{self.config.run.iterations}" if iteration else "base model"
        with self.progress.stage(f"{head}  {NAMES.get(name, name)}", total) as line:
            self.commit(stage_name, line, work, writes)
        for sentence in self.results[stage_name].get("warnings", ()):
            self.progress.note(f"warning {sentence}")
        if name == "eval.validation" and 0 < iteration < self.config.run.iterations and self.directory is not None:
            self.progress.note(f"time    {self._time(self.directory.seconds, iteration)}")

    def _time(self, seconds: Mapping[str, float], iteration: int) -> str:
        """What an iteration took, and about what the rest of the run will take."""
        names = ("estep", "diagnostics", "mstep", "eval.validation")
        own = sum(seconds.get(_stage(iteration, name), 0) for name in names)
        more = self.config.run.iterations - iteration
        left = more * own + seconds.get(_stage(0, "eval.test"), 0)
        rest = f"the {more} to come and the last test will take about {duration(left)}"
        return f"iteration {iteration} took {duration(own)}; {rest}"

    def commit(self, stage_name: str, line: Line, work: Callable[["Stage"], None], writes: int = 0) -> None:
        """The stage itself, under a line of progress that may show several."""
        with ExitStack() as stack, self._guarded(stage_name):
            record = Record(self.path)
            if self.directory is not None:
                record = stack.enter_context(self.directory.stage(stage_name, writes))
            stage = Stage(self, stage_name, record, line)
            try:
                work(stage)
            except NotFinite as error:
                dump = self.path / "log" / f"not-finite.{stage_name.partition('/')[0]}.json"
                if self.directory is not None:
                    dump.parent.mkdir(exist_ok=True)
                    write_atomic(dump, (json.dumps(error.dump) + "\n").encode())
                raise GuardError(f"{stage_name}: {error}; their tokens are in {dump}") from error
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                training = "mstep.pack_tokens, or set mstep.checkpointing = full"
                keys = training if "/mstep" in stage_name else "run.slots or mstep.pack_tokens"
                advice = f"lower {keys}, then give the same command again"
                raise Interrupted(f"out of memory in {stage_name}; {advice}") from error
        self.results[stage_name] = self.ranks.broadcast(self.directory and self.directory.results[stage_name])

    @contextmanager
    def _guarded(self, stage_name: str) -> Iterator[None]:
        """Keep the reason if a guard ends the run here."""
        try:
            yield
        except GuardError as error:
            if self.directory is not None:
                self.directory.note_stop(stage_name, str(error))
            raise

    def discard(self, iteration: int, *names: str) -> None:
        """Delete what is no longer needed; outside the stage, so that a run that died between the two cleans up."""
        if self.directory is not None:
            for name in names:
                self.directory.discard(_stage(iteration, name))


class Stage:
    """A stage at work; `Run.do` passes it to the stage's function."""

    def __init__(self, run: Run, name: str, record: Record, line: Line) -> None:
        self.run, self.name, self.line, self._record = run, name, line, record
        self.logged = False
        self._rate: dict[str, float] = {}
        self._folder = name.partition("/")[0]
        self.iteration = int(self._folder.removeprefix("iter-"))

    def write(self, file: str, rows: Iterable[Any]) -> None:
        """Rows, dictionaries or dataclasses, that become a file of this iteration."""
        if self.run.ranks.first:
            write_rows(self.path(file), (row if isinstance(row, Mapping) else vars(row) for row in rows))

    def path(self, name: str) -> Path:
        """Where rank 0 writes the file or folder that becomes `name` in the folder of this iteration."""
        if not self.run.ranks.first:  # the record clears the place, where rank 0 may be writing already
            return self.run.path / self._folder / name
        return self._record.path(f"{self._folder}/{name}")

    def report(self, **values: Any) -> None:
        """What the journal keeps of the stage, and the metrics too unless the stage has lines of its own there."""
        self._record.result.update(values)
        if self.run.directory is not None and not self.logged:
            self.run.directory.log_metrics(self.name, {**values, **self._rate})

    def log(self, **values: Any) -> None:
        """A line of metrics.jsonl, as for an optimizer step."""
        self.logged = True
        if self.run.directory is not None:
            self.run.directory.log_metrics(self.name, values)

    def show(self, done: int | None = None, /, **facts: Any) -> None:
        """Show progress. Raises Interrupted if this process is to stop."""
        self.run.stop.check(self.name)
        self.line.update(done, **facts)

    def sharded(self, items: Sequence[Any], work: Callable[[Sequence[Any], Show], list[T]]) -> list[T]:
        """What `work` makes of the items, each rank working on its share of them; all ranks get all of it."""
        own = [items[i] for i in self.run.ranks.share([1.0] * len(items))]
        return [row for rows in self.run.ranks.gather(work(own, self.show)) for row in rows]

    def in_blocks(self, items: Sequence[Any], step: Any, kind: type[T]) -> tuple[list[T], Counts]:
        """As `sharded`, in blocks that are each on the disk before the next begins: a killed run keeps them.

        Blocks are the stages "iter-01/estep.1", ...; their rows are in samples.N.jsonl until this stage is finished.
        A resumed run keeps its number of blocks, and so its schedule. step: has `blocks`, `expected` and `run`, as
        `minem.em.estep.EStep`. kind: the dataclass of a row, with an item's id.
        """
        count = self.run.results.get(f"{self.name}.1", {}).get("blocks")
        # From one rank for all: their slots, and so their counts, may differ.
        count = count or self.run.ranks.broadcast(step.blocks(len(items) // self.run.ranks.size))
        ends = [len(items) * i // count for i in range(count + 1)]
        drawn = 0  # tokens, by this process
        for number, (start, end) in enumerate(pairwise(ends), start=1):
            name, block = f"{self.name}.{number}", items[start:end]

            def draw(stage: "Stage", block: Sequence[Any] = block, number: int = number, start: int = start) -> None:
                own = [block[i] for i in self.run.ranks.share([step.expected(item) for item in block])]

                def show(done: int, **facts: Any) -> None:
                    if facts.get("tokens"):
                        facts["tokens_per_s"] = facts["tokens"] / max(1e-9, self.line.elapsed)
                    self.show(start + done, **facts)

                shares = self.run.ranks.gather(step.run(own, show))
                order = {item.id: place for place, item in enumerate(block)}
                rows = sorted((row for rows, _ in shares for row in rows), key=lambda row: order[row.id])
                stage.write(f"samples.{number}.jsonl", rows)
                stage._record.result.update(counts=_merged(counts for _, counts in shares), blocks=count)

            if name not in self.run.results:
                self.run.commit(name, self.line, draw)
                drawn += self.run.results[name]["counts"]["tokens"]
        self._rate = {"tokens_per_second": drawn / max(1e-9, self.line.elapsed)}
        numbers = range(1, count + 1)
        rows = [row for n in numbers for row in self.run.read(self.iteration, f"samples.{n}.jsonl", kind)]
        self.run.ranks.any(False)  # every rank has read them before rank 0 may discard them
        return rows, _merged(self.run.results[f"{self.name}.{n}"]["counts"] for n in numbers)


def _merged(parts: Iterable[Counts]) -> Counts:
    total: dict[str, float] = {}
    for part in parts:
        for key, count in part.items():
            total[key] = max(total.get(key, count), count) if isinstance(count, float) else total.get(key, 0) + count
    return total


def row_bytes(rows: int, max_new_tokens: int) -> int:
    """About what rows of the longest kind take on the disk."""
    return rows * (ROW_BYTES + TOKEN_BYTES * max_new_tokens)


def _stage(iteration: int, name: str) -> str:
    return f"iter-{iteration:02d}/{name}"
