"""From the sections of components to models of spectra in a cube's channels, and emulators of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffinv import __version__
from diffinv.core.checks import ConfigError
from diffinv.data.cube_background import background_of
from diffinv.data.cube_input import CubeOptions, binning_of
from diffinv.data.cubes import Cube
from diffinv.data.ogip import read_spectrum
from diffinv.data.response_files import read_absorption, read_lines, read_rmf
from diffinv.data.table_models import read_table_model
from diffinv.sections import unmix as s
from diffinv.spectral.base import Grid, Parameter, SpectralModel
from diffinv.spectral.combine import Fixed, Product, UserModel
from diffinv.spectral.continuum import Bremsstrahlung, PowerLaw
from diffinv.spectral.lines import GaussianLines, Thermal
from diffinv.spectral.response import Folded, Response
from diffinv.spectral.table import TableModel
from diffinv.unmixing.boxed import Boxed
from diffinv.unmixing.emulator import Emulator, emulator_errors, train_emulator
from diffinv.unmixing.emulator_store import load_emulator, save_emulator

Say = Callable[[str], None]


def cube_options(section: s.CubeSection) -> CubeOptions:
    """How a cube's file is read."""
    own = set(s.CubeSection.model_fields) - {"exposure", "background", "background_spectrum"}
    return CubeOptions(**{name: value for name in own if (value := getattr(section, name)) is not None})


def background(section: s.CubeSection, cube: Cube, say: Say) -> torch.Tensor:
    """What is expected in a pixel beside the components, (1, K).

    Raises: ConfigError if a spectrum is given without the response whose channels it has; InputError if it cannot be used.
    """
    level = torch.full((1, len(cube.data)), section.background, dtype=torch.float64)
    if section.background_spectrum is None:
        return level
    if section.rmf is None:
        raise ConfigError("a spectrum is in the channels of a response; give cube.rmf, or cube.background as a number.")
    spectrum, rmf = read_spectrum(section.background_spectrum.path), read_rmf(section.rmf)
    binning, exposure = binning_of(cube, rmf, "the cube"), _seconds(cube.exposure, section.exposure)
    found = background_of(spectrum, rmf, binning, area=section.background_spectrum.area, exposure=exposure)
    say(f"background: {found.counts} counts in {found.groups} groups of channels, the error of which is not in the maps.")
    return level + torch.from_numpy(found.expected)


def component_model(section: s.ComponentSection, cube: Cube, response: Response | None, exposure: float | None) -> SpectralModel:
    """The component in the cube's channels, with its boxes and without the parameters that are held."""
    if isinstance(section.model, (s.EmulatorModel, s.FlatModel)) and section.absorption is not None:
        raise ConfigError(f"absorption does not act on kind: {section.model.kind}; leave it out.")
    if isinstance(section.model, s.EmulatorModel):
        return _boxed(section, _loaded(section, len(cube.data)))
    if isinstance(section.model, s.FlatModel):
        grid = cube.grid()
        return UserModel(grid, (), lambda theta: theta.new_ones(len(theta), len(grid)))
    grid = cube.grid() if response is None else response.grid
    source = _source(section.model, grid)
    if section.absorption is not None:
        source = Product((source, read_absorption(section.absorption.path, grid, unit=section.absorption.unit)))
    source = _boxed(section, source)
    if response is None:
        return source
    return Folded(source, response, _seconds(cube.exposure, exposure))


def _seconds(read: float | None, given: float | None) -> float:
    """The exposure, of the file if that says it."""
    if read is None and given is None:
        raise ConfigError("the cube has no exposure; give cube.exposure, in seconds.")
    if read is not None and given is not None and abs(read - given) > 1e-3 * read:
        raise ConfigError(f"cube.exposure is {given:g} s, but the file says {read:g} s; leave it out.")
    return given if read is None else read


def _loaded(section: s.ComponentSection, channels: int) -> Emulator:
    """A trained emulator, of as many channels as the cube has, in boxes within its own."""
    emulator = load_emulator(section.model.path)
    own = len(emulator.network.centre)
    if own != channels:
        raise ConfigError(f"{section.model.path}: an emulator of {own} channels, and the cube has {channels}; train one for it.")
    for parameter in emulator.parameters:
        low, high = section.box.get(parameter.name, (parameter.low, parameter.high))
        if low < parameter.low or high > parameter.high:
            raise ConfigError(
                f"box: {parameter.name} from {low:g} to {high:g}, but the emulator was trained from {parameter.low:g} to "
                f"{parameter.high:g}; stay within, or train another."
            )
    return emulator


def _boxed(section: s.ComponentSection, model: SpectralModel) -> SpectralModel:
    boxed = Boxed(model, tuple((name, *ends) for name, ends in section.box.items())) if section.box else model
    return Fixed(boxed, tuple(section.fixed.items())) if section.fixed else boxed


def _source(section: s.Section, grid: Grid) -> SpectralModel:
    if isinstance(section, s.ThermalModel):
        return Thermal(grid, read_lines(section.lines))
    if isinstance(section, s.LinesModel):
        strengths = section.strengths or (1.0,) * len(section.centres)
        if len(strengths) != len(section.centres):
            raise ConfigError(f"{len(section.centres)} centres but {len(strengths)} strengths; give one a line.")
        boxes = (Parameter("velocity", "km/s", *section.velocity), Parameter("width", "km/s", *section.width))
        return GaussianLines(grid, *(torch.tensor(v, dtype=torch.float64) for v in (section.centres, strengths)), *boxes)
    if isinstance(section, s.TableModel):
        box = None if section.redshift is None else Parameter("z", "", *section.redshift)
        return TableModel(grid, read_table_model(section.path, redshift=box))
    return {s.PowerLawModel: PowerLaw, s.BremsstrahlungModel: Bremsstrahlung}[type(section)](grid)


def is_emulated(model: SpectralModel) -> bool:
    """Whether a model is an emulator, also in another box or with parameters held: its amplitudes are then counts."""
    while isinstance(model, (Boxed, Fixed)):
        model = model.model
    return isinstance(model, Emulator)


def emulated(section: s.ComponentSection, model: SpectralModel, path: Path, command: str, say: Say) -> Emulator:
    """An emulator of the model, on disk at `path`, with its errors said. command: that trained it."""
    emulator = train_emulator(model, section.log)
    errors = emulator_errors(emulator, model, count=512, seed=1)
    head = ", ".join(f"{name} {values[0]:.2g}" for name, values in errors.head.items())
    say(f"{section.name}: emulator of rank {errors.rank}, χ² a count {errors.chi2[1]:.1e} (99 %), error by the head {head}.")
    save_emulator(path, emulator, f"{command}, version {__version__}")
    return emulator
