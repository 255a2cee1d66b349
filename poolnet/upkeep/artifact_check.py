"""Send an artifact there and back, for `poolnet doctor`.

Artifacts lie behind the server, in a store that clients write to themselves, or in a folder.
"""

import contextlib
import tempfile
import uuid
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from poolnet.errors import NoAnswer
from poolnet.tracking import addresses, servers, waiting
from poolnet.upkeep import server_checks
from poolnet.upkeep.visit import Experiment, NotAsked, Problem, Visit, brief

ARTIFACT_BYTES = 2_000_000  # as the predictions on notMNIST; proxies often let one million through
KEPT = "poolnet-doctor.txt"  # for users who may write and not delete: one file, the same each time
EXPLANATION = b"Written by `poolnet doctor` to see whether artifacts arrive. It may be removed.\n"
CLEAN_UP_SECONDS = 2


def artifact(visit: Visit) -> str:
    """Send a file to where artifacts lie, and fetch it again."""
    if not visit.experiment:
        raise NotAsked("there is no experiment to put one in")
    if not visit.may_write:
        raise NotAsked("nothing may be written there")
    place, is_server = visit.experiment.place, visit.uri.startswith("http")
    if is_local_uri(place):
        folder = Path(local_file_uri_to_path(place))
        if is_server and not folder.exists():
            cure = "start the server with --artifacts-destination, and set MLFLOW_EXPERIMENT_NAME to a new experiment"
            raise Problem(f"artifacts of {visit.experiment.name} lie in {folder}, which is on the server's disk", cure)
        visit.folders.append(folder)
        return f"they lie in {folder}"
    if place.startswith("mlflow-artifacts:") and not is_server:
        found = f"artifacts of {visit.experiment.name} lie behind an MLflow server"
        raise Problem(found, "set MLFLOW_TRACKING_URI to the address of that server")
    if place.startswith("mlflow-artifacts:"):
        return _through_server(visit, visit.experiment)
    return _through_library(visit, visit.experiment)


def _through_library(visit: Visit, experiment: Experiment) -> str:
    """Send a file to a store that clients write themselves."""
    name, content = f"poolnet-doctor-{uuid.uuid4().hex}.txt", uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        try:
            with waiting.answering(experiment.place):
                (Path(folder) / name).write_text(content)
                repository = get_artifact_repository(experiment.place)
                try:
                    repository.log_artifact(str(Path(folder) / name))
                    back = repository.download_artifacts(name, folder)
                finally:
                    with contextlib.suppress(Exception):  # what is wrong with the store has been raised
                        repository.delete_artifacts(name)
        except NoAnswer as error:
            cure = "look at the store, and at the way to it"
            raise Problem(f"{experiment.place}: {error}", cure) from None
        except Exception as error:  # of any library
            cure = "look at the store, and at its credentials"
            raise Problem(f"{experiment.place}: {servers.reason(error)}", cure) from None
        if Path(back).read_text() != content:
            raise Problem(f"{experiment.place}: a file does not come back as it was sent", "look at the store")
    return f"arrives in {experiment.place} and comes back"


def _through_server(visit: Visit, experiment: Experiment) -> str:
    """Send a file through the server's own store of artifacts."""
    base = get_artifact_repository(experiment.place, addresses.for_mlflow(visit.uri)).artifact_uri
    name = f"poolnet-doctor-{uuid.uuid4().hex}.txt"
    try:
        may_delete = server_checks.ask(visit, "DELETE", f"/{name}", base).status_code != 403  # there is no such file
    except (MlflowException, NoAnswer) as error:
        cure = "look at where the server keeps its artifacts; its log says more"
        raise Problem(f"the server does not reach its artifacts: {servers.reason(error)}", cure) from None
    path = f"/{name if may_delete else KEPT}"
    content = uuid.uuid4().hex.encode() * (ARTIFACT_BYTES // 32)
    try:
        _there_and_back(visit, base, path, content)
    finally:
        with contextlib.suppress(MlflowException):  # of a server that is silent, say
            if may_delete:
                server_checks.request(base, "DELETE", path, CLEAN_UP_SECONDS)
            else:
                server_checks.request(base, "PUT", path, CLEAN_UP_SECONDS, data=EXPLANATION)
    return "arrives and comes back" + f"; {KEPT} stays, since this user may not delete" * (not may_delete)


def _there_and_back(visit: Visit, base: str, path: str, content: bytes) -> None:
    size, between = f"{len(content):,} bytes", "a proxy in front of it, or its store of artifacts"
    try:
        sent = server_checks.ask(visit, "PUT", path, base, data=content)
    except (MlflowException, NoAnswer) as error:
        cure = "look for a proxy or a firewall that does not pass PUT; else the server's log says more"
        raise Problem(f"an artifact of {size} does not arrive: {servers.reason(error)}", cure) from None
    if sent.status_code == 413:
        cure = "let the proxy pass more; for nginx: client_max_body_size 0"
        raise Problem(f"an artifact of {size} is too large for a proxy", cure)
    if sent.status_code != 200:
        why = brief(server_checks.said(sent).get("message") or sent.reason)
        cure = f"look at {between}; the server's log says more"
        raise Problem(f"an artifact of {size} does not arrive: the answer is {sent.status_code} ({why})", cure)
    try:
        back = server_checks.ask(visit, "GET", path, base)
    except (MlflowException, NoAnswer) as error:
        raise Problem(f"an artifact does not come back: {servers.reason(error)}", f"look at {between}") from None
    if back.content != content:
        raise Problem("an artifact does not come back as it was sent", f"look at {between}")
