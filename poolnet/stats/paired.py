"""Test differences between two arms, over seeds and examples.

The functions say how sure a difference is if both seeds and test examples vary. Arms A and B are trained with the same
S seeds and scored on the same N examples. So the functions judge the paired difference d = B - A: (S,) by seed, (N,) by
example, or (S, N). The S x N cells are not S x N independent observations: the cells of one seed share its training,
and the cells of one example share its difficulty. Intervals have a level of 95 %. P-values are two-sided unless stated
otherwise.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy  # whose parts are loaded when they are used: `scipy.stats` takes a second
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax
from threadpoolctl import threadpool_limits

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # of tests: a p-value below it decides
CELLS = 1_000_000  # numbers drawn at a time, 8 MB: bounds the memory of a bootstrap


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
class McNemar:
    """The result of a McNemar test on two arms."""

    only_a: int  # examples that only this arm has right
    only_b: int
    p: float


@dataclass(frozen=True)
class ClassEffect:
    """The difference between two arms on one class."""

    label: int
    n: int  # examples of the class
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

    d (S,) has one difference per seed. The interval is from Student (1908). Fewer than 2 seeds raise `ValueError`.
    """
    d = _values(d, "seeds")
    return _effect(d.mean(), scipy.stats.sem(d), len(d) - 1) if np.ptp(d) else _effect(d[0], 0.0, len(d) - 1)


def sign_flip(d: ArrayLike, rng: np.random.Generator) -> float:
    """Return the p-value of the sign-flip test over seeds.

    d (S,) has one difference per seed. The null hypothesis is that each sign is as likely as its opposite (Fisher
    1935). The test does not assume a normal distribution.

    Up to S = 16 every flip is tried. For larger S, 2**16 flips are drawn. No p is below 2 / 2**S: with 5 seeds, the
    smallest p is 0.0625.
    """
    d = _values(d, "seeds")
    return float(
        scipy.stats.permutation_test(
            (d,),
            np.mean,
            permutation_type="samples",
            n_resamples=2**16,
            batch=max(1, CELLS // len(d)),
            vectorized=True,
            rng=rng,
        ).pvalue
    )


def mcnemar(right_a: ArrayLike, right_b: ArrayLike) -> McNemar:
    """Test whether two trained models are equally often right.

    This is the exact test (McNemar 1947). Its null hypothesis: among the examples (N,) that one arm has right and the
    other wrong, half belong to each arm. The test is about two trained models, not about training. Without such
    examples p is 1.
    """
    right_a, right_b = np.asarray(right_a), np.asarray(right_b)
    if right_a.dtype != bool or right_b.dtype != bool or right_a.shape != right_b.shape or right_a.ndim != 1:
        raise ValueError(f"expected two bool arrays (N,), found {_form(right_a)} and {_form(right_b)}")
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant = only_a + only_b
    return McNemar(only_a, only_b, float(scipy.stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0)


def over_examples(d: ArrayLike, rng: np.random.Generator, resamples: int = 9999) -> Effect:
    """Return the mean over examples with a bootstrap interval.

    d (N,) holds differences, or the correctness or NLL of one arm. The method is the percentile bootstrap (Efron 1979).
    The interval is about these trained models on other examples.

    `p` is the normal p-value of estimate / se, with the se of the bootstrap. So p agrees with the interval, except for
    skewness, which only the interval takes into account. N < 2 raises `ValueError`.
    """
    d = _values(d, "examples")
    if not np.ptp(d):
        return _effect(d[0], 0.0, np.inf)
    bootstrap = scipy.stats.bootstrap(
        (d,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=resamples,
        batch=max(1, CELLS // len(d)),
        method="percentile",
        vectorized=True,
        rng=rng,
    )
    low, high = map(float, bootstrap.confidence_interval)
    return replace(_effect(d.mean(), bootstrap.standard_error, np.inf), low=low, high=high)


@threadpool_limits.wrap(limits=1, user_api="blas")  # whose digits depend on their number
def two_way(d: ArrayLike, rng: np.random.Generator, resamples: int = 2000) -> Effect:
    """Return the mean over seeds and examples with its interval.

    d is (S, N). The interval is about other seeds and other examples. It uses the pigeonhole bootstrap of Owen (2007),
    which resamples seeds and examples independently. S - 1 of S seeds and N - 1 of N examples are drawn. This keeps the
    variance between few seeds unbiased (Rao & Wu 1988).

    Variation of single cells, beyond that of seeds and examples, is counted up to three times (Owen 2007). If there is
    no other variation, the interval is too wide rather than too narrow.

    Percentiles from so few seeds are too narrow. Therefore the interval is estimate +- t se, with the df of
    `_two_way_df`. S < 2 or N < 2 raises `ValueError`.
    """
    d = _values(d, "seeds", "examples")
    S, N = d.shape
    if resamples < 2:
        raise ValueError(f"expected 2 or more resamples, found {resamples}")
    if not np.ptp(d):
        return _effect(d[0, 0], 0.0, S - 1)
    means, size = [], max(1, CELLS // max(S, N))
    for start in range(0, resamples, size):
        k = min(size, resamples - start)
        seeds, examples = _draw(S, k, rng), _draw(N, k, rng)
        means.append((seeds * (examples @ d.T)).sum(1))
    return _effect(d.mean(), np.concatenate(means).std(ddof=1), _two_way_df(d))


def _draw(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n - 1 of n, k times: shares (k, n)."""
    drawn = rng.integers(n, size=(k, n - 1))
    drawn += n * np.arange(k)[:, None]
    return np.bincount(drawn.ravel(), minlength=k * n).reshape(k, n) / (n - 1)


def _two_way_df(d: np.ndarray) -> float:
    """Return the degrees of freedom for the two-way t interval.

    With this df, the t quantile gives the half-width of Banerjee (1960): t_S^2 v_S + t_N^2 v_N = t^2 (v_S + v_N). v_S
    and v_N are the squared standard errors of the seed means and of the example means. t_S and t_N are the quantiles
    for S - 1 and N - 1 df. The level then holds for all values of v_S and v_N.

    Satterthwaite's (1946) df do not reach the level with 2 to 4 seeds: the coverage is 0.86 to 0.95 with 2 seeds, and
    0.92 to 0.95 with 3. S - 1 df are safe too. But with 3 seeds, their interval is twice as wide as necessary if only
    the examples vary.
    """
    S, N = d.shape
    variances = np.array([d.mean(1).var(ddof=1) / S, d.mean(0).var(ddof=1) / N])
    if not variances.any():
        return S - 1
    quantiles = _quantile(np.array([S - 1, N - 1]))
    target = np.sqrt(np.average(quantiles**2, weights=variances))
    low, high = sorted((S - 1, N - 1))
    return scipy.optimize.brentq(lambda df: _quantile(df) - target, 0.9 * low, 1.1 * high)


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


def per_class(
    d: ArrayLike, y: ArrayLike, rng: np.random.Generator, classes: int = 10, resamples: int = 2000
) -> tuple[ClassEffect, ...]:
    """Return the mean difference between the arms for each class.

    It is the mean of d (S, N) over the examples of each class of y (N,). The method is `two_way`, or `over_examples` if
    S is 1.

    A class with fewer than 2 examples has no interval. All values of its effect are NaN, and Holm's method does not
    count it.
    """
    d, y = np.asarray(d), np.asarray(y)
    if d.ndim != 2 or y.shape != d.shape[1:] or not np.isin(y, np.arange(classes)).all():
        raise ValueError(f"expected d (S, N) and y (N,) below {classes}, found {_form(d)} and {_form(y)}")
    parts, effects = [d[:, y == label] for label in range(classes)], []
    for part in parts:
        if part.shape[1] < 2:
            effects.append(Effect(*[np.nan] * 6))
        else:
            effects.append(two_way(part, rng, resamples) if len(d) > 1 else over_examples(part[0], rng, resamples))
    adjusted = holm([effect.p for effect in effects]).tolist()
    return tuple(map(ClassEffect, range(classes), [part.shape[1] for part in parts], effects, adjusted))


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


def ece_if_calibrated(logits: ArrayLike, rng: np.random.Generator, bins: int = 15, draws: int = 2000) -> float:
    """Return the highest ECE to expect from a calibrated model.

    It is the 95 % quantile of the ECE of logits (N, K), if their top probabilities are the true chances of being right.
    Even then the ECE is above 0 (Broecker & Smith 2007). So only an ECE above this value is a finding.

    The number of right answers in a bin is drawn from a normal distribution. Its variance is that of a sum of Bernoulli
    variables.
    """
    top, index = _binned(np.asarray(logits, np.float64), bins)
    sd = np.sqrt(np.bincount(index, top * (1 - top), bins))
    return float(np.quantile(np.abs(rng.standard_normal((draws, bins))) @ sd / len(top), LEVEL))


def _binned(logits: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the top probability of each example and its bin."""
    top = softmax(logits, axis=1).max(1)
    return top, np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], top, side="left")


def non_inferiority(test: McNemar, n: int, margin: float) -> float:
    """Return the p-value of a non-inferiority test.

    The test is one-sided, on n paired examples. Its null hypothesis is that arm B is worse than arm A by `margin` or
    more. `margin` is a share, not points. This is the score test of Tango (1998), which keeps its level even if few or
    no examples are discordant.

    The share of examples that only A has right is estimated under p_B - p_A = -margin.
    """
    if not 0 < margin < 1:
        raise ValueError(f"expected a margin between 0 and 1, found {margin}")
    b, c, lam = test.only_b, test.only_a, -margin
    A, B, C = 2 * n, -b - c + (2 * n - b + c) * lam, -c * lam * (1 - lam)
    q = (np.sqrt(B**2 - 4 * A * C) - B) / (2 * A)
    return float(scipy.stats.norm.sf((b - c - n * lam) / np.sqrt(n * (2 * q + lam * (1 - lam)))))


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


def _values(d: ArrayLike, *axes: str) -> np.ndarray:
    """Return d in float64; refuse a wrong shape with `ValueError`."""
    d = np.asarray(d, np.float64)
    if d.ndim != len(axes) or min(d.shape) < 2 or not np.isfinite(d).all():
        raise ValueError(f"expected finite values, 2 or more {' x '.join(axes)}, found {_form(d)}")
    return d


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
