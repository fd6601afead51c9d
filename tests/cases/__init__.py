"""Tiny factories, one per registered name: two images with different parameters, float64. A name without a case fails the tests.

Each module of this package holds `CASES`, a dictionary from a registered name to a function without arguments.
"""

from __future__ import annotations

import importlib
import pkgutil

from diffinv.core import registry


def registered(kind: str, package: str) -> list[str]:
    """The registered names of a kind after every module of `package` has been imported."""
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        importlib.import_module(module.name)
    return registry.names(kind)
