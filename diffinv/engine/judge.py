"""What can be said of an answer without the truth: whether data look like data of its draws, and which features are the prior's.

Both are made when an object is sampled, while its likelihood is at hand, and stored in the product.
Invariant: a judgement depends on the draws, the data and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.data.forward import Field
from diffinv.data.observation import Band
from diffinv.data.psf import FWHM_TO_SIGMA
from diffinv.likelihood import Likelihood
from diffinv.uncertainty.held_out import likelihood_tables
from diffinv.uncertainty.nulls import two_sided, upper_tail
from diffinv.uncertainty.predictive import predictive_table
from diffinv.uncertainty.prior_driven import Feature, Rule, prior_driven
from diffinv.uncertainty.second_prior import SecondPrior

REPLICATES = 199  # of an object's data: p-values down to 0.01


@dataclass(frozen=True, eq=False)
class Judgement:
    """Of one channel.

    signal_to_noise: of the data, √(Σ y²/σ² − m) over m good data, 0 where there is less than noise. chi2_draw: whitened χ² a good
    datum of one draw chosen at random. chi2_p: its p-value among data sets drawn from it, two-sided. features: of every band.
    flagged: (C, H, W) bool, pixels of features that are `PRIOR_DRIVEN`, on the output grid. psf_fwhm: arcsec, of the sharpest
    exposure. data_scale: arcsec a data pixel of it. noise_std: median σ of a good data pixel. correlated: whether the noise
    of any is. pit_shape_p, pit_width_p: p-values of the PIT of held-out data, NaN where none were.
    """

    signal_to_noise: float
    chi2_draw: float
    chi2_p: float
    features: tuple[tuple[Feature, ...], ...]
    flagged: np.ndarray
    psf_fwhm: float
    data_scale: float
    noise_std: float
    correlated: bool
    pit_shape_p: float = float("nan")
    pit_width_p: float = float("nan")


def signal_to_noise(likelihood: Likelihood) -> float:
    """√(Σ y²/σ² − m) of the m good data of one image; 0 where the data have less than their noise."""
    zero = torch.zeros(1, *likelihood.image_shape)
    power = sum(float(r.double().pow(2).sum()) for r in likelihood.residuals(zero))
    return max(power - sum(float(n.sum()) for n in likelihood.good()), 0.0) ** 0.5


def judge(field: Field, samples: Tensor, exposures: Sequence[Band], seed: int, held: Likelihood | None = None) -> Judgement:
    """The judgement of draws (M, C, H, W) on the canvas, in the image's unit.

    Arguments: exposures: the data. seed: of the object. held: data that no draw has seen, or None.
    """
    likelihood, sharpest = field.likelihood, min(exposures, key=_fwhm)
    noise_std = float(np.median(sharpest.variance[sharpest.good])) ** 0.5 if sharpest.good.any() else float("nan")
    correlated = any(band.noise_correlation is not None for band in exposures)
    regime = (_fwhm(sharpest), sharpest.grid.pixel_scale, noise_std, correlated)
    if not sum(int(n.sum()) for n in likelihood.good()):
        empty = np.zeros((samples.shape[1], *field.grid.shape), dtype=bool)
        return Judgement(0.0, float("nan"), float("nan"), ((),) * samples.shape[1], empty, *regime)
    table = predictive_table(likelihood, samples[None], Rng.for_draws(seed, [0], 1), replicates=REPLICATES)
    outcome = two_sided(table[:, 0], table[:, 1:])
    features, flagged = find_features(field, samples, exposures)
    fit = (signal_to_noise(likelihood), float(table[0, 0]), float(outcome.p_value[0]))
    return Judgement(*fit, features, flagged, *regime, *_held_out(held, samples, seed))


def _held_out(held: Likelihood | None, samples: Tensor, seed: int) -> tuple[float, ...]:
    """p-values of shape (large, ≥ 1/(M + 1)) and width (two-sided, ≥ 2/(M + 1)) of the PIT among M replicates; NaN if none."""
    if held is None:
        return (float("nan"),) * 2
    shape, width = likelihood_tables(held, samples[None], Rng.for_draws(seed, [2], 1))
    outcomes = upper_tail(shape[:, 0], shape[:, 1:]), two_sided(width[:, 0], width[:, 1:])
    return tuple(float(outcome.p_value[0]) for outcome in outcomes)


def find_features(field: Field, samples: Tensor, exposures: Sequence[Band]) -> tuple[tuple[tuple[Feature, ...], ...], np.ndarray]:
    """Features finer than the sharpest PSF, band by band, and the pixels of those that are the prior's.

    Arguments: samples: (M, C, H, W) on the canvas. exposures: the data, for their PSF.
    Returns: features of every band, (C, H, W) bool on the output grid. Fewer than three draws have none.
    """
    flags = torch.zeros(samples.shape[1:], dtype=torch.bool)
    if len(samples) < 3:
        return ((),) * samples.shape[1], field.inner(flags).numpy()
    found = feature_maps(field.likelihood, samples, feature_rule(exposures, field.canvas.pixel_scale))
    for k, (labels, features) in enumerate(found):
        for feature in features:
            if feature.prior_driven:
                flags[k] |= labels == feature.label
    return tuple(features for _, features in found), field.inner(flags).numpy()


def feature_maps(likelihood: Likelihood, samples: Tensor, rule: Rule) -> list[tuple[Tensor, tuple[Feature, ...]]]:
    """Labels (H, W) and features of every band of one image under the prior swap; samples: (M, C, H, W), M ≥ 3."""
    second = SecondPrior.fitted(likelihood, samples)
    mean, found = second.mean()[0], []
    for k in range(samples.shape[1]):

        def null(image: Tensor, k: int = k) -> Tensor:
            whole = torch.zeros(1, *samples.shape[1:])
            whole[0, k] = image
            return second.null_part(whole)[0, k].double()

        found.append(prior_driven(samples[:, k], mean[k], null, rule))
    return found


def feature_rule(exposures: Sequence[Band], pixel_scale: float) -> Rule:
    """The rule's defaults, with features finer than the sharpest PSF. pixel_scale: of the output, arcsec."""
    return Rule(smooth=min(map(_fwhm, exposures)) * FWHM_TO_SIGMA / pixel_scale)


def _fwhm(band: Band) -> float:
    """Arcsec."""
    return band.psf.fwhm * band.grid.pixel_scale


def known_columns(judgements: Sequence[tuple[Judgement, int]]) -> dict[str, np.ndarray]:
    """Columns of a catalogue, a row a band: each channel's judgement with its number of bands."""
    rows = [(j, k) for j, bands in judgements for k in range(bands)]
    clear = lambda features: [f for f in features if f.signal_to_noise > 3]
    return {
        "sn": np.array([j.signal_to_noise for j, _ in rows]),
        "psf_fwhm": np.array([j.psf_fwhm for j, _ in rows]),
        "data_scale": np.array([j.data_scale for j, _ in rows]),
        "noise_std": np.array([j.noise_std for j, _ in rows]),
        "correlated": np.array([int(j.correlated) for j, _ in rows]),
        "chi2_draw": np.array([j.chi2_draw for j, _ in rows]),
        "chi2_p": np.array([j.chi2_p for j, _ in rows]),
        "pit_shape_p": np.array([j.pit_shape_p for j, _ in rows]),
        "pit_width_p": np.array([j.pit_width_p for j, _ in rows]),
        "features": np.array([len(clear(j.features[k])) for j, k in rows]),
        "features_flagged": np.array([sum(f.prior_driven for f in j.features[k]) for j, k in rows]),
    }
