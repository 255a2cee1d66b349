"""What a comparison of two arms or more has found.

The numbers are in the fields. What they mean, the verdict and its sentence, follows from them.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from poolnet.stats import paired
from poolnet.stats.many import Contrast
from poolnet.stats.paired import Calibration, ClassEffect, Effect, PairedTest
from poolnet.text import NATS, POINTS, interval
from poolnet.tracking.training_runs import TrainingRun

UNITS = {"accuracy": ("points", POINTS), "loss": ("nats", NATS)}  # and the form of a number


@dataclasses.dataclass(frozen=True)
class Scored:
    """The test results of an arm: (S, N) right and nll, in nats.

    At the optimum S is 1, since no seed matters there.
    """

    right: np.ndarray
    nll: np.ndarray

    def measure(self, name: str) -> np.ndarray:
        """Return accuracy in points, or loss in nats."""
        return 100.0 * self.right if name == "accuracy" else self.nll


@dataclasses.dataclass(frozen=True)
class Arm(Scored):
    """The results of one arm, with one run for each seed and fold.

    On the test split, `right` is (S, N) bool, `nll` is (S, N) in nats, and `logits` is (S, N, 10). With folds, N counts
    the letters of all folds, fold by fold. `histories` has an array (runs, epochs) for each metric.
    """

    name: str
    runs: tuple[TrainingRun, ...]
    logits: np.ndarray
    histories: dict[str, np.ndarray]
    calibration: tuple[Calibration, ...]  # by seed
    optimum: Scored | None = None


@dataclasses.dataclass(frozen=True)
class Design:
    """What two arms or more have in common.

    `group` is (N,), the family of each example. It is None if the data set names no families.
    """

    question: str
    arms: tuple[Arm, ...]
    y: np.ndarray  # (N,), the true classes
    group: np.ndarray | None
    primary: str  # accuracy or loss: it decides
    margin: float  # points or nats
    tuned: tuple[str, ...] = ()  # options that each arm chose on val

    @property
    def runs(self) -> list[TrainingRun]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(run.config.seed for run in self.arms[0].runs))

    @property
    def folds(self) -> tuple[str, ...]:
        """Return the folds that were tested, or nothing."""
        return tuple(dict.fromkeys(run.config.fold for run in self.arms[0].runs if run.config.fold))

    @property
    def families(self) -> int:
        return len(self.y) if self.group is None else len(np.unique(self.group))

    @property
    def data(self) -> str:
        return self.arms[0].runs[0].data_name

    @property
    def data_sha256(self) -> str:
        return self.arms[0].runs[0].data_sha256

    @property
    def classes(self) -> tuple[str, ...]:
        return self.arms[0].runs[0].classes

    @property
    def varied(self) -> str:
        """Name the sources of variation that intervals cover."""
        what = "examples" if self.group is None else "families"
        return f"seeds and {what}" if len(self.seeds) > 1 else what

    @property
    def size(self) -> str:
        """Count seeds, folds, examples and families."""
        parts = [_count(len(self.seeds), "seed")]
        parts += [_count(len(self.folds), "fold")] if self.folds else []
        families = "" if self.group is None else f" of {_count(self.families, 'family')}"
        return ", ".join([*parts, _count(len(self.y), "example") + families])

    @property
    def title(self) -> str:
        """Say on what: data, seeds and folds."""
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return f"{self.data}, {seeds}" + (f", {_count(len(self.folds), 'fold')}" if self.folds else "")

    @property
    def at_optimum(self) -> bool:
        return all(arm.optimum for arm in self.arms)

    def chosen(self, arm: Arm) -> str:
        """Say which values of the tuned options an arm chose."""
        texts = []
        for option in self.tuned:
            times = Counter(getattr(run.config, option) for run in arm.runs)
            share = len(self.seeds)
            folds = [f"{value:g}" + (f" in {n // share} of {len(self.folds)} folds" if self.folds else "")
                     for value, n in times.most_common()]  # fmt: skip
            texts.append(f"{option} {', '.join(folds)}")
        return "; ".join(texts)

    def difference(self, measure: str, one: Scored, other: Scored) -> np.ndarray:
        """Return `other` minus `one` in a measure: (S, N)."""
        return other.measure(measure) - one.measure(measure)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The difference of two arms at the lowest train loss there is."""

    acc: Effect
    nll: Effect


@dataclasses.dataclass(frozen=True)
class Comparison(Design):
    """The comparison of two arms on the test split.

    Differences are arm `b` minus arm `a`. Accuracies are in points, losses in nats.
    """

    acc: Effect = dataclasses.field(kw_only=True)  # over seeds and families both, or over families alone with one seed
    nll: Effect = dataclasses.field(kw_only=True)
    acc_over_seeds: Effect | None = dataclasses.field(kw_only=True)  # None where there is one seed
    nll_over_seeds: Effect | None = dataclasses.field(kw_only=True)
    sign_flip_p: float | None = dataclasses.field(kw_only=True)  # of accuracy, over seeds
    acc_over_examples: Effect = dataclasses.field(kw_only=True)
    nll_over_examples: Effect = dataclasses.field(kw_only=True)
    paired: PairedTest = dataclasses.field(kw_only=True)
    per_class: tuple[ClassEffect, ...] = dataclasses.field(kw_only=True)  # accuracy
    optimum: Optimum | None = None
    caveats: tuple[str, ...] = ()

    @property
    def a(self) -> Arm:
        return self.arms[0]

    @property
    def b(self) -> Arm:
        return self.arms[1]

    @property
    def name(self) -> str:
        """The name that tells the comparison from others."""
        arms = f"{self.b.name} vs {self.a.name}"
        if self.a.runs[0].config.seed == self.b.runs[0].config.seed:
            return f"{arms}, {self.title}"
        return f"{arms}, {self.data}"  # the arms' names are the seeds

    @property
    def effect(self) -> Effect:
        """The effect that decides."""
        return self.acc if self.primary == "accuracy" else self.nll

    @property
    def equivalence_p(self) -> float:
        return paired.equivalence(self.effect, self.margin)

    @property
    def smallest_effect(self) -> float:
        """The difference that such a design finds four times in five."""
        return paired.smallest_effect(self.effect.se, self.effect.df)

    @property
    def verdict(self) -> str:
        return verdict(self.effect, self.margin)

    @property
    def winner(self) -> str | None:
        """Return the name of the better arm, if one is."""
        if self.verdict != "better":
            return None
        return self.b.name if (self.effect.estimate > 0) == (self.primary == "accuracy") else self.a.name

    @property
    def verdict_at_optimum(self) -> str:
        """Say which arm is better at the optimum, and by how much."""
        assert self.optimum
        effect = self.optimum.acc if self.primary == "accuracy" else self.optimum.nll
        unit, form = UNITS[self.primary]
        found = verdict(effect, self.margin)
        b_wins = (effect.estimate > 0) == (self.primary == "accuracy")
        better = f"{(self.b if b_wins else self.a).name} is better"
        says = {"better": better, "equivalent": f"equivalent within {self.margin:g} {unit}"}.get(found, found)
        return f"{says}, {effect.estimate:{form}} {unit}, {interval(effect.low, effect.high, form)}"

    @property
    def sentence(self) -> str:
        a, b, unit = self.a.name, self.b.name, UNITS[self.primary][0]
        if self.verdict == "better":
            says = f"{self.winner} is better than {a if self.winner == b else b}"
        elif self.verdict == "equivalent":
            says = f"{a} and {b} are equivalent within {self.margin:g} {unit}"
        else:
            says = f"Inconclusive whether {b} is better than {a}"
        first, second = ("accuracy", self.acc), ("loss", self.nll)
        if self.primary == "loss":
            first, second = second, first
        return (
            f"{says} on {self.data}: {b} minus {a} is {_in_words(*first, '95 % interval ')}, and {_in_words(*second)} "
            f"({self.size}; what varied: {self.varied})."
        )


@dataclasses.dataclass(frozen=True)
class Ranking(Design):
    """The comparison of three arms or more on the test split.

    There is one contrast for each pair of arms. The intervals of all pairs hold at once with 95 %.
    """

    acc: tuple[Contrast, ...] = dataclasses.field(kw_only=True)
    nll: tuple[Contrast, ...] = dataclasses.field(kw_only=True)
    best: tuple[str, ...] = dataclasses.field(kw_only=True)  # arms not shown to be worse than the best, the best first
    acc_at_optimum: tuple[Contrast, ...] = ()
    nll_at_optimum: tuple[Contrast, ...] = ()
    best_at_optimum: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{', '.join(arm.name for arm in self.arms)}: {self.title}"

    @property
    def verdict(self) -> str:
        """Return `better`, `narrowed down` or `inconclusive`."""
        if len(self.best) == 1:
            return "better"
        return "narrowed down" if len(self.best) < len(self.arms) else "inconclusive"

    @property
    def winner(self) -> str | None:
        return self.best[0] if len(self.best) == 1 else None

    @property
    def sentence(self) -> str:
        says = best_in_words(self.best, [arm.name for arm in self.arms])
        return f"By test {self.primary} on {self.data}, {says} ({self.size}; what varied: {self.varied})."


def best_in_words(best: Sequence[str], arms: Sequence[str]) -> str:
    """Say which arms may be the best, `best[0]` before all."""
    first, *others = best
    says = f"{first} is first of {len(arms)}; not shown to be worse: {', '.join(others)}"
    if not others:
        says = f"{first} is the best of {len(arms)}"
    worse = [name for name in arms if name not in best]
    return says + (f"; shown to be worse: {', '.join(worse)}" if worse else "")


def verdict(effect: Effect, margin: float) -> str:
    """Return `better`, `equivalent` or `inconclusive`."""
    if paired.equivalence(effect, margin) < paired.ALPHA:
        return "equivalent"
    return "better" if effect.low > 0 or effect.high < 0 else "inconclusive"


def _in_words(measure: str, effect: Effect, what: str = "") -> str:
    unit, form = UNITS[measure]
    ends = interval(effect.low, effect.high, form)
    return f"{effect.estimate:{form}} {unit} of test {measure}, {what}{ends}"


def _count(n: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"
