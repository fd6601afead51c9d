"""Which of several GPUs is a process's own: the launcher's or the supervisor's number of the process says it, and nobody asks."""

from __future__ import annotations

import os

import torch

_NUMBERS = ("LOCAL_RANK", "SLURM_LOCALID")  # of torchrun and accelerate, of Slurm


def own_device(device: str, number: int | None = None) -> str:
    """`cuda` with the index of this process's GPU where there are several; any other device as it is.

    Arguments: number: of the process among those of this machine; None for what its launcher has put into its environment.
    """
    count = torch.cuda.device_count() if device == "cuda" else 0
    if count < 2:
        return device
    if number is None:
        number = int(next((os.environ[name] for name in _NUMBERS if os.environ.get(name, "").isdigit()), "0"))
    return f"cuda:{number % count}"
