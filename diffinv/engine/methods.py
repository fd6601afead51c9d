"""From names and numbers to a `Method`: what a configuration file can say about sampling.

Invariant: whatever is not chosen is what `diffinv.reconstruct` would take.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace

import diffinv.samplers
from diffinv.core.checks import ConfigError
from diffinv.core.registry import lookup
from diffinv.engine.draws import INNER, Method
from diffinv.guidance.base import ConjugateGradients, Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.proximal import Proximal
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.guidance.tmpd import Tmpd
from diffinv.priors.store import PriorCard
from diffinv.samplers.base import Sampler
from diffinv.samplers.ddrm import Ddrm
from diffinv.samplers.dps import Dps
from diffinv.samplers.red_diff import RedDiff
from diffinv.samplers.renoise import Renoise
from diffinv.samplers.spectrum import FourierBasis


@dataclass(frozen=True)
class Choice:
    """What a user chose; None: the default of `diffinv.reconstruct`. iterations, tol: of the guidance's inner solver."""

    sampler: str | None = None
    steps: int | None = None
    guidance: str | None = None
    iterations: int | None = None
    tol: float | None = None


GUIDANCES: dict[str, Callable[[PriorCard, int, float], Guidance]] = {
    "moment_matching": lambda card, iterations, tol: MomentMatching(Gmres(iterations, tol, INNER)),
    "moment_matching_cg": lambda card, iterations, tol: MomentMatching(ConjugateGradients(iterations, tol)),
    "pseudo_inverse": lambda card, iterations, tol: PseudoInverse(card.sigma_data, iterations, tol),
    "tmpd": lambda card, iterations, tol: Tmpd(iterations, tol),
    "proximal": lambda card, iterations, tol: Proximal(1.0, iterations, tol),
}

# Samplers whose class needs numbers, from the prior's card and the number of steps; any other name is its class as it stands.
# diffpir: λ = 1 and ζ = 0.1 of the paper's code. dps: the paper's 1000 steps of ζ_c = 0.3 at σ_d ≈ ½ sum to 600 σ_d; 360 σ_d
# fitted a galaxy best in 24 steps. red_diff: λ of a white prior; 0.1 σ_d a step; no spread, as in the paper.
SAMPLERS: dict[str, Callable[[PriorCard, int], Sampler]] = {
    "diffpir": lambda card, steps: Renoise(zeta=0.1),
    "dps": lambda card, steps: Dps(360 * card.sigma_data / steps, relative=True),
    "ddrm_fourier": lambda card, steps: Ddrm(basis=FourierBasis()),
    "red_diff": lambda card, steps: RedDiff(lam=card.sigma_data**-2, lr=0.1 * card.sigma_data, spread=0.0),
}

# The guidance of a sampler that is half of a method, where none is chosen.
PARTNERS = {"diffpir": "proximal"}

# Iterations and tolerance of inner solves that are not the default's: what needs no network call has as many as it takes.
SOLVES = {"tmpd": (100, 1e-6), "proximal": (100, 1e-6), "pseudo_inverse": (100, 1e-6), "moment_matching_cg": (12, 1e-3)}

_SOLVERS = {ConjugateGradients: "CG", Gmres: "GMRES"}


def build_method(choice: Choice, card: PriorCard, *, where: Callable[[str], str] = lambda key: key) -> Method:
    """The sampler and guidance of a choice.

    Arguments: choice. card: of the prior, for σ_d. where: from a configuration key to the place that an error names.
    Raises: ConfigError for an unknown name, with the nearest one, and for a guidance that the sampler would ignore.
    """
    method = Method()
    if choice.steps is not None:
        method = replace(method, steps=choice.steps)
    if choice.sampler is not None:
        _register_samplers()
        try:
            method = replace(method, sampler=_build_sampler(choice.sampler, card, method.steps))
        except ConfigError as error:
            raise ConfigError(f"{where('sampler.name')}: {error}") from error
    if choice.guidance is not None and not method.sampler.guided:
        raise ConfigError(
            f"{where('sampler.guidance.name')}: sampler '{choice.sampler}' reads prior and likelihood itself and would ignore "
            f"the guidance '{choice.guidance}'; leave it out."
        )
    name = choice.guidance or PARTNERS.get(choice.sampler or "", "moment_matching")
    if name not in GUIDANCES:
        near = difflib.get_close_matches(name, GUIDANCES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{where('sampler.guidance.name')}: guidance '{name}': unknown{hint}; known: {', '.join(GUIDANCES)}.")
    solver = method.guidance.solver
    iterations, tol = SOLVES.get(name, (solver.iterations, solver.tol))
    iterations = choice.iterations if choice.iterations is not None else iterations
    tol = choice.tol if choice.tol is not None else tol
    return replace(method, guidance=GUIDANCES[name](card, iterations, tol))


def _build_sampler(name: str, card: PriorCard, steps: int) -> Sampler:
    """Raises: ConfigError for an unknown name, or a class that needs numbers which nobody has chosen."""
    if name in SAMPLERS:
        return SAMPLERS[name](card, steps)
    found = lookup("sampler", name)
    missing = [f.name for f in fields(found) if f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"sampler '{name}' needs {', '.join(missing)}: make it in Python, Method(sampler={found.__name__}(…)).")
    return found()


def _register_samplers() -> None:
    """Import every sampler, so that its name is known."""
    for module in pkgutil.iter_modules(diffinv.samplers.__path__, "diffinv.samplers."):
        importlib.import_module(module.name)


def describe_method(method: Method) -> str:
    """`StochasticMultistep + MomentMatching(GMRES 8 + 8, 0.001), 20 steps`: solver, iterations (outer + inner) and tolerance;
    fits a card.

    A sampler that reads prior and likelihood itself stands alone: `Dps, 24 steps`.
    """
    guidance = f" + {_describe_guidance(method.guidance)}" if method.sampler.guided else ""
    return f"{type(method.sampler).__name__}{guidance}, {method.steps} steps"


def _describe_guidance(guidance: Guidance) -> str:
    name = type(guidance).__name__
    if isinstance(guidance, (PseudoInverse, Tmpd, Proximal)):
        return f"{name}(CG {guidance.iterations}, {guidance.tol:.2g})"
    if isinstance(guidance, MomentMatching) and type(guidance.solver) in _SOLVERS:
        solver = guidance.solver
        inner = f" + {solver.inner}" if isinstance(solver, Gmres) and solver.inner else ""
        return f"{name}({_SOLVERS[type(solver)]} {solver.iterations}{inner}, {solver.tol:.2g})"
    return name
