"""The report shows what the products say, fetches nothing, and executes nothing that a catalogue says."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffinv.core.checks import InputError
from diffinv.data.grids import SkyGrid
from diffinv.data.products import Exposure, Product, Provenance, Quality, product_path, write_product
from diffinv.report.figures import BRIGHTNESS, Linear, Stretch, png, shared_stretch
from diffinv.report.html import render_page, write_report

KEY = "ab12" * 4


def product(name: str = "galaxy", *, calibration: str = "uncalibrated") -> Product:
    """16 × 16 pixels of 0.1″ from 8 × 8 data of 0.2″: the data have the same brightness as the mean, everywhere."""
    grid, native = SkyGrid.linear((16, 16), 0.1), SkyGrid.linear((8, 8), 0.2)
    coarse = np.arange(64, dtype=float).reshape(8, 8)
    mean = np.kron(coarse, np.ones((2, 2)))[None] / 4
    std = np.ones_like(mean)
    source = Provenance("0", "c" * 16, "tiny", "a" * 64, "Euler + X", calibration, 32, 5.0, 1, "b" * 64, 1.25, 0.2, KEY)
    return Product(
        object_id=name,
        bands=("i",),
        unit="nJy",
        grid=grid,
        mean=mean,
        std=std,
        quality=np.zeros(mean.shape, dtype=np.int32),
        provenance=source,
        quantiles={0.05: mean - 1, 0.95: mean + 1},
        samples=mean + np.arange(-16, 16).reshape(-1, 1, 1, 1) / 16,
        exposures=(Exposure("i", "camera", np.zeros((8, 8)), native, np.ones((3, 3)) / 9, 0.2, coarse.copy()),),
        catalog={"band": np.array(["i"]), "flux": np.array([12345.0])},
    )


class _Page(HTMLParser):
    """Tags with attributes, and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def images(page: str, title: str) -> list[np.ndarray]:
    """The pixels of every image with this alternative text, first row at the bottom."""
    found = [a["src"] for tag, a in _Page(page).tags if tag == "img" and a.get("alt") == title]
    return [decode(source) for source in found]


def decode(address: str) -> np.ndarray:
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[::-1]


def test_page_needs_no_network() -> None:
    page = render_page([product()])
    for tag, attributes in _Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert all(attributes.get(name) is None for name in ("href", "srcset", "data", "action"))
        assert (attributes.get("src") or "data:").startswith("data:")
        assert tag != "script" or "src" not in attributes
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "'><img src=x onerror=alert(1)>", "&lt;b&gt;", "\x00\x1b[2J", "\u202eevil"]
)
def test_text_from_catalogues_cannot_become_markup(hostile: str) -> None:
    base = product()
    exposure = replace(base.exposures[0], instrument=hostile)
    evil = replace(
        base, object_id=hostile, unit=hostile, notes=(hostile,), catalog={hostile: np.array([hostile])}, exposures=(exposure,)
    )
    evil = replace(evil, provenance=replace(base.provenance, prior=hostile, sampler=hostile))
    page, innocent = render_page([evil], [(hostile, hostile)]), render_page([base], [("x", "y")])
    count = lambda text: sum(tag in ("script", "img") for tag, _ in _Page(text).tags)
    assert count(page) == count(innocent)
    assert not any(name.startswith("on") for _, attributes in _Page(page).tags for name in attributes)
    assert not any(c in page for c in "\x00\x1b\u202e")


def test_uncalibrated_products_are_announced_loudly_and_calibrated_ones_are_not() -> None:
    assert "NOT CALIBRATED" in render_page([product()])
    assert "1 of 2 objects" in render_page([product(), product("b", calibration="calibrated")])
    assert "NOT CALIBRATED" not in render_page([product(calibration="calibrated")])


def test_data_mean_and_samples_share_one_stretch_in_brightness() -> None:
    page = render_page([product()])
    (data,), (mean,) = images(page, "data camera"), images(page, "posterior mean")
    assert np.array_equal(np.kron(data[..., 0], np.ones((2, 2))), mean[..., 0])
    assert len(np.unique(mean[..., 0])) > 30
    draws = images(page, "samples")
    assert len(draws) == 8
    assert not np.array_equal(draws[0], draws[7])


def test_a_pixel_without_value_is_grey_and_never_a_value() -> None:
    image = np.array([[0.0, np.nan], [np.inf, 1.0]])
    shown = decode(png(image, Linear(0, 1), BRIGHTNESS))
    assert shown[0, 0].tolist() == [0, 0, 0, 255]
    assert shown[1, 1].tolist() == [255, 255, 255, 255]
    assert shown[0, 1].tolist() == shown[1, 0].tolist() == [128, 128, 128, 255]


def test_stretch_is_monotone_and_its_ticks_are_its_inverse() -> None:
    stretch = Stretch(2.0, -3.0, 500.0)
    values = np.linspace(-3, 500, 200)
    assert (np.diff(stretch(values)) > 0).all()
    assert [float(stretch(np.array(v))) for v in (-99.0, -3.0, 500.0, 999.0)] == [0.0, 0.0, 1.0, 1.0]
    assert all(abs(float(stretch(np.array(stretch.value(f)))) - f) < 1e-12 for f in (0.0, 0.3, 1.0))


def test_stretch_of_an_empty_or_constant_object_is_still_a_stretch() -> None:
    for image in (np.full((4, 4), np.nan), np.zeros((4, 4)), np.full((4, 4), 5.0)):
        stretch = shared_stretch([image], [np.zeros((4, 4))])
        assert stretch.low < stretch.high and stretch.softening > 0


def test_coverage_of_the_truth_is_what_it_is() -> None:
    base = product()
    truth = base.mean.copy()
    truth[0, 15, :8] += 5  # eight of the source's pixels leave the interval of ± 1
    source = truth[0] > 0.05 * truth.max()
    expected = 1 - 8 / source.sum()
    assert f"at {expected:.0%} of the source's pixels" in render_page([replace(base, truth=truth)]).replace("&#x27;", "'")
    assert not images(render_page([base]), "truth")
    assert images(render_page([replace(base, truth=truth)]), "truth")


def test_flags_and_fit_are_shown_in_red() -> None:
    base = product()
    quality = np.full(base.quality.shape, int(Quality.SATURATED | Quality.CHI2_BAD), dtype=np.int32)
    page = render_page([replace(base, quality=quality)])
    assert "<span class='badge bad'>χ²/datum <b>1.250</b>" in page
    assert "saturated <b>100.0%" in page
    assert "<span class='badge '>χ²/datum <b>1.250</b>" in render_page([base])


def test_report_is_made_again_from_the_products_alone(tmp_path: Path) -> None:
    for name in ("second", "first"):
        write_product(product_path(tmp_path, name, KEY), product(name))
    first = write_report(tmp_path).read_bytes()
    (tmp_path / "report.html").unlink()
    assert write_report(tmp_path).read_bytes() == first
    text = _Page(first.decode()).text
    assert text.index("first") < text.index("second")
    assert "12345" in text


def test_damaged_and_quarantined_objects_are_listed(tmp_path: Path) -> None:
    write_product(product_path(tmp_path, "good", KEY), product("good"))
    bad = product_path(tmp_path, "bad", KEY)
    bad.write_bytes(b"<html>")
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "x.json").write_text('{"object_id": "x", "reason": "truncated <b>"}')
    (tmp_path / "quarantine" / "y.json").write_text("not json")
    text = write_report(tmp_path).read_text()
    assert "truncated &lt;b&gt;" in text
    assert bad.name in text
    assert "y.json" in text
    assert "1 objects · 3 quarantined" in text


def test_a_directory_without_products_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no products"):
        write_report(tmp_path)
