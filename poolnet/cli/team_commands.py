"""The commands of a team's tracking server.

They parse, call and print, as in `commands.py`.
"""

import click

from poolnet import process
from poolnet.cli.options import TIMEOUT, tracking_server
from poolnet.errors import InputError
from poolnet.text import echo, step


@click.group()
def team() -> None:
    """Try out a team's tracking server, and give rights."""


@team.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Of MLflow.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier team server has kept.")
def up(port: int, fresh: bool) -> None:
    """Run a team server until Ctrl-C, on this machine only.

    With PostgreSQL, an S3-compatible object store, and users with passwords. Its data stay in .poolnet/team.
    """
    step("Opening the team server")
    from poolnet.upkeep import team_server

    try:
        with team_server.running(port, fresh, echo) as parts:
            echo(team_server.how_to_use(port))
            team_server.watch(parts)
    except process.Stop:
        echo("The team server has ended; poolnet team up starts it again, with its data.")


@team.command()
@click.argument("user")
@click.option(
    "--right",
    type=click.Choice(["read", "edit", "manage"]),
    default="edit",
    show_default=True,
    help="read to look on, edit to train and promote, manage to delete too.",
)
@TIMEOUT
def grant(user: str, right: str, timeout: float) -> None:
    """Give a USER of the tracking server the rights to use poolnet.

    On the experiment in the environment and on the registered model. Only an administrator can give them.
    """
    if not user.strip():
        raise InputError("grant: found no name, expected a user of the tracking server")
    with tracking_server(timeout):
        from poolnet.tracking import servers
        from poolnet.upkeep import rights

        echo(rights.grant(servers.own_client(), user, right.upper()))
