"""How long a training takes, from the command to the model in MLflow, against three scripts that one would write.

    python benchmarks/whole_job.py [--data FILE] [--row NAME] [--rounds N] [--scale S] [--float32] [--json]

Each row is a process of its own, all of them in turn, with a fresh store and folder in each round; medians.

poolnet      `poolnet train` in a new folder, and again in the same one, where features and exported program are kept
notebook     the notebook's loop, without any record
mlflow       the same with `mlflow.log_metrics` an epoch and `mlflow.pytorch.log_model`
lightning    Lightning's trainer with its MLFlowLogger, then `mlflow.pytorch.log_model`

It needs `pip install -e ".[bench]"`. Without `--data` the data are random letters of the full size, times `--scale`;
there the three scripts run for one and for two epochs, from which their 30 are extrapolated. The test accuracy that a
process prints must be that of `poolnet.fit` for as many epochs. Peak memory is that of all processes of a row together;
pages that two of them share are counted once on Linux, and not at all elsewhere.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from train_speed import BATCH, EPOCHS, LR, notebook_epoch, notebook_tensors, random_letters

import poolnet
from poolnet.training.model import SimplePoolNet

SCRIPTS = ("notebook", "mlflow", "lightning")
MARKS = {"first epoch": "Epoch 01", "last epoch": f"Epoch {EPOCHS}", "test": "TEST", "model": "Model"}
HIDE = "import sys\nsys.modules |= dict.fromkeys(('lightning', 'pytorch_lightning'))\n"
IMPORTS = "from poolnet.runs import train_run"  # what `poolnet train` imports before it trains


# --- the three scripts --------------------------------------------------------------------------------------------


def loaders(path: Path) -> dict[str, DataLoader]:
    return {
        name: DataLoader(notebook_tensors(path, name), BATCH, shuffle=name == "train")
        for name in ("train", "val", "test")
    }


def example(path: Path) -> np.ndarray:
    """Two images, which MLflow asks for to export a model."""
    return notebook_tensors(path, "test")[:2][0].numpy()


def notebook(path: Path, epochs: int, log: Callable[[dict, int], object] = lambda metrics, epoch: None) -> nn.Module:
    """The notebook's loop; `log` gets the figures of each epoch."""
    data = loaders(path)
    torch.manual_seed(42)
    model = SimplePoolNet("max")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for epoch in range(1, epochs + 1):
        train_loss, train_acc = notebook_epoch(model, data["train"], optimizer)
        val_loss, val_acc = notebook_epoch(model, data["val"], None)
        log({"train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss, "val_acc": val_acc}, epoch)
        print(f"Epoch {epoch:02d}: val loss={val_loss:.4f}", flush=True)
    print("TEST: loss={:.4f}, acc={:.4f}".format(*notebook_epoch(model, data["test"], None)), flush=True)
    return model


def with_mlflow(path: Path, epochs: int) -> None:
    import mlflow

    with mlflow.start_run():
        mlflow.log_params({"pool": "max", "epochs": epochs, "batch_size": BATCH, "lr": LR})
        model = notebook(path, epochs, mlflow.log_metrics)
        mlflow.pytorch.log_model(model, name="model", input_example=example(path))
    print("Model: logged", flush=True)


def with_lightning(path: Path, epochs: int) -> None:
    import lightning
    import mlflow
    from lightning.pytorch.loggers import MLFlowLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = SimplePoolNet("max")

        def score(self, name, batch):
            x, y = batch
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            scores = {f"{name}_loss": loss, f"{name}_acc": (logits.argmax(1) == y).float().mean()}
            self.log_dict(scores, on_step=False, on_epoch=True, batch_size=len(y))
            return loss

        def training_step(self, batch, batch_idx):
            return self.score("train", batch)

        def validation_step(self, batch, batch_idx):
            self.score("val", batch)

        def test_step(self, batch, batch_idx):
            self.score("test", batch)

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                print(f"Epoch {self.current_epoch + 1:02d}", flush=True)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=LR)

    lightning.seed_everything(42, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # it advises more workers, which are slower here
    data, module = loaders(path), Module()
    logger = MLFlowLogger("Default", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, logger=logger, accelerator="cpu", **quiet)
    trainer.fit(module, data["train"], data["val"])
    (scores,) = trainer.test(module, data["test"], verbose=False)
    print(f"TEST: loss={scores['test_loss']:.4f}, acc={scores['test_acc']:.4f}", flush=True)
    with mlflow.start_run(run_id=logger.run_id):
        mlflow.pytorch.log_model(module.net, name="model", input_example=example(path))
    print("Model: logged", flush=True)


# --- the measurement ----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One process from start to exit: seconds, and the MB of it and its children together."""

    seconds: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)  # seconds until a line of `MARKS` was printed
    acc: list[float] = field(default_factory=list)
    peak: float = 0.0


def memory(process: psutil.Process) -> float:
    """MB that a process and all below it have in memory."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended, the others go on
                used = each.memory_full_info()
                total += getattr(used, "pss", used.uss)
    return total / 1e6


def measured(command: list[str], folder: Path) -> Measured:
    """Run a command in a folder, whose store and local state it uses."""
    environment = os.environ | {"POOLNET_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/m.db"}
    if "lightning" not in command:  # where it is installed, MLflow imports it for every model
        (folder / "sitecustomize.py").write_text(HIDE)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    result, start = Measured(), time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as running:

        def watch() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(running.pid)
                while running.returncode is None:
                    result.peak = max(result.peak, memory(process))
                    time.sleep(0.2)

        threading.Thread(target=watch, daemon=True).start()
        for line in running.stdout:
            for mark, begin in MARKS.items():
                if line.startswith(begin):
                    result.marks.setdefault(mark, time.perf_counter() - start)
            result.acc += map(float, re.findall(r"TEST: .*acc=(\S+)", line))
        running.wait()
    result.seconds = time.perf_counter() - start
    if running.returncode:
        raise click.ClickException(f"{' '.join(command)} failed")
    return result


def script(name: str, path: Path, epochs: int) -> list[str]:
    return [sys.executable, __file__, "--script", name, "--data", str(path), "--epochs", str(epochs)]


def train(path: Path) -> list[str]:
    return [sys.executable, "-m", "poolnet", "train", "--data", str(path), "--epochs", str(EPOCHS)]


def extrapolated(one: float, two: float) -> float:
    """The seconds of all epochs, from those of a process of one epoch and of one of two."""
    return one + (EPOCHS - 1) * max(0.0, two - one)  # of few images, the noise is larger than an epoch


def rows(names: tuple[str, ...], path: Path, whole: bool) -> dict[str, Measured]:
    """One measurement of each row, in turn."""
    jobs = {"imports of poolnet train": [(EPOCHS, [sys.executable, "-c", IMPORTS])]}
    if "poolnet" in names:
        jobs |= {"poolnet, first time": [(EPOCHS, train(path))], "poolnet, again": [(EPOCHS, train(path))]}
    for name in SCRIPTS:
        if name in names:
            jobs[name] = [(n, script(name, path, n)) for n in ((EPOCHS,) if whole else (1, 2))]
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in jobs.items():
            each = [measured(command, Path(folder)) for _, command in commands]
            for (epochs, _), one in zip(commands, each, strict=True):
                if not name.startswith("imports"):
                    check(name, one, path, epochs)
            if len(each) == 2:
                each[1].seconds = extrapolated(*(one.seconds for one in each))
                each[1].marks = {}
            result[name] = each[-1]
    return result


REFERENCE: dict[tuple[Path, int], tuple[float, int]] = {}


def check(name: str, one: Measured, path: Path, epochs: int) -> None:
    """The test accuracy that a row prints is that of the network."""
    if (path, epochs) not in REFERENCE:
        data = poolnet.open_data(path)
        result = poolnet.fit(poolnet.TrainConfig(epochs=epochs, lr=LR, batch_size=BATCH), data)
        REFERENCE[path, epochs] = (result.test.acc, len(data.test))
    expected, n = REFERENCE[path, epochs]
    within = max(0.03, 2 / n**0.5)  # other orders of the batches, and few test images
    if len(one.acc) != 1 or not abs(one.acc[0] - expected) <= within:
        raise click.ClickException(f"{name}, {epochs} epochs: test accuracy {one.acc}, expected {expected:.4f}")


def summary(rounds: list[dict[str, Measured]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds, by row."""
    result = {}
    for name in rounds[0]:
        runs = [each[name] for each in rounds]
        values = {"seconds": statistics.median(run.seconds for run in runs)}
        for mark in runs[0].marks:
            values[mark] = statistics.median(run.marks[mark] for run in runs)
        values["peak MB"] = statistics.median(run.peak for run in runs)
        result[name] = values
    if "poolnet, again" in result:
        for name in SCRIPTS:
            if name in result:
                result[name]["times poolnet"] = result[name]["seconds"] / result["poolnet, again"]["seconds"]
                first = result["poolnet, first time"]["seconds"]
                result[name]["times its first"] = result[name]["seconds"] / first
    return result


def show(result: dict[str, dict[str, float]]) -> None:
    columns = ["seconds", *MARKS, "peak MB", "times poolnet", "times its first"]
    click.echo(" " * 26 + "".join(f"{column:>16}" for column in columns))
    for name, values in result.items():
        cells = (f"{values[column]:16.2f}" if column in values else " " * 16 for column in columns)
        click.echo(f"{name:26}" + "".join(cells))


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Letters, an .npz; random ones without.")
@click.option("--row", "names", multiple=True, type=click.Choice(["poolnet", *SCRIPTS]), help="Only these rows.")
@click.option("--rounds", default=5, show_default=True, help="Measurements of each row; medians are reported.")
@click.option("--scale", default=1.0, show_default=True, help="Random letters: so many times the full size.")
@click.option("--float32", is_flag=True, help="Random letters: stored as float32.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--script", "only", type=click.Choice(SCRIPTS), hidden=True)
@click.option("--epochs", default=EPOCHS, hidden=True)
def main(
    data: Path | None,
    names: tuple[str, ...],
    rounds: int,
    scale: float,
    float32: bool,
    as_json: bool,
    only: str | None,
    epochs: int,
) -> None:
    if only:
        assert data
        scripts = {"notebook": notebook, "mlflow": with_mlflow, "lightning": with_lightning}
        scripts[only](data, epochs)
        return
    names = names or ("poolnet", *SCRIPTS)
    if "lightning" in names and not importlib.util.find_spec("lightning"):
        raise click.ClickException('lightning is not installed; pip install -e ".[bench]", or choose rows with --row')
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POOLNET_HOME"] = f"{folder}/home"
        path = data or random_letters(Path(folder) / "letters.npz", scale, "float32" if float32 else "uint8")
        result = summary([rows(names, path.absolute(), bool(data)) for _ in range(rounds)])
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result)
        if not data:
            click.echo(f"The {EPOCHS} epochs of the scripts are extrapolated from one and two.")


if __name__ == "__main__":
    main()
