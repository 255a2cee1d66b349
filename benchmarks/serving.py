"""What `mlflow models serve` answers, how fast, and what it says to bad requests.

    python benchmarks/serving.py MODEL_URI [--data PATH] [--requests N] [--clients N] [--batch N] [--workers N] [--json]

The command itself, on loopback, in this environment. `load`: so many requests from so many clients at once, half of
them with one image and half with a batch, each with images of its own from the test split; an answer is right if all
its logits are within 1e-5 of those that the model gives without a server. Latency is from sending to the last byte, on
a connection that stays open. `bad requests`: one by one, each followed by a good one, which must be answered right.
Ends with exit code 1 if an answer was wrong or a bad request got no 4xx. `--workers 1` is MLflow's default; clients and
server share the machine.
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
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import mlflow
import numpy as np

from poolnet.data import locate, open_splits

JSON = {"Content-Type": "application/json"}
TOLERANCE = 1e-5


def quiet_environment() -> dict[str, str]:
    """Ours, without pickle, as the README serves models, and without progress bars."""
    return os.environ | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "UVICORN_HTTP": "poolnet.serving:Protocol",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }


class Client:
    """A connection that stays open as long as the server lets it."""

    def __init__(self, port: int, timeout: float = 120):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def ask(
        self, data: bytes = b"", headers: dict[str, str] = JSON, method: str = "POST", path: str = "/invocations"
    ) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 if there was none."""
        try:
            self.connection.request(method, path, data, headers)
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()  # to be opened again by the next request
            return 0, b""

    def close(self) -> None:
        self.connection.close()


@contextlib.contextmanager
def serving(uri: str, workers: int, timeout: int) -> Iterator[tuple[int, float]]:
    """Port of a server, and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    command += ["--port", str(port), "--workers", str(workers), "--timeout", str(timeout)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "log"
        start = time.perf_counter()
        with path.open("w") as log:  # a session of its own, to end what `mlflow` starts along with it
            process = subprocess.Popen(command, env=quiet_environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(port, process, path)
            yield port, time.perf_counter() - start
        finally:
            end(process)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    while True:
        client = Client(port)
        status, _ = client.ask(method="GET", path="/ping")
        client.close()
        if status == 200:
            return
        if process.poll() is not None:
            raise click.ClickException(f"the server ended:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    """End the server: `mlflow`, uvicorn and its workers."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def encoded(images: np.ndarray, key: str = "inputs") -> bytes:
    return json.dumps({key: images.tolist()}).encode()


def is_right(status: int, body: bytes, logits: np.ndarray) -> bool:
    if status != 200:
        return False
    found = np.array(json.loads(body)["predictions"])
    return found.shape == logits.shape and bool(np.abs(found - logits).max() <= TOLERANCE)


def load(port: int, images: np.ndarray, logits: np.ndarray, requests: int, clients: int, batch: int) -> dict:
    """Latency and rightness of so many requests, all of them ready to be sent before the clock starts."""
    rng = np.random.default_rng(0)
    sizes = [1 if i % 2 else batch for i in range(requests)]
    rows = [rng.choice(len(images), size, replace=False) for size in sizes]
    bodies = [encoded(images[each]) for each in rows]
    own = threading.local()
    opened: list[Client] = []

    def one(body: bytes) -> tuple[float, int, bytes]:
        if not hasattr(own, "client"):
            own.client = Client(port)
            opened.append(own.client)
        start = time.perf_counter()
        status, answer = own.client.ask(body)
        return time.perf_counter() - start, status, answer

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, bodies))
    wall = time.perf_counter() - start
    for client in opened:
        client.close()
    right = sum(is_right(status, body, logits[each]) for (_, status, body), each in zip(answers, rows, strict=True))
    return {
        "requests": requests,
        "right": right,
        "errors": sum(status != 200 for _, status, _ in answers),
        "requests_per_second": requests / wall,
        "images_per_second": sum(sizes) / wall,
        "one_image": latency([seconds for (seconds, *_), size in zip(answers, sizes, strict=True) if size == 1]),
        "batch": latency([seconds for (seconds, *_), size in zip(answers, sizes, strict=True) if size > 1]),
    }


def latency(seconds: list[float]) -> dict[str, float]:
    return {"median_ms": 1000 * statistics.median(seconds), "p95_ms": 1000 * float(np.quantile(seconds, 0.95))}


def bad_requests() -> Iterator[tuple[str, tuple]]:
    """Name and arguments of `Client.ask`, made one by one, since some are large."""
    zeros = np.zeros((1, 1, 28, 28))
    image = encoded(zeros)
    bodies = {
        "malformed JSON": lambda: b'{"inputs": [[[',
        "empty body": lambda: b"",
        "a list": lambda: b"[1, 2]",
        "no key": lambda: b"{}",
        "wrong key": lambda: encoded(zeros, "images"),
        "two keys": lambda: b'{"inputs": [], "instances": []}',
        "null": lambda: b'{"inputs": null}',
        "a string": lambda: b'{"inputs": "letter"}',
        "an object": lambda: b'{"inputs": {"x": [1]}}',
        "a language model's key": lambda: encoded(zeros, "input"),
        "empty batch": lambda: b'{"inputs": []}',
        "28x28": lambda: encoded(np.zeros((28, 28))),
        "1x28x28": lambda: encoded(np.zeros((1, 28, 28))),
        "three channels": lambda: encoded(np.zeros((1, 3, 28, 28))),
        "channels last": lambda: encoded(np.zeros((1, 28, 28, 1))),
        "32x32": lambda: encoded(np.zeros((1, 1, 32, 32))),
        "1000x1000": lambda: encoded(np.zeros((1, 1, 1000, 1000))),
        "60 MB of another shape": lambda: encoded(np.zeros((240, 50, 1000))),
        "ragged": lambda: b'{"inputs": [[[[0.0, 1.0], [0.0]]]]}',
        "a string among pixels": lambda: image.replace(b"0.0", b'"x"', 1),
        "an object among pixels": lambda: image.replace(b"0.0", b"{}", 1),
        "null for a pixel": lambda: image.replace(b"0.0", b"null", 1),
        "NaN for a pixel": lambda: image.replace(b"0.0", b"NaN", 1),
        "Infinity for a pixel": lambda: image.replace(b"0.0", b"Infinity", 1),
        "1e400 for a pixel": lambda: image.replace(b"0.0", b"1e400", 1),
        "pixels from 0 to 255": lambda: image.replace(b"0.0", b"255"),
        "an integer of 400 digits": lambda: image.replace(b"0.0", b"9" * 400, 1),
        "an integer of 5,000 digits": lambda: image.replace(b"0.0", b"9" * 5000, 1),
        "nested 900 deep": lambda: b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}",
        "nested 5,000 deep": lambda: b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "70 MB": lambda: b" " * 70_000_000,
        "50 MB of garbage": lambda: np.random.default_rng(0).bytes(50_000_000),
    }
    yield from ((name, (make(),)) for name, make in bodies.items())
    yield "no content type", (image, {})
    for name in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"):
        yield name, (image, {"Content-Type": name})
    yield "CSV", (b"a,b\n1,2\n", {"Content-Type": "text/csv"})
    yield "no parquet", (b"PAR1", {"Content-Type": "application/vnd.apache.parquet"})
    yield "a length that is no number", (b"", JSON | {"Content-Length": "many"})
    for method in ("GET", "PUT", "DELETE"):
        yield method, (b"", {}, method)
    yield "unknown path", (image, JSON, "POST", "/predict")
    yield "body that never ends", (image, JSON | {"Content-Length": "9999999"})


def refusals(port: int, good: bytes, logits: np.ndarray) -> list[dict]:
    """For each bad request its status, and whether a good one was answered right afterwards."""
    found = []
    for name, request in bad_requests():
        client, after = Client(port), Client(port)
        start = time.perf_counter()
        status, _ = client.ask(*request)
        seconds = time.perf_counter() - start
        client.close()
        found.append({"name": name, "status": status, "seconds": seconds, "alive": is_right(*after.ask(good), logits)})
        after.close()
    return found


def show(result: dict) -> None:
    click.echo(f"{'workers':>8}{'started':>10}{'right':>14}{'errors':>8}{'requests/s':>12}{'images/s':>10}")
    click.echo(
        f"{result['workers']:>8}{result['seconds_to_start']:>8.1f} s{result['right']:>7,} of {result['requests']:,}"
        f"{result['errors']:>6}{result['requests_per_second']:>12.0f}{result['images_per_second']:>10,.0f}"
    )
    for name in ("one_image", "batch"):
        of = result[name]
        click.echo(f"{name.replace('_', ' ')}: median {of['median_ms']:.1f} ms, 95 % within {of['p95_ms']:.1f} ms")
    click.echo(f"\n{'bad request':<36}{'status':>8}{'seconds':>10}  good one after it")
    for row in result["bad_requests"]:
        after = "right" if row["alive"] else "WRONG"
        status = row["status"] or "none"
        note = "" if is_refused(row) else "  expected 4xx"
        click.echo(f"{row['name']:<36}{status:>8}{row['seconds']:>10.2f}  {after}{note}")


def is_refused(row: dict) -> bool:
    return 400 <= row["status"] < 500


@click.command()
@click.argument("model_uri")
@click.option("--data", default="glyphs", show_default=True, help="Data set whose test images are sent, as for train.")
@click.option("--requests", default=1000, type=click.IntRange(min=2), show_default=True, help="Requests under load.")
@click.option("--clients", default=8, show_default=True, help="Clients at once.")
@click.option(
    "--batch", default=32, type=click.IntRange(min=2), show_default=True, help="Images of every other request."
)
@click.option("--workers", default=1, show_default=True, help="Processes that serve.")
@click.option("--timeout", default=20, show_default=True, help="Seconds that the server gives a request.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    model_uri: str, data: str, requests: int, clients: int, batch: int, workers: int, timeout: int, as_json: bool
) -> None:
    os.environ.update(quiet_environment())
    test = open_splits(locate(data, click.echo)).test
    images = test.images(slice(0, 20_000))
    logits = mlflow.pyfunc.load_model(model_uri, model_config={"device": "cpu"}).predict(images)
    with serving(model_uri, workers, timeout) as (port, seconds):
        result = {"workers": workers, "seconds_to_start": seconds}
        result |= load(port, images, logits, requests, clients, batch)
        result["bad_requests"] = refusals(port, encoded(images[:1]), logits[:1])
    click.echo(json.dumps(result)) if as_json else show(result)
    fine = all(row["alive"] and is_refused(row) for row in result["bad_requests"])
    if result["right"] < requests or not fine:
        sys.exit(1)


if __name__ == "__main__":
    main()
