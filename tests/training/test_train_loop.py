import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_arrays
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from poolnet.data.dataset import Dataset, Split, open_dataset
from poolnet.errors import InputError, RunError
from poolnet.training.config import Arithmetic, TrainConfig
from poolnet.training.evaluation import evaluate, threads
from poolnet.training.model import SimpleConvNet, SimplePoolNet
from poolnet.training.train_loop import EpochRecord, fit, score, train_one_epoch


def figures(history):
    """What must be the same for the same seed: everything but the time it took."""
    return [dataclasses.astuple(record)[:5] for record in history]


class SeededOrder:
    """A sampler: a fresh permutation of `n` each epoch, from one generator. (RandomSampler draws a second, unused.)"""

    def __init__(self, n, seed):
        self.n, self.generator = n, torch.Generator().manual_seed(seed)

    def __iter__(self):
        return iter(torch.randperm(self.n, generator=self.generator).tolist())

    def __len__(self):
        return self.n


def reference_fit(config, splits):
    """The notebook's training, plainly: a DataLoader, autograd, running sums; evaluation batch by batch."""
    torch.manual_seed(config.seed)
    model = SimpleConvNet() if config.pool == "conv" else SimplePoolNet(config.pool)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    loaders = {}
    for split in splits:
        X = torch.from_numpy(np.array(split.X)).reshape(-1, 1, 28, 28).float() / 255
        dataset = TensorDataset(X, torch.from_numpy(split.y))
        order = SeededOrder(len(dataset), config.seed) if split.name == "train" else SequentialSampler(dataset)
        batches = BatchSampler(order, config.batch_size, drop_last=False)
        loaders[split.name] = DataLoader(dataset, sampler=batches, batch_size=None)  # a whole batch is taken at once

    def run(loader, train):
        loss_sum, correct, n = 0.0, 0, 0
        model.train(train)
        with contextlib.nullcontext() if train else torch.no_grad():
            for x, y in loader:
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                if train:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss_sum += loss.item() * len(y)
                correct += (logits.argmax(1) == y).sum().item()
                n += len(y)
        return loss_sum / n, correct / n

    with threads(1):
        history = [(*run(loaders["train"], True), *run(loaders["val"], False)) for _ in range(config.epochs)]
        return history, run(loaders["test"], False)


def assert_same_run(config, splits):
    result = fit(config, splits)
    history, test = reference_fit(config, splits)
    sizes = np.array([len(splits.train)] * 2 + [len(splits.val)] * 2)
    within = np.where([False, True, False, True], 2 / sizes, 1e-5) + 1e-12  # losses to 1e-5, accuracies to two images
    ours = np.array([figures([record])[0][1:] for record in result.history])
    assert len(ours) == config.epochs
    assert (np.abs(ours - np.array(history)) <= within).all()
    assert abs(result.test.loss - test[0]) <= 1e-5
    assert abs(result.test.acc - test[1]) <= 2 / len(splits.test) + 1e-12


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_fit_equals_the_notebooks_loop(letters, pool):
    assert_same_run(TrainConfig(pool=pool, epochs=2, batch_size=32, lr=0.01), open_dataset(letters))


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_fit_equals_the_notebooks_loop_on_real_letters(real_letters, pool):
    assert_same_run(TrainConfig(pool=pool, epochs=3), open_dataset(real_letters[0]))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(letters):
    splits = open_dataset(letters)
    config = TrainConfig(epochs=3, batch_size=32)
    first = fit(config, splits)
    torch.rand(5)  # the global generator has no part in it
    again = fit(config, splits)
    other = fit(dataclasses.replace(config, seed=43), splits)
    assert figures(first.history) == figures(again.history)
    np.testing.assert_array_equal(first.test.logits, again.test.logits)
    assert figures(first.history) != figures(other.history)


def test_train_figures_are_means_weighted_by_batch_size_before_each_step():
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, np.log(3.0)]))  # probabilities 1/4 and 3/4
    batches = [
        (torch.zeros(3, 1), torch.tensor([0, 1, 1])),
        (torch.zeros(1, 1), torch.tensor([0])),
    ]
    loss, acc = train_one_epoch(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    assert acc == 2 / 4
    assert loss == pytest.approx((2 * np.log(4) + 2 * np.log(4 / 3)) / 4, abs=1e-6)


def test_evaluate_covers_every_image_once(monkeypatch, letters):
    split = open_dataset(letters).test
    model = SimplePoolNet("avg")
    whole = evaluate(model, split)
    monkeypatch.setattr("poolnet.training.evaluation.CPU_BATCH", 7)
    parts = evaluate(model, split)
    assert whole.logits.shape == (110, 10)
    assert whole.logits.dtype == np.float32
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert whole.acc == (whole.logits.argmax(1) == split.y).mean()


def test_it_learns(letters):
    result = fit(TrainConfig(pool="avg", epochs=15, batch_size=16, lr=0.03), open_dataset(letters))
    assert result.test.acc > 0.9


def test_a_data_set_in_memory_trains_as_well():
    arrays = make_arrays((40, 10, 10))
    splits = [Split(name, arrays[f"X_{name}"], arrays[f"y_{name}"], sha256="") for name in ("train", "val", "test")]
    assert len(fit(TrainConfig(epochs=2), Dataset("memory", *splits, overlap=0)).history) == 2


def test_a_loss_that_is_not_finite_stops_the_run(letters):
    seen = []
    with pytest.raises(RunError, match=r"epoch \d+: train loss=.*lr=1e\+37 may be too high"):
        fit(TrainConfig(epochs=5, lr=1e37), open_dataset(letters), seen.append)
    assert len(seen) < 5


def test_epochs_print_as_in_the_notebook():
    record = EpochRecord(1, 1.03063, 0.73438, 0.85184, 0.77236, 5.0, 83_000.0)
    assert str(record) == "Epoch 01: train loss=1.0306, acc=0.7344 | val loss=0.8518, acc=0.7724"


def test_score_by_hand():
    accs = [0.70, 0.7685, 0.7699, 0.7705, 0.7690]  # best 0.7705 in epoch 4; 0.7685 is just within 0.002 of it
    history = tuple(EpochRecord(i, 1.0, 0.5, 1.0, acc, 1.0, 1.0) for i, acc in enumerate(accs, 1))
    assert score(history) == {"best_val_acc": 0.7705, "best_val_epoch": 4, "plateau_epoch": 2}
    assert score(history[:1]) == {"best_val_acc": 0.70, "best_val_epoch": 1, "plateau_epoch": 1}


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("pool", ["max", "conv"])
def test_no_digit_depends_on_the_number_of_threads(letters, pool):
    splits, config = open_dataset(letters), TrainConfig(pool=pool, epochs=1, batch_size=128)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(fit(config, splits))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert figures(other.history) == figures(results[0].history)
        np.testing.assert_array_equal(other.test.logits, results[0].test.logits)
    if pool == "conv":  # whose digits do depend on the number that is computed with
        assert figures(fit(config, splits, conv=Arithmetic(threads=1)).history) != figures(results[0].history)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf")), ("seed", -1)],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field}: found {value}"):
        TrainConfig(**{field: value})
