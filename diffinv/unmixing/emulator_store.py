"""Emulators on disk: one safetensors file of weights, with a card of parameters and shapes. Pickles are never read.

Invariant: what is loaded gives the spectra of what was saved, to the last bit.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffinv.core.checks import InputError, check_weights
from diffinv.spectral.base import Grid, Parameter
from diffinv.unmixing.emulator import Emulator, EmulatorDesign, EmulatorNetwork

_EDGES = "grid.edges"
_PARTS = ("centre", "scale", "basis", "spread", "anchors")


def save_emulator(path: Path, emulator: Emulator, training: str) -> None:
    """Write an emulator. training: what it was trained on, in words."""
    network = emulator.network
    card = {
        "parameters": [asdict(p) for p in emulator.own],
        "log": list(emulator.log),
        "unit": emulator.grid.unit,
        "width": network.decoder.first.out_features,
        "blocks": len(network.decoder.up),
        "training": training,
    }
    state = {name: t.contiguous() for name, t in network.state_dict().items()} | {_EDGES: emulator.grid.edges.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"emulator": json.dumps(card)})


def load_emulator(path: Path) -> Emulator:
    """Read an emulator.

    Raises: InputError when the file is missing, is no safetensors file or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; train an emulator and save it there.")
    try:
        with safe_open(path, "pt") as handle:
            text = (handle.metadata() or {}).get("emulator")
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); train the emulator again.") from error
    if text is None or _EDGES not in state:
        raise InputError(f"{path}: holds no emulator; write it with diffinv.unmixing.emulator_store.save_emulator.")
    check_weights(str(path), state)
    try:
        card = json.loads(text)
        own = tuple(Parameter(**p) for p in card["parameters"])
        grid = Grid(state.pop(_EDGES), card["unit"])
        design = EmulatorDesign(int(card["width"]), int(card["blocks"]))
        network = EmulatorNetwork({name: torch.empty_like(state[name]) for name in _PARTS}, len(own), design)
        network = network.to(grid.edges.dtype)
        network.load_state_dict(state)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: the weights do not fit the card ({reason}); train the emulator again.") from error
    return Emulator(grid, own, tuple(card["log"]), network.requires_grad_(False))
