"""Every contradiction is refused in one line that names the field, its value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from oscar.config import BottleneckConfig, ConfigError, StageConfig, parse
from oscar.rates import PAPER_RATES, RATES

EXPERIMENTS = sorted(
    path.relative_to(Path(__file__).parents[1] / "configs/experiment").with_suffix("").as_posix()
    for path in (Path(__file__).parents[1] / "configs/experiment").rglob("*.yaml")
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(compose, photos: Path, experiment: str) -> None:
    config = compose(f"experiment={experiment}", f"data.train=[{photos}]")
    assert config.data.train == [str(photos)]
    assert config.output == f"runs/{experiment}".replace("nano_vq", "nano-vq")  # as the model is called


def test_there_are_experiments() -> None:
    assert {
        "nano_vq/vae",
        "nano_vq/diffusion_pretrain",
        "nano_vq/bottleneck",
        "paper/stage1",
        "paper/stage2",
        "tiny/joint",
    } <= set(EXPERIMENTS)


def test_the_paper_recipe(compose, photos: Path) -> None:
    config = compose("experiment=paper/stage2", f"data.train=[{photos}]")
    assert config.stage.name == "joint"
    assert config.stage.image_losses == {"l1": 1.0, "dists": 1.0, "edges_dists": 1.0}
    assert (config.stage.cosine, config.stage.gan, config.stage.critic.weight) == (2.0, 5e-3, 1e-2)
    assert config.stage.critic.timesteps == [20, 980]
    assert (config.optimiser.lr, config.optimiser.weight_decay, config.optimiser.warmup_steps) == (5e-5, 1e-2, 10)
    assert (config.data.crop, config.data.batch_size, config.trainer.max_steps) == (256, 8, 150_000)
    assert config.bottleneck.rate_points() == PAPER_RATES
    assert config.denoiser.options() == {"tuning": "lora", "lora_rank": 16, "lora_alpha": 8.0, "prompt_tokens": 77}


# stage of the tiny experiment, override, and how the line begins and what it allows
CONTRADICTIONS = [
    ("bottleneck", "bottleneck.kind=fsq", "bottleneck.kind is 'fsq'", "vq"),
    ("bottleneck", "bottleneck.width=1", "bottleneck.width is 1", "at least 2"),
    ("bottleneck", "bottleneck.features=0", "bottleneck.features is 0", "at least 2"),
    ("bottleneck", "bottleneck.codebook_dim=-4", "bottleneck.codebook_dim is -4", "at least 2"),
    ("bottleneck", "+bottleneck.dither={0.0625: 0.1}", "bottleneck.dither is there no more", "without it"),
    ("bottleneck", "+bottleneck.stages={0.0625: 4}", "bottleneck.stages is there no more", "without it"),
    ("bottleneck", "+bottleneck.start_from={0.0625: 0.043}", "bottleneck.start_from is there no more", "without it"),
    ("joint", "stage.denoiser=half", "stage.denoiser is 'half'", "trained, frozen"),
    ("bottleneck", "stage.denoiser=frozen", "stage.denoiser is 'frozen'", "cosine"),
    ("bottleneck", "bottleneck.rates=[]", "bottleneck.rates is empty", "one or more"),
    ("bottleneck", "bottleneck.rates=[0.125,0.3]", "bottleneck.rates: rate 0.3 does not exist", "0.0019"),
    ("bottleneck", "denoiser.tuning=lorra", "denoiser.tuning is 'lorra'", "lora, full"),
    ("bottleneck", "denoiser.prompt_init=zeros", "denoiser.prompt_init is 'zeros'", "noise, text"),
    ("bottleneck", "denoiser.lora_rank=0", "denoiser.lora_rank is 0", "at least 1"),
    ("bottleneck", "denoiser.prompt_tokens=0", "denoiser.prompt_tokens is 0", "at least 1"),
    ("bottleneck", "backbone.unet=null", "backbone.source is unset", "a folder or hub id"),
    ("bottleneck", "data.train=[]", "data.train is empty", "one or more folders"),
    ("bottleneck", "data.train=[/no/such/folder]", "data.train names '/no/such/folder'", "folders or text lists"),
    ("bottleneck", "data.crop=100", "data.crop is 100", "multiples of 64"),
    ("bottleneck", "data.crop=0", "data.crop is 0", "multiples of 64"),
    ("bottleneck", "data.batch_size=0", "data.batch_size is 0", "at least 1"),
    ("bottleneck", "data.workers=-1", "data.workers is -1", "at least 0"),
    ("bottleneck", "data.scale=[0.5]", "data.scale is [0.5]", "[low, high]"),
    ("bottleneck", "data.scale=[0,1]", "data.scale is [0.0, 1.0]", "0 < low <= high <= 1"),
    ("bottleneck", "optimiser.lr=0", "optimiser.lr is 0", "above 0"),
    ("bottleneck", "optimiser.warmup_steps=-1", "optimiser.warmup_steps is -1", "at least 0"),
    ("bottleneck", "optimiser.grad_clip=0", "optimiser.grad_clip is 0", "above 0"),
    ("bottleneck", "optimiser.schedule=linear", "optimiser.schedule is 'linear'", "constant, cosine"),
    ("bottleneck", "optimiser.betas=[0.9]", "optimiser.betas is [0.9]", "two numbers"),
    ("bottleneck", "optimiser.betas=[0.9,1]", "optimiser.betas is [0.9, 1.0]", "two numbers"),
    ("bottleneck", "trainer.max_steps=0", "trainer.max_steps is 0", "at least 1"),
    ("bottleneck", "trainer.accumulation=0", "trainer.accumulation is 0", "at least 1"),
    ("bottleneck", "trainer.checkpoint_every=0", "trainer.checkpoint_every is 0", "at least 1"),
    ("bottleneck", "trainer.keep_last=0", "trainer.keep_last is 0", "at least 1"),
    ("bottleneck", "trainer.log_every=0", "trainer.log_every is 0", "at least 1"),
    ("bottleneck", "trainer.threads=0", "trainer.threads is 0", "at least 1"),
    ("bottleneck", "trainer.mixed_precision=fp8", "trainer.mixed_precision is 'fp8'", "no, fp16, bf16"),
    ("bottleneck", "trainer.ema_decay=1", "trainer.ema_decay is 1", "between 0 and 1"),
    ("bottleneck", "trainer.ema_decay=0", "trainer.ema_decay is 0", "between 0 and 1"),  # zero is not unset
    ("bottleneck", "stage.name=stage1", "stage.name is 'stage1'", "vae, diffusion_pretrain, bottleneck, joint"),
    ("bottleneck", "stage.cosine=0", "stage.cosine is 0", "above 0"),
    ("bottleneck", "stage.cosine=-1", "stage.cosine is -1", "at least 0"),
    ("bottleneck", "stage.gan=0.1", "stage.gan is 0.1, but stage bottleneck does not use it", "cosine, commitment"),
    ("bottleneck", "stage.rates_per_step=0", "stage.rates_per_step is 0", "1 to 8"),
    ("bottleneck", "stage.rates_per_step=9", "stage.rates_per_step is 9", "1 to 8"),
    ("bottleneck", "+stage.rate_weights={0.3:1}", "stage.rate_weights: rate 0.3 does not exist", "0.0019"),
    ("bottleneck", "+stage.rate_weights={0.125:-1}", "stage.rate_weights.0.125 is -1", "at least 0"),
    ("vae", "init_from=runs/x", "init_from is set, but stage vae", "null"),
    ("diffusion_pretrain", "init_from=runs/x", "init_from is set, but stage diffusion_pretrain", "null"),
    ("diffusion_pretrain", "stage.kl=0.1", "stage.kl is 0.1, but stage diffusion_pretrain does not use it", "none"),
    ("vae", "stage.image_losses={l1:0,ms_ssim:0}", "stage.image_losses is empty", "at least one positive"),
    ("vae", "stage.image_losses={l1:-1}", "stage.image_losses.l1 is -1", "at least 0"),
    ("vae", "stage.kl=-1", "stage.kl is -1", "at least 0"),
    ("vae", "stage.vae=decoder", "stage.vae is 'decoder', but stage vae does not use it", "image_losses"),
    ("joint", "stage.vae=encoder", "stage.vae is 'encoder'", "frozen, decoder, all"),
    ("joint", "stage.rate_order=sorted", "stage.rate_order is 'sorted'", "random, balanced"),
    ("vae", "stage.rate_order=balanced", "stage.rate_order is 'balanced', but stage vae does not use it", "kl"),
    (
        "bottleneck",
        "stage.rate_order=balanced",
        "stage.rate_order is 'balanced', but stage.rates_per_step is",
        "random",
    ),
    ("joint", "validation.images=/no/such/folder", "validation.images is '/no/such/folder'", "a folder of images"),
    ("joint", "stage.table_batches=0", "stage.table_batches is 0", "at least 1"),
    ("joint", "validation.every=0", "validation.every is 0", "at least 1"),
    ("joint", "validation.limit=0", "validation.limit is 0", "at least 1"),
    ("joint", "validation.grid=-1", "validation.grid is -1", "at least 0"),
    ("joint", "validation.crop=100", "validation.crop is 100", "multiples of 64"),
    ("joint", "validation.rates=[]", "validation.rates is empty", "one or more"),
    ("joint", "validation.rates=[0.3]", "validation.rates: rate 0.3 does not exist", "0.0019"),
    (
        "diffusion_pretrain",
        "validation.rates=[0.125]",
        "validation.rates is set, but stage diffusion_pretrain has no rates",
        "null",
    ),
    ("joint", "validation.metrics.names=[]", "metrics.names is empty", "one or more"),
    ("joint", "stage.rates_per_step=2", "stage.rates_per_step is 2, but stage joint does not use it", "image_losses"),
    ("joint", "stage.critic.timesteps=[500,20]", "stage.critic.timesteps is [500, 20]", "0 <= low < high <= 1000"),
    ("joint", "stage.critic.timesteps=[20]", "stage.critic.timesteps is [20]", "0 <= low < high <= 1000"),
    ("joint", "stage.critic.lora_rank=0", "stage.critic.lora_rank is 0", "at least 1"),
    ("joint", "stage.critic.weight=-1", "stage.critic.weight is -1", "at least 0"),
    ("joint", "stage.critic.optimiser.lr=0", "stage.critic.optimiser.lr is 0", "above 0"),
]


CONTRADICTIONS += [  # with a hyperprior
    ("hyperprior_bottleneck", "bottleneck.width=8", "bottleneck.width is 8, but kind hyperprior", "default"),
    ("bottleneck", "bottleneck.hyperprior.hidden=8", "bottleneck.hyperprior is", "default"),
    ("hyperprior_bottleneck", "bottleneck.hyperprior.groups=[]", "bottleneck.hyperprior.groups is []", "above 0"),
    ("hyperprior_bottleneck", "bottleneck.hyperprior.hidden=0", "bottleneck.hyperprior.hidden is 0", "at least 1"),
    ("hyperprior_bottleneck", "stage.lambdas=[1]", "stage.lambdas is [1.0]", "[low, high]"),
    ("hyperprior_joint", "stage.lambdas=[0,1]", "stage.lambdas is [0.0, 1.0]", "0 < low"),
    (
        "bottleneck",
        "stage.lambdas=[1,2]",
        "stage.lambdas is [1.0, 2.0], but stage bottleneck does not use it",
        "cosine",
    ),
    (
        "hyperprior_bottleneck",
        "stage.cosine=1",
        "stage.cosine is 1.0, but stage bottleneck does not use it with a hyperprior",
        "lambdas",
    ),
    ("hyperprior_joint", "stage.commitment=1", "stage.commitment is 1.0, but stage joint does not use it", "lambdas"),
    ("hyperprior_joint", "stage.name=context", "stage.name is 'context', but a model with a hyperprior", "joint"),
    ("hyperprior_joint", "validation.rates=[0.125]", "validation.rates is set, but a model with a hyperprior", "null"),
    ("hyperprior_joint", "validation.qualities=[2]", "validation.qualities is [2.0]", "0 to 1"),
    ("joint", "validation.qualities=[1]", "validation.qualities is set", "null"),
]


@pytest.mark.parametrize(("stage", "override", "begin", "allowed"), CONTRADICTIONS, ids=[c[1] for c in CONTRADICTIONS])
def test_contradictions(compose, photos: Path, stage: str, override: str, begin: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(f"experiment=tiny/{stage}", f"data.train=[{photos}]", override)
    message = str(error.value)
    assert message.startswith(begin) and "\n" not in message
    assert allowed in message.split("; allowed", 1)[1]


def test_all_rates_of_weight_zero(compose, photos: Path) -> None:
    weights = ",".join(f"{rate.bpp}:0" for rate in PAPER_RATES)
    with pytest.raises(ConfigError, match="^stage.rate_weights are all 0; allowed: at least one above 0$"):
        compose("experiment=tiny/bottleneck", f"data.train=[{photos}]", f"+stage.rate_weights={{{weights}}}")


def test_a_balanced_order_knows_no_weights(compose, photos: Path) -> None:
    balanced = ("experiment=tiny/joint", f"data.train=[{photos}]", "stage.rate_order=balanced")
    assert compose(*balanced, "+stage.rate_weights={0.125:0}").stage.rate_order == "balanced"
    with pytest.raises(ConfigError, match="^stage.rate_order is 'balanced', but stage.rate_weights differ; allowed"):
        compose(*balanced, "+stage.rate_weights={0.125:2}")


def test_no_more_rates_per_step_than_are_drawn(compose, photos: Path) -> None:
    with pytest.raises(ConfigError, match="^stage.rates_per_step is 8; allowed: 1 to 7, the rates drawn$"):
        compose(
            "experiment=tiny/bottleneck",
            f"data.train=[{photos}]",
            "stage.rates_per_step=8",
            "+stage.rate_weights={0.125:0}",
        )


def test_validation_is_off_unless_images_are_given(compose, photos: Path) -> None:
    assert not compose("experiment=tiny/joint", f"data.train=[{photos}]").validation.enabled
    assert compose("experiment=tiny/joint", f"data.train=[{photos}]", f"validation.images={photos}").validation.enabled


def test_unset_is_not_zero(compose, photos: Path) -> None:
    config = compose("experiment=tiny/bottleneck", f"data.train=[{photos}]", "seed=0", "optimiser.grad_clip=null")
    assert config.seed == 0 and config.optimiser.grad_clip is None and config.optimiser.warmup_steps == 10


def test_unknown_keys_and_wrong_types(compose, photos: Path) -> None:
    with pytest.raises(HydraException, match="traner"):
        compose("experiment=tiny/bottleneck", "traner.max_steps=3")
    with pytest.raises(HydraException, match=r"trainer\.max_steps=many"):
        compose("experiment=tiny/bottleneck", "trainer.max_steps=many")
    for config, named in (
        ({"traner": {"max_steps": 3}}, "traner"),
        ({"trainer": {"max_step": 3}}, r"trainer\.max_step"),
        ({"trainer": {"max_steps": "many"}}, r"trainer\.max_steps.*many"),
    ):
        with pytest.raises(ConfigError, match=f"^config: {named}") as error:
            parse(OmegaConf.create(config))
        assert "\n" not in str(error.value)


def test_rate_points_are_sorted_and_may_be_untrained_ones() -> None:
    points = BottleneckConfig(rates=[0.125, 0.0024, 0.125]).rate_points()
    assert points == (RATES[7], RATES[8])


def test_draw_weights_default_to_one() -> None:
    weights = StageConfig(rate_weights={0.125: 3.0}).draw_weights(PAPER_RATES)
    assert weights == [1, 1, 1, 1, 1, 1, 1, 3]
