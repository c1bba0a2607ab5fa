"""FID and KID: against independent computations on random features, and Inception features against pyiqa's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.metrics.distribution import frechet_distance, kernel_distance
from oscar.metrics.image import MetricSet

scipy_linalg = pytest.importorskip("scipy.linalg")
fid_arch = pytest.importorskip("pyiqa.archs.fid_arch")
inception_arch = pytest.importorskip("pyiqa.archs.inception")


def features(count: int, size: int, seed: int) -> np.ndarray:
    """Correlated features with a mean that depends on the seed, as float32."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, size)) @ random.normal(size=(size, size)) / 4 + seed / 3).astype(np.float32)


@pytest.mark.parametrize(("count_a", "count_b"), [(200, 150), (12, 9)])  # more and fewer than features
def test_fid_equals_the_root_of_the_matrix(count_a, count_b):
    a, b = features(count_a, 24, 1), features(count_b, 24, 2)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    root = scipy_linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.square(a.mean(0, dtype=float) - b.mean(0, dtype=float)).sum()
    expected += np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_of_a_shift_and_a_scale():
    a = features(500, 8, 0)
    assert frechet_distance(a, a + 3) == pytest.approx(8 * 9, rel=1e-4)
    centred = a - a.mean(0)
    variance = np.trace(np.cov(centred, rowvar=False))
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * variance, rel=1e-4)


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate by its definition."""

    def kernel(p, q):
        return (float(np.dot(p, q)) / len(p) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(p, q) for p in x for q in y) / (n * m)


def test_kid_equals_its_definition_and_leaves_the_random_state():
    a, b = features(20, 6, 1).astype(np.float64), features(20, 6, 2).astype(np.float64)
    np.random.seed(5)
    expected_draw = np.random.rand()
    np.random.seed(5)
    assert kernel_distance(a, b) == pytest.approx(polynomial_mmd(a, b), rel=1e-9)
    assert np.random.rand() == expected_draw


def test_kid_of_large_sets_is_a_mean_over_the_same_subsets(monkeypatch):
    monkeypatch.setattr("oscar.metrics.distribution.KID_SUBSET_SIZE", 30)
    a, b = features(60, 6, 1), features(60, 6, 2)
    value = kernel_distance(a, b)
    np.random.seed(7)
    assert value == kernel_distance(a, b)
    assert value == pytest.approx(polynomial_mmd(a, b), rel=0.2)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the layout of pt_inception-2015-12-05-6726825d.pth."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_arch, "load_pretrained_network", lambda *_: None)
        state = inception_arch.fid_inception_v3().state_dict()
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    return path


def test_inception_features_and_set_metrics(inception_file, make_image, tmp_path):
    metrics = MetricSet(["fid", "kid", "fid_p256", "psnr"], files={"inception": str(inception_file)})
    assert metrics.has_set_metrics and not metrics.unavailable
    sizes = [(300, 256), (400, 384)]
    originals = [metrics.features(make_image(*size, seed)) for seed, size in enumerate(sizes)]
    decoded = [{key: values + 0.01 for key, values in x.items()} for x in originals]
    assert [x["inception_p256"].shape for x in originals] == [(1, 2048), (2, 2048)]
    assert set(originals[0]) == {"inception", "inception_p256"} and originals[0]["inception"].shape == (1, 2048)

    for seed, size in enumerate(sizes):
        make_image(*size, seed).save(tmp_path / f"{seed}.png")
    with pytest.MonkeyPatch.context() as patch:
        state = torch.load(inception_file)
        patch.setattr(inception_arch, "load_pretrained_network", lambda net, _: net.load_state_dict(state))
        network = inception_arch.InceptionV3().eval()
    expected = fid_arch.get_folder_features(str(tmp_path), network, num_workers=0, device="cpu", verbose=False)
    np.testing.assert_allclose(np.concatenate([x["inception"] for x in originals]), expected, rtol=1e-4, atol=1e-5)
    patch_of_two = metrics.features(make_image(400, 384, 1).crop((128, 128, 384, 384)))["inception"]
    np.testing.assert_allclose(originals[1]["inception_p256"][1:], patch_of_two, rtol=1e-4, atol=1e-5)

    scores = metrics.set_scores(originals, decoded)
    sets = [np.concatenate([x["inception_p256"] for x in group]) for group in (originals, decoded)]
    assert list(scores) == ["fid", "kid", "fid_p256"]
    assert scores["fid_p256"] == frechet_distance(*sets) == pytest.approx(2048 * 0.01**2, rel=1e-3)
    assert scores["fid"] == pytest.approx(2048 * 0.01**2, rel=1e-3)
    assert metrics.set_scores(originals, originals)["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics.set_scores(originals[:1], decoded[:1]) == {"fid": None, "kid": None, "fid_p256": None}


def test_images_without_patches_have_no_features(inception_file, make_image):
    features = MetricSet(["kid_p256"], files={"inception": str(inception_file)}).features(make_image(300, 255))
    assert {key: values.shape for key, values in features.items()} == {"inception_p256": (0, 2048)}


def test_other_weights_are_unavailable(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    reason = MetricSet(["fid"], files={"inception": str(tmp_path / "other.pth")}).unavailable["fid"]
    assert reason.startswith("inception weights do not fit: Missing key(s)") and len(reason.splitlines()) == 1


def test_resize_keeps_more_than_eight_bits():
    from oscar.metrics.distribution import resize

    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    resized = resize(ramp)
    assert resized.shape == (3, 299, 299) and resized.dtype == np.float32
    assert not np.array_equal(resized, resized.round())
    assert Image.fromarray(resized[0]).mode == "F"
