"""`mlflow models serve` and `mlflow models predict` answer with a model's logits, and refuse what is no image."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import forked
import mlflow
import numpy as np
import pytest
from conftest import make_arrays, ran, world

from poolnet.data.dataset import as_images

MODEL = "models:/poolnet@champion"
LOCAL = ["-m", MODEL, "--env-manager", "local"]
JSON = {"Content-Type": "application/json"}
CLIENTS, REQUESTS = 8, 60


@pytest.fixture(scope="module")
def champion(store):
    """The champion's folder, the environment to use it in, test images, and training's own logits."""
    folder, run = store
    env = world(folder) | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    client = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"])
    with np.load(client.download_artifacts(run.info.run_id, "predictions/test.npz", folder)) as predictions:
        logits = predictions["logits"]
    return SimpleNamespace(folder=folder, env=env, images=as_images(make_arrays()["X_test"]), logits=logits)


@pytest.fixture(scope="module")
def port(champion):
    """The port of a real scoring server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    command = [*forked.PYTHON, "mlflow", "models", "serve", *LOCAL, "--port", str(number)]
    with (champion.folder / "log").open("w") as log:  # a session of its own, to end what `mlflow` starts along with it
        process = forked.start(command, env=champion.env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(number, method="GET", path="/ping")[0] == 200:
                    break
            assert process.poll() is None, (champion.folder / "log").read_text()
            time.sleep(0.1)
        yield number
    finally:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def ask(port, data=b"", headers=JSON, method="POST", path="/invocations"):
    """Status and body of the answer to one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def encoded(images, key="inputs"):
    return json.dumps({key: np.asarray(images).tolist()}).encode()


def predictions(response):
    status, body = response
    assert status == 200, body
    return np.array(json.loads(body)["predictions"], dtype=np.float32)


@pytest.mark.parametrize(("key", "rows"), [("inputs", 1), ("inputs", 110), ("instances", 3)])
def test_the_server_gives_the_logits_that_training_had(champion, port, key, rows):
    logits = predictions(ask(port, encoded(champion.images[:rows], key)))
    np.testing.assert_allclose(logits, champion.logits[:rows], rtol=0, atol=1e-5)


def test_many_clients_at_once_each_get_their_own_answer(champion, port):
    rng = np.random.default_rng(0)
    choices = [rng.choice(len(champion.images), size, replace=False) for size in rng.integers(1, 9, REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda rows: predictions(ask(port, encoded(champion.images[rows]))), choices))
    for rows, logits in zip(choices, answers, strict=True):
        np.testing.assert_allclose(logits, champion.logits[rows], rtol=0, atol=1e-5)


IMAGE = encoded(np.zeros((1, 1, 28, 28)))
BAD = {
    "malformed JSON": (b'{"inputs": [[[', JSON),
    "empty body": (b"", JSON),
    "no object": (b"[1, 2]", JSON),
    "garbage": (b"\xff\x00\xfe" * 100_000, JSON),
    "no key": (b"{}", JSON),
    "wrong key": (encoded(np.zeros((1, 1, 28, 28)), "images"), JSON),
    "two keys": (b'{"inputs": [], "instances": []}', JSON),
    "null": (b'{"inputs": null}', JSON),
    "empty batch": (b'{"inputs": []}', JSON),
    "no batch, no channel": (encoded(np.zeros((28, 28))), JSON),
    "no batch": (encoded(np.zeros((1, 28, 28))), JSON),
    "three channels": (encoded(np.zeros((1, 3, 28, 28))), JSON),
    "channels last": (encoded(np.zeros((1, 28, 28, 1))), JSON),
    "32x32": (encoded(np.zeros((1, 1, 32, 32))), JSON),
    "500x500": (encoded(np.zeros((1, 1, 500, 500))), JSON),
    "ragged": (b'{"inputs": [[[[0.0, 1.0], [0.0]]]]}', JSON),
    "a string among pixels": (IMAGE.replace(b"0.0", b'"x"', 1), JSON),
    "an integer beyond floats": (IMAGE.replace(b"0.0", b"9" * 400, 1), JSON),
    "deeply nested": (b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", JSON),
    "of no known type": (IMAGE, {"Content-Type": "text/plain"}),
    "a form, as curl -d sends it": (IMAGE, {"Content-Type": "application/x-www-form-urlencoded"}),
    "CSV": (b"a,b\n1,2\n", {"Content-Type": "text/csv"}),
    "null among pixels": (IMAGE.replace(b"0.0", b"null", 1), JSON),
    "NaN among pixels": (IMAGE.replace(b"0.0", b"NaN", 1), JSON),
    "Infinity among pixels": (IMAGE.replace(b"0.0", b"Infinity", 1), JSON),
    "pixels to 255": (IMAGE.replace(b"0.0", b"255", 1), JSON),
    "no parquet": (b"PAR1", {"Content-Type": "application/vnd.apache.parquet"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_the_next_one_answered(champion, port, name):
    status, body = ask(port, *BAD[name])
    assert 400 <= status < 500, body
    assert len(predictions(ask(port, encoded(champion.images[:1])))) == 1


@pytest.mark.parametrize(("method", "path", "expected"), [("GET", "/invocations", 405), ("POST", "/predict", 404)])
def test_other_methods_and_paths_are_refused(port, method, path, expected):
    assert ask(port, IMAGE, method=method, path=path)[0] == expected


def test_a_client_that_goes_away_within_its_request_harms_nobody(champion, port):
    head = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9999999"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"\r\n\r\n" + IMAGE)
    assert len(predictions(ask(port, encoded(champion.images[:1])))) == 1


def test_predict_takes_the_example_that_comes_with_the_model(champion):
    (example,) = champion.folder.rglob("artifacts/**/serving_input_example.json")
    command = [*forked.PYTHON, "mlflow", "models", "predict", *LOCAL, "-t", "json", "-i", example]
    finished = ran(*command, env=champion.env)
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_allclose(predictions((200, finished.stdout)), champion.logits[:2], rtol=0, atol=1e-5)
