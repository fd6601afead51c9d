"""Risk-controlling intervals: the smallest widening of pixel intervals whose risk is bounded, whatever the sampler does.

    I_λ = [l − λ, u + λ],   R(λ) = E[share of an image's pixels outside I_λ],
    λ̂ = min{λ ≥ 0 : P(R(λ) ≤ α) ≥ 1 − δ by the Hoeffding–Bentkus bound on N images}.

The bound: R̂ of N losses in [0, 1] rejects R ≥ α at level δ if

    min{exp(−N h(min(R̂, α), α)), e P(Bin(N, α) ≤ ⌈N R̂⌉)} ≤ δ,   h(a, b) = a ln(a/b) + (1 − a) ln((1 − a)/(1 − b)).

One image is one loss: dependence of its pixels does not matter. A sampler that was honest has λ̂ ≈ 0. K-RCPS gives each group
of pixels its own λ_k: those that minimise the mean length subject to a convex bound of the risk on one set of images, then
shifted together, λ_k = max(λ̃_k + ω, 0), with ω from RCPS on *another* set.
The guarantee is marginal (over images, not for one pixel or one kind of object), needs truths exchangeable with those of the
calibration, and holds in its regime only: the record stores it and refuses elsewhere.
References: Bates, Angelopoulos, Lei, Malik & Jordan, *Distribution-Free, Risk-Controlling Prediction Sets*, 2021,
arXiv:2101.02703; Teneggi, Tivnan, Stayman & Sulam, *How to Trust Your Diffusion Model: A Convex Optimization Approach to
Conformal Risk Control*, 2023, arXiv:2302.03791.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from scipy.stats import binom
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, UnsupportedError
from diffinv.uncertainty.finding import Record

_BISECTIONS = 80


@dataclass(frozen=True)
class Regime(Record):
    """Where a calibration holds: names of the prior, the sampler with its settings, the noise and the PSF."""

    prior: str
    sampler: str
    noise: str
    psf: str


@dataclass(frozen=True)
class ConformalMap(Record):
    """Widenings of intervals that control the risk.

    widening: λ̂_k, one a group of pixels, in the image's unit. alpha: risk. delta: probability of exceeding it. risk: R̂(λ̂) of
    the calibration. objects: N. regime: where it holds.
    """

    widening: tuple[float, ...]
    alpha: float
    delta: float
    risk: float
    objects: int
    regime: Regime

    @classmethod
    def from_dict(cls, values: dict) -> ConformalMap:
        return super().from_dict({**values, "regime": Regime(**values["regime"])})

    def apply(self, low: Tensor, high: Tensor, regime: Regime, *, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[l − λ, u + λ]. low, high: (B, …). groups: (B, …) int64 of the K groups, None for one.

        Raises: UnsupportedError in another regime, or without groups where there are several.
        """
        differ = [f"{f.name} ({mine!r}, here {here!r})" for f, mine, here in _compared(self.regime, regime) if mine != here]
        if differ:
            raise UnsupportedError(
                f"ConformalMap: calibrated for another {', '.join(differ)}; calibrate again on simulations of yours."
            )
        if groups is None and len(self.widening) > 1:
            raise UnsupportedError(f"ConformalMap: has {len(self.widening)} groups of pixels; give groups=.")
        table = torch.tensor(self.widening, dtype=low.dtype, device=low.device)
        step = table[torch.zeros_like(low, dtype=torch.int64) if groups is None else groups]
        return low - step, high + step

    def __str__(self) -> str:
        widening = ", ".join(f"{v:.4g}" for v in self.widening)
        where = " / ".join(getattr(self.regime, f.name) for f in fields(Regime))
        return (
            f"conformal: λ = {widening}, risk {self.risk:.3g} of {self.objects} images; ≤ {self.alpha:g} with probability "
            f"{1 - self.delta:g} on average over images like these of {where}"
        )


def _compared(first: Regime, second: Regime):
    return ((f, getattr(first, f.name), getattr(second, f.name)) for f in fields(Regime))


def hoeffding_bentkus(risk: float, alpha: float, objects: int) -> float:
    """p-value of R ≥ α given the mean R̂ of N losses in [0, 1]."""
    a = min(risk, alpha)
    entropy = (a * math.log(a / alpha) if a > 0 else 0.0) + (1 - a) * math.log((1 - a) / (1 - alpha))
    count = math.ceil(objects * risk - 1e-9)
    return min(1.0, math.exp(-objects * entropy), math.e * float(binom.cdf(count, objects, alpha)))


def allowed_risk(alpha: float, delta: float, objects: int) -> float:
    """The largest empirical risk of N images that proves R ≤ α at level δ.

    Raises: DiffinvError if not even a risk of 0 would, with the number of images that is needed.
    """
    if not (0 < alpha < 1 and 0 < delta < 1):
        raise DiffinvError(f"conformal: alpha {alpha} and delta {delta} must lie inside (0, 1).")
    if hoeffding_bentkus(0.0, alpha, objects) > delta:
        fewest = math.ceil(math.log(delta) / math.log1p(-alpha))
        raise DiffinvError(f"conformal: {objects} images cannot show a risk of {alpha} at {delta}; at least {fewest} are needed.")
    low, high = 0.0, alpha
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if hoeffding_bentkus(middle, alpha, objects) <= delta else (low, middle)
    return low


def excess(truth: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far outside its interval the truth lies, ≤ 0 inside: max(l − x, x − u).

    Raises: DiffinvError where one of them is not a number.
    """
    found = torch.maximum(low - truth, truth - high)
    unknown = int(found.isnan().sum())
    if unknown:
        raise DiffinvError(f"conformal: {unknown} of {found.numel()} pixels are NaN; calibrate on images and intervals without.")
    return found


def _smallest(needed: Tensor, risk: float) -> tuple[float, float]:
    """The smallest ω that at most this share of values exceeds, and the share that does. needed: (N, pixels)."""
    ordered = needed.double().flatten().sort().values
    outside = math.floor(risk * len(ordered) + 1e-9)
    omega = float(ordered[len(ordered) - 1 - outside])
    return omega, float((ordered > omega).double().mean())


def rcps(truth: Tensor, low: Tensor, high: Tensor, *, alpha: float, delta: float, regime: Regime) -> ConformalMap:
    """One λ for all pixels.

    Arguments: truth, low, high: (N, …), images of the calibration set and their intervals. alpha: share of pixels outside that
        is allowed. delta: probability with which the promise may fail. regime: of these images.
    Raises: DiffinvError if N is too small for the promise, or where there are NaN.
    """
    omega, risk = _smallest(excess(truth, low, high).flatten(1), allowed_risk(alpha, delta, len(truth)))
    if omega < 0:
        omega, risk = 0.0, float((excess(truth, low, high) > 0).double().mean())
    return ConformalMap((omega,), alpha, delta, risk, len(truth), regime)


def k_rcps(
    first: tuple[Tensor, Tensor, Tensor],
    second: tuple[Tensor, Tensor, Tensor],
    groups: tuple[Tensor, Tensor],
    *,
    alpha: float,
    delta: float,
    regime: Regime,
    gammas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7),
) -> ConformalMap:
    """A λ for each group of pixels.

    Arguments: first, second: (truth, low, high) of images (N, …) for the optimisation and, disjoint from them, for the
        calibration. groups: int64 of the same shapes, 0 … K − 1, known without the truth. gammas: of the convex bounds; that
        with the shortest intervals is taken.
    Raises: DiffinvError if the second set is too small, or where there are NaN; ShapeError if groups do not fit.
    """
    for (truth, _, _), group in zip((first, second), groups, strict=True):
        if truth.shape != group.shape:
            raise ShapeError(
                f"k_rcps: groups {tuple(group.shape)} and images {tuple(truth.shape)} differ; give one group a pixel."
            )
    excess(*first)
    needed, kinds = excess(*second), 1 + max(int(group.max()) for group in groups)
    start = min((_shortest(*first, groups[0], kinds, alpha, gamma) for gamma in gammas), key=lambda found: found[1])[0]
    shifted = torch.where(needed > 0, needed - start[groups[1]], -torch.inf)
    omega, _ = _smallest(shifted.flatten(1), allowed_risk(alpha, delta, len(needed)))
    widening = (start + omega).clamp_min(0)
    risk = float((needed > widening[groups[1]]).double().mean())
    return ConformalMap(tuple(widening.tolist()), alpha, delta, risk, len(needed), regime)


def _shortest(
    truth: Tensor, low: Tensor, high: Tensor, group: Tensor, kinds: int, alpha: float, gamma: float
) -> tuple[Tensor, float]:
    """λ̃ (K,) of the shortest intervals with a mean bound ≤ α, and their mean λ; 0 for a group that is not here.

    The bound [(1 + q)|x − c|/(½(u − l) + λ) − q]₊, q = γ/(1 − γ), is convex in λ and ≥ 1 outside. Groups separate given the
    multiplier μ of the constraint: λ_k solves 1 + μ ∂_λ mean_k = 0, and μ is the smallest that meets it. Solved in units of
    the largest |x − c|, so that an image's unit does not matter.
    """
    q = gamma / (1 - gamma)
    half, offset = (high.double() - low.double()) / 2, (truth.double() - (low.double() + high.double()) / 2).abs()
    unit = float(offset.max()) or 1.0
    half, offset = half / unit, offset / unit
    share = torch.bincount(group.flatten(), minlength=kinds).double().clamp_min(1)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(kinds, dtype=torch.float64).scatter_add_(0, group.flatten(), values.flatten()) / share

    def risk(widening: Tensor) -> Tensor:
        return mean(((1 + q) * offset / (half + widening[group]).clamp_min(1e-300) - q).clamp_min(0))

    def pull(widening: Tensor) -> Tensor:
        width = (half + widening[group]).clamp_min(1e-300)
        return mean(torch.where((1 + q) * offset > q * width, (1 + q) * offset / width**2, 0.0))

    top = float(offset.max()) * (1 + q) / alpha

    def best(mu: float) -> Tensor:
        return _root(
            lambda v: mu * pull(v) > 1, torch.zeros(kinds, dtype=torch.float64), torch.full((kinds,), top, dtype=torch.float64)
        )

    weight = share / share.sum()
    low_mu, high_mu = -30.0, 60.0
    for _ in range(_BISECTIONS // 2):
        middle = (low_mu + high_mu) / 2
        enough = float((weight * risk(best(2.0**middle))).sum()) <= alpha
        low_mu, high_mu = (low_mu, middle) if enough else (middle, high_mu)
    widening = unit * best(2.0**high_mu)
    return widening, float((weight * widening).sum())


def _root(rising: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Elementwise bisection: where `rising` holds the answer lies above."""
    for _ in range(_BISECTIONS // 2):
        middle = (low + high) / 2
        above = rising(middle)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high
