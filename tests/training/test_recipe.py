"""The published recipe: every value of both stages, what `paper_corrected` changes, and the mechanisms behind the keys.

Marks name the published files that a value is from: T1 `main_train_hyper_enc.py`, S1 `train_hyper_enc.sh`, J1
`options/train_hyper_enc.json`, E `diffusion/encoder.py`; T2 `main_train.py`, S2 `train.sh`, J2
`options/train_diff.json`, O `diffusion/oscar.py`; H `hyper_encoder.py`, C `discriminator.py`, D `data/dataset.py`, I
`utils_image.py`; lib the defaults of the libraries' pinned releases; P the paper; "ours" is not in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from oscar.config import ConfigError, StageConfig, TrainConfig
from oscar.data.crops import PhotoDataset
from oscar.models.discriminator import LatentDiscriminator, PublishedHead
from oscar.registry import LOSSES
from oscar.training import losses
from oscar.training.build import build_stage
from oscar.training.losses import ImageLoss, critic_loss
from oscar.training.processes import check_total_batch
from oscar.training.trainer import Trainer
from oscar.utils.rng import StepRng

ADAMW = {  # T1, T2: one group, decay on everything
    "lr": 5e-5,  # S1, S2
    "betas": [0.9, 0.999],  # T1, T2
    "weight_decay": 1e-2,  # T1, T2
    "schedule": "constant",  # S1, S2
    "schedule_steps": None,  # of a cosine
    "warmup_steps": 10,  # T2, lib: 10 updates, whatever the number of processes
    "grad_clip": 1.0,  # T1, T2
    "set_to_none": False,  # T1, S1, T2, S2: the flag is absent
}
BOTTLENECK = {
    "kind": "vq",  # H
    "rates": [0.0019, 0.0098, 0.0313, 0.0430, 0.0625, 0.0781, 0.0937, 0.1250],  # P
    "width": 192,  # H
    "features": 320,  # H
    "codebook_dim": 32,  # H
    "kmeans_init": False,  # lib
    "dead_code_threshold": 0.0,  # lib
    "decay": 0.8,  # lib
    "rotation_trick": True,  # lib
}
DENOISER = {
    "tuning": "lora",  # O
    "lora_rank": 16,  # S2
    "lora_alpha": 8.0,  # lib
    "prompt_tokens": 77,  # O
    "prompt_init": "noise",  # O; stage 2 keeps that of stage 1, which is noise that nothing has trained
}
DATA = {
    "latents": None,  # ours
    "crop": 256,  # J1, J2
    "workers": 64,  # J1, J2
    "augment": True,  # D
    "crop_margin": 8,  # D, I
    "scale": [1.0, 1.0],  # D: no resizing
    "cache": False,  # D
}
TRAINER = {
    "accumulation": 1,  # S1, S2
    "mixed_precision": "no",  # S1, S2
    "ema_decay": None,  # T1, T2
    "gradient_checkpointing": False,  # T1, T2
    "tf32": False,  # lib: torch's default; convolutions have it nevertheless
    "cudnn_deterministic": True,  # lib: creating a pyiqa metric sets it
    "compile": False,  # T1, T2
    "final": "last",  # T1, T2
}
COMMON_STAGE = {
    "commitment": 0.0,  # H: the returned loss is discarded
    "sample_latents": True,  # E, O
    "rates_per_step": None,  # T2: one per step; T1: one per run, and here all at once
    "rate_order": "random",  # T2
    "rate_weights": {},  # T2: uniform
    "latent": 0.0,  # T2: no such loss
    "kl": 0.0,  # T2: the VAE is frozen
    "lambdas": [],  # ours
    "network_files": {},  # ours
    "download": False,  # ours
    "vae": "frozen",  # O
    "denoiser": "trained",  # O
}
STAGE1 = {
    "seed": 123,  # S1
    "init_from": None,  # T1
    "backbone.name": "sd21",  # E
    "timesteps": None,  # O: the table of the rates
    "bottleneck": BOTTLENECK,
    "denoiser": DENOISER,  # not trained yet, and as stage 2 wants it
    "data": {**DATA, "batch_size": 64, "total_batch_size": 64},  # J1, S1: one process
    "optimiser": {**ADAMW, "warmup_steps": 0},  # S1, T1: its warm-up of 500 has no effect on this schedule
    "trainer": {**TRAINER, "max_steps": 10_000, "checkpoint_every": 1000},  # S1
    "validation.every": 1000,  # S1
    "stage": {
        **COMMON_STAGE,
        "name": "bottleneck",
        "cosine": 1.0,  # T1
        "independent_rates": True,  # S1: a run per rate
        "image_losses": {},  # T1
        "image_range": "signed",  # not used
        "edges": "rgb",  # not used
        "clamp_output": False,  # not used
        "gan": 0.0,  # T1
    },
}
STAGE2 = {
    "seed": 123,  # S2
    "init_from": "runs/paper/stage1/final",  # T2
    "backbone.name": "sd21",  # O
    "timesteps": None,  # O: the table of the rates
    "bottleneck": {**BOTTLENECK, "kmeans_init": None},  # that of stage 1
    "denoiser": {**DENOISER, "prompt_init": None},
    "data": {**DATA, "batch_size": 8, "total_batch_size": None},  # J2, S2: the number of processes is not stated
    "optimiser": ADAMW,
    "trainer": {**TRAINER, "max_steps": 150_000, "checkpoint_every": 7500},  # S2
    "validation.every": 7500,  # S2
    "stage": {
        **COMMON_STAGE,
        "name": "joint",
        "image_losses": {"l1": 1.0, "dists": 1.0, "edges_dists": 1.0},  # T2, S2
        "image_range": "unit",  # T2
        "edges": "grey",  # T2
        "clamp_output": True,  # O
        "cosine": 2.0,  # T2
        "gan": 5e-3,  # T2
        "independent_rates": False,  # T2: one norm over the optimiser's list
        "critic": {
            "lora_rank": 16,  # C
            "lora_alpha": 8.0,  # lib
            "lora_init": "kaiming",  # lib
            "lora_layers": "published",  # C
            "head": "published",  # C
            "prompt": "own",  # C
            "feature_gradient": False,  # C
            "timesteps": [20, 980],  # C
            "weight": 1e-2,  # T2
            "reduction": "mean",  # T2
            "optimiser": ADAMW,  # T2
        },
    },
}
CORRECTED = {  # what paper_corrected changes, by key, in each stage
    1: {
        "output": "runs/paper_corrected/stage1",
        "data.workers": 8,
        "data.crop_margin": 0,
        "optimiser.set_to_none": True,
        "stage.sample_latents": False,
    },
    2: {
        "output": "runs/paper_corrected/stage2",
        "init_from": "runs/paper_corrected/stage1/final",
        "data.workers": 8,
        "data.crop_margin": 0,
        "optimiser.set_to_none": True,
        "stage.sample_latents": False,
        "stage.edges": "rgb",
        "stage.clamp_output": False,
        "stage.critic.lora_alpha": None,
        "stage.critic.lora_init": "gaussian",
        "stage.critic.lora_layers": "denoiser",
        "stage.critic.head": "light",
        "stage.critic.prompt": "codec",
        "stage.critic.feature_gradient": True,
        "stage.critic.optimiser.set_to_none": True,
    },
}
ANY = {  # keys that say where a run is, or how it is watched and resumed, and not what it computes; or of other stages
    "output", "preflight", "plan", "backbone", "data.train", "stage.table_batches", "stage.context",
    "bottleneck.hyperprior", "bottleneck.options", "logger", "validation", "trainer.keep_last", "trainer.log_every",
    "trainer.resume", "trainer.non_finite", "trainer.max_skipped", "trainer.channels_last", "trainer.threads",
}  # fmt: skip


@pytest.fixture(autouse=True)
def torchs_default_of_cudnn():
    yield
    torch.backends.cudnn.deterministic = False


def flat(values: dict, prefix: str = "") -> dict:
    """Nested values by their dotted key."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value) and name != "image_losses":
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def keys_of(config: TrainConfig) -> dict:
    return flat(asdict(config))


@pytest.mark.parametrize(("number", "table"), [(1, STAGE1), (2, STAGE2)])
def test_every_value_is_the_published_one(compose, photos: Path, number: int, table: dict) -> None:
    composed = keys_of(compose(f"experiment=paper/stage{number}", f"data.train=[{photos}]"))
    expected = flat(table)
    assert {name: composed[name] for name in expected} == expected
    unused = ("stage.critic",) if number == 1 else ()
    left = [
        name
        for name in composed.keys() - expected.keys()
        if not any(name == part or name.startswith(f"{part}.") for part in (*ANY, *unused))
    ]
    assert not left, "a key that the recipe does not pin"


@pytest.mark.parametrize("number", [1, 2])
def test_the_corrections_are_these(compose, photos: Path, number: int) -> None:
    published, corrected = (
        keys_of(compose(f"experiment={name}/stage{number}", f"data.train=[{photos}]"))
        for name in ("paper", "paper_corrected")
    )
    assert {name: value for name, value in corrected.items() if value != published[name]} == CORRECTED[number]


def test_the_page_on_the_recipe_names_every_key_that_differs() -> None:
    page = (Path(__file__).parents[2] / "docs/recipe.md").read_text()
    for name in set(CORRECTED[1]) | set(CORRECTED[2]):
        assert f"`{name}`" in page, name


# Losses.


def images(seed: int = 0, side: int = 24) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    prediction, target = torch.rand(2, 2, 3, side, side, generator=source) * 2 - 1
    return prediction, target


def test_l1_and_mse_in_the_published_range() -> None:
    black, grey = torch.full((1, 3, 8, 8), -1.0), torch.zeros(1, 3, 8, 8)  # 0 and 1/2 in [0, 1]
    _, terms = ImageLoss({"l1": 1.0, "mse": 1.0}, image_range="unit")(black, grey)
    assert (terms["l1"].item(), terms["mse"].item()) == (0.5, 0.25)
    _, terms = ImageLoss({"l1": 1.0, "mse": 1.0})(black, grey)
    assert (terms["l1"].item(), terms["mse"].item()) == (1.0, 1.0)
    assert ImageLoss({"l1": 1.0}, image_range="unit").by_image(black, grey)[0].tolist() == [0.5]


def reference_edges(image: Tensor) -> Tensor:
    """[T2], written out: (B, 3, H, W) in [0, 1] -> (B, 1, H, W)."""
    red, green, blue = image.unbind(dim=1)
    grey = F.pad(0.2989 * red + 0.587 * green + 0.114 * blue, (1, 1, 1, 1))
    rows, columns = (side - 2 for side in grey.shape[-2:])

    def at(down: int, right: int) -> Tensor:
        return grey[:, 1 + down : 1 + down + rows, 1 + right : 1 + right + columns]

    across = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    down = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    return (across**2 + down**2 + 1e-6).sqrt()[:, None]


def test_published_edges() -> None:
    image, _ = images()
    edges = losses.grey_edges(image)
    torch.testing.assert_close(edges, reference_edges((image + 1) / 2).expand(-1, 3, -1, -1))
    step = torch.full((1, 3, 6, 8), -1.0)
    step[..., 4:] = 1
    edges = losses.grey_edges(step)
    white = 0.2989 + 0.587 + 0.114  # 0.9999: the published weights do not add up to 1
    torch.testing.assert_close(edges[0, 0, 2, 2:6], torch.tensor([1e-3, 4 * white, 4 * white, 1e-3]), atol=1e-5, rtol=0)
    # the frame of zeros is an edge where the image is bright, and none where it is black
    torch.testing.assert_close(edges[0, 0, [2, 2], [7, 0]], torch.tensor([4 * white, 1e-3]), atol=1e-5, rtol=0)
    assert torch.autograd.gradcheck(losses.grey_edges, torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True))


def test_dists_gets_the_published_edges(monkeypatch) -> None:
    """As a map from sqrt(1e-6) to more than 1 and not of [-1, 1], which the distance's own mapping undoes."""
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, weights) -> None:
            super().__init__()

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            seen.extend(((prediction + 1) / 2, (target + 1) / 2))  # what DistsDistance hands to pyiqa
            return prediction.mean()

    monkeypatch.setitem(LOSSES._entries, "dists", losses.Term(Spy))
    prediction, target = images()
    ImageLoss({"edges_dists": 1.0}, edges="grey")(prediction, target)
    for map_, image in zip(seen, (prediction, target), strict=True):
        expected = reference_edges((image + 1) / 2).expand(-1, 3, -1, -1)
        torch.testing.assert_close(map_, expected, atol=5e-7, rtol=0)
        assert map_.max() > 1


def test_one_channel_and_three_equal_ones_are_the_same_to_dists() -> None:
    """The published code hands over one; pyiqa's network broadcasts it."""
    arch = pytest.importorskip("pyiqa.archs.dists_arch")
    from unittest import mock

    from torchvision.models import vgg16

    torch.manual_seed(0)
    with mock.patch.object(arch.models, "vgg16", lambda weights: vgg16(weights=None)):
        network = arch.DISTS(pretrained=False)
    one, other = (losses.grey_edges(image) for image in images(side=64))
    torch.testing.assert_close(network(one[:, :1], other[:, :1]), network(one, other))


def test_a_clamp_stops_the_gradient_outside() -> None:
    prediction = torch.tensor([-1.5, -0.5, 0.5, 2.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4).clone().requires_grad_()
    target = torch.zeros(1, 3, 1, 4)
    total, _ = ImageLoss({"l1": 1.0}, image_range="unit", clamp_output=True)(prediction, target)
    assert total.item() == pytest.approx((1 + 0.5 + 0.5 + 1) / 4 / 2)
    total.backward()
    torch.testing.assert_close(prediction.grad[0, 0, 0], torch.tensor([0.0, -1 / 24, 1 / 24, 0.0]))
    prediction.grad = None
    ImageLoss({"l1": 1.0}, image_range="unit")(prediction, target)[0].backward()
    torch.testing.assert_close(prediction.grad[0, 0, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]) / 24)


def test_the_critics_loss_is_the_mean_of_both() -> None:
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.1])
    bce = F.binary_cross_entropy_with_logits
    expected = (bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))) / 2
    torch.testing.assert_close(critic_loss(real, fake, "mean"), expected)
    torch.testing.assert_close(critic_loss(real, fake), 2 * expected)


def test_the_total_is_the_published_sum(configure) -> None:
    """L1 + 5e-3 G + 2 cosine, of the terms as they are logged (DISTS, whose weights are not here, has weight 1)."""
    stage = build_stage(configure(2)).train()
    metrics = stage(images(side=64)[0], StepRng(0, 0))
    expected = metrics["l1"] + 5e-3 * metrics["gan"] + 2 * metrics["cosine"]
    torch.testing.assert_close(metrics["loss"], expected)


# Runs on tiny networks, with all that the recipe has but sizes and weights.


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path, quick_tables) -> Callable[..., TrainConfig]:
    def make(number: int, *overrides: str, output: str = "run", rates: str = "0.0313,0.125") -> TrainConfig:
        options = [
            f"experiment=paper/stage{number}",
            "backbone=tiny",
            "bottleneck=tiny",
            f"bottleneck.rates=[{rates}]",
            "init_from=null",
            f"data.train=[{photos}]",
            "data.crop=64",
            "data.batch_size=2",
            "data.workers=0",
            "data.total_batch_size=null",
            "denoiser.lora_rank=2",
            "denoiser.prompt_tokens=4",
            f"output={tmp_path / output}",
            "trainer.max_steps=3",
            "trainer.log_every=1",
            "logger.tensorboard=false",
        ]
        if number == 2:
            options += ["stage.image_losses={l1: 1, dists: 0, edges_dists: 0}", "stage.critic.lora_rank=2"]
        return compose(*options, *overrides)

    return make


def advance(trainer: Trainer, steps: int) -> None:
    batches = trainer._batches(trainer.step)
    for _ in range(steps):
        trainer._optimise(batches)
        trainer.step += 1


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_all_rates_at_once_train_as_runs_of_their_own(configure) -> None:
    """Weights and codebooks of one run of two rates equal those of two runs of one rate, to the bit."""
    together = configure(1, "optimiser.lr=1e-3", "optimiser.grad_clip=1e-3", output="both")
    start = build_stage(together).codec.bottleneck.state_dict()
    both = Trainer(build_stage(together), together)
    advance(both, 3)
    for rate in ("0.0313", "0.125"):
        config = configure(1, "optimiser.lr=1e-3", "optimiser.grad_clip=1e-3", output=rate, rates=rate)
        stage = build_stage(config)
        stage.codec.bottleneck.load_state_dict({name: start[name] for name in stage.codec.bottleneck.state_dict()})
        alone = Trainer(stage, config)
        advance(alone, 3)
        state = both.stage.codec.bottleneck.state_dict()
        for name, value in stage.codec.bottleneck.state_dict().items():
            assert torch.equal(state[name], value), name
            if name.endswith("proj.0.weight"):
                assert not torch.equal(value, start[name])


def test_without_independent_rates_they_do_not(configure) -> None:
    """So the test above would see it: the mean over rates and a norm of all gradients give other weights."""
    options = ("optimiser.lr=1e-3", "optimiser.grad_clip=1e-3")
    weights = []
    for extra in ((), ("stage.independent_rates=false",)):
        config = configure(1, *options, *extra, output=str(len(weights)))
        trainer = Trainer(build_stage(config), config)
        advance(trainer, 2)
        weights.append(trainer.stage.codec.bottleneck.hyper_encoders["2"].proj[0].weight)
    assert not torch.equal(*weights)


def test_each_hyper_encoder_is_clipped_by_its_own_norm(configure) -> None:
    config = configure(1, "optimiser.grad_clip=0.01")
    trainer = Trainer(build_stage(config), config)
    groups = trainer.train_state.clip_groups
    bottleneck = trainer.stage.codec.bottleneck
    encoders = [list(bottleneck.at(rate).parameters()) for rate in bottleneck.rates]
    assert [list(map(id, group)) for group in groups] == [list(map(id, encoder)) for encoder in encoders]
    norms = []
    trainer.train_state.optimiser.step = lambda: norms.extend(total_norm(group) for group in groups)
    advance(trainer, 1)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def total_norm(parameters) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))


def test_codec_and_critic_are_clipped_separately(configure) -> None:
    config = configure(2, "optimiser.grad_clip=0.01", "stage.critic.optimiser.grad_clip=1e-4")
    trainer = Trainer(build_stage(config), config)
    norms = []
    for train_state in trainer.train_states:
        train_state.optimiser.step = lambda train_state=train_state: norms.append(total_norm(train_state.parameters))
    advance(trainer, 1)
    assert norms == pytest.approx([0.01, 1e-4], rel=1e-3)


def test_the_learning_rate_warms_up_from_zero(configure) -> None:
    config = configure(2)
    trainer = Trainer(build_stage(config), config)
    before = {name: p.clone() for name, p in trainer.stage.named_parameters()}
    rates = []
    for train_state in trainer.train_states:
        step = train_state.optimiser.step
        train_state.optimiser.step = lambda step=step, train_state=train_state: (
            rates.append(train_state.optimiser.param_groups[0]["lr"]),
            step(),
        )
    advance(trainer, 1)
    assert all(torch.equal(before[name], p) for name, p in trainer.stage.named_parameters()), "the first update is none"
    advance(trainer, 11)
    factors = [min(step / 10, 1) for step in range(12)]
    assert rates[::2] == rates[1::2] == pytest.approx([5e-5 * factor for factor in factors])


@pytest.mark.parametrize("set_to_none", [False, True])
def test_rates_that_are_not_drawn(configure, monkeypatch, set_to_none: bool) -> None:
    """Against a plain loop of torch: the gradient of a rate that is not drawn is zero, or there is none."""
    options = (f"optimiser.set_to_none={set_to_none}", "optimiser.warmup_steps=0", "optimiser.lr=1e-3", "stage.gan=0")
    config = configure(2, *options)
    drawn = [0, 1, 1, 0]

    def choose(rng, rates, *_):
        return [rates[drawn[rng.number]]]

    monkeypatch.setattr("oscar.bottlenecks.vq.choose_points", choose)
    stage, plain = build_stage(config).train(), build_stage(config).train()
    trainer = Trainer(stage, config)
    batches = [next(iter_) for iter_ in [trainer._batches(0)] for _ in drawn]
    trainer._batches = lambda first: iter(batches[first:])
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    first, second = (plain.codec.bottleneck.at(rate).proj[0].weight for rate in plain.codec.bottleneck.rates)
    own = [stage.codec.bottleneck.at(rate).proj[0].weight for rate in stage.codec.bottleneck.rates]
    for number, batch in enumerate(batches):
        before = first.clone(), second.clone()
        plain(batch["image"], StepRng(number, config.seed))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=set_to_none)
        advance(trainer, 1)
        assert torch.equal(own[0], first) and torch.equal(own[1], second)
        moves = [not torch.equal(a, b) for a, b in zip(before, (first, second), strict=True)]
        if number == 0:
            assert moves == [True, False], "before a rate is first drawn nothing moves it"
        else:
            assert moves == ([drawn[number] == 0, drawn[number] == 1] if set_to_none else [True, True])


def test_a_resume_keeps_moving_rates_that_are_not_drawn(configure, runs) -> None:
    """Their gradients of zero are no part of a checkpoint, and are there again all the same."""
    options = ("optimiser.warmup_steps=0", "optimiser.lr=1e-3", "trainer.checkpoint_every=1", "seed=3")
    whole = configure(2, *options, "trainer.max_steps=4", output="whole")
    assert Trainer(build_stage(whole), whole).run()
    for steps in (2, 4):
        part = configure(2, *options, f"trainer.max_steps={steps}", output="part")
        assert Trainer(build_stage(part), part).run()
    drawn = {name for row in runs.rows(whole)[:2] for name, value in row.items() if name.startswith("loss_") and value}
    assert len(drawn) == 2, "this seed draws both rates early"
    runs.assert_same(whole, part)


# Latents.


@pytest.mark.parametrize("number", [1, 2])
def test_latents_are_sampled_anew_in_each_pass(configure, number: int) -> None:
    stage = build_stage(configure(number)).train()
    backbone, seen = stage.codec.backbone, []
    stage.codec.bottleneck.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = images(side=64)[0]
    for step in (0, 0, 1):
        stage(batch, StepRng(step, 0))
    per_pass = len(seen) // 3
    first, again, other = seen[0], seen[per_pass], seen[2 * per_pass]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(latent, first) for latent in seen[:per_pass]), "one sample for all rates of a pass"
    posterior = backbone.vae.encode(batch).latent_dist
    factor = backbone.vae.config.scaling_factor
    noise = (first / factor - posterior.mean) / posterior.std
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.15 and first.shape == posterior.mean.shape
    assert not torch.equal(first, backbone.encode(batch))
    if number == 2:
        stage(batch, StepRng(0, 0))
        real, fake, _ = stage.critic_inputs()
        fresh = (real / factor - posterior.mean) / posterior.std
        assert real.shape == fake.shape == first.shape and not torch.equal(real, first)
        assert abs(torch.corrcoef(torch.stack([fresh.flatten(), noise.flatten()]))[0, 1]) < 0.2
        assert not real.requires_grad and not fake.requires_grad


def test_samples_need_a_posterior_and_no_cache(configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^stage.sample_latents is true, but data.latents is .*; allowed: false$"):
        configure(1, f"data.latents={tmp_path}", "data.crop_margin=0")
    with pytest.raises(ConfigError, match="^stage.sample_latents is true, but AutoencoderDC has no posterior; allowed"):
        build_stage(configure(1, "backbone=nano_vq", "backbone.source=null"))


# The critic.


def test_the_published_head_has_52_million_parameters() -> None:
    with torch.device("meta"):
        head = PublishedHead(1280)
    shapes = [
        (module.kernel_size, module.stride, module.padding, module.in_channels, module.out_channels)
        for module in head.layers
        if isinstance(module, torch.nn.Conv2d)
    ]
    assert shapes == [((4, 4), (1, 1), (1, 1), 1280, 2560), ((4, 4), (1, 1), (1, 1), 2560, 1)]
    assert (head.layers[1].num_groups, head.layers[1].num_channels) == (32, 2560)
    assert isinstance(head.layers[2], torch.nn.SiLU)
    weights = 4 * 4 * 1280 * 2560 + 2560 + 2 * 2560 + 4 * 4 * 2560 + 1
    assert sum(p.numel() for p in head.parameters()) == weights == 52_477_441
    assert head(torch.empty(3, 1280, 4, 4, device="meta")).shape == (3, 1, 2, 2)


def critic(**changes) -> LatentDiscriminator:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    options = {
        "lora_rank": 16,
        "lora_alpha": 8.0,
        "lora_init": "kaiming",
        "lora_layers": "published",
        "head": "published",
        "prompt_tokens": 77,
        "feature_gradient": False,
    }
    return LatentDiscriminator(unet, alphas, **{**options, **changes})


def test_the_published_lora_of_the_critic() -> None:
    published, own = critic(), critic(lora_layers="denoiser", lora_alpha=None, lora_init="gaussian")
    layers = [
        {name.split(".lora_A.")[0] for name, _ in one.trunk.named_parameters() if ".lora_A." in name}
        for one in (published, own)
    ]
    assert layers[1] - layers[0] == {"conv_in"}
    time = {
        name
        for name, _ in critic(
            lora_rank=None, lora_alpha=None, lora_init="gaussian", lora_layers="denoiser"
        ).trunk.named_modules()
        if name.endswith("time_emb_proj")
    }
    assert layers[0] - layers[1] == time and len(time) == 4
    layer = published.trunk.mid_block.resnets[0].conv1
    assert (layer.r["critic"], layer.scaling["critic"]) == (16, 0.5)
    assert own.trunk.mid_block.resnets[0].conv1.scaling["critic"] == 1
    factor = published.trunk.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_A["critic"].weight
    bound = math.sqrt(1 / factor.shape[1])  # Kaiming's of a = sqrt(5)
    assert 0.9 * bound < factor.abs().max() <= bound
    assert all(not value.any() for name, value in published.trunk.named_parameters() if ".lora_B." in name)


def test_the_critics_own_prompt() -> None:
    one = critic()
    assert one.prompt.shape == (1, 77, 24) and abs(one.prompt.std() - 0.02) < 0.002 and abs(one.prompt.mean()) < 0.002
    assert one.prompt.requires_grad
    latent, seed = torch.randn(2, 4, 8, 8), torch.Generator().manual_seed
    assert torch.equal(one(latent, torch.randn(1, 5, 24), seed(1)), one(latent, None, seed(1)))
    assert critic(prompt_tokens=0).prompt is None


def test_only_the_head_gets_gradients() -> None:
    one = critic()
    latent = torch.randn(2, 4, 8, 8, requires_grad=True)
    one(latent, None, torch.Generator().manual_seed(0)).sum().backward()
    assert latent.grad is None
    assert {name for name, p in one.named_parameters() if p.grad is not None} == {
        f"head.{name}" for name, _ in one.head.named_parameters()
    }


def test_the_critic_of_a_published_run(configure) -> None:
    """Its LoRA and prompt stay what they were, its head learns, and the codec learns as without it."""
    config = configure(2, "stage.critic.optimiser.warmup_steps=0")
    trainer = Trainer(build_stage(config), config)
    before = snapshot(trainer.stage.critic)
    advance(trainer, 3)
    head = {f"head.{name}" for name, _ in trainer.stage.critic.head.named_parameters()}
    assert moved(before, trainer.stage.critic) == head
    without = configure(2, "stage.gan=0", output="without")
    other = Trainer(build_stage(without), without)
    advance(other, 3)
    state = trainer.stage.state_dict()
    for name, value in other.stage.state_dict().items():
        assert torch.equal(state[name], value), name


def test_the_corrected_critic_teaches_the_codec(configure, compose, photos: Path) -> None:
    stage = build_stage(configure(2, "experiment=paper_corrected/stage2")).train()
    stage.critic.requires_grad_(False)
    stage(images(side=64)[0], StepRng(0, 0))["gan"].backward()
    assert stage.codec.denoiser.prompt.grad.abs().max() > 0


def test_crops_too_small_for_the_head(configure) -> None:
    with pytest.raises(ConfigError, match="^data.crop is 64, but .* needs features of 3x3; allowed: 192 or more$"):
        build_stage(configure(2, "backbone=standin"))


# Data, batch and flags.


def test_a_crop_out_of_a_larger_crop(tmp_path: Path) -> None:
    """Pixels tell their place: half of the crops are at the top left of the turned crop, the others anywhere."""
    import numpy as np
    from PIL import Image

    side, margin = 16, 8
    rows, columns = np.mgrid[0 : side + margin, 0 : side + margin]
    Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    dataset = PhotoDataset(tmp_path, side, margin=margin)
    offsets, turns = [], set()
    for number in range(600):
        crop = ((dataset[0, number]["image"] + 1) * 127.5).round().long()
        turn = next(k for k in range(8) if is_upright(untwist(crop, k)))
        turns.add(turn)
        corner = corner_of(crop, turn, side + margin)
        offsets.append(corner)
    assert turns == set(range(8))
    top_left = sum(offset == (0, 0) for offset in offsets) / 600
    assert abs(top_left - (0.5 + 0.5 / 81)) < 0.06
    others = [offset for offset in offsets if offset != (0, 0)]
    assert {a for a, _ in others} == {b for _, b in others} == set(range(margin + 1))


def untwist(crop: Tensor, turn: int) -> Tensor:
    """The inverse of rot90 by `turn` % 4 and, from 4 on, a flip."""
    crop = crop.flip(-1) if turn >= 4 else crop
    return crop.rot90(-(turn % 4), (-2, -1))


def is_upright(crop: Tensor) -> bool:
    rows, columns = crop[0], crop[1]
    return bool((rows[1:] - rows[:-1] == 1).all() and (columns[:, 1:] - columns[:, :-1] == 1).all())


def corner_of(crop: Tensor, turn: int, whole: int) -> tuple[int, int]:
    """Where in the turned first crop the crop's top left pixel lies."""
    place = torch.zeros(2, whole, whole, dtype=torch.long)
    place[0], place[1] = torch.arange(whole)[:, None], torch.arange(whole)[None]
    turned = place.rot90(turn % 4, (-2, -1))
    turned = turned.flip(-1) if turn >= 4 else turned
    found = ((turned == crop[:2, :1, :1]).all(dim=0)).nonzero()
    return tuple(found[0].tolist())


def test_the_number_of_crops_per_step(configure) -> None:
    for passes, fits in (
        (1, "allowed: data.batch_size=64, or data.total_batch_size=null"),
        (8, "allowed: data.batch_size=8, or data.total_batch_size=null"),
    ):
        with pytest.raises(ConfigError, match=f"^data.total_batch_size is 64, but processes {passes} x .*; {fits}$"):
            check_total_batch(configure(1, "data.total_batch_size=64"), passes)
    check_total_batch(configure(1, "data.total_batch_size=64", "data.batch_size=8"), 8)
    check_total_batch(configure(1, "data.total_batch_size=64", "data.batch_size=4", "trainer.accumulation=2"), 8)
    check_total_batch(configure(1), 3)
    with pytest.raises(ConfigError, match=r"are 6; allowed: data\.total_batch_size=null$"):
        check_total_batch(configure(1, "data.total_batch_size=64"), 3)
    with pytest.raises(ConfigError, match="^data.total_batch_size is 64, but processes 1 "):  # before anything is built
        config = configure(1, "data.total_batch_size=64")
        Trainer(build_stage(config), config)


def test_flags_of_the_gpu_libraries(configure) -> None:
    """Convolutions in TF32, other products not: torch's defaults, which the published code leaves."""
    build_stage(configure(1))
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    build_stage(configure(1, "trainer.cudnn_deterministic=false"))
    assert not torch.backends.cudnn.deterministic


def test_the_quantisers_defaults(configure) -> None:
    """[lib], of a library release that is not the published one."""
    codec = build_stage(configure(2)).codec
    for rate in codec.bottleneck.rates:
        quantizer = codec.bottleneck.at(rate).quantizer
        codebook = quantizer._codebook
        assert (codebook.decay, codebook.eps, codebook.threshold_ema_dead_code) == (0.8, 1e-5, 0)
        assert quantizer.rotation_trick and quantizer.commitment_weight == 1 and not codebook.learnable_codebook
        assert (codebook.cluster_size == 1).all() and codebook.initted
        torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(rate.codebook_size))
        assert quantizer.project_in.bias is not None and quantizer.project_out.bias is not None


def test_defaults_of_the_schema_are_ours() -> None:
    """Experiments that do not name the new keys train as before."""
    stage = StageConfig()
    assert (stage.image_range, stage.edges, stage.clamp_output) == ("signed", "rgb", False)
    assert not (stage.sample_latents or stage.independent_rates or stage.download)
    assert (stage.critic.head, stage.critic.prompt, stage.critic.reduction) == ("light", "codec", "sum")
    assert stage.critic.feature_gradient and stage.critic.optimiser.set_to_none
