"""Download notMNIST's tarballs, and keep them."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from poolnet.errors import InputError
from poolnet.files import home, replacing
from poolnet.text import progress

MIRRORS = ("http://yaroslavvb.com/upload/notMNIST/", "https://commondatastorage.googleapis.com/books1000/")
SIZES = {"notMNIST_large.tar.gz": 247_336_696, "notMNIST_small.tar.gz": 8_458_043}  # bytes


def download(name: str, mirrors: tuple[str, ...] = MIRRORS, sizes: dict[str, int] = SIZES) -> Path:
    """Return the tarball `name`, downloaded if it is missing.

    It is kept in the local state. If the first mirror fails, the next one is used. Raises `InputError` if all fail.
    """
    target = home() / "downloads" / name
    if target.exists() and target.stat().st_size == sizes[name]:
        return target
    failures = []
    for mirror in mirrors:
        try:
            _fetch(mirror + name, target, sizes[name])
            return target
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{mirror} ({getattr(error, 'reason', error)})")
    option = "large" if "large" in name else "small"
    raise InputError(
        f"{name}: could not be downloaded from {' or '.join(failures)}; get it on a machine with a network and "
        f"pass it with --{option}"
    )


def _fetch(url: str, target: Path, size: int) -> None:
    """Download `url` to `target`; raise `ValueError` for a wrong size."""
    with urllib.request.urlopen(url, timeout=30) as response, replacing(target) as part:
        with part.open("wb") as file, progress(length=size, label=f"Downloading {target.name}") as bar:
            while file.tell() <= size and (data := response.read(1 << 16)):
                file.write(data)
                bar.update(len(data))
        if part.stat().st_size != size:
            raise ValueError(f"found {part.stat().st_size:,} bytes, expected {size:,}")
