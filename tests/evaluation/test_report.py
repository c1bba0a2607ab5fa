"""The report page: what is written, and what it does in headless Chromium. Screenshots go to test-artefacts/."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

pd = pytest.importorskip("pandas", reason="the report needs the extra `eval`")

# After the check of what they need.
from oscar.benchmark.report.data import MetricInfo, ReportData, ReportEntry, ReportImage  # noqa: E402
from oscar.benchmark.report.page import write_report  # noqa: E402

ARTEFACTS = Path(__file__).parents[2] / "test-artefacts"
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--images-->${x} $data"
CODECS = {"oscar-test": ("OSCAR test", "WEBP"), "jpeg": ("JPEG", "JPEG"), "webp": ("WebP", "WEBP")}
POINTS = {"oscar-test": (0.02, 0.05, 0.1), "jpeg": (5, 30, 80), "webp": (5, 50, 90)}
MISSING = float("nan")


def photograph(seed: int, width: int = 240, height: int = 160) -> Image.Image:
    """Hills under a sky, with grain: something that codecs treat as they treat photographs."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ridge = height * (0.5 + 0.2 * np.sin(x / (25 + 10 * seed)) + 0.05 * np.sin(x / 7))
    sky = np.stack([120 + y * 0.5, 160 + y * 0.3, 220 - y * 0.2], axis=-1)
    ground = np.stack([60 + 40 * np.sin(x / 9 + y / 5), 110 + 30 * np.sin(y / 4), 50 + 0 * x], axis=-1)
    pixels = np.where((y > ridge)[..., None], ground, sky) + random.normal(0, 6, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, codec: str, point: float) -> bytes:
    quality = round(600 * point) if codec == "oscar-test" else round(point)
    source = image.filter(ImageFilter.GaussianBlur(1)) if codec == "oscar-test" else image
    buffer = io.BytesIO()
    source.save(buffer, CODECS[codec][1], quality=quality)
    return buffer.getvalue()


def scores(image: Image.Image, decoded: Image.Image) -> dict[str, float]:
    error = np.abs(np.asarray(image, float) - np.asarray(decoded, float))
    return {"psnr": 10 * math.log10(255**2 / (error**2).mean()), "mae": error.mean(), "niqe": MISSING}


def make_data(folder: Path) -> ReportData:
    """A small benchmark of real files; the second image's name, title and reasons are hostile."""
    rows, images = [], []
    for seed, name in enumerate(["hills", HOSTILE]):
        image = photograph(seed)
        image.save(folder / f"{seed}.png")
        results = {}
        for codec, (label, _) in CODECS.items():
            for point in POINTS[codec]:
                data = encode(image, codec, point)
                decoded = Image.open(io.BytesIO(data)).convert("RGB")
                path = folder / f"{seed}_{codec}_{point:g}.png"
                decoded.save(path)
                bpp = 8 * len(data) / (image.width * image.height)
                values = scores(image, decoded)
                results[codec, point] = (len(data), bpp, values, path)
                rows.append(
                    {
                        "image": name,
                        "label": label,
                        "codec": codec,
                        "point": float(point),
                        "width": image.width,
                        "height": image.height,
                        "file_bytes": len(data),
                        "nominal_bpp": None,
                        "actual_bpp": bpp,
                        **values,
                        "encode_seconds": 0.01,
                        "decode_seconds": 0.02,
                    }
                )
        entries = []
        for rank, rate in enumerate(POINTS["oscar-test"]):
            for codec, (label, _) in CODECS.items():
                size, bpp, values, path = results[codec, POINTS[codec][rank]]
                ours = codec == "oscar-test"
                point, matched = float(POINTS[codec][rank]), None if ours else rate
                values = values | {"psnr": math.inf} if rank == 2 else values
                entries.append(ReportEntry(codec, label, point, ours, matched, np.int64(size), bpp, values, path))
        images.append(ReportImage(name, image.width, image.height, folder / f"{seed}.png", entries))
    frame = pd.DataFrame(rows)
    columns = ["nominal_bpp", "actual_bpp", "psnr", "mae", "niqe", "encode_seconds", "decode_seconds"]
    means = frame.groupby(["codec", "label", "point"], sort=False)[columns].agg("mean").reset_index()
    means.loc[1, "mae"] = MISSING
    means.loc[8, "psnr"] = math.inf
    bd = {"codec": "oscar-test", "label": "OSCAR test", "anchor": "jpeg", "metric": "psnr", "overlap_low": 20.0}
    bd = [bd | {"bd_rate_percent": -12.34, "note": ""}, bd | {"bd_rate_percent": None, "note": f"no overlap {HOSTILE}"}]
    reference = [("kodak", codec, "psnr", x, 20 + 40 * x) for codec in ("oscar", "perco") for x in (0.1, 0.5)]
    return ReportData(
        title=f"Benchmark {HOSTILE}",
        summary=["Two images.", HOSTILE],
        environment={"commit": "0123abc", HOSTILE: HOSTILE},
        metrics=[
            MetricInfo("psnr", "PSNR", "dB", True),
            MetricInfo("mae", "Mean error", "", False),
            MetricInfo("niqe", "NIQE", "", False),
        ],
        unavailable={"NIQE": "no weights", "vtm": HOSTILE},
        means=means,
        rows=frame,
        bd=pd.DataFrame(bd),
        reference_curves=pd.DataFrame(reference, columns=["dataset", "codec", "metric", "bpp", "value"]),
        images=images,
        timing=pd.DataFrame({"codec": ["jpeg"], "stage": ["all"], "seconds": [0.0123]}),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ReportData:
    return make_data(tmp_path_factory.mktemp("report-images"))


@pytest.fixture(scope="module")
def report(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, data)
    return path


class Page(HTMLParser):
    """Texts of script elements by id, all tags, and the text of everything else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self._script: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = [dict(attrs).get("id")]

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = []

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script[0]] = self.scripts.get(self._script[0], "") + data
        else:
            self.text += data


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# What is written


def test_page_holds_everything_and_links_to_nothing(report, data):
    page = Page(report.read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "base") and not (tag == "script" and "src" in attributes)
        for name in ("src", "href"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), (tag, attributes)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "http" not in policy and "script-src 'sha256-" in policy
    assert "lossless WebP" in page.text and "read off its figures" in page.text
    assert "12.34" not in page.text and "−12.3" in page.text and "no overlap" in page.text
    assert "NIQE" in page.text and "no weights" in page.text
    assert "$" not in page.text.replace(HOSTILE, "")


def test_hostile_names_stay_text(report):
    page = Page(report.read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) >= 7  # title twice, summary, environment twice, reason, note, rows
    assert not any(tag == "img" and attributes.get("src") == "x" for tag, attributes in page.tags)
    assert json.loads(page.scripts["data"])["images"][1]["name"] == HOSTILE


def test_values_that_json_lacks(report):
    page = Page(report.read_text(encoding="utf-8"))
    payload = json.loads(page.scripts["data"], parse_constant=refuse)
    assert [metric["name"] for metric in payload["metrics"]] == ["psnr", "mae"]  # niqe has no value
    ours, _, webp = payload["series"][:3]
    assert ours["points"][1]["values"]["mae"] == [None, "–"]
    assert webp["points"][2]["values"]["psnr"] == ["Infinity", "∞"]
    assert payload["images"][0]["entries"][-1]["values"]["psnr"] == ["Infinity", "∞"]


def test_images_are_embedded_once_and_exactly(report, data):
    page = Page(report.read_text(encoding="utf-8"))
    payload = json.loads(page.scripts["data"])
    assert len([name for name in page.scripts if name and name.startswith("image-")]) == 2 * (1 + 9)
    for shown, image in zip(payload["images"], data.images, strict=True):
        pairs = [(shown["original"], image.original)]
        pairs += [(a["image"], b.image) for a, b in zip(shown["entries"], image.entries, strict=True)]
        for name, path in pairs:
            kind, code = page.scripts[name].split(",")
            assert kind == "data:image/webp;base64"
            embedded = Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")
            assert np.array_equal(embedded, Image.open(path))


def test_one_colour_per_codec(report):
    payload = json.loads(Page(report.read_text(encoding="utf-8")).scripts["data"])
    classes = {series["label"]: series["classes"].split() for series in payload["series"]}
    assert classes["OSCAR test"] == ["c0", "ours"] and classes["oscar, kodak"] == ["c0", "ours", "reference"]
    assert len({classes[label][0] for label in ("OSCAR test", "JPEG", "WebP", "perco, kodak")}) == 4
    for image in payload["images"]:
        assert all(entry["classes"].split() == classes[entry["label"]] for entry in image["entries"])


def test_parts_that_were_not_run_are_left_out(data, tmp_path):
    empty = pd.DataFrame()
    write_report(tmp_path / "r.html", ReportData("Nothing", [], {}, [], {}, empty, empty, empty, empty))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    hidden = [attributes["id"] for tag, attributes in page.tags if tag == "section" and "hidden" in attributes]
    assert hidden == ["curves", "images"] and not any(tag == "table" and "class" in a for tag, a in page.tags)


def test_without_files_the_rate_is_called_nominal(data, tmp_path):
    means = data.means[data.means["codec"] == "oscar-test"].assign(actual_bpp=None, nominal_bpp=[0.02, 0.05, 0.1])
    frame = pd.DataFrame()
    write_report(tmp_path / "r.html", ReportData("Paper", [], {}, data.metrics, {}, means, frame, frame, frame))
    (series,) = json.loads(Page((tmp_path / "r.html").read_text(encoding="utf-8")).scripts["data"])["series"]
    assert series["label"] == "OSCAR test (nominal bpp)" and series["points"][0]["bpp"] == [0.02, "0.0200"]


def test_nothing_is_written_if_an_image_is_missing(data, tmp_path):
    lost = ReportImage("lost", 8, 8, tmp_path / "lost.png", [])
    frame = pd.DataFrame()
    with pytest.raises(ValueError, match="lost.png: no such file"):
        write_report(tmp_path / "r.html", ReportData("Lost", [], {}, [], {}, frame, frame, frame, frame, [lost]))
    assert list(tmp_path.iterdir()) == []


# What it does in a browser


@pytest.fixture
def open_page(browser, report) -> Iterator:
    """Opens the report; at the end of the test nothing may have failed and nothing may have been asked for."""
    problems, contexts = [], []

    def open_(width: int = 1280, scheme: str = "light", file: Path = report, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: requests.append(request.url))
        requests: list[str] = []
        page.goto(file.as_uri())
        # Not wait_for_function: that polls by eval, which the page forbids.
        page.wait_for_selector("#plot .dot", state="attached")
        problems.extend(url for url in requests if not url.startswith(("data:", file.as_uri())))
        page.on("request", lambda request: request.url.startswith("data:") or problems.append(request.url))
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (420, "light"), (420, "dark")])
def test_it_loads_and_fits(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
    assert page.evaluate(
        "[...document.querySelectorAll('button, select, input')].every("
        "e => e.textContent.trim() || e.ariaLabel || e.labels?.length)"
    )
    ARTEFACTS.mkdir(exist_ok=True)
    image = page.screenshot(path=ARTEFACTS / f"report-{width}-{scheme}.png", full_page=True)
    ground = np.asarray(Image.open(io.BytesIO(image)).convert("L"))[0, 0]
    assert (ground < 64) == (scheme == "dark")


def test_plot_follows_its_controls(open_page):
    page = open_page()
    curves = "[...document.querySelectorAll('#plot .curve')].map(c => c.getAttribute('points'))"
    psnr = page.evaluate(curves)
    assert len(psnr) == 4  # three measured and the paper's oscar; its perco only when asked for
    assert page.locator("#plot .reference .curve").count() == 1
    assert page.locator("#plot .dot").count() == 3 + 3 + 2 + 2  # without WebP's infinite PSNR
    assert page.locator("#plot .ours:not(.reference) .curve").evaluate("c => getComputedStyle(c).strokeWidth") == "3px"
    assert page.locator("#plot .reference .curve").evaluate("c => getComputedStyle(c).strokeDasharray") != "none"

    page.locator(
        "#scale label", has_text="log" if page.locator("#scale input:checked").input_value() == "linear" else "linear"
    ).click()
    other = page.evaluate(curves)
    assert len(other) == 4 and other != psnr

    page.locator("#metric label", has_text="Mean error").click()
    assert "Mean error" in page.locator("#plot .title").text_content()
    assert "lower" in page.locator("#plot .title").text_content()
    assert page.locator("#plot .dot").count() == 2 + 3 + 3 and page.locator("#plot .reference").count() == 0

    jpeg = page.locator("#legend button", has_text="JPEG")
    jpeg.click()
    assert jpeg.get_attribute("aria-pressed") == "false" and page.locator("#plot .curve").count() == 2


def test_plot_tells_its_values(open_page, data):
    page = open_page()
    box = page.locator("#plot .c0:not(.reference) .dot").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    first = data.means.iloc[0]
    tip = page.locator("#tip").inner_text()
    assert "OSCAR test" in tip and f"{first['psnr']:.2f} dB" in tip and f"{first['actual_bpp']:.4f} bpp" in tip
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    page.locator("#plot").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()


def hidden_parts(page) -> tuple[float, float]:
    """Percent of the stage that are cut off the left image, at its right, and off the right one, at its left."""
    left, right = (page.locator(f"#{side}-layer").evaluate("e => e.style.clipPath") for side in ("left", "right"))
    assert left.startswith("inset(0px ") and right.startswith("inset(0px ")
    return float(left.split()[1].rstrip("%")), float(right.split()[3].rstrip("%)"))


def test_slider(open_page):
    page = open_page()
    page.locator("#stage").scroll_into_view_if_needed()
    assert hidden_parts(page) == (50, 50)
    stage, handle = page.locator("#stage").bounding_box(), page.locator("#handle").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] / 4, stage["y"] + 20, steps=3)
    page.mouse.up()
    assert page.locator("#handle").get_attribute("aria-valuenow") == "25"
    assert hidden_parts(page) == (75, 25)

    page.locator("#handle").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("PageUp")
    assert page.locator("#handle").get_attribute("aria-valuenow") == "37"
    page.keyboard.press("End")
    assert hidden_parts(page) == (0, 100)


def test_slider_under_a_finger(open_page):
    page = open_page(420, has_touch=True)
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#handle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)
    for kind, points in [("Start", [(x, y)]), ("Move", [(x + 60, y)]), ("End", [])]:
        points = [{"x": x, "y": y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    width = page.locator("#stage").bounding_box()["width"]
    assert float(page.locator("#handle").get_attribute("aria-valuenow")) == pytest.approx(50 + 6000 / width, abs=1)


def test_zoom_and_pan_keep_both_sides_in_step(open_page):
    page = open_page()
    page.locator("#stage").scroll_into_view_if_needed()

    def places() -> list[list[float]]:
        return [
            page.locator(f"#{side}-image").evaluate("e => [e.style.left, e.style.top, e.style.width].map(parseFloat)")
            for side in ("left", "right")
        ]

    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    (fit, same) = places()
    assert fit == same == [0, 0, pytest.approx(box["width"], abs=0.1)]

    page.mouse.move(x, y)
    page.mouse.wheel(0, -600)
    page.wait_for_selector("#stage.zoomed")
    (left, top, width), other = places()
    assert other == [left, top, width] and width > 2 * fit[2]
    pixel = box["width"] / 4 / fit[2]  # the image's point under the pointer stays there
    assert left + pixel * width == pytest.approx(box["width"] / 4, abs=0.5)
    assert page.locator("#left-image").evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"

    page.mouse.down()
    page.mouse.move(x + 30, y + 10, steps=2)
    page.mouse.up()
    assert places() == [[pytest.approx(left + 30), pytest.approx(top + 10), pytest.approx(width)]] * 2
    assert page.locator("#handle").get_attribute("aria-valuenow") == "50"  # dragging panned instead

    page.mouse.dblclick(x, y)
    assert places() == [fit, fit]
    page.mouse.dblclick(x, y)
    assert places()[0][2] == pytest.approx(4 * fit[2]) and places()[0] == places()[1]
    page.locator("#stage").focus()
    page.keyboard.press("0")
    assert places() == [fit, fit]
    page.locator("#zoom-in").click()
    assert places()[0][2] == pytest.approx(1.5 * fit[2])


def test_browser_shows_what_is_chosen(open_page, data):
    page = open_page()
    codecs = {side: page.locator(f"#{side}-codec") for side in ("left", "right")}
    assert (codecs["left"].input_value(), codecs["right"].input_value()) == ("jpeg", "oscar-test")

    def check(image: ReportImage, rate: float) -> None:
        facts = page.locator("#facts").inner_text()
        for side, codec in codecs.items():
            name = codec.input_value()
            entry = next((e for e in image.entries if e.codec == name and rate in (e.matched_to, e.point)), None)
            path = entry.image if entry else image.original
            code = page.locator(f"#{side}-image").get_attribute("src").split(",")[1]
            assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"), Image.open(path))
            if entry:
                assert f"{entry.file_bytes:,}" in facts and f"{entry.actual_bpp:.4f}" in facts
                assert ("∞" if math.isinf(entry.metrics["psnr"]) else f"{entry.metrics['psnr']:.2f}") in facts

    check(data.images[0], 0.05)
    page.locator("#rate label", has_text="0.02").click()
    check(data.images[0], 0.02)
    page.locator("#rate label", has_text="0.1").click()
    codecs["right"].select_option("")
    check(data.images[0], 0.1)
    assert page.locator("#right-image").get_attribute("alt") == "hills, original"
    page.locator("#strip label").nth(1).click()
    codecs["left"].select_option("oscar-test")
    check(data.images[1], 0.1)


def test_baseline_larger_than_ours_is_said(open_page, data):
    page = open_page()
    entries = {e.codec: e for e in data.images[0].entries if 0.02 in (e.point, e.matched_to)}
    assert entries["jpeg"].file_bytes > entries["oscar-test"].file_bytes  # else the test shows nothing
    page.locator("#rate label", has_text="0.02").click()
    times = entries["jpeg"].file_bytes / entries["oscar-test"].file_bytes
    assert f"its smallest file is {times:.1f} times ours" in page.locator("#facts-note").inner_text()


def test_sorting(open_page, data):
    page = open_page()
    table = page.locator("#means table")
    titles = table.locator("thead th").all_inner_texts()

    def column(name: str) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({titles.index(name) + 1})").all_inner_texts()

    def values(name: str) -> list[float]:
        return [math.inf if text == "∞" else float(text) for text in column(name) if text != "–"]

    head = table.locator("thead button", has_text="PSNR")
    head.click()
    assert values("PSNR dB") == sorted(values("PSNR dB")) and column("PSNR dB")[-1] == "∞"
    assert table.locator("th[aria-sort=ascending]").inner_text() == "PSNR dB"
    head.press("Enter")
    assert values("PSNR dB") == sorted(values("PSNR dB"), reverse=True)
    assert table.locator("th[aria-sort=descending]").count() == 1

    for order in (False, True):
        table.locator("thead button", has_text="Mean error").press("Space")
        assert column("Mean error")[-1] == "–"  # whichever the direction
        assert values("Mean error") == sorted(values("Mean error"), reverse=order)
    table.locator("thead button", has_text="setting").click()  # as numbers: 5 before 30, 0.02 before 5
    assert values("setting") == sorted(data.means["point"])
    table.locator("thead button", has_text="codec").click()
    assert column("codec") == sorted(column("codec"), key=str.lower)


def test_rows_can_be_searched(open_page):
    page = open_page()
    page.locator("#rows summary").click()
    page.locator("#rows input").fill("hills")
    assert page.locator("#rows tbody tr:visible").count() == 9


def test_printing_drops_controls_and_scrolling(open_page):
    page = open_page(scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#scale").is_hidden() and page.locator("#strip").is_hidden()
    assert page.locator("#plot").is_visible() and page.locator("#stage").is_visible()
    assert page.locator("#means .scroll").evaluate("e => getComputedStyle(e).overflow") == "visible"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 27, 26)"  # dark ink on white paper
