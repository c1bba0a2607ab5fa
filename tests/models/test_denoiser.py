from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from oscar.models.backbone import Backbone
from oscar.models.denoiser import ADAPTERS, Denoiser, lora_targets, predict

LISTS = ("unet_lora_encoder_modules", "unet_lora_decoder_modules", "unet_lora_others_modules")


@pytest.fixture
def backbone(make_backbone) -> Backbone:
    return make_backbone()


def denoiser(backbone: Backbone, **options) -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(backbone.unet, backbone.schedule, **{"lora_rank": 2, "prompt_tokens": 4, **options})


def disturb(module: Denoiser) -> Denoiser:
    """Give every adapter an effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return module


def latent(height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_layers_of_the_published_checkpoint(golden, sd21) -> None:
    manifest = json.loads((golden / "official_manifest.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((sd21 / "unet/config.json").read_text()))
    targets = lora_targets(unet)
    assert targets == {adapter: manifest[key] for adapter, key in zip(ADAPTERS, LISTS, strict=True)}
    assert [len(targets[adapter]) for adapter in ADAPTERS] == [94, 148, 16]


def test_layers_of_the_tiny_checkpoint(golden) -> None:
    modules = json.loads((golden / "tiny_manifest.json").read_text())["modules"]
    with torch.device("meta"):
        config = json.loads((golden / "sd_tiny/unet/config.json").read_text())
        targets = lora_targets(UNet2DConditionModel.from_config(config))
    assert {adapter: sorted(names) for adapter, names in targets.items()} == {
        adapter: sorted(modules[key]) for adapter, key in zip(ADAPTERS, LISTS, strict=True)
    }


def test_each_layer_has_one_adapter(backbone: Backbone) -> None:
    targets = lora_targets(backbone.unet)
    names = [name for group in targets.values() for name in group]
    assert len(names) == len(set(names)) and not any("time_emb" in name for name in names)
    denoiser(backbone)
    for adapter, group in targets.items():
        for name in group:
            layer = backbone.unet.get_submodule(name)
            assert list(layer.lora_A) == [adapter]
            assert layer.scaling[adapter] == 8 / 2


@torch.no_grad()
def test_adapters_start_without_effect(backbone: Backbone) -> None:
    plain = copy.deepcopy(backbone.unet)
    adapted = denoiser(backbone)
    expected = predict(plain, latent(), 150, adapted.prompt)
    torch.testing.assert_close(predict(adapted.unet, latent(), 150, adapted.prompt), expected)


@torch.no_grad()
def test_every_adapter_has_an_effect(backbone: Backbone) -> None:
    adapted = disturb(denoiser(backbone))
    whole = adapted(latent(), 150)
    for adapter in ADAPTERS:
        one_less = copy.deepcopy(adapted)
        for name, parameter in one_less.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.zero_()
        assert (one_less(latent(), 150) - whole).abs().max() > 1e-4, adapter


def test_only_adapters_and_prompt_are_trained(backbone: Backbone) -> None:
    adapted = denoiser(backbone)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name or name == "prompt"}
    adapted(latent(), 150).square().mean().backward()
    assert adapted.prompt.grad.abs().max() > 0
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if "lora_B" in name and "attn2.to_q" not in name and "attn2.to_k" not in name:
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_merging_changes_nothing(backbone: Backbone) -> None:
    adapted = disturb(denoiser(backbone))
    before = [adapted(latent(), timestep) for timestep in (150, 500)]
    adapted.merge()
    adapted.merge()  # a second time does nothing
    assert adapted.merged and not any("lora" in name or "base_layer" in name for name in adapted.state_dict())
    for timestep, expected in zip((150, 500), before, strict=True):
        assert (adapted(latent(), timestep) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (8, 9)])
@torch.no_grad()
def test_any_size(backbone: Backbone, shape: tuple[int, int]) -> None:
    result = denoiser(backbone)(latent(*shape), 150)
    assert result.shape == (2, 4, *shape) and torch.isfinite(result).all()


@torch.no_grad()
def test_padding_is_seen_only_at_odd_sizes(backbone: Backbone) -> None:
    adapted = denoiser(backbone)
    output = adapted.unet(latent(), torch.tensor([150, 150]), adapted.prompt.expand(2, -1, -1)).sample
    assert torch.equal(predict(adapted.unet, latent(), 150, adapted.prompt), output)


@torch.no_grad()
def test_the_timestep_matters_and_may_differ_within_a_batch(backbone: Backbone) -> None:
    adapted = denoiser(backbone)
    mixed = adapted(latent(), torch.tensor([150, 500]))
    for position, timestep in enumerate((150, 500)):
        single = adapted(latent()[position : position + 1], timestep)
        torch.testing.assert_close(mixed[position : position + 1], single, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, adapted(latent(), 150))


def test_full_tuning(backbone: Backbone) -> None:
    tuned = denoiser(backbone, tuning="full")
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    assert tuned.merged and not any("lora" in name for name in tuned.state_dict())
    before = tuned(latent(), 150)
    tuned.merge()
    assert torch.equal(tuned(latent(), 150), before)


def test_unknown_tuning(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="denoiser.tuning 'lorra' does not exist; allowed: lora, full"):
        denoiser(backbone, tuning="lorra")


@torch.no_grad()
def test_a_unet_without_attention_has_no_prompt() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        cross_attention_dim=8,
    )
    from oscar.diffusion import NoiseSchedule

    plain = Denoiser(unet, NoiseSchedule({}), lora_rank=2)
    assert plain.prompt is None and plain(latent(5, 7), 150).shape == (2, 4, 5, 7)
    with pytest.raises(ValueError, match="this UNet has no cross-attention and so no prompt"):
        plain.init_prompt_from_text("anything")


def test_the_prompt_starts_from_noise(backbone: Backbone) -> None:
    prompt = denoiser(backbone, prompt_tokens=77).prompt
    assert prompt.shape == (1, 77, 8) and 0.015 < prompt.std() < 0.025


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A random text encoder of width 8 and a tokenizer of four letters, laid out as in Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokens = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path / "sd"
    (folder / "tokenizer").mkdir(parents=True)
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=4,
        eos_token_id=5,
        pad_token_id=5,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_the_prompt_may_start_from_an_empty_text(backbone: Backbone, text_folder: Path) -> None:
    from transformers import CLIPTextModel

    adapted = denoiser(backbone, prompt_tokens=77)
    adapted.init_prompt_from_text(text_folder)
    encoder = CLIPTextModel.from_pretrained(text_folder, subfolder="text_encoder")
    with torch.no_grad():
        expected = encoder(torch.tensor([[4] + [5] * 76])).last_hidden_state
    torch.testing.assert_close(adapted.prompt.data, expected)
    assert adapted.prompt.requires_grad


def test_a_text_encoder_of_another_width_is_refused(make_backbone, text_folder: Path) -> None:
    backbone = make_backbone()
    unet = UNet2DConditionModel.from_config({**backbone.unet.config, "cross_attention_dim": 12})
    with pytest.raises(ValueError, match=r"gives \(1, 77, 8\); allowed: \(1, 77, 12\)"):
        Denoiser(unet, backbone.schedule, lora_rank=2).init_prompt_from_text(text_folder)


def test_a_folder_without_text_encoder_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="denoiser.prompt_init: .* could not be read") as error:
        denoiser(backbone).init_prompt_from_text(tmp_path)
    message = str(error.value)
    assert "\n" not in message and message.endswith("as backbone.source=FOLDER, or denoiser.prompt_init=noise")
