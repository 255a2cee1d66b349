"""What is remembered of a run's publication, in its `published.json`.

It is only a memory: what it has lost is looked up on the server again.
"""

import dataclasses
from typing import TypeVar, get_type_hints

from poolnet.errors import InputError
from poolnet.files import read_json
from poolnet.runs.run_record import RunRecord

Stored = TypeVar("Stored")


@dataclasses.dataclass
class ServerCopy:
    """What a tracking server has of a run."""

    run_id: str = ""
    experiment_id: str = ""
    done: list = dataclasses.field(default_factory=list)  # names of steps, see `publication.steps`
    metrics: int = 0  # how many records
    status: dict | None = None  # how the run ended, as in `end.json`
    model_id: str = ""
    version: int | None = None
    stand_in: str = ""  # the id of another machine's run of the same sweep and settings; then there is no `run_id`


@dataclasses.dataclass
class Published:
    """The content of `published.json`."""

    home: str = ""  # the address of the run's own server, without the password
    experiment: str = ""  # the name of the run's experiment there
    servers: dict = dataclasses.field(default_factory=dict)  # a `ServerCopy` for each address


def read(run: RunRecord) -> Published:
    """Read what is remembered of a run's publication.

    Raises `InputError` if the file is damaged.
    """
    path = run.folder / "published.json"
    if not path.exists():
        return Published()
    try:
        published = _checked(Published, read_json(path))
        copies = {address: _checked(ServerCopy, stored) for address, stored in published.servers.items()}
    except (TypeError, AttributeError):
        raise InputError(
            f"{path}: damaged; remove it, then: poolnet sync {run.name} (which looks up what the server has)"
        ) from None
    return dataclasses.replace(published, servers=copies)


def at_home(run: RunRecord) -> ServerCopy:
    """Return what the run's own server has of it.

    Raises `InputError` if that is not known because the file is damaged.
    """
    memory = read(run)
    return memory.servers.get(memory.home, ServerCopy())


def _checked(kind: type[Stored], values: dict) -> Stored:
    """Build a dataclass from stored values, and check them.

    Values that only a later version knows are left out. Raises `TypeError` if a value has another type, or if there is
    no value for the dataclass.
    """
    types = get_type_hints(kind)
    known = {name: values[name] for name in types if name in values}
    if not known or not all(isinstance(value, types[name]) for name, value in known.items()):
        raise TypeError(kind.__name__)
    return kind(**known)
