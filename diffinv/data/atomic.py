"""Files that are there whole or not at all, whatever ends the process that writes them.

A file is written under a temporary name in its own directory, synced, read back and compared, and renamed; the directory is
synced last. A writer holds a lock on its temporary file, so that the ones of killed writers are known and can be removed.
Invariant: at every moment the name leads to the whole old file, the whole new one, or nothing where there was nothing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from diffinv.core.checks import DiffinvError
from diffinv.data.locks import ALONE, lock

_PART = ".part"


def write_atomically(path: str | Path, payload: bytes, *, verify: Callable[[Path], object] | None = None) -> None:
    """Temporary name in the same directory → fsync → read back and compare → `os.replace` → fsync of the directory.

    Arguments: verify: called with the temporary file; what it raises stops the write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _new_part(path.parent)
    try:
        with open(descriptor, "wb") as stream:  # open, and so locked, until the file has its name
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
            if temporary.read_bytes() != payload:
                raise DiffinvError(f"{path}: what was read back differs from what was written; the disk is not to be trusted.")
            if verify is not None:
                verify(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _new_part(folder: Path) -> tuple[Path, int]:
    """A new temporary file, locked by this process as long as its descriptor is open."""
    while True:
        part = folder / f".{uuid.uuid4().hex}{_PART}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            lock(descriptor, ALONE, wait=True)
            if os.fstat(descriptor).st_nlink:  # else `remove_parts` was faster
                return part, descriptor
        except BaseException:
            os.close(descriptor)
            part.unlink(missing_ok=True)
            raise
        os.close(descriptor)


def remove_parts(out: Path) -> int:
    """Remove the temporary files that killed writers left in an output directory, and none that a living writer holds.

    Returns: how many. Where a file system has no locks nothing is known of their writers, and all stay.
    """
    products = out / "products"
    folders = [out, out / "quarantine", products, products / "packs", *products.glob("[0-9a-f][0-9a-f]")]
    return sum(_remove_part(part) for folder in folders for part in folder.glob(f".*{_PART}"))


def _remove_part(part: Path) -> bool:
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_NOFOLLOW)
    except OSError:  # gone since it was listed, or no file of ours
        return False
    try:
        free = lock(descriptor, ALONE, wait=False)
        if free:
            part.unlink(missing_ok=True)
        return free
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
