"""Train the missing runs of a study and publish them.

Workers train the runs, here or elsewhere. This process publishes them, as the children of one parent run. The tracking
server and the run records on disk show what is left to do. So the same command continues a sweep that was cut off.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from mlflow.exceptions import MlflowException

from poolnet.data import dataset
from poolnet.errors import InputError, NoAnswer
from poolnet.files import Locked, locked
from poolnet.process import cores
from poolnet.runs.run_record import RunRecord
from poolnet.studies import sweep_results
from poolnet.studies.discovery import take_records, take_server_runs, untrained
from poolnet.studies.study import Study
from poolnet.studies.sweep_results import Sweep
from poolnet.studies.sweep_training import Training, Workers
from poolnet.text import Echo, progress
from poolnet.tracking import addresses, servers, sweep_run, views, waiting
from poolnet.tracking.publisher import Publisher
from poolnet.training.config import CONV
from poolnet.training.device import resolve_device

ASK_SECONDS = 2.0  # for the server to list its runs; then training begins without that list


def open_sweep(study: Study, echo: Echo, echo_warning: Echo, cluster: str = "") -> Sweep:
    """Open a study's data set and return its sweep.

    On a cluster, device `auto` is the CPU: its workers may differ, and a study has one device.
    """
    path = dataset.locate(study.data, echo=echo)
    splits = dataset.open_dataset(path)
    for warning in splits.warnings() if study.folds == ("",) else ():  # folds keep groups together
        echo_warning(warning)
    auto = "cpu" if cluster else resolve_device("auto")
    return Sweep(study, path, splits.sha256, addresses.own(), auto)


def default_workers(study: Study) -> int:
    """Return the default number of worker processes.

    It is one per core. Where a convolutional model takes part, each has the threads of one, or a GPU.
    """
    if "conv" not in study.grid.get("pool", ()):
        return cores()
    devices = {resolve_device(device) for device in study.grid.get("device", ("auto",))}
    if devices == {"cpu"}:
        return max(1, cores() // CONV.threads)
    import torch

    return max(1, torch.cuda.device_count())


def carry_out(sweep: Sweep, workers: Workers, figures: bool, timeout: float, echo: Echo, echo_warning: Echo) -> None:
    """Train the missing runs of a sweep and publish them.

    With `figures`, those of each run are drawn, which takes longer than to train a small one. The server is given up
    after `timeout` seconds without progress.

    The parent run says RUNNING meanwhile, and at the end how far the sweep has come. On one machine, only one process
    at a time can do this for one study and data set. Raises `InputError` if another process does it, and `RunError` if
    there are no workers.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(sweep_run.folder() / f"{sweep.name}.lock", wait=1))
        except Locked as error:
            raise InputError(f"{sweep.study.path}: another process is sweeping it, {error}") from None
        status, server_seconds = "KILLED", ASK_SECONDS
        unfinished = untrained(sweep)
        publisher = stack.enter_context(Publisher(timeout)) if unfinished else None
        training = Training(sweep, workers, figures, echo, echo_warning)
        stack.callback(training.join)
        try:
            with training:
                training.start(unfinished)
                finished, begun = _find_done(sweep, echo, echo_warning)
                if sweep.missing or finished:
                    publisher = publisher or stack.enter_context(Publisher(timeout))
                    for run in finished:
                        publisher.add(run)
                    if todo := [result for result in sweep.missing if result.status != "RUNNING"]:
                        training.train(todo, begun, publisher)
            if publisher and publisher.runs:
                sweep.publish_error = _upload(publisher, echo)
                server_seconds = ASK_SECONDS if sweep.publish_error else timeout
                problem = "cannot be asked which runs it has now"
                with _server_errors_as_warnings(sweep, problem, server_seconds, echo_warning):
                    client = servers.client_of(sweep.uri)
                    sweep_run.settle(client, servers.own_experiment(client), sweep.name)
                    take_server_runs(sweep, echo_warning)
            status = "FAILED" if sweep.missing else "FINISHED"
        except Exception:
            status = "FAILED" if sweep.experiment_id else "KILLED"  # before that, it was refused
            raise
        finally:
            if status != "KILLED" or sweep.experiment_id:  # else it may have been stopped during its imports
                _update_parent(sweep, status, server_seconds, echo_warning)


def _find_done(sweep: Sweep, echo: Echo, echo_warning: Echo) -> tuple[list[RunRecord], dict[tuple, str]]:
    """Take what the server and the records have; see `take_records`."""
    echo("Looking for runs that are done ...")
    problem = "cannot be asked which runs it has; going by the records on disk alone"
    with _server_errors_as_warnings(sweep, problem, ASK_SECONDS, echo_warning):
        take_server_runs(sweep, echo_warning)
        if sweep.missing:
            _update_parent(sweep, "RUNNING", ASK_SECONDS, echo_warning)
    return take_records(sweep, echo_warning)


@contextlib.contextmanager
def _server_errors_as_warnings(sweep: Sweep, problem: str, seconds: float, echo_warning: Echo) -> Iterator[None]:
    """Turn tracking server errors in the block into warnings.

    A warning is enough, because a later call does everything again. The server has `seconds` for all its answers.
    """
    try:
        with waiting.within(seconds):
            yield
    except (MlflowException, NoAnswer) as error:
        echo_warning(f"{addresses.shown(sweep.uri)}: {problem} ({servers.reason(error)})")


def _update_parent(sweep: Sweep, status: str, seconds: float, echo_warning: Echo) -> None:
    problem = "the sweep's own run is not up to date; sweep again to mend that"
    with _server_errors_as_warnings(sweep, problem, seconds, echo_warning):
        client = servers.client_of(sweep.uri)
        experiment_id = servers.own_experiment(client)
        note, metrics = sweep_results.note(sweep, experiment_id), sweep_results.metrics(sweep)
        with servers.as_environment(sweep.uri):
            run_id = sweep_run.find_or_create(client, experiment_id, sweep.name, os.environ.get("MLFLOW_RUN_ID", ""))
            sweep.experiment_id = experiment_id
            sweep_run.describe(client, run_id, sweep.study.text, note, metrics, status)
            views.keep(client, experiment_id, sweep.path.stem, sweep.data_sha256)


def _upload(publisher: Publisher, echo: Echo) -> str | None:
    """Wait for the upload of the runs; return why it failed."""
    label = f"Uploading {len(publisher.runs)} runs"
    if not sys.stderr.isatty():
        echo(f"{label} ...")
    with progress(length=len(publisher.runs), label=label) as bar:
        return publisher.close(on_upload=lambda count: bar.update(count - bar.pos))
