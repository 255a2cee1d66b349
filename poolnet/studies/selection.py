"""Select the runs of two arms for a comparison.

The arms come from a study, an experiment or two runs. All other settings are held equal.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mlflow.tracking.client import MlflowClient

from poolnet.data import dataset
from poolnet.errors import InputError
from poolnet.runs import run_record
from poolnet.studies.study import ARMS, Study
from poolnet.text import pasted, step
from poolnet.tracking import server_runs, training_runs
from poolnet.tracking.training_runs import TrainingRun
from poolnet.training.config import ARM_OPTIONS, SAME_RUN, TrainConfig
from poolnet.training.device import resolve_device

Arms = dict[str, list[TrainingRun]]  # the arms' runs by the arms' names


@dataclasses.dataclass(frozen=True)
class Selected:
    """The runs of each arm, and the options that may differ.

    `free` are the options by which the arms differ. `tuned` are those that each arm chose on val, fold by fold.
    """

    arms: Arms
    free: Collection[str]
    tuned: Collection[str] = ()


def of_study(client: MlflowClient, experiment_ids: list[str], study: Study) -> Selected:
    """Select the runs of a study's arms.

    For each arm, seed and fold, it takes the newest finished run on the study's data. Of tuned options, each arm has
    the values that are best on val. For device `auto` see `_device`. If runs are missing, but an earlier version
    trained all of them on the same images, before these had families, then those count.
    """
    configs = {arm: study.all_of(arm) for arm in study.arms}
    found = []
    for sha256 in _digests_here(study.data) or [_digest_by_name(client, experiment_ids, study)]:
        finished = training_runs.finished(client, experiment_ids, sha256, study.optimum)
        device = _device([*itertools.chain(*configs.values())], finished.values())
        wanted = [(arm, each) for arm in configs for each in configs[arm]]
        missing = [(arm, each) for arm, each in wanted if _key(each, device, sha256) not in finished]
        found.append((sha256, finished, device, missing))
    sha256, finished, device, missing = min(found, key=lambda each: bool(each[-1]))
    if missing:
        arm, config = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        begun = [
            f", {run.name} is {run.status}"
            for run in training_runs.search(client, experiment_ids, echo_warning=_say_nothing)
            if run.status != "FINISHED" and run.key == _key(config, run.device, sha256)
        ]
        again = pasted("poolnet", "sweep", study.path, "--data", study.data)
        fold, name = f" on fold {config.fold}" if config.fold else "", Path(study.data).stem
        raise InputError(
            f"{study.path}: found no finished run of {arm} with seed {config.seed}{fold}{more} on {name}, "
            f"SHA-256 {sha256[:8] or 'unknown'}{''.join(begun)}; train what is missing with: {again}"
        )

    def run(config: TrainConfig) -> TrainingRun:
        return finished[_key(config, device, sha256)]

    chosen = {arm: study.arm(arm, lambda config: study.val_score(run(config).metrics)) for arm in study.arms}
    arms = {arm: [*map(run, configs)] for arm, configs in chosen.items()}
    return Selected(arms, set().union(*study.arms.values()), study.tune)


def _key(config: TrainConfig, auto: str, data_sha256: str) -> tuple:
    return training_runs.key(config, auto if config.device == "auto" else config.device, data_sha256)


def _device(configs: list[TrainConfig], runs: Collection[TrainingRun]) -> str:
    """Choose the device whose runs stand for device `auto`.

    It is the device of this machine, as for a sweep here. If some of the study's runs are missing there, it is another
    device that has all of them.
    """
    keys = {run.key for run in runs}
    sha256 = next(iter(runs)).data_sha256 if runs else ""
    devices = sorted({run.device for run in runs})
    whole = [device for device in devices if all(_key(config, device, sha256) in keys for config in configs)]
    if len(whole) == 1:
        return whole[0]
    own = resolve_device("auto")
    return own if own in whole or not whole else whole[0]


def _digests_here(name: str) -> list[str]:
    """Return the SHA-256 of a data set on this machine.

    The second is that of its images and labels alone, by which runs of earlier versions know it. The list is empty if
    the data set is not here.
    """
    step(f"Opening the data set {name}")
    try:
        path = dataset.locate(name)
    except InputError:
        return []
    if not path.exists():
        return []
    found = dataset.open_dataset(path, keep=())
    return [*dict.fromkeys((found.sha256, found.images_sha256))]


def _digest_by_name(client: MlflowClient, experiment_ids: list[str], study: Study) -> str:
    """Return the data set's SHA-256 from a study's finished runs.

    It looks at runs on data of the same name. They must agree on the SHA-256. Otherwise `InputError` is raised.
    """
    wanted = {_key(config, "", "") for config in study.configs()}
    runs = [
        run
        for run in training_runs.search(client, experiment_ids, "attributes.status = 'FINISHED'", _say_nothing)
        if training_runs.key(run.config, "", "") in wanted and _is_on(run, study.data)
    ]
    digests = sorted({run.data_sha256 for run in runs})
    if len(digests) > 1:
        one, other = (next(run for run in runs if run.data_sha256 == digest) for digest in digests[:2])
        raise InputError(
            f"{study.path}: found two data sets called {Path(study.data).stem}, SHA-256 {digests[0][:8]}... in "
            f"{one.name} and {digests[1][:8]}... in {other.name}; name the file of one with --data"
        )
    return digests[0] if digests else ""


def _say_nothing(warning: object) -> None:
    """Ignore a warning about runs that are left out.

    Another search gives this warning.
    """


def _is_on(run: TrainingRun, name: str) -> bool:
    """Whether a run used a data set of this name.

    The folder of the data set does not matter.
    """
    return Path(run.config.data).stem == Path(name).stem


def of_experiment(
    client: MlflowClient, experiment_ids: list[str], by: str, names: Sequence[str], data: str = ""
) -> Selected:
    """Select the runs of an experiment by one option.

    The runs that have the same value of option `by` are an arm. The arms are all of its values, or those in `names`.
    With `data`, only runs on that data set count. If some runs are of folds and some of the file's own splits, the
    latter count.
    """
    found = [*training_runs.search(client, experiment_ids)]
    digests = _digests_here(data) if data else []
    runs = [run for run in found if not digests and (not data or _is_on(run, data))]
    for sha256 in reversed(digests):  # runs on images with families, or else those of images alone
        runs = [run for run in found if run.data_sha256 == sha256] or runs
    whole = [run for run in runs if not run.config.fold] or runs
    arms: Arms = {}
    for run in whole:
        arms.setdefault(str(getattr(run.config, by)), []).append(run)
    for name in names:
        if name not in arms:
            raise InputError(f"--arms: found no run whose {by} is {name}, expected two of {', '.join(sorted(arms))}")
    if not names and not 2 <= len(arms) <= ARMS:
        values = ", ".join(sorted(arms)) or "none"
        raise InputError(f"--by {by}: found {len(arms)} values, {values}, expected two; choose with --arms ONE OTHER")
    # in the order named, or the one with the first run first
    order = names or sorted(arms, key=lambda name: min(run.started for run in arms[name]))
    return Selected({name: arms[name] for name in order}, {by})


def of_runs(client: MlflowClient, names: Sequence[str]) -> Selected:
    """Select two runs by name or run id, see `server_runs.look_up`."""
    runs = []
    for name in names:
        run = server_runs.look_up(client, name)
        if not training_runs.is_training_run(run):
            raise InputError(f"{name}: found a run that is none of poolnet train")
        runs.append(training_runs.of(run))
    one, other = runs
    differing = [name for name in SAME_RUN if getattr(one.config, name) != getattr(other.config, name)]
    if len(differing) != 1 or differing == ["fold"]:
        raise InputError(
            f"{one.name} and {other.name}: found that they differ in {', '.join(differing) or 'nothing'}, expected "
            "exactly one option, the arm"
        )
    values = [str(getattr(run.config, differing[0])) for run in runs]
    labels = values if differing == ["pool"] else [f"{differing[0]} {value}" for value in values]
    return Selected({label: [run] for label, run in zip(labels, runs, strict=True)}, set(differing))


def checked(selected: Selected) -> tuple[Arms, list[str]]:
    """Check that the selected arms can be compared.

    Returns the arms with one run per seed and fold, in the order of seeds, and notes for the reader. Refuses runs that
    must not be mixed, and names them: unfinished runs, other data, settings that differ besides the arm, seeds and
    folds without a partner.
    """
    arms, notes = _finished(selected.arms)
    runs = list(itertools.chain(*arms.values()))
    _refuse_mixed("SHA-256 of the data", runs, operator.attrgetter("data_sha256"))
    _refuse_mixed("number of folds", runs, lambda run: run.config.fold.partition("/")[2] or "none")
    for option in ("device", *ARM_OPTIONS):
        value = operator.attrgetter("device" if option == "device" else f"config.{option}")
        if option not in selected.tuned:
            for group in arms.values() if option in selected.free else [runs]:
                _refuse_mixed(option, group, value)
    unique = {}
    for name, group in arms.items():
        newest = {_place(run): run for run in sorted(group, key=operator.attrgetter("started"))}
        unique[name] = [newest[place] for place in sorted(newest)]
        if len(newest) < len(group):
            what = "seeds and folds" if group[0].config.fold else "seeds"
            notes.append(f"{name}: {len(group)} runs of {len(newest)} {what}; the newest of each counts.")
    if "seed" not in selected.free:
        _refuse_single([*unique.values()])
    return unique, notes


def _place(run: TrainingRun) -> tuple[int, int]:
    """Return seed and fold, in whose order the runs of an arm are."""
    return run.config.seed, int(run.config.fold.partition("/")[0] or 0)


def _refuse_single(groups: list[list[TrainingRun]]) -> None:
    """Refuse a run whose seed and fold another arm lacks.

    Each seed must have the same folds, too.
    """
    places = [set(map(_place, group)) for group in groups]
    folds = {fold for seed, fold in set().union(*places)}
    for one, other in itertools.permutations(range(len(groups)), 2):
        for run in groups[one]:
            seed, fold = _place(run)
            if (seed, fold) not in places[other]:
                where = f" on fold {run.config.fold}" if fold else ""
                raise InputError(
                    f"{run.name}: found its seed {seed}{where} in one arm only, expected it in all; train the other "
                    "one, or delete this one from MLflow"
                )
            if missing := sorted(folds - {fold for other_seed, fold in places[one] if other_seed == seed}):
                raise InputError(f"{run.name}: found no run of its seed on fold {missing[0]}, expected the same folds")


def _finished(arms: Arms) -> tuple[Arms, list[str]]:
    """Return the arms without runs that did not finish.

    For each unfinished run, a finished run with the same settings must exist.
    """
    runs = list(itertools.chain(*arms.values()))
    finished = {run.key for run in runs if run.status == "FINISHED"}
    left_out = [run for run in runs if run.status != "FINISHED"]
    for run in left_out:
        if run.key not in finished:
            raise InputError(
                f"{run.name}: found it {run.status}, expected finished runs; finish it with: "
                f"{run_record.resume_command(run.name)}, or delete it from MLflow"
            )
    kept = {name: [run for run in group if run.status == "FINISHED"] for name, group in arms.items()}
    names = ", ".join(f"{run.name} ({run.status})" for run in left_out)
    return kept, [f"Left out, since a finished run has the same settings: {names}."] if left_out else []


def _refuse_mixed(what: str, runs: Sequence[TrainingRun], value: Callable[[TrainingRun], object]) -> None:
    for run in runs:
        if value(run) != value(runs[0]):
            raise InputError(
                f"{what}: found {value(runs[0])} in {runs[0].name} and {value(run)} in {run.name}, expected one "
                "and the same in all runs that are compared"
            )
