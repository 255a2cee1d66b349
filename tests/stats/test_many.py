"""More than two arms: their simultaneous intervals, and which are not worse than the best."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import t

from poolnet.stats.many import not_worse_than_best, simultaneous
from poolnet.stats.paired import clustered, holm

FAMILY = np.arange(120) // 6


def arms(means=(0.0, 0.1, 0.5), S=4, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    x = draw((1, 1, 120)) + 0.3 * draw((len(means), 1, 20))[..., FAMILY] + 0.2 * draw((len(means), S, 120))
    return x + 0.05 * draw((len(means), S, 1)) + np.array(means)[:, None, None]


@pytest.mark.parametrize("S", [1, 4])
def test_two_arms_have_the_interval_of_a_pair(S):
    x = arms((0.0, 0.2), S)
    (only,) = simultaneous(x, FAMILY)
    pair = clustered(x[1] - x[0], FAMILY)
    assert (only.a, only.b, only.p_holm) == (0, 1, pytest.approx(pair.p))
    np.testing.assert_allclose(dataclasses.astuple(only.effect), dataclasses.astuple(pair), rtol=1e-3)


def test_each_pair_is_compared_and_adjusted_for_their_number():
    x = arms((0.0, 0.1, 0.5, 0.2), S=10)
    contrasts = simultaneous(x, FAMILY)
    assert [(c.a, c.b) for c in contrasts] == list(combinations(range(4), 2))
    pairs = [clustered(x[c.b] - x[c.a], FAMILY) for c in contrasts]
    np.testing.assert_allclose([c.effect.se for c in contrasts], [pair.se for pair in pairs])
    np.testing.assert_allclose([c.p_holm for c in contrasts], holm([pair.p for pair in pairs]))
    reach = {(c.effect.high - c.effect.estimate) / c.effect.se for c in contrasts}
    least = min(pair.df for pair in pairs)
    assert t.ppf(0.975, least) < min(reach) == pytest.approx(max(reach))
    assert max(reach) < t.ppf(1 - 0.025 / 6, least)  # Bonferroni's, which does not know that arms are shared


def test_the_same_values_give_the_same_intervals():
    x = arms()
    assert simultaneous(x, FAMILY) == simultaneous(x.copy(), FAMILY)
    for one, other in zip(simultaneous(x, FAMILY), reversed(simultaneous(x[::-1], FAMILY)), strict=True):
        assert one.effect.estimate == pytest.approx(-other.effect.estimate)
        assert one.effect.high == pytest.approx(-other.effect.low, rel=2e-3)


def test_arms_that_are_the_same_differ_by_nothing():
    x = arms((0.0, 0.4))
    same = simultaneous(np.array([x[0], x[0], x[1]]), FAMILY)[0]
    assert (same.effect.estimate, same.effect.se, same.effect.low, same.effect.high, same.p_holm) == (0, 0, 0, 0, 1)


def test_the_best_and_what_is_not_shown_to_be_worse():
    assert not_worse_than_best(simultaneous(arms((0.0, 3.0, 2.98)), FAMILY), 3) == (1, 2)
    assert not_worse_than_best(simultaneous(arms((3.0, 0.0, 1.0)), FAMILY), 3) == (0,)
    assert not_worse_than_best(simultaneous(arms((0.0, 0.01, 0.02)), FAMILY), 3) == (0, 1, 2)


@pytest.mark.parametrize("x", [np.ones((1, 2, 9)), np.ones((3, 9)), np.full((2, 1, 9), np.nan)])
def test_arms_of_another_form_are_refused_in_one_line(x):
    with pytest.raises(ValueError, match=r"finite values \(K, S, N\) of 2 or more arms, found float64"):
        simultaneous(x)
