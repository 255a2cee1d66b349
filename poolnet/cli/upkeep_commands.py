"""The commands that keep a server and local state in order.

They parse, call and print, as in `commands.py`.
"""

import os

import click

from poolnet import process
from poolnet.cli.options import AS_JSON, TIMEOUT, tracking_server
from poolnet.text import echo, failed, pasted, step, to_json
from poolnet.upkeep import KINDS


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS), metavar="[KIND]...")
@click.option("--yes", is_flag=True, help="Delete it.  [default: only list it]")
@click.option(
    "--older-than", "days", type=click.FloatRange(0, 36_500), default=0, metavar="DAYS", help="Keep what is newer."
)
@click.option("--experiment", default="", help="Whose runs.  [default: the one in the environment]")
@TIMEOUT
@AS_JSON
@click.pass_context
def clean(
    context: click.Context,
    kinds: tuple[str, ...],
    yes: bool,
    days: float,
    experiment: str,
    timeout: float,
    as_json: bool,
) -> None:
    """List what nobody needs, and delete it with --yes.

    KIND is versions (of the model, never champion), failed (and killed runs), superseded (runs of sweeps), records
    (here, published completely) or caches (here); all of them by default.

    What a champion, a comparison, a promotion or a reproduction rests on stays. Deleted runs can be restored until
    `mlflow gc` frees their space. Model versions, and the models of deleted runs, cannot.
    """
    words = [*kinds, *(["--older-than", f"{days:g}"] if days else [])]
    again = pasted("poolnet", "clean", *words, *(["--experiment", experiment] if experiment else []), "--yes")
    if yes:
        process.last_words = f"stopped; finish it with: {again}"
    with tracking_server(timeout):
        from poolnet.tracking import servers
        from poolnet.upkeep import clean

        client, experiment_id = None, ""
        if {*kinds} != {"caches"}:
            client = servers.own_client()
            own = "" if os.environ.get("MLFLOW_EXPERIMENT_ID") else os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
            experiment_id = servers.experiment_named(client, experiment or own)  # which is not made if it is missing
        plan = clean.find(client, experiment_id, kinds or KINDS, days)
        going = any(map(plan.names, KINDS))
        listed = clean.table(plan) if not as_json else ""
        said = clean.contents(plan)
        if yes:
            clean.carry_out(client, plan)
    troubled = [why for why in plan.kept if why.startswith(clean.TROUBLE)]
    if as_json:
        echo(to_json({"deleted": yes, **said, "kept": plan.kept}))
    else:
        echo(listed)
        if going:
            space = " The server frees the space with: mlflow gc" if plan.failed or plan.superseded else ""
            echo(f"Deleted.{space}" if yes else f"Nothing is deleted yet; delete this with: {again}")
    if troubled:
        context.exit(failed(f"{len(troubled)} could not be deleted: {troubled[0]}", 1))


@click.command()
@AS_JSON
@TIMEOUT
@click.pass_context
def doctor(context: click.Context, as_json: bool, timeout: float) -> None:
    """Find out what is wrong, and how to cure it.

    With this machine, the tracking server, and the way there.
    """
    step("Looking")
    from poolnet.upkeep.doctor import examine, table

    checks = examine(timeout)
    echo(to_json({"checks": checks}) if as_json else table(checks))
    context.exit(1 if any(check.ok is False for check in checks) else 0)
