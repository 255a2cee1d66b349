"""Letters of Pillow's own font, as pictures and files."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def letter(text="F", size=120, ink="black", ground="white", mode="RGB", margin=0.25):
    """A letter of Pillow's own font on a plain ground."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    edge = round(margin * size)
    image = Image.new(mode, (right - left + 2 * edge, bottom - top + 2 * edge), ground)
    ImageDraw.Draw(image).text((edge - left, edge - top), text, ink, font=font)
    return image


def saved(image, name="image.png", **options):
    path = Path(name)
    image.save(path, **options)
    return path
