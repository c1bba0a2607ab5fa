"""Networks. The libraries behind them are imported here first, so that what they say of themselves is kept off stderr.

Only these messages, and only while they are imported: that bitsandbytes, which diffusers and peft import where it is
installed, lacks a kernel of 4-bit weights, which nothing here has; and that a library of CompressAI's calls what torch
is about to drop. Both appear anew where a program of one's own causes them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    def is_worth_saying(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(is_worth_saying)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated\.", FutureWarning)
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated\.", DeprecationWarning)
            yield
    finally:
        logger.removeFilter(is_worth_saying)


with _quiet():
    import compressai  # noqa: F401
    import diffusers.models.modeling_utils  # noqa: F401
