"""Compare two arms or more with data from the tracking server.

The data are the params, data sets, histories and predictions of the arms' runs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError
from poolnet.stats import many, paired
from poolnet.studies import selection
from poolnet.studies.comparison import UNITS, Arm, Comparison, Design, Optimum, Ranking, Scored
from poolnet.studies.selection import Selected
from poolnet.studies.study import MARGINS, Study, read
from poolnet.text import progress, step
from poolnet.tracking import servers, training_runs
from poolnet.tracking.training_runs import Predictions, TrainingRun

HISTORIES = ("train_loss", "train_acc", "val_loss", "val_acc")


def compare(study_or_runs: str | Path | Sequence[str], margin: float | None = None) -> Comparison | Ranking:
    """Compare the arms of a study file, or two runs.

    The two runs are given by name or id. All results come from the tracking server. `margin` is in points of accuracy,
    or in nats for a study about loss. A study with more than two arms gives a `Ranking`. Raises `InputError` and
    `RunError`.
    """
    study, runs = None, tuple[str, ...]()
    if isinstance(study_or_runs, (str, Path)):
        study = read(Path(study_or_runs))
    else:
        runs = tuple(study_or_runs)
        if len(runs) != 2:
            raise InputError(f"compare: found {len(runs)} runs, expected a study file or two runs")
    if margin is not None and not 0 < margin < 100:
        raise InputError(f"margin: found {margin}, expected points of accuracy above 0")
    with servers.own_server():
        client = servers.own_client()
        if study:
            selected = selection.of_study(client, [servers.experiment_named(client, "")], study)
        else:
            selected = selection.of_runs(client, runs)
        return of_selected(client, selected, study, margin)


def of_selected(
    client: MlflowClient, selected: Selected, study: Study | None, margin: float | None = None
) -> Comparison | Ranking:
    """Check the selected arms and compare them.

    Raises `InputError` if the arms must not be compared.
    """
    groups, notes = selection.checked(selected)
    loaded = [_arm(client, name, runs) for name, runs in groups.items()]
    (first, tested), *others = loaded
    name = first.runs[0].name
    for arm, other in others:
        if not np.array_equal(tested.y, other.y):
            raise InputError(f"{arm.runs[0].name}: found other labels in its predictions than in {name}")
        if not _same_families(tested.group, other.group):
            raise InputError(f"{arm.runs[0].name}: found other families in its predictions than in {name}")
    if len(tested.y) < 2:
        raise InputError(f"{name}: found {len(tested.y)} test letter in its predictions, expected two or more")
    names = [arm.name for arm, _ in loaded]
    step(f"Comparing {', '.join(names[:-1])} and {names[-1]}")
    primary = study.primary if study else "accuracy"
    question = study.question if study else f"Is {names[1]} better than {names[0]}?"
    if margin is None:
        margin = study.margin if study else MARGINS[primary]
    known = next((each.group for _, each in loaded if each.group is not None), None)
    arms = tuple(arm for arm, _ in loaded)
    design = Design(question, arms, tested.y, known, primary, margin, tuple(selected.tuned))
    found = _two_arms(design) if len(arms) == 2 else _ranking(design)
    return dataclasses.replace(found, caveats=(*notes, *_caveats(found)))


def _two_arms(design: Design) -> Comparison:
    a, b = design.arms
    group, pairs = design.group, len(design.seeds) > 1
    right, nll = (design.difference(measure, a, b) for measure in UNITS)
    optimum = None
    if a.optimum and b.optimum:
        both = [design.difference(measure, a.optimum, b.optimum) for measure in UNITS]
        optimum = Optimum(*(paired.clustered(d, group) for d in both))
    over_seeds = [paired.over_seeds(d.mean(1)) if pairs else None for d in (right, nll)]
    over_examples = [paired.clustered(d.mean(0), group) for d in (right, nll)]
    by_seed = b.right.sum(1, dtype=np.int64) - a.right.sum(1, dtype=np.int64)
    return Comparison(
        **vars(design),
        acc=paired.clustered(right, group),
        nll=paired.clustered(nll, group),
        acc_over_seeds=over_seeds[0],
        nll_over_seeds=over_seeds[1],
        sign_flip_p=paired.sign_flip(by_seed) if pairs else None,
        acc_over_examples=over_examples[0],
        nll_over_examples=over_examples[1],
        paired=paired.paired_test(a.right, b.right, group),
        per_class=paired.per_class(right, design.y, group, len(design.classes)),
        optimum=optimum,
    )


def _ranking(design: Design) -> Ranking:
    trained = _contrasts(design, design.arms)
    at_optimum: tuple = ((), (), ())
    if design.at_optimum:
        at_optimum = _contrasts(design, [arm.optimum for arm in design.arms if arm.optimum])
    return Ranking(
        **vars(design),
        acc=trained[0],
        nll=trained[1],
        best=trained[2],
        acc_at_optimum=at_optimum[0],
        nll_at_optimum=at_optimum[1],
        best_at_optimum=at_optimum[2],
    )


def _contrasts(design: Design, scored: Sequence[Scored]) -> tuple[tuple, tuple, tuple[str, ...]]:
    """Return contrasts of accuracy and loss, and the best arms."""
    values = {measure: np.stack([each.measure(measure) for each in scored]) for measure in UNITS}
    acc, nll = (many.simultaneous(values[measure], design.group) for measure in UNITS)
    higher = acc if design.primary == "accuracy" else many.simultaneous(-values["loss"], design.group)
    means = values[design.primary].mean((1, 2)) * (1 if design.primary == "accuracy" else -1)
    best = sorted(many.not_worse_than_best(higher, len(scored)), key=lambda k: -means[k])
    return acc, nll, tuple(design.arms[k].name for k in best)


def _same_families(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is None or other is None or np.array_equal(one, other)


def _arm(client: MlflowClient, name: str, runs: Sequence[TrainingRun]) -> tuple[Arm, Predictions]:
    """Load an arm's results, and what it is tested on.

    All runs of a fold are tested on the same labels. Otherwise `InputError` is raised.
    """
    loaded, curves = [], []
    with progress(runs, label=f"Fetching the runs of {name}") as bar:
        for run in bar:
            loaded.append(training_runs.predictions(client, run.run_id, run.name, "test"))
            curves.append([_history(client, run, metric) for metric in HISTORIES])
    folds = len({run.config.fold for run in runs})
    for index, run in enumerate(runs):
        first = index % folds
        if not np.array_equal(loaded[index].y, loaded[first].y):
            raise InputError(f"{run.name}: found other labels in its predictions than in {runs[first].name}")
        if not _same_families(loaded[index].group, loaded[first].group):
            raise InputError(f"{run.name}: found other families in its predictions than in {runs[first].name}")
    tested = _joined(loaded[:folds])
    logits = np.array([_joined(loaded[start : start + folds]).logits for start in range(0, len(runs), folds)])
    seen = [paired.per_example(each, tested.y) for each in logits]
    right, nll = (np.array(column) for column in zip(*seen, strict=True))
    histories = dict(zip(HISTORIES, map(np.array, zip(*curves, strict=True)), strict=True))
    calibration = tuple(paired.calibration(each, tested.y) for each in logits)
    optimum = None
    if tested.optimum is not None:
        optimum = Scored(*(part[None] for part in paired.per_example(tested.optimum, tested.y)))
    return Arm(right, nll, name, tuple(runs), logits, histories, calibration, optimum), tested


def _joined(folds: Sequence[Predictions]) -> Predictions:
    """Join the predictions of the folds of one seed."""

    def join(name: str) -> np.ndarray | None:
        parts = [getattr(fold, name) for fold in folds]
        return None if any(part is None for part in parts) else np.concatenate(parts)

    logits, y = join("logits"), join("y")
    assert logits is not None
    assert y is not None
    return Predictions(logits, y, join("group"), join("optimum"))


def _history(client: MlflowClient, run: TrainingRun, metric: str) -> list[float]:
    values = {m.step: m.value for m in client.get_metric_history(run.run_id, metric) if m.step > 0}
    if len(values) != run.config.epochs or max(values) != len(values):
        raise InputError(f"{run.name}: found {len(values)} epochs of {metric}, expected {run.config.epochs}")
    return [values[step] for step in sorted(values)]


def _caveats(found: Comparison | Ranking) -> list[str]:
    seeds, n = len(found.seeds), len(found.arms)
    notes = ["Other data sets, label noise and choices made while looking at test are beyond these intervals."]
    if found.group is None:
        notes.append("The data set names no families: each example counts as independent of all others.")
    if seeds == 1:
        notes.append("One seed an arm: what another seed would change is not known, only other test examples.")
    lr = {run.config.lr for run in found.runs}
    if len(lr) == 1 and "lr" not in found.tuned:
        arms = "both arms" if n == 2 else "all arms"
        notes.append(f"At lr {lr.pop():g} for {arms}: another may suit one better, as [tune] in a study finds.")
    if isinstance(found, Comparison):
        notes += _disagreements(found)
    commits = {run.commit for run in found.runs}
    if len(commits) > 1:
        notes.append(f"The runs come from {len(commits)} commits of the code.")
    return notes


def _disagreements(c: Comparison) -> list[str]:
    notes = []
    if min(c.acc.low, c.nll.low) > 0 or max(c.acc.high, c.nll.high) < 0:
        notes.append("Accuracy and loss disagree: the arm that is more often right also pays more for its mistakes.")
    if c.effect.estimate * c.effect.low > 0 and c.verdict == "equivalent":
        notes.append("There is a difference, but it is smaller than the margin.")
    return notes
