"""Schema of a study: what scripts/reproduce.py trains, measures and compares."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.images import MetricsConfig

STUDIES = ("rd", "unseen_rates", "timesteps", "losses", "lora_rank", "stages", "design", "entropy", "complexity")


@dataclass
class StudyImagesConfig:
    """Where images come from."""

    root: str | None = None
    """folder of data sets: ROOT/kodak, ROOT/div2k_valid, ... (oscar prepare-data), or folders of your own"""
    datasets: list[str] = field(default_factory=lambda: ["kodak"])
    """names of folders in `root`; studies that retrain evaluate on them what they have trained"""
    limit: int | None = None
    """only so many images of each, the first in the order of their paths"""
    train: list[str] = field(default_factory=list)
    """sources to train on, as data.train of scripts/train.py; if empty, those of the recipe"""
    calibration: str | None = None
    """timesteps: folder of training images on which mappings are calibrated; None takes the first of `train`"""
    calibration_limit: int | None = 100
    """timesteps: only so many of them"""

    def check(self) -> None:
        if self.root is None:
            raise ConfigError("data.root is unset; allowed: a folder with a folder of images for each data set")
        if not Path(self.root).is_dir():
            raise ConfigError(f"data.root is {self.root!r}; allowed: a folder that exists")
        if not self.datasets:
            raise ConfigError("data.datasets is empty; allowed: one or more folders of data.root")
        at_least("data.limit", self.limit, 1)
        at_least("data.calibration_limit", self.calibration_limit, 1)


@dataclass
class RecipeConfig:
    """How a study trains: overrides of scripts/train.py by stage, and how long they take."""

    bottleneck: list[str] = field(default_factory=list)
    """stage 1"""
    joint: list[str] = field(default_factory=list)
    """stage 2"""
    context: list[str] = field(default_factory=list)
    """context models"""
    losses: dict[str, list[str]] = field(default_factory=dict)
    """variants of study losses: what each changes of stage 2"""
    seconds: dict[str, float] = field(default_factory=dict)
    """by stage of an optimiser step, and `evaluate` of an image at one point, for the estimate of `dry_run`"""
    measured_on: str = ""
    """the machine of `seconds`"""


@dataclass
class ReproduceConfig:
    """One study. A study uses those of these fields that say so, or that say nothing."""

    study: str = "rd"
    output: str = "runs/reproduce"
    """folder of all that a study trains, measures and writes; the same command goes on in it"""
    model: str = "nano-vq"
    """shipped name, checkpoint folder or hub id. rd, unseen_rates, entropy, complexity: what is measured; design: where
    VAE and UNet come from, such as a backbone alone; others: the checkpoint of stage 1 from which all runs of stage 2
    start"""
    dry_run: bool = False
    """print the jobs, their number and estimated hours, and do nothing"""
    data: StudyImagesConfig = field(default_factory=StudyImagesConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    protocols: list[str] = field(default_factory=lambda: ["paper", "bitstream"])
    """rd"""
    tolerance: dict[str, float] = field(default_factory=dict)
    """rd: largest difference from the published value that counts as reproduced, by metric"""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    train: list[str] = field(default_factory=list)
    """further overrides of every training run, such as trainer.max_steps=1000"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """studies that retrain: a run for each variant and seed"""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """studies that retrain: what each changes of the recipe, as overrides of scripts/train.py. design: those of `stage`
    go to the stages that have such a field, all others to both"""
    points: list[float] = field(default_factory=list)
    """design: operating points that are evaluated, rates or qualities; all of the model if empty"""
    reference: str | None = None
    """studies that retrain: the variant to which all others are compared; None takes the first"""
    calibrated: list[str] = field(default_factory=list)
    """timesteps: mappings that are measured on training images, each a variant of its own: cosine, snr"""
    sweep: list[int] = field(default_factory=list)
    """timesteps: timesteps at which the reference is decoded without training anew; none without any"""
    grid: dict[float, list[int]] = field(default_factory=dict)
    """timesteps: by rate, timesteps with each of which a model of this rate alone is trained"""
    rates: list[float] = field(default_factory=list)
    """unseen_rates: those to be added; stages: those that are also trained alone; entropy: those that are coded"""
    rates_checkpoint: str | None = None
    """unseen_rates: hyper-encoders of these rates, from stage 1; None trains them"""
    timesteps: str = "interpolated"
    """unseen_rates: of the added rates, interpolated or calibrated"""
    repeats: int = 10
    """complexity: measurements of each kind"""
    device: str | None = None
    """of evaluations; None takes a GPU if there is one, as training does"""
    threads: int | None = None
    """CPU threads of each process; None leaves the library's choice"""

    def check(self) -> None:
        choose("study", self.study, STUDIES)
        choose("timesteps", self.timesteps, ("interpolated", "calibrated"))
        for protocol in self.protocols:
            choose("protocols", protocol, ("paper", "bitstream"))
        for mapping in self.calibrated:
            choose("calibrated", mapping, ("cosine", "snr"))
        if not self.protocols:
            raise ConfigError("protocols is empty; allowed: paper, bitstream")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}; allowed: one or more, each once")
        for name in (*self.variants, *self.recipe.losses):
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
                raise ConfigError(f"variants.{name} is no name; allowed: letters, digits and . _ + -")
        for metric, value in self.tolerance.items():
            at_least(f"tolerance.{metric}", value, 0)
        at_least("repeats", self.repeats, 1)
        at_least("threads", self.threads, 1)
        self.data.check()
        self.metrics.check()
