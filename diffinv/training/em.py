"""Diffusion priors by expectation maximisation: any operator, any noise, and mixtures of them.

    E: x_i ~ p_θ(x | y_i, A_i), one draw a measurement, fresh each lap
    M: θ ← argmin_θ' mean_i E_{σ, z} w(σ) ‖D_θ'(T_g x_i + σ z, σ) − T_g x_i‖², warm-started with the average of the lap before

Each lap raises the likelihood of the data, up to the errors of draws and training. Noisy images teach the levels above their
noise by themselves, and draws those below: the M-step then has both (`beside`). T_g of a group under which the images are
as likely as they are brings what no measurement shows (equivariant imaging for a prior); what neither data nor group show
stays what the start made of it. A lap leaves its draws in chunks and its average in files that are there whole or not at all.
Invariant: a draw is a function of (seed, lap, number of the measurement) and the prior, whatever the process that makes it, so
that a lap that was killed, in either step, goes on to the same weights, and so do more processes with the same number of images
an update between them, up to rounding.

References: Rozet, Andry, Lanusse & Louppe, *Learning Diffusion Priors from Observations by Expectation Maximization*, 2024,
arXiv:2405.13712; for A = I: Daras et al. 2024, arXiv:2404.10177; equivariance: Chen, Tachella & Davies 2021, arXiv:2103.14756.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.core.duration import duration
from diffinv.core.rng import Rng
from diffinv.data.atomic import remove_parts, write_atomically
from diffinv.losses.base import Loss
from diffinv.priors.base import Denoiser
from diffinv.training.checkpoint import load_checkpoint, save_checkpoint
from diffinv.training.ema import ExponentialMovingAverage
from diffinv.training.expectation import EStep
from diffinv.training.loop import Trainer, processes
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import CleanImages, Drawn, Source, Surveys
from diffinv.training.validation import evaluate, summary
from diffinv.uncertainty.predictive import reduced_chi2

_EXPECTATION, _HELD_OUT = 0xE57E9, 0x4E1D  # streams of their own
_LAPS_APART = 7919  # between the seeds of two trainings


@dataclass(frozen=True)
class EmPlan:
    """How many laps, and of what.

    Arguments: laps. chunk: measurements drawn at once, a file each; the same for a resumed run. replay: laps before whose
    draws are learnt from too: 0 is expectation maximisation, more is steadier and slower to move.
    Raises: DiffinvError for numbers out of range.
    """

    laps: int
    chunk: int
    replay: int = 0

    def __post_init__(self) -> None:
        for name, least in (("laps", 1), ("chunk", 1), ("replay", 0)):
            if getattr(self, name) < least:
                raise DiffinvError(f"EmPlan: {name} is {getattr(self, name)}; give {least} or more.")


@dataclass(frozen=True)
class Score:
    """What held-out measurements say of a lap's prior, without truth; errors are standard errors.

    chi2: of draws, whitened, a datum: 1 if the prior is right and the draws are, because a draw and the truth then have the
    same joint distribution with y. Below 1 the draws follow the noise, above they miss the data; a prior that is too rough at
    some scales and too smooth at others can have 1 all the same. risk: of the `watch` loss, which that does not deceive.
    """

    lap: int
    chi2: float
    chi2_error: float
    risk: float | None
    risk_error: float | None


@dataclass(frozen=True, eq=False)
class ExpectationMaximisation:
    """Laps of E- and M-steps.

    Arguments:
        model: the network, trained in place from its present weights. source: measurements to learn from, of several instruments
        as `Surveys`. held_out: others, for the score. start: the prior of the first E-step. expect: the E-step of each lap; the
        last one serves all further laps. loss: of the M-step, on `CleanBatch`. views: (x, rng) → x, random augmentation of draws.
        plan: of a lap's training. em. folder: of this run alone. watch: a loss on held-out measurements of one instrument whose
        value is a risk (`AmbientSure`), or None. beside: whether `loss` is on `MeasuredBatch` instead, measurements with their
        draws for images (`AmbientSure` + `BelowNoise`). say: takes lines for the user.
    """

    model: Denoiser
    source: Source
    held_out: Source
    start: Denoiser
    expect: tuple[EStep, ...]
    loss: Loss
    views: Callable[[Tensor, Rng], Tensor]
    plan: TrainingPlan
    em: EmPlan
    folder: Path
    watch: Loss | None = None
    beside: bool = False
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.beside and isinstance(self.source, Surveys):
            raise DiffinvError("ExpectationMaximisation: `beside` is for images of one survey; leave it out with Surveys.")
        if self.watch is not None and isinstance(self.held_out, Surveys):
            raise DiffinvError("ExpectationMaximisation: `watch` is a risk of one survey; leave it out, or hold out one survey.")

    def run(self, *, resume: bool = False) -> Denoiser:
        """All laps; returns the average of the last one.

        Arguments: resume: go on with what the folder holds.
        Raises: ConfigError if the folder holds a run and `resume` is not set, or another run, with the differences.
        DiffinvError for draws that are not finite, naming the row, and as `Trainer.run`.
        """
        ranks = processes()
        if ranks.is_main_process:
            self._claim(resume)
        ranks.wait_for_everyone()
        average = ExponentialMovingAverage(self.model.to(ranks.device), 0.0).model
        for lap in range(self.em.laps):
            done = self._lap(lap) / "average.safetensors"
            prior = average if lap else self.start.to(ranks.device)
            if not done.exists():
                self._say(self._cost(lap, prior))
                self._expect(lap, prior, self.source, "draws", ranks)
                found = self._maximise(lap)
                if ranks.is_main_process:
                    save_checkpoint(done, {"average": found}, step=lap)
                ranks.wait_for_everyone()
            load_checkpoint(done, {"average": average})
            load_checkpoint(done, {"average": self.model})
            self._look(lap, average, ranks)
        ranks.destroy_process_group()
        return average.eval().requires_grad_(False)

    def scores(self) -> list[Score]:
        """Of the laps done."""
        paths = (self._lap(lap) / "score.json" for lap in range(self.em.laps))
        return [Score(**json.loads(path.read_text())) for path in paths if path.exists()]

    def _lap(self, lap: int) -> Path:
        return self.folder / f"lap-{lap:02d}"

    def _say(self, line: str) -> None:
        if processes().is_main_process:
            self.say(line)

    def _step(self, lap: int) -> EStep:
        return self.expect[min(lap, len(self.expect) - 1)]

    def _claim(self, resume: bool) -> None:
        """Write down what decides the weights, or compare with what was."""
        path = self.folder / "em.json"
        free = ("trackers", "save_every", "log_every", "batch_size")  # the last counts with the number of processes
        plan = {k: v for k, v in asdict(self.plan).items() if k not in free}
        known = {"rows": len(self.source), "held_out": len(self.held_out), "chunk": self.em.chunk, "replay": self.em.replay}
        known |= {"expect": [repr(step) for step in self.expect], "loss": repr(self.loss), "views": repr(self.views)}
        known |= {"images an update": self.plan.batch_size * processes().num_processes}
        known |= {"beside": True} if self.beside else {}
        known |= {"surveys": list(map(len, self.source.parts))} if isinstance(self.source, Surveys) else {}
        record = json.loads(json.dumps({**known, "plan": {k: str(v) for k, v in plan.items()}}))
        if path.exists():
            if not resume:
                raise ConfigError(f"{self.folder}: holds an expectation maximisation already; resume it, or give another folder.")
            before = json.loads(path.read_text())
            keys = [k for k in record | before if before.get(k) != record.get(k)]
            changed = "; ".join(f"{k}: {before.get(k)!r} → {record.get(k)!r}" for k in keys)
            if changed:
                raise ConfigError(f"{self.folder}: holds another run ({changed}); give another folder.")
        write_atomically(path, json.dumps(record, indent=2).encode())
        for lap in range(self.em.laps):
            remove_parts(self._lap(lap))

    def _cost(self, lap: int, prior: Denoiser) -> str:
        """What the lap will take, from a pass of each network on one chunk."""
        ranks, rows = processes().num_processes, len(self.source)
        first = self.source.chunks(self.em.chunk)[0]
        some = self.source.batch(first, self._streams(lap, first))
        x = torch.zeros(len(some.observation.y), *some.observation.image_shape, device=processes().device)
        step, plan, losses = self._step(lap), self.plan, 3 if self.beside else 1
        training = 3 * losses * plan.steps * plan.batch_size * _seconds(self.model, x)  # a pass forward and back costs three
        seconds = rows * step.passes * _seconds(prior, x) / ranks + training
        return (
            f"lap {lap}: {rows} draws of {step.passes:g} passes, {plan.steps} steps of {plan.batch_size * ranks} images: "
            f"about {duration(seconds)}"
        )

    def _streams(self, lap: int, rows: range | Tensor) -> Rng:
        return Rng.for_draws(self.plan.seed, rows, 1).spawn(_EXPECTATION).spawn(lap).to(processes().device)

    def _expect(self, lap: int, prior: Denoiser, source: Source, name: str, ranks) -> None:
        """The chunks of this process that are not there yet."""
        for k, rows in enumerate(source.chunks(self.em.chunk)):
            path = self._lap(lap) / f"{name}-{k:05d}.npy"
            if k % ranks.num_processes != ranks.process_index or path.exists():
                continue
            rng = self._streams(lap, rows)
            data = source.batch(rows, rng).observation
            x = self._step(lap).draw(prior, data, rng.spawn(1)).float()
            if not bool(x.isfinite().all()):
                bad = source.number(int(rows[(~x.isfinite()).flatten(1).any(1).cpu()][0]))
                raise DiffinvError(
                    f"E-step: the draw of row {bad} in lap {lap} is not finite; look at its data, or at the start."
                )
            stream = io.BytesIO()
            np.save(stream, x.cpu().numpy())
            write_atomically(path, stream.getvalue())
        ranks.wait_for_everyone()

    def draws(self, lap: int) -> Tensor:
        """All draws of a lap: (N, *image)."""
        return torch.cat([torch.from_numpy(np.load(path)) for path in sorted(self._lap(lap).glob("draws-*.npy"))])

    def _maximise(self, lap: int) -> Denoiser:
        images = torch.cat([self.draws(k) for k in range(max(0, lap - self.em.replay), lap + 1)])
        plan = replace(self.plan, seed=self.plan.seed + _LAPS_APART * (lap + 1))
        learnt = Drawn(self.source, images, self.views) if self.beside else CleanImages(images, self.views)
        training = Trainer(self.model, self.loss, learnt, plan, self._lap(lap))
        return training.run(resume=True, more=True)

    def _look(self, lap: int, average: Denoiser, ranks) -> None:
        """The score of the lap's prior; the draws are those that the next lap's E-step would make."""
        path = self._lap(lap) / "score.json"
        if ranks.is_main_process and not path.exists():
            write_atomically(path, json.dumps(asdict(self._score(lap, average))).encode())
        ranks.wait_for_everyone()
        score = Score(**json.loads(path.read_text()))
        risk = "" if score.risk is None else f", risk {score.risk:.5g} ± {score.risk_error:.2g}"
        self._say(f"lap {lap}: held-out χ² of draws {score.chi2:.4f} ± {score.chi2_error:.4f}{risk}")

    def _score(self, lap: int, average: Denoiser) -> Score:
        values = []
        for rows in self.held_out.chunks(self.em.chunk):
            rng = Rng.for_draws(self.plan.seed, rows, 1).spawn(_HELD_OUT).to(processes().device)
            data = self.held_out.batch(rows, rng).observation
            values.append(reduced_chi2(data, self._step(lap + 1).draw(average, data, rng.spawn(1))))
        risk: tuple[float | None, float | None] = (None, None)
        if self.watch is not None:
            settings = {"seed": self.plan.seed, "batch_size": self.em.chunk, "device": processes().device}
            risk = summary(evaluate(average.requires_grad_(False), self.watch, self.held_out, **settings))
        return Score(lap, *summary(torch.cat(values)), *risk)


def _seconds(network: Denoiser, x: Tensor) -> float:
    """Of a pass, an image."""
    with torch.no_grad():
        start = time.monotonic()
        network(x, torch.ones(len(x), device=x.device))
    return (time.monotonic() - start) / len(x)
