"""`diffinv unmix` with the spectrum of a region without source as background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.cli import main
from diffinv.data.cubes import Cube, encode_cube
from diffinv.data.fits import read_fits
from diffinv.data.ogip import read_spectrum
from diffinv.data.remnants import read_remnant, remnant_binning
from diffinv.data.response_files import read_rmf

SIDE, GAMMA, COUNTS, SHARE = 8, 2.2, 1500.0, 0.5  # share: of the counts that is background
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


@pytest.fixture(scope="module")
def case(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with cube.fits and run.yaml, and the scale of 9774_bg.pi in the cube's pixels."""
    xray, folder = data_folder / "xray", tmp_path_factory.mktemp("background")
    remnant, rmf = read_remnant(xray), read_rmf(xray / "9774.rmf")
    binning = remnant_binning(rmf.low, rmf.high)
    low, high = binning.bounds(rmf.low, rmf.high)
    source = remnant.synchrotron(torch.tensor([[GAMMA]], dtype=torch.float64)).numpy()[0]
    background = binning.sum(read_spectrum(xray / "9774_bg.pi").counts)
    scale = SHARE * COUNTS / background.sum()
    mean = (1 - SHARE) * COUNTS * source / source.sum() + scale * background
    data = np.random.default_rng(0).poisson(np.broadcast_to(mean[:, None, None], (len(mean), SIDE, SIDE))).astype(float)
    cube = Cube(data, None, np.ones(data.shape, bool), low, high, "keV", "counts")
    (folder / "cube.fits").write_bytes(encode_cube(cube))
    (folder / "run.yaml").write_text(CONFIG.format(xray=xray))
    return folder, scale


def index(folder: Path, out: Path, *changes: str) -> tuple[float, float]:
    """Mean over the map of Γ, and of its σ."""
    given = [part for change in changes for part in ("--set", change)]
    command = ["unmix", str(folder / "cube.fits"), "--config", str(folder / "run.yaml"), "--out", str(out), *given]
    assert main(command) == 0
    file = read_fits(out / "cube-maps.fits")
    return float(file.named("MEAN")[0].data.mean()), float(file.named("STD")[0].data.mean())


def test_the_spectrum_of_the_background_takes_its_bias_away(case: tuple[Path, float], data_folder: Path, tmp_path: Path) -> None:
    folder, scale = case
    spectrum = f"cube.background_spectrum={{path: {data_folder / 'xray' / '9774_bg.pi'}, scale: {scale}}}"
    known, width = index(folder, tmp_path / "known", spectrum)
    ignored, _ = index(folder, tmp_path / "ignored")
    assert abs(known - GAMMA) < width
    assert abs(ignored - GAMMA) > 3 * width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("{path: nowhere.pi, scale: 1}",), "nowhere.pi"),
        (("{path: XRAY/9774.arf, scale: 1}",), "9774.arf"),
        (("{path: XRAY/9774_bg.pi, scale: 0}",), "cube.background_spectrum: expected greater than 0, got 0"),
        (("{path: XRAY/9774_bg.pi}",), "cube.background_spectrum.scale is missing"),
        (("{path: XRAY/9774_bg.pi, scale: 1}", "cube.rmf=null", "cube.arf=null"), "a spectrum is in the channels of a response"),
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
    given = [f"cube.background_spectrum={first}".replace("XRAY", str(data_folder / "xray")), *rest]
    command = ["unmix", str(case[0] / "cube.fits"), "--config", str(case[0] / "run.yaml"), "--out", str(tmp_path / "o")]
    assert main([*command, *(part for change in given for part in ("--set", change))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
