"""The queue of a sweep, Optuna's grid in a journal file: which combination is taken, and what came of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.samplers import GridSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from poolnet.config import TrainConfig
from poolnet.study import Study


class Grid(GridSampler):
    def after_trial(self, *_: object) -> None:
        """Optuna would stop its own loop here, which nobody runs: trials are asked for and told one by one."""


class Queue:
    """To be opened by one process at a time: what another had in hand when it died is queued again."""

    def __init__(self, study: Study, path: Path):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study, self.space = study, {**study.grid, "seed": study.seeds}
        try:
            self.trials = self._opened(path)
        except (ValueError, KeyError):  # damaged; what is left to do is known from the runs
            path.unlink()
            self.trials = self._opened(path)
        for trial in self.trials.get_trials(states=(TrialState.RUNNING,)):
            self.trials.tell(trial.number, state=TrialState.FAIL)

    def _opened(self, path: Path) -> optuna.Study:
        lock = JournalFileOpenLock(str(path))  # Optuna's other one takes symbolic links, for which Windows wants rights
        Path(f"{path}.lock").unlink(missing_ok=True)  # of a process that was killed
        form = hashlib.sha256(json.dumps(self.space).encode()).hexdigest()[:8]  # another grid is another queue
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        grid = Grid(self.space, seed=0)
        return optuna.create_study(storage=storage, study_name=form, sampler=grid, load_if_exists=True)

    def again(self, missing: Callable[[TrainConfig], bool]) -> None:
        """Queue once more what an earlier process failed at, or what the server has lost since."""
        for trial in self._newest().values():
            whole = set(trial.params) == set(self.space)  # or it was cut off while it was taken
            if trial.state.is_finished() and (not whole or missing(self._config(trial.params))):
                self.trials.add_trial(create_trial(state=TrialState.WAITING, system_attrs=trial.system_attrs))

    def take(self, done: Callable[[TrainConfig], float | None]) -> tuple[Trial, TrainConfig] | None:
        """The next combination for which `done` knows no val loss yet; None when all are taken."""
        while not self._all_taken():
            trial = self.trials.ask()
            config = self._config({name: trial.suggest_categorical(name, each) for name, each in self.space.items()})
            loss = done(config)
            if loss is None:
                return trial, config
            self.trials.tell(trial, loss)
        return None

    def tell(self, trial: Trial, val_loss: float | None) -> None:
        """What came of it; None is a failure."""
        if val_loss is None:
            self.trials.tell(trial, state=TrialState.FAIL)
        else:
            self.trials.tell(trial, val_loss)

    def _all_taken(self) -> bool:
        newest = self._newest()
        waiting = any(trial.state == TrialState.WAITING for trial in newest.values())
        return len(newest) == len(self.study.configs()) and not waiting

    def _newest(self) -> dict[int, FrozenTrial]:
        """The last trial of each combination, by its place in the grid."""
        trials = self.trials.get_trials(deepcopy=False)
        return {trial.system_attrs["grid_id"]: trial for trial in trials if "grid_id" in trial.system_attrs}

    def _config(self, values: dict[str, object]) -> TrainConfig:
        return TrainConfig(data=self.study.data, **values)
