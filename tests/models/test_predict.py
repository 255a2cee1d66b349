"""Predictions of real image files, and how they are shown."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_letters import letter, saved
from PIL import Image

from poolnet.data import dataset, glyphs, letter_image, npz, pictures
from poolnet.errors import InputError
from poolnet.models import predict
from poolnet.models.predict import Prediction
from poolnet.text import to_json
from poolnet.training import train_loop
from poolnet.training.config import TrainConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Average pooling, trained on a few thousand embedded letters."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOLNET_HOME", str(folder / "home"))
        npz.save(folder / "glyphs.npz", glyphs.render(train=4000, val=100, test=100))
        splits = dataset.open_dataset(folder / "glyphs.npz")
        return train_loop.fit(TrainConfig(pool="avg", epochs=15, lr=0.01, device="cpu"), splits).model


def test_predictions_for_own_files_equal_the_models_answers(own_files, model):
    pixels = np.stack([np.asarray(Image.open(path)) for path in own_files])
    with torch.no_grad():
        p, answers = model(torch.from_numpy(dataset.as_images(pixels))).softmax(1).max(1)
    found = list(predict.predict(model, own_files, invert=False))
    assert [one.path for one in found] == own_files
    assert [one.letter for one in found] == [dataset.LETTERS[answer] for answer in answers]
    np.testing.assert_allclose([one.probability for one in found], p, rtol=1e-5)


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
            letter_image.read(Path("b/5.png"))


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
    assert header.split() == ["image", "letter", "sure", "or", "sure"]
    assert line == 'a "big", blue.png  A       0.7500  B   0.1250  dark on bright'


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
