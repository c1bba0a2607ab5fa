"""The page in headless Chromium, and what its server gives out. Screenshots go to test-artefacts/."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra `app`")

from oscar.app import server  # noqa: E402  after the check of what it needs
from oscar.app.page import _take  # noqa: E402
from oscar.app.uploads import MAX_BYTES  # noqa: E402
from oscar.inference.load import load  # noqa: E402

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "test-artefacts"
HOSTILE = "<img src=x onerror=alert(1)>${x}{{y}}.png"


@pytest.fixture(scope="module")
def page() -> Iterator[SimpleNamespace]:
    """A server of the page: `url`, `sessions`, `folder` of uploads, and `codec`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codecs = {name: load(name) for name in ("nano-vq", "nano")}
    here = SimpleNamespace(codec=codecs["nano-vq"])
    up, stop, build = threading.Event(), threading.Event(), server.build

    def remember(models, uploads):
        blocks, here.sessions = build(models, uploads)
        here.folder = uploads
        return blocks, here.sessions

    def started(url: str) -> None:
        here.url = url
        up.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "build", remember)
        serving = threading.Thread(target=server.serve, args=(codecs, "127.0.0.1", port, started, stop))
        serving.start()
        assert up.wait(60)
        yield here
        stop.set()
        serving.join(30)
    assert not here.folder.exists()


@pytest.fixture
def visit(browser, page) -> Iterator:
    """Opens the page for a new visitor; at the end of the test nothing may have been asked for elsewhere."""
    contexts, problems = [], []

    def open_(width: int = 1280, height: int = 800, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        tab.on("request", lambda request: request.url.startswith((page.url, "data:")) or problems.append(request.url))
        tab.goto(page.url)
        tab.wait_for_selector("#empty")
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def drop(tab, data: bytes | Path, name: str = "") -> None:
    file = data if isinstance(data, Path) else {"name": name, "mimeType": "image/png", "buffer": data}
    tab.set_input_files("#drop input[type=file]", file)


def wait_for_rows(tab, count: int = 4, line: str = "") -> None:
    """Until as many codecs are shown, and the line no longer says that there is more to come."""
    tab.wait_for_function(
        "([count, line]) => document.querySelectorAll('#facts tbody tr:not(.old)').length === count"
        " && document.querySelector('#line').textContent.startsWith(line)"
        " && !document.querySelector('#line').textContent.endsWith('…')",
        arg=[count, line],
    )


def size_of_ours(tab) -> int:
    return int(tab.locator("#facts tbody tr").first.locator("td").first.inner_text().replace(",", ""))


def download(tab, link: str, folder: Path) -> Path:
    with tab.expect_download() as caught:
        tab.click(link)
    caught.value.save_as(folder / caught.value.suggested_filename)
    return folder / caught.value.suggested_filename


@pytest.fixture(scope="module")
def photo(photographs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "cat.png"
    photographs["chelsea"].crop((60, 0, 380, 240)).save(path)
    return path


@pytest.mark.slow
def test_there_and_back(visit, page, photo, tmp_path):
    """Upload, move the sliders, download, and decode what was downloaded."""
    tab = visit()
    drop(tab, photo)
    wait_for_rows(tab, line="cat.png, 320 × 240 pixels")
    assert tab.evaluate("[...document.querySelectorAll('#stage img')].every(i => i.complete && i.naturalWidth === 320)")
    ARTEFACTS.mkdir(exist_ok=True)
    tab.screenshot(path=ARTEFACTS / "app-1280-light.png", full_page=True)
    handle, stage = tab.locator("#handle"), tab.locator("#stage").bounding_box()
    tab.mouse.move(stage["x"] + stage["width"] / 2, stage["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(stage["x"] + stage["width"] / 4, stage["y"] + 20)
    tab.mouse.up()
    assert handle.get_attribute("aria-valuenow") == "25"
    first = size_of_ours(tab)
    tab.locator("#amount input[type=range]").focus()
    tab.keyboard.press("Home")  # the smallest file
    tab.wait_for_function(f"parseInt(document.querySelector('#facts tbody td').textContent) < {first} / 4")
    wait_for_rows(tab)
    assert size_of_ours(tab) <= int(tab.locator("#amount input[type=number]").input_value())
    tab.locator("#amount input[type=number]").fill(str(first))
    tab.keyboard.press("Enter")
    tab.wait_for_function(f"document.querySelector('#facts tbody td').textContent === '{first}'")
    wait_for_rows(tab)
    packed, image = download(tab, "#packed", tmp_path), download(tab, "#image", tmp_path)
    assert (packed.name, image.name) == ("cat.oscar", "cat-nano-vq.png") and packed.stat().st_size == first
    assert np.array_equal(Image.open(image), page.codec.decompress(packed.read_bytes()))
    tab.locator("#share input[type=range]").focus()
    for _ in range(12):
        tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector("#facts tbody small:has-text('first 40% of the file')")
    tab.select_option("#right-codec", "AVIF")
    for _ in range(5):
        tab.click("#zoom-in")
    assert "pixels" in tab.locator("#stage").get_attribute("class")
    tab.screenshot(path=ARTEFACTS / "app-pixels.png", full_page=True)
    drop(tab, packed)
    wait_for_rows(tab, 1, "cat.oscar")
    assert np.array_equal(Image.open(download(tab, "#image", tmp_path)), page.codec.decompress(packed.read_bytes()))
    tab.screenshot(path=ARTEFACTS / "app-decoded.png", full_page=True)
    assert [path for path in page.folder.rglob("*")] == []  # uploads went when they were read


def test_bad_uploads_are_a_line_and_change_nothing(visit, page, photo, tmp_path):
    tab = visit()
    drop(tab, b"nonsense", HOSTILE)
    tab.wait_for_selector("#line.wrong")
    assert tab.locator("#line").inner_text() == f"{HOSTILE}: not an image of a known format"
    damaged = bytearray(page.codec.compress(Image.open(photo)))
    damaged[-3] ^= 1
    drop(tab, bytes(damaged), "cat.oscar")
    tab.wait_for_selector("#line:has-text('cat.oscar: checksum does not match: the file is damaged or cut short')")
    tab.screenshot(path=ARTEFACTS / "app-damaged.png", full_page=True)
    assert tab.locator("#empty").is_visible() and not tab.locator("#viewer").is_visible()
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(MAX_BYTES + 1)
    drop(tab, tmp_path / "huge.png")
    tab.get_by_text("exceed the maximum allowed size").wait_for()
    assert [path for path in page.folder.rglob("*")] == []


@pytest.mark.slow
def test_visitors_do_not_meet_and_leave_nothing(visit, page, photo, tmp_path):
    first, second = visit(), visit(390, 844, "dark")
    before = len(page.sessions)
    drop(first, photo)
    wait_for_rows(first)
    assert second.locator("#empty").is_visible() and not second.locator("#line").inner_text()
    other = tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    drop(second, other)
    wait_for_rows(second, line="other.png")
    assert first.locator("#packed").inner_text() == "Download cat.oscar"
    assert second.locator("#packed").inner_text() == "Download other.oscar"
    assert second.evaluate("document.documentElement.scrollWidth <= innerWidth")
    second.screenshot(path=ARTEFACTS / "app-390-dark.png", full_page=True)
    assert len(page.sessions) == before + 2
    for tab in (first, second):
        tab.context.close()
    for _ in range(100):
        if len(page.sessions) == before:
            break
        threading.Event().wait(0.1)
    assert len(page.sessions) == before


# What the server gives out


def ask(url: str, **options) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_no_file_of_the_disk_is_served(page):
    for path in ("/etc/passwd", ROOT / "README.md", ROOT / "oscar/cli/main.py", page.folder / "../x"):
        assert ask(f"{page.url}gradio_api/file={path}")[0] in (403, 404)


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_no_path_but_an_upload_is_read(page, meta):
    """As a visitor would ask who writes requests by hand."""
    config = json.loads(ask(f"{page.url}config")[1])
    assert config["analytics_enabled"] is False
    upload = next(each for each in config["dependencies"] if any(event == "upload" for _, event in each["targets"]))
    file = {"path": str(ROOT / "README.md"), "orig_name": "a.png", **meta}
    body = {"data": [file, "nano-vq", "Size"], "fn_index": upload["id"], "session_hash": "by-hand"}
    headers = {"Content-Type": "application/json"}
    assert ask(f"{page.url}gradio_api/queue/join", data=json.dumps(body).encode(), headers=headers)[0] == 200
    answers = ask(f"{page.url}gradio_api/queue/data?session_hash=by-hand")[1].decode()
    assert '"success":false' in answers and "OSCAR" not in answers and (ROOT / "README.md").exists()
    with pytest.raises(ValueError, match="^README.md: is no upload$"):  # nor by ourselves
        _take(ROOT / "README.md", page.folder)
    page.sessions.end("by-hand")


def test_large_uploads_are_cut_off(page):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = form + bytes(MAX_BYTES + 1) + b"\r\n--x--\r\n"
    status, _ = ask(
        f"{page.url}gradio_api/upload", data=body, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert status == 413 and list(page.folder.rglob("*")) == []
