"""Predictor–corrector sampling: after each step to a new noise level, Langevin steps at that level."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.registry import register
from diffinv.core.rng import Rng
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser
from diffinv.samplers.base import Sampler, State
from diffinv.samplers.sde import StochasticMultistep


@register("sampler", "corrected")
@dataclass(frozen=True)
class Corrected(Sampler):
    """A step of the predictor to σ', then n times `x ← x + δ (D_y(x, σ') − x) + √(2δ) σ' z`.

    Each is a Langevin step of size δσ'² with the score (D_y − x)/σ'²: it pulls x towards p(x_σ' | y) whatever the predictor got
    wrong. Unadjusted, it has a bias that no number of levels removes: where p(x_σ') is Gaussian with variance v, one step takes
    v to v (1 + t²), t = δσ'²/v ≤ δ, and the limit of many is v/(1 − t/2), at most δ/2 too wide. Hence no order is declared,
    and no calibration. The paper's step is 2r² ‖z‖²/‖b‖² with norms averaged over the batch, r = 0.16; at ‖b‖ = ‖z‖/σ' that is
    δ = 2r² = 0.051 here, and rows stay independent. There is no correction after the last step, to σ = 0.
    Cost a step: the predictor's and n denoiser calls.

    Arguments: predictor: any guided sampler (the paper's are of order 1, and draw too narrow). corrections: n. delta: δ, below 2.
    Raises: UnsupportedError for a predictor that is not guided; DiffinvError for an unstable δ.
    References: Song, Sohl-Dickstein, Kingma, Kumar, Ermon & Poole, *Score-Based Generative Modeling through Stochastic
    Differential Equations*, 2021, arXiv:2011.13456, algorithms 2 and 4.
    """

    predictor: Sampler = StochasticMultistep()
    corrections: int = 1
    delta: float = 0.05
    order = None
    calibrated = False

    def __post_init__(self) -> None:
        if not self.predictor.guided:
            raise UnsupportedError(
                f"Corrected: {type(self.predictor).__name__} does not follow the target's denoiser, so that its levels are not "
                "p(x_σ | y); give a guided predictor, such as StochasticMultistep."
            )
        if self.corrections < 0 or not 0 < self.delta < 2:
            raise DiffinvError(f"Corrected: corrections {self.corrections} must be >= 0 and delta {self.delta} between 0 and 2.")

    @property
    def cloud(self) -> int:
        return self.predictor.cloud

    def init(self, target: Denoiser, like: Image, sigma: Sigma, rng: Rng) -> State:
        return self.predictor.init(target, like, sigma, rng)

    def step(self, target: Denoiser, state: State, sigma: Sigma, sigma_next: Sigma, rng: Rng) -> State:
        state = self.predictor.step(target, state, sigma, sigma_next, rng.spawn(0))
        if not bool((sigma_next > 0).all()):
            return state
        x, stream = state.x, rng.spawn(1)
        noise = expand((2 * self.delta) ** 0.5 * sigma_next, x)
        for _ in range(self.corrections):
            x = x + self.delta * (target(x, sigma_next) - x) + noise * stream.normal(x)
        return replace(state, x=x)
