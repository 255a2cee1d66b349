"""How many challengers a champion meets, and who counts as one, on a real registry."""

import mlflow
import pytest
from mlflow.entities import Metric, Param

from poolnet.models import budget
from poolnet.tracking import names

SETTINGS = {"pool": "avg", "epochs": "3", "batch_size": "32", "lr": "0.01", "seed": "1"}


@pytest.fixture
def client():
    """A registry whose versions 1 and 2 are champions to be."""
    client = mlflow.MlflowClient()
    client.create_registered_model("poolnet")
    for _ in range(2):
        client.create_model_version("poolnet", "somewhere")
    return client


def trained(client, device="cpu", **settings):
    """A run of a training with these settings."""
    run_id = client.create_run("0", tags={names.RUN: "a-run", names.DEVICE: device}).info.run_id
    params = SETTINGS | {name: str(value) for name, value in settings.items()}
    client.log_batch(run_id, [Metric("val_acc", 0.5, 0, 0)], [Param(*param) for param in params.items()])
    return client.get_run(run_id)


def take(client, version, run, challengers=10, champion="1"):
    return budget.take(client, client.get_model_version("poolnet", champion), version, run, challengers)


def asked(client, runs, challengers):
    """The turns of those that are tested."""
    turns = []
    for version, run in enumerate(runs, start=10):
        try:
            turns.append(take(client, version, run, challengers))
        except budget.Untested:
            continue
    return turns


def test_no_series_spends_more_than_the_level(client):
    turns = asked(client, [trained(client, lr=lr / 1000) for lr in range(1, 8)], 4)
    assert list(map(str, turns)) == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert sum(turn.level for turn in turns) == pytest.approx(0.05)
    assert [turn.spent for turn in turns] == pytest.approx([0.0125, 0.025, 0.0375, 0.05])


def test_of_many_seeds_one_is_tested_on_one_device(client):
    runs = [trained(client, device, seed=seed) for seed in range(3) for device in ("cpu", "cuda")]
    assert list(map(str, asked(client, runs, 4))) == ["1 of 4"]
    with pytest.raises(budget.Untested, match=r"^Version 10 stands for these settings.*\(seed=0 on cpu\)"):
        take(client, 99, runs[-1])


def test_whatever_else_differs_makes_another_challenger(client):
    others = [{}, {"pool": "max"}, {"epochs": 4}, {"batch_size": 64}, {"lr": 0.02}]
    turns = asked(client, [trained(client, **settings) for settings in others], 10)
    assert [turn.number for turn in turns] == [1, 2, 3, 4, 5]


def test_files_of_weights_are_a_challenger_each(client):
    runs = []
    for digest in ("aa", "bb", "aa"):
        run_id = client.create_run("0").info.run_id
        client.log_param(run_id, "sha256", digest)
        runs.append(client.get_run(run_id))
    assert [turn.number for turn in asked(client, runs, 10)] == [1, 2, 1]


def test_who_is_asked_again_keeps_its_turn_and_level(client):
    runs = [trained(client, lr=lr / 100) for lr in (1, 2)]
    first, second = asked(client, runs, 2)
    assert take(client, 10, runs[0], 40).level == first.level
    assert take(client, 77, trained(client, lr=0.02), 1).level == second.level  # the same, trained again


def test_a_budget_can_be_raised_and_not_lowered_and_says_what_that_costs(client):
    take(client, 10, trained(client), 4)
    assert str(take(client, 11, trained(client, lr=0.02), 1)) == "2 of 4"
    turns = [take(client, 12 + more, trained(client, lr=0.03 + more), 8) for more in range(6)]
    assert str(turns[-1]) == "8 of 8"
    assert turns[-1].spent == pytest.approx(2 * 0.05 / 4 + 6 * 0.05 / 8)
    with pytest.raises(budget.Untested, match=r"met 8 challengers.*--budget 16"):
        take(client, 50, trained(client, lr=0.5), 4)


def test_a_new_champion_starts_a_new_count_and_an_old_one_goes_on(client):
    runs = [trained(client, lr=lr / 100) for lr in (1, 2, 3)]
    numbers = [
        take(client, version, run, 2, champion).number
        for version, run, champion in zip((10, 11, 12), runs, "121", strict=True)
    ]
    assert numbers == [1, 1, 2]


def test_tags_of_others_are_no_challengers(client):
    for key, value in [("challenger/x", "1 of 1: a"), ("challenger/8", "mine"), ("challenger.9", "1 of 1: a")]:
        client.set_model_version_tag("poolnet", "1", key, value)
    assert str(take(client, 10, trained(client), 1)) == "1 of 1"
