"""Numbers that were printed elsewhere: in papers, tables and the examples of other software."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from poolnet.stats import many, paired, scores


def pairs(only_a, only_b, n):
    """Two arms (n,), right together on all letters that neither has alone."""
    right_a, right_b = np.ones((2, n), bool)
    right_b[:only_a] = False
    right_a[only_a : only_a + only_b] = False
    return right_a, right_b


def score_interval(only_a, only_b, n, inflation=1.0, level=0.95):
    """The differences that `tango` does not reject."""
    z, estimate = norm.ppf((1 + level) / 2), (only_b - only_a) / n

    def end(side, bound):
        return brentq(lambda d: paired.tango(only_a, only_b, n, d, inflation) - side * z, *sorted((bound, estimate)))

    return end(1, -0.999), end(-1, 0.999)


def test_fishers_maize():
    """Heights of crossed less self-fertilised maize, in eighths of an inch (Fisher 1935, The Design of Experiments)."""
    d = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert paired.sign_flip(d) == pytest.approx(1726 / 2**15)  # 0.05267, as Fisher counts
    assert paired.over_seeds(d).p == pytest.approx(0.0497, abs=5e-5)  # Student's t of 2.148, which he gives beside it


def test_exact_mcnemar():
    """6 pairs one way and 16 the other: P = 0.0525 (the exact binomial test of R's binom.test(6, 22))."""
    assert paired.paired_test(*pairs(6, 16, 40)).p == pytest.approx(0.0525, abs=5e-5)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_newcombes_wilson(right, n, low, high):
    """Table I of Newcombe (1998), Statistics in Medicine 17, 857-872, method 3."""
    share = scores.wilson(np.arange(n) < right)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "level", "low", "high"),
    [
        (1, 0, 44, 0.90, -0.096, 0.037),  # disinfection of contact lenses: Tango (1998), Statistics in Medicine 17
        (7, 1, 21, 0.95, -0.517, -0.026),  # airways: Fagerland, Lydersen & Laake (2014), Statistics in Medicine 33
    ],
)
def test_tangos_interval(only_a, only_b, n, level, low, high):
    assert score_interval(only_a, only_b, n, level=level) == pytest.approx((low, high), abs=6e-4)


# 51 parathyroid glands of 21 patients: right by PET and SPECT, PET alone, SPECT alone, neither (Obuchowski 1998,
# Statistics in Medicine 17, 1495-1507)
BOTH = np.array([0, 2, 3, 1, 2, 4, 3, 2, 1, 1, 2, 2, 3, 2, 0, 2, 2, 2, 2, 1, 2])
PET = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
SPECT = np.array([2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0])
NEITHER = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0])


def test_yang_sun_and_hardins_interval():
    """-0.0383 to 0.2914, Tango's interval with their variance inflation.

    It has the intracluster correlation of Eliasziw & Donner (1991), pooled over the four outcomes.
    """
    counts = np.array([BOTH, PET, SPECT, NEITHER]).T
    sizes = counts.sum(1)
    K, N, shares = len(sizes), sizes.sum(), counts.sum(0) / sizes.sum()
    between = ((counts - sizes[:, None] * shares) ** 2 / sizes[:, None]).sum() / K
    within = (counts * (sizes[:, None] - counts) / sizes[:, None]).sum() / (N - K)
    n0 = N / K - ((sizes - N / K) ** 2).sum() / ((K - 1) * N)
    pooled = (between - within) / (between + (n0 - 1) * within)
    rho = 1 / (1 + (shares[1] + shares[2]) * (1 - pooled) / pooled)
    inflation = 1 + ((sizes**2).sum() / N - 1) * rho
    ends = score_interval(int(PET.sum()), int(SPECT.sum()), int(N), inflation)
    assert ends == pytest.approx((-0.0383, 0.2914), abs=5e-5)


def test_obuchowskis_test_is_near_its_exact_form():
    """Chi-squared 2.8571, p 0.09097 in R's clust.bin.pair, whose exact form counts the flips of six patients."""
    sums = SPECT - PET
    chi2 = (21 - 1) / 21 * sums.sum() ** 2 / (sums**2).sum()
    assert chi2 == pytest.approx(2.8571, abs=5e-5)
    glands = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    found = np.concatenate([np.repeat(glands, row, axis=0) for row in zip(BOTH, PET, SPECT, NEITHER, strict=True)])
    group = np.repeat(np.arange(21), BOTH + PET + SPECT + NEITHER)
    test = paired.paired_test(found[:, 0], found[:, 1], group)
    # of 2 2 1 1 1 1 the sum is 6 or more if none is flipped, or one of the ones: 5 of 64, and as many the other way
    assert (test.only_a, test.only_b, test.p) == (1, 7, pytest.approx(10 / 64))


def test_rs_p_adjust():
    """p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") in R."""
    np.testing.assert_allclose(paired.holm([0.01, 0.02, 0.03, 0.04, 0.05]), [0.05, 0.08, 0.09, 0.09, 0.09])


def test_rs_power_t_test():
    """power.t.test(n = 20, delta = 1, sd = 1) and (power = .90, delta = 1) in R's help, of two samples."""
    for n, power in ((20, 0.8689528), (22.02110, 0.90)):
        assert paired.smallest_effect((2 / n) ** 0.5, 2 * n - 2, power) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arms", "df", "q"), [(3, 10, 3.877), (4, 20, 3.958), (5, 60, 3.977), (6, 5, 6.033), (10, 30, 4.824)]
)
def test_tukeys_studentized_range(arms, df, q):
    """Tables of the 5 % points (Pearson & Hartley 1966, table 29), for arms of equal and independent variance."""
    pairs_of_arms = [(a, b) for a in range(arms) for b in range(a + 1, arms)]
    found = many._quantile(np.eye(arms), pairs_of_arms, df)
    assert found * 2**0.5 == pytest.approx(q, rel=2e-3)
