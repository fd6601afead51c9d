"""How long something takes, for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`: the unit in which it has two digits or so."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
