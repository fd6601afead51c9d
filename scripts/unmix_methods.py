"""The methods of scripts/bench_unmix: from a cube to parameters, amplitudes and, where a method has them, errors.

Pixel ML and binning: Fisher scoring from the best of several starts on spectra, or on spectra summed over blocks; σ is that of
Cramér and Rao. The starlet map and the Gaussian field are the two steps of `diffinv.unmixing.pipeline`; the starlet map's Laplace
width is the comparison that fails: the curvature of −log p plus that of Σ w √((Φu)² + ε²).
SUSHI's maps of weights start from the same blocks as ours, decode by the same network, and are turned into parameters by a fit to
each pixel's spectrum of each component; it has no errors. Its strength and number of iterations did best on seed 100 at 254 and
852 counts, of 0.5, 0.8, 1, 1.2 and 2, and 60 and 200.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from unmix_cubes import Case

from diffinv.core.linalg import cg
from diffinv.core.rng import Rng
from diffinv.data.remnants import Remnant
from diffinv.noise.poisson import Poisson
from diffinv.unmixing.emulator import Emulator, emulator_errors, train_emulator
from diffinv.unmixing.emulator_store import load_emulator, save_emulator
from diffinv.unmixing.maps import MapPlan, ParameterMap, Splitting, fit_map
from diffinv.unmixing.mixture import Component, Mixture, SpectralData
from diffinv.unmixing.pipeline import UnmixingPlan, pool_factor, pooled_start
from diffinv.unmixing.pixels import PixelPlan, fit_pixels, pool_index, pooled, quadratic
from diffinv.unmixing.posterior_maps import posterior
from diffinv.unmixing.shares import Shares
from diffinv.unmixing.starlet import Starlet
from diffinv.unmixing.sushi import SushiPlan, palm

ERRORS_AT, ERRORS_SEED = 1024, 9
ROUNDS = UnmixingPlan(PixelPlan()).rounds


@dataclass(frozen=True, eq=False)
class Found:
    """u (N, P), its σ or None, amplitude (N, C) in counts. shared: CPU s of what was computed before, for another method."""

    u: Tensor
    std: Tensor | None
    amplitude: Tensor
    shared: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A cube as data, the mixture of its spectra, and what methods of the case share."""

    mixture: Mixture
    data: SpectralData
    shape: tuple[int, int]
    plan: PixelPlan
    store: Path
    shared: dict[str, tuple[ParameterMap, float]] = field(default_factory=dict)

    @staticmethod
    def of(case: Case, models: tuple[Emulator, ...], store: Path) -> Problem:
        """store: file in which the sparse map is kept for a later run."""
        counts = torch.from_numpy(case.cube.counts).double().flatten(1).T.contiguous()
        one = torch.ones(1, dtype=torch.float64)
        data = SpectralData(counts, Poisson(one, 0 * one, floor=1e-9), torch.zeros(1, counts.shape[1], dtype=torch.float64))
        parts = [Component(name, model, model.log) for name, model in zip(("thermal", "synchrotron"), models, strict=False)]
        starts = (0.1, 0.3, 0.5, 0.7, 0.9) if len(parts) == 1 else (0.17, 0.5, 0.83)
        return Problem(Mixture(tuple(parts)), data, tuple(case.cube.counts.shape[1:]), PixelPlan(starts), store)

    @property
    def model(self) -> Mixture:
        """What maps are made with: of several components, their shares."""
        return Shares.of(self.mixture) if len(self.mixture.components) > 1 else self.mixture

    def smooth(self) -> tuple[ParameterMap, float]:
        """The starlet map and the CPU seconds that it took; computed once."""
        if "map" not in self.shared and self.store.exists():
            kept = torch.load(self.store, weights_only=True)
            self.shared["map"] = (ParameterMap(**kept["map"]), kept["CPU s"])
        if "map" not in self.shared:
            start = time.process_time()
            model = self.model
            begin = model.start if isinstance(model, Shares) else partial(pooled_start, model)
            first = begin(self.data, self.shape, pool_factor(self.data), PixelPlan())
            found = fit_map(model, self.data, self.shape, first, MapPlan())
            self.shared["map"] = (found, time.process_time() - start)
            torch.save({"map": vars(found), "CPU s": self.shared["map"][1]}, self.store)
        return self.shared["map"]


def emulators(remnant: Remnant, work: Path) -> tuple[Emulator, Emulator]:
    """Of the thermal and the synchrotron spectrum: trained once, with their errors in `work`/emulators.json."""
    paths = [work / "thermal.safetensors", work / "synchrotron.safetensors"]
    if not (work / "emulators.json").exists():
        facts = {}
        for path, model, log in zip(paths, (remnant.thermal, remnant.synchrotron), (("kT",), ()), strict=True):
            start = time.process_time()
            trained = train_emulator(model, log)
            spent = time.process_time() - start
            save_emulator(path, trained, "scripts/bench_unmix")
            facts[path.stem] = {"CPU s": spent, **asdict(emulator_errors(trained, model, count=ERRORS_AT, seed=ERRORS_SEED))}
        (work / "emulators.json").write_text(json.dumps(facts))
    return tuple(load_emulator(path) for path in paths)


def binned(factor: int) -> Callable[[Problem], Found]:
    """Maximum likelihood of blocks of factor × factor pixels; a pixel has its block's parameters and its share of the counts."""

    def method(problem: Problem) -> Found:
        mixture, index = problem.mixture, pool_index(problem.shape, factor)
        data = problem.data if factor == 1 else pooled(problem.data, problem.shape, factor)
        fit = fit_pixels(mixture, data, problem.plan)
        information = quadratic(mixture, data, fit.amplitude, fit.u).fisher
        widths = torch.linalg.inv(information + 1e-3 * torch.eye(fit.u.shape[1]).to(fit.u)).diagonal(dim1=1, dim2=2).sqrt()
        return Found(fit.u[index], widths[index], fit.amplitude[index] / factor**2)

    return method


def starlet(problem: Problem) -> Found:
    """The sparse map with its Laplace width."""
    found, spent = problem.smooth()
    step = quadratic(problem.model, problem.data, found.amplitude, found.u)
    amplitude, own = found.amplitude, len(problem.mixture.names)
    if isinstance(problem.model, Shares):
        amplitude = amplitude * problem.model.fractions(found.u)[0]
    return Found(found.u[:, :own], _laplace(problem.shape, step.fisher, found)[:, :own], amplitude, spent)


def _laplace(shape: tuple[int, int], fisher: Tensor, found: ParameterMap, *, draws: int = 32, knee: float = 1e-3) -> Tensor:
    """σ from draws x = Q⁻¹ (F^½ z + Φᵀ W^½ z'), Q = F + Φᵀ W Φ, W = w/√((Φu)² + ε²), ε = knee."""
    split = Splitting(Starlet(MapPlan().scales), shape, fisher)
    size = found.u.shape[1]
    image = lambda v: v.mT.reshape(-1, 1, *shape)
    back = lambda v, batch: v.reshape(batch, size, -1).mT
    details = split.transform.forward(image(found.u[None]))
    weight = found.kappa * split.weights() / (details**2 + knee**2).sqrt()
    bend = lambda v: (weight * split.transform.forward(image(v)).unflatten(0, (len(v), size))).flatten(0, 1)
    product = lambda v: (fisher @ v[..., None])[..., 0] + back(split.transform.adjoint(bend(v)), len(v))
    rng, like = Rng.for_draws(0, range(draws), 1), found.u.expand(draws, *found.u.shape)
    root = torch.linalg.cholesky(fisher + 1e-9 * torch.eye(size).to(fisher))
    kicks = (weight.sqrt() * rng.normal(weight.expand(draws, *weight.shape))).flatten(0, 1)
    rhs = (root @ rng.normal(like)[..., None])[..., 0] + back(split.transform.adjoint(kicks), draws)
    x = cg(product, rhs, iterations=60, tol=1e-3).solution
    return x.pow(2).mean(0).sqrt()


def ours(problem: Problem) -> Found:
    """The Gaussian field about the sparse map: what `diffinv unmix` reports."""
    found, spent = problem.smooth()
    result = posterior(problem.model, problem.data, problem.shape, found, rounds=ROUNDS)
    if isinstance(problem.model, Shares):
        result = problem.model.unblended(problem.data, result)
    return Found(result.u, result.std, result.amplitude, spent)


def sushi(problem: Problem) -> Found:
    """PALM on the weights of the emulators' anchors, then each pixel's parameters from the fitted spectra of each component."""
    parts = problem.mixture.components
    networks = [component.model.network for component in parts]
    decoders = [lambda weights, n=network: n.colour(n.components(weights)) for network in networks]
    amplitude, u = pooled_start(problem.mixture, problem.data, problem.shape, pool_factor(problem.data), PixelPlan())
    own = [u[:, list(columns)] for columns in problem.mixture.columns]
    start = [(network.weights_of(v), amplitude[:, k]) for k, (network, v) in enumerate(zip(networks, own, strict=True))]
    maps = palm(decoders, problem.data, problem.shape, start, SushiPlan(strength=0.8, iterations=60))
    found = torch.empty_like(u)
    for k, (component, columns) in enumerate(zip(parts, problem.mixture.columns, strict=True)):
        data = SpectralData(maps.amplitude[:, k, None] * maps.spectra[k], problem.data.noise, problem.data.background)
        found[:, list(columns)] = fit_pixels(Mixture((component,)), data, PixelPlan((0.1, 0.3, 0.5, 0.7, 0.9))).u
    return Found(found, None, maps.amplitude)


METHODS: dict[str, Callable[[Problem], Found]] = {
    "pixel ML": binned(1),
    "2×2 binning": binned(2),
    "4×4 binning": binned(4),
    "starlet map, Laplace width": starlet,
    "ours: Gaussian field": ours,
    "SUSHI: PALM on weights": sushi,
}
