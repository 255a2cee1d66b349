"""Publish a run record to a tracking server.

The params, metrics, tags and artifacts of a training run are sent to MLflow here and nowhere else. The model goes
through `registry`.

A `Publication` sends what the server lacks of a run record, one step after the other. Each step may be cut off and
repeated at any time: it looks up what the server has already, or writing the same again changes nothing.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import mlflow
import numpy as np
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.entities import (
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import files
from poolnet.errors import InputError, RunError
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses, description, names, registry, servers, sweep_run
from poolnet.tracking.publisher import Held, published

RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d{1,4}")  # what MLflow calls a run that nobody named
FILES = ("record.json", "git.diff", "predictions", "figures")
DEFAULT = "0"  # the id of MLflow's experiment `Default`, on each server
NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
BATCH = 100  # records in one request, of which MLflow takes 1,000 metrics


class Publication:
    """The upload of one run to one tracking server.

    It remembers what the server has already, and publishes the rest.
    """

    def __init__(self, run: RunRecord, uri: str, carrier: str = ""):
        self.run, self.record, self.carrier = run, run.record, carrier
        self.uri, self.key = uri, addresses.shown(uri)
        self.confirmed = False  # whether the server was seen to have the run
        self.recall()

    @functools.cached_property
    def client(self) -> MlflowClient:
        return servers.client_of(self.uri)

    def recall(self) -> None:
        """Read what is remembered of the run's publication.

        Another process may have added to it.
        """
        self.published = published(self.run)
        self.held = self.published.servers.get(self.key, Held())

    def save(self) -> None:
        self.published.home = self.key
        self.published.servers[self.key] = self.held
        with contextlib.suppress(OSError):  # of a full disk: what is not remembered is looked up again
            files.write_json(self.run.folder / "published.json", dataclasses.asdict(self.published))

    def forget(self, steps: Iterable[str]) -> None:
        """Mark these steps as not published.

        They are published again next time.
        """
        self.held.done = [step for step in self.held.done if step not in steps]
        self.held.metrics = 0 if "metrics" in steps else self.held.metrics
        self.held.status = None if "status" in steps else self.held.status
        self.save()

    @property
    def complete(self) -> bool:
        """Whether the run has ended and is completely published."""
        return bool(self.run.ended()) and not self.outstanding()

    def outstanding(self) -> list[str]:
        """Return the steps that are not published yet.

        These are the parts of the record that the server lacks. What the server has is judged by what is remembered
        here.
        """
        left = [step for step in self.steps() if step not in self.held.done]
        left += ["metrics"] * (len(self.run.metrics()) > self.held.metrics)
        return left + ["status"] * (self.held.status != self.run.ended())

    def advance(self) -> None:
        """Publish everything that the record has now.

        Raises what MLflow raises if the server does not accept it. Call it only with the run's publish lock.
        """
        self.recall()
        if not self.published.home:
            self.save()
        with servers.as_environment(self.uri):
            self._advance()

    def _advance(self) -> None:
        confirmed, self.confirmed = self.confirmed, False  # until all of this has gone well
        if not (confirmed and self.held.run_id) or self.held.status:
            self._find_or_create()
        ended, steps = self.run.ended(), self.steps()  # an end that comes from here on is for the next time
        for name, publish in steps.items():
            if name not in self.held.done:
                publish()
                self.held.done.append(name)
                self.save()
        self._log_metrics()
        if ended and self.held.status != ended:
            self.client.set_terminated(self.held.run_id, ended["status"], ended["t"])
            self.held.status = ended
            self.save()
        self.confirmed = True

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps that are published once, by name.

        Only steps for which the record has the content already are included. Raises `RunError` if a finished run is
        damaged.
        """
        finished = self.run.finished
        if finished:
            self.run.check_results()
        files = {name: functools.partial(self._upload, name) for name in FILES}
        steps = {"start": self._log_start, "inputs": self._log_inputs, "record.json": files["record.json"]}
        if (self.run.folder / "git.diff").exists():
            steps["git.diff"] = files["git.diff"]
        if finished or self.run.has_results():
            steps |= {"predictions": files["predictions"], "model": self._log_model}
        if finished:
            steps |= {"scores": self._log_scores, "figures": files["figures"]}
            if self.record["config"]["register"]:
                steps["version"] = self._register
            steps["summary"] = self._describe
        return steps

    # --- the run -----------------------------------------------------------------------------------------------------

    def _find_or_create(self) -> None:
        """Find the run on the server, or create it.

        It is the run that is known already, the run that `mlflow run` has made, a run that was created earlier but
        whose id did not arrive here, or a new one. If the server has been emptied since, it gets everything again.
        """
        found = self.find()
        if not found:
            self.held = Held()
            found = self._adopted() or self._search() or self._create()
            self._refuse_deleted(found.info)
            self.adopt(found.info)
        if self.held.status and not self.run.ended():  # it is being trained again
            self.client.update_run(self.held.run_id, status="RUNNING")
            self.held.status = None
            self.save()
        self._explain_carrier()

    def adopt(self, info: mlflow.entities.RunInfo) -> None:
        """Remember this run as the run on the server.

        It is used from now on.
        """
        self.held.look = servers.page_of(self.uri, info.experiment_id, info.run_id)
        self.held.run_id, self.held.experiment_id = info.run_id, info.experiment_id
        if self.is_home and self.record["tracking"]["experiment_id"]:
            self.published.experiment = self.client.get_experiment(info.experiment_id).name
        self.save()

    def _explain_carrier(self) -> None:
        """Say in the carrier run what it is for.

        The carrier is the run that `mlflow run -P resume=...` made. It cannot be deleted: `mlflow run` fails if it
        cannot set the status of that run at the end.
        """
        if self.carrier and self.carrier != self.held.run_id:
            note = f"Made by `mlflow run` to resume {self.run.name}, run {self.held.run_id}, which holds everything."
            tags = {names.NOTE: note, names.TITLE: f"resumes {self.run.name}"}
            self.client.log_batch(self.carrier, tags=[RunTag(*tag) for tag in tags.items()])
        self.carrier = ""

    def find(self) -> mlflow.entities.Run | None:
        """Return the known run on the server, or None.

        The result is None if no run is known yet, or if the server does not have it. Raises `RunError` if the run was
        deleted there.
        """
        found = self.get(self.held.run_id)
        if found:
            self._refuse_deleted(found.info)
        return found

    def _refuse_deleted(self, info: mlflow.entities.RunInfo) -> None:
        if info.lifecycle_stage == "deleted":
            raise RunError(f"run {info.run_id} was deleted on {self.key}; restore it there, or sync --to elsewhere")

    def get(self, run_id: str) -> mlflow.entities.Run | None:
        try:
            return self.client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    @property
    def is_home(self) -> bool:
        """Whether the run was begun on this server."""
        return self.key == servers.recorded_home(self.record)

    def _adopted(self) -> mlflow.entities.Run | None:
        """Return the run that `mlflow run` made for this one.

        The result is None if there is no such run, or if it cannot be this one. If it cannot be this one and
        `MLFLOW_RUN_ID` still names it, this raises `Refused` instead.
        """
        run_id = self.record["tracking"]["run_id"]
        found = self.get(run_id) if self.is_home else None
        wrong = _contradiction(found, self.run) if found else ""
        if wrong and os.environ.get("MLFLOW_RUN_ID") == run_id:
            raise Refused(f"run {run_id}: {wrong}; unset MLFLOW_RUN_ID, then: poolnet sync {self.run.name}")
        return None if wrong else found

    def _search(self) -> mlflow.entities.Run | None:
        query = f"tags.`{names.RUN}` = '{self.run.name}'"
        found = self.client.search_runs([self._experiment()], query, ViewType.ALL, max_results=1)
        return found[0] if found else None

    def _create(self) -> mlflow.entities.Run:
        tags = {names.RUN: self.run.name, **names.source("train", self.record["environment"]["user"])}
        return self.client.create_run(self._experiment(), self.record["started"], tags, self._title())

    def _title(self) -> str:
        """Return the run's default name in MLflow.

        It is used unless the user named the run.
        """
        return f"{self.run.stem} again" if self.record.get("reproduces") else self.run.stem

    def _experiment(self) -> str:
        """Return the id of the run's experiment on this server.

        It is the experiment that the run was begun in.
        """
        told = self.record["tracking"]
        if self.is_home and told["experiment_id"] and not self.published.experiment:
            return told["experiment_id"]
        return servers.experiment(self.client, self._experiment_name())

    def _experiment_name(self) -> str:
        told = self.record["tracking"]
        if self.published.experiment or told["experiment_id"] in ("", DEFAULT):
            return self.published.experiment or told["experiment_name"]
        home = servers.recorded_home(self.record)
        try:
            return MlflowClient(home).get_experiment(told["experiment_id"]).name
        except MlflowException as error:
            if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
                return name
            raise InputError(
                f"experiment {told['experiment_id']} of {home}: its name cannot be asked ({servers.reason(error)}); "
                f"set MLFLOW_EXPERIMENT_NAME, then: poolnet sync {self.run.name} --to {self.key}"
            ) from None

    def _log_start(self) -> None:
        """Log the params and tags of the run.

        An adopted run keeps the params that it has, as the user typed them.
        """
        run_id = self.held.run_id
        present = self.client.get_run(run_id)
        known, name = present.data.params, present.info.run_name
        params = [Param(key, str(value)) for key, value in self.record["config"].items() if key not in known]
        tags = {
            names.RUN: self.run.name,
            names.DATA_SHA256: self.record["data"]["sha256"],
            names.DEVICE: self.record["device"],
            names.GIT_DIRTY: self.record["code"]["dirty"],
        }
        if sweep := self.record.get("sweep"):
            tags[names.SWEEP] = sweep
            tags[names.PARENT] = sweep_run.find_or_create(self.client, self.held.experiment_id, sweep)
        if original := self.record.get("reproduces"):
            tags[names.REPRODUCES] = original
        if self.record["code"]["commit"]:
            tags[names.COMMIT] = self.record["code"]["commit"]
        if RANDOM_NAME.fullmatch(name):
            tags[names.TITLE] = self._title()
        self.client.log_batch(run_id, params=params, tags=[RunTag(*tag) for tag in tags.items()])

    def _log_inputs(self) -> None:
        self.client.log_inputs(self.held.run_id, list(datasets(self.record["data"]).values()))

    # --- what grows --------------------------------------------------------------------------------------------------

    def _log_metrics(self) -> None:
        """Log the metrics that the server does not have.

        They have the times from the run record, so logging them again adds nothing.
        """
        records = self.run.metrics()
        new = records[self.held.metrics :]
        if new:
            with (self.run.folder / "metrics.jsonl").open("ab") as file:
                os.fsync(file.fileno())  # what is published must not be lost here, or its steps come twice
        for start in range(0, len(new), BATCH):
            metrics = [metric for record in new[start : start + BATCH] for metric in as_metrics(record)]
            self.client.log_batch(self.held.run_id, metrics=metrics)
        if new:
            self.held.metrics = len(records)
            self.save()

    def _upload(self, name: str) -> None:
        """Upload a file, or the files of a folder."""
        for path, folder in self.files(name):
            try:
                self.client.log_artifact(self.held.run_id, str(path), folder)
            except OSError as error:
                if path.exists() and error.errno in NO_FOLDER and self.uri.startswith("http"):
                    self._refuse_folder(error)
                raise

    def _refuse_folder(self, error: OSError) -> None:
        """Refuse a server artifact folder that cannot be written.

        Raises `RunError` if the server keeps its artifacts in a folder, since this machine cannot write there.
        Otherwise nothing is raised.
        """
        folder = self.client.get_run(self.held.run_id).info.artifact_uri
        if "://" in folder and not folder.startswith("file:"):
            return
        raise RunError(
            f"{self.key}: keeps artifacts in {folder}, which cannot be written here ({error.strerror}); share that "
            "folder, or start the server with --serve-artifacts and use a new experiment"
        ) from None

    def files(self, name: str) -> list[tuple[Path, str | None]]:
        """Return the files of an artifact with their folders.

        The folder is the one that the file belongs to on the server.
        """
        path = self.run.folder / name
        if path.is_dir():
            return [(file, name) for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        return [(path, None)] if path.exists() else []

    # --- the model ---------------------------------------------------------------------------------------------------

    def _log_model(self) -> None:
        found, arrays = self.client.get_run(self.held.run_id), self.run.load_tensors("model")
        self.held.model_id = registry.log(self.client, found, self.record["config"], arrays)

    def _log_scores(self) -> None:
        """Log the scores again as scores of the model.

        The model's own page then shows them. They are the scores of the last epoch and the scores on test.
        """
        records = {record["step"]: record for record in self.run.metrics()}
        about = {"model_id": self.held.model_id, "run_id": self.held.run_id}
        test = next(split for split in self.record["data"]["splits"] if split["name"] == "test")
        on_test = {"dataset_name": self.record["data"]["name"], "dataset_digest": test["sha256"][:32]}
        metrics = as_metrics(records[max(records)], **about)
        metrics += [metric for metric in as_metrics(records[0], **about, **on_test) if metric.key.startswith("test_")]
        self.client.log_batch(self.held.run_id, metrics=metrics)

    def _register(self) -> None:
        records, config = self.run.by_step(), self.record["config"]
        tags = {
            "pool": config["pool"],
            "seed": str(config["seed"]),
            "val_acc": repr(records[max(records)]["val_acc"]),
            "test_acc": repr(records[0]["test_acc"]),
            "data_sha256": self.record["data"]["sha256"],
        }
        self.held.version = registry.register(self.client, self.held.run_id, self.held.model_id, tags)

    def _describe(self) -> None:
        text = description.of_run(self.run, self.held.version)
        self.client.set_tag(self.held.run_id, names.NOTE, text)


def datasets(data: dict) -> dict[str, DatasetInput]:
    """Describe the splits of a data set for MLflow.

    The descriptions are given by the name of the split. They do not hold the data. `data` is as in `Dataset.summary`.
    """
    # By its type, since MLflow resolves a bare path to two sources and warns.
    source = get_dataset_source_from_json(json.dumps({"uri": data["path"]}), "local")
    inputs = {}
    for split in data["splits"]:
        X = np.broadcast_to(np.zeros((), split["dtype"]), split["shape"])
        y = np.broadcast_to(np.zeros((), np.int64), split["shape"][:1])
        # MLflow's own digest would read 10,000 numbers only
        dataset = mlflow.data.from_numpy(X, source, y, name=data["name"], digest=split["sha256"][:32])
        context = InputTag(names.CONTEXT, split["name"])
        inputs[split["name"]] = DatasetInput(dataset._to_mlflow_entity(), [context])
    return inputs


class Refused(InputError):
    """An error: the server's record contradicts the run.

    It does not help to try again.
    """


def _contradiction(found: mlflow.entities.Run, run: RunRecord) -> str:
    """Say why a server's run cannot be this one.

    The text is empty if it can.
    """
    other = found.data.tags.get(names.RUN)
    if other != run.name and (other or found.info.lifecycle_stage == "deleted"):
        return f"found the record of {other} in it" if other else "was deleted"
    for name, value in run.record["config"].items():
        raw = found.data.params.get(name)
        if raw is not None and not agrees(raw, value):
            return f"{name}: found {raw} in its record, expected {value}"
    return ""


def as_metrics(record: dict, **about: str) -> list[Metric]:
    return [Metric(name, value, record["t"], record["step"], **about) for name, value in record["metrics"].items()]


def agrees(raw: str, value: str | int | float | bool) -> bool:
    """Whether a recorded param means this value.

    `raw` is the param as `mlflow run` records it: the raw text, possibly quoted for a shell.
    """
    texts = [raw]
    with contextlib.suppress(ValueError):
        texts += shlex.split(raw)
    for text in texts:
        with contextlib.suppress(click.BadParameter):
            if click.types.convert_type(type(value))(text) == value:
                return True
    return False
