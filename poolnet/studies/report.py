"""Write the report of a comparison in several formats.

They are text for a terminal, Markdown, a self-contained HTML page, JSON, and a run in MLflow.
"""

import base64
import dataclasses
import importlib.metadata
import math
import statistics
import tempfile
import time
from pathlib import Path

import jinja2
import numpy as np
from mlflow.tracking.client import MlflowClient

from poolnet.data import dataset
from poolnet.data.dataset import LETTERS
from poolnet.errors import InputError
from poolnet.runs.figures import png
from poolnet.stats.paired import Effect
from poolnet.studies import comparison_figures
from poolnet.studies.compare import Arm, Comparison
from poolnet.text import (
    DIGITS,
    NATS,
    POINTS,
    aligned,
    coded,
    interval,
    marked,
    p_value,
    piped,
    spread,
    step,
    to_json,
    wrapped,
)
from poolnet.tracking import addresses, names, pages, result_runs
from poolnet.training.config import ARM_OPTIONS, SAME_RUN

HOW = {  # the figures' titles, and how to read them
    "seeds": (
        "Each training",
        "A dot is a training, a line joins the two of one seed, a bar is the mean. On the right the difference: the "
        "arms are equivalent if it is sure to lie in the green band.",
    ),
    "per_class": (
        "Letter by letter",
        "Difference in accuracy with its 95 % interval, from the same variation as the verdict.",
    ),
    "learning_curves": (
        "Learning curves",
        "Mean over seeds, in a band from the lowest to the highest seed; val solid, train dashed.",
    ),
    "confusion_difference": (
        "Confusions gained and lost",
        "On the diagonal, what the second arm gets right more often; off it, mistakes that it makes more often.",
    ),
    "calibration": (
        "Calibration",
        "How often an arm is right when it is so sure. ECE: expected calibration error, mean over seeds.",
    ),
    "disagreements": (
        "Where the arms disagree most",
        "The test images whose true letter the arms give the most different probability, seeds averaged.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """When and how a report was made."""

    when: str = ""  # as in "2026-11-29 10:31 UTC"
    command: str = ""  # to paste; empty from Python
    serve: str = ""  # the command that serves the pages of the runs; empty for a server

    @property
    def line(self) -> str:
        version = importlib.metadata.version("poolnet")
        return f"Made {self.when} by poolnet {version}{', with' if self.command else '.'}"


# --- the same numbers for all forms -----------------------------------------------------------------------------------


def _arms(c: Comparison) -> list[list[str]]:
    rows = [["arm", "n", "test accuracy", "test loss", "val accuracy"]]
    for arm in (c.a, c.b):
        scores = _scores(arm)
        rows.append(
            [arm.name, str(len(arm.runs)), *(spread(scores[key]) for key in ("test_acc", "test_loss", "val_acc"))]
        )
    return rows


def _scores(arm: Arm) -> dict[str, list[float]]:
    """Return the scores of an arm by name.

    Each list has one value per seed.
    """
    return {
        "test_acc": arm.right.mean(1).tolist(),
        "test_loss": arm.nll.mean(1).tolist(),
        "val_acc": arm.histories["val_acc"][:, -1].tolist(),
        "ece": [each.ece for each in arm.calibration],
    }


def _named_effects(c: Comparison) -> dict[str, tuple[str, Effect]]:
    """Return each effect by name, with a label.

    The first two effects are those of the verdict. The label of another says what alone varies.
    """
    effects = {"acc": ("accuracy, points", c.acc), "nll": ("loss, nats", c.nll)}
    if c.acc_over_seeds and c.nll_over_seeds:
        effects |= {
            "acc_over_seeds": ("points, other seeds", c.acc_over_seeds),
            "nll_over_seeds": ("nats, other seeds", c.nll_over_seeds),
            "acc_over_examples": ("points, other examples", c.acc_over_examples),
            "nll_over_examples": ("nats, other examples", c.nll_over_examples),
        }
    return effects


def _effects(c: Comparison) -> list[list[str]]:
    rows = [["difference", "mean", "95 % interval", "p"]]
    for name, (label, effect) in _named_effects(c).items():
        rows.append([label, *_cells(effect, POINTS if name.startswith("acc") else NATS)])
    return rows


def _cells(effect: Effect, form: str) -> list[str]:
    return [f"{effect.estimate:{form}}", interval(effect.low, effect.high, form), p_value(effect.p)]


def _effects_note(c: Comparison) -> str:
    alone = ", or about those that a row names" if len(c.seeds) > 1 else ""
    return f"{c.b.name} minus {c.a.name}. Intervals and p are about other {c.varied}{alone}."


def _tests(c: Comparison) -> list[str]:
    lines = [
        f"Equivalence within ±{c.margin:g} points, two one-sided tests: p {p_value(c.equivalence_p)}",
        f"Smallest difference that such a design finds four times in five: ±{c.smallest_effect:.2f} points",
    ]
    if c.sign_flip_p is not None:
        lines.append(f"Exact sign-flip test over {len(c.seeds)} seeds, accuracy: p {p_value(c.sign_flip_p)}")
    ece = ", ".join(f"{arm.name} {spread(_scores(arm)['ece'])}" for arm in (c.a, c.b))
    lines.append(f"Expected calibration error (ECE): {ece}")
    ps, only_a, only_b = (
        sorted(values) for values in zip(*((m.p, m.only_a, m.only_b) for m in c.mcnemar), strict=True)
    )
    lines.append(
        f"Exact McNemar test{', seed by seed' if len(ps) > 1 else ''}: examples that only {c.b.name} has right "
        f"{_range(only_b)}, that only {c.a.name} has right {_range(only_a)}; p {_range([p_value(p) for p in ps])}"
    )
    return lines


def _range(values: list) -> str:
    """Return the range of some sorted values as text.

    It goes from the first value to the last.
    """
    return f"{values[0]} to {values[-1]}" if values[0] != values[-1] else f"{values[0]}"


def _classes(c: Comparison) -> list[list[str]]:
    rows = [["letter", "n", "points", "95 % interval", "p", "p, Holm"]]
    for of_class in c.per_class:
        effect = of_class.effect
        if math.isnan(effect.estimate):
            rows.append([LETTERS[of_class.label], str(of_class.n), "-", "-", "-", "-"])
        else:
            row = [LETTERS[of_class.label], f"{of_class.n:,}", *_cells(effect, POINTS), p_value(of_class.p_holm)]
            rows.append(row)
    return rows


def _design(c: Comparison) -> list[str]:
    runs = (*c.a.runs, *c.b.runs)
    values = {name: [str(getattr(arm.runs[0].config, name)) for arm in (c.a, c.b)] for name in SAME_RUN}
    if len(runs) > 2 or values["seed"][0] == values["seed"][1]:
        del values["seed"]
    arms = [
        f"{name} {one} in {c.a.name}, {other} in {c.b.name}" for name, (one, other) in values.items() if one != other
    ]
    equal = [f"{name} {one}" for name, (one, other) in values.items() if one == other]
    pairs = f"seeds {', '.join(map(str, c.seeds))}, each of which gives both arms the same order of images"
    commits = sorted({run.commit[:10] or "unknown" for run in runs})
    return [
        f"The arms differ in: {'; '.join(arms)}.",
        f"Equal in both: {', '.join(equal)}, device {runs[0].device}{'' if 'seed' in values else f'; {pairs}'}.",
        f"Data: {c.data}, SHA-256 {c.data_sha256[:DIGITS]}, {len(c.y):,} test examples, the same for all runs.",
        f"Code: commit {', '.join(commits)}.",
        "Nothing was chosen by the test split here: both arms are scored with their final weights.",
    ]


# --- forms ------------------------------------------------------------------------------------------------------------


def table(c: Comparison) -> str:
    """Return the report as text for a terminal."""
    return "\n".join(
        [
            *wrapped(c.sentence),
            "",
            *aligned(_arms(c)),
            "",
            *aligned(_effects(c)),
            *wrapped(_effects_note(c)),
            "",
            *(line for test in _tests(c) for line in wrapped(test, "  ")),
            *(line for note in c.caveats for line in wrapped(f"Note: {note}", "  ")),
        ]
    )


def markdown(c: Comparison, origin: Origin = Origin()) -> str:
    """Return the report in Markdown.

    It is the description of the run in MLflow, which shows the first lines only until it is unfolded.
    """
    pairs = [(run.name, pages.run(run.experiment_id, run.run_id)) for run in (*c.a.runs, *c.b.runs)]
    lines = [f"**{marked(c.sentence)}**", "", *piped(_arms(c)), "", *piped(_effects(c)), "", marked(_effects_note(c))]
    lines += ["", marked(c.question), "The whole of it, with figures, is the artifact `report.html`."]
    if origin.when:
        lines.append(f"{origin.line} {coded(origin.command)}" if origin.command else origin.line)
    lines += ["", *(f"- {marked(line)}" for line in (*_tests(c), *_design(c), *c.caveats))]
    return "\n".join([*lines, "", ", ".join(pages.in_markdown(*pair) for pair in pairs)])


def html(c: Comparison, pngs: dict[str, bytes], links: dict[str, str], origin: Origin = Origin()) -> str:
    """Return the report as a self-contained HTML page.

    `pngs` are the figures by name, as PNG. `links` are the addresses of run pages by run id.
    """
    figures = [
        {"name": name, "title": HOW[name][0], "how": HOW[name][1], "png": base64.b64encode(png).decode()}
        for name, png in pngs.items()
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return page.render(
        c=c,
        arms=_arms(c),
        arms_note="Mean and standard deviation over seeds." if len(c.seeds) > 1 else "One training an arm.",
        effects=_effects(c),
        effects_note=_effects_note(c),
        tests=_tests(c),
        classes=_classes(c),
        figures=figures,
        disagreements=[] if "disagreements" in pngs else _disagreements(c),
        design=_design(c),
        links=links,
        origin=origin,
    )


def _disagreements(c: Comparison) -> list[list[str]]:
    rows = [["row", "true", c.a.name, c.b.name]]
    for row in comparison_figures.disagreements(c):
        says = [
            f"{letter} {p:.2f}" for letter, p in (comparison_figures.predicted_letter(arm, row) for arm in (c.a, c.b))
        ]
        rows.append([str(row), LETTERS[c.y[row]], *says])
    return rows


def contents(c: Comparison) -> dict:
    """Return the whole comparison as a dictionary for JSON.

    The keys are the names in the JSON file.
    """
    arms = [
        {
            "name": arm.name,
            "options": {name: getattr(arm.runs[0].config, name) for name in ARM_OPTIONS},
            "seeds": [run.config.seed for run in arm.runs],
            "runs": [run.run_id for run in arm.runs],
            **_scores(arm),
        }
        for arm in (c.a, c.b)
    ]
    return {
        "question": c.question,
        "verdict": c.verdict,
        "winner": c.winner,
        "sentence": c.sentence,
        "arms": arms,
        "effects": {name: effect for name, (_, effect) in _named_effects(c).items()},
        "margin_points": c.margin,
        "equivalence_p": c.equivalence_p,
        "smallest_effect_points": c.smallest_effect,
        "sign_flip_p": c.sign_flip_p,
        "mcnemar": c.mcnemar,
        "per_class": [
            {"letter": LETTERS[of_class.label], "n": of_class.n, **vars(of_class.effect), "p_holm": of_class.p_holm}
            for of_class in c.per_class
        ],
        "n_seeds": len(c.seeds),
        "n_examples": len(c.y),
        "seeds": c.seeds,
        "varied": c.varied,
        "data": c.data,
        "data_sha256": c.data_sha256,
        "caveats": c.caveats,
    }


# --- the run in MLflow ------------------------------------------------------------------------------------------------


def publish(client: MlflowClient, uri: str, experiment_id: str, c: Comparison, command: str = "") -> str:
    """Save the comparison as a run in MLflow.

    `command` is what the user typed. Returns the id of this run.
    """
    step("Drawing and uploading the report")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    origin = Origin(when, addresses.hidden(command), pages.serving(uri))
    tags = {names.COMPARISON: c.verdict, names.DATA_SHA256: c.data_sha256, names.NOTE: markdown(c, origin)}
    params = {"arm_a": c.a.name, "arm_b": c.b.name, "verdict": c.verdict}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(c, folder, uri, origin)
        with result_runs.run(client, experiment_id, "compare", c.name) as run_id:
            result_runs.log(client, run_id, metrics=_metrics(c), params=params, tags=tags, folder=folder)
    return run_id


def _write(c: Comparison, folder: Path, uri: str, origin: Origin) -> None:
    """Write the run's artifacts: page, numbers and figures."""
    runs = (*c.a.runs, *c.b.runs)
    links = {run.run_id: pages.address(uri, pages.run(run.experiment_id, run.run_id)) for run in runs}
    pngs = _drawn(c)
    (folder / "figures").mkdir()
    for name, content in pngs.items():
        (folder / "figures" / f"{name}.png").write_bytes(content)
    (folder / "report.html").write_text(html(c, pngs, links, origin), encoding="utf-8")
    (folder / "comparison.json").write_text(to_json(contents(c), indent=1), encoding="utf-8")


def _metrics(c: Comparison) -> dict[str, float]:
    values = {"n_seeds": len(c.seeds), "n_examples": len(c.y), "p_equivalence": c.equivalence_p}
    values |= {"smallest_effect_points": c.smallest_effect, "margin_points": c.margin}
    for unit, effect in (("points", c.acc), ("nats", c.nll)):
        values |= {f"effect_{unit}": effect.estimate, f"effect_{unit}_low": effect.low}
        values |= {f"effect_{unit}_high": effect.high, f"p_{unit}": effect.p}
    if c.sign_flip_p is not None:
        values["p_sign_flip"] = c.sign_flip_p
    for letter, arm in (("a", c.a), ("b", c.b)):
        values |= {f"{letter}_{name}_mean": statistics.mean(scores) for name, scores in _scores(arm).items()}
    return names.section("compare", values)


def _drawn(c: Comparison) -> dict[str, bytes]:
    return {name: png(figure) for name, figure in comparison_figures.of_comparison(c, _images(c)).items()}


def _images(c: Comparison) -> np.ndarray | None:
    """Return the images on which the arms disagree most.

    Returns None if the data set that the runs name is not on this machine, or is no longer the same.
    """
    try:
        splits = dataset.open_dataset(dataset.locate(c.a.runs[0].config.data))
    except InputError:
        return None
    if splits.sha256 != c.data_sha256:
        return None
    return splits.test.images(comparison_figures.disagreements(c))[:, 0]
