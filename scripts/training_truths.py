"""The simulated galaxies that shipped priors are trained on, and others of the same kind that nobody trained on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from diffinv.data.colours import measured_colours
from diffinv.data.fits import read_images, read_table
from diffinv.data.galaxies import Population, cosmos_sample
from diffinv.data.simulate import render_truths

GREY, REFERENCE = ("grey",), "i"  # the band of the images: F814W


def truths(data: Path, cache: Path, count: int, seed: int, bands: tuple[str, ...]) -> np.ndarray:
    """The rendered galaxies (N, bands, 64, 64), kept in the folder `cache`, without those of the validation mocks, if any."""
    path = cache / f"truths-{''.join(bands)}-{count}-{seed}.npy"
    if not path.exists():
        colours = None
        if bands != GREY:
            colours = measured_colours(read_table(data / "cosmos" / "hst_f814w_catalog.fits"), bands, REFERENCE)
        rendered = render_truths(population(data), count, seed=seed, workers=2, colours=colours)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, rendered)
        part.replace(path)
    found = np.load(path)
    return found[:, None] if bands == GREY else found


def population(data: Path) -> Population:
    """Of the COSMOS tables and stamps, without the galaxies of the validation mocks."""
    held_out: tuple[int, ...] = ()
    validation = data / "mocks" / "galaxies_val32_catalog.csv"
    if validation.exists():
        with open(validation) as handle:
            held_out = tuple(int(row["ident"]) for row in csv.DictReader(handle))
    cosmos = data / "cosmos"
    sample = cosmos_sample(
        read_table(cosmos / "parametric_fits.fits"),
        read_images(cosmos / "hst_f814w_stamps.fits"),
        read_images(cosmos / "hst_f814w_psfs.fits"),
        excluded=held_out,
    )
    return Population(sample)
