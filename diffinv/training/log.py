"""The log of a training: one JSON object a line, which a resumed run continues as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Log:
    """Rows of numbers in a file, and the losses since the last row, of which it tells the mean.

    Arguments: path: the file. writes: whether this process writes it.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """One more loss (), without its graph."""
        self._losses.append(loss.detach())

    def mean(self) -> float:
        """The mean of the losses since the last call."""
        mean = torch.stack([loss.cpu() for loss in self._losses]).mean().item()  # restored ones are on the CPU
        self._losses.clear()
        return mean

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; numbers to six digits."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(_rounded(row)) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that a kill cut short."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def state_dict(self) -> dict:
        """Everything a resumed log needs beside its file."""
        return {"losses": [loss.item() for loss in self._losses]}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self._losses = [torch.tensor(loss) for loss in state["losses"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _step(line: str) -> float:
    """The step of a row; infinite for what is not a row."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
