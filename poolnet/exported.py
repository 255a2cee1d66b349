"""An exported network (`.pt2`) read as data: which of poolnet's networks it is, and its weights.

Nothing of the file is run: operations are compared with the known ones, and weights are bytes. Torch's own loader, by
which MLflow serves models, unpickles parts of an archive, and evaluates text of it as Python (shape guards and
expressions), which MLflow's check for pickles does not see. So an archive is refused that holds anything else than an
export of these networks does, or that torch's reader of zips could read otherwise than Python's. The layout is that of
PyTorch's PT2 archives, version 0.
"""

import io
import json
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from poolnet.data import FLOAT_LIMIT
from poolnet.model import PIXELS, SimpleConvNet, SimplePoolNet, build_model

BROKEN = (struct.error, zlib.error, zipfile.BadZipFile)  # what readers say of damaged bytes
LIMIT = 4 << 20  # bytes of an archive; the largest of these networks has 150 kB
MEMBERS = re.compile(  # below the root of an archive
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json|"
    r"models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|version|"
    r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
SAVED = re.compile(  # the same of the example inputs, which torch.save wrote
    r"data\.pkl|data/\d+|byteorder|version|\.data/serialization_id|\.format_version|\.storage_alignment"
)
TEXT = re.compile(r'[\w.+:,"\[\]{} ]*|Symbol\(\'s\d+\', positive=True, integer=True\)')  # nothing that calls
# What a pickle can call anything by, and what that of a tensor does so.
IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}
TENSOR = {
    f"GLOBAL {name}" for name in ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict")
}
METADATA = {"stack_trace", "nn_module_stack", "torch_fn"}  # of a node; what torch only keeps
FLOAT32 = 7  # in the archive's numbering of types
CHECK = (  # that of `model.Checked`
    "abs.default(self=x)",
    f"le.Scalar(self=%, other={FLOAT_LIMIT})",
    "all.default(self=%)",
    f"_assert_async.msg(self=%, assert_msg={PIXELS})",
)
TAIL = (
    "relu.default(self=%)",
    "flatten.using_ints(self=%, start_dim=1)",
    "linear.default(input=%, weight=fc.weight, bias=fc.bias)",
)
# Each network as its operations in order: x are the images, % is what the operation before gave.
OPERATIONS = {
    **{
        pool: (
            f"{pool}_pool2d.default(self=x, kernel_size=[2, 2], stride=[2, 2])",
            "relu.default(self=%)",
            f"{pool}_pool2d.default(self=%, kernel_size=[2, 2], stride=[2, 2])",
            *TAIL,
        )
        for pool in ("max", "avg")
    },
    "conv": (
        "conv2d.default(input=x, weight=layer1.weight, bias=layer1.bias, stride=[2, 2], padding=[1, 1])",
        "relu.default(self=%)",
        "conv2d.default(input=%, weight=layer2.weight, bias=layer2.bias, stride=[2, 2], padding=[1, 1])",
        *TAIL,
    ),
}


def read(path: Path) -> tuple[str, SimplePoolNet | SimpleConvNet]:
    """The name of the network as in `--pool`, and the network itself, on the CPU. `ValueError` says what is wrong."""
    try:
        with path.open("rb") as file:
            return _read(_members(file.read(LIMIT + 1), MEMBERS))
    except (OSError, EOFError, RuntimeError, MemoryError, *BROKEN) as error:
        raise ValueError(f"found no whole archive ({error})") from None
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"found a program of another form ({type(error).__name__} {error})") from None


def _read(members: dict[str, bytes]) -> tuple[str, SimplePoolNet | SimpleConvNet]:
    program = json.loads(members["models/model.json"])
    config = json.loads(members["data/weights/model_weights_config.json"])["config"]
    _check_inert(members, program)
    prefix = "net." if "net.fc.weight" in config else ""  # of a network in `model.Checked`
    operations = tuple(_operations(program["graph_module"], prefix))
    plain = operations[len(CHECK) :] if operations[: len(CHECK)] == CHECK else operations
    pool = next((pool for pool, known in OPERATIONS.items() if known == plain), None)
    if not pool:
        raise ValueError(f"found a network that is none of {', '.join(OPERATIONS)}: {'; '.join(plain)[:200]}")
    net = build_model(pool, seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    named = {f"data/weights/{entry['path_name']}" for entry in config.values()}
    held = {name for name in members if name.startswith("data/weights/weight_")}
    if set(config) != {prefix + name for name in shapes} or named != held or len(named) != len(config):
        raise ValueError(f"found weights {', '.join(config)}, expected {', '.join(shapes)}, each once")
    weights = {name: _weight(members, name, config[prefix + name], shape) for name, shape in shapes.items()}
    net.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return pool, net.eval()


# --- the archive ------------------------------------------------------------------------------------------------------


def _members(data: bytes, allowed: re.Pattern) -> dict[str, bytes]:
    """The members of a zip by their names below its one root, if each is stored as it is and may be there."""
    if len(data) > LIMIT:
        raise ValueError(f"found more than {LIMIT:,} bytes")
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if len({info.filename.partition("/")[0] for info in infos}) != 1:
            raise ValueError("found an archive of several roots, expected one")
        found: dict[str, bytes] = {}
        for info in infos:
            name = info.filename.partition("/")[2]
            plain = info.compress_type == zipfile.ZIP_STORED and info.orig_filename == info.filename
            if not (plain and allowed.fullmatch(name)) or name in found:
                raise ValueError(f"found {info.filename} in the archive, which no export of these networks holds so")
            found[name] = archive.read(info)
        return found


def _check_directory(data: bytes) -> None:
    """Refuse a zip whose directory two readers might find in two places: it must end where its end records begin."""
    end, places = len(data) - 22, None
    if data[:4] == b"PK\3\4" and data[end : end + 4] == b"PK\5\6":
        _, _, _, count, size, offset, comment = struct.unpack("<4H2LH", data[end + 4 :])
        places = (count, size, offset) if not comment else None
    if places and data[end - 20 : end - 16] == b"PK\6\7":  # the records for large archives, which torch always writes
        _, start, _ = struct.unpack("<LQL", data[end - 16 : end])
        *_, count, size, offset = struct.unpack("<Q2H2L4Q", data[start + 4 : start + 56])
        same = all(
            small in (wide, limit)
            for small, wide, limit in zip(places, (count, size, offset), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True)
        )
        places = (count, size, offset) if same and start == end - 76 and data[start : start + 4] == b"PK\6\6" else None
        end = start
    if not places or places[1] + places[2] != end:
        raise ValueError("found no whole archive, or one that two readers may read in two ways")


def _check_inert(members: dict[str, bytes], program: dict) -> None:
    """Refuse what torch's own loader would execute."""
    if program.get("guards_code") or json.loads(members["data/constants/model_constants_config.json"])["config"]:
        raise ValueError("found shape guards or constants, which no export of these networks holds")
    for text in _texts(program):
        if not TEXT.fullmatch(text) or "__" in text:
            raise ValueError(f"found {text[:60]!r} in the program, which torch may execute")
    example = _members(members["data/sample_inputs/model.pt"], SAVED)
    opcodes = pickletools.genops(example["data.pkl"])
    imported = {f"{opcode.name} {argument}" for opcode, argument, _ in opcodes if opcode.name in IMPORTS}
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


# --- the network ------------------------------------------------------------------------------------------------------


def _operations(module: dict, prefix: str) -> Iterator[str]:
    """Each node of the graph as text: the operation with its arguments; weights without their prefix."""
    graph, names = module["graph"], {}
    for spec in module["signature"]["input_specs"]:
        if parameter := spec.get("parameter"):
            name = parameter["parameter_name"]
            names[parameter["arg"]["name"]] = name.removeprefix(prefix) if name.startswith(prefix) else f"other {name}"
        else:
            names[spec["user_input"]["arg"]["as_tensor"]["name"]] = "x"
    for node in graph["nodes"]:
        arguments = ", ".join(f"{item['name']}={_argument(item['arg'], names)}" for item in node["inputs"])
        yield f"{node['target'].removeprefix('torch.ops.aten.')}({arguments})"
        names = {name: known for name, known in names.items() if known != "%"}
        names |= {output["as_tensor"]["name"]: "%" for output in node["outputs"]}
    if [names.get(output["as_tensor"]["name"]) for output in graph["outputs"]] != ["%"]:
        raise ValueError("found a program that gives something else than its last operation")


def _argument(argument: dict, names: dict[str, str]) -> str:
    ((kind, value),) = argument.items()
    return str(names.get(value["name"])) if kind == "as_tensor" else str(value)


def _weight(members: dict[str, bytes], name: str, entry: dict, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, (shape) float32, from its bytes."""
    meta, strides = entry["tensor_meta"], [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found = [[size["as_int"] for size in meta[key]] for key in ("sizes", "strides")]
    if entry["use_pickle"] or meta["dtype"] != FLOAT32 or found != [list(shape), strides]:
        raise ValueError(f"found {name} of another type or shape than {shape} float32, stored plainly")
    size = 4 * math.prod(shape)
    data = members[f"data/weights/{entry['path_name']}"]
    if len(data) != size or meta["storage_offset"]["as_int"]:
        raise ValueError(f"found {len(data):,} bytes of {name}, expected {size:,}")
    return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
