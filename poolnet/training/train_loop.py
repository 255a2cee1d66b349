"""Train a network: the readable training loop.

It uses Adam on cross-entropy, with one pass over shuffled batches an epoch. No files and no MLflow are used. `fit` runs
all of it. Batch order and initial weights depend on the seed alone. They do not depend on the device or on whether the
training was interrupted.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from poolnet.data.dataset import Dataset, Split
from poolnet.errors import RunError
from poolnet.training.config import CONV, PLATEAU_MARGIN, Arithmetic, TrainConfig
from poolnet.training.device import resolve_device
from poolnet.training.evaluation import Evaluation, Fetch, evaluate, fetcher, threads
from poolnet.training.model import TwoLayerNet, build_model


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch.

    Train figures are means over the batches, weighted by batch size. Each batch is measured before its own step.
    """

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
    """A trained network, its history and its scores."""

    model: TwoLayerNet
    history: tuple[EpochRecord, ...]
    val: Evaluation  # with the final weights
    test: Evaluation


State = dict[str, np.ndarray]  # all that the rest of a training depends on


@dataclass(frozen=True)
class Start:
    """The epochs already done, and the state after them."""

    history: tuple[EpochRecord, ...]
    state: State


OnEpoch = Callable[[EpochRecord], object]
OnState = Callable[[State], object]
ResumeFrom = Callable[[State], Start | None]  # from the first state of a new training to one of the same form


class Learner(Protocol):
    """The interface of what `run_epochs` trains."""

    def train_epoch(self, order: torch.Tensor, batch_size: int) -> tuple[float, float]:
        """Train on the images in this order; return loss, accuracy."""

    def evaluate(self, split: Split) -> Evaluation: ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


def fit(
    config: TrainConfig,
    splits: Dataset,
    on_epoch: OnEpoch = lambda record: None,
    on_state: OnState = lambda state: None,
    resume_from: ResumeFrom = lambda state: None,
    conv: Arithmetic = CONV,
) -> FitResult:
    """Train for `config.epochs`, then evaluate val and test.

    Each epoch is reported to `on_epoch`, and the state after it to `on_state`. Val and test are evaluated with the
    final weights. With `resume_from`, the rest is trained from a state that was reported before, with the same result.
    `conv` is for pool `conv` only.
    """
    device = torch.device(resolve_device(config.device))
    model = build_model(config.pool, config.seed).to(device)
    fast = config.pool == "conv" and device.type == "cpu" and conv.layout == "channels_last"
    learner = Autograd(model, config.lr, {split.name: fetcher(split, device) for split in splits}, fast)
    with threads(conv.threads if config.pool == "conv" else 1):
        history = run_epochs(config, splits, learner, on_epoch, on_state, resume_from)
        return FitResult(model, history, learner.evaluate(splits.val), learner.evaluate(splits.test))


def run_epochs(
    config: TrainConfig,
    splits: Dataset,
    learner: Learner,
    on_epoch: OnEpoch,
    on_state: OnState,
    resume_from: ResumeFrom,
) -> tuple[EpochRecord, ...]:
    """Train for `config.epochs` and return the history.

    Each epoch is one pass over train, followed by validation. Raises `RunError` if a loss is not finite.
    """
    n = len(splits.train)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[EpochRecord] = []

    def state(epochs: int) -> State:
        return {**learner.state(), "epochs": np.array(epochs), "order": generator.get_state().numpy()}

    if start := resume_from(state(0)):
        history += start.history
        learner.load(start.state)
        generator.set_state(torch.from_numpy(start.state["order"]))
    for epoch in range(len(history) + 1, config.epochs + 1):
        began = time.perf_counter()
        order = torch.randperm(n, generator=generator)
        train_loss, train_acc = learner.train_epoch(order, config.batch_size)
        seconds = time.perf_counter() - began
        val = learner.evaluate(splits.val)
        if not np.isfinite([train_loss, val.loss]).all():
            losses = f"train loss={train_loss:g}, val loss={val.loss:g}"
            raise RunError(f"epoch {epoch}: {losses}, expected finite ones; lr={config.lr:g} may be too high")
        history.append(EpochRecord(epoch, train_loss, train_acc, val.loss, val.acc, seconds, n / seconds))
        on_epoch(history[-1])
        on_state(state(epoch))
    return tuple(history)


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Take a step for each batch; return loss and accuracy."""
    model.train()
    sizes, losses, rights = [], [], []
    for x, y in batches:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        sizes.append(len(y))
        losses.append(loss.detach())  # this and the next stay on the device, so that no batch waits for them
        rights.append((logits.argmax(1) == y).sum())
    return epoch_means(sizes, torch.stack(losses).tolist(), torch.stack(rights).tolist())


def epoch_means(sizes: Sequence[int], losses: Sequence[float], rights: Sequence[int]) -> tuple[float, float]:
    """Return mean loss and accuracy, from those of each batch."""
    return float(np.array(sizes) / sum(sizes) @ np.array(losses)), sum(rights) / sum(sizes)


class Autograd:
    """A torch module trained on its device.

    `fetch` gives inputs and labels of each split by their rows. If `fast`, convolutions on a CPU take 1.14 times less
    time, with other last digits.
    """

    def __init__(self, module: nn.Module, lr: float, fetch: dict[str, Fetch], fast: bool = False):
        self.device = next(module.parameters()).device
        self.module, self.fetch = module, fetch
        if fast:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which its types do not know
        self.optimizer = torch.optim.Adam(module.parameters(), lr=lr, fused=fast or None)
        for weight in module.parameters():  # what Adam makes at its first step, so that every state has one form
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.tensor(0.0), **zeros}

    def train_epoch(self, order: torch.Tensor, batch_size: int) -> tuple[float, float]:
        batches = map(self.fetch["train"], order.to(self.device).split(batch_size))
        return train_one_epoch(self.module, batches, self.optimizer)

    def evaluate(self, split: Split) -> Evaluation:
        return evaluate(self.module.eval(), split, self.fetch[split.name])

    def state(self) -> State:
        """Return the weights, and Adam's running means and step counts."""
        state = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}

    def load(self, state: State) -> None:
        """Take a state over, into the layout of the weights."""
        for name, tensor in self.module.state_dict().items():
            tensor.copy_(torch.from_numpy(state[f"model.{name}"]))
        for index, moments in self.optimizer.state_dict()["state"].items():
            for name, tensor in moments.items():
                tensor.copy_(torch.from_numpy(state[f"adam.{index}.{name}"]))


def score(history: tuple[EpochRecord, ...]) -> dict[str, float]:
    """Summarise a history: best accuracy, its epoch, its plateau.

    The plateau begins with the first epoch whose validation accuracy is within 0.002 of the best of all epochs.
    """
    accs = [record.val_acc for record in history]
    plateau = next(record.epoch for record in history if record.val_acc >= max(accs) - PLATEAU_MARGIN)
    return {"best_val_acc": max(accs), "best_val_epoch": accs.index(max(accs)) + 1, "plateau_epoch": plateau}
