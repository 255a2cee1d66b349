"""Train one network in memory."""

from poolnet.data.dataset import Dataset
from poolnet.training import fast_step, features, train_loop
from poolnet.training.config import TrainConfig
from poolnet.training.train_loop import FitResult, OnEpoch


def fit(config: TrainConfig, data: Dataset, on_epoch: OnEpoch = lambda record: None) -> FitResult:
    """Train by the fast step, unless the pooling is `conv`.

    Nothing is written or published. `on_epoch` gets the `EpochRecord` of each epoch.
    """
    if config.pool == "conv":
        return train_loop.fit(config, data, on_epoch)
    return fast_step.fit(config, data, features.of_dataset(data, config.pool), on_epoch)
