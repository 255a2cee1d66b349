"""Find the letter in a picture.

The letter is brought into notMNIST's form, in which models know letters: 28x28, bright on black, filling the frame. An
image of that form is kept as it is. In any other image the letter is found by its contrast with the ground, cropped,
and stretched to the frame.

The docstrings and comments below give measured numbers where they are used. They count the 18,230 real letters of the
small notMNIST, or 2,400 images of letters in 20 other fonts, drawn as `benchmarks/unseen_fonts.py` does.
"""

from functools import reduce
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from poolnet.data import pictures
from poolnet.data.dataset import SIDE
from poolnet.errors import InputError

FAINTEST = 16  # of 255: a contrast that JPEG noise on a blank image does not reach
EDGE = 0.5  # of the contrast: what counts as letter when it is cropped. At 0.2 JPEG noise is: 41 more of 2,400 wrong
BLACK, WHITE = 0.1, 0.9  # of the contrast: what becomes 0 and 255, so that noise beside the letter is gone
FILLS = 24  # of 28 pixels: the longer side of a letter in notMNIST's form
ON_EDGE = 0.06  # of the edge: specks
RECTANGLE = 0.97  # of its box: a sheet
SMALLEST = 0.12  # of the picture's longer side: a letter's longer side
LARGE, RIVAL, PART = 0.15, 0.4, 0.08  # of the largest mass: no speck; perhaps another letter; a piece of the letter
TINY = 0.0001  # of the picture: no letter
NEAR = 0.2  # of the letter's longer side: as far as a piece may be
SPECK = 10  # pixels of a mass: no piece of a letter
MANY = 20  # masses of up to four pixels: noise; or large ones: no letter
EIGHT = np.ones((3, 3), bool)  # neighbours: pixels that touch by a corner are connected
STRETCH = 0.65  # exponent by which the shorter side is brought up to the longer, see `_framed`
Masses = tuple[np.ndarray, np.ndarray]  # see `_masses`
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey


def read(path: Path, invert: bool | None = None) -> tuple[np.ndarray, bool]:
    """Read an image and bring its letter into notMNIST's form.

    Returns the letter, uint8 (28, 28), and whether the image was dark on bright and was inverted. `invert` says whether
    it is dark on bright, if that is known. Raises `InputError` if the file is not an image, if it is blank, or if no
    letter stands out.
    """
    picture = pictures.pixels(path)
    own_form = picture.shape == (SIDE, SIDE, 1)
    if (picture == picture[0, 0]).all() and not (own_form and picture.min() >= 128):
        # of notMNIST's I 254 are a white square
        raise InputError(f"{path}: found a blank image, all of one colour, expected a letter")
    sheet = _sheet(picture)
    if own_form and sheet is picture and (kept := _kept(picture[:, :, 0], invert)):
        return kept
    try:
        ink, dark = _ink(sheet, invert, path)
    except InputError:
        if own_form:  # 10 of 18,230 real letters are in pieces
            return (255 - picture if invert else picture)[:, :, 0], bool(invert)
        raise
    return _framed(ink), dark


def _kept(grey: np.ndarray, invert: bool | None) -> tuple[np.ndarray, bool] | None:
    """Return an image that has notMNIST's form already, else None.

    Such an image is 28x28, grey, bright on black, and its letter fills the frame.

    Of the 18,230 real letters 89 are not kept. With this rule the avg model is right about 16,057 of the 18,230. If all
    are given to the model as they are, it is right about 16,030.

    Real letters touch the edge. So their negatives cannot be recognised as negatives: only 128 of 18,230 are. Two other
    rules were tried. The best rule for negatives, the mean of the corners, inverts 2,136 of the real letters. To
    believe the avg model where it is more confident inverts 384 of 1,823.
    """
    if invert is None and _is_dark_on_bright(grey):
        return None
    image = 255 - grey if invert else grey
    return (image, bool(invert)) if _longer_side(image >= 128) >= FILLS else None


def _is_dark_on_bright(grey: np.ndarray) -> bool:
    """Whether the image has a bright edge around something dark.

    Specks on the edge are ignored.
    """
    edge = _edge(grey)
    median = _median(edge)
    if median < 128 or (darkest := grey.min()) >= 128:
        return False
    middle = (median + darkest) / 2
    if np.count_nonzero(edge < middle) > ON_EDGE * len(edge):
        return False
    labels, sizes = _masses(grey < middle)
    touching = np.zeros(len(sizes), bool)
    touching[_edge(labels)] = True
    return bool(sizes[touching].sum() < LARGE * sizes[~touching].max(initial=0))


def _sheet(picture: np.ndarray) -> np.ndarray:
    """Crop the picture to the sheet with the letter.

    This removes what is around the sheet, such as a frame, the lid of a scanner or a table. A sheet is a rectangle of
    the most frequent colour with something on it, in a picture whose edge has another colour. Also, what is on the
    sheet must have a third colour, or what is around the sheet must be narrow. The reason: a bold B has the form of a
    rectangle and holes too. A picture without a sheet is returned unchanged.
    """
    step = max(1, max(picture.shape) // 100)
    few = picture[::step, ::step].reshape(-1, picture.shape[2])
    codes, around = _coarse(few), _median(_edge(picture))
    most = np.bincount(codes).argmax()
    if most == _coarse(around.astype(np.uint8)[None])[0]:
        return picture
    paper = _median(few[codes == most])
    if np.abs(paper - around).max() < 2 * FAINTEST:
        return picture
    near = _far(picture, paper) < _far(picture, around)
    labels, sizes = _masses(near)
    main = sizes.argmax()
    if not main:
        return picture
    box = ndimage.find_objects(labels, main)[main - 1]
    sheet = labels[box] == main
    gaps = np.count_nonzero(~_edge(sheet)) - 4  # each corner is counted twice
    if sheet.size < 0.2 * near.size or gaps > (1 - RECTANGLE) * sheet.size:
        return picture
    whole = ndimage.binary_fill_holes(sheet)
    content = whole & ~sheet
    if not content.any() or whole.mean() < RECTANGLE:
        return picture
    third = np.abs(_median(picture[box][content]) - around).max() > 2 * FAINTEST
    return picture[box][1:-1, 1:-1] if third or whole.size > 0.7 * near.size else picture


def _coarse(colours: np.ndarray) -> np.ndarray:
    """Number each colour by the top three bits per channel."""
    return reduce(lambda codes, channel: 8 * codes + channel, (colours >> 5).T.astype(np.int32))


def _ink(picture: np.ndarray, invert: bool | None, path: Path) -> tuple[np.ndarray, bool]:
    """Separate the ink of the letter from the ground.

    Returns the ink, (height, width) in 0..1, and whether it is dark.

    Ink is the distance from the colour of the ground. The ground has the median colour of the edge, with two
    exceptions: the corners are mostly of the other colour, as when a bold letter fills the picture, or `invert` says
    that the ground is the other colour. The rule is right for 15,246 of 18,230 real letters. The edge alone is right
    for 14,556.
    """
    ground = _median(_edge(picture))
    distance = _far(picture, ground)
    contrast, masses = _contrast(distance)
    if contrast < FAINTEST:
        raise InputError(f"{path}: found a blank image, a contrast of {contrast:.0f} of 255, expected a letter")
    ink = np.minimum(distance / contrast, 1)
    dark = bool(_luma(ground) > _luma(_median(picture[ink > 0.5])))
    if ink.min() > EDGE:  # the median lies between two halves of the edge, and is no colour of the image
        raise InputError(f"{path}: found no ground around the letter, expected a letter on one colour")
    if dark != invert if invert is not None else _corners(ink).mean() > 0.5:
        ink, dark = 1 - ink, not dark
    return _letter(ink, masses, path), dark


def _contrast(distance: np.ndarray) -> tuple[float, Masses]:
    """Measure how far the letter's colour is from the ground's.

    The colour is that of the largest mass. If that mass is a speck, the colour of a fainter mass is taken. Returns the
    masses too, since labelling them again takes long.
    """
    for share in (2, 4, 8):
        labels, sizes = _masses(distance >= distance.max() / share)
        main = labels == sizes.argmax()
        if _longer_side(main) >= SMALLEST * max(main.shape) or distance.max() / share < 2 * FAINTEST:
            break
    return float(_median(distance[main])), (labels, sizes)


def _letter(ink: np.ndarray, masses: Masses, path: Path) -> np.ndarray:
    """Keep only the ink of the letter.

    The letter is the largest mass and the pieces near it. Specks, frames and borders do not belong to it.
    """
    labels, sizes = masses if np.array_equal(masses[0] > 0, ink > EDGE) else _masses(ink > EDGE)
    if np.count_nonzero(sizes <= 4) > MANY:
        ink = ndimage.median_filter(ink, 3)
        labels, sizes = _masses(ink > EDGE)
    pieces = _pieces(labels, sizes)
    if not pieces:  # where strokes are hairlines, their joints are fainter still
        labels, sizes = _masses(ink > EDGE / 2)
        pieces = _pieces(labels, sizes)
    is_piece = np.zeros(len(sizes), bool)
    is_piece[pieces] = True
    of_letter = is_piece[labels]
    if not (of_letter & (ink > EDGE)).any():
        raise InputError(f"{path}: no letter stands out, expected one on a ground; crop the picture to it")
    if len(pieces) == len(sizes) - 1:
        return ink
    near_others = ndimage.maximum_filter((labels > 0) & ~of_letter, 5)
    return np.where(near_others & ~of_letter, 0, ink)


def _pieces(labels: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Return the numbers of the masses that form the letter.

    The list is empty if other masses could be the letter as well.
    """
    counts: list[int] = sizes.tolist()
    boxes: list[tuple[slice, ...]] = [(), *ndimage.find_objects(labels)]
    speck = LARGE * max(counts)
    large = [n for n in range(1, len(counts)) if counts[n] >= speck or _is_long(boxes[n], labels.shape)]
    if not 0 < len(large) <= MANY:
        return []
    frames = {n for n in large if len(large) > 1 and _is_frame(n, large, labels, boxes)}
    main = max(set(large) - frames or large, key=lambda n: counts[n])
    smallest = max(SPECK, PART * counts[main])
    others = {n: count for n, count in enumerate(counts) if n != main and n not in frames}
    pieces = [n for n, count in others.items() if count > smallest and _is_near(boxes[n], boxes[main])]
    rest = [count for n, count in others.items() if n not in pieces]
    rivals = max(rest) > RIVAL * counts[main] or sum(rest) > counts[main]
    return [] if rivals or counts[main] < TINY * labels.size else [main, *pieces]


def _is_long(box: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    rows, columns = box
    return rows.stop - rows.start >= shape[0] / 4 or columns.stop - columns.start >= shape[1] / 4


def _is_frame(number: int, large: list[int], labels: np.ndarray, boxes: list[tuple[slice, ...]]) -> bool:
    """Whether a mass is a frame or border of another.

    A frame is around the other mass. A border lies along an edge that the other mass stays away from.
    """
    others = set(large) - {number}
    for other in others:
        if all(a.start < b.start and b.stop < a.stop for a, b in zip(boxes[number], boxes[other], strict=True)):
            return True
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    along = any(np.count_nonzero(edge == number) > len(edge) / 2 for edge in edges)
    return along and any(all(np.count_nonzero(edge == n) < len(edge) / 4 for edge in edges) for n in others)


def _is_near(box: tuple[slice, ...], main: tuple[slice, ...]) -> bool:
    """Whether a mass is near enough to belong to `main`.

    The pieces of a broken stroke are that near to the main mass.
    """
    gaps = [max(a.start - b.stop, b.start - a.stop) for a, b in zip(box, main, strict=True)]
    return max(gaps) <= NEAR * max(side.stop - side.start for side in main)


def _corners(image: np.ndarray) -> np.ndarray:
    """Return the pixels of the corners, each a 28th wide."""
    rows, columns = (np.arange(-side, side) for side in (max(1, round(length / SIDE)) for length in image.shape))
    return image[rows[:, None], columns]


def _edge(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def _median(values: np.ndarray) -> np.ndarray:
    """Compute the median along the first axis quickly.

    `np.median` takes ten times as long for few values.
    """
    low, high = (len(values) - 1) // 2, len(values) // 2
    parts = np.partition(np.ascontiguousarray(values.T), (low, high))
    return (parts[..., low].astype(np.float64) + parts[..., high]) / 2


def _far(picture: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel from a colour.

    It is measured in the channel in which the pixel is farthest from the colour.
    """
    channels = (np.abs(picture[:, :, channel] - np.float32(value)) for channel, value in enumerate(colour))
    return reduce(np.maximum, channels)


def _luma(colour: np.ndarray) -> float:
    return colour @ LUMA if len(colour) > 1 else colour[0]


def _masses(mask: np.ndarray) -> Masses:
    """Label the connected masses of a mask.

    Returns the number of the mass at each pixel, 0 where there is none, and the size of each mass in pixels, indexed by
    its number. The size at index 0 is 0.
    """
    labels, _ = ndimage.label(mask, EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels, sizes


def _longer_side(mask: np.ndarray) -> int:
    """Return the longer side of the mask's bounding box.

    In pixels. The box is around everything that is true in the mask.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 if len(rows) else 0


def _framed(ink: np.ndarray) -> np.ndarray:
    """Crop to the letter and stretch it to the frame.

    Returns uint8 (28, 28).

    In 96 % of the real letters the longer side has 28 pixels, and in 96 % the shorter side has at least 26. So they
    fill the frame, but an I without serifs is a white square then. A `STRETCH` of 0 keeps the shape. The right answers
    of three models, of 2,400 images:

    | `STRETCH` | avg, real letters | max, real letters | avg, embedded letters |
    |---|---|---|---|
    | 0 | 2,184 | 2,144 | 2,193 |
    | 0.65 | 2,325 | 2,336 | 2,208 |
    | 1 | 2,325 | 2,218 | 1,966 |

    The column names say the pooling of a model and the letters that it was trained on.
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
