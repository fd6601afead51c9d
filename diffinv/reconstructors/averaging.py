"""Averages at test time: a model trained on data that were made worse is used on several versions of them.

`f̄(y, A) = (1/N) Σ_n f(yₙ, Aₙ)`, yₙ one way of recorrupting or hiding y. The average estimates E[f(yₙ) | y], and loses what
one version threw away.
Invariant: the random numbers depend on the seed and the draw alone, the same for every row: a result is reproducible, and a
row's does not depend on its batch-mates or its place among them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from diffinv.core.checks import ConfigError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.operators.algebra import compose
from diffinv.operators.groups import Group
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import good_data, hidden, require_diagonal, whole


class _Average(Reconstructor):
    """The mean of what a model makes of draws of a changed observation."""

    def __init__(self, model: nn.Module, draws: int, seed: int) -> None:
        super().__init__()
        if draws < 1:
            raise ConfigError(f"{type(self).__name__}: draws must be ≥ 1, got {draws}; the error falls as 1/√draws.")
        self.model, self.draws, self.seed = model, draws, seed

    @abc.abstractmethod
    def _draw(self, data: Observation, rng: Rng) -> Image:
        """The image of one draw."""

    def forward(self, observation: Observation) -> Image:
        data = whole(observation)
        streams = Rng.for_draws(self.seed, [0] * data.y.shape[0], 1)
        return sum(self._draw(data, streams.spawn(n)) for n in range(self.draws)) / self.draws


class RecorruptedAverage(_Average):
    """Mean of f(y₁, A) over draws of (y₁, y₂) = split(y), the input that `Recorrupted` trains on.

    Arguments: model: f, a Reconstructor. share: of the Fisher information in y₁, as in training. draws: N. seed.
    Raises: ConfigError if draws < 1; UnsupportedError, when called, for noise that does not split.
    References: Pang, Zheng, Quan & Ji, *Recorrupted-to-Recorrupted*, CVPR 2021.
    """

    def __init__(self, model: nn.Module, *, share: float, draws: int, seed: int) -> None:
        super().__init__(model, draws, seed)
        self.share = share

    def _draw(self, data: Observation, rng: Rng) -> Image:
        (y, noise), _ = data.noise.split(data.y, rng, share=self.share)
        return self.model(replace(data, y=y, noise=noise))


class SplittingAverage(_Average):
    """Mean of f(hide(y), A) over draws of what is hidden, the input that a splitting loss trains on.

    Arguments: model: f, a Reconstructor. hide: (observation, rng) → the observation with some data masked. draws: N. seed.
    Raises: ConfigError if draws < 1.
    References: Yaman et al., *Self-supervised learning of physics-guided reconstruction neural networks without fully sampled
    reference data*, 2020, Magn. Reson. Med. 84, 3172 (the splitting); Batson & Royer, *Noise2Self*, 2019, arXiv:1901.11365.
    """

    def __init__(self, model: nn.Module, *, hide: Callable[[Observation, Rng], Observation], draws: int, seed: int) -> None:
        super().__init__(model, draws, seed)
        self.hide = hide

    def _draw(self, data: Observation, rng: Rng) -> Image:
        return self.model(self.hide(data, rng))


class EquivariantAverage(_Average):
    """Mean of T_g f(y, A T_g) over draws of g: through the virtual operators that `VirtualOperators` trains on.

    Arguments: model: f, a Reconstructor; with `SplittingAverage` inside, what is hidden is averaged over too. group: of
    permutations, as in training. draws: N. seed.
    Raises: ConfigError if draws < 1; ShapeError, when called, if the group does not act on images of this shape.
    References: as `VirtualOperators`.
    """

    def __init__(self, model: nn.Module, *, group: Group, draws: int, seed: int) -> None:
        super().__init__(model, draws, seed)
        self.group = group

    def _draw(self, data: Observation, rng: Rng) -> Image:
        element = self.group.draw(rng, data.image_shape, data.y)
        return element(self.model(replace(data, operator=compose(data.operator, element))))


class LeaveOut(Reconstructor):
    """Each datum predicted from the others, for A = diag(a): the data fall at random into N folds J₁ … J_N, and

        x̂ᵢ = f(y_{−J_n}, A_{−J_n})ᵢ for the fold J_n of datum i, and their mean over n where aᵢ = 0 or the datum is masked.

    The splitting loss looks at what is hidden alone, so that where a datum was kept such an f is anything. With a group it is
    T_g f(y_{−J}, A_{−J} T_g) instead, g drawn for each fold.

    Arguments: model: f, a Reconstructor. folds: N ≥ 2; 1/(1 − kept) hides as many at once as the loss did. seed. group: as in
    `VirtualOperators`, or None.
    Raises: ConfigError if folds < 2; UnsupportedError, when called, if A is not diagonal, so that no pixel belongs to a datum.
    References: Batson & Royer, *Noise2Self*, 2019, arXiv:1901.11365.
    """

    def __init__(self, model: nn.Module, *, folds: int, seed: int, group: Group | None = None) -> None:
        super().__init__()
        if folds < 2:
            raise ConfigError(f"LeaveOut: folds must be ≥ 2, got {folds}; with one nothing is left to predict from.")
        self.model, self.folds, self.seed, self.group = model, folds, seed, group

    def forward(self, observation: Observation) -> Image:
        data = whole(observation)
        seen = good_data(data) & (require_diagonal("LeaveOut", data) != 0)
        streams = Rng.for_draws(self.seed, [0] * data.y.shape[0], 1)
        fold = (streams.uniform(data.y) * self.folds).long()
        found = [self._prediction(data, fold != n, streams.spawn(n)) for n in range(self.folds)]
        weights = [((fold == n) | ~seen).to(data.y) for n in range(self.folds)]
        return sum(w * x for w, x in zip(weights, found, strict=True)) / sum(weights)

    def _prediction(self, data: Observation, keep: Tensor, rng: Rng) -> Image:
        left = hidden(data, keep)
        if self.group is None:
            return self.model(left)
        element = self.group.draw(rng, data.image_shape, data.y)
        return element(self.model(replace(left, operator=compose(left.operator, element))))
