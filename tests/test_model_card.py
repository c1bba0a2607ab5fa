"""The cards of shipped models: figures that a command fills in, and what becomes of a card when a model is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from oscar import OscarCodec
from oscar.cli.main import main
from oscar.config import AblateDenoiserConfig, MetricsConfig, PackagedImagesConfig
from oscar.evaluation.denoiser import ablate_denoiser_config
from oscar.utils.provenance import SHIPPED

ROOT = Path(__file__).parents[1]
CARDS = sorted(SHIPPED.glob("*/README.md"))


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a card."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "README.md").write_text("# tiny\n\n<!-- figures -->\nold\n<!-- end of figures -->\n\nIts end.\n")
    return folder


def test_figures_are_those_of_the_results(model: Path, photos: Path, tmp_path: Path, load_script, capsys) -> None:
    script = load_script("model_card")
    results = tmp_path / "results"
    images = PackagedImagesConfig(images=str(photos), limit=1)
    ablate_denoiser_config(
        AblateDenoiserConfig(str(results), str(model), [0.125], None, images, MetricsConfig(["psnr"]))
    )
    assert script.main([str(model), "--results", str(results)]) == 0
    card = (model / "README.md").read_text()
    assert card.startswith("# tiny\n") and card.endswith("<!-- end of figures -->\n\nIts end.\n") and "old" not in card
    rows = re.findall(r"^\| 0.1250 \|.*", card, re.M)
    assert (
        f"By `python scripts/ablate_denoiser.py model={model} data.images={photos} data.limit=1 points=[0.125]`" in card
    )
    assert len(rows) == 2 and "means over 1 images, protocol bitstream" in card
    assert script.main([str(model), "--results", str(results)]) == 0
    assert (model / "README.md").read_text() == card, "again is the same"
    (model / "README.md").write_text("# tiny\n")
    capsys.readouterr()
    assert script.main([str(model), "--results", str(results)]) == 2
    assert "has no place for figures; allowed: between the lines" in capsys.readouterr().err
    (model / "README.md").unlink()
    assert script.main([str(model), "--results", str(results)]) == 2
    assert "has no README.md; allowed: one with a card" in capsys.readouterr().err


def test_a_card_outlives_new_weights_and_goes_to_the_hub(model: Path, tmp_path: Path, capsys) -> None:
    before = (model / "README.md").read_text()
    codec = OscarCodec.from_pretrained(model)
    codec.save_pretrained(model)
    codec.save_pretrained(tmp_path / "other")
    assert (model / "README.md").read_text() == before and not (tmp_path / "other/README.md").exists()
    assert OscarCodec.from_pretrained(model).fingerprint == codec.fingerprint
    assert main(["push", str(model), "me/tiny", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert "\n---\n\n# tiny\n" in card and "Its end.\n\n    oscar compress" not in card
    assert card.count("\n# ") == 1 and "None was given." not in card and "## Training\n" in card


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_cards_of_shipped_models(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((card.parent / link).exists() for link in links)
    figures = text.partition("<!-- figures -->")[2].partition("<!-- end of figures -->")[0]
    assert figures.count("\n| --:") >= 2 or figures.count("| --: |") >= 2
    sheet = card.parent / next(link for link in links if link.endswith(".webp"))
    assert sheet.stat().st_size <= 400_000 and sheet.resolve().parent == ROOT / "docs"
