"""Start and control the process that uploads run records.

The process runs beside the training and publishes its record to MLflow. `upload_process.py` is the other end.

It is a process and not a thread for two reasons. MLflow takes seconds of Python time to import and some for every call,
and a training with small steps would have to wait for this. And a server that hangs cannot hold up the training at its
end.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time

from poolnet.errors import InputError
from poolnet.files import read_json
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses

ASK = "MLFLOW_RUN_ID?"  # what is written to it in place of a run's name, see `Publisher.refuse_stale`
LOOK_SECONDS = 2  # that a new run waits to hear whether `MLFLOW_RUN_ID` is another run's
STOP_SECONDS = 2.5  # for the last words of a run that was interrupted
START_SECONDS = 30  # for the imports, on a machine that is busy with much else


@dataclasses.dataclass
class Held:
    """What a tracking server has of a run.

    This is what is remembered here.
    """

    run_id: str = ""
    experiment_id: str = ""
    look: str = ""  # at the run's page
    done: list = dataclasses.field(default_factory=list)  # steps of `publication.Publication`
    metrics: int = 0  # records
    status: dict | None = None  # how the run ended, as in `end.json`
    model_id: str = ""
    version: int | None = None


@dataclasses.dataclass
class Published:
    """The content of a run's `published.json`.

    It has the server that the run belongs to, and a `Held` for each server.
    """

    home: str = ""  # its address without the password
    experiment: str = ""  # the name of the run's experiment there
    servers: dict = dataclasses.field(default_factory=dict)


def published(run: RunRecord) -> Published:
    """Read what is remembered of a run's publication.

    Raises `InputError` if the file is damaged.
    """
    path = run.folder / "published.json"
    if not path.exists():
        return Published()
    try:
        found = _checked(Published, read_json(path))
        servers = {key: _checked(Held, held) for key, held in found.servers.items()}
    except (TypeError, AttributeError):
        raise InputError(
            f"{path}: damaged; remove it, then: poolnet sync {run.name} (which looks up what the server has)"
        ) from None
    return dataclasses.replace(found, servers=servers)


def _checked(kind: type, value: dict) -> Published | Held:
    """Build a dataclass from stored values, and check them.

    Values that only a later version knows are left out. Raises `TypeError` if a value has another type, or if there is
    no value for the dataclass.
    """
    fields = [field for field in dataclasses.fields(kind) if field.name in value]
    if not fields or not all(isinstance(value[field.name], field.type) for field in fields):
        raise TypeError(kind.__name__)
    return kind(**{field.name: value[field.name] for field in fields})


class Publisher:
    """The upload process of a training, `poolnet sync --follow`.

    It is started before there is a run, so that its imports are done when the run begins.
    """

    def __init__(self, drain_timeout: float):
        self.drain_timeout = drain_timeout
        self.runs: list[RunRecord] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        detached = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
            if sys.platform == "win32"
            else {"start_new_session": True}  # Ctrl-C is the training's to answer
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "poolnet", "sync", "--follow", "--drain-timeout", str(drain_timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            **detached,
        )

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish the rest of the records, then stop the process.

        This is done even if the block raises. It may take as long as `close` waits, or `STOP_SECONDS` if the training
        was interrupted. If there is no run, the process is killed at once.
        """
        if not self.runs:
            self.process.kill()
        else:
            stopped = kind is not None and not issubclass(kind, Exception)
            with contextlib.suppress(InputError):
                self.close(STOP_SECONDS if stopped else None)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self._errors.close()

    def refuse_stale(self) -> None:
        """Refuse an `MLFLOW_RUN_ID` that belongs to another run.

        Raises `InputError` if the server says so in time.
        """
        if os.environ.get("MLFLOW_RUN_ID"):
            self._tell(f"{ASK}\n")
            if self._heard(START_SECONDS) and self._heard(LOOK_SECONDS) == b"":
                with contextlib.suppress(subprocess.TimeoutExpired):  # it refuses: its output ends just before it does
                    self.process.wait(LOOK_SECONDS)
        self.check()

    def _heard(self, seconds: float) -> bytes | None:
        """Return the next line that the process prints.

        The line is empty if the process has ended its output. It is None if no line comes within `seconds`.
        """
        said: list[bytes] = []
        listening = threading.Thread(target=lambda: said.append(self.process.stdout.readline()), daemon=True)
        listening.start()
        listening.join(seconds)
        return said[0] if said else None

    def add(self, run: RunRecord, carrier: str = "") -> None:
        """Publish this run from now on.

        `carrier` is a run that `mlflow run` made only to resume this one.
        """
        self.runs.append(run)
        self._tell(f"{run.name} {carrier}\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # `check` and `close` say what became of the process
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def check(self) -> None:
        """Raise `InputError` if the server's record contradicts the run."""
        if self.process.poll() == 2:
            raise InputError(self._last_line())

    def close(self, timeout: float | None = None) -> str | None:
        """Wait until the server has everything.

        The wait ends `drain_timeout` seconds after the last progress. If `timeout` is given, it ends after `timeout`
        seconds in all.

        Returns None if the server has everything, and otherwise the reason why not. Raises `InputError` as `check`
        does.
        """
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        progress, deadline = (), time.monotonic() + (timeout or max(START_SECONDS, self.drain_timeout))
        while self.process.poll() is None and time.monotonic() < deadline:
            seen = self._progress()
            if seen != progress and timeout is None:
                progress, deadline = seen, time.monotonic() + self.drain_timeout
            time.sleep(0.01)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.check()
        return None if self.process.returncode == 0 else self._last_line()

    @property
    def held(self) -> Held:
        """Return what the server has of the last run."""
        publication = published(self.runs[-1])
        return publication.servers.get(publication.home, Held())

    def _progress(self) -> tuple[int, ...]:
        """Return when each run was last published.

        The times are those at which `published.json` of each run was last changed, in ns.
        """
        times = []
        for run in self.runs:
            with contextlib.suppress(OSError):
                times.append((run.folder / "published.json").stat().st_mtime_ns)
        return tuple(times)

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            lines[-1].removeprefix("poolnet: error: ")
            if lines
            else f"{addresses.shown(addresses.own())}: no answer for {self.drain_timeout:g} s"
        )
