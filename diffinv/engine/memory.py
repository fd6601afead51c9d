"""How many rows (images × draws) fit into memory at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from diffinv.priors.base import Denoiser

MOST_ROWS = 64  # on a CPU, where larger batches gain nothing
MOST_ROWS_ON_DEVICE = 1024
SHARE = 0.5  # of the free memory
IMAGES = 128  # images a row that a solver and a sampler keep besides the network's own


def rows_that_fit(prior: Denoiser, image_shape: Sequence[int], device: torch.device, processes: int = 1) -> int:
    """The largest batch, at least 1, whose network passes and solver vectors take half of the free memory.

    Arguments: prior: on `device`. image_shape: of the images sampled. processes: that share the
        memory. One forward pass of one row is made to measure it.
    """
    needed = kept_bytes(prior, image_shape, device) + IMAGES * 4 * math.prod(image_shape)
    most = MOST_ROWS if device.type == "cpu" else MOST_ROWS_ON_DEVICE
    return max(1, min(most, int(SHARE * free_bytes(device)) // (processes * needed)))


def kept_bytes(prior: Denoiser, image_shape: Sequence[int], device: torch.device, *, rows: int = 1) -> int:
    """Bytes a row that a forward pass keeps for the backward pass, its parameters left out."""
    x = torch.linspace(-1, 1, rows, device=device).reshape(rows, *[1] * len(image_shape)).expand(rows, *image_shape)
    x = x.contiguous().requires_grad_()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*prior.parameters(), *prior.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(tensor: torch.Tensor) -> None:  # gives the graph nothing to keep: an output kept by its own node is never freed
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prior(x, torch.ones(rows, dtype=torch.float64, device=device))
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights) // rows


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device, the limit of a container included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> int:
    """MemAvailable of Linux; 4 GiB where there is no such thing."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group still allows, files that it may forget included; no limit where there is none."""
    try:
        used = int((folder / "memory.current").read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / "memory.max").read_text()) - used + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        return 2**62
