"""The one-step estimate against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from oscar.diffusion import PREDICTION_TYPES, NoiseSchedule
from oscar.rates import PAPER_RATES

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SQRT_ALPHA_BAR = [0.526, 0.652, 0.757, 0.790, 0.859, 0.877, 0.894, 0.910]  # at the paper's eight timesteps


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PREDICTION_TYPES)
def schedule(request) -> NoiseSchedule:
    return NoiseSchedule({**SD, "prediction_type": request.param})


@pytest.mark.parametrize("timestep", [0, 150, 500, 999])
def test_predict_x0_is_that_of_diffusers(schedule: NoiseSchedule, timestep: int) -> None:
    scheduler = DDPMScheduler(**SD, prediction_type=schedule.prediction_type, clip_sample=False)
    noisy, output = draw(2, 4, 8, 6), draw(2, 4, 8, 6, seed=1)
    expected = scheduler.step(output, timestep, noisy).pred_original_sample
    torch.testing.assert_close(schedule.predict_x0(noisy, output, timestep), expected, rtol=1e-5, atol=1e-5)


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    schedule = NoiseSchedule({**SD, "prediction_type": "v_prediction"})
    scheduler = DDPMScheduler(**SD)
    x0, noise, timestep = draw(3, 4, 8, 6), draw(3, 4, 8, 6, seed=1), torch.tensor([0, 310, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, timestep), scheduler.add_noise(x0, noise, timestep))
    torch.testing.assert_close(schedule.target(x0, noise, timestep), scheduler.get_velocity(x0, noise, timestep))


def test_a_perfect_network_gives_x0_back(schedule: NoiseSchedule) -> None:
    x0, noise, timestep = draw(8, 4, 8, 6), draw(8, 4, 8, 6, seed=1), torch.tensor([r.timestep for r in PAPER_RATES])
    noisy = schedule.add_noise(x0, noise, timestep)
    result = schedule.predict_x0(noisy, schedule.target(x0, noise, timestep), timestep)
    torch.testing.assert_close(result, x0, rtol=1e-5, atol=1e-5)


def test_one_timestep_serves_a_batch(schedule: NoiseSchedule) -> None:
    noisy, output = draw(2, 4, 8, 6), draw(2, 4, 8, 6, seed=1)
    single = schedule.predict_x0(noisy, output, 150)
    assert torch.equal(single, schedule.predict_x0(noisy, output, torch.tensor(150)))
    assert torch.equal(single, schedule.predict_x0(noisy, output, torch.tensor([150, 150])))


def test_signal_at_the_paper_timesteps() -> None:
    schedule = NoiseSchedule(SD)
    for rate, expected in zip(PAPER_RATES, SQRT_ALPHA_BAR, strict=True):
        signal, sigma = schedule.signal_and_noise(rate.timestep, draw(1))
        assert signal.item() == pytest.approx(expected, abs=5e-4)
        assert signal.item() ** 2 + sigma.item() ** 2 == pytest.approx(1)


def test_between_timesteps_the_signal_is_a_straight_line() -> None:
    schedule = NoiseSchedule(SD)
    signal = schedule.alphas_cumprod.sqrt()
    for timestep in (0.0, 150.25, 498.5, 998.75, 999.0):
        below = min(int(timestep), 998)
        expected = (below + 1 - timestep) * signal[below] + (timestep - below) * signal[below + 1]
        torch.testing.assert_close(schedule.alpha_bar(timestep).sqrt(), expected)
    whole = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha_bar(whole.float()), schedule.alpha_bar(whole), rtol=1e-6, atol=0)
    before, between, after = (alpha / (1 - alpha) for alpha in map(schedule.alpha_bar, (150, 150.5, 151)))  # SNR
    assert between.item() == pytest.approx((before * after).sqrt().item(), rel=1e-4)


def test_a_fractional_timestep_gets_the_gradient_of_the_estimate(schedule: NoiseSchedule) -> None:
    noisy, output = draw(1, 4, 8, 6), draw(1, 4, 8, 6, seed=1)
    timestep = torch.tensor(310.5, requires_grad=True)
    value = schedule.predict_x0(noisy, output, timestep).square().mean()
    if schedule.prediction_type == "sample":
        assert not value.requires_grad  # the estimate is the network's output, whatever t
        return
    (gradient,) = torch.autograd.grad(value, timestep)
    low, high = (schedule.predict_x0(noisy, output, t).square().mean() for t in (310, 311))
    assert gradient.item() == pytest.approx((high - low).item(), rel=0.02) and gradient.item() != 0


def test_the_timestep_of_a_signal() -> None:
    schedule = NoiseSchedule(SD)
    whole = torch.tensor([[0, 150], [500, 999]])
    assert torch.equal(schedule.timestep_of_signal(schedule.alpha_bar(whole).sqrt()), whole)
    assert schedule.timestep_of_signal(torch.tensor([1.0, -0.5])).tolist() == [0, 999]
    between = (schedule.alpha_bar(280).sqrt() * 0.6 + schedule.alpha_bar(281).sqrt() * 0.4).double()
    assert schedule.timestep_of_signal(between).item() == 280


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_schedule_stays_in_float32(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule(SD)
    before = schedule.alphas_cumprod.clone()
    module = torch.nn.ModuleList([schedule, torch.nn.Linear(1, 1)]).to(dtype)
    assert module[1].weight.dtype == dtype
    assert schedule.alphas_cumprod.dtype == torch.float32 and torch.equal(schedule.alphas_cumprod, before)
    assert schedule.to("meta").alphas_cumprod.device.type == "meta"  # but it follows the device


def test_timesteps_in_half_precision_are_understood(schedule: NoiseSchedule) -> None:
    steps = torch.tensor([0.5, 100.25])
    halved = steps.to(torch.bfloat16)
    assert schedule.alpha_bar(halved).dtype == torch.float32
    assert torch.equal(schedule.alpha_bar(halved), schedule.alpha_bar(halved.float()))


def test_results_have_the_type_of_the_latent(schedule: NoiseSchedule) -> None:
    noisy = draw(2, 4, 8, 6).half()
    assert schedule.predict_x0(noisy, noisy, 150).dtype == torch.float16
    assert schedule.add_noise(noisy, noisy, 150).dtype == torch.float16


def test_unused_options_and_defaults() -> None:
    schedule = NoiseSchedule({**SD, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": True})
    assert schedule.prediction_type == "epsilon"  # diffusers' default
    assert len(schedule) == 1000
    assert NoiseSchedule(schedule.config).config == schedule.config


def test_unknown_prediction_type() -> None:
    with pytest.raises(ValueError, match="prediction_type 'flow' is not supported; allowed: epsilon, v_pred"):
        NoiseSchedule({**SD, "prediction_type": "flow"})
