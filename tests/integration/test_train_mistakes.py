"""Mistakes in what `diffinv train` is given: one line each that names the file or the key, exit code 2, and nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffinv.cli import main
from diffinv.data.locks import only_one_in
from tests.learning import arrays, configuration, round_psf, write_npz, write_yaml
from tests.trainings import reset_accelerate

COUNTS: dict[str, Any] = {"data": {"y": "counts"}, "noise": {"kind": "poisson", "gain": 37, "background": 0.1}}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def train(folder: Path, content: dict[str, Any], *extra: str) -> int:
    reset_accelerate()
    config = write_yaml(folder / "run.yaml", content)
    return main(["train", "--config", str(config), "--out", str(folder / "out"), *extra])


SHIFTED = {"loss": [{"name": "shifted_sure", "pixels": 2}]}
MISTAKES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "no rows": ({"y": np.zeros((0, 16, 16))}, {}, "data.npz: array 'y' has no rows"),
    "one row, and some to be held out": ({"y": arrays()["y"][:1]}, {}, "data.held_out: 0 trains on all rows"),
    "levels of other channels": ({}, {"noise": {"kind": "gaussian", "std": [0.1, 0.2]}}, "noise.std: 2 levels for data of 1"),
    "another network than the loss calls": (
        {},
        {"loss": [{"name": "noise2score", "amplitude": 0.1}]},
        "network: noise2score wants a network of kind score",
    ),
    "projections of another number": (
        {},
        {"operator": {"kind": "radon", "angles": [0, 45], "size": [16, 16]}},
        "data.npz: array 'y' holds (1, 16, 16) a row, but Radon takes images (1, 16, 16) to data (1, 2, 16)",
    ),
    "truths of another size": (
        {"x": arrays()["x"][:, :8]},
        {"data": {"x": "x"}, "loss": [{"name": "supervised"}]},
        "data.npz: array 'x' holds (1, 8, 16) a row",
    ),
    "a PSF of too many axes": (
        {"psf": np.tile(round_psf(), (60, 1, 1, 1, 1))},
        {"data": {"psf": "psf"}, "operator": {"kind": "convolution", "border": "zero"}},
        "PSFs must be stamps of odd size",
    ),
    "a correlation that is a covariance": (
        {},
        {"noise": {"kind": "correlated", "std": 0.05, "correlation": [[0, 0.2, 0], [0.2, 3, 0.2], [0, 0.2, 0]], "white": 0.2}},
        "is 3 at lag 0, not 1; divide it by that",
    ),
    "counts of another gain": ({}, COUNTS | SHIFTED, "the data are not whole counts"),
    "speckle below zero": (
        {"y": arrays()["y"] - 0.5},
        {"noise": {"kind": "gamma", "looks": 4, "floor": 0.001}, "loss": [{"name": "first_order_sure"}]},
        "speckle is never negative",
    ),
    "next to nothing hidden": ({}, {"loss": [{"name": "splitting", "kept": 0.9999}]}, "so that most rows teach nothing"),
    "a precision that drowns differences": ({}, {"training": {"precision": "bf16"}}, "which bf16 drowns in rounding"),
    "a tracker that nobody knows": ({}, {"training": {"trackers": ["nobody"]}}, "accelerate refuses the plan"),
    "batches of one to swap operators in": (
        {},
        {
            "data": {"y": "masked", "mask": "mask"},
            "operator": {"kind": "mask"},
            "loss": [{"name": "sure"}, {"name": "multi_operator_imaging", "noisy": True}],
            "training": {"batch_size": 1},
        },
        "batches of two rows or more",
    ),
    "no memory for the images": (
        {"y": arrays()["y"][:8]},
        {"operator": {"kind": "sum_pool", "factor": 100_000}, "data": {"held_out": 0}},
        "training: out of memory",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, sections, reason = MISTAKES[name]
    path = write_npz(tmp_path / "data.npz", arrays() | content)
    assert train(tmp_path, configuration(path, **sections)) == 2
    said = capsys.readouterr().err.splitlines()
    assert reason in said[-1]
    assert not (tmp_path / "out").exists()


CALLABLES = {"leave": "SystemExit: 3", "ragged": "returned what is no array", "nothing": "returned NoneType"}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_mistake_in_a_callable_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "survey_of_mistakes.py").write_text(
        "import sys\nleave = lambda: sys.exit(3)\nragged = lambda: {'y': [[1.0], [1.0, 2.0]]}\nnothing = lambda: None\n"
    )
    content = configuration(tmp_path)
    content["data"] = {"callable": f"survey_of_mistakes:{name}"}
    assert train(tmp_path, content) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.yaml:2 data.callable" in line and CALLABLES[name] in line


def test_a_checkpoint_that_does_not_fit_leaves_the_record_of_the_training_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = configuration(write_npz(tmp_path / "data.npz", arrays()))
    out = tmp_path / "out"
    assert train(tmp_path, content) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert train(tmp_path, content, "--resume", "--new-run", "--set", "network.widths=[16, 16]") == 2
    assert "a checkpoint of another model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert train(tmp_path, content, "--resume") == 0


def test_a_checkpoint_of_which_nothing_is_known_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, out = configuration(write_npz(tmp_path / "data.npz", arrays())), tmp_path / "out"
    assert train(tmp_path, content) == 0
    (out / "run.json").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert train(tmp_path, content, "--resume") == 2
    assert "holds a checkpoint without its run.json" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert train(tmp_path, content, "--resume", "--new-run") == 0


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, out = configuration(write_npz(tmp_path / "data.npz", arrays())), tmp_path / "out"
    with only_one_in(out):
        assert train(tmp_path, content) == 2
        assert "another process is training there" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert not out.exists()
    assert train(tmp_path, content) == 0 and not (out / ".lock").exists()


def test_a_full_disk_has_its_exit_code_and_the_old_result_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = configuration(write_npz(tmp_path / "data.npz", arrays()))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "checkpoint.safetensors")

    monkeypatch.setattr("diffinv.training.checkpoint.os.replace", full)
    assert train(tmp_path, content) == 74
    assert capsys.readouterr().err.splitlines()[-1].startswith("diffinv: checkpoint.safetensors: No space left on device")
    assert not list((tmp_path / "out").glob("*.tmp"))
