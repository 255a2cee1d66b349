"""Ctrl-C and termination, asked for at any moment and answered where nothing is half done.

`install` makes both raise `Stop` at once, or, while `held`, at the next `check`. A second Ctrl-C ends the process on
the spot.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

_held = False
_seen: int | None = None  # the signal that has come
last_words = "interrupted"  # what the process says when it was stopped


class Stop(BaseException):
    """The process was asked to stop. `state` is that of the training, if one was under way."""

    def __init__(self, signum: int):
        super().__init__(last_words)
        self.code = 130 if signum == signal.SIGINT else 143
        self.state = None


def install() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last is Windows' Ctrl-Break
        signum = getattr(signal, name, None)
        # A shell has a script's background commands ignore Ctrl-C, and that is respected.
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _handle)


@contextlib.contextmanager
def held() -> Iterator[None]:
    global _held
    before, _held = _held, True
    try:
        yield
    finally:
        _held = before
    if _seen is not None and not _held:
        raise Stop(_seen)


def check() -> None:
    """Raise `Stop` if a signal has come."""
    if _held and _seen is not None:
        raise Stop(_seen)


def _handle(signum: int, frame: object) -> None:
    global _seen
    if _seen is not None:
        if signum == signal.SIGINT:  # but not a termination, with which `mlflow run` follows up Ctrl-C
            os.write(2, f"poolnet: error: {last_words}\n".encode())
            os._exit(130)
        return
    _seen = signum
    if not _held:
        raise Stop(signum)
    if signum == signal.SIGINT:
        os.write(2, b"\npoolnet: finishing the batch; once more to stop on the spot\n")
