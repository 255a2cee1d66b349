"""The queue of a sweep, Optuna's grid in a journal file: which combination is taken, and what came of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.samplers import GridSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import Trial, TrialState, create_trial

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
        lock = JournalFileOpenLock(str(path))  # Optuna's other one takes symbolic links, for which Windows wants rights
        Path(f"{path}.lock").unlink(missing_ok=True)  # of a process that was killed
        form = hashlib.sha256(json.dumps(self.space).encode()).hexdigest()[:8]  # another grid is another queue
        self.trials = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), lock_obj=lock)),
            study_name=form,
            sampler=Grid(self.space, seed=0),
            load_if_exists=True,
        )
        for trial in self.trials.get_trials(states=(TrialState.RUNNING,)):
            self.trials.tell(trial.number, state=TrialState.FAIL)

    def take(self, done: Callable[[TrainConfig], float | None]) -> tuple[Trial, TrainConfig] | None:
        """The next combination for which `done` knows no val loss yet; None when all are taken."""
        while not self._all_taken():
            trial = self.trials.ask()
            values = {name: trial.suggest_categorical(name, choices) for name, choices in self.space.items()}
            config = TrainConfig(data=self.study.data, **values)
            loss = done(config)
            if loss is None:
                return trial, config
            self.trials.tell(trial, loss)
        return None

    def _all_taken(self) -> bool:
        trials = self.trials.get_trials(deepcopy=False)
        places = {trial.system_attrs.get("grid_id") for trial in trials}
        return len(places) == len(self.study.configs()) and not any(t.state == TrialState.WAITING for t in trials)

    def again(self, missing: Callable[[TrainConfig], bool]) -> None:
        """Queue once more what an earlier process failed at, or what the server has lost since."""
        for trial in self._newest():
            if trial.state.is_finished() and missing(TrainConfig(data=self.study.data, **trial.params)):
                waiting = create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs=trial.system_attrs,  # its place in the grid
                )
                self.trials.add_trial(waiting)

    def _newest(self) -> list:
        """The last trial of each combination."""
        return list({trial.system_attrs["grid_id"]: trial for trial in self.trials.get_trials(deepcopy=False)}.values())

    def tell(self, trial: Trial, val_loss: float | None) -> None:
        """What came of it; None is a failure."""
        if val_loss is None:
            self.trials.tell(trial, state=TrialState.FAIL)
        else:
            self.trials.tell(trial, val_loss)
