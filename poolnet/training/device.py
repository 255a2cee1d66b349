"""Find out which device trains a network."""

import functools
import importlib.util
import runpy
import sys
from pathlib import Path

from poolnet.errors import InputError


def resolve_device(name: str) -> str:
    """Return the torch device that a setting stands for.

    `auto` is cuda, else mps, else cpu. Raises `InputError` if the device is unknown or missing.
    """
    if name == "cpu":
        return "cpu"
    present = ["cpu"] if _has_cpu_only() else _present()
    if name != "auto" and name not in present:
        raise InputError(f"device: found {name!r}, expected one that is here: auto, {', '.join(present)}")
    return present[0] if name == "auto" else name


def check(name: str) -> None:
    """Refuse a device that is not here, without torch."""
    if _has_cpu_only():
        resolve_device(name)


def _present() -> list[str]:
    """Return the devices that torch finds here, the best first."""
    import torch  # takes seconds, which a sweep with nothing to train saves on most machines

    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *present]
    return present


@functools.cache
def _has_cpu_only() -> bool:
    """Whether the torch installed here was built for CPUs.

    Its version file says so, which is read without torch. On a Mac it does not tell whether there is mps.
    """
    torch = importlib.util.find_spec("torch")
    if sys.platform == "darwin" or not torch or not torch.origin:
        return False
    try:
        version = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    except OSError:
        return False
    return "cuda" in version and not (version["cuda"] or version.get("hip"))
