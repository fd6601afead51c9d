"""Exponential moving average of the weights, with a warm-up so that early averages are not dominated by the start."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """θ̄ ← β θ̄ + (1 − β) θ with β = min(decay, (1 + k)/(10 + k)) at update k.

    Arguments: model: whose floating parameters are averaged; buffers are copied. decay: β in the long run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average towards the present weights of `model`."""
        beta = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        targets = list(self.model.parameters())
        torch._foreach_lerp_(targets, [p.detach() for p in model.parameters()], 1 - beta)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict:
        """Everything a resumed average needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])
