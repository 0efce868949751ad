"""Several processes that train one model: how they start, share the work, wait for each other, and notice a death.

    minem train --gpus 2                                  # starts two processes of itself
    torchrun --nproc-per-node 2 -m minem train            # plain torchrun does, too
    minem train --device cpu --gpus 2                     # without any GPU

torch.distributed is the engine. Inside the M-step the processes move in lockstep and gradients are summed by NCCL (by
gloo on the CPU). Everywhere else they work at their own pace, and whoever needs something of another waits for it on
the *store*, torch's key-value server: minutes of waiting in a collective would hold a GPU busy, and end in a timeout.

Each process signs the store once a second. Whoever stops, crashes or is killed is missed by the others, which say so
and stop: the run stands on the disk as it was after its last finished stage, and the same command goes on from there,
on any number of processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from minem.errors import Interrupted, MinemError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 1.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one until a process counts as lost
START = 600.0  # and until its first: torch may come from a cold disk
GRACE = 30.0  # seconds that `launch` gives the others to end by themselves after one has failed
PATIENCE = timedelta(days=2)  # of a collective: a death is noticed by silence, not by a timeout


class Ranks:
    """One process among those that train a model together. `ALONE` is a process without others.

    rank: this process, counted from 0. The first one writes the run's directory.
    size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Positions of the items that are this process's own, in their order; every process gets about the same cost.

        The dearest first, each to the process that has least so far (Graham 1969: at most 4/3 of the optimum).
        """
        loads, own = [0.0] * self.size, []
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            target = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[target] += costs[item]
            if target == self.rank:
                own.append(item)
        return sorted(own)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64; a collective, all must call it."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process; a collective."""
        return self.total([float(flag)])[0] > 0

    def publish(self, name: str, value: Any) -> None:
        """Leave a JSON value for the others under a name that is used once."""
        if self._store is not None:
            self._store.set(name, json.dumps(value))

    def receive(self, name: str) -> Any:
        """What another process publishes under this name; waits until it does. (If that one dies, so does this.)"""
        assert self._store is not None
        pause = 0.002
        while not self._store.check([name]):
            time.sleep(pause)  # not `wait`, which would hold the connection and no signal could be handled
            pause = min(2 * pause, 0.1)
        return json.loads(self._store.get(name))


ALONE = Ranks()


# ------------------------------------------------------------------------------------------------ joining the others


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among the others that torchrun or `launch` started with it; ALONE where nobody did.

    device: "auto", "cpu" or "cuda". On GPUs each process takes the one of its local rank.

    An error in one process ends them all: the first one prints it, and all exit with its code.
    """
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if size == 1:
        yield ALONE
        return
    import torch
    from torch import distributed

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise UserError(f"process {rank} needs GPU {local}, but {torch.cuda.device_count()} are here; lower --gpus")
        torch.cuda.set_device(local)
    store = _connect(host=rank == 0)
    watch = _Watch(rank, size, _connect())
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield Ranks(rank, size, store)
    except BaseException as error:
        watch.failed(error)
        raise
    watch.finished()
    distributed.destroy_process_group()


def _connect(host: bool = False) -> Store:
    """A connection to the store; torchrun's agent or the first process (`host`) serves it."""
    from torch import distributed

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=host and not served, wait_for_workers=False)
    # torchrun may start all processes anew and keep its store: nothing of the last attempt may be read in this one.
    return distributed.PrefixStore(f"minem/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class _Watch:
    """A thread that signs the store and ends this process when another one has ended before its time."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.others = [other for other in range(size) if other != rank]
        self.silence = SILENCE
        self.parent = os.getppid()
        self.ended = False
        self.left = False
        self.unanswered = 0.0  # seconds since the store last answered, not counting those that this process was stopped
        self.lock = threading.Lock()  # `failed` and `finished` speak on the same connection
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._guard, daemon=True).start()

    def _watch(self) -> None:
        # Silence is counted in rounds of this loop: where all processes were suspended together, none was silent.
        seen: dict[int, tuple[bytes, int]] = dict.fromkeys(self.others, (b"", 0))
        number = 0
        while not self.ended:
            number += 1
            try:
                with self.lock:
                    self.store.set(f"beat/{self.rank}", f"{socket.gethostname()} {os.getpid()} {number}")
                    beats = {other: self._read(f"beat/{other}") for other in self.others}
                    failures = {other: self._read(f"failed/{other}") for other in self.others}
            except Exception:  # the store is gone, and with it the process that served it
                if not self.ended:
                    self._stop("the first process", "cannot be reached any more")
                return
            for other in self.others:
                name = f"process {other + 1} of {self.size}"
                if failures[other]:
                    self._follow(name, json.loads(failures[other]))
                if self._is_dead(beats[other]):
                    self._stop(name, "has ended before its time")
                elif beats[other] != seen[other][0]:
                    seen[other] = (beats[other], number)
                    continue
                most = self.silence if beats[other] else START
                if beats[other] != b"finished" and (number - seen[other][1]) * BEAT > most:
                    self._stop(name, f"has given no sign of life for {most:.0f} s")
            if os.getppid() != self.parent:
                self._stop("the process that started this one", "is gone")
            time.sleep(BEAT)

    def _guard(self) -> None:
        """End this process where the store is silent: who serves it is stopped, and whoever asks it waits for good."""
        while not self.left:
            time.sleep(BEAT)
            self.unanswered += BEAT
            if self.unanswered > self.silence and not self.left:
                self.ended = False  # whatever this process was about to say, nobody can be told it any more
                self._stop("the first process", f"has given no sign of life for {self.silence:.0f} s")

    def _is_dead(self, beat: bytes) -> bool:
        """Known at once of a process on this machine; of others only their silence tells."""
        host, _, rest = beat.decode().rpartition(" ")[0].partition(" ")
        if host != socket.gethostname():
            return False
        try:
            os.kill(int(rest), 0)
        except ProcessLookupError:
            return True
        return False

    def _read(self, key: str) -> bytes:
        value = self.store.get(key) if self.store.check([key]) else b""
        self.unanswered = 0.0
        return value

    def _stop(self, name: str, what: str) -> None:
        if not self.ended:
            advice = "so this one stops, too; give the same command again to go on from the last finished stage"
            self._exit(f"minem: {name} {what}, {advice}", Interrupted.exit_code)

    def _follow(self, name: str, failure: dict[str, Any]) -> None:
        """Another process failed: the first one tells why, since only its words are surely seen."""
        with suppress(Exception):
            self.store.set(f"beat/{self.rank}", "finished")
        self._exit(f"minem: {failure['text']} (in {name})" if self.rank == 0 else "", failure["code"])

    def _exit(self, message: str, code: int) -> None:
        if message:
            from minem.console import clean

            print(clean(message), file=sys.stderr, flush=True)
        os._exit(code)  # the main thread may hang in a collective that nobody will ever complete

    def finished(self) -> None:
        """All is done here. Whoever serves the store stays until the others have finished as well."""
        with self.lock:
            self.store.set(f"beat/{self.rank}", "finished")
            self.ended = True
            self._wait_for_the_others()
        self.left = True

    def failed(self, error: BaseException) -> None:
        """Tell the others of an error here; a broken connection is most likely the end of another process instead."""
        if isinstance(error, RuntimeError) and not isinstance(error, MinemError):
            self.silence = 5 * BEAT
            time.sleep(self.silence + 3 * BEAT)  # the watching thread finds out whose, says so and exits
        code = error.exit_code if isinstance(error, MinemError) else 3 if isinstance(error, KeyboardInterrupt) else 1
        text = str(error) if isinstance(error, MinemError) else f"stopped by {type(error).__name__}"
        with suppress(Exception), self.lock:
            self.ended = True
            self.store.set(f"failed/{self.rank}", json.dumps({"code": code, "text": text}))
            self.unanswered = 0.0
            if self.rank == 0:
                self._wait_for_the_others()
            else:
                time.sleep(3 * BEAT)  # for the first process to see it
                self.store.set(f"beat/{self.rank}", "finished")
        self.left = True
        if self.rank and code != 1:
            os._exit(code)  # the first process has told it

    def _wait_for_the_others(self, most: float = 20.0) -> None:
        if self.rank:
            return
        deadline = time.monotonic() + most
        while time.monotonic() < deadline:
            if all(self._read(f"beat/{other}") == b"finished" for other in self.others):
                return
            time.sleep(0.05)


# ---------------------------------------------------------------------------------------------- starting the others


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `minem ARGUMENTS` in `count` processes of this machine and wait for them; the exit code of the whole.

    Signals that this process gets are passed on. Needs no torch itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told once
    # On the CPU the processes share the cores; more threads than cores wait for each other at every product.
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "minem", *arguments]
        # In a group of its own, so that a Ctrl-C comes to each once, from here.
        processes.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, process_group=0))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: _pass_on(processes, received))
    codes = _wait(processes)
    if any(codes) and max(codes) == 0:  # the others had ended well by then, so that none of them has told it
        killed = next(n for n, code in enumerate(codes, start=1) if code)
        killer = signal.Signals(-codes[killed - 1]).name
        print(f"minem: process {killed} of {count} was ended by {killer}; give the same command again", file=sys.stderr)
    # What a person can mend outranks what the others only noticed; a process that was killed has a negative code.
    return next((code for code in (2, 4, 1, 3) if code in codes), 3 if any(codes) else 0)


def _pass_on(processes: Sequence[subprocess.Popen[bytes]], received: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(received)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit codes. Those that stay long after one has failed are killed."""
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if deadline == float("inf") and any(process.poll() for process in processes):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.returncode for process in processes]
