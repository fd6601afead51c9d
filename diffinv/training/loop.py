"""The training loop: steps of a loss on batches, by accelerate, with EMA, gradient clipping and exact resume.

The data order and every random number are functions of (seed, step), so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.losses.base import CleanBatch, Loss
from diffinv.training.checkpoint import load_checkpoint, save_checkpoint
from diffinv.training.ema import ExponentialMovingAverage


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast.

    steps: optimizer updates. batch_size: images an update and process. learning_rate: peak, reached after `warmup` steps,
    then a cosine to `final_rate` of it at the last step, or at `deadline` seconds of wall time if that is sooner.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    final_rate: float = 0.02
    ema_decay: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 500
    log_every: int = 100
    deadline: float = math.inf

    def rate(self, step: int, elapsed: float) -> float:
        """Learning rate at a step: linear warm-up, then cosine decay in the larger of the two fractions done."""
        done = min(1.0, max(step / self.steps, elapsed / self.deadline))
        cosine = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass
class Trainer:
    """Trains a model by a loss on views of stored images.

    Arguments: model; loss: (model, batch, rng) → (B,). images: (N, C, H, W) in memory. views: augmentation (x, rng) → x.
    folder: where checkpoint and log go.
    """

    model: nn.Module
    loss: Loss
    images: Tensor
    views: Callable[[Tensor, Rng], Tensor]
    plan: TrainingPlan
    folder: Path

    def run(self, *, resume: bool = False) -> nn.Module:
        """Train to the end of the plan; returns the averaged model.

        Raises: DiffinvError when the loss is not finite, naming the step; the last good checkpoint is kept.
        """
        accelerator = Accelerator()
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        ema = ExponentialMovingAverage(self.model, self.plan.ema_decay)
        checkpoint = self.folder / "checkpoint.safetensors"
        first = load_checkpoint(checkpoint, self.model, optimizer, ema) if resume and checkpoint.exists() else 0
        model, optimizer = accelerator.prepare(self.model, optimizer)
        ema.model.to(accelerator.device)
        start, window = time.monotonic(), []
        for step in range(first, self.plan.steps):
            elapsed = time.monotonic() - start
            window.append(self._update(accelerator, model, optimizer, step, elapsed))
            ema.update(accelerator.unwrap_model(model))
            last = step + 1 == self.plan.steps or elapsed > self.plan.deadline
            if accelerator.is_main_process and ((step + 1) % self.plan.log_every == 0 or last):
                self._log(step + 1, torch.stack(window).mean().item(), time.monotonic() - start)
                window.clear()
            if accelerator.is_main_process and ((step + 1) % self.plan.save_every == 0 or last):
                save_checkpoint(checkpoint, accelerator.unwrap_model(model), optimizer, ema, step=step + 1)
            if last:
                break
        return ema.model

    def batch(self, step: int, process: int, processes: int, device: torch.device) -> tuple[CleanBatch, Rng]:
        """The batch of a step and its random streams: functions of (seed, step, process) alone."""
        size = self.plan.batch_size
        numbers = torch.arange(size, dtype=torch.int64) + (step * processes + process) * size
        rng = Rng.for_draws(self.plan.seed, numbers, 1)
        index = (rng.uniform(torch.zeros(size, 1, dtype=torch.float64))[:, 0] * len(self.images)).long()
        rng = rng.to(device)
        return CleanBatch(self.views(self.images[index].float().to(device), rng)), rng

    def _update(self, accelerator, model, optimizer, step: int, elapsed: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = self.plan.rate(step, elapsed)
        batch, rng = self.batch(step, accelerator.process_index, accelerator.num_processes, accelerator.device)
        loss = self.loss(model, batch, rng).mean()
        if not torch.isfinite(loss):
            raise DiffinvError(
                f"training: the loss is {loss.item()} at step {step}; resume from the checkpoint with a lower learning rate."
            )
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), self.plan.clip)
        if not torch.isfinite(norm):
            raise DiffinvError(
                f"training: the gradient is {norm.item()} at step {step}; resume from the checkpoint with a lower learning rate."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _log(self, step: int, loss: float, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as handle:
            handle.write(json.dumps({"step": step, "loss": round(loss, 6), "seconds": round(seconds, 1)}) + "\n")
