"""How long a browser takes to open the report of many objects, on products that are written for it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffinv.data.grids import SkyGrid
from diffinv.data.products import Exposure, Product, Provenance, product_path, write_product

SIZE = 64
BROWSER = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1600")
CLOCK = """<script>addEventListener('load', () => {
  const text = document.createElement('pre'), times = performance.getEntriesByType('paint').map(entry => entry.startTime);
  text.id = 'times';
  text.textContent = JSON.stringify([...times, performance.now()]);
  document.body.replaceChildren(text);
});</script></body>"""


def mock_product(number: int) -> Product:
    """An ellipse of 64 × 64 pixels with noise, from data of half the sampling; without draws."""
    rng, shape = np.random.default_rng(number), (1, SIZE, SIZE)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    u, v = x * np.cos(number) + y * np.sin(number), y * np.cos(number) - x * np.sin(number)
    galaxy = rng.uniform(5, 50) * np.exp(-(u**2) / 50 - v**2 / 20)[None]
    mean, std = galaxy + 0.05 * rng.standard_normal(shape), 0.1 + 0.1 * galaxy + 0.05 * rng.random(shape)
    native, half = SkyGrid.linear((SIZE // 2, SIZE // 2), 0.2), (SIZE // 2, SIZE // 2)
    data = galaxy[0].reshape(half[0], 2, half[1], 2).sum((1, 3)) + rng.standard_normal(half)
    source = Provenance("0", "c" * 16, "mock", "a" * 64, "none", "uncalibrated", 32, 5.0, 1, "b" * 64, 1.0, 0.2, "")
    return Product(
        object_id=f"galaxy-{number:04d}",
        bands=("i",),
        unit="nJy",
        grid=SkyGrid.linear((SIZE, SIZE), 0.1),
        mean=mean,
        std=std,
        quality=np.zeros(shape, np.int32),
        provenance=replace(source, key=f"{number * 2654435761 % 2**32:08x}"),
        quantiles={0.05: mean - 1.6 * std, 0.95: mean + 1.6 * std},
        exposures=(Exposure("i", "mock", rng.standard_normal(half), native, np.ones((15, 15)) / 225, 0.2, data),),
    )


def write_products(out: Path, count: int) -> None:
    for number in range(count):
        made = mock_product(number)
        path = product_path(out, made.object_id, made.provenance.key)
        if not path.exists():
            write_product(path, made)


def opening(page: Path) -> tuple[float, float] | None:
    """Seconds to the first paint and to the end of loading; None if the browser has painted nothing by then."""
    timed = page.with_name("timed.html")
    timed.write_text(page.read_text(encoding="utf-8").replace("</body>", CLOCK), encoding="utf-8")
    shown = subprocess.run(
        [*BROWSER, "--timeout=60000", "--dump-dom", timed.as_uri()], capture_output=True, text=True, check=True
    )
    found = re.search(r'id="times">(.*?)</pre>', shown.stdout)
    times = json.loads(found[1]) if found else []
    return (times[0] / 1e3, times[-1] / 1e3) if len(times) > 1 else None
