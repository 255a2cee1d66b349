"""Runs for tests that begin with finished ones."""

import contextlib
import sqlite3

import mlflow

from poolnet.runs import train_run
from poolnet.tracking import addresses, names, servers
from poolnet.tracking.publication import Publication, is_complete, upload_new
from poolnet.training.config import TrainConfig

CONFIG = TrainConfig(data="letters.npz", epochs=2, register=False)
REGISTERED = TrainConfig(data="letters.npz", pool="avg", epochs=3, batch_size=32, lr=0.01)


def journaled(config=CONFIG, optimum=False):
    """A run of this process, finished and not published."""
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    run = train_run.create(config, optimum, splits, addresses.environment())
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None)
    return run


def publish(run, uri=None):
    publication = Publication(run, uri or servers.home_of(run))
    upload_new(publication)
    assert is_complete(publication)
    return mlflow.MlflowClient(publication.uri).get_run(publication.server_copy.run_id)


def name_metrics_as_before():
    """Give all metrics of the store the names that earlier versions gave them."""
    path = addresses.sqlite_file(addresses.own())
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        for table in ("metrics", "latest_metrics"):
            store.executemany(f"UPDATE {table} SET key = ? WHERE key = ?", [*names.METRICS.items()])
