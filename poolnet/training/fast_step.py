"""Train softmax regression on pooled features, fast.

The gradient is written out and the step allocates nothing. It takes the same initial weights, the same batches and the
same updates as `train_loop.fit` does for a pooled model, and must give the same figures. `train_loop.py` is the
readable reference. On the CPU the step is 19 NumPy calls into buffers, each about a microsecond. Autograd and an
optimiser object take ten times as long for the same arithmetic.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from poolnet.data.dataset import LETTERS, Dataset, Split
from poolnet.training.config import TrainConfig
from poolnet.training.device import resolve_device
from poolnet.training.evaluation import Evaluation, Fetch, score_logits, threads
from poolnet.training.features import WIDTH
from poolnet.training.model import TwoLayerNet, build_model
from poolnet.training.train_loop import (
    Autograd,
    FitResult,
    Learner,
    OnEpoch,
    OnState,
    ResumeFrom,
    State,
    epoch_means,
    run_epochs,
)

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults
BLOCK = 16_384  # images gathered together: enough to make the hand-over cheap, few enough for the processor's cache


def fit(
    config: TrainConfig,
    splits: Dataset,
    features: dict[str, np.ndarray],
    on_epoch: OnEpoch = lambda record: None,
    on_state: OnState = lambda state: None,
    resume_from: ResumeFrom = lambda state: None,
) -> FitResult:
    """Do as `train_loop.fit`, on pooled features (N, 50)."""
    device = torch.device(resolve_device(config.device))
    model = build_model(config.pool, config.seed).to(device)
    if device.type == "cpu":
        learner: Learner = FastSoftmaxRegression(model, config.lr, features, splits.train.y)
    else:  # where the features stay, and nothing waits within an epoch
        fetch = {split.name: fetcher_of_features(features[split.name], split.y, device) for split in splits}
        learner = Autograd(model.classifier, config.lr, fetch)
    with threads():
        history = run_epochs(config, splits, learner, on_epoch, on_state, resume_from)
        return FitResult(model, history, learner.evaluate(splits.val), learner.evaluate(splits.test))


def fetcher_of_features(features: np.ndarray, y: np.ndarray, device: torch.device) -> Fetch:
    """Do as `evaluation.fetcher`, for features (n, 49)."""
    x, labels = torch.tensor(features[:, :-1], device=device), torch.tensor(y, device=device)
    return lambda rows: (x[rows], labels[rows])


def weights(model: TwoLayerNet) -> torch.Tensor:
    """Return the classifier as (50, 10), with the bias last."""
    fc = model.classifier
    return torch.cat([fc.weight.detach().T, fc.bias.detach()[None]]).cpu()


class FastSoftmaxRegression:
    """Softmax regression, trained by Adam in NumPy buffers.

    The classifier of `model` is held as one array `W` (50, 10) with the bias in its last row. It runs on the CPU.

    Adam (Kingma & Ba, 2015) divides m / (1 - b1^t) by sqrt(v / (1 - b2^t)) + eps, where m and v are running means of
    the gradient g and of its square. This class stores M = m / (1 - b1) and V = v / (1 - b2), which grow by plain
    addition: M <- b1 M + g and V <- b2 V + g^2. With q_t = sqrt((1 - b2) / (1 - b2^t)) the same step reads

        W <- W - rate_t M / (sqrt(V) + eps_t),   rate_t = lr (1 - b1) / ((1 - b1^t) q_t),   eps_t = eps / q_t
    """

    def __init__(self, model: TwoLayerNet, lr: float, features: dict[str, np.ndarray], y: np.ndarray):
        self.model, self.lr, self.features, self.y = model, lr, features, y.astype(np.uint8)
        self.W = weights(model).numpy()
        self.M, self.V, self.t = np.zeros_like(self.W), np.zeros_like(self.W), 0

    def train_epoch(self, order: torch.Tensor, batch_size: int) -> tuple[float, float]:
        """Take a step for each batch; return loss and accuracy."""
        with np.errstate(all="ignore"):  # a loss that is not finite is reported for the whole epoch
            blocks = [(y.size, *self._steps(x, y)) for x, y in self._gathered(order.numpy(), batch_size)]
        self._to_model()
        sizes, losses, rights = zip(*blocks, strict=True)
        assert sum(sizes) == len(order)
        return epoch_means(sizes, losses, rights)

    def _gathered(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gather the features and labels of several batches.

        Yields x (k, n, 50) and y (k, n) for k batches of n images. The last, shorter batch comes by itself. While one
        block is in use, another thread gathers the next: this waits for memory, it does not compute.
        """
        whole = len(order) - len(order) % batch_size
        size = max(1, BLOCK // batch_size) * batch_size
        blocks = [order[start : min(start + size, whole)] for start in range(0, whole, size)]
        blocks += [order[whole:]] if whole < len(order) else []
        buffers = np.empty((2, min(size, len(order)), WIDTH), np.float32)

        def gather(index: int) -> tuple[np.ndarray, np.ndarray]:
            rows = blocks[index]
            n = min(batch_size, len(rows))
            x = buffers[index % 2, : len(rows)]
            np.take(self.features["train"], rows, axis=0, out=x, mode="clip")  # "raise" copies through a buffer
            return x.reshape(-1, n, WIDTH), self.y.take(rows).reshape(-1, n)

        with ThreadPoolExecutor(1) as other:
            coming = other.submit(gather, 0)
            for index in range(1, len(blocks) + 1):
                block = coming.result()
                if index < len(blocks):
                    coming = other.submit(gather, index)
                yield block

    def _steps(self, x: np.ndarray, y: np.ndarray) -> tuple[float, int]:
        """Take a step for each of k batches.

        x is (k, n, 50) and y is (k, n). Returns the mean loss of the batches and how many answers were right.

        Logits and what is computed from them have the letters first, (10, n), so that sums over letters run along
        memory. The logits of all k batches are kept, and converted to loss and accuracy at the end.
        """
        k, n, _ = x.shape
        W, M, V = self.W, self.M, self.V
        share = np.float32(1 / n)
        target = np.multiply(y[:, None] == np.arange(len(LETTERS), dtype=np.uint8)[:, None], share)
        logits = np.empty((k, len(LETTERS), n), np.float32)
        top, total = np.empty((k, n), np.float32), np.empty((k, n), np.float32)
        p, scale = np.empty((len(LETTERS), n), np.float32), np.empty(n, np.float32)
        gradient, step = np.empty_like(W), np.empty_like(W)
        for x_i, z, z_top, z_total, target_i, rate, eps in zip(
            x, logits, top, total, target, *self._schedule(k), strict=True
        ):
            # softmax cross-entropy: its gradient with respect to the logits is (softmax - one-hot) / n
            np.matmul(x_i, W, out=z.T)
            np.maximum.reduce(z, axis=0, out=z_top)
            np.subtract(z, z_top, out=p)
            np.exp(p, out=p)
            np.add.reduce(p, axis=0, out=z_total)
            np.divide(share, z_total, out=scale)
            np.multiply(p, scale, out=p)
            np.subtract(p, target_i, out=p)
            np.dot(x_i.T, p.T, out=gradient)
            # Adam
            M *= BETA1
            M += gradient
            np.multiply(gradient, gradient, out=gradient)
            V *= BETA2
            V += gradient
            np.sqrt(V, out=step)
            step += eps
            np.divide(M, step, out=step)
            step *= rate
            W -= step
        right = np.take_along_axis(logits, y[:, None], 1)[:, 0]
        losses = np.log(total) + top - right
        return float(losses.mean(dtype=np.float64)), int((right >= top).sum())

    def _schedule(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute rate_t and eps_t of the next k steps."""
        t = np.arange(self.t + 1, self.t + k + 1, dtype=np.float64)
        self.t += k
        q = np.sqrt((1 - BETA2) / (1 - BETA2**t))
        rates = self.lr * (1 - BETA1) / ((1 - BETA1**t) * q)
        return rates.astype(np.float32), (EPS / q).astype(np.float32)

    def evaluate(self, split: Split) -> Evaluation:
        return score_logits(self.features[split.name] @ self.W, split.y)

    def state(self) -> State:
        return {"W": self.W.copy(), "M": self.M.copy(), "V": self.V.copy(), "t": np.array(self.t)}

    def load(self, state: State) -> None:
        self.W[:], self.M[:], self.V[:], self.t = state["W"], state["M"], state["V"], int(state["t"])
        self._to_model()

    def _to_model(self) -> None:
        with torch.no_grad():
            self.model.classifier.weight.copy_(torch.from_numpy(self.W[:-1].T))
            self.model.classifier.bias.copy_(torch.from_numpy(self.W[-1]))
