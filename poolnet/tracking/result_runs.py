"""Log results to MLflow runs that are not trainings.

Such a run is a comparison, an evaluation, a promotion, or weights that come from elsewhere.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import NoAnswer
from poolnet.runs import provenance, run_record
from poolnet.tracking import names, server_runs, waiting

END_SECONDS = 2.5  # that a server has to take the end of a run that was cut off


@contextlib.contextmanager
def run(
    client: MlflowClient, experiment_id: str, command: str, name: str, begun: str = "", more: Mapping[str, str] = {}
) -> Iterator[str]:
    """Open a run in MLflow for the block.

    Yields the id of the run. The run ends with the block: as FAILED if the block raises, and as KILLED if it is
    interrupted.

    It is the run that `mlflow run` has made for this command, the run `begun` that an earlier command began, or a new
    one. A new run gets the tags `more`.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID", "") or begun
    if run_id:
        client.update_run(run_id, "RUNNING", name)
        server_runs.hide_origin(client, client.get_run(run_id))
    else:
        tags = {**more, **names.source(command, provenance.user())}
        run_id = client.create_run(experiment_id, run_record.now(), tags, name).info.run_id
    try:
        yield run_id
    except BaseException as error:  # or it would be RUNNING for good
        with contextlib.suppress(MlflowException, NoAnswer), waiting.within(END_SECONDS):
            client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    client.set_terminated(run_id)


def log(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Mapping[str, float],
    params: Mapping[str, str],
    tags: Mapping[str, str],
    folder: Path | None = None,
    dataset: DatasetInput | None = None,
    model_id: str = "",
) -> None:
    """Log metrics, params, tags and files to a run.

    The files of `folder` become the artifacts of the run. With `model_id`, the metrics also become metrics of the
    logged model on `dataset`, so that the model's own page shows them.
    """
    more = {"model_id": model_id, "run_id": run_id} if model_id else {}
    if dataset:
        more |= {"dataset_name": dataset.dataset.name, "dataset_digest": dataset.dataset.digest}
    known = client.get_run(run_id).data.params  # those of `mlflow run`, in the words they were typed in
    client.log_batch(
        run_id,
        [Metric(key, value, run_record.now(), 0, **more) for key, value in metrics.items()],
        [Param(key, value) for key, value in params.items() if key not in known],
        [RunTag(*tag) for tag in tags.items()],
    )
    if folder:
        client.log_artifacts(run_id, str(folder))
