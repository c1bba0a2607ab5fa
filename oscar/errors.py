"""Errors of libraries as the one line that a user sees."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
