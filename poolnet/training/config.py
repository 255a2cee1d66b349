"""The settings of one training run.

They are kept apart from the training because the command line needs the defaults before it imports torch, which is
slow.
"""

import dataclasses
import math
import numbers
import operator
from dataclasses import dataclass

from poolnet.errors import InputError

PLATEAU_MARGIN = 0.002  # of accuracy: what 30 epochs gain once the published run has flattened
POOLS = ("max", "avg", "conv")  # conv: the two strided convolutions that pooling replaced


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run, with their defaults.

    The defaults are written down only here. They are those of the reference experiment.
    """

    data: str = dataclasses.field(default="glyphs", metadata={"help": "glyphs, notmnist, or the path of an .npz file."})
    pool: str = dataclasses.field(default="max", metadata={"help": "max, avg, or conv (the baseline)."})
    epochs: int = dataclasses.field(default=30, metadata={"help": "Passes over the training split."})
    batch_size: int = dataclasses.field(default=128, metadata={"help": "Images per optimiser step."})
    lr: float = dataclasses.field(default=0.001, metadata={"help": "Learning rate of Adam."})
    seed: int = dataclasses.field(default=42, metadata={"help": "Seed of the initial weights and of the batch order."})
    device: str = dataclasses.field(
        default="auto", metadata={"help": "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N, or mps."}
    )
    register: bool = dataclasses.field(
        default=True, metadata={"help": "Register the model as a version of `poolnet`: yes or no."}
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        if self.pool not in POOLS:
            raise InputError(f"pool: found {self.pool!r}, expected one of {', '.join(POOLS)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected a whole number from 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: found {self.lr}, expected a finite number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: found {self.seed}, expected a whole number from 0 to 2**63 - 1")


def _typed(field: dataclasses.Field, value: object) -> object:
    """Convert a value to the type of its field.

    NumPy's numbers become Python's. Raises `InputError` for a wrong type.
    """
    expected = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}[field.type]
    try:
        if isinstance(value, bool) != (field.type is bool):
            raise TypeError
        if field.type is int:
            return operator.index(value)
        if not isinstance(value, numbers.Real if field.type is float else field.type):
            raise TypeError
        return field.type(value)
    except (TypeError, OverflowError):
        raise InputError(f"{field.name}: found {value!r}, expected {expected}") from None
