"""Fill in the figures of a shipped model's card, oscar/assets/MODEL/README.md, from results of its ablation.

python scripts/ablate_denoiser.py model=nano data.images=kodak 'points=[0,0.25,0.5,0.75,1]'
python scripts/model_card.py nano --results runs/ablate_denoiser/nano

What stands between the lines `<!-- figures -->` and `<!-- end of figures -->` is made anew. Results of other
weights are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oscar import checkpoint
from oscar.evaluation.denoiser import CODEC
from oscar.evaluation.evaluate import load_results
from oscar.evaluation.publish import evaluation_table
from oscar.utils.errors import exit_code
from oscar.utils.files import atomic_write

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def fill(card: str, figures: str) -> str:
    """The card with these figures.

    Raises:
        ValueError: if it has no place for them.
    """
    before, begin, rest = card.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{checkpoint.CARD} has no place for figures; allowed: between the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{figures.strip()}\n\n{end}{after}"


def make_figures(folder: Path, results: Path) -> str:
    """Tables of the model in `folder`: its operating points, and what its denoiser does.

    Args:
        folder: of the checkpoint.
        results: output of scripts/ablate_denoiser.py.

    Raises:
        EvaluationError: if there are none, or they are of other weights.
    """
    _, description = checkpoint.read_description(folder)
    config = load_results(results / CODEC)[1]["config"]
    images, points = config["data"], config["points"]
    words = [f"model={config['model']}", f"data.images={images['images']}"]
    words += [f"data.limit={images['limit']}"] * (images["limit"] is not None)
    words += [] if points is None else [f"points=[{','.join(f'{point:g}' for point in points)}]"]
    command = f"By `python scripts/ablate_denoiser.py {' '.join(words)}`.\n"
    tables = sorted((results / "tables").glob("denoiser_*.md"), reverse=True)  # PSNR first, as everywhere
    texts = [table.read_text(encoding="utf-8") for table in tables]
    return "\n".join([command, evaluation_table(results / CODEC, description, with_commit=False).to_markdown(), *texts])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name of a shipped model, or a model folder with a card")
    parser.add_argument("--results", type=Path, required=True, help="output of scripts/ablate_denoiser.py")
    options = parser.parse_args(arguments)

    def write() -> None:
        folder, _ = checkpoint.read_description(options.model)
        path = folder / checkpoint.CARD
        if not path.is_file():
            raise ValueError(f"model {options.model!r} has no {path.name}; allowed: one with a card")
        card = fill(path.read_text(encoding="utf-8"), make_figures(folder, options.results))
        atomic_write(path, card.encode())
        print(f"figures of {options.results} are in {path}")

    return exit_code("model_card", write)


if __name__ == "__main__":
    sys.exit(main())
