"""Networks. The library behind them is imported here first, so that what it says of itself is kept off stderr."""

from oscar.utils.lean_imports import quiet

with quiet():
    import diffusers.models.modeling_utils  # noqa: F401
