"""Train a recorded run again and compare the results.

The result says what differs in code, device and environment, and whether both runs come to the same figures. Other data
are refused.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import process
from poolnet.errors import InputError
from poolnet.runs import provenance, record_form, run_record, train_run
from poolnet.runs.run_record import RunRecord
from poolnet.text import Echo, marked, step
from poolnet.tracking import addresses, names, pages, registry, server_runs, servers, training_runs
from poolnet.tracking.publisher import Publisher
from poolnet.training.config import CONV, TrainConfig
from poolnet.training.device import resolve_device

TIMINGS = ("epoch_seconds", "examples_per_second")  # never the same twice
# Differences that other versions, processors or numbers of threads make by adding in another order.
TOLERANCE = {"loss": 1e-5, "accuracy": 1e-3, "logit or weight": 1e-3}


@dataclasses.dataclass(frozen=True)
class Original:
    """A finished training run as the tracking server has it.

    It holds the record of the run, its metrics by step, its logits by split and its weights by name.
    """

    run: Run
    record: dict[str, Any]
    diff: bytes
    metrics: dict[int, dict[str, float]]
    logits: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.run.data.tags[names.RUN]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A figure that differs between the two runs."""

    text: str
    small: bool  # within tolerance


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """The result of training a run again.

    `circumstances` are the differences between now and the time when the run was trained.
    """

    original: Original
    again: RunRecord
    circumstances: list[str]
    differences: list[Difference]
    compared: dict[str, int]  # how many figures

    @property
    def verdict(self) -> str:
        if not self.differences:
            return "bit-identical"
        return "within tolerance" if all(difference.small for difference in self.differences) else "different"

    @property
    def first(self) -> str:
        """The first figure that differs, or an empty text."""
        return self.differences[0].text if self.differences else ""

    @property
    def sentence(self) -> str:
        text = f"{self.verdict}: {self.again.name} and {self.original.name}, {self.counts} compared"
        return f"{text}; first difference: {self.first}" if self.first else text

    @property
    def counts(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.compared.items())


def find(client: MlflowClient, name: str) -> Original:
    """Fetch a finished training run by id or name.

    Everything that is to be compared is fetched too. Raises `InputError` if the server lacks some of it.
    """
    run = server_runs.look_up(client, name)
    if not training_runs.is_training_run(run):
        raise InputError(f"{name}: found a run that is none of poolnet train")
    if run.info.status != "FINISHED":
        again = run_record.resume_command(run.data.tags[names.RUN])
        raise InputError(f"{name}: found it {run.info.status}, expected a finished run; finish it with: {again}")
    step("Fetching the recorded figures")
    record = _record(client, run)
    model = registry.logged(client, run)
    if not model:
        raise InputError(f"{name}: found no model of it on the server, whose weights were to be compared")
    net = registry.load(f"models:/{model.model_id}").net
    metrics: dict[int, dict[str, float]] = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            metrics.setdefault(metric.step, {})[names.RECORDED.get(key, key)] = metric.value
    return Original(
        run=run,
        record=record,
        diff=_artifact(client, run, "git.diff") if record["code"]["dirty"] == "true" else b"",
        metrics=metrics,
        logits={
            split: training_runs.predictions(client, run.info.run_id, name, split).logits for split in ("val", "test")
        },
        weights={key: tensor.numpy() for key, tensor in net.state_dict().items()},
    )


def _record(client: MlflowClient, run: Run) -> dict[str, Any]:
    run_id, content = run.info.run_id, _artifact(client, run, "record.json")
    try:
        record = record_form.parse(content, "record.json")
        TrainConfig(**record["config"])
        if record["environment"]["threads"] < 1:
            raise ValueError(f"{record['environment']['threads']} threads")
    except (ValueError, TypeError) as error:
        raise InputError(f"{run_id}: found no readable record.json on the server ({error})") from None
    return record


def _artifact(client: MlflowClient, run: Run, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return Path(client.download_artifacts(run.info.run_id, name, scratch)).read_bytes()
        except (MlflowException, OSError) as error:
            raise InputError(f"{run.info.run_id}: found no {name} on the server ({servers.reason(error)})") from None


def reproduce(
    original: Original,
    data: str,
    publisher: Publisher,
    echo: Echo = print,
    echo_warning: Echo = print,
) -> Reproduction:
    """Train the run again and compare all its figures.

    The data set is read from its recorded place, or from `data` if that is given. If no file is at the recorded place,
    the `data` setting of the run is used. Raises `InputError` if the data are not the same.
    """
    record = original.record
    config, circumstances = _settings(record, data)
    path = Path(record["data"]["path"])
    splits, pooled = train_run.open_training_data(config, True, echo, path if path.exists() and not data else None)
    digests = {split["name"]: split["sha256"] for split in record["data"]["splits"]}
    for split in splits:
        if split.sha256 != (digest := digests[split.name]):
            raise InputError(
                f"{splits.path}: {split.name}: found SHA-256 {split.sha256[:16]}..., but {digest[:16]}... "
                f"in the record of {original.name}, which other data cannot reproduce; name that data set with --data"
            )
    circumstances += _code_differences(original) + provenance.differences(record)
    conv = train_run.arithmetic(record)
    if config.pool == "conv" and conv.threads != CONV.threads:
        circumstances.append(f"threads {conv.threads} (here {CONV.threads}; trained with {conv.threads} all the same)")
    for circumstance in circumstances:
        echo_warning(f"{original.name} was trained with {circumstance}")
    server, run_id = addresses.environment(), original.run.info.run_id
    again = train_run.create(config, record["optimum"], splits, server, "", run_id, conv)
    process.last_words = f"stopped; reproduce it again, or go on with: {run_record.resume_command(again.name)}"
    with again.training():
        publisher.add(again)
        train_run.carry_out(again, splits, pooled, publisher.check, echo, echo_warning)
    compared = {
        "metrics": sum(1 for _ in _metrics(original, again)),
        "logits": sum(logits.size for logits in original.logits.values()),
        "weights": sum(weight.size for weight in original.weights.values()),
    }
    return Reproduction(original, again, circumstances, list(_differences(original, again)), compared)


def _settings(record: dict[str, Any], data: str) -> tuple[TrainConfig, list[str]]:
    """Return the recorded settings, adapted to this machine.

    The device is the recorded one. If it is not available, it is one that this machine has, and the second value names
    the difference. The model is not registered once more.
    """
    config = TrainConfig(**{**record["config"], "device": record["device"], "register": False})
    config = dataclasses.replace(config, data=data or config.data)
    try:
        resolve_device(config.device)
    except InputError:
        here = resolve_device("auto")
        return dataclasses.replace(config, device=here), [f"device {config.device} (here {here})"]
    return config, []


def _code_differences(original: Original) -> list[str]:
    recorded_code, (commit, dirty, diff) = original.record["code"], provenance.code_state()
    if recorded_code["commit"] != commit or "unknown" in (recorded_code["dirty"], dirty):
        return [f"commit {recorded_code['commit'] or 'unknown'} (here {commit or 'unknown'})"]
    if original.diff == diff:
        return []
    then, here = ("uncommitted changes" if changed else "no uncommitted changes" for changed in (original.diff, diff))
    return [f"{then} (here {'other ones' if then == here else here})"]


# --- comparing --------------------------------------------------------------------------------------------------------


def _differences(original: Original, again: RunRecord) -> Iterator[Difference]:
    """Yield each figure that differs between the two runs.

    Epochs come first, in their order.
    """
    for epoch, name, value, before in _metrics(original, again):
        if before != value:
            where = f"epoch {epoch}: {name}" if epoch else name
            small = before is not None and abs(before - value) <= _tolerance(name)
            yield Difference(f"{where} {value!r}, recorded {before!r}", small)
    for split, logits in original.logits.items():
        with np.load(again.folder / "predictions" / f"{split}.npz", allow_pickle=False) as saved:
            yield from _array_differences(f"logits of {split}", logits, saved["logits"])
    weights = again.load_tensors("model")
    assert weights is not None  # `again` has just written them
    for name, weight in original.weights.items():
        yield from _array_differences(name, weight, weights[name])


def _metrics(original: Original, again: RunRecord) -> Iterator[tuple[int, str, float, float | None]]:
    """Yield step, name, value and recorded value of metrics.

    Timings are left out, and scores at the optimum that the original lacks, as runs of earlier versions do.
    """
    steps = again.by_step()
    for epoch in sorted(steps, key=lambda epoch: epoch or np.inf):
        for name, value in steps[epoch].items():
            before = original.metrics.get(epoch, {}).get(name)
            if name not in TIMINGS and not (before is None and name.startswith("optimum_")):
                yield epoch, name, value, before


def _tolerance(name: str) -> float:
    """Return the allowed difference for a metric.

    Metrics that name an epoch, such as `best_val_epoch`, may differ by any number. They follow from accuracies, which
    have their own tolerance.
    """
    if name.endswith("_epoch"):
        return np.inf
    kind = "loss" if name.endswith(("loss", "gap")) else "accuracy" if name.endswith("acc") else ""
    return TOLERANCE.get(kind, 0)


def _array_differences(name: str, before: np.ndarray, after: np.ndarray) -> Iterator[Difference]:
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        yield Difference(f"{name} of {after.dtype} {after.shape}, recorded {before.dtype} {before.shape}", False)
    elif before.tobytes() != after.tobytes():
        bits = [np.ascontiguousarray(array).view(f"u{array.itemsize}") for array in (before, after)]  # -0 is not 0
        index = tuple(np.argwhere(bits[0] != bits[1])[0].tolist())
        small = bool(np.abs(before - after).max() <= TOLERANCE["logit or weight"])
        yield Difference(f"{name}{list(index)} {after[index]!r}, recorded {before[index]!r}", small)


# --- logging ----------------------------------------------------------------------------------------------------------


def publish(client: MlflowClient, reproduction: Reproduction, run_id: str) -> None:
    """Record the reproduction in both runs on the server.

    The new run says what it came to. The old run says which run reproduced it.
    """
    original = reproduction.original.run.info
    page = pages.run(original.experiment_id, original.run_id)
    link = pages.in_markdown(reproduction.original.name, page)
    lines = [f"**Reproduction of {link}: {reproduction.verdict}**, {reproduction.counts} compared.", ""]
    lines += [f"- First difference: {marked(reproduction.first)}"] if reproduction.first else []
    lines += [f"- The original was trained with {marked(difference)}" for difference in reproduction.circumstances]
    before = client.get_run(run_id).data.tags.get(names.NOTE, "")
    client.set_tag(run_id, names.NOTE, "\n".join([*lines, "", before]))
    client.set_tag(run_id, names.REPRODUCTION, reproduction.verdict)
    with contextlib.suppress(MlflowException):  # of an original in an experiment that is somebody else's
        client.set_tag(original.run_id, names.REPRODUCED_BY, run_id)


def contents(reproduction: Reproduction) -> dict[str, object]:
    """Return the whole result as a dictionary for JSON.

    The keys are the names in the JSON output.
    """
    return {
        "verdict": reproduction.verdict,
        "sentence": reproduction.sentence,
        "first_difference": reproduction.first or None,
        "compared": reproduction.compared,
        "circumstances": reproduction.circumstances,
        "original": reproduction.original.name,
        "original_run_id": reproduction.original.run.info.run_id,
        "run": reproduction.again.name,
    }
