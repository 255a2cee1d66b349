"""The fast path against the readable one: same figures, whatever the batch size, device or data."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from poolnet.data.dataset import open_dataset
from poolnet.errors import RunError
from poolnet.training import fast_step
from poolnet.training.config import TrainConfig
from poolnet.training.fast_step import FastSoftmaxRegression
from poolnet.training.features import open_pooled
from poolnet.training.model import build_model
from poolnet.training.poolings import POOLINGS
from poolnet.training.train_loop import Autograd, fit


def figures(history):
    return np.array([dataclasses.astuple(record)[1:5] for record in history])


def assert_equal_runs(config, path):
    splits, arrays = open_pooled(path, config.pool)
    fast, slow = fast_step.fit(config, splits, arrays), fit(config, open_dataset(path))
    sizes = np.array([len(splits.train)] * 2 + [len(splits.val)] * 2)
    within = np.where([False, True, False, True], 2 / sizes, 1e-5) + 1e-12  # losses to 1e-5, accuracies to two images
    assert len(fast.history) == config.epochs
    assert (np.abs(figures(fast.history) - figures(slow.history)) <= within).all()
    assert abs(fast.test.loss - slow.test.loss) <= 1e-5
    assert abs(fast.test.acc - slow.test.acc) <= 2 / len(splits.test) + 1e-12
    np.testing.assert_allclose(fast.test.logits, slow.test.logits, atol=1e-3)
    return fast


@pytest.mark.parametrize(
    ("pool", "batch_size"), [*((pool, 32) for pool in POOLINGS), *(("avg", size) for size in (1, 7, 299, 300, 1000))]
)
def test_the_fast_path_equals_the_slow_one(letters, pool, batch_size):
    assert_equal_runs(TrainConfig(pool=pool, epochs=3, batch_size=batch_size, lr=0.01), letters)


def test_blocks_of_batches_do_not_show(letters, monkeypatch):
    config = TrainConfig(epochs=3, batch_size=8, lr=0.01)
    whole = fast_step.fit(config, *open_pooled(letters, "max"))
    monkeypatch.setattr(fast_step, "BLOCK", 24)
    parts = fast_step.fit(config, *open_pooled(letters, "max"))
    np.testing.assert_array_equal(whole.test.logits, parts.test.logits)
    np.testing.assert_allclose(figures(whole.history), figures(parts.history), atol=1e-12)


def test_thirty_epochs_on_real_letters_are_equal(real_letters):
    assert_equal_runs(TrainConfig(), real_letters[0])


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_thirty_epochs_on_embedded_letters_are_equal(glyphs_npz, pool):
    assert_equal_runs(TrainConfig(pool=pool), glyphs_npz)


def test_the_model_gets_the_weights_and_is_a_model_of_raw_images(letters):
    splits, arrays = open_pooled(letters, "avg")
    result = fast_step.fit(TrainConfig(pool="avg", epochs=2, lr=0.01), splits, arrays)
    with torch.no_grad():
        logits = result.model(torch.from_numpy(splits.test.images(slice(None))))
    np.testing.assert_allclose(logits.numpy(), result.test.logits, atol=1e-5)


def test_the_step_is_adams(letters):
    """Weights after each of many steps, against torch.optim.Adam on autograd's gradient, in double precision."""
    splits, arrays = open_pooled(letters, "max")
    model = build_model("max", seed=3)
    learner = FastSoftmaxRegression(model, 0.05, arrays, splits.train.y)
    W = torch.tensor(learner.W, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([W], lr=0.05)
    x, y = torch.tensor(arrays["train"]).double(), torch.tensor(splits.train.y)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    for rows in order.split(50):
        adam.zero_grad()
        F.cross_entropy(x[rows] @ W, y[rows]).backward()
        adam.step()
        learner._steps(arrays["train"][rows.numpy()][None], learner.y[rows.numpy()][None])
        np.testing.assert_allclose(learner.W, W.detach().numpy(), atol=2e-5)


def test_the_path_for_other_devices_equals_torchs_own_loop(letters):
    splits, arrays = open_pooled(letters, "avg")
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    fast = FastSoftmaxRegression(build_model("avg", 1), 0.01, arrays, splits.train.y)
    net = build_model("avg", 1).classifier
    cpu = torch.device("cpu")
    other = Autograd(
        net, 0.01, {split.name: fast_step.fetcher_of_features(arrays[split.name], split.y, cpu) for split in splits}
    )
    for _ in range(3):
        np.testing.assert_allclose(other.train_epoch(order, 32), fast.train_epoch(order, 32), atol=1e-5)
    np.testing.assert_allclose(other.evaluate(splits.test).logits, fast.evaluate(splits.test).logits, atol=1e-4)
    torch.testing.assert_close(net.weight, fast.model.classifier.weight, atol=1e-4, rtol=0)


def test_a_loss_that_is_not_finite_stops_the_run_as_on_the_slow_path(letters):
    config = TrainConfig(epochs=5, lr=1e37)
    messages = []
    for run in (
        lambda: fast_step.fit(config, *open_pooled(letters, "max")),
        lambda: fit(config, open_dataset(letters)),
    ):
        with pytest.raises(RunError, match=r"epoch 1: train loss=.*lr=1e\+37 may be too high") as raised:
            run()
        messages.append(str(raised.value))
    assert messages[0].split(":")[0] == messages[1].split(":")[0]


def test_the_same_seed_gives_the_same_run(letters):
    config = TrainConfig(epochs=3)
    first, again = (fast_step.fit(config, *open_pooled(letters, "max")) for _ in range(2))
    np.testing.assert_array_equal(figures(first.history), figures(again.history))
    np.testing.assert_array_equal(first.test.logits, again.test.logits)
