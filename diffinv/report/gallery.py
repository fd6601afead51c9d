"""The objects of a report beyond those that are shown whole: two small pictures and a line each.

Only the planes that are drawn are read, so that a thousand objects take seconds. A picture is a string that the browser does not
look at until its tile comes near the window, or is printed, so that a page of thousands opens at once.
Invariant: a product that is damaged where it is read becomes a line of text, never a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from diffinv.core.checks import InputError
from diffinv.data.headers import Header, read_plane
from diffinv.data.packs import Place
from diffinv.report.figures import BRIGHTNESS, SPREAD, png, shared_stretch, spread_scale

CSS = """
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .7rem; }
.tile { content-visibility: auto; contain-intrinsic-size: auto 190px 130px; font-size: .75rem; overflow-wrap: anywhere; }
.tile img { width: 49%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #808080; }
.tile img + img { margin-left: 2%; }
.card { content-visibility: auto; contain-intrinsic-size: auto 420px; }
"""

SCRIPT = """
const draw = tile => tile.querySelectorAll('img[data-src]').forEach(image => {
  image.src = image.dataset.src;
  image.removeAttribute('data-src');
});
const near = new IntersectionObserver(seen => seen.forEach(one => {
  if (one.isIntersecting) { draw(one.target); near.unobserve(one.target); }
}), { rootMargin: '600px' });
document.querySelectorAll('.tile').forEach(tile => near.observe(tile));
addEventListener('beforeprint', () => document.querySelectorAll('.tile').forEach(draw));
"""


def render_gallery(places: Sequence[Place], escape: Callable[[object], str]) -> tuple[str, list[tuple[str, str]]]:
    """Tiles of products: mean and standard deviation of the first band, name, χ² a datum.

    Arguments: escape: text → HTML.
    Returns: the HTML, empty without products; and (file, reason) of those that could not be read.
    """
    tiles, broken = [], []
    for place in places:
        try:
            tiles.append(_tile(place, escape))
        except InputError as error:
            broken.append((place.name, str(error)))
    if not tiles:
        return "", broken
    return f"<h2>More objects: mean and standard deviation</h2><div class='gallery'>{''.join(tiles)}</div>", broken


def _tile(place: Place, escape: Callable[[object], str]) -> str:
    headers = place.headers()
    mean, std = (_first_band(place.path, headers, name) for name in ("SCI", "ERR"))
    name, chi2 = (headers[0].cards.get(key) for key in ("OBJID", "CHI2"))
    text = unquote(str(name), errors="replace") + (f" · χ² {chi2:.3f}" if isinstance(chi2, float) else "")
    stretch, spreads = shared_stretch([mean], [std]), spread_scale([std])
    pictures = (png(mean, stretch, BRIGHTNESS), "mean"), (png(std, spreads, SPREAD), "std")
    images = "".join(f"<img data-src='{address}' alt='{title}'>" for address, title in pictures)
    return f"<div class='tile'>{images}<br>{escape(text)}</div>"


def _first_band(path: Path, headers: Sequence[Header], name: str) -> np.ndarray:
    found = next((header for header in headers if header.name == name), None)
    if found is None:
        raise InputError(f"{path}: not a diffinv product ({name} is missing).")
    plane = read_plane(path, found)
    return plane.reshape(-1, *plane.shape[-2:])[0]
