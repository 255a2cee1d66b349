"""The code and the environment that a run depends on."""

import functools
import getpass
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

DECIDE = ("python", "numpy", "torch", "machine")  # the last digits of a run depend on these


def differences(record: dict[str, Any]) -> list[str]:
    """Return how this environment differs from the recorded one."""
    then, here = record["environment"], environment()
    return [f"{name} {then[name]} (here {here[name]})" for name in DECIDE if then[name] != here[name]]


@functools.cache  # of what this process has imported
def software() -> dict[str, str]:
    """Return the versions that all workers of a sweep share.

    The commit is known only where the package lies in its repository.
    """
    versions = {name: importlib.metadata.version(name) for name in ("poolnet", "numpy", "torch")}
    return {**versions, "commit": code_state()[0] or "unknown"}


def other_software(there: dict[str, str]) -> str:
    """Say in which versions this machine differs from another."""
    here = software()
    known = [name for name in there if "unknown" not in (there[name], here.get(name, ""))]
    return ", ".join(
        f"{name} {here.get(name, 'missing')}, expected {there[name]}" for name in known if here.get(name) != there[name]
    )


def environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "mlflow")},
        "system": platform.system(),
        "machine": platform.machine(),
        "host": socket.gethostname(),
        "user": user(),
    }


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # the user has no name, as in some containers
        return "unknown"


def code_state() -> tuple[str | None, str, bytes]:
    """Return the commit, whether the package differs, and the diff.

    Only its own tracked files count: others decide nothing of a run, and may hold secrets. The second is `true` or
    `false`. If the package is installed outside its repository, or git is missing, the result is None, `unknown` and
    no diff.
    """
    if not _git("ls-files", "--error-unmatch", "__init__.py"):
        return None, "unknown", b""
    diff = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--", ".")
    return _git("rev-parse", "HEAD").decode().strip(), "true" if diff else "false", diff


def _git(*args: str) -> bytes:
    """Return git's output, or nothing if there is no repository."""
    try:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
