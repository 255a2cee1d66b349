"""Text for people: on a terminal, in Markdown, in JSON, or to be pasted into a shell."""

import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click


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
