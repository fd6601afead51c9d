"""One scene in several bands, in pure numpy: what a prior of several bands learns from.

An object has a measured colour, and its parts depart from it along the locus of galaxies: bulges to the red, knots of young
stars to the blue. Dust lanes are deeper and arms stronger in the blue, and sizes differ a little between bands.

Invariant: a scene in a band is a scene like any other, that in the reference band the scene itself but for its segmentation,
and all are a function of the scene, the colours and the Generator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffinv.data.scenes import Component, Knots, PatternedDisc, Scene, Sersic, Stamp, Star

_BULGE_INDEX = 2.0  # Sersic index from which a part of an object is taken for its bulge
_BRIGHTEST, _FAINTEST = 5.0, 40.0  # mag, beyond which a number stands for none
_EXTREME = 3.0  # mag, beyond which a measured colour is taken for a wrong match
_INDEPENDENT = 0.05  # mag, of each band beside the locus
_EXTINCTION = 0.8  # of a dust lane in the bluest band over the reference's, less one (Cardelli, Clayton & Mathis 1989)


@dataclass(frozen=True, eq=False)
class Colours:
    """The colours that objects are given.

    Arguments: bands: names, by wavelength. reference: the band of a scene's fluxes, one of them. measured: (M, len(bands))
    magnitudes less that in the reference. What follows is in the band that varies most, mag but for the last: scatter of an
    object about a measured one; parts: scale of the half-normal by which a bulge is redder or knots are bluer than the rest;
    arms: largest extra contrast of arms; gradient: standard deviation of ln size from the reference.
    Raises: ValueError if the reference is not one of the bands, or shapes differ.
    """

    bands: tuple[str, ...]
    reference: str
    measured: np.ndarray
    scatter: float = 0.15
    parts: float = 0.4
    arms: float = 0.6
    gradient: float = 0.08

    def __post_init__(self) -> None:
        if self.reference not in self.bands:
            raise ValueError(f"Colours: reference {self.reference} is not one of the bands {', '.join(self.bands)}.")
        if self.measured.ndim != 2 or self.measured.shape[1] != len(self.bands) or len(self.measured) < 2:
            raise ValueError(f"Colours: measured is {self.measured.shape}; give (M, {len(self.bands)}), M of 2 or more.")
        if not self.measured.std(0).max() > 0:
            raise ValueError("Colours: all measured colours are the same; give some that differ.")

    @property
    def locus(self) -> np.ndarray:
        """(len(bands),) mag by which bands change together from a blue to a red object, 1 or −1 in that which varies most."""
        centred = self.measured - self.measured.mean(0)
        widest = centred[:, centred.std(0).argmax()]
        slope = centred.T @ widest / (widest @ widest)
        return slope if slope[0] >= slope[-1] else -slope


def measured_colours(table: np.ndarray, bands: tuple[str, ...], reference: str) -> Colours:
    """Of the columns `HSC_<band>` of the COSMOS stamps' catalogue; rows without them, or with absurd colours, are left out.

    Arguments: table: structured (M,). bands, reference: as `Colours`.
    Raises: ValueError for a band without a column, and as `Colours`.
    """
    missing = [band for band in bands if f"HSC_{band}" not in table.dtype.names]
    if missing:
        raise ValueError(f"measured_colours: no column HSC_{missing[0]}; bands are those of HSC, grizy.")
    magnitudes = np.stack([np.asarray(table[f"HSC_{band}"], dtype=float) for band in bands], 1)
    colours = magnitudes - magnitudes[:, [bands.index(reference)]] if reference in bands else magnitudes
    known = np.isfinite(magnitudes).all(1) & (magnitudes > _BRIGHTEST).all(1) & (magnitudes < _FAINTEST).all(1)
    return Colours(bands, reference, colours[known & (np.abs(colours) < _EXTREME).all(1)])


def in_bands(scene: Scene, colours: Colours, rng: np.random.Generator) -> tuple[Scene, ...]:
    """The scene as each band sees it, not segmented: outlines of segments are cut in one band alone."""
    objects: dict[tuple[float, float], list[Component]] = {}
    for component in scene.components:  # the parts of an object share its place
        objects.setdefault((component.x, component.y), []).append(component)
    bands: list[list[Component]] = [[] for _ in colours.bands]
    for parts in objects.values():
        for seen, found in zip(bands, zip(*_coloured(parts, colours, rng), strict=True), strict=True):
            seen.extend(found)
    return tuple(Scene(tuple(components)) for components in bands)


def _coloured(parts: list[Component], colours: Colours, rng: np.random.Generator) -> list[list[Component]]:
    """Each part of an object in each band."""
    locus, reference = colours.locus, colours.bands.index(colours.reference)
    own = _INDEPENDENT * rng.normal(size=len(locus))
    own[reference] = 0.0
    colour = colours.measured[rng.integers(len(colours.measured))] + own + colours.scatter * rng.normal() * locus
    gradient, arms = colours.gradient * rng.normal(), colours.arms * rng.random()
    found = []
    for part in parts:
        magnitudes = colour + _departure(part, len(parts) > 1, colours, rng) * locus
        found.append(
            [
                replace(_in_band(part, place, gradient, arms), flux=part.flux * 10 ** (-0.4 * magnitude))
                for place, magnitude in zip(locus, magnitudes, strict=True)
            ]
        )
    return found


def _departure(part: Component, several: bool, colours: Colours, rng: np.random.Generator) -> float:
    """Mag in the band that varies most by which a part is redder than its object."""
    size = colours.parts * abs(rng.normal())
    if isinstance(part, Knots):
        return -size
    return size if several and isinstance(part, Sersic) and part.index > _BULGE_INDEX else 0.0


def _in_band(part: Component, place: float, gradient: float, arms: float) -> Component:
    """The shape of a part in a band. place: of the band on the locus, 0 in the reference."""
    size = float(np.exp(gradient * place))
    if isinstance(part, Sersic):
        return replace(part, half_light_radius=part.half_light_radius * size)
    if isinstance(part, PatternedDisc):
        dust = 1 - (1 - part.dust_depth) ** (1 + _EXTINCTION * place)
        return replace(part, scale=part.scale * size, dust_depth=dust, contrast=part.contrast * 10 ** (0.4 * arms * place))
    assert isinstance(part, Knots | Star | Stamp)
    return part
