"""Read record.json and check its form."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from poolnet.errors import InputError
from poolnet.files import unsealed
from poolnet.training.config import TrainConfig

FORMAT = 1
# The keys of a record and the types of their values. Other keys are left alone: a later version may add some.
FORM: dict[str, Any] = {
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
        "layout": str,
    },
    "tracking": dict.fromkeys(("uri", "folder", "experiment_id", "experiment_name", "run_id"), str),
}


def read(folder: Path) -> dict[str, Any]:
    """Read and check the record of a run.

    Raises `InputError` if it is damaged or of a newer version.
    """
    try:
        return parse((folder / "record.json").read_bytes(), str(folder))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: found no readable record.json ({error}); the run's artifacts in MLflow have a copy"
        ) from None


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Parse a record.json and check its form.

    Settings that an earlier version did not have get their defaults. Raises `ValueError` if the content is damaged, and
    `InputError`, which names the place `where`, if it is of a newer version.
    """
    try:
        stored = json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(stored, dict) or not unsealed(stored):
        raise ValueError("damaged")
    record = {"optimum": False, "sweep": "", "reproduces": "", **unsealed(stored)}
    if isinstance(record.get("config"), dict):
        record["config"] = {**dataclasses.asdict(TrainConfig()), **record["config"]}
    if type(record.get("format")) is int and record["format"] > FORMAT:  # the form of a newer record is not known
        raise InputError(f"{where}: found record format {record['format']}, expected at most {FORMAT}; update poolnet")
    if isinstance(record.get("environment"), dict):
        record["environment"] = {"layout": "contiguous", **record["environment"]}
    _check(record, FORM)
    if sorted(split["name"] for split in record["data"]["splits"]) != ["test", "train", "val"]:
        raise ValueError("data.splits: expected train, val and test")
    return record


def _check(value: Any, form: Any, where: str = "") -> None:
    """Raise `ValueError` if a value does not fit its form."""
    if isinstance(form, dict) and isinstance(value, dict):
        for key in form:
            if key not in value:
                raise ValueError(f"{where}{key}: missing")
        for key, part in form.items():
            _check(value[key], part, f"{where}{key}.")
    elif isinstance(form, list) and isinstance(value, list):
        for item in value:
            _check(item, form[0], where)
    elif (
        isinstance(form, (dict, list))
        or not isinstance(value, (float, int) if form is float else form)
        or (type(value) is bool and form is not bool)  # to Python, a bool is an int
    ):
        raise ValueError(f"{where.rstrip('.')}: found {str(value)[:40]!r}")
