"""Is average or max pooling better for letters?

These ten names are the way in. Each is loaded when it is first used: importing poolnet imports neither torch nor
MLflow, and changes no setting of anybody's.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolnet.data.dataset import open_data
    from poolnet.errors import InputError
    from poolnet.models.predict import predict
    from poolnet.studies.compare import compare
    from poolnet.tracking.registry import load_model
    from poolnet.tracking.train import train
    from poolnet.training.config import TrainConfig
    from poolnet.training.evaluation import evaluate
    from poolnet.training.fit import fit
    from poolnet.training.model import build_model

__all__ = [
    "InputError",
    "TrainConfig",
    "build_model",
    "compare",
    "evaluate",
    "fit",
    "load_model",
    "open_data",
    "predict",
    "train",
]
MODULES = {
    "InputError": "errors",
    "TrainConfig": "training.config",
    "build_model": "training.model",
    "compare": "studies.compare",
    "evaluate": "training.evaluation",
    "fit": "training.fit",
    "load_model": "tracking.registry",
    "open_data": "data.dataset",
    "predict": "models.predict",
    "train": "tracking.train",
}


def __getattr__(name: str) -> object:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"poolnet.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
