"""Give users of a tracking server the rights that poolnet needs.

The server is `mlflow server --app-name basic-auth`. MLflow's own client of it needs all packages of the server, so this
module asks its REST interface.
"""

import contextlib
from collections.abc import Mapping

from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from poolnet.errors import InputError, RunError
from poolnet.secret import hidden
from poolnet.tracking import addresses, registry, servers, waiting

USERS = "/api/2.0/mlflow/users/"
PERMISSIONS = "/api/3.0/mlflow/users/permissions/"


def grant(client: servers.Client, user: str, right: str) -> str:
    """Let a user use poolnet; return which rights that are.

    The rights are on this process's experiment and on the registered model, which are made if they are missing. Only an
    administrator can do it, or who manages both.
    """
    if not client.uri.startswith("http"):
        raise InputError(f"{addresses.shown(client.uri)}: has no users, expected a server with --app-name basic-auth")
    experiment_id = servers.own_experiment(client)
    _make_model(client)
    for kind, name in (("experiment", experiment_id), ("registered_model", registry.NAME)):
        asked = {"username": user, "resource_type": kind, "resource_id": name}
        try:
            _ask(client, f"{PERMISSIONS}grant", {**asked, "permission": right})
        except _Exists:  # another right, which MLflow does not replace
            _ask(client, f"{PERMISSIONS}revoke", asked)
            _ask(client, f"{PERMISSIONS}grant", {**asked, "permission": right})
    experiment = client.get_experiment(experiment_id).name
    return f"{user} has {right} on the experiment {experiment} and the registered model {registry.NAME}"


def create_user(client: servers.Client, user: str, password: str) -> None:
    """Create a user, if there is none of that name."""
    with contextlib.suppress(_Exists):
        _ask(client, f"{USERS}create", {"username": user, "password": password})


class _Exists(Exception):
    pass


def _make_model(client: MlflowClient) -> None:
    try:
        client.create_registered_model(registry.NAME)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"):
            raise


def _ask(client: servers.Client, endpoint: str, asked: Mapping[str, str]) -> None:
    with waiting.answering(client.uri):
        creds = get_default_host_creds(client.uri)
        answer = http_request(creds, endpoint, "POST", json=asked, raise_on_status=False)
    if answer.status_code == 200:
        return
    if "RESOURCE_ALREADY_EXISTS" in answer.text:
        raise _Exists
    if "RESOURCE_DOES_NOT_EXIST" in answer.text:
        signup = f"{addresses.shown(client.uri)}/signup"
        raise InputError(f"{asked['username']}: found no such user; an administrator makes one at {signup}")
    if answer.status_code == 404:
        why = "the server has no users, expected one with --app-name basic-auth"
    else:
        why = servers.CURES.get(str(answer.status_code), hidden(" ".join(answer.text.split()))[:200])
    raise RunError(f"{addresses.shown(client.uri)}: {why}")
