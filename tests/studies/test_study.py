"""Studies: what a file may hold, and what is said of one that holds something else."""

import os
import sys

import pytest
from conftest import ROOT

from poolnet.errors import InputError
from poolnet.studies import study
from poolnet.training.config import TrainConfig

WHOLE = """question = "Which?"
data = "letters.npz"
seeds = [3, 1]
[grid]
pool = ["max", "avg"]
lr = [0.01, 1]
epochs = 2
[arms]
slow = { pool = "max", lr = 0.01 }
"fast, avg" = { pool = "avg", lr = 1 }
"""


def read(tmp_path, text):
    path = tmp_path / "trial.toml"
    path.write_text(text, encoding="utf-8")
    return study.read(path)


def test_every_combination_comes_once_seed_by_seed(tmp_path):
    found = read(tmp_path, WHOLE)
    assert (found.name, found.question, found.primary, found.margin) == ("trial", "Which?", "accuracy", 0.5)
    assert (found.folds, found.optimum, found.tune) == (("",), False, {})
    configs = found.configs()
    assert [config.seed for config in configs] == [3] * 4 + [1] * 4
    expected = [("max", 0.01), ("max", 1.0), ("avg", 0.01), ("avg", 1.0)]
    assert [(config.pool, config.lr) for config in configs[:4]] == expected
    fixed = {"data": "letters.npz", "epochs": 2, "register": False}
    assert found.arm("fast, avg") == [TrainConfig(pool="avg", lr=1.0, seed=seed, **fixed) for seed in (3, 1)]
    assert set(found.arm("slow")) < set(configs)


@pytest.mark.parametrize(
    ("top", "grid", "expected"),
    [("", "", False), ("register = true", "", True), ("register = true", "register = false", False)],
)
def test_models_are_registered_only_if_the_study_says_so(tmp_path, top, grid, expected):
    """In its grid, as studies of earlier versions do, or at its top."""
    found = read(tmp_path, WHOLE.replace("[grid]", f"{top}\n[grid]\n{grid}"))
    assert {config.register for config in (*found.configs(), *found.arm("slow"))} == {expected}
    assert set(found.arm("slow")) < set(found.configs())


def test_another_data_set_takes_the_place_of_the_studys_own(tmp_path):
    path = tmp_path / "trial.toml"
    path.write_text(WHOLE, encoding="utf-8")
    assert {config.data for config in study.read(path, "other.npz").configs()} == {"other.npz"}


def test_folds_and_tuned_options_multiply_the_runs_and_an_arm_takes_its_best_in_each_fold(tmp_path):
    text = WHOLE.replace("[grid]", "folds = 2\n[tune]\nbatch_size = [32, 64]\n[grid]").replace(
        "lr = [0.01, 1]", "lr = 0.01"
    )
    found = read(tmp_path, text.replace(", lr = 0.01", "").replace(", lr = 1", ""))
    assert found.folds == ("1/2", "2/2")
    configs = found.configs()
    assert len(configs) == len(set(configs)) == 2 * 2 * 2 * 2  # seeds, folds, poolings, sizes of a batch
    assert [(config.seed, config.fold) for config in configs[::4]] == [(3, "1/2"), (3, "2/2"), (1, "1/2"), (1, "2/2")]
    assert set(found.all_of("slow")) == {config for config in configs if config.pool == "max"}

    def score(config):  # 64 is better in the second fold, by the mean over seeds though not by each
        return {"1/2": 0.5, "2/2": 0.9 if config.seed == 3 else 0.4}[config.fold] if config.batch_size == 64 else 0.6

    chosen = [(config.seed, config.fold, config.batch_size) for config in found.arm("slow", score)]
    assert chosen == [(3, "1/2", 32), (3, "2/2", 64), (1, "1/2", 32), (1, "2/2", 64)]


def test_a_study_of_the_loss_tunes_by_the_loss_and_has_a_margin_in_nats(tmp_path):
    found = read(tmp_path, WHOLE.replace("[grid]", 'primary = "loss"\n[grid]'))
    assert (found.primary, found.margin) == ("loss", 0.01)
    low, high = {"val_loss": 0.4, "val_acc": 0.8}, {"val_loss": 0.5, "val_acc": 0.9}
    assert found.val_score(low) > found.val_score(high)
    assert read(tmp_path, WHOLE).val_score(low) < read(tmp_path, WHOLE).val_score(high)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_studies_test_each_letter_or_have_ten_seeds(path):
    found = study.read(path)
    assert len(found.folds) == 5 or len(found.seeds) == 10
    assert found.data == ("fashion.npz" if path.stem == "fashion" else "glyphs")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('question = "Which?"', "question =", ["no valid TOML", "line 1"]),
        ('question = "Which?"', "", ["question: missing"]),
        ('question = "Which?"', "question = 1", ["question: found 1, expected text in quotes"]),
        ("seeds = [3, 1]", "seeds = []", ["seeds: found an empty list"]),
        ("seeds = [3, 1]", "seeds = [3, 3]", ["seeds: found 3 twice"]),
        ("seeds = [3, 1]", "seeds = [-3]", ["seed: found -3"]),
        ("seeds = [3, 1]", "seeds = [true]", ["seeds: found True, expected a whole number"]),
        ("seeds = [3, 1]", "seeds = [1]\nmargin = 0", ["margin: found 0.0"]),
        ("seeds = [3, 1]", "seeds = [1]\nmargin = nan", ["margin: found nan"]),
        ("seeds = [3, 1]", "seeds = [1]\nmargins = 1", ["margins: unknown; did you mean margin?"]),
        ("seeds = [3, 1]", "seeds = [1]\nfolds = 0", ["folds: found 0, expected a whole number from 2 to 20"]),
        ("seeds = [3, 1]", "seeds = [1]\nfolds = 2.0", ["folds: found 2.0, expected a whole number"]),
        ("seeds = [3, 1]", 'seeds = [1]\nprimary = "f1"', ["primary: found 'f1', expected one of accuracy, loss"]),
        ("seeds = [3, 1]", 'seeds = [1]\nprimary = "loss"\nmargin = 0', ["margin: found 0.0, expected nats"]),
        ("seeds = [3, 1]", "seeds = [1]\noptimum = 1", ["optimum: found 1, expected true or false"]),
        ("[grid]", "[tune]\nlr = [1, 2]\n[grid]", ["tune.lr: found it in grid too"]),
        ("[grid]", "[tune]\nbatch_size = 8\n[grid]", ["tune.batch_size: found one value"]),
        ("[grid]", "[tune]\nepochs = [1, 2]\n[grid]", ["tune.epochs: unknown; expected one of lr, batch_size"]),
        ("[grid]", "[tune]\n[grid]", ["tune: found {}"]),
        ("seeds = [3, 1]", "seeds = [1]\nregister = 1", ["register: found 1, expected true or false"]),
        ("lr = [0.01, 1]", 'lr = ["0.01"]', ["grid.lr: found '0.01', expected a number"]),
        ("lr = [0.01, 1]", "lr = [-1]", ["lr: found -1.0"]),
        ("lr = [0.01, 1]", "learning_rate = 1", ["grid.learning_rate: unknown", "batch_size"]),
        ("epochs = 2", "epochs = 2.5", ["grid.epochs: found 2.5, expected a whole number"]),
        ("epochs = 2", "seed = 2", ["grid.seed: unknown"]),
        ("epochs = 2", 'fold = "1/2"', ["grid.fold: unknown"]),
        ('pool = ["max", "avg"]', 'pool = ["max", "min"]', ["pool: found 'min'", "max, avg, lp, stride, conv"]),
        ('slow = { pool = "max", lr = 0.01 }', "", ["arms: found 1, expected two to 10"]),
        ('slow = { pool = "max", lr = 0.01 }', "slow = 1", ["arms.slow: found 1"]),
        ('slow = { pool = "max", lr = 0.01 }', 'slow = { pool = "max" }', ["arms.slow: leaves lr open", "0.01, 1"]),
        ("lr = 0.01 }", "lr = 0.1 }", ["arms.slow.lr: found 0.1", "grid.lr"]),
        ("lr = 0.01 }", "lr = 0.01, size = 1 }", ["arms.slow.size: unknown"]),
        ('{ pool = "max", lr = 0.01 }', '{ pool = "avg", lr = 1 }', ["arms.fast, avg: the same as arms.slow"]),
        ("[grid]", "[gird]", ["gird: unknown; did you mean grid?"]),
        ("epochs = 2", "register = [true, false]", ["grid.register: found true and false"]),
        # what is too much, and what a screen must not show
        ("seeds = [3, 1]", "seeds = [1" + 400 * "0" + "]", ["seeds: found a number of 1329 bits"]),
        ("seeds = [3, 1]", "seeds = [1" + 5000 * "0" + "]", ["digits"]),
        ("seeds = [3, 1]", "seeds = 0x" + 5000 * "f", ["seeds: found a number of 20000 bits"]),
        ("lr = [0.01, 1]", "lr = 1" + 400 * "0", ["grid.lr: found a number of"]),
        ("lr = [0.01, 1]", "lr = inf", ["lr: found inf"]),
        ("seeds = [3, 1]", "seeds = [1]\nmargin = inf", ["margin: found inf"]),
        ("seeds = [3, 1]", f"seeds = {list(range(2501))}", ["grid: found 10,004 runs, seeds and combinations"]),
        ("seeds = [3, 1]", "seeds = " + 5000 * "[" + 5000 * "]", ["nested too deep"]),
        ("seeds = [3, 1]", "seeds = " + 50 * "[" + 50 * "]", ["seeds: found [[[", "expected a whole number"]),
        ("lr = 0.01 }", "lr = { " + ".".join(5000 * "a") + " = 1 } }", ["arms.slow.lr: found {'a'", "a number"]),
        ('"fast, avg" =', r'"\u001b[31m" =', [r"arms: found '\x1b[31m', expected text that a screen can show"]),
        ('"fast, avg" =', r'"\u009b31m" =', ["arms: found"]),
        ('question = "Which?"', r'question = "\u001b]0;a\u0007?"', ["question: found"]),
        ("epochs = 2", r'"\u001b" = 2', [r"a key: found '\x1b'"]),
        ("letters.npz", r"\u001b[2J.npz", ["data: found"]),
    ],
)
def test_a_bad_file_is_refused_with_file_key_and_cure(tmp_path, old, new, said):
    assert old in WHOLE
    with pytest.raises(InputError) as refused:
        read(tmp_path, WHOLE.replace(old, new))
    line = str(refused.value)
    assert line.startswith(str(tmp_path / "trial.toml"))
    assert "\n" not in line
    for part in said:
        assert part in line


def test_what_is_no_file_of_a_studys_size_is_refused(tmp_path):
    large = tmp_path / "large.toml"
    with large.open("wb") as file:
        file.truncate(2**30)
    (tmp_path / "words.toml").write_bytes(WHOLE.encode("utf-16"))  # as PowerShell's > writes
    (tmp_path / "western.toml").write_bytes(WHOLE.replace("Which", "W\xe4lche").encode("latin-1"))
    cases = {
        "no.toml": "found no file",
        ".": "found no file",
        "large.toml": "1,073,741,824 bytes",
        "words.toml": "words.toml: cannot be read, since it is not in UTF-8; save it as such",
        "western.toml": "western.toml: cannot be read, since it is not in UTF-8; save it as such",
    }
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.toml")
        cases |= {"pipe.toml": "found no file", "/dev/zero": "found no file", "\udcff.toml": "udcff", "\x1b[31m": "x1b"}
    for name, said in cases.items():
        with pytest.raises(InputError) as refused:
            study.read(tmp_path / name)
        assert said in str(refused.value)
        str(refused.value).encode()


def test_a_question_over_several_lines_and_the_mark_of_windows_editor_are_read(tmp_path):
    path = tmp_path / "trial.toml"
    path.write_text(WHOLE.replace('"Which?"', '"""Which\n\tone?"""'), encoding="utf-8-sig")
    assert study.read(path).question == "Which one?"
