"""One tiny group per registered name."""

from __future__ import annotations

from collections.abc import Callable

from diffinv.operators.groups import (
    Amplitudes,
    BandPermutations,
    Dilations,
    Flips,
    Group,
    OpenShifts,
    Product,
    QuarterTurns,
    Rotations,
    Shifts,
)
from diffinv.operators.interpolation import Cubic, Linear

CASES: dict[str, Callable[[], Group]] = {
    "shifts": lambda: Shifts(2),
    "open_shifts": lambda: OpenShifts(2),
    "quarter_turns": lambda: QuarterTurns(),
    "flips": lambda: Flips(),
    "rotations": lambda: Rotations(Linear()),
    "dilations": lambda: Dilations(0.5, 2.0, Cubic(), True),
    "band_permutations": lambda: BandPermutations(),
    "amplitudes": lambda: Amplitudes(0.3),
    "product": lambda: Product((QuarterTurns(), Dilations(1.0, 1.5, Linear(), False), Shifts(1))),
}
