"""Look at this machine for `poolnet doctor`."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from poolnet import files
from poolnet.errors import InputError, RunError
from poolnet.files import home_path
from poolnet.text import pasted
from poolnet.tracking import addresses
from poolnet.training import device as devices
from poolnet.upkeep.visit import Problem, Visit

ROOM = 200_000_000  # bytes, of which a data set takes the most
PROBE_BYTES = 1_000_000  # of a file that is really written: quotas and limits are not seen otherwise
SECONDS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": (1, 3600), "PGCONNECT_TIMEOUT": (1, 3600)}
SETTINGS = {**SECONDS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": (0, 10)}
BUSY_SECONDS = 1  # that a lock may be held by work of the usual length
LASTING = ("team.lock",)  # of `poolnet team up`, which holds it as long as it runs
NO_HOME = "there is no {} yet; the first run makes it"


def address(visit: Visit) -> str:
    blocks = "the address is wrong"
    try:
        visit.uri = addresses.own()
        path = addresses.sqlite_file(visit.uri)
        if not path or path.parent.exists():  # or the check would make the folder
            addresses.check(visit.uri)
    except InputError as error:
        raise Problem(str(error), "correct it", blocks) from None
    scheme = visit.uri.partition(":")[0].partition("+")[0].lower()
    if scheme not in ("http", "https", "sqlite", *addresses.DATABASES):
        visit.blocked = f"poolnet doctor asks servers and databases, not {scheme}"
    return visit.shown


def time_outs(visit: Visit) -> str:
    for name, (low, high) in SETTINGS.items():
        value = os.environ.get(name, "").strip()
        if value and not (re.fullmatch(r"\d{1,6}", value) and low <= int(value) <= high):
            found = f"{name}: found {value!r}, expected a whole number from {low} to {high}"
            raise Problem(found, "unset it, or correct it", f"{name} is wrong")
    return f"{visit.timeout:g} s for a server that is silent"


def locks(visit: Visit) -> str:
    """Find the locks that are held although nothing goes on."""
    if not home_path().exists():
        return NO_HOME.format(home_path())
    deadline = time.monotonic() + BUSY_SECONDS
    while stuck := {path: who for path, who in _held(visit).items() if not _goes_on(path)}:
        if time.monotonic() > deadline:
            found = "; ".join(f"{path}: held by {who}" for path, who in stuck.items())
            raise Problem(found, "wait for it, or end that process")
        time.sleep(0.1)
    return (
        "; ".join(f"{path.parent.name}/{path.name}: {who} is at work" for path, who in _held(visit).items())
        or "none held"
    )


def _held(visit: Visit) -> dict[Path, str]:
    """Return the locks that are held now, and by whom."""
    home = home_path()
    holders = [holder for place in ("", "data/", "sweeps/", "runs/*/") for holder in home.glob(f"{place}*.holder")]
    if store := addresses.sqlite_file(visit.uri):
        holders += store.parent.glob(f"{store.name}.*.holder")
    locks = [holder.with_suffix("") for holder in holders if holder.stem != "look"]  # which is held for moments
    return {path: who for path in locks if (who := _holder(path))}


def _holder(path: Path) -> str:
    if path.name != "lock":
        return files.holder_of(path)
    with files.locked(path.with_name("look"), poll=0.001):  # or this would seem to train the run, for a moment
        return files.holder_of(path)


def _goes_on(path: Path) -> bool:
    """Whether something was written since a lock was taken."""
    folder = path.parent
    if path.name in LASTING:
        return True
    if folder.parent.name == "runs":
        written = [each for each in folder.iterdir() if each.suffix != ".holder" and "lock" not in each.name]
    elif folder.name == "sweeps":
        written = [*folder.parent.glob("runs/*/metrics.jsonl")]
    else:
        return False
    return _newest(written) > _newest([path.with_name(f"{path.name}.holder")])


def _newest(paths: Iterable[Path]) -> float:
    times = [0.0]
    for path in paths:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def disk(visit: Visit) -> str:
    """Write to each folder that a command writes to."""
    folders = [home_path(), Path(tempfile.gettempdir()), *visit.folders]
    if store := addresses.sqlite_file(visit.uri):
        folders.append(store.parent)
    there = dict.fromkeys(next(each for each in (folder, *folder.parents) if each.exists()) for folder in folders)
    free = {folder: _room(folder) for folder in there}
    return ", ".join(f"{bytes_ / 1e9:,.1f} GB in {folder}" for folder, bytes_ in free.items())


def _room(folder: Path) -> int:
    cure = "make room there (poolnet clean lists what nobody needs), or set POOLNET_HOME and TMPDIR elsewhere"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise Problem(f"{folder}: takes no file of {PROBE_BYTES:,} bytes ({error.strerror or error})", cure) from None
    if free < ROOM:
        raise Problem(f"{folder}: has {free / 1e6:,.0f} MB left, expected {ROOM / 1e6:,.0f} at least", cure)
    return free


def data_sets(visit: Visit) -> str:
    """Open the prepared data sets, without their pixels."""
    from poolnet.data import npz
    from poolnet.data.dataset import SPLITS

    known = sorted(home_path().glob("data/*.npz"))
    for path in known:
        try:
            with npz.opened(path) as archive:
                for split in SPLITS:
                    npz.member(archive, path, f"X_{split}")
                    npz.member(archive, path, f"y_{split}")
        except (InputError, RunError) as error:
            remove = "" if path.stem.startswith("glyphs") else f"; then: {pasted('poolnet', 'prepare', '--help')}"
            raise Problem(str(error), f"remove that file{remove}") from None
    return ", ".join(path.stem for path in known) or "none prepared; --data glyphs is rendered when it is needed"


def device(visit: Visit) -> str:
    found = devices.resolve_device("auto")
    gpus = _gpus() if found == "cpu" else []
    if gpus:
        cure = "install the torch for its CUDA: https://pytorch.org/get-started; or go on with --device cpu"
        raise Problem(f"torch does not use {gpus[0]}", cure)
    return found


def _gpus() -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver finds."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
