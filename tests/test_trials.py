"""The queue of a sweep: each combination once, and once more what was cut off, failed or lost."""

import pytest

from poolnet import study
from poolnet.trials import Queue

STUDY = """question = "Which?"
seeds = [1, 2]
[grid]
pool = ["max", "avg"]
epochs = 2
[arms]
max = { pool = "max" }
avg = { pool = "avg" }
"""


@pytest.fixture
def found(tmp_path):
    path = tmp_path / "trial.toml"
    path.write_text(STUDY, encoding="utf-8")
    return study.read(path)


def nothing(config):
    return None


def taken(queue, done=nothing):
    """Everything that is left to take, in any order."""
    trials = []
    while trial := queue.take(done):
        trials.append(trial)
    return trials


def configs(trials):
    return sorted((config.pool, config.seed) for _, config in trials)


EVERY = [("avg", 1), ("avg", 2), ("max", 1), ("max", 2)]


def test_each_combination_is_taken_once(found, tmp_path):
    queue = Queue(found, tmp_path / "queue")
    trials = taken(queue)
    assert configs(trials) == EVERY
    assert {config.epochs for _, config in trials} == {2}
    for trial, _ in trials:
        queue.tell(trial, 0.5)
    again = Queue(found, tmp_path / "queue")
    again.again(lambda config: False)
    assert taken(again) == []


def test_what_is_known_already_is_not_handed_out(found, tmp_path):
    queue = Queue(found, tmp_path / "queue")
    assert configs(taken(queue, lambda config: 0.5 if config.pool == "max" else None)) == EVERY[:2]


@pytest.mark.parametrize("began", [1, 2, 4])
def test_what_a_process_had_in_hand_when_it_died_is_queued_again(found, tmp_path, began):
    queue = Queue(found, tmp_path / "queue")
    trials = [queue.take(nothing) for _ in range(began)]
    queue.tell(trials[0][0], 0.5)
    finished = trials[0][1]
    after = Queue(found, tmp_path / "queue")
    after.again(lambda config: config != finished)
    rest = [key for key in EVERY if key != (finished.pool, finished.seed)]
    assert configs(taken(after)) == rest


def test_one_that_was_cut_off_while_it_was_taken_is_whole_again(found, tmp_path):
    queue = Queue(found, tmp_path / "queue")
    queue.trials.ask().suggest_categorical("pool", found.grid["pool"])  # and no seed
    after = Queue(found, tmp_path / "queue")
    after.again(lambda config: True)
    assert configs(taken(after)) == EVERY


def test_failures_and_runs_that_the_server_lost_are_queued_again(found, tmp_path):
    queue = Queue(found, tmp_path / "queue")
    for trial, config in taken(queue):
        queue.tell(trial, None if config.seed == 1 else 0.5)
    after = Queue(found, tmp_path / "queue")
    after.again(lambda config: (config.pool, config.seed) != ("avg", 2))
    assert configs(taken(after)) == [key for key in EVERY if key != ("avg", 2)]


def test_a_damaged_file_costs_nothing_but_the_queue(found, tmp_path):
    path = tmp_path / "queue"
    taken(Queue(found, path))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"{torn\n" + data[len(data) // 2 :])
    assert configs(taken(Queue(found, path))) == EVERY


def test_another_grid_is_another_queue(found, tmp_path):
    taken(Queue(found, tmp_path / "queue"))
    found.path.write_text(STUDY.replace("seeds = [1, 2]", "seeds = [1, 2, 3]"), encoding="utf-8")
    queue = Queue(study.read(found.path), tmp_path / "queue")
    assert len(taken(queue)) == 6
