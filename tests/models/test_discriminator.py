import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from oscar.models.discriminator import LatentDiscriminator
from oscar.training.losses import critic_loss, generator_loss

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


def small_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes})


PLAIN = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
}
KINDS = {
    "cross attention": {},
    "plain": PLAIN,
    "self attention": {**PLAIN, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")},
    "no middle": {**PLAIN, "mid_block_type": None},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("lora_rank", [2, None])
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_gradient_reaches_the_latent(kind: str, lora_rank: int | None) -> None:
    critic = LatentDiscriminator(small_unet(**KINDS[kind]), ALPHAS, lora_rank)
    latent = torch.randn(2, 4, 8, 8, generator=seeded(1), requires_grad=True)
    prompt = torch.randn(1, 3, 24, generator=seeded(2), requires_grad=True) if kind == "cross attention" else None
    logits = critic(latent, prompt, seeded())
    assert logits.shape == (2, 1, 4, 4)
    generator_loss(logits).backward()
    assert latent.grad.abs().flatten(1).max(dim=1).values.min() > 0
    assert prompt is None or prompt.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_those_inside_the_unet(kind: str) -> None:
    unet = small_unet(**KINDS[kind]).eval()
    critic = LatentDiscriminator(unet, ALPHAS, lora_rank=2).eval()  # fresh LoRA changes nothing
    latent, prompt = torch.randn(2, 4, 8, 8, generator=seeded(1)), torch.randn(2, 3, 24, generator=seeded(2))
    timestep = torch.tensor([30, 700])
    seen = []
    last = unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        unet(latent, timestep, encoder_hidden_states=prompt)
        features = critic.trunk(latent, timestep, prompt)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("lora_rank", [2, None])
def test_what_is_trained(lora_rank: int | None) -> None:
    unet = small_unet()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    critic = LatentDiscriminator(unet, ALPHAS, lora_rank)
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    trunk = {name for name in trained if name.startswith("trunk.")}
    assert trained - trunk == {f"head.{name}" for name, _ in critic.head.named_parameters()}
    if lora_rank is None:
        assert trunk == {f"trunk.{name}" for name, _ in critic.trunk.named_parameters()}
    else:
        assert trunk and all(".lora_" in name for name in trunk)

    optimiser = torch.optim.SGD(critic.parameters(), lr=0.1)
    real, fake = torch.randn(2, 2, 4, 8, 8, generator=seeded(1))
    prompt = torch.zeros(1, 3, 24)
    critic_loss(critic(real, prompt, seeded()), critic(fake, prompt, seeded())).backward()
    optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items()), "the backbone is a copy"


def test_learns_to_tell_two_kinds_of_latents_apart() -> None:
    torch.manual_seed(0)
    critic = LatentDiscriminator(small_unet(**PLAIN), ALPHAS, lora_rank=4)
    optimiser = torch.optim.Adam(critic.parameters(), lr=3e-3)
    source, losses = seeded(), []
    for _ in range(25):
        real, fake = torch.randn(8, 4, 8, 8, generator=source), 1 + torch.randn(8, 4, 8, 8, generator=source)
        loss = critic_loss(critic(real, generator=source), critic(fake, generator=source))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_lora_lies_where_the_published_denoiser_has_it(golden) -> None:
    config = json.loads((golden / "sd_tiny/unet/config.json").read_text())
    keys = json.loads((golden / "tiny_manifest.json").read_text())["state_dict_unet"]
    expected = {key.split(".lora_A.")[0] for key in keys if ".lora_A." in key}
    expected = {name for name in expected if name.startswith(("conv_in", "down_blocks", "mid_block"))}
    critic = LatentDiscriminator(UNet2DConditionModel.from_config(config), ALPHAS, lora_rank=2)
    found = {name.split(".lora_A.")[0] for name, _ in critic.trunk.named_parameters() if ".lora_A." in name}
    assert found == expected
    logits = critic(torch.randn(1, 4, 16, 24), torch.randn(1, 77, 1024), seeded())
    assert logits.shape == (1, 1, 8, 12)


def test_renoising_follows_the_schedule() -> None:
    critic = LatentDiscriminator(small_unet(**PLAIN), ALPHAS, lora_rank=None)
    latent = torch.full((4000, 1, 1, 1), 3.0)
    noisy, timestep = critic.renoise(latent, seeded())
    assert 20 <= timestep.min() < 30 and 970 < timestep.max() < 980
    alpha = ALPHAS[timestep].view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * latent) / (1 - alpha).sqrt()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    again, _ = critic.renoise(latent, seeded())
    assert torch.equal(noisy, again)


@pytest.mark.parametrize(("steps", "first", "end"), [(1000, 20, 980), (100, 2, 98), (1, 0, 1)])
def test_timesteps_scale_with_the_schedule(steps: int, first: int, end: int) -> None:
    critic = LatentDiscriminator(small_unet(**PLAIN), torch.full((steps,), 0.5), lora_rank=None)
    assert (critic.first, critic.end) == (first, end)
    assert "alphas_cumprod" not in critic.state_dict()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="prompt must be given"):
        LatentDiscriminator(small_unet(), ALPHAS, 2)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="lora_rank = 0"):
        LatentDiscriminator(small_unet(**PLAIN), ALPHAS, 0)
    with pytest.raises(ValueError, match="num_class_embeds = 3"):
        LatentDiscriminator(small_unet(num_class_embeds=3), ALPHAS, 2)
    with pytest.raises(ValueError, match=r"timesteps = \(980, 20\)"):
        LatentDiscriminator(small_unet(**PLAIN), ALPHAS, 2, timesteps=(980, 20))
    with_lora = small_unet(**PLAIN)
    with_lora.down_blocks[0] = LatentDiscriminator(with_lora, ALPHAS, 2).trunk.down_blocks[0]
    with pytest.raises(ValueError, match="without LoRA"):
        LatentDiscriminator(with_lora, ALPHAS, 2)
