"""The registered model `poolnet`: its versions and their tags."""

import contextlib
import io

import mlflow

from poolnet.train import FitResult

NAME = "poolnet"


def register(model_id: str, pool: str, seed: int, result: FitResult, data_sha256: str) -> int:
    """A new version of `poolnet` for a logged model, tagged with what one chooses it by. Returns its number."""
    tags = {
        "pool": pool,
        "seed": str(seed),
        "val_acc": repr(result.val.acc),
        "test_acc": repr(result.test.acc),
        "data_sha256": data_sha256,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # where MLflow announces the version whatever its log level
        version = mlflow.register_model(f"models:/{model_id}", NAME, tags=tags)
    return int(version.version)
