"""The products of a run: those of the configuration that its `run.json` describes, wherever they lie.

Invariant: whoever lists the newest product of every object (report, status, merge, evaluation, calibration) lists the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from diffinv.core.checks import InputError
from diffinv.data.headers import Header
from diffinv.data.packs import Place, find_places
from diffinv.data.products import Quality


@dataclass(frozen=True)
class Found:
    """A whole product of the present configuration."""

    object_id: str
    place: Place
    headers: Sequence[Header]

    @property
    def doubtful(self) -> bool:
        """Whether the answer as a whole is in doubt: its χ² is too large, or a value is not finite."""
        bits = str(self.headers[0].cards.get("FLAGS", "")).split(",")
        return Quality.CHI2_BAD.name in bits or Quality.NODATA.name in bits


def find_products(out: Path, damaged: list[str]) -> Iterator[Found]:
    """The products of the configuration of `run.json`, oldest first; what is no whole product becomes a line of `damaged`."""
    config = _config_hash(out)
    for place in find_places(out, damaged):
        try:
            headers = place.headers()
            missing = {"SCI", "ERR", "DQ"} - {header.name for header in headers}
            if missing:
                raise InputError(f"{place}: not a diffinv product ({', '.join(sorted(missing))} missing).")
            cards = headers[0].cards
            if config in (None, cards["CFGHASH"]):
                yield Found(unquote(str(cards["OBJID"]), errors="surrogatepass"), place, headers)
        except InputError as error:
            damaged.append(str(error))
        except KeyError as error:
            damaged.append(f"{place}: not a diffinv product ({error} is missing).")


def _config_hash(out: Path) -> str | None:
    """Of the run that `run.json` describes; None if there is none."""
    try:
        return record_hash(json.loads((out / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def record_hash(record: Mapping[str, Any]) -> str:
    """The hash that names a run, of what its `run.json` holds."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
