"""An exported network (`.pt2`) read as data: which of poolnet's networks it is, and its weights.

Nothing of the file is run: operations are compared with the known ones, and weights are bytes. Torch's own loader, by
which models are served, unpickles the example inputs, and evaluates text of the archive as Python (shape guards and
expressions), which MLflow's check for pickles does not see. An archive that holds more of either than an export of
these networks does is refused, so that what is promoted is safe to serve. The layout is that of PyTorch's PT2 archives,
version 0.
"""

import io
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from poolnet.data import FLOAT_LIMIT
from poolnet.model import PIXELS, SimpleConvNet, SimplePoolNet, build_model

GRAPH_LIMIT = 1 << 20  # bytes; those of poolnet's networks have 10 kB
MEMBERS = re.compile(  # of an archive, below its root
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json|"
    r"models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|version|"
    r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
TEXT = re.compile(r'[\w.+:,"\[\]{} ]*|Symbol\(\'s\d+\', positive=True, integer=True\)')  # nothing that calls
# What a pickle can call anything by, and what that of a tensor does so.
IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}
TENSOR = {
    f"GLOBAL {name}" for name in ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict")
}
METADATA = {"stack_trace", "nn_module_stack", "torch_fn"}  # of a node; what torch only keeps
FLOAT32 = 7  # in the archive's numbering of types
CHECK = ("abs(x)", f"le(%, {FLOAT_LIMIT})", "all(%)", f"_assert_async(%, {PIXELS})")  # that of `model.Checked`
TAIL = ("relu(%)", "flatten(%, 1)", "linear(%, fc.weight, fc.bias)")
# Each network as its operations in order: x are the images, % is what the operation before gave.
OPERATIONS = {
    **{
        pool: (f"{pool}_pool2d(x, [2, 2], [2, 2])", "relu(%)", f"{pool}_pool2d(%, [2, 2], [2, 2])", *TAIL)
        for pool in ("max", "avg")
    },
    "conv": (
        "conv2d(x, layer1.weight, layer1.bias, [2, 2], [1, 1])",
        "relu(%)",
        "conv2d(%, layer2.weight, layer2.bias, [2, 2], [1, 1])",
        *TAIL,
    ),
}


def read(path: Path) -> tuple[str, SimplePoolNet | SimpleConvNet]:
    """The name of the network as in `--pool`, and the network itself, on the CPU. `ValueError` says what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except (OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"found no whole archive ({error})") from None
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"found a program of another form ({type(error).__name__} {error})") from None


def _read(archive: zipfile.ZipFile) -> tuple[str, SimplePoolNet | SimpleConvNet]:
    roots = [name.partition("/")[0] for name in archive.namelist() if re.fullmatch(r"\w+/models/model\.json", name)]
    if len(roots) != 1:
        raise ValueError(f"found {len(roots)} programs in the archive, expected one")
    root = roots[0]
    program = _json(archive, f"{root}/models/model.json")
    _check_inert(archive, root, program)
    operations = tuple(_operations(program["graph_module"]))
    plain = operations[len(CHECK) :] if operations[: len(CHECK)] == CHECK else operations
    pool = next((pool for pool, known in OPERATIONS.items() if known == plain), None)
    if not pool:
        raise ValueError(f"found a network that is none of {', '.join(OPERATIONS)}: {'; '.join(plain)[:200]}")
    config = _json(archive, f"{root}/data/weights/model_weights_config.json")["config"]
    config = {name.removeprefix("net."): entry for name, entry in config.items()}
    net = build_model(pool, seed=0)
    weights = {}
    for name, tensor in net.state_dict().items():
        weights[name] = torch.from_numpy(_weight(archive, root, name, config[name], tuple(tensor.shape)))
    net.load_state_dict(weights)
    return pool, net.eval()


def _check_inert(archive: zipfile.ZipFile, root: str, program: dict) -> None:
    """Refuse what torch's own loader would execute."""
    names = archive.namelist()
    for name in names:
        if not MEMBERS.fullmatch(name.removeprefix(f"{root}/")):
            raise ValueError(f"found {name} in the archive, which no export of these networks holds")
        if names.count(name) > 1:  # of which torch may read the other one
            raise ValueError(f"found {name} twice in the archive")
    if program.get("guards_code") or _json(archive, f"{root}/data/constants/model_constants_config.json")["config"]:
        raise ValueError("found shape guards or constants, which no export of these networks holds")
    for text in _texts(program):
        if not TEXT.fullmatch(text) or "__" in text:
            raise ValueError(f"found {text[:60]!r} in the program, which torch may execute")
    example = _bytes(archive, f"{root}/data/sample_inputs/model.pt", GRAPH_LIMIT)
    with zipfile.ZipFile(io.BytesIO(example)) as saved:
        (name,) = [name for name in saved.namelist() if name.endswith("data.pkl")]
        imported = {
            f"{opcode.name} {argument}"
            for opcode, argument, _ in pickletools.genops(_bytes(saved, name, GRAPH_LIMIT))
            if opcode.name in IMPORTS
        }
    if not imported <= TENSOR:
        raise ValueError(f"found {min(imported - TENSOR)} in the pickle of its example inputs, which are to be tensors")


def _texts(node: object) -> Iterator[str]:
    """Every name and text of a program, but for the metadata that torch only keeps."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            if key != "metadata" or not value.keys() <= METADATA:
                yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


def _json(archive: zipfile.ZipFile, name: str) -> dict:
    return json.loads(_bytes(archive, name, GRAPH_LIMIT))


def _bytes(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member, unless unpacking it would give more than it may have."""
    if archive.getinfo(name).file_size > limit:
        raise ValueError(f"found {archive.getinfo(name).file_size:,} bytes in {name}, expected at most {limit:,}")
    return archive.read(name)


def _operations(module: dict) -> Iterator[str]:
    """Each node of the graph as text: the operation with its arguments."""
    graph, names = module["graph"], {}
    for spec in module["signature"]["input_specs"]:
        if parameter := spec.get("parameter"):
            names[parameter["arg"]["name"]] = parameter["parameter_name"].removeprefix("net.")
        else:
            names[spec["user_input"]["arg"]["as_tensor"]["name"]] = "x"
    for node in graph["nodes"]:
        arguments = ", ".join(_argument(item["arg"], names) for item in node["inputs"])
        yield f"{node['target'].removeprefix('torch.ops.aten.').partition('.')[0]}({arguments})"
        names = {name: known for name, known in names.items() if known != "%"}
        names |= {output["as_tensor"]["name"]: "%" for output in node["outputs"]}
    if [names.get(output["as_tensor"]["name"]) for output in graph["outputs"]] != ["%"]:
        raise ValueError("found a program that gives something else than its last operation")


def _argument(argument: dict, names: dict[str, str]) -> str:
    ((kind, value),) = argument.items()
    return str(names.get(value["name"])) if kind == "as_tensor" else str(value)


def _weight(archive: zipfile.ZipFile, root: str, name: str, entry: dict, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, (shape) float32, from its bytes."""
    meta, strides = entry["tensor_meta"], [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found = [[size["as_int"] for size in meta[key]] for key in ("sizes", "strides")]
    if entry["use_pickle"] or meta["dtype"] != FLOAT32 or found != [list(shape), strides]:
        raise ValueError(f"found {name} of another type or shape than {shape} float32, stored plainly")
    size = 4 * math.prod(shape)
    data = _bytes(archive, f"{root}/data/weights/{entry['path_name']}", size)
    if len(data) != size or meta["storage_offset"]["as_int"]:
        raise ValueError(f"found {len(data):,} bytes of {name}, expected {size:,}")
    return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
