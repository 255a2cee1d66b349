"""Write, check and read the folder of a model.

The folder has the weights, which poolnet reads, and the export, which MLflow serves.

Torch executes more of an export than its pickles, for example its shape guards. So poolnet never loads an export. It
reads `weights.safetensors`, which also names the pool.

The metadata of an export's nodes are removed: they are stack traces, with the folders of the person who trained. After
that, two exports of one network by one torch differ only in the bytes of their weights and in a serial number. So an
export that differs in more is not from poolnet. And a kept export can get other weights without torch, which takes
seconds to import and to export.
"""

import contextlib
import datetime
import importlib.metadata
import io
import json
import math
import re
import shutil
import struct
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types import Schema, TensorSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from poolnet.data.dataset import SIDE
from poolnet.files import home, replacing
from poolnet.training.config import POOLS

if TYPE_CHECKING:  # only where a network is made
    import torch

    from poolnet.training.model import SimpleConvNet, SimplePoolNet

EXPORT, WEIGHTS = "data/model.pt2", "data/weights.safetensors"
SERIAL = "model/.data/serialization_id"  # a hash of all that is in the export
FLOAT32 = 7  # in the numbering of types in an export
# of the pools that models have which hold the export alone
LAYERS = {"max": "max_pool2d.default", "avg": "avg_pool2d.default", "conv": "conv2d.default"}
CHECK = ["abs.default", "le.Scalar", "all.default", "_assert_async.msg"]  # the operations of `Checked`

VERSIONS = {name: importlib.metadata.version(name) for name in ("mlflow", "numpy", "torch")}
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 1, SIDE, SIDE))]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
)
# what is raised of an archive that is damaged, and of one that is laid out in another way
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError)
UNKNOWN = (ValueError, LookupError, TypeError, struct.error)

Net = Union["SimplePoolNet", "SimpleConvNet"]

_exporting = threading.Lock()  # runs are published at once, and the second can do without torch


def export(arrays: dict[str, np.ndarray], pool: str, run_id: str, model: LoggedModel, path: Path) -> None:
    """Write the network of a logged model to a folder.

    The folder is new. `arrays` holds the weights by name and, as `example`, two images. With one image, the export
    would accept only one image at a time.

    Torch exports once for each network and each version of what makes it. Later calls replace the weights in a copy of
    that export and do not need torch.
    """
    with _exporting:
        if _unpack(pool, path):
            _fill(path, pool, arrays)
        else:
            _export_in_full(path, pool, arrays)
            with contextlib.suppress(*UNREADABLE, *UNKNOWN, MlflowException):  # then the next run does so too
                _keep(path, pool, arrays)
    saved = Model.load(str(path))
    saved.artifact_path, saved.run_id = model.artifact_location, run_id
    saved.model_uuid = saved.model_id = model.model_id
    saved.utc_time_created = str(datetime.datetime.now(datetime.UTC).replace(tzinfo=None))
    saved.model_size_bytes = sum(len(content) for name, content in _contents(path).items() if name != MLMODEL_FILE_NAME)
    # An exported program stays on the device that it was exported on; MLflow would take cuda wherever there is one.
    saved.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.MODEL_CONFIG] = {"device": "cpu"}
    saved.save(str(path / MLMODEL_FILE_NAME))


def write(folder: Path, pool: str, net: Net) -> None:
    """Write the export and the weights of a network.

    The export replaces the one that MLflow has made.
    """
    _export(net, folder / EXPORT)
    save_file({name: tensor.numpy() for name, tensor in net.state_dict().items()}, folder / WEIGHTS, {"pool": pool})


def fill(folder: Path, pool: str, weights: dict[str, np.ndarray]) -> None:
    """Replace the weights in a folder that `write` wrote.

    Raises `ValueError` if the weights belong to another network, or if the layout of the export is not the known one.
    """
    archive = (folder / EXPORT).read_bytes()
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        config = json.loads(members.read("model/data/weights/model_weights_config.json"))["config"]
    paths = {f"model/data/weights/{entry['path_name']}": name.removeprefix("net.") for name, entry in config.items()}
    if sorted(paths.values()) != sorted(weights):
        raise ValueError(f"found an export with weights {', '.join(paths.values())}")
    changed = {path: weights[name].astype("<f4").tobytes() for path, name in paths.items()}
    (folder / EXPORT).write_bytes(_with_members(archive, changed))
    save_file(weights, folder / WEIGHTS, {"pool": pool})


def _export_in_full(path: Path, pool: str, arrays: dict[str, np.ndarray]) -> None:
    import torch

    from poolnet.training.model import Checked, build_model

    net = build_model(pool, seed=0)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items() if name != "example"})
    mlflow.pytorch.save_model(
        Checked(net).eval(),
        str(path),
        signature=SIGNATURE,
        input_example=arrays["example"],
        serialization_format="pt2",
        pip_requirements=[f"{name}=={version.partition('+')[0]}" for name, version in VERSIONS.items()],  # else 10 s
    )
    write(path, pool, net)


def _fill(path: Path, pool: str, arrays: dict[str, np.ndarray]) -> None:
    """Put weights and example into a blank model's folder."""
    fill(path, pool, {name: array for name, array in arrays.items() if name != "example"})
    example = arrays["example"].tolist()
    (path / "input_example.json").write_text(json.dumps(example), encoding="utf-8")
    (path / "serving_input_example.json").write_text(json.dumps({"inputs": example}, indent=2), encoding="utf-8")


def _kept(pool: str) -> Path:
    """Return the path of a network's blank model.

    The file name has a checksum of everything that makes the blank model.
    """
    made_by = f"{VERSIONS} {sys.version}".encode()
    made_by += Path(__file__).read_bytes() + Path(__file__).parents[1].joinpath("training", "model.py").read_bytes()
    return home() / "exports" / f"{pool}-{zlib.crc32(made_by):08x}.zip"


def _unpack(pool: str, path: Path) -> bool:
    """Unpack the blank model to `path`.

    Returns whether that worked. If no blank model is kept, or if it is damaged, `path` does not exist afterwards.
    """
    try:
        with zipfile.ZipFile(_kept(pool)) as archive:  # which has a checksum of each file
            archive.getinfo(MLMODEL_FILE_NAME)  # of a file that is cut off, the archive in it would be read
            archive.extractall(path)
    except (*UNREADABLE, *UNKNOWN):
        shutil.rmtree(path, ignore_errors=True)
        return False
    return True


def _keep(full: Path, pool: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep a blank model for later exports.

    It is kept only if it equals the full model once it is filled.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "blank"
        _export_in_full(path, pool, {name: np.zeros_like(array) for name, array in arrays.items()})
        blank = _contents(path)
        _fill(path, pool, arrays)
        filled, expected = _contents(path), _contents(full)
        del filled[MLMODEL_FILE_NAME], expected[MLMODEL_FILE_NAME]  # which holds the time
        del filled[EXPORT], expected[EXPORT]
        if filled == expected and equal(full / EXPORT, path / EXPORT):
            with replacing(_kept(pool)) as part, zipfile.ZipFile(part, "w") as archive:
                for name, content in blank.items():
                    archive.writestr(name, content)


def _contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder, by path."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(folder: Path) -> tuple[str, Net]:
    """Read the pool and the network from a folder.

    The network is on the CPU. Raises `ValueError`, which says what is wrong.
    """
    if not (folder / WEIGHTS).exists():
        return _read_older(folder / EXPORT)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            pool, weights = (file.metadata() or {}).get("pool"), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"found no readable {WEIGHTS} ({error})") from None
    if pool not in POOLS:
        raise ValueError(f"found weights of pool {pool!r}, expected one of {', '.join(POOLS)}")
    return pool, _network(pool, weights)


def is_ours(folder: Path, net: Net) -> bool:
    """Whether torch makes this export from this network.

    The export is compared with one that the torch installed here makes now. Nothing of the export is executed. No kept
    export is trusted for the comparison: the person who put it there may also have made this export.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / Path(EXPORT).name  # a name that the archive repeats
        _export(net, path)
        return equal(path, folder / EXPORT)


def equal(export: Path, other: Path) -> bool:
    """Whether two exports differ only in their serial number.

    `export` is our own, so nothing in it needs a check.
    """
    archive = other.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            serial = members.read(SERIAL) if members.getinfo(SERIAL).file_size == 40 else b""
    except (*UNREADABLE, *UNKNOWN):
        return False
    return bool(re.fullmatch(rb"\d{40}", serial)) and _with_members(export.read_bytes(), {SERIAL: serial}) == archive


def _with_members(archive: bytes, changed: dict[str, bytes]) -> bytes:
    """Replace the bytes of some members of a zip archive.

    Each member must be as torch writes it (not compressed), and the new bytes must be as many as before. Otherwise this
    raises `ValueError`. The bytes are replaced in place, because torch reads members that are stored and aligned in its
    own way. The checksum of a member is stored up to three times (APPNOTE.TXT 4.3): in its local header or behind its
    data, and in the central directory.
    """
    data = bytearray(archive)
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        infos, at = members.infolist(), members.start_dir
    for info in infos:  # in the order of the central directory
        if info.filename in changed:
            content = changed[info.filename]
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            end = start + info.file_size
            if info.compress_type != zipfile.ZIP_STORED or len(content) != info.file_size:
                raise ValueError(f"found {info.filename} compressed, or of {info.file_size} bytes")
            data[start:end] = content
            places = [info.header_offset + 14, at + 16] + [end + 4] * (data[end : end + 4] == b"PK\x07\x08")
            for place in places:
                if struct.unpack_from("<I", data, place) == (info.CRC,):  # else it stands elsewhere
                    struct.pack_into("<I", data, place, zlib.crc32(content))
        at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    return bytes(data)


def _export(net: Net, path: Path) -> None:
    """Export a network for any batch size.

    This is done as MLflow does it, but without the metadata of the nodes.
    """
    import torch

    from poolnet.training.model import Checked

    images = torch.zeros(2, 1, SIDE, SIDE)  # of one, the export would take only one
    program = torch.export.export(Checked(net).eval(), (images,), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    torch.export.save(program, path)


def _network(pool: str, weights: Mapping[str, "torch.Tensor"]) -> Net:
    import torch

    from poolnet.training.model import build_model

    net = build_model(pool, seed=0)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != expected or any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError(f"found weights {shapes}, expected float32 {expected}")
    net.load_state_dict(weights)
    return net.eval()


# --- models of earlier versions, which hold the export alone ----------------------------------------------------------


def _read_older(path: Path) -> tuple[str, Net]:
    """Read the pool and the network from an export.

    The members of the export are read as text and bytes. Raises `ValueError`, which says what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
            if not stored or sum(info.file_size for info in infos) > path.stat().st_size:
                raise ValueError("found an export that is larger once it is unpacked")
            members = {info.filename.removeprefix("model/"): archive.read(info) for info in infos}
        pool = _pool(json.loads(members["models/model.json"]))
        config = json.loads(members["data/weights/model_weights_config.json"])["config"]
        weights = {name.removeprefix("net."): _weight(members, name, entry) for name, entry in config.items()}
    except UNREADABLE as error:
        raise ValueError(f"found no whole export ({error})") from None
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"found an export of another form ({type(error).__name__} {error})") from None
    return pool, _network(pool, weights)


def _pool(program: dict) -> str:
    """Recognise the pool of an exported program by its operations."""
    nodes = program["graph_module"]["graph"]["nodes"]
    operations = [node["target"].removeprefix("torch.ops.aten.") for node in nodes]
    if operations[: len(CHECK)] == CHECK:
        operations = operations[len(CHECK) :]
    inputs = [each for node in nodes for each in node["inputs"] if each["name"] == "kernel_size"]
    halves = all(each["arg"]["as_ints"] == [2, 2] for each in inputs)  # `stride` is a max of one pixel
    for pool, layer in LAYERS.items():
        if halves and operations == [
            layer,
            "relu.default",
            layer,
            "relu.default",
            "flatten.using_ints",
            "linear.default",
        ]:
            return pool
    raise ValueError(f"found a network that is none of {', '.join(LAYERS)}: {'; '.join(operations)[:200]}")


def _weight(members: dict[str, bytes], name: str, entry: dict) -> "torch.Tensor":
    import torch

    meta, data = entry["tensor_meta"], members[f"data/weights/{entry['path_name']}"]
    shape, strides = (tuple(int(size["as_int"]) for size in meta[key]) for key in ("sizes", "strides"))
    plain = strides == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if entry["use_pickle"] or meta["dtype"] != FLOAT32 or not plain or meta["storage_offset"]["as_int"]:
        raise ValueError(f"found {name} of another type than float32, stored plainly")
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f"found {len(data):,} bytes of {name}, expected {4 * math.prod(shape):,}")
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).astype(np.float32))
