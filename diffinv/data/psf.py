"""Point-spread functions of the data, and the kernel that leads from the image that we infer to the data.

The inferred image is the sky at a target resolution: x_k = h² (G ∗ f)(q_k) on pixels of side h, G a round Gaussian. The
data are y_j = H² (P ∗ f)(p_j) with P the effective PSF (optics, atmosphere and the pixel's own response) and H the data's pixel.
With P̂ = K̂ Ĝ the data are the point samples of K ∗ x,

    y_j = (H/h)² (k ∗ x)(p_j),   k_m = h² K(m h),   K̂(ν) = P̂(ν) Ĝ(ν)(1 + ε²)/(Ĝ(ν)² + ε²) inside the stamp's band, else 0.

P̂ is the stamp's own Fourier sum evaluated at the output grid's frequencies, whatever the stamp's sampling or orientation,
so nothing is interpolated. The band is |ν| ≤ 1/(2 × stamp pixel) along the stamp's axes. Ĝ is that of the Gaussian's samples on
the output grid: an undersampled stamp of the same pitch is folded in the same way, and the folds cancel in the ratio.
ε = 10⁻³ keeps the noise of a stamp from growing where Ĝ has died out: there x has no power either, and the prediction
K̂ x̂ changes by at most ε²/Ĝ².
Invariant: Σ k equals the encircled energy of the stamp, `norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from diffinv.core.checks import InputError

FWHM_TO_SIGMA = 1 / np.sqrt(8 * np.log(2))
REGULARISATION = 1e-3
SMALLEST_TARGET = 1.5  # output pixels; a narrower Gaussian is not held by its samples
LARGEST_GAIN = 5.0
_OFF_CENTRE = 0.5
_CUT = 0.1  # of the peak at the border of a stamp, or below 0, of its flux


class PsfKind(StrEnum):
    """Whether a stamp holds the pixel's own response (`EFFECTIVE`) or the light that falls on the detector (`OPTICAL`)."""

    EFFECTIVE = "effective"
    OPTICAL = "optical"


@dataclass(frozen=True, eq=False)
class PointSpread:
    """A PSF stamp that has been checked.

    stamp: (S, T), sums to `norm`. norm: encircled energy of the stamp, 0 < norm ≤ 1.
    oversample: stamp pixels a data pixel. kind: effective or optical. centre: (row, column) of the source in the stamp.
    """

    stamp: np.ndarray
    norm: float
    oversample: float
    kind: PsfKind
    centre: tuple[float, float]

    @property
    def fwhm(self) -> float:
        """Diameter of the area above half of the peak, in data pixels."""
        return half_area_diameter(self.stamp) / self.oversample


def check_psf(
    stamp: np.ndarray, *, norm: float | None, oversample: float, kind: PsfKind, modelled: bool = False
) -> tuple[PointSpread, tuple[str, ...]]:
    """A usable PSF from a stamp as it came, and notes on what was done to it.

    Odd sides: the source is at the central pixel. Even sides: at the centre of the stamp or half a pixel above it (the FFT
    convention), whichever is nearer to the centroid of the core; that of a model is at the centre. A stamp is never shifted.

    Arguments:
        stamp: (S, T), any positive normalisation. norm: its encircled energy, None for 1 (noted).
        oversample: stamp pixels a data pixel. kind: what the stamp holds. modelled: whether it is of a PSF model.
    Raises: InputError if it is not an image of a point source, or has another pixel scale than it claims.
    """
    stamp = np.asarray(stamp, dtype=np.float64)
    if stamp.ndim != 2 or min(stamp.shape) < 3:
        raise InputError(f"the PSF has shape {stamp.shape}; give a stamp of at least 3×3 pixels.")
    if not np.isfinite(stamp).all():
        raise InputError(f"the PSF has {np.count_nonzero(~np.isfinite(stamp))} NaN or infinite pixels; give a complete stamp.")
    total = float(stamp.sum())
    if not total > 0 or stamp.max() <= 0:
        raise InputError(f"the PSF sums to {total:.4g}; it must be positive: give a stamp of a source, background removed.")
    if not (np.isfinite(oversample) and oversample > 0):
        raise InputError(f"the PSF's oversampling must be > 0, got {oversample}; correct OVERSAMP.")
    if norm is not None and not 0 < norm <= 1.01:
        raise InputError(f"PSFNORM must be an encircled energy in (0, 1], got {norm}; correct it or leave it out.")
    centre, notes = _find_centre(stamp, oversample if modelled else None)
    _check_extent(stamp)
    target = 1.0 if norm is None else float(norm)
    if norm is None:
        notes += (f"PSFNORM absent: PSF scaled from a sum of {total:.5g} to 1",)
    elif abs(total / target - 1) > 1e-3:
        notes += (f"PSF scaled from a sum of {total:.5g} to PSFNORM = {target:.5g}",)
    return PointSpread(stamp * (target / total), target, float(oversample), kind, centre), notes


def check_psf_scale(psf: PointSpread, shape: tuple[int, int]) -> None:
    """Raise InputError if the PSF is wider than half of the image (H, W) that it belongs to."""
    if psf.fwhm > min(shape) / 2:
        raise InputError(
            f"the PSF's FWHM of {psf.fwhm:.3g} pixels is more than half of the image {shape[0]}×{shape[1]}; "
            "check OVERSAMP and the PSF's pixel scale."
        )


def half_area_diameter(stamp: np.ndarray) -> float:
    return float(2 * np.sqrt(np.count_nonzero(stamp >= stamp.max() / 2) / np.pi))


def _find_centre(stamp: np.ndarray, model_step: float | None) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Centre by convention, checked against the centroid of the pixels above a fifth of the peak.

    model_step: stamp pixels a data pixel of a model, whose centroid may leave the middle by aberrations; None for a stamp.
    """
    core = np.where(stamp >= 0.2 * stamp.max(), stamp, 0.0)
    centroid = [float((np.arange(n) * core.sum(axis=1 - axis)).sum() / core.sum()) for axis, n in enumerate(stamp.shape)]
    centre, notes = [], ()
    for n, c in zip(stamp.shape, centroid, strict=True):
        places = [(n - 1) / 2] if n % 2 or model_step else [(n - 1) / 2, n / 2]
        centre.append(min(places, key=lambda place: abs(place - c)))
    offset = [c - p for c, p in zip(centroid, centre, strict=True)]
    limit = _OFF_CENTRE * max(1.0, model_step or 1.0)
    if max(map(abs, offset)) > limit:
        raise InputError(
            f"the PSF is off-centre by ({offset[1]:+.2f}, {offset[0]:+.2f}) pixels in (x, y), more than {limit:g}; "
            "cut it around its source."
        )
    if not model_step and any(n % 2 == 0 for n in stamp.shape):
        notes += (
            f"PSF of even size {stamp.shape[0]}×{stamp.shape[1]}: source taken at row {centre[0]:g}, column {centre[1]:g} from 0",
        )
    if max(map(abs, offset)) > 0.1:
        notes += (
            f"PSF centroid lies ({offset[1]:+.2f}, {offset[0]:+.2f}) pixels in (x, y) from the stamp's centre; it was not moved",
        )
    return (centre[0], centre[1]), notes


def _check_extent(stamp: np.ndarray) -> None:
    """A delta, √(4 ln 2/π Σ/peak) = .94 pixels wide, is sharper than a pixel; a stamp bright at its border is cut or too
    wide, and none is below 0 there."""
    width = float(np.sqrt(4 * np.log(2) / np.pi * stamp.sum() / stamp.max()))
    if width < 1:
        raise InputError(
            f"the PSF's FWHM of {width:.2f} stamp pixels is below one; check its pixel scale, or give an oversampled stamp."
        )
    border = float(np.concatenate([stamp[0], stamp[-1], stamp[1:-1, 0], stamp[1:-1, -1]]).mean())
    if -border * stamp.size > _CUT * stamp.sum():
        raise InputError(
            f"the PSF's background is below 0 (border at {border / stamp.max():.2%} of the peak, over the stamp "
            f"{-border * stamp.size / stamp.sum():.0%} of its flux); add what was subtracted too much."
        )
    if border > _CUT * stamp.max() or half_area_diameter(stamp) > min(stamp.shape) / 2:
        raise InputError(
            f"the PSF fills its stamp (border at {border / stamp.max():.0%} of the peak, FWHM {half_area_diameter(stamp):.3g} "
            f"of {min(stamp.shape)} pixels); give a larger stamp, or check its pixel scale."
        )


def difference_kernel(
    psf: PointSpread,
    *,
    pixel_scale: float,
    out_scale: float,
    target_fwhm: float,
    size: int | None = None,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """k on the output grid with k ∗ (Gaussian of `target_fwhm`) = the effective PSF of the data.

    Arguments:
        psf: the data's PSF. pixel_scale: of the data, arcsec. out_scale: of the output grid, arcsec.
        target_fwhm: of the inferred image, arcsec, at least 1.5 output pixels; 0 leaves k = P (full deconvolution).
        size: side of k in output pixels, odd; None covers the stamp and the Gaussian.
        axes: (2, 2) rotation or reflection from output to data axes, (row, column) → (row, column); None if they are parallel.
    Returns: (size, size), centred at size // 2, sum = psf.norm.
    Raises: InputError if the target is undersampled, or sharper data would have to be amplified by more than 5.
    References: *Deconvolution with Correct Sampling*, Magain, Courbin & Sohy, 1998, ApJ 494, 472.
    """
    stamp_scale = pixel_scale / psf.oversample
    if size is None:
        size = 2 * int(np.ceil((max(psf.stamp.shape) * stamp_scale / 2 + target_fwhm) / out_scale)) + 1
    if size % 2 == 0:
        raise InputError(f"difference_kernel: size must be odd, got {size}; the centre is a pixel.")
    if target_fwhm != 0 and not target_fwhm >= SMALLEST_TARGET * out_scale * (1 - 1e-9):
        raise InputError(
            f"the target PSF of {target_fwhm:.3g}″ is below {SMALLEST_TARGET} pixels of {out_scale:.3g}″; widen it, or give 0."
        )
    length = 2 * (size + 1)
    frequency = np.fft.fftfreq(length, out_scale)
    to_stamp = np.eye(2) if axes is None else np.linalg.inv(np.asarray(axes, dtype=np.float64)).T
    response = stamp_spectrum(psf, frequency, to_stamp, stamp_scale, pixel_scale)
    gauss = np.outer(*[_sampled_gaussian_spectrum(frequency, target_fwhm, out_scale)] * 2)
    spectrum = response * gauss * (1 + REGULARISATION**2) / (gauss**2 + REGULARISATION**2) if target_fwhm > 0 else response
    gain = float(np.abs(spectrum).max()) / psf.norm
    if gain > LARGEST_GAIN:
        raise InputError(
            f"the data (PSF FWHM {psf.fwhm * pixel_scale:.3g}″) are sharper than the target PSF ({target_fwhm:.3g}″): the kernel "
            f"would amplify by {gain:.3g}; take a prior of sharper images, or smooth the image and its PSF to that width first."
        )
    start = length // 2 - size // 2
    kernel = np.fft.fftshift(np.fft.ifft2(spectrum).real)[start : start + size, start : start + size]
    return kernel * (psf.norm / kernel.sum())


def _sampled_gaussian_spectrum(frequency: np.ndarray, fwhm: float, scale: float) -> np.ndarray:
    """Σ_n Ĝ(ν + n/h) of a line Gaussian with Ĝ(0) = 1: the spectrum of its samples, which is what pixels at pitch h can hold."""
    folds = frequency[:, None] + np.arange(-3, 4) / scale
    return np.exp(-2 * (np.pi * fwhm * FWHM_TO_SIGMA * folds) ** 2).sum(1)


def stamp_spectrum(
    psf: PointSpread, frequency: np.ndarray, to_stamp: np.ndarray, stamp_scale: float, pixel_scale: float
) -> np.ndarray:
    """P̂ = Σ_s P_s exp(−2πi ν·r_s) on the square of `frequency` (N,), cycles/″, 0 outside the stamp's band: (N, N).

    Arguments: to_stamp: (2, 2), output → stamp frequency. stamp_scale, pixel_scale: arcsec (an optical stamp gets the sinc).
    """
    rows, columns = ((np.arange(n) - c) * stamp_scale for n, c in zip(psf.stamp.shape, psf.centre, strict=True))
    limit = (1 + 1e-9) / (2 * stamp_scale)
    result = np.zeros((len(frequency), len(frequency)), dtype=np.complex128)
    for line, nu_row in enumerate(frequency):
        nu = to_stamp @ np.stack([np.full_like(frequency, nu_row), frequency])
        inside = (np.abs(nu) <= limit).all(axis=0)
        along_rows, along_columns = (
            np.exp(-2j * np.pi * np.outer(n, r)) for n, r in zip(nu[:, inside], (rows, columns), strict=True)
        )
        values = ((along_rows @ psf.stamp) * along_columns).sum(1)
        if psf.kind is PsfKind.OPTICAL:
            values = values * np.sinc(nu[:, inside] * pixel_scale).prod(axis=0)
        result[line, inside] = values
    return result


def gaussian_stamp(fwhm: float, size: int) -> np.ndarray:
    """Samples of a round Gaussian, FWHM in pixels, sum 1: (size, size); a single pixel if `fwhm` is 0."""
    offset = np.arange(size) - size // 2
    profile = np.exp(-0.5 * (offset / (fwhm * FWHM_TO_SIGMA)) ** 2) if fwhm > 0 else (offset == 0).astype(np.float64)
    return np.outer(profile, profile) / profile.sum() ** 2
