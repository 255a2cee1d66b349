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

from poolnet.data import dataset, folds
from poolnet.data.dataset import Dataset, Split
from poolnet.errors import InputError
from poolnet.runs import figures
from poolnet.stats import scores
from poolnet.stats.paired import Effect
from poolnet.stats.scores import ClassScore, Scores, Share
from poolnet.text import DIGITS, SHARE, aligned, coded, interval, marked, piped, step, to_json, wrapped
from poolnet.tracking import names, pages, publication, result_runs, server_runs, servers, training_runs
from poolnet.tracking.registry import NAME, Loaded
from poolnet.training.evaluation import Evaluation, evaluate

MEASURES = ("precision", "recall", "f1")  # of each letter
LETTER_TABLE = "letters.json"
SHORT = 4  # characters of a name, which fits over its column of confusions


@dataclasses.dataclass(frozen=True)
class LossAcc:
    loss: float
    acc: float


# Between the training and an evaluation of the same model on the same data, on one kind of device and on two.
TOLERANCE = LossAcc(loss=1e-6, acc=1e-6)
TOLERANCE_ELSEWHERE = LossAcc(loss=1e-4, acc=1e-3)  # and one letter: sums in another order turn near ties round


# --- computing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The scores of one model on one split.

    `recorded` is what the training run logged. It is None if the training run was on other data or logged no such
    values, or if the server does not have that run. The scores on letters that the model was trained on have no
    intervals, since these say nothing about others.
    """

    model: Loaded
    trained: Run | None  # the run that the model is from, if the server has it
    splits: Dataset
    split: Split
    fold: str  # of which the splits are, if any
    evaluation: Evaluation
    scores: Scores
    recorded: LossAcc | None

    @property
    def title(self) -> str:
        version, uri = self.model.version, self.model.uri
        place = uri if ":/" in uri else Path(uri).name
        model = f"{version.name} version {version.version}" if version else place
        part = f"{self.split.name} of fold {self.fold}" if self.fold else self.split.name
        return f"{model} ({self.model.pool}) on {self.splits.name}, {part}: {self.scores.n:,} {self.splits.things}"

    @property
    def worth(self) -> str:
        """What the intervals rest on."""
        s, things = self.scores, self.splits.things
        if math.isnan(s.acc.low):
            return f"No intervals: the model was trained on these {things}, so its scores say nothing about others."
        if self.split.group is None:
            return f"The data name no families, so the intervals take each of the {things} as independent."
        return f"They are of {s.groups:,} families; for the accuracy, worth {s.n_effective:,.0f} independent {things}."

    @property
    def name(self) -> str:
        """The name that tells the evaluation from others."""
        loaded, version = self.model, self.model.version
        if version:
            model = f"version {version.version}" if version.name == NAME else f"{version.name} {version.version}"
        elif self.trained and loaded.model_id:
            model = server_runs.name_of(self.trained)
        else:
            model = Path(loaded.uri).absolute().name
        return f"{model} on {self.splits.name} {self.split.name}"

    @property
    def answer(self) -> str:
        acc = self.scores.acc
        reach = "" if math.isnan(acc.low) else f", 95 % interval {interval(acc.low, acc.high)}"
        return f"Accuracy {acc.estimate:{SHARE}}{reach}"

    @property
    def tolerance(self) -> LossAcc:
        """The allowed difference from the recorded loss and accuracy.

        Evaluation runs on the CPU. Training may have run on any device.
        """
        if not self.trained or self.trained.data.tags.get(names.DEVICE, "cpu").startswith("cpu"):
            return TOLERANCE
        one_letter = 1.001 / self.scores.n
        return dataclasses.replace(TOLERANCE_ELSEWHERE, acc=max(TOLERANCE_ELSEWHERE.acc, one_letter))

    @property
    def agrees(self) -> bool | None:
        """Whether the scores agree with the recorded ones, if any."""
        if self.recorded is None:
            return None
        loss, acc = self.evaluation.loss - self.recorded.loss, self.evaluation.acc - self.recorded.acc
        return abs(loss) <= self.tolerance.loss and abs(acc) <= self.tolerance.acc

    @property
    def agreement(self) -> str:
        if not self.trained:
            return "Not compared with its run, which this server does not have."
        run = server_runs.name_of(self.trained)
        if self.recorded is None:
            other = not self.splits.is_recorded_as(self.trained.data.tags.get(names.DATA_SHA256, ""))
            why = "was on other data" if other else f"recorded no such figures of {self.split.name}"
            return f"Not compared with its run {run}, which {why}."
        if self.agrees:
            within = f"{self.tolerance.loss:g}"
            if self.tolerance != TOLERANCE:
                within += f" (loss) and {self.tolerance.acc:g} (acc)"
            return f"Agrees with its run {run}: loss and accuracy are the same within {within}."
        return (
            f"Differs from its run {run}: found loss {self.evaluation.loss:.7f}, recorded {self.recorded.loss:.7f}; "
            f"acc {self.evaluation.acc:.7f}, recorded {self.recorded.acc:.7f}."
        )


def score(client: MlflowClient, model: Loaded, path: str, split: str, seed: int) -> EvaluationReport:
    """Score a model on one split of a data set.

    The data set is the one at `path`. If `path` is empty, it is the one that the model was trained on. If the model was
    trained on a fold of it, the splits are those of the fold.
    """
    step("Scoring the model")
    trained = server_runs.get_run(client, model.run_id)
    splits = dataset.open_dataset(dataset.locate(path)) if path else _training_data(model.uri, trained)
    digest = trained.data.tags.get(names.DATA_SHA256, "") if trained else ""
    own = splits.is_recorded_as(digest)
    fold = trained.data.params.get("fold", "") if trained and own else ""
    if fold:
        splits, _ = folds.take(splits, fold)
    images = getattr(splits, split)
    if len(images) < 2:
        raise InputError(f"{splits.path}: {split}: found {len(images)} image, expected two or more to score a model on")
    evaluation = evaluate(model.net, images)
    try:
        all_scores = scores.of(evaluation.logits, evaluation.y, images.group, seed)
    except ValueError as error:  # weights that are not finite, or one family
        raise InputError(f"{model.uri} on {splits.path}: {error}") from None
    if split == "train" and (own or not digest):
        all_scores = _without_intervals(all_scores)
    recorded = None
    if trained and own and split != "train":
        loss, acc = (trained.data.metrics.get(f"{split}_{name}") for name in ("loss", "acc"))  # with the final weights
        recorded = LossAcc(loss, acc) if loss is not None and acc is not None else None
    return EvaluationReport(model, trained, splits, images, fold, evaluation, all_scores, recorded)


def _without_intervals(s: Scores) -> Scores:
    """Keep the estimates alone."""

    def bare(share: Share) -> Share:
        return Share(share.estimate, math.nan, math.nan)

    def bare_class(of_class: ClassScore) -> ClassScore:
        shares = [bare(getattr(of_class, name)) for name in MEASURES]
        return ClassScore(of_class.label, of_class.n, *shares)

    return dataclasses.replace(
        s,
        loss=dataclasses.replace(s.loss, low=math.nan, high=math.nan),
        acc=bare(s.acc),
        per_class=tuple(map(bare_class, s.per_class)),
        n_effective=math.nan,
        ece_if_calibrated=math.nan,
    )


def _training_data(uri: str, trained: Run | None) -> Dataset:
    """Open the data set that a model was trained on.

    It is read from the path that the run recorded. If no file is there now, it is what the options of the run mean on
    this machine. Raises `InputError` if its SHA-256 is not the recorded one.
    """
    digest = trained.data.tags.get(names.DATA_SHA256) if trained else None
    if not trained or not digest:
        raise InputError(f"{uri}: found no record of the data it was trained on; name some with --data")
    paths: list[Path] = []
    for entry in trained.inputs.dataset_inputs if trained.inputs else []:
        with contextlib.suppress(ValueError, AttributeError):  # somebody else's
            paths += filter(Path.is_file, [Path(json.loads(entry.dataset.source).get("uri") or "")])
    try:
        splits = dataset.open_dataset(paths[0] if paths else dataset.locate(training_runs.config(trained).data))
    except InputError as error:
        raise InputError(f"{error} (what {uri} was trained on); name its place here with --data") from None
    if not splits.is_recorded_as(digest):
        raise InputError(
            f"{splits.path}: found SHA-256 {splits.sha256[:16]}..., but {digest[:16]}... in the record of {uri}; "
            "to score it on other data name them with --data"
        )
    return splits


# --- showing ----------------------------------------------------------------------------------------------------------


def table(report: EvaluationReport) -> str:
    """Return the report as text for a terminal."""
    lines = [report.answer, *wrapped(report.title), *wrapped(report.worth), *wrapped(report.agreement), ""]
    lines += [*aligned(_summary(report.scores)), "", *aligned(_letters(report)), ""]
    return "\n".join([*lines, *aligned(_confusion(report), gap=1)])


def markdown(report: EvaluationReport) -> str:
    """Return the report in Markdown.

    It becomes the description of the run in MLflow.
    """
    lines = [
        f"**{report.answer}**: {marked(report.title)}",
        "",
        *piped(_summary(report.scores)),
        "",
        f"{marked(report.worth)} {marked(report.agreement)}",
        "",
    ]
    lines += [*piped(_letters(report)), ""]
    lines += [
        f"- Model: {coded(report.model.uri)}{_maker(report.trained)}",
        f"- Data: {coded(report.splits.name)}, SHA-256 `{report.splits.sha256[:DIGITS]}`",
        "- Intervals say what other families would change: Wilson's for shares, over as many letters as they are "
        "worth, and Student's t for the loss, on a log scale. A model whose probabilities are true has an ECE below "
        "that of chance in 95 % of samples of these families.",
    ]
    return "\n".join(lines)


def _maker(run: Run | None) -> str:
    if not run:
        return ""
    page = pages.run(run.info.experiment_id, run.info.run_id)
    return f", of run {pages.in_markdown(run.info.run_name, page)}"


def _summary(s: Scores) -> list[list[str]]:
    ece = s.calibration.ece
    beyond = f"{'above' if ece > s.ece_if_calibrated else 'within'} the {s.ece_if_calibrated:{SHARE}} of chance"
    return [
        ["score", "estimate", "95 % interval"],
        ["accuracy", f"{s.acc.estimate:{SHARE}}", _reach(s.acc)],
        ["loss, nats", f"{s.loss.estimate:{SHARE}}", _reach(s.loss)],
        ["ECE", f"{ece:{SHARE}}", "-" if math.isnan(s.ece_if_calibrated) else beyond],
    ]


def _reach(score: Share | Effect) -> str:
    return "-" if math.isnan(score.low) else interval(score.low, score.high)


def _letters(report: EvaluationReport) -> list[list[str]]:
    rows = [[report.splits.thing, "n", *MEASURES[:2], "F1", "its 95 % interval"]]
    for of_class in report.scores.per_class:
        shares = [getattr(of_class, name) for name in MEASURES]
        estimates = ["-" if math.isnan(share.estimate) else f"{share.estimate:{SHARE}}" for share in shares]
        name = report.splits.classes[of_class.label]
        rows.append([name, f"{of_class.n:,}", *estimates, _reach(of_class.f1)])
    return rows


def _confusion(report: EvaluationReport) -> list[list[str]]:
    """Return the rows of the confusions; long names are numbered."""
    classes, rows = report.splits.classes, report.scores.confusion.tolist()
    columns = list(classes)
    if max(map(len, classes)) > SHORT:
        columns = list(map(str, range(len(classes))))
        classes = tuple(map(" ".join, zip(columns, classes, strict=True)))
    return [["true", *columns], *([name, *map(str, row)] for name, row in zip(classes, rows, strict=True))]


def contents(report: EvaluationReport) -> dict[str, object]:
    """Return the whole report as a dictionary for JSON.

    The keys are the names in the JSON output.
    """
    s, model = report.scores, report.model
    return {
        "model": model.uri,
        "version": int(model.version.version) if model.version else None,
        "pool": model.pool,
        "data": report.splits.name,
        "data_sha256": report.splits.sha256,
        "split": report.split.name,
        "fold": report.fold or None,
        "n": s.n,
        "groups": None if report.split.group is None else s.groups,
        "n_effective": s.n_effective,
        "loss": Share(s.loss.estimate, s.loss.low, s.loss.high),
        "acc": s.acc,
        "ece": s.calibration.ece,
        "ece_if_calibrated": s.ece_if_calibrated,
        "per_class": [
            {
                "letter": report.splits.classes[of_class.label],
                "n": of_class.n,
                **{name: getattr(of_class, name) for name in MEASURES},
            }
            for of_class in s.per_class
        ],
        "confusion": s.confusion.tolist(),
        "trained_by": report.trained.info.run_id if report.trained else None,
        "recorded": report.recorded,
        "agrees": report.agrees,
        "agreement": report.agreement,
    }


# --- logging ----------------------------------------------------------------------------------------------------------


def publish(client: MlflowClient, report: EvaluationReport) -> str:
    """Save the report as a run in MLflow.

    The run holds scores, predictions and figures. It is linked to the model and the data set. Returns the id of the
    run.
    """
    split, s, pool, evaluation = report.split.name, report.scores, report.model.pool, report.evaluation
    more = {"ece": s.calibration.ece, "loss_low": s.loss.low, "loss_high": s.loss.high}
    more |= {"acc_low": s.acc.low, "acc_high": s.acc.high}
    if report.split.group is not None:
        more |= {"groups": s.groups, "n_effective": s.n_effective}
    known = {name: value for name, value in more.items() if not math.isnan(value)}
    metrics = {f"{split}_loss": evaluation.loss, f"{split}_acc": evaluation.acc, **names.section("eval", known)}
    agrees = {True: "agrees", False: "differs", None: "not compared"}[report.agrees]
    tags = {names.EVALUATION: agrees, names.DATA_SHA256: report.splits.sha256, names.NOTE: markdown(report)}
    data = report.splits.summary()
    tags |= publication.data_tags(data)
    tags[names.TABLES] = json.dumps([{"path": LETTER_TABLE, "type": "table"}])
    params = {"model": report.model.uri, "split": split, "pool": pool} | ({"fold": report.fold} if report.fold else {})
    model_id, dataset = report.model.model_id, publication.datasets(data)[split]
    experiment_id = report.trained.info.experiment_id if report.trained else servers.own_experiment(client)
    step("Drawing and uploading the report")
    title = figures.drawable(report.title)
    drawn = {
        "confusion_matrix": figures.confusion_matrix(evaluation, title, report.splits.classes),
        "worst_mistakes": figures.worst_mistakes(
            evaluation, report.split, f"{title}, highest losses", report.splits.classes
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "evaluation.json").write_text(to_json(contents(report), indent=1), encoding="utf-8")
        (folder / LETTER_TABLE).write_text(to_json(_letter_table(report)), encoding="utf-8")
        (folder / "predictions").mkdir()
        arrays = {"logits": evaluation.logits, "y": evaluation.y}
        arrays |= {} if report.split.group is None else {"group": report.split.group}
        np.savez(folder / "predictions" / f"{split}.npz", allow_pickle=False, **arrays)
        figures.save_all(folder / "figures", drawn)
        with result_runs.run(client, experiment_id, "evaluate", report.name) as run_id:
            client.log_inputs(run_id, [dataset], [LoggedModelInput(model_id)] if model_id else [])
            result_runs.log(
                client,
                run_id,
                metrics=metrics,
                params=params,
                tags=tags,
                folder=folder,
                dataset=dataset,
                model_id=model_id,
            )
    return run_id


def _letter_table(report: EvaluationReport) -> dict[str, list]:
    """Return the scores of each letter as MLflow's table."""
    rows = []
    for of_class in report.scores.per_class:
        shares = [getattr(of_class, name) for name in MEASURES]
        estimates = [round(share.estimate, 4) for share in shares]
        rows.append([report.splits.classes[of_class.label], of_class.n, *estimates, *map(_reach, shares)])
    columns = [report.splits.thing, "n", *MEASURES, *(f"{name}, 95 % interval" for name in MEASURES)]
    return {"columns": columns, "data": rows}
