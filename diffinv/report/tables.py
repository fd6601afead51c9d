"""Benchmark tables: printed, and written as Markdown and JSON with what is needed to run them again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions(
    packages: Sequence[str] = ("diffinv", "torch", "numpy", "scipy", "astropy", "galsim", "diffusers"),
) -> dict[str, str]:
    """Installed versions of the packages that a figure may depend on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return str(value).replace("|", "\\|")


def markdown(rows: Sequence[dict]) -> str:
    """A GitHub table of rows that share their keys; a bar within a key or a text is escaped."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(map(_cell, keys)) + " |", "|" + "---|" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row[k]) for k in keys) + " |" for row in rows])


def write_table(path: Path, title: str, rows: Sequence[dict], *, seeds: Sequence[int], command: str, notes: str = "") -> None:
    """Print a table and write `path`.md and `path`.json with seeds, command, machine and versions."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    facts = {"command": command, "seeds": list(seeds), "machine": machine, "versions": versions()}
    text = f"# {title}\n\n{markdown(rows)}\n\n" + (f"{notes}\n\n" if notes else "")
    text += "\n".join(f"* {key}: {value}" for key, value in facts.items()) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(
        json.dumps({"title": title, "rows": list(rows), "notes": notes, **facts}, indent=1) + "\n"
    )
    print(text)
