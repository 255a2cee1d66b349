"""Define the pooling networks and the convolutional baseline.

This is the only module that knows their architecture. Input is (N, 1, 28, 28) float32, output is logits (N, 10).
`features(x)` is what the linear `classifier` sees.
"""

import torch
from torch import nn

from poolnet.data.dataset import FLOAT_LIMIT
from poolnet.training.poolings import POOLINGS

PIXELS = "pixels: found some that are no numbers or beyond 10, expected 0 to 1"  # 255 is a forgotten division


class TwoLayerNet(nn.Module):
    """Two layers that halve the side, then a linear classifier.

    ReLU follows each of the two: 28x28 -> 14x14 -> 7x7 -> 10 logits.
    """

    def __init__(self, layer1: nn.Module, layer2: nn.Module, channels: int, num_classes: int):
        super().__init__()
        self.layer1 = layer1
        self.layer2 = layer2
        self.act = nn.ReLU()
        self.fc = nn.Linear(channels * 7 * 7, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the classifier's input: (N, 1, 28, 28) -> (N, channels * 49)."""
        x = self.act(self.layer1(x))
        x = self.act(self.layer2(x))
        return torch.flatten(x, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class SimplePoolNet(TwoLayerNet):
    """Two 2x2 poolings without weights: only the classifier learns."""

    def __init__(self, pool_type: str, num_classes: int = 10):
        if pool_type not in POOLINGS:
            raise ValueError(f"pool_type: found {pool_type!r}, expected one of {', '.join(POOLINGS)}")
        layer = POOLINGS[pool_type].layer
        super().__init__(layer(nn), layer(nn), 1, num_classes)


class SimpleConvNet(TwoLayerNet):
    """The baseline: the two strided 3x3 convolutions that pooling replaced."""

    def __init__(self, channels: tuple[int, int] = (16, 32), num_classes: int = 10):
        first, second = channels
        layer1 = nn.Conv2d(1, first, kernel_size=3, stride=2, padding=1)
        layer2 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1)
        super().__init__(layer1, layer2, second, num_classes)


class Checked(nn.Module):
    """A network, as it is served, that refuses impossible pixels."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # false for NaN too; the assertion stays in an exported program
        torch._assert_async((x.abs() <= FLOAT_LIMIT).all(), PIXELS)
        return self.net(x)


def build_model(pool: str, seed: int) -> SimplePoolNet | SimpleConvNet:
    """Build the network for `--pool` with its initial weights.

    The weights are torch's own for `seed`. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SimpleConvNet() if pool == "conv" else SimplePoolNet(pool)
