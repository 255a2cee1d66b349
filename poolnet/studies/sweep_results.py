"""The results of a sweep, and the tables that show them."""

import dataclasses
import math
import statistics
from pathlib import Path

from poolnet.studies.study import Study
from poolnet.text import DIGITS, aligned, coded, marked, pasted, piped, spread
from poolnet.tracking import names, pages, sweep_run, training_runs
from poolnet.tracking.training_runs import SCORES
from poolnet.training.config import TrainConfig


@dataclasses.dataclass
class Result:
    """One combination of options and seed, with its run.

    `status` is FINISHED, or `missing`, or how the run ended. It is RUNNING while another process trains the run. The
    fields are those of `poolnet sweep --json`.
    """

    config: TrainConfig
    status: str = "missing"
    run: str = ""  # its name
    run_id: str = ""  # in MLflow, once it is published
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    trained: bool = False  # now, and not before
    error: str = ""

    @property
    def done(self) -> bool:
        return self.status == "FINISHED"


@dataclasses.dataclass
class Sweep:
    """A study on one data set, with its progress.

    `results` are by `training_runs.key`, in the order of the study. At first all of them are `missing`.
    """

    study: Study
    path: Path  # of the data
    data_sha256: str
    uri: str  # of the tracking server
    auto: str  # the device that `auto` stands for
    results: dict[tuple, Result] = dataclasses.field(init=False)
    experiment_id: str = ""  # of the parent run, once there is one
    publish_error: str | None = None  # why the server does not have everything

    def __post_init__(self) -> None:
        self.results = {self.key(config): Result(config) for config in self.study.configs()}

    @property
    def name(self) -> str:
        return sweep_run.name_of(self.study.name, self.data_sha256)

    @property
    def missing(self) -> list[Result]:
        return [result for result in self.results.values() if not result.done]

    def result(self, config: TrainConfig) -> Result:
        return self.results[self.key(config)]

    def key(self, config: TrainConfig) -> tuple:
        return training_runs.key(config, self.device(config), self.data_sha256)

    def device(self, config: TrainConfig) -> str:
        return self.auto if config.device == "auto" else config.device


def _arm_scores(sweep: Sweep) -> dict[str, dict[str, list[float]]]:
    """Return each arm's scores, by arm and score name.

    There is one value for each seed that is finished so far, the mean of its folds. If options are tuned, it is that of
    the values chosen so far.
    """

    def val_score(config: TrainConfig) -> float:
        result = sweep.result(config)
        return sweep.study.val_score(result.scores) if result.done else -math.inf

    arms, count = {}, len(sweep.study.folds)
    for arm in sweep.study.arms:
        results = [*map(sweep.result, sweep.study.arm(arm, val_score))]
        by_seed = [results[start : start + count] for start in range(0, len(results), count)]
        done = [folds for folds in by_seed if all(result.done for result in folds)]
        arms[arm] = {name: [statistics.fmean(each.scores[name] for each in folds) for folds in done] for name in SCORES}
    return arms


def metrics(sweep: Sweep) -> dict[str, float]:
    """Return the metrics of the parent run."""
    values: dict[str, float] = {
        "runs_finished": len(sweep.results) - len(sweep.missing),
        "runs_missing": len(sweep.missing),
    }
    for letter, scores in zip("abcdefghij", _arm_scores(sweep).values(), strict=False):
        for name, seeds in scores.items():
            if seeds:
                values[f"{letter}_{name}_mean"] = statistics.mean(seeds)
            if len(seeds) > 1:
                values[f"{letter}_{name}_sd"] = statistics.stdev(seeds)
    return names.section("sweep", values)


def _arm_rows(sweep: Sweep) -> list[list[str]]:
    """Return table rows with the scores of each arm.

    Scores are means and standard deviations over seeds.
    """
    rows = [["arm", "n", "val acc", "test acc", "test loss"]]
    for arm, scores in _arm_scores(sweep).items():
        spreads = (spread(scores[name]) for name in ("val_acc", "test_acc", "test_loss"))
        rows.append([arm, str(len(scores["val_acc"])), *spreads])
    return rows


def table(sweep: Sweep) -> str:
    """Return the results as text for a terminal."""
    done = [result for result in sweep.results.values() if result.done]
    now = sum(result.trained for result in done)
    heading = f"{sweep.name}: {len(done)} of {len(sweep.results)} runs finished, {now} of them now"
    return "\n".join([heading, *aligned(_arm_rows(sweep))])


def contents(sweep: Sweep) -> dict[str, object]:
    """Return all results as a dictionary for JSON.

    The keys are the names in the JSON output.
    """
    return {"sweep": sweep.name, "data_sha256": sweep.data_sha256, "runs": list(sweep.results.values())}


def note(sweep: Sweep, experiment_id: str) -> str:
    """Return the description of the parent run in Markdown."""
    study, arms = sweep.study, _arm_rows(sweep)
    for letter, row in zip("abcdefghij", arms[1:], strict=False):
        row[0] = f"{letter}: {row[0]}"
    options = [name for name, values in (study.grid | study.tune).items() if len(values) > 1]
    options += ["fold", "seed"] if len(study.folds) > 1 else ["seed"]
    runs = [["run", *options, "status"]]
    for result in sorted(sweep.results.values(), key=lambda result: result.done):  # what is missing first
        name = result.run or "none yet"
        if result.run_id:
            name = pages.in_markdown(name, pages.run(experiment_id, result.run_id))
        values = [str(getattr(result.config, option)) for option in options]
        runs.append([name, *map(marked, (*values, result.error or result.status))])
    over_folds = f", each the mean of {len(study.folds)} folds" if len(study.folds) > 1 else ""
    lines = [
        *piped(arms),
        "",
        f"{len(sweep.results) - len(sweep.missing)} of {len(sweep.results)} runs are finished, on "
        f"{coded(sweep.path.stem)}. Mean and standard deviation over seeds{over_folds}.",
        "",
        f"**{marked(study.question)}** "
        + coded(pasted("poolnet", "compare", "--study", study.path.as_posix(), "--data", study.data)),
        "",
        f"SHA-256 of the data `{sweep.data_sha256[:DIGITS]}`.",
        "",
    ]
    rows = piped(runs, cell=str)
    while len("\n".join([*lines, *rows])) > names.NOTE_LIMIT - 50:
        rows.pop()
    left_out = len(sweep.results) - len(rows) + 2
    return "\n".join([*lines, *rows, *(["", f"And {left_out} more, below this run."] if left_out else [])])
