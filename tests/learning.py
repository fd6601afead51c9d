"""Data sets for tests of `diffinv train`: 60 blobs of 16² pixels, seen in several ways, and the YAML of a training of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
import zarr
from scipy.signal import fftconvolve

from diffinv.data.fits import Plane, encode_fits
from diffinv.operators.tomography import Radon

SIZE, ROWS = 16, 60
ANGLES = [0.0, 36.0, 72.0, 108.0, 144.0]


def round_psf(sigma: float = 1.5, ratio: float = 1.0) -> np.ndarray:
    """(9, 9), sums to 1."""
    axis = np.arange(9) - 4
    psf = np.exp(-(axis[:, None] ** 2 + (axis / ratio) ** 2) / 2 / sigma**2)
    return psf / psf.sum()


def arrays() -> dict[str, np.ndarray]:
    """What instruments give: y, second, var (identity); blur, psf; masked, mask; one_masked, one; sinogram; k, k_mask; counts;
    speckle."""
    rng = np.random.default_rng(0)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    x = np.exp(-(axis[:, None] ** 2 + axis**2) / 2 / rng.uniform(1.5, 4, (ROWS, 1, 1)) ** 2)
    noise = lambda std: std * rng.standard_normal(x.shape)
    psf, mask, one = round_psf(), rng.random(x.shape) < 0.5, rng.random((SIZE, SIZE)) < 0.5
    k_mask = rng.random((SIZE, SIZE)) < 0.6
    blur = np.stack([fftconvolve(image, psf, "same") for image in x]) + noise(0.005)
    k = (np.fft.fft2(x, norm="ortho") + noise(0.05) + 1j * noise(0.05)) * k_mask
    found = {"y": x + noise(0.05), "second": x + noise(0.05), "x": x, "var": np.full(x.shape, 0.05**2), "blur": blur, "psf": psf}
    found |= {"masked": (x + noise(0.02)) * mask, "mask": mask, "one_masked": (x + noise(0.02)) * one, "one": one}
    sinogram = Radon(torch.tensor([ANGLES]), (1, SIZE, SIZE), 24)(torch.from_numpy(x[:, None]).float())[:, 0].numpy()
    found |= {"sinogram": sinogram + 0.05 * rng.standard_normal(sinogram.shape)}
    found |= {"k": k, "k_mask": k_mask, "counts": rng.poisson(50 * (x + 0.1)) / 50 - 0.1}
    return found | {"speckle": (x + 0.1) * rng.gamma(4, 1 / 4, x.shape)}


def write_npz(path: Path, data: dict[str, np.ndarray]) -> Path:
    np.savez(path, **data)
    return path


def write_hdf5(path: Path, data: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            file.create_dataset(name, data=values)
    return path


def write_zarr(path: Path, data: dict[str, np.ndarray]) -> Path:
    group = zarr.open_group(str(path), mode="w")
    for name, values in data.items():
        group.create_array(name, data=values, chunks=(16, *values.shape[1:]) if values.ndim > 2 else values.shape)
    return path


def write_fits(folder: Path, data: dict[str, np.ndarray], rows: int = ROWS, *, y: str = "y") -> Path:
    """A file a row, with SCI (the array `y`), VAR, PSF, TRUTH and a second exposure AGAIN."""
    folder.mkdir(parents=True, exist_ok=True)
    single = lambda values: values.astype(np.float32)
    for row in range(rows):
        planes = [Plane("PRIMARY", None, {}), Plane("SCI", single(data[y][row]), {"BAND": "i", "BUNIT": "nJy"})]
        planes += [Plane("VAR", single(data["var"][row]), {}), Plane("PSF", single(data["psf"]), {"PSFNORM": 1.0})]
        planes += [Plane("TRUTH", single(data["x"][row]), {}), Plane("AGAIN", single(data["second"][row]), {})]
        (folder / f"{row:03d}.fits").write_bytes(encode_fits(planes))
    return folder


WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray]], Path]] = {
    ".npz": write_npz,
    ".h5": write_hdf5,
    ".zarr": write_zarr,
    ".fits": write_fits,
}


def configuration(path: Path, **sections: Any) -> dict[str, Any]:
    """A denoising training of a few steps by SURE, with some sections instead; `data` and `training` are merged."""
    training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup": 1, "save_every": 2, "log_every": 2}
    found = {
        "operator": {"kind": "identity"},
        "noise": {"kind": "gaussian", "std": 0.05},
        "loss": [{"name": "sure"}],
        "network": {"kind": "backprojected", "widths": [8, 16], "blocks": [1, 1]},
    } | {key: value for key, value in sections.items() if key not in ("data", "training")}
    found["data"] = {"path": str(path), **sections.get("data", {})}
    found["training"] = {**training, "validate_every": 3, **sections.get("training", {})}
    return {key: value for key, value in found.items() if value is not None}


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
