"""How often a model is right about letters in typefaces that it was not trained on, drawn as anybody's images are.

    python benchmarks/unseen_fonts.py MODEL [FONT.ttf ...] [--json]

A to J in each font, and in the one that Pillow holds, in 4 sizes, black on white, white on black, and red on green of
the same brightness, half of them PNG and half JPEG, read and predicted as `poolnet predict` does. The fonts should be
younger than notMNIST (2011) and not matplotlib's. Images of one font are alike, so the interval (Wilson, 95 %) says
what other images of these fonts would change, not what other fonts would.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest

from poolnet import predict, registry
from poolnet.config import aligned
from poolnet.data import LETTERS

HEIGHTS = (20, 48, 120, 400)  # pixels, of the font; a margin of a quarter is left around the letter
COLOURS = {
    "black on white": ("#000000", "#ffffff"),
    "white on black": ("#ffffff", "#000000"),
    "red on green": ("#c81e1e", "#286e28"),
}
BUILT_IN = "Pillow's own"


@dataclass(frozen=True)
class Drawn:
    """One image and what is on it."""

    font: str
    height: int
    colours: str
    format: str
    letter: str
    path: Path


def draw(fonts: tuple[Path, ...], folder: Path) -> Iterator[Drawn]:
    """Every letter in every font, height and pair of colours, as a file."""
    for font, height in product((None, *fonts), HEIGHTS):
        face = ImageFont.truetype(font, height) if font else ImageFont.load_default(height)
        for (pair, (colours, (ink, ground))), (index, letter) in product(
            enumerate(COLOURS.items()), enumerate(LETTERS)
        ):
            kind = ("PNG", "JPEG")[(pair + index) % 2]
            name = font.stem if font else BUILT_IN
            drawn = Drawn(
                name, height, colours, kind, letter, folder / f"{name}-{height}-{pair}-{letter}.{kind.lower()}"
            )
            picture(face, letter, height // 4, ink, ground).save(drawn.path, kind)
            yield drawn


def picture(face: ImageFont.FreeTypeFont, letter: str, margin: int, ink: str, ground: str) -> Image.Image:
    left, top, right, bottom = face.getbbox(letter)
    image = Image.new("RGB", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin), ground)
    ImageDraw.Draw(image).text((margin - left, margin - top), letter, ink, font=face)
    return image


def score(right: list[bool]) -> dict[str, int | float]:
    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return {"right": sum(right), "of": len(right), "low": interval.low, "high": interval.high}


def measure(model: str, fonts: tuple[Path, ...]) -> dict[str, dict[str, dict[str, int | float]]]:
    """Right of all by font, height, colours, format and letter, and in total."""
    with tempfile.TemporaryDirectory() as folder:
        images = list(draw(fonts, Path(folder)))
        predictions = {p.path: p.letter for p in predict.predict(registry.load(model).net, [i.path for i in images])}
    right = [predictions[image.path] == image.letter for image in images]
    found = {}
    for by in ("font", "height", "colours", "format", "letter"):
        groups: dict[str, list[bool]] = {}
        for image, is_right in zip(images, right, strict=True):
            groups.setdefault(str(getattr(image, by)), []).append(is_right)
        found[by] = {name: score(group) for name, group in groups.items()}
    return {**found, "all": {"": score(right)}}


@click.command()
@click.argument("model")
@click.argument("fonts", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(model: str, fonts: tuple[Path, ...], as_json: bool) -> None:
    found = measure(model, fonts)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [("", "", "right", "of", "share", "95 % interval")]
    for by, groups in found.items():
        for name, s in groups.items():
            share, interval = f"{s['right'] / s['of']:.4f}", f"{s['low']:.4f} to {s['high']:.4f}"
            rows.append((by, name, f"{s['right']:,}", f"{s['of']:,}", share, interval))
    click.echo("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
