"""Equivariant bootstrap: an error distribution for any reconstructor, without truth and without draws.

The reconstruction x̂ = f(y) is taken for the truth, its data are simulated in another position of the group, and the error is
what comes back:

    x̃_i = T_i⁻¹ f(A T_i x̂ + n_i),   ‖x* − x̂‖ is estimated by ‖x̃_i − x̂‖.

The group moves what is in the null space of A into its range (A T_i has another null space), so that part of the error there is
seen; a group that commutes with A (shifts with a convolution) leaves the plain parametric bootstrap, which sees none of it.
Cannot catch a bias that x̂ itself no longer shows: x̂ is smoother than the truth, and so are its errors.
References: Tachella & Pereyra, *Equivariant Bootstrapping for Uncertainty Quantification in Imaging Inverse Problems*, 2024,
arXiv:2310.11838.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Observation
from diffinv.operators.groups import Group
from diffinv.reconstructors.base import Reconstructor
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import findings, upper_tail
from diffinv.uncertainty.quantiles import quantile


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """estimate: x̂ (B, *image). replicas: x̃ (B, R, *image), both in the image's unit."""

    estimate: Image
    replicas: Tensor

    @property
    def std(self) -> Image:
        """Root-mean-square error a pixel, √ mean (x̃ − x̂)²: (B, *image); spread over all places to which the group moves it."""
        return (self.replicas - self.estimate[:, None]).pow(2).mean(1).sqrt()

    @property
    def distances(self) -> Tensor:
        """‖x̃_i − x̂‖: (B, R)."""
        return (self.replicas - self.estimate[:, None]).flatten(2).norm(dim=2)

    def radius(self, level: float) -> Tensor:
        """Radius about x̂ of the region that holds the truth with this probability: (B,).

        Raises: DiffinvError for too few replicas.
        """
        return quantile(self.distances, level)

    def check(self, truth: Image) -> tuple[Finding, ...]:
        """Where ‖x* − x̂‖ falls among ‖x̃ − x̂‖, a finding an object; p is small where the error is larger than the bootstrap's."""
        distance = (truth - self.estimate).flatten(1).norm(dim=1)
        return findings(upper_tail(distance, self.distances), "equivariant bootstrap", "error of object", self.replicas.shape[1])


@torch.no_grad()
def equivariant_bootstrap(
    reconstructor: Reconstructor, observation: Observation, group: Group, rng: Rng, *, replicas: int
) -> Bootstrap:
    """R replicas of each of B images.

    Arguments: reconstructor: f. observation: y, A and noise of B images. group: permutations of pixels, T⁻¹ = Tᵀ. rng: B streams.
        replicas: R; 19 are needed for a 95 % region.
    Raises: DiffinvError for a group that is not made of permutations: its Tᵀ is not T⁻¹.
    """
    estimate = reconstructor(observation)
    found = []
    for number in range(replicas):
        stream = rng.spawn(number)
        move = group.draw(stream, tuple(estimate.shape[1:]), estimate)
        moved = move(estimate)
        if number == 0 and not torch.allclose(move.adjoint(moved), estimate, rtol=1e-4, atol=1e-6 * float(estimate.abs().max())):
            raise DiffinvError(
                f"equivariant_bootstrap: {type(group).__name__} loses light (TᵀT ≠ 1); "
                "use shifts on the torus, quarter turns or flips."
            )
        y = observation.noise.sample(observation.operator(moved), stream.spawn(0))
        found.append(move.adjoint(reconstructor(replace(observation, y=y))))
    return Bootstrap(estimate, torch.stack(found, 1))
