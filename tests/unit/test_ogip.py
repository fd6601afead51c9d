"""X-ray spectra and responses: unpacked as the standard says, folded as a dense matrix, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from scipy import optimize

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.fits import Plane, Table, encode_fits
from diffinv.data.ogip import background_ratio, check_counts, grouped, read_spectrum
from diffinv.data.response_files import join, read_absorption, read_arf, read_rmf
from diffinv.spectral.base import Grid
from diffinv.spectral.combine import Product
from diffinv.spectral.continuum import PowerLaw
from diffinv.spectral.response import Binning, Folded
from diffinv.spectral.statistics import cash, maximum_likelihood, profile_background, w_statistic

EDGES = np.array([0.5, 0.6, 0.8, 1.0])
DENSE = np.array([[0.5, 0.0, 0.0, 0.25, 0.25], [0.0, 0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
START, COUNT = [[0, 3], [1, 0], [4, 0]], [[1, 2], [2, 0], [1, 0]]
VALUES = [[0.5, 0.25, 0.25], [0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]


def write(path: Path, *tables: Table) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", None, {}), *tables]))
    return path


def write_rmf(path: Path, first: int, *, tlmin: int | None = None, shift: int = 0, **extra: object) -> Path:
    columns = {
        "ENERG_LO": EDGES[:-1],
        "ENERG_HI": EDGES[1:],
        "N_GRP": np.array([2, 1, 1], np.int16),
        "F_CHAN": np.array(START, np.int16) + first + shift,
        "N_CHAN": np.array(COUNT, np.int16),
        "MATRIX": np.array(VALUES),
    }
    low = np.arange(5) * 0.2 + 0.3
    bounds = {"CHANNEL": np.arange(first, first + 5, dtype=np.int32), "E_MIN": low, "E_MAX": low + 0.2}
    matrix = Table("MATRIX", columns, {"TLMIN4": first if tlmin is None else tlmin, **extra})
    return write(path, matrix, Table("EBOUNDS", bounds, {}))


def write_arf(path: Path, area: list[float], edges: np.ndarray = EDGES) -> Path:
    columns = {"ENERG_LO": edges[:-1], "ENERG_HI": edges[1:], "SPECRESP": np.array(area)}
    return write(path, Table("SPECRESP", columns, {"TUNIT1": "keV"}))


def write_pha(path: Path, columns: dict[str, np.ndarray], **cards: object) -> Path:
    table = {"CHANNEL": np.arange(1, 1 + len(next(iter(columns.values()))), dtype=np.int32), **columns}
    return write(path, Table("SPECTRUM", table, {"EXPOSURE": 100.0, **cards}))


@pytest.mark.parametrize("first", [0, 1, 7])
def test_groups_are_unpacked_from_the_first_channel_on(tmp_path: Path, first: int) -> None:
    rmf = read_rmf(write_rmf(tmp_path / "a.rmf", first))
    np.testing.assert_array_equal(rmf.matrix.toarray(), DENSE)
    assert rmf.channel.tolist() == list(range(first, first + 5))
    assert not rmf.has_area


def test_channels_counted_in_two_ways_or_outside_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.rmf: F_CHAN counts from TLMIN = 0, but EBOUNDS has channels 1–5"):
        read_rmf(write_rmf(tmp_path / "a.rmf", 1, tlmin=0))
    with pytest.raises(InputError, match=r"b.rmf: row 0 of MATRIX .* do not fit"):
        read_rmf(write_rmf(tmp_path / "b.rmf", 1, shift=1))
    with pytest.raises(InputError, match=r"c.rmf: not an RMF: it has SPECRESP, but no MATRIX"):
        read_rmf(write_arf(tmp_path / "c.rmf", [1.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="SPECRESP is negative or not finite in 1 bins"):
        read_arf(write_arf(tmp_path / "a.arf", [1.0, -1.0, 1.0]))


def test_folding_is_the_dense_matrix_and_binning_commutes(tmp_path: Path) -> None:
    rmf, area = read_rmf(write_rmf(tmp_path / "a.rmf", 1)), [100.0, 200.0, 50.0]
    arf = read_arf(write_arf(tmp_path / "a.arf", area))
    photons = np.array([[1.0, 2.0, 3.0], [0.5, 0.0, 7.0]])
    expected = np.einsum("be,e,ek->bk", photons, area, DENSE)
    np.testing.assert_allclose(join(rmf, arf).fold(torch.from_numpy(photons)), expected, rtol=1e-14)
    binning = Binning(np.array([-1, 0, 0, 1, 1]))
    binned = join(rmf, arf, binning)
    np.testing.assert_allclose(binned.fold(torch.from_numpy(photons)), binning.sum(expected), rtol=1e-14)
    np.testing.assert_allclose(binned.low, [0.5, 0.9])
    np.testing.assert_allclose(binned.high, [0.9, 1.3])
    power = PowerLaw(arf.grid)
    theta = torch.tensor([[1.7]], dtype=torch.float64)
    folded = Folded(power, binned, 100.0)(theta)
    torch.testing.assert_close(folded, 100.0 * power(theta) @ binned.matrix)


def test_grids_that_differ_are_named_both(tmp_path: Path) -> None:
    rmf = read_rmf(write_rmf(tmp_path / "a.rmf", 1))
    with pytest.raises(InputError, match=r"b.arf .*differ at edge 1.*|b.arf.*a.rmf"):
        join(rmf, read_arf(write_arf(tmp_path / "b.arf", [1.0, 1.0, 1.0], EDGES * [1, 1.001, 1, 1])))
    with pytest.raises(InputError, match=r"c.arf has 2 bins of 0.5–0.8 keV, .*a.rmf 3 bins of 0.5–1 keV"):
        join(rmf, read_arf(write_arf(tmp_path / "c.arf", [1.0, 1.0], EDGES[:3])))
    response = join(rmf, read_arf(write_arf(tmp_path / "d.arf", [1.0, 1.0, 1.0])))
    with pytest.raises(DiffinvError, match=r"the model \(PowerLaw\) has 1 bins .*the response 3 bins"):
        Folded(PowerLaw(Grid.of([0.5, 1.0])), response, 1.0)


def test_the_area_is_there_once(tmp_path: Path) -> None:
    bare, full = write_rmf(tmp_path / "a.rmf", 1), write_rmf(tmp_path / "b.rmf", 1, HDUCLAS3="FULL")
    with pytest.raises(InputError, match="a.rmf: has no effective area; give the ARF"):
        join(read_rmf(bare), None)
    np.testing.assert_array_equal(join(read_rmf(full), None).matrix, DENSE)
    with pytest.raises(InputError, match="b.rmf: already has the effective area"):
        join(read_rmf(full), read_arf(write_arf(tmp_path / "a.arf", [1.0, 1.0, 1.0])))


def test_window_takes_whole_channels_by_groups() -> None:
    low = np.arange(10) * 0.1
    labels = Binning.window(low, low + 0.1, 0.25, 0.55, 2).labels
    assert labels.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, -1, -1]
    with pytest.raises(DiffinvError, match="3 channels overlap 0.25–0.45 keV"):
        Binning.window(low, low + 0.1, 0.25, 0.45, 2)


def test_rates_are_counts_and_other_numbers_are_refused(tmp_path: Path) -> None:
    rate = read_spectrum(write_pha(tmp_path / "a.pha", {"RATE": np.array([0.0, 0.03, 0.12])}))
    assert rate.counts.tolist() == [0, 3, 12]
    assert (rate.background, rate.rmf) == (None, None)
    for name, values, text in (
        ("COUNTS", [1.0, 2.5], r"2.5 at \(1,\)"),
        ("COUNTS", [-1.0, 2.0], r"-1 at \(0,\)"),
        ("COUNTS", [0.0, np.nan], r"nan at \(1,\)"),
        ("RATE", [0.001, 0.01], r"0.1 at \(0,\)"),
    ):
        with pytest.raises(InputError, match=rf"b.pha: 1 values are no counts, the first is {text}; a Poisson"):
            read_spectrum(write_pha(tmp_path / "b.pha", {name: np.array(values)}))
    with pytest.raises(InputError, match="type II"):
        read_spectrum(write_pha(tmp_path / "c.pha", {"SPEC_NUM": np.array([1, 2], np.int16), "COUNTS": np.ones(2)}))
    with pytest.raises(InputError, match="EXPOSURE is 0"):
        read_spectrum(write_pha(tmp_path / "d.pha", {"COUNTS": np.ones(2)}, EXPOSURE=0.0))
    with pytest.raises(InputError, match="neither COUNTS nor RATE"):
        read_spectrum(write_pha(tmp_path / "e.pha", {"FLUX": np.ones(2)}))
    with pytest.raises(InputError, match="BACKSCAL must be > 0, got 0"):
        read_spectrum(write_pha(tmp_path / "f.pha", {"COUNTS": np.ones(2)}, BACKSCAL=0.0))
    np.testing.assert_array_equal(check_counts("x", np.array([[1, 2], [0, 3]], np.int32)), [[1, 2], [0, 3]])


def test_groups_of_the_file_leave_bad_channels_out(tmp_path: Path) -> None:
    columns = {
        "COUNTS": np.array([5, 1, 2, 4, 8], np.int32),
        "QUALITY": np.array([0, 0, 2, 0, 0], np.int16),
        "GROUPING": np.array([1, 1, -1, -1, 0], np.int16),
    }
    spectrum = read_spectrum(write_pha(tmp_path / "a.pha", columns))
    rmf = read_rmf(write_rmf(tmp_path / "a.rmf", 1))
    binning = grouped(spectrum, rmf, 0.55, 2.0)
    assert binning.labels.tolist() == [-1, 0, -1, 0, 1]
    assert binning.sum(spectrum.counts).tolist() == [5, 8]
    with pytest.raises(InputError, match=r"a.pha: channels 1–5 \(5\), but the response .*b.rmf has 0–4"):
        grouped(spectrum, read_rmf(write_rmf(tmp_path / "b.rmf", 0)), 0.5, 2.0)
    with pytest.raises(InputError, match="no good channel in 8–9 keV"):
        grouped(spectrum, rmf, 8.0, 9.0)


def test_background_is_scaled_by_time_area_and_region(tmp_path: Path) -> None:
    counts = {"COUNTS": np.ones(3)}
    source = read_spectrum(write_pha(tmp_path / "s.pha", counts, BACKSCAL=2e-6, AREASCAL=0.5, BACKFILE="b.pha"))
    assert source.background == tmp_path / "b.pha"
    columns = counts | {"BACKSCAL": np.array([1e-5, 2e-5, 4e-5])}
    background = read_spectrum(write_pha(source.background, columns, EXPOSURE=300.0, BACKFILE="none"))
    np.testing.assert_allclose(background_ratio(source, background), [30.0, 60.0, 120.0], rtol=1e-6)
    short = read_spectrum(write_pha(tmp_path / "t.pha", {"COUNTS": np.ones(2)}))
    with pytest.raises(InputError, match=r"t.pha: channels 1–2 \(2\), but the source .*s.pha has 1–3"):
        background_ratio(source, short)


def test_profiled_background_is_a_maximum_and_w_is_zero_for_the_perfect_model() -> None:
    counts = torch.tensor([0.0, 3.0, 40.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    background = torch.tensor([4.0, 0.0, 300.0, 7.0, 0.0, 0.0], dtype=torch.float64)
    mean = torch.tensor([1.0, 1.0, 12.0, 1e-7, 2.0, 9.0], dtype=torch.float64)
    ratio = torch.full_like(mean, 7.4)
    b = profile_background(counts, background, ratio, mean)
    slope = counts / (mean + b) + torch.where(background > 0, background / b.clamp_min(1e-300), 0.0) - 1 - ratio
    torch.testing.assert_close(slope[b > 0], torch.zeros_like(slope[b > 0]), rtol=0, atol=1e-9)
    assert (slope[b == 0] < 0).all()
    perfect = w_statistic(mean + b, ratio * b, ratio, mean)
    assert abs(float(perfect)) < 1e-9
    known = cash(counts, mean + 2.0)
    long = torch.full_like(mean, 1e9)
    torch.testing.assert_close(w_statistic(counts, 2.0 * long, long, mean), known, rtol=1e-6, atol=1e-6)


def test_maximum_likelihood_of_an_amplitude_has_its_closed_form() -> None:
    counts, shape = torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    fit = maximum_likelihood(lambda a: cash(counts, a * shape), torch.tensor([0.4], dtype=torch.float64))
    assert float(fit.theta) == pytest.approx(13 / 6, rel=1e-9)
    assert float(fit.errors) == pytest.approx(13**0.5 / 6, rel=1e-9)
    with pytest.raises(DiffinvError, match="no convergence in 3 steps"):
        maximum_likelihood(lambda a: -a.sum(), torch.tensor([0.4], dtype=torch.float64), iterations=3)


def test_damaged_headers_are_one_line_with_the_name_of_the_file(tmp_path: Path) -> None:
    counts = {"COUNTS": np.ones(3)}
    with pytest.raises(InputError, match=r"a.pha: cannot be read as a spectrum \(.*'long'"):
        read_spectrum(write_pha(tmp_path / "a.pha", counts, EXPOSURE="long"))
    with pytest.raises(InputError, match=r"a.rmf: cannot be read as an RMF \("):
        read_rmf(write_rmf(tmp_path / "a.rmf", 1, TLMIN4="one"))
    with pytest.raises(InputError, match=r"a.arf: Grid: edges must be .*positive and increasing"):
        read_arf(write_arf(tmp_path / "a.arf", [1.0, 1.0, 1.0], np.array([0.5, 0.6, 0.55, 1.0])))


@pytest.mark.parametrize("name", ["9774", "3c273", "source"])
def test_real_responses_redistribute_each_photon_once(data_folder: Path, name: str) -> None:
    rmf, arf = (read(data_folder / "xray" / f"{name}.{kind}") for read, kind in ((read_rmf, "rmf"), (read_arf, "arf")))
    np.testing.assert_allclose(rmf.matrix.sum(1), 1, atol=2e-6)
    response = join(rmf, arf)
    np.testing.assert_allclose(response.matrix.sum(1), arf.area, rtol=3e-6)
    peak = (response.low + response.high)[response.matrix.argmax(1)] / 2
    near = (arf.grid.middle > 1) & (arf.grid.middle < 7)
    assert float((peak - arf.grid.middle)[near].abs().max()) < 0.1  # keV


def test_a_real_response_of_another_source_is_refused(data_folder: Path) -> None:
    folder = data_folder / "xray"
    with pytest.raises(InputError, match=r"9774.arf has 1078 bins of 0.22–11 keV, .*3c273.rmf 1090 bins"):
        join(read_rmf(folder / "3c273.rmf"), read_arf(folder / "9774.arf"))


FIRST, LAST = 0.5, 7.0


def fit_by_this_package(folder: Path) -> tuple[np.ndarray, np.ndarray, float]:
    source = read_spectrum(folder / "3c273.pi")
    background, rmf = read_spectrum(source.background), read_rmf(source.rmf)
    binning = Binning.window(rmf.low, rmf.high, FIRST, LAST)
    response = join(rmf, read_arf(source.arf), binning)
    absorption = read_absorption(folder / "xsect_tbabs_wilm.fits", response.grid, unit=1e-22)
    model = Folded(Product((PowerLaw(response.grid), absorption)), response, source.exposure)
    counts, others = (torch.from_numpy(binning.sum(s.counts)) for s in (source, background))
    ratio = torch.tensor(background_ratio(source, background)[0])

    def statistic(theta: torch.Tensor) -> torch.Tensor:
        return w_statistic(counts, others, ratio, torch.exp(theta[2]) * model(theta[None, :2])[0])

    fit = maximum_likelihood(statistic, torch.tensor([2.0, 0.05, -8.5], dtype=torch.float64))
    return fit.theta.numpy(), fit.errors.numpy(), fit.statistic


def fit_by_hand(folder: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """The same by other means: astropy's tables, a loop over the groups, a search for each background, Nelder–Mead."""
    with fits.open(folder / "3c273.rmf") as rmf, fits.open(folder / "3c273.arf") as arf:
        rows, bounds, area = rmf["MATRIX"].data, rmf["EBOUNDS"].data, arf[1].data["SPECRESP"].astype(float)
        matrix = np.zeros((len(rows), len(bounds)))
        for e, row in enumerate(rows):
            used = 0
            for first, n in zip(np.atleast_1d(row["F_CHAN"]), np.atleast_1d(row["N_CHAN"]), strict=True):
                matrix[e, first - 1 : first - 1 + n] = row["MATRIX"][used : used + n] * area[e]
                used += n
        low, high = rows["ENERG_LO"].astype(float), rows["ENERG_HI"].astype(float)
        chosen = np.flatnonzero((bounds["E_MAX"] > FIRST) & (bounds["E_MIN"] < LAST))
    with fits.open(folder / "3c273.pi") as s, fits.open(folder / "3c273_bg.pi") as b:
        counts, others = (h["SPECTRUM"].data["COUNTS"].astype(float)[chosen] for h in (s, b))
        head = [(h["SPECTRUM"].header["EXPOSURE"], h["SPECTRUM"].header["BACKSCAL"]) for h in (s, b)]
    with fits.open(folder / "xsect_tbabs_wilm.fits") as table:
        sigma = np.interp((low + high) / 2, table[1].data["ENERGY"], table[1].data["SIGMA"])
    ratio = head[1][0] * head[1][1] / (head[0][0] * head[0][1])

    def statistic(theta: np.ndarray) -> float:
        index, column, norm = theta[0], theta[1], np.exp(theta[2])
        photons = norm * (high ** (1 - index) - low ** (1 - index)) / (1 - index) * np.exp(-column * sigma)
        mean = head[0][0] * (photons @ matrix)[chosen]
        b = np.full_like(mean, 0.05)
        for _ in range(2000):  # expectation-maximisation of the background, another way than the quadratic
            b = (counts * b / (mean + b) + others) / (1 + ratio)
        rate = np.maximum(ratio * b, 1e-300)
        log_p = counts * np.log(mean + b) - mean - b + np.where(others > 0, others * np.log(rate), 0) - ratio * b
        best = [np.where(n > 0, n * np.log(np.maximum(n, 1)), 0) - n for n in (counts, others)]
        return -2 * float((log_p - best[0] - best[1]).sum())

    found = optimize.minimize(statistic, [1.8, 0.1, -8.4], method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-5})
    step = np.array([0.02, 0.01, 0.02])
    hessian = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            a, b = np.eye(3)[i] * step, np.eye(3)[j] * step
            ends = [statistic(found.x + s * a + t * b) * s * t for s in (1, -1) for t in (1, -1)]
            hessian[i, j] = sum(ends) / (8 * step[i] * step[j])
    return found.x, np.sqrt(np.diag(np.linalg.inv(hessian))), found.fun


def test_absorbed_power_law_of_3c273_is_that_of_an_independent_fit(data_folder: Path) -> None:
    theta, errors, statistic = fit_by_this_package(data_folder / "xray")
    other, other_errors, other_statistic = fit_by_hand(data_folder / "xray")
    assert np.abs((theta - other) / errors).max() < 0.02  # the two tables of σ differ by 0.1 % between their nodes
    np.testing.assert_allclose(errors, other_errors, rtol=0.02)
    assert statistic == pytest.approx(other_statistic, abs=0.02)
    assert 1.5 < theta[0] < 2.5
