"""Hold a server or a database against this machine, for `poolnet doctor`."""

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from poolnet.errors import InputError, NoAnswer
from poolnet.files import home_path
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import published, waiting
from poolnet.tracking.published import ServerCopy
from poolnet.upkeep.visit import Experiment, NotAsked, Problem, Visit

CLOCK_SECONDS = 60  # by which two clocks may differ
NAMED = 3  # of many runs
SYNC = "poolnet sync uploads them again; if they were deleted there for good, remove their folders here"


def clock(seconds_ahead: Callable[[Visit], float | None], visit: Visit) -> str:
    """Compare the clock of the server with this machine's."""
    ahead = seconds_ahead(visit)
    if ahead is None:
        return "this machine's own"
    if abs(ahead) > CLOCK_SECONDS:
        found = f"the server's is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        cure = "set the one that is wrong; on Linux: timedatectl set-ntp true; on Windows: w32tm /resync"
        raise Problem(found, cure)
    return f"the server's and this machine's agree within {CLOCK_SECONDS} s"


def records(statuses: Callable[[Visit, Mapping[str, str]], dict[str, str]], visit: Visit) -> str:
    """Compare what local records say is published with what is there."""
    copies = _copies(visit) if home_path().exists() else {}
    there = statuses(visit, {copy.run_id: copy.experiment_id for copy in copies.values()}) if copies else {}
    lost = [name for name, copy in copies.items() if _is_lost(copy, there)]
    if lost:
        some = ", ".join(lost[:NAMED]) + ", ..." * (len(lost) > NAMED)
        found = f"{len(lost):,} of {len(copies):,} runs that were published there are not, or not whole ({some})"
        raise Problem(f"{found}; was it restored from an older backup?", SYNC)
    return f"published there: {len(copies):,}, all of which are there" if copies else "no run here was published there"


def _is_lost(copy: ServerCopy, there: dict[str, str]) -> bool:
    return copy.run_id not in there or bool(copy.status and there[copy.run_id] == "RUNNING")


def _copies(visit: Visit) -> dict[str, ServerCopy]:
    """Return what local records say that the server has, by run."""
    copies = {}
    try:
        names = run_record.names()
    except InputError as error:
        raise NotAsked(str(error)) from None
    for name in names:
        try:
            copy = published.read(RunRecord(run_record.folder() / name)).servers.get(visit.shown)
        except InputError as error:
            raise Problem(str(error), "do that, or remove the folder of that run") from None
        if copy and copy.run_id:
            copies[name] = copy
    return copies


def artifact(visit: Visit) -> str:
    """Send a file to where artifacts lie, and fetch it again."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

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
        from poolnet.upkeep import server_checks

        return server_checks.artifact(visit, visit.experiment)
    return _through_library(visit, visit.experiment)


def _through_library(visit: Visit, experiment: Experiment) -> str:
    """Send a file to a store that clients write to themselves."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from poolnet.tracking import servers

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
