"""The process beside the training that carries its journal to MLflow.

A process and not a thread: MLflow takes seconds of Python to import and some for every call, which a training of small
steps would wait for; and a server that hangs cannot hold it up at the end.
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
    """What a tracking server has of a run, as far as is remembered."""

    run_id: str = ""
    experiment_id: str = ""
    look: str = ""  # at the run's page
    done: list = dataclasses.field(default_factory=list)  # steps of `tracking.Publication`
    metrics: int = 0  # records
    status: dict | None = None  # how the run ended, as in `end.json`
    model_id: str = ""
    version: int | None = None


@dataclasses.dataclass
class Published:
    """A run's `published.json`: the server that it belongs to, and a `Held` for each server."""

    home: str = ""  # its address without the password
    experiment: str = ""  # the name of the run's experiment there
    servers: dict = dataclasses.field(default_factory=dict)


def published(run: RunRecord) -> Published:
    """What is remembered of a run's publication. `InputError` if the file is damaged."""
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
    """The dataclass of these values, without those of a later version. `TypeError` where one has another type."""
    fields = [field for field in dataclasses.fields(kind) if field.name in value]
    if not fields or not all(isinstance(value[field.name], field.type) for field in fields):
        raise TypeError(kind.__name__)
    return kind(**{field.name: value[field.name] for field in fields})


class Publisher:
    """`poolnet sync --follow`, started before there is a run, so that its imports are done when there is."""

    def __init__(self, drain_timeout: float):
        self.drain_timeout = drain_timeout
        self.journals: list[RunRecord] = []
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
        """Publish what is in the journal by now, whatever happened, as far as that may take."""
        if not self.journals:
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
        """Raise `InputError` if `MLFLOW_RUN_ID` is another run's, as far as the server says so in time."""
        if os.environ.get("MLFLOW_RUN_ID"):
            self._tell(f"{ASK}\n")
            if self._heard(START_SECONDS) and self._heard(LOOK_SECONDS) == b"":
                with contextlib.suppress(subprocess.TimeoutExpired):  # it refuses: its output ends just before it does
                    self.process.wait(LOOK_SECONDS)
        self.check()

    def _heard(self, seconds: float) -> bytes | None:
        """The next line that the process says: empty at its end, None if there is none in time."""
        said: list[bytes] = []
        listening = threading.Thread(target=lambda: said.append(self.process.stdout.readline()), daemon=True)
        listening.start()
        listening.join(seconds)
        return said[0] if said else None

    def add(self, journal: RunRecord, carrier: str = "") -> None:
        """From now on this run is published. `carrier` is a run that `mlflow run` made only to get it resumed."""
        self.journals.append(journal)
        self._tell(f"{journal.name} {carrier}\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # `check` and `close` say what became of the process
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def check(self) -> None:
        """Raise `InputError` if the server's record of the run contradicts it."""
        if self.process.poll() == 2:
            raise InputError(self._last_line())

    def close(self, timeout: float | None = None) -> str | None:
        """Wait until the server has everything: `drain_timeout` seconds beyond its last progress, or `timeout` in all.

        Returns None when it has, and otherwise why not.
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
        """What the server holds of the last run."""
        found = published(self.journals[-1])
        return found.servers.get(found.home, Held())

    def _progress(self) -> tuple[int, ...]:
        """When something of each run was last published."""
        times = []
        for journal in self.journals:
            with contextlib.suppress(OSError):
                times.append((journal.folder / "published.json").stat().st_mtime_ns)
        return tuple(times)

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            lines[-1].removeprefix("poolnet: error: ")
            if lines
            else f"{addresses.shown(addresses.own())}: no answer for {self.drain_timeout:g} s"
        )
