"""Score a model on a split and report the scores.

The report says whether the scores agree with those of the model's training run. It can be shown on a terminal, in
Markdown and in JSON, and is kept as a run in MLflow.
"""

import contextlib
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from mlflow.entities import LoggedModelInput, Run
from mlflow.tracking.client import MlflowClient

from poolnet.data import dataset
from poolnet.data.dataset import LETTERS, Dataset, Split
from poolnet.errors import InputError
from poolnet.runs import figures
from poolnet.stats import scores
from poolnet.stats.scores import Scores, Share
from poolnet.text import aligned, coded, marked, piped, to_json
from poolnet.tracking import names, publication, result_runs, servers, training_runs
from poolnet.tracking.registry import Loaded
from poolnet.training.evaluation import Evaluation, evaluate

MEASURES = ("precision", "recall", "f1")  # of each letter
# Between the training and an evaluation of the same model on the same data, on one kind of device and on two.
TOLERANCE = {"loss": 1e-6, "acc": 1e-6}
TOLERANCE_ELSEWHERE = {"loss": 1e-4, "acc": 1e-3}  # and one letter: sums in another order turn near ties round


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The scores of one model on one split.

    The last field holds loss and accuracy as the training run logged them. It is None if the training run was on other
    data or did not log them, or if the server does not have that run.
    """

    model: Loaded
    trained: Run | None  # the run that the model is from, if the server has it
    splits: Dataset
    split: Split
    evaluation: Evaluation
    scores: Scores
    recorded: dict[str, float] | None

    @property
    def name(self) -> str:
        """A short name of the model, with its pooling."""
        if self.model.version:
            return f"{self.model.version.name} version {self.model.version.version} ({self.model.pool})"
        place = self.model.uri if ":/" in self.model.uri else Path(self.model.uri).name
        return f"{place} ({self.model.pool})"

    @property
    def agrees(self) -> bool | None:
        """Whether the scores agree with those of the training run.

        None if there are no scores to compare with.
        """
        if self.recorded is None:
            return None
        return all(
            abs(getattr(self.evaluation, key) - value) <= self.tolerance[key] for key, value in self.recorded.items()
        )

    @property
    def tolerance(self) -> dict[str, float]:
        """The allowed difference from the recorded loss and accuracy.

        Evaluation runs on the CPU. Training may have run on any device.
        """
        device = self.trained.data.tags.get(names.DEVICE, "cpu")
        if device.startswith("cpu"):
            return TOLERANCE
        return TOLERANCE_ELSEWHERE | {"acc": max(TOLERANCE_ELSEWHERE["acc"], 1.001 / self.scores.n)}

    @property
    def agreement(self) -> str:
        if not self.trained:
            return "Not compared with its run, which this server does not have."
        run, found = _run_name(self.trained), self.evaluation
        if self.recorded is None:
            other = self.trained.data.tags.get(names.DATA_SHA256) != self.splits.sha256
            why = "was on other data" if other else f"recorded no such figures of {self.split.name}"
            return f"Not compared with its run {run}, which {why}."
        if self.agrees:
            within = " and ".join(f"{value:g} ({key})" for key, value in self.tolerance.items())
            if self.tolerance == TOLERANCE:
                within = f"{TOLERANCE['loss']:g}"
            return f"Agrees with its run {run}: loss and accuracy are the same within {within}."
        pairs = [f"{key} {getattr(found, key):.7f}, recorded {value:.7f}" for key, value in self.recorded.items()]
        return f"Differs from its run {run}: found {'; '.join(pairs)}."


def score(client: MlflowClient, model: Loaded, path: str, split: str, seed: int) -> EvaluationReport:
    """Score a model on one split of a data set.

    The data set is the one at `path`. If `path` is empty, it is the one that the model was trained on.
    """
    trained = servers.look_up(client, model.run_id) if model.run_id else None
    splits = _open(model, trained, path)
    part = getattr(splits, split)
    if len(part) < 2:
        raise InputError(f"{splits.path}: {split}: found {len(part)} image, expected two or more to score a model on")
    found = evaluate(model.net, part)
    try:
        counted = scores.of(found.logits, found.y, seed)
    except ValueError as error:  # weights that are not finite
        raise InputError(f"{model.uri} on {splits.path}: {error}") from None
    return EvaluationReport(model, trained, splits, part, found, counted, _recorded(trained, splits, split))


def _open(model: Loaded, trained: Run | None, path: str) -> Dataset:
    """Open the data set at `path`, or the training data.

    If `path` is empty, the data set that the model was trained on is opened. It must still be the same: `InputError` if
    its SHA-256 is not the recorded one.
    """
    if path:
        return dataset.open_splits(dataset.locate(path))
    digest = trained.data.tags.get(names.DATA_SHA256) if trained else None
    if not digest:
        raise InputError(f"{model.uri}: found no record of the data it was trained on; name some with --data")
    try:
        splits = dataset.open_splits(_place(trained))
    except InputError as error:
        raise InputError(f"{error} (what {model.uri} was trained on); name its place here with --data") from None
    if splits.sha256 != digest:
        raise InputError(
            f"{splits.path}: found SHA-256 {splits.sha256[:16]}..., but {digest[:16]}... in the record of {model.uri}; "
            "to score it on other data name them with --data"
        )
    return splits


def _place(trained: Run) -> Path:
    """Return the path of the data set of a run.

    It is the path that the run recorded. If no file is there now, it is what the options of the run mean on this
    machine.
    """
    for entry in trained.inputs.dataset_inputs:
        with contextlib.suppress(ValueError, AttributeError):  # somebody else's
            path = Path(json.loads(entry.dataset.source).get("uri") or "")
            if path.is_file():
                return path
    return dataset.locate(training_runs.config(trained).data)


def _recorded(trained: Run | None, splits: Dataset, split: str) -> dict[str, float] | None:
    """Return the loss and accuracy that the training run logged.

    These are the values on val or test with the final weights. None if the training run was on other data or logged no
    such values.
    """
    if not trained or trained.data.tags.get(names.DATA_SHA256) != splits.sha256 or split == "train":
        return None
    found = {key: trained.data.metrics.get(f"{split}_{key}") for key in ("loss", "acc")}
    return None if None in found.values() else found


def _run_name(run: Run) -> str:
    return run.data.tags.get(names.RUN) or run.info.run_name


# --- forms ------------------------------------------------------------------------------------------------------------


def _summary(card: EvaluationReport) -> list[list[str]]:
    s, ece = card.scores, card.scores.calibration.ece
    beyond = "above" if ece > s.ece_if_calibrated else "within"
    return [
        ["score", "estimate", "95 % interval"],
        ["loss, nats", f"{s.loss.estimate:.4f}", f"{s.loss.low:.4f} to {s.loss.high:.4f}"],
        ["accuracy", f"{s.acc.estimate:.4f}", f"{s.acc.low:.4f} to {s.acc.high:.4f}"],
        ["ECE", f"{ece:.4f}", f"{beyond} the {s.ece_if_calibrated:.4f} of chance"],
    ]


def _classes(card: EvaluationReport) -> list[list[str]]:
    rows = [["letter", "n", "precision", "recall", "F1"]]
    for found in card.scores.per_class:
        shares = (_share(share) for share in (found.precision, found.recall, found.f1))
        rows.append([LETTERS[found.label], f"{found.n:,}", *shares])
    return rows


def _share(share: Share) -> str:
    return "-" if math.isnan(share.estimate) else f"{share.estimate:.3f} ({share.low:.3f} to {share.high:.3f})"


def _confusion(card: EvaluationReport) -> list[list[str]]:
    rows = card.scores.confusion.tolist()
    return [["true, said", *LETTERS], *([letter, *map(str, row)] for letter, row in zip(LETTERS, rows, strict=True))]


def _title(card: EvaluationReport) -> str:
    return f"{card.name} on {card.splits.name}, {card.split.name}: {card.scores.n:,} letters"


def table(card: EvaluationReport) -> str:
    """Return the report as text for a terminal."""
    parts = (aligned(rows(card)) for rows in (_summary, _classes, _confusion))
    return "\n".join([_title(card), "", *(line for part in parts for line in (*part, "")), card.agreement])


def markdown(card: EvaluationReport) -> str:
    """Return the report in Markdown.

    It becomes the description of the run in MLflow.
    """
    lines = [f"**{marked(_title(card))}**", "", marked(card.agreement), ""]
    lines += [*piped(_summary(card)), "", *piped(_classes(card)), ""]
    lines += [
        f"- Model: {coded(card.model.uri)}",
        f"- Data: {coded(card.splits.name)}, SHA-256 `{card.splits.sha256}`",
        "- Intervals say what other examples would change: Wilson's for shares, bootstrap for the loss. A model whose "
        "probabilities are true has an ECE below that of chance in 95 % of samples of this size.",
    ]
    return "\n".join(lines)


def contents(card: EvaluationReport) -> dict:
    """Return the whole report as a dictionary for JSON.

    The keys are the names in the JSON output.
    """
    s, model = card.scores, card.model
    return {
        "model": model.uri,
        "version": int(model.version.version) if model.version else None,
        "pool": model.pool,
        "data": card.splits.name,
        "data_sha256": card.splits.sha256,
        "split": card.split.name,
        "n": s.n,
        "loss": {"estimate": s.loss.estimate, "low": s.loss.low, "high": s.loss.high},
        "acc": s.acc,
        "ece": s.calibration.ece,
        "ece_if_calibrated": s.ece_if_calibrated,
        "per_class": [
            {"letter": LETTERS[found.label], "n": found.n, **{key: getattr(found, key) for key in MEASURES}}
            for found in s.per_class
        ],
        "confusion": s.confusion.tolist(),
        "trained_by": card.trained.info.run_id if card.trained else None,
        "recorded": card.recorded,
        "agrees": card.agrees,
        "agreement": card.agreement,
    }


# --- the run in MLflow ------------------------------------------------------------------------------------------------


def publish(client: MlflowClient, card: EvaluationReport) -> str:
    """Save the report as a run in MLflow.

    The run holds the scores and is linked to the model and the data set. Returns the id of the run.
    """
    split, s = card.split.name, card.scores
    metrics = {f"{split}_loss": card.evaluation.loss, f"{split}_acc": card.evaluation.acc, "ece": s.calibration.ece}
    metrics |= {f"{split}_loss_low": s.loss.low, f"{split}_loss_high": s.loss.high}
    metrics |= {f"{split}_acc_low": s.acc.low, f"{split}_acc_high": s.acc.high}
    for found in s.per_class:
        shares = {key: getattr(found, key).estimate for key in MEASURES}
        metrics |= {f"{key}_{LETTERS[found.label]}": value for key, value in shares.items() if not math.isnan(value)}
    agrees = {True: "agrees", False: "differs", None: "not compared"}[card.agrees]
    tags = {names.EVALUATION: agrees, names.DATA_SHA256: card.splits.sha256, names.NOTE: markdown(card)}
    params = {"model": card.model.uri, "split": split, "pool": card.model.pool}
    model_id, dataset = card.model.model_id, publication.datasets(card.splits.summary())[split]
    experiment_id = card.trained.info.experiment_id if card.trained else servers.own_experiment(client)
    with tempfile.TemporaryDirectory() as scratch:
        _write(card, Path(scratch))
        about = {"metrics": metrics, "params": params, "tags": tags, "folder": Path(scratch), "dataset": dataset}
        with result_runs.run(
            client, experiment_id, "evaluate", f"{card.model.pool} on {card.splits.name} {split}"
        ) as run_id:
            client.log_inputs(run_id, [dataset], [LoggedModelInput(model_id)] if model_id else [])
            result_runs.log(client, run_id, **about, model_id=model_id)
    return run_id


def _write(card: EvaluationReport, folder: Path) -> None:
    """Write the artifacts of the run into a folder.

    They are the numbers, the predictions and the figures.
    """
    (folder / "evaluation.json").write_text(to_json(contents(card), indent=1), encoding="utf-8")
    (folder / "predictions").mkdir()
    np.savez(folder / "predictions" / f"{card.split.name}.npz", logits=card.evaluation.logits, y=card.evaluation.y)
    title = figures.drawable(_title(card))
    drawn = {
        "confusion_matrix": figures.confusion_matrix(card.evaluation, title),
        "worst_mistakes": figures.worst_mistakes(card.evaluation, card.split, f"{title}, highest losses"),
    }
    figures.save_all(folder / "figures", drawn)
