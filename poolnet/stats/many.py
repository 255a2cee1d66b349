"""Compare more than two arms at once.

The intervals are simultaneous: in 95 % of samples all of them hold the truth. They are those of Hothorn, Bretz &
Westfall (2008), from the multivariate t distribution over one covariance of the arms.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import ArrayLike
from scipy.special import chdtri, ndtri

from poolnet.stats import paired
from poolnet.stats.paired import LEVEL, Effect

POINTS = 2**15  # of a Sobol sequence: the quantile is within 0.1 % of the exact one


@dataclass(frozen=True)
class Contrast:
    """The difference between two arms, b minus a.

    The interval of `effect` is simultaneous with those of all pairs. Its p is that of the pair alone, and `p_holm` is
    adjusted for all pairs.
    """

    a: int
    b: int
    effect: Effect
    p_holm: float


def simultaneous(x: ArrayLike, group: ArrayLike | None = None) -> tuple[Contrast, ...]:
    """Compare each pair of arms with simultaneous intervals.

    x (K, S, N) holds one value for each arm, seed and letter, and group (N,) the group of each letter. Standard errors
    and p-values are those of `clustered` on the pair. The quantile has the least of the pairs' df. With two arms the
    interval is that of `clustered`.
    """
    x = np.asarray(x)
    if x.ndim != 3 or min(len(x), x.shape[2]) < 2 or not np.isfinite(x).all():
        raise ValueError(f"expected finite values (K, S, N) of 2 or more arms, found {x.dtype} {x.shape}")
    x, pairs = x.astype(np.float64), list(combinations(range(len(x)), 2))
    effects = [paired.clustered(x[b] - x[a], group) for a, b in pairs]
    varied = [(pair, effect.df) for pair, effect in zip(pairs, effects, strict=True) if effect.se]
    reach = 0.0
    if varied:
        sums = np.array([paired.cells(arm, group) for arm in x])
        reach = _quantile(_covariance(sums), [pair for pair, _ in varied], min(df for _, df in varied))
    adjusted = paired.holm([effect.p for effect in effects]).tolist()
    wider = [replace(e, low=e.estimate - reach * e.se, high=e.estimate + reach * e.se) for e in effects]
    return tuple(Contrast(a, b, effect, p) for (a, b), effect, p in zip(pairs, wider, adjusted, strict=True))


def not_worse_than_best(contrasts: tuple[Contrast, ...], K: int) -> tuple[int, ...]:
    """Return the arms that are not shown to be worse than the best.

    The best of K arms has the highest mean. An arm is worse if the simultaneous interval of its difference from the
    best excludes 0.
    """
    lead = np.zeros(K)  # over arm 0
    for contrast in contrasts:
        if contrast.a == 0:
            lead[contrast.b] = contrast.effect.estimate
    best = int(lead.argmax())
    worse = {c.a for c in contrasts if c.b == best and c.effect.low > 0}
    worse |= {c.b for c in contrasts if c.a == best and c.effect.high < 0}
    return tuple(arm for arm in range(K) if arm not in worse)


def _covariance(sums: np.ndarray) -> np.ndarray:
    """Return the two-way cluster covariance of K means, up to a factor.

    It is that of Cameron, Gelbach & Miller (2011), as in `clustered`, for the cells (K, S, G) of the arms. Where V_G -
    V_SG has eigenvalues below 0, these become 0.
    """
    by_seed, by_group, both = sums.sum(2), sums.sum(1), sums.reshape(len(sums), -1)
    if sums.shape[1] == 1:
        return by_group @ by_group.T
    values, axes = np.linalg.eigh(by_group @ by_group.T - both @ both.T)
    return by_seed @ by_seed.T + (axes * np.maximum(values, 0)) @ axes.T


def _quantile(covariance: np.ndarray, pairs: list[tuple[int, int]], df: float) -> float:
    """Return the 95 % quantile of the largest |t| of all pairs.

    The arms' normal values come from a Sobol sequence, which is always the same one. The common chi is integrated over
    1,000 of its quantiles.
    """
    values, axes = np.linalg.eigh(covariance)
    uniform = scipy.stats.qmc.Sobol(len(covariance), rng=0).random(POINTS)
    normal = ndtri(uniform) @ (axes * np.sqrt(np.maximum(values, 0))).T
    largest = np.zeros(POINTS)
    for a, b in pairs:
        variance = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
        if variance > 0:
            np.maximum(largest, np.abs(normal[:, b] - normal[:, a]) / np.sqrt(variance), out=largest)
    largest.sort()
    chi = np.sqrt(chdtri(df, (np.arange(1000) + 0.5) / 1000) / df)

    def surplus(q: float) -> float:
        return np.searchsorted(largest, q * chi).mean() / POINTS - LEVEL

    return float(scipy.optimize.brentq(surplus, 0, 1e4))
