"""Start and control the process that uploads run records.

The process runs beside the training and publishes its record to MLflow. `upload_process.py` is the other end.

It is a process and not a thread for two reasons. MLflow takes seconds of Python time to import and some for every call,
and a training with small steps would have to wait for this. And a server that hangs cannot hold up the training at its
end.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from poolnet import process
from poolnet.errors import InputError
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses, published
from poolnet.tracking.published import ServerCopy

ASK = "MLFLOW_RUN_ID?"  # what is written to it in place of a run's name, see `Publisher.ask`
LOOK_SECONDS = 2  # that a new run waits to hear whether `MLFLOW_RUN_ID` is another run's
STOP_SECONDS = 2.5  # for the last words of a run that was interrupted
START_SECONDS = 30  # for the imports, on a machine that is busy with much else


class Publisher:
    """The upload process of a training, `poolnet sync --follow`.

    It is started before there is a run, so that its imports are done when the run begins.
    """

    def __init__(self, drain_timeout: float):
        self.drain_timeout = drain_timeout
        self.runs: list[RunRecord] = []
        self._asked = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        priority = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0)  # on Windows
        self.process = subprocess.Popen(
            [sys.executable, "-m", "poolnet", "sync", "--follow", "--drain-timeout", str(drain_timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            **process.detached(priority),  # Ctrl-C is the training's to answer
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self._output = self.process.stdin, self.process.stdout

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
        self._input.close()
        self._output.close()
        self._errors.close()

    def ask(self) -> None:
        """Ask whether `MLFLOW_RUN_ID` belongs to another run.

        The next `check` waits for the answer.
        """
        if os.environ.get("MLFLOW_RUN_ID"):
            self._write_line(ASK)
            self._asked = True

    def _read_line(self, seconds: float) -> bytes | None:
        """Return the next line that the process prints.

        The line is empty if the process has ended its output. It is None if no line comes within `seconds`.
        """
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.append(self._output.readline()), daemon=True)
        reader.start()
        reader.join(seconds)
        return lines[0] if lines else None

    def add(self, run: RunRecord, carrier: str = "") -> None:
        """Publish this run from now on.

        `carrier` is a run that `mlflow run` made only to resume this one.
        """
        self.runs.append(run)
        self._write_line(f"{run.name} {carrier}")

    def _write_line(self, line: str) -> None:
        with contextlib.suppress(OSError):  # `check` and `close` say what became of the process
            self._input.write(f"{line}\n".encode())
            self._input.flush()

    def check(self) -> None:
        """Raise `InputError` if the server's record contradicts the run.

        The first check after `ask` also raises it if the server says in time that `MLFLOW_RUN_ID` is another run's.
        """
        if self._asked:
            self._asked = False
            importlib.import_module("poolnet.runs.figures")  # which takes a second, as the answer does
            if self._read_line(START_SECONDS) and self._read_line(LOOK_SECONDS) == b"":
                with contextlib.suppress(subprocess.TimeoutExpired):  # it refuses: its output ends just before it does
                    self.process.wait(LOOK_SECONDS)
        if self.process.poll() == 2:
            raise InputError(self._last_line())

    def close(
        self, timeout: float | None = None, on_upload: Callable[[int], object] = lambda count: None
    ) -> str | None:
        """Wait until the server has everything.

        The wait ends `drain_timeout` seconds after the last progress. If `timeout` is given, it ends after `timeout`
        seconds in all. `on_upload` is called with the number of runs that the server has whole.

        Returns None if the server has everything, and otherwise the reason why not. Raises `InputError` as `check`
        does.
        """
        with contextlib.suppress(OSError):
            self._input.close()
        before: dict[str, int] = {}
        whole: set[str] = set()
        deadline = time.monotonic() + (timeout or max(START_SECONDS, self.drain_timeout))
        while self.process.poll() is None and time.monotonic() < deadline:
            now = self._progress()
            if now != before and timeout is None:
                changed = [run for run in self.runs if now.get(run.name) != before.get(run.name)]
                whole |= {run.name for run in changed if self._is_uploaded(run)}
                on_upload(len(whole))
                before, deadline = now, time.monotonic() + self.drain_timeout
            time.sleep(0.01)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.check()
        if self.process.returncode:
            return self._last_line()
        on_upload(len(self.runs))
        return None

    @property
    def server_copy(self) -> ServerCopy:
        """Return what the server has of the last run."""
        return published.at_home(self.runs[-1])

    def _progress(self) -> dict[str, int]:
        """Return when each run's `published.json` last changed, in ns."""
        times = {}
        for run in self.runs:
            with contextlib.suppress(OSError):
                times[run.name] = (run.folder / "published.json").stat().st_mtime_ns
        return times

    def uploaded(self) -> int:
        """Return how many of the runs the server has whole, so far."""
        return sum(self._is_uploaded(run) for run in self.runs)

    def _is_uploaded(self, run: RunRecord) -> bool:
        """Whether the server has all of a run, as far as is remembered."""
        try:
            server_copy = published.at_home(run)
            return bool(server_copy.status or server_copy.stand_in)
        except (InputError, OSError):
            return False

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            lines[-1].removeprefix("poolnet: error: ")
            if lines
            else f"{addresses.shown(addresses.own())}: no answer for {self.drain_timeout:g} s"
        )
