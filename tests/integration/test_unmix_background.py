"""`diffinv unmix` with the spectrum of a region without source as background."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.cli import main
from diffinv.data.cube_background import background_of
from diffinv.data.cubes import Cube, encode_cube
from diffinv.data.fits import Plane, Table, encode_fits, read_fits
from diffinv.data.ogip import read_spectrum
from diffinv.data.remnants import read_remnant, remnant_binning
from diffinv.data.response_files import read_rmf

SIDE, GAMMA, COUNTS, SHARE = 8, 2.2, 1500.0, 0.5  # share: of the counts that is background
REGION, EXPOSURE = 6000, 200_000.0  # counts and seconds of the file of the background
CONFIG = """
cube: {{rmf: {xray}/9774.rmf, arf: {xray}/9774.arf, exposure: 75141}}
components:
  - name: source
    model: {{kind: power_law}}
    absorption: {{path: {xray}/xsect_tbabs_wilm.fits, unit: 1.0e-22}}
    box: {{Gamma: [1.0, 4.0]}}
    fixed: {{n_H: 0.7}}
maps: {{scales: 2, rounds: 2, kappas: [1.0]}}
"""


def rate(energy: np.ndarray) -> np.ndarray:
    """Background a keV, flat with a wide line."""
    return 1 + 2 * np.exp(-0.5 * ((energy - 2.2) / 0.3) ** 2)


@pytest.fixture(scope="module")
def case(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with cube.fits, run.yaml and back.pi, and the area of a pixel over that of the region of back.pi."""
    xray, folder = data_folder / "xray", tmp_path_factory.mktemp("background")
    remnant, rmf = read_remnant(xray), read_rmf(xray / "9774.rmf")
    binning = remnant_binning(rmf.low, rmf.high)
    low, high = binning.bounds(rmf.low, rmf.high)
    source = remnant.synchrotron(torch.tensor([[GAMMA]], dtype=torch.float64)).numpy()[0]
    channels = (rmf.high - rmf.low) * rate(0.5 * (rmf.low + rmf.high))
    shape = binning.sum(channels) / binning.sum(channels).sum()
    mean = (1 - SHARE) * COUNTS * source / source.sum() + SHARE * COUNTS * shape
    rng = np.random.default_rng(0)
    data = rng.poisson(np.broadcast_to(mean[:, None, None], (len(mean), SIDE, SIDE))).astype(float)
    cube = Cube(data, None, np.ones(data.shape, bool), low, high, "keV", "counts")
    (folder / "cube.fits").write_bytes(encode_cube(cube))
    (folder / "run.yaml").write_text(CONFIG.format(xray=xray))
    whole = REGION * channels / binning.sum(channels).sum()
    write(folder / "back.pi", rmf.channel, rng.poisson(whole))
    write(folder / "bad.pi", rmf.channel, rng.poisson(whole), bad=300)
    write(folder / "empty.pi", rmf.channel, np.zeros(len(whole), int))
    return folder, SHARE * COUNTS / REGION * EXPOSURE / 75141


def write(path: Path, channel: np.ndarray, counts: np.ndarray, bad: int | None = None) -> None:
    """A PHA file of the region; channel number `bad` is not good."""
    quality = np.zeros(len(counts), np.int16)
    if bad is not None:
        quality[bad] = 5
    columns = {"CHANNEL": channel.astype(np.int32), "COUNTS": counts.astype(np.int32), "QUALITY": quality}
    cards = {"EXPOSURE": EXPOSURE, "HDUCLASS": "OGIP", "HDUCLAS1": "SPECTRUM"}
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Table("SPECTRUM", columns, cards)]))


def index(folder: Path, out: Path, *changes: str) -> tuple[float, float]:
    """Mean over the map of Γ, and of its σ."""
    given = [part for change in changes for part in ("--set", change)]
    command = ["unmix", str(folder / "cube.fits"), "--config", str(folder / "run.yaml"), "--out", str(out), *given]
    assert main(command) == 0
    file = read_fits(out / "cube-maps.fits")
    return float(file.named("MEAN")[0].data.mean()), float(file.named("STD")[0].data.mean())


def test_the_spectrum_of_the_background_takes_its_bias_away(
    case: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The error of the file's 6,000 counts is common to all pixels: about as large as one pixel's."""
    folder, area = case
    spectrum = f"cube.background_spectrum={{path: {folder / 'back.pi'}, area: {area}}}"
    known, width = index(folder, tmp_path / "known", spectrum)
    assert "counts in 1" in capsys.readouterr().err
    ignored, _ = index(folder, tmp_path / "ignored")
    assert abs(known - GAMMA) < 2 * width
    assert abs(ignored - GAMMA) > 6 * width


def test_an_emulated_source_has_the_same_background(case: tuple[Path, float], tmp_path: Path) -> None:
    folder, area = case
    (tmp_path / "cube.fits").write_bytes((folder / "cube.fits").read_bytes())
    text = (folder / "run.yaml").read_text().replace("fixed: {n_H: 0.7}", "fixed: {n_H: 0.7}\n    emulate: true")
    (tmp_path / "run.yaml").write_text(text)
    known, width = index(tmp_path, tmp_path / "o", f"cube.background_spectrum={{path: {folder / 'back.pi'}, area: {area}}}")
    assert abs(known - GAMMA) < 2 * width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("{path: nowhere.pi, area: 1}",), "nowhere.pi"),
        (("{path: XRAY/9774.arf, area: 1}",), "9774.arf"),
        (("{path: HERE/bad.pi, area: 1}",), "bad.pi: 1 channels of the cube have QUALITY ≠ 0"),
        (("{path: HERE/empty.pi, area: 1}",), "empty.pi: 0 counts in the cube's channels"),
        (("{path: HERE/back.pi, area: 0}",), "cube.background_spectrum: expected greater than 0, got 0"),
        (("{path: HERE/back.pi}",), "cube.background_spectrum.area is missing"),
        (("{path: HERE/back.pi, area: 1}", "cube.rmf=null", "cube.arf=null"), "a spectrum is in the channels of a response"),
    ],
)
def test_what_is_no_background_is_one_line(
    changes: tuple[str, ...],
    message: str,
    case: tuple[Path, float],
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    first, *rest = changes
    value = first.replace("XRAY", str(data_folder / "xray")).replace("HERE", str(case[0]))
    given = [f"cube.background_spectrum={value}", *rest]
    command = ["unmix", str(case[0] / "cube.fits"), "--config", str(case[0] / "run.yaml"), "--out", str(tmp_path / "o")]
    assert main([*command, *(part for change in given for part in ("--set", change))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_counts_of_groups_are_kept_and_effective_areas_and_times_divided_out(case: tuple[Path, float], data_folder: Path) -> None:
    rmf = read_rmf(data_folder / "xray" / "9774.rmf")
    binning = remnant_binning(rmf.low, rmf.high)
    spectrum = read_spectrum(case[0] / "back.pi")
    found = background_of(spectrum, rmf, binning, area=0.5, exposure=2 * EXPOSURE)
    total = binning.sum(spectrum.counts).sum()
    assert found.counts == total and found.expected.sum() == pytest.approx(total, rel=1e-3)  # widths differ a little
    assert 0.3 < found.groups / (total / 20) <= 1
    half = replace(spectrum, area_scale=0.5 * spectrum.area_scale)
    np.testing.assert_allclose(background_of(half, rmf, binning, area=0.5, exposure=2 * EXPOSURE).expected, 2 * found.expected)
    few = replace(spectrum, counts=np.where(np.arange(len(spectrum.counts)) % 25 == 0, spectrum.counts, 0))
    assert (background_of(few, rmf, binning, area=1, exposure=1.0).expected > 0).all()  # no channel without background
