"""The other end of `publisher.py`: the process that carries journals to MLflow while they are written."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable

from filelock import FileLock

from poolnet import journal, registry, stores, sync
from poolnet.config import crowded
from poolnet.tracking import Publication, Refused

POLL_SECONDS = 5 if crowded() else 2  # between two looks at a journal, and before the first where cores are few
DRAIN_POLL_SECONDS = 0.5  # the same, when the training waits for it
RETRY_SECONDS = 5  # before another attempt
IMPORT_SECONDS = 30  # of training, after which two seconds of a shared core no longer show
HAND_OVER_SECONDS = 1  # after which a run that is still trained is another publisher's


def follow(lines: Iterable[str], drain_timeout: float, say: Callable[[str], None]) -> int:
    """Publish the runs whose names come in, a line each, `NAME CARRIER`, until the lines end and all is published.
    An empty line says that epochs are over, and with them the hurry.

    After the last line it gives up `drain_timeout` seconds after the last progress. Returns the exit code.
    """
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def feed() -> None:
        for line in lines:
            inbox.put(line)
        inbox.put(None)

    threading.Thread(target=feed, daemon=True).start()
    with contextlib.ExitStack() as locks:
        followed: list[Publication] = []
        closed, failed, progress = None, False, time.monotonic()
        import_at = progress + (IMPORT_SECONDS if crowded() else 0)
        while closed is None or followed:
            wait = DRAIN_POLL_SECONDS if closed else RETRY_SECONDS if failed else POLL_SECONDS
            try:
                line = inbox.get(timeout=wait)
            except queue.Empty:
                line = ""
            if line is None:
                closed = progress = time.monotonic()
            elif line.strip():
                followed.append(_begin(line, locks))
                if crowded():
                    continue
            elif line:
                import_at = 0
            held = [json.dumps(publication.held) for publication in followed]
            try:
                for publication in followed:
                    if closed:
                        sync.mark_if_dead(publication.run)
                    publication.advance(lean=not closed and time.monotonic() < import_at)
                    if time.monotonic() > import_at:
                        registry.import_exporter()  # now, while nobody waits for it
                failed = False
            except Refused as error:
                say(str(error))
                return 2
            except Exception as error:  # whatever a server, or the way to it, may raise: it is said, and tried again
                failed = True
                say(f"{publication.key}: {stores.reason(error)}")
                if closed and sync.is_final(error):
                    return 3
            if held != [json.dumps(publication.held) for publication in followed]:
                progress = time.monotonic()
            followed = [publication for publication in followed if not _is_over(publication, closed)]
            if closed and time.monotonic() - progress > drain_timeout:
                break
    return 3 if followed else 0


def _begin(line: str, locks: contextlib.ExitStack) -> Publication:
    name, _, carrier = line.strip().partition(" ")
    run = journal.find(name)
    locks.enter_context(FileLock(run.folder / "publish.lock"))
    publication = Publication(run, stores.home_of(run), carrier)
    publication.save()
    return publication


def _is_over(publication: Publication, closed: float | None) -> bool:
    if publication.complete:
        return True
    # Another process has taken the run up since, with a publisher of its own, which waits for this one.
    return bool(closed) and time.monotonic() - closed > HAND_OVER_SECONDS and publication.run.is_training()
