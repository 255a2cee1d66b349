"""Compare a server with this machine, for `poolnet doctor`."""

from collections.abc import Callable, Mapping

from poolnet.errors import InputError
from poolnet.files import home_path
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import published
from poolnet.tracking.published import ServerCopy
from poolnet.upkeep.visit import NotAsked, Problem, Visit

CLOCK_SECONDS = 60  # by which two clocks may differ
NAMED = 3  # of many runs
SYNC = "poolnet sync uploads them again; if they were deleted there for good, remove their folders here"


def clock(seconds_ahead: Callable[[Visit], float | None], visit: Visit) -> str:
    """Compare the clock of the server with this machine's."""
    ahead = seconds_ahead(visit)
    if ahead is None:
        return "this machine's own"
    if abs(ahead) > CLOCK_SECONDS:
        found = f"the server's is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        cure = "set the one that is wrong; on Linux: timedatectl set-ntp true; on Windows: w32tm /resync"
        raise Problem(found, cure)
    return f"the server's and this machine's agree within {CLOCK_SECONDS} s"


def records(statuses: Callable[[Visit, Mapping[str, str]], dict[str, str]], visit: Visit) -> str:
    """Compare the published runs with those on the server."""
    copies = _copies(visit) if home_path().exists() else {}
    there = statuses(visit, {copy.run_id: copy.experiment_id for copy in copies.values()}) if copies else {}
    lost = [name for name, copy in copies.items() if _is_lost(copy, there)]
    if lost:
        some = ", ".join(lost[:NAMED]) + ", ..." * (len(lost) > NAMED)
        found = f"{len(lost):,} of {len(copies):,} runs that were published there are not, or not whole ({some})"
        raise Problem(f"{found}; was it restored from an older backup?", SYNC)
    return f"published there: {len(copies):,}, all of which are there" if copies else "no run here was published there"


def _is_lost(copy: ServerCopy, there: dict[str, str]) -> bool:
    return copy.run_id not in there or bool(copy.status and there[copy.run_id] == "RUNNING")


def _copies(visit: Visit) -> dict[str, ServerCopy]:
    """Return the server's copies by run, as records have them."""
    copies = {}
    try:
        names = run_record.names()
    except InputError as error:
        raise NotAsked(str(error)) from None
    for name in names:
        try:
            copy = published.read(RunRecord(run_record.folder() / name)).servers.get(visit.shown)
        except InputError as error:
            raise Problem(str(error), "do that, or remove the folder of that run") from None
        if copy and copy.run_id:
            copies[name] = copy
    return copies
