"""Find the weights with the lowest train loss, by Newton's method.

A pooled model is softmax regression on fixed features, so its loss is convex. The minimum depends on the data and the
pooling alone: not on a seed, a learning rate or a number of epochs. All is in double precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from poolnet.data.dataset import LETTERS
from poolnet.training.evaluation import threads
from poolnet.training.features import WIDTH

BLOCK = 1024  # images at a time: their products (n, 450) then stay in the processor's cache
OTHERS = len(LETTERS) - 1  # only differences of logits count, so those of the last class are 0
# Of the loss, which the next step would still lower. Each step squares what is left, where there is a minimum.
TOLERANCE = 1e-12
STEPS = 25  # Letters take about 7. Where the loss falls for ever, each step leaves a third: 1e-11 after 25.
RIDGE = 1e-10  # of the diagonal: enough to solve for features that depend on each other, too little to slow the steps


@dataclass(frozen=True)
class Optimum:
    """The weights with the lowest train loss, (50, 10).

    The bias is in the last row. `train_loss` is in nats. It is not `converged` if the loss has no minimum, because it
    falls for ever as the weights grow. Then the loss of some weights is lower still.
    """

    W: np.ndarray
    train_loss: float
    converged: bool

    @threads()
    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the logits (n, 10) float32 of features (n, 50)."""
        return (features @ self.W).astype(np.float32)


@threads()
def find_optimum(features: np.ndarray, y: np.ndarray) -> Optimum:
    """Minimise the mean cross-entropy of features (n, 50).

    A step of Newton's method is halved until it lowers the loss enough (Armijo, 1966).
    """
    theta = np.zeros((OTHERS, WIDTH))
    for _ in range(STEPS):
        loss, gradient, hessian = _derivatives(theta, features, y)
        step = _solved(hessian, gradient)
        gain = float((gradient * step).sum())  # twice what the step lowers the loss of a parabola
        if gain <= TOLERANCE * loss:
            return Optimum(_weights(theta - step), loss, converged=True)
        rate = 1.0
        while rate > TOLERANCE and not _loss(theta - rate * step, features, y) <= loss - 1e-4 * rate * gain:
            rate /= 2
        theta -= rate * step
    return Optimum(_weights(theta), _loss(theta, features, y), converged=False)


@threads()
def loss_of(W: np.ndarray, features: np.ndarray, y: np.ndarray) -> float:
    """Compute the mean cross-entropy of weights (50, 10)."""
    W = W.astype(np.float64)
    return _loss((W[:, :-1] - W[:, -1:]).T, features, y)


def _weights(theta: np.ndarray) -> np.ndarray:
    """Return weights (50, 10) that treat all classes alike."""
    W = np.append(theta.T, np.zeros((WIDTH, 1)), axis=1)
    return W - W.mean(1, keepdims=True)


def _solved(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    diagonal = hessian.diagonal()
    ridge = np.where(diagonal > 0, RIDGE * diagonal, 1)  # a feature that is always 0 stays without weight
    return np.linalg.solve(hessian + np.diag(ridge), gradient.ravel()).reshape(gradient.shape)


def _loss(theta: np.ndarray, features: np.ndarray, y: np.ndarray) -> float:
    return -sum(float(_log_p(theta, x)[np.arange(len(x)), labels].sum()) for x, labels in _blocks(features, y)) / len(y)


def _derivatives(theta: np.ndarray, features: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return loss, gradient (9, 50) and Hessian (450, 450)."""
    loss, gradient = 0.0, np.zeros(theta.shape)
    own, shared = np.zeros((theta.size, WIDTH)), np.zeros((theta.size, theta.size))
    for x, labels in _blocks(features, y):
        log_p = _log_p(theta, x)
        loss -= float(log_p[np.arange(len(x)), labels].sum())
        p = np.exp(log_p[:, :-1])
        gradient += (p - (labels[:, None] == np.arange(OTHERS))).T @ x
        spread = (p[:, :, None] * x[:, None]).reshape(len(x), -1)
        own += spread.T @ x
        shared += spread.T @ spread  # which NumPy computes half of, since it is symmetric
    hessian = -shared.reshape(OTHERS, WIDTH, OTHERS, WIDTH)
    hessian[np.arange(OTHERS), :, np.arange(OTHERS)] += own.reshape(OTHERS, WIDTH, WIDTH)
    return loss / len(y), gradient / len(y), hessian.reshape(shared.shape) / len(y)


def _log_p(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return log-probabilities (n, 10)."""
    logits = np.append(x @ theta.T, np.zeros((len(x), 1)), axis=1)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _blocks(features: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(y), BLOCK):
        yield features[start : start + BLOCK].astype(np.float64), y[start : start + BLOCK]
