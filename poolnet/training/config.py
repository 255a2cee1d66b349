"""The settings of one training run.

They are kept apart from the training because the command line needs the defaults before it imports torch, which is
slow.
"""

import dataclasses
import math
import numbers
import operator
import re
from dataclasses import dataclass
from typing import Any, get_type_hints

from poolnet.data import fold_number
from poolnet.errors import InputError
from poolnet.training.poolings import POOLINGS

PLATEAU_MARGIN = 0.002  # of accuracy: what 30 epochs gain once the published run has flattened
ARM_OPTIONS = ("pool", "epochs", "batch_size", "lr")  # what two arms may differ in
# With data and device, all that the figures depend on; the seed is last.
SAME_RUN = (*ARM_OPTIONS, "fold", "seed")
POOLS = (*POOLINGS, "conv")  # conv: the two strided convolutions that pooling replaced


@dataclass(frozen=True)
class Arithmetic:
    """How `conv` is computed; its last digits depend on it."""

    threads: int = 2  # of torch, on any machine
    layout: str = "channels_last"  # of arrays on a CPU, with a fused Adam; earlier versions had "contiguous"


CONV = Arithmetic()


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run, with their only defaults."""

    data: str = dataclasses.field(default="glyphs", metadata={"help": "glyphs, notmnist, or the path of an .npz file."})
    pool: str = dataclasses.field(default="max", metadata={"help": f"{', '.join(POOLINGS)}, or conv (the baseline)."})
    epochs: int = dataclasses.field(default=30, metadata={"help": "Passes over the training split."})
    batch_size: int = dataclasses.field(default=128, metadata={"help": "Images per optimiser step."})
    lr: float = dataclasses.field(default=0.001, metadata={"help": "Learning rate of Adam."})
    fold: str = dataclasses.field(
        default="", metadata={"help": "Test on one fold of the whole data set, such as 2/5.  [default: its own splits]"}
    )
    seed: int = dataclasses.field(default=42, metadata={"help": "Seed of the initial weights and of the batch order."})
    device: str = dataclasses.field(
        default="auto", metadata={"help": "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N, or mps."}
    )
    register: bool = dataclasses.field(
        default=True, metadata={"help": "Register the model as a version of `poolnet`: yes or no."}
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            object.__setattr__(self, name, _typed(name, kind, getattr(self, name)))
        if self.pool not in POOLS:
            raise InputError(f"pool: found {self.pool!r}, expected one of {', '.join(POOLS)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected a whole number from 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: found {self.lr}, expected a finite number above 0")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(f"device: found {self.device!r}, expected auto, cpu, cuda, cuda:N or mps")
        if self.fold:
            fold_number.parse(self.fold)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: found {self.seed}, expected a whole number from 0 to 2**63 - 1")


def _typed(name: str, kind: type, value: Any) -> object:
    """Convert a value to the type of its field."""
    expected = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}[kind]
    try:
        if isinstance(value, bool) != (kind is bool):
            raise TypeError
        if kind is int:
            return operator.index(value)
        if not isinstance(value, numbers.Real if kind is float else kind):
            raise TypeError
        return kind(value)
    except (TypeError, OverflowError):
        raise InputError(f"{name}: found {value!r}, expected {expected}") from None
