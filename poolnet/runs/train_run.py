"""Train one run and write all its files.

This is what `poolnet train` does, from the data to the last file. Everything is recorded on disk. Nothing is published
here.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from poolnet import process
from poolnet.data import dataset, folds
from poolnet.data.dataset import SPLITS, Dataset
from poolnet.errors import InputError, RunError
from poolnet.runs import provenance, run_record
from poolnet.runs.run_record import RunRecord
from poolnet.text import Echo
from poolnet.training import fast_step, features, train_loop
from poolnet.training.config import CONV, Arithmetic, TrainConfig
from poolnet.training.device import resolve_device
from poolnet.training.evaluation import Evaluation, score_logits
from poolnet.training.model import build_model
from poolnet.training.optimum import Optimum, find_optimum, loss_of
from poolnet.training.train_loop import EpochRecord, FitResult, Start, State

Begun = Callable[[RunRecord], object]  # is called as soon as the run can be published
Check = Callable[[], object]  # is called before a new run and after each epoch; may raise `InputError`
POOLED = Arithmetic(1, "contiguous")  # of a network that does not depend on either
METRICS = {field.name for field in dataclasses.fields(EpochRecord)} - {"epoch"}  # of an epoch, as recorded
Pooled = dict[str, np.ndarray] | None  # the features of each split; None for a network that learns its own


def run(
    config: TrainConfig,
    optimum: bool,
    cache: bool,
    server: Mapping[str, str],
    begun: Begun = lambda run: None,
    check: Check = lambda: None,
    echo: Echo = print,
    echo_warning: Echo = print,
) -> RunRecord:
    """Train a new run, tracked by `server`, and write its files."""
    resolve_device(config.device)
    splits, pooled = open_training_data(config, cache, echo)
    for warning in splits.warnings():
        echo_warning(warning)
    check()
    new = create(config, optimum, splits, server)
    process.last_words = f"stopped; go on with: {run_record.resume_command(new.name)}"
    with new.training():
        begun(new)
        carry_out(new, splits, pooled, check, echo, echo_warning)
    return new


def resume(
    old: RunRecord,
    given: Mapping[str, object],
    cache: bool,
    begun: Begun = lambda run: None,
    check: Check = lambda: None,
    echo: Echo = print,
    echo_warning: Echo = print,
) -> RunRecord:
    """Continue a run, to the same result.

    The result is the same as if the run had not stopped. Raises `InputError` if the `given` options contradict its
    record.
    """
    if os.environ.get("MLFLOW_RUN_ID"):  # `mlflow run` passes its defaults on as if the user had typed them
        defaults = {**dataclasses.asdict(TrainConfig()), "optimum": False}
        given = {option: value for option, value in given.items() if value != defaults[option]}
    check_options(old, given)
    if old.finished and old.has_results():
        begun(old)
        echo(f"{old.name} is finished")
        return old
    process.last_words = f"stopped; go on with: {run_record.resume_command(old.name)}"
    with old.training():
        resolve_device(old.record["device"])
        splits, pooled = open_recorded_data(old, cache, echo)
        begun(old)
        carry_out(old, splits, pooled, check, echo, echo_warning)
    return old


def open_training_data(
    config: TrainConfig, cache: bool, echo: Echo, path: Path | None = None
) -> tuple[Dataset, Pooled]:
    """Open the data set, or its fold, and the pooled features.

    The data set is that of the settings, or the one at `path`. There are no features (None) for pool `conv`.
    """
    path = path or dataset.locate(config.data, echo)
    if config.pool == "conv":
        whole = dataset.open_dataset(path)
        return folds.take(whole, config.fold)[0] if config.fold else whole, None
    if not config.fold:
        return features.open_pooled(path, config.pool, cache, echo)
    whole, pooled = features.open_pooled(path, config.pool, cache, echo, keep=SPLITS)
    splits, rows = folds.take(whole, config.fold)
    # only images of test are shown later, as in `features.KEPT`
    train, val = (dataclasses.replace(split, X=None) for split in (splits.train, splits.val))
    of_all = np.concatenate([pooled[name] for name in SPLITS])
    return dataclasses.replace(splits, train=train, val=val), {name: of_all[at] for name, at in rows.items()}


def create(
    config: TrainConfig,
    optimum: bool,
    splits: Dataset,
    server: Mapping[str, str],
    sweep: str = "",
    reproduces: str = "",
    conv: Arithmetic = CONV,
    device: str = "",
    differs: str = "",
    path: Path | None = None,
) -> RunRecord:
    """Create the record of a new run.

    The run may belong to a sweep. Or it may reproduce the run with the id `reproduces`, with that run's `conv`.
    `server` says where the run is tracked: `uri` and the other keys of `tracking` in `record_form.FORM`. `device` is
    that of the settings, unless another is given. `differs` says how the software differs from that of the machine
    that sweeps. `path` is as for `run_record.create`.
    """
    commit, dirty, diff = provenance.code_state()
    record = {
        "config": dataclasses.asdict(config),
        "optimum": optimum,
        "sweep": sweep,
        "reproduces": reproduces,
        "device": device or resolve_device(config.device),
        "data": splits.summary(),
        "code": {"commit": commit, "dirty": dirty},
        "environment": {
            **provenance.environment(),
            **dataclasses.asdict(conv if config.pool == "conv" else POOLED),
            **({"differs": differs} if differs else {}),
        },
        "tracking": {**server, **({"run_id": ""} if sweep else {})},  # a sweep's id is its parent run's
    }
    return run_record.create(run_record.stem_of(config), record, diff, path)


def arithmetic(record: dict) -> Arithmetic:
    """Return how a recorded run is computed."""
    return Arithmetic(record["environment"]["threads"], record["environment"]["layout"])


def settings(run: RunRecord) -> TrainConfig:
    """Return the settings of a run that is to be trained.

    Raises `InputError` if this version does not know a setting.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := run.record["config"].keys() - known:
        raise InputError(f"{run.name}: {', '.join(sorted(unknown))}: no setting of this version; update poolnet")
    return TrainConfig(**run.record["config"])


def check_options(run: RunRecord, given: Mapping[str, object]) -> None:
    """Raise `InputError` if options contradict the run's record."""
    recorded = run.record["config"] | {"optimum": run.record["optimum"]}
    for name, value in given.items():
        if value != recorded[name]:
            raise InputError(
                f"{name}: found {value}, but {recorded[name]} in the record of {run.name}; leave it out, or start anew"
            )


def open_recorded_data(run: RunRecord, cache: bool, echo: Echo) -> tuple[Dataset, Pooled]:
    """Open the data set of a run, or raise `InputError` if changed."""
    recorded = run.record["data"]
    path = Path(recorded["path"])
    config = settings(run)
    splits, pooled = open_training_data(config, cache, echo, path if path.exists() else None)
    if not splits.is_recorded_as(recorded["sha256"]):
        raise InputError(
            f"{splits.path}: found SHA-256 {splits.sha256[:16]}..., but {recorded['sha256'][:16]}... in the record of "
            f"{run.name}; put the data set back, or start a new run"
        )
    return splits, pooled


def carry_out(
    run: RunRecord,
    splits: Dataset,
    pooled: Pooled,
    check: Check = lambda: None,
    echo: Echo = print,
    echo_warning: Echo = print,
    figures: bool = True,
    best: Optimum | None = None,
) -> None:
    """Train the rest of a run and write its results.

    If the record says that the optimum is wanted, it is `best`, or it is found.
    """
    result = _train(run, splits, pooled, check, echo, echo_warning)
    echo(f"TEST: loss={result.test.loss:.4f}, acc={result.test.acc:.4f}")
    at_optimum = None
    if pooled and run.record["optimum"]:
        best = best or find_optimum(pooled["train"], splits.train.y)
        at_optimum = _at_optimum(best, result, splits, pooled)
        echo(at_optimum)
        if not best.converged:
            echo_warning("the lowest train loss is lower still: it falls for ever as the weights grow")
    _write_result(run, splits, result, at_optimum)
    if figures:
        echo("Drawing the figures ...")
        # last, so that the publisher can upload the rest meanwhile
        _draw(run, splits, result, at_optimum.train_loss if at_optimum else None)
    run.end("FINISHED")


def draw(run: RunRecord, echo: Echo = print) -> None:
    """Draw the figures of a finished run from its record.

    Raises `InputError` if the run is not finished or its data set has changed, and `RunError` if the record is damaged.
    """
    if not run.finished:
        how = "" if run.is_training() else f"; finish it with: {run_record.resume_command(run.name)}"
        raise InputError(f"{run.name}: not finished yet{how}")
    run.check_results()
    splits, _ = open_recorded_data(run, True, echo)
    records, arrays = run.by_step(), run.load_tensors("model")
    assert arrays
    once, config = records.pop(0), settings(run)
    model = build_model(config.pool, config.seed)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items() if name != "example"})
    if not once.keys() >= {"test_loss", "test_acc"} or not all(values.keys() >= METRICS for values in records.values()):
        raise RunError(f"{run.folder}: metrics.jsonl lacks some of what figures show, as earlier versions recorded it")
    history = tuple(EpochRecord(epoch, **_metrics(records[epoch])) for epoch in sorted(records))
    val = Evaluation(history[-1].val_loss, history[-1].val_acc, *run.load_predictions("val")[:2])
    test = Evaluation(once["test_loss"], once["test_acc"], *run.load_predictions("test")[:2])
    result = FitResult(model, history, val, test)
    _draw(run, splits, result, once.get("optimum_train_loss"), f"poolnet figures {run.name}")


@dataclasses.dataclass(frozen=True)
class _AtOptimum:
    """The scores of the weights with the lowest train loss."""

    train_loss: float  # nats
    gap: float  # how far the loss of the trained weights is above it
    val: Evaluation
    test: Evaluation

    def __str__(self) -> str:
        return (
            f"Optimum: train loss={self.train_loss:.6f}, {self.gap:.6f} below that of the trained weights; "
            f"test loss={self.test.loss:.4f}, acc={self.test.acc:.4f}"
        )

    def metrics(self) -> dict[str, float]:
        scores = {"val_loss": self.val.loss, "val_acc": self.val.acc}
        scores |= {"test_loss": self.test.loss, "test_acc": self.test.acc}
        return {
            "optimum_train_loss": self.train_loss,
            "optimality_gap": self.gap,
            **{f"optimum_{name}": value for name, value in scores.items()},
        }


def _at_optimum(best: Optimum, result: FitResult, splits: Dataset, pooled: dict[str, np.ndarray]) -> _AtOptimum:
    trained = loss_of(fast_step.weights(result.model).numpy(), pooled["train"], splits.train.y)
    val, test = (score_logits(best.logits(pooled[split.name]), split.y) for split in (splits.val, splits.test))
    return _AtOptimum(best.train_loss, trained - best.train_loss, val, test)


def _train(run: RunRecord, splits: Dataset, pooled: Pooled, check: Check, echo: Echo, echo_warning: Echo) -> FitResult:
    config = dataclasses.replace(settings(run), device=run.record["device"])  # the one that `auto` chose
    recorded = run.by_step()
    if recorded and (differences := _differences(run)):
        echo_warning(f"{run.name} was begun with {differences}: the last digits may differ")

    def resume_from(new: State) -> Start | None:
        for state in run.checkpoints():
            if _form(state) != _form(new):
                continue
            history = [recorded.get(epoch, {}) for epoch in range(1, int(state["epochs"]) + 1)]
            if history and all(values.keys() >= METRICS for values in history):
                echo(f"Resuming {run.name} after epoch {len(history)} of {config.epochs}")
                done = (EpochRecord(epoch, **_metrics(values)) for epoch, values in enumerate(history, 1))
                return Start(tuple(done), state)
        return None  # every epoch is trained again, to the same figures; those recorded stay

    def on_epoch(record: EpochRecord) -> None:
        values = dataclasses.asdict(record)
        known = run.append(values.pop("epoch"), values)["metrics"]
        echo(record)  # after it is on disk, since a closed terminal makes echo fail
        for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
            if known.get(name) != values[name]:
                raise RunError(
                    f"epoch {record.epoch}: {name}: found {values[name]!r}, but {known.get(name)!r} in the record of "
                    f"{run.name}, begun elsewhere ({_differences(run) or 'with the same packages'}); start a new run"
                )
        check()

    if pooled is None:
        return train_loop.fit(config, splits, on_epoch, run.save_checkpoint, resume_from, arithmetic(run.record))
    return fast_step.fit(config, splits, pooled, on_epoch, run.save_checkpoint, resume_from)


def _metrics(values: Mapping[str, float]) -> dict[str, float]:
    return {name: values[name] for name in METRICS}


def _form(state: State) -> dict[str, tuple]:
    """Return what all states of one training share."""
    # Earlier versions wrote states within an epoch too. These have `parts`; those at an epoch's end have none.
    old = {"spent"} if len(state.get("parts", ())) else {"spent", "parts"}
    return {name: (array.dtype, array.shape) for name, array in state.items() if name not in old}


def _differences(run: RunRecord) -> str:
    """Return how code and environment differ from the recorded ones."""
    recorded, here = run.record["code"]["commit"], provenance.code_state()[0]
    commit = [f"commit {recorded} (here {here})"] if recorded != here else []
    return ", ".join([*commit, *provenance.differences(run.record)])


def _write_result(run: RunRecord, splits: Dataset, result: FitResult, at_optimum: _AtOptimum | None) -> None:
    """Write predictions, scores and weights."""
    for split in (splits.val, splits.test):
        trained: Evaluation = getattr(result, split.name)
        arrays = {"logits": trained.logits, "y": trained.y}
        if split.group is not None:
            arrays["group"] = split.group
        if at_optimum:
            arrays["optimum"] = getattr(at_optimum, split.name).logits
        run.save_predictions(split.name, arrays)
    once = train_loop.score(result.history) | {"test_loss": result.test.loss, "test_acc": result.test.acc}
    if at_optimum:
        once |= at_optimum.metrics()
    run.append(0, once)
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in result.model.state_dict().items()}
    example = splits.test.images(np.arange(2) % len(splits.test))
    run.save_tensors("model", {**weights, "example": example})


def _draw(run: RunRecord, splits: Dataset, result: FitResult, lowest: float | None, again: str = "") -> None:
    from poolnet.runs import figures  # matplotlib takes a second

    drawn = figures.of_run(settings(run), splits, result, lowest)
    with run.writing(again):
        figures.save_all(run.folder / "figures", drawn)
