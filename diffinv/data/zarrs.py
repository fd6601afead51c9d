"""Zarr stores as columns, read by chunks. The only file that imports zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from diffinv.data.rows import Column


def zarr_columns(path: Path) -> dict[str, Column]:
    """Every array with rows of the group at `path`, by its name. Raises what zarr raises if there is no group."""
    group = zarr.open_group(str(path), mode="r")
    return {name: Column(a.shape, np.dtype(a.dtype), _reader(a)) for name, a in group.arrays() if a.ndim}


def _reader(array: zarr.Array):
    return lambda index: np.asarray(array[...] if index is None else array.oindex[index])
