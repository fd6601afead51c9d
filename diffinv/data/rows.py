"""Data sets by row: named arrays that share their first axis, read a few rows at a time.

.npz, .h5 and .zarr files hold arrays under names; a directory or a catalogue of FITS files holds one row a file. Arrays stay
where they are: an uncompressed .npz is mapped into memory, HDF5 and zarr are read by chunks, and only a compressed .npz is
unpacked as a whole.
Invariant: a row is the same whichever rows are read with it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError

SUFFIXES = (".npz", ".h5", ".hdf5", ".zarr")


@dataclass(frozen=True, eq=False)
class Column:
    """One array. shape: all of it, rows first. dtype. read: increasing row numbers (n,) → (n, …), of all rows with None."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.ndarray | None], np.ndarray]


@dataclass(frozen=True, eq=False)
class Rows:
    """Named arrays by row. path: what errors name. columns: the arrays."""

    path: Path
    columns: Mapping[str, Column]

    def column(self, name: str) -> Column:
        """The array of a name. Raises InputError, with the names that there are, or if it does not hold numbers."""
        if name not in self.columns:
            raise InputError(f"{self.path}: holds no array {name!r}; it holds {', '.join(sorted(self.columns)) or 'none'}.")
        column = self.columns[name]
        if column.dtype.kind not in "buifc":
            raise InputError(f"{self.path}: array {name!r} is of type {column.dtype}; give numbers.")
        return column

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Rows `index` (n,) of an array, in any order, repeats allowed: (n, …)."""
        unique, inverse = np.unique(np.asarray(index), return_inverse=True)
        try:
            return self.column(name).read(unique)[inverse]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            cause = " ".join(str(error).split())[:160]
            raise InputError(f"{self.path}: array {name!r} cannot be read ({cause}); fetch or write it again.") from error

    def whole(self, name: str) -> np.ndarray:
        """All of an array."""
        return np.asarray(self.column(name).read(None))


def in_memory(array: np.ndarray) -> Column:
    """An array that is in memory, or mapped into it."""
    return Column(array.shape, array.dtype, lambda index: np.asarray(array if index is None else array[index]))


def open_arrays(path: Path) -> Rows:
    """The arrays of an .npz, .h5, .hdf5 or .zarr.

    Raises: InputError if it is missing, damaged or not what its name says, or needs a package that is not installed.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; give a directory of FITS files, a catalogue, or {', '.join(SUFFIXES)}.")
    suffix = path.suffix.lower()
    try:
        columns = _npz(path) if suffix == ".npz" else _hdf5(path) if suffix in (".h5", ".hdf5") else _zarr(path)
    except InputError:
        raise
    except Exception as error:  # each format has errors of its own
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: not a readable {suffix} file ({cause}); fetch or write it again.") from error
    return Rows(path, columns)


def _hdf5(path: Path) -> Mapping[str, Column]:
    try:
        from diffinv.data.hdf5 import hdf5_columns
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: h5py is not installed; pip install 'diffinv[hdf5]'.") from error
    return hdf5_columns(path)


def _zarr(path: Path) -> Mapping[str, Column]:
    try:
        from diffinv.data.zarrs import zarr_columns
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: zarr is not installed; pip install 'diffinv[zarr]'.") from error
    return zarr_columns(path)


def _npz(path: Path) -> Mapping[str, Column]:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
    if not members:
        raise InputError(f"{path}: holds no arrays; write it with numpy.savez.")
    return {m.filename.removesuffix(".npy"): in_memory(_member(path, m)) for m in members}


def _member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of the archive, mapped into memory if it is stored as it is."""
    if member.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as archive:
            return archive[member.filename.removesuffix(".npy")]
    with open(path, "rb") as handle:
        handle.seek(member.header_offset)
        head = handle.read(30)  # the local header: lengths of name and extra field at 26 and 28
        handle.seek(member.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"))
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(handle)
        if dtype.hasobject:
            raise InputError(f"{path}: array {member.filename.removesuffix('.npy')!r} holds Python objects; give numbers.")
        if 0 in shape or not shape:
            return np.zeros(shape, dtype)
        order = "F" if fortran else "C"
        return np.memmap(path, dtype, mode="r", offset=handle.tell(), shape=shape, order=order)
