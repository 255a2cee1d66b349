"""The files around the package say what the package says, and `mlflow run` works as a user types it."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import click
import mlflow
import pytest
import yaml
from conftest import ROOT, inside, mlflow_run
from finished_runs import journaled, publish
from mlflow.utils.environment import _PythonEnv
from packaging.requirements import Requirement
from PIL import Image

import poolnet
from poolnet.cli.commands import cli
from poolnet.data import dataset
from poolnet.tracking import training_runs
from poolnet.training.config import TrainConfig

COMMANDS = {"main": "train"}  # of entry points that are called otherwise
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "docs" / "compose.yaml").read_text(encoding="utf-8"))
IMPORT = r"^ *(?:from|import) (\w+)[\w.]*(?: import .*| as \w+)?(?: *#.*)?$"  # one a line, as ruff has them
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_defaults_are_the_same_everywhere():
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    options = {option.name: option for option in cli.commands["train"].params}
    declared = MLPROJECT["entry_points"]["main"]["parameters"]
    assert [name for name, default in fields.items() if default != ""] == list(declared)
    # these change nothing of the training
    assert set(options) - set(fields) == {"resume", "no_cache", "optimum", "open_page", "timeout"}
    assert (
        set(options) < training_runs.OPTIONS
    )  # or a run with one of them, by `mlflow run`, would be of another version
    for entry in MLPROJECT["entry_points"].values():  # an empty param says nothing where people look
        parameters = entry.get("parameters", {}).values()
        assert all(parameter.get("default", "of the user's") != "" for parameter in parameters)
    for name, default in fields.items():
        assert options[name].default == default
        if default == "":  # `-P fold=2/5` follows as it is
            continue
        # as MLflow passes it: text, which the option must read back as the default; and which it records as it is
        assert str(declared[name]["default"]) == str(default)
        assert options[name].type.convert(str(declared[name]["default"]), options[name], None) == default


def test_the_entry_points_pass_every_parameter_on():
    for name, entry in MLPROJECT["entry_points"].items():
        used = re.findall(r"\{(\w+)\}", entry["command"])
        assert used == list(entry.get("parameters", {})), name
    command = MLPROJECT["entry_points"]["main"]["command"]
    assert re.findall(r"--(\w+) \{(\w+)\}", command) == [
        (name, name) for name in MLPROJECT["entry_points"]["main"]["parameters"]
    ]


def test_the_conda_environment_as_mlflow_converts_it_holds_every_dependency():
    converted = _PythonEnv.from_conda_yaml(str(ROOT / "conda.yaml"))
    found = {
        Requirement(line).name: Requirement(line) for line in converted.dependencies if Requirement(line).name != "pip"
    }
    expected = {Requirement(line).name: Requirement(line) for line in PYPROJECT["project"]["dependencies"]}
    assert found == expected
    assert re.fullmatch(r"3\.\d+", converted.python)
    assert tuple(map(int, converted.python.split("."))) >= (3, 11)


def test_everything_that_is_imported_is_declared():
    projects = {"PIL": "pillow", "botocore": "boto3", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    names = [Requirement(line).name for line in PYPROJECT["project"]["dependencies"]]
    extras = PYPROJECT["project"]["optional-dependencies"].items()
    extra = {name: [Requirement(line).name for line in lines] for name, lines in extras}
    for folder, declared in (
        ("poolnet", names + extra["team"]),
        ("benchmarks", names + extra["bench"] + extra["team"]),
        ("tests", names + extra["test"] + extra["team"]),
    ):
        paths = list((ROOT / folder).rglob("*.py"))
        assert paths
        own = {"poolnet", *(path.stem for path in (ROOT / folder).glob("*.py"))}
        for path in paths:
            modules = re.findall(IMPORT, path.read_text(encoding="utf-8"), re.MULTILINE)
            for module in {*modules} - sys.stdlib_module_names - own:
                assert projects.get(module, module) in declared, f"{path.name} imports {module}"


def test_every_dependency_has_bounds_which_those_installed_keep():
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    for line in [*PYPROJECT["project"]["dependencies"], *(line for lines in extras for line in lines)]:
        requirement = Requirement(line)
        assert {"<", ">="} == {bound.operator for bound in requirement.specifier}, line
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            assert importlib.metadata.version(requirement.name) in requirement.specifier, line


def test_mlflow_run_gives_the_run_that_the_command_gives(letters):
    options = ["-P", f"data={letters}", "-P", "pool=avg", "-P", "epochs=3", "-P", "lr=1e-2"]
    finished = mlflow_run(*options, "--run-name", "named by the user")
    assert finished.returncode == 0, finished.stderr
    publish(journaled(TrainConfig(data=str(letters), pool="avg", epochs=3, lr=0.01)))
    client = mlflow.MlflowClient()
    second, first = client.search_runs(["0"], order_by=["attributes.start_time DESC"])
    assert (first.info.run_name, second.info.run_name) == ("named by the user", second.data.tags["poolnet.run"])
    assert first.info.status == second.info.status == "FINISHED"
    assert first.data.params["lr"] == "1e-2"
    timings = {"speed/epoch_seconds", "speed/examples_per_second"}
    assert set(first.data.metrics) == set(second.data.metrics)
    for name in set(first.data.metrics) - timings:
        histories = [client.get_metric_history(run.info.run_id, name) for run in (first, second)]
        values = [[(metric.step, metric.value) for metric in history] for history in histories]
        assert values[0] == values[1]


@pytest.mark.parametrize(
    ("option", "said"),
    [("data=nowhere.npz", "nowhere.npz: no such file"), ("size=3", "--size")],
)
def test_mlflow_run_leaves_no_run_behind_as_running(letters, option, said):
    finished = mlflow_run(*([] if option.startswith("data") else ["-P", f"data={letters}"]), "-P", option)
    assert finished.returncode != 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("poolnet: error: ")]
    assert said in line
    (left,) = mlflow.MlflowClient().search_runs(["0"])
    assert left.info.status == "FAILED"


def test_mlflow_run_prepares_too(tmp_path):
    out = tmp_path / "g.npz"
    given = [f"-P{name}" for name in ("dataset=glyphs", "train=20", "val=10", "test=10", f"out={out}")]
    finished = mlflow_run("-e", "prepare", *given)
    assert finished.returncode == 0, finished.stderr
    assert out.exists()


README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
PAGES = [*(ROOT / f"{name}.md" for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, *pages):
    texts = (page.read_text(encoding="utf-8") for page in pages)
    return [
        each for text in texts for each in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def test_the_readme_begins_with_the_result_and_is_short():
    lines = README.splitlines()
    assert "test accuracy" in "\n".join(lines[:10])
    assert len(lines) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_the_docs_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


def test_the_version_has_its_changes():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def parsed(group, words):
    """The name of the command that the words are, which must be such that it takes them."""
    path, words = [], list(words)
    parent = click.Context(group, **group.context_settings)  # a command keeps the help options that it is first given
    while isinstance(group, click.Group):
        path.append(words.pop(0))
        group = group.commands[path[-1]]
    group.make_context(" ".join(path), [word.strip('"') for word in words], parent).close()
    return " ".join(path)


def test_the_commands_of_the_docs_are_such_that_can_be_typed():
    from mlflow.cli import cli as mlflow_cli  # three seconds, which other workers need not wait

    typed = [line for block in blocks("sh", *PAGES) for part in block.splitlines() for line in part.split(" && ")]
    named = set()
    for place in [dataset.prepared("notmnist"), *(Path(word) for line in typed for word in line.split())]:
        if place.suffix in (".npz", ".pt"):  # what a reader has, where a command refuses what is not there
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    for line in typed:
        match line.split():
            case ["poolnet", *words]:
                named.add(parsed(cli, words))
            case ["docker", "compose", action, *words]:
                assert action in ("up", "stop", "start", "build", "run", "exec", "cp")
                services = {word.partition(":")[0] for word in words if not word.startswith(("-", ".", "/"))}
                assert services & set(COMPOSE["services"]) or not services, line
            case ["mlflow", "models" | "artifacts" | "gc", *_] as words:
                parsed(mlflow_cli, words[1:])
            case ["dask", "scheduler" | "worker" as role, *words]:
                importlib.import_module(f"distributed.cli.dask_{role}").main.make_context(role, words).close()
            case ["export", *words]:
                assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in words)
            case ["curl", address, *_]:
                assert address == "http://127.0.0.1:5001/invocations"
            case ["mlflow", "run", ".", *words]:
                entry = words[words.index("-e") + 1] if "-e" in words else "main"
                declared = MLPROJECT["entry_points"][entry].get("parameters", {})
                given = [word.partition("=")[0] for flag, word in pairwise(words) if flag == "-P"]
                assert given
                options = {text for each in cli.commands[COMMANDS.get(entry, entry)].params for text in each.opts}
                assert all(name in declared or f"--{name}" in options for name in given), line
            case ["python", "-m", "pip" | "pytest", *_] | ["ruff" | "lint-imports" | "mypy", *_]:
                pass
            case ["python", script, *_]:
                assert (ROOT / script).exists()
            case _:
                pytest.fail(f"no test knows this command: {line}")
    groups = {name for name, command in cli.commands.items() if isinstance(command, click.Group)}
    subcommands = {f"{group} {name}" for group in groups for name in cli.commands[group].commands}
    assert named == set(cli.commands) - groups | subcommands


def test_the_containers_of_a_team_server_are_of_fixed_versions_and_closed_but_for_the_proxy():
    services = COMPOSE["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    images = [service["image"] for service in services.values() if "image" in service]
    assert all(re.search(r":\d+\.\d+", image) for image in images), images
    text = (ROOT / "docs" / "compose.yaml").read_text(encoding="utf-8")
    secrets = re.findall(r"(?:PASSWORD|KEY|secretKey|://mlflow)\w*\"?: ?\"?([^@\s,]+)", text.split("services:")[1])
    assert len(secrets) == 8
    assert all(re.match(r"\$\{\w+:\?\}", secret.replace("mlflow:", "")) or secret == "mlflow" for secret in secrets), (
        secrets
    )
    for part in services.values():
        for named in (*part.get("configs", []), *part.get("volumes", [])):
            kind, name = ("configs", named["source"]) if isinstance(named, dict) else ("volumes", named.split(":")[0])
            assert name in COMPOSE[kind]


def test_the_containers_of_a_team_server_are_told_what_their_programs_know():
    from mlflow import environment_variables
    from mlflow.cli import cli as mlflow_cli

    tracking = COMPOSE["services"]["tracking"]
    words = tracking["command"].replace("${TRACKING_HOST:?}", "mlflow.example.org").split()
    with mlflow_cli.commands["server"].make_context("server", words[2:]) as context:
        assert context.params["app_name"] == "basic-auth"
        assert context.params["allowed_hosts"] == "mlflow.example.org"
    known = {*vars(environment_variables), "MLFLOW_BACKEND_STORE_URI"}
    asked = [name for name in tracking["environment"] if name.startswith("MLFLOW_")]
    assert asked
    assert set(asked) <= known
    (installed,) = (Requirement(line) for line in PYPROJECT["project"]["dependencies"] if line.startswith("mlflow"))
    version = re.search(r"mlflow\[auth\]==([\d.]+)", tracking["build"]["dockerfile_inline"])[1]
    assert installed.specifier.contains(version)
    weed = shutil.which("weed")
    if weed:
        known = subprocess.run([weed, "server", "-h"], capture_output=True, text=True).stderr
        for word in COMPOSE["services"]["objects"]["command"].split()[1:]:
            assert f"  {word.partition('=')[0]}" in known, word


def test_the_readmes_lines_for_a_notebook_work(letters, capsys):
    """On the store: a champion that the same settings gave."""
    letters.rename("small.npz")
    trained = publish(journaled(TrainConfig(data="small.npz", pool="avg", epochs=10)))
    mlflow.MlflowClient().set_registered_model_alias("poolnet", "champion", "1")
    (block,) = blocks("python", ROOT / "README.md")
    assert len(list(filter(None, block.splitlines()))) <= 10
    exec(block, {})
    *epochs, ours, champions = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in epochs] == [f"Epoch {number:02d}" for number in range(1, 11)]
    assert float(ours) == float(champions) == pytest.approx(trained.data.metrics["test_acc"], abs=1e-6)


def test_importing_poolnet_imports_nothing_heavy_and_all_ten_names_are_there():
    script = "import sys, poolnet; print({'torch', 'mlflow', 'numpy'} & {*sys.modules})"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"
    assert [getattr(poolnet, name).__name__ for name in poolnet.__all__ if name in dir(poolnet)] == poolnet.__all__
    assert len(poolnet.__all__) == 10
    with pytest.raises(AttributeError, match="no attribute 'pooling'"):
        _ = poolnet.pooling


def test_the_ten_names_do_what_the_commands_do(letters):
    def train(pool):
        config = poolnet.TrainConfig(data=str(letters), pool=pool, epochs=2, register=False)
        return poolnet.train(config, echo=lambda line: None)

    trained = [train("max"), train("avg")]
    assert [each.trouble for each in trained] == [None, None]
    names = [each.run.name for each in trained]
    comparison, said = poolnet.compare(names), json.loads(inside("compare", *names, "--no-publish", "--json").stdout)
    assert comparison.sentence == said["sentence"]
    assert comparison.acc.estimate == said["effects"]["acc"]["estimate"]
    with pytest.raises(poolnet.InputError, match="found 1 runs, expected a study file or two runs"):
        poolnet.compare(names[:1])
    data, model = poolnet.open_data(letters), poolnet.load_model(f"models:/{trained[1].server.model_id}")
    assert poolnet.evaluate(model, data.test).acc == trained[1].run.by_step()[0]["test_acc"]
    Image.fromarray(data.test.X[0]).save("letter.png")
    (prediction,) = poolnet.predict(model, ["letter.png"])
    assert [prediction] == list(poolnet.predict(model, "letter.png"))
    assert prediction.letter in "ABCDEFGHIJ"


def test_the_project_keeps_no_lock_that_breaks_the_uv_environment():
    assert not (ROOT / "uv.lock").exists()
