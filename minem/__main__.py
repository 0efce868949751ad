"""`minem`, which is `python -m minem`: signals first, so that they stop it from the first moment to the last.

minem train & sleep 0.2; kill %1; wait %1; echo $?        # 3
"""

import os
import signal
import sys
from contextlib import suppress

from minem.parallel.signals import STOPS, stop_at_once


def run() -> None:
    """The command line in a process of its own."""
    for number in STOPS:
        signal.signal(number, stop_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # `minem.parallel.launch` starts processes with them blocked
    from minem.cli import main  # here: it takes a while

    try:
        main()
    except SystemExit as end:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(end.code or 0))  # all is on the disk, and torch's destructors abort now and then


if __name__ == "__main__":
    run()
