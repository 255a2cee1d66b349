"""Exported models are read as data, whatever somebody has put into the file."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from poolnet import exported
from poolnet.config import POOLS
from poolnet.model import Checked, build_model


def export(net, path):
    """As MLflow writes what poolnet registers."""
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(
        torch.export.export(Checked(net).eval(), (torch.zeros(2, 1, 28, 28),), dynamic_shapes=(batch,)), path
    )


@pytest.fixture(scope="module", params=POOLS)
def archive(request, tmp_path_factory):
    net, path = build_model(request.param, seed=1), tmp_path_factory.mktemp("exported") / "model.pt2"
    export(net, path)
    return request.param, net, path


@pytest.fixture(scope="module")
def avg(tmp_path_factory):
    path = tmp_path_factory.mktemp("avg") / "model.pt2"
    export(build_model("avg", seed=1), path)
    return path


def rewritten(path, change):
    """A copy of an archive in whose members `change(name, data)` has put something else."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return copy


def test_what_is_read_is_what_was_exported(archive):
    pool, net, path = archive
    found, read = exported.read(path)
    assert found == pool
    assert not read.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name])


def test_it_says_what_the_exported_program_says(archive):
    _, _, path = archive
    images = torch.rand(7, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(exported.read(path)[1](images), torch.export.load(path).module()(images))


def test_python_in_the_archive_is_refused_and_not_executed(avg, tmp_path):
    """Torch's own loader executes shape guards and expressions, though MLflow finds no pickle in them."""
    touched = tmp_path / "touched"
    payload = f"__import__('pathlib').Path({str(touched)!r}).touch() or True"

    def guard(name, data):
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "guards_code": [payload]})

    def expression(name, data):
        if not name.endswith("models/model.json"):
            return data
        return data.replace(b"Symbol('s77', positive=True, integer=True)", payload.replace('"', "'").encode())

    with pytest.raises(ValueError, match="found shape guards"):
        exported.read(rewritten(avg, guard))
    with pytest.raises(ValueError, match=r"found \"__import__.*which torch may execute"):
        exported.read(rewritten(avg, expression))
    assert not touched.exists()
    torch.export.load(rewritten(avg, guard)).module()(torch.zeros(2, 1, 28, 28))
    assert touched.exists()  # so the threat is real


def test_more_members_than_an_export_has_are_refused(avg):
    path = rewritten(avg, lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/aotinductor/model/library.so", b"")
    with pytest.raises(ValueError, match=r"library\.so in the archive"):
        exported.read(path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_pickles_in_the_archive_are_not_loaded(avg, tmp_path):
    touched = tmp_path / "touched"
    bomb = pickle.dumps(Payload(touched))

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):

        def sample_inputs(name, data, protocol=protocol):
            if "sample_inputs" not in name:
                return data
            with zipfile.ZipFile(content := io.BytesIO(), "w") as saved:
                saved.writestr("archive/data.pkl", pickle.dumps(Payload(touched), protocol))
            return content.getvalue()

        with pytest.raises(ValueError, match="in the pickle of its example inputs, which are to be tensors"):
            exported.read(rewritten(avg, sample_inputs))
    with pytest.raises(ValueError, match="found no whole archive"):
        exported.read(rewritten(avg, lambda name, data: bomb if "sample_inputs" in name else data))

    def beside(name, data):
        """Torch's reader of zips does not tell capitals from small letters."""
        if "sample_inputs" not in name:
            return data
        with zipfile.ZipFile(content := io.BytesIO(data), "a") as saved:
            saved.writestr("archive/DATA.PKL", bomb)
        return content.getvalue()

    with pytest.raises(ValueError, match=r"found archive/DATA\.PKL"):
        exported.read(rewritten(avg, beside))

    def weights(name, data):
        if name.endswith("weight_0"):
            return bomb
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json") else data

    with pytest.raises(ValueError, match=r"fc\.weight of another type"):
        exported.read(rewritten(avg, weights))
    assert not touched.exists()


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(49, 10)),  # without ReLU
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(49, 10)),
        nn.Sequential(nn.MaxPool2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(49, 10)),
    ],
    ids=["linear", "no relu", "two kinds", "one pooling"],
)
def test_another_network_is_none_of_ours(net, tmp_path):
    export(net, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"none of max, avg, conv: .*\(self=x"):
        exported.read(tmp_path / "model.pt2")


def test_a_member_that_is_there_twice_is_refused(avg):
    for name in ("model/models/model.json", "model/byteorder"):
        path = rewritten(avg, lambda name, data: data)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, archive.read(name))
        with pytest.raises(ValueError, match=f"found {name} in the archive"):
            exported.read(path)


def changed_config(change):
    """The weights' entries by name, as `change` leaves them."""

    def apply(name, data):
        if not name.endswith("model_weights_config.json"):
            return data
        config = json.loads(data)
        change(config["config"])
        return json.dumps(config)

    return apply


def test_weights_that_are_not_the_networks_are_refused(avg):
    """Torch loads every entry, by pickle if it says so; and a second bias may be the one that is served."""

    def more(config):
        config["zz"] = {**config["net.fc.bias"], "use_pickle": True, "path_name": "weight_9"}

    def decoy(config):
        config["fc.bias"] = config["net.fc.bias"]

    def shared(config):
        config["net.fc.bias"]["path_name"] = config["net.fc.weight"]["path_name"]

    for change in (more, decoy, shared):
        with pytest.raises(ValueError, match="found weights net"):
            exported.read(rewritten(avg, changed_config(change)))


def test_an_archive_that_another_reader_reads_otherwise_is_refused(avg, tmp_path):
    whole, other = avg.read_bytes(), tmp_path / "other.pt2"
    for content in (b"\x80\x04N." + whole, whole + b" ", whole[:-2] + b"\x01\x00 "):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="no whole archive"):
            exported.read(other)
    # a directory that only a reader of absolute offsets finds
    end = whole.rindex(b"PK\x05\x06")
    other.write_bytes(whole[:end] + whole[end : end + 16] + b"\x00\x00\x00\x00" + whole[end + 20 :])
    with pytest.raises(ValueError, match="no whole archive"):
        exported.read(other)
    compressed = tmp_path / "compressed.pt2"
    with zipfile.ZipFile(avg) as old, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="in the archive, which no export"):
        exported.read(compressed)


def test_a_bomb_of_a_member_is_not_unpacked(avg):
    for size, said in (
        (1 << 22, "more than 4,194,304 bytes"),
        (1 << 20, r"1,048,576 bytes of fc.weight, expected 1,960"),
    ):
        with pytest.raises(ValueError, match=said):
            exported.read(rewritten(avg, lambda name, data, size=size: bytes(size) if "weight_0" in name else data))


@given(data=st.data())
def test_a_damaged_archive_is_refused_or_read_as_it_was(avg, data):
    """Cut anywhere, or with a byte changed: a `ValueError`, or, where the byte says nothing, the same weights."""
    whole = avg.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = avg.with_name("damaged.pt2")
    for content in (whole[:at], bytes(changed)):
        damaged.write_bytes(content)
        try:
            pool, net = exported.read(damaged)
        except ValueError:
            continue
        assert pool == "avg"
        expected = build_model("avg", seed=1).state_dict()
        assert all(np.array_equal(tensor, expected[name]) for name, tensor in net.state_dict().items())
