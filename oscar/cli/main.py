"""The `oscar` command: compress, decompress, info; convert, merge, add-rates, export, push; app; doctor; and scripts.

Anything wrong ends in one line on stderr and exit code 2. Help and `info` import no torch, and all that can be checked
without torch is checked before it is imported.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer

from oscar import __version__
from oscar.cli import app as page
from oscar.cli import lean
from oscar.cli.compress import compress
from oscar.cli.decompress import decompress
from oscar.cli.export import export
from oscar.cli.info import info
from oscar.cli.messages import (
    INTERRUPTED,
    WRONG_INPUT,
    CommandError,
    one_line,
    print_error,
    print_note,
)
from oscar.cli.models import add_rates, convert, merge
from oscar.cli.push import push
from oscar.cli.scripts import SCRIPTS, Script
from oscar.utils.errors import is_out_of_memory
from oscar.utils.extras import explain_missing
from oscar.utils.strict_json import dumps

# Typer has Click within it in some versions and beside it in others; this is the base of both's usage errors.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_SCRIPTS = {name.replace("_", "-"): script for name, script in SCRIPTS.items()}

app = typer.Typer(
    name="oscar",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="OSCAR image codec: one model, many bit-rates, one denoising step.",
)


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, 2 for any wrong input, 130 after an interrupt (SIGINT, and in a process of its own SIGTERM).
    """
    args = sys.argv[1:] if args is None else args
    try:
        return app(args=args or ["--help"], prog_name="oscar", standalone_mode=False) or 0
    except _UsageError as error:
        command = getattr(error.ctx, "command_path", "oscar")
        print_error(f"{error.format_message().rstrip('.')}; see {command} --help")
    except typer.Abort:
        return INTERRUPTED
    except ImportError as error:
        if (line := explain_missing(error)) is None:
            raise
        print_error(line)
    except (CommandError, ValueError, OSError) as error:  # ours derive from ValueError
        print_error(one_line(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(one_line(error))
    return WRONG_INPUT


def run() -> NoReturn:
    """The process of the `oscar` command: `main`, with a quick start, and a quick end if it is no script's."""
    lean.is_own_process = True
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind there either
    code = main()
    if sys.argv[1:2] and sys.argv[1] in _SCRIPTS:
        sys.exit(code)
    lean.leave(code)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print what this package logs as a warning in one line."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_note(f"warning: {record.getMessage()}")

    handler, logger = Lines(logging.WARNING), logging.getLogger("oscar")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False  # once, also where logging is set up
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand not in _SCRIPTS:
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # of libraries; stderr is for the one line
        context.with_resource(_warnings_as_lines())


app.command(short_help="Image(s) to .oscar file(s).")(compress)
app.command(short_help=".oscar file(s) to image(s).")(decompress)
app.command(short_help="What an .oscar file holds, or how a model was trained.")(info)
app.command(short_help="A published checkpoint to a model folder, and back.")(convert)
app.command(short_help="Rates that were trained apart to one model.")(merge)
app.command("add-rates", short_help="Rates that a trained model never saw, from stage 1.")(add_rates)
app.command(short_help="A model that codes without torch too: ONNX graphs beside it.")(export)
app.command(short_help="A model to the Hugging Face hub, with a card.")(push)
app.command(name="app", short_help="A page to try models on, in the browser.")(page.app)


@app.command(short_help="What is here, what is missing, and how to get it.")
def doctor(
    backbone: Annotated[
        list[str] | None, typer.Option(help="A backbone to look at too: folder or hub id; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which devices, backbones, weights of metrics, packages and programs are here, and how to get the others."""
    from oscar.cli.doctor import as_table, next_command, run_checks

    findings = run_checks(backbone or ())
    if as_json:
        typer.echo(dumps([vars(finding) for finding in findings], indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(as_table(findings))
    typer.echo(f"next: {next_command(findings)}")


def _add_script(name: str, script: Script) -> None:
    words = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

    @app.command(name, short_help=script.help, add_help_option=False, context_settings=words)
    def command(context: typer.Context) -> None:
        raise typer.Exit(script.main(context.args))


for _name, _script in _SCRIPTS.items():
    _add_script(_name, _script)
