"""Scenes in several bands: the reference as it was, colours as measured, parts redder and bluer as said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffinv.data.colours import Colours, in_bands, measured_colours
from diffinv.data.galaxies import Population, draw_scene
from diffinv.data.scenes import Knots, Scene, Sersic, Star
from diffinv.engine.mocks import analytic_sample

BANDS = ("g", "r", "i")
MEASURED = np.array([[0.2, 0.1, 0.0], [0.8, 0.35, 0.0], [1.4, 0.5, 0.0]])
COLOURS = Colours(BANDS, "i", MEASURED)
DISC, BULGE = Sersic(60.0, 1.0, 0.5, 0.6, 0.3), Sersic(40.0, 4.0, 0.2, 0.9, 0.3)
KNOTS = Knots(20.0, np.array([0.1]), np.array([0.2]), np.array([0.05]), np.ones(1))


def seen(*components: object, seed: int = 0, colours: Colours = COLOURS) -> tuple[Scene, ...]:
    return in_bands(Scene(tuple(components)), colours, np.random.default_rng(seed))


def colour(scenes: tuple[Scene, ...], number: int = 0) -> float:
    """g − i of a component."""
    return -2.5 * np.log10(scenes[0].components[number].flux / scenes[2].components[number].flux)


def test_the_reference_band_is_the_scene_and_a_seed_repeats_all() -> None:
    population = Population(analytic_sample(np.random.default_rng(0)))
    population = replace(population, kinds={k: v for k, v in population.kinds.items() if k != "stamp"})
    for number in range(30):
        scene = draw_scene(population, np.random.default_rng(number))
        one, two = (in_bands(scene, COLOURS, np.random.default_rng(7)) for _ in range(2))
        kept = sorted(c.flux for c in one[2].components)
        np.testing.assert_allclose(kept, sorted(c.flux for c in scene.components), rtol=1e-12)
        assert [c.flux for c in one[0].components] == [c.flux for c in two[0].components]


def test_single_objects_have_the_measured_colours_with_the_scatter() -> None:
    exact = replace(COLOURS, scatter=0.0)
    found = np.array([colour(seen(Star(10.0), seed=k, colours=exact)) for k in range(300)])
    near = np.abs(found[:, None] - MEASURED[:, 0]).min(1)
    assert near.max() < 0.05 * 5  # what is independent of the locus
    assert {int(np.abs(f - MEASURED[:, 0]).argmin()) for f in found} == {0, 1, 2}
    wide = np.array([colour(seen(Star(10.0), seed=k)) for k in range(3000)])
    assert wide.std() == pytest.approx(np.sqrt(MEASURED[:, 0].std() ** 2 + 0.15**2 + 0.05**2), rel=0.05)


def test_bulges_are_redder_and_knots_bluer_than_their_disc_by_the_half_normal() -> None:
    redder = np.array([(s := seen(DISC, BULGE, seed=k)) and colour(s, 1) - colour(s, 0) for k in range(2000)])
    bluer = np.array([(s := seen(DISC, KNOTS, seed=k)) and colour(s, 0) - colour(s, 1) for k in range(2000)])
    for departure in (redder, bluer):
        assert departure.min() >= -1e-9
        assert np.sqrt((departure**2).mean()) == pytest.approx(COLOURS.parts, rel=0.06)


def test_a_bulge_is_redder_whichever_band_is_the_reference() -> None:
    by_g = replace(COLOURS, reference="g", measured=MEASURED - MEASURED[:, :1])
    np.testing.assert_allclose(by_g.locus, COLOURS.locus - 1.0, atol=1e-12)
    s = seen(DISC, BULGE, seed=4, colours=by_g)
    assert colour(s, 1) > colour(s, 0)


def test_parts_share_a_colour_and_neighbours_do_not() -> None:
    together = [colour(s, 0) - colour(s, 1) for k in range(50) for s in [seen(DISC, DISC, seed=k)]]
    assert np.abs(together).max() < 1e-9
    apart = [colour(s, 0) - colour(s, 1) for k in range(50) for s in [seen(DISC, replace(DISC, x=1.0), seed=k)]]
    assert np.std(apart) > 0.3


def test_the_locus_is_the_regression_on_the_band_that_varies_most() -> None:
    slope = np.polyfit(MEASURED[:, 0], MEASURED[:, 1], 1)[0]
    np.testing.assert_allclose(COLOURS.locus, [1.0, slope, 0.0], atol=1e-12)


def test_measured_colours_come_from_the_catalogue_without_wrong_matches() -> None:
    kinds = [("HSC_g", "f4"), ("HSC_r", "f4"), ("HSC_i", "f4")]
    table = np.array(
        [(24.0, 23.5, 23.0), (25.0, 24.5, 24.2), (30.0, 24.0, 23.0), (np.nan, 23.0, 22.0), (99.0, 99.0, 99.0)], dtype=kinds
    )
    found = measured_colours(table, BANDS, "i")
    np.testing.assert_allclose(found.measured, [[1.0, 0.5, 0.0], [0.8, 0.3, 0.0]], atol=1e-5)
    with pytest.raises(ValueError, match="HSC_u"):
        measured_colours(table, ("u", "i"), "i")
    with pytest.raises(ValueError, match="reference z"):
        measured_colours(table, BANDS, "z")
    with pytest.raises(ValueError, match="2 or more"):
        Colours(BANDS, "i", MEASURED[:1])
    with pytest.raises(ValueError, match="are the same"):
        Colours(BANDS, "i", MEASURED[[0, 0]])
