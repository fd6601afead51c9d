"""Components that exist only as pixels: patterned discs, random fields and segmented noise.

They are evaluated on a raster three times finer than the truth images and convolved by a separable product with a
sampled Gaussian, `image = G raster G^T`, which also resamples to the wanted grid in the same step. For a Gaussian of
standard deviation s and a raster step h the quadrature error is about exp(-2 pi^2 s^2 / h^2): nil for s > h.

Products are sparse or `einsum`, never BLAS, whose threads slow small products down many times on a busy machine.

Invariant: coordinates in arcsec are zero at the centre of every grid, so that grids of any step are aligned.
"""

from __future__ import annotations

from math import gamma

import numpy as np
from scipy import ndimage, sparse

from diffinv.data.scenes import Knots, PatternedDisc, Segmentation, Stamp, Texture

FWHM_TO_SIGMA = 1 / 2.3548200450309493


def coordinates(size: int, scale: float) -> np.ndarray:
    """Pixel centres in arcsec of a grid of `size` pixels of `scale` arcsec, zero at its centre: (size,)."""
    return (np.arange(size) - (size - 1) / 2) * scale


def gaussian_resampling(target: np.ndarray, source: np.ndarray, sigma: float) -> sparse.csr_matrix:
    """Matrix G[i, j] = h N(target_i - source_j; 0, sigma^2), h the source step, nil beyond 6 sigma: (target, source)."""
    step = source[1] - source[0]
    offset = (target[:, None] - source[None, :]) / sigma
    weight = step * np.exp(-0.5 * offset**2) / (sigma * np.sqrt(2 * np.pi))
    return sparse.csr_matrix(np.where(np.abs(offset) < 6, weight, 0.0))


def render_knots(knots: Knots, points: np.ndarray, sigma: float) -> np.ndarray:
    """Surface brightness (flux per arcsec^2) of Gaussian knots convolved with a Gaussian PSF: (N, N)."""
    width = np.hypot(knots.width, sigma)[:, None]
    along_x = np.exp(-0.5 * ((points - knots.x - knots.dx[:, None]) / width) ** 2)
    along_y = np.exp(-0.5 * ((points - knots.y - knots.dy[:, None]) / width) ** 2)
    weight = knots.flux * knots.share[:, None] / (2 * np.pi * width**2)
    return np.einsum("ky,kx->yx", weight * along_y, along_x)


def random_field(texture: Texture, size: int, scale: float) -> np.ndarray:
    """Gaussian field of unit variance with power spectrum (k^2 + k0^2)^(-slope / 2), k0 = 1 / length: (size, size)."""
    rng = np.random.default_rng(texture.seed)
    fx, fy = np.fft.rfftfreq(size, scale), np.fft.fftfreq(size, scale)
    filter_ = (fx[None, :] ** 2 + fy[:, None] ** 2 + 1 / (2 * np.pi * texture.length) ** 2) ** (-texture.slope / 2)
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    field = np.fft.irfft2(white * filter_, s=(size, size))
    return (field - field.mean()) / field.std()


def render_disc(disc: PatternedDisc, points: np.ndarray) -> np.ndarray:
    """Surface brightness (flux per arcsec^2) of a patterned disc, not convolved: (N, N).

    The flux is that of the whole disc: the part outside the raster is extrapolated from the smooth disc.
    """
    step = points[1] - points[0]
    cos, sin = np.cos(disc.angle), np.sin(disc.angle)
    dx, dy = points[None, :] - disc.x, points[:, None] - disc.y
    u, v = (dx * cos + dy * sin) / disc.scale, (dy * cos - dx * sin) / disc.scale
    v = v - disc.bend * np.minimum(u**2, 9.0)
    w = v / disc.axis_ratio
    r, theta = np.hypot(u, w), np.arctan2(w, u)
    smooth = np.exp(-(r ** (1 / disc.index)))
    image = smooth * _arms_and_tilt(disc, r, theta)
    if disc.texture.amplitude:
        image *= np.exp(disc.texture.amplitude * random_field(disc.texture, len(points), step))
    image += _bar_and_ring(disc, u, w, r)
    image *= 1 - disc.dust_depth * np.exp(-0.5 * ((v - disc.dust_offset) / disc.dust_width) ** 2)
    inside = smooth.sum() * step**2 / _smooth_flux(disc)
    return disc.flux * min(inside, 1.0) * image / (image.sum() * step**2 + 1e-30)


def _smooth_flux(disc: PatternedDisc) -> float:
    """Flux of exp(-(r / h)^(1 / n)) seen at axis ratio q: 2 pi n Gamma(2 n) h^2 q."""
    return 2 * np.pi * disc.index * gamma(2 * disc.index) * disc.scale**2 * disc.axis_ratio


def _arms_and_tilt(disc: PatternedDisc, r: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Logarithmic spiral arms and lopsidedness as one multiplicative field >= 0."""
    factor = np.ones_like(r)
    if disc.arms:
        winding = disc.arms * (theta - np.log(r + 0.05) / np.tan(disc.pitch)) + disc.phase
        arm = np.exp(disc.sharpness * (np.cos(winding) - 1))
        factor += disc.contrast * arm * (1 - np.exp(-(r**2)))
    if disc.lopsidedness:
        factor *= 1 + disc.lopsidedness * np.cos(theta - disc.lopsided_angle) * r / (1 + r)
    return factor


def _bar_and_ring(disc: PatternedDisc, u: np.ndarray, w: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Bar and ring, in units of the central brightness of the disc."""
    extra = np.zeros_like(r)
    if disc.bar_strength:
        along = u * np.cos(disc.bar_angle) + w * np.sin(disc.bar_angle)
        across = w * np.cos(disc.bar_angle) - u * np.sin(disc.bar_angle)
        extra += disc.bar_strength * np.exp(-0.5 * (along**2 + (across / disc.bar_ratio) ** 2) / (0.5 * disc.bar_length) ** 2)
    if disc.ring_strength:
        peak = disc.ring_strength * np.exp(-disc.ring_radius)
        extra += peak * np.exp(-0.5 * ((r - disc.ring_radius) / disc.ring_width) ** 2)
    return extra


def isophote(image: np.ndarray, noise: float, threshold: float, smoothing: float) -> np.ndarray:
    """The region around the brightest point where the smoothed image exceeds `threshold` times its noise.

    Arguments:
        image: (H, W).
        noise: standard deviation of the white noise of a pixel.
        threshold: in units of the noise after smoothing.
        smoothing: standard deviation in pixels.

    Returns:
        (H, W) bool, one connected region.
    """
    smoothed = ndimage.gaussian_filter(image, smoothing)
    level = min(threshold * noise / (2 * np.sqrt(np.pi) * smoothing), 0.5 * smoothed.max())
    labels, _ = ndimage.label(smoothed > level)
    return labels == labels[np.unravel_index(smoothed.argmax(), image.shape)]


def render_stamp(
    stamp: Stamp, galaxy: np.ndarray, psf: np.ndarray, stamp_scale: float, points: np.ndarray, sigma: float
) -> np.ndarray:
    """A real galaxy cut at an isophote, its PSF replaced by a Gaussian, turned and dilated: (N, N), flux per arcsec^2.

    In the frame of the stamp the target Gaussian is narrower by the dilation; the PSF is divided out in Fourier space,
    its transfer function floored at 0.15, and the band-limited result is interpolated by cubic splines.

    Arguments:
        stamp: what to do.
        galaxy: (h, w) real image with its noise.
        psf: (p, q) its PSF on the same pixels, odd sizes, centred.
        stamp_scale: arcsec a pixel of both.
        points: (N,) coordinates of the wanted image in arcsec.
        sigma: of the target Gaussian in arcsec.
    """
    size = 2 * max(galaxy.shape) + 16
    padded = np.zeros((size, size))
    padded[: galaxy.shape[0], : galaxy.shape[1]] = _cut_stamp(galaxy, stamp.threshold)
    f = np.fft.rfftfreq(size)[None, :] ** 2 + np.fft.fftfreq(size)[:, None] ** 2
    target = np.exp(-2 * (np.pi * sigma / (stamp.dilation * stamp_scale)) ** 2 * f)
    otf = np.abs(np.fft.rfft2(_centre_crop(psf / psf.sum(), size), s=(size, size)))
    filtered = sharpened(padded, target / np.maximum(otf, 0.15))
    cos, sin = np.cos(stamp.angle), np.sin(stamp.angle)
    dx, dy = (points[None, :] - stamp.x) / stamp.dilation, (points[:, None] - stamp.y) / stamp.dilation
    u, v = (dx * cos + dy * sin) / stamp_scale, (dy * cos - dx * sin) / stamp_scale
    u = -u if stamp.mirrored else u
    where = [v + (galaxy.shape[0] - 1) / 2, u + (galaxy.shape[1] - 1) / 2]
    image = ndimage.map_coordinates(filtered, where, order=3, mode="grid-wrap") * _near(where, galaxy.shape)
    return image * stamp.flux / (padded.sum() * (stamp_scale * stamp.dilation) ** 2)


def _near(where: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """True within a stamp and its rim: the periodic copies of the filtered stamp are left out."""
    rim = max(shape) / 2 + 8
    return np.logical_and.reduce([np.abs(w - (n - 1) / 2) < n / 2 + rim for w, n in zip(where, shape)])


def _centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    top, left = [max(0, (n - size) // 2) for n in image.shape]
    return image[top : top + size, left : left + size]


def _cut_stamp(galaxy: np.ndarray, threshold: float) -> np.ndarray:
    """The stamp less its border level, zero outside an isophote."""
    border = np.concatenate([galaxy[:3].ravel(), galaxy[-3:].ravel(), galaxy[:, :3].ravel(), galaxy[:, -3:].ravel()])
    level = np.median(border)
    noise = 1.4826 * np.median(np.abs(border - level))
    return (galaxy - level) * isophote(galaxy - level, noise, threshold, 1.5)


def segmented(image: np.ndarray, cut: Segmentation, scale: float) -> np.ndarray:
    """The image with correlated noise, exactly zero outside an irregular isophote: (H, W)."""
    rng = np.random.default_rng(cut.seed)
    width = cut.correlation * FWHM_TO_SIGMA / scale
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape), width)
    noise *= cut.noise * image.max() / noise.std()
    noisy = image + noise
    white = noise.std() * 2 * np.sqrt(np.pi) * width
    return noisy * isophote(noisy, white, cut.threshold, 1.5 * width)


def sharpened(image: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    """The image filtered by a real transfer function on the rfft2 frequencies of the grid: (H, W)."""
    return np.fft.irfft2(np.fft.rfft2(image) * transfer, s=image.shape)
