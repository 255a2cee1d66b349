"""The process that uploads run records during training.

It publishes the records to MLflow while they are written. `publisher.py` is the other end.
"""

import copy
import dataclasses
import importlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable

from mlflow.exceptions import MlflowException

from poolnet import files
from poolnet.tracking import addresses, names, servers, sync
from poolnet.tracking.publication import Publication, Refused
from poolnet.tracking.publisher import ASK

POLL_SECONDS = 1  # between two looks at the records

Echo = Callable[[str], object]


@dataclasses.dataclass
class Followed:
    """A run and the state of its upload."""

    name: str
    carrier: str
    publication: Publication | None = None
    trouble: Exception | None = None  # what stood in the way last
    over: bool = False  # the server has all of it, or never will


def follow(lines: Iterable[str], drain_timeout: float, echo: Echo, answer: Callable[[], object]) -> int:
    """Publish the runs that the input lines name.

    Each line is `NAME CARRIER`. The function returns when the lines have ended and all is published. Each run is
    handled separately: a problem with one does not affect the others. After the last line, the function gives up
    `drain_timeout` seconds after the last progress.

    The line `ASK` asks whether a new run may be recorded in the run `MLFLOW_RUN_ID`. `answer` is called when this line
    has come, and again if nothing speaks against the new run.

    Returns the exit code: 3 if something is not published, 2 if the only run is refused, if a run is refused while it
    is trained, or if the answer to `ASK` is a refusal, and otherwise 0.
    """
    inbox, runs = _read(lines), {}
    closed, progress = False, time.monotonic()
    while not (closed and all(run.over for run in runs.values())):
        line = _next(inbox)
        if line is None:
            closed, progress = True, time.monotonic()
        elif line == ASK:
            if not addresses.own().startswith("http"):
                importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # a second or two
            answer()
            if refusal := _refusal(os.environ["MLFLOW_RUN_ID"]):
                echo(refusal)
                return 2
            answer()
        elif line:
            name, _, carrier = line.partition(" ")
            runs[name] = Followed(name, carrier)
        for run in runs.values():
            if not run.over and _step(run, closed, echo):
                progress = time.monotonic()
            if isinstance(run.trouble, Refused) and run.publication.run.is_training():
                return 2
        if closed and time.monotonic() - progress > drain_timeout:
            break
    left = [run.trouble for run in runs.values() if run.trouble or not run.over]
    return 0 if not left else 2 if len(runs) == 1 and isinstance(left[0], Refused) else 3


def _read(lines: Iterable[str]) -> queue.SimpleQueue:
    """Read the lines into a queue, in a thread.

    None follows the last line.
    """
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def feed() -> None:
        for line in lines:
            inbox.put(line.strip())
        inbox.put(None)

    threading.Thread(target=feed, daemon=True).start()
    return inbox


def _next(inbox: queue.SimpleQueue) -> str | None:
    try:
        return inbox.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return ""


def _step(run: Followed, closed: bool, echo: Echo) -> bool:
    """Publish what the record of a run has now.

    Returns whether this made progress.
    """
    before, known = run.publication and copy.deepcopy(run.publication.held), str(run.trouble)
    try:
        _advance(run, closed)
        run.trouble = None
    except Exception as error:  # of a damaged record, a server, or the way to it: it is said, and tried again
        run.trouble = error
        run.over = isinstance(error, Refused) or (closed and sync.is_final(error))
        if str(error) != known:
            echo(sync.said(error, run.publication.key if run.publication else ""))
    return bool(run.publication) and run.publication.held != before


def _advance(run: Followed, closed: bool) -> None:
    if not run.publication:
        found = sync.find(run.name)
        run.publication = Publication(found, servers.home_of(found), run.carrier)
    followed = run.publication.run
    if not (followed.folder / "record.json").exists():  # `sync --prune` was faster
        run.over = True
        return
    with files.locked(followed.folder / "publish.lock", wait=0):
        if closed:
            followed.mark_if_dead()
        run.publication.advance()
    # once all lines are in, a run that is still trained is another process's, which publishes it
    run.over = run.publication.complete or (closed and followed.is_training())


def _refusal(run_id: str) -> str:
    """Return why `MLFLOW_RUN_ID` cannot take a new run.

    The text is empty if the server does not say that this run holds the record of another one.
    """
    try:
        name = servers.own_client().get_run(run_id).data.tags.get(names.RUN)
    except MlflowException:  # found out when there is something to publish
        return ""
    return f"MLFLOW_RUN_ID={run_id}: found the record of {name} in that run; unset MLFLOW_RUN_ID" if name else ""
