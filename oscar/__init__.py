"""OSCAR: a one-step diffusion image codec; one model, many bit-rates.

`oscar.load("nano")` gives a codec that is ready for use, `OscarCodec` is its class. torch, of the extra `torch`, is
imported when one of them is first asked for, so that `import oscar` and the light commands of the command line start at
once. `oscar.runtime` does without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oscar.codec import OscarCodec
    from oscar.inference.load import load

__version__ = "0.2.0.dev0"
__all__ = ["OscarCodec", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in ("OscarCodec", "load"):
        from oscar.utils.extras import need

        need("torch")
    if name == "OscarCodec":
        from oscar.codec import OscarCodec

        return OscarCodec
    if name == "load":
        from oscar.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
