"""DeepInverse's SURE, R2R and EI beside ours in scripts/bench_selfsup, in the environment that scripts/setup_peers makes.

Everything but the loss is ours: the images and their measurements, the network and its start, the order of the data, AdamW, the
rate, the clipping and the average, as `Trainer` has them. A loss has the settings that the library gives it, its noise level
(and transform) apart. The images are those that scripts/bench_selfsup wrote to its --work.

    PYTHONPATH=. .venv-peers/bin/python scripts/selfsup_peers.py [--images galaxies] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

DECLARED = torch.library.Library("torchvision", "DEF")  # see scripts/peers_gaussian.py
for _name in ("nms", "qnms"):
    DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import deepinv  # noqa: E402
from selfsup_inverse import ONE  # noqa: E402
from selfsup_inverse import PROBLEMS as INCOMPLETE  # noqa: E402
from selfsup_plan import BATCH, HELD_OUT, SURVEY_SEED, TRAINING, plan_of  # noqa: E402
from selfsup_problems import PROBLEMS as COMPLETE  # noqa: E402
from selfsup_problems import SHAPE, TRAINED, Problem, Size  # noqa: E402
from selfsup_tables import SIZES, ratios  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from diffinv.core.heap import keep_freed_memory  # noqa: E402
from diffinv.core.rng import Rng  # noqa: E402
from diffinv.likelihood import Observation  # noqa: E402
from diffinv.noise.gaussian import Gaussian  # noqa: E402
from diffinv.operators.algebra import Identity  # noqa: E402
from diffinv.training.ema import ExponentialMovingAverage  # noqa: E402
from diffinv.training.sources import Simulated  # noqa: E402

PROBLEMS = COMPLETE | INCOMPLETE
INSTRUMENTS = {
    "gaussian": (Identity(SHAPE), Gaussian(torch.full((1,), 0.1))),
    "one_mask": (ONE, Gaussian(torch.full((1,), 0.02))),
}


class Ours(nn.Module):
    """The benchmark's model with the library's interface: data of one operator → image."""

    def __init__(self, problem: str, size: Size) -> None:
        super().__init__()
        self.model = PROBLEMS[problem].recipes["supervised"].model(size)
        self.problem = problem

    def forward(self, y: Tensor, physics, **kwargs) -> Tensor:
        operator, noise = INSTRUMENTS[self.problem]
        return self.model(Observation(y, operator, noise))


@dataclass(frozen=True)
class Peer:
    """A row: the problem, the library's physics and its losses, added."""

    problem: str
    physics: Callable[[], object]
    losses: Callable[[], list]


def denoising():
    return deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))


def inpainting():
    physics = deepinv.physics.Inpainting(img_size=tuple(ONE.in_shape), mask=ONE.mask[0].float())
    physics.set_noise_model(deepinv.physics.GaussianNoise(0.02))
    return physics


PEERS = {
    "DeepInverse SURE": Peer("gaussian", denoising, lambda: [deepinv.loss.SureGaussianLoss(0.1)]),
    "DeepInverse R2R": Peer("gaussian", denoising, lambda: [deepinv.loss.R2RLoss()]),
    "DeepInverse SURE + EI, shifts": Peer(
        "one_mask",
        inpainting,
        lambda: [deepinv.loss.SureGaussianLoss(0.02), deepinv.loss.EILoss(deepinv.transform.Shift())],
    ),
    "DeepInverse supervised": Peer("gaussian", denoising, lambda: [deepinv.loss.SupLoss()]),
}


class Step:
    """One update by a list of the library's losses."""

    def __init__(self, peer: Peer, source: Simulated, rate: float, size: Size = TRAINED) -> None:
        self.source, self.physics, self.losses, model = source, peer.physics(), peer.losses(), Ours(peer.problem, size)
        for loss in self.losses:
            model = loss.adapt_model(model)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        self.average = ExponentialMovingAverage(model, 0.99)

    def __call__(self, index: Tensor, rng: Rng) -> None:
        batch = self.source.batch(index, rng)
        y, x = batch.observation.y, batch.x
        found = self.model(y, self.physics, update_parameters=True)
        total = sum(loss(x_net=found, x=x, y=y, physics=self.physics, model=self.model).mean() for loss in self.losses)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)


def train(peer: Peer, problem: Problem, images: Tensor, seed: int, steps: int) -> dict:
    torch.manual_seed(seed)
    plan = plan_of(steps, seed, None)
    step = Step(peer, Simulated(images[:TRAINING], problem.observe, SURVEY_SEED), plan.learning_rate)
    begin = time.perf_counter()
    for number in range(steps):
        for group in step.optimizer.param_groups:
            group["lr"] = plan.rate(number, 0.0)
        rng = Rng.for_draws(seed, torch.arange(BATCH, dtype=torch.int64) + number * BATCH, 1)
        index = (rng.uniform(torch.zeros(BATCH, 1, dtype=torch.float64))[:, 0] * TRAINING).long()
        step(index, rng)
    seconds = time.perf_counter() - begin
    held = Simulated(images[TRAINING:], problem.observe, SURVEY_SEED + 1)
    batch = held.batch(torch.arange(HELD_OUT), Rng.for_draws(seed, range(HELD_OUT), 1))
    with torch.no_grad():
        found = step.average.model(batch.observation.y, step.physics)
    psnr = (-10 * (found - batch.x).square().flatten(1).mean(1).log10()).tolist()
    return {"psnr": fmean(psnr), "seconds": round(seconds, 1), "multipliers": [], "start": None}


def step_times(images: Tensor, size: Size) -> dict[str, float]:
    """Time of a step over that of a supervised one of the library, as `selfsup_tables.ratios`."""
    sources = {key: Simulated(images[:TRAINING], PROBLEMS[key].observe, SURVEY_SEED) for key in INSTRUMENTS}
    made = {name: Step(peer, sources[peer.problem], 1e-5, size) for name, peer in PEERS.items()}
    rows = lambda number: (torch.arange(BATCH) + BATCH * number, Rng.for_draws(number, range(BATCH), 1))
    return ratios({name: lambda number, step=step: step(*rows(number)) for name, step in made.items()}, "DeepInverse supervised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", choices=["galaxies", "natural"], default="galaxies")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("out/bench_selfsup"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    images = torch.from_numpy(np.load(args.work / f"{args.images}.npy"))
    runs = args.work / f"{args.images}-{args.steps}"
    runs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name, peer in PEERS.items():
            path = runs / f"{peer.problem}, {name}, {seed}.json"
            if path.exists():
                continue
            result = train(peer, PROBLEMS[peer.problem], images, seed, args.steps)
            path.write_text(json.dumps(result))
            print(f"{path.stem}: {result['psnr']:.2f} dB, {result['seconds']:.0f} s", flush=True)
    found = {column: step_times(images, size) for column, size in SIZES.items()}
    times = {f"{peer.problem}, {name}": {column: found[column][name] for column in SIZES} for name, peer in PEERS.items()}
    (args.work / f"{args.images}-peers.json").write_text(json.dumps(times | {"version": deepinv.__version__}))


if __name__ == "__main__":
    main()
