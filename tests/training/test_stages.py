"""Two steps of each stage with the tiny backbone: what must change changes, what is frozen does not."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from oscar import OscarCodec
from oscar.bottlenecks import Output
from oscar.config import ConfigError, TrainConfig
from oscar.models.backbone import Backbone, BackboneError
from oscar.rates import PAPER_RATES, RATES
from oscar.timesteps import CalibratedMapping, LearnedMapping, PerImageMapping, RampMapping, TableMapping
from oscar.training.build import build_stage
from oscar.training.stages import bottleneck as hyper
from oscar.training.stages.base import Stage
from oscar.training.trainer import Trainer
from oscar.utils.rng import StepRng, choose_points

TRAINED = {  # by stage, the first parts of the names of trained tensors
    "vae": ("backbone.vae.",),
    "diffusion_pretrain": ("backbone.unet.",),
    "bottleneck": ("codec.bottleneck.",),
    "joint": ("codec.bottleneck.", "codec.denoiser.prompt", "lora_"),
}


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Composes the tiny experiment of a stage, for two steps."""

    def make(stage: str, *overrides: str) -> TrainConfig:
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / stage}",
            "trainer.max_steps=2",
            "logger.tensorboard=false",
            *overrides,
        )

    return make


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def is_trained(stage: str, name: str) -> bool:
    return any(part in name for part in TRAINED[stage])


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps(configure, quick_tables, name: str) -> None:
    config = configure(name)
    stage = build_stage(config)
    before = snapshot(stage)
    trained = {key for key, parameter in stage.named_parameters() if parameter.requires_grad}
    assert trained and all(is_trained(name, key) for key in trained)
    metrics = stage(images(), StepRng(0, 0))
    assert metrics["loss"].requires_grad and set(metrics) <= set(stage.metrics)
    assert all(math.isfinite(value.item()) for value in metrics.values())
    stage.load_state_dict(before)
    assert Trainer(stage, config).run()
    moved = changed(before, stage)
    assert all(is_trained(name, key) for key in moved)
    if name != "joint":
        # a prior without a prompt gives its cross-attention one token, whose share is 1 whatever the query
        assert not {key for key in trained - moved if "norm2.bias" not in key}
    else:  # the two steps draw two rates, and an adapter's A waits for its B, which starts at zero
        assert {"codec.denoiser.prompt"} <= moved and any("lora_B" in key for key in moved)
        assert len({key.split(".")[3] for key in moved if "hyper_encoders" in key}) in (1, 2)


@pytest.mark.parametrize("name", TRAINED)
def test_only_trained_parts_are_in_training_mode(configure, name: str) -> None:
    stage = build_stage(configure(name)).train()
    inside = {id(module) for trained in stage.trained_modules() for module in trained.modules()}
    for key, module in stage.named_modules():
        if key:
            assert module.training == (id(module) in inside), key
    assert not any(module.training for module in stage.eval().modules())


def test_the_vae_stage_scales_latents_to_unit_variance(configure) -> None:
    config = configure("vae")
    stage = build_stage(config)
    Trainer(stage, config).run()
    backbone = Backbone.from_pretrained(config.output + "/final")
    assert backbone.vae.config.scaling_factor == stage.backbone.vae.config.scaling_factor != 1.0
    with torch.no_grad():
        assert 0.5 < backbone.encode(images(8)).std() < 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prior_learns_the_target_of_its_schedule(configure, prediction_type: str) -> None:
    stage = build_stage(configure("diffusion_pretrain", f"backbone.scheduler.prediction_type={prediction_type}"))
    assert stage.backbone.schedule.prediction_type == prediction_type
    assert stage(images(), StepRng(0, 0))["loss"].item() > 0


def test_hyper_trains_all_rates_or_some(configure) -> None:
    stage = build_stage(
        configure("bottleneck", "bottleneck.rates=[0.0019,0.0313,0.125]", "stage.commitment=0.5")
    ).train()
    metrics = stage(images(), StepRng(0, 0))
    losses, cosines = (
        [metrics[f"{name}_{bpp}"].item() for bpp in ("0.0019", "0.0313", "0.1250")] for name in ("loss", "cosine")
    )
    assert metrics["loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert sum(losses) - sum(cosines) == pytest.approx(3 * 0.5 * metrics["commitment"].item(), abs=1e-6) != 0
    stage = build_stage(configure("bottleneck", "stage.rates_per_step=2", "+stage.rate_weights={0.125:0}"))
    for number in range(8):
        drawn = [name for name in stage(images(), StepRng(number, 0)) if name.startswith("cosine_")]
        assert len(drawn) == 2 and "cosine_0.1250" not in drawn


def test_hyper_trains_on_latents_as_on_their_images(configure, monkeypatch, tmp_path: Path) -> None:
    rates = "bottleneck.rates=[0.0313,0.125]"
    plain = build_stage(configure("bottleneck", rates)).train()
    seen = []
    monkeypatch.setattr(hyper, "check_latents", lambda data, backbone: seen.append((data.latents, backbone)))
    cached = build_stage(configure("bottleneck", rates, f"data.latents={tmp_path}")).train()
    assert seen == [(str(tmp_path), cached.codec.backbone)]
    assert cached.takes_latents and not plain.takes_latents
    with torch.no_grad():
        latents = plain.codec.backbone.encode(images())
    one, other = plain(images(), StepRng(0, 0)), cached(latents, StepRng(0, 0))
    assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in other.items()}
    plain.finish([images()])
    cached.finish([latents])
    for rate in plain.codec.bottleneck.rates:
        assert np.array_equal(plain.codec.bottleneck.frequencies[rate.id], cached.codec.bottleneck.frequencies[rate.id])


@pytest.mark.parametrize("bundled", [False, True])
def test_stage_1_does_without_the_unet(
    configure, make_backbone, tiny_folder: Path, photos: Path, runs, quick_tables, tmp_path: Path, bundled: bool
) -> None:
    """With it, for validation, the result is the same to the bit."""
    make_backbone().save_pretrained(tmp_path / "backbone")
    start = f"init_from={tiny_folder}" if bundled else f"backbone.source={tmp_path / 'backbone'}"
    without = configure("bottleneck", start, f"output={tmp_path / 'without'}")
    validation = ("validation.metrics.names=[psnr]", "validation.limit=1", "validation.rates=[0.0019]")
    validated = configure(
        "bottleneck",
        start,
        f"output={tmp_path / 'with'}",
        f"validation.images={photos}",
        "validation.every=9",
        *validation,
    )
    stage = build_stage(without)
    assert stage.codec.backbone.unet is None and stage.codec.denoiser is None
    assert build_stage(validated).codec.denoiser is not None
    for config in (without, validated):
        assert Trainer(build_stage(config), config).run()
    one, other = runs.result(without), runs.result(validated)
    assert one == other and Path("final/oscar.safetensors") in one
    assert OscarCodec.from_pretrained(tmp_path / "without/final").denoiser is not None


def test_a_unet_that_is_not_there_is_missed_at_the_start(configure, make_backbone, tmp_path: Path) -> None:
    make_backbone().save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone/unet/diffusion_pytorch_model.safetensors").unlink()
    config = configure("bottleneck", f"backbone.source={tmp_path / 'backbone'}")
    with pytest.raises(BackboneError, match="the weights of unet are not there"):
        build_stage(config)


def test_rates_train_together_as_each_alone(configure) -> None:
    """The gradients of a rate are those of a run of its own but for their scale, which Adam does not see."""
    stage = build_stage(configure("bottleneck", "bottleneck.rates=[0.0313,0.125]")).train()
    alone = build_stage(configure("bottleneck", "bottleneck.rates=[0.125]")).train()
    alone.codec.load_state_dict(stage.codec.state_dict(), strict=False)
    for trained in (stage, alone):
        trained(images(), StepRng(0, 0))["loss"].backward()
    for name, parameter in alone.codec.bottleneck.named_parameters():
        gradient = stage.codec.bottleneck.get_parameter(name).grad
        torch.testing.assert_close(2 * gradient, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_joint_logs_by_rate(configure, quick_tables) -> None:
    config = configure(
        "joint", "bottleneck.rates=[0.0313,0.125]", "stage.gan=0", "stage.rate_order=balanced", "trainer.log_every=1"
    )
    Trainer(build_stage(config), config).run()
    with (Path(config.output) / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["loss_0.0313"] == "" for row in rows} == {True, False}  # balanced: each once
    for row in rows:
        mine, other = ("0.0313", "0.1250") if row["loss_0.0313"] else ("0.1250", "0.0313")
        assert row[f"loss_{mine}"] == row["loss"] and row[f"loss_{other}"] == ""
        assert row[f"cosine_{mine}"] == row["cosine"] and row[f"cosine_{other}"] == ""
        assert 1 <= float(row[f"perplexity_{mine}"]) <= 256.01 and row[f"perplexity_{other}"] == ""


def test_the_adversarial_gradient_reaches_the_codec(configure) -> None:
    """Which it does not in the published code, whose critic computes its features without gradient."""
    stage = build_stage(configure("joint")).train()
    stage.critic.requires_grad_(False)
    stage(images(), StepRng(0, 0))["gan"].backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    for part in (".backbone.0.weight", ".project_in.weight", ".project_out.weight", ".proj.0.weight"):
        assert any(part in name and grad.abs().max() > 0 for name, grad in gradients.items()), part
    for adapter in ("encoder", "decoder", "others"):
        assert any(f"lora_B.default_{adapter}" in name and grad.abs().max() > 0 for name, grad in gradients.items())
    assert gradients["codec.denoiser.prompt"].abs().max() > 0
    assert not any("vae" in name for name in gradients)
    assert all(parameter.grad is None for parameter in stage.critic.parameters())


def test_the_critic_trains(configure, quick_tables) -> None:
    config = configure("joint")
    stage = build_stage(config)
    before = snapshot(stage.critic)
    learned = {name for name, parameter in stage.critic.named_parameters() if parameter.requires_grad}
    assert learned and not any(name.startswith("critic") for name, _ in stage.named_parameters())
    Trainer(stage, config).run()
    moved = changed(before, stage.critic)
    assert moved <= learned
    assert any("lora_B" in name for name in moved) and any("head" in name for name in moved)
    real, fake, prompt = stage.critic_inputs()
    assert real.shape == fake.shape == (2, 4, 8, 8) and not fake.requires_grad and not prompt.requires_grad


def test_without_an_adversary(configure, quick_tables) -> None:
    config = configure("joint", "stage.gan=0")
    stage = build_stage(config)
    assert stage.critic is None
    assert "gan" not in stage(images(), StepRng(0, 0))
    assert Trainer(stage, config).run()


@pytest.mark.parametrize("vae", ["decoder", "all"])
def test_joint_may_train_the_vae(configure, make_backbone, quick_tables, tmp_path: Path, vae: str) -> None:
    """Then the checkpoint holds the backbone, although it came from a folder and the UNet has adapters."""
    make_backbone().save_pretrained(tmp_path / "backbone")
    config = configure("joint", f"stage.vae={vae}", f"backbone.source={tmp_path / 'backbone'}", "stage.gan=0")
    stage = build_stage(config)
    before = snapshot(stage.codec.backbone.vae)
    Trainer(stage, config).run()
    parts = {name.split(".")[0] for name in changed(before, stage.codec.backbone.vae)}
    assert parts == {"decoder", "post_quant_conv"} | ({"encoder", "quant_conv"} if vae == "all" else set())
    loaded = OscarCodec.from_pretrained(config.output + "/final")
    for name, value in stage.codec.backbone.vae.state_dict().items():
        assert torch.equal(loaded.backbone.vae.state_dict()[name], value)


def test_joint_with_full_tuning(configure, quick_tables) -> None:
    config = configure("joint", "denoiser.tuning=full", "stage.critic.lora_rank=null")
    stage = build_stage(config)
    before = snapshot(stage)
    Trainer(stage, config).run()
    moved = changed(before, stage)
    assert "codec.backbone.unet.conv_in.weight" in moved and not any("vae" in name for name in moved)
    assert not torch.equal(stage.critic.trunk.conv_in.weight, stage.codec.backbone.unet.conv_in.weight)
    loaded = OscarCodec.from_pretrained(config.output + "/final")
    assert torch.equal(loaded.backbone.unet.conv_in.weight, stage.codec.backbone.unet.conv_in.weight)


def test_joint_starts_from_the_checkpoint_of_hyper(configure, quick_tables) -> None:
    first = configure("bottleneck", "bottleneck.rates=[0.125]", "bottleneck.kmeans_init=true")
    stage = build_stage(first)
    Trainer(stage, first).run()
    with pytest.raises(ConfigError, match=r"^bottleneck.rates has 0\.0019, which init_from lacks; allowed: null, or"):
        build_stage(configure("joint", f"init_from={first.output}/final"))
    configure = partial(configure, "joint", "bottleneck.rates=null")
    second = build_stage(configure(f"init_from={first.output}/final"))
    for name, value in stage.codec.bottleneck.state_dict().items():
        if "cluster_size" not in name and "embed_avg" not in name:
            assert torch.equal(second.codec.bottleneck.state_dict()[name], value), name
    assert second.codec.bottleneck.rates == stage.codec.bottleneck.rates
    assert second.codec.bottleneck.at(RATES[7]).quantizer._codebook.initted  # no second k-means start
    for override, message in (
        ("+stage.rate_weights={0.0625:2}", r"stage.rate_weights: rate 0\.0625 does not exist"),
        ("validation.rates=[0.0625]", r"validation.rates: rate 0\.0625 does not exist; allowed: 0\.1250"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stage(configure(f"init_from={first.output}/final", override))


def test_the_codebooks_training_is_the_runs_own(configure, tiny_folder: Path) -> None:
    """A checkpoint brings its codes, not how they were trained."""
    options = ("bottleneck.dead_code_threshold=0.5", "bottleneck.decay=0.9", "bottleneck.rotation_trick=false")
    stage = build_stage(configure("joint", f"init_from={tiny_folder}", "stage.gan=0", *options)).train()
    for rate in stage.codec.bottleneck.rates:
        quantizer = stage.codec.bottleneck.at(rate).quantizer
        assert (quantizer._codebook.decay, quantizer.rotation_trick) == (0.9, False)
    rate = stage.codec.bottleneck.rates[7]
    before = stage.codec.bottleneck.at(rate).quantizer.codebook.clone()
    for _ in range(20):
        stage.codec.bottleneck(torch.randn(2, 4, 8, 8), rate)
    usage = stage.codec.bottleneck.at(rate).usage()
    assert usage.min() >= 0.5 * 128 / 256 * 0.9**2  # revived when it falls below half of its share
    assert not torch.equal(stage.codec.bottleneck.at(rate).quantizer.codebook, before)


def test_a_rate_is_trained_alone(configure, tiny_folder: Path, quick_tables) -> None:
    """Networks and other rates stay to the bit what they were."""
    weights = {rate.bpp: 0 for rate in RATES[:8] if rate.id != 4}
    config = configure(
        "joint",
        f"init_from={tiny_folder}",
        "stage.gan=0",
        "stage.denoiser=frozen",
        f"+stage.rate_weights={str(weights)}",
        "trainer.ema_decay=0.5",
    )
    stage = build_stage(config)
    before = snapshot(stage)
    Trainer(stage, config).run()
    moved = changed(before, stage)
    assert moved and all(name.startswith("codec.bottleneck.hyper_encoders.4.") for name in moved)


def test_revival_counts_the_uses_of_all_processes(configure, monkeypatch) -> None:
    stage = build_stage(
        configure("bottleneck", "bottleneck.rates=[0.125]", "bottleneck.dead_code_threshold=0.5")
    ).train()
    encoder = stage.codec.bottleneck.at(stage.codec.bottleneck.rates[0])
    stage(images(), StepRng(0, 0))
    alone = encoder.quantizer._codebook.threshold_ema_dead_code
    assert alone == 0.5 * 2 * 64 / 256
    encoder.quantizer._codebook.use_ddp = True
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    stage(images(), StepRng(1, 0))
    assert encoder.quantizer._codebook.threshold_ema_dead_code == 4 * alone


# Losses of bottlenecks.


@pytest.mark.parametrize("name", ["bottleneck", "joint"])
def test_losses_count_by_their_name(configure, name) -> None:
    """Also one that has the name of another option of the stage."""
    stage = build_stage(configure(name, "stage.cosine=3", "stage.commitment=5"))
    losses = {"cosine": torch.tensor(1.0), "commitment": torch.tensor(10.0), "kl": torch.tensor([100.0, 300.0])}
    loss, logged = stage.weigh(Output(images(), losses, {"perplexity": torch.tensor(7.0)}))
    assert loss.item() == 3 + 50 + 200
    assert {name: value.item() for name, value in logged.items()} == {
        "cosine": 1,
        "commitment": 10,
        "kl": 200,
        "perplexity": 7,
    }


# Timestep mappings.


def test_learned_timesteps(configure, quick_tables) -> None:
    config = configure(
        "joint",
        "timesteps=learned",
        "stage.gan=0",
        "optimiser.lr=0.01",
        "optimiser.warmup_steps=0",
        "trainer.ema_decay=0.5",
    )
    stage = build_stage(config)
    assert isinstance(stage.codec.mapping, LearnedMapping)
    metrics = stage.train()(images(), StepRng(0, 0))
    rate = next(rate for rate in stage.codec.bottleneck.rates if f"loss_{rate.bpp:.4f}" in metrics)
    assert metrics["timestep"].item() == pytest.approx(rate.timestep, abs=0.01)
    metrics["loss"].backward()
    gradient = stage.timesteps.offset.grad
    assert gradient[rate.id] != 0 and gradient.count_nonzero() == 1  # one rate per pass
    stage.zero_grad()
    assert Trainer(stage, config).run()
    loaded = OscarCodec.from_pretrained(config.output + "/final").mapping
    assert isinstance(loaded, LearnedMapping)
    moved = {rate.id: abs(loaded(rate) - rate.timestep) for rate in stage.codec.bottleneck.rates}
    assert 1 <= sum(distance > 0.1 for distance in moved.values()) <= 2  # the two steps draw one rate each
    assert all(distance < 10 for distance in moved.values())  # some (T - 1) / 4 * lr a step
    again = build_stage(configure("joint", f"init_from={config.output}/final", "stage.gan=0"))
    for rate in stage.codec.bottleneck.rates:  # training goes on from there
        assert again.timesteps(rate).item() == pytest.approx(loaded(rate), abs=0.01)


def test_learned_timesteps_go_by_id(configure) -> None:
    """Ids beyond the paper's lie between its rates; checkpoints of runs have the offsets by id."""
    stage = build_stage(
        configure(
            "joint",
            "bottleneck.rates=[0.1250,0.0024,0.0019]",
            "stage.gan=0",
            "timesteps=learned",
            "timesteps.timesteps={0:500,7:150,8:480}",
        )
    )
    assert [rate.id for rate in stage.timesteps.rates] == [0, 7, 8]
    with torch.no_grad():
        stage.timesteps.offset[1] = 1
    assert {rate_id: round(value) for rate_id, value in stage.timesteps.to_mapping().timesteps.items()} == {
        0: 500,
        7: 324,
        8: 480,
    }


def test_learned_timesteps_are_resumed(configure, quick_tables, tmp_path: Path) -> None:
    options = ("timesteps=learned", "stage.gan=0", "optimiser.warmup_steps=0", "trainer.checkpoint_every=1")
    whole = configure("joint", *options, f"output={tmp_path / 'whole'}")
    Trainer(build_stage(whole), whole).run()
    part = configure("joint", *options, f"output={tmp_path / 'part'}", "trainer.keep_last=2")
    Trainer(build_stage(part), part).run()
    (tmp_path / "part/checkpoints/step-0000002.pt").unlink()
    Trainer(build_stage(part), part).run()
    first, second = (OscarCodec.from_pretrained(tmp_path / name / "final").mapping for name in ("whole", "part"))
    assert first == second != LearnedMapping(TableMapping.paper().timesteps)


def test_joint_with_timesteps_of_the_images(configure, quick_tables) -> None:
    config = configure("joint", "timesteps=per_image", "stage.gan=0")
    stage = build_stage(config)
    seen = []
    stage.codec.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    stage(images(3), StepRng(0, 0))
    assert seen[0].shape == (3,) and not seen[0].is_floating_point()
    assert Trainer(stage, config).run()
    assert OscarCodec.from_pretrained(config.output + "/final").mapping == PerImageMapping()


def test_init_from_keeps_its_mapping_unless_another_is_named(configure, tiny_folder: Path, tmp_path: Path) -> None:
    calibrated = CalibratedMapping({rate.id: 300 + rate.id for rate in PAPER_RATES}, dict.fromkeys(range(8), 0.5))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"mappings": {"cosine": calibrated.to_config()}}))
    for overrides, mapping in (
        ([], TableMapping.paper()),
        (["timesteps=linear"], RampMapping(500, 150, "linear")),
        (["timesteps=log", "timesteps.first=600"], RampMapping(600, 150, "log")),
        (["timesteps=cosine", f"timesteps.calibration={path}"], calibrated),
    ):
        codec = build_stage(configure("joint", f"init_from={tiny_folder}", "stage.gan=0", *overrides)).codec
        assert codec.mapping == mapping
        assert (codec.fingerprint == OscarCodec.from_pretrained(tiny_folder).fingerprint) == (not overrides)


@pytest.mark.parametrize("mapping", ["linear", "log", "constant", "shuffled", "per_image", "learned", "paper"])
def test_a_new_codec_takes_the_mapping_that_is_named(configure, mapping: str) -> None:
    codec = build_stage(configure("joint", f"timesteps={mapping}", "stage.gan=0")).codec
    assert codec.mapping.kind == ("table" if mapping == "paper" else mapping)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("joint", ["timesteps=cosine"], "timesteps.calibration is unset"),
        ("joint", ["timesteps=snr", "timesteps.calibration=nowhere.json"], "timesteps.calibration is 'nowhere.json'"),
        ("joint", ["timesteps=constant", "timesteps.timestep=1000"], "1000 of rate .* is outside the schedule"),
        ("bottleneck", ["timesteps=linear", "+timesteps.base=3"], "timesteps.base is unknown to kind linear"),
        ("diffusion_pretrain", ["timesteps=linear"], "timesteps is set, but stage diffusion_pretrain has no rates"),
    ],
)
def test_mappings_that_are_refused(configure, stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_stage(configure(stage, *overrides))


def test_the_prompt_from_text_needs_a_source(configure) -> None:
    with pytest.raises(ConfigError, match="denoiser.prompt_init is 'text', but backbone.source is unset"):
        build_stage(configure("joint", "denoiser.prompt_init=text"))


def test_an_unknown_loss_is_refused(configure) -> None:
    with pytest.raises(ValueError, match="image loss 'l3' does not exist; allowed: l1"):
        build_stage(configure("vae", "+stage.image_losses.l3=1"))


def test_equal_seeds_give_equal_stages(configure) -> None:
    one, two, other = (build_stage(configure("joint", f"seed={seed}")) for seed in (0, 0, 1))
    assert not changed(snapshot(one), two)
    assert changed(snapshot(one), other)
    a, b = (stage.train()(images(), StepRng(3, 0)) for stage in (one, two))
    assert {name: value.item() for name, value in a.items()} == {name: value.item() for name, value in b.items()}


def test_all_randomness_follows_from_the_pass() -> None:
    assert torch.equal(*(torch.rand(3, generator=StepRng(5, 1).noise(torch.device("cpu"))) for _ in range(2)))
    draws = {
        (rng.number, rng.seed, rng.rank): torch.rand(1, generator=rng.noise(torch.device("cpu"))).item()
        for rng in (StepRng(5, 1), StepRng(6, 1), StepRng(5, 2), StepRng(5, 1, rank=1))
    }
    assert len(set(draws.values())) == 4


def test_every_process_draws_the_same_rates() -> None:
    weights = [1, 1, 1, 1, 1, 1, 1, 0]
    drawn = [choose_points(StepRng(number, 0), PAPER_RATES, weights, 1)[0] for number in range(300)]
    assert drawn == [choose_points(StepRng(number, 0, rank=3), PAPER_RATES, weights, 1)[0] for number in range(300)]
    assert {rate.id for rate in drawn} == set(range(7))
    assert choose_points(StepRng(0, 0), PAPER_RATES, weights, None) == list(PAPER_RATES[:7])
    assert choose_points(StepRng(0, 0), PAPER_RATES, weights, 8) == list(PAPER_RATES[:7])


@pytest.mark.parametrize("count", [1, 3, 8, None])
def test_balanced_order(count: int | None) -> None:
    weights = [1, 1, 1, 1, 1, 1, 1, 0]

    def chosen(number: int, rank: int = 0) -> list[int]:
        rng = StepRng(number, 0, rank)
        return [rate.id for rate in choose_points(rng, PAPER_RATES, weights, count, "balanced")]

    expected = min(count or 7, 7)
    for first in range(0, 21, 7):  # each time round
        drawn = [chosen(number) for number in range(first, first + 7)]
        assert all(len(set(rates)) == len(rates) == expected for rates in drawn)
        assert Counter(itertools.chain(*drawn)) == dict.fromkeys(range(7), expected)
    numbers = range(28)
    assert [chosen(number, rank=3) for number in numbers] == [chosen(number) for number in numbers]
    if count == 1:  # shuffled anew
        assert len({tuple(chosen(number)[0] for number in range(first, first + 7)) for first in range(0, 28, 7)}) == 4


def test_a_stage_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        Stage()(images(), StepRng(0, 0))
