"""Runs the peers' samplers on problems that scripts/bench_peers wrote; started by it with the python of .venv-peers.

One request a line on stdin, one answer a line on stdout, both JSON: {"method", "problem", "out", "draws", "seed", "settings"}
→ {"seconds", "forward", "vjp"}, the draws in `out`. Seconds are CPU seconds of the sampling call alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Not torchvision's own operators: their declarations alone, for its CUDA build cannot load them beside a CPU torch and stops
# its import on these two. Nothing here calls them.
DECLARED = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import peers_azula  # noqa: E402
import peers_deepinv  # noqa: E402
from exact_gaussian import Problem  # noqa: E402

CHECKED_SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one method and store its draws."""
    problem = Problem.load(Path(request["problem"])).repeated(request["draws"])
    torch.manual_seed(request["seed"])  # both libraries draw from the global generator somewhere
    generator = torch.Generator().manual_seed(request["seed"])
    start = time.process_time()
    if request["method"].startswith("deepinv."):
        settings = peers_deepinv.Settings(**request["settings"])
        draws = peers_deepinv.METHODS[request["method"]](problem, settings, generator)
    else:
        draws = peers_azula.METHODS[request["method"]](problem, peers_azula.Settings(**request["settings"]))
    seconds = time.process_time() - start
    np.save(request["out"], draws.detach().double().numpy())
    return {"seconds": seconds, **asdict(problem.tally)}


def _denoisers(problem: Problem, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    """D(x, σ) by every route that a sampler takes to it, for rows x; azula's VP schedule has one level a time only."""
    net, span, level = problem.network, 10.0, torch.tensor(sigma)
    in_unit = problem.rescaled(span, 0.5).network((x - problem.centre) / span + 0.5, level / span)
    exploding = peers_azula._exact(problem, peers_azula.Settings(steps=1, schedule="ve"))
    fraction = torch.log(level / exploding.schedule.sigma_min) / np.log(
        exploding.schedule.sigma_max / exploding.schedule.sigma_min
    )
    preserving = peers_azula._exact(problem, peers_azula.Settings(steps=1))
    time_of = torch.linspace(0, 1, 200001)  # VP: the nearest time on a fine grid
    alphas, sigmas = preserving.schedule(time_of)
    nearest = (sigmas / alphas / level).log().abs().argmin()
    return [
        peers_deepinv._Denoiser(net)(x, level),
        problem.centre + span * (in_unit - 0.5),
        exploding(x, fraction).mean,
        preserving(alphas[nearest] * x, time_of[nearest]).mean,
    ]


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Largest error of the wrapped denoisers against m + C (C + σ²)⁻¹ (x − m) solved densely, and of the operators."""
    problem = Problem.load(Path(request["problem"]))
    net, generator = problem.network, torch.Generator().manual_seed(request["seed"])
    covariance = ((net.vectors * net.values) @ net.vectors.mT).double()
    worst = 0.0
    for sigma in CHECKED_SIGMAS:
        x = net.mean + sigma * torch.randn(4, len(covariance), generator=generator)
        total = covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
        expected = net.mean + (covariance @ torch.linalg.solve(total, (x - net.mean).double().mT)).mT
        worst = max(worst, *(float((d - expected).abs().max()) for d in _denoisers(problem, x, sigma)))
    physics = peers_deepinv._decomposed(problem)
    image = torch.randn(2, *problem.operator.in_shape, generator=generator)
    data = problem.operator.A(image)
    gaps = [physics.A(image) - data, physics.A_adjoint(data) - problem.operator.A_adjoint(data)]
    return {"denoiser": worst, "operator": max(float(gap.abs().max()) for gap in gaps)}


def main() -> None:
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    names = ("deepinv", "azula", "torch", "numpy")
    print(json.dumps({name: version(name) for name in names}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result = check(request) if request["method"] == "check" else answer(request)
        print(json.dumps(result), file=replies, flush=True)


if __name__ == "__main__":
    main()
