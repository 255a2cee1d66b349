"""How much faster a sweep trains than the notebook's script does run by run, on the same random data.

    python benchmarks/sweep_speed.py [--seeds N] [--workers N] [--scale S] [--rounds N] [--json]

A sweep of max and avg with so many seeds, 30 epochs, tracking, models and figures included, from start to exit; and
the same command again, which has nothing left to train. The script of the notebook's loop, without tracking, is run for
one and for two epochs, which gives the time of its 30, and that times the number of runs.
"""

import math
import statistics
import sys
import tempfile
from pathlib import Path

import click
from train_speed import EPOCHS, random_letters, show
from whole_job import check as check_accuracy
from whole_job import extrapolated, measured, script

from poolnet.runs.run_record import RunRecord

STUDY = """question = "How long does it take?"
seeds = {seeds}
[grid]
pool = ["max", "avg"]
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""


def measure(seeds: int, workers: int, scale: float) -> tuple[float, float, float]:
    """Wall seconds of one notebook run, of the sweep, and of the sweep once more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_letters(folder / "full.npz", scale)
        one, two = (notebook(data, epochs, folder) for epochs in (1, 2))
        study = folder / "speed.toml"
        study.write_text(STUDY.format(seeds=list(range(1, seeds + 1))), encoding="utf-8")
        command = [sys.executable, "-m", "poolnet", "sweep", str(study), "--data", str(data), "--workers", str(workers)]
        first, again = measured(command, folder).seconds, measured(command, folder).seconds
        check(folder, seeds)
        return extrapolated(one, two), first, again


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
@click.option("--seeds", default=16, show_default=True, help="Seeds of each pooling.")
@click.option("--workers", default=2, show_default=True, help="Processes that train.")
@click.option("--scale", default=1.0, show_default=True, help="Share of the full size.")
@click.option("--rounds", default=1, show_default=True, help="Measurements; medians are reported.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(seeds: int, workers: int, scale: float, rounds: int, as_json: bool) -> None:
    found = [measure(seeds, workers, scale) for _ in range(rounds)]
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
