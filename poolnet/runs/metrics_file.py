"""Read, write and repair metrics.jsonl.

A line is one step: {"t": ms since 1970, "step": epoch, "metrics": {...}, "crc32": checksum of the rest}.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Any

from poolnet.files import replacing, sealed, unsealed

Step = dict[str, Any]  # a line without its checksum


def read(path: Path) -> list[Step | None]:
    """Return the step of each line.

    A damaged line gives None. A last line that was cut off is left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [_parsed(line, number) for number, line in enumerate(lines[:-1], 1)]


def append(path: Path, step: Step) -> None:
    """Add a line in one piece.

    It goes only into the buffers of the operating system. If a power cut loses it, the epoch is trained again, to the
    same figures. Metrics are flushed before they are published (see publication.py).
    """
    line = _line(step)
    with path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the last bytes found no room")


def repair(path: Path) -> None:
    """Drop damaged lines and a last line that was cut off.

    Their epochs are trained again. The lines that are left have checksums afterwards.
    """
    data = b"".join(_line(step) for step in read(path) if step)
    if path.exists() and path.read_bytes() != data:
        with replacing(path) as part:
            part.write_bytes(data)


def _line(step: Step) -> bytes:
    return json.dumps(sealed(step), allow_nan=False).encode() + b"\n"


def _parsed(line: bytes, number: int) -> Step | None:
    """Parse a line, or return None if it is damaged.

    A line of an earlier version has no checksum. Then its keys, its step and its values must be possible for the line
    with this number.
    """
    try:
        stored = json.loads(line)
        record = unsealed(stored)
        t, step, metrics = record["t"], record["step"], record["metrics"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    whole = [type(t), type(step), type(metrics)] == [int, int, dict]
    if whole and "crc32" not in stored:
        whole = stored.keys() == {"t", "step", "metrics"} and step in (0, number - 1, number)
        whole = whole and all(
            type(value) in (int, float) and 0 <= value <= (1 if name.endswith("acc") else sys.float_info.max)
            for name, value in metrics.items()
        )
    return {"t": t, "step": step, "metrics": metrics} if whole else None
