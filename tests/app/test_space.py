"""The folder that becomes a Space."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces"


def test_it_asks_for_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (SPACE / "requirements.txt").read_text().splitlines() == [
        *project["dependencies"],
        *project["optional-dependencies"]["torch"],
    ]
    card = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert f"gradio=={card['sdk_version']}" in (ROOT / "constraints/3.12.txt").read_text().splitlines()
    needed, _ = project["optional-dependencies"]["app"]
    assert card["sdk"] == needed.partition(">=")[0] and card["sdk_version"].startswith(needed.partition(">=")[2])
    assert card["license"] == project["license"].lower() and (SPACE / card["app_file"]).is_file()


def test_its_file_serves_the_models_of_the_package(monkeypatch):
    pytest.importorskip("gradio", reason="the page needs the extra `app`")
    served = {}
    monkeypatch.setattr("oscar.app.server.serve", lambda codecs, **options: served.update(codecs=codecs, **options))
    monkeypatch.setattr("oscar.inference.load.load", lambda name: f"codec {name}")
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert served == {
        "codecs": {"nano-vq": "codec nano-vq", "nano": "codec nano"},
        "host": "0.0.0.0",
        "port": 7860,
    }
