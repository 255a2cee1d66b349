"""Handle Ctrl-C and termination, and count processor cores.

`install` makes both raise `Stop`. That is safe, since files are complete at any moment. A second Ctrl-C ends the
process immediately.
"""

import _thread
import os
import signal
import subprocess
import sys
import threading
from typing import Any

last_words = "interrupted"  # what the process says when it was stopped
_stopping = False


class Stop(BaseException):
    """The request to stop the process, as an exception."""

    def __init__(self, signum: int):
        super().__init__(last_words)
        self.signum = signum
        self.code = 130 if signum == signal.SIGINT else 143


def install() -> None:
    """Make Ctrl-C and termination raise `Stop`."""
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last is Windows' Ctrl-Break
        signum = getattr(signal, name, None)
        # A shell has a script's background commands ignore Ctrl-C, and that is respected.
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _handle)
    sys.unraisablehook = _raise_again


def _handle(signum: int, frame: object) -> None:
    global _stopping
    if not _stopping:
        _stopping = True
        raise Stop(signum)
    if signum == signal.SIGINT:  # but not a termination, with which `mlflow run` follows up Ctrl-C
        os.write(2, f"poolnet: error: {last_words}\n".encode())
        os._exit(130)


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeat a stop that Python has dropped.

    Where no caller could catch an exception, for example in the callback of a weak reference, Python shows it with this
    hook and goes on.
    """
    global _stopping
    if not isinstance(unraisable.exc_value, Stop):
        sys.__unraisablehook__(unraisable)
        return
    _stopping = False
    threading.Timer(0.01, _send, [unraisable.exc_value.signum]).start()  # after the callback


def _send(signum: int) -> None:
    if sys.platform == "win32":  # where a wait, of a socket for example, is not interrupted by that
        _thread.interrupt_main(signal.Signals(signum))
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signum)


def detached(priority: int = 0) -> dict[str, Any]:
    """Return options of `Popen` to keep Ctrl-C away.

    The process gets it only from us. `priority` is a flag of Windows.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | priority}
    return {"start_new_session": True}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
