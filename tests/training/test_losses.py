import math
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oscar.bottlenecks.vq import cosine_loss_channel, cosine_loss_spatial
from oscar.config import StageConfig
from oscar.metrics.squeezenet import CAFFE_NAMES, SqueezeNetFeatures
from oscar.metrics.weights import DOWNLOAD_TIMEOUT, WeightsUnavailable
from oscar.training import losses
from oscar.training.losses import ImageLoss
from oscar.training.perceptual_losses import FeatureDistance


def images(side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth image and a noisy copy, (2, 3, side, side)."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 8, generator=source) * 2 - 1
    target = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)
    return (target + 0.2 * torch.randn(target.shape, generator=source)).clamp(-1, 1), target


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty_cache"))


def test_chroma_sees_colours_of_blocks_alone():
    grey = torch.zeros(2, 3, 16, 24)
    assert losses.chroma(grey + 0.5, grey) == pytest.approx(0, abs=1e-12)  # lighter, and no other colour
    red = grey.clone()
    red[1, 0] = 1.0
    luma = 0.299
    expected = ((-luma / 1.772) ** 2 + ((1 - luma) / 1.402) ** 2) / 2  # of one image of two, and of two planes
    assert losses.chroma(red, grey) == pytest.approx(expected / 2, rel=1e-5)
    assert ImageLoss({"chroma": 1.0}).by_image(red, grey)[0].tolist() == pytest.approx([0, expected], rel=1e-5)
    noise = torch.tensor([1.0, -1.0]).repeat(12).expand(2, 3, 16, 24) * torch.tensor([1.0, 0, -1]).view(3, 1, 1)
    assert losses.chroma(grey + noise, grey) == pytest.approx(0, abs=1e-12)  # finer than a block
    unit = ImageLoss({"chroma": 1.0}, image_range="unit")
    assert unit(red, grey)[0] == pytest.approx(expected / 8, rel=1e-5)


def test_cosine_losses_of_known_latents() -> None:
    z0 = torch.zeros(1, 2, 1, 2)
    z0[0, :, 0, 0], z0[0, :, 0, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    z_hat = torch.zeros(1, 2, 1, 2)
    z_hat[0, :, 0, 0], z_hat[0, :, 0, 1] = torch.tensor([1.0, 1.0]), torch.tensor([0.0, -1.0])
    assert cosine_loss_spatial(z_hat, z0).item() == pytest.approx(-(1 / math.sqrt(2) - 1) / 2)
    # channels over space: (1, 0) against (1, 0), and (1, -1) against (0, 2)
    assert cosine_loss_channel(z_hat, z0).item() == pytest.approx(-(1 - 1 / math.sqrt(2)) / 2)
    assert cosine_loss_spatial(5 * z0, z0).item() == pytest.approx(-1)


def test_cosine_loss_channel_equals_the_published_implementation(golden_cases) -> None:
    for i in range(8):
        loss = cosine_loss_channel(golden_cases[f"{i}.z_hat"], golden_cases["latent"])
        torch.testing.assert_close(loss, golden_cases[f"{i}.cos_loss"].squeeze(), atol=1e-5, rtol=0)


def test_adversarial_losses() -> None:
    zero = torch.zeros(2, 1, 3, 3)
    assert losses.generator_loss(zero).item() == pytest.approx(math.log(2))
    assert losses.critic_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    logits = torch.tensor([-3.0, 0.5, 100.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(logits, torch.ones(3)) + bce(logits - 1, torch.zeros(3))
    torch.testing.assert_close(losses.critic_loss(logits, logits - 1), expected)
    logits = torch.tensor([-2.0], requires_grad=True)
    losses.generator_loss(logits).backward()
    assert logits.grad.item() == pytest.approx(-1 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize("shape", [(192, 192), (256, 181)])
def test_ms_ssim_equals_pytorch_msssim(shape: tuple[int, int]) -> None:
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    prediction, target = (image[..., : shape[0], : shape[1]] for image in images(256))
    expected = 1 - pytorch_msssim.ms_ssim((prediction + 1) / 2, (target + 1) / 2, data_range=1.0)
    torch.testing.assert_close(losses.ms_ssim(prediction, target), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "scales"), [(11, 1), (64, 3), (128, 4), (175, 4), (176, 5), (256, 5)])
def test_ms_ssim_of_small_crops(side: int, scales: int) -> None:
    prediction, target = images(side)
    prediction.requires_grad_()
    assert losses.max_scales(side) == scales
    loss = losses.ms_ssim(prediction, target)
    loss.backward()
    assert 0 < loss < 1 and prediction.grad.isfinite().all() and prediction.grad.abs().max() > 0
    assert losses.ms_ssim(target, target).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        losses.ms_ssim(prediction[..., :10], target[..., :10])


def test_ms_ssim_gradient_is_finite_for_opposite_images() -> None:
    _, target = images(192)
    prediction = (-target).requires_grad_()  # every contrast term is negative
    losses.ms_ssim(prediction, target).backward()
    assert prediction.grad.isfinite().all()


def test_sobel_edges() -> None:
    step = torch.full((1, 3, 6, 8), -1.0)
    step[..., 4:] = 1
    edges = losses.sobel_edges(step)
    expected = torch.zeros_like(step)
    expected[..., 3:5] = 1
    torch.testing.assert_close(edges, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(losses.sobel_edges(step.mT), expected.mT, atol=2e-3, rtol=0)
    slope = torch.linspace(-1, 1, 9).expand(1, 1, 5, 9)
    torch.testing.assert_close(losses.sobel_edges(slope)[..., 1:-1], torch.full((1, 1, 5, 7), 0.25), atol=2e-3, rtol=0)
    flat = torch.zeros(1, 3, 5, 5, requires_grad=True)
    assert torch.equal(losses.sobel_edges(flat), torch.zeros_like(flat))
    losses.sobel_edges(flat).sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))
    small = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.sobel_edges, small)


def test_image_loss_is_the_weighted_sum_of_its_terms() -> None:
    prediction, target = images()
    prediction.requires_grad_()
    loss = ImageLoss({"l1": 1.0, "mse": 0.5, "ms_ssim": 2, "edges_l1": 3.0, "dists": 0, "edges_features": 0.0})
    total, terms = loss(prediction, target)
    assert list(terms) == ["l1", "mse", "ms_ssim", "edges_l1"] and len(loss.networks) == 0
    torch.testing.assert_close(terms["l1"], (prediction - target).abs().mean())
    torch.testing.assert_close(terms["mse"], (prediction - target).square().mean())
    edges = [losses.sobel_edges(image) for image in (prediction, target)]
    torch.testing.assert_close(terms["edges_l1"], 2 * (edges[0] - edges[1]).abs().mean())
    expected = terms["l1"] + 0.5 * terms["mse"] + 2 * terms["ms_ssim"] + 3 * terms["edges_l1"]
    torch.testing.assert_close(total, expected)
    total.backward()
    assert prediction.grad.isfinite().all() and prediction.grad.abs().max() > 0
    assert ImageLoss({})(prediction, target) == (0, {})


def test_image_loss_ignores_mixed_precision() -> None:
    prediction, target = images()
    loss = ImageLoss({"ms_ssim": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = loss(prediction, target)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, loss(prediction, target)[0])


@pytest.mark.parametrize(
    ("weights", "paths", "message"),
    [
        ({"ssim": 1.0}, None, "'ssim' does not exist; allowed: l1, mse"),
        ({"l1": -1.0}, None, "l1 = -1.0 is not allowed"),
        ({"l1": float("nan")}, None, "l1 = nan is not allowed"),
        ({"l1": 1.0}, {"vgg": "x"}, "'vgg' does not exist; allowed: vgg16"),
    ],
)
def test_image_loss_refuses(weights: dict, paths: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageLoss(weights, paths)


# ---- perceptual networks: random weights stand in for the real files


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in the layouts of the real files."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    state = {}
    for key, value in SqueezeNetFeatures().state_dict().items():
        for caffe, own in CAFFE_NAMES.items():
            key = key.replace(f".{own}.", f"/{caffe}.")
        state[key] = value
    state |= {"conv_final.weight": torch.zeros(1000, 512, 1, 1), "conv_final.bias": torch.zeros(1000)}
    torch.save(state, folder / "squeezenet.pth")
    for name in ("alexnet", "vgg16"):
        with torch.device("meta"):  # no need to draw the classifier's 100 million weights
            shapes = getattr(torchvision.models, name)(weights=None).features.state_dict()
        drawn = {f"features.{key}": 0.05 * torch.randn(value.shape) for key, value in shapes.items()}
        torch.save({**drawn, "classifier.6.bias": torch.zeros(1000)}, folder / f"{name}.pth")
    torch.save({"alpha": torch.rand(1, 1475, 1, 1), "beta": torch.rand(1, 1475, 1, 1)}, folder / "dists.pth")
    return {name: folder / f"{name}.pth" for name in ("squeezenet", "alexnet", "vgg16", "dists")}


@pytest.mark.parametrize("name", ["features", "lpips_alex", "dists"])
def test_networks_with_weights_from_files(name: str, weight_files: dict[str, Path], no_network: None) -> None:
    if name != "features":
        pytest.importorskip({"lpips_alex": "lpips", "dists": "pyiqa"}[name])
    loss = ImageLoss({name: 1.0, f"edges_{name}": 0.5}, weight_files).train()
    assert list(loss.networks) == [name] and not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())
    prediction, target = images()
    prediction.requires_grad_()
    total, terms = loss(prediction, target)
    by_image, _ = loss.by_image(prediction, target)
    assert by_image.shape == (len(prediction),)
    torch.testing.assert_close(by_image.mean(), total)
    assert list(terms) == [name, f"edges_{name}"] and all(term > 0 for term in terms.values())
    total.backward()
    assert prediction.grad.isfinite().all() and prediction.grad.abs().max() > 0
    assert loss(target, target)[0].item() == pytest.approx(0, abs=1e-5)


def test_trunk_weights_land_in_their_layers(weight_files: dict[str, Path]) -> None:
    pytest.importorskip("lpips")
    own = torch.load(weight_files["alexnet"], weights_only=True)
    network = ImageLoss({"lpips_alex": 1.0}, weight_files).networks["lpips_alex"].network
    assert torch.equal(network.net.slice3[1].weight, own["features.6.weight"])
    assert network.lin0.model[-1].weight.min() >= 0, "the calibrated layers of the package"


@pytest.mark.parametrize("name", ["dists", "lpips_vgg", "lpips_alex", "features"])
def test_missing_weights_are_named_without_touching_the_network(name: str, no_network: None) -> None:
    if name in ("dists", "lpips_vgg", "lpips_alex"):
        pytest.importorskip({"dists": "pyiqa"}.get(name, "lpips"))
    with pytest.raises(WeightsUnavailable) as caught:
        ImageLoss({name: 1.0})
    needed = {"dists": ("dists", "vgg16"), "lpips_vgg": ("vgg16",), "lpips_alex": ("alexnet",)}
    files = " ".join(f"+stage.network_files.{file}=FILE" for file in needed.get(name, ("squeezenet",)))
    more = "" if name == "features" else ", or stage.download=true to download"
    message = str(caught.value)
    assert message.partition("; allowed: ")[2] == files + more and len(message.splitlines()) == 1


def test_of_two_files_the_one_that_is_there_is_not_asked_for(
    no_network: None, weight_files: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("pyiqa")
    with pytest.raises(WeightsUnavailable, match=r"^dists weights are not .*: \+stage\.network_files\.dists=FILE, or"):
        ImageLoss({"dists": 1.0}, {"vgg16": weight_files["vgg16"]})
    absent = {"vgg16": tmp_path / "a.pth", "dists": tmp_path / "b.pth"}
    with pytest.raises(WeightsUnavailable, match=r"^dists weights: no file .*b\.pth; vgg16 weights: no file .*a\.pth$"):
        ImageLoss({"dists": 1.0}, absent)


def test_the_stages_switch_allows_the_download(monkeypatch: pytest.MonkeyPatch, weight_files, tmp_path: Path) -> None:
    pytest.importorskip("pyiqa")
    asked = []

    def download(url: str, destination: str, progress: bool) -> None:
        asked.append(Path(destination).name)
        name = "dists" if "DISTS" in url else "vgg16"
        Path(destination).write_bytes(weight_files[name].read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    stage = StageConfig(image_losses={"dists": 1.0})
    with pytest.raises(WeightsUnavailable):
        ImageLoss.of(stage)
    ImageLoss.of(replace(stage, download=True))
    assert asked == ["DISTS_weights-f5e65c96.pth", "vgg16-397923af.pth"]


def test_failed_downloads_end_in_the_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")

    def silent(*args, **kwargs):
        assert socket.getdefaulttimeout() == DOWNLOAD_TIMEOUT
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", silent)
    way_out = r"timed out; allowed: \+stage\.network_files\.alexnet=FILE$"
    with pytest.raises(WeightsUnavailable, match=f"^alexnet weights cannot be downloaded: {way_out}"):
        ImageLoss({"lpips_alex": 1.0}, download=True)
    assert socket.getdefaulttimeout() is None


def test_unusable_weight_files(weight_files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    with pytest.raises(WeightsUnavailable, match="no file"):
        ImageLoss({"features": 1.0}, {"squeezenet": tmp_path / "absent.pth"})
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not a torch file")
    for name, weight in (("features", "squeezenet"), ("lpips_alex", "alexnet")):
        with pytest.raises(WeightsUnavailable, match="damaged.pth"):
            ImageLoss({name: 1.0}, {weight: damaged})
    with pytest.raises(WeightsUnavailable, match="lack slice2.3.weight"):
        ImageLoss({"lpips_alex": 1.0}, {"alexnet": weight_files["vgg16"]})
    with pytest.raises(WeightsUnavailable, match="not a torchvision alexnet"):
        ImageLoss({"lpips_alex": 1.0}, {"alexnet": weight_files["squeezenet"]})


def test_weights_in_the_layout_of_the_real_file(weight_files: dict[str, Path]) -> None:
    """SqueezeNet v1.0's Caffe export: its keys, and its 1,248,424 weights."""
    weights = torch.load(weight_files["squeezenet"], weights_only=True)
    convolutions = ["conv1", "conv_final", *(f"fire{n}/{part}" for n in range(2, 10) for part in CAFFE_NAMES)]
    assert weights.keys() == {f"{name}.{leaf}" for name in convolutions for leaf in ("weight", "bias")}
    assert {"conv1x1_1", "conv1x1_2", "conv3x3_2"} == set(CAFFE_NAMES)
    assert sum(value.numel() for value in weights.values()) == 1_248_424


def test_every_squeezenet_key_is_accounted_for(weight_files: dict[str, Path]) -> None:
    weights = torch.load(weight_files["squeezenet"], weights_only=True)
    network = SqueezeNetFeatures()
    network.load_caffe_weights(weights)
    assert torch.equal(network.fire5.expand3.weight, weights["fire5/conv3x3_2.weight"])
    with pytest.raises(ValueError, match="lack 'conv1.weight'"):
        network.load_caffe_weights({key: value for key, value in weights.items() if key != "conv1.weight"})
    with pytest.raises(ValueError, match="unknown 'fire10.squeeze.weight'"):
        network.load_caffe_weights({**weights, "fire10/conv1x1_1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'conv1.bias' has shape"):
        network.load_caffe_weights({**weights, "conv1.bias": torch.zeros(1)})


def test_features_layout() -> None:
    network = SqueezeNetFeatures(taps=("conv1", "fire2", "fire4", "fire8", "fire9"))
    shapes = [tuple(tap.shape[1:]) for tap in network(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(96, 29, 45), (128, 14, 22), (256, 14, 22), (512, 7, 11), (512, 3, 5)]
    assert len(network(torch.zeros(1, 3, 21, 21))) == 5
    with pytest.raises(ValueError, match="at least 21 pixels"):
        network(torch.zeros(1, 3, 20, 64))
    with pytest.raises(ValueError, match="'fire1' does not exist"):
        SqueezeNetFeatures(taps=("fire1",))


def test_features_take_bgr_minus_the_mean() -> None:
    network = SqueezeNetFeatures(taps=("conv1",))
    with torch.no_grad():
        network.conv1.weight.zero_()
        network.conv1.bias.zero_()
        network.conv1.weight[0, 0] = network.conv1.weight[1, 2] = 1 / 49
        red = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 32, 32)  # r, g, b
        response = network(red)[0][0, :, 0, 0]
    assert response[0].item() == pytest.approx(1.5 * 127.5 - 104, abs=1e-3)
    assert response[1].item() == pytest.approx(255 - 123, abs=1e-3)


def test_features_rank_distortions(weight_files: dict[str, Path]) -> None:
    distance = FeatureDistance(SqueezeNetFeatures.from_file(weight_files["squeezenet"]))
    _, target = images(96)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    near, far = (distance(target + strength * noise, target) for strength in (0.02, 0.2))
    assert 0 < near < far < 2


def test_by_image_is_the_loss_of_each_alone() -> None:
    torch.manual_seed(0)
    prediction, target = torch.rand(3, 3, 64, 48) * 2 - 1, torch.rand(3, 3, 64, 48) * 2 - 1
    prediction[1] = target[1]
    loss = ImageLoss({"l1": 1.0, "mse": 2.0, "ms_ssim": 3.0, "edges_l1": 0.5})
    total, terms = loss.by_image(prediction, target)
    for number in range(3):
        alone, _ = loss(prediction[number : number + 1], target[number : number + 1])
        torch.testing.assert_close(total[number], alone)
    assert total[1].abs() < 1e-5 < total[0]
    for name, value in loss(prediction, target)[1].items():
        torch.testing.assert_close(terms[name], value)
