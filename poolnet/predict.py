"""Which letter is on an image: any readable image, made into what the models were trained on.

Models know letters as notMNIST has them: 28x28, bright on black, filling the frame. An image of that form reaches the
model as it is; in any other the letter is found by its contrast with the ground, cropped, and stretched to the frame.
What was measured for this is said where it is used: of the 18,230 real letters of the small notMNIST, or of 2,400
images of letters in 20 other fonts, drawn as `benchmarks/unseen_fonts.py` does.
"""

import csv
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from poolnet.config import InputError, aligned, printable
from poolnet.data import LETTERS, SIDE, as_images
from poolnet.evaluate import threads

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # and no other of Pillow's: EPS would start Ghostscript
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}  # of the files taken from a folder
WORK = 512  # pixels of the longer side that a larger image is reduced to
BATCH = 256  # images given to the model at once
FAINTEST = 16  # of 255: a contrast that JPEG noise on a blank image does not reach
EDGE = 0.5  # of the contrast: what counts as letter when it is cropped. At 0.2 JPEG noise is: 41 more of 2,400 wrong
BLACK, WHITE = 0.1, 0.9  # of the contrast: what becomes 0 and 255, so that noise beside the letter is gone
STRETCH = 0.65  # exponent by which the shorter side is brought up to the longer, see `_framed`
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow says of broken files
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Prediction:
    """The letter on one image and the next likely one; `inverted` if the image was dark on bright."""

    path: Path
    letter: str
    probability: float
    runner_up: str
    runner_up_probability: float
    inverted: bool


def find(paths: Iterable[Path]) -> list[Path]:
    """Files as named; in place of a folder the images below it, by suffix, sorted. `InputError` where there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not images:
                raise InputError(f"{path}: found no image in this folder, expected files {' '.join(sorted(SUFFIXES))}")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            found_what = "no regular file" if path.exists() else "no such file or folder"
            raise InputError(f"{path}: {found_what}, expected an image or a folder of images")
    return found


def read(path: Path, invert: bool | None = None) -> tuple[np.ndarray, bool]:
    """The letter as notMNIST would have it, uint8 (28, 28), and whether the image was dark on bright and turned round.

    `invert` says so where it is known. Raises `InputError` for what is not an image, or blank.
    """
    rgb = _pixels(path)
    own_form = rgb.shape == (SIDE, SIDE, 3) and (rgb == rgb[:, :, :1]).all()
    if (rgb == rgb[0, 0]).all() and not (own_form and rgb.min() >= 128):  # 254 of notMNIST's I are a white square
        raise InputError(f"{path}: found a blank image, all of one colour, expected a letter")
    if own_form:
        return _kept(rgb[:, :, 0], invert)
    ink, dark = _ink(rgb, path)
    if invert is not None and invert != dark:
        ink, dark = 1 - ink, invert
    return _framed(ink), dark


def _refuse(error: InputError) -> NoReturn:
    raise error


def predict(
    model: Callable[[torch.Tensor], torch.Tensor],
    paths: Iterable[Path],
    invert: bool | None = None,
    on_unreadable: Callable[[InputError], object] = _refuse,
) -> Iterator[Prediction]:
    """A prediction for each readable image, in order; `on_unreadable` is told of the others, or the first one raises.

    `model` takes float32 (N, 1, 28, 28) in 0..1 and gives logits (N, 10); N is `BATCH` at most.
    """
    readable = _readable(paths, invert, on_unreadable)
    while batch := list(islice(readable, BATCH)):
        with threads(), torch.no_grad():
            logits = model(torch.from_numpy(as_images(np.stack([image for _, image, _ in batch]))))
        top = logits.double().softmax(1).topk(2)
        for (path, _, dark), p, (first, second) in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
            yield Prediction(path, LETTERS[first], p[0], LETTERS[second], p[1], dark)


def _readable(
    paths: Iterable[Path], invert: bool | None, on_unreadable: Callable[[InputError], object]
) -> Iterator[tuple[Path, np.ndarray, bool]]:
    for path in paths:
        try:
            image, dark = read(path, invert)
        except InputError as error:
            on_unreadable(error)
        else:
            yield path, image, dark


# --- the pixels of a file ---------------------------------------------------------------------------------------------


def _pixels(path: Path) -> np.ndarray:
    """The first picture of a file, upright and at most `WORK` wide and high: uint8 (height, width, 3)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata; pixels that cannot be read are errors
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels
            with Image.open(path, formats=FORMATS) as image:
                return _rgb(image)
    except BOMBS:
        found = f"an image of more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except UnidentifiedImageError:
        found = "something else" if path.stat().st_size else "an empty file"
    except BROKEN as error:
        found = getattr(error, "strerror", None) or " ".join(f"a damaged file ({error})".split())
    raise InputError(f"{path}: found {found}, expected a {', '.join(FORMATS)} image")


def _rgb(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError("no pixels")
    image.draft(image.mode, (WORK, WORK))  # JPEG only: decodes a large photo at a half to an eighth of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, 32 bits, floating point
        image = _eight_bits(image)
    if image.mode in ("L", "RGB", "RGBA", "CMYK"):  # before anything is converted, which takes memory
        image.thumbnail((WORK, WORK))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((WORK, WORK))
    return _opaque(np.asarray(image, np.float32)) if image.mode == "RGBA" else np.asarray(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of any range, from its darkest to its brightest pixel."""
    step = max(1, max(image.size) // (2 * WORK))  # fewer pixels, before they become floats
    grey = np.nan_to_num(np.asarray(image)[::step, ::step].astype(np.float32))
    low, high = float(grey.min()), float(grey.max())
    return Image.fromarray(np.rint((grey - low) * (255 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8))


def _opaque(rgba: np.ndarray) -> np.ndarray:
    """Laid on white if what is to be seen is dark, else on black."""
    colours, alpha = rgba[:, :, :3], rgba[:, :, 3:] / 255
    seen = alpha.sum()
    ground = 255 if seen and (colours * alpha).sum() < 3 * 128 * seen else 0
    return np.rint(colours * alpha + ground * (1 - alpha)).astype(np.uint8)


# --- the letter of a picture ------------------------------------------------------------------------------------------


def _kept(grey: np.ndarray, invert: bool | None) -> tuple[np.ndarray, bool]:
    """28x28 grey is kept as it is, unless its whole edge is bright and something within is dark.

    That turns 38 of 18,230 real letters round, of which 29 are plainly dark on bright to the eye. Real letters touch
    the edge, so their negatives cannot be told from them (128 of 18,230 are): the best rule for those, the mean of the
    corners, turns 2,136 real letters round, and to believe the avg model where it is more confident, 384 of 1,823.
    """
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    dark = bool(edge.min() >= 128 and grey.min() < 128) if invert is None else invert
    return (255 - grey if dark else grey), dark


def _ink(rgb: np.ndarray, path: Path) -> tuple[np.ndarray, bool]:
    """How far each pixel's colour is from the ground's, (height, width) in 0..1, and whether the letter is darker.

    The ground is the median colour of the edge, unless the corners are mostly of the other one, as when a bold letter
    fills the picture. That rule is right for 15,246 of 18,230 real letters, the edge alone for 14,556.
    """
    ground = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    distance = np.abs(rgb - ground.astype(np.float32)).max(axis=2)
    contrast = np.median(distance[distance >= distance.max() / 2])
    if contrast < FAINTEST:
        raise InputError(f"{path}: found a blank image, a contrast of {contrast:.0f} of 255, expected a letter")
    ink = np.minimum(distance / contrast, 1)
    dark = bool(ground @ LUMA > np.median(rgb[ink > 0.5], axis=0) @ LUMA)
    corners = _resized(ink, SIDE, SIDE, Image.Resampling.BOX)[[0, 0, -1, -1], [0, -1, 0, -1]]
    if ink.min() > EDGE:  # the median lies between two halves of the edge, and is no colour of the image
        raise InputError(f"{path}: found no ground around the letter, expected a letter on one colour")
    return (1 - ink, not dark) if corners.mean() > 0.5 else (ink, dark)


def _framed(ink: np.ndarray) -> np.ndarray:
    """Cropped to the letter and stretched to the frame, uint8 (28, 28).

    Of real letters the longer side has 28 pixels in 96 %, the shorter one 26 at least in 96 %; but an I without serifs
    is a white square then. Right of 2,400 by avg and max on real letters and avg on embedded ones: at a `STRETCH` of 0,
    which keeps the shape, 2,184, 2,144 and 2,193; at 0.65 2,325, 2,336 and 2,208; at 1 2,325, 2,218 and 1,966.
    """
    rows, columns = (np.flatnonzero((ink > EDGE).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(SIDE * (side / max(ink.shape)) ** (1 - STRETCH))) for side in ink.shape)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    levels = ((ink - BLACK) / (WHITE - BLACK)).clip(0, 1)
    image = np.zeros((SIDE, SIDE), np.uint8)
    small = _resized(levels, height, width, Image.Resampling.LANCZOS).clip(0, 1)  # it overshoots
    image[top : top + height, left : left + width] = np.rint(small * (255 / small.max()))
    return image


def _resized(image: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((width, height), filter))


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(predictions: Iterable[Prediction]) -> str:
    """For a terminal, a line for each image."""
    rows = [("image", "letter", "probability", "or", "probability", "")]
    for p in predictions:
        turned = "dark on bright" if p.inverted else ""
        rows.append(
            (
                printable(p.path),
                p.letter,
                f"{p.probability:.4f}",
                p.runner_up,
                f"{p.runner_up_probability:.4f}",
                turned,
            )
        )
    return "\n".join(aligned(rows))


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A header and a line for each image, each with its line end."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        yield text.getvalue()
        text.seek(0)
        text.truncate()
        writer.writerow({**asdict(prediction), "path": printable(prediction.path)})
    yield text.getvalue()
