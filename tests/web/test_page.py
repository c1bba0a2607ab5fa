"""The page that codes in the browser, in headless Chromium from a local server. Screenshots go to test-artefacts/."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oscar.bitstream import Container
from oscar.inference.load import load

pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "test-artefacts"
GOLDEN = ROOT / "tests/golden"
PLACE = "some/where/"  # the site is not at the root of its server


@pytest.fixture(scope="module")
def site(load_script, tmp_path_factory) -> Iterator[str]:
    """The address of a server of the site, of which only this page is built."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(load_script("browser_speed").serve(tmp_path_factory.mktemp("site"), PLACE))
        except ValueError as missing:
            pytest.skip(str(missing))
        yield url


@pytest.fixture(scope="module")
def page(browser, site):
    """The page, open; at the end nothing may have been asked for elsewhere, or sent."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, problems = context.new_page(), []
    tab.set_default_timeout(120_000)
    tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
    own = (site, "data:", f"blob:{site.split('/some')[0]}")
    context.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
    context.on("request", lambda request: request.method == "GET" or problems.append(request.method))
    tab.goto(f"{site}try.html")
    tab.wait_for_selector("#file:enabled", state="attached")
    yield tab
    context.close()
    assert problems == []


@pytest.fixture(scope="module")
def codecs() -> Callable:
    return functools.cache(lambda name: load(name, dtype=torch.float32))


@pytest.fixture(scope="module")
def photo(photographs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "cat.png"
    photographs["chelsea"].crop((60, 0, 261, 150)).save(path)
    return path


def give(tab, data: Path | bytes, name: str = "") -> None:
    file = data if isinstance(data, Path) else {"name": name, "mimeType": "", "buffer": data}
    tab.set_input_files("#file", file)


def wait_for(tab, line: str) -> None:
    """Until the line begins so, and nothing is under way."""
    tab.wait_for_function(
        "(text) => document.querySelector('#line').textContent.startsWith(text)"
        " && document.querySelector('#bar').hidden && !document.querySelector('#line.wrong')",
        arg=line,
    )


def work(tab, action: Callable[[], object]) -> None:
    """Do something that has the page code, and wait until it has."""
    tab.evaluate("document.querySelector('#right-image').alt = ''")
    action()
    tab.wait_for_function(
        "document.querySelector('#line.wrong') || document.querySelector('#bar').hidden"
        " && document.querySelector('#right-image').alt"
    )
    assert tab.locator("#line.wrong").count() == 0, tab.inner_text("#line")


def download(tab, link: str) -> bytes:
    with tab.expect_download() as caught:
        tab.click(link)
    return Path(caught.value.path()).read_bytes()


def levels(first: bytes, second: Image.Image) -> int:
    """The largest difference of two images."""
    pair = [np.asarray(image, dtype=int) for image in (Image.open(io.BytesIO(first)).convert("RGB"), second)]
    assert pair[0].shape == pair[1].shape
    return int(np.abs(pair[0] - pair[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-vq"])
def test_there_and_back(page, codecs, photo, name):
    """What the page writes Python reads, and both make the same image of it; at a point and in so many bytes."""
    page.check(f"input[value={name}]")
    work(page, lambda: give(page, photo))
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"try-{name}.png", full_page=True)
    data = download(page, "#packed")
    assert levels(download(page, "#image"), codecs(name).decompress(data)) <= 1
    assert data == codecs(name).compress(Image.open(photo))  # at the default point, which is the page's too
    limit = len(data) * 2 // 3
    page.fill("#size", str(limit))
    work(page, lambda: page.press("#size", "Enter"))
    smaller = download(page, "#packed")
    assert limit * (0.6 if name == "nano-vq" else 0.95) < len(smaller) <= limit
    assert levels(download(page, "#image"), codecs(name).decompress(smaller)) <= 1
    page.focus("#quality")
    work(page, lambda: [page.keyboard.press(key) for key in ("Home", "End", "Home", "End")])  # the last one counts
    largest = download(page, "#packed")
    assert Container.unpack(largest).point_code == codecs(name).bottleneck.all_points[-1].code
    assert page.input_value("#size") == "" and len(largest) > len(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    ["nano-vq/0.0937_131x67", "nano-vq/0.1250_131x67", "nano-vq/0.0019_131x67", "nano-vq/0.1250_1x1",
     "nano/0.7000_131x67", "nano/0.5000_1x1"],
)  # fmt: skip
def test_files_of_python(page, codecs, path):
    """The page opens what Python wrote, by the model that wrote it, and shows what a part of it says."""
    name, stem = path.split("/")
    data = (GOLDEN / "shipped" / f"{path}.oscar").read_bytes()
    work(page, lambda: give(page, data, f"{stem}.oscar"))
    assert page.is_checked(f"input[value={name}]") and not page.is_visible("#amount")
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / "try-file.png", full_page=True)
    assert levels(download(page, "#image"), codecs(name).decompress(data)) <= 1
    if page.is_visible("#preview"):
        page.focus("#share")
        work(page, lambda: [page.keyboard.press("PageDown") for _ in range(2)])
        share = int(page.input_value("#share")) / 100
        payload = Container.unpack(data).payload
        head = data[: len(data) - len(payload) + round(share * len(payload))]
        assert share < 1
        assert levels(download(page, "#image"), codecs(name).decompress_prefix(head).image) <= 1


def test_bad_files_are_a_line_and_change_nothing(page):
    good = (GOLDEN / "shipped/nano-vq/0.0430_131x67.oscar").read_bytes()
    damaged = bytearray(good)
    damaged[-1] ^= 1
    huge = io.BytesIO()
    Image.new("L", (5000, 3000)).save(huge, "PNG")
    wide = bytes.fromhex("05c1 3000 0000 ffff03 ffff03 000000".replace(" ", ""))
    cases = {
        "a.oscar": (bytes(damaged), "checksum does not match: the file is damaged or cut short"),
        "b.oscar": ((GOLDEN / "ours/files/vq/0.0430_131x67.oscar").read_bytes(), "the file was written with model "),
        "rate.oscar": ((GOLDEN / "ours/files/vq/0.0625_131x67.oscar").read_bytes(), "the file has rate 0.0625, which"),
        "c.oscar": (b"", "file is empty"),
        "d.oscar": (wide, "checksum does not match"),
        "e.png": (b"nonsense", "not an image that this browser can read, nor an .oscar file"),
        "f.png": (huge.getvalue(), "5,000 × 3,000 = 15,000,000 pixels are too many for this page; allowed: 4,194,304"),
        "<img src=x onerror=alert(1)>.png": (b"", "not an image that this browser can read"),
    }
    before = page.inner_html("#viewer")
    for name, (data, expected) in cases.items():
        give(page, data, name)
        page.wait_for_function("([name, text]) => document.querySelector('#line.wrong')?.textContent"
                               ".startsWith(`${name}: ${text}`)", arg=[name, expected])  # fmt: skip
    assert page.inner_html("#viewer") == before
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / "try-wrong.png", full_page=True)
