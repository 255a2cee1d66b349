"""The command line: parse, call, print.

Modules that import torch or mlflow are imported inside the commands, so that `poolnet --help` is instant.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from poolnet.config import POOLS, InputError, RunError, TrainConfig, progress

FILE = click.Path(path_type=Path)


@click.group()
def cli() -> None:
    """Which pooling layer loses less? Train, record and compare networks of two poolings and one linear layer."""


def train_options(command: Callable) -> Callable:
    """An option for each field of `TrainConfig`, with its default and its help."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        names = dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}"))  # `mlflow run` says batch_size
        kind = click.Choice(POOLS) if field.name == "pool" else field.type
        help_text = field.metadata["help"]
        command = click.option(*names, field.name, type=kind, default=field.default, show_default=True, help=help_text)(
            command
        )
    return command


@cli.command()
@train_options
@click.option("--no-cache", is_flag=True, help="Pool the images anew, and keep no features on disk.")
@click.option(
    "--optimum",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    help="Also find the lowest train loss there is.",
)
def train(no_cache: bool, optimum: bool, **options) -> None:
    """Train one network and record it in MLflow, from its data to its registered model."""
    config = TrainConfig(**options)
    if optimum and config.pool == "conv":
        raise InputError("--optimum: found pool conv, expected max or avg, whose loss has a single minimum")

    from poolnet import data, features, linear, tracking
    from poolnet.train import fit, resolve_device

    device = resolve_device(config.device)
    path = data.locate(config.data, say=click.echo)
    if config.pool == "conv":
        splits, pooled = data.open_splits(path), None
    else:
        splits, pooled = features.open_pooled(path, config.pool, cache=not no_cache, say=click.echo)
    if splits.overlap:
        warn(f"{splits.path}: {splits.overlap:,} of {len(splits.test):,} test images also occur in train")
    with tracking.run(config, splits, device) as run:

        def on_epoch(record) -> None:
            click.echo(record)
            run.log_epoch(record)

        result = fit(config, splits, on_epoch) if pooled is None else linear.fit(config, splits, pooled, on_epoch)
        best = linear.optimum(result, splits.train, pooled["train"]) if optimum else None
        del pooled  # a tenth of the memory, before the export of the model takes as much
        version = run.log_result(result, best)
        click.echo(f"TEST: loss={result.test.loss:.4f}, acc={result.test.acc:.4f}")
        if best:
            click.echo(f"Optimum: train loss={best.train_loss:.6f}, {best.gap:.6f} below that of the trained weights")
            if not best.converged:
                warn("the search for the optimum stopped early: the lowest train loss is lower still")
        click.echo(f"Model: models:/poolnet/{version}" if version else f"Model: runs:/{run.run_id}/model")
        click.echo(f"Look at it: {run.where_to_look()}")
        run.log_figures(result, best)  # last, since nobody needs to wait for them


@cli.group()
def prepare() -> None:
    """Make a data set: notmnist from its tarballs, or glyphs, letters rendered from fonts."""


@prepare.command()
@click.option("--large", type=FILE, help="notMNIST_large, a tarball or a folder.")
@click.option("--small", type=FILE, help="notMNIST_small, a tarball or a folder. Alone it is split 80/10/10.")
@click.option("--out", type=FILE, help="The .npz to write.  [default: what `--data notmnist` means]")
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of the split.")
def notmnist(large: Path | None, small: Path | None, out: Path | None, seed: int) -> None:
    """Decode, clean and split notMNIST. Without --large and --small, both are downloaded."""
    from poolnet import data, notmnist, npz

    arrays, counts = notmnist.prepare(large, small, seed)
    click.echo(notmnist.table(arrays, counts))
    out = out or data.prepared("notmnist")
    npz.save(out, arrays)
    click.echo(f"Wrote {out}")


@prepare.command()
@click.option("--train", type=click.IntRange(min=1), default=60_000, show_default=True, help="Images in train.")
@click.option("--val", type=click.IntRange(min=1), default=6_000, show_default=True, help="Images in val.")
@click.option("--test", type=click.IntRange(min=1), default=6_000, show_default=True, help="Images in test.")
@click.option("--out", type=FILE, required=True, help="The .npz to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the rendering.")
def glyphs(out: Path, seed: int, **sizes: int) -> None:
    """Render letters A to J from the fonts that matplotlib ships, in other sizes than `--data glyphs` does."""
    from poolnet import glyphs, npz

    with progress(length=sum(sizes.values()), label="Rendering") as bar:
        arrays = glyphs.render(**sizes, seed=seed, progress=bar.update)
    npz.save(out, arrays)
    click.echo(f"Wrote {out}")


def warn(message: str) -> None:
    click.echo(f"poolnet: warning: {message}", err=True)


def main(args: list[str] | None = None) -> None:
    """The console script. What went wrong is said in one line on stderr; the exit codes are those of the README."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        return cli.main(args, prog_name="poolnet", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code)
    except InputError as error:
        return _failed(error, 2)
    except (RunError, OSError) as error:
        return _failed(error, 1)
    except click.Abort:
        return _failed("interrupted", 130)


def _failed(error: object, code: int) -> int:
    click.echo(f"poolnet: error: {' '.join(str(error).split())}", err=True)
    return code
