"""Schema of a training stage: what it trains and by which losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from oscar.config.checks import ConfigError, at_least, choose
from oscar.config.model import BottleneckConfig
from oscar.rates import RatePoint, find_rate
from oscar.registry import BOTTLENECKS, STAGES

# Options of image losses, in `StageConfig`.
IMAGE_FIELDS = ("image_losses", "network_files", "download", "image_range", "edges", "clamp_output")


@dataclass
class OptimiserConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-2
    warmup_steps: int = 10
    schedule: str = "constant"
    """after the warm-up: constant, or cosine, which falls to 0"""
    schedule_steps: int | None = None
    """cosine: steps at which it is 0; None takes trainer.max_steps. A run that is stopped early keeps its own"""
    grad_clip: float | None = 1.0
    """largest L2 norm of the gradients, all together or, with `stage.independent_rates`, of each hyper-encoder; None
    never clips"""
    set_to_none: bool = True
    """true forgets gradients after a step, so that AdamW leaves alone what the next one does not use. false (published)
    sets them to zero, so that hyper-encoders of rates that are not drawn, once they were, go on by their momentum and
    decay in every step"""

    def check(self, name: str) -> None:
        at_least(f"{name}.lr", self.lr, 0, strict=True)
        at_least(f"{name}.warmup_steps", self.warmup_steps, 0)
        at_least(f"{name}.grad_clip", self.grad_clip, 0, strict=True)
        choose(f"{name}.schedule", self.schedule, ("constant", "cosine"))
        at_least(f"{name}.schedule_steps", self.schedule_steps, 1)
        if self.schedule_steps is not None and self.schedule == "constant":
            raise ConfigError(
                f"{name}.schedule_steps is {self.schedule_steps}, but {name}.schedule is 'constant'; "
                "allowed there: null"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{name}.betas is {list(self.betas)}; allowed: two numbers in [0, 1)")


@dataclass
class CriticConfig:
    """The adversarial critic of the joint stage (paper section 3.4)."""

    lora_rank: int | None = 16
    """rank of the critic's LoRA; None trains all of its weights"""
    lora_alpha: float | None = None
    """scale of the LoRA times its rank; None takes the rank, published is 8"""
    lora_init: str = "gaussian"
    """of LoRA's first factor: gaussian, or kaiming (published, PEFT's default)"""
    lora_layers: str = "denoiser"
    """denoiser: the layers of the paper's denoiser; published: these less conv_in, and time_emb_proj"""
    head: str = "light"
    """light: a 3x3 and a 1x1 convolution at 256 channels; published: two 4x4 convolutions at twice the features, which
    are 52.5 million parameters with Stable Diffusion 2.1"""
    prompt: str = "codec"
    """what the critic's cross-attention sees: codec, the denoiser's prompt; own (published), one that is drawn at the
    start"""
    feature_gradient: bool = True
    """whether gradients pass the critic's UNet. false (published) leaves codec, LoRA and own prompt without any, so
    that the head alone learns and `stage.gan` does nothing"""
    reduction: str = "sum"
    """of the losses of real and decoded latents: sum, or mean (published)"""
    timesteps: list[int] = field(default_factory=lambda: [20, 980])
    """range [low, high) of the timesteps at which its inputs are re-noised, for a schedule of 1000"""
    weight: float = 1e-2
    """of the critic's own loss"""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def check(self, name: str) -> None:
        at_least(f"{name}.lora_rank", self.lora_rank, 1)
        at_least(f"{name}.lora_alpha", self.lora_alpha, 0, strict=True)
        at_least(f"{name}.weight", self.weight, 0)
        choose(f"{name}.lora_init", self.lora_init, ("gaussian", "kaiming"))
        choose(f"{name}.lora_layers", self.lora_layers, ("denoiser", "published"))
        choose(f"{name}.head", self.head, ("light", "published"))
        choose(f"{name}.prompt", self.prompt, ("codec", "own"))
        choose(f"{name}.reduction", self.reduction, ("sum", "mean"))
        if self.lora_rank is None:
            blank = CriticConfig()
            for key in ("lora_alpha", "lora_init", "lora_layers"):
                if getattr(self, key) != getattr(blank, key):
                    raise ConfigError(
                        f"{name}.{key} is {getattr(self, key)!r}, but {name}.lora_rank is unset; "
                        f"allowed there: {getattr(blank, key)}"
                    )
        if len(self.timesteps) != 2 or not 0 <= self.timesteps[0] < self.timesteps[1] <= 1000:
            allowed = "[low, high] with 0 <= low < high <= 1000"
            raise ConfigError(f"{name}.timesteps is {list(self.timesteps)}; allowed: {allowed}")
        self.optimiser.check(f"{name}.optimiser")


@dataclass
class ContextConfig:
    """Size of a context model (`oscar.bitstream.context`)."""

    neighbours: int = 12
    """positions that each one looks at"""
    embedding: int = 8
    """dimensions of a code's vector; where a rate's codes are stages of one vector, as many as codes, up to 16"""
    hidden: int = 48
    """width of the first layer"""
    features: int = 32
    """width of the second layer, and of the vectors of the tree's nodes"""

    def check(self, name: str) -> None:
        for part, high in (("neighbours", 24), ("embedding", 64), ("hidden", 512), ("features", 512)):
            at_least(f"{name}.{part}", getattr(self, part), 1)
            if getattr(self, part) > high:
                raise ConfigError(f"{name}.{part} is {getattr(self, part)}; allowed: at most {high}")


@dataclass
class StageConfig:
    """What a stage trains and by which loss; fields that a stage does not use are refused if they are set."""

    name: str = "joint"
    """vae, diffusion_pretrain, bottleneck, joint, context, or one of your own"""
    image_losses: dict[str, float] = field(default_factory=dict)
    """weight by term: l1, mse, chroma, ms_ssim, features, dists, lpips_vgg, lpips_alex, or one of your own; with the
    prefix edges_ on Sobel maps"""
    network_files: dict[str, str] = field(default_factory=dict)
    """local weight files by network: squeezenet, vgg16, alexnet, dists"""
    download: bool = False
    """fetch the networks' weights that are not there, where that is possible"""
    image_range: str = "signed"
    """in which l1 and mse are measured: signed, [-1, 1], or unit, [0, 1] (published), with half and a quarter of it"""
    edges: str = "rgb"
    """Sobel maps: rgb, each channel's, from 0 to 1, with repeated borders; or grey (published), of the grey image in
    [0, 1], kernels not normalised, with borders of zeros"""
    clamp_output: bool = False
    """clamp the reconstruction to [-1, 1] before the image losses (published), so that what is outside gets no
    gradient; otherwise the losses pull it back"""
    kl: float = 0.0
    """vae: weight of the posterior's KL divergence"""
    cosine: float = 0.0
    """bottleneck, joint: weight of the cosine loss"""
    commitment: float = 0.0
    """bottleneck, joint: weight of the quantiser's commitment loss; 0 is the paper's"""
    lambdas: list[float] = field(default_factory=list)
    """bottleneck, joint with a hyperprior: weight of the distortion against bits per pixel at quality 0 and at
    quality 1, between which its logarithm is a straight line"""
    sample_latents: bool = False
    """bottleneck, joint: train on samples of the VAE's posterior, drawn in each pass (published), or on its mode, as
    files are coded"""
    latent: float = 0.0
    """joint: weight of the mean squared error of x0 against the latent; 0 is the paper's"""
    gan: float = 0.0
    """joint: weight of the generator's adversarial loss"""
    critic: CriticConfig = field(default_factory=CriticConfig)
    rates_per_step: int | None = None
    """bottleneck: rates trained per step, all if None; joint: 1"""
    independent_rates: bool = False
    """bottleneck: train each rate as in a run of its own: their losses are added in place of averaged, and
    `optimiser.grad_clip` holds for each hyper-encoder by itself"""
    rate_order: str = "random"
    """joint, bottleneck: random draws rates by weight (the paper); balanced takes all rates of positive weight equally
    often, in an order shuffled anew each time round"""
    rate_weights: dict[float, float] = field(default_factory=dict)
    """joint, bottleneck: relative probability of drawing a rate, 1 if not named; 0 leaves it as it is, in stage
    context too, where all others are trained in every step"""
    table_batches: int = 128
    """bottleneck, joint: batches at the end over which the entropy coder's tables are counted; with a
    hyperprior, bottleneck: over which the timesteps are calibrated"""
    vae: str = "frozen"
    """joint: frozen (the paper); decoder trains the VAE's decoder too; all trains the whole VAE"""
    denoiser: str = "trained"
    """joint: trained (the paper); frozen trains the hyper-encoders alone, so that with a frozen VAE rates of weight 0
    stay as they are"""

    context: ContextConfig = field(default_factory=ContextConfig)
    """context: size of the models"""

    def check(self, bottleneck: BottleneckConfig) -> None:
        choose("stage.name", self.name, tuple(STAGES))
        choose("stage.vae", self.vae, ("frozen", "decoder", "all"))
        choose("stage.denoiser", self.denoiser, ("trained", "frozen"))
        choose("stage.rate_order", self.rate_order, ("random", "balanced"))
        choose("stage.image_range", self.image_range, ("signed", "unit"))
        choose("stage.edges", self.edges, ("rgb", "grey"))
        at_least("stage.table_batches", self.table_batches, 1)
        for name in ("kl", "cosine", "commitment", "latent", "gan"):
            at_least(f"stage.{name}", getattr(self, name), 0)
        for term, weight in self.image_losses.items():
            at_least(f"stage.image_losses.{term}", weight, 0)
        stage, own = STAGES[self.name], bottleneck.family.stage_fields
        used = own.get(self.name, stage.fields)
        if used is None:
            allowed = ", ".join(name for name, other in STAGES.items() if name in own or other.fields is not None)
            raise ConfigError(
                f"stage.name is {self.name!r}, but a model with {bottleneck.family.point_words} has no "
                f"such stage; allowed: {allowed}"
            )
        blank = StageConfig()
        for name in (
            *IMAGE_FIELDS,
            "kl",
            "cosine",
            "commitment",
            "lambdas",
            "sample_latents",
            "latent",
            "gan",
            "rates_per_step",
            "independent_rates",
            "rate_order",
            "rate_weights",
            "table_batches",
            "vae",
            "denoiser",
            "context",
        ):
            if name not in used and getattr(self, name) != getattr(blank, name):
                other = any(name in kind.stage_fields.get(self.name, ()) for kind in BOTTLENECKS.values())
                raise ConfigError(
                    f"stage.{name} is {getattr(self, name)!r}, but stage {self.name} does not use it"
                    f"{f' with {bottleneck.family.point_words}' if other else ''}; "
                    f"allowed there: {', '.join(used) or 'none'}"
                )
        if self.name == "vae" and not any(self.image_losses.values()):
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight")
        if self.name == "joint" and not any(self.image_losses.values()) and not self.latent:
            raise ConfigError("stage.image_losses is empty; allowed: at least one positive weight, or stage.latent")
        bottleneck.family.check_stage(bottleneck, self)
        self.critic.check("stage.critic")
        self.context.check("stage.context")

    def draw_weights(self, rates: tuple[RatePoint, ...]) -> list[float]:
        """Relative probability of each of `rates`."""
        weights = {rate.id: 1.0 for rate in rates}
        for bpp, weight in self.rate_weights.items():
            try:
                weights[find_rate(float(bpp), rates).id] = float(weight)
            except ValueError as error:
                raise ConfigError(f"stage.rate_weights: {error}") from None
            at_least(f"stage.rate_weights.{bpp}", float(weight), 0)
        if not any(weights.values()):
            raise ConfigError("stage.rate_weights are all 0; allowed: at least one above 0")
        return [weights[rate.id] for rate in rates]
