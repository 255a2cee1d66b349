"""Format text for terminals, Markdown, JSON and shells."""

import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from poolnet.secret import hidden

Echo = Callable[[object], object]  # prints a line, as `echo` and `echo_warning` do
WIDTH = 60  # columns of tables and sentences on a terminal
DIGITS = 12  # of a checksum, for a person; the whole of it is in the tags
SHARE, POINTS, NATS = ".4f", "+.2f", "+.4f"  # accuracies and losses; differences in accuracy and in loss


def pasted(*words: object, windows: bool = os.name == "nt") -> str:
    """Quote a command, to be pasted into a shell.

    The text suits bash, PowerShell and cmd, unless a word contains a sign that some shell would replace in double
    quotes, or that would end the text there. Such a word is quoted for the shells of this system: on Windows that is
    PowerShell only. In `%NAME%`, cmd replaces the name of a variable that is set.
    """
    return " ".join(map(_quoted_on_windows if windows else _quoted_on_posix, map(str, words)))


def _quoted_on_posix(word: str) -> str:
    quoted = shlex.quote(word)
    if quoted == word and "," not in word:  # which would be an array to PowerShell
        return word
    return quoted if re.search('["$`\\\\!\u201c-\u201e]', word) else f'"{word}"'


def _quoted_on_windows(word: str) -> str:
    if re.fullmatch(r"[\w.:/\\+-]+", word):
        return word
    word = re.sub(r"(\\+)$", r"\1\1", word)  # or the last one would keep the quote from ending
    if not re.search('["$`\u201c-\u201e]', word):
        return f'"{word}"'
    doubled = re.sub("['\u2018-\u201b]", r"\g<0>\g<0>", word)
    return f"'{doubled}'"


def progress(*args, **options):
    """Show a progress bar if stderr is a terminal."""
    return click.progressbar(*args, file=sys.stderr, hidden=not sys.stderr.isatty(), **options)


def step(what: str) -> None:
    """Say what is done now, if stderr is a terminal."""
    if sys.stderr.isatty():
        echo(f"{what} ...", err=True)


def echo_warning(message: object) -> None:
    _complain("warning", message)


def failed(error: object, code: int) -> int:
    """Print one line about an error, without secrets; return the code."""
    _complain("error", error)
    return code


def _complain(kind: str, text: object) -> None:
    echo(f"poolnet: {kind}: {hidden(' '.join(str(text).split()))}", err=True)


def echo(text: object = "", **options) -> None:
    """Print lines, each `printable`, as `click.echo` does."""
    click.echo("\n".join(map(printable, str(text).split("\n"))), **options)


def printable(text: object) -> str:
    """Escape what a terminal obeys, line breaks too."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def to_json(value: object, indent: int | None = None) -> str:
    """Convert plain values, dataclasses and paths to JSON."""
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


def aligned(rows: Sequence[Sequence[str]], gap: int = 2) -> list[str]:
    """Return the lines of a table for a terminal, each `printable`."""
    rows = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [(" " * gap).join(map(str.ljust, row, widths)).rstrip() for row in rows]


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return the lines of a text for a terminal.

    The lines after the first begin with `indent`.
    """
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def marked(text: str) -> str:
    """Escape text so that Markdown shows it as it is."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text))
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", re.sub(r"<(?=[\w/!?])", "&lt;", text))


def coded(text: str) -> str:
    """Return Markdown that shows a text as code."""
    text = printable(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def piped(rows: Sequence[Sequence[str]], cell: Callable[[str], str] = marked) -> list[str]:
    """Return a Markdown table; `cell` converts each cell to Markdown."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def spread(values: Sequence[float]) -> str:
    """Format mean and, of several values, standard deviation."""
    if not values:
        return "none"
    return f"{statistics.mean(values):{SHARE}}" + (f" ± {statistics.stdev(values):{SHARE}}" if len(values) > 1 else "")


def interval(low: float, high: float, form: str = SHARE) -> str:
    """Format the two ends of an interval."""
    return f"{low:{form}} to {high:{form}}"


def p_value(p: float) -> str:
    """Format a p-value; "-" stands for NaN."""
    return "-" if math.isnan(p) else "<0.0001" if p < 0.0001 else f"{p:.4f}"
