"""How much faster poolnet trains an epoch than the notebook's loop, on the same random data, in the same process.

    python benchmarks/train_speed.py [--rounds N] [--scale S] [--json]

One pass over train, the two alternating, medians; the losses must be those of the readable loop. Growth is the time of
poolnet's epoch at other sizes over that at the full one. The convolutional baseline is timed on a tenth of the images,
with the same threads in both loops. Whole processes are timed by `whole_job.py`.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from poolnet.data import dataset, npz
from poolnet.training import features, train_loop
from poolnet.training.config import CONV, TrainConfig
from poolnet.training.evaluation import fetcher, threads
from poolnet.training.fast_step import FastSoftmaxRegression
from poolnet.training.model import build_model

FULL = {"train": 415_752, "val": 46_194, "test": 13_649}  # images of the reference experiment
BATCH, EPOCHS, LR = 128, 30, 1e-3


def random_letters(path: Path, scale: float, form: str = "uint8") -> Path:
    """A data set of random pixels in which every label leaves a trace, `scale` times the full size."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, size in FULL.items():
        n = round(size * scale)
        y = rng.integers(0, 10, n)
        X = rng.integers(0, 200, (n, 28, 28), dtype=np.uint8)
        X[np.arange(n), 2 * y + 2] = 255
        arrays[f"X_{name}"], arrays[f"y_{name}"] = X, y
        if form == "float32":
            arrays[f"X_{name}"] = X[:, None].astype(np.float32) / 255
    npz.save(path, arrays)
    return path


def notebook_tensors(path: Path, name: str) -> TensorDataset:
    with np.load(path) as data:
        X, y = data[f"X_{name}"], data[f"y_{name}"]
    X = torch.tensor(X, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return TensorDataset(X / 255 if X.max() > 1 else X, torch.tensor(y, dtype=torch.long))


def notebook_epoch(
    model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer | None
) -> tuple[float, float]:
    """The notebook's pass over a split, training where an optimiser is given: loss and accuracy."""
    model.train(optimizer is not None)
    criterion, loss_sum, correct, n = nn.CrossEntropyLoss(), 0.0, 0, 0
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in loader:
            outputs = model(images)
            loss = criterion(outputs, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * labels.size(0)
            correct += (outputs.argmax(1) == labels).sum().item()
            n += labels.size(0)
    return loss_sum / n, correct / n


def seconds(work) -> tuple[float, object]:
    """The wall seconds of a piece of work, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Ours:
    """Poolnet's training of a data set, epoch by epoch, each timed."""

    def __init__(self, path: Path, pool: str = "max"):
        model, self.threads = build_model(pool, 42), 1
        if pool == "conv":
            splits, self.threads = dataset.open_dataset(path), CONV.threads
            fetch = {"train": fetcher(splits.train, torch.device("cpu"))}
            self.learner = train_loop.Autograd(model, LR, fetch, fast=True)
        else:
            splits, arrays = features.open_pooled(path, pool)
            self.learner = FastSoftmaxRegression(model, LR, arrays, splits.train.y)
        self.n, self.order = len(splits.train), torch.Generator().manual_seed(42)
        self.losses: list[float] = []

    def epoch(self) -> float:
        """Seconds of one epoch, whose loss is kept."""
        with threads(self.threads):
            spent, (loss, _) = seconds(
                lambda: self.learner.train_epoch(torch.randperm(self.n, generator=self.order), BATCH)
            )
        self.losses.append(loss)
        assert np.isfinite(self.losses[-1]), f"a loss of {self.losses[-1]}"
        return spent


def expect(found: float, expected: float, within: float, what: str) -> None:
    if not abs(found - expected) <= within:  # not for NaN either
        raise click.ClickException(f"{what}: loss {found!r}, expected {expected!r}")


def measure_epoch(path: Path, rounds: int, pool: str = "max") -> dict[str, list[float]]:
    letters = notebook_tensors(path, "train")
    order = RandomSampler(letters, generator=torch.Generator().manual_seed(42))  # and weights, as in poolnet's run
    loader, model = DataLoader(letters, BATCH, sampler=order), build_model(pool, 42)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    ours = Ours(path, pool)
    repeats, times, notebook = 1 if pool == "conv" else 3, {"notebook": [], "poolnet": []}, []
    # a convolution's digits depend on the threads, a pooled model's do not
    with threads(ours.threads) if pool == "conv" else contextlib.nullcontext():
        for _ in range(rounds):
            spent, (loss, _) = seconds(lambda: notebook_epoch(model, loader, optimizer))
            times["notebook"].append(spent)
            notebook.append(loss)
            times["poolnet"] += [ours.epoch() for _ in range(repeats)]
    reference = train_loop.fit(
        TrainConfig(pool=pool, epochs=2, lr=LR, batch_size=BATCH), dataset.open_dataset(path)
    ).history
    for loop, losses in (("poolnet", ours.losses), ("notebook", notebook[:1])):  # which then takes another order
        for record, loss in zip(reference, losses, strict=False):
            expect(loss, record.train_loss, 1e-5, f"{loop}, epoch {record.epoch}")
    return times


def measure_growth(paths: dict[float, Path], rounds: int) -> dict[float, list[float]]:
    learners = {scale: Ours(path) for scale, path in paths.items()}
    times = {scale: [] for scale in paths}
    for _ in range(rounds):
        for scale, ours in learners.items():
            times[scale].append(ours.epoch())
    return times


def median(values) -> float:
    return statistics.median(values)


def show(result: dict[str, float], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo("\n".join(f"{name:28}{value:10.2f}" for name, value in result.items()))


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Measurements of each; medians are reported.")
@click.option("--scale", default=1.0, show_default=True, help="Share of the full size that is called full.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(rounds: int, scale: float, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["POOLNET_HOME"] = str(folder / "home")
        sizes = {times: random_letters(folder / f"{times}.npz", times * scale) for times in (0.1, 1, 10)}
        epoch = measure_epoch(sizes[1], rounds)
        conv = measure_epoch(sizes[0.1], rounds, "conv")
        growth = measure_growth(sizes, 2 * rounds + 1)
    result = {
        "epoch_seconds_notebook": median(epoch["notebook"]),
        "epoch_seconds_poolnet": median(epoch["poolnet"]),
        "epoch_ratio": median(epoch["notebook"]) / median(epoch["poolnet"]),
        "conv_tenth_seconds_notebook": median(conv["notebook"]),
        "conv_tenth_seconds_poolnet": median(conv["poolnet"]),
        "conv_ratio": median(conv["notebook"]) / median(conv["poolnet"]),
        "growth_tenth": median(growth[0.1]) / median(growth[1]),
        "growth_ten_times": median(growth[10]) / median(growth[1]),
    }
    show(result, as_json)


if __name__ == "__main__":
    main()
