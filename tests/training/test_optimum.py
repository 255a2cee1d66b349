"""The lowest train loss: against answers worked out by hand, and against scikit-learn's search."""

import numpy as np
import pytest
import torch
from conftest import make_arrays
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from poolnet.training import fast_step, features
from poolnet.training.config import TrainConfig
from poolnet.training.features import WIDTH, open_pooled
from poolnet.training.optimum import find_optimum, loss_of


def noisy(n=1500, wrong=900):
    """Features and labels; without the wrong labels the letters could be told apart, at no loss at all."""
    arrays = make_arrays((n, 5, 5))
    y = arrays["y_train"].astype(np.int64)
    y[:wrong] = np.random.default_rng(1).integers(0, 10, wrong)
    return features.pooled(arrays["X_train"].reshape(-1, 28, 28), "avg"), y


def test_without_features_the_optimum_is_the_shares_of_the_classes():
    """The loss is then their entropy. All features but the constant are always 0, so they stay without weight."""
    counts = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 55])
    x = np.zeros((100, WIDTH), np.float32)
    x[:, -1] = 1
    best = find_optimum(x, np.repeat(np.arange(10), counts))
    log_p = np.log(counts / 100)
    assert best.converged
    assert best.train_loss == pytest.approx(-(counts / 100 * log_p).sum(), abs=1e-12)
    np.testing.assert_allclose(best.W[-1], log_p - log_p.mean(), atol=1e-9)
    np.testing.assert_array_equal(best.W[:-1], 0)


def test_the_optimum_is_where_scikit_learn_finds_it(sklearn):
    x, y = noisy()
    best = find_optimum(x, y)
    model = sklearn.linear_model.LogisticRegression(C=np.inf, solver="newton-cg", tol=1e-9, max_iter=1000)
    with threadpool_limits(1, user_api="blas"):  # with two threads its small products take fifty times as long
        theirs = model.fit(x[:, :-1].astype(np.float64), y)
        log_p = theirs.predict_log_proba(x[:, :-1].astype(np.float64))
    assert best.converged
    assert best.train_loss == pytest.approx(-log_p[np.arange(len(y)), y].mean(), abs=1e-8)
    np.testing.assert_allclose(torch.tensor(best.logits(x)).log_softmax(1), log_p, atol=1e-2)
    np.testing.assert_allclose(best.W.sum(1), 0, atol=1e-9)  # only differences of logits count


def test_features_that_say_nothing_new_change_nothing():
    """One that is always the same, one that is the double of another, one that is always 0, and another scale."""
    x, y = noisy()
    x[:, :3] = 0
    before = find_optimum(x, y)
    logits = before.logits(x)
    x[:, 0], x[:, 1] = 0.5, 2 * x[:, 7]
    x[:, 8] *= 1e-4
    after = find_optimum(x, y)
    assert before.converged
    assert after.converged
    assert after.train_loss == pytest.approx(before.train_loss, abs=1e-10)
    np.testing.assert_allclose(after.logits(x), logits, atol=1e-3)


def test_where_the_loss_falls_for_ever_there_is_no_optimum():
    x, y = noisy(n=300, wrong=0)
    best = find_optimum(x, y)
    assert not best.converged
    assert 0 < best.train_loss < 1e-9
    assert (best.logits(x).argmax(1) == y).all()


def test_training_goes_there_and_the_gap_is_what_it_is_above(tmp_path):
    arrays = make_arrays((1500, 50, 50))
    arrays["y_train"][:900] = np.random.default_rng(1).integers(0, 10, 900)
    np.savez(tmp_path / "noisy.npz", **arrays)
    splits, pooled = open_pooled(tmp_path / "noisy.npz", "avg")
    x, y = pooled["train"], splits.train.y
    lowest = find_optimum(x, y).train_loss
    short, long = (
        fast_step.weights(fast_step.fit(TrainConfig("", "avg", epochs, lr=0.01), splits, pooled).model)
        for epochs in (2, 200)
    )
    gaps = [loss_of(weights.numpy(), x, y) - lowest for weights in (short, long)]
    loss = F.cross_entropy(torch.from_numpy(x) @ short, torch.from_numpy(y)).item()
    assert loss - lowest == pytest.approx(gaps[0], abs=1e-5)
    assert 0 < gaps[1] < gaps[0] / 2


def test_no_digit_depends_on_the_threads_of_blas():
    x, y = np.random.default_rng(0).random((3000, WIDTH), np.float32), np.arange(3000) % 10
    found = []
    for count in (1, 4):
        with threadpool_limits(count):
            found.append(find_optimum(x, y))
    one, four = found
    assert one.converged
    assert (one.train_loss, one.converged) == (four.train_loss, four.converged)
    np.testing.assert_array_equal(one.W, four.W)
