"""Clocks against known durations, stages and multiply-accumulates against counts by hand, memory in real processes."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import oscar.codec as flow
from oscar.baselines.base import CodecError, Encoded, ImageCodec
from oscar.benchmark.speed import clocks, memory, parameters, stages, timing
from oscar.benchmark.speed.memory import TimingError
from oscar.benchmark.speed.stages import OTHER, WHOLE
from oscar.bitstream import Container
from oscar.bottlenecks import vq
from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.evaluation.codecs import make_codec
from oscar.inference.cpu.fewer import SharedUpsample2D
from oscar.inference.kernels import every_multiplication
from oscar.models.denoiser import Denoiser

SIZE = (128, 64)
RATE = 0.0625
ENCODE_STAGES = ["vae_encode", "bottleneck_quantise", "entropy_encode", "container_write", OTHER, WHOLE]
DECODE_STAGES = ["container_read", "entropy_decode", "bottleneck_dequantise", "unet_step", "vae_decode", OTHER, WHOLE]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class Clock:
    """Stands in for time: tells the time that calls say they take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, call=lambda *args, **kwargs: None):
        def run(*args, **kwargs):
            self.now += seconds
            return call(*args, **kwargs)

        return run


class Deflate(ImageCodec):
    """A baseline without torch; fails at point 9."""

    name, label, point_name = "deflate", "Deflate", "level"
    points, grid = (6.0,), (1.0, 6.0, 9.0)

    def encode(self, image: Image.Image, point: float) -> Encoded:
        if point == 9:
            raise CodecError("deflate: level 9 fails today")
        return Encoded(bytes([*image.size]) + zlib.compress(image.tobytes(), int(point)))

    def decode(self, data: bytes) -> Image.Image:
        return Image.frombytes("RGB", tuple(data[:2]), zlib.decompress(data[2:]))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (clocks, stages):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def ours(tiny_folder) -> ImageCodec:
    return make_codec("oscar", model=str(tiny_folder), device="cpu")


@pytest.fixture
def image(make_image) -> Image.Image:
    return make_image(*SIZE)


# Clocks.


def test_interleaved_takes_turns_and_leaves_out_the_warm_up(clock: Clock) -> None:
    order: list[str] = []
    syncs: list[float] = []
    calls = {
        name: clock.taking(seconds, lambda name=name: order.append(name))
        for name, seconds in {"a": 1, "b": 2, "c": 4}.items()
    }
    ticks: list[int] = []
    seconds = clocks.interleaved(calls, 3, 1, sync=lambda: syncs.append(clock.now), tick=lambda: ticks.append(1))
    assert "".join(order) == "cababcbcacab"
    assert {name: values.tolist() for name, values in seconds.items()} == {"a": [1] * 3, "b": [2] * 3, "c": [4] * 3}
    assert len(syncs) == 2 * len(order) and len(ticks) == len(order)
    assert clocks.paired_ratio(seconds["c"], seconds["b"]) == 2


def test_ratio_is_of_rounds_so_that_a_slow_spell_does_not_matter() -> None:
    spell = np.array([1, 1, 1, 10, 10])
    assert clocks.paired_ratio(3 * spell, spell) == 3


def test_percentiles_of_known_durations(clock: Clock) -> None:
    durations = iter([5.0] + [n / 1000 for n in range(1, 102)])  # the first is warm-up

    def call() -> None:
        clock.now += next(durations)

    seconds = clocks.interleaved({"call": call}, repeats=101, warmup=1)["call"]
    assert clocks.percentiles(seconds, "encode_") == pytest.approx(
        {"encode_p50_ms": 51, "encode_p90_ms": 91, "encode_p99_ms": 100}
    )


def test_waits_for_cuda_devices_only(monkeypatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clocks.synchroniser([torch.device("cpu")])()
    assert not waited
    clocks.synchroniser(iter([torch.device("cpu"), torch.device("cuda:1")]))()
    clocks.synchroniser([torch.device("cuda:0")])()
    assert [device.index for device in waited] == [1, 0]


# Stages.


def test_each_stage_gets_its_own_time(ours, image, clock: Clock, monkeypatch) -> None:
    codec = ours.codec
    for owner, name, seconds in (
        (flow.OscarCodec, "encode_latent", 1),
        (HyperEncoder, "encode", 2),
        (vq, "encode_grid", 4),
        (Container, "pack", 8),
        (flow.OscarCodec, "compress_tensor", 16),
        (Container, "unpack", 32),
        (vq, "decode_grid", 64),
        (HyperEncoder, "decode", 128),
        (Denoiser, "forward", 256),
        (flow.OscarCodec, "decode_image", 512),
        (flow.OscarCodec, "decode", 1024),
    ):
        monkeypatch.setattr(owner, name, clock.taking(seconds, getattr(owner, name)))
    times = stages.stage_times(codec, image, RATE, repeats=2, warmup=1)
    expected = {
        "encode": dict(zip(ENCODE_STAGES, (1, 2, 4, 8, 16, 31), strict=True)),
        "decode": dict(zip(DECODE_STAGES, (32, 64, 128, 256, 512, 1024, 2016), strict=True)),
    }
    for direction, costs in expected.items():
        assert {stage: values.tolist() for stage, values in times[direction].items()} == {
            stage: [seconds] * 2 for stage, seconds in costs.items()
        }
        assert list(times[direction]) == list(costs)


def test_stages_sum_to_the_whole_call(ours, make_image, clock: Clock, monkeypatch) -> None:
    """Measured, not made up: against the same call without any wrapper, by each one's quickest run.

    In processor time of the one thread, which a busy machine changes little.
    """
    monkeypatch.setattr(clock, "perf_counter", time.process_time)
    codec, image = ours.codec, make_image(256, 192)
    data = codec.compress(image, RATE)
    plain = clocks.interleaved(
        {"encode": lambda: codec.compress(image, RATE), "decode": lambda: codec.decompress(data)}, repeats=5
    )
    times = stages.stage_times(codec, image, RATE, repeats=5)
    for direction, costs in times.items():
        parts = sum(values for stage, values in costs.items() if stage not in (WHOLE, OTHER))
        assert np.allclose(parts + costs[OTHER], costs[WHOLE])
        assert (parts < costs[WHOLE]).all() and np.median(parts / costs[WHOLE]) > 0.7
        assert costs[WHOLE].min() == pytest.approx(plain[direction].min(), rel=0.4)


def test_the_codec_is_left_as_it_was(ours, image) -> None:
    codec = ours.codec

    def fail() -> None:
        assert "encode_latent" in vars(codec)
        raise KeyError("from the call")

    stages.stage_times(codec, image, RATE, repeats=1)
    with pytest.raises(KeyError, match="from the call"):
        stages.stage_costs(codec, "encode", fail, lambda: 0.0)
    changed = {"encode_latent", "quantise", "write", "open", "read", "dequantise", "forward", "decode_image"}
    assert not any(changed & {*vars(owner)} for owner in (codec, codec.bottleneck, codec.denoiser))


def test_a_model_with_a_hyperprior_is_timed_at_a_quality(make_image) -> None:
    codec = make_codec("oscar", model="nano").codec
    assert stages.codec_calls(codec, make_image(64, 48), 0.5)["decode"]().size == (64, 48)
    times = stages.stage_times(codec, make_image(64, 48), 0.5, repeats=1, warmup=0)
    for direction in ("encode", "decode"):
        *parts, whole = (values[0] for values in times[direction].values())
        assert sum(parts) == pytest.approx(whole) and whole > 0


def test_a_stage_that_is_passed_by_is_an_error(ours, image, monkeypatch) -> None:
    codec = ours.codec
    data = codec.compress(image, RATE)
    black = flow.Decoded(None, *[torch.zeros(1, 3, SIZE[1], SIZE[0])] * 3)
    monkeypatch.setattr(flow.OscarCodec, "decode", lambda *_: black)
    with pytest.raises(TimingError, match="^decode did not pass through stage bottleneck_dequantise$"):
        stages.stage_costs(codec, "decode", lambda: codec.decompress(data), lambda: 0.0)


# Multiply-accumulates and parameters.


def macs_by_hand(modules: list[nn.Module], call) -> int:
    """Of the convolutions and linear layers below `modules` in one call, from the shapes that they see."""
    total = 0

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.ConvTranspose2d):
            total += inputs[0].numel() * layer.weight[0].numel()
        else:
            total += output.numel() * layer.weight[0].numel()

    layers = [
        layer
        for module in modules
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    call()
    for handle in handles:
        handle.remove()
    return total


def attention_macs(unet: nn.Module, call) -> int:
    """Of queries with keys, and of their weights with values, in one call."""
    total = 0

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        nonlocal total
        prompt = getattr(layer, "prompt_key", None)  # of the cached prompt, (heads, tokens, channels)
        keys = args[0].shape[1] if prompt is None else prompt.shape[1]
        total += 2 * output.shape[0] * output.shape[1] * keys * layer.to_q.weight.shape[0]

    handles = [
        layer.register_forward_hook(hook, with_kwargs=True)
        for name, layer in unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    call()
    for handle in handles:
        handle.remove()
    return total


def test_macs_equal_those_by_hand(ours, image) -> None:
    codec = ours.codec
    data = codec.compress(image, RATE)
    macs = stages.stage_macs(codec, image, RATE)
    classes = [type(module) for module in codec.modules()]
    with every_multiplication(codec):
        check_macs(codec, image, data, macs)
    assert [type(module) for module in codec.modules()] == classes and SharedUpsample2D in classes


def check_macs(codec, image, data: bytes, macs: dict) -> None:
    rate = codec.bottleneck.parse(RATE)
    coder, vae = codec.bottleneck.at(rate), codec.backbone.vae
    assert list(macs["encode"]) == ENCODE_STAGES and list(macs["decode"]) == DECODE_STAGES

    def encode() -> None:
        codec.compress(image, RATE)

    def decode() -> None:
        codec.decompress(data)

    rows, columns = rate.grid_shape(SIZE[1], SIZE[0])
    search = rows * columns * coder.quantizer.codebook.numel()
    encoder = [coder.backbone, coder.quantizer.project_in]
    assert macs["encode"]["bottleneck_quantise"] == macs_by_hand(encoder, encode) + search
    decoder = [coder.quantizer.project_out, coder.proj]
    assert macs["decode"]["bottleneck_dequantise"] == macs_by_hand(decoder, decode)
    by_hand = macs_by_hand([codec.denoiser.unet], decode) + attention_macs(codec.denoiser.unet, decode)
    assert macs["decode"]["unet_step"] == by_hand
    tokens, width = SIZE[0] * SIZE[1] // 64, vae.config.block_out_channels[-1]
    attention = 2 * tokens**2 * width  # one layer in the middle of the VAE
    assert macs["decode"]["vae_decode"] == macs_by_hand(codec.backbone.decoder_modules(), decode) + attention
    assert macs["encode"]["vae_encode"] == macs_by_hand([vae.encoder, vae.quant_conv], encode) + attention
    for costs in macs.values():
        assert costs[OTHER] == 0
        assert costs[WHOLE] == sum(value for stage, value in costs.items() if stage != WHOLE)


def test_parameters_sum_to_the_model(make_codec) -> None:
    codec = make_codec()
    counts = parameters.parameter_counts(codec)
    codebooks = sum(codec.bottleneck.at(rate).quantizer.codebook.numel() for rate in codec.bottleneck.rates)
    own = sum(parameter.numel() for parameter in codec.parameters())
    assert sum(row["parameters"] for row in counts) == own + codebooks
    parts = {row["part"]: row["parameters"] for row in counts if row["rate"] is None}
    assert min(parts.values()) > 0
    assert sum(row["part"] == "bottleneck_encoder" for row in counts) == len(codec.bottleneck.rates)
    codec.denoiser.merge()
    merged = {row["part"]: row for row in parameters.parameter_counts(codec) if row["rate"] is None}
    assert {part: row["parameters"] for part, row in merged.items()} == parts
    assert "merged" in merged["adapters"]["note"]


def test_parameters_of_full_tuning_have_no_adapters(make_codec) -> None:
    counts = {row["part"]: row for row in parameters.parameter_counts(make_codec(tuning="full"))}
    assert (counts["adapters"]["parameters"], counts["adapters"]["note"]) == (0, None)


# Memory.


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Puts a shell script in the place of the interpreter of child processes."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(memory.sys, "executable", str(path))

    return replace


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for the interpreter")
def test_a_child_that_fails_costs_one_clear_line(ours, image, python) -> None:
    python("echo chatter; echo '{\"loaded_mib\": 1.5}'")
    assert memory.peak_memory(ours, image, RATE, "decode") == {"loaded_mib": 1.5}
    for script, message in (
        ("echo trace >&2; echo 'ValueError: no such model' >&2; exit 1", "ValueError: no such model$"),
        ("kill -9 $$", "ended by signal 9"),
        ("exit 3", "no message$"),
    ):
        python(script)
        with pytest.raises(TimingError, match=f"^memory of encode at {ours.name} 0.0625: .*{message}"):
            memory.peak_memory(ours, image, RATE, "encode")
    python("exec sleep 30")
    with pytest.raises(TimingError, match="not done after 0.2 s$"):
        memory.peak_memory(ours, image, RATE, "encode", timeout=0.2)


@linux
def test_peak_is_the_process_own_and_can_start_anew() -> None:
    """Not the parent's, which getrusage would hand down over fork and exec."""
    ballast = b"\1" * (1 << 30)
    code = """if True:
        from oscar.benchmark.speed import memory
        loaded, peak = memory.resident_memory()
        ballast = bytearray(b"\\1" * (64 << 20))
        grown = memory.resident_memory()
        del ballast
        assert memory.forget_peak()
        print(loaded, peak, *grown, *memory.resident_memory())
    """
    root = Path(memory.__file__).parents[3]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    loaded, peak, grown, grown_peak, left, left_peak = map(float, output.split())
    assert len(ballast) / 2**20 == 1024 > 2 * peak
    assert loaded <= peak and grown >= loaded + 60
    assert grown_peak >= grown > left_peak >= left


@linux
@pytest.mark.slow
def test_memory_of_both_directions_in_real_processes(ours, make_image) -> None:
    large = make_image(1024, 768)
    for direction in timing.DIRECTIONS:
        row = memory.peak_memory(ours, large, RATE, direction)
        assert set(row) == {"loaded_mib", "call_peak_mib", "process_peak_mib"}
        assert 50 < row["loaded_mib"] < row["call_peak_mib"] <= row["process_peak_mib"]
        assert row["call_peak_mib"] > row["loaded_mib"] + 24  # one feature map of the VAE in full size


# The whole.


def test_run_timing_makes_all_tables(ours, image, monkeypatch) -> None:
    def peak_memory(codec, image, point, direction):
        if direction == "decode":
            raise TimingError("memory of decode: not done after 600 s")
        return {"loaded_mib": 100.0, "call_peak_mib": 150.0, "process_peak_mib": 150.0}

    monkeypatch.setattr(timing, "peak_memory", peak_memory)
    result = timing.run_timing(
        [ours, Deflate()], image, {ours.name: [0.0019, RATE]}, repeats=2, warmup=1, batch_sizes=[1, 3], progress=False
    )
    latency = result.latency
    assert list(zip(latency.codec, latency.point, strict=True)) == [
        (ours.name, 0.0019),
        (ours.name, RATE),
        ("deflate", 6),
    ]
    assert list(latency.device[:2]) == ["cpu"] * 2 and list(latency.dtype[:2]) == ["float32"] * 2
    assert latency.encode_ratio[0] == latency.decode_ratio[0] == 1
    assert latency.decode_ratio[2] < 0.5  # deflate against networks
    assert (latency.encode_p50_ms > 0).all() and (latency.encode_p99_ms >= latency.encode_p90_ms).all()
    assert set(latency.repeats) == {2} and set(latency.warmup) == {1} and latency.note.isna().all()

    stages = result.stages
    assert set(stages.codec) == {ours.name} and len(stages) == 2 * (len(ENCODE_STAGES) + len(DECODE_STAGES))
    for _, rows in stages.groupby(["point", "direction"]):
        assert rows[rows.stage != WHOLE].share_percent.sum() == pytest.approx(100)

    throughput = result.throughput
    assert list(throughput.batch_size) == [1, 1, 3, 3] * 2
    assert np.allclose(throughput.images_per_s * throughput.batch_p50_ms / 1000, throughput.batch_size)
    assert np.allclose(throughput.megapixels_per_s / throughput.images_per_s, SIZE[0] * SIZE[1] / 1e6)

    assert list(result.memory.loaded_mib[result.memory.direction == "encode"]) == [100, 100]
    failed = result.memory[result.memory.direction == "decode"]
    assert failed.call_peak_mib.isna().all() and set(failed.note) == {"memory of decode: not done after 600 s"}

    assert set(result.parameters.part) >= {"vae_encoder", "vae_decoder", "unet", "prompt", "adapters", "codebook"}
    whole = result.macs[result.macs.stage == WHOLE]
    assert np.allclose(whole.kmacs_per_pixel * 1e3 * SIZE[0] * SIZE[1], whole.gmacs * 1e9)
    for table in (latency, stages, throughput, result.memory, result.macs):
        assert set(table.width) == {SIZE[0]} and set(table.height) == {SIZE[1]}
    assert json.loads(json.dumps(result.hardware))["threads"] == 1


def test_baselines_have_latency_only_and_one_may_fail(image) -> None:
    result = timing.run_timing([Deflate()], image, {"deflate": [9, 1]}, repeats=1, warmup=0, progress=False)
    assert list(result.latency.note[:1]) == ["deflate: level 9 fails today"]
    assert math.isnan(result.latency.encode_p50_ms[0]) and result.latency.encode_ratio[1] == 1
    for name in ("stages", "throughput", "memory", "parameters", "macs"):
        table = getattr(result, name)
        assert table.empty and "codec" in table.columns


def test_a_batch_too_large_for_the_memory_costs_a_note(ours, image, monkeypatch) -> None:
    plain = flow.OscarCodec.compress_tensor

    def compress(self, batch, *options):
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return plain(self, batch, *options)

    monkeypatch.setattr(flow.OscarCodec, "compress_tensor", compress)
    result = timing.run_timing(
        [ours], image, {ours.name: [RATE]}, repeats=1, warmup=0, batch_sizes=[1, 4], memory=False, progress=False
    )
    assert result.memory.empty
    small, large = (result.throughput[result.throughput.batch_size == size] for size in (1, 4))
    assert (small.images_per_s > 0).all() and small.note.isna().all()
    assert large.images_per_s.isna().all() and large.note.str.startswith("CUDA out of memory").all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": {"jpeg": [50]}}, "points of codec 'jpeg': no such codec here; allowed: deflate"),
        ({"points": {"deflate": [7]}}, "level 7 is not allowed"),
        ({"repeats": 0}, "repeats 0"),
        ({"warmup": -1}, "warmup -1"),
        ({"batch_sizes": [2, 0]}, r"batch sizes \[2, 0\]"),
        ({"codecs": []}, "timing of 0 codecs"),
    ],
)
def test_bad_requests(image, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        timing.run_timing(**{"codecs": [Deflate()], "image": image, "progress": False, **options})
