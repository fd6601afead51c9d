"""`diffinv train` of emulators: components of a configuration of `diffinv unmix`, once for many cubes of the same channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffinv.assembly.components import Say, component_model, cube_options, emulated
from diffinv.config import Loaded
from diffinv.core.checks import ConfigError, DiffinvError
from diffinv.data.cube_input import open_cube
from diffinv.sections.unmix import EmulatorConfig


def train_emulators(loaded: Loaded[EmulatorConfig], out: Path, say: Say) -> Path:
    """Train OUT/NAME.safetensors of each component with `emulate`, and say its errors; returns the folder.

    Raises: ConfigError where no component is to be emulated, or a file is there already; as `unmix_file` for the cube.
    """
    config = loaded.config
    wanted = [(number, section) for number, section in enumerate(config.components) if section.emulate]
    if not wanted:
        raise ConfigError(f"{loaded.where('components')}: none has emulate: true; there is nothing to train.")
    paths = [out / f"{section.name}.safetensors" for _, section in wanted]
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise ConfigError(f"{', '.join(there)}: there already; give another --out.")
    cube, response = open_cube(config.cube.like, replace(cube_options(config.cube), noise_std=None))
    for path, (number, section) in zip(paths, wanted, strict=True):
        try:
            emulated(section, component_model(section, cube, response, config.cube.exposure), path, "diffinv train", say)
        except DiffinvError as error:
            raise ConfigError(f"{loaded.where(f'components.{number}')}: {error}") from error
    return out
