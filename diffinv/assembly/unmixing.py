"""From the sections of `diffinv unmix` to the maps on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffinv import __version__
from diffinv.config import Loaded
from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.data.atomic import write_atomically
from diffinv.data.cube_data import pixels_of
from diffinv.data.cube_input import CubeOptions, open_cube
from diffinv.data.cubes import Cube
from diffinv.data.parameter_maps import AmplitudeImages, ParameterImages, encode_parameter_maps
from diffinv.data.response_files import read_absorption, read_lines
from diffinv.data.table_models import read_table_model
from diffinv.report.maps import write_maps_report
from diffinv.sections import unmix as s
from diffinv.spectral.base import Grid, Parameter, SpectralModel
from diffinv.spectral.combine import Fixed, Product, UserModel
from diffinv.spectral.continuum import Bremsstrahlung, PowerLaw
from diffinv.spectral.lines import GaussianLines, Thermal
from diffinv.spectral.response import Folded, Response
from diffinv.unmixing.boxed import Boxed
from diffinv.unmixing.corners import Corner, corner
from diffinv.unmixing.emulator import Emulator, emulator_errors, train_emulator
from diffinv.unmixing.emulator_store import load_emulator, save_emulator
from diffinv.unmixing.maps import MapPlan
from diffinv.unmixing.mixture import Component, Mixture, SpectralData
from diffinv.unmixing.pipeline import Unmixed, UnmixingPlan, unmix
from diffinv.unmixing.pixels import NODATA, PixelPlan
from diffinv.unmixing.posterior_maps import physical_moments, physical_quantile
from diffinv.unmixing.shares import unmix_shares

Say = Callable[[str], None]
QUANTILES = {"Q05": 0.05, "Q95": 0.95}


def unmix_file(loaded: Loaded[s.UnmixConfig], path: Path, out: Path, say: Say) -> Path:
    """Read, fit and write: the path of the product, OUT/NAME-maps.fits.

    Raises: ConfigError or InputError, in one line, for what does not fit together.
    """
    config = loaded.config
    cube, response = open_cube(path, _options(config.cube))
    data = pixels_of(cube, torch.full((1, len(cube.data)), config.cube.background, dtype=torch.float64))
    mixture = _mixture(loaded, cube, response, out, say)
    start = time.process_time()
    maps = config.maps
    plan = UnmixingPlan(
        PixelPlan(maps.starts), MapPlan(scales=maps.scales, kappas=maps.kappas), rounds=maps.rounds, seed=maps.seed
    )
    found = (unmix_shares if _shared(loaded, mixture) else unmix)(mixture, data, cube.data.shape[1:], plan)
    height, width = cube.data.shape[1:]
    say(f"{height} × {width} pixels, κ = {found.smooth.kappa:g}, {time.process_time() - start:.0f} CPU s.")
    product = out / f"{path.name.split('.')[0]}-maps.fits"
    write_atomically(product, _encode(config, cube, data, mixture, found))
    page = write_maps_report(product, _corners(config.maps.pixels, data, mixture, found, (height, width)))
    say(f"report: {page}")
    return product


def _shared(loaded: Loaded[s.UnmixConfig], mixture: Mixture) -> bool:
    """Whether ratios of amplitudes have maps: they are ratios of counts only where every component is normalised."""
    wanted = loaded.config.maps.shares
    fit = len(mixture.components) > 1 and all(isinstance(c.model, Emulator) for c in mixture.components)
    if wanted and not fit:
        raise ConfigError(f"{loaded.where('maps.shares')}: needs two components or more, all of them with emulate: true.")
    return fit if wanted is None else wanted


def _corners(
    wanted: tuple[tuple[int, int], ...], data: SpectralData, mixture: Mixture, found: Unmixed, shape: tuple[int, int]
) -> list[tuple[str, Corner]]:
    """Corner plots of the pixels asked for, (x, y) from 1, or of the brightest, the median and the worst fitted.

    Raises: ConfigError if a pixel lies outside of the map.
    """
    outside = [f"({x}, {y})" for x, y in wanted if not (1 <= x <= shape[1] and 1 <= y <= shape[0])]
    if outside:
        raise ConfigError(f"maps.pixels: {', '.join(outside)} outside of {shape[1]} × {shape[0]} pixels; (x, y) count from 1.")
    chosen = [("", (y - 1) * shape[1] + x - 1) for x, y in wanted]
    seen = data.good.any(1).nonzero()[:, 0]
    if not chosen and len(seen) and mixture.names:
        order = seen[torch.where(data.good, data.y, 0.0).sum(1)[seen].argsort()]
        worst = seen[found.misfit[seen].abs().argmax()]
        chosen = [("brightest, ", int(order[-1])), ("of median brightness, ", int(order[len(order) // 2]))]
        chosen.append(("worst fit, ", int(worst)))
    title = lambda k: f"({k % shape[1] + 1}, {k // shape[1] + 1})"
    post = found.posterior
    return [(f"{what}pixel {title(k)}", corner(mixture.coordinates, post.u[k], post.covariance[k])) for what, k in chosen]


def _options(section: s.CubeSection) -> CubeOptions:
    return CubeOptions(
        **{name: getattr(section, name) for name in type(section).model_fields if name not in ("exposure", "background")}
    )


def _mixture(loaded: Loaded[s.UnmixConfig], cube: Cube, response: Response | None, out: Path, say: Say) -> Mixture:
    components = []
    for number, section in enumerate(loaded.config.components):
        where = loaded.where(f"components.{number}")
        try:
            model = _model(section, cube, response, loaded.config.cube.exposure)
            if section.emulate:
                model = _emulated(section, model, out, say)
            components.append(Component(section.name, model, section.log))
            _ = components[-1].coordinates
        except DiffinvError as error:
            raise ConfigError(f"{where}: {error}") from error
    try:
        return Mixture(tuple(components), loaded.config.links)
    except DiffinvError as error:
        raise ConfigError(f"{loaded.where('links')}: {error}") from error


def _model(section: s.ComponentSection, cube: Cube, response: Response | None, exposure: float | None) -> SpectralModel:
    """The component in the cube's channels, with its boxes and without the parameters that are held."""
    if isinstance(section.model, s.EmulatorModel):
        return _boxed(section, load_emulator(section.model.path))
    grid = cube.grid() if response is None else response.grid
    source = _source(section.model, grid)
    if section.absorption is not None:
        source = Product((source, read_absorption(section.absorption.path, grid, unit=section.absorption.unit)))
    source = _boxed(section, source)
    if response is None:
        return source
    seconds = exposure or cube.exposure
    if seconds is None:
        raise ConfigError("the cube has no exposure; give cube.exposure, in seconds.")
    return Folded(source, response, seconds)


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
        return read_table_model(section.path, redshift=box)
    if isinstance(section, s.FlatModel):
        return UserModel(grid, (), lambda theta: theta.new_ones(len(theta), len(grid)))
    return {s.PowerLawModel: PowerLaw, s.BremsstrahlungModel: Bremsstrahlung}[type(section)](grid)


def _emulated(section: s.ComponentSection, model: SpectralModel, out: Path, say: Say) -> Emulator:
    """An emulator of the model, beside the product, with its errors said."""
    emulator = train_emulator(model, section.log)
    errors = emulator_errors(emulator, model, count=512, seed=1)
    head = ", ".join(f"{name} {values[0]:.2g}" for name, values in errors.head.items())
    say(f"{section.name}: emulator of rank {errors.rank}, χ² a count {errors.chi2[1]:.1e} (99 %), error by the head {head}.")
    save_emulator(out / f"{section.name}.safetensors", emulator, f"diffinv unmix, version {__version__}")
    return emulator


def _encode(config: s.UnmixConfig, cube: Cube, data: SpectralData, mixture: Mixture, found: Unmixed) -> bytes:
    post, axes = found.posterior, mixture.coordinates
    shape = cube.data.shape[1:]
    image = lambda values: values.reshape(shape).numpy()
    mean, std = physical_moments(axes, post.u, post.std)
    planes = {"MEAN": mean, "STD": std} | {n: physical_quantile(axes, post.u, post.std, q) for n, q in QUANTILES.items()}
    parameters = []
    for component, columns in zip(mixture.components, mixture.columns, strict=True):
        for parameter, column in zip(component.model.parameters, columns, strict=True):
            images = {name: image(values[:, column]) for name, values in planes.items()}
            parameters.append(ParameterImages(component.name, parameter.name, parameter.unit, images))
    empty = (found.flags & NODATA) > 0
    known = lambda values: image(torch.where(empty, torch.nan, values))
    amplitudes = []
    for k, component in enumerate(mixture.components):
        unit = "counts" if isinstance(component.model, Emulator) else ""
        amplitudes.append(AmplitudeImages(component.name, unit, known(post.amplitude[:, k]), known(post.amplitude_std[:, k])))
    checks = {"FLAG": image(found.flags), "CHI2Z": known(found.misfit)}
    checks |= _cubes(mixture, data, found, cube.data.shape)
    kept = {"DIVERS": __version__, "KAPPA": found.smooth.kappa, "SEED": config.maps.seed, "CALIBR": "calibrated"}
    return encode_parameter_maps(cube, parameters, amplitudes, checks, kept, (config.model_dump_json(),))


def _cubes(mixture: Mixture, data: SpectralData, found: Unmixed, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The fitted cube and the whitened residuals, NaN where the data are bad."""
    post = found.posterior
    whole: list[Tensor] = []
    white: list[Tensor] = []
    for rows in torch.arange(len(post.u)).split(8192):
        part = data.select(rows)
        mean = mixture.mean(post.amplitude[rows].clamp_min(0), post.inside[rows], part.background)
        residual = (part.y - mean) * part.noise.precision(mean).d.sqrt()
        whole.append(mean)
        white.append(torch.where(part.good, residual, torch.nan))
    cube = lambda parts: torch.cat(parts).T.reshape(shape).numpy()
    return {"FIT": cube(whole), "RESID": cube(white)}
