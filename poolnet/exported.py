"""A model's folder: the weights, which poolnet reads, and the export, which MLflow serves.

Torch executes more of an export than its pickles (shape guards, for one), so poolnet never loads one. It reads
`weights.safetensors`, which names the pool too. Two exports of one network by one torch are equal byte for byte once
the nodes' metadata are gone: stack traces, with the folders of whoever trained. So an export that differs is not ours.
"""

import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from poolnet.config import POOLS
from poolnet.model import Checked, SimpleConvNet, SimplePoolNet, build_model

EXPORT, WEIGHTS = "data/model.pt2", "data/weights.safetensors"
FLOAT32 = 7  # in the numbering of types in an export
LAYERS = {"max": "max_pool2d.default", "avg": "avg_pool2d.default", "conv": "conv2d.default"}
CHECK = ["abs.default", "le.Scalar", "all.default", "_assert_async.msg"]  # the operations of `Checked`

Net = SimplePoolNet | SimpleConvNet


def write(folder: Path, pool: str, net: Net) -> None:
    """Write export and weights, instead of the export that MLflow has made."""
    _export(net, folder / EXPORT)
    save_file(net.state_dict(), folder / WEIGHTS, {"pool": pool})


def read(folder: Path) -> tuple[str, Net]:
    """The pool and the network, on the CPU. `ValueError` says what is wrong."""
    if not (folder / WEIGHTS).exists():
        return _read_older(folder / EXPORT)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            pool, weights = (file.metadata() or {}).get("pool"), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"found no readable {WEIGHTS} ({error})") from None
    return pool, _network(pool, weights)


def is_ours(folder: Path, net: Net) -> bool:
    """Whether the export is the one that this torch makes of this network. Nothing of it is executed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / Path(EXPORT).name  # a name that the archive repeats
        _export(net, path)
        return path.read_bytes() == (folder / EXPORT).read_bytes()


def _export(net: Net, path: Path) -> None:
    """Export for any batch size, as MLflow does, without the nodes' metadata."""
    images = torch.zeros(2, 1, 28, 28)  # of one, the export would take only one
    program = torch.export.export(Checked(net).eval(), (images,), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    torch.export.save(program, path)


def _network(pool: str | None, weights: Mapping[str, torch.Tensor]) -> Net:
    if pool not in POOLS:
        raise ValueError(f"found weights of pool {pool!r}, expected one of {', '.join(POOLS)}")
    net = build_model(pool, seed=0)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected or any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError(f"found weights {found}, expected float32 {expected}")
    net.load_state_dict(weights)
    return net.eval()


# --- models of earlier versions, which hold the export alone ----------------------------------------------------------


def _read_older(path: Path) -> tuple[str, Net]:
    """The same from the export's members, read as text and bytes."""
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
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"found no whole export ({error})") from None
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"found an export of another form ({type(error).__name__} {error})") from None
    return pool, _network(pool, weights)


def _pool(program: dict) -> str:
    """The pool of a program by its operations."""
    nodes = program["graph_module"]["graph"]["nodes"]
    found = [node["target"].removeprefix("torch.ops.aten.") for node in nodes]
    found = found[len(CHECK) :] if found[: len(CHECK)] == CHECK else found
    for pool, layer in LAYERS.items():
        if found == [layer, "relu.default", layer, "relu.default", "flatten.using_ints", "linear.default"]:
            return pool
    raise ValueError(f"found a network that is none of {', '.join(LAYERS)}: {'; '.join(found)[:200]}")


def _weight(members: dict[str, bytes], name: str, entry: dict) -> torch.Tensor:
    meta, data = entry["tensor_meta"], members[f"data/weights/{entry['path_name']}"]
    shape, strides = (tuple(int(size["as_int"]) for size in meta[key]) for key in ("sizes", "strides"))
    plain = strides == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if entry["use_pickle"] or meta["dtype"] != FLOAT32 or not plain or meta["storage_offset"]["as_int"]:
        raise ValueError(f"found {name} of another type than float32, stored plainly")
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f"found {len(data):,} bytes of {name}, expected {4 * math.prod(shape):,}")
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).astype(np.float32))
