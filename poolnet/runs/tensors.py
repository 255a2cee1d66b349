"""Save arrays with a checksum, and keep the last two checkpoints."""

import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

from poolnet.files import replace

Arrays = dict[str, np.ndarray]


def save(path: Path, arrays: Arrays) -> None:
    """Replace a `.safetensors` file as a whole.

    The checksum is an array of its own, since the format has none. A power cut may lose the file: it is not flushed.
    Then its epochs are trained again, to the same figures.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    part = path.with_name(f".{path.stem}.part")
    part.write_bytes(safetensors.numpy.save({**arrays, "crc32": np.array(_checksum(arrays))}))
    replace(part, path)


def load(path: Path) -> Arrays | None:
    """Load arrays, or return None if absent or damaged."""
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
    except (OSError, KeyError, safetensors.SafetensorError):  # KeyError: an array type that NumPy does not have
        return None
    checksum = arrays.pop("crc32", None)
    return arrays if checksum is not None and checksum.tolist() == _checksum(arrays) else None


def save_checkpoint(folder: Path, serial: int, state: Arrays) -> None:
    """Save a training state over the last but one.

    So one checkpoint is whole, even if the process is killed here. `serial` counts the checkpoints of the run.
    """
    save(folder / f"checkpoint-{serial % 2}.safetensors", {**state, "serial": np.array(serial)})


def load_checkpoints(folder: Path) -> list[tuple[int, Arrays]]:
    """Return serial and state of each whole checkpoint, newest first."""
    checkpoints = []
    for slot in (0, 1):
        state = load(folder / f"checkpoint-{slot}.safetensors") or {}
        serial = state.pop("serial", None)
        if serial is not None and serial.size == 1:
            checkpoints.append((int(serial), state))
    return sorted(checkpoints, key=lambda checkpoint: -checkpoint[0])


def _checksum(arrays: Arrays) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].data, zlib.crc32(name.encode(), crc))
    return crc
