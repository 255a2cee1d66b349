"""Train runs of a sweep in a worker process of Dask.

Nothing slow is imported before there is a run to train, since the scheduler imports this module too.
"""

import contextlib
import dataclasses
import functools
import importlib
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from distributed import get_worker
from distributed.core import Status
from distributed.worker import Worker

from poolnet.errors import InputError
from poolnet.files import home, replacing
from poolnet.runs import provenance, record_transfer, run_record
from poolnet.runs.record_transfer import Files
from poolnet.runs.run_record import RunRecord
from poolnet.training.config import TrainConfig
from poolnet.training.device import resolve_device

if TYPE_CHECKING:
    from poolnet.data.dataset import Dataset
    from poolnet.runs.train_run import Pooled
    from poolnet.training.optimum import Optimum

MEMORY = 1 << 30  # bytes of images and features that a worker keeps, for its next runs on the same
SAY_SECONDS = 1.0  # between two messages about the epochs of a run
_one_run = threading.Lock()  # at a time in a process, since the number of torch's threads is the process's
_opened: "dict[tuple[str, str, str], _Opened]" = {}  # by digest of the data set, pooling and fold


@dataclasses.dataclass(frozen=True)
class Job:
    """What the runs of a sweep share."""

    path: str  # of the data, on the machine that sweeps; no Path, since the worker may have another system
    data_name: str
    data_sha256: str
    sweep: str
    figures: bool
    optimum: bool
    server: Mapping[str, str]  # as `tracking` in `record_form.FORM`
    topic: str  # of Dask's events, under which workers report
    own: bool  # whether the worker is the sweep's own, and writes into the same folder of local state


@dataclasses.dataclass(frozen=True)
class Task:
    """A run to train."""

    config: TrainConfig
    device: str  # not `auto`
    run: str  # the name of its record, whether it was begun or not
    files: Files | None = None  # of the record if it was begun, where the worker does not have it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Either the worker was `refused`, or it `lacks` the data, or there is a run, which has failed if there is an `error`.
    """

    refused: str = ""  # why
    lacks: bool = False
    error: str = ""
    files: Files | None = None  # of the record, where the machine that sweeps does not have it


class Unwanted(BaseException):
    """The sweep does not want the run any more."""


async def dask_setup(worker: Worker) -> None:
    """Prepare a worker of the sweep's own; Dask calls it.

    Ctrl-C is the sweep's to answer. The imports take seconds, so they begin before there is a run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_import, daemon=True).start()


def _import() -> None:
    """Import what a run needs.

    It fails if the worker ends meanwhile. If it fails for another reason, the first run does too, and says so.
    """
    with contextlib.suppress(Exception):
        importlib.import_module("poolnet.runs.train_run")


def train(software: dict[str, str], any_version: bool, job_and_task: bytes) -> Outcome:
    """Train one run in this worker process.

    `software` are the versions on the machine that sweeps. A worker with others is refused, unless `any_version`.
    """
    with _one_run:
        differs = provenance.other_software(software)
        if differs and not any_version:
            return Outcome(refused=differs)
        job, task = pickle.loads(job_and_task)
        try:
            _choose_device(job, task)
            opened = _open(job, task.config)
        except (InputError, OSError) as error:
            return Outcome(refused=str(error))
        if opened is None:
            return Outcome(lacks=True)
        if job.own:
            return Outcome(error=_train(job, task, opened, run_record.folder() / task.run, differs))
        with tempfile.TemporaryDirectory(dir=get_worker().local_directory) as folder:
            path = Path(folder) / task.run
            return Outcome(error=_train(job, task, opened, path, differs), files=record_transfer.pack(path))


def _choose_device(job: Job, task: Task) -> None:
    """Check that the device is here; of several GPUs, take one.

    Workers of the sweep's own are numbered, and take one each. Others are started with one each.
    """
    resolve_device(task.device)
    if job.own and task.device == "cuda":
        import torch

        torch.cuda.set_device(int(get_worker().name) % torch.cuda.device_count())


def receive(job: Job, content: np.ndarray) -> None:
    """Keep the data set that the sweep has sent, as bytes.

    So the next sweep, and the other workers of this machine, find it.
    """
    with replacing(_copy(job)) as part:
        content.tofile(part)


def _copy(job: Job) -> Path:
    """Return where a worker keeps a data set that was sent."""
    return home() / "data" / "received" / job.data_sha256[:16] / f"{job.data_name}.npz"


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


def _take(key: tuple[str, str, str], new: _Opened) -> _Opened:
    """Return what is opened under a key, or `new`.

    If all of it takes more than `MEMORY`, what was used longest ago is closed.
    """
    _opened[key] = taken = _opened.pop(key, new)  # the last one used is the last
    for other in [*_opened.values()][:-1]:
        if sum(each.size() for each in _opened.values()) > MEMORY:
            other.close()
    return taken


def _open(job: Job, config: TrainConfig) -> _Opened | None:
    """Open the data set where it has the right digest, or None.

    It is at the path that it has on the machine that sweeps, or it was sent.
    """
    from poolnet.runs import train_run

    key = (job.data_sha256, config.pool, config.fold)
    if key not in _opened:
        for path in (Path(job.path), _copy(job)):
            new = _Opened(functools.partial(train_run.open_training_data, config, True, lambda line: None, path))
            with contextlib.suppress(InputError, OSError):  # what else is at that path here
                if path.exists() and new.data[0].sha256 == job.data_sha256:
                    return _take(key, new)
        return None
    return _take(key, _opened[key])


def _train(job: Job, task: Task, opened: _Opened, path: Path, differs: str) -> str:
    """Train the run in the record at `path` and return the error, if any.

    Whatever goes wrong is returned, since the sweep goes on with its other runs.
    """
    from poolnet.runs import train_run

    try:
        splits, pooled = opened.data
        if task.files is not None:
            record_transfer.unpack(path, task.files, {"path": str(splits.path)})
        if (path / "record.json").exists():
            run = RunRecord(path)
        else:
            wanted = job.optimum and bool(pooled)
            run = train_run.create(
                task.config, wanted, splits, job.server, job.sweep, device=task.device, differs=differs, path=path
            )
        report = _Report(job.topic)
        with run.training():
            best = opened.optimum if run.record["optimum"] else None
            train_run.carry_out(run, splits, pooled, report.check, report.echo, report.echo, job.figures, best)
    except Unwanted:
        return "stopped"
    except Exception as error:  # whatever it was
        return " ".join(str(error).split()) or type(error).__name__
    return ""


class _Report:
    """Tell the sweep how far a run is, and hear if it is unwanted."""

    def __init__(self, topic: str):
        self.topic, self.worker, self.key = topic, get_worker(), get_worker().get_current_task()
        self._say(0)

    def check(self) -> None:
        """Raise `Unwanted` if the task was cancelled.

        Or the worker closes, for example since its scheduler is gone.
        """
        task = self.worker.state.tasks.get(self.key)
        closes = self.worker.status in (Status.closing, Status.closed, Status.failed)
        if closes or task is None or task.state not in ("executing", "long-running"):
            raise Unwanted

    def echo(self, line: object) -> None:
        epoch = getattr(line, "epoch", 0)  # of a record; other lines are for a person
        if epoch and time.monotonic() - self.said > SAY_SECONDS:
            self._say(epoch)

    def _say(self, epoch: int) -> None:
        self.said = time.monotonic()
        self.worker.log_event(self.topic, {"key": self.key, "epoch": epoch})
