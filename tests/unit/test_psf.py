"""Difference kernels against closed forms and against the mock observations, and the checks of PSF stamps."""

from __future__ import annotations

from math import erf
from pathlib import Path

import numpy as np
import pytest

from diffinv.core.checks import InputError
from diffinv.data.psf import FWHM_TO_SIGMA, PointSpread, PsfKind, check_psf, check_psf_scale, difference_kernel, gaussian_stamp

OUT, TARGET = 0.1, 0.2


def _stamp(fwhm: tuple[float, float], scale: float, size: int = 41, *, angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """Samples of an elliptical Gaussian with FWHM (row, column) axes in arcsec, turned by `angle`."""
    offset = (np.arange(size) - (size - 1) / 2) * scale - shift
    row, column = np.meshgrid(offset, offset, indexing="ij")
    u, v = np.cos(angle) * row + np.sin(angle) * column, np.cos(angle) * column - np.sin(angle) * row
    stamp = np.exp(-0.5 * ((u / fwhm[0]) ** 2 + (v / fwhm[1]) ** 2) / FWHM_TO_SIGMA**2)
    return stamp / stamp.sum()


def _psf(stamp: np.ndarray, oversample: float = 1.0, kind: PsfKind = PsfKind.EFFECTIVE, norm: float = 1.0) -> PointSpread:
    return check_psf(stamp, norm=norm, oversample=oversample, kind=kind)[0]


def _error(kernel: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(kernel - expected).max() / expected.max())


@pytest.mark.parametrize("scale", [0.2, 0.168, 0.1, 0.05])
@pytest.mark.parametrize("size", [61, 62])
def test_the_kernel_between_gaussians_is_a_gaussian(scale: float, size: int) -> None:
    """FWHM² subtract. The stamps are cut beyond 4.4 σ or more, which leaves 1e-4."""
    psf = _psf(_stamp((0.7, 0.7), scale, size if scale > 0.06 else 2 * size + size % 2))
    kernel = difference_kernel(psf, pixel_scale=scale, out_scale=OUT, target_fwhm=TARGET, size=51)
    expected = gaussian_stamp(np.sqrt(0.7**2 - TARGET**2) / OUT, 51)
    assert _error(kernel, expected) < 2e-4


def test_a_wrong_target_or_centre_is_seen_by_that_tolerance() -> None:
    psf = _psf(_stamp((0.7, 0.7), 0.2, 61))
    expected = gaussian_stamp(np.sqrt(0.7**2 - TARGET**2) / OUT, 51)
    wrong = difference_kernel(psf, pixel_scale=0.2, out_scale=OUT, target_fwhm=0.22, size=51)
    assert _error(wrong, expected) > 5e-3
    moved = _psf(_stamp((0.7, 0.7), 0.2, 61, shift=0.02))
    assert _error(difference_kernel(moved, pixel_scale=0.2, out_scale=OUT, target_fwhm=TARGET, size=51), expected) > 2e-2


def test_no_target_leaves_the_psf() -> None:
    psf = _psf(_stamp((0.7, 0.5), 0.1, 61))
    kernel = difference_kernel(psf, pixel_scale=0.1, out_scale=OUT, target_fwhm=0.0, size=61)
    assert _error(kernel, psf.stamp) < 1e-12


def test_an_optical_psf_gets_the_pixel_of_the_data() -> None:
    """The effective PSF of a Gaussian in a square pixel is a product of differences of error functions."""
    scale, fwhm = 0.2, 0.6
    sigma = fwhm * FWHM_TO_SIGMA * np.sqrt(2)
    offset = (np.arange(41) - 20) * OUT
    line = np.array([erf((o + scale / 2) / sigma) - erf((o - scale / 2) / sigma) for o in offset])
    expected = np.outer(line, line) / line.sum() ** 2
    options = {"pixel_scale": scale, "out_scale": OUT, "target_fwhm": 0.0, "size": 41}
    optical = _psf(_stamp((fwhm, fwhm), scale / 4, 121), 4.0, PsfKind.OPTICAL)
    effective = _psf(optical.stamp, 4.0)
    assert _error(difference_kernel(optical, **options), expected) < 1e-4
    assert _error(difference_kernel(effective, **options), expected) > 3e-2


@pytest.mark.parametrize(
    "axes",
    [
        np.array([[0.0, 1.0], [-1.0, 0.0]]),
        np.diag([1.0, -1.0]),
        np.array([[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]]),
    ],
)
def test_a_turned_or_mirrored_detector_turns_the_kernel_back(axes: np.ndarray) -> None:
    scale = 0.15
    offset = (np.arange(61) - 30) * scale
    covariance = np.array([[0.09, 0.02], [0.02, 0.05]])
    sky = np.stack(np.meshgrid(offset, offset, indexing="ij"))
    seen = np.linalg.inv(axes @ covariance @ axes.T)
    stamp = np.exp(-0.5 * np.einsum("iab,ij,jab->ab", sky, seen, sky))
    kernel = difference_kernel(_psf(stamp), pixel_scale=scale, out_scale=OUT, target_fwhm=0.0, size=41, axes=axes)
    offset = (np.arange(41) - 20) * OUT
    sky = np.stack(np.meshgrid(offset, offset, indexing="ij"))
    expected = np.exp(-0.5 * np.einsum("iab,ij,jab->ab", sky, np.linalg.inv(covariance), sky))
    expected /= expected.sum()
    assert _error(kernel, expected) < 1e-4


def test_the_kernel_sums_to_the_encircled_energy() -> None:
    psf = _psf(_stamp((0.7, 0.7), 0.2), norm=0.985)
    assert difference_kernel(psf, pixel_scale=0.2, out_scale=OUT, target_fwhm=TARGET).sum() == pytest.approx(0.985, abs=1e-12)


def test_the_noise_of_a_stamp_is_not_amplified() -> None:
    """A scene at the target resolution, seen through kernels of a clean and of a noisy stamp: the difference is no larger than
    what the noise itself, convolved with the unblurred scene, would give (Cauchy–Schwarz bound: noise norm × scene norm)."""
    rng = np.random.default_rng(0)
    clean = _stamp((0.25, 0.25), 0.1, 41)
    noise = 1e-4 * rng.normal(size=clean.shape)
    noise -= noise.mean()
    point = gaussian_stamp(TARGET / OUT, 61)
    seen = []
    for stamp in (clean, clean + noise):
        kernel = difference_kernel(_psf(stamp), pixel_scale=0.1, out_scale=OUT, target_fwhm=TARGET, size=121)
        seen.append(np.fft.ifft2(np.fft.fft2(kernel, (256, 256)) * np.fft.fft2(point, (256, 256))).real)
    assert np.linalg.norm(seen[1] - seen[0]) < 1.05 * np.linalg.norm(noise)


def test_data_sharper_than_the_target_are_refused() -> None:
    with pytest.raises(InputError, match="sharper than the target"):
        difference_kernel(_psf(_stamp((0.1, 0.1), 0.05)), pixel_scale=0.05, out_scale=OUT, target_fwhm=TARGET)


@pytest.mark.parametrize(("target", "size", "message"), [(0.1, 31, "below 1.5"), (-0.2, 31, "below 1.5"), (0.2, 30, "odd")])
def test_unusable_targets_are_refused(target: float, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        difference_kernel(_psf(_stamp((0.7, 0.7), 0.2)), pixel_scale=0.2, out_scale=OUT, target_fwhm=target, size=size)


GOOD = _stamp((0.7, 0.7), 0.2, 31)


@pytest.mark.parametrize(
    ("stamp", "options", "message"),
    [
        (np.where(np.eye(31) > 0, np.nan, GOOD), {}, "NaN"),
        (-GOOD, {}, "positive"),
        (np.zeros((31, 31)), {}, "positive"),
        (np.roll(GOOD, 1, 0), {}, "off-centre"),
        (np.ones((31, 31)), {}, "fills its stamp"),
        (_stamp((4.0, 4.0), 0.2, 31), {}, "fills its stamp"),
        (np.pad([[1.0]], 15), {}, "below one"),
        (GOOD[:, 0], {}, "3×3"),
        (GOOD - 0.005 * GOOD.max(), {}, "background is below 0"),
        (GOOD, {"norm": 1.4}, "PSFNORM"),
        (GOOD, {"norm": -1.0}, "PSFNORM"),
        (GOOD, {"oversample": 0.0}, "OVERSAMP"),
    ],
)
def test_unusable_stamps_are_refused(stamp: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_psf(stamp, **{"norm": None, "oversample": 1.0, "kind": PsfKind.EFFECTIVE, **options})


def test_a_psf_wider_than_half_of_the_image_is_refused() -> None:
    psf = _psf(_stamp((2.0, 2.0), 0.2, 51))
    check_psf_scale(psf, (32, 32))
    with pytest.raises(InputError, match="half of the image"):
        check_psf_scale(psf, (18, 32))


def test_the_source_of_a_model_is_at_the_middle_of_its_stamp() -> None:
    """Aberrations move the centroid: 2 stamp pixels are half a pixel of the data here."""
    line = np.exp(-0.5 * ((np.arange(30) - 15.4) / 2.0) ** 2)
    options = {"norm": 1.0, "oversample": 4.0, "kind": PsfKind.EFFECTIVE}
    psf, notes = check_psf(np.outer(line, line), modelled=True, **options)
    assert psf.centre == (14.5, 14.5)
    assert not any("even size" in note for note in notes)
    assert check_psf(np.outer(line, line), **options)[0].centre == (15.0, 15.0)
    far = np.exp(-0.5 * ((np.arange(30) - 16.8) / 2.0) ** 2)
    with pytest.raises(InputError, match="off-centre"):
        check_psf(np.outer(far, far), modelled=True, **options)


@pytest.mark.parametrize(("scale", "norm", "total"), [(3.0, None, 1.0), (0.5, 0.98, 0.98), (0.98, 0.98, 0.98)])
def test_stamps_are_scaled_with_a_note(scale: float, norm: float | None, total: float) -> None:
    psf, notes = check_psf(GOOD * scale, norm=norm, oversample=1.0, kind=PsfKind.EFFECTIVE)
    assert psf.stamp.sum() == pytest.approx(total)
    assert any("scaled" in note for note in notes) == (scale != 0.98)


@pytest.mark.parametrize("place", [14.5, 15.0])
def test_even_stamps_are_centred_by_their_convention(place: float) -> None:
    """A stamp of 30 pixels may have its source at 14.5 or at 15: both give the kernel of the odd stamp."""
    offset = (np.arange(30) - place) * 0.2
    line = np.exp(-0.5 * (offset / (0.7 * FWHM_TO_SIGMA)) ** 2)
    psf, notes = check_psf(np.outer(line, line), norm=1.0, oversample=1.0, kind=PsfKind.EFFECTIVE)
    assert psf.centre == (place, place)
    assert any("even size" in note for note in notes)
    options = {"pixel_scale": 0.2, "out_scale": OUT, "target_fwhm": TARGET, "size": 51}
    assert _error(difference_kernel(psf, **options), difference_kernel(_psf(GOOD), **options)) < 1e-4


def test_the_width_is_measured_in_data_pixels() -> None:
    assert _psf(_stamp((0.8, 0.8), 0.05, 101), 4.0).fwhm == pytest.approx(4.0, rel=0.05)


@pytest.fixture(scope="module")
def mocks(data_folder: Path) -> dict[str, np.ndarray]:
    path = data_folder / "mocks" / "galaxies_val32.npz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    with np.load(path) as archive:
        return {k: archive[k] for k in archive if not k.startswith("meta")}


@pytest.mark.parametrize(("survey", "scale", "tolerance"), [("lsst", 0.2, 5e-4), ("hsc", 0.168, 5e-4), ("vis", 0.1, 3e-3)])
def test_kernels_from_the_stamps_predict_the_mocks(mocks: dict, survey: str, scale: float, tolerance: float) -> None:
    """Median over 12 galaxies of the largest error in the inner field, over the peak; light from outside the truth's field is not
    in the truth. Measured 9e-5 (LSST), 1.4e-4 (HSC), 9e-4 (VIS, whose stamps are undersampled)."""
    truth, clean, psfs = _tracks(mocks)[survey]
    errors, mutants = [], []
    for x, y, stamp in zip(truth[:12], clean, psfs):
        psf = _psf(stamp, norm=float(stamp.sum(dtype=np.float64)))
        for target, found in ((0.2, errors), (0.22, mutants)):
            kernel = difference_kernel(psf, pixel_scale=scale, out_scale=OUT, target_fwhm=target)
            found.append(np.abs(_observe(x, kernel, scale / OUT, y.shape[0]) - y)[4:-4, 4:-4].max() / y.max())
    assert np.median(errors) < tolerance
    assert np.median(mutants) > 2 * tolerance


def _tracks(mocks: dict) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    truth = mocks["truth"].astype(np.float64)
    wide = np.einsum("b,nbyx->nyx", mocks["vis_weights"], truth)
    return {
        "lsst": (truth[:, 2], mocks["lsst_clean"][:, 2], mocks["lsst_psf"][:, 2]),
        "hsc": (truth[:, 2], mocks["hsc_i_clean"], mocks["hsc_psf"]),
        "vis": (wide, mocks["vis_clean"], mocks["vis_psf"]),
    }


def _observe(x: np.ndarray, kernel: np.ndarray, ratio: float, size: int) -> np.ndarray:
    """(H/h)² (k ∗ x)(p_j) by an ideal sinc on a padded field, both fields centred on one another."""
    padded = np.pad(x, 40)
    shape = tuple(n + kernel.shape[0] - 1 for n in padded.shape)
    full = np.fft.irfft2(np.fft.rfft2(padded, shape) * np.fft.rfft2(kernel, shape), shape)
    half, length = kernel.shape[0] // 2, padded.shape[0]
    position = (np.arange(size) - (size - 1) / 2) * ratio + (length - 1) / 2
    matrix = np.sinc(position[:, None] - np.arange(length))
    return ratio**2 * matrix @ full[half : half + length, half : half + length] @ matrix.T
