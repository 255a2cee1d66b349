"""Find the run that a text names.

The text is the name of a run, the beginning of a name, or MLflow's run id. Names on disk and names on a server are
searched by the same rules.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from poolnet.errors import InputError

LISTED = 10  # runs that an error lists

Search = Callable[[str, bool], Mapping[str, str]]  # a text, and whether more may follow; names by id


def choose(text: str, search: Search) -> str | None:
    """Return the id of the run that a text names.

    A run that has exactly this name comes first. Then comes one whose name goes on with "-", so that `avg-seed4` is not
    `avg-seed42-8702`. Then comes any whose name begins so. The result is None if there is no such run. Raises
    `InputError`, which lists the runs, if several are equally good.
    """
    for beginning, more in ((text, False), (f"{text}-", True), (text, True)):
        matches = search(beginning, more) if text else {}
        if len(matches) == 1:
            return next(iter(matches))
        if matches:
            raise InputError(f"{text}: found {_listed(matches)}; type more of the name, or MLflow's run id")
    return None


def _listed(names: Mapping[str, str]) -> str:
    """List runs by name; add ids where names are equal."""
    times = Counter(names.values())
    labels = [name if times[name] == 1 else f"{name} (run {number})" for number, name in names.items()]
    count = f"{len(labels)} runs" if len(labels) <= LISTED else f"more than {LISTED} runs"
    return f"{count}: {', '.join(labels[:LISTED])}"
