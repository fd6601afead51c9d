"""What the prior is asked about: an object's bands as fields.

A grey prior answers band by band. A prior with named bands answers all of them at once; data in another band must be said to be
a mixture of them, and are refused otherwise. All bands share one output grid, that of the first in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffinv.core.checks import ConfigError, InputError
from diffinv.core.rng import Rng
from diffinv.data.forward import Field, build_field
from diffinv.data.grids import SkyGrid, output_grid
from diffinv.data.observation import Band, SkyObservation, edge_light
from diffinv.engine.names import stable_hash
from diffinv.likelihood import Likelihood
from diffinv.priors.store import Prior, PriorCard
from diffinv.uncertainty.held_out import split_likelihood

GREY = ("grey",)
Mixing = Mapping[str, Mapping[str, float]]
_SLACK = 0.01  # of the sum of weights


@dataclass(frozen=True, eq=False)
class Channel:
    """What one call of the prior answers: its bands, their exposures and the field.

    weights: (exposures, names) of each band in each exposure. held: data that judge it, or None.
    """

    names: tuple[str, ...]
    exposures: tuple[Band, ...]
    field: Field
    weights: np.ndarray
    held: Likelihood | None = None

    def mixture(self, number: int) -> tuple[float, ...]:
        """Of an exposure that is a mixture of the bands: their weights; () otherwise."""
        mixed = self.exposures[number].name not in self.names
        return tuple(float(w) for w in self.weights[number]) if mixed else ()

    def mixtures(self) -> list[str]:
        """What each mixture is made of, in words."""
        found = {band.name: self.mixture(k) for k, band in enumerate(self.exposures)}
        said = lambda weights: " + ".join(f"{w:g} {n}" for w, n in zip(weights, self.names, strict=True) if w)
        return [f"{name} = {said(weights)}" for name, weights in found.items() if weights]

    def zeropoint(self, name: str) -> float | None:
        """Of a band: of its own exposures, or of those that are mixed of it; without any, of the first."""
        shares = dict(zip(self.exposures, self.weights[:, self.names.index(name)], strict=True))
        return max(self.exposures, key=lambda band: (band.name == name, shares[band] != 0)).zeropoint


def build_channels(
    observation: SkyObservation, prior: Prior, *, margin: int | None, mixing: Mixing | None = None
) -> tuple[Channel, ...]:
    """The fields that the prior is asked about.

    Arguments: margin: output pixels around the field, or None for `default_margin`. mixing: data band → prior band → weight,
    of bands that the prior does not have, as `check_mixing` accepts it.
    Raises: InputError if a band is neither one of the prior's nor mixed of them, or grids do not fit.
    """
    exposures = observation.exposures()
    grid = output_grid(observation.bands[0].grid, prior.card.pixel_scale)
    if margin is None:
        margin = default_margin(observation.bands, grid, prior.card)
    if prior.card.bands == GREY:
        return tuple(
            Channel((name,), bands, _field(bands, grid, prior, margin, None), np.ones((len(bands), 1)))
            for name, bands in exposures.items()
        )
    rows = np.array([_weights(band.name, prior, mixing or {}) for band in observation.bands])
    _check_units(observation.bands)
    return (Channel(prior.card.bands, observation.bands, _field(observation.bands, grid, prior, margin, rows), rows),)


def check_mixing(mixing: Mixing, card: PriorCard) -> None:
    """Refuse weights that no object could be sampled with.

    Raises: ConfigError for a prior that sees one band at a time, a band that it has, a weight of one that it does not have,
    and weights that are negative or do not add up to 1 (within 1 %), as those of a mean over a filter do.
    """
    if mixing and card.bands == GREY:
        raise ConfigError(f"input.mixing: the prior {card.name} is grey and sees one band at a time; leave it out.")
    known = ", ".join(card.bands)
    for band, weights in mixing.items():
        unknown = [name for name in weights if name not in card.bands]
        if band in card.bands:
            raise ConfigError(f"input.mixing: {band} is a band of the prior {card.name} ({known}); leave it out.")
        if unknown:
            raise ConfigError(
                f"input.mixing: {band} has a weight for {unknown[0]}, but the prior {card.name} knows only {known}."
            )
        total = sum(weights.values())
        if min(weights.values()) < 0 or abs(total - 1) > _SLACK:
            raise ConfigError(
                f"input.mixing: the weights of {band} are {', '.join(f'{w:g}' for w in weights.values())}; flux per frequency "
                "through a broad filter is a mean: give weights from 0, with the sum 1."
            )


def _check_units(bands: Sequence[Band]) -> None:
    """A prior of several bands knows colours: fluxes must be in one unit."""
    if len(bands) == 1:
        return
    for band in bands:
        other = next((b for b in bands if b.zeropoint != band.zeropoint), None)
        if other is not None:
            raise InputError(
                f"zero point mismatch: band {band.name} has {band.zeropoint} and {other.name} {other.zeropoint}, but the prior "
                "knows colours; bring all to one."
            )
        if band.zeropoint is None and not band.unit.lower().endswith("jy"):
            raise InputError(
                f"band {band.name}: the prior knows colours, but nothing says what flux one {band.unit or 'unit'} is; give "
                "input.zeropoint, or images in nJy."
            )


def _weights(band: str, prior: Prior, mixing: Mixing) -> list[float]:
    """Of the prior's bands in a band of the data."""
    bands = prior.card.bands
    if band not in bands and band not in mixing:
        raise InputError(
            f"band {band}: the prior {prior.card.name} knows only {', '.join(bands)}; name them with input.bands, "
            "or say with input.mixing what it is made of."
        )
    weights = mixing.get(band, {band: 1.0})
    return [float(weights.get(name, 0.0)) for name in bands]


def _field(bands: Sequence[Band], grid: SkyGrid, prior: Prior, margin: int, mixing: np.ndarray | None) -> Field:
    card = prior.card
    return build_field(
        bands,
        pixel_scale=card.pixel_scale,
        target_fwhm=card.target_fwhm,
        margin=margin,
        mixing=mixing,
        smallest=card.size,
        grid=grid,
    )


def default_margin(bands: Sequence[Band], grid: SkyGrid, card: PriorCard) -> int:
    """Output pixels that the canvas of all bands needs around `grid`.

    At least as many as give every data pixel's centre a place on the canvas, but not more than the side of the prior's field; and
    the widest PSF's FWHM where the field is larger than the prior's, or where light reaches the edge of a band, which would
    otherwise have to stand for what shines in from outside. A smaller field with dark edges is cheaper without. A few pixels more
    where the prior then sees the canvas in one pass.
    """
    margin = min(max(_overhang(band.grid, grid) for band in bands), card.size)
    dark = not any(edge_light(band.image, band.variance, band.good) for band in bands)
    inside = all(round(n * band.grid.pixel_scale / grid.pixel_scale) <= card.size for band in bands for n in band.grid.shape)
    if not (dark and inside):
        margin = max(margin, *(math.ceil(band.psf.fwhm * band.grid.pixel_scale / grid.pixel_scale) for band in bands))
    wider = range(margin, margin + card.stride)
    return next((m for m in wider if card.sees([n + 2 * m for n in grid.even().shape])), margin)


def _overhang(native: SkyGrid, grid: SkyGrid) -> int:
    """Pixels of `grid` by which the outermost pixel centres of `native` lie outside of it."""
    affine = native.affine_to(grid)
    corners = np.array([(r, c) for r in (0, native.shape[0] - 1) for c in (0, native.shape[1] - 1)])
    places = corners @ affine.matrix.T + affine.offset
    excess = max(float((-0.5 - places).max()), float((places + 0.5 - grid.shape).max()))
    return max(0, math.ceil(excess - 1e-6))


def channel_seed(seed: int, channel: Channel) -> int:
    """Of what is drawn for one channel of an object beside its posterior."""
    return seed ^ stable_hash("+".join(channel.names))


def split_channel(channel: Channel, seed: int, share: float) -> Channel:
    """The channel with this share of its data's information held out.

    Raises: UnsupportedError where the noise cannot be split.
    """
    kept, held = split_likelihood(channel.field.likelihood, Rng.for_draws(channel_seed(seed, channel), [1], 1), share=1 - share)
    note = f"{'+'.join(channel.names)}: draws see {1 - share:.0%} of the information of the data, the rest judges them"
    field = replace(channel.field, likelihood=kept, notes=(*channel.field.notes, note))
    return replace(channel, field=field, held=held)
