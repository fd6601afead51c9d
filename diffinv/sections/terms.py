"""The losses of `diffinv train` and the groups of transforms of some, as in `diffinv.losses` and `operators.groups`."""

from __future__ import annotations

from typing import Annotated, Literal

from diffinv.config import Count, Field, Positive, Section, Share, positive_or

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Reach = Annotated[int, Field(ge=1)]


class ShiftsGroup(Section):
    kind: Literal["shifts"]
    reach: Reach


class OpenShiftsGroup(Section):
    kind: Literal["open_shifts"]
    reach: Reach


class QuarterTurnsGroup(Section):
    kind: Literal["quarter_turns"]


class FlipsGroup(Section):
    kind: Literal["flips"]


class RotationsGroup(Section):
    kind: Literal["rotations"]


class DilationsGroup(Section):
    kind: Literal["dilations"]
    lowest: Positive
    highest: Positive
    conserve_flux: bool


class BandPermutationsGroup(Section):
    kind: Literal["band_permutations"]


class AmplitudesGroup(Section):
    kind: Literal["amplitudes"]
    spread: Positive


Groups = Annotated[
    ShiftsGroup
    | OpenShiftsGroup
    | QuarterTurnsGroup
    | FlipsGroup
    | RotationsGroup
    | DilationsGroup
    | BandPermutationsGroup
    | AmplitudesGroup,
    Field(discriminator="kind"),
]


class Term(Section):
    """A loss of a sum."""

    weight: Positive = 1.0


class Sloped(Term):
    """slope: how derivatives of the network are taken. step: of the finite difference, over the noise."""

    slope: Literal["finite_difference", "forward_mode"] = "finite_difference"
    step: Positive = 0.05


class SupervisedLoss(Term):
    name: Literal["supervised"]


class Noise2NoiseLoss(Term):
    name: Literal["noise2noise"]


class ConsistencyLoss(Term):
    name: Literal["measurement_consistency"]


class SureLoss(Sloped):
    """ensure: weigh each datum by one over the share of rows in which it is good, for masks that change from row to row."""

    name: Literal["sure"]
    ensure: bool = False


class FirstOrderSureLoss(Sloped):
    name: Literal["first_order_sure"]


class ShiftedSureLoss(Term):
    name: Literal["shifted_sure"]
    pixels: Count


class UnsureLoss(Sloped):
    """start: σ from which the multipliers climb; auto: estimated as for `noise.std`. reach: of the lags, in pixels."""

    name: Literal["unsure"]
    covariance: Literal["white", "lags", "signal_dependent"]
    start: positive_or("auto") = "auto"
    reach: Reach = 2


class RecorruptedLoss(Term):
    """share: of the information in what the network sees. draws: over which the trained one is averaged."""

    name: Literal["recorrupted"]
    share: Share
    draws: Count = 8


class SplittingLoss(Term):
    """kept: probability of a datum to be seen. inner: a loss of what is seen, on top. groups: of permutations, through which one
    operator is seen as many (equivariant splitting).

    Where each datum is of one pixel (identity, mask) and there is no inner loss, the trained network predicts each datum from
    the others, in 1/(1 − kept) passes; elsewhere it is averaged over `draws` choices of what it sees, draws² with groups.
    """

    name: Literal["splitting"]
    kept: Share
    draws: Count = 8
    inner: Literal["sure"] | None = None
    groups: tuple[Groups, ...] = ()


class Noise2VoidLoss(Term):
    name: Literal["noise2void"]
    share: Share
    radius: Reach


class Neighbor2NeighborLoss(Term):
    name: Literal["neighbor2neighbor"]
    gamma: NotNegative


class Noise2ScoreLoss(Term):
    name: Literal["noise2score"]
    amplitude: Positive


class EquivariantLoss(Term):
    """groups: applied one after the other. noisy: whether virtual measurements are made noisy, as the real ones are."""

    name: Literal["equivariant_imaging"]
    groups: Annotated[tuple[Groups, ...], Field(min_length=1)]
    noisy: bool


class MultiOperatorLoss(Term):
    name: Literal["multi_operator_imaging"]
    noisy: bool


Losses = Annotated[
    SupervisedLoss
    | Noise2NoiseLoss
    | ConsistencyLoss
    | SureLoss
    | FirstOrderSureLoss
    | ShiftedSureLoss
    | UnsureLoss
    | RecorruptedLoss
    | SplittingLoss
    | Noise2VoidLoss
    | Neighbor2NeighborLoss
    | Noise2ScoreLoss
    | EquivariantLoss
    | MultiOperatorLoss,
    Field(discriminator="name"),
]
