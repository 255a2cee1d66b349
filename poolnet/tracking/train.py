"""Train one network and record it in MLflow, as `poolnet train` does."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from poolnet.errors import InputError
from poolnet.files import home
from poolnet.runs.run_record import RunRecord
from poolnet.text import warn
from poolnet.tracking import addresses
from poolnet.tracking.publisher import Held, Publisher
from poolnet.training.config import TrainConfig


@dataclass(frozen=True)
class Trained:
    """A finished run: its record on disk, and what the tracking server has of it."""

    run: RunRecord
    server: Held
    trouble: str | None  # why the server does not have all of it yet


def train(
    config: TrainConfig,
    optimum: bool = False,
    cache: bool = True,
    resume: str = "",
    given: Mapping[str, object] = {},
    timeout: float = 20,
    say: Callable[[object], object] = print,
    warn: Callable[[str], object] = warn,
) -> Trained:
    """Train one network, record it on disk, and publish it to the tracking server.

    `resume` names a run to go on with instead, whose record `given` settings may not contradict. The server is given up
    after `timeout` seconds without progress. Raises `InputError` and `RunError`.
    """
    if optimum and config.pool == "conv":
        raise InputError("--optimum: found pool conv, expected max or avg, whose loss has a single minimum")
    home()  # first of all, since nothing goes without it
    if not resume:
        look_ahead(warn)
    with Publisher(timeout) as publisher:  # its imports take seconds, beside ours
        from poolnet.runs import train_run

        if resume:
            carrier = os.environ.get("MLFLOW_RUN_ID", "")  # a run that `mlflow run` made only for this
            begun = functools.partial(publisher.add, carrier=carrier)
            run = train_run.resume(resume, given, cache, begun, publisher.check, say, warn)
        else:
            publisher.refuse_stale()
            server = addresses.environment()
            run = train_run.run(config, optimum, cache, server, publisher.add, publisher.check, say, warn)
        trouble = publisher.close()
        return Trained(run, publisher.held, trouble)


def look_ahead(warn: Callable[[str], object]) -> None:
    """Refuse a tracking address that can never work, and warn of a server that is down, before anything is trained."""
    uri = addresses.own()
    addresses.check(uri)
    if problem := addresses.unreachable(uri):
        warn(
            f"{addresses.shown(uri)} cannot be reached ({problem}); what is trained is kept, and published later with: "
            "poolnet sync"
        )
