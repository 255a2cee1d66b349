"""Share the 5 % of the test among the challengers of a champion.

Fifty challengers that are no better, each tested at 5 %, promote one of them wrongly in a third of such series. So a
champion has a budget of challengers, and each is tested at 5 % divided by the budget (Bonferroni). The chance of a
wrong promotion then is at most 5 % for all of them together.

A challenger is its settings without the seed: the best of fifty seeds is luck. The first seed that is tested stands for
the settings, and other seeds are not tested. Weights from a file have no settings, so each file is a challenger.

The count follows from tags on the champion's version. `challenger/7` says which challenger version 7 was, as in "3 of
10: pool=avg epochs=30 ..., seed=1 on cpu". A champion was trained on one data set. So a new champion and new data both
start a new count.
"""

import re
from dataclasses import dataclass

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking.client import MlflowClient

from poolnet.stats import paired
from poolnet.tracking import names, training_runs
from poolnet.tracking.registry import NAME
from poolnet.training.config import SAME_RUN

PREFIX = "challenger/"  # no alias has a slash, so no tag of a decision begins like this
ENTRY = re.compile(r"(\d+) of ([1-9]\d*): (.*?)(?:, (seed=.*))?")


@dataclass(frozen=True)
class Turn:
    """The place of a challenger among those of one champion.

    `level` is that of its test. `spent` is the sum of the levels of all tests so far. It is above 5 % only if the
    budget was raised after the first tests.
    """

    number: int
    budget: int
    level: float
    spent: float

    def __str__(self) -> str:
        return f"{self.number} of {self.budget}"


class Untested(Exception):
    """Why a challenger is not tested, as a sentence."""


@dataclass(frozen=True)
class _Entry:
    version: int
    number: int
    budget: int
    settings: str
    seed: str  # with the device, which may change digits; empty for weights from a file


def take(client: MlflowClient, champion: ModelVersion, version: int, run: Run, budget: int) -> Turn:
    """Return the turn of a challenger, recorded before its test.

    `version` and `run` are those of the challenger. One that was recorded before keeps its turn, so that it can be
    asked again. A budget below an earlier one of the same champion counts as the earlier one. Raises `Untested` if the
    challenger has no turn. Other promotions must be kept away meanwhile, see `champions.alone`.
    """
    settings, seed = _identity(run)
    entries = _entries(client, champion)
    alike = next((entry for entry in entries if entry.settings == settings), None)
    if alike and alike.seed == seed:
        return _turn(alike, entries)
    if alike:
        raise Untested(
            f"Version {alike.version} stands for these settings, as the first seed that was tested ({alike.seed}): the "
            "best of many seeds is luck, and no better model; decide without a test: --force"
        )
    budget = max([budget, *(entry.budget for entry in entries)])
    if len(entries) >= budget:
        raise Untested(
            f"Version {champion.version} has met {len(entries)} challengers on these validation images, which is its "
            f"budget; raise that, as in --budget {2 * budget}, or train both on data with other validation images"
        )
    entry = _Entry(version, len(entries) + 1, budget, settings, seed)
    key, value = f"{PREFIX}{version}", f"{entry.number} of {budget}: {settings}" + (f", {seed}" if seed else "")
    client.set_model_version_tag(NAME, champion.version, key, value)
    return _turn(entry, [*entries, entry])


def _identity(run: Run) -> tuple[str, str]:
    """Return the settings of a challenger, and its seed."""
    if not training_runs.is_training_run(run):
        return f"weights {run.data.params.get('sha256', run.info.run_id)}", ""
    config = training_runs.config(run)
    settings = {name: value for name in SAME_RUN if (value := getattr(config, name)) != "" and name != "seed"}
    device = run.data.tags.get(names.DEVICE, "unknown device")
    return " ".join(f"{name}={value}" for name, value in settings.items()), f"seed={config.seed} on {device}"


def _entries(client: MlflowClient, champion: ModelVersion) -> list[_Entry]:
    """Read the recorded challengers of a champion, in order."""
    found = []
    for key, value in client.get_model_version(NAME, champion.version).tags.items():
        version, match = key.removeprefix(PREFIX), ENTRY.fullmatch(value)
        if key.startswith(PREFIX) and version.isdecimal() and match:
            found.append(_Entry(int(version), int(match[1]), int(match[2]), match[3], match[4] or ""))
    return sorted(found, key=lambda entry: (entry.number, entry.version))


def _turn(entry: _Entry, entries: list[_Entry]) -> Turn:
    levels = [paired.ALPHA / each.budget for each in entries]
    return Turn(entry.number, entry.budget, paired.ALPHA / entry.budget, sum(levels))
