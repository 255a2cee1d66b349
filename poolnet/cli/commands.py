"""The commands of poolnet: parse, call, print.

Modules that import torch or mlflow are imported inside the commands, so that `poolnet --help` is instant.
"""

import atexit
import dataclasses
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from click.core import ParameterSource

from poolnet import process
from poolnet.cli import model_commands, study_commands, team_commands, upkeep_commands
from poolnet.cli.options import AS_JSON, DATA, DEVICE, FILE, OPEN, TIMEOUT, completed, look_at, switch
from poolnet.errors import InputError, RunError
from poolnet.files import FULL, expanded, home_path, writable
from poolnet.secret import hidden
from poolnet.text import echo, echo_warning, failed, pasted, progress, step, to_json
from poolnet.training.config import POOLS, TrainConfig

SETTINGS = {  # of MLflow, in our own processes, where the user has not decided otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # `poolnet train` says it, for every store
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # on stderr, where errors are said
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own 7 block for four minutes; we try again
}

COMPLETED = {  # of the options of `train`
    "data": DATA,
    "device": DEVICE,
    "register": completed("yes", "no"),
}


class InOrder(click.Group):
    """A command group that lists commands as they are defined.

    That is the order of their use.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="poolnet", message="%(prog)s %(version)s")
def cli() -> None:
    """Is average or max pooling better for letters?

    Train, record, compare and use small pooling networks.
    """


def _output(context: click.Context, option: click.Parameter, text: str | None) -> Path | None:
    """Check where to write, before the work begins."""
    if text == "":
        raise InputError("--out: found an empty text, expected the .npz to write")
    return text if text is None else writable(expanded(Path(text)))


def _write(out: Path, arrays: dict, counts: dict) -> None:
    """Show the counts of a data set and write it."""
    from poolnet.data import npz, splits

    step("Writing the data set")
    echo(splits.table(arrays, counts))
    for line in splits.scarce(arrays):
        echo_warning(line)
    npz.save(out, arrays)
    echo(f"Wrote {out}")


SPLIT_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of the split."
)


@cli.group()
def prepare() -> None:
    """Make a data set: notMNIST, rendered letters, or your own."""


@prepare.command()
@click.option("--large", type=FILE, help="notMNIST_large, a tarball or a folder.")
@click.option("--small", type=FILE, help="notMNIST_small, a tarball or a folder. Alone it is split 80/10/10.")
@click.option("--out", callback=_output, help="The .npz to write.  [default: what `--data notmnist` means]")
@click.option(
    "--split",
    type=click.Choice(["group", "image"]),
    default="group",
    show_default=True,
    help="Keep families of fonts together, or shuffle all images.",
)
@SPLIT_SEED
def notmnist(large: Path | None, small: Path | None, out: Path | None, split: str, seed: int) -> None:
    """Decode, clean and split notMNIST.

    Without --large and --small, both are downloaded.
    """
    from poolnet.data import dataset, notmnist

    out = out or writable(dataset.prepared("notmnist"))
    _write(out, *notmnist.prepare(large, small, seed, split))


@prepare.command()
@click.option("--train", type=click.IntRange(min=1), default=60_000, show_default=True, help="Images in train.")
@click.option("--val", type=click.IntRange(min=1), default=6_000, show_default=True, help="Images in val.")
@click.option("--test", type=click.IntRange(min=1), default=6_000, show_default=True, help="Images in test.")
@click.option("--out", callback=_output, required=True, help="The .npz to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the rendering.")
def glyphs(out: Path, seed: int, **sizes: int) -> None:
    """Render letters A to J from matplotlib's fonts.

    As many as you want: `--data glyphs` has a fixed number of each split.
    """
    step("Drawing the fonts")
    from poolnet.data import glyphs, npz

    npz.save(out, glyphs.render(**sizes, seed=seed))
    echo(f"Wrote {out}")


def _own_name(folder: Path) -> Path:
    """Return where the data set of a folder is written by default."""
    from poolnet.data.dataset import prepared

    name = expanded(folder).absolute().name
    if not name or name.lower().startswith(("notmnist", "glyphs")):  # names that `--data` has a meaning for
        raise InputError(f"--out: not given, and {name or folder} is no name for your own data; give the .npz to write")
    return writable(prepared(name))


@prepare.command()
@click.argument("folder", type=FILE, required=False)
@click.option("--train-images", type=FILE, help="File of the images of train and val.")
@click.option("--train-labels", type=FILE, help="File of their labels.")
@click.option("--test-images", type=FILE, help="File of the images of test.")
@click.option("--test-labels", type=FILE, help="File of their labels.")
@click.option(
    "--classes", help="Ten names with commas between them, or a text file with one a line.  [default: A to J]"
)
@click.option("--out", callback=_output, help="The .npz to write.  [default: named as the folder]")
@SPLIT_SEED
def idx(folder: Path | None, classes: str | None, out: Path | None, seed: int, **files: Path | None) -> None:
    """Take data in MNIST's file format, gzipped or not.

    FOLDER has the four files by their usual names. A tenth of train becomes val.
    """
    from poolnet.data import idx

    found = idx.locate(folder, files)
    out = out or _own_name(found["train_images"].parent)
    _write(out, idx.prepare(found, idx.names(classes), seed), {})
    echo(f"Next: {pasted('poolnet', 'train', '--data', out)}")


@prepare.command()
@click.argument("folder", type=FILE)
@click.option("--out", callback=_output, help="The .npz to write.  [default: named as the folder]")
@SPLIT_SEED
def folder(folder: Path, out: Path | None, seed: int) -> None:
    """Take pictures from ten folders, one a class.

    They are 28x28 pixels. FOLDER holds the ten folders, whose names become the classes.
    """
    from poolnet.data import picture_folder

    out = out or _own_name(folder)
    _write(out, *picture_folder.prepare(folder, seed))
    echo(f"Next: {pasted('poolnet', 'train', '--data', out)}")


def train_options(command: Callable) -> Callable:
    """Add an option for each field of `TrainConfig`.

    The option has the default and the help of its field.
    """
    for field in reversed(dataclasses.fields(TrainConfig)):
        names = dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}"))  # `mlflow run` says batch_size
        kind = click.Choice(POOLS) if field.name == "pool" else field.type
        command = click.option(
            *(*names, field.name),
            type=kind,
            default=field.default,
            show_default=field.default != "",
            help=field.metadata["help"],
            shell_complete=COMPLETED.get(field.name),
        )(command)
    return command


@click.command()
@train_options
@click.option("--resume", metavar="RUN", default="", help="Go on with a run that was interrupted, with its settings.")
@click.option("--no-cache", is_flag=True, help="Pool the images anew, and keep no features on disk.")
@switch("--optimum", help="Also find the lowest train loss there is.")
@OPEN
@TIMEOUT
@click.pass_context
def train(
    context: click.Context,
    resume: str,
    no_cache: bool,
    optimum: bool,
    open_page: bool,
    timeout: float,
    **options: Any,
) -> None:
    """Train one network and record it in MLflow."""
    step(f"Opening the run {resume}" if resume else f"Opening the data set {options['data']}")
    from poolnet.tracking.train import train

    given = {
        name: value
        for name, value in {**options, "optimum": optimum}.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    trained = train(TrainConfig(**options), optimum, not no_cache, resume, given, timeout, echo, echo_warning)
    server, run = trained.server, trained.run
    if model := f"poolnet/{server.version}" if server.version else server.model_id:
        echo(f"Model: models:/{model}")
    if trained.trouble:
        where = f"the run is saved in {run.folder}; upload it later with: poolnet sync {run.name}"
        failed(f"{trained.trouble}; {where}", 3)
    if server.experiment_id:
        from poolnet.tracking import pages

        page = pages.view(server.experiment_id, pages.view_of(run.record["data"]["sha256"]))
        look_at(trained.uri, page, open_page)
    context.exit(3 if trained.trouble else 0)


def _address(context: click.Context, option: click.Parameter, uri: str | None) -> str | None:
    if uri:
        from poolnet.tracking import addresses

        addresses.check(uri, "--to")
    return uri


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option(
    "--to", metavar="URI", callback=_address, help="Publish to this tracking server, and from now on to it alone."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--prune", is_flag=True, help="Remove local folders of finished runs that the server holds completely.")
@AS_JSON
@click.option(
    "--follow",
    "follow_stdin",
    is_flag=True,
    hidden=True,
    help="Publish the runs named on stdin while they are trained.",
)
@TIMEOUT
@click.pass_context
def sync(
    context: click.Context,
    runs: tuple[str, ...],
    to: str | None,
    dry_run: bool,
    prune: bool,
    as_json: bool,
    follow_stdin: bool,
    timeout: float,
) -> None:
    """Publish what tracking servers do not have yet of runs.

    Of all runs in .poolnet, or of those named.
    """
    step("Opening the runs")
    from poolnet.runs import run_record
    from poolnet.tracking import sync, upload_process, waiting

    if follow_stdin:
        if hasattr(os, "nice"):
            os.nice(10)  # the training comes first
        context.exit(upload_process.run(sys.stdin, timeout, echo=lambda line: failed(line, 0), reply=echo))
    waiting.limit(timeout)
    with progress(sync.checked_names(runs) or run_record.names(), label="Publishing") as names:
        rows = [sync.sync(name, to, dry_run, prune) for name in names]
    _show(context, rows, as_json)


def _show(context: click.Context, rows: list, as_json: bool) -> None:
    from poolnet.tracking import sync

    echo(to_json({"runs": rows}) if as_json else sync.table(rows))
    context.exit(0 if all(row.ok for row in rows) else 3)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@AS_JSON
@TIMEOUT
@click.pass_context
def figures(context: click.Context, runs: tuple[str, ...], as_json: bool, timeout: float) -> None:
    """Draw the figures of finished runs, and publish them.

    For runs of a sweep, which draws none without `--figures`.
    """
    step("Opening the runs")
    from poolnet.runs import train_run
    from poolnet.tracking import sync, waiting

    waiting.limit(timeout)
    rows = []
    with progress(sync.checked_names(runs), label="Drawing") as names:
        for name in names:
            train_run.draw(sync.find(name), lambda line: None)
            rows.append(sync.sync(name))
    _show(context, rows, as_json)


for command in (  # in their order of use
    train,
    sync,
    study_commands.sweep,
    figures,
    study_commands.compare,
    model_commands.evaluate,
    model_commands.predict,
    model_commands.promote,
    model_commands.reproduce,
    model_commands.register,
    upkeep_commands.clean,
    upkeep_commands.doctor,
    team_commands.team,
):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    This is the console script. If something goes wrong, one line on stderr says what. The exit codes are those of the
    README.
    """
    process.install()
    sys.excepthook = _show_bug
    if args is None:  # the process is this command's own
        # Python would look for garbage over and over among all that torch and MLflow make while they are imported, and
        # once more at the end: half a second each.
        gc.set_threshold(50_000, 20, 20)
        atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the encoding of a file or pipe lacks must not end a command
            stream.reconfigure(errors="backslashreplace")
    for name, value in (SETTINGS | _without_home()).items():
        os.environ.setdefault(name, value)
    code = _run(args)
    waiting = sys.modules.get("poolnet.tracking.waiting")
    if waiting and waiting.gave_up():  # there is nobody to wait for
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, without secrets: libraries put them into errors."""
    sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, trace))))


def _without_home() -> dict[str, str]:
    """Return settings for a user without a home folder.

    In containers there may be no such folder, or one that may not be written.
    """
    place = home_path()
    try:
        folder = Path.home()
    except RuntimeError:  # MLflow asks for it too
        return {"HOME": str(place)}
    return {} if os.access(folder, os.W_OK) else {"MPLCONFIGDIR": str(place / "matplotlib")}


def _run(args: list[str] | None) -> int:
    try:
        return cli.main(args, prog_name="poolnet", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message())
        return 2
    except click.ClickException as error:
        return failed(error.format_message(), error.exit_code)
    except InputError as error:
        return failed(error, 2)
    except RunError as error:
        return failed(error, 1)
    except OSError as error:
        full = error.errno in FULL and not error.filename
        places = "; files go to POOLNET_HOME, the temporary folder and the tracking store; poolnet doctor says more"
        return failed(f"{error}{places if full else ''}", 1)
    except MemoryError:
        return failed("there is not enough memory; end other programs, or use a machine with more", 1)
    except process.Stop as stop:
        return failed(stop, stop.code)
    except click.Abort:
        return failed("interrupted", 130)
