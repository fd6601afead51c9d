"""The noise of a cube whose file does not say it: given as a number, or measured from what other channels cannot predict.

Spectra of a scene are mixtures of a few, so that a channel is a linear function of the others but for noise. With R the
covariance of the channels over N spectra, the residual of channel k about its least-squares prediction by the others has the
variance

    σ_k² = 1 / ((R⁻¹)_kk),   R = Σ (y − ȳ)(y − ȳ)ᵀ / (N − K)

of which noise that the prediction takes over from the other channels is a part, small where channels are many more than the
spectra that mix. Noise must be independent from channel to channel: what neighbours share, as after resampling, is
taken for signal.

References: Roger, *Principal components transform with simple, automatic noise adjustment*, 1996; Bioucas-Dias & Nascimento,
*Hyperspectral subspace identification*, 2008.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.cubes import Cube

_SPECTRA_A_CHANNEL = 5  # the fewest: the estimate's relative error is then 1/√(2 (N − K)) < 6 % of 40 channels
_FEWEST_CHANNELS = 10  # with mixtures of three spectra σ is then 11 % too large in the median; of 4 channels, 37 %
_REMEDY = "give noise_std as a number"


def channel_noise(spectra: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """σ of each channel, (K,), of spectra (N, K).

    Arguments: numbers: of the channels, as a message names them; None counts from 1.
    Raises: InputError if there are fewer than five spectra a channel or ten channels, or one is a function of the others.
    """
    count, channels = spectra.shape
    if count < _SPECTRA_A_CHANNEL * channels or channels < _FEWEST_CHANNELS:
        raise InputError(f"{count} whole spectra of {channels} channels are too few to measure noise; {_REMEDY}.")
    still = np.ptp(spectra, axis=0) == 0
    if still.any():
        first = int(np.argmax(still))
        number = first + 1 if numbers is None else numbers[first]
        raise InputError(f"channel {number} is {spectra[0, first]:g} everywhere; {_REMEDY}.")
    centred = spectra - spectra.mean(0)
    scale = np.sqrt((centred**2).mean(0))
    covariance = (centred / scale).T @ (centred / scale) / (count - channels)
    if np.linalg.cond(covariance) > 1e13:
        raise InputError(f"channels are exact functions of others, so that noise cannot be measured; {_REMEDY}.")
    return scale / np.sqrt(np.linalg.inv(covariance).diagonal())


def with_noise(cube: Cube, noise: float | str) -> Cube:
    """The cube with a variance.

    Arguments: noise: σ of every value in the cube's unit, or "estimate" for one a channel, measured over spectra that are good in
        every channel that is good anywhere, and not 0 throughout.
    Raises: InputError if the cube has a variance, or the noise cannot be measured or squared.
    """
    if cube.variance is not None:
        raise InputError("noise_std would replace the file's variance; leave it out.")
    std = np.zeros(len(cube.data))
    if noise == "estimate":
        used = cube.mask.any((1, 2))
        whole = cube.mask[used].all(0) & (cube.data != 0).any(0)
        std[used] = channel_noise(cube.data[used][:, whole].T.astype(np.float64), np.flatnonzero(used) + 1)
    else:
        std[:] = float(noise)
    variance = np.where(cube.mask, (std**2)[:, None, None], 0.0)
    if not (np.isfinite(variance).all() and (variance[cube.mask] > 0).all()):
        raise InputError(f"noise_std is {noise}, whose square is 0 or infinite in double precision; scale the data.")
    return replace(cube, variance=variance)
