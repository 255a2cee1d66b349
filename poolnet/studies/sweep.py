"""Train the missing runs of a study and publish them.

Worker processes train the runs. They are published as the children of one parent run. The tracking server and the run
records on disk show what is left to do. So the same command continues a sweep that was cut off.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

from mlflow.exceptions import MlflowException

from poolnet.data import dataset
from poolnet.errors import InputError, NoAnswer
from poolnet.files import Locked, locked
from poolnet.process import cores
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.studies.study import Study
from poolnet.studies.worker import Worker
from poolnet.text import aligned, coded, marked, pasted, piped, progress, spread
from poolnet.tracking import addresses, servers, sweep_run, training_runs
from poolnet.tracking.publisher import Publisher
from poolnet.tracking.training_runs import SCORES
from poolnet.training import train_loop
from poolnet.training.config import TrainConfig

ASK_SECONDS = 2  # that the server has to say what it holds, before training begins without
ORPHAN_SECONDS = 15  # in which a worker finishes its batch after its sweep was killed

Echo = Callable[[str], object]


@dataclasses.dataclass
class Result:
    """One combination of options and seed, with its run.

    `status` is FINISHED, or `missing`, or how the run ended. It is RUNNING while another process trains the run.
    """

    config: TrainConfig
    status: str = "missing"
    run: str = ""  # its name
    run_id: str = ""  # in MLflow, once it is published
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    trained: bool = False  # now, and not before
    error: str = ""

    @property
    def done(self) -> bool:
        return self.status == "FINISHED"


@dataclasses.dataclass
class Sweep:
    """A study on one data set, with its progress."""

    study: Study
    path: Path  # of the data
    data_sha256: str
    uri: str  # of the tracking server
    results: dict[tuple, Result]  # by `training_runs.key`, in the order of the study
    look: str = ""  # at the parent run, where there is one
    trouble: str | None = None  # what stands in the way of publishing
    patience: float = ASK_SECONDS  # seconds that the server has for an answer

    @property
    def name(self) -> str:
        return sweep_run.name_of(self.study.name, self.data_sha256)

    @property
    def missing(self) -> list[Result]:
        return [result for result in self.results.values() if not result.done]

    def result(self, config: TrainConfig) -> Result:
        return self.results[self.key(config)]

    def key(self, config: TrainConfig) -> tuple:
        return training_runs.key(config, str(train_loop.resolve_device(config.device)), self.data_sha256)


def opened(study: Study, echo: Echo, echo_warning: Echo) -> Sweep:
    """Open a study's data set and return its sweep.

    In the sweep, all runs are still `missing`.
    """
    path = dataset.locate(study.data, echo=echo)
    splits = dataset.open_splits(path)
    if splits.overlap:
        echo_warning(f"{splits.path}: {splits.overlap:,} of {len(splits.test):,} test images also occur in train")
    sweep = Sweep(study, path, splits.sha256, addresses.own(), {})
    sweep.results = {sweep.key(config): Result(config) for config in study.configs()}
    return sweep


def carry_out(sweep: Sweep, workers: int, publisher: Publisher, echo: Echo, echo_warning: Echo) -> None:
    """Train the missing runs of a sweep and publish them.

    Only one process at a time can do this for one study and data set.
    """
    with _alone(sweep), _described(sweep, echo_warning):
        begun = _look_at_records(sweep, publisher, echo_warning)
        if sweep.missing:
            _train(sweep, begun, workers, publisher, echo, echo_warning)
        if publisher.runs:
            sweep.trouble = publisher.close()
            sweep.patience = ASK_SECONDS if sweep.trouble else publisher.drain_timeout
            with _warned(sweep, "cannot be asked which runs it has now", echo_warning):
                _look_at_server(sweep, echo_warning)


@contextlib.contextmanager
def _alone(sweep: Sweep) -> Iterator[None]:
    """Hold the lock of a sweep during the block.

    Raises `InputError` if another process holds it, as for a run that another process trains.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(sweep_run.folder() / f"{sweep.name}.lock", wait=1))
        except Locked as error:
            raise InputError(f"{sweep.study.path}: another process is sweeping it, {error}") from None
        yield


# --- what there is ----------------------------------------------------------------------------------------------------


def _ask_server(sweep: Sweep, echo_warning: Echo) -> None:
    """Look up finished runs and update the parent run.

    These are all requests to the server before training.
    """
    _look_at_server(sweep, echo_warning)
    with _warned(sweep, OUTDATED, echo_warning):  # which is no reason to train again what the server has
        _describe(sweep, "RUNNING")


def _look_at_server(sweep: Sweep, echo_warning: Echo) -> None:
    """Take the results of finished runs from the server.

    They are runs of the same data and settings, whoever made them.
    """
    client = servers.client_of(sweep.uri)
    for key, run in training_runs.finished(
        client, [servers.own_experiment(client)], sweep.data_sha256, echo_warning
    ).items():
        result = sweep.results.get(key)
        if result and not result.run_id:
            result.status, result.run, result.run_id = run.status, run.name, run.run_id
            result.scores = {name: run.metrics[name] for name in SCORES}


def _look_at_records(sweep: Sweep, publisher: Publisher, echo_warning: Echo) -> dict[tuple, str]:
    """Take results from run records that the server lacks.

    Finished runs also go to the publisher. Returns the runs of this sweep that were cut off or are damaged: their names
    by key.
    """
    begun = {}
    for key, run in _records(sweep, echo_warning):
        result, mine = sweep.results[key], run.record.get("sweep") == sweep.name
        if mine:
            _wait_for_orphan(run)
        if run.finished and run.has_results():
            _take(result, run)
            publisher.add(run)
        elif mine and run.is_training():
            result.status, result.run, result.error = "RUNNING", run.name, "another process is training it"
        elif mine:
            begun[key] = run.name
    return begun


def _records(sweep: Sweep, echo_warning: Echo) -> Iterator[tuple[tuple, RunRecord]]:
    """Yield the run records on disk of missing runs.

    Only records on this sweep's data, and for its server and experiment, are included. Each comes with its key.
    """
    unknown = {}
    for name in run_record.names():
        try:
            run = RunRecord(run_record.folder() / name)
            key = training_runs.key(
                TrainConfig(**run.record["config"]), run.record["device"], run.record["data"]["sha256"]
            )
            if key in sweep.results and not sweep.results[key].done and _belongs_here(sweep, run):
                yield key, run
        except (InputError, KeyError, TypeError) as error:  # damaged, or of another version
            unknown[name] = error
    training_runs.warn_of_unknown(unknown, echo_warning)


def _belongs_here(sweep: Sweep, run: RunRecord) -> bool:
    told = run.record["tracking"]
    names = [
        (os.environ.get("MLFLOW_EXPERIMENT_ID", ""), os.environ.get("MLFLOW_EXPERIMENT_NAME", "")),
        (told["experiment_id"], told["experiment_name"]),
    ]
    mine, its = ({"": "0", "Default": "0"}.get(number or name, number or name) for number, name in names)
    return mine == its and servers.home_of(run) == sweep.uri and not run.record.get("reproduces")


def _wait_for_orphan(run: RunRecord) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while run.is_training() and time.monotonic() < deadline:
        time.sleep(0.1)


def _take(result: Result, run: RunRecord) -> None:
    """Fill in a result from its run record."""
    records = run.by_step()
    scores = records.get(max(records, default=0), {}) | records.get(0, {})
    result.run, result.status = run.name, (run.ended() or {"status": "KILLED"})["status"]
    if result.done and set(SCORES) <= set(scores):
        result.scores = {name: scores[name] for name in SCORES}
    elif result.done:
        result.status, result.error = "missing", "found no scores in its record"


# --- training ---------------------------------------------------------------------------------------------------------


def _train(
    sweep: Sweep, begun: dict[tuple, str], count: int, publisher: Publisher, echo: Echo, echo_warning: Echo
) -> None:
    """Train the missing runs, seed by seed.

    So a sweep that is cut off has pairs of runs.
    """
    left = [result for result in sweep.missing if result.status != "RUNNING"]
    todo = deque((result.config, begun.get(sweep.key(result.config), "")) for result in left)
    total, began = len(left), time.monotonic()
    length = sum(result.config.epochs for result in left)

    def rate(_: object) -> str:
        return f"{60 * sum(result.done for result in left) / (time.monotonic() - began):.1f} runs a minute"

    with (
        progress(length=length, label=f"Training {total} runs", item_show_func=rate) as bar,
        contextlib.closing(_heard(sweep, todo, min(count, total))) as heard,
    ):
        for worker, kind, value in heard:
            if kind == "begun":
                publisher.add(run_record.find(value))
            elif kind == "epoch":
                bar.update(value - worker.epoch)
                worker.epoch = value
            else:
                _ended(sweep.result(worker.config), worker, value, echo, echo_warning)
                bar.update(worker.config.epochs - worker.epoch)


def _heard(sweep: Sweep, todo: deque[tuple[TrainConfig, str]], count: int) -> Iterator[tuple[Worker, str, str | int]]:
    """Train `todo` with worker processes and yield their messages.

    The order of `todo` is kept. If runs are left, a worker that dies is replaced. Its run is not tried again.
    """
    workers = [Worker(sweep.path, sweep.name) for _ in range(count)]
    idle, busy = deque(workers), {}
    try:
        while todo or busy:
            while todo and idle:
                worker = idle.popleft()
                worker.take(*todo.popleft())
                busy[worker.connection] = worker
            for connection in wait(list(busy)):
                worker = busy[connection]
                kind, value = worker.hear()
                yield worker, kind, value
                if kind in ("ended", "died"):
                    del busy[connection]
                if kind == "ended":
                    idle.append(worker)
                elif kind == "died" and todo:
                    workers.append(Worker(sweep.path, sweep.name))
                    idle.append(workers[-1])
    finally:
        for worker in workers:
            worker.process.terminate()  # asked all at once, to finish the batch in hand
        for worker in workers:
            worker.stop()


def _ended(result: Result, worker: Worker, error: str, echo: Echo, echo_warning: Echo) -> None:
    result.trained, result.error = True, error
    if worker.run:
        _take(result, run_record.find(worker.run))
    if error:
        echo_warning(f"{worker.run or worker.config}: {error}")
    else:
        echo(f"{result.run}: " + ", ".join(f"{name} {result.scores[name]:.4f}" for name in SCORES))


# --- the parent run ---------------------------------------------------------------------------------------------------

OUTDATED = "the sweep's own run is not up to date; sweep again to mend that"


@contextlib.contextmanager
def _described(sweep: Sweep, echo_warning: Echo) -> Iterator[None]:
    """Keep the parent run up to date during the block.

    At the start, the parent run says that the sweep is running. At the end, it says how far the sweep has come.
    """
    status = "FAILED"
    try:
        with _warned(sweep, "cannot be asked which runs it has; going by the records on disk alone", echo_warning):
            _ask_server(sweep, echo_warning)
        yield
        status = "FAILED" if sweep.missing else "FINISHED"
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        with _warned(sweep, OUTDATED, echo_warning):
            _describe(sweep, status)


@contextlib.contextmanager
def _warned(sweep: Sweep, what: str, echo_warning: Echo) -> Iterator[None]:
    """Turn tracking server errors in the block into warnings.

    A warning is enough, because a later call does everything again.
    """
    try:
        with servers.within(sweep.patience):
            yield
    except (MlflowException, NoAnswer) as error:
        echo_warning(f"{addresses.shown(sweep.uri)}: {what} ({servers.reason(error)})")


def _describe(sweep: Sweep, status: str) -> None:
    client = servers.client_of(sweep.uri)
    experiment_id = servers.own_experiment(client)
    with servers.as_environment(sweep.uri):
        run_id = sweep_run.find_or_create(client, experiment_id, sweep.name, os.environ.get("MLFLOW_RUN_ID", ""))
        sweep_run.describe(client, run_id, sweep.study.text, _note(sweep, experiment_id), _metrics(sweep), status)
    sweep.look = servers.page_of(sweep.uri, experiment_id, run_id)


def arms(sweep: Sweep) -> dict[str, dict[str, list[float]]]:
    """Return each arm's scores, by arm and score name.

    There is one value for each seed that is finished so far.
    """
    runs = {arm: [sweep.result(config) for config in sweep.study.arm(arm)] for arm in sweep.study.arms}
    done = {arm: [result.scores for result in results if result.done] for arm, results in runs.items()}
    return {arm: {name: [scores[name] for scores in found] for name in SCORES} for arm, found in done.items()}


def _metrics(sweep: Sweep) -> dict[str, float]:
    values = {"runs_finished": len(sweep.results) - len(sweep.missing), "runs_missing": len(sweep.missing)}
    for letter, scores in zip("ab", arms(sweep).values(), strict=True):
        for name, found in scores.items():
            if found:
                values[f"{letter}_{name}_mean"] = statistics.mean(found)
            if len(found) > 1:
                values[f"{letter}_{name}_sd"] = statistics.stdev(found)
    return values


def _note(sweep: Sweep, experiment_id: str) -> str:
    """Return the description of the parent run in Markdown."""
    study, spreads = sweep.study, _spreads(sweep)
    for letter, row in zip("ab", spreads[1:], strict=True):
        row[0] = f"{letter}: {row[0]}"
    options = [name for name, values in study.grid.items() if len(values) > 1]
    runs = [["run", *options, "seed", "status"]]
    for result in sweep.results.values():
        name = result.run or "none yet"
        if result.run_id:
            name = f"[{name}](#/experiments/{experiment_id}/runs/{result.run_id})"
        values = [str(getattr(result.config, option)) for option in options]
        runs.append([name, *map(marked, (*values, str(result.config.seed), result.error or result.status))])
    lines = [
        f"**{marked(study.question)}**",
        "",
        f"{len(sweep.results) - len(sweep.missing)} of {len(sweep.results)} runs are finished, on "
        f"{coded(sweep.path.stem)}, SHA-256 `{sweep.data_sha256}`.",
        "",
        *piped(spreads),
        "",
        "Mean and standard deviation over seeds. What they say: "
        + coded(pasted("poolnet", "compare", "--study", study.path.as_posix(), "--data", study.data)),
        "",
        *piped(runs, cell=str),
    ]
    return "\n".join(lines)


# --- what is printed --------------------------------------------------------------------------------------------------


def _spreads(sweep: Sweep) -> list[list[str]]:
    """Return table rows with the scores of each arm.

    Scores are means and standard deviations over seeds.
    """
    rows = [["arm", "n", "val acc", "test acc", "test loss"]]
    for arm, scores in arms(sweep).items():
        spreads = (spread(scores[name]) for name in ("val_acc", "test_acc", "test_loss"))
        rows.append([arm, str(len(scores["val_acc"])), *spreads])
    return rows


def table(sweep: Sweep) -> str:
    """Return the table of arms for a terminal."""
    return "\n".join(aligned(_spreads(sweep)))


def default_workers(study: Study) -> int:
    """Return the default number of worker processes.

    It is one per core for pooled models. It is 1 for a convolutional model, which uses all cores by itself.
    """
    return 1 if "conv" in study.grid.get("pool", ()) else cores()
