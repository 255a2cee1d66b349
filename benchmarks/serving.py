"""How fast `mlflow models serve` answers, and whether all answers are right.

    python benchmarks/serving.py MODEL_URI [--data PATH] [--requests N] [--clients N] [--batch N] [--json]

The command itself, on loopback, in this environment: requests from so many clients at once, half of them with one image
and half with a batch of the test split. An answer is right if all its logits are within 1e-5 of those that the model
gives without a server. Ends with exit code 1 if one was not. Clients and server share the machine.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import torch

from poolnet.data.dataset import locate, open_dataset
from poolnet.tracking.registry import load

TOLERANCE = 1e-5


@contextlib.contextmanager
def serving(uri: str) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    env = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryFile("w+") as log:  # a session of its own, to end what `mlflow` starts along with it
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    raise click.ClickException(f"the server ended:\n{log.read()}")
                time.sleep(0.1)
            yield port
        finally:
            if os.name == "nt":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            else:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, "GET", "/ping")[0] == 200
    return False


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes, float]:
    """Status and body of the answer, and its seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    start = time.perf_counter()
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read(), time.perf_counter() - start


def measure(uri: str, images: np.ndarray, requests: int, clients: int, batch: int) -> dict[str, float]:
    with torch.inference_mode():
        logits = load(uri).net(torch.from_numpy(images)).numpy()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(images), 1 if i % 2 else batch) for i in range(requests)]
    bodies = [json.dumps({"inputs": images[each].tolist()}).encode() for each in rows]
    with serving(uri) as port, ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        answered = list(pool.map(lambda body: ask(port, "POST", "/invocations", body), bodies))
        wall = time.perf_counter() - start
    right = 0
    for each, (status, body, _) in zip(rows, answered, strict=True):
        found = np.array(json.loads(body)["predictions"]) if status == 200 else np.full((1, 10), np.nan)
        right += found.shape == (len(each), 10) and bool(np.abs(found - logits[each]).max() <= TOLERANCE)
    medians = [1000 * statistics.median(seconds for *_, seconds in answered[start::2]) for start in (1, 0)]
    return {
        "requests": requests,
        "right": right,
        "per_second": requests / wall,
        "median_ms": medians[0],
        "batch_median_ms": medians[1],
    }


@click.command()
@click.argument("model_uri")
@click.option("--data", default="glyphs", show_default=True, help="Data set whose test images are sent, as for train.")
@click.option("--requests", default=1000, type=click.IntRange(min=2), show_default=True, help="Requests in all.")
@click.option("--clients", default=8, type=click.IntRange(min=1), show_default=True, help="Clients at once.")
@click.option("--batch", default=32, type=click.IntRange(min=2), show_default=True, help="Images of every other one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def main(model_uri: str, data: str, requests: int, clients: int, batch: int, as_json: bool) -> None:
    images = open_dataset(locate(data, click.echo)).test.images(slice(0, 20_000))
    found = measure(model_uri, images, requests, clients, batch)
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(
            f"{found['right']:,} of {requests:,} answers right, {found['per_second']:.0f} a second; median "
            f"{found['median_ms']:.0f} ms for one image, {found['batch_median_ms']:.0f} ms for {batch}"
        )
    sys.exit(found["right"] < requests)


if __name__ == "__main__":
    main()
