"""The page's bitstream modules, in Node: the golden files, damaged ones, and the tables against ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from oscar.bitstream import context, norms
from oscar.rates import RATES

ROOT = Path(__file__).parents[2]
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def run_node(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([NODE, *arguments], cwd=ROOT, input=text, capture_output=True, text=True, timeout=300)


def test_golden_and_damaged_files():
    done = run_node("--test", "--test-reporter=tap", "tests/web/bitstream.test.mjs", "tests/web/codec.test.mjs")
    assert done.returncode == 0, "\n".join(done.stdout.split("\nnot ok ")[1:])
    assert "\n# fail 0\n" in done.stdout and "\n# pass 0\n" not in done.stdout


def test_tables_are_ours():
    """They are computed in floating point there; no entry may depend on the last bits of an engine's functions."""
    done = run_node(
        "--input-type=module",
        text="""
        import { DECISIONS } from "./docs/try/bitstream/context.js";
        import { RMS } from "./docs/try/bitstream/norms.js";
        import { RATES } from "./docs/try/bitstream/rates.js";
        console.log(JSON.stringify({ decisions: DECISIONS, rms: [...RMS], rates: RATES }));
        """,
    )
    found = json.loads(done.stdout)
    assert found["decisions"] == context._ENCODER_CDFS
    assert found["rms"] == norms._TABLE.tolist()
    rates = [{"id": r.id, "bpp": r.bpp, "downsample": r.downsample, "codebookSize": r.codebook_size} for r in RATES]
    assert found["rates"] == rates
    shares = (2**16 - 1) / (1 + np.exp(np.delete(np.arange(-80, 81), 80) / 8))  # exp(0) is 1 in every engine
    assert np.abs(shares % 1 - 0.5).min() > 1e-6
    exact = 2.0 ** (-4 + 6 * np.arange(255) / 254)
    below = exact.astype(np.float32)
    middles = [(below.astype(float) + np.nextafter(below, np.float32(end)).astype(float)) / 2 for end in (0, 9)]
    assert (np.abs(exact - middles) / exact).min() > 1e-12
