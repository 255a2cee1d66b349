"""The process that uploads run records during training.

It publishes the records to MLflow while they are written. `publisher.py` is the other end.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from mlflow.exceptions import MlflowException

from poolnet import files
from poolnet.text import Echo
from poolnet.tracking import addresses, names, servers, sync
from poolnet.tracking.publication import Publication, is_complete, upload_new
from poolnet.tracking.publisher import ASK
from poolnet.tracking.server_runs import Refused

POLL_SECONDS = 1  # between two looks at the records
AT_ONCE = 8  # runs that are published to a server, which answers several; the writers of a file would wait in turn


@dataclasses.dataclass
class Upload:
    """A run and the state of its upload."""

    name: str
    carrier: str
    publication: Publication | None = None  # once the record was read
    error: Exception | None = None  # of the last attempt
    over: bool = False  # the server has all of it, or never will


def run(lines: Iterable[str], drain_timeout: float, echo: Echo, reply: Callable[[], object]) -> int:
    """Publish the runs that the input lines name.

    Each line is `NAME CARRIER`. The function returns when the lines have ended and all is published. Each run is
    handled separately: a problem with one does not affect the others. After the last line, the function gives up
    `drain_timeout` seconds after the last progress.

    The line `ASK` asks whether a new run may be recorded in the run `MLFLOW_RUN_ID`. `reply` writes a line: when `ASK`
    has come, and again if nothing speaks against the new run.

    Returns the exit code: 3 if something is not published, 2 if the only run is refused, if a run is refused while it
    is trained, or if `ASK` is answered with a refusal, and otherwise 0.
    """
    inbox = _read(lines)
    uploads: dict[str, Upload] = {}
    closed, progress = False, time.monotonic()
    pool = ThreadPoolExecutor(AT_ONCE if addresses.own().startswith("http") else 1)
    while not (closed and all(upload.over for upload in uploads.values())):
        for line in _new(inbox):
            if line is None:
                closed, progress = True, time.monotonic()
            elif line == ASK:
                if not addresses.own().startswith("http"):
                    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # a second or two
                reply()
                if refusal := _refusal(os.environ["MLFLOW_RUN_ID"]):
                    echo(refusal)
                    return 2
                reply()
            elif line:
                name, _, carrier = line.partition(" ")
                uploads[name] = Upload(name, carrier)
        due = [upload for upload in uploads.values() if not upload.over]
        if any([*pool.map(functools.partial(_step, closed=closed, echo=echo), due)]):
            progress = time.monotonic()
        for upload in due:
            if isinstance(upload.error, Refused) and upload.publication and upload.publication.run.is_training():
                return 2
        if closed and time.monotonic() - progress > drain_timeout:
            break
    errors = [upload.error for upload in uploads.values() if upload.error or not upload.over]
    return 0 if not errors else 2 if len(uploads) == 1 and isinstance(errors[0], Refused) else 3


def _read(lines: Iterable[str]) -> queue.SimpleQueue[str | None]:
    """Read the lines into a queue in a thread, then None."""
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def feed() -> None:
        for line in lines:
            inbox.put(line.strip())
        inbox.put(None)

    threading.Thread(target=feed, daemon=True).start()
    return inbox


def _new(inbox: queue.SimpleQueue[str | None]) -> list[str | None]:
    """Return the lines that have come, or come soon."""
    lines = []
    with contextlib.suppress(queue.Empty):
        lines.append(inbox.get(timeout=POLL_SECONDS))
        while True:
            lines.append(inbox.get_nowait())
    return lines


def _step(upload: Upload, closed: bool, echo: Echo) -> bool:
    """Publish what the record of a run has now.

    Returns whether this made progress.
    """
    before = copy.deepcopy(upload.publication.server_copy) if upload.publication else None
    known = str(upload.error)
    try:
        _upload(upload, closed)
        upload.error = None
    except Exception as error:  # of a damaged record, a server, or the way to it: it is said, and tried again
        upload.error = error
        upload.over = isinstance(error, Refused) or (closed and sync.is_final(error))
        if str(error) != known:
            echo(sync.one_line(error, upload.publication.key if upload.publication else ""))
    return upload.publication is not None and upload.publication.server_copy != before


def _upload(upload: Upload, closed: bool) -> None:
    if not upload.publication:
        record = sync.find(upload.name)
        upload.publication = Publication(record, servers.home_of(record), upload.carrier)
    record = upload.publication.run
    if not (record.folder / "record.json").exists():  # `sync --prune` was faster
        upload.over = True
        return
    with files.locked(record.folder / "publish.lock", wait=0):
        if closed:
            record.mark_if_dead()
        upload_new(upload.publication)
    # once all lines are in, a run that is still trained is another process's, which publishes it
    upload.over = is_complete(upload.publication) or (closed and record.is_training())


def _refusal(run_id: str) -> str:
    """Return why `MLFLOW_RUN_ID` cannot take a new run.

    The text is empty if the server does not say that this run holds the record of another one.
    """
    try:
        name = servers.own_client().get_run(run_id).data.tags.get(names.RUN)
    except MlflowException:  # found out when there is something to publish
        return ""
    return f"MLFLOW_RUN_ID={run_id}: found the record of {name} in that run; unset MLFLOW_RUN_ID" if name else ""
