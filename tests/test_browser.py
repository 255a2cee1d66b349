"""What a person sees in MLflow's interface, in Chromium.

With `POOLNET_SCREENSHOTS=FOLDER`, the pages of docs/browsing.md are saved there as PNG.
"""

import contextlib
import itertools
import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import forked
import mlflow
import numpy as np
import pytest
from conftest import enter, inside, make_arrays, wait_for
from finished_runs import journaled, publish

from poolnet.data.dataset import open_dataset
from poolnet.tracking import pages
from poolnet.training.config import TrainConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
COLOURS = ("color", "backgroundColor")
SCREENSHOTS = Path(os.environ["POOLNET_SCREENSHOTS"]).absolute() if "POOLNET_SCREENSHOTS" in os.environ else None
SEEDS = range(1, 11 if SCREENSHOTS else 3)
SETTINGS = {} if SCREENSHOTS else {"epochs": 10, "batch_size": 32, "lr": 0.01}  # with which avg is better at once

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="found no Chromium on this machine")


@pytest.fixture(scope="module")
def site(tmp_path_factory, request):
    """A store with trainings, a comparison, evaluations and a champion, served by `mlflow ui`."""
    folder = tmp_path_factory.mktemp("site")
    real = request.getfixturevalue("real_letters")[0] if SCREENSHOTS else None
    shutil.copy(request.getfixturevalue("empty_store"), folder)
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        mlflow.MlflowClient().get_experiment("0")  # which a server would make to keep artifacts itself
        with served() as address:  # it starts while runs are trained
            shutil.copy(real, "small.npz") if real else np.savez("small.npz", **make_arrays())
            printed = filled()
            wait_for(lambda: urllib.request.urlopen(f"{address}/health").close() is None)
            yield SimpleNamespace(address=address, printed=printed, key=pages.view_of(open_dataset("small.npz").sha256))


@contextlib.contextmanager
def served():
    """Serve this process's store; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*forked.PYTHON, "mlflow", "ui", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"]]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Path("server.log").open("wb") as log:
        server = forked.start(command, stdout=log, stderr=log, env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def filled():
    """Fill the store; returns the page that each command prints the link of."""
    for seed in SEEDS:
        for pool in ("max", "avg"):
            publish(journaled(TrainConfig("small.npz", pool, seed=seed, register=seed == 1, **SETTINGS)))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    printed = {}
    for command in (
        ("compare", "--experiment", "Default", "--by", "pool", "--arms", "max", "avg"),
        ("evaluate", "models:/poolnet/2"),
        ("promote", "models:/poolnet/1"),
        ("promote", "models:/poolnet/2"),
        ("train", "--data", "small.npz", "--pool", "avg", "--seed", "42", *options),
    ):
        finished = inside(*command)
        assert finished.returncode == 0, finished.stderr
        printed[command[0]] = finished.stdout.rpartition("http://127.0.0.1:5000/")[2].strip()
    return printed


@pytest.fixture(scope="module")
def visitor(site):
    """A browser that keeps MLflow's scripts, each of which it need fetch and compile but once."""
    from playwright.sync_api import sync_playwright

    sandbox = [] if hasattr(os, "geteuid") and os.geteuid() else ["--no-sandbox"]  # which root has not
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *sandbox])
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@pytest.fixture
def opened(site, visitor, tmp_path, request):
    """Open a page of the site as a new visitor; keep a picture of it if the test fails."""

    def open_page(page):
        tab = visitor.new_page()
        tab.set_default_timeout(30_000)
        tab.goto(f"{site.address}/{page}")
        return tab

    yield open_page
    for number, tab in enumerate(visitor.pages):
        if request.session.testsfailed:
            tab.screenshot(path=tmp_path / f"{number}.png")
        remembered = {"origin": site.address, "storageTypes": "cookies,local_storage,indexeddb,cache_storage"}
        visitor.new_cdp_session(tab).send("Storage.clearDataForOrigin", remembered)
        tab.close()


def keep(tab, name):
    """Save a picture for the docs, if they are asked for, without the path of the store."""
    if SCREENSHOTS:
        for path in tab.get_by_text(re.compile("^Path: ")).all():
            path.evaluate("element => element.style.visibility = 'hidden'")
        tab.get_by_role("button", name="Close").first.click()  # of MLflow's assistant
        tab.wait_for_timeout(1500)
        tab.screenshot(path=SCREENSHOTS / f"{name}.png")


def bottom(element):
    box = element.bounding_box()
    return box["y"] + box["height"]


# --- the printed link ------------------------------------------------------------------------------------------------


def test_the_printed_link_shows_four_curves_on_the_first_screen_and_the_menu_lists_three_views(site, opened):
    tab = opened(site.printed["train"])
    for metric in ("val_acc", "val_loss", "train_acc", "train_loss"):
        card = tab.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=f"({metric})")
        for pool in ("max", "avg"):
            legend = card.get_by_text(f"{pool} ({metric})")
            legend.wait_for()
            assert bottom(legend) < 900
        assert card.get_by_text(f" ({metric})").count() == 2  # the mean of each, not every seed
    keep(tab, "max_against_avg")
    tab.get_by_test_id("experiment-view-compare-runs-section-header").filter(has_text="On test").wait_for()
    bars = tab.get_by_test_id("experiment-view-compare-runs-card").locator(".barlayer .trace")
    bars.first.wait_for()
    tab.set_viewport_size({"width": 1800, "height": 900})
    names = ["max against avg on small", "seeds on small", "leaderboard"]
    tab.get_by_test_id("saved-views-trigger").click()
    items = tab.get_by_role("menuitem")
    items.filter(has_text="leaderboard").wait_for()
    assert [text for text in items.all_inner_texts() if text in names] == names
    items.filter(has_text="seeds on small").click()
    tab.get_by_role("link", name=re.compile("^avg-seed2")).first.wait_for()
    assert f"viewStateShareKey={site.key}-seeds" in tab.url
    tab.goto(f"{site.address}/#/{pages.view('0', pages.LEADERBOARD)}")
    for column in ("pool", "seed", "epochs", "val_acc", "test_acc", "Dataset", "Models"):
        tab.get_by_role("columnheader", name=column, exact=True).first.wait_for()
    cells = tab.locator('[col-id="metrics.`val_acc`"][role=gridcell]')
    cells.first.wait_for()
    accuracies = cells.all_inner_texts()
    assert len(accuracies) == 2 * len(SEEDS) + 1
    assert accuracies == sorted(accuracies, reverse=True)


def test_the_description_of_the_experiment_leads_to_the_views(site, opened):
    tab = opened("#/experiments/0/runs?workflowType=machine_learning")
    with tab.expect_popup() as popup:
        tab.get_by_role("link", name="max against avg on small").click()
    assert popup.value.url == f"{site.address}/{site.printed['train']}"  # what the test above looks at


# --- single pages ----------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_run_have_one_section_of_six_charts_for_loss_and_accuracy(site, opened):
    client = mlflow.MlflowClient(site.address)
    run = client.search_runs(["0"], "params.seed = '1'")[0]
    tab = opened(f"#/experiments/0/runs/{run.info.run_id}/model-metrics?workflowType=machine_learning")
    headers = tab.get_by_test_id("experiment-view-compare-runs-section-header")
    headers.filter(has_text="Model metrics").wait_for()
    titles = [text.split("\n")[:2] for text in headers.all_inner_texts()]
    assert titles == [["best", "(3)"], ["speed", "(2)"], ["Model metrics", "(6)"]]


def test_the_report_reads_well_where_mlflow_shows_it(site, opened):
    tab = opened(site.printed["compare"])
    report = tab.frame_locator(".mlflow-html-iframe")
    verdict = report.locator(".verdict")
    verdict.wait_for()
    keep(tab, "report")
    for width, scheme in itertools.product((1280, 800), ("light", "dark")):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        assert verdict.is_visible()
        assert re.search("avg minus max is .* points of test accuracy", verdict.inner_text())
        body = report.locator("html")
        assert body.evaluate("page => page.scrollWidth <= page.clientWidth")  # nothing sticks out
        colours = [body.evaluate(f"page => getComputedStyle(page.querySelector('body')).{name}") for name in COLOURS]
        text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert text + 300 < ground if scheme == "light" else ground + 300 < text


def test_the_registry_shows_the_champion_and_says_what_it_is(site, opened):
    tab = opened("#/models/poolnet?workflowType=machine_learning")
    tab.get_by_text("poolnet.load_model").first.wait_for()
    assert tab.get_by_text("champion", exact=False).first.is_visible()
    versions = tab.get_by_role("link", name=re.compile(r"^Version \d+$"))
    versions.first.wait_for()
    assert versions.all_inner_texts() == ["Version 3", "Version 2", "Version 1"]
    assert not re.search(r"\d\.\d{5}|[0-9a-f]{20}", tab.inner_text("body"))
    keep(tab, "registry")


def test_an_evaluation_is_on_the_page_of_its_model_and_its_letters_are_a_table(site, opened):
    tab = opened(site.printed["evaluate"])
    tab.get_by_text("test_acc").first.wait_for()
    assert tab.get_by_role("link", name="version 2 on small test").first.is_visible()
    client = mlflow.MlflowClient(site.address)
    run = client.search_runs(["0"], "tags.`poolnet.evaluation` = 'agrees'")[0]
    tab = opened(f"#/{pages.artifact('0', run.info.run_id, 'letters.json')}")
    tab.get_by_text("precision", exact=True).wait_for()
    assert tab.get_by_text("J", exact=True).is_visible()
