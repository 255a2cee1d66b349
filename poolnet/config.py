"""What a training run is asked to do, and where poolnet keeps its local state.

Apart from `train.py` because the command line needs the defaults before it may afford to import torch.
"""

import dataclasses
import json
import math
import numbers
import operator
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

PLATEAU_MARGIN = 0.002  # of accuracy: what 30 epochs gain once the published run has flattened
POOLS = ("max", "avg", "conv")  # conv: the two strided convolutions that pooling replaced


class InputError(ValueError):
    """Bad usage or bad input: one line that names the thing and the cure. Ends the command with exit code 2."""


class RunError(RuntimeError):
    """The work itself failed: one line that says why. Ends the command with exit code 1 and the run as FAILED."""


class NoAnswer(RunError):
    """The tracking server was silent for too long."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The one home of the defaults, which are those of the reference experiment."""

    data: str = dataclasses.field(default="glyphs", metadata={"help": "glyphs, notmnist, or the path of an .npz file."})
    pool: str = dataclasses.field(default="max", metadata={"help": "max, avg, or conv (the baseline)."})
    epochs: int = dataclasses.field(default=30, metadata={"help": "Passes over the training split."})
    batch_size: int = dataclasses.field(default=128, metadata={"help": "Images per optimiser step."})
    lr: float = dataclasses.field(default=0.001, metadata={"help": "Learning rate of Adam."})
    seed: int = dataclasses.field(default=42, metadata={"help": "Seed of the initial weights and of the batch order."})
    device: str = dataclasses.field(
        default="auto", metadata={"help": "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N, or mps."}
    )
    register: bool = dataclasses.field(
        default=True, metadata={"help": "Register the model as a version of `poolnet`: yes or no."}
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        if self.pool not in POOLS:
            raise InputError(f"pool: found {self.pool!r}, expected one of {', '.join(POOLS)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected a whole number from 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: found {self.lr}, expected a finite number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: found {self.seed}, expected a whole number from 0 to 2**63 - 1")


def _typed(field: dataclasses.Field, value: object) -> object:
    """The value as its field's own type, as NumPy's numbers become Python's."""
    expected = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}[field.type]
    try:
        if isinstance(value, bool) != (field.type is bool):
            raise TypeError
        if field.type is int:
            return operator.index(value)
        if not isinstance(value, numbers.Real if field.type is float else field.type):
            raise TypeError
        return field.type(value)
    except (TypeError, OverflowError):
        raise InputError(f"{field.name}: found {value!r}, expected {expected}") from None


def home() -> Path:
    """The folder of poolnet's local state: `POOLNET_HOME`, or `.poolnet` in the working folder. Made if absent."""
    path = expanded(Path(os.environ.get("POOLNET_HOME") or ".poolnet")).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); set POOLNET_HOME elsewhere") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written; set POOLNET_HOME elsewhere")
    return path


def expanded(path: Path) -> Path:
    """The path with the user's own folder for `~`, unless something here is called so."""
    try:
        return path if Path(*path.parts[:1]).exists() else path.expanduser()
    except RuntimeError:  # of a user who is not known
        return path


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pasted(*words: object, windows: bool = os.name == "nt") -> str:
    """A command that can be pasted into a shell: POSIX, or on Windows PowerShell and cmd.

    Double quotes mean the same to both of the latter, unless there are signs in them that PowerShell would replace or
    end the text at: such a word is for PowerShell alone. Of `%NAME%` cmd replaces the name of a variable that is set.
    """
    texts = map(str, words)
    return " ".join(map(_quoted_on_windows, texts)) if windows else shlex.join(texts)


def _quoted_on_windows(word: str) -> str:
    if re.fullmatch(r"[\w.:/\\+-]+", word):
        return word
    word = re.sub(r"(\\+)$", r"\1\1", word)  # or the last one would keep the quote from ending
    if not re.search('["$`\u201c-\u201e]', word):
        return f'"{word}"'
    doubled = re.sub("['\u2018-\u201b]", r"\g<0>\g<0>", word)
    return f"'{doubled}'"


def progress(*args, **options):
    """A progress bar on stderr (see `click.progressbar`), shown where somebody watches."""
    return click.progressbar(*args, file=sys.stderr, hidden=not sys.stderr.isatty(), **options)


def warn(message: str) -> None:
    _complain("warning", message)


def failed(error: object, code: int) -> int:
    """Say what went wrong, in one line. Returns the exit code."""
    _complain("error", error)
    return code


def _complain(kind: str, text: object) -> None:
    say(f"poolnet: {kind}: {' '.join(str(text).split())}", err=True)


def say(text: object = "", **options) -> None:
    """Print, see `click.echo`, with escapes for what a terminal would obey in a line."""
    click.echo("\n".join(map(printable, str(text).split("\n"))), **options)


def printable(text: object) -> str:
    """With escapes for what a terminal would obey or cannot show: on one line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def to_json(value: object, indent: int | None = None) -> str:
    """JSON of plain values, dataclasses and paths; numbers that are not finite become null."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):  # escapes stand for bytes that are not UTF-8
        return os.fsencode(value).decode(errors="backslashreplace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def marked(text: str) -> str:
    """Markdown that shows this text, whatever signs of Markdown and HTML are in it."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text))
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", re.sub(r"<(?=[\w/!?])", "&lt;", text))


def coded(text: str) -> str:
    """Markdown that shows this text as code."""
    text = printable(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def piped(rows: Sequence[Sequence[str]], cell: Callable[[str], str] = marked) -> list[str]:
    """The lines of a Markdown table.

    `cell` makes Markdown of a cell; `str` where it is that already.
    """
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in words, as far as there are values."""
    if not values:
        return "none"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
