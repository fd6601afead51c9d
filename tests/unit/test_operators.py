"""Operators against independent implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, UnsupportedError
from diffinv.operators.adapters import FromScipy
from diffinv.operators.algebra import BlockDiagonal, Compose, Stack
from diffinv.operators.border import Border, ReflectingBorder, ZeroBorder
from diffinv.operators.canvas import fast_length
from diffinv.operators.convolution import Convolution, PeriodicConvolution, VaryingConvolution
from diffinv.operators.detector import Arcsinh, Saturation
from diffinv.operators.fourier import MaskedFourier, Visibilities
from diffinv.operators.geometry import Affine, Dilation, Rotation, SeparableResample, Shift, resample
from diffinv.operators.interpolation import Cubic, KaiserSinc, Lanczos, Linear
from diffinv.operators.pooled import PooledConvolution
from diffinv.operators.sampling import Crop, Mask, Mosaic, Pad, SumPool
from diffinv.operators.tomography import Radon
from tests.cases.operators import FILTERS, draw, positive

F64 = torch.float64


def gaussian(size: tuple[int, int], centre: tuple[float, float], sigma: float) -> Tensor:
    """A unit-flux Gaussian sampled at pixel centres, (1, 1, H, W)."""
    axes = [torch.exp(-((torch.arange(n, dtype=F64) - c) ** 2) / (2 * sigma**2)) for n, c in zip(size, centre, strict=True)]
    return (axes[0][:, None] * axes[1] / (2 * math.pi * sigma**2))[None, None]


def reference_convolution(x: Tensor, kernel: Tensor, margin: int, mode: str) -> Tensor:
    """SciPy on an image padded by NumPy, per image and channel, cut at the kernel's centre pixel."""
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode=mode)
    top, left = margin + kernel.shape[-2] // 2, margin + kernel.shape[-1] // 2
    full = np.stack([[fftconvolve(c, kernel[b, 0].numpy()) for c in image] for b, image in enumerate(padded)])
    return torch.from_numpy(full[..., top : top + x.shape[-2], left : left + x.shape[-1]].copy())


@pytest.mark.parametrize("kernel_size", [(3, 3), (4, 5), (7, 8), (21, 30), (40, 3), (1, 1)])
@pytest.mark.parametrize(("border", "mode"), [(ZeroBorder(), "constant"), (ReflectingBorder(), "symmetric")])
def test_convolution_equals_scipy(kernel_size, border, mode):
    kernel, x = positive(2, 1, *kernel_size), draw(2, 2, 9, 14)
    expected = reference_convolution(x, kernel, max(kernel_size), mode)
    result = Convolution(kernel, 2, (9, 14), border)(x)
    assert float((result - expected).abs().max()) < 1e-13 * float(kernel.sum())


def test_convolution_of_a_point_is_the_kernel_around_it():
    kernel, x = draw(1, 1, 4, 5), torch.zeros(1, 1, 12, 12, dtype=F64)
    x[0, 0, 6, 7] = 1
    y = Convolution(kernel, 1, (12, 12), ZeroBorder())(x)
    assert torch.allclose(y[0, 0, 4:8, 5:10], kernel[0, 0], atol=1e-14)


def test_zero_border_never_wraps():
    x = torch.zeros(1, 1, 16, 16, dtype=F64)
    x[..., 0, 0] = 1
    y = Convolution(torch.ones(1, 1, 15, 15, dtype=F64), 1, (16, 16), ZeroBorder())(x)
    assert float(y[..., 8:, :].abs().max()) < 1e-14 and float(y[..., :, 8:].abs().max()) < 1e-14
    periodic = PeriodicConvolution(torch.ones(1, 1, 15, 15, dtype=F64), 1, (16, 16))(x)
    assert float(periodic[..., 9:, 9:].min()) > 0.9


def test_reflecting_border_keeps_a_constant_and_the_flux_of_a_symmetric_kernel():
    kernel = gaussian((9, 9), (4, 4), 1.5)
    kernel = kernel / kernel.sum()
    operator = Convolution(kernel, 1, (11, 12), ReflectingBorder())
    assert torch.allclose(operator(torch.ones(1, 1, 11, 12, dtype=F64)), torch.ones(1, 1, 11, 12, dtype=F64), atol=1e-13)
    x = positive(1, 1, 11, 12)
    assert float(operator(x).sum()) == pytest.approx(float(x.sum()), rel=1e-13)


def test_convolution_sees_a_kernel_changed_by_an_optimiser():
    kernel = positive(1, 1, 3, 3).requires_grad_(True)
    operator = Convolution(kernel, 1, (8, 8), ZeroBorder())
    x = draw(1, 1, 8, 8)
    before = operator(x).detach()
    with torch.no_grad():
        kernel.mul_(2)
    assert torch.allclose(operator(x).detach(), 2 * before, atol=1e-13)


@pytest.mark.parametrize("kind", ["zero", "periodic", "varying"])
def test_forward_and_reverse_derivatives_by_the_kernel_agree(kind):
    kernel, direction, x, weight = positive(1, 1, 3, 3), draw(1, 1, 3, 3), draw(1, 1, 8, 8), draw(1, 1, 8, 8, seed=1)
    ones = torch.ones(1, 1, 8, 8, dtype=F64)
    make = {
        "zero": lambda k: Convolution(k, 1, (8, 8), ZeroBorder()),
        "periodic": lambda k: PeriodicConvolution(k, 1, (8, 8)),
        "varying": lambda k: VaryingConvolution(k[:, None], ones, 1, ZeroBorder()),
    }[kind]
    expected = (make(direction)(x) * weight).sum()
    forward = torch.func.jvp(lambda k: (make(k)(x) * weight).sum(), (kernel,), (direction,))[1]
    reverse = (torch.func.grad(lambda k: (make(k)(x) * weight).sum())(kernel) * direction).sum()
    assert torch.allclose(forward, expected, atol=1e-12) and torch.allclose(reverse, expected, atol=1e-12)


def test_fast_length_is_even_smooth_and_minimal():
    assert [fast_length(n) for n in (1, 11, 83, 84, 121, 127)] == [2, 12, 84, 84, 126, 128]


def test_varying_convolution_with_one_kernel_is_a_convolution():
    kernel, x = positive(2, 1, 3, 4), draw(2, 2, 7, 8)
    varying = VaryingConvolution(kernel[:, None], torch.ones(1, 1, 7, 8, dtype=F64), 2, ZeroBorder())
    assert torch.allclose(varying(x), Convolution(kernel, 2, (7, 8), ZeroBorder())(x), atol=1e-13)


def test_varying_convolution_gives_each_source_its_own_psf():
    kernels, weights = positive(1, 2, 1, 3, 3), torch.zeros(1, 2, 9, 18, dtype=F64)
    weights[:, 0], weights[:, 1] = torch.linspace(0, 1, 18, dtype=F64), torch.linspace(1, 0, 18, dtype=F64)
    x = torch.zeros(1, 1, 9, 18, dtype=F64)
    x[0, 0, 4, 12] = 1
    expected = (weights[0, :, 4, 12, None, None] * kernels[0, :, 0]).sum(0)
    y = VaryingConvolution(kernels, weights, 1, ZeroBorder())(x)
    assert torch.allclose(y[0, 0, 3:6, 11:14], expected, atol=1e-14)


def test_periodic_adjoint_stays_periodic_and_its_spectrum_diagonalises():
    operator, x = PeriodicConvolution(draw(2, 1, 4, 5), 2, (8, 7)), draw(2, 2, 8, 7)
    assert isinstance(operator.H, PeriodicConvolution)
    assert torch.allclose(torch.fft.fft2(operator(x)), torch.view_as_complex(operator.spectrum) * torch.fft.fft2(x), atol=1e-12)
    normal = operator.H(operator(x))
    assert torch.allclose(torch.fft.fft2(normal), operator.power * torch.fft.fft2(x), atol=1e-11)


def test_periodic_convolution_refuses_a_kernel_larger_than_the_torus():
    with pytest.raises(ShapeError, match="larger than the image"):
        PeriodicConvolution(draw(1, 1, 9, 3), 1, (8, 8))


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3, 3), (1, 1, 1, 3, 3)])
def test_convolution_refuses_a_kernel_of_another_rank_or_channel_count(shape):
    with pytest.raises(ShapeError, match="kernel must be"):
        Convolution(draw(*shape), 2, (8, 8), ZeroBorder())


def test_mask_hides_even_what_is_not_finite():
    mask, x = torch.tensor([[[[True, False]]]]), torch.tensor([[[[2.0, math.nan]]]])
    assert Mask(mask)(x).tolist() == [[[[2.0, 0.0]]]]
    with pytest.raises(ShapeError, match="Diagonal"):
        Mask(mask.float())


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("border", [ZeroBorder(), ReflectingBorder()])
@pytest.mark.parametrize("cells", [(12, 5), (3, 8), (1, 2)])
def test_pooled_convolution_is_a_convolution_summed_over_blocks(factor: int, border: Border, cells: tuple[int, int]):
    size = (cells[0] * factor, cells[1] * factor)
    kernel, x = positive(2, 3, 7, 6), draw(2, 3, *size)
    pooled = PooledConvolution(kernel, 3, size, border, factor)
    apart = SumPool((3, *size), factor) @ Convolution(kernel, 3, size, border)
    y = draw(2, *pooled.out_shape, seed=1)
    torch.testing.assert_close(pooled(x), apart(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pooled.adjoint(y), apart.adjoint(y), rtol=1e-11, atol=1e-11)


def test_pooled_convolution_wants_whole_blocks():
    with pytest.raises(ShapeError, match="multiple of factor 2"):
        PooledConvolution(positive(1, 1, 3, 3), 1, (6, 5), ZeroBorder(), 2)


def test_sum_pool_adds_blocks_and_keeps_flux():
    x = torch.arange(16, dtype=F64).reshape(1, 1, 4, 4)
    assert SumPool((1, 4, 4), 2)(x).flatten().tolist() == [10, 18, 42, 50]
    with pytest.raises(ShapeError, match="crop"):
        SumPool((1, 5, 4), 2)


def test_mosaic_selects_the_band_of_each_pixel():
    pattern = torch.zeros(1, 3, 2, 2, dtype=F64)
    pattern[0, 0, 0, 0] = pattern[0, 1, 0, 1] = pattern[0, 1, 1, 0] = pattern[0, 2, 1, 1] = 1
    x = draw(1, 3, 5, 5)
    y = Mosaic(pattern, (5, 5))(x)[0, 0]
    assert (y[4, 4], y[2, 3], y[3, 0], y[1, 3]) == (x[0, 0, 4, 4], x[0, 1, 2, 3], x[0, 1, 3, 0], x[0, 2, 1, 3])


def test_crop_and_pad_are_each_others_adjoint():
    crop = Crop((1, 6, 7), (1, 2), (3, 4))
    assert isinstance(crop.H, Pad) and isinstance(crop.H.H, Crop)
    x = draw(1, 1, 3, 4)
    assert torch.equal(crop(crop.H(x)), x)
    with pytest.raises(ShapeError, match="does not fit"):
        Crop((1, 6, 7), (4, 2), (3, 4))


def test_shift_moves_a_band_limited_image():
    x = gaussian((40, 42), (18, 20), 2.0)
    expected = gaussian((40, 42), (19.3, 18.4), 2.0)
    y = Shift(torch.tensor([[1.3, -1.6]], dtype=F64), (1, 40, 42))(x)
    assert float((y - expected).abs().max() / expected.max()) < 1e-7


def test_whole_pixel_shift_moves_pixels_and_does_not_wrap():
    x = draw(1, 1, 5, 6)
    y = Shift(torch.tensor([[1.0, -2.0]], dtype=F64), (1, 5, 6))(x)
    assert torch.allclose(y[..., 1:, :4], x[..., :4, 2:], atol=1e-14)
    assert float(y[..., 0, :].abs().max()) < 1e-14 and float(y[..., 4:].abs().max()) < 1e-14


@pytest.mark.parametrize("name", FILTERS)
def test_filter_interpolates(name):
    pixel = torch.arange(-FILTERS[name]().radius, FILTERS[name]().radius + 1, dtype=F64)
    assert torch.allclose(FILTERS[name]().weight(pixel), (pixel == 0).to(F64), atol=1e-15)


@pytest.mark.parametrize("name", FILTERS)
def test_quarter_turn_is_rot90(name):
    x = draw(1, 2, 9, 9)
    for quarter in range(4):
        y = Rotation(torch.tensor([90.0 * quarter], dtype=F64), (2, 9, 9), FILTERS[name]())(x)
        assert torch.allclose(y, torch.rot90(x, quarter, (-2, -1)), atol=1e-12)


def test_rotation_turns_a_gaussian_about_the_centre():
    x, angle = gaussian((41, 41), (20, 28), 2.0), 30.0
    expected = gaussian((41, 41), (20 - 8 * math.sin(math.radians(angle)), 20 + 8 * math.cos(math.radians(angle))), 2.0)
    y = Rotation(torch.tensor([angle], dtype=F64), (1, 41, 41), KaiserSinc(8, 8.0))(x)
    assert float((y - expected).abs().max() / expected.max()) < 1e-4


@pytest.mark.parametrize(("conserve", "amplitude"), [(True, 1.0), (False, 1.5**2)])
def test_dilation_scales_a_gaussian(conserve, amplitude):
    x = gaussian((64, 64), (31.5, 33.5), 2.0)
    expected = amplitude * gaussian((64, 64), (31.5, 31.5 + 1.5 * 2), 3.0)
    y = Dilation(torch.tensor([1.5], dtype=F64), (1, 64, 64), KaiserSinc(8, 8.0), conserve)(x)
    assert float((y - expected).abs().max() / expected.max()) < 1e-4


def grid(scale: float, angle: float, size: int, target: int) -> Tensor:
    """Output pixel → input pixel, both grids with a common centre."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    linear = scale * torch.tensor([[cos, sin], [-sin, cos]], dtype=F64)
    offset = (size - 1) / 2 + torch.tensor([0.3, -0.2], dtype=F64) - linear @ torch.full((2,), (target - 1) / 2, dtype=F64)
    return torch.cat([linear, offset[:, None]], 1)[None]


def resampling_error(operator, matrix: Tensor, sigma: float, area: float) -> tuple[float, float]:
    """Largest error against the analytic Gaussian, in its peak, and the flux error."""
    x = gaussian((64, 64), (30, 33), sigma)
    points = (
        torch.stack(torch.meshgrid(*[torch.arange(40, dtype=F64)] * 2, indexing="ij"), -1) @ matrix[0, :, :2].mT + matrix[0, :, 2]
    )
    expected = area * torch.exp(-((points - torch.tensor([30.0, 33.0])) ** 2).sum(-1) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    y = operator(x)[0, 0]
    return float((y - expected).abs().max() / expected.max()), abs(float(y.sum()) - 1)


@pytest.mark.parametrize("angle", [0.0, 20.0])
@pytest.mark.parametrize(("filter", "tolerance"), [(KaiserSinc(8, 8.0), 1e-4), (KaiserSinc(5, 7.0), 3e-4), (Lanczos(5), 2.5e-3)])
def test_resampling_conserves_flux_and_equals_the_gaussian(angle, filter, tolerance):
    matrix = grid(1.68, angle, 64, 40)
    operator = resample(matrix, (1, 64, 64), (40, 40), filter, conserve_flux=True)
    assert isinstance(operator, Affine if angle else SeparableResample)
    error, flux = resampling_error(operator, matrix, 1.5, 1.68**2)
    assert error < tolerance and flux < 2 * tolerance


def test_a_missing_area_ratio_is_seen_by_the_flux_test():
    matrix = grid(1.68, 20.0, 64, 40)
    operator = Affine(matrix, (1, 64, 64), (40, 40), KaiserSinc(8, 8.0), False)
    assert resampling_error(operator, matrix, 1.5, 1.68**2)[1] > 0.5


def test_separable_and_gathered_resampling_agree():
    matrix, x = grid(1.68, 0.0, 32, 18), draw(2, 2, 32, 32)
    separable = SeparableResample.between(matrix, (2, 32, 32), (18, 18), Lanczos(5), conserve_flux=True)
    assert torch.allclose(separable(x), Affine(matrix, (2, 32, 32), (18, 18), Lanczos(5), True)(x), atol=1e-13)


def test_resampling_by_half_pixels_of_a_constant_is_the_constant():
    matrix = torch.tensor([[[0.5, 0, 7.75], [0, 0.5, 7.75]]], dtype=F64)
    for filter in (make() for make in FILTERS.values()):
        y = resample(matrix, (1, 24, 24), (12, 12), filter, conserve_flux=False)(torch.ones(1, 1, 24, 24, dtype=F64))
        assert torch.allclose(y, torch.ones_like(y), atol=1e-14)


def test_a_rotation_below_the_tolerance_is_neglected_and_moves_no_more_than_it():
    matrix, x = grid(1.0, 1e-4, 64, 40), gaussian((64, 64), (30, 33), 2.0)
    make = {"filter": KaiserSinc(5, 7.0), "conserve_flux": True}
    assert isinstance(resample(matrix, (1, 64, 64), (40, 40), **make), Affine)
    parallel = resample(matrix, (1, 64, 64), (40, 40), **make, tolerance=1e-4)
    assert isinstance(parallel, SeparableResample)
    difference = parallel(x) - Affine(matrix, (1, 64, 64), (40, 40), KaiserSinc(5, 7.0), True)(x)
    assert float(difference.abs().max() / x.max()) < 1e-4


def test_separable_resampling_refuses_a_rotated_grid():
    with pytest.raises(UnsupportedError, match="rotates"):
        SeparableResample.between(grid(1.0, 5.0, 16, 16), (1, 16, 16), (16, 16), Linear(), conserve_flux=True)
    with pytest.raises(ShapeError, match=r"\(1\|B, 2, 3\)"):
        Affine(torch.eye(2, dtype=F64)[None], (1, 16, 16), (16, 16), Linear(), True)


def test_cubic_interpolation_is_exact_for_parabolas():
    pixel = torch.arange(16, dtype=F64)
    x = (pixel[:, None] ** 2 - pixel * 3)[None, None]
    y = Affine(torch.tensor([[[1, 0, 4.3], [0, 1, 5.6]]], dtype=F64), (1, 16, 16), (4, 4), Cubic(), False)(x)
    point = torch.arange(4, dtype=F64)
    assert torch.allclose(y[0, 0], (point[:, None] + 4.3) ** 2 - (point + 5.6) * 3, atol=1e-12)


def test_full_k_space_is_unitary():
    operator, x = MaskedFourier(torch.ones(1, 6, 7, dtype=torch.bool), 2), draw(2, 2, 6, 7)
    assert torch.allclose(operator.adjoint(operator(x)), x, atol=1e-13)
    assert float(operator(x).norm()) == pytest.approx(float(x.norm()), rel=1e-13)


def test_visibilities_of_a_point_source_have_its_flux_and_phase():
    uv, step = 3e4 * draw(1, 20, 2), (2e-6, -1e-6)
    x = torch.zeros(1, 1, 15, 18, dtype=F64)
    x[0, 0, 11, 4] = 2.5
    phase = -2 * math.pi * (uv[0, :, 0] * (4 - 9) * step[1] + uv[0, :, 1] * (11 - 7) * step[0])
    expected = 2.5 * torch.stack([torch.cos(phase), torch.sin(phase)], -1)
    assert torch.allclose(Visibilities(uv, (15, 18), 1, step)(x)[0, 0], expected, atol=1e-12)


def test_visibilities_on_the_fft_grid_are_the_fft():
    x, step = draw(1, 1, 8, 6), (1e-3, 1e-3)
    u, v = torch.fft.fftfreq(6, 1e-3, dtype=F64), torch.fft.fftfreq(8, 1e-3, dtype=F64)
    uv = torch.stack([u.expand(8, 6), v[:, None].expand(8, 6)], -1).reshape(1, -1, 2)
    expected = torch.view_as_real(torch.fft.fft2(x.roll((-4, -3), (-2, -1)))).flatten(2, 3)
    assert torch.allclose(Visibilities(uv, (8, 6), 1, step)(x), expected, atol=1e-12)


def test_radon_of_a_disc_is_its_chord():
    radius, size = 12.0, 41
    axis = torch.arange(size * 8, dtype=F64) / 8 - size / 2 + 1 / 16
    fine = ((axis[:, None] ** 2 + axis**2) <= radius**2).to(F64)
    disc = fine.reshape(size, 8, size, 8).mean((1, 3))[None, None]
    y = Radon(torch.tensor([[0.0, 17.0, 45.0, 90.0, 133.0]], dtype=F64), (1, size, size), 41)(disc)[0, 0]
    chord = 2 * (radius**2 - (torch.arange(41, dtype=F64) - 20) ** 2).clamp_min(0).sqrt()
    inner = (torch.arange(41) - 20).abs() <= 8
    assert float((y - chord)[:, inner].abs().max()) < 0.02 * 2 * radius
    assert torch.allclose(y.sum(1), disc.sum().expand(5), rtol=2e-3)


def test_radon_at_zero_and_ninety_degrees_sums_axes():
    x = draw(1, 1, 7, 9)
    y = Radon(torch.tensor([[0.0, 90.0]], dtype=F64), (1, 7, 9), 9)(x)[0, 0]
    assert torch.allclose(y[0], x[0, 0].sum(0), atol=1e-12)
    assert torch.allclose(y[1, 1:8].flip(0), x[0, 0].sum(1), atol=1e-12)


@pytest.mark.parametrize("detector", [Arcsinh, Saturation])
def test_detectors_are_linear_for_faint_pixels_and_refuse_a_scale_of_zero(detector):
    x = 1e-6 * draw(1, 1, 3, 3)
    assert torch.allclose(detector((1, 3, 3), torch.ones(1, dtype=F64))(x), x, rtol=1e-9)
    with pytest.raises(DiffinvError, match="> 0"):
        detector((1, 3, 3), torch.zeros(1, dtype=F64))


def test_saturation_never_exceeds_the_full_well():
    y = Saturation((1, 1, 2), torch.tensor([3.0], dtype=F64))(torch.tensor([[[[1e6, -1e6]]]], dtype=F64))
    assert y.flatten().tolist() == [3, -3]


def test_scipy_adapter_refuses_other_sizes():
    with pytest.raises(ShapeError, match="FromScipy"):
        FromScipy(np.zeros((3, 5)), (1, 2, 2), (3,))


def test_composition_refuses_shapes_that_do_not_meet():
    with pytest.raises(ShapeError, match="the left takes"):
        SumPool((1, 4, 4), 2) @ Crop((1, 6, 6), (0, 0), (3, 3))
    assert isinstance(SumPool((1, 4, 4), 2) @ Crop((1, 6, 6), (0, 0), (4, 4)), Compose)


def test_stacks_and_blocks_refuse_parts_of_different_sizes():
    with pytest.raises(ShapeError, match="one grid"):
        Stack((SumPool((1, 4, 4), 2), SumPool((1, 6, 6), 2)))
    with pytest.raises(ShapeError, match="one grid"):
        BlockDiagonal((SumPool((1, 4, 4), 2), SumPool((1, 4, 4), 4)))


def test_a_wrong_batch_is_refused_with_the_remedy():
    with pytest.raises(ShapeError, match=r"batch 3 but the images have batch 8; give one"):
        Convolution(positive(3, 1, 3, 3), 1, (8, 8), ZeroBorder())(draw(8, 1, 8, 8))
