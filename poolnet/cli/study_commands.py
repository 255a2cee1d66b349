"""The commands that train the runs of a study, and compare.

They parse, call and print, as in `commands.py`.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from poolnet import process
from poolnet.cli.options import (
    AS_JSON,
    DATA,
    DEVICE,
    FILE,
    NO_PUBLISH,
    OPEN,
    STUDY,
    TIMEOUT,
    check_publish,
    completed,
    data_option,
    look_at,
    points,
    tracking_server,
)
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.text import echo, echo_warning, failed, pasted, step, to_json
from poolnet.training.config import ARM_OPTIONS

if TYPE_CHECKING:
    from poolnet.studies.study import Study


def _plan(path: Path, data: str, device: str = "", cluster: str = "") -> "Study":
    """Read a study whose data set and devices are here.

    The workers of a cluster see for themselves which devices they have.
    """
    from poolnet.data import dataset
    from poolnet.studies.study import read
    from poolnet.training import device as devices

    study = read(path, data, device)
    dataset.check(study.data)
    for device in () if cluster else study.grid.get("device", ()):
        devices.check(device)
    return study


def _workers(context: click.Context, option: click.Parameter, text: str) -> int | None:
    if text and not (text.isdecimal() and 0 < int(text[:5]) < 1000):
        raise InputError(f"--workers: found {text!r}, expected a whole number from 1 to 999")
    return int(text) if text else None


@click.command()
@click.argument("study", type=FILE, shell_complete=STUDY)
@data_option(help="Another data set than the study's own.")
@click.option(
    "--workers",
    default="",
    callback=_workers,
    help="Processes that train.  [default: one a core; where conv takes part, one for two cores]",
)
@click.option("--cluster", default="", metavar="ADDRESS", help="Train on the workers of this Dask scheduler.")
@click.option("--any-version", is_flag=True, help="Take workers with other versions of poolnet, torch or NumPy too.")
@click.option(
    "--device",
    default="",
    shell_complete=DEVICE,
    help="Of each run.  [default: the study's, or auto]",
)
@click.option("--figures", is_flag=True, help="Draw the figures of each run too; later: poolnet figures RUN.")
@OPEN
@TIMEOUT
@AS_JSON
@click.pass_context
def sweep(
    context: click.Context,
    study: Path,
    data: str,
    workers: int | None,
    cluster: str,
    any_version: bool,
    device: str,
    figures: bool,
    open_page: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Train what is missing of a STUDY.

    That is each combination of its grid and seeds. Cut off, the same command goes on.

    A study is a .toml file with question, data, seeds, folds, primary (accuracy or loss), margin, optimum and register
    (both false by default); under [grid] options of `poolnet train`, each a value or a list; under [tune] values of lr
    or batch_size, of which each arm takes its best on val; under [arms] those that are compared, as in:
    max = { pool = "max" }
    """
    from poolnet.tracking.train import look_ahead

    if cluster and workers:
        raise InputError("--workers: counts processes of this machine; leave it out with --cluster")
    plan = _plan(study, data, device, cluster)

    home()
    look_ahead(echo_warning)
    options = [study, *(["--data", data] if data else [])]
    named = {"--device": device, "--cluster": cluster}
    given = [word for option, value in named.items() if value for word in (option, value)]
    again = pasted("poolnet", "sweep", *options, *given, *["--any-version"] * any_version)
    process.last_words = f"stopped; go on with: {again}"

    step(f"Opening the data set {plan.data}")
    from poolnet.studies import sweep as sweeps
    from poolnet.studies import sweep_results
    from poolnet.tracking import pages

    lines = (lambda line: None) if as_json else echo
    under_way = sweeps.open_sweep(plan, lines, echo_warning, cluster)
    crew = sweeps.Workers(workers or (1 if cluster else sweeps.default_workers(plan)), cluster, any_version)
    sweeps.carry_out(under_way, crew, figures, timeout, lines, echo_warning)
    page = pages.view(under_way.experiment_id, pages.view_of(under_way.data_sha256))
    if as_json:
        look = pages.link(under_way.uri, page) if under_way.experiment_id else ""
        echo(to_json({**sweep_results.contents(under_way), "look": look}))
    else:
        echo(sweep_results.table(under_way))
        echo(f"Compare: {pasted('poolnet', 'compare', '--study', *options)}")
    code = 0
    if under_way.missing:
        code = failed(f"missing runs: {len(under_way.missing)}, see above; again with: {again}", 1)
    elif under_way.publish_error:
        where = f"the runs are saved in {home()}; upload them later with: poolnet sync"
        code = failed(f"{under_way.publish_error}; {where}", 3)
    if under_way.experiment_id:
        look_at(under_way.uri, page, open_page, as_json)
    context.exit(code)


def _option_of_arms(context: click.Context, option: click.Parameter, name: str) -> str:
    if name and name not in ARM_OPTIONS:
        raise InputError(f"--by: found {name!r}, expected one of {', '.join(ARM_OPTIONS)}")
    return name


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN RUN]")
@click.option("--runs", "by_option", default="", hidden=True, help="RUN RUN, as `mlflow run` passes them.")
@click.option("--study", default="", shell_complete=STUDY, help="The arms of this study, a .toml file.")
@click.option("--data", default="", shell_complete=DATA, help="Runs on this data set; of a study, instead of its own.")
@click.option("--experiment", default="", help="All runs of this experiment.  [default: the one in the environment]")
@click.option(
    "--by",
    default="",
    shell_complete=completed(*ARM_OPTIONS),
    callback=_option_of_arms,
    help="With --experiment: the option that tells the arms apart, such as pool.",
)
@click.option("--arms", nargs=2, help="With --by: the two values to compare, the second with the first.")
@click.option("--margin", default="", help="Points within which arms are equivalent.  [default: the study's, or 0.5]")
@click.option("--plan", is_flag=True, help="Say what other numbers of seeds and letters would find; publish nothing.")
@click.option("--seed", default=0, hidden=True, help="Of no effect: earlier versions drew random numbers here.")
@NO_PUBLISH
@OPEN
@TIMEOUT
@AS_JSON
@click.pass_context
def compare(
    context: click.Context,
    runs: tuple[str, ...],
    by_option: str,
    study: str,
    data: str,
    experiment: str,
    by: str,
    arms: tuple[str, str] | None,
    margin: str,
    plan: bool,
    seed: int,
    no_publish: bool,
    open_page: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Say which of two or more arms is better, and how sure.

    From what the tracking server has of a study, an experiment or two runs. The answer becomes a run in MLflow, with a
    report.
    """
    from poolnet.studies.study import read

    names = [*runs, *_words(by_option)]
    if experiment and not (names or study):
        by = by or "pool"
    _check_selection(names, study, by, arms)
    check_publish(no_publish, open_page)
    asked = read(Path(study), data) if study else None
    within = points("--margin", margin)

    with tracking_server(timeout):
        from poolnet.studies import compare, page, planning, report
        from poolnet.studies import selection as select
        from poolnet.tracking import pages, servers

        client = servers.own_client()
        experiment_id = servers.experiment_named(client, experiment)
        if asked:
            selected = select.of_study(client, [experiment_id], asked)
        elif by:
            selected = select.of_experiment(client, [experiment_id], by, arms or (), data)
        else:
            selected = select.of_runs(client, names)
        found = compare.of_selected(client, selected, asked, within)
        if plan:
            designs = planning.designs(found)
            echo(to_json(designs) if as_json else planning.table(designs))
            return
        run_id, look = "", ""
        if not no_publish:
            run_id = report.publish(client, client.uri, experiment_id, found, _typed(context))
            look = pages.artifact(experiment_id, run_id, "report.html")
    if as_json:
        link = pages.link(client.uri, look) if look else None
        echo(to_json({**page.contents(found), "run_id": run_id or None, "look": link}))
    else:
        echo(report.table(found))
    if look:
        look_at(client.uri, look, open_page, as_json)


def _check_selection(names: list[str], study: str, by: str, arms: tuple[str, str] | None) -> None:
    """Refuse options that do not select arms."""
    if [bool(names), bool(study), bool(by)].count(True) != 1 or (names and len(names) != 2):
        raise InputError("compare: expected one of --study STUDY.toml, --experiment NAME --by OPTION, or two runs")
    if arms and (not by or arms[0] == arms[1]):
        problem = f"found {arms[0]} twice" if by else "found it without --by"
        raise InputError(f"--arms: {problem}, expected two values of {by or 'the option that --by names'}")


def _words(text: str) -> list[str]:
    """Split a text into names; some may be in quotes."""
    try:
        return shlex.split(text)
    except ValueError:  # a name with one quote
        return text.split()


def _typed(context: click.Context) -> str:
    """Return the command with the options that were typed.

    Empty values, which `mlflow run` passes on, are left out.
    """
    words: list[object] = ["poolnet", context.info_name]
    for param in context.command.params:
        value = context.params[param.name or ""]
        if value and context.get_parameter_source(param.name or "") == ParameterSource.COMMANDLINE:
            words += [param.opts[0]] if isinstance(param, click.Option) else []
            words += value if isinstance(value, tuple) else [] if value is True else [value]
    return pasted(*words)
