"""The commands that use, make or check registered models.

They parse, call and print, as in `commands.py`.
"""

import re
from pathlib import Path

import click

from poolnet.cli.options import (
    AS_JSON,
    FILE,
    NO_PUBLISH,
    OPEN,
    TIMEOUT,
    check_publish,
    completed,
    data_option,
    look_at,
    points,
    switch,
    tracking_server,
)
from poolnet.errors import InputError
from poolnet.files import home, regular
from poolnet.models import BUDGET, WEIGHTS_FILE
from poolnet.text import echo, echo_warning, failed, printable, progress, step, to_json
from poolnet.training.config import POOLS


def _model(context: click.Context, argument: click.Parameter, uri: str) -> str:
    """Refuse a missing folder before the long imports.

    Other text may be a name that the tracking server knows, and is left to it.
    """
    is_path = uri.startswith((".", "/", "\\", "~")) or (Path(uri).is_absolute() and ":/" not in uri)
    if is_path and not Path(uri).is_dir():
        raise InputError(f"{uri}: no such folder; expected a model, as in models:/poolnet/1")
    return uri


@click.command()
@click.argument("model", callback=_model)
@data_option(help="The data set.  [default: what the model was trained on]")
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="Part of the data."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the simulated ECE of chance."
)
@NO_PUBLISH
@OPEN
@TIMEOUT
@AS_JSON
def evaluate(
    model: str, data: str, split: str, seed: int, no_publish: bool, open_page: bool, timeout: float, as_json: bool
) -> None:
    """Score a MODEL on a data set, with intervals.

    A model is models:/poolnet@champion, models:/poolnet/3, models:/m-..., runs:/RUN/model, a folder, or the name of a
    run. Nothing of its file is unpickled or executed.

    Loss, accuracy, precision, recall, F1, calibration and confusions, with intervals, also as a run in MLflow; and
    whether they are what its training recorded.
    """
    check_publish(no_publish, open_page)
    with tracking_server(timeout):
        from poolnet.models import evaluation_report
        from poolnet.tracking import pages, registry, servers

        client = servers.own_client()
        report = evaluation_report.score(client, registry.load(model, check_export=True), data, split, seed)
        run_id, page = "", ""
        if not no_publish:
            run_id = evaluation_report.publish(client, report)
            experiment_id, model_id = client.get_run(run_id).info.experiment_id, report.model.model_id
            page = pages.model(experiment_id, model_id) if model_id else pages.run(experiment_id, run_id)
    if as_json:
        look = pages.link(client.uri, page) if page else None
        echo(to_json({**evaluation_report.contents(report), "run_id": run_id or None, "look": look}))
    else:
        echo(evaluation_report.table(report))
    if report.agrees is False:
        echo_warning(report.agreement)
    if page:
        look_at(client.uri, page, open_page, as_json)


def _alias(context: click.Context, option: click.Parameter, name: str) -> str:
    """Refuse an alias that MLflow would not accept."""
    if not re.fullmatch(r"[\w-]+", name) or re.fullmatch(r"v\d+|latest", name.lower()):
        raise InputError(f"--alias: found {name!r}, expected letters, digits, - and _, as in champion-max")
    return name


@click.command()
@click.argument("model", default="", callback=_model)
@click.option(
    "--model", "by_option", default="", hidden=True, callback=_model, help="MODEL, as `mlflow run` passes it."
)
@click.option(
    "--alias",
    default="champion",
    show_default=True,
    callback=_alias,
    shell_complete=completed("champion", *(f"champion-{pool}" for pool in POOLS)),
    help="Of what: champion, champion-max, champion-avg.",
)
@click.option(
    "--non-inferior", "--non_inferior", default="", metavar="M", help="Also if it is not worse by M points of accuracy."
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    help=f"Challengers of a champion, which share the 5 %; it can be raised, not lowered.  [default: {BUDGET}]",
)
@switch("--force", help="Whatever the test says; recorded as such.")
@switch("--rollback", help="Give the alias back to the champion before.")
@TIMEOUT
@AS_JSON
@click.pass_context
def promote(
    context: click.Context,
    model: str,
    by_option: str,
    alias: str,
    non_inferior: str,
    budget: int | None,
    force: bool,
    rollback: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Make a MODEL champion if it is better.

    Without MODEL the newest version. The name of a run means its model, which becomes a version if it is none. An exact
    paired test decides, on what both models' runs predicted of the same validation letters, families kept together. Its
    level is 5 %, shared among the challengers that the champion may meet. The decision, with its numbers, is written on
    the model version. Exit code 1 if the champion stays.
    """
    margin, model = points("--non-inferior", non_inferior), model or by_option
    if rollback and (model or non_inferior or budget or force):
        raise InputError("--rollback: found it with other options, expected --alias alone")
    with tracking_server(timeout):
        from poolnet.models import promote
        from poolnet.tracking import pages, registry, servers

        client = servers.own_client()
        decision = promote.promote(client, model, alias, margin, force, rollback, budget or BUDGET)
        page = pages.version(registry.NAME, decision.version)
    refused = decision.kind == "refused"
    if as_json:
        look = pages.link(client.uri, page)
        more = {"promoted": decision.promoted, "sentence": decision.sentence, "look": look}
        echo(to_json({**vars(decision), **more}))
    elif not refused:  # else it is an error, and the last line
        echo(decision.sentence)
    look_at(client.uri, page, open_page=False, as_json=as_json)
    if refused:
        context.exit(failed(decision.sentence, 1))


@click.command()
@click.argument("model", callback=_model)
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
@click.option("--invert/--no-invert", default=None, help="Dark letters on bright ground.  [default: recognised]")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values instead of the table.")
@TIMEOUT
@AS_JSON
@click.pass_context
def predict(
    context: click.Context,
    model: str,
    images: tuple[Path, ...],
    invert: bool | None,
    as_csv: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Say which letter, A to J, is on each IMAGE.

    A model that was trained on other classes, such as clothes, says their names.

    PNG, JPEG and the like, or folders of them, of any size and colour. An image that cannot be read is named, and the
    others are predicted all the same; exit code 1 then, and 2 if there are no others.
    """
    if as_csv and as_json:
        raise InputError("--csv: found it with --json, expected one of the two")
    from poolnet.data.pictures import find

    paths = find(images)
    with tracking_server(timeout):
        from poolnet.models import predict
        from poolnet.tracking import registry, server_runs, servers, training_runs

        loaded = registry.load(model)
        classes = training_runs.classes(server_runs.get_run(servers.own_client(), loaded.run_id))
    unreadable: list[InputError] = []
    with progress(paths, label="Reading images") as bar:
        predictions = list(predict.predict(loaded.net, bar, invert, unreadable.append, classes))
    if as_json:
        echo(to_json({"predictions": predictions}))
    elif as_csv:
        echo("".join(predict.csv_lines(predictions)), nl=False)
    elif predictions:
        echo(predict.table(predictions))
    for error in unreadable:
        failed(error, 1)
    if unreadable:
        context.exit(1 if predictions else 2)


@click.command()
@click.argument("run")
@data_option(help="Where its data set is.  [default: where it was]")
@TIMEOUT
@AS_JSON
@click.pass_context
def reproduce(context: click.Context, run: str, data: str, timeout: float, as_json: bool) -> None:
    """Train a recorded RUN again and compare all figures.

    RUN is its name, a beginning of it, or its MLflow id. Data must be the same; other code, packages or machines are
    named. Every metric of every step, the predictions and the weights are compared: bit-identical, within tolerance, or
    different, and then exit code 1.
    """
    home()

    from poolnet.tracking.publisher import Publisher

    with Publisher(timeout) as publisher, tracking_server(timeout):
        from poolnet.models import reproduce
        from poolnet.tracking import pages, servers

        client = servers.own_client()
        original = reproduce.find(client, run)
        lines = (lambda line: None) if as_json else echo
        result = reproduce.reproduce(original, data, publisher, lines, echo_warning)
        step("Uploading the run")
        trouble = publisher.close()
        server_copy = publisher.server_copy
        page = pages.run(server_copy.experiment_id, server_copy.run_id) if server_copy.run_id else ""
        if not trouble:
            reproduce.publish(client, result, server_copy.run_id)
    if as_json:
        look = pages.link(client.uri, page) if page else None
        echo(to_json({**reproduce.contents(result), "run_id": server_copy.run_id or None, "look": look}))
    else:
        echo(printable(result.sentence))  # others call their runs what they like
        if page:
            look_at(client.uri, page, open_page=False)
    if trouble:
        again = f"poolnet sync {result.again.name}; this verdict is not, reproduce it again for that"
        failed(f"{trouble}; the run is saved in {result.again.folder}; upload it later with: {again}", 3)
    context.exit(1 if result.verdict == "different" else 3 if trouble else 0)


def _weights(context: click.Context, argument: click.Parameter, file: Path) -> Path:
    regular(file, WEIGHTS_FILE)
    return file


@click.command()
@click.argument("file", type=FILE, callback=_weights)
@click.option("--pool", type=click.Choice(POOLS), required=True, help="The pooling that they were trained with.")
@data_option(help="Score them on this data set too; without, no test can compare them.")
@TIMEOUT
@AS_JSON
def register(file: Path, pool: str, data: str, timeout: float, as_json: bool) -> None:
    """Register weights that were trained elsewhere.

    FILE is what torch.save(model.state_dict(), FILE) wrote, as in the notebook. It is read as tensors only.
    """
    with tracking_server(timeout):
        from poolnet.models import import_weights
        from poolnet.tracking import pages, servers

        client = servers.own_client()
        registered = import_weights.register(client, file, pool, data)
        page = pages.run(registered.experiment_id, registered.run_id)
    if as_json:
        scores = {name: {"loss": each.loss, "acc": each.acc} for name, each in registered.scores.items()}
        look = pages.link(client.uri, page)
        echo(to_json({"version": registered.version, "run_id": registered.run_id, "look": look, "scores": scores}))
        return
    for name, each in registered.scores.items():
        echo(f"{name}: loss={each.loss:.4f}, acc={each.acc:.4f}")
    echo(f"Model: models:/poolnet/{registered.version}")
    look_at(client.uri, page, open_page=False)
