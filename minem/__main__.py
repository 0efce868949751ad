"""`python -m minem` is the same as `minem`."""

import os
import sys

from minem.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if "LOCAL_RANK" not in os.environ:
            raise
        # One of several ranks: torch's destructors aborted in 3 of 22 such exits, and all is on the disk by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
