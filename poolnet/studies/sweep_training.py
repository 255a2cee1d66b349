"""Train the missing runs of a sweep, here or elsewhere."""

import contextlib
import dataclasses
import sys
import threading
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING

from poolnet.errors import RunError
from poolnet.files import locked
from poolnet.runs import record_transfer, run_record
from poolnet.runs.run_record import RunRecord
from poolnet.studies.discovery import take_record
from poolnet.studies.sweep_results import Result, Sweep
from poolnet.text import Echo, progress
from poolnet.tracking import addresses
from poolnet.tracking.publisher import Publisher
from poolnet.tracking.training_runs import SCORES
from poolnet.training.config import TrainConfig

if TYPE_CHECKING:
    from poolnet.studies.crew import Crew, Message
    from poolnet.studies.worker import Task

DRAW_SECONDS = 0.5  # between two looks at which runs are published


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who trains the runs of a sweep.

    They are `count` processes on this machine, or the workers of the Dask scheduler at the address `cluster`. Those
    with other versions of poolnet, torch or NumPy are left out, unless `any_version`.
    """

    count: int = 1
    cluster: str = ""
    any_version: bool = False


class Training:
    """The training of a sweep's runs, by workers that end with it.

    After a `with` block that went well, they end while this process goes on; `join` waits for that.
    """

    def __init__(self, sweep: Sweep, workers: Workers, figures: bool, echo: Echo, echo_warning: Echo):
        self.sweep, self.workers, self.figures = sweep, workers, figures
        self.echo, self.echo_warning = echo, echo_warning
        self._crew: Crew | None = None
        self._closing = threading.Thread(target=self._close)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._close()
        else:
            self._closing.start()

    def _close(self) -> None:
        if self._crew:
            self._crew.close()

    def join(self) -> None:
        if self._closing.ident:
            self._closing.join()

    def start(self, runs: int) -> "Crew | None":
        """Start the workers for so many runs, if there are any.

        Their imports are done while this process asks the server.
        """
        if not runs or self._crew:
            return self._crew
        from poolnet.studies.crew import Crew  # Dask takes half a second
        from poolnet.studies.worker import Job

        job = Job(
            str(self.sweep.path.absolute()),
            self.sweep.path.stem,
            self.sweep.data_sha256,
            self.sweep.name,
            self.figures,
            self.sweep.study.optimum,
            addresses.environment(),
            topic=f"poolnet-{uuid.uuid4().hex}",
            own=not self.workers.cluster,
        )
        self._crew = Crew(job, self.workers.cluster, self.workers.any_version, self.echo, self.echo_warning)
        self._crew.start(min(self.workers.count, runs))
        return self._crew

    def train(self, todo: list[Result], begun: dict[tuple, str], publisher: Publisher) -> None:
        """Train runs in this order, which is seed by seed.

        So a sweep that is cut off has pairs. `begun` are the records of runs to continue, by key. On a terminal, a bar
        shows how far the runs are. Otherwise there is a line for each run.
        """
        crew = self.start(len(todo))
        if not crew:
            return
        epochs = sum(result.config.epochs for result in todo)
        with contextlib.ExitStack() as away, progress(length=epochs, width=10) as bar:
            tasks = deque(self._task(result, begun.get(self.sweep.key(result.config), ""), away) for result in todo)
            shown = _Shown(bar, len(todo), publisher)
            for message in crew.train(tasks):
                if message:
                    self._hear(message, publisher)
                    shown.hear(message)
                if sys.stderr.isatty():
                    shown.draw()

    def _task(self, result: Result, name: str, away: contextlib.ExitStack) -> "Task":
        """Describe a run to a worker.

        If it was begun, it has a name. A worker elsewhere gets its record, which nobody else may go on with until
        `away` ends.
        """
        from poolnet.studies.worker import Task

        config, device = result.config, self.sweep.device(result.config)
        if not name or not self.workers.cluster:
            return Task(config, device, name or run_record.new_name(run_record.stem_of(config)))
        away.enter_context(locked(run_record.folder() / name / "lock", wait=0))
        return Task(config, device, name, record_transfer.pack(run_record.folder() / name))

    def _hear(self, message: "Message", publisher: Publisher) -> None:
        """Take what has become known of a run."""
        name, path = message.task.run, run_record.folder() / message.task.run
        if message.kind == "again":
            self.echo_warning(f"{name}: its worker died; another one trains it")
        if message.files:
            self._receive(path.name, message.files)
        is_here = (path / "record.json").exists()
        if is_here and message.kind in ("begun", "ended") and all(run.name != name for run in publisher.runs):
            publisher.add(RunRecord(path))
        if message.kind == "ended":
            result = self.sweep.result(message.task.config)
            result.trained, result.error = True, message.error
            if is_here:
                take_record(result, RunRecord(path))
            if result.done:  # though its worker may have died just then
                result.error = ""
            if result.error:
                self.echo_warning(f"{name}: {result.error}")
            elif not sys.stderr.isatty():  # else the bar shows how far it is
                self.echo(f"{name}: " + ", ".join(f"{score} {result.scores[score]:.4f}" for score in SCORES))

    def _receive(self, name: str, files: record_transfer.Files) -> None:
        """Write a record that a worker elsewhere has sent."""
        path, data = run_record.folder() / name, self.sweep.path
        try:
            record_transfer.unpack(path, files, {"path": str(data.absolute()), "name": data.stem})
        except OSError as error:
            raise RunError(f"{path}: the record cannot be written ({error}); make room, then sweep again") from None


class _Shown:
    """What the bar on a terminal says: runs, and epochs of them."""

    def __init__(self, bar, runs: int, publisher: Publisher):
        self.bar, self.runs, self.publisher = bar, runs, publisher
        self.before, self.published, self.looked = len(publisher.runs), 0, 0.0
        self.running: set[TrainConfig] = set()
        self.epochs: dict[TrainConfig, int] = {}
        self.done = self.failed = 0

    def hear(self, message: "Message") -> None:
        config, ended = message.task.config, message.kind == "ended"
        (self.running.discard if ended or message.kind == "again" else self.running.add)(config)
        self.epochs[config] = config.epochs if ended else message.epoch
        self.done += ended and not message.error
        self.failed += ended and bool(message.error)

    def draw(self) -> None:
        if time.monotonic() - self.looked > DRAW_SECONDS:
            self.looked, self.published = time.monotonic(), max(0, self.publisher.uploaded() - self.before)
        self.bar.label = (
            f"{self.done} of {self.runs} done, {len(self.running)} running, {self.failed} failed, "
            f"{self.published} published"
        )
        self.bar.update(sum(self.epochs.values()) - self.bar.pos)
