"""Checkpoints of a training: one safetensors file, replaced atomically, so that a kill in the middle keeps the last good one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffinv.core.checks import InputError
from diffinv.training.ema import ExponentialMovingAverage


def _flatten(prefix: str, state: dict, tensors: dict[str, Tensor], plain: dict) -> None:
    for key, value in state.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous().clone()
        elif isinstance(value, dict):
            _flatten(name, value, tensors, plain)
        else:
            plain[name] = value


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage, *, step: int
) -> None:
    """Write model, optimizer, average and step to `path` (temporary name, fsync, rename)."""
    tensors: dict[str, Tensor] = {}
    plain: dict = {}
    _flatten("model", model.state_dict(), tensors, plain)
    _flatten("ema", ema.state_dict(), tensors, plain)
    for index, state in optimizer.state_dict()["state"].items():
        _flatten(f"optimizer/{index}", state, tensors, plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"step": str(step), "plain": json.dumps(plain)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage) -> int:
    """Restore what `save_checkpoint` wrote; returns the step. Raises InputError on a file that is not such a checkpoint."""
    try:
        with safe_open(path, "pt") as handle:
            step = int(handle.metadata()["step"])
            plain = json.loads(handle.metadata()["plain"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training checkpoint ({error}); start without --resume.") from error
    state: dict[int, dict] = {}
    for name, value in {**tensors, **plain}.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    try:
        model.load_state_dict(_branch(tensors, "model/"))
        ema.load_state_dict({"updates": plain["ema/updates"], "model": _branch(tensors, "ema/model/")})
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: a checkpoint of another model ({reason}); start without --resume.") from error
    return step


def _branch(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
