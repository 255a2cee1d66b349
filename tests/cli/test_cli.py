import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import mlflow
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from conftest import assert_refused, make_arrays, poolnet, ran, run, world

from poolnet.cli.commands import _without_home, cli, main
from poolnet.data import glyphs
from poolnet.data.dataset import locate, open_dataset
from poolnet.errors import InputError
from poolnet.runs import run_record
from poolnet.text import coded, echo, marked, pasted
from poolnet.training.config import TrainConfig

BAD_OPTIONS = {  # the options, and the words of the line that refuses them
    "unknown option": (["--size", "3"], ["--size"]),
    "unknown pool": (["--pool", "min"], ["--pool", "max", "avg", "lp", "stride", "conv"]),
    "epochs in words": (["--epochs", "many"], ["--epochs", "many"]),
    "no epochs": (["--epochs", "0"], ["epochs", "0"]),
    "half an epoch": (["--epochs", "1.5"], ["--epochs", "1.5"]),
    "no batch": (["--batch-size", "-1"], ["batch_size", "-1"]),
    "lr of nothing": (["--lr", "0"], ["lr"]),
    "lr nan": (["--lr", "nan"], ["lr", "nan"]),
    "negative seed": (["--seed", "-1"], ["seed"]),
    "absent device": (["--device", "cuda:99"], ["device", "cuda:99", "cpu"]),
    "unknown device": (["--device", "abacus"], ["device", "abacus"]),
    "register perhaps": (["--register", "perhaps"], ["--register", "perhaps"]),
    "missing data": (["--data", "nowhere.npz"], ["nowhere.npz", "no such file"]),
    "notmnist unprepared": (["--data", "notmnist"], ["notmnist.npz", "poolnet prepare notmnist"]),
    "extra argument": (["max"], ["max"]),
    "optimum of conv": (["--pool", "conv", "--optimum"], ["--optimum", "conv"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_leaves_no_run(capsys, tmp_path, letters, case):
    options, words = BAD_OPTIONS[case]
    code, out, err = run(capsys, "train", *([] if "--data" in options else ["--data", letters]), *options)
    assert_refused(code, err, *words)
    assert out == ""
    assert mlflow.MlflowClient().search_runs(["0"]) == []


REFUSED_AT_ONCE = {  # and the words of the line that says so
    "train --data nowhere.npz": "nowhere.npz: no such file",
    "train --data notmnist": "make it with: poolnet prepare notmnist",
    "train --data ''": "--data: found an empty text",
    "train --pool min": "'min'",
    "train --epochs 0": "epochs: found 0",
    "train --lr nan": "lr: found nan",
    "train --fold 6/5": "fold: found '6/5'",
    "train --device abacus": "device: found 'abacus'",
    "train --optimum --pool conv": "--optimum: found pool conv",
    "train --timeout -1": "expected seconds from 0",
    "prepare notmnist --small nowhere.tar.gz": "nowhere.tar.gz: no such file",
    "prepare notmnist --out folder": "folder: found a folder",
    "prepare glyphs --train 0 --out x.npz": "0",
    "sync --to example.org": "--to: found 'example.org'",
    "sweep nowhere.toml": "nowhere.toml: cannot be read",
    "sweep study.toml": "absent.npz: no such file",
    "sweep study.toml --data nowhere.npz": "nowhere.npz: no such file",
    "sweep study.toml --workers none --data letters.npz": "--workers: found 'none'",
    "sweep device.toml --data letters.npz": "device: found 'abacus'",
    "compare": "expected one of --study",
    "compare max-seed1": "or two runs",
    "compare --study nowhere.toml": "nowhere.toml: cannot be read",
    "compare --study study.toml --margin much": "--margin: found 'much'",
    "compare --experiment Default --by colour": "--by: found 'colour', expected one of pool",
    "compare --experiment Default --by fold": "--by: found 'fold', expected one of pool",
    "compare --study study.toml --arms max avg": "--arms: found it without --by",
    "compare --by pool --arms max max": "--arms: found max twice",
    "evaluate ./nowhere": "./nowhere: no such folder",
    "evaluate models:/poolnet/1 --data nowhere.npz": "nowhere.npz: no such file",
    "evaluate models:/poolnet/1 --split all": "'all'",
    "predict models:/poolnet/1 nowhere.png": "nowhere.png: no such file",
    "predict /nowhere letter.png": "/nowhere: no such folder",
    "predict models:/poolnet/1 letter.png --csv --json": "--csv: found it with --json",
    "promote --alias v1": "--alias: found 'v1'",
    "promote ./nowhere": "./nowhere: no such folder",
    "promote --non-inferior x": "--non-inferior: found 'x'",
    "promote --rollback --force": "--rollback: found it with other options",
    "reproduce avg-seed1 --data nowhere.npz": "nowhere.npz: no such file",
    "register nowhere.pt --pool max": "nowhere.pt: no such file",
    "register letter.png --pool min": "'min'",
    "register letter.png --pool max --data nowhere.npz": "nowhere.npz: no such file",
}
HOOKED = """
import contextlib, io, json, shlex, sys
def refuse(event, args):
    if event == "import" and args[0].partition(".")[0] in ("torch", "mlflow"):
        sys.stderr.write(f"imported {args[0]}\\n")
    if event == "subprocess.Popen":
        sys.stderr.write(f"started {args[1]}\\n")
sys.addaudithook(refuse)
from poolnet.cli import main
ends = {}
for command in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(shlex.split(command))
        except SystemExit as end:
            ends[command] = end.code, out.getvalue(), err.getvalue()
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Exit code and output of each of these commands, in one process that has imported neither torch nor MLflow."""
    folder = tmp_path_factory.mktemp("refused")
    study = 'question = "?"\ndata = "absent.npz"\nseeds = 1\n[grid]\npool = ["max", "avg"]\n'
    arms = '[arms]\nmax = { pool = "max" }\navg = { pool = "avg" }\n'
    (folder / "study.toml").write_text(study + arms)
    (folder / "device.toml").write_text(f'{study}device = "abacus"\n{arms}')
    (folder / "letter.png").touch()
    (folder / "folder").mkdir()
    np.savez(folder / "letters.npz", **make_arrays())
    command = [sys.executable, "-c", HOOKED, *REFUSED_AT_ONCE]
    return json.loads(ran(*command, begin=subprocess.Popen, cwd=folder, env=world(folder)).stdout)


@pytest.mark.parametrize("command", REFUSED_AT_ONCE)
def test_what_can_be_refused_at_once_does_not_wait_for_torch_or_mlflow(ends, command):
    code, out, err = ends[command]
    assert_refused(code, err, REFUSED_AT_ONCE[command])
    assert out == ""


def test_bad_data_is_one_line_and_no_traceback_from_outside_too(tmp_path):
    arrays = make_arrays()
    arrays["X_train"] = arrays["X_train"].astype(np.float64)
    arrays["X_train"][0, 0, 0] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    finished = poolnet("train", "--data", tmp_path / "bad.npz", begin=subprocess.Popen)
    assert_refused(finished.returncode, finished.stderr, "bad.npz: X_train: found NaN or infinity, expected finite")
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def test_a_loss_that_is_not_finite_fails_the_run(capsys, letters):
    code, _, err = run(capsys, "train", "--data", letters, "--lr", "1e37")
    assert code == 1
    assert err.count("\n") == 1
    assert "lr=1e+37 may be too high" in err
    (left,) = mlflow.MlflowClient().search_runs(["0"])
    assert left.info.status == "FAILED"


@pytest.mark.parametrize("option", [["--optimum"], ["--optimum", "yes"]])
def test_the_optimum_on_demand(capsys, letters, option):
    code, out, _ = run(capsys, "train", "--data", letters, "--epochs", 1, "--drain-timeout", 0, *option)
    assert code == 3
    printed = re.search(r"Optimum: train loss=([\d.]+), ([\d.]+) below", out)
    recorded = run_record.find(run_record.names()[0]).metrics()[-1]["metrics"]
    assert float(printed[1]) == pytest.approx(recorded["optimum_train_loss"], abs=1e-6)
    assert float(printed[2]) == pytest.approx(recorded["optimality_gap"], abs=1e-6)


def test_no_cache_gives_the_same_run_and_leaves_no_features(capsys, tmp_path, letters):
    printed = []
    for option in ([], ["--no-cache"]):
        code, out, _ = run(capsys, "train", "--data", letters, "--epochs", 2, "--drain-timeout", 0, *option)
        assert code == 3  # nobody waited for the store
        printed.append([line for line in out.splitlines() if line.startswith(("Epoch", "TEST"))])
        assert bool(list((tmp_path / "home").glob("features/*.npy"))) == (option == [])
        shutil.rmtree(tmp_path / "home" / "features", ignore_errors=True)
    assert printed[0] == printed[1]


def test_test_images_in_train_are_warned_about(capsys, tmp_path):
    arrays = make_arrays()
    arrays["X_test"][:4] = arrays["X_train"][:4]
    np.savez(tmp_path / "leak.npz", **arrays)
    code, _, err = run(capsys, "train", "--data", "leak.npz", "--epochs", 1, "--register", "no")
    assert code == 0
    assert err == f"poolnet: warning: {tmp_path / 'leak.npz'}: 4 of 110 test images also occur in train\n"
    (finished,) = mlflow.MlflowClient().search_runs(["0"])
    assert "4 test images also occur in train" in finished.data.tags["mlflow.note.content"]


def test_the_embedded_letters_are_rendered_once(monkeypatch):
    small = glyphs.render(train=20, val=10, test=10)
    calls = []
    monkeypatch.setattr(glyphs, "render", lambda: calls.append(1) or small)
    for _ in range(2):
        assert [len(split) for split in open_dataset(locate("glyphs"))] == [20, 10, 10]
    assert calls == [1]


def test_prepare_glyphs_writes_any_size(capsys, tmp_path):
    code, out, _ = run(capsys, "prepare", "glyphs", "--train", 30, "--val", 20, "--test", 10, "--out", "g.npz")
    assert (code, out) == (0, f"Wrote {tmp_path / 'g.npz'}\n")
    assert [len(split) for split in open_dataset(tmp_path / "g.npz")] == [30, 20, 10]
    assert [str(path) for path in tmp_path.glob(".*")] == []


def test_prepare_refuses_in_one_line(capsys):
    code, _, err = run(capsys, "prepare", "notmnist", "--small", "nowhere.tar.gz", "--out", "x.npz")
    assert_refused(code, err, "nowhere.tar.gz", "no such file")
    code, _, err = run(capsys, "prepare", "glyphs", "--train", "0", "--out", "x.npz")
    assert_refused(code, err, "--train", "0")


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_every_command_and_option_has_help(capsys):
    for path, command in commands(cli):
        assert command.help, path
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, (path, option.name)
        assert run(capsys, *path, "--help")[0] == run(capsys, *path, "-h")[0] == 0


def test_the_help_names_the_commands_in_their_order_of_use_each_in_a_whole_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "-h")
    assert code == 0
    lines = out.partition("Commands:\n")[2].splitlines()
    assert not any(line.endswith("...") for line in lines)
    assert max(map(len, lines)) <= 80
    order = ["prepare", "train", "sync", "sweep", "figures", "compare"]
    order += ["evaluate", "predict", "promote", "reproduce", "register", "clean", "doctor", "team"]
    assert [line.split()[0] for line in lines] == order
    assert sorted(order) == sorted(cli.commands)


def test_the_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, f"poolnet {importlib.metadata.version('poolnet')}\n", "")


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["train", "--data"], "", ["glyphs", "notmnist", "folder/", "letters.npz"]),
        (["train", "--data"], "n", ["notmnist"]),
        (["train", "--data"], "folder/", ["folder/small.npz"]),
        (["train", "--data"], "./l", ["./letters.npz"]),
        (["train", "--data"], "nowhere/", []),
        (["evaluate", "models:/poolnet/1", "--data"], "l", ["letters.npz"]),
        (["sweep"], "", ["folder/", "study.toml"]),
        (["sweep", "study.toml", "--data"], "g", ["glyphs"]),
        (["compare", "--study"], "s", ["study.toml"]),
        (["compare", "--by"], "b", ["batch_size"]),
        (["train", "--pool"], "", ["max", "avg", "lp", "stride", "conv"]),
        (["train", "--device"], "c", ["cpu", "cuda"]),
        (["promote", "--alias"], "champion-", [f"champion-{pool}" for pool in ("max", "avg", "lp", "stride", "conv")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_shell_completes(tmp_path, words, incomplete, expected):
    (tmp_path / "folder").mkdir()
    for name in ("letters.npz", "study.toml", "notes.txt", "folder/small.npz"):
        (tmp_path / name).touch()
    for path in tmp_path.glob("mlflow.db*"):
        path.unlink()
    found = ShellComplete(cli, {}, "poolnet", "_POOLNET_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in found] == expected


WORDS = [
    "plain",
    "a b",
    "$HOME",
    "`date`",
    "it's",
    "100%",
    "a;b",
    "",
    "Büro",
    "#",
    "~",
    "a\\b c\\",
    "(x)",
    "!",
    "*",
    "“x”",
]


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a POSIX shell")
def test_a_printed_command_is_what_a_posix_shell_reads():
    script = "import sys; print(ascii(sys.argv[1:]))"
    line = pasted(sys.executable, "-c", script, *WORDS, windows=False)
    finished = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert finished.stdout == f"{WORDS!a}\n"


@pytest.mark.parametrize("word", ["sqlite:///mlflow.db", "sqlite:////home/ada/my runs/mlflow.db", "a,b", "it's", "x&y"])
def test_a_printed_command_of_usual_signs_suits_all_shells(word):
    assert pasted(word, windows=False) == pasted(word, windows=True)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\data\x.npz", r"C:\data\x.npz"),
        ("a b", '"a b"'),
        ("", '""'),
        ("a,b", '"a,b"'),  # an array to PowerShell
        ("@x", '"@x"'),
        ("a&b|c", '"a&b|c"'),
        ("100%", '"100%"'),
        ("it's", '"it\'s"'),
        ("a b\\", '"a b\\\\"'),
        ("$HOME", "'$HOME'"),
        ("a`b", "'a`b'"),
        ("it's $5", "'it''s $5'"),
        ("“x”", "'“x”'"),  # ends a text in double quotes, to PowerShell
    ],
)
def test_a_printed_command_is_quoted_for_windows(word, expected):
    assert pasted("poolnet", word, windows=True) == f"poolnet {expected}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 2.5),
        ("epochs", True),
        ("epochs", "2"),
        ("batch_size", np.float32(32)),
        ("seed", 1.0),
        ("lr", "0.001"),
        ("lr", True),
        ("lr", 10**400),
        ("register", "yes"),
        ("register", 1),
        ("data", 5),
        ("data", None),
        ("pool", ["max"]),
        ("device", 0),
    ],
)
def test_a_setting_of_another_type_is_refused(field, value):
    with pytest.raises(InputError, match=f"^{field}: found .*, expected "):
        TrainConfig(**{field: value})


def test_numpys_numbers_become_pythons():
    config = TrainConfig(epochs=np.int64(3), lr=np.float32(0.5), seed=np.uint8(7))
    assert [type(getattr(config, name)) for name in ("epochs", "lr", "seed")] == [int, float, int]
    assert (config.epochs, config.lr, config.seed) == (3, 0.5, 7)
    assert type(TrainConfig(lr=1).lr) is float


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("avg is better: 3.1 (2.9 to 3.3), p < 0.001", "avg is better: 3.1 (2.9 to 3.3), p < 0.001"),
        ("val_acc of max-seed42", "val_acc of max-seed42"),
        ("*a* _b_ `c` [d](e) ~~f~~", r"\*a\* \_b\_ \`c\` \[d\](e) \~\~f\~\~"),
        ("a|b\\|c", r"a\|b\\\|c"),
        (
            "<img src=x onerror=y> </b> <!-- R&D &amp; &#60;",
            "&lt;img src=x onerror=y> &lt;/b> &lt;!-- R&D &amp;amp; &amp;#60;",
        ),
        ("a\nb\x1b[31m\udcff\u202e", r"a\\nb\\x1b\[31m\\udcff\\u202e"),
    ],
)
def test_foreign_text_is_itself_in_markdown(text, shown):
    assert marked(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"), [("a_b", "`a_b`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a\nb", "`a\\nb`"), ("", "``")]
)
def test_foreign_text_is_itself_in_code(text, shown):
    assert coded(text) == shown


def test_foreign_text_is_printed_as_lines_that_a_terminal_does_not_obey(capsys):
    echo("two lines\nof \x1b[31m \udcff \u202e \u65e5 \xe9\x9b\r\n")
    assert capsys.readouterr().out == "two lines\nof \\x1b[31m \\udcff \\u202e \u65e5 \xe9\\x9b\\r\n\n"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8"])
def test_text_that_an_encoding_lacks_ends_no_command(tmp_path, monkeypatch, encoding):
    """As on Windows, where what goes to a file or pipe is cp1252."""
    name = "\u65e5\u672c \xe9 \u2265.npz"

    def printed(*words):
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding, write_through=True))
        with pytest.raises(SystemExit) as end:
            main([*words])
        return end.value.code or 0, *(stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))

    code, _, err = printed("train", "--data", name)
    assert_refused(code, err, ".npz: no such file")
    code, out, err = printed("prepare", "glyphs", *("--train", "1", "--val", "1", "--test", "1"), "--out", name)
    assert (code, err) == (0, "")
    assert out.startswith("Wrote ")
    assert len(open_dataset(tmp_path / name).train) == 1


def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "protected.npz").write_text("mine")
    (tmp_path / "protected.npz").chmod(0o444)
    places = ["file/x.npz", "folder.npz", f"{'x' * 246}.npz"]
    if not os.access("protected.npz", os.W_OK):  # root may write everything
        places.append("protected.npz")
    places += [f"{folder}/x.npz" for folder in ("/proc", "/sys") if Path(folder).exists()]
    for place in places:
        for source in (["glyphs"], ["notmnist", "--small", "nowhere.tar.gz"]):
            code, _, err = run(capsys, "prepare", *source, "--out", place)
            assert_refused(code, err, Path(place).name)
            assert "disk full" not in err
            assert "nowhere" not in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


@pytest.mark.parametrize("found", ["none", "protected", "writable"])
def test_users_without_a_folder_of_their_own_have_one(monkeypatch, tmp_path, found):
    """As in a container that is started under a number. (MLflow asks for the folder, matplotlib writes there.)"""
    monkeypatch.setenv("POOLNET_HOME", str(tmp_path / "state"))
    if found == "none":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody of that name").expanduser())
    else:
        monkeypatch.setattr(Path, "home", lambda: tmp_path if found == "writable" else tmp_path / "not there")
    state = {
        "none": {"HOME": str(tmp_path / "state")},
        "protected": {"MPLCONFIGDIR": str(tmp_path / "state/matplotlib")},
    }
    assert _without_home() == state.get(found, {})


def test_help_imports_nothing_heavy():
    heavy = {"torch", "mlflow", "numpy", "matplotlib", "scipy", "PIL"}
    script = "import sys\nfrom poolnet.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage:" in finished.stdout
    assert not heavy & set(finished.stdout.split())


def test_no_command_shows_the_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (2, "")
    assert "train" in out


def test_prepare_glyphs_shows_the_renderers_own_defaults():
    defaults = {option.name: option.default for option in cli.commands["prepare"].commands["glyphs"].params}
    expected = {name: option.default for name, option in inspect.signature(glyphs.render).parameters.items()}
    assert {name: defaults[name] for name in ("train", "val", "test", "seed")} == {
        name: expected[name] for name in ("train", "val", "test", "seed")
    }
