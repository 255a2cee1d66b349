"""One model's scores: by hand, and against libraries that many others rely on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from scipy.stats import t as t_distribution

from poolnet.stats import paired, scores


def logits_of(predicted, K=3, height=2.0):
    return height * np.eye(K)[predicted]


def test_scores_by_hand():
    y, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    result = scores.of(logits_of(predicted), y)
    assert result.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert result.acc.estimate == 4 / 6
    first = result.per_class[0]
    assert (first.n, first.precision.estimate, first.recall.estimate) == (3, 1, 2 / 3)
    assert first.f1.estimate == pytest.approx(0.8)  # 2 * 1 * 2/3 / (1 + 2/3)
    # each answer has probability e^2 / (e^2 + 2) for what it says, and 1 / (e^2 + 2) for the rest
    top = np.exp(2) / (np.exp(2) + 2)
    assert result.loss.estimate == pytest.approx(-(4 * np.log(top) + 2 * np.log((1 - top) / 2)) / 6)
    assert result.calibration.ece == pytest.approx(top - 4 / 6)


def test_the_interval_of_a_loss_is_of_equal_factors():
    rng = np.random.default_rng(4)
    logits, y, family = rng.normal(size=(90, 3)), rng.integers(3, size=90), np.arange(90) // 6
    loss, plain = scores.of(logits, y, family).loss, paired.clustered(paired.per_example(logits, y)[1], family)
    assert (loss.estimate, loss.se, loss.df) == (plain.estimate, plain.se, plain.df)
    assert loss.high / loss.estimate == pytest.approx(loss.estimate / loss.low)
    of_families = np.bincount(family, paired.per_example(logits, y)[1])
    groups = of_families.sum() ** 2 / (of_families**2).sum()  # of the 15, as far as they have equal parts of the loss
    reach = t_distribution.ppf(0.975, groups - 1) * plain.se * np.sqrt(groups / (groups - 1)) / plain.estimate
    assert np.log(loss.high / loss.estimate) == pytest.approx(reach)


def test_a_letter_that_is_never_said_has_no_precision():
    result = scores.of(logits_of([0, 0, 0, 0]), [0, 0, 1, 1])
    assert np.isnan(result.per_class[1].precision.estimate)
    assert result.per_class[1].recall.estimate == 0
    assert np.isnan(result.per_class[2].recall.low)


def test_a_confusion_matrix_counts_true_letters_in_rows():
    counts = scores.confusion_matrix([0, 0, 9], [3, 3, 9])
    assert (counts.shape, counts.dtype.kind, counts.sum()) == ((10, 10), "i", 3)
    assert (counts[0, 3], counts[9, 9]) == (2, 1)


def test_scores_are_scikit_learns(sklearn):
    rng = np.random.default_rng(1)
    logits, y = rng.normal(size=(500, 10)), rng.integers(0, 10, 500)
    result = scores.of(logits, y)
    assert np.array_equal(result.confusion, sklearn.metrics.confusion_matrix(y, logits.argmax(1)))
    expected = sklearn.metrics.precision_recall_fscore_support(y, logits.argmax(1))
    for name, values in zip(("precision", "recall", "f1", "n"), expected, strict=True):
        mine = [getattr(each, name) for each in result.per_class]
        assert [getattr(each, "estimate", each) for each in mine] == pytest.approx(values)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 10), (85, 100), (1000, 1000)])
def test_shares_of_independent_letters_have_wilsons_interval(k, n):
    share = scores.wilson(np.arange(n) < k)
    assert (share.low, share.high) == pytest.approx(binomtest(k, n).proportion_ci(method="wilson"), abs=1e-12)
    assert 0 <= share.low <= share.estimate <= share.high <= 1


def test_letters_of_a_family_are_worth_fewer():
    right = np.random.default_rng(1).random(200) < 0.8
    family = np.repeat(np.arange(200), 5)
    copied, alone = scores.wilson(np.repeat(right, 5), family), scores.wilson(right)
    assert copied.estimate == alone.estimate
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-3)  # t for the normal quantile
    y = np.arange(1000) % 3
    result = scores.of(logits_of(np.where(np.repeat(right, 5), y, (y + 1) % 3)), y, family)
    assert (result.n, result.groups, result.acc) == (1000, 200, copied)
    assert result.n_effective == pytest.approx(200, rel=0.01)
    assert scores.of(logits_of(y), y).n_effective == 1000


def test_letters_that_are_all_right_are_worth_as_many_as_families():
    # 3 families of 4: nothing tells how alike their letters are, so 3 letters, with t of 2 df
    share = scores.wilson(np.ones(12, bool), np.repeat([7, 8, 9], 4))
    t = t_distribution.ppf(0.975, 2)
    assert (share.estimate, share.low, share.high) == (1, pytest.approx(3 / (3 + t**2)), 1)
    one_family = scores.wilson([True, False], [4, 4])
    assert (one_family.estimate, one_family.low, one_family.high) == (0.5, 0, 1)


def test_the_interval_of_f1_is_that_of_the_share_it_grows_with():
    y, predicted = np.repeat([0, 0, 1, 1], [30, 10, 5, 55]), np.repeat([0, 1, 0, 1], [30, 10, 5, 55])
    (first, *_) = scores.per_class(y, predicted)
    jaccard = scores.wilson(np.arange(45) < 30)  # hits among what is or is said to be of the class
    assert first.f1.estimate == pytest.approx(2 * 30 / (2 * 30 + 10 + 5))
    assert first.f1.low == pytest.approx(2 * jaccard.low / (1 + jaccard.low))
    assert first.f1.low < first.f1.estimate < first.f1.high


def test_a_calibrated_model_stays_below_the_ece_of_chance_as_often_as_it_should():
    rng = np.random.default_rng(2)
    below = 0
    for _ in range(200):
        logits = 2 * rng.normal(size=(400, 4))
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = (probabilities.cumsum(1) > rng.random((400, 1))).argmax(1)
        below += paired.calibration(logits, y).ece < paired.ece_if_calibrated(logits, y, rng)
    assert 180 <= below <= 198  # 190 expected; two-sided 99 % binomial
    overconfident = 3 * logits
    assert paired.calibration(overconfident, y).ece > paired.ece_if_calibrated(overconfident, y, rng)


def test_letters_that_are_right_together_raise_the_ece_of_chance():
    rng = np.random.default_rng(3)
    logits, family = 2 * rng.normal(size=(1000, 4)), np.repeat(np.arange(100), 10)
    top = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    said = logits.argmax(1)
    y = np.where(np.repeat(rng.random(100), 10) < top, said, (said + 1) % 4)  # one lot decides a whole family
    by_family, by_letter = (paired.ece_if_calibrated(logits, y, np.random.default_rng(0), g) for g in (family, None))
    assert by_family > 1.4 * by_letter
    assert paired.calibration(logits, y).ece < by_family


def arms(only_a, only_b, n):
    """Two arms that are right together on all other letters."""
    right_a, right_b = np.ones((2, n), bool)
    right_b[:only_a] = False
    right_a[only_a : only_a + only_b] = False
    return right_a, right_b


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "margin"), [(9, 12, 500, 0.01), (0, 0, 90, 0.01), (20, 3, 1000, 0.02), (5, 0, 200, 0.03)]
)
def test_non_inferiority_is_the_score_test_at_the_most_likely_shares(only_a, only_b, n, margin):
    """By search over a grid where the formula has a root."""
    shares = np.linspace(margin, (1 + margin) / 2, 1_000_001)[1:-1]  # of letters that only A has right
    more = shares - margin  # that only B has right, if the truth is at the margin
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = np.where(only_b > 0, only_b * np.log(more), 0) + only_a * np.log(shares)
        likelihood += (n - only_a - only_b) * np.log(1 - shares - more)
    q = shares[np.nanargmax(likelihood)]
    z = (only_b - only_a + n * margin) / np.sqrt(n * (q + (q - margin) - margin**2))
    assert paired.non_inferiority(*arms(only_a, only_b, n), margin) == pytest.approx(norm.sf(z), abs=1e-4)


def test_few_letters_do_not_show_that_nothing_is_worse():
    assert paired.non_inferiority(*arms(0, 0, 90), 0.01) > paired.NOT_WORSE  # though not one differs
    assert paired.non_inferiority(*arms(0, 0, 9000), 0.01) < 1e-6
    with pytest.raises(ValueError, match="margin between 0 and 1"):
        paired.non_inferiority(*arms(0, 0, 90), 0)


def test_non_inferiority_keeps_its_level():
    """True difference at the margin: in at most 2.5 % of samples, and some, it is called not worse."""
    rng, n, margin = np.random.default_rng(3), 600, 0.02
    counts = rng.multinomial(n, [0.05, 0.03, 0.92], 4000)  # only A right, only B right, both or none
    called = [paired.non_inferiority(*arms(a, b, n), margin) < paired.NOT_WORSE for a, b, _ in counts]
    assert 0.015 < np.mean(called) < 0.035


@given(
    st.integers(20, 3000),
    st.tuples(st.floats(0, 0.3), st.floats(0, 0.3)),
    st.none() | st.integers(2, 500),
    st.floats(0, 1),
    st.sampled_from([0.001, 0.0025, 0.005, 0.01, 0.02]),
)
def test_not_worse_and_the_interval_agree(n, shares, families, mixed, margin):
    """Up to 2 points, what is not worse by a margin has an interval above it. Letters are mixed in families or not."""
    only_a, only_b = (int(share * n) for share in shares)
    right_a, right_b = arms(only_a, only_b, n)
    places = np.arange(n) + mixed * n * np.random.default_rng(0).random(n)
    group = None if families is None else np.argsort(np.argsort(places)) * min(families, n) // n
    if paired.non_inferiority(right_a, right_b, margin, group) < paired.NOT_WORSE:
        assert paired.clustered(right_b.astype(float) - right_a, group).low > -margin


def test_twelve_letters_each_way_do_not_show_half_a_point():
    right_a, right_b = arms(12, 12, 1823)
    points = paired.clustered(100 * (right_b.astype(float) - right_a))
    assert (round(points.low, 2), round(points.high, 2)) == (-0.53, 0.53)
    assert paired.non_inferiority(right_a, right_b, 0.005) > paired.NOT_WORSE
    assert paired.non_inferiority(right_a, right_b, 0.006) < paired.NOT_WORSE
