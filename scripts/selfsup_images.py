"""The images of the self-supervised benchmark: simulated galaxies, and photographs. Held-out ones come last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from selfsup_plan import HELD_OUT, TRAINING
from selfsup_problems import SIZE
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.data.fits import read_images, read_table
from diffinv.data.galaxies import Population, cosmos_sample
from diffinv.data.simulate import render_truths

SEED = 4100
LEARNT = ("astronaut", "brick", "camera", "coffee", "grass", "ihc", "motorcycle_left", "retina", "rocket")
OTHERS = ("cell", "chelsea", "coins", "gravel", "moon")


def galaxies(data: Path, cache: Path) -> Tensor:
    """Simulated galaxies of 32² pixels of 0.2″, brightest pixel 1 unless it has less than 1 nJy: (N, 1, 32, 32)."""
    if not cache.exists():
        cosmos = data / "cosmos"
        sample = cosmos_sample(
            read_table(cosmos / "parametric_fits.fits"),
            read_images(cosmos / "hst_f814w_stamps.fits"),
            read_images(cosmos / "hst_f814w_psfs.fits"),
            excluded=(),
        )
        x = torch.from_numpy(render_truths(Population(sample), TRAINING + HELD_OUT, seed=SEED, workers=2)).float()
        x = x.unflatten(1, (SIZE, 2)).unflatten(3, (SIZE, 2)).mean((2, 4))
        _keep(cache, (x / x.flatten(1).amax(1).clamp_min(1.0)[:, None, None])[:, None])
    return torch.from_numpy(np.load(cache))


def natural(folder: Path, cache: Path) -> Tensor:
    """Patches of 32² pixels of photographs in grey, values 0 … 1, the held-out ones of other photographs: (N, 1, 32, 32).

    Arguments: folder: `skimage/data` of scikit-image's wheel.
    """
    if not cache.exists():
        every = []
        for names, wanted in ((LEARNT, TRAINING), (OTHERS, HELD_OUT)):
            patches = torch.cat([_patches(folder, name) for name in names])
            order = Rng.for_draws(SEED, range(len(patches)), 1).uniform(torch.zeros(len(patches), 1))[:, 0].argsort()
            if len(patches) < wanted:
                raise SystemExit(f"{folder}: {len(patches)} patches where {wanted} are wanted.")
            every.append(patches[order[:wanted]])
        _keep(cache, torch.cat(every))
    return torch.from_numpy(np.load(cache))


def _keep(cache: Path, images: Tensor) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, images.numpy())


def _patches(folder: Path, name: str) -> Tensor:
    from PIL import Image

    path = next(path for path in (folder / f"{name}.png", folder / f"{name}.jpg") if path.exists())
    grey = torch.from_numpy(np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255)
    return grey.unfold(0, SIZE, SIZE // 2).unfold(1, SIZE, SIZE // 2).reshape(-1, 1, SIZE, SIZE)
