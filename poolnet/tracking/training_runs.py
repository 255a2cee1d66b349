"""Read training runs from a tracking server."""

import contextlib
import dataclasses
import json
import shlex
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import click
import numpy as np
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.data.dataset import LETTERS
from poolnet.errors import InputError
from poolnet.secret import hidden
from poolnet.text import Echo, echo_warning
from poolnet.tracking import names, servers
from poolnet.training.config import SAME_RUN, TrainConfig

SCORES = ("val_acc", "val_loss", "test_acc", "test_loss")  # with the final weights
# What `mlflow run` may record of a training, the last of which are no settings of it.
OPTIONS = {field.name for field in dataclasses.fields(TrainConfig)}
OPTIONS |= {"resume", "optimum", "no_cache", "open", "open_page", "timeout", "drain_timeout"}


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run predicts for the images of a split.

    `group` and `optimum` are None where the run did not log them.
    """

    logits: np.ndarray  # (N, 10), with the final weights
    y: np.ndarray  # (N,), the labels
    group: np.ndarray | None  # (N,), the number of each image's group in the data set
    optimum: np.ndarray | None  # (N, 10), logits with the weights of the lowest train loss


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A run of `poolnet train` on a tracking server.

    `metrics` has the last value of each metric.
    """

    run_id: str
    experiment_id: str
    name: str  # of its record
    status: str
    started: int  # ms since 1970
    config: TrainConfig
    device: str
    data_name: str
    data_sha256: str
    commit: str  # empty where it is unknown
    metrics: dict[str, float]
    classes: tuple[str, ...] = tuple(LETTERS)
    groups_cross: str = ""  # how many groups are in more than one split, such as "12 of 1,213 groups"

    @property
    def key(self) -> tuple:
        return key(self.config, self.device, self.data_sha256)


def key(config: TrainConfig, device: str, data_sha256: str) -> tuple:
    """Return the values that decide a run's figures.

    Two runs with the same key must give the same figures.
    """
    return (*(getattr(config, name) for name in SAME_RUN), device, data_sha256)


def finished(
    client: MlflowClient,
    experiment_ids: list[str],
    data_sha256: str,
    optimum: bool = False,
    echo_warning: Echo = echo_warning,
) -> dict[tuple, TrainingRun]:
    """Return the newest finished run of each key.

    The runs are on the data set with this digest, and have all metrics in `SCORES`. With `optimum`, those of poolings
    have the scores at the optimum too. A sweep need not train these runs again, and a comparison compares them.
    """
    query = f"attributes.status = 'FINISHED' AND tags.`{names.DATA_SHA256}` = '{data_sha256}'"
    at_optimum = {*SCORES, names.METRICS["optimum_test_loss"]}
    return {
        run.key: run
        for run in reversed([*search(client, experiment_ids, query, echo_warning)])
        if run.metrics.keys() >= (at_optimum if optimum and run.config.pool != "conv" else {*SCORES})
    }


def search(
    client: MlflowClient,
    experiment_ids: list[str],
    query: str = "",
    echo_warning: Echo = echo_warning,
) -> Iterator[TrainingRun]:
    """Yield the poolnet runs of experiments that match a query.

    `query` is an MLflow filter. The newest run comes first. Runs that only reproduce another run are left out, because
    they would count twice. Runs with settings of another version are left out too, with one warning for all of them.
    """
    unknown: dict[str, InputError] = {}
    for run in servers.all_pages(client.search_runs, experiment_ids, query, max_results=1000):
        if is_training_run(run) and names.REPRODUCES not in run.data.tags:
            try:
                yield of(run)
            except InputError as error:
                unknown[run.data.tags[names.RUN]] = error
    warn_of_unknown(unknown, echo_warning)


def warn_of_unknown(unknown: Mapping[str, Exception], echo_warning: Echo) -> None:
    """Warn once about runs that were left out.

    The warning has the name of the first run, the number of the others, and why the first was left out. `unknown` maps
    the names of the runs to their errors.
    """
    if unknown:
        name, error = next(iter(unknown.items()))
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        echo_warning(f"left out {name}{more}, which this version of poolnet does not know: {error}")


def is_training_run(run: Run) -> bool:
    """Whether `poolnet train` or a sweep made the run."""
    return names.RUN in run.data.tags


def of(run: Run) -> TrainingRun:
    """Return the `TrainingRun` of an MLflow run.

    Raises `InputError` if the run has settings that this version does not know.
    """
    tags = run.data.tags
    for name in run.data.params:
        if name.replace("-", "_") not in OPTIONS:
            raise InputError(f"run {run.info.run_id}: found a setting that is called {name}")
    datasets = [entry.dataset.name for entry in run.inputs.dataset_inputs] if run.inputs else []
    return TrainingRun(
        run.info.run_id,
        run.info.experiment_id,
        tags[names.RUN],
        run.info.status,
        run.info.start_time,
        config(run),
        tags.get(names.DEVICE, ""),
        datasets[0] if datasets else "",
        tags.get(names.DATA_SHA256, ""),
        tags.get(names.COMMIT, ""),
        run.data.metrics,
        classes(run),
        tags.get(names.GROUPS_CROSS, ""),
    )


def classes(run: Run | None) -> tuple[str, ...]:
    """Return the names of the classes of a run's data set.

    They are A to J if the run does not say, or is not on this server.
    """
    text = run.data.tags.get(names.CLASSES) if run else None
    if not run or text is None:
        return tuple(LETTERS)
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, list) and len(found) == len(LETTERS) and {*map(type, found)} == {str}:
            return tuple(found)
    raise InputError(f"run {run.info.run_id}: found {names.CLASSES} {text[:40]!r}, expected ten names")


def config(run: Run) -> TrainConfig:
    """Return the settings in the params of a run.

    `mlflow run` records the params as they were typed. Raises `InputError` if they are not valid settings.
    """
    params, kinds = run.data.params, get_type_hints(TrainConfig)
    try:
        return TrainConfig(**{name: _parsed(params[name], kind) for name, kind in kinds.items() if name in params})
    except (InputError, click.BadParameter) as error:
        raise InputError(f"run {run.info.run_id}: found params that no training has: {error}") from None


def predictions(client: MlflowClient, run_id: str, name: str, split: str) -> Predictions:
    """Download the predictions that a run logged.

    They are those of `split`, which is val or test. `name` is the name of the run in the error message. Raises
    `InputError` if the file is missing or not readable.
    """
    file = f"predictions/{split}.npz"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = Path(client.download_artifacts(run_id, file, scratch))
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:  # closed even if no archive
                found = Predictions(saved["logits"], saved["y"], saved.get("group"), saved.get("optimum"))
            _check(found)
            return found
        except (MlflowException, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            text = hidden(" ".join(str(error).split()))[:200]
            raise InputError(f"{name}: found no readable {file} on the server ({text})") from None


def _check(found: Predictions) -> None:
    """Raise `ValueError` if predictions do not fit together."""
    from poolnet.stats import paired  # and with it scipy.stats, for which a sweep need not wait

    for logits in (found.logits, found.optimum):
        if logits is not None:
            paired.per_example(logits, found.y)  # which refuses what does not fit
    if (group := found.group) is not None and (
        group.shape != found.y.shape or group.dtype.kind not in "iu" or (group < 0).any()
    ):
        raise ValueError(f"found groups {group.dtype} {group.shape}, expected one number from 0 for each label")


def _parsed(raw: str, kind: type) -> Any:
    with contextlib.suppress(ValueError):
        if raw[:1] in ("'", '"'):  # quoted for a shell
            raw = shlex.split(raw)[0]
    return click.types.convert_type(kind)(raw)
