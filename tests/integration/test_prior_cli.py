"""Every configuration of configs/prior, made tiny: from files to a prior that loads, what is refused, and resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from diffinv.assembly.prior import build_prior_job
from diffinv.cli import main
from diffinv.config import load
from diffinv.data.fits import Plane, encode_fits
from diffinv.priors.store import load_prior
from diffinv.sections.prior import PriorConfig
from tests.learning import SIZE, arrays, write_fits, write_npz, write_yaml
from tests.trainings import reset_accelerate

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "prior"
TRAINING = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup": 1, "save_every": 2, "log_every": 2, "validate_every": 2}
EM = {"laps": 2, "levels": 4, "chunk": 32, "start_laps": 3}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def write_cubes(folder: Path, rows: int = 24, *, bands: str = "gri", size: int = SIZE, name: str = "galaxy") -> Path:
    """A simulation's images: a FITS cube of bands a galaxy, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    x = arrays()["x"][:rows, :size, :size]
    header = {f"BAND{k + 1}": band for k, band in enumerate(bands)} | {"BUNIT": "nJy"}
    for row in range(rows):
        cube = np.stack([(1 + 0.3 * k) * x[row] for k in range(len(bands))]).astype(np.float32)
        (folder / f"{name}{row:03d}.fits").write_bytes(encode_fits([Plane("PRIMARY", cube, header)]))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("priors"), arrays()
    uneven = (found["var"] * np.linspace(0.5, 1.5, SIZE)).astype(np.float32)
    few = {"y": found["y"][:24], "var": uneven, "x": found["x"], "psf": found["psf"], "second": found["second"]}
    return {
        "clean": write_cubes(folder / "cubes"),
        "noisy": write_fits(folder / "noisy", few, 24),
        "blurred": write_fits(folder / "blurred", few | {"y": found["blur"][:24]}, 24),
        "masked": write_npz(folder / "masked.npz", {"y": found["masked"][:24], "mask": found["mask"][:24]}),
        "simulated": write_cubes(folder / "grey", bands="i"),
    }


def tiny(name: str, files: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """A configuration of the package with small numbers and files that are there."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    sources = {"mixed": "noisy", "em": "noisy"}
    config["data"] |= {"path": str(files[sources.get(name, name)]), "held_out": 0.25}
    config["prior"] |= {"widths": [8, 16], "blocks": [1, 1], "sigma_min": 0.05, "sigma_max": 10}
    config["training"] = TRAINING | changes.pop("training", {})
    if config["learning"]["kind"] == "em":
        config["learning"] |= EM | ({"iterations": 2} if "iterations" in config["learning"] else {})
        config["learning"] |= {"rank": 4} if "rank" in config["learning"] else {}
        config["learning"] |= {"first_steps": 3} if "first_steps" in config["learning"] else {}
        config["learning"] |= {"views": config["learning"]["views"][:1]} if "views" in config["learning"] else {}
    if "more" in config:
        config["more"]["data"]["path"] = str(files["simulated"])
    for key, value in changes.items():
        config[key] = {**(config.get(key) or {}), **value} if isinstance(value, dict) else value
    return config


def run(tmp_path: Path, config: dict[str, Any], *extra: str) -> int:
    return main(["train", "--config", str(write_yaml(tmp_path / "prior.yaml", config)), "--out", str(tmp_path / "out"), *extra])


def test_there_is_a_test_of_every_configuration() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NAMES)


NAMES = ("clean", "noisy", "mixed", "masked", "blurred", "em")
SAYS = {
    "noisy": ("noise: {'std': [",),
    "masked": ("Gaussian start", "identifiability", "lap 1: held-out χ²"),
    "blurred": ("first lap: positive images", "draws of 0 passes", "without QuarterTurns", "lap 1: held-out χ²"),
    "em": ("lap 0: 20 draws", "of 1 passes", "of 4 passes", "risk"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains_a_prior_that_loads(
    name: str, tmp_path: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tiny(name, data)) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out" / "prior.safetensors")
    for words in SAYS.get(name, ()):
        assert words in said.err, said.err
    prior = load_prior(tmp_path / "out" / "prior.safetensors")
    bands = ("g", "r", "i") if name == "clean" else ("grey",)
    assert prior.card.bands == bands
    assert prior.card.size == SIZE
    assert bool((prior.variance > 0).all())
    x = torch.ones(2, len(bands), SIZE, SIZE)
    denoised = prior(x, torch.tensor([0.1, 1.0]))
    assert bool(denoised.isfinite().all())
    assert not torch.equal(denoised, x)


def test_a_folder_holds_one_training_and_resumes_it(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    config = tiny("em", data)
    assert run(tmp_path, config) == 0
    before = (tmp_path / "out" / "prior.safetensors").read_bytes()
    reset_accelerate()
    assert run(tmp_path, config) == 2
    assert "holds a training already" in capsys.readouterr().err
    (tmp_path / "out" / "em" / "lap-01" / "average.safetensors").unlink()
    (tmp_path / "out" / "em" / "lap-01" / "draws-00000.npy").unlink()
    (tmp_path / "out" / "em" / "lap-01" / "checkpoint.safetensors").unlink()
    reset_accelerate()
    assert run(tmp_path, config, "--resume") == 0
    assert (tmp_path / "out" / "prior.safetensors").read_bytes() == before
    other = config | {"learning": config["learning"] | {"levels": 5}}
    reset_accelerate()
    assert run(tmp_path, other, "--resume") == 2
    assert "learning.levels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "beside"),
    [({}, True), ({"learning": {"views": [{"kind": "flips"}]}}, False), ({"training": {"precision": "bf16"}}, False)],
    ids=["plain", "views", "bf16"],
)
def test_noisy_images_teach_beside_draws_unless_views_or_precision_forbid(
    tmp_path: Path, data: dict[str, Path], changes: dict[str, Any], beside: bool
) -> None:
    config = tiny("em", data, **changes)
    config["learning"]["first_steps"] = 0
    assert run(tmp_path, config) == 0
    record = json.loads((tmp_path / "out" / "em" / "em.json").read_text())
    assert record.get("beside", False) == beside
    assert ("BelowNoise" in record["loss"]) == beside


def test_one_gap_in_one_image_makes_em_draw_by_guidance(tmp_path: Path, data: dict[str, Path], monkeypatch, capsys) -> None:
    """Though none of the rows that are looked at together with it tell."""
    monkeypatch.setattr("diffinv.assembly.prior._SOME", 4)
    y = arrays()["y"][:24].copy()
    y[13, 3, 3] = np.nan
    path = write_npz(tmp_path / "gap.npz", {"y": y})
    config = tiny("em", data | {"noisy": path}, noise={"std": 0.3})
    assert run(tmp_path, config) == 2
    assert "learning.first_steps" in capsys.readouterr().err
    config["learning"]["first_steps"] = 0
    reset_accelerate()
    assert run(tmp_path, config) == 0
    assert "GuidedDraw" in (tmp_path / "out" / "em" / "em.json").read_text()


@pytest.mark.parametrize(("kind", "words"), [("gsure", "some data are masked"), ("clean", "bad pixels")])
def test_a_row_that_a_loss_cannot_use_is_named_before_the_first_step(
    kind: str, words: str, tmp_path: Path, data: dict[str, Path], capsys
) -> None:
    """Row 13 of the file, whichever part it falls to, with two rows left out before it; no batch of four rows shows it."""
    y = arrays()["y"][:24].copy()
    y[[3, 7]], y[13, 3, 3] = np.nan, np.nan
    path = write_npz(tmp_path / "gap.npz", {"y": y})
    config = tiny("noisy" if kind == "gsure" else "clean", data | {"noisy": path, "clean": path})
    config["training"]["steps"] = 1
    if kind == "gsure":
        config |= {"noise": {"kind": "gaussian", "std": 0.3}, "learning": {"kind": "gsure"}}
    else:
        config["prior"]["bands"] = ["grey"]
    assert run(tmp_path, config) == 2
    said = capsys.readouterr().err
    assert "row 13" in said and words in said, said
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_band_that_rows_lack_is_no_black_image_to_the_start(tmp_path: Path, data: dict[str, Path]) -> None:
    """Half of the rows lack the second of two bands: its spectrum is that of the others."""
    y = np.repeat(arrays()["y"][:24, None], 2, 1)
    y[::2, 1] = np.nan
    config = tiny("em", data | {"noisy": write_npz(tmp_path / "bands.npz", {"y": y})}, noise={"kind": "gaussian", "std": 0.1})
    config["prior"]["bands"] = ["g", "i"]
    config["data"]["held_out"] = 0.25
    config["learning"] |= {"start": "fourier", "start_laps": 20, "first_steps": 0}
    job = build_prior_job(load(PriorConfig, write_yaml(tmp_path / "bands.yaml", config)), tmp_path)
    power = job.learning.start(job.source).prior.spectrum.sum((0, 2, 3))
    assert float(power[1] / power[0]) == pytest.approx(1, abs=0.3)


def test_a_loss_that_is_not_a_number_stops_at_the_last_good_checkpoint_and_names_the_step(
    tmp_path: Path, data: dict[str, Path], capsys
) -> None:
    config = tiny("noisy", data, training={"learning_rate": 1e18, "clip": 1e30, "steps": 40, "save_every": 1})
    assert run(tmp_path, config) == 2
    said = capsys.readouterr().err
    assert "at step" in said
    assert "last checkpoint" in said
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_files_of_other_shapes_or_bands_are_named(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    for wrong, words in (({"size": 12}, "cut"), ({"bands": "gr"}, "bands")):
        folder = write_cubes(tmp_path / words)
        write_cubes(folder, 1, name="other", **wrong)
        assert run(tmp_path, tiny("clean", data | {"clean": folder})) == 2
        said = capsys.readouterr().err
        assert "other000.fits" in said
        assert words in said


def test_images_without_a_good_pixel_are_left_out_and_counted(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    found = arrays()
    y = found["masked"][:24].copy()
    y[[3, 7, 20]] = np.nan
    path = write_npz(tmp_path / "some.npz", {"y": y, "mask": found["mask"][:24]})
    assert run(tmp_path, tiny("masked", data | {"masked": path})) == 0
    said = capsys.readouterr().err
    assert "left out: 3 rows without a good datum" in said
    assert "held out; images (1, 16, 16)" in said
    folder = write_cubes(tmp_path / "cubes")
    write_cubes(folder, 2, name="blank")
    for name in ("blank000.fits", "blank001.fits"):
        cube = np.full((3, SIZE, SIZE), np.nan, np.float32)
        header = {"BAND1": "g", "BAND2": "r", "BAND3": "i", "BUNIT": "nJy"}
        (folder / name).write_bytes(encode_fits([Plane("PRIMARY", cube, header)]))
    reset_accelerate()
    config = write_yaml(tmp_path / "clean.yaml", tiny("clean", data | {"clean": folder}))
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "clean")]) == 0
    said = capsys.readouterr().err
    assert "left out: 2 files without a good pixel" in said
    assert "blank000.fits first" in said


def test_a_folder_of_blank_images_is_refused(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    path = write_npz(tmp_path / "none.npz", {"y": np.full((8, SIZE, SIZE), np.nan), "mask": np.ones((8, SIZE, SIZE), bool)})
    assert run(tmp_path, tiny("masked", data | {"masked": path})) == 2
    assert "none of its 8 rows has a good datum" in capsys.readouterr().err


REFUSED = {
    "prior.bands names grey": ("clean", {"prior": {"bands": ["grey"]}}),
    "clean images have none": ("clean", {"noise": {"kind": "gaussian", "std": 0.1}}),
    "noise is missing": ("noisy", {"noise": None}),
    "use em for other operators": ("noisy", {"operator": {"kind": "sum_pool", "factor": 2}}),
    "makes the first draws itself": ("em", {"learning": {"start": "positive"}}),
    "is for noisy images": ("masked", {"learning": {"first_steps": 5}}),
    "give a share": ("em", {"data": {"held_out": 0.0}}),
    "did you mean sigma_min?": ("noisy", {"prior": {"sigma_mim": 0.1}}),
    "low_rank_em for masks": ("masked", {"learning": {"start": "fourier"}}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_together_is_refused_in_a_line(words: str, tmp_path: Path, data: dict[str, Path], capsys) -> None:
    name, changes = REFUSED[words]
    assert run(tmp_path, tiny(name, data, **changes)) == 2
    said = capsys.readouterr().err
    assert words in said, said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "prior.safetensors").exists()


def test_the_record_says_what_was_found(tmp_path: Path, data: dict[str, Path]) -> None:
    assert run(tmp_path, tiny("noisy", data)) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    std = record["found"]["noise"]["std"][0]
    assert 0.03 < std < 0.08  # true: 0.05
    assert record["found"]["scale"] > 0
