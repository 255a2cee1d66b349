"""Options that several commands take, and how all of them speak.

Modules that import torch or mlflow are imported inside the functions, so that `poolnet --help` is instant.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from poolnet.errors import InputError, RunError
from poolnet.text import echo, echo_warning, step

FILE = click.Path(path_type=Path)


def completed(*words: str, suffix: str = "") -> Callable[..., list[CompletionItem]]:
    """Return a `shell_complete` function for these words.

    If `suffix` is given, it also offers folders, and files with this suffix.
    """

    def complete(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folder = os.path.dirname(incomplete)  # noqa: PTH120 - keeps "./"
        paths = []
        with contextlib.suppress(OSError):  # no such folder
            for path in sorted(Path(folder or ".").iterdir()) if suffix else ():
                if path.suffix == suffix or (path.is_dir() and not path.name.startswith(".")):
                    paths.append(os.path.join(folder, path.name) + ("/" if path.is_dir() else ""))  # noqa: PTH118
        return [CompletionItem(word) for word in [*words, *paths] if word.startswith(incomplete)]

    return complete


DATA = completed("glyphs", "notmnist", suffix=".npz")
DEVICE = completed("auto", "cpu", "cuda", "mps")
STUDY = completed(suffix=".toml")


def _data(context: click.Context, option: click.Parameter, data: str) -> str:
    """Refuse a missing data set before the long imports."""
    if data:
        from poolnet.data import dataset

        dataset.check(data)
    return data


data_option = partial(click.option, "--data", default="", shell_complete=DATA, callback=_data)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
switch = partial(click.option, type=bool, is_flag=False, flag_value=True, default=False)  # `mlflow run` gives a value


def _seconds(context: click.Context, option: click.Parameter, value: float) -> float:
    if not 0 <= value <= 86_400:
        raise click.BadParameter(f"found {value}, expected seconds from 0 to 86400")
    return value


TIMEOUT = click.option(
    *("--timeout", "--drain-timeout", "timeout"),
    type=float,
    default=20,
    show_default=True,
    callback=_seconds,
    help="Seconds to wait for a tracking server that gives no answer.",
)


NO_PUBLISH = click.option("--no-publish", is_flag=True, help="Only print; write nothing to the tracking server.")
OPEN = switch("--open", "open_page", help="Open the page in a browser.")


def check_publish(no_publish: bool, open_page: bool) -> None:
    """Refuse to open the page of what is not published."""
    if no_publish and open_page:
        raise InputError("--no-publish: found it with --open, expected one of the two")


def look_at(uri: str, page: str, open_page: bool, as_json: bool = False) -> None:
    """Print the link to a page, or open it.

    The link is not printed with `as_json`, whose object has it.
    """
    from poolnet.tracking import pages

    if open_page:
        try:
            pages.show(uri, page, partial(echo, err=as_json))
        except RunError as error:
            echo_warning(error)
    elif not as_json:
        echo(f"Look at it: {pages.link(uri, page)}")


@contextlib.contextmanager
def tracking_server(timeout: float) -> Iterator[None]:
    """Use the tracking server, and report its errors briefly.

    In the block, an error of MLflow about its server becomes one line. A server that is silent for `timeout` seconds
    ends the block.
    """
    from poolnet.tracking import addresses

    uri = addresses.own()
    addresses.check(uri)  # before MLflow is imported, which takes seconds
    step(f"Opening {addresses.shown(uri)}")

    from poolnet.tracking import servers

    with servers.own_server(timeout):
        yield


def points(option: str, text: str) -> float | None:
    """Parse points of accuracy, or return None for no text.

    `text` is what the user typed. Raises `InputError` if it is not a number above 0 and below 100.
    """
    try:
        value = float(text) if text else None
    except ValueError:
        value = 0
    if value is not None and not 0 < value < 100:
        raise InputError(f"{option}: found {text!r}, expected points of accuracy above 0")
    return value
