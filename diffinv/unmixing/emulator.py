"""Emulators of spectral models: an interpolatory autoencoder with heads for the physical parameters.

In whitened principal components of the log spectrum, c = Uᵀ((log x − m)/s)/σ with s = x̄^(−½), so that Σ σ²Δc² is χ² a count,
an encoder E and a decoder D with anchors at the corners of the box, of known u_a, have

    λ(u) = multilinear(u),   u(λ) = Σ λ_a u_a + h(λ),   S(u) = softmax(m + s·U(σ·D(λ(u) E(A)))),

and λ_x, the barycentric weights of E(c). Inner layers are random and stay so; the last layers of E, D and h solve, in this order
and in closed form,

    |E(c) − λ(u) Q|²,   |D(λ_x E(A)) − c|² + 3 |D(λ(u) E(A)) − c|²,   |u(λ_x) − u|²,

Q an orthogonal set of latents for the anchors. On the remnants of the benchmark that takes a second; joint training of all layers
by Adam on the sum of these terms had a hundred times the error after thirty.
Invariant: spectra are positive and add up to 1 over the channels, and are smooth functions of the parameters.

References: see `barycentre`; Huang, Zhu & Siew, *Extreme learning machine*, 2006; Rahimi & Recht, *Random features*, 2007.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.checks import DiffinvError
from diffinv.spectral.base import Grid, Parameter, SpectralModel
from diffinv.unmixing.barycentre import barycentric_weights, initialise
from diffinv.unmixing.mixture import Coordinates

RIDGE = 1e-6  # of the barycentric weights
_RADIUS = 8.0  # of the anchors' latents: far enough apart for the decoder's activations to bend between them
_DAMPING = 1e-12  # of the least squares, relative to the mean square of the features
_BIAS = 0.7  # standard deviation of the random biases
_GIVEN = 3.0  # weight of decoding the weights of the parameters, over decoding those of the spectrum


class ResidualLayers(nn.Module):
    """Linear in, blocks h ← h + V silu(W h + b), linear out."""

    def __init__(self, size_in: int, size_out: int, width: int, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(size_in, width), nn.Linear(width, size_out)
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer is linear in: (B, width)."""
        h = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(functional.silu(up(h)))
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


@dataclass(frozen=True)
class EmulatorDesign:
    """width, blocks: of encoder, decoder and parameter head. The latent space has a dimension an anchor."""

    width: int = 224
    blocks: int = 1


class EmulatorNetwork(nn.Module):
    """The networks, and as buffers centre m (K,), scale s (K,), basis U (K, r), spread σ (r,) and anchors (a, r)."""

    def __init__(self, parts: dict[str, Tensor], parameters: int, design: EmulatorDesign) -> None:
        super().__init__()
        for name in ("centre", "scale", "basis", "spread", "anchors"):
            self.register_buffer(name, parts[name])
        self.register_buffer("corners", torch.tensor(list(product((0.0, 1.0), repeat=parameters))))
        rank, corners, layers = len(self.spread), len(self.corners), (design.width, design.blocks)
        self.encoder = ResidualLayers(rank, corners, *layers)
        self.decoder = ResidualLayers(corners, rank, *layers)
        self.to_parameters = ResidualLayers(corners, parameters, *layers)

    def weights_of(self, u: Tensor) -> Tensor:
        """λ(u), of multilinear interpolation between the corners: (B, P) → (B, a)."""
        return torch.where(self.corners.bool(), u[:, None], 1 - u[:, None]).prod(-1)

    def parameters_of(self, weights: Tensor) -> Tensor:
        """u(λ)."""
        return weights @ self.corners + self.to_parameters(weights)

    def weights_from(self, c: Tensor) -> Tensor:
        """λ_x of whitened components."""
        return barycentric_weights(self.encoder(c), self.encoder(self.anchors), RIDGE)

    def components(self, weights: Tensor) -> Tensor:
        """D(λ E(A)): (B, a) → (B, r)."""
        return self.decoder(weights @ self.encoder(self.anchors))

    def whiten(self, spectrum: Tensor) -> Tensor:
        """c of spectra (B, K), which need not be normalised."""
        log = spectrum.log()
        log = log - log.logsumexp(1, keepdim=True)
        return (((log - self.centre) / self.scale) @ self.basis) / self.spread

    def colour(self, c: Tensor) -> Tensor:
        """Normalised spectra of whitened components."""
        return torch.softmax(self.centre + self.scale * ((c * self.spread) @ self.basis.mT), 1)

    def spectrum(self, u: Tensor) -> Tensor:
        """S(u): (B, P) → (B, K)."""
        return self.colour(self.components(self.weights_of(u)))

    def invert(self, spectrum: Tensor) -> Tensor:
        """u of noiseless spectra: (B, K) → (B, P)."""
        return self.parameters_of(self.weights_from(self.whiten(spectrum)))


@dataclass(frozen=True, eq=False)
class Emulator(SpectralModel):
    """A trained network as a spectral model, normalised to 1 over the channels. log: parameters trained on a logarithmic axis."""

    grid: Grid
    own: tuple[Parameter, ...]
    log: tuple[str, ...]
    network: EmulatorNetwork

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.own

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.own, self.log)

    def evaluate(self, theta: Tensor) -> Tensor:
        return self.network.spectrum(self.coordinates.unit(theta))

    def invert(self, spectra: Tensor) -> Tensor:
        """θ (B, P) of noiseless spectra (B, K), by the parameter head."""
        return self.coordinates.physical(self.network.invert(spectra))


@dataclass(frozen=True)
class EmulatorPlan:
    """How an emulator is made.

    examples: spectra to fit. tolerance: χ² a count (99th percentile) that the principal components may lose: see `rank_of`.
    seed: of the random layers and of the examples.
    """

    examples: int = 4096
    tolerance: float = 5e-6
    design: EmulatorDesign = EmulatorDesign()
    seed: int = 0


@dataclass(frozen=True)
class EmulatorErrors:
    """On spectra not trained on: χ² a count at percentiles 50, 99 and 100; error of each parameter by the head, relative to its
    value on a logarithmic axis and in its unit on a linear one, at percentiles 50 and 99."""

    chi2: tuple[float, float, float]
    head: dict[str, tuple[float, float]]
    rank: int


def chi2_a_count(model: Tensor, truth: Tensor) -> Tensor:
    """Σ (S − S₀)²/S₀ of normalised spectra, (B,): χ² of the difference for one count."""
    return ((model - truth) ** 2 / truth).sum(1)


def train_emulator(model: SpectralModel, log: tuple[str, ...], plan: EmulatorPlan = EmulatorPlan()) -> Emulator:
    """Fit draws of the model that fill its box, corners included.

    Raises: DiffinvError if the model has no parameter, or is not positive and finite everywhere in its box.
    """
    coordinates, size = Coordinates(model.parameters, log), len(model.parameters)
    if not size:
        raise DiffinvError(f"emulator: {type(model).__name__} has no free parameter; use it as it is.")
    corners = torch.tensor(list(product((0.0, 1.0), repeat=size)))
    u = torch.cat([box_points(plan.examples, size, plan.seed), corners]).to(model.grid.edges)
    spectra = normalised(model, coordinates, u)
    parts = linear_parts(spectra, spectra[-len(corners) :], plan.tolerance)
    network = EmulatorNetwork(parts, size, plan.design).to(spectra.dtype).requires_grad_(False)
    initialise(network, plan.seed, bias=_BIAS)
    solve_layers(network, network.whiten(spectra), u)
    return Emulator(model.grid, model.parameters, log, network)


def normalised(model: SpectralModel, coordinates: Coordinates, u: Tensor) -> Tensor:
    """Spectra at u (B, P), each divided by its sum."""
    spectra = torch.cat([model(coordinates.physical(part)) for part in u.split(1024)])
    if not bool((spectra > 0).all() & spectra.isfinite().all()):
        raise DiffinvError(
            f"emulator: {type(model).__name__} is not positive in all channels of its box; leave such channels out."
        )
    return spectra / spectra.sum(1, keepdim=True)


def box_points(count: int, size: int, seed: int) -> Tensor:
    """Points that fill [0, 1]^P, (count, P) in float64: a scrambled Sobol sequence, stretched by 1 % beyond the faces and cut."""
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return ((points - 0.5) * 1.02 + 0.5).clamp(0, 1)


def linear_parts(spectra: Tensor, anchors: Tensor, tolerance: float) -> dict[str, Tensor]:
    """The buffers of `EmulatorNetwork`, from normalised spectra (N, K) and those of the anchors (a, K)."""
    centre, scale = spectra.log().mean(0), spectra.mean(0).rsqrt()
    scaled = (spectra.log() - centre) / scale
    values, vectors = torch.linalg.eigh(scaled.mT @ scaled / len(scaled))
    spread, basis = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    rank = rank_of(spectra, centre, scale, basis, tolerance)
    basis, spread = basis[:, :rank].contiguous(), spread[:rank]
    whitened = (((anchors.log() - centre) / scale) @ basis) / spread
    return {"centre": centre, "scale": scale, "basis": basis, "spread": spread, "anchors": whitened}


def rank_of(spectra: Tensor, centre: Tensor, scale: Tensor, basis: Tensor, tolerance: float) -> int:
    """The smallest number of components that loses at most `tolerance` of χ² a count in 99 % of the spectra."""
    scaled = (spectra.log() - centre) / scale
    for rank in range(1, basis.shape[1] + 1):
        kept = basis[:, :rank]
        model = torch.softmax(centre + scale * ((scaled @ kept) @ kept.mT), 1)
        if float(chi2_a_count(model, spectra).quantile(0.99)) <= tolerance:
            return rank
    return basis.shape[1]


def solve_layers(network: EmulatorNetwork, c: Tensor, u: Tensor) -> None:
    """The last layers, each given all that comes before it; in place. Arguments: c: (N, r). u: (N, P)."""
    ones, given = torch.ones(len(c), 1).to(c), network.weights_of(u)
    places = _RADIUS * torch.linalg.qr(network.encoder(network.anchors).mT)[0].mT
    _solve_last(network.encoder.last, network.encoder.features(c), ones, given @ places)
    anchors, found = network.encoder(network.anchors), network.weights_from(c)
    scale = torch.cat([ones, _GIVEN**0.5 * ones])
    features = network.decoder.features(torch.cat([found, given]) @ anchors)
    _solve_last(network.decoder.last, scale * features, scale, scale * torch.cat([c, c]))
    _solve_last(network.to_parameters.last, network.to_parameters.features(found), ones, u - found @ network.corners)


def _solve_last(layer: nn.Linear, features: Tensor, ones: Tensor, target: Tensor) -> None:
    design = torch.cat([features, ones], 1)
    damped = torch.cat(
        [design, (_DAMPING * design.pow(2).sum() / design.shape[1]) ** 0.5 * torch.eye(design.shape[1]).to(design)]
    )
    q, r = torch.linalg.qr(damped)
    solved = torch.linalg.solve_triangular(r, q[: len(design)].mT @ target, upper=True)
    layer.weight.copy_(solved[:-1].mT)
    layer.bias.copy_(solved[-1])


def emulator_errors(emulator: Emulator, model: SpectralModel, *, count: int, seed: int) -> EmulatorErrors:
    """Errors at `count` points of the box from another seed than the training's."""
    u = box_points(count, len(model.parameters), seed).to(model.grid.edges)
    truth = normalised(model, emulator.coordinates, u)
    chi2 = chi2_a_count(emulator.network.spectrum(u), truth)
    theta, found = emulator.coordinates.physical(u), emulator.invert(truth)
    head = {}
    for k, name in enumerate(model.names):
        error = (found[:, k] - theta[:, k]).abs() / (theta[:, k] if name in emulator.log else 1.0)
        head[name] = tuple(float(error.quantile(q)) for q in (0.5, 0.99))
    quantiles = tuple(float(chi2.quantile(q)) for q in (0.5, 0.99, 1.0))
    return EmulatorErrors(quantiles, head, len(emulator.network.spread))
