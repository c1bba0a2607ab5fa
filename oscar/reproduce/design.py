"""Which design of a codec is better at equal bytes: variants trained through both stages, compared by BD-rate.

All begin with the same VAE and UNet. A seed's runs of stage 2 start from stage 1 of the same variant, which those share
that change nothing in it. With a recipe of stage 2 alone they go on from a trained model, or each from its own
`init_from`.
"""

from __future__ import annotations

import re

import pandas as pd

from oscar.bottlenecks import from_config
from oscar.config import ConfigError, config_folder
from oscar.evaluation.curves import metric_title, published_curves
from oscar.metrics.image import METRICS
from oscar.models.backbone import BackboneError, read_configs
from oscar.reproduce.actions import Actions
from oscar.reproduce.jobs import Job
from oscar.reproduce.retrain import NOTES, Retrain, verdict
from oscar.reproduce.statistics import compare_bytes
from oscar.reproduce.study import Summary
from oscar.training.resolve import resolve
from oscar.utils.tables import Table, plain_minus

_OF_STAGE = re.compile(r"[+~]*stage\.(\w+)")  # an override of a field of the stage


class Design(Retrain):
    """Variants of the codec's design."""

    title = "Designs at equal bytes"

    def check_model(self) -> None:
        model = self.config.model
        self.backbone = self.backbone_of(model)
        self.points: dict[str, int] = {}
        self.words: dict[str, tuple[list[str], list[str]]] = {}  # overrides of stage 1 and of stage 2
        self.origins: dict[str, str] = {}  # checkpoints that variants go on from, without a stage 1
        channels: dict[str, int] = {}  # of latents, by checkpoint
        actions = Actions(config_folder())
        for name, overrides in self.variants().items():
            words = [*self.config.train, *overrides]
            general = [word for word in words if not _OF_STAGE.match(word)]
            if self.config.recipe.bottleneck:
                source, composed = model, actions.compose("train", self.train_arguments("bottleneck", (), general))
            else:
                start = (f"init_from={model}",)
                composed = resolve(actions.compose("train", self.train_arguments("joint", start, words)))
                source = self.origins[name] = composed.init_from
            if source not in channels:
                channels[source] = self.channels_of(source)
            try:
                bottleneck = from_config(composed.bottleneck.describe(), channels[source])
                points = [bottleneck.parse(value) for value in self.config.points]
            except ValueError as error:
                raise ConfigError(f"variants.{name} cannot be: {error}") from None
            self.points[name] = len(points or bottleneck.points)
            if name in self.origins:
                self.words[name] = ([], words)
                continue
            first, second = (set(bottleneck.stage_fields[stage]) for stage in ("bottleneck", "joint"))
            field = {word: match[1] for word in words if (match := _OF_STAGE.match(word))}
            self.words[name] = (
                [word for word in words if field.get(word) in (None, *first)],
                [word for word in words if field.get(word) not in first - second],  # what none has is refused there
            )

    def channels_of(self, model: str) -> int:
        """Latent channels of a checkpoint, or of a backbone (ConfigError if it cannot be read)."""
        try:
            return read_configs(self.backbone_of(model))["vae"]["latent_channels"]
        except BackboneError as error:
            raise ConfigError(f"model is {model!r}, of which VAE and UNet cannot be had: {error}") from None

    def jobs(self) -> list[Job]:
        config, jobs = self.config, {}
        points = [f"points=[{','.join(map(str, config.points))}]"] if config.points else []
        for seed in config.seeds:
            for name, overrides in self.variants().items():
                own, second = self.words[name]
                run = f"{name}-seed{seed}"
                needs, origin = (), self.origins.get(name)
                if origin is None:
                    is_shared = not set(overrides) & set(own)
                    first = f"seed{seed}-bottleneck" if is_shared else f"{name}-seed{seed}-bottleneck"
                    start = (f"backbone.source={self.backbone}", f"seed={seed}")
                    arguments = self.train_arguments("bottleneck", start, own)
                    jobs[first] = Job(first, "train", arguments, (), (config.model,), ("bottleneck", 0))
                    needs, origin = (first,), self.result_of(first)
                arguments = self.train_arguments("joint", (f"init_from={origin}", f"seed={seed}"), second)
                jobs[run] = Job(run, "train", arguments, needs, (origin,), ("joint", 0))
                jobs |= {job.name: job for job in self.evaluations_of(jobs[run], self.points[name], points)}
        return list(jobs.values())

    def add_comparison(self, summary: Summary, rows: pd.DataFrame, dataset: str) -> None:
        """A table of each metric, and curves."""
        from oscar.benchmark.plots import plot_rates
        from oscar.benchmark.tables import means_frame

        if not (metrics := self.metrics_of(rows)):
            return
        rows = rows.rename(columns={"rate": "point"})
        parameters = self.parameters(rows)
        for metric in metrics:
            frame = compare_bytes(rows, metric, METRICS[metric].higher_is_better, self.reference, self.in_order())
            if "difference" in frame:
                summary.tables.append(bytes_table(frame, parameters, metric, self.reference, dataset))
        means = means_frame(rows.assign(codec=rows["variant"], label=rows["variant"]), pd.DataFrame(), metrics)
        title = f"{dataset}, {rows['image'].nunique()} images, mean over seeds"
        for path in plot_rates(self.plots / f"rd_{dataset}", means, published_curves(None), title):
            caption = f"{metric_title(path.stem.removeprefix('rd_').replace('_plus', '+'))} on {dataset}"
            summary.figures[caption] = f"rd_{dataset}/{path.stem}"

    def parameters(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Millions of parameters by variant: of the bottleneck, and of all."""
        from oscar.benchmark.speed.parameters import parameter_counts
        from oscar.codec import OscarCodec

        found = []
        for variant, seed in rows.groupby("variant")["seed"].first().items():
            codec = OscarCodec.from_pretrained(self.result_of(f"{variant}-seed{seed}"))
            total = sum(row["parameters"] for row in parameter_counts(codec))
            own = sum(count for _, _, count, _ in codec.bottleneck.parameter_counts())
            found.append({"variant": variant, "bottleneck_millions": own / 1e6, "model_millions": total / 1e6})
        return pd.DataFrame(found)


def bytes_table(frame: pd.DataFrame, parameters: pd.DataFrame, metric: str, reference: str, dataset: str) -> Table:
    """Of a frame of `compare_bytes`, and of parameters by variant."""
    verdicts = pd.Series([verdict(row, higher_is_better=False) for row in frame.to_dict("records")])
    is_variant = frame["variant"].isin(parameters["variant"])
    frame = frame.assign(verdict=verdicts.where(is_variant, "spread of seeds"))
    frame = frame.merge(parameters, on="variant", how="left")
    return Table(
        f"bytes_{metric.replace('+', '_plus')}_{dataset}",
        f"Bytes at equal {METRICS[metric].label} on {dataset}: BD-rate against {reference}, negative for fewer.",
        frame.rename(columns={"difference": "bd_rate_percent"}),
        {
            "variant": "variant", "bd_rate_percent": "BD-rate %", "low": "from", "high": "to",
            "seed_sd": "sd over seeds", "p_holm": "p (Holm)", "verdict": "verdict", "seeds": "seeds",
            "images": "images", "of_images": "of", "overlap_percent": "overlap %",
            "bottleneck_millions": "bottleneck M", "model_millions": "model M",
        },
        {
            **dict.fromkeys(("bd_rate_percent", "low", "high"), lambda value: plain_minus(f"{value:+.1f}")),
            **dict.fromkeys(("seed_sd", "bottleneck_millions", "model_millions"), "{:.2f}".format),
            **dict.fromkeys(("seeds", "images", "of_images", "overlap_percent"), "{:.0f}".format),
            "p_holm": "{:.4f}".format,
        },
        (
            "BD-rate: of each image and seed, over the range of quality that both reach; images without one at some "
            "seed are left out. overlap: that range beside the one that both span; of a small one BD-rate says little.",
            "M: million parameters.",
            *NOTES,
        ),
    )  # fmt: skip
