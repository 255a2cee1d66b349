"""Render the built-in data set from matplotlib's fonts.

The images show the letters A to J in the manner of notMNIST. The fonts come with matplotlib, so no network and no
download is needed. Whole designs are held out: validation and test use typefaces that training never saw. The same seed
and sizes give the same bytes for the same versions of the libraries used.
"""

from functools import cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from poolnet.data.dataset import LETTERS, SIDE
from poolnet.text import progress

VERSION = 2  # raised when what is stored changes, so that cached files of before are not reused; pixels are those of 1

# A face is a font file, and the code point of its A where that is not ASCII. The splits hold out designs:
# DejaVu trains, STIX validates, Computer Modern tests, and each has every kind. Two kinds are borrowed:
# DejaVu has no script (train takes one from STIX) and Computer Modern no double-struck capitals (test takes
# those of DejaVu Serif). Fraktur is left out, because few people read its A, G or J.
FACES = {
    "train": {
        "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans:1D5A0"),
        "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
        "script": ("STIXGeneral:1D49C", "STIXGeneral:1D4D0"),
        "double-struck": ("DejaVuSans:1D538",),
    },
    "val": {
        "sans": ("STIXGeneral:1D5A0", "STIXGeneral:1D5D4", "STIXGeneral:1D608"),
        "serif": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
        "mono": ("STIXGeneral:1D670",),
        "script": ("STIXNonUniIta:E22D", "STIXNonUniBolIta:E247"),
        "double-struck": ("STIXGeneral:1D538",),
    },
    "test": {
        "sans": ("cmss10",),
        "serif": ("cmr10", "cmb10", "cmti10", "cmmi10"),
        "mono": ("cmtt10",),
        "script": ("cmsy10",),
        "double-struck": ("DejaVuSerif:1D538",),
    },
}
# Shares of the images: of each kind of face, of each finish of the letter, and of two effects on top. Inverted
# letters are a third as frequent as in notMNIST: among so few faces, 3 % of them decide alone which pooling loses less.
KINDS = {"sans": 0.3, "serif": 0.35, "mono": 0.15, "script": 0.14, "double-struck": 0.06}
FINISHES = {"light": 0.15, "regular": 0.27, "bold": 0.25, "black": 0.25, "outline": 0.04, "shadow": 0.04}
CUT, INVERTED = 0.05, 0.01

# Unicode had these letters before the Mathematical Alphanumeric block, which leaves holes in their places.
LETTERLIKE = {
    **{0x1D49D: 0x212C, 0x1D4A0: 0x2130, 0x1D4A1: 0x2131, 0x1D4A3: 0x210B, 0x1D4A4: 0x2110},  # script
    **{0x1D53A: 0x2102, 0x1D53F: 0x210D},  # double-struck
}

INK, CANVAS = 64, 88  # pixels, of a master: the longer side of the regular letter, and the whole
DIRECTIONS = 32  # in which the extent of a master is measured
BATCH = 250  # images; part of the rendering, as random numbers are drawn batch by batch


class Masters(NamedTuple):
    """The undistorted glyphs of one split."""

    bitmaps: np.ndarray  # uint8 (faces, finishes, 10, CANVAS, CANVAS)
    hulls: np.ndarray  # float32 (faces, finishes, 10, 2, DIRECTIONS): outermost points (x, y), canvas = -1..1
    shares: np.ndarray  # float64 (faces,): probability of each face


def render(
    train: int = 60_000,
    val: int = 6_000,
    test: int = 6_000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Render the arrays of the built-in data set.

    Returns `X_train y_train group_train` and those of val and test: X is uint8 (N, 28, 28), y and group are int64 (N,).
    Labels 0 to 9 stand for A to J. A group is a face, whose name is in `group_names`. The classes are balanced and
    shuffled. A split depends only on the seed and its own size. Raises ValueError for a size below 1 or a seed below 0,
    or if one of them is not an integer.
    """
    sizes = {"train": train, "val": val, "test": test}
    for name, number in {**sizes, "seed": seed}.items():
        least = 0 if name == "seed" else 1
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {number!r}")
    faces = {split: [face for kind in FACES[split].values() for face in kind] for split in sizes}
    arrays = {"group_names": np.array([face for split in faces.values() for face in split])}
    with progress(length=sum(sizes.values()), label="Rendering letters") as bar:
        for split, stream in zip(sizes, np.random.SeedSequence(seed).spawn(len(sizes)), strict=True):
            rng = np.random.default_rng(stream)
            y = rng.permutation(np.arange(sizes[split], dtype=np.int64) % len(LETTERS))
            X, face = np.empty((len(y), SIDE, SIDE), np.uint8), np.empty_like(y)
            for start in range(0, len(y), BATCH):
                labels = y[start : start + BATCH]
                rows = slice(start, start + BATCH)
                X[rows], face[rows] = _render_batch(masters(split), labels, rng)
                bar.update(len(labels))
            first = list(arrays["group_names"]).index(faces[split][0])
            arrays |= {f"X_{split}": X, f"y_{split}": y, f"group_{split}": first + face}
    return arrays


def font_and_letters(face: str) -> tuple[Path, str]:
    """Return font file and letters of an entry of FACES."""
    font, _, first = face.partition(":")
    start = int(first, 16) if first else ord("A")
    letters = "".join(chr(LETTERLIKE.get(point, point)) for point in range(start, start + 10))
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"), letters


@cache
def masters(split: str) -> Masters:
    """Draw a split's faces in every finish, once a process."""
    drawings, shares = [], []
    for kind, faces in FACES[split].items():
        for path, letters in map(font_and_letters, faces):
            drawings.append(np.stack([_finishes(letter, path) for letter in letters], axis=1))
            shares.append(KINDS[kind] / len(faces))
    bitmaps = np.stack(drawings)
    return Masters(bitmaps, _hulls(bitmaps), np.array(shares) / np.sum(shares))


def _finishes(letter: str, path: Path) -> np.ndarray:
    """Draw one letter in all FINISHES: uint8 (finishes, CANVAS, CANVAS)."""
    left, top, right, bottom = ImageFont.truetype(path, INK).getbbox(letter)
    font = ImageFont.truetype(path, INK * INK / max(right - left, bottom - top))
    regular = _draw(letter, font, stroke=0)
    # Erosion alone would erase hairlines; they stay, dimmed, as thin strokes are in notMNIST.
    light = np.maximum(np.asarray(Image.fromarray(regular).filter(ImageFilter.MinFilter(3))), regular // 2)
    stroke = _widest_stroke(letter, font, regular)
    bold, black, wide = (_draw(letter, font, pixels) for pixels in ((stroke + 1) // 2, stroke, 3))
    outline = wide - np.minimum(wide, regular)
    shadow = np.maximum(regular, np.roll(regular, (5, 5), axis=(0, 1)) // 2)
    return np.stack([light, regular, bold, black, outline, shadow])


def _widest_stroke(letter: str, font: ImageFont.FreeTypeFont, regular: np.ndarray) -> int:
    """Return by how many pixels a letter can be widened.

    The result is 2 to 7 pixels. The gaps and counters of the letter must stay open enough: at least 45 % of the
    background in its box, unless the result is 2.
    """
    ground = regular == 0
    box = np.ix_(~ground.all(axis=1), ~ground.all(axis=0))
    for stroke in range(7, 2, -1):
        still_open = _draw(letter, font, stroke)[box] == 0
        if still_open.sum() >= 0.45 * ground[box].sum():
            return stroke
    return 2


def _draw(letter: str, font: ImageFont.FreeTypeFont, stroke: int) -> np.ndarray:
    """Draw a letter in mid-canvas, widened by `stroke` pixels."""
    image = Image.new("L", (CANVAS, CANVAS))
    left, top, right, bottom = font.getbbox(letter)
    corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, letter, fill=255, font=font, stroke_width=stroke)
    return np.asarray(image)


def _hulls(bitmaps: np.ndarray) -> np.ndarray:
    """Find each bitmap's outermost points: float32 (..., 2, DIRECTIONS)."""
    angles = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    hulls = np.empty((*bitmaps.shape[:-2], 2, DIRECTIONS), np.float32)
    for index in np.ndindex(bitmaps.shape[:-2]):
        rows, columns = np.nonzero(bitmaps[index] > 64)  # the antialiased rim is not worth room in the frame
        points = (2 * np.stack([columns, rows]) + 1) / CANVAS - 1
        hulls[index] = points[:, np.argmax(directions.T @ points, axis=1)]
    return hulls


def _render_batch(glyphs: Masters, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Render one image for each label: uint8 (n, 28, 28).

    The second array has the face of each.
    """
    n = len(labels)
    face = rng.choice(len(glyphs.shares), n, p=glyphs.shares)
    finish = rng.choice(len(FINISHES), n, p=list(FINISHES.values()))
    chosen = face, finish, labels
    x = _sample(glyphs.bitmaps[chosen], _fit(_distortion(n, rng), glyphs.hulls[chosen], rng))
    return np.rint(255 * _decorate(x, rng).clip(0, 1)).astype(np.uint8), face


def _distortion(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw rotations, slants and aspect ratios: float32 (n, 2, 2).

    They map the canvas to the frame, before size and place.
    """
    angle = np.deg2rad(rng.normal(0, 6, n).clip(-15, 15))
    slant = rng.uniform(-0.3, 0.1, n)  # mostly to the right, as italics
    aspect = np.exp(rng.normal(0, 0.1, n))
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * aspect, cos * slant - sin], [sin * aspect, sin * slant + cos]]
    return np.moveaxis(np.array(rows, np.float32), -1, 0)


def _fit(distortion: np.ndarray, hulls: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centre each distorted glyph and fill the frame.

    The result is float32 (n, 2, 3) and maps the frame to the canvas, both -1..1. The longer side fills the frame. The
    shorter side is stretched part of the way, as in notMNIST.
    """
    n = len(hulls)
    corners = distortion @ hulls
    low, high = corners.min(axis=2), corners.max(axis=2)
    full = 2 * rng.uniform(0.93, 1.0, (n, 1)) / (high - low)
    kept = full.min(axis=1, keepdims=True)
    scale = kept * (full / kept) ** rng.uniform(0, 0.7, (n, 1))
    inverse = np.linalg.inv(distortion)
    centre = inverse @ ((low + high) / 2)[:, :, None]
    return np.concatenate([inverse / scale[:, None, :], centre], axis=2).astype(np.float32)


def _sample(bitmaps: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Look up each pixel of the frame in its bitmap.

    It is sampled at 2x2 points a pixel. The result is float32 (n, 28, 28) in 0..1.
    """
    axis = (np.arange(2 * SIDE, dtype=np.float32) + 0.5) / SIDE - 1
    from_x, from_y, centre = np.moveaxis(maps[..., None, None], 2, 0)
    grid = torch.from_numpy((from_x * axis + centre) + from_y * axis[:, None]).permute(0, 2, 3, 1)
    pixels = torch.from_numpy(bitmaps[:, None].astype(np.float32) / 255)
    samples = F.grid_sample(pixels, grid, align_corners=False)
    return F.avg_pool2d(samples, 2)[:, 0].numpy()


def _decorate(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add cuts, blur, inversion, low contrast and noise.

    Blur, contrast and noise are weak in most images, as in notMNIST. Cuts and inversions are rare.
    """
    n = len(x)
    effect = rng.random(n)
    cut, inverted = np.flatnonzero(effect < CUT), np.flatnonzero(effect > 1 - INVERTED)
    x[cut] *= _stripes(len(cut), rng)
    blurred = F.avg_pool2d(torch.from_numpy(x), 3, stride=1, padding=1).numpy()
    x += rng.random((n, 1, 1), np.float32) ** 6 * (blurred - x)
    x[inverted] = 1 - x[inverted]
    x *= 1 - 0.3 * rng.random((n, 1, 1), np.float32) ** 8
    noise = 0.05 * rng.random((n, 1, 1), np.float32) ** 4
    return x + noise * rng.standard_normal(x.shape, np.float32)


def _stripes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return masks of parallel gaps: bool (n, 28, 28).

    They range from one or two broad gaps to a hatching.
    """
    angle, phase, share = rng.uniform([[0.0], [0.0], [0.7]], [[np.pi], [1.0], [0.85]], (3, n))[:, :, None, None]
    stripes = np.exp(rng.uniform(np.log(1.2), np.log(6), (n, 1, 1)))
    axis = (np.arange(SIDE) + 0.5) / SIDE
    position = axis * np.cos(angle) + axis[:, None] * np.sin(angle)
    return (position * stripes + phase) % 1 < share
