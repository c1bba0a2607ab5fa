"""Seconds that the page docs/try.md takes in Chromium, beside `oscar.runtime` on one thread, in turns in one run.

    python scripts/browser_speed.py photo.png
    python scripts/browser_speed.py photo.png --model nano --repeats 9

Needs Chromium, playwright, and what `make docs` needs. The first turn of each is not counted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import logging
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from oscar.utils.errors import exit_code

ROOT = Path(__file__).parents[1]
# Starts the page's worker, and does a job in it: [name, options] -> the result.
START = "worker = new Worker('try/worker.js', { type: 'module' }); jobs = 0;"
ASK = """([job, options]) => new Promise((resolve, reject) => {
  const id = ++jobs;
  if (options.rgba) {
    const { width, height, rgba } = options;
    const data = Uint8ClampedArray.from(atob(rgba), (letter) => letter.charCodeAt(0));
    options = { pixels: { width, height, data } };
  }
  worker.onmessage = ({ data }) => {
    if (data.error) reject(new Error(data.error));
    if ("result" in data) resolve({ encode: data.result?.encodeSeconds, decode: data.result?.decodeSeconds });
  };
  worker.postMessage({ id, job, ...options });
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, place: str = "") -> Iterator[str]:
    """The address of a local server of the site, of which only this page is built, at `place` below its root.

    Raises:
        ValueError: if the page lacks something, saying what.
    """
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    options = {"plugins": [], "nav": [{"Try it here": "try.md"}], "strict": False}
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder / place), **options))
    if missing := json.loads((folder / place / "try/manifest.json").read_text()).get("missing"):
        raise ValueError(missing)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{place}"
        server.shutdown()


def measure(options: argparse.Namespace, folder: Path) -> str:
    """A table of medians."""
    from playwright.sync_api import sync_playwright

    from oscar.data.images import read_image
    from oscar.runtime import Codec

    image = read_image(options.image)
    codec = Codec(options.model, threads=1)
    point = codec.bottleneck.default_point
    rgba = base64.b64encode(image.convert("RGBA").tobytes()).decode()
    seconds: dict[str, list[tuple[float, float]]] = {"page": [], "runtime": []}
    with serve(folder) as url, sync_playwright() as playwright:
        executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{url}try.html")
        page.evaluate(START)
        page.evaluate(ASK, ["image", {"width": image.width, "height": image.height, "rgba": rgba}])
        for _ in range(options.repeats + 1):
            page.evaluate(ASK, ["image", {"width": image.width, "height": image.height, "rgba": rgba}])
            found = page.evaluate(ASK, ["encode", {"model": options.model, "point": point.code}])
            seconds["page"].append((found["encode"], found["decode"]))
            start = time.perf_counter()
            data = codec.compress(image)
            between = time.perf_counter()
            codec.decompress(data)
            seconds["runtime"].append((between - start, time.perf_counter() - between))
        browser.close()
    medians = {
        name: [statistics.median(part) for part in zip(*turns[1:], strict=True)] for name, turns in seconds.items()
    }
    rows = [f"{name:10} {encode:9.2f} {decode:11.2f}" for name, (encode, decode) in medians.items()]
    ratios = [page / runtime for page, runtime in zip(*medians.values(), strict=True)]
    head = f"{options.model}, {image.width}x{image.height}, medians of {options.repeats}, seconds"
    return "\n".join(
        [head, f"{'':10} {'compress':>9} {'decompress':>11}", *rows, "{:10} {:9.1f} {:11.1f}".format("ratio", *ratios)]
    )


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", choices=("nano", "nano-vq"), default="nano")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        return exit_code("browser_speed", lambda: print(measure(options, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
