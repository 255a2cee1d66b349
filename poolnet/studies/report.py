"""Write the report of a comparison in several formats.

They are text for a terminal, Markdown, a self-contained HTML page, JSON, and a run in MLflow.
"""

import base64
import dataclasses
import importlib.metadata
import tempfile
import time
from pathlib import Path

import jinja2
import numpy as np
from mlflow.tracking.client import MlflowClient

from poolnet.data import dataset, folds
from poolnet.data.dataset import SPLITS
from poolnet.errors import InputError
from poolnet.runs.figures import png
from poolnet.secret import hidden
from poolnet.studies import comparison_figures, page
from poolnet.studies.comparison import Comparison, Design, Ranking
from poolnet.text import aligned, coded, marked, piped, step, to_json, wrapped
from poolnet.tracking import names, pages, result_runs

HOW = {  # the figures' titles, and how to read them
    "seeds": (
        "Each training",
        "A dot is a training, a line joins the two of one seed, a bar is the mean. On the right the difference, with "
        "its 95 % interval and, thick, the 90 % interval: the arms are equivalent if that lies in the green band.",
    ),
    "intervals": (
        "Which arms differ",
        "The difference of each pair with its 95 % interval; all of them hold at once. Where an interval holds 0, the "
        "two may be equally good.",
    ),
    "per_class": (
        "Class by class",
        "Difference in accuracy with its 95 % interval, from the same variation as the verdict.",
    ),
    "learning_curves": (
        "Learning curves",
        "Mean over trainings, in a band from the lowest to the highest; val solid, train dashed.",
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
        "The test images whose true class the arms give the most different probability, seeds averaged.",
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


# --- forms ------------------------------------------------------------------------------------------------------------


def table(found: Comparison | Ranking) -> str:
    """Return the report as text for a terminal."""
    says = page.of(found)
    optimum = []
    if says.optimum:
        optimum = [*aligned(says.optimum), "", *aligned(says.optimum_effects), *wrapped(says.optimum_note), ""]
    return "\n".join(
        [
            *wrapped(found.sentence),
            "",
            *aligned(says.arms),
            "",
            *aligned(says.effects),
            *wrapped(says.effects_note),
            "",
            *optimum,
            *(line for test in says.tests for line in wrapped(test, "  ")),
            *(line for note in found.caveats for line in wrapped(f"Note: {note}", "  ")),
        ]
    )


def markdown(found: Comparison | Ranking, origin: Origin = Origin()) -> str:
    """Return the report in Markdown.

    It is the description of the run in MLflow, which shows the first lines only until it is unfolded.
    """
    says = page.of(found)
    pairs = [(run.name, pages.run(run.experiment_id, run.run_id)) for run in found.runs]
    lines = [f"**{marked(found.sentence)}**", "", *piped(says.arms), "", *piped(says.effects), ""]
    lines += [marked(says.effects_note), ""]
    if says.optimum:
        lines += [*piped(says.optimum), "", *piped(says.optimum_effects), "", marked(says.optimum_note), ""]
    lines += [marked(found.question), "The whole of it, with figures, is the artifact `report.html`."]
    if origin.when:
        lines.append(f"{origin.line} {coded(origin.command)}" if origin.command else origin.line)
    lines += ["", *(f"- {marked(line)}" for line in (*says.tests, *says.design, *found.caveats))]
    text, links = "\n".join([*lines, "", ""]), ", ".join(pages.in_markdown(*pair) for pair in pairs)
    return text + (links if len(text + links) <= names.NOTE_LIMIT else f"The page has links to all {len(pairs)} runs.")


def html(found: Comparison | Ranking, pngs: dict[str, bytes], links: dict[str, str], origin: Origin = Origin()) -> str:
    """Return the report as a self-contained HTML page.

    `pngs` are the figures by name, as PNG. `links` are the addresses of run pages by run id.
    """
    figures = [
        {"name": name, "title": HOW[name][0], "how": HOW[name][1], "png": base64.b64encode(content).decode()}
        for name, content in pngs.items()
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    listed = isinstance(found, Comparison) and "disagreements" not in pngs
    return template.render(
        c=found,
        page=page.of(found),
        figures=figures,
        disagreements=_disagreements(found) if listed and isinstance(found, Comparison) else [],
        links=links,
        origin=origin,
    )


def _disagreements(c: Comparison) -> list[list[str]]:
    rows = [["row", "true", c.a.name, c.b.name]]
    for row in comparison_figures.disagreements(c):
        says = (comparison_figures.predicted_class(c, arm, row) for arm in c.arms)
        rows.append([str(row), c.classes[c.y[row]], *(f"{name} {p:.2f}" for name, p in says)])
    return rows


# --- the run in MLflow ------------------------------------------------------------------------------------------------


def publish(client: MlflowClient, uri: str, experiment_id: str, found: Comparison | Ranking, command: str = "") -> str:
    """Save the comparison as a run in MLflow.

    `command` is what the user typed. Returns the id of this run.
    """
    step("Drawing and uploading the report")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    origin = Origin(when, hidden(command), pages.serving(uri))
    tags = {names.COMPARISON: found.verdict, names.DATA_SHA256: found.data_sha256, names.NOTE: markdown(found, origin)}
    params = {f"arm_{letter}": arm.name for letter, arm in zip("abcdefghij", found.arms, strict=False)}
    params |= {"verdict": found.verdict, "primary": found.primary}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(found, folder, uri, origin)
        with result_runs.run(client, experiment_id, "compare", found.name) as run_id:
            result_runs.log(client, run_id, metrics=page.metrics(found), params=params, tags=tags, folder=folder)
    return run_id


def _write(found: Comparison | Ranking, folder: Path, uri: str, origin: Origin) -> None:
    """Write the run's artifacts: page, numbers and figures."""
    links = {run.run_id: pages.address(uri, pages.run(run.experiment_id, run.run_id)) for run in found.runs}
    pngs = _drawn(found)
    (folder / "figures").mkdir()
    for name, content in pngs.items():
        (folder / "figures" / f"{name}.png").write_bytes(content)
    (folder / "report.html").write_text(html(found, pngs, links, origin), encoding="utf-8")
    (folder / "comparison.json").write_text(to_json(page.contents(found), indent=1), encoding="utf-8")


def _drawn(found: Comparison | Ranking) -> dict[str, bytes]:
    if isinstance(found, Ranking):
        drawn = comparison_figures.of_ranking(found)
    else:
        drawn = comparison_figures.of_comparison(found, _images(found, comparison_figures.disagreements(found)))
    return {name: png(figure) for name, figure in drawn.items()}


def _images(found: Design, rows: np.ndarray) -> np.ndarray | None:
    """Return the test images in some rows, of all folds.

    Returns None if the data set that the runs name is not on this machine, or is no longer the same.
    """
    try:
        splits = dataset.open_dataset(dataset.locate(found.runs[0].config.data), SPLITS if found.folds else ("test",))
    except InputError:
        return None
    if splits.sha256 != found.data_sha256:
        return None
    tests = [folds.take(splits, fold)[0].test for fold in found.folds] if found.folds else [splits.test]
    pixels = np.concatenate([test.X for test in tests if test.X is not None])
    return dataset.as_images(pixels[rows])[:, 0]
