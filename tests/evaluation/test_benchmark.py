"""A benchmark with the tiny model: what it writes, that it resumes, and that mistakes cost only themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from oscar.baselines.pillow import JPEG, WebP
from oscar.baselines.registry import make_baseline
from oscar.benchmark import runs as module
from oscar.benchmark.matched import match_bytes
from oscar.benchmark.runs import run_benchmark
from oscar.config import BenchmarkConfig, BenchmarkImagesConfig, ConfigError, MetricsConfig, TimingConfig
from oscar.evaluation.results import EvaluationError, load_results
from oscar.metrics.image import MetricSet, psnr
from oscar.utils.tables import Table

MISSING = {"name": "bpg", "encoder": "/nowhere/bpgenc", "decoder": "/nowhere/bpgdec"}


@pytest.fixture
def config(tiny_folder, photos, tmp_path) -> BenchmarkConfig:
    """Two images, two rates, two baselines and one that is not installed; no timing."""
    config = BenchmarkConfig(
        output=str(tmp_path / "out"),
        parts=["quality", "matched", "report"],
        models={"tiny": str(tiny_folder)},
        rates=[0.0313, 0.125],
        baselines={
            "jpeg": {"name": "jpeg", "points": [5, 50]},
            "webp-x4": {"name": "webp", "downscale": 4, "points": [5, 80]},
            "bpg": MISSING,
        },
        data=BenchmarkImagesConfig(images=str(photos), limit=2),
        metrics=MetricsConfig(names=["psnr"]),
    )
    config.check()
    return config


@pytest.fixture
def no_plots(monkeypatch):
    """Plots have their own tests, and take longer than all else here."""
    monkeypatch.setattr(module, "plot_rates", lambda *args: [])


@pytest.fixture
def larger_photos(make_image, tmp_path) -> Path:
    """Two of 300x260 pixels, and one that protocol paper refuses and that has no MS-SSIM."""
    folder = tmp_path / "larger"
    folder.mkdir()
    for name, size in (("a", (300, 260)), ("b", (260, 300)), ("small", (127, 140))):
        make_image(*size, ord(name[0])).save(folder / f"{name}.png")
    return folder


quick = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def encodes(monkeypatch) -> list[tuple[str, float]]:
    """Every call of a Pillow baseline's encoder, as name and point."""
    calls = []
    for codec in (JPEG, WebP):

        def encode(self, image, point, original=codec.encode):
            calls.append((self.name, point))
            return original(self, image, point)

        monkeypatch.setattr(codec, "encode", encode)
    return calls


def test_everything_is_written_and_agrees(config, photos, capsys, all_formats):
    run_benchmark(config)
    out = Path(config.output)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"report page: {out / 'report.html'}"
    assert printed.err.count("bpg is unavailable: ") == 1
    tables = {path.stem for path in (out / "tables").glob("*.md")}
    assert tables == {"means", "bd_rate", "matched", "matched_psnr"}
    assert {path.suffix for path in (out / "plots").iterdir()} == {".pdf", ".svg", ".png"}
    assert "unavailable: bpg" in (out / "tables/means.md").read_text()
    assert "<title>OSCAR benchmark: " in (out / "report.html").read_text()

    record = json.loads((out / "benchmark.json").read_text())
    assert set(record["codecs"]) == {"oscar-tiny", "jpeg", "webp-x4"}
    assert set(record["unavailable"]) == {"bpg"} and record["failed"] == {}
    assert record["config"]["rates"] == [0.0313, 0.125]

    rows = pd.read_csv(out / "tables/rows.csv")
    assert len(rows) == 2 * 3 * 2 and rows["psnr"].notna().all()
    means = pd.read_csv(out / "tables/means.csv")
    expected = rows.groupby(["codec", "point"])["psnr"].mean()
    for row in means[means["codec"] != "bpg"].to_dict("records"):
        assert row["psnr"] == pytest.approx(expected[row["codec"], row["point"]])


@quick
def test_baselines_are_matched_to_every_file_of_ours(config):
    bench = run_benchmark(config)
    ours = bench.rows[bench.rows["codec"] == "oscar-tiny"].set_index(["image", "point"])["file_bytes"]
    for codec in ("jpeg", "webp-x4"):
        matched = bench.matched[bench.matched["codec"] == codec].set_index(["image", "target_point"])
        assert sorted(matched.index) == sorted(ours.index)
        assert (matched["target_bytes"] == ours.reindex(matched.index)).all()
    assert not bench.matched["fits"].any()  # the tiny model's files are smaller than any header
    assert (bench.matched["file_bytes"] > bench.matched["target_bytes"]).all()


def test_matched_files_are_the_largest_that_fit(photos, tmp_path):
    path = sorted(photos.iterdir())[0]
    targets = pd.DataFrame(
        [
            {"image": path.name, "codec": "ours", "point": point, "file_bytes": size}
            for point, size in ((0.1, 40), (0.2, 100), (0.3, 250), (0.4, None))
        ]
    )
    codec = make_baseline("webp", downscale=8)
    image = Image.open(path)
    sizes = {point: len(codec.encode(image, point).data) for point in codec.grid}
    metrics = MetricSet(["psnr", "ms_ssim"])
    frame, _ = match_bytes(codec, targets, {path.name: path}, metrics, tmp_path, progress=False)
    assert list(frame["target_bytes"]) == [40, 100, 250]  # a protocol without files has nothing to match
    assert list(frame["fits"]) == [False, True, True]
    assert list(frame["file_bytes"]) == [
        min(sizes.values()),
        max(s for s in sizes.values() if s <= 100),
        max(s for s in sizes.values() if s <= 250),
    ]
    for row in frame.to_dict("records"):
        assert sizes[row["point"]] == row["file_bytes"]
        assert row["actual_bpp"] == 8 * row["file_bytes"] / (96 * 80)
        assert row["psnr"] == psnr(image, codec.decode(codec.encode(image, row["point"]).data))
    assert frame["ms_ssim"].isna().all() and frame["ms_ssim"].dtype == float  # the image is too small for it


@pytest.mark.parametrize("part", ["training", "inference"])
def test_parts_that_measure_speed_need_neither_codecs_nor_images(config, monkeypatch, capsys, part):
    config.parts, config.models, config.baselines, config.device = [part], {"none": "nowhere"}, {}, "cpu"
    config.data.images = "nowhere"
    asked = []

    def measure(*arguments) -> list[Table]:
        asked.append(arguments)
        return [Table(f"{part}_speed", "Seconds.", pd.DataFrame({"way": ["ours"]}), {"way": "way"})]

    monkeypatch.setattr(f"oscar.benchmark.speed.{part}.run_{part}_speed", measure)
    assert run_benchmark(config) is None
    out = Path(config.output)
    assert asked == [(getattr(config, part), out, "cpu")]
    files = {f"{part}_speed{suffix}" for suffix in (".csv", ".md", ".tex")}
    assert {path.name for path in (out / "tables").iterdir()} == files
    assert capsys.readouterr().out == f"{part}: {out / 'tables' / part}_speed.md\n"


@quick
def test_a_finished_benchmark_is_not_run_again(config, encodes):
    run_benchmark(config)
    first = {path.name: path.read_text() for path in Path(config.output, "tables").iterdir()}
    assert encodes
    encodes.clear()
    run_benchmark(config)
    assert not encodes
    assert {path.name: path.read_text() for path in Path(config.output, "tables").iterdir()} == first


@quick
def test_an_interrupted_benchmark_goes_on_and_ends_alike(config, tmp_path, monkeypatch, encodes):
    whole = run_benchmark(config).matched
    config.output = str(tmp_path / "other")
    match, count = module.match_bytes.__globals__["_match"], 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return match(*args)

    monkeypatch.setitem(module.match_bytes.__globals__, "_match", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(config)
    assert count == 4
    resumed = run_benchmark(config).matched
    assert count == 4 + 8 - 3  # three of eight were done
    pd.testing.assert_frame_equal(resumed, whole)


def test_rows_of_other_settings_are_not_taken_for_done(photos, tmp_path):
    image = sorted(photos.iterdir())[0]
    target = {"image": image.name, "codec": "ours", "point": 0.1, "file_bytes": 2000}
    metrics = MetricSet(["psnr"])

    def run(bytes_: int, **options) -> dict:
        targets = pd.DataFrame([{**target, "file_bytes": bytes_}])
        frame, failed = match_bytes(
            make_baseline("jpeg", **options), targets, {image.name: image}, metrics, tmp_path, progress=False
        )
        assert not failed
        return frame.iloc[0].to_dict()

    first = run(2000)
    assert run(2000) == first
    assert run(1500)["file_bytes"] <= 1500 < first["file_bytes"]
    assert run(2000, subsampling="4:4:4")["file_bytes"] != first["file_bytes"]


@quick
def test_a_baseline_that_fails_at_an_image_costs_that_image(config, monkeypatch, capsys):
    monkeypatch.setattr(JPEG, "decode", lambda self, data: (_ for _ in ()).throw(RuntimeError("broken\ndecoder")))
    bench = run_benchmark(config)
    assert "jpeg" in bench.unavailable  # nothing of it could be scored
    assert set(bench.rows["codec"]) == {"oscar-tiny", "webp-x4"}
    assert set(bench.matched["codec"]) == {"webp-x4"}
    assert bench.failed["jpeg at matched bytes: 0.png"] == "broken"
    assert "JPEG is left out: none of the 2 images could be scored: broken" in capsys.readouterr().err


@quick
def test_unknown_names_cost_a_line_and_the_rest_is_kept(config, capsys):
    config.parts = ["quality"]
    config.metrics.names = ["psnr", "sharpness"]
    config.baselines = {
        "jpeg": {"name": "jpeg", "points": [50]},
        "jpg": {"name": "jpg"},
        "webp": {"name": "webp", "points": [101]},
    }
    bench = run_benchmark(config)
    error = capsys.readouterr().err
    assert re.search(r"^sharpness is unavailable: .*allowed: psnr, ms_ssim", error, re.M)
    assert re.search(r"^jpg is unavailable: codec 'jpg' does not exist; allowed: .*jpeg", error, re.M)
    assert re.search(r"^webp is unavailable: .*quality 101.*allowed: 0 to 100", error, re.M)
    assert set(bench.rows["codec"]) == {"oscar-tiny", "jpeg"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": {"tiny": "nowhere/model"}}, "nowhere/model"),
        ({"rates": [0.5]}, "0.5"),
        ({"metrics": MetricsConfig(names=["sharpness"])}, "none of the metrics sharpness exists"),
        ({"timing": TimingConfig(points={"jpg": [50]})}, "timing.points.jpg: no such codec"),
        ({"timing": TimingConfig(points={"jpeg": [500]})}, "quality 500"),
        ({"models": {}, "baselines": {"bpg": MISSING}}, "no codec is left: bpg"),
        ({"baselines": {"a": {"name": "jpeg"}, "b": {"name": "jpeg"}}}, "2 codecs are called jpeg"),
        ({"data": BenchmarkImagesConfig(images="nowhere")}, "nowhere: no such folder"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(config, change, message):
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        run_benchmark(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": ["tables"]}, "parts is 'tables'"),
        ({"protocols": ["original"]}, "protocols is 'original'"),
        ({"models": {}, "baselines": {}}, "models and baselines are empty"),
        ({"models": {"a/b": "nano"}}, "models.a/b is no name"),
        ({"baselines": {"jpeg": 50}}, "baselines.jpeg is 50"),
        ({"rates": []}, "rates is empty"),
        ({"bd_method": "spline"}, "bd_method is 'spline'"),
        ({"report_images": -1}, "report_images is -1"),
        ({"timing": TimingConfig(repeats=0)}, "timing.repeats is 0"),
        ({"data": BenchmarkImagesConfig(dataset="tecnick")}, "data.dataset is 'tecnick'"),
    ],
)
def test_contradictions_name_field_value_and_what_is_allowed(config, change, message):
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=re.escape(message) + ".*allowed"):
        config.check()


@quick
def test_parts_that_are_left_out_stand_as_they_were(config):
    run_benchmark(config)
    config.parts = ["report"]
    bench = run_benchmark(config)
    assert len(bench.rows) and len(bench.matched) and bench.timing is None
    config.output += "-empty"
    config.parts = ["quality"]
    assert not Path(run_benchmark(config).output, "report.html").exists()


@quick
def test_parts_of_another_model_are_left_out(config, make_codec, tmp_path, capsys):
    """One that was trained anew under the same path: its name stands for other weights."""
    make_codec().save_pretrained(tmp_path / "model")
    config.models = {"tiny": str(tmp_path / "model")}
    assert len(run_benchmark(config).matched)
    make_codec(seed=1).save_pretrained(tmp_path / "model")
    config.parts = ["report"]
    bench = run_benchmark(config)
    assert "oscar-tiny" not in set(bench.rows["codec"]) and "jpeg" in set(bench.rows["codec"])
    assert not len(bench.matched)
    assert "its results are of other codec (fingerprint, sha256)" in bench.unavailable["oscar-tiny"]
    assert "OSCAR tiny is left out: " in capsys.readouterr().err


@quick
def test_protocol_paper_stands_beside_and_is_not_matched(config, larger_photos):
    config.protocols = ["bitstream", "paper"]
    config.data.images = str(larger_photos)
    config.data.limit = None
    config.metrics.names = ["psnr", "ms_ssim"]
    bench = run_benchmark(config)
    assert set(bench.rows["codec"]) == {"oscar-tiny", "oscar-tiny-paper", "jpeg", "webp-x4"}
    assert set(bench.matched["target"]) == {"oscar-tiny"}
    paper = bench.means[bench.means["codec"] == "oscar-tiny-paper"]
    assert paper["actual_bpp"].isna().all() and list(paper["nominal_bpp"]) == [0.0313, 0.125]
    assert set(paper["protocol"]) == {"paper"}
    assert paper["ms_ssim"].isna().all() and paper["ms_ssim_y"].notna().all()
    files = bench.means[bench.means["protocol"] == "bitstream"]
    assert files["ms_ssim"].notna().all() and files["ms_ssim_y"].isna().all()
    assert set(bench.bd["protocol"]) == {"bitstream"} and not bench.bd["anchor"].str.contains("paper").any()
    assert bench.failed["oscar-tiny-paper: small.png"].endswith("allowed: from 128 a side")

    folder = bench.output / "tables"
    plain, papers = ((folder / f"{name}.md").read_text() for name in ("means", "means_paper"))
    assert "OSCAR tiny |" in plain and "paper" not in plain and "(luma)" not in plain
    assert "JPEG, MS-SSIM: 1 of 3 images have no value and are left out of its means (needed: 161 pixels a si" in plain
    assert "OSCAR tiny (paper protocol)" in papers and "JPEG" not in papers and "MS-SSIM (luma)" in papers
    for name, codecs in (("rows", {"oscar-tiny", "jpeg", "webp-x4"}), ("rows_paper", {"oscar-tiny-paper"})):
        assert set(pd.read_csv(folder / f"{name}.csv")["codec"]) == codecs
    assert "paper" not in (folder / "bd_rate.md").read_text()
    page = (bench.output / "report.html").read_text()
    assert "Means over the images, protocol paper" in page and '"psnr@paper"' in page and '"ms_ssim_y@paper"' in page


@quick
def test_other_results_in_the_folder_are_not_mixed(config):
    run_benchmark(config)
    config.data.limit = 3
    with pytest.raises(EvaluationError, match="results are of other images"):
        run_benchmark(config)
    frame, _ = load_results(Path(config.output) / "codecs/jpeg")
    assert frame["image"].nunique() == 2


@pytest.mark.slow
def test_timing_is_kept_until_something_changes(config, monkeypatch):
    from oscar.benchmark.speed import timing

    config.parts = ["timing"]
    config.timing = TimingConfig(points={"jpeg": [50]}, repeats=1, warmup=0, batch_sizes=[1], memory=False)
    calls, original = [], timing.run_timing
    monkeypatch.setattr(timing, "run_timing", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    first = run_benchmark(config).timing.latency
    assert dict(zip(first["codec"], first["point"], strict=True)) == {"oscar-tiny": 0.125, "jpeg": 50, "webp-x4": 80}
    assert len(calls) == 1
    pd.testing.assert_frame_equal(run_benchmark(config).timing.latency, first, check_dtype=False)
    assert len(calls) == 1
    config.timing.repeats = 2
    run_benchmark(config)
    assert len(calls) == 2
    text = Path(config.output, "tables/timing.md").read_text()
    assert "unet_step" in text and "percentiles of 2 measurements" in text
    assert (Path(config.output) / "tables/parameters.csv").exists()
