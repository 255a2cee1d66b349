"""A study's runs, those that are missing: trained by worker processes, published as the children of one parent run.

What is left to do follows from the tracking server and the journals, so that whatever was cut off goes on with the
same command. Optuna keeps the queue, in a journal file of its own: which combination is taken, and what came of it.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait

from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import data, journal, parent, recorded, stores, train
from poolnet.config import InputError, TrainConfig, aligned, cores, progress, spread
from poolnet.journal import Journal
from poolnet.publisher import Publisher
from poolnet.study import Study
from poolnet.trials import Queue
from poolnet.worker import Worker

SCORES = ("val_acc", "val_loss", "test_acc", "test_loss")  # with the final weights
ORPHAN_SECONDS = 15  # in which a worker finishes its batch after its sweep was killed

Say = Callable[[str], object]


@dataclasses.dataclass
class Result:
    """A combination of the study and its run. `status` is FINISHED, or `missing`, or how the run ended."""

    config: TrainConfig
    status: str = "missing"
    run: str = ""  # the name of its journal
    run_id: str = ""  # in MLflow, once it is published
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    trained: bool = False  # now, and not before
    error: str = ""

    @property
    def done(self) -> bool:
        return self.status == "FINISHED"


class Sweep:
    """A study on one data set, and where it stands."""

    def __init__(self, study: Study, publisher: Publisher, say: Say, warn: Say):
        self.study, self.publisher, self.say, self.warn = study, publisher, say, warn
        self.path = data.locate(study.data, say=say)
        splits = data.open_splits(self.path)
        if splits.overlap:
            warn(f"{splits.path}: {splits.overlap:,} of {len(splits.test):,} test images also occur in train")
        self.data_sha256 = splits.sha256
        self.name = parent.name_of(study.name, splits.sha256)
        self.uri = stores.own_uri()
        self.results = {self._key(config): Result(config) for config in study.configs()}
        self.begun: dict[tuple, Journal] = {}  # what an earlier sweep began and did not finish
        self.look = ""  # at the parent run, where there is one
        self.trouble: str | None = None  # what stands in the way of publishing

    @property
    def missing(self) -> list[Result]:
        return [result for result in self.results.values() if not result.done]

    def _key(self, config: TrainConfig) -> tuple:
        return recorded.key(config, str(train.resolve_device(config.device)))

    def carry_out(self, workers: int) -> None:
        """Train what is missing, and publish it. Of one study and data set, one process at a time."""
        try:
            lock = FileLock(parent.folder() / f"{self.name}.lock").acquire(timeout=1)
        except Timeout:
            raise InputError(f"{self.study.path}: another process is sweeping it; wait for it, or end it") from None
        with lock, self._described():
            self._look_at_server()
            self._look_at_journals()
            if self.missing:
                self._train(workers)
            if self.publisher.journals:
                self.trouble = self.publisher.close()
                self._look_at_server()

    # --- what there is ------------------------------------------------------------------------------------------------

    def _look_at_server(self) -> None:
        """Finished runs of the same data and settings, whoever made them."""
        try:
            stores.create_store(self.uri)
            client = MlflowClient(self.uri)
            query = f"attributes.status = 'FINISHED' AND tags.`poolnet.data_sha256` = '{self.data_sha256}'"
            for run in recorded.search(client, [stores.own_experiment(client)], query):
                result = self.results.get(run.key)
                if result and not result.run_id and result.run in ("", run.name) and set(SCORES) <= set(run.metrics):
                    result.status, result.run, result.run_id = run.status, run.name, run.run_id
                    result.scores = {name: run.metrics[name] for name in SCORES}
        except MlflowException as error:
            where = journal.without_password(self.uri)
            self.warn(
                f"{where} cannot be asked which runs it has ({stores.reason(error)}); going by the journals alone"
            )

    def _look_at_journals(self) -> None:
        """Runs that the server does not have yet, and those of this sweep that were cut off."""
        for name in journal.names():
            with contextlib.suppress(InputError):  # of a newer poolnet
                run = Journal(journal.folder() / name)
                key = recorded.key(TrainConfig(**run.record["config"]), run.record["device"])
                if key not in self.results or self.results[key].done or not self._belongs_here(run):
                    continue
                mine = run.record.get("sweep") == self.name
                if mine:
                    _wait_for_orphan(run)
                if run.finished:
                    self._take(self.results[key], run)
                    self.publisher.add(run)
                elif mine and not run.is_training():
                    self.begun[key] = run

    def _belongs_here(self, run: Journal) -> bool:
        """Whether a run is on this sweep's data, and for its server and experiment."""
        told = run.record["tracking"]
        names = [
            (os.environ.get("MLFLOW_EXPERIMENT_ID", ""), os.environ.get("MLFLOW_EXPERIMENT_NAME", "")),
            (told["experiment_id"], told["experiment_name"]),
        ]
        mine, its = ({"": "0", "Default": "0"}.get(number or name, number or name) for number, name in names)
        return run.record["data"]["sha256"] == self.data_sha256 and stores.home_of(run) == self.uri and mine == its

    def _take(self, result: Result, run: Journal) -> None:
        """The result as the journal has it."""
        result.run, result.status = run.name, (run.ended() or {"status": "KILLED"})["status"]
        if result.done:
            records = run.by_step()
            last = records[max(records)] | records[0]
            result.scores = {name: last[name] for name in SCORES}

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, count: int) -> None:
        queue = Queue(self.study, parent.folder() / f"{self.name}.optuna")
        queue.again(lambda config: not self._result(config).done)
        workers = [Worker(self.path, self.name) for _ in range(min(count, len(self.missing)))]
        idle, busy = list(workers), {}
        total, began = len(self.missing), time.monotonic()

        def rate(_: object) -> str:
            return f"{60 * (total - len(self.missing)) / (time.monotonic() - began):.1f} runs a minute"

        length = sum(result.config.epochs for result in self.missing)
        with progress(length=length, label=f"Training {total} runs", item_show_func=rate) as bar:
            try:
                while self._give(queue, idle, busy) or busy:
                    for connection in wait(list(busy)):
                        worker = busy[connection]
                        kind, value = worker.hear()
                        if kind == "begun":
                            self.publisher.add(journal.find(value))
                        elif kind == "epoch":
                            bar.update(value - worker.epoch)
                            worker.epoch = value
                        else:
                            self._ended(queue, worker, value)
                            bar.update(worker.config.epochs - worker.epoch)
                            del busy[connection]
                            if kind == "died":
                                workers.append(worker := Worker(self.path, self.name))
                            idle.append(worker)
            finally:
                for worker in workers:
                    worker.process.terminate()  # asked all at once, to finish the batch in hand
                for worker in workers:
                    worker.stop()

    def _give(self, queue: Queue, idle: list[Worker], busy: dict[object, Worker]) -> bool:
        """Something to do for everybody who is idle. Whether there was anything."""
        given = False
        while idle and (taken := queue.take(lambda config: self._result(config).scores.get("val_loss"))):
            worker, (trial, config) = idle.pop(), taken
            begun = self.begun.get(self._key(config))
            worker.take(trial, config, begun.name if begun else "")
            busy[worker.connection] = worker
            given = True
        return given

    def _ended(self, queue: Queue, worker: Worker, error: str) -> None:
        result = self._result(worker.config)
        result.trained, result.error = True, error
        if worker.run:
            self._take(result, journal.find(worker.run))
        queue.tell(worker.trial, result.scores.get("val_loss"))
        if error:
            self.warn(f"{worker.run or worker.config}: {error}")
        else:
            self.say(f"{result.run}: " + ", ".join(f"{name} {result.scores[name]:.4f}" for name in SCORES))

    def _result(self, config: TrainConfig) -> Result:
        return self.results[self._key(config)]

    # --- the parent run -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _described(self) -> Iterator[None]:
        """The parent run says that the sweep is under way, and in the end where it stands."""
        self._describe("RUNNING")
        try:
            yield
        except BaseException as error:
            self._describe("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self._describe("FAILED" if self.missing else "FINISHED")

    def _describe(self, status: str) -> None:
        """Of what the server does not take, a later call has it all again."""
        try:
            stores.create_store(self.uri)
            client = MlflowClient(self.uri)
            experiment_id = stores.own_experiment(client)
            with stores.as_environment(self.uri):
                run_id = parent.find_or_create(client, experiment_id, self.name, os.environ.get("MLFLOW_RUN_ID", ""))
                text = self.study.path.read_text(encoding="utf-8")
                parent.describe(client, run_id, text, self._note(experiment_id), self._metrics(), status)
            self.look = stores.page_of(self.uri, experiment_id, run_id)
        except MlflowException as error:
            where = journal.without_password(self.uri)
            self.warn(
                f"{where}: the sweep's own run is not up to date ({stores.reason(error)}); sweep again to mend that"
            )

    def arms(self) -> dict[str, dict[str, list[float]]]:
        """The scores of each arm, by name, a value a seed, as far as there are."""
        runs = {arm: [self._result(config) for config in self.study.arm(arm)] for arm in self.study.arms}
        done = {arm: [result.scores for result in results if result.done] for arm, results in runs.items()}
        return {arm: {name: [scores[name] for scores in found] for name in SCORES} for arm, found in done.items()}

    def _metrics(self) -> dict[str, float]:
        values = {"runs_finished": len(self.results) - len(self.missing), "runs_missing": len(self.missing)}
        for index, scores in enumerate(self.arms().values()):
            for name, found in scores.items():
                if found:
                    values[f"{'ab'[index]}_{name}_mean"] = statistics.mean(found)
                if len(found) > 1:
                    values[f"{'ab'[index]}_{name}_sd"] = statistics.stdev(found)
        return values

    def _note(self, experiment_id: str) -> str:
        """The parent's description, in Markdown."""
        options = [name for name, values in self.study.grid.items() if len(values) > 1]
        lines = [
            f"**{self.study.question}**",
            "",
            f"{len(self.results) - len(self.missing)} of {len(self.results)} runs are finished, on `{self.path.stem}`, "
            f"SHA-256 `{self.data_sha256}`.",
            "",
            "| arm | seeds | val acc | test acc | test loss |",
            "|---|---|---|---|---|",
            *(
                f"| {'ab'[index]}: {arm} | {len(scores['val_acc'])} | {spread(scores['val_acc'])} | "
                f"{spread(scores['test_acc'])} | {spread(scores['test_loss'])} |"
                for index, (arm, scores) in enumerate(self.arms().items())
            ),
            "",
            "Mean and standard deviation over seeds. What they say: "
            f"`poolnet compare --study {self.study.path.as_posix()} --data {self.study.data}`",
            "",
            f"| run | {' | '.join(options)} | seed | status |",
            f"|---|{'---|' * len(options)}---|---|",
        ]
        for result in self.results.values():
            name = result.run or "none yet"
            if result.run_id:
                name = f"[{name}](#/experiments/{experiment_id}/runs/{result.run_id})"
            values = [str(getattr(result.config, option)) for option in options]
            lines.append(f"| {name} | {' | '.join(values)} | {result.config.seed} | {result.error or result.status} |")
        return "\n".join(lines)


def _wait_for_orphan(run: Journal) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while run.is_training() and time.monotonic() < deadline:
        time.sleep(0.1)


def table(sweep: Sweep) -> str:
    """The arms for a terminal, means and standard deviations over seeds."""
    heads = ("arm", "n", "val acc", "test acc", "test loss")
    lines = [heads]
    for arm, scores in sweep.arms().items():
        spreads = (spread(scores[name]) for name in ("val_acc", "test_acc", "test_loss"))
        lines.append((arm, str(len(scores["val_acc"])), *spreads))
    return "\n".join(aligned(lines))


def default_workers(study: Study) -> int:
    """One a core for pooled models; a convolutional one takes all cores by itself."""
    return 1 if "conv" in study.grid.get("pool", ()) else cores()


def as_json(sweep: Sweep) -> dict:
    results = [dataclasses.asdict(result) for result in sweep.results.values()]
    return {"sweep": sweep.name, "data_sha256": sweep.data_sha256, "look": sweep.look, "runs": results}
