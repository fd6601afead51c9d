"""Validation of a training by its own loss on data that it does not learn from, and when to stop by it.

Without truths the loss on held-out measurements is the one honest number: unbiased losses estimate the risk up to a constant.
The random numbers are the same at each look, so that two looks differ by the model alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.losses.base import Loss
from diffinv.training.sources import Source

_STREAMS = 0x7A11D  # apart from the streams of the training, which are numbered from 0 as well


def evaluate(
    model: nn.Module, loss: Loss, source: Source, *, seed: int, batch_size: int, device: torch.device, part: slice = slice(None)
) -> Tensor:
    """The loss of each row of `source`, in streams keyed by (seed, row): (N,), float64, detached.

    Arguments: model: its weights must not ask for gradients. batch_size: the largest; chunks are of nearly equal size.
        part: which of the chunks; rows of the others are 0.
    Raises: DiffinvError when a loss is not finite, naming the row.
    """
    rows = torch.arange(len(source))
    found = torch.zeros(len(source), dtype=torch.float64, device=device)
    for index in rows.tensor_split(math.ceil(len(source) / batch_size))[part]:
        rng = Rng.for_draws(seed, index, 1).spawn(_STREAMS).to(device)
        values = loss(model, source.batch(index, rng), rng).detach().to(found.dtype)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).nonzero()[0])
            row = source.number(int(index[bad]))
            raise DiffinvError(f"validation: the loss of held-out row {row} is {values[bad].item()}; look at its data.")
        found[index.to(device)] = values
    return found


def summary(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of (N,) values, N ≥ 2."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


class EarlyStopping:
    """Keeps the average with the lowest mean loss, and says stop when progress is lost in the noise.

    A look makes progress if the mean of its losses lies below that of the last look that made progress by more than the standard
    error of the difference, row by row: with the same random numbers, most of their scatter is common to both looks and drops
    out. Slow progress adds up.

    Arguments: patience: looks in a row without progress after which it says stop.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_step: int | None = None
        self.best_mean = math.inf
        self.reference: Tensor | None = None
        self.stale = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        return self.stale >= self.patience

    def observe(self, step: int, values: Tensor, model: nn.Module) -> None:
        """One look at `model`, whose weights are copied if it is the best so far; values: the loss of each row (N,), N ≥ 2."""
        mean, progress = values.mean().item(), True
        if self.reference is not None:
            gain, error = summary(self.reference.to(values) - values)
            progress = gain > error
        self.stale = 0 if progress else self.stale + 1
        if progress:
            self.reference = values.detach().clone()
        if mean < self.best_mean:
            self.best_step, self.best_mean = step, mean
            self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def state_dict(self) -> dict:
        """Everything a resumed watch needs, the best weights included."""
        numbers = {"step": self.best_step, "mean": self.best_mean, "stale": self.stale}
        return {"numbers": numbers, "reference": self.reference, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        numbers = state["numbers"]
        self.best_step, self.best_mean, self.stale = numbers["step"], numbers["mean"], numbers["stale"]
        self.reference, self.weights = state["reference"], state["weights"]
