"""The workers that train the runs of a sweep, by Dask.

They are processes on this machine, or those of a scheduler that is there already. Each worker has one run at a time.
So the order of the runs is kept, a worker that dies costs one run only, and a worker may be left out.
"""

import contextlib
import dataclasses
import itertools
import logging
import pickle
import queue
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from multiprocessing import resource_tracker

import dask
import distributed
import numpy as np
from distributed import Client, Future, LocalCluster, Security

from poolnet.errors import InputError, RunError
from poolnet.runs import provenance
from poolnet.runs.record_transfer import Files
from poolnet.studies import worker
from poolnet.studies.worker import Job, Outcome, Task
from poolnet.text import Echo
from poolnet.training.config import TrainConfig

RETRIES = 3  # of a run whose worker died
LOOK_SECONDS = 1.0  # between two looks at which workers there are
ANSWER_SECONDS = 30  # in which a scheduler has to answer
CLOSE_SECONDS = 3  # in which a scheduler hears that we leave; if it is gone, that cannot be
START_SECONDS = 120  # for a first process of our own, on a machine that is busy with much else
SILENT = logging.CRITICAL + 1  # Dask calls a client that has left critical
OWN = {  # the configuration of a scheduler and workers of our own
    "distributed.nanny.pre-spawn-environ": {},  # which would change the environment of this process too
    "distributed.scheduler.http.routes": [],  # no web page is served
    "distributed.worker.http.routes": [],
    "distributed.admin.low-level-log-length": 1000,
    "distributed.admin.tick.interval": "1 s",  # this and the next cost time beside a training
    "distributed.admin.system-monitor.interval": "5 s",
    "distributed.worker.profile.enabled": False,
    "distributed.deploy.lost-worker-timeout": "365 days",  # after it Dask ends a worker that is just starting again
}


@dataclasses.dataclass(frozen=True)
class Message:
    """What became known of a run.

    `kind` is `begun`, `epoch`, `again` (its worker died, and another one shall train it) or `ended`.
    """

    kind: str
    task: Task
    epoch: int = 0
    error: str = ""  # of a run that has ended; empty if nothing went wrong
    files: Files | None = None  # of a record that came back from elsewhere


@dataclasses.dataclass
class _Flight:
    """A task that a worker has."""

    task: Task
    address: str  # of the worker
    future: Future
    sends_data: bool = False  # and does not train


class Crew:
    """The workers of a sweep.

    `cluster` is the address of a scheduler, or empty. Our own workers end with the `with` block. Others stay, and the
    tasks that they have are cancelled. Workers with other versions are left out, unless `any_version`.
    """

    def __init__(self, job: Job, cluster: str, any_version: bool, echo: Echo, echo_warning: Echo):
        self.job, self.address, self.any_version = job, cluster, any_version
        self.echo, self.echo_warning = echo, echo_warning
        self._stack = contextlib.ExitStack()
        self._cluster: LocalCluster | None = None
        self._client: Client | None = None
        self._news: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()  # by key: an epoch, or a task's result
        self._flights: dict[str, _Flight] = {}  # by the key of the task
        self._deaths: Counter[TrainConfig] = Counter()
        self._refused: dict[str, str] = {}  # why, by the address of the worker
        self._workers: dict[str, str] = {}  # the names of those that are there, by address
        self._looked = 0.0
        self._numbers = itertools.count()
        self._data: Future | None = None  # the data set on its way to workers
        self._sent: set[str] = set()  # addresses of workers that got it

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the scheduler, or end the workers of our own."""
        self._stack.close()

    def start(self, count: int) -> None:
        """Start `count` processes, or connect to the scheduler.

        Processes begin to import what they need. Raises `RunError` if the scheduler does not answer.
        """
        if self._client or not count:
            return
        for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(SILENT)  # what a user has to know, we say
        if self.address:
            self._connect()
        else:
            try:
                self._start_own(count)
            except (OSError, RuntimeError) as error:  # no loopback address, or no more processes
                raise RunError(f"Dask cannot start worker processes here ({error})") from None
        assert self._client
        self._stack.callback(self._client.close, timeout=CLOSE_SECONDS)
        self._client.subscribe_topic(self.job.topic, lambda event: self._news.put((event[1]["key"], event[1]["epoch"])))

    def _connect(self) -> None:
        try:
            self._client = Client(self.address, timeout=ANSWER_SECONDS, set_as_default=False)
        except ValueError as error:
            raise InputError(f"--cluster: found {self.address!r}, expected as tcp://HOST:8786 ({error})") from None
        except (OSError, TypeError, RuntimeError) as error:  # TypeError: tls:// without certificates
            raise RunError(f"{self.address}: no Dask scheduler answers ({error or type(error).__name__})") from None
        if link := self._client.dashboard_link:
            self.echo(f"Dashboard: {link}")

    def _start_own(self, count: int) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        dask.config.set({**OWN, "temporary-directory": folder})
        with _no_ctrl_c():
            self._cluster = LocalCluster(
                n_workers=0,
                threads_per_worker=1,
                memory_limit=0,  # Dask kills a worker at its share of the machine
                security=Security.temporary(),  # or any user of this machine could run code as this one
                dashboard_address="127.0.0.1:0",
                local_directory=folder,
                preload=[worker.__name__],
                silence_logs=SILENT,
            )
        self._stack.callback(self._cluster.close)
        self._cluster.scale(count)
        self._client = Client(self._cluster, set_as_default=False)

    def train(self, tasks: deque[Task]) -> Iterator[Message | None]:
        """Train runs and yield what becomes known of them.

        That is None, at least once in `LOOK_SECONDS`, if it is nothing. The order of the tasks is kept. Raises
        `RunError` if the scheduler is gone or no worker can be used.
        """
        began = time.monotonic()
        while tasks or self._flights:
            self._look(began)
            yield from self._lost(tasks)
            self._hand_out(tasks)
            yield None
            with contextlib.suppress(queue.Empty):
                news = self._news.get(timeout=LOOK_SECONDS)
                while True:
                    yield from self._hear(*news, tasks)
                    news = self._news.get_nowait()

    def _look(self, began: float) -> None:
        """See which workers there are, once in a while."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        assert self._client
        try:
            present = self._client.sync(self._client.scheduler.identity, callback_timeout=ANSWER_SECONDS)["workers"]
        except (OSError, TimeoutError, RuntimeError, AttributeError):  # whatever it finds missing when it is gone
            raise self._gone() from None
        if self._cluster and not present and not self._workers and time.monotonic() - began > START_SECONDS:
            raise RunError(f"no worker process has started in {START_SECONDS} s")
        if not present and not self._workers and not self._cluster and not self._looked:
            self.echo(f"Waiting for a worker at {self.address} ...")
        self._looked = time.monotonic()
        self._workers = {address: str(worker["name"]) for address, worker in present.items()}
        if present and self._refused.keys() >= present.keys():
            raise RunError(f"{self.address or 'this machine'}: no worker takes runs, see above")

    def _gone(self) -> RunError:
        return RunError(f"{self.address or 'Dask'}: the scheduler is gone; the runs that have come back are saved")

    def _hand_out(self, tasks: deque[Task]) -> None:
        busy = {flight.address for flight in self._flights.values()}
        for address in self._workers:
            if tasks and address not in busy and address not in self._refused:
                task = tasks.popleft()
                load = pickle.dumps((self.job, task))
                self._submit(task, address, worker.train, provenance.software(), self.any_version, load)

    def _submit(self, task: Task, address: str, function: Callable[..., object], *arguments: object) -> None:
        assert self._client
        assert self._client.loop
        key = f"{self.job.topic}-{next(self._numbers)}"
        with warnings.catch_warnings(action="ignore"):  # of a data set, that it is large
            future: Future = self._client.submit(function, *arguments, key=key, workers=[address], pure=False)
        self._flights[key] = _Flight(task, address, future, function is worker.receive)
        self._client.loop.add_callback(self._fetch, future)

    async def _fetch(self, future: Future) -> None:
        """Wait for a result, in Dask's own loop.

        So the wait ends with the client. A thread that waits for Dask never returns once the client is closed.
        A worker that dies takes its result along. Then the wait is endless, until `_died` cancels the task.
        """
        assert self._client
        try:
            self._news.put((str(future.key), await self._client.gather(future, asynchronous=True)))
        except Exception as error:  # of the worker, or `CancelledError`
            self._news.put((str(future.key), error))

    def _lost(self, tasks: deque[Task]) -> Iterator[Message]:
        """Put back the tasks of workers that are gone."""
        for key, flight in [*self._flights.items()]:
            if flight.address not in self._workers and not flight.future.done():
                yield from self._died(key, tasks)

    def _died(self, key: str, tasks: deque[Task]) -> Iterator[Message]:
        flight = self._flights.pop(key)
        flight.future.cancel()
        self._deaths[flight.task.config] += 1
        if self._deaths[flight.task.config] > RETRIES:
            error = f"given up, since {self._deaths[flight.task.config]} workers died that trained it"
            yield Message("ended", flight.task, error=error)
        else:
            tasks.appendleft(flight.task)
            yield Message("again", flight.task)

    def _hear(self, key: str, news: object, tasks: deque[Task]) -> Iterator[Message]:
        flight = self._flights.get(key)
        if not flight:
            return
        if isinstance(news, int):
            yield Message("epoch" if news else "begun", flight.task, news)
        elif isinstance(news, CancelledError):  # and not by us
            raise self._gone()
        elif isinstance(news, distributed.KilledWorker):
            yield from self._died(key, tasks)
        else:
            del self._flights[key]
            if isinstance(news, Outcome):
                yield from self._take(flight, news, tasks)
            else:  # the data set was sent; or the worker cannot do what it shall
                tasks.appendleft(flight.task)
                if isinstance(news, Exception):
                    self._refuse(flight.address, f"{type(news).__name__}: {news}")

    def _take(self, flight: _Flight, outcome: Outcome, tasks: deque[Task]) -> Iterator[Message]:
        if outcome.refused:
            tasks.appendleft(flight.task)
            self._refuse(flight.address, outcome.refused)
        elif outcome.lacks and self.job.own:
            error = f"{self.job.path}: has changed since the sweep began"
            yield Message("ended", flight.task, error=error)
        elif outcome.lacks and flight.address in self._sent:
            tasks.appendleft(flight.task)
            self._refuse(flight.address, f"{self.job.path} was sent to it, and is not as it was when the sweep began")
        elif outcome.lacks:
            self._send_data(flight)
        else:
            yield Message("ended", flight.task, error=outcome.error, files=outcome.files)
        if not any(flight.sends_data for flight in self._flights.values()):
            self._data = None  # so that Dask forgets it

    def _refuse(self, address: str, why: str) -> None:
        self._refused[address] = why
        name = self._workers.get(address, address)
        self.echo_warning(f"worker {name} at {address}: takes no runs ({' '.join(why.split())})")

    def _send_data(self, flight: _Flight) -> None:
        """Send the data set to a worker, or to others by way of it."""
        assert self._client
        self._sent.add(flight.address)
        if not self._data:
            try:
                content = np.fromfile(self.job.path, np.uint8)
            except OSError as error:
                raise RunError(
                    f"{self.job.path}: cannot be read any more ({error}); put it back, then sweep again"
                ) from None
            with warnings.catch_warnings(action="ignore"):  # that it is large
                self._data = self._client.submit(
                    np.asarray, content, key=f"{self.job.topic}-data-{next(self._numbers)}",
                    workers=[flight.address], allow_other_workers=True,
                )  # fmt: skip
        self._submit(flight.task, flight.address, worker.receive, self.job, self._data)


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends.

    The threads and processes that are started in it never get it. So processes do not print a traceback while they
    start. On Windows nothing is done.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # else a process that starts does that, which ends the hold
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
