"""How much faster `poolnet prepare notmnist` is than to extract the tarball and read the files.

    python benchmarks/prepare_speed.py notMNIST_small.tar.gz [--json]

Both end in one `.npz`: the first is the whole command, process start, cleaning and splitting included; the second is
the usual script: extract everything, open each file, stack, shuffle, save. They alternate; medians are reported.
"""

import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image


def extract_then_read(tarball: Path, folder: Path) -> int:
    """The usual script. Returns the number of images."""
    with tarfile.open(tarball) as tar:
        tar.extractall(folder, filter="data")
    images, labels = [], []
    for path in folder.rglob("*.png"):
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image))
        except OSError:
            continue
        labels.append("ABCDEFGHIJ".index(path.parent.name))
    order = random.Random(42).sample(range(len(images)), len(images))
    X, y = np.stack(images)[order], np.array(labels)[order]
    np.savez(folder / "all.npz", X=X, y=y)
    return len(images)


def prepare(tarball: Path, folder: Path) -> None:
    """The whole command."""
    command = [sys.executable, "-m", "poolnet", "prepare", "notmnist", "--small", str(tarball)]
    subprocess.run([*command, "--out", str(folder / "small.npz")], check=True, stdout=subprocess.DEVNULL)


@click.command()
@click.argument("tarball", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True, help="Measurements of each; medians are reported.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(tarball: Path, rounds: int, as_json: bool) -> None:
    seconds: dict[str, list[float]] = {"prepare": [], "extract_then_read": []}
    images = None
    for _ in range(rounds):
        for work in (prepare, extract_then_read):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                images = work(tarball, Path(folder))
                seconds[work.__name__].append(time.perf_counter() - start)
    ours, usual = (statistics.median(times) for times in seconds.values())
    result = {
        "images": images,
        "microseconds_an_image_usual": usual / images * 1e6,
        "microseconds_an_image_poolnet": ours / images * 1e6,
        "ratio": usual / ours,
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo("\n".join(f"{name:32}{value:10,.1f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
