"""Compute the scores of one model, with 95 % intervals.

The input is the model's logits (N, K) and the labels (N,). The intervals are about other examples. Shares have Wilson's
(1927) interval, which needs no simulation and stays within 0..1.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

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

    `confusion` (K, K) counts examples, and its rows are the true classes. `ece_if_calibrated` is a limit for the ECE:
    if a model's probabilities are true, its ECE stays below this limit in 95 % of samples of this size.
    """

    n: int
    loss: Effect  # nats
    acc: Share
    calibration: Calibration
    ece_if_calibrated: float
    per_class: tuple[ClassScore, ...]
    confusion: np.ndarray


def of(logits: ArrayLike, y: ArrayLike, seed: int = 0) -> Scores:
    """Compute all scores of a model.

    `seed` is the seed of the bootstrap of the loss and of the simulated ECE. N < 2 raises `ValueError`.
    """
    rng = np.random.default_rng(seed)
    right, nll = paired.per_example(logits, y)
    confusion = confusion_matrix(y, np.argmax(logits, axis=1), classes=np.shape(logits)[1])
    return Scores(
        n=len(right),
        loss=paired.over_examples(nll, rng, resamples=999),
        acc=wilson(int(right.sum()), len(right)),
        calibration=paired.calibration(logits, y),
        ece_if_calibrated=paired.ece_if_calibrated(logits, rng),
        per_class=per_class(confusion),
        confusion=confusion,
    )


def wilson(successes: int, n: int) -> Share:
    """Return a share of n independent examples, with Wilson's interval."""
    if not n:
        return Share(*[np.nan] * 3)
    share, z = successes / n, float(ndtri(0.975))
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side * reach) / (1 + z * z / n) for side in (-1, 1))
    return Share(share, 0.0 if not successes else low, 1.0 if successes == n else high)


def confusion_matrix(y: ArrayLike, predicted: ArrayLike, classes: int = 10) -> np.ndarray:
    """Count examples by true class (rows) and predicted class (columns)."""
    return np.bincount(classes * np.asarray(y) + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(confusion: np.ndarray) -> tuple[ClassScore, ...]:
    """Return the scores of each class.

    F1 is 2 J / (1 + J). J is the number of hits as a share of the examples that are of the class or predicted as it
    (Hand, Christen & Kirielle 2021). The ends of F1's interval are computed in the same way from those of J.
    """
    scores = []
    for label, hits in enumerate(confusion.diagonal().tolist()):
        n, predicted = int(confusion[label].sum()), int(confusion[:, label].sum())
        jaccard = wilson(hits, n + predicted - hits)
        f1 = Share(*(2 * j / (1 + j) for j in (jaccard.estimate, jaccard.low, jaccard.high)))
        scores.append(ClassScore(label, n, wilson(hits, predicted), wilson(hits, n), f1))
    return tuple(scores)
