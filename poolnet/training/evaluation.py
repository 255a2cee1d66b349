"""A model on a split: loss, accuracy and logits, in a stream of batches. No files, no MLflow."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from poolnet.data.dataset import Split

EVAL_BATCH = 4096  # images; bounds memory, changes no figure


@dataclass(frozen=True)
class Evaluation:
    """A split seen by a model: mean loss in nats, accuracy, and `logits` (N, 10) float32 beside `y` (N,) int64."""

    loss: float
    acc: float
    logits: np.ndarray
    y: np.ndarray


@contextlib.contextmanager
def threads(torch_threads: int = 1) -> Iterator[None]:
    """Compute with so many torch threads, and one of BLAS, on any machine.

    Digits depend on their number. And a second thread gains nothing on a pooled model's small arrays: it takes eight
    times as long, or forty when another process holds its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


Fetch = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fetcher(split: Split, device: torch.device) -> Fetch:
    """`fetch(rows)` gives those images (n, 1, 28, 28) float32 and labels (n,) on `device`.

    To another device than the CPU the split is copied once, and stays.
    """
    if device.type == "cpu":
        return lambda rows: (torch.from_numpy(split.images(rows.numpy())), torch.from_numpy(split.y[rows.numpy()]))
    stored = torch.uint8 if split.X.dtype == np.uint8 else torch.float32
    X = torch.tensor(split.X, dtype=stored, device=device)
    y = torch.tensor(split.y, device=device)

    def fetch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = X[rows][:, None].float()
        return x.div_(255) if stored == torch.uint8 else x, y[rows]

    return fetch


@threads()
@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, fetch: Fetch | None = None) -> Evaluation:
    """Loss and accuracy over the whole split, by a module or an exported program as it stands, on its own device."""
    device = next(model.parameters()).device
    fetch = fetch or fetcher(split, device)
    rows = torch.arange(len(split), device=device)
    logits = torch.cat([model(fetch(part)[0]).cpu() for part in rows.split(EVAL_BATCH)])
    return score_logits(logits.numpy(), split.y)


def score_logits(logits: np.ndarray, y: np.ndarray) -> Evaluation:
    """What (N, 10) logits say about labels (N,): summed in double precision, whatever the logits are in."""
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(y)).item()
    return Evaluation(loss, float((logits.argmax(1) == y).mean()), logits, y)
