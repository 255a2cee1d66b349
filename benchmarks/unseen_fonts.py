"""How often a model is right about letters in typefaces that it was not trained on, drawn as anybody's images are.

    python benchmarks/unseen_fonts.py MODEL [FONT.ttf ...] [--json]

A to J in each font, and in the one that Pillow holds, in 4 sizes, black on white, white on black, and red on green of
the same brightness, half of them PNG and half JPEG, read and predicted as `poolnet predict` does. The fonts should be
younger than notMNIST (2011) and not matplotlib's. There is no interval: the images of one font are drawings of the same
ten letters, and so few fonts, chosen by hand, say nothing exact about others. The first line names the worst font.

The second table has the same letters with dirt beside them, black on white in square pictures of several sizes: a
pixel, a speck of 3x3, dust, salt noise, a frame, a frame on the edge, the dark border of a scan, a shadow, ruled paper,
a label on paper. Then the time that an image takes. In both tables, images that are refused count as not right.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from poolnet.data.dataset import LETTERS
from poolnet.models import predict
from poolnet.text import aligned
from poolnet.tracking import registry

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


# --- dirt beside the letter -------------------------------------------------------------------------------------------

SIZES = (28, 50, 200, 600, 2000)  # pixels of a side


def page(font: Path | None, letter: str, size: int, rng: random.Random) -> Image.Image:
    """A letter, 60 % of the height, somewhere near the middle."""
    face = ImageFont.truetype(font, round(0.8 * size)) if font else ImageFont.load_default(round(0.8 * size))
    left, top, right, bottom = face.getbbox(letter)
    x, y = ((size - side) / 2 + rng.uniform(-0.07, 0.07) * size for side in (right - left, bottom - top))
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).text((round(x - left), round(y - top)), letter, "black", font=face)
    return image


def specks(image: Image.Image, rng: random.Random, sides: tuple[int, ...], colour: str) -> Image.Image:
    for side in sides:
        x, y = (rng.randrange(length - side) for length in image.size)
        image.paste(colour, (x, y, x + side, y + side))
    return image


def salt(image: Image.Image, rng: random.Random) -> Image.Image:
    pixels = np.array(image)
    drawn = np.random.default_rng(rng.randrange(2**32)).random(pixels.shape[:2])
    pixels[drawn < 0.01], pixels[drawn > 0.99] = 0, 255
    return Image.fromarray(pixels)


def frame(image: Image.Image, margin: int, width: int) -> Image.Image:
    far = image.width - 1 - margin
    ImageDraw.Draw(image).rectangle((margin, margin, far, far), None, "black", max(1, width))
    return image


def border(image: Image.Image, rng: random.Random) -> Image.Image:
    pixels, width = np.array(image), max(1, image.width // 14)
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 50, (*pixels.shape[:2], 1))
    pixels[:width], pixels[:, :width] = noise[:width], noise[:, :width]
    return Image.fromarray(pixels)


def shadow(image: Image.Image) -> Image.Image:
    fall = 1 - 0.55 * np.add.outer(*[np.linspace(0, 0.5, image.width)] * 2)
    return Image.fromarray((np.array(image) * fall[:, :, None]).astype(np.uint8))


def ruled(image: Image.Image) -> Image.Image:
    lines = Image.new("RGB", image.size, "white")
    for y in range(image.height // 10, image.height, max(3, image.height // 8)):
        ImageDraw.Draw(lines).line((0, y, image.width, y), (150, 180, 220), max(1, image.height // 150))
    return Image.fromarray(np.minimum(np.array(image), np.array(lines)))


def label(image: Image.Image) -> Image.Image:
    paper, inner = Image.new("RGB", image.size, (160, 120, 80)), image.resize([side * 3 // 4 for side in image.size])
    paper.paste(inner, [side // 8 for side in image.size])
    return paper


DIRT: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "none": lambda image, _: image,
    "pixel": lambda image, rng: specks(image, rng, (1,), "black"),
    "speck 3x3": lambda image, rng: specks(image, rng, (3,), "black"),
    "dust, 8 specks": lambda image, rng: specks(image, rng, (1, 1, 2, 2, 2, 3, 3, 3), "#3c3c3c"),
    "salt noise": salt,
    "frame": lambda image, _: frame(image, image.width // 25, image.width // 50),
    "frame on the edge": lambda image, _: frame(image, 0, image.width // 25),
    "border of a scan": border,
    "shadow": lambda image, _: shadow(image),
    "ruled paper": lambda image, _: ruled(image),
    "label on paper": lambda image, _: label(image),
}


def measure_dirt(model: str, fonts: tuple[Path, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Right of all, and milliseconds an image, by dirt and size."""
    net, cells = registry.load(model).net, {}
    for name, size in product(DIRT, SIZES):
        rng = random.Random(f"{name} {size}")
        with tempfile.TemporaryDirectory() as folder:
            letters = {}
            for index, (font, letter) in enumerate(product((None, *fonts), LETTERS)):
                path = Path(folder) / f"{index}.png"
                DIRT[name](page(font, letter, size, rng), rng).save(path, compress_level=1)
                letters[path] = letter
            begun = time.process_time()
            predictions = predict.predict(net, letters, on_unreadable=lambda error: None)
            right = sum(letters[prediction.path] == prediction.letter for prediction in predictions)
        milliseconds = 1000 * (time.process_time() - begun) / len(letters)
        cells.setdefault(name, {})[str(size)] = {"right": right, "of": len(letters), "milliseconds": milliseconds}
    return cells


def measure(model: str, fonts: tuple[Path, ...]) -> dict[str, dict[str, dict[str, int]]]:
    """Right of all by font, height, colours, format and letter, and in total."""
    with tempfile.TemporaryDirectory() as folder:
        images = list(draw(fonts, Path(folder)))
        paths, net = [image.path for image in images], registry.load(model).net
        predictions = {p.path: p.letter for p in predict.predict(net, paths, on_unreadable=lambda error: None)}
    right = [predictions.get(image.path) == image.letter for image in images]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for by in ("font", "height", "colours", "format", "letter"):
        groups: dict[str, list[bool]] = {}
        for image, is_right in zip(images, right, strict=True):
            groups.setdefault(str(getattr(image, by)), []).append(is_right)
        found[by] = {name: {"right": sum(group), "of": len(group)} for name, group in groups.items()}
    return {**found, "all": {"": {"right": sum(right), "of": len(right)}}}


def answer(fonts: dict[str, dict[str, int]]) -> str:
    worst = min(fonts, key=lambda name: fonts[name]["right"])
    counts = fonts[worst]
    return f"fonts: {len(fonts)}; the worst, {worst}, has {counts['right']} of {counts['of']} right"


@click.command()
@click.argument("model")
@click.argument("fonts", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(model: str, fonts: tuple[Path, ...], as_json: bool) -> None:
    clean, dirt = measure(model, fonts), measure_dirt(model, fonts)
    if as_json:
        click.echo(json.dumps({**clean, "dirt": dirt}))
        return
    rows = [("", "", "right", "of", "share")]
    for by, groups in clean.items():
        for name, s in groups.items():
            rows.append((by, name, f"{s['right']:,}", f"{s['of']:,}", f"{s['right'] / s['of']:.4f}"))
    click.echo("\n".join([answer(clean["font"]), "", *aligned(rows)]))
    for what, of in (("right", f" of {dirt['none']['28']['of']}"), ("milliseconds", " an image")):
        rows = [(f"{what}{of}", *(f"{size} px" for size in SIZES))]
        rows += [(name, *(f"{cell[what]:,.3g}" for cell in cells.values())) for name, cells in dirt.items()]
        click.echo("\n" + "\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
