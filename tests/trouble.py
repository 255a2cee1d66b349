"""The command where something is wrong: `python -m trouble WHAT`, and its words."""

import importlib
import itertools
import os
import signal
import sys
import time
from collections import Counter

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


def workers_die():
    """The worker of a sweep's second run once, and of the fourth whenever; prints what becomes of runs."""
    from poolnet.studies.crew import Crew

    real, doomed = Crew.train, Counter({1: 1, 3: 9})

    def train(self, tasks):
        configs = [task.config for task in tasks]
        for message in real(self, tasks):
            if message and message.kind != "epoch":
                index = configs.index(message.task.config)
                print(message.kind, index, message.error)
                if message.kind == "begun" and doomed[index]:
                    doomed[index] -= 1
                    os.kill(*self._client.run(os.getpid).values(), signal.SIGKILL)
            yield message

    Crew.train = train


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    main(sys.argv[2:])
