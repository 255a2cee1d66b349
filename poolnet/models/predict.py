"""Predict which letter is on an image.

Any readable image is converted to the form of the images that the models were trained on.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from poolnet.data import letter_image
from poolnet.data.dataset import LETTERS, as_images
from poolnet.errors import InputError
from poolnet.text import SHARE, aligned, printable
from poolnet.training.evaluation import threads

BATCH = 256  # images given to the model at once


@dataclass(frozen=True)
class Prediction:
    """The predicted letter of one image, and the runner-up.

    A letter is the name of its class. The runner-up is the second most likely one. `inverted` is true if the image was
    dark on bright.
    """

    path: Path
    letter: str
    probability: float
    runner_up: str
    runner_up_probability: float
    inverted: bool


def _refuse(error: InputError) -> NoReturn:
    raise error


def predict(
    model: Callable[[torch.Tensor], torch.Tensor],
    paths: Path | str | Iterable[Path | str],
    invert: bool | None = None,
    on_unreadable: Callable[[InputError], object] = _refuse,
    classes: Sequence[str] = LETTERS,
) -> Iterator[Prediction]:
    """Predict the letter on each readable image, in order.

    Each image that cannot be read is reported to `on_unreadable`. By default the first such image raises its
    `InputError`.

    `model` takes float32 (N, 1, 28, 28) in 0..1 and returns logits (N, 10). N is at most `BATCH`. `classes` are the
    names of its classes.
    """
    readable = _readable([paths] if isinstance(paths, (Path, str)) else paths, invert, on_unreadable)
    while batch := list(islice(readable, BATCH)):
        with threads(), torch.no_grad():
            logits = model(torch.from_numpy(as_images(np.stack([image for _, image, _ in batch]))))
        top = logits.double().softmax(1).topk(2)
        for (path, _, dark), p, (first, second) in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
            yield Prediction(path, classes[first], p[0], classes[second], p[1], dark)


def _readable(
    paths: Iterable[Path | str], invert: bool | None, on_unreadable: Callable[[InputError], object]
) -> Iterator[tuple[Path, np.ndarray, bool]]:
    for path in map(Path, paths):
        try:
            image, dark = letter_image.read(path, invert)
        except InputError as error:
            on_unreadable(error)
        else:
            yield path, image, dark


def table(predictions: Iterable[Prediction]) -> str:
    """Return the predictions as a table for a terminal.

    It has one line for each image.
    """
    rows = [("image", "letter", "sure", "or", "sure", "")]
    for p in predictions:
        sure, less_sure = f"{p.probability:{SHARE}}", f"{p.runner_up_probability:{SHARE}}"
        turned = "dark on bright" if p.inverted else ""
        letters = printable(p.letter), printable(p.runner_up)
        rows.append((printable(p.path), letters[0], sure, letters[1], less_sure, turned))
    return "\n".join(aligned(rows))


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Yield the predictions as lines of CSV.

    The first line is a header. Then comes one line for each image. Each line ends with a newline.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        yield text.getvalue()
        text.seek(0)
        text.truncate()
        writer.writerow({**asdict(prediction), "path": printable(prediction.path)})
    yield text.getvalue()
