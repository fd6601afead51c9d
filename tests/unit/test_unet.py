"""The network and its preconditioning: shapes, equivariance, and the limits that hold for any weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffinv.core.checks import ShapeError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.priors.precondition import Autocast, HighDynamicRange, Preconditioned
from diffinv.priors.unet import UNet


def randomised(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """The same module with weights that are nowhere zero: its head and its residual branches start at zero."""
    for number, parameter in enumerate(module.parameters()):
        draw = Rng([number]).normal(torch.zeros(1, *parameter.shape, dtype=parameter.dtype))[0]
        parameter.data.copy_(scale * draw)
    return module.requires_grad_(False)


def small_unet(channels_in: int = 1, channels_out: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomised(UNet(channels_in, channels_out, widths=(8, 16), blocks=(1, 1)).to(dtype))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Rng.for_draws(7, range(shape[0]), 1).normal(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 96), (4, 8)])
def test_any_size_divisible_by_the_stride_keeps_its_shape(size: tuple[int, int]) -> None:
    network = small_unet(3, 2)
    assert network(images(2, 3, *size), torch.zeros(2)).shape == (2, 2, *size)


@pytest.mark.parametrize(("widths", "divisor"), [((8,), 2), ((8, 16), 4), ((8, 8, 16), 8)])
def test_other_sizes_are_an_error_that_names_the_divisor(widths: tuple[int, ...], divisor: int) -> None:
    network = UNet(1, 1, widths=widths, blocks=(1,) * len(widths))
    network(images(1, 1, divisor, 2 * divisor), torch.zeros(1))
    for size in ((divisor, 3 * divisor - 1), (divisor + 1, divisor)):
        with pytest.raises(ShapeError, match=rf"divisible by {divisor}; pad it"):
            network(images(1, 1, *size), torch.zeros(1))


def test_an_untrained_network_is_zero() -> None:
    network = UNet(1, 1, widths=(8, 16), blocks=(1, 1))
    assert bool((network(images(1, 1, 16, 16), torch.zeros(1)) == 0).all())


def test_rows_do_not_mix_and_each_feels_its_own_noise_level() -> None:
    network, x, noise = small_unet(dtype=torch.float64), images(3, 1, 16, 16, dtype=torch.float64), torch.tensor([-1.0, 0, 0.5])
    noise = noise.double()
    whole = network(x, noise)
    torch.testing.assert_close(network(x[1:2], noise[1:2]), whole[1:2], rtol=0, atol=1e-12)
    assert float((network(x[1:2], noise[2:3]) - whole[1:2]).abs().max()) > 1e-3


def shifted_difference(network: nn.Module, shift: int) -> float:
    """max |F(shifted source) − shifted F(source)| for a compact source in the middle of an empty field of 96 pixels."""
    x = torch.zeros(1, 1, 96, 96, dtype=torch.float64)
    x[..., 42:50, 42:50] = 3 * images(1, 1, 8, 8, dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)
    moved = network(x.roll((shift, -shift), (-2, -1)), noise)
    interior = slice(28, 68)
    return float((moved - network(x, noise).roll((shift, -shift), (-2, -1)))[..., interior, interior].abs().max())


def test_a_shift_by_the_stride_shifts_the_answer_and_a_shorter_one_does_not() -> None:
    network = small_unet(dtype=torch.float64)
    assert shifted_difference(network, network.divisor) <= 1e-12
    assert shifted_difference(network, 1) > 1e-3


class Recorder(nn.Module):
    """Keeps what a network is given; its answer is an arbitrary function of it."""

    def __init__(self, channels_out: int) -> None:
        super().__init__()
        self.channels_out = channels_out

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        self.x, self.noise = x, noise
        return (5 * torch.cos(3 * x.sum(1, keepdim=True)) + expand(noise, x).tanh()).expand(-1, self.channels_out, -1, -1)


NETWORKS = {
    "arbitrary": lambda: Recorder(1),
    "unet": lambda: small_unet(),
    "high dynamic range": lambda: HighDynamicRange(small_unet(3, 2), sigma_data=0.7),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_vanishing_noise_gives_the_identity_for_any_network(network: str) -> None:
    denoiser, x = Preconditioned(NETWORKS[network](), sigma_data=0.7), 5 * images(2, 1, 16, 16)
    low = denoiser(x, torch.full((2,), 1e-6))
    torch.testing.assert_close(low, x, rtol=1e-4, atol=1e-4)
    assert float((denoiser(x, torch.ones(2)) - x).abs().max()) > 0.1


@pytest.mark.parametrize("network", NETWORKS)
def test_huge_noise_gives_a_finite_image_of_the_order_of_the_data(network: str) -> None:
    denoiser, sigma = Preconditioned(NETWORKS[network](), sigma_data=0.7), torch.full((2,), 1e6)
    x = 1e6 * images(2, 1, 16, 16)
    denoised = denoiser(x, sigma)
    assert bool(denoised.isfinite().all())
    assert float(denoised.abs().max()) <= 0.7 * 8  # σ_d times the largest output of the networks above


def test_the_network_sees_unit_variance_and_its_target_has_unit_variance() -> None:
    count, sigma_data = 20_000, 0.7
    network = Recorder(1)
    denoiser = Preconditioned(network, sigma_data=sigma_data)
    rng = Rng.for_draws(0, range(3), 1)
    clean, z = (rng.normal(torch.zeros(3, 1, 1, count, dtype=torch.float64)) for _ in range(2))
    sigma = torch.tensor([0.05, 0.7, 20.0], dtype=torch.float64)
    noisy = sigma_data * clean + expand(sigma, z) * z
    output = denoiser(noisy, sigma)
    bound = 4.5 * (2 / count) ** 0.5
    assert float((network.x.var(-1) - 1).abs().max()) <= bound
    # D = c_skip x + c_out F is linear in F, so that the F that gives D = clean is F + (clean − D)/c_out
    c_out = expand(sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt(), z)
    target = network(network.x, network.noise) + (sigma_data * clean - output) / c_out
    assert float((target.var(-1) - 1).abs().max()) <= bound
    torch.testing.assert_close(network.noise, sigma.log() / 4)


def test_high_dynamic_range_recovers_the_noise_level_from_its_coordinate() -> None:
    inner = Recorder(2)
    denoiser = Preconditioned(HighDynamicRange(inner, sigma_data=0.7), sigma_data=0.7)
    x, sigma = 5 * images(3, 1, 8, 8), torch.tensor([0.002, 0.7, 60.0])
    denoiser(x, sigma)
    # float32: ln σ/4 to 6e-8 relative, so 4 |ln σ| 6e-8 in σ, and asinh passes less of it on
    torch.testing.assert_close(inner.x[:, 1:2], torch.asinh(0.7 * x / expand(sigma, x)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inner.x[:, :1], x / expand((sigma**2 + 0.49).sqrt(), x), rtol=1e-5, atol=1e-6)


def test_the_gain_of_high_dynamic_range_expresses_the_identity_at_any_brightness() -> None:
    class Gain(nn.Module):
        def forward(self, x: Tensor, noise: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :1]), torch.full_like(x[:, :1], 2.0)], 1)

    u = torch.tensor([1e-3, 1.0, 1e4]).reshape(1, 1, 1, 3)
    assert torch.equal(HighDynamicRange(Gain(), sigma_data=1.0)(u, torch.zeros(1)), 2 * u)


def test_the_high_pass_feature_ignores_a_constant_and_finds_a_point() -> None:
    inner = Recorder(2)
    u = torch.ones(1, 1, 6, 6)
    HighDynamicRange(inner, sigma_data=1.0)(u, torch.zeros(1))
    assert float(inner.x[:, 2].abs().max()) <= 1e-6
    u[..., 3, 3] = 2
    HighDynamicRange(inner, sigma_data=1.0)(u, torch.zeros(1))
    assert int(inner.x[0, 2].abs().argmax()) == 3 * 6 + 3


class DtypeProbe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = randomised(nn.Conv2d(1, 1, 3, padding=1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen = y.dtype
        return y


def test_autocast_computes_in_low_precision_and_answers_in_the_inputs() -> None:
    probe, x = DtypeProbe(), images(2, 1, 8, 8)
    full = probe(x, torch.zeros(2))
    assert probe.seen == torch.float32
    low = Autocast(probe, torch.bfloat16)(x, torch.zeros(2))
    assert probe.seen == torch.bfloat16
    assert low.dtype == torch.float32
    assert 0 < float((low - full).abs().max()) <= 9 * 2**-8 * float(probe.conv.weight.abs().max() * x.abs().max())
