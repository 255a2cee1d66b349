"""Find out which runs of a sweep are done already.

The tracking server and the run records on disk show it.
"""

import time
from collections.abc import Iterator

from poolnet.errors import InputError
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.studies.sweep_results import Result, Sweep
from poolnet.text import Echo
from poolnet.tracking import addresses, servers, training_runs
from poolnet.tracking.training_runs import SCORES
from poolnet.training.config import TrainConfig

ORPHAN_SECONDS = 15  # in which a worker finishes its batch after its sweep was killed


def take_server_runs(sweep: Sweep, echo_warning: Echo) -> None:
    """Take the results of finished runs from the server.

    They are runs of the same data and settings, whoever made them.
    """
    client = servers.client_of(sweep.uri)
    ids, optimum = [servers.own_experiment(client)], sweep.study.optimum
    finished = training_runs.finished(client, ids, sweep.data_sha256, optimum, echo_warning)
    for key, run in finished.items():
        result = sweep.results.get(key)
        if result and not result.run_id:
            result.status, result.run, result.run_id = run.status, run.name, run.run_id
            result.scores = {name: run.metrics[name] for name in SCORES}


def untrained(sweep: Sweep) -> int:
    """Return how many runs have no finished record here.

    The server may have them. But if the number is 0, there is nothing to train.
    """
    finished = {key for key, run in _records(sweep, lambda line: None) if run.finished and run.has_results()}
    return len(sweep.results) - len(finished)


def take_records(sweep: Sweep, echo_warning: Echo) -> tuple[list[RunRecord], dict[tuple, str]]:
    """Take results from run records that the server lacks.

    Returns the finished runs. Also returns the runs of this sweep that were cut off or are damaged: their names by key.
    """
    finished, begun = [], {}
    for key, run in _records(sweep, echo_warning):
        result, is_child = sweep.results[key], run.record["sweep"] == sweep.name
        deadline = time.monotonic() + ORPHAN_SECONDS
        while is_child and run.is_training() and time.monotonic() < deadline:
            time.sleep(0.1)
        if run.finished and run.has_results():
            take_record(result, run)
            finished.append(run)
        elif is_child and run.is_training():
            result.status, result.run, result.error = "RUNNING", run.name, "another process is training it"
        elif is_child:
            begun[key] = run.name
    return finished, begun


def _records(sweep: Sweep, echo_warning: Echo) -> Iterator[tuple[tuple, RunRecord]]:
    """Yield the run records on disk of missing runs.

    Only records on this sweep's data, and for its server and experiment, are included. Each comes with its key.
    """
    unknown: dict[str, Exception] = {}
    for name in run_record.names():
        try:
            run = RunRecord(run_record.folder() / name)
            config = TrainConfig(**run.record["config"])
            key = training_runs.key(config, run.record["device"], run.record["data"]["sha256"])
            wanted = key in sweep.results and not sweep.results[key].done and _is_published_here(run, sweep.uri)
            if wanted and (_has_optimum(run) or not sweep.study.optimum):
                yield key, run
        except (InputError, KeyError, TypeError) as error:  # damaged, or of another version
            unknown[name] = error
    training_runs.warn_of_unknown(unknown, echo_warning)


def _is_published_here(run: RunRecord, uri: str) -> bool:
    """Whether a run is for this server and experiment.

    Runs that only reproduce another run do not count.
    """
    trackings = (addresses.environment(), run.record["tracking"])
    experiments = [tracking["experiment_id"] or tracking["experiment_name"] for tracking in trackings]
    own, its = ("0" if experiment in ("", "Default") else experiment for experiment in experiments)
    return own == its and servers.home_of(run) == uri and not run.record["reproduces"]


def _has_optimum(run: RunRecord) -> bool:
    """Whether a run has or will have the scores at the optimum."""
    if run.record["config"]["pool"] == "conv" or not run.record["optimum"]:
        return run.record["config"]["pool"] == "conv"
    return not run.finished or "optimum_test_loss" in run.by_step().get(0, {})


def take_record(result: Result, run: RunRecord) -> None:
    """Fill in a result from its run record."""
    metrics = run.by_step()
    scores = metrics.get(max(metrics, default=0), {}) | metrics.get(0, {})
    result.run, result.status = run.name, (run.ended() or {"status": "KILLED"})["status"]
    if result.done and set(SCORES) <= set(scores):
        result.scores = {name: scores[name] for name in SCORES}
    elif result.done:
        result.status, result.error = "missing", "found no scores in its record"
