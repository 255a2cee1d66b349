"""Comparisons: what is found in planted runs, and what is refused. The runs are made as a server records them."""

import contextlib
import json
import re
import tempfile
import uuid
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import Terminal, assert_refused, inside, mlflow_run, run
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from poolnet.data.dataset import open_dataset
from poolnet.studies import compare, report, selection, study
from poolnet.text import pasted
from poolnet.tracking import servers
from poolnet.training.device import resolve_device

N, SHA = 800, "5" * 64
STUDY = """question = "Which pooling loses less?"
data = "letters.npz"
seeds = [{seeds}]
[grid]
pool = ["max", "avg"]
epochs = 2
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""


@pytest.fixture
def client():
    return servers.own_client()


def predictions(seeds, accuracy, seed=0, n=N):
    """Logits (n, 10) of as many trainings: each example has a difficulty of its own, each training some luck."""
    rng = np.random.default_rng(seed)
    y, hard = np.arange(n) % 10, rng.random(n)
    for _ in range(seeds):
        right = hard + rng.normal(0, 0.02, n) < accuracy + rng.normal(0, 0.002)
        logits = rng.normal(0, 0.3, (n, 10)).astype(np.float32)
        logits[np.arange(n), np.where(right, y, (y + 1) % 10)] += 4
        yield logits


(SOME,) = predictions(1, 0.8)
BY_POOL = ("--experiment", "Default", "--by", "pool")


def plant(client, logits, experiment="0", status="FINISHED", **options):
    """A run on the server, with what the record of a run has of it.

    `arrays` are further ones of its predictions, `scores` are metrics other than those of a run that learns nothing.
    """
    arrays, scores = options.pop("arrays", {}), options.pop("scores", {})
    config = {"data": "letters.npz", "pool": "max", "epochs": 2, "batch_size": 128, "lr": 0.001, "seed": 1}
    config |= {"device": "auto", "register": True}
    sha256, ran_on = options.pop("sha256", SHA), options.pop("ran_on", "cpu")
    config |= options
    name = f"{config['pool']}-seed{config['seed']}-{uuid.uuid4().hex[:8]}"
    run_id = client.create_run(experiment, run_name=name).info.run_id
    tags = {"poolnet.run": name, "poolnet.data_sha256": sha256, "poolnet.device": ran_on}
    metrics = [Metric(key, 0.5, 1, step) for key in compare.HISTORIES for step in (1, 2)]
    metrics += [Metric("test_acc", 0.5, 1, 0), Metric("test_loss", 0.5, 1, 0)]
    metrics += [Metric(key, value, 2, 2) for key, value in scores.items()]
    params = [Param(key, str(value)) for key, value in config.items()]
    client.log_batch(run_id, metrics, params, [RunTag(*tag) for tag in tags.items()])
    dataset = Dataset("letters", sha256[:32], "local", json.dumps({"uri": "letters.npz"}))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "test")])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.npz"
        np.savez(path, logits=logits, y=np.arange(len(logits)) % 10, **arrays)
        client.log_artifact(run_id, str(path), "predictions")
    client.set_terminated(run_id, status)
    return name


def plant_arms(client, seeds=6, lead=0.0, **options):
    """So many seeds of max, and of avg that is better by `lead` on the same examples."""
    for pool, accuracy in (("max", 0.85), ("avg", 0.85 + lead)):
        for index, logits in enumerate(predictions(seeds, accuracy), 1):
            plant(client, logits, pool=pool, seed=index, **options)


def write_study(seeds=6):
    path = Path("pools.toml")
    path.write_text(STUDY.format(seeds=", ".join(map(str, range(1, seeds + 1)))), encoding="utf-8")
    return path


def compared(*arguments):
    finished = inside("compare", *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return json.loads(finished.stdout)


@pytest.fixture
def drawn():
    """For a test that looks at figures, which take longer than all the rest."""


@pytest.fixture(autouse=True)
def not_drawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(report, "_drawn", lambda comparison: {})


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_planted_effect_of_two_points_is_found_and_its_interval_holds_it(client, drawn):
    plant_arms(client, lead=0.02)
    path = write_study()
    found = compared("--study", path)
    assert (found["verdict"], found["winner"]) == ("better", "avg")
    acc = found["effects"]["acc"]
    assert 0 < acc["low"] < 2 < acc["high"]
    assert acc["low"] < acc["estimate"] < acc["high"]
    assert (found["n_seeds"], found["n_examples"], found["varied"]) == (6, N, "seeds and examples")
    assert found["sentence"].startswith("avg is better than max on letters")
    # the run in MLflow says the same
    comparison = mlflow.get_run(found["run_id"])
    assert (comparison.info.status, comparison.info.run_name) == ("FINISHED", "avg vs max, letters, 6 seeds")
    assert comparison.data.metrics["compare/effect_points"] == acc["estimate"]
    assert found["sentence"] in comparison.data.tags["mlflow.note.content"]
    names = {file.path for file in client.list_artifacts(found["run_id"])}
    assert {"report.html", "comparison.json", "figures"} <= names
    # and once more, to the byte, but for the time
    again = compared("--study", path)
    pages = [
        Path(client.download_artifacts(each["run_id"], "report.html")).read_text("utf-8") for each in (found, again)
    ]
    pages, times = zip(*(re.subn(r"Made \d{4}-\d\d-\d\d \d\d:\d\d UTC by", "", page) for page in pages), strict=True)
    assert pages[0] == pages[1]
    assert times == (1, 1)
    assert f"<code>{pasted('poolnet', 'compare', '--study', path, '--json')}</code>" in pages[0]
    volatile = {"run_id", "look"}
    assert {k: v for k, v in found.items() if k not in volatile} == {
        k: v for k, v in again.items() if k not in volatile
    }
    # the same runs as an experiment, the other way round
    turned = compared("--experiment", "Default", "--by", "pool", "--arms", "avg", "max", "--no-publish")
    assert turned["winner"] == "avg"
    assert turned["effects"]["acc"]["estimate"] == -acc["estimate"]


def test_letters_of_one_family_count_as_alike_as_they_are(client):
    """Ten copies of each letter widen the interval by the root of ten, and flip together."""
    tenth, copies = N // 10, np.arange(N) // 10
    for pool, accuracy in (("max", 0.8), ("avg", 0.86)):
        (logits,) = predictions(1, accuracy, n=tenth)
        shifted = np.stack([np.roll(logits[i], j - i % 10) for i in range(tenth) for j in range(10)])
        plant(client, shifted, pool=pool, arrays={"group": copies})
        plant(client, logits, pool=pool, seed=2)
    families, single = (compared(f"max-seed{seed}", f"avg-seed{seed}", "--no-publish") for seed in (1, 2))
    assert (families["n_examples"], families["n_families"], families["varied"]) == (N, tenth, "families")
    assert (single["n_examples"], single["n_families"], single["varied"]) == (tenth, None, "examples")
    for name in ("acc", "nll"):
        for end in ("estimate", "low", "high", "p"):
            assert families["effects"][name][end] == pytest.approx(single["effects"][name][end])
    assert families["paired_test"]["p"] == pytest.approx(single["paired_test"]["p"])
    assert families["paired_test"]["only_b"] == 10 * single["paired_test"]["only_b"]
    assert f"{N:,} examples of {tenth} families" in families["sentence"]
    assert not any("names no families" in caveat for caveat in families["caveats"])
    assert any("names no families" in caveat for caveat in single["caveats"])


def test_the_folds_of_a_seed_are_one_test_of_all_letters(client):
    for pool, accuracy in (("max", 0.8), ("avg", 0.86)):
        for seed, logits in enumerate(predictions(2, accuracy), 1):
            plant(client, logits, pool=pool, seed=seed)
            for fold in (2, 1):  # in any order
                half = slice((fold - 1) * N // 2, fold * N // 2)
                plant(client, logits[half], pool=pool, seed=seed, fold=f"{fold}/2")
    path = write_study(2)
    whole = compared("--study", path, "--no-publish")
    path.write_text(path.read_text().replace("[grid]", "folds = 2\n[grid]"), encoding="utf-8")
    folds = compared("--study", path)
    assert (folds["n_folds"], folds["n_examples"], whole["n_folds"]) == (2, N, 0)
    assert folds["effects"] == whole["effects"]
    assert folds["per_class"] == whole["per_class"]
    assert client.get_run(folds["run_id"]).info.run_name == "avg vs max, letters, 2 seeds, 2 folds"
    assert "2 seeds, 2 folds, 800 examples" in folds["sentence"]
    # of an experiment that has both, the file's own splits count
    assert compared(*BY_POOL, "--no-publish")["n_folds"] == 0


def test_each_arm_takes_its_best_value_of_a_tuned_option_by_val_and_not_by_test(client):
    path = write_study(2)
    path.write_text(
        path.read_text().replace("[arms]", "[tune]\nlr = [0.001, 0.01]\n[arms]").replace("[grid]", "folds = 2\n[grid]"),
        encoding="utf-8",
    )
    best = {("max", "1/2"): 0.001, ("max", "2/2"): 0.01, ("avg", "1/2"): 0.01, ("avg", "2/2"): 0.01}
    for (pool, fold), lr in best.items():
        for seed, logits in enumerate(predictions(2, 0.8, n=100), 1):
            plant(client, logits, pool=pool, seed=seed, fold=fold, lr=lr, scores={"val_acc": 0.6})
            other = {0.001: 0.01, 0.01: 0.001}[lr]  # with more right answers on test
            (better,) = predictions(1, 1.0, n=100)
            plant(client, better, pool=pool, seed=seed, fold=fold, lr=other, scores={"val_acc": 0.55, "val_loss": 0.1})
    found = compared("--study", path)
    assert [arm["tuned"] for arm in found["arms"]] == [{"lr": [0.001, 0.01, 0.001, 0.01]}, {"lr": 4 * [0.01]}]
    assert found["arms"][0]["test_acc"] == pytest.approx([0.8, 0.8], abs=0.1)
    note = client.get_run(found["run_id"]).data.tags["mlflow.note.content"]
    assert (
        "lr, chosen on val by accuracy: max lr 0.001 in 1 of 2 folds, 0.01 in 1 of 2 folds, avg lr 0.01 in 2 of" in note
    )
    assert not any("At lr" in caveat for caveat in found["caveats"])


def test_a_study_of_the_loss_is_decided_by_the_loss(client):
    """The arms are right equally often, and the first is surer of it."""
    for seed, logits in enumerate(predictions(3, 0.85), 1):
        plant(client, logits, seed=seed)
        plant(client, 0.6 * logits, seed=seed, pool="avg")
    path = write_study(3)
    by_acc = compared("--study", path, "--margin", "0.1", "--no-publish")
    path.write_text(path.read_text().replace("[grid]", 'primary = "loss"\n[grid]'), encoding="utf-8")
    by_loss = compared("--study", path, "--no-publish")
    assert (by_acc["verdict"], by_loss["verdict"], by_loss["winner"]) == ("equivalent", "better", "max")
    assert by_loss["effects"] == by_acc["effects"]
    assert "nats of test loss, 95 % interval" in by_loss["sentence"]
    assert (by_loss["margin_nats"], "margin_points" in by_loss) == (0.01, False)


def plant_four(client, seeds, **options):
    for pool, accuracy in (("max", 0.7), ("avg", 0.86), ("lp", 0.86), ("stride", 0.6)):
        for seed, logits in enumerate(predictions(seeds, accuracy), 1):
            plant(client, logits, pool=pool, seed=seed, **options)


FOUR = """question = "Which?"
data = "letters.npz"
seeds = [1, 2]
optimum = true
[grid]
pool = ["max", "avg", "lp", "stride"]
epochs = 2
[arms]
max = { pool = "max" }
avg = { pool = "avg" }
lp = { pool = "lp" }
stride = { pool = "stride" }
"""


def test_of_four_arms_all_pairs_are_compared_at_once_and_the_best_are_named(client):
    (at_optimum,) = predictions(1, 0.9, seed=3)
    plant_four(client, 2, arrays={"optimum": at_optimum, "group": np.arange(N) // 4}, scores={"optimum/test_loss": 0.1})
    path = Path("four.toml")
    path.write_text(FOUR, encoding="utf-8")
    found = compared("--study", path)
    assert sorted(found["not_worse_than_the_best"]) == ["avg", "lp"]
    assert found["verdict"] == "narrowed down"
    pairs = {(each["a"], each["b"]): each for each in found["contrasts"]["acc"]}
    assert len(pairs) == 6
    assert pairs["max", "avg"]["low"] > 0 > pairs["avg", "stride"]["high"]
    assert pairs["max", "avg"]["p_holm"] < 0.05 < pairs["avg", "lp"]["p_holm"]
    # wider than the same pair on its own
    alone = compared(*BY_POOL, "--arms", "max", "avg", "--no-publish")["effects"]["acc"]
    assert pairs["max", "avg"]["estimate"] == alone["estimate"]
    assert pairs["max", "avg"]["low"] < alone["low"]
    # the same network everywhere at the optimum, so that all are best
    assert len(found["at_optimum"]["not_worse_than_the_best"]) == 4
    assert [arm["at_optimum"]["test_acc"] for arm in found["arms"]] == 4 * [pytest.approx(0.9, abs=0.03)]
    assert "shown to be worse: max, stride" in found["sentence"]
    assert client.get_run(found["run_id"]).data.params["arm_d"] == "stride"


def test_an_optimum_that_a_study_asks_for_and_runs_lack_is_missing(client, capsys):
    plant_four(client, 2)
    Path("four.toml").write_text(FOUR, encoding="utf-8")
    assert "found no finished run of max with seed 1 and 7 more" in refused(capsys, "--study", "four.toml")


def test_a_plan_says_what_more_seeds_and_letters_would_find(client, capsys):
    plant_arms(client, seeds=3, lead=0.02)
    found = json.loads(inside("compare", *BY_POOL, "--plan", "--json").stdout)
    by_size = {(plan["seeds"], plan["examples"]): plan for plan in found["designs"]}
    now = compared(*BY_POOL)
    assert by_size[3, N]["accuracy"] == pytest.approx(now["smallest_effect_points"])
    assert by_size[3, N]["margin"] == pytest.approx(now["smallest_margin_points"])
    assert by_size[3, 40 * N]["accuracy"] < by_size[3, 10 * N]["accuracy"] < by_size[3, N]["accuracy"]
    assert by_size[10, N]["accuracy"] < by_size[5, N]["accuracy"] < by_size[3, N]["accuracy"]
    code, out, _ = run(capsys, "compare", *BY_POOL, "--plan")
    assert code == 0
    assert "four times in five" in " ".join(out.split())
    assert len(client.search_runs(["0"], "tags.`poolnet.comparison` != ''")) == 1  # a plan is not published


def test_a_terminal_is_told_what_takes_long_and_a_pipe_only_the_answer(client, capsys):
    plant_arms(client, seeds=2)
    path = write_study(2)
    with contextlib.redirect_stderr(Terminal()) as terminal:
        code, out, _ = run(capsys, "compare", "--study", path)
    assert code == 0
    assert out.startswith(("max and avg are", "Inconclusive whether"))
    shown = ("Opening sqlite:///", "Opening the data set", "Fetching the runs of max", "Fetching the runs of avg")
    shown += ("Comparing max and avg ...", "Drawing and uploading the report ...")
    places = [terminal.getvalue().find(text) for text in shown]
    assert -1 not in places
    assert places == sorted(places)
    assert inside("compare", "--study", path).stderr == ""


def test_runs_that_predict_the_same_are_equivalent(client):
    plant_arms(client, seeds=3, lead=0.0)
    found = compared("--by", "pool", "--experiment", "0", "--margin", "0.01", "--no-publish")
    assert (found["verdict"], found["winner"], found["effects"]["acc"]["estimate"]) == ("equivalent", None, 0)


def test_two_runs_are_compared_over_examples_and_the_verdict_says_so(client):
    (one,), (other,) = predictions(1, 0.80), predictions(1, 0.86)
    names = [plant(client, one), plant(client, other, pool="avg")]
    found = compared(*names)
    assert (found["verdict"], found["winner"], found["varied"]) == ("better", "avg", "examples")
    assert client.get_run(found["run_id"]).info.run_name == "avg vs max, letters, seed 1"
    assert "1 seed," in found["sentence"]
    assert any("another seed" in caveat for caveat in found["caveats"])
    quiet = compared(*names, "--no-publish")
    assert quiet == found | {"run_id": None, "look": None}
    assert len(client.search_runs(["0"], "tags.`poolnet.comparison` != ''")) == 1


def test_two_runs_are_found_by_the_names_on_the_screen(client):
    """Also by one with blanks, where `mlflow run` passes both names as one text."""
    (one,), (other,) = predictions(1, 0.80), predictions(1, 0.86)
    plant(client, one)
    second = plant(client, other, seed=2)
    (renamed,) = client.search_runs(["0"], f"tags.`poolnet.run` = '{second}'")
    client.update_run(renamed.info.run_id, name="it is monday")
    one_text = [("--runs", "max-seed1 'it is monday'"), ("--runs", "max-seed1 max-seed2")]
    for arguments in [("max-seed1", "it is monday"), *one_text]:
        comparison = compared(*arguments)
        assert client.get_run(comparison["run_id"]).info.run_name == "seed 2 vs seed 1, letters"


def test_mlflow_run_compares_in_the_run_that_it_made(client):
    plant_arms(client, seeds=2, lead=0.05)
    path = write_study(2)
    finished = mlflow_run("-e", "compare", "-P", f"study={path.absolute()}")
    assert finished.returncode == 0, finished.stderr
    found = [run for run in client.search_runs(["0"]) if "compare/effect_points" in run.data.metrics]
    assert len(found) == 1
    assert found[0].data.tags["mlflow.source.type"] == "PROJECT"


# --- which runs count ------------------------------------------------------------------------------------------------


def test_the_data_set_is_told_by_its_contents_and_not_by_its_name(client, letters):
    sha256 = open_dataset(letters).sha256
    plant_arms(client, seeds=2, lead=0.05, data="elsewhere/copy.npz", sha256=sha256)
    plant_arms(client, seeds=2, lead=-0.05, data="letters.npz", sha256="6" * 64)  # newer, of the same name
    for arguments in (("--study", write_study(2)), (*BY_POOL, "--data", "letters.npz")):
        found = compared(*arguments, "--no-publish")
        assert found["data_sha256"] == sha256
        assert (found["arms"][1]["name"], found["effects"]["acc"]["estimate"] > 2) == ("avg", True)


def test_of_a_study_the_runs_of_this_machines_device_count_or_those_of_another_that_has_all(client):
    plant_arms(client, seeds=2, lead=0.05, ran_on="cuda")
    plant(client, SOME, ran_on="cpu")
    found = study.read(write_study(2))
    selected = selection.of_study(client, ["0"], found)
    assert {run.device for group in selected.arms.values() for run in group} == {"cuda"}
    plant_arms(client, seeds=2, lead=0.05)
    selected = selection.of_study(client, ["0"], found)
    own = resolve_device("auto")
    assert {run.device for group in selected.arms.values() for run in group} == {
        own if own in ("cpu", "cuda") else "cpu"
    }


def test_runs_of_another_version_are_left_out_with_one_warning_that_names_one(client, capsys):
    plant_arms(client, seeds=2, lead=0.05)
    plant(client, SOME, pool="median")
    plant(client, SOME, seed=2, momentum=0.9)
    newest = plant(client, SOME, pool="avg", epochs="2.5", sha256=SHA)
    for arguments in (("--study", write_study(2)), BY_POOL):
        code, out, err = run(capsys, "compare", *arguments)
        assert code == 0
        assert "avg is better than max" in " ".join(out.split())
        assert err.count("\n") == 1
        assert f"poolnet: warning: left out {newest} and 2 more, which this version of poolnet does not know" in err


def test_an_unfinished_run_is_left_out_where_a_finished_one_stands_for_it(client, capsys):
    killed = plant(client, SOME, status="KILLED")
    plant_arms(client, seeds=2)
    code, out, _ = run(capsys, "compare", *BY_POOL)
    assert code == 0
    assert f"Note: Left out, since a finished run has the same settings: {killed} (KILLED)." in " ".join(out.split())


def test_letters_that_are_not_in_test_are_no_hindrance_but_a_single_image_is(client, capsys):
    one, other = (plant(client, SOME[:1], pool=pool, seed=9) for pool in ("max", "avg"))
    assert "found 1 test letter in its predictions, expected two or more" in refused(capsys, one, other)
    for pool in ("max", "avg"):
        for seed, logits in enumerate(predictions(2, 0.5, n=3), 1):
            plant(client, logits, pool=pool, seed=seed)
    found = compared("--study", write_study(2))
    assert [entry["n"] for entry in found["per_class"]] == [1, 1, 1] + 7 * [0]


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    code, out, err = run(capsys, "compare", *arguments)
    assert out == ""
    assert_refused(code, err)
    assert not [run for run in mlflow.MlflowClient().search_runs(["0"]) if "compare/effect_points" in run.data.metrics]
    return err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sha256": "6" * 64}, f"SHA-256 of the data: found {SHA} in {{one}} and {'6' * 64} in {{other}}"),
        ({"lr": 0.01}, "lr: found 0.001 in {one} and 0.01 in {other}"),
        ({"ran_on": "cuda"}, "device: found cpu in {one} and cuda in {other}"),
        (
            {"status": "KILLED"},
            "{other}: found it KILLED, expected finished runs; finish it with: poolnet train --resume",
        ),
        ({"status": "RUNNING"}, "{other}: found it RUNNING"),
        ({"seed": 7}, "{one}: found its seed 1 in one arm only"),
    ],
)
def test_what_must_not_be_mixed_is_refused_naming_the_runs(client, capsys, options, said):
    names = {"one": plant(client, SOME), "other": plant(client, SOME, **{"pool": "avg"} | options)}
    assert said.format(**names) in refused(capsys, *BY_POOL)


def test_a_study_whose_runs_are_not_all_there_is_refused(client, capsys):
    plant_arms(client, seeds=2)
    err = refused(capsys, "--study", str(write_study(3)))
    assert "found no finished run of max with seed 3 and 1 more on letters" in err
    assert "train what is missing with: poolnet sweep pools.toml" in err
    killed = plant(client, SOME, seed=3, status="KILLED")
    assert f"{killed} is KILLED" in refused(capsys, "--study", str(write_study(3)))
    plant(client, SOME, sha256="6" * 64)
    assert "found two data sets called letters" in refused(capsys, "--study", str(write_study(2)))


def test_a_run_without_readable_predictions_is_refused_by_name(client, capsys):
    plant(client, SOME)
    broken = plant(client, SOME, pool="avg")
    (found,) = client.search_runs(["0"], f"tags.`poolnet.run` = '{broken}'")
    path = Path(found.info.artifact_uri.removeprefix("file://")) / "predictions" / "test.npz"
    whole = {"logits": SOME, "y": np.arange(len(SOME)) % 10}
    for group in (whole["y"][:9], -whole["y"], whole["y"] / 2):
        np.savez(path, **whole, group=group)
        assert f"{broken}: found no readable predictions/test.npz on the server (found groups" in refused(
            capsys, *BY_POOL
        )
    np.savez(path, **whole, optimum=SOME[:9])
    assert f"{broken}: found no readable predictions/test.npz" in refused(capsys, *BY_POOL)
    path.write_bytes(path.read_bytes()[:100])
    assert f"{broken}: found no readable predictions/test.npz" in refused(capsys, *BY_POOL)
    path.unlink()
    assert f"{broken}: found no readable predictions/test.npz" in refused(capsys, *BY_POOL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected one of --study"),
        (("max-seed1-00000000",), "expected one of --study"),
        (("max-seed1-00000000", "avg-seed1-00000000"), "max-seed1-00000000: no such run"),
        (("--experiment", "nowhere"), "--experiment: found none called 'nowhere', expected one of Default"),
        (BY_POOL, "found 0 values, none, expected two"),
        (("--experiment", "Default", "--by", "colour"), "--by: found 'colour', expected one of pool"),
        ((*BY_POOL, "--margin", "-1"), "--margin: found '-1'"),
        ((*BY_POOL, "--arms", "max", "min"), "--arms: found no run whose pool is max"),
        ((*BY_POOL, "--arms", "max", "max"), "--arms: found max twice, expected two values of pool"),
        (("--study", "no.toml"), "no.toml: cannot be read"),
    ],
)
def test_bad_usage_is_refused(client, capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_runs_on_other_data_are_left_out_where_one_is_named(client, capsys):
    plant_arms(client, seeds=2)
    plant(client, SOME, data="glyphs", sha256="6" * 64)
    assert "SHA-256 of the data" in refused(capsys, *BY_POOL)
    selected = selection.of_experiment(client, ["0"], "pool", ["max", "avg"], data="elsewhere/letters.npz")
    assert [len(group) for group in selected.arms.values()] == [2, 2]


def test_a_server_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, out, err = run(capsys, "compare", *BY_POOL)
    assert (code, out) == (1, "")
    assert err.startswith("poolnet: error: http://127.0.0.1:9: connection refused; start the server, ")
    assert err.count("\n") == 1


def test_two_runs_that_differ_in_two_things_or_none_are_refused(client, capsys):
    one, other = plant(client, SOME), plant(client, SOME, pool="avg", lr=0.01)
    assert "differ in pool, lr, expected exactly one" in refused(capsys, one, other)
    assert "differ in nothing" in refused(capsys, one, one)
    foreign = client.create_run("0").info.run_id
    assert f"{foreign}: found a run that is none of poolnet train" in refused(capsys, one, foreign)


def test_of_runs_that_repeat_a_seed_the_newest_counts(client):
    plant_arms(client, seeds=2)
    (changed,) = predictions(1, 0.5, seed=9)
    newest = plant(client, changed, device="cpu")  # max, seed 1, once more
    selected = selection.of_experiment(client, ["0"], "pool", ["max", "avg"])
    groups, notes = selection.checked(selected)
    assert groups["max"][0].name == newest
    assert notes == ["max: 3 runs of 2 seeds; the newest of each counts."]


def test_a_study_is_selected_from_servers_params_as_mlflow_run_types_them(client):
    plant_arms(client, seeds=2, lr="1e-3", data="'letters.npz'")
    selected = selection.of_study(client, ["0"], study.read(write_study(2)))
    assert [len(group) for group in selected.arms.values()] == [2, 2]
    assert selected.free == {"pool"}


def test_runs_on_the_same_images_before_these_had_families_count_where_no_others_do(client, letters):
    before = open_dataset(letters).sha256
    plant_arms(client, seeds=2, lead=0.05, sha256=before)
    with np.load(letters) as arrays:
        groups = {f"group_{name}": np.arange(len(arrays[f"y_{name}"])) for name in ("train", "val", "test")}
        whole = {**arrays, **groups}
    np.savez(letters, **whole)
    assert open_dataset(letters).sha256 != before
    for arguments in (("--study", write_study(2)), (*BY_POOL, "--data", "letters.npz")):
        assert compared(*arguments, "--no-publish")["data_sha256"] == before
    plant_arms(client, seeds=2, lead=0.05, sha256=open_dataset(letters).sha256)
    for arguments in (("--study", write_study(2)), (*BY_POOL, "--data", "letters.npz")):
        assert compared(*arguments, "--no-publish")["data_sha256"] == open_dataset(letters).sha256
