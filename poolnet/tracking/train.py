"""Train one network and record it in MLflow."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

from poolnet.data import dataset
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.runs import run_record
from poolnet.runs.run_record import RunRecord
from poolnet.text import Echo, echo_warning
from poolnet.tracking import addresses, published
from poolnet.tracking.published import ServerCopy
from poolnet.tracking.publisher import Publisher
from poolnet.training import device
from poolnet.training.config import TrainConfig


@dataclass(frozen=True)
class Trained:
    """A finished run, on disk and on the server."""

    run: RunRecord
    server: ServerCopy
    uri: str  # of the server
    trouble: str | None  # why the server does not have all of it yet


def train(
    config: TrainConfig,
    optimum: bool = False,
    cache: bool = True,
    resume: str = "",
    given: Mapping[str, object] = {},
    timeout: float = 20,
    echo: Echo = print,
    echo_warning: Echo = echo_warning,
) -> Trained:
    """Train a network, record it and publish it.

    The record is on disk. It is published to the tracking server. If `resume` names a run, this run is continued
    instead. Then the `given` settings may not contradict its record. The server is given up after `timeout` seconds
    without progress. Raises `InputError` and `RunError`.
    """
    if optimum and config.pool == "conv":
        raise InputError("--optimum: found pool conv, expected a pooling, whose loss has a single minimum")
    home()  # first of all, since nothing goes without it
    old = _recorded(resume, timeout) if resume else None
    if not old:
        dataset.check(config.data)
        device.check(config.device)
        look_ahead(echo_warning)
    with Publisher(timeout) as publisher:  # its imports take seconds, beside ours
        if not old:
            publisher.ask()
        from poolnet.runs import train_run

        if old:
            carrier = os.environ.get("MLFLOW_RUN_ID", "")  # a run that `mlflow run` made only for this
            begun = functools.partial(publisher.add, carrier=carrier)
            run = train_run.resume(old, given, cache, begun, publisher.check, echo, echo_warning)
        else:
            server = addresses.environment()
            run = train_run.run(config, optimum, cache, server, publisher.add, publisher.check, echo, echo_warning)
        echo("Uploading the run ...")
        trouble = publisher.close()
        shown, own = published.read(run).home, addresses.own()
        uri = own if addresses.shown(own) == shown else shown  # the former has the password
        return Trained(run, publisher.server_copy, uri, trouble)


def _recorded(text: str, timeout: float) -> RunRecord:
    """Return the record of the run that a text names."""
    if run := run_record.find(text):
        return run
    from poolnet.tracking import sync, waiting  # and with them MLflow, which takes seconds

    try:
        with waiting.within(timeout):
            return sync.find(text)
    except InputError as error:
        cure = "if its folder is gone, train it anew with the command in the run's description in MLflow"
        raise InputError(f"{error}; {cure}") from None


def look_ahead(echo_warning: Echo) -> None:
    """Check the tracking address before anything is trained.

    An address that can never work is refused with `InputError`. If the server is down, there is a warning.
    """
    uri = addresses.own()
    addresses.check(uri)
    if problem := addresses.unreachable(uri):
        echo_warning(
            f"{addresses.shown(uri)} cannot be reached ({problem}); runs are saved on this machine; "
            "upload them later with: poolnet sync"
        )
