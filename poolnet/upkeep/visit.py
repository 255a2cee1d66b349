"""What the checks of `poolnet doctor` know and say."""

import dataclasses
import re
from typing import Any

from requests import Response

from poolnet.secret import hidden, shown

LOOK_AT_URI = "look at MLFLOW_TRACKING_URI"
START = "start it, or correct MLFLOW_TRACKING_URI, or look for a firewall or a VPN in between"


class Problem(Exception):
    """Something that is wrong, and its cure.

    `blocks` says why the server or store cannot be asked anything after that, if so.
    """

    def __init__(self, found: str, cure: str, blocks: str = ""):
        super().__init__(found)
        self.found, self.cure, self.blocks = found, cure, blocks


class NotAsked(Exception):
    """A check that has nothing to ask, and why."""


@dataclasses.dataclass
class Experiment:
    """The experiment of this process on the server."""

    experiment_id: str
    name: str
    place: str  # where its artifacts lie


@dataclasses.dataclass
class Visit:
    """What the checks have found out so far."""

    timeout: float
    uri: str = ""
    blocked: str = ""  # why the server or store cannot be asked
    reply: Response | None = None  # of a server, the first
    replied: float = 0  # when, by this machine's clock
    experiment: Experiment | None = None
    may_write: bool = False  # in the experiment
    folders: list = dataclasses.field(default_factory=list)  # that need room, besides those of any command

    @property
    def shown(self) -> str:
        return shown(self.uri)


def brief(text: Any) -> str:
    """Return an error in one line, without secrets."""
    line = hidden(" ".join(str(text).split()))
    line = re.sub(r"^\(\S+\) |\(Background on this error at: \S+\)|\[SQL: .*", "", line).strip()
    return line if len(line) <= 200 else f"{line[:200]}..."


def no_experiment(number: str) -> Problem:
    return Problem(f"MLFLOW_EXPERIMENT_ID={number}: no such experiment", "unset it, or correct it")


def may_be_written(visit: Visit, stage: str) -> str:
    """Say that the experiment may be written, or raise `Problem`."""
    assert visit.experiment
    if stage == "deleted":
        cure = f"mlflow experiments restore --experiment-id {visit.experiment.experiment_id}"
        raise Problem(f"experiment {visit.experiment.name} is deleted", cure)
    visit.may_write = True
    return f"{visit.experiment.name} may be written"
