"""Checksums of FITS HDUs, as the FITS standard 4.0 has them in its appendix J: ones' complement sums of 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffinv.core.checks import InputError


def check_sums(path: Path, number: int, header: Mapping[str, object], head: bytes, data: bytes) -> None:
    """Compare the bytes of an HDU with its DATASUM and CHECKSUM, where it has them.

    Arguments: path, number: what errors name. header: keyword → value. head, data: the bytes, padding included.
    Raises: InputError if they differ.
    """
    data_sum = ones_complement_sum(data)
    stored = str(header.get("DATASUM", "")).strip()
    if stored and (not stored.isdigit() or int(stored) != data_sum):
        raise InputError(f"{path}: the data of HDU {number} fail their checksum (DATASUM); the file is damaged, fetch it again.")
    if str(header.get("CHECKSUM", "")).strip(" 0") and _fold(data_sum + ones_complement_sum(head)) not in (0, 0xFFFFFFFF):
        raise InputError(f"{path}: HDU {number} fails its checksum (CHECKSUM); the file is damaged, fetch it again.")


def ones_complement_sum(block: bytes) -> int:
    """DATASUM of the bytes of an HDU's data."""
    words = np.frombuffer(block, dtype=">u4", count=len(block) // 4)
    return _fold(int(words.sum(dtype=np.uint64)))


def _fold(total: int) -> int:
    while total > 0xFFFFFFFF:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
