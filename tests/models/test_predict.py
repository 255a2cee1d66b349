"""Prediction: real image files as anybody has them, and the letters found on them."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_LETTERS, ROOT
from PIL import Image, ImageDraw, ImageFont

from poolnet.data import dataset, glyphs, npz, pictures
from poolnet.errors import InputError
from poolnet.models import predict
from poolnet.models.predict import Prediction
from poolnet.text import to_json
from poolnet.training import train_loop
from poolnet.training.config import TrainConfig

RED, GREEN = "#c81e1e", "#286e28"  # of the same brightness


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


def same(one, other, tolerance=12):
    """Whether two conversions show the same letter: mean difference, of 255."""
    return np.abs(one.astype(int) - other).mean() < tolerance


@pytest.fixture
def expected():
    """The F that all conversions are held against: black on white, lossless."""
    image, inverted = predict.read(saved(letter(), "expected.png"))
    assert inverted
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Average pooling, trained on a few thousand embedded letters."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOLNET_HOME", str(folder / "home"))
        npz.save(folder / "glyphs.npz", glyphs.render(train=4000, val=100, test=100))
        splits = dataset.open_dataset(folder / "glyphs.npz")
        return train_loop.fit(TrainConfig(pool="avg", epochs=15, lr=0.01, device="cpu"), splits).model


# --- what reaches the model ------------------------------------------------------------------------------------------


def test_a_rectangle_is_cropped_and_fills_the_frame():
    pixels = np.full((100, 200), 255, np.uint8)
    pixels[20:80, 30:90] = 0
    image, inverted = predict.read(saved(Image.fromarray(pixels)))
    assert inverted
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert (image == 255).all()


def test_the_shorter_side_is_stretched_part_of_the_way_and_centred():
    pixels = np.zeros((120, 120), np.uint8)
    pixels[10:110, 40:65] = 200  # 100 x 25
    image, inverted = predict.read(saved(Image.fromarray(pixels)))
    assert not inverted
    width = round(28 * 0.25 ** (1 - predict.STRETCH))
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
    image, inverted = predict.read(saved(letter(ink="white", ground="black")))
    assert not inverted
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("size", "tolerance"), [(30, 20), (60, 8), (400, 5), (1500, 5)])
def test_the_size_does_not_matter(expected, size, tolerance):
    assert same(predict.read(saved(letter(size=size)))[0], expected, tolerance)


@pytest.mark.parametrize(
    ("ink", "ground", "inverted"),
    [("navy", "yellow", True), ("yellow", "navy", False), ("#808080", "#a0a0a0", True), (RED, GREEN, None)],
)
def test_a_letter_is_found_by_its_colour(expected, ink, ground, inverted):
    image, found = predict.read(saved(letter(ink=ink, ground=ground)))
    assert same(image, expected, 3)
    assert inverted is None or found == inverted


@pytest.mark.parametrize("ink", ["black", "white", "navy", "orange"])
def test_a_transparent_ground_is_no_letter(expected, ink):
    assert same(predict.read(saved(letter(mode="RGBA", ink=ink, ground=(0, 0, 0, 0))))[0], expected, 3)
    assert same(predict.read(saved(letter(mode="RGBA", ink=ink, ground=(255, 255, 255, 0))))[0], expected, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode(expected, mode):
    grey = letter().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)  # 12 bits in 16, as microscopes do
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("P", "CMYK", "1") else grey.convert(mode)
    assert image.mode == mode
    assert same(predict.read(saved(image, "image.tiff"))[0], expected, 12 if mode == "1" else 3)


def test_a_palette_with_a_transparent_colour(expected):
    pixels = (np.asarray(letter().convert("L")) < 128).astype(np.uint8)
    image = Image.fromarray(pixels, "L").convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0])  # ground and letter both black: only transparency tells them apart
    assert same(predict.read(saved(image, transparency=0))[0], expected, 12)


def test_the_first_frame_of_an_animation(expected):
    saved(letter("F"), "image.gif", save_all=True, append_images=[letter("A"), letter("H")])
    assert same(predict.read(Path("image.gif"))[0], expected)


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
    assert same(predict.read(saved(image, "image.jpg", exif=exif, quality=95))[0], expected, 6)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_the_noise_of_jpeg_does_not_move_the_frame(expected, quality):
    assert same(predict.read(saved(letter(), "image.jpg", quality=quality))[0], expected)


def test_a_large_photo_with_noise_and_shade(expected):
    """4000 x 3000 pixels, light that falls off to one side, a small letter in a corner."""
    pixels = np.full((3000, 4000, 3), 190.0)
    ink = np.asarray(letter(size=900, margin=0).convert("L")) < 128
    pixels[300 : 300 + ink.shape[0], 500 : 500 + ink.shape[1]][ink] = 30
    pixels *= np.linspace(1, 0.8, 4000)[:, None]
    pixels += np.random.default_rng(0).normal(0, 8, (3000, 4000, 1))
    path = saved(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "photo.jpg", quality=80)
    image, inverted = predict.read(path)
    assert inverted
    assert same(image, expected)


@pytest.mark.parametrize(("ink", "ground"), [("black", "white"), ("white", "black")])
def test_a_letter_that_touches_the_edge(expected, ink, ground):
    image, inverted = predict.read(saved(letter(margin=0, ink=ink, ground=ground)))
    assert inverted is (ink == "black")
    assert same(image, expected, 6)


def test_who_knows_the_polarity_may_say_so():
    """A black L so bold that it takes up most of the edge, or a white square? By itself it is taken for a square."""
    pixels = np.zeros((100, 100), np.uint8)
    pixels[:60, 40:] = 255
    for invert in (True, False):
        image, inverted = predict.read(saved(Image.fromarray(pixels)), invert=invert)
        assert inverted is invert
        stem, corner = image[:, 2], image[2:8, 20:26]
        assert (stem.min() == 255 and corner.max() == 0) if invert else corner.min() == 255


# --- notMNIST's own form ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """The first readable 300 of notMNIST's own PNG files."""
    if not REAL_LETTERS.exists():
        pytest.skip("the real small notMNIST is not beside this checkout")
    folder = tmp_path_factory.mktemp("own")
    files = []
    with tarfile.open(REAL_LETTERS, "r|*") as tar:
        for entry in tar:
            if entry.isfile() and entry.name.endswith(".png") and entry.size:
                files.append(folder / f"{len(files)}.png")
                files[-1].write_bytes(tar.extractfile(entry).read())
            if len(files) == 300:
                return files


def test_notmnists_own_files_reach_the_model_unchanged(own_files):
    unchanged = 0
    for path in own_files:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        read, inverted = predict.read(path)
        if not inverted:  # else it is cropped as well
            np.testing.assert_array_equal(read, pixels)
        np.testing.assert_array_equal(predict.read(path, invert=False)[0], pixels)
        unchanged += not inverted
    assert unchanged >= 298  # two of a thousand are turned round


def test_predictions_for_own_files_equal_the_models_answers(own_files, model):
    pixels = np.stack([np.asarray(Image.open(path)) for path in own_files])
    with torch.no_grad():
        p, answers = model(torch.from_numpy(dataset.as_images(pixels))).softmax(1).max(1)
    found = list(predict.predict(model, own_files, invert=False))
    assert [one.path for one in found] == own_files
    assert [one.letter for one in found] == [dataset.LETTERS[answer] for answer in answers]
    np.testing.assert_allclose([one.probability for one in found], p, rtol=1e-5)


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


@pytest.mark.parametrize("size", [28, 60, 200, 900])
@pytest.mark.parametrize("dirt", DIRT)
def test_dirt_beside_the_letter_is_none_of_it(dirt, size):
    clean, _ = predict.read(saved(page(size)))
    image, inverted = predict.read(saved(DIRT[dirt](page(size), random.Random(1))))
    assert inverted
    assert same(image, clean, 35 if size == 28 else 10)  # there a label leaves twelve pixels for the letter


def test_one_dark_pixel_anywhere_changes_nothing():
    clean, _ = predict.read(saved(page(100)))
    for place in [(0, 0), (5, 5), (99, 50), (50, 99), (97, 3)]:
        image = page(100)
        image.putpixel(place, (0, 0, 0))
        np.testing.assert_array_equal(predict.read(saved(image))[0], clean)


def test_a_speck_that_is_darker_than_a_faint_letter_is_not_the_letter():
    clean, _ = predict.read(saved(page(200, ink="#b0b0b0")))
    image = page(200, ink="#b0b0b0")
    image.paste("black", (10, 10, 14, 14))
    assert same(predict.read(saved(image))[0], clean, 3)


def test_the_pieces_of_a_broken_letter_belong_to_it():
    whole = page(200, "E")
    broken = whole.copy()
    broken.paste("white", (0, 84, 200, 90))  # through the stem
    assert same(predict.read(saved(broken))[0], predict.read(saved(whole))[0], 20)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("text", "ABCDEFGHIJ")
def test_a_letter_within_28x28_is_cropped_as_in_any_other_size(mode, text):
    expected, _ = predict.read(saved(page(56, text)))
    for ink, ground in (("black", "white"), ("white", "black")):
        image, inverted = predict.read(saved(page(28, text, ground, ink).convert(mode)))
        assert inverted == (ink == "black")
        assert max(np.ptp(np.flatnonzero((image >= 64).any(axis))) for axis in (0, 1)) == 27
        assert same(image, expected, 50)  # of strokes that are two pixels wide


def test_letters_of_notmnists_form_are_kept_as_they_are(expected):
    for pixels in (expected, predict.read(saved(page(100, "I")))[0], predict.read(saved(page(100, "B")))[0]):
        image, inverted = predict.read(saved(Image.fromarray(pixels)))
        assert not inverted
        np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("invert", [None, True, False])
def test_any_picture_becomes_28x28_or_is_refused(invert):
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.choice([1, 2, 3, 5, 17, 28, 29, 60, 130], 2)
        noise = rng.integers(0, 256, (height, width, 3))
        blocks = np.kron(rng.integers(0, 2, (height // 3 + 1, width // 3 + 1)), np.ones((3, 3)))[:height, :width, None]
        slope = np.add.outer(np.arange(height), np.arange(width))[:, :, None] * (rng.random((height, width, 1)) > 0.02)
        for pixels in (noise, noise[:, :, :1], blocks * [255, 200, 9], slope):
            image = Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).astype(np.uint8))
            with contextlib.suppress(InputError):
                read, inverted = predict.read(saved(image), invert)
                assert (read.shape, read.dtype) == ((28, 28), np.uint8)
                assert invert is None or inverted == invert


@pytest.mark.parametrize("invert", [True, False])
def test_who_knows_the_polarity_is_believed_before_the_letter_is_looked_for(invert):
    """A bold frame around a small square: black ink, with the square as a hole; or white, with the frame around it."""
    pixels = np.zeros((100, 100), np.uint8)
    pixels[:10] = pixels[-10:] = pixels[:, :10] = pixels[:, -10:] = 255
    pixels[40:60, 40:60] = 255
    image, inverted = predict.read(saved(Image.fromarray(pixels)), invert=invert)
    assert inverted == invert
    assert bool(image[14, 14] > 128) == (not invert)


def test_a_picture_of_noise_is_refused_at_once():
    for share in (0.005, 0.02, 0.1, 0.3):
        pixels = np.where(np.random.default_rng(0).random((500, 500)) < share, 0, 255).astype(np.uint8)
        with pytest.raises(InputError, match="no letter stands out"):
            predict.read(saved(Image.fromarray(pixels)))


@pytest.mark.parametrize("size", [60, 200, 900])
def test_where_no_letter_stands_out_none_is_guessed(size):
    two = Image.new("RGB", (2 * size, size), "white")
    two.paste(page(size), (0, 0))
    two.paste(page(size, "B"), (size, 0))
    four = Image.new("RGB", (2 * size, 2 * size), "white")
    for text, place in zip("ABCD", ((0, 0), (size, 0), (0, size), (size, size)), strict=True):
        four.paste(page(size, text), place)
    for image in (two, four):
        with pytest.raises(InputError, match=r"image\.png: no letter stands out, .*; crop the picture to it"):
            predict.read(saved(image))


def test_a_white_square_of_28x28_is_kept():
    """Hundreds of notMNIST's letters I are just that; a white image of any other size is blank."""
    image, inverted = predict.read(saved(Image.new("L", (28, 28), 255)))
    assert image.min() == 255
    assert not inverted
    with pytest.raises(InputError, match="found a blank image, all of one colour"):
        predict.read(saved(Image.new("L", (29, 28), 255)))


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
        predict.read(Path(name))
    assert str(refusal.value) == f"{name}: found {found}, expected a PNG, JPEG, GIF, BMP, WEBP, TIFF image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_file_that_was_cut_is_refused_in_one_line(suffix, share):
    path = saved(noise(), f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=rf"^cut\.{suffix}: found .*, expected a PNG, [^\n]*$"):
        predict.read(path)


@pytest.mark.parametrize("side", [28, 90])
@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("RGB", "red"), ("RGBA", (0, 0, 0, 0)), ("I;16", 900)])
def test_a_blank_image_is_refused(mode, colour, side):
    with pytest.raises(InputError, match=r"^image\.png: found a blank image, .*, expected a letter$"):
        predict.read(saved(Image.new(mode, (side, side), colour)))


@pytest.mark.parametrize("size", [(100, 100), (2, 1)])
def test_a_picture_of_two_halves_is_refused(size):
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    with pytest.raises(InputError, match="no ground around the letter"):
        predict.read(saved(image))


def test_an_almost_blank_photo_is_refused():
    pixels = np.random.default_rng(0).normal(200, 3, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    with pytest.raises(InputError, match="found a blank image, a contrast of"):
        predict.read(saved(Image.fromarray(pixels), "image.jpg"))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    for side in (90, 200):  # Pillow warns of the one and refuses the other
        with pytest.raises(InputError, match=r"image\.png: found an image of more than 5,000 pixels, expected"):
            predict.read(saved(Image.effect_noise((side, side), 50)))


def test_a_folder_or_nothing_in_place_of_a_file():
    Path("folder").mkdir()
    for name, kind in (("folder", "found a folder"), ("absent.png", "no such file")):
        with pytest.raises(InputError, match=rf"^{name}: {kind}, expected a PNG"):
            predict.read(Path(name))


# --- files, predictions, tables --------------------------------------------------------------------------------------


def test_folders_are_searched_and_files_kept_as_named():
    for name in ("b/2.PNG", "b/1.jpeg", "b/c/0.gif", "b/notes.txt", "odd.dat", "a.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    found = pictures.find([Path("odd.dat"), Path("b"), Path("a.png")])
    assert [path.as_posix() for path in found] == ["odd.dat", "b/1.jpeg", "b/2.PNG", "b/c/0.gif", "a.png"]


def test_hidden_files_are_left_out_and_links_followed():
    """As macOS and notebooks leave the ones, and a collection of other people's letters has the others."""
    hidden = ("._1.png", ".ipynb_checkpoints/1-checkpoint.png", "c/.thumbnails/2.png", ".3.png")
    for name in ("1.png", "c/2.png", *hidden):
        Path("b", name).parent.mkdir(parents=True, exist_ok=True)
        Path("b", name).touch()
    assert [path.as_posix() for path in pictures.find([Path("b")])] == ["b/1.png", "b/c/2.png"]
    assert pictures.find([Path("b/.3.png")]) == [Path("b/.3.png")]  # as it was asked for by name
    if os.name != "nt":  # where only administrators may link
        Path("b/again").symlink_to("../b", target_is_directory=True)
        Path("d").symlink_to("b/c", target_is_directory=True)
        Path("b/4.png").symlink_to("1.png")
        Path("b/5.png").symlink_to("nothing.png")
        found = [path.as_posix() for path in pictures.find([Path("b"), Path("d")])]
        assert found[:3] == ["b/1.png", "b/4.png", "b/5.png"]
        assert "d/2.png" in found
        assert len(found) < 12
        with pytest.raises(InputError, match=r"^b/5\.png: a link that leads nowhere, expected a PNG"):
            predict.read(Path("b/5.png"))


def test_paths_that_are_not_there_and_folders_without_images_are_refused():
    Path("folder").mkdir()
    Path("folder", "notes.txt").touch()
    with pytest.raises(InputError, match=r"^folder: found no image in this folder, expected files \.apng \.bmp "):
        pictures.find([Path("folder")])
    with pytest.raises(InputError, match=r"^absent: no such file or folder, expected an image or a folder of images$"):
        pictures.find([Path("absent")])


def test_the_unreadable_are_reported_and_the_order_is_kept(model, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    paths = [saved(letter(text), f"{text}.png") for text in "ABCDE"]
    Path("bad.png").write_bytes(b"")
    paths.insert(2, Path("bad.png"))
    errors = []
    found = list(predict.predict(model, paths, on_unreadable=errors.append))
    assert [one.path.name for one in found] == ["A.png", "B.png", "C.png", "D.png", "E.png"]
    assert [str(error).split(":")[0] for error in errors] == ["bad.png"]
    with pytest.raises(InputError, match=r"^bad\.png: found an empty file"):
        list(predict.predict(model, paths))


def test_images_are_read_as_predictions_are_taken(model, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    taken = []
    path = saved(letter())

    def endless():
        while True:
            taken.append(path)
            yield path

    next(predict.predict(model, endless()))
    assert len(taken) == 3


def test_probabilities_are_those_of_the_logits():
    logits = torch.full((1, 10), -30.0)
    logits[0, 3], logits[0, 7] = np.log(0.75), np.log(0.25)
    (one,) = predict.predict(lambda x: logits, [saved(letter())])
    assert (one.letter, one.runner_up, one.inverted) == ("D", "H", True)
    assert one.probability == pytest.approx(0.75)
    assert one.runner_up_probability == pytest.approx(0.25)


AWKWARD = Prediction(Path('a "big", blue.png'), "A", 0.75, "B", 0.125, True)


def test_csv_can_be_read_back():
    text = "".join(predict.csv_lines([AWKWARD, AWKWARD]))
    assert "\r" not in text
    assert text.splitlines()[0] == "path,letter,probability,runner_up,runner_up_probability,inverted"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2
    assert rows[1]["path"] == str(AWKWARD.path)
    assert (rows[1]["letter"], float(rows[1]["runner_up_probability"]), rows[1]["inverted"]) == ("A", 0.125, "True")
    assert len(list(predict.csv_lines([]))) == 1


def test_json_is_plain():
    assert json.loads(to_json(AWKWARD)) == {
        "path": str(AWKWARD.path),
        "letter": "A",
        "probability": 0.75,
        "runner_up": "B",
        "runner_up_probability": 0.125,
        "inverted": True,
    }


def test_the_table_has_a_line_for_each_image():
    header, line = predict.table([AWKWARD]).splitlines()
    assert header.split() == ["image", "letter", "probability", "or", "probability"]
    assert line == 'a "big", blue.png  A       0.7500       B   0.1250       dark on bright'


def test_names_that_a_terminal_would_obey_are_escaped():
    odd = Prediction(Path("\x1b[31m$HOME\n\udcff.png"), "A", 0.75, "B", 0.125, True)
    csv_text = "".join(predict.csv_lines([odd]))
    for text in (predict.table([odd]), csv_text):
        assert r"\x1b[31m$HOME\n\udcff.png" in text
        assert text.encode().isascii()
        assert "\x1b" not in text
    (row,) = csv.DictReader(io.StringIO(csv_text))
    assert row["letter"] == "A"
    plain = json.loads(to_json(odd))
    assert plain["path"] == "\x1b[31m$HOME\n\\xff.png"
    plain["path"].encode()  # which a lone surrogate could not be


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files of this system")
def test_pipes_and_devices_are_refused_at_once():
    os.mkfifo("pipe.png")
    for name in ("pipe.png", "/dev/zero"):
        with pytest.raises(InputError, match=rf"^{name}: no regular file, expected an image"):
            pictures.find([Path(name)])


def test_most_letters_of_an_unseen_font_are_recognised(model):
    """Pillow's own font, which the embedded letters do not hold, small and large, in three pairs of colours."""
    paths, truth = [], []
    for size, suffix in ((48, "png"), (160, "jpg")):
        for colours in (("black", "white"), ("white", "black"), ("navy", "orange")):
            for text in dataset.LETTERS:
                paths.append(saved(letter(text, size, *colours), f"{len(paths)}.{suffix}"))
                truth.append(text)
    right = [one.letter == text for one, text in zip(predict.predict(model, paths), truth, strict=True)]
    assert sum(right) >= 0.9 * len(right), sum(right)
