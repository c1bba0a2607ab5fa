"""OSCAR: a one-step diffusion image codec; one model, many bit-rates.

`from oscar import OscarCodec` is the whole of it. torch is imported when the codec is first asked for, so that
`import oscar` and the light commands of the command line start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oscar.codec import OscarCodec

__version__ = "0.1.0"
__all__ = ["OscarCodec", "__version__"]


def __getattr__(name: str) -> object:
    if name == "OscarCodec":
        from oscar.codec import OscarCodec

        return OscarCodec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
