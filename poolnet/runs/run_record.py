"""The crash-safe record of one run on disk.

It is the folder `POOLNET_HOME/runs/NAME/`. The record is written before anything else is told of the run.

    record.json          what the run is: settings, data digest, code, environment; written once
    metrics.jsonl        one line per step, {"t": ms since 1970, "step": epoch, "metrics": {...}, "crc32": of the rest};
                         epoch 0 is the whole run
    checkpoint-[01].safetensors
                         the last two states of training, each replaced whole
    git.diff             how the code differs from its commit
    model.safetensors    the final weights, and two images as an example
    predictions/ figures/
    end.json             how the run ended; absent while it is trained, or when its process died
    published.json       what tracking servers already hold (see publication.py)

A process may be killed at any moment. After that, the JSON files, checkpoints, weights and predictions are whole: each
is the old file or the new one. The last line of metrics.jsonl may be torn. Such a line is recognised and dropped. All
these files carry checksums. Figures may be cut off, and are drawn again when the run is resumed. If metrics, weights or
predictions are damaged, the error names the file, and the command that makes it again with the same figures. Nothing is
pickled.
"""

import contextlib
import dataclasses
import errno
import json
import math
import re
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout

from poolnet.errors import InputError, RunError
from poolnet.files import Locked, home, locked, read_json, replace, replacing, sealed, unsealed, write_json
from poolnet.training.config import TrainConfig

FORMAT = 1
# What a record holds, by the types of its values. There may be more: what a later version adds is left alone.
FORM = {
    "format": int,
    "started": int,
    "config": {field.name: field.type for field in dataclasses.fields(TrainConfig)},
    "optimum": bool,
    "sweep": str,
    "reproduces": str,
    "device": str,
    "data": {
        "path": str,
        "name": str,
        "sha256": str,
        "overlap": int,
        "splits": [{"name": str, "sha256": str, "shape": [int], "dtype": str}],
    },
    "code": {"commit": str | None, "dirty": str},
    "environment": {
        **dict.fromkeys(("python", "numpy", "torch", "mlflow", "system", "machine", "host", "user"), str),
        "threads": int,
    },
    "tracking": dict.fromkeys(("uri", "folder", "experiment_id", "experiment_name", "run_id"), str),
}
STATUSES = ("FINISHED", "KILLED", "FAILED")


class RunRecord:
    """The folder of one run, with its record.

    Opening it reads and checks `record`. Raises `InputError` if the record is damaged or of a newer version.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.record = _read_record(folder)
        self.stem = self.name.rpartition("-")[0]  # what it shares with the other runs of its pool and seed
        self._steps: dict[int, dict] = {}  # the records, for the process that trains
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
        with contextlib.ExitStack() as held:
            with self._looking():
                try:
                    held.enter_context(locked(self.folder / "lock", wait=0))
                except Locked as error:
                    raise InputError(f"{self.name}: another process is training it, {error}") from None
            before = self.ended()
            with self.writing():
                (self.folder / "end.json").unlink(missing_ok=True)
                self._mend_metrics()
            self._steps = {record["step"]: record for record in self.metrics()}
            self._serial = max((serial for serial, _ in self._slots()), default=0)
            try:
                yield
            except BaseException as error:
                with contextlib.suppress(RunError), self.writing():
                    if isinstance(error, InputError) and before:  # refused, and nothing done
                        write_json(self.folder / "end.json", before)
                    else:
                        self.end("FAILED" if isinstance(error, Exception) else "KILLED", str(error))
                raise

    def is_training(self) -> bool:
        with self._looking():
            return self._is_locked()

    def mark_if_dead(self) -> None:
        """Mark the run as KILLED if its process died.

        This is for a process that died and did not record the end of the run. The run can be resumed.
        """
        with self._looking():
            if not self._is_locked() and not self.ended():
                self.end("KILLED", "its process died")

    def _is_locked(self) -> bool:
        """Whether a process is training the run.

        Call it only inside `_looking`.
        """
        try:
            with FileLock(self.folder / "lock", timeout=0):
                return False
        except Timeout:
            return True

    def _looking(self) -> contextlib.AbstractContextManager:
        """Let only one process at a time check the lock.

        A process that checks holds the run's lock for a moment. Another process must not take it for the one that
        trains.
        """
        return locked(self.folder / "look", poll=0.001)

    # --- metrics --------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict]:
        """Return all records of metrics.jsonl, in order.

        Raises `RunError` if one is damaged.
        """
        records = self._lines()
        if None in records:
            raise self._damage(self.folder / "metrics.jsonl", f"line {records.index(None) + 1} is ")
        return records

    def by_step(self) -> dict[int, dict[str, float]]:
        """Return the metrics of each epoch.

        Epoch 0 has the metrics of the whole run.
        """
        return {record["step"]: record["metrics"] for record in self.metrics()}

    def append(self, step: int, metrics: dict[str, float]) -> dict:
        """Record the metrics of a step once.

        If the step is recorded already, its record stays as it is. Returns the record. Call it only while `training`.
        """
        if step in self._steps:
            return self._steps[step]
        record = {"t": self._time(), "step": step, "metrics": metrics}
        with self.writing():
            self._write(self.folder / "metrics.jsonl", "ab", _line(record))
        self._steps[step] = record
        return record

    def _time(self) -> int:
        """Return the time now, never before the last record.

        So the times are in the order of the records, even if the clock goes back.
        """
        last = next(reversed(self._steps.values()), None) or next(filter(None, reversed(self._lines())), None)
        return max(now(), last["t"] if last else self.record["started"])

    def _lines(self) -> list[dict | None]:
        """Return the record of each line of metrics.jsonl.

        A damaged line gives None. A torn last line is left out.
        """
        try:
            data = (self.folder / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        return [_parsed(line, number) for number, line in enumerate(whole, 1)]

    def _mend_metrics(self) -> None:
        """Drop torn and damaged lines from metrics.jsonl.

        Their epochs are trained again. The lines that are left have checksums afterwards.
        """
        path = self.folder / "metrics.jsonl"
        data = b"".join(_line(record) for record in self._lines() if record)
        if path.exists() and path.read_bytes() != data:
            with replacing(path) as part:
                part.write_bytes(data)

    # --- files that are replaced whole ----------------------------------------------------------------------------

    def save_checkpoint(self, state: dict[str, np.ndarray]) -> None:
        """Save a training state as a checkpoint.

        The checkpoint before it is kept. Call it only while `training`.
        """
        self._serial += 1
        self.save_tensors(f"checkpoint-{self._serial % 2}", {**state, "serial": np.array(self._serial)})

    def checkpoints(self) -> list[dict[str, np.ndarray]]:
        """Return the training states that are whole, newest first."""
        return [state for _, state in sorted(self._slots(), key=lambda slot: -slot[0])]

    def _slots(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield the number and state of each whole checkpoint."""
        for slot in (0, 1):
            state = self.load_tensors(f"checkpoint-{slot}") or {}
            serial = state.pop("serial", None)
            if serial is not None and serial.size == 1:
                yield int(serial), state

    def save_tensors(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Save arrays as a `.safetensors` file with a checksum.

        The file format itself has no checksum.
        """
        arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        data = safetensors.numpy.save({**arrays, "crc32": np.array(_checksum(arrays))})
        path, part = self.folder / f"{name}.safetensors", self.folder / f".{name}.part"
        with self.writing():
            self._write(part, "wb", data)
            replace(part, path)

    def load_tensors(self, name: str) -> dict[str, np.ndarray] | None:
        """Load the arrays of a file that `save_tensors` wrote.

        The result is None if the file is absent or damaged.
        """
        try:
            arrays = safetensors.numpy.load((self.folder / f"{name}.safetensors").read_bytes())
        except (OSError, KeyError, safetensors.SafetensorError):  # KeyError: of a type that numpy does not have
            return None
        checksum = arrays.pop("crc32", None)
        return arrays if checksum is not None and checksum.tolist() == _checksum(arrays) else None

    def save_predictions(self, name: str, logits: np.ndarray, y: np.ndarray) -> None:
        path = self.folder / "predictions" / f"{name}.npz"
        with self.writing(), replacing(path) as part, part.open("wb") as file:
            np.savez(file, logits=logits, y=y)

    def check_results(self) -> None:
        """Refuse results that are incomplete or damaged.

        Raises `RunError` if metrics, weights or predictions are missing or damaged.
        """
        if not {*range(self.record["config"]["epochs"] + 1)} <= self.by_step().keys():
            raise self._damage(self.folder / "metrics.jsonl", "some lines are missing, ")
        if self.load_tensors("model") is None:
            raise self._damage(self.folder / "model.safetensors")
        for name in ("val", "test"):
            path = self.folder / "predictions" / f"{name}.npz"
            try:
                with zipfile.ZipFile(path) as archive:
                    whole = archive.namelist() == ["logits.npy", "y.npy"] and archive.testzip() is None
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

    def ended(self) -> dict | None:
        """Return how the run ended, or None.

        The result has `t`, `status` and `error`. It is None if the run has not ended or its end.json is damaged.
        """
        found = read_json(self.folder / "end.json")
        return found if type(found.get("t")) is int and found.get("status") in STATUSES else None

    @property
    def finished(self) -> bool:
        return (self.ended() or {}).get("status") == "FINISHED"

    # --- the disk -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn disk errors in the block into a one-line `RunError`.

        The line has the command that resumes the run.
        """
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder}: the record cannot be written ({error}); once it can: {resume_command(self.name)}"
            ) from error

    def _write(self, path: Path, mode: str, data: bytes) -> None:
        """Write data to a file in one piece.

        The data go only into the buffers of the operating system. If a power cut loses them, the epochs are trained
        again, to the same figures. Metrics are flushed before they are published (see publication.py).
        """
        with path.open(mode, buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the last bytes found no room")


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name], zlib.crc32(name.encode(), crc))
    return crc


def _line(record: dict) -> bytes:
    return json.dumps(sealed(record), allow_nan=False).encode() + b"\n"


def _parsed(line: bytes, number: int) -> dict | None:
    """Parse a line of metrics.jsonl, or return None.

    The result is None if the line is damaged. A line of an earlier version has no checksum. Then its keys, its step and
    its values must be possible for the line with this number.
    """
    try:
        found = json.loads(line)
        record = unsealed(found)
        t, step, metrics = record["t"], record["step"], record["metrics"]
        plain = [type(t), type(step), type(metrics)] == [int, int, dict]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if "crc32" not in found:
        plain = plain and found.keys() == record.keys() == {"t", "step", "metrics"}
        plain = plain and step in (0, number - 1, number) and all(_is_metric(*pair) for pair in metrics.items())
    return {"t": t, "step": step, "metrics": metrics} if plain else None


def _is_metric(name: str, value: object) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return value >= 0 and (value <= 1 or not name.endswith("acc"))


def _read_record(folder: Path) -> dict:
    """Read and check the record of a run.

    Settings that it does not have get their defaults. Raises `InputError` if it is damaged or of a newer version.
    """
    try:
        found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not unsealed(found):
            raise ValueError("damaged")
        record = {"optimum": False, "sweep": "", "reproduces": "", **unsealed(found)}
        if isinstance(record.get("config"), dict):
            record["config"] = {**dataclasses.asdict(TrainConfig()), **record["config"]}
        newer = type(record.get("format")) is int and record["format"] > FORMAT  # of which nothing else is known
        if problem := "" if newer else _problem(record, FORM):
            raise ValueError(problem)
        if not newer and sorted(split["name"] for split in record["data"]["splits"]) != ["test", "train", "val"]:
            raise ValueError("data.splits: expected train, val and test")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder}: found no readable record.json ({error}); the run's artifacts in MLflow have a copy"
        ) from None
    if newer:
        raise InputError(f"{folder}: found record format {record['format']}, expected at most {FORMAT}; update poolnet")
    return record


def _problem(found: object, form: object, where: str = "") -> str:
    """Return what in `found` does not fit the form.

    The text is empty if everything fits.
    """
    if isinstance(form, dict) and isinstance(found, dict):
        missing = next((f"{where}{key}: missing" for key in form if key not in found), "")
        problems = (_problem(found[key], part, f"{where}{key}.") for key, part in form.items() if key in found)
        return missing or next(filter(None, problems), "")
    if isinstance(form, list) and isinstance(found, list):
        return next(filter(None, (_problem(part, form[0], where) for part in found)), "")
    if not isinstance(form, (dict, list)):
        kinds = (float, int) if form is float else form
        if isinstance(found, kinds) and (form is bool or type(found) is not bool):  # which is an int to Python
            return ""
    return f"{where.rstrip('.')}: found {str(found)[:40]!r}"


def create(stem: str, record: dict, diff: bytes = b"") -> RunRecord:
    """Create the record of a new run.

    The run is named `STEM-` and eight random hexadecimal digits. `record` is completed with the format and the start
    time. Raises `InputError` if the record cannot be written.
    """
    path = folder() / f"{stem}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True)
        if diff:
            (path / "git.diff").write_bytes(diff)
        write_json(path / "record.json", {"format": FORMAT, "started": now(), **record})
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise InputError(f"{path}: the record cannot be written ({error}); set POOLNET_HOME elsewhere") from None
    return RunRecord(path)


def names() -> list[str]:
    """Return the names of all runs, oldest first.

    These are the runs that have a record.
    """
    times = {}
    for path in folder().glob("*/record.json"):
        with contextlib.suppress(FileNotFoundError):  # another process may have just removed it
            times[path.parent.name] = path.stat().st_mtime
    return sorted(times, key=times.get)


def find(run: str) -> RunRecord | None:
    """Find a run by name or MLflow run id.

    The result is None if there is no such run.
    """
    if is_name(run) and (folder() / run / "record.json").exists():
        return RunRecord(folder() / run)
    for name in names():
        servers = read_json(folder() / name / "published.json").get("servers")
        held = servers.values() if isinstance(servers, dict) else ()
        if any(isinstance(server, dict) and server.get("run_id") == run for server in held):
            return RunRecord(folder() / name)
    return None


def is_name(text: str) -> bool:
    """Whether a run may have this name.

    Such a name cannot lead out of the folder of runs.
    """
    return re.fullmatch(r"\w+-seed\d+-[0-9a-f]{8}", text) is not None


def resume_command(name: str) -> str:
    return f"poolnet train --resume {name}"


def now() -> int:
    """Return the time in milliseconds since 1970.

    MLflow counts time in the same way.
    """
    return time.time_ns() // 1_000_000


def folder() -> Path:
    """Return the folder that holds all run records."""
    return home() / "runs"
