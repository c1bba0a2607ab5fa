"""A quick start and end of the process that the `oscar` command is; other programs' processes are left as they are."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

from oscar.cli.messages import INTERRUPTED
from oscar.utils.lean_imports import hidden, without_init

# Diffusers imports them where they are installed: weights of other kinds, adapters, prompts, and torch.compile, which
# takes as long as all the rest.
_UNUSED = ("bitsandbytes", "peft", "torchvision", "transformers")

is_own_process = False  # whether nobody else needs what coding does not


@contextlib.contextmanager
def imports(compiles: bool = False) -> Iterator[None]:
    """As long as this lasts, import the networks without what coding makes no use of; only in a process of our own.

    Args:
        compiles: whether torch.compile will be used.
    """
    with contextlib.ExitStack() as stack:
        if is_own_process:
            stack.enter_context(hidden(*_UNUSED, *(() if compiles else ("torch._dynamo",))))
            stack.enter_context(without_init("scipy.stats"))
            if not compiles:
                stack.enter_context(mock.patch("torch.compiler.disable", _as_is))
        yield


def _as_is(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda function: function


def leave(code: int) -> NoReturn:
    """End the process without taking torch's modules down one by one, which takes a second."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        code = code or INTERRUPTED
    os._exit(code)
