"""Checkpoints: replaced as a whole or not at all, even by a writer that is killed; what comes back is what went in."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from diffinv.core.checks import InputError
from diffinv.core.rng import Rng
from diffinv.training import checkpoint
from diffinv.training.checkpoint import Stateful, load_checkpoint, save_checkpoint
from diffinv.training.ema import ExponentialMovingAverage
from tests.trainings import reset_accelerate, rows, same, trainer, unsure


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    reset_accelerate()


def state_of(seed: int) -> dict[str, Stateful]:
    network = nn.Linear(3, 2)
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(Rng([seed + number]).normal(torch.zeros(1, *parameter.shape))[0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    ema = ExponentialMovingAverage(network, 0.9)
    for _ in range(3):
        network(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()
        ema.update(network)
    return {"model": network, "optimizer": optimizer, "ema": ema}


def _fail(*args: object, **kwargs: object) -> None:
    raise OSError("disk full")


def _write_half(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half a checkpoint")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "failure", "kind"),
    [
        (checkpoint, "save_file", _write_half, KeyboardInterrupt),
        (checkpoint.os, "fsync", _fail, OSError),
        (checkpoint.os, "replace", _fail, OSError),
    ],
)
def test_a_crash_while_saving_keeps_the_old_checkpoint_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, failure: Callable, kind: type[BaseException]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state_of(0), step=7)
    before = path.read_bytes()
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(kind):
        save_checkpoint(path, state_of(50), step=8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path, state_of(50)) == 7


def test_a_full_disk_is_an_error_of_the_disk_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state_of(0), step=7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # the writer gets EFBIG, as it would get ENOSPC
    try:
        with pytest.raises(OSError, match="too large") as caught:
            save_checkpoint(path, state_of(50), step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path, state_of(50)) == 7


def test_a_checkpoint_restores_model_average_and_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    first, second = state_of(0), state_of(50)
    save_checkpoint(path, first, step=11)
    assert not same(first["model"], second["model"])
    assert load_checkpoint(path, second) == 11
    assert same(first["model"], second["model"]) and same(first["ema"].model, second["ema"].model)
    assert first["ema"].updates == second["ema"].updates
    moments = [parts["optimizer"].state_dict()["state"] for parts in (first, second)]
    for index, state in moments[0].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, moments[1][index][key]) for key, value in state.items())


@pytest.mark.parametrize("content", [b"", b"<html>", "half", "another model", "other parts"])
def test_a_bad_checkpoint_is_one_line_that_names_the_file(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state_of(0), step=1)
    if content == "another model":
        network = nn.Linear(4, 4)
        parts = {"model": network, "optimizer": torch.optim.AdamW(network.parameters())}
        save_checkpoint(path, parts | {"ema": ExponentialMovingAverage(network, 0.9)}, step=1)
    elif content == "other parts":
        save_checkpoint(path, {"model": nn.Linear(3, 2)}, step=1)
    else:
        path.write_bytes(path.read_bytes()[:-20] if content == "half" else content)
    with pytest.raises(InputError) as error:
        load_checkpoint(path, state_of(0))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def train_and_hang(folder: Path, where: str) -> None:
    """Run in a child process: train, and at the second checkpoint stay in the middle of its writing for ever."""
    calls, save_file = [], checkpoint.save_file

    def hang(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            (folder / "ready").touch()
            time.sleep(600)

    def half_then_hang(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        hang(path)
        path.write_bytes(content)

    def hang_then_replace(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp" and Path(target).suffix == ".safetensors":
            hang(source)
        Path(source).rename(target)

    if where == "write":
        checkpoint.save_file = half_then_hang
    else:
        checkpoint.os = SimpleNamespace(getpid=os.getpid, fsync=os.fsync, replace=hang_then_replace)
    trainer(folder, unsure()).run()


def killed(folder: Path, where: str) -> None:
    """Start `train_and_hang` in a child, wait until it is in the middle of the write, kill it."""
    root = Path(__file__).resolve().parents[2]
    code = "import sys, torch; from pathlib import Path; from tests.unit.test_checkpoint import train_and_hang; "
    code += "torch.set_num_threads(1); train_and_hang(Path(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), where], cwd=root, env=environment)
    try:
        limit = time.monotonic() + 120
        while not (folder / "ready").exists():
            assert child.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_training_killed_while_it_saves_ends_as_one_that_was_not(tmp_path: Path, where: str) -> None:
    whole, folder = trainer(tmp_path / "whole", unsure()), tmp_path / "killed"
    average = whole.run()
    killed(folder, where)
    assert len(list(folder.glob("*.tmp"))) == 1
    with safe_open(folder / "checkpoint.safetensors", "pt") as handle:
        assert handle.metadata()["step"] == "3"
    resumed = trainer(folder, unsure())
    assert same(resumed.run(resume=True), average) and same(resumed.model, whole.model)
    assert torch.equal(resumed.loss.eta, whole.loss.eta)
    assert rows(folder) == rows(tmp_path / "whole")
    assert not list(folder.glob("*.tmp"))
