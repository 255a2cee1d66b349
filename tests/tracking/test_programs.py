"""Models are read as data, whatever somebody has put into their files."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from conftest import Payload
from finished_runs import journaled
from hypothesis import given
from hypothesis import strategies as st
from mlflow.models import Model
from safetensors.torch import save_file
from torch import nn

from poolnet.tracking import programs
from poolnet.training.config import POOLS
from poolnet.training.model import Checked, build_model


@pytest.fixture(scope="module", params=POOLS)
def written(request, tmp_path_factory):
    """A network, and the folder that it was written to."""
    net, folder = build_model(request.param, seed=1).eval(), tmp_path_factory.mktemp("written")
    (folder / "data").mkdir()
    programs.write(folder, request.param, net)
    return request.param, net, folder


@pytest.fixture(scope="module")
def written_avg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("avg")
    (folder / "data").mkdir()
    programs.write(folder, "avg", build_model("avg", seed=1))
    return folder


@pytest.fixture
def avg(written_avg, tmp_path):
    """A folder of the test's own."""
    return Path(shutil.copytree(written_avg, tmp_path / "avg"))


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def rewritten(path, change):
    """The archive with members in which `change(name, data)` has put something else."""
    with zipfile.ZipFile(path) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_what_is_read_is_what_was_written(written):
    pool, net, folder = written
    found, read = programs.read(folder)
    assert found == pool
    assert not read.training
    assert same_weights(read, net)
    assert programs.is_ours(folder, read)


def test_the_export_says_what_the_weights_say(written):
    _, net, folder = written
    program = torch.export.load(folder / programs.EXPORT).module()
    with torch.inference_mode():
        for n in (1, 2, 7):
            images = torch.rand(n, 1, 28, 28)
            assert torch.equal(program(images), net(images))


def test_the_export_says_nothing_of_who_made_it(written):
    """Torch's stack traces name home and user."""
    _, _, folder = written
    (member,) = [name for name in zipfile.ZipFile(folder / programs.EXPORT).namelist() if name.endswith("model.json")]
    text = zipfile.ZipFile(folder / programs.EXPORT).read(member).decode()
    assert "linear.default" in text
    for word in ("stack_trace", "File ", ".py", "site-packages", "poolnet"):
        assert word not in text


def test_an_export_that_is_not_ours_is_found_out_and_not_executed(avg, tmp_path):
    touched = tmp_path / "touched"
    payload = f"__import__('pathlib').Path({str(touched)!r}).touch() or True"
    export = avg / programs.EXPORT
    whole = export.read_bytes()

    def guard(name, data):
        return json.dumps({**json.loads(data), "guards_code": [payload]}) if name.endswith("model.json") else data

    def pickled(name, data):
        if "sample_inputs" not in name:
            return data
        with zipfile.ZipFile(content := io.BytesIO(), "w") as saved:
            saved.writestr("archive/data.pkl", pickle.dumps(Payload(touched)))
        return content.getvalue()

    def second_directory():
        """Of two archives in one file Python finds the last, and a reader of absolute places the first."""
        with zipfile.ZipFile(other := io.BytesIO(), "w") as archive:
            archive.writestr("model/models/model.json", b"{}")
        return whole + other.getvalue()

    def extra():
        with zipfile.ZipFile(content := io.BytesIO(whole), "a") as archive:
            archive.writestr("model/data/aotinductor/model/library.so", b"")
        return content.getvalue()

    net = programs.read(avg)[1]
    for change in (guard, pickled):
        export.write_bytes(whole)
        rewritten(export, change)
        assert not programs.is_ours(avg, net), change
    for content in (second_directory(), extra(), whole + b" ", b"\x80\x04N." + whole, whole[:-1], b""):
        export.write_bytes(content)
        assert not programs.is_ours(avg, net)
    programs.write(avg, "avg", build_model("avg", seed=2))  # another network's
    assert not programs.is_ours(avg, net)
    assert not touched.exists()

    export.write_bytes(whole)
    rewritten(export, guard)
    torch.export.load(export).module()(torch.zeros(2, 1, 28, 28))
    assert touched.exists()  # so the threat is real


WEIGHTS = {"fc.weight": torch.zeros(10, 49), "fc.bias": torch.zeros(10)}
BAD_WEIGHTS = {
    "another pool": ({"pool": "conv"}, WEIGHTS, "expected float32"),
    "no pool": (None, WEIGHTS, "found weights of pool None"),
    "an unknown pool": ({"pool": "min"}, WEIGHTS, "found weights of pool 'min'"),
    "one missing": ({"pool": "max"}, {"fc.weight": WEIGHTS["fc.weight"]}, "expected float32"),
    "one more": ({"pool": "max"}, WEIGHTS | {"zz": torch.zeros(1)}, "expected float32"),
    "another shape": ({"pool": "max"}, WEIGHTS | {"fc.bias": torch.zeros(10, 1)}, "expected float32"),
    "another type": ({"pool": "max"}, WEIGHTS | {"fc.bias": torch.zeros(10).double()}, "expected float32"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_are_no_networks_are_refused(avg, case):
    metadata, weights, said = BAD_WEIGHTS[case]
    save_file(weights, avg / programs.WEIGHTS, metadata)
    with pytest.raises(ValueError, match=said):
        programs.read(avg)


def test_a_file_that_holds_no_weights_is_refused(avg, tmp_path):
    touched, path = tmp_path / "touched", avg / programs.WEIGHTS
    whole = path.read_bytes()
    for content in (b"", b"text", pickle.dumps(Payload(touched)), whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="found no readable data/weights"):
            programs.read(avg)
    assert not touched.exists()


# --- models of earlier versions, which hold the export alone ----------------------------------------------------------


def older(net, path):
    """As MLflow writes what earlier versions registered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {0: torch.export.Dim.AUTO}
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(2, 1, 28, 28),), dynamic_shapes=(batch,)), path)
    return path


@pytest.fixture(scope="module")
def older_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    older(Checked(build_model("avg", seed=1)), folder / programs.EXPORT)
    return folder, (folder / programs.EXPORT).read_bytes()


@pytest.fixture
def avg_older(older_folder, tmp_path):
    path = tmp_path / "older" / programs.EXPORT
    path.parent.mkdir(parents=True)
    path.write_bytes(older_folder[1])
    return path


@pytest.mark.parametrize("pool", programs.LAYERS)
def test_models_of_earlier_versions_are_read_from_the_export(tmp_path, pool):
    net = build_model(pool, seed=1)
    for name, form in (("checked", Checked(net)), ("plain", net)):  # the first versions did not check pixels
        older(form, tmp_path / name / programs.EXPORT)
        found, read = programs.read(tmp_path / name)
        assert found == pool
        assert same_weights(read, net)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(49, 10)),  # without ReLU
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(49, 10)),
        nn.Sequential(nn.MaxPool2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(49, 10)),
        build_model("stride", seed=1),
    ],
    ids=["linear", "no relu", "two kinds", "one pooling", "stride"],
)
def test_another_network_is_none_of_ours(net, tmp_path):
    older(Checked(net), tmp_path / programs.EXPORT)
    with pytest.raises(ValueError, match="found a network that is none of max, avg, conv: "):
        programs.read(tmp_path)


def test_pickles_in_the_weights_are_not_loaded(avg_older, tmp_path):
    touched = tmp_path / "touched"

    def weights(name, data):
        if name.endswith("weight_0"):
            return pickle.dumps(Payload(touched))
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json") else data

    rewritten(avg_older, weights)
    with pytest.raises(ValueError, match=r"found net\.fc\.weight of another type"):
        programs.read(tmp_path / "older")
    assert not touched.exists()


def changed_config(change):
    """The weights' entries by name, as `change` leaves them."""

    def apply(name, data):
        if not name.endswith("model_weights_config.json"):
            return data
        config = json.loads(data)
        change(config["config"])
        return json.dumps(config)

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.update(zz=config["net.fc.bias"]), "expected float32"),
        (lambda config: config.pop("net.fc.bias"), "expected float32"),
        (lambda config: config["net.fc.bias"].update(path_name="weight_0"), "1,960 bytes of net.fc.bias, expected 40"),
        (lambda config: config["net.fc.bias"]["tensor_meta"].update(dtype=8), "another type"),
        (lambda config: config["net.fc.weight"]["tensor_meta"]["strides"].reverse(), "another type"),
        (
            lambda config: config["net.fc.bias"]["tensor_meta"].update(sizes=[{"as_int": 10**30}]),
            "another form|bytes of",
        ),
    ],
)
def test_entries_that_are_not_the_networks_are_refused(avg_older, tmp_path, change, said):
    rewritten(avg_older, changed_config(change))
    with pytest.raises(ValueError, match=said):
        programs.read(tmp_path / "older")


def test_a_bomb_is_not_unpacked(avg_older, tmp_path):
    with zipfile.ZipFile(avg_older) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(avg_older, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, bytes(1 << 24) if "weight_0" in name else data)
    with pytest.raises(ValueError, match="larger once it is unpacked"):
        programs.read(tmp_path / "older")


@given(data=st.data())
def test_a_damaged_export_is_refused_or_read_as_it_was(older_folder, data):
    """Cut anywhere, or with a byte changed: a `ValueError`, or, where the byte says nothing, the same weights."""
    folder, whole = older_folder
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    for content in (whole[:at], bytes(changed)):
        (folder / programs.EXPORT).write_bytes(content)
        try:
            pool, net = programs.read(folder)
        except ValueError:
            continue
        assert pool == "avg"
        expected = build_model("avg", seed=1).state_dict()
        assert {name: tensor.tolist() for name, tensor in net.state_dict().items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }


# --- an export that is kept -------------------------------------------------------------------------------------------


def trained(pool, seed):
    rng = np.random.default_rng(seed)
    weights = {name: tensor.numpy() for name, tensor in build_model(pool, seed).state_dict().items()}
    return {**weights, "example": rng.random((2, 1, 28, 28), dtype=np.float32)}


def export(pool, seed, path):
    model = SimpleNamespace(artifact_location="file:///somewhere", model_id=f"m-{seed}")
    programs.export(trained(pool, seed), pool, "0" * 32, model, path)
    return path


def files_of(path):
    """What a model's folder holds; of MLmodel, all but what is of this one model."""
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    del found[programs.EXPORT]
    model = Model.load(str(path)).to_dict()
    return found | {"MLmodel": {name: value for name, value in model.items() if name != "utc_time_created"}}


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("pool", ["max", "lp", "conv"])  # avg and stride have the layout of max
def test_a_copy_of_the_kept_export_equals_a_full_export_and_is_served(pool, tmp_path, monkeypatch):
    export(pool, 1, tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_export_in_full", None)  # is not called again
        copy = export(pool, 2, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_unpack", lambda pool, path: False)
        patch.setattr(programs, "_keep", lambda path, pool, arrays: None)
        full = export(pool, 2, tmp_path / "full")
    assert files_of(copy) == files_of(full)
    net = programs.read(copy)[1]
    assert programs.equal(full / programs.EXPORT, copy / programs.EXPORT)
    assert programs.is_ours(copy, net)
    assert not programs.is_ours(tmp_path / "first", net)
    module, server = mlflow.pytorch.load_model(str(copy)), mlflow.pyfunc.load_model(str(copy))
    for n in (1, 2, 7):
        images = torch.rand(n, 1, 28, 28)
        with torch.inference_mode():
            logits = net(images)
            assert torch.equal(module(images), logits)
        assert np.array_equal(server.predict(images.numpy()), logits.numpy())


def full_exports_once(patch):
    """Let torch export a network in full only once."""
    export_in_full, made = programs._export_in_full, {}

    def remembered(path, pool, arrays):
        key = (pool, *(array.tobytes() for array in arrays.values()))
        if key in made:
            shutil.copytree(made[key], path)
        else:
            export_in_full(path, pool, arrays)
            made[key] = shutil.copytree(path, Path.cwd() / f"made {len(made)}")

    patch.setattr(programs, "_export_in_full", remembered)


def test_a_kept_export_that_is_damaged_is_made_anew(tmp_path, monkeypatch):
    before = files_of(export("avg", 1, tmp_path / "before"))
    full_exports_once(monkeypatch)
    (kept,) = (tmp_path / "home" / "exports").glob("avg-*")
    whole = kept.read_bytes()

    def one_bit(at):
        return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]

    name = whole.rindex(b"conda.yaml")  # in the central directory
    damaged = {
        "cut off": whole[:-50],
        "empty": b"",
        "a bit in a file": one_bit(whole.index(b"channels:")),
        "a bit in a name": one_bit(name),
        "a bit in its place": one_bit(name - 4),
    }
    for damage, content in damaged.items():
        kept.write_bytes(content)
        assert files_of(export("avg", 1, tmp_path / damage)) == before, damage
        with zipfile.ZipFile(kept) as archive:
            assert archive.testzip() is None, damage
    kept.unlink()
    kept.mkdir()
    assert files_of(export("avg", 1, tmp_path / "a folder")) == before


def test_a_kept_export_that_somebody_has_changed_is_found_out(tmp_path):
    path = export("avg", 1, tmp_path / "model")
    (kept,) = (tmp_path / "home" / "exports").glob("avg-*")
    with zipfile.ZipFile(kept) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files[programs.EXPORT] = programs._with_members(
        files[programs.EXPORT], {"model/models/model.json": changed_program(path / programs.EXPORT)}
    )
    with zipfile.ZipFile(kept, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = export("avg", 2, tmp_path / "published")
    assert not programs.is_ours(path, programs.read(path)[1])


def changed_program(path):
    """Another program, of as many bytes."""
    with zipfile.ZipFile(path) as archive:
        program = archive.read("model/models/model.json")
    return program.replace(b"relu.default", b"tanh.default", 1)


@pytest.mark.usefixtures("nothing_kept")
def test_an_export_of_another_layout_is_not_kept(tmp_path, monkeypatch):
    def elsewhere(folder, pool, weights):
        raise ValueError("found an export with weights w")

    monkeypatch.setattr(programs, "fill", elsewhere)
    path = export("avg", 1, tmp_path / "model")
    assert not (tmp_path / "home" / "exports").exists()
    assert programs.is_ours(path, programs.read(path)[1])


def test_weights_that_other_code_would_put_elsewhere_are_refused(avg):
    weights = {name: tensor.numpy() for name, tensor in programs.read(avg)[1].state_dict().items()}
    with pytest.raises(ValueError, match=r"with weights fc\.weight, fc\.bias"):
        programs.fill(avg, "avg", {"fc.weight": weights["fc.weight"]})
    with pytest.raises(ValueError, match="of 1960 bytes"):
        programs.fill(avg, "avg", weights | {"fc.weight": weights["fc.weight"][:9]})


def test_the_second_publication_needs_no_torch_and_reports_nothing_to_mlflows_makers(letters):
    """Torch takes seconds to import. Of a process that MLflow takes for one of a test, it reports nothing anyway."""
    journaled()
    code = (
        "import sys; from poolnet.cli import main\n"
        "try: main(['sync'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'mlflow' in sys.modules and not {'torch', 'matplotlib', 'scipy.stats'} & set(sys.modules)\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled; assert is_telemetry_disabled()"
    )
    off = ("CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in off}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, "published" in done.stdout) == (0, True), done.stderr
