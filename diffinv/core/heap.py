"""The C library's heap, where tensors of the CPU live.

By default glibc returns freed memory to the system at the end of each backward pass, and each page is zeroed anew when it is
taken again in the next step: a tenth of a training step of a small network, and more, the larger its activations.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of what it frees, for its next tensors; whether the C library can (glibc).

    The memory is the process's until its end. What is computed does not change.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(set_option(option, _BYTES) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
