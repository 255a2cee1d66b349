"""How much faster a sweep trains than the notebook's script does run by run, on the same random data.

    python benchmarks/sweep_speed.py [--data FILE] [--seeds N] [--workers N] [--scale S] [--rounds N] [--json]
    python benchmarks/sweep_speed.py --tiny 500 --workers 8

A sweep of max and avg with so many seeds, 30 epochs, tracking and models included, from start to exit; and the same
command again, which has nothing left to train. The script of the notebook's loop, without tracking, is run for one and
for two epochs, which gives the time of its 30, and that times the number of runs.

With `--tiny`, so many runs of one epoch on few letters: how many a minute, in the first and in the last quarter, and
the memory of the sweeping process at their ends.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
from train_speed import EPOCHS, random_letters, show
from whole_job import check as check_accuracy
from whole_job import extrapolated, measured, script

from poolnet.runs.run_record import RunRecord

STUDY = """question = "How long does it take?"
seeds = {seeds}
[grid]
pool = ["max", "avg"]
epochs = {epochs}
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""


def sweep_command(folder: Path, data: Path, seeds: int, epochs: int, workers: int) -> list[str]:
    """The command of a sweep whose study it writes."""
    study = folder / "speed.toml"
    study.write_text(STUDY.format(seeds=list(range(1, seeds + 1)), epochs=epochs), encoding="utf-8")
    return [sys.executable, "-m", "poolnet", "sweep", str(study), "--data", str(data), "--workers", str(workers)]


def measure(given: Path | None, seeds: int, workers: int, scale: float) -> tuple[float, float, float]:
    """Wall seconds of one notebook run, of the sweep, and of the sweep once more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = given.absolute() if given else random_letters(folder / "full.npz", scale)
        one, two = (notebook(data, epochs, folder) for epochs in (1, 2))
        command = sweep_command(folder, data, seeds, EPOCHS, workers)
        first, again = measured(command, folder).seconds, measured(command, folder).seconds
        check(folder, seeds)
        return extrapolated(one, two), first, again


def measure_tiny(runs: int, workers: int) -> dict[str, float]:
    """Runs a minute, and megabytes of the sweeping process, early and late."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = sweep_command(folder, random_letters(folder / "tiny.npz", 0.002), runs // 2, 1, workers)
        environment = {
            **os.environ,
            "POOLNET_HOME": str(folder / "home"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{name}/db",
        }
        ends: list[float] = []  # of the runs so far, in seconds since the start
        memory: list[float] = []  # after so many runs, in MB
        began = time.monotonic()
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                if "val_acc" in line and line.startswith(("max-", "avg-")):
                    ends.append(time.monotonic() - began)
                    memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        assert process.returncode == 0
        assert len(ends) == 2 * (runs // 2)
        quarter = len(ends) // 4
        return {
            "runs": len(ends),
            "workers": workers,
            "seconds": time.monotonic() - began,
            "runs_a_minute_first_quarter": 60 * quarter / (ends[quarter] - ends[0]),
            "runs_a_minute_last_quarter": 60 * quarter / (ends[-1] - ends[-1 - quarter]),
            "megabytes_after_first_quarter": memory[quarter],
            "megabytes_at_the_end": memory[-1],
        }


def notebook(data: Path, epochs: int, folder: Path) -> float:
    """Wall seconds of the notebook's script, whose test accuracy is checked."""
    job = measured(script("notebook", data, epochs), folder)
    check_accuracy("notebook", job, data, epochs)
    return job.seconds


def check(folder: Path, seeds: int) -> None:
    """What was timed are so many whole runs, each trained once."""
    losses = {}
    for run in map(RunRecord, (folder / "home" / "runs").iterdir()):
        records = run.by_step()
        assert sorted(records) == list(range(EPOCHS + 1)), run.name
        stem = run.name.rpartition("-")[0]  # pool and seed
        losses[stem] = records[EPOCHS]["train_loss"]
        assert math.isfinite(losses[stem] + records[0]["test_loss"]), run.name
        assert losses[stem] < records[1]["train_loss"], run.name
    assert len(losses) == len(list((folder / "home" / "runs").iterdir())) == 2 * seeds


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="A data set instead of random letters.")
@click.option("--tiny", default=0, help="Measure so many tiny runs instead.")
@click.option("--seeds", default=16, show_default=True, help="Seeds of each pooling.")
@click.option("--workers", default=2, show_default=True, help="Processes that train.")
@click.option("--scale", default=1.0, show_default=True, help="Share of the full size.")
@click.option("--rounds", default=1, show_default=True, help="Measurements; medians are reported.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(data: Path | None, tiny: int, seeds: int, workers: int, scale: float, rounds: int, as_json: bool) -> None:
    if tiny:
        show(measure_tiny(tiny, workers), as_json)
        return
    found = [measure(data, seeds, workers, scale) for _ in range(rounds)]
    notebook, sweep, again = (statistics.median(column) for column in zip(*found, strict=True))
    result = {
        "runs": 2 * seeds,
        "seconds_notebook_run": notebook,
        "seconds_notebook_runs": 2 * seeds * notebook,
        "seconds_sweep": sweep,
        "ratio": 2 * seeds * notebook / sweep,
        "seconds_again": again,
    }
    show(result, as_json)


if __name__ == "__main__":
    main()
