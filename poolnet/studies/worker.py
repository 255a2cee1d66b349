"""A worker process that trains runs of a sweep.

It trains one run after the other. So imports and features cost time only once.
"""

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path

from poolnet import process
from poolnet.training.config import TrainConfig


class Worker:
    """A worker process, as the sweep sees it.

    It also holds the worker's current task: the settings and, once the run has begun, the name of its record.
    """

    def __init__(self, path: Path, sweep: str):
        context = multiprocessing.get_context("spawn")  # the same on every system
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, path, sweep), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is the end of the connection
        self.config, self.run, self.epoch = None, "", 0

    def take(self, config: TrainConfig, begun: str) -> None:
        """Give the worker a run to train.

        The run is new, or it is the run named `begun`, which the worker continues.
        """
        self.config, self.run, self.epoch = config, "", 0
        with contextlib.suppress(OSError):  # it is dead, and will be heard of
            self.connection.send((config, begun))

    def hear(self) -> tuple[str, str | int]:
        """Return the next message of the worker.

        For the messages see `_work`. If the worker has died, the message is ("died", reason).
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return "died", f"its process died, exit code {self.process.exitcode}"
        if kind == "begun":
            self.run = value
        return kind, value

    def stop(self) -> None:
        """Make sure that the worker process ends.

        The caller has already asked it to end. After 10 seconds it is killed.
        """
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, path: Path, sweep: str) -> None:
    """Train the runs that arrive over the connection.

    The process receives (settings, name of the run record to continue, or ""). For each, it answers ("begun", name),
    ("epoch", number), and at last ("ended", error). The error is "" if nothing went wrong.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to answer
    process.install()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    opened = {}
    with contextlib.suppress(EOFError, OSError, process.Stop):  # the sweep is over
        while True:
            config, name = connection.recv()
            connection.send(("ended", _train(connection, opened, path, config, name, sweep)))


def _train(
    connection: Connection, opened: dict[str, tuple], path: Path, config: TrainConfig, name: str, sweep: str
) -> str:
    """Train one run and return the error, if any.

    The text is empty if nothing went wrong. `opened` keeps data and features by pooling.
    """
    from poolnet.runs import run_record, train_run
    from poolnet.tracking import addresses
    from poolnet.training.train_loop import EpochRecord

    def echo(line: object) -> None:
        if isinstance(line, EpochRecord):
            connection.send(("epoch", line.epoch))

    try:
        if config.pool not in opened:
            opened[config.pool] = train_run.open_data(config, True, echo, path)
        splits, pooled = opened[config.pool]
        run = run_record.find(name) if name else train_run.create(config, False, splits, addresses.environment(), sweep)
        connection.send(("begun", run.name))
        with run.training():
            train_run.carry_out(run, splits, pooled, echo=echo, echo_warning=lambda line: None)
    except Exception as error:  # whatever it was: the sweep reports it, and goes on with the others
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _stop_with_parent() -> None:
    """Stop this worker when its parent process dies.

    So a sweep that is killed stops its workers too. Their training so far is in the run record.
    """
    wait([multiprocessing.parent_process().sentinel])
    signal.raise_signal(signal.SIGTERM)
