"""From names and numbers to a `Method`: what a configuration file can say about sampling.

Invariant: whatever is not chosen is what `diffinv.reconstruct` would take.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import diffinv.samplers
from diffinv.core.checks import ConfigError
from diffinv.core.registry import lookup
from diffinv.engine.reconstruct import Method
from diffinv.guidance.base import ConjugateGradients, Gmres, Guidance
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.guidance.pseudo_inverse import PseudoInverse
from diffinv.priors.store import PriorCard


@dataclass(frozen=True)
class Choice:
    """What a user chose; None: the default of `diffinv.reconstruct`. iterations, tol: of the guidance's inner solver."""

    sampler: str | None = None
    steps: int | None = None
    guidance: str | None = None
    iterations: int | None = None
    tol: float | None = None


GUIDANCES: dict[str, Callable[[PriorCard, int, float], Guidance]] = {
    "moment_matching": lambda card, iterations, tol: MomentMatching(Gmres(iterations, tol)),
    "moment_matching_cg": lambda card, iterations, tol: MomentMatching(ConjugateGradients(iterations, tol)),
    "pseudo_inverse": lambda card, iterations, tol: PseudoInverse(card.sigma_data, iterations, tol),
}

_SOLVERS = {ConjugateGradients: "CG", Gmres: "GMRES"}


def build_method(choice: Choice, card: PriorCard, *, where: Callable[[str], str] = lambda key: key) -> Method:
    """The sampler and guidance of a choice.

    Arguments: choice. card: of the prior, for σ_d. where: from a configuration key to the place that an error names.
    Raises: ConfigError for an unknown name, with the nearest one.
    """
    method = Method()
    if choice.steps is not None:
        method = replace(method, steps=choice.steps)
    if choice.sampler is not None:
        _register_samplers()
        try:
            method = replace(method, sampler=lookup("sampler", choice.sampler)())
        except ConfigError as error:
            raise ConfigError(f"{where('sampler.name')}: {error}") from error
    name = choice.guidance or "moment_matching"
    if name not in GUIDANCES:
        near = difflib.get_close_matches(name, GUIDANCES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{where('sampler.guidance.name')}: guidance '{name}': unknown{hint}; known: {', '.join(GUIDANCES)}.")
    solver = method.guidance.solver
    iterations = choice.iterations if choice.iterations is not None else solver.iterations
    tol = choice.tol if choice.tol is not None else solver.tol
    return replace(method, guidance=GUIDANCES[name](card, iterations, tol))


def _register_samplers() -> None:
    """Import every sampler, so that its name is known."""
    for module in pkgutil.iter_modules(diffinv.samplers.__path__, "diffinv.samplers."):
        importlib.import_module(module.name)


def describe_method(method: Method) -> str:
    """`StochasticMultistep + MomentMatching(GMRES 12, 0.001), 24 steps`: solver, iterations and tolerance; fits a card."""
    return f"{type(method.sampler).__name__} + {_describe_guidance(method.guidance)}, {method.steps} steps"


def _describe_guidance(guidance: Guidance) -> str:
    name = type(guidance).__name__
    if isinstance(guidance, PseudoInverse):
        return f"{name}(CG {guidance.iterations}, {guidance.tol:.2g})"
    if isinstance(guidance, MomentMatching) and type(guidance.solver) in _SOLVERS:
        return f"{name}({_SOLVERS[type(guidance.solver)]} {guidance.solver.iterations}, {guidance.solver.tol:.2g})"
    return name
