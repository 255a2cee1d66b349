"""Real image files as anybody has them, and the letters found on them."""

import contextlib
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from drawn_letters import letter, saved
from PIL import Image

from poolnet.data import letter_image
from poolnet.errors import InputError

RED, GREEN = "#c81e1e", "#286e28"  # of the same brightness


def same(one, other, tolerance=12):
    """Whether two conversions show the same letter: mean difference, of 255."""
    return np.abs(one.astype(int) - other).mean() < tolerance


@pytest.fixture
def expected():
    """The F that all conversions are held against: black on white, lossless."""
    image, inverted = letter_image.read(saved(letter(), "expected.png"))
    assert inverted
    return image


# --- what reaches the model ------------------------------------------------------------------------------------------


def test_a_rectangle_is_cropped_and_fills_the_frame():
    pixels = np.full((100, 200), 255, np.uint8)
    pixels[20:80, 30:90] = 0
    image, inverted = letter_image.read(saved(Image.fromarray(pixels)))
    assert inverted
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert (image == 255).all()


def test_the_shorter_side_is_stretched_part_of_the_way_and_centred():
    pixels = np.zeros((120, 120), np.uint8)
    pixels[10:110, 40:65] = 200  # 100 x 25
    image, inverted = letter_image.read(saved(Image.fromarray(pixels)))
    assert not inverted
    width = round(28 * 0.25 ** (1 - letter_image.STRETCH))
    columns = np.flatnonzero((image == 255).all(axis=0))
    assert columns.tolist() == list(range((28 - width) // 2, (28 - width) // 2 + width))
    assert image.sum() == 255 * 28 * width


def test_the_letters_shape_survives(expected):
    """An F: a stem on the left, bars at the top and in the middle, nothing below on the right; bright on black."""
    assert expected[:, 2:6].min() > 240  # the stem
    assert expected[:2, 2:26].min() > 240  # the upper bar
    assert expected[12:16, 2:23].max(axis=0).min() > 240  # the lower one
    assert expected[17:, 9:].max() < 10
    assert (expected.min(), expected.max()) == (0, 255)


def test_black_on_white_equals_white_on_black(expected):
    image, inverted = letter_image.read(saved(letter(ink="white", ground="black")))
    assert not inverted
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("size", "tolerance"), [(30, 20), (60, 8), (400, 5), (1500, 5)])
def test_the_size_does_not_matter(expected, size, tolerance):
    assert same(letter_image.read(saved(letter(size=size)))[0], expected, tolerance)


@pytest.mark.parametrize(
    ("ink", "ground", "inverted"),
    [("navy", "yellow", True), ("yellow", "navy", False), ("#808080", "#a0a0a0", True), (RED, GREEN, None)],
)
def test_a_letter_is_found_by_its_colour(expected, ink, ground, inverted):
    image, found = letter_image.read(saved(letter(ink=ink, ground=ground)))
    assert same(image, expected, 3)
    assert inverted is None or found == inverted


@pytest.mark.parametrize("ink", ["black", "white", "navy", "orange"])
def test_a_transparent_ground_is_no_letter(expected, ink):
    assert same(letter_image.read(saved(letter(mode="RGBA", ink=ink, ground=(0, 0, 0, 0))))[0], expected, 3)
    assert same(letter_image.read(saved(letter(mode="RGBA", ink=ink, ground=(255, 255, 255, 0))))[0], expected, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode(expected, mode):
    grey = letter().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)  # 12 bits in 16, as microscopes do
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("P", "CMYK", "1") else grey.convert(mode)
    assert image.mode == mode
    assert same(letter_image.read(saved(image, "image.tiff"))[0], expected, 12 if mode == "1" else 3)


def test_a_palette_with_a_transparent_colour(expected):
    pixels = (np.asarray(letter().convert("L")) < 128).astype(np.uint8)
    image = Image.fromarray(pixels, "L").convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0])  # ground and letter both black: only transparency tells them apart
    assert same(letter_image.read(saved(image, transparency=0))[0], expected, 12)


def test_the_first_frame_of_an_animation(expected):
    saved(letter("F"), "image.gif", save_all=True, append_images=[letter("A"), letter("H")])
    assert same(letter_image.read(Path("image.gif"))[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_a_camera_noted_is_honoured(expected, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = letter() if orientation == 1 else letter().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(letter_image.read(saved(image, "image.jpg", exif=exif, quality=95))[0], expected, 6)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_the_noise_of_jpeg_does_not_move_the_frame(expected, quality):
    assert same(letter_image.read(saved(letter(), "image.jpg", quality=quality))[0], expected)


def test_a_large_photo_with_noise_and_shade(expected):
    """4000 x 3000 pixels, light that falls off to one side, a small letter in a corner."""
    pixels = np.full((3000, 4000), 190, np.float32)
    ink = np.asarray(letter(size=900, margin=0).convert("L")) < 128
    pixels[300 : 300 + ink.shape[0], 500 : 500 + ink.shape[1]][ink] = 30
    pixels *= np.linspace(1, 0.8, 4000, dtype=np.float32)
    pixels += 8 * np.random.default_rng(0).standard_normal((3000, 4000), np.float32)
    path = saved(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB"), "photo.jpg", quality=80)
    image, inverted = letter_image.read(path)
    assert inverted
    assert same(image, expected)


@pytest.mark.parametrize(("ink", "ground"), [("black", "white"), ("white", "black")])
def test_a_letter_that_touches_the_edge(expected, ink, ground):
    image, inverted = letter_image.read(saved(letter(margin=0, ink=ink, ground=ground)))
    assert inverted is (ink == "black")
    assert same(image, expected, 6)


def test_who_knows_the_polarity_may_say_so():
    """A black L so bold that it takes up most of the edge, or a white square? By itself it is taken for a square."""
    pixels = np.zeros((100, 100), np.uint8)
    pixels[:60, 40:] = 255
    for invert in (True, False):
        image, inverted = letter_image.read(saved(Image.fromarray(pixels)), invert=invert)
        assert inverted is invert
        stem, corner = image[:, 2], image[2:8, 20:26]
        assert (stem.min() == 255 and corner.max() == 0) if invert else corner.min() == 255


# --- notMNIST's own form ---------------------------------------------------------------------------------------------


def test_notmnists_own_files_reach_the_model_unchanged(own_files):
    unchanged = 0
    for path in own_files:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        read, inverted = letter_image.read(path)
        if not inverted:  # else it is cropped as well
            np.testing.assert_array_equal(read, pixels)
        np.testing.assert_array_equal(letter_image.read(path, invert=False)[0], pixels)
        unchanged += not inverted
    assert unchanged >= 298  # two of a thousand are turned round


# --- what is beside the letter ----------------------------------------------------------------------------------------


def benchmark():
    """The module `unseen_fonts`, which draws letters with all kinds of dirt."""
    spec = importlib.util.spec_from_file_location("unseen_fonts", ROOT / "benchmarks" / "unseen_fonts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


DIRT = benchmark().DIRT


def page(size, text="F", ground="white", ink="black"):
    """A square picture with a letter in its middle, which takes up some 60 % of its height."""
    image, drawn = Image.new("RGB", (size, size), ground), letter(text, round(0.8 * size), ink, ground, margin=0)
    image.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return image


@pytest.mark.parametrize("size", [28, 60, 200, 600])
@pytest.mark.parametrize("dirt", DIRT)
def test_dirt_beside_the_letter_is_none_of_it(dirt, size):
    clean, _ = letter_image.read(saved(page(size)))
    image, inverted = letter_image.read(saved(DIRT[dirt](page(size), random.Random(1))))
    assert inverted
    assert same(image, clean, 35 if size == 28 else 10)  # there a label leaves twelve pixels for the letter


def test_one_dark_pixel_anywhere_changes_nothing():
    clean, _ = letter_image.read(saved(page(100)))
    for place in [(0, 0), (5, 5), (99, 50), (50, 99), (97, 3)]:
        image = page(100)
        image.putpixel(place, (0, 0, 0))
        np.testing.assert_array_equal(letter_image.read(saved(image))[0], clean)


def test_a_speck_that_is_darker_than_a_faint_letter_is_not_the_letter():
    clean, _ = letter_image.read(saved(page(200, ink="#b0b0b0")))
    image = page(200, ink="#b0b0b0")
    image.paste("black", (10, 10, 14, 14))
    assert same(letter_image.read(saved(image))[0], clean, 3)


def test_the_pieces_of_a_broken_letter_belong_to_it():
    whole = page(200, "E")
    broken = whole.copy()
    broken.paste("white", (0, 84, 200, 90))  # through the stem
    assert same(letter_image.read(saved(broken))[0], letter_image.read(saved(whole))[0], 20)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("text", "ABCDEFGHIJ")
def test_a_letter_within_28x28_is_cropped_as_in_any_other_size(mode, text):
    expected, _ = letter_image.read(saved(page(56, text)))
    for ink, ground in (("black", "white"), ("white", "black")):
        image, inverted = letter_image.read(saved(page(28, text, ground, ink).convert(mode)))
        assert inverted == (ink == "black")
        assert max(np.ptp(np.flatnonzero((image >= 64).any(axis))) for axis in (0, 1)) == 27
        assert same(image, expected, 50)  # of strokes that are two pixels wide


def test_letters_of_notmnists_form_are_kept_as_they_are(expected):
    for pixels in (expected, letter_image.read(saved(page(100, "I")))[0], letter_image.read(saved(page(100, "B")))[0]):
        image, inverted = letter_image.read(saved(Image.fromarray(pixels)))
        assert not inverted
        np.testing.assert_array_equal(image, pixels)


def test_any_picture_becomes_28x28_or_is_refused():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.choice([1, 2, 3, 5, 17, 28, 29, 60, 130], 2)
        noise = rng.integers(0, 256, (height, width, 3))
        blocks = np.kron(rng.integers(0, 2, (height // 3 + 1, width // 3 + 1)), np.ones((3, 3)))[:height, :width, None]
        slope = np.add.outer(np.arange(height), np.arange(width))[:, :, None] * (rng.random((height, width, 1)) > 0.02)
        for pixels in (noise, noise[:, :, :1], blocks * [255, 200, 9], slope):
            path = saved(Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).astype(np.uint8)))
            for invert in (None, True, False):
                with contextlib.suppress(InputError):
                    read, inverted = letter_image.read(path, invert)
                    assert (read.shape, read.dtype) == ((28, 28), np.uint8)
                    assert invert is None or inverted == invert


@pytest.mark.parametrize("invert", [True, False])
def test_who_knows_the_polarity_is_believed_before_the_letter_is_looked_for(invert):
    """A bold frame around a small square: black ink, with the square as a hole; or white, with the frame around it."""
    pixels = np.zeros((100, 100), np.uint8)
    pixels[:10] = pixels[-10:] = pixels[:, :10] = pixels[:, -10:] = 255
    pixels[40:60, 40:60] = 255
    image, inverted = letter_image.read(saved(Image.fromarray(pixels)), invert=invert)
    assert inverted == invert
    assert bool(image[14, 14] > 128) == (not invert)


def test_a_picture_of_noise_is_refused_at_once():
    for share in (0.005, 0.02, 0.1, 0.3):
        pixels = np.where(np.random.default_rng(0).random((500, 500)) < share, 0, 255).astype(np.uint8)
        with pytest.raises(InputError, match="no letter stands out"):
            letter_image.read(saved(Image.fromarray(pixels)))


@pytest.mark.parametrize("size", [60, 200, 600])
def test_where_no_letter_stands_out_none_is_guessed(size):
    two = Image.new("RGB", (2 * size, size), "white")
    two.paste(page(size), (0, 0))
    two.paste(page(size, "B"), (size, 0))
    four = Image.new("RGB", (2 * size, 2 * size), "white")
    for text, place in zip("ABCD", ((0, 0), (size, 0), (0, size), (size, size)), strict=True):
        four.paste(page(size, text), place)
    for image in (two, four):
        with pytest.raises(InputError, match=r"image\.png: no letter stands out, .*; crop the picture to it"):
            letter_image.read(saved(image))


def test_a_white_square_of_28x28_is_kept():
    """Hundreds of notMNIST's letters I are just that; a white image of any other size is blank."""
    image, inverted = letter_image.read(saved(Image.new("L", (28, 28), 255)))
    assert image.min() == 255
    assert not inverted
    with pytest.raises(InputError, match="found a blank image, all of one colour"):
        letter_image.read(saved(Image.new("L", (29, 28), 255)))


# --- refused ---------------------------------------------------------------------------------------------------------


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))


UNREADABLE = {
    "empty.png": (b"", "an empty file"),
    "text.png": (b"The letter A.\n" * 9, "something else"),
    "vector.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "something else"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_image_is_refused_in_one_line(name):
    content, found = UNREADABLE[name]
    Path(name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        letter_image.read(Path(name))
    assert str(refusal.value) == f"{name}: found {found}, expected a PNG, JPEG, GIF, BMP, WEBP, TIFF image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_file_that_was_cut_is_refused_in_one_line(suffix, share):
    path = saved(noise(), f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=rf"^cut\.{suffix}: found .*, expected a PNG, [^\n]*$"):
        letter_image.read(path)


@pytest.mark.parametrize("side", [28, 90])
@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("RGB", "red"), ("RGBA", (0, 0, 0, 0)), ("I;16", 900)])
def test_a_blank_image_is_refused(mode, colour, side):
    with pytest.raises(InputError, match=r"^image\.png: found a blank image, .*, expected a letter$"):
        letter_image.read(saved(Image.new(mode, (side, side), colour)))


@pytest.mark.parametrize("size", [(100, 100), (2, 1)])
def test_a_picture_of_two_halves_is_refused(size):
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    with pytest.raises(InputError, match="no ground around the letter"):
        letter_image.read(saved(image))


def test_an_almost_blank_photo_is_refused():
    pixels = np.random.default_rng(0).normal(200, 3, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    with pytest.raises(InputError, match="found a blank image, a contrast of"):
        letter_image.read(saved(Image.fromarray(pixels), "image.jpg"))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    for side in (90, 200):  # Pillow warns of the one and refuses the other
        with pytest.raises(InputError, match=r"image\.png: found an image of more than 5,000 pixels, expected"):
            letter_image.read(saved(Image.effect_noise((side, side), 50)))


def test_a_folder_or_nothing_in_place_of_a_file():
    Path("folder").mkdir()
    for name, kind in (("folder", "found a folder"), ("absent.png", "no such file")):
        with pytest.raises(InputError, match=rf"^{name}: {kind}, expected a PNG"):
            letter_image.read(Path(name))
