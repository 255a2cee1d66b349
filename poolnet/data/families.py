"""Find the family of each letter's font.

The name of a notMNIST file is the base64 of its font's file name. Fonts whose names differ in style, weight, width,
foundry or number alone are one family. So are clones, which look alike under different names: fonts whose letters
have a median RMS distance of at most 0.10, of pixels from 0 to 1. Letters of a family are not independent.
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from poolnet.data.annotations import LETTERS
from poolnet.text import printable

# What a font's name says beside its family, as words in the spellings of 1,873 names. "Sans" or "Script" are families.
STYLES = frozenset(
    """
    regular regul regu reg rg normal norm nor book bk roman upright text titling display disp caption capt
    bold bol bld bd demi demibold dem semi semibold sb medium mediu medi med md light ligh lgt lt lite thin hairline
    heavy hea hvy hv black bla blk blac ultra ult extra xtra halbfett
    italic ital ita it itl itali italique kursiv oblique obliqu obliq obl slanted inclined backslant
    condensed conden cond cn cnd compressed compr comp narrow narr extended exten expanded expand wide extd
    small caps cap smallcaps smcap sc scp scb bi capitals os osf oldstyle lf tf sw swash
    """.split()  # noqa: SIM905 - a table of words
)
FOUNDRIES = frozenset(
    """
    adobe agfa itc by bt tt tee ee mt std pro ef be bq ssi ssk btn brk nf jf jl icg htf dtl fff ffx cc sf fb mf gx upc
    ce urw linotype monotype bitstream berthold att aoe flf ll
    """.split()  # noqa: SIM905 - a table of words
)
GLUED = re.compile(r"ITCby|SSi\b|SSK|OsF|BTN|\(R\)|\(\d+\)")  # marks in which small and capital letters are no words
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_]+")
EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}$")
SHOWN = 60  # signs of a family's name

NEAR = 0.10  # RMS distance of clones
COMMON = 3  # letters that two fonts must both have, to be compared
MOST = 10_000  # fonts that are compared with each other: 40 seconds on two cores, and four times that for twice as many
SLACK = 1.02  # squares of distances in float32 are off by 1.9 % of that of NEAR at most, for 784 products
BLOCK = 512  # fonts compared with all others at a time


@dataclass(frozen=True)
class Families:
    """The family of each file name."""

    number: Mapping[str, int]  # by file name without its suffix
    by_name: Mapping[str, str]  # the family that the name alone says
    names: tuple[str, ...]  # of family k at index k
    undecoded: frozenset[str]  # file names that are no font's
    compared: bool  # whether clones were looked for

    def of(self, files: np.ndarray) -> np.ndarray:
        """Return the number of each file's family: (N,) int64."""
        return np.array([self.number[file] for file in files], np.int64)

    def counts(self, files: np.ndarray) -> dict[str, int]:
        """Count fonts and families among file names."""
        fonts = set(files)
        by_name = len({self.by_name[file] for file in fonts})
        clones = f"no clones sought above {MOST:,}"
        return {
            "fonts": len(fonts),
            "names that do not decode": len(fonts & self.undecoded),
            "families by name": by_name,
            **(
                {"clones united": by_name - len({self.number[file] for file in fonts})}
                if self.compared
                else {clones: len(fonts)}
            ),
        }


def find(files: np.ndarray, labels: np.ndarray, images: Sequence[np.ndarray], keys: np.ndarray) -> Families:
    """Find the families of letters.

    `files` are their file names (N,), without suffixes. `images` are (N, 28, 28) in any number of parts. `keys` are
    digests of the images, by which one is chosen where a font has two of a letter. The result does not depend on the
    order of the letters.
    """
    fonts = sorted(set(files))
    decoded = {file: font_of(file) for file in fonts}
    by_name = {file: f"?{file}" if font is None else name_family(font) for file, font in decoded.items()}
    label = _numbered([by_name[file] for file in fonts])
    compared = len(fonts) <= MOST
    if compared:
        row = {file: at for at, file in enumerate(fonts)}
        pairs = clones(*_masters(np.array([row[file] for file in files]), labels, images, keys, len(fonts)))
        label = _united(label, pairs)
    names = sorted({min(by_name[file] for file in members) for members in _members(fonts, label)})
    number_of = {name: number for number, name in enumerate(names)}
    number: dict[str, int] = {}
    for members in _members(fonts, label):
        number |= dict.fromkeys(members, number_of[min(by_name[file] for file in members)])
    undecoded = frozenset(file for file, font in decoded.items() if font is None)
    return Families(number, by_name, tuple(printable(name)[:SHOWN] for name in names), undecoded, compared)


def font_of(file: str) -> str | None:
    """Decode a file name to a font's, or None if it is none."""
    try:
        font = base64.b64decode(file.encode("ascii"), validate=True).decode()
    except (UnicodeError, binascii.Error):
        return None
    return font if re.search(r"\w", font) else None


def name_family(font: str) -> str:
    """Return the family that a font's file name says.

    It is the words of the name without styles, foundries and numbers: `Futura-BoldItalic.otf` and `Futura Md BT.ttf`
    are `futura`. A name of such words alone is a family of its own.
    """
    stem = EXTENSION.sub("", unicodedata.normalize("NFKC", font))
    words = [word.casefold() for word in WORD.findall(GLUED.sub(" ", stem))]
    kept = [word for word in words if word not in STYLES and word not in FOUNDRIES and not word.isdigit()]
    return "".join(kept or words) or font


def clones(masters: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Find the pairs of fonts that look alike: (pairs, 2).

    `masters` are the letters of each font, uint8 (fonts, letters, pixels), and `present` says which of them it has.
    Two fonts are alike if the median of the RMS distances of the letters that both have is at most `NEAR`. Pairs that
    may be are found by one product of matrices a letter. Each is then compared in whole numbers, which are exact in
    float64, so that all machines agree.
    """
    enough = np.flatnonzero(present.sum(1) >= COMMON)  # the others cannot be compared
    masters, present = masters[enough], present[enough]
    fonts, letters, pixels = masters.shape
    near = SLACK * pixels * (255 * NEAR) ** 2
    squares = np.einsum("flp,flp->fl", masters, masters, dtype=np.float32, casting="unsafe")
    both = present.astype(np.float32)
    found = [np.empty((0, 2), int)]
    for start in range(0, fonts, BLOCK):
        stop = min(start + BLOCK, fonts)
        close = np.zeros((stop - start, fonts - start), np.int8)
        for letter in range(letters):
            x = masters[start:, letter].astype(np.float32)
            apart = x[: stop - start] @ (-2 * x).T
            apart += squares[start:stop, letter, None]
            apart += squares[None, start:, letter]
            close += (apart <= near) & present[start:stop, letter, None] & present[None, start:, letter]
        common = both[start:stop] @ both[start:].T
        one, other = np.nonzero((2 * close >= common) & (common >= COMMON))
        pairs = np.stack([one, other], 1)[one < other] + start
        found.append(pairs[[_median(masters, present, *pair) <= NEAR for pair in pairs]])
    return enough[np.concatenate(found)]


def _median(masters: np.ndarray, present: np.ndarray, one: int, other: int) -> float:
    letters = present[one] & present[other]
    apart = masters[one, letters].astype(np.float64) - masters[other, letters]
    return float(np.median(np.sqrt((apart**2).mean(1)))) / 255


def _masters(
    font: np.ndarray, labels: np.ndarray, images: Sequence[np.ndarray], keys: np.ndarray, fonts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose an image of each letter but I of each font.

    Most fonts draw the I as one bar, so it tells little. Where there are two, the one of the lower digest is taken.
    """
    letters = [label for label, letter in enumerate(LETTERS) if letter != "I"]
    order = np.argsort(keys, kind="stable")
    places, first = np.unique((font * len(LETTERS) + labels)[order], return_index=True)
    chosen = order[first]
    flat = np.zeros((fonts * len(LETTERS), images[0][0].size), np.uint8)
    start = 0
    for part in images:
        here = (chosen >= start) & (chosen < start + len(part))
        flat[places[here]] = part[chosen[here] - start].reshape(-1, flat.shape[1])
        start += len(part)
    present = np.zeros(len(flat), bool)
    present[places] = True
    masters = flat.reshape(fonts, len(LETTERS), -1)[:, letters]
    return masters, present.reshape(fonts, len(LETTERS))[:, letters]


def _numbered(names: Sequence[str]) -> np.ndarray:
    return np.unique(np.array(names, object), return_inverse=True)[1]


def _united(label: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Unite the families of paired fonts, single linkage."""
    parent = np.arange(len(label))

    def root(of: int) -> int:
        while parent[of] != of:
            parent[of] = of = parent[parent[of]]
        return of

    for one, other in label[pairs]:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(of) for of in label], int)


def _members(fonts: Sequence[str], label: np.ndarray) -> list[list[str]]:
    """Return the fonts of each family."""
    order = np.argsort(label, kind="stable")
    cuts = [0, *np.flatnonzero(np.diff(label[order])) + 1, len(fonts)]
    return [[fonts[at] for at in order[start:stop]] for start, stop in pairwise(cuts)]
