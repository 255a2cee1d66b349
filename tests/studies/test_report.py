"""The report of a comparison: what it says in each form, with few seeds and many, and with names that bite."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from matplotlib.text import Text

from poolnet.stats import paired
from poolnet.studies import compare, comparison_figures, page, report
from poolnet.studies.comparison import Arm, Design, Scored
from poolnet.text import WIDTH, to_json
from poolnet.tracking.training_runs import TrainingRun
from poolnet.training.config import TrainConfig

N = 300
DRAWN = set(report.HOW) - {"disagreements", "intervals"}  # of two arms whose data set is nowhere


def arm(name, seeds, accuracy, rng, y):
    runs = tuple(
        TrainingRun(f"{name}-{seed:02d}", "7", f"max-seed{seed}-0000000{seed % 10}", "FINISHED", seed,
                 TrainConfig(data="nowhere.npz", epochs=2, seed=seed), "cpu", "letters", "5" * 64, "c0ffee", {})
        for seed in range(1, seeds + 1)
    )  # fmt: skip
    logits = rng.normal(0, 1, (seeds, N, 10)).astype(np.float32)
    right = rng.random((seeds, N)) < accuracy
    logits[np.arange(seeds)[:, None], np.arange(N), np.where(right, y, (y + 1) % 10)] += 5
    seen = [paired.per_example(each, y) for each in logits]
    histories = {metric: np.sort(rng.random((seeds, 2)), 1) for metric in compare.HISTORIES}
    calibration = tuple(paired.calibration(each, y) for each in logits)
    scored = np.array([r for r, _ in seen]), np.array([n for _, n in seen])
    return Arm(*scored, name, runs, logits, histories, calibration, Scored(*(part[:1] for part in scored)))


def made(seeds=10, names=("max", "avg"), lead=0.1, classes=10, primary="accuracy"):
    rng = np.random.default_rng(0)
    y = np.arange(N) % classes
    accuracies = (0.8, 0.8 + lead, 0.8 - lead, 0.6)
    arms = tuple(arm(name, seeds, accuracy, rng, y) for name, accuracy in zip(names, accuracies, strict=False))
    design = Design("Which <loses> less?", arms, y, np.arange(N) // 3, primary, 0.5)
    found = compare._two_arms(design) if len(names) == 2 else compare._ranking(design)
    return dataclasses.replace(found, caveats=("A caveat.",))


@pytest.fixture(scope="module", params=[1, 2, 10])
def c(request):
    return made(request.param)


@pytest.fixture(scope="module")
def ranking():
    return made(3, ("max", "avg", "lp", "stride of a long name"))


pngs = report._drawn


def test_the_page_needs_nothing_else_and_says_it_all(c):
    links = {run.run_id: f"https://mlflow.example.org/#/{run.run_id}" for each in (c.a, c.b) for run in each.runs}
    page = report.html(c, {"seeds": b"png", "per_class": b"png"}, links)
    assert c.sentence in page
    assert "Which &lt;loses&gt; less?" in page
    for letter in "ABCDEFGHIJ":
        assert f"<td>{letter}</td>" in page
    for link in links.values():
        assert f'href="{link}"' in page
        page = page.replace(f'href="{link}"', "")  # whole: max1 begins max10
    assert "http" not in page
    assert "None" not in page
    assert "<script" not in page
    assert c.a.runs[0].data_sha256 in page
    assert "A caveat." in page


def test_the_same_comparison_gives_the_same_bytes():
    c = made()
    links = {run.run_id: "" for each in (c.a, c.b) for run in each.runs}
    first, second = pngs(c), pngs(c)
    assert first == second
    assert set(first) == DRAWN
    assert all(png.startswith(b"\x89PNG") for png in first.values())
    assert report.html(c, first, links) == report.html(c, second, links)


def test_names_are_shown_as_they_are_and_do_nothing():
    hostile = made(2, names=("<b>|x", "a & b"))
    links = {run.run_id: "" for each in (hostile.a, hostile.b) for run in each.runs}
    page = report.html(hostile, {}, links)
    assert "<b>|x" not in page
    assert "&lt;b&gt;|x" in page
    assert "| &lt;b>\\|x |" in report.markdown(hostile)


def test_markdown_tables_have_as_many_cells_in_each_row(c):
    lines = report.markdown(c).splitlines()
    assert lines[0] == f"**{c.sentence}**"
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {6, 5, 4}
    for run in (*c.a.runs, *c.b.runs):
        assert f"[{run.name}](#/experiments/7/runs/{run.run_id}?workflowType=machine_learning)" in lines[-1]


def test_the_terminal_gets_lines_that_fit_and_the_verdict_first(c):
    lines = report.table(c).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(report.table(c).split()).startswith(c.sentence)


def test_of_more_than_two_arms_each_form_says_the_same(ranking):
    assert max(map(len, report.table(ranking).splitlines())) <= WIDTH + 20  # with a name of 21 letters
    links = {run.run_id: "" for run in ranking.runs}
    drawn = pngs(ranking)
    assert drawn.keys() == {"intervals", "learning_curves", "calibration"}
    forms = report.table(ranking), report.markdown(ranking), report.html(ranking, drawn, links)
    for form in forms:
        words = " ".join(form.split())
        assert ranking.sentence in words
        assert "avg minus max, points" in words
        assert "95 % interval" in words
        assert "At the lowest train loss" in words or "at the lowest train loss" in words
    assert json.loads(to_json(page.contents(ranking)))["not_worse_than_the_best"] == ["avg", "max"]
    assert all(math.isfinite(value) for value in page.metrics(ranking).values())


def test_the_description_has_the_table_before_all_else_and_no_long_number(c):
    origin = report.Origin("2026-11-29 10:31 UTC", "poolnet compare --study 'a b.toml'", "mlflow ui")
    lines = report.markdown(c, origin).splitlines()
    assert lines[2].startswith("| arm | n | test accuracy |")
    assert re.search(r"\d{13}", report.markdown(c)) is None
    made = [line for line in lines if line.startswith("Made 2026-11-29 10:31 UTC by poolnet ")]
    assert [line.endswith(", with `poolnet compare --study 'a b.toml'`") for line in made] == [True]


def test_the_page_says_how_it_was_made_and_who_serves_its_links(c):
    links = {run.run_id: f"http://127.0.0.1:5000/#/{run.run_id}" for each in (c.a, c.b) for run in each.runs}
    origin = report.Origin(
        "2026-11-29 10:31 UTC", "poolnet compare --study <b>.toml", "mlflow ui --backend-store-uri x"
    )
    page = report.html(c, {}, links, origin)
    assert "Made 2026-11-29 10:31 UTC by poolnet" in page
    assert "<code>poolnet compare --study &lt;b&gt;.toml</code>" in page
    assert "work while this serves them: <code>mlflow ui --backend-store-uri x</code>" in page
    assert page.count('target="_blank" rel="noopener"') == len(links)
    assert page.index(c.sentence) < page.index("The arms") < page.index("The difference") < page.index("Tests")


@pytest.mark.parametrize("classes", [10, 9])
def test_json_and_metrics_hold_plain_numbers(c, classes):
    found = made(len(c.seeds), classes=classes)  # with 9, no test image is a J
    text = to_json(page.contents(found))
    back = json.loads(text)
    assert back["effects"]["acc"]["estimate"] == found.acc.estimate
    assert (back["per_class"][9]["estimate"] is None) == (classes == 9)
    assert all(math.isfinite(value) for value in page.metrics(found).values())


def test_a_letter_that_is_not_in_test_is_drawn_too():
    assert pngs(made(2, classes=9)).keys() == DRAWN


def test_the_example_that_the_arms_see_most_differently_comes_first(c):
    a, b = (dataclasses.replace(each, logits=np.zeros_like(each.logits)) for each in (c.a, c.b))
    b.logits[:, 17, c.y[17]] = 20  # sure and right, where a has no idea
    b.logits[:, 5, c.y[5]] = 1
    changed = dataclasses.replace(c, arms=(a, b))
    assert comparison_figures.disagreements(changed)[:3].tolist() == [17, 5, 0]
    letter, p = comparison_figures.predicted_class(changed, b, 17)
    assert (letter, p) == ("ABCDEFGHIJ"[c.y[17]], pytest.approx(1, abs=1e-6))
    images = np.zeros((3, 28, 28), np.uint8)
    assert comparison_figures.disagreement_images(changed, images).axes


@pytest.mark.parametrize(
    ("estimate", "low", "high", "verdict", "winner"),
    [
        (2.0, 1.0, 3.0, "better", "avg"),
        (-2.0, -3.0, -1.0, "better", "max"),
        (0.1, -1.0, 1.2, "inconclusive", None),
        (0.1, 0.0, 0.2, "equivalent", None),
        (0.2, 0.1, 0.3, "equivalent", None),  # real, and too small to matter
    ],
)
def test_verdicts(c, estimate, low, high, verdict, winner):
    se = (high - low) / 4
    effect = paired.Effect(estimate, low, high, se, 100, 0.5)
    found = dataclasses.replace(c, acc=effect)
    assert (found.verdict, found.winner) == (verdict, winner)
    says = {"better": f"{winner} is better than", "equivalent": "max and avg are equivalent within 0.5 points"}
    assert found.sentence.startswith(says.get(verdict, "Inconclusive whether avg is better than max"))


@pytest.mark.parametrize(
    ("acc", "nll", "said"),
    [
        ((1, 3), (0.1, 0.3), True),  # more often right, and surer where it is wrong
        ((-3, -1), (-0.3, -0.1), True),
        ((1, 3), (-0.3, -0.1), False),  # better in both
        ((-1, 2), (0.1, 0.3), False),  # accuracy may be either's
        ((-2, 1), (-0.3, -0.1), False),
        ((0, 0), (-0.3, -0.1), False),  # equally often right, and less to pay
        ((1, 3), (-0.1, 0.3), False),
    ],
)
def test_accuracy_and_loss_disagree_only_where_both_are_sure(c, acc, nll, said):
    effects = [paired.Effect(sum(ends) / 2, *ends, 0.1, 100, 0.5) for ends in (acc, nll)]
    notes = compare._disagreements(dataclasses.replace(c, acc=effects[0], nll=effects[1]))
    assert any("also pays more" in note for note in notes) == said


@pytest.mark.parametrize("seeds", [1, 2])
def test_figures_show_long_names_whole_and_odd_ones_as_they_are(seeds):
    c = made(seeds, ("_of a long name, $\\frac$", "as long: $x_1$, 20%, a|b"))
    figures = comparison_figures.of_comparison(c)
    assert figures.keys() == DRAWN
    for figure in figures.values():
        figure.draw_without_rendering()  # "$\\frac$" is no formula, and would raise as one
        bounds = figure.bbox
        for axes in figure.axes:
            for text in filter(Text.get_text, (axes.title, axes.xaxis.label, axes.yaxis.label)):
                box = text.get_window_extent()
                assert bounds.x0 <= box.x0 <= box.x1 <= bounds.x1, text.get_text()
                assert bounds.y0 <= box.y0 <= box.y1 <= bounds.y1, text.get_text()
    legend = figures["learning_curves"].axes[0].get_legend()
    assert len(legend.get_texts()) == 4  # matplotlib hides what begins with _
    left, right = (label.get_window_extent() for label in figures["seeds"].axes[0].get_xticklabels())
    assert left.x1 < right.x0
