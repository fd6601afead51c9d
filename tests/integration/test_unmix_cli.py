"""`diffinv unmix`: from a cube on disk to maps on disk, and what it says about bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.cli import main
from diffinv.config import load
from diffinv.data.cubes import Cube, encode_cube
from diffinv.data.fits import read_fits
from diffinv.sections.unmix import UnmixConfig
from diffinv.spectral.base import Grid, Parameter
from diffinv.spectral.lines import GaussianLines
from tests.unit.test_table_models import EDGES, SPECTRA
from tests.unit.test_table_models import write as write_table

SIDE, CHANNELS = 10, 30
WCS = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRPIX1": 5.0, "CRPIX2": 5.0, "CRVAL1": 10.0, "CRVAL2": 20.0}
WCS |= {"CDELT1": -1e-4, "CDELT2": 1e-4, "CUNIT1": "deg", "CUNIT2": "deg"}
CONFIG = """
components:
  - name: gas
    model: {kind: lines, centres: [5030.0], velocity: [-900, 900], width: [100, 700]}
    fixed: {width: 300}
  - name: stars
    model: {kind: flat}
maps: {scales: 2, starts: [0.25, 0.5, 0.75]}
"""


def cube_of_a_line(seed: int = 0) -> tuple[Cube, np.ndarray]:
    """A line on a continuum, with Gaussian noise, a velocity gradient, one empty pixel and one bad channel; and the velocity."""
    edges = np.linspace(5000.0, 5060.0, CHANNELS + 1)
    grid = Grid.of(edges.tolist(), "Angstrom")
    velocity = np.broadcast_to(np.linspace(-300, 300, SIDE), (SIDE, SIDE)).copy()
    boxes = (Parameter("velocity", "km/s", -900, 900), Parameter("width", "km/s", 100, 700))
    model = GaussianLines(grid, torch.tensor([5030.0]).double(), torch.ones(1).double(), *boxes)
    theta = torch.from_numpy(np.stack([velocity.ravel(), np.full(SIDE * SIDE, 300.0)], -1))
    data = (40 * model(theta).numpy() + 3).T.reshape(CHANNELS, SIDE, SIDE)
    data = data + np.random.default_rng(seed).standard_normal(data.shape)
    data[:, 3, 4], data[7, 6, 6] = np.nan, np.inf
    good = np.isfinite(data)
    cube = Cube(np.where(good, data, 0.0), np.where(good, 1.0, 0.0), good, edges[:-1], edges[1:], "Angstrom", "erg", wcs=WCS)
    return cube, velocity


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("unmix")
    cube, velocity = cube_of_a_line()
    (folder / "cube.fits").write_bytes(encode_cube(cube))
    (folder / "run.yaml").write_text(CONFIG)
    assert main(["unmix", str(folder / "cube.fits"), "--config", str(folder / "run.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out" / "cube-maps.fits", velocity


def test_velocity_and_its_errors_are_right_and_the_hole_is_flagged(product: tuple[Path, np.ndarray]) -> None:
    path, velocity = product
    file = read_fits(path)
    mean, std = (file.named(name)[0] for name in ("MEAN", "STD"))
    assert (mean.header["COMPNAME"], mean.header["PARAM"], mean.header["BUNIT"]) == ("gas", "velocity", "km/s")
    flag = file.named("FLAG")[0].data
    assert flag[3, 4] == 1 and (flag != 0).sum() == 1
    error = (mean.data - velocity) / std.data
    assert 0.5 < (np.abs(error) < 1).mean() < 0.95 and (np.abs(error) < 3).mean() > 0.97
    assert np.abs(mean.data - velocity).mean() < 40
    q05, q95 = (file.named(name)[0].data for name in ("Q05", "Q95"))
    np.testing.assert_allclose(q95 - q05, 2 * 1.6448536 * std.data, rtol=1e-4)


def test_world_coordinates_amplitudes_and_residuals_are_kept(product: tuple[Path, np.ndarray]) -> None:
    file = read_fits(product[0])
    for plane in file.planes[1:]:
        assert plane.header["CRVAL1"] == 10.0 and plane.header["CTYPE2"] == "DEC--TAN"
    amplitudes = [plane for plane in file.named("AMP")]
    assert [plane.header["COMPNAME"] for plane in amplitudes] == ["gas", "stars"]
    assert np.nanmedian(amplitudes[0].data) == pytest.approx(40, rel=0.1)
    assert np.nanmedian(amplitudes[1].data) == pytest.approx(3, rel=0.1)
    residual = file.named("RESID")[0].data
    assert residual.shape == (CHANNELS, SIDE, SIDE)
    assert np.isnan(residual).sum() == CHANNELS + 1
    assert np.nanstd(residual) == pytest.approx(1, abs=0.06)
    assert file.named("FIT")[0].header["BUNIT"] == "erg"


def test_a_page_shows_maps_and_pixels_and_fetches_nothing(product: tuple[Path, np.ndarray]) -> None:
    page = product[0].with_suffix(".html").read_text(encoding="utf-8")
    assert "gas · velocity" in page and "stars · amplitude" in page and "worst fit" in page
    assert page.count("class='chart corner'") == 3 and "http://" not in page and "default-src 'none'" in page


def test_the_shipped_configuration_is_valid() -> None:
    loaded = load(UnmixConfig, Path("configs/unmix.yaml"))
    assert loaded.config.components[0].log == ("kT",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("links: [[gas.speed, stars.x]]", "no parameter gas.speed"),
        ("colour: red", "unknown key"),
        ("cube: {rmf: none.rmf}", "none.rmf"),
    ],
)
def test_what_does_not_fit_is_one_line(change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_a_line()
    (tmp_path / "cube.fits").write_bytes(encode_cube(cube))
    (tmp_path / "run.yaml").write_text(CONFIG + change + "\n")
    code = main(["unmix", str(tmp_path / "cube.fits"), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_cube_without_variance_takes_its_noise_from_its_channels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, velocity = cube_of_a_line()
    (tmp_path / "cube.fits").write_bytes(encode_cube(replace(cube, variance=None)))
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = ["unmix", str(tmp_path / "cube.fits"), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert re.search("are no counts.* or cube.noise_std", capsys.readouterr().err)
    for wrong in ("loud", "Estimate", "0", "-1", "true"):
        assert main([*command, "--set", f"cube.noise_std={wrong}"]) == 2
        error = capsys.readouterr().err
        assert "cube.noise_std: expected a number > 0 or estimate" in error and error.count("\n") == 1
    assert main([*command, "--set", "cube.noise_std=1", "--set", "cube.line_free=[[5000, 5060]]"]) == 2
    assert "line_free and noise_std both say what the noise is" in capsys.readouterr().err
    assert main([*command, "--set", "cube.noise_std=estimate"]) == 2
    assert "98 whole spectra of 30 channels are too few to measure noise" in capsys.readouterr().err
    assert main([*command, "--set", "cube.noise_std=1"]) == 0
    file = read_fits(tmp_path / "o" / "cube-maps.fits")
    error = (file.named("MEAN")[0].data - velocity) / file.named("STD")[0].data
    assert 0.5 < (np.abs(error) < 1).mean() < 0.95
    (tmp_path / "cube.fits").write_bytes(encode_cube(cube))
    assert main([*command, "--set", "cube.noise_std=1"]) == 2
    assert "cube.fits: noise_std would replace the file's variance" in capsys.readouterr().err


def test_a_parameter_that_is_fixed_but_unknown_names_the_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_a_line()
    (tmp_path / "cube.fits").write_bytes(encode_cube(cube))
    (tmp_path / "run.yaml").write_text(CONFIG.replace("width: 300", "breadth: 300"))
    assert main(["unmix", str(tmp_path / "cube.fits"), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "o")]) == 2
    assert "no parameter breadth" in capsys.readouterr().err


TWO = """
components:
  - {name: hard, model: {kind: power_law}, box: {Gamma: [1.0, 1.6]}, emulate: true}
  - {name: soft, model: {kind: power_law}, box: {Gamma: [3.4, 4.0]}, emulate: true}
maps: {scales: 2, starts: [0.3, 0.7], rounds: 2, kappas: [1.0]}
"""


def cube_of_two(seed: int = 0) -> tuple[Cube, np.ndarray]:
    """Counts of a hard and a soft power law, 800 together, their ratio rising across the map; and those of the hard one."""
    edges = np.geomspace(1.0, 7.0, CHANNELS + 1)
    share = np.broadcast_to(np.linspace(0.3, 0.7, SIDE), (SIDE, SIDE))
    spectrum = lambda gamma: -np.diff(edges ** (1 - gamma)) / (edges[0] ** (1 - gamma) - edges[-1] ** (1 - gamma))
    mean = 800 * (spectrum(1.3)[:, None, None] * share + spectrum(3.7)[:, None, None] * (1 - share))
    data = np.random.default_rng(seed).poisson(mean).astype(float)
    good = np.ones(data.shape, dtype=bool)
    return Cube(data, None, good, edges[:-1], edges[1:], "keV", "counts", wcs=WCS), 800 * share


def test_components_that_are_emulated_have_maps_of_their_ratio_which_narrow_their_amplitudes(tmp_path: Path) -> None:
    """Errors of neighbours go together, so that coverage is that of three cubes."""
    widths, covered = [], []
    for name, chosen in (("maps", TWO), ("free", TWO.replace("rounds: 2", "rounds: 2, shares: false"))):
        (tmp_path / "run.yaml").write_text(chosen)
        for seed in range(3):
            cube, hard = cube_of_two(seed)
            (tmp_path / "cube.fits").write_bytes(encode_cube(cube))
            out = tmp_path / f"{name}{seed}"
            assert main(["unmix", str(tmp_path / "cube.fits"), "--config", str(tmp_path / "run.yaml"), "--out", str(out)]) == 0
            assert sorted(p.name for p in out.glob("*.safetensors")) == ["cube-hard.safetensors", "cube-soft.safetensors"]
            file = read_fits(out / "cube-maps.fits")
            amplitude, std = file.named("AMP")[0], file.named("AMP_STD")[0]
            assert (amplitude.header["COMPNAME"], amplitude.header["BUNIT"]) == ("hard", "counts")
            assert len(file.named("MEAN")) == 2
            covered.append(float((np.abs(amplitude.data - hard) < std.data).mean()))
            widths.append(float(np.median(std.data)))
    assert 0.5 < np.mean(covered[:3]) < 0.9 and 0.5 < np.mean(covered[3:]) < 0.9
    assert np.mean(widths[:3]) < 0.9 * np.mean(widths[3:])


def test_ratios_of_what_is_not_normalised_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_a_line()
    (tmp_path / "cube.fits").write_bytes(encode_cube(cube))
    (tmp_path / "run.yaml").write_text(CONFIG.replace("{scales: 2", "{shares: true, scales: 2"))
    assert main(["unmix", str(tmp_path / "cube.fits"), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "o")]) == 2
    assert "maps.shares: needs two components or more" in capsys.readouterr().err


def run(folder: Path, config: str, name: str = "cube.fits", cube: Cube | None = None) -> int:
    (folder / name).write_bytes(encode_cube(cube or cube_of_a_line()[0]))
    (folder / "run.yaml").write_text(config)
    return main(["unmix", str(folder / name), "--config", str(folder / "run.yaml"), "--out", str(folder / "out")])


FLAT = "components: [{name: stars, model: {kind: flat}}]\n"
FIXED = CONFIG.replace("fixed: {width: 300}", "fixed: {width: 300, velocity: 0}\n    emulate: true")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FLAT, "no component has a free parameter"),
        (FIXED, "emulator: Fixed has no free parameter"),
        (CONFIG + "cube: {energies: [1, 7]}\n", "energies are of X-ray data, and its axis is in Angstrom"),
        (CONFIG + "cube: {channels_a_bin: 2}\n", "channels_a_bin would not be used for a FITS cube"),
        (CONFIG + "cube: {arf: some.arf}\n", "an ARF needs an RMF"),
        (CONFIG + "cube: {max_pixels: 100}\n", "over max_pixels = 100"),
        (CONFIG.replace("scales: 2", "scales: 2, pixels: [[11, 1]]"), r"maps.pixels: \(11, 1\) outside of 10 × 10 pixels"),
        (
            CONFIG.replace("kind: flat}", "kind: flat}\n    absorption: {path: a.fits, unit: 1}"),
            "absorption does not act on kind: flat",
        ),
    ],
)
def test_what_cannot_be_is_said_before_the_fit(config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, config) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error and not list(tmp_path.glob("out/*-maps.*"))


def test_counts_that_are_none_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_two()
    assert run(tmp_path, TWO, cube=replace(cube, data=cube.data + 0.5)) == 2
    assert f"{tmp_path / 'cube.fits'}: cube (counts)" in capsys.readouterr().err


def test_files_that_differ_after_a_dot_have_products_of_their_own(tmp_path: Path) -> None:
    short = CONFIG.replace("scales: 2", "scales: 2, kappas: [1.0], rounds: 1")
    for name in ("ADP.2017-03-27T12:49:43.655.fits", "ADP.2017-03-27T12:50:43.655.fits"):
        assert run(tmp_path, short, name) == 0
    assert len(list(tmp_path.glob("out/*-maps.fits"))) == 2
    file = read_fits(tmp_path / "out" / "ADP.2017-03-27T12:49:43.655-maps.fits")
    assert file.primary["CALIBR"] == "uncalibrated" and file.named("AMP")[0].header["BUNIT"] == "erg"


def test_an_emulator_of_other_channels_or_a_wider_box_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_two()
    assert run(tmp_path, TWO, cube=cube) == 0
    path = tmp_path / "out" / "cube-hard.safetensors"
    stored = f"components: [{{name: hard, model: {{kind: emulator, path: {path}}}, box: {{Gamma: [1.0, BOX]}}}}]\n"
    narrow = replace(cube, data=cube.data[:-1], mask=cube.mask[:-1], low=cube.low[:-1], high=cube.high[:-1])
    for box, one, message in (
        ("1.5", narrow, "an emulator of 30 channels, and the cube has 29"),
        ("1.9", cube, "was trained from 1 to 1.6"),
    ):
        assert run(tmp_path, stored.replace("BOX", box), cube=one) == 2
        assert message in capsys.readouterr().err
    assert run(tmp_path, stored.replace("BOX", "1.5"), cube=cube) == 0


def test_emulators_that_train_made_are_those_that_unmix_would_make(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cube, _ = cube_of_two()
    assert run(tmp_path, TWO, cube=cube) == 0
    like = f"cube.like={tmp_path / 'cube.fits'}"
    train = lambda *more: main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "trained"), *more])
    assert train("--set", like) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith("trained") and said.err.count("χ² a count") == 4
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == ["hard.safetensors", "soft.safetensors"]
    entry = "  - {name: NAME, model: {kind: emulator, path: trained/NAME.safetensors}, box: {Gamma: BOX}}\n"
    stored = "".join(entry.replace("NAME", n).replace("BOX", b) for n, b in (("hard", "[1.0, 1.6]"), ("soft", "[3.4, 4.0]")))
    stored = stored.replace("path: trained", f"path: {tmp_path / 'trained'}")
    before = read_fits(tmp_path / "out" / "cube-maps.fits").named("MEAN")[0].data
    assert run(tmp_path, "components:\n" + stored + TWO.splitlines()[-1] + "\n", cube=cube) == 0
    after = read_fits(tmp_path / "out" / "cube-maps.fits").named("MEAN")[0].data
    np.testing.assert_allclose(after, before, rtol=0.02)  # files hold float32
    (tmp_path / "run.yaml").write_text(TWO)
    for more, message in (
        (("--set", like), "hard.safetensors, "),
        ((), "cube is missing"),
        (("--set", "cube.like=missing.fits", "--out", str(tmp_path / "other")), "missing.fits: missing"),
    ):
        assert train(*more) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert train("--set", like) == 2
    assert "none has emulate: true" in capsys.readouterr().err


def test_a_parameter_that_would_leave_its_models_domain_is_flagged(tmp_path: Path) -> None:
    """Bremsstrahlung colder than its box, faint: the models are asked for nothing outside, and the maps say so."""
    edges = np.geomspace(1.0, 7.0, CHANNELS + 1)
    centre = np.sqrt(edges[1:] * edges[:-1])
    mean = np.exp(-centre / 0.45) / centre * np.diff(edges)
    counts = np.random.default_rng(3).poisson(25 * np.broadcast_to((mean / mean.sum())[:, None, None], (CHANNELS, SIDE, SIDE)))
    cube = Cube(counts.astype(float), None, np.ones(counts.shape, bool), edges[:-1], edges[1:], "keV", "counts", wcs=WCS)
    config = (
        "components: [{name: gas, model: {kind: bremsstrahlung}, box: {kT: [0.6, 5.0], z: [-0.01, 0.01]}}]\nmaps: {scales: 2}\n"
    )
    assert run(tmp_path, config, cube=cube) == 0
    flag = read_fits(tmp_path / "out" / "cube-maps.fits").named("FLAG")[0].data
    assert ((flag & 2) > 0).mean() > 0.3


def test_a_table_model_is_fitted(tmp_path: Path) -> None:
    """Counts of the node kT = 1, abund = 1: the temperature is near it everywhere."""
    write_table(tmp_path / "table.fits")
    spectrum = 40 * SPECTRA[1, 1]
    counts = np.random.default_rng(4).poisson(np.broadcast_to(spectrum[:, None, None], (len(spectrum), SIDE, SIDE)))
    cube = Cube(counts.astype(float), None, np.ones(counts.shape, bool), EDGES[:-1], EDGES[1:], "keV", "counts", wcs=WCS)
    model = f"{{kind: table, path: {tmp_path / 'table.fits'}}}"
    config = f"components: [{{name: gas, model: {model}, fixed: {{abund: 1}}, log: [kT]}}]\nmaps: {{scales: 2}}\n"
    assert run(tmp_path, config, cube=cube) == 0
    file = read_fits(tmp_path / "out" / "cube-maps.fits")
    mean, std = (file.named(name)[0].data for name in ("MEAN", "STD"))
    assert float(np.abs((mean - 1.0) / std).mean()) < 1.5 and 0 < float(np.median(std)) < 0.1
    assert np.median(file.named("AMP")[0].data) == pytest.approx(40, rel=0.02)
