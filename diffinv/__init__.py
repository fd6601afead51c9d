"""diffinv: which images could have produced these data, and how sure are we?

The public names below are imported when they are first used, so that `import diffinv` is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Observation": "diffinv.likelihood",
    "Joint": "diffinv.likelihood",
    "Flat": "diffinv.likelihood",
    "Prior": "diffinv.priors.store",
    "load_prior": "diffinv.priors.store",
    "MomentMatching": "diffinv.guidance.moment_matching",
    "PseudoInverse": "diffinv.guidance.pseudo_inverse",
    "Posterior": "diffinv.posterior",
    "sample": "diffinv.samplers.base",
    "reconstruct": "diffinv.engine.reconstruct",
    "Method": "diffinv.engine.reconstruct",
    "Result": "diffinv.engine.reconstruct",
    "load_reconstructor": "diffinv.training.store",
    "read_observation": "diffinv.data.observation",
    "Rng": "diffinv.core.rng",
    "DiffinvError": "diffinv.core.checks",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffinv' has no attribute {name!r}; public names: {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
