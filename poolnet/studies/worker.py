"""Worker processes that train runs of a sweep.

A worker trains one run after the other. So imports and features cost time only once. Workers are started before it is
known what is left to train, so that their imports are done then.
"""

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from poolnet import process
from poolnet.training.config import TrainConfig

if TYPE_CHECKING:
    from poolnet.data.dataset import Dataset
    from poolnet.runs.train_run import Pooled
    from poolnet.training.optimum import Optimum

MEMORY = 1 << 30  # bytes of images and features that a worker keeps, for its next runs on the same
Task = tuple[TrainConfig, str]  # the settings of a run, and the name of its record if it was begun before


@dataclasses.dataclass(frozen=True)
class Message:
    """What a worker says about its run.

    `kind` is `begun`, `epoch`, `ended`, or `died` if the worker process died.
    """

    kind: str
    run: str = ""  # the name of its record, once it has begun
    epoch: int = 0
    error: str = ""  # empty if nothing went wrong


class Worker:
    """A worker process, as the sweep sees it.

    It also holds the worker's current task: the settings and, once the run has begun, the name of its record.
    """

    config: TrainConfig
    run: str
    epoch: int

    def __init__(self, path: Path, sweep: str, figures: bool, optimum: bool):
        context = multiprocessing.get_context("spawn")  # the same on every system
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, path, sweep, figures, optimum), daemon=True)
        with _no_ctrl_c():
            self.process.start()
        theirs.close()  # so that its death is the end of the connection

    def take(self, task: Task) -> None:
        """Give the worker a run to train."""
        self.config, self.run, self.epoch = task[0], "", 0
        with contextlib.suppress(OSError):  # it is dead, and will be heard of
            self.connection.send(task)

    def hear(self) -> Message:
        """Return the next message of the worker."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Message("died", error=f"its process died, exit code {self.process.exitcode}")
        self.run = message.run or self.run
        return message

    def stop(self) -> None:
        """Make sure that the worker process ends.

        The caller has already asked it to end. After 10 seconds it is killed.
        """
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Crew:
    """The worker processes of a sweep.

    They end with the `with` block. With `figures`, those of each run are drawn. With `optimum`, it is found for each
    pooling.
    """

    def __init__(self, path: Path, sweep: str, figures: bool, optimum: bool):
        self.arguments = (path, sweep, figures, optimum)
        self.workers: list[Worker] = []
        self.idle: deque[Worker] = deque()

    def start(self, count: int) -> None:
        """Start workers, which wait for runs to train."""
        for _ in range(count):
            self.workers.append(Worker(*self.arguments))
            self.idle.append(self.workers[-1])

    def train(self, tasks: deque[Task], count: int) -> Iterator[tuple[Worker, Message]]:
        """Train runs with `count` workers and yield their messages.

        The order of the tasks is kept. If tasks are left, a worker that dies is replaced. Its run is not tried again.
        """
        busy: list[Worker] = []
        while tasks or busy:
            while tasks and len(busy) < count:
                if not self.idle:
                    self.start(1)
                busy.append(self.idle.popleft())
                busy[-1].take(tasks.popleft())
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                message = worker.hear()
                yield worker, message
                if message.kind in ("ended", "died"):
                    busy.remove(worker)
                if message.kind == "ended":
                    self.idle.append(worker)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.terminate()  # asked all at once, to finish the batch in hand
        for worker in self.workers:
            worker.stop()


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends.

    Processes that are started in it never get it. So they do not print a traceback while they start. On Windows nothing
    is done.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # else `start` does that, which ends the hold
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Opened:
    """A data set or fold that a worker opens for a pooling.

    The optimum depends on nothing else, so it is found once.
    """

    def __init__(self, open_data: "Callable[[], tuple[Dataset, Pooled]]"):
        self.open_data = open_data

    @functools.cached_property
    def data(self) -> "tuple[Dataset, Pooled]":
        return self.open_data()

    @functools.cached_property
    def optimum(self) -> "Optimum | None":
        from poolnet.training.optimum import find_optimum

        splits, pooled = self.data
        return find_optimum(pooled["train"], splits.train.y) if pooled else None

    def size(self) -> int:
        """Return the bytes of the data in memory."""
        if "data" not in vars(self):
            return 0
        splits, pooled = self.data
        return sum(array.nbytes for array in (*(pooled or {}).values(), *(s.X for s in splits if s.X is not None)))

    def close(self) -> None:
        """Forget the data, which are opened again if needed."""
        vars(self).pop("data", None)


def _take(opened: dict[tuple[str, str], _Opened], key: tuple[str, str], new: _Opened) -> _Opened:
    """Return what is opened under a key, or `new`.

    If all of it takes more than `MEMORY`, what was used longest ago is closed.
    """
    opened[key] = taken = opened.pop(key, new)  # the last one used is the last
    for other in [*opened.values()][:-1]:
        if sum(each.size() for each in opened.values()) > MEMORY:
            other.close()
    return taken


def _work(connection: Connection, path: Path, sweep: str, figures: bool, optimum: bool) -> None:
    """Train the runs that arrive over the connection.

    For each task that arrives, this process sends messages: `begun`, `epoch` for each epoch, and at last `ended`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to answer, and on Windows it gets here
    process.install()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    opened: dict[tuple[str, str], _Opened] = {}
    with contextlib.suppress(EOFError, OSError, process.Stop):  # the sweep is over
        importlib.import_module("poolnet.runs.train_run")  # seconds, before there is a task
        while True:
            error = _train(connection, opened, path, connection.recv(), sweep, figures, optimum)
            connection.send(Message("ended", error=error))


def _train(
    connection: Connection,
    opened: dict[tuple[str, str], _Opened],
    path: Path,
    task: Task,
    sweep: str,
    figures: bool,
    optimum: bool,
) -> str:
    """Train one run and return the error, if any.

    The text is empty if nothing went wrong. `opened` keeps what was opened, by pooling and fold.
    """
    from poolnet.runs import run_record, train_run
    from poolnet.tracking import addresses
    from poolnet.training.train_loop import EpochRecord

    def echo(line: object) -> None:
        if isinstance(line, EpochRecord):
            connection.send(Message("epoch", epoch=line.epoch))

    try:
        config, name = task
        new = _Opened(functools.partial(train_run.open_training_data, config, True, echo, path))
        data = _take(opened, (config.pool, config.fold), new)
        splits, pooled = data.data
        run = (
            run_record.RunRecord(run_record.folder() / name)
            if name
            else train_run.create(config, optimum and bool(pooled), splits, addresses.environment(), sweep)
        )
        connection.send(Message("begun", run.name))
        with run.training():
            best = data.optimum if run.record["optimum"] else None
            train_run.carry_out(
                run, splits, pooled, echo=echo, echo_warning=lambda line: None, figures=figures, best=best
            )
    except Exception as error:  # whatever it was: the sweep reports it, and goes on with the others
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _stop_with_parent() -> None:
    """Stop this worker when its parent process dies.

    So a sweep that is killed stops its workers too. Their training so far is in the run record.
    """
    parent = multiprocessing.parent_process()
    assert parent  # of a worker, it is the sweep
    wait([parent.sentinel])
    signal.raise_signal(signal.SIGTERM)
