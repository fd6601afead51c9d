"""Each process its own GPU, said by whoever started it."""

from __future__ import annotations

import pytest
import torch

from diffinv.engine.devices import own_device, sharers


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, and no launcher."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("PARSL_WORKER_RANK", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


def test_processes_of_a_machine_share_its_devices_evenly() -> None:
    assert [own_device("cuda", number, 6) for number in range(6)] == [f"cuda:{n}" for n in (0, 1, 2, 3, 0, 1)]
    assert [sharers("cuda", processes) for processes in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert sharers("cpu", 5) == 5


@pytest.mark.parametrize(("name", "number"), [("LOCAL_RANK", "3"), ("SLURM_LOCALID", "2"), ("PARSL_WORKER_RANK", "1")])
def test_a_launcher_says_whose_is_whose(monkeypatch: pytest.MonkeyPatch, name: str, number: str) -> None:
    monkeypatch.setenv(name, number)
    assert own_device("cuda") == f"cuda:{number}"
    assert own_device("cuda", 0, 1) == f"cuda:{number}"  # of the one process of a supervisor
    assert own_device("cuda", 1, 2) == f"cuda:{(2 * int(number) + 1) % 4}"


def test_what_is_said_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cpu") == "cpu" and own_device("cuda:1", 2) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device("cuda", 2) == "cuda"


@pytest.mark.parametrize("text", ["", "-1", "first"])
def test_a_number_that_is_none_is_not_believed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", text)
    assert own_device("cuda") == "cuda:0"
