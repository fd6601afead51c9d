"""A band that the prior does not have, as a mixture of those it has: from the configuration to the product and what reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffinv.cli import main
from diffinv.data.fits import Plane, encode_fits, read_fits
from diffinv.data.null_space import soft_gain
from diffinv.data.products import Product, Quality, read_product
from diffinv.engine.calibration import on_source
from tests.small import FAST, write_observation, write_prior


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("priors")
    return {
        "gi": write_prior(folder / "gi.safetensors", bands=("g", "i")),
        "grey": write_prior(folder / "grey.safetensors"),
    }


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


def products(out: Path) -> dict[str, Product]:
    found = [read_product(path) for path in sorted((out / "products").glob("*/*.fits"))]
    return {product.object_id: product for product in found}


def test_a_broad_band_is_a_mixture_of_the_priors_bands_as_the_configuration_says(tmp_path: Path, priors: dict[str, Path]) -> None:
    two = priors["gi"]
    source = write_observation(tmp_path / "a.fits", bands=("i", "VIS"))
    mixed, other = (("--set", f"input.mixing.VIS={w}") for w in ("{g: 0.3, i: 0.7}", "{i: 1.0}"))
    assert sample(source, tmp_path / "mixed", two, *mixed) == 0
    product = products(tmp_path / "mixed")["a"]
    assert product.bands == ("g", "i")
    assert [e.band for e in product.exposures] == ["i", "VIS"]
    assert not (product.quality & Quality.EXTRAPOLATED).any()
    assert [e.weights for e in product.exposures] == [(), (0.3, 0.7)]
    assert [len(product.exposures_of(b)) for b in (0, 1)] == [1, 2]
    assert "VIS = 0.3 g + 0.7 i" in product.notes
    assert "residual VIS" in (tmp_path / "mixed" / "report.html").read_text()
    for b in (0, 1):  # g is seen through VIS alone
        assert on_source(product, b).any()
        assert soft_gain(product, b) is not None
    # all of VIS from i: as two exposures in i, and nothing is seen of g
    assert sample(source, tmp_path / "other", two, *other) == 0
    planes = [Plane(p.name, p.data, {**p.header, "BAND": "i"}, p.extver) for p in read_fits(source).planes if p.data is not None]
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "a.fits").write_bytes(encode_fits([Plane("PRIMARY", None, {}), *planes]))
    assert sample(tmp_path / "twice" / "a.fits", tmp_path / "exposures", two) == 0
    alone, exposures = (products(tmp_path / name)["a"] for name in ("other", "exposures"))
    assert np.array_equal(alone.samples, exposures.samples)
    assert not np.array_equal(alone.samples, product.samples)
    assert (alone.quality[0] & Quality.EXTRAPOLATED).all()


def test_what_cannot_be_mixed_is_one_line(tmp_path: Path, priors: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    two, grey = priors["gi"], priors["grey"]
    source = write_observation(tmp_path / "a.fits", bands=("i", "VIS"))
    mixed = ("--set", "input.mixing.VIS={g: 0.3, i: 0.7}")
    for extra, expected in (
        ((), "band VIS: the prior tiny knows only g, i; name them with input.bands, or say with input.mixing"),
        (("--set", "input.mixing.VIS={r: 1}"), "input.mixing: VIS has a weight for r, but the prior tiny knows only g, i"),
        (("--set", "input.mixing.VIS={g: .nan}"), "--set input.mixing.VIS: expected a finite number, got nan"),
        (("--set", "input.mixing.VIS={g: 30, i: 70}"), "the weights of VIS are 30, 70; flux per frequency"),
        (("--set", "input.mixing.VIS={g: -1, i: 2}"), "the weights of VIS are -1, 2; flux per frequency"),
        (("--set", "input.mixing.i={g: 1}"), "i is a band of the prior tiny (g, i); leave it out"),
    ):
        capsys.readouterr()
        assert sample(source, tmp_path / "no", two, *extra) == 2
        assert expected in capsys.readouterr().err
    zero = [Plane(p.name, p.data, {**p.header, "ZEROPNT": 20.0 + p.extver}, p.extver) for p in read_fits(source).planes]
    (tmp_path / "a2.fits").write_bytes(encode_fits(zero))
    assert sample(tmp_path / "a2.fits", tmp_path / "no", two, *mixed) == 2
    assert "zero point mismatch: band i has 21.0 and VIS 22.0, but the prior knows colours" in capsys.readouterr().err
    counts = [
        Plane(p.name, p.data, {k: v for k, v in p.header.items() if k != "ZEROPNT"} | {"BUNIT": "adu"}, p.extver) for p in zero
    ]
    (tmp_path / "a3.fits").write_bytes(encode_fits(counts))
    assert sample(tmp_path / "a3.fits", tmp_path / "no", two, *mixed) == 2
    assert "the prior knows colours, but nothing says what flux one adu is" in capsys.readouterr().err
    assert sample(source, tmp_path / "grey", grey, *mixed) == 2
    assert "is grey and sees one band at a time" in capsys.readouterr().err
