"""Pixels as sums of components whose spectra depend on a few parameters.

    μ_i(E) = b_i(E) + Σ_c A_ic S_c(E; θ_ic),   y_i ~ noise(μ_i),   i a pixel.

Parameters are fitted as u ∈ [0, 1], along the box of each spectral model, on a linear or a logarithmic axis. A parameter that
several components share (a link) is one column of u. Amplitudes are ≥ 0, in counts where the model is normalised to 1.
Invariant: row i of every result depends on row i of the arguments alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import jvp

from diffinv.core.batched import Batched
from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.noise.independent import Independent
from diffinv.spectral.base import Parameter, SpectralModel


@dataclass(frozen=True, eq=False)
class Coordinates:
    """u ∈ [0, 1] along boxes: θ = l + (h − l) u, or l (h/l)^u on a logarithmic axis.

    Arguments: parameters: the boxes. log: names of the parameters whose axis is logarithmic.
    Raises: DiffinvError if a logarithmic axis does not start above 0, or a name is unknown.
    """

    parameters: tuple[Parameter, ...]
    log: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        unknown = [name for name in self.log if name not in names]
        if unknown:
            raise DiffinvError(f"log: no parameter {', '.join(unknown)}; the model has {', '.join(names)}.")
        for p in self.parameters:
            if p.name in self.log and not p.low > 0:
                raise DiffinvError(f"log: {p.name} starts at {p.low:g}; a logarithmic axis needs a box above 0.")

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = [[p.low, p.high] for p in self.parameters]
        low, high = torch.tensor(ends, dtype=like.dtype, device=like.device).reshape(-1, 2).unbind(1)
        return low, high, torch.tensor([p.name in self.log for p in self.parameters], dtype=torch.bool, device=like.device)

    def physical(self, u: Tensor) -> Tensor:
        """u (…, P) → θ (…, P), in the parameters' units; beyond [0, 1] the axes go on."""
        low, high, curved = self._columns(u)
        base, ratio = torch.where(curved, low, 1.0), torch.where(curved, high / torch.where(curved, low, 1.0), 1.0)
        return torch.where(curved, base * torch.exp(u * ratio.log()), low + (high - low) * u)

    def unit(self, theta: Tensor) -> Tensor:
        """θ (…, P) → u (…, P)."""
        low, high, curved = self._columns(theta)
        base = torch.where(curved, low, 1.0)
        ratio, value = torch.where(curved, high / base, 2.0), torch.where(curved, theta / base, 1.0)
        return torch.where(curved, value.log() / ratio.log(), (theta - low) / (high - low))


@dataclass(frozen=True, eq=False)
class Component:
    """A spectrum with a name. log: parameters that are fitted on a logarithmic axis."""

    name: str
    model: SpectralModel
    log: tuple[str, ...] = ()

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.model.parameters, self.log)


@dataclass(frozen=True, eq=False)
class SpectralData(Batched):
    """Spectra of pixels.

    Arguments: y: (N, K) data. noise: over (N, K), with its mask. background: (1|N, K), known expectation that adds to the model.
    """

    y: Tensor
    noise: Independent
    background: Tensor

    def loss(self, mean: Tensor) -> Tensor:
        """−log p(y | mean), (N,)."""
        return -self.noise.log_prob(self.y, mean)

    @property
    def good(self) -> Tensor:
        """(N, K), True where a datum counts."""
        mask = self.noise.mask
        return torch.ones_like(self.y, dtype=torch.bool) if mask is None else mask.expand(self.y.shape)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Components, and which of their parameters are one.

    Arguments: components. links: groups of "component.parameter" that share their value.
    Raises: DiffinvError if names clash or are unknown, or linked parameters differ in box or axis.
    """

    components: tuple[Component, ...]
    links: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = field(init=False)
    columns: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        known = {f"{c.name}.{p.name}": (p.low, p.high, p.name in c.log) for c in self.components for p in c.model.parameters}
        if len({c.name for c in self.components}) < len(self.components):
            raise DiffinvError("Mixture: two components have one name; give each its own.")
        first = {name: name for name in known}
        twice = [name for name, count in Counter(n for group in self.links for n in set(group)).items() if count > 1]
        if twice:
            raise DiffinvError(f"links: {', '.join(twice)} in more than one group; join the groups.")
        for group in self.links:
            unknown = [name for name in group if name not in known]
            if unknown:
                raise DiffinvError(f"links: no parameter {', '.join(unknown)}; there are {', '.join(known)}.")
            if len({known[name] for name in group}) > 1:
                raise DiffinvError(f"links: {' and '.join(group)} differ in box or axis; give them the same.")
            first |= {name: group[0] for name in group}
        free = tuple(dict.fromkeys(first.values()))
        columns = tuple(tuple(free.index(first[f"{c.name}.{p.name}"]) for p in c.model.parameters) for c in self.components)
        object.__setattr__(self, "names", free)
        object.__setattr__(self, "columns", columns)

    @property
    def coordinates(self) -> Coordinates:
        """Of the free parameters, in the order of `names`."""
        found: dict[int, tuple[Parameter, bool]] = {}
        for component, columns in zip(self.components, self.columns, strict=True):
            for parameter, column in zip(component.model.parameters, columns, strict=True):
                found.setdefault(column, (parameter, parameter.name in component.log))
        ordered = [found[k] for k in range(len(found))]
        renamed = tuple(Parameter(n, p.unit, p.low, p.high) for n, (p, _) in zip(self.names, ordered, strict=True))
        return Coordinates(renamed, tuple(n for n, (_, log) in zip(self.names, ordered, strict=True) if log))

    def shapes(self, u: Tensor) -> list[Tensor]:
        """S_c(u), each (N, K)."""
        self._check(u)
        return [spectrum(u[:, list(columns)]) for spectrum, columns in zip(self._spectra(), self.columns, strict=True)]

    def _spectra(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda u, c=c: c.model(c.coordinates.physical(u)) for c in self.components]

    def _check(self, u: Tensor) -> None:
        if u.ndim != 2 or u.shape[1] != len(self.names):
            raise ShapeError(f"Mixture expects u (N, {len(self.names)}): {', '.join(self.names)}; got {tuple(u.shape)}.")

    def mean(self, amplitude: Tensor, u: Tensor, background: Tensor) -> Tensor:
        """μ (N, K). Arguments: amplitude: (N, C). u: (N, P). background: (1|N, K)."""
        return background + sum(a[:, None] * s for a, s in zip(amplitude.unbind(1), self.shapes(u), strict=True))

    def linearise(self, amplitude: Tensor, u: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """μ (N, K) and ∂μ/∂(A, u), (N, K, C + P), by forward mode."""
        self._check(u)
        slopes = u.new_zeros(len(u), background.shape[-1], len(self.names))
        shapes = []
        for a, spectrum, columns in zip(amplitude.unbind(1), self._spectra(), self.columns, strict=True):
            own = u[:, list(columns)]
            value = None
            for k, column in enumerate(columns):
                direction = torch.zeros_like(own)
                direction[:, k] = 1.0
                value, slope = jvp(spectrum, (own,), (direction,))
                slopes[..., column] += a[:, None] * slope
            shapes.append(spectrum(own) if value is None else value)
        mean = background + sum(a[:, None] * s for a, s in zip(amplitude.unbind(1), shapes, strict=True))
        return mean, torch.cat([torch.stack(shapes, -1), slopes], -1)
