"""The sections of `diffinv calibrate`: those of `diffinv sample`, what to simulate, and the bins of S/N."""

from __future__ import annotations

from typing import Annotated, Any

from diffinv.config import Field, Positive, Section, Share
from diffinv.sections.sample import SampleConfig, SimulateSection


class CalibrateSection(Section):
    """signal_to_noise: edges of the bins with factors of their own, ascending. S/N of a band: √(Σ y²/σ² − number of data).
    delta: probability with which a factor may break its promise; without it the promise is one on average over fits.
    """

    signal_to_noise: Annotated[tuple[Positive, ...], Field(min_length=1)]
    delta: Share | None = None


class CalibrateConfig(SampleConfig):
    """The configuration of `diffinv calibrate`: that of the runs to be calibrated, and the simulations for it."""

    simulate: SimulateSection
    calibrate: CalibrateSection

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a product: as for `diffinv sample`, whatever is simulated."""
        return {name: value for name, value in super().identity().items() if name not in ("simulate", "calibrate")}
