"""A codec's time and multiply-accumulates by stage of its flow.

`torch.profiler` records every operation, which makes a small model's call slower and its measurement several times as
long, does not wait for a GPU between stages, and counts no attention. Here `stage_costs` wraps the methods that
`OscarCodec` calls, for the time of a measurement, so that no second copy of the flow can drift from it, and reads any
meter around them: a clock, or the counter of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
from PIL import Image

from oscar.benchmark.speed.clocks import synchroniser
from oscar.benchmark.speed.memory import TimingError

if TYPE_CHECKING:
    from oscar.codec import OscarCodec

WHOLE, OTHER = "whole call", "other"  # rows of the stage tables beside the stages


def codec_calls(codec: OscarCodec, image: Image.Image, point: float) -> dict[str, Callable[[], object]]:
    """By direction: image in memory -> bytes in memory, and back."""
    encode = partial(codec.compress, image, point)
    return {"encode": encode, "decode": partial(codec.decompress, encode())}


def _stages(codec: OscarCodec, direction: str) -> tuple[tuple[str, object, str], ...]:
    """Stage, and the owner and name of the function that is this stage; a stage's time is without those it calls."""
    if direction == "encode":
        return (
            ("vae_encode", codec, "encode_latent"),
            ("bottleneck_quantise", codec.bottleneck, "quantise"),
            ("entropy_encode", codec.bottleneck, "write"),
            ("container_write", codec, "write"),
        )
    return (
        ("container_read", codec, "open"),
        ("entropy_decode", codec.bottleneck, "read"),
        ("bottleneck_dequantise", codec.bottleneck, "dequantise"),
        ("unet_step", codec.denoiser, "forward"),
        ("vae_decode", codec, "decode_image"),
    )


def stage_costs(
    codec: OscarCodec, direction: str, call: Callable[[], object], read: Callable[[], float]
) -> dict[str, float]:
    """Share one call's cost among the stages of the flow.

    Args:
        codec: the codec that `call` uses.
        direction: "encode" or "decode".
        call: compresses or decompresses.
        read: a meter that only rises: a clock, a counter of operations.

    Returns:
        What the meter rose by in each stage, in `OTHER`, and in `WHOLE`, which is their sum.

    Raises:
        TimingError: if the call did not pass through one of the stages.
    """
    spent: dict[str, float] = {}
    nested = [0.0]  # by depth: cost of the stages within the present one

    def metered(stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            nested.append(0.0)
            begin = read()
            result = function(*args, **kwargs)
            cost = read() - begin
            spent[stage] = spent.get(stage, 0.0) + cost - nested.pop()
            nested[-1] += cost
            return result

        return run

    stages = _stages(codec, direction)
    with ExitStack() as stack:
        for stage, owner, name in stages:
            stack.enter_context(patch.object(owner, name, metered(stage, getattr(owner, name))))
        metered(OTHER, call)()
    missing = [stage for stage, _, _ in stages if stage not in spent]
    if missing:
        raise TimingError(f"{direction} did not pass through stage {missing[0]}")
    return {stage: spent[stage] for stage in (*(stage for stage, _, _ in stages), OTHER)} | {WHOLE: nested[0]}


def stage_times(
    codec: OscarCodec,
    image: Image.Image,
    point: float,
    repeats: int,
    warmup: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds (repeats,) by direction and stage, waiting for the device between stages; see `stage_costs`."""
    wait = synchroniser([codec.device])

    def clock() -> float:
        wait()
        return time.perf_counter()

    result = {}
    for direction, call in codec_calls(codec, image, point).items():
        rounds = []
        for _ in range(warmup + repeats):
            rounds.append(stage_costs(codec, direction, call, clock))
            tick()
        result[direction] = {stage: np.array([costs[stage] for costs in rounds[warmup:]]) for stage in rounds[0]}
    return result


def stage_macs(codec: OscarCodec, image: Image.Image, point: float) -> dict[str, dict[str, float]]:
    """Multiply-accumulates by direction and stage: convolutions, matrix products, attention; nothing element-wise.

    Convolutions count as they are written, also where they are computed with fewer multiplications.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from oscar.inference.kernels import every_multiplication

    def attention(query, key, value, *args, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # unknown to older torch
    result = {}
    for direction, call in codec_calls(codec, image, point).items():
        counter = FlopCounterMode(display=False, custom_mapping=cpu_attention)
        with every_multiplication(codec), counter:
            flops = stage_costs(codec, direction, call, counter.get_total_flops)
        result[direction] = {stage: value / 2 for stage, value in flops.items()}
    return result
