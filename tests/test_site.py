"""The documentation site: it builds without a warning, with its notebooks run, and every page is reached."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_and_its_notebooks_run(tmp_path):
    pytest.importorskip("mkdocs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path / "site").as_posix() for page in (tmp_path / "site").rglob("*.html")}
    sources = {
        page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for kind in ("*.md", "notebooks/*.ipynb")
        for page in (ROOT / "docs").glob(kind)
    }
    assert sources <= pages
    manifest = json.loads((tmp_path / "site/try/manifest.json").read_text())
    assert {"ort", "models", "rates"} == set(manifest) or set(manifest) == {"missing"}  # see tests/web/test_page.py
    assert {"page.js", "worker.js", "stage.js"} <= {path.name for path in (tmp_path / "site/try").iterdir()}
    assert not list((tmp_path / "site").rglob("package*.json")) and not list((tmp_path / "site/try").rglob("*.py"))
    for notebook, shown in (("compress", "bits per pixel"), ("timesteps", "residual_variance")):
        assert shown in (tmp_path / "site" / "notebooks" / f"{notebook}.html").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    targets = [target for target in re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)\"", text)]
    local = [first or second for first, second in targets if not (first or second).startswith("http")]
    assert len(local) > 10
    for target in local:
        assert (ROOT / target).exists(), target
