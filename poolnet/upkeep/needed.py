"""Find what results name: these runs and versions stay."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.models import budget, champions
from poolnet.tracking import names, servers
from poolnet.tracking.registry import NAME

HISTORY = (".since", ".before", ".over", ".replaced_by", ".decision")  # so end the tags that a promotion writes


@dataclasses.dataclass(frozen=True)
class Named:
    """The runs that results name, and why each of them stays.

    `data` are the SHA-256 of data sets on which somebody compared runs, but it is not known which ones.
    """

    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    data: set[str] = dataclasses.field(default_factory=set)

    def why(self, run: Run) -> str:
        """Say why a run stays; the text is empty if nothing names it."""
        if run.data.tags.get(names.DATA_SHA256) in self.data:
            return "stand in a comparison, perhaps, whose list of runs cannot be read"
        return self.runs.get(run.info.run_id, "")


def runs_of_models(runs: Iterable[Run]) -> dict[str, str]:
    """Return the id of the run that logged a model, by the model's id."""
    return {
        output.model_id: run.info.run_id
        for run in runs
        for output in (run.outputs.model_outputs if run.outputs else ())
    }


def by_results(client: MlflowClient, of_model: Mapping[str, str]) -> Named:
    """Find which runs are named by results in all experiments.

    `of_model` is as from `runs_of_models`. A deleted result names nothing.
    """
    named = Named()
    experiment_ids = [each.experiment_id for each in servers.experiments(client)]
    for result in _tagged(client, experiment_ids, names.EVALUATION):
        inputs = client.get_run(result.info.run_id).inputs  # a search leaves the models out
        ids = [of_model[each.model_id] for each in (inputs.model_inputs if inputs else ()) if each.model_id in of_model]
        ids += re.findall(r"^runs:/([0-9a-f]{32})/", result.data.params.get("model", ""))
        named.runs.update(dict.fromkeys(ids, "were evaluated"))
    for result in _tagged(client, experiment_ids, names.REPRODUCES):
        both = (result.info.run_id, result.data.tags[names.REPRODUCES])
        named.runs.update(dict.fromkeys(both, "stand in a reproduction"))
    for result in _tagged(client, experiment_ids, names.COMPARISON):
        compared = _compared(client, result)
        named.runs.update(dict.fromkeys(compared, "stand in a comparison"))
        if not compared:
            named.data.add(result.data.tags.get(names.DATA_SHA256, ""))
    return named


def _tagged(client: MlflowClient, experiment_ids: Sequence[str], tag: str) -> Iterator[Run]:
    """Yield the runs with a tag, except those that came to nothing."""
    for start in range(0, len(experiment_ids), 500):  # databases bind so many values only
        some, query = experiment_ids[start : start + 500], f"tags.`{tag}` LIKE '%'"
        results = servers.all_pages(client.search_runs, some, query, max_results=1000)
        yield from (run for run in results if run.info.status not in ("FAILED", "KILLED"))


def _compared(client: MlflowClient, comparison: Run) -> list[str]:
    """Return the ids of the runs of a comparison.

    The list is empty if they cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = client.download_artifacts(comparison.info.run_id, "comparison.json", scratch)
            arms = json.loads(Path(path).read_text(encoding="utf-8"))["arms"]
            return [str(run_id) for arm in arms for run_id in arm["runs"]]
        except (MlflowException, OSError, ValueError, LookupError, TypeError):
            return []


def by_promotions(client: MlflowClient, versions: Sequence[ModelVersion]) -> set[str]:
    """Return the numbers of the versions of `poolnet` that stay.

    They have an alias or a stage, or a promotion decided about them, or names them. `versions` are all of the registry.
    """
    stay: set[str] = set()
    for version in versions:
        ours, tags = version.name == NAME, version.tags
        if ours and is_used(version):
            stay.add(str(version.version))
        if ours:
            stay |= {key.removeprefix(budget.PREFIX) for key in tags if key.startswith(budget.PREFIX)}
        for key, value in tags.items() if ours or version.name == champions.OLD_LEDGER else ():
            if key == "version" or key.endswith((".before", ".over", ".replaced_by")):
                stay |= {*value.split()}
    if any(version.name == NAME for version in versions):
        stay |= {str(number) for number in client.get_registered_model(NAME).aliases.values()}
    return stay


def is_used(version: ModelVersion) -> bool:
    """Whether a version has an alias or a stage, or was decided about."""
    used = version.aliases or version.current_stage not in (None, "", "None")
    return bool(used) or any(key.endswith(HISTORY) for key in version.tags)


def all_versions(client: MlflowClient) -> list[ModelVersion]:
    """Return the versions of all registered models."""
    return [*servers.all_pages(client.search_model_versions, max_results=1000)]


def is_poolnets(run: Run) -> bool:
    """Whether poolnet made the run; others are not touched."""
    tags = run.data.tags
    command = re.fullmatch(r"poolnet [a-z]+", tags.get("mlflow.source.name", ""))  # all that one which failed early has
    return bool(command) or any(key.startswith("poolnet.") for key in tags)
