"""A process that trains one run of a sweep after the other, and pays for its imports and features once."""

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path

from poolnet import process
from poolnet.training.config import TrainConfig


class Worker:
    """Such a process, from outside, and what it has in hand: settings and, once begun, a journal."""

    def __init__(self, path: Path, sweep: str):
        context = multiprocessing.get_context("spawn")  # the same on every system
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, path, sweep), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is the end of the connection
        self.config, self.run, self.epoch = None, "", 0

    def take(self, config: TrainConfig, begun: str) -> None:
        """Train this, or go on with the run of that name."""
        self.config, self.run, self.epoch = config, "", 0
        with contextlib.suppress(OSError):  # it is dead, and will be heard of
            self.connection.send((config, begun))

    def hear(self) -> tuple[str, str | int]:
        """What it says, see `_work`; ("died", why) when it has."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return "died", f"its process died, exit code {self.process.exitcode}"
        if kind == "begun":
            self.run = value
        return kind, value

    def stop(self) -> None:
        """See that it ends, which it was asked to."""
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, path: Path, sweep: str) -> None:
    """Takes (settings, name of the journal to go on with or ""), answers ("begun", name), ("epoch", number) for each,
    and ("ended", "" or what went wrong)."""
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
    """What went wrong, if anything. `opened` keeps data and features by pooling."""
    from poolnet.runs import run_record, train_run
    from poolnet.tracking import addresses
    from poolnet.training.train_loop import EpochRecord

    def say(line: object) -> None:
        if isinstance(line, EpochRecord):
            connection.send(("epoch", line.epoch))

    try:
        if config.pool not in opened:
            opened[config.pool] = train_run.open_data(config, True, say, path)
        splits, pooled = opened[config.pool]
        run = run_record.find(name) if name else train_run.create(config, False, splits, addresses.environment(), sweep)
        connection.send(("begun", run.name))
        with run.training():
            train_run.carry_out(run, splits, pooled, say=say, warn=lambda line: None)
    except Exception as error:  # whatever it was: the sweep reports it, and goes on with the others
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _stop_with_parent() -> None:
    """A sweep that is killed takes its workers along: what they have is in the journal."""
    wait([multiprocessing.parent_process().sentinel])
    signal.raise_signal(signal.SIGTERM)
