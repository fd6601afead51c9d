"""Rows of data sets are read as they were written, a few at a time, and whatever cannot be read is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffinv.core.checks import InputError
from diffinv.core.rng import Rng
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.fits_rows import open_fits_rows
from diffinv.data.layouts import InputOptions
from diffinv.data.rows import Rows, in_memory, open_arrays
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.algebra import Identity
from diffinv.training.measured import Columns, Fields, MeasuredRows
from tests.learning import WRITERS, arrays, round_psf

FORMATS = [suffix for suffix in WRITERS if suffix != ".fits"]
BATCH = torch.tensor([5, 0, 5, 59])


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_come_in_the_order_asked_for(suffix: str, tmp_path: Path) -> None:
    content = arrays()
    rows = open_arrays(WRITERS[suffix](tmp_path / f"a{suffix}", content))
    assert set(rows.columns) == set(content)
    for name in ("y", "mask", "k"):
        assert np.array_equal(rows.read(name, BATCH.numpy()), content[name][BATCH])
    assert np.array_equal(rows.whole("psf"), content["psf"])


def test_an_uncompressed_npz_stays_on_the_disk(tmp_path: Path) -> None:
    values = arrays()["y"]
    np.savez(tmp_path / "plain.npz", y=values, f=np.asfortranarray(values))
    np.savez_compressed(tmp_path / "packed.npz", y=values)
    reads = [open_arrays(tmp_path / f"{name}.npz").columns["y"].read for name in ("plain", "packed")]
    assert all(np.array_equal(read(np.array([3, 7])), values[[3, 7]]) for read in reads)
    kept = [next(c.cell_contents for c in read.__closure__ if isinstance(c.cell_contents, np.ndarray)) for read in reads]
    assert isinstance(kept[0], np.memmap)
    assert not isinstance(kept[1], np.memmap)
    assert np.array_equal(open_arrays(tmp_path / "plain.npz").read("f", np.array([2])), values[[2]])


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_not_such_a_file_is_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match="no such file"):
        open_arrays(path)
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(InputError, match=rf"{path}: not a readable {suffix} file"):
        open_arrays(path)


def test_python_objects_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", y=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="holds Python objects"):
        open_arrays(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", y=np.array(["a", "b"]))
    with pytest.raises(InputError, match=r"'y' is of type <U1; give numbers"):
        open_arrays(tmp_path / "b.npz").column("y")


@pytest.mark.parametrize(("suffix", "library", "extra"), [(".h5", "h5py", "hdf5"), (".zarr", "zarr", "zarr")])
def test_a_missing_library_is_named_with_its_extra(
    suffix: str, library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", {"y": arrays()["y"]})
    for module in [name for name in sys.modules if name in ("diffinv.data.hdf5", "diffinv.data.zarrs")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library} is not installed; pip install 'diffinv\[{extra}\]'"):
        open_arrays(path)


def measured(content: dict[str, np.ndarray], **columns: str | bool) -> MeasuredRows:
    rows = Rows(Path("memory"), {name: in_memory(np.asarray(values)) for name, values in content.items()})
    return MeasuredRows(rows, Columns(y="y", **columns), lambda f: Identity(f.shape), lambda f: UnknownLevel(f.good))


def fields(content: dict[str, np.ndarray], **columns: str | bool) -> Fields:
    return measured(content, **columns).fields(BATCH)


def test_bad_data_have_no_weight_and_no_value() -> None:
    content = arrays()
    y, var, mask = content["y"].copy(), content["var"].copy(), np.ones_like(content["y"])
    y[5, 1, 1], y[5, 1, 2], y[0, 0, 0] = np.nan, np.inf, -np.inf
    var[5, 2, 2], var[5, 2, 3], var[5, 2, 4] = 0, -1, np.nan
    mask[59, 3, 3] = 0
    found = fields({"y": y, "var": var, "mask": mask}, variance="var", mask="mask")
    expected = np.ones((4, 1, 16, 16), dtype=bool)
    expected[[0, 2], 0, 1, 1:3] = expected[[0, 2], 0, 2, 2:5] = expected[1, 0, 0, 0] = expected[3, 0, 3, 3] = False
    assert np.array_equal(found.good.numpy(), expected)
    assert bool((found.y[~found.good] == 0).all()) and bool(found.y.isfinite().all())
    assert np.allclose(found.y[expected], y[BATCH][:, None][expected], atol=1e-7)
    batch = measured({"y": y, "var": var, "mask": mask}, variance="var", mask="mask").batch(BATCH, Rng(range(4)))
    assert np.array_equal(batch.good.numpy(), expected)
    assert fields({"y": content["y"]}).good is None


def test_a_row_is_the_same_whatever_its_batch() -> None:
    source = measured(arrays(), variance="var", mask="one", second="second", x="x")
    whole = source.batch(BATCH, Rng(range(4)))
    for k, number in enumerate(BATCH):
        alone = source.batch(number[None], Rng([0]))
        for a, b in ((whole.observation.y, alone.observation.y), (whole.second.y, alone.second.y), (whole.x, alone.x)):
            assert torch.equal(a[[k]], b)


def test_arrays_may_be_shared_have_channels_or_be_complex() -> None:
    content = arrays()
    assert fields(content, mask="one").mask.shape == (1, 1, 16, 16)
    assert fields(content, psf="psf").psf.shape == (1, 1, 9, 9)
    assert fields(content | {"psf": np.stack([round_psf()] * 60)}, psf="psf").psf.shape == (4, 1, 9, 9)
    coloured = {"y": np.stack([content["y"]] * 3, 1), "var": np.stack([content["var"]] * 3, 1)}
    assert fields(coloured, variance="var").y.shape == (4, 3, 16, 16)
    complex_pairs = fields({"y": content["k"], "m": content["k_mask"]}, mask="m", pairs=True)
    pairs = fields({"y": np.stack([content["k"].real, content["k"].imag], -1), "m": content["k_mask"]}, mask="m", pairs=True)
    assert complex_pairs.shape == (1, 16, 16, 2)
    assert torch.equal(complex_pairs.y, pairs.y) and torch.equal(complex_pairs.good, pairs.good)
    assert torch.equal(pairs.good[0, 0, :, :, 0], torch.from_numpy(content["k_mask"]))


@pytest.mark.parametrize(
    ("content", "columns", "reason"),
    [
        ({"y": np.zeros(5)}, {}, r"array 'y' has shape \(5,\); give \(rows, \[channels,\]"),
        ({"y": np.ones((5, 4, 4)), "v": np.ones((4, 4, 4))}, {"variance": "v"}, "array 'v' has shape .* but there are 5 rows"),
        ({"y": np.ones((5, 4, 4)), "m": np.ones((5, 4, 3))}, {"mask": "m"}, "which does not fit data of"),
        ({"y": np.ones((5, 4, 4)), "s": np.ones((5, 4, 3))}, {"second": "s"}, "which does not fit data of"),
        ({"y": np.ones((5, 4, 4))}, {"x": "x"}, "holds no array 'x'; it holds y"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_at_once(content: dict, columns: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        measured(content, **columns)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("y", lambda a: np.where(np.arange(60)[:, None, None] == 59, np.nan, a), "row 59 of 'y' has no good datum"),
        ("psf", lambda a: 3 * a, "a PSF sums to 3; divide each by its sum"),
        ("psf", lambda a: np.full_like(a, np.nan), "a PSF sums to nan"),
        ("psf", lambda a: a[:8], r"stamps of odd size .* got \(1, 1, 8, 9\)"),
        ("x", lambda a: np.where(a > 0.9, np.nan, a), "'x' has NaN or infinite values"),
    ],
)
def test_rows_that_cannot_be_used_are_named(name: str, change, reason: str) -> None:
    content = arrays()
    content[name] = change(content[name])
    with pytest.raises(InputError, match=reason):
        fields(content, x="x", psf="psf")


def fits(path: Path, band: str = "i", unit: str = "nJy", psf: int = 9, oversample: float = 1.0) -> None:
    rng = np.random.default_rng(psf)
    stamp = np.pad(round_psf(), (psf - 9) // 2)
    planes = [Plane("PRIMARY", None, {}), Plane("SCI", rng.standard_normal((8, 8)), {"BAND": band, "BUNIT": unit})]
    planes += [Plane("VAR", np.ones((8, 8)), {}), Plane("DQ", np.eye(8, dtype=np.int32), {})]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode_fits([*planes, Plane("PSF", stamp, {"OVERSAMP": oversample, "PSFNORM": 1.0})]))


def test_fits_files_are_rows_with_their_flags_and_psfs_on_one_size(tmp_path: Path) -> None:
    for number, psf in enumerate((9, 13, 9)):
        fits(tmp_path / "in" / f"{number}.fits", psf=psf)
    rows, unit = open_fits_rows(tmp_path / "in", InputOptions())
    assert unit == "nJy"
    assert {name: c.shape for name, c in rows.columns.items()} == {
        "y": (3, 1, 8, 8),
        "good": (3, 1, 8, 8),
        "variance": (3, 1, 8, 8),
        "psf": (3, 1, 13, 13),
    }
    assert np.array_equal(rows.read("good", np.array([1]))[0, 0], ~np.eye(8, dtype=bool))
    padded = rows.read("psf", np.array([0, 1]))
    assert np.allclose(padded[0], padded[1], atol=1e-7)
    again, _ = open_fits_rows(tmp_path / "in", InputOptions())
    assert np.array_equal(again.read("y", np.array([2, 0])), rows.read("y", np.array([2, 0])))


def test_files_beyond_the_memory_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        fits(tmp_path / "in" / f"{number}.fits")
    kept, _ = open_fits_rows(tmp_path / "in", InputOptions())
    monkeypatch.setattr("diffinv.data.fits_rows.KEPT", 4000)
    few, _ = open_fits_rows(tmp_path / "in", InputOptions())
    assert np.array_equal(few.whole("y"), kept.whole("y"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"band": "z"}, r"1.fits: bands and unit \('z', 'nJy'\), but .*0.fits has \('i', 'nJy'\)"),
        ({"unit": "mJy"}, "bands and unit"),
        ({"oversample": 2.0}, "OVERSAMP = 2.0"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, change: dict, reason: str) -> None:
    fits(tmp_path / "in" / "0.fits")
    fits(tmp_path / "in" / "1.fits", **change)
    with pytest.raises(InputError, match=reason):
        open_fits_rows(tmp_path / "in", InputOptions())


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no FITS files to learn from"):
        open_fits_rows(tmp_path, InputOptions())
