"""Log, register and load models with MLflow.

The models are the logged model of a run, and the versions of the registered model `poolnet`.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError
from poolnet.text import echo_warning
from poolnet.tracking import model_card, names, programs, server_runs, servers, waiting
from poolnet.tracking.model_card import Card
from poolnet.tracking.servers import Client

if TYPE_CHECKING:  # torch only where a network is made
    from poolnet.training.model import SimpleConvNet, SimplePoolNet

NAME = "poolnet"  # the registered model
NO_VERSIONS = "[]"  # of a model whose version was deleted on purpose
MODEL = "model"  # the logged model of a run, as earlier versions named it, and in addresses of any run's own


def log(
    client: Client,
    run: Run,
    model: LoggedModel | None,
    name: str,
    config: Mapping[str, Any],
    arrays: dict[str, np.ndarray],
) -> str:
    """Create or complete the logged model of a run.

    `model` is what the run has, see `logged`. `name` is that of the run. `arrays` is as for `programs.export`. Returns
    the id of the logged model.
    """
    run_id = run.info.run_id
    if not model:
        params, tags = {key: str(value) for key, value in config.items()}, {names.RUN: name}
        allowed = re.sub(r"""[/:.%"']""", "-", name)  # by MLflow
        model = client.create_logged_model(run.info.experiment_id, allowed, run_id, tags, params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        programs.export(arrays, config["pool"], run_id, model, path)
        with servers.artifacts(client, model.artifact_location) as repository:
            repository.log_artifacts(str(path))
    outputs = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, config["epochs"])])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


def logged(client: MlflowClient, run: Run) -> LoggedModel | None:
    """Return the model that poolnet logged for a run, if any."""
    return _own(_models(client, run))


def _models(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Return all models of a run; some may be a user's."""
    return client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")


def _own(models: list[LoggedModel]) -> LoggedModel | None:
    """Return the model that poolnet logged, if any.

    It has a tag. In earlier versions it had none, and this name.
    """
    tagged = [model for model in models if names.RUN in (model.tags or {})]
    return next(iter(tagged + [model for model in models if model.name == MODEL]), None)


def register(client: MlflowClient, run_id: str, model_id: str, card: Card) -> int:
    """Register a run's logged model as a `poolnet` version.

    If the model is a version already, no new one is made. Returns the number of the version.
    """
    version = version_of(client, run_id, model_id)
    if not version:
        source, text = f"models:/{model_id}", card.sentence
        create = partial(client.create_model_version, NAME, source, run_id, card.tags, description=text)
        try:
            version = int(create(model_id=model_id).version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            with contextlib.suppress(MlflowException):  # of which one says that another process was faster
                client.create_registered_model(NAME, description=model_card.DESCRIPTION)
            version = int(create(model_id=model_id).version)
        else:
            _describe(client)
    # what the model's own page goes by
    client.set_logged_model_tags(model_id, {names.MODEL_VERSIONS: json.dumps([{"name": NAME, "version": version}])})
    return version


def withdraw(client: MlflowClient, version: ModelVersion) -> None:
    """Delete a version; its model then says that it has none.

    So `poolnet sync` does not take the version for lost, and does not register the model again.
    """
    client.delete_model_version(NAME, version.version)
    if model_id := logged_id(version):
        with contextlib.suppress(MlflowException):  # of a model that somebody has deleted
            client.set_logged_model_tags(model_id, {names.MODEL_VERSIONS: NO_VERSIONS})


def is_withdrawn(model: LoggedModel) -> bool:
    """Whether a model's version was deleted on purpose."""
    return (model.tags or {}).get(names.MODEL_VERSIONS) == NO_VERSIONS


def _describe(client: MlflowClient) -> None:
    """Describe the registered model if nobody has."""
    if not client.get_registered_model(NAME).description:
        client.update_registered_model(NAME, model_card.DESCRIPTION)


def version_of(client: MlflowClient, run_id: str, model_id: str) -> int | None:
    """Return the version that a run's model became, if any."""
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    numbers = [int(each.version) for each in versions if (each.name, each.source) == (NAME, f"models:/{model_id}")]
    return min(numbers, default=None)


# --- models in use ----------------------------------------------------------------------------------------------------

MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for an address of nothing
PYFUNC = {"loader_module": "mlflow.pytorch", "data": "data"}  # by what MLflow serves it
SCHEME = "Could not find a registered artifact repository"  # what MLflow says of an address that it does not know
FILES = {  # all that the folder of a model may hold
    *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta"),
    *("input_example.json", "serving_input_example.json", "data/model.pt2", "data/weights.safetensors"),
}
READ = ("MLmodel", "data/model.pt2", "data/weights.safetensors")
UNCHECKED = "its weights are used, and its export, which MLflow serves, was not checked"
LIMIT = 4 << 20  # bytes of a file; the largest of these models has 150 kB
CURE = "expected a model that poolnet train logged; weights in a file: poolnet register FILE --pool POOL"


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded from MLflow.

    `net` is on the CPU. It takes (N, 1, 28, 28) float32 and gives logits (N, 10).
    """

    uri: str  # as it was asked for
    pool: str
    net: "SimplePoolNet | SimpleConvNet"
    run_id: str  # of the run that it says it is from
    model_id: str  # of the logged model on this server; empty for a folder
    version: ModelVersion | None  # of the registered model that it is, if it is one


def load_model(uri: str) -> "SimplePoolNet | SimpleConvNet":
    """Load the network at an address, or of a run.

    The address may be any that MLflow resolves, or the name of a run, see `load`.
    """
    return load(uri).net


def load(uri: str, check_export: bool = False) -> Loaded:
    """Load a model from MLflow or from a folder.

    `uri` is any address that MLflow resolves, such as `models:/poolnet@champion`, or a folder, or names a run as
    `server_runs.look_up` takes it.

    The weights are read. Nothing is unpickled or executed. Raises `InputError` if that would be needed, or if nothing
    is found. With `check_export`, it also raises `InputError` if MLflow would serve another network. If this cannot be
    found out, there is a warning.
    """
    client = servers.own_client()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model_id, version = _identify(client, uri)
            if uri.startswith("models:/") and version:  # by its number, since an alias may have moved on
                place = f"models:/{version.name}/{version.version}"
            elif model_id:
                place = f"models:/{model_id}"
            else:
                place = uri.rstrip("/") if ":/" in uri else Path(uri).absolute().as_uri()
            with waiting.answering(client.uri):
                _fetch(place, Path(scratch), uri)
        except (MlflowException, ImportError, OSError, ValueError) as error:  # s3:// asks for a library, say
            if isinstance(error, InputError):
                raise
            if isinstance(error, MlflowException) and error.error_code not in MISSING and SCHEME not in str(error):
                raise
            why = servers.reason(error).rstrip(".")  # MLflow's own is a sentence
            raise InputError(f"{uri}: {why}; expected a model, as in models:/{NAME}/1, or a run") from None
        pool, net, run_id = _read(Path(scratch), uri, check_export)
    return Loaded(uri, pool, net, (version.run_id if version else run_id) or "", model_id, version)


def _fetch(place: str, folder: Path, uri: str) -> None:
    """Copy the files of a model that are read.

    Before that, other files and files that are too large are refused with `InputError`.
    """
    files = get_artifact_repository(place)
    sizes = {entry.path: entry.file_size for entry in files.list_artifacts(None)}
    if "MLmodel" not in sizes:
        raise InputError(f"{uri}: found no model of MLflow's there; {CURE}")
    sizes |= {entry.path: entry.file_size for entry in files.list_artifacts("data")}
    sizes.pop("data", None)
    if "data/model.pth" in sizes or "data/model.pt2" not in sizes:
        raise InputError(f"{uri}: found a pickled model, which runs what its maker put in when it is loaded; {CURE}")
    local = getattr(getattr(files, "repo", files), "artifact_dir", None)  # of a store on this machine
    for name, size in sizes.items():
        if local and not Path(local, name).is_file():  # a pipe or a device, which never ends
            size = None
        if name not in FILES:
            raise InputError(f"{uri}: found {name} beside the model, which may bring code along; {CURE}")
        if size is None or size > LIMIT:  # None also of a folder
            amount = "unknown size" if size is None else f"{size:,} bytes"
            raise InputError(f"{uri}: found {name} of {amount}, expected a file of {LIMIT:,} at most")
    for name in sizes.keys() & set(READ):
        files.download_artifacts(name, str(folder))


def _identify(client: MlflowClient, uri: str) -> tuple[str, ModelVersion | None]:
    """Return the logged model and version of an address.

    The logged model is given by its id, which is empty if there is none. The version is None if there is none.
    """
    version = None
    if match := re.fullmatch(r"models:/(m-[0-9a-f]+)/?", uri):
        model_id = match[1]
        run_id = client.get_logged_model(model_id).source_run_id
    elif match := re.fullmatch(r"models:/([^/@]+)(?:@(.+)|/(.+))", uri):
        name, alias, number = match.groups()
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        elif number == "latest":
            version = newest(client, name)
        else:
            version = client.get_model_version(name, number)
        return logged_id(version) or "", version
    elif match := re.fullmatch(r"runs:/([0-9a-f]{32})/([^/]+)/?", uri):
        run_id, name = match.groups()
        models = _models(client, client.get_run(run_id))
        model = next((model for model in models if model.name == name), _own(models) if name == MODEL else None)
        model_id = model.model_id if model else ""
    elif uri.startswith("models:"):
        raise ValueError("no address of a model")
    elif ":/" not in uri and not (uri and Path(uri).is_dir()):
        run = server_runs.find_run(client, uri)
        if not run:
            raise ValueError("no such folder, and no such run on the tracking server")
        model = logged(client, run)
        if not model:
            raise ValueError("found no model of this run on the tracking server")
        run_id, model_id = run.info.run_id, model.model_id
    else:
        return "", None
    number = version_of(client, run_id, model_id) if run_id else None
    return model_id, client.get_model_version(NAME, str(number)) if number else None


def logged_id(version: ModelVersion) -> str | None:
    """Return the id of a version's logged model, if any."""
    source = version.source or ""
    return source.removeprefix("models:/") if source.startswith("models:/m-") else None


def newest(client: MlflowClient, name: str = NAME, pool: str = "") -> ModelVersion:
    """Return the version that was registered last.

    If `pool` is given, it is the last version of that pool. Raises `InputError` if there is no version.
    """
    query = f"name = '{name}'" + (f" AND tags.pool = '{pool}'" if pool else "")
    versions = client.search_model_versions(query, max_results=1, order_by=["version_number DESC"])
    if not versions:
        what = f"{pool} version" if pool else "version"
        raise InputError(f"models:/{name}: found no {what} on the tracking server; train one with: poolnet train")
    return versions[0]


def _read(folder: Path, uri: str, check_export: bool) -> tuple[str, "SimplePoolNet | SimpleConvNet", str | None]:
    """Read pool, network and run id from a model's folder."""
    import torch

    try:
        model = Model.load(str(folder))
        torch_flavor, flavor = model.flavors["pytorch"], model.flavors.get("python_function", PYFUNC)
        own = (torch_flavor.get("model_data"), torch_flavor.get("code"), flavor.get("code")) == ("data", None, None)
        served = {key: flavor.get(key) for key in PYFUNC} == PYFUNC
    except Exception as error:  # whatever a parser may raise of a file that anybody may have written
        raise InputError(f"{uri}: found no pytorch model of MLflow's ({servers.reason(error)}); {CURE}") from None
    if not (own and served and model.flavors.keys() <= {"pytorch", "python_function"}):
        raise InputError(f"{uri}: found a model that brings code along, which is not run; {CURE}")
    try:
        pool, net = programs.read(folder)
    except ValueError as error:
        raise InputError(f"{uri}: {' '.join(str(error).split())}; {CURE}") from None
    maker, here = torch_flavor.get("pytorch_version"), torch.__version__
    if check_export and not (folder / programs.WEIGHTS).exists():
        echo_warning(f"{uri}: {UNCHECKED}, as an earlier version of poolnet logged it")
    elif check_export and maker != here:
        echo_warning(f"{uri}: {UNCHECKED}, as torch {maker} made it and this is {here}")
    elif check_export and not programs.is_ours(folder, net):
        raise InputError(f"{uri}: found an export, which MLflow would serve, that is not that of its weights; {CURE}")
    return pool, net, model.run_id
