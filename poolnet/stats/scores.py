"""Compute the scores of one model, with 95 % intervals.

The input is the model's logits (N, K) and the labels (N,), and the groups whose letters belong together (N,), such as
families of fonts. The intervals are about other groups. Shares have Wilson's (1927) interval, which needs no simulation
and stays within 0..1.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from poolnet.stats import paired
from poolnet.stats.paired import Calibration, Effect


@dataclass(frozen=True)
class Share:
    """A proportion and its 95 % interval, or NaN."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """The precision, recall and F1 of one class."""

    label: int
    n: int  # examples of the class
    precision: Share
    recall: Share
    f1: Share


@dataclass(frozen=True)
class Scores:
    """All scores of one model.

    `confusion` (K, K) counts letters, and its rows are the true classes. `n_effective` is how many independent letters
    the accuracy is worth. `ece_if_calibrated` is a limit for the ECE: if a model's probabilities are true, its ECE
    stays below this limit in 95 % of samples of these groups.
    """

    n: int
    groups: int
    n_effective: float
    loss: Effect  # nats
    acc: Share
    calibration: Calibration
    ece_if_calibrated: float
    per_class: tuple[ClassScore, ...]
    confusion: np.ndarray


def of(logits: ArrayLike, y: ArrayLike, group: ArrayLike | None = None, seed: int = 0) -> Scores:
    """Compute all scores of a model.

    group (N,) numbers the group of each letter, such as its family of fonts. Without it each letter is a group. `seed`
    is the seed of the simulated ECE. Fewer than 2 groups raise `ValueError`.
    """
    right, nll = paired.per_example(logits, y)
    predicted = np.argmax(logits, axis=1)
    index, groups = paired.group_index(group, len(right))
    return Scores(
        n=len(right),
        groups=groups,
        n_effective=len(right) / paired.design_effect(right, index),
        loss=_loss(nll, index),
        acc=wilson(right, index),
        calibration=paired.calibration(logits, y),
        ece_if_calibrated=paired.ece_if_calibrated(logits, y, np.random.default_rng(seed), index),
        per_class=per_class(y, predicted, index, classes=np.shape(logits)[1]),
        confusion=confusion_matrix(y, predicted, classes=np.shape(logits)[1]),
    )


def _loss(nll: np.ndarray, group: np.ndarray) -> Effect:
    """Return the mean loss with its interval on a log scale.

    Losses are above 0 and skewed. With few groups an interval of equal reach on both sides lies too low, and is too
    narrow. So the variance is that of a jackknife, and the df are those of the effective groups. Here a group counts as
    much as it has of the loss: if a few have most of it, they alone tell how it varies.
    """
    effect = paired.clustered(nll, group)
    if not effect.se:
        return effect
    groups = max(paired.effective_groups(group, nll), 2.0)
    reach = float(stdtrit(groups - 1, 0.975)) * effect.se * math.sqrt(groups / (groups - 1))
    factor = math.exp(reach / effect.estimate)
    return replace(effect, low=effect.estimate / factor, high=effect.estimate * factor)


def wilson(x: ArrayLike, group: ArrayLike | None = None) -> Share:
    """Return the share of x (n,) bool with its interval.

    It is Wilson's for n / design effect letters (Kott & Carr 1997), with the t quantile of as many df as there are
    effective groups, less one (Korn & Graubard 1998). If each letter is a group, no design effect is estimated, and the
    interval is Wilson's own, with the normal quantile.
    """
    x = np.asarray(x)
    if not len(x):
        return Share(*[np.nan] * 3)
    share, (index, _) = float(x.mean()), paired.group_index(group, len(x))
    groups, n = paired.effective_groups(index), len(x) / paired.design_effect(x, index)
    if groups == 1 < len(x):
        return Share(share, 0.0, 1.0)
    z = float(stdtrit(groups - 1 if groups < len(x) else np.inf, 0.975))
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side * reach) / (1 + z * z / n) for side in (-1, 1))
    return Share(share, low if share else 0.0, high if share < 1 else 1.0)


def confusion_matrix(y: ArrayLike, predicted: ArrayLike, classes: int = 10) -> np.ndarray:
    """Count letters by true class (rows) and predicted class (columns)."""
    return np.bincount(classes * np.asarray(y) + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(
    y: ArrayLike, predicted: ArrayLike, group: ArrayLike | None = None, classes: int = 10
) -> tuple[ClassScore, ...]:
    """Return the scores of each class.

    F1 is 2 J / (1 + J). J is the number of hits as a share of the letters that are of the class or predicted as it
    (Hand, Christen & Kirielle 2021). The ends of F1's interval are computed in the same way from those of J.
    """
    y, predicted = np.asarray(y), np.asarray(predicted)
    index, _ = paired.group_index(group, len(y))
    scores = []
    for label in range(classes):
        own, said = y == label, predicted == label
        precision, recall, jaccard = (wilson((own & said)[of], index[of]) for of in (said, own, own | said))
        f1 = Share(*(2 * j / (1 + j) for j in (jaccard.estimate, jaccard.low, jaccard.high)))
        scores.append(ClassScore(label, int(own.sum()), precision, recall, f1))
    return tuple(scores)
