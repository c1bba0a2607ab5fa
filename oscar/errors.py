"""Errors of libraries as the one line that a user sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_script(main: Callable[[], None], name: str) -> None:
    """Run a script's Hydra main; expected errors become one line on stderr and exit code 2, an interrupt 130.

    `OSCAR_TRACEBACK=1` in the environment lets them through.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach this place
    try:
        main()
    except (ValueError, RuntimeError, OSError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("OSCAR_TRACEBACK"):
            raise
        message = first_line(error)
        if isinstance(error, HydraException) and error.__cause__ is not None:
            message += f": {first_line(error.__cause__)}"  # what is wrong with an override
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
