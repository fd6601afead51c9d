"""One object: from checked bands to a product.

Channels of equal shapes travel in one batch. Draws are smoothed to the target PSF when it is wider than that of the prior's
images.
Invariant: an object's draws depend on its name, its data, the prior, the method and the seed, not on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.core.batched import collate
from diffinv.core.checks import ConfigError, ShapeError
from diffinv.data.fits import Plane
from diffinv.data.forward import Field
from diffinv.data.grids import SkyGrid
from diffinv.data.observation import Band, SkyObservation
from diffinv.data.products import LEVELS, Exposure, Product, Provenance, Quality, holds_quantile
from diffinv.data.psf import FWHM_TO_SIGMA, gaussian_stamp
from diffinv.engine.channels import Channel, channel_seed
from diffinv.engine.draws import Method
from diffinv.engine.judge import Judgement, judge, known_columns
from diffinv.engine.measure import catalog
from diffinv.engine.memory import rows_that_fit
from diffinv.engine.methods import describe_method
from diffinv.engine.names import stable_hash
from diffinv.engine.reconstruct import Result, field_prior, reconstruct
from diffinv.priors.store import Prior
from diffinv.uncertainty.quantiles import quantile

CHI2_SIGMAS = 5.0
MOST_INDEFINITE = 0.01  # of the solves, before a product says so
INFORMED = 0.5 * math.log(2)  # nats: the data have removed half of the prior's variance in a pixel


@dataclass(frozen=True, eq=False)
class Answer:
    """Draws of one channel.

    samples: (M, C, H, W) on the output grid. information: (C, H, W), ½ ln(prior variance / posterior variance), at the prior's
    resolution, or None. residuals: of the mean, one (h, w) an exposure. chi2: a good datum. data: how many. calls: of the network
    a draw, and indefinite: share of the guidance's solves that met negative curvature, are means over what was sampled together.
    judgement: what needs no truth.
    """

    samples: Tensor
    information: Tensor | None
    residuals: tuple[np.ndarray, ...]
    chi2: float
    data: int
    calls: float
    indefinite: float
    judgement: Judgement


def rows_of(channels: Sequence[Channel], prior: Prior, processes: int = 1) -> int:
    """Rows (images × draws) that fit into memory at once, in each of so many processes, whichever channel is sampled."""
    device = next(prior.parameters()).device
    shapes = {tuple(c.field.likelihood.image_shape) for c in channels}
    return min(rows_that_fit(field_prior(prior, shape).to(device), shape, device, processes) for shape in shapes)


def answer_channels(
    channels: Sequence[Channel],
    prior: Prior,
    method: Method,
    *,
    draws: int,
    seeds: Sequence[int],
    target_fwhm: float | None,
    max_batch: int,
    progress: Callable[[float], None] | None = None,
) -> list[Answer]:
    """Draws for every channel, of one object or of several, channels of one signature together.

    Arguments: seeds: of the channels' objects. target_fwhm: arcsec, None for the prior's. progress: called with the fraction
    done.
    Raises: ConfigError if the target is sharper than the prior's images.
    """
    answers: dict[int, Answer] = {}
    for group in _groups(channels):
        start = len(answers) / len(channels)
        report = _scaled(progress, start, len(group) / len(channels))
        result = reconstruct(
            collate([channels[k].field.likelihood for k in group]),
            prior,
            draws=draws,
            seed=[seeds[k] for k in group],
            method=method,
            scale=torch.tensor([channels[k].field.scale for k in group]),
            image_ids=[stable_hash("+".join(channels[k].names)) for k in group],
            max_batch=max_batch,
            device=next(prior.parameters()).device,
            progress=report,
        )
        for row, k in enumerate(group):
            answers[k] = _answer(channels[k], result, row, target_fwhm, seeds[k])
    return [answers[k] for k in range(len(channels))]


def _groups(channels: Sequence[Channel]) -> list[list[int]]:
    """Channels that collate, together; the rest alone."""
    signatures: dict[tuple, list[int]] = {}
    for k, channel in enumerate(channels):
        shapes = tuple(tuple(t.shape[1:]) for t in channel.field.likelihood.tensors())
        signatures.setdefault(shapes, []).append(k)
    groups: list[list[int]] = []
    for group in signatures.values():
        try:
            collate([channels[k].field.likelihood for k in group])
            groups.append(group)
        except ShapeError:
            groups += [[k] for k in group]
    return groups


def _scaled(progress: Callable[[float], None] | None, start: float, share: float) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(start + share * done / total)


def _answer(channel: Channel, result: Result, row: int, target_fwhm: float | None, seed: int) -> Answer:
    field, samples = channel.field, result.samples[row]
    residuals = field.likelihood.residuals(samples.mean(0, keepdim=True))
    return Answer(
        samples=field.inner(smooth_to(samples, field, target_fwhm)),
        information=None if result.information is None else field.inner(result.information[row]),
        residuals=tuple(r[0, 0].numpy() for r in residuals),
        chi2=float(result.chi2[row]),
        data=int(sum(int(n.sum()) for n in field.likelihood.good())),
        calls=result.network_calls,
        indefinite=result.indefinite,
        judgement=judge(field, samples, channel.exposures, channel_seed(seed, channel), channel.held),
    )


def smooth_to(samples: Tensor, field: Field, target_fwhm: float | None) -> Tensor:
    """Images on the canvas (M, C, H, W) convolved from the prior's PSF to a wider Gaussian: FWHM² = target² − prior's².

        x̂'(f) = x̂(f) exp(−2π²s²|f|²),   s the σ of the difference in pixels,

    of the image with zeros around it. Pixels would not hold a stamp of a Gaussian as narrow as s can be.
    """
    check_target(target_fwhm, field.target_fwhm)
    if target_fwhm is None or math.isclose(target_fwhm, field.target_fwhm):
        return samples
    spread = math.sqrt(target_fwhm**2 - field.target_fwhm**2) * FWHM_TO_SIGMA / field.canvas.pixel_scale
    height, width = samples.shape[-2:]
    shape = tuple(n + math.ceil(6 * spread) + 8 for n in (height, width))
    frequencies = torch.fft.fftfreq(shape[0])[:, None], torch.fft.rfftfreq(shape[1])
    transfer = torch.exp(-2 * (math.pi * spread) ** 2 * (frequencies[0] ** 2 + frequencies[1] ** 2)).to(samples)
    smooth = torch.fft.irfft2(torch.fft.rfft2(samples, s=shape) * transfer, s=shape)
    return smooth[..., :height, :width]


def check_target(target_fwhm: float | None, prior_fwhm: float) -> None:
    """Refuse a resolution (FWHM in arcsec, None: the prior's) that the prior's images do not have.

    Raises: ConfigError if it is sharper than theirs.
    """
    if target_fwhm is not None and target_fwhm < prior_fwhm and not math.isclose(target_fwhm, prior_fwhm):
        raise ConfigError(
            f"output.target_psf: the prior's images have {prior_fwhm:g}″ FWHM, {target_fwhm:g}″ is sharper; "
            "give a wider target or a sharper prior."
        )


def build_product(
    observation: SkyObservation,
    channels: Sequence[Channel],
    answers: Sequence[Answer],
    provenance: Provenance,
    *,
    save_samples: bool,
) -> Product:
    """The record of an object from the draws of its channels."""
    samples = torch.cat([a.samples for a in answers], 1)
    grid, names = channels[0].field.grid, tuple(n for c in channels for n in c.names)
    resolution = (provenance.target_fwhm, channels[0].field.target_fwhm)
    levels = [p for p in LEVELS if holds_quantile(p, len(samples))]
    seen = [
        _exposure(band, residual, channel.mixture(number))
        for channel, answer in zip(channels, answers)
        for number, (band, residual) in enumerate(zip(channel.exposures, answer.residuals))
    ]
    extra = _quantile_note(levels, len(samples))
    return Product(
        object_id=observation.object_id,
        bands=names,
        unit=observation.bands[0].unit,
        grid=grid,
        mean=samples.mean(0).numpy(),
        std=samples.std(0).numpy(),
        quality=np.concatenate([_quality(c, a) for c, a in zip(channels, answers)]),
        provenance=provenance,
        quantiles={p: quantile(samples, p, dim=0).numpy() for p in levels},
        information=_information(answers),
        samples=samples.numpy() if save_samples else None,
        exposures=tuple(seen),
        target_psf=_target_psf(provenance.target_fwhm, grid.pixel_scale),
        catalog=catalog(names, samples, grid.pixel_scale, [a.chi2 for a, c in zip(answers, channels) for _ in c.names])
        | known_columns([(a.judgement, len(c.names)) for a, c in zip(answers, channels)]),
        notes=tuple(dict.fromkeys([*observation.notes, *extra, *_field_notes(channels), *_solver_notes(answers)])),
        zeropoint=tuple(channel.zeropoint(name) for channel in channels for name in channel.names),
        truth=find_truth(observation.truths, names, grid, *resolution),
    )


def _information(answers: Sequence[Answer]) -> np.ndarray | None:
    maps = [a.information for a in answers]
    return None if any(m is None for m in maps) else torch.cat(maps).numpy()


def _quantile_note(levels: Sequence[float], draws: int) -> tuple[str, ...]:
    missing = [f"{p:g}" for p in LEVELS if p not in levels]
    return (f"quantiles {', '.join(missing)} not written: {draws} draws cannot hold them",) if missing else ()


def _field_notes(channels: Sequence[Channel]) -> list[str]:
    return [note for channel in channels for note in (*channel.field.notes, *channel.mixtures())]


def _solver_notes(answers: Sequence[Answer]) -> tuple[str, ...]:
    share = max(a.indefinite for a in answers)
    if share <= MOST_INDEFINITE:
        return ()
    remedy = "data may count for too little; sampler.guidance.name=moment_matching (GMRES) solves them"
    return (f"{share:.1%} of the guidance's solves met negative curvature: {remedy}",)


def make_provenance(answers: Sequence[Answer], prior: Prior, method: Method, **identity: str | int | float) -> Provenance:
    """Who made a product, and how well it fits: χ² of all channels together."""
    data = sum(a.data for a in answers)
    return Provenance(
        prior=prior.card.name,
        weights_sha256=prior.digest,
        sampler=describe_method(method),
        calibration="uncalibrated",
        draws=answers[0].samples.shape[0],
        network_calls=float(np.mean([a.calls for a in answers])),
        chi2=sum(a.chi2 * a.data for a in answers) / data if data else math.nan,
        **identity,
    )


def _target_psf(fwhm: float, pixel_scale: float) -> np.ndarray:
    pixels = fwhm / pixel_scale
    return gaussian_stamp(pixels, 2 * math.ceil(2 * pixels) + 1)


def _exposure(band: Band, residual: np.ndarray, weights: tuple[float, ...]) -> Exposure:
    psf_scale = band.grid.pixel_scale / band.psf.oversample
    image = np.where(band.good, band.image, np.nan)
    noise = float(np.median(band.variance[band.good])) ** 0.5 if band.good.any() else math.nan
    return Exposure(band.name, band.instrument, residual, band.grid, band.psf.stamp, psf_scale, image, noise, weights)


def _quality(channel: Channel, answer: Answer) -> np.ndarray:
    """Bits of the output pixels: no good or only saturated native pixel at their centre; χ² of the mean too large."""
    grid = channel.field.grid
    quality = np.zeros((len(channel.names), *grid.shape), dtype=np.int32)
    for row in range(len(channel.names)):
        mine = [b for b, share in zip(channel.exposures, channel.weights[:, row], strict=True) if share]
        seen = np.any([_at_centres(grid, b.grid, b.good) for b in mine], axis=0) if mine else np.zeros(grid.shape, dtype=bool)
        saturated = np.any([_at_centres(grid, b.grid, b.saturated) for b in mine], axis=0) if mine else np.zeros_like(seen)
        quality[row] |= np.where(seen, 0, Quality.EXTRAPOLATED) | np.where(saturated, Quality.SATURATED, 0)
    if answer.information is not None:
        quality |= np.where(answer.information.numpy() < INFORMED, Quality.PRIOR_DRIVEN, 0)
    quality |= np.where(answer.judgement.flagged, Quality.PRIOR_DRIVEN, 0)
    if answer.chi2 > 1 + CHI2_SIGMAS * math.sqrt(2 / max(answer.data, 1)):
        quality |= Quality.CHI2_BAD
    return quality


def _at_centres(grid: SkyGrid, native: SkyGrid, mask: np.ndarray) -> np.ndarray:
    """The native mask at the centres of the output pixels, False outside: (H, W)."""
    affine = grid.affine_to(native)
    centres = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1)
    row, column = np.moveaxis(np.rint(centres @ affine.matrix.T + affine.offset).astype(int), -1, 0)
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    return inside & mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)]


def find_truth(truths: Sequence[Plane], names: Sequence[str], grid: SkyGrid, fwhm: float, prior_fwhm: float) -> np.ndarray | None:
    """The `TRUTH` planes of a simulated observation (C, H, W), if there is one a band, on this grid and at this resolution.

    Arguments: fwhm: of the answer's PSF, arcsec. prior_fwhm: of the prior's images, and of a truth without `TPSFFWHM`.
    Returns: the planes, else None.
    """
    planes = {str(p.header.get("BAND", "")): p for p in truths}
    if not all(name in planes and planes[name].data.shape == grid.shape for name in names):
        return None
    if not np.allclose([float(planes[name].header.get("TPSFFWHM", prior_fwhm)) for name in names], fwhm, rtol=1e-3, atol=0):
        return None
    scales = [SkyGrid.from_header(planes[name].header, grid.shape).pixel_scale for name in names]
    return np.stack([planes[name].data for name in names]) if np.allclose(scales, grid.pixel_scale, rtol=1e-3) else None
