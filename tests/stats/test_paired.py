"""Statistics against arithmetic done by hand, against other libraries, and against worlds whose truth is known."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from poolnet.stats.paired import (
    Effect,
    calibration,
    clustered,
    design_effect,
    equivalence,
    holm,
    over_seeds,
    paired_test,
    parts,
    per_class,
    per_example,
    sign_flip,
    smallest_effect,
    smallest_margin,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def statsmodels():
    """The functions of `statsmodels.stats`, where it is installed."""
    return pytest.importorskip("statsmodels.stats.api")


def numbers(effect):
    return np.array(dataclasses.astuple(effect))


def differences(S=5, N=300, mean=0.0, by_seed=0.3, by_example=1.0, seed=1):
    """Normal differences, (S, N), with a part of each seed, of each example, and of each cell."""
    draw = rng(seed).standard_normal
    return mean + by_seed * draw((S, 1)) + by_example * draw((1, N)) + draw((S, N))


def test_over_seeds_by_hand():
    # mean 3; squared deviations 4 + 1 + 0 + 1 + 4 = 10; variance 10 / 4; se sqrt(2.5 / 5); t of 4 df is 2.776445
    effect = over_seeds([1, 2, 3, 4, 5])
    se = 0.5**0.5
    assert (effect.estimate, effect.df) == (3, 4)
    assert effect.se == pytest.approx(se)
    assert (effect.low, effect.high) == pytest.approx((3 - 2.776445 * se, 3 + 2.776445 * se), abs=1e-6)


@pytest.mark.parametrize("S", [2, 5, 30])
def test_over_seeds_is_scipys_paired_t_test(S):
    a, b = rng(S).normal(0.9, 0.01, (2, S))
    theirs, one_sample = scipy_stats.ttest_rel(b, a), scipy_stats.ttest_1samp(b - a, 0)
    ours = over_seeds(b - a)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high, ours.p, ours.df) == pytest.approx((*interval, theirs.pvalue, S - 1))
    assert (ours.estimate, ours.p) == pytest.approx((np.mean(b - a), one_sample.pvalue))


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.1, 0.0)])
def test_without_variance_an_interval_has_no_width(value, p):
    alike = np.full((3, 7), value)
    for effect in (over_seeds(alike[0]), clustered(alike[0]), clustered(alike, [0, 0, 0, 1, 1, 2, 2])):
        assert (effect.estimate, effect.low, effect.high, effect.se, effect.p) == (value, value, value, 0, p)


def test_sign_flip_by_hand():
    # of the 8 sums of +-1 +-2 +-4 only 7 and -7 are as far from 0 as 7; 5 and 7, and their negatives, as far as 5
    assert sign_flip([1, 2, 4]) == 2 / 8
    assert sign_flip([-1, 2, 4]) == 4 / 8
    assert sign_flip([0, 0, 0, 0]) == 1


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=10))
def test_sign_flip_counts_every_flip(sums):
    flips = np.array(list(itertools.product([-1, 1], repeat=len(sums)))) @ np.array(sums)
    assert sign_flip(sums) == pytest.approx((abs(flips) >= abs(sum(sums))).mean())
    assert sign_flip(sums) == sign_flip([-x for x in sums])


@pytest.mark.parametrize("S", [2, 5, 10, 40])
def test_the_smallest_p_of_sign_flips(S):
    assert sign_flip(np.arange(1, S + 1)) == pytest.approx(2 / 2**S)


def test_paired_test_by_hand():
    right_a = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    right_b = np.array([1, 0, 0, 0, 0, 1, 1, 0], bool)
    # 4 for A, 1 for B: at most 1 of 5 tosses one way, (1 + 5) / 32, or the other way
    assert dataclasses.astuple(paired_test(right_a, right_b)) == (4, 1, pytest.approx(12 / 32))
    # in two families the sums are -2 and -1, of which no flip is farther from 0, and -3 and 3 are as far
    assert dataclasses.astuple(paired_test(right_a, right_b, [5, 5, 5, 9, 9, 9, 9, 9])) == (4, 1, pytest.approx(0.5))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_test_of_independent_letters_is_exact_mcnemar(statsmodels, pairs):
    a, b = np.array(pairs).T
    ours, swapped = paired_test(a, b), paired_test(b, a)
    assert (ours.only_a, ours.only_b, ours.p) == (swapped.only_b, swapped.only_a, pytest.approx(swapped.p))
    if ours.only_a + ours.only_b == 0:
        assert ours.p == 1
    else:
        table = [[(a & b).sum(), ours.only_a], [ours.only_b, (~a & ~b).sum()]]
        assert ours.p == pytest.approx(statsmodels.mcnemar(table, exact=True).pvalue)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 8))
def test_paired_test_flips_all_seeds_and_letters_of_a_family_together(seed, S, G):
    draw = rng(seed)
    group = draw.integers(G, size=20)
    a, b = draw.random((2, S, 20)) < 0.7
    sums = [(b.astype(int) - a)[:, group == g].sum() for g in range(G)]
    flips = np.array(list(itertools.product([-1, 1], repeat=G))) @ sums
    assert paired_test(a, b, group).p == pytest.approx((abs(flips) >= abs(sum(sums))).mean())


@pytest.mark.parametrize("N", [2, 50])
def test_letters_of_one_seed_that_are_no_families_have_students_interval(N):
    d = rng(N).standard_exponential(N)
    theirs = scipy_stats.ttest_1samp(d, 0)
    ours = clustered(d)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high, ours.p, ours.df) == pytest.approx((*interval, theirs.pvalue, N - 1))


def test_families_of_one_size_have_students_interval_of_their_means():
    d, group = rng(7).normal(0.1, 1, 60), np.repeat(np.arange(12), 5)
    ours, theirs = clustered(d, rng(1).permutation(12)[group]), over_seeds(d.reshape(12, 5).mean(1))
    np.testing.assert_allclose(numbers(ours), numbers(theirs))


@pytest.mark.parametrize(("S", "N", "G"), [(2, 40, 9), (3, 200, 200), (10, 500, 20), (30, 60, 6)])
def test_clustered_is_statsmodels_two_way_cluster_variance(statsmodels, S, N, G):
    from statsmodels.api import OLS
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    group = rng(S).permutation(np.arange(N) % G)
    d = differences(S, N) + rng(S + 1).standard_normal(G)[group]
    seeds, families = np.repeat(np.arange(S), N), np.tile(group, S)
    theirs = cov_cluster_2groups(OLS(d.ravel(), np.ones(S * N)).fit(), seeds, families, use_correction=False)[0]
    few = min(S, G)
    assert clustered(d, group).se ** 2 == pytest.approx(theirs.item() * few / (few - 1), rel=1e-8)


def test_clustered_by_hand():
    # the sums of deviations are -3 and 3 by seed: 18 / 6^2, and 2 / 1 times that; letters do not differ; t of 1 df
    ours = clustered([[1, 1, 1], [3, 3, 3]])
    assert dataclasses.astuple(parts([[1, 1, 1], [3, 3, 3]])) == (pytest.approx(1), 0, 2, 3, 3)
    assert (ours.estimate, ours.se, ours.df) == (2, pytest.approx(1), 1)
    assert ours.high - ours.estimate == pytest.approx(12.7062, rel=1e-5)
    # both seeds agree: by letter the sums are -2, 0 and 2, 8 / 6^2, less those of cells, 4 / 6^2, and 2 / 1 times that
    assert dataclasses.astuple(parts([[1, 2, 3], [1, 2, 3]])) == (0, pytest.approx(8 / 36), 2, 3, 3)


def test_seeds_and_letters_that_cancel_leave_the_variance_of_cells():
    ours = clustered([[1, 0], [0, 1]])  # whose sums are equal by seed and by letter; 4 cells of 1/2 off, twice 1 / 4^2
    assert (ours.estimate, ours.se) == (0.5, pytest.approx(8**-0.5))


def test_clustered_has_the_half_width_of_both_sources():
    d, group = differences(4, 200), np.arange(200) // 5
    variances, effect = parts(d, group), clustered(d, group)
    t_seeds, t_groups = scipy_stats.t.ppf(0.975, [3, 39])
    half_width = np.sqrt(t_seeds**2 * variances.seeds + t_groups**2 * variances.groups)
    assert effect.high - effect.estimate == pytest.approx(half_width)
    assert clustered(differences(4, 200, by_seed=1000)).df == pytest.approx(3, abs=0.01)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_numbers_and_the_order_of_groups_say_nothing(seed, S):
    draw = rng(seed)
    d, group = draw.normal(size=(S, 30)), draw.integers(7, size=30)
    order, other = draw.permutation(30), draw.choice(10**6, 7, replace=False)
    np.testing.assert_allclose(numbers(clustered(d, group)), numbers(clustered(d[:, order], other[group][order])))
    np.testing.assert_allclose(numbers(clustered(d)), numbers(clustered(d, draw.permutation(30))))


@pytest.mark.parametrize("S", [1, 3])
def test_families_are_no_independent_letters(S):
    """Of 40 families of 10, equal in truth, the interval by family holds 0 as often as it should."""
    draw, group, held = rng(11), np.repeat(np.arange(40), 10), np.zeros(2)
    for _ in range(400):
        d = draw.standard_normal((S, 400)) + draw.standard_normal(40)[group] + 0.1 * draw.standard_normal((S, 1))
        held += [effect.low <= 0 <= effect.high for effect in (clustered(d, group), clustered(d))]
    assert 0.92 <= held[0] / 400 <= 0.99
    assert held[1] / 400 < 0.85


def test_design_effect_by_hand():
    # deviations of 1/2, by pair 1 and -1: (1 + 1) / (4 / 4), times the squares of 2 / 1 of pairs and 3 / 4 of letters
    assert design_effect([1, 1, 0, 0], [0, 0, 1, 1]) == pytest.approx(2 * (2 * 3 / 4) ** 2)
    assert design_effect([1, 0, 1, 0], [0, 0, 1, 1]) == 1  # pairs differ by less than chance: no letter is worth more
    assert design_effect([1, 1, 0, 0], None) == 1
    assert design_effect([1] * 5, [0, 0, 0, 1, 2]) == pytest.approx((9 + 1 + 1) / 5)  # as if a group were one letter
    copies = rng(1).random(500) < 0.8
    assert design_effect(np.repeat(copies, 4), np.repeat(np.arange(500), 4)) == pytest.approx(4, rel=0.01)


def test_holm_by_hand():
    # in order 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06 not below the one before, 0.04 x 1 raised to it
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, np.nan, 0.01]), [0.5, np.nan, 0.02])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("K", [1, 2, 5, 10, 40])
def test_holm_is_that_of_statsmodels(statsmodels, K):
    p = rng(K).integers(0, 30, K) / 300  # some of them equal
    theirs = statsmodels.multipletests(p, method="holm")[1]
    np.testing.assert_allclose(holm(p), theirs, atol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_never_lowers(p, random):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert adjusted.max() <= 1
    places = random.sample(range(len(p)), len(p))
    np.testing.assert_array_equal(holm(np.array(p)[places]), adjusted[places])


def test_each_class_is_compared_by_itself():
    y = np.repeat([0, 1, 3, 4], [100, 200, 50, 1])
    group = np.arange(len(y)) % 60
    d = differences(4, len(y), by_seed=0.05, by_example=0.2) * 0.1 + np.where(y == 1, 0.5, 0)
    effects = per_class(d, y, group, classes=5)
    assert [(effect.label, effect.n) for effect in effects] == [(0, 100), (1, 200), (2, 0), (3, 50), (4, 1)]
    for label in (0, 1, 3):
        assert effects[label].effect == clustered(d[:, y == label], group[y == label])
    assert np.isnan(numbers(effects[2].effect)).all()
    assert np.isnan([effects[2].p_holm, effects[4].p_holm]).all()
    measured = [effects[label] for label in (0, 1, 3)]
    np.testing.assert_array_equal([x.p_holm for x in measured], holm([x.effect.p for x in measured]))
    assert effects[1].p_holm < 1e-3 < effects[0].p_holm


def test_calibration_by_hand():
    # top probabilities 0.5, 0.5, 0.75 and 1 - 1e-9, in 4 bins closed on the right: 2 in (0.25, 0.5], 1 in (0.5, 0.75]
    p = np.array([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [1e-9, 1 - 1e-9]])
    result = calibration(np.log(p), [0, 1, 1, 0], bins=4)
    np.testing.assert_array_equal(result.counts, [0, 2, 1, 1])
    np.testing.assert_allclose(result.confidence, [np.nan, 0.5, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(result.accuracy, [np.nan, 0.5, 1, 0])
    assert result.ece == pytest.approx((2 * 0 + 1 * 0.25 + 1 * 1) / 4, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.01, 30))
def test_calibration_is_that_of_scikit_learns_curve(sklearn, seed, bins, scale):
    logits, y = rng(seed).normal(0, scale, (200, 10)), rng(seed + 1).integers(10, size=200)
    result = calibration(logits, y, bins)
    p = np.exp(logits - logits.max(1, keepdims=True))
    top, right = (p / p.sum(1, keepdims=True)).max(1), logits.argmax(1) == y
    accuracy, confidence = sklearn.calibration.calibration_curve(right, top, n_bins=bins, pos_label=True)
    filled = result.counts > 0
    np.testing.assert_allclose(result.accuracy[filled], accuracy)
    np.testing.assert_allclose(result.confidence[filled], confidence)
    assert result.ece == pytest.approx((result.counts[filled] * abs(accuracy - confidence)).sum() / 200, abs=1e-12)
    assert 0 <= result.ece <= 1


def test_large_logits_overflow_nothing():
    logits = np.array([[1e4, 0], [0, 1e4], [-1e4, 1e4]], np.float32)
    right, nll = per_example(logits, [0, 0, 0])
    np.testing.assert_array_equal(right, [True, False, False])
    np.testing.assert_array_equal(nll, [0, 1e4, 2e4])
    assert calibration(logits, [0, 0, 0]).ece == pytest.approx(2 / 3)


def test_per_example_sums_to_accuracy_and_log_loss(sklearn):
    logits, y = rng().normal(0, 3, (500, 10)).astype(np.float32), rng(1).integers(10, size=500)
    right, nll = per_example(logits, y)
    p = np.exp(logits.astype(np.float64))
    assert right.dtype == bool
    assert nll.dtype == np.float64
    assert nll.mean() == pytest.approx(sklearn.metrics.log_loss(y, p / p.sum(1, keepdims=True), labels=range(10)))
    assert right.mean() == (logits.argmax(1) == y).mean()


def test_per_example_by_hand():
    right, nll = per_example(np.log([[1, 3], [2, 2]]), [0, 0])
    np.testing.assert_array_equal(right, [False, True])  # the first of equal logits
    np.testing.assert_allclose(nll, np.log([4, 2]))


def test_equivalence_is_that_of_statsmodels(statsmodels):
    a, b = rng(5).normal(0.9, 0.02, (2, 8))
    for margin in (0.005, 0.02, 0.05):
        theirs = statsmodels.ttost_paired(b, a, -margin, margin)[0]
        assert equivalence(over_seeds(b - a), margin) == pytest.approx(theirs)


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    d = rng(6).normal(0.3, 1, 12)
    interval = scipy_stats.ttest_1samp(d, 0).confidence_interval(0.9)
    reach = max(-interval.low, interval.high)
    assert equivalence(over_seeds(d), reach) == pytest.approx(0.05)
    assert smallest_margin(over_seeds(d)) == pytest.approx((interval.high - interval.low) / 2)
    assert equivalence(over_seeds(d), reach * 1.01) < 0.05 < equivalence(over_seeds(d), reach * 0.99)


def test_equivalence_without_variance():
    effect = over_seeds([0.25, 0.25, 0.25])
    assert [equivalence(effect, margin) for margin in (0.2, 0.25, 0.3)] == [1, 1, 0]


def test_smallest_effect_is_that_of_statsmodels(statsmodels):
    for S in (4, 10, 50):
        theirs = statsmodels.TTestPower().solve_power(nobs=S, alpha=0.05, power=0.8)  # in standard deviations
        assert smallest_effect(1 / S**0.5, S - 1) == pytest.approx(theirs, rel=1e-5)


def test_smallest_effect_by_hand():
    # for the normal, 1.959964 + 0.841621, the quantiles of 97.5 % and 80 %
    assert smallest_effect(0.5, np.inf) == pytest.approx(0.5 * 2.801585, abs=1e-5)
    assert smallest_effect(1, 1e6) == pytest.approx(2.801585, abs=1e-4)
    assert smallest_effect(0, 3) == 0
    assert smallest_effect(2, 3) == pytest.approx(2 * smallest_effect(1, 3))


@pytest.mark.parametrize(("df", "power"), [(1, 0.8), (2, 0.99), (9, 0.06), (300, 0.9)])
def test_the_smallest_effect_is_found_with_its_power(df, power):
    draw, delta = rng(df), smallest_effect(1, df, power)
    t = (delta + draw.standard_normal(100_000)) / np.sqrt(draw.chisquare(df, 100_000) / df)
    assert (abs(t) > scipy_stats.t.isf(0.025, df)).mean() == pytest.approx(power, abs=0.006)


INTERVALS = {
    "over_seeds": lambda d: over_seeds(d.mean(1)),
    "one seed": lambda d: clustered(d.mean(0), np.arange(d.shape[1]) // 3),
    "clustered": lambda d: clustered(d, np.arange(d.shape[1]) // 3),
}


each_interval = pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)


@each_interval
def test_swapped_arms_swap_signs(interval):
    d = differences(mean=0.1)
    ours, swapped = interval(d), interval(-d)
    mirrored = dataclasses.replace(ours, estimate=-ours.estimate, low=-ours.high, high=-ours.low)
    np.testing.assert_allclose(numbers(mirrored), numbers(swapped), rtol=1e-9)


@each_interval
def test_units_do_not_matter(interval):
    d = differences(mean=0.1)
    ours, scaled = interval(d), interval(1000 * d)
    np.testing.assert_allclose(numbers(scaled)[:4], 1000 * numbers(ours)[:4])
    np.testing.assert_allclose(numbers(scaled)[4:], numbers(ours)[4:])


@each_interval
def test_a_planted_difference_is_found(interval):
    effect = interval(differences(S=6, N=1000, mean=0.5, by_seed=0.1))
    assert effect.p < 0.01
    assert effect.low < 0.5 < effect.high
    assert effect.low > 0


@each_interval
def test_p_is_below_5_percent_where_the_interval_excludes_0(interval):
    d = differences(S=6, N=2000)
    ours = interval(d)
    edge = ours.low if ours.estimate > 0 else ours.high
    assert interval(d - edge).p == pytest.approx(0.05)


def test_memory_is_that_of_a_few_rows():
    d, group = np.zeros((20, 50_000)), np.arange(50_000) // 10
    d[:, ::7] = 1
    tracemalloc.start()
    clustered(d, group)
    per_class(d, np.arange(50_000) % 10, group)
    paired_test(d > 0, d > 1, group)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6  # d itself has 8 MB


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: over_seeds([1.0]), "2 or more seeds, found float64 (1,)"),
        (lambda: over_seeds(np.ones((2, 3))), "2 or more seeds, found float64 (2, 3)"),
        (lambda: over_seeds([1, np.nan]), "found float64 (2,) with NaN or infinity"),
        (lambda: sign_flip([1.0]), "integer sums (G,), found float64 (1,)"),
        (lambda: sign_flip([[1, 2]]), "integer sums (G,), found int64 (1, 2)"),
        (lambda: clustered([]), "2 or more letters, found float64 (0,)"),
        (lambda: clustered(np.ones((2, 3, 4))), "2 or more letters, found float64 (2, 3, 4)"),
        (lambda: clustered([1, np.inf]), "found float64 (2,) with NaN or infinity"),
        (lambda: clustered([1, 2], [3, 3]), "2 or more groups, found 1"),
        (lambda: clustered([1, 2], [0, 1, 2]), "integer groups (2,), found int64 (3,)"),
        (lambda: clustered([1, 2], [0.0, 1.0]), "integer groups (2,), found float64 (2,)"),
        (lambda: paired_test([0, 1], [1, 1]), "two bool arrays (N,) or (S, N), found int64 (2,) and int64 (2,)"),
        (lambda: paired_test([True], [True, False]), "found bool (1,) and bool (2,)"),
        (lambda: holm([0.1, 1.1]), "between 0 and 1"),
        (lambda: per_class(np.ones((2, 3)), [0, 1, 10]), "y (N,) below 10"),
        (lambda: per_class(np.ones((2, 3)), [0, 1]), "y (N,) below 10, found float64 (2, 3) and int64 (2,)"),
        (lambda: per_example(np.ones((2, 3)), [0, 3]), "y (N,) below K"),
        (lambda: per_example(np.ones((2, 3)), [0.0, 1.0]), "found float64 (2, 3) and float64 (2,)"),
        (lambda: calibration([[np.nan, 0]], [0]), "finite logits"),
        (lambda: calibration(np.ones((0, 3)), []), "found float64 (0, 3)"),
        (lambda: calibration(np.ones((2, 3)), [0, 1], bins=0), "1 or more bins, found 0"),
        (lambda: equivalence(over_seeds([1, 2]), 0), "a margin above 0, found 0"),
        (lambda: equivalence(over_seeds([1, 2]), np.nan), "a margin above 0, found nan"),
        (lambda: smallest_effect(-1, 3), "se >= 0"),
        (lambda: smallest_effect(1, 3, power=0.01), "alpha < power < 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_effect_without_numbers_has_no_equivalence():
    assert np.isnan(equivalence(Effect(*[np.nan] * 6), 0.1))
