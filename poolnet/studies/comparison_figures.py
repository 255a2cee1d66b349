"""Draw the figures of a comparison of two arms or more.

Each arm has the same colour in all figures. Of two arms, differences are the second minus the first.
"""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import softmax

from poolnet.runs.figures import drawable, grid
from poolnet.stats.many import Contrast
from poolnet.stats.paired import ALPHA, Effect, smallest_margin
from poolnet.stats.scores import confusion_matrix
from poolnet.studies.comparison import UNITS, Arm, Comparison, Design, Ranking

# told apart by the colour-blind too (Okabe & Ito); more than seven arms differ by the line as well
A, B = "#0072b2", "#d55e00"
COLOURS = (A, B, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BOTH, QUIET = "#333333", "#999999"


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


def of_ranking(r: Ranking) -> dict[str, Figure]:
    """Draw all figures of a comparison of more than two arms."""
    return {"intervals": intervals(r), "learning_curves": learning_curves(r), "calibration": calibration(r)}


def _coloured(found: Design) -> list[tuple[Arm, str]]:
    return [(arm, COLOURS[place % len(COLOURS)]) for place, arm in enumerate(found.arms)]


def intervals(r: Ranking) -> Figure:
    """Draw the difference of each pair of arms with its interval.

    Accuracy is on the left, loss on the right. What the optimum gives is drawn below, lighter, if the runs have it.
    """
    figure = Figure(figsize=(10, 1.4 + 0.45 * len(r.acc)), layout="constrained")
    rows = (("accuracy", r.acc, r.acc_at_optimum), ("loss", r.nll, r.nll_at_optimum))
    for axes, (measure, trained, at_optimum) in zip(figure.subplots(1, 2, sharey=True), rows, strict=True):
        axes.axvline(0, color=BOTH, linewidth=0.8)
        _points_and_intervals(axes, trained, 0.0, BOTH, "after the training")
        _points_and_intervals(axes, at_optimum, 0.28, QUIET, "at the lowest train loss")
        axes.set_xlabel(f"{measure}, difference in {UNITS[measure][0]}")
        axes.grid(axis="x", alpha=0.3)
    pairs = [f"{_name(r.arms[each.b])} minus {_name(r.arms[each.a])}" for each in r.acc]
    axes.set_yticks(range(len(pairs)), pairs)
    axes.invert_yaxis()
    if r.acc_at_optimum:
        figure.axes[0].legend(fontsize=8)
    return figure


def _points_and_intervals(axes: Axes, contrasts: tuple[Contrast, ...], lower: float, colour: str, label: str) -> None:
    if contrasts:
        effects = [each.effect for each in contrasts]
        places = np.arange(len(effects)) + lower
        axes.errorbar(
            [each.estimate for each in effects], places, xerr=np.hstack([_reach(each) for each in effects]),
            fmt="o", color=colour, capsize=4, markersize=4, label=label,
        )  # fmt: skip


def _reach(effect: Effect) -> list[list[float]]:
    """Return how far an interval reaches down and up, for errorbar."""
    return [[effect.estimate - effect.low], [effect.high - effect.estimate]]


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
    unit = UNITS[c.primary][0]
    difference.axhspan(-c.margin, c.margin, color="#009e73", alpha=0.15, label=f"equivalent: ±{c.margin:g}")
    difference.axhline(0, color=BOTH, linewidth=0.8)
    by_seed = c.difference(c.primary, c.a, c.b).mean(1)
    difference.plot(_spread_out(len(by_seed)), by_seed, "o", color=QUIET, markersize=4, label="a seed")
    half = smallest_margin(c.effect)  # of the interval that the test of equivalence uses
    ends, reach = [c.effect.estimate - half, c.effect.estimate + half], _reach(c.effect)
    difference.plot([0.5, 0.5], ends, color=BOTH, linewidth=5, alpha=0.4, solid_capstyle="butt", label="90 % interval")
    difference.errorbar([0.5], [c.effect.estimate], reach, fmt="D", color=BOTH, capsize=6, label="mean, 95 % interval")
    difference.set(xlim=(-0.6, 1), xticks=[], ylabel=f"difference ({unit} of {c.primary})")
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
    axes.plot([0, 1], values, color=QUIET, linewidth=0.8, zorder=1)
    for place, scores, colour in zip((0, 1), values, (A, B), strict=True):
        axes.scatter(np.full(len(scores), place), scores, color=colour, s=22, zorder=2)
        axes.plot([place - 0.16, place + 0.16], [scores.mean()] * 2, color=colour, linewidth=2.5)
    axes.set(xlim=(-0.5, 1.5), ylabel=label)
    axes.set_xticks([0, 1], [textwrap.fill(_name(arm), 12) for arm in (c.a, c.b)])
    axes.grid(axis="y", alpha=0.3)


def per_class(c: Comparison) -> Figure:
    """Draw each class's difference in accuracy with its interval."""
    figure = Figure(figsize=(10, 3.8))
    axes = figure.add_axes((0.07, 0.13, 0.92, 0.79))
    axes.axhline(0, color=BOTH, linewidth=0.8)
    for place, of_class in enumerate(c.per_class):
        effect, sure = of_class.effect, of_class.p_holm < ALPHA
        if np.isnan(effect.estimate):
            continue
        colour = (B if effect.estimate > 0 else A) if sure else QUIET
        axes.errorbar([place], [effect.estimate], _reach(effect), fmt="o", color=colour, capsize=5)
    names = [f"{textwrap.fill(drawable(c.classes[each.label]), 10)}\nn={each.n:,}" for each in c.per_class]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("difference (points)")
    axes.set_title(f"{_difference(c)}; in colour where Holm's p < 0.05", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    return figure


def learning_curves(c: Design) -> Figure:
    """Draw loss and accuracy of all arms by epoch.

    A line is the mean over trainings. A band goes from the lowest to the highest.
    """
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.075, right=0.995, bottom=0.13, top=0.97, wspace=0.17)
    for axes, kind, label in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss (nats)", "accuracy"), strict=True):
        for arm, colour in _coloured(c):
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
    figure = Figure(figsize=(7.4, 6.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(difference, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for row, column in np.ndindex(difference.shape):
        value = difference[row, column]
        if round(value, 1):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(textwrap.fill(f"{_difference(c)}, test images, mean over seeds", 70), fontsize=10)
    labels = [drawable(name) for name in c.classes]
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, label="images", shrink=0.8)
    return figure


def _confusion(arm: Arm, y: np.ndarray) -> np.ndarray:
    return np.mean([confusion_matrix(y, logits.argmax(1)) for logits in arm.logits], axis=0)


def calibration(c: Design) -> Figure:
    """Draw the calibration of all arms.

    The upper panel shows how often an arm is right at each level of confidence. The lower panel shows how often it has
    this confidence. All seeds are taken together.
    """
    figure = Figure(figsize=(7.4, 5.6))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.1, top=0.94, hspace=0.08)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=BOTH, linestyle=":", linewidth=1)
    bins, width = len(c.arms[0].calibration[0].counts), 0.8 / len(c.arms)
    for place, (arm, colour) in enumerate(_coloured(c)):
        counts = np.array([each.counts for each in arm.calibration])
        total, filled = counts.sum(0), counts.sum(0) > 0
        sure, right = (
            np.nansum(counts * np.array([getattr(each, name) for each in arm.calibration]), axis=0)[filled]
            / total[filled]
            for name in ("confidence", "accuracy")
        )
        ece = np.mean([each.ece for each in arm.calibration])
        upper.plot(sure, right, "o-", color=colour, label=f"ECE {ece:.4f}: {_name(arm)}", markersize=4)
        places = (np.arange(bins) + 0.1 + (place + 0.5) * width) / bins
        lower.bar(places, total / total.sum(), width / bins, color=colour)
    upper.set(ylabel="share that is right", ylim=(-0.03, 1.03), title="below the dotted line: surer than right")
    lower.set(xlabel="probability of the class that is said", ylabel="share of images")
    upper.legend()
    upper.grid(alpha=0.3)
    return figure


def disagreements(c: Comparison, k: int = 24) -> np.ndarray:
    """Return the test examples on which the arms disagree most.

    The result has their row numbers (k,). On these examples the probability of the true class, averaged over seeds,
    differs most between the arms.
    """
    a, b = (_probabilities(arm)[np.arange(len(c.y)), c.y] for arm in (c.a, c.b))
    return np.argsort(-np.abs(b - a), kind="stable")[:k]


def predicted_class(c: Design, arm: Arm, row: int) -> tuple[str, float]:
    """Return an arm's prediction for one test example.

    It is a class and its probability, averaged over seeds.
    """
    mean = softmax(arm.logits[:, row].astype(np.float64), axis=-1).mean(0)
    return c.classes[mean.argmax()], float(mean.max())


def _probabilities(arm: Arm) -> np.ndarray:
    return np.mean([softmax(logits.astype(np.float64), axis=1) for logits in arm.logits], axis=0)


def disagreement_images(c: Comparison, images: np.ndarray, columns: int = 8) -> Figure:
    """Draw images with the true class and both predictions."""
    titles = []
    for row in disagreements(c, len(images)):
        (one, p), (other, q) = (predicted_class(c, arm, row) for arm in c.arms)
        one, other, true = (drawable(name[:12]) for name in (one, other, c.classes[c.y[row]]))
        titles.append(f"{true}\n{one} {p:.2f} | {other} {q:.2f}")
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 1.25, rows * 1.55 + 0.5))
    figure.suptitle(f"true class; what {_name(c.a)} | {_name(c.b)} say", fontsize=10)
    grid(figure, (0.01, 0.01, 0.98, 0.92), images, titles, columns, (4, 12), fontsize=8, cmap="gray")
    return figure
