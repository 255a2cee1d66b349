"""The crash-safe record of one run on disk, `POOLNET_HOME/runs/NAME/`, written before anything else hears of the run.

    record.json          what the run is: settings, data digest, code, environment; written once
    metrics.jsonl        a line a step, {"t": ms since 1970, "step": epoch, "metrics": {...}}; epoch 0 is the whole run
    checkpoint-[01].safetensors
                         the last two states of training, each replaced whole
    git.diff             in what the code differs from its commit
    model.safetensors    the final weights, and two images as an example
    predictions/ figures/
    end.json             how the run ended; absent while it is trained, or when its process died
    published.json       what tracking servers already hold (see tracking.py)

Whatever is cut off at any moment leaves each file whole, the old or the new one, or a last line that is recognised as
torn and dropped. Nothing is pickled.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout

from poolnet.config import InputError, RunError, home
from poolnet.files import read_json, replace, replacing, unsealed, write_json

FORMAT = 1
LOOK_SECONDS = 1  # longer than others hold a run's lock only to see whether it is trained


class Journal:
    """One run's folder. Opening it reads `record`, and refuses what a newer poolnet wrote."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        try:
            self.record = unsealed(json.loads((folder / "record.json").read_text(encoding="utf-8")))
            version = self.record["format"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{folder}: found no readable record.json ({error}), expected the record of a run"
            ) from None
        if version > FORMAT:
            raise InputError(f"{folder}: found journal format {version}, expected at most {FORMAT}; update poolnet")
        self.stem = self.name.rpartition("-")[0]  # what it shares with the other runs of its pool and seed
        self._steps: dict[int, dict] = {}  # the records, for the process that trains
        self._serial = 0  # of the newest checkpoint

    # --- who trains it --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Held by the one process that trains the run, and let go of by the operating system when that process dies.

        What ends the block early is recorded as the end of the run; an end that cannot be is found out by `sync`.
        """
        try:
            held = FileLock(self.folder / "lock").acquire(timeout=LOOK_SECONDS)
        except Timeout:
            raise InputError(f"{self.name}: another process is training it; wait for it, or end it first") from None
        with held:
            before = self.ended()
            with self.writing():
                (self.folder / "end.json").unlink(missing_ok=True)
                self._drop_torn_line()
            self._steps = {record["step"]: record for record in self.metrics()}
            self._serial = int((self.checkpoint() or {"serial": 0})["serial"])
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
        try:
            with FileLock(self.folder / "lock", timeout=0):
                return False
        except Timeout:
            return True

    # --- metrics --------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict]:
        """Every whole record, in order."""
        records, _ = self._read_metrics()
        return records

    def by_step(self) -> dict[int, dict[str, float]]:
        """The metrics of each epoch, and under 0 those of the whole run."""
        return {record["step"]: record["metrics"] for record in self.metrics()}

    def append(self, step: int, metrics: dict[str, float]) -> dict:
        """Record a step once: one that is there already stays as it is. Returns the record. Only while `training`."""
        if step in self._steps:
            return self._steps[step]
        record = {"t": self._time(), "step": step, "metrics": metrics}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.writing():
            self._write(self.folder / "metrics.jsonl", "ab", line)
        self._steps[step] = record
        return record

    def _time(self) -> int:
        """Now, but never before the last record: whatever the clock does, times are in the order of records."""
        last = next(reversed(self._steps.values()), None) or next(reversed(self.metrics()), None)
        return max(now(), last["t"] if last else self.record["started"])

    def _read_metrics(self) -> tuple[list[dict], int]:
        """The records, and the bytes they take: what follows is torn."""
        try:
            data = (self.folder / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return [], 0
        records, size = [], 0
        for line in data.splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
                records.append({"t": record["t"], "step": record["step"], "metrics": record["metrics"]})
            except (ValueError, TypeError, KeyError):
                break
            size += len(line)
        return records, size

    def _drop_torn_line(self) -> None:
        path = self.folder / "metrics.jsonl"
        _, size = self._read_metrics()
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)

    # --- files that are replaced whole ----------------------------------------------------------------------------

    def save_checkpoint(self, state: dict[str, np.ndarray]) -> None:
        """Keep a state of training beside the one before it. Only while `training`."""
        self._serial += 1
        self.save_tensors(f"checkpoint-{self._serial % 2}", {**state, "serial": np.array(self._serial)})

    def checkpoint(self) -> dict[str, np.ndarray] | None:
        """The newest state that is whole."""
        found = [self.load_tensors(f"checkpoint-{slot}") for slot in (0, 1)]
        return max((state for state in found if state), key=lambda state: int(state["serial"]), default=None)

    def save_tensors(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """A `.safetensors` file, with a checksum, since its format has none."""
        arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        data = safetensors.numpy.save({**arrays, "crc32": np.array(_checksum(arrays))})
        path, part = self.folder / f"{name}.safetensors", self.folder / f".{name}.part"
        with self.writing():
            self._write(part, "wb", data)
            replace(part, path)

    def load_tensors(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of such a file; None where it is absent or damaged."""
        try:
            arrays = safetensors.numpy.load((self.folder / f"{name}.safetensors").read_bytes())
        except (OSError, safetensors.SafetensorError):
            return None
        checksum = arrays.pop("crc32", None)
        return arrays if checksum is not None and int(checksum) == _checksum(arrays) else None

    def save_predictions(self, name: str, logits: np.ndarray, y: np.ndarray) -> None:
        path = self.folder / "predictions" / f"{name}.npz"
        with self.writing(), replacing(path) as part, part.open("wb") as file:
            np.savez(file, logits=logits, y=y)

    def end(self, status: str, error: str = "") -> None:
        """`FINISHED`, `KILLED` (interrupted, or its process died) or `FAILED`; the latter two can be resumed."""
        with self.writing():
            write_json(self.folder / "end.json", {"t": self._time(), "status": status, "error": error})

    def ended(self) -> dict | None:
        return read_json(self.folder / "end.json") or None

    @property
    def finished(self) -> bool:
        return (self.ended() or {}).get("status") == "FINISHED"

    # --- the disk -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What the disk refuses meanwhile is one line, with the command that goes on."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder}: the journal cannot be written ({error}); once it can: {resume_command(self.name)}"
            ) from error

    def _write(self, path: Path, mode: str, data: bytes) -> None:
        """In one piece, and only into the operating system's buffers: what a power cut takes away is trained again,
        to the same figures. Metrics that are published are flushed before (see tracking.py)."""
        with path.open(mode, buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the last bytes found no room")


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name], zlib.crc32(name.encode(), crc))
    return crc


def create(stem: str, record: dict, diff: bytes = b"") -> Journal:
    """A new run, named `STEM-` and eight random digits. `record` is completed with format and start."""
    path = folder() / f"{stem}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True)
        if diff:
            (path / "git.diff").write_bytes(diff)
        write_json(path / "record.json", {"format": FORMAT, "started": now(), **record})
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise InputError(f"{path}: the journal cannot be written ({error}); set POOLNET_HOME elsewhere") from None
    return Journal(path)


def names() -> list[str]:
    """Every run that has a record, the oldest first."""
    paths = list(folder().glob("*/record.json"))
    return [path.parent.name for path in sorted(paths, key=lambda path: path.stat().st_mtime)]


def find(run: str) -> Journal | None:
    """The run of that name, or of that MLflow run id."""
    if is_name(run) and (folder() / run / "record.json").exists():
        return Journal(folder() / run)
    for name in names():
        servers = read_json(folder() / name / "published.json").get("servers", {})
        if any(run == held.get("run_id") for held in servers.values()):
            return Journal(folder() / name)
    return None


def is_name(text: str) -> bool:
    """Whether a run may be called that: nothing that could lead out of the folder of runs."""
    return re.fullmatch(r"\w+-seed\d+-[0-9a-f]{8}", text) is not None


def resume_command(name: str) -> str:
    return f"poolnet train --resume {name}"


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def folder() -> Path:
    """Where the journals lie."""
    return home() / "runs"
