"""One operator seen as many: for a set of images that a group leaves as it is, T_g⁻¹x is another image of the set, and

    y = A x = (A T_g)(T_g⁻¹ x),

so that the same data are data of it through the virtual operator A T_g. A loss that several operators would help, such as
splitting, sees in the batch's one operator all of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from diffinv.core.checks import ShapeError, UnsupportedError
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.operators.algebra import Compose, compose
from diffinv.operators.base import LinearOperator
from diffinv.operators.groups import Group
from diffinv.operators.permutation import BandPermutation, PixelPermutation


@register("loss", "virtual_operators")
@dataclass(frozen=True)
class VirtualOperators(Loss):
    """`L(f; y, A T_g)` of another loss L, T_g drawn for each row and call: of `Splitting`, equivariant splitting.

    With L the splitting loss this is `‖(y − A T_g f(y_{−J}, A_{−J} T_g))_J‖²`: the reconstruction of x that it trains is
    T_g f(y_{−J}, A_{−J} T_g), whose mean over g is equivariant (`EquivariantAverage`). Unbiased where L is; the oracle is L's at
    T_g⁻¹x. That one operator suffices asks for images whose law the group does not change, and for A T_g that differ.

    Arguments: loss: L. group: of permutations of pixels or bands, T_g⁻¹ = T_gᵀ.
    Raises: UnsupportedError for a group that loses something (open shifts, interpolation), and where L does.
    References: Sechaud, Scanvic, Barthélemy, Abry & Tachella, *Equivariant Splitting: Self-supervised learning from incomplete
    data*, 2025, arXiv:2510.00929.
    """

    loss: Loss
    group: Group

    @property
    def unbiased(self) -> bool:
        return self.loss.unbiased

    @property
    def multipliers(self) -> tuple[nn.Parameter, ...]:
        return self.loss.multipliers

    @property
    def differences(self) -> bool:
        return self.loss.differences

    def check(self, batch: MeasuredBatch) -> None:
        try:
            element = self._draw(batch, Rng([0] * batch.batch))
        except ShapeError as error:
            raise UnsupportedError(f"VirtualOperators: {error}") from error
        if not _permutes(element):
            raise UnsupportedError(
                f"VirtualOperators: {type(self.group).__name__} has no exact inverse on the pixel grid; use Shifts, "
                "QuarterTurns, Flips, BandPermutations or a Product of these, or EquivariantImaging."
            )
        self.loss.check(self._seen(batch, element))

    def __call__(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self.loss(model, self._seen(batch, self._draw(batch, rng)), rng.spawn(1))

    def oracle(self, model: nn.Module, batch: MeasuredBatch, rng: Rng) -> Tensor:
        return self.loss.oracle(model, self._seen(batch, self._draw(batch, rng)), rng.spawn(1))

    def _draw(self, batch: MeasuredBatch, rng: Rng) -> LinearOperator:
        return self.group.draw(rng, batch.observation.image_shape, batch.data.y)

    def _seen(self, batch: MeasuredBatch, element: LinearOperator) -> MeasuredBatch:
        data = replace(batch.observation, operator=compose(batch.observation.operator, element))
        x = None if batch.x is None else element.adjoint(batch.x.expand(batch.batch, *batch.x.shape[1:]))
        return MeasuredBatch(data, x, None)


def _permutes(element: LinearOperator) -> bool:
    if isinstance(element, Compose):
        return all(_permutes(part) for part in element.operators)
    return isinstance(element, (PixelPermutation, BandPermutation))
