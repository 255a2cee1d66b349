"""Runs in a real store that are not trainings: how they begin, go on and end."""

import contextlib
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import mlflow
import pytest

from poolnet import process
from poolnet.tracking import result_runs, servers, sweep_run, waiting


@pytest.fixture(params=["sqlite", "http"])
def client(request, monkeypatch):
    if request.param == "http":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    return servers.own_client()


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED"), (process.Stop(signal.SIGTERM), "KILLED")],
    ids=repr,
)
def test_a_run_that_is_cut_off_ends_as_a_training_does(client, error, status):
    with pytest.raises(type(error)), result_runs.run(client, "0", "compare", "max vs avg") as run_id:
        raise error
    assert client.get_run(run_id).info.status == status


@contextlib.contextmanager
def forwarded(address):
    """An address that leads to this server, and an event: while it is not set, nothing gets through."""
    target, through = urlsplit(address), threading.Event()
    through.set()

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                through.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept(listening):
        with contextlib.suppress(OSError):
            while True:
                ends = listening.accept()[0], socket.create_connection((target.hostname, target.port))
                for pair in (ends, ends[::-1]):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, args=[listening], daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", through
        through.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the cause")], ids=repr)
def test_what_ended_a_run_is_not_hidden_by_a_server_that_hangs_since_then(server, monkeypatch, error):
    monkeypatch.setattr(waiting, "_silent", {})
    monkeypatch.setattr(result_runs, "END_SECONDS", 1)
    with forwarded(server) as (address, through):

        def cut_off():
            with result_runs.run(servers.client_of(address), "0", "compare", "max vs avg"):
                through.clear()
                raise error

        began = time.monotonic()
        with pytest.raises(type(error)) as raised:
            cut_off()
        assert raised.value is error
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("made_by", ["mlflow run", "an earlier command"])
def test_a_run_that_goes_on_is_running_again_under_its_name(client, made_by, monkeypatch):
    begun = client.create_run("0", run_name="rebellious-crow-7").info.run_id
    client.set_terminated(begun, "FAILED")
    if made_by == "mlflow run":
        monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    with result_runs.run(client, "0", "register", "max from w.pt", begun) as run_id:
        now = client.get_run(run_id)
        assert (run_id, now.info.status, now.info.run_name) == (begun, "RUNNING", "max from w.pt")
        assert now.data.tags["mlflow.runName"] == "max from w.pt"
    assert client.get_run(run_id).info.status == "FINISHED"


def test_the_parent_of_a_sweep_is_found_adopted_or_created_and_keeps_its_source():
    client, source = mlflow.MlflowClient(), {"mlflow.source.name": "the project", "mlflow.user": "me"}
    adopted, carrier = (client.create_run("0", tags=source).info.run_id for _ in range(2))
    for given in (adopted, carrier, adopted, ""):
        assert sweep_run.find_or_create(client, "0", "pools-12345678", given) == adopted
    tags = client.get_run(adopted).data.tags
    assert tags == source | {"poolnet.study": "pools-12345678", "mlflow.runName": "pools-12345678"}
    tags = client.get_run(carrier).data.tags
    assert tags["mlflow.runName"] == "goes on with pools-12345678"
    assert adopted in tags["mlflow.note.content"]
    assert "poolnet.study" not in tags
    new = sweep_run.find_or_create(client, "0", "pools-87654321")
    assert client.get_run(new).data.tags["mlflow.source.name"] == "poolnet sweep"
