"""The one door for cubes finds the kind of a file by its content, and its response only if the channels agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import io as scipy_io

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.cube_input import CubeOptions, open_cube
from diffinv.data.cubes import encode_cube
from diffinv.data.events import Window, encode_events
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.remnants import draw_scene, observe, read_remnant
from diffinv.data.response_files import read_rmf
from diffinv.spectral.base import Parameter
from diffinv.spectral.lines import GaussianLines

SKY = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 187.3, "CRVAL2": 12.4, "CRPIX1": 4096.5, "CRPIX2": 4096.5}
SKY |= {"CDELT1": -1.3667e-4, "CDELT2": 1.3667e-4}


def test_events_cube_and_response_belong_together(data_folder: Path, tmp_path: Path) -> None:
    xray = data_folder / "xray"
    rmf, remnant = read_rmf(xray / "9774.rmf"), read_remnant(xray, binned=False)
    made = observe(draw_scene(0, size=6), remnant, median=400.0, seed=1)
    made.counts[:, 0, 0], made.counts[100, 0, 0], made.counts[100, 5, 5] = 0, 1, 1
    path = tmp_path / "evt2.fits"
    window = Window(4096.5, 4096.5, 4.0, (6, 6))
    path.write_bytes(encode_events(made.counts, rmf, window, SKY, exposure=75141.0, seed=0))
    options = CubeOptions(xray / "9774.rmf", xray / "9774.arf", (1.02, 6.98), 2, 4.0)
    cube, response = open_cube(path, options)
    binned = read_remnant(xray).response
    np.testing.assert_array_equal(response.matrix, binned.matrix)
    assert cube.data.shape[0] == 205
    assert cube.data.sum() == made.counts[69:479].sum()

    part, _ = open_cube(path, replace(options, region=(4100.5, 4104.5, 2, 3)))
    np.testing.assert_array_equal(part.data, cube.data[:, 2:4, 1:4])

    stored = tmp_path / "cube.fits"
    stored.write_bytes(encode_cube(cube))
    again, same = open_cube(stored, CubeOptions(options.rmf, options.arf))
    np.testing.assert_array_equal(again.data, cube.data)
    np.testing.assert_array_equal(same.matrix, binned.matrix)
    assert open_cube(stored, CubeOptions())[1] is None

    stored.write_bytes(encode_cube(replace(cube, low=cube.low + 0.004, high=cube.high + 0.004)))
    with pytest.raises(InputError, match=r"cube.fits: 205 channels of 1.01\d*–6.99\d* keV are not made of .*9774.rmf with 1024"):
        open_cube(stored, CubeOptions(options.rmf, options.arf))
    with pytest.raises(InputError, match="evt2.fits: an event list needs rmf, energies, pixel"):
        open_cube(path, CubeOptions())
    with pytest.raises(InputError, match="evt2.fits: Binning: 410 channels overlap 1.02–6.98 keV"):
        open_cube(path, replace(options, channels_a_bin=3))


def test_wavelengths_have_no_channels_of_a_response(data_folder: Path, tmp_path: Path) -> None:
    header = {"CTYPE3": "AWAV", "CUNIT3": "Angstrom", "CRPIX3": 1.0, "CRVAL3": 4750.0, "CDELT3": 1.25}
    path = tmp_path / "a.fits"
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), Plane("DATA", np.ones((4, 2, 2)), header)]))
    with pytest.raises(InputError, match=r"4 channels of 4749.38–4754.38 Angstrom are not made of"):
        open_cube(path, CubeOptions(data_folder / "xray" / "9774.rmf", None))


def test_arrays_are_scenes(tmp_path: Path) -> None:
    scipy_io.savemat(tmp_path / "a.mat", {"Y": np.ones((2, 3, 4)), "Z": np.ones((3, 3, 3))})
    cube, response = open_cube(tmp_path / "a.mat", CubeOptions(array="Y"))
    assert cube.data.shape == (4, 2, 3)
    assert response is None
    (tmp_path / "a.fits").write_bytes(encode_fits([Plane("PRIMARY", None, {}), Plane("DATA", np.ones((4, 2, 3)), {})]))
    part, _ = open_cube(tmp_path / "a.mat", CubeOptions(array="Y", window=(2, 3), noise_std=0.5))
    same, _ = open_cube(tmp_path / "a.fits", CubeOptions(window=(2, 3), noise_std=0.5))
    assert part.centre.tolist() == same.centre.tolist() == [2, 3]  # bands count from 1
    assert len(same.grid()) == 2
    assert (part.variance == 0.25).all()
    boxes = (Parameter("velocity", "km/s", -900, 900), Parameter("width", "km/s", 100, 700))
    with pytest.raises(DiffinvError, match="the channels have no wavelengths"):
        GaussianLines(part.grid(), torch.tensor([2.0]), torch.ones(1), *boxes)
