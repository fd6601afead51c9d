"""Losses and groups of transforms from their sections, and how a model that they trained is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from diffinv.config import Section
from diffinv.core.checks import ConfigError
from diffinv.engine.learn import Levels
from diffinv.engine.levels import sampling_weight
from diffinv.losses.base import Loss
from diffinv.losses.denoisers import Neighbor2Neighbor, Noise2Score
from diffinv.losses.derivative import FiniteDifference, ForwardMode, Slope
from diffinv.losses.equivariant import EquivariantImaging, MeasurementConsistency, MultiOperatorImaging
from diffinv.losses.recorrupted import Recorrupted
from diffinv.losses.splitting import Noise2Void, RandomHiding, Splitting
from diffinv.losses.supervised import Noise2Noise, Supervised
from diffinv.losses.sure import FirstOrderSure, ShiftedSure, Sure
from diffinv.losses.unsure import Covariance, Lags, SignalDependent, Unsure, White
from diffinv.losses.virtual import VirtualOperators
from diffinv.operators.groups import (
    Amplitudes,
    BandPermutations,
    Dilations,
    Flips,
    Group,
    OpenShifts,
    Product,
    QuarterTurns,
    Rotations,
    Shifts,
)
from diffinv.operators.interpolation import Cubic
from diffinv.sections import terms as s
from diffinv.training.store import Use, UseLeaveOut, UseRecorrupted, UseSplitting

_FILTER = Cubic()


def build_loss(terms: Sequence[Section], levels: Levels, *, pairs: bool) -> Loss:
    """Σ weight · loss of the terms; one term of weight 1 is itself.

    Arguments: levels: of the data. pairs: whether data are pairs of real numbers, which are hidden together.
    """
    built = [(term.weight, _loss(term, levels, pairs)) for term in terms]
    scaled = [loss if weight == 1 else weight * loss for weight, loss in built]
    return sum(scaled[1:], scaled[0])


def groups_of(terms: Sequence[Section]) -> tuple[Group, ...]:
    """The group of each term that has one."""
    return tuple(
        build_group(term.groups) for term in terms if isinstance(term, s.EquivariantLoss | s.SplittingLoss) and term.groups
    )


def use_of(terms: Sequence[Section], *, pairs: bool, diagonal: bool, seed: int) -> Use | None:
    """How the trained model is used: on data changed as in its training where it was trained on such, else as it is.

    Arguments: terms. pairs: as in `build_loss`. diagonal: whether each datum is of one pixel. seed.
    """
    for term in terms:
        if isinstance(term, s.RecorruptedLoss):
            return UseRecorrupted(term.share, term.draws, seed)
        if isinstance(term, s.SplittingLoss):
            group = build_group(term.groups) if term.groups else None
            if diagonal and term.inner is None:
                return UseLeaveOut(max(2, round(1 / (1 - term.kept))), seed, group)
            return UseSplitting(term.kept, int(pairs), term.draws, seed, group)
    return None


def build_group(sections: Sequence[Section]) -> Group:
    """One group, or the product of several."""
    groups = tuple(_group(section) for section in sections)
    return groups[0] if len(groups) == 1 else Product(groups)


def _group(section: Section) -> Group:
    plain = {
        s.ShiftsGroup: Shifts,
        s.OpenShiftsGroup: OpenShifts,
        s.QuarterTurnsGroup: QuarterTurns,
        s.FlipsGroup: Flips,
        s.BandPermutationsGroup: BandPermutations,
        s.AmplitudesGroup: Amplitudes,
    }
    if isinstance(section, s.RotationsGroup):
        return Rotations(_FILTER)
    if isinstance(section, s.DilationsGroup):
        return Dilations(section.lowest, section.highest, _FILTER, section.conserve_flux)
    return plain[type(section)](**section.model_dump(exclude={"kind"}))


def _slope(section: s.Sloped) -> Slope:
    return ForwardMode() if section.slope == "forward_mode" else FiniteDifference(section.step)


@singledispatch
def _loss(section: Section, levels: Levels, pairs: bool) -> Loss:
    raise ConfigError(f"loss: {type(section).__name__} has no builder.")


@_loss.register
def _(section: s.SupervisedLoss, levels: Levels, pairs: bool) -> Loss:
    return Supervised()


@_loss.register
def _(section: s.Noise2NoiseLoss, levels: Levels, pairs: bool) -> Loss:
    return Noise2Noise()


@_loss.register
def _(section: s.ConsistencyLoss, levels: Levels, pairs: bool) -> Loss:
    return MeasurementConsistency()


@_loss.register
def _(section: s.SureLoss, levels: Levels, pairs: bool) -> Loss:
    return Sure(_slope(section), sampling_weight(levels.source) if section.ensure else None)


@_loss.register
def _(section: s.FirstOrderSureLoss, levels: Levels, pairs: bool) -> Loss:
    return FirstOrderSure(_slope(section))


@_loss.register
def _(section: s.ShiftedSureLoss, levels: Levels, pairs: bool) -> Loss:
    return ShiftedSure(section.pixels)


@_loss.register
def _(section: s.UnsureLoss, levels: Levels, pairs: bool) -> Loss:
    families: dict[str, Covariance] = {
        "white": White(),
        "lags": Lags(section.reach),
        "signal_dependent": SignalDependent(),
    }
    covariance = families[section.covariance]
    return Unsure(covariance.start(levels.start), covariance, _slope(section))


@_loss.register
def _(section: s.RecorruptedLoss, levels: Levels, pairs: bool) -> Loss:
    return Recorrupted(section.share)


@_loss.register
def _(section: s.SplittingLoss, levels: Levels, pairs: bool) -> Loss:
    splitting = Splitting(RandomHiding(section.kept, int(pairs)), Sure() if section.inner == "sure" else None)
    return VirtualOperators(splitting, build_group(section.groups)) if section.groups else splitting


@_loss.register
def _(section: s.Noise2VoidLoss, levels: Levels, pairs: bool) -> Loss:
    return Noise2Void(section.share, section.radius)


@_loss.register
def _(section: s.Neighbor2NeighborLoss, levels: Levels, pairs: bool) -> Loss:
    return Neighbor2Neighbor(section.gamma)


@_loss.register
def _(section: s.Noise2ScoreLoss, levels: Levels, pairs: bool) -> Loss:
    return Noise2Score(section.amplitude / levels.scale)


@_loss.register
def _(section: s.EquivariantLoss, levels: Levels, pairs: bool) -> Loss:
    return EquivariantImaging(build_group(section.groups), section.noisy)


@_loss.register
def _(section: s.MultiOperatorLoss, levels: Levels, pairs: bool) -> Loss:
    return MultiOperatorImaging(section.noisy)
