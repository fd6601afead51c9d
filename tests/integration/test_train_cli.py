"""`diffinv train` from files to a reconstructor, what it refuses before the first step, and resuming it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffinv
from diffinv.cli import main
from diffinv.data.fits import Plane, encode_fits, read_fits
from diffinv.noise.gaussian import Gaussian
from diffinv.operators.algebra import Identity
from tests.learning import ANGLES, WRITERS, arrays, configuration, round_psf, write_fits, write_npz, write_yaml
from tests.trainings import reset_accelerate

RESULT = "reconstructor.safetensors"
BLUR: dict[str, Any] = {
    "data": {"y": "blur", "psf": "psf"},
    "operator": {"kind": "convolution", "border": "zero"},
    "noise": {"kind": "gaussian", "std": 0.005},
    "identifiability": {"allow_unidentifiable": True},
}
MASKS: dict[str, Any] = {"operator": {"kind": "mask"}, "noise": {"kind": "gaussian", "std": 0.02}}
ONE_MASK = MASKS | {"data": {"y": "one_masked", "mask": "one"}}
MANY_MASKS = MASKS | {"data": {"y": "masked", "mask": "mask"}}
COUNTS: dict[str, Any] = {"data": {"y": "counts"}, "noise": {"kind": "poisson", "gain": 50, "background": 0.1}}
FOURIER: dict[str, Any] = {"data": {"y": "k", "mask": "k_mask"}, "operator": {"kind": "masked_fourier"}}
UNKNOWN: dict[str, Any] = {"noise": {"kind": "unknown"}}
READ_NOISE: dict[str, Any] = {"noise": {"kind": "poisson_gaussian", "gain": 50, "read_noise": 2, "background": 0.1}}
RATE = {"training": {"multiplier_rate": 0.015}}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("learning") / "blobs.npz", arrays())


def loss(*terms: str | dict[str, Any]) -> dict[str, Any]:
    return {"loss": [{"name": term} if isinstance(term, str) else term for term in terms]}


def equivariant(*groups: dict[str, Any]) -> dict[str, Any]:
    return loss("sure", {"name": "equivariant_imaging", "noisy": True, "groups": list(groups)})


def train(config: Path, out: Path, *extra: str) -> int:
    reset_accelerate()
    return main(["train", "--config", str(config), "--out", str(out), *extra])


ACCEPTED: dict[str, dict[str, Any]] = {
    "supervised": {"data": {"x": "x"}} | loss("supervised"),
    "noise2noise without a level": {"data": {"second": "second"}} | UNKNOWN | loss("noise2noise"),
    "sum of two": loss({"name": "sure", "weight": 0.5}, {"name": "recorrupted", "share": 0.8, "weight": 2}),
    "variance of the data": {"data": {"variance": "var"}, "noise": {"kind": "gaussian", "std": "data"}},
    "unsure": UNKNOWN | RATE | loss({"name": "unsure", "covariance": "white"}),
    "splitting without a level": UNKNOWN | loss({"name": "splitting", "kept": 0.8}),
    "blind spot": loss("measurement_consistency") | {"network": {"kind": "blind_spot", "width": 8, "depth": 3}},
    "noise2void": loss({"name": "noise2void", "share": 0.1, "radius": 2}),
    "neighbor2neighbor": loss({"name": "neighbor2neighbor", "gamma": 1.0}),
    "noise2score": loss({"name": "noise2score", "amplitude": 0.02})
    | {"network": {"kind": "score", "widths": [8, 16], "blocks": [1, 1]}},
    "thinned counts": COUNTS | loss({"name": "recorrupted", "share": 0.8}),
    "shifted counts": COUNTS | loss({"name": "shifted_sure", "pixels": 2}),
    "electrons": COUNTS | READ_NOISE | loss("first_order_sure"),
    "speckle": {"data": {"y": "speckle"}, "noise": {"kind": "gamma", "looks": 4, "floor": 0.001}} | loss("first_order_sure"),
    "many masks": MANY_MASKS | loss("sure", {"name": "multi_operator_imaging", "noisy": True}),
    "many masks, weighed by how often a pixel is seen": MANY_MASKS | loss({"name": "sure", "ensure": True}),
    "one mask, shifts": ONE_MASK | equivariant({"kind": "shifts", "reach": 8}),
    "one mask, virtual operators": ONE_MASK
    | loss({"name": "splitting", "kept": 0.8, "inner": "sure", "groups": [{"kind": "shifts", "reach": 8}, {"kind": "flips"}]}),
    "k-space, turns": FOURIER | equivariant({"kind": "quarter_turns"}, {"kind": "flips"}),
    "k-space, unrolled": FOURIER
    | loss({"name": "splitting", "kept": 0.8, "inner": "sure"})
    | {"network": {"kind": "unrolled", "iterations": 2, "widths": [8], "blocks": [1]}}
    | {"identifiability": {"least_seen": 0.5}},
    "blur, dilations": BLUR | equivariant({"kind": "dilations", "lowest": 0.5, "highest": 2, "conserve_flux": False}),
    "no validation": {"data": {"held_out": 0}},
    "projections": {
        "data": {"y": "sinogram"},
        "operator": {"kind": "radon", "angles": ANGLES, "size": [16, 16]},
        "identifiability": {"allow_unidentifiable": True},
    },
    "larger pixels": {
        "operator": {"kind": "sum_pool", "factor": 2},
        "identifiability": {"allow_unidentifiable": True},
        "network": {"kind": "bottleneck", "latent": 4, "widths": [8, 8]},
    },
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_fits_together_is_trained_and_can_be_loaded(name: str, data: Path, tmp_path: Path) -> None:
    content = configuration(data, **ACCEPTED[name])
    content["training"] |= {"steps": 2, "validate_every": 2}
    config = write_yaml(tmp_path / "run.yaml", content)
    assert train(config, tmp_path / "out") == 0
    loaded = diffinv.load_reconstructor(tmp_path / "out" / RESULT)
    saved = load_file(tmp_path / "out" / RESULT)
    assert all(t.isfinite().all() for t in saved.values())
    assert loaded.card.training["configuration"]["loss"][0]["name"] == content["loss"][0]["name"]


CORRELATED = {"noise": {"kind": "correlated", "std": 0.05, "correlation": "lags.npy", "white": 0.1}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "turns with a round PSF": (BLUR | equivariant({"kind": "quarter_turns"}), "QuarterTurns commutes with Convolution"),
    "rotations with a round PSF": (BLUR | equivariant({"kind": "rotations"}), "Rotations commutes with Convolution"),
    "shifts with a convolution": (BLUR | equivariant({"kind": "shifts", "reach": 8}), "Shifts commutes with Convolution"),
    "open shifts with a convolution": (BLUR | equivariant({"kind": "open_shifts", "reach": 3}), "OpenShifts commutes"),
    "amplitudes with a mask": (ONE_MASK | equivariant({"kind": "amplitudes", "spread": 0.2}), "Amplitudes commutes with Mask"),
    "equivariance of what is all seen": (equivariant({"kind": "flips"}), "commutes with Identity"),
    "virtual operators of a group with borders": (
        ONE_MASK | loss({"name": "splitting", "kept": 0.8, "groups": [{"kind": "open_shifts", "reach": 3}]}),
        "has no exact inverse on the pixel grid",
    ),
    "splitting with correlated noise": (CORRELATED | loss({"name": "splitting", "kept": 0.8}), "is correlated between data"),
    "SURE without a level": (UNKNOWN, "SURE: UnknownLevel is not Gaussian noise of known covariance"),
    "R2R without a level": (UNKNOWN | loss({"name": "recorrupted", "share": 0.8}), "noise of unknown level has no exact split"),
    "noisy equivariance without a level": (ONE_MASK | UNKNOWN | equivariant({"kind": "flips"}), "SURE: UnknownLevel"),
    "SURE with counts": (COUNTS, "SURE: Poisson is not Gaussian"),
    "thinning under read noise": (COUNTS | READ_NOISE | loss({"name": "recorrupted", "share": 0.8}), "cannot be thinned"),
    "one exposure": (loss("noise2noise"), "noise2noise wants data.second"),
    "no truths": (loss("supervised"), "supervised wants data.x"),
    "a blind spot behind a blur": (
        BLUR | loss("measurement_consistency") | {"network": {"kind": "blind_spot"}},
        "Convolution is not the identity",
    ),
    "one operator": (ONE_MASK | loss("sure", {"name": "multi_operator_imaging", "noisy": True}), "one and the same operator"),
    "half of space unseen": (ONE_MASK, "95.0 % is required"),
    "UNSURE without a rate": (UNKNOWN | loss({"name": "unsure", "covariance": "white"}), "wants training.multiplier_rate"),
    "images that do not halve": ({"network": {"kind": "backprojected", "widths": [8] * 5, "blocks": [1] * 5}}, "divide by 32"),
    "finite differences in half precision": ({"training": {"precision": "bf16"}}, "finite differences"),
    "a mask operator without masks": ({"operator": {"kind": "mask"}}, "wants data.mask"),
    "a blur without a PSF": (BLUR | {"data": {"y": "blur"}}, "convolution wants data.psf or operator.psf"),
    "no operator": ({"operator": None, "noise": None}, "operator is missing; it has no default"),
    "an array that is not there": ({"data": {"y": "z"}}, "holds no array 'z'; it holds blur"),
    "two sources": ({"data": {"callable": "a:b"}}, "give either data.path or data.callable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_stops_before_the_first_step(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("lags.npy", np.array([[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]))
    sections, reason = REFUSED[name]
    config = write_yaml(tmp_path / "run.yaml", configuration(data, **sections))
    assert train(config, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "out" / RESULT).exists()


def test_turns_with_an_elongated_psf_do_help(data: Path, tmp_path: Path) -> None:
    content = arrays() | {"psf": round_psf(1.0, 2.0)}
    path = write_npz(tmp_path / "long.npz", content)
    sections = BLUR | equivariant({"kind": "quarter_turns"}) | {"training": {"steps": 1}}
    assert train(write_yaml(tmp_path / "run.yaml", configuration(path, **sections)), tmp_path / "out") == 0


def test_the_unseen_share_is_said_and_mapped_and_training_on_it_is_by_name_only(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(tmp_path / "run.yaml", configuration(data, **ONE_MASK, training={"steps": 1}))
    assert train(config, tmp_path / "no") == 2
    mapped = read_fits(tmp_path / "no" / "identifiability.fits").planes[0]
    one = arrays()["one"]
    assert np.array_equal(mapped.data[0] > 0.5, ~one)
    assert mapped.header["SEEN"] == pytest.approx(one.mean())
    assert (tmp_path / "no" / "identifiability.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert train(config, tmp_path / "yes", "--set", "identifiability.allow_unidentifiable=true") == 0
    said = capsys.readouterr().err
    assert "unseen at a signal of" in said and f": {100 * (1 - one.mean()):.1f} %" in said


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_data_in_any_format_train_the_same_weights(suffix: str, data: Path, tmp_path: Path) -> None:
    content = {name: values.astype(np.float32) for name, values in arrays().items() if name in ("y", "second", "x", "var", "psf")}
    path = WRITERS[suffix](tmp_path / f"blobs{suffix if suffix != '.fits' else ''}", content)
    names = {"second": "second"} if suffix != ".fits" else {"second": "AGAIN"}
    sections: dict[str, Any] = {"data": names, "training": {"steps": 2}} | loss("noise2noise")
    assert train(write_yaml(tmp_path / "run.yaml", configuration(path, **sections)), tmp_path / "out") == 0
    reference = write_npz(tmp_path / "reference.npz", content)
    sections["data"] = {"second": "second"}
    assert train(write_yaml(tmp_path / "other.yaml", configuration(reference, **sections)), tmp_path / "other") == 0
    first, second = (load_file(tmp_path / name / RESULT) for name in ("out", "other"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("catalogue", [False, True])
def test_fits_files_bring_their_variance_psf_and_flags(catalogue: bool, tmp_path: Path) -> None:
    content = arrays() | {"var": np.full((60, 16, 16), 0.005**2)}
    content["blur"][3, 4, 5] = np.nan
    folder = write_fits(tmp_path / "in", content, rows=20, y="blur")
    if catalogue:
        lines = [f"{number},in/{number:03d}.fits" for number in range(20)]
        (tmp_path / "list.csv").write_text("\n".join(["object_id,path", *lines]))
    sections = {"operator": BLUR["operator"], "noise": {"kind": "gaussian", "std": "data"}, "training": {"steps": 1}}
    sections |= {"identifiability": {"allow_unidentifiable": True}, "data": {"held_out": 0.2}}
    source = tmp_path / "list.csv" if catalogue else folder
    assert train(write_yaml(tmp_path / "run.yaml", configuration(source, **sections)), tmp_path / "out") == 0
    model = diffinv.load_reconstructor(tmp_path / "out" / RESULT)
    assert model.card.unit == "nJy"
    assert model.card.training["found"]["arrays"]["psf"] == [20, 1, 9, 9]


@pytest.mark.parametrize("suffix", [".npy", ".fits"])
def test_a_psf_may_come_from_a_file_and_image_pixels_be_finer(
    suffix: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(psf: np.ndarray) -> int:
        path = tmp_path / f"psf{suffix}"
        np.save(path, psf) if suffix == ".npy" else path.write_bytes(encode_fits([Plane("PRIMARY", psf, {})]))
        operator = {"kind": "convolution", "border": "zero", "psf": str(path), "factor": 2}
        sections = {"operator": operator, "identifiability": {"allow_unidentifiable": True, "elements": 2}}
        config = configuration(data, **sections, data={"y": "blur"}, training={"steps": 1})
        return train(write_yaml(tmp_path / "run.yaml", config), tmp_path / "out")

    assert run(np.tile(round_psf(), (1, 2))) == 2
    assert "stamps of odd size" in capsys.readouterr().err
    assert run(2 * round_psf()) == 2
    assert "a PSF sums to 2" in capsys.readouterr().err
    assert run(round_psf()) == 0
    assert diffinv.load_reconstructor(tmp_path / "out" / RESULT).card.shape == (1, 32, 32)


def test_a_callable_may_give_arrays_or_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "survey_of_test.py").write_text(
        "import torch\n"
        "from tests.learning import arrays\n"
        "from tests.trainings import sources\n"
        "plain = lambda: {'y': arrays()['y']}\n"
        "source = lambda: sources()[0]\n"
        "batch = lambda: source().batch(torch.arange(20), __import__('diffinv').Rng(range(20)))\n"
        "broken = lambda: 1 / 0\n"
        "other = lambda: 3\n"
    )

    def run(function: str, **sections: Any) -> int:
        content = configuration(tmp_path, **sections, training={"steps": 1})
        content["network"] |= {"widths": [8], "blocks": [1]}
        content["data"] = {"callable": f"survey_of_test:{function}", "held_out": 0.3}
        return train(write_yaml(tmp_path / "run.yaml", content), tmp_path / f"{function}{len(sections)}")

    bare = {"operator": None, "noise": None}
    assert run("plain") == 0
    assert run("source", **bare) == 0
    assert run("batch", **bare) == 0
    for function, sections, reason in (
        ("plain", bare, "returned plain arrays; give the sections operator and noise"),
        ("source", {}, "brings its operator and noise"),
        ("broken", bare, "survey_of_test:broken raised ZeroDivisionError"),
        ("other", bare, "returned int"),
        ("missing", bare, "AttributeError"),
    ):
        assert run(function, **sections) == 2
        assert reason in capsys.readouterr().err


def test_an_estimated_level_is_said_and_kept(data: Path, tmp_path: Path) -> None:
    for number, sections in enumerate(({}, {"data": {"second": "second"}})):
        noise = {"noise": {"kind": "gaussian", "std": "auto"}, "training": {"steps": 1}}
        out = tmp_path / str(number)
        assert train(write_yaml(tmp_path / "run.yaml", configuration(data, **sections, **noise)), out) == 0
        found = json.loads((out / "run.json").read_text())["found"]["noise"]
        assert found["std"] == [pytest.approx(0.05, rel=0.15)]  # 60 medians of 64 details, of images with some detail
        assert found["from"] == ("wavelet MAD", "difference of the exposures")[number]


def test_the_result_works_in_the_unit_of_the_data(tmp_path: Path) -> None:
    images: list[torch.Tensor] = []
    for unit in (1.0, 1e-9):
        content = {"y": unit * arrays()["y"]}
        path = write_npz(tmp_path / f"{unit}.npz", content)
        sections = {"noise": {"kind": "gaussian", "std": 0.05 * unit}}
        out = tmp_path / f"out{unit}"
        assert train(write_yaml(tmp_path / "run.yaml", configuration(path, **sections)), out) == 0
        model = diffinv.load_reconstructor(out / RESULT)
        y = torch.from_numpy(content["y"][:4, None]).float()
        images.append(model(diffinv.Observation(y, Identity((1, 16, 16)), Gaussian(torch.tensor([0.05 * unit])))) / unit)
        assert model.card.scale == pytest.approx(unit * 0.32, rel=0.1)
    assert torch.allclose(*images, rtol=1e-3, atol=1e-4)


def test_a_folder_holds_one_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = write_yaml(tmp_path / "run.yaml", configuration(data)), tmp_path / "out"
    assert train(config, out) == 0
    weights = (out / RESULT).read_bytes()
    capsys.readouterr()
    assert train(config, out) == 2
    assert "holds a training already; go on with --resume" in capsys.readouterr().err
    assert train(config, out, "--resume", "--set", "training.learning_rate=0.5") == 2
    assert "configuration.training.learning_rate: 0.001 → 0.5" in capsys.readouterr().err
    assert train(config, out, "--resume") == 0
    assert (out / RESULT).read_bytes() == weights
    write_npz(tmp_path / "moved.npz", arrays() | {"y": 2 * arrays()["y"]})
    assert train(config, out, "--resume", "--set", f"data.path={tmp_path / 'moved.npz'}") == 2
    said = capsys.readouterr().err
    assert "found.scale" in said and "found.sha256" in said
    assert train(config, out, "--resume", "--new-run", "--set", "training.steps=8") == 0
    assert (out / RESULT).read_bytes() != weights


def launch(config: Path, out: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "diffinv", "train", "--config", str(config), "--out", str(out), *extra]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    while not path.exists() and running.poll() is None and time.monotonic() - start < 120:
        time.sleep(0.02)
    assert path.exists()


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The configuration of a training of 60 steps, and what comes of it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    content = configuration(data, training={"steps": 60, "save_every": 4, "validate_every": 7})
    config, out = write_yaml(folder / "run.yaml", content), folder / "a"
    assert train(config, out) == 0
    return config, (out / RESULT).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_was_stopped_and_resumed_ends_with_the_same_bytes(
    blow: signal.Signals, code: int, uninterrupted: tuple[Path, bytes], tmp_path: Path
) -> None:
    (config, whole), out = uninterrupted, tmp_path / "a"
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job ignore it
    try:
        running = launch(config, out)
    finally:
        signal.signal(signal.SIGINT, inherited)
    wait_for(out / "checkpoint.safetensors", running)
    running.send_signal(blow)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == code
    assert not (out / RESULT).exists()
    if code > 0:
        assert "the last checkpoint is kept, --resume does the rest" in said
    assert train(config, out, "--resume") == 0
    assert (out / RESULT).read_bytes() == whole


def test_every_bad_fits_file_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_fits(tmp_path / "in", arrays(), rows=6)
    (folder / "001.fits").write_bytes((folder / "001.fits").read_bytes()[:3000])
    (folder / "002.fits").write_bytes(b"<html>")
    content = {name: v[:, :14] if v.ndim == 3 else v for name, v in arrays().items()}
    write_fits(tmp_path / "small", content, rows=1)
    (folder / "003.fits").write_bytes((tmp_path / "small" / "000.fits").read_bytes())
    dark = arrays() | {"y": np.full_like(arrays()["y"], np.nan)}
    write_fits(tmp_path / "dark", dark, rows=1)
    (folder / "004.fits").write_bytes((tmp_path / "dark" / "000.fits").read_bytes())
    assert train(write_yaml(tmp_path / "run.yaml", configuration(folder)), tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    for name, reason in (("001", "damaged"), ("002", "HTML"), ("003", "cut the images to one size"), ("004", "no good pixel")):
        (line,) = [text for text in lines if f"{name}.fits" in text and "000.fits" not in text.split(":")[1]]
        assert reason in line
