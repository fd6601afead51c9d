"""diffusers' networks behind our interface: closed forms for a Gaussian prior, files, and refusals."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.priors.hub import (
    PREDICTIONS,
    WEIGHTS,
    TimestepNetwork,
    VariancePreserving,
    denoiser_from_unet2d,
    load_diffusers,
)

VARIANCE, MEAN = 0.7, 0.3
CONFIG = {
    "sample_size": 16,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
SCHEDULERS = {
    "linear": DDPMScheduler(),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero terminal signal": DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
}


@dataclass
class Output:
    sample: Tensor


class GaussianModel(nn.Module):
    """The exact network of pixels N(MEAN, VARIANCE): reads ᾱ from its own table at a fractional timestep, log σ-linearly."""

    def __init__(self, betas: Tensor, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.log_sigmas = [math.log(math.sqrt(math.expm1(-v))) for v in torch.log1p(-betas.double()).cumsum(0).tolist()[:-1]]

    def sigma(self, timestep: float) -> float:
        below = min(int(timestep), len(self.log_sigmas) - 2)
        low, high = self.log_sigmas[below : below + 2]
        return math.exp(low + (timestep - below) * (high - low))

    def forward(self, x_t: Tensor, timestep: Tensor) -> Output:
        sigma = torch.tensor([self.sigma(float(t)) for t in timestep], dtype=x_t.dtype)
        signal, noise = expand(1 / (1 + sigma**2).sqrt(), x_t), expand(sigma / (1 + sigma**2).sqrt(), x_t)
        mean = MEAN + VARIANCE * signal / (signal**2 * VARIANCE + noise**2) * (x_t - signal * MEAN)
        epsilon = (x_t - signal * mean) / noise
        return Output({"epsilon": epsilon, "v_prediction": signal * epsilon - noise * mean, "sample": mean}[self.kind])


def closed_form(x: Tensor, sigma: Tensor) -> Tensor:
    return MEAN + VARIANCE / (VARIANCE + expand(sigma, x) ** 2) * (x - MEAN)


def images(batch: int = 5) -> Tensor:
    return 3 * Rng.for_draws(0, range(batch), 1).normal(torch.zeros(batch, 2, 4, 4, dtype=torch.float64))


def exact(betas: Tensor, kind: str, prediction: str | None = None) -> VariancePreserving:
    return VariancePreserving(
        TimestepNetwork(GaussianModel(betas, kind)), betas=betas, prediction=PREDICTIONS[prediction or kind]
    )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_prediction_gives_the_closed_form_of_a_gaussian(kind: str, scheduler: str) -> None:
    betas, x = SCHEDULERS[scheduler].betas, images()
    sigma = torch.tensor([0.0421, 0.1, 0.77, 3.3, 41.0], dtype=torch.float64)
    # ε loses σ/(posterior spread) digits to cancellation: 41 × float64's eps, with room
    torch.testing.assert_close(exact(betas, kind)(x, sigma), closed_form(x, sigma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "wrong"), [("epsilon", "v_prediction"), ("v_prediction", "sample"), ("sample", "epsilon")])
def test_a_wrong_prediction_type_misses_the_closed_form(kind: str, wrong: str) -> None:
    x, sigma = images(), torch.full((5,), 0.77, dtype=torch.float64)
    denoised = exact(SCHEDULERS["linear"].betas, kind, wrong)(x, sigma)
    assert float((denoised - closed_form(x, sigma)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_our_mean_is_the_one_of_diffusers_own_step(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    x_t, output = images(2).chunk(2)
    denoiser = VariancePreserving(nn.Identity(), betas=scheduler.betas, prediction=PREDICTIONS[kind])
    denoiser.network = _Fixed(output)
    for t in (3, 500, 998):
        abar = scheduler.alphas_cumprod[t].double()
        theirs = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
        ours = denoiser(x_t / abar.sqrt(), ((1 - abar) / abar).sqrt()[None])
        # diffusers keeps ᾱ in float32: the error of 1 − ᾱ relative to σ² is eps/(1 − ᾱ)
        torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=1e-3)


class _Fixed(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.output


def test_timesteps_are_exact_on_the_grid_and_halfway_in_log_sigma() -> None:
    denoiser = exact(SCHEDULERS["linear"].betas, "epsilon")
    logs = denoiser.log_sigmas
    expected = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(denoiser.timestep(logs.exp()), expected, rtol=0, atol=1e-8)
    middle = ((logs[1:] + logs[:-1]) / 2).exp()
    torch.testing.assert_close(denoiser.timestep(middle), expected[:-1] + 0.5, rtol=0, atol=1e-8)


def random_unet(seed: int = 0) -> UNet2DModel:
    model, generator = UNet2DModel(**CONFIG), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_vanishing_noise_gives_the_identity_for_any_network(kind: str) -> None:
    network = TimestepNetwork(random_unet())
    denoiser = VariancePreserving(network, betas=SCHEDULERS["linear"].betas, prediction=PREDICTIONS[kind])
    x = 5 * Rng.for_draws(0, [0, 1], 1).normal(torch.zeros(2, 2, 16, 16))
    with torch.no_grad():
        moves = [float((denoiser(x, torch.full((2,), sigma)) - x).abs().max()) for sigma in (0.0, 1e-5, 1.0)]
    assert moves[0] == 0
    assert moves[1] <= 1e-4
    assert moves[2] > 0.1


def test_below_the_trained_levels_the_closed_form_is_kept_to_second_order() -> None:
    denoiser = exact(SCHEDULERS["linear"].betas, "epsilon")
    x, sigma = images(), torch.full((5,), 0.4, dtype=torch.float64) * denoiser.sigma_min
    error = (denoiser(x, sigma) - closed_form(x, sigma)).abs().max()
    # the score changes by (σ₀² − σ²)/variance of itself, and moves D by σ² score
    assert float(error) <= float(sigma[0] ** 2 * denoiser.sigma_min**2 / VARIANCE**2 * (x - MEAN).abs().max())


def test_noise_above_the_trained_levels_is_an_error_that_names_the_limit() -> None:
    denoiser = exact(SCHEDULERS["linear"].betas, "epsilon")
    denoiser(images(), torch.full((5,), denoiser.sigma_max))
    with pytest.raises(DiffinvError, match=r"sigma 200 is above the largest trained level 157"):
        denoiser(images(), torch.tensor([1.0, 1, 1, 1, 200]))


def test_zero_terminal_signal_leaves_a_finite_range() -> None:
    denoiser = exact(SCHEDULERS["zero terminal signal"].betas, "v_prediction")
    assert len(denoiser.log_sigmas) == 999
    assert math.isfinite(denoiser.sigma_max)


def save_model(folder: Path, kind: str = "epsilon", *, pipeline: bool = True) -> UNet2DModel:
    model = random_unet()
    model.save_pretrained(folder / "unet" if pipeline else folder)
    DDPMScheduler(prediction_type=kind).save_pretrained(folder / "scheduler" if pipeline else folder)
    return model


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_saved_model_loads_with_its_prediction_and_without_a_network(
    tmp_path: Path, pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path, "v_prediction", pipeline=pipeline)

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    denoiser = load_diffusers(tmp_path)
    assert not any(p.requires_grad for p in denoiser.parameters())
    x = Rng.for_draws(3, [0, 1], 1).normal(torch.zeros(2, 2, 16, 16))
    abar = DDPMScheduler().alphas_cumprod[400]
    with torch.no_grad():
        v = model(abar.sqrt() * x, 400).sample
    expected = abar * x - (1 - abar).sqrt() * v
    sigma = ((1 - abar) / abar).sqrt().expand(2)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.func.vjp(lambda image: denoiser(image, sigma), x)[1](torch.ones_like(x))[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def _pickled(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _drop(path: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, metadata={"format": "pt"})


def _edm_scheduler(folder: Path) -> None:
    EDMEulerScheduler().save_pretrained(folder / "scheduler")


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), "no weights"),
    "pickled": (_pickled, "pickled weights"),
    "truncated": (lambda f: _truncate(f / "unet" / WEIGHTS), "cannot be loaded"),
    "another shape": (lambda f: _edit(f / "unet" / "config.json", block_out_channels=[8, 32]), "cannot be loaded"),
    "a weight is missing": (
        lambda f: _drop(f / "unet" / WEIGHTS, "conv_in.bias"),
        "1 weights do not fit config.json, conv_in.bias",
    ),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), "no such file"),
    "config is no JSON": (lambda f: (f / "unet" / "config.json").write_text("<html>"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "unet" / "config.json").write_text("[]"), "holds a list"),
    "conditional model": (lambda f: _edit(f / "unet" / "config.json", _class_name="UNet2DConditionModel"), "unconditional"),
    "no scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "no such file"),
    "not variance preserving": (_edm_scheduler, "no beta_schedule"),
    "unknown prediction": (
        lambda f: _edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'",
    ),
    "unknown schedule": (lambda f: _edit(f / "scheduler" / "scheduler_config.json", beta_schedule="x"), "no noise levels"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line_that_names_the_file(tmp_path: Path, defect: str) -> None:
    save_model(tmp_path)
    spoil, reason = DEFECTS[defect]
    spoil(tmp_path)
    with pytest.raises(InputError) as error:
        load_diffusers(tmp_path)
    text = str(error.value)
    assert reason in text and str(tmp_path) in text and "\n" not in text


def test_weights_that_the_configuration_does_not_know_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    model.register_module("stray", nn.Linear(2, 2))
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match=r"2 weights do not fit config.json, stray"):
        load_diffusers(tmp_path)


def test_a_preconditioned_unet_is_a_denoiser_that_feels_the_noise_level() -> None:
    denoiser = denoiser_from_unet2d(CONFIG, sigma_data=0.5)
    denoiser.network.model = random_unet()
    x = Rng.for_draws(0, [0, 1], 1).normal(torch.zeros(2, 2, 16, 16))
    assert torch.equal(denoiser(x, torch.full((2,), 1e-12)), x)
    outputs = denoiser.network(x, torch.tensor([-0.5, 0.5])), denoiser.network(x, torch.tensor([-0.5, 0.52]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.allclose(outputs[0][1], outputs[1][1], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm_num_group": 4}, "did you mean norm_num_groups"),
        ({"norm_num_groups": 3}, "divisible"),
        ({"out_channels": 4}, "in_channels and out_channels"),
        ({"down_block_types": ("DownBlock2D", "Nothing")}, "does not exist"),
    ],
)
def test_an_impossible_configuration_is_one_line(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        denoiser_from_unet2d({**CONFIG, **change}, sigma_data=0.5)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"time_embedding_type": "fourier"}, {"num_class_embeds": 3}, {"time_embedding_type": "learned"}]
)
def test_a_network_that_needs_more_than_an_image_and_a_level_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DiffinvError) as error:
        denoiser_from_unet2d({**CONFIG, "num_train_timesteps": 10, **change}, sigma_data=0.5)
    assert "\n" not in str(error.value)
