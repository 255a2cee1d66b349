"""The record of a run in MLflow. Names of params, metrics, tags and artifacts are written here and nowhere else."""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# before mlflow is imported, and only where the user has not decided otherwise
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `where_to_look` says it, for every store
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's own 7 block for four minutes

import click
import mlflow
import numpy as np
import torch
from filelock import FileLock
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from poolnet import registry
from poolnet.config import InputError, RunError, TrainConfig
from poolnet.data import SIDE, Split, Splits
from poolnet.linear import Optimum
from poolnet.train import PLATEAU_MARGIN, EpochRecord, Evaluation, FitResult, score

SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 1, SIDE, SIDE))]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
)
RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d{1,4}")  # what MLflow calls a run that nobody named


@dataclasses.dataclass(frozen=True)
class Run:
    """An MLflow run that is being written."""

    run_id: str
    experiment_id: str
    config: TrainConfig
    splits: Splits
    device: torch.device

    def log_epoch(self, record: EpochRecord) -> None:
        """The six per-epoch metrics, step = epoch."""
        values = dataclasses.asdict(record)
        step = values.pop("epoch")
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        mlflow.MlflowClient().log_batch(self.run_id, metrics=metrics)

    def log_result(self, result: FitResult, optimum: Optimum | None = None) -> int | None:
        """Scores, predictions, the model and the description. Returns the model version, if one is registered."""
        with tempfile.TemporaryDirectory() as folder:
            _write_predictions(Path(folder), result)
            mlflow.log_artifacts(folder, "predictions")
        model_id = _log_model(result, self.splits.test, step=self.config.epochs)
        # What is known once has no step: the UI compares such metrics as bars, and others as dots on a line of epochs.
        once = score(result.history)
        if optimum:
            once |= {"optimum_train_loss": optimum.train_loss, "optimality_gap": optimum.gap}
        mlflow.log_metrics(once)
        tested = {"test_loss": result.test.loss, "test_acc": result.test.acc}
        mlflow.log_metrics(tested, model_id=model_id, dataset=_dataset(self.splits, self.splits.test))
        version = None
        if self.config.register:
            digest = self.splits.sha256
            version = registry.register(model_id, self.config.pool, self.config.seed, result, digest)
        mlflow.set_tag("mlflow.note.content", summary(self, result, version, optimum))
        return version

    def log_figures(self, result: FitResult, optimum: Optimum | None = None) -> None:
        from poolnet import figures  # matplotlib takes a second, for which nobody waits here

        with tempfile.TemporaryDirectory() as folder:
            figures.save_all(Path(folder), figures.of_run(self.config, self.splits, result, optimum))
            mlflow.log_artifacts(folder, "figures")

    def where_to_look(self) -> str:
        """The link of the run's page, or the command that serves it and the link."""
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        uri = mlflow.get_tracking_uri()
        if uri.startswith(("http://", "https://")):
            parts = urlsplit(uri)
            server = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))  # no password on the screen
            return f"{server.rstrip('/')}/{page}"
        shown = shlex.quote(uri) if uri.startswith("sqlite:") else '"$MLFLOW_TRACKING_URI"'  # nor that of a database
        return f"mlflow ui --backend-store-uri {shown}\nthen http://127.0.0.1:5000/{page}"


@contextlib.contextmanager
def run(config: TrainConfig, splits: Splits, device: torch.device) -> Iterator[Run]:
    """A run from its first record to its final status: FINISHED, KILLED when interrupted, or FAILED.

    Under `mlflow run` it is the run that MLflow has already made. What the server refuses is a `RunError`.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its notices would hide the epochs
    try:
        _create_store(mlflow.get_tracking_uri())
        name = f"{config.pool}-seed{config.seed}"
        adopted = _adopted(config)
        info = mlflow.start_run(run_name=None if adopted else name).info
        status = "FAILED"
        try:
            if adopted and RANDOM_NAME.fullmatch(adopted.info.run_name):
                mlflow.set_tag("mlflow.runName", name)
            started = Run(info.run_id, info.experiment_id, config, splits, device)
            _log_start(started, known=adopted.data.params if adopted else {})
            yield started
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            mlflow.end_run(status)
    except MlflowException as error:
        raise RunError(f"the tracking server refuses or is not there: {error}") from error


def summary(run: Run, result: FitResult, version: int | None, optimum: Optimum | None) -> str:
    """The run's description in the UI, in Markdown: the result, what it rests on, and how to use and repeat it."""
    config, splits, last = run.config, run.splits, result.history[-1]
    once = score(result.history)
    low, high = _accuracy_interval(result.test)
    options = " ".join(
        f"--{field.name} {shlex.quote(str(getattr(config, field.name)))}" for field in dataclasses.fields(config)
    )
    sizes = " / ".join(f"{len(split):,}" for split in splits)
    commit, dirty, _ = code_state()
    lines = [
        f"**Test accuracy {result.test.acc:.4f}**, 95 % interval over the {len(splits.test):,} test letters "
        f"{low:.4f} to {high:.4f} (Wilson; other seeds vary as well). Test loss {result.test.loss:.4f}.",
        "",
        "| final weights | train, last epoch | val | test |",
        "|---|---|---|---|",
        f"| loss | {last.train_loss:.4f} | {result.val.loss:.4f} | {result.test.loss:.4f} |",
        f"| accuracy | {last.train_acc:.4f} | {result.val.acc:.4f} | {result.test.acc:.4f} |",
        "",
        f"- Best validation accuracy: {once['best_val_acc']:.4f} in epoch {once['best_val_epoch']}; "
        f"within {PLATEAU_MARGIN} of it from epoch {once['plateau_epoch']} on",
        f"- Data: `{splits.name}`, train / val / test {sizes}, SHA-256 `{splits.sha256}`"
        + (f". **{splits.overlap:,} test images also occur in train.**" if splits.overlap else ""),
        f"- Code: commit `{commit or 'unknown'}`, uncommitted changes: {dirty}",
        f"- Machine: {run.device}, torch {torch.__version__} ({torch.get_num_threads()} threads), "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"- Again: `poolnet train {options}`",
    ]
    if optimum:
        lines.append(
            f"- Lowest train loss that any weights reach: {optimum.train_loss:.6f}; the trained ones are "
            f"{optimum.gap:.6f} above it"
        )
    if version:
        lines.append(f'- Use: `mlflow.pytorch.load_model("models:/{registry.NAME}/{version}")`')
    return "\n".join(lines)


def code_state() -> tuple[str | None, str, bytes]:
    """The commit that runs, whether tracked files differ from it (`true`, `false`, `unknown`), and how they differ."""
    if not _git("ls-files", "--error-unmatch", "__init__.py"):  # installed, or no git here
        return None, "unknown", b""
    diff = _git("diff", "HEAD", "--binary")
    return _git("rev-parse", "HEAD").decode().strip(), "true" if diff else "false", diff


def _git(*args: str) -> bytes:
    """What git prints for the package's own repository; nothing where there is none."""
    try:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def _create_store(uri: str) -> None:
    """Make a fresh SQLite store under a lock: two processes that make one at once break it for good."""
    path = uri.partition("sqlite:///")[2]
    if path:
        with FileLock(f"{path}.lock"):
            mlflow.MlflowClient().search_experiments(max_results=1)


def _adopted(config: TrainConfig) -> mlflow.entities.Run | None:
    """The run that `mlflow run` has made for this process, which must not say anything else than `config`."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    adopted = mlflow.get_run(run_id)
    for name, value in dataclasses.asdict(config).items():
        raw = adopted.data.params.get(name)
        if raw is not None and not _agrees(raw, value):
            raise InputError(f"run {run_id}: {name}: found {raw} in its record, expected {value}; start a new run")
    return adopted


def _agrees(raw: str, value: str | int | float | bool) -> bool:
    """Whether a param as `mlflow run` records it, the raw text and possibly quoted for a shell, means `value`."""
    texts = [raw]
    with contextlib.suppress(ValueError):
        texts += shlex.split(raw)
    for text in texts:
        with contextlib.suppress(click.BadParameter):
            if click.types.convert_type(type(value))(text) == value:
                return True
    return False


def _log_start(run: Run, known: dict[str, str]) -> None:
    """Params, tags, datasets and the state of the code: all that is known before the first epoch."""
    params = [Param(name, str(value)) for name, value in dataclasses.asdict(run.config).items() if name not in known]
    commit, dirty, diff = code_state()
    tags = {
        "poolnet.data_sha256": run.splits.sha256,
        "poolnet.device": str(run.device),
        "poolnet.git_dirty": dirty,
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit
    mlflow.MlflowClient().log_batch(run.run_id, params=params, tags=[RunTag(*tag) for tag in tags.items()])
    for split in run.splits:
        mlflow.log_input(_dataset(run.splits, split), context=split.name)
    if diff:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "git.diff"
            path.write_bytes(diff)
            mlflow.log_artifact(path)


def _dataset(splits: Splits, split: Split) -> mlflow.data.numpy_dataset.NumpyDataset:
    # By its type, since MLflow resolves a bare path to two sources and warns. Its own digest reads 10,000 numbers only.
    source = get_dataset_source_from_json(json.dumps({"uri": str(splits.path)}), "local")
    return mlflow.data.from_numpy(split.X, source, split.y, name=splits.name, digest=split.sha256[:32])


def _log_model(result: FitResult, test: Split, step: int) -> str:
    """The model as an exported program, free of pickle, for any batch size. Returns MLflow's model id."""
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ("mlflow", "numpy", "torch")}
    info = mlflow.pytorch.log_model(
        copy.deepcopy(result.model).cpu().eval(),
        name="model",
        step=step,
        signature=SIGNATURE,
        input_example=test.images(np.arange(2) % len(test)),  # of one image, the export would take only one
        serialization_format="pt2",
        pip_requirements=[f"{name}=={version}" for name, version in versions.items()],  # inferring takes 10 s
    )
    return info.model_id


def _write_predictions(folder: Path, result: FitResult) -> None:
    for name, evaluation in (("val", result.val), ("test", result.test)):
        np.savez(folder / f"{name}.npz", logits=evaluation.logits, y=evaluation.y)


def _accuracy_interval(evaluation: Evaluation) -> tuple[float, float]:
    """Wilson's 95 % score interval for the accuracy, over examples (Wilson 1927)."""
    from scipy.stats import binomtest  # half a second, which the first epoch need not wait for

    correct = int((evaluation.logits.argmax(1) == evaluation.y).sum())
    return tuple(binomtest(correct, len(evaluation.y)).proportion_ci(method="wilson"))
