"""The other side of scripts/peers_gaussian.py: one process in the peers' environment, asked one run at a time."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """Draws (B, …) in float64 with what they cost: CPU seconds, and network calls (forward and vjp) a draw."""

    draws: Tensor
    seconds: float
    calls: float


class Peers:
    """Runs peer methods in .venv-peers. Arguments: folder: where problems and draws are exchanged."""

    def __init__(self, folder: Path) -> None:
        python = SCRIPTS.parent / ".venv-peers" / "bin" / "python"
        if not python.exists():
            raise SystemExit("bench_peers: .venv-peers is missing; run scripts/setup_peers once.")
        command = [str(python), str(SCRIPTS / "peers_gaussian.py")]
        self.folder = folder
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._reply()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench_peers: the peers' process ended; its message is above.")
        return json.loads(line)

    def ask(self, method: str, problem: Path, *, draws: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        out = self.folder / "draws.npy"
        request = {"method": method, "problem": str(problem), "out": str(out), "draws": draws, "seed": seed, "settings": settings}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def check(self, problem: Path) -> dict[str, float]:
        """Largest errors of the wrapped denoisers and operators."""
        return self.ask("check", problem, draws=1, seed=0, settings={})

    def run(self, method: str, problem: Path, *, draws: int, seed: int, settings: dict[str, Any]) -> Run:
        """`draws` draws for each observation of a problem, the draws of one observation next to each other."""
        reply = self.ask(method, problem, draws=draws, seed=seed, settings=settings)
        result = torch.as_tensor(np.load(self.folder / "draws.npy", allow_pickle=False))
        return Run(result, reply["seconds"], (reply["forward"] + reply["vjp"]) / len(result))
