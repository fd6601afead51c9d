"""Names for classes, and the way from an object to a plain dictionary and back.

A registered class is a frozen dataclass; its dictionary holds its registry name, its constants, its tensors and its
registered parts. Invariant: `from_dict(to_dict(x))` equals `x`.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

from torch import Tensor

from diffinv.core.checks import ConfigError

T = TypeVar("T", bound=type)

_CLASSES: dict[str, dict[str, type]] = {}


def register(kind: str, name: str):
    """Class decorator: enter a class under `kind` ("operator", "noise", …) and `name`."""

    def enter(cls: T) -> T:
        names = _CLASSES.setdefault(kind, {})
        if name in names:
            raise ConfigError(f"registry: {kind} '{name}' is already {names[name].__name__}.")
        names[name] = cls
        cls.registry_key = (kind, name)
        return cls

    return enter


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_CLASSES.get(kind, {}))


def kinds() -> list[str]:
    """Every kind that has a registered class, sorted."""
    return sorted(_CLASSES)


def lookup(kind: str, name: str) -> type:
    """The class registered under `kind` and `name`; a typo gets the nearest name."""
    known = _CLASSES.get(kind, {})
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{kind} '{name}': unknown{hint}; known: {', '.join(sorted(known))}.")
    return known[name]


def to_dict(value: Any) -> Any:
    """A registered object as a plain dictionary {"kind", "name", fields…}; tensors stay tensors, tuples become lists."""
    if isinstance(value, (Tensor, str, int, float, bool, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    key = getattr(type(value), "registry_key", None)
    if key is None or not dataclasses.is_dataclass(value):
        raise ConfigError(f"registry: {type(value).__name__} is not registered; decorate the class with @register(kind, name).")
    fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return {"kind": key[0], "name": key[1], "fields": fields}


def from_dict(value: Any) -> Any:
    """The object that `to_dict` described."""
    if isinstance(value, list):
        return tuple(from_dict(v) for v in value)
    if isinstance(value, dict) and {"kind", "name", "fields"} == set(value):
        cls = lookup(value["kind"], value["name"])
        return cls(**{k: from_dict(v) for k, v in value["fields"].items()})
    return value
