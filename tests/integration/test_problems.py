"""Every configuration of configs/problems on a data set of its layout, simulated by formulas of this file: trained and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch import Tensor, nn

import diffinv
from diffinv.assembly.job import build_job
from diffinv.cli import main
from diffinv.config import load, parse_set
from diffinv.engine.levels import take
from diffinv.likelihood import Observation
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.tomography import Radon
from diffinv.reconstructors.averaging import LeaveOut, RecorruptedAverage, SplittingAverage
from diffinv.reconstructors.backprojected import NormalisedConvolution, RegularisedLeastSquares
from diffinv.reconstructors.observed import good_data
from diffinv.sections.train import TrainConfig
from tests.learning import configuration, round_psf, write_npz, write_yaml
from tests.trainings import reset_accelerate

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "problems"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
ROWS, SIZE, STEP = 24, 16, (2e-11, -1e-11)
ANGLES = [18.0 * k for k in range(10)]
TINY = ("network.widths=[8, 16]", "network.blocks=[1, 1]", "training.steps=2", "training.batch_size=4", "training.warmup=1")
TINY += ("training.validate_every=2", "identifiability.allow_unidentifiable=true", "identifiability.elements=8")
TINY += ("identifiability.rows=4", "data.held_out=0.2")

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def blobs(rng: np.random.Generator) -> np.ndarray:
    """(rows, H, W), brightest in another place in each row."""
    axis = np.arange(SIZE)
    row, column = rng.uniform(6, 10, (2, ROWS, 1, 1))
    width = rng.uniform(1.5, 3, (ROWS, 1, 1))
    return np.exp(-((axis[:, None] - row) ** 2 + (axis - column) ** 2) / 2 / width**2)


def neighbours(white: np.ndarray) -> np.ndarray:
    """Noise with correlation 1/4 between neighbours along each axis, from white noise two pixels wider and higher."""
    p, q = (np.sqrt(1.5) - np.sqrt(0.5)) / 2, (np.sqrt(1.5) + np.sqrt(0.5)) / 2  # p² + q² = 1, p q = 1/4
    along = p * white[:, :-1] + q * white[:, 1:]
    return p * along[:, :, :-1] + q * along[:, :, 1:]


def simulate(problem: str) -> Arrays:
    """What the comment of the configuration asks for."""
    rng = np.random.default_rng(3)
    x = blobs(rng) + (0.1 if problem == "speckle" else 0)  # well above its floor
    white = lambda shape, std: std * rng.standard_normal(shape)
    electrons = lambda m, gain, read, sky: (rng.poisson(gain * (m + sky)) + white(m.shape, read)) / gain - sky
    direct: dict[str, Callable[[], np.ndarray]] = {
        "gaussian": lambda: x + white(x.shape, 0.1),
        "gaussian_unknown": lambda: x + white(x.shape, 0.1),
        "correlated": lambda: x + neighbours(white((ROWS, SIZE + 1, SIZE + 1), 0.1)),
        "poisson": lambda: electrons(x, 50, 0, 0.1),
        "poisson_gaussian": lambda: electrons(x, 50, 3, 0.1),
        "speckle": lambda: x * rng.gamma(4, 1 / 4, x.shape),
        "cryo": lambda: electrons(x, 1, 1, 0.2),
    }
    if problem in direct:
        return {"x": x, "y": direct[problem]()}
    return {"x": x} | INCOMPLETE[problem](x, rng)


def masked(shape: tuple[int, ...]) -> Callable[[np.ndarray, np.random.Generator], Arrays]:
    def observe(x: np.ndarray, rng: np.random.Generator) -> Arrays:
        mask = rng.random(shape) < 0.5
        return {"y": np.where(mask, x + 0.02 * rng.standard_normal(x.shape), np.nan), "mask": mask}

    return observe


def complex_noise(shape: tuple[int, ...], std: float, rng: np.random.Generator) -> np.ndarray:
    return std * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))


def frequencies(x: np.ndarray, rng: np.random.Generator) -> Arrays:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, [0, 1, 2, 5, 11, 15]] = True
    return {"y": (np.fft.fft2(x, norm="ortho") + complex_noise(x.shape, 0.01, rng)) * mask, "mask": mask}


def projections(x: np.ndarray, rng: np.random.Generator) -> Arrays:
    mean = Radon(torch.tensor([ANGLES]), (1, SIZE, SIZE), 24)(torch.from_numpy(x[:, None]).float())[:, 0].numpy()
    return {"y": (rng.poisson(1000 * (mean + 0.1)) + 3 * rng.standard_normal(mean.shape)) / 1000 - 0.1}


def visibilities(x: np.ndarray, rng: np.random.Generator) -> Arrays:
    """At other baselines in each row; the last ones are missing in some."""
    uv = rng.uniform(-1, 1, (ROWS, 40, 2)) * 2e10
    m, l = STEP[0] * (np.arange(SIZE) - SIZE // 2), STEP[1] * (np.arange(SIZE) - SIZE // 2)  # noqa: E741
    phase = uv[..., 0, None, None] * l + uv[..., 1, None, None] * m[:, None]
    y = (x[:, None] * np.exp(-2j * np.pi * phase)).sum((2, 3)) + complex_noise((ROWS, 40), 0.05, rng)
    mask = np.arange(40) < np.where(np.arange(ROWS) % 3, 40, 30)[:, None]
    return {"y": np.where(mask, y, 0), "uv": np.where(mask[..., None], uv, 0), "mask": mask}


def blurred(x: np.ndarray, rng: np.random.Generator) -> Arrays:
    y = np.stack([fftconvolve(image, round_psf(), "same") for image in x])
    return {"y": y + 0.002 * rng.standard_normal(y.shape), "psf": round_psf()}


def coarse(x: np.ndarray, rng: np.random.Generator) -> Arrays:
    psf = round_psf(0.85)
    y = np.stack([fftconvolve(image, psf, "same") for image in x]).reshape(ROWS, SIZE // 2, 2, SIZE // 2, 2).sum((2, 4))
    return {"y": y + 0.008 * rng.standard_normal(y.shape), "psf": psf}


INCOMPLETE: dict[str, Callable[[np.ndarray, np.random.Generator], Arrays]] = {
    "inpainting": masked((ROWS, SIZE, SIZE)),
    "inpainting_one_mask": masked((SIZE, SIZE)),
    "fourier": frequencies,
    "tomography": projections,
    "radio": visibilities,
    "deblurring": blurred,
    "super_resolution": coarse,
}
OWN: dict[str, tuple[str, ...]] = {
    "inpainting_one_mask": ("loss=[{name: splitting, kept: 0.86, groups: [{kind: shifts, reach: 8}]}]",),
    "tomography": ("operator.size=[16, 16]", "network.iterations=3", "identifiability.elements=2"),
    "radio": ("operator.size=[16, 16]", f"operator.step={list(STEP)}", "data.mask=mask", "network.iterations=3"),
    "deblurring": ("network.iterations=3",),
    "super_resolution": ("network.iterations=3",),
}
USED: dict[str, type[nn.Module]] = dict.fromkeys(("poisson", "speckle"), RecorruptedAverage)
USED |= dict.fromkeys(("inpainting_one_mask", "cryo"), LeaveOut)
BEHIND = {"inpainting": NormalisedConvolution, "inpainting_one_mask": NormalisedConvolution}
BEHIND |= dict.fromkeys(("tomography", "radio", "deblurring", "super_resolution"), RegularisedLeastSquares)


def trained(config: Path, out: Path, sets: list[str]) -> nn.Module:
    assert main(["train", "--config", str(config), "--out", str(out), *[word for item in sets for word in ("--set", item)]]) == 0
    return diffinv.load_reconstructor(out / "reconstructor.safetensors")


def whitened(observation: Observation, x: Tensor) -> Tensor:
    """(y − A x)/σ of the good data, σ at the true image."""
    mean = observation.operator(x)
    residual = (observation.y - mean) / observation.noise.variance(mean).sqrt()
    return residual[good_data(observation)]


def test_each_problem_has_a_simulation() -> None:
    assert len(CONFIGS) == 14
    assert all(simulate(name)["y"].shape[0] == ROWS for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_problem_is_trained_and_its_data_are_what_the_configuration_says(name: str, tmp_path: Path) -> None:
    content = simulate(name)
    sets = [f"data.path={write_npz(tmp_path / 'data.npz', content)}", *TINY, *OWN.get(name, ())]
    model = trained(CONFIGS[name], tmp_path / "out", sets)
    job = build_job(load(TrainConfig, CONFIGS[name], [parse_set(item) for item in sets]), tmp_path)
    observation = take(job.source, torch.arange(ROWS)).observation
    x = torch.from_numpy(content["x"][:, None]).float()
    images = model(observation.select(slice(0, 3)))
    assert images.shape == (3, 1, SIZE, SIZE) and bool(images.isfinite().all())
    used = model.model.model
    assert isinstance(used, USED.get(name, type(used)))
    network = used.model if name in USED else used
    assert isinstance(network.inverse, BEHIND.get(name, type(network.inverse)))
    if not isinstance(observation.noise, UnknownLevel):
        z = whitened(observation, x)
        error = float((z**2).std() / len(z) ** 0.5)
        assert abs(float((z**2).mean()) - 1) < 4 * error * (3 if name == "correlated" else 1)  # of the mean under correlation
        assert abs(float(z.mean())) < 4 / len(z) ** 0.5 * (2 if name == "correlated" else 1)


HIDING: dict[str, tuple[dict[str, Any], type[nn.Module]]] = {
    "identity": ({}, LeaveOut),
    "pixels mixed": ({"operator": {"kind": "sum_pool", "factor": 2}}, SplittingAverage),
    "what is seen has a loss of its own": ({"loss": [{"name": "splitting", "kept": 0.8, "inner": "sure"}]}, SplittingAverage),
}


@pytest.mark.parametrize("name", HIDING)
def test_data_that_a_network_learnt_nothing_about_are_hidden_from_it(name: str, tmp_path: Path) -> None:
    sections, expected = HIDING[name]
    path = write_npz(tmp_path / "data.npz", simulate("gaussian"))
    splitting = {"loss": [{"name": "splitting", "kept": 0.8}], "identifiability": {"allow_unidentifiable": True, "rows": 2}}
    held = {"held_out": 0.2}
    config = write_yaml(tmp_path / "run.yaml", configuration(path, **(splitting | sections), data=held, training={"steps": 1}))
    used = trained(config, tmp_path / "out", []).model.model
    assert isinstance(used, expected)
    if expected is LeaveOut:
        assert used.folds == 5


RADIO = CONFIGS["radio"]
MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no baselines": ({}, ("data.uv=null",), "visibilities wants data.uv"),
    "as many baselines as data": ({"uv": np.zeros((39, 2))}, (), "which does not fit data of (24, 40)"),
    "baselines that are not there": ({"uv": np.full((40, 2), np.nan)}, (), "give 0 where there is no baseline, and mask it"),
    "a level that no image shows": ({}, ("noise.std=auto",), "these data are (24, 1, 40, 2); give the level as a number"),
    "files of images": ({}, ("data.path=.",), "visibilities are read from .npz"),
    "two inverses": ({}, ("network.filling=1",), "filling 1.0 is for masks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_with_visibilities_are_refused_with_a_remedy(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, sets, reason = MISTAKES[name]
    path = write_npz(tmp_path / "data.npz", simulate("radio") | arrays)
    given = [f"data.path={path}", *TINY, *OWN["radio"], *sets]
    command = ["train", "--config", str(RADIO), "--out", str(tmp_path / "out")]
    assert main([*command, *[word for item in given for word in ("--set", item)]]) == 2
    assert reason in capsys.readouterr().err


def test_one_set_of_baselines_serves_all_rows_and_pairs_are_complex_numbers(tmp_path: Path) -> None:
    content = simulate("radio")
    uv, y = content["uv"][1], content["y"]
    pairs = np.stack([y.real, y.imag], -1)
    found = []
    for number, arrays in enumerate(({"y": y, "uv": uv}, {"y": pairs, "uv": np.stack([uv] * ROWS)})):
        sets = [f"data.path={write_npz(tmp_path / f'{number}.npz', arrays)}", *TINY, *OWN["radio"], "data.mask=null"]
        job = build_job(load(TrainConfig, RADIO, [parse_set(item) for item in sets]), tmp_path)
        found.append(take(job.source, torch.arange(3)).observation)
    assert found[0].operator.uv.shape == (1, 40, 2) and found[1].operator.uv.shape == (3, 40, 2)
    x = torch.from_numpy(content["x"][:3, None]).float()
    assert torch.equal(found[0].y, found[1].y)
    assert torch.allclose(found[0].operator(x), found[1].operator(x), atol=1e-5)


def test_a_correlation_of_unequal_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS["correlated"]
    assert main(["train", "--config", str(config), "--out", str(tmp_path), "--set", "noise.correlation=[[1, 2], [3]]"]) == 2
    assert "the name of a file, or rows of numbers, all of one length" in capsys.readouterr().err
