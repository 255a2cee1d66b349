"""Compare two arms with data from the tracking server.

The data are the params, data sets, histories and predictions of the arms' runs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError
from poolnet.stats import paired
from poolnet.stats.paired import Calibration, ClassEffect, Effect, McNemar
from poolnet.studies import selection
from poolnet.studies.selection import Selected
from poolnet.studies.study import MARGIN, read
from poolnet.text import NATS, POINTS, interval, progress, step
from poolnet.tracking import servers, training_runs
from poolnet.tracking.training_runs import TrainingRun

HISTORIES = ("train_loss", "train_acc", "val_loss", "val_acc")


@dataclasses.dataclass(frozen=True)
class Arm:
    """The results of one arm, with one run per seed.

    On the test split, `right` is (S, N) bool, `nll` is (S, N) in nats, and `logits` is (S, N, 10). `histories` has an
    array (S, epochs) for each metric.
    """

    name: str
    runs: tuple[TrainingRun, ...]
    logits: np.ndarray
    right: np.ndarray
    nll: np.ndarray
    histories: dict[str, np.ndarray]
    calibration: tuple[Calibration, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of two arms on the test split.

    Differences are arm `b` minus arm `a`. Accuracies are in points, losses in nats.
    """

    question: str
    a: Arm
    b: Arm
    y: np.ndarray  # (N,), the true letters
    margin: float
    acc: Effect  # over seeds and examples both, or over examples alone where there is one seed
    nll: Effect
    acc_over_seeds: Effect | None  # None where there is one seed
    nll_over_seeds: Effect | None
    sign_flip_p: float | None  # of accuracy
    acc_over_examples: Effect
    nll_over_examples: Effect
    mcnemar: tuple[McNemar, ...]  # by seed
    per_class: tuple[ClassEffect, ...]  # accuracy
    equivalence_p: float
    smallest_effect: float  # points, that a design like this finds four times in five
    caveats: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.config.seed for run in self.a.runs)

    @property
    def name(self) -> str:
        """The name that tells the comparison from others."""
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        arms, (one, other) = f"{self.b.name} vs {self.a.name}, {self.data}", (self.a.runs[0], self.b.runs[0])
        return f"{arms}, {seeds}" if one.config.seed == other.config.seed else arms  # whose names then are the seeds

    @property
    def data(self) -> str:
        return self.a.runs[0].data_name

    @property
    def data_sha256(self) -> str:
        return self.a.runs[0].data_sha256

    @property
    def verdict(self) -> str:
        """Return `better`, `equivalent` or `inconclusive`."""
        if self.equivalence_p < paired.ALPHA:
            return "equivalent"
        return "better" if self.acc.low > 0 or self.acc.high < 0 else "inconclusive"

    @property
    def winner(self) -> str | None:
        if self.verdict != "better":
            return None
        return self.b.name if self.acc.estimate > 0 else self.a.name

    @property
    def varied(self) -> str:
        """Name the sources of variation that the interval covers.

        They are seeds and examples, or only examples if there is one seed.
        """
        return "seeds and examples" if len(self.seeds) > 1 else "examples"

    @property
    def sentence(self) -> str:
        a, b, acc, nll = self.a.name, self.b.name, self.acc, self.nll
        if self.verdict == "better":
            says = f"{self.winner} is better than {a if self.winner == b else b}"
        elif self.verdict == "equivalent":
            says = f"{a} and {b} are equivalent within {self.margin:g} points"
        else:
            says = f"Inconclusive whether {b} is better than {a}"
        return (
            f"{says} on {self.data}: {b} minus {a} is {acc.estimate:{POINTS}} points of test accuracy, 95 % interval "
            f"{interval(acc.low, acc.high, POINTS)}, and {nll.estimate:{NATS}} nats of test loss, "
            f"{interval(nll.low, nll.high, NATS)} ({_count(len(self.seeds), 'seed')}, "
            f"{_count(len(self.y), 'example')}; what varied: {self.varied})."
        )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def compare(study_or_runs: str | Path | Sequence[str], margin: float | None = None, seed: int = 0) -> Comparison:
    """Compare the arms of a study file, or two runs.

    The two runs are given by name or id. All results come from the tracking server. `margin` is in points of accuracy.
    `seed` is the seed of the bootstraps. Raises `InputError` and `RunError`.
    """
    study, runs = None, tuple[str, ...]()
    if isinstance(study_or_runs, (str, Path)):
        study = read(Path(study_or_runs))
    else:
        runs = tuple(study_or_runs)
        if len(runs) != 2:
            raise InputError(f"compare: found {len(runs)} runs, expected a study file or two runs")
    if margin is None:
        margin = study.margin if study else MARGIN
    if not 0 < margin < 100:
        raise InputError(f"margin: found {margin}, expected points of accuracy above 0")
    with servers.own_server():
        client = servers.own_client()
        if study:
            selected = selection.of_study(client, [servers.experiment_named(client, "")], study)
        else:
            selected = selection.of_runs(client, runs)
        return of_selected(client, selected, study.question if study else "", margin, seed)


def of_selected(client: MlflowClient, selected: Selected, question: str, margin: float, seed: int) -> Comparison:
    """Check two selected arms and compare them.

    `seed` is the seed of the bootstraps. Raises `InputError` if the arms must not be compared.
    """
    groups, notes = selection.checked(selected)
    (a, y), (b, other_y) = (_arm(client, name, runs) for name, runs in groups.items())
    if not np.array_equal(y, other_y):
        raise InputError(f"{b.runs[0].name}: found other labels in its predictions than in {a.runs[0].name}")
    if len(y) < 2:
        raise InputError(f"{a.runs[0].name}: found {len(y)} test letter in its predictions, expected two or more")
    step(f"Comparing {a.name} and {b.name}")
    rng = np.random.default_rng(seed)
    right, nll = 100.0 * (b.right.astype(np.float64) - a.right), b.nll - a.nll
    pairs = len(right) > 1
    over_examples = [paired.over_examples(d.mean(0), rng) for d in (right, nll)]
    acc, loss = (paired.two_way(right, rng), paired.two_way(nll, rng)) if pairs else over_examples
    over_seeds = [paired.over_seeds(d.mean(1)) if pairs else None for d in (right, nll)]
    comparison = Comparison(
        question=question or f"Is {b.name} better than {a.name}?",
        a=a,
        b=b,
        y=y,
        margin=margin,
        acc=acc,
        nll=loss,
        acc_over_seeds=over_seeds[0],
        nll_over_seeds=over_seeds[1],
        sign_flip_p=paired.sign_flip(b.right.sum(1) - a.right.sum(1)) if pairs else None,
        acc_over_examples=over_examples[0],
        nll_over_examples=over_examples[1],
        mcnemar=tuple(paired.mcnemar(*pair) for pair in zip(a.right, b.right, strict=True)),
        per_class=paired.per_class(right, y),
        equivalence_p=paired.equivalence(acc, margin),
        smallest_effect=paired.smallest_effect(acc.se, acc.df),
        caveats=(),
    )
    return dataclasses.replace(comparison, caveats=(*notes, *_caveats(comparison)))


def _arm(client: MlflowClient, name: str, runs: Sequence[TrainingRun]) -> tuple[Arm, np.ndarray]:
    """Load an arm's results and its test labels.

    All runs of the arm are tested on these labels. Otherwise `InputError` is raised.
    """
    predicted, curves = [], []
    with progress(runs, label=f"Fetching the runs of {name}") as bar:
        for run in bar:
            predicted.append(training_runs.predictions(client, run.run_id, run.name, "test"))
            curves.append([_history(client, run, metric) for metric in HISTORIES])
    logits, labels = [each.logits for each in predicted], [each.y for each in predicted]
    for run, y in zip(runs, labels, strict=True):
        if not np.array_equal(y, labels[0]):
            raise InputError(f"{run.name}: found other labels in its predictions than in {runs[0].name}")
    seen = [paired.per_example(each, labels[0]) for each in logits]
    histories = dict(zip(HISTORIES, map(np.array, zip(*curves, strict=True)), strict=True))
    calibration = tuple(paired.calibration(each, labels[0]) for each in logits)
    right, nll = (np.array(column) for column in zip(*seen, strict=True))
    return Arm(name, tuple(runs), np.array(logits), right, nll, histories, calibration), labels[0]


def _history(client: MlflowClient, run: TrainingRun, metric: str) -> list[float]:
    values = {m.step: m.value for m in client.get_metric_history(run.run_id, metric) if m.step > 0}
    if len(values) != run.config.epochs or max(values) != len(values):
        raise InputError(f"{run.name}: found {len(values)} epochs of {metric}, expected {run.config.epochs}")
    return [values[step] for step in sorted(values)]


def _caveats(comparison: Comparison) -> list[str]:
    seeds, runs = len(comparison.seeds), (*comparison.a.runs, *comparison.b.runs)
    notes = ["Other data sets, label noise and choices made while looking at test are beyond these intervals."]
    if seeds == 1:
        notes.append("One training an arm: what another seed would change is not known, only other test examples.")
    elif seeds < 6:
        notes.append(f"With {seeds} seeds no sign-flip test can reach 0.05; six are the least, ten are better.")
    if min(comparison.acc.low, comparison.nll.low) > 0 or max(comparison.acc.high, comparison.nll.high) < 0:
        notes.append("Accuracy and loss disagree: the arm that is more often right also pays more for its mistakes.")
    if comparison.acc.estimate * comparison.acc.low > 0 and comparison.verdict == "equivalent":
        notes.append("There is a difference, but it is smaller than the margin.")
    commits = {run.commit for run in runs}
    if len(commits) > 1:
        notes.append(f"The runs come from {len(commits)} commits of the code.")
    return notes
