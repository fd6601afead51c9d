"""The sections of `diffinv sample`, `diffinv inspect` and `diffinv simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from diffinv.config import Count, Device, Field, Names, Number, Paths, Position, Positive, PositiveList, Section, Seed, Share

Weights = Annotated[dict[str, Number], Field(min_length=1)]


class PriorSection(Section):
    """Which prior: a shipped name or the path of a .safetensors file."""

    name: str = "galaxies-64"


class InputSection(Section):
    """What an input file does not say itself; no noise, PSF, unit or scale has a default. Paths: from the working directory.
    psf: one file, or one a band; stamps, or a PSFEx or STDPSF model, whose place psf_position says as [x, y], in FITS pixels.
    mixing: for a band that the prior does not have, the weights of the prior's bands in it, as of g, r and i in VIS."""

    psf: Paths | None = None
    psf_oversample: Positive | None = None
    psf_kind: Literal["effective", "optical"] | None = None
    psf_norm: Positive | None = None
    psf_position: Position | None = None
    variance: Path | None = None
    noise_std: PositiveList | None = None
    bands: Names | None = None
    mixing: dict[str, Weights] | None = None
    unit: str | None = None
    pixel_scale: Positive | None = None
    zeropoint: Number | None = None
    dq_bits: Annotated[int, Field(ge=0)] | None = None
    mask_planes: Names | None = None
    hdu: int | str | None = None
    max_pixels: Count = 2**26


class GuidanceSection(Section):
    """How the likelihood enters; without a name, the choice of `diffinv.reconstruct`."""

    name: str | None = None
    iterations: Count | None = None
    tol: Positive | None = None


class SamplerSection(Section):
    """How draws are made; without a name or steps, the choice of `diffinv.reconstruct`. held_out: share of the information of the
    data that no draw sees, and that judges the draws; without it draws see all. objects: of one shape sampled together; without
    it one on a processor, many on an accelerator."""

    name: str | None = None
    steps: Count | None = None
    samples: Annotated[int, Field(ge=2, le=100_000)] = 32
    seed: Seed = 0
    held_out: Share | None = None
    max_batch: Count | None = None
    objects: Count | None = None
    guidance: GuidanceSection = GuidanceSection()


class OutputSection(Section):
    """What a product holds: `samples` stores the draws; `target_psf` is the answer's resolution (arcsec, Gaussian FWHM; without
    it the prior's); `margin` is sampled around the field and cut off (output pixels; without it the width of the PSF where
    the field is larger than the prior's, or has light at its edges)."""

    samples: bool = True
    target_psf: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    margin: Annotated[int, Field(ge=0, le=512)] | None = None


class SampleConfig(Section):
    """The configuration of `diffinv sample` and `diffinv inspect`."""

    prior: PriorSection = PriorSection()
    input: InputSection = InputSection()
    sampler: SamplerSection = SamplerSection()
    output: OutputSection = OutputSection()
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a product, as plain values: everything but the device and the sizes of batches."""
        sampler = {"max_batch", "objects"} | ({"held_out"} if self.sampler.held_out is None else set())
        unset = {"input": {"mixing"}} if self.input.mixing is None else {}
        return self.model_dump(mode="json", exclude={"device": True, "sampler": sampler, **unset})


class SimulateSection(Section):
    """Mock observations: a survey, its bands, how many galaxies. `cosmos` is the folder with the COSMOS tables and stamps;
    without it galaxies are drawn from analytic distributions alone. `flux_ratios`: flux in each band over the first."""

    survey: Literal["lsst", "lsst_year_1", "hsc_wide", "euclid_vis"]
    bands: Names
    count: Count = 1
    seed: Seed = 0
    psf_size: Annotated[int, Field(ge=9, le=255)] = 41
    flux_ratios: tuple[Positive, ...] | None = None
    cosmos: Path | None = None


class SimulateConfig(Section):
    """The configuration of `diffinv simulate`."""

    simulate: SimulateSection
