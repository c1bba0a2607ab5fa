"""MkDocs hook: what the page `try.html` needs beside its own modules goes into the site.

The models and the viewer are the package's own files. ONNX Runtime for browsers comes from the npm registry, in the
versions of package-lock.json; where npm is missing or fails, the page says so, and the rest of the site is as ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache/try"
MODELS = {name: ROOT / "oscar/assets" / name for name in ("nano", "nano-vq")}
MODEL_FILES = ("oscar.json", "runtime.json", "*.onnx", "graphs.data", "**/*.safetensors")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
VIEWER = ROOT / "oscar/benchmark/report"
log = logging.getLogger("mkdocs.plugins.try")


class Missing(Exception):
    """Something that the page needs is not there; says what."""


def install() -> Path:
    """The folder of onnxruntime-web's modules, installed where it was not."""
    lock = (HERE / "package-lock.json").read_bytes()
    folder = CACHE / hashlib.sha256(lock).hexdigest()[:16]
    done = folder / "node_modules/onnxruntime-web/dist"
    if all((done / name).exists() for name in RUNTIME):
        return done
    if (npm := shutil.which("npm")) is None:
        raise Missing("npm is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(HERE / name, folder / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if found.returncode:
        raise Missing(f"npm ci failed: {' '.join(found.stderr.split())[:200]}")
    return done


def contents() -> Iterator[tuple[str, Path]]:
    """Paths in the site, below try/, and the files that go there."""
    for name, folder in MODELS.items():
        if not (folder / "runtime.json").exists():
            raise Missing(f"model {name} has no graphs")
        for pattern in MODEL_FILES:
            for path in sorted(folder.glob(pattern)):
                yield f"models/{name}/{path.relative_to(folder).as_posix()}", path
    modules = install()
    for name in RUNTIME:  # some servers do not know that .mjs are scripts, and browsers then refuse them
        yield f"ort/{name.replace('.mjs', '.js')}", modules / name


def manifest(paths: list[tuple[str, Path]]) -> dict:
    """Bytes of the files, of onnxruntime-web by name and of each model by path; ids of the rates that models have."""
    sizes = {place: path.stat().st_size for place, path in paths}

    def of(prefix: str) -> dict[str, int]:
        return {place.removeprefix(prefix): size for place, size in sizes.items() if place.startswith(prefix)}

    configs = {name: json.loads((folder / "oscar.json").read_text())["bottleneck"] for name, folder in MODELS.items()}
    return {
        "ort": of("ort/"),
        "models": {name: of(f"models/{name}/") for name in MODELS},
        "rates": {name: config["rates"] for name, config in configs.items() if "rates" in config},
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to the files of the site."""
    found = [(name, VIEWER / name) for name in ("stage.css", "stage.js")]
    try:
        needed = list(contents())
        found += needed
        facts = manifest(needed)
    except Missing as missing:
        log.info(f"try.html will not code: {missing}")
        facts = {"missing": str(missing)}
    for place, path in found:
        files.append(File.generated(config, f"try/{place}", abs_src_path=str(path)))
    files.append(File.generated(config, "try/manifest.json", content=json.dumps(facts)))
    return files
