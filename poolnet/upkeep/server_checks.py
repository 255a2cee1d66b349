"""Ask a tracking server what `poolnet doctor` wants to know.

Nothing stays on the server. Whether a user may write is asked with an incomplete request: the server looks at the
rights first, and then refuses it.
"""

import os
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds, read_mlflow_creds
from mlflow.utils.rest_utils import http_request
from requests import Response

from poolnet.errors import NoAnswer
from poolnet.tracking import addresses, servers, waiting
from poolnet.upkeep.visit import (
    LOOK_AT_URI,
    START,
    Experiment,
    NotAsked,
    Problem,
    Visit,
    brief,
    may_be_written,
    no_experiment,
)

API = "/api/2.0/mlflow"
SLOW_SECONDS = 2  # a run asks some twenty times
SILENT = "look at the server's load and its database, restart it, or wait longer with --timeout"


def ask(visit: Visit, method: str, path: str, base: str = "", **options: Any) -> Response:
    """Send one request, with this user's credentials, and once."""
    with waiting.answering(visit.uri):
        return request(base or visit.uri, method, path, visit.timeout, **options)


def request(base: str, method: str, path: str, timeout: float, **options: Any) -> Response:
    creds = get_default_host_creds(addresses.for_mlflow(base))
    return http_request(creds, path, method, max_retries=0, raise_on_status=False, timeout=timeout, **options)


def user(visit: Visit) -> str:
    """Return the user that this process says it is."""
    return read_mlflow_creds().username or urlsplit(visit.uri).username or ""


def _not_allowed(visit: Visit, what: str) -> Problem:
    name = user(visit)
    cure = f"ask who runs the server for: poolnet team grant {name or 'USER'}"
    return Problem(f"user {name} may not {what}" if name else f"you may not {what}", cure)


def reachability(visit: Visit) -> str:
    down = "the server cannot be reached"
    if problem := addresses.unreachable(visit.uri):
        raise Problem(f"{visit.shown}: {problem}", START, down)
    try:
        seconds = _first_answer(visit)
    except NoAnswer as error:
        raise Problem(f"{visit.shown}: takes the connection, but {error}", SILENT, down) from None
    except MlflowException as error:
        raise Problem(f"{visit.shown}: {servers.reason(error)}", LOOK_AT_URI, down) from None
    reply = visit.reply
    assert reply is not None
    if "Invalid Host header" in reply.text:
        host = urlsplit(visit.uri).netloc.rpartition("@")[2]
        raise Problem(f"the server does not answer to {host}", f"start it with --allowed-hosts {host}", down)
    if reply.status_code == 403:
        raise Problem("the server answers 403", servers.CURES["403"], down)
    if reply.status_code not in (200, 401) and reply.status_code < 500:
        raise _no_server(visit)
    if seconds > SLOW_SECONDS:
        cure = "look at its load, at --workers, and at the way to its database"
        raise Problem(f"the server took {seconds:.1f} s for a small answer", cure)
    return f"answers within {seconds:.2f} s"


def _first_answer(visit: Visit) -> float:
    """Ask for little; return how many seconds the answer took.

    A slow server is asked twice: it may have slept.
    """
    began = time.monotonic()
    visit.reply = ask(visit, "POST", f"{API}/experiments/search", json={"max_results": 1})
    visit.replied, seconds = time.time(), time.monotonic() - began
    if seconds > SLOW_SECONDS:
        began = time.monotonic()
        ask(visit, "POST", f"{API}/experiments/search", json={"max_results": 1})
        seconds = time.monotonic() - began
    return seconds


def _no_server(visit: Visit) -> Problem:
    return Problem(f"{visit.shown}: no MLflow server is there", LOOK_AT_URI, "there is no MLflow server")


def credentials(visit: Visit) -> str:
    assert visit.reply is not None
    if visit.reply.status_code != 401:
        return f"user {user(visit)}" if user(visit) else "none asked for"
    blocks = "the server does not know this user"
    if user(visit):
        cure = "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask who runs the server for a new one"
        raise Problem(f"the server refuses user {user(visit)} with this password", cure, blocks)
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        raise Problem("the server refuses this token", "set MLFLOW_TRACKING_TOKEN to one that is valid", blocks)
    raise Problem("the server asks who you are", servers.CURES["401"], blocks)


def database(visit: Visit) -> str:
    assert visit.reply is not None
    _answered(visit.reply)
    return "the server reads it"


def _failed(reply: Response) -> Problem:
    """Explain an answer that says the server has failed."""
    status, answer = reply.status_code, said(reply)
    if status in (502, 503, 504) and "error_code" not in answer:
        cure = "start the MLflow server behind the proxy"
        return Problem(f"the proxy in front of the server answers {status}", cure, "the server is down")
    why = f" ({brief(answer['message'])})" if answer.get("message") else ""
    cure = "start the server's database; if it runs, the server's log says more; after an upgrade: mlflow db upgrade"
    return Problem(f"the server answers {status}{why}", cure, "the server cannot read its database")


def said(reply: Response) -> dict[str, Any]:
    """Return the object of an answer, or an empty one."""
    try:
        answer = reply.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def version(visit: Visit) -> str:
    reply = ask(visit, "GET", "/version")
    theirs = re.match(r"(\d+)\.(\d+)\S*$", reply.text.strip()) if reply.status_code == 200 else None
    if not theirs:
        raise _no_server(visit)
    ours = re.match(r"(\d+)\.(\d+)", mlflow.__version__)
    assert ours
    gap = [*map(int, theirs.groups())], [*map(int, ours.groups())]
    if gap[0] < gap[1]:
        cure = (
            f"on the server, with its users stopped: pip install mlflow=={mlflow.__version__}, then: mlflow db upgrade"
        )
        raise Problem(f"MLflow {theirs[0]} on the server is older than {mlflow.__version__} here", cure)
    if gap[0] > gap[1]:
        cure = "pip install --upgrade poolnet"
        raise Problem(f"MLflow {theirs[0]} on the server is newer than {mlflow.__version__} here", cure)
    return f"MLflow {theirs[0]} on the server, {mlflow.__version__} here"


def schema(visit: Visit) -> str:
    return "the server would not start with another"


def seconds_ahead(visit: Visit) -> float:
    """Return how much later it is for the server."""
    assert visit.reply is not None
    if "Date" not in visit.reply.headers:
        raise NotAsked("the server does not say the time")
    return parsedate_to_datetime(visit.reply.headers["Date"]).timestamp() + 0.5 - visit.replied  # whole seconds


def experiment(visit: Visit) -> str:
    number, name = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    query = {"experiment_id": number} if number else {"experiment_name": name}
    reply = _read(visit, f"experiments/get{'' if number else '-by-name'}", query, f"experiment {number or name}")
    found = said(reply).get("experiment")
    if not found and number:
        raise no_experiment(number)
    if not found:
        _check_right(visit, "experiments/create", {}, f"make experiment {name}")
        return f"{name} is not there yet; the first run makes it"
    visit.experiment = Experiment(found["experiment_id"], found["name"], found["artifact_location"])
    chosen = {"experiment_id": found["experiment_id"]}
    _check_right(visit, "experiments/set-experiment-tag", chosen, f"write in experiment {found['name']}")
    return may_be_written(visit, found["lifecycle_stage"])


def registry(visit: Visit) -> str:
    from poolnet.tracking.registry import NAME

    what = f"the registered model {NAME}"
    if _read(visit, "registered-models/get", {"name": NAME}, what).status_code == 404:
        _check_right(visit, "registered-models/create", {}, f"make {what}")
        return f"{NAME} is not there yet; the first run makes it"
    _check_right(visit, "registered-models/set-tag", {"name": NAME}, f"write {what}")
    return f"{NAME} may be written"


def _read(visit: Visit, path: str, query: dict[str, str], what: str) -> Response:
    reply = ask(visit, "GET", f"{API}/{path}", params=query)
    if reply.status_code == 403:
        raise _not_allowed(visit, f"read {what}")
    return _answered(reply)


def _check_right(visit: Visit, path: str, incomplete: dict[str, str], what: str) -> None:
    """Raise `Problem` if this user may not do that."""
    if _answered(ask(visit, "POST", f"{API}/{path}", json=incomplete)).status_code == 403:
        raise _not_allowed(visit, what)


def _answered(reply: Response) -> Response:
    if reply.status_code >= 500:
        raise _failed(reply)
    return reply


def statuses(visit: Visit, experiment_of: Mapping[str, str]) -> dict[str, str]:
    """Return the statuses of the server's runs, by id.

    `experiment_of` has the experiment of each run. The status of a run that this user may not read is empty.
    """
    found: dict[str, str] = {}
    ids, experiment_ids = [*experiment_of], [*{*experiment_of.values()}]
    for some in [ids[start : start + 100] for start in range(0, len(ids), 100)]:
        listed = ", ".join(f"'{run_id}'" for run_id in some)
        request = {
            "experiment_ids": experiment_ids,
            "filter": f"attributes.run_id IN ({listed})",
            "run_view_type": "ALL",
            "max_results": 1000,
        }
        reply = _answered(ask(visit, "POST", f"{API}/runs/search", json=request))
        infos = [run["info"] for run in said(reply).get("runs", [])]
        found |= {info["run_id"]: info["status"] for info in infos}
    for experiment_id in {experiment_of[run_id] for run_id in ids if run_id not in found}:
        reply = ask(visit, "GET", f"{API}/experiments/get", params={"experiment_id": experiment_id})
        if reply.status_code == 403:  # a search leaves its runs out
            found |= {run_id: "" for run_id in ids if run_id not in found and experiment_of[run_id] == experiment_id}
    return found
