"""Evaluate a model on a split, batch by batch."""

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
CPU_BATCH = 512  # which is 1.6 times as fast for a convolution there, since more do not fit into the caches


@dataclass(frozen=True)
class Evaluation:
    """Loss, accuracy and logits of a model on a split.

    The loss is the mean in nats. `logits` is (N, 10) float32, `y` is (N,) int64.
    """

    loss: float
    acc: float
    logits: np.ndarray
    y: np.ndarray


@contextlib.contextmanager
def threads(torch_threads: int = 1) -> Iterator[None]:
    """Set torch to `torch_threads` and BLAS to one thread.

    These numbers hold on any machine, since the digits of results depend on them. And a second thread gains nothing on
    a pooled model's small arrays: it takes eight times as long, or forty times when another process holds its core.
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
    """Return a function that fetches images and labels.

    It takes rows and returns the images (n, 1, 28, 28) float32 and the labels (n,) on `device`. On a device other than
    the CPU, the split is copied once and stays there.
    """
    if device.type == "cpu":
        return lambda rows: (torch.from_numpy(split.images(rows.numpy())), torch.from_numpy(split.y[rows.numpy()]))
    assert split.X is not None
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
    """Compute loss and accuracy of a model on a split.

    The whole split is used. The model is a module or an exported program. It is used as it is, on its own device.
    """
    device = next(model.parameters()).device
    fetch = fetch or fetcher(split, device)
    rows = torch.arange(len(split), device=device)
    size = CPU_BATCH if device.type == "cpu" else EVAL_BATCH
    logits = torch.cat([model(fetch(part)[0]).cpu() for part in rows.split(size)])
    return score_logits(logits.numpy(), split.y)


def score_logits(logits: np.ndarray, y: np.ndarray) -> Evaluation:
    """Compute loss and accuracy from logits and labels.

    `logits` is (N, 10), `y` is (N,). Sums are in double precision, whatever the type of the logits.
    """
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(y)).item()
    return Evaluation(loss, float((logits.argmax(1) == y).mean()), logits, y)
