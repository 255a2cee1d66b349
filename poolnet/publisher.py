"""The process beside the training that carries its journal to MLflow.

A process and not a thread: MLflow takes seconds of Python to import and some for every call, which a training of small
steps would wait for; and a server that hangs cannot hold it up at the end.
"""

import contextlib
import subprocess
import sys
import tempfile
import time

from poolnet.config import InputError, crowded
from poolnet.files import read_json
from poolnet.journal import Journal

STOP_SECONDS = 2.5  # for the last words of a run that was interrupted
READY_SECONDS = 3  # that a training waits for the imports: on two cores they slow its steps by a fifth
START_SECONDS = 120  # for the imports, on a machine that is busy with much else


class Publisher:
    """`poolnet sync --follow`, started before there is a run, so that its imports are done when there is."""

    def __init__(self, drain_timeout: float):
        self.drain_timeout = drain_timeout
        self.journals: list[Journal] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        detached = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
            if sys.platform == "win32"
            else {"start_new_session": True}  # Ctrl-C is the training's to answer
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "poolnet", "sync", "--follow", "--drain-timeout", str(drain_timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            **detached,
        )

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever happened: what is in the journal by now is published, as far as that may take."""
        if not self.journals:
            self.process.kill()
        else:
            stopped = kind is not None and not issubclass(kind, Exception)
            with contextlib.suppress(InputError):
                self.close(STOP_SECONDS if stopped else None)
        self.process.wait()
        self.process.stdin.close()
        self._errors.close()

    def watch(self, journal: Journal, carrier: str = "") -> None:
        """As `add`, and give it the time to begin that it takes on few cores."""
        begun = self._progress()
        self.add(journal, carrier)
        deadline = time.monotonic() + READY_SECONDS
        while crowded() and self._progress() == begun and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def add(self, journal: Journal, carrier: str = "") -> None:
        """From now on this run is published. `carrier` is a run that `mlflow run` made only to get it resumed."""
        self.journals.append(journal)
        self._tell(f"{journal.name} {carrier}\n")

    def nudge(self) -> None:
        """The epochs are over: what publishing a model takes may now be imported, and what there is published."""
        self._tell("\n")

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
        strict, timeout = timeout is not None, self.drain_timeout if timeout is None else timeout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        progress, deadline = None, time.monotonic() + timeout
        started = time.monotonic()
        while self.process.poll() is None:
            seen = self._progress()
            if seen != progress and not strict:
                progress, deadline = seen, time.monotonic() + timeout
            patience = deadline if seen or strict else max(deadline, started + min(START_SECONDS, 4 * timeout))
            if time.monotonic() > patience:
                self.process.kill()
                self.process.wait()
                break
            time.sleep(0.01)
        self.check()
        return None if self.process.returncode == 0 else self._last_line()

    @property
    def held(self) -> dict:
        """What the server holds of the last run, see `tracking.Publication`."""
        published = read_json(self.journals[-1].folder / "published.json")
        return published.get("servers", {}).get(published.get("home"), {})

    def _progress(self) -> int:
        """When something was last published; 0 before the publisher has begun."""
        newest = 0
        for journal in self.journals:
            with contextlib.suppress(OSError):
                newest = max(newest, (journal.folder / "published.json").stat().st_mtime_ns)
        return newest

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (
            lines[-1].removeprefix("poolnet: error: ")
            if lines
            else f"the tracking server gave no answer for {self.drain_timeout:g} s"
        )
