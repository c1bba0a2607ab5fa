"""Errors of libraries as the one line that a user sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from oscar.registry import load_plugins
from oscar.utils.former import explain_former
from oscar.utils.overrides import explain, explain_commas, quote_overrides


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


def hub_reason(error: BaseException) -> str:
    """Why something is not to be had from the Hugging Face hub, which its client and diffusers wrap in other errors."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(isinstance(item, HFValidationError) for item in chain):
        return "it is no folder and no hub id"
    if any(isinstance(item, LocalEntryNotFoundError) for item in chain):
        return f"it is no folder, not in the hub's cache, and the hub cannot be reached: {first_line(chain[-1])}"
    return first_line(error)


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Have expected errors end the process with one line on stderr and exit code 2, an interrupt with 130.

    A decorator too, for the function within `hydra.main`, which would add a line of its own; in a sweep that leaves the
    error to Hydra, which runs the other jobs first. `OSCAR_TRACEBACK=1` in the environment lets errors through.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (ValueError, RuntimeError, OSError, HydraException, OmegaConfBaseException) as error:
        sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        if sweep or os.environ.get("OSCAR_TRACEBACK"):
            raise
        message = first_line(error)
        if isinstance(error, OverrideParseException):
            message = explain(error.override, first_line(error.__cause__ or error))
        elif isinstance(error, HydraException) and message.startswith("Ambiguous value for argument '"):
            message = explain_commas(message.partition("'")[2].removesuffix("'"))
        elif isinstance(error, HydraException) and (explained := explain_former(str(error))):
            message = explained
        elif isinstance(error, HydraException) and error.__cause__ is not None:
            message += f": {first_line(error.__cause__)}"
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def exit_code(name: str, main: Callable[[], None]) -> int:
    """Run what a script without Hydra does: 0, 2 and one line on stderr for an expected error, 130 for an interrupt."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{name}: error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def run_script(main: Callable[[], None], name: str) -> None:
    """Run a script's Hydra main, overrides quoted (`oscar.utils.overrides`); errors end as `one_line` says."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach this place
    with one_line(name):
        load_plugins()  # before the configuration, which may name what they add
        sys.argv[1:] = quote_overrides(sys.argv[1:])
        main()
