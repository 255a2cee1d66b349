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

from poolnet.config import InputError, RunError, TrainConfig
from poolnet.data import Split, Splits
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


def fit(
    config: TrainConfig, splits: Splits, on_epoch: Callable[[EpochRecord], None] = lambda record: None
) -> FitResult:
    """Train for `config.epochs`, report each epoch to `on_epoch`, evaluate val and test with the final weights."""
    device = resolve_device(config.device)
    model = build_model(config.pool, config.seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    order = torch.Generator().manual_seed(config.seed)
    history = []
    with threads(torch.get_num_threads() if config.pool == "conv" else 1):
        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            batches = shuffled_batches(splits.train, config.batch_size, order, device)
            train_loss, train_acc = train_one_epoch(model, batches, optimizer)
            seconds = time.perf_counter() - start
            val = evaluate(model, splits.val)
            if not np.isfinite([train_loss, val.loss]).all():
                losses = f"train loss={train_loss:g}, val loss={val.loss:g}"
                raise RunError(f"epoch {epoch}: {losses}, expected finite ones; lr={config.lr:g} may be too high")
            rate = len(splits.train) / seconds
            history.append(EpochRecord(epoch, train_loss, train_acc, val.loss, val.acc, seconds, rate))
            on_epoch(history[-1])
        return FitResult(model, tuple(history), val, evaluate(model, splits.test))


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


def shuffled_batches(
    split: Split, batch_size: int, order: torch.Generator, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in an order drawn from `order`: x (n, 1, 28, 28) float32, y (n,) int64; n may end short."""
    for rows in torch.randperm(len(split), generator=order).split(batch_size):
        x = torch.from_numpy(split.images(rows.numpy()))
        y = torch.from_numpy(split.y[rows.numpy()])
        yield x.to(device), y.to(device)


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Loss and accuracy over the whole split, on the device that the model is on."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(split), EVAL_BATCH):
        x = torch.from_numpy(split.images(slice(start, start + EVAL_BATCH)))
        parts.append(model(x.to(device)).cpu())
    logits, y = torch.cat(parts), torch.from_numpy(split.y)
    loss = F.cross_entropy(logits.double(), y).item()
    return Evaluation(loss, (logits.argmax(1) == y).double().mean().item(), logits.numpy(), split.y)


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
