"""Tables in Parquet. The only file that imports pyarrow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from diffinv.core.checks import InputError


def parquet_columns(path: Path, names: Sequence[str]) -> tuple[dict[str, list], tuple[str, ...]]:
    """The columns whose names, in lower case, are among `names`; and how the file spells the names of all its columns.

    Raises: InputError if it is no Parquet file.
    """
    try:
        file = parquet.ParquetFile(path)
        spelt = tuple(file.schema_arrow.names)
        wanted = [name for name in spelt if name.strip().lower() in names]
        table = file.read(columns=wanted)
        return {name.strip().lower(): table.column(name).to_pylist() for name in wanted}, spelt
    except pyarrow.ArrowException as error:
        cause = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable Parquet file ({cause}); fetch or write it again.") from error


def encode_parquet(columns: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a table as Parquet."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({name: list(c) if c.ndim > 1 else c for name, c in columns.items()}), buffer)
    return buffer.getvalue()
