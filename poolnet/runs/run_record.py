"""The crash-safe record of one run on disk.

It is the folder `POOLNET_HOME/runs/NAME/`. The record is written before anything else learns of the run.

    record.json          what the run is: settings, data digest, code, environment; written once (see record_form.py)
    metrics.jsonl        one line per step (see metrics_file.py); step 0 is the whole run
    checkpoint-[01].safetensors
                         the last two states of training, each replaced whole (see tensors.py)
    git.diff             how the code differs from its commit
    model.safetensors    the final weights, and two images as an example
    predictions/ figures/
    end.json             how the run ended; absent while it is trained, or when its process died
    published.json       what tracking servers already hold (see tracking/published.py)

A process may be killed at any moment. After that, the JSON files, checkpoints, weights and predictions are whole: each
is the old file or the new one. The last line of metrics.jsonl may be cut off. Such a line is recognised and dropped.
All these files carry checksums. Figures may be cut off, and are drawn again when the run is resumed. If metrics,
weights or predictions are damaged, the error names the file, and the command that makes it again with the same figures.
Nothing is pickled.
"""

import contextlib
import re
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from poolnet.errors import InputError, RunError
from poolnet.files import Locked, home, locked, read_json, replacing, write_json
from poolnet.runs import metrics_file, record_form, run_name, tensors
from poolnet.runs.metrics_file import Step
from poolnet.text import pasted
from poolnet.training.config import TrainConfig

# A name cannot be a path out of the folder of runs.
NAME = re.compile(r"\w+-seed\d+(?:-fold\d+)?-[0-9a-f]{4}(?:[0-9a-f]{4})?")
# The arrays for a split, of which the last two are there if the data set has groups, and if the optimum was found.
PREDICTIONS = ("logits", "y", "group", "optimum")
TRIES = 20  # of names for a new run


class RunRecord:
    """The folder of one run.

    `record` is the content of record.json. Opening it raises `InputError` if the record is damaged or of a newer
    version.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.record = record_form.read(folder)
        self._metrics_path = folder / "metrics.jsonl"
        # These two are for the process that trains.
        self._steps: dict[int, Step] = {}
        self._serial = 0  # of the newest checkpoint

    # --- who trains it --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Lock the run for the process that trains it.

        Only one process can hold the lock. The operating system releases it when that process dies. Raises `InputError`
        if another process is training the run.

        If the block raises, the run is saved as FAILED or KILLED. If that fails too, `poolnet sync` marks it later. If
        the block raises `InputError` and the run had ended before, the earlier end stays.
        """
        with contextlib.ExitStack() as stack:
            with self._checking():
                try:
                    stack.enter_context(locked(self.folder / "lock", wait=0))
                except Locked as error:
                    raise InputError(f"{self.name}: another process is training it, {error}") from None
            end_before = self.ended()
            with self.writing():
                (self.folder / "end.json").unlink(missing_ok=True)
                metrics_file.repair(self._metrics_path)
            self._steps = {step["step"]: step for step in self.metrics()}
            self._serial = max((serial for serial, _ in tensors.load_checkpoints(self.folder)), default=0)
            try:
                yield
            except BaseException as error:
                with contextlib.suppress(RunError), self.writing():
                    if isinstance(error, InputError) and end_before:  # refused before anything was done
                        write_json(self.folder / "end.json", end_before)
                    else:
                        self.end("FAILED" if isinstance(error, Exception) else "KILLED", str(error))
                raise

    def is_training(self) -> bool:
        """Whether a process is training the run."""
        with self._checking():
            return self._is_locked()

    def mark_if_dead(self) -> None:
        """Mark the run as KILLED if its process died.

        This is for a process that died and did not record the end of the run. The run can be resumed.
        """
        with self._checking():
            if not self._is_locked() and not self.ended():
                self.end("KILLED", "its process died")

    def _is_locked(self) -> bool:
        """Whether a process is training the run; call it in `_checking`."""
        try:
            with FileLock(self.folder / "lock", timeout=0):
                return False
        except Timeout:
            return True

    def _checking(self) -> contextlib.AbstractContextManager[None]:
        """Let only one process at a time check the lock.

        A process that checks holds the run's lock for a moment. Another process must not take it for the one that
        trains.
        """
        return locked(self.folder / "look", poll=0.001)

    # --- metrics --------------------------------------------------------------------------------------------------

    def metrics(self) -> list[Step]:
        """Return all steps of metrics.jsonl, in order.

        Raises `RunError` if a line is damaged.
        """
        lines = metrics_file.read(self._metrics_path)
        steps = [step for step in lines if step]
        if len(steps) < len(lines):
            raise self._damage(self._metrics_path, f"line {lines.index(None) + 1} is ")
        return steps

    def by_step(self) -> dict[int, dict[str, float]]:
        """Return the metrics by epoch; 0 is the whole run."""
        return {step["step"]: step["metrics"] for step in self.metrics()}

    def append(self, step: int, metrics: dict[str, float]) -> Step:
        """Record the metrics of a step once.

        If the step is recorded already, its record stays as it is. Returns the record. Call it only while `training`.
        """
        if step not in self._steps:
            record = {"t": self._time(), "step": step, "metrics": metrics}
            with self.writing():
                metrics_file.append(self._metrics_path, record)
            self._steps[step] = record
        return self._steps[step]

    def _time(self) -> int:
        """Return the time now, but never before the last step."""
        steps = self._steps.values() or [step for step in metrics_file.read(self._metrics_path) if step]
        return max(now(), next(reversed(steps))["t"] if steps else self.record["started"])

    # --- states, results and the end; each file is replaced as a whole --------------------------------------------

    def save_checkpoint(self, state: tensors.Arrays) -> None:
        """Save a training state as a checkpoint.

        The checkpoint before it is kept. Call it only while `training`.
        """
        self._serial += 1
        with self.writing():
            tensors.save_checkpoint(self.folder, self._serial, state)

    def checkpoints(self) -> list[tensors.Arrays]:
        """Return the training states that are whole, newest first."""
        return [state for _, state in tensors.load_checkpoints(self.folder)]

    def save_tensors(self, name: str, arrays: tensors.Arrays) -> None:
        with self.writing():
            tensors.save(self.folder / f"{name}.safetensors", arrays)

    def load_tensors(self, name: str) -> tensors.Arrays | None:
        """Load saved arrays, or return None if absent or damaged."""
        return tensors.load(self.folder / f"{name}.safetensors")

    def save_predictions(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Save what is predicted for a split: some of `PREDICTIONS`."""
        path = self.folder / "predictions" / f"{name}.npz"
        with self.writing(), replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle

    def load_predictions(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Load logits, labels and groups of a split.

        The record must have been checked. Without groups the last is None.
        """
        with np.load(self.folder / "predictions" / f"{name}.npz") as saved:
            return saved["logits"], saved["y"], saved.get("group")

    def check_results(self) -> None:
        """Refuse results that are incomplete or damaged.

        Raises `RunError` if metrics, weights or predictions are missing or damaged.
        """
        if not {*range(self.record["config"]["epochs"] + 1)} <= self.by_step().keys():
            raise self._damage(self._metrics_path, "some lines are missing, ")
        if self.load_tensors("model") is None:
            raise self._damage(self.folder / "model.safetensors")
        for name in ("val", "test"):
            path = self.folder / "predictions" / f"{name}.npz"
            try:
                with zipfile.ZipFile(path) as archive:
                    found = [member.removesuffix(".npy") for member in archive.namelist()]
                    expected = [*PREDICTIONS[:2], *(each for each in PREDICTIONS[2:] if each in found)]
                    whole = found == expected and archive.testzip() is None
            except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error):
                whole = False
            if not whole:
                raise self._damage(path)

    def has_results(self) -> bool:
        """Whether metrics, weights and predictions are complete and undamaged."""
        try:
            self.check_results()
        except RunError:
            return False
        return True

    def _damage(self, path: Path, what: str = "") -> RunError:
        return RunError(f"{path}: {what}damaged; made again by: {resume_command(self.name)}")

    def end(self, status: str, error: str = "") -> None:
        """Record how the run ended.

        The status is `FINISHED`, `KILLED` (interrupted, or its process died) or `FAILED`. After `KILLED` and `FAILED`,
        the run can be resumed.
        """
        with self.writing():
            write_json(self.folder / "end.json", {"t": self._time(), "status": status, "error": error})

    def ended(self) -> dict[str, Any] | None:
        """Return how the run ended, or None.

        The result has `t`, `status` and `error`. It is None if the run has not ended or its end.json is damaged.
        """
        end = read_json(self.folder / "end.json")
        whole = type(end.get("t")) is int and end.get("status") in ("FINISHED", "KILLED", "FAILED")
        return end if whole else None

    @property
    def finished(self) -> bool:
        return (self.ended() or {}).get("status") == "FINISHED"

    @contextlib.contextmanager
    def writing(self, again: str = "") -> Iterator[None]:
        """Turn a disk error into a `RunError` with the cure.

        The cure is the command `again`, or to resume the run.
        """
        try:
            yield
        except OSError as error:
            again = again or resume_command(self.name)
            raise RunError(f"{self.folder}: the record cannot be written ({error}); once it can: {again}") from error


def create(stem: str, record: dict[str, Any], diff: bytes = b"", path: Path | None = None) -> RunRecord:
    """Create the record of a new run.

    The run is named `STEM-` and four random hexadecimal digits, unless `path` is the folder that it shall have.
    `record` is completed with the format and the start time. Raises `InputError` if the record cannot be written.
    """
    try:
        path = path or _new_folder(stem)
        path.mkdir(parents=True, exist_ok=True)
        if diff:
            (path / "git.diff").write_bytes(diff)
        write_json(path / "record.json", {"format": record_form.FORMAT, "started": now(), **record})
    except OSError as error:
        if path:
            shutil.rmtree(path, ignore_errors=True)
        place = path or folder()
        raise InputError(f"{place}: the record cannot be written ({error}); set POOLNET_HOME elsewhere") from None
    return RunRecord(path)


def stem_of(config: TrainConfig) -> str:
    """Return how the names of runs with these settings begin."""
    fold = f"-fold{config.fold.split('/')[0]}" if config.fold else ""
    return f"{config.pool}-seed{config.seed}{fold}"


def new_name(stem: str) -> str:
    """Return a name that no run here has, and no folder yet."""
    return next(name for name in _new_names(stem) if not (folder() / name).exists())


def _new_folder(stem: str) -> Path:
    """Make a folder with a new name."""
    for name in _new_names(stem):
        with contextlib.suppress(FileExistsError):
            (folder() / name).mkdir(parents=True)
            return folder() / name
    raise FileExistsError(stem)


def _new_names(stem: str) -> Iterator[str]:
    for _ in range(TRIES):
        yield f"{stem}-{uuid.uuid4().hex[:4]}"
    for _ in range(TRIES):  # nearly all shorter names are taken
        yield f"{stem}-{uuid.uuid4().hex[:8]}"


def names() -> list[str]:
    """Return the names of all recorded runs, oldest first."""
    times = {}
    for path in folder().glob("*/record.json"):
        with contextlib.suppress(FileNotFoundError):  # another process may have just removed it
            times[path.parent.name] = path.stat().st_mtime
    return sorted(times, key=times.__getitem__)


def find(text: str) -> RunRecord | None:
    """Find the run that a text names.

    The text is its name, a beginning of it, or MLflow's run id. The result is None if there is no such run. Raises
    `InputError` if several names begin so.
    """
    name = find_name(text)
    return RunRecord(folder() / name) if name else None


def find_name(text: str) -> str | None:
    """Return the name of the run that `find` finds.

    Its record may be damaged.
    """
    if NAME.fullmatch(text) and (folder() / text / "record.json").exists():
        return text

    def search(beginning: str, more: bool) -> dict[str, str]:
        return {name: name for name in known if name.startswith(beginning) and (more or name == beginning)}

    known = names()[::-1]  # newest first
    for name in known:
        servers = read_json(folder() / name / "published.json").get("servers")
        servers = servers.values() if isinstance(servers, dict) else ()
        if any(isinstance(server, dict) and server.get("run_id") == text for server in servers if text):
            return name
    return run_name.choose(text, search)


def resume_command(name: str) -> str:
    return pasted("poolnet", "train", "--resume", name)  # which others may have given to their run


def now() -> int:
    """Return milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def folder() -> Path:
    """Return the folder that holds all run records."""
    return home() / "runs"
