"""The population of galaxies that truth images are drawn from, in pure numpy.

A scene (see `scenes`) is drawn as a main object of one of six kinds, measured (COSMOS fits, perturbed) or broad and
analytic in equal parts, with neighbours in a quarter of the fields and the look of a segmented stamp in some. The
population is deliberately broader than any survey's: sizes, concentrations, clumpiness, texture, number of sources and
centring all have long tails, because a prior cannot restore what its training set never showed.

Invariant: nothing here makes an image, and a scene is a function of the population and the Generator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from diffinv.data.scenes import (
    ZERO_POINT_AB,
    Component,
    Knots,
    PatternedDisc,
    Scene,
    Segmentation,
    Sersic,
    Stamp,
    Star,
    Texture,
)

FIELD_ARCSEC = 6.4
SERSIC_GRID = np.round(np.geomspace(0.5, 6.2, 25), 3)  # GalSim tabulates each index once: keep few of them


@dataclass(frozen=True, eq=False)
class CosmosSample:
    """Measured galaxies that the population imitates.

    Arguments:
        singles: (M, 3) Sersic index, half-light radius in arcsec, axis ratio.
        pairs: (K, 5) half-light radius and axis ratio of the disc, the same of the bulge, bulge fraction.
        magnitudes: (M,) AB magnitudes.
        stamps: images of galaxies with their noise, HST resolution, 0.03 arcsec a pixel.
        psfs: the PSF of each stamp, on the same pixels.
        weights: (len(stamps),) relative frequency of use.
    """

    singles: np.ndarray
    pairs: np.ndarray
    magnitudes: np.ndarray
    stamps: tuple[np.ndarray, ...]
    psfs: tuple[np.ndarray, ...]
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Population:
    """Probabilities and scales of the population; `kinds` are relative frequencies of the main object."""

    sample: CosmosSample
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "sersic": 0.22,
            "bulge_disc": 0.22,
            "irregular": 0.14,
            "patterned": 0.26,
            "stamp": 0.12,
            "star": 0.04,
        }
    )
    blend_fraction: float = 0.25
    segmented_fraction: float = 0.14
    centred_fraction: float = 0.65
    centre_scatter: float = 0.15
    median_radius: float = 0.40
    radius_scatter: float = 0.90
    magnitude_range: tuple[float, float] = (20.5, 24.5)

    def without_stamps(self) -> Population:
        """The same without re-observed real stamps, of which there are few, so that any set of galaxies has the same ones."""
        return replace(self, kinds={kind: share for kind, share in self.kinds.items() if kind != "stamp"})


def cosmos_sample(
    table: np.ndarray, stamps: list[np.ndarray], psfs: list[np.ndarray], *, excluded: tuple[int, ...] = ()
) -> CosmosSample:
    """The sample from the columns of GalSim's COSMOS parametric catalogue and from HST stamps.

    Arguments:
        table: structured (M,) with IDENT, mag_auto, sersicfit, bulgefit, hlr, flux, use_bulgefit.
        stamps: HST stamps with noise, 0.03 arcsec a pixel.
        psfs: one PSF per stamp.
        excluded: IDENT of galaxies to leave out (those of a validation set).

    Returns:
        A CosmosSample.

    Raises:
        ValueError: if the numbers of stamps and PSFs differ.
    """
    if len(stamps) != len(psfs):
        raise ValueError(f"cosmos_sample: {len(stamps)} stamps but {len(psfs)} PSFs; give one PSF per stamp.")
    table = table[~np.isin(table["IDENT"], excluded)]
    singles = np.stack([table["sersicfit"][:, 2], table["hlr"][:, 0], table["sersicfit"][:, 3]], 1)
    two = table[table["use_bulgefit"] == 1]
    fraction = two["flux"][:, 1] / (two["flux"][:, 1] + two["flux"][:, 2])
    pairs = np.stack([two["hlr"][:, 2], two["bulgefit"][:, 3], two["hlr"][:, 1], two["bulgefit"][:, 11], fraction], 1)
    weights = np.array([_stamp_contrast(stamp) for stamp in stamps])
    return CosmosSample(singles, pairs, table["mag_auto"], tuple(stamps), tuple(psfs), weights / weights.sum())


def _stamp_contrast(stamp: np.ndarray) -> float:
    """Peak over border scatter less 4, clipped to [0.05, 20]: bright stamps are used more often than noise."""
    border = np.concatenate([stamp[:3].ravel(), stamp[-3:].ravel(), stamp[:, :3].ravel(), stamp[:, -3:].ravel()])
    return float(np.clip(stamp.max() / max(border.std(), 1e-30) - 4, 0.05, 20))


def magnitude_to_flux(magnitude: float) -> float:
    """Flux in nJy of an AB magnitude: 10^(-0.4 (m - 31.4))."""
    return float(10 ** (-0.4 * (magnitude - ZERO_POINT_AB)))


def draw_scene(population: Population, rng: np.random.Generator) -> Scene:
    """One scene of the population.

    Arguments:
        population: probabilities and scales.
        rng: the only source of randomness.

    Returns:
        A Scene with total flux of the main object in nJy.
    """
    kind = _choose(population.kinds, rng)
    flux = magnitude_to_flux(_magnitude(population, rng))
    x, y = _position(population, rng)
    components = _placed(_BUILDERS[kind](population, rng), flux, x, y)
    if rng.random() < population.blend_fraction:
        components += _neighbours(population, rng, flux, x, y)
    segmented = kind != "stamp" and rng.random() < population.segmented_fraction
    return Scene(tuple(components), _segmentation(rng) if segmented else None)


def _choose(kinds: dict[str, float], rng: np.random.Generator) -> str:
    weights = np.array(list(kinds.values()))
    return list(kinds)[rng.choice(len(weights), p=weights / weights.sum())]


def _magnitude(population: Population, rng: np.random.Generator) -> float:
    """A measured magnitude with 0.5 mag of scatter; those outside the range are spread over its faint side."""
    low, high = population.magnitude_range
    magnitude = rng.choice(population.sample.magnitudes) + rng.normal(0, 0.5) + 0.5
    return float(magnitude if low < magnitude < high else high - (high - low) * rng.beta(1, 2))


def _position(population: Population, rng: np.random.Generator) -> tuple[float, float]:
    if rng.random() < population.centred_fraction:
        return tuple(rng.normal(0, population.centre_scatter, 2))
    return tuple(rng.uniform(-FIELD_ARCSEC / 2, FIELD_ARCSEC / 2, 2))


def _placed(components: list[Component], flux: float, x: float, y: float) -> list[Component]:
    total = sum(component.flux for component in components)
    return [replace(c, flux=c.flux * flux / total, x=c.x + x, y=c.y + y) for c in components]


def _neighbours(population: Population, rng: np.random.Generator, flux: float, x: float, y: float) -> list[Component]:
    """One to four more objects, flux ratios log-uniform in 1..30: half of them close (a merger), half anywhere."""
    components: list[Component] = []
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.5, 0.25, 0.15, 0.1])):
        kind = _choose(population.kinds, rng)
        ratio = np.exp(rng.uniform(0, np.log(30)))
        if rng.random() < 0.5:
            centre = np.array([x, y]) + rng.normal(0, rng.uniform(0.2, 0.9), 2)
        else:
            centre = rng.uniform(-FIELD_ARCSEC / 2, FIELD_ARCSEC / 2, 2)
        components += _placed(_BUILDERS[kind](population, rng), flux / ratio, *centre)
    return components


def _segmentation(rng: np.random.Generator) -> Segmentation:
    noise = np.exp(rng.uniform(np.log(0.004), np.log(0.12)))
    return Segmentation(noise, rng.uniform(0.8, 2.5), rng.uniform(0.05, 0.12), int(rng.integers(2**31)))


def _radius(population: Population, rng: np.random.Generator, largest: float = 2.5) -> float:
    radius = population.median_radius * np.exp(population.radius_scatter * rng.normal())
    return float(np.clip(radius, 0.04, largest))


def _axis_ratio(rng: np.random.Generator, thickness: float) -> float:
    """Apparent axis ratio of a randomly inclined oblate disc: q^2 = q0^2 + (1 - q0^2) cos^2 i."""
    return float(np.sqrt(thickness**2 + (1 - thickness**2) * rng.random() ** 2))


def _on_grid(index: float) -> float:
    return float(SERSIC_GRID[np.argmin(np.abs(np.log(SERSIC_GRID / index)))])


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, np.pi))


def _sersic(population: Population, rng: np.random.Generator) -> list[Component]:
    """A measured profile perturbed, or one from broad analytic distributions."""
    if rng.random() < 0.5:
        index, radius, ratio = population.sample.singles[rng.integers(len(population.sample.singles))]
        index, radius = index * np.exp(rng.normal(0, 0.2)), radius * np.exp(rng.normal(0, 0.4))
        ratio = ratio + rng.normal(0, 0.1)
    else:
        index = np.exp(rng.uniform(np.log(0.5), np.log(6.2)))
        radius = _radius(population, rng, 2.5 if index < 3 else 1.5)
        ratio = _axis_ratio(rng, rng.uniform(0.12, 0.5))
    radius, ratio = np.clip(radius, 0.04, 2.5), np.clip(ratio, 0.12, 1.0)
    return [Sersic(1.0, _on_grid(index), float(radius), float(ratio), _angle(rng))]


def _bulge_disc(population: Population, rng: np.random.Generator) -> list[Component]:
    """An exponential disc and a bulge (index 1..5), sometimes with knots on the disc."""
    if rng.random() < 0.5:
        disc, ratio, bulge, bulge_ratio, fraction = population.sample.pairs[rng.integers(len(population.sample.pairs))]
        disc, bulge = disc * np.exp(rng.normal(0, 0.4)), bulge * np.exp(rng.normal(0, 0.4))
        ratio, bulge_ratio = ratio + rng.normal(0, 0.1), bulge_ratio + rng.normal(0, 0.1)
    else:
        disc = _radius(population, rng) * 1.2
        bulge = disc * np.exp(rng.uniform(np.log(0.08), np.log(0.8)))
        ratio, bulge_ratio = _axis_ratio(rng, 0.12), rng.uniform(0.4, 1.0)
        fraction = rng.beta(1.2, 1.8)
    disc, bulge = np.clip([disc, bulge], 0.04, 2.5)
    ratio, bulge_ratio = np.clip([ratio, bulge_ratio], 0.12, 1.0)
    angle, fraction = _angle(rng), float(np.clip(fraction, 0.01, 0.95))
    bulge_index = _on_grid(rng.choice([1.0, 2.0, 3.0, 4.0, 4.0, 5.0]))
    parts: list[Component] = [
        Sersic(1 - fraction, 1.0, float(disc), float(ratio), angle),
        Sersic(fraction, bulge_index, float(bulge), float(bulge_ratio), angle + rng.normal(0, 0.2)),
    ]
    return parts + ([_knots(rng, disc, ratio, angle)] if rng.random() < 0.4 else [])


def _knots(rng: np.random.Generator, radius: float, ratio: float, angle: float, *, share: float | None = None) -> Knots:
    """Star-forming knots that follow a disc of this half-light radius; their flux is relative to a host of flux 1."""
    count = int(np.exp(rng.uniform(0, np.log(40.99))))
    distance = radius * rng.gamma(2.0, 0.7, count)
    turn = rng.uniform(0, 2 * np.pi, count)
    u, v = distance * np.cos(turn), ratio * distance * np.sin(turn)
    width = np.exp(rng.uniform(np.log(0.02), np.log(0.25), count))
    brightness = (1 - rng.random(count)) ** -0.7 * width ** rng.uniform(0, 1.0)
    share = np.exp(rng.uniform(np.log(0.05), np.log(0.9))) if share is None else share
    dx, dy = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
    return Knots(share / (1 - share), dx, dy, width, brightness / brightness.sum())


def _irregular(population: Population, rng: np.random.Generator) -> list[Component]:
    """A faint textured disc and dominant knots."""
    radius, ratio, angle = _radius(population, rng, 1.5), _axis_ratio(rng, 0.25), _angle(rng)
    knots = _knots(rng, radius, ratio, angle, share=rng.uniform(0.2, 0.9))
    if rng.random() < 0.5:
        return [Sersic(1.0, _on_grid(rng.uniform(0.5, 1.3)), radius, ratio, angle), knots]
    return [_disc(rng, radius, ratio, angle), knots]


def _texture(rng: np.random.Generator) -> Texture:
    amplitude = rng.choice([0.0, rng.uniform(0.1, 0.6), rng.uniform(0.6, 1.6)], p=[0.25, 0.45, 0.3])
    return Texture(float(amplitude), rng.uniform(0.5, 3.5), rng.uniform(0.08, 1.0), int(rng.integers(2**31)))


def _disc(rng: np.random.Generator, radius: float, ratio: float, angle: float, *, arms: int = 0) -> PatternedDisc:
    """A disc of this half-light radius with each further feature present at random."""
    index = rng.uniform(0.4, 1.3)

    def maybe(probability: float, low: float, high: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < probability else 0.0

    return PatternedDisc(
        flux=1.0,
        scale=radius / 1.68**index,
        index=index,
        axis_ratio=ratio,
        angle=angle,
        arms=arms,
        pitch=rng.choice([-1, 1]) * np.deg2rad(rng.uniform(8, 45)),
        phase=rng.uniform(0, 2 * np.pi),
        contrast=np.exp(rng.uniform(np.log(0.5), np.log(12))) if arms else 0.0,
        sharpness=np.exp(rng.uniform(0, np.log(8))),
        bar_strength=maybe(0.3, 0.5, 4),
        bar_length=rng.uniform(0.5, 1.5),
        bar_ratio=rng.uniform(0.15, 0.45),
        bar_angle=_angle(rng),
        ring_strength=maybe(0.15, 0.3, 3),
        ring_radius=rng.uniform(0.8, 3),
        ring_width=rng.uniform(0.1, 0.5),
        dust_depth=maybe(0.6 if ratio < 0.35 else 0.15, 0.3, 0.97),
        dust_offset=rng.normal(0, 0.15),
        dust_width=rng.uniform(0.05, 0.25),
        lopsidedness=maybe(0.4, 0.1, 0.95),
        lopsided_angle=rng.uniform(0, 2 * np.pi),
        bend=rng.choice([-1, 1]) * maybe(0.2, 0.05, 0.3),
        texture=_texture(rng),
    )


def _patterned(population: Population, rng: np.random.Generator) -> list[Component]:
    """Spiral, barred, ringed, dusty, lopsided or textured disc with an optional bulge and optional knots."""
    radius, angle = _radius(population, rng) * 1.4, _angle(rng)
    radius = float(np.clip(radius, 0.08, 2.2))
    ratio = rng.uniform(0.1, 0.3) if rng.random() < 0.15 else _axis_ratio(rng, 0.15)
    arms = int(rng.choice([0, 1, 2, 3, 4], p=[0.35, 0.05, 0.4, 0.1, 0.1]))
    parts: list[Component] = [_disc(rng, radius, ratio, angle, arms=arms)]
    if rng.random() < 0.5:
        share = rng.beta(1, 3)
        bulge = float(np.clip(radius * rng.uniform(0.08, 0.4), 0.04, 1.0))
        parts.append(Sersic(share, _on_grid(rng.uniform(1, 4)), bulge, max(ratio, rng.uniform(0.4, 1.0)), angle))
    return parts + ([_knots(rng, radius, ratio, angle)] if rng.random() < 0.35 else [])


def _stamp(population: Population, rng: np.random.Generator) -> list[Component]:
    number = int(rng.choice(len(population.sample.stamps), p=population.sample.weights))
    dilation = float(np.exp(rng.uniform(np.log(0.6), np.log(2))))
    return [Stamp(1.0, number, rng.uniform(1.0, 3.0), rng.uniform(0, 2 * np.pi), bool(rng.random() < 0.5), dilation)]


def _star(population: Population, rng: np.random.Generator) -> list[Component]:
    """An unresolved source or a galaxy that is barely resolved."""
    if rng.random() < 0.5:
        return [Star(1.0)]
    return [Sersic(1.0, _on_grid(rng.uniform(0.5, 4)), rng.uniform(0.02, 0.08), rng.uniform(0.3, 1.0), _angle(rng))]


_BUILDERS: dict[str, Callable[[Population, np.random.Generator], list[Component]]] = {
    "sersic": _sersic,
    "bulge_disc": _bulge_disc,
    "irregular": _irregular,
    "patterned": _patterned,
    "stamp": _stamp,
    "star": _star,
}
