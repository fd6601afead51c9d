"""The peers' methods of scripts/bench_peers: what each library gives by default, and settings to choose among.

A peer is measured twice on a problem: as the library has it, and with the best of its settings, chosen by scripts/bench_peers
on other data of the same problem. Ours are not chosen: they have the settings of `sampler_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ours_gaussian
from peers_worker import Peers, Run
from sampler_rows import Row

from diffinv.engine.draws import Method
from diffinv.guidance.base import ConjugateGradients
from diffinv.guidance.moment_matching import MomentMatching
from diffinv.samplers.sde import StochasticMultistep
from diffinv.schedules import LogUniform

OWN, DEEPINV, AZULA = LIBRARIES = ("diffinv", "DeepInverse", "azula")


@dataclass(frozen=True)
class Entry:
    """A method with its settings. claims: what it says of itself. draw: (problem's file, draws, seed) → draws and their cost."""

    library: str
    name: str
    setting: str
    claims: str
    draw: Callable[[Path, int, int], Run]

    @property
    def labels(self) -> dict[str, str]:
        return {"library": self.library, "method": self.name, "setting": self.setting, "claims": self.claims}


@dataclass(frozen=True)
class Peer:
    """A method of a peer. key: its name in scripts/peers_gaussian.py. settings: the default, then others to choose among.

    Settings that a dictionary does not name are the library's own defaults (`Settings` of peers_deepinv.py, peers_azula.py).
    """

    name: str
    key: str
    settings: tuple[dict, ...]

    @property
    def library(self) -> str:
        return DEEPINV if self.key.startswith("deepinv.") else AZULA

    def entry(self, peers: Peers, settings: dict, suffix: str) -> Entry:
        draw = lambda path, draws, seed: peers.run(self.key, path, draws=draws, seed=seed, settings=settings)
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        return Entry(self.library, f"{self.name}{suffix}", said, "–", draw)


def own_entry(name: str, row: Row, schedule: LogUniform) -> Entry:
    draw = lambda path, draws, seed: ours_gaussian.run(path, row, schedule, draws=draws, seed=seed)
    return Entry(OWN, name, f"steps {row.steps}", "calibrated" if row.calibrated else "no", draw)


ANNEALED = {"guidance": "annealed"}
FLOW = {"schedule": "ve", "sampler": "xeab", "sigma_min": 0.01}
PEERS = (
    Peer(
        "DPS",
        "deepinv.dps",
        (
            {"steps": 1000},
            {"steps": 1000, "weight": 3.0},
            {"steps": 1000, "weight": 10.0},
            {"steps": 200, **ANNEALED},
            {"steps": 200, **ANNEALED, "clip": False},
            {"steps": 1000, **ANNEALED, "clip": False},
        ),
    ),
    Peer(
        "DiffPIR",
        "deepinv.diffpir",
        tuple({"steps": 100, "lambda_": level, "zeta": zeta} for zeta in (0.1, 0.3, 1.0) for level in (7.0, 1.0, 20.0)),
    ),
    Peer(
        "DDRM",
        "deepinv.ddrm",
        (
            {"steps": 100},
            {"steps": 100, "lowest": 0.001},
            {"steps": 100, "eta": 1.0},
            {"steps": 100, "eta": 1.0, "lowest": 0.001},
            {"steps": 100, "eta": 0.5, "lowest": 0.001},
        ),
    ),
    Peer(
        "ΠGDM",
        "deepinv.pigdm",
        (
            {"steps": 200},
            {"steps": 100, "solver": "ddpm", "cg": 20},
            {"steps": 100, "solver": "ddim", "cg": 20},
            {"steps": 100, "solver": "ddim", "cg": 60},
        ),
    ),
    Peer(
        "moment matching",
        "deepinv.moment_matching",
        (
            {"steps": 200},
            {"steps": 200, "cg": 20, "alpha": 0.0},
            {"steps": 100, "cg": 20, "solver": "ddim", "sigma_min": 0.01},
            {"steps": 100, "cg": 40, "solver": "ddim", "sigma_min": 0.01},
        ),
    ),
    Peer(
        "MMPS",
        "azula.mmps",
        (
            {"steps": 64},
            {"steps": 64, "solver": "cg", "iterations": 20},
            {"steps": 64, "solver": "cg", "iterations": 20, "sampler": "ddpm"},
            {"steps": 64, "solver": "cg", "iterations": 20, **FLOW},
            {"steps": 32, "solver": "cg", "iterations": 40, **FLOW},
        ),
    ),
    Peer("TMPD", "azula.tmpd", ({"steps": 64}, {"steps": 64, "sampler": "ddpm"}, {"steps": 64, **FLOW})),
    Peer("ΠGDM", "azula.pgdm", ({"steps": 64}, {"steps": 32}, {"steps": 16})),
    Peer("DPS", "azula.dps", tuple({"steps": 1000, "zeta": zeta} for zeta in (1.0, 0.3, 3.0))),
    Peer(
        "DiffPIR",
        "azula.diffpir",
        (
            {"steps": 64},
            {"steps": 64, "solver": "cg", "iterations": 20},
            {"steps": 64, "solver": "cg", "iterations": 20, "sampler": "ddpm"},
            {"steps": 64, "solver": "cg", "iterations": 20, "sampler": "ddpm", "lambda_": 1.0},
        ),
    ),
)


def _default(steps: int) -> Entry:
    """What `diffinv.reconstruct` does by default, on noise levels from 30 to 0.01."""
    row = Row(Method().sampler, Method().guidance, steps)
    return own_entry("default: multistep SDE, 8 preconditioned GMRES", row, NARROW)


def _matched(steps: int, tol: float) -> Entry:
    """Moment matching on noise levels from 30 to 0.01, with at most 60 CG iterations."""
    row = Row(StochasticMultistep(), MomentMatching(ConjugateGradients(60, tol)), steps)
    return replace(own_entry("moment matching, multistep SDE", row, NARROW), setting=f"steps {steps}, CG to {tol:g}")


NARROW = LogUniform(0.01, 30.0)
# Steps with the tolerance (ours) or the iterations (theirs) of the inner solver, the cheapest first.
DEFAULT_SCAN = (16, 20, 24)
OURS_SCAN = ((16, 1e-3), (20, 3e-3), (20, 1e-3), (24, 1e-3))
DEEPINV_SCAN = ((115, 30), (115, 40), (128, 60))
AZULA_SCAN = ((32, 40), (36, 40), (40, 60))


def scans(peers: Peers) -> list[list[Entry]]:
    """Moment matching of each library, ours by default and with CG: lists from cheap to dear.

    The peers start from N(0, σ_max²) and need a larger σ_max: ours starts at E[x₀ | y] + σ_max z.
    """
    theirs = Peer("moment matching", "deepinv.moment_matching", ())
    exact = Peer("MMPS", "azula.mmps", ())
    ddim = {"solver": "ddim", "sigma_min": 0.01}
    return [
        [_default(steps) for steps in DEFAULT_SCAN],
        [_matched(steps, tol) for steps, tol in OURS_SCAN],
        [theirs.entry(peers, {"steps": steps, "cg": cg, **ddim}, "") for steps, cg in DEEPINV_SCAN],
        [exact.entry(peers, {"steps": steps, "solver": "cg", "iterations": cg, **FLOW}, "") for steps, cg in AZULA_SCAN],
    ]
