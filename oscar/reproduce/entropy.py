"""What coding does to files: indices at fixed length, by frequency tables, by context models."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from oscar import checkpoint
from oscar.bitstream.coding import INDEX_CODINGS
from oscar.evaluation.codings import codings_table
from oscar.reproduce.jobs import Job
from oscar.reproduce.statistics import LEVEL, bootstrap_mean
from oscar.reproduce.study import Study, Summary
from oscar.utils.tables import Table

CONTEXT = "context"


class Entropy(Study):
    """Lengths of files by coding; context models are trained if the model has none."""

    title = "Entropy coding"

    def check(self) -> None:
        super().check()
        self.rates_of(self.config.model)

    def jobs(self) -> list[Job]:
        config, jobs, model, needs = self.config, [], self.config.model, ()
        if not has_contexts(model):
            arguments = self.train_arguments("context", (f"init_from={model}",), config.train)
            jobs.append(Job(CONTEXT, "train", arguments, (), (model,), ("context", 0)))
            model, needs = self.result_of(CONTEXT), (CONTEXT,)
        rates = ["--rates", *map(str, config.rates)] if config.rates else []
        limit = [] if config.data.limit is None else ["--limit", str(config.data.limit)]
        points = len(config.rates or self.rates_of(config.model))
        for dataset in config.data.datasets:
            arguments = (str(self.images_of(dataset)), "--model", model, *rates, *limit)
            work = ("evaluate", points * self.count_images(dataset))
            jobs.append(Job(f"codings-on-{dataset}", "compare_codings", arguments, needs, (model,), work))
        return jobs

    def summarise(self, done: Sequence[str]) -> Summary:
        from oscar.reproduce.figures import plot_codings

        summary = Summary()
        for dataset in self.config.data.datasets:
            if f"codings-on-{dataset}" in done:
                rows = pd.read_csv(self.output / "runs" / f"codings-on-{dataset}" / "rows.csv")
                table = codings_table(rows)
                summary.tables += [
                    Table(
                        f"{table.name}_{dataset}", table.caption, table.frame, table.shown, table.formats, table.notes
                    ),
                    files_table(rows, dataset),
                ]
                plot_codings(self.plots / f"codings_{dataset}", rows)
                summary.figures[f"Bits per pixel of files on {dataset}, by coding"] = f"codings_{dataset}"
        return summary


def has_contexts(model: str) -> bool:
    """Whether a checkpoint has context models."""
    from safetensors import safe_open

    folder, _ = checkpoint.read_description(model)
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        return any(name.startswith("context.") for name in file.keys())  # noqa: SIM118 (it is no dict)


def files_table(rows: pd.DataFrame, dataset: str) -> Table:
    """Whole files: bits per pixel by rate and coding, and what they are beside the nominal rate, with intervals."""
    rows = rows[rows["effort"] == 0]
    pixels = rows["width"] * rows["height"]
    entries = []
    for rate, group in rows.groupby("rate"):
        entry = {"rate": f"{rate:.4f}", "nominal_bpp": (8 * group["nominal_bytes"] / pixels[group.index]).mean()}
        for coding in INDEX_CODINGS:
            name = coding.name.lower()
            entry[f"{name}_bpp"] = (8 * group[f"{name}_bytes"] / pixels[group.index]).mean()
            change = bootstrap_mean(100 * (group[f"{name}_bytes"] / group["nominal_bytes"] - 1))
            entry |= {f"{name}_change": change.mean, f"{name}_low": change.low, f"{name}_high": change.high}
        entries.append(entry)
    frame = pd.DataFrame(entries)
    titles, formats = {"rate": "rate", "nominal_bpp": "nominal bpp"}, {"nominal_bpp": "{:.4f}".format}
    for coding in INDEX_CODINGS:
        name = coding.name.lower()
        titles |= {f"{name}_bpp": f"{name} bpp", f"{name}_change": "%", f"{name}_low": "from", f"{name}_high": "to"}
        formats[f"{name}_bpp"] = "{:.4f}".format
        formats |= dict.fromkeys((f"{name}_change", f"{name}_low", f"{name}_high"), "{:+.1f}".format)
    return Table(
        f"files_{dataset}",
        f"Whole files on {dataset}, header included, by coding; percent: beside the nominal length, mean over "
        f"{rows['image'].nunique()} images.",
        frame,
        titles,
        formats,
        [f"from, to: {LEVEL:.0%} interval of the mean over images."],
    )
