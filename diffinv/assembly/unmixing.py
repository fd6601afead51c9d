"""From the sections of `diffinv unmix` to the maps on disk."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffinv import __version__
from diffinv.assembly.components import Say, background, component_model, cube_options, emulated, is_emulated
from diffinv.config import Loaded
from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.cube_data import pixels_of
from diffinv.data.cube_input import open_cube
from diffinv.data.cubes import Cube
from diffinv.data.parameter_maps import AmplitudeImages, ParameterImages, encode_parameter_maps
from diffinv.noise.poisson import Poisson
from diffinv.report.maps import write_maps_report
from diffinv.sections import unmix as s
from diffinv.spectral.response import Response
from diffinv.unmixing.corners import Corner, corner
from diffinv.unmixing.maps import MapPlan
from diffinv.unmixing.mixture import Component, Mixture, SpectralData
from diffinv.unmixing.pipeline import Unmixed, UnmixingPlan, unmix
from diffinv.unmixing.pixels import NODATA, PixelPlan
from diffinv.unmixing.posterior_maps import physical_moments, physical_quantile
from diffinv.unmixing.shares import unmix_shares

QUANTILES = {"Q05": 0.05, "Q95": 0.95}
_SUFFIXES = (".fits", ".fit", ".fts", ".gz", ".mat", ".npz")


def unmix_file(loaded: Loaded[s.UnmixConfig], path: Path, out: Path, say: Say) -> Path:
    """Read, fit and write: the path of the product, OUT/NAME-maps.fits.

    Raises: ConfigError or InputError, in one line, for what does not fit together; DiffinvError if the fit breaks down.
    """
    config, name = loaded.config, _stem(path)
    cube, response = open_cube(path, cube_options(config.cube))
    _check_pixels(loaded, cube.data.shape[1:])
    try:
        known = background(config.cube, cube, say)
    except ConfigError as error:
        raise ConfigError(f"{loaded.where('cube.background_spectrum')}: {error}") from error
    try:
        data = pixels_of(cube, known)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    mixture = _mixture(loaded, cube, response, out / name, say)
    start = time.process_time()
    maps = config.maps
    plan = UnmixingPlan(
        PixelPlan(maps.starts), MapPlan(scales=maps.scales, kappas=maps.kappas), rounds=maps.rounds, seed=maps.seed
    )
    try:
        found = (unmix_shares if _shared(loaded, mixture) else unmix)(mixture, data, cube.data.shape[1:], plan)
    except torch.linalg.LinAlgError as error:
        raise DiffinvError(f"{path}: the fit broke down ({error}); narrow the boxes, fix a parameter, or emulate.") from error
    height, width = cube.data.shape[1:]
    empty = int(cube.empty.sum())
    say(f"{height} × {width} pixels, {empty} of them empty, κ = {found.smooth.kappa:g}, {time.process_time() - start:.0f} CPU s.")
    product = out / f"{name}-maps.fits"
    write_atomically(product, _encode(config, cube, data, mixture, found, folded=response is not None))
    page = write_maps_report(product, _corners(config.maps.pixels, data, mixture, found, (height, width)))
    say(f"report: {page}")
    return product


def _stem(path: Path) -> str:
    """A file's name without what says its format: `a.b.fits.gz` → `a.b`."""
    name = path.name
    while Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    return name


def _check_pixels(loaded: Loaded[s.UnmixConfig], shape: tuple[int, int]) -> None:
    """Raises: ConfigError if a pixel that the report is to show lies outside of the map."""
    outside = [f"({x}, {y})" for x, y in loaded.config.maps.pixels if not (1 <= x <= shape[1] and 1 <= y <= shape[0])]
    if outside:
        raise ConfigError(
            f"{loaded.where('maps.pixels')}: {', '.join(outside)} outside of {shape[1]} × {shape[0]} pixels; (x, y) count from 1."
        )


def _shared(loaded: Loaded[s.UnmixConfig], mixture: Mixture) -> bool:
    """Whether ratios of amplitudes have maps: they are ratios of counts only where every component is normalised."""
    wanted = loaded.config.maps.shares
    fit = len(mixture.components) > 1 and all(is_emulated(c.model) for c in mixture.components)
    if wanted and not fit:
        raise ConfigError(f"{loaded.where('maps.shares')}: needs two components or more, all of them with emulate: true.")
    return fit if wanted is None else wanted


def _corners(
    wanted: tuple[tuple[int, int], ...], data: SpectralData, mixture: Mixture, found: Unmixed, shape: tuple[int, int]
) -> list[tuple[str, Corner]]:
    """Corner plots of the pixels asked for, (x, y) from 1, or of the brightest, the median and the worst fitted."""
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


def _mixture(loaded: Loaded[s.UnmixConfig], cube: Cube, response: Response | None, stem: Path, say: Say) -> Mixture:
    """The components. stem: of the files of emulators, OUT/NAME."""
    components = []
    for number, section in enumerate(loaded.config.components):
        where = loaded.where(f"components.{number}")
        try:
            model = component_model(section, cube, response, loaded.config.cube.exposure)
            if section.emulate:
                own = stem.with_name(f"{stem.name}-{section.name}.safetensors")
                model = emulated(section, model, own, "diffinv unmix", say)
            components.append(Component(section.name, model, section.log))
            _ = components[-1].coordinates
        except DiffinvError as error:
            raise ConfigError(f"{where}: {error}") from error
    try:
        mixture = Mixture(tuple(components), loaded.config.links)
    except DiffinvError as error:
        raise ConfigError(f"{loaded.where('links')}: {error}") from error
    if not mixture.names:
        raise ConfigError(f"{loaded.where('components')}: no component has a free parameter; free one, or add one.")
    return mixture


def _encode(config: s.UnmixConfig, cube: Cube, data: SpectralData, mixture: Mixture, found: Unmixed, *, folded: bool) -> bytes:
    """The product. folded: whether models are in photons of a source, so that amplitudes have not the cube's unit."""
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
        of_cube = is_emulated(component.model) or not folded
        unit = (cube.bunit or "counts" if cube.variance is None else cube.bunit) if of_cube else ""
        amplitudes.append(AmplitudeImages(component.name, unit, known(post.amplitude[:, k]), known(post.amplitude_std[:, k])))
    checks = {"FLAG": image(found.flags), "CHI2Z": known(found.misfit)}
    checks |= _cubes(mixture, data, found, cube.data.shape)
    kept = {"DIVERS": __version__, "KAPPA": found.smooth.kappa, "SEED": config.maps.seed, "CALIBR": "uncalibrated"}
    return encode_parameter_maps(cube, parameters, amplitudes, checks, kept, (config.model_dump_json(),))


def _cubes(mixture: Mixture, data: SpectralData, found: Unmixed, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The fitted cube, NaN in pixels without data, and the whitened residuals, NaN where the data are bad.

    Amplitudes are those of the product, but that a mean of photons is none below 0.
    """
    post = found.posterior
    least = 0.0 if isinstance(data.noise, Poisson) else -torch.inf
    empty = (found.flags & NODATA) > 0
    whole: list[Tensor] = []
    white: list[Tensor] = []
    for rows in torch.arange(len(post.u)).split(8192):
        part = data.select(rows)
        mean = mixture.mean(post.amplitude[rows].clamp_min(least), post.inside[rows], part.background)
        residual = (part.y - mean) * part.noise.precision(mean).d.sqrt()
        whole.append(torch.where(empty[rows, None], torch.nan, mean))
        white.append(torch.where(part.good, residual, torch.nan))
    cube = lambda parts: rearrange(torch.cat(parts), "(h w) k -> k h w", h=shape[1]).numpy()
    return {"FIT": cube(whole), "RESID": cube(white)}
