"""Which runs a comparison compares: two arms, from a study, an experiment or two runs, with all else held equal."""

import itertools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

from mlflow.tracking.client import MlflowClient

from poolnet import journal, recorded, stores
from poolnet.config import InputError, TrainConfig
from poolnet.recorded import SAME_RUN, Recorded
from poolnet.study import Study

Arms = dict[str, list[Recorded]]  # the two arms' runs by the arms' names
Selected = tuple[Arms, set[str]]  # and the options by which the arms may differ


def of_study(client: MlflowClient, experiment_ids: list[str], study: Study) -> Selected:
    """The newest finished run of each arm and seed, on the study's data."""
    name = Path(study.data).stem
    wanted = {arm: [_options(config) for config in study.arm(arm)] for arm in study.arms}
    all_wanted = set(itertools.chain(*wanted.values()))
    found = [run for run in recorded.search(client, experiment_ids) if _options(run.config) in all_wanted]
    found = [run for run in found if Path(run.config.data).stem == name]
    finished = [run for run in found if run.status == "FINISHED"]
    digests = sorted({run.data_sha256 for run in finished})
    if len(digests) > 1:
        one, other = (next(run for run in finished if run.data_sha256 == digest) for digest in digests[:2])
        raise InputError(
            f"{study.path}: found two data sets called {name}, SHA-256 {digests[0][:8]}... in {one.name} and "
            f"{digests[1][:8]}... in {other.name}; name one with --experiment, in which only it was trained on"
        )
    newest = {_options(run.config): run for run in reversed(finished)}
    missing = [(arm, options) for arm in wanted for options in wanted[arm] if options not in newest]
    if missing:
        arm, options = missing[0]
        begun = [f"{run.name} is {run.status}" for run in found if _options(run.config) == options]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{study.path}: found no finished run of {arm} with seed {options[-1]}{more} on {name}"
            f"{''.join(f', {text}' for text in begun)}; train what is missing with: poolnet sweep {study.path}"
        )
    return {arm: [newest[options] for options in wanted[arm]] for arm in wanted}, set().union(*study.arms.values())


def of_experiment(
    client: MlflowClient, experiment_ids: list[str], by: str, names: Sequence[str], data: str = ""
) -> Selected:
    """The runs of an experiment, or those of them on `data`, by the value of one option: the two values that there are,
    or those named."""
    if by not in SAME_RUN[:-1]:
        raise InputError(f"--by: found {by!r}, expected one of {', '.join(SAME_RUN[:-1])}")
    arms: Arms = {}
    for run in recorded.search(client, experiment_ids):
        if not data or Path(run.config.data).stem == Path(data).stem:
            arms.setdefault(str(getattr(run.config, by)), []).append(run)
    for name in names:
        if name not in arms:
            raise InputError(f"--arms: found no run whose {by} is {name}, expected two of {', '.join(sorted(arms))}")
    if not names and len(arms) != 2:
        found = ", ".join(sorted(arms)) or "none"
        raise InputError(f"--by {by}: found {len(arms)} values, {found}, expected two; choose with --arms ONE OTHER")
    # in the order named, or the one with the first run first
    order = names or sorted(arms, key=lambda name: min(run.started for run in arms[name]))
    return {name: arms[name] for name in order}, {by}


def of_runs(client: MlflowClient, names: Sequence[str]) -> Selected:
    """Two runs, by run id or the name of their journal."""
    runs = []
    for name in names:
        found = stores.look_up(client, name)
        if not found:
            raise InputError(f"{name}: no such run on the tracking server")
        if not recorded.is_training_run(found):
            raise InputError(f"{name}: found a run that is none of poolnet train")
        runs.append(recorded.of(found))
    one, other = runs
    differing = [name for name in SAME_RUN if getattr(one.config, name) != getattr(other.config, name)]
    if len(differing) != 1:
        raise InputError(
            f"{one.name} and {other.name}: found that they differ in {', '.join(differing) or 'nothing'}, expected "
            "exactly one option, the arm"
        )
    values = [str(getattr(run.config, differing[0])) for run in runs]
    labels = values if differing == ["pool"] else [f"{differing[0]} {value}" for value in values]
    return {label: [run] for label, run in zip(labels, runs, strict=True)}, set(differing)


def checked(selected: Selected) -> tuple[Arms, list[str]]:
    """The arms with one run a seed, in the order of seeds, and what a reader should know. Refuses, naming runs, what
    must not be mixed: unfinished runs, other data, other settings than the arm, seeds without a partner."""
    arms, free = selected
    runs = list(itertools.chain(*arms.values()))
    for run in runs:
        if run.status != "FINISHED":
            raise InputError(
                f"{run.name}: found it {run.status}, expected finished runs; finish it with: "
                f"{journal.resume_command(run.name)}, or delete it from MLflow"
            )
    _refuse_mixed("SHA-256 of the data", runs, operator.attrgetter("data_sha256"))
    _refuse_mixed("device", runs, lambda run: run.device)
    for option in SAME_RUN[:-1]:
        for group in arms.values() if option in free else [runs]:
            _refuse_mixed(option, group, operator.attrgetter(f"config.{option}"))
    unique, notes = {}, []
    for name, group in arms.items():
        by_seed = {run.config.seed: run for run in sorted(group, key=operator.attrgetter("started"))}
        unique[name] = [by_seed[seed] for seed in sorted(by_seed)]
        if len(by_seed) < len(group):
            notes.append(f"{name}: {len(group)} runs of {len(by_seed)} seeds; the newest of each seed counts.")
    for one, other in itertools.permutations(unique.values()):
        for run in one if "seed" not in free else ():
            if run.config.seed not in [partner.config.seed for partner in other]:
                raise InputError(
                    f"{run.name}: found its seed {run.config.seed} in one arm only, expected pairs; train the other "
                    "one, or delete this one from MLflow"
                )
    return unique, notes


def _refuse_mixed(what: str, runs: Sequence[Recorded], value: Callable[[Recorded], object]) -> None:
    for run in runs:
        if value(run) != value(runs[0]):
            raise InputError(
                f"{what}: found {value(runs[0])} in {runs[0].name} and {value(run)} in {run.name}, expected one "
                "and the same in all runs that are compared"
            )


def _options(config: TrainConfig) -> tuple:
    return tuple(getattr(config, name) for name in SAME_RUN)
