"""Locks on files that say "a living process is at work here": gone with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffinv.core.checks import ConfigError

SHARED, ALONE = fcntl.LOCK_SH, fcntl.LOCK_EX
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FILE = ".lock"


def lock(descriptor: int, kind: int, *, wait: bool) -> bool:
    """Whether the lock (SHARED or ALONE) was got; False if another holds it or the file system has none.

    Raises: OSError if the disk refuses for any other reason.
    """
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD + _NO_LOCKS:
            return False
        raise
    return True


class Claims:
    """What this process is at, so that others on the same list do something else meanwhile: each key a byte of one file, locked.

    Locks go with the process, however it ends. Two keys in 2⁶² may share a byte, and a file system without locks lets everybody
    claim everything: a claim saves work, and nothing depends on it. One object a file and process.
    Arguments: path: of the file, made if missing; nothing is written into it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, key: str) -> bool:
        """Whether the key (hexadecimal digits) is this process's from now on; False if another living process has it."""
        try:
            fcntl.lockf(self._file, ALONE | fcntl.LOCK_NB, 1, _byte(key))
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def drop(self, key: str) -> None:
        """Leave a key to others."""
        with suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(key))

    def close(self) -> None:
        """Leave all."""
        os.close(self._file)


def _byte(key: str) -> int:
    return int(key, 16) >> 2


@contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if missing, for this process; when the block ends nothing of the lock is left, nor an empty folder.

    Where a file system has no locks, nothing is held.
    Raises: ConfigError if another living process holds it.
    """
    descriptor = _open_lock(folder)
    try:
        yield
    finally:
        (folder / _FILE).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            folder.rmdir()


def _open_lock(folder: Path) -> int:
    """The locked file of a folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / _FILE, os.O_WRONLY | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed as empty just now
            continue
        try:
            fcntl.flock(descriptor, ALONE | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if error.errno in _HELD:
                raise ConfigError(f"{folder}: another process is training there; wait for it, or give another --out.") from error
            raise
        if os.fstat(descriptor).st_nlink:  # else its last holder removed it in between
            return descriptor
        os.close(descriptor)
