"""Publish a run record to a tracking server.

The params, metrics, tags and artifacts of a training run are sent to MLflow here and nowhere else. The model goes
through `registry`.

`upload_new` sends what the server lacks of a run record, one step after the other. Each step may be cut off and
repeated at any time: it looks up what the server has already, or writing the same again changes nothing. Params,
metrics and tags of all steps go in one request, after the files.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunInfo, RunTag
from mlflow.exceptions import MlflowException

from poolnet import files
from poolnet.errors import RunError
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses, description, names, published, registry, server_runs, servers, sweep_run, views
from poolnet.tracking.model_card import Card
from poolnet.tracking.published import ServerCopy
from poolnet.tracking.servers import Client

RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d{1,4}")  # what MLflow calls a run that nobody named
NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
BATCH = 100  # records in one request, of which MLflow takes 1,000 metrics


@dataclasses.dataclass
class Batch:
    """What goes to the server in one request."""

    metrics: list[Metric] = dataclasses.field(default_factory=list)
    params: list[Param] = dataclasses.field(default_factory=list)
    tags: list[RunTag] = dataclasses.field(default_factory=list)
    steps: list[str] = dataclasses.field(default_factory=list)  # that are done with it


class Publication:
    """A run, a server, and what the server has of it.

    `carrier` is a run that `mlflow run` made only to resume this one.
    """

    server_run: Run  # as `find_or_create_run` found it, before the steps
    created = False  # whether it was created just now, so that the server has nothing of it

    def __init__(self, run: RunRecord, uri: str, carrier: str = ""):
        self.run, self.uri, self.carrier = run, uri, carrier
        self.key = addresses.shown(uri)
        self.confirmed = False  # whether the server was seen to have the run
        self.recall()

    @cached_property
    def client(self) -> Client:
        return servers.client_of(self.uri)

    def recall(self) -> None:
        """Read what is remembered of the run's publication.

        Another process may have added to it.
        """
        self.published = published.read(self.run)
        self.server_copy: ServerCopy = self.published.servers.get(self.key, ServerCopy())

    def save(self) -> None:
        self.published.home = self.key
        self.published.servers[self.key] = self.server_copy
        with contextlib.suppress(OSError):  # of a full disk: what is not remembered is looked up again
            files.write_json(self.run.folder / "published.json", dataclasses.asdict(self.published))


Step = Callable[[Publication], Batch | None]  # what is left to send of the step


def upload_new(publication: Publication) -> None:
    """Upload everything of the record that the server lacks.

    Raises what MLflow raises if the server does not accept it. Call it only with the run's publish lock.
    """
    publication.recall()
    if not publication.published.home:
        publication.save()
    run, confirmed = publication.run, publication.confirmed
    publication.confirmed = publication.created = False  # until all of this has gone well
    try:
        if not (confirmed and publication.server_copy.run_id) or publication.server_copy.status:
            find_or_create_run(publication)
        if publication.server_copy.stand_in:
            return
        end = run.ended()  # an end that comes from here on is for the next time
        log(publication, carry_out_steps(publication))
        server_copy = publication.server_copy
        if end and server_copy.status != end:
            publication.client.set_terminated(server_copy.run_id, end["status"], end["t"])
            server_copy.status = end
            publication.save()
    except Exception:
        servers.forget()
        raise
    publication.confirmed = True


def carry_out_steps(publication: Publication) -> Batch:
    """Carry out the steps that are not done.

    Returns what is left to send of them.
    """
    batch, server_copy = Batch(), publication.server_copy
    for name, step in steps(publication.run).items():
        if name in server_copy.done:
            continue
        if rest := step(publication):
            batch.metrics += rest.metrics
            batch.params += rest.params
            batch.tags += rest.tags
            batch.steps.append(name)
        else:
            server_copy.done.append(name)
            publication.save()
    return batch


def log(publication: Publication, batch: Batch) -> None:
    """Log the metrics that the server does not have, and a batch.

    Metrics have the times from the run record, so logging them again adds nothing.
    """
    run, server_copy, client = publication.run, publication.server_copy, publication.client
    records = run.metrics()
    new = records[server_copy.metrics :]
    if new:
        with (run.folder / "metrics.jsonl").open("ab") as file:
            os.fsync(file.fileno())  # what is published must not be lost here, or its steps come twice
    parts = [new[start : start + BATCH] for start in range(0, len(new), BATCH)]
    *others, last = [[metric for record in part for metric in as_metrics(record)] for part in parts] or [[]]
    for metrics in others:
        client.log_batch(server_copy.run_id, metrics=metrics)
    # the scores of the model are among the metrics, and MLflow takes long for what it has already
    metrics = [*{(metric.key, metric.step, metric.timestamp): metric for metric in last + batch.metrics}.values()]
    if metrics or batch.steps:
        client.log_batch(server_copy.run_id, metrics, batch.params, batch.tags)
        server_copy.metrics = len(records)
        server_copy.done += batch.steps
        publication.save()


def outstanding(publication: Publication) -> list[str]:
    """Return the steps that are not published yet.

    These are the parts of the record that the server lacks. What the server has is judged by what is remembered here.
    """
    run, server_copy = publication.run, publication.server_copy
    if server_copy.stand_in:
        return []
    lacking = [step for step in steps(run) if step not in server_copy.done]
    lacking += ["metrics"] * (len(run.metrics()) > server_copy.metrics)
    return lacking + ["status"] * (server_copy.status != run.ended())


def is_complete(publication: Publication) -> bool:
    """Whether the run has ended and is completely published.

    Or another machine's run stands for it.
    """
    return bool(publication.run.ended() or publication.server_copy.stand_in) and not outstanding(publication)


def forget(publication: Publication, steps: Iterable[str]) -> None:
    """Mark these steps as not published.

    They are published again next time.
    """
    server_copy = publication.server_copy
    server_copy.done = [step for step in server_copy.done if step not in steps]
    if "metrics" in steps:
        server_copy.metrics = 0
    if "status" in steps:
        server_copy.status = None
    publication.save()


def steps(run: RunRecord) -> dict[str, Step]:
    """Return the steps that are published once, by name.

    Only steps for which the record has the content already are included. Raises `RunError` if a finished run is
    damaged.
    """
    finished = run.finished
    if finished:
        run.check_results()
    steps: dict[str, Step] = {"start": log_start, "inputs": log_inputs, "record.json": partial(upload, "record.json")}
    if (run.folder / "git.diff").exists():
        steps["git.diff"] = partial(upload, "git.diff")
    if finished or run.has_results():
        steps |= {"predictions": partial(upload, "predictions"), "model": log_model}
    if finished:
        steps |= {"scores": log_scores, "figures": partial(upload, "figures")}
        if run.record["config"]["register"]:
            steps["version"] = register_model
        steps["summary"] = describe
    return steps


# --- the run ---------------------------------------------------------------------------------------------------------


def find_run(publication: Publication) -> Run | None:
    """Find the run on the server, or what stands for it.

    If another machine has finished a run of the same sweep and settings, and this one is not there or was deleted as
    its double, `server_copy.stand_in` is set. Raises `RunError` if the run was deleted otherwise.
    """
    client, run, server_copy = publication.client, publication.run, publication.server_copy
    if server_runs.is_there(client, server_copy.stand_in):
        return None
    try:
        server_run = server_runs.find(client, server_copy.run_id)
        if not server_run:
            publication.server_copy = ServerCopy()  # a server that was emptied gets everything again
            server_run = server_runs.find_earlier(client, run, publication.published.experiment)
        if server_run:
            return server_run
    except RunError:
        if not _take_stand_in(publication):
            raise
        return None
    _take_stand_in(publication)
    return None


def _take_stand_in(publication: Publication) -> bool:
    if not publication.run.record["sweep"]:
        return False
    client, run = publication.client, publication.run
    experiment_id = publication.server_copy.experiment_id
    experiment_id = experiment_id or server_runs.experiment_id(client, run, publication.published.experiment)
    other = sweep_run.double_of(client, experiment_id, run)
    if other:
        publication.server_copy = ServerCopy(stand_in=other)
        publication.save()
    return bool(other)


def find_or_create_run(publication: Publication) -> None:
    """Find the run on the server, or create it.

    Neither is done if another machine's run stands for it.
    """
    client, run = publication.client, publication.run
    server_run = find_run(publication)
    if publication.server_copy.stand_in:
        return
    publication.created = not server_run
    if server_run:
        server_runs.hide_origin(client, server_run)
    server_run = server_run or create_run(publication)
    if not publication.server_copy.run_id:
        adopt(publication, server_run.info)
    publication.server_run = server_run
    server_copy = publication.server_copy
    if server_copy.status and not run.ended():  # it is being trained again
        client.update_run(server_copy.run_id, status="RUNNING")
        server_copy.status = None
        publication.save()
    if publication.carrier not in ("", server_copy.run_id):
        server_runs.explain_carrier(client, publication.carrier, run, server_copy.run_id)
    publication.carrier = ""
    views.keep(client, server_copy.experiment_id, run.record["data"]["name"], run.record["data"]["sha256"])


def create_run(publication: Publication) -> Run:
    client, run = publication.client, publication.run
    experiment_id = server_runs.experiment_id(client, run, publication.published.experiment)
    tags = names.source("train", run.record["environment"]["user"]) | tags_of(run, client, experiment_id)
    return client.create_run(experiment_id, run.record["started"], tags, run.name)


def adopt(publication: Publication, info: RunInfo) -> None:
    """Remember this run on the server as the run's own."""
    server_copy, uri = publication.server_copy, publication.uri
    server_copy.run_id, server_copy.experiment_id = info.run_id, info.experiment_id
    if publication.run.record["tracking"]["experiment_id"] and server_runs.is_home(uri, publication.run):
        publication.published.experiment = publication.client.get_experiment(info.experiment_id).name
    publication.save()


# --- the steps -------------------------------------------------------------------------------------------------------


def log_start(publication: Publication) -> Batch:
    """Log the params and tags that the run does not have.

    An adopted run keeps the params that it has, as the user typed them.
    """
    run, server_run = publication.run, publication.server_run
    known = server_run.data
    recorded = [item for item in run.record["config"].items() if item != ("fold", "")]  # an empty param says nothing
    params = [Param(key, str(value)) for key, value in recorded if key not in known.params]
    tags = tags_of(run, publication.client, server_run.info.experiment_id)
    if RANDOM_NAME.fullmatch(server_run.info.run_name):
        tags[names.TITLE] = run.name
    return Batch([], params, [RunTag(*tag) for tag in tags.items() if known.tags.get(tag[0]) != tag[1]])


def tags_of(run: RunRecord, client: Client, experiment_id: str) -> dict[str, str]:
    """Return the tags of a run that are known when it begins."""
    record = run.record
    tags = {
        names.RUN: run.name,
        names.DATA_SHA256: record["data"]["sha256"],
        names.DEVICE: record["device"],
        names.GIT_DIRTY: record["code"]["dirty"],
        **data_tags(record["data"]),
    }
    if sweep := record.get("sweep"):
        tags[names.SWEEP] = sweep
        tags[names.PARENT] = servers.once(client, sweep_run.find_or_create, experiment_id, sweep)
    if original := record.get("reproduces"):
        tags[names.REPRODUCES] = original
    if differs := record["environment"].get("differs"):
        tags[names.DIFFERS] = differs
    if record["code"]["commit"]:
        tags[names.COMMIT] = record["code"]["commit"]
    return tags


def data_tags(data: dict) -> dict[str, str]:
    """Return the tags for what is particular about a data set.

    `data` is as in `Dataset.summary`. Records of earlier versions have nothing of it.
    """
    tags, groups = {}, data.get("groups", {})
    if classes := data.get("classes"):
        tags[names.CLASSES] = json.dumps(classes, ensure_ascii=False)
    if groups.get("crossing"):
        tags[names.GROUPS_CROSS] = f"{groups['crossing']:,} of {groups['all']:,} groups"
    return tags


def log_inputs(publication: Publication) -> None:
    """Log the splits of the data set.

    MLflow refuses a new data set that another run logs at the same moment. The second time it is known.
    """
    inputs = [*datasets(publication.run.record["data"]).values()]
    try:
        publication.client.log_inputs(publication.server_copy.run_id, inputs)
    except MlflowException as error:
        if not re.search(r"\(\S*(IntegrityError|UniqueViolation)\)", str(error)):
            raise
        publication.client.log_inputs(publication.server_copy.run_id, inputs)


def upload(name: str, publication: Publication) -> None:
    """Upload a file of the record, or a folder's files.

    Raises `RunError` if the server keeps its artifacts in a folder that this machine cannot write.
    """
    root = publication.server_run.info.artifact_uri
    for path, folder in artifact_files(publication.run, name):
        try:
            with servers.artifacts(publication.client, root) as repository:
                repository.log_artifact(str(path), folder)
        except OSError as error:
            if not path.exists() or error.errno not in NO_FOLDER or not publication.uri.startswith("http"):
                raise
            if "://" in root and not root.startswith("file:"):
                raise
            raise RunError(
                f"{publication.key}: keeps artifacts in {root}, which cannot be written here ({error.strerror}); share "
                "that folder, or start the server with --serve-artifacts and use a new experiment"
            ) from None


def artifact_files(run: RunRecord, name: str) -> list[tuple[Path, str | None]]:
    """Return the files of an artifact with their folders.

    The folder is the one that the file belongs to on the server.
    """
    path = run.folder / name
    if path.is_dir():
        return [(file, name) for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    return [(path, None)] if path.exists() else []


def log_model(publication: Publication) -> None:
    """Log the network as a model of the run."""
    run = publication.run
    arrays = run.load_tensors("model")
    assert arrays  # `steps` has this one only if the results are whole
    client, server_run, config = publication.client, publication.server_run, run.record["config"]
    known = None if publication.created else registry.logged(client, server_run)
    publication.server_copy.model_id = registry.log(client, server_run, known, run.name, config, arrays)


def log_scores(publication: Publication) -> Batch:
    """Log losses and accuracies as those of the model, too.

    The model's own page then shows them. They are those of the last epoch and those on test.
    """
    run, server_copy = publication.run, publication.server_copy
    records, data = {record["step"]: record for record in run.metrics()}, run.record["data"]
    model = {"model_id": server_copy.model_id, "run_id": server_copy.run_id}
    digest = next(split["sha256"][:32] for split in data["splits"] if split["name"] == "test")
    metrics = as_metrics(records[max(records)], **model)
    on_test = as_metrics(records[0], **model, dataset_name=data["name"], dataset_digest=digest)
    metrics += [metric for metric in on_test if metric.key.startswith("test_")]
    return Batch([metric for metric in metrics if "/" not in metric.key])


def register_model(publication: Publication) -> None:
    """Register the model as a version of `poolnet`."""
    run, server_copy = publication.run, publication.server_copy
    records, config, data = run.by_step(), run.record["config"], run.record["data"]
    card = Card(
        pool=config["pool"],
        seed=str(config["seed"]),
        data=data["name"],
        data_sha256=data["sha256"],
        val_acc=records[max(records)]["val_acc"],
        test_acc=records[0]["test_acc"],
        n_test=next(split["shape"][0] for split in data["splits"] if split["name"] == "test"),
        fold=config.get("fold", ""),
    )
    with servers.as_environment(publication.uri):
        server_copy.version = registry.register(publication.client, server_copy.run_id, server_copy.model_id, card)


def describe(publication: Publication) -> Batch:
    """Write the description that the run's page shows."""
    text = description.of_run(publication.run, publication.server_copy.version)
    return Batch(tags=[RunTag(names.NOTE, text)])


# --- records in the form of MLflow -----------------------------------------------------------------------------------


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
        dataset = from_numpy(X, source, y, name=data["name"], digest=split["sha256"][:32])
        context = InputTag(names.CONTEXT, split["name"])
        inputs[split["name"]] = DatasetInput(dataset._to_mlflow_entity(), [context])
    return inputs


def as_metrics(record: dict, **more: str) -> list[Metric]:
    metrics = {names.METRICS.get(name, name): value for name, value in record["metrics"].items()}
    return [Metric(name, value, record["t"], record["step"], **more) for name, value in metrics.items()]
