"""Checkpoints of a training: one safetensors file, replaced atomically, so that a kill in the middle keeps the last good one.

Tensors lie in the file under the path of their keys; every other value, in the same tree, in its JSON metadata.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from diffinv.core.checks import InputError


class Stateful(Protocol):
    """Modules, optimizers, averages: what can be asked for its state and given it back."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state_dict: dict) -> Any: ...


def save_checkpoint(path: Path, parts: Mapping[str, Stateful], *, step: int) -> None:
    """Write the state of all parts and the step to `path`, by `write_tensors`."""
    tensors: dict[str, Tensor] = {}
    tree = _pack({name: _state(part) for name, part in parts.items()}, "", tensors)
    write_tensors(path, tensors, {"step": str(step), "tree": json.dumps(tree)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all: temporary name, fsync, rename. Raises OSError where the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # what safetensors makes of an error of the disk
        raise OSError(errno.EIO, " ".join(str(error).split()), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, parts: Mapping[str, Stateful]) -> int:
    """Give all parts what `save_checkpoint` wrote; returns the step.

    Raises: InputError on a file that is not such a checkpoint, or that has other parts or parts of other shapes.
    """
    try:
        with safe_open(path, "pt") as handle:
            step = int(handle.metadata()["step"])
            tree = json.loads(handle.metadata()["tree"])
            state = _unpack(tree, {name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training checkpoint ({error}); start without --resume.") from error
    if set(state) != set(parts):
        raise InputError(f"{path}: a checkpoint of {_names(state)}, not of {_names(parts)}; start without --resume.")
    try:
        for name, part in parts.items():
            if isinstance(part, Optimizer):  # rates are those of the present plan
                part.load_state_dict({**part.state_dict(), **state[name]})
            else:
                part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: a checkpoint of another model ({reason}); start without --resume.") from error
    return step


def clear_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` left behind. One training a folder: no other may be writing there."""
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)


def _state(part: Stateful) -> dict:
    state = part.state_dict()
    return {"state": state["state"]} if isinstance(part, Optimizer) else state


def _names(parts: Mapping) -> str:
    return ", ".join(sorted(parts))


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON: a dictionary as its list of pairs (keys may be integers), a tensor as its name, the path of its keys."""
    if isinstance(value, Mapping):
        return {"pairs": [[key, _pack(v, f"{name}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    return {"value": value}


def _unpack(value: dict, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_pack`."""
    if "pairs" in value:
        return {key: _unpack(v, tensors) for key, v in value["pairs"]}
    return tensors[value["tensor"]] if "tensor" in value else value["value"]
