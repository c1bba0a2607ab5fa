"""Numbers beyond a precision's range: in float32 instead, or an error that names them; never an image or a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import oscar
from oscar import OscarCodec, checkpoint
from oscar.bottlenecks.vq import VQSymbols
from oscar.cli.main import main
from oscar.data.images import ImageError
from oscar.data.tensors import to_tensor
from oscar.inference import load as load_module
from oscar.inference import tiling
from oscar.models import precision
from oscar.models.precision import NotFiniteError, compute_finite, without_tf32
from oscar.rates import PAPER_RATES

NARROW = [torch.float16, torch.bfloat16]
SHIPPED = ("nano", "nano-vq")


class Squares(nn.Module):
    """Leaves float16's range for values from 256 on, comes back to the square's root, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1), requires_grad=False)
        self.calls: list[tuple[torch.dtype, int]] = []  # shared with copies

    def __deepcopy__(self, memo: dict) -> Squares:
        copy = Squares()
        copy.one.data = self.one.detach().clone()
        copy.calls = self.calls
        return copy.train(self.training)

    def forward(self, value: Tensor, offset: Tensor) -> Tensor:
        self.calls.append((value.dtype, len(value)))
        return (value * value * self.one).sqrt() + offset[:, None]


def test_only_what_overflows_is_computed_anew_and_in_float32():
    network = Squares().to(torch.float16).eval()
    value, offset = torch.tensor([[1.0, 2.0], [3.0, 300.0], [4.0, 1000.0]]), torch.tensor([0, 1, 2])
    result = compute_finite("root", network, nn.Module.__call__, value, offset)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([[1.0, 2.0], [4.0, 301.0], [6.0, 1002.0]]))
    assert network.calls == [(torch.float16, 3), (torch.float32, 2)]
    assert network.one.dtype == torch.float16  # as it was, so that the next result does not depend on this one

    network.calls.clear()
    compute_finite("root", network, nn.Module.__call__, value[:1], offset[:1])
    assert network.calls == [(torch.float16, 1)]


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16 and float32"), (torch.float16, "float16 and float32")],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_float32_either_is_an_error_that_names_it(dtype, computed, bad):
    network = Squares().to(dtype).eval()
    value = torch.tensor([[1.0], [bad]])
    with pytest.raises(NotFiniteError, match=f"^root has numbers that are not finite, computed in {computed}$"):
        compute_finite("root", network, nn.Module.__call__, value, torch.zeros(2))


def test_training_is_left_alone_and_double_stays_double():
    through = torch.tensor([[torch.nan]], requires_grad=True)
    for network, value in ((Squares().train(), through.detach()), (Squares().eval(), through)):
        assert compute_finite("root", network, nn.Module.__call__, value, torch.zeros(1)).isnan().all()
    double = compute_finite("root", Squares().double().eval(), nn.Module.__call__, torch.ones(1, 1), torch.zeros(1))
    assert double.dtype == torch.float64


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))


@pytest.fixture(scope="module")
def load():
    """Loads a shipped model once for each precision."""
    codecs: dict[tuple[str, torch.dtype], OscarCodec] = {}

    def load(model: str, dtype: torch.dtype) -> OscarCodec:
        if (model, dtype) not in codecs:
            codecs[model, dtype] = oscar.load(model, dtype=dtype)
        return codecs[model, dtype]

    return load


def text() -> Image.Image:
    image = Image.new("RGB", (128, 64), "white")
    for row in range(0, 64, 11):
        ImageDraw.Draw(image).text((2, row), "The quick brown fox jumps over the lazy dog", fill="black")
    return image


@pytest.fixture(scope="module")
def kinds_of_images(photographs) -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return {
        "photograph": photographs["astronaut"].crop((200, 40, 328, 104)),
        "noise": Image.fromarray(noise),
        "black": Image.new("RGB", (64, 64)),
        "red": Image.new("RGB", (64, 64), (255, 0, 0)),
        "text": text(),
    }


def three(points):
    """The lowest, a middle and the highest one."""
    return points[0], points[len(points) // 2], points[-1]


@pytest.mark.parametrize("model", SHIPPED)
def test_activations_of_shipped_models_stay_within_every_range(kinds_of_images, model):
    """Below 10,000 in every layer, where float16 ends at 65,504."""
    codec = OscarCodec.from_pretrained(model).eval()
    peaks: dict[str, float] = {}

    def watch(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            peaks[name] = max(peaks.get(name, 0), output.detach().abs().max().item())

    for name, module in codec.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: watch(name, output))
    for image in kinds_of_images.values():
        for point in three(codec.bottleneck.points):
            codec.decompress(codec.compress(image, point))
    for part in ("backbone.vae.encoder", "backbone.vae.decoder", "backbone.unet", "bottleneck"):
        assert any(name.startswith(f"{part}.") for name in peaks)
    assert {name: peak for name, peak in peaks.items() if not peak < 10_000} == {}


@pytest.mark.parametrize("kind", ["photograph", "noise", "black", "red", "text"])
@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_models_decode_alike_in_all_precisions(load, kinds_of_images, model, kind):
    """Levels of 255."""
    image, exact = kinds_of_images[kind], load(model, torch.float32)
    for point in three(exact.bottleneck.points):
        (data,) = exact.compress_batch([image], point)
        expected = exact.decompress(data)
        for dtype in NARROW:
            codec = load(model, dtype)
            error = difference(codec.decompress(data), expected)
            assert error.mean() <= 3 and error.max() <= 24
            if kind == "photograph":  # files of a narrow precision differ, and show the same image
                (own,) = codec.compress_batch([image], point)
                assert abs(len(own) - len(data)) <= 0.1 * len(data) + 4
                assert difference(exact.decompress(own), expected).mean() < 12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1), (torch.bfloat16, 8)])
def test_tiny_models_decode_alike_at_every_rate(tiny, tiny_folder, make_image, dtype, limit):
    """Random weights magnify rounding: bfloat16, of 8 bits, changes each network's result by about 2 %."""
    image = make_image(64, 64)
    codec = oscar.load(tiny_folder, dtype=dtype)
    for rate in PAPER_RATES:
        data = tiny.compress(image, rate)
        error = difference(codec.decompress(data), tiny.decompress(data)).mean()
        assert error <= limit


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 1100)])
@pytest.mark.parametrize("dtype", NARROW)
def test_any_size(load, astronaut, size, dtype):
    image = astronaut.resize(size)
    data = load("nano-vq", torch.float32).compress(image, 0.125)
    expected = load("nano-vq", torch.float32).decompress(data)
    assert difference(load("nano-vq", dtype).decompress(data), expected).max() <= 24


def overflowing(source, dtype: torch.dtype, part: str) -> OscarCodec:
    """A codec in some precision whose weights of one part make it leave float16's range."""
    codec = oscar.load(source, dtype=dtype)
    with torch.no_grad():
        codec.get_submodule(part).weight.mul_(3e4)
    return codec


@pytest.fixture
def repeated(monkeypatch) -> list[int]:
    """How many members of a batch were not finite, each time that results were looked at."""
    counts, look = [], precision._not_finite
    monkeypatch.setattr(precision, "_not_finite", lambda batch: (counts.append(int(look(batch).sum())), look(batch))[1])
    return counts


def test_batches_and_single_files_give_the_same_images(tiny_folder, make_image, repeated):
    codec = overflowing(tiny_folder, torch.float16, "backbone.unet.conv_in")
    files = codec.compress_batch([make_image(64, 64, seed) for seed in range(3)], 0.125)
    repeated.clear()
    together = codec.decompress_batch(files)
    assert max(repeated) == 3
    for data, image in zip(files, together, strict=True):
        assert difference(codec.decompress(data), image).max() <= 1


def test_cut_images_too(astronaut, monkeypatch, repeated):
    monkeypatch.setattr(tiling, "WHOLE", 64 * 64)
    monkeypatch.setattr(tiling, "STRIP", 64 * 96)
    image = astronaut.crop((100, 0, 260, 200))
    exact, narrow = (overflowing("nano-vq", dtype, "backbone.unet.conv_in") for dtype in (torch.float32, torch.float16))
    data = exact.compress(image, 0.125)
    expected = exact.decompress(data)
    assert max(repeated) == 0
    assert difference(narrow.decompress(data), expected).max() <= 24
    assert max(repeated) == 1


@pytest.mark.parametrize(
    "part", ["backbone.vae.encoder.conv_in", "backbone.vae.decoder.conv_in", "backbone.unet.conv_in"]
)
def test_each_network_of_a_tiny_codec_is_repeated(tiny_folder, make_image, part):
    """A layer before a normalisation, made large: in float32 this changes little, in float16 all."""
    codecs = [overflowing(tiny_folder, dtype, part) for dtype in (torch.float16, torch.float32)]
    point, batch = PAPER_RATES[-1], to_tensor(make_image(64, 64))
    latents = [codec.encode_latent(batch, point) for codec in codecs]
    symbols = VQSymbols(codecs[1].quantise(latents[1], point).symbols.indices, torch.ones(1, 4))
    assert (latents[0] - latents[1]).abs().mean() < 0.01 * latents[1].std()
    images = [codec.decode(symbols, point).image for codec in codecs]
    assert (images[0] - images[1]).abs().mean() < 0.01


BROKEN = [
    ("backbone.vae.encoder.conv_in", "the latent"),
    ("bottleneck.hyper_encoders.7.backbone.0", "the hyper-encoder's features"),
    ("bottleneck.hyper_encoders.7.proj.0", "the quantised latent"),
    ("backbone.unet.conv_in", "the denoised latent"),
    ("backbone.vae.decoder.conv_in", "the decoded image"),
]


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize(("part", "what"), BROKEN)
def test_broken_weights_are_an_error_that_names_the_result(tiny_folder, make_image, part, what, dtype):
    codec = oscar.load(tiny_folder, dtype=dtype)
    with torch.no_grad():
        codec.get_submodule(part).weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=f"^{what} has numbers that are not finite"):
        codec.decompress(codec.compress(make_image(64, 64), 0.125))


@pytest.mark.parametrize(
    ("part", "what"), [("vae.encoder.conv_in", "the latent"), ("vae.decoder.conv_out", "the decoded image")]
)
def test_the_command_names_file_and_result_and_writes_nothing(make_codec, photos, tmp_path, capfd, part, what):
    codec = make_codec()
    with torch.no_grad():
        codec.backbone.get_submodule(part).bias.fill_(torch.inf)
    codec.save_pretrained(tmp_path / "model")
    command, source, target = ("compress", photos / "0.png", tmp_path / "out.oscar")
    if "decoder" in part:
        command, source, target = ("decompress", tmp_path / "in.oscar", tmp_path / "out.png")
        source.write_bytes(oscar.load(tmp_path / "model").compress(Image.open(photos / "0.png")))
    assert main([command, str(source), str(target), "--model", str(tmp_path / "model")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"oscar: error: {source}: {what}") and "not finite" in line
    assert not target.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", SHIPPED)
def test_images_that_are_not_finite_are_refused(load, value, model):
    codec = load(model, torch.float32)
    image = torch.zeros(3, 32, 32)
    image[1, 2, 3] = value
    with pytest.raises(ImageError, match="values from"):
        codec.compress(image)
    for call in (codec.compress_tensor, codec.reconstruct):
        with pytest.raises(ImageError, match="not finite"):
            call(image[None], codec.bottleneck.default_point)


@pytest.mark.parametrize("model", SHIPPED)
def test_auto_writes_the_files_of_float32_whatever_the_device_computes_in(load, astronaut, monkeypatch, model):
    monkeypatch.setattr("oscar.inference.load.auto_dtype", lambda device: torch.bfloat16)
    image = astronaut.crop((100, 0, 230, 140))
    for components in ("both", "encoder"):
        codec = oscar.load(model, components=components)
        assert codec.dtype == torch.float32
        points = codec.points[:: len(codec.points) // 4]
        assert [codec.compress_batch([image], point) for point in points] == [
            load(model, torch.float32).compress_batch([image], point) for point in points
        ]


def test_auto_takes_the_devices_precision_for_large_models_of_both_halves(tiny_folder, monkeypatch):
    monkeypatch.setattr("oscar.inference.load.auto_dtype", lambda device: torch.bfloat16)
    size = load_module.count_parameters(*description(tiny_folder))
    monkeypatch.setattr(load_module, "LARGE_MODEL", size + 1)
    assert oscar.load(tiny_folder).dtype == torch.float32
    monkeypatch.setattr(load_module, "LARGE_MODEL", size)
    for components in ("encoder", "decoder"):
        assert oscar.load(tiny_folder, components=components).dtype == torch.bfloat16
    assert oscar.load(tiny_folder, dtype=torch.float16).dtype == torch.float16


def description(folder):
    return folder, json.loads((folder / "oscar.json").read_text())


def test_parameters_are_those_of_the_checkpoint_and_the_backbone_it_names(make_codec, tmp_path):
    codec = make_codec()
    codec.backbone.save_pretrained(tmp_path / "backbone")
    codec.save_pretrained(tmp_path / "bundled")
    codec.backbone.source = str(tmp_path / "backbone")
    codec.save_pretrained(tmp_path / "apart")
    networks = sum(
        value.numel()
        for value in (*codec.backbone.vae.state_dict().values(), *codec.backbone.plain_unet().state_dict().values())
    )
    own = sum(value.numel() for value in checkpoint.tensors(codec).values())
    for name in ("bundled", "apart"):
        assert load_module.count_parameters(*description(tmp_path / name)) == networks + own
    _, config = description(tmp_path / "apart")
    for source in ("someone/backbone", str(tmp_path)):  # on the hub; a folder without weights
        assert load_module.count_parameters(tmp_path / "apart", config | {"backbone": source}) == float("inf")


def test_encoders_use_all_of_float32_on_devices_with_tensorfloat32(load, astronaut, monkeypatch):
    codec, seen = load("nano-vq", torch.float32), []
    assert torch.backends.cudnn.allow_tf32
    for network in (codec.backbone.vae.encoder, codec.bottleneck.at(codec.bottleneck.default_point).backbone):
        forward = network.forward
        monkeypatch.setattr(
            network,
            "forward",
            lambda *args, forward=forward: (seen.append(torch.backends.cudnn.allow_tf32), forward(*args))[1],
        )
    codec.compress(astronaut.crop((0, 0, 64, 64)), effort=1)
    assert seen == [False, False, False]
    assert torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert torch.backends.cudnn.enabled
