"""Cubes of benchmark B6: synthetic remnants at three count levels, with one and with two components.

A cube is a function of (seed, level, components): the scene of a seed is the same at every level, its noise is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffinv.data.remnants import MockCube, Remnant, draw_scene, observe, read_remnant

LEVELS = (86, 254, 852)  # median counts a pixel
SEEDS = tuple(range(10))
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def xray_folder() -> Path:
    """The X-ray data: under $DIFFINV_DATA, else under `shared/data` beside the checkout."""
    return Path(os.environ.get("DIFFINV_DATA", BESIDE)) / "xray"


@dataclass(frozen=True, eq=False)
class Case:
    """One cube. level: median counts a pixel. components: 1 (thermal) or 2 (with synchrotron)."""

    seed: int
    level: int
    components: int
    cube: MockCube


def draw_case(remnant: Remnant, seed: int, level: int, components: int, *, size: int = 64) -> Case:
    """The cube (seed, level, components) of `size` × `size` pixels in the channels of `remnant`."""
    scene = draw_scene(seed, size, components=components)
    return Case(seed, level, components, observe(scene, remnant, median=float(level), seed=1000 * seed + level))


def cases(components: int, *, seeds: tuple[int, ...] = SEEDS, levels: tuple[int, ...] = LEVELS) -> Iterator[Case]:
    """Every cube of the benchmark with that many components."""
    remnant = read_remnant(xray_folder())
    for seed in seeds:
        for level in levels:
            yield draw_case(remnant, seed, level, components)
