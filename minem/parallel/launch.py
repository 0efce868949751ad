"""Starting the processes that train one model together, and joining them.

    minem train --gpus 2                                  # one machine
    torchrun --nproc-per-node 2 -m minem train            # one machine or several

torch's elastic agent starts them in both cases, and ends the others if one fails. The same command continues the run,
on any number of processes.
"""

import ctypes
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

from torch import cuda, distributed
from torch.distributed.rendezvous import rendezvous

from minem.errors import Interrupted, UserError, shown
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import STOPS, deadly

ADVICE = "start the processes by --gpus N or torchrun"
AGAIN = "give the same command again to resume"
TIMEOUT = timedelta(days=7)  # of a collective: shares of an E-step may differ by hours, and the agent notices a death
FAILED = "minem/failed"  # in torch's key-value store: rank and exit code of the first process that failed
LAUNCHER = "MINEM_LAUNCHER"  # the process that started this one
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # no warning about a connection that the end of a process has closed
    # Seconds until the agent kills a process that was asked to stop: a checkpoint of a large model takes minutes.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
}


def check_gpus(count: int, device: str) -> None:
    """UserError if torch sees fewer GPUs than `--gpus` asks for."""
    if count == 1 or device == "cpu":
        return
    if count > (found := cuda.device_count()):
        advice = f"give --gpus {found} or fewer" if found else "--device cpu runs them as processes on the CPU"
        raise UserError(f"--gpus {count}, but torch sees {found} CUDA device(s) here; {advice}")


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` in `count` processes of this machine; the exit code of the first that failed, or 0.

    SIGTERM, SIGUSR1 and Ctrl-C go to every process. The code is 3 after one of them, or if a signal killed a process.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # On the CPU the processes share the cores; more threads than cores wait for each other at every product.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    os.environ.update(threads | ENVIRONMENT | os.environ | {LAUNCHER: str(os.getpid())})
    logging.disable()  # the agent's lines: the processes report their errors themselves
    # torch's own server listens on every interface; the agent shares the one that this process has at its port.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())
    # The processes inherit that signals are blocked, so that none is lost before they have handlers; this one gets its
    # own through another thread.
    Thread(target=Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="minem",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(os.devnull),
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"minem: process {rank + 1} of {count} was ended by {failure.signal_name()}; {AGAIN}", file=sys.stderr)
    except SignalException as error:
        if not store.check([FAILED]):  # before the processes had joined
            print(f"minem: stopped by {error.sigval.name}; {AGAIN}", file=sys.stderr)
    return Interrupted.exit_code


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among those that torchrun or `launch` started with it; ALONE if there is no other.

    device: "auto", "cpu" or "cuda"; each process takes the GPU of its local rank.
    The first process that fails raises its error; the others exit silently, with the same code.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set, but not {', '.join(missing)}; {ADVICE}")
    numbers = {name: os.environ[name] for name in ("WORLD_SIZE", *VARIABLES) if name != "MASTER_ADDR"}
    for name, value in numbers.items():
        if not re.fullmatch("[0-9]{1,5}", value):
            raise UserError(f"{name} = {shown(value)} is not a whole number from 0 to 99999; {ADVICE}")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]) or int(numbers["MASTER_PORT"]) >= 2**16:
        given = ", ".join(f"{name} = {value}" for name, value in numbers.items())
        raise UserError(f"{given}: RANK must be below WORLD_SIZE, and MASTER_PORT below 65536; {ADVICE}")

    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a process ends with its agent
        if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
            raise SystemExit(Interrupted.exit_code)  # which has ended already
    on_gpu = device != "cpu" and cuda.is_available()
    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(TIMEOUT)
    try:
        if on_gpu:
            if (gpu := int(os.environ["LOCAL_RANK"])) >= (seen := cuda.device_count()):
                raise UserError(f"a process needs GPU {gpu}, but torch sees {seen}; start fewer processes")
            cuda.set_device(gpu)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # host values never touch a GPU
        with deadly():  # it waits for the others, who may be stopped already
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield Ranks(rank, size)
        distributed.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        broken = isinstance(error, RuntimeError) and (isinstance(error, distributed.DistError) or "gloo" in str(error))
        stopped = broken or isinstance(error, KeyboardInterrupt)
        code = Interrupted.exit_code if stopped else getattr(error, "exit_code", 1)
        with suppress(RuntimeError):  # the machine of the store may be gone
            first, code = map(int, store.compare_set(FAILED, "", f"{rank} {code}").split())
            if first != rank:
                raise SystemExit(code) from None
        if broken:
            raise Interrupted(f"the connection to another process broke; {AGAIN} (torch reports: {error})") from None
        raise
