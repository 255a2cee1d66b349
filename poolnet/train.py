"""The training loop: Adam on cross-entropy, one pass over shuffled batches an epoch. No files, no MLflow.

`fit` is the whole of it. Batch order and initial weights depend on the seed alone, never on the device, nor on whether
the training was interrupted.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from poolnet import signals
from poolnet.config import InputError, RunError, TrainConfig
from poolnet.data import Split, Splits
from poolnet.evaluate import Evaluation, evaluate, fetcher, threads
from poolnet.model import build_model

CONV_THREADS = 2  # on any machine, since the digits of a convolution's gradient depend on the number
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
class FitResult:
    model: nn.Module
    history: tuple[EpochRecord, ...]
    val: Evaluation  # with the final weights
    test: Evaluation


OnEpoch = Callable[[EpochRecord], object]
State = dict[str, np.ndarray]  # everything that the rest of a training depends on
OnState = Callable[[State], object]
# some batches of an epoch: how many images, their mean loss, how many were right
Part = tuple[int, torch.Tensor | float, torch.Tensor | int]


@dataclass(frozen=True)
class Start:
    """Where a training goes on: the epochs it has behind it, and its state."""

    history: tuple[EpochRecord, ...]
    state: State


class Learner(Protocol):
    """What `run_epochs` trains."""

    def train_epoch(self, order: torch.Tensor, batch_size: int) -> Iterator[Part]:
        """Steps through the images in this order, and stands still after each part with its weights whole."""

    def evaluate(self, split: Split) -> Evaluation: ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


def fit(
    config: TrainConfig,
    splits: Splits,
    on_epoch: OnEpoch = lambda record: None,
    on_state: OnState = lambda state: None,
    start: Start | None = None,
    conv_threads: int = CONV_THREADS,
) -> FitResult:
    """Train for `config.epochs`, report each epoch to `on_epoch` and the state after it to `on_state`, evaluate val and
    test with the final weights. With `start`, a state reported before, the rest is trained, to the same result."""
    device = resolve_device(config.device)
    model = build_model(config.pool, config.seed).to(device)
    learner = WholeNet(model, config.lr, splits, device)
    with threads(conv_threads if config.pool == "conv" else 1):
        history = run_epochs(config, splits, learner, on_epoch, on_state, start)
        return FitResult(model, history, learner.evaluate(splits.val), learner.evaluate(splits.test))


def run_epochs(
    config: TrainConfig,
    splits: Splits,
    learner: Learner,
    on_epoch: OnEpoch,
    on_state: OnState,
    start: Start | None,
) -> tuple[EpochRecord, ...]:
    """The history of `config.epochs` passes over train, each followed by validation; a loss must be finite.

    When the process is asked to stop, `signals.Stop` comes after the batch in hand, with the state as it then is.
    """
    n = len(splits.train)
    order = torch.Generator().manual_seed(config.seed)
    history, parts, spent = [], [], 0.0
    if start:
        history = list(start.history)
        learner.load(start.state)
        order.set_state(torch.from_numpy(start.state["order"]))
        parts = [(int(images), loss, int(right)) for images, loss, right in start.state["parts"]]
        spent = float(start.state["spent"])
    with signals.held():
        while len(history) < config.epochs:
            began, before = time.perf_counter() - spent, order.get_state()
            try:
                left = torch.randperm(n, generator=order)[sum(images for images, *_ in parts) :]
                for part in learner.train_epoch(left, config.batch_size) if len(left) else ():
                    parts.append(part)
                    spent = time.perf_counter() - began
                    signals.check()
                train_loss, train_acc = _totals(parts)
                spent = time.perf_counter() - began  # on another device the batches are done only now
                val = learner.evaluate(splits.val)
            except signals.Stop as stop:
                stop.state = learner.state() | _position(len(history), before, parts, spent)
                raise
            epoch = len(history) + 1
            if not np.isfinite([train_loss, val.loss]).all():
                losses = f"train loss={train_loss:g}, val loss={val.loss:g}"
                raise RunError(f"epoch {epoch}: {losses}, expected finite ones; lr={config.lr:g} may be too high")
            history.append(EpochRecord(epoch, train_loss, train_acc, val.loss, val.acc, spent, n / spent))
            parts, spent = [], 0.0
            on_epoch(history[-1])
            on_state(learner.state() | _position(epoch, order.get_state(), parts, spent))
    return tuple(history)


def _totals(parts: list[Part]) -> tuple[float, float]:
    """Mean loss and accuracy of an epoch, from those of its parts."""
    images, losses, rights = (_numbers(column) for column in zip(*parts, strict=True))
    shares = np.array(images) / sum(images)
    return float(shares @ np.array(losses)), int(sum(rights)) / sum(images)


def _numbers(column: Sequence[torch.Tensor | float]) -> list[float]:
    """Numbers, of which the later ones may still be on a device, where no batch had to wait for them."""
    waiting = [number for number in column if isinstance(number, torch.Tensor)]
    known = [float(number) for number in column[: len(column) - len(waiting)]]
    return known + (torch.stack(waiting).tolist() if waiting else [])


def _position(epochs: int, order: torch.Tensor, parts: list[Part], spent: float) -> State:
    """Where a training stands: its whole epochs, the generator as it was after them, and the parts of the next."""
    columns = [_numbers(column) for column in zip(*parts, strict=True)]
    numbers = np.array(columns, np.float64).reshape(3, -1).T
    return {"epochs": np.array(epochs), "order": order.numpy(), "parts": numbers, "spent": np.array(spent)}


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> Iterator[Part]:
    """One optimiser step a batch. Yields each batch's size, mean loss and number of right answers before its step."""
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        yield len(y), loss.detach(), (logits.argmax(1) == y).sum()  # these stay on the device: no waiting for each


class WholeNet:
    """A network trained as it stands, on the images."""

    def __init__(self, model: nn.Module, lr: float, splits: Splits, device: torch.device):
        self.model, self.device = model, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.fetch = {split.name: fetcher(split, device) for split in splits}

    def train_epoch(self, order: torch.Tensor, batch_size: int) -> Iterator[Part]:
        batches = map(self.fetch["train"], order.to(self.device).split(batch_size))
        return train_one_epoch(self.model, batches, self.optimizer)

    def evaluate(self, split: Split) -> Evaluation:
        return evaluate(self.model.eval(), split, self.fetch[split.name])

    def state(self) -> State:
        return module_state(self.model, self.optimizer)

    def load(self, state: State) -> None:
        load_module_state(state, self.model, self.optimizer)


def module_state(model: nn.Module, optimizer: torch.optim.Adam) -> State:
    """Weights, and Adam's running means and step count of each."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def load_module_state(state: State, model: nn.Module, optimizer: torch.optim.Adam) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in state.items() if name.startswith(("model.", "adam."))}
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


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
