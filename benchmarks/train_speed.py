"""How much faster poolnet trains than the notebook's loop, on the same random data, in the same process.

    python benchmarks/train_speed.py [--rounds N] [--scale S] [--json]

`epoch`: one pass over train, the two alternating, medians; the losses must be those of the readable loop. Growth is the
time of poolnet's epoch at other sizes over that at the full one. `job`: the whole `poolnet train`, 30 epochs, tracking,
model and figures included, as processes, against a script of the notebook's loop with its evaluation and no tracking,
run for two epochs and extrapolated; and the peak memory of each as the operating system saw it.
"""

import json
import os
import re
import statistics
import subprocess
import sys
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
from poolnet.training.config import TrainConfig
from poolnet.training.evaluation import threads
from poolnet.training.fast_step import FastSoftmaxRegression
from poolnet.training.model import SimplePoolNet, build_model

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


def notebook_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer | None) -> float:
    """The notebook's pass over a split, training where an optimiser is given."""
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
    return loss_sum / n


def notebook_script(path: Path, epochs: int) -> None:
    """The notebook as a script: load, train with validation, test."""
    loaders = {
        name: DataLoader(notebook_tensors(path, name), BATCH, shuffle=name == "train")
        for name in ("train", "val", "test")
    }
    torch.manual_seed(42)
    model = SimplePoolNet("max")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(epochs):
        notebook_epoch(model, loaders["train"], optimizer)
        notebook_epoch(model, loaders["val"], None)
    print(f"TEST: loss={notebook_epoch(model, loaders['test'], None):.4f}")


def seconds(work) -> tuple[float, object]:
    """The wall seconds of a piece of work, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Ours:
    """Poolnet's training of a data set, epoch by epoch, each timed."""

    def __init__(self, path: Path):
        splits, arrays = features.open_pooled(path, "max")
        self.learner = FastSoftmaxRegression(build_model("max", 42), LR, arrays, splits.train.y)
        self.n, self.order = len(splits.train), torch.Generator().manual_seed(42)
        self.losses: list[float] = []

    def epoch(self) -> float:
        """Seconds of one epoch, whose loss is kept."""
        with threads():
            spent, (loss, _) = seconds(
                lambda: self.learner.train_epoch(torch.randperm(self.n, generator=self.order), BATCH)
            )
        self.losses.append(loss)
        assert np.isfinite(self.losses[-1]), f"a loss of {self.losses[-1]}"
        return spent


def expect(found: float, expected: float, within: float, what: str) -> None:
    if not abs(found - expected) <= within:  # not for NaN either
        raise click.ClickException(f"{what}: loss {found!r}, expected {expected!r}")


def measure_epoch(path: Path, rounds: int) -> dict[str, list[float]]:
    letters = notebook_tensors(path, "train")
    order = RandomSampler(letters, generator=torch.Generator().manual_seed(42))  # and weights, as in poolnet's run
    loader, model = DataLoader(letters, BATCH, sampler=order), build_model("max", 42)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    ours = Ours(path)
    times, notebook = {"notebook": [], "poolnet": []}, []
    for _ in range(rounds):
        spent, loss = seconds(lambda: notebook_epoch(model, loader, optimizer))
        times["notebook"].append(spent)
        notebook.append(loss)
        times["poolnet"] += [ours.epoch() for _ in range(3)]
    reference = train_loop.fit(
        TrainConfig(pool="max", epochs=2, lr=LR, batch_size=BATCH), dataset.open_dataset(path)
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


# A small process between this one and the measured: a child's peak memory includes what its parent held when it forked.
LAUNCHER = """
import subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
except ImportError:  # Windows does not say
    peak = float("nan")
print("peak", peak)
sys.exit(code)
"""


def process(command: list[str], folder: Path) -> tuple[float, float, float | None]:
    """Wall seconds of a process, its peak resident memory in MB, and the seconds until it printed its first epoch. All
    test losses that it prints must be finite."""
    environment = os.environ | {"POOLNET_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/m.db"}
    launched = [sys.executable, "-c", LAUNCHER, *command]
    start, first, found = time.perf_counter(), None, []
    with subprocess.Popen(launched, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            if first is None and line.startswith("Epoch 01"):
                first = time.perf_counter() - start
            found += map(float, re.findall(r"(?:TEST: loss=|test_loss )([^\s,]+)", line))
    if running.returncode:
        raise click.ClickException(f"{' '.join(command)} failed")
    if not np.isfinite(found).all() or ("sweep" not in command and len(found) != 1):
        raise click.ClickException(f"{' '.join(command)}: test losses {found}, expected finite ones")
    return time.perf_counter() - start, float(line.split()[1]), first


def notebook_command(path: Path, epochs: int) -> list[str]:
    return [sys.executable, __file__, "--notebook", str(path), "--epochs", str(epochs)]


def measure_jobs(paths: dict[str, Path], rounds: int) -> dict[str, list[tuple]]:
    jobs = {name: [] for name in ("notebook, 2 epochs", "notebook, 1 epoch", "cold", "warm", "cold, float32")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for epochs in (1, 2):
                script = notebook_command(paths["uint8"], epochs)
                jobs[f"notebook, {epochs} epoch{'s' * (epochs > 1)}"].append(process(script, folder))
            train = [sys.executable, "-m", "poolnet", "train", "--data"]
            jobs["cold"].append(process([*train, str(paths["uint8"])], folder))
            jobs["warm"].append(process([*train, str(paths["uint8"])], folder))
            jobs["cold, float32"].append(process([*train, str(paths["float32"])], folder))
    return jobs


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
@click.option("--notebook", type=click.Path(path_type=Path), help="Run the notebook's script on this file instead.")
@click.option("--epochs", default=1, help="Epochs of --notebook.")
def main(rounds: int, scale: float, as_json: bool, notebook: Path | None, epochs: int) -> None:
    if notebook:
        return notebook_script(notebook, epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["POOLNET_HOME"] = str(folder / "home")
        sizes = {times: random_letters(folder / f"{times}.npz", times * scale) for times in (0.1, 1, 10)}
        floats = random_letters(folder / "float32.npz", scale, "float32")
        jobs = measure_jobs({"uint8": sizes[1], "float32": floats}, rounds)
        large = process([sys.executable, "-m", "poolnet", "train", "--epochs", "2", "--data", str(sizes[10])], folder)
        epoch = measure_epoch(sizes[1], rounds)
        growth = measure_growth(sizes, 2 * rounds + 1)
    wall = {name: median(run[0] for run in runs) for name, runs in jobs.items()}
    each = wall["notebook, 2 epochs"] - wall["notebook, 1 epoch"]
    notebook_job = wall["notebook, 1 epoch"] + (EPOCHS - 1) * each
    result = {
        "epoch_seconds_notebook": median(epoch["notebook"]),
        "epoch_seconds_poolnet": median(epoch["poolnet"]),
        "epoch_ratio": median(epoch["notebook"]) / median(epoch["poolnet"]),
        "job_seconds_notebook": notebook_job,
        "job_seconds_cold": wall["cold"],
        "job_seconds_warm": wall["warm"],
        "job_ratio_cold": notebook_job / wall["cold"],
        "job_ratio_warm": notebook_job / wall["warm"],
        "first_epoch_seconds_warm": median(run[2] for run in jobs["warm"]),
        "peak_mb_notebook": median(run[1] for run in jobs["notebook, 1 epoch"]),
        "peak_mb_cold": median(run[1] for run in jobs["cold"]),
        "peak_mb_cold_float32": median(run[1] for run in jobs["cold, float32"]),
        "peak_mb_ten_times": large[1],
        "growth_tenth": median(growth[0.1]) / median(growth[1]),
        "growth_ten_times": median(growth[10]) / median(growth[1]),
    }
    show(result, as_json)


if __name__ == "__main__":
    main()
