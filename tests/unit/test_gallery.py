"""Tiles of a report show what is in the products, their pictures wait until they are near, and damage is a line of text."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffinv.data.packs import Place, name_of
from diffinv.data.products import Product, product_path, write_product
from diffinv.report import html
from diffinv.report.figures import BRIGHTNESS, SPREAD, colour, encode_png, shared_stretch, spread_scale
from diffinv.report.gallery import render_gallery
from diffinv.report.html import escape, write_report
from tests.unit.test_report import product


def write(out: Path, made: Product) -> Place:
    path = product_path(out, made.object_id, made.provenance.key)
    write_product(path, made)
    return Place(path, name_of(path))


def pictures(page: str) -> list[np.ndarray]:
    """The pixels of the tiles, first row at the bottom."""
    found = re.findall(r"<img data-src='data:image/png;base64,([^']*)'", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA"))[::-1] for text in found]


def test_a_tile_shows_mean_and_std_of_the_first_band_with_the_stretch_of_the_cards(tmp_path: Path) -> None:
    base = product()
    cubes = {"mean": base.mean, "std": 1 + base.mean, "quality": base.quality}
    two = {name: np.concatenate([cube, 7 * cube]) for name, cube in cubes.items()}
    path = write(tmp_path, replace(base, bands=("i", "z"), quantiles={}, samples=None, exposures=(), catalog={}, **two))
    page, broken = render_gallery([path], escape)
    mean, std = pictures(page)
    stretch, spreads = shared_stretch([base.mean[0]], [1 + base.mean[0]]), spread_scale([1 + base.mean[0]])
    assert np.array_equal(mean, colour(base.mean[0], stretch, BRIGHTNESS)[::-1])
    assert np.array_equal(std, colour(1 + base.mean[0], spreads, SPREAD)[::-1])
    assert "galaxy · χ² 1.250" in page and not broken


def test_no_picture_is_looked_at_before_it_is_near(tmp_path: Path) -> None:
    page, _ = render_gallery([write(tmp_path, product(name)) for name in "ab"], escape)
    assert page.count("<img ") == page.count("<img data-src='data:") == 4


def test_a_product_without_chi2_has_none_and_a_pixel_without_value_is_grey(tmp_path: Path) -> None:
    base = product()
    mean = base.mean.copy()
    mean[0, 3, 4] = np.nan
    made = replace(base, mean=mean, provenance=replace(base.provenance, chi2=float("nan")))
    page, _ = render_gallery([write(tmp_path, made)], escape)
    assert "χ²" not in page
    assert pictures(page)[0][3, 4].tolist() == [128, 128, 128, 255]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "'><img src=x onerror=alert(1)>", "a\nb\x1b", "naïve\u202e"])
def test_names_cannot_become_markup(tmp_path: Path, name: str) -> None:
    page, _ = render_gallery([write(tmp_path, product(name))], escape)
    assert page.count("<img ") == 2 and "<script" not in page
    assert escape(name) in page
    assert not any(c in page for c in "\n\x1b\u202e")


def test_a_damaged_product_is_a_line_and_its_neighbours_are_shown(tmp_path: Path) -> None:
    good, flipped, cut = (write(tmp_path, product(name)) for name in ("good", "flipped", "cut"))
    payload = bytearray(flipped.path.read_bytes())
    payload[payload.index(b"EXTNAME = 'SCI") // 2880 * 2880 + 2880 + 8] ^= 1
    flipped.path.write_bytes(payload)
    cut.path.write_bytes(cut.path.read_bytes()[:-2880])
    other = Place(tmp_path / "other.fits", "other.fits")
    other.path.write_bytes(b"<html>")
    page, broken = render_gallery([flipped, good, cut, other], escape)
    assert page.count("class='tile'") == 1 and "good" in page
    assert [name for name, _ in broken] == [flipped.name, cut.name, other.name]
    assert "checksum" in broken[0][1]


def test_without_products_there_is_no_gallery(tmp_path: Path) -> None:
    assert render_gallery([], escape) == ("", [])
    assert render_gallery([Place(tmp_path / "none.fits", "none.fits")], escape)[0] == ""


def test_a_report_shows_some_whole_some_small_and_says_how_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "MOST_WHOLE", 2)
    monkeypatch.setattr(html, "MOST_SMALL", 3)
    for number in range(7):
        write(tmp_path, product(f"object-{number}"))
    page = write_report(tmp_path).read_text()
    assert "7 objects, 2 of them whole" in page
    assert page.count("class='card'") == 2 and page.count("class='tile'") == 3
    assert "IntersectionObserver" in page and "beforeprint" in page
    assert len(set(re.findall(r"object-\d", page))) == 5


def test_a_report_of_few_objects_has_neither_tiles_nor_their_script(tmp_path: Path) -> None:
    write(tmp_path, product())
    page = write_report(tmp_path).read_text()
    assert "class='tile'" not in page and "IntersectionObserver" not in page


@pytest.mark.parametrize("colours", [1, 2, 256, 257, 5000])
def test_a_picture_has_the_pixels_it_was_made_of_whatever_its_number_of_colours(colours: int) -> None:
    index = np.random.default_rng(0).permutation(np.arange(80 * 70) % colours).reshape(80, 70)
    pixels = np.stack([index % 251, index // 7 % 256, index % 256, np.full_like(index, 255)], -1).astype(np.uint8)
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) == colours
    payload = encode_png(pixels)
    image = Image.open(io.BytesIO(payload))
    assert image.mode == ("P" if colours <= 256 else "RGB")
    assert np.array_equal(np.asarray(image.convert("RGBA")), pixels)
    assert payload == encode_png(pixels.copy())
