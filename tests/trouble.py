"""The command where something is wrong: `python -m trouble WHAT`, and its words."""

import importlib
import itertools
import os
import sys
import time

from poolnet.cli import main

ROOM = 20_000  # bytes of one file on the full disk


def full_disk():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))


def clock_jumps_back():
    real, calls = time.time_ns, itertools.count()
    time.time_ns = lambda: real() - 3_600 * 10**9 * (next(calls) > 3)


def nobody():
    for name in ("poolnet.runs.train_run", "poolnet.training.features"):  # while their folders can be read
        importlib.import_module(name)
    if os.geteuid() == 0:  # to whom no folder is read-only
        os.setgid(65534)
        os.setuid(65534)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    main(sys.argv[2:])
