"""Models as MLflow keeps them: the logged model of a run, and the versions of the registered model `poolnet`."""

import contextlib
import importlib.metadata
import json
import tempfile
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking.client import MlflowClient
from mlflow.types import Schema, TensorSpec

from poolnet.data import SIDE

NAME = "poolnet"  # the registered model
MODEL = "model"  # the logged model of a run
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 1, SIDE, SIDE))]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
)


def import_exporter() -> None:
    """What `export` needs takes three seconds to import: to be called where nobody waits for it."""
    import mlflow.pytorch  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch.export  # noqa: F401


def log(client: MlflowClient, run: Run, config: dict[str, object], arrays: dict[str, np.ndarray]) -> str:
    """The logged model of a run, made, or made whole, unless it is READY. `arrays` as for `export`. Returns its id."""
    run_id = run.info.run_id
    model = logged(client, run)
    if not model:
        params = {name: str(value) for name, value in config.items()}
        model = client.create_logged_model(run.info.experiment_id, MODEL, run_id, params=params)
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MODEL
            export(arrays, config["pool"], run_id, model, path)
            client.log_model_artifacts(model.model_id, str(path))
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in [output.model_id for output in outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, config["epochs"])])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


def logged(client: MlflowClient, run: Run) -> LoggedModel | None:
    query = f"source_run_id = '{run.info.run_id}' AND name = '{MODEL}'"
    found = client.search_logged_models([run.info.experiment_id], query, max_results=1)
    return found[0] if found else None


def export(arrays: dict[str, np.ndarray], pool: str, run_id: str, model: LoggedModel, path: Path) -> None:
    """Write the network to a new folder as an exported program, free of pickle, for any batch size.

    `arrays` holds its weights by name and, as `example`, two images: of one, the export would take only one.
    """
    import torch

    from poolnet.model import build_model

    example = arrays["example"]
    net = build_model(pool, seed=0)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items() if name != "example"})
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ("mlflow", "numpy", "torch")}
    mlflow.pytorch.save_model(
        net.eval(),
        str(path),
        mlflow_model=Model(
            artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
        ),
        signature=SIGNATURE,
        input_example=example,
        serialization_format="pt2",
        pip_requirements=[f"{name}=={version}" for name, version in versions.items()],  # inferring takes 10 s
    )


def register(client: MlflowClient, run_id: str, model_id: str, tags: dict[str, str]) -> int:
    """The version of `poolnet` that a run's logged model is: the one there is, or a new one. Returns its number."""
    version = version_of(client, run_id, model_id)
    if not version:
        with contextlib.suppress(MlflowException):  # of which one says that the name exists, as it usually does
            client.create_registered_model(NAME)
        version = int(client.create_model_version(NAME, f"models:/{model_id}", run_id, tags, model_id=model_id).version)
    # what the model's own page goes by
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([{"name": NAME, "version": version}])})
    return version


def version_of(client: MlflowClient, run_id: str, model_id: str) -> int | None:
    """The number of the version that a run's logged model is, if it is one."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    numbers = [int(found.version) for found in found if (found.name, found.source) == (NAME, f"models:/{model_id}")]
    return min(numbers, default=None)
