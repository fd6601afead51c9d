"""Where networks are: the device of a configuration, and which of several GPUs is a process's own.

The launcher's or the supervisor's number of a process says which GPU is its own, and nobody asks another.
"""

from __future__ import annotations

import math
import os

import torch

from diffinv.core.checks import ConfigError
from diffinv.priors.precondition import has_bfloat16

_NUMBERS = ("PARSL_WORKER_RANK", "LOCAL_RANK", "SLURM_LOCALID")  # of a site, of torchrun and accelerate, of Slurm


def choose_device(device: str, dtype: str) -> str:
    """A device of this machine; `auto` is a GPU if there is one.

    Raises: ConfigError if the machine has no such device, or the device cannot compute in the dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} asked for, but this machine has no CUDA device; use --device cpu.")
    if device == "cpu" and dtype == "bfloat16" and not has_bfloat16():
        raise ConfigError(
            "dtype: bfloat16 is tens of times slower than float32 on this CPU, which cannot compute in it; use float32."
        )
    return device


def own_device(device: str, number: int = 0, of: int = 1) -> str:
    """`cuda` with the index of this process's GPU where there are several; any other device as it is.

    Arguments: number, of: of this process among those of its supervisor, where it has one; a launcher's own number of the
        process, or of its supervisor, is found in the environment.
    """
    count = torch.cuda.device_count() if device == "cuda" else 0
    if count < 2:
        return device
    launched = int(next((os.environ[name] for name in _NUMBERS if os.environ.get(name, "").isdigit()), "0"))
    return f"cuda:{(launched * of + number) % count}"


def sharers(device: str, processes: int) -> int:
    """How many of a machine's processes share the memory of one device."""
    return math.ceil(processes / max(1, torch.cuda.device_count())) if device == "cuda" else processes
