"""Carry a run record from one machine to another."""

import json
from pathlib import Path

from poolnet.files import read_json, replacing, unsealed, write_json

Files = dict[str, bytes]  # contents by path below the record's folder, with forward slashes
LOCKS = ("lock", "look", "publish.lock")  # of the machine where the record is


def pack(folder: Path) -> Files:
    """Return the files of a run record.

    The checkpoints of a finished run are left out, since nothing needs them. If there is no record, there are no files.
    """
    if not (folder / "record.json").exists():
        return {}
    finished = read_json(folder / "end.json").get("status") == "FINISHED"
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        left_out = name in LOCKS or name.endswith((".holder", ".part")) or (finished and name.startswith("checkpoint-"))
        if path.is_file() and not left_out:
            files[name] = path.read_bytes()
    return files


def unpack(folder: Path, files: Files, data: dict[str, str]) -> None:
    """Write the files of a run record into a folder.

    `data` is the path and name of the data set on this machine. record.json comes last, so that the record is there as
    a whole.
    """
    for name in files.keys() - {"record.json"}:
        with replacing(folder / name) as part:
            part.write_bytes(files[name])
    record = unsealed(json.loads(files["record.json"]))
    write_json(folder / "record.json", {**record, "data": {**record["data"], **data}})
