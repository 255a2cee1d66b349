"""The training loop: Adam on cross-entropy, one pass over shuffled batches an epoch. No files, no MLflow.

`fit` is the whole of it. Batch order and initial weights depend on the seed alone, never on the device.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from poolnet import npz
from poolnet.config import InputError, RunError, TrainConfig
from poolnet.data import Split, Splits, windows
from poolnet.model import build_model

EVAL_BATCH = 4096  # images; bounds memory, changes no figure
PLATEAU_MARGIN = 0.002  # of accuracy: what 30 epochs gain once the published run has flattened


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Train figures are means over the batches, each before its own step, weighted by batch size."""

    epoch: int  # from 1
    train_loss: float  # nats an image
    train_acc: float
    val_loss: float  # with the weights at the end of the epoch
    val_acc: float
    epoch_seconds: float  # the pass over train, without validation
    examples_per_second: float  # of that pass

    def __str__(self) -> str:
        return (
            f"Epoch {self.epoch:02d}: train loss={self.train_loss:.4f}, acc={self.train_acc:.4f} | "
            f"val loss={self.val_loss:.4f}, acc={self.val_acc:.4f}"
        )


@dataclass(frozen=True)
class Evaluation:
    """A split seen by a model: mean loss in nats, accuracy, and `logits` (N, 10) float32 beside `y` (N,) int64."""

    loss: float
    acc: float
    logits: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class FitResult:
    model: nn.Module
    history: tuple[EpochRecord, ...]
    val: Evaluation  # with the final weights
    test: Evaluation


OnEpoch = Callable[[EpochRecord], object]


def fit(config: TrainConfig, splits: Splits, on_epoch: OnEpoch = lambda record: None) -> FitResult:
    """Train for `config.epochs`, report each epoch to `on_epoch`, evaluate val and test with the final weights."""
    device = resolve_device(config.device)
    model = build_model(config.pool, config.seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    order = torch.Generator().manual_seed(config.seed)
    fetch = {split.name: fetcher(split, device) for split in splits}

    def train() -> tuple[float, float]:
        rows = torch.randperm(len(splits.train), generator=order).to(device)
        return train_one_epoch(model, map(fetch["train"], rows.split(config.batch_size)), optimizer)

    with threads(torch.get_num_threads() if config.pool == "conv" else 1):
        history = run_epochs(
            config, len(splits.train), train, lambda: evaluate(model, splits.val, fetch["val"]), on_epoch
        )
        val = evaluate(model, splits.val, fetch["val"])
        return FitResult(model, history, val, evaluate(model, splits.test, fetch["test"]))


def run_epochs(
    config: TrainConfig,
    examples: int,
    train: Callable[[], tuple[float, float]],
    evaluate_val: Callable[[], Evaluation],
    on_epoch: OnEpoch,
) -> tuple[EpochRecord, ...]:
    """The history of `config.epochs` calls of `train`, each followed by validation; a loss must be finite."""
    history = []
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        train_loss, train_acc = train()
        seconds = time.perf_counter() - start
        val = evaluate_val()
        if not np.isfinite([train_loss, val.loss]).all():
            losses = f"train loss={train_loss:g}, val loss={val.loss:g}"
            raise RunError(f"epoch {epoch}: {losses}, expected finite ones; lr={config.lr:g} may be too high")
        history.append(EpochRecord(epoch, train_loss, train_acc, val.loss, val.acc, seconds, examples / seconds))
        on_epoch(history[-1])
    return tuple(history)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads within one operation. The small ones of a pooled model gain nothing from a second thread, and
    wait for it some forty times as long as they take when another process holds its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_one_epoch(
    model: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """One optimiser step a batch. Returns the epoch's mean loss and accuracy, taken before each step."""
    model.train()
    sizes, losses, corrects = [], [], []
    for x, y in batches:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        sizes.append(len(y))
        losses.append(loss.detach())  # figures stay on the device until the epoch is over: no waiting for each
        corrects.append((logits.argmax(1) == y).sum())
    weights = np.array(sizes) / sum(sizes)
    loss = weights @ torch.stack(losses).cpu().double().numpy()
    return float(loss), int(torch.stack(corrects).sum()) / sum(sizes)


Fetch = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fetcher(split: Split, device: torch.device) -> Fetch:
    """`fetch(rows)` gives those images (n, 1, 28, 28) float32 and labels (n,) on `device`.

    On the CPU they are read from the split as it is mapped; to another device the split is copied once, and stays.
    """
    if device.type == "cpu":
        return lambda rows: (torch.from_numpy(split.images(rows.numpy())), torch.from_numpy(split.y[rows.numpy()]))
    stored = torch.uint8 if split.X.dtype == np.uint8 else torch.float32
    X = torch.empty((len(split), *split.X.shape[1:]), dtype=stored, device=device)
    for start, window in zip(range(0, len(split), npz.ROWS), windows(split.X), strict=True):
        X[start : start + len(window)] = torch.tensor(window).to(stored)
    y = torch.tensor(split.y, device=device)

    def fetch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = X[rows][:, None].float()
        return x.div_(255) if stored == torch.uint8 else x, y[rows]

    return fetch


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, fetch: Fetch | None = None) -> Evaluation:
    """Loss and accuracy over the whole split, on the device that the model is on."""
    model.eval()
    device = next(model.parameters()).device
    fetch = fetch or fetcher(split, device)
    rows = torch.arange(len(split), device=device)
    logits = torch.cat([model(fetch(part)[0]).cpu() for part in rows.split(EVAL_BATCH)])
    return score_logits(logits.numpy(), split.y)


def score_logits(logits: np.ndarray, y: np.ndarray) -> Evaluation:
    """What (N, 10) logits say about labels (N,): summed in double precision, whatever the logits are in."""
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(y)).item()
    return Evaluation(loss, float((logits.argmax(1) == y).mean()), logits, y)


def score(history: tuple[EpochRecord, ...]) -> dict[str, float]:
    """What a history says once: the best validation accuracy, its epoch, and where the plateau begins.

    The plateau begins with the first epoch whose validation accuracy is within 0.002 of the best of all epochs.
    """
    accs = [record.val_acc for record in history]
    plateau = next(record.epoch for record in history if record.val_acc >= max(accs) - PLATEAU_MARGIN)
    return {"best_val_acc": max(accs), "best_val_epoch": accs.index(max(accs)) + 1, "plateau_epoch": plateau}


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. A device that is unknown or not there raises `InputError`."""
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *present]
    if name != "auto" and name not in present:
        raise InputError(f"device: found {name!r}, expected one that is here: auto, {', '.join(present)}")
    return torch.device(present[0] if name == "auto" else name)
