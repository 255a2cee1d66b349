"""Statistics against arithmetic done by hand, against other libraries, and against worlds whose truth is known."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from poolnet.stats import paired
from poolnet.stats.paired import (
    Effect,
    calibration,
    clustered,
    equivalence,
    holm,
    mcnemar,
    over_examples,
    over_seeds,
    per_class,
    per_example,
    sign_flip,
    smallest_effect,
    two_way,
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
    for effect in (
        over_seeds(np.full(7, value)),
        over_examples(np.full(7, value), rng()),
        two_way(np.full((3, 7), value), rng()),
    ):
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


def test_mcnemar_by_hand():
    right_a = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    right_b = np.array([1, 0, 0, 0, 0, 1, 1, 0], bool)
    # 4 for A, 1 for B: at most 1 of 5 tosses one way, (1 + 5) / 32, or the other way
    assert dataclasses.astuple(mcnemar(right_a, right_b)) == (4, 1, pytest.approx(12 / 32))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_that_of_statsmodels_and_does_not_know_which_arm_is_which(statsmodels, pairs):
    a, b = np.array(pairs).T
    ours, swapped = mcnemar(a, b), mcnemar(b, a)
    assert (ours.only_a, ours.only_b, ours.p) == (swapped.only_b, swapped.only_a, pytest.approx(swapped.p))
    if ours.only_a + ours.only_b == 0:
        assert ours.p == 1
    else:
        table = [[(a & b).sum(), ours.only_a], [ours.only_b, (~a & ~b).sum()]]
        assert ours.p == pytest.approx(statsmodels.mcnemar(table, exact=True).pvalue)


def test_over_examples_is_near_the_normal_interval_where_examples_are_many():
    d = rng(1).standard_exponential(2000)
    ours, se = over_examples(d, rng()), d.std() / 2000**0.5
    assert ours.estimate == pytest.approx(d.mean())
    assert ours.se == pytest.approx(se, rel=0.03)
    assert (ours.low, ours.high) == pytest.approx((d.mean() - 1.96 * se, d.mean() + 1.96 * se), abs=0.15 * se)
    assert ours.df == np.inf


def test_over_examples_by_hand():
    # of two examples a resample has 0, 1 or 2 of the second: means 0, 1/2, 1 with odds 1, 2, 1, so that the variance is
    # 1/8, and both outer ones are more frequent than 2.5 %
    ours = over_examples([0, 1], rng())
    assert (ours.estimate, ours.low, ours.high) == (0.5, 0, 1)
    assert ours.se == pytest.approx(8**-0.5, rel=0.03)
    assert ours.p == pytest.approx(scipy_stats.norm.sf(2**0.5) * 2, abs=0.02)


def two_way_reference(d):
    """Standard error of the two-way bootstrap of infinitely many resamples: by seed, by example, by cell."""
    S, N = d.shape
    by_seed, by_example = d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    rest = ((d - by_seed - by_example + d.mean()) ** 2).sum() / ((S - 1) * (N - 1))
    return np.sqrt(by_seed.var(ddof=1) / S + by_example.var(ddof=1) / N + rest / (S * N))


@pytest.mark.parametrize(("S", "N"), [(2, 2), (3, 40), (10, 500), (50, 7)])
def test_two_way_resamples_seeds_and_examples(S, N):
    d = differences(S, N)
    assert two_way(d, rng(), 20_000).se == pytest.approx(two_way_reference(d), rel=0.02)


def test_two_way_by_hand():
    # seed means 1 and 3, of variance 2, hence 1 for their mean; examples do not differ, so 1 df, of which t is 12.7062
    ours = two_way([[1, 1, 1], [3, 3, 3]], rng(), 20_000)
    assert ours.estimate == 2
    # one seed of two is drawn, each as often: 1 or 3, standard deviation 1
    assert ours.se == pytest.approx(1, rel=1e-3)
    assert ours.df == pytest.approx(1)
    assert ours.high - ours.estimate == pytest.approx(12.7062 * ours.se, rel=1e-5)


def test_two_way_has_the_df_of_what_varies():
    seeds_only, examples_only = differences(4, 200, by_seed=1000), differences(4, 200, by_example=1000)
    assert two_way(seeds_only, rng()).df == pytest.approx(3, abs=0.01)
    assert two_way(examples_only, rng()).df == pytest.approx(199, rel=0.05)
    equal = np.array([[0, 1.0], [1, 2]])  # both means vary by as much
    d = np.kron(equal, np.ones((1, 2)))  # S = 2, N = 4: v = 1/2 / 2, 1/3 / 4
    t_seeds, t_examples = scipy_stats.t.ppf(0.975, [1, 3])
    half_width = np.sqrt(t_seeds**2 / 4 + t_examples**2 / 12)
    assert scipy_stats.t.ppf(0.975, two_way(d, rng()).df) * np.sqrt(1 / 4 + 1 / 12) == pytest.approx(half_width)


def test_two_way_is_no_interval_of_independent_cells():
    d = differences(3, 1000, by_seed=1)
    cells = scipy_stats.sem(d.ravel())
    assert two_way(d, rng()).se > 5 * cells


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
    "over_examples": lambda d: over_examples(d.mean(0), rng()),
    "two_way": lambda d: two_way(d, rng()),
}


each_interval = pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)


@each_interval
def test_swapped_arms_swap_signs(interval):
    d = differences(mean=0.1)
    ours, swapped = interval(d), interval(-d)
    mirrored = dataclasses.replace(ours, estimate=-ours.estimate, low=-ours.high, high=-ours.low)
    np.testing.assert_allclose(numbers(mirrored), numbers(swapped), rtol=1e-9)  # the same draws


@each_interval
def test_the_same_generator_gives_the_same_numbers(interval):
    d = differences()
    assert interval(d) == interval(d.copy())


@each_interval
def test_the_order_of_seeds_and_examples_says_nothing(interval):
    d = differences(mean=0.1)
    ours, shuffled = interval(d), interval(rng(2).permutation(rng(3).permutation(d, axis=0), axis=1))
    assert shuffled.estimate == pytest.approx(ours.estimate)
    np.testing.assert_allclose(numbers(shuffled)[1:4], numbers(ours)[1:4], atol=0.1 * ours.se)
    assert shuffled.p == pytest.approx(ours.p, abs=0.03)


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
    assert interval(d - edge).p == pytest.approx(0.05, abs=0.01)


def test_the_statistics_leave_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    d = differences(20, 50)
    over_examples(d[0], rng())
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_memory_does_not_grow_with_the_number_of_resamples(monkeypatch):
    monkeypatch.setattr(paired, "CELLS", 100_000)
    d = differences(4, 20_000)
    tracemalloc.start()
    over_examples(d[0], rng(), 400)
    two_way(d, rng(), 400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # all at once would be 64 MB


def truth_is_covered(interval, simulate, simulations=400):
    """Share of simulated experiments, of true difference 0, whose interval holds it."""
    draw = rng(11)
    effects = [interval(simulate(draw), draw) for _ in range(simulations)]
    return np.mean([effect.low <= 0 <= effect.high for effect in effects])


def letters_right(draw, S, N, by_seed, by_example):
    """Differences of correctness, -1, 0 or 1, of two arms that are equal in truth."""
    latent = 1 + draw.standard_normal(N) + by_seed * draw.standard_normal((2, S, 1))
    latent = latent + by_example * draw.standard_normal((2, 1, N)) + 0.5 * draw.standard_normal((2, S, N))
    right = latent > 0
    return right[1].astype(float) - right[0]


def losses(draw, S, N, by_seed, by_example):
    """Differences of losses with a heavy tail on the right, of two arms that are equal in truth."""
    latent = draw.standard_normal(N) + by_seed * draw.standard_normal((2, S, 1))
    nll = np.exp(latent + by_example * draw.standard_normal((2, 1, N)) + 0.5 * draw.standard_normal((2, S, N)))
    return nll[1] - nll[0]


@pytest.mark.parametrize("world", [letters_right, losses])
@pytest.mark.parametrize(("S", "N"), [(3, 200), (10, 300)])
@pytest.mark.parametrize(("by_seed", "by_example"), [(1, 0), (0.02, 1), (0.2, 1), (0, 0)])
def test_two_way_covers_whatever_varies(world, S, N, by_seed, by_example):
    def simulate(draw):
        return world(draw, S, N, by_seed, by_example)

    assert truth_is_covered(lambda d, draw: two_way(d, draw, 200), simulate) >= 0.925


def test_over_seeds_covers():
    assert 0.93 <= truth_is_covered(lambda d, draw: over_seeds(d), lambda draw: draw.normal(0, 1, 5), 2000) <= 0.97


def test_over_examples_covers():
    def simulate(draw):
        return losses(draw, 1, 500, 0, 1)[0]

    assert 0.92 <= truth_is_covered(lambda d, draw: over_examples(d, draw, 500), simulate) <= 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: over_seeds([1.0]), "2 or more seeds, found float64 (1,)"),
        (lambda: over_seeds(np.ones((2, 3))), "2 or more seeds, found float64 (2, 3)"),
        (lambda: over_seeds([1, np.nan]), "found float64 (2,) with NaN or infinity"),
        (lambda: sign_flip([1.0]), "integer sums (G,), found float64 (1,)"),
        (lambda: over_examples([], rng()), "2 or more examples"),
        (lambda: two_way(np.ones((1, 9)), rng()), "2 or more seeds x examples, found float64 (1, 9)"),
        (lambda: two_way(np.ones((2, 9)), rng(), 1), "2 or more resamples, found 1"),
        (lambda: mcnemar([0, 1], [1, 1]), "two bool arrays (N,), found int64 (2,) and int64 (2,)"),
        (lambda: mcnemar([True], [True, False]), "two bool arrays (N,), found bool (1,) and bool (2,)"),
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
