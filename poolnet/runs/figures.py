"""Draw the figures of a run.

They need no display and do not use matplotlib's global state. The places of axes are fixed, and a grid of images is
drawn as one image. To lay out axes automatically and to draw forty of them took ten times as long.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from scipy.special import log_softmax

from poolnet.data.dataset import Dataset, Split
from poolnet.files import replacing
from poolnet.stats import scores
from poolnet.training.config import TrainConfig
from poolnet.training.evaluation import Evaluation
from poolnet.training.train_loop import EpochRecord, FitResult

_GLYPHS = FT2Font(findfont("DejaVu Sans")).get_charmap()  # of matplotlib's own font: code point -> glyph
LONGEST = 12  # signs of a class's name
TRAIN, VAL, TEST = "#0072b2", "#d55e00", "#333333"  # told apart by the colour-blind too (Okabe & Ito)


def of_run(config: TrainConfig, splits: Dataset, result: FitResult, lowest: float | None) -> dict[str, Figure]:
    """Draw the figures of a finished run, by file name.

    `lowest` is the lowest train loss, if it is known.
    """
    fold = f", fold {config.fold}" if config.fold else ""
    title = drawable(f"{config.pool} on {splits.name}{fold}, seed {config.seed}")
    weight = result.model.classifier.weight.detach().cpu().numpy()
    worst = f"{title}: highest test losses, true class and what is said"
    return {
        "learning_curves": learning_curves(result.history, result.test, lowest, title),
        "confusion_matrix": confusion_matrix(result.test, f"{title}: test", splits.classes),
        "classifier_weights": classifier_weights(weight, f"{title}: classifier weights", splits.classes),
        "worst_mistakes": worst_mistakes(result.test, splits.test, worst, splits.classes),
    }


def save_all(folder: Path, figures: dict[str, Figure]) -> None:
    """Write figures as PNG files, each of them whole or not at all.

    The folder is made if it is missing, but nothing above it: that is of a run that another process has just pruned.
    """
    pngs = {name: png(figure) for name, figure in figures.items()}
    folder.mkdir(exist_ok=True)
    for name, content in pngs.items():
        with replacing(folder / f"{name}.png") as part:
            part.write_bytes(content)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def drawable(text: str) -> str:
    """Escape text so that matplotlib can draw it.

    A `$` does not begin a formula. Characters for which the font has no glyph are escaped.
    """
    return "".join(char if ord(char) in _GLYPHS else ascii(char)[1:-1] for char in text).replace("$", r"\$")


def learning_curves(history: Iterable[EpochRecord], test: Evaluation, lowest: float | None, title: str) -> Figure:
    """Draw loss and accuracy over the epochs.

    The curves are for train and val. Horizontal lines show the test score and, if `lowest` is given, the lowest train
    loss.
    """
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.88, wspace=0.2)
    figure.suptitle(title)
    epochs = [record.epoch for record in history]
    for axes, kind, label, level in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("loss (nats)", "accuracy"), (test.loss, test.acc), strict=True
    ):
        for split, colour in (("train", TRAIN), ("val", VAL)):
            values = [getattr(record, f"{split}_{kind}") for record in history]
            axes.plot(epochs, values, color=colour, label=split, marker="o", markersize=3)
        axes.axhline(level, color=TEST, linestyle=":", label=f"test, final weights: {level:.4f}")
        if lowest is not None and kind == "loss":
            axes.axhline(lowest, color=TRAIN, linestyle="--", label=f"lowest train loss: {lowest:.4f}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def labels_of(classes: Iterable[str]) -> list[str]:
    """Return names of classes that fit beside a figure."""
    names = map(drawable, classes)
    return [
        name if len(name) <= LONGEST else name[: LONGEST - 1].rstrip("\\") + "\N{HORIZONTAL ELLIPSIS}" for name in names
    ]


def confusion_matrix(evaluation: Evaluation, title: str, classes: Iterable[str]) -> Figure:
    """Draw the confusion matrix of an evaluation.

    Rows are the true classes. Shades are shares of a row. Numbers are counts of images.
    """
    labels = labels_of(classes)
    are_long = max(map(len, labels)) > 2
    counts = scores.confusion_matrix(evaluation.y, evaluation.logits.argmax(1))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6.4))
    margin = 0.17 if are_long else 0.07
    figure.subplots_adjust(left=margin + 0.01, right=0.99, bottom=margin, top=0.94)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # the few mistakes are what one looks for
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(labels)), labels)
    for label in axes.get_xticklabels() if are_long else ():
        label.set(rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, label="share of the row", shrink=0.8)
    return figure


def classifier_weights(weight: np.ndarray, title: str, classes: Iterable[str]) -> Figure:
    """Draw the classifier weights as one image per class.

    `weight` is that of the linear layer, (10, channels * 49). The image of a class is 7x7. Several channels are shown
    by their L2 norm.
    """
    maps = weight.reshape(len(weight), -1, 7, 7)
    signed = maps.shape[1] == 1
    maps = maps[:, 0] if signed else np.sqrt((maps**2).sum(1))
    limit = np.abs(maps).max()
    cmap, low = ("RdBu_r", -limit) if signed else ("viridis", 0)
    figure = Figure(figsize=(10, 4.6))
    figure.suptitle(title)
    image = grid(figure, (0.02, 0.03, 0.86, 0.88), maps, labels_of(classes), 5, (1, 2), cmap=cmap, vmin=low, vmax=limit)
    label = "weight: red speaks for the class" if signed else "weight, L2 norm over channels"
    figure.colorbar(image, cax=figure.add_axes((0.905, 0.06, 0.015, 0.8)), label=label)
    return figure


def worst_mistakes(
    evaluation: Evaluation, split: Split, title: str, classes: Iterable[str], rows: int = 4, columns: int = 8
) -> Figure:
    """Draw the images with the highest loss.

    The title of an image has its label, the class that the model predicts, and the probability of this class.
    """
    labels = labels_of(classes)
    are_long = max(map(len, labels)) > 2
    between = "\n" if are_long else " "
    log_probs = log_softmax(evaluation.logits.astype(np.float64), axis=1)
    losses = -log_probs[np.arange(len(split)), split.y]
    worst = np.argsort(-losses, kind="stable")[: rows * columns]
    predicted = evaluation.logits[worst].argmax(1)
    probabilities = np.exp(log_probs[worst, predicted])
    titles = [
        f"{labels[true]}, said{between}{labels[said]} {probability:.2f}"
        for true, said, probability in zip(split.y[worst], predicted, probabilities, strict=True)
    ]
    figure = Figure(figsize=(columns * 1.2, rows * 1.5 + 0.6))
    figure.suptitle(title)
    images = split.images(worst)[:, 0]
    fontsize = 6.5 if are_long else 8
    grid(figure, (0.01, 0.01, 0.98, 0.9), images, titles, columns, (4, 9), fontsize)
    return figure


def grid(
    figure: Figure,
    place: tuple[float, float, float, float],
    images: np.ndarray,
    titles: Iterable[str],
    columns: int,
    gap: tuple[int, int],
    fontsize: float = 12,
    cmap: str = "gray",
    vmin: float | None = None,
    vmax: float | None = None,
) -> AxesImage:
    """Draw a grid of images as one image.

    `images` is (N, H, W). Each image is below its title. `gap` is the number of pixels between images, across and down.
    """
    (height, width), (across, down) = images.shape[1:], gap
    rows = max(-(-len(images) // columns), 1)
    whole = np.full((rows * (height + down), columns * (width + across)), np.nan)
    axes = figure.add_axes(place)
    axes.set_axis_off()
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(index, columns)
        top, left = row * (height + down) + down, column * (width + across)
        whole[top : top + height, left : left + width] = image
        axes.text(left + (width - 1) / 2, top - 0.5 - 0.2 * down, title, ha="center", fontsize=fontsize)
    return axes.imshow(whole, interpolation="nearest", cmap=cmap, vmin=vmin, vmax=vmax)
