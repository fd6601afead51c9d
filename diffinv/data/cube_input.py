"""One door for cubes: event lists, FITS cubes and arrays, with the response that their channels belong to.

Invariant: a cube and its response have the same channels, or the pair is refused with both named.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.band_noise import with_noise
from diffinv.data.cube_channels import cut, with_scatter
from diffinv.data.cubes import Cube, read_array_cube, read_cube
from diffinv.data.events import Window, bin_events, covering, read_events
from diffinv.data.fits import MAX_PIXELS, FitsFile, read_fits
from diffinv.data.response_files import Rmf, join, read_arf, read_rmf
from diffinv.spectral.response import Binning, Response

_ARRAYS = (".mat", ".npz")


@dataclass(frozen=True)
class CubeOptions:
    """What a file does not say itself.

    rmf, arf: response of X-ray data (no ARF where the RMF has the area), else None. energies: keV, the range of X-ray data.
    channels_a_bin: detector channels that become one of the cube. pixel: sky pixels of an event list a pixel of the image.
    region: of an event list: sky X and Y of the image's lower left corner, its height and width in pixels; None takes all.
    array: name of the array in a .mat or .npz file, None for the only one. line_free: ranges whose scatter replaces the
    variance, or none; window: the channels to use, of a cube without response, None for all; both in the unit of its axis.
    noise_std: σ of every value, or "estimate", of a cube whose file has no variance.
    max_pixels: limit on what is read, in values of images and bytes of tables.
    """

    rmf: Path | None = None
    arf: Path | None = None
    energies: tuple[float, float] | None = None
    channels_a_bin: int = 1
    pixel: float | None = None
    region: tuple[float, float, int, int] | None = None
    array: str | None = None
    line_free: tuple[tuple[float, float], ...] = ()
    window: tuple[float, float] | None = None
    noise_std: float | str | None = None
    max_pixels: int = MAX_PIXELS


_OF = {
    "an array": {"array", "window", "noise_std"},
    "an event list": {"rmf", "arf", "energies", "channels_a_bin", "pixel", "region"},
    "a FITS cube": {"rmf", "arf", "energies", "line_free", "window", "noise_std"},
}


def _check(path: Path, kind: str, options: CubeOptions) -> None:
    """Raises: InputError for an option that says nothing about this kind of input."""
    chosen = {f.name for f in fields(options) if getattr(options, f.name) != f.default} - {"max_pixels"}
    idle = sorted(chosen - _OF[kind])
    if idle:
        raise InputError(f"{path}: {', '.join(idle)} would not be used for {kind}; leave out what is not of {kind}.")
    if options.arf is not None and options.rmf is None:
        raise InputError(f"{path}: an ARF needs an RMF; give rmf, or leave arf out.")


def open_cube(path: str | Path, options: CubeOptions) -> tuple[Cube, Response | None]:
    """A cube, and the response in its channels where one is given.

    Raises: InputError if the file cannot be read, an event list comes without response, energies or pixel size, or the cube's
        channels are not made of the response's, channels of it are asked for that it does not have, or an option is not of
        this kind of file.
    """
    path = Path(path)
    if path.suffix in _ARRAYS:
        _check(path, "an array", options)
        return _chosen(read_array_cube(path, options.array), path, None, options), None
    file = read_fits(path, max_pixels=options.max_pixels)
    of_events = any(table.name == "EVENTS" for table in file.tables)
    _check(path, "an event list" if of_events else "a FITS cube", options)
    rmf = None if options.rmf is None else read_rmf(options.rmf)
    if of_events:
        cube, binning = _from_events(path, file, rmf, options)
    else:
        cube = _chosen(read_cube(path, file), path, rmf, options)
        binning = None if rmf is None else binning_of(cube, rmf, str(path))
    return cube, None if rmf is None else join(rmf, None if options.arf is None else read_arf(options.arf), binning)


def _chosen(cube: Cube, path: Path, rmf: Rmf | None, options: CubeOptions) -> Cube:
    if rmf is not None and (options.line_free or options.window):
        raise InputError(f"{path}: window and line_free are of cubes without a response; bin the events in another range.")
    if options.line_free and options.noise_std is not None:
        raise InputError(f"{path}: line_free and noise_std both say what the noise is; give one.")
    if options.energies and cube.unit != "keV":
        raise InputError(f"{path}: energies are of X-ray data, and its axis is in {cube.unit}; give window.")
    try:
        measured = with_scatter(cube, options.line_free) if options.line_free else cube
        if options.noise_std is not None:
            measured = with_noise(measured, options.noise_std)
        wanted = options.window or options.energies
        return cut(measured, wanted) if wanted else measured
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def binning_of(cube: Cube, rmf: Rmf, owner: str) -> Binning:
    """Which channels of the response make up each channel of the cube.

    Raises: InputError unless every channel of the cube begins and ends where channels of the response do.
    """
    middle = 0.5 * (rmf.low + rmf.high)
    place = np.searchsorted(cube.low, middle, side="right") - 1
    labels = np.where((place >= 0) & (middle < cube.high[place.clip(0)]), place, -1)
    wide = rmf.high - rmf.low
    text = f"{owner}: {len(cube.low)} channels of {cube.low[0]:.6g}–{cube.high[-1]:.6g} {cube.unit}"
    theirs = f"{rmf.path} with {len(middle)} of {rmf.low.min():.6g}–{rmf.high.max():.6g} keV"
    refusal = InputError(f"{text} are not made of the channels of {theirs}; bin the events with this response.")
    try:
        binning = Binning(labels)
    except DiffinvError as error:
        raise refusal from error
    if cube.unit != "keV" or len(binning) != len(cube.low):
        raise refusal
    for own, nominal in zip((cube.low, cube.high), binning.bounds(rmf.low, rmf.high), strict=True):
        if (np.abs(own - nominal) > 0.05 * wide.max()).any():
            raise refusal
    return binning


def _from_events(path: Path, file: FitsFile, rmf: Rmf | None, options: CubeOptions) -> tuple[Cube, Binning]:
    missing = [n for n, v in (("rmf", rmf), ("energies", options.energies), ("pixel", options.pixel)) if v is None]
    if missing:
        raise InputError(f"{path}: an event list needs {', '.join(missing)}; give them to make a cube of it.")
    try:
        binning = Binning.window(rmf.low, rmf.high, *options.energies, options.channels_a_bin)
    except DiffinvError as error:
        raise InputError(f"{path}: {error}") from error
    events = read_events(path, file)
    x0, y0, *size = options.region or (0, 0, 0, 0)
    window = Window(x0, y0, options.pixel, tuple(size)) if options.region else covering(events, options.pixel)
    return bin_events(events, rmf, binning, window), binning
