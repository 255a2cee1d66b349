"""Find and decode pictures in files and folders."""

import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from poolnet.errors import InputError
from poolnet.files import regular, walk

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # and no other of Pillow's: EPS would start Ghostscript
SUFFIXES = (".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WORK = 512  # pixels of the longer side that a larger image is reduced to
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow says of broken files
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def find(paths: Iterable[Path]) -> list[Path]:
    """Find the image files that the paths stand for.

    For a folder, that is the images below it, which are known by their suffix. Raises `InputError` if there are none.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [file for file in walk(path) if file.suffix.lower() in SUFFIXES]
            if not below:
                raise InputError(f"{path}: found no image in this folder, expected files {' '.join(SUFFIXES)}")
            images += below
        elif path.is_file():
            images.append(path)
        else:
            what = "no regular file" if path.exists() else "no such file or folder"
            raise InputError(f"{path}: {what}, expected an image or a folder of images")
    return images


def pixels(path: Path) -> np.ndarray:
    """Decode the first picture of a file, upright.

    It is at most `WORK` wide and high. The result is uint8 (height, width, 1) if it is grey, else (height, width, 3).
    Raises `InputError`.
    """
    expected = f"a {', '.join(FORMATS)} image"
    regular(path, expected)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; pixels that cannot be read are errors
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels
            with Image.open(path, formats=FORMATS) as image:
                return _decoded(image)
    except BOMBS:
        content = f"an image of more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except UnidentifiedImageError:
        content = "something else" if path.stat().st_size else "an empty file"
    except BROKEN as error:
        if reason := getattr(error, "strerror", None):  # not of what is in the file
            raise InputError(f"{path}: cannot be read ({reason}), expected {expected}") from None
        content = " ".join(f"a damaged file ({error})".split())
    raise InputError(f"{path}: found {content}, expected {expected}")


def _decoded(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError("no pixels")
    image.draft(image.mode, (WORK, WORK))  # JPEG only: decodes a large photo at a half to an eighth of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, 32 bits, floating point
        image = _eight_bits(image)
    if image.mode in ("L", "RGB", "RGBA", "CMYK"):  # before anything is converted, which takes memory
        image.thumbnail((WORK, WORK))
    if image.mode != "L" or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((WORK, WORK))
    if image.mode == "L":
        return np.asarray(image)[:, :, None]
    colours = opaque(np.asarray(image, np.float32)) if image.mode == "RGBA" else np.asarray(image)
    return colours[:, :, :1] if (colours == colours[:, :, :1]).all() else colours


def _eight_bits(image: Image.Image) -> Image.Image:
    """Stretch grey pixels of any range to 0..255."""
    step = max(1, max(image.size) // (2 * WORK))  # fewer pixels, before they become floats
    grey = np.nan_to_num(np.asarray(image)[::step, ::step].astype(np.float32))
    low, high = float(grey.min()), float(grey.max())
    return Image.fromarray(np.rint((grey - low) * (255 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8))


def opaque(rgba: np.ndarray) -> np.ndarray:
    """Lay a transparent picture on a white or black ground.

    The ground is white if the visible part is dark, else black. Float (height, width, 4) in 0..255 becomes uint8
    (height, width, 3).
    """
    colours, alpha = rgba[:, :, :3], rgba[:, :, 3:] / 255
    seen = alpha.sum()
    ground = 255 if seen and (colours * alpha).sum() < 3 * 128 * seen else 0
    return np.rint(colours * alpha + ground * (1 - alpha)).astype(np.uint8)
