"""Trained reconstructors on disk: one safetensors file that holds weights, design and card. Pickles are never read.

Invariant: `load_reconstructor(save_reconstructor(...))` gives the same images.
"""

from __future__ import annotations

import abc
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffinv.core.checks import ConfigError, DiffinvError, InputError, check_weights
from diffinv.core.registry import from_dict, register, to_dict
from diffinv.core.types import Image, Shape
from diffinv.likelihood import Observation
from diffinv.losses.splitting import RandomHiding
from diffinv.operators.groups import Group
from diffinv.reconstructors.averaging import EquivariantAverage, LeaveOut, RecorruptedAverage, SplittingAverage
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.designs import Design
from diffinv.reconstructors.units import InUnits
from diffinv.training.checkpoint import write_tensors


class Use(abc.ABC):
    """How a trained model is used where that differs from how it was trained."""

    @abc.abstractmethod
    def wrap(self, model: Reconstructor) -> Reconstructor:
        """The reconstructor to use."""


@register("use", "recorrupted_average")
@dataclass(frozen=True)
class UseRecorrupted(Use):
    """`RecorruptedAverage`."""

    share: float
    draws: int
    seed: int

    def wrap(self, model: Reconstructor) -> Reconstructor:
        return RecorruptedAverage(model, share=self.share, draws=self.draws, seed=self.seed)


@register("use", "splitting_average")
@dataclass(frozen=True)
class UseSplitting(Use):
    """`SplittingAverage` with random hiding, and with a group the `EquivariantAverage` of that.

    kept: probability of a datum. together: last axes that go as one. draws: of each average.
    """

    kept: float
    together: int
    draws: int
    seed: int
    group: Group | None = None

    def wrap(self, model: Reconstructor) -> Reconstructor:
        average = SplittingAverage(model, hide=RandomHiding(self.kept, self.together), draws=self.draws, seed=self.seed)
        if self.group is None:
            return average
        return EquivariantAverage(average, group=self.group, draws=self.draws, seed=self.seed)


@register("use", "leave_out")
@dataclass(frozen=True)
class UseLeaveOut(Use):
    """`LeaveOut`: of splitting, where the operator is diagonal."""

    folds: int
    seed: int
    group: Group | None = None

    def wrap(self, model: Reconstructor) -> Reconstructor:
        return LeaveOut(model, folds=self.folds, seed=self.seed, group=self.group)


@dataclass(frozen=True)
class ReconstructorCard:
    """What a reconstructor is.

    design: of its network. use: how it is used, or None for as it was trained. shape: (C, H, W) of the images that it was
    trained on. scale: what it takes for 1, in the image's unit. unit: BUNIT, "" if unknown. training: configuration, figures
    and versions, as plain values.
    """

    name: str
    design: Design
    use: Use | None
    shape: Shape
    scale: float
    unit: str
    training: dict[str, Any]


class TrainedReconstructor(Reconstructor):
    """A reconstructor in the unit of the data, with its card and the digest of its file."""

    def __init__(self, model: Reconstructor, card: ReconstructorCard, digest: str) -> None:
        super().__init__()
        self.model, self.card, self.digest = model, card, digest

    def forward(self, observation: Observation) -> Image:
        return self.model(observation)


def save_reconstructor(path: Path, model: nn.Module, card: ReconstructorCard) -> None:
    """Write the weights of a model that `card.design` built, and the card, by `write_tensors`."""
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    fields = {name: to_dict(getattr(card, name)) for name in card.__dataclass_fields__}
    write_tensors(path, state, {"reconstructor": json.dumps(fields, sort_keys=True)})


def load_reconstructor(path: str | Path, *, device: torch.device | str = "cpu") -> TrainedReconstructor:
    """A trained reconstructor: observations in the unit of its data → images in theirs.

    Arguments: path: the reconstructor.safetensors of a training. device.
    Raises: InputError if there is no such file, or it is not safetensors, truncated, no reconstructor, or does not fit its card.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the reconstructor.safetensors of a training.")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: weights must be a .safetensors file (pickled weights can run code and are never read).")
    try:
        with safe_open(path, "pt") as handle:
            text = (handle.metadata() or {}).get("reconstructor")
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); train or fetch it again.") from error
    card = _parse_card(path, text)
    check_weights(str(path), state)
    try:
        model = card.design.build(card.shape)
        model.load_state_dict(state)
        used = InUnits(model if card.use is None else card.use.wrap(model), card.scale)
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: the weights do not fit the design on its card ({reason}); train it again.") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return TrainedReconstructor(used, card, digest).to(device).eval().requires_grad_(False)


def _parse_card(path: Path, text: str | None) -> ReconstructorCard:
    if text is None:
        raise InputError(f"{path}: is not a reconstructor (no card in its metadata); give one written by `diffinv train`.")
    try:
        fields = json.loads(text)
        training = fields.pop("training")
        card = ReconstructorCard(**{name: from_dict(value) for name, value in fields.items()}, training=training)
        if not isinstance(card.design, Design) or not isinstance(card.use, Use | None):
            raise ConfigError("its design is of another kind")
    except (ValueError, TypeError, KeyError, AttributeError, DiffinvError) as error:
        raise InputError(f"{path}: its card cannot be read ({error}); train it again.") from error
    return card
