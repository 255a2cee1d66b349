"""Test differences between two arms, over seeds and groups of letters.

The functions say how sure a difference is if both seeds and test letters vary. Arms A and B are trained with the same S
seeds and scored on the same N letters. So the functions judge the paired difference d = B - A: (S,) by seed, (N,) by
letter, or (S, N). The S x N cells are not S x N independent observations: the cells of one seed share its training, the
cells of one letter share its difficulty, and the letters of one group, a family of fonts, share its style. Where the
groups are not known, each letter counts as one. Intervals have a level of 95 %. P-values are two-sided unless stated
otherwise.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose parts are loaded when they are used: `scipy.stats` takes a second
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # of tests: a p-value below it decides
NOT_WORSE = 0.025  # of non-inferiority, which looks at one side


@dataclass(frozen=True)
class Effect:
    """A mean with its interval, standard error and p-value.

    The mean, the 95 % interval and the standard error are in the unit of the input. `p` tests the mean against 0.
    """

    estimate: float
    low: float
    high: float
    se: float
    df: float  # of the t distribution that interval and p are from; inf is the normal
    p: float


@dataclass(frozen=True)
class Parts:
    """What the variance of a mean difference is made of.

    `seeds` falls with the number of seeds, S, and `groups` with that of groups, G. There are N letters a seed.
    """

    seeds: float  # 0 where there is one seed
    groups: float
    S: int
    G: int
    N: int

    @property
    def se(self) -> float:
        return float(np.sqrt(self.seeds + self.groups))

    @property
    def df(self) -> float:
        """Return the df whose quantile gives the half-width of `clustered`."""
        dfs = self.S - 1, self.G - 1
        if not self.seeds or not self.groups:
            return dfs[0] if self.seeds else dfs[1]
        target = np.sqrt(np.average(_quantile(np.array(dfs)) ** 2, weights=[self.seeds, self.groups]))
        return scipy.optimize.brentq(lambda df: _quantile(df) - target, 0.9 * min(dfs), 1.1 * max(dfs))


@dataclass(frozen=True)
class PairedTest:
    """The result of a paired test on two arms."""

    only_a: int  # letters that only this arm has right, over all seeds
    only_b: int
    p: float


@dataclass(frozen=True)
class ClassEffect:
    """The difference between two arms on one class."""

    label: int
    n: int  # letters of the class
    effect: Effect
    p_holm: float  # effect.p, adjusted for the number of classes that have a p-value


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error of a model, with its bins."""

    ece: float
    counts: np.ndarray  # (bins,), examples in each bin
    confidence: np.ndarray  # (bins,), their mean
    accuracy: np.ndarray  # (bins,)


def over_seeds(d: ArrayLike) -> Effect:
    """Return the mean over seeds with Student's t interval.

    d (S,) has one difference per seed. The interval is from Student (1908). It is that of `clustered` with seeds in the
    place of letters. Fewer than 2 seeds raise `ValueError`.
    """
    if np.ndim(d) != 1 or len(np.asarray(d)) < 2:
        raise ValueError(f"expected 2 or more seeds, found {_form(np.asarray(d))}")
    return clustered(d)


def clustered(d: ArrayLike, group: ArrayLike | None = None) -> Effect:
    """Return the mean over seeds and groups with its interval.

    d is (S, N), or (N,) where there is one seed. group (N,) numbers the group of each letter; without it each letter is
    a group. The interval is about other seeds and other groups, or about other groups alone where there is one seed.

    With the variances of `parts`, the half-width squared is t_S^2 seeds + t_G^2 groups (Banerjee 1960), of which t_S
    and t_G are the quantiles for S - 1 and G - 1 df. So the level holds for all values of the two variances.
    Satterthwaite's (1946) df do not reach it with 2 to 4 seeds. Fewer than 2 groups raise `ValueError`.
    """
    d, variances = _by_seed(d), parts(d, group)
    estimate = np.clip(d.mean(), d.min(), d.max())  # of equal values their own, to the digit
    return _effect(estimate, variances.se, variances.df)


def parts(d: ArrayLike, group: ArrayLike | None = None) -> Parts:
    """Return the variances of the mean over seeds and groups.

    d and group are as in `clustered`. This is the two-way cluster variance of Cameron, Gelbach & Miller (2011): V_S +
    V_G - V_SG, the sums of squares over seeds, over groups and over cells, of which V_G - V_SG is never below 0. All
    are multiplied by M / (M - 1), for M of the fewer: seeds or groups. Without that V_S is too small by a half with two
    seeds, and V_G - V_SG also.
    """
    d = _by_seed(d)
    sums = cells(d, group)
    S, G = sums.shape
    if G < 2:
        raise ValueError(f"expected 2 or more groups, found {G}")
    by_seed, by_group, both = (float((x**2).sum()) / d.size**2 for x in (sums.sum(1), sums.sum(0), sums))
    if S == 1:
        return Parts(0.0, by_group * G / (G - 1), S, G, d.size)
    groups, few = max(by_group - both, 0.0), min(S, G) / (min(S, G) - 1)
    if not by_seed and not groups:  # by chance: then cells are the best that is known
        groups = both
    return Parts(by_seed * few, groups * few, S, G, d.shape[1])


def cells(d: np.ndarray, group: ArrayLike | None) -> np.ndarray:
    """Return the sums of deviations from the mean, (S, G).

    There is one for each seed and group of d (S, N).
    """
    index, G = group_index(group, d.shape[1])
    sizes, origin = np.bincount(index), d[0, 0]  # less which equal values have no deviation, not even a rounding
    sums = np.array([np.bincount(index, row - origin, G) for row in d])
    return sums - sums.sum() / d.size * sizes


def group_index(group: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """Return the group of each of n letters, numbered from 0.

    The second result is the number of groups. Without groups each letter is one.
    """
    if group is None:
        return np.arange(n), n
    group = np.asarray(group)
    if group.shape != (n,) or not np.issubdtype(group.dtype, np.integer):
        raise ValueError(f"expected integer groups ({n},), found {_form(group)}")
    numbers, index = np.unique(group, return_inverse=True)
    return index, len(numbers)


def design_effect(x: ArrayLike, group: ArrayLike | None) -> float:
    """Return how many times grouping widens the variance of a mean.

    It is the variance of the mean of x (n,) by groups, over that of n independent letters, and at least 1 (Kish 1965).
    Both are those of a jackknife, which is not too small where groups are few. So n letters are worth n / design
    effect. If all of x are equal, nothing tells how alike the letters of a group are.
    Then they are taken as one, which gives the sum of the squared sizes of the groups over n.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    index, _ = group_index(group, n)
    groups = effective_groups(index)
    if groups == 1 or not np.ptp(x):
        return n / groups
    e = x - x.mean()
    few = groups / (groups - 1) * (n - 1) / n
    return max(1.0, float((np.bincount(index, e) ** 2).sum() / (e**2).sum() * few**2))


def effective_groups(index: np.ndarray, x: np.ndarray | None = None) -> float:
    """Return how many groups of equal size these are worth.

    index is that of `group_index`. It is n^2 over the sum of the squared sizes (Kish 1965). A few large groups tell
    less about others than as many of equal size. With x (n,), values above 0, the size of a group is its sum of x.
    """
    sizes = np.bincount(index, x).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def paired_test(right_a: ArrayLike, right_b: ArrayLike, group: ArrayLike | None = None) -> PairedTest:
    """Test whether two arms are equally often right.

    right_a and right_b are bool, (N,), or (S, N) with the same seeds. The test is `sign_flip` on the differences of
    each group, summed over its letters and seeds. If each letter is a group and there is one seed, it is the exact test
    of McNemar (1947). Otherwise it is the exact form of that of Obuchowski (1998). It is about these trained models on
    other groups, not about training.
    """
    right_a, right_b = _two_bools(right_a, right_b)
    d = np.atleast_2d(right_b).sum(0) - np.atleast_2d(right_a).sum(0)
    index, G = group_index(group, len(d))
    sums = np.rint(np.bincount(index, d, G)).astype(np.int64)
    return PairedTest(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()), sign_flip(sums))


def sign_flip(sums: ArrayLike) -> float:
    """Return the exact p-value of the sign-flip test.

    sums (G,) are integers, such as the difference in right letters of each group, or of each seed. The null hypothesis
    is that each sign is as likely as its opposite (Fisher 1935). No p is below 2 / 2**G: with 5 seeds, the smallest p
    is 0.0625.

    All 2**G flips are counted. The sum of those with a plus takes few values, so the chance of each is found by
    convolution, for all sums of one size at a time. Chances below 1e-30 are left out.
    """
    sums = np.asarray(sums)
    if sums.ndim != 1 or not np.issubdtype(sums.dtype, np.integer):
        raise ValueError(f"expected integer sums (G,), found {_form(sums)}")
    chances = np.ones(1)
    for size, count in zip(*np.unique(abs(sums[sums != 0]), return_counts=True), strict=True):
        pluses = scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)
        wider = np.zeros(len(chances) + size * count)
        for k in np.flatnonzero(pluses > 1e-30):
            wider[k * size :][: len(chances)] += pluses[k] * chances
        chances = wider
    farthest = (len(chances) - 1 + abs(int(sums.sum()))) // 2
    return min(1.0, 2 * float(chances[farthest:].sum()))


def holm(p: ArrayLike) -> np.ndarray:
    """Adjust p-values for their number with Holm's method.

    p is (K,), and the result has the same order (Holm 1979). NaN stays NaN and is not counted.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(f"expected p-values (K,) between 0 and 1, found {p}")
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is sorted last
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def per_class(d: ArrayLike, y: ArrayLike, group: ArrayLike | None = None, classes: int = 10) -> tuple[ClassEffect, ...]:
    """Return the mean difference between the arms for each class.

    It is the mean of d (S, N) over the letters of each class of y (N,), by `clustered`. A class whose letters are of
    fewer than 2 groups has no interval. All values of its effect are NaN, and Holm's method does not count it.
    """
    d, y = np.asarray(d), np.asarray(y)
    if d.ndim != 2 or y.shape != d.shape[1:] or not np.isin(y, np.arange(classes)).all():
        raise ValueError(f"expected d (S, N) and y (N,) below {classes}, found {_form(d)} and {_form(y)}")
    index, _ = group_index(group, len(y))
    effects = []
    for own in (y == label for label in range(classes)):
        measured = own.any() and np.ptp(index[own]) > 0
        effects.append(clustered(d[:, own], index[own]) if measured else Effect(*[np.nan] * 6))
    adjusted = holm([effect.p for effect in effects]).tolist()
    return tuple(map(ClassEffect, range(classes), np.bincount(y, minlength=classes).tolist(), effects, adjusted))


def per_example(logits: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the correctness and the NLL of each example.

    The input is logits (N, K) and labels y (N,). The first result tells which examples are right, (N,) bool. The second
    is the NLL in nats, (N,) float64. If several top logits are equal, the first one is the prediction.
    """
    logits, y = _logits(logits, y)
    return logits.argmax(1) == y, -log_softmax(logits, axis=1)[np.arange(len(y)), y]


def calibration(logits: ArrayLike, y: ArrayLike, bins: int = 15) -> Calibration:
    """Return the expected calibration error and its bins.

    The input is logits (N, K) and labels y (N,). The error (Naeini et al. 2015; Guo et al. 2017) is the mean of
    |accuracy - confidence| over bins of the top probability, weighted by the number of examples in each bin.

    The bins have equal widths and are closed on the right. The first is (0, 1/bins]. An empty bin has NaN as confidence
    and accuracy.
    """
    logits, y = _logits(logits, y)
    if bins < 1:
        raise ValueError(f"expected 1 or more bins, found {bins}")
    top, index = _binned(logits, bins)
    sums = [np.bincount(index, weights, bins) for weights in (None, top, logits.argmax(1) == y)]
    counts = sums[0].astype(int)
    filled = counts > 0
    confidence, accuracy = (np.divide(x, counts, out=np.full(bins, np.nan), where=filled) for x in sums[1:])
    gaps = np.abs(accuracy - confidence)[filled]
    return Calibration(float(np.average(gaps, weights=counts[filled])), counts, confidence, accuracy)


def ece_if_calibrated(
    logits: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    group: ArrayLike | None = None,
    bins: int = 15,
    draws: int = 2000,
) -> float:
    """Return the highest ECE to expect from a calibrated model.

    It is the 95 % quantile of the ECE of logits (N, K) and labels y (N,), if the top probabilities are the true chances
    of being right. Even then the ECE is above 0 (Broecker & Smith 2007). So only an ECE above this value is a finding.

    The gap of a bin is a sum over groups of right answers less those to expect. The sums of each group are multiplied
    by a normal number of its own (the wild bootstrap: Wu 1986), which keeps what the letters of a group have in common.
    The variance of a bin is at least that of independent letters with these probabilities, because the few errors among
    sure answers say little about it.
    """
    logits, y = _logits(logits, y)
    top, bin_of = _binned(logits, bins)
    index, G = group_index(group, len(y))
    gaps = np.bincount(index * bins + bin_of, (logits.argmax(1) == y) - top, G * bins).reshape(G, bins)
    covariance = gaps.T @ gaps * G / max(G - 1, 1)  # of the bins, from which all groups are drawn at once
    found, least = covariance.diagonal(), np.bincount(bin_of, top * (1 - top), bins)
    wider = np.sqrt(np.maximum(np.divide(least, found, out=np.ones(bins), where=found > 0), 1))
    values, axes = np.linalg.eigh(covariance * np.outer(wider, wider))
    drawn = rng.standard_normal((draws, bins)) @ (axes * np.sqrt(np.maximum(values, 0))).T
    return float(np.quantile(np.abs(drawn).sum(1) / len(y), LEVEL))


def _binned(logits: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the top probability of each example and its bin."""
    top = softmax(logits, axis=1).max(1)
    return top, np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], top, side="left")


def non_inferiority(right_a: ArrayLike, right_b: ArrayLike, margin: float, group: ArrayLike | None = None) -> float:
    """Return the p-value of a non-inferiority test.

    The test is one-sided. Its null hypothesis is that arm B (N,) is right less often than arm A (N,) by `margin` or
    more. `margin` is a share, not points. Its level is `NOT_WORSE`, half of that of a two-sided test, so that it agrees
    with a 95 % interval.

    The statistic is `tango`, whose variance is multiplied by the design effect of the differences. Yang, Sun & Hardin
    (2012) multiply it too, by one from an intracluster correlation, which is too large where few letters differ. With
    groups p is from the t distribution with as many df as there are effective groups, less one, as in `wilson`.
    """
    if not 0 < margin < 1:
        raise ValueError(f"expected a margin between 0 and 1, found {margin}")
    right_a, right_b = _two_bools(right_a, right_b)
    only_a, only_b = (int(only.sum()) for only in (right_a & ~right_b, right_b & ~right_a))
    n, effect = len(right_a), design_effect(right_b.astype(float) - right_a, group)
    z = tango(only_a, only_b, n, -margin, effect)
    groups = effective_groups(group_index(group, n)[0])
    return float(scipy.special.stdtr(groups - 1 if groups < n else np.inf, -z))


def tango(only_a: int, only_b: int, n: int, difference: float, inflation: float = 1.0) -> float:
    """Return the score statistic of a difference in right letters.

    Of n letters only arm A has `only_a` right, and only arm B `only_b`. The null hypothesis is that their shares of
    right letters differ by `difference`. This is the statistic of Tango (1998), which keeps its level even if few or no
    letters are discordant. The share of letters that only A has right is estimated under the null hypothesis.
    `inflation` multiplies the variance.
    """
    A, B = 2 * n, -only_b - only_a + (2 * n - only_b + only_a) * difference
    C = -only_a * difference * (1 - difference)
    q = (np.sqrt(B**2 - 4 * A * C) - B) / (2 * A)
    variance = n * (2 * q + difference * (1 - difference)) * inflation
    return float((only_b - only_a - n * difference) / np.sqrt(variance))


def equivalence(effect: Effect, margin: float) -> float:
    """Return the p-value of an equivalence test.

    The null hypothesis is that the true effect is not within +-margin. The method is two one-sided t tests (Schuirmann
    1987).

    p is below 0.05 if estimate +- t se at level 90 % lies within the margin. A margin that is not above 0 raises
    `ValueError`.
    """
    if not margin > 0:
        raise ValueError(f"expected a margin above 0, found {margin}")
    if effect.se == 0:
        return 0.0 if abs(effect.estimate) < margin else 1.0
    return float(scipy.stats.t.sf((margin - abs(effect.estimate)) / effect.se, effect.df))  # the larger p of the two


def smallest_margin(effect: Effect) -> float:
    """Return the least margin within reach of `equivalence`.

    It is half of the 90 % interval: what would do if the estimate were 0.
    """
    return float(scipy.special.stdtrit(effect.df, 1 - ALPHA) * effect.se)


def smallest_effect(se: float, df: float, power: float = 0.8, alpha: float = ALPHA) -> float:
    """Return the smallest true difference that a test detects.

    A two-sided t test with this standard error finds this difference with this power (Cohen 1988).

    A t variable with noncentrality delta is beyond its quantile, on either side, as often as its square is beyond the
    squared quantile. The square is noncentral F with (1, df) and delta^2, or noncentral chi^2 if df is inf. SciPy's
    noncentral t is not used, because it is NaN in its far tail.
    """
    if not (se >= 0 and df > 0 and 0 < alpha < power < 1):
        raise ValueError(f"expected se >= 0, df > 0, 0 < alpha < power < 1, found {se}, {df}, {alpha}, {power}")
    critical = scipy.stats.t.isf(alpha / 2, df)

    def surplus(delta: float) -> float:
        squares = scipy.stats.ncx2(1, delta**2) if np.isinf(df) else scipy.stats.ncf(1, df, delta**2)
        return squares.sf(critical**2) - power

    # beyond this even an unlucky mean over an unlucky se is significant, each with half the probability of missing
    miss = (1 - power) / 2
    spread = 1.0 if np.isinf(df) else np.sqrt(scipy.stats.chi2.isf(miss, df) / df)
    return float(se * scipy.optimize.brentq(surplus, 0, critical * spread + scipy.stats.norm.isf(miss)))


def _quantile(df: float | np.ndarray) -> float | np.ndarray:
    return scipy.special.stdtrit(df, (1 + LEVEL) / 2)  # as `scipy.stats.t.ppf`, which takes fifty times as long


def _effect(estimate: float, se: float, df: float) -> Effect:
    """Build an effect with the interval estimate +- t se."""
    if se == 0:
        return Effect(*map(float, (estimate, estimate, estimate, se, df, estimate == 0)))
    reach, p = _quantile(df) * se, 2 * scipy.special.stdtr(df, -abs(estimate) / se)
    return Effect(*map(float, (estimate, estimate - reach, estimate + reach, se, df, p)))


def _by_seed(d: ArrayLike) -> np.ndarray:
    """Return d (N,) or (S, N) in float64, with a row a seed."""
    rows = np.atleast_2d(np.asarray(d, np.float64))
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(f"expected finite values, seeds x 2 or more letters, found {_form(np.asarray(d))}")
    return rows


def _two_bools(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != bool or b.dtype != bool or a.shape != b.shape or a.ndim not in (1, 2):
        raise ValueError(f"expected two bool arrays (N,) or (S, N), found {_form(a)} and {_form(b)}")
    return a, b


def _logits(logits: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return logits in float64 and labels, if they fit."""
    logits, y = np.asarray(logits, np.float64), np.asarray(y)
    fits = logits.ndim == 2 and y.shape == logits.shape[:1] and len(y) and np.issubdtype(y.dtype, np.integer)
    if not (fits and np.isfinite(logits).all() and 0 <= y.min() <= y.max() < logits.shape[1]):
        raise ValueError(f"expected finite logits (N, K) and y (N,) below K, found {_form(logits)} and {_form(y)}")
    return logits, y


def _form(array: np.ndarray) -> str:
    finite = array.dtype.kind not in "fc" or np.isfinite(array).all()
    return f"{array.dtype} {array.shape}" + ("" if finite else " with NaN or infinity")
