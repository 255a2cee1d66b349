"""Find out why poolnet or its server does not work.

Each check says what it found, or what is wrong and how to cure it. A check that fails does not stop the others. A check
that cannot ask, because an earlier one failed, says so. Nothing that is written for a check stays.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType

from poolnet.errors import NoAnswer
from poolnet.text import aligned
from poolnet.tracking import waiting
from poolnet.upkeep import local_checks, store_checks
from poolnet.upkeep.visit import NotAsked, Problem, Visit, brief


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check."""

    check: str
    ok: bool | None  # None if it could not be asked
    found: str
    cure: str = ""


FIRST = {"time-outs": local_checks.time_outs, "address": local_checks.address}
LAST = {
    "locks": local_checks.locks,
    "disk": local_checks.disk,
    "data sets": local_checks.data_sets,
    "device": local_checks.device,
}


def examine(timeout: float = 20) -> list[Check]:
    """Check this machine and the tracking server of this process.

    A server that is silent for `timeout` seconds is given up.
    """
    visit = Visit(timeout)
    results = [_carry_out(name, check, visit) for name, check in FIRST.items()]
    waiting.limit(timeout)
    for name, check in _remote(visit).items():
        if visit.blocked:
            results.append(Check(name, None, f"not asked: {visit.blocked}"))
        else:
            with waiting.within(timeout):
                results.append(_carry_out(name, check, visit))
    return results + [_carry_out(name, check, visit) for name, check in LAST.items()]


def _remote(visit: Visit) -> dict[str, Callable[[Visit], str]]:
    """Return the checks that ask the server or the database."""
    from poolnet.upkeep.artifact_check import artifact

    kind: ModuleType
    if visit.uri.startswith("http"):
        from poolnet.upkeep import server_checks as kind
    else:
        from poolnet.upkeep import database_checks as kind
    return {
        "reachability": kind.reachability,
        "credentials": kind.credentials,
        "database": kind.database,
        "version": kind.version,
        "schema": kind.schema,
        "clock": partial(store_checks.clock, kind.seconds_ahead),
        "experiment": kind.experiment,
        "registry": kind.registry,
        "records": partial(store_checks.records, kind.statuses),
        "artifact": artifact,
    }


def _carry_out(name: str, check: Callable[[Visit], str], visit: Visit) -> Check:
    try:
        return Check(name, True, check(visit))
    except Problem as problem:
        visit.blocked = visit.blocked or problem.blocks
        return Check(name, False, problem.found, problem.cure)
    except NotAsked as why:
        return Check(name, None, f"not asked: {why}")
    except NoAnswer as error:
        visit.blocked = "the server is silent"
        return Check(name, False, str(error), "restart the server, or wait longer with --timeout")
    except Exception as error:  # the others go on
        if name == "reachability":  # the others would fail too
            visit.blocked = "the server cannot be reached"
        found = f"the check failed: {brief(error) or type(error).__name__}"
        return Check(name, False, found, "mend that, or report it with this line")


def table(checks: Iterable[Check]) -> str:
    """Return the checks as lines for the terminal."""
    words = {True: "ok", False: "problem", None: "-"}
    rows = [(each.check, words[each.ok], "; ".join(filter(None, (each.found, each.cure)))) for each in checks]
    return "\n".join(aligned(rows))
