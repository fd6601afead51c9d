"""The training loop: one for denoisers and reconstructors, by any loss on any source, by accelerate.

    θ ← AdamW(θ, ∇_θ mean L(f_θ, batch; m)),   m ← m + momentum ascent of the same ∇_m

θ are the weights, with an exponential moving average, and m the loss's multipliers, if it has any (UNSURE).
Invariant: the data order and every random number are functions of (seed, step, process), and a checkpoint holds all else that
the next step depends on, so that a resumed run equals an uninterrupted one, on the CPU to the bit. (A `deadline` ties the
learning rate to the clock, and is the exception.)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from diffinv.core.batched import Batched
from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss
from diffinv.training.checkpoint import Stateful, clear_temporaries, load_checkpoint, save_checkpoint
from diffinv.training.ema import ExponentialMovingAverage
from diffinv.training.log import Log
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Source
from diffinv.training.validation import EarlyStopping, evaluate, summary


@dataclass(frozen=True, eq=False)
class _Session:
    """What changes during a run."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage
    multipliers: nn.ParameterList
    ascent: torch.optim.Optimizer | None
    watch: EarlyStopping
    log: Log

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        parts = {"model": self.accelerator.unwrap_model(self.model), "optimizer": self.optimizer, "ema": self.ema}
        parts |= {"multipliers": self.multipliers, "validation": self.watch, "log": self.log}
        optional = {"ascent": self.ascent, "scaler": self.accelerator.scaler}
        return parts | {name: part for name, part in optional.items() if part is not None}


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains a model by a loss on a source.

    With `validation`, the loss of the averaged model on it is looked at every `plan.validate_every` steps and at the end, the
    training stops early without progress (see `EarlyStopping`), and the best average is the result. A loss with multipliers is
    looked at too, but neither stopped nor chosen by that: the loss climbs with them, so that two looks cannot be compared.

    Arguments: model: trained in place; what `loss` calls. loss: (model, batch, rng) → (B,). source: what it learns from.
    plan. folder: where checkpoint.safetensors and log.jsonl go; one training a folder. validation: held-out data.
    """

    model: nn.Module
    loss: Loss
    source: Source
    plan: TrainingPlan
    folder: Path
    validation: Source | None = None

    def check(self) -> None:
        """Raise what `run` raises before its first step, the checkpoint apart."""
        self._check(self._accelerator().device)

    def run(self, *, resume: bool = False, more: bool = False, started: Callable[[], None] = lambda: None) -> nn.Module:
        """Train to the end of the plan; returns the averaged model: the best by validation, or else the last.

        Arguments: resume: continue from the folder's checkpoint if it has one; else the folder's log starts afresh. more:
        another training follows in these processes, which stay connected. started: called when nothing can refuse the training
        any more, before anything is written and the first step is made.
        Raises: UnsupportedError before the first step where the loss cannot do with the data. DiffinvError when the loss or its
        gradient is not finite, naming the step (the last good checkpoint is kept), and when the plan cannot be followed here.
        """
        accelerator = self._accelerator()
        path = self.folder / "checkpoint.safetensors"
        self._check(accelerator.device)
        session = self._open(accelerator)
        try:
            if accelerator.is_main_process:
                clear_temporaries(path)
            first = load_checkpoint(path, session.parts()) if resume and path.exists() else 0
            started()
            session.log.rewind(first)
            self._steps(session, first, path)
            for tracker in accelerator.trackers:
                tracker.finish()
            if not more:
                processes().destroy_process_group()
        finally:
            accelerator.unwrap_model(session.model, keep_fp32_wrapper=False)
        if self._chooses and session.watch.weights:
            session.ema.model.load_state_dict(session.watch.weights)
        return session.ema.model

    def batch(self, step: int, process: int, processes: int, device: torch.device, part: int = 0) -> tuple[Batched, Rng]:
        """A part of the batch of a step and its random streams: functions of (seed, step, process) alone."""
        size = self.plan.batch_size // self.plan.parts
        numbers = torch.arange(size, dtype=torch.int64) + (step * processes + process) * self.plan.batch_size + part * size
        rng = Rng.for_draws(self.plan.seed, numbers, 1)
        index = (rng.uniform(torch.zeros(size, 1, dtype=torch.float64))[:, 0] * len(self.source)).long()
        rng = rng.to(device)
        return self.source.batch(index, rng), rng

    @property
    def _chooses(self) -> bool:
        """Whether validation decides when to stop and what to return."""
        return self.validation is not None and not self.loss.multipliers

    def _accelerator(self) -> Accelerator:
        plan = self.plan
        trackers = list(plan.trackers) or None
        try:
            accelerator = Accelerator(
                mixed_precision=plan.precision, dynamo_backend=plan.compiler, log_with=trackers, project_dir=self.folder
            )
        except ValueError as error:
            raise DiffinvError(f"training: accelerate refuses the plan ({' '.join(str(error).split())[:300]}).") from error
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and accelerator.num_processes == 1:
            raise DiffinvError(
                f"training: started as {started} processes that do not see each other; without GPUs, set ACCELERATE_USE_CPU=true."
            )
        if plan.precision == "fp16" and accelerator.scaler is None:
            raise DiffinvError(f"training: fp16 wants a GPU, and this is {accelerator.device}; use precision bf16 or no.")
        if trackers and len(accelerator.log_with) < len(trackers):
            raise DiffinvError(f"training: of the trackers {trackers} not all are installed; install them or leave them out.")
        return accelerator

    def _check(self, device: torch.device) -> None:
        """Whether the loss can do with the data, before anything is written."""
        self.loss.check(self.batch(0, 0, 1, device)[0])
        if self.plan.precision != "no" and self.loss.differences:
            raise DiffinvError(
                f"training: {type(self.loss).__name__} takes finite differences, which {self.plan.precision} drowns in rounding; "
                "give it slope=ForwardMode(), or precision no."
            )
        if self.loss.multipliers and self.plan.multiplier_rate is None:
            raise DiffinvError(f"training: {type(self.loss).__name__} has multipliers; give the plan a multiplier_rate.")
        if self.validation is not None:
            if len(self.validation) < 2:
                raise DiffinvError(f"training: {len(self.validation)} held-out row; validation wants 2 or more.")
            self.loss.check(self.validation.batch(torch.arange(2), Rng.for_draws(self.plan.seed, range(2), 1).to(device)))

    def _open(self, accelerator: Accelerator) -> _Session:
        plan = self.plan
        adam = torch.optim.AdamW(self.model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        ema = ExponentialMovingAverage(self.model, plan.ema_decay)
        model, optimizer = accelerator.prepare(self.model, adam)
        ema.model.to(accelerator.device)
        multipliers = nn.ParameterList(dict.fromkeys(self.loss.multipliers)).to(accelerator.device)
        ascent = None
        if len(multipliers):
            ascent = torch.optim.SGD(multipliers, plan.multiplier_rate, momentum=plan.multiplier_momentum, maximize=True)
        if plan.trackers:
            accelerator.init_trackers("diffinv", {k: v for k, v in asdict(plan).items() if k != "trackers"})
        log = Log(self.folder / "log.jsonl", writes=accelerator.is_main_process)
        return _Session(accelerator, model, optimizer, ema, multipliers, ascent, EarlyStopping(plan.patience), log)

    def _steps(self, session: _Session, first: int, path: Path) -> None:
        plan, accelerator, start = self.plan, session.accelerator, time.monotonic()
        for step in range(first, plan.steps):
            if self._chooses and session.watch.stopped:
                break
            elapsed = self._agreed(accelerator, time.monotonic() - start)
            session.log.add(self._update(session, step, elapsed))
            session.ema.update(accelerator.unwrap_model(session.model))
            done = step + 1
            last = done == plan.steps or elapsed > plan.deadline
            if self.validation is not None and (done % plan.validate_every == 0 or last):
                self._validate(session, done)
                last = last or (self._chooses and session.watch.stopped)
            if done % plan.log_every == 0 or last:
                self._log(session, done, time.monotonic() - start)
            if accelerator.is_main_process and (done % plan.save_every == 0 or last):
                save_checkpoint(path, session.parts(), step=done)
            if last:
                break

    def _agreed(self, accelerator: Accelerator, elapsed: float) -> float:
        """Seconds since the start, the same in all processes: they must stop together."""
        if accelerator.num_processes == 1 or math.isinf(self.plan.deadline):
            return elapsed
        return accelerator.reduce(torch.tensor(elapsed, device=accelerator.device), "mean").item()

    def _update(self, session: _Session, step: int, elapsed: float) -> Tensor:
        """One step down in the weights and up in the multipliers, on the same gradients."""
        accelerator, scaler = session.accelerator, session.accelerator.scaler
        for group in session.optimizer.param_groups:
            group["lr"] = self.plan.rate(step, elapsed)
        loss = torch.stack([self._backward(session, step, part) for part in range(self.plan.parts)]).sum()
        scale = 1.0 if scaler is None else scaler.get_scale()
        slopes = self._slopes(session, scale)
        norm = accelerator.clip_grad_norm_(session.model.parameters(), self.plan.clip)
        overflow = scale > 1 and not bool(torch.isfinite(norm))  # of fp16: the scaler skips the step and halves the scale
        if not overflow:
            _finite("gradient", [norm, *slopes], step)
        session.optimizer.step()
        if session.ascent is not None:
            if not overflow:
                session.ascent.step()
            session.ascent.zero_grad(set_to_none=True)
        session.optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, session: _Session, step: int, part: int) -> Tensor:
        """Add the gradients of a part of the batch, and to those of other processes with the last; its share of the loss."""
        accelerator, parts = session.accelerator, self.plan.parts
        batch, rng = self.batch(step, accelerator.process_index, accelerator.num_processes, accelerator.device, part)
        with nullcontext() if part == parts - 1 else accelerator.no_sync(session.model):
            loss = self.loss(session.model, batch, rng).mean() / parts
            _finite("loss", [loss], step)
            accelerator.backward(loss)
        return loss.detach()

    @staticmethod
    def _slopes(session: _Session, scale: float) -> list[Tensor]:
        """The gradients of the multipliers, unscaled and averaged over processes, as the optimizer will use them."""
        used = [m for m in session.multipliers if m.grad is not None]
        for multiplier in used:
            multiplier.grad = session.accelerator.reduce(multiplier.grad / scale, "mean")
        return [m.grad for m in used]

    def _validate(self, session: _Session, step: int) -> None:
        """One look at the average; the processes share the rows, and all see the whole."""
        accelerator = session.accelerator
        part = slice(accelerator.process_index, None, accelerator.num_processes)
        settings = {"seed": self.plan.seed, "batch_size": self.plan.batch_size, "device": accelerator.device, "part": part}
        values = accelerator.reduce(evaluate(session.ema.model, self.loss, self.validation, **settings), "sum")
        mean, error = summary(values)
        row = {"step": step, "validation": mean, "error": error}
        if self._chooses:
            session.watch.observe(step, values, session.ema.model)
            row["best"] = session.watch.best_step
        self._write(session, row)

    def _log(self, session: _Session, step: int, seconds: float) -> None:
        row = {"step": step, "loss": session.log.mean(), "seconds": round(seconds, 1)}
        if len(session.multipliers):
            row["multipliers"] = [m.detach().flatten().tolist() for m in session.multipliers]
        self._write(session, row)

    def _write(self, session: _Session, row: dict) -> None:
        session.log.write(row)
        if self.plan.trackers:
            values = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            for k, multiplier in enumerate(row.get("multipliers", ())):
                values |= {f"multiplier_{k}_{j}": value for j, value in enumerate(multiplier)}
            session.accelerator.log(values, step=values.pop("step"))


def processes() -> PartialState:
    """The processes of this training: `process_index`, `num_processes`, `device`, `wait_for_everyone()`."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _finite(what: str, values: Sequence[Tensor], step: int) -> None:
    for value in values:
        if not bool(torch.isfinite(value).all()):
            bad = value[~torch.isfinite(value)].flatten()[0].item()
            raise DiffinvError(
                f"training: the {what} is {bad} at step {step}; take a lower learning rate, from the last checkpoint if there is "
                "one."
            )
