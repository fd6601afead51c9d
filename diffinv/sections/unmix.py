"""The sections of `diffinv unmix`: a cube, the components of its spectra, and how maps of their parameters are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from diffinv.config import Count, Field, Number, Positive, Section, Seed, positive_or

Range = tuple[Number, Number]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,30}$")]


class BackgroundSection(Section):
    """path: a PHA file of a region without source, in the channels of `rmf`. area: of a pixel of the cube over that of the
    region. Exposures are those of the files. Channels are joined until they hold 20 counts; their error is not in the maps' σ."""

    path: Path
    area: Positive


class CubeSection(Section):
    """What the cube's file does not say itself; without a response the model is of the cube's own channels.

    rmf, arf: response of X-ray data, energies: their range, keV. pixel: sky pixels a pixel of the image, channels_a_bin and
    region (x, y, height, width): of an event list. array: name in a .mat or .npz file. exposure: s, where the file does not say
    it. background: expected counts (or flux) a channel and pixel beside the components; those of background_spectrum are added.
    window: channels to use, of a cube without a response, and line_free: ranges whose scatter in each pixel replaces the file's
    variance, both in the unit of its axis. noise_std: σ of every value of a cube whose file has no variance, or "estimate", what
    other channels do not predict, where noise is independent from channel to channel; without either its values are counts.
    max_pixels: limit on what is read, in values of images and bytes of tables (null: 2²⁶).
    """

    rmf: Path | None = None
    arf: Path | None = None
    energies: Range | None = None
    channels_a_bin: Count = 1
    pixel: Positive | None = None
    region: tuple[Number, Number, Count, Count] | None = None
    array: str | None = None
    exposure: Positive | None = None
    window: Range | None = None
    line_free: tuple[Range, ...] = ()
    noise_std: positive_or("estimate") | None = None
    background: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    background_spectrum: BackgroundSection | None = None
    max_pixels: Count | None = None


class ThermalModel(Section):
    """A hot plasma: bremsstrahlung and the lines of a table. Parameters: kT, z, v_turb and an abundance an element."""

    kind: Literal["thermal"]
    lines: Path


class PowerLawModel(Section):
    """E^(−Gamma), of photons."""

    kind: Literal["power_law"]


class BremsstrahlungModel(Section):
    """Parameters: kT, z."""

    kind: Literal["bremsstrahlung"]


class LinesModel(Section):
    """Gaussian lines that move together. centres: in the unit of the axis. strengths: relative. velocity, width: boxes, km/s."""

    kind: Literal["lines"]
    centres: Annotated[tuple[Positive, ...], Field(min_length=1)]
    strengths: tuple[Positive, ...] | None = None
    velocity: Range
    width: tuple[Positive, Positive]


class FlatModel(Section):
    """The same in every channel of the cube, not folded with a response; no parameter."""

    kind: Literal["flat"]


class TableModel(Section):
    """A FITS table model. redshift: its box, where the file has REDSHIFT = T."""

    kind: Literal["table"]
    path: Path
    redshift: Range | None = None


class EmulatorModel(Section):
    """A trained emulator, in the channels of the cube."""

    kind: Literal["emulator"]
    path: Path


Models = Annotated[
    ThermalModel | PowerLawModel | BremsstrahlungModel | LinesModel | FlatModel | TableModel | EmulatorModel,
    Field(discriminator="kind"),
]


class AbsorptionSection(Section):
    """exp(−n_H σ): table of cross sections (ENERGY, SIGMA); unit: cm² of its numbers. Adds the parameter n_H, 1e22 cm⁻²."""

    path: Path
    unit: Positive


class ComponentSection(Section):
    """One kind of spectrum. box: where parameters may lie. fixed: parameters held. log: those fitted on a logarithmic axis.
    emulate: replace the model, in the cube's channels, by an emulator trained at the start; amplitudes are then counts."""

    name: Name
    model: Models
    absorption: AbsorptionSection | None = None
    box: dict[str, Range] = {}
    fixed: dict[str, Number] = {}
    log: tuple[str, ...] = ()
    emulate: bool = False


class MapsSection(Section):
    """scales: of the starlets. kappas: candidates for the strength of the sparse map, in standard errors. starts: along each
    parameter's axis, in its box. rounds: of linearisation of the Gaussian field. shares: whether the ratios of amplitudes have
    smooth maps as the parameters have; null: where there are several components, all of them emulators. pixels: (x, y), from 1,
    whose posteriors the report plots; none means the brightest, the median one and the worst fitted."""

    scales: Annotated[int, Field(ge=1, le=8)] = 5
    kappas: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
    starts: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.17, 0.5, 0.83)
    rounds: Count = 6
    shares: bool | None = None
    pixels: tuple[tuple[Count, Count], ...] = ()
    seed: Seed = 0


class UnmixConfig(Section):
    """The configuration of `diffinv unmix`."""

    cube: CubeSection = CubeSection()
    components: Annotated[tuple[ComponentSection, ...], Field(min_length=1)]
    links: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...] = ()
    maps: MapsSection = MapsSection()


class LikeSection(CubeSection):
    """like: a cube or event list, in whose channels an emulator is trained."""

    like: Path


class EmulatorConfig(UnmixConfig):
    """The configuration of a training of emulators: that of `diffinv unmix`, and a cube. `links`, `maps`, and the cube's noise
    and background are for the maps."""

    cube: LikeSection
