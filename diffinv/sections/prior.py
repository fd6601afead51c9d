"""The sections of `diffinv train` for a diffusion prior: what its images are, what it learns from, and how.

A file with a `prior` section trains a prior. Levels are in units of the images' scale, which the network takes for 1; all other
numbers are in the unit of the data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from diffinv.config import Count, Field, Positive, Section
from diffinv.sections.terms import Groups, NotNegative
from diffinv.sections.train import Counts, DataSection, Noises, Operators, TrainingSection, Widths


class LevelsSection(Section):
    """Noise levels in training: ln σ ~ N(mean, std²), in units of the images' scale."""

    mean: float
    std: Positive


class PriorSection(Section):
    """What the images are, and the network.

    bands: names; (grey) for a prior that is used band by band. pixel_scale: arcsec. target_fwhm: of the images' PSF, arcsec.
    sigma_min, sigma_max: the levels that a sampler may use, in units of the images' scale.
    """

    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    pixel_scale: Positive
    target_fwhm: NotNegative
    sigma_min: Positive
    sigma_max: Positive
    levels: LevelsSection
    widths: Widths = (32, 64, 96)
    blocks: Counts = (1, 1, 2)


class CleanLearning(Section):
    """The data are the images. views: groups under which they are as likely as they are."""

    kind: Literal["clean"]
    views: tuple[Groups, ...] = ()


class AmbientLearning(Section):
    """Noisy images, by recorrupted targets with the weight c^power: levels above the noise of each image."""

    kind: Literal["ambient"]
    power: Annotated[int, Field(ge=0, le=2)] = 2


class GsureLearning(Section):
    """Noisy images, by Stein's identity: levels from the noise of each image up, twice the cost, better near it."""

    kind: Literal["gsure"]


class EmLearning(Section):
    """Expectation maximisation: training.steps are those of a lap.

    laps. levels: of the sampler of the E-step. iterations: of its guidance's solver, where the data are not images with white
    noise. chunk: measurements drawn at once. replay: laps before that are learnt from too. first_steps: updates by `gsure` on
    noisy images before the first lap, 0 for none. start: the Gaussian that the first lap draws with: `fourier` for images and
    blurs, `low_rank` of `rank` for masks; start_laps: of its own EM; or `positive`, not a draw but a positive image that fits
    the data, for sources on an empty sky. views: groups under which images are as likely as they
    are; what neither data nor groups show stays that of the start. Noisy images teach the levels above their noise by `gsure` in
    every lap, and draws those below; with views, or a reduced precision, draws teach all levels.
    """

    kind: Literal["em"]
    laps: Count
    start: Literal["fourier", "low_rank", "positive"]
    rank: Count = 16
    start_laps: Count = 20
    levels: Annotated[int, Field(ge=2)] = 24
    iterations: Count = 8
    chunk: Count = 64
    replay: Annotated[int, Field(ge=0)] = 0
    first_steps: Annotated[int, Field(ge=0)] = 0
    views: tuple[Groups, ...] = ()


Learnings = Annotated[CleanLearning | AmbientLearning | GsureLearning | EmLearning, Field(discriminator="kind")]


class MoreSection(Section):
    """Clean or simulated images that are learnt from beside the noisy ones; times: how often each counts."""

    data: DataSection
    times: Count = 1


class PriorConfig(Section):
    """The configuration of a prior's training. operator and noise: of the data; neither for `clean`."""

    prior: PriorSection
    data: DataSection
    learning: Learnings
    training: TrainingSection
    operator: Operators | None = None
    noise: Noises | None = None
    more: MoreSection | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as plain values."""
        return self.model_dump(mode="json")
