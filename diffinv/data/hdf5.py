"""HDF5 files as columns, read by chunks. The only file that imports h5py."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from diffinv.data.rows import Column


def hdf5_columns(path: Path) -> dict[str, Column]:
    """Every dataset with rows, by its path in the file, which stays open.

    Raises: OSError if it is not HDF5.
    """
    file = h5py.File(path, "r")
    found: dict[str, Column] = {}

    def enter(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim:
            found[name] = Column(item.shape, item.dtype, lambda index: _read(item, index))

    file.visititems(enter)
    return found


def _read(dataset: h5py.Dataset, index: np.ndarray | None) -> np.ndarray:
    return dataset[...] if index is None else dataset[index]
