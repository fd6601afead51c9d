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

from torch import nn

from diffinv.core.checks import ConfigError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.operators.algebra import compose
from diffinv.operators.groups import Group
from diffinv.reconstructors.base import Reconstructor
from diffinv.reconstructors.observed import whole


class _Average(Reconstructor):
    """The mean of a model over draws of a changed observation."""

    def __init__(self, model: nn.Module, draws: int, seed: int) -> None:
        super().__init__()
        if draws < 1:
            raise ConfigError(f"{type(self).__name__}: draws must be ≥ 1, got {draws}; the error falls as 1/√draws.")
        self.model, self.draws, self.seed = model, draws, seed

    @abc.abstractmethod
    def _change(self, observation: Observation, rng: Rng) -> Observation:
        """The observation that one draw sees."""

    def forward(self, observation: Observation) -> Image:
        data = whole(observation)
        streams = Rng.for_draws(self.seed, [0] * data.y.shape[0], 1)
        return sum(self.model(self._change(data, streams.spawn(n))) for n in range(self.draws)) / self.draws


class RecorruptedAverage(_Average):
    """Mean of f(y₁, A) over draws of (y₁, y₂) = split(y), the input that `Recorrupted` trains on.

    Arguments: model: f, a Reconstructor. share: of the Fisher information in y₁, as in training. draws: N. seed.
    Raises: ConfigError if draws < 1; UnsupportedError, when called, for noise that does not split.
    References: Pang, Zheng, Quan & Ji, *Recorrupted-to-Recorrupted*, CVPR 2021.
    """

    def __init__(self, model: nn.Module, *, share: float, draws: int, seed: int) -> None:
        super().__init__(model, draws, seed)
        self.share = share

    def _change(self, observation: Observation, rng: Rng) -> Observation:
        (y, noise), _ = observation.noise.split(observation.y, rng, share=self.share)
        return replace(observation, y=y, noise=noise)


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

    def _change(self, observation: Observation, rng: Rng) -> Observation:
        return self.hide(observation, rng)


class EquivariantAverage(Reconstructor):
    """Mean of T_g f(y, A T_g) over draws of g: the reconstruction through the virtual operators that `VirtualOperators` trains on.

    Arguments: model: f, a Reconstructor; with `SplittingAverage` inside, what is hidden is averaged over too. group: of
    permutations, as in training. draws: N. seed.
    Raises: ConfigError if draws < 1; ShapeError, when called, if the group does not act on images of this shape.
    References: as `VirtualOperators`.
    """

    def __init__(self, model: nn.Module, *, group: Group, draws: int, seed: int) -> None:
        super().__init__()
        if draws < 1:
            raise ConfigError(f"EquivariantAverage: draws must be ≥ 1, got {draws}; the error falls as 1/√draws.")
        self.model, self.group, self.draws, self.seed = model, group, draws, seed

    def forward(self, observation: Observation) -> Image:
        data = whole(observation)
        streams = Rng.for_draws(self.seed, [0] * data.y.shape[0], 1)
        return sum(self._turned(data, streams.spawn(n)) for n in range(self.draws)) / self.draws

    def _turned(self, data: Observation, rng: Rng) -> Image:
        element = self.group.draw(rng, data.image_shape, data.y)
        return element(self.model(replace(data, operator=compose(data.operator, element))))
