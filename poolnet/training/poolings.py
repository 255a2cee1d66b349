"""The poolings: 2x2 pixels become one, without weights to learn.

To add one, add an entry to `POOLINGS`. NumPy and torch are imported when they are used, because the command line lists
the poolings without them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Pooling:
    """A pooling in NumPy and in torch, the same to the bit.

    `of_array` takes pixels (n, 2h, 2w) float32 and returns (n, h, w). `layer` makes the module from `torch.nn`. If the
    pooling `picks` one of the pixels, `of_array` gets them as they are stored, which is faster.
    """

    of_array: Callable[["np.ndarray"], "np.ndarray"]
    layer: Callable[[Any], Any]
    picks: bool = False


def _max(x: "np.ndarray") -> "np.ndarray":
    from numpy import maximum

    rows = maximum(x[:, ::2], x[:, 1::2])
    return maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _avg(x: "np.ndarray") -> "np.ndarray":
    mean = x[:, ::2, ::2] + x[:, ::2, 1::2]  # added in torch's order, on which the last bit depends
    mean += x[:, 1::2, ::2]
    mean += x[:, 1::2, 1::2]
    mean /= 4
    return mean


def _lp(x: "np.ndarray") -> "np.ndarray":
    from numpy import sqrt, square

    return sqrt(_avg(square(x)))


def _lp_layer(nn: Any) -> Any:
    class RootMeanSquare(nn.AvgPool2d):  # type: ignore[misc, name-defined]  # nn is given: this module needs no torch
        def forward(self, x: Any) -> Any:
            mean = super().forward(x.square())
            # torch's root of float32 on a CPU is not always the nearest number
            return mean.double().sqrt().to(x.dtype) if x.is_cpu else mean.sqrt()

    return RootMeanSquare(kernel_size=2, stride=2)


def _stride(x: "np.ndarray") -> "np.ndarray":
    return x[:, ::2, ::2]


POOLINGS = {
    "max": Pooling(_max, lambda nn: nn.MaxPool2d(kernel_size=2, stride=2), picks=True),
    "avg": Pooling(_avg, lambda nn: nn.AvgPool2d(kernel_size=2, stride=2)),
    # The root of the mean square. LPPool2d(2) takes the root of the sum, which is twice as large. After two layers the
    # features would be four times as large, which is as good as a higher lr: it "wins" 0.84 points after 30 epochs, and
    # nothing at the optimum.
    "lp": Pooling(_lp, _lp_layer),
    "stride": Pooling(_stride, lambda nn: nn.MaxPool2d(kernel_size=1, stride=2), picks=True),  # the first of four
}
