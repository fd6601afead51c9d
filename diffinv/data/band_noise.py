"""The noise of a cube whose file does not say it: given as a number, or measured from what other channels cannot predict.

Spectra of a scene are mixtures of a few, so that a channel is a linear function of the others but for noise. With R the
covariance of the channels over N spectra, the residual of channel k about its least-squares prediction by the others has the
variance

    σ_k² = 1 / ((R⁻¹)_kk),   R = Σ (y − ȳ)(y − ȳ)ᵀ / (N − K)

of which noise that the prediction takes over from the other channels is a part, small where channels are many.

References: Roger & Arnold, *Reliably estimating the noise in AVIRIS hyperspectral images*, 1996; Bioucas-Dias & Nascimento,
*Hyperspectral subspace identification*, 2008.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube

_SPECTRA_A_CHANNEL = 5  # the fewest: the estimate's relative error is then 1/√(2 (N − K)) < 6 % of 40 channels


def channel_noise(spectra: np.ndarray) -> np.ndarray:
    """σ of each channel, (K,), of spectra (N, K).

    Raises: InputError if there are fewer than five spectra a channel, or a channel that others predict exactly.
    """
    count, channels = spectra.shape
    if count < _SPECTRA_A_CHANNEL * channels:
        raise InputError(
            f"{count} whole spectra of {channels} channels are too few to measure noise; give noise_std as a number."
        )
    centred = spectra - spectra.mean(0)
    scale = np.sqrt((centred**2).mean(0))
    if not (scale > 0).all():
        raise InputError(f"channel {int(np.argmin(scale))} is the same everywhere; leave it out with window, or give noise_std.")
    covariance = (centred / scale).T @ (centred / scale) / (count - channels)
    if np.linalg.cond(covariance) > 1e13:
        raise InputError("channels are exact functions of others, so that noise cannot be measured; give noise_std as a number.")
    return scale / np.sqrt(np.linalg.inv(covariance).diagonal())


def with_noise(cube: Cube, noise: float | str) -> Cube:
    """The cube with a variance.

    Arguments: noise: σ of every value in the cube's unit, or "estimate" for one a channel, measured over whole spectra.
    Raises: InputError if the cube has a variance, or the noise cannot be measured.
    """
    if cube.variance is not None:
        raise InputError("noise_std would replace the file's variance; leave it out.")
    if noise == "estimate":
        whole = cube.mask.all(0)
        std = channel_noise(cube.data[:, whole].T.astype(np.float64))
    else:
        std = np.full(len(cube.data), float(noise))
    return replace(cube, variance=np.where(cube.mask, (std**2)[:, None, None], 0.0))
