import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poolnet.errors import InputError
from poolnet.training.device import resolve_device

PRINT_DEVICE = """
import sys
from poolnet.training.device import resolve_device
print(resolve_device(sys.argv[1]), "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:0", "cuda:-1"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name):
    with pytest.raises(InputError, match=f"device: found '{name}', expected .*auto.*cpu"):
        resolve_device(name)


def test_auto_takes_a_device_that_is_here():
    assert resolve_device("cpu") == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto") == expected


def printed_device(name: str, path: str = "") -> str:
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    finished = subprocess.run(
        [sys.executable, "-c", PRINT_DEVICE, name], env=environment, capture_output=True, text=True
    )
    return (finished.stdout or finished.stderr).strip().splitlines()[-1]


def test_torch_is_imported_only_where_it_may_know_another_device():
    needed = bool(torch.version.cuda or torch.version.hip or sys.platform == "darwin")
    assert printed_device("auto") == f"{resolve_device('auto')} {needed}"
    assert printed_device("cpu") == "cpu False"


@pytest.mark.parametrize(
    "version",
    ["cuda = '12.6'\nhip = None", "cuda = None\nhip = '6.2'", "__version__ = '9.0'", None],
    ids=["cuda", "rocm", "of another form", "no file"],
)
def test_torch_is_asked_unless_it_says_that_it_has_no_gpu(tmp_path, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('asked')")
    if version is not None:
        (tmp_path / "torch" / "version.py").write_text(version)
    root = Path(__file__).parents[2]
    assert printed_device("auto", f"{tmp_path}{os.pathsep}{root}") == "ImportError: asked"
