"""What commands print: one line for whatever is wrong, and notes, on stderr."""

from __future__ import annotations

from pathlib import Path

import typer

from oscar.cli.processes import group
from oscar.utils.errors import is_out_of_memory
from oscar.utils.files import STDIO

WRONG_INPUT = 2  # exit code, as of usage errors
INTERRUPTED = 130
STDIN = "standard input"  # in messages


class CommandError(Exception):
    """A command that cannot go on, whichever file it is at; the message is the line that the user sees."""


def one_line(error: BaseException, path: Path | None = None) -> str:
    """The error's message in one line that begins with the path it is about."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif is_out_of_memory(error):
        message = "not enough memory"
    else:
        message = " ".join(str(error).split()) or type(error).__name__
    return message if path is None or message.startswith(name(path)) else f"{name(path)}: {message}"


def name(path: Path) -> str:
    return STDIN if path == STDIO else str(path)


def error_line(message: str) -> str:
    return "oscar: error: " + " ".join(message.splitlines())


def print_error(message: str) -> None:
    _print(error_line(message))


def print_note(message: str) -> None:
    _print("oscar: " + " ".join(message.splitlines()))


def _print(line: str) -> None:
    """Print a line on stderr; what all processes of a run have to say is said once."""
    joined = group.cache_info().currsize
    if not joined or group().is_first_to_say(line):
        typer.echo(line, err=True)
