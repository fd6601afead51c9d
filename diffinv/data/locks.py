"""Locks on files that say "a living process is at work here": gone with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl

SHARED, ALONE = fcntl.LOCK_SH, fcntl.LOCK_EX
_REFUSED = (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(descriptor: int, kind: int, *, wait: bool) -> bool:
    """Whether the lock (SHARED or ALONE) was got; False if another holds it or the file system has none.

    Raises: OSError if the disk refuses for any other reason.
    """
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _REFUSED:
            return False
        raise
    return True
