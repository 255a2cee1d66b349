"""The code and the environment that a run depends on."""

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
    """Return the commit, whether tracked files differ, and the diff.

    The second is `true` or `false`. If the package is installed outside its repository, or git is missing, the result
    is None, `unknown` and no diff.
    """
    if not _git("ls-files", "--error-unmatch", "__init__.py"):
        return None, "unknown", b""
    diff = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color")
    return _git("rev-parse", "HEAD").decode().strip(), "true" if diff else "false", diff


def _git(*args: str) -> bytes:
    """Return git's output, or nothing if there is no repository."""
    try:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
