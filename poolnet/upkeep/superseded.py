"""Find the runs of sweeps that no present study asks for.

A study is a file, and a sweep is a study on one data set. Two changes leave runs behind that no answer rests on:

- The data file has changed, and the study was swept again. The earlier sweep is superseded if the later one has
  finished: by the same user, of the same study, on a data file at the same path with other content. The sweep that
  ended last counts.
- The study has changed, and was swept again on the same data. The runs that it asks for no longer are superseded, if
  the sweep has finished.

A run stays if any present sweep asks for its settings on its data, since sweeps share runs.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError
from poolnet.studies import study
from poolnet.tracking import names, training_runs


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """A sweep on the server, with the runs that it has trained."""

    name: str
    parent: Run
    children: list[Run]
    data: str  # the path of the data file; empty if it is not known

    @property
    def digest(self) -> str:
        """The beginning of the SHA-256 of the data."""
        return self.name.rpartition("-")[2]

    @property
    def whose(self) -> tuple[str, str, str]:
        """The study, the path of its data, and who swept it."""
        return self.name.rpartition("-")[0], self.data, self.parent.data.tags.get(names.USER, "")

    @property
    def active(self) -> bool:
        return self.parent.info.lifecycle_stage == "active"

    @property
    def finished(self) -> bool:
        return self.active and self.parent.info.status == "FINISHED"

    @property
    def ended(self) -> int:
        return self.parent.info.end_time or 0


def _path(source: str) -> str:
    try:
        return str(json.loads(source)["uri"])
    except (ValueError, LookupError, TypeError):
        return ""


def runs(client: MlflowClient, known: Iterable[Run]) -> Iterator[Run]:
    """Yield superseded runs, children before their sweeps.

    `known` are all runs of an experiment, deleted ones too: one of them is superseded if it was before it was deleted.
    """
    sweeps = _sweeps(known)
    old = {sweep.name for sweep in sweeps if any(_replaces(other, sweep) for other in sweeps)}
    present = [sweep for sweep in sweeps if sweep.active and sweep.name not in old]
    asked = {sweep.name: _asked(client, sweep) for sweep in present}
    unknown = {sweep.digest for sweep in present if not asked[sweep.name]}
    wanted = set().union(*asked.values())
    for sweep in sweeps:
        if (sweep.name in old or sweep.finished) and sweep.digest not in unknown:
            yield from (child for child in sweep.children if child.info.status == "FINISHED" and _key(child) - wanted)
    yield from (sweep.parent for sweep in sweeps if sweep.name in old)


def _sweeps(known: Iterable[Run]) -> list[_Sweep]:
    """Group runs by sweep.

    Of several parents of a sweep, the one that is not deleted counts, and of these the latest.
    """
    children: dict[str, list[Run]] = {}
    parents: dict[str, Run] = {}
    for run in sorted(known, key=lambda run: (run.info.lifecycle_stage == "active", run.info.start_time)):
        children.setdefault(run.data.tags.get(names.SWEEP, ""), []).append(run)
        parents[run.data.tags.get(names.STUDY, "")] = run
    parents.pop("", None)
    return [_Sweep(name, parent, own := children.get(name, []), _data(own)) for name, parent in parents.items()]


def _data(children: Iterable[Run]) -> str:
    """Return the path of the data file of a sweep's runs."""
    sources = (entry.dataset.source for run in children for entry in (run.inputs.dataset_inputs if run.inputs else []))
    try:
        return str(json.loads(next(sources))["uri"])
    except (StopIteration, ValueError, LookupError, TypeError):
        return ""


def _replaces(other: _Sweep, sweep: _Sweep) -> bool:
    """Whether another sweep is of the same study, on new data."""
    same = sweep.data and other.whose == sweep.whose and other.digest != sweep.digest
    return bool(same and sweep.parent.info.status != "RUNNING" and other.finished and other.ended > sweep.ended)


def _asked(client: MlflowClient, sweep: _Sweep) -> set[tuple]:
    """Return the keys of the runs that a sweep's study asks for.

    The set is empty if the study cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = Path(client.download_artifacts(sweep.parent.info.run_id, "study.toml", scratch))
            configs = study.read(path).configs()
        except (MlflowException, OSError, InputError):
            return set()
    return {training_runs.key(config, "", sweep.digest) for config in configs}


def _key(run: Run) -> set[tuple]:
    """Return the key of a run without its device.

    A study that leaves the device open does not say which one it had. The set is empty if the settings are those of
    another version.
    """
    try:
        return {training_runs.key(training_runs.config(run), "", run.data.tags.get(names.DATA_SHA256, "")[:8])}
    except InputError:
        return set()
