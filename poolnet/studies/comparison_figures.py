"""Draw the figures of a comparison of two arms.

Each arm has the same colour in all figures. Differences are the second arm minus the first.
"""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import softmax

from poolnet.data.dataset import LETTERS
from poolnet.runs.figures import drawable, grid
from poolnet.stats.paired import ALPHA
from poolnet.stats.scores import confusion_matrix
from poolnet.studies.compare import Arm, Comparison

A, B, BOTH = "#0072b2", "#d55e00", "#333333"  # told apart by the colour-blind too (Okabe & Ito)


def of_comparison(c: Comparison, images: np.ndarray | None = None) -> dict[str, Figure]:
    """Draw all figures of a comparison, by file name.

    The file names have no suffix. `images` are those of `disagreements(c)`, (k, 28, 28), if the data set is available.
    """
    drawn = {
        "seeds": seeds(c),
        "per_class": per_class(c),
        "learning_curves": learning_curves(c),
        "confusion_difference": confusion_difference(c),
        "calibration": calibration(c),
    }
    return drawn if images is None else {**drawn, "disagreements": disagreement_images(c, images)}


def _name(arm: Arm) -> str:
    return drawable(arm.name)


def _difference(c: Comparison) -> str:
    return f"{_name(c.b)} minus {_name(c.a)}"


def seeds(c: Comparison) -> Figure:
    """Draw accuracy, loss and accuracy difference of each seed.

    Each training is a dot, and a line joins the two trainings of one seed. The last panel shows the difference in
    accuracy with its interval.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    accuracy, loss, difference = figure.subplots(1, 3)
    _paired(accuracy, c, [100 * arm.right.mean(1) for arm in (c.a, c.b)], "test accuracy (%)")
    _paired(loss, c, [arm.nll.mean(1) for arm in (c.a, c.b)], "test loss (nats)")
    difference.axhspan(-c.margin, c.margin, color="#009e73", alpha=0.15, label=f"equivalent: ±{c.margin:g}")
    difference.axhline(0, color=BOTH, linewidth=0.8)
    by_seed = 100 * (c.b.right.mean(1) - c.a.right.mean(1))
    difference.plot(_spread_out(len(by_seed)), by_seed, "o", color="#999999", markersize=4, label="a seed")
    reach = [[c.acc.estimate - c.acc.low], [c.acc.high - c.acc.estimate]]
    difference.errorbar([0.5], [c.acc.estimate], reach, fmt="D", color=BOTH, capsize=6, label="mean, 95 % interval")
    difference.set(xlim=(-0.6, 1), xticks=[], ylabel="difference (points of accuracy)")
    difference.set_title(textwrap.fill(_difference(c), 30), fontsize=10)
    difference.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.02))  # beside the interval, not on it
    difference.grid(alpha=0.3)
    return figure


def _spread_out(n: int) -> np.ndarray:
    """Return horizontal positions for n dots side by side.

    So equal values do not hide one another.
    """
    return np.linspace(-0.2, 0.2, n) if n > 1 else np.zeros(1)


def _paired(axes: Axes, c: Comparison, values: list[np.ndarray], label: str) -> None:
    axes.plot([0, 1], values, color="#999999", linewidth=0.8, zorder=1)
    for place, scores, colour in zip((0, 1), values, (A, B), strict=True):
        axes.scatter(np.full(len(scores), place), scores, color=colour, s=22, zorder=2)
        axes.plot([place - 0.16, place + 0.16], [scores.mean()] * 2, color=colour, linewidth=2.5)
    axes.set(xlim=(-0.5, 1.5), ylabel=label)
    axes.set_xticks([0, 1], [textwrap.fill(_name(arm), 12) for arm in (c.a, c.b)])
    axes.grid(axis="y", alpha=0.3)


def per_class(c: Comparison) -> Figure:
    """Draw each letter's difference in accuracy with its interval."""
    figure = Figure(figsize=(10, 3.8))
    axes = figure.add_axes((0.07, 0.13, 0.92, 0.79))
    axes.axhline(0, color=BOTH, linewidth=0.8)
    for place, of_class in enumerate(c.per_class):
        effect, sure = of_class.effect, of_class.p_holm < ALPHA
        if np.isnan(effect.estimate):
            continue
        reach = [[effect.estimate - effect.low], [effect.high - effect.estimate]]
        colour = (B if effect.estimate > 0 else A) if sure else "#999999"
        axes.errorbar([place], [effect.estimate], reach, fmt="o", color=colour, capsize=5)
    names = [f"{LETTERS[of_class.label]}\nn={of_class.n:,}" for of_class in c.per_class]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("difference (points)")
    axes.set_title(f"{_difference(c)}; in colour where Holm's p < 0.05", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    return figure


def learning_curves(c: Comparison) -> Figure:
    """Draw loss and accuracy of both arms by epoch.

    A line is the mean over seeds. A band goes from the lowest to the highest seed.
    """
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.06, right=0.995, bottom=0.13, top=0.97, wspace=0.15)
    for axes, kind, label in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss (nats)", "accuracy"), strict=True):
        for arm, colour in ((c.a, A), (c.b, B)):
            for split, style in (("val", "-"), ("train", "--")):
                values = arm.histories[f"{split}_{kind}"]
                epochs = np.arange(1, values.shape[1] + 1)
                axes.plot(epochs, values.mean(0), style, color=colour, label=f"{split}, {_name(arm)}", linewidth=1.4)
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def confusion_difference(c: Comparison) -> Figure:
    """Draw the difference of the arms' confusion matrices.

    Each cell shows how many more test images `b` puts there than `a`, as an average per run. The diagonal shows right
    answers.
    """
    difference = _confusion(c.b, c.y) - _confusion(c.a, c.y)
    limit = max(np.abs(difference).max(), 1)
    figure = Figure(figsize=(7.4, 6.2))
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.08, top=0.92)
    axes = figure.subplots()
    image = axes.imshow(difference, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for row, column in np.ndindex(difference.shape):
        value = difference[row, column]
        if round(value, 1):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(textwrap.fill(f"{_difference(c)}, test images a run", 70), fontsize=10)
    axes.set_xticks(range(len(LETTERS)), LETTERS)
    axes.set_yticks(range(len(LETTERS)), LETTERS)
    figure.colorbar(image, label="images", shrink=0.8)
    return figure


def _confusion(arm: Arm, y: np.ndarray) -> np.ndarray:
    return np.mean([confusion_matrix(y, logits.argmax(1)) for logits in arm.logits], axis=0)


def calibration(c: Comparison) -> Figure:
    """Draw the calibration of both arms.

    The upper panel shows how often an arm is right at each level of confidence. The lower panel shows how often it has
    this confidence. All seeds are taken together.
    """
    figure = Figure(figsize=(7.4, 5.6))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.1, top=0.94, hspace=0.08)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=BOTH, linestyle=":", linewidth=1)
    bins = len(c.a.calibration[0].counts)
    for arm, colour, shift in ((c.a, A, -0.2), (c.b, B, 0.2)):
        counts = np.array([each.counts for each in arm.calibration])
        total, filled = counts.sum(0), counts.sum(0) > 0
        sure, right = (
            np.nansum(counts * np.array([getattr(each, name) for each in arm.calibration]), axis=0)[filled]
            / total[filled]
            for name in ("confidence", "accuracy")
        )
        ece = np.mean([each.ece for each in arm.calibration])
        upper.plot(sure, right, "o-", color=colour, label=f"ECE {ece:.4f}: {_name(arm)}", markersize=4)
        places = (np.arange(bins) + 0.5 + shift) / bins
        lower.bar(places, total / total.sum(), 0.4 / bins, color=colour)
    upper.set(ylabel="share that is right", ylim=(-0.03, 1.03), title="below the dotted line: surer than right")
    lower.set(xlabel="probability of the letter that is said", ylabel="share of images")
    upper.legend()
    upper.grid(alpha=0.3)
    return figure


def disagreements(c: Comparison, k: int = 24) -> np.ndarray:
    """Return the test examples on which the arms disagree most.

    The result has their row numbers (k,). On these examples the probability of the true letter, averaged over seeds,
    differs most between the arms.
    """
    a, b = (_probabilities(arm)[np.arange(len(c.y)), c.y] for arm in (c.a, c.b))
    return np.argsort(-np.abs(b - a), kind="stable")[:k]


def predicted_letter(arm: Arm, row: int) -> tuple[str, float]:
    """Return an arm's prediction for one test example.

    It is a letter and its probability, averaged over seeds.
    """
    mean = softmax(arm.logits[:, row].astype(np.float64), axis=-1).mean(0)
    return LETTERS[mean.argmax()], float(mean.max())


def _probabilities(arm: Arm) -> np.ndarray:
    return np.mean([softmax(logits.astype(np.float64), axis=1) for logits in arm.logits], axis=0)


def disagreement_images(c: Comparison, images: np.ndarray, columns: int = 8) -> Figure:
    """Draw images with the true letter and both predictions."""
    titles = []
    for row in disagreements(c, len(images)):
        (one, p), (other, q) = predicted_letter(c.a, row), predicted_letter(c.b, row)
        titles.append(f"{LETTERS[c.y[row]]}\n{one} {p:.2f} | {other} {q:.2f}")
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 1.25, rows * 1.55 + 0.5))
    figure.suptitle(f"true letter; what {_name(c.a)} | {_name(c.b)} say", fontsize=10)
    grid(figure, (0.01, 0.01, 0.98, 0.92), images, titles, columns, (4, 12), fontsize=8, cmap="gray")
    return figure
