"""Wait for a tracking server for a limited time.

MLflow's own time-outs are minutes. Here an alarm ends a call of a server that is silent.
"""

import _thread
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

from poolnet.errors import NoAnswer
from poolnet.tracking import addresses


class _Silence(BaseException):
    """Signal that a server gave no answer for some seconds.

    It is not an `Exception`, because MLflow would catch that and try again.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds


_limit = math.inf  # seconds that a call may take
_deadline = math.inf  # by which all calls must have their answers
_calls = 0  # that are under way, one in the other
_silent: dict[str, float] = {}  # servers that gave no answer, and for how long they were waited for
_ALARM = getattr(signal, "SIGALRM", signal.SIGABRT)  # Windows has no alarms
_timer: threading.Timer | None = None  # there


def limit(seconds: float) -> None:
    """Set how long to wait for a silent server.

    From now on, a call of a server that is silent for `seconds` is given up with `NoAnswer`.
    """
    global _limit
    _limit = seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, math.ceil(seconds))))  # where no alarm ends a call
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(math.ceil(seconds) + 1))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limit the total time of server calls in a block.

    All calls in the block have `seconds` together. They do not get more time than an outer block leaves.
    """
    global _deadline, _limit
    before = (_deadline, _limit)
    _deadline = min(_deadline, time.monotonic() + seconds)
    _limit = min(_limit, seconds)
    try:
        yield
    finally:
        _deadline, _limit = before


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Limit the waiting time of one server call.

    Raises `NoAnswer` if the server is silent. If it was silent before, this is raised at once. There is no limit for
    SQLite files, in other threads than the main one, and before `limit` or `within` sets one.
    """
    global _calls
    if _limit == math.inf or addresses.sqlite_file(uri) or threading.current_thread() is not threading.main_thread():
        yield
        return
    depth = _calls
    if not depth and _silent.get(uri, -1) >= _limit:
        raise NoAnswer(f"no answer for {_silent[uri]:g} s")
    try:
        _calls = depth + 1
        _set_alarm()
        yield
        _set_alarm()  # a call of a call was answered
    except _Silence as silence:
        if depth:
            raise
        _silent[uri] = silence.seconds
        raise NoAnswer(f"no answer for {_silent[uri]:g} s") from None
    finally:
        _calls = depth
        if not depth:
            _clear_alarm()


def gave_up() -> bool:
    """Whether a server was silent for too long.

    Threads of MLflow may still wait for it.
    """
    return bool(_silent)


def _set_alarm() -> None:
    """Set an alarm that raises `_Silence` in the main thread.

    The alarm rings when the time for the call is over.
    """
    global _timer
    remaining = _deadline - time.monotonic()
    waited = min(_limit, max(0.1, round(remaining, 1)))  # rounded for the message, which never says 0 s

    def ring(signum: int, frame: object) -> None:
        if _calls:
            raise _Silence(waited)

    seconds = max(0.001, min(_limit, remaining))
    signal.signal(_ALARM, ring)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again, should somebody swallow it
    else:
        _clear_alarm()
        _timer = threading.Timer(seconds, _thread.interrupt_main, (_ALARM,))
        _timer.daemon = True
        _timer.start()


def _clear_alarm() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    elif _timer:
        _timer.cancel()
